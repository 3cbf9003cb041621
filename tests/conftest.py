"""Fixtures that all folders share: the reference pack, and its checkpoint converted through the command line, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from covo_npu.runtime.checkpoint.format import INT8

DATA = Path(__file__).parent / "data"

# A shell starts background jobs with SIGINT ignored, and their children inherit that: those that tests interrupt too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the runtime's tests: cpu, cuda:0, npu:0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow ones first: of processes that test side by side none then works at the end while others wait."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def threads_put_back() -> Iterator[None]:
    """A test that changes how many threads PyTorch has, by --threads for one, changes them for itself alone: with
    another number sums run in another order."""
    usual = torch.get_num_threads()
    yield
    torch.set_num_threads(usual)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device that the runtime's tests run on."""
    return str(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def tiny_source() -> Path:
    """The tiny source checkpoint, in upstream's layout."""
    return DATA / "covo-tiny"


@pytest.fixture(scope="session")
def convert_tiny(tmp_path_factory: pytest.TempPathFactory, tiny_source: Path) -> Callable[..., Path]:
    """A function: dtype or word of INT8, ranks -> folder of the tiny checkpoint converted for them, once for all tests.

    Do not write there. With COVO_TEST_CONVERTED in the environment they are made and kept in that folder, for several
    runs to share.
    """
    done: dict[str, Path] = {}

    def convert(dtype: str = "float32", tp: int = 1) -> Path:
        name = dtype if tp == 1 else f"{dtype}-tp{tp}"
        if name not in done:
            kept = os.environ.get("COVO_TEST_CONVERTED")
            target = (Path(kept) if kept else tmp_path_factory.mktemp("converted")) / name
            if target.exists():
                done[name] = target
                return target
            command = [Path(sys.executable).with_name("covo-convert"), "--src", tiny_source, "--dst", target]
            option = "--weights" if dtype in INT8 else "--dtype"
            subprocess.run([*command, option, dtype, "--tp", str(tp)], check=True, capture_output=True)
            done[name] = target
        return done[name]

    return convert


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """A function: name -> arrays of tests/data/golden/<name>.npz, computed by upstream's code on the CPU."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(DATA / "golden" / f"{name}.npz") as arrays:
            return {key: arrays[key] for key in arrays.files}

    return load


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """tmp_path, where that is on a disk: files of a file system in memory have no page cache to be dropped from."""
    mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    places = {Path(mount.split()[4]): kind.split()[0] for mount, kind in mounts}
    place = next(place for place in (tmp_path, *tmp_path.parents) if place in places)
    if places[place] in ("tmpfs", "ramfs"):
        pytest.skip(f"{place} is in memory: set TMPDIR to a folder on a disk")
    return tmp_path
