"""covo-check: what this machine and a checkpoint are held to."""

import sys

from covo_npu.runtime.cli import console
from covo_npu.tools.group import Group

CHECKS = {
    "doctor": "What will run on this machine and what will not, with the fix.",
    "ops": "Every stage on the device: nothing is refused, nothing falls back to the host.",
    "kernels": "Every kernel of the device against plain float32, at the sizes of the real model.",
    "ckpt": "A converted checkpoint: checksums, layout and, with --src, every tensor against its source.",
    "repeat": "The same question twice: equal tokens, equal text, equal waveform.",
    "stages": "What every stage gives on one device, saved and compared on another.",
    "launches": "What an NPU's profiler sees: kernels, those on the AICPU, the ten most expensive.",
    "graphs": "A reply of more rows than one graph takes, with captured graphs and without: equal tokens and speech.",
    "transfer": "Page-locked copies to the device, and what part of that a load reaches.",
    "speech": "What bfloat16 and fewer evaluations change in the speech, beside what threads change.",
    "all": "All of these as one report, to attach to a bug report.",
}

command = Group(
    "covo_npu.tools.check",
    CHECKS,
    "Check on this machine what the project promises. Exit code 0 only if all of it holds.",
)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of covo-check."""
    return console.run(command, "covo-check", argv)


if __name__ == "__main__":
    sys.exit(main())
