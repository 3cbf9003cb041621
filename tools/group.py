"""The click group of covo-bench and covo-check: one sub-command a file, imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import click


class Group(click.Group):
    """The commands of a package. The module of a command's name has it as `command`."""

    def __init__(self, package: str, says: Mapping[str, str], help: str) -> None:
        """says: name -> what the help of the group says of the command."""
        super().__init__(help=help, context_settings={"max_content_width": 120})
        self._package, self._says = package, says
        click.version_option(package_name="covo-npu", message="%(prog)s %(version)s")(self)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self._says)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self._says:
            return None
        command: click.Command = import_module(f"{self._package}.{name}").command
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self._says.items()))
