"""What the emulated device refuses beyond the documented table, and when the host has to wait for the device."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from emulation.limits import ATTENTION, FIA_DOCS, LIMITS, Call, Limit, broken_limit
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
    to_device = call.self.device.type == "npu" and call.src.device.type == "cpu"
    return to_device and call.src.numel() > 0 and file_backed(call.src.data_ptr())


def on_two_devices(call: Call) -> bool:
    return any(x.device.type == "cpu" and x.dim() > 0 for x in call.tensors())


def mask_values(call: Call) -> bool:
    """True where the compressed mask of sparse modes 2 to 4 is not the upper triangle of ones."""
    if call.sparse_mode not in (2, 3, 4) or call.atten_mask is None:
        return False
    from emulation.device import host_view

    expected = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    return not torch.equal(host_view(call.atten_mask).reshape(2048, 2048).bool(), expected)


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


def check(call: Call) -> None:
    """Raise RefusedError with the operator, the limit and its source if a limit refuses the call."""
    if limit := broken_limit(call, DEVICE_LIMITS):
        shapes = ", ".join(f"{x.dtype} {list(x.shape)}".removeprefix("torch.") for x in call.tensors())
        raise RefusedError(f"{call.operator} on npu: {limit.message} ({limit.source}). Tensors: {shapes}")


# --- synchronisations: where the host waits for the device ----------------------------------------------------------
def blocking_copy(call: Call) -> bool:
    """Copies wait unless they are non_blocking and the host's side is pinned."""
    host = call.src if call.self.device.type == "npu" else call.self
    return not (call.non_blocking and host.is_pinned())


def boolean_index(call: Call) -> bool:
    return any(x.dtype in (torch.bool, torch.uint8) for x in call.indices if x is not None)


SYNCHRONISES: tuple[tuple[str, Callable[[Call], bool], str], ...] = (
    ("aten::copy_", blocking_copy, "blocking copy"),  # torch_npu CopyKernelOpApi.cpp
    ("aten::_local_scalar_dense", lambda call: True, "item"),
    (
        "aten::(nonzero|masked_select|_unique2|unique_.*|equal|multinomial)",
        lambda call: True,
        "size or value on the host",
    ),
    ("aten::(index|index_put_?|_index_put_impl_)", boolean_index, "boolean index"),
    (
        "aten::repeat_interleave",
        lambda call: isinstance(call.repeats, Tensor) and call.output_size is None,
        "unknown size",
    ),
)


def synchronises(call: Call) -> Iterator[str]:
    """Yield the operator and the reason for each wait of the host that the call brings."""
    name = call.operator.partition(".")[0]
    for pattern, test, reason in SYNCHRONISES:
        if re.fullmatch(pattern, name) and test(call):
            yield f"{name}: {reason}"
