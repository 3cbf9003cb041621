"""Upstream's configuration files, in all their spellings, to ModelConfig. What the networks cannot do is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covo_npu.convert.errors import ConvertError, Kind, refuse
from covo_npu.runtime.checkpoint.config import (
    AdapterConfig,
    DiTConfig,
    EncoderConfig,
    FlowConfig,
    LLMConfig,
    ModelConfig,
    Token2WavConfig,
    VocoderConfig,
    VoiceConfig,
    is_number,
)

CONFIG = "config.json"
ADAPTER_FEED_FORWARD = 2048  # fixed in upstream's code, as are the next four
TIME_DIM = 256
CONV_EMBED_KERNEL = 31
CONV_EMBED_GROUPS = 16
DIT_ROPE_THETA = 50000.0

# The published hyper-parameters of token2wav, for sources without token2wav/config.json. Only what inference reads.
TOKEN2WAV_DEFAULTS: dict[str, Any] = {
    "data": {"audio": {"sample_rate": 24000}},
    "model": {
        "token2latent": {
            "upsample_factor": 4,
            "token_vocab_size": 16384,
            "token_input_dim": 512,
            "z_dim": 64,
            "spkr_embed_dim": 1024,
            "transformer": {
                "num_layers": 12,
                "hidden_size": 1024,
                "ffn_hidden_size": 4096,
                "num_heads": 16,
                "modulation": True,
                "alibi_bias": False,
                "rotary_bias": True,
                "qk_norm": False,
            },
        },
        "wavegan": {
            "upsample_rates": [5, 3, 2, 2, 2, 2],
            "upsample_kernel_sizes": [10, 6, 4, 4, 4, 4],
            "upsample_initial_channel": 1536,
            "resblock": "1",
            "resblock_kernel_sizes": [3, 7, 11],
            "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
            "activation": "snakebeta",
            "snake_logscale": True,
            "latent_dim": 64,
            "causal": True,
        },
    },
    "inference": {"s_steps": 10, "cfg_alpha": 1.0, "dynamic_thr": False, "rescale_logits": False},
}

# Fields with one value that the networks implement: path -> value. Absent and null fields have it already.
FIXED_MODEL = {
    "llm_config.hidden_act": "silu",
    "llm_config.tie_word_embeddings": False,
    "llm_config.use_sliding_window": False,
    "llm_config.partial_rotary_factor": 1.0,
    **{
        f"llm_config.{place}.{name}": value
        for place in ("rope_parameters", "rope_scaling")
        for name, value in (
            ("rope_type", "default"),
            ("type", "default"),  # the older word
            ("factor", 1.0),
            ("partial_rotary_factor", 1.0),
            ("mrope_section", None),
        )
    },
    "encoder_config.activation_function": "gelu",
    "encoder_config.scale_embedding": False,
    "encoder_config.max_source_positions": 1500,  # the encoder frames of the 30 s that a segment has
}
# Where a config may state the base of the rotations; all that do must agree.
ROPE_THETA = ("llm_config.rope_theta", "llm_config.rope_parameters.rope_theta", "llm_config.rope_scaling.rope_theta")
# Where it may say that the weights were quantised.
QUANTIZATION = ("quantization_config", "llm_config.quantization_config", "encoder_config.quantization_config")
FIXED_TOKEN2WAV = {
    "data.audio.sample_rate": 24000,
    "model.token2latent.transformer.modulation": True,
    "model.token2latent.transformer.alibi_bias": False,
    "model.token2latent.transformer.rotary_bias": True,
    "model.token2latent.transformer.qk_norm": False,
    "model.wavegan.resblock": "1",
    "model.wavegan.activation": "snakebeta",
    "model.wavegan.snake_logscale": True,
    "model.wavegan.causal": True,
    "inference.dynamic_thr": False,
}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises ConvertError if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConvertError(f"{path}: no such file; --src expects the folder of the published weights") from None
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def model_config(path: Path) -> ModelConfig:
    """Return the sizes that upstream's config.json states, without token2wav."""
    data = _Fields(path, read_json(path), FIXED_MODEL)
    for name in QUANTIZATION:
        method = data.find(f"{name}.quant_method", "by an unknown method")
        data.require(data.find(name) is None, f"{name}: the weights were quantised ({method}): use those before that")
    for place in ("llm_config.rope_parameters", "llm_config.rope_scaling"):
        data.require(
            isinstance(data.find(place, {}), (dict, type(None))), _expected(place, "an object", data.find(place))
        )
    hidden, heads = data.count("llm_config.hidden_size"), data.count("llm_config.num_attention_heads")
    encoder_size = data.count("encoder_config.d_model")
    downsample = data.count("adapter_downsample")
    data.require(downsample & (downsample - 1) == 0, f"adapter_downsample: expected a power of 2, found {downsample}")
    if data.find("llm_config.head_dim") is None:  # it follows from these
        data.require_multiple("llm_config.hidden_size", "llm_config.num_attention_heads")
    config = ModelConfig(
        llm=LLMConfig(
            num_layers=data.count("llm_config.num_hidden_layers"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=data.count("llm_config.num_key_value_heads"),
            head_dim=data.count("llm_config.head_dim", default=max(1, hidden // heads)),
            intermediate_size=data.count("llm_config.intermediate_size"),
            vocab_size=data.count("llm_config.vocab_size"),
            rms_norm_eps=data.number("llm_config.rms_norm_eps"),
            rope_theta=data.number(*ROPE_THETA),
            max_position_embeddings=data.count("llm_config.max_position_embeddings"),
        ),
        encoder=EncoderConfig(
            num_layers=data.count("encoder_config.encoder_layers"),
            hidden_size=encoder_size,
            num_heads=data.count("encoder_config.encoder_attention_heads"),
            intermediate_size=data.count("encoder_config.encoder_ffn_dim"),
            num_mels=data.count("encoder_config.num_mel_bins"),
            max_positions=data.count("encoder_config.max_source_positions"),
        ),
        adapter=AdapterConfig(
            num_layers=downsample.bit_length() - 1,
            input_size=encoder_size,
            intermediate_size=ADAPTER_FEED_FORWARD,
            output_size=hidden,
        ),
        token2wav=None,
        audio_token_index=data.count("audio_token_index"),
    )
    data.refuse()
    return config


def token2wav_config(path: Path) -> Token2WavConfig:
    """Return the sizes that token2wav/config.json states, the published ones if it is absent. Without a voice."""
    data = _Fields(path, read_json(path) if path.exists() else TOKEN2WAV_DEFAULTS, FIXED_TOKEN2WAV)
    latent, transformer, vocoder = "model.token2latent.", "model.token2latent.transformer.", "model.wavegan."
    config = Token2WavConfig(
        dit=DiTConfig(
            num_layers=data.count(transformer + "num_layers"),
            hidden_size=data.count(transformer + "hidden_size"),
            num_heads=data.count(transformer + "num_heads"),
            intermediate_size=data.count(transformer + "ffn_hidden_size"),
            num_codes=data.count(latent + "token_vocab_size"),
            code_dim=data.count(latent + "token_input_dim"),
            latent_dim=data.count(latent + "z_dim"),
            speaker_dim=data.count(latent + "spkr_embed_dim"),
            time_dim=TIME_DIM,
            upsample_factor=data.count(latent + "upsample_factor"),
            conv_kernel_size=CONV_EMBED_KERNEL,
            conv_groups=CONV_EMBED_GROUPS,
            rope_theta=DIT_ROPE_THETA,
        ),
        flow=FlowConfig(
            time_points=data.count("inference.s_steps"),
            cfg_alpha=data.number("inference.cfg_alpha"),
            rescale=bool(data.find("inference.rescale_logits")),
        ),
        vocoder=VocoderConfig(
            latent_dim=data.count(vocoder + "latent_dim"),
            initial_channels=data.count(vocoder + "upsample_initial_channel"),
            upsample_rates=data.counts(vocoder + "upsample_rates"),
            upsample_kernel_sizes=data.counts(vocoder + "upsample_kernel_sizes"),
            resblock_kernel_sizes=data.counts(vocoder + "resblock_kernel_sizes"),
            resblock_dilations=data.lists_of_counts(vocoder + "resblock_dilation_sizes"),
        ),
        voice=VoiceConfig(0, 0),
    )
    data.refuse()
    return config


class _Fields:
    """Looks fields up by dotted path and collects what is wrong, so that one message can name it all."""

    def __init__(self, path: Path, data: Mapping[str, Any], fixed: Mapping[str, object]) -> None:
        self.path, self.data = path, data
        self.findings = [
            f"{name}: expected {value!r}, found {found!r}: not implemented"
            for name, value in fixed.items()
            if (found := self.find(name)) is not None and found != value
        ]

    def find(self, path: str, default: Any = None) -> Any:
        """Return the value at a dotted path, or the default."""
        value: Any = self.data
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return value

    def count(self, path: str, default: int | None = None) -> int:
        """Return a whole number of at least 1."""
        value = self.find(path)
        value = default if value is None else value
        valid = self.require(type(value) is int and value > 0, _expected(path, "a count", value))
        return int(value) if valid and value is not None else 1

    def number(self, *paths: str) -> float:
        """Return the number at the paths that exist, which must agree."""
        found = {path: value for path in paths if (value := self.find(path)) is not None}
        value = next(iter(found.values()), None)
        stated = ", ".join(f"{path} = {number!r}" for path, number in found.items())
        self.require(all(number == value for number in found.values()), f"these disagree: {stated}")
        return float(value) if self.require(is_number(value), _expected(" or ".join(paths), "a number", value)) else 1.0  # type: ignore[arg-type]

    def list(self, path: str) -> list[Any]:
        """Return a list."""
        value = self.find(path)
        return value if self.require(isinstance(value, list), _expected(path, "a list", value)) else []

    def counts(self, path: str) -> tuple[int, ...]:
        """Return a list of whole numbers of at least 1."""
        values = self.list(path)
        valid = all(type(value) is int and value > 0 for value in values)
        return tuple(values) if self.require(valid, _expected(path, "counts", values)) else ()

    def lists_of_counts(self, path: str) -> tuple[tuple[int, ...], ...]:
        """Return a list of lists of whole numbers of at least 1."""
        rows = self.list(path)
        valid = all(isinstance(row, list) and all(type(n) is int and n > 0 for n in row) for row in rows)
        return tuple(map(tuple, rows)) if self.require(valid, _expected(path, "lists of counts", rows)) else ()

    def require(self, holds: bool, finding: str) -> bool:
        """Return holds; note the finding if it does not."""
        if not holds:
            self.findings.append(finding)
        return holds

    def require_multiple(self, path: str, of: str) -> None:
        """Note it if one count is no multiple of another; what is no count at all is noted elsewhere."""
        value, unit = self.find(path), self.find(of)
        if type(value) is int and type(unit) is int and unit > 0:
            self.require(value % unit == 0, f"{path}: expected a multiple of {of} = {unit}, found {value}")

    def refuse(self) -> None:
        """Raise ConvertError with all findings, if there are any."""
        refuse(str(self.path), Kind("fields", self.findings, "Is this the config.json of a Covo-Audio model?"))


def _expected(path: str, what: str, found: object) -> str:
    return f"{path}: " + ("missing" if found is None else f"expected {what}, found {found!r}")
