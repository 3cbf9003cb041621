"""What a file really holds: recordings joined, chained, cut, with sizes that nobody wrote; made by libsndfile."""

import io
import math
import os
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
import soundfile
import torch

from covo_npu.runtime import audio, containers, resampling
from covo_npu.runtime.audio import AudioError

RATE = 16_000
RNG = np.random.default_rng(5)
FIRST = (0.3 * np.sin(np.arange(RATE) * 0.05) + 0.01 * RNG.standard_normal(RATE)).astype(np.float32)  # 1 s
SECOND = FIRST[::-1].copy()
# What libsndfile splits wrongly or refuses when it is joined: each of these has another way to say where it ends.
FORMS = (
    ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "GSM610"), ("WAV", "IMA_ADPCM"), ("WAV", "ULAW"),
    ("WAVEX", "PCM_16"), ("RF64", "PCM_16"), ("W64", "PCM_16"), ("AIFF", "PCM_16"), ("SVX", "PCM_16"), ("AU", "PCM_16"),
    ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
)  # fmt: skip
SIZED = tuple(form for form in FORMS if form[0] not in ("FLAC", "OGG", "MP3", "W64") and form[1] != "ALAC_16")


def encoded(samples, form="WAV", subtype="PCM_16", rate=RATE):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype, format=form)
    return file.getvalue()


def heard(data):
    """Return (samples, warnings)."""
    warnings = []
    samples, _ = audio.decode_audio(io.BytesIO(data), "x", warn=warnings.append)
    return samples.numpy(), warnings


def alone(data):
    """Return what libsndfile makes of one good file."""
    with soundfile.SoundFile(io.BytesIO(data)) as sound:
        return sound.read(sound.frames, dtype="float32")


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_joined_recordings_are_heard_one_after_the_other(form, count):
    files = [encoded(samples, *form) for samples in (FIRST, SECOND, FIRST[:9000])][:count]
    samples, warnings = heard(b"".join(files))
    assert np.array_equal(samples, np.concatenate([alone(file) for file in files])) and warnings == []


def test_recordings_of_other_rates_and_kinds_follow_each_other():
    flac = encoded(FIRST, "FLAC", rate=8000)
    wav = encoded(SECOND, rate=11_025)
    samples, warnings = heard(encoded(FIRST) + wav + flac)
    expected = [
        resampling.resample(torch.from_numpy(alone(data)), rate, audio.SAMPLE_RATE, torch.float32)
        for data, rate in ((encoded(FIRST), RATE), (wav, 11_025), (flac, 8000))
    ]
    assert np.array_equal(samples, np.concatenate(expected)) and warnings == []
    assert audio.decode_audio(io.BytesIO(wav + wav))[1] == 11_025
    assert audio.decode_audio(io.BytesIO(wav + flac))[1] == audio.SAMPLE_RATE


def test_rates_cost_no_more_than_their_samples(monkeypatch):
    """Neither memory for a rate that only a header states, nor a table of all phases for a recording of ten samples."""
    made = []
    table = resampling._sinc
    monkeypatch.setattr(resampling, "_sinc", lambda *args: made.append(table(*args)) or made[-1])
    head = encoded(FIRST[:1000])
    for rate in (2**31 - 1, 200_000_033, audio.MAX_RATE + 1):
        with pytest.raises(audio.AudioError, match=f"its sample rate of {rate} Hz is outside 1 to 1000000 Hz"):
            heard(head + with_rate(encoded(FIRST[:10]), rate))
    assert not made
    odd = [with_rate(encoded(FIRST[:10]), rate) for rate in (999_983, 999_979, 999_961, 999_959, 999_953)]
    samples, _ = heard(head + b"".join(odd[:3]) * 200)
    assert len(samples) == 1000 * audio.SAMPLE_RATE // RATE + 600
    assert 3 <= len(made) <= 4 and max(map(len, made)) <= audio.SAMPLE_RATE // 100
    with pytest.raises(audio.AudioError, match="holds recordings of 5 sample rates, at most 4 are joined"):
        heard(b"".join(odd))
    slow = with_rate(encoded(FIRST[:1000]), 1)
    with pytest.raises(audio.TooLongError, match=r"lasts 1000\.0 s, at most 900\.0 s are possible"):
        audio.decode_audio(io.BytesIO(odd[0] + slow), "x", max_seconds=900)


def with_rate(wav, rate):
    """Return a WAV whose header states another rate."""
    return wav[:24] + rate.to_bytes(4, "little") + wav[28:]


def test_an_ogg_that_ends_in_the_mark_of_a_page_is_no_fault_of_ours():
    ogg = encoded(FIRST, "OGG", "VORBIS")
    pages = [place for place in range(len(ogg)) if ogg.startswith(b"OggS", place)]
    assert len(pages) > 3
    cut = ogg[:-50]
    for left in range(1, 40):
        samples, warnings = heard(cut + ogg[:left])
        assert len(samples) and warnings, left


def test_the_loudspeakers_of_a_big_endian_wav_are_read_as_such():
    def wav(magic, order):
        number = lambda value, size: value.to_bytes(size, order)  # noqa: E731
        guid = number(1, 4) + number(0, 2) + number(16, 2) + bytes.fromhex("800000aa00389b71")
        form = number(0xFFFE, 2) + number(6, 2) + number(RATE, 4) + number(RATE * 12, 4) + number(12, 2) + number(16, 2)
        form += number(22, 2) + number(16, 2) + number(0x3F, 4) + guid
        samples = b"".join(number(0, 2) * 2 + number(8000, 2) + number(0, 2) * 3 for _ in range(2000))
        body = b"fmt " + number(len(form), 4) + form + b"data" + number(len(samples), 4) + samples
        return magic + number(4 + len(body), 4) + b"WAVE" + body

    little, _ = heard(wav(b"RIFF", "little"))
    big, _ = heard(wav(b"RIFX", "big"))
    assert np.array_equal(little, big) and abs(little).max() > 0.1


def test_a_file_of_more_recordings_than_are_heard_is_refused(monkeypatch):
    monkeypatch.setattr(containers, "MOST_RECORDINGS", 3)
    samples, _ = heard(encoded(FIRST[:9000]) * 3)
    assert len(samples) == 3 * 9000
    with pytest.raises(audio.TooLongError, match="more than 3 recordings, one behind the other; make them one"):
        heard(encoded(FIRST[:9000]) * 5)
    for form in FORMS:  # others are not looked for
        found = containers.parts(io.BytesIO(encoded(FIRST[:9000], *form) * 9))
        assert 3 < len(found) <= 5, form


@pytest.mark.parametrize("form", SIZED, ids="-".join)
def test_a_cut_file_gives_what_it_has_with_a_warning(form):
    data = encoded(np.tile(FIRST, 8), *form)
    samples, warnings = heard(data[: len(data) * 2 // 3])
    whole = alone(data)
    assert 0.6 * len(whole) < len(samples) < 0.67 * len(whole)
    assert np.array_equal(samples[: len(samples) - 512], whole[: len(samples) - 512])  # a block of a codec was cut, too
    (line,) = warnings
    assert "its header states" in line and line.endswith("are there")


@pytest.mark.parametrize("form", [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")])
def test_a_cut_stream_gives_what_it_has_with_a_warning_and_what_follows_it(form):
    data = encoded(RNG.uniform(-0.5, 0.5, 30 * RATE), *form)
    cut = data[: len(data) * 2 // 3]
    samples, warnings = heard(cut)
    assert 15 * RATE < len(samples) < 21 * RATE and len(warnings) == 1
    both, warnings = heard(cut + data)
    assert len(both) == len(samples) + len(alone(data)) and len(warnings) == 1


def wav(stated, pcm, riff=None):
    form = struct.pack("<IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    size = 36 + stated if riff is None else riff
    return b"RIFF" + struct.pack("<I", size) + b"WAVEfmt " + form + b"data" + struct.pack("<I", stated) + pcm


PCM = (FIRST * 32767).round().astype("<i2").tobytes()
EXPECTED = np.frombuffer(PCM, "<i2").astype(np.float32) / 32768


@pytest.mark.parametrize(
    ("stated", "riff", "says"),
    [
        (0, 36, "states 0 bytes of samples, 32000 are there"),  # a recorder that crashed
        (0, 0, "states 0 bytes of samples, 32000 are there"),
        (8000, 8036, "states 8000 bytes of samples, 32000 are there"),  # one that notes the size now and then
        (32000, 36, ""),
        (32000, 0, ""),
        (0xFFFFFFFF, 0xFFFFFFFF, ""),  # ffmpeg into a pipe
        (0x7FFFF000, 0x7FFFF024, ""),  # sox into a pipe
        (0x80000000, 0x80000024, ""),  # arecord
        (64000, 64036, "states 64000 bytes of samples, 32000 are there"),
    ],
)  # fmt: skip
def test_sizes_in_a_header_are_hints(stated, riff, says):
    samples, warnings = heard(wav(stated, PCM, riff))
    assert np.array_equal(samples, EXPECTED)
    assert [says in line for line in warnings] == ([True] if says else [])
    twice, _ = heard(wav(stated, PCM, riff) + wav(stated, PCM, riff))
    assert np.array_equal(twice, np.tile(EXPECTED, 2))


@pytest.mark.parametrize("trailer", [b"", b"\0" * 100, b"ID3\x04junk", b"TAG" + b"x" * 125, b"LIST\x08\0\0\0INFOISFT",
                                     b"LIST\xff\0\0\0cut"])  # fmt: skip
def test_what_stands_behind_the_samples_is_not_heard(trailer):
    samples, warnings = heard(wav(32000, PCM) + trailer)
    assert np.array_equal(samples, EXPECTED) and warnings == []


@pytest.mark.parametrize("unseekable", ["fifo", "stdin", "substitution"])
def test_audio_from_pipes(unseekable, tmp_path):
    data = encoded(FIRST, "FLAC")
    if unseekable == "fifo":
        os.mkfifo(tmp_path / "pipe")
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
        writer.start()
        samples, _ = audio.read_audio(tmp_path / "pipe")
        writer.join()
        assert np.array_equal(samples.numpy(), alone(data))
        return
    program = "import sys; from covo_npu.runtime import audio; print(len(audio.read_audio(sys.argv[1])[0]))"
    path = "/dev/stdin" if unseekable == "stdin" else "<(cat)"
    shell = f"'{sys.executable}' -c \"$PROGRAM\" {path}"
    done = subprocess.run(
        ["bash", "-c", shell], input=data, capture_output=True, env={**os.environ, "PROGRAM": program}
    )
    assert int(done.stdout) == len(FIRST), done.stderr


def test_an_unbuffered_pipe_is_heard_to_its_end(tmp_path):
    """One read of it gives no more than what is there."""
    data = encoded(np.tile(FIRST, 20), "WAV")
    assert len(data) > 1 << 17
    (tmp_path / "long.wav").write_bytes(data)
    with subprocess.Popen(["cat", tmp_path / "long.wav"], stdout=subprocess.PIPE, bufsize=0) as cat:
        samples, _ = audio.decode_audio(cat.stdout)
    assert np.array_equal(samples.numpy(), alone(data))


def test_a_pipe_that_does_not_end_is_refused(monkeypatch):
    monkeypatch.setattr(audio, "MAX_PIPED_BYTES", 1000)
    reader, writer = os.pipe()
    os.write(writer, bytes(2000))
    with os.fdopen(reader, "rb") as file, pytest.raises(AudioError, match="came out of this pipe"):
        audio.decode_audio(file)
    os.close(writer)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ("1a45dfa39f4286810142f7810142f2810442f381084282847765626d", "WebM"),
        ("00000020667479704d344120", "M4A"),
        ("00000014667479703367703400", "M4A"),
        ("2321414d520a", "AMR"),
        ("022321534c4b5f5633".replace("534c4b", "53494c4b"), "SILK"),
        ("fff15080", "AAC"),
        ("3026b2758e66cf11a6d9", "WMA"),
        ("7776706b", "WavPack"),
        ("4d414320", "Monkey"),
    ],
)
def test_what_libsndfile_cannot_read_is_named_with_the_command_that_converts_it(head, says):
    with pytest.raises(AudioError) as error:
        audio.decode_audio(io.BytesIO(bytes.fromhex(head) + bytes(2000)), "my memo.x")
    assert says in str(error.value) and "ffmpeg -i 'my memo.x' -ar 24000 'my memo.wav'" in str(error.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b'{"error": "gone"}', "JSON"),
        (b"PK\x03\x04" + bytes(99), "an archive"),
    ],
)
def test_what_is_no_audio_is_named(data, says):
    with pytest.raises(AudioError, match=says) as error:
        audio.decode_audio(io.BytesIO(data), "x")
    assert "ffmpeg" not in str(error.value)


class Counted(io.BytesIO):
    """Counts what is read of it; more than `most` reads are a fault."""

    def __init__(self, data, most=math.inf):
        super().__init__(data)
        self.most, self.reads, self.total = most, 0, 0

    def read(self, size=-1):
        data = super().read(size)
        self.reads, self.total = self.reads + 1, self.total + len(data)
        assert self.reads < self.most, "it is read again and again"
        return data


@pytest.mark.parametrize("head", [b"RIFF\0\0\0\0WAVE", b"caff\0\1\0\0"])
def test_chunks_of_nothing_before_the_samples_are_not_all_walked(head, monkeypatch):
    monkeypatch.setattr(containers, "MOST_CHUNKS_BEFORE", 100)
    file = Counted(head + bytes(1 << 20), most=300)
    (part,) = containers.parts(file)
    assert (part.start, part.stop) == (0, len(head) + (1 << 20)) and file.reads > 100


HEADS = (
    b"RIFF\0\0\0\0WAVE", b"RIFX\0\0\0\0WAVE", b"RF64\0\0\0\0WAVE", b"FORM\0\0\0\0AIFF", b"OggS", b"fLaC", b"ID3",
    b"\xff\xfb", b".snd", b"caff\0\1", b"riff\x2e\x91\xcf\x11",
)  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("fill", [b"\0", b"\1", b"\xff", None], ids=["zeros", "ones", "largest", "the head again"])
def test_the_shortest_files_come_to_an_end(head, fill):
    """Sizes of nothing, of little and of far too much: every recording has bytes, and together they are the file."""
    for length in range(len(head), 80):
        file = Counted((head + (fill or head) * 80)[:length], most=2000)
        found = containers.parts(file)
        assert found[0].start == 0
        assert all(part.start < part.stop for part in found)
        assert [part.stop + part.skipped for part in found[:-1]] == [part.start for part in found[1:]]
        assert found[-1].stop <= length


def test_pages_that_are_cut_off_are_not_searched_to_the_end_of_the_file_each():
    file = Counted(b"OggS\0" * 8000)
    containers.parts(file)
    assert file.total < 8000 * 2 * containers.FIRST_SCAN_BYTES
    file = Counted(b"OggS\0" * (containers.MOST_RECORDINGS + 5000))
    containers.parts(file)
    assert file.reads < 4 * containers.MOST_RECORDINGS + 100  # behind so many, nothing more is looked for


def test_chunks_behind_the_samples_are_not_read_again_for_every_recording():
    """Each recording is followed by a chunk that reaches over all others, to thousands of small ones and no audio."""
    chunks = b"abcd\0\0\0\0" * 5000 + b"\1" * 70_000
    wav, count = encoded(FIRST[:10]), 100
    data = b""
    for _ in range(count):
        data = wav + b"over" + struct.pack("<I", len(data)) + data
    file = Counted(data + chunks)
    assert len(containers.parts(file)) == count
    assert file.reads < count * (2 * containers.MOST_CHUNKS + 20)


def test_a_window_reads_as_the_bytes_would():
    """Against a BytesIO of the same bytes, at random."""
    data = RNG.bytes(1000)
    part = containers.Part(100, 900, ((98, b"abcdef"), (500, b"xyz")))
    changed = data[:98] + b"abcdef" + data[104:500] + b"xyz" + data[503:]
    window, expected = containers.Window(io.BytesIO(data), part), io.BytesIO(changed[100:900])
    for _ in range(300):
        place, size = int(RNG.integers(0, 900)), int(RNG.integers(-1, 300))
        assert window.seek(place) == expected.seek(place)
        assert window.read(size) == expected.read(size) and window.tell() == expected.tell()
    assert window.seek(-5, os.SEEK_END) == expected.seek(-5, os.SEEK_END)


def test_a_name_that_no_file_can_have_is_one_message(tmp_path):
    for name in ("a\0b.wav", "half \ud800.wav"):
        with pytest.raises(AudioError, match="no file can have this name"):
            audio.read_audio(tmp_path / name)
