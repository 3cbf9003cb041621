"""Captured graphs: what is launched during a capture does not run; a replay runs it on the same memory, once each.

As on the device, results of a capture are unwritten memory (here NaN, or 0), the host's values are frozen, a wait of
the host or a copy of pageable memory breaks the capture, and ending a broken one raises an error of its own. Another
thread's launches are none of the capture; its waits break it in the mode "global" only.
Sources: Ascend/pytorch v2.9.0, NPUGraph.cpp and docs/zh/developer_notes/npugraph.md; CANN runtime, stream capture.
"""

import os
import threading
from collections.abc import Callable

import torch

REFUSED = "operation not permitted while a stream is captured"


class Graph:
    """Stands for torch.npu.NPUGraph."""

    current: "Graph | None" = None  # what is being captured; one at a time in a process

    def __init__(self) -> None:
        self.operators: list[str] = []
        self._calls: list[Callable[[], None]] = []
        self._broken = False
        self._thread, self._mode = 0, "global"
        self.auto_dispatch_capture = False

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        if os.environ.get("TASK_QUEUE_ENABLE") == "2":
            raise RuntimeError("Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture")
        if Graph.current is not None:
            raise RuntimeError("another graph is being captured")
        Graph.current = self
        self._thread, self._mode = threading.get_ident(), capture_error_mode

    @classmethod
    def capturing(cls, waits: str | None = None) -> "Graph | None":
        """Return the graph that captures what this thread does, if any. waits: why the call waits for the device.

        Raises RuntimeError, and breaks the capture, if it does not allow that.
        """
        graph = cls.current
        if graph is None:
            return None
        ours = graph._thread == threading.get_ident()
        if waits is not None and (ours or graph._mode == "global"):
            graph.refuse(waits)
        return graph if ours else None

    def capture_end(self) -> None:
        Graph.current = None
        if self._broken:
            raise RuntimeError("the capture was invalidated (107033)")

    def add(self, operator: str, call: Callable[[], None]) -> None:
        """Let a replay make this call."""
        self.operators.append(operator)
        self._calls.append(call)

    def refuse(self, reason: str) -> None:
        """Break the capture, as a call that waits for the device does. Raises RuntimeError."""
        self._broken = True
        raise RuntimeError(f"{REFUSED}: {reason}")

    def replay(self) -> None:
        from emulation import device

        device.log.launches.append(("npu::replay", torch.float32))
        device.log.replayed.extend(self.operators)
        for call in self._calls:
            call()
