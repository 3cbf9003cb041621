"""How many operators each stage of the real depth launches and how often the host waits: counts, held exactly."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from emulation import device

from covo_npu.kernels import native, npu
from covo_npu.kernels.errors import BackendError
from covo_npu.tools import bench_launches, work
from covo_npu.tools.launches import Recorder, count
from covo_npu.tools.synth_config import PRESETS


@pytest.fixture(scope="module")
def subject() -> work.Subject:
    return work.made_up("npu:0")


@pytest.fixture(scope="module")
def rows(subject: work.Subject) -> dict[str, bench_launches.Row]:
    return {row.stage: row for row in bench_launches.measure(subject)}


def test_every_stage_keeps_to_its_budget(rows: dict[str, bench_launches.Row]) -> None:
    assert {name: row.budget for name, row in rows.items() if row.budget and name != "vocoder"} == {
        "prefill": 14 * 28 + 30,
        "decode": 12 * 28 + 20,
        "flow matching": 16 * 12 + 12,
    }
    assert all(row.holds for row in rows.values()), rows


def test_a_decoded_token_waits_once_and_nothing_before_it_waits(rows: dict[str, bench_launches.Row]) -> None:
    waits = {name: row.waits for name, row in rows.items() if name != "flow set-up"}
    assert waits == {name: int(name.startswith("decode")) for name in waits}


def test_the_stock_path_is_counted_in_the_same_run(rows: dict[str, bench_launches.Row]) -> None:
    stock = {name: row.stock_launches for name, row in rows.items() if row.stock_launches}
    assert set(stock) == {"encode", "prefill", "decode", "flow matching", "vocoder"}
    assert stock["decode"] > 1000
    assert all(rows[name].launches < launches for name, launches in stock.items())
    assert 2 * rows["vocoder"].launches <= stock["vocoder"]


def test_a_kernel_that_wastes_launches_breaks_the_budget(
    subject: work.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npu, "swiglu", native.swiglu)
    monkeypatch.setattr(npu, "rotary", native.rotary)
    wasteful = {row.stage: row for row in bench_launches.measure(subject, with_stock=False)}
    assert not wasteful["decode"].holds and not wasteful["prefill"].holds and not wasteful["flow matching"].holds


def test_a_recorder_sees_the_waits_that_the_device_logs() -> None:
    stages = work.Work(work.made_up("npu:0", PRESETS["tiny"])).stages()
    decode = next(stage for stage in stages if stage.name == "decode, sampled")
    x = torch.ones(3, device="npu:0")
    for run in (lambda: x.nonzero(), lambda: x.sum().item(), lambda: x.cpu(), lambda: x.cpu() + x.cpu()):
        with torch.no_grad(), device.log.recording() as log, Recorder() as recorder:
            run()
        assert recorder.waits == len(log.synchronisations) > 0
    with torch.no_grad():
        decode.run()
        found = count(decode.run, torch.device("npu:0"))
        assert (found.waits, found.source) == (1, "emulated device") and found.launches > 0


def test_other_devices_are_refused_with_the_way_out() -> None:
    with pytest.raises(BackendError, match="tests/npu/emulated covo-bench launches"):
        count(lambda: None, torch.device("cpu"))


def test_the_table_names_what_exceeds(rows: dict[str, bench_launches.Row]) -> None:
    module: ModuleType = bench_launches
    over = module.Row("decode", "one token", 357, 1, 356, 1171, 1)
    assert not over.holds and "over budget" in module.as_text([over], "test")
    assert not module.Row("decode", "one token", 356, 2, 356, 1171, 1).holds  # it waits twice
    assert "over budget" not in module.as_text(list(rows.values()), "test")
