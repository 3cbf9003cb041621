"""From logits to the next token: two repetition penalties, then greedy or temperature, top-k, top-p.

All of it is tensor work on the device of the logits: no host loop, no synchronisation, no multinomial. Each slot has
settings of its own, as tensors, so that questions with different ones are answered side by side.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from covo_npu.runtime.options import Sampling

_NOISE_BYTES = 4 << 20  # noise is drawn on the host and uploaded in blocks of at most this size a slot
_TIES = 64  # bfloat16 logits tie often: so many ids beyond the top k are looked at


@dataclass(frozen=True, slots=True)
class Settings:
    """The Sampling of some rows, [B, 1] each: floats, but for top_k (int64). A greedy row has temperature 0.

    A row without top_k has the size of the vocabulary there, one without a window has a window penalty of 1.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    repetition_penalty: Tensor
    window_penalty: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sampling], vocab_size: int, device: torch.device | None = None) -> Settings:
        """Return the settings of rows, a row each."""

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device)[:, None]

        return cls(
            column([row.temperature for row in rows]),
            column([min(row.top_k, vocab_size) or vocab_size for row in rows], torch.int64),
            column([row.top_p for row in rows]),
            column([row.repetition_penalty for row in rows]),
            column([row.window_penalty if row.window else 1.0 for row in rows]),
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.window_penalty

    def __getitem__(self, slots: slice) -> Settings:
        return Settings(*(tensor[slots] for tensor in self.tensors))


class Sampler:
    """What is known of the round of each slot: its settings, the ids seen, the last ids, the noise to come.

    All of it lies on the device and is written in place, so that a captured step can be replayed on it; `form` says
    what a capture depends on besides. Each slot draws its noise from a generator of its own, in blocks whose shape only
    its own settings decide: what a sequence samples does not depend on its neighbours.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self._rows = [Sampling()] * num_slots
        self._settings = Settings.of(self._rows, vocab_size, device)
        self._seen = torch.zeros(num_slots, vocab_size, dtype=torch.uint8, device=device)  # devices scatter no booleans
        self._recent = torch.zeros(
            num_slots, 0, dtype=torch.int64, device=device
        )  # as wide as the widest window so far
        self._outside = torch.zeros(num_slots, 0, dtype=torch.bool, device=device)  # columns beyond a slot's own window
        self._noise = torch.ones(num_slots, 0, device=device)  # a block [steps, candidates] a slot, flat
        self._place = torch.zeros(num_slots, dtype=torch.int64, device=device)  # where the next step's noise starts
        self._width = torch.ones(num_slots, dtype=torch.int64, device=device)  # candidates of a step
        self._stride = torch.zeros_like(self._width)  # noise that a step uses: the same, or 0 of a greedy row
        self._used = [0] * num_slots  # steps taken from the block, on the host
        self._generators = [torch.Generator() for _ in range(num_slots)]
        self._widened = 0  # how often buffers were replaced by wider ones

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The tensors that a step writes."""
        return self._seen, self._recent, self._place

    def form(self, slots: slice) -> Hashable:
        """Return what the operators of `next` depend on besides tensors: sizes, and which branches are taken."""
        rows = self._rows[slots]
        windows = {row.window for row in rows}
        sampled = [row for row in rows if row.temperature]
        candidates = self._looked_at(sampled) if sampled else 0
        return max(windows), len(windows) > 1, candidates, len(sampled) == len(rows), self._widened

    def begin(self, slot: int, input_ids: Tensor, seed: int, sampling: Sampling) -> None:
        """Start a round in a slot. input_ids: [S] int64 on the device, its prompt; the window starts with their end."""
        steps, candidates = noise_block(sampling, self.vocab_size)
        self._make_room(sampling.window, steps * candidates if sampling.temperature else 0)
        self._rows[slot] = sampling
        for tensor, value in zip(self._settings.tensors, Settings.of([sampling], self.vocab_size).tensors, strict=True):
            tensor[slot : slot + 1].copy_(value)
        self._seen[slot].zero_().scatter_(0, input_ids, 1)
        width = self._recent.shape[1]
        # A short prompt fills the window by repeating its first id, which changes nothing: an id is penalised once.
        padded = torch.cat((input_ids[:1].expand(width), input_ids))
        self._recent[slot].copy_(padded[len(padded) - width :])
        self._outside[slot].copy_(torch.arange(width) < width - sampling.window)
        self._width[slot : slot + 1].fill_(candidates)
        self._stride[slot : slot + 1].fill_(candidates if sampling.temperature else 0)
        self._place[slot : slot + 1].zero_()
        self._generators[slot] = torch.Generator().manual_seed(seed)
        self._used[slot] = steps

    def prepare(self, slots: slice) -> None:
        """Provide the noise of the next step. Host work, outside a captured step; call it before each `next`."""
        for slot in range(*slots.indices(len(self._rows))):
            sampling = self._rows[slot]
            if not sampling.temperature:
                continue
            steps, candidates = noise_block(sampling, self.vocab_size)
            if self._used[slot] == steps:
                drawn = torch.empty(steps * candidates).exponential_(generator=self._generators[slot])
                self._noise[slot, : steps * candidates].copy_(drawn.clamp_min_(1e-20))
                self._place[slot : slot + 1].zero_()
                self._used[slot] = 0
            self._used[slot] += 1

    def next(self, logits: Tensor, slots: slice) -> Tensor:
        """Return the next ids [B] int64 of some slots and remember them. logits: [B, V] float32, not written."""
        rows, settings = self._rows[slots], self._settings[slots]
        widest = max(row.window for row in rows)
        recent = self._recent[slots, self._recent.shape[1] - widest :]
        if len({row.window for row in rows}) > 1:  # beyond its own window a row repeats its last id: penalised once
            recent = torch.where(self._outside[slots, -widest:], recent[:, -1:], recent)
        scores = penalised(logits, self._seen[slots].view(torch.bool), recent, settings)
        ids = scores.argmax(-1)
        if any(row.temperature for row in rows):
            drawn = self._drawn(scores, slots)
            ids = (
                drawn
                if all(row.temperature for row in rows)
                else torch.where(settings.temperature[:, 0] > 0, drawn, ids)
            )
        self._seen[slots].scatter_(1, ids[:, None], 1)
        if self._recent.shape[1]:
            self._recent[slots].copy_(torch.cat((self._recent[slots, 1:], ids[:, None]), dim=1))
        return ids

    def move(self, source: int, target: int) -> None:
        """Let the round of slot `source` go on in slot `target`."""
        for tensor in (*self.state, *self._settings.tensors, self._outside, self._noise, self._width, self._stride):
            tensor[target].copy_(tensor[source])
        self._rows[target], self._used[target] = self._rows[source], self._used[source]
        self._generators[target] = self._generators[source]

    def _make_room(self, window: int, noise: int) -> None:
        """Widen what is too narrow for a round, to a power of two. No captured step uses the old one: see `form`."""
        self._widened += window > self._recent.shape[1] or noise > self._noise.shape[1]
        if missing := max(0, _rounded_up(window) - self._recent.shape[1]):
            first = self._recent[:, :1] if self._recent.shape[1] else self._recent.new_zeros(len(self._rows), 1)
            self._recent = torch.cat((first.expand(-1, missing), self._recent), dim=1)
            padding = self._outside.new_ones(len(self._rows), missing)
            self._outside = torch.cat((padding, self._outside), dim=1)
        if missing := max(0, _rounded_up(noise) - self._noise.shape[1]):
            self._noise = torch.cat((self._noise, self._noise.new_ones(len(self._rows), missing)), dim=1)

    def _looked_at(self, rows: Sequence[Sampling]) -> int:
        """Return among how many candidates a step chooses for sampled rows: a power of two, so that few graphs do."""
        return min(_rounded_up(max(num_candidates(row, self.vocab_size) for row in rows)), self.vocab_size)

    def _drawn(self, scores: Tensor, slots: slice) -> Tensor:
        """Return ids [B] drawn from the filtered scores; of a greedy row, any.

        argmax(p / Exp(1)) is a draw from p: the exponential race. Source: Gumbel-max trick, arXiv 1110.0214.
        """
        count = self._looked_at([row for row in self._rows[slots] if row.temperature])
        kept, candidates = filtered(scores, self._settings[slots], count)
        place, width = self._place[slots], self._width[slots]
        # Columns beyond a row's own candidates have probability 0, whatever noise they meet.
        columns = torch.arange(count, device=scores.device).remainder(width[:, None])
        noise = self._noise[slots].gather(1, place[:, None] + columns)
        place.add_(self._stride[slots])
        choice = (kept.softmax(-1) / noise).argmax(-1, keepdim=True)
        return candidates.gather(1, choice)[:, 0]


def penalised(logits: Tensor, seen: Tensor, recent: Tensor, settings: Settings) -> Tensor:
    """Return scores [B, V] after both penalties. seen: [B, V] bool; recent: [B, W] ids. Writes nothing.

    Each penalty divides a positive score and multiplies a negative one, once per distinct id; the window's comes on
    top. Source: arXiv 1909.05858, section 4.1.
    """
    scores = torch.where(seen, _penalty(logits, settings.repetition_penalty), logits)
    if recent.shape[1]:
        scores = scores.scatter(1, recent, _penalty(scores.gather(1, recent), settings.window_penalty))
    return scores


def _rounded_up(count: int) -> int:
    """Return the next power of two; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0


def num_candidates(sampling: Sampling, vocab_size: int) -> int:
    """Return how many ids top-k leaves to choose from: top_k, some more for ties with the last of them, or all."""
    return min(sampling.top_k + _TIES, vocab_size) if sampling.top_k else vocab_size


def noise_block(sampling: Sampling, vocab_size: int) -> tuple[int, int]:
    """Return (steps, candidates) of the noise that is drawn and uploaded at once."""
    candidates = num_candidates(sampling, vocab_size)
    return max(1, min(256, _NOISE_BYTES // (4 * candidates))), candidates


def filtered(scores: Tensor, settings: Settings, count: int) -> tuple[Tensor, Tensor]:
    """Return (scores [B, count] in falling order, -inf where dropped; ids [B, count]) after temperature, top-k, top-p.

    What ties with the last of the top k stays; at least one candidate stays. A greedy row counts as temperature 1.
    """
    temperature = settings.temperature.masked_fill(settings.temperature == 0, 1.0)
    kept, candidates = (scores / temperature).topk(count, dim=-1)
    last = kept.gather(1, (settings.top_k - 1).clamp(max=count - 1))
    kept = kept.masked_fill(kept < last, -torch.inf)
    # A candidate goes if it and all weaker ones together hold at most 1 - top_p.
    weaker = kept.softmax(-1).flip(-1).cumsum(-1).flip(-1)
    dropped = weaker <= 1 - settings.top_p
    dropped[:, 0] = False
    return kept.masked_fill(dropped, -torch.inf), candidates


def _penalty(scores: Tensor, penalty: Tensor) -> Tensor:
    """Return score / penalty where positive, score * penalty where negative."""
    return torch.where(scores > 0, scores / penalty, scores * penalty)
