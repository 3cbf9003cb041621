"""Small networks of speech with every feature of the real ones, on weights whose signals keep a moderate size."""

from __future__ import annotations

from dataclasses import replace

from random_networks import FULL, random_token2wav, random_voice

from covo_npu.kernels import native
from covo_npu.runtime.checkpoint.config import VoiceConfig
from covo_npu.runtime.token2wav import Token2Wav
from covo_npu.runtime.voice import Voice

SMALL = replace(
    FULL,
    dit=replace(
        FULL.dit, num_layers=2, hidden_size=64, num_heads=4, intermediate_size=96, num_codes=40, code_dim=24,
        latent_dim=8, speaker_dim=16, time_dim=32, conv_groups=4,
    ),
    vocoder=replace(FULL.vocoder, latent_dim=8, initial_channels=64),
    voice=VoiceConfig(num_codes=5, num_frames=23),
)  # fmt: skip


def small_token2wav() -> Token2Wav:
    return random_token2wav(SMALL, native)


def small_voice() -> Voice:
    return random_voice(SMALL)
