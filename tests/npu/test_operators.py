"""What every stage runs on the device, the forecast from the CPU against it, and the list of operators of torch_npu."""

from __future__ import annotations

import pytest
import torch
from emulation import forecast
from emulation.launches import Recorder
from torch._C import _dispatch_get_all_op_names, _dispatch_has_kernel_for_dispatch_key

from covo_npu.tools.synth.config import PRESETS

# the CPU's names for products; copies, which each device makes where it needs them, and what masks are made of
SAME = {"aten::mm": "aten::matmul", "aten::bmm": "aten::matmul"}
COPIES = {"_to_copy", "_npu_dtype_cast", "clone", "copy_", "fill_", "_unsafe_view", "scalar_tensor", "logical_not"}
COPIES |= {"addmm", "matmul"}
MASKS = {"ones", "triu"}


def kinds(rows: list[forecast.Row], stage: str) -> set[tuple[str, str]]:
    named = {(SAME.get(row.operator, row.operator), row.dtype) for row in rows if row.stage == stage}
    return {(name, dtype) for name, dtype in named if name.partition("::")[2] not in COPIES | MASKS}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_forecast_from_the_cpu_is_what_runs_on_the_device(dtype: torch.dtype) -> None:
    there = forecast.operators("npu:0", PRESETS["tiny"], dtype)
    expected = forecast.operators("cpu", PRESETS["tiny"], dtype)
    assert not [row for row in (*there, *expected) if row.state in forecast.FAULTS]
    stages = list(dict.fromkeys(row.stage for row in there))
    assert stages == list(dict.fromkeys(row.stage for row in expected)) and len(stages) == 7
    for stage in stages:
        assert kinds(there, stage) == kinds(expected, stage), stage
    assert sum(row.state == forecast.FUSED for row in there) > 10


def test_a_refused_call_is_a_row_and_a_fault() -> None:
    runs = iter((False, True))  # the warm-up is spared
    x = torch.ones(3, dtype=torch.bfloat16, device="npu:0")
    rows = forecast.stage_rows("mutant", lambda: x.add(1).cumsum(0) if next(runs) else None, Recorder(), on_npu=True)
    assert [(row.operator, row.state) for row in rows][-1] == ("aten::cumsum", "refused")
    assert "float16, float32, integers" in rows[-1].limit


def test_the_list_of_operators_is_this_torch_npus() -> None:
    names = [name.removeprefix("aten::") for name in _dispatch_get_all_op_names() if name.startswith("aten::")]
    own = [name for name in names if _dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "PrivateUse1")]
    packets = {name.partition(".")[0] for name in own}
    assert forecast.npu_operators(torch.__version__.partition("+")[0]) == {
        f"aten::{packet}" for packet in packets if hasattr(torch.ops.aten, packet)
    }
