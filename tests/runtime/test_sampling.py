"""Penalties and filters against upstream's scores, rows computed by hand, and transformers' processors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from covo_npu.runtime import sampling as module
from covo_npu.runtime.options import Sampling
from covo_npu.runtime.sampling import Sampler, Settings, filtered, num_candidates, penalised

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0)
WARM = Sampling(temperature=0.5, top_k=50, top_p=0.9)


def spread_out(kept: Tensor, candidates: Tensor, vocab_size: int) -> Tensor:
    return torch.full((kept.shape[0], vocab_size), -torch.inf).scatter(1, candidates, kept)


def penalised_by(logits: Tensor, seen: Tensor, recent: Tensor, sampling: Sampling) -> Tensor:
    return penalised(logits, seen, recent, Settings.of([sampling] * len(logits), logits.shape[-1]))


def filtered_by(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    size = scores.shape[-1]
    return filtered(scores, Settings.of([sampling] * len(scores), size), num_candidates(sampling, size))


def seen_mask(ids: Tensor, vocab_size: int) -> Tensor:
    return torch.zeros(ids.shape[0], vocab_size, dtype=torch.bool).scatter(1, ids, True)


def logits_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 4


def equal_with_gaps(found: Tensor, expected: Tensor) -> bool:
    """Whether -inf stands in the same places and the rest agrees to float32 rounding."""
    gaps = expected.isinf()
    return torch.equal(found.isinf(), gaps) and torch.allclose(found[~gaps], expected[~gaps], rtol=1e-6, atol=1e-6)


def test_scores_equal_upstreams(golden: Callable[[str], dict[str, np.ndarray]]) -> None:
    arrays = golden("sampling_scores")
    logits, expected = torch.tensor(arrays["logits"]), torch.tensor(arrays["processed"])
    ids = torch.tensor(arrays["input_ids"]).expand(len(logits), -1)
    vocab_size = logits.shape[1]

    def ours(sampling: Sampling, window: Tensor) -> Tensor:
        scores = penalised_by(logits, seen_mask(ids, vocab_size), window, sampling)
        return spread_out(*filtered_by(scores, sampling), vocab_size)

    assert equal_with_gaps(ours(WARM, ids[:, -8:]), expected)
    mutants = (  # the window's ids are not among what stays here: the rows by hand and the dialogues see it
        ours(Sampling(0.5, 50, 0.9, repetition_penalty=1.0), ids[:, -8:]),
        ours(Sampling(0.5, 50, 0.95), ids[:, -8:]),
        ours(Sampling(0.5, 3, 0.9), ids[:, -8:]),
    )
    assert [equal_with_gaps(mutant, expected) for mutant in mutants] == [False] * 3


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0, 0.0, 5.0]])
    seen = torch.tensor([[True, True, True, True, True, False]])
    recent = torch.tensor([[2, 2, 3]])  # once per distinct id, on top of the other penalty
    sampling = Sampling(repetition_penalty=2.0, window_penalty=4.0)
    assert penalised_by(logits, seen, recent, sampling).tolist() == [[1.0, -4.0, 0.375, -24.0, 0.0, 5.0]]
    rewarding = Sampling(repetition_penalty=0.5, window_penalty=1.0)
    assert penalised_by(logits, seen, recent, rewarding).tolist() == [[4.0, -1.0, 6.0, -1.5, 0.0, 5.0]]
    assert logits.tolist() == [[2.0, -2.0, 3.0, -3.0, 0.0, 5.0]]


def test_repetition_penalty_equals_transformers() -> None:
    logits, ids = logits_of(1, 4, 97), torch.randint(97, (4, 30), generator=torch.Generator().manual_seed(2))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits)
    sampling = Sampling(repetition_penalty=1.3, window_penalty=1.0)
    assert torch.allclose(penalised_by(logits, seen_mask(ids, 97), ids[:, -8:], sampling), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(50, 0.9), (5, 1.0), (1, 0.5), (0, 0.7), (0, 1.0), (400, 0.3), (40, 1e-6)]
)
def test_filters_equal_transformers(top_k: int, top_p: float) -> None:
    logits = logits_of(3, 5, 300)
    expected = logits / 0.7
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = spread_out(*filtered_by(logits, Sampling(0.7, top_k, top_p)), 300)
    assert equal_with_gaps(found, expected)


def test_what_ties_with_the_last_of_the_top_k_stays() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 2.0, 2.0, 1.0, 2.0, 0.0]])
    found = spread_out(*filtered_by(logits, Sampling(1.0, 3, 1.0)), 8)
    assert torch.equal(found, TopKLogitsWarper(3)(None, logits))
    assert int(found.isfinite().sum()) == 6


def tokens(sampler: Sampler, logits: Tensor, slot: int = 0) -> list[int]:
    found = []
    for row in logits:
        slots = slice(slot, slot + 1)
        sampler.prepare(slots)
        found.append(int(sampler.next(row[None], slots)))
    return found


def started(sampling: Sampling, slots: int, vocab_size: int, seeds: dict[int, int]) -> Sampler:
    sampler = Sampler(slots, vocab_size, CPU)
    for slot, seed in seeds.items():
        sampler.begin(slot, torch.tensor([slot + 1, 2, 3]), seed, sampling)
    return sampler


def test_greedy_penalises_what_it_said_itself() -> None:
    """Two candidates of nearly equal score: once said, one falls behind the other, and what the prompt says counts."""
    sampler = started(Sampling(repetition_penalty=1.1, window_penalty=1.05, window=1), 1, 8, {0: 0})
    row = torch.tensor([0.0, 9.6, 0.0, 0.0, 10.0, 9.7, 0.0, 0.0])  # id 1 is in the prompt
    assert tokens(sampler, row.expand(6, -1)) == [4, 5, 4, 5, 4, 5]
    assert tokens(started(Sampling(window=0), 1, 8, {0: 0}), row.expand(3, -1)) == [4, 5, 4]


def test_a_new_round_forgets_the_old_one() -> None:
    sampler = started(GREEDY, 1, 8, {0: 0})
    row = torch.tensor([0.0, 0.0, 0.0, 0.0, 10.0, 9.9, 0.0, 0.0])
    first = tokens(sampler, row[None])
    sampler.begin(0, torch.tensor([1, 2, 3]), 0, GREEDY)
    assert tokens(sampler, row[None]) == first == [4]


@pytest.mark.parametrize("sampling", [WARM, Sampling(1.3, 0, 1.0)], ids=["top-k", "all"])
def test_the_seed_decides_and_neighbours_do_not(sampling: Sampling) -> None:
    logits = logits_of(7, 600, 300) * 0.3  # more steps than a block of noise holds
    alone = tokens(started(sampling, 1, 300, {0: 11}), logits)
    assert alone == tokens(started(sampling, 1, 300, {0: 11}), logits)
    assert alone != tokens(started(sampling, 1, 300, {0: 12}), logits)

    batch = Sampler(3, 300, CPU)
    for slot, seed in ((0, 5), (1, 11), (2, 6)):
        batch.begin(slot, torch.tensor([1, 2, 3]), seed, sampling)
    together = []
    for step, row in enumerate(logits):
        if step == 300:
            batch.move(1, 0)
        width = 3 if step < 300 else 1
        batch.prepare(slice(0, width))
        together.append(int(batch.next(row.expand(width, -1), slice(0, width))[1 if step < 300 else 0]))
    assert together == alone


MIXED = (
    GREEDY,
    WARM,
    Sampling(1.2, 0, 0.8, window=3, window_penalty=1.5),
    Sampling(0.7, 5, 1.0, repetition_penalty=1.3, window=0),
    Sampling(0.0, repetition_penalty=1.4, window=20, window_penalty=1.2),
)


def test_slots_with_settings_of_their_own_sample_as_if_alone() -> None:
    """Slots join one after the other, so that the buffers widen in the middle of rounds."""
    logits = logits_of(9, 400, len(MIXED), 300) * 0.3
    batch, together = Sampler(len(MIXED), 300, CPU), [[] for _ in MIXED]
    for step, rows in enumerate(logits):
        width = min(len(MIXED), step // 20 + 1)
        if step % 20 == 0 and step < 20 * len(MIXED):
            batch.begin(width - 1, torch.tensor([1, 2, 3]), 7 + width, MIXED[width - 1])
        batch.prepare(slice(0, width))
        for ids, token in zip(together, batch.next(rows[:width], slice(0, width)).tolist()):
            ids.append(token)
    for slot, sampling in enumerate(MIXED):
        alone = Sampler(1, 300, CPU)
        alone.begin(0, torch.tensor([1, 2, 3]), 8 + slot, sampling)
        assert tokens(alone, logits[20 * slot :, slot]) == together[slot]


def test_a_greedy_slot_stays_beside_sampled_ones_for_as_long_as_it_likes() -> None:
    """It uses no noise: its place in it stays where it is, in a slot that a sampled round has left behind, too."""
    logits = logits_of(10, 900, 300) * 0.3  # more than three blocks of noise
    alone = [tokens(started(sampling, 1, 300, {0: 5}), logits) for sampling in (GREEDY, WARM)]
    batch = started(WARM, 2, 300, {0: 4, 1: 5})
    batch.prepare(slice(0, 2))
    batch.next(logits[:2], slice(0, 2))
    batch.begin(0, torch.tensor([1, 2, 3]), 5, GREEDY)
    batch.begin(1, torch.tensor([1, 2, 3]), 5, WARM)
    together: list[list[int]] = []
    for row in logits:
        batch.prepare(slice(0, 2))
        together.append(batch.next(row.expand(2, -1), slice(0, 2)).tolist())
    assert [list(ids) for ids in zip(*together, strict=True)] == alone


def test_the_form_tells_apart_what_a_capture_must() -> None:
    sampler, slots = Sampler(2, 300, CPU), slice(0, 2)
    forms = []
    for sampling in (GREEDY, WARM, Sampling(0.5, 0), Sampling(window=9), GREEDY, Sampling(0.9, 50, 0.3)):
        sampler.begin(0, torch.tensor([1]), 0, sampling)
        forms.append(sampler.form(slots))
    assert len(set(forms)) == len(forms)
    sampler.begin(0, torch.tensor([5]), 3, Sampling(0.7, 50, 0.2, repetition_penalty=1.2))  # only tensors differ
    assert sampler.form(slots) == forms[-1]


def test_draws_follow_the_probabilities() -> None:
    """10,000 draws: each frequency within five standard deviations of its probability; what is dropped never comes."""
    sampling = Sampling(2.0, 4, 1.0, repetition_penalty=1.0, window_penalty=1.0)
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0, -1.0, -5.0]])
    counts = np.bincount(tokens(started(sampling, 1, 6, {0: 3}), logits.expand(10_000, 1, -1)[:, 0]), minlength=6)
    expected = torch.softmax(torch.tensor([3.0, 1.0, 2.0, 0.0]) / 2, 0).numpy()
    assert counts[4:].sum() == 0
    assert (np.abs(counts[:4] / 10_000 - expected) <= 5 * np.sqrt(expected * (1 - expected) / 10_000)).all()


@pytest.mark.parametrize("prompt", [[5], [5, 6], [1, 2, 3, 4, 5, 6, 7, 0, 5, 6]])
def test_prompts_shorter_and_longer_than_the_window(prompt: list[int]) -> None:
    sampler = Sampler(1, 12, CPU)
    sampler.begin(0, torch.tensor(prompt), 0, Sampling(repetition_penalty=1.0, window_penalty=2.0))
    row = torch.ones(1, 12)
    row[0, prompt[-1]] = 1.5
    assert int(sampler.next(row, slice(0, 1))) not in prompt[-8:]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0, or 0.001 to 1000, found -1.0"),
        ({"top_p": 0.0, "top_k": -1}, "top_k must be at least 0, found -1; top_p must be in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be 0.001 to 1000"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


def test_whatever_is_chosen_there_are_few_forms() -> None:
    """A captured step is made for each: a client's choice of numbers may not decide how many there are."""
    sampler, prompt, forms = Sampler(2, 5000, CPU), torch.arange(20), set()
    for top_k in range(1, 400):
        sampler.begin(0, prompt, 0, Sampling(temperature=1.0, top_k=top_k))
        forms.add(sampler.form(slice(0, 1)))
    assert len(forms) <= 2 * 4  # 128, 256 and 512 candidates, and noise that became wider
    before = sampler.form(slice(0, 1))
    for window in range(1, 400):
        sampler.begin(1, prompt, 0, Sampling(window=window, window_penalty=1.1))
    assert before[-1] + 10 >= sampler.form(slice(0, 1))[-1]  # so often were all captured steps made useless


@pytest.mark.parametrize("top_k", [1, 60, 70, 200, 900])
def test_more_candidates_than_needed_change_nothing(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(3, 1, 1000)

    def drawn() -> list[int]:
        sampler = Sampler(1, 1000, CPU)
        sampler.begin(0, torch.arange(20), 7, Sampling(temperature=0.7, top_k=top_k, top_p=0.95))
        ids = []
        for _ in range(40):
            sampler.prepare(slice(0, 1))
            ids.append(int(sampler.next(logits, slice(0, 1))))
        return ids

    found = drawn()
    monkeypatch.setattr(module, "_rounded_up", lambda count: count)
    assert found == drawn()
