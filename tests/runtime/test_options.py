"""The option groups: what a command gets, where the defaults come from, how faults are told."""

import json
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import click
import pytest

from covo_npu.runtime.cli import console, options
from covo_npu.runtime.flow import SOLVERS, Flow
from covo_npu.runtime.options import Ask, LoadOptions, Sampling, SpeechBlocks

got = {}


@click.command()
@options.ckpt()
@options.loading()
@options.asking()
@options.speaking()
@options.cutting()
@options.common
def everything(**values):
    got.clear()
    got.update(values)


@click.command()
@options.loading("device", "dtype")
@options.asking("seed", "top_k")
@options.common
def a_few(options: LoadOptions, ask: Ask, json_file):
    console.show("for people", {"device": options.device, "seed": ask.seed, "top_k": ask.sampling.top_k}, json_file)


def run(command, *arguments):
    return console.run(command, "covo-test", list(arguments))


def test_without_options_the_records_are_the_defaults():
    assert run(everything, "--ckpt", "x") == 0
    assert got == {
        "ckpt": Path("x"),
        "options": LoadOptions(),
        "ask": Ask(),
        "speech": options.SpeechOptions(),
        "blocks": SpeechBlocks(),
        "json_file": None,
    }


def test_every_field_has_an_option_of_its_name():
    assert {field.name for field in fields(LoadOptions)} - {"speech"} == set(options.LOADING) - {"threads"}
    asked = {field.name for field in fields(Ask)} - {"sampling", "voice", "flow", "blocks"}
    assert asked | {field.name for field in fields(Sampling)} == set(options.ASKING)
    assert {field.name for field in fields(options.SpeechOptions)} == set(options.SPEAKING)
    assert {field.name for field in fields(SpeechBlocks)} == set(options.CUTTING)


def test_every_option_reaches_its_field():
    loading = "--device cpu --dtype float16 --backend reference --load eager --no-check --max-context 9 --graph off"
    loading += " --products pytorch"
    asking = "--mode a2t --max-new-tokens 3 --temperature 0.5 --top-p 0.8 --top-k 7 --repetition-penalty 1.2"
    asking += " --window-penalty 1.3 --window 4 --seed 5 --system short"
    rest = "--token2wav-dtype float32 --vocoder-dtype bfloat16 --nz --voice v --flow-steps 4 --flow-solver euler"
    rest += " --ckpt x --sizes 9,8 --look-ahead 2 --past-s all --prompt-s 1.5"
    assert run(everything, *loading.split(), *asking.split(), *rest.split()) == 0
    assert got["options"] == LoadOptions(
        "cpu", "float16", "reference", "eager", check=False, max_context=9, graph="off", token2wav_dtype="float32",
        vocoder_dtype="bfloat16", nz=True, products="pytorch",
    )  # fmt: skip
    sampling = Sampling(0.5, 7, 0.8, 1.2, 1.3, 4)
    assert got["ask"] == Ask("a2t", sampling, max_new_tokens=3, seed=5, system="short")
    assert got["speech"] == options.SpeechOptions(Path("v"), 4, "euler")
    assert got["blocks"] == SpeechBlocks((9, 8), look_ahead=2, past_s=None, prompt_s=1.5)


def test_the_flow_of_speech_is_the_checkpoints_where_nothing_is_said():
    usual = Flow(9)
    assert options.SpeechOptions().flow(usual) == usual
    assert options.SpeechOptions(flow_steps=6).flow(usual) == Flow(6)
    assert options.SpeechOptions(flow_solver="euler").flow(usual) == Flow(9, "euler")
    assert options.SpeechOptions(fixed_context=True).flow(usual) == Flow(9, fixed_context=True)
    assert set(options.SOLVERS) == set(SOLVERS) and options.SOLVERS[0] == usual.solver


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--temperature -1", "--temperature must be"),
        ("--temperature nan --top-p 0", "--top-p must be"),
        ("--max-new-tokens 0", "--max-new-tokens must be at least 1, found 0"),
        ("--max-context 0", "--max-context must be at least 1"),
        ("--mode t2a", "--mode"),
        ("--flow-steps 0", "--flow-steps"),
        ("--unknown", "--unknown"),
    ],
)
def test_a_value_out_of_its_range_is_a_usage_error_that_names_the_option(arguments, message, capsys):
    assert run(everything, "--ckpt", "x", *arguments.split()) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_command_may_have_some_of_the_options(capsys):
    assert run(a_few, "--seed", "3", "--json", "-") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {
        "command": "covo-test", "device": "auto", "seed": 3, "top_k": Sampling().top_k,
    }  # fmt: skip
    assert said.err == "for people\n"
    assert run(a_few, "--graph", "on") == 2


def test_json_goes_to_a_file_and_text_to_stdout(tmp_path, capsys):
    assert run(a_few, "--json", str(tmp_path / "new" / "a.json")) == 0
    assert json.loads((tmp_path / "new" / "a.json").read_text())["device"] == "auto"
    assert capsys.readouterr().out == "for people\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_json_that_cannot_be_written_is_told_before_any_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    got.clear()
    assert run(everything, "--ckpt", "x", "--json", str(tmp_path / "file" / "a.json")) == 1
    assert "cannot be written" in capsys.readouterr().err and not got


def test_a_system_prompt_that_is_not_there_is_a_fault_of_one_line(tmp_path, capsys):
    (tmp_path / "text").write_text("be short", "utf-8")
    assert run(everything, "--ckpt", "x", "--system", f"@{tmp_path / 'text'}") == 0 and got["ask"].system == "be short"
    assert run(everything, "--ckpt", "x", "--system", "@missing.txt") == 1
    assert capsys.readouterr().err == "covo-test: missing.txt: No such file or directory\n"


def test_help_names_every_default_and_needs_no_torch():
    program = (
        "import click, sys\nfrom covo_npu.runtime.cli import console, options\n"
        "@click.command()\n@options.loading()\n@options.asking()\n@options.speaking()\ndef command(**values): pass\n"
        "console.run(command, 'x', ['--help'])\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    for default in (Ask().max_new_tokens, LoadOptions().max_context, Sampling().top_p, Sampling().window_penalty):
        assert f"[default: {default}" in shown


def test_threads_are_set():
    program = (
        "import click\nfrom covo_npu.runtime.cli import console, options\n"
        "@click.command()\n@options.loading('threads')\ndef command(options):\n"
        "    import torch\n    print(torch.get_num_threads())\n"
        "console.run(command, 'x', ['--threads', '1'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1\n", done.stderr


def test_the_age_of_the_process_is_wall_time_also_where_the_kernel_does_not_say(monkeypatch):
    known = console.process_age_s()
    assert known > time.monotonic() - console.IMPORTED_S  # Python itself starts before the first import

    def absent(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", absent)
    before = console.process_age_s()
    time.sleep(0.2)  # no processor time
    assert 0.2 <= console.process_age_s() - before < 5
    assert before < known + 1
