"""What stands beside figures: the machine and tables."""

from covo_npu.tools import report


def test_table_is_padded_markdown():
    assert report.table(["row", "s"], [["stock", "1"], ["ours", "0.25"], ["a|b", "x\ny"]]).splitlines() == [
        "| row   | s    |",
        "|-------|------|",
        "| stock | 1    |",
        "| ours  | 0.25 |",
        "| a\\|b  | x y  |",
    ]


def test_machine_report_names_what_matters():
    found = report.machine_report()
    assert found["cores"] >= 1 and found["memory_bytes"] > 1e9 and "torch" in found["packages"]
    line = report.machine_line(found)
    assert found["device"] == "cpu" and line.startswith("cpu | ") and f"{found['cores']} cores" in line
