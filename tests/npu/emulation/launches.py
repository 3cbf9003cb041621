"""What the host asks of a device: operators launched and waits for the device.

The emulated NPU keeps a log of its own; a Recorder sees the operators pass PyTorch's dispatcher on any device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from emulation.limits import Call, bind
from torch.utils._python_dispatch import TorchDispatchMode

# operators after which the host holds a value of the device, so that it has waited
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")


@dataclass(frozen=True, slots=True)
class Counts:
    """operators: launched, by name. waits: how often the host waited. on_aicpu: operators that no AI core computes."""

    operators: Counter[str]
    waits: int
    on_aicpu: int = 0

    @property
    def launches(self) -> int:
        return self.operators.total()

    def minus(self, other: Counts) -> Counts:
        return Counts(self.operators - other.operators, self.waits - other.waits)


def count(run: Callable[[], object]) -> Counts:
    """Return what one run asks of the emulated NPU, after another one to warm up."""
    from emulation import device

    run()
    with device.log.recording() as seen:
        run()
    return Counts(Counter(name for name, _ in seen.launches), len(seen.synchronisations), len(seen.on_aicpu))


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
