"""Where weights lie on the device: each in memory of its own, reached from threads that know their device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulation import device
from emulation.rules import RefusedError
from emulation.stages import made_up
from torch import Tensor, nn

from covo_npu.kernels import npu
from covo_npu.kernels.device import open_device
from covo_npu.runtime import CovoAudio, Session
from covo_npu.runtime.checkpoint.format import read_manifest
from covo_npu.runtime.checkpoint.loader import load_tensors
from covo_npu.runtime.networks.cache import allocate
from covo_npu.runtime.networks.qwen2 import Qwen2
from covo_npu.tools.synth.config import PRESETS

OPENED = ctypes.CDLL("libascendcl.so").emulation_opened


def in_one_memory(network: nn.Module) -> None:
    """Put the weights of a network into one memory, as views of it: how they lie in their file."""
    parameters = list(network.parameters())
    memory = torch.cat([x.data.reshape(-1).view(torch.uint8) for x in parameters])
    at = 0
    for x in parameters:
        size = x.numel() * x.element_size()
        x.data = memory[at : at + size].view(x.dtype).view(x.shape)
        at += size


def test_nz_weights_say_the_same_and_only_they_stay(convert_tiny: Callable[[str], Path]) -> None:
    folder, question = convert_tiny("bfloat16"), torch.sin(torch.arange(24000) / 20).numpy()

    def answer(nz: bool) -> list[int]:
        model = CovoAudio.load(folder, device="npu:0", speech=False, nz=nz)
        held = [name for name, tensors in model.weights.files.items() if tensors]
        assert bool(held) != nz  # nobody keeps what was cast
        return Session(model, mode="a2t", max_new_tokens=6).say(question, 24000).tokens

    assert answer(nz=True) == answer(nz=False)


def test_weights_that_share_a_memory_cannot_be_cast() -> None:
    llm = made_up("npu:0", PRESETS["tiny"]).networks.llm
    assert npu.cast_weights_nz(llm) == 4 * PRESETS["tiny"].llm.num_layers + 1
    in_one_memory(llm)
    with pytest.raises(RefusedError, match="a cast of a part of a memory"):
        npu.cast_weights_nz(llm)


@pytest.mark.parametrize("forgetful", [False, True])
def test_loading_opens_no_context_on_another_device(
    convert_tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, forgetful: bool
) -> None:
    manifest, target = read_manifest(convert_tiny("bfloat16")), open_device("npu:1")
    try:
        if forgetful:
            monkeypatch.setattr(torch.npu, "set_device", lambda device: None)
        OPENED(1)
        load_tensors(manifest, manifest.ranks, target)
        assert OPENED(0) == (0b11 if forgetful else 0b10)
    finally:
        monkeypatch.undo()
        torch.npu.set_device(0)


@torch.inference_mode()
def executors_of_a_new_length(llm: Qwen2, length: int) -> int:
    """Return how many operators a prefill of a length that was never seen makes torch_npu prepare."""
    cache = allocate(PRESETS["tiny"].llm, 1, 512, torch.bfloat16, torch.device("npu", 0))
    x: Tensor = llm.embed(torch.arange(length, device="npu:0"))
    with device.log.recording() as log:
        llm.fill(x, cache, 0, 0)
    return len(set(log.executors))


def test_layers_share_what_is_prepared_unless_their_weights_lie_in_one_memory() -> None:
    llm = made_up("npu:0", PRESETS["tiny"]).networks.llm
    num_layers = PRESETS["tiny"].llm.num_layers
    found = executors_of_a_new_length(llm, 60)
    in_one_memory(llm)
    wasteful = executors_of_a_new_length(llm, 61)
    products_and_norms = 6  # of a layer
    assert wasteful - found >= (num_layers - 2) * products_and_norms > 0  # the last layer computes one row only
