"""What people really type and feed to covo-run, in one dialogue and in many; each kind with what is right."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from covo_npu.runtime import CovoAudio, Session
from covo_npu.runtime.cli import run as cli
from covo_npu.runtime.wav import WavFile

AUDIO = Path(__file__).parents[1] / "data" / "audio"
ENGLISH = AUDIO / "question_en_48k_24bit.wav"
LATIN = os.fsdecode(b"caf\xe9.wav")
COVO_RUN = Path(sys.executable).with_name("covo-run")


@pytest.fixture(scope="module")
def ckpt(convert_tiny) -> Path:
    return convert_tiny("float32")


@pytest.fixture
def covo_run(ckpt, tmp_path, monkeypatch, capsys):
    """Return a function: arguments -> (exit code, stdout, stderr) of covo-run in tmp_path, in this process."""

    def run(*arguments, stdin=""):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        short = ("--system", "short", "--max-context", "900", "--max-new-tokens", "4")  # of two options the last counts
        command = [str(a) for a in ("--ckpt", ckpt, "--device", "cpu", *short, *arguments)]
        code = cli.main(command)
        out, err = capsys.readouterr()
        assert "Traceback" not in err, err
        return code, out, err

    return run


@pytest.fixture
def plain(tmp_path) -> Path:
    """A short question in tmp_path."""
    samples, rate = soundfile.read(ENGLISH, frames=24_000)
    soundfile.write(tmp_path / "plain.wav", samples[::2], rate // 2)
    return tmp_path / "plain.wav"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Nothing is destroyed


@pytest.mark.parametrize("how", ["--no-stream", "--stream"])
def test_an_earlier_reply_stays(covo_run, plain, tmp_path, how):
    assert covo_run(how, "--max-new-tokens", "24", plain)[0] == 0
    before = contents(tmp_path / "replies")
    code, out, _ = covo_run(how, "--max-new-tokens", "24", "--seed", "3", plain)
    assert code == 0 and "replies/01-plain-2.wav" in out
    after = contents(tmp_path / "replies")
    assert after.keys() == {"01-plain.wav", "01-plain-2.wav"} and before.items() <= after.items()


def test_questions_in_the_folder_of_the_replies_stay(covo_run, plain, tmp_path):
    for name in ("d1-01.wav", "d1-02.wav", "01-plain.wav"):
        shutil.copy(plain, tmp_path / name)
    (tmp_path / "batch.jsonl").write_text(json.dumps({"id": "d1", "audio": ["d1-01.wav", "d1-02.wav"]}) + "\n")
    before = contents(tmp_path)
    assert covo_run("--max-new-tokens", "24", "--batch", "batch.jsonl", "--output", ".")[0] == 0
    assert covo_run("--max-new-tokens", "24", "--output", ".", "plain.wav")[0] == 0
    assert before.items() <= contents(tmp_path).items()
    (line,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [one["wav"] for one in line["rounds"]] == ["d1-01-2.wav", "d1-02-2.wav"]
    assert all((tmp_path / one["wav"]).exists() for one in line["rounds"]) and (tmp_path / "01-plain-2.wav").exists()


@pytest.mark.parametrize("target", ["plain.wav", "folder", "batch.jsonl", "replies/results.jsonl", "", "plain.wav/x"])
def test_json_onto_what_is_no_report_is_refused_before_loading(covo_run, plain, tmp_path, target, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "batch.jsonl").write_text(json.dumps({"id": "d1", "audio": "plain.wav"}) + "\n")
    monkeypatch.setattr(cli, "_load", lambda *arguments: pytest.fail("loaded"))
    before = contents(tmp_path)
    code, out, err = covo_run("--json", target, "--batch", "batch.jsonl")
    assert (code, out) == (1, "") and len(err.splitlines()) == 1 and contents(tmp_path) == before


def test_json_into_pipes_and_over_reports(covo_run, plain, tmp_path):
    assert covo_run("--mode", "a2t", "--json", "r.json", plain)[0] == 0
    first = json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "link.json").symlink_to("r.json")
    assert covo_run("--mode", "a2t", "--json", "link.json", plain, plain)[0] == 0
    second = json.loads((tmp_path / "r.json").read_text())
    assert (len(first["rounds"]), len(second["rounds"])) == (1, 2) and (tmp_path / "link.json").is_symlink()
    assert covo_run("--mode", "a2t", "--json", "/dev/null", plain)[0] == 0 and Path("/dev/null").is_char_device()
    code, out, _ = covo_run("--mode", "a2t", "--json", "/dev/stdout", plain)
    assert code == 0 and len(json.loads(out)["rounds"]) == 1


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError, OSError(28, "No space left on device")])
def test_finished_rounds_are_kept_whatever_ends_a_later_one(covo_run, plain, tmp_path, monkeypatch, end):
    say, asked = Session.say, []

    def later(self, *arguments, **named):
        asked.append(arguments)
        if len(asked) == 3:
            raise end
        return say(self, *arguments, **named)

    monkeypatch.setattr(Session, "say", later)
    arguments = ("--max-new-tokens", "24", "--json", "r.json", plain, plain, plain)
    if end is RuntimeError:  # a fault of ours keeps its traceback
        with pytest.raises(RuntimeError):
            covo_run(*arguments)
    else:
        assert covo_run(*arguments)[0] == (130 if end is KeyboardInterrupt else 1)
    rounds = json.loads((tmp_path / "r.json").read_text())["rounds"]
    assert len(rounds) == 2 and all((tmp_path / one["wav"]).exists() for one in rounds)


def test_a_disk_that_fills_while_speech_is_written(covo_run, plain, tmp_path, monkeypatch):
    """The growing file keeps what it has, the whole reply is kept, and that is said."""
    append, pieces = WavFile._append, []

    def full(self, samples):
        pieces.append(samples)
        if len(pieces) == 2:
            raise OSError(28, "No space left on device")
        append(self, samples)

    monkeypatch.setattr(WavFile, "_append", full)
    arguments = ("--stream", "--sizes", "4", "--look-ahead", "0", "--max-new-tokens", "40", "--json", "r.json", plain)
    code, _, err = covo_run(*arguments)
    (one,) = json.loads((tmp_path / "r.json").read_text())["rounds"]
    assert code == 1 and "01-plain.wav: cannot be written: No space left on device" in err and len(pieces) == 2
    assert one["wav"] == "replies/01-plain-2.wav" and one["wav"] in err
    begun, whole = (soundfile.read(tmp_path / "replies" / name)[0] for name in ("01-plain.wav", "01-plain-2.wav"))
    assert len(whole) == one["samples"] > len(begun) == len(pieces[0]) > 0 and (whole[: len(begun)] == begun).all()


@pytest.mark.parametrize("how", ["--no-stream", "--stream"])
def test_results_that_cannot_be_written_any_more_are_kept_elsewhere(covo_run, plain, tmp_path, monkeypatch, how):
    say = Session.say

    def blocked(self, *arguments, **named):
        """Meanwhile somebody puts files where the results should go."""
        (tmp_path / "replies").write_text("mine")
        (tmp_path / "r.json").write_text("mine, too")
        return say(self, *arguments, **named)

    monkeypatch.setattr(Session, "say", blocked)
    code, _, err = covo_run(how, "--max-new-tokens", "24", "--json", "r.json", plain)
    assert code == 1 and (tmp_path / "replies").read_text() == "mine"
    assert (tmp_path / "r.json").read_text() == "mine, too"
    wav, report = (Path(line.split(" in ")[-1]) for line in err.splitlines())
    (one,) = json.loads(report.read_text())["rounds"]
    assert soundfile.info(wav).frames == one["samples"] > 0 and one["wav"] == str(wav)
    for path in (wav, report):
        shutil.rmtree(path.parent)


# Names


def test_names_of_all_kinds_are_answered_and_shown(covo_run, plain, tmp_path):
    names = [LATIN, "~tilde.wav", " space.wav", "'quoted'.wav", "tab\t.wav", "x" * 251 + ".wav", "关" * 80 + ".wav"]
    for name in names:
        shutil.copy(plain, tmp_path / name)
    code, out, err = covo_run("--mode", "a2t", "--json", "r.json", stdin="\n".join(names) + "\n")
    assert code == 0 and err == "" and r"> caf\xe9.wav" in out
    inputs = [one["input"] for one in json.loads((tmp_path / "r.json").read_text("utf-8"))["rounds"]]
    assert inputs == [r"caf\xe9.wav", *names[1:]]
    code, _, _ = covo_run("--max-new-tokens", "24", LATIN, names[-2], names[-1])
    assert code == 0
    assert len(list((tmp_path / "replies").iterdir())) == 3


def test_ids_of_all_kinds_are_answered(covo_run, plain, tmp_path):
    ids = [
        "关于今天下午会议安排的第三个问题以及对它的补充说明和回答二",
        "x" * 5000,
        "half \ud800",
        "a/../b",
        ".",
        "\u2028",
    ]
    (tmp_path / "batch.jsonl").write_text("".join(json.dumps({"id": i, "audio": "plain.wav"}) + "\n" for i in ids))
    with (tmp_path / "batch.jsonl").open("a") as file:
        file.write(json.dumps({"id": "latin", "audio": LATIN}) + "\n")
    shutil.copy(plain, tmp_path / LATIN)
    assert covo_run("--max-new-tokens", "24", "--batch", "batch.jsonl")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "replies" / "results.jsonl").read_bytes().splitlines()]
    assert {line["id"] for line in lines} == {*ids, "latin"}
    assert all((tmp_path / "replies" / line["rounds"][0]["wav"]).is_file() for line in lines)
    code, out, _ = covo_run("--max-new-tokens", "24", "--batch", "batch.jsonl")
    assert code == 0 and "7 answered before" in out


# Heard whole or said so


def test_warnings_are_said_once_and_stand_in_json(covo_run, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(25_600), 16_000)
    code, _, err = covo_run("--mode", "a2t", "--json", "r.json", "silence.wav")
    (one,) = json.loads((tmp_path / "r.json").read_text())["rounds"]
    assert code == 0 and one["warnings"] == ["silence.wav: is silent: was the microphone muted?"]
    assert err == f"covo-run: warning: {one['warnings'][0]}\n"
    assert covo_run("--mode", "a2t", "--quiet", "silence.wav") == (0, "", "")
    (tmp_path / "batch.jsonl").write_text('{"id": "a", "audio": "silence.wav"}\n')
    assert covo_run("--mode", "a2t", "--batch", "batch.jsonl")[2].count("is silent") == 1
    (line,) = (tmp_path / "replies" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["warnings"] == one["warnings"]


def test_audio_from_stdin_is_the_file(covo_run, plain, tmp_path):
    expected = json.loads(covo_run("--mode", "a2t", "--json", "-", plain)[1])["rounds"][0]["tokens"]
    with plain.open("rb") as file:
        code, out, _ = covo_run("--mode", "a2t", "--json", "-", "-", stdin=io.TextIOWrapper(file))
    (one,) = json.loads(out)["rounds"]
    assert code == 0 and one["tokens"] == expected and one["input"] == "-"


def test_open_files_and_bytes_are_questions(convert_tiny, plain):
    model = CovoAudio.load(convert_tiny("float32"), device="cpu", max_context=900)
    expected = model.waveform(plain)
    with plain.open("rb") as file:
        found = [model.waveform(source) for source in (file, io.BytesIO(plain.read_bytes()), plain.read_bytes())]
    assert all(torch.equal(one, expected) for one in found)


def test_audio_where_paths_are_expected_is_one_message(covo_run, plain):
    code, _, err = covo_run(stdin=plain.read_bytes().decode("latin-1"))
    assert code == 2 and "audio from stdin is named -" in err


def test_damaged_audio_ends_its_dialogue_alone(covo_run, plain, tmp_path):
    samples, rate = soundfile.read(plain)
    soundfile.write(tmp_path / "gsm.wav", samples, rate, subtype="GSM610")
    (tmp_path / "browser.webm").write_bytes(bytes.fromhex("1a45dfa3") + bytes(2000))
    lines = [{"id": name, "audio": name} for name in ("gsm.wav", "browser.webm", "a\0b", "plain.wav")]
    (tmp_path / "batch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert covo_run("--mode", "a2t", "--batch", "batch.jsonl")[0] == 1
    found = [json.loads(line) for line in (tmp_path / "replies" / "results.jsonl").read_text().splitlines()]
    assert {line["id"]: "error" in line for line in found} == {
        "gsm.wav": False, "browser.webm": True, "a\0b": True, "plain.wav": False,
    }  # fmt: skip


# Messages


def test_one_message_a_path_and_the_next_is_answered(covo_run, plain):
    stdin = "\n".join(("~nobody-of-this-name/x.wav", "a\0b.wav", "half \ud800", "plain.wav"))
    code, out, err = covo_run("--mode", "a2t", stdin=stdin)
    assert code == 1 and len(err.splitlines()) == 3 and "tokens at" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--temperature", "nan"), ("--temperature", "inf"), ("--temperature", "1e-300"), ("--top-p", "nan"),
        ("--repetition-penalty", "nan"), ("--repetition-penalty", "1e-300"), ("--window-penalty", "inf"),
        ("--seed", "9" * 40), ("--seed", "-" + "9" * 40), ("--threads", "100000"), ("--threads", "0"),
        ("--flow-steps", "999999999"), ("--window", "9" * 30), ("--system", LATIN), ("--max-new-tokens", "nan"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_usage_errors_before_loading(covo_run, monkeypatch, arguments):
    monkeypatch.setattr(cli, "_load", lambda *arguments: pytest.fail("loaded"))
    code, _, err = covo_run(*arguments)
    assert code == 2 and arguments[0] in err


@pytest.mark.parametrize(
    "arguments", [("--top-k", "9" * 40), ("--max-new-tokens", "9" * 40), ("--temperature", "0.001")]
)
def test_huge_values_that_mean_something_work(covo_run, plain, arguments):
    arguments = (*arguments, "--max-context", "600", "--mode", "a2t", "--system", "short")
    assert covo_run(*arguments, plain)[0] == 0


def test_text_files_with_a_byte_order_mark(covo_run, plain, tmp_path):
    for bom in ("", "\ufeff"):
        (tmp_path / "system").write_text(f"{bom}Answer.", "utf-8")
        (tmp_path / "batch.jsonl").write_text(f'{bom}{{"id": "a{len(bom)}", "audio": "plain.wav"}}\n', "utf-8")
        assert covo_run("--mode", "a2t", "--system", "@system", "--batch", "batch.jsonl")[0] == 0
    first, second = ((tmp_path / "replies" / "results.jsonl").read_text("utf-8")).splitlines()
    assert json.loads(first)["rounds"][0]["prompt_tokens"] == json.loads(second)["rounds"][0]["prompt_tokens"]


def test_a_batch_is_not_mixed_with_other_settings_or_questions(covo_run, plain, tmp_path):
    shutil.copy(plain, tmp_path / "other.wav")
    batch = tmp_path / "batch.jsonl"
    batch.write_text('{"id": "a", "audio": "plain.wav"}\n')
    assert covo_run("--mode", "a2t", "--batch", batch)[0] == 0
    before = contents(tmp_path / "replies")
    for changed, says in (
        (("--temperature", "0.7"), "temperature: 0.0 there, 0.7 now"),
        (("--seed", "4"), "seed: 0 there, 4 now"),
        (("--system", "other"), "system: 'short' there, 'other' now"),
        (("--dtype", "bfloat16"), "dtype: 'float32' there, 'bfloat16' now"),
    ):
        code, _, err = covo_run("--mode", "a2t", *changed, "--batch", batch)
        assert code == 1 and says in err and "choose another --output" in err
    batch.write_text('{"id": "a", "audio": "other.wav"}\n')
    code, _, err = covo_run("--mode", "a2t", "--batch", batch)
    assert code == 1 and "other questions" in err and "'a'" in err
    assert contents(tmp_path / "replies") == before
    batch.write_text('{"id": "a", "audio": ["plain.wav", "other.wav"]}\n')
    code, _, err = covo_run("--mode", "a2t", "--batch", batch)
    assert code == 1 and "other questions" in err and "'a'" in err
    assert contents(tmp_path / "replies") == before
    batch.write_text('{"id": "a", "audio": "plain.wav"}\n{"id": "b", "audio": "other.wav"}\n')
    assert covo_run("--mode", "a2t", "--batch", batch)[0] == 0


def test_a_batch_comes_through_a_pipe(covo_run, plain, tmp_path):
    reader, writer = os.pipe()
    os.write(writer, b'{"id": "a", "audio": "plain.wav"}\n')  # of the working folder: a pipe is in none
    os.close(writer)
    code, out, _ = covo_run("--mode", "a2t", "--batch", f"/dev/fd/{reader}")
    os.close(reader)
    assert code == 0 and "\n1 dialogues: " in out


def processes(command, terminal_input, tmp_path, **streams):
    """Return (exit code, what the terminal showed) of a process whose stdin, and what is not named, is a terminal."""
    primary, secondary = pty.openpty()
    named = {"stdin": secondary, "stdout": secondary, "stderr": secondary, **streams}
    process = subprocess.Popen(command, cwd=tmp_path, **named)
    os.close(secondary)
    os.write(primary, terminal_input)
    out, err = process.communicate(timeout=120)
    shown = b""
    try:
        while piece := os.read(primary, 65536):
            shown += piece
    except OSError:  # the end of a terminal whose other side is closed
        pass
    os.close(primary)
    return process.returncode, shown.decode("utf-8", "replace"), out, err


def test_json_on_stdout_stands_alone_at_a_terminal_and_exit_ends(ckpt, plain, tmp_path):
    command = [COVO_RUN, "--ckpt", ckpt, "--device", "cpu", "--mode", "a2t", "--max-new-tokens", "4", "--json", "-"]
    code, shown, out, _ = processes(command, b"plain.wav\nexit\n", tmp_path, stdout=subprocess.PIPE)
    assert code == 0 and len(json.loads(out)["rounds"]) == 1
    assert shown.count("audio file> ") == 2 and "Traceback" not in shown


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full"])
def test_closed_and_full_streams(ckpt, plain, tmp_path, closed):
    shell = f'exec "$@" {closed}'
    command = ["bash", "-c", shell, "bash", COVO_RUN, "--ckpt", ckpt, "--device", "cpu", "--mode", "a2t"]
    command += ["--max-new-tokens", "4", "--json", "r.json", "plain.wav"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    assert done.returncode == (1 if "full" in closed else 0)
    if "full" not in closed:
        assert len(json.loads((tmp_path / "r.json").read_text())["rounds"]) == 1


def test_a_terminal_of_another_encoding(ckpt, plain, tmp_path):
    shutil.copy(plain, tmp_path / "问题.wav")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    command = [COVO_RUN, "--ckpt", ckpt, "--device", "cpu", "--mode", "a2t", "--max-new-tokens", "4", "问题.wav"]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 0 and b"> ??.wav" in done.stdout and b"Traceback" not in done.stderr
    done = subprocess.run([*command, "--json", "-"], capture_output=True, env=environment, cwd=tmp_path, timeout=120)
    assert json.loads(done.stdout)["rounds"][0]["input"] == "问题.wav"
