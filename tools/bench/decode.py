"""covo-bench decode: prefill and decoding against transformers' generate, on the same weights in one process.

A step cannot be faster than reading every weight and the valid rows of the KV cache once. How fast this machine reads
is measured before and after each turn and the turn compared with that: memory that is shared changes its rate within
seconds. Long contexts are not prefilled: their rows are random numbers, the same for both paths. All contexts, batches
and paths take turns, after every weight has been read once. Of weights in 8 bits there is our path alone: transformers
does not multiply them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import click

from covo_npu.runtime.cli import console, options
from covo_npu.runtime.options import LoadOptions
from covo_npu.tools.bench.measure import Peak, Spread, matrix_rate, read_rate, spread
from covo_npu.tools.report import machine_line, machine_report, table

if TYPE_CHECKING:
    from torch import Tensor

    from covo_npu.runtime import CovoAudio
    from covo_npu.runtime.events import Reply
    from covo_npu.tools.bench.stock_decode import Stock

OURS, LATER, STOCK = "ours", "ours, second dialogue", "generate"
SEED = 0
# Layers whose weights the read rate is measured on. All on a CPU, whose cache may hold a fifth of eight; elsewhere the
# weights are copied, for which there may be no room.
READ_LAYERS: dict[str, int | None] = {"cpu": None, "cuda": 8, "npu": 8}


@dataclass(frozen=True, slots=True)
class Answered:
    """A spoken question answered by one path."""

    path: str
    prompt_tokens: int
    ttft_s: float  # from samples to the first id: front end, encoder, adapter, prefill
    operations_per_s: float  # those of encoder and prefill, by ttft_s
    step_s: float | None  # median; None of a reply that its end-of-text id ended at once
    tokens: tuple[int, ...]
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """Steps with a context and a batch by one path."""

    path: str
    context: int
    batch: int
    step_s: Spread
    tokens_per_s: float  # at the median, of all sequences together
    of_read_rate: Spread  # of each turn: bytes that a step must read by its median, to the rate of reading around it
    tokens: tuple[int, ...]  # of the first sequence
    peak_bytes: int


Turn = tuple[tuple[int, int], str]  # context and batch, path


def step_bytes(model: CovoAudio, context: int, batch: int) -> int:
    """Return the bytes that a step must read: every weight but the embeddings, and the valid rows of each slot."""
    llm, config = model.networks.llm, model.config.llm
    weights = sum(p.nbytes for name, p in llm.named_parameters() if not name.startswith("embed_tokens"))
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.dtype.itemsize
    return weights + batch * context * row


def answers(model: CovoAudio, stock: Stock | None, num_tokens: int) -> list[Answered]:
    """Return how both paths answered a question of 8 s; ours twice, before and after the stock path if there is one.

    The second time the rows of the system prompt are there, the first time they are if the checkpoint holds them.
    """
    import torch

    from covo_npu.runtime import Engine, prompt
    from covo_npu.runtime.engine import Dialogue
    from covo_npu.runtime.events import Done, Event, Failed
    from covo_npu.runtime.options import Ask
    from covo_npu.tools.bench.stock_decode import prefill_operations
    from covo_npu.tools.question import RATE, made_up

    samples, found = made_up(), []
    system = prompt.shared(model.tokenizer, prompt.DEFAULT_SYSTEM_PROMPT)

    def add(
        path: str, prompt_tokens: int, known: int, moments: Sequence[float], tokens: Sequence[int], peak: Peak
    ) -> None:
        """known: tokens whose rows were there before; moments: of the start, then of each id."""
        ttft_s, gaps = moments[1] - moments[0], between(moments[1:])
        step_s = spread(gaps).median if gaps else None
        operations_per_s = prefill_operations(model.config, prompt_tokens, known=known) / ttft_s
        found.append(Answered(path, prompt_tokens, ttft_s, operations_per_s, step_s, tuple(tokens), peak.bytes))

    def ours(path: str) -> Reply:
        """Return our reply, its row added. An id may tell nothing, as a part of a character does: the engine counts."""
        known = len(system) if model.prefixes.get(system) else 0
        with Peak(model.device) as peak:
            engine, later, ended = Engine(model), list[float](), list[Event]()
            started = time.perf_counter()
            waveform = model.waveform(samples, RATE)
            prepared = time.perf_counter()
            engine.submit(Dialogue(), waveform, Ask("a2t", max_new_tokens=num_tokens))
            while not ended:
                ended = [event for event in engine.step() if isinstance(event, Done | Failed)]
                later += [time.perf_counter()] * (engine.load.step_tokens - len(later))
        (end,) = ended
        if isinstance(end, Failed):
            raise end.error
        assert isinstance(end, Done)
        moments = [started, prepared + end.reply.timing.ttft_s, *later]
        add(path, end.reply.prompt_tokens, known, moments, end.reply.tokens, peak)
        return end.reply

    placeholders = ours(OURS).placeholders
    if stock:
        input_ids = prompt.first_round(model.tokenizer, prompt.DEFAULT_SYSTEM_PROMPT, placeholders)
        with Peak(model.device) as peak:
            started = time.perf_counter()
            clock = stock.answer(torch.from_numpy(samples), RATE, input_ids, num_tokens)
        add(STOCK, len(input_ids), 0, [started, *clock.moments], clock.tokens, peak)
    ours(LATER)
    return found


def steps(
    model: CovoAudio,
    stock: Stock | None,
    rows: Sequence[tuple[int, int]],
    num_tokens: int,
    runs: int,
    read: Callable[[], float],
) -> tuple[list[Decoded], Spread]:
    """Return how each path decodes num_tokens ids in each row of the table, and the rates of reading between the turns.

    rows: context and batch: there are as many random rows in each of as many slots. read: returns the rate of reading.
    """
    import torch

    from covo_npu.runtime import Sampling
    from covo_npu.runtime.decode import Decoder
    from covo_npu.runtime.networks.cache import allocate

    longest, widest = (max(sizes) for sizes in zip(*rows))
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(model.config.audio_token_index, (widest, longest + 1), generator=generator).to(model.device)
    cache = allocate(model.config.llm, widest, model.max_context, model.dtype, model.device)
    decoder = Decoder(model.networks.llm, cache, model.capture)

    def cached(context: int, batch: int) -> tuple[Tensor, ...]:
        return tuple(rows[:batch, :, :context] for rows in (*decoder.cache.keys, *decoder.cache.values))

    def ours(context: int, batch: int) -> tuple[list[float], list[int]]:
        for slot in range(batch):
            decoder.sampler.begin(slot, ids[slot, : context + 1], SEED, Sampling())
            decoder.place(slot, context, ids[slot, context : context + 1])
        moments, tokens = [], []
        for _ in range(num_tokens):
            tokens.append(decoder.step(batch).tokens()[0])
            moments.append(time.perf_counter())
        return moments, tokens

    def generate(path: Stock, context: int, batch: int) -> tuple[list[float], list[int]]:
        clock = path.continuation(ids[:batch, : context + 1], cached(context, batch), num_tokens)
        return clock.moments, clock.tokens

    paths = {OURS: ours} | ({STOCK: partial(generate, stock)} if stock else {})
    turns = [(row, path) for row in rows for path in paths]
    gaps: dict[Turn, list[float]] = {turn: [] for turn in turns}
    shares: dict[Turn, list[float]] = {turn: [] for turn in turns}
    tokens: dict[Turn, list[int]] = {}
    peaks = dict.fromkeys(turns, 0)
    with torch.inference_mode():
        for row in rows:
            for tensor in cached(*row):
                tensor.normal_()
        rates = [read()]
        for turn in turns * runs:
            row, path = turn
            click.echo(f"context {row[0]}, batch {row[1]}, {path}", err=True)
            with Peak(model.device) as peak:
                moments, tokens[turn] = paths[path](*row)
            rates.append(read())
            found = between(moments)
            gaps[turn] += found
            shares[turn].append(step_bytes(model, *row) / spread(found).median / spread(rates[-2:]).median)
            peaks[turn] = max(peaks[turn], peak.bytes)

    def decoded(turn: Turn) -> Decoded:
        (context, batch), path = turn
        gap, of_read_rate = spread(gaps[turn]), spread(shares[turn])
        return Decoded(path, context, batch, gap, batch / gap.median, of_read_rate, tuple(tokens[turn]), peaks[turn])

    return [decoded(turn) for turn in turns], spread(rates)


def between(moments: Sequence[float]) -> list[float]:
    """Return the times between ids but the first, which is a warm-up; of two ids that one, of one id none."""
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    return gaps[1:] or gaps


# --- what is shown


def question_table(found: Sequence[Answered], matrix_rate: float) -> str:
    """Return the table of the question."""
    lines = [
        [
            row.path,
            str(row.prompt_tokens),
            f"{row.ttft_s:.2f}",
            f"{row.operations_per_s / matrix_rate:.0%}",
            f"{1 / row.step_s:.2f}" if row.step_s else "-",
            f"{row.peak_bytes / 1e9:.2f}",
        ]
        for row in found
    ]
    columns = ("a question of 8 s", "prompt", "first token s", "of the matrix rate", "tokens/s", "peak GB")
    return table(columns, lines)


def steps_table(found: Sequence[Decoded]) -> str:
    """Return the table of contexts and batches."""
    lines = [
        [
            str(row.context),
            str(row.batch),
            row.path,
            f"{row.step_s.median * 1e3:.1f} ({row.step_s.low * 1e3:.1f} .. {row.step_s.high * 1e3:.1f})",
            f"{row.tokens_per_s:.2f}",
            f"{row.of_read_rate.median:.0%} ({row.of_read_rate.low:.0%} .. {row.of_read_rate.high:.0%})",
            f"{row.peak_bytes / 1e9:.2f}",
        ]
        for row in found
    ]
    columns = ("context", "batch", "path", "step ms", "tokens/s", "of the read rate", "peak GB")
    return table(columns, lines)


def verdicts(
    question: Sequence[Answered], found: Sequence[Decoded], matrix_rate: float | None, read_rate: Spread
) -> list[str]:
    """Return sentences that compare the paths with each other and with what the machine can do."""
    said = []
    first = {row.path: row for row in question}
    if STOCK in first:
        ours, stock, later = first[OURS], first[STOCK], first[LATER]
        same = common_prefix(ours.tokens, stock.tokens)
        said += [
            f"first token in {ours.ttft_s / stock.ttft_s:.2f} of generate's time, "
            f"{later.ttft_s / stock.ttft_s:.2f} in a second dialogue",
            f"the first {same} of {min(len(ours.tokens), len(stock.tokens))} tokens of the reply are the same",
        ]
        if ours.step_s and stock.step_s:
            said.append(f"tokens/s of the reply {stock.step_s / ours.step_s:.2f} of generate's")
    for mine, theirs in pairwise(found):
        if theirs.path != STOCK:
            continue
        said.append(
            f"context {mine.context}, batch {mine.batch}: "
            f"{mine.tokens_per_s / theirs.tokens_per_s:.2f} times generate's tokens/s, the first "
            f"{common_prefix(mine.tokens, theirs.tokens)} of {len(mine.tokens)} tokens the same"
        )
    first_row, *others = [row for row in found if row.path == OURS]
    for row in others:
        if row.context == first_row.context:
            cost = row.step_s.median / first_row.step_s.median
            said.append(
                f"context {row.context}, batch {row.batch}: a step takes {cost:.2f} of batch {first_row.batch}'s"
            )
    matrix = f"matrix product {matrix_rate / 1e9:.0f} GFLOP/s, " if matrix_rate else ""
    reading = f"{read_rate.median / 1e9:.1f} GB/s ({read_rate.low / 1e9:.1f} .. {read_rate.high / 1e9:.1f})"
    said.append(f"floors: {matrix}reading {reading}")
    return said


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many elements are equal before the first difference."""
    return next((i for i, pair in enumerate(zip(first, second)) if pair[0] != pair[1]), min(len(first), len(second)))


@click.command("decode")
@options.ckpt()
@options.loading("device", "dtype", "backend", "products", "graph", "threads")
@click.option(
    "--max-new-tokens", default=32, show_default=True, type=click.IntRange(3), help="Of the reply to the question."
)
@click.option("--steps", "num_steps", default=8, show_default=True, type=click.IntRange(3), help="Of each other row.")
@click.option("--runs", default=2, show_default=True, type=click.IntRange(1), help="Turns of both paths in each row.")
@click.option(
    "--context", "contexts", multiple=True, type=click.IntRange(1), default=(512, 2048, 8000), show_default=True
)
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 2, 4), show_default=True)
@click.option("--question/--no-question", default=True, show_default=True, help="Answer a question of 8 s too.")
@options.common
def command(
    ckpt: Path,
    options: LoadOptions,
    max_new_tokens: int,
    num_steps: int,
    runs: int,
    contexts: tuple[int, ...],
    batches: tuple[int, ...],
    question: bool,
    json_file: str | None,
) -> None:
    """Prefill and decoding against transformers' generate, on the same weights in one process.

    Of weights in 8 bits, which transformers does not multiply, there is our path alone.

    Every --context is measured at the first --batch, every other --batch at the first --context.
    """
    model = load(ckpt, replace(options, max_context=max(*contexts, 2048) + num_steps + 1))
    from covo_npu.tools.bench.stock_decode import Stock

    stock = None if model.manifest.int8 else Stock(model)
    layers = list(model.networks.llm.layers)[: READ_LAYERS[model.device.type]]
    weights = [layer.gate_up_proj.weight for layer in layers]
    matrix, answered = None, list[Answered]()
    if question:
        before = matrix_rate(model.dtype, model.device)
        answered = answers(model, stock, max_new_tokens)
        matrix = max(before, matrix_rate(model.dtype, model.device))
    rows = [(c, batches[0]) for c in contexts] + [(contexts[0], b) for b in batches[1:]]
    found, reading = steps(model, stock, rows, num_steps, runs, partial(read_rate, weights, 1))
    said, machine = verdicts(answered, found, matrix, reading), machine_report(str(model.device))
    if model.capture:
        graphs = model.capture.report
        said.append(f"{graphs.graphs} graphs captured in {graphs.seconds:.2f} s, {graphs.bytes / 1e6:.0f} MB")
    report = {
        "bench": "decode",
        "machine": machine,
        "dtype": model.report.dtype,
        "weights": model.report.weights,
        "backend": model.report.backend,
        "floors_per_s": {"matrix": matrix, "read": asdict(reading)},
        "question": [asdict(row) for row in answered],
        "steps": [asdict(row) for row in found],
        "said": said,
    }
    tables = [question_table(answered, matrix), ""] if matrix else []
    tables.append(steps_table(found))
    console.show("\n".join([*tables, "", *said, machine_line(machine)]), report, json_file)


def load(ckpt: Path, chosen: LoadOptions) -> CovoAudio:
    """Return the model, every weight read once, so that no path pays for the first touch of a mapped file."""
    from covo_npu.runtime import CovoAudio

    model = CovoAudio.load(ckpt, chosen, speech=False, check=False)
    report = model.report
    what = f"{report.backend}, {report.dtype}, weights {report.weights}, {report.bytes / 1e9:.2f} GB"
    click.echo(what, err=True)
    for tensor in (*model.networks.llm.parameters(), *model.networks.encoder.parameters()):
        tensor.amax()
    return model
