"""covo-check speech: what a narrower dtype, fewer evaluations, a fixed context, blocks and other threads change.

The measure of all is the float32 result with the checkpoint's own steps; of blocks it is the whole reply in their own
dtype, the one that the device is fast in. Figures of speech on random weights say how exact the arithmetic is, not how
a voice sounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import click
import numpy as np
import torch
from torch import Tensor

from covo_npu.kernels.device import fast_dtype, open_device
from covo_npu.kernels.select import select
from covo_npu.runtime.flow import Flow
from covo_npu.runtime.options import WHOLE, SpeechBlocks
from covo_npu.runtime.speech import SpeechStream, given_noise
from covo_npu.runtime.token2wav import SpeechDtypes, Token2Wav
from covo_npu.tools.check.result import Finding, Result, Subject, check
from covo_npu.tools.check.seams import measure_seams, seams_at
from covo_npu.tools.check.waveforms import Distance, distance
from covo_npu.tools.speech import PLANS, load_token2wav, recast

THREADS_SNR_DB = 80.0  # two float32 runs that differ in the order of their sums alone
NUM_CODES = 25


def examine(subject: Subject, num_codes: int = NUM_CODES, stream: bool = False) -> Result:
    """Return the findings for one reply of random codes. stream: also for the PLANS of blocks."""
    device = open_device(subject.options.device)
    kernels = select(None, device)
    networks, voice = load_token2wav(subject.require_ckpt(), kernels, device)
    usual = networks.flow
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(networks.config.dit.num_codes, (num_codes,), generator=generator).tolist()
    noise = torch.randn(networks.num_frames(num_codes, voice), networks.config.dit.latent_dim, generator=generator)

    def speech(flow: Flow = usual, by: Token2Wav = networks, blocks: SpeechBlocks = WHOLE) -> Tensor:
        stream = SpeechStream(by, voice, given_noise(noise), blocks, flow)
        return torch.from_numpy(np.concatenate((stream.push(codes), stream.finish())))

    expected = speech()
    with _other_threads() as threads:
        spread = distance(speech(), expected)
    holds = spread.snr_db >= THREADS_SNR_DB
    bound = f"SNR at least {THREADS_SNR_DB:.0f} dB"
    findings = [Finding(f"float32, {threads} threads", str(spread), bound, "float32 arithmetic", holds)]
    narrow = recast(networks, kernels, SpeechDtypes(flow=torch.bfloat16))
    half = speech(by=narrow)
    findings.append(_rounded("flow matching bfloat16", half, expected))
    for dtype in (torch.bfloat16, torch.float16):
        name = f"vocoder {str(dtype).removeprefix('torch.')}"
        if kernels.conv_weight(expected.new_zeros(1, device=device), dtype).dtype != dtype:
            findings.append(Finding(name, "computed in float32 here"))
            continue
        found = speech(by=recast(networks, kernels, SpeechDtypes(vocoder=dtype)))
        findings.append(_rounded(name, found, expected))
    for steps in sorted({max(1, usual.steps * 2 // 3), max(1, usual.steps // 2)} - {usual.steps}, reverse=True):
        findings.append(_evaluations(Flow(steps), distance(speech(Flow(steps)), expected)))
    euler = Flow(usual.steps, "euler")
    findings.append(_evaluations(euler, distance(speech(euler), expected)))
    fixed = replace(usual, fixed_context=True)
    findings.append(Finding("fixed context", str(distance(speech(fixed), expected))))
    factor = networks.config.dit.upsample_factor
    plans = [(name, blocks, usual) for name, blocks in PLANS.items()]
    plans.append(("default, fixed context", SpeechBlocks(), fixed))
    fast, whole = (narrow, half) if fast_dtype(device) == torch.bfloat16 else (networks, expected)
    for name, blocks, flow in plans if stream else ():
        found, covered = speech(flow, fast, blocks), voice.num_frames - voice.num_codes * factor
        seams = measure_seams(found, seams_at(blocks, num_codes, factor, covered))
        measured = f"log-mel {distance(found, whole).log_mel:.3f} dB from the whole reply, {seams}"
        findings.append(Finding(f"in blocks, {name}", measured))
    title = (
        f"{num_codes} codes, {usual.evaluations} evaluations, {device}, against float32 with "
        f"{torch.get_num_threads()} threads"
    )
    return Result("speech", title, tuple(findings))


def _rounded(name: str, found: Tensor, expected: Tensor) -> Finding:
    return Finding(name, str(distance(found, expected)), "finite", "", bool(found.isfinite().all()))


def _evaluations(flow: Flow, found: Distance) -> Finding:
    return Finding(f"{flow.evaluations} evaluations ({flow.steps} {flow.solver} steps)", str(found))


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


@check("speech", loading=("device", "threads"))
@click.option("--codes", default=NUM_CODES, show_default=True, type=click.IntRange(1), help="Of the reply.")
@click.option("--stream", is_flag=True, help="Also speech in blocks: take --codes 100 or more, for some seams.")
def command(subject: Subject, codes: int, stream: bool) -> Result:
    """Measure what bfloat16, fewer evaluations, a fixed context and, with --stream, blocks change in the speech.

    Measured against the float32 result of the whole reply. Beside it stands what another count of threads changes in
    float32: what lies near that is nothing. Blocks are measured against the whole reply in the dtype that the device
    is fast in, bfloat16 or float32; of them there is also what happens at their seams, as a ratio to what happens
    elsewhere: 1 is no seam.
    """
    return examine(subject, codes, stream)
