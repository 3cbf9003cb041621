"""Small networks of speech with every feature of the real ones, on weights whose signals keep a moderate size."""

from __future__ import annotations

from dataclasses import replace

from covo_npu.kernels import native
from covo_npu.runtime.config import VoiceConfig
from covo_npu.runtime.token2wav import Token2Wav
from covo_npu.tools.random_speech import FULL, random_token2wav

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
