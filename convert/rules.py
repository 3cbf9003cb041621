"""Where each tensor of a converted checkpoint comes from. Data only: start reading here.

A Rule makes one target tensor from source tensors with one operation; a Section repeats rules over layers, stages or
blocks and puts prefixes before their names. The order of the rules is the order in the file, which is the order of use.
Shapes are written in the letters of `sizes.py`; `{i}` and the like are counted by a section's `over`.

    operation         source -> target
    ROWS              one tensor, or several one after another along the first axis; only the dtype may change
    FLAT              the same values without the leading axes of size 1
    FOLD              weight norm: (g, v) -> v * g / ||v||, the norm over all axes but the first
    EXP               log scale -> scale
    INVERSE_BETA      log beta -> 1 / (exp(beta) + 1e-9)
    MEAN, STD         the first half as it is; the square root of the second half (a variance)
    EQUAL             many equal copies -> one
    MEL_FILTERS       nothing -> Slaney's mel filter bank for 16 kHz and windows of 400 samples
"""

from dataclasses import dataclass

ROWS, FLAT, FOLD, EXP, INVERSE_BETA = "rows", "flat", "fold", "exp", "inverse_beta"
MEAN, STD, EQUAL, MEL_FILTERS = "mean", "std", "equal", "mel_filters"


@dataclass(frozen=True, slots=True)
class Source:
    """A source tensor by name (with `*`: all that match) and its shape; without a name: zeros of that shape."""

    name: str
    shape: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One target tensor. dtype None: that of the file."""

    target: str
    operation: str
    sources: tuple[Source, ...]
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """Rules under common prefixes, repeated for `over` = (index, letter of its count)."""

    target: str
    source: str
    rules: tuple["Rule | Section", ...]
    over: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One network: its file, the letters that its shapes are written in (a function of sizes.py), its rules."""

    file: str
    letters: str
    rules: tuple[Section, ...]


def same(name: str, shape: str) -> Rule:
    """Return the rule of a tensor that keeps its name."""
    return Rule(name, ROWS, (Source(name, shape),))


def renamed(target: str, source: str, shape: str) -> Rule:
    """Return the rule of a tensor under another name."""
    return Rule(target, ROWS, (Source(source, shape),))


def affine(target: str, source: str, weight: str, bias: str) -> tuple[Rule, Rule]:
    """Return the rules of weight and bias of one layer."""
    return renamed(f"{target}.weight", f"{source}.weight", weight), renamed(f"{target}.bias", f"{source}.bias", bias)


def normed_conv(target: str, source: str, norm: str, weight: str, bias: str) -> tuple[Rule, Rule]:
    """Return the rules of a weight-normed convolution."""
    return (
        Rule(f"{target}.weight", FOLD, (Source(f"{source}.weight_g", norm), Source(f"{source}.weight_v", weight))),
        renamed(f"{target}.bias", f"{source}.bias", bias),
    )


def snake(target: str, source: str, channels: str) -> tuple[Rule, Rule]:
    """Return the rules of one SnakeBeta activation."""
    return (
        Rule(f"{target}.alpha", EXP, (Source(f"{source}.act.alpha", channels),)),
        Rule(f"{target}.inverse_beta", INVERSE_BETA, (Source(f"{source}.act.beta", channels),)),
    )


LLM = (
    Section("llm.", "llm.model.", (same("embed_tokens.weight", "V C"),)),
    Section(
        "llm.layers.{i}.",
        "llm.model.layers.{i}.",
        (
            same("input_layernorm.weight", "C"),
            Rule(
                "qkv_proj.weight",
                ROWS,
                (
                    Source("self_attn.q_proj.weight", "HD C"),
                    Source("self_attn.k_proj.weight", "GD C"),
                    Source("self_attn.v_proj.weight", "GD C"),
                ),
            ),
            Rule(
                "qkv_proj.bias",
                ROWS,
                (
                    Source("self_attn.q_proj.bias", "HD"),
                    Source("self_attn.k_proj.bias", "GD"),
                    Source("self_attn.v_proj.bias", "GD"),
                ),
            ),
            renamed("o_proj.weight", "self_attn.o_proj.weight", "C HD"),
            same("post_attention_layernorm.weight", "C"),
            Rule(
                "gate_up_proj.weight",
                ROWS,
                (Source("mlp.gate_proj.weight", "F C"), Source("mlp.up_proj.weight", "F C")),
            ),
            renamed("down_proj.weight", "mlp.down_proj.weight", "C F"),
        ),
        over=("i", "layers"),
    ),
    Section("llm.", "llm.", (renamed("norm.weight", "model.norm.weight", "C"), same("lm_head.weight", "V C"))),
)

ENCODER = (
    Section("frontend.", "", (Rule("mel_filters", MEL_FILTERS, (), dtype="F32"),)),
    Section(
        "encoder.",
        "encoder.",
        (
            *affine("conv1", "conv1", "C M 3", "C"),
            *affine("conv2", "conv2", "C C 3", "C"),
            same("embed_positions.weight", "S C"),
        ),
    ),
    Section(
        "encoder.layers.{i}.",
        "encoder.layers.{i}.",
        (
            *affine("self_attn_layer_norm", "self_attn_layer_norm", "C", "C"),
            Rule(
                "qkv_proj.weight",
                ROWS,
                (
                    Source("self_attn.q_proj.weight", "C C"),
                    Source("self_attn.k_proj.weight", "C C"),
                    Source("self_attn.v_proj.weight", "C C"),
                ),
            ),
            Rule(  # Whisper's keys have no bias
                "qkv_proj.bias",
                ROWS,
                (Source("self_attn.q_proj.bias", "C"), Source("", "C"), Source("self_attn.v_proj.bias", "C")),
            ),
            *affine("o_proj", "self_attn.out_proj", "C C", "C"),
            *affine("final_layer_norm", "final_layer_norm", "C", "C"),
            *affine("fc1", "fc1", "F C", "F"),
            *affine("fc2", "fc2", "C F", "C"),
        ),
        over=("i", "layers"),
    ),
    Section("encoder.", "encoder.", affine("layer_norm", "layer_norm", "C", "C")),
)

ADAPTER = (
    Section(
        "adapter.layers.{i}.",
        "audio_adapter.downsample_layers.{i}.",
        (
            *affine("conv", "conv1d", "C C 3", "C"),
            *affine("linear1", "linear1", "F C", "F"),
            *affine("linear2", "linear2", "out F", "out"),
        ),
        over=("i", "layers"),
    ),
)

# The source of these are .npy files, under the names that source.py gives them.
VOICE = (
    Section(
        "voice.",
        "voice.",
        (
            Rule("prompt_codes", FLAT, (Source("prompt_token", "1 P"),), dtype="I64"),
            Rule("prompt_latents", FLAT, (Source("prompt_latent", "1 T Z"),)),
            Rule("speaker_embedding", FLAT, (Source("speaker_embed", "1 spk"),)),
        ),
    ),
    Section(
        "statistics.",
        "",
        (
            Rule("mean", MEAN, (Source("global_mean_var", "2Z"),)),
            Rule("std", STD, (Source("global_mean_var", "2Z"),)),
        ),
    ),
)

DIT = (
    Section(
        "dit.",
        "token2latent.",
        (
            same("token_embedding.weight", "codes E"),
            *affine("token_proj", "token_proj.0", "C E", "C"),
            *affine("token_upsample", "token_proj.1", "C C K_up", "C"),
            *affine("time_mlp.0", "time_embedder.mlp.0", "C time", "C"),
            *affine("time_mlp.2", "time_embedder.mlp.2", "C C", "C"),
            *affine("cond_proj", "cond_proj", "C C+spk", "C"),
            *affine("input_proj", "transformer_input_proj", "C C+2Z", "C"),
            *affine("conv_embed", "conv_embed.conv", "C C/groups K_conv", "C"),
            Section(
                "blocks.{i}.",
                "blocks.{i}.",
                (
                    *affine("modulation", "modulation_layer.1", "6C C", "6C"),
                    Rule(
                        "qkv_proj.weight",
                        ROWS,
                        (
                            Source("attn.q_proj.weight", "C C"),
                            Source("attn.k_proj.weight", "C C"),
                            Source("attn.v_proj.weight", "C C"),
                        ),
                    ),
                    *affine("o_proj", "attn.o_proj", "C C", "C"),
                    *affine("fc1", "ffn.fc1", "F C", "F"),
                    *affine("fc2", "ffn.fc2", "C F", "C"),
                ),
                over=("i", "layers"),
            ),
            *affine("output_modulation", "output_layer.adaLN_modulation.1", "2C C", "2C"),
            *affine("output_proj", "output_layer.linear", "Z C", "Z"),
        ),
    ),
)

VOCODER = (
    Section(
        "vocoder.",
        "wavegan.",
        (
            Rule(
                "filters.up",
                EQUAL,
                (
                    Source("resblocks.*.activations.*.upsample.filter", "1 1 taps"),
                    Source("activation_post.upsample.filter", "1 1 taps"),
                ),
            ),
            Rule(
                "filters.down",
                EQUAL,
                (
                    Source("resblocks.*.activations.*.downsample.lowpass.filter", "1 1 taps"),
                    Source("activation_post.downsample.lowpass.filter", "1 1 taps"),
                ),
            ),
            *normed_conv("conv_pre", "conv_pre", "first 1 1", "first Z 7", "first"),
            Section(
                "stages.{s}.",
                "",
                (
                    *normed_conv("upsample", "ups.{s}.0", "in 1 1", "in out K_up", "out"),
                    Section(
                        "blocks.{b}.",
                        "resblocks.{r}.",  # r = 3 s + b
                        (
                            Section(
                                "",
                                "",
                                (  # a = 2 j and z = 2 j + 1: the activations before the two convolutions
                                    *snake("acts.{a}", "activations.{a}", "out"),
                                    *normed_conv("conv1.{j}", "convs1.{j}", "out 1 1", "out out K", "out"),
                                    *snake("acts.{z}", "activations.{z}", "out"),
                                    *normed_conv("conv2.{j}", "convs2.{j}", "out 1 1", "out out K", "out"),
                                ),
                                over=("j", "dilations"),
                            ),
                        ),
                        over=("b", "blocks"),
                    ),
                ),
                over=("s", "stages"),
            ),
            *snake("act_post", "activation_post", "last"),
            *normed_conv("conv_post", "conv_post", "1 1 1", "1 last 7", "1"),
        ),
    ),
)

MODEL = (Part("llm", "llm", LLM), Part("encoder", "encoder", ENCODER), Part("encoder", "adapter", ADAPTER))
SPEECH = (Part("token2wav", "voice", VOICE), Part("token2wav", "dit", DIT), Part("token2wav", "vocoder", VOCODER))

# Source tensors that are left out on purpose: (name with `*`, reason). What no table names is left out as NOT_NEEDED.
LEFT_OUT = (
    ("*.rotary.inv_freq", "derived: computed from the sizes"),
    ("*.rotary_emb.inv_freq", "derived: computed from the sizes"),
)
NOT_NEEDED = "not needed for inference"

# Other spellings of the names in token2wav's pickle: (regular expression, replacement).
SPELLINGS = (
    (r"^module\.", ""),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)

# The special tokens that the runtime needs, by name: (key in the manifest, text).
SPECIAL_TOKENS = (
    ("im_start", "<|im_start|>"),
    ("im_end", "<|im_end|>"),
    ("endoftext", "<|endoftext|>"),
    ("begofcAUDIO", "<|begofcAUDIO|>"),
    ("cAUDIO", "<|cAUDIO|>"),
    ("endofcAUDIO", "<|endofcAUDIO|>"),
)

# Sampling defaults of a converted checkpoint, in Hugging Face's words where they have one. Greedy.
GENERATION = {
    "do_sample": False,
    "temperature": 0.0,
    "top_k": 50,
    "top_p": 0.9,
    "repetition_penalty": 1.05,
    "window_penalty": 1.05,
    "window": 8,
    "max_new_tokens": 2048,
}
