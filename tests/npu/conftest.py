"""Tests of this folder need an NPU. On hardware only the kernels are tested; the rest is about the emulated device.

Emulated: `tests/npu/run.sh`. Hardware: `pytest --device npu:0 tests/npu`. Elsewhere there is the forecast alone.
"""

try:
    import torch_npu

    HERE, EMULATED = torch_npu.npu.is_available(), hasattr(torch_npu, "emulation")
except (ImportError, OSError, RuntimeError):
    HERE, EMULATED = False, False

collect_ignore_glob = [] if EMULATED else ["test_[!k]*.py"] if HERE else ["test_[!f]*.py"]
