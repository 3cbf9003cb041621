"""The sampling defaults of a checkpoint, and that they are what a dialogue uses."""

import json

import pytest

from covo_npu.runtime.config import ConfigError
from covo_npu.runtime.generation import read_generation
from covo_npu.runtime.sampling import Sampling


def generation(tmp_path, text):
    path = tmp_path / "generation_config.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return read_generation(path)


def test_absent_keys_are_ours_and_foreign_keys_are_ignored(tmp_path):
    found = generation(tmp_path, {"transformers_version": "5", "top_k": 7, "max_new_tokens": 9})
    assert (found.sampling, found.max_new_tokens) == (Sampling(top_k=7), 9)
    assert generation(tmp_path, {}).sampling == Sampling()


def test_without_sampling_the_temperature_is_0(tmp_path):
    assert generation(tmp_path, {"do_sample": False, "temperature": 0.7}).sampling.temperature == 0
    assert generation(tmp_path, {"do_sample": True, "temperature": 0.7}).sampling.temperature == 0.7
    assert generation(tmp_path, {"temperature": 0.7}).sampling.temperature == 0.7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"top_p": 2}, "top_p must be in"),
        ({"temperature": "warm"}, "generation_config.json"),
        ({"max_new_tokens": "many"}, "generation_config.json"),
        ("[1]", "expected a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        generation(tmp_path, text)
