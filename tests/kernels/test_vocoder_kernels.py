"""The anti-aliased activation on pieces of a signal: the middle of the whole, whatever the backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from covo_npu.kernels import native, reference
from covo_npu.kernels.interface import SNAKE_CONTEXT

BACKENDS = (reference, native)


def inputs(length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)
    up, down = (torch.randn(12, generator=generator).tolist() for _ in range(2))
    x = torch.randn(2, 3, length, generator=generator)
    x[..., 0] += 4  # edges that matter
    x[..., -1] -= 4
    alpha, inverse_beta = torch.rand(2, 3, generator=generator) + 0.5
    return {"x": x, "alpha": alpha, "inverse_beta": inverse_beta, "up": tuple(up), "down": tuple(down)}


def pieces(backend: Any, values: dict[str, Any], cuts: list[int], context: int = SNAKE_CONTEXT) -> Tensor:
    """Return the activation of a signal, computed between cuts with context on the inner sides."""
    x, ends, parts = values["x"], [*cuts, values["x"].shape[-1]], []
    for start, end in zip([0, *cuts], ends):
        first, last = start == 0, end == x.shape[-1]
        part = x[..., start if first else start - context : end if last else end + context]
        parts.append(backend.anti_aliased_snake(**{**values, "x": part}, starts=first, ends=last))
    return torch.cat(parts, -1)


@pytest.mark.parametrize("length", [1, 2, 5, 9, 10, 64])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_whole_signals_of_any_length(backend: Any, length: int) -> None:
    values = inputs(length)
    expected = reference.anti_aliased_snake(**{**values, "x": values["x"].double().float()})
    assert torch.allclose(
        backend.anti_aliased_snake(**values), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )


@pytest.mark.parametrize("cuts", [[32], [5, 59], [10, 11, 40], list(range(5, 60))], ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_pieces_are_the_whole(backend: Any, cuts: list[int]) -> None:
    values = inputs(64)
    whole = reference.anti_aliased_snake(**values)
    assert torch.allclose(pieces(backend, values, cuts), whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_faults_of_the_context_are_seen(backend: Any) -> None:
    """An edge in the middle of the signal, and a piece that is shifted by one, must not pass for the whole."""
    values = inputs(64)
    whole = reference.anti_aliased_snake(**values)
    allowed = {"rtol": 1e-5, "atol": 1e-5 * float(whole.abs().max())}
    x = values["x"]
    edge = backend.anti_aliased_snake(**{**values, "x": x[..., 20:40]})
    assert not torch.allclose(edge, whole[..., 20:40], **allowed)
    inner = backend.anti_aliased_snake(**{**values, "x": x[..., 15:45]}, starts=False, ends=False)
    assert torch.allclose(inner, whole[..., 20:40], **allowed)
    assert not torch.allclose(inner, whole[..., 21:41], **allowed)
