"""Run a converted Covo-Audio-Chat: from a spoken question to text and speech.

The letters of shapes are those of kernels/interface.py.

The public names are imported on first use, so that `covo-run --help` and the manifest's reader need no PyTorch.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import covo_npu.kernels  # noqa: F401 - before torch: see there

if TYPE_CHECKING:
    from covo_npu.runtime.engine import Dialogue, Engine
    from covo_npu.runtime.events import Reply, Timing
    from covo_npu.runtime.model import CovoAudio
    from covo_npu.runtime.options import Ask, LoadOptions, Sampling
    from covo_npu.runtime.session import Session

_HOMES = {
    "Ask": "options",
    "CovoAudio": "model",
    "Dialogue": "engine",
    "Engine": "engine",
    "LoadOptions": "options",
    "Reply": "events",
    "Sampling": "options",
    "Session": "session",
    "Timing": "events",
}
__all__ = ["Ask", "CovoAudio", "Dialogue", "Engine", "LoadOptions", "Reply", "Sampling", "Session", "Timing"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _kept_for_good():
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


@contextmanager
def _kept_for_good() -> Iterator[None]:
    """Leave what is imported here, PyTorch with it, out of the search for garbage, now and later.

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
