"""Choose the backend of a device, once, and say what was chosen."""

import importlib
import importlib.util
import logging
import re
from collections import Counter
from pathlib import Path
from typing import cast

import torch

from covo_npu.kernels.errors import BackendError
from covo_npu.kernels.interface import Kernels

# name: devices it serves
BACKENDS = {"npu": ("npu",), "native": ("cpu", "cuda"), "reference": ("cpu", "cuda", "npu")}
DEVICE_NAME = re.compile(r"(cpu)|(?:(cuda|npu)(?::(\d+))?)")
CPU_INFO = Path("/proc/cpuinfo")
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is Arm's
log = logging.getLogger(__name__)

FUNCTIONS = tuple(name for name in vars(Kernels) if not name.startswith("_") and callable(vars(Kernels)[name]))


def open_device(name: str) -> torch.device:
    """Return the device cpu, cuda:N or npu:N, ready for use; auto is the first of npu:0, cuda:0 and cpu that is there.

    Raises BackendError that says what is missing.
    """
    if name == "auto":
        return _best_device()
    match = DEVICE_NAME.fullmatch(name)
    if not match:
        raise BackendError(f"unknown device {name!r}; expected auto, cpu, cuda:N or npu:N")
    index = int(match[3] or 0)
    if match[2] == "npu":
        return cast(torch.device, importlib.import_module("covo_npu.kernels.npu").open_device(index))
    if match[2] == "cuda":
        if index >= torch.cuda.device_count():
            raise BackendError(
                f"device {name} is not there: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
            )
        return torch.device("cuda", index)
    return torch.device("cpu")


def _best_device() -> torch.device:
    if importlib.util.find_spec("torch_npu"):
        try:
            return open_device("npu:0")
        except BackendError as error:
            log.warning("torch_npu is installed but no NPU can be used: %s", error)
    return open_device("cuda:0" if torch.cuda.device_count() else "cpu")


def select(name: str | None, device: torch.device) -> Kernels:
    """Return the backend `name`, or the fastest one that serves `device` if name is None.

    An explicit name never falls back. Raises BackendError if the name is unknown, does not serve the device, or its
    libraries are missing.
    """
    if name is None:
        served = [candidate for candidate, devices in BACKENDS.items() if device.type in devices]
        if not served:
            raise BackendError(f"no backend serves device {device}; devices: cpu, cuda:N, npu:N")
        name = served[0]
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    if device.type not in BACKENDS[name]:
        raise BackendError(f"backend {name} serves {', '.join(BACKENDS[name])}, not {device}")
    return cast(Kernels, importlib.import_module(f"covo_npu.kernels.{name}"))


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device multiplies it faster than float32, else float32.

    A CPU does if it has instructions for it; where the system does not list them (/proc/cpuinfo), float32 is assumed.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.bfloat16
    try:
        words = set(CPU_INFO.read_text("utf-8").split())
    except OSError:
        return torch.float32
    return torch.bfloat16 if words & BF16_INSTRUCTIONS else torch.float32


def describe(kernels: Kernels) -> str:
    """Return e.g. "npu (12 npu, 3 native)": how many functions of a backend are its own and whose the others are.

    A function taken from PyTorch is the backend's own; one taken from another backend is a gap.
    """
    homes = {f"covo_npu.kernels.{name}": name for name in BACKENDS}
    owners = Counter(homes.get(getattr(kernels, function).__module__, kernels.name) for function in FUNCTIONS)
    counts = ", ".join(f"{count} {owner}" for owner, count in owners.most_common())
    return f"{kernels.name} ({counts})"
