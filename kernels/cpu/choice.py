"""Which implementation multiplies what on this machine: a measurement of some milliseconds, or a fixed rule."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from covo_npu.kernels import native
from covo_npu.kernels.cpu import library
from covo_npu.kernels.errors import BackendError

OURS, PYTORCH = "covo", "pytorch"
Shape = tuple[int, int, torch.dtype]  # N, K and dtype of weights [N, K]

# Numbers of rows that are measured; one stands for those down to the one before it. Above the last, PyTorch multiplies.
ROWS = (1, 8, 32, 64, 128, 384)
MOST_ROWS_OF_VECTORS = 64  # of sets other than AMX: from there on PyTorch is as fast

# How much of large weights is measured: as many bytes for few rows, as many rows of the weights a thread for many.
MEASURED_BYTES = 8 << 20
MEASURED_SIZE_OUT = 256
PAIRS = 3  # PyTorch is chosen if it is faster that many times out of as many: other work on the machine decides nothing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """instructions: the best set that may serve; measured: (N, K, dtype, rows) to covo or pytorch; fixed: one for all.

    What was not measured is multiplied in C up to 8 rows, with AMX up to 384.
    """

    instructions: str
    measured: Mapping[tuple[int, int, torch.dtype, int], str] = field(default_factory=dict)
    fixed: str | None = None

    @classmethod
    def unmeasured(cls, fixed: str | None = None) -> Choice:
        """Return the rule alone, or one implementation for everything it can do: covo or pytorch.

        Raises BackendError if there is no library.
        """
        if fixed not in (None, OURS, PYTORCH):
            raise BackendError(f"products must be {OURS} or {PYTORCH}, found {fixed!r}")
        return cls(library.usable_sets()[0], fixed=fixed)

    def ours(self, rows: int, weight: Tensor) -> bool:
        """Return whether C multiplies that many rows with weights [N, K]."""
        if self.fixed:
            return self.fixed == OURS
        bucket = next((measured for measured in ROWS if rows <= measured), 0)
        size_out, size_in = weight.shape
        chosen = self.measured.get((size_out, size_in, weight.dtype, bucket))
        if chosen is None:
            return rows <= (384 if _has_tiles(self.instructions, weight.dtype) else 8)
        return chosen == OURS

    def describe(self) -> list[str]:
        """Return a line for each shape: "37888 x 3584 bfloat16, up to rows: 1 covo, 8 covo, ..." and the rule."""
        lines = [f"instructions: {self.instructions}" + (f", products: {self.fixed}" if self.fixed else "")]
        for shape in dict.fromkeys(key[:3] for key in self.measured):
            size_out, size_in, dtype = shape
            found = ", ".join(f"{rows} {self.measured[size_out, size_in, dtype, rows]}" for rows in ROWS)
            lines.append(f"{size_out} x {size_in} {str(dtype).removeprefix('torch.')}, up to rows: {found}")
        return lines


def _has_tiles(instructions: str, dtype: torch.dtype) -> bool:
    return instructions == "amx" and dtype != torch.float16


def measure(shapes: Iterable[Shape], clock: Callable[[], float] = time.perf_counter) -> Choice:
    """Return what is fastest for weights of these shapes on this machine, with the threads that PyTorch has now.

    Weights of float32 and numbers of rows that C is not made for are not measured: PyTorch has them. Nor are weights
    that fit into caches: they cost little, and a rule gives the same bits in every process. As many rows of weights are
    measured as say enough, once for all weights that are equal in them.
    """
    instructions = Choice.unmeasured().instructions
    begin, measured, known = clock(), {}, dict[tuple[int, int, torch.dtype, int], bool]()
    for size_out, size_in, dtype in dict.fromkeys(shapes):
        if dtype == torch.float32 or size_out * size_in * dtype.itemsize < MEASURED_BYTES:
            continue
        for rows in ROWS:
            served = rows <= MOST_ROWS_OF_VECTORS or _has_tiles(instructions, dtype)
            part = (_part_of(size_out, size_in, dtype), size_in, dtype, rows)
            if served and part not in known:
                known[part] = _is_faster(instructions, *part, clock)
            measured[size_out, size_in, dtype, rows] = OURS if known.get(part) else PYTORCH
    result = Choice(instructions, measured)
    for line in result.describe():
        log.info("%s", line)
    if measured:
        log.info("measured in %.0f ms", 1e3 * (clock() - begin))
    return result


def _part_of(size_out: int, size_in: int, dtype: torch.dtype) -> int:
    """Return how many rows of the weights are measured."""
    enough = max(MEASURED_SIZE_OUT * torch.get_num_threads(), MEASURED_BYTES // (size_in * dtype.itemsize))
    return min(size_out, enough)


def _is_faster(
    instructions: str, size_out: int, size_in: int, dtype: torch.dtype, rows: int, clock: Callable[[], float]
) -> bool:
    """Return whether C is as fast as PyTorch at least once: both run in turns, after one run for what is done once."""
    weight = torch.ones(size_out, size_in, dtype=dtype)
    x = torch.ones(rows, size_in, dtype=torch.bfloat16 if dtype == torch.int8 else dtype)
    for pair in range(PAIRS + 1):
        begin = clock()
        library.linear(instructions, x, weight, None, None)
        middle = clock()
        native.linear(x, weight.to(x.dtype))
        if middle - begin <= clock() - middle and pair:
            return True
    return False
