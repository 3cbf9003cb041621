"""What covo-check doctor tries in processes of their own: an import can raise, hang or kill the process it runs in.

usage: python -m covo_npu.tools.check.probes NAME [ARGUMENT], one of PROBES. The last line of stdout is a JSON object.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Of what a processor lists in /proc/cpuinfo, that which decides how fast products are here; the second row is Arm's.
FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve"),
)
FORMATS = ("WAV", "FLAC", "MP3", "AIFF", "CAF", "AU")
CODECS = ("VORBIS", "OPUS")  # in Ogg
REQUIRED = ("numpy", "safetensors", "tokenizers", "soundfile", "xxhash", "tqdm")  # not click: it runs this check


def packages() -> dict[str, Any]:
    """Return {package: version, or why it cannot be imported after "!"}; of soundfile what it decodes, too."""
    found = {name: _package(name) for name in REQUIRED}
    if not found["soundfile"].startswith("!"):
        found["soundfile"] += f", {_libsndfile(importlib.import_module('soundfile'))}"
    return found


def torch() -> dict[str, Any]:
    """Return what PyTorch says of itself and of the processor."""
    module: Any = importlib.import_module("torch")
    product = module.ones(2, 2, dtype=module.bfloat16) @ module.ones(2, 2, dtype=module.bfloat16)
    return {
        "version": module.__version__,
        "capability": module.backends.cpu.get_cpu_capability(),
        "threads": module.get_num_threads(),
        "works": float(product.sum()) == 8.0,
    }


def processor() -> dict[str, Any]:
    """Return the processor's features, and the instruction sets of our own kernels: there and usable, or why not."""
    device: Any = importlib.import_module("covo_npu.kernels.device")
    library: Any = importlib.import_module("covo_npu.kernels.cpu.library")
    try:
        words = set(device.CPU_INFO.read_text("utf-8").split())
    except OSError:
        words = set()
    missing = library.missing()
    sets = {} if missing else {"known": library.known_sets(), "usable": library.usable_sets()}
    return {"features": [name for name in FEATURES if name in words], "missing": missing, **sets}


def products(ckpt: str) -> dict[str, Any]:
    """Return who multiplies the weights of a checkpoint on this processor, a line a shape; none without our kernels."""
    library: Any = importlib.import_module("covo_npu.kernels.cpu.library")
    if library.missing():
        return {"lines": []}
    module: Any = importlib.import_module("torch")
    choice: Any = importlib.import_module("covo_npu.kernels.cpu.choice")
    ground: Any = importlib.import_module("covo_npu.runtime.ground")
    manifest = importlib.import_module("covo_npu.runtime.checkpoint.format").read_manifest(ckpt)
    measured = choice.measure(ground.multiplied(manifest, getattr(module, manifest.dtype)))
    return {"lines": measured.describe()[1:]}  # the first names the instruction set, which `processor` tells


def cuda(index: str) -> dict[str, Any]:
    """Return the CUDA devices, after one product on that of this index."""
    module: Any = importlib.import_module("torch")
    return _devices(module, module.cuda, "cuda", int(index))


def npu(index: str) -> dict[str, Any]:
    """Return the NPUs, after one product on that of this index."""
    module: Any = importlib.import_module("torch")
    library: Any = importlib.import_module("torch_npu")
    return {
        "torch_npu": library.__version__,
        "torch": module.__version__,
        **_devices(module, module.npu, "npu", int(index)),
    }


def _devices(module: Any, api: Any, kind: str, index: int) -> dict[str, Any]:
    count = api.device_count() if api.is_available() else 0
    if index >= count:
        return {"count": count}
    ones = module.ones(16, 16, device=f"{kind}:{index}")
    free, total = api.mem_get_info(index)
    works = float((ones @ ones).sum().cpu()) == 4096.0
    return {"count": count, "name": api.get_device_name(index), "free": free, "total": total, "works": works}


def _libsndfile(module: Any) -> str:
    forms, codecs = module.available_formats(), module.available_subtypes("OGG")
    decodes = [name for name in FORMATS if name in forms] + [name for name in CODECS if name in codecs]
    return f"libsndfile {module.__libsndfile_version__} decodes {', '.join(decodes)}"


def _package(name: str) -> str:
    try:
        importlib.import_module(name)
        return version(name)
    except PackageNotFoundError:
        return "without metadata"
    except Exception as error:  # noqa: BLE001 - a broken package may raise anything; that is the finding
        return f"! {type(error).__name__}: {error}"


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "packages": packages,
    "torch": torch,
    "processor": processor,
    "products": products,
    "cuda": cuda,
    "npu": npu,
}

if __name__ == "__main__":
    json.dump(PROBES[sys.argv[1]](*sys.argv[2:]), sys.stdout)
