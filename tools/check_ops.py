"""covo-check ops: every operator of every stage, and what an Ascend NPU does with it.

On an NPU, real or emulated, the operators are those that run there. Elsewhere it is a forecast: the stages run on this
device with the functions of kernels/npu.py replaced by their operators, all others as they come, and each is looked up
in the list of torch_npu's kernels and in the table of documented limits.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from torch import Tensor
from torch._C import _dispatch_has_kernel_for_dispatch_key

from covo_npu.kernels.interface import Kernels
from covo_npu.kernels.select import FUNCTIONS
from covo_npu.tools import work
from covo_npu.tools.check_result import Finding, Result, Subject, verbose_option
from covo_npu.tools.launches import Recorder, first_dtype
from covo_npu.tools.npu_rules import RULES, Call, Rule, broken_rule

OK, FAULT = 0, 1
OPERATORS = Path(__file__).parent / "data" / "torch_npu-2.13.0-operators.txt"

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
    "conv1d": (("aten::_to_copy", "aten::convolution float32"), ("aten::convolution",)),
    "conv_transpose1d": (("aten::_to_copy", "aten::convolution float32"), ("aten::convolution",)),
    "anti_aliased_snake": (
        (),
        ("aten::cat", "aten::convolution", "aten::mul", "aten::sin", "aten::pow_", "aten::addcmul"),
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


def operators(subject: work.Subject) -> list[Row]:
    """Return the rows of all stages. A stage that the device refuses ends with the refused operator."""
    on_npu, recorder = subject.device.type == "npu", Recorder()
    if not on_npu:
        forecast_kernels(subject, recorder)
    rows: list[Row] = []
    with torch.no_grad():  # not inference_mode, in which composed operators hide what they are made of
        for stage in work.Work(subject).stages():
            stage.run()
            recorder.calls.clear()
            refusal = None
            with recorder:
                try:
                    stage.run()
                except RuntimeError as error:
                    if not on_npu:
                        raise
                    refusal = str(error).splitlines()[0]
            rows += stage_rows(stage.name, recorder.calls, on_npu, refusal)
    return rows


def stage_rows(stage: str, calls: list[Call], on_npu: bool, refusal: str | None) -> list[Row]:
    """Return one row for each operator and dtype. refusal: what the device said of the last call."""
    judged = Counter((call.operator, first_dtype(call), *judge(call, on_npu)) for call in calls)
    rows = [Row(stage, name, dtype, count, state, limit) for (name, dtype, state, limit), count in judged.items()]
    if refusal is not None:
        last = calls[-1]
        rows.append(Row(stage, last.operator, first_dtype(last), 1, REFUSED, refusal))
    return rows


def judge(call: Call, on_npu: bool) -> tuple[str, str]:
    """Return (state, limit) of one call."""
    if broken := _broken(call):
        return REFUSED, f"{broken.message} ({broken.source})"
    limits = "; ".join(dict.fromkeys(rule.message for rule in RULES if _concerns(rule, call)))
    if call.operator.startswith("npu::"):
        return FUSED, limits
    if _has_kernel(call.operator, on_npu):
        return KERNEL, limits
    return (COMPOSED if _is_composed(call.operator) else FALLS_BACK), limits


def _broken(call: Call) -> Rule | None:
    # A forecast knows the fused operators by name only: what they are given, kernels/npu.py decides.
    return None if call.operator.startswith("npu::") or call.arguments.get("forecast") else broken_rule(call)


def _concerns(rule: Rule, call: Call) -> bool:
    return rule.operators != ".*" and bool(re.fullmatch(rule.operators, call.operator))


@cache
def _npu_operators() -> frozenset[str]:
    lines = OPERATORS.read_text("utf-8").splitlines()
    return frozenset(f"aten::{line}" for line in lines if line and not line.startswith("#"))


def _has_kernel(operator: str, on_npu: bool) -> bool:
    """Return whether torch_npu has a kernel: asked of this one, or looked up for 2.13.0."""
    if not on_npu:
        return operator in _npu_operators()
    return any(_dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1") for name in _overloads(operator))


def _is_composed(operator: str) -> bool:
    # Variants with `out` are composed of those without, so they say nothing of these.
    names = [name for name in _overloads(operator) if "out" not in name.partition(".")[2]]
    return any(_dispatch_has_kernel_for_dispatch_key(name, key) for name in names for key in COMPOSITE_KEYS)


def _overloads(operator: str) -> list[str]:
    packet = getattr(torch.ops.aten, operator.removeprefix("aten::"))
    return [operator if overload == "default" else f"{operator}.{overload}" for overload in packet.overloads()]


def forecast_kernels(subject: work.Subject, recorder: Recorder) -> None:
    """Let the networks of a subject note the operators of kernels/npu.py instead of those that compute here."""
    table = {name: partial(_noted, subject.kernels, name, recorder) for name in FUNCTIONS}
    kernels = SimpleNamespace(name="forecast", **table)
    holders: list[Any] = [*subject.networks.modules()]
    holders += [act for holder in holders for act in getattr(holder, "_activations", [])]
    holders += [holder._act_post for holder in holders if hasattr(holder, "_act_post")]
    for holder in holders:
        if hasattr(holder, "kernels"):
            holder.kernels = kernels


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


def shortened(row: Row, room: int = 90) -> str:
    """Return what fits of the limits on a line; --json has them whole. What a call breaks is never cut."""
    fits = row.state in FAULTS or len(row.limit) <= room
    return row.limit if fits else row.limit[:room].rpartition("; ")[0] + "; ..."


def as_text(rows: list[Row], title: str) -> str:
    """Return the table for a terminal, and the verdict."""
    lines = [title, f"{'stage':<16} {'operator':<38} {'dtype':<9} {'count':>5}  {'state':<10} documented limits"]
    for row in rows:
        cells = f"{row.stage:<16} {row.operator:<38} {row.dtype:<9} {row.count:>5}  {row.state:<10} {shortened(row)}"
        lines.append(cells.rstrip())
    faults = [row for row in rows if row.state in FAULTS]
    states = Counter(row.state for row in rows for _ in range(row.count))
    summary = ", ".join(f"{states[state]} {state}" for state in (FUSED, KERNEL, COMPOSED, FALLS_BACK, REFUSED))
    verdict = (
        f"{len(faults)} operators fall back or are refused" if faults else "nothing falls back, nothing is refused"
    )
    return "\n".join([*lines, f"{summary}: {verdict}"])


def examine(subject: Subject) -> Result:
    """Return a finding for each stage. Off the NPU of networks that are made up: the operators are the same."""
    on_npu = subject.device.startswith("npu")
    chosen = work.loaded(subject.ckpt, subject.device) if on_npu and subject.ckpt else work.made_up(subject.device)
    rows = operators(chosen)
    findings = []
    for stage in dict.fromkeys(row.stage for row in rows):
        found = [row for row in rows if row.stage == stage]
        faults = [f"{row.operator} {row.state}: {row.limit}" for row in found if row.state in FAULTS]
        says = "; ".join(faults) if faults else f"{sum(row.count for row in found)} calls of {len(found)} operators"
        findings.append(Finding(stage, says, "nothing falls back or is refused", "torch_npu's list", not faults))
    return Result("ops", f"operators on {chosen.device}" if on_npu else "forecast for an Ascend NPU", tuple(findings))


@click.command()
@click.option("--ckpt", type=click.Path(path_type=Path), help="Converted checkpoint; by default networks are made up.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:N, npu:N.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to this file too.")
@verbose_option
def command(ckpt: Path | None, device: str, json_file: Path | None, verbose: bool) -> int:
    """List every operator of every stage and say what an Ascend NPU does with it.

    fused: one operator of torch_npu; kernel: torch_npu has a kernel; composed: made of others by PyTorch. Exit code 1
    if anything falls back to the CPU or is refused. From cpu or cuda it is a forecast of what would happen on Ascend.
    """
    subject = work.loaded(ckpt, device) if ckpt else work.made_up(device)
    place, rows = subject.device, operators(subject)
    title = f"operators on {place}" if place.type == "npu" else f"forecast from {place}: what would happen on Ascend"
    click.echo(as_text(rows, title))
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", "utf-8")
    return FAULT if any(row.state in FAULTS for row in rows) else OK
