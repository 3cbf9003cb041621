"""The Triton kernel of kernels/cuda.py without a card: interpreted, for its numbers; compiled, for three kinds of card.

Interpreted, its program is run by Triton in NumPy, block by block. That shows the arithmetic, the edges and the masks;
not speed, and not what a card does with the compiled program: `covo-check kernels --device cuda:0` shows that.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from kernels.kernel_cases import CASES
from kernels.products import Product
from kernels.test_kernels import DTYPES, as_tensor, bounds, prepared, run, within

from covo_npu.kernels import native, select

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from covo_npu.kernels import cuda  # noqa: E402

# M, N, K: one column, odd sizes, less and more than a block of channels and of columns
MULTIPLIED = {"bf16": "bf16", "fp16": "f16"}  # by tensor cores: Triton's name of a dtype, PTX's
SIZES = ((1, 1, 1), (1, 5, 7), (2, 33, 100), (3, 64, 512), (5, 65, 1000), (8, 17, 18944), (10, 31, 64), (16, 48, 256))


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """kernels/cuda.py, its program run by Triton's interpreter, which is taught what bfloat16 is: it takes the bits of
    one for a whole number wherever it does not convert to or from float32."""
    changed = pytest.MonkeyPatch()
    cast, dot = interpreter.InterpreterBuilder.cast_impl, interpreter.InterpreterBuilder.create_dot
    float32, bfloat16 = triton.language.float32, triton.language.bfloat16

    def wide(self: Any, values: Any) -> Any:
        return cast(self, values, float32) if values.dtype.scalar == bfloat16 else values

    def cast_impl(self: Any, values: Any, dtype: Any) -> Any:
        if dtype.scalar == bfloat16 and values.dtype.scalar != float32:
            values = cast(self, values, float32)
        return cast(self, values, dtype)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(self, a), wide(self, b), *rest)

    changed.setattr(interpreter.InterpreterBuilder, "cast_impl", cast_impl)
    for name in ("create_si_to_fp", "create_fp_ext", "create_fp_trunc"):
        changed.setattr(interpreter.InterpreterBuilder, name, cast_impl)
    changed.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    changed.setenv("TRITON_INTERPRET", "1")
    name = "covo_npu.kernels.cuda_interpreted"
    spec = importlib.util.spec_from_file_location(name, cuda.__file__)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    changed.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    changed.delenv("TRITON_INTERPRET")
    assert isinstance(module._product, interpreter.InterpretedFunction)
    yield module
    changed.undo()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_exact_within_roundings(
    interpreted: ModuleType, dtype: torch.dtype, size: tuple[int, int, int]
) -> None:
    product = Product(dtype, torch.int8, *size)
    found = interpreted.linear_int8(product.x, product.weight, product.scale, product.bias)
    product.judge(found)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_case_of_the_contract(interpreted: ModuleType, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.function == "linear_int8")
    inputs, exact = prepared(case, dtype)
    expected = as_tensor(case.expected(**exact))
    assert within(run(interpreted, case, inputs), expected, bounds(case, dtype, inputs, expected))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_row_does_not_depend_on_the_others(interpreted: ModuleType) -> None:
    product = Product(torch.bfloat16, torch.int8, 16, 70, 600)
    product.x[5] = torch.inf

    def of(rows: slice) -> torch.Tensor:
        return interpreted.linear_int8(product.x[rows], product.weight, product.scale, product.bias)

    whole = of(slice(None))
    for rows in (slice(0, 1), slice(3, 5), slice(6, 14)):
        assert torch.equal(of(rows), whole[rows])
    assert not whole[5].isfinite().any() and whole[6:].isfinite().all()


def test_shapes_and_what_is_left_to_native(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    product = Product(torch.bfloat16, torch.int8, 6, 40, 96)
    arguments = (product.weight, product.scale, product.bias)
    flat = interpreted.linear_int8(product.x, *arguments)
    assert torch.equal(interpreted.linear_int8(product.x.view(2, 3, 96), *arguments), flat.view(2, 3, 40))
    strided = torch.cat((product.x, product.x), dim=1)[:, :96]
    assert torch.equal(interpreted.linear_int8(strided, *arguments), flat)
    called = []
    monkeypatch.setattr(native, "linear_int8", lambda x, *rest: called.append(x.shape))
    interpreted.linear_int8(product.x[:0], *arguments)
    interpreted.linear_int8(product.x.repeat(3, 1), *arguments)
    interpreted.linear_int8(product.x, product.weight.T.contiguous().T, *arguments[1:])
    assert called == [(0, 96), (18, 96), (6, 96)]


# Tensor cores of Ampere, Ada and Hopper; sizes as the model has them, which copies of 16 bytes need, and odd ones.
@pytest.mark.parametrize("card", (80, 89, 90), ids=lambda card: f"sm_{card}")
@pytest.mark.parametrize(("dtype", "aligned"), (("bf16", True), ("fp16", True), ("fp32", True), ("bf16", False)))
def test_it_compiles(dtype: str, aligned: bool, card: int) -> None:
    constants = {"HAS_BIAS": True} | {name: getattr(cuda, name) for name in ("ROWS", "BLOCK_N", "BLOCK_K", "STAGES")}
    pointers = {"x": dtype, "weight": "i8", "scale": "fp32", "bias": dtype, "out": dtype}
    signature = {name: f"*{kind}" for name, kind in pointers.items()}
    signature |= dict.fromkeys(("num_rows", "size_out", "size_in"), "i32") | dict.fromkeys(constants, "constexpr")
    assert list(signature) == cuda._product.arg_names
    divisible = [(place,) for place, name in enumerate(signature) if name in pointers or name.startswith("size")]
    source = ASTSource(
        cuda._product, signature, constants, {place: [["tt.divisibility", 16]] for place in divisible if aligned}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": cuda.WARPS})
    program = compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.shared <= 99 * 1024  # what Ada gives a program, the least of the three
    assert (f"mma.sync.aligned.m16n8k16.row.col.f32.{MULTIPLIED.get(dtype)}" in program) == (dtype in MULTIPLIED)
    assert "tf32" not in program
    # 16 bytes a copy (.cg has no other size), on their way while the block before is multiplied
    assert ("cp.async.cg.shared.global" in program) == aligned != ("ld.global.b8" in program)


def test_it_serves_cuda() -> None:
    device = torch.device("cuda:0")
    assert select.select(None, device) is cuda and select.select("native", device) is native
    assert all(callable(getattr(cuda, function)) for function in select.FUNCTIONS)
    assert select.describe(cuda) == f"cuda ({len(select.FUNCTIONS) - 1} native, 1 cuda)"


def test_without_triton_native_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert select.select(None, torch.device("cuda:0")) is native
    assert "the backend native serves: Triton, which PyTorch's CUDA builds bring, is not installed" in caplog.text
