"""Which processors lie beside a device, where the system tells: what they read for it takes the shortest way."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

SYSTEM = Path("/sys")
BUS_ID = re.compile(r"\b[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-7]\b")
NPU_SMI_SECONDS = 10


def near_cpus(device: torch.device) -> set[int]:
    """Return the processors on the NUMA node of a device that this process may use; none where that is not known."""
    bus_id = {"npu": _npu_bus_id, "cuda": _cuda_bus_id}.get(device.type, lambda index: "")(device.index or 0)
    node = _line(SYSTEM / "bus/pci/devices" / bus_id.lower() / "numa_node") if bus_id else ""
    cpus = _line(SYSTEM / f"devices/system/node/node{node}/cpulist") if node.isdigit() else ""  # "-1": not known
    return numbers(cpus) & os.sched_getaffinity(0)


def numbers(ranges: str) -> set[int]:
    """Return the numbers of a list like 0-3,8. Source: kernel.org, cputopology."""
    parts = [part.partition("-") for part in ranges.split(",") if part]
    return {number for low, _, high in parts for number in range(int(low), int(high or low) + 1)}


def _npu_bus_id(index: int) -> str:
    """Return the PCI address that npu-smi shows for the device, "" if it does not. Chips stand there in their order."""
    program = shutil.which("npu-smi")
    if program is None:
        return ""
    try:
        shown = subprocess.run([program, "info"], capture_output=True, text=True, timeout=NPU_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    chips = BUS_ID.findall(shown.stdout)
    visible = [int(part) for part in re.findall(r"\d+", os.environ.get("ASCEND_RT_VISIBLE_DEVICES", ""))]
    number = visible[index] if index < len(visible) else index
    return chips[number] if number < len(chips) else ""


def _cuda_bus_id(index: int) -> str:
    found: Any = torch.cuda.get_device_properties(index)
    parts = [getattr(found, f"pci_{part}_id", -1) for part in ("domain", "bus", "device")]
    return "" if -1 in parts else "{:04x}:{:02x}:{:02x}.0".format(*parts)


def _line(path: Path) -> str:
    try:
        return path.read_text("ascii").strip()
    except OSError:
        return ""
