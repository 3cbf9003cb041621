"""Dialogues between two questions: found by the names of their replies, forgotten when they are old or too many."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from covo_npu.runtime.engine import Dialogue, Engine, Mark


@dataclass(frozen=True, slots=True)
class Turn:
    """A reply from which a dialogue may go on."""

    dialogue: Dialogue
    mark: Mark
    system: str  # the prompt that the dialogue began with
    audio_tokens: int  # of its rows: placeholders of questions and codes of replies


@dataclass(slots=True)
class _Held:
    used: float  # when it was used last, by the clock
    names: list[str] = field(default_factory=list)  # of its turns


class Dialogues:
    """What is held of dialogues, in host memory while no slot holds it. For the thread that owns the engine.

    What they take is counted as if all were parked: at any time another question may need their slots.
    """

    def __init__(
        self, engine: Engine, limit_bytes: int, keep_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine, self._limit_bytes, self._keep_s, self._clock = engine, limit_bytes, keep_s, clock
        self._held: dict[Dialogue, _Held] = {}  # the longest unused first
        # The latest is the last of its name: dialogues that begin alike have the text of a reply in common.
        self._turns: dict[str, list[Turn]] = {}

    def __len__(self) -> int:
        """Return how many are held."""
        return len(self._held)

    def __contains__(self, dialogue: Dialogue) -> bool:
        """Whether a dialogue is held, or was forgotten."""
        return dialogue in self._held

    @property
    def bytes(self) -> int:
        """Memory that they take. From any thread."""
        return sum(dialogue.length for dialogue in list(self._held)) * self._engine.row_bytes

    def hold(self, dialogue: Dialogue) -> None:
        """Keep a dialogue that was just used; the longest unused ones go if that is too much."""
        held = self._held.pop(dialogue, None) or _Held(0.0)
        held.used = self._clock()
        self._held[dialogue] = held
        self.trim()

    def keep(self, turn: Turn, names: Iterable[str]) -> None:
        """Let a turn be found by its names, and hold its dialogue."""
        self.hold(turn.dialogue)
        if held := self._held.get(turn.dialogue):
            for name in names:
                self._turns.setdefault(name, []).append(turn)
                held.names.append(name)

    def find(self, name: str) -> Turn | None:
        """Return the latest turn of a name, None if it was forgotten or never was."""
        turns = self._turns.get(name)
        return turns[-1] if turns else None

    def go_on(self, turn: Turn) -> Dialogue:
        """Return the dialogue that goes on from a turn.

        It is the turn's own if that ended there; if it has gone on since, a copy of what it was.
        """
        if turn.dialogue.ticket is None and turn.dialogue.mark == turn.mark:
            return turn.dialogue
        return self._engine.fork(turn.dialogue, turn.mark)

    def forget(self, dialogue: Dialogue) -> None:
        """Give up a dialogue, held or not; a question under way is cancelled."""
        self._engine.forget(dialogue)
        if held := self._held.pop(dialogue, None):
            for name in held.names:
                others = [turn for turn in self._turns.pop(name, ()) if turn.dialogue is not dialogue]
                if others:
                    self._turns[name] = others

    def trim(self) -> None:
        """Forget what is too old, and the longest unused that take memory until the rest fits.

        A dialogue with a question under way is not touched.
        """
        bytes_ = self.bytes
        for dialogue, held in list(self._held.items()):
            old = self._clock() - held.used > self._keep_s
            if not (old or bytes_ > self._limit_bytes):
                return
            if dialogue.ticket is None and (old or dialogue.length):
                bytes_ -= dialogue.length * self._engine.row_bytes
                self.forget(dialogue)
