"""All command lines agree: the table "Command lines" of CONTRIBUTING, held for every command of setup.py."""

import re
from importlib import import_module
from pathlib import Path

import click
import pytest

from covo_npu.runtime.cli import console
from covo_npu.runtime.options import LoadOptions

ROOT = Path(__file__).resolve().parents[1]
MAINS = dict(re.findall(r'"(covo-[a-z]+)=(covo_npu[\w.]+):main"', (ROOT / "setup.py").read_text("utf-8")))


def commands():
    """Return the name and click command of every console script and of what its group holds."""
    for name, module in MAINS.items():
        command = import_module(module).command
        yield name, command
        if isinstance(command, click.Group):
            context = click.Context(command, info_name=name)
            for sub in command.list_commands(context):
                yield f"{name} {sub}", command.get_command(context, sub)


ALL = dict(commands())
LEAVES = {name: command for name, command in ALL.items() if not isinstance(command, click.Group)}


def spelled(command):
    return {spelling: param for param in command.params for spelling in param.opts}


def test_every_command_of_setup_is_looked_at():
    assert len(MAINS) == (ROOT / "setup.py").read_text("utf-8").count(":main") >= 5
    assert len(LEAVES) > len(MAINS)


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_its_version_and_help(name, capsys):
    group, *sub = name.split()
    for option, says in (("--version", "0."), ("--help", f"Usage: {name} ")):
        assert console.run(ALL[group], group, [*sub, option]) == 0
        assert says in capsys.readouterr().out


@pytest.mark.parametrize("name", LEAVES)
def test_options_of_one_name_are_one_option(name):
    has = spelled(LEAVES[name])
    assert has["--json"].metavar == "FILE|-"
    assert has["-v"] is has["--verbose"] and has["-v"].is_flag
    assert not {param.name for param in LEAVES[name].params if isinstance(param, click.Argument)} & {"ckpt", "src"}
    for option, default in (("--device", LoadOptions().device), ("--dtype", None), ("--backend", None)):
        assert "--ckpt" not in has or option not in has or has[option].default == default, option
    for param in LEAVES[name].params:
        if isinstance(param.type, click.Path):
            assert not param.type.exists, f"{param.name}: who reads it says that it is missing, with exit code 1"


@pytest.mark.parametrize(
    "name", [name for name, command in LEAVES.items() if {"--ckpt", "--src"} & set(spelled(command))]
)
def test_a_missing_path_is_a_fault_of_one_message(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = spelled(LEAVES[name])
    missing = [text for option in ("--src", "--ckpt") if option in options for text in (option, str(tmp_path / "none"))]
    target = ["--dst", "new"] if "--dst" in options else []
    group, *sub = name.split()
    code = console.run(ALL[group], group, [*sub, *missing, *target])
    out, err = capsys.readouterr()
    assert code == 1
    assert "none" in out + err and "Traceback" not in out + err
    assert not (tmp_path / "new").exists()
