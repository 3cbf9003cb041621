"""The networks of speech of a checkpoint, and the plans of blocks that checks and benches compare."""

from __future__ import annotations

from pathlib import Path

import torch

from covo_npu.kernels.device import Capture
from covo_npu.kernels.interface import Kernels
from covo_npu.runtime.checkpoint.format import TOKEN2WAV, CheckpointError, read_manifest
from covo_npu.runtime.checkpoint.loader import load_tensors
from covo_npu.runtime.networks.files import fill
from covo_npu.runtime.options import SpeechBlocks
from covo_npu.runtime.token2wav import SpeechDtypes, Token2Wav
from covo_npu.runtime.voice import STORED, Voice, stored_voice

# name: how a streamed reply is cut; each differs from the default in what it says
PLANS = {
    "default": SpeechBlocks(),
    "no look-ahead": SpeechBlocks(look_ahead=0),
    "look-ahead of 6": SpeechBlocks(look_ahead=6),
    "first block of 30": SpeechBlocks((30, 30, 60)),
    "all of the past": SpeechBlocks(past_s=None),
    "6 s of prompt": SpeechBlocks(prompt_s=6),
    "3 s of prompt and past": SpeechBlocks(past_s=3, prompt_s=3),
}


def load_token2wav(folder: Path, kernels: Kernels, device: torch.device) -> tuple[Token2Wav, Voice]:
    """Return networks, in float32, and voice on the device, verified. Raises CheckpointError if there are none."""
    manifest = read_manifest(folder)
    if manifest.config.token2wav is None:
        raise CheckpointError(f"{folder}: was converted without speech; there is nothing to look at")
    weights = load_tensors(manifest, [TOKEN2WAV], device)
    weights.wait()
    with torch.device("meta"):
        networks = Token2Wav(manifest.config.token2wav, kernels)
    fill(networks, {name: tensor for name, tensor in weights.tensors.items() if not name.startswith(STORED)})
    return networks, stored_voice(weights.tensors, networks.config.dit, str(folder)).to(device)


def recast(networks: Token2Wav, kernels: Kernels, dtypes: SpeechDtypes, capture: Capture | None = None) -> Token2Wav:
    """Return the same networks with their products in other dtypes, or captured.

    Weights that stay are shared; what the backend derives from them is not: on CPUs 0.8 GB of the vocoder's.
    """
    with torch.device("meta"):
        other = Token2Wav(networks.config, kernels, dtypes, capture)
    fill(other, networks.state_dict())
    return other
