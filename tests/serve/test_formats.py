"""Pieces of speech in base64: any cut gives the same bytes, decoded one by one or put together first."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from covo_npu.runtime import audio
from covo_npu.runtime.audio import AudioError
from covo_npu.serve import formats
from covo_npu.serve.formats import PcmChunks


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 30_000), max_size=8), seed=st.integers(0, 9))
def test_any_number_of_pieces_of_any_size(sizes: list[int], seed: int) -> None:
    samples = np.random.default_rng(seed).normal(0, 0.5, sum(sizes)).astype(np.float32)
    chunks, texts = PcmChunks(), []
    for piece in np.split(samples, np.cumsum(sizes)[:-1]) if sizes else []:
        before = sum(len(base64.b64decode(text)) for text in texts)
        texts += chunks.push(piece)
        after = sum(len(base64.b64decode(text)) for text in texts)
        assert after - before >= 2 * piece.size - 10  # nothing waits but what base64 needs
    texts += chunks.finish()
    expected = audio.to_pcm16(samples)
    assert b"".join(map(base64.b64decode, texts)) == expected == base64.b64decode("".join(texts))
    assert all(0 < len(text) <= 32_000 for text in texts)


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.binary().map(lambda b: base64.b64encode(b).decode()), st.from_regex(r"data:.*")))
def test_base64_is_decoded_or_refused(text: str) -> None:
    try:
        data = formats.from_base64(text, "here")
    except AudioError as error:
        assert str(error).startswith("here: ")
    else:
        assert base64.b64encode(data).decode() == text.rpartition(",")[2] if data else True


def test_a_small_file_that_unpacks_to_very_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence of 8 channels in FLAC: 100 kB of it unpack to a thousand times that."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros((4_000_000, 8), np.int16), 96_000, format="FLAC", subtype="PCM_16")
    data = file.getvalue()
    assert len(data) < 500_000
    monkeypatch.setattr(formats, "MAX_SAMPLES", 30_000_000)
    with pytest.raises(AudioError, match="holds 32000000 samples, at most 30000000"):
        formats.decode(data, "flac", "here", 1000.0)
    with pytest.raises(AudioError, match=r"lasts 41\.7 s, at most 30\.0 s"):
        formats.decode(data, "flac", "here", 30.0)
    with pytest.raises(AudioError, match=r"lasts longer than the 1\.0 s"):
        formats.decode(bytes(48_002), "pcm16", "here", 1.0)
