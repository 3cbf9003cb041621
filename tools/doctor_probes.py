"""What covo-check doctor tries in processes of their own: an import can raise, hang or kill the process it runs in.

usage: python -m covo_npu.tools.doctor_probes packages|torch|cuda|npu. The last line of stdout is a JSON object.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

REQUIRED = ("numpy", "safetensors", "tokenizers", "soundfile", "xxhash", "click", "tqdm")


def packages() -> dict[str, Any]:
    """Return {package: version, or why it cannot be imported after "!"}."""
    return {name: _package(name) for name in REQUIRED}


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


def cuda() -> dict[str, Any]:
    """Return the CUDA devices, after one product on the first."""
    module: Any = importlib.import_module("torch")
    return _devices(module, module.cuda, "cuda")


def npu() -> dict[str, Any]:
    """Return the NPUs, after one product on the first."""
    module: Any = importlib.import_module("torch")
    library: Any = importlib.import_module("torch_npu")
    return {"torch_npu": library.__version__, "torch": module.__version__, **_devices(module, module.npu, "npu")}


def _devices(module: Any, api: Any, kind: str) -> dict[str, Any]:
    count = api.device_count() if api.is_available() else 0
    if not count:
        return {"count": 0}
    ones = module.ones(16, 16, device=f"{kind}:0")
    free, total = api.mem_get_info(0)
    works = float((ones @ ones).sum().cpu()) == 4096.0
    return {"count": count, "name": api.get_device_name(0), "free": free, "total": total, "works": works}


def _package(name: str) -> str:
    try:
        importlib.import_module(name)
        return version(name)
    except PackageNotFoundError:
        return "without metadata"
    except Exception as error:  # noqa: BLE001 - a broken package may raise anything; that is the finding
        return f"! {type(error).__name__}: {error}"


PROBES: dict[str, Callable[[], dict[str, Any]]] = {"packages": packages, "torch": torch, "cuda": cuda, "npu": npu}

if __name__ == "__main__":
    json.dump(PROBES[sys.argv[1]](), sys.stdout)
