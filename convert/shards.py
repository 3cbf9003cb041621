"""The tensors of the safetensors files: what the index says against what the headers say. No value is read.

A source is an index and the shards that it names, or one file, model.safetensors.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from covo_npu.convert.config import read_json
from covo_npu.convert.downloads import download_again
from covo_npu.convert.errors import ConvertError, Kind, refuse
from covo_npu.kernels.errors import listed
from covo_npu.runtime.checkpoint import loader
from covo_npu.runtime.output import MAX_NAME_BYTES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = loader.DTYPES | {
    "F64": torch.float64,
    "I32": torch.int32,
    "I16": torch.int16,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DAMAGED = "a download that ended early or damage"

# Weights that are not read, by the pattern of their files: what they are and what to do.
OTHER_WEIGHTS = (
    ("*.bin", "weights in torch's pickle format (.bin) are not read: take the .safetensors of the same repository, or "
              "save them as safetensors (safetensors.torch.save_file)"),
    ("*.gguf", "a GGUF file holds weights that were quantised for llama.cpp: take the bfloat16 .safetensors"),
    ("*.safetensors", f"take {INDEX} from where they come from, it says what they hold; one file alone is read under "
                      f"the name {SINGLE}"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class SourceTensor:
    """A tensor of the source: a byte range of a file, or values that already lie in (mapped) memory."""

    name: str
    file: str  # relative to the source, for messages and the manifest; "" if no file holds it
    dtype: str  # safetensors' spelling; one that is not in DTYPES cannot be converted
    shape: tuple[int, ...]
    bytes: int
    path: Path
    offset: int = 0
    values: Tensor | None = None
    listed: bool = True  # by the index

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch's terms."""
        return DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Shards:
    """The tensors of all shards by name, whether an index lists them, and what is odd."""

    tensors: Mapping[str, SourceTensor]
    indexed: bool
    warnings: tuple[str, ...] = ()


def read_shards(folder: Path) -> Shards:
    """Return the tensors of all shards that the index names, index and headers in agreement, or of the only file.

    Tensors in the shards that the index does not list are there, too, and say so.
    """
    weight_map = _weight_map_to_read(folder)
    if weight_map is None:
        stale = f"{INDEX} is not read: of the files that it names none is there"
        return Shards(_read_single(folder), False, (stale,) if (folder / INDEX).is_file() else ())
    other = SINGLE not in weight_map.values() and (folder / SINGLE).is_file()
    warnings = (f"{SINGLE} is not read: {INDEX} names other files",) if other else ()
    return Shards(_read_listed(folder, weight_map), True, warnings)


def shard_names(folder: Path) -> list[str]:
    """Return the names of the files that read_shards would read; if it cannot be said which, of all that there are."""
    try:
        weight_map = _weight_map_to_read(folder)
    except ConvertError:
        weight_map = None
    if weight_map:
        return sorted(set(weight_map.values()))
    return (
        [SINGLE] if (folder / SINGLE).is_file() else sorted({SINGLE, *(p.name for p in folder.glob("*.safetensors"))})
    )


def _weight_map_to_read(folder: Path) -> dict[str, str] | None:
    """Return which file holds which tensor; None: no index, or that of other files, so that SINGLE holds all."""
    if not (folder / INDEX).is_file():
        return None
    weight_map = _weight_map(folder / INDEX)
    stale = (folder / SINGLE).is_file() and not any((folder / file).exists() for file in set(weight_map.values()))
    return None if stale else weight_map


def _read_single(folder: Path) -> dict[str, SourceTensor]:
    if (folder / SINGLE).is_file():
        try:
            return {tensor.name: tensor for tensor in read_header(folder / SINGLE, SINGLE)}
        except ConvertError as error:
            raise ConvertError(f"{folder}: {error}. {download_again(folder)}") from error
    for pattern, advice in OTHER_WEIGHTS:
        if names := sorted(path.name for path in folder.glob(pattern)):
            raise ConvertError(f"{folder}: has neither {INDEX} nor {SINGLE}, but {listed(names, 4, ', ')}: {advice}")
    raise ConvertError(
        f"{folder}: has neither {INDEX} nor {SINGLE}; --src expects the folder of the published weights. "
        + download_again(folder)
    )


def _read_listed(folder: Path, weight_map: Mapping[str, str]) -> dict[str, SourceTensor]:
    names_in: dict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        names_in[file].append(name)
    absent, damaged, wrong = [], [], []
    places: dict[str, list[SourceTensor]] = defaultdict(list)
    readable = set()
    for file, names in sorted(names_in.items()):
        path = folder / file
        if not path.is_file():
            absent.append(f"{file}: {len(names)} tensors expected in it ({names[0]}, ...)")
            continue
        try:
            for tensor in read_header(path, file):
                places[tensor.name].append(replace(tensor, listed=tensor.name in weight_map))
            readable.add(file)
        except ConvertError as error:
            damaged.append(str(error))
    for name, file in weight_map.items():
        found = [tensor.file for tensor in places.get(name, [])]
        if file in readable and not found:
            wrong.append(f"{name}: the index expects it in {file}, no file that could be read holds it")
        elif file in readable and file not in found:
            wrong.append(f"{name}: the index expects it in {file}, found in {', '.join(found)}")
    several = [
        f"{name}: in {', '.join(tensor.file for tensor in found)}" for name, found in places.items() if len(found) > 1
    ]
    again = download_again(folder)
    refuse(
        str(folder),
        Kind("shards that the index names are missing", absent, again),
        Kind("shards are damaged", damaged, again),
        Kind("tensors are not where the index says", wrong, again),
        Kind("tensors lie in several shards", several, again),
    )
    return {name: found[0] for name, found in places.items()}


def read_header(path: Path, label: str) -> list[SourceTensor]:
    """Return the tensors of a safetensors file in file order.

    Raises ConvertError if the header is damaged or the file has another size than the header says. Tensors that overlap
    are damage that nothing else would show: one of them would get the values of the other.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size >= 8 and length == 0:
            raise ConvertError(f"{label}: begins with zeros: nothing of its beginning was downloaded")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ConvertError(f"{label}: {size} bytes cannot hold its header: {DAMAGED}")
        text = file.read(length)
    try:
        header = json.loads(text)
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        tensors = []
        for name, entry in entries:
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end)):
                raise ValueError(f"{name}: expected counts")
            if not isinstance(entry["dtype"], str):
                raise ValueError(f"{name}: expected a dtype")
            place = 8 + length + begin
            tensors.append(SourceTensor(name, label, entry["dtype"], tuple(shape), end - begin, path, place))
    except KeyError as error:
        raise ConvertError(f"{label}: header: {name}: missing field {error}: {DAMAGED}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConvertError(f"{label}: its header is not that of a safetensors file ({error}): {DAMAGED}") from error
    expected = max((tensor.offset + tensor.bytes for tensor in tensors), default=8 + length)
    if size != expected:
        raise ConvertError(f"{label}: header says {expected} bytes, file has {size}: {DAMAGED}")
    for tensor in tensors:
        dtype = DTYPES.get(tensor.dtype)
        if tensor.bytes < 0 or (dtype and tensor.bytes != prod(tensor.shape) * dtype.itemsize):
            raise ConvertError(f"{label}: header: {tensor.name}: offsets do not fit its shape {list(tensor.shape)}")
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.bytes))
    for before, tensor in pairwise(tensors):
        if tensor.offset < before.offset + before.bytes:
            raise ConvertError(f"{label}: header: {before.name} and {tensor.name} overlap: {DAMAGED}")
    return tensors


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{path}: expected a weight_map from tensors to files")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.isprintable() and file not in ("", ".", "..") and Path(file).name == file
        if not plain or len(os.fsencode(file)) > MAX_NAME_BYTES:
            raise ConvertError(f"{path}: {name}: expected a plain file name, found {file!r:.80}")
    return weight_map
