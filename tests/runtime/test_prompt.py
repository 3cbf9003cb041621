"""Prompts against the ids that upstream made."""

import json
from pathlib import Path

import numpy as np
import pytest

from covo_npu.runtime.prompt import DEFAULT_SYSTEM_PROMPT, PromptError, first_round, next_round
from covo_npu.runtime.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
NAMES = ("im_start", "im_end", "endoftext", "begofcAUDIO", "cAUDIO", "endofcAUDIO")


@pytest.fixture(scope="module")
def tokenizer():
    path = DATA / "covo-tiny" / "tokenizer.json"
    ids = {row["content"]: row["id"] for row in json.loads(path.read_text("utf-8"))["added_tokens"]}
    return Tokenizer.from_file(path, {name: ids[f"<|{name}|>"] for name in NAMES})


@pytest.mark.parametrize("name", ["question_en_48k_24bit", "question_zh_44k_stereo", "long_16k_over30s"])
def test_first_round_is_upstreams(tokenizer, name):
    golden = np.load(DATA / "golden" / f"frontend_{name}.npz")
    ids = first_round(tokenizer, DEFAULT_SYSTEM_PROMPT, int(golden["num_placeholders"]))
    assert ids == golden["input_ids"].tolist()


@pytest.mark.parametrize("name", ["two_rounds_a2ta", "three_rounds_a2t"])
def test_later_rounds_are_upstreams(tokenizer, name):
    golden = np.load(DATA / "golden" / f"dialogue_fp32_{name}.npz")
    later = [key for key in golden if key.endswith("_input_ids") and not key.startswith("r0")]
    assert later
    for key in later:
        expected = golden[key].tolist()
        assert next_round(tokenizer, expected.count(tokenizer.special["cAUDIO"])) == expected


def test_any_system_text_gives_the_ids_of_the_whole_text(tokenizer):
    text = " Be brief.\n\n<tool_call>\n"
    whole = (
        f"<|im_start|>system\n{text}<|im_end|>\n<|im_start|>user\n<|begofcAUDIO|><|cAUDIO|><|cAUDIO|><|endofcAUDIO|>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert first_round(tokenizer, text, 2) == tokenizer.encode(whole)


def test_a_system_text_cannot_bring_its_own_audio(tokenizer):
    with pytest.raises(PromptError, match=r"holds <\|cAUDIO\|>"):
        first_round(tokenizer, "listen: <|cAUDIO|>", 2)
