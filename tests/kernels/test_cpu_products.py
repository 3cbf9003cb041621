"""Products of kernels/cpu: every instruction set that this machine executes, each by name, against float64.

Each comparison also has to refuse results that are wrong in one place.
"""

from __future__ import annotations

import os
import threading

import pytest
import torch
from kernels.products import Product
from torch import Tensor

from covo_npu.kernels.cpu import library

SETS = library.usable_sets()
TYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.int8),
    (torch.float16, torch.int8),
    (torch.float32, torch.int8),
)
# M, N, K: one column, odd sizes, less and more than a vector, a tile, a block of rows, of columns, of a cache
SIZES = (
    (1, 1, 1), (1, 5, 7), (2, 33, 100), (3, 62, 130), (3, 260, 3584), (4, 54, 700), (5, 65, 1000),
    (8, 17, 18944), (10, 31, 64), (11, 96, 333), (16, 64, 96), (33, 300, 520), (60, 64, 9312), (70, 300, 777),
    (800, 40, 64),
)  # fmt: skip


def compute(product: Product, best: str) -> tuple[Tensor, str]:
    """Return the product and the instruction set that served."""
    return library.served_linear(best, product.x, product.weight, product.scale, product.bias)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("x_type", "weight_type"), TYPES, ids=str)
@pytest.mark.parametrize("best", SETS)
def test_products_are_exact_within_roundings(
    best: str, x_type: torch.dtype, weight_type: torch.dtype, size: tuple[int, int, int]
) -> None:
    product = Product(x_type, weight_type, *size)
    found, served = compute(product, best)
    assert SETS.index(served) >= SETS.index(best)
    product.judge(found)


@pytest.mark.parametrize("best", SETS)
def test_each_set_serves_bfloat16_itself(best: str) -> None:
    for size in ((1, 40, 70), (9, 40, 70)):
        assert compute(Product(torch.bfloat16, torch.bfloat16, *size), best)[1] == best
        assert compute(Product(torch.bfloat16, torch.int8, *size), best)[1] == best or best == "avx512_bf16"


@pytest.mark.parametrize(("x_type", "weight_type"), TYPES, ids=str)
@pytest.mark.parametrize("best", SETS)
def test_bits_depend_neither_on_threads_nor_on_other_rows(
    best: str, x_type: torch.dtype, weight_type: torch.dtype
) -> None:
    """Rows of the weights are read eight, six and four side by side, as those of x allow; here are all their rests."""
    product = Product(x_type, weight_type, 8, 343, 1111)
    whole, _ = compute(product, best)
    for first in range(8):
        for count in range(1, 9 - first):
            rows = slice(first, first + count)
            part = library.linear(best, product.x[rows], product.weight, product.scale, product.bias)
            assert torch.equal(part, whole[rows])
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert torch.equal(compute(product, best)[0], whole)


def test_rows_of_tiles_do_not_depend_on_how_many_there_are() -> None:
    if "amx" not in SETS:
        pytest.skip("this machine has no AMX")
    product = Product(torch.bfloat16, torch.bfloat16, 900, 300, 800)
    whole, _ = compute(product, "amx")
    for count in (1, 7, 16, 17, 33, 200):
        part = library.linear("amx", product.x[:count], product.weight, None, product.bias)
        assert torch.equal(part, whole[:count])


@pytest.mark.parametrize(("x_type", "weight_type"), TYPES, ids=str)
@pytest.mark.parametrize("best", SETS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_and_nans_reach_the_result(
    value: float, best: str, x_type: torch.dtype, weight_type: torch.dtype
) -> None:
    product = Product(x_type, weight_type, 3, 20, 50)
    product.x[1, 37] = value
    product.weight[:, 37] = 3
    found = compute(product, best)[0].double()
    assert torch.isfinite(found[[0, 2]]).all()
    expected = product.exact()[1]
    assert torch.equal(found[1].isnan(), expected.isnan()) and torch.equal(found[1].isinf(), expected.isinf())


@pytest.mark.parametrize("best", SETS)
def test_subnormal_numbers(best: str) -> None:
    """float16's are exact. bfloat16's (below 1.2e-38) may count as zero, and a product of none of them does."""
    half = Product(torch.float16, torch.float16, 2, 33, 40)
    half.x.mul_(0).add_(torch.finfo(torch.float16).smallest_normal / 8)
    assert ((compute(half, best)[0].double() - half.exact()).abs() <= half.bound()).all()
    x = torch.full((1, 64), 1e-39).bfloat16()
    weight = torch.full((17, 64), 2.0**100).bfloat16()
    exact = x.double() @ weight.double().T
    found = library.linear(best, x, weight, None, None).double()
    kept = ((found - exact).abs() <= 2**-8 * exact).all()
    assert kept or not found.any()
    assert kept or best in ("amx", "avx512_bf16", "neon_bf16")
    large = library.linear(best, x * 2.0**20, weight, None, None).double()  # no longer subnormal
    assert ((large - exact * 2.0**20).abs() <= 2**-8 * exact * 2.0**20).all()


@pytest.mark.parametrize("best", SETS)
def test_sizes_of_nothing(best: str) -> None:
    weight = torch.ones(5, 7).bfloat16()
    assert library.linear(best, torch.ones(3, 0, 7).bfloat16(), weight, None, None).shape == (3, 0, 5)
    assert library.linear(best, torch.ones(2, 7).bfloat16(), weight[:0], None, None).shape == (2, 0)
    bias = torch.arange(5).bfloat16()
    found = library.linear(best, torch.ones(2, 0).bfloat16(), weight[:, :0].contiguous(), None, bias)
    assert torch.equal(found, bias.expand(2, 5))
    with pytest.raises(ValueError, match="rows of 6, the weights of 7"):
        library.linear(best, torch.ones(1, 6).bfloat16(), weight, None, None)


def test_several_python_threads_at_once() -> None:
    products = [Product(torch.bfloat16, torch.bfloat16, rows, 500, 700, seed=rows) for rows in (1, 2, 40, 9)]
    expected = [compute(product, SETS[0])[0] for product in products]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(compute(products[index], SETS[0])[0], expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(products))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_of_a_fork_goes_on() -> None:
    """The threads of the parent's team do not exist in the child."""
    product = Product(torch.bfloat16, torch.bfloat16, 2, 3000, 700)
    expected, _ = compute(product, SETS[0])
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(compute(product, SETS[0])[0], expected) else 1)
    for _ in range(3000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        threading.Event().wait(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
