"""covo-check speech: what a narrower dtype and fewer evaluations change in the speech, beside what threads change.

The measure of all is the float32 result with the checkpoint's own steps. Figures of speech on random weights say how
exact the arithmetic is, not how a voice sounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from covo_npu.kernels.select import open_device, select
from covo_npu.runtime.audio import SAMPLE_RATE
from covo_npu.runtime.flow import Flow
from covo_npu.tools.bench_token2wav import from_checkpoint
from covo_npu.tools.check_result import (
    CheckError,
    Finding,
    Result,
    Subject,
    ckpt_option,
    device_option,
    json_option,
    show,
    verbose_option,
)

THREADS_SNR_DB = 80.0  # two float32 runs that differ in the order of their sums alone
NUM_CODES = 25
FLOOR = 1e-5  # of magnitudes before their logarithm: -100 dB of full scale
WINDOWS = (512, 1024, 2048)  # samples, of the multi-resolution distance
NUM_MELS, MEL_WINDOW = 80, 1024


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a waveform is from another. The last two are zero for equal ones and have no upper bound."""

    snr_db: float
    log_mel: float  # mean difference of the mel spectrum, in dB
    stft: float  # spectral convergence plus mean difference of log magnitudes, mean over WINDOWS

    def __str__(self) -> str:
        return f"SNR {self.snr_db:.1f} dB, log-mel {self.log_mel:.3f} dB, multi-resolution STFT {self.stft:.4f}"


def distance(found: Tensor, expected: Tensor) -> Distance:
    """Return the distance of two waveforms [N] of equal length."""
    found, expected = (torch.nn.functional.pad(x.double(), (0, max(0, 2048 - len(x)))) for x in (found, expected))
    noise = (found - expected).square().sum()
    snr = float(10 * torch.log10(expected.square().sum() / noise)) if noise else float("inf")
    filters = mel_filters(MEL_WINDOW, NUM_MELS, SAMPLE_RATE)
    mels = [20 * (filters @ spectrum(x, MEL_WINDOW)).clamp(min=FLOOR).log10() for x in (found, expected)]
    parts = []
    for window in WINDOWS:
        ours, theirs = (spectrum(x, window) for x in (found, expected))
        convergence = (ours - theirs).norm() / theirs.norm().clamp(min=FLOOR)
        logs = (ours.clamp(min=FLOOR).log() - theirs.clamp(min=FLOOR).log()).abs().mean()
        parts.append(float(convergence + logs))
    return Distance(snr, float((mels[0] - mels[1]).abs().mean()), sum(parts) / len(parts))


def spectrum(x: Tensor, window: int) -> Tensor:
    """Return magnitudes [window // 2 + 1, frames] of a waveform [N], hop a quarter window."""
    shape = torch.hann_window(window, dtype=x.dtype)
    return torch.stft(x, window, window // 4, window=shape, return_complex=True, pad_mode="constant").abs()


def mel_filters(window: int, count: int, rate: int) -> Tensor:
    """Return triangles [count, window // 2 + 1] evenly spaced in mel, 2595 log10(1 + f / 700)."""
    top = 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700, dtype=torch.float64))
    edges = 700 * (10 ** (torch.linspace(0, 1, count + 2, dtype=torch.float64) * top / 2595) - 1)
    bins = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64)
    left, centre, right = (edges[i : i + count, None] for i in range(3))
    return torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)


def run(ckpt: Path, device: str, num_codes: int) -> Result:
    """Return the findings for one reply of random codes."""
    torch_device = open_device(device)
    networks = from_checkpoint(ckpt, select(None, torch_device), torch_device)
    usual = networks.flow
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(networks.config.dit.num_codes, (num_codes,), generator=generator).to(torch_device)
    noise = torch.randn(networks.num_frames(num_codes), networks.config.dit.latent_dim, generator=generator)

    def speech(flow: Flow = usual, dtype: torch.dtype = torch.float32) -> Tensor:
        networks.configure(dtype, flow)
        with torch.inference_mode():
            return networks(codes, noise.to(torch_device)).cpu()

    expected = speech()
    with _other_threads() as threads:
        spread = distance(speech(), expected)
    findings = [
        Finding(
            f"float32, {threads} threads", str(spread), f"SNR at least {THREADS_SNR_DB:.0f} dB", "float32 arithmetic",
            spread.snr_db >= THREADS_SNR_DB,
        )
    ]  # fmt: skip
    steps = sorted({usual.steps, max(1, usual.steps * 2 // 3), max(1, usual.steps // 2)}, reverse=True)
    for flow in [*(Flow(count) for count in steps[1:]), Flow(usual.steps, "euler")]:
        name = f"{flow.evaluations} evaluations ({flow.steps} {flow.solver} steps)"
        findings.append(Finding(name, str(distance(speech(flow), expected))))
    half = speech(dtype=torch.bfloat16)  # last: there is no way back to float32
    findings.insert(1, Finding("bfloat16", str(distance(half, expected)), "finite", "", bool(half.isfinite().all())))
    title = (
        f"{num_codes} codes, {usual.evaluations} evaluations, {torch_device}, against float32 with "
        f"{torch.get_num_threads()} threads"
    )
    return Result("speech", title, tuple(findings))


@contextmanager
def _other_threads() -> Iterator[int]:
    """Compute with one thread, or with two where one is usual."""
    usual = torch.get_num_threads()
    other = 1 if usual > 1 else 2
    torch.set_num_threads(other)
    try:
        yield other
    finally:
        torch.set_num_threads(usual)


def examine(subject: Subject) -> Result:
    """Return the findings for a checkpoint. Raises CheckError without one."""
    if subject.ckpt is None:
        raise CheckError("speech needs a checkpoint: give --ckpt")
    return run(subject.ckpt, subject.device, NUM_CODES)


@click.command("speech")
@ckpt_option()
@device_option
@click.option("--codes", default=NUM_CODES, show_default=True, type=click.IntRange(1), help="Of the reply.")
@json_option
@verbose_option
def command(ckpt: Path, device: str, codes: int, as_json: bool, **options: object) -> int:
    """Measure what bfloat16 and fewer evaluations change in the speech, against the float32 result.

    Beside it stands what another count of threads changes in float32: what lies near that is nothing.
    """
    return show(run(ckpt, device, codes), as_json)
