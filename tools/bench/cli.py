"""covo-bench: this project's times and memory, and the stock path's."""

import sys

from covo_npu.runtime.cli import console
from covo_npu.tools.group import Group

BENCHES = {
    "load": "From the start of a process to ready and to the first token, against the stock path.",
    "decode": "Prefill and decoding against transformers' generate, by context and batch.",
    "token2wav": "Codes to a waveform against a straightforward implementation, by stage and length.",
    "serve": "What many who talk to covo-serve at the same time hear, against covo-run --batch.",
}

command = Group(
    "covo_npu.tools.bench",
    BENCHES,
    "Measure this project against the stock path, and against what the machine can do. A target that is missed is "
    "said; the exit code is 0.",
)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of covo-bench."""
    return console.run(command, "covo-bench", argv)


if __name__ == "__main__":
    sys.exit(main())
