"""The source checkpoint: every tensor it holds, checked against its index, nothing read but headers.

Also the doors to files from elsewhere: safetensors headers are parsed and checked here, pickles are opened with
`weights_only` and memory-mapped, .npy files without pickles.
"""

import json
import os
import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from covo_npu.convert import rules
from covo_npu.convert.config import model_config, read_json, token2wav_config
from covo_npu.convert.errors import ConvertError, refuse
from covo_npu.convert.tokenizer import TokenizerFiles, read_tokenizer
from covo_npu.runtime.checkpoint import MAX_NAME_BYTES
from covo_npu.runtime.config import ModelConfig, VoiceConfig
from covo_npu.runtime.limits import require_plausible
from covo_npu.runtime.voice import read_npy

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TOKEN2WAV = "token2wav"
VOICE_FILES = ("prompt_token.npy", "prompt_latent.npy", "speaker_embed.npy")
NO_VOICE = (
    "no voice found (looked in {places}): speech will start from zeros, without prompt or speaker. "
    "The publisher keeps the voice in the code repository, token2wav/prompt; name its folder with --voice"
)

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DAMAGED = "a download that ended early or damage"


@dataclass(frozen=True, slots=True, eq=False)
class SourceTensor:
    """A tensor of the source: a byte range of a file, or values that already lie in (mapped) memory."""

    name: str
    file: str  # relative to the source, for messages and the manifest
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int = 0
    values: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Size in the source."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Source:
    """A checked source checkpoint."""

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, SourceTensor]
    tokenizer: TokenizerFiles
    small_files: Mapping[str, Path]  # files that are no tensors: name for the manifest -> where
    warnings: tuple[str, ...]


def open_source(folder: Path, voice: Path | None = None, token2wav: bool = True) -> Source:
    """Return the source checkpoint in a folder, its index checked against its shards.

    voice: where the voice's .npy files lie; None: <folder>/token2wav/prompt, then <folder>/../token2wav/prompt.
    token2wav: False leaves speech out, its files need not exist.
    Raises ConvertError with all findings of each kind.
    """
    if not folder.is_dir():
        raise ConvertError(f"{folder}: no such folder; --src expects the folder of the published weights")
    config = model_config(folder / CONFIG)
    tensors = read_shards(folder)
    tokenizer = read_tokenizer(folder, config.audio_token_index)
    small = {CONFIG: folder / CONFIG, INDEX: folder / INDEX, **{path.name: path for path in tokenizer.files}}
    warnings: tuple[str, ...] = ()
    if token2wav:
        speech, speech_config, voice_found, warnings = _open_token2wav(folder, voice)
        tensors = {**tensors, **speech}
        config = _with_speech(config, speech_config, voice_found)
        if (extra := folder / TOKEN2WAV / CONFIG).exists():
            small[f"{TOKEN2WAV}/{CONFIG}"] = extra
    _check_ids(folder, config)
    require_plausible(config, str(folder / CONFIG))
    return Source(folder, config, tensors, tokenizer, small, warnings)


# --- shards


def read_shards(folder: Path) -> dict[str, SourceTensor]:
    """Return the tensors of all shards that the index names, index and headers in agreement."""
    weight_map = _weight_map(folder / INDEX)
    listed: dict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        listed[file].append(name)
    absent, damaged, wrong = [], [], []
    places: dict[str, list[SourceTensor]] = defaultdict(list)
    readable = set()
    for file, names in sorted(listed.items()):
        path = folder / file
        if not path.is_file():
            absent.append(f"{file}: {len(names)} tensors expected in it ({names[0]}, ...)")
            continue
        try:
            for tensor in read_header(path, file):
                places[tensor.name].append(tensor)
            readable.add(file)
        except ConvertError as error:
            damaged.append(str(error))
    for name, file in weight_map.items():
        found = [tensor.file for tensor in places.get(name, [])]
        if file in readable and not found:
            wrong.append(f"{name}: the index expects it in {file}, no file that could be read holds it")
        elif file in readable and file not in found:
            wrong.append(f"{name}: the index expects it in {file}, found in {', '.join(found)}")
    refuse(
        str(folder),
        {
            "shards that the index names are missing": absent,
            "shards are damaged": damaged,
            "tensors are not where the index says": wrong,
            "tensors lie in several shards": [
                f"{name}: in {', '.join(tensor.file for tensor in found)}"
                for name, found in places.items()
                if len(found) > 1
            ],
            "tensors in the shards that the index does not list": [
                f"{name}: in {found[0].file}" for name, found in places.items() if name not in weight_map
            ],
        },
        "Download the files again.",
    )
    return {name: found[0] for name, found in places.items()}


def read_header(path: Path, label: str) -> list[SourceTensor]:
    """Return the tensors of a safetensors file in file order.

    Raises ConvertError if the header is damaged or the file has another size than the header says.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ConvertError(f"{label}: {size} bytes cannot hold its header: {_DAMAGED}")
        text = file.read(length)
    try:
        header = json.loads(text)
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        tensors, ends = [], {}
        for name, entry in entries:
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end)):
                raise ValueError(f"{name}: expected counts")
            tensors.append(SourceTensor(name, label, DTYPES[entry["dtype"]], tuple(shape), path, 8 + length + begin))
            ends[name] = 8 + length + end
    except KeyError as error:
        raise ConvertError(f"{label}: header: unknown dtype or missing field {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConvertError(f"{label}: its header is not that of a safetensors file ({error}): {_DAMAGED}") from error
    expected = max(ends.values(), default=8 + length)
    if size != expected:
        raise ConvertError(f"{label}: header says {expected} bytes, file has {size}: {_DAMAGED}")
    for tensor in tensors:
        if tensor.offset < 8 + length or tensor.offset + tensor.bytes != ends[tensor.name]:
            raise ConvertError(f"{label}: header: {tensor.name}: offsets do not fit its shape {list(tensor.shape)}")
    return sorted(tensors, key=lambda tensor: tensor.offset)


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{path}: expected a weight_map from tensors to files")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file not in ("", ".", "..") and Path(file).name == file
        if not plain or len(os.fsencode(file)) > MAX_NAME_BYTES:
            raise ConvertError(f"{path}: {name}: expected a plain file name, found {file!r:.80}")
    return weight_map


# --- token2wav


def read_pickle(path: Path, label: str) -> dict[str, SourceTensor]:
    """Return the tensors of a torch pickle, memory-mapped, under the spelling of rules.py.

    The pickle holds a state dict, or one under "model". Code in it is never run: one that wants more than tensors is
    refused.
    """
    if not path.is_file():
        raise ConvertError(f"{path}: no such file; download it, or convert text only with --no-token2wav")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ConvertError(
            f"{path}: refused, nothing in it was run: the pickle wants more than tensors ({_reason(error)})"
        ) from error
    except (RuntimeError, ValueError, EOFError, TypeError, KeyError) as error:
        raise ConvertError(
            f"{path}: not a readable torch file ({_reason(error)}): {_DAMAGED}, or the format from before torch 1.6"
        ) from error
    state = loaded.get("model", loaded) if isinstance(loaded, Mapping) else {}
    found: dict[str, list[str]] = defaultdict(list)
    tensors = {}
    for spelled, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(spelled, str) and isinstance(value, Tensor):
            name = _respell(spelled)
            found[name].append(spelled)
            tensors[name] = _in_memory(name, value.detach(), label, path)
    if not tensors:
        raise ConvertError(f'{path}: expected a state dict, or one under "model"; found no tensors')
    doubles = [f"{name}: as {' and '.join(spelled)}" for name, spelled in found.items() if len(spelled) > 1]
    refuse(str(path), {"tensors are there twice": doubles}, "Keep one of each.")
    return tensors


def read_array(path: Path, kind: type, dtype: torch.dtype) -> Tensor:
    """Return the array of a .npy file in a dtype. kind: np.integer or np.floating. Raises ConvertError."""
    try:
        array = read_npy(path)
    except (ValueError, OSError) as error:
        raise ConvertError(f"{path}: not a readable .npy file of numbers ({_reason(error)})") from error
    if not np.issubdtype(array.dtype, kind):
        raise ConvertError(f"{path}: expected {kind.__name__} values, found {array.dtype}")
    wide: type = np.int64 if kind is np.integer else np.float64  # whatever the size and the byte order there
    return torch.from_numpy(array.astype(wide)).to(dtype)


def find_voice(folder: Path, voice: Path | None) -> tuple[Path | None, list[Path]]:
    """Return the voice's folder, None if there is none, and the places that were looked at."""
    places = [voice] if voice else [folder / TOKEN2WAV / "prompt", folder.resolve().parent / TOKEN2WAV / "prompt"]
    return next((place for place in places if place.is_dir()), None), places


def _open_token2wav(
    folder: Path, voice: Path | None
) -> tuple[dict[str, SourceTensor], Path, VoiceConfig, tuple[str, ...]]:
    tensors = read_pickle(folder / TOKEN2WAV / "model.pt", f"{TOKEN2WAV}/model.pt")
    config_path = folder / TOKEN2WAV / CONFIG
    statistics = folder / TOKEN2WAV / "global_mean_var.npy"
    values = read_array(statistics, np.floating, torch.float32).flatten()
    tensors["global_mean_var"] = _in_memory("global_mean_var", values, f"{TOKEN2WAV}/{statistics.name}", statistics)
    place, places = find_voice(folder, voice)
    if place is None and voice is not None:
        raise ConvertError(f"{voice}: no such folder; --voice expects one with {', '.join(VOICE_FILES)}")
    if place is None:
        sizes = token2wav_config(config_path, VoiceConfig(0, 0)).dit
        zeros = (
            torch.zeros(1, 0, dtype=torch.int64),
            torch.zeros(1, 0, sizes.latent_dim),
            torch.zeros(1, sizes.speaker_dim),
        )
        parts = [(name, values, folder) for name, values in zip(VOICE_FILES, zeros, strict=True)]
        warnings: tuple[str, ...] = (NO_VOICE.format(places=", ".join(str(path) for path in places)),)
    else:
        missing = [f"{place / name}" for name in VOICE_FILES if not (place / name).is_file()]
        refuse(str(place), {"files of the voice are missing": missing}, "Download them again, or name another --voice.")
        kinds = ((np.integer, torch.int64), (np.floating, torch.float32), (np.floating, torch.float32))
        parts = [
            (name, read_array(place / name, *kind), place / name) for name, kind in zip(VOICE_FILES, kinds, strict=True)
        ]
        warnings = ()
    for name, values, path in parts:
        key = f"voice.{Path(name).stem}"
        tensors[key] = _in_memory(key, values, f"voice/{name}", path)
    shapes = [tensors[f"voice.{Path(name).stem}"].shape for name in VOICE_FILES]
    counts = VoiceConfig(*(shape[1] if len(shape) > 1 else 0 for shape in shapes[:2]))
    return tensors, config_path, counts, warnings


def _with_speech(config: ModelConfig, path: Path, voice: VoiceConfig) -> ModelConfig:
    return ModelConfig(
        config.llm, config.encoder, config.adapter, token2wav_config(path, voice), config.audio_token_index
    )


def _check_ids(folder: Path, config: ModelConfig) -> None:
    """Audio codes follow the text ids in the vocabulary; the voice's codes are codes."""
    codes = config.token2wav.dit.num_codes if config.token2wav else 1
    first, vocabulary = config.audio_token_index, config.llm.vocab_size
    if first + codes > vocabulary:
        raise ConvertError(
            f"{folder / CONFIG}: audio_token_index {first} + {codes} audio codes need a vocab_size of "
            f"{first + codes} or more, found {vocabulary}"
        )


def _in_memory(name: str, values: Tensor, label: str, path: Path) -> SourceTensor:
    return SourceTensor(name, label, values.dtype, tuple(values.shape), path, values=values)


def _respell(name: str) -> str:
    for pattern, replacement in rules.SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def _reason(error: BaseException) -> str:
    """Return the line of an error's text that says most: torch wraps it in advice that does not hold here."""
    lines: Iterable[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "rror:" in line or "nsupported" in line]
    return (telling or list(lines) or [type(error).__name__])[0][:300]
