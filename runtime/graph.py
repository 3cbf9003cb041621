"""Captured steps: work that the device has seen once and repeats at one command, on CUDA and on NPU alike.

What is captured must take everything that changes from tensors at fixed places, and must not wait for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from covo_npu.kernels.errors import BackendError

Work = Callable[[], None]
Capture = Callable[[Work], Work]  # from work to a function that repeats it on the same tensors

GRAPHS = {"cuda": "CUDAGraph", "npu": "NPUGraph"}  # device: class of its graphs in torch.<device>
AUTOMATIC = ("cuda",)  # devices whose graphs `auto` uses; NPUGraph waits until hardware has confirmed it


@dataclass(slots=True)
class CaptureReport:
    """What capturing has cost so far."""

    graphs: int = 0
    seconds: float = 0.0
    bytes: int = 0  # of device memory that was reserved meanwhile


class DeviceCapture:
    """Captures work on one device; all its graphs share one memory pool. Callable, see Capture."""

    def __init__(self, device: torch.device) -> None:
        self.report = CaptureReport()
        self._module: Any = getattr(torch, device.type)
        self._graph_class: Any = getattr(self._module, GRAPHS[device.type])
        self._pool = self._module.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Return the replay of `work`. Runs it once before, on a side stream: libraries set themselves up then.

        Raises BackendError if the device cannot capture it.
        """
        module, graph = self._module, self._graph_class()
        started, reserved = time.perf_counter(), module.memory_reserved()
        side = module.Stream()
        side.wait_stream(module.current_stream())
        with module.stream(side):
            work()
        module.current_stream().wait_stream(side)
        try:
            with module.graph(graph, pool=self._pool):
                work()
            module.synchronize()
        except RuntimeError as error:
            raise BackendError(
                f"{module.__name__.removeprefix('torch.')}: a decode step could not be captured as a graph "
                f"({str(error).splitlines()[0]}): run with --graph off, and please report it"
            ) from error
        self.report.graphs += 1
        self.report.seconds += time.perf_counter() - started
        self.report.bytes += module.memory_reserved() - reserved
        replay: Work = graph.replay
        return replay


def device_capture(choice: str, device: torch.device) -> DeviceCapture | None:
    """Return how steps are captured, or None for eager steps. choice: auto, on or off.

    Raises BackendError if graphs are asked for on a device that has none.
    """
    if choice not in ("auto", "on", "off"):
        raise BackendError(f"graph must be auto, on or off, found {choice!r}")
    if choice == "on" and device.type not in GRAPHS:
        raise BackendError(f"device {device} has no graphs to capture; there are those of {', '.join(GRAPHS)}")
    return DeviceCapture(device) if choice == "on" or (choice == "auto" and device.type in AUTOMATIC) else None
