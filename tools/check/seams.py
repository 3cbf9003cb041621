"""How audible the seams of speech in blocks are: jumps of energy and spectral flux at them against everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from covo_npu.runtime.audio import FRAME_SAMPLES, SAMPLE_RATE
from covo_npu.runtime.options import SpeechBlocks
from covo_npu.tools.check.waveforms import FLOOR, mel_filters

WINDOW = SAMPLE_RATE // 50  # 20 ms on either side of a place
STEP = SAMPLE_RATE // 200  # places are looked at every 5 ms
NUM_MELS = 40


@dataclass(frozen=True, slots=True)
class Seams:
    """What is found at the seams, of what is found elsewhere: 1 is what the speech itself does, much more is heard.

    Both are ratios of means; of the jump in energy, dB, and of the flux, the mean change of the log-mel bands in dB.
    """

    count: int
    energy: float
    flux: float

    def __str__(self) -> str:
        if not self.count:
            return "no seams"
        return f"{self.count} seams: energy {self.energy:.2f}, flux {self.flux:.2f} of elsewhere"


def seams_at(blocks: SpeechBlocks, num_codes: int, frames_a_code: int, covered_frames: int) -> list[int]:
    """Return the samples at which one block ends and the next begins, in a streamed reply of num_codes codes.

    covered_frames: of the first code, those that the voice's prompt has already spoken.
    """
    found, arrived, number = [], 0, 0
    while (size := blocks.size(number)) is not None and arrived + size <= num_codes:
        arrived, number = arrived + size, number + 1
        frames = (arrived - blocks.look_ahead) * frames_a_code - covered_frames
        if arrived - blocks.look_ahead < num_codes:  # else nothing follows
            found.append(frames * FRAME_SAMPLES)
    return found


def measure_seams(samples: Tensor, at: Sequence[int]) -> Seams:
    """Return how the seams at some samples compare with all other places of speech [N] that lie a window from them.

    Seams that are closer than a window to an end are not counted. Without places to compare with there are no seams.
    """
    inner = [place for place in at if WINDOW <= place <= len(samples) - WINDOW]
    others = [
        place
        for place in range(WINDOW, len(samples) - WINDOW + 1, STEP)
        if all(abs(place - seam) >= 2 * WINDOW for seam in inner)
    ]
    if not inner or not others:
        return Seams(0, float("nan"), float("nan"))
    here, elsewhere = _jumps(samples, inner), _jumps(samples, others)
    energy, flux = (here / elsewhere.clamp(min=1e-9)).tolist()
    return Seams(len(inner), energy, flux)


def _jumps(samples: Tensor, places: Sequence[int]) -> Tensor:
    """Return the mean jumps [energy, flux] in dB between the windows before and after some places."""
    starts = torch.tensor(places)
    offsets = torch.arange(WINDOW)
    windows = torch.stack([samples.double()[starts[:, None] + offsets - before] for before in (WINDOW, 0)])
    level = 10 * (windows.square().mean(-1) + FLOOR**2).log10()  # [2, places]
    spectra = torch.fft.rfft(windows * torch.hann_window(WINDOW, dtype=torch.float64)).abs()
    bands = 20 * (spectra @ mel_filters(WINDOW, NUM_MELS, SAMPLE_RATE).T).clamp(min=FLOOR).log10()
    return torch.stack([(level[1] - level[0]).abs().mean(), (bands[1] - bands[0]).abs().mean()])
