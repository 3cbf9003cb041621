"""covo-bench load: from the start of a process to ready and to the first token, each run in a process of its own.

The rows are those of load_rows.py, taken in turn. Before each run the row's own files are read into the page cache, or
with --cold dropped from it. The other folder's are dropped in any case: where both do not fit into memory, they would
push out what the run needs. Unless --cold the row is then started once without being counted, because its weights have
pushed out the packages that it imports: to ready, the first time to the first token. Floors are measured in the same
run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from covo_npu.runtime.checkpoint.format import ENCODER, read_manifest
from covo_npu.runtime.cli import console, options
from covo_npu.runtime.options import LoadOptions
from covo_npu.tools.bench import measure
from covo_npu.tools.bench.load_rows import ROWS, Task
from covo_npu.tools.bench.measure import Spread, spread
from covo_npu.tools.report import machine_line, machine_report, table

if TYPE_CHECKING:
    import torch

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
CONVERTED = ("ours", "ours_eager")  # rows that read --ckpt, not --src
# Which row is started to warm up for another: its packages and files are the same, and it is ready in seconds.
STAND_IN = {"stock": "from_pretrained"}
DEVICE_LINK = "pinned host to device"


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a process. Seconds of each step; ready and first token count from the start of the process."""

    imports_s: float
    init_s: float
    weights_s: float
    ready_s: float
    first_token_s: float
    bytes: int
    rate: float  # bytes of weights a second of weights_s
    processor_s: float  # of the whole process, all threads
    peak_resident: int
    peak_anonymous: int
    token: int


def measure_row(task: Task, cold: bool, first: bool) -> Start:
    """Return one run of a row, its files warm or cold before, the other folder's cold. first: of this row."""
    folder, other = (task.ckpt, task.src) if task.row in CONVERTED else (task.src, task.ckpt)
    measure.drop_page_cache(other)
    (measure.drop_page_cache if cold else measure.fill_page_cache)(folder)
    if not cold:
        row = STAND_IN.get(task.row, task.row)
        _run(replace(task, row=row, first_token=task.first_token and first))
    found = _run(task)
    moment = found.report
    weights_s = moment["loader_s"] or moment["weights"] - moment["init"]
    return Start(
        imports_s=moment["imports"] - found.started,
        init_s=moment["init"] - moment["imports"],
        weights_s=weights_s,
        ready_s=moment["ready"] - found.started,
        first_token_s=moment["first_token"] - found.started if task.first_token else 0.0,
        bytes=moment["bytes"],
        rate=moment["bytes"] / weights_s,
        processor_s=found.processor_s,
        peak_resident=found.peak_resident,
        peak_anonymous=found.peak_anonymous,
        token=moment["token"],
    )


def _run(task: Task) -> measure.Measured:
    return measure.in_own_process("covo_npu.tools.bench.load_rows", json.dumps(asdict(task)), environment=QUIET)


def measure_rows(tasks: Sequence[Task], runs: int, stock_runs: int, cold: bool) -> dict[str, list[Start]]:
    """Return the runs of each row, taken in turn. Of stock, which takes minutes, there are stock_runs."""
    wanted = {task.row: stock_runs if task.row == "stock" else runs for task in tasks}
    results: dict[str, list[Start]] = {task.row: [] for task in tasks}
    for turn in range(max(wanted.values())):
        for task in tasks:
            if turn < wanted[task.row]:
                click.echo(f"{task.row}: run {turn + 1} of {wanted[task.row]}", err=True)
                results[task.row].append(measure_row(task, cold, first=not turn))
    return results


def summaries(runs: Sequence[Start]) -> dict[str, Spread]:
    """Return median and range of every figure of a row."""
    return {name: spread(getattr(run, name) for run in runs) for name in Start.__slots__}


def floors(ckpt: Path, device: torch.device) -> dict[str, float]:
    """Return what the machine can do, in bytes a second, measured on one file of the checkpoint."""
    file = ckpt / ENCODER
    found = {"disk read": measure.disk_bandwidth(file)}
    found["page cache copy"] = measure.best(lambda: measure.fill_page_cache(file))
    found["memory copy"] = measure.memory_copy_bandwidth()
    if device.type != "cpu":
        found[DEVICE_LINK] = measure.pinned_copy_bandwidth(device)
    return found


def eager_rate(ckpt: Path) -> float:
    """Return the bytes a second of an eager load of one warm file: it and its copy fit into most memories."""
    import torch

    from covo_npu.runtime.checkpoint.loader import load_tensors

    manifest, cpu = read_manifest(ckpt), torch.device("cpu")
    measure.fill_page_cache(ckpt / ENCODER)

    def load_once() -> float:
        report = load_tensors(manifest, [ENCODER], cpu, mode="eager").report
        return report.bytes / report.seconds

    return measure.best(load_once, 5)


# --- what is shown

COLUMNS = {  # heading: (figure of a Start, unit in its own scale)
    "imports s": ("imports_s", 1),
    "init s": ("init_s", 1),
    "weights s": ("weights_s", 1),
    "start to ready s": ("ready_s", 1),
    "start to first token s": ("first_token_s", 1),
    "processor s": ("processor_s", 1),
    "GB": ("bytes", 1e9),
    "GB/s": ("rate", 1e9),
    "peak resident GB": ("peak_resident", 1e9),
    "peak anonymous GB": ("peak_anonymous", 1e9),
}


def _cell(row: str, column: str, found: Spread, scale: float) -> str:
    if column == "GB/s" and row == "ours" and found.low > 1e12:
        return "mapped"  # nothing was moved yet
    if not found.high:
        return "-"
    low, median, high = (f"{value / scale:.3g}" for value in (found.low, found.median, found.high))
    return median if low == high else f"{median} ({low} .. {high})"


def report_table(rows: Mapping[str, Mapping[str, Spread]]) -> str:
    """Return the table of all rows: median and range."""
    lines = [
        [row, *(_cell(row, column, found[figure], scale) for column, (figure, scale) in COLUMNS.items())]
        for row, found in rows.items()
    ]
    return table(["row", *COLUMNS], lines)


def verdicts(rows: Mapping[str, Mapping[str, Spread]], floor: Mapping[str, float], eager: float) -> list[str]:
    """Return sentences that compare ours with the others and with the floors."""
    said = []
    ours = rows.get("ours")
    for row, figures in rows.items():
        if ours is None or row in CONVERTED:
            continue
        ready = figures["ready_s"].median / ours["ready_s"].median
        line = f"ours against {row}: ready {ready:.1f} times faster"
        if ours["first_token_s"].median:
            line += f", first token in {ours['first_token_s'].median / figures['first_token_s'].median:.2f} of its time"
        said.append(line)
    if len(tokens := {figures["token"].median for figures in rows.values()}) == 1 and tokens != {-1}:
        said.append("all rows chose the same first token")
    if "ours" in rows and DEVICE_LINK in floor:
        said.append(f"ours moved bytes at {rows['ours']['rate'].median / floor[DEVICE_LINK]:.2f} of {DEVICE_LINK}")
    share = eager / floor["page cache copy"]
    said.append(f"ours, eager and verified, one warm file: {eager / 1e9:.1f} GB/s, {share:.2f} of the page cache copy")
    said.append("floors: " + ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in floor.items()))
    return said


@click.command("load")
@click.option("--src", type=options.PATH, required=True, help="Source checkpoint.")
@options.ckpt()
@options.loading("device")
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1), help="Counted runs of each row.")
@click.option("--stock-runs", default=1, show_default=True, type=click.IntRange(1), help="Runs of stock: minutes each.")
@click.option(
    "--row", "names", multiple=True, type=click.Choice(list(ROWS)), help="Rows to run, all but ours_eager if none."
)
@click.option("--cold", is_flag=True, help="Drop the files from the page cache before each run.")
@click.option("--ready-only", is_flag=True, help="Stop when ready, without a first token.")
@options.common
def command(
    src: Path,
    ckpt: Path,
    options: LoadOptions,
    runs: int,
    stock_runs: int,
    names: tuple[str, ...],
    cold: bool,
    ready_only: bool,
    json_file: str | None,
) -> None:
    """Time from the start of a process to ready and to the first token (8 s of audio, a2t), against the stock path."""
    from covo_npu.kernels.device import open_device

    require_source(src)
    read_manifest(ckpt)
    device = open_device(options.device)
    rows = names or ("stock", "from_pretrained", "ours")
    tasks = [Task(row, str(src), str(ckpt), str(device), not ready_only) for row in rows]
    results = measure_rows(tasks, runs, stock_runs, cold)
    figures = {row: summaries(found) for row, found in results.items()}
    floor, eager = floors(ckpt, device), eager_rate(ckpt)
    machine = machine_report(str(device))
    said = verdicts(figures, floor, eager)
    report: dict[str, Any] = {
        "bench": "load",
        "page_cache": "cold" if cold else "warm",
        "machine": machine,
        "floors_bytes_per_s": floor,
        "eager_bytes_per_s": eager,
        "runs": {row: [asdict(run) for run in found] for row, found in results.items()},
        "summary": {row: {name: asdict(found) for name, found in of.items()} for row, of in figures.items()},
    }
    console.show("\n".join([report_table(figures), "", *said, machine_line(machine)]), report, json_file)


def require_source(src: Path) -> None:
    """Raise MeasurementError unless the stock path finds its shards in a folder."""
    if not (src / "model.safetensors.index.json").is_file():
        raise measure.MeasurementError(f"{src}: no source checkpoint: expected model.safetensors.index.json in it")
