"""From logits to the next token: two repetition penalties, then greedy or temperature, top-k, top-p.

All of it is tensor work on the device of the logits: no host loop, no synchronisation, no multinomial.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NOISE_BYTES = 4 << 20  # noise is drawn on the host and uploaded in blocks of at most this size a slot
_TIES = 64  # bfloat16 logits tie often: so many ids beyond the top k are looked at


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off."""

    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 0.9
    repetition_penalty: float = 1.05  # over the ids of this round's prompt and of its reply so far
    window_penalty: float = 1.05  # on top, over the last `window` ids
    window: int = 8

    def __post_init__(self) -> None:
        checks = (
            (self.temperature >= 0, "temperature", "at least 0", self.temperature),
            (self.top_k >= 0, "top_k", "at least 0", self.top_k),
            (0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p),
            (self.repetition_penalty > 0, "repetition_penalty", "positive", self.repetition_penalty),
            (self.window_penalty > 0, "window_penalty", "positive", self.window_penalty),
            (self.window >= 0, "window", "at least 0", self.window),
        )
        faults = [f"{name} must be {rule}, found {value}" for holds, name, rule, value in checks if not holds]
        if faults:
            raise ValueError("; ".join(faults))


class Sampler:
    """What is known of the round of each slot: the ids seen, the last ids, the noise to come.

    All of it lies on the device and is written in place, so that a captured step can be replayed on it. Each slot draws
    its noise from a generator of its own: what a sequence samples does not depend on its neighbours.
    """

    def __init__(self, sampling: Sampling, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.sampling = sampling
        self._seen = torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=device)
        self._recent = torch.zeros(num_slots, sampling.window, dtype=torch.int64, device=device)
        candidates = num_candidates(sampling, vocab_size) if sampling.temperature else 0
        self._block = max(1, min(256, _NOISE_BYTES // max(1, 4 * candidates)))  # steps of one upload
        self._noise = torch.ones(num_slots, self._block, candidates, device=device)
        self._drawn = torch.zeros(num_slots, dtype=torch.int64, device=device)  # next step of the block, on the device
        self._used = [0] * num_slots  # the same on the host
        self._generators = [torch.Generator() for _ in range(num_slots)]

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The tensors that a step writes."""
        return self._seen, self._recent, self._drawn

    def begin(self, slot: int, input_ids: Tensor, seed: int) -> None:
        """Start a round in a slot. input_ids: [S] int64 on the device, its prompt; the window starts with their end."""
        seen = self._seen[slot]
        seen.zero_().scatter_(0, input_ids, True)
        # A short prompt fills the window by repeating its first id, which changes nothing: an id is penalised once.
        padded = torch.cat((input_ids[:1].expand(self.sampling.window), input_ids))
        self._recent[slot].copy_(padded[len(padded) - self.sampling.window :])
        self._generators[slot] = torch.Generator().manual_seed(seed)
        self._used[slot] = self._block

    def prepare(self, slots: slice) -> None:
        """Provide the noise of the next step. Host work, outside a captured step; call it before each `next`."""
        if not self.sampling.temperature:
            return
        for slot in range(*slots.indices(len(self._used))):
            if self._used[slot] == self._block:
                block = torch.empty(self._noise.shape[1:]).exponential_(generator=self._generators[slot])
                self._noise[slot].copy_(block.clamp_min_(1e-20))
                self._drawn[slot : slot + 1].zero_()
                self._used[slot] = 0
            self._used[slot] += 1

    def next(self, logits: Tensor, slots: slice) -> Tensor:
        """Return the next ids [B] int64 of some slots and remember them. logits: [B, V] float32, not written."""
        seen, recent = self._seen[slots], self._recent[slots]
        scores = penalised(logits, seen, recent, self.sampling)
        ids = self._drawn_ids(scores, slots) if self.sampling.temperature else scores.argmax(-1)
        seen.scatter_(1, ids[:, None], True)
        if self.sampling.window:
            recent.copy_(torch.cat((recent[:, 1:], ids[:, None]), dim=1))
        return ids

    def move(self, source: int, target: int) -> None:
        """Let the round of slot `source` go on in slot `target`."""
        for tensor in (*self.state, self._noise):
            tensor[target].copy_(tensor[source])
        self._used[target], self._generators[target] = self._used[source], self._generators[source]

    def _drawn_ids(self, scores: Tensor, slots: slice) -> Tensor:
        """Return ids [B] drawn from the filtered scores.

        argmax(p / Exp(1)) is a draw from p: the exponential race. Source: Gumbel-max trick, arXiv 1110.0214.
        """
        kept, candidates = filtered(scores, self.sampling)
        drawn = self._drawn[slots]
        noise = self._noise[slots].gather(1, drawn[:, None, None].expand(-1, 1, kept.shape[1]))[:, 0]
        drawn.add_(1)
        choice = (kept.softmax(-1) / noise).argmax(-1, keepdim=True)
        return candidates.gather(1, choice)[:, 0]


def penalised(logits: Tensor, seen: Tensor, recent: Tensor, sampling: Sampling) -> Tensor:
    """Return scores [B, V] after both penalties. seen: [B, V] bool; recent: [B, W] ids. Writes nothing.

    Each penalty divides a positive score and multiplies a negative one, once per distinct id; the window's comes on
    top. Source: arXiv 1909.05858, section 4.1.
    """
    scores = logits
    if sampling.repetition_penalty != 1:
        scores = torch.where(seen, _penalty(scores, sampling.repetition_penalty), scores)
    if sampling.window and sampling.window_penalty != 1:
        scores = scores.scatter(1, recent, _penalty(scores.gather(1, recent), sampling.window_penalty))
    return scores


def num_candidates(sampling: Sampling, vocab_size: int) -> int:
    """Return how many ids top-k leaves to choose from: top_k, some more for ties with the last of them, or all."""
    return min(sampling.top_k + _TIES, vocab_size) if sampling.top_k else vocab_size


def filtered(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return (scores [B, K] in falling order, -inf where dropped; ids [B, K]) after temperature, top-k, top-p.

    K is num_candidates(). What ties with the last of the top k stays; at least one candidate stays.
    """
    count = num_candidates(sampling, scores.shape[-1])
    kept, candidates = (scores / sampling.temperature).topk(count, dim=-1)
    if 0 < sampling.top_k < count:
        kept = kept.masked_fill(kept < kept[:, sampling.top_k - 1, None], -torch.inf)
    if sampling.top_p < 1:
        # A candidate goes if it and all weaker ones together hold at most 1 - top_p.
        weaker = kept.softmax(-1).flip(-1).cumsum(-1).flip(-1)
        dropped = weaker <= 1 - sampling.top_p
        dropped[:, 0] = False
        kept = kept.masked_fill(dropped, -torch.inf)
    return kept, candidates


def _penalty(scores: Tensor, penalty: float) -> Tensor:
    """Return score / penalty where positive, score * penalty where negative."""
    smaller_wins = torch.minimum if penalty > 1 else torch.maximum
    return smaller_wins(scores * penalty, scores / penalty)
