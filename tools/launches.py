"""Counts what the host asks of a device: operators launched and waits for the device.

Three ways, by what is there: the emulated NPU keeps a log of its own; a real NPU is asked through its profiler; and a
Recorder sees the operators pass PyTorch's dispatcher on any device, which forecasts but does not count kernels.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from covo_npu.kernels.errors import BackendError
from covo_npu.tools.npu_rules import Call, bind

# operators after which the host holds a value of the device, so that it has waited
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")


@dataclass(frozen=True, slots=True)
class Counts:
    """operators: launched, by name. waits: how often the host waited. source: who counted."""

    operators: Counter[str]
    waits: int
    source: str

    @property
    def launches(self) -> int:
        """Operators launched."""
        return self.operators.total()

    def minus(self, other: Counts) -> Counts:
        """Return what is in these counts and not in others."""
        return Counts(self.operators - other.operators, self.waits - other.waits, self.source)


class Recorder(TorchDispatchMode):
    """Keeps every call of an operator that passes the dispatcher; views and the making of tensors launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._paused and not launches_nothing(func):
            self.calls.append(Call(func._schema.name, bind(func._schema, args, kwargs or {})))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep nothing inside the block."""
        outer, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = outer

    @property
    def waits(self) -> int:
        """How often the host waited: read-backs, results of unknown size, blocking copies over the bus."""
        return sum(call.operator in WAITS or _crosses(call) for call in self.calls)


def launches_nothing(func: Any) -> bool:
    """Return whether an operator only makes a view or an uninitialised tensor."""
    view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
    return view or "empty" in func._schema.name or func._schema.name in ("aten::detach", "aten::set_")


def _crosses(call: Call) -> bool:
    """Return whether a call is a blocking copy between host and device."""
    if call.operator == "aten::_to_copy":
        source, target = call.arguments["self"].device, call.arguments["device"]
    elif call.operator == "aten::copy_":
        source, target = call.arguments["src"].device, call.arguments["self"].device
    else:
        return False
    return target is not None and source.type != torch.device(target).type and not call.arguments["non_blocking"]


def count(run: Callable[[], object], device: torch.device) -> Counts:
    """Return what one run asks of an NPU. The run has been warmed up.

    Raises BackendError on other devices: they launch other kernels.
    """
    if device.type != "npu":
        raise BackendError(
            f"launches are counted on an NPU, and the device is {device}. Without an Ascend card use the emulated one: "
            "tests/npu/emulated covo-bench launches"
        )
    torch_npu: Any = sys.modules["torch_npu"]  # kernels.npu has imported it, or there were no such device
    log = getattr(torch_npu, "emulation", None)
    if log is not None:
        with log().recording() as seen:
            run()
        return Counts(Counter(name for name, _ in seen.launches), len(seen.synchronisations), "emulated device")
    return _profiled(run, torch_npu)


def _profiled(run: Callable[[], object], torch_npu: Any) -> Counts:
    """Return the kernels in the profiler's kernel_details.csv, and the waits that a Recorder sees."""
    profiler = torch_npu.profiler
    with tempfile.TemporaryDirectory() as folder:
        activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU]
        handler = profiler.tensorboard_trace_handler(folder)
        with profiler.profile(activities=activities, on_trace_ready=handler):
            run()
            torch_npu.npu.synchronize()
        tables = list(Path(folder).rglob("kernel_details.csv"))
        if not tables:
            raise BackendError("the profiler of torch_npu wrote no kernel_details.csv; is msprof of CANN installed?")
        with tables[0].open(newline="") as file:
            kernels = Counter(row.get("Type") or row["Name"] for row in csv.DictReader(file))
    with Recorder() as recorder:
        run()
    return Counts(kernels, recorder.waits, "profiler")


def first_dtype(call: Call) -> str:
    """Return the dtype of the first tensor of a call, or "-"."""
    tensors: list[Tensor] = call.tensors()
    return str(tensors[0].dtype).removeprefix("torch.") if tensors else "-"
