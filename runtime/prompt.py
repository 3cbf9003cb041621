"""The ids around a spoken question: what the model was trained to hear first in every round of a dialogue."""

from importlib.resources import files

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime.tokenizer import Tokenizer

# Upstream's text, to the letter: it names the voice and asks for 5 text and 15 audio tokens in alternation.
DEFAULT_SYSTEM_PROMPT = (files("covo_npu.runtime") / "data" / "system_prompt.txt").read_text("utf-8")


class PromptError(CovoError):
    """A text cannot be part of a prompt."""


def first_round(tokenizer: Tokenizer, system_text: str, placeholders: int) -> list[int]:
    """Return the ids of the system text and the first question.

    placeholders: how many <|cAUDIO|> ids stand for the audio. Raises PromptError if the text has one of its own.
    """
    text = tokenizer.encode(f"system\n{system_text}")
    if tokenizer.special["cAUDIO"] in text:
        raise PromptError("the system text holds <|cAUDIO|>, which stands for the audio of a question; take it out")
    start, end = tokenizer.special["im_start"], tokenizer.special["im_end"]
    return [start, *text, end, *tokenizer.encode("\n"), *_question(tokenizer, placeholders)]


def shared(tokenizer: Tokenizer, system_text: str) -> list[int]:
    """Return the ids up to the audio of the first question: the same for every dialogue with this system text."""
    ids = first_round(tokenizer, system_text, 1)
    return ids[: ids.index(tokenizer.special["cAUDIO"])]


def next_round(tokenizer: Tokenizer, placeholders: int) -> list[int]:
    """Return the ids of a later question. They follow the last reply's ids in the cache directly."""
    return [*tokenizer.encode("\n"), *_question(tokenizer, placeholders)]


def _question(tokenizer: Tokenizer, placeholders: int) -> list[int]:
    special, encode = tokenizer.special, tokenizer.encode
    audio = [special["begofcAUDIO"], *[special["cAUDIO"]] * placeholders, special["endofcAUDIO"]]
    opening = [special["im_start"], *encode("user\n"), *audio, special["im_end"]]
    return [*opening, *encode("\n"), special["im_start"], *encode("assistant\n")]
