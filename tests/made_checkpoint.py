"""Builds converted checkpoints of random tensors, for tests of format and loader. No network runs on them."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from covo_npu.runtime.checkpoint import format as checkpoint
from covo_npu.runtime.checkpoint.config import (
    AdapterConfig,
    EncoderConfig,
    LLMConfig,
    ModelConfig,
    to_dict,
)

LLM = "llm-rank0of1.safetensors"
CONFIG = ModelConfig(
    llm=LLMConfig(1, 8, 2, 1, 4, 16, 64, 1e-6, 1e6, 128),
    encoder=EncoderConfig(1, 8, 2, 16, 4, 10),
    adapter=AdapterConfig(1, 8, 4, 8),
    token2wav=None,
    audio_token_index=48,
)
NAMES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.int8: "I8",
}


def small_tensors() -> dict[str, dict[str, Tensor]]:
    """Three files with every dtype, sizes that need pads, a scalar and an empty tensor."""
    seed = torch.Generator().manual_seed(7)
    return {
        "encoder.safetensors": {
            "encoder.conv1.bias": torch.randn(5, 7, generator=seed),
            "encoder.conv1.weight": torch.randn(8, 4, 3, generator=seed).bfloat16(),
            "encoder.half": torch.randn(3, 11, generator=seed).half(),
        },
        LLM: {
            "llm.embed_tokens.weight": torch.randn(64, 8, generator=seed).bfloat16(),
            "llm.norm.weight": torch.randn(8, generator=seed).bfloat16(),
            "llm.scalar": torch.tensor(3.25),
            "llm.empty": torch.empty(0, 4),
        },
        "token2wav.safetensors": {
            "voice.prompt_codes": torch.arange(13),
            "dit.token_embedding.weight": torch.randn(33, 17, generator=seed),
        },
    }


def large_tensors() -> dict[str, dict[str, Tensor]]:
    """Two files of several blocks each, whose tensors straddle the blocks: 60 MB."""
    seed = torch.Generator().manual_seed(8)
    return {
        "encoder.safetensors": {f"encoder.{i}": torch.randn(1000, 701, generator=seed) for i in range(7)},
        LLM: {f"llm.{i}": torch.randn(3001, 1000, generator=seed).bfloat16() for i in range(6)},
    }


def write_checkpoint(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write a checkpoint with these tensors and return its folder."""
    folder.mkdir()
    parts = {}
    for name, tensors in files.items():
        plan = write_tensors(folder / name, tensors)
        parts[name] = checkpoint.WrittenFile(plan.bytes, block_digests(folder / name), plan)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    parts["tokenizer.json"] = checkpoint.WrittenFile(tokenizer.stat().st_size, block_digests(tokenizer))
    checkpoint.write_manifest(folder, body(parts))
    return folder


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> checkpoint.FilePlan:
    """Write a safetensors file in our layout and return its plan."""
    plan = checkpoint.plan_file((key, NAMES[t.dtype], tuple(t.shape)) for key, t in tensors.items())
    with path.open("wb") as file:
        file.write(plan.header)
        for key, entry in plan.entries.items():
            data = tensors[key].contiguous().reshape(-1).view(torch.uint8) if key in tensors else None
            file.write(bytes(entry.bytes) if data is None else data.numpy().tobytes())
    return plan


def block_digests(path: Path) -> list[str]:
    """Return the xxh3-128 of each block of a file."""
    with path.open("rb") as file:
        return [xxhash.xxh3_128_hexdigest(data) for data in iter(lambda: file.read(checkpoint.BLOCK_BYTES), b"")]


def replace_file(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write other tensors into a file of a checkpoint, with right checksums: a checkpoint that was made wrong."""
    plan = write_tensors(folder / name, tensors)
    listed = checkpoint.manifest_files({name: checkpoint.WrittenFile(plan.bytes, block_digests(folder / name), plan)})
    rewrite_manifest(folder, lambda manifest: [manifest[part].update(listed[part]) for part in ("files", "tensors")])


def remove_file(folder: Path, name: str) -> None:
    """Take a file out of a checkpoint."""
    (folder / name).unlink()
    rewrite_manifest(folder, lambda manifest: [manifest[part].pop(name) for part in ("files", "tensors")])


def rewrite_in_layout_1(folder: Path) -> None:
    """Make a converted checkpoint one of layout version 1: with the filter bank, and sampling defaults in a file.

    Without the rows of the system prompt, which it does not know.
    """
    remove_file(folder, checkpoint.PREFIX)
    name, config = "encoder.safetensors", folder / "generation_config.json"
    tensors = {"frontend.mel_filters": torch.zeros(128, 201)}
    with safe_open(folder / name, "pt") as file:
        tensors |= {key: file.get_tensor(key).clone() for key in file.keys() if not key.startswith("__pad")}  # noqa: SIM118
    plan = write_tensors(folder / name, tensors)
    config.write_text('{"temperature": 0.7, "max_new_tokens": 1}')
    parts = {name: checkpoint.WrittenFile(plan.bytes, block_digests(folder / name), plan)}
    parts[config.name] = checkpoint.WrittenFile(config.stat().st_size, block_digests(config))

    def change(manifest: dict) -> None:
        listed = checkpoint.manifest_files(parts)
        manifest["layout_version"] = 1
        for part in ("files", "tensors"):
            manifest[part] |= listed[part]

    rewrite_manifest(folder, change)


def body(parts: dict) -> dict:
    """The manifest of the parts, as checkpoint.manifest_files() takes them."""
    return {
        "producer": "covo-npu test",
        "dtype": "bfloat16",
        "tensor_parallel": {"size": 1, "ranks": [LLM]},
        "config": to_dict(CONFIG),
        "special_tokens": {"im_end": 1},
        **checkpoint.manifest_files(parts),
        "left_out": {},
        "source": {},
    }


def rewrite_manifest(folder: Path, change) -> None:
    """Apply `change` to the manifest's JSON object and write it with a right hash: a manifest that lies."""
    data = json.loads((folder / "manifest.json").read_text())
    data.pop("manifest_xxh3_128")
    change(data)
    (folder / "manifest.json").write_bytes(checkpoint.manifest_bytes(data))
