"""The measurement that captured steps depend on: it holds for a right kernel, and sees each way to be wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from covo_npu.kernels import native, select
from covo_npu.kernels.masked import TOLERANCES, masked_attention_error, masked_keys_error

HEADS, KV_HEADS, HEAD_DIM, MAX_LENGTH = 14, 2, 128, 4096  # half of the model's heads and rows
BOUNDS = (512, 1024, 4096)


def error(bound: int, dtype: torch.dtype, slots: int = 1, masked: Any = native.masked_decode_attention) -> float:
    functions = {name: getattr(native, name) for name in select.FUNCTIONS} | {"masked_decode_attention": masked}
    q = torch.empty(slots, HEADS, HEAD_DIM, dtype=dtype)
    cache = torch.empty(slots, KV_HEADS, MAX_LENGTH, HEAD_DIM, dtype=dtype)
    return masked_attention_error(SimpleNamespace(**functions), q, cache, bound)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("bound", BOUNDS)
def test_a_right_kernel_holds(bound: int, dtype: torch.dtype) -> None:
    assert error(bound, dtype) <= TOLERANCES[dtype] / 2


def test_each_slot_has_a_length_of_its_own() -> None:
    assert error(1024, torch.bfloat16, slots=4) <= TOLERANCES[torch.bfloat16]


def dropping(first: int, rows: int) -> Any:
    """Return a kernel that never reads some rows, though they are attended."""

    def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bound: int, scale: float) -> Tensor:
        mask = mask.clone()
        mask[:, first : first + rows] = False
        return native.masked_decode_attention(q, k, v, mask, bound, scale)

    return masked


def ignoring(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bound: int, scale: float) -> Tensor:
    return native.masked_decode_attention(q, k, v, torch.ones_like(mask), bound, scale)


def inverted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bound: int, scale: float) -> Tensor:
    return native.masked_decode_attention(q, k, v, ~mask, bound, scale)


def one_too_many(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bound: int, scale: float) -> Tensor:
    return native.masked_decode_attention(q, k, v, mask | mask.roll(1, 1), bound, scale)


MUTANTS = {
    "the mask is ignored": ignoring,
    "the mask is inverted": inverted,
    "a row too many": one_too_many,
    "the last row is left out": dropping(4094, 1),
    "rows past the first tile of 512 are left out": dropping(512, 4096),
    "one tile in the middle is left out": dropping(1024, 512),
    "a part of a tile is left out": dropping(2048, 64),
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_kernel_is_seen(mutant: str, dtype: torch.dtype) -> None:
    assert error(4096, dtype, masked=MUTANTS[mutant]) > 3 * TOLERANCES[dtype]


# --- of all queries at once, as flow matching has it


def keys_error(frames: int, dtype: torch.dtype, masked: Any = native.masked_attention) -> float:
    functions = {name: getattr(native, name) for name in select.FUNCTIONS} | {"masked_attention": masked}
    q = torch.empty(2, frames, 4, 64, dtype=dtype)
    return masked_keys_error(SimpleNamespace(**functions), q)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("frames", [128, 1280])
def test_a_right_kernel_holds_for_all_queries(frames: int, dtype: torch.dtype) -> None:
    assert keys_error(frames, dtype) <= TOLERANCES[dtype] / 2


def changed(change: Any) -> Any:
    """Return a kernel that sees another mask [1, K]."""
    return lambda q, k, v, mask, scale: native.masked_attention(q, k, v, change(mask), scale)


def without(first: int, rows: int) -> Any:
    places = torch.arange(1280)
    return changed(lambda mask: mask & ((places < first) | (places >= first + rows)))


def for_the_last_query_alone(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    out = native.attention(q, k, v, scale).clone()
    out[:, -1:] = native.masked_attention(q[:, -1:], k, v, mask, scale)
    return out


KEY_MUTANTS = {
    "the mask is ignored": changed(torch.ones_like),
    "the mask is inverted": changed(torch.logical_not),
    "a key too many": changed(lambda mask: mask | mask.roll(1, 1)),
    "the last key is left out": without(1278, 1),
    "keys past the first tile of 512 are left out": without(512, 1280),
    "a part of a tile is left out": without(1024, 64),
    "for the last query alone": for_the_last_query_alone,
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("mutant", KEY_MUTANTS)
def test_a_wrong_kernel_is_seen_for_all_queries(mutant: str, dtype: torch.dtype) -> None:
    assert keys_error(1280, dtype, KEY_MUTANTS[mutant]) > 3 * TOLERANCES[dtype]
