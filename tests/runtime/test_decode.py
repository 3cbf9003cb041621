"""The decode loop on the tiny checkpoint: rounds, captured steps, seeds, the shared prefix, the order of the goldens.

Captured steps run here on a tape that repeats recorded operators; CUDA and NPU graphs themselves need their devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from runtime.tape import Tape, frozen

from covo_npu.kernels.device import Readback, device_capture
from covo_npu.kernels.errors import BackendError
from covo_npu.runtime import CovoAudio, Engine, Sampling, Session, decode, engine, options
from covo_npu.runtime.decode import Decoder, step_bound
from covo_npu.runtime.engine import ContextError
from covo_npu.runtime.networks.cache import SharedPrefixes, allocate

Golden = Callable[[str], dict[str, np.ndarray]]
AUDIO = Path(__file__).parents[1] / "data" / "audio"
ENGLISH, CHINESE = AUDIO / "question_en_48k_24bit.wav", AUDIO / "question_zh_44k_stereo.wav"
DIALOGUES = (
    ("dialogue_fp32_two_rounds_a2ta", "a2ta"),
    ("dialogue_fp32_three_rounds_a2t", "a2t"),
    ("dialogue_fp32_long_a2ta", "a2ta"),
)
WARM = Sampling(temperature=0.8, top_k=50, top_p=0.9)


@pytest.fixture(scope="module")
def model(convert_tiny: Callable[[str], Path], device: str) -> CovoAudio:
    return CovoAudio.load(convert_tiny("float32"), device=device, dtype="float32", max_context=2048)


@pytest.fixture
def fresh(model: CovoAudio) -> Iterator[CovoAudio]:
    """The model with no prefix computed and no captures, and put back so."""
    yield model
    model.capture, model.prefixes = None, SharedPrefixes()


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies of a2ta are not spoken: the ids are what is looked at."""
    monkeypatch.setattr(options, "SPEAKS", ())


def answers(model: CovoAudio, questions: list[Path], mode: str = "a2t", **settings) -> list[list[int]]:
    chat = Session(model, mode=mode, **{"max_new_tokens": 24, **settings})
    return [chat.say(question).tokens for question in questions]


def decoder_of(model: CovoAudio) -> Decoder:
    cache = allocate(model.config.llm, 1, model.max_context, model.dtype, model.device)
    return Decoder(model.networks.llm, cache, model.capture)


def generate(decoder: Decoder, ids: torch.Tensor, embeddings: torch.Tensor, start: int, stop_id: int, limit: int):
    """Return the ids of a reply to a prompt whose last rows are missing in the cache: no engine in between."""
    hidden = decoder.fill(0, embeddings, start)
    tokens = decoder.begin(0, ids, hidden, start + len(embeddings), 0, Sampling()).tokens()
    while tokens[-1] != stop_id and len(tokens) < limit:
        tokens += decoder.step(1).tokens()
    return tokens


@pytest.mark.parametrize(("name", "mode"), DIALOGUES)
@pytest.mark.parametrize("form", ["eager", "captured", "chunked", "ahead"])
@torch.inference_mode()
def test_goldens_in_every_form(
    model: CovoAudio, golden: Golden, monkeypatch: pytest.MonkeyPatch, name: str, mode: str, form: str
) -> None:
    arrays = golden(name)
    tape = Tape() if form == "captured" else None
    monkeypatch.setattr(model, "capture", tape)
    if form == "chunked":
        monkeypatch.setattr(engine, "PREFILL_CHUNK", 100)
    rounds = range(sum(key.endswith("_tokens") for key in arrays))
    chat = Session(model, mode=mode, max_new_tokens=48)
    decoder = chat.engine._decoder
    decoder.runs_ahead = decoder.runs_ahead or form == "ahead"  # enqueue before reading, as an accelerator does
    found = [chat.say(AUDIO / Path(str(arrays[f"r{r}_audio"])).name).tokens for r in rounds]
    assert found == [arrays[f"r{r}_tokens"].tolist() for r in rounds]
    if tape:
        # Where steps run ahead, a reply that its stop token ends has had one more enqueued.
        ahead = sum(len(tokens) < 48 for tokens in found) if decoder.runs_ahead else 0
        assert tape.captures and tape.replays == sum(len(tokens) - 1 for tokens in found) + ahead


@torch.inference_mode()
def test_decoding_with_the_cache_equals_decoding_without(fresh: CovoAudio) -> None:
    """Without: the whole sequence is prefilled anew for each id."""
    llm = fresh.networks.llm
    ids = torch.randint(500, (60,), generator=torch.Generator().manual_seed(1)).to(fresh.device)
    expected = generate(decoder_of(fresh), ids, llm.embed(ids), 0, -1, 12)
    decoder, without, sequence = decoder_of(fresh), [], ids
    decoder.sampler.begin(0, ids, 0, Sampling())
    for _ in range(12):
        logits = llm.logits(decoder.fill(0, llm.embed(sequence), 0))
        token = decoder.sampler.next(logits, slice(0, 1)).clone()
        without.append(int(token))
        sequence = torch.cat((sequence, token))
    assert without == expected


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
def test_captured_steps_give_the_same_ids(
    fresh: CovoAudio, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "SMALLEST_BOUND", 340)
    settings = {"sampling": sampling, "max_new_tokens": 60, "seed": 3}
    questions = [ENGLISH, CHINESE, ENGLISH]
    whole = answers(fresh, questions, **settings)
    stop = next(token for token in whole[1] if token not in whole[0])  # ends the second reply early
    monkeypatch.setitem(fresh.tokenizer.special, "endoftext", stop)
    expected = answers(fresh, questions, **settings)
    assert len(expected[0]) == 60 > len(expected[1])
    fresh.capture = tape = Tape()
    assert answers(fresh, questions, **settings) == expected
    steps = sum(len(tokens) - 1 for tokens in expected)
    # Where steps run ahead, a reply that its stop token ends has had one more enqueued.
    ahead = sum(len(tokens) < 60 for tokens in expected) if fresh.device.type != "cpu" else 0
    assert tape.replays == steps + ahead > 0
    assert 2 <= tape.captures <= 3, "a bound each: the dialogue outgrows the first"


def test_no_more_captured_steps_are_kept_than_may_be(fresh: CovoAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not used for longest goes, and is captured again when it is needed."""
    monkeypatch.setattr(decode, "MOST_REPLAYS", 2)
    expected = [answers(fresh, [ENGLISH], sampling=Sampling(window=window)) for window in (3, 9, 17, 3)]
    fresh.capture = tape = Tape()
    running = Engine(fresh, 1)
    found = []
    for window in (17, 3, 9, 17, 17, 3):  # the buffers are as wide as any needs from the first one on
        chat = Session(fresh, mode="a2t", max_new_tokens=24, sampling=Sampling(window=window), engine=running)
        found.append([chat.say(ENGLISH).tokens])
        assert len(running._decoder._replays) <= 2
    assert found == [expected[i] for i in (2, 0, 1, 2, 2, 0)]
    assert tape.captures == 5


def test_the_tape_repeats_and_does_not_rerun() -> None:
    assert frozen(Tape()).item() == 2.0
    with pytest.raises(AssertionError, match="would wait"):
        Tape()(lambda: torch.ones(1).item())


def test_the_bound_of_a_captured_step_covers_every_length() -> None:
    bounds = [step_bound(longest, 1500) for longest in range(1, 1501)]
    assert set(bounds) == {512, 1024, 1500}
    assert all(bound >= longest for longest, bound in enumerate(bounds, 1))


def test_graphs_are_refused_where_there_are_none() -> None:
    assert device_capture("auto", torch.device("cpu")) is None
    assert device_capture("off", torch.device("cuda")) is None
    with pytest.raises(BackendError, match="device cpu has no graphs to capture"):
        device_capture("on", torch.device("cpu"))
    with pytest.raises(BackendError, match="graph must be auto, on or off"):
        device_capture("yes", torch.device("cpu"))


@pytest.mark.parametrize("setting", ["TASK_QUEUE_ENABLE=2", "ASCEND_LAUNCH_BLOCKING=1"])
def test_what_forbids_graphs_is_known_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, setting: str
) -> None:
    monkeypatch.setattr(torch, "npu", FakeDevice(), raising=False)
    npu: Any = SimpleNamespace(type="npu")
    for choice in ("auto", "on"):
        assert device_capture(choice, npu).required == (choice == "on")
    monkeypatch.setenv(*setting.split("="))
    with pytest.raises(BackendError, match=f"captures no graphs under {setting}: unset it, or --graph off"):
        device_capture("on", npu)
    assert device_capture("auto", npu) is None and setting in caplog.text
    monkeypatch.setenv(setting.partition("=")[0], "0")
    assert device_capture("on", npu)


def test_steps_stay_eager_where_masks_do_not_hold(
    fresh: CovoAudio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answers(fresh, [ENGLISH])
    monkeypatch.setattr(decode, "masked_attention_error", lambda kernels, q, cache, bound: 0.5)
    fresh.capture = tape = Tape()
    with pytest.raises(BackendError, match=r"under a mask of 1024 rows differs by 0\.5 .* again with --graph off"):
        answers(fresh, [ENGLISH])
    tape.required = False
    assert answers(fresh, [ENGLISH]) == expected and not tape.captures
    assert "launched one by one" in caplog.text


class FakeDevice:
    """Stands where torch.cuda does and writes down the calls that a capture makes."""

    __name__ = "torch.cuda"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append(name)

    def memory_reserved(self) -> int:
        return 100 * len(self.calls)

    def current_stream(self) -> FakeDevice:
        return self

    Stream = current_stream

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.calls.append(str(device))
        yield

    @contextmanager
    def stream(self, side: Any) -> Iterator[None]:
        self.calls.append("side stream")
        yield

    @contextmanager
    def graph(self, graph: Any, pool: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # speech goes on in its own thread
        self.calls.append("capture")
        try:
            yield
        except RuntimeError:  # ending a capture that has failed raises an error of its own, without naming the first
            raise RuntimeError("the capture was invalidated")  # noqa: B904

    def CUDAGraph(self) -> Any:  # noqa: N802 - torch's name
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))

    NPUGraph = CUDAGraph


def test_a_step_is_warmed_up_aside_and_captured_by_default_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    monkeypatch.setattr(torch, "cuda", device)
    capture = device_capture("auto", torch.device("cuda", 1))
    assert capture is not None
    replay = capture(lambda: device.calls.append("work"))
    replay()
    kinds = ("cuda:1", "side stream", "capture", "work", "wait_stream", "replay")
    told = [call for call in device.calls if call in kinds]
    assert told == ["cuda:1", "wait_stream", "side stream", "work", "wait_stream", "capture", "work", "replay"]
    assert capture.report.graphs == 1 and capture.report.bytes > 0


def test_a_step_that_cannot_be_captured_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    monkeypatch.setattr(torch, "cuda", device)
    capture = device_capture("on", torch.device("cuda"))
    assert capture is not None

    def work() -> None:
        if device.calls[-1] == "capture":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(
        BackendError, match=r"cuda: work could not .* \(operation not permitted .*\): start again with --graph off"
    ):
        capture(work)


def test_the_system_prompt_is_computed_once(fresh: CovoAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = fresh.networks.llm
    filled: list[int] = []
    fill = llm.fill
    monkeypatch.setattr(llm, "fill", lambda x, *rest: filled.append(x.shape[0]) or fill(x, *rest))
    first = answers(fresh, [ENGLISH, CHINESE])
    assert len(filled) == 3 and filled[0] > filled[1]  # the prefix, then the rest of each round
    filled.clear()
    second = answers(fresh, [ENGLISH, CHINESE])
    assert len(filled) == 2
    assert second == first
    filled.clear()
    other = answers(fresh, [ENGLISH], system="Answer in one word.")
    assert len(filled) == 2 and other[0] != first[0]
    assert answers(fresh, [ENGLISH]) == first[:1]


def test_a_copied_prefix_is_the_computed_one_bit_for_bit(fresh: CovoAudio) -> None:
    chats = [Session(fresh, mode="a2t", max_new_tokens=5) for _ in range(2)]
    for chat in chats:
        chat.say(CHINESE)
    caches = [chat.engine._decoder.cache for chat in chats]
    pairs = zip(*(cache.read(0, chats[0].dialogue.length) for cache in caches), strict=True)
    assert all(torch.equal(computed, copied) for computed, copied in pairs)


def test_dialogues_do_not_meet(fresh: CovoAudio) -> None:
    """Two dialogues told in turns, in one slot, are the two told one after the other."""
    expected = [answers(fresh, [ENGLISH, CHINESE]), answers(fresh, [CHINESE, ENGLISH])]
    shared = Engine(fresh, 1)
    chats = [Session(fresh, mode="a2t", max_new_tokens=24, engine=shared) for _ in range(2)]
    found: list[list[list[int]]] = [[], []]
    for pair in ((ENGLISH, CHINESE), (CHINESE, ENGLISH)):
        for chat, question, tokens in zip(chats, pair, found, strict=True):
            tokens.append(chat.say(question).tokens)
    assert found == expected


def test_seeds_repeat_and_differ(fresh: CovoAudio) -> None:
    first = answers(fresh, [ENGLISH, CHINESE], sampling=WARM, seed=5)
    assert answers(fresh, [ENGLISH, CHINESE], sampling=WARM, seed=5) == first
    assert answers(fresh, [ENGLISH, CHINESE], sampling=WARM, seed=9) != first


def test_a_full_context_ends_the_reply_and_then_the_dialogue(fresh: CovoAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = Session(fresh, mode="a2t", max_new_tokens=1).say(ENGLISH).prompt_tokens
    monkeypatch.setattr(fresh, "max_context", prompt + 10)
    chat = Session(fresh, mode="a2t", max_new_tokens=2048)
    reply = chat.say(ENGLISH)
    assert (len(reply.tokens), reply.stop_reason, chat.dialogue.length) == (11, "context", prompt + 10)
    monkeypatch.setattr(fresh, "max_context", 2048)
    assert answers(fresh, [ENGLISH], max_new_tokens=11) == [reply.tokens]
    monkeypatch.setattr(fresh, "max_context", prompt + 10)
    with pytest.raises(ContextError, match="the dialogue has"):
        chat.say(ENGLISH)
    assert chat.dialogue.rounds == 1


def test_a_readback_is_not_overwritten_by_the_next_step() -> None:
    ids = torch.tensor([4, 5])
    readback = Readback(ids)
    ids.fill_(9)
    assert readback.tokens() == [4, 5]
