"""A plugin of pytest: the kernels' library with AMX emulated, which tests/isa.sh builds for the tests that it runs."""

from pathlib import Path

from covo_npu.kernels.cpu import library

library.FILE = Path(__file__).parents[2] / "build" / "isa" / "libcovo-tiles.so"
