"""A tiny source with as many kv heads as the published model, so that four ranks can share it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from covo_npu.tools.synth.checkpoint import write_source
from covo_npu.tools.synth.config import PRESETS

CONFIG = replace(PRESETS["tiny"], llm=replace(PRESETS["tiny"].llm, num_heads=28, num_kv_heads=4, head_dim=8))


def write(folder: Path) -> Path:
    """Return the folder after writing the source there."""
    folder.mkdir()
    write_source(CONFIG, 0, folder, lambda count: None)
    return folder
