"""The settings of the npu backend, its option of NZ weights, and what a user reads when something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from covo_npu.kernels import npu
from covo_npu.kernels.device import open_device
from covo_npu.kernels.errors import BackendError
from covo_npu.runtime import CovoAudio


def test_float32_is_float32_and_kernels_are_ready_made(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []
    torch.npu.conv.allow_hf32 = True
    monkeypatch.setattr(torch.npu, "set_device", lambda index: chosen.append(("device", index)))
    monkeypatch.setattr(torch.npu, "set_compile_mode", lambda **options: chosen.append(options))
    assert open_device("npu:0") == torch.device("npu:0")
    assert chosen == [("device", 0), {"jit_compile": False}]  # the device first
    assert not torch.npu.conv.allow_hf32 and not torch.npu.matmul.allow_hf32


def test_a_device_that_is_not_there_names_what_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "3")
    with pytest.raises(BackendError, match=r"npu:7 is not there: .* sees 2 NPUs \(ASCEND_RT_VISIBLE_DEVICES=3\)"):
        open_device("npu:7")


@pytest.mark.parametrize("fails", [False, True])
def test_nz_allows_internal_formats_during_the_casts_only(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    events: list[Any] = []

    class Config:
        def __setattr__(self, name: str, value: Any) -> None:
            events.append((name, value))

    def cast(weight: torch.Tensor, acl_format: int) -> torch.Tensor:
        events.append(("cast", tuple(weight.shape), acl_format))
        if fails:
            raise RuntimeError("out of memory")
        return weight

    library = SimpleNamespace(npu=SimpleNamespace(config=Config()), npu_format_cast=cast)
    monkeypatch.setattr(npu, "torch_npu", library)
    module = torch.nn.Linear(32, 16).bfloat16()
    module.embed = torch.nn.Embedding(4, 8).bfloat16()
    module.exact = torch.nn.Linear(8, 8)
    if fails:
        with pytest.raises(RuntimeError):
            npu.cast_weights_nz(module)
    else:
        assert npu.cast_weights_nz(module) == 1
    switch = "allow_internal_format"
    assert events == [(switch, True), ("cast", (16, 32), 29), (switch, False)]


def test_nz_is_for_the_npu(convert_tiny: Callable[[str], Path]) -> None:
    with pytest.raises(BackendError, match="NZ are for device npu, found cpu"):
        CovoAudio.load(convert_tiny("bfloat16"), device="cpu", nz=True)


def test_convolutions_over_the_limit_say_so() -> None:
    device = open_device("npu:0")
    with pytest.raises(BackendError, match="takes at most 1000000 along a dimension"):
        npu.conv1d(torch.zeros(1, 1, 1_000_001, device=device), torch.zeros(1, 1, 3, device=device), None)


def without_cann(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program where torch_npu is installed and CANN is not."""
    hidden = ("LD_LIBRARY_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def test_without_cann_the_device_says_what_to_install_and_the_cpu_works() -> None:
    assert "Failed to load the backend extension" in without_cann("import torch").stderr  # what we stand in front of
    done = without_cann(
        "from covo_npu.runtime.cli import console\n"
        "from covo_npu.kernels.device import open_device\n"
        "print(open_device('cpu'))\n"
        "import click\n"
        "raise SystemExit(console.run(click.command()(lambda: open_device('npu:0')), 'covo-run', []))"
    )
    assert done.stdout == "cpu\n" and done.returncode == 1 and "Traceback" not in done.stderr
    for part in (
        "torch_npu cannot be imported (libhccl.so",
        "source /usr/local/Ascend",
        "2.9.0 for CANN 8.5.0, 2.12.0",
    ):
        assert part in done.stderr
