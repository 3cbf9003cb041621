"""covo-check ops on the device, its forecast from the CPU against it, and the list of torch_npu's operators."""

from __future__ import annotations

import pytest
import torch
from torch._C import _dispatch_get_all_op_names, _dispatch_has_kernel_for_dispatch_key

from covo_npu.tools import check_ops, work
from covo_npu.tools.synth_config import PRESETS

# the CPU's names for products; copies, which each device makes where it needs them, and what masks are made of
SAME = {"aten::mm": "aten::matmul", "aten::bmm": "aten::matmul"}
COPIES = {"_to_copy", "clone", "copy_", "fill_", "_unsafe_view", "scalar_tensor", "addmm", "matmul", "logical_not"}
MASKS = {"ones", "triu"}


def kinds(rows: list[check_ops.Row], stage: str) -> set[tuple[str, str]]:
    named = {(SAME.get(row.operator, row.operator), row.dtype) for row in rows if row.stage == stage}
    return {(name, dtype) for name, dtype in named if name.removeprefix("aten::") not in COPIES | MASKS}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_forecast_from_the_cpu_is_what_runs_on_the_device(dtype: torch.dtype) -> None:
    there = check_ops.operators(work.made_up("npu:0", PRESETS["tiny"], dtype))
    forecast = check_ops.operators(work.made_up("cpu", PRESETS["tiny"], dtype))
    assert not [row for row in (*there, *forecast) if row.state in check_ops.FAULTS]
    stages = list(dict.fromkeys(row.stage for row in there))
    assert stages == list(dict.fromkeys(row.stage for row in forecast)) and len(stages) == 8
    for stage in stages:
        assert kinds(there, stage) == kinds(forecast, stage), stage
    assert sum(row.state == check_ops.FUSED for row in there) > 10


def test_a_refused_call_is_a_row_and_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter((False, True))  # the warm-up is spared

    def stages(self: work.Work) -> list[work.Stage]:
        x = torch.ones(3, dtype=torch.bfloat16, device=self.subject.device)
        return [work.Stage("mutant", "once", lambda: x.add(1).cumsum(0) if next(runs) else None)]

    monkeypatch.setattr(work.Work, "stages", stages)
    rows = check_ops.operators(work.made_up("npu:0", PRESETS["tiny"]))
    assert [(row.operator, row.state) for row in rows][-1] == ("aten::cumsum", "refused")
    assert "float16, float32, integers" in rows[-1].limit


def test_the_list_of_operators_is_this_torch_npus() -> None:
    names = [name.removeprefix("aten::") for name in _dispatch_get_all_op_names() if name.startswith("aten::")]
    own = [name for name in names if _dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "PrivateUse1")]
    packets = {name.partition(".")[0] for name in own}
    assert check_ops._npu_operators() == {f"aten::{packet}" for packet in packets if hasattr(torch.ops.aten, packet)}
