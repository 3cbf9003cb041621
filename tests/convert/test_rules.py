"""The tables against the networks, the specification's figures and the reference pack."""

from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from covo_npu.convert.plan import recipes
from covo_npu.convert.shards import INDEX, read_shards
from covo_npu.convert.source import open_source
from covo_npu.runtime.checkpoint.config import ModelConfig
from covo_npu.runtime.checkpoint.format import INT8
from covo_npu.runtime.networks.files import expected_tensors
from covo_npu.tools.synth.config import PRESETS


@pytest.mark.parametrize("int8", [(), *INT8.values()], ids=["float", *INT8])
@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_rules_make_each_tensor_of_the_networks_once_in_its_file(config: ModelConfig, int8: tuple[str, ...]):
    made = [(recipe.file, recipe.target) for recipe in recipes(config, int8=int8)]
    wanted = [(file, name) for file, tensors in expected_tensors(config, int8).items() for name in tensors]
    assert max(Counter(made).values()) == 1
    assert set(made) == set(wanted)


@pytest.mark.parametrize("int8", [(), *INT8.values()], ids=["float", *INT8])
@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_shapes_of_the_sources_add_up_to_those_of_the_networks(config: ModelConfig, int8: tuple[str, ...]):
    shapes = {name: shape for tensors in expected_tensors(config, int8).values() for name, shape in tensors.items()}
    by_operation = {
        "rows": lambda needs: (sum(n.shape[0] for n in needs), *needs[0].shape[1:]),
        "fold": lambda needs: needs[1].shape,
        "exp": lambda needs: needs[0].shape,
        "inverse_beta": lambda needs: needs[0].shape,
        "mean": lambda needs: (needs[0].shape[0] // 2,),
        "std": lambda needs: (needs[0].shape[0] // 2,),
        "equal": lambda needs: needs[0].shape[-1:],
        "int8": lambda needs: (sum(n.shape[0] for n in needs), *needs[0].shape[1:]),
        "scales": lambda needs: (sum(n.shape[0] for n in needs),),
    }
    for recipe in recipes(config, int8=int8):
        assert by_operation[recipe.operation.name](recipe.needs) == shapes[recipe.target], recipe.target


def test_the_full_size_has_the_published_number_of_tensors_and_bytes():
    needs = {need.name: need for recipe in recipes(PRESETS["full"]) for need in recipe.needs if need.name}
    model = [need for name, need in needs.items() if name.startswith(("llm.", "encoder.", "audio_adapter."))]
    speech = [need for name, need in needs.items() if name.startswith(("token2latent.", "wavegan."))]
    assert len(model) == 844
    assert sum(2 * prod(need.shape) for need in model) / 1e9 == pytest.approx(16.80, abs=0.005)
    assert sum(prod(need.shape) for need in speech) / 1e6 == pytest.approx(366.6, abs=0.1)


def test_every_tensor_of_the_reference_pack_has_a_place(tiny_source: Path):
    source = open_source(tiny_source)
    used = {need.name for recipe in recipes(source.config, source.tensors) for need in recipe.needs}
    left = {name for name in source.tensors if name not in used}
    assert {name.rpartition(".")[2] for name in left} == {"inv_freq"}
    assert used - {""} <= set(source.tensors)


def test_a_files_tensors_lie_in_the_order_of_use():
    order = [recipe.target for recipe in recipes(PRESETS["tiny"]) if recipe.file == "llm"]
    assert order[0] == "llm.embed_tokens.weight" and order[-1] == "llm.lm_head.weight"
    first = [name.removeprefix("llm.layers.0.") for name in order if name.startswith("llm.layers.0.")]
    assert first == [
        "input_layernorm.weight",
        "qkv_proj.weight",
        "qkv_proj.bias",
        "o_proj.weight",
        "post_attention_layernorm.weight",
        "gate_up_proj.weight",
        "down_proj.weight",
    ]
    layers = [int(name.split(".")[2]) for name in order if name.startswith("llm.layers.")]
    assert layers == sorted(layers)


def test_a_text_only_checkpoint_needs_nothing_of_token2wav(tiny_source: Path):
    config = replace(PRESETS["tiny"], token2wav=None)
    names = {need.name for recipe in recipes(config) for need in recipe.needs if need.name}
    assert names == set(read_shards(tiny_source).tensors), f"the {INDEX} lists nothing else"
