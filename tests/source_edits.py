"""What tests do to copies of the tiny source."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

SHARDS = [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
INDEX, CONFIG, PICKLE = "model.safetensors.index.json", "config.json", "token2wav/model.pt"
VOICE = "token2wav/prompt"
VALUES = "llm.model.layers.1.mlp.down_proj.weight"  # in the last shard


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_shard(path: Path, change: Callable[[dict], object]) -> None:
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_pickle(path: Path, change: Callable[[dict], object]) -> None:
    loaded = torch.load(path, weights_only=True)
    change(loaded["model"])
    torch.save(loaded, path)


def edit_array(path: Path, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    array = np.load(path)
    changed = change(array)
    np.save(path, array if changed is None else changed)


def truncate(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


def rewrite_header(path: Path, change: Callable[[dict], object]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def merge_shards(folder: Path) -> None:
    """Put all tensors into one model.safetensors; the shards go, the index stays."""
    tensors = {}
    for shard in SHARDS:
        tensors |= load_file(folder / shard)
        (folder / shard).unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
