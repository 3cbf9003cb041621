"""The format of a converted checkpoint (npu_ckpt), layout version 2: what the writer plans and what the reader refuses.

A folder holds `manifest.json`, the tokenizer, and safetensors files. In these, data starts at a multiple of 4096 bytes
and every tensor at a multiple of 512, in the order of use; explicit tensors `__pad.{n}` fill what would be holes. The
manifest repeats every header, holds an xxh3-128 of each 16 MiB block of each file, and a hash of itself. Nothing is
allocated, mapped or believed before it has been checked against the file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import xxhash

from covo_npu.kernels.errors import CovoError, listed
from covo_npu.runtime.checkpoint.config import ModelConfig, from_dict
from covo_npu.runtime.checkpoint.limits import require_plausible
from covo_npu.runtime.options import DTYPES
from covo_npu.runtime.output import MAX_NAME_BYTES

FORMAT = "covo-npu"
LAYOUT_VERSION = 2
READABLE = (1, LAYOUT_VERSION)
# What older layouts hold and nothing reads any more. Version 1: the mel filter bank; and generation_config.json.
RETIRED = frozenset({"frontend.mel_filters"})
LAYERS, HEAD = "layers", "head"
# The words for weights in 8 bits: which of the LLM's products are I8 [N, K], each with a scale F32 [N] beside it. Under
# any other word, a dtype, none is.
INT8 = {"int8": (LAYERS,), "int8+head": (LAYERS, HEAD)}
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
ENCODER = "encoder.safetensors"
TOKEN2WAV = "token2wav.safetensors"
PREFIX = "prefix.safetensors"
# What a checkpoint of any layout may hold.
FILE_NAMES = re.compile(
    r"(manifest|tokenizer|generation_config)\.json|(llm-rank\d+of\d+|encoder|token2wav|prefix)\.safetensors"
)

BLOCK_BYTES = 16 * 2**20  # unit of the checksums
DATA_ALIGNMENT = 4096  # a page: where the data of a safetensors file starts
TENSOR_ALIGNMENT = 512  # what Ascend's allocator and direct I/O want; a multiple of the 64 bytes of AVX-512
PAD_PREFIX = "__pad."
MAX_HEADER_BYTES = 16 * 2**20  # ours are below 1 MB; safetensors itself allows 100 MB
MAX_MANIFEST_BYTES = 64 * 2**20
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "U8": 1, "I8": 1}  # safetensors' spelling

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that git-lfs has not fetched

_HASH_PREFIX = (
    b'{\n "manifest_xxh3_128": "'  # fixed for all versions, so that any reader can tell damage from a newer layout
)
_HASH_CHARACTERS = 32
_SOURCE_FILES = ("model.safetensors.index.json", "config.json")


class CheckpointError(CovoError):
    """A checkpoint is absent, damaged, of another version, or not what its manifest says."""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Where one tensor lies: `offset` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of the folder. `data_start` is None, and `tensors` empty, for a file that is not safetensors."""

    name: str
    path: Path
    bytes: int
    data_start: int | None
    blocks: tuple[str, ...]  # xxh3-128 of each BLOCK_BYTES of the whole file, in hex
    tensors: Mapping[str, TensorRecord]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checked manifest. `left_out` and `source` are the converter's notes, kept as JSON objects."""

    folder: Path
    layout_version: int
    producer: str
    dtype: str  # of the LLM and the encoder: "bfloat16", "float16" or "float32"; token2wav is always float32
    weights: str  # of the LLM's products: that dtype, or a word of INT8
    ranks: tuple[str, ...]  # the LLM's file of each tensor-parallel rank
    config: ModelConfig
    special_tokens: Mapping[str, int]
    files: Mapping[str, FileRecord]
    left_out: Mapping[str, Any]
    source: Mapping[str, Any]

    @property
    def int8(self) -> tuple[str, ...]:
        """Which of the LLM's products are held in 8 bits: LAYERS, HEAD."""
        return INT8.get(self.weights, ())


@dataclass(frozen=True, slots=True)
class FilePlan:
    """The bytes of a safetensors file before its data: header, and the place of every tensor and pad in file order."""

    header: bytes  # length prefix and padding included: the data starts at len(header)
    entries: Mapping[str, TensorRecord]  # in file order, pads included
    bytes: int

    @property
    def tensors(self) -> dict[str, TensorRecord]:
        """The entries without the pads, as the manifest lists them."""
        return {name: entry for name, entry in self.entries.items() if not name.startswith(PAD_PREFIX)}


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file of a new checkpoint: its size, the xxh3-128 of each block, its layout if it is a safetensors file."""

    bytes: int
    blocks: list[str]
    layout: FilePlan | None = None


def plan_file(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> FilePlan:
    """Return the plan of a safetensors file that holds (name, dtype, shape) in this order, aligned and padded."""
    sizes = [(name, dtype, tuple(shape), prod(shape) * DTYPE_BYTES[dtype]) for name, dtype, shape in tensors]
    padded: list[tuple[str, str, tuple[int, ...], int]] = []
    for number, entry in enumerate(sizes):
        padded.append(entry)
        if gap := -entry[3] % TENSOR_ALIGNMENT:
            padded.append((f"{PAD_PREFIX}{number}", "U8", (gap,), gap))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape, size in padded:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    start = 8 + len(text)
    entries = {
        name: TensorRecord(dtype, shape, start + header[name]["data_offsets"][0], size)
        for name, dtype, shape, size in padded
    }
    return FilePlan(len(text).to_bytes(8, "little") + text, entries, start + end)


def manifest_files(files: Mapping[str, WrittenFile]) -> dict[str, Any]:
    """Return the "files" and "tensors" parts of a manifest."""
    return {
        "files": {
            name: {
                "bytes": file.bytes,
                "data_start": len(file.layout.header) if file.layout else None,
                "block_bytes": BLOCK_BYTES,
                "xxh3_128": file.blocks,
            }
            for name, file in files.items()
        },
        "tensors": {
            name: {key: [t.dtype, list(t.shape), t.offset, t.bytes] for key, t in file.layout.tensors.items()}
            for name, file in files.items()
            if file.layout
        },
    }


def manifest_bytes(body: Mapping[str, Any]) -> bytes:
    """Return the text of manifest.json: a hash of the whole text, format and layout version, then the keys of body."""
    zeros = "0" * _HASH_CHARACTERS
    whole = {"manifest_xxh3_128": zeros, "format": FORMAT, "layout_version": LAYOUT_VERSION, **body}
    text = (_pretty(whole, "") + "\n").encode()
    assert text.startswith(_HASH_PREFIX + zeros.encode()), "the hash comes first"
    return _HASH_PREFIX + xxhash.xxh3_128_hexdigest(text).encode() + text[len(_HASH_PREFIX) + _HASH_CHARACTERS :]


def write_manifest(folder: Path, body: Mapping[str, Any]) -> None:
    """Write manifest.json into folder and to the disk. The last step of a conversion, before the folder's rename."""
    with (folder / MANIFEST).open("wb") as file:
        file.write(manifest_bytes(body))
        file.flush()
        os.fsync(file.fileno())


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a manifest of this format: of any version, damaged or not."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            head = file.read(len(_HASH_PREFIX) + 4096)
    except OSError:
        return False
    return head.startswith(_HASH_PREFIX) and f'"format": "{FORMAT}"'.encode() in head


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Return the manifest of the converted checkpoint in folder `path`, checked against every file.

    Checked: the manifest's own hash and version, each file's presence, kind and size, each safetensors header against
    the manifest's list, and the content of the small text files. The tensors' bytes are left to the loader.
    Raises CheckpointError that names the files, what was expected and what was found.
    """
    folder = Path(path)
    try:
        body = _read_body(folder)
        manifest = _parse(folder, body)
        problems = [problem for file in manifest.files.values() for problem in _check_file(file)]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.filename or folder}: {error.strerror}") from error
    if problems:
        title = f"{folder}: the files are not what the manifest says"
        raise CheckpointError(f"{title}:\n  " + listed(problems, separator="\n  "))
    return manifest


# --- the manifest


def _read_body(folder: Path) -> dict[str, Any]:
    """Return the JSON object of manifest.json, its hash and version checked."""
    path = folder / MANIFEST
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder; expected a converted checkpoint")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; expected a converted checkpoint")
    if not path.exists():
        if any((folder / name).exists() for name in _SOURCE_FILES):
            raise CheckpointError(
                f"{folder} is a source checkpoint; convert it first: covo-convert --src {folder} --dst <new folder>"
            )
        if snapshots := sorted(str(found.parent) for found in folder.glob(f"snapshots/*/{MANIFEST}")):
            raise CheckpointError(f"{folder}: a cache folder; name the checkpoint in it: {listed(snapshots)}")
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}: not a converted checkpoint, or the conversion did not finish"
        )
    if not path.is_file():  # before the open: opening a pipe would wait for ever
        raise CheckpointError(f"{path}: not a regular file")
    if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path}: expected a file of at most {MAX_MANIFEST_BYTES} bytes, found {size}")
    text = path.read_bytes()
    end = len(_HASH_PREFIX) + _HASH_CHARACTERS
    if text.startswith(LFS_POINTER):
        raise CheckpointError(f"{path}: a pointer of git-lfs, not the file: git lfs pull fetches it")
    if not text.startswith(_HASH_PREFIX):
        raise CheckpointError(
            f"{path}: damaged, or not the manifest of a converted checkpoint; convert the source again"
        )
    expected = text[len(_HASH_PREFIX) : end].decode("latin-1")
    found = xxhash.xxh3_128_hexdigest(_HASH_PREFIX + b"0" * _HASH_CHARACTERS + text[end:])
    if expected != found:
        raise CheckpointError(
            f"{path}: damaged: checksum expected {expected!r}, found {found!r}; copy it or convert it again"
        )
    body = _json_object(text, str(path))
    version = body.get("layout_version")
    if body.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT!r}, found {body.get('format')!r}")
    if version not in READABLE:
        advice = (
            "upgrade covo-npu" if isinstance(version, int) and version > LAYOUT_VERSION else "convert the source again"
        )
        readable = " and ".join(map(str, READABLE))
        raise CheckpointError(f"{path}: layout version {version!r}, this program reads {readable}: {advice}")
    return body


def _parse(folder: Path, body: Mapping[str, Any]) -> Manifest:
    where = str(folder / MANIFEST)
    files = _take(body, "files", dict, where)
    tensors = _take(body, "tensors", dict, where)
    records = {name: _file_record(folder, name, files, tensors, where) for name in files}
    if surplus := sorted(set(tensors) - {name for name, file in records.items() if file.data_start is not None}):
        title = f"{where}: tensors of files that are not listed as safetensors"
        raise CheckpointError(f"{title}:\n  " + listed(surplus, separator="\n  "))
    parallel = _take(body, "tensor_parallel", dict, where)
    ranks = tuple(_take(parallel, "ranks", list, f"{where}: tensor_parallel"))
    if (
        not ranks
        or len(ranks) != parallel.get("size")
        or any(type(rank) is not str or rank not in tensors for rank in ranks)
    ):
        raise CheckpointError(
            f"{where}: tensor_parallel: expected a listed file for each rank, found {parallel!r:.200}"
        )
    special = _take(body, "special_tokens", dict, where)
    if any(type(token) is not int or token < 0 for token in special.values()):
        raise CheckpointError(f"{where}: special_tokens: expected ids, found {special!r:.200}")
    config = from_dict(ModelConfig, _take(body, "config", dict, where), f"{where}: config")
    require_plausible(config, f"{where}: config")
    dtype = _take(body, "dtype", str, where)
    if dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype: expected one of {', '.join(DTYPES)}, found {dtype!r:.80}")
    weights = body.get("weights", dtype)  # a checkpoint that does not say has one dtype
    if weights not in (dtype, *INT8):
        expected = ", ".join((dtype, *INT8))
        raise CheckpointError(
            f"{where}: weights: expected one of {expected}, found {weights!r:.80}; upgrade covo-npu, or convert again"
        )
    return Manifest(
        folder=folder,
        layout_version=body["layout_version"],
        producer=_take(body, "producer", str, where),
        dtype=dtype,
        weights=weights,
        ranks=ranks,
        config=config,
        special_tokens=special,
        files=records,
        left_out=_take(body, "left_out", dict, where),
        source=_take(body, "source", dict, where),
    )


def _file_record(
    folder: Path, name: str, files: Mapping[str, Any], tensors: Mapping[str, Any], where: str
) -> FileRecord:
    if name in ("", ".", "..", MANIFEST) or Path(name).name != name or len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise CheckpointError(f"{where}: {name!r}: expected a plain file name inside the folder")
    here = f"{where}: {name}"
    entry = _take(files, name, dict, where)
    size = _count(entry.get("bytes"), f"{here}: bytes")
    blocks = tuple(_take(entry, "xxh3_128", list, here))
    if entry.get("block_bytes") != BLOCK_BYTES:
        raise CheckpointError(f"{here}: expected block_bytes {BLOCK_BYTES}, found {entry.get('block_bytes')!r:.80}")
    if len(blocks) != -(-size // BLOCK_BYTES) or not all(isinstance(digest, str) for digest in blocks):
        raise CheckpointError(
            f"{here}: expected {-(-size // BLOCK_BYTES)} checksums for {size} bytes, found {len(blocks)}"
        )
    if entry.get("data_start") is None:
        return FileRecord(name, folder / name, size, None, blocks, {})
    start = _count(entry["data_start"], f"{here}: data_start")
    if start % DATA_ALIGNMENT or not 8 <= start <= min(size, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{here}: data_start {start} is no multiple of {DATA_ALIGNMENT} inside the file of {size} bytes"
        )
    listed = _take(tensors, name, dict, f"{where}: tensors")
    records = {key: _tensor_record(value, f"{here}: {key}") for key, value in listed.items()}
    return FileRecord(name, folder / name, size, start, blocks, records)


def _tensor_record(entry: object, where: str) -> TensorRecord:
    if not isinstance(entry, list) or len(entry) != 4 or not isinstance(entry[1], list) or len(entry[1]) > 8:
        raise CheckpointError(f"{where}: expected [dtype, shape, offset, bytes], found {entry!r:.200}")
    dtype, shape = entry[0], tuple(_count(n, f"{where}: shape") for n in entry[1])
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where}: dtype {dtype!r:.80}, expected one of {', '.join(DTYPE_BYTES)}")
    record = TensorRecord(dtype, shape, _count(entry[2], f"{where}: offset"), _count(entry[3], f"{where}: bytes"))
    if record.bytes != prod(shape) * DTYPE_BYTES[dtype]:
        raise CheckpointError(
            f"{where}: {dtype} {list(shape)} needs {prod(shape) * DTYPE_BYTES[dtype]} bytes, listed {record.bytes}"
        )
    return record


# --- the files


def _check_file(file: FileRecord) -> list[str]:
    """Return what is wrong with one file, [] if nothing is. Reads headers and small files, never tensor data."""
    if not file.path.exists():  # links are followed, wherever they lead: caches and volumes are made of them
        leads = f": the link leads to {file.path.readlink()}, where nothing is" if file.path.is_symlink() else ""
        return [f"{file.name}: missing{leads}"]
    if not file.path.is_file():  # before the open: opening a pipe would wait for ever
        return [f"{file.name}: not a regular file"]
    with file.path.open("rb") as opened:
        found = os.fstat(opened.fileno()).st_size
        if found != file.bytes:
            pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
            advice = "a pointer of git-lfs: git lfs pull fetches the file" if pointer else "copy it again"
            return [f"{file.name}: expected {file.bytes} bytes, found {found}; {advice}"]
        if file.data_start is not None:
            return _check_header(file, opened.read(file.data_start))
        return [
            f"{file.name}: damaged in the block of {BLOCK_BYTES} bytes at {i * BLOCK_BYTES}: "
            f"checksum expected {expected}, found {digest}; copy it again"
            for i, expected in enumerate(file.blocks)
            if (digest := xxhash.xxh3_128_hexdigest(opened.read(BLOCK_BYTES))) != expected
        ]


def _check_header(file: FileRecord, head: bytes) -> list[str]:
    """Return how the safetensors header differs from the manifest, from the format's rules or from our alignment."""
    assert file.data_start is not None
    length = int.from_bytes(head[:8], "little")
    if len(head) != file.data_start or length != file.data_start - 8:
        return [f"{file.name}: expected a header of {file.data_start - 8} bytes, found one of {length}"]
    try:
        header = _json_object(head[8:], f"{file.name}: header")
    except CheckpointError as error:
        return [str(error)]
    header.pop("__metadata__", None)
    found: dict[str, TensorRecord] = {}
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            row = [entry["dtype"], entry["shape"], begin + file.data_start, end - begin]
            found[name] = _tensor_record(row, f"{file.name}: header: {name}")
        except (TypeError, KeyError, ValueError):
            return [f"{file.name}: header: {name}: expected dtype, shape and data_offsets, found {entry!r:.200}"]
        except CheckpointError as error:
            return [str(error)]
    return _compare(file, found) or _check_places(file, found)


def _compare(file: FileRecord, found: Mapping[str, TensorRecord]) -> list[str]:
    real = {name: record for name, record in found.items() if not name.startswith(PAD_PREFIX)}
    problems = [f"{file.name}: {name}: in the header, not in the manifest" for name in real if name not in file.tensors]
    for name, expected in file.tensors.items():
        if name not in real:
            problems.append(f"{file.name}: {name}: in the manifest, not in the header")
        elif real[name] != expected:
            problems.append(f"{file.name}: {name}: manifest says {expected}, header says {real[name]}")
    return problems


def _check_places(file: FileRecord, found: Mapping[str, TensorRecord]) -> list[str]:
    """Tensors and pads must tile the data section: no overlap, no hole, nothing outside, each start aligned."""
    assert file.data_start is not None
    end = file.data_start
    for name, record in sorted(found.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if record.offset != end:
            fault = "overlaps the tensor before it" if record.offset < end else "leaves a hole before it"
            return [f"{file.name}: {name}: {fault}: expected offset {end}, found {record.offset}"]
        if record.offset % TENSOR_ALIGNMENT and not name.startswith(PAD_PREFIX):
            return [f"{file.name}: {name}: offset {record.offset} is no multiple of {TENSOR_ALIGNMENT}"]
        end += record.bytes
    return [] if end == file.bytes else [f"{file.name}: the tensors end at {end}, the file at {file.bytes}"]


# --- JSON


def _json_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict. Readers differ on double keys, terminals on control characters: both are refused."""
    value = dict(pairs)
    if len(value) != len(pairs) or not all(key.isprintable() for key in value):
        raise ValueError("a key stands twice or holds control characters")
    return value


def _take(data: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = data.get(key)
    if not isinstance(value, kind):
        raise CheckpointError(f"{where}: {key}: expected {kind.__name__}, found {value!r:.80}")
    return value


def _count(value: object, where: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise CheckpointError(f"{where}: expected a count, found {str(value)[:80]}")
    return value


def _pretty(value: object, indent: str) -> str:
    """Return JSON with one line for each entry of an object and lists kept on one line: fit for people and for diff."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    inner = indent + " "
    rows = (f"{inner}{json.dumps(key, ensure_ascii=False)}: {_pretty(item, inner)}" for key, item in value.items())
    return "{\n" + ",\n".join(rows) + "\n" + indent + "}"
