"""Attention in C, of one query and of many: each set by name, against the contract in float32 and its own mutants."""

from __future__ import annotations

from typing import Any

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


def test_caches_and_lengths_that_do_not_fit_are_refused() -> None:
    """The library would read or write beside the cache."""
    q, k, v = inputs(2, 4, 2, 32, [3, 4], torch.bfloat16)
    for lengths in ([0, 4], [3, 721], [-1, 1]):
        with pytest.raises(ValueError, match="lengths must be 1 to 720, found"):
            library.decode_attention(SETS[0], q, k, v, lengths, 0.2)
    for caches in ((k.mT.contiguous().mT, v), (k, v.mT.contiguous().mT)):
        with pytest.raises(ValueError, match="must be contiguous"):
            library.decode_attention(SETS[0], q, *caches, [3, 4], 0.2)


def test_heads_of_other_sizes_are_pytorchs() -> None:
    q, k, v = inputs(2, 4, 2, 24, [30, 9], torch.float32)
    backend = CPU(Choice.unmeasured())
    found = backend.decode_attention(q, k, v, [30, 9], 0.2)
    assert torch.equal(found, native.decode_attention(q, k, v, [30, 9], 0.2))


# Attention of many queries. B, S, K, H, D: one key, tiles and blocks that are not full, heads of the published sizes
MANY = (
    (1, 1, 1, 1, 32),
    (1, 40, 70, 3, 64),
    (2, 33, 129, 2, 32),
    (1, 5, 300, 1, 96),
    (2, 200, 257, 3, 64),
    (1, 64, 640, 2, 128),
)
ATTENDING = [best for best in SETS if library.library().covo_attends(library.known_sets().index(best))]
ATTENDING = ATTENDING or [pytest.param("none", marks=pytest.mark.skip("no set of this machine has it"))]


def many(B: int, S: int, K: int, H: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views as a projection of all three gives them; one query looks at few keys, one at all of them alike, and
    the last key's value is large, so that it is missed."""
    generator = torch.Generator().manual_seed(S * K)
    q, k, v = (torch.randn(B, max(S, K), 3, H, D, generator=generator).bfloat16().unbind(2)[i] for i in range(3))
    q[:, 0] *= 20
    q[:, S // 2] = 0
    v[:, K - 1] *= 30
    return q[:, :S], k[:, :K], v[:, :K]


@pytest.mark.parametrize("sizes", MANY, ids=str)
@pytest.mark.parametrize("best", ATTENDING)
def test_attention_of_many_queries_is_the_contract(best: str, sizes: tuple[int, int, int, int, int]) -> None:
    q, k, v = many(*sizes)
    scale = sizes[-1] ** -0.5
    expected = reference.attention(q.float(), k.float(), v.float(), scale).double()
    bound = 2 * error(reference.attention(q, k, v, scale), expected) + 2**-8 * float(expected.abs().max())

    def right(*arguments: Any) -> bool:
        found = library.attention(best, *arguments)
        assert found.shape == q.shape and found.dtype == q.dtype and found.is_contiguous()
        return error(found, expected) <= bound

    assert right(q, k, v, scale)
    assert right(*(x.contiguous() for x in (q, k, v)), scale)
    assert right(*(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)), scale)  # rows are copied first
    if sizes[2] > 1:
        assert not right(q, k[:, :-1], v[:, :-1], scale)
        assert not right(q, k.roll(1, 1), v, scale)
        assert not right(q, k, v, 1.2 * scale)
    if sizes[3] > 1:
        assert not right(q, k, v.flip(2), scale)


@pytest.mark.parametrize("best", ATTENDING)
def test_a_query_depends_on_no_other_and_not_on_threads(best: str) -> None:
    q, k, v = many(2, 200, 257, 3, 64)
    whole = library.attention(best, q, k, v, 0.125)
    for start, end in ((0, 1), (31, 33), (100, 200)):
        assert torch.equal(library.attention(best, q[:, start:end], k, v, 0.125), whole[:, start:end])
    for count in (1, 3):
        torch.set_num_threads(count)
        assert torch.equal(library.attention(best, q, k, v, 0.125), whole)
    q[1, 7, 2] = float("inf")
    broken = library.attention(best, q, k, v, 0.125)
    assert broken[1, 7, 2].isnan().all() and int(broken.isnan().sum()) == 64
    broken[1, 7, 2] = whole[1, 7, 2]
    assert torch.equal(broken, whole)


@pytest.mark.parametrize("best", ATTENDING)
def test_what_is_no_number_is_seen_in_attention_of_many_queries(best: str) -> None:
    q, k, v = many(1, 40, 300, 2, 64)
    for tensor, key, heard in ((k, 299, slice(None)), (v, 0, slice(9, 10))):
        spoilt = tensor.clone()
        spoilt[0, key, 1, 9] = float("nan")
        found = library.attention(best, q, *((spoilt, v) if tensor is k else (k, spoilt)), 0.125)
        assert found[0, :, 1, heard].isnan().all() and found[0, :, 0].isfinite().all()
    low = k.clone()  # its score is minus infinity for each query: as if it was not there
    q[..., 0], low[0, 5, :, 0] = 1, float("-inf")
    rest = [torch.cat((x[:, :5], x[:, 6:]), dim=1) for x in (k, v)]
    expected = reference.attention(q.float(), rest[0].float(), rest[1].float(), 0.125)
    assert error(library.attention(best, q, low, v, 0.125), expected.double()) <= 2**-8 * float(expected.abs().max())


def test_what_is_not_for_c_is_pytorchs() -> None:
    backend = CPU(Choice.unmeasured())
    q, k, v = many(1, 40, 70, 3, 64)
    for changed in ([x.float() for x in (q, k, v)], [x[..., :24] for x in (q, k, v)], [q[:, :0], k, v]):
        assert torch.equal(backend.attention(*changed, 0.2), native.attention(*changed, 0.2))
    assert torch.equal(backend.attention(q, k, v, -0.2), native.attention(q, k, v, -0.2))
