"""A plugin of pytest that has the kernels' library with AMX emulated: tests/isa.sh builds it and runs the tests with it."""

from pathlib import Path

from covo_npu.kernels.cpu import library

library.FILE = Path(__file__).parents[2] / "build" / "isa" / "libcovo-tiles.so"
