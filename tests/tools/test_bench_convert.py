"""The conversion bench: it measures both, cleans up and says what it found."""

import json
from pathlib import Path

import pytest

from covo_npu.tools import bench, bench_convert, measure


def test_it_measures_both_and_leaves_nothing_behind(
    tiny_source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "scratch").mkdir()
    options = ["--src", str(tiny_source), "--scratch", str(tmp_path / "scratch"), "--runs", "1"]
    assert bench.main(["convert", *options, "--json", str(tmp_path / "report.json")]) == 0
    out = capfd.readouterr().out
    assert "| cp -r" in out and "| covo-convert" in out and "covo-convert / cp -r =" in out
    report = json.loads((tmp_path / "report.json").read_text())
    copied, converted = report["rows"]["cp -r"], report["rows"]["covo-convert"]
    assert (
        copied["bytes"]
        == report["source_bytes"]
        == sum(p.stat().st_size for p in tiny_source.rglob("*") if p.is_file())
    )
    assert converted["bytes"] > 12_000_000 and converted["peak_anonymous"] > 10_000_000
    assert report["ratio"] == pytest.approx(converted["seconds"]["median"] / copied["seconds"]["median"])
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(("ratio", "word"), [(1.25, "met"), (1.26, "missed")])
def test_the_verdict_follows_the_limit(ratio: float, word: str):
    row = {"seconds": measure.spread([2.0]), "durable_s": measure.spread([2.5]), "bytes": 10**9, "peak_anonymous": 0}
    report = {
        "source_bytes": 10**9,
        "source_cache": "cold",
        "rows": {"cp -r": row, "covo-convert": row},
        "ratio": ratio,
    }
    assert f"limit 1.25 {word}" in bench_convert._text(report)


def test_a_failed_conversion_fails_the_bench(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    assert bench.main(["convert", "--src", str(tmp_path / "source"), "--runs", "1"]) == 1
    err = capfd.readouterr().err
    assert "failed with exit code 1" in err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
