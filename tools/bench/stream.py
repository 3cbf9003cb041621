"""covo-bench token2wav --stream: what speech in blocks costs, by plan, against the whole reply.

Each block is computed as in a reply, but for the evaluations of flow matching: some are timed and stand for all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from covo_npu.runtime.audio import SAMPLE_RATE
from covo_npu.runtime.flow import SOLVERS
from covo_npu.runtime.options import WHOLE, SpeechBlocks
from covo_npu.runtime.speech import SpeechStream, drawn_noise
from covo_npu.runtime.token2wav import Token2Wav
from covo_npu.runtime.voice import Voice
from covo_npu.tools.bench import measure
from covo_npu.tools.report import table

WHOLE_REPLY = "whole reply"


@dataclass(frozen=True, slots=True)
class Cost:
    """What one stream took: seconds of computing, all evaluations counted."""

    first_s: float  # from the codes of the first block to its first samples
    seconds: float
    samples: int


@dataclass(frozen=True, slots=True)
class PlanTime:
    """One plan at one length: the median of some runs."""

    plan: str
    codes: int
    first_s: float
    first_of_whole: float  # of the seconds of the whole reply of as many codes
    seconds: float
    of_whole: float
    rtf: float


def cost(networks: Token2Wav, voice: Voice, blocks: SpeechBlocks, num_codes: int, evaluations: int) -> Cost:
    """Return what speaking some codes takes. evaluations: how many are timed, a multiple of those of a step."""
    config, usual = networks.config, networks.flow
    flow = replace(usual, steps=evaluations // SOLVERS[usual.solver])
    device = voice.prompt_codes.device
    module = measure.accelerator(device)
    generator = torch.Generator().manual_seed(num_codes)
    stages: list[str] = []
    stream = SpeechStream(
        networks, voice, drawn_noise(0, config.dit.latent_dim), blocks, flow,
        on_progress=lambda stage, done, total: stages.append(stage),
    )  # fmt: skip
    stream.take(torch.randint(config.dit.num_codes, (num_codes,), generator=generator).tolist())
    stream.end()
    first, seconds, samples = 0.0, 0.0, 0
    while stream.ready:
        started = time.perf_counter()
        for piece in stream.work():
            if module:
                module.synchronize(device)
            counts = usual.evaluations / flow.evaluations if stages[-1] == "flow matching" else 1.0
            seconds += (time.perf_counter() - started) * counts
            samples += piece.numel()
            first = first or (seconds if samples else 0.0)
            started = time.perf_counter()
    return Cost(first, seconds, samples)


def measured(
    networks: Token2Wav, voice: Voice, plans: Mapping[str, SpeechBlocks], num_codes: int, evaluations: int, runs: int
) -> list[PlanTime]:
    """Return the rows of one length, the whole reply first; plans are taken in turns after one that warms up."""
    rows = {
        name: partial(cost, networks, voice, blocks, num_codes, evaluations)
        for name, blocks in {WHOLE_REPLY: WHOLE, **plans}.items()
    }
    rows[WHOLE_REPLY]()
    found: dict[str, list[Cost]] = measure.interleaved(rows, runs)
    median = {
        name: [statistics.median(getattr(each, part) for each in costs) for part in ("first_s", "seconds", "samples")]
        for name, costs in found.items()
    }
    whole = median[WHOLE_REPLY][1]
    return [
        PlanTime(name, num_codes, first, first / whole, seconds, seconds / whole, seconds * SAMPLE_RATE / samples)
        for name, (first, seconds, samples) in median.items()
    ]


def plans_table(rows: Sequence[PlanTime]) -> str:
    """Return the rows as a table."""
    lines = [
        (
            str(row.codes), row.plan, f"{row.first_s:.2f}", f"{row.first_of_whole:.2f}",
            f"{row.seconds:.2f}", f"{row.of_whole:.2f}", f"{row.rtf:.2f}",
        )
        for row in rows
    ]  # fmt: skip
    return table(("codes", "blocks", "first sound, s", "of whole", "all, s", "of whole", "RTF"), lines)
