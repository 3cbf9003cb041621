"""covo-check doctor: what will run on this machine, what will not, and what to do about it.

PyTorch, its plug-ins and the packages are tried in processes of their own (probes.py): they may be broken.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from covo_npu.runtime.checkpoint.memory import available_memory_bytes
from covo_npu.runtime.process import module_command
from covo_npu.tools.check.probes import REQUIRED
from covo_npu.tools.check.result import Finding, Result, Subject, check

LIMIT_S = 120  # the first import of torch_npu takes half a minute on a cold disk
MIN_TORCH = (2, 6)
REPLY_BYTES = 64 * 2**20  # what a long dialogue writes
TORCH_NPU_OF_CANN = {  # the first is the one to take. Source: COMPATIBILITY.md of Ascend/pytorch
    "8.5": ("2.9", "2.8", "2.7", "2.6"),
    "9.0": ("2.9",),
    "9.1": ("2.12", "2.11", "2.10", "2.9"),
}
ACTIVATION_BYTES = 3 * 10**9  # beside the weights: KV cache of 8192 tokens, activations, the vocoder
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


@dataclass(frozen=True, slots=True)
class Needs:
    """What a checkpoint wants of a device."""

    weights_bytes: int  # of all ranks, as on a CPU
    card_bytes: int  # of rank 0, whose card has most
    smaller: str  # how the same model needs less, "" if it does not


NOTHING = Needs(0, 0, "")
Ask = Callable[..., Probe]  # `probe`, or a stand-in for tests


def probe(name: str, environment: Mapping[str, str] | None = None, *arguments: str) -> Probe:
    """Return what probes.<name> says in a process of its own, whatever becomes of that process."""
    command = module_command("covo_npu.tools.check.probes", name, *arguments)
    variables = {**os.environ, **(environment or {})}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=variables)
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


def examine(subject: Subject, ask: Ask = probe) -> Result:
    """Return what will and what will not run."""
    wanted, torch = subject.options.device, ask("torch")
    needs, checkpoint = _checkpoint(subject.ckpt)
    processor = _processor(torch.found, ask("processor")) if torch.found else []
    findings = [*_packages(ask("packages")), *_torch(torch, ask), *processor]
    findings += _products(ask("products", None, str(subject.ckpt))) if torch.found and needs.weights_bytes else []
    usable = {"cpu": all(row.holds is not False for row in processor)}  # without PyTorch nothing runs at all
    for kind, look in (("npu", _npu), ("cuda", _cuda)):
        rows, usable[kind] = look(ask, wanted, needs)
        findings += rows
    findings += [_memory(needs), _disk("working folder", Path.cwd())]
    findings += [_disk("temporary files", Path(tempfile.gettempdir())), checkpoint]
    return Result("doctor", f"this machine, device {wanted}", (*findings, *_verdict(wanted, usable, findings)))


def promised(name: str, measured: str, holds: bool, bound: str = "", fix: str = "") -> Finding:
    """Return the finding that something holds, with the fix if it does not."""
    return Finding(name, measured, bound, "", holds, "" if holds else fix)


# --- packages


def _packages(answer: Probe) -> list[Finding]:
    if answer.found is None:
        return [promised("packages", answer.reason, False, "can be imported", fix_for(answer.reason))]
    findings = [
        promised(
            name, _shortened(says.removeprefix("! ")), not says.startswith("!"), "can be imported",
            f"pip install --force-reinstall {name}",
        )
        for name, says in answer.found.items()
    ]  # fmt: skip
    optional = "installed" if find_spec("transformers") else "not installed"
    needed_for = "only covo-convert wants it, of sources without tokenizer.json: pip install 'covo-npu[convert]'"
    return [*findings, Finding("transformers", optional, needed_for)]


def _torch(answer: Probe, ask: Ask) -> list[Finding]:
    bound = f"at least {'.'.join(map(str, MIN_TORCH))}, can be imported and computes"
    if answer.found is None:
        fix = fix_for(answer.reason) or "pip install --force-reinstall torch"
        if find_spec("torch_npu") and ask("torch", {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}).found:
            fix = (
                f"{fix_for(answer.reason) or 'torch_npu breaks it'}; or, for the CPU alone, "
                "`export TORCH_DEVICE_BACKEND_AUTOLOAD=0` or `pip uninstall torch_npu`"
            )
        return [promised("torch", answer.reason, False, bound, fix)]
    says = answer.found
    holds = _numbers(says["version"]) >= MIN_TORCH and bool(says["works"])
    return [
        promised("torch", says["version"], holds, bound, "pip install --upgrade torch"),
    ]


def _processor(torch: Mapping[str, Any], answer: Probe) -> list[Finding]:
    """Return what the processor has, and which kernels serve it: ours, the first set by choice, or PyTorch's."""
    cores = f"{len(os.sched_getaffinity(0))} cores, {torch['threads']} threads, PyTorch as {torch['capability']}"
    if answer.found is None:
        return [Finding("processor", cores), promised("kernels for CPUs", answer.reason, False, "can be loaded")]
    says = answer.found
    processor = Finding("processor", f"{cores}; {' '.join(says['features']) or 'lists no features'}")
    if says["missing"]:
        slow = "backend native: PyTorch's serve, which reads 16-bit weights more slowly"
        return [processor, Finding("kernels for CPUs", slow, fix=says["missing"])]
    usable, known = says["usable"], says["known"]
    elsewhere = ", ".join(name for name in known if name not in usable) or "none"
    return [
        processor,
        Finding("kernels for CPUs", f"backend cpu: {', '.join(usable)}; not on this machine: {elsewhere}"),
    ]


def _products(answer: Probe) -> list[Finding]:
    """Return who multiplies the weights of the checkpoint on the CPU, a row a shape that is large enough to measure."""
    if answer.found is None:
        return [Finding("products", answer.reason, "can be measured")]
    return [Finding("products", line) for line in answer.found["lines"]]


# --- accelerators: (findings, whether it can be used)


def _npu(ask: Ask, wanted: str, needs: Needs) -> tuple[list[Finding], bool]:
    nodes, library = sorted(Path("/dev").glob("davinci[0-9]*")), find_spec("torch_npu")
    home = os.environ.get("ASCEND_HOME_PATH")
    if not nodes and not library and not home and not wanted.startswith("npu"):
        return [Finding("NPU", "none: no /dev/davinci*, no torch_npu, no CANN")], False
    driver = f"{len(nodes)} devices /dev/davinci*, version {_field(ASCEND / 'driver' / 'version.info', 'Version')}"
    cann = f"ASCEND_HOME_PATH={home or ''}, version {_cann_version(home)}"
    findings = [
        promised(
            "NPU driver", driver, bool(nodes), "", "install the driver; inside a container pass the devices through"
        ),
        promised("CANN", cann, bool(home), "set_env.sh was sourced", f"run `source {set_env_script()}`"),
    ]
    if not library:
        fix = "pip install torch_npu of the same version as torch"
        return [*findings, promised("torch_npu", "not installed", False, "installed", fix)], False
    index = _index(wanted, "npu")
    answer = ask("npu", None, index)
    if answer.found is None:
        fix = fix_for(answer.reason) or "install the torch_npu that belongs to this torch and CANN"
        return [*findings, promised("torch_npu", answer.reason, False, "can be imported", fix)], False
    says = answer.found
    pair = _numbers(says["torch"]) == _numbers(says["torch_npu"])
    versions = f"{says['torch_npu']} with torch {says['torch']}"
    cann_version = _cann_version(home)
    released = TORCH_NPU_OF_CANN.get(".".join(map(str, _numbers(cann_version))))
    fix = f"pip install torch_npu=={'.'.join(map(str, _numbers(says['torch'])))}.*"
    usable = _usable("NPU", index, says)
    findings += [promised("torch_npu", versions, pair, "the same version", fix), usable, *_room("NPU", says, needs)]
    if released:
        listed_for = f"torch_npu {', '.join(released)} for CANN {cann_version} (COMPATIBILITY.md of Ascend/pytorch)"
        known = ".".join(map(str, _numbers(says["torch_npu"]))) in released
        advice = "" if known else f"pip install torch=={released[0]}.0 and torch_npu=={released[0]}.0 if kernels fail"
        findings.append(
            Finding("CANN and torch_npu", "a released pair" if known else "not a released pair", listed_for, fix=advice)
        )
    return findings, usable.holds is True and pair


def _cuda(ask: Ask, wanted: str, needs: Needs) -> tuple[list[Finding], bool]:
    if not Path("/dev/nvidiactl").exists() and not wanted.startswith("cuda"):
        return [Finding("CUDA", "none: no /dev/nvidiactl")], False
    index = _index(wanted, "cuda")
    answer = ask("cuda", None, index)
    if answer.found is None:
        fix = fix_for(answer.reason) or "install PyTorch again, for the CUDA version of the driver"
        return [promised("CUDA", answer.reason, False, "a product is right", fix)], False
    usable = _usable("CUDA", index, answer.found)
    return [usable, *_room("CUDA", answer.found, needs)], usable.holds is True


def _index(wanted: str, kind: str) -> str:
    """Return which device of a kind is looked at: that which was asked for, else the first."""
    asked, _, index = wanted.partition(":")
    return index if asked == kind and index.isdecimal() else "0"


def _usable(name: str, index: str, says: Mapping[str, Any]) -> Finding:
    if int(index) >= says["count"]:
        fix = "is the device visible (ASCEND_RT_VISIBLE_DEVICES, CUDA_VISIBLE_DEVICES), is torch built for it?"
        return promised(
            name, f"{says['count']} devices can be used", False, f"{name.lower()}:{index} is one of them", fix
        )
    memory = f"{says['free'] / 1e9:.1f} of {says['total'] / 1e9:.1f} GB free"
    fix = "the device computes wrongly: restart it, then ask its maker"
    return promised(name, f"{says['count']} x {says['name']}, {memory}", bool(says["works"]), "a product is right", fix)


def _room(name: str, says: Mapping[str, Any], needs: Needs) -> list[Finding]:
    """Return whether the checkpoint fits into what is free on a device, [] if there is neither."""
    if not needs.card_bytes or "free" not in says:  # no such device
        return []
    bound = f"{needs.card_bytes / 1e9:.1f} GB of weights, {ACTIVATION_BYTES / 1e9:.0f} GB beside them"
    advice = f"it will run out of memory there; {needs.smaller or 'a smaller --max-context'} needs less"
    fits = says["free"] >= needs.card_bytes + ACTIVATION_BYTES
    return [Finding(f"{name} memory", f"{says['free'] / 1e9:.1f} GB free", bound, fix="" if fits else advice)]


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


def _memory(needs: Needs) -> Finding:
    available = available_memory_bytes()
    measured = f"{available / 1e9:.1f} GB available"
    if not needs.weights_bytes:
        return Finding("memory", measured)
    bound = f"{needs.weights_bytes / 1e9:.1f} GB of weights in the page cache on the CPU"
    less = f"; {needs.smaller} needs less" if needs.smaller else ""
    advice = f"on the CPU it will run at the speed of the disk; close other programs, or use a device{less}"
    fits = available > needs.weights_bytes + ACTIVATION_BYTES
    return Finding("memory", measured, bound, fix="" if fits else advice)


def _disk(name: str, folder: Path) -> Finding:
    """Replies go to the working folder by default. Quotas and read-only disks show only when one writes."""
    fix = "free some space, or write elsewhere (covo-run --output FOLDER; TMPDIR)"
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
    except OSError as error:
        return promised(name, f"cannot be written: {error.strerror}", False, "can be written", fix)
    return promised(name, f"{free / 1e9:.1f} GB free", free >= REPLY_BYTES, f"at least {REPLY_BYTES / 1e6:.0f} MB", fix)


def _checkpoint(folder: Path | None) -> tuple[Needs, Finding]:
    """Return what a checkpoint needs, and the finding on it."""
    if folder is None:
        return NOTHING, Finding("checkpoint", "not named: give --ckpt to look at one")
    try:
        from covo_npu.kernels.errors import CovoError  # its reader needs xxhash, which may be what is missing
        from covo_npu.runtime.checkpoint.format import INT8, read_manifest
    except ImportError as error:
        return NOTHING, promised("checkpoint", str(error), False, "can be read", fix_for(str(error)))
    try:
        manifest = read_manifest(folder)
    except CovoError as error:
        return NOTHING, promised("checkpoint", str(error), False, "complete, of this version", "see the message")
    sizes = {name: file.bytes for name, file in manifest.files.items() if file.data_start is not None}
    size = sum(sizes.values())
    of_others = sum(sizes[name] for name in manifest.ranks[1:])
    speech = "text and speech" if manifest.config.token2wav else "text only"
    dtype = f"{manifest.dtype}, products of the LLM in {manifest.weights}" if manifest.int8 else manifest.dtype
    measured = f"layout {manifest.layout_version}, {dtype}, {size / 1e9:.2f} GB, {speech}"
    smaller = (f"a conversion with --weights {word}" for word, held in INT8.items() if len(held) > len(manifest.int8))
    return Needs(size, size - of_others, next(smaller, "")), promised(
        "checkpoint", measured, True, "manifest, headers and sizes agree; bytes: covo-check ckpt"
    )


# --- what follows from it


def _verdict(wanted: str, usable: Mapping[str, bool], findings: list[Finding]) -> list[Finding]:
    """Return what will run. The device that was asked for must; auto takes the first that can be used."""
    hosts = {"packages", "torch", "checkpoint", *REQUIRED}
    blocking = [finding.name for finding in findings if finding.holds is False and finding.name in hosts]
    kind, rows = wanted.partition(":")[0], []
    for device in ("npu", "cuda", "cpu"):
        runs = usable[device] and not blocking
        asked = kind == device or (kind == "auto" and device == "cpu")
        why = f"will not run: {', '.join(blocking) or 'no such device that can be used'}"
        named = wanted if kind == device else device
        rows.append(Finding(f"covo-run --device {named}", "will run" if runs else why, holds=runs if asked else None))
    return rows


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


@check("doctor", ckpt=False, judges_ckpt=True)
def command(subject: Subject) -> Result:
    """Say what will run on this machine and what will not, with the fix.

    Works where something is broken. Exit code 0 if nothing that was found is broken and the device can be used.
    """
    return examine(subject)
