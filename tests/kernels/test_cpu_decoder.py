"""All layers of a decode step in one call: to the bit what the functions give one after the other, caches included."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from random_networks import random_qwen2

from covo_npu.kernels import native
from covo_npu.kernels.cpu import CPU, library
from covo_npu.kernels.cpu.choice import OURS, PYTORCH, Choice
from covo_npu.runtime.checkpoint.config import LLMConfig
from covo_npu.runtime.checkpoint.format import INT8
from covo_npu.runtime.networks.cache import KVCache, allocate
from covo_npu.runtime.networks.qwen2 import Qwen2

SIZES = LLMConfig(3, 100, 6, 2, 32, 75, 211, 1e-6, 1e6, 4096)
ROWS = 300
FORMS = (*product((torch.bfloat16, torch.float16), ("", "int8")), (torch.float32, "int8+head"))
LENGTHS = ([1], [260], [ROWS, 3, 257, 40, 1])


def filled(config: LLMConfig, dtype: torch.dtype, slots: int) -> KVCache:
    cache = allocate(config, slots, ROWS, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    for rows in (*cache.keys, *cache.values):
        rows.copy_(torch.randn(rows.shape, generator=generator))
    return cache


def decoded(llm: Qwen2, dtype: torch.dtype, lengths: list[int], at_once: bool) -> list[torch.Tensor]:
    """Return the logits of a step and all rows of the cache after it."""
    cache = filled(llm.sizes, dtype, len(lengths))
    layers = llm.in_one_call(cache) if at_once else None
    assert at_once == (layers is not None)
    ids, positions = torch.arange(len(lengths)) + 7, torch.tensor(lengths) - 1
    with torch.inference_mode():
        return [llm.decode(ids, positions, lengths, cache, layers), *cache.keys, *cache.values]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
@pytest.mark.parametrize(("dtype", "weights"), FORMS, ids=str)
@pytest.mark.parametrize("best", library.usable_sets())
def test_one_call_gives_the_bits_of_many(best: str, dtype: torch.dtype, weights: str, lengths: list[int]) -> None:
    llm = random_qwen2(SIZES, CPU(Choice(best)), dtype, INT8[weights] if weights else ())
    expected = decoded(llm, dtype, lengths, at_once=False)
    assert expected[0].isfinite().all() and expected[0].std() > 0.1
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert same(decoded(llm, dtype, lengths, at_once=True), expected)


@pytest.mark.parametrize("name", ["input_layernorm", "qkv_proj", "o_proj", "post_attention_layernorm", "gate_up_proj"])
def test_every_part_of_every_layer_matters(name: str) -> None:
    """The same numbers moved by one, in the last layer alone, give others: nothing is left out or taken twice."""
    llm = random_qwen2(SIZES, CPU(Choice(library.usable_sets()[0])), torch.bfloat16)
    expected = decoded(llm, torch.bfloat16, [20], at_once=True)
    part = getattr(llm.layers[-1], name)
    part.weight.data = part.weight.roll(1, -1)
    assert not torch.equal(decoded(llm, torch.bfloat16, [20], at_once=True)[0], expected[0])


def test_one_layer_and_a_head_of_its_own() -> None:
    config = replace(SIZES, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=128)
    llm = random_qwen2(config, CPU(Choice(library.usable_sets()[0])), torch.bfloat16)
    expected = decoded(llm, torch.bfloat16, [9, 2], at_once=False)
    assert same(decoded(llm, torch.bfloat16, [9, 2], at_once=True), expected)


def test_caches_and_lengths_that_do_not_fit_are_refused() -> None:
    llm = random_qwen2(SIZES, CPU(Choice(library.usable_sets()[0])), torch.bfloat16)
    cache = filled(SIZES, torch.bfloat16, 1)
    layers, x, angles = llm.in_one_call(cache), torch.zeros(1, 100).bfloat16(), torch.ones(1, 32).bfloat16()
    for length in (0, ROWS + 1):
        with pytest.raises(ValueError, match=f"lengths must be 1 to {ROWS}, found"):
            layers(x, angles, angles, [length])
    strided = replace(cache, values=tuple(rows.mT.contiguous().mT for rows in cache.values))
    with pytest.raises(ValueError, match="must be contiguous"):
        llm.in_one_call(strided)


def test_where_c_does_not_multiply_layers_follow_each_other() -> None:
    best = library.usable_sets()[0]
    for kernels in (CPU(Choice(best, fixed=PYTORCH)), CPU(Choice(best, {(100, 75, torch.bfloat16, 1): PYTORCH}))):
        llm, cache = random_qwen2(SIZES, kernels, torch.bfloat16), filled(SIZES, torch.bfloat16, 1)
        layers = llm.in_one_call(cache)
        assert layers and layers(llm.embed(torch.tensor([3])), *cache.rotary[:, :1], [1]) is None
        assert same(decoded(llm, torch.bfloat16, [5], at_once=True), decoded(llm, torch.bfloat16, [5], at_once=False))


def test_what_has_no_such_call_says_so() -> None:
    float32, odd_heads = random_qwen2(SIZES, CPU(), torch.float32), replace(SIZES, head_dim=48)
    assert float32.in_one_call(filled(SIZES, torch.float32, 1)) is None
    other = random_qwen2(odd_heads, CPU(Choice.unmeasured(OURS)), torch.bfloat16)
    assert other.in_one_call(filled(odd_heads, torch.bfloat16, 1)) is None
    ranks = random_qwen2(SIZES, CPU(), torch.bfloat16)
    assert ranks.in_one_call(filled(SIZES, torch.bfloat16, 1))
    ranks.group = SimpleNamespace(size=2)
    assert ranks.in_one_call(filled(SIZES, torch.bfloat16, 1)) is None
    plain = random_qwen2(SIZES, native, torch.bfloat16)
    assert plain.in_one_call(filled(SIZES, torch.bfloat16, 1)) is None


def test_one_call_is_one_of_many_ways_to_compute_qwen2() -> None:
    """Beside the functions that it shares with the other way: PyTorch's, in float32, on the same numbers."""
    half = random_qwen2(SIZES, CPU(Choice(library.usable_sets()[0])), torch.bfloat16)
    wide = random_qwen2(SIZES, native, torch.float32)
    wide.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()}, assign=True)
    plain = random_qwen2(SIZES, native, torch.bfloat16)
    plain.load_state_dict(half.state_dict(), assign=True)

    def logits(llm: Qwen2, at_once: bool) -> torch.Tensor:
        dtype = llm.norm.weight.dtype
        cache = filled(SIZES, torch.bfloat16, 5)
        cache = KVCache(*(tuple(t.to(dtype) for t in rows) for rows in (cache.keys, cache.values)),
                        cache.rotary.to(dtype), cache.first_rows)  # fmt: skip
        layers = llm.in_one_call(cache) if at_once else None
        ids, lengths = torch.arange(5) + 7, LENGTHS[2]
        with torch.inference_mode():
            return llm.decode(ids, torch.tensor(lengths) - 1, lengths, cache, layers)

    exact = logits(wide, at_once=False)
    error, plain_error = ((logits(llm, once) - exact).norm() for llm, once in ((half, True), (plain, False)))
    assert error <= 2 * plain_error < 0.1 * exact.norm()
