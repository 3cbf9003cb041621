"""What the emulated device refuses beyond the documented table, and when the host has to wait for the device."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from emulation.limits import ATTENTION, FIA_DOCS, LIMITS, Call, Limit, broken_limit, by_operator
from torch import Tensor


class RefusedError(RuntimeError):
    """The device would refuse this call, or do something else than the program means."""


def file_backed(address: int) -> bool:
    """Return whether an address of this process lies in a file mapping. Source: proc(5), maps."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *path = line.split(maxsplit=5)
        start, end = (int(x, 16) for x in span.split("-"))
        if start <= address < end:
            return inode != "0" and path[0].startswith("/") and not path[0].startswith(("/dev/zero", "/memfd"))
    return False


def from_file_mapping(call: Call) -> bool:
    if not (call.self.device.type == "npu" and call.src.device.type == "cpu" and call.src.numel() > 0):
        return False
    allocated = call.src.untyped_storage().resizable()  # by PyTorch itself; to look into /proc takes milliseconds
    return not allocated and file_backed(call.src.data_ptr())


def on_two_devices(call: Call) -> bool:
    return any(x.device.type == "cpu" and x.dim() > 0 for x in call.tensors)


@cache
def upper_triangle() -> Tensor:
    """Return what sparse modes 2 to 4 want for a mask."""
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def mask_values(call: Call) -> bool:
    """True where the compressed mask of sparse modes 2 to 4 is not the upper triangle of ones."""
    if call.sparse_mode not in (2, 3, 4) or call.atten_mask is None:
        return False
    from emulation.device import host_view

    return not torch.equal(host_view(call.atten_mask).reshape(2048, 2048).bool(), upper_triangle())


def partial_memory(call: Call) -> bool:
    """True where a tensor's memory was allocated in another shape, or for others too.

    torch_npu 2.9 and 2.12 allocate the result by the sizes of the memory, in the tensor's dtype: for a view of a file
    that is twice the file. 2.13 with CANN 9.1 leaves such a tensor as it is, without a word.
    """
    import torch_npu

    x = call.arguments["self" if "self" in call.arguments else "input"]
    return bool(x.storage_offset() or torch_npu.get_storage_size(x) != x.numel())


# these look at memory and devices, which only the device itself can
DEVICE_LIMITS = (
    *LIMITS,
    Limit(r"aten::(?!copy_|_to_copy|index).*", on_two_devices, "a tensor is on the CPU", "PyTorch: one device a call"),
    Limit("aten::copy_", from_file_mapping, "a copy from a file mapping may hang", "vllm pull 50794, vllm-omni 5122"),
    Limit(
        "npu::npu_format_cast",
        partial_memory,
        "a cast of a part of a memory",
        "FormatCastKernelNpu.cpp, Ascend/pytorch",
    ),
    Limit(ATTENTION, mask_values, "the mask of sparse_mode 2, 3, 4 is torch.triu(ones, 1)", FIA_DOCS),
)


device_limits_of = by_operator(DEVICE_LIMITS)


def check(call: Call) -> None:
    """Raise RefusedError with the operator, the limit and its source if a limit refuses the call."""
    if limit := broken_limit(call, device_limits_of):
        shapes = ", ".join(f"{x.dtype} {list(x.shape)}".removeprefix("torch.") for x in call.tensors)
        raise RefusedError(f"{call.operator} on npu: {limit.message} ({limit.source}). Tensors: {shapes}")


# --- synchronisations: where the host waits for the device ----------------------------------------------------------
def blocking_copy(call: Call) -> bool:
    """Copies wait unless they are non_blocking and the host's side is pinned."""
    host = call.src if call.self.device.type == "npu" else call.self
    return not (call.non_blocking and host.is_pinned())


def boolean_index(call: Call) -> bool:
    return any(x.dtype in (torch.bool, torch.uint8) for x in call.indices if x is not None)


class Wait(NamedTuple):
    """operators: a pattern of whole names without overload; brought: True where the call makes the host wait."""

    operators: str
    brought: Callable[[Call], bool]
    reason: str


SYNCHRONISES = (
    Wait("aten::copy_", blocking_copy, "blocking copy"),  # torch_npu CopyKernelOpApi.cpp
    Wait("aten::_local_scalar_dense", lambda call: True, "item"),
    Wait(
        "aten::(nonzero|masked_select|_unique2|unique_.*|equal|multinomial)",
        lambda call: True,
        "size or value on the host",
    ),
    Wait("aten::(index|index_put_?|_index_put_impl_)", boolean_index, "boolean index"),
    Wait(
        "aten::repeat_interleave",
        lambda call: isinstance(call.repeats, Tensor) and call.output_size is None,
        "unknown size",
    ),
)
waits_of = by_operator(SYNCHRONISES)


def synchronises(call: Call) -> Iterator[str]:
    """Yield the operator and the reason for each wait of the host that the call brings."""
    for wait in waits_of(call):
        if wait.brought(call):
            yield f"{call.packet}: {wait.reason}"
