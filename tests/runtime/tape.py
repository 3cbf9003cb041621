"""A stand-in for captured graphs on the CPU: records every operator of some work and repeats them on the same tensors.

Operators are PyTorch's, and the functions of the C library.

As on a device, what the host computed during the capture is frozen, outputs of the capture are the memory that a replay
writes, and reading a value back during the capture is an error.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from covo_npu.kernels.cpu import library

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::is_nonzero", "aten::equal")
IN_C = (
    library.linear, library.rms_norm, library.rotary, library.swiglu, library.decode_attention, library.attention,
    library.anti_aliased_snake, library.winograd_signal, library.winograd_results,
)  # fmt: skip


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.thread, self.recorded_in_c = threading.get_ident(), ExitStack()

    def __enter__(self) -> _Recorder:
        for function in IN_C:
            recorded = functools.partial(self.call_in_c, function)
            self.recorded_in_c.enter_context(mock.patch.object(library, function.__name__, recorded))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.recorded_in_c.close()

    def call_in_c(self, function: Any, *args: Any) -> Any:
        result = function(*args)
        if threading.get_ident() == self.thread:
            self.calls.append((function, args, {}, result))
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not func.name().startswith(WAITS), f"{func.name()} would wait for the device during a capture"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Tape:
    """Counts captures and replays; called with work, it returns the replay."""

    required = True

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        work()  # the warm-up run of a device's capture
        with _Recorder() as recorder:
            work()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            for func, args, kwargs, recorded in recorder.calls:
                result = func(*args, **kwargs)
                for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                    if isinstance(new, torch.ScriptObject):  # a collective under way; in a graph the stream waits
                        new.wait()
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay


def optional_tape() -> Tape:
    """Return a tape without which it goes on as well."""
    tape = Tape()
    tape.required = False
    return tape


def frozen(tape: Tape) -> torch.Tensor:
    """Return what a captured increment by a host value gives after two replays: the tape repeats, it does not rerun."""
    total, step = torch.zeros(1), [1.0]
    replay = tape(lambda: total.add_(step[0]))
    total.zero_()
    step[0] = 100.0
    replay()
    replay()
    return total
