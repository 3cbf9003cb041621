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
from covo_npu.runtime.checkpoint.format import ENCODER, INT8, PREFIX, TOKEN2WAV, read_manifest
from covo_npu.tools.check.ckpt import examine_folder

TARGET, HEAD = "llm.layers.1.down_proj", "llm.lm_head"
PRODUCTS = {"qkv_proj": 3, "o_proj": 1, "gate_up_proj": 2, "down_proj": 1}  # and how many matrices each is made of


@pytest.fixture(scope="module")
def folder(convert_tiny: Callable[[str], Path]) -> Path:
    return convert_tiny("int8")


@pytest.fixture(scope="module")
def with_head(convert_tiny: Callable[[str], Path]) -> Path:
    return convert_tiny("int8+head")


def stock(source: Path, name: str) -> np.ndarray:
    """A matrix of the source in float64, with the parts of a fused one one after another."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(source.glob("model-*.safetensors")):
        tensors |= load_file(shard)
    if name == HEAD:
        return tensors["llm.lm_head.weight"].double().numpy()
    layer, _, kind = name.removeprefix("llm.").rpartition(".")
    parts = {"qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "o_proj": ["self_attn.o_proj"],
             "gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"], "down_proj": ["mlp.down_proj"]}[kind]  # fmt: skip
    return np.concatenate([tensors[f"llm.model.{layer}.{part}.weight"].double().numpy() for part in parts])


@pytest.mark.parametrize(("weights", "more"), [("int8", []), ("int8+head", [HEAD])])
def test_numbers_and_scales_are_those_of_the_formula(
    weights: str, more: list[str], convert_tiny: Callable[[str], Path], tiny_source: Path
) -> None:
    tensors = load_file(convert_tiny(weights) / LLM)
    names = [name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dtype == torch.int8]
    assert sorted(names) == sorted([f"llm.layers.{layer}.{name}" for name in PRODUCTS for layer in range(3)] + more)
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
    assert (read_manifest(folder).int8, read_manifest(plain).int8) == (("layers",), ())
    assert read_manifest(folder).dtype == "bfloat16"
    assert json.loads((folder / "manifest.json").read_text())["weights"] == "int8"


def test_with_the_head_only_the_head_is_another(with_head: Path, folder: Path) -> None:
    """The system prompt, too, which never meets the head, is the same."""
    ours, theirs = load_file(with_head / LLM), load_file(folder / LLM)
    of_layers = {name for name in theirs if not name.startswith("__pad.")} - {f"{HEAD}.weight"}
    assert {name for name in ours if not name.startswith("__pad.")} - of_layers == {f"{HEAD}.weight", f"{HEAD}.scale"}
    assert all(torch.equal(ours[name], theirs[name]) for name in of_layers)
    for file in (ENCODER, TOKEN2WAV, "tokenizer.json", PREFIX):
        assert filecmp.cmp(with_head / file, folder / file, shallow=False)
    assert read_manifest(with_head).int8 == ("layers", "head")
    bodies = [json.loads((each / "manifest.json").read_text()) for each in (with_head, folder)]
    assert [body["weights"] for body in bodies] == ["int8+head", "int8"]
    assert {key for key in bodies[0] if bodies[0][key] != bodies[1][key]} == {
        *("weights", "files", "tensors", "manifest_xxh3_128")
    }


def test_scales_stand_behind_their_weights(with_head: Path) -> None:
    order = list(read_manifest(with_head).files[LLM].tensors)
    assert order[2:5] == [f"llm.layers.0.qkv_proj.{kind}" for kind in ("weight", "scale", "bias")]
    assert order[-3:] == ["llm.norm.weight", f"{HEAD}.weight", f"{HEAD}.scale"]


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


def test_a_value_of_the_head_that_is_not_finite_is_named(source: Path, convert) -> None:
    edit_shard(source / SHARDS[-1], lambda t: t["llm.lm_head.weight"][608, 223].fill_(float("nan")))
    outcome = convert(source, "--weights", "int8+head")
    assert outcome.code == 1 and "llm.lm_head.weight in " in outcome.err


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


def test_a_dry_run_shows_the_head_and_what_it_saves(tiny_source: Path, convert, tmp_path: Path) -> None:
    """Of 16 bits a number 8 are left, and 32 a row are added."""
    reports = []
    for weights in ("int8", "int8+head"):
        file = tmp_path / f"{weights}.json"
        assert convert(tiny_source, "--weights", weights, "--dry-run", "-v", "--json", str(file)).code == 0
        reports.append(json.loads(file.read_text()))
    rows, columns = stock(tiny_source, HEAD).shape
    layers, head = reports
    assert layers["bytes_out"] - head["bytes_out"] == rows * columns - 4 * rows
    assert [report["weights"] for report in reports] == ["int8", "int8+head"]
    assert [report["operations"]["quantised"] for report in reports] == [12, 13]
    found = {row["target"]: row for row in head["tensors"]}
    assert (found[f"{HEAD}.weight"]["dtype"], found[f"{HEAD}.weight"]["operation"]) == ("I8", "int8")
    assert (found[f"{HEAD}.scale"]["dtype"], found[f"{HEAD}.scale"]["shape"]) == ("F32", [rows])


@pytest.mark.parametrize("weights", ["int4", "head", "int8+embed"])
def test_other_formats_are_a_usage_error(weights: str, tiny_source: Path, convert) -> None:
    assert convert(tiny_source, "--weights", weights).code == 2


# --- covo-check ckpt --src


CHANGES: dict[str, Callable[[dict[str, Tensor], str], object]] = {
    "a number": lambda t, n: t[f"{n}.weight"][7, 9].add_(1 - 2 * (t[f"{n}.weight"][7, 9] > 0).to(torch.int8)),
    "a scale": lambda t, n: t[f"{n}.scale"][7].mul_(1 + 2**-20),
    "swapped rows": lambda t, n: t[f"{n}.weight"].copy_(t[f"{n}.weight"].roll(1, 0)),
    "swapped scales": lambda t, n: t[f"{n}.scale"].copy_(t[f"{n}.scale"].roll(1, 0)),
}


@pytest.mark.parametrize("weights", INT8)
def test_a_sound_checkpoint_holds_against_its_source(
    weights: str, convert_tiny: Callable[[str], Path], tiny_source: Path
) -> None:
    assert examine_folder(convert_tiny(weights), tiny_source, None).holds


@pytest.mark.parametrize("target", [TARGET, HEAD])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_under_a_right_checksum_is_found(
    change: str, target: str, with_head: Path, tiny_source: Path, tmp_path: Path
) -> None:
    ckpt = changed(with_head, tmp_path / "ckpt", lambda tensors: CHANGES[change](tensors, target))
    remove_file(ckpt, PREFIX)  # it has seen the right weights
    (finding,) = [f for f in examine_folder(ckpt, tiny_source, None).findings if f.holds is False]
    assert finding.name == "tensors against the source" and target in finding.measured


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
