"""Text to ids and back, over the `tokenizers` library."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import tokenizers

from covo_npu.kernels.errors import CovoError

INCOMPLETE = "\ufffd"  # what the decoder puts where bytes are no UTF-8, for instance the first bytes of a character

SPECIAL_TOKENS = ("im_start", "im_end", "endoftext", "begofcAUDIO", "cAUDIO", "endofcAUDIO")  # what a dialogue needs


class TokenizerError(CovoError):
    """A tokenizer file is missing, damaged, or lacks a token that the model needs."""


class Tokenizer:
    """A tokenizer and the ids of the model's special tokens by name: `tokenizer.special["im_end"]`."""

    def __init__(self, backend: tokenizers.Tokenizer, special: Mapping[str, int]) -> None:
        self._backend = backend
        self.special = dict(special)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], special_tokens: Mapping[str, int]) -> Tokenizer:
        """Return the tokenizer of a tokenizer.json. special_tokens: the ids that the checkpoint's manifest states.

        Raises TokenizerError if the file cannot be used or gives a special token another id.
        """
        if not Path(path).is_file():
            raise TokenizerError(f"{path}: does not exist; convert the checkpoint again")
        try:
            backend = tokenizers.Tokenizer.from_buffer(Path(path).read_bytes())  # a path may be no Unicode
        except BaseException as error:
            if not is_damage(error):
                raise
            raise TokenizerError(f"{path}: is not a tokenizer: {error}") from None
        if missing := [name for name in SPECIAL_TOKENS if name not in special_tokens]:
            raise TokenizerError(
                f"{path}: the manifest states no ids of {', '.join(missing)}; convert the source again"
            )
        differing = [
            f"<|{name}|> is {backend.token_to_id(f'<|{name}|>')}, expected {expected}"
            for name, expected in special_tokens.items()
            if backend.token_to_id(f"<|{name}|>") != expected
        ]
        if differing:
            raise TokenizerError(f"{path}: does not belong to this checkpoint: {'; '.join(differing)}")
        backend.no_truncation()  # a prompt is never cut, whatever the file asks for
        backend.no_padding()
        return cls(backend, special_tokens)

    def __len__(self) -> int:
        """Return how many tokens there are, special ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def max_characters(self, count: int) -> int:
        """Return how many characters a text of `count` ids has at most; a longer one has more ids.

        A token of byte-level BPE has a character for each byte that it stands for, a special one those of its text. NFC
        composes characters first, but never more than three into two bytes (U+01D6).
        """
        return count * max(map(len, self._backend.get_vocab(with_added_tokens=True))) * 3 // 2

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; nothing is put around it. Special tokens written in the text become their ids."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of ids. Bytes that are no UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def stream(self) -> TextStream:
        """Return a decoder that takes ids one by one."""
        return TextStream(self)


def is_damage(error: BaseException) -> bool:
    """Whether the tokenizers library raised this: bare Exception, or a panic, which is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class TextStream:
    """Text as it is generated: what `push` returns is final, and all of it together is what `decode` would give."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Return the text that one more id completes, empty while a character lacks bytes."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        if text.endswith(INCOMPLETE):
            return ""
        self._pending.clear()
        return text

    def finish(self) -> str:
        """Return what is left after the last id."""
        text = self._tokenizer.decode(self._pending)
        self._pending.clear()
        return text
