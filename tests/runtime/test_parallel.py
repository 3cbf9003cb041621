"""Tensor-parallel ranks as processes over gloo: what they compute against the goldens and against one rank.

Logits: by float32's bound for the goldens, whose sums have another order as well. Tokens: equal, one by one.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import four_kv_heads
import numpy as np
import pytest
import torch
from runtime.tape import Tape, optional_tape
from torch import Tensor

from covo_npu.kernels.device import Readback
from covo_npu.runtime import CovoAudio, Engine, Sampling, Session, options, rank, ranks
from covo_npu.runtime.audio import prepare, read_audio
from covo_npu.runtime.checkpoint.format import CheckpointError, read_manifest
from covo_npu.runtime.engine import Dialogue
from covo_npu.runtime.events import Done, Failed
from covo_npu.runtime.options import Ask
from covo_npu.runtime.parallel import ALONE, Collectives
from covo_npu.runtime.ranks import RankError

Golden = Callable[[str], dict[str, np.ndarray]]
AUDIO = Path(__file__).parents[1] / "data" / "audio"
ENGLISH, CHINESE = AUDIO / "question_en_48k_24bit.wav", AUDIO / "question_zh_44k_stereo.wav"
ODD = Path(__file__).with_name("odd_rank.py")
DIALOGUES = (
    ("dialogue_fp32_two_rounds_a2ta", "a2ta"),
    ("dialogue_fp32_three_rounds_a2t", "a2t"),
    ("dialogue_fp32_long_a2ta", "a2ta"),
)
WARM = Sampling(temperature=0.8, top_k=50, top_p=0.9)


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies of a2ta are not spoken: the ids are what is looked at."""
    monkeypatch.setattr(options, "SPEAKS", ())


def converted(source: Path, folder: Path, tp: int, *options: str) -> Path:
    command = [Path(sys.executable).with_name("covo-convert"), "--src", source, "--dst", folder, "--tp", str(tp)]
    subprocess.run([*command, "--dtype", "float32", *options], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def two_ranks(convert_tiny: Callable[..., Path]) -> Path:
    """The reference pack, converted for two ranks."""
    return convert_tiny("float32", 2)


@pytest.fixture(scope="module")
def opened() -> Iterator[list[CovoAudio]]:
    """The model that tests share, from the first on that asks for it until one wants this process without ranks."""
    models: list[CovoAudio] = []
    yield models
    for model in models:
        model.close()


@pytest.fixture
def model(opened: list[CovoAudio], two_ranks: Path) -> CovoAudio:
    """Two ranks."""
    if not opened:
        opened.append(CovoAudio.load(two_ranks, tp=2, device="cpu", max_context=2048))
    return opened[0]


def recorded_logits(model: CovoAudio, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list that fills with the logits [V] of slot 0 of every step of rank 0 from now on."""
    steps: list[Tensor] = []
    head = model.networks.llm.logits

    def record(hidden: Tensor) -> Tensor:
        logits = head(hidden)
        steps.append(logits[0])
        return logits

    monkeypatch.setattr(model.networks.llm, "logits", record)
    return steps


def answers(model: CovoAudio, num_slots: int, ask: Ask) -> list[list[list[int]]]:
    """Return the tokens of five dialogues of two rounds side by side: slots are shared, rows parked and restored."""
    pairs = [[prepare(*read_audio(path)) for path in paths] for paths in ((ENGLISH, CHINESE), (CHINESE, ENGLISH))]
    engine, dialogues = Engine(model, num_slots), [Dialogue() for _ in range(5)]
    told = []
    for turn in (0, 1):
        tickets = [engine.submit(d, pairs[i % 2][turn], ask) for i, d in enumerate(dialogues)]
        replies = {}
        while len(replies) < len(tickets):
            for event in engine.step():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Done):
                    replies[event.ticket] = event.reply.tokens
        told.append([replies[ticket] for ticket in tickets])
    return told


@pytest.mark.parametrize(("name", "mode"), DIALOGUES)
def test_golden_dialogues_token_for_token(
    model: CovoAudio, golden: Golden, monkeypatch: pytest.MonkeyPatch, name: str, mode: str
) -> None:
    expected = golden(name)
    steps = recorded_logits(model, monkeypatch)
    chat = Session(model, mode=mode, max_new_tokens=48)
    for r in range(sum(key.endswith("_tokens") for key in expected)):
        steps.clear()
        reply = chat.say(AUDIO / Path(str(expected[f"r{r}_audio"])).name)
        logits = torch.as_tensor(expected[f"r{r}_logits"])
        assert steps[0].shape == (model.config.llm.vocab_size,)
        assert (torch.stack(steps[: len(logits)]) - logits).abs().max() <= 1e-4 * logits.std()
        assert reply.tokens == expected[f"r{r}_tokens"].tolist(), f"round {r}"


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_batches_answer_as_one_rank_does(
    model: CovoAudio, convert_tiny: Callable[[str], Path], num_slots: int, sampling: Sampling
) -> None:
    ask = Ask("a2t", max_new_tokens=16, sampling=sampling, seed=5)
    alone = CovoAudio.load(convert_tiny("float32"), device="cpu", max_context=2048)
    assert answers(model, num_slots, ask) == answers(alone, num_slots, ask)


def test_a_token_takes_two_collectives_a_layer_and_one(model: CovoAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.leader is not None
    steps, counts, tally = recorded_logits(model, monkeypatch), [], model.leader.tally
    decoder = model.decoder(2)
    for slot in (0, 1):
        ids = torch.arange(7)
        hidden = decoder.fill(slot, model.networks.llm.embed(ids), 0)
        decoder.begin(slot, ids, hidden, 7, 0, Sampling())
    for _ in range(4):
        before = tally.collectives
        decoder.step(2)
        counts.append(tally.collectives - before)
    assert counts == [2 * model.config.llm.num_layers + 1] * 4 and len(steps) == 6


def test_each_rank_loads_its_own_file_only(model: CovoAudio, two_ranks: Path) -> None:
    manifest, placed = read_manifest(two_ranks), model.report.placed
    assert manifest.ranks == ("llm-rank0of2.safetensors", "llm-rank1of2.safetensors")
    sizes = {path.name: path.stat().st_size for path in two_ranks.iterdir()}
    speech = sizes["encoder.safetensors"] + sizes["token2wav.safetensors"]
    assert [(p.rank, p.bytes) for p in placed] == [
        (0, sizes[manifest.ranks[0]] + speech),
        (1, sizes[manifest.ranks[1]]),
    ]
    assert manifest.ranks[1] not in model.weights.files


def test_whole_rows_of_all_heads_come_back_from_the_ranks(
    model: CovoAudio, convert_tiny: Callable[[str], Path]
) -> None:
    """What is parked is what one rank would park, so it can be kept, and given to ranks again."""
    alone = CovoAudio.load(convert_tiny("float32"), device="cpu", max_context=2048)
    found = []
    for each in (model, alone):
        decoder = each.decoder(2)
        decoder.fill(0, each.networks.llm.embed(torch.arange(50)), 0)
        rows = decoder.park(0, 50)
        decoder.restore(1, rows)
        again = decoder.park(1, 50)
        assert all(torch.equal(a, b) for a, b in zip(rows.tensors, again.tensors, strict=True))
        found.append(rows.tensors)
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_a_second_model_with_ranks_is_refused_while_the_first_is_open(model: CovoAudio, two_ranks: Path) -> None:
    with pytest.raises(RankError, match="has tensor-parallel ranks already"):
        CovoAudio.load(two_ranks, tp=2, device="cpu")


@pytest.mark.parametrize(
    ("tp", "says"), [(1, "for 2 tensor-parallel ranks, asked for 1: load it with --tp 2"), (4, "4")]
)
def test_another_number_of_ranks_than_converted_is_refused(two_ranks: Path, tp: int, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        CovoAudio.load(two_ranks, tp=tp, device="cpu")


@pytest.mark.parametrize(
    ("raised", "then", "says"),
    [
        (MemoryError, RankError, "rank 0 of 2: MemoryError"),
        (KeyboardInterrupt, KeyboardInterrupt, "the ranks were interrupted in a step"),
    ],
)
def test_after_a_step_that_broke_off_nothing_is_computed(
    no_ranks: None, two_ranks: Path, monkeypatch: pytest.MonkeyPatch,
    raised: type[BaseException], then: type[BaseException], says: str,
) -> None:  # fmt: skip
    def broken(group: Collectives, x: Tensor) -> Tensor:
        raise raised

    with CovoAudio.load(two_ranks, tp=2, device="cpu") as model:
        chat = Session(model, mode="a2t", max_new_tokens=2)
        with monkeypatch.context() as patch, pytest.raises(then):
            patch.setattr(Collectives, "all_reduce", broken)
            chat.say(ENGLISH)
        with pytest.raises(RankError, match=says):
            chat.say(ENGLISH)


def test_what_an_engine_leaves_is_freed_with_the_next_command(
    model: CovoAudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector drops it, in whatever thread and whatever that holds: nothing is sent from there."""
    told: list[tuple[str, int]] = []
    tell = ranks.Link.tell

    def noted(link: ranks.Link, message: ranks.Message) -> None:
        if "do" in message:
            told.append((message["do"], message["handle"]))
        tell(link, message)

    monkeypatch.setattr(ranks.Link, "tell", noted)
    gc.collect()  # of other tests
    engine = Engine(model, 2)
    [*_, (name, handle)] = told
    told.clear()
    del engine
    gc.collect()
    assert name == "open" and not told
    Session(model, mode="a2t", max_new_tokens=2).say(ENGLISH)
    assert told[:2] == [("close", handle), ("open", handle + 1)]


def test_a_closed_model_says_so(no_ranks: None, two_ranks: Path) -> None:
    with CovoAudio.load(two_ranks, tp=2, device="cpu") as model:
        chat = Session(model, mode="a2t", max_new_tokens=2)
    with pytest.raises(RankError, match="this model was closed"):
        chat.say(ENGLISH)


def test_one_rank_moves_nothing() -> None:
    x = torch.ones(2, 3)
    assert all(y is x for y in (ALONE.all_reduce(x), ALONE.join(x, 1, 3), ALONE.broadcast(x)))


# From here on the ranks of the fixture above are gone.


@pytest.fixture
def no_ranks(opened: list[CovoAudio]) -> None:
    while opened:
        opened.pop().close()


def odd_ranks(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Let the other ranks be those of odd_rank.py."""
    usual = rank.command

    def command(*arguments: object) -> list[str]:
        *_, path, options = usual(*arguments)
        return [sys.executable, str(ODD), what, path, options]

    monkeypatch.setattr(rank, "command", command)
    monkeypatch.setenv("PYTHONPATH", str(ODD.parents[1]), prepend=os.pathsep)


@pytest.mark.slow
def test_captured_steps_hold_their_collectives(
    no_ranks: None, two_ranks: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd_ranks(monkeypatch, "taped")
    name, mode = DIALOGUES[0]
    expected = golden(name)
    with CovoAudio.load(two_ranks, tp=2, device="cpu", max_context=2048) as model:
        model.capture = tape = Tape()
        chat = Session(model, mode=mode, max_new_tokens=48)
        for r in range(sum(key.endswith("_tokens") for key in expected)):
            reply = chat.say(AUDIO / Path(str(expected[f"r{r}_audio"])).name)
            assert reply.tokens == expected[f"r{r}_tokens"].tolist()
    assert tape.captures and tape.replays > 40


def test_ranks_capture_steps_together_or_not_at_all(
    no_ranks: None, two_ranks: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were only one of them to capture, its warm-up would wait for the other's collectives."""
    odd_ranks(monkeypatch, "unmasked")
    name, mode = DIALOGUES[0]
    expected = golden(name)
    with CovoAudio.load(two_ranks, tp=2, device="cpu", max_context=2048) as model:
        model.capture = tape = optional_tape()
        reply = Session(model, mode=mode, max_new_tokens=48).say(AUDIO / Path(str(expected["r0_audio"])).name)
    assert reply.tokens == expected["r0_tokens"].tolist() and not tape.captures


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(), ("--weights", "int8+head")], ids=["float32", "int8+head"])
def test_four_ranks_answer_as_one_does(
    no_ranks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: tuple[str, ...]
) -> None:
    source, ask = four_kv_heads.write(tmp_path / "source"), Ask("a2t", max_new_tokens=16)
    found, logits = [], []
    for tp in (1, 4):
        folder = converted(source, tmp_path / f"tp{tp}", tp, *weights)
        with CovoAudio.load(folder, tp=tp, device="cpu", max_context=2048) as model:
            assert model.report.weights == (weights[1] if weights else "float32")
            logits.append(recorded_logits(model, monkeypatch))
            found.append(answers(model, 2, ask))
            assert len({placed.rank for placed in model.report.placed}) == tp
    assert found[0] == found[1]
    one, four = (torch.stack(steps) for steps in logits)
    assert (one - four).abs().max() <= 1e-4 * one.std()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("hangs", "rank 1 of 2 hangs: the others wait for it"),
        ("fails", "rank 1 of 2: out of memory, says the test"),
        ("late", "rank 1 of 2: out of memory, says the test"),
    ],
)
def test_a_rank_that_fails_or_hangs_is_named(
    no_ranks: None, two_ranks: Path, monkeypatch: pytest.MonkeyPatch, what: str, says: str
) -> None:
    """That all are ended is for test_ranks.py: this process is pytest's."""
    odd_ranks(monkeypatch, what)
    monkeypatch.setattr("covo_npu.runtime.ranks.leave", lambda message: None)
    children = []
    with pytest.raises(RankError, match=says), CovoAudio.load(two_ranks, tp=2, device="cpu") as model:
        assert model.leader is not None
        children += model.leader._children.values()
        Session(model, mode="a2t").say(ENGLISH)
    assert all(child.poll() is not None for child in children) and (children or what == "late")


@pytest.mark.slow
def test_ids_that_never_come_end_all(no_ranks: None, two_ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, which begins a step when it is called: what hangs there is waited for where ids are read."""
    monkeypatch.setattr(ranks, "leave", lambda message: None)
    monkeypatch.setattr(ranks, "STANDSTILL_S", 2.0)
    with CovoAudio.load(two_ranks, tp=2, device="cpu") as model:
        leader = model.leader
        assert leader is not None

        def tokens(readback: Readback) -> list[int]:
            with leader._changed:
                leader._changed.wait_for(lambda: leader.fault, timeout=20.0)
            raise RuntimeError("the device gave up")

        monkeypatch.setattr(Readback, "tokens", tokens)
        with pytest.raises(RankError, match="of 2 hangs: the others wait for it"):
            Session(model, mode="a2t").say(ENGLISH)
