"""A voice: what is read, what is refused; that conversion and covo-run take the same folders."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from covo_npu.runtime import CovoAudio
from covo_npu.runtime.checkpoint.config import ConfigError
from covo_npu.runtime.checkpoint.format import read_manifest
from covo_npu.runtime.voice import FILES, no_voice, read_voice, read_voices, stored_voice
from covo_npu.tools.synth.config import PRESETS

DIT = PRESETS["tiny"].token2wav.dit
ConvertTiny = Callable[[str], Path]


@pytest.fixture
def folder(tiny_source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_source / "token2wav" / "prompt", tmp_path / "voice")


def change(folder: Path, part: str, to: Callable[[np.ndarray], np.ndarray]) -> None:
    path = folder / FILES[part][0]
    np.save(path, to(np.load(path)))


SHAPES = {
    "as published": lambda array: array,
    "without the leading axis": lambda array: array[0],
    "of other widths": lambda array: array.astype(np.int32 if array.dtype.kind == "i" else np.float64),
    "of the other byte order": lambda array: array.astype(array.dtype.newbyteorder()),
}


@pytest.mark.parametrize("form", SHAPES)
def test_whatever_is_read_is_converted_too_and_means_the_same(
    form: str, folder: Path, tiny_source: Path, convert_tiny: ConvertTiny, tmp_path: Path
) -> None:
    expected = stored_voice(CovoAudio.load(convert_tiny("float32"), device="cpu").weights.tensors, DIT, "here")
    for part in FILES:
        change(folder, part, SHAPES[form])
    voice = read_voice(folder, DIT)
    command = [Path(sys.executable).with_name("covo-convert"), "--src", tiny_source, "--dst", tmp_path / "ckpt"]
    subprocess.run([*command, "--voice", folder], check=True, capture_output=True)
    converted = CovoAudio.load(tmp_path / "ckpt", device="cpu").voice
    assert read_manifest(tmp_path / "ckpt").config.token2wav.voice.num_codes == voice.num_codes
    for part in FILES:
        for found in (getattr(voice, part), getattr(converted, part)):
            assert found.dtype == getattr(expected, part).dtype and torch.equal(found, getattr(expected, part))


FAULTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "two leading axes": (
        "prompt_codes",
        lambda a: a[None],
        "prompt_token.npy: expected integers of shape [any], found int64 [1, 1, 11]",
    ),
    "floats for codes": ("prompt_codes", lambda a: a.astype(np.float32), "prompt_token.npy: expected integers"),
    "a code beyond the table": ("prompt_codes", lambda a: a + DIT.num_codes, "at [0] is not in 0.."),
    "a negative code": ("prompt_codes", lambda a: np.where(np.arange(11) == 9, -1, a), "prompt_token.npy: -1 at [9]"),
    "a code that no int64 holds": ("prompt_codes", lambda a: a.astype(np.uint64) + np.uint64(2**63), "is not in 0.."),
    "NaN": (
        "prompt_latents",
        lambda a: np.where(a == a[0, 3, 2], np.nan, a),
        "prompt_latent.npy: nan at [3, 2] is not finite",
    ),
    "too large for float32": (
        "speaker_embedding",
        lambda a: a.astype(float) * 1e60,
        "speaker_embed.npy: ",
    ),
    "latents of another model": ("prompt_latents", lambda a: a[..., :7], "expected floats of shape [any, 8]"),
    "more latents than codes": ("prompt_codes", lambda a: a[:, :9], "47 frames, and 9 prompt codes explain 39 at most"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused(fault: str, folder: Path) -> None:
    part, to, message = FAULTS[fault]
    change(folder, part, to)
    with pytest.raises(ConfigError) as caught:
        read_voice(folder, DIT)
    assert message in str(caught.value) and str(folder) in str(caught.value)


def test_all_faults_are_told_together(folder: Path) -> None:
    change(folder, "prompt_latents", lambda a: a * np.inf)
    (folder / "speaker_embed.npy").write_bytes(b"no array")
    (folder / "prompt_token.npy").unlink()
    with pytest.raises(ConfigError) as caught:
        read_voice(folder, DIT)
    for part in ("prompt_latent.npy: ", "speaker_embed.npy: not a readable .npy file", "prompt_token.npy: missing"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"nowhere: no such folder; a voice is one with prompt_token\.npy"):
        read_voice(folder / "nowhere", DIT)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"PK\x03\x04", b""])
def test_a_file_that_is_no_array_says_what_it_is(content: bytes, folder: Path) -> None:
    (folder / "prompt_token.npy").write_bytes(content)
    with pytest.raises(ConfigError, match=r"prompt_token\.npy: not a readable \.npy file of numbers") as caught:
        read_voice(folder, DIT)
    assert ("git lfs pull" in str(caught.value)) == content.startswith(b"version")


def test_a_bad_voice_in_a_checkpoint_is_told_when_it_is_loaded(convert_tiny: ConvertTiny, tmp_path: Path) -> None:
    """As conversion left it before it looked: under right checksums."""
    folder = shutil.copytree(convert_tiny("float32"), tmp_path / "ckpt")
    file = read_manifest(folder).files["token2wav.safetensors"]
    place = file.tensors["voice.prompt_codes"]
    values = np.memmap(file.path, np.int64, "r+", place.offset, place.shape)
    values[4] = DIT.num_codes
    values.flush()
    with pytest.raises(ConfigError, match=rf"token2wav\.safetensors: .*voice\.prompt_codes: {DIT.num_codes} at \[4\]"):
        CovoAudio.load(folder, device="cpu", check=False)
    CovoAudio.load(folder, device="cpu", check=False, speech=False)


def test_a_voice_is_a_value(folder: Path) -> None:
    voice = read_voice(folder, DIT)
    with pytest.raises(FrozenInstanceError):
        voice.prompt_codes = voice.prompt_codes[1:]  # type: ignore[misc]
    assert replace(voice, prompt_codes=voice.prompt_codes[:5]).num_codes == 5 and voice.num_codes == 11
    nobody = no_voice(DIT)
    assert (nobody.num_codes, nobody.num_frames) == (0, 0) and not nobody.speaker_embedding.any()


def test_hidden_folders_are_no_voices(folder: Path) -> None:
    """As Kubernetes mounts a ConfigMap: a folder ..data is what the names beside it lead to."""
    (folder.parent / "..data").mkdir()
    folder.rename(folder.parent / "..data/voice")
    folder.symlink_to("..data/voice")
    assert list(read_voices(folder.parent, DIT)) == ["voice"]
