"""Choose the backend of a device, once, and say what was chosen."""

import importlib.util
import logging
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch

from covo_npu.kernels.cpu import CPU, library
from covo_npu.kernels.cpu.choice import Choice, measure
from covo_npu.kernels.errors import BackendError
from covo_npu.kernels.interface import Kernels

if TYPE_CHECKING:  # each module has all functions of the protocol, with its signatures
    from covo_npu.kernels import cuda, native, npu, reference

    _: tuple[Kernels, ...] = (cuda, native, npu, reference)

# name: devices it serves
BACKENDS = {
    "npu": ("npu",),
    "cuda": ("cuda",),
    "cpu": ("cpu",),
    "native": ("cpu", "cuda"),
    "reference": ("cpu", "cuda", "npu"),
}
log = logging.getLogger(__name__)

FUNCTIONS = tuple(name for name in vars(Kernels) if not name.startswith("_") and callable(vars(Kernels)[name]))


def select(
    name: str | None,
    device: torch.device,
    weights: Iterable[tuple[int, int, torch.dtype]] = (),
    products: str | None = None,
) -> Kernels:
    """Return the backend `name`, or the fastest one that serves `device` if name is None.

    weights: N, K and dtype of those that will be multiplied; the backend cpu measures what is fastest for the large
    ones, unless products names the implementation, covo or pytorch. Other backends have one way to multiply.
    An explicit name never falls back. Raises BackendError if the name is unknown, does not serve the device, or its
    libraries are missing, or if products are named for a backend without a choice.
    """
    if name is None:
        served = [candidate for candidate, devices in BACKENDS.items() if device.type in devices]
        if not served:
            raise BackendError(f"no backend serves device {device}; devices: cpu, cuda:N, npu:N")
        name = served[0]
        if reason := missing(name):
            log.warning("the backend native serves: %s", reason)
            name = "native"
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    if device.type not in BACKENDS[name]:
        raise BackendError(f"backend {name} serves {', '.join(BACKENDS[name])}, not {device}")
    if name == "cpu":
        return CPU(Choice.unmeasured(products) if products else measure(weights))
    if products:
        raise BackendError(f"backend {name} has one way to multiply: leave out --products {products}")
    return cast(Kernels, importlib.import_module(f"covo_npu.kernels.{name}"))


def missing(name: str) -> str | None:
    """Return why a backend for which native can serve is not there, None if it is or if native cannot."""
    if name == "cuda" and not importlib.util.find_spec("triton"):
        return "Triton, which PyTorch's CUDA builds bring, is not installed"
    return library.missing() if name == "cpu" else None


def describe(kernels: Kernels) -> str:
    """Return e.g. "npu (12 npu, 3 native)": how many functions of a backend are its own and whose the others are.

    A function taken from PyTorch is the backend's own; one taken from another backend is a gap.
    """
    homes = {f"covo_npu.kernels.{name}": name for name in BACKENDS}
    owners = Counter(homes.get(getattr(kernels, function).__module__, kernels.name) for function in FUNCTIONS)
    counts = ", ".join(f"{count} {owner}" for owner, count in owners.most_common())
    return f"{kernels.name} ({counts})"
