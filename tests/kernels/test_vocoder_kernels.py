"""The anti-aliased activation on pieces of a signal: the middle of the whole, whatever the backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from covo_npu.kernels import native, reference
from covo_npu.kernels.cpu import CPU, library
from covo_npu.kernels.cpu.choice import Choice
from covo_npu.kernels.interface import SNAKE_CONTEXT

# In C each instruction set that this machine executes, in pieces of 256 samples.
BACKENDS = {"reference": reference, "native": native} | {best: CPU(Choice(best)) for best in library.usable_sets()}
each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


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


@pytest.mark.parametrize("length", [1, 2, 5, 9, 10, 64, 256, 258, 600])
@each_backend
def test_whole_signals_of_any_length(backend: Any, length: int) -> None:
    values = inputs(length)
    expected = reference.anti_aliased_snake(**{**values, "x": values["x"].double().float()})
    assert torch.allclose(
        backend.anti_aliased_snake(**values), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )


@pytest.mark.parametrize("cuts", [[32], [5, 59], [10, 11, 40], list(range(5, 60))], ids=str)
@each_backend
def test_pieces_are_the_whole(backend: Any, cuts: list[int]) -> None:
    values = inputs(64)
    whole = reference.anti_aliased_snake(**values)
    assert torch.allclose(pieces(backend, values, cuts), whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


@each_backend
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


@pytest.mark.parametrize("best", library.usable_sets())
def test_pieces_in_c_follow_the_definition_in_float64(best: str) -> None:
    """Beside all lengths and edges: twice the error of PyTorch's float32, and what is forgotten is seen."""
    values = inputs(1000)
    y = reference.anti_aliased_snake(
        **{name: value.double() if isinstance(value, Tensor) else value for name, value in values.items()}
    )
    assert y.dtype == torch.float64
    bound = 2 * float((reference.anti_aliased_snake(**values).double() - y).abs().max())

    def right(**changed: Any) -> bool:
        found = CPU(Choice(best)).anti_aliased_snake(**{**values, **changed})
        return float((found.double() - y).abs().max()) <= bound

    assert right()
    assert not right(up=(*values["up"][:-1], 0.0)) and not right(down=(0.0, *values["down"][1:]))
    assert not right(alpha=values["alpha"].flip(0)) and not right(inverse_beta=values["inverse_beta"].flip(0))


@pytest.mark.parametrize("best", library.usable_sets())
def test_large_arguments_and_what_is_no_number(best: str) -> None:
    """Of sin(x) with x in the millions a float32 knows the value, if not of which neighbour: as PyTorch's, then."""
    values, backend = inputs(700), CPU(Choice(best))
    nearest = (*[0.0] * 5, 0.5, 0.5, *[0.0] * 5)  # phases without a rounding, which the sine would make large
    for factor in (1e3, 1e6):
        scaled = {**values, "alpha": values["alpha"] * factor, "up": nearest}
        expected = reference.anti_aliased_snake(**scaled)
        found = backend.anti_aliased_snake(**scaled)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    for value in (float("nan"), float("inf")):
        x = values["x"].clone()
        x[1, 2, 300] = value
        found = backend.anti_aliased_snake(**{**values, "x": x})
        expected = reference.anti_aliased_snake(**{**values, "x": x})
        assert torch.equal(found.isfinite(), expected.isfinite())
        assert not found[1, 2, 300].isfinite() and found[0].isfinite().all()


@pytest.mark.parametrize("best", library.usable_sets())
def test_bits_in_c_depend_neither_on_threads_nor_on_cuts(best: str) -> None:
    values, backend = inputs(700), CPU(Choice(best))
    whole = backend.anti_aliased_snake(**values)
    for count in (1, 3):
        torch.set_num_threads(count)
        assert torch.equal(backend.anti_aliased_snake(**values), whole)
    assert torch.equal(pieces(backend, values, [300]), whole)


def test_other_dtypes_are_pytorchs() -> None:
    values = inputs(64)
    half = {**values, "x": values["x"].bfloat16()}
    assert torch.equal(CPU(Choice.unmeasured()).anti_aliased_snake(**half), native.anti_aliased_snake(**half))
