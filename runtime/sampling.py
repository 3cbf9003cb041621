"""From logits to the next token: two repetition penalties, then greedy or temperature, top-k, top-p.

All of it is tensor work on the device of the logits: no host loop, no synchronisation, no multinomial.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NOISE_BYTES = 4 << 20  # noise is drawn on the host and uploaded in blocks of this size


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
    """The state of one round for B sequences: which ids were seen, the last ids, the noise of each step."""

    def __init__(
        self, sampling: Sampling, prompts: list[list[int]], vocab_size: int, device: torch.device, seed: int
    ) -> None:
        """prompts: the ids of this round's prompt of each sequence; the window starts with their last ids."""
        self.sampling = sampling
        seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
        for row, ids in zip(seen, prompts, strict=True):
            row[ids] = True
        self._seen = seen.to(device)
        # A short prompt fills the window with its first id, which changes nothing: a window penalises an id once.
        windows = [([ids[0]] * sampling.window + ids)[-sampling.window :] if sampling.window else [] for ids in prompts]
        self._recent = torch.tensor(windows, dtype=torch.int64, device=device)
        self._generator = torch.Generator().manual_seed(seed)
        self._noise: list[Tensor] = []

    def next(self, logits: Tensor) -> Tensor:
        """Return the next ids [B] int64 and remember them. logits: [B, V] float32, not written."""
        scores = penalised(logits, self._seen, self._recent, self.sampling)
        if self.sampling.temperature == 0:
            ids = scores.argmax(-1)
        else:
            kept, candidates = filtered(scores, self.sampling)
            # argmax(p / Exp(1)) is a draw from p: the exponential race. Source: Gumbel-max trick, arXiv 1110.0214.
            choice = (kept.softmax(-1) / self._next_noise(kept)).argmax(-1, keepdim=True)
            ids = candidates.gather(1, choice)[:, 0]
        self._seen.scatter_(1, ids[:, None], True)
        self._recent = torch.cat((self._recent, ids[:, None]), dim=1)[:, 1:] if self.sampling.window else self._recent
        return ids

    def _next_noise(self, like: Tensor) -> Tensor:
        """Return Exp(1) noise shaped like `like`, from the host's generator: the same on every device."""
        if not self._noise:
            steps = max(1, _NOISE_BYTES // (4 * like.numel()))
            block = torch.empty(steps, *like.shape).exponential_(generator=self._generator)
            self._noise = list(block.clamp_min_(1e-20).to(like.device).unbind(0))[::-1]
        return self._noise.pop()


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


def filtered(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return (scores [B, K] in falling order, -inf where top-p drops them; ids [B, K]) after temperature, top-k, top-p.

    K is top_k, or V if top_k is 0. At least one candidate stays.
    """
    vocab_size = scores.shape[-1]
    count = min(sampling.top_k, vocab_size) if sampling.top_k else vocab_size
    kept, candidates = (scores / sampling.temperature).topk(count, dim=-1)
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
