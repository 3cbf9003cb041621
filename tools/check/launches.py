"""covo-check launches: the kernels that an NPU's profiler sees, the most expensive ones, and those on the AICPU."""

from __future__ import annotations

import csv
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covo_npu.tools.check.made_up import with_checkpoint
from covo_npu.tools.check.ops import stages
from covo_npu.tools.check.result import CheckError, Finding, Result, Subject, check

MOST_EXPENSIVE = 10
AICPU = "AI_CPU"  # as the profiler calls it


@dataclass(frozen=True, slots=True)
class Kernel:
    """One row of the profiler's kernel_details.csv."""

    name: str
    core: str
    microseconds: float


def profiled(run: Callable[[], object]) -> list[Kernel]:
    """Return the kernels of one run on the NPU. Raises CheckError if the profiler writes none."""
    torch_npu: Any = sys.modules["torch_npu"]  # kernels.npu has imported it, or there were no such device
    profiler = torch_npu.profiler
    with tempfile.TemporaryDirectory() as folder:
        activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU]
        with profiler.profile(activities=activities, on_trace_ready=profiler.tensorboard_trace_handler(folder)):
            run()
            torch_npu.npu.synchronize()
        tables = list(Path(folder).rglob("kernel_details.csv"))
        if not tables:
            raise CheckError("the profiler of torch_npu wrote no kernel_details.csv; is msprof of CANN installed?")
        with tables[0].open(newline="") as file:
            return [_kernel(row) for row in csv.DictReader(file)]


def _kernel(row: dict[str, str]) -> Kernel:
    return Kernel(row.get("Type") or row["Name"], row.get("Accelerator Core", ""), float(row.get("Duration(us)") or 0))


def expensive(kernels: Iterable[Kernel]) -> list[Finding]:
    """Return the kernels that take most of the device's time, all stages together."""
    times: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        times[kernel.name].append(kernel.microseconds)
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))[:MOST_EXPENSIVE]
    total = sum(map(sum, times.values())) or 1.0
    return [
        Finding(name, f"{sum(each) / 1e3:.2f} ms, {sum(each) / total:.0%}, {len(each)} calls") for name, each in ranked
    ]


def examine(subject: Subject) -> Result:
    """Return what each group of stages launches, and the most expensive kernels. Elsewhere than on an NPU, nothing."""
    from covo_npu.kernels.device import open_device
    from covo_npu.runtime import CovoAudio

    device = open_device(subject.options.device)
    if device.type != "npu":
        return Result("launches", str(device), (Finding("kernels", "the profiler of torch_npu counts them on an NPU"),))
    findings, seen = [], []
    with with_checkpoint(subject) as (named, says):
        model = CovoAudio.load(named.require_ckpt(), named.options)
        for name, call in stages(model).items():
            call()  # warm
            kernels = profiled(call)
            slow = sorted({kernel.name for kernel in kernels if kernel.core == AICPU})
            milliseconds = sum(kernel.microseconds for kernel in kernels) / 1e3
            measured = f"{len(kernels)} kernels, {milliseconds:.1f} ms; on the AICPU: {', '.join(slow) or 'none'}"
            findings.append(Finding(name, measured, "none on the AICPU", "", not slow))
            seen += kernels
    return Result("launches", f"{device}; {says}", (*findings, *expensive(seen)))


@check("launches", ckpt=False)
def command(subject: Subject) -> Result:
    """Profile every stage on an NPU: kernels, those on the AICPU, and the ten that take most of the time.

    Without --ckpt a small checkpoint with random weights is made, of the real heads.
    """
    return examine(subject)
