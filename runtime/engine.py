"""Many dialogues at once: one token a step for all of them, and a finished one makes room for the next at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime.decode import Readback
from covo_npu.runtime.sampling import Sampling
from covo_npu.runtime.session import Reply, Round, Session

if TYPE_CHECKING:
    from covo_npu.runtime.model import CovoAudio


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Spoken questions, one a round, to be answered on their own. questions: paths, or (samples, sample_rate)."""

    name: str
    questions: tuple[Any, ...]


@dataclass(slots=True)
class Answer:
    """The replies of one dialogue. error: why it ended before its last round, or None."""

    dialogue: Dialogue
    replies: list[Reply] = field(default_factory=list)
    error: CovoError | None = None


@dataclass(slots=True)
class Load:
    """How busy the slots were: tokens per step of the decoder is how many dialogues it served side by side."""

    steps: int = 0
    step_tokens: int = 0


@dataclass(slots=True)
class _Active:
    session: Session
    answer: Answer
    question: Round | None = None  # the round under way


class Engine:
    """Answers dialogues in at most `max_batch` slots. What a dialogue is answered does not depend on the others.

    The dialogues under way fill the first slots without gaps: when one ends, that of the last slot takes its place.
    """

    def __init__(
        self,
        model: CovoAudio,
        max_batch: int,
        mode: str = "a2ta",
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        system: str | None = None,
    ) -> None:
        """max_batch: dialogues side by side, each with a KV cache of its own; the rest is as in CovoAudio.session."""
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, found {max_batch}")
        self.model, self.max_batch, self.load = model, max_batch, Load()
        self._sampling = sampling or model.generation.sampling
        self._settings = (mode, self._sampling, max_new_tokens or model.generation.max_new_tokens, seed, system)
        self._decoder = model.decoder(self._sampling, max_batch)
        self._active: list[_Active] = []  # the dialogue of slot i is element i
        self._unread: list[tuple[Readback, list[Round]]] = []  # ids on their way, and the round of each

    @torch.inference_mode()
    def answer(self, dialogues: Iterable[Dialogue]) -> Iterator[Answer]:
        """Yield the answer of each dialogue when it is complete. A dialogue is taken when a slot is free for it."""
        waiting = iter(dialogues)
        while True:
            while len(self._active) < self.max_batch and (dialogue := next(waiting, None)) is not None:
                session = Session(self.model, *self._settings, self._decoder, len(self._active))
                self._active.append(_Active(session, Answer(dialogue)))
                yield from self._continue(self._active[-1])
            if not self._active:
                return
            self._step()
            for active in [active for active in self._active if active.question and active.question.complete]:
                assert active.question is not None
                active.answer.replies.append(active.session.finish(active.question))
                yield from self._continue(active)

    def _continue(self, active: _Active) -> Iterator[Answer]:
        """Begin the next round of a dialogue; if there is none, or its question cannot be used, yield the answer."""
        session, answer = active.session, active.answer
        if session.rounds < len(answer.dialogue.questions):
            question = answer.dialogue.questions[session.rounds]
            source, rate = question if isinstance(question, tuple) else (question, None)
            try:
                active.question = session.listen(source, rate)
                self._unread.append((session.begin(active.question), [active.question]))
                return
            except CovoError as error:
                answer.error = error
        self._leave(active)
        yield answer

    def _leave(self, active: _Active) -> None:
        last = self._active.pop()
        if last is not active:
            self._decoder.move(last.session.slot, active.session.slot)
            self._active[active.session.slot] = last
            last.session.slot = active.session.slot

    def _step(self) -> None:
        """Enqueue a step of all slots and read what is there: on the CPU all, else all but that step's ids.

        So the device is never idle while the host thinks; a round that ends is fed once more, which changes nothing.
        """
        if not self._decoder.runs_ahead:
            self._read(0)
        rounds = [active.question for active in self._active if active.question is not None]
        if any(not question.complete for question in rounds):
            self._unread.append((self._decoder.step(len(rounds)), rounds))
            self.load.steps += 1
        self._read(1 if self._decoder.runs_ahead else 0)

    def _read(self, left: int) -> None:
        """Read the ids on their way but for the last `left` lots, and give each to its round."""
        sessions = {id(active.question): active.session for active in self._active}
        while len(self._unread) > left:
            readback, rounds = self._unread.pop(0)
            for token, question in zip(readback.tokens(), rounds, strict=True):
                if not question.complete:
                    sessions[id(question)].push(question, token)
                    self.load.step_tokens += len(question.tokens) > 1
