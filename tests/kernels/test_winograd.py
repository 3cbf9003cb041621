"""Convolutions by Winograd's way: the identity that they rest on, and their sums, for every instruction set."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from covo_npu.kernels import native
from covo_npu.kernels.cpu import CPU, library, winograd
from covo_npu.kernels.cpu.choice import Choice

POINTS = (0, 1, -1, Fraction(1, 2), Fraction(-1, 2), 2)  # and infinity
each_set = pytest.mark.parametrize("best", library.usable_sets())


def matrices(best: str) -> tuple[Tensor, Tensor]:
    """Return what C does to a tile [7, 7] and to its products [4, 7], read off from one sample and one product each."""
    units = torch.eye(7)[:, None]  # 7 signals of one channel
    signal = library.winograd_signal(best, units, 1, 1)[:, :, 0, 0].T
    results = library.winograd_results(best, torch.eye(7)[:, :, None, None], None, 4, 1)[:, 0].T
    return signal.double(), results.double()


def error_bound(best: str, x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """Return how far results in float32 may be from exact sums.

    Each step rounds every term that it adds, and those of a convolution of magnitudes are what is rounded: seven of a
    tile, four and the constants of the weights, channels times fours of a product, seven and the bias of a result.
    """
    (of_signal, of_results), taps = (m.abs() for m in matrices(best)), weight.shape[-1]
    length, fours = x.shape[-1] - dilation * (taps - 1), -(-taps // 4)
    values = torch.tensor(winograd.VALUES, dtype=torch.float64).abs()
    weights = torch.einsum("pt,oict->poic", values, F.pad(weight.abs(), (0, 4 * fours - taps)).unflatten(-1, (-1, 4)))
    padded = F.pad(x.abs(), (0, dilation * (4 * fours + 8)))
    at = torch.arange(length)
    number = at // dilation % 4  # of a result in its tile
    samples = (at - number * dilation)[:, None] + dilation * torch.arange(4 * fours + 3)
    tiles = torch.einsum("ps,bincs->bpinc", of_signal, padded[..., samples].unfold(-1, 7, 4))
    sizes = torch.einsum("np,bopn->bon", of_results[number], torch.einsum("poic,bpinc->bopn", weights, tiles))
    steps = 7 + 5 + weight.shape[1] * fours + 9
    return 1.01 * steps * 2.0**-24 * (sizes + bias.abs()[:, None])


def inputs(taps: int, length: int, dilation: int, channels: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, weight and bias, float32; one channel is huge and one tiny, and all start at an odd address."""
    generator = torch.Generator().manual_seed(taps * length + dilation)
    samples = length + dilation * (taps - 1)
    x = torch.randn(2 * channels * samples + 1, generator=generator)[1:].view(2, channels, samples)
    x[:, 0] *= 1e4
    x[:, 1] *= 1e-20
    weight = torch.randn(channels + 8, channels, taps, generator=generator)
    weight[2] *= 1e3
    return x, weight, torch.randn(channels + 8, generator=generator)


def test_weights_are_values_of_their_polynomial() -> None:
    *finite, infinite = winograd.VALUES
    for point, row in zip(POINTS, finite, strict=True):
        assert row == pytest.approx([float(row[0] * point**power) for power in range(4)], rel=1e-15)
    assert infinite == (0, 0, 0, 1)


@each_set
def test_the_identity(best: str) -> None:
    """Result i is the sum of taps t and samples i + t, and of nothing else."""
    of_signal, of_results = matrices(best)
    sums = torch.einsum("ip,pt,ps->its", of_results, torch.tensor(winograd.VALUES, dtype=torch.float64), of_signal)
    expected = torch.zeros(4, 4, 7, dtype=torch.float64)
    for i in range(4):
        for tap in range(4):
            expected[i, tap, i + tap] = 1
    assert (sums - expected).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("taps", "length", "dilation"),
    [(3, 1, 1), (3, 130, 1), (4, 5, 2), (5, 33, 16), (7, 129, 3), (7, 1041, 1), (8, 3, 4), (11, 128, 5), (11, 1500, 5)],
)
@each_set
def test_sums(best: str, taps: int, length: int, dilation: int) -> None:
    x, weight, bias = inputs(taps, length, dilation)
    transformed = winograd.transformed_weight(weight, 1, 1)
    assert transformed is not None
    found = winograd.conv1d(best, x, transformed, bias, length, dilation).double()
    wide = x.double(), weight.double(), bias.double()
    expected = F.conv1d(*wide, dilation=dilation)
    allowed = error_bound(best, *wide, dilation)
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= allowed).all()
    without = winograd.conv1d(best, x, transformed, None, length, dilation).double()
    assert ((without - expected + wide[2][:, None]).abs() <= allowed).all()
    less = wide[1].clone()
    less[..., -1] = 0
    mutants = (wide[1].flip(2), wide[2]), (less, wide[2]), (wide[1], wide[2] * 0)
    for mutant_weight, mutant_bias in mutants:
        mutant = F.conv1d(wide[0], mutant_weight, mutant_bias, dilation=dilation)
        assert ((found - mutant).abs() > allowed).any()


def test_large_weights_are_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = inputs(11, 300, 3)
    monkeypatch.setattr(winograd, "MOST_BYTES", 5 * 7 * 16 * 3 * 4)  # of 5 channels, of which 24 is no multiple
    transformed = winograd.transformed_weight(weight, 1, 1)
    assert transformed is not None and transformed.shape == (6, 7 * 4, 16, 3)
    best = library.usable_sets()[0]
    found = winograd.conv1d(best, x, transformed, bias, 300, 3).double()
    wide = x.double(), weight.double(), bias.double()
    assert ((found - F.conv1d(*wide, dilation=3)).abs() <= error_bound(best, *wide, 3)).all()


def test_where_it_gains() -> None:
    """Float32 with enough to multiply: everything else is PyTorch's to the last bit."""
    cpu, (x, weight, bias) = CPU(Choice.unmeasured()), inputs(11, 3000, 5, channels=24)
    padding = 7
    transformed = cpu.transformed_weight(weight, 1, 1)
    assert transformed is not None

    def as_without(x: Tensor, dilation: int = 5) -> bool:
        found = cpu.conv1d(x, weight, bias, 1, 0, dilation, 1, transformed)
        return torch.equal(found, native.conv1d(x, weight, bias, 1, 0, dilation))

    expected = F.conv1d(x.double(), weight.double(), bias.double(), 1, padding, 5)
    plain = native.conv1d(x, weight, bias, 1, padding, 5)
    found = cpu.conv1d(x, weight, bias, 1, padding, 5, 1, transformed)
    assert not torch.equal(found, plain)  # so it was computed otherwise, and as well:
    assert (found - expected).norm() <= 16 * (plain - expected).norm()
    assert torch.equal(cpu.conv1d(x, weight, bias, 1, padding, 5), plain)
    assert not as_without(x)
    assert as_without(x[..., :177]) and as_without(x[..., :300])
    assert as_without(x, dilation=17)
    assert as_without(x.bfloat16())
    assert cpu.transformed_weight(weight, 2, 1) is None and cpu.transformed_weight(weight, 1, 2) is None
    assert cpu.transformed_weight(weight.bfloat16(), 1, 1) is None
    assert cpu.transformed_weight(weight[:15], 1, 1) is None and cpu.transformed_weight(weight[..., :2], 1, 1) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_bias_of_another_dtype(dtype: torch.dtype) -> None:
    x, weight, bias = inputs(7, 300, 1)
    transformed = winograd.transformed_weight(weight, 1, 1)
    assert transformed is not None
    best, other = library.usable_sets()[0], bias.to(dtype)
    found, expected = (winograd.conv1d(best, x, transformed, each, 300, 1) for each in (other, other.float()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("taps", [3, 7, 11])
def test_bits_do_not_depend_on_threads(taps: int) -> None:
    x, weight, bias = inputs(taps, 1500, 1, channels=64)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        transformed = winograd.transformed_weight(weight, 1, 1)
        assert transformed is not None
        results.append((transformed, winograd.conv1d(library.usable_sets()[0], x, transformed, bias, 1500, 1)))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
