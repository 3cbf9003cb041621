"""The forecast from the CPU of what an Ascend NPU does with our operators. Runs anywhere."""

from __future__ import annotations

import pytest
import torch
from emulation import forecast
from emulation.launches import Recorder
from emulation.limits import Call

from covo_npu.tools.synth.config import PRESETS


def call(operator: str, **arguments: object) -> Call:
    return Call(operator, arguments)


BFLOAT16 = torch.ones(1, 2, 9, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("made", "state", "limit"),
    [
        (call("npu::npu_swiglu", input=BFLOAT16), forecast.FUSED, "input must be contiguous"),
        (call("aten::topk", self=BFLOAT16, sorted=True), forecast.KERNEL, "sorted=False"),
        (call("aten::masked_fill", self=BFLOAT16), forecast.COMPOSED, ""),
        (call("aten::special_bessel_j0", self=BFLOAT16), forecast.FALLS_BACK, ""),
        (call("aten::cumsum", self=BFLOAT16), forecast.REFUSED, "integers (native API, torch.cumsum)"),
        (call("aten::replication_pad1d", self=BFLOAT16), forecast.REFUSED, "bfloat16 (native API, ReplicationPad1d)"),
        (call("aten::add", self=BFLOAT16.double()), forecast.REFUSED, "float64 is not computed on the device"),
    ],
    ids=lambda value: value.operator if isinstance(value, Call) else None,
)
def test_operators_are_judged(made: Call, state: str, limit: str) -> None:
    found, says = forecast.judge(made, on_npu=False)
    assert found == state and limit in says


def test_the_forecast_of_our_stages_has_no_faults_and_names_the_fused_operators() -> None:
    rows = forecast.operators("cpu", PRESETS["tiny"])
    assert {row.state for row in rows} <= {forecast.FUSED, forecast.KERNEL, forecast.COMPOSED}
    decode = {row.operator: row.count for row in rows if row.stage == "decode"}
    layers = PRESETS["tiny"].llm.num_layers
    assert decode["npu::npu_fused_infer_attention_score"] == decode["npu::npu_swiglu"] == layers
    assert decode["npu::npu_add_rms_norm"] == decode["npu::npu_scatter_nd_update_"] == 2 * layers
    assert not [row for row in rows if row.operator == "aten::scaled_dot_product_attention"]


def test_an_operator_that_would_fall_back_is_a_row_of_its_stage() -> None:
    rows = forecast.stage_rows(
        "mutant", lambda: torch.special.bessel_j0(torch.ones(3)).cumsum(0), Recorder(), on_npu=False
    )
    assert [(row.operator, row.state) for row in rows if row.operator != "aten::ones"] == [
        ("aten::special_bessel_j0", "falls back"),
        ("aten::cumsum", "kernel"),
    ]
