"""How many tokens a reply took, as OpenAI's interfaces tell it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one round. cached: of the rounds before, and among the prompt's; heard, codes: the audio in each."""

    prompt: int
    cached: int
    heard: int
    completion: int
    codes: int

    def chat(self) -> dict[str, Any]:
        """Return the usage object of a chat completion."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {**self._input, "cached_tokens": self.cached},
            "completion_tokens_details": self._output,
        }

    def realtime(self) -> dict[str, Any]:
        """Return the usage object of a realtime response."""
        return {
            "total_tokens": self.prompt + self.completion,
            "input_tokens": self.prompt,
            "output_tokens": self.completion,
            "input_token_details": {**self._input, "cached_tokens": self.cached},
            "output_token_details": self._output,
        }

    @property
    def _input(self) -> dict[str, int]:
        return {"audio_tokens": self.heard, "text_tokens": self.prompt - self.heard}

    @property
    def _output(self) -> dict[str, int]:
        return {"audio_tokens": self.codes, "text_tokens": self.completion - self.codes}
