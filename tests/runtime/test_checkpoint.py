"""The format: what is written is what the manifest says, stock readers agree, and the text is deterministic."""

import json
import os
import random
import shutil

import pytest
import torch
import xxhash
from made_checkpoint import LLM, block_digests, rewrite_in_layout_1, rewrite_manifest, small_tensors, write_checkpoint
from safetensors import safe_open

from covo_npu.runtime import CovoAudio, Session
from covo_npu.runtime.checkpoint import format as checkpoint
from covo_npu.runtime.checkpoint.format import BLOCK_BYTES, CheckpointError, plan_file, read_manifest


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "ckpt", small_tensors())


def test_reads_what_was_written(folder):
    manifest = read_manifest(folder)
    assert manifest.ranks == (LLM,)
    assert manifest.dtype == "bfloat16"
    assert manifest.special_tokens == {"im_end": 1}
    for name, tensors in small_tensors().items():
        record = manifest.files[name]
        assert list(record.tensors) == list(tensors)
        assert {key: t.shape for key, t in record.tensors.items()} == {
            key: tuple(t.shape) for key, t in tensors.items()
        }
        assert record.data_start % 4096 == 0
        assert all(t.offset % 512 == 0 for t in record.tensors.values())
    assert manifest.files["tokenizer.json"].data_start is None


def test_stock_reader_agrees(folder):
    manifest = read_manifest(folder)
    for name, tensors in small_tensors().items():
        with safe_open(folder / name, "pt") as stock:
            real = [key for key in stock.keys() if not key.startswith("__pad.")]  # noqa: SIM118 - not a dict
            assert sorted(real) == sorted(tensors)
            assert all(torch.equal(stock.get_tensor(key), tensors[key]) for key in real)
        data = (folder / name).read_bytes()
        for key, record in manifest.files[name].tensors.items():
            raw = tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert data[record.offset : record.offset + record.bytes] == raw


def test_manifest_is_deterministic_and_hashes_itself(folder, tmp_path):
    again = write_checkpoint(tmp_path / "again", small_tensors())
    text = (folder / "manifest.json").read_bytes()
    assert text == (again / "manifest.json").read_bytes()
    stated = json.loads(text)["manifest_xxh3_128"]
    assert next(iter(json.loads(text))) == "manifest_xxh3_128"
    assert xxhash.xxh3_128_hexdigest(text.replace(stated.encode(), b"0" * 32, 1)) == stated


def test_plan_aligns_and_fills_every_gap():
    rng = random.Random(3)
    tensors = [(f"t{i}", "BF16", (rng.randrange(1, 400),)) for i in range(300)]
    plan = plan_file(tensors)
    end = len(plan.header)
    assert end % 4096 == 0
    assert int.from_bytes(plan.header[:8], "little") == end - 8
    for name, entry in plan.entries.items():
        assert entry.offset == end
        assert name.startswith("__pad.") or entry.offset % 512 == 0
        end += entry.bytes
    assert plan.bytes == end
    assert list(plan.tensors) == [name for name, _, _ in tensors]


def test_source_checkpoint_is_told_from_rubbish(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a source checkpoint; convert it first: covo-convert --src"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        read_manifest(tmp_path / "config.json")


@pytest.mark.parametrize(("version", "advice"), [(3, "upgrade covo-npu"), (0, "convert the source again")])
def test_other_versions_say_what_to_do(folder, version, advice):
    rewrite_manifest(folder, lambda data: data.update(layout_version=version))
    with pytest.raises(CheckpointError, match=rf"layout version {version}, this program reads 1 and 2: {advice}"):
        read_manifest(folder)


def test_layout_1_still_loads_and_answers_alike(convert_tiny, tmp_path):
    new, old = convert_tiny("float32"), shutil.copytree(convert_tiny("float32"), tmp_path / "old")
    rewrite_in_layout_1(old)
    assert read_manifest(old).layout_version == 1
    models = [CovoAudio.load(folder, device="cpu", dtype="float32", speech=False) for folder in (new, old)]
    assert models[0].weights.tensors.keys() == models[1].weights.tensors.keys()
    sound = torch.rand(24_000, generator=torch.Generator().manual_seed(0)) - 0.5
    replies = [Session(model, mode="a2t", max_new_tokens=5).say(sound, 24_000) for model in models]
    assert replies[0].tokens == replies[1].tokens and len(replies[1].tokens) == 5


def _tensor(data, index, value, name="llm.norm.weight"):
    data["tensors"][LLM][name][index] = value


LIES = {
    "unknown dtype": (lambda d: _tensor(d, 0, "F8"), "dtype 'F8'"),
    "dtype of another type": (lambda d: _tensor(d, 0, ["BF16"]), "dtype"),
    "negative dimension": (lambda d: _tensor(d, 1, [-8]), "expected a count"),
    "fractional dimension": (lambda d: _tensor(d, 1, [8.0]), "expected a count"),
    "huge dimension": (lambda d: _tensor(d, 1, [2**70]), "expected a count"),
    "many huge dimensions": (lambda d: _tensor(d, 1, [2**62] * 8), "needs"),
    "hundreds of dimensions": (lambda d: _tensor(d, 1, [2**62] * 600), "expected .dtype, shape, offset, bytes."),
    "size against shape": (lambda d: _tensor(d, 3, 18), "needs 16 bytes, listed 18"),
    "offset outside the file": (lambda d: _tensor(d, 2, 2**40), "header says"),
    "overlap": (lambda d: _tensor(d, 2, d["tensors"][LLM]["llm.embed_tokens.weight"][2]), "header says"),
    "surplus tensor": (
        lambda d: d["tensors"][LLM].update(x=["U8", [1], 4096, 1]),
        "in the manifest, not in the header",
    ),
    "tensor left out": (lambda d: d["tensors"][LLM].pop("llm.scalar"), "in the header, not in the manifest"),
    "short entry": (lambda d: d["tensors"][LLM].update(x=["U8"]), "expected .dtype, shape, offset, bytes."),
    "size of the file": (lambda d: d["files"][LLM].update(bytes=d["files"][LLM]["bytes"] + 1), "found"),
    "huge file": (lambda d: d["files"][LLM].update(bytes=2**62), "expected 274877906944 checksums"),
    "negative file": (lambda d: d["files"][LLM].update(bytes=-1), "expected a count"),
    "block size": (lambda d: d["files"][LLM].update(block_bytes=2**40), "expected block_bytes"),
    "too few checksums": (lambda d: d["files"][LLM].update(xxh3_128=[]), "expected 1 checksums"),
    "checksum of another type": (lambda d: d["files"][LLM].update(xxh3_128=[7]), "checksums"),
    "data start unaligned": (lambda d: d["files"][LLM].update(data_start=4095), "no multiple of 4096"),
    "data start outside": (lambda d: d["files"][LLM].update(data_start=2**30), "no multiple of 4096 inside"),
    "absolute path": (lambda d: d["files"].update({"/etc/passwd": d["files"]["tokenizer.json"]}), "plain file name"),
    "path that climbs": (lambda d: d["files"].update({"../x": d["files"]["tokenizer.json"]}), "plain file name"),
    "dots": (lambda d: d["files"].update({"..": d["files"]["tokenizer.json"]}), "plain file name"),
    "manifest lists itself": (lambda d: d["files"].update({"manifest.json": {}}), "plain file name"),
    "control characters": (lambda d: d["files"].update({"a\x1b[2Jb": {}}), "control characters"),
    "no files": (lambda d: d.pop("files"), "files: expected dict, found None"),
    "files is a list": (lambda d: d.update(files=[]), "files: expected dict, found"),
    "tensors of no file": (lambda d: d["tensors"].update(other={}), "not listed as safetensors"),
    "no rank": (lambda d: d["tensor_parallel"].update(ranks=[]), "tensor_parallel"),
    "rank that is a list": (lambda d: d["tensor_parallel"].update(ranks=[[]]), "tensor_parallel"),
    "rank of no file": (lambda d: d["tensor_parallel"].update(ranks=["x"]), "tensor_parallel"),
    "special token": (lambda d: d.update(special_tokens={"im_end": "1"}), "special_tokens: expected ids"),
    "format": (lambda d: d.update(format="other"), "expected format 'covo-npu'"),
    "config": (lambda d: d["config"].pop("llm"), "missing: llm"),
}


@pytest.mark.parametrize("lie", LIES)
def test_manifest_that_lies_is_refused(folder, lie):
    change, message = LIES[lie]
    rewrite_manifest(folder, change)
    with pytest.raises(checkpoint.CovoError, match=message):
        read_manifest(folder)


def test_name_that_no_file_can_have_is_refused(folder):
    """JSON can hold a lone surrogate, UTF-8 cannot: the hash is made by hand."""
    text = (folder / "manifest.json").read_bytes().replace(b'"tokenizer.json"', b'"a\\ud800"', 1)
    start = text.index(b'128": "') + len(b'128": "')
    digest = xxhash.xxh3_128_hexdigest(text[:start] + b"0" * 32 + text[start + 32 :])
    (folder / "manifest.json").write_bytes(text[:start] + digest.encode() + text[start + 32 :])
    with pytest.raises(CheckpointError, match="control characters"):
        read_manifest(folder)


def _replace_header(folder, header: bytes, length: int | None = None):
    """Put another header into the LLM's file, in the room of the old one."""
    path = folder / LLM
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[8:start] = header.ljust(start - 8)[: start - 8]
    if length is not None:
        data[:8] = length.to_bytes(8, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        (b"{}", None, "in the manifest, not in the header"),
        (b"not json", None, "not valid JSON"),
        (b"\xff\xfe", None, "not valid JSON"),
        (b"[1]", None, "expected a JSON object"),
        (b"[" * 4000, None, "not valid JSON"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}', None, "expected dtype, shape and data_offsets"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}}', None, "expected dtype, shape and data_offsets"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', None, "expected a count"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-9999,-9995]}}', None, "expected a count"),
        (b'{"a":7}', None, "expected dtype, shape and data_offsets"),
        (b'{"a":{},"a":{}}', None, "stands twice"),
        (b'{"n":' + b"9" * 4000, None, "not valid JSON"),
        (b"{}", 100_000_000, "found one of 100000000"),
        (b"{}", 2**64 - 1, "found one of 18446744073709551615"),
        (b"{}", 0, "found one of 0"),
    ],
)
def test_header_that_lies_is_refused(folder, header, length, message):
    _replace_header(folder, header, length)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_manifest(folder)
    assert LLM in str(caught.value)


@pytest.mark.parametrize(
    ("shift", "message"),
    [(-512, "overlaps the tensor before it"), (512, "leaves a hole before it")],
)
def test_header_and_manifest_that_lie_together_are_refused(folder, shift, message):
    """Both move one tensor: only the rule that tensors and pads tile the data can see it."""
    path = folder / LLM
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["llm.norm.weight"]["data_offsets"] = [n + shift for n in header["llm.norm.weight"]["data_offsets"]]
    _replace_header(folder, json.dumps(header, separators=(",", ":")).encode())

    def change(manifest):
        manifest["tensors"][LLM]["llm.norm.weight"][2] += shift
        manifest["files"][LLM]["xxh3_128"] = block_digests(path)

    rewrite_manifest(folder, change)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(folder)


def test_header_of_a_hundred_megabytes_is_not_read(tmp_path):
    """A sparse file whose header really is that long, and a manifest that agrees: refused by its size alone."""
    folder = write_checkpoint(tmp_path / "ckpt", small_tensors())
    start = 100_000_000 // 4096 * 4096
    with (folder / LLM).open("wb") as file:
        file.write((start - 8).to_bytes(8, "little") + b"{")
        file.truncate(start)

    def change(manifest):
        manifest["files"][LLM].update(bytes=start, data_start=start, xxh3_128=["0" * 32] * -(-start // BLOCK_BYTES))
        manifest["tensors"][LLM] = {}

    rewrite_manifest(folder, change)
    with pytest.raises(CheckpointError, match="no multiple of 4096 inside"):
        read_manifest(folder)


def test_manifest_too_large_is_not_read(folder):
    os.truncate(folder / "manifest.json", checkpoint.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(CheckpointError, match="expected a file of at most"):
        read_manifest(folder)


def test_problems_are_shown_together(folder):
    for name in (LLM, "encoder.safetensors", "tokenizer.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        read_manifest(folder)
    assert str(caught.value).count("missing") == 3


def test_many_problems_are_counted(folder):
    def change(manifest):
        manifest["tensors"][LLM].update({f"llm.{i}": ["U8", [1], 4096, 1] for i in range(25)})

    rewrite_manifest(folder, change)
    with pytest.raises(CheckpointError, match="and 15 more") as caught:
        read_manifest(folder)
    assert str(caught.value).count("not in the header") == 10


def test_a_checkpoint_is_told_from_other_folders_whatever_its_version_and_state(folder, tmp_path):
    assert checkpoint.is_checkpoint(folder)
    rewrite_manifest(folder, lambda data: data.update(layout_version=99))
    text = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(text[: len(text) // 2])  # damaged, but ours
    assert checkpoint.is_checkpoint(folder)
    (folder / "manifest.json").write_text('{"format": "covo-npu", "name": "a web app"}')
    assert not checkpoint.is_checkpoint(folder)
    assert not checkpoint.is_checkpoint(tmp_path / "absent")
