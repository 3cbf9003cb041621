"""Speech of one reply, whole or while its codes arrive: blocks of codes to latents, latents to samples.

Flow matching is not causal, so what is spoken cannot be solved on as a network of language can. A block is solved with
what was spoken before as known latents, as the network was trained to go on from a voice's prompt; a few codes after
it may be solved, too, and held back: they tell the block how it goes on, and are solved again in the next one. With a
fixed context (context.py) what was spoken is not solved again, but looked at as it is. The vocoder continues exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime.context import NOTHING, Context, Segment, digest, num_frames, without
from covo_npu.runtime.networks.bigvgan import Stream, piece_frames
from covo_npu.runtime.networks.dit import MAX_FRAMES, Rows
from covo_npu.runtime.options import CODES_PER_S, WHOLE, SpeechBlocks

if TYPE_CHECKING:
    from covo_npu.runtime.flow import Flow
    from covo_npu.runtime.token2wav import Token2Wav
    from covo_npu.runtime.voice import Voice

Noise = Callable[[int], Tensor]  # frames -> the next so many of them, [frames, Z]
Progress = Callable[[str, int, int], None]  # (stage, steps done, steps in all)


def drawn_noise(seed: int, latent_dim: int) -> Noise:
    """Return standard normal noise on the host: all its frames are those of one draw with this seed.

    So they are if pieces hold multiples of 16 values: PyTorch makes normal values on the CPU 16 at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    return lambda frames: torch.randn(frames, latent_dim, generator=generator)


def given_noise(noise: Tensor) -> Noise:
    """Return noise [L, Z], piece by piece."""
    done = 0

    def following(frames: int) -> Tensor:
        nonlocal done
        done += frames
        return noise[done - frames : done]

    return following


class SpeechStream:
    """Codes in, samples at 24 kHz out. Not for several threads at a time; streams do not know of each other.

    Noise belongs to frames, counted from the start of the voice's prompt, and how codes are cut into blocks depends on
    their number alone: so the same codes and seed give the same samples, however the codes come.
    """

    def __init__(
        self,
        networks: Token2Wav,
        voice: Voice,
        noise: Noise,
        blocks: SpeechBlocks = WHOLE,
        flow: Flow | None = None,
        on_progress: Progress | None = None,
        before_sound: Callable[[], object] = lambda: None,
    ) -> None:
        """voice: on the networks' device; flow None: the checkpoint's; before_sound: called ahead of any samples."""
        self._networks, self._voice, self._flow, self._blocks = networks, voice, flow or networks.flow, blocks
        self._draw, self._on_progress, self._before_sound = noise, on_progress, before_sound
        self._factor = networks.config.dit.upsample_factor
        self._waiting: list[int] = []  # codes that are not spoken
        self._held = 0  # of them, those that were solved and held back
        self._number = 0  # of the next block
        self._ended = self.over = False  # no codes will follow; nothing will
        self._vocoder = Stream()
        # What the next block goes on from: codes, their latents, and the noise of these and of the held ones.
        dropped = 0
        if blocks.prompt_s is not None:
            dropped = max(0, voice.num_codes - _codes(blocks.prompt_s))
            dropped = min(dropped, voice.num_frames // self._factor)  # a frame without latents is the reply's
        self._prompt_codes = voice.num_codes - dropped
        self._codes = voice.prompt_codes[dropped:]
        self._latents = voice.prompt_latents[dropped * self._factor :]
        self._noise = self._next_noise(voice.num_codes)[dropped * self._factor :]
        self._fixed: list[Segment] = []  # those of the codes that later blocks only look at
        self._num_fixed = 0  # codes

    # --- whole

    def push(self, codes: Sequence[int]) -> NDArray[np.float32]:
        """Return the samples [n] that more codes decide. Raises CovoError, and ends, for a code outside the table."""
        self.take(codes)
        return self._spoken()

    def finish(self) -> NDArray[np.float32]:
        """Return the last samples [n]: no codes follow."""
        self.end()
        return self._spoken()

    @torch.inference_mode()
    def _spoken(self) -> NDArray[np.float32]:
        pieces = []
        while self.ready:
            pieces += [samples.cpu().numpy() for samples in self.work()]
        return np.concatenate([np.zeros(0, np.float32), *pieces])

    # --- in pieces of work

    def take(self, codes: Sequence[int]) -> None:
        """Let codes wait. Raises CovoError, and ends, if one is outside the table: none of them is spoken then."""
        if self._ended:
            raise CovoError("this stream of speech has ended: codes are for another one")
        num_codes = self._networks.config.dit.num_codes
        if wrong := sorted({code for code in codes if not 0 <= code < num_codes}):
            self._ended = self.over = True
            raise CovoError(f"audio codes must be in 0..{num_codes - 1}, found {wrong[:10]}")
        self._waiting.extend(map(int, codes))

    def end(self) -> None:
        """No codes follow."""
        self._ended = True

    @property
    def ready(self) -> bool:
        """Whether there is work: a block whose codes are there, or the end."""
        return not self.over and (self._ended or self._full)

    @property
    def _full(self) -> bool:
        """Whether a block can begin that is not the last."""
        size = self._blocks.size(self._number)
        return size is not None and len(self._waiting) - self._held >= size

    def work(self) -> Iterator[Tensor]:
        """Yield the samples [n] of the next block after each piece of work; of an evaluation of the network, none.

        To be begun when `ready` and taken to its end, in inference mode.
        """
        size, last = self._blocks.size(self._number), not self._full
        latents = self._latents[:0]
        if last:
            self.over = True
            if self._waiting:
                latents = yield from self._solved(len(self._waiting), 0)
        elif size is not None:
            latents = yield from self._solved(self._held + size, self._blocks.look_ahead)
        if self._number or latents.shape[0]:  # not of a reply without codes
            yield from self._sound(latents, ends=last)
        self._number += 1
        if not last:
            self._forget()

    def _solved(self, size: int, look_ahead: int) -> Generator[Tensor, None, Tensor]:
        """Return the normalised latents of the next `size` codes without the look-ahead, which is held back."""
        new = torch.tensor(self._waiting[:size], device=self._codes.device)
        codes = torch.cat((self._codes, new))
        noise = torch.cat((self._noise, self._next_noise(size - self._held)))
        if self._flow.fixed_context:
            yield from self._fix()
        fixed, frames = self._num_fixed, self._num_fixed * self._factor
        solutions = self._networks.solve(
            codes[fixed:], self._latents[frames:], noise[frames:], self._voice, self._flow, self._context(codes)
        )
        for done, latents in enumerate(solutions, 1):
            self._tell("flow matching", done, self._flow.evaluations)
            yield latents[:0, 0]
        spoken = codes.shape[0] - look_ahead
        latents = latents[: spoken * self._factor - self._latents.shape[0]]
        self._codes, self._noise, self._latents = codes[:spoken], noise, torch.cat((self._latents, latents))
        self._waiting, self._held = self._waiting[size - look_ahead :], look_ahead
        return latents

    def _fix(self) -> Iterator[Tensor]:
        """Bring all codes whose latents are known into the fixed context; yield nothing after each evaluation."""
        start, end = self._num_fixed, min(self._codes.shape[0], self._latents.shape[0] // self._factor)
        if start == end:
            return
        networks, noise, factor = self._networks, self._noise, self._factor
        key: Hashable = None
        if self._number == 0:  # the voice's prompt, in noise that is the same in all replies
            noise = drawn_noise(0, noise.shape[1])(end * factor).to(noise.device)
            key = (self._flow, digest(self._codes[:end], self._latents[: end * factor], self._voice.speaker_embedding))
        segment = networks.prompts.get(key) if key else None
        if segment is None:
            codes, frames, kept = self._codes[start:end], slice(start * factor, end * factor), list[Rows]()
            known, context = self._latents[frames], self._context(self._codes)
            for latents in networks.solve(codes, known, noise[frames], self._voice, self._flow, context, kept):
                yield latents[:0, 0]
            segment = tuple(kept)
            if key:
                segment[-1].inputs[:, -1].cpu()  # whoever takes it, on another stream, finds all of it
                networks.prompts.add(key, segment)
        self._fixed.append(segment)
        self._num_fixed = end

    def _context(self, codes: Tensor) -> Context:
        """Return the fixed context. codes: those of the next frames, too."""
        return Context(tuple(self._fixed), codes[self._num_fixed - 1 : self._num_fixed]) if self._fixed else NOTHING

    def _sound(self, latents: Tensor, ends: bool) -> Iterator[Tensor]:
        """Yield the samples that more latents [L, Z] decide."""
        latents = self._networks.statistics(latents)
        pieces = max(1, -(-latents.shape[0] // piece_frames(latents.device)))
        self._before_sound()
        for done, samples in enumerate(self._networks.vocoder.pieces(latents.T[None], self._vocoder, ends), 1):
            self._tell("vocoder", done, pieces)
            yield samples[0]

    def _forget(self) -> None:
        """Let go of what is too long ago for the next block."""
        blocks, past = self._blocks, self._codes.shape[0] - self._prompt_codes
        kept = past if blocks.past_s is None else min(past, _codes(blocks.past_s))
        coming = self._held + (blocks.size(self._number) or 0)
        kept = max(0, min(kept, MAX_FRAMES // self._factor - self._prompt_codes - coming))
        start, end = self._prompt_codes, self._prompt_codes + past - kept
        self._codes = torch.cat((self._codes[:start], self._codes[end:]))
        start, end = start * self._factor, end * self._factor
        self._fixed = without(self._fixed, start, end)
        self._num_fixed = sum(map(num_frames, self._fixed)) // self._factor
        self._latents, self._noise = (torch.cat((x[:start], x[end:])) for x in (self._latents, self._noise))

    def _next_noise(self, num_codes: int) -> Tensor:
        return self._draw(num_codes * self._factor).to(self._codes.device)

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self._on_progress:
            self._on_progress(stage, done, total)


def _codes(seconds: float) -> int:
    return round(seconds * CODES_PER_S)
