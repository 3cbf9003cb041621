"""covo-bench load on the tiny checkpoint: every row ends in the same first token, and every figure is there."""

import json

import pytest
from click.testing import CliRunner

from covo_npu.tools.bench import cli as bench
from covo_npu.tools.bench import load as bench_load
from covo_npu.tools.bench.load import Start, summaries, verdicts
from covo_npu.tools.bench.load_rows import Moments


@pytest.mark.slow
def test_all_rows_on_the_tiny_checkpoint(tiny_source, convert_tiny, tmp_path):
    rows = ["stock", "from_pretrained", "ours", "ours_eager"]
    report = tmp_path / "load.json"
    arguments = ["load", "--src", str(tiny_source), "--ckpt", str(convert_tiny("bfloat16")), "--runs", "1"]
    arguments += ["--device", "cpu", "--json", str(report), *(f"--row={row}" for row in rows)]
    result = CliRunner().invoke(bench.command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "all rows chose the same first token" in result.output
    assert all(f"| {row} " in result.output for row in rows)
    found = json.loads(report.read_text())
    assert list(found["runs"]) == rows
    for row in rows:
        run = found["runs"][row][0]
        assert 0 < run["imports_s"] < run["ready_s"] < run["first_token_s"]
        assert run["imports_s"] + run["init_s"] + run["weights_s"] < run["ready_s"] + 0.1
        assert run["bytes"] > 12e6
        assert run["peak_resident"] > run["peak_anonymous"] > 50e6
    assert {"disk read", "page cache copy", "memory copy"} <= found["floors_bytes_per_s"].keys()
    assert found["summary"]["stock"]["ready_s"]["runs"] == 1


def run(**figures) -> Start:
    return Start(**{**dict.fromkeys(Start.__slots__, 1), **figures})


def test_verdicts_compare_medians_and_floors():
    rows = {
        "stock": summaries([run(ready_s=200.0, first_token_s=240.0)]),
        "ours": summaries([run(ready_s=2.0, first_token_s=12.0), run(ready_s=4.0, first_token_s=12.0)]),
    }
    floor = {"page cache copy": 12e9, "pinned host to device": 4.0}
    said = verdicts(rows, floor, 9e9)
    assert said[0] == "ours against stock: ready 66.7 times faster, first token in 0.05 of its time"
    assert "all rows chose the same first token" in said
    assert "ours, eager and verified, one warm file: 9.0 GB/s, 0.75 of the page cache copy" in said
    assert "ours moved bytes at 0.25 of pinned host to device" in said
    rows["stock"] = summaries([run(token=7)])
    assert "all rows chose the same first token" not in verdicts(rows, floor, 9e9)


def test_rows_take_turns_and_stock_is_measured_less_often(monkeypatch):
    order = []
    monkeypatch.setattr(bench_load, "measure_row", lambda task, cold, first: order.append((task.row, first)) or run())
    tasks = [bench_load.Task(row, "", "", "cpu", True) for row in ("stock", "ours")]
    results = bench_load.measure_rows(tasks, runs=2, stock_runs=1, cold=False)
    assert order == [("stock", True), ("ours", True), ("ours", False)]
    assert {row: len(found) for row, found in results.items()} == {"stock": 1, "ours": 2}


def test_a_warm_run_follows_a_start_that_is_not_counted_and_a_cold_one_does_not(monkeypatch):
    done = []
    moments = dict.fromkeys(Moments.__slots__, 1.0)

    def in_own_process(module, task, environment):
        done.append((json.loads(task)["row"], json.loads(task)["first_token"]))
        return bench_load.measure.Measured(float(len(done)), {**moments, "weights": 3.0}, 0.0, 0, 0)

    monkeypatch.setattr(bench_load.measure, "in_own_process", in_own_process)
    monkeypatch.setattr(bench_load.measure, "drop_page_cache", lambda folder: done.append(f"{folder} dropped"))
    monkeypatch.setattr(bench_load.measure, "fill_page_cache", lambda folder: done.append(f"{folder} read"))
    stock, ours = (bench_load.Task(row, "src", "ckpt", "cpu", True) for row in ("stock", "ours"))
    bench_load.measure_row(ours, cold=False, first=True)
    assert done == ["src dropped", "ckpt read", ("ours", True), ("ours", True)]
    done.clear()
    assert bench_load.measure_row(ours, cold=False, first=False).ready_s == 1.0 - 4  # the moment the second one began
    assert done == ["src dropped", "ckpt read", ("ours", False), ("ours", True)]
    done.clear()
    bench_load.measure_row(stock, cold=False, first=False)
    assert done == ["ckpt dropped", "src read", ("from_pretrained", False), ("stock", True)]
    done.clear()
    bench_load.measure_row(ours, cold=True, first=True)
    assert done == ["src dropped", "ckpt dropped", ("ours", True)]


def test_help_lists_the_benches_without_importing_them():
    result = CliRunner().invoke(bench.command, ["--help"])
    assert all(name in result.output for name in bench.BENCHES)
    assert CliRunner().invoke(bench.command, ["nonsense"]).exit_code == 2
