"""covo-check transfer: how fast the link to a device is, and what part of that a load reaches, in one run."""

from __future__ import annotations

import time

import torch

from covo_npu.kernels.device import accelerator, open_device
from covo_npu.kernels.topology import near_cpus
from covo_npu.runtime.checkpoint.format import BLOCK_BYTES, read_manifest
from covo_npu.runtime.checkpoint.loader import load_tensors
from covo_npu.tools.check.made_up import with_checkpoint
from covo_npu.tools.check.result import Finding, Result, Subject, check

COPIED_BYTES = 2**30
SLABS = 4
RUNS = 3


def pinned_bytes_per_s(device: torch.device) -> float:
    """Return the rate of copies of page-locked blocks of the loader's size to the device: the best of RUNS."""
    module = accelerator(device)
    slabs = [torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(SLABS)]
    targets = [torch.empty(BLOCK_BYTES, dtype=torch.uint8, device=device) for _ in range(SLABS)]
    for slab in slabs:
        slab.fill_(1)
    best = 0.0
    for _ in range(RUNS):
        module.synchronize(device)
        start = time.perf_counter()
        for number in range(COPIED_BYTES // BLOCK_BYTES):
            targets[number % SLABS].copy_(slabs[number % SLABS], non_blocking=True)
        module.synchronize(device)
        best = max(best, COPIED_BYTES / (time.perf_counter() - start))
    return best


def loaded_bytes_per_s(subject: Subject, device: torch.device, check: bool) -> float:
    """Return the rate of a load of all weights to the device: the best of RUNS, so from the page cache if it fits."""
    manifest = read_manifest(subject.require_ckpt())
    files = [name for name, file in manifest.files.items() if file.data_start is not None]
    rates = []
    for _ in range(RUNS):
        report = load_tensors(manifest, files, device, check=check).report
        rates.append(report.bytes / report.seconds)
    return max(rates)


def examine(subject: Subject) -> Result:
    """Return the findings. On the CPU nothing is transferred."""
    device = open_device(subject.options.device)
    if device.type == "cpu":
        return Result("transfer", str(device), (Finding("link", "nothing is transferred on the CPU"),))
    link = pinned_bytes_per_s(device)
    cpus = near_cpus(device)
    findings = [Finding("page-locked copies", f"{link / 1e9:.1f} GB/s")]
    with with_checkpoint(subject) as (named, says):
        for name, checked in (("load", True), ("load without checksums", False)):
            rate = loaded_bytes_per_s(named, device, checked)
            findings.append(Finding(name, f"{rate / 1e9:.1f} GB/s, {rate / link:.0%} of page-locked copies"))
    findings.append(Finding("readers", f"on {len(cpus)} processors beside the device" if cpus else "on any processor"))
    return Result("transfer", f"{device}; {says}", tuple(findings))


@check("transfer", ckpt=False)
def command(subject: Subject) -> Result:
    """Measure page-locked copies to the device and loads of the checkpoint, and their ratio.

    Without --ckpt a small checkpoint with random weights is made.
    """
    return examine(subject)
