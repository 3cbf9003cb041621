"""covo-check doctor: what will run on this machine, what will not, and what to do about it.

Imports nothing that may be broken: PyTorch and its plug-ins are tried in processes of their own (doctor_probes.py).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from covo_npu.tools.check_result import (
    Finding,
    Result,
    Subject,
    ckpt_option,
    device_option,
    json_option,
    show,
    verbose_option,
)

LIMIT_S = 120  # the first import of torch_npu takes half a minute on a cold disk
MIN_PYTHON, MIN_TORCH = (3, 10), (2, 6)
REPLY_BYTES = 64 * 2**20  # what a long dialogue writes
ACTIVATION_BYTES = 3 * 10**9  # beside the weights on a device: KV cache of 8192 tokens, activations, the vocoder
ASCEND = Path("/usr/local/Ascend")

# What stands in the last lines of a failed import -> what to do. First match wins; {set_env}: where it was found.
FIXES = (
    (
        r"lib(hccl|ascend\w*|acl\w*|runtime|ge_\w*|graph\w*|opapi|msprofiler)\S*\.so",
        "run `source {set_env}` in this shell, then try again: CANN's libraries are not on the library path",
    ),
    (
        r"undefined symbol|ABI",
        "install a matching pair, for instance torch 2.9.0 with torch_npu 2.9.0: it was built for another PyTorch",
    ),
    (
        r"lib(cuda|cudart|cublas|cudnn|nccl)\S*\.so",
        "install PyTorch again, for the CUDA version of this machine's driver",
    ),
    (r"No module named '?(\w+)", "pip install {module}"),
    (
        r"Permission denied|aclInit|507\d{3}|drvErr|dcmi",
        "may this user open /dev/davinci*? Inside a container, pass the devices and the driver's folder through",
    ),
    (r"out of memory|Cannot allocate", "free memory: stop other programs on this machine or device"),
)


@dataclass(frozen=True, slots=True)
class Probe:
    """What a process of its own found out; None, and why, if it failed."""

    found: Mapping[str, Any] | None
    reason: str = ""


def probe(name: str, environment: Mapping[str, str] | None = None) -> Probe:
    """Return what doctor_probes.<name> says in a process of its own, whatever becomes of that process."""
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []
    command = [sys.executable, *safe_path, "-m", "covo_npu.tools.doctor_probes", name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, **(environment or {})}
        )
    except subprocess.TimeoutExpired:
        return Probe(None, f"no answer within {LIMIT_S} s")
    if done.returncode < 0:
        return Probe(None, f"the process died of {signal.Signals(-done.returncode).name}")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode:
        return Probe(None, _shortened(lines[-1] if lines else f"exit code {done.returncode}"))
    try:
        return Probe(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return Probe(None, f"no answer: {_shortened(done.stdout)!r}")


def fix_for(reason: str) -> str:
    """Return what to do about a failed import, "" if nothing is known."""
    for pattern, advice in FIXES:
        if match := re.search(pattern, reason):
            return advice.format(set_env=set_env_script(), module=match[1] if match.groups() else "")
    return ""


def set_env_script() -> str:
    """Return where CANN's set_env.sh lies, its usual place if none is found."""
    homes = [Path(value) for key in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if (value := os.environ.get(key))]
    places = [home / "set_env.sh" for home in homes]
    places += [place for pattern in ("*/set_env.sh", "set_env.sh") for place in sorted(ASCEND.glob(pattern))]
    return str(next((place for place in places if place.is_file()), ASCEND / "ascend-toolkit" / "set_env.sh"))


def examine(subject: Subject, run: Callable[..., Probe] = probe) -> Result:
    """Return what will and what will not run. run: `probe`, or a stand-in for tests."""
    torch = run("torch")
    findings = [_python(), *_packages(run("packages"))]
    findings += _torch(torch, run)
    devices = {"cpu": torch.found is not None}
    for kind, look in (("npu", _npu), ("cuda", _cuda)):
        rows, devices[kind] = look(run, subject.device)
        findings += rows
    needed, checkpoint = _checkpoint(subject.ckpt)
    findings += [*_memory(needed), *_disk(), *checkpoint]
    findings += _verdict(subject, devices, findings)
    return Result("doctor", f"this machine, device {subject.device}", tuple(findings))


# --- Python and its packages


def _python() -> Finding:
    found = sys.version.split()[0]
    holds = sys.version_info >= MIN_PYTHON
    return Finding(
        "Python", found, "at least 3.10", "", holds, "" if holds else "make a virtual environment of a newer Python"
    )


def _packages(found: Probe) -> list[Finding]:
    if found.found is None:
        return [Finding("packages", found.reason, "can be imported", "", False, fix_for(found.reason))]
    findings = []
    for name, says in found.found.items():
        broken = says.startswith("!")
        fix = f"pip install --force-reinstall {name}" if broken else ""
        findings.append(Finding(name, _shortened(says.removeprefix("! ")), "can be imported", "", not broken, fix))
    optional = "installed" if find_spec("transformers") else "not installed"
    needed_for = "only covo-convert wants it, of sources without tokenizer.json: pip install 'covo-npu[convert]'"
    return [*findings, Finding("transformers", optional, needed_for)]


def _torch(torch: Probe, run: Callable[..., Probe]) -> list[Finding]:
    bound = f"at least {'.'.join(map(str, MIN_TORCH))}, can be imported and computes"
    if torch.found is None:
        fix = fix_for(torch.reason) or "pip install --force-reinstall torch"
        if find_spec("torch_npu") and run("torch", {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}).found:
            fix = (
                f"{fix_for(torch.reason) or 'torch_npu breaks it'}; or, for the CPU alone, "
                "`export TORCH_DEVICE_BACKEND_AUTOLOAD=0` or `pip uninstall torch_npu`"
            )
        return [Finding("torch", torch.reason, bound, "", False, fix)]
    says = torch.found
    holds = _numbers(says["version"]) >= MIN_TORCH and bool(says["works"])
    return [
        Finding("torch", says["version"], bound, "", holds, "" if holds else "pip install --upgrade torch"),
        Finding("processor", f"{len(os.sched_getaffinity(0))} cores, {says['threads']} threads, {says['capability']}"),
    ]


# --- accelerators: (findings, whether it can be used)


def _npu(run: Callable[..., Probe], wanted: str) -> tuple[list[Finding], bool]:
    nodes, library = sorted(Path("/dev").glob("davinci[0-9]*")), find_spec("torch_npu")
    home = os.environ.get("ASCEND_HOME_PATH")
    if not nodes and not library and not home and not wanted.startswith("npu"):
        return [Finding("NPU", "none: no /dev/davinci*, no torch_npu, no CANN")], False
    findings = [
        Finding(
            "NPU driver",
            f"{len(nodes)} devices /dev/davinci*, version {_driver_version()}",
            "",
            "",
            bool(nodes),
            "" if nodes else "install the driver; inside a container pass the devices through",
        ),
        Finding(
            "CANN",
            f"ASCEND_HOME_PATH={home or ''}, version {_cann_version(home)}",
            "set_env.sh was sourced",
            "",
            bool(home),
            "" if home else f"run `source {set_env_script()}`",
        ),
    ]
    if not library:
        return [
            *findings,
            Finding(
                "torch_npu",
                "not installed",
                "installed",
                "",
                False,
                "pip install torch_npu of the same version as torch",
            ),
        ], False
    answer = run("npu")
    if answer.found is None:
        fix = fix_for(answer.reason) or "install the torch_npu that belongs to this torch and CANN"
        return [*findings, Finding("torch_npu", answer.reason, "can be imported", "", False, fix)], False
    says = answer.found
    pair = _numbers(says["torch"]) == _numbers(says["torch_npu"])
    findings.append(
        Finding(
            "torch_npu",
            f"{says['torch_npu']} with torch {says['torch']}",
            "the same version",
            "",
            pair,
            "" if pair else f"pip install torch_npu=={'.'.join(map(str, _numbers(says['torch'])))}.*",
        )
    )
    usable = _usable("NPU", says)
    return [*findings, usable], usable.holds is True and pair


def _cuda(run: Callable[..., Probe], wanted: str) -> tuple[list[Finding], bool]:
    if not Path("/dev/nvidiactl").exists() and not wanted.startswith("cuda"):
        return [Finding("CUDA", "none: no /dev/nvidiactl")], False
    answer = run("cuda")
    if answer.found is None:
        fix = fix_for(answer.reason) or "install PyTorch again, for the CUDA version of the driver"
        return [Finding("CUDA", answer.reason, "a product is right", "", False, fix)], False
    usable = _usable("CUDA", answer.found)
    return [usable], usable.holds is True


def _usable(name: str, says: Mapping[str, Any]) -> Finding:
    if not says["count"]:
        fix = "is the device visible (ASCEND_RT_VISIBLE_DEVICES, CUDA_VISIBLE_DEVICES), is torch built for it?"
        return Finding(name, "no device can be used", "at least 1", "", False, fix)
    memory = f"{says['free'] / 1e9:.1f} of {says['total'] / 1e9:.1f} GB free"
    fix = "" if says["works"] else "the device computes wrongly: restart it, then ask its maker"
    return Finding(
        name, f"{says['count']} x {says['name']}, {memory}", "a product is right", "", bool(says["works"]), fix
    )


def _driver_version() -> str:
    return _field(ASCEND / "driver" / "version.info", "Version")


def _cann_version(home: str | None) -> str:
    infos = sorted(Path(home).glob("*/ascend_toolkit_install.info")) if home else []
    return _field(infos[0], "version") if infos else "unknown"


def _field(path: Path, key: str) -> str:
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return "unknown"
    return next((line.partition("=")[2].strip() for line in lines if line.lower().startswith(key.lower())), "unknown")


# --- memory, disk, checkpoint


def _memory(needed: int) -> list[Finding]:
    available = _available_memory()
    if not needed:
        return [Finding("memory", f"{available / 1e9:.1f} GB available")]
    fits = available > needed + ACTIVATION_BYTES
    advice = "" if fits else "on the CPU it will run at the speed of the disk; close other programs, or use a device"
    bound = f"{needed / 1e9:.1f} GB of weights in the page cache on the CPU"
    return [Finding("memory", f"{available / 1e9:.1f} GB available", bound, "", None, advice)]


def _disk() -> list[Finding]:
    """The working folder, where replies are written by default, and the folder of temporary files."""
    findings = []
    for name, folder in (("working folder", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        fix = "free some space, or write elsewhere (covo-run --output FOLDER; TMPDIR)"
        try:
            free = shutil.disk_usage(folder).free
            with tempfile.TemporaryFile(dir=folder) as file:  # quotas and read-only disks show only when one writes
                file.write(bytes(2**20))
        except OSError as error:
            findings.append(Finding(name, f"cannot be written: {error.strerror}", "can be written", "", False, fix))
            continue
        holds = free >= REPLY_BYTES
        bound = f"at least {REPLY_BYTES / 1e6:.0f} MB"
        findings.append(Finding(name, f"{free / 1e9:.1f} GB free", bound, "", holds, "" if holds else fix))
    return findings


def _checkpoint(folder: Path | None) -> tuple[int, list[Finding]]:
    """Return (bytes of the weights, findings)."""
    if folder is None:
        return 0, [Finding("checkpoint", "not named: give --ckpt to look at one")]
    try:
        from covo_npu.kernels.errors import CovoError  # its reader needs xxhash, which may be what is missing
        from covo_npu.runtime.checkpoint import read_manifest
    except ImportError as error:
        return 0, [Finding("checkpoint", str(error), "can be read", "", False, fix_for(str(error)))]
    try:
        manifest = read_manifest(folder)
    except CovoError as error:
        return 0, [Finding("checkpoint", str(error), "complete, of this version", "", False, "see the message")]
    weights = [file for file in manifest.files.values() if file.data_start is not None]
    size = sum(file.bytes for file in weights)
    cached = sum(cached_bytes(file.path) for file in weights)
    speech = "text and speech" if manifest.config.token2wav else "text only"
    return size, [
        Finding(
            "checkpoint",
            f"layout {manifest.layout_version}, {manifest.dtype}, {size / 1e9:.2f} GB, {speech}",
            "manifest, headers and sizes agree",
            "",
            True,
        ),
        Finding(
            "page cache",
            f"{100 * cached / max(size, 1):.0f} % of the weights are in memory",
            "0 %: the next load reads the disk; checksums: covo-check ckpt",
        ),
    ]


def cached_bytes(path: Path) -> int:
    """Return how many bytes of a file lie in the page cache, 0 where the system does not say."""
    size = path.stat().st_size
    if not size:
        return 0
    pages = -(-size // mmap.PAGESIZE)
    present = (ctypes.c_ubyte * pages)()
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view,
    ):
        first = ctypes.c_char.from_buffer(view)
        done = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), present)
        del first  # the mapping cannot be closed while it is looked at
    return 0 if done else min(size, sum(byte & 1 for byte in present) * mmap.PAGESIZE)


def _available_memory() -> float:
    lines = _read_lines(Path("/proc/meminfo"))
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")), float("nan"))


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except OSError:
        return []


# --- what follows from it


def _verdict(subject: Subject, devices: Mapping[str, bool], findings: list[Finding]) -> list[Finding]:
    """Return what will run. The device that was asked for must; auto takes the first that can be used."""
    broken = [finding.name for finding in findings if finding.holds is False]
    hosts = {"Python", "packages", "torch", "checkpoint", *_required()}
    blocking = [name for name in broken if name in hosts]
    wanted = subject.device.partition(":")[0]
    rows = []
    for device in ("npu", "cuda", "cpu"):
        runs = devices[device] and not blocking
        asked = wanted == device or (wanted == "auto" and device == "cpu")
        why = f"will not run: {', '.join(blocking) or 'no such device that can be used'}"
        rows.append(
            Finding(f"covo-run --device {device}", "will run" if runs else why, "", "", runs if asked else None)
        )
    return rows


def _required() -> tuple[str, ...]:
    from covo_npu.tools.doctor_probes import REQUIRED

    return REQUIRED


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


@click.command("doctor")
@ckpt_option(required=False)
@device_option
@json_option
@verbose_option
def command(ckpt: Path | None, device: str, as_json: bool, **options: Any) -> int:
    """Say what will run on this machine and what will not, with the fix.

    Works where something is broken. Exit code 0 if nothing that was found is broken and the device can be used.
    """
    return show(examine(Subject(ckpt, None, device)), as_json)
