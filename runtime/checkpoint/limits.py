"""Which sizes are believed: asked before anything is built, because a size is not true for standing in a file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from covo_npu.kernels.errors import listed
from covo_npu.runtime.checkpoint.config import ConfigError, ModelConfig, Token2WavConfig, to_dict

MAX_SIZE = 2**17  # of one dimension; the widest of Covo-Audio-Chat has 18 944
MAX_ENTRIES = 16  # of a list: the vocoder's stages, blocks and dilations
CONVOLUTIONS = 3  # dilated ones in a block of the vocoder
LIMITS = {  # fields with other limits
    "num_layers": 1024,
    "vocab_size": 2**22,
    "audio_token_index": 2**22,
    "num_codes": 2**22,
    "num_frames": 2**22,
    "max_position_embeddings": 2**31,
    "time_points": 1024,
}
MAY_BE_ZERO = ("voice.num_codes", "voice.num_frames", "flow.cfg_alpha")  # the first two: no voice

Check = tuple[bool, str]  # (holds, what is wrong if it does not)


def require_plausible(config: ModelConfig, where: str) -> None:
    """Raise ConfigError that names every size which is absurd or does not go with another."""
    wrong = [problem for path, value in _leaves(to_dict(config), "") for problem in _out_of_range(path, value)]
    wrong = wrong or [message for holds, message in _relations(config) if not holds]
    if wrong:
        raise ConfigError(f"{where}: no network has these sizes: {listed(wrong)}")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of all values, and of all lists."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
        return
    yield path, value
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item, path)


def _out_of_range(path: str, value: Any) -> list[str]:
    if path.endswith(MAY_BE_ZERO) and value == 0:
        return []
    if isinstance(value, (list, tuple)):
        return (
            [] if 1 <= len(value) <= MAX_ENTRIES else [f"{path} has {len(value)} entries, expected 1 to {MAX_ENTRIES}"]
        )
    if isinstance(value, float):
        return [] if math.isfinite(value) and value > 0 else [f"{path} is {value}, expected a positive number"]
    limit = LIMITS.get(path.rpartition(".")[2], MAX_SIZE)
    if type(value) is int and not 1 <= value <= limit:
        return [f"{path} is {str(value)[:40]}, expected 1 to {limit}"]
    return []


def _relations(config: ModelConfig) -> Iterator[Check]:
    llm, encoder, adapter = config.llm, config.encoder, config.adapter
    yield _multiple("llm.num_heads", llm.num_heads, "num_kv_heads", llm.num_kv_heads)
    yield _multiple("llm.head_dim", llm.head_dim, "the halves of a rotation,", 2)
    yield _multiple("encoder.hidden_size", encoder.hidden_size, "num_heads", encoder.num_heads)
    yield _same("adapter.input_size", adapter.input_size, "encoder.hidden_size", encoder.hidden_size)
    yield _same("adapter.output_size", adapter.output_size, "llm.hidden_size", llm.hidden_size)
    codes = config.token2wav.dit.num_codes if config.token2wav else 0
    first, vocabulary = config.audio_token_index, llm.vocab_size
    yield first + codes <= vocabulary, f"{first} text ids and {codes} audio codes exceed llm.vocab_size {vocabulary}"
    if config.token2wav:
        yield from _speech_relations(config.token2wav)


def _speech_relations(config: Token2WavConfig) -> Iterator[Check]:
    dit, vocoder, voice = config.dit, config.vocoder, config.voice
    yield _multiple("dit.hidden_size", dit.hidden_size, "2 num_heads", 2 * dit.num_heads)
    yield _multiple("dit.hidden_size", dit.hidden_size, "conv_groups", dit.conv_groups)
    yield _multiple("dit.time_dim", dit.time_dim, "cosines and sines,", 2)
    yield dit.conv_kernel_size % 2 == 1, f"dit.conv_kernel_size {dit.conv_kernel_size} is not odd"
    yield dit.upsample_factor % 2 == 0, f"dit.upsample_factor {dit.upsample_factor} is not even"
    yield _same("vocoder.latent_dim", vocoder.latent_dim, "dit.latent_dim", dit.latent_dim)
    yield config.flow.time_points >= 2, "flow.time_points is 1: an interval has two ends"
    rates, blocks = vocoder.upsample_rates, vocoder.resblock_kernel_sizes
    yield _same("vocoder.upsample_kernel_sizes", vocoder.upsample_kernel_sizes, "2 rates", tuple(2 * r for r in rates))
    yield _multiple("vocoder.initial_channels", vocoder.initial_channels, "a half a stage,", 2 ** len(rates))
    yield _same("vocoder.resblock_dilations, entries", len(vocoder.resblock_dilations), "blocks", len(blocks))
    yield (
        all(len(row) == CONVOLUTIONS for row in vocoder.resblock_dilations),
        "vocoder.resblock_dilations: not by threes",
    )
    explained = (voice.num_codes + 1) * dit.upsample_factor
    yield voice.num_frames < explained, f"voice: {voice.num_frames} frames for {voice.num_codes} codes"


def _multiple(name: str, value: int, of: str, factor: int) -> Check:
    return value % factor == 0, f"{name} {value} is no multiple of {of} {factor}"


def _same(name: str, value: object, other: str, expected: object) -> Check:
    return value == expected, f"{name} {value} and {other} {expected} differ"
