"""Run a converted Covo-Audio-Chat: from a spoken question to text and speech.

Letters: B batch, S query length, T flat tokens or key length, H heads, G kv heads, D head_dim, C channels, F
feed-forward, V vocabulary, M mels, N samples, L latent frames, Z latent channels.

The public names are imported on first use, so that `covo-run --help` and the manifest's reader need no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import covo_npu.kernels  # noqa: F401 - before torch: see there

if TYPE_CHECKING:
    from covo_npu.runtime.model import CovoAudio
    from covo_npu.runtime.sampling import Sampling
    from covo_npu.runtime.session import Reply, Session, Timing

__all__ = ["CovoAudio", "Reply", "Sampling", "Session", "Timing"]

_HOMES = {"CovoAudio": "model", "Reply": "session", "Sampling": "sampling", "Session": "session", "Timing": "session"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
