"""The process of a tensor-parallel rank other than 0: python -m covo_npu.runtime.rank CHECKPOINT OPTIONS."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from dataclasses import asdict, replace

import torch

from covo_npu.kernels.device import rank_device
from covo_npu.runtime.checkpoint.format import CheckpointError
from covo_npu.runtime.checkpoint.loader import Weights
from covo_npu.runtime.ground import load_weights, open_manifest, prepare
from covo_npu.runtime.mirror import follow
from covo_npu.runtime.networks.files import LLM_PREFIX, fill
from covo_npu.runtime.networks.qwen2 import Qwen2
from covo_npu.runtime.options import LoadOptions
from covo_npu.runtime.process import module_command
from covo_npu.runtime.ranks import Follower, collectives

log = logging.getLogger(__name__)


def command(path: str | os.PathLike[str], options: LoadOptions, device: torch.device) -> list[str]:
    """Return the command of a process that serves as a rank. device: rank 0's."""
    fields = asdict(replace(options, device=str(device)))
    return module_command(__name__, os.fspath(path), json.dumps(fields))


def serve(path: str | os.PathLike[str], options: LoadOptions) -> None:
    """Load this rank's file of the checkpoint, and do what rank 0 does until it ends. Rank 0 tells of faults.

    Signals that ask for an end end it while it waits for rank 0, which torchrun may have seen fail. Later they are for
    rank 0, which may still have replies to finish.
    """
    _take_signals(signal.SIG_DFL)
    follower = Follower()
    _take_signals(signal.SIG_IGN)
    try:
        manifest = open_manifest(path, options.tp)
        device = rank_device(options.device, int(os.environ.get("LOCAL_RANK", follower.rank)))
        ground = prepare(manifest, options, device)
        file, group = manifest.ranks[follower.rank], collectives(follower)
        with torch.device("meta"):
            llm = Qwen2(manifest.config.llm, ground.kernels, ground.dtype, manifest.int8, group)
        weights = load_weights(manifest, {file: device}, options)
        fill(llm, weights.files[file], LLM_PREFIX)
        ground.cast_nz(llm, weights, file)
        follower.ready(device, manifest.files[file].bytes)
        threading.Thread(target=_verify, args=(follower, weights), name="verify", daemon=True).start()
        follow(follower, llm, ground.dtype, device, ground.capture)
    except Exception as error:  # noqa: BLE001 - rank 0 tells of it
        log.info("rank %d: %r", follower.rank, error)
        follower.failed(error)


def _take_signals(how: signal.Handlers) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, how)


def _verify(follower: Follower, weights: Weights) -> None:
    """Tell when the weights are known to be right. Those of a CPU are read while they are in use."""
    try:
        weights.wait()
    except CheckpointError as error:
        follower.failed(error)
    follower.verified()


def main() -> None:
    """Serve as a rank of the checkpoint and with the options of the arguments."""
    serve(sys.argv[1], LoadOptions(**json.loads(sys.argv[2])))


if __name__ == "__main__":
    main()
