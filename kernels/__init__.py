"""Hardware side of the house: tensors in, tensors out; no model names, no files."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# PyTorch would import an installed torch_npu on its own and fail with it where CANN is missing, even for work on the
# CPU. npu.py imports it by name. Has no effect on a process that has imported torch already.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


@contextmanager
def kept_for_good() -> Iterator[None]:
    """Leave what is imported in its block, PyTorch first of all, out of the search for garbage, now and later.

    Its 250,000 objects stay as long as the process: going through them while they are made is a fifth of the import,
    and each full search later stops all threads for a tenth of a second. What the program held before stays out, too;
    it is freed as ever when nothing refers to it. Does nothing once PyTorch is there, or where the search is off.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
