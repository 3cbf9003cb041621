"""covo-bench: one sub-command a file, imported when it is asked for."""

import sys
from importlib import import_module

import click

from covo_npu.runtime import console

# name: (module, what `covo-bench --help` says)
COMMANDS = {
    "load": ("bench_load", "Time from the start of a process to ready and to the first token, against the stock path."),
    "decode": ("bench_decode", "Prefill and decoding against transformers' generate, by context and batch."),
    "token2wav": (
        "bench_token2wav",
        "Codes to a waveform against a straightforward implementation, by stage and length.",
    ),
    "launches": ("bench_launches", "Operators launched and waits for an NPU, by stage, against the stock path."),
    "convert": ("bench_convert", "Conversion against `cp -r` of the same source on the same disk."),
}


class Benches(click.Group):
    """The commands of COMMANDS. A bench's module has a click command of the bench's name."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"covo_npu.tools.{COMMANDS[name][0]}"), name)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Benches"):
            formatter.write_dl([(name, says) for name, (_, says) in COMMANDS.items()])


@click.command(cls=Benches)
def bench() -> None:
    """Measure this project against the stock path, and against what the machine can do."""


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of covo-bench."""
    return console.run(bench, "covo-bench", argv)


if __name__ == "__main__":
    sys.exit(main())
