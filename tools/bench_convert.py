"""covo-bench convert: conversion against `cp -r` of the same source, on the same disk, in turns."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from covo_npu.convert.folder import check_space
from covo_npu.tools import measure

LIMIT = 1.25  # how much longer than `cp -r` a conversion may take


@dataclass(frozen=True, slots=True)
class Run:
    """One timed process. The bytes are those of its result; `durable_s` counts until they are on the disk."""

    seconds: float
    durable_s: float
    bytes: int
    peak_anonymous: int
    peak_resident: int


@click.command(context_settings={"show_default": True})
@click.option("--src", required=True, type=click.Path(path_type=Path, exists=True), help="A source checkpoint.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Where both write. Default: beside the source.")
@click.option("--runs", type=click.IntRange(1), default=3)
@click.option("--cache", type=click.Choice(("cold", "as-is")), default="cold", help="Of the source, before each run.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures into this file.")
def convert(src: Path, scratch: Path | None, runs: int, cache: str, json_file: Path | None) -> None:
    """Time covo-convert and `cp -r` of the same source, in turns, on the same disk.

    cp returns before the last bytes are on the disk, covo-convert after; "durable" adds that time to cp.
    """
    total = sum(file.stat().st_size for file in src.rglob("*") if file.is_file())
    place = scratch or src.resolve().parent
    check_space(place, total)
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=place) as folder:
        target = Path(folder) / "result"
        rows = {
            "cp -r": lambda: _timed(["cp", "-r", str(src), str(target)], src, target, cache),
            "covo-convert": lambda: _timed(_converter(src, target), src, target, cache),
        }
        results = measure.interleaved(rows, runs)
    report = _report(results, total, cache)
    click.echo(_text(report))
    if json_file:
        measure.write_json(json_file, report | {"machine": measure.machine_report()})


def _converter(src: Path, target: Path) -> list[str]:
    code = "import sys; from covo_npu.convert.cli import main; sys.exit(main())"
    return [sys.executable, *measure.SAFE_PATH, "-c", code, "--src", str(src), "--dst", str(target), "--json"]


def _timed(command: list[str], src: Path, target: Path, cache: str) -> Run:
    """Return what a command took that makes the folder `target`, which is removed again."""
    if cache == "cold":
        measure.drop_page_cache(src)
    with _removed(target):
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with measure.PeakMemory(process.pid) as memory:
            code = process.wait()
        seconds = time.perf_counter() - start
        if code:
            raise measure.MeasurementError(f"{' '.join(command)}: failed with exit code {code}")
        subprocess.run(["sync", "-f", str(target)], check=True)
        durable = time.perf_counter() - start
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return Run(seconds, durable, size, memory.anonymous, memory.resident)


@contextlib.contextmanager
def _removed(target: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _report(results: dict[str, list[Run]], total: int, cache: str) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {
        name: {
            "seconds": measure.spread(run.seconds for run in found),
            "durable_s": measure.spread(run.durable_s for run in found),
            "bytes": found[0].bytes,
            "peak_anonymous": max(run.peak_anonymous for run in found),
            "peak_resident": max(run.peak_resident for run in found),
        }
        for name, found in results.items()
    }
    ratio = rows["covo-convert"]["seconds"].median / rows["cp -r"]["seconds"].median
    return {"source_bytes": total, "source_cache": cache, "rows": rows, "ratio": ratio, "limit": LIMIT}


def _text(report: dict[str, Any]) -> str:
    lines = [
        (
            name,
            f"{row['seconds'].median:.1f} ({row['seconds'].low:.1f} to {row['seconds'].high:.1f})",
            f"{row['durable_s'].median:.1f}",
            f"{row['bytes'] / row['seconds'].median / 1e9:.2f}",
            f"{row['peak_anonymous'] / 2**30:.2f}",
        )
        for name, row in report["rows"].items()
    ]
    columns = ("", "seconds", "until durable", "GB/s", "peak anonymous GiB")
    runs = report["rows"]["cp -r"]["seconds"].runs
    verdict = "met" if report["ratio"] <= LIMIT else "missed"
    return "\n".join(
        [
            f"{report['source_bytes'] / 1e9:.2f} GB, source {report['source_cache']}, {runs} runs in turns",
            measure.table(columns, lines),
            f"covo-convert / cp -r = {report['ratio']:.2f}; limit {LIMIT} {verdict}",
            measure.machine_line(measure.machine_report()),
        ]
    )
