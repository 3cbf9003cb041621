"""Serves as a rank with something else than usual. usage: python odd_rank.py WHAT CHECKPOINT OPTIONS

taped: captures steps on a tape, as a graph does on a device. unmasked: would, but finds attention under a mask to be
another. hangs: stops working at its fifth step, without an end.
fails: as if it ran out of memory at its fifth step. late: cannot load its weights.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from runtime.tape import Tape, optional_tape

from covo_npu.runtime import decode, ground, rank
from covo_npu.runtime.decode import Decoder

FIFTH = 5


def instead(what: Callable[[], object]) -> Callable[..., Any]:
    steps, usual = [0], Decoder.step

    def step(self: Decoder, num_slots: int) -> Any:
        steps[0] += 1
        if steps[0] == FIFTH:
            what()
        return usual(self, num_slots)

    return step


def fail() -> None:
    raise RuntimeError("out of memory, says the test")


def main() -> None:
    what = sys.argv.pop(1)
    if what == "taped":
        ground.device_capture = lambda choice, device: Tape()
    elif what == "unmasked":
        ground.device_capture = lambda choice, device: optional_tape()
        decode.masked_attention_error = lambda *arguments: 1.0
    elif what == "hangs":
        Decoder.step = instead(lambda: time.sleep(1000))
    elif what == "fails":
        Decoder.step = instead(fail)
    elif what == "late":
        rank.fill = lambda *arguments: fail()
    rank.main()


if __name__ == "__main__":
    main()
