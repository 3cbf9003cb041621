"""covo-bench token2wav: codes to a waveform, ours against the straightforward way, in one process and in turns.

Flow matching is timed by the evaluation of its network: `--evaluations` of them a turn, the time of all 18 (or what the
solver makes) extrapolated, since each costs the same; `--whole` runs them all. The vocoder always runs whole.
`--stream` measures replies in blocks instead, see stream.py; these are launched operator by operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from covo_npu.kernels.device import device_capture, fast_dtype, open_device
from covo_npu.kernels.interface import Kernels
from covo_npu.kernels.select import describe, select
from covo_npu.runtime.audio import SAMPLE_RATE
from covo_npu.runtime.checkpoint.config import DiTConfig, VocoderConfig
from covo_npu.runtime.cli import console, options
from covo_npu.runtime.context import NOTHING, Context
from covo_npu.runtime.flow import SOLVERS, guided
from covo_npu.runtime.networks.dit import Rows
from covo_npu.runtime.options import LoadOptions
from covo_npu.runtime.token2wav import FLOAT32, SpeechDtypes, Token2Wav
from covo_npu.runtime.voice import Voice
from covo_npu.tools.bench import measure
from covo_npu.tools.bench.stock_token2wav import StockToken2Wav
from covo_npu.tools.bench.stream import measured as measured_plans
from covo_npu.tools.bench.stream import plans_table
from covo_npu.tools.report import machine_line, machine_report, table
from covo_npu.tools.speech import PLANS, load_token2wav, recast

STOCK, OURS, OURS_HALF = "stock float32", "ours float32", "ours bfloat16"  # the last word: dtype of the products
FIXED = "fixed context"  # ours, the prompt one that is at hand
FLOW, VOCODER = "flow matching", "vocoder"
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn of one stage took."""

    seconds: float
    peak_bytes: int  # above what was in use before


@dataclass(frozen=True, slots=True)
class StageTime:
    """One stage of one path at one length."""

    path: str
    stage: str
    codes: int
    frames: int  # that the stage works on: prompt and reply, or the reply
    seconds: float  # for the whole stage: the median turn, extrapolated to all evaluations
    flops: float  # of the products alone
    rtf: float  # seconds a second of speech
    peak_bytes: int


# --- what there is to compute


def evaluation_flops(config: DiTConfig, frames: int, before: int = 0) -> float:
    """Return the operations of the products of one evaluation, both guidance rows. before: frames of a context."""
    size = config.hidden_size
    linear = config.num_layers * (4 * size**2 + 2 * size * config.intermediate_size) + 2 * size * config.latent_dim
    conv = config.conv_kernel_size * size**2 // config.conv_groups
    attention = config.num_layers * 2 * (before + frames) * size  # a frame: scores, then values
    return 2.0 * 2 * frames * (linear + conv + attention)


def vocoder_flops(config: VocoderConfig, frames: int) -> float:
    """Return the operations of the convolutions as plain sums, of which Winograd's way saves some; no filters."""
    channels, rate = config.initial_channels, 1
    products = config.latent_dim * channels * 7
    for stage_rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
        products += rate * channels * channels // 2 * kernel
        channels, rate = channels // 2, rate * stage_rate
        taps = sum(2 * k * len(d) for k, d in zip(config.resblock_kernel_sizes, config.resblock_dilations, strict=True))
        products += rate * channels**2 * taps
    return 2.0 * frames * (products + rate * channels * 7)


# --- the paths


class Paths:
    """The same weights on every path, and inputs for one length."""

    def __init__(
        self,
        networks: Token2Wav,
        voice: Voice,
        kernels: Kernels,
        device: torch.device,
        evaluations: int,
        graph: str = "auto",
    ) -> None:
        self.device, self.config, self.evaluations, self.voice = device, networks.config, evaluations, voice
        dtypes = {OURS: FLOAT32}
        if fast_dtype(device) == torch.bfloat16:
            dtypes[OURS_HALF] = SpeechDtypes(torch.bfloat16, torch.bfloat16)
        self.networks = {
            path: recast(networks, kernels, each, device_capture(graph, device)) for path, each in dtypes.items()
        }
        self.stock = StockToken2Wav(networks, voice)

    def turns(self, codes: int) -> dict[tuple[str, str], Callable[[], object]]:
        """Return {(path, stage): one turn}."""
        generator = torch.Generator().manual_seed(codes)
        ids = torch.randint(self.config.dit.num_codes, (codes,), generator=generator).to(self.device)
        frames = self.frames(codes)
        noise = torch.randn(frames[FLOW], self.config.dit.latent_dim, generator=generator).to(self.device)
        latents = torch.randn(1, self.config.vocoder.latent_dim, frames[VOCODER], generator=generator).to(self.device)
        found: dict[tuple[str, str], Callable[[], object]] = {
            (STOCK, FLOW): partial(self.stock.normalised_latents, ids, noise, self.evaluations)
        }
        for path, each in self.networks.items():
            found[path, FLOW] = partial(evaluate, each, self.voice, ids, noise, self.evaluations)
            found[f"{FIXED} {path.split()[-1]}", FLOW] = self._after_prompt(each, ids, noise)
            found[path, VOCODER] = partial(each.vocoder, latents)
        found[STOCK, VOCODER] = partial(self.stock.vocoder, latents)
        return found

    def _after_prompt(self, networks: Token2Wav, ids: Tensor, noise: Tensor) -> Callable[[], object]:
        """Return a turn of the reply's frames alone, the prompt a fixed context that is at hand."""
        voice, flow = self.voice, networks.flow
        flow = replace(flow, steps=self.evaluations // SOLVERS[flow.solver], fixed_context=True)
        frames, kept = self.fixed_frames, list[Rows]()
        codes = frames // self.config.dit.upsample_factor
        prompt, known = voice.prompt_codes[:codes], voice.prompt_latents
        if codes:
            list(networks.solve(prompt, known[:frames], noise[:frames], voice, flow, kept=kept))
        context = Context((tuple(kept),), prompt[-1:]) if codes else NOTHING
        following = torch.cat((voice.prompt_codes[codes:], ids))
        return lambda: list(networks.solve(following, known[frames:], noise[frames:], voice, flow, context))

    @property
    def fixed_frames(self) -> int:
        """Those of the prompt's codes whose latents are all known."""
        factor = self.config.dit.upsample_factor
        return min(self.voice.num_codes, self.voice.num_frames // factor) * factor

    def frames(self, codes: int) -> dict[str, int]:
        """Return {stage: the latent frames that it works on}."""
        frames = self.networks[OURS].num_frames(codes, self.voice)
        return {FLOW: frames, VOCODER: frames - self.voice.num_frames}


def evaluate(networks: Token2Wav, voice: Voice, codes: Tensor, noise: Tensor, evaluations: int) -> Tensor:
    """Return the latents after some evaluations of a reply, its preparation included."""
    codes = torch.cat((voice.prompt_codes, codes))
    if evaluations == networks.flow.evaluations:
        *_, latents = networks.solve(codes, voice.prompt_latents, noise, voice)
        return latents
    velocities = networks.evaluations.under(networks.dit.conditions(codes, voice.prompt_latents))
    (modulation,) = networks.dit.modulations([0.0], voice.speaker_embedding)
    for _ in range(evaluations):
        velocity = guided(velocities(noise, modulation), networks.config.flow.cfg_alpha, False)
        noise = torch.add(noise, velocity, alpha=0.05)
    return noise


def timed(work: Callable[[], object], device: torch.device) -> Turn:
    """Return what one call took."""
    with measure.Peak(device) as peak:
        seconds = measure.seconds(work, device)
    return Turn(seconds, peak.grown)


def measured(paths: Paths, codes: int, runs: int) -> list[StageTime]:
    """Return the rows of one length; the first turn of each path warms up and does not count."""
    turns = paths.turns(codes)
    for work in turns.values():
        work()
    found: dict[Any, list[Turn]] = measure.interleaved(
        {key: partial(timed, work, paths.device) for key, work in turns.items()},  # type: ignore[misc]
        runs,
    )
    config, frames, evaluations = paths.config, paths.frames(codes), paths.networks[OURS].flow.evaluations
    flops = {
        FLOW: evaluations * evaluation_flops(config.dit, frames[FLOW]),
        VOCODER: vocoder_flops(config.vocoder, frames[VOCODER]),
    }
    fixed = paths.fixed_frames
    following = evaluations * evaluation_flops(config.dit, frames[FLOW] - fixed, fixed)
    speech_s = frames[VOCODER] * prod(config.vocoder.upsample_rates) / SAMPLE_RATE
    rows = []
    for (path, stage), taken in found.items():
        factor = evaluations / paths.evaluations if stage == FLOW else 1.0
        seconds = measure.spread(turn.seconds for turn in taken).median * factor
        peak = max(turn.peak_bytes for turn in taken)
        after = path.startswith(FIXED)
        number, operations = (frames[FLOW] - fixed, following) if after else (frames[stage], flops[stage])
        rows.append(StageTime(path, stage, codes, number, seconds, operations, seconds / speech_s, peak))
    return rows


def matrix_rates(device: torch.device) -> dict[str, float]:
    """Return {dtype: operations a second of a square matrix product}."""
    return {str(dtype).removeprefix("torch."): measure.matrix_rate(dtype, device) for dtype in DTYPES}


# --- what is said


def rows_table(rows: Sequence[StageTime], rates: dict[str, float]) -> str:
    """Return the rows as a table; the ratio is to the stock path of the same stage and length."""
    stock = {(row.stage, row.codes): row for row in rows if row.path == STOCK}
    lines = []
    for row in sorted(rows, key=lambda row: (row.codes, row.stage, row.path != STOCK, row.path)):
        rate = row.flops / row.seconds
        figures = (
            f"{row.seconds:.2f}",
            f"{row.seconds / stock[row.stage, row.codes].seconds:.2f}",
            f"{row.rtf:.2f}",
            f"{rate / 1e12:.3f}",
            f"{rate / rates[row.path.split()[-1]]:.0%}",
            f"{row.peak_bytes / 1e6:.0f}",
        )
        lines.append((str(row.codes), row.stage, row.path, *figures))
    columns = ("codes", "stage", "path", "s", "ratio", "RTF", "TFLOP/s", "of matrix rate", "MB")
    return table(columns, lines)


@click.command("token2wav")
@options.ckpt()
@options.loading("device", "backend", "graph", "threads")
@click.option("--codes", multiple=True, type=click.IntRange(1), default=(75,), show_default=True, help="Of a reply.")
@click.option("--runs", default=2, show_default=True, type=click.IntRange(1), help="Turns of every path.")
@click.option("--evaluations", default=2, show_default=True, type=click.IntRange(2), help="A turn; an even number.")
@click.option("--whole", is_flag=True, help="All evaluations of a reply instead.")
@click.option("--stream", is_flag=True, help="Replies in blocks against whole ones instead; on our fastest path.")
@click.option("--plan", multiple=True, type=click.Choice(list(PLANS)), help="With --stream: of the plans of blocks.")
@options.common
def command(
    ckpt: Path,
    options: LoadOptions,
    codes: tuple[int, ...],
    runs: int,
    evaluations: int,
    whole: bool,
    stream: bool,
    plan: tuple[str, ...],
    json_file: str | None,
) -> None:
    """Codes to a waveform, against a straightforward implementation on the same weights in one process."""
    device = open_device(options.device)
    kernels = select(options.backend, device)
    networks, voice = load_token2wav(ckpt, kernels, device)
    with torch.inference_mode():
        counted = networks.flow.evaluations if whole else evaluations // 2 * 2
        if stream:
            dtype = fast_dtype(device)
            networks = recast(networks, kernels, SpeechDtypes(dtype), device_capture(options.graph, device))
            plans = {name: PLANS[name] for name in plan or PLANS}
            times = [row for count in codes for row in measured_plans(networks, voice, plans, count, counted, runs)]
            said = [
                _counted(counted, runs),
                f"products {str(dtype).removeprefix('torch.')}",
                _backend(kernels, networks),
            ]
            _show(plans_table(times), [asdict(row) for row in times], networks, said, device, json_file)
            return
        paths, before, found = Paths(networks, voice, kernels, device, counted, options.graph), matrix_rates(device), []
        for count in codes:
            click.echo(f"{count} codes", err=True)
            found += measured(paths, count, runs)
        after = matrix_rates(device)
    rates = {name: max(before[name], after[name]) for name in before}  # the machine may have been slower once
    rate = ", ".join(f"{name} {rate / 1e12:.3f} TFLOP/s" for name, rate in rates.items())
    said = [f"matrix rate: {rate}", _counted(counted, runs), _backend(kernels, networks)]
    rows = [asdict(row) for row in found]
    _show(rows_table(found, rates), rows, networks, said, device, json_file, matrix_rate=rates)


def _counted(evaluations: int, runs: int) -> str:
    return f"flow matching: {evaluations} evaluations a turn, the time of all extrapolated; {runs} turns, median"


def _backend(kernels: Kernels, networks: Token2Wav) -> str:
    layers = networks.config.dit.num_layers
    return f"backend {describe(kernels)}, {torch.get_num_threads()} threads, {layers} layers"


def _show(
    text: str,
    rows: Sequence[dict[str, Any]],
    networks: Token2Wav,
    said: Sequence[str],
    device: torch.device,
    json_file: str | None,
    **more: object,
) -> None:
    """Show a table, what is said beside it and the machine; all of it as JSON if that is asked for."""
    machine = machine_report(str(device))
    report = {
        "bench": "token2wav",
        "machine": machine,
        "config": asdict(networks.config),
        **more,
        "rows": rows,
        "said": said,
    }
    console.show("\n".join([text, "", *said, machine_line(machine)]), report, json_file)
