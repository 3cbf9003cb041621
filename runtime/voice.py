"""A voice prompt from the three .npy files of upstream's layout: whose voice the model speaks with."""

from __future__ import annotations

import os
import tokenize
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from covo_npu.runtime.config import ConfigError, DiTConfig

# tensor of the voice: (file, NumPy kinds that it may have)
FILES = {
    "prompt_codes": ("prompt_token.npy", "iu"),
    "prompt_latents": ("prompt_latent.npy", "f"),
    "speaker_embedding": ("speaker_embed.npy", "f"),
}


def read_npy(path: str | os.PathLike[str]) -> NDArray[Any]:
    """Return the array in a .npy file, mapped: a header that promises more than the file holds costs no memory.

    Raises OSError, or ValueError if the file is none of plain values.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, SyntaxError, TypeError, ArithmeticError, tokenize.TokenError) as error:  # its header is Python
        raise ValueError(f"damaged: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError("an archive of arrays")
    return array


def read_voice(folder: str | os.PathLike[str], config: DiTConfig) -> dict[str, Tensor]:
    """Return prompt_codes [P] int64, prompt_latents [L_prompt, Z] float32 and speaker_embedding [C_speaker] float32.

    A leading axis of size one is dropped. Raises ConfigError with everything that is missing or does not fit.
    """
    wanted = {
        "prompt_codes": (None,),
        "prompt_latents": (None, config.latent_dim),
        "speaker_embedding": (config.speaker_dim,),
    }
    voice, problems = {}, []
    for name, (file, kinds) in FILES.items():
        path = Path(folder) / file
        try:
            array = read_npy(path)
        except (OSError, ValueError) as error:
            problems.append(f"{file}: {getattr(error, 'strerror', None) or 'not a NumPy array'}")
            continue
        shape = wanted[name]
        array = array[0] if array.ndim == len(shape) + 1 and array.shape[0] == 1 else array
        fits = array.ndim == len(shape) and all(size in (None, found) for size, found in zip(shape, array.shape))
        if not fits or array.dtype.kind not in kinds:
            rule = ", ".join("any" if size is None else str(size) for size in shape)
            kind = "integers" if "i" in kinds else "floats"
            problems.append(f"{file}: expected {kind} of shape [{rule}], found {array.dtype} {list(array.shape)}")
            continue
        voice[name] = torch.from_numpy(array.astype(np.int64 if "i" in kinds else np.float32))
    if not problems:
        problems = _misfits(voice, config)
    if problems:
        raise ConfigError(f"{folder}: is not a voice for this model: {'; '.join(problems)}")
    return voice


def _misfits(voice: dict[str, Tensor], config: DiTConfig) -> list[str]:
    codes, latents = voice["prompt_codes"], voice["prompt_latents"]
    checks = (
        (bool(((codes >= 0) & (codes < config.num_codes)).all()), f"prompt codes must be in 0..{config.num_codes - 1}"),
        (bool(latents.isfinite().all()), "prompt latents must be finite"),
        (bool(voice["speaker_embedding"].isfinite().all()), "the speaker embedding must be finite"),
        (
            latents.shape[0] < (codes.shape[0] + 1) * config.upsample_factor,
            f"{latents.shape[0]} prompt latents are more than {codes.shape[0]} prompt codes explain",
        ),
    )
    return [message for holds, message in checks if not holds]
