"""What benches and checks tell beside their figures: the machine, and tables in Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("covo-npu", "torch", "torch_npu", "transformers", "safetensors", "numpy")


def machine_report(device: str = "cpu") -> dict[str, Any]:
    """Return what a reader needs to judge a figure: processor, cores, memory, kernel, versions, device."""
    return {
        "processor": proc_line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "device": _device_name(device),
    }


def machine_line(report: Mapping[str, Any]) -> str:
    """Return machine_report() as one line for a table's foot."""
    packages = ", ".join(f"{name} {number}" for name, number in report["packages"].items())
    host = f"{report['processor']}, {report['cores']} cores, {report['memory_bytes'] / 2**30:.0f} GiB"
    return f"{report['device']} | {host} | {report['system']} | {packages}"


def proc_line(path: str, key: str) -> str:
    """Return what stands after `key:` in a file of /proc, "" if it is absent."""
    try:
        text = Path(path).read_text("utf-8")
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(key)), "")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, columns padded to be read as plain text too."""
    lines = [[_cell(cell) for cell in line] for line in (columns, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    ruler = "|".join("-" * (width + 2) for width in widths)
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    return "\n".join([text[0], f"|{ruler}|", *text[1:]])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    kind = torch.device(device).type
    named = getattr(getattr(torch, kind, None), "get_device_name", None)
    return f"{device} ({named(device)})" if named else device
