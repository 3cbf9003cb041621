"""Where each tensor of a converted checkpoint comes from. Data only: start reading here.

A Rule makes one target tensor from source tensors with one operation; a Section repeats rules over layers, stages or
blocks and puts prefixes before their names. The order of the rules is the order in the file, which is the order of use.
Shapes are written in the letters of `sizes.py`; `{i}` and the like are counted by a section's `over`.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from torch import Tensor

from covo_npu.convert import transforms
from covo_npu.runtime.checkpoint.format import HEAD, LAYERS


@dataclass(frozen=True, slots=True)
class Operation:
    """What a rule does with its inputs. done: the summary's word for it.

    compute: None: the inputs one after another along the first axis, as streams; see write.py.
    """

    name: str
    done: str
    compute: Callable[..., Tensor] | None


ROWS = Operation("rows", "copied", None)
FOLD = Operation("fold", "folded", transforms.fold_weight_norm)  # (g, v) -> v * g / ||v||
EXP = Operation("exp", "computed", transforms.exp)  # log scale -> scale
INVERSE_BETA = Operation("inverse_beta", "computed", transforms.inverse_beta)  # log beta -> 1 / (exp(beta) + 1e-9)
MEAN = Operation("mean", "copied", transforms.mean)  # the first half
STD = Operation("std", "computed", transforms.std)  # the square root of the second half, a variance
EQUAL = Operation("equal", "merged", transforms.equal)  # many equal copies -> one
INT8 = Operation("int8", "quantised", None)  # the inputs one after another, each row by transforms.quantise
SCALES = Operation("scales", "computed", None)  # what the INT8 rule of the same weight found: a scale a row


@dataclass(frozen=True, slots=True)
class Split:
    """Along which axis of its inputs a rule is shared by tensor-parallel ranks; None: every rank has all of it."""

    name: str
    axis: int | None


WHOLE = Split("none", None)
HEADS = Split("heads", 0)  # rows, of which a head has D: plan.py sees to it that no head is cut
SPLIT_ROWS = Split("rows", 0)  # the outputs of a product; zeros are added if they cannot be shared evenly
COLUMNS = Split("columns", 1)  # the inputs of a product: the ranks' products are summed


@dataclass(frozen=True, slots=True)
class Input:
    """A source tensor by name (with `*`: all that match) and its shape; without a name: zeros of that shape."""

    name: str
    shape: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One target tensor. dtype None: that of the part."""

    target: str
    operation: Operation
    inputs: tuple[Input, ...]
    dtype: str | None = None
    split: Split = WHOLE


@dataclass(frozen=True, slots=True)
class Section:
    """Rules under common prefixes, repeated for `over` = (index, letter of its count)."""

    target: str
    source: str
    rules: tuple["Rule | Section", ...]
    over: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One network: its file, the letters that its shapes are written in (a function of sizes.py), its rules.

    dtype: None: as asked with --dtype.
    """

    file: str
    letters: str
    rules: tuple[Section, ...]
    dtype: str | None = None


def same(name: str, shape: str, split: Split = WHOLE) -> Rule:
    """Return the rule of a tensor that keeps its name."""
    return Rule(name, ROWS, (Input(name, shape),), split=split)


def renamed(target: str, source: str, shape: str, split: Split = WHOLE) -> Rule:
    """Return the rule of a tensor under another name."""
    return Rule(target, ROWS, (Input(source, shape),), split=split)


def affine(target: str, source: str, weight: str, bias: str) -> tuple[Rule, Rule]:
    """Return the rules of weight and bias of one layer."""
    return renamed(f"{target}.weight", f"{source}.weight", weight), renamed(f"{target}.bias", f"{source}.bias", bias)


def normed_conv(target: str, source: str, norm: str, weight: str, bias: str) -> tuple[Rule, Rule]:
    """Return the rules of a weight-normed convolution."""
    return (
        Rule(f"{target}.weight", FOLD, (Input(f"{source}.weight_g", norm), Input(f"{source}.weight_v", weight))),
        renamed(f"{target}.bias", f"{source}.bias", bias),
    )


def snake(target: str, source: str, channels: str) -> tuple[Rule, Rule]:
    """Return the rules of one SnakeBeta activation."""
    return (
        Rule(f"{target}.alpha", EXP, (Input(f"{source}.act.alpha", channels),)),
        Rule(f"{target}.inverse_beta", INVERSE_BETA, (Input(f"{source}.act.beta", channels),)),
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
                    Input("self_attn.q_proj.weight", "HD C"),
                    Input("self_attn.k_proj.weight", "GD C"),
                    Input("self_attn.v_proj.weight", "GD C"),
                ),
                split=HEADS,
            ),
            Rule(
                "qkv_proj.bias",
                ROWS,
                (
                    Input("self_attn.q_proj.bias", "HD"),
                    Input("self_attn.k_proj.bias", "GD"),
                    Input("self_attn.v_proj.bias", "GD"),
                ),
                split=HEADS,
            ),
            renamed("o_proj.weight", "self_attn.o_proj.weight", "C HD", COLUMNS),
            same("post_attention_layernorm.weight", "C"),
            Rule(
                "gate_up_proj.weight",
                ROWS,
                (Input("mlp.gate_proj.weight", "F C"), Input("mlp.up_proj.weight", "F C")),
                split=SPLIT_ROWS,
            ),
            renamed("down_proj.weight", "mlp.down_proj.weight", "C F", COLUMNS),
        ),
        over=("i", "layers"),
    ),
    Section(
        "llm.",
        "llm.",
        (renamed("norm.weight", "model.norm.weight", "C"), same("lm_head.weight", "V C", SPLIT_ROWS)),
    ),
)

ENCODER = (
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
                    Input("self_attn.q_proj.weight", "C C"),
                    Input("self_attn.k_proj.weight", "C C"),
                    Input("self_attn.v_proj.weight", "C C"),
                ),
            ),
            Rule(  # Whisper's keys have no bias
                "qkv_proj.bias",
                ROWS,
                (Input("self_attn.q_proj.bias", "C"), Input("", "C"), Input("self_attn.v_proj.bias", "C")),
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

# The source of these are .npy files, under the names that speech.py gives them.
VOICE = (
    Section(
        "voice.",
        "voice.",
        (
            Rule("prompt_codes", ROWS, (Input("prompt_codes", "P"),), dtype="I64"),
            same("prompt_latents", "T Z"),
            same("speaker_embedding", "spk"),
        ),
    ),
    Section(
        "statistics.",
        "",
        (
            Rule("mean", MEAN, (Input("global_mean_var", "2Z"),)),
            Rule("std", STD, (Input("global_mean_var", "2Z"),)),
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
                            Input("attn.q_proj.weight", "C C"),
                            Input("attn.k_proj.weight", "C C"),
                            Input("attn.v_proj.weight", "C C"),
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
                    Input("resblocks.*.activations.*.upsample.filter", "1 1 taps"),
                    Input("activation_post.upsample.filter", "1 1 taps"),
                ),
            ),
            Rule(
                "filters.down",
                EQUAL,
                (
                    Input("resblocks.*.activations.*.downsample.lowpass.filter", "1 1 taps"),
                    Input("activation_post.downsample.lowpass.filter", "1 1 taps"),
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

# What every token multiplies: the weights of the LLM that can be held in 8 bits.
PRODUCTS = {
    LAYERS: ("qkv_proj.weight", "o_proj.weight", "gate_up_proj.weight", "down_proj.weight"),
    HEAD: ("lm_head.weight",),
}


def llm(int8: Collection[str]) -> Part:
    """Return the rules of the LLM. int8: whose PRODUCTS are held in 8 bits."""
    products = {target for part in int8 for target in PRODUCTS[part]}
    return Part("llm", "llm", tuple(quantised(section, products) for section in LLM))


def quantised(section: Section, products: Collection[str]) -> Section:
    """Return a section whose products are held in 8 bits, each followed by its scales."""
    rules: list[Rule | Section] = []
    for rule in section.rules:
        if isinstance(rule, Rule) and rule.target in products:
            scales = rule.target.removesuffix("weight") + "scale"
            split = rule.split if rule.split.axis == 0 else WHOLE  # what is one number a row stays whole under COLUMNS
            rules.append(replace(rule, operation=INT8, dtype="I8"))
            rules.append(Rule(scales, SCALES, rule.inputs, dtype="F32", split=split))
        else:
            rules.append(rule)
    return replace(section, rules=tuple(rules))


MODEL = (Part("encoder", "encoder", ENCODER), Part("encoder", "adapter", ADAPTER))
SPEECH = (
    Part("token2wav", "voice", VOICE, "F32"),
    Part("token2wav", "dit", DIT, "F32"),
    Part("token2wav", "vocoder", VOCODER, "F32"),
)

# Source tensors that are left out on purpose: (name with `*`, reason). What no table names is left out as NOT_NEEDED.
LEFT_OUT = (
    ("*.rotary.inv_freq", "derived: computed from the sizes"),
    ("*.rotary_emb.inv_freq", "derived: computed from the sizes"),
)
NOT_NEEDED = "not needed for inference"
NOT_LISTED = "not needed, and the index does not list it"

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
