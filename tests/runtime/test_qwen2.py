"""The decoder against transformers' Qwen2 on random weights, and against itself however a prompt is cut."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from covo_npu.convert.transforms import quantise
from covo_npu.kernels import cpu, native, reference
from covo_npu.runtime.checkpoint.config import LLMConfig
from covo_npu.runtime.checkpoint.format import INT8
from covo_npu.runtime.networks import qwen2
from covo_npu.runtime.networks.cache import KVCache, allocate
from covo_npu.runtime.networks.qwen2 import Qwen2

CPU = torch.device("cpu")
EIGHT = ("_proj.weight", "lm_head.weight")  # what is in 8 bits, by the ends of the names
TINY = LLMConfig(3, 96, 6, 2, 16, 160, 211, 1e-6, 1e6, 4096)
REAL_LAYER = LLMConfig(1, 3584, 28, 4, 128, 18944, 64, 1e-6, 1e6, 131072)


def upstream(config: LLMConfig, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """Random weights, biases and norms: nothing that is one or zero by default hides a fault."""
    torch.manual_seed(3)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads, rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings, rope_theta=config.rope_theta,
            tie_word_embeddings=False, attn_implementation="sdpa",
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.to(dtype).eval()


def ours(model: Qwen2ForCausalLM, config: LLMConfig, kernels=native) -> Qwen2:
    """The same weights in our names: q, k, v and gate, up fused by rows."""
    source, tensors = model.state_dict(), {}
    for name in ("embed_tokens.weight", "norm.weight"):
        tensors[name] = source[f"model.{name}"]
    tensors["lm_head.weight"] = source["lm_head.weight"]
    for i in range(config.num_layers):
        old, new = f"model.layers.{i}.", f"layers.{i}."
        for kind in ("weight", "bias"):
            tensors[f"{new}qkv_proj.{kind}"] = torch.cat([source[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv"])
        tensors[f"{new}o_proj.weight"] = source[f"{old}self_attn.o_proj.weight"]
        tensors[f"{new}gate_up_proj.weight"] = torch.cat([source[f"{old}mlp.{p}_proj.weight"] for p in ("gate", "up")])
        for name in ("mlp.down_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight"):
            tensors[new + name.removeprefix("mlp.")] = source[old + name]
    with torch.device("meta"):
        network = Qwen2(config, kernels)
    network.load_state_dict(tensors, strict=True, assign=True)
    return network


def in_8_bits(model: Qwen2ForCausalLM, config: LLMConfig, kernels=native) -> Qwen2:
    """Our network in 8 bits, layers and head; the weights of `model` become what those stand for."""
    tensors = ours(model, config).state_dict()
    for name in [name for name in tensors if name.endswith(EIGHT)]:
        tensors[name], tensors[name.replace("weight", "scale")] = quantise(tensors[name])
    with torch.device("meta"):
        network = Qwen2(config, kernels, int8=INT8["int8+head"])
    network.load_state_dict(tensors, strict=True, assign=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(EIGHT):
                numbers, scale = quantise(parameter)
                parameter.copy_(numbers * scale[:, None])
    return network


def prompt(config: LLMConfig, length: int) -> Tensor:
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(5))


def cache_of(config: LLMConfig, slots: int = 1, rows: int = 64, dtype: torch.dtype = torch.float32) -> KVCache:
    return allocate(config, slots, rows, dtype, CPU)


def prefilled(network: Qwen2, x: torch.Tensor, cache: KVCache, slot: int, start: int) -> torch.Tensor:
    """Return the logits [1, V] after the last of some tokens, which are in the cache then."""
    return network.logits(network.fill(x, cache, slot, start))


def close(found: Tensor, expected: Tensor, config: LLMConfig = TINY) -> bool:
    """Whether two ways to compute the network in float32 agree.

    Each is off by about sqrt(K) roundings of 2^-24 in each of a layer's four products, K the longest sum: in whatever
    order a processor sums, no value of some thousand differs by more than four standard deviations of that.
    """
    rounding = 2**-24 * sqrt(2 * 4 * config.num_layers * config.intermediate_size)
    return bool((found - expected).abs().max() <= 4 * rounding * expected.std())


@pytest.mark.parametrize("kernels", [native, reference], ids=["native", "reference"])
@torch.inference_mode()
def test_prefill_and_decode_equal_transformers(kernels) -> None:
    model = upstream(TINY)
    ids = prompt(TINY, 37)
    expected = model(ids[None]).logits[0]
    network, cache = ours(model, TINY, kernels), cache_of(TINY)
    assert close(prefilled(network, network.embed(ids[:30]), cache, 0, 0)[0], expected[29])
    for position in range(30, 37):
        logits = network.decode(ids[position, None], torch.tensor([position]), [position + 1], cache)
        assert close(logits[0], expected[position])


@pytest.mark.parametrize("kernels", [native, reference, cpu.CPU()], ids=lambda kernels: kernels.name)
@torch.inference_mode()
def test_weights_in_8_bits_equal_transformers_with_what_they_stand_for(kernels) -> None:
    """Prefill, decoding, and two slots side by side, eager and as captured; another scale would be seen."""
    model = upstream(TINY)
    network, ids = in_8_bits(model, TINY, kernels), prompt(TINY, 37)
    expected = model(ids[None]).logits[0]
    cache = cache_of(TINY, slots=2)
    for slot, length in enumerate((30, 21)):
        assert close(prefilled(network, network.embed(ids[:length]), cache, slot, 0)[0], expected[length - 1])
    for step in range(3):
        positions = torch.tensor([30 + step, 21 + step])
        lengths = [31 + step, 22 + step]
        masked = network.decode_masked(ids[positions], positions, 48, cache)
        for logits in (masked, network.decode(ids[positions], positions, lengths, cache)):
            assert close(logits[0], expected[30 + step]) and close(logits[1], expected[21 + step])
    network.layers[1].down_proj.scale[5] *= 1.01
    assert not close(prefilled(network, network.embed(ids[:30]), cache, 0, 0)[0], expected[29])


@torch.inference_mode()
def test_a_layer_at_the_real_sizes_equals_transformers() -> None:
    model = upstream(REAL_LAYER)
    ids = prompt(REAL_LAYER, 19)
    states: list[Tensor] = []
    model.model.norm.register_forward_hook(lambda module, inputs, output: states.append(output[0]))
    model(ids[None])
    network, cache = ours(model, REAL_LAYER), cache_of(REAL_LAYER)
    assert close(network.fill(network.embed(ids), cache, 0, 0)[0], states[0][-1], REAL_LAYER)


@torch.inference_mode()
def test_bfloat16_has_at_most_twice_transformers_error() -> None:
    exact, half = upstream(TINY), upstream(TINY, torch.bfloat16)
    exact.load_state_dict(half.state_dict())  # the rounded weights, computed with in float32
    ids = prompt(TINY, 41)
    expected = exact(ids[None]).logits[0, -1]
    theirs = (half(ids[None]).logits[0, -1].float() - expected).norm()
    network = ours(half, TINY)
    found = prefilled(network, network.embed(ids), cache_of(TINY, dtype=torch.bfloat16), 0, 0)[0]
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() <= 2 * theirs


@pytest.mark.parametrize("chunk", [1, 7, 16, 37])
@torch.inference_mode()
def test_a_prompt_in_chunks_equals_the_whole(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, ids = ours(upstream(TINY), TINY), prompt(TINY, 37)
    whole, cut = cache_of(TINY), cache_of(TINY)
    expected = prefilled(network, network.embed(ids), whole, 0, 0)
    monkeypatch.setattr(qwen2, "PREFILL_CHUNK", chunk)
    assert close(prefilled(network, network.embed(ids), cut, 0, 0), expected)
    for mine, theirs in zip(cut.read(0, 37), whole.read(0, 37), strict=True):
        assert close(mine, theirs)


@torch.inference_mode()
def test_a_continued_prompt_equals_the_whole_and_leaves_other_slots_alone() -> None:
    network, ids = ours(upstream(TINY), TINY), prompt(TINY, 37)
    cache = cache_of(TINY, slots=3)
    expected = prefilled(network, network.embed(ids), cache_of(TINY), 0, 0)
    for t in (*cache.keys, *cache.values):
        t.fill_(9.0)
    network.fill(network.embed(ids[:21]), cache, 1, 0)
    assert close(prefilled(network, network.embed(ids[21:]), cache, 1, 21), expected)
    assert all((t[[0, 2]] == 9.0).all() and (t[1, :, 37:] == 9.0).all() for t in (*cache.keys, *cache.values))


@pytest.mark.parametrize("form", ["lengths", "masked"])
@torch.inference_mode()
def test_slots_of_different_lengths_decode_as_if_alone(form: str) -> None:
    network, lengths = ours(upstream(TINY), TINY), [5, 33, 17]
    cache = cache_of(TINY, slots=3)
    for t in (*cache.keys, *cache.values):
        t.fill_(50.0)  # what lies behind a slot's rows must not be seen
    ids = [prompt(TINY, length + 1) for length in lengths]
    for slot, sequence in enumerate(ids):
        network.fill(network.embed(sequence[:-1]), cache, slot, 0)
    last, positions = torch.stack([sequence[-1] for sequence in ids]), torch.tensor(lengths)
    if form == "lengths":
        logits = network.decode(last, positions, [length + 1 for length in lengths], cache)
    else:
        logits = network.decode_masked(last, positions, 48, cache)
    for slot, sequence in enumerate(ids):
        assert close(logits[slot], prefilled(network, network.embed(sequence), cache_of(TINY), 0, 0)[0])


@torch.inference_mode()
def test_rows_are_copied_between_slots() -> None:
    network, ids = ours(upstream(TINY), TINY), prompt(TINY, 20)
    cache = cache_of(TINY, slots=2)
    network.fill(network.embed(ids), cache, 0, 0)
    cache.move(0, 1, 20)
    cache.write(0, (torch.full_like(rows, 7.0) for rows in cache.read(0, 20)))
    alone = cache_of(TINY)
    network.fill(network.embed(ids), alone, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(cache.read(1, 20), alone.read(0, 20), strict=True))
    assert all((rows == 7.0).all() for rows in cache.read(0, 20))
