"""The sizes of the synthetic checkpoints, and their configuration files in upstream's words."""

from typing import Any

from covo_npu.convert.config import TOKEN2WAV_DEFAULTS
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
)

_RATES, _BLOCKS = (5, 3, 2, 2, 2, 2), (3, 7, 11)
_FLOW = FlowConfig(time_points=10, cfg_alpha=1.0, rescale=False)
_VOICE = VoiceConfig(num_codes=291, num_frames=1167)


def _llm(layers: int, size: int, heads: tuple[int, int, int], feed_forward: int, vocabulary: int) -> LLMConfig:
    """Return Qwen2's sizes. heads: H, G, D."""
    return LLMConfig(layers, size, *heads, feed_forward, vocabulary, 1e-6, 1e6, 32768)


def _speech(
    dit: tuple[int, int, int, int],
    codes: tuple[int, int],
    latents: int,
    speaker: int,
    channels: int,
    voice: VoiceConfig,
) -> Token2WavConfig:
    """Return token2wav's sizes. dit: layers, C, heads, F; codes: how many and their size."""
    return Token2WavConfig(
        dit=DiTConfig(*dit, *codes, latents, speaker, 256, 4, 31, 16, 50000.0),
        flow=_FLOW,
        vocoder=VocoderConfig(latents, channels, _RATES, tuple(2 * r for r in _RATES), _BLOCKS, ((1, 3, 5),) * 3),
        voice=voice,
    )


def _model(llm: LLMConfig, encoder: tuple[int, int, int, int], speech: Token2WavConfig) -> ModelConfig:
    """Return all sizes. encoder: layers, C, heads, F. The audio codes are the last ids of the vocabulary."""
    return ModelConfig(
        llm=llm,
        encoder=EncoderConfig(*encoder, num_mels=128, max_positions=1500),
        adapter=AdapterConfig(3, encoder[1], 2048, llm.hidden_size),
        token2wav=speech,
        audio_token_index=llm.vocab_size - speech.dit.num_codes,
    )


PRESETS = {
    "tiny": _model(
        _llm(3, 224, (14, 2, 16), 608, 545 + 64),
        (2, 64, 4, 128),
        _speech((2, 128, 4, 256), (64, 32), 8, 16, 128, VoiceConfig(num_codes=11, num_frames=47)),
    ),
    "small": _model(
        _llm(2, 3584, (28, 4, 128), 1024, 8220 + 1024),
        (2, 1280, 20, 512),
        _speech((2, 512, 8, 1024), (1024, 512), 64, 1024, 256, _VOICE),
    ),
    "full": _model(
        _llm(28, 3584, (28, 4, 128), 18944, 151671 + 16384),
        (32, 1280, 20, 5120),
        _speech((12, 1024, 16, 4096), (16384, 512), 64, 1024, 1536, _VOICE),
    ),
}


def upstream_json(config: ModelConfig) -> dict[str, Any]:
    """Return config.json as transformers 4 writes it: torch_dtype, rope_theta beside the sizes."""
    llm, encoder = config.llm, config.encoder
    return {
        "architectures": ["CovoAudioForCausalLM"],
        "model_type": "covo_audio",
        "torch_dtype": "bfloat16",
        "audio_token_index": config.audio_token_index,
        "adapter_downsample": 2**config.adapter.num_layers,
        "whisper_feats_dim": encoder.hidden_size,
        "llm_config": {
            "model_type": "qwen2",
            "vocab_size": llm.vocab_size,
            "hidden_size": llm.hidden_size,
            "intermediate_size": llm.intermediate_size,
            "num_hidden_layers": llm.num_layers,
            "num_attention_heads": llm.num_heads,
            "num_key_value_heads": llm.num_kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": llm.max_position_embeddings,
            "rms_norm_eps": llm.rms_norm_eps,
            "rope_theta": llm.rope_theta,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "torch_dtype": "bfloat16",
            **({} if llm.num_heads * llm.head_dim == llm.hidden_size else {"head_dim": llm.head_dim}),
        },
        "encoder_config": {
            "model_type": "whisper",
            "d_model": encoder.hidden_size,
            "encoder_layers": encoder.num_layers,
            "encoder_attention_heads": encoder.num_heads,
            "encoder_ffn_dim": encoder.intermediate_size,
            "num_mel_bins": encoder.num_mels,
            "max_source_positions": encoder.max_positions,
            "activation_function": "gelu",
            "scale_embedding": False,
            "torch_dtype": "float16",
        },
    }


def token2wav_json(config: ModelConfig) -> dict[str, Any]:
    """Return token2wav/config.json: the published one with other sizes."""
    assert config.token2wav is not None
    dit, vocoder, defaults = config.token2wav.dit, config.token2wav.vocoder, TOKEN2WAV_DEFAULTS
    transformer = defaults["model"]["token2latent"]["transformer"] | {
        "num_layers": dit.num_layers,
        "hidden_size": dit.hidden_size,
        "ffn_hidden_size": dit.intermediate_size,
        "num_heads": dit.num_heads,
    }
    latent = {
        "upsample_factor": dit.upsample_factor,
        "token_vocab_size": dit.num_codes,
        "token_input_dim": dit.code_dim,
        "z_dim": dit.latent_dim,
        "spkr_embed_dim": dit.speaker_dim,
        "transformer": transformer,
    }
    wavegan = defaults["model"]["wavegan"] | {
        "upsample_initial_channel": vocoder.initial_channels,
        "latent_dim": vocoder.latent_dim,
    }
    return defaults | {"model": {"token2latent": latent, "wavegan": wavegan}}
