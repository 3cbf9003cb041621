"""Sizes that no network has are refused by name, before anything is built."""

import dataclasses
import shutil
import time

import pytest
from made_checkpoint import rewrite_manifest

from covo_npu.runtime.checkpoint.config import ConfigError, ModelConfig, from_dict, to_dict
from covo_npu.runtime.checkpoint.format import read_manifest
from covo_npu.runtime.checkpoint.limits import require_plausible
from covo_npu.tools.synth.config import PRESETS


@pytest.fixture(scope="module")
def config(convert_tiny) -> ModelConfig:
    return read_manifest(convert_tiny("float32")).config


def changed(config: ModelConfig, path: str, value: object) -> ModelConfig:
    data = to_dict(config)
    node, (*parents, key) = data, path.split(".")
    for parent in parents:
        node = node[parent]
    node[key] = value
    return from_dict(ModelConfig, data)


ABSURD = {
    "llm.num_layers": 10**9,
    "llm.hidden_size": 2**40,
    "llm.vocab_size": 2**62,
    "llm.head_dim": 0,
    "llm.num_heads": 15,
    "llm.num_kv_heads": 3,
    "llm.rms_norm_eps": float("nan"),
    "llm.rope_theta": -1.0,
    "encoder.num_layers": 2**31,
    "encoder.num_heads": 7,
    "adapter.num_layers": 10**6,
    "adapter.input_size": 63,
    "adapter.output_size": 1,
    "audio_token_index": 600,
    "token2wav.dit.num_heads": 128,
    "token2wav.dit.conv_groups": 7,
    "token2wav.dit.time_dim": 255,
    "token2wav.dit.conv_kernel_size": 30,
    "token2wav.dit.upsample_factor": 3,
    "token2wav.dit.latent_dim": 9,
    "token2wav.flow.time_points": 1,
    "token2wav.flow.cfg_alpha": float("inf"),
    "token2wav.vocoder.upsample_rates": [5] * 17,
    "token2wav.vocoder.upsample_kernel_sizes": [],
    "token2wav.vocoder.initial_channels": 100,
    "token2wav.vocoder.resblock_kernel_sizes": [3, 7],
    "token2wav.vocoder.resblock_dilations": [[1, 3], [1, 3], [1, 3]],
    "token2wav.voice.num_frames": 2**20,
}


@pytest.mark.parametrize("path", ABSURD)
def test_each_absurd_size_is_refused_at_once(config, path):
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="here: no network has these sizes"):
        require_plausible(changed(config, path, ABSURD[path]), "here")
    assert time.monotonic() - begin < 1


def test_a_whole_number_that_is_no_float_is_refused(config):
    with pytest.raises(ConfigError, match=r"config\.llm\.rope_theta: expected float, found 10000"):
        changed(config, "llm.rope_theta", 10**309)


def test_sizes_that_are_used_are_believed(config):
    require_plausible(config, "here")
    require_plausible(dataclasses.replace(config, token2wav=None), "here")
    require_plausible(changed(config, "token2wav.voice", {"num_codes": 0, "num_frames": 0}), "here")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_believed(name):
    require_plausible(PRESETS[name], "here")


def test_a_manifest_with_absurd_sizes_is_refused(convert_tiny, tmp_path):
    folder = shutil.copytree(convert_tiny("float32"), tmp_path / "ckpt")
    rewrite_manifest(folder, lambda data: data["config"]["llm"].update(num_layers=10**9))
    with pytest.raises(
        ConfigError, match=r"manifest\.json: config: .*llm\.num_layers is 1000000000, expected 1 to 1024"
    ):
        read_manifest(folder)
