"""covo-check mel: the mel features of a device against those of the CPU, by the figures of the Ascend document."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from covo_npu.convert.transforms import mel_filters
from covo_npu.kernels.select import open_device
from covo_npu.runtime import audio
from covo_npu.runtime.checkpoint import ENCODER, read_manifest
from covo_npu.runtime.loader import load_tensors
from covo_npu.tools.check_result import (
    Finding,
    Result,
    Subject,
    below,
    ckpt_option,
    device_option,
    json_option,
    show,
    verbose_option,
    wav_argument,
)
from covo_npu.tools.question import read_question

NUM_MELS = 128
DOCUMENT = "the Ascend document, CPU against NPU"
MAX_ABS, MEAN_ABS, MEAN_REL, COSINE = 1.812e-05, 1.285e-07, 1.224e-06, 0.9999998
FLOAT32_FACTOR = 2.0  # a correct float32 computation may be off by what another one is off, once on each side
BF16_RTOL, BF16_ATOL = 1.6e-2, 1e-5  # PyTorch's own closeness of bfloat16: what the encoder reads


@dataclass(frozen=True, slots=True)
class Gap:
    """How far two tensors are apart; relative to the second one."""

    max_abs: float
    mean_abs: float
    mean_rel: float
    cosine: float
    within_bf16: float  # share of values


def gap(found: Tensor, expected: Tensor) -> Gap:
    """Return how far two tensors of one shape are apart. All of it in float64."""
    a, b = found.cpu().double().flatten(), expected.cpu().double().flatten()
    difference = (a - b).abs()
    return Gap(
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        mean_rel=float((difference / b.abs().clamp(min=1e-8)).mean()),
        cosine=float(F.cosine_similarity(a, b, dim=0)),
        within_bf16=float((difference <= BF16_ATOL + BF16_RTOL * b.abs()).double().mean()),
    )


def exact_log_mel(samples: Tensor, filters: Tensor) -> Tensor:
    """Return audio.log_mel in float64 throughout, [M, 3000]: written from its definition, to measure rounding by."""
    samples = samples[: audio.ENCODER_SAMPLES].double()
    samples = F.pad(samples, (0, audio.ENCODER_SAMPLES - samples.shape[0]))
    half = audio.N_FFT // 2
    padded = torch.cat((samples[1 : half + 1].flip(0), samples, samples[-half - 1 : -1].flip(0)))
    window = torch.hann_window(audio.N_FFT, dtype=torch.float64)
    spectrum = torch.fft.rfft(padded.unfold(0, audio.N_FFT, audio.HOP)[:-1] * window)
    mel = (filters.double() @ spectrum.abs().square().T).clamp(min=1e-10).log10()
    return (torch.maximum(mel, mel.max() - 8) + 4) / 4


def filters_of(ckpt: Path) -> Tensor:
    """Return the mel filter bank of a checkpoint. Raises CheckpointError."""
    with load_tensors(read_manifest(ckpt), [ENCODER], torch.device("cpu"), mode="eager") as weights:
        return weights.tensors["frontend.mel_filters"]


def compare(samples: Tensor, rate: int, filters: Tensor, subject: str, device: torch.device) -> Result:
    """Return the findings for one recording. On the CPU alone float32 is held against float64.

    Bounds: the document's figures. Where float32 itself is coarser than they are (recordings with bins that lie 80 dB
    under the loudest), FLOAT32_FACTOR times the error of another float32 computation: the CPU's for a device, the one
    by matrix products for the CPU.
    """
    segments = [audio.to_encoder_rate(piece) for piece in audio.segments(audio.prepare(samples, rate))]
    host = torch.stack([audio.log_mel(segment, filters) for segment in segments])
    exact = torch.stack([exact_log_mel(segment, filters) for segment in segments])
    if device.type == "cpu":
        other = torch.stack([audio.log_mel(segment, filters, audio.dft_power) for segment in segments])
        float32 = gap(other, exact)
        found, what = gap(host, exact), "cpu, float32 against float64 (there is no other device here)"
    else:
        there = torch.stack([audio.log_mel(segment.to(device), filters.to(device)).cpu() for segment in segments])
        float32 = gap(host, exact)
        found, what = gap(there, host), f"{device} against cpu, float32"
    bounds = (
        ("largest difference", "max_abs", MAX_ABS),
        ("mean difference", "mean_abs", MEAN_ABS),
        ("mean relative difference", "mean_rel", MEAN_REL),
    )
    findings = [_bounded(name, getattr(found, field), bound, getattr(float32, field)) for name, field, bound in bounds]
    findings += [
        Finding("cosine", f"{found.cosine:.9f}", f"at least {COSINE}", DOCUMENT, found.cosine >= COSINE),
        Finding(
            "share within bfloat16's tolerance",
            f"{100 * found.within_bf16:.4f} %",
            "100 %",
            "the encoder reads bfloat16",
            found.within_bf16 == 1.0,
        ),
    ]
    return Result("mel", f"{what}; {subject}", tuple(findings))


def examine(subject: Subject) -> Result:
    """Return the findings for a subject. Without a checkpoint the filter bank is computed as conversion does."""
    samples, rate, label = read_question(subject.wav)
    filters = filters_of(subject.ckpt) if subject.ckpt else mel_filters(NUM_MELS)
    return compare(samples, rate, filters, label, open_device(subject.device))


def _bounded(name: str, found: float, document: float, float32: float) -> Finding:
    """The document's bound; on recordings where float32 is coarser, float32's own."""
    own = FLOAT32_FACTOR * float32
    if own > document:
        return below(name, found, own, f"{FLOAT32_FACTOR:g} x what float32 costs here; document: {document:.3e}")
    return below(name, found, document, DOCUMENT)


@click.command("mel")
@wav_argument
@ckpt_option(required=False)
@device_option
@json_option
@verbose_option
def command(wav: Path | None, ckpt: Path | None, device: str, as_json: bool, **options: Any) -> int:
    """Compare the mel features of a device with those of the CPU. Needs no checkpoint.

    Without WAV a question is made up. covo-run computes these features on the host in any case.
    """
    return show(examine(Subject(ckpt, wav, device)), as_json)
