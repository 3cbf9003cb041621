"""How many bytes an operator moves to and from the device's memory, at least: a count, to choose between forms by.

Each input is read and each result written once; what is not contiguous is copied first, read and written once more; a
convolution works on NC1HWC0, so that its input and its result are converted, with channels padded to C0. Sources:
aclnnConvolution (Conv1dImpl, op_api of hicann/ops-nn 8.5.0); Huawei's tuning guide on tensors that are not contiguous.
"""

from emulation.limits import Call
from torch import Tensor

CHANNELS_OF_A_BLOCK = {4: 8, 2: 16}  # C0 by bytes of an element


def moved_bytes(call: Call, results: list[Tensor]) -> int:
    """Return the bytes of one call."""
    read = sum(size(x) * (1 if x.is_contiguous() or x.numel() == 0 or 0 in x.stride() else 3) for x in call.tensors)
    total = read + sum(map(size, results))
    if call.operator.startswith("aten::convolution"):
        x, (y,) = call.input, results
        total += sum(2 * padded(z) for z in (x, y)) + size(y)  # converted input: written, read; result: the same
    return total


def size(x: Tensor) -> int:
    """Return the bytes of a tensor; a dimension that is only repeated is read once."""
    number = 1
    for length, stride in zip(x.shape, x.stride()):
        number *= length if stride else 1
    return number * x.element_size() if x.numel() else 0


def padded(x: Tensor) -> int:
    """Return the bytes of [B, C, L] in NC1HWC0."""
    block = CHANNELS_OF_A_BLOCK[x.element_size()]
    return x.numel() // x.shape[1] * -(-x.shape[1] // block) * block * x.element_size()
