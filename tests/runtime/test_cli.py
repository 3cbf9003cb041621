"""covo-run as a person or a program uses it: a process of its own on the converted tiny checkpoint."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from covo_npu.runtime import CovoAudio, audio
from covo_npu.runtime.audio import AudioError
from covo_npu.runtime.cli import dialogue
from covo_npu.runtime.cli import run as cli
from covo_npu.runtime.cli.console import Screen
from covo_npu.runtime.engine import NotFiniteError
from covo_npu.runtime.options import SpeechBlocks

AUDIO = Path(__file__).parents[1] / "data" / "audio"
ENGLISH, CHINESE = AUDIO / "question_en_48k_24bit.wav", AUDIO / "question_zh_44k_stereo.wav"
COVO_RUN = Path(sys.executable).with_name("covo-run")
ROUND_KEYS = {
    "input", "prompt_tokens", "placeholders", "tokens", "text", "audio_codes", "stop_reason", "wav", "samples",
    "timing", "warnings",
}  # fmt: skip
TIMING_KEYS = {"encode_s", "ttft_s", "ttfa_s", "decode_s", "tokens_per_s", "token2wav_s", "rtf"}


@pytest.fixture(scope="module")
def ckpt(convert_tiny):
    return convert_tiny("float32")


@pytest.fixture
def covo_run(ckpt, tmp_path):
    """Return a function: arguments -> the finished process, run in tmp_path."""

    def run(*arguments, stdin="", ckpt=ckpt, program=(COVO_RUN,)):
        command = [*program, "--ckpt", ckpt, "--device", "cpu", "--max-new-tokens", "12", *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=240, cwd=tmp_path)

    return run


@pytest.fixture
def covo_run_here(ckpt, tmp_path, monkeypatch, capsys):
    """Return covo_run's function without a process of its own: what it costs to import torch is paid once."""

    def run(*arguments, stdin="", ckpt=ckpt):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        command = [str(a) for a in ("--ckpt", ckpt, "--device", "cpu", "--max-new-tokens", "12", *arguments)]
        code = cli.main(command)
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    return run


def messages(done):
    """Return the lines of stderr; a traceback is never among them."""
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()


# Results


def test_a_dialogue_is_upstreams_token_for_token_without_heavy_imports(covo_run, golden, tmp_path):
    expected = golden("dialogue_fp32_two_rounds_a2ta")
    blocked = (
        "import sys\n"
        "for name in ('transformers', 'librosa', 'torchdiffeq', 'scipy', 'numba', 'einops'): sys.modules[name] = None\n"
        "from covo_npu.runtime.cli.run import main\nsys.exit(main())"
    )
    done = covo_run(
        "--max-new-tokens", "48", "--json", "out/run.json", ENGLISH, CHINESE, program=(sys.executable, "-c", blocked)
    )
    assert done.returncode == 0 and messages(done) == []
    report = json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))

    assert set(report) == {
        "command", "version", "device", "dtype", "weights", "token2wav_dtype", "vocoder_dtype", "backend", "load",
        "rounds", "errors",
    }  # fmt: skip
    assert report["command"] == "covo-run"
    assert (report["device"], report["dtype"], report["weights"], report["errors"]) == ("cpu", "float32", "float32", [])
    assert set(report["load"]) == {"process_to_ready_s", "load_s", "bytes", "placed"}
    assert report["load"]["process_to_ready_s"] > report["load"]["load_s"] > 0 and report["load"]["bytes"] > 1e6
    assert len(report["rounds"]) == 2
    for i, (one, question) in enumerate(zip(report["rounds"], (ENGLISH, CHINESE))):
        assert set(one) == ROUND_KEYS and set(one["timing"]) == TIMING_KEYS
        assert one["input"] == str(question)
        assert one["tokens"] == expected[f"r{i}_tokens"].tolist()
        assert one["prompt_tokens"] == len(expected[f"r{i}_input_ids"])
        assert one["audio_codes"] and one["text"] and one["stop_reason"] == "length"
        wav, rate = soundfile.read(tmp_path / one["wav"])
        assert rate == 24_000 and len(wav) == one["samples"] and np.abs(wav).max() > 0
        assert one["wav"] == f"replies/{i + 1:02d}-{question.stem}.wav"
        assert one["wav"] in done.stdout
        assert all(value > 0 for value in one["timing"].values())
    assert re.search(
        r"covo-run [\d.]+: cpu, backend cpu \(.*\), float32, flow matching \w+, vocoder float32; "
        r"ready in [\d.]+ s \([\d.]+ GB",
        done.stdout,
    )


def test_speech_while_it_is_generated(covo_run_here, ckpt, tmp_path):
    """The growing file and stdout hold what the API gives for the same codes and blocks; whole speech is another."""
    cut = ("--sizes", "8,4", "--look-ahead", "2", "--past-s", "1.5", "--prompt-s", "all", "--max-new-tokens", "60")
    done = covo_run_here("--stream", *cut, "--json", "run.json", ENGLISH)
    assert done.returncode == 0, done.stderr
    (one,) = json.loads((tmp_path / "run.json").read_text("utf-8"))["rounds"]
    assert one["timing"]["ttfa_s"] > one["timing"]["ttft_s"] and "first sound" in done.stdout
    wav, rate = soundfile.read(tmp_path / one["wav"], dtype="int16")
    blocks = SpeechBlocks((8, 4), look_ahead=2, past_s=1.5)
    model = CovoAudio.load(ckpt, device="cpu")
    expected = audio.to_pcm16(model.token2wav(one["audio_codes"], blocks=blocks))
    assert rate == 24_000 and wav.tobytes() == expected and len(wav) == one["samples"] > 0
    assert audio.to_pcm16(model.token2wav(one["audio_codes"])) != expected


def test_raw_samples_on_stdout(ckpt, tmp_path):
    def run(*arguments):
        command = [COVO_RUN, "--ckpt", ckpt, "--device", "cpu", "--max-new-tokens", "60", *arguments, ENGLISH]
        return subprocess.run(command, capture_output=True, timeout=240, cwd=tmp_path)

    streamed, whole = run("--output", "-", "--json", "run.json"), run("--output", "-", "--no-stream")
    assert streamed.returncode == whole.returncode == 0 and b"ready in" in streamed.stderr
    (one,) = json.loads((tmp_path / "run.json").read_text("utf-8"))["rounds"]
    model = CovoAudio.load(ckpt, device="cpu")
    assert streamed.stdout == audio.to_pcm16(model.token2wav(one["audio_codes"], blocks=SpeechBlocks())) != b""
    assert whole.stdout == audio.to_pcm16(model.token2wav(one["audio_codes"]))
    assert one["wav"] is None and not (tmp_path / "replies").exists() and not (tmp_path / "-").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "-", "--json", "-"), "writes samples to stdout"),
        (("--output", "-", "--mode", "a2t"), "writes samples to stdout"),
        (("--output", "-", "--batch", "x"), "leave out"),
        (("--stream", "--batch", "x"), "leave out"),
        (("--sizes", "15,x"), "numbers of codes"),
        (("--sizes", "15,0"), "--sizes must be at least 1"),
        (("--sizes", "3"), "--look-ahead must be at least 0 and below"),
        (("--past-s", "long"), "expected seconds or all"),
        (("--prompt-s", "nan"), "--prompt-s must be at least 0"),
    ],
)
def test_what_cannot_be_streamed_is_a_usage_error(covo_run_here, arguments, message):
    done = covo_run_here(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_json_on_stdout_is_all_there_is_on_stdout(covo_run, tmp_path):
    done = covo_run("--mode", "a2t", "--json", "-", ENGLISH)
    (one,) = json.loads(done.stdout)["rounds"]
    assert done.returncode == 0 and one["wav"] is None and one["samples"] == 0 and len(one["tokens"]) == 12
    assert "ready in" in done.stderr and not (tmp_path / "replies").exists()


def test_quiet_prints_nothing(covo_run, tmp_path):
    done = covo_run("--quiet", "--output", "mine", ENGLISH)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [f"01-{ENGLISH.name}"]


def test_any_format_rate_and_number_of_channels(covo_run_here, tmp_path):
    samples, _ = soundfile.read(ENGLISH, frames=48_000)
    soundfile.write(tmp_path / "a.flac", np.stack([samples] * 5, 1), 22_050)
    soundfile.write(tmp_path / "b.ogg", samples, 8_000)
    soundfile.write(tmp_path / "c.wav", samples, 44_101, subtype="DOUBLE")
    done = covo_run_here("--mode", "a2t", "--json", "run.json", "a.flac", "b.ogg", "c.wav")
    rounds = json.loads((tmp_path / "run.json").read_text("utf-8"))["rounds"]
    assert done.returncode == 0
    seconds = [48_000 / rate for rate in (22_050, 8_000, 44_101)]
    assert [one["placeholders"] for one in rounds] == [-(-int(s * 100) // 16) for s in seconds]


def test_sampling_depends_on_the_seed_alone(covo_run_here):
    def tokens(seed):
        done = covo_run_here(
            "--mode", "a2t", "--temperature", "0.9", "--top-k", "0", "--seed", seed, "--json", "-", ENGLISH
        )
        return json.loads(done.stdout)["rounds"][0]["tokens"]

    assert tokens("1") == tokens("1") != tokens("2")


def test_system_text_and_voice_can_be_replaced(covo_run_here, tmp_path):
    (tmp_path / "text").write_text("你好", "utf-8")
    voice = tmp_path / "voice"
    shutil.copytree(AUDIO.parent / "covo-tiny" / "token2wav" / "prompt", voice)
    latents = np.load(voice / "prompt_latent.npy")
    codes = np.load(voice / "prompt_token.npy")
    np.save(voice / "prompt_latent.npy", latents[:, :40])
    np.save(voice / "prompt_token.npy", codes[:, :10])
    plain = json.loads(covo_run_here("--json", "-", ENGLISH).stdout)["rounds"][0]
    done = covo_run_here("--json", "-", "--system", "@text", ENGLISH)
    assert json.loads(done.stdout)["rounds"][0]["prompt_tokens"] < plain["prompt_tokens"]
    other = json.loads(covo_run_here("--json", "-", "--voice", voice, "--output", "other", ENGLISH).stdout)["rounds"][0]
    assert other["tokens"] == plain["tokens"]
    # The voice's prompt is cut off the reply: 40 frames of 10 codes leave whole codes.
    assert other["samples"] == len(plain["audio_codes"]) * 4 * 240
    np.save(voice / "prompt_token.npy", codes.astype(np.float32))
    (voice / "speaker_embed.npy").unlink()
    done = covo_run_here("--voice", voice, ENGLISH)
    (line,) = messages(done)
    assert (
        done.returncode == 1 and "prompt_token.npy: expected integers" in line and "speaker_embed.npy: missing" in line
    )


# Input from a pipe and from a terminal


def test_nothing_to_read_prints_how_the_load_went(covo_run):
    done = covo_run()
    assert done.returncode == 0 and messages(done) == []
    (line,) = done.stdout.splitlines()
    assert "ready in" in line


@pytest.mark.parametrize(
    ("options", "dtypes"),
    [
        (["--dtype", "float32"], "float32, flow matching float32, vocoder float32"),
        (["--dtype", "float32", "--token2wav-dtype", "bfloat16"], "float32, flow matching bfloat16, vocoder float32"),
        (["--dtype", "bfloat16"], "bfloat16, flow matching bfloat16, vocoder float32"),
        (
            ["--dtype", "float32", "--vocoder-dtype", "bfloat16"],
            "float32, flow matching float32, vocoder bfloat16",
        ),
        (["--dtype", "float32", "--mode", "a2t"], "float32"),
    ],
)
def test_flow_matching_follows_a_dtype_that_was_chosen(covo_run_here, options, dtypes):
    assert f"), {dtypes}; ready in" in covo_run_here(*options).stdout


def test_weights_in_8_bits_are_named(covo_run_here, convert_tiny, tmp_path):
    done = covo_run_here("--mode", "a2t", "--json", "run.json", ENGLISH, ckpt=convert_tiny("int8"))
    assert "), bfloat16, weights int8; ready in" in done.stdout
    report = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert (report["dtype"], report["weights"], len(report["rounds"][0]["tokens"])) == ("bfloat16", "int8", 12)


def bad_inputs(folder):
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("no audio\n" * 100)
    soundfile.write(folder / "none.wav", np.zeros(0), 24_000)
    soundfile.write(folder / "nan.wav", np.full(9000, np.nan), 24_000, subtype="FLOAT")
    soundfile.write(folder / "short.wav", np.zeros(100), 24_000)
    soundfile.write(folder / "rate.wav", np.zeros(9000), 1_000_007)
    return {
        "missing.wav": "does not exist",
        "empty.wav": "is empty",
        "text.wav": "is not an audio file",
        "none.wav": "has no samples",
        "nan.wav": "NaN",
        "short.wav": "at least 10 ms",
        "rate.wav": "1000007 Hz is outside",
        "replies": "does not exist",
    }


def test_piped_paths_are_rounds_and_bad_ones_are_one_message_each(covo_run, tmp_path, golden):
    bad = bad_inputs(tmp_path)
    stdin = "\n".join([*bad, "", f"  '{ENGLISH}' "])
    done = covo_run("--json", "run.json", stdin=stdin)
    report = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert done.returncode == 1
    for line, (name, reason) in zip(messages(done), bad.items(), strict=True):
        assert line.startswith("covo-run: ") and reason in line and name in line
    assert [error["input"] for error in report["errors"]] == list(bad)
    (one,) = report["rounds"]
    assert one["tokens"] == golden("dialogue_fp32_two_rounds_a2ta")["r0_tokens"][:12].tolist()


def test_a_bad_argument_ends_the_dialogue(covo_run_here, tmp_path):
    done = covo_run_here("--json", "run.json", "missing.wav", ENGLISH)
    report = json.loads((tmp_path / "run.json").read_text("utf-8"))
    (line,) = messages(done)
    assert done.returncode == 1 and line == "covo-run: missing.wav: does not exist"
    assert report["rounds"] == [] and len(report["errors"]) == 1


def test_audio_beyond_the_context_is_refused_with_what_to_do(covo_run_here, tmp_path):
    soundfile.write(tmp_path / "hours.wav", np.zeros(3 * 3600 * 8000, np.int16), 8000)
    done = covo_run_here("hours.wav")
    assert done.returncode == 1 and re.search(r"hours\.wav: lasts 10800\.0 s, at most [\d.]+ s", messages(done)[0])
    done = covo_run_here("--max-context", "560", ENGLISH)
    assert done.returncode == 0
    done = covo_run_here("--max-context", "500", ENGLISH)
    assert done.returncode == 1 and "--max-context" in messages(done)[0]


def test_interactive_dialogue_goes_on_after_a_bad_path(ckpt, tmp_path):
    primary, secondary = pty.openpty()
    command = [COVO_RUN, "--ckpt", ckpt, "--device", "cpu", "--mode", "a2t", "--max-new-tokens", "12"]
    process = subprocess.Popen(command, stdin=secondary, stdout=secondary, stderr=subprocess.STDOUT, cwd=tmp_path)
    os.close(secondary)
    shown = ""

    def read_until(text, count):
        nonlocal shown
        deadline = time.monotonic() + 60
        while shown.count(text) < count:
            assert time.monotonic() < deadline, shown
            if select.select([primary], [], [], 1)[0]:
                shown += os.read(primary, 4096).decode("utf-8", "replace")

    read_until("audio file> ", 1)
    os.write(primary, b"missing.wav\n")
    read_until("audio file> ", 2)
    os.write(primary, f"{ENGLISH}\n".encode())
    read_until("audio file> ", 3)
    os.write(primary, b"\x04")  # Ctrl-D
    assert process.wait(timeout=60) == 0
    os.close(primary)
    assert "missing.wav: does not exist" in shown and "first token" in shown and "Traceback" not in shown


@pytest.mark.parametrize(("error", "failed"), [(NotFiniteError("broken"), True), (AudioError("typed wrong"), False)])
def test_what_ends_a_typed_dialogue_is_a_failure(monkeypatch, error, failed):
    """Who typed a wrong path has seen the message; broken weights end the program."""

    def fails(*_):
        raise error

    monkeypatch.setattr(dialogue, "_typed", lambda screen: ["one.wav", "two.wav"])
    monkeypatch.setattr(dialogue, "_round", fails)
    monkeypatch.setattr(dialogue.console, "is_terminal", lambda stream: True)
    report = {"rounds": [], "errors": []}
    assert dialogue.converse(None, (), None, Screen("covo-run", quiet=True), report) is failed
    assert len(report["errors"]) == (1 if failed else 2)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_end_it_at_once(ckpt, tmp_path, number, code, word):
    process = subprocess.Popen(
        [COVO_RUN, "--ckpt", ckpt, "--device", "cpu"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert "ready in" in process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code and err.split() == ["covo-run:", word]


# Faults


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--mode", "t2a"], "--mode"),
        (["--dtype", "int8"], "--dtype"),
        (["--unknown"], "--unknown"),
    ],
)
def test_usage_errors_are_2_and_name_the_option(covo_run_here, arguments, message):
    done = covo_run_here(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_checkpoint_is_required():
    done = subprocess.run([COVO_RUN], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--ckpt" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--backend", "magic"], "unknown backend 'magic'"),
        (["--output", "file/replies"], "file/replies: cannot be written"),
        (["--json", "file/run.json"], "cannot be written"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_loaded(covo_run_here, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    done = covo_run_here(*arguments, ENGLISH)
    (line,) = messages(done)
    assert done.returncode == 1 and message in line and done.stdout == ""


def test_a_source_checkpoint_is_to_be_converted_first(covo_run, tiny_source):
    done = covo_run(ckpt=tiny_source)
    (line,) = messages(done)
    assert done.returncode == 1 and f"convert it first: covo-convert --src {tiny_source}" in line


def test_a_damaged_checkpoint_never_speaks(covo_run_here, ckpt, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(ckpt, damaged)
    name = "llm-rank0of1.safetensors"
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).write_bytes(content)
    done = covo_run_here(ENGLISH, ckpt=damaged)
    (line,) = messages(done)
    assert done.returncode == 1 and name in line and not (tmp_path / "replies").exists()
    assert covo_run_here("--no-check", "--mode", "a2t", ENGLISH, ckpt=damaged).returncode == 0
    (damaged / name).write_bytes(content[:-512])
    assert name in "".join(messages(covo_run_here(ENGLISH, ckpt=damaged)))
    (damaged / name).unlink()
    assert name in "".join(messages(covo_run_here(ENGLISH, ckpt=damaged)))


def test_verbose_adds_the_traceback(covo_run):
    done = covo_run("--verbose", "--device", "tpu")
    assert done.returncode == 1 and "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith("covo-run: ")
