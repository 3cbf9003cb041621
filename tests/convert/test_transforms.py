"""Each transform against its inverse, or against an independent computation."""

import numpy as np
import pytest
import torch

from covo_npu.convert import transforms


def awkward(*shape: int) -> torch.Tensor:
    """Values of many sizes, one row tiny, one huge."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    values[0] *= 1e-4
    values[-1] *= 1e3
    return values


@pytest.mark.parametrize("shape", [(5, 3, 7), (4, 9), (1, 2, 7)])
def test_folded_weight_norm_is_what_torch_computes_in_every_forward(shape: tuple[int, ...]):
    v, g = awkward(*shape), awkward(shape[0], *(1 for _ in shape[1:])).abs() + 0.1
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2), dim=0).parametrizations.weight[0]
    torch.testing.assert_close(transforms.fold_weight_norm(g, v), layer(g, v), rtol=1e-6, atol=0)


def test_folded_weight_norm_gives_g_back():
    v, g = awkward(6, 5, 3), awkward(6, 1, 1).abs() + 0.1
    folded = transforms.fold_weight_norm(g, v)
    torch.testing.assert_close(folded.norm(dim=(1, 2), keepdim=True), g, rtol=1e-6, atol=0)
    cosine = torch.nn.functional.cosine_similarity(folded.flatten(1), v.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(6))


def test_folding_does_not_depend_on_the_number_of_threads():
    v, g, results = awkward(64, 300, 11), awkward(64, 1, 1), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(transforms.fold_weight_norm(g, v))
    assert torch.equal(*results)


def test_exp_is_the_correctly_rounded_one_and_log_undoes_it():
    x = torch.linspace(-20, 20, 4001)
    assert np.array_equal(transforms.exp(x).numpy(), np.exp(x.numpy().astype(np.float64)).astype(np.float32))
    torch.testing.assert_close(transforms.exp(x).log(), x, rtol=1e-6, atol=1e-6)


def test_inverse_beta_is_the_factor_of_snake_and_log_undoes_it():
    x = torch.linspace(-5, 5, 1001)
    y = transforms.inverse_beta(x)
    torch.testing.assert_close(y, 1 / (x.exp() + 1e-9), rtol=1e-6, atol=0)
    torch.testing.assert_close((1 / y.double() - 1e-9).log().float(), x, rtol=1e-6, atol=1e-6)
    assert transforms.inverse_beta(torch.tensor([-40.0])).item() == pytest.approx(1e9, rel=1e-6), "the guard is kept"


def test_mean_and_std_are_the_two_halves():
    statistics = awkward(10).abs()
    assert torch.equal(transforms.mean(statistics), statistics[:5])
    torch.testing.assert_close(transforms.std(statistics) ** 2, statistics[5:], rtol=1e-6, atol=0)


def test_equal_names_the_copy_that_differs():
    same = torch.ones(1, 1, 4)
    assert torch.equal(transforms.equal(same, same.clone()), torch.ones(4))
    with pytest.raises(ValueError, match=r"copy 2 of 3 differs from the first by up to 0\.5"):
        transforms.equal(same, same, same + 0.5)
    with pytest.raises(ValueError, match="copy 1 of 2"):
        transforms.equal(same, torch.ones(1, 1, 5))


def test_quantised_rows_are_within_half_a_scale_and_ties_go_to_even():
    rows = awkward(40, 301)
    rows[5], rows[6], rows[7] = 0, 1e-40, 1e-37
    numbers, scale = transforms.quantise(rows)
    wide = rows.double().numpy()
    assert numbers.dtype == torch.int8 and scale.dtype == torch.float32
    expected = np.abs(rows.numpy()).max(1) / np.float32(127)
    expected[6:8] = 0
    assert np.array_equal(scale.numpy(), expected)
    found = numbers.double().numpy() * scale.double().numpy()[:, None]
    half = np.maximum(scale.double().numpy()[:, None] * (0.5 + 2**-16), 2.0**-119)
    assert (np.abs(found - wide) <= half).all()
    assert set(numbers.abs().amax(1).tolist()) == {0, 127}
    ties = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    assert transforms.quantise(ties)[0].tolist() == [[127, 0, 2, 2, 0, -2, -126]]
