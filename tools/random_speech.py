"""A Token2Wav of random weights, built in memory: the networks of speech at any size without a checkpoint."""

import math
from typing import cast

import torch
from torch import Tensor

from covo_npu.kernels.interface import Kernels
from covo_npu.runtime.bigvgan import FILTER_TAPS
from covo_npu.runtime.config import Token2WavConfig
from covo_npu.runtime.token2wav import Token2Wav
from covo_npu.tools.synth_config import PRESETS

FULL = cast(Token2WavConfig, PRESETS["full"].token2wav)  # the published sizes


def random_token2wav(config: Token2WavConfig, kernels: Kernels, seed: int = 0) -> Token2Wav:
    """Return networks whose signals keep a moderate size, so that precision can be measured on them. float32, CPU."""
    with torch.device("meta"):
        networks = Token2Wav(config, kernels)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, empty in networks.state_dict().items():
        if name.startswith("vocoder.filters"):
            tensors[name] = _low_pass()
        elif empty.dtype == torch.int64:
            tensors[name] = torch.randint(config.dit.num_codes, empty.shape, generator=generator)
        elif name.endswith(("alpha", "inverse_beta", "std")):
            tensors[name] = torch.randn(empty.shape, generator=generator).mul_(0.3).exp_()
        else:
            tensors[name] = torch.randn(empty.shape, generator=generator).mul_(_spread(name, empty))
    networks.load_state_dict(tensors, assign=True)
    return networks.eval()


def _spread(name: str, tensor: Tensor) -> float:
    """Return the standard deviation of a tensor's values: the inverse root of what a sum runs over, biases small."""
    if name.endswith("bias"):
        return 0.02
    if tensor.ndim == 1 or name.startswith("voice") or "embedding" in name:
        return 1.0
    sums = 2 * tensor.shape[0] if "upsample" in name else tensor[0].numel()
    gain = {"blocks": 0.2, "conv_post": 0.05}  # residual branches of the vocoder, its last layer
    quiet = [factor for part, factor in gain.items() if name.startswith("vocoder") and part in name]
    return math.prod(quiet) / math.sqrt(sums)


def _low_pass() -> Tensor:
    """Return a filter of half the band, with a slight slope: a filter used the wrong way round shows."""
    offsets = torch.arange(FILTER_TAPS) - (FILTER_TAPS - 1) / 2
    taps = torch.sinc(offsets / 2) * torch.kaiser_window(FILTER_TAPS, periodic=False, beta=4.66)
    taps = taps * torch.linspace(0.95, 1.05, FILTER_TAPS)
    return taps / taps.sum()
