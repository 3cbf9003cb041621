"""Networks and voices of random values, built in memory: at any size, without a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor, nn

from covo_npu.kernels.interface import Kernels
from covo_npu.runtime.checkpoint.config import LLMConfig, ModelConfig, Token2WavConfig
from covo_npu.runtime.networks.bigvgan import FILTER_TAPS
from covo_npu.runtime.networks.files import Networks, fill, meta_networks
from covo_npu.runtime.networks.qwen2 import Qwen2
from covo_npu.runtime.token2wav import SpeechDtypes, Token2Wav
from covo_npu.runtime.voice import Voice
from covo_npu.tools.synth.config import PRESETS

SCALE = 4e-4  # of weights in 8 bits: numbers up to 127 have a deviation of 73, so sums over 1200 keep their size
FULL = cast(Token2WavConfig, PRESETS["full"].token2wav)  # the published sizes


def random_token2wav(config: Token2WavConfig, kernels: Kernels, seed: int = 0) -> Token2Wav:
    """Return networks whose signals keep a moderate size, so that precision can be measured on them. float32, CPU."""
    with torch.device("meta"):
        networks = Token2Wav(config, kernels)
    _fill(networks, torch.Generator().manual_seed(seed))
    return networks


def random_voice(config: Token2WavConfig, seed: int = 0) -> Voice:
    """Return a voice of the sizes in config.voice, on the CPU."""
    generator, sizes = torch.Generator().manual_seed(seed), config.voice
    codes = torch.randint(config.dit.num_codes, (sizes.num_codes,), generator=generator)
    latents = torch.randn(sizes.num_frames, config.dit.latent_dim, generator=generator)
    return Voice(codes, latents, torch.randn(config.dit.speaker_dim, generator=generator))


def random_qwen2(config: LLMConfig, kernels: Kernels, dtype: torch.dtype, int8: Collection[str] = ()) -> Qwen2:
    """Return a decoder on the CPU, the products in int8 in 8 bits."""
    with torch.device("meta"):
        network = Qwen2(config, kernels, dtype, int8)
    _fill(network, torch.Generator().manual_seed(0))
    return network


def random_networks(
    config: ModelConfig, kernels: Kernels, device: torch.device, dtype: torch.dtype, int8: Collection[str] = ()
) -> Networks:
    """Return all networks on a device, the products of speech in `dtype` too, those of the LLM in int8 in 8 bits."""
    networks = meta_networks(config, kernels, dtype, SpeechDtypes(dtype), int8)
    generator = torch.Generator().manual_seed(0)
    for network in (networks.llm, networks.encoder, networks.token2wav):
        if network is not None:
            _fill(network, generator, device)
    return networks


def _fill(network: nn.Module, generator: torch.Generator, device: torch.device | None = None) -> None:
    wanted = network.state_dict()
    fill(network, {name: _values(name, empty, generator).to(device or "cpu") for name, empty in wanted.items()})


def _values(name: str, empty: Tensor, generator: torch.Generator) -> Tensor:
    if name.startswith("vocoder.filters"):
        return _low_pass()
    if empty.dtype == torch.int8:
        return torch.randint(-127, 128, empty.shape, generator=generator).to(torch.int8)
    if name.endswith(("_proj.scale", "lm_head.scale")):
        return torch.full(empty.shape, SCALE)
    if name.endswith(("alpha", "inverse_beta", "std")):
        return torch.randn(empty.shape, generator=generator).mul_(0.3).exp_()
    return torch.randn(empty.shape, generator=generator).mul_(_spread(name, empty))


def _spread(name: str, tensor: Tensor) -> float:
    """Return the standard deviation of a tensor's values: the inverse root of what a sum runs over, biases small."""
    if name.endswith("bias"):
        return 0.02
    if tensor.ndim == 1 or "embedding" in name:
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
