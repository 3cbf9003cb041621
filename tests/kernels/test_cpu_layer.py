"""Norms, rotary positions and gates in C: every instruction set that this machine executes, against float64.

Each comparison also has to refuse results that are wrong in one place.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels.kernel_cases import normal, rms, rotate, rows
from torch import Tensor

from covo_npu.kernels import reference
from covo_npu.kernels.cpu import CPU, library
from covo_npu.kernels.cpu.choice import Choice

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_set = pytest.mark.parametrize("best", library.usable_sets())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def backend(best: str) -> CPU:
    return CPU(Choice(best))


def unaligned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype, contiguous, where no vector starts."""
    memory = torch.empty(x.numel() + 1, dtype=dtype)
    return memory[1:].copy_(x.flatten()).view(x.shape)


def judge(
    found: Tensor, plain: Tensor, exact: Tensor, mistake: Callable[[Tensor], Tensor], terms: Tensor | None = None
) -> None:
    """Hold an error to twice that of plain float32 arithmetic in its row, plus a rounding; a mistake must be beyond.

    terms: sizes of what is added up to a result: of few numbers the plain error may vanish by luck.
    """
    type_, float_ = torch.finfo(found.dtype), torch.finfo(torch.float32)
    allowed = 2 * (plain.double() - exact).abs().amax(-1, keepdim=True) + type_.eps * exact.abs()
    allowed += float_.eps * (exact.abs() if terms is None else terms) + type_.smallest_normal * type_.eps
    assert found.dtype == plain.dtype and found.shape == exact.shape
    assert ((found.double() - exact).abs() <= allowed).all()
    assert not ((mistake(found.double()) - exact).abs() <= allowed).all()


def shifted(x: Tensor) -> Tensor:
    return x.roll(1, -1)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 15), (5, 17), (3, 96), (12, 3584)], ids=str)
@each_dtype
@each_set
def test_norms(best: str, dtype: torch.dtype, count: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x, residual = rows(generator, count, size), normal(generator, count, size)
    inputs = [unaligned(value, dtype) for value in (x, residual, normal(generator, size))]
    before = [value.clone() for value in inputs]
    normed, summed = backend(best).add_rms_norm(*inputs, 1e-6)
    assert torch.equal(summed, inputs[0] + inputs[1])  # one sum, rounded once
    plain, _ = reference.add_rms_norm(*inputs, 1e-6)
    # What is between is rounded, too: the exact result is that of the sum as it is.
    exact = rms(summed.double(), inputs[2].double(), 1e-6)
    judge(normed, plain, exact, lambda found: shifted(found) if size > 1 else 1.02 * found)
    assert torch.equal(backend(best).rms_norm(summed, inputs[2], 1e-6), normed)
    assert all(torch.equal(value, old) for value, old in zip(inputs, before))


@pytest.mark.parametrize("size", [2, 6, 64, 128], ids=str)
@each_dtype
@each_set
def test_rotary_of_a_view(best: str, dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = unaligned(rows(generator, 2, 7, 8, size), dtype)[:, :, 1:6]
    half = torch.rand(2, 7, 1, size // 2, generator=generator, dtype=torch.float64) * 6
    cos, sin = (torch.cat((angle, angle), -1).to(dtype) for angle in (half.cos(), half.sin()))
    for angles in ((cos, sin), (cos[:1], sin[:1]), (cos.flip(1)[:, :7], sin.flip(1)[:, :7])):
        found = backend(best).rotary(x, *angles)
        exact = rotate(x.double(), *(angle.double() for angle in angles))
        terms = x.double().abs() + x.double().abs().roll(size // 2, -1)
        assert found.is_contiguous()
        judge(found, reference.rotary(x, *angles), exact, lambda y: y.roll(1, 2), terms)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 31), (5, 17), (3, 18944)], ids=str)
@each_dtype
@each_set
def test_gates(best: str, dtype: torch.dtype, count: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    gate_up = unaligned(rows(generator, count, 2 * size), dtype)
    gate_up[..., 0] = -20 if size > 1 else 2
    wide = gate_up.double()
    exact = wide[:, :size] / (1 + torch.exp(-wide[:, :size])) * wide[:, size:]
    found = backend(best).swiglu(gate_up)
    judge(found, reference.swiglu(gate_up), exact, lambda y: shifted(y) if size > 1 else 1.02 * y)


@each_dtype
@each_set
def test_gates_of_any_size(best: str, dtype: torch.dtype) -> None:
    """Far out a gate is its input, or nothing; a NaN and infinity do not vanish."""
    gates = torch.tensor([-torch.inf, -1e4, -100.0, -88.0, -0.0, 0.0, 88.0, 1e4, torch.inf, torch.nan]).to(dtype)
    found = backend(best).swiglu(torch.cat((gates, torch.ones_like(gates)))[None])[0].float()
    assert (found[1:6].abs() < 1e-33).all() and torch.equal(found[6:9], gates[6:9].float())
    assert not found[[0, 8, 9]].isfinite().any()
    least = torch.tensor([[torch.finfo(dtype).min, 1.0]]).to(dtype)
    assert backend(best).swiglu(least).float().abs() < 1e-33


@each_dtype
@each_set
def test_what_is_no_number_stays_in_its_row(best: str, dtype: torch.dtype) -> None:
    x, weight = torch.ones(3, 40, dtype=dtype), torch.ones(40, dtype=dtype)
    x[1, 7] = torch.nan
    normed = backend(best).rms_norm(x, weight, 0.0)
    assert normed[1].isnan().all() and torch.equal(normed[[0, 2]], torch.ones(2, 40, dtype=dtype))
    assert torch.equal(backend(best).rms_norm(0 * weight[None], weight, 1e-6), 0 * weight[None])


@each_dtype
@each_set
def test_bits_depend_neither_on_threads_nor_on_other_rows(best: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (rows(generator, 40, 2000).to(dtype) for _ in range(2))
    weight, angles = normal(generator, 2000).to(dtype), normal(generator, 1, 40, 1, 100).to(dtype)

    def computed(part: slice) -> list[Tensor]:
        heads = x[part].view(1, -1, 20, 100)
        rotated = backend(best).rotary(heads, angles[:, part], angles[:, part].flip(-1))[0]
        return [
            *backend(best).add_rms_norm(x[part], residual[part], weight, 1e-6), rotated, backend(best).swiglu(x[part])
        ]  # fmt: skip

    whole = computed(slice(0, 40))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for part in (slice(0, 40), slice(0, 1), slice(5, 9), slice(39, 40)):
            assert all(torch.equal(one, all_[part]) for one, all_ in zip(computed(part), whole))


@each_set
def test_nothing_of_nothing(best: str) -> None:
    empty = torch.empty(0, 8)
    assert backend(best).swiglu(empty).shape == (0, 4)
    assert backend(best).rms_norm(empty, torch.ones(8), 1e-6).shape == (0, 8)
    assert backend(best).rotary(torch.empty(1, 0, 2, 8), torch.empty(1, 0, 1, 8), torch.empty(1, 0, 1, 8)).numel() == 0


@each_set
def test_every_number_of_float16_is_rounded_as_pytorch_does(best: str) -> None:
    """All of them as they are, and sums of pairs of them."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.float16)
    ones = torch.ones_like(values)
    _, summed = backend(best).add_rms_norm(values[None], 0 * ones[None], ones, 1e-6)
    assert torch.equal(summed[0].nan_to_num(7.0), values.nan_to_num(7.0))
    assert torch.equal(summed[0].isnan(), values.isnan())
    other = patterns.flip(0).roll(12345).view(torch.float16)
    _, summed = backend(best).add_rms_norm(values[None], other[None], ones, 1e-6)
    expected = (values.float() + other.float()).half()
    assert torch.equal(summed[0].nan_to_num(7.0), expected.nan_to_num(7.0))
