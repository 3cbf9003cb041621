"""covo-check ops as a forecast from the CPU, and what covo-bench launches says where it cannot count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from covo_npu.tools import bench, check, check_ops, work
from covo_npu.tools.npu_rules import Call
from covo_npu.tools.synth_config import PRESETS


def call(operator: str, **arguments: object) -> Call:
    return Call(operator, arguments)


BFLOAT16 = torch.ones(1, 2, 9, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("made", "state", "limit"),
    [
        (call("npu::npu_swiglu", input=BFLOAT16), check_ops.FUSED, "input must be contiguous"),
        (call("aten::topk", self=BFLOAT16, sorted=True), check_ops.KERNEL, "sorted=False"),
        (call("aten::masked_fill", self=BFLOAT16), check_ops.COMPOSED, ""),
        (call("aten::special_bessel_j0", self=BFLOAT16), check_ops.FALLS_BACK, ""),
        (call("aten::cumsum", self=BFLOAT16), check_ops.REFUSED, "integers (native API, torch.cumsum)"),
        (call("aten::replication_pad1d", self=BFLOAT16), check_ops.REFUSED, "bfloat16 (native API, ReplicationPad1d)"),
        (call("aten::add", self=BFLOAT16.double()), check_ops.REFUSED, "float64 is not computed on the device"),
    ],
    ids=lambda value: value.operator if isinstance(value, Call) else None,
)
def test_operators_are_judged(made: Call, state: str, limit: str) -> None:
    found, says = check_ops.judge(made, on_npu=False)
    assert found == state and limit in says


def test_the_forecast_of_our_stages_has_no_faults_and_names_the_fused_operators() -> None:
    rows = check_ops.operators(work.made_up("cpu", PRESETS["tiny"]))
    assert {row.state for row in rows} <= {check_ops.FUSED, check_ops.KERNEL, check_ops.COMPOSED}
    decode = {row.operator: row.count for row in rows if row.stage == "decode"}
    layers = PRESETS["tiny"].llm.num_layers
    assert decode["npu::npu_fused_infer_attention_score"] == decode["npu::npu_swiglu"] == layers
    assert decode["npu::npu_add_rms_norm"] == decode["npu::npu_scatter_nd_update_"] == 2 * layers
    assert not [row for row in rows if row.operator == "aten::scaled_dot_product_attention"]


def test_an_operator_that_falls_back_ends_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stages(self: work.Work) -> list[work.Stage]:
        return [work.Stage("mutant", "once", lambda: torch.special.bessel_j0(self.noise).cumsum(0))]

    monkeypatch.setattr(work.Work, "stages", stages)
    monkeypatch.setattr(work, "deep_and_thin", lambda: PRESETS["tiny"])
    assert check.main(["ops", "--device", "cpu", "--json", str(tmp_path / "ops.json")]) == 1
    printed = capsys.readouterr().out
    assert "forecast from cpu" in printed and "1 operators fall back or are refused" in printed
    rows = json.loads((tmp_path / "ops.json").read_text("utf-8"))
    assert [(row["operator"], row["state"]) for row in rows] == [
        ("aten::special_bessel_j0", "falls back"),
        ("aten::cumsum", "kernel"),
    ]


def test_launches_are_not_counted_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(work, "deep_and_thin", lambda: PRESETS["tiny"])
    assert bench.main(["launches", "--device", "cpu", "--no-stock"]) == 1
    assert "use the emulated one: tests/npu/emulated covo-bench launches" in capsys.readouterr().err
