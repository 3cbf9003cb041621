"""Weights in 8 bits as a stream: rows are read, quantised, handed out; their scales are kept for the tensor after."""

from math import prod

import torch
from torch import Tensor

from covo_npu.convert.reading import ALONE, CAST_BYTES, CastReader, Reading
from covo_npu.convert.shards import SourceTensor
from covo_npu.convert.transforms import quantise
from covo_npu.convert.values import bits


class QuantisedReader:
    """The 8-bit numbers of one source matrix [N, K] in order. The scales of the rows that have passed are reading's."""

    def __init__(self, tensor: SourceTensor, reading: Reading) -> None:
        self._reader = CastReader(tensor, "F32", reading)
        self._scales: list[Tensor] = []
        reading.scales[tensor] = self._scales
        self._rows_left, self._size_in = tensor.shape
        self._ready = memoryview(b"")
        self.bytes = prod(tensor.shape)

    def read_into(self, view: memoryview) -> None:
        """Fill the view with the next numbers; it may end within a row."""
        done = 0
        while done < view.nbytes:
            self._ready = self._ready or self._next_rows()
            count = min(self._ready.nbytes, view.nbytes - done)
            view[done : done + count] = self._ready[:count]
            self._ready, done = self._ready[count:], done + count

    def _next_rows(self) -> memoryview:
        count = min(self._rows_left, max(1, CAST_BYTES // (4 * self._size_in)))
        rows = torch.empty(count, self._size_in)
        self._reader.read_into(bits(rows))
        parts = [quantise(part) for part in rows.split(max(1, ALONE // self._size_in))]
        self._scales += [scale for _, scale in parts]
        self._rows_left -= count
        return bits(torch.cat([numbers for numbers, _ in parts]))
