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

from covo_npu.kernels.errors import BackendError
from covo_npu.runtime import CovoAudio, Sampling, qwen2
from covo_npu.runtime.decode import Decoder, Readback, SharedPrefixes, generate, step_bound
from covo_npu.runtime.graph import device_capture
from covo_npu.runtime.session import ContextError

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
    model.capture, model.prefixes = None, SharedPrefixes(model.networks.llm)


def answers(model: CovoAudio, questions: list[Path], mode: str = "a2t", **settings) -> list[list[int]]:
    settings = {"sampling": Sampling(), "max_new_tokens": 24, **settings}
    chat = model.session(mode=mode, **settings)
    chat._speech = False  # the ids are what is looked at
    return [chat.say(question).tokens for question in questions]


def replayed(model: CovoAudio, arrays: dict[str, np.ndarray], decoder: Decoder, stop_id: int) -> list[list[int]]:
    """Return the ids of every round of a golden, decoded from its prompt ids: no session in between."""
    llm, length, found = model.networks.llm, 0, []
    placeholder = model.manifest.special_tokens["cAUDIO"]
    for r in range(sum(key.endswith("_tokens") for key in arrays)):
        ids = torch.tensor(arrays[f"r{r}_input_ids"])
        waveform = model.session()._waveform(AUDIO / Path(str(arrays[f"r{r}_audio"])).name, None)
        embeddings, spots = llm.embed(ids.to(model.device)), ids == placeholder
        embeddings[spots.to(model.device)] = model.encode(waveform)[: int(spots.sum())]
        first = decoder.begin(0, ids.to(model.device), embeddings, length, 0)
        found.append(list(generate(decoder, first, stop_id, 48)))
        length += len(ids) + len(found[-1]) - 1
    return found


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
        monkeypatch.setattr(qwen2, "PREFILL_CHUNK", 100)
    decoder = model.decoder(Sampling())
    decoder.runs_ahead = decoder.runs_ahead or form == "ahead"  # enqueue before reading, as an accelerator does
    stop_id = model.manifest.special_tokens["im_end" if mode == "a2ta" else "endoftext"]
    found = replayed(model, arrays, decoder, stop_id)
    assert found == [arrays[f"r{r}_tokens"].tolist() for r in range(len(found))]
    if tape:
        assert tape.captures and tape.replays == sum(len(tokens) - 1 for tokens in found)


@torch.inference_mode()
def test_decoding_with_the_cache_equals_decoding_without(fresh: CovoAudio) -> None:
    """Without: the whole sequence is prefilled anew for each id."""
    llm, sampling = fresh.networks.llm, Sampling()
    ids = torch.randint(500, (60,), generator=torch.Generator().manual_seed(1)).to(fresh.device)
    decoder = fresh.decoder(sampling)
    expected = list(generate(decoder, decoder.begin(0, ids, llm.embed(ids), 0, 0), -1, 12))
    decoder, without, sequence = fresh.decoder(sampling), [], ids
    decoder.sampler.begin(0, ids, 0)
    for _ in range(12):
        logits = llm.prefill(llm.embed(sequence), decoder.cache, 0, 0)
        token = decoder.sampler.next(logits, slice(0, 1)).clone()
        without.append(int(token))
        sequence = torch.cat((sequence, token))
    assert without == expected


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
def test_captured_steps_give_the_same_ids(fresh: CovoAudio, sampling: Sampling) -> None:
    questions = [ENGLISH, CHINESE, ENGLISH]
    expected = answers(fresh, questions, sampling=sampling, max_new_tokens=300, seed=3)
    fresh.capture = tape = Tape()
    assert answers(fresh, questions, sampling=sampling, max_new_tokens=300, seed=3) == expected
    steps = sum(len(tokens) - 1 for tokens in expected)
    # Where steps run ahead, a reply that its stop token ends has had one more enqueued.
    ahead = sum(len(tokens) < 300 for tokens in expected) if fresh.device.type != "cpu" else 0
    assert tape.replays == steps + ahead > 0
    assert 1 <= tape.captures <= 3  # bounds of 1024 and 2048 rows, one slot


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
    npu = SimpleNamespace(type="npu")  # until hardware has confirmed its graphs
    assert device_capture("auto", npu) is None  # type: ignore[arg-type]
    assert device_capture("off", torch.device("cuda")) is None
    with pytest.raises(BackendError, match="device cpu has no graphs to capture"):
        device_capture("on", torch.device("cpu"))
    with pytest.raises(BackendError, match="graph must be auto, on or off"):
        device_capture("yes", torch.device("cpu"))


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
    def stream(self, side: Any) -> Iterator[None]:
        self.calls.append("side stream")
        yield

    @contextmanager
    def graph(self, graph: Any, pool: Any) -> Iterator[None]:
        self.calls.append("capture")
        yield

    def CUDAGraph(self) -> Any:  # noqa: N802 - torch's name
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))


def test_a_step_is_warmed_up_aside_and_captured_by_default_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    monkeypatch.setattr(torch, "cuda", device)
    capture = device_capture("auto", torch.device("cuda"))
    assert capture is not None
    replay = capture(lambda: device.calls.append("work"))
    replay()
    told = [call for call in device.calls if call in ("side stream", "capture", "work", "wait_stream", "replay")]
    assert told == ["wait_stream", "side stream", "work", "wait_stream", "capture", "work", "replay"]
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
        BackendError, match=r"cuda: a decode step .* \(operation not permitted .*\): run with --graph off"
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
    chats = [fresh.session(mode="a2t", max_new_tokens=5) for _ in range(2)]
    for chat in chats:
        chat.say(CHINESE)
    caches = [chat._decoder.cache for chat in chats]
    pairs = zip(*(cache.read(0, chats[0].length) for cache in caches), strict=True)
    assert all(torch.equal(computed, copied) for computed, copied in pairs)


def test_dialogues_do_not_meet(fresh: CovoAudio) -> None:
    """Two dialogues told in turns are the two told one after the other."""
    expected = [answers(fresh, [ENGLISH, CHINESE]), answers(fresh, [CHINESE, ENGLISH])]
    chats = [fresh.session(mode="a2t", sampling=Sampling(), max_new_tokens=24) for _ in range(2)]
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
    prompt = fresh.session(mode="a2t", sampling=Sampling(), max_new_tokens=1).say(ENGLISH).prompt_tokens
    monkeypatch.setattr(fresh, "max_context", prompt + 10)
    chat = fresh.session(mode="a2t", sampling=Sampling(), max_new_tokens=2048)
    reply = chat.say(ENGLISH)
    assert (len(reply.tokens), reply.stop_reason, chat.length) == (11, "context", prompt + 10)
    monkeypatch.setattr(fresh, "max_context", 2048)
    assert answers(fresh, [ENGLISH], max_new_tokens=11) == [reply.tokens]
    monkeypatch.setattr(fresh, "max_context", prompt + 10)
    with pytest.raises(ContextError, match="the dialogue has"):
        chat.say(ENGLISH)
    assert chat.rounds == 1


def test_a_readback_is_not_overwritten_by_the_next_step() -> None:
    ids = torch.tensor([4, 5])
    readback = Readback(ids)
    ids.fill_(9)
    assert readback.tokens() == [4, 5]
