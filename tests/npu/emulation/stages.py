"""The stages of a reply as calls on one device, with made-up weights: what is counted and forecast."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

import torch
from random_networks import random_networks, random_voice
from torch import Tensor

from covo_npu.kernels.device import open_device
from covo_npu.kernels.interface import Kernels
from covo_npu.kernels.select import select
from covo_npu.runtime import Sampling
from covo_npu.runtime.checkpoint.config import ModelConfig
from covo_npu.runtime.decode import Decoder
from covo_npu.runtime.flow import Flow, guided, integrate
from covo_npu.runtime.networks.cache import KVCache, allocate
from covo_npu.runtime.networks.dit import Conditions
from covo_npu.runtime.networks.files import Networks
from covo_npu.runtime.token2wav import Token2Wav
from covo_npu.runtime.voice import Voice
from covo_npu.tools.synth.config import PRESETS

PROMPT_TOKENS = 64
CONTEXT = 512  # rows of the cache
ENCODER_POSITIONS = 96  # instead of the 1500 of 30 s
CODES = 25  # a second of speech
SECOND_FRAMES = 100  # latent frames of a second


@dataclass(frozen=True, slots=True)
class MadeUp:
    """Networks on a device; to the stock paths it looks like a loaded model."""

    networks: Networks
    voice: Voice
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype


def made_up(
    device: str,
    config: ModelConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kernels: Kernels | None = None,
    int8: Collection[str] = (),
) -> MadeUp:
    """Return networks with random weights, by default of the real depth and heads, and thin elsewhere.

    Operators are as many as in the real model, and the work is little. int8: see Qwen2.
    """
    place, config = open_device(device), config or deep_and_thin()
    assert config.token2wav
    networks = random_networks(config, kernels or select(None, place), place, dtype, int8)
    return MadeUp(networks, random_voice(config.token2wav).to(place), config, place, dtype)


def deep_and_thin() -> ModelConfig:
    """Return the real layers and heads; feed-forward, vocabulary and the rest are the tiny checkpoint's.

    The heads decide which attention kernel of CANN runs: head_dim 16 or 32 has another one than 64 and 128.
    """
    tiny, full = PRESETS["tiny"], PRESETS["full"]
    assert tiny.token2wav and full.token2wav
    llm, encoder, dit = full.llm, full.encoder, full.token2wav.dit
    heads = {"num_heads": llm.num_heads, "num_kv_heads": llm.num_kv_heads, "head_dim": llm.head_dim}
    thin_encoder = replace(encoder, intermediate_size=tiny.encoder.intermediate_size, max_positions=ENCODER_POSITIONS)
    thin_dit = replace(
        tiny.token2wav.dit, num_layers=dit.num_layers, hidden_size=dit.hidden_size, num_heads=dit.num_heads
    )
    return replace(
        tiny,
        llm=replace(tiny.llm, num_layers=llm.num_layers, **heads),
        encoder=thin_encoder,
        adapter=replace(tiny.adapter, input_size=encoder.hidden_size),
        token2wav=replace(tiny.token2wav, dit=thin_dit),
    )


class Stages:
    """The inputs of the stages, and the stages themselves, as they run on an accelerator. Needs no gradients."""

    def __init__(self, model: MadeUp) -> None:
        self.model, random = model, torch.Generator().manual_seed(0)
        config, device = model.config, model.device
        self.ids = torch.arange(PROMPT_TOKENS, device=device)
        mel = torch.randn(1, config.encoder.num_mels, 2 * config.encoder.max_positions, generator=random)
        self.mel = mel.to(device, model.dtype)
        self.embeddings = model.networks.llm.embed(self.ids)
        shape = (self.token2wav.num_frames(CODES, model.voice), self.token2wav.config.dit.latent_dim)
        self.codes = torch.zeros(CODES, dtype=torch.int64, device=device)
        self.noise = torch.randn(shape, generator=random).to(device)
        self.latents = torch.randn(1, shape[1], SECOND_FRAMES, generator=random).to(device)

    @property
    def token2wav(self) -> Token2Wav:
        assert self.model.networks.token2wav is not None
        return self.model.networks.token2wav

    def runs(self) -> dict[str, Callable[[], object]]:
        """Return {stage: a call of it} in the order of a reply. Each can be called again and again.

        encode: a segment; prefill: PROMPT_TOKENS; decode: a token; flow set-up: a reply; flow matching: an
        evaluation; vocoder: a second of speech.
        """
        return {
            "encode": lambda: self.model.networks.encoder(self.mel),
            "prefill": partial(self._prefill, self._cache()),
            "decode": self._decoding(Sampling()),
            "decode, sampled": self._decoding(Sampling(temperature=0.5)),
            "flow set-up": self._conditions,
            "flow matching": self._evaluation(),
            "vocoder": lambda: self.token2wav.vocoder(self.latents),
        }

    def _cache(self) -> KVCache:
        return allocate(self.model.config.llm, 1, CONTEXT, self.model.dtype, self.model.device)

    def _decoding(self, sampling: Sampling) -> Callable[[], object]:
        decoder = Decoder(self.model.networks.llm, self._cache())
        hidden = decoder.fill(0, self.embeddings, 0)
        decoder.begin(0, self.ids, hidden, len(self.embeddings), 0, sampling).tokens()
        return lambda: decoder.step(1).tokens()

    def _prefill(self, cache: KVCache) -> Tensor:
        llm = self.model.networks.llm
        return llm.logits(llm.fill(self.embeddings, cache, 0, 0))

    def _conditions(self) -> Conditions:
        voice = self.model.voice
        return self.token2wav.dit.conditions(torch.cat((voice.prompt_codes, self.codes)), voice.prompt_latents)

    def _evaluation(self) -> Callable[[], object]:
        dit, conditions, flow = self.token2wav.dit, self._conditions(), self.token2wav.config.flow
        (modulation,) = dit.modulations([0.5], self.model.voice.speaker_embedding)

        def velocity(latents: Tensor) -> Tensor:
            return guided(dit(latents, conditions, modulation), flow.cfg_alpha, flow.rescale)

        return lambda: list(integrate([velocity], self.noise, Flow(1, "euler")))
