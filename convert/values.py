"""Whether floating point numbers are finite, or all zeros, seen from their bits while the bytes pass.

A number is NaN or infinite if all bits of its exponent are set. So the largest of the numbers, read as signed and as
unsigned integers, says whether there is one: two maxima, which vector units find as fast as the cache gives the data.
Only a piece that holds one is looked through.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE_BYTES = 2**18  # looked at, and hashed, while it is in the cache of a core
RUN_BYTES = 2**20  # so many zeros one after another are worth a word

INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}  # its bits
SIGNED = {"BF16": np.int16, "F16": np.int16, "F32": np.int32, "F64": np.int64}
UNSIGNED = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}


class Values:
    """What was seen of one tensor's values. Of integers nothing is noted.

    not_finite: how many are NaN or infinite; first: where the first of them is, counted in values.
    zeros_bytes: the longest run of pieces in which every bit was 0.
    """

    def __init__(self, dtype: str) -> None:
        self.not_finite = 0
        self.first = 0
        self.zeros_bytes = 0
        self._dtype, self._count, self._largest, self._run_bytes = dtype, 0, 0, 0

    @property
    def only_zeros(self) -> bool:
        """Whether there were values, and every bit of them was 0."""
        return self._count > 0 and self._largest == 0

    def see(self, piece: memoryview) -> bool:
        """Return whether a piece of whole values holds one that is not finite."""
        if self._dtype not in INFINITY or not piece.nbytes:
            return False
        infinity, signed = INFINITY[self._dtype], np.frombuffer(piece, SIGNED[self._dtype])
        unsigned = signed.view(UNSIGNED[self._dtype])
        largest = int(unsigned.max())
        self._run_bytes = self._run_bytes + piece.nbytes if largest == 0 else 0
        self.zeros_bytes = max(self.zeros_bytes, self._run_bytes)
        self._largest = max(self._largest, largest)
        found = largest >= infinity + _sign(unsigned) or int(signed.max()) >= infinity
        if found:
            wrong = not_finite(piece, self._dtype)
            self.first = self.first if self.not_finite else self._count + int(wrong.argmax())
            self.not_finite += int(np.count_nonzero(wrong))
        self._count += signed.size
        return found


def not_finite(piece: memoryview, dtype: str) -> NDArray[np.bool_]:
    """Return which values of a piece are NaN or infinite."""
    unsigned = np.frombuffer(piece, UNSIGNED[dtype])
    return (unsigned & (_sign(unsigned) - 1)) >= INFINITY[dtype]


def _sign(unsigned: NDArray[np.unsignedinteger]) -> int:
    """Return the sign bit."""
    return 1 << (8 * unsigned.itemsize - 1)


def bits(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy if it is contiguous."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def place(index: int, shape: tuple[int, ...]) -> str:
    """Return where the value of a flat index lies: `[2, 0, 5]`."""
    return str([int(i) for i in np.unravel_index(index, shape)]) if shape else "[]"
