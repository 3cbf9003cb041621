"""Channels become one, and what is odd about them: what a person would say who listens before asking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covo_npu.runtime.containers import NO_MASK

# ITU-R BS.775, table 2, to one channel: left and right at -3 dB, the centre whole, surround at -6 dB, no LFE.
SIDE, CENTRE, LFE, SURROUND = 0.5**0.5, 1.0, 0.0, 0.5
_BACK = (SURROUND,) * 2
WAV_ORDER = {6: (SIDE, SIDE, CENTRE, LFE, *_BACK), 8: (SIDE, SIDE, CENTRE, LFE, *_BACK, *_BACK)}
OGG_ORDER = {6: (SIDE, CENTRE, SIDE, *_BACK, LFE), 8: (SIDE, CENTRE, SIDE, *_BACK, *_BACK, LFE)}  # RFC 7845, 5.1.1.2
SURROUND_MASKS = (NO_MASK, 0x3F, 0x60F, 0x63F, 0xFF)  # 5.1 with back or side loudspeakers, 7.1

SILENT = 2.0**-15  # one step of 16 bits
QUIET = 0.01  # -40 dB
FULL = 0.99
CLIPPED_SHARE = 1e-3  # of samples that repeat a full-scale one; peaks of a normalised recording are single
CANCELLED = 0.1  # of the power that channels without a relation to each other would have together


def weights(channels: int, form: str = "", mask: int = NO_MASK) -> tuple[float, ...] | None:
    """Return what each channel counts in the mix, None for the mean. form: of the file, as libsndfile names it."""
    order = OGG_ORDER if form == "OGG" else WAV_ORDER
    return order.get(channels) if mask in SURROUND_MASKS else None


@dataclass(slots=True)
class Mix:
    """Mixes blocks of samples and remembers what `findings` tells.

    lossy: they come from a codec that goes beyond 1 by itself.
    """

    lossy: bool = False
    peak: float = 0.0
    samples: int = 0
    flat: int = 0  # samples that repeat a full-scale one
    power: float = 0.0  # of the mix
    apart: float = 0.0  # that it would have if no channel had anything to do with another
    surround: int = 0  # channels of a block that was mixed by loudspeakers

    def add(self, block: NDArray[np.float32], counts: Sequence[float] | None = None) -> NDArray[np.float32]:
        """Return the mix [n] of a block [n, channels]. counts: see weights()."""
        channels = block.shape[1]
        if counts is None:
            mono = block[:, 0] if channels == 1 else block.mean(axis=1, dtype=np.float32)
        else:
            mono = (block @ np.asarray(counts)).astype(np.float32)
            self.surround = channels
        with np.errstate(over="ignore", invalid="ignore"):
            size = np.abs(block)
            self.peak = max(self.peak, float(size.max(initial=0.0)))
            self.samples += block.size
            self.flat += int(np.count_nonzero((size[1:] >= FULL) & (block[1:] == block[:-1])))
            if channels > 1:
                self.power += float(np.square(mono, dtype=np.float64).sum())
                squares = np.square(block, dtype=np.float64).sum(0)
                self.apart += float(squares @ np.square(np.full(channels, 1 / channels) if counts is None else counts))
        return mono

    def findings(self) -> list[str]:
        """Return what is odd and what to do about it, a line each."""
        if self.peak < SILENT:
            return ["is silent: was the microphone muted?"]
        found = []
        if self.peak > (2.0 if self.lossy else 1.0):
            scale = "; were they not divided by 32768?" if self.peak > 128 else ": mix it with less gain"
            found.append(f"has values up to {self.peak:.6g}, beyond 1{scale}")
        elif self.flat > CLIPPED_SHARE * self.samples:
            share = 100 * self.flat / self.samples
            found.append(f"is clipped: {share:.1f} % of its samples stay at full scale; record it with less gain")
        elif self.peak < QUIET:
            decibels = 20 * np.log10(self.peak)
            found.append(f"is very quiet: its peak is {decibels:.0f} dB of full scale; record it with more gain")
        if self.power < CANCELLED * self.apart:
            found.append("its channels cancel each other, one seems to be inverted: use one of them alone")
        if self.surround:
            name = {6: "5.1", 8: "7.1"}[self.surround]
            found.append(
                f"its {self.surround} channels are taken for {name} and mixed by ITU-R BS.775, the centre whole: "
                "if they are something else, mix them to one yourself"
            )
        return found


def clipped_share(speech: NDArray[np.float32]) -> float:
    """Return the share of samples [n] at full scale, 0 if it is not worth a word."""
    share = float(np.count_nonzero(np.abs(speech) >= 1 - SILENT)) / speech.size
    return share if share > CLIPPED_SHARE else 0.0
