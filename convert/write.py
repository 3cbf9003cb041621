"""A plan to a folder on disk: steps streamed into aligned safetensors files, the manifest last.

No more than a few blocks of 16 MiB are in memory, whatever the sizes: rows are copied byte for byte from their files,
only what must be computed (at most one convolution of the vocoder at a time) becomes a tensor.
"""

import errno
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from covo_npu.convert import rules, transforms
from covo_npu.convert.errors import ConvertError
from covo_npu.convert.plan import Plan, Step
from covo_npu.convert.source import Source, SourceTensor
from covo_npu.convert.stream import Bytes, SourceFile, Stream, Zeros, write_file
from covo_npu.runtime import checkpoint
from covo_npu.runtime.config import to_dict

FILES = {"llm": "llm-rank0of1.safetensors", "encoder": checkpoint.ENCODER, "token2wav": checkpoint.TOKEN2WAV}
CAST_BYTES = 2**20  # values are cast in pieces of this size, which stay in the cache of a core
Advance = Callable[[int], object]


class Reading:
    """The open files of the source, and the digest of every tensor that was read to its end."""

    def __init__(self) -> None:
        self.files: dict[Path, SourceFile] = {}
        self.digests: dict[SourceTensor, str] = {}

    def file(self, path: Path) -> SourceFile:
        """Return the file, opened once."""
        if path not in self.files:
            self.files[path] = SourceFile(path)
        return self.files[path]


def write_checkpoint(plan: Plan, source: Source, folder: Path, advance: Advance = lambda count: None) -> dict[str, Any]:
    """Write all files of a plan into an empty folder and return the body of the manifest, which is written last.

    advance: told of bytes as they are written. Raises ConvertError if a value cannot be converted or the disk is full.
    """
    reading = Reading()
    files: dict[str, tuple[checkpoint.FilePlan | None, int, list[str]]] = {}
    try:
        for stem, steps in plan.files().items():
            layout = checkpoint.plan_file((step.target, step.dtype, step.shape) for step in steps)
            files[FILES[stem]] = (layout, *write_file(folder / FILES[stem], _streams(layout, steps, reading), advance))
        texts = {checkpoint.TOKENIZER: source.tokenizer.text, checkpoint.GENERATION_CONFIG: _pretty(rules.GENERATION)}
        for name, text in texts.items():
            files[name] = (None, *write_file(folder / name, [Bytes(text)], advance))
        body = manifest_body(plan, source, files, reading.digests)
        checkpoint.write_manifest(folder, body)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ConvertError(
            f"{folder.parent}: {error.strerror}; what was written is removed; make room and try again"
        ) from error
    (folder / checkpoint.MANIFEST).chmod(0o644)
    folder.chmod(0o755)
    return body


def manifest_body(
    plan: Plan,
    source: Source,
    files: Mapping[str, tuple[checkpoint.FilePlan | None, int, list[str]]],
    digests: Mapping[SourceTensor, str],
) -> dict[str, Any]:
    """Return the manifest without its own hash. No times and no paths: the same source gives the same bytes."""
    return {
        "producer": f"covo-npu {version('covo-npu')}",
        "dtype": str(plan.dtype).removeprefix("torch."),
        "tensor_parallel": {"size": 1, "ranks": [FILES["llm"]]},
        "config": to_dict(plan.config),
        "special_tokens": dict(source.tokenizer.special_tokens),
        **checkpoint.manifest_files(files),
        "left_out": {
            prefix: {"tensors": group.tensors, "bytes": group.bytes, "reason": group.reason}
            for prefix, group in plan.left_out.items()
        },
        "source": source_record(source, digests),
    }


def source_record(source: Source, digests: Mapping[SourceTensor, str]) -> dict[str, dict[str, object]]:
    """Return name -> size and xxh3-128 of every source file: what the checkpoint was made of.

    A small file has the digest of its bytes. That of a file of tensors is over a line "name digest" of each tensor that
    was used, in order of the names: the tensors are read once, and in another order than they lie in the file.
    """
    record: dict[str, dict[str, object]] = {}
    for name, path in source.small_files.items():
        data = path.read_bytes()
        record[name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    groups: dict[str, list[SourceTensor]] = defaultdict(list)
    for tensor in digests:
        if tensor.path.is_file():  # not the zeros that stand for an absent voice
            groups[tensor.file].append(tensor)
    for name, tensors in groups.items():
        digest = xxhash.xxh3_128()
        for tensor in sorted(tensors, key=lambda tensor: tensor.name):
            digest.update(f"{tensor.name} {digests[tensor]}\n".encode())
        record[name] = {"bytes": tensors[0].path.stat().st_size, "xxh3_128": digest.hexdigest()}
    return dict(sorted(record.items()))


# --- steps to streams


def _streams(layout: checkpoint.FilePlan, steps: list[Step], reading: Reading) -> Iterator[Stream]:
    """Yield the bytes of a file: header, tensors, the pads between them."""
    yield Bytes(layout.header)
    by_name = {step.target: step for step in steps}
    for name, entry in layout.entries.items():
        if name.startswith(checkpoint.PAD_PREFIX):
            yield Zeros(entry.bytes)
        else:
            yield from _step_streams(by_name[name], reading)


def _step_streams(step: Step, reading: Reading) -> Iterator[Stream]:
    """Yield the bytes of one target tensor."""
    dtype = step.torch_dtype
    if step.compute is None:
        for need, tensor in zip(step.needs, step.sources, strict=True):
            yield Zeros(_size(need.shape, dtype)) if tensor is None else _Cast(_Reader(tensor, reading), dtype)
    else:
        yield _computed(step, dtype, reading)


def _computed(step: Step, dtype: torch.dtype, reading: Reading) -> Stream:
    inputs = [_load(tensor, reading) for tensor in step.sources if tensor is not None]
    wide = [tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs]
    assert step.compute is not None
    try:
        result = step.compute(*wide)
    except ValueError as error:
        raise ConvertError(f"{step.target}, made of {step.needs[0].name} and others: {error}") from error
    assert tuple(result.shape) == step.shape, f"{step.target}: {tuple(result.shape)} for {step.shape}"
    return Bytes(_view(result.to(dtype)))


class _Reader:
    """The bytes of one source tensor in order, hashed as they pass."""

    def __init__(self, tensor: SourceTensor, reading: Reading) -> None:
        self.tensor, self._reading = tensor, reading
        self._memory = None if tensor.values is None else _view(tensor.values)
        self._hash = xxhash.xxh3_128()
        self._at = 0

    @property
    def bytes(self) -> int:
        """How many there are."""
        return self.tensor.bytes

    def read_into(self, view: memoryview) -> None:
        """Fill the view with the next bytes; the last call notes the digest."""
        if self._memory is None:
            self._read_file(view)
        else:
            view[:] = self._memory[self._at : self._at + view.nbytes]
        self._hash.update(view)
        self._at += view.nbytes
        if self._at == self.bytes:
            self._reading.digests[self.tensor] = self._hash.hexdigest()

    def _read_file(self, view: memoryview) -> None:
        tensor = self.tensor
        try:
            self._reading.file(tensor.path).read_into(view, tensor.offset + self._at)
        except EOFError as error:
            raise ConvertError(
                f"{tensor.path}: {error} while {tensor.name} is read; was the file changed meanwhile?"
            ) from error


class _Cast:
    """The bytes of a source tensor in another dtype, or as they are."""

    def __init__(self, reader: _Reader, dtype: torch.dtype) -> None:
        self._reader, self._from, self._to = reader, reader.tensor.dtype, dtype

    @property
    def bytes(self) -> int:
        """How many there are."""
        return _size(self._reader.tensor.shape, self._to)

    def read_into(self, view: memoryview) -> None:
        """Fill the view, whole values only."""
        if self._from == self._to:
            self._reader.read_into(view)
            return
        for start in range(0, view.nbytes, CAST_BYTES):
            piece = view[start : start + CAST_BYTES]
            raw = bytearray(piece.nbytes // self._to.itemsize * self._from.itemsize)
            self._reader.read_into(memoryview(raw))
            try:
                values = transforms.cast(torch.frombuffer(raw, dtype=self._from), self._to)
            except OverflowError as error:
                tensor = self._reader.tensor
                raise ConvertError(f"{tensor.name} in {tensor.file}: {error}; choose another --dtype") from error
            piece[:] = _view(values)


def _load(tensor: SourceTensor, reading: Reading) -> Tensor:
    """Return a whole source tensor. Only for those that are computed, the largest of which has 50 MB."""
    reader = _Reader(tensor, reading)
    data = torch.empty(tensor.bytes, dtype=torch.uint8)
    reader.read_into(_view(data))
    return data.view(tensor.dtype).view(tensor.shape)


def _view(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy if it is contiguous."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _pretty(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
