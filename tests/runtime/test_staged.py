"""The ring of slabs on the device that the tests run on: --device cpu, cuda:0 or npu:0."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from made_checkpoint import LLM, large_tensors, write_checkpoint
from safetensors.torch import load_file

from covo_npu.kernels.device import open_device
from covo_npu.runtime.checkpoint import loader
from covo_npu.runtime.checkpoint.format import BLOCK_BYTES, CheckpointError, read_manifest
from covo_npu.runtime.checkpoint.loader import load_tensors

FILES = list(large_tensors())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("staged") / "ckpt", large_tensors())


@pytest.mark.parametrize("slabs", [2, 32])
def test_every_tensor_arrives(device: str, folder: Path, slabs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "MAX_SLABS", slabs)
    monkeypatch.setattr(loader, "MAX_THREADS", 2)
    target = open_device(device)
    weights = load_tensors(read_manifest(folder), FILES, target, mode="staged")
    assert weights.report.mode == "staged"
    expected = {key: t for name in FILES for key, t in load_file(folder / name).items() if not key.startswith("__pad")}
    assert weights.tensors.keys() == expected.keys()
    for name, tensor in weights.tensors.items():
        assert tensor.device.type == target.type
        assert torch.equal(tensor.cpu(), expected[name]), name


def test_damage_never_reaches_the_device(device: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt", large_tensors())
    with (folder / LLM).open("r+b") as file:
        file.seek(BLOCK_BYTES + 7)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(
        CheckpointError, match=f"{LLM}: damaged in the block of {BLOCK_BYTES} bytes at offset {BLOCK_BYTES}"
    ):
        load_tensors(read_manifest(folder), FILES, open_device(device), mode="staged")
