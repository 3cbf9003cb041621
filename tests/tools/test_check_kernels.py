"""covo-check kernels: a right backend passes, and each fault that a device makes easy is above its bound."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from covo_npu.kernels import cpu, native, select
from covo_npu.kernels.cpu import library, winograd
from covo_npu.tools.check import kernels
from covo_npu.tools.check.kernels import ALLOWED

CPU = torch.device("cpu")
CASES = {case.name: case for case in kernels._cases()}


def error(name: str, dtype: torch.dtype, **functions: Any) -> float:
    backend: Any = SimpleNamespace(**{f: getattr(native, f) for f in select.FUNCTIONS} | functions)
    return kernels._error(backend, CPU, CASES[name], dtype)


def interleaved_heads(q: Tensor, k_cache: Tensor, **others: Any) -> Tensor:
    order = torch.arange(q.shape[1]).view(-1, k_cache.shape[1]).T.reshape(-1)
    return native.decode_attention(q[:, order], k_cache, **others)[:, order.argsort()]


def first_tile(lengths: list[int], **others: Any) -> Tensor:
    return native.decode_attention(lengths=[min(length, 512) for length in lengths], **others)


def top_left(q: Tensor, length: int, **others: Any) -> Tensor:
    return native.prefill_attention(q, length=len(q), **others)


def swapped_caches(k: Tensor, v: Tensor, **others: Any) -> None:
    native.write_kv(v, k, **others)


DECODE = next(name for name in CASES if name.startswith("decode_attention"))
MUTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "heads": (DECODE, {"decode_attention": interleaved_heads}),
    "one row past 512": (DECODE, {"decode_attention": first_tile}),
    "scale": (DECODE, {"decode_attention": lambda scale, **others: native.decode_attention(scale=1.0, **others)}),
    "anchor": ("prefill_attention, 40 of 1500", {"prefill_attention": top_left}),
    "halves": ("swiglu", {"swiglu": lambda gate_up: native.swiglu(torch.cat(gate_up.chunk(2, -1)[::-1], -1))}),
    "channels": (
        "linear_int8, 1 rows",
        {"linear_int8": lambda scale, **others: native.linear_int8(scale=scale.roll(1), **others)},
    ),
    "sum": ("add_rms_norm", {"add_rms_norm": lambda **inputs: native.add_rms_norm(**inputs)[::-1]}),
    "caches": ("write_kv", {"write_kv": swapped_caches}),
    "sine": ("rotary, DiT", {"rotary": lambda x, cos, sin: native.rotary(x, cos, -sin)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", MUTANTS)
def test_faults_are_above_the_bounds(fault: str, dtype: torch.dtype) -> None:
    name, functions = MUTANTS[fault]
    assert error(name, dtype) <= ALLOWED[dtype] / 2
    assert error(name, dtype, **functions) > 2 * ALLOWED[dtype]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.function == "add_rms_norm"])
def test_no_number_in_the_second_result_is_above_the_bounds(name: str) -> None:
    def summed_is_none(**inputs: Any) -> Any:
        normed, summed = native.add_rms_norm(**inputs)
        return normed, torch.full_like(summed, torch.nan)

    assert not error(name, torch.float32, add_rms_norm=summed_is_none) <= ALLOWED[torch.float32]


def test_every_kernel_has_a_case() -> None:
    measured = {"masked_attention", "masked_decode_attention", "decode_layers"}
    made_of_others = measured | {"key_mask", "step_mask", "conv_weight", "transformed_weight"}  # preparations
    assert {case.function for case in CASES.values()} | made_of_others == set(select.FUNCTIONS)


def test_layers_in_one_call_are_held_to_layers_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_cases", list)
    name = "decode_layers in one call"
    assert {finding.name: finding.holds for finding in kernels.findings(cpu.CPU(), CPU)}[name]
    assert name not in {finding.name for finding in kernels.findings(native, CPU)}
    usual = library.Decoder

    def other(*fields: Any) -> library.Decoder:
        job = usual(*fields)
        job.scale *= 1.1
        return job

    monkeypatch.setattr(library, "Decoder", other)
    assert not {finding.name: finding.holds for finding in kernels.findings(cpu.CPU(), CPU)}[name]


def test_a_convolution_has_the_second_form_of_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "VALUES", winograd.VALUES[::-1])
    monkeypatch.setattr(kernels, "_cases", lambda: [CASES["conv1d"]])
    found = {finding.name: finding.holds for finding in kernels.findings(cpu.CPU(), CPU)}
    assert (found["conv1d, float32"], found["conv1d, bfloat16"]) == (False, True)


def test_a_refused_call_is_a_finding_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("call aclnnSwiGlu failed\nmore")

    backend: Any = SimpleNamespace(**{f: getattr(native, f) for f in select.FUNCTIONS} | {"swiglu": refuse})
    monkeypatch.setattr(kernels, "_cases", lambda: [CASES["swiglu"], CASES["gelu"]])
    monkeypatch.setattr(kernels, "BOUNDS", (512,))
    monkeypatch.setattr(kernels, "FRAMES", (128,))
    found = {finding.name: finding for finding in kernels.findings(backend, CPU)}
    assert len(found) == 6
    assert found["swiglu, float32"].measured == "refused: call aclnnSwiGlu failed"
    assert {name for name, finding in found.items() if not finding.holds} == {"swiglu, float32", "swiglu, bfloat16"}
