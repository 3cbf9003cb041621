"""Upstream's configuration in the spellings that exist; settings that contradict each other or cannot be done."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from covo_npu.convert.config import model_config
from covo_npu.convert.errors import ConvertError

TINY = Path(__file__).parents[1] / "data" / "covo-tiny" / "config.json"


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Callable[[dict], object]], Path]:
    """A function: change -> the tiny config.json after it."""

    def edit(change: Callable[[dict], object]) -> Path:
        config = json.loads(TINY.read_text())
        change(config)
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path / "config.json"

    return edit


def llm(**fields: object) -> Callable[[dict], object]:
    return lambda config: config["llm_config"].update(fields)


SAME = {
    "theta at the top level": lambda c: c["llm_config"].update(
        rope_theta=c["llm_config"].pop("rope_parameters")["rope_theta"]
    ),
    "theta twice, equal": llm(rope_theta=1000000),
    "no scaling": llm(rope_scaling=None),
    "scaling of the default type": llm(rope_scaling={"rope_type": "default"}),
    "the older word for it": llm(rope_scaling={"type": "default", "rope_theta": 1e6, "factor": 1.0}),
    "the whole head": llm(partial_rotary_factor=1.0),
    "null where a default is meant": llm(rope_scaling=None, use_sliding_window=None, tie_word_embeddings=None),
    "no quantisation": lambda c: c.update(quantization_config=None),
}


@pytest.mark.parametrize("spelling", SAME)
def test_spellings_of_the_same_settings(spelling: str, edited):
    assert json.loads(TINY.read_text())["llm_config"]["rope_parameters"]["rope_theta"] == 1e6
    assert model_config(edited(SAME[spelling])) == model_config(TINY)


REFUSED = {
    "theta twice, different": (
        llm(rope_theta=10000.0),
        "these disagree: llm_config.rope_theta = 10000.0, llm_config.rope_parameters.rope_theta = 1000000.0",
    ),
    "theta in the scaling": (llm(rope_scaling={"type": "default", "rope_theta": 5e5}), "these disagree: "),
    "yarn": (
        llm(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "llm_config.rope_scaling.rope_type: expected 'default', found 'yarn': not implemented",
    ),
    "linear, the older word": (llm(rope_scaling={"type": "linear", "factor": 2.0}), "llm_config.rope_scaling.type"),
    "a factor without a type": (llm(rope_scaling={"factor": 2.0}), "rope_scaling.factor: expected 1.0, found 2.0"),
    "default and dynamic": (
        lambda c: c["llm_config"]["rope_parameters"].update(rope_type="default", type="dynamic"),
        "llm_config.rope_parameters.type: expected 'default', found 'dynamic'",
    ),
    "three sections": (
        llm(rope_scaling={"type": "default", "mrope_section": [16, 24, 24]}),
        "llm_config.rope_scaling.mrope_section: expected None, found [16, 24, 24]",
    ),
    "half a head": (llm(partial_rotary_factor=0.5), "llm_config.partial_rotary_factor: expected 1.0, found 0.5"),
    "segments of 20 s": (
        lambda c: c["encoder_config"].update(max_source_positions=1000),
        "encoder_config.max_source_positions: expected 1500, found 1000: not implemented",
    ),
    "no float": (llm(rms_norm_eps=10**309), "llm_config.rms_norm_eps: expected a number, found 10000"),
    "a word": (llm(rope_scaling="yarn"), "llm_config.rope_scaling: expected an object, found 'yarn'"),
    "one a kind of layer": (
        llm(rope_parameters={"full_attention": {"rope_theta": 1e6}}),
        "llm_config.rope_theta or llm_config.rope_parameters.rope_theta or llm_config.rope_scaling.rope_theta: missing",
    ),
    "fp8": (
        lambda c: c.update(quantization_config={"quant_method": "fp8"}),
        "quantization_config: the weights were quantised (fp8): use those before that",
    ),
    "4 bits": (
        llm(quantization_config={"load_in_4bit": True}),
        "llm_config.quantization_config: the weights were quantised (by an unknown method)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_disagree_or_cannot_be_done_are_refused(case: str, edited):
    change, expected = REFUSED[case]
    with pytest.raises(ConvertError) as caught:
        model_config(edited(change))
    assert expected in str(caught.value), caught.value


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_in_another_encoding_of_unicode_is_read(encoding: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(TINY.read_text(), encoding=encoding)
    assert model_config(tmp_path / "config.json") == model_config(TINY)
