"""Tests of this folder need an NPU, real or emulated (`tests/npu/emulated pytest`). Elsewhere they are no tests."""

import os

try:
    import torch_npu

    HERE = torch_npu.npu.is_available()
except (ImportError, OSError, RuntimeError):
    HERE = False

collect_ignore_glob = [] if HERE else ["test_*.py"]

if HERE:
    os.environ["COVO_TEST_DEVICE"] = "npu:0"
