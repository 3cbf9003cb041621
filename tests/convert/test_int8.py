"""covo-convert --weights int8: numbers and scales against float64 formulas, streams, faults, and the check of it."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from made_checkpoint import LLM, block_digests, remove_file, rewrite_manifest
from safetensors.torch import load_file
from source_edits import SHARDS, VALUES, edit_shard
from torch import Tensor

from covo_npu.convert.quantize import QuantisedReader
from covo_npu.convert.reading import CAST_BYTES, Reading
from covo_npu.convert.shards import SourceTensor
from covo_npu.runtime.checkpoint.format import PREFIX, read_manifest
from covo_npu.tools.check.ckpt import examine_folder

TARGET = "llm.layers.1.down_proj"
PRODUCTS = {"qkv_proj": 3, "o_proj": 1, "gate_up_proj": 2, "down_proj": 1}  # and how many matrices each is made of


@pytest.fixture(scope="module")
def folder(convert_tiny: Callable[[str], Path]) -> Path:
    return convert_tiny("int8")


def stock(source: Path, name: str) -> np.ndarray:
    """A matrix of the source in float64, with the parts of a fused one one after another."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(source.glob("model-*.safetensors")):
        tensors |= load_file(shard)
    layer, _, kind = name.removeprefix("llm.").rpartition(".")
    parts = {"qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "o_proj": ["self_attn.o_proj"],
             "gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"], "down_proj": ["mlp.down_proj"]}[kind]  # fmt: skip
    return np.concatenate([tensors[f"llm.model.{layer}.{part}.weight"].double().numpy() for part in parts])


def test_numbers_and_scales_are_those_of_the_formula(folder: Path, tiny_source: Path) -> None:
    tensors = load_file(folder / LLM)
    names = [name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dtype == torch.int8]
    assert {name.rpartition(".")[2] for name in names} == set(PRODUCTS) and len(names) == 4 * 3
    for name in names:
        source, scale = stock(tiny_source, name), tensors[f"{name}.scale"]
        largest = np.abs(source).max(1)
        assert scale.dtype == torch.float32
        assert np.array_equal(scale.numpy(), largest.astype(np.float32) / np.float32(127))
        wide = scale.double().numpy()[:, None]
        numbers = tensors[f"{name}.weight"].double().numpy()
        assert np.array_equal(numbers, np.rint(source.astype(np.float32) / scale.numpy()[:, None]))
        assert (np.abs(source - numbers * wide) <= wide * (0.5 + 2**-16)).all()
        assert (np.abs(numbers).max(1) == 127).all()


def test_everything_else_is_as_without(folder: Path, convert_tiny: Callable[[str], Path]) -> None:
    plain = convert_tiny("bfloat16")
    ours, theirs = load_file(folder / LLM), load_file(plain / LLM)
    kept = [name for name in theirs if not name.startswith("__pad.") and ours[name].dtype != torch.int8]
    assert len(kept) == len([name for name in theirs if not name.startswith("__pad.")]) - 12
    assert all(torch.equal(ours[name], theirs[name]) for name in kept)
    for file in ("encoder.safetensors", "token2wav.safetensors", "tokenizer.json"):
        assert filecmp.cmp(folder / file, plain / file, shallow=False)
    assert (read_manifest(folder).int8, read_manifest(plain).int8) == (True, False)
    assert read_manifest(folder).dtype == "bfloat16"
    assert json.loads((folder / "manifest.json").read_text())["weights"] == "int8"


def test_scales_stand_behind_their_weights(folder: Path) -> None:
    order = [name for name in read_manifest(folder).files[LLM].tensors if name.startswith("llm.layers.0.")]
    assert order[1:4] == [f"llm.layers.0.qkv_proj.{kind}" for kind in ("weight", "scale", "bias")]


def test_the_same_source_gives_the_same_bytes_whatever_the_threads(
    folder: Path, tiny_source: Path, tmp_path: Path
) -> None:
    command = [Path(sys.executable).with_name("covo-convert"), "--src", tiny_source, "--dst", tmp_path / "again"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--weights", "int8"], check=True, capture_output=True, env=environment)
    assert filecmp.cmp(folder / "manifest.json", tmp_path / "again" / "manifest.json", shallow=False)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_sources_own_numbers_are_quantised(dtype: str, source: Path, convert, tmp_path: Path) -> None:
    """Not those rounded to the dtype of the rest: a float32 source loses nothing on the way."""
    for shard in SHARDS:
        edit_shard(source / shard, lambda t: t.update({n: (v * 1.001).to(getattr(torch, dtype)) for n, v in t.items()}))
    outcome = convert(source, "--weights", "int8", "--dtype", "float16")
    assert outcome.code == 0, outcome.err
    tensors = load_file(tmp_path / "target" / LLM)
    wanted = stock(source, TARGET).astype(np.float32)
    scale = np.abs(wanted).max(1) / np.float32(127)
    assert np.array_equal(tensors[f"{TARGET}.scale"].numpy(), scale)
    assert np.array_equal(tensors[f"{TARGET}.weight"].numpy(), np.rint(wanted / scale[:, None]))
    assert tensors["llm.norm.weight"].dtype == torch.float16
    assert examine_folder(tmp_path / "target", source, None).holds


@pytest.mark.parametrize("pieces", [(1,), (7, 1000), (5 * 10**6,)])
def test_a_stream_may_be_cut_anywhere(pieces: tuple[int, ...]) -> None:
    """Rows of one piece and of several, cut within rows; the last rows are fewer than the others."""
    N, K = (CAST_BYTES // 4 // 1000) * 2 + 3, 1000
    matrix = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensor = SourceTensor("w", "", "BF16", (N, K), 2 * N * K, Path(), values=matrix)
    reading = Reading()
    reader = QuantisedReader(tensor, reading)
    assert reader.bytes == N * K
    found, at = bytearray(N * K), 0
    if pieces == (1,):
        pieces = (1,) * 1500 + (N * K,)
    while at < N * K:
        for size in pieces:
            end = min(at + size, N * K)
            reader.read_into(memoryview(found)[at:end])
            at = end
    wide = matrix.float().numpy()
    scale = np.abs(wide).max(1) / np.float32(127)
    assert np.array_equal(torch.cat(reading.scales[tensor]).numpy(), scale)
    numbers = np.frombuffer(found, np.int8).reshape(N, K)
    assert np.array_equal(numbers, np.rint(wide / scale[:, None]))


# --- what cannot be, and what is odd


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named(value: float, source: Path, convert, tmp_path: Path) -> None:
    edit_shard(source / SHARDS[3], lambda t: t[VALUES][3].fill_(value))
    outcome = convert(source, "--weights", "int8")
    assert outcome.code == 1 and f"{VALUES} in {SHARDS[3]}: 608 of " in outcome.err
    assert not (tmp_path / "target").exists()


def test_values_beyond_float32_are_named(source: Path, convert) -> None:
    edit_shard(source / SHARDS[3], lambda t: t.update({VALUES: t[VALUES].double() * 1e300}))
    outcome = convert(source, "--weights", "int8")
    assert outcome.code == 1 and f"{VALUES} in {SHARDS[3]}: " in outcome.err and "do not fit into F32" in outcome.err


def test_a_matrix_in_8_bits_is_no_source(source: Path, convert) -> None:
    edit_shard(source / SHARDS[3], lambda t: t.update({VALUES: torch.ones(224, 608, dtype=torch.int8)}))
    outcome = convert(source, "--weights", "int8")
    assert outcome.code == 1 and f"{VALUES}: I8 in {SHARDS[3]}" in outcome.err


def test_a_channel_of_zeros_and_a_tiny_one_have_the_scale_0(source: Path, convert, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[VALUES][3] = 0
        tensors[VALUES][4] = 1e-38
        tensors[VALUES][5] = 1e-35

    edit_shard(source / SHARDS[3], change)
    assert convert(source, "--weights", "int8").code == 0
    tensors = load_file(tmp_path / "target" / LLM)
    scale, numbers = tensors[f"{TARGET}.scale"], tensors[f"{TARGET}.weight"]
    assert (scale == 0).nonzero().flatten().tolist() == [3, 4]
    assert not numbers[3:5].any() and (numbers[5] == 127).all()
    assert examine_folder(tmp_path / "target", source, None).holds


def test_a_matrix_of_zeros_is_refused_as_always(source: Path, convert) -> None:
    edit_shard(source / SHARDS[3], lambda t: t[VALUES].zero_())
    outcome = convert(source, "--weights", "int8")
    assert outcome.code == 1 and "tensors are all zeros (1)" in outcome.err
    assert convert(source, "--weights", "int8", "--allow-zeros").code == 0


def test_a_dry_run_shows_both_sizes(tiny_source: Path, convert) -> None:
    outcome = convert(tiny_source, "--weights", "int8", "--dry-run", "-v")
    assert outcome.code == 0
    assert "tensors in (12.63 MB), 579 out (11.06 MB), bfloat16, products of the LLM in int8" in outcome.out
    assert "12 quantised" in outcome.out
    line = next(line for line in outcome.out.splitlines() if line.startswith(f"{TARGET}.scale <- {VALUES}"))
    assert ": scales [224] F32 in llm-rank0of1.safetensors" in line


def test_other_formats_are_a_usage_error(tiny_source: Path, convert) -> None:
    assert convert(tiny_source, "--weights", "int4").code == 2


# --- covo-check ckpt --src


CHANGES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "a number": lambda t: t[f"{TARGET}.weight"][7, 9].add_(1 - 2 * (t[f"{TARGET}.weight"][7, 9] > 0).to(torch.int8)),
    "a scale": lambda t: t[f"{TARGET}.scale"][7].mul_(1 + 2**-20),
    "swapped rows": lambda t: t[f"{TARGET}.weight"].copy_(t[f"{TARGET}.weight"].roll(1, 0)),
    "swapped scales": lambda t: t[f"{TARGET}.scale"].copy_(t[f"{TARGET}.scale"].roll(1, 0)),
}


def test_a_sound_checkpoint_holds_against_its_source(folder: Path, tiny_source: Path) -> None:
    assert examine_folder(folder, tiny_source, None).holds


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_under_a_right_checksum_is_found(change: str, folder: Path, tiny_source: Path, tmp_path: Path) -> None:
    ckpt = changed(folder, tmp_path / "ckpt", CHANGES[change])
    remove_file(ckpt, PREFIX)  # it has seen the right weights
    (finding,) = [f for f in examine_folder(ckpt, tiny_source, None).findings if f.holds is False]
    assert finding.name == "tensors against the source" and TARGET in finding.measured


def changed(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Return a copy whose tensors of the LLM were changed in place, under right checksums."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    record = read_manifest(folder).files[LLM]
    tensors = load_file(folder / LLM)
    change(tensors)
    data = bytearray((folder / LLM).read_bytes())
    for name, place in record.tensors.items():
        data[place.offset : place.offset + place.bytes] = tensors[name].flatten().view(torch.uint8).numpy().tobytes()
    (target / LLM).write_bytes(data)
    rewrite_manifest(target, lambda m: m["files"][LLM].update(xxh3_128=block_digests(target / LLM)))
    return target
