"""docs/scaling.md: every computed figure of its tables, computed again from the sizes of the published model."""

import re
from math import prod
from pathlib import Path

import pytest

from covo_npu.runtime.checkpoint.format import INT8
from covo_npu.runtime.networks.files import expected_tensors
from covo_npu.runtime.options import CODES_PER_S, LoadOptions, SpeechBlocks
from covo_npu.tools.bench.token2wav import evaluation_flops
from covo_npu.tools.synth.config import PRESETS

CONFIG = PRESETS["full"]
LLM = CONFIG.llm
DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "scaling.md").read_text("utf-8")
GB, TFLOP = 1e9, 1e12
HALF, FULL, ONE = 2, 4, 1  # bytes of bfloat16, float32, int8
RANKS = (1, 2, 4)
BY_COLUMNS, BY_ROWS = ("o_proj", "down_proj"), ("qkv_proj", "gate_up_proj", "lm_head")  # shared by the ranks
EIGHT = {"int8": ("_proj",), "int8+head": ("_proj", "lm_head")}  # the ends of the names of what is in 8 bits
LEFT, OTHERS_GB = 0.1, 1.0  # of a card: for the driver, CANN and graphs; for activations
SPEAKING = 0.5  # of the dialogues, at any moment
TOKENS_PER_CODE = 20 / 15  # 5 of text, then 15 codes
ROWS = 1500  # of a dialogue that goes on
SYSTEM_PROMPT = 241  # tokens, whose rows are in the folder


def table(title):
    """The cells of the table under a heading, without its own heading and rule."""
    [text] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("*", "") for cell in line.strip("|").split("|")] for line in lines[2:]]


def width(name, weights):
    """Bytes of a number of a tensor."""
    stem, _, leaf = name.rpartition(".")
    eight = leaf == "weight" and stem.endswith(EIGHT.get(weights, ("nothing",)))
    return FULL if leaf == "scale" else ONE if eight else HALF


def llm_bytes(ranks=1, weights="bfloat16"):
    """Bytes of a rank's file of the LLM: rows or columns of the products, as many as whole heads have; all the rest."""
    total = 0
    for name, shape in expected_tensors(CONFIG, INT8.get(weights, ()))["llm"].items():
        kind, leaf = name.split(".")[-2:]
        shared = kind in BY_COLUMNS and leaf == "weight"
        count = -(-shape[0] // ranks) * prod(shape[1:]) if kind in BY_ROWS else prod(shape) // (ranks if shared else 1)
        total += count * width(name, weights)
    return total


def part_bytes(match, weights="bfloat16"):
    """Bytes of the LLM's tensors whose name has a match."""
    shapes = expected_tensors(CONFIG, INT8.get(weights, ()))["llm"]
    return sum(prod(shape) * width(name, weights) for name, shape in shapes.items() if re.search(match, name))


def file_bytes(name, width):
    return sum(map(prod, expected_tensors(CONFIG)[name].values())) * width


ROW = 2 * LLM.num_layers * LLM.num_kv_heads * LLM.head_dim * HALF  # bytes of a token in the KV cache
SLOT = LoadOptions().max_context * ROW
ENCODER, SPEECH = file_bytes("encoder", HALF), file_bytes("token2wav", FULL)


def gb(count):
    return f"{count / GB:.2f} GB"


def test_weights_by_part():
    expected = [
        [gb(part_bytes(r"layers\..*_proj.weight")), gb(part_bytes(r"layers\..*_proj\.(weight|scale)", weights="int8"))],
        [gb(part_bytes("embed_tokens"))] * 2,
        [gb(part_bytes("lm_head"))] * 2,
        [gb(ENCODER)] * 2,
        [gb(SPEECH)] * 2,
        [gb(llm_bytes(weights=weights) + ENCODER + SPEECH) for weights in ("bfloat16", "int8")],
        [gb(SLOT)] * 2,
    ]
    assert [row[1:3] for row in table("What there is to hold")] == expected


def test_bytes_of_the_formats():
    """The table of docs/int8.md."""
    page = (DOCS / "int8.md").read_text("utf-8")
    found = [line.strip("|").split("|") for line in page.splitlines() if "GB |" in line]
    of_head, read = "lm_head", r"layers\.|norm|lm_head"
    expected = []
    for weights in ("bfloat16", *INT8):
        whole = llm_bytes(weights=weights)
        parts = (r"_proj\.(weight|scale)", of_head, read)
        products, head, token = (f"{part_bytes(part, weights) / GB:.2f} GB" for part in parts)
        folder = f"{(whole + ENCODER + SPEECH + SYSTEM_PROMPT * ROW) / GB:.1f} GB"
        expected.append([products, head, token, f"{whole / GB:.2f} GB", folder])
    assert [[cell.strip() for cell in row[1:4]] for row in found[:5]] == [list(row) for row in zip(*expected)]
    scales = [f"{part_bytes('scale$', weights) / 1e6:.1f} MB" for weights in ("bfloat16", *INT8)]
    assert f"| of both, scales | {' | '.join(scales)} |" in page


def test_bytes_of_a_rank():
    expected = [
        ["bfloat16, LLM", *(gb(llm_bytes(ranks)) for ranks in RANKS)],
        ["int8, LLM", *(gb(llm_bytes(ranks, weights="int8")) for ranks in RANKS)],
        ["KV cache, a slot of 8192 tokens", *(gb(SLOT / ranks) for ranks in RANKS)],
    ]
    assert table("What a rank holds") == expected
    for ranks in RANKS:
        assert LLM.num_heads % ranks == LLM.num_kv_heads % ranks == LLM.intermediate_size % ranks == 0


def slots(card_gb, ranks, weights):
    """Slots that fit on each of some cards; rank 0 has the encoder and speech, too."""
    room = card_gb * (1 - LEFT) * GB - OTHERS_GB * GB - llm_bytes(ranks, weights) - ENCODER - SPEECH
    return int(room // (SLOT / ranks))


def test_slots_that_fit():
    expected = []
    for card in (32, 64):
        expected.append([f"bfloat16, {card} GB", *(str(slots(card, ranks, "bfloat16")) for ranks in RANKS)])
    for card in (32, 64):
        expected.append([f"int8, {card} GB", *(str(slots(card, ranks, "int8")) for ranks in RANKS)])
    assert table("How many dialogues fit") == expected
    assert [slots(16, 1, weights) for weights in ("int8", "int8+head")] == [3, 4]  # as the text says
    assert slots(16, 1, "bfloat16") < 0


BLOCKS = SpeechBlocks()


def frames(blocks):
    """Latent frames of a block of a long reply: prompt, past, what was held back, and new codes."""
    voice = CONFIG.token2wav.voice.num_codes
    prompt = voice if blocks.prompt_s is None else min(voice, round(blocks.prompt_s * CODES_PER_S))
    codes = prompt + round(blocks.past_s * CODES_PER_S) + blocks.look_ahead + blocks.sizes[-1]
    return codes * CONFIG.token2wav.dit.upsample_factor


def second_flops(blocks, evaluations):
    """Operations of flow matching for a second of speech, late in a reply."""
    return evaluations * evaluation_flops(CONFIG.token2wav.dit, frames(blocks)) / (blocks.sizes[-1] / CODES_PER_S)


PLANS = {
    "default": (BLOCKS, 18),
    "`--prompt-s 6`": (SpeechBlocks(prompt_s=6), 18),
    "`--prompt-s 3 --past-s 3`": (SpeechBlocks(prompt_s=3, past_s=3), 18),
    "the same, `--flow-solver euler`": (SpeechBlocks(prompt_s=3, past_s=3), 9),
}
RATES = (50, 100, 200)  # TFLOP/s that a card sustains in flow matching


def test_what_speech_costs():
    assert 2 * (CONFIG.token2wav.flow.time_points - 1) == 18
    expected = []
    for name, (blocks, evaluations) in PLANS.items():
        each = second_flops(blocks, evaluations) / TFLOP
        people = [f"{rate / each:.0f}" for rate in RATES]
        expected.append([name, f"{frames(blocks)}", f"{each:.1f} TFLOP", *people])
    assert table("What a second of speech costs") == expected
    voice, first = CONFIG.token2wav.voice.num_codes, BLOCKS.sizes[0]
    begin = 18 * evaluation_flops(CONFIG.token2wav.dit, (voice + first) * CONFIG.token2wav.dit.upsample_factor)
    assert f"takes {begin / TFLOP:.1f} TFLOP by default" in PAGE


READ = 1.6e12  # bytes a second
STEP_BYTES = part_bytes(r"layers\..*_proj.weight|lm_head")


def step_s(dialogues, weights=STEP_BYTES):
    """A decode step at the rate of the memory: the weights once, the rows of every dialogue."""
    return (weights + dialogues * ROWS * ROW) / READ


def test_what_a_rank_gains():
    """Two collectives a layer and one for the logits take what the ranks' shorter reads give."""
    expected, alone = [], STEP_BYTES / READ
    for ranks in RANKS:
        seconds, collectives = alone / ranks, (2 * LLM.num_layers + 1) * (ranks > 1)
        spare = f"{(alone - seconds) / collectives * 1e6:.0f} us" if collectives else ""
        expected.append([f"{ranks}", gb(STEP_BYTES / ranks), f"{seconds * 1e3:.1f} ms", f"{collectives}", spare])
    assert table("What a rank gains") == expected
    assert LLM.hidden_size * HALF == 7168


def test_what_decoding_costs():
    eight = part_bytes(r"layers\..*_proj\.(weight|scale)", weights="int8") + part_bytes("lm_head")
    expected = []
    for count in (1, 8, 32, 64):
        cells = [f"{count}"]
        for weights in (STEP_BYTES, eight):
            seconds = step_s(count, weights)
            cells += [f"{seconds * 1e3:.1f} ms", f"{1 / seconds / (CODES_PER_S * TOKENS_PER_CODE):.1f}"]
        expected.append(cells)
    assert table("What decoding costs") == expected


def test_a_thousand_dialogues():
    """By stage: what it takes altogether, and how many cards that is; the largest number is the bottleneck."""
    talking, rate = 1000 * SPEAKING, 100
    rows = table("A thousand dialogues")
    found = {row[0]: row[1:] for row in rows}
    for name, plan in (
        ("speech, default blocks", "default"),
        ("speech, `--prompt-s 3 --past-s 3`", "`--prompt-s 3 --past-s 3`"),
    ):
        need = talking * second_flops(*PLANS[plan]) / TFLOP
        assert found[name] == [f"{need:.0f} TFLOP/s", f"{need / rate:.0f}"]
    tokens = talking * CODES_PER_S * TOKENS_PER_CODE
    assert found["decoding"] == [f"{tokens:.0f} tokens/s", f"{tokens * step_s(64) / 64:.1f}"]
    questions = 1000 / 20
    assert found["hearing"] == [f"{questions * 3.1:.0f} TFLOP/s", f"{questions * 3.1 / rate:.1f}"]
    decoding, hearing = float(found["decoding"][1]), float(found["hearing"][1])
    speech, short = (float(found[name][1]) for name in list(found)[:2])
    assert f"factor of {speech / decoding:.0f} to decoding" in PAGE
    assert f"{round(speech + decoding + hearing)} replicas of one card" in PAGE.replace("\n", " ")
    assert f"need {round(short + decoding + hearing)}." in PAGE
    assert found["KV cache, parked in host memory"] == [gb((1000 - talking) * ROWS * ROW), "none"]
    cards = [float(row[2]) for row in rows if row[2] not in ("none", "")]
    assert max(cards) == float(found["speech, default blocks"][1]) and cards[0] == max(cards)


@pytest.mark.parametrize("title", re.findall(r"^## (.*)$", PAGE, re.M))
def test_every_table_is_computed_or_names_its_measurement(title):
    """A section is held by a test above, or says by which command its figures were measured."""
    [text] = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    source = Path(__file__).read_text("utf-8")
    assert f'table("{title}")' in source or "covo-bench" in text or not re.search(r"^\|", text, re.M)
