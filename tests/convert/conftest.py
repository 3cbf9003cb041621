"""Copies of the tiny source that a test may damage, and conversion in this process."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from covo_npu.convert.cli import main


@dataclass
class Outcome:
    """What covo-convert ended with."""

    code: int
    out: str
    err: str


@pytest.fixture
def source(tiny_source: Path, tmp_path: Path) -> Path:
    """A copy of the tiny source; its files may be changed."""
    target = tmp_path / "source"
    shutil.copytree(tiny_source, target, copy_function=shutil.copyfile)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


@pytest.fixture
def convert(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """A function: (source, *options, dst=) -> Outcome of covo-convert, by default into tmp_path / "target"."""

    def run(src: Path, *options: str, dst: Path | None = None) -> Outcome:
        capfd.readouterr()
        code = main(["--src", str(src), "--dst", str(dst or tmp_path / "target"), *options])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
