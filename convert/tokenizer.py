"""The tokenizer of a source checkpoint as one tokenizer.json, its special tokens looked up by name and checked."""

import codecs
import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from covo_npu.convert import rules
from covo_npu.convert.config import read_json
from covo_npu.convert.errors import ConvertError, Kind, refuse
from covo_npu.runtime.tokenizer import is_damage

TOKENIZER, TOKENIZER_CONFIG, ADDED_TOKENS = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
SLOW_FILES = ("vocab.json", "merges.txt")
OTHER = "Is this the tokenizer that belongs to these weights?"
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The bytes of tokenizer.json, the ids that the runtime needs by name, and the files all of it came from."""

    text: bytes
    special_tokens: Mapping[str, int]
    files: tuple[Path, ...]


def read_tokenizer(folder: Path, audio_token_index: int) -> TokenizerFiles:
    """Return the tokenizer of a source folder.

    tokenizer.json is taken as it is, or built from vocab.json and merges.txt; tokens that only tokenizer_config.json
    or added_tokens.json list are added under their ids; truncation and padding are taken out. Raises ConvertError if a
    special token is missing or the ids do not end before audio_token_index, the first of an audio code.
    """
    extra = tuple(path for name in (TOKENIZER_CONFIG, ADDED_TOKENS) if (path := folder / name).is_file())
    if (folder / TOKENIZER).is_file():
        files, text = (folder / TOKENIZER, *extra), (folder / TOKENIZER).read_bytes()
    else:
        files, text = (*(folder / name for name in SLOW_FILES), *extra), _build(folder)
    text = _settled(folder, text)
    tokenizer = _parse(folder, text)
    ids = {name: tokenizer.token_to_id(token) for name, token in rules.SPECIAL_TOKENS}
    wrong = [
        f"{token}: expected id {entry['id']}, found {found}"
        for token, entry in _added(folder).items()
        if (found := tokenizer.token_to_id(token)) != entry["id"]
    ]
    numbers = tokenizer.get_vocab(with_added_tokens=True).values()
    size, last = len(numbers), max(numbers, default=-1)
    count = f"expected audio_token_index of config.json, {audio_token_index}; found {size} tokens, the last {last}"
    fits = size == audio_token_index > last
    refuse(
        f"the tokenizer of {folder}",
        Kind("special tokens are missing", [token for name, token in rules.SPECIAL_TOKENS if ids[name] is None], OTHER),
        Kind("added tokens have another id", wrong, OTHER),
        Kind("the number of tokens is not where the audio codes start", [count] * (not fits), OTHER),
    )
    return TokenizerFiles(text, {name: i for name, i in ids.items() if i is not None}, files)


def tokenizer_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that read_tokenizer would read; some may not be there."""
    slow = () if os.path.lexists(folder / TOKENIZER) else SLOW_FILES
    return (TOKENIZER, *slow, TOKENIZER_CONFIG, ADDED_TOKENS)


def _build(folder: Path) -> bytes:
    """Return tokenizer.json made of vocab.json and merges.txt, the way transformers does it for Qwen2."""
    missing = [str(folder / name) for name in SLOW_FILES if not (folder / name).is_file()]
    if missing:
        raise ConvertError(f"{folder}: has no {TOKENIZER}, and {' and '.join(missing)} to build it from is missing")
    try:
        from transformers import Qwen2TokenizerFast  # type: ignore[attr-defined]  # heavy, and only needed here
    except ImportError as error:
        raise ConvertError(
            f"{folder}: has no {TOKENIZER}, and building it from {' and '.join(SLOW_FILES)} needs transformers "
            f"({error}); pip install 'covo-npu[convert]', or put a {TOKENIZER} there"
        ) from error

    try:
        tokenizer = Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True)
    except BaseException as error:
        if not is_damage(error):
            raise
        raise ConvertError(
            f"{folder}: no tokenizer can be built from {', '.join(SLOW_FILES)} ({error}); download them again"
        ) from error
    return str(tokenizer.backend_tokenizer.to_str(pretty=True)).encode()


def _added(folder: Path) -> dict[str, dict[str, Any]]:
    """Return token -> entry for tokenizer.json, of the tokens that tokenizer_config.json and added_tokens.json list."""
    entries: dict[str, dict[str, Any]] = {}
    if (folder / ADDED_TOKENS).is_file():
        entries |= {
            token: _PLAIN | {"id": i, "content": token} for token, i in read_json(folder / ADDED_TOKENS).items()
        }
    if (folder / TOKENIZER_CONFIG).is_file():
        decoder = read_json(folder / TOKENIZER_CONFIG).get("added_tokens_decoder", {})
        with _damage_of(folder / TOKENIZER_CONFIG):
            entries |= {entry["content"]: _PLAIN | entry | {"id": int(i)} for i, entry in decoder.items()}
    return entries


def _settled(folder: Path, text: bytes) -> bytes:
    """Return tokenizer.json with the added tokens that it lacks, without truncation and padding: those belong to a use.

    It is returned byte for byte if there is nothing to change.
    """
    text = text.removeprefix(codecs.BOM_UTF8)
    data, added = _object(folder, text), _added(folder)
    with _damage_of(folder / TOKENIZER):
        present = {entry["content"] for entry in data.get("added_tokens", [])}
        lacking = [entry for token, entry in added.items() if token not in present]
        uses = [key for key in ("truncation", "padding") if data.get(key) is not None]
        if not lacking and not uses:
            return text
        data |= dict.fromkeys(uses)
        data["added_tokens"] = sorted([*data.get("added_tokens", []), *lacking], key=lambda entry: entry["id"])
        return json.dumps(data, ensure_ascii=False, indent=2).encode()


@contextlib.contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """Turn what an odd list of added tokens does to those who read it into ConvertError."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConvertError(f"{path}: its added tokens cannot be read ({error}); download it again") from error


def _object(folder: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{folder / TOKENIZER}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{folder / TOKENIZER}: expected a JSON object, found {type(value).__name__}")
    return value


def _parse(folder: Path, text: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_str(text.decode())
    except BaseException as error:
        if not is_damage(error):
            raise
        raise ConvertError(f"{folder / TOKENIZER}: not a tokenizer that can be read ({error})") from error
