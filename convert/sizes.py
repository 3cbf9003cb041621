"""The letters in which rules.py writes shapes, counts and indices, as numbers of one model."""

from collections.abc import Callable, Mapping

from covo_npu.runtime.checkpoint.config import ModelConfig, Token2WavConfig

Letters = dict[str, int]


def llm(config: ModelConfig, at: Mapping[str, int]) -> Letters:
    """Return V, C, HD, GD, F and the count of layers of the LLM."""
    sizes = config.llm
    return {
        "V": sizes.vocab_size,
        "C": sizes.hidden_size,
        "HD": sizes.num_heads * sizes.head_dim,
        "GD": sizes.num_kv_heads * sizes.head_dim,
        "F": sizes.intermediate_size,
        "layers": sizes.num_layers,
    }


def encoder(config: ModelConfig, at: Mapping[str, int]) -> Letters:
    """Return C, M, S, F and the count of layers of the encoder."""
    sizes = config.encoder
    return {
        "C": sizes.hidden_size,
        "M": sizes.num_mels,
        "S": sizes.max_positions,
        "F": sizes.intermediate_size,
        "layers": sizes.num_layers,
    }


def adapter(config: ModelConfig, at: Mapping[str, int]) -> Letters:
    """Return C, F and `out`, which is the LLM's C in the last layer only."""
    sizes = config.adapter
    last = at.get("i") == sizes.num_layers - 1
    return {
        "C": sizes.input_size,
        "F": sizes.intermediate_size,
        "out": sizes.output_size if last else sizes.input_size,
        "layers": sizes.num_layers,
    }


def voice(config: ModelConfig, at: Mapping[str, int]) -> Letters:
    """Return P codes, T frames of the voice prompt, Z and the size of the speaker embedding."""
    speech = _speech(config)
    return {
        "P": speech.voice.num_codes,
        "T": speech.voice.num_frames,
        "Z": speech.dit.latent_dim,
        "2Z": 2 * speech.dit.latent_dim,
        "spk": speech.dit.speaker_dim,
    }


def dit(config: ModelConfig, at: Mapping[str, int]) -> Letters:
    """Return the letters of the diffusion transformer."""
    sizes = _speech(config).dit
    return {
        "C": sizes.hidden_size,
        "2C": 2 * sizes.hidden_size,  # shift, scale
        "6C": 6 * sizes.hidden_size,  # shift, scale, gate, for attention and feed-forward
        "F": sizes.intermediate_size,
        "E": sizes.code_dim,
        "Z": sizes.latent_dim,
        "codes": sizes.num_codes,
        "time": sizes.time_dim,
        "C+spk": sizes.hidden_size + sizes.speaker_dim,
        "C+2Z": sizes.hidden_size + 2 * sizes.latent_dim,
        "C/groups": sizes.hidden_size // sizes.conv_groups,
        "K_conv": sizes.conv_kernel_size,
        "K_up": 2 * sizes.upsample_factor,
        "layers": sizes.num_layers,
    }


def vocoder(config: ModelConfig, at: Mapping[str, int]) -> Letters:
    """Return the letters of BigVGAN for stage s, block b and convolution j; each stage halves the channels."""
    sizes = _speech(config).vocoder
    s, b, j = at.get("s", 0), at.get("b", 0), at.get("j", 0)
    return {
        "Z": sizes.latent_dim,
        "first": sizes.initial_channels,
        "in": sizes.initial_channels >> s,
        "out": sizes.initial_channels >> (s + 1),
        "last": sizes.initial_channels >> len(sizes.upsample_rates),
        "K_up": sizes.upsample_kernel_sizes[s],
        "K": sizes.resblock_kernel_sizes[b],
        "taps": 12,
        "stages": len(sizes.upsample_rates),
        "blocks": len(sizes.resblock_kernel_sizes),
        "dilations": len(sizes.resblock_dilations[b]),
        "r": s * len(sizes.resblock_kernel_sizes) + b,
        "a": 2 * j,
        "z": 2 * j + 1,
    }


LETTERS: dict[str, Callable[[ModelConfig, Mapping[str, int]], Letters]] = {
    "llm": llm,
    "encoder": encoder,
    "adapter": adapter,
    "voice": voice,
    "dit": dit,
    "vocoder": vocoder,
}


def _speech(config: ModelConfig) -> Token2WavConfig:
    assert config.token2wav is not None, "only asked for with token2wav"
    return config.token2wav
