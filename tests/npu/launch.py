"""Runs a console script on the emulated NPU, in this process. usage: python launch.py PROGRAM [ARGUMENTS]"""

import contextlib
import sys
from importlib.metadata import entry_points

with contextlib.redirect_stdout(sys.stderr):  # torch_npu prints its warnings where results belong
    from emulation import device


def main() -> int:
    """Return the exit code of the program."""
    program = sys.argv[1]
    scripts = {script.name: script for script in entry_points(group="console_scripts")}
    if program not in scripts:
        sys.exit(f"launch: no program {program!r}; there are {', '.join(sorted(scripts))}")
    libraries = device.install()  # kept: the overrides last as long as the libraries
    sys.argv = sys.argv[1:]
    code = scripts[program].load()()
    del libraries
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
