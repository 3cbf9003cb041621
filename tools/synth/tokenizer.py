"""A made-up byte-level BPE tokenizer of any size, with the special tokens of the published one at its end.

Nothing is trained: merges are enumerated, letters by frequency first, then Chinese characters, then longer runs of
letters. A Chinese character is one token and an English word a few, so prompts have plausible lengths.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = (  # in the order of their ids; those in brackets without bars are ordinary text to a decoder
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>"),
    *("<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|begofcAUDIO|>"),
    *("<|cAUDIO|>", "<|endofcAUDIO|>", "<|begofdAUDIO|>", "<|endofdAUDIO|>", "<|extra_0|>"),
)
LETTERS = "etaoinshrdlcumwfgypbvkjxqz"  # by frequency in English
SPACE = "Ġ"  # the byte-level spelling of a blank
CHINESE = ((0x3001, 0x3011), (0xFF01, 0xFF5E), (0x4E00, 0x9FFF))  # punctuation, full-width forms, characters
SPLIT = (  # how Qwen2 cuts text into words before the merges
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(folder: Path, size: int) -> None:
    """Write a tokenizer of `size` tokens: tokenizer.json, vocab.json, merges.txt and tokenizer_config.json."""
    alphabet = byte_alphabet()
    count = size - len(SPECIAL_TOKENS) - len(alphabet)
    if count < 0:
        raise ValueError(f"a tokenizer needs at least {len(SPECIAL_TOKENS) + len(alphabet)} tokens, asked for {size}")
    merges = list(islice(enumerate_merges(alphabet), count))
    if len(merges) < count:
        raise ValueError(f"only {len(merges)} merges are defined, {count} are needed")
    vocabulary = {token: i for i, token in enumerate([*alphabet.values(), *(a + b for a, b in merges)])}
    added = {i: _added_token(token) for i, token in enumerate(SPECIAL_TOKENS, start=len(vocabulary))}
    _write(folder / "tokenizer.json", _tokenizer(vocabulary, merges, added))
    _write(folder / "vocab.json", vocabulary)
    _write(folder / "tokenizer_config.json", _config(added))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def byte_alphabet() -> dict[int, str]:
    """Return byte -> the printable character that stands for it, in the order of their ids (GPT-2's alphabet)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def enumerate_merges(alphabet: dict[int, str]) -> Iterator[tuple[str, str]]:
    """Yield merges, each of two tokens that exist already, each result once. About 515,000."""
    pairs = [a + b for a in LETTERS for b in LETTERS]
    yield from ((SPACE, a) for a in LETTERS)
    yield from ((a, b) for a in LETTERS for b in LETTERS)
    yield from ((SPACE + a, b) for a in LETTERS for b in LETTERS)
    begun = set()
    for first, last in CHINESE:
        for code in range(first, last + 1):
            a, b, c = (alphabet[byte] for byte in chr(code).encode())
            if a + b not in begun:
                begun.add(a + b)
                yield a, b
            yield a + b, c
    yield from ((pair, a) for pair in pairs for a in LETTERS)
    yield from ((SPACE + pair, a) for pair in pairs for a in LETTERS)
    yield from ((pair, other) for pair in pairs for other in pairs)


def _added_token(token: str) -> dict[str, Any]:
    ordinary = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    hidden = token.startswith("<|") and not token.startswith(("<|fim_", "<|repo_", "<|file_"))
    return {"content": token, **ordinary, "special": hidden}


def _tokenizer(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], added: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in added.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _config(added: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "model_max_length": 131072,
        "add_prefix_space": False,
        "errors": "replace",
        "split_special_tokens": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
    }


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
