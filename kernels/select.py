"""Choose the backend of a device, once, and say what was chosen."""

import importlib
from collections import Counter
from typing import cast

import torch

from covo_npu.kernels.errors import BackendError
from covo_npu.kernels.interface import Kernels

# name: devices it serves
BACKENDS = {"npu": ("npu",), "native": ("cpu", "cuda"), "reference": ("cpu", "cuda", "npu")}
FUNCTIONS = tuple(name for name in vars(Kernels) if not name.startswith("_") and callable(vars(Kernels)[name]))


def select(name: str | None, device: torch.device) -> Kernels:
    """Return the backend `name`, or the fastest one that serves `device` if name is None. An explicit name never falls back.

    Raises BackendError if the name is unknown, does not serve the device, or its libraries are missing.
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


def describe(kernels: Kernels) -> str:
    """Return e.g. "npu (12 npu, 3 native)": how many functions of a backend are its own and whose the others are."""
    owners = Counter(getattr(kernels, function).__module__.rpartition(".")[2] for function in FUNCTIONS)
    counts = ", ".join(f"{count} {owner}" for owner, count in owners.most_common())
    return f"{kernels.name} ({counts})"
