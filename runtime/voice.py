"""A voice: the prompt that speech goes on from. Where it comes from, and what it must be."""

from __future__ import annotations

import os
import tokenize
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from covo_npu.runtime.checkpoint.config import ConfigError, DiTConfig, Token2WavConfig
from covo_npu.runtime.checkpoint.format import LFS_POINTER

# part of a voice: (its .npy file in upstream's layout, NumPy kinds that it may have there)
FILES = {
    "prompt_codes": ("prompt_token.npy", "iu"),
    "prompt_latents": ("prompt_latent.npy", "f"),
    "speaker_embedding": ("speaker_embed.npy", "f"),
}
# What NumPy raises for damage beside ValueError: the header is Python, and what begins like a ZIP file is read as one.
DAMAGE = (EOFError, SyntaxError, TypeError, ArithmeticError, tokenize.TokenError, zipfile.BadZipFile)
STORED = "voice."  # what the names of its tensors in a checkpoint begin with


@dataclass(frozen=True, slots=True, eq=False)
class Voice:
    """A value: calls take it, and calls with different voices may run side by side.

    prompt_codes: [P] int64; prompt_latents: [L_prompt, Z] float32, normalised, of these codes and of a few frames after
    them; speaker_embedding: [C_speaker] float32. P = L_prompt = 0: speech starts from nothing.
    """

    prompt_codes: Tensor
    prompt_latents: Tensor
    speaker_embedding: Tensor

    @property
    def num_codes(self) -> int:
        """P."""
        return self.prompt_codes.shape[0]

    @property
    def num_frames(self) -> int:
        """L_prompt."""
        return self.prompt_latents.shape[0]

    def to(self, device: torch.device) -> Voice:
        """Return the voice on a device."""
        return Voice(*(getattr(self, name).to(device) for name in FILES))


def no_voice(config: DiTConfig) -> Voice:
    """Return the empty voice: no prompt, and zeros for the speaker."""
    latents, speaker = torch.zeros(0, config.latent_dim), torch.zeros(config.speaker_dim)
    return Voice(torch.zeros(0, dtype=torch.int64), latents, speaker)


def read_voice(folder: str | os.PathLike[str], config: DiTConfig) -> Voice:
    """Return the voice of a folder with the three FILES, for a model of these sizes.

    A leading axis of size one is dropped. Raises ConfigError with everything that is missing or does not fit.
    """
    if not Path(folder).is_dir():
        files = ", ".join(file for file, _ in FILES.values())
        raise ConfigError(f"{folder}: no such folder; a voice is one with {files}")
    shapes = dict(zip(FILES, ((-1,), (-1, config.latent_dim), (config.speaker_dim,)), strict=True))
    parts: dict[str, Tensor] = {}
    problems = []
    for name, (file, kinds) in FILES.items():
        try:
            array = read_npy(Path(folder) / file)
        except FileNotFoundError:
            problems.append(f"{file}: missing")
            continue
        except (OSError, ValueError) as error:
            problems.append(f"{file}: not a readable .npy file of numbers ({error})")
            continue
        shape = shapes[name]
        array = array[0] if array.ndim == len(shape) + 1 and array.shape[0] == 1 else array
        fits = array.ndim == len(shape) and all(size in (-1, found) for size, found in zip(shape, array.shape))
        if fits and array.dtype.kind in kinds:
            with np.errstate(over="ignore"):  # what is too large becomes infinite, and that is looked for
                parts[name] = torch.from_numpy(array.astype(np.int64 if "i" in kinds else np.float32))
        else:
            rule = ", ".join("any" if size < 0 else str(size) for size in shape)
            kind = "integers" if "i" in kinds else "floats"
            problems.append(f"{file}: expected {kind} of shape [{rule}], found {array.dtype} {list(array.shape)}")
    return _checked(parts, config, {name: file for name, (file, _) in FILES.items()}, str(folder), problems)


def read_voices(folder: Path, config: DiTConfig) -> dict[str, Voice]:
    """Return the voices in the sub-folders of a folder, by name. Raises what read_voice raises, and OSError.

    Hidden sub-folders are none: a ConfigMap that Kubernetes has mounted has some.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {name: read_voice(folder / name, config) for name in names}


def stored_voice(tensors: Mapping[str, Tensor], config: DiTConfig, where: str) -> Voice:
    """Return the voice of a checkpoint. tensors: those of its token2wav file. Raises ConfigError that names `where`."""
    labels = {name: f"{STORED}{name}" for name in FILES}
    return _checked({name: tensors[label] for name, label in labels.items()}, config, labels, where, [])


def stored_shapes(config: Token2WavConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a voice's tensors in a checkpoint, by name."""
    dit, voice = config.dit, config.voice
    shapes = ((voice.num_codes,), (voice.num_frames, dit.latent_dim), (dit.speaker_dim,))
    return {f"{STORED}{name}": shape for name, shape in zip(FILES, shapes, strict=True)}


def read_npy(path: str | os.PathLike[str]) -> NDArray[Any]:
    """Return the array in a .npy file, mapped: a header that promises more than the file holds costs no memory.

    Raises OSError, or ValueError if the file is none of plain values.
    """
    with Path(path).open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError("a pointer of git-lfs: git lfs pull fetches the file")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGE as error:
        raise ValueError(f"damaged: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError("an archive of arrays")
    return array


def _checked(
    parts: Mapping[str, Tensor], config: DiTConfig, labels: Mapping[str, str], where: str, problems: list[str]
) -> Voice:
    """Return the voice of parts of the right shapes. labels: what people call them; problems: what was wrong before."""
    for name, part in parts.items():
        if name == "prompt_codes":
            holds, rule = (part >= 0) & (part < config.num_codes), f"is not in 0..{config.num_codes - 1}"
        else:
            holds, rule = part.isfinite(), "is not finite"
        wrong = (~holds).nonzero()
        if len(wrong):
            first = wrong[0].tolist()
            problems.append(f"{labels[name]}: {part[tuple(first)].item()} at {first} {rule}, the first of {len(wrong)}")
    if "prompt_codes" in parts and "prompt_latents" in parts:
        frames, codes = parts["prompt_latents"].shape[0], parts["prompt_codes"].shape[0]
        explained = (codes + 1) * config.upsample_factor - 1
        if frames > explained:
            label = labels["prompt_latents"]
            problems.append(f"{label}: {frames} frames, and {codes} prompt codes explain {explained} at most")
    if problems:
        raise ConfigError(f"{where}: is not a voice for this model: {'; '.join(problems)}")
    return Voice(**parts)
