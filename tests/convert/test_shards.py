"""Weights in one file, in shards, with indices that say too much or too little; formats that are not read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from source_edits import INDEX, PICKLE, SHARDS, VALUES, edit_json, edit_pickle, edit_shard, merge_shards, rewrite_header

from covo_npu.convert.shards import read_shards
from covo_npu.runtime.checkpoint.format import read_manifest

FILES = ["llm-rank0of1.safetensors", "encoder.safetensors", "token2wav.safetensors", "tokenizer.json"]


@pytest.fixture
def same_files(tmp_path: Path, convert_tiny: Callable[[str], Path]) -> Callable[[], bool]:
    """A function: whether all files but the manifest, which names its sources, are those of the tiny source."""

    def same() -> bool:
        return all(
            (tmp_path / "target" / name).read_bytes() == (convert_tiny("bfloat16") / name).read_bytes()
            for name in FILES
        )

    return same


@pytest.mark.parametrize("index", ["none", "stale", "its own"])
def test_one_file_is_read_without_an_index_and_with_one_of_shards_that_are_gone(
    index: str, source: Path, convert, tmp_path: Path, same_files
):
    merge_shards(source)
    if index == "none":
        (source / INDEX).unlink()
    elif index == "its own":
        edit_json(source / INDEX, lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], "model.safetensors")))
    outcome = convert(source)
    assert outcome.code == 0 and same_files()
    stale = f"warning: {INDEX} is not read: of the files that it names none is there"
    assert (stale in outcome.err) == (index == "stale") and (index == "stale") == ("warning" in outcome.err)
    sources = read_manifest(tmp_path / "target").source
    assert "model.safetensors" in sources and (INDEX in sources) == (index == "its own")


def test_a_single_file_beside_complete_shards_is_mentioned(source: Path, convert, same_files):
    save_file({"x": torch.zeros(3)}, source / "model.safetensors")
    outcome = convert(source)
    assert outcome.code == 0 and same_files()
    assert f"warning: model.safetensors is not read: {INDEX} names other files" in outcome.err


def test_an_index_of_which_some_shards_are_there_is_believed(source: Path, convert):
    """A single file may be anything then: what is missing is named."""
    save_file({"x": torch.zeros(3)}, source / "model.safetensors")
    (source / SHARDS[1]).unlink()
    outcome = convert(source)
    assert outcome.code == 1 and "shards that the index names are missing (1)" in outcome.err


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("pytorch_model-00001-of-00002.bin", "weights in torch's pickle format (.bin) are not read: take the .safeten"),
        ("covo-q4_k_m.gguf", "a GGUF file holds weights that were quantised for llama.cpp: take the bfloat16 .safeten"),
        ("covo.safetensors", "one file alone is read under the name model.safetensors"),
    ],
)
def test_other_forms_of_weights_are_named(name: str, advice: str, source: Path, convert):
    for shard in (*SHARDS, INDEX):
        (source / shard).unlink()
    outcome = convert(source)
    assert outcome.code == 1 and f"has neither {INDEX} nor model.safetensors; --src expects" in outcome.err
    (source / name).write_bytes(b"x" * 100)
    outcome = convert(source)
    assert outcome.code == 1 and f"but {name}: " in outcome.err and advice in outcome.err, outcome.err


# --- what the index does not list


def test_tensors_that_the_index_does_not_list_and_nothing_needs_are_left_out_and_reported(
    source: Path, convert, tmp_path: Path, same_files
):
    edit_shard(
        source / SHARDS[0],
        lambda t: t.update({f"llm.model.layers.{i}.self_attn.lora_A.weight": torch.ones(4, 5) for i in (0, 1)}),
    )
    edit_shard(source / SHARDS[2], lambda t: t.update({"optimizer.step": torch.tensor([7])}))
    outcome = convert(source)
    assert outcome.code == 0 and same_files()
    reason = "not needed, and the index does not list it"
    assert f"left out: optimizer.* 1 tensors, 0.00 MB ({reason})" in outcome.out
    left = read_manifest(tmp_path / "target").left_out
    assert left["llm.model.layers.{}.self_attn.lora_A"] == {"tensors": 2, "bytes": 160, "reason": reason}


def test_tensors_that_the_index_lists_and_nothing_needs_are_left_out_too(source: Path, convert, tmp_path, same_files):
    edit_shard(source / SHARDS[0], lambda t: t.update({"llm.model.rotary_emb.inv_freq": torch.ones(8)}))
    edit_json(source / INDEX, lambda i: i["weight_map"].update({"llm.model.rotary_emb.inv_freq": SHARDS[0]}))
    assert convert(source).code == 0 and same_files()
    left = read_manifest(tmp_path / "target").left_out
    assert left["llm.model.rotary_emb"]["reason"] == "derived: computed from the sizes"


def test_tensors_that_are_left_out_for_several_reasons_are_all_counted(source: Path, convert):
    edit_shard(source / SHARDS[0], lambda t: t.update({f"head.{name}": torch.ones(2, 500) for name in "abc"}))
    edit_json(source / INDEX, lambda i: i["weight_map"].update({"head.b": SHARDS[0]}))
    reasons = "not needed, and the index does not list it; not needed for inference"
    assert f"left out: head.* 3 tensors, 0.01 MB ({reasons})" in convert(source, "--dry-run").out


@pytest.mark.parametrize("name", ["odd\nname", "no\u00a0break", "half \ud800 a character"])
def test_odd_names_of_what_is_left_out_are_escaped(name: str, source: Path, convert, tmp_path: Path):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    rewrite_header(source / SHARDS[0], lambda h: h.update({name: empty}))
    edit_pickle(source / PICKLE, lambda m: m.update({f"{name}.weight": torch.ones(2)}))
    assert convert(source).code == 0
    assert read_manifest(tmp_path / "target").left_out[ascii(name)[1:-1]]["tensors"] == 2


# --- dtypes


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "U32", "C64"])
def test_dtypes_that_cannot_be_converted_are_named_only_where_they_are_needed(dtype: str, source: Path, convert):
    rewrite_header(source / SHARDS[3], lambda h: h[VALUES].update(dtype=dtype))
    outcome = convert(source)
    assert outcome.code == 1 and f"{VALUES}: {dtype} in {SHARDS[3]}" in outcome.err
    assert "use the bfloat16, float16 or float32 checkpoint that they were made of" in outcome.err


def test_a_quantised_tensor_that_nothing_needs_does_not_matter(source: Path, convert, same_files):
    edit_shard(source / SHARDS[3], lambda t: t.update({"llm.extra": torch.ones(3, 5).to(torch.float8_e4m3fn)}))
    assert convert(source).code == 0 and same_files()


def test_a_model_in_fp8_names_its_tensors_and_says_what_to_use(source: Path, convert):
    for shard in SHARDS:
        edit_shard(
            source / shard,
            lambda t: t.update({n: v.to(torch.float8_e4m3fn) for n, v in list(t.items()) if "proj.weight" in n}),
        )
    outcome = convert(source)
    assert outcome.code == 1 and "tensors have a dtype that cannot be converted" in outcome.err
    assert "F8_E4M3" in outcome.err and "Quantised weights (FP8, INT8, 4 bits) are not supported" in outcome.err
    assert "damaged" not in outcome.err


def test_headers_are_what_the_safetensors_library_wrote(tiny_source: Path):
    found = read_shards(tiny_source)
    listed = json.loads((tiny_source / INDEX).read_text())["weight_map"]
    assert found.indexed and {name: tensor.file for name, tensor in found.tensors.items()} == listed
    for shard in SHARDS:
        data = (tiny_source / shard).read_bytes()
        for name, expected in load_file(tiny_source / shard).items():
            tensor = found.tensors[name]
            assert (tensor.shape, tensor.torch_dtype, tensor.bytes) == (
                tuple(expected.shape),
                expected.dtype,
                expected.nbytes,
            )
            raw = bytearray(data[tensor.offset : tensor.offset + tensor.bytes])
            assert torch.equal(torch.frombuffer(raw, dtype=expected.dtype).view(expected.shape), expected)
