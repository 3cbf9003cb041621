"""The sampling defaults of a checkpoint: its generation_config.json."""

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

from covo_npu.runtime.config import ConfigError
from covo_npu.runtime.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Generation:
    """How a checkpoint answers unless told otherwise."""

    sampling: Sampling
    max_new_tokens: int


def read_generation(path: str | os.PathLike[str]) -> Generation:
    """Return the defaults of a generation_config.json, ours where a key is absent. Keys of other programs are ignored.

    `"do_sample": false` is temperature 0. Raises ConfigError if a value is impossible.
    """
    try:
        values = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); convert the checkpoint again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    found = {field.name: values[field.name] for field in fields(Sampling) if field.name in values}
    if not values.get("do_sample", True):
        found["temperature"] = 0.0
    try:
        return Generation(Sampling(**found), int(values.get("max_new_tokens", 2048)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
