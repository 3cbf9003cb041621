"""The tokenizer against transformers', and text that arrives id by id."""

import json
import sys
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from covo_npu.runtime.tokenizer import Tokenizer, TokenizerError

SOURCE = Path(__file__).parents[1] / "data" / "covo-tiny"
NAMES = ("im_start", "im_end", "endoftext", "begofcAUDIO", "cAUDIO", "endofcAUDIO")
ADDED = {
    row["content"]: row["id"] for row in json.loads((SOURCE / "tokenizer.json").read_text("utf-8"))["added_tokens"]
}
SPECIAL = {name: ADDED[f"<|{name}|>"] for name in NAMES}
TOKENIZER = Tokenizer.from_file(SOURCE / "tokenizer.json", SPECIAL)
THEIRS = AutoTokenizer.from_pretrained(SOURCE)
TEXTS = (
    "",
    "Hello, world!\n",
    "你好，世界 🙂",
    "<|im_start|>user\nHi<|im_end|>\n",
    "  two  spaces ",
    "e\u0301 caf\u00e9",
    "I'll",
)


def test_length_is_the_first_audio_token():
    assert len(TOKENIZER) == json.loads((SOURCE / "config.json").read_text())["audio_token_index"] == len(THEIRS)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_transformers(text):
    ids = TOKENIZER.encode(text)
    assert ids == THEIRS.encode(text)
    for skip in (True, False):
        assert TOKENIZER.decode(ids, skip_special=skip) == THEIRS.decode(ids, skip_special_tokens=skip)


@given(st.text() | st.text("\u01d6\u0390\u1fa7 <|im_endABC\n").map(lambda text: normalize("NFD", text)))
def test_no_text_has_more_characters_than_its_ids_hold(text):
    assert len(text) <= TOKENIZER.max_characters(len(TOKENIZER.encode(text)))


def test_three_characters_are_composed_into_two_bytes_at_most():
    """Of every character there is: what becomes it is no longer than its own decomposition, which is the longest."""
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    assert max(len(normalize("NFD", character)) / len(character.encode()) for character in characters) == 1.5
    longest = max(json.loads((SOURCE / "tokenizer.json").read_text("utf-8"))["model"]["vocab"], key=len)
    assert TOKENIZER.max_characters(2) == 3 * max(len(longest), *map(len, ADDED))


def test_special_tokens_are_skipped_on_request():
    ids = [SPECIAL["im_start"], *TOKENIZER.encode("ok"), SPECIAL["im_end"]]
    assert TOKENIZER.decode(ids) == "ok"
    assert TOKENIZER.decode(ids, skip_special=False) == "<|im_start|>ok<|im_end|>"


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text(text):
    stream = TOKENIZER.stream()
    pieces = [stream.push(token) for token in TOKENIZER.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == TOKENIZER.decode(TOKENIZER.encode(text))


@settings(deadline=None)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=60))
def test_streaming_any_ids_gives_what_decoding_them_gives(ids):
    stream = TOKENIZER.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == TOKENIZER.decode(ids)


def test_a_character_appears_only_when_it_is_complete():
    stream, ids = TOKENIZER.stream(), TOKENIZER.encode("🙂")
    assert len(ids) > 1
    assert [stream.push(token) for token in ids] == [""] * (len(ids) - 1) + ["🙂"]


def test_a_file_of_another_model_is_refused():
    with pytest.raises(TokenizerError, match=r"<\|im_end\|> is \d+, expected 7"):
        Tokenizer.from_file(SOURCE / "tokenizer.json", {**SPECIAL, "im_end": 7})


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(TokenizerError, match="does not exist"):
        Tokenizer.from_file(tmp_path / "tokenizer.json", SPECIAL)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(TokenizerError, match="is not a tokenizer"):
        Tokenizer.from_file(tmp_path / "tokenizer.json", SPECIAL)
