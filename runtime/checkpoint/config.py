"""The sizes of the model, as the manifest of a converted checkpoint states them. Nothing here has a default."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from covo_npu.kernels.errors import CovoError

T = TypeVar("T")

LARGEST_INT = 2**1023  # beyond, no float stands for it


class ConfigError(CovoError):
    """A configuration has an unknown, a missing or an impossible field."""


@dataclass(frozen=True, slots=True)
class LLMConfig:
    """Qwen2: V, C, H, G, D, F in the project's letters."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int

    def of_rank(self, size: int) -> LLMConfig:
        """Return the sizes of one of `size` tensor-parallel ranks: its heads, its part of F; all else is whole.

        Raises ConfigError if the heads or F cannot be shared evenly.
        """
        shared = {"num_heads": "heads", "num_kv_heads": "kv heads", "intermediate_size": "feed-forward columns"}
        counts = {name: getattr(self, name) for name in shared}
        if uneven := [f"{counts[name]} {word}" for name, word in shared.items() if counts[name] % size]:
            fits = [n for n in range(1, self.num_kv_heads + 1) if not any(count % n for count in counts.values())]
            raise ConfigError(
                f"{size} tensor-parallel ranks cannot share {', '.join(uneven)} evenly; this model can be split into "
                f"{', '.join(map(str, fits))}"
            )
        return dataclasses.replace(self, **{name: count // size for name, count in counts.items()})

    def head_rows(self, size: int) -> int:
        """Return the rows of the head that one of `size` ranks has: all alike, zeros at the end of the last one's."""
        return -(-self.vocab_size // size)


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Whisper encoder."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    num_mels: int
    max_positions: int  # encoder frames of one segment, 50 Hz


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Stride-2 convolutions between encoder and LLM."""

    num_layers: int
    input_size: int
    intermediate_size: int
    output_size: int


@dataclass(frozen=True, slots=True)
class DiTConfig:
    """Flow-matching transformer: audio codes, prompt and noise to a velocity."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    num_codes: int
    code_dim: int
    latent_dim: int
    speaker_dim: int
    time_dim: int
    upsample_factor: int  # latent frames a code
    conv_kernel_size: int
    conv_groups: int
    rope_theta: float


@dataclass(frozen=True, slots=True)
class FlowConfig:
    """The ODE. `time_points` counts grid points: 10 points = 9 intervals = 18 evaluations with the midpoint rule."""

    time_points: int
    cfg_alpha: float  # v = v1 + (v1 - v0) * cfg_alpha, so the usual guidance scale is 1 + cfg_alpha
    rescale: bool


@dataclass(frozen=True, slots=True)
class VocoderConfig:
    """BigVGAN."""

    latent_dim: int
    initial_channels: int
    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    resblock_kernel_sizes: tuple[int, ...]
    resblock_dilations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class VoiceConfig:
    """The voice prompt: how many audio codes and latent frames it has. Both zero: no voice."""

    num_codes: int
    num_frames: int


@dataclass(frozen=True, slots=True)
class Token2WavConfig:
    """Audio codes to waveform."""

    dit: DiTConfig
    flow: FlowConfig
    vocoder: VocoderConfig
    voice: VoiceConfig


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The whole model. token2wav is None in a text-only checkpoint."""

    llm: LLMConfig
    encoder: EncoderConfig
    adapter: AdapterConfig
    token2wav: Token2WavConfig | None
    audio_token_index: int  # ids below are text, id - audio_token_index is an audio code


def from_dict(cls: type[T], data: object, where: str = "config") -> T:
    """Return cls built from JSON data.

    Raises ConfigError naming every unknown and missing field, or the first value of a wrong type, by its path.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected an object, found {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown, missing = sorted(set(data) - set(names)), sorted(set(names) - set(data))
    if unknown or missing:
        parts = [
            f"{label}: {', '.join(found)}" for label, found in (("unknown", unknown), ("missing", missing)) if found
        ]
        raise ConfigError(f"{where}: {'; '.join(parts)}")
    return cls(**{name: _value(hints[name], data[name], f"{where}.{name}") for name in names})


def to_dict(config: Any) -> dict[str, Any]:
    """Return the JSON form of a config, the inverse of from_dict."""
    return dataclasses.asdict(config)


def is_number(value: object) -> bool:
    """Return whether a value of JSON is a number for which a float stands."""
    return isinstance(value, float) or (type(value) is int and abs(value) < LARGEST_INT)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, found {value!r}")
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is types.UnionType:
        return None if value is None else _value(arguments[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if hint is bool and isinstance(value, bool):
        return value
    if hint is float and is_number(value):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ConfigError(f"{where}: expected a count, found {value}")
        return value
    raise ConfigError(f"{where}: expected {hint.__name__}, found {value!r}")
