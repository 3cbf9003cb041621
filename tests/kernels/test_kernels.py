"""Every backend that runs here against the textbook, and every mutant of the textbook against the same bounds.

float32: relative to the result's spread, 1e-5. Half precision: the error to float64 is at most twice the error of plain
PyTorch float32 arithmetic rounded once at the end (the reference backend), plus one rounding of the result.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernels.kernel_cases import CASES, Case
from torch import Tensor

from covo_npu.kernels import device, interface, native, reference, select
from covo_npu.kernels.cpu import CPU
from covo_npu.kernels.cpu.choice import OURS, Choice
from covo_npu.kernels.errors import BackendError

BACKENDS = (reference, native, CPU(Choice.unmeasured(OURS)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def prepared(case: Case, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return inputs in dtype, and the same rounded values in float64 for the textbook."""
    exact = case.inputs(torch.Generator().manual_seed(0))
    floats = {n: v for n, v in exact.items() if isinstance(v, Tensor) and v.is_floating_point()}
    inputs = {**exact, **{n: v.to(dtype) for n, v in floats.items()}}
    return inputs, {**exact, **{n: inputs[n].double() for n in floats}}


def run(backend: Any, case: Case, inputs: dict[str, Any]) -> Tensor:
    """Return the result as one tensor: tuples are stacked, writers give their caches."""
    copies = {n: v.clone() if n.endswith("_cache") else v for n, v in inputs.items()}
    before = {n: v.clone() for n, v in copies.items() if isinstance(v, Tensor) and not n.endswith("_cache")}
    if "attended" in copies:
        attended = copies.pop("attended")
        if case.function == "masked_attention":
            copies["mask"] = backend.key_mask(attended=attended, num_queries=inputs["q"].shape[1])
        else:
            copies["mask"] = backend.step_mask(attended=attended)
        before.pop("attended")
    result = getattr(backend, case.function)(**copies)
    for name, value in before.items():
        assert torch.equal(copies[name], value), f"{case.function} wrote its input {name}"
    return as_tensor((copies["k_cache"], copies["v_cache"]) if result is None else result)


def as_tensor(result: Any) -> Tensor:
    return torch.stack(tuple(result)) if isinstance(result, tuple) else result


def within(found: Tensor, expected: Tensor, bound: Tensor | float) -> bool:
    return bool(((found.double() - expected).abs() <= bound).all())


def bounds(case: Case, dtype: torch.dtype, inputs: dict[str, Any], expected: Tensor) -> Tensor | float:
    """Return the allowed absolute error of each element."""
    rounding = torch.finfo(dtype).eps * expected.abs()
    if dtype == torch.float32:
        return 1e-5 * expected.std() + 4 * rounding
    plain = (run(reference, case, inputs).double() - expected).abs()
    # Element by element an error can vanish by luck, so the plain error is taken over the row.
    return 2 * plain.amax(-1, keepdim=True) + rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.function)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_backend_computes_the_textbook(backend: Any, case: Case, dtype: torch.dtype) -> None:
    inputs, exact = prepared(case, dtype)
    expected = as_tensor(case.expected(**exact))
    found = run(backend, case, inputs)
    assert found.dtype == dtype and found.shape == expected.shape
    assert within(found, expected, bounds(case, dtype, inputs, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.function)
def test_every_mutant_is_refused(case: Case, dtype: torch.dtype) -> None:
    inputs, exact = prepared(case, dtype)
    expected = as_tensor(case.expected(**exact))
    allowed = bounds(case, dtype, inputs, expected)
    for number, mutant in enumerate(case.mutants):
        assert not within(as_tensor(mutant(**exact)), expected, allowed), f"mutant {number} passes"


def test_caches_are_written_bit_for_bit() -> None:
    case = next(c for c in CASES if c.function == "write_kv")
    inputs, exact = prepared(case, torch.bfloat16)
    for backend in BACKENDS:
        assert torch.equal(run(backend, case, inputs), as_tensor(case.expected(**exact)).to(torch.bfloat16))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_the_products_of_a_convolution_may_run_in_another_dtype(backend: Any) -> None:
    """x, weight, bias and the result are rounded to it at most once each, and the result is of x's dtype again."""
    case = next(c for c in CASES if c.function == "conv1d")
    _, exact = prepared(case, torch.float32)
    inputs = {name: v.float() if isinstance(v, Tensor) else v for name, v in exact.items()}
    for name in ("weight", "bias"):
        inputs[name] = backend.conv_weight(inputs[name], torch.bfloat16)
    found = run(backend, case, inputs)
    assert found.dtype == torch.float32
    sizes = case.expected(**{name: v.abs() if isinstance(v, Tensor) else v for name, v in exact.items()})
    allowed = 3.1 * 2**-8 * sizes
    assert within(found, case.expected(**exact), allowed)
    assert not any(within(found, mutant(**exact), allowed) for mutant in case.mutants)


def test_every_function_of_the_contract_has_a_case() -> None:
    # Masks are made for what takes them, forms of weights for conv1d: tested with it, and in test_winograd.py. Layers:
    # test_cpu_decoder.py
    prepared = {"key_mask", "step_mask", "conv_weight", "transformed_weight", "decode_layers"}
    assert {case.function for case in CASES} | prepared == set(select.FUNCTIONS)
    for backend in BACKENDS:
        assert all(callable(getattr(backend, function)) for function in select.FUNCTIONS)
        as_kernels: interface.Kernels = backend
        assert as_kernels.name in select.BACKENDS


def test_select_names_what_there_is() -> None:
    cpu = torch.device("cpu")
    assert isinstance(select.select(None, cpu), CPU)
    assert select.select("native", cpu) is native
    assert select.select("reference", cpu) is reference
    with pytest.raises(BackendError, match="unknown backend 'fast'; there are npu, cuda, cpu, native, reference"):
        select.select("fast", cpu)
    with pytest.raises(BackendError, match="backend npu serves npu, not cpu"):
        select.select("npu", cpu)


def test_devices_are_parsed_and_checked() -> None:
    assert device.open_device("cpu") == torch.device("cpu")
    with pytest.raises(BackendError, match="unknown device 'gpu'"):
        device.open_device("gpu")
    with pytest.raises(BackendError, match="cuda:97 is not there"):
        device.open_device("cuda:97")


def test_description_counts_own_and_borrowed_functions() -> None:
    total = len(select.FUNCTIONS)
    assert select.describe(reference) == f"reference ({total} reference)"
    assert select.describe(native) == f"native ({total} native)"
    partial = SimpleNamespace(**{name: getattr(native, name) for name in select.FUNCTIONS}, name="partial")
    partial.gelu = reference.gelu
    partial.linear = torch.nn.functional.linear
    assert select.describe(partial) == f"partial ({total - 2} native, 1 partial, 1 reference)"
