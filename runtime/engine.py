"""The only decode loop: questions in, events out, for one dialogue or many side by side.

A question is heard (one pass of the encoder a step), put into the cache (one piece of the prompt a step), answered (one
token a step, with all others) and spoken (in a thread of its own, while it is generated if it is asked for in blocks).
No piece of one keeps the others waiting for longer than itself.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from covo_npu.kernels.device import Readback
from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import audio, prompt
from covo_npu.runtime.decode import NOT_FINITE, Rows
from covo_npu.runtime.events import Audio, Codes, Done, Event, Failed, Reply, Text, Ticket, Timing
from covo_npu.runtime.mixing import clipped_share
from covo_npu.runtime.model import CovoAudio
from covo_npu.runtime.networks.qwen2 import PREFILL_CHUNK
from covo_npu.runtime.options import MODES, Ask
from covo_npu.runtime.ranks import RankError
from covo_npu.runtime.speaker import Speaker, Spoken
from covo_npu.runtime.tokenizer import TextStream

log = logging.getLogger(__name__)


class ContextError(CovoError):
    """A question does not fit into what the dialogue's context has left."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a dialogue had come."""

    rounds: int = 0
    length: int = 0  # valid rows of the cache; the last token of a reply is never among them
    reply: tuple[int, ...] = ()  # ids of the last reply: those of the last of these rows


class NotFiniteError(CovoError):
    """A network computed NaN or infinity: its weights are broken, or beyond the dtype."""


@dataclass(slots=True, eq=False)
class Dialogue:
    """What the engine remembers of a dialogue between two questions. Only the engine writes it."""

    mark: Mark = Mark()
    rows: Rows | None = None  # where they are if no slot holds them
    ticket: Ticket | None = None  # the question under way

    @property
    def rounds(self) -> int:
        """Rounds that it remembers."""
        return self.mark.rounds

    @property
    def length(self) -> int:
        """Rows of the cache that it has."""
        return self.mark.length


@dataclass(slots=True)
class Load:
    """How busy the slots were: tokens per step of the decoder is how many dialogues it served side by side."""

    steps: int = 0
    step_tokens: int = 0


@dataclass(slots=True, eq=False)
class _Round:
    """One question under way. Times are those of time.perf_counter."""

    ticket: Ticket
    dialogue: Dialogue
    ask: Ask
    started: float
    input_ids: list[int]
    placeholders: int
    unheard: deque[Tensor]  # pieces of the waveform that the encoder has not seen
    before: Mark  # where the dialogue was when it was asked
    limit: int  # ids of the reply at most: max_new_tokens, or what the context has left
    stop_id: int
    text: TextStream
    features: list[Tensor] = field(default_factory=list)
    unfilled: deque[Tensor] = field(default_factory=deque)  # embeddings of the prompt that the cache lacks
    opened: bool = False  # its slot holds the rows of the rounds before
    prefix: int = 0  # ids of the shared prefix that are still to be computed
    filled: int = 0  # rows of its slot
    tokens: list[int] = field(default_factory=list)
    complete: bool = False
    encoded: float = 0.0
    answered: float = 0.0  # the first id was there
    decoded: float = 0.0  # the last one was
    heard: float = 0.0  # the first samples were told of
    speech: list[NDArray[np.float32]] = field(default_factory=list)


class Engine:
    """Answers questions in `num_slots` slots. In float32 no reply depends on the others.

    Slots 0 .. n - 1 are those of the n rounds that are decoded; the round whose prompt is put into the cache has the
    last one. A dialogue's rows stay in the slot where its round ended until somebody needs the slot: then they are
    parked in host memory. All methods may be called from any thread.
    """

    def __init__(self, model: CovoAudio, num_slots: int = 1) -> None:
        """num_slots: dialogues side by side, each with a KV cache of its own."""
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, found {num_slots}")
        self.model, self.num_slots, self.load = model, num_slots, Load()
        self._decoder = model.decoder(num_slots)
        self._lock = threading.RLock()
        self._count = 0
        self._waiting: deque[_Round] = deque()
        self._preparing: _Round | None = None
        self._decoding: list[_Round] = []  # the round of slot i is element i
        self._speaking: dict[Ticket, _Round] = {}  # those that the speaker knows: decoded ones, too
        self._unread: deque[tuple[Readback, list[_Round]]] = deque()  # ids on their way, and the round of each
        self._residents: dict[int, Dialogue] = {}  # slot: whose rows it holds, between two questions
        self._events: list[Event] = []
        self._undelivered: dict[Ticket, deque[Event]] = {}  # what drain() of one ticket has met of others
        self._speaker = Speaker(model)

    # --- what is asked of it

    def submit(self, dialogue: Dialogue, waveform: Tensor, ask: Ask) -> Ticket:
        """Return the ticket of a question; step() works on it. waveform: [N] at 24 kHz, from audio.prepare.

        Raises ContextError if it does not fit into what the dialogue has left, CovoError if the dialogue has a question
        under way or the model cannot speak and is asked to.
        """
        with self._lock:
            _require_idle(dialogue)
            if ask.speaks:
                self.model.require_speech()
            self._count += 1
            self._waiting.append(self._round(Ticket(self._count), dialogue, waveform, ask))
            dialogue.ticket = self._waiting[-1].ticket
            return dialogue.ticket

    @torch.inference_mode()
    def cancel(self, ticket: Ticket) -> None:
        """Forget a question; nothing more is heard of it. The dialogue is as it was before. Does nothing twice."""
        with self._lock:
            if round_ := self._under_way(ticket):
                with contextlib.suppress(RankError):  # what ended the ranks is told where it was found
                    self._drop(round_)
            self._silence(ticket)

    @torch.inference_mode()
    def interrupt(self, ticket: Ticket) -> bool:
        """End a reply where it is; nothing more is heard of it. Return whether its dialogue remembers the round.

        It does, with what there is of the reply, if the reply has begun; else it is as it was before.
        """
        with self._lock:
            round_ = self._under_way(ticket)
            begun = round_ is not None and bool(round_.tokens)
            if round_ is not None:
                self._drop(round_, keep=begun)
            self._silence(ticket)
            return begun

    def truncate(self, dialogue: Dialogue, num_codes: int) -> None:
        """Let a dialogue forget what follows the first audio codes of its last reply, text included.

        Does nothing if the reply has no more of them. Raises CovoError if the dialogue has a question under way.
        """
        with self._lock:
            _require_idle(dialogue)
            mark = dialogue.mark
            ends = [0, *(end for end, token in enumerate(mark.reply, 1) if self._codes([token]))]
            if num_codes < len(ends) - 1:
                reply = mark.reply[: ends[num_codes]]
                dialogue.mark = Mark(mark.rounds, mark.length - len(mark.reply) + len(reply), reply)

    def rewind(self, dialogue: Dialogue, mark: Mark) -> None:
        """Let a dialogue be what it was at an earlier mark. Raises CovoError if it has a question under way."""
        with self._lock:
            _require_idle(dialogue)
            dialogue.mark = mark

    @torch.inference_mode()
    def fork(self, dialogue: Dialogue, mark: Mark) -> Dialogue:
        """Return a dialogue of its own that goes on where another was at `mark`; that one is left as it is.

        mark: one that the dialogue had, and has not gone back behind since.
        """
        with self._lock:
            slot, rows = self._slot_of(dialogue), None
            if slot is not None:
                rows = self._decoder.park(slot, mark.length)
            elif dialogue.rows is not None:
                rows = Rows(tuple(tensor[:, : mark.length].clone() for tensor in dialogue.rows.tensors))
            return Dialogue(mark, rows)

    def forget(self, dialogue: Dialogue) -> None:
        """Free what the engine holds of a dialogue that will not go on; it is as new."""
        with self._lock:
            if dialogue.ticket is not None:
                self.cancel(dialogue.ticket)
            self._residents = {slot: other for slot, other in self._residents.items() if other is not dialogue}
            dialogue.mark, dialogue.rows = Mark(), None

    @property
    def free_slots(self) -> int:
        """How many questions more would be worked on at once."""
        return self.num_slots - len(self._waiting) - (self._preparing is not None) - len(self._decoding)

    @property
    def waiting(self) -> tuple[Ticket, ...]:
        """The questions that nobody has worked on yet, first come first."""
        with self._lock:
            return tuple(round_.ticket for round_ in self._waiting)

    @property
    def row_bytes(self) -> int:
        """Memory that a row of a dialogue takes, in the slots of all ranks or parked."""
        cache = self._decoder.cache
        return sum(t[0, :, 0].nbytes for t in (*cache.keys, *cache.values)) * self.model.networks.llm.group.size

    @property
    def speaking(self) -> int:
        """How many replies are complete but for their speech."""
        return sum(round_.complete for round_ in self._speaking.values())

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Return what happened in one bounded piece of work for everybody; [] if there is nothing to do.

        Waits for a moment if only speech is under way. Raises CheckpointError if the weights turn out to be damaged,
        RankError if a rank has ended: then nothing goes on.
        """
        with self._lock:
            if self._preparing is None and self._waiting and len(self._decoding) < self.num_slots:
                self._preparing = self._waiting.popleft()
            busy = self._preparing is not None or bool(self._decoding)
            if self._decoding:
                self._decode()
            if (round_ := self._preparing) is not None:
                try:
                    self._prepare(round_)
                except RankError:  # nothing goes on
                    raise
                except Exception as error:  # noqa: BLE001 - carried to whoever waits for the reply
                    self._fail(round_, error)
                if not self._decoder.runs_ahead:
                    self._settle(0)  # a first id is there, and waits for no step
            self._hear_speaker(wait=not busy and bool(self._speaking))
            events, self._events = self._events, []
            return events

    def drain(self, ticket: Ticket) -> Iterator[Event]:
        """Yield the events of one ticket to its last, doing the work meanwhile; who leaves early cancels the question.

        The last is Done or Failed, but where the question was cancelled or interrupted from elsewhere.
        Several threads may drain an engine: each takes steps for all and keeps the events of the others for them.
        """
        try:
            while True:
                with self._lock:
                    own = self._undelivered.setdefault(ticket, deque())
                    if not own:
                        for event in self.step():
                            self._undelivered.setdefault(event.ticket, deque()).append(event)
                    events = list(own)
                    own.clear()
                    if not events and self._under_way(ticket) is None:
                        return
                for event in events:
                    yield event
                    if isinstance(event, Done | Failed):
                        return
        finally:
            self.cancel(ticket)

    # --- hearing and the prompt

    def _round(self, ticket: Ticket, dialogue: Dialogue, waveform: Tensor, ask: Ask) -> _Round:
        model = self.model
        placeholders = audio.num_placeholders(waveform.shape[0], model.config.adapter.num_layers)
        if dialogue.rounds == 0:
            system = prompt.DEFAULT_SYSTEM_PROMPT if ask.system is None else ask.system
            input_ids = prompt.first_round(model.tokenizer, system, placeholders)
        else:
            input_ids = prompt.next_round(model.tokenizer, placeholders)
        left = model.max_context - dialogue.length - len(input_ids)
        if left < 0:
            raise ContextError(
                f"the question needs {len(input_ids)} tokens, the dialogue has {dialogue.length} of "
                f"{model.max_context}: ask something shorter, start a new dialogue, or load with a larger max_context "
                "(--max-context)"
            )
        return _Round(
            ticket=ticket,
            dialogue=dialogue,
            ask=ask,
            started=time.perf_counter(),
            input_ids=input_ids,
            placeholders=placeholders,
            unheard=deque(audio.segments(waveform)),
            before=dialogue.mark,
            limit=min(ask.max_new_tokens, left + 1),
            stop_id=model.tokenizer.special[MODES[ask.mode]],
            text=model.tokenizer.stream(),
        )

    def _prepare(self, round_: _Round) -> None:
        """Do the next piece of work before the first token: a pass of the encoder, or a piece of the prompt."""
        if round_.unheard:
            round_.features.append(self.model.encode(round_.unheard[0]))
            round_.unheard.popleft()
            if not round_.unheard:
                self._open(round_)
        elif len(round_.unfilled) > 1:
            self._fill(round_, self.num_slots - 1)
        else:
            self._begin(round_, self._fill(round_, self.num_slots - 1))

    def _open(self, round_: _Round) -> None:
        """Bring what the cache knows of the prompt into the slot, and cut the rest into pieces."""
        model, dialogue, slot = self.model, round_.dialogue, self.num_slots - 1
        round_.encoded = time.perf_counter()
        log.info(
            "question %d: heard in %.3f s: %d placeholders, %d prompt tokens after %d of the dialogue",
            round_.ticket.number, round_.encoded - round_.started, round_.placeholders, len(round_.input_ids),
            dialogue.length,
        )  # fmt: skip
        self._take_slot(dialogue, slot)
        round_.opened = True
        features = torch.cat(round_.features)[: round_.placeholders]
        embeddings = model.networks.llm.embed(torch.tensor(round_.input_ids, device=model.device))
        first = round_.input_ids.index(model.tokenizer.special["cAUDIO"])
        embeddings[first : first + round_.placeholders] = features
        round_.features, round_.filled = [], dialogue.length
        if dialogue.rounds == 0:
            # Up to the first placeholder all dialogues with this system prompt are the same. The prompt is cut there
            # for the first of them too: the same question gets the same answer, bit for bit, whoever came before.
            if (rows := model.prefixes.get(round_.input_ids[:first])) is None:
                round_.prefix = first
                round_.unfilled.extend(embeddings[:first].split(PREFILL_CHUNK))
            else:
                self._decoder.restore(slot, Rows(rows))
                round_.filled = first
            embeddings = embeddings[first:]
        round_.unfilled.extend(embeddings.split(PREFILL_CHUNK))

    def _fill(self, round_: _Round, slot: int) -> Tensor:
        """Return the hidden state [1, C] after the next piece of the prompt, which is in the cache then."""
        piece = round_.unfilled.popleft()
        hidden = self._decoder.fill(slot, piece, round_.filled)
        round_.filled += piece.shape[0]
        if round_.filled == round_.prefix:
            self.model.prefixes.put(round_.input_ids[: round_.prefix], self._decoder.read(slot, round_.prefix).tensors)
        return hidden

    def _begin(self, round_: _Round, hidden: Tensor) -> None:
        """Sample the first id and let the round join those that are decoded."""
        last, slot, ask = self.num_slots - 1, len(self._decoding), round_.ask
        ids = torch.tensor(round_.input_ids, device=self.model.device)
        seed = ask.seed + round_.dialogue.rounds
        first = self._decoder.begin(last, ids, hidden, round_.filled, seed, ask.sampling)
        if ask.speaks:
            self._speaking[round_.ticket] = round_
            self._speaker.begin(round_.ticket, ask, seed)
        if slot != last:
            self._vacate(slot)
            self._decoder.move(last, slot)
        self._decoding.append(round_)
        self._preparing = None
        self._unread.append((first, [round_]))

    # --- slots

    def _take_slot(self, dialogue: Dialogue, slot: int) -> None:
        """Bring the rows of a dialogue into a slot, whoever's are there now."""
        held = next((other for other, resident in self._residents.items() if resident is dialogue), None)
        if held != slot:
            self._vacate(slot)
            if held is not None:
                self._decoder.copy(held, slot, dialogue.length)
            elif dialogue.rows is not None:
                self._decoder.restore(slot, dialogue.rows)
        if held is not None:
            del self._residents[held]
        dialogue.rows = None

    def _slot_of(self, dialogue: Dialogue) -> int | None:
        """Return the slot that holds the rows of a dialogue, None if they are parked."""
        held = self._residents | {slot: round_.dialogue for slot, round_ in enumerate(self._decoding)}
        if self._preparing is not None and self._preparing.opened:
            held[self.num_slots - 1] = self._preparing.dialogue
        return next((slot for slot, holder in held.items() if holder is dialogue), None)

    def _vacate(self, slot: int) -> None:
        """Park the rows that a slot holds of a dialogue between two questions."""
        if dialogue := self._residents.get(slot):
            dialogue.rows = self._decoder.park(slot, dialogue.length)
            del self._residents[slot]

    def _leave(self, round_: _Round) -> None:
        """Let a round give its slot back; the last slot's round takes its place, so that there is no gap."""
        slot = self._decoding.index(round_)
        self._residents[slot] = round_.dialogue
        last = self._decoding.pop()
        if last is not round_:
            self._vacate(slot)
            self._decoder.move(len(self._decoding), slot)
            self._decoding[slot] = last

    # --- decoding

    def _decode(self) -> None:
        """Enqueue a step of all slots and read what is there: on the CPU all, else all but that step's ids.

        So the device is never idle while the host thinks; a round that its stop token ends is fed once more, which
        changes nothing.
        """
        rounds = list(self._decoding)
        if stepped := any(self._wants_more(round_) for round_ in rounds):
            self._unread.append((self._decoder.step(len(rounds)), rounds))
            self.load.steps += 1
        self._settle(1 if self._decoder.runs_ahead and stepped else 0)

    def _settle(self, left: int) -> None:
        """Read the ids on their way but for the last `left` lots; let rounds that are complete with them leave."""
        self._read(left)
        for round_ in [round_ for round_ in self._decoding if round_.complete]:
            self._complete(round_)

    def _wants_more(self, round_: _Round) -> bool:
        """Whether a reply may need another id than those that were read and those on their way."""
        coming = sum(round_ in rounds for _, rounds in self._unread)
        return not round_.complete and len(round_.tokens) + coming < round_.limit

    def _read(self, left: int) -> None:
        """Read the ids on their way but for the last `left` lots, and give each to its round."""
        while len(self._unread) > left:
            readback, rounds = self._unread.popleft()
            for token, round_ in zip(readback.tokens(), rounds, strict=True):
                if round_.complete or round_ not in self._decoding:
                    continue
                if token == NOT_FINITE:
                    self._fail(round_, self._not_finite(f"logits after {len(round_.tokens)} tokens"))
                    continue
                self._push(round_, token)
                self.load.step_tokens += len(round_.tokens) > 1

    def _push(self, round_: _Round, token: int) -> None:
        """Add an id to a reply: note whether it is complete with it, and tell what the id says."""
        if not round_.tokens:
            self.model.verify_text()  # read by now: nothing is shown before they are verified
            round_.answered = time.perf_counter()
            seconds = round_.answered - round_.started
            log.info("question %d: first token after %.3f s", round_.ticket.number, seconds)
        round_.tokens.append(token)
        round_.decoded = time.perf_counter()
        round_.complete = token == round_.stop_id or len(round_.tokens) == round_.limit
        first_code = self.model.config.audio_token_index
        text = round_.text.push(token) if token < first_code else ""
        if text := text + (round_.text.finish() if round_.complete else ""):
            self._events.append(Text(round_.ticket, text))
        if codes := self._codes([token]):
            self._events.append(Codes(round_.ticket, tuple(codes)))
            self._speaker.push(round_.ticket, codes)

    def _complete(self, round_: _Round) -> None:
        """Let a round whose ids are all there leave its slot: to be spoken, or done."""
        log.info(
            "question %d: %d tokens decoded in %.3f s",
            round_.ticket.number, len(round_.tokens), round_.decoded - round_.answered,
        )  # fmt: skip
        self._remember(round_)
        self._leave(round_)
        if round_.ask.speaks:
            self._speaker.end(round_.ticket)
        else:
            self._finish(round_, 0.0)

    def _remember(self, round_: _Round) -> None:
        """Let the dialogue of a round have its prompt, and of its reply what the cache has."""
        before, reply = round_.before, tuple(round_.tokens[:-1])
        length = before.length + len(round_.input_ids) + len(reply)
        round_.dialogue.mark = Mark(before.rounds + 1, length, reply)

    def _codes(self, tokens: list[int]) -> list[int]:
        """Return the audio codes among ids. An id beyond the table of codes is none."""
        first = self.model.config.audio_token_index
        end = first + self.model.num_codes
        return [token - first for token in tokens if first <= token < end]

    # --- speech and the end

    def _hear_speaker(self, wait: bool) -> None:
        """Take what the speaker has to tell."""
        for event in self._speaker.events(wait):
            round_ = self._speaking.get(event.ticket)
            if round_ is None:  # cancelled meanwhile
                continue
            if isinstance(event, Failed):
                self._fail(round_, event.error)
            elif isinstance(event, Audio) and not np.isfinite(event.samples).all():
                self._fail(round_, self._not_finite("samples of its speech"))
            elif isinstance(event, Spoken):
                self._finish(round_, event.seconds)
            else:
                if isinstance(event, Audio):
                    round_.heard = round_.heard or time.perf_counter()
                    round_.speech.append(event.samples)
                self._events.append(event)

    def _finish(self, round_: _Round, token2wav_s: float) -> None:
        """Tell that a reply is complete."""
        self._speaking.pop(round_.ticket, None)
        round_.dialogue.ticket = None
        tokens = round_.tokens
        waveform = np.concatenate([np.zeros(0, np.float32), *round_.speech])
        decode_s = round_.decoded - round_.answered
        if round_.ask.speaks:
            seconds = waveform.size / audio.SAMPLE_RATE
            log.info("question %d: %.2f s of speech in %.3f s", round_.ticket.number, seconds, token2wav_s)
        limit = "length" if len(tokens) == round_.ask.max_new_tokens else "context"
        timing = Timing(
            encode_s=round_.encoded - round_.started,
            ttft_s=round_.answered - round_.started,
            ttfa_s=round_.heard - round_.started if round_.heard else 0.0,
            decode_s=decode_s,
            tokens_per_s=(len(tokens) - 1) / decode_s if len(tokens) > 1 else 0.0,
            token2wav_s=token2wav_s,
            rtf=token2wav_s * audio.SAMPLE_RATE / waveform.size if waveform.size else 0.0,
        )
        first_code = self.model.config.audio_token_index
        reply = Reply(
            text=self.model.tokenizer.decode([token for token in tokens if token < first_code]),
            tokens=tokens,
            audio_codes=self._codes(tokens),
            waveform=waveform,
            sample_rate=audio.SAMPLE_RATE,
            stop_reason="stop" if tokens[-1] == round_.stop_id else limit,
            prompt_tokens=len(round_.input_ids),
            placeholders=round_.placeholders,
            timing=timing,
            warnings=_odd(waveform) if round_.ask.speaks else (),
        )
        self._events.append(Done(round_.ticket, reply))

    def _not_finite(self, what: str) -> NotFiniteError:
        used = self.model.report
        speech = f"{used.token2wav_dtype}, {used.vocoder_dtype}" if used.token2wav_dtype else "none"
        return NotFiniteError(
            f"the {what} are NaN or infinite: the weights are broken, or values go beyond {used.dtype} (speech: "
            f"{speech}). Try --dtype float32, for speech --token2wav-dtype and --vocoder-dtype; "
            "covo-check ckpt looks at the weights"
        )

    def _fail(self, round_: _Round, error: Exception) -> None:
        self._drop(round_)
        self._events.append(Failed(round_.ticket, error))

    def _silence(self, ticket: Ticket) -> None:
        """Take back what is still to be told of a question."""
        self._events = [event for event in self._events if event.ticket != ticket]
        self._undelivered.pop(ticket, None)

    def _under_way(self, ticket: Ticket) -> _Round | None:
        rounds = (*self._waiting, self._preparing, *self._decoding, *self._speaking.values())
        return next((round_ for round_ in rounds if round_ is not None and round_.ticket == ticket), None)

    def _drop(self, round_: _Round, keep: bool = False) -> None:
        """Take a round out of wherever it is. Its dialogue remembers it (keep), or is as it was before."""
        dialogue = round_.dialogue
        if self._speaking.pop(round_.ticket, None):
            self._speaker.cancel(round_.ticket)
        if round_ in self._waiting:
            self._waiting.remove(round_)
        elif round_ is self._preparing:
            self._preparing = None
            if round_.opened:
                self._residents[self.num_slots - 1] = dialogue
        elif round_ in self._decoding:
            if keep:
                self._remember(round_)
            self._leave(round_)
        if not keep:
            dialogue.mark = round_.before
        dialogue.ticket = None


def _require_idle(dialogue: Dialogue) -> None:
    if dialogue.ticket is not None:
        raise CovoError("this dialogue has a question under way: wait for its reply, or cancel it")


def _odd(speech: NDArray[np.float32]) -> tuple[str, ...]:
    """Return what is odd about the speech of a reply that is to be spoken."""
    if not speech.size:
        return ("the reply has no speech: the model gave no audio codes",)
    if share := clipped_share(speech):
        return (f"the speech of the reply is clipped: {100 * share:.1f} % of its samples are at full scale",)
    return ()
