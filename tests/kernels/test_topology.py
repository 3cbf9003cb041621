"""Which processors lie beside a device: a system made of files, and what npu-smi prints."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from covo_npu.kernels import topology

# The shape of `npu-smi info` on a card of two chips, cut to what is read. Source: npu-smi reference, 910C.
SHOWN = """\
| 0     Ascend910           | OK            | 172.3       39                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          2869 / 65536         |
| 0     Ascend910           | OK            | -           37                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          2863 / 65536         |
"""


def npu(index: int) -> Any:
    """Return what torch.device("npu", index) is where torch_npu is installed."""
    return SimpleNamespace(type="npu", index=index)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with two chips on nodes 0 and 1, and an npu-smi that shows them."""
    for node, (chip, cpus) in enumerate((("0000:9d:00.0", "0-1,64"), ("0000:9f:00.0", "2-3,1000"))):
        for path, text in (
            (f"bus/pci/devices/{chip}/numa_node", node),
            (f"devices/system/node/node{node}/cpulist", cpus),
        ):
            (tmp_path / path).parent.mkdir(parents=True)
            (tmp_path / path).write_text(f"{text}\n")
    program = tmp_path / "npu-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{SHOWN}END\n")
    program.chmod(0o755)
    monkeypatch.setattr(topology, "SYSTEM", tmp_path)
    monkeypatch.setattr(topology.shutil, "which", lambda name: str(program))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(100)))
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_the_processors_of_a_chips_node_that_we_may_use(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert topology.near_cpus(npu(0)) == {0, 1, 64}
    assert topology.near_cpus(npu(1)) == {2, 3}  # not 1000: not ours
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1,0")
    assert topology.near_cpus(npu(0)) == {2, 3}


@pytest.mark.parametrize("index", [2, 7])
def test_a_chip_that_is_not_shown_has_none(machine: Path, index: int) -> None:
    assert topology.near_cpus(npu(index)) == set()


def test_nothing_is_told_without_npu_smi_or_a_node(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "bus/pci/devices/0000:9d:00.0/numa_node").write_text("-1\n")  # what the kernel says of one node
    assert topology.near_cpus(npu(0)) == set()
    monkeypatch.setattr(topology.shutil, "which", lambda name: None)
    assert topology.near_cpus(npu(1)) == set()
    assert topology.near_cpus(SimpleNamespace(type="cpu", index=None)) == set()
    (machine / "npu-smi").write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setattr(topology.shutil, "which", lambda name: str(machine / "npu-smi"))
    assert topology.near_cpus(npu(1)) == set()
