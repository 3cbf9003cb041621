"""Tokenizers in all the forms that sources have them in, against the tokenizers library and the given one."""

import codecs
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from source_edits import edit_json, truncate

from covo_npu.runtime.tokenizer import Tokenizer


def test_a_tokenizer_is_built_from_vocabulary_and_merges(source: Path, convert, tmp_path: Path, tiny_source: Path):
    from tokenizers import Tokenizer

    (source / "tokenizer.json").unlink()
    assert convert(source).code == 0
    built, given = (Tokenizer.from_file(str(p / "tokenizer.json")) for p in (tmp_path / "target", tiny_source))
    for text in (
        "<|im_start|>system\n你好, the answer is 42.<|im_end|>",
        "naïve  spaces\n\n\tand tabs",
        "<|cAUDIO|>" * 3,
    ):
        assert built.encode(text).ids == given.encode(text).ids, text
    assert built.get_vocab_size() == 545


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_damage_of_vocabulary_and_merges_is_told(name: str, source: Path, convert):
    (source / "tokenizer.json").unlink()
    truncate(source / name, 800)
    outcome = convert(source)
    assert outcome.code == 1 and "no tokenizer can be built from vocab.json, merges.txt (" in outcome.err


def test_building_a_tokenizer_without_transformers_says_how_to_get_it(source: Path, convert, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert convert(source).code == 0, "not needed where there is a tokenizer.json"
    (source / "tokenizer.json").unlink()
    outcome = convert(source, "--force")
    assert outcome.code == 1 and "pip install 'covo-npu[convert]'" in outcome.err, outcome.err


@pytest.mark.parametrize("listed_in", ["tokenizer_config.json", "added_tokens.json"])
def test_added_tokens_listed_elsewhere_end_up_in_tokenizer_json(
    listed_in: str, source: Path, convert, tmp_path: Path, tiny_source: Path
):
    from tokenizers import Tokenizer

    if listed_in == "added_tokens.json":
        decoder = json.loads((source / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        (source / listed_in).write_text(json.dumps({token["content"]: int(i) for i, token in decoder.items()}))
        (source / "tokenizer_config.json").unlink()
    edit_json(source / "tokenizer.json", lambda t: t.update(added_tokens=t["added_tokens"][:3]))
    assert convert(source).code == 0
    found, given = (Tokenizer.from_file(str(p / "tokenizer.json")) for p in (tmp_path / "target", tiny_source))
    text = "<|im_start|>user\n<|begofcAUDIO|><|cAUDIO|><|endofcAUDIO|><tool_call>"
    assert found.encode(text).ids == given.encode(text).ids


def test_a_complete_tokenizer_json_is_copied_as_it_is(convert_tiny: Callable[[str], Path], tiny_source: Path):
    copied = (convert_tiny("bfloat16") / "tokenizer.json").read_bytes()
    assert copied == (tiny_source / "tokenizer.json").read_bytes()


TEXT = "<|im_start|>system\n" + "a long prompt of many words, 你好 " * 60 + "<|im_end|>"
TRUNCATION = {"direction": "Right", "max_length": 128, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 4000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
           "pad_token": "!"}  # fmt: skip


@pytest.mark.parametrize("uses", [{"truncation": TRUNCATION}, {"padding": PADDING},
                                  {"truncation": TRUNCATION, "padding": PADDING}])  # fmt: skip
def test_truncation_and_padding_are_not_the_tokenizer_s(uses: dict, source: Path, convert, tmp_path: Path, tiny_source):
    """They were left there by somebody's training run. transformers ignores them as well."""
    from transformers import AutoTokenizer

    edit_json(source / "tokenizer.json", lambda t: t.update(uses))
    theirs = AutoTokenizer.from_pretrained(source).encode(TEXT)
    assert len(theirs) > 128 and theirs == AutoTokenizer.from_pretrained(tiny_source).encode(TEXT)
    assert convert(source).code == 0
    written = tmp_path / "target" / "tokenizer.json"
    assert json.loads(written.read_text())["truncation"] is None and json.loads(written.read_text())["padding"] is None
    special = json.loads((tmp_path / "target" / "manifest.json").read_text())["special_tokens"]
    assert Tokenizer.from_file(written, special).encode(TEXT) == theirs
    assert Tokenizer.from_file(source / "tokenizer.json", special).encode(TEXT) == theirs, "when it is read, too"


def test_a_byte_order_mark_is_taken_off(source: Path, convert, tmp_path: Path, tiny_source: Path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (source / name).write_bytes(codecs.BOM_UTF8 + (source / name).read_bytes())
    assert convert(source).code == 0
    copied = (tmp_path / "target" / "tokenizer.json").read_bytes()
    assert copied == (tiny_source / "tokenizer.json").read_bytes()


def test_special_tokens_are_found_by_name_whatever_their_ids(source: Path, convert, tmp_path: Path):
    edit_json(
        source / "tokenizer.json",
        lambda t: t.update(
            added_tokens=[
                token
                | {
                    "content": {"<|cAUDIO|>": "<|extra_0|>", "<|extra_0|>": "<|cAUDIO|>"}.get(
                        token["content"], token["content"]
                    )
                }
                for token in t["added_tokens"]
            ]
        ),
    )
    (source / "tokenizer_config.json").unlink()
    assert convert(source).code == 0
    assert json.loads((tmp_path / "target" / "manifest.json").read_text())["special_tokens"]["cAUDIO"] == 544
