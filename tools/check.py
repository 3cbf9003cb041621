"""covo-check: one sub-command a file, imported when it is asked for."""

import sys
from importlib import import_module

import click

from covo_npu.runtime import console

# name: what `covo-check --help` says. The module check_<name> has a click command of the name.
CHECKS = {
    "doctor": "What will run on this machine and what will not, with the fix.",
    "mel": "The mel features of a device against those of the CPU.",
    "repeat": "The same question twice: equal tokens, equal text, equal waveform.",
    "stages": "What every stage gives on one device, saved and compared on another.",
    "ops": "Every operator of every stage: what an Ascend NPU does with it.",
    "speech": "What bfloat16 and fewer evaluations change in the speech, beside what threads change.",
    "ckpt": "A converted checkpoint: checksums, layout and, with --src, every tensor against its source.",
    "all": "All of these as one report, to attach to a bug report.",
}


class Checks(click.Group):
    """The commands of CHECKS."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(CHECKS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in CHECKS:
            return None
        command: click.Command = import_module(f"covo_npu.tools.check_{name}").command
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Checks"):
            formatter.write_dl(list(CHECKS.items()))


@click.command(cls=Checks, context_settings={"max_content_width": 120})
@click.version_option(package_name="covo-npu")
def command() -> None:
    """Check on this machine what the project promises. Exit code 0 only if all of it holds."""


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of covo-check."""
    return console.run(command, "covo-check", argv)


if __name__ == "__main__":
    sys.exit(main())
