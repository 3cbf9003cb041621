"""Run a converted Covo-Audio-Chat: from a spoken question to text and speech.

The letters of shapes are those of kernels/interface.py.

The public names are imported on first use, so that `covo-run --help` and the manifest's reader need no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from covo_npu.kernels import kept_for_good  # before torch: see there

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
    with kept_for_good():
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
