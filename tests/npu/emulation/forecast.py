"""What an Ascend NPU does with every operator of every stage: observed on the device, or forecast without one.

A forecast runs the stages on the CPU with the functions of kernels/npu.py noted as their operators, all others as they
come. Each is looked up in the list of torch_npu's kernels and in the table of documented limits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from emulation.launches import Recorder
from emulation.limits import ANY, Call, Limit, broken_limit, limits_of
from emulation.stages import Stages, made_up
from torch import Tensor
from torch._C import _dispatch_has_kernel_for_dispatch_key

from covo_npu.kernels import native
from covo_npu.kernels.device import open_device
from covo_npu.kernels.interface import Kernels
from covo_npu.kernels.select import FUNCTIONS, select
from covo_npu.runtime.checkpoint.config import ModelConfig

VERSIONS = ("2.9.0", "2.13.0")  # of torch_npu: the oldest that we serve, and the one that is emulated

FUSED, KERNEL, COMPOSED, FALLS_BACK, REFUSED = "fused", "kernel", "composed", "falls back", "refused"
FAULTS = (FALLS_BACK, REFUSED)

# PyTorch composes an operator of others where a backend has no kernel of its own
COMPOSITE_KEYS = ("CompositeImplicitAutograd", "CompositeExplicitAutograd")

# function of the contract: the operators that kernels/npu.py makes of it in 16 bit and in float32, with their dtype
# where it is another. A test compares them with what runs on the emulated device.
_PLAIN_ATTENTION = ("aten::mul", "aten::matmul", "aten::_softmax", "aten::matmul")
_ATTENTION = ("npu::npu_fused_infer_attention_score",)
FORECAST: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("aten::addmm",), ("aten::addmm",)),
    "linear_int8": (
        ("npu::npu_weight_quant_batchmatmul",),
        ("aten::_to_copy", "aten::mm", "aten::mul", "aten::add", "aten::copy_"),
    ),
    "rms_norm": (("npu::npu_rms_norm",),) * 2,
    "add_rms_norm": (("npu::npu_add_rms_norm",),) * 2,
    "layer_norm": (("aten::native_layer_norm",),) * 2,
    "rotary": (("npu::npu_rotary_mul",),) * 2,
    "swiglu": (("npu::npu_swiglu",),) * 2,
    "gelu": (("npu::npu_gelu",),) * 2,
    "linear_gelu_tanh": (("aten::addmm", "npu::npu_gelu"),) * 2,
    "attention": (("aten::clone", *_ATTENTION), _PLAIN_ATTENTION),
    "write_kv": (("npu::npu_scatter_nd_update_",) * 2,) * 2,
    "prefill_attention": (("aten::clone", *_ATTENTION), (*_PLAIN_ATTENTION, "aten::masked_fill_")),
    "decode_attention": (_ATTENTION, _PLAIN_ATTENTION),
    "masked_decode_attention": (("aten::logical_not", *_ATTENTION), _PLAIN_ATTENTION),
    "conv_weight": ((), ()),  # once, when weights are filled
    "transformed_weight": ((), ()),
    "conv1d": (("aten::_to_copy", "aten::convolution float32"), ("aten::convolution",)),
    # as products where npu.transposes_slowly, which is so at the sizes of the preset tiny
    "conv_transpose1d": (("aten::_to_copy", "aten::add_ float32"), ("aten::add_",)),
    "anti_aliased_snake": (
        (),
        ("aten::cat", "aten::addmm_", "aten::add", "aten::mul", "aten::sin", "aten::pow_", "aten::addcmul"),
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One operator of one stage. limit: the documented limits that exist for it, or the one it breaks."""

    stage: str
    operator: str
    dtype: str
    count: int
    state: str
    limit: str


def operators(device: str, config: ModelConfig | None = None, dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """Return the rows of all stages of made-up networks. A call that the device refuses is the last of its stage."""
    place, recorder = open_device(device), Recorder()
    kernels = select(None, place)
    if place.type != "npu":
        kernels = forecast_kernels(kernels, recorder)
    rows: list[Row] = []
    with torch.no_grad():  # not inference_mode, in which composed operators hide what they are made of
        for stage, run in Stages(made_up(device, config, dtype, kernels)).runs().items():
            rows += stage_rows(stage, run, recorder, place.type == "npu")
    return rows


def stage_rows(stage: str, run: Callable[[], object], recorder: Recorder, on_npu: bool) -> list[Row]:
    """Return one row for each operator and dtype of a stage."""
    run()
    recorder.calls.clear()
    refusal = None
    with recorder:
        try:
            run()
        except RuntimeError as error:
            if not on_npu:
                raise
            refusal = str(error).splitlines()[0]
    judged = Counter((call.operator, first_dtype(call), *judge(call, on_npu)) for call in recorder.calls)
    rows = [Row(stage, name, dtype, count, state, limit) for (name, dtype, state, limit), count in judged.items()]
    if refusal is not None:
        last = recorder.calls[-1]
        rows.append(Row(stage, last.operator, first_dtype(last), 1, REFUSED, refusal))
    return rows


def first_dtype(call: Call) -> str:
    """Return the dtype of the first tensor of a call, or "-"."""
    tensors = call.tensors
    return str(tensors[0].dtype).removeprefix("torch.") if tensors else "-"


def judge(call: Call, on_npu: bool) -> tuple[str, str]:
    """Return (state, limit) of one call."""
    if broken := _broken(call):
        return REFUSED, f"{broken.message} ({broken.source})"
    limits = "; ".join(dict.fromkeys(limit.message for limit in limits_of(call) if limit.operators != ANY))
    if call.operator.startswith("npu::"):
        return FUSED, limits
    if _has_kernel(call.operator, on_npu):
        return KERNEL, limits
    return (COMPOSED if _is_composed(call.operator) else FALLS_BACK), limits


def _broken(call: Call) -> Limit | None:
    # A forecast knows the fused operators by name only: what they are given, kernels/npu.py decides.
    return None if call.operator.startswith("npu::") or call.arguments.get("forecast") else broken_limit(call)


@cache
def npu_operators(version: str) -> frozenset[str]:
    """Return the operators of PyTorch, without overloads, for which a version of torch_npu has a kernel."""
    lines = Path(__file__).with_name(f"torch_npu-{version}-operators.txt").read_text("utf-8").splitlines()
    return frozenset(f"aten::{line}" for line in lines if line and not line.startswith("#"))


def _has_kernel(operator: str, on_npu: bool) -> bool:
    """Return whether torch_npu has a kernel: asked of this one, or looked up for all VERSIONS."""
    if not on_npu:
        return all(operator in npu_operators(version) for version in VERSIONS)
    return any(_dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1") for name in _overloads(operator))


def _is_composed(operator: str) -> bool:
    # Variants with `out` are composed of those without, so they say nothing of these.
    names = [name for name in _overloads(operator) if "out" not in name.partition(".")[2]]
    return any(_dispatch_has_kernel_for_dispatch_key(name, key) for name in names for key in COMPOSITE_KEYS)


def _overloads(operator: str) -> list[str]:
    packet = getattr(torch.ops.aten, operator.removeprefix("aten::"))
    return [operator if overload == "default" else f"{operator}.{overload}" for overload in packet.overloads()]


def forecast_kernels(kernels: Kernels, recorder: Recorder) -> Kernels:
    """Return kernels that compute as the given ones do, and note the operators that kernels/npu.py makes instead."""
    table: dict[str, Any] = {name: partial(_noted, kernels, name, recorder) for name in FUNCTIONS}
    table["decode_layers"] = native.decode_layers  # there is none: layers follow each other
    return cast(Kernels, SimpleNamespace(name="forecast", **table))


def _noted(kernels: Kernels, function: str, recorder: Recorder, *args: Any, **kwargs: Any) -> Any:
    compute: Callable[..., Any] = getattr(kernels, function)
    first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    in_half, in_float = FORECAST[function]
    for operator in in_float if first.dtype == torch.float32 else in_half:
        name, _, other_dtype = operator.partition(" ")
        x = first.to(getattr(torch, other_dtype)) if other_dtype else first
        recorder.calls.append(Call(name, {"x": x, "forecast": True}))
    with recorder.paused():
        return compute(*args, **kwargs)
