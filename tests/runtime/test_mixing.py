"""Channels to one, and the warnings: each against a recording that has just this, and against one that has not."""

import io

import numpy as np
import pytest
import soundfile
import torch

from covo_npu.runtime import audio
from covo_npu.runtime.audio import AudioError

RATE = 16_000
RNG = np.random.default_rng(9)
SPEECH = (0.2 * RNG.standard_normal(RATE) * np.sin(np.arange(RATE) * 0.0005)).clip(-0.9, 0.9)
CHANNELS = 0.2 * RNG.uniform(-1, 1, (RATE, 8))


def heard(samples, form="WAV", subtype="FLOAT"):
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, subtype, format=form)
    warnings = []
    found, _ = audio.decode_audio(io.BytesIO(file.getvalue()), "x", warn=warnings.append)
    return found.numpy(), warnings


ODD = {
    "is silent": np.zeros(RATE),
    "is very quiet: its peak is -4": SPEECH * 0.007 / np.abs(SPEECH).max(),
    "is clipped: ": (8 * SPEECH).clip(-1, 1),
    "has values up to 1.25, beyond 1: ": SPEECH * 1.25 / np.abs(SPEECH).max(),
    "were they not divided by 32768": SPEECH * 32767,
    "its channels cancel each other": np.stack((SPEECH, -SPEECH), 1),
    "its 6 channels are taken for 5.1": CHANNELS[:, :6],
    "its 8 channels are taken for 7.1": CHANNELS,
}


@pytest.mark.parametrize("says", ODD)
def test_each_oddity_is_one_line(says):
    _, (line,) = heard(ODD[says])
    assert line.startswith("x: ") and says in line
    array_lines = []
    audio.to_mono(ODD[says].astype(np.float32), "x", array_lines.append)
    assert array_lines == [line]


@pytest.mark.parametrize(
    "samples",
    [
        SPEECH,
        np.stack((SPEECH, SPEECH), 1),
        np.stack((SPEECH, np.zeros(RATE)), 1),  # one of two microphones
        CHANNELS[:, :2],  # nothing to do with each other
        CHANNELS[:, :5],
        SPEECH * 0.03,  # a low voice
        np.where(np.arange(RATE) % 997 == 0, 1.0, SPEECH),  # normalised: single peaks at full scale
    ],
)
def test_usual_recordings_have_none(samples):
    assert heard(samples)[1] == []


@pytest.mark.parametrize(
    ("form", "channels", "order"),
    [
        ("WAV", 6, "LRCESS"), ("FLAC", 6, "LRCESS"), ("WAV", 8, "LRCESSSS"), ("OGG", 6, "LCRSSE"),
    ],
)  # fmt: skip
def test_surround_is_mixed_by_bs_775(form, channels, order):
    """ITU-R BS.775, table 2: 0.7071 of left and right, the centre whole, half of surround, no LFE."""
    level = {"L": 0.7071, "R": 0.7071, "C": 1.0, "S": 0.5, "E": 0.0}
    samples = CHANNELS[:, :channels]
    subtype = {"WAV": "FLOAT", "FLAC": "PCM_24", "OGG": "VORBIS"}[form]
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, subtype, format=form)
    separate, _ = soundfile.read(io.BytesIO(file.getvalue()))
    expected = sum(level[name] * separate[:, i] for i, name in enumerate(order))
    found, _ = audio.decode_audio(io.BytesIO(file.getvalue()), warn=lambda line: None)
    assert np.abs(found.numpy() - expected).max() < 1e-5


def test_speech_of_the_centre_alone_is_as_loud_as_it_was():
    film = np.zeros((RATE, 6))
    film[:, 2] = SPEECH
    assert np.abs(heard(film)[0] - SPEECH).max() < 1e-6


def test_six_microphones_that_say_so_are_averaged():
    """WAVE_FORMAT_EXTENSIBLE whose channels are for no loudspeakers."""
    file = io.BytesIO()
    soundfile.write(file, CHANNELS[:, :6], RATE, "FLOAT", format="WAVEX")
    data = bytearray(file.getvalue())
    place = data.index(b"fmt ") + 8 + 20
    data[place : place + 4] = bytes(4)
    warnings = []
    found, _ = audio.decode_audio(io.BytesIO(bytes(data)), warn=warnings.append)
    assert np.allclose(found.numpy(), CHANNELS[:, :6].mean(1), atol=1e-6) and warnings == []


def test_codecs_go_beyond_1_by_themselves():
    loud = (3 * SPEECH).clip(-0.999, 0.999)
    for form, subtype in (("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")):
        samples, warnings = heard(loud, form, subtype)
        assert np.abs(samples).max() > 1 and not [line for line in warnings if "beyond 1" in line]


def test_channels_first_is_told():
    for samples in (np.zeros((2, 48_000), np.float32), torch.zeros(1, 48_000)):
        with pytest.raises(AudioError, match=r"if they come first, transpose"):
            audio.to_mono(samples)
