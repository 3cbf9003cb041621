"""What the networks of one process stand on: device, kernels, dtype, and the weights on their devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from covo_npu.kernels.device import DeviceCapture, device_capture
from covo_npu.kernels.errors import BackendError
from covo_npu.kernels.interface import Kernels
from covo_npu.kernels.select import select
from covo_npu.runtime.checkpoint.format import CheckpointError, Manifest, read_manifest
from covo_npu.runtime.checkpoint.loader import Weights, load_tensors
from covo_npu.runtime.networks.files import LLM_PREFIX
from covo_npu.runtime.options import LoadOptions


@dataclass(frozen=True, slots=True)
class Ground:
    """A device and what is chosen for it. nz: brings a network's weights into NZ; None where that is not asked for."""

    device: torch.device
    kernels: Kernels
    dtype: torch.dtype
    capture: DeviceCapture | None
    nz: Callable[[nn.Module], Any] | None

    def cast_nz(self, network: nn.Module, weights: Weights, file: str) -> None:
        """Bring the weights of a file's network into NZ, where that is asked for. Each goes when it is cast."""
        if self.nz:
            weights.release(file)
            self.nz(network)


def open_manifest(path: str | os.PathLike[str], tp: int) -> Manifest:
    """Return the manifest of a checkpoint for `tp` ranks. Raises CheckpointError."""
    manifest = read_manifest(path)
    if (found := len(manifest.ranks)) != tp:
        raise CheckpointError(
            f"{Path(path)}: converted for {found} tensor-parallel rank{'s' * (found > 1)}, asked for {tp}: load it "
            f"with --tp {found}, or convert the source with --tp {tp}"
        )
    return manifest


def prepare(manifest: Manifest, options: LoadOptions, device: torch.device) -> Ground:
    """Return what the networks on a device stand on. Raises BackendError."""
    dtype: torch.dtype = getattr(torch, options.dtype or manifest.dtype)
    kernels = select(options.backend, device, multiplied(manifest, dtype), options.products)
    capture = device_capture(options.graph, device)
    cast_nz = getattr(kernels, "cast_weights_nz", None)
    if options.nz and cast_nz is None:
        raise BackendError(f"weights in the format NZ are for device npu, found {device}: leave out --nz")
    return Ground(device, kernels, dtype, capture, cast_nz if options.nz else None)


def multiplied(manifest: Manifest, dtype: torch.dtype) -> list[tuple[int, int, torch.dtype]]:
    """Return N, K and dtype of the weights that a decoded token multiplies. dtype: of those that are not in 8 bits."""
    tensors = manifest.files[manifest.ranks[0]].tensors
    return [
        (*tensor.shape, torch.int8 if tensor.dtype == "I8" else dtype)
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2 and not name.startswith(f"{LLM_PREFIX}embed_tokens")
    ]


def kernels_of(device: torch.device, ground: Ground) -> Kernels:
    """Return the kernels of a device that may be another than the LLM's: a backend that is named is for the latter."""
    return ground.kernels if device.type == ground.device.type else select(None, device)


def load_weights(manifest: Manifest, files: Mapping[str, torch.device], options: LoadOptions) -> Weights:
    """Return the weights of files on their devices. files: in the order of use. Raises CheckpointError."""
    places: dict[torch.device, list[str]] = {}
    for name, device in files.items():
        places.setdefault(device, []).append(name)
    loads = [
        load_tensors(manifest, names, device, mode=options.load, check=options.check)  # type: ignore[arg-type]
        for device, names in places.items()
    ]
    return reduce(Weights.beside, loads)
