"""What users and machines do to a dialogue: signals, full disks, odd audio, a full context. No half files."""

from __future__ import annotations

import functools
import os
import resource
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from covo_npu.runtime import CovoAudio, Session
from covo_npu.runtime.audio import AudioError
from covo_npu.runtime.cli.run import main
from covo_npu.runtime.engine import ContextError

COVO_RUN = Path(sys.executable).with_name("covo-run")
SIGNAL_AT = Path(__file__).with_name("signal_at.py")
QUESTION = Path(__file__).parents[1] / "data" / "audio" / "question_en_48k_24bit.wav"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def ckpt(convert_tiny) -> Path:
    return convert_tiny("float32")


@pytest.fixture(scope="module")
def model(ckpt) -> CovoAudio:
    return CovoAudio.load(ckpt, device="cpu", max_context=1024)


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


# --- signals


@pytest.mark.parametrize(
    ("stage", "number"),
    [(stage, signal.SIGINT) for stage in ("manifest", "load", "read", "encode", "decode", "flow", "vocoder", "write")]
    + [(stage, signal.SIGTERM) for stage in ("load", "decode", "flow", "write")],
)
def test_a_signal_at_every_stage_ends_it_without_half_files(ckpt, tmp_path, stage, number):
    command = [sys.executable, SIGNAL_AT, stage, str(int(number)), "--ckpt", ckpt, "--output", tmp_path / "replies"]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, "--device", "cpu", "--max-new-tokens", "64", QUESTION],
        capture_output=True, text=True, timeout=120, env=ENVIRONMENT)  # fmt: skip
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert (done.returncode, done.stderr.strip()) == (128 + number, f"covo-run: {word}")
    assert files_below(tmp_path) == []
    assert time.monotonic() - begin < 60, "a thread kept the process"


# --- disks


def test_a_disk_that_is_full_while_the_reply_is_written(ckpt, tmp_path):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (300, 300))
    done = run(ckpt, tmp_path / "replies", preexec_fn=limit)
    assert done.returncode == 1
    assert "01-question_en_48k_24bit.wav: cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert files_below(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 8 kB, if this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", place], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"may not mount: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_and_a_read_only_file_system(ckpt, small_disk):
    (small_disk / "filler").write_bytes(bytes(4096))
    done = run(ckpt, small_disk)
    assert done.returncode == 1 and "cannot be written: No space left on device" in done.stderr, done.stderr
    assert files_below(small_disk) == ["filler"]
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = run(ckpt, small_disk)
    assert done.returncode == 1 and "cannot be written" in done.stderr and "ready in" not in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_that_is_a_file_is_refused_before_anything_is_loaded(ckpt, tmp_path, capsys, output):
    (tmp_path / "file").write_text("mine")
    assert main(["--ckpt", str(ckpt), "--output", str(tmp_path / output), str(QUESTION)]) == 1
    said = capsys.readouterr()
    assert "cannot be written" in said.err and "ready in" not in said.out
    assert (tmp_path / "file").read_text() == "mine"


def run(ckpt: Path, output: Path, **options) -> subprocess.CompletedProcess:
    command = [COVO_RUN, "--ckpt", ckpt, "--device", "cpu", "--max-new-tokens", "64", "--output", output, QUESTION]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, **options)


# --- audio


T = np.arange(8000) / 16000
ODD_AUDIO = {
    "silence": (np.zeros(8000), 16000),
    "constant": (np.full(8000, 0.5), 16000),
    "clipped": (np.clip(9 * np.sin(2 * np.pi * 220 * T), -1, 1), 16000),
    "beyond full scale": (1e4 * np.sin(2 * np.pi * 220 * T), 16000),
    "hardly there": (1e-30 * np.sin(2 * np.pi * 220 * T), 16000),
    "10 ms": (np.zeros(160), 16000),
    "a million samples a second": (np.sin(np.arange(200_000) / 50), 1_000_000),
    "one sample a second": (np.ones(2), 1),
    "a prime rate": (np.sin(np.arange(7919) / 9), 7919),
    "nine channels": (np.ones((8000, 9)) * T[:, None], 16000),
}


@pytest.mark.parametrize("kind", ODD_AUDIO)
def test_odd_audio_gets_an_answer(model, kind):
    samples, rate = ODD_AUDIO[kind]
    reply = Session(model, mode="a2ta", max_new_tokens=6, system="short").say(samples.astype(np.float32), rate)
    assert 1 <= len(reply.tokens) <= 6
    assert np.isfinite(reply.waveform).all()
    assert reply.placeholders >= 1


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (np.zeros(2_000_000, np.float32), 1_000_001, "outside 1 to 1000000 Hz"),
        (np.full(8000, np.nan, np.float32), 16000, "NaN or infinite"),
        (np.full(8000, np.inf, np.float32), 16000, "NaN or infinite"),
        (np.zeros(100, np.float32), 16000, "at least 10 ms"),
        (np.zeros(0, np.float32), 16000, "no samples"),
        (np.zeros(8000, np.float32), 0, "0 Hz"),
        (np.zeros(8000, np.float32), -16000, "-16000 Hz"),
    ],
)
def test_unusable_audio_leaves_the_dialogue_as_it_was(model, samples, rate, message):
    session = Session(model, mode="a2t", max_new_tokens=2, system="short")
    with pytest.raises(AudioError, match=message):
        session.say(samples, rate)
    assert (session.dialogue.rounds, session.dialogue.length) == (0, 0)


def test_a_file_that_claims_days_is_refused_by_its_header(ckpt, tmp_path, capsys):
    path = tmp_path / "days.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.setnframes(0)
    head = bytearray(path.read_bytes())
    size = 2**31
    head[4:8], head[40:44] = (size + 36).to_bytes(4, "little"), size.to_bytes(4, "little")
    path.write_bytes(head)
    os.truncate(path, len(head) + size)  # no block of it is on the disk
    begin = time.monotonic()
    assert main(["--ckpt", str(ckpt), "--mode", "a2t", "--device", "cpu", str(path)]) == 1
    assert "lasts 134217.7 s, at most" in capsys.readouterr().err
    assert time.monotonic() - begin < 20


def test_minutes_of_silence_in_a_small_file(ckpt, tmp_path):
    path = tmp_path / "minutes.flac"
    soundfile.write(path, np.zeros(16000 * 200, np.int16), 16000)
    assert path.stat().st_size < 100_000
    reply = Session(CovoAudio.load(ckpt, device="cpu"), mode="a2t", max_new_tokens=2, system="short").say(path)
    assert reply.placeholders == 1250


# --- the context


def test_forty_rounds_until_the_context_is_full(model):
    """The rounds before the last get their answers; then one clear message, and the dialogue is as it was."""
    session = Session(model, mode="a2t", max_new_tokens=4, system="short")
    noise = np.random.Generator(np.random.PCG64(0)).standard_normal(4800).astype(np.float32) / 10
    replies = []
    with pytest.raises(ContextError) as caught:
        for _ in range(200):
            replies.append(session.say(noise, 16000))
    assert len(replies) >= 40
    assert all(reply.tokens for reply in replies)
    message = str(caught.value)
    assert f"the dialogue has {session.dialogue.length} of 1024" in message
    assert "start a new dialogue" in message and "--max-context" in message
    assert session.dialogue.rounds == len(replies)
    assert 1024 - 60 < session.dialogue.length <= 1024
    with pytest.raises(ContextError):
        session.say(noise, 16000)
    assert session.dialogue.rounds == len(replies)


def test_a_context_beyond_all_memory_is_one_message(ckpt, capsys):
    assert (
        main(["--ckpt", str(ckpt), "--mode", "a2t", "--device", "cpu", "--max-context", str(10**12), str(QUESTION)])
        == 1
    )
    said = capsys.readouterr().err
    assert said.startswith("covo-run: ") and "memory" in said and "Traceback" not in said


# --- logs


def test_verbose_logs_the_stages_with_times_and_never_the_prompt(ckpt, tmp_path, capsys):
    secret = "the password of the house is abracadabra"
    arguments = ["--ckpt", str(ckpt), "--device", "cpu", "--max-new-tokens", "12", "--output", str(tmp_path)]
    assert main([*arguments, "--system", secret, str(QUESTION)]) == 0
    assert "covo_npu" not in capsys.readouterr().err
    assert main([*arguments, "--system", secret, "--verbose", str(QUESTION)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("covo-run: ") and " s  covo_npu." in line for line in lines), lines
    for stage in ("heard in", "first token after", "tokens decoded in", "of speech in"):
        assert sum(stage in line for line in lines) == 1, lines
    assert "abracadabra" not in "".join(lines)
