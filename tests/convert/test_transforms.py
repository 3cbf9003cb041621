"""Each transform against its inverse, or against an independent computation."""

import librosa
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


def test_mel_filters_equal_librosas_bit_for_bit():
    ours, theirs = transforms.mel_filters(128).numpy(), librosa.filters.mel(sr=16000, n_fft=400, n_mels=128)
    assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


@pytest.mark.parametrize("num_mels", [40, 80])
def test_mel_filters_of_other_sizes_are_librosas_too(num_mels: int):
    expected = librosa.filters.mel(sr=16000, n_fft=400, n_mels=num_mels)
    np.testing.assert_allclose(transforms.mel_filters(num_mels).numpy(), expected, rtol=1e-6, atol=1e-15)


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
    v, g, before = awkward(64, 300, 11), awkward(64, 1, 1), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(transforms.fold_weight_norm(g, v))
    finally:
        torch.set_num_threads(before)
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


def test_cast_rounds_to_nearest_even():
    x = torch.tensor([1.0, 1.00390625, 1.01171875, -1.00390625])  # halfway between two bfloat16 values
    assert transforms.cast(x, torch.bfloat16).tolist() == [1.0, 1.0, 1.015625, -1.0]


def test_cast_refuses_a_value_that_becomes_infinite():
    with pytest.raises(OverflowError, match="70000"):
        transforms.cast(torch.tensor([1.0, 7e4]), torch.float16)
    assert transforms.cast(torch.tensor([float("inf")]), torch.float16).isinf().all(), "an infinity stays one"


def test_equal_names_the_copy_that_differs():
    same = torch.ones(1, 1, 4)
    assert torch.equal(transforms.equal(same, same.clone()), torch.ones(4))
    with pytest.raises(ValueError, match=r"copy 2 of 3 differs from the first by up to 0\.5"):
        transforms.equal(same, same, same + 0.5)
    with pytest.raises(ValueError, match="copy 1 of 2"):
        transforms.equal(same, torch.ones(1, 1, 5))
