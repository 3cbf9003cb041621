"""Attention of one query in C: every instruction set by name, against the contract in float32 and its own mutants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from covo_npu.kernels import native, reference
from covo_npu.kernels.cpu import CPU, library
from covo_npu.kernels.cpu.choice import Choice

SETS = library.usable_sets()
# B, H, G, D, lengths: one row, a chunk of 256 and one more, odd groups, the real shape
SHAPES = (
    (1, 28, 4, 128, [1]),
    (3, 28, 4, 128, [17, 700, 256]),
    (2, 9, 3, 64, [513, 3]),
    (1, 4, 4, 32, [257]),
    (2, 5, 1, 96, [33, 31]),
)


def inputs(B: int, H: int, G: int, D: int, lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and caches; the last valid value of each slot is large, so that it is missed."""
    generator = torch.Generator().manual_seed(B * H)
    q, k, v = (
        torch.randn(*shape, generator=generator) for shape in ((B, H, D), (B + 1, G, 720, D), (B + 1, G, 720, D))
    )
    q[:, 0] *= 20  # one head looks at few rows, one at all of them alike
    q[:, 1] = 0
    for slot, length in enumerate(lengths):
        v[slot, :, length - 1] *= 30
    return q.to(dtype), k.to(dtype), v.to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("best", SETS)
def test_attention_is_the_contract(best: str, shape: tuple[int, int, int, int, list[int]], dtype: torch.dtype) -> None:
    B, H, G, D, lengths = shape
    q, k, v = inputs(B, H, G, D, lengths, dtype)
    arguments = (lengths, D**-0.5)
    expected = reference.decode_attention(q.double().float(), k.float(), v.float(), *arguments).double()
    plain = error(reference.decode_attention(q, k, v, *arguments), expected)
    bound = 2 * plain + float(torch.finfo(dtype).eps * expected.abs().max())
    if dtype == torch.float32:
        bound = float(1e-5 * expected.std()) + 4 * bound
    found = library.decode_attention(best, q, k, v, *arguments)
    assert found.shape == q.shape and found.dtype == dtype
    assert error(found, expected) <= bound
    if lengths != [1]:
        assert error(library.decode_attention(best, q, k, v, lengths, 1.1 * D**-0.5), expected) > bound
        shorter = [max(length - 1, 1) for length in lengths]
        assert error(library.decode_attention(best, q, k, v, shorter, D**-0.5), expected) > bound
    if G > 1:
        k, v = (c.flip(1).contiguous() for c in (k, v))  # the rows of another kv head
        assert error(library.decode_attention(best, q, k, v, *arguments), expected) > bound


@pytest.mark.parametrize("best", SETS)
def test_rows_past_a_length_are_not_read_and_slots_do_not_mix(best: str) -> None:
    lengths = [300, 1, 256]
    q, k, v = inputs(3, 28, 4, 128, lengths, torch.bfloat16)
    found = library.decode_attention(best, q, k, v, lengths, 0.1)
    for slot, length in enumerate(lengths):
        k[slot, :, length:] = float("nan")
        v[slot, :, length:] = float("inf")
    assert torch.equal(library.decode_attention(best, q, k, v, lengths, 0.1), found)
    for slot in range(3):
        one = [c[slot : slot + 1].contiguous() for c in (q, k, v)]
        assert torch.equal(library.decode_attention(best, *one, lengths[slot : slot + 1], 0.1)[0], found[slot])
    v[1, 2, 0, 5] = float("nan")
    broken = library.decode_attention(best, q, k, v, lengths, 0.1)
    assert broken[1, 14:21, 5].isnan().all() and int(broken.isnan().sum()) == 7
    k[0, 0, 299, 3] = float("nan")
    assert library.decode_attention(best, q, k, v, lengths, 0.1)[0, :7].isnan().all()


@pytest.mark.parametrize("best", SETS)
def test_bits_do_not_depend_on_threads(best: str) -> None:
    q, k, v = inputs(2, 28, 4, 128, [700, 400], torch.bfloat16)
    found = library.decode_attention(best, q, k, v, [700, 400], 0.1)
    for count in (1, 3):
        torch.set_num_threads(count)
        assert torch.equal(library.decode_attention(best, q, k, v, [700, 400], 0.1), found)


def test_heads_of_other_sizes_are_pytorchs() -> None:
    q, k, v = inputs(2, 4, 2, 24, [30, 9], torch.float32)
    backend = CPU(Choice.unmeasured())
    found = backend.decode_attention(q, k, v, [30, 9], 0.2)
    assert torch.equal(found, native.decode_attention(q, k, v, [30, 9], 0.2))
