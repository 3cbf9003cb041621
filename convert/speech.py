"""The tensors of token2wav: a torch pickle, the statistics of the latents and the voice, each from files of its own.

Pickles are opened with `weights_only` and memory-mapped, .npy files without pickles.
"""

import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from covo_npu.convert import rules
from covo_npu.convert.config import CONFIG
from covo_npu.convert.downloads import download_again
from covo_npu.convert.errors import ConvertError, Kind, refuse
from covo_npu.convert.shards import DAMAGED, DTYPES, SourceTensor
from covo_npu.runtime.checkpoint.config import DiTConfig
from covo_npu.runtime.voice import FILES, STORED, Voice, no_voice, read_npy, read_voice

TOKEN2WAV, PICKLE, STATISTICS = "token2wav", "model.pt", "global_mean_var.npy"
NO_VOICE = (
    "no voice found (looked in {places}): speech will start from zeros, without prompt or speaker. "
    "The publisher keeps the voice in the code repository, token2wav/prompt; name its folder with --voice"
)


def speech_files(folder: Path, voice: Path | None) -> dict[str, Path]:
    """Return the files that speech is read from, by their names in messages; some may not be there."""
    files = {f"{TOKEN2WAV}/{name}": folder / TOKEN2WAV / name for name in (PICKLE, CONFIG, STATISTICS)}
    place = next((place for place in _voice_places(folder, voice) if place.is_dir()), None)
    return files | ({str(place / name): place / name for name, _ in FILES.values()} if place else {})


def speech_tensors(folder: Path) -> dict[str, SourceTensor]:
    """Return the tensors of token2wav's pickle, and the statistics of its latents."""
    absent = [f"{TOKEN2WAV}/{name}" for name in (PICKLE, STATISTICS) if not (folder / TOKEN2WAV / name).is_file()]
    advice = f"{download_again(folder)} Or convert text only, with --no-token2wav."
    refuse(str(folder), Kind("files of speech are missing", absent, advice))
    path = folder / TOKEN2WAV / STATISTICS
    try:
        array = read_npy(path)
    except (ValueError, OSError) as error:
        raise ConvertError(f"{path}: not a readable .npy file of numbers ({_reason(error)})") from error
    if array.dtype.kind != "f":
        raise ConvertError(f"{path}: expected floats, found {array.dtype}")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and that is looked for
        values = torch.from_numpy(array.astype(np.float32)).flatten()
    statistics = _in_memory("global_mean_var", values, f"{TOKEN2WAV}/{STATISTICS}", path)
    return {**read_pickle(folder / TOKEN2WAV / PICKLE, f"{TOKEN2WAV}/{PICKLE}"), statistics.name: statistics}


def find_voice(folder: Path, voice: Path | None, config: DiTConfig) -> tuple[Voice, dict[str, SourceTensor], list[str]]:
    """Return the voice, its tensors under the names that they keep, and warnings.

    voice: the folder of its files; None: where upstream keeps it, and the empty voice if there is none.
    """
    places = _voice_places(folder, voice)
    place = voice or next((place for place in places if place.is_dir()), None)
    found = read_voice(place, config) if place else no_voice(config)
    tensors = {}
    for part, (file, _) in FILES.items():
        name, path = f"{STORED}{part}", (place or Path()) / file
        tensors[name] = _in_memory(name, getattr(found, part), f"voice/{file}" if place else "", path)
    return found, tensors, [] if place else [NO_VOICE.format(places=", ".join(str(path) for path in places))]


def read_pickle(path: Path, label: str) -> dict[str, SourceTensor]:
    """Return the tensors of a torch pickle, memory-mapped, under the spelling of rules.py.

    The pickle holds a state dict, or one under "model". Code in it is never run: one that wants more than tensors is
    refused. Sparse tensors, and those without values, count as none.
    """
    loaded = _load(path)
    state = loaded.get("model", loaded) if isinstance(loaded, Mapping) else {}
    found: dict[str, list[str]] = defaultdict(list)
    tensors = {}
    for spelled, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(spelled, str) and isinstance(value, Tensor) and value.layout is torch.strided and value.is_cpu:
            name = _respell(spelled)
            found[name].append(spelled)
            tensors[name] = _in_memory(name, value.detach(), label, path)
    if not tensors:
        raise ConvertError(f'{path}: expected a state dict, or one under "model"; found no tensors')
    doubles = [f"{name}: as {' and '.join(spelled)}" for name, spelled in found.items() if len(spelled) > 1]
    refuse(str(path), Kind("tensors are there twice", doubles, "Keep one of each."))
    return tensors


def _load(path: Path) -> object:
    """Return what a torch pickle holds, memory-mapped."""
    try:
        with path.open("rb") as file:  # by its number: a name need not be UTF-8, which torch asks of one
            return torch.load(f"/proc/self/fd/{file.fileno()}", map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ConvertError(
            f"{path}: refused, nothing in it was run: the pickle wants more than tensors ({_reason(error)})"
        ) from error
    except Exception as error:  # IndexError, struct.error: damage raises whatever its codes run into
        raise ConvertError(
            f"{path}: not a readable torch file ({_reason(error)}): {DAMAGED}, or the format from before torch 1.6"
        ) from error


def _voice_places(folder: Path, voice: Path | None) -> list[Path]:
    return [voice] if voice else [folder / TOKEN2WAV / "prompt", folder.resolve().parent / TOKEN2WAV / "prompt"]


def _in_memory(name: str, values: Tensor, label: str, path: Path) -> SourceTensor:
    spelling = next((known for known, dtype in DTYPES.items() if dtype == values.dtype), str(values.dtype))
    return SourceTensor(name, label, spelling, tuple(values.shape), values.nbytes, path, values=values)


def _respell(name: str) -> str:
    for pattern, replacement in rules.SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def _reason(error: BaseException) -> str:
    """Return the line of an error's text that says most: torch wraps it in advice that does not hold here."""
    lines: Iterable[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "rror:" in line or "nsupported" in line]
    return (telling or list(lines) or [type(error).__name__])[0][:300]
