"""covo-bench token2wav: codes to a waveform, ours against the straightforward way, in one process and in turns.

Flow matching is timed by the evaluation of its network: `--evaluations` of them a turn, the time of all 18 (or what the
solver makes) extrapolated, since each costs the same; `--whole` runs them all. The vocoder always runs whole.

On a machine that others use, `--processor-time` computes with one thread and counts the time that this process ran:
ratios and fractions of the matrix rate then say what they would on an idle one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from covo_npu.kernels.interface import Kernels
from covo_npu.kernels.select import describe, fast_dtype, open_device, select
from covo_npu.runtime.config import DiTConfig, VocoderConfig
from covo_npu.runtime.flow import Flow, guided
from covo_npu.runtime.token2wav import Token2Wav
from covo_npu.tools import measure
from covo_npu.tools.random_speech import FULL, random_token2wav
from covo_npu.tools.stock_token2wav import StockToken2Wav

HOP, SAMPLE_RATE = 240, 24000
STOCK, OURS, OURS_HALF = "stock float32", "ours float32", "ours bfloat16"
FLOW, VOCODER = "flow matching", "vocoder"

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn of one stage took."""

    seconds: float
    peak_bytes: int  # above what was allocated before


@dataclass(frozen=True, slots=True)
class Row:
    """One stage of one path at one length."""

    path: str
    stage: str
    codes: int
    frames: int  # that the stage works on: prompt and reply, or the reply
    seconds: float  # for the whole stage: the median turn, extrapolated to all evaluations
    flops: float  # of the products alone
    rate_fraction: float  # of the measured matrix rate of the dtype
    rtf: float  # seconds a second of speech
    peak_bytes: int


# --- what there is to compute


def evaluation_flops(config: DiTConfig, frames: int) -> float:
    """Return the operations of the products of one evaluation, both guidance rows."""
    size = config.hidden_size
    linear = config.num_layers * (4 * size**2 + 2 * size * config.intermediate_size) + 2 * size * config.latent_dim
    conv = config.conv_kernel_size * size**2 // config.conv_groups
    attention = config.num_layers * 2 * frames * size  # a frame: scores, then values
    return 2.0 * 2 * frames * (linear + conv + attention)


def vocoder_flops(config: VocoderConfig, frames: int) -> float:
    """Return the operations of the convolutions, without the anti-alias filters."""
    channels, rate = config.initial_channels, 1
    products = config.latent_dim * channels * 7
    for stage_rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
        products += rate * channels * channels // 2 * kernel
        channels, rate = channels // 2, rate * stage_rate
        taps = sum(2 * k * len(d) for k, d in zip(config.resblock_kernel_sizes, config.resblock_dilations, strict=True))
        products += rate * channels**2 * taps
    return 2.0 * frames * (products + rate * channels * 7)


# --- the paths


class Bench:
    """The same weights on every path, and inputs for one length."""

    def __init__(self, networks: Token2Wav, kernels: Kernels, device: torch.device, evaluations: int) -> None:
        self.device, self.config, self.evaluations = device, networks.config, evaluations
        self.networks = {OURS: networks}
        if fast_dtype(device) == torch.bfloat16:
            with torch.device("meta"):
                half = Token2Wav(networks.config, kernels)
            half.load_state_dict(networks.state_dict(), assign=True)  # shares the tensors until they are cast
            half.configure(torch.bfloat16)
            self.networks[OURS_HALF] = half
        self.stock = StockToken2Wav(networks)

    def turns(self, codes: int) -> dict[tuple[str, str], Callable[[], object]]:
        """Return {(path, stage): one turn}. The vocoder has no bfloat16."""
        generator = torch.Generator().manual_seed(codes)
        ids = torch.randint(self.config.dit.num_codes, (codes,), generator=generator).to(self.device)
        networks = self.networks[OURS]
        noise = torch.randn(networks.num_frames(codes), self.config.dit.latent_dim, generator=generator).to(self.device)
        latents = torch.randn(1, self.config.vocoder.latent_dim, self.reply_frames(codes), generator=generator)
        latents = latents.to(self.device)
        found: dict[tuple[str, str], Callable[[], object]] = {
            (STOCK, FLOW): partial(self.stock.normalised_latents, ids, noise, self.evaluations)
        }
        for path, each in self.networks.items():
            found[path, FLOW] = partial(evaluate, each, ids, noise, self.evaluations)
        found[STOCK, VOCODER] = partial(self.stock.vocoder, latents)
        found[OURS, VOCODER] = partial(networks.vocoder, latents)
        return found

    def reply_frames(self, codes: int) -> int:
        """Return the latent frames of a reply alone."""
        return self.networks[OURS].num_frames(codes) - self.config.voice.num_frames


def evaluate(networks: Token2Wav, codes: Tensor, noise: Tensor, evaluations: int) -> Tensor:
    """Return the latents after some evaluations of a reply, its preparation included."""
    if evaluations == networks.flow.evaluations:
        return networks.normalised_latents(codes, noise)
    voice = networks.voice
    networks.dit.multiply_in(networks.dtype)
    conditions = networks.dit.conditions(torch.cat((voice.prompt_codes, codes)), voice.prompt_latents)
    modulation = networks.dit.modulation(0.0, voice.speaker_embedding)
    for _ in range(evaluations):
        velocity = guided(networks.dit(noise, conditions, modulation), networks.config.flow.cfg_alpha, False)
        noise = torch.add(noise, velocity, alpha=0.05)
    return noise


def timed(work: Callable[[], object], device: str, clock: Clock) -> Turn:
    """Return what one call took."""
    kind = torch.device(device).type
    memory = getattr(torch, kind) if kind != "cpu" else None
    if memory:
        memory.reset_peak_memory_stats()
        before = memory.memory_allocated()
    with measure.PeakMemory() as start:
        pass
    measure.synchronize(device)
    with measure.PeakMemory() as sampled:
        begin = clock()
        work()
        measure.synchronize(device)
        seconds = clock() - begin
    peak = memory.max_memory_allocated() - before if memory else sampled.anonymous - start.anonymous
    return Turn(seconds, max(0, peak))


def matrix_rates(device: str, clock: Clock, size: int = 2048) -> dict[str, float]:
    """Return the operations a second of a square matrix product in each dtype."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = min(timed(partial(torch.matmul, left, right), device, clock).seconds for _ in range(5))
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    return rates


def measured(bench: Bench, codes: int, runs: int, rates: dict[str, float], device: str, clock: Clock) -> list[Row]:
    """Return the rows of one length; the first turn of each path warms up and does not count."""
    turns = bench.turns(codes)
    for work in turns.values():
        work()
    found: dict[Any, list[Turn]] = measure.interleaved(
        {key: partial(timed, work, device, clock) for key, work in turns.items()},  # type: ignore[misc]
        runs,
    )
    rows = []
    config, reply_frames = bench.config, bench.reply_frames(codes)
    frames = {FLOW: bench.networks[OURS].num_frames(codes), VOCODER: reply_frames}
    evaluations = Flow(config.flow.time_points - 1).evaluations
    flops = {
        FLOW: evaluations * evaluation_flops(config.dit, frames[FLOW]),
        VOCODER: vocoder_flops(config.vocoder, frames[VOCODER]),
    }
    for (path, stage), taken in found.items():
        factor = evaluations / bench.evaluations if stage == FLOW else 1.0
        seconds = measure.spread(turn.seconds for turn in taken).median * factor
        rate = flops[stage] / seconds / rates[path.split()[-1]]
        speech_s = reply_frames * HOP / SAMPLE_RATE
        peak = max(turn.peak_bytes for turn in taken)
        row = Row(path, stage, codes, frames[stage], seconds, flops[stage], rate, seconds / speech_s, peak)
        rows.append(row)
    return rows


# --- what is said


def rows_table(rows: Sequence[Row]) -> str:
    """Return the rows as a table; the ratio is to the stock path of the same stage and length."""
    stock = {(row.stage, row.codes): row for row in rows if row.path == STOCK}
    lines = []
    for row in sorted(rows, key=lambda row: (row.codes, row.stage, row.path != STOCK, row.path)):
        beside = stock[row.stage, row.codes]
        figures = (
            f"{row.seconds:.2f}",
            f"{row.seconds / beside.seconds:.2f}",
            f"{row.rtf:.2f}",
            f"{row.flops / row.seconds / 1e12:.3f}",
            f"{100 * row.rate_fraction:.0f} %",
            f"{row.peak_bytes / 1e6:.0f}",
        )
        lines.append((str(row.codes), row.stage, row.path, *figures))
    columns = ("codes", "stage", "path", "s", "ratio", "RTF", "TFLOP/s", "of matrix rate", "MB")
    return measure.table(columns, lines)


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write a chart: seconds of each stage by path, and how they grow with the length."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colours = {STOCK: "#9ecae1", OURS: "#08519c", OURS_HALF: "#de7e18"}
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    for axes, stage in zip(panels, (FLOW, VOCODER)):
        for label, colour in colours.items():
            line = sorted((r for r in rows if r.path == label and r.stage == stage), key=lambda r: r.codes)
            if line:
                axes.plot([r.codes for r in line], [r.seconds for r in line], "o-", color=colour, label=label)
        axes.set_title(stage, size=10)
        axes.set_xlabel("audio codes of the reply (25 a second)")
        axes.set_ylabel("seconds")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.suptitle(title, size=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def from_checkpoint(folder: Path, kernels: Kernels, device: torch.device) -> Token2Wav:
    """Return the networks of speech of a converted checkpoint, nothing else of it. Raises CheckpointError."""
    from covo_npu.runtime.checkpoint import TOKEN2WAV, CheckpointError, read_manifest
    from covo_npu.runtime.loader import load_tensors

    manifest = read_manifest(folder)
    if manifest.config.token2wav is None:
        raise CheckpointError(f"{folder}: was converted without token2wav; there is nothing to measure")
    weights = load_tensors(manifest, [TOKEN2WAV], device)
    weights.wait()
    with torch.device("meta"):
        networks = Token2Wav(manifest.config.token2wav, kernels)
    networks.load_state_dict(weights.tensors, assign=True)
    return networks.eval()


@click.command()
@click.option(
    "--ckpt", type=click.Path(path_type=Path), help="A converted checkpoint. Default: random, the real sizes."
)
@click.option("--codes", multiple=True, type=click.IntRange(1), default=(75,), show_default=True, help="Of a reply.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda:N or npu:N.")
@click.option("--runs", default=2, show_default=True, type=click.IntRange(1), help="Turns of every path.")
@click.option("--evaluations", default=2, show_default=True, type=click.IntRange(2), help="A turn; an even number.")
@click.option("--whole", is_flag=True, help="All evaluations of a reply instead.")
@click.option("--layers", type=click.IntRange(1), help="Of the transformer of random networks. Default: all 12.")
@click.option(
    "--processor-time", is_flag=True, help="One thread; count the time that this process ran, not the wall's."
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write every figure and the machine here.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False), help="Write a PNG chart here.")
def token2wav(
    ckpt: Path | None,
    codes: tuple[int, ...],
    device: str,
    runs: int,
    evaluations: int,
    whole: bool,
    layers: int | None,
    processor_time: bool,
    json_path: str | None,
    plot_path: str | None,
) -> None:
    """Codes to a waveform, against a straightforward implementation on the same weights in one process."""
    torch_device = open_device(device)
    kernels = select(None, torch_device)
    clock = time.process_time if processor_time else time.perf_counter
    if processor_time:
        torch.set_num_threads(1)
    with torch.inference_mode():
        if ckpt is None:
            sizes = replace(FULL, dit=replace(FULL.dit, num_layers=layers or FULL.dit.num_layers))
            networks = random_token2wav(sizes, kernels).to(torch_device)
        else:
            networks = from_checkpoint(ckpt, kernels, torch_device)
        counted = Flow(networks.config.flow.time_points - 1).evaluations if whole else evaluations // 2 * 2
        bench = Bench(networks, kernels, torch_device, counted)
        rates = matrix_rates(device, clock)
        found = []
        for count in codes:
            click.echo(f"{count} codes", err=True)
            found += measured(bench, count, runs, rates, device, clock)
        after = matrix_rates(device, clock)
    # The machine may have been slower before or after: the fraction is of the best that was seen.
    best = {name: max(rates[name], after[name]) for name in rates}
    found = [replace(row, rate_fraction=row.rate_fraction * rates[_dtype(row)] / best[_dtype(row)]) for row in found]
    machine = measure.machine_report(device)
    said = [
        f"matrix rate: {', '.join(f'{name} {rate / 1e12:.3f} TFLOP/s' for name, rate in best.items())}",
        f"flow matching: {counted} evaluations a turn, the time of all extrapolated; {runs} turns, median",
        f"backend {describe(kernels)}, {torch.get_num_threads()} threads, "
        f"{networks.config.dit.num_layers} layers, {'processor' if processor_time else 'wall'} time",
    ]
    click.echo(rows_table(found))
    click.echo("\n".join(["", *said, measure.machine_line(machine)]))
    if json_path:
        measure.write_json(
            json_path,
            {
                "bench": "token2wav", "machine": machine, "config": asdict(networks.config), "matrix_rate": best,
                "rows": [asdict(row) for row in found], "said": said,
            },
        )  # fmt: skip
    if plot_path:
        plot(found, f"Codes to a waveform, {machine['device']}, {machine['processor']}", Path(plot_path))


def _dtype(row: Row) -> str:
    return row.path.split()[-1]
