"""The stages of a reply as calls on one device: what covo-bench launches and covo-check ops look at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from covo_npu.kernels.interface import Kernels
from covo_npu.kernels.select import open_device, select
from covo_npu.runtime import CovoAudio, Sampling, audio
from covo_npu.runtime.cache import KVCache, allocate
from covo_npu.runtime.config import ModelConfig, Token2WavConfig
from covo_npu.runtime.decode import Decoder
from covo_npu.runtime.flow import Flow, guided, integrate
from covo_npu.runtime.model import Networks, expected_tensors, fill, meta_networks
from covo_npu.runtime.token2wav import Token2Wav
from covo_npu.tools.synth_config import PRESETS

PROMPT_TOKENS = 64
CONTEXT = 512  # rows of the cache
CODES = 25  # a second of speech
SECOND_FRAMES = 100  # latent frames of a second


@dataclass(frozen=True, slots=True)
class Subject:
    """Networks on a device, of a checkpoint or made up."""

    networks: Networks
    config: ModelConfig
    kernels: Kernels
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage. run does it once; unit says what once is."""

    name: str
    unit: str
    run: Callable[[], object]


def loaded(ckpt: Path, device: str) -> Subject:
    """Return the networks of a checkpoint."""
    model = CovoAudio.load(ckpt, device=device)
    model.weights.wait()
    return Subject(model.networks, model.config, model.kernels, model.device, model.dtype)


def made_up(device: str, config: ModelConfig | None = None, dtype: torch.dtype = torch.bfloat16) -> Subject:
    """Return networks with random weights, by default of the real depth and little width.

    Operators are as many as in the real model, and the work is little.
    """
    place = open_device(device)
    kernels, config = select(None, place), config or deep_and_thin()
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for shapes in expected_tensors(config).values():
        for name, shape in shapes.items():
            wide = max(1, math.prod(shape[1:]))
            # positive, as the snakes' parameters must be
            tensors[name] = (torch.rand(shape, generator=random) / math.sqrt(wide)).to(place)
    tensors["voice.prompt_codes"] = torch.zeros(shape_of_prompt(config), dtype=torch.int64, device=place)
    networks = meta_networks(config, kernels)
    fill(networks, tensors, dtype)
    if networks.token2wav is not None:
        networks.token2wav.configure(dtype)
    return Subject(networks, config, kernels, place, dtype)


def deep_and_thin() -> ModelConfig:
    """Return the real numbers of layers with the widths of the tiny checkpoint."""
    tiny, full = PRESETS["tiny"], PRESETS["full"]
    assert tiny.token2wav and full.token2wav
    dit = replace(tiny.token2wav.dit, num_layers=full.token2wav.dit.num_layers)
    return replace(
        tiny,
        llm=replace(tiny.llm, num_layers=full.llm.num_layers),
        encoder=replace(tiny.encoder, num_layers=full.encoder.num_layers),
        token2wav=replace(tiny.token2wav, dit=dit),
    )


def shape_of_prompt(config: ModelConfig) -> int:
    """Return the number of the voice prompt's codes."""
    return config.token2wav.voice.num_codes if config.token2wav else 0


class Work:
    """The inputs of the stages and the stages themselves, as they run on an accelerator. Needs no gradients."""

    def __init__(self, subject: Subject) -> None:
        self.subject, random = subject, torch.Generator().manual_seed(0)
        config, device = subject.config, subject.device
        self.ids = torch.arange(PROMPT_TOKENS, device=device)
        self.samples = (torch.rand(16000, generator=random) - 0.5).to(device)
        mel = torch.randn(1, config.encoder.num_mels, 2 * config.encoder.max_positions, generator=random)
        self.mel = mel.to(device, subject.dtype)
        self.embeddings = subject.networks.llm.embed(self.ids)
        if config.token2wav:
            shape = (Token2Wav.num_frames(self.token2wav, CODES), config.token2wav.dit.latent_dim)
            self.codes = torch.zeros(CODES, dtype=torch.int64, device=device)
            self.noise = torch.randn(shape, generator=random).to(device)
            self.latents = torch.randn(1, shape[1], SECOND_FRAMES, generator=random).to(device)

    @property
    def token2wav(self) -> Token2Wav:
        """The speech networks; only where the config has them."""
        assert self.subject.networks.token2wav is not None
        return self.subject.networks.token2wav

    def stages(self) -> list[Stage]:
        """Return the stages in the order of a reply. Each can be run again and again."""
        networks, llm = self.subject.networks, self.subject.networks.llm
        if networks.token2wav is not None:
            networks.token2wav.dit.multiply_in(networks.token2wav.dtype)
        mel_filters = networks.frontend.mel_filters
        front = [
            Stage(
                "front end", "one segment of 30 s", partial(audio.log_mel, self.samples, mel_filters, audio.dft_power)
            ),
            Stage("encode", "one segment of 30 s", lambda: networks.adapter(networks.encoder(self.mel))),
            Stage("prefill", f"{PROMPT_TOKENS} tokens", partial(llm.prefill, self.embeddings, self._cache(), 0, 0)),
            Stage("decode", "one token", self._decoding(Sampling())),
            Stage("decode, sampled", "one token", self._decoding(Sampling(temperature=0.5))),
        ]
        if self.subject.config.token2wav is None:
            return front
        return [
            *front,
            Stage("flow set-up", "one reply", self._conditions),
            Stage("flow matching", "one evaluation", self._evaluation(self.subject.config.token2wav)),
            Stage("vocoder", "one second of speech", lambda: self.token2wav.vocoder(self.latents)),
        ]

    def _cache(self) -> KVCache:
        subject = self.subject
        return allocate(subject.config.llm, 1, CONTEXT, subject.dtype, subject.device)

    def _decoding(self, sampling: Sampling) -> Callable[[], object]:
        decoder = Decoder(self.subject.networks.llm, self._cache(), sampling)
        decoder.begin(0, self.ids, self.embeddings, 0, seed=0).tokens()
        return lambda: decoder.step(1).tokens()

    def _conditions(self) -> object:
        codes = torch.cat((self.token2wav.voice.prompt_codes, self.codes))
        return self.token2wav.dit.conditions(codes, self.token2wav.voice.prompt_latents)

    def _evaluation(self, config: Token2WavConfig) -> Callable[[], object]:
        dit, conditions = self.token2wav.dit, self._conditions()
        modulation = dit.modulation(0.5, self.token2wav.voice.speaker_embedding)

        def velocity(latents: Tensor, evaluation: int) -> Tensor:
            return guided(dit(latents, conditions, modulation), config.flow.cfg_alpha, config.flow.rescale)

        return lambda: integrate(velocity, self.noise, Flow(1, "euler"))
