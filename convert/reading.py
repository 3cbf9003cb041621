"""The values of the source, read once: hashed and looked at as they pass, cast where the target wants it.

What is wrong with them is collected over all tensors, so that one message can name it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from covo_npu.convert.errors import ConvertError, Kind, refuse
from covo_npu.convert.shards import DTYPES, SourceTensor
from covo_npu.convert.stream import ByteStream, SourceFile
from covo_npu.convert.values import PIECE_BYTES, RUN_BYTES, Values, bits, not_finite, place

CAST_BYTES = 2**20  # values are cast in pieces of this size, which stay in the cache of a core
# PyTorch spreads larger pieces over all cores, and what waits for the last of them spins: on a machine that does
# something else, too, that takes longer than the work.
ALONE = 2**15 - 1
NOT_FINITE = "These weights are damaged, of another model, or of a training that diverged."
ONLY_ZEROS = (
    "A download that did not end leaves zeros; download the files again. If the model was trained like this: "
    "--allow-zeros."
)
TOO_LARGE = "Choose another --dtype: bfloat16 and float32 hold what is below 3.3e38. What is larger is damage."


@dataclass(slots=True)
class Reading:
    """The open files of the source, the digest of every tensor that was read to its end, and what its values showed."""

    files: dict[Path, SourceFile] = field(default_factory=dict)
    digests: dict[SourceTensor, str] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    too_large: list[str] = field(default_factory=list)
    only_zeros: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    readers: dict[SourceTensor, ByteStream] = field(default_factory=dict)  # of tensors that are read piece by piece
    scales: dict[SourceTensor, list[Tensor]] = field(default_factory=dict)  # of those that are put into 8 bits

    def reader(self, tensor: SourceTensor, make: Callable[[], ByteStream]) -> ByteStream:
        """Return the reader that goes on where the last piece of a tensor ended, at first what `make` returns."""
        if tensor not in self.readers:
            self.readers[tensor] = make()
        return self.readers[tensor]

    def file(self, path: Path) -> SourceFile:
        """Return the file, opened once."""
        if path not in self.files:
            self.files[path] = SourceFile(path)
        return self.files[path]

    def note(self, tensor: SourceTensor, values: Values) -> None:
        """Note what all values of a tensor showed. A vector of zeros is common, a matrix of zeros is not."""
        name = f"{tensor.name} in {tensor.file}"
        if values.not_finite:
            self.not_finite.append(f"{name}: {count_of(values, tensor.shape)}")
        if values.only_zeros and sum(size > 1 for size in tensor.shape) > 1:
            self.only_zeros.append(f"{name}: {list(tensor.shape)}")
        elif values.zeros_bytes >= RUN_BYTES:
            self.warnings.append(f"{name}: {values.zeros_bytes / 1e6:.1f} MB of it are zeros, one after another")

    @property
    def unusable(self) -> int:
        """How many tensors hold values that are not finite or do not fit."""
        return len(self.not_finite) + len(self.too_large)

    def refuse(self, where: str, allow_zeros: bool) -> None:
        """Raise ConvertError if a value cannot be used, with all tensors that hold one."""
        refuse(
            where,
            Kind("tensors hold values that are not finite", dict.fromkeys(self.not_finite), NOT_FINITE),
            Kind("tensors cannot be computed", self.computed, NOT_FINITE),
            Kind("tensors hold values that do not fit", dict.fromkeys(self.too_large), TOO_LARGE),
            Kind("tensors are all zeros", [] if allow_zeros else self.only_zeros, ONLY_ZEROS),
            state="what was written is removed",
        )


def count_of(values: Values, shape: tuple[int, ...]) -> str:
    """Return how many values are not finite, and where the first of them is, for a message."""
    return f"{values.not_finite} of {prod(shape)} values are not finite, the first at {place(values.first, shape)}"


class TensorReader:
    """The bytes of one source tensor in order."""

    def __init__(self, tensor: SourceTensor, reading: Reading) -> None:
        self.tensor, self._reading = tensor, reading
        self._memory = None if tensor.values is None else bits(tensor.values)
        self._hash, self._values = xxhash.xxh3_128(), Values(tensor.dtype)
        self._at = 0

    @property
    def bytes(self) -> int:
        """How many there are."""
        return self.tensor.bytes

    def read_into(self, view: memoryview) -> None:
        """Fill the view with the next bytes, whole values; the last call notes the digest and what was seen."""
        if self._memory is None:
            self._read_file(view)
        else:
            view[:] = self._memory[self._at : self._at + view.nbytes]
        for start in range(0, view.nbytes, PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self._hash.update(piece)
            self._values.see(piece)
        self._at += view.nbytes
        if self._at == self.bytes and self.tensor not in self._reading.digests:  # each rank may read it
            self._reading.digests[self.tensor] = self._hash.hexdigest()
            self._reading.note(self.tensor, self._values)

    def _read_file(self, view: memoryview) -> None:
        tensor = self.tensor
        try:
            self._reading.file(tensor.path).read_into(view, tensor.offset + self._at)
        except (EOFError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConvertError(
                f"{tensor.path}: {reason} while {tensor.name} is read; was the file changed, or does its disk fail?"
            ) from error


class CastReader:
    """The bytes of one source tensor in a dtype, rounded to nearest even; as they are if it is their own.

    F64 is rounded to F32 first, as PyTorch has it.
    """

    def __init__(self, tensor: SourceTensor, dtype: str, reading: Reading) -> None:
        self._reader, self._reading, self._tensor, self._dtype = TensorReader(tensor, reading), reading, tensor, dtype
        self._cast = Values(dtype)
        self._at = self._too_large = 0
        self._example = ""

    @property
    def bytes(self) -> int:
        """How many there are."""
        return prod(self._tensor.shape) * DTYPES[self._dtype].itemsize

    def read_into(self, view: memoryview) -> None:
        """Fill the view with the next bytes, whole values; the last call notes how many became infinite."""
        if self._dtype == self._tensor.dtype:
            self._reader.read_into(view)
            return
        tensor, wide, narrow = self._tensor, self._tensor.torch_dtype, DTYPES[self._dtype]
        for start in range(0, view.nbytes, CAST_BYTES):
            piece = view[start : start + CAST_BYTES]
            raw = bytearray(piece.nbytes // narrow.itemsize * wide.itemsize)
            self._reader.read_into(memoryview(raw))
            values, cast = torch.frombuffer(raw, dtype=wide), torch.frombuffer(piece, dtype=narrow)
            for rounded, exact in zip(cast.split(ALONE), values.split(ALONE), strict=True):
                rounded.copy_(exact)
            if self._cast.see(piece):
                self._note_lost(values, not_finite(piece, self._dtype) & ~not_finite(memoryview(raw), tensor.dtype))
            self._at += len(values)
        if self._too_large and self._at == prod(tensor.shape):
            count = f"{self._too_large} of {self._at} values do not fit into {self._dtype}"
            self._reading.too_large.append(f"{tensor.name} in {tensor.file}: {count}, such as {self._example}")

    def _note_lost(self, values: Tensor, lost: NDArray[np.bool_]) -> None:
        count = int(np.count_nonzero(lost))
        if count and not self._too_large:
            first = int(lost.argmax())
            self._example = f"{float(values[first]):g} at {place(self._at + first, self._tensor.shape)}"
        self._too_large += count


class Rest:
    """The next bytes of a reader that others have begun: some rows of a tensor."""

    def __init__(self, reader: ByteStream, count: int) -> None:
        self._reader, self.bytes = reader, count

    def read_into(self, view: memoryview) -> None:
        """Fill the view with the next bytes, whole values."""
        self._reader.read_into(view)


class Columns:
    """Bytes start .. stop - 1 of each row of a reader's tensor. All of it is read: its digest is that of the whole."""

    def __init__(self, reader: ByteStream, row_bytes: int, start: int, stop: int) -> None:
        self._reader, self._row_bytes, self._columns = reader, row_bytes, slice(start, stop)
        self._rows_left = reader.bytes // row_bytes
        self._cut = memoryview(b"")  # of rows that were read, what no view has had yet

    @property
    def bytes(self) -> int:
        """How many there are."""
        width = self._columns.stop - self._columns.start
        return self._reader.bytes // self._row_bytes * int(width)

    def read_into(self, view: memoryview) -> None:
        """Fill the view with the next bytes."""
        done = 0
        while done < view.nbytes:
            if not self._cut:
                self._cut = self._next_rows()
            count = min(len(self._cut), view.nbytes - done)
            view[done : done + count] = self._cut[:count]
            self._cut, done = self._cut[count:], done + count

    def _next_rows(self) -> memoryview:
        rows = min(self._rows_left, max(1, CAST_BYTES // self._row_bytes))
        self._rows_left -= rows
        raw = bytearray(rows * self._row_bytes)
        self._reader.read_into(memoryview(raw))
        taken = np.frombuffer(raw, np.uint8).reshape(rows, self._row_bytes)[:, self._columns]
        return memoryview(taken.tobytes())


def load(tensor: SourceTensor, dtype: str, reading: Reading) -> Tensor:
    """Return a whole source tensor in a dtype. Only for those that are computed, the largest of which has 50 MB."""
    reader = CastReader(tensor, dtype, reading)
    data = torch.empty(reader.bytes, dtype=torch.uint8)
    reader.read_into(bits(data))
    return data.view(DTYPES[dtype]).view(tensor.shape)
