"""Run a converted Covo-Audio-Chat: from a spoken question to text and speech.

Letters: B batch, S query length, T flat tokens or key length, H heads, G kv heads, D head_dim, C channels, F
feed-forward, V vocabulary, M mels, N samples, L latent frames, Z latent channels.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covo_npu.runtime.model import CovoAudio
    from covo_npu.runtime.sampling import Sampling
    from covo_npu.runtime.session import Reply, Session, Timing

__all__ = ["CovoAudio", "Reply", "Sampling", "Session", "Timing"]

# Imported on first use, so that `covo-run --help` and its argument errors do not wait for torch.
_HOMES = {"CovoAudio": "model", "Sampling": "sampling", "Reply": "session", "Session": "session", "Timing": "session"}


def __getattr__(name: str) -> Any:
    """Return a name of the public API. Raises AttributeError for others, as a module does."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
