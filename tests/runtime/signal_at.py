"""Runs covo-run and sends it a signal when it enters a stage. usage: python signal_at.py STAGE SIGNAL ARGUMENTS..."""

import os
import sys
import wave
from collections.abc import Callable
from typing import Any

from covo_npu.runtime import audio, ground
from covo_npu.runtime.checkpoint import loader
from covo_npu.runtime.cli import run as cli
from covo_npu.runtime.networks.bigvgan import BigVGAN
from covo_npu.runtime.networks.dit import DiT
from covo_npu.runtime.networks.whisper import WhisperEncoder
from covo_npu.runtime.sampling import Sampler

# stage: (where, name, at which call).
STAGES: dict[str, tuple[Any, str, int]] = {
    "manifest": (ground, "read_manifest", 1),
    "load": (loader, "all_blocks", 1),
    "read": (audio, "read_audio", 1),
    "encode": (WhisperEncoder, "forward", 1),
    "decode": (Sampler, "next", 5),
    "flow": (DiT, "forward", 3),
    "vocoder": (BigVGAN, "pieces", 1),
    "write": (wave.Wave_write, "writeframes", 1),
}


def signalling(function: Callable[..., Any], number: int, at_call: int) -> Callable[..., Any]:
    """Return the function; its call number `at_call` first sends a signal to this process."""
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call:
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    return wrapped


if __name__ == "__main__":
    place, name, at_call = STAGES[sys.argv[1]]
    setattr(place, name, signalling(getattr(place, name), int(sys.argv[2]), at_call))
    sys.exit(cli.main(sys.argv[3:]))
