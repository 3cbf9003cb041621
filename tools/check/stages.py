"""covo-check stages: what every stage gives on one device, saved, and compared on another.

Each stage is fed what the file holds for the stage before, where it holds it: a difference is reported where it arises,
not in all stages behind it. The tokens after which logits are compared, and the audio codes, are the file's too.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import inf, log10
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_safetensors
from torch import Tensor

from covo_npu.kernels.device import open_device
from covo_npu.runtime import audio, output, prompt
from covo_npu.runtime.checkpoint.format import INT8, MANIFEST, read_manifest
from covo_npu.runtime.cli import options
from covo_npu.runtime.options import Sampling
from covo_npu.runtime.prefix import stored_prefix
from covo_npu.tools.check.made_up import with_checkpoint
from covo_npu.tools.check.result import CheckError, Finding, Result, Subject, below, check
from covo_npu.tools.question import read_question

if TYPE_CHECKING:
    from covo_npu.runtime.model import CovoAudio

STEPS = 8  # logits after the prompt and after so many - 1 tokens
CODES = 25  # one second of speech
FILES = ("manifest_xxh3_128", "files", "tensors", "tensor_parallel")  # what a manifest says of them
Stages = dict[str, Tensor]

# Relative error |a - b| / |b| (2-norms) that two correct implementations stay below, by the coarser of their dtypes.
# Rounding is 6e-8 in float32, 5e-4 in float16, 4e-3 in bfloat16; a stage of some dozen layers gathers a few of them.
BOUNDS = {
    "mel": {"float32": 1e-5},
    "encoder": {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2},
    "adapter": {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2},
    "rows": {"float32": 1e-3, "float16": 2e-2, "bfloat16": 8e-2},
    "logits": {"float32": 1e-3, "float16": 2e-2, "bfloat16": 8e-2},
    "latents": {"float32": 1e-3, "float16": 2e-2, "bfloat16": 8e-2},
    "waveform": {"float32": 1e-3, "float16": 1e-2, "bfloat16": 4e-2},
}
SPEECH = ("latents", "waveform")
OF_LLM = ("rows", "logits")
COARSENESS = ("", "float32", "float16", "bfloat16")  # "": of speech that there is none of
SOURCE = "rounding of {dtype}, gathered over the layers"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a file of stages was made with."""

    device: str
    backend: str
    dtype: str
    token2wav_dtype: str  # "" without speech, as the next
    vocoder_dtype: str
    torch: str
    covo_npu: str
    checkpoint: str  # checksum of what it was made of, and how
    source: str  # checksum of the manifest's notes on what it was made of
    weights: str  # of the LLM's products, as the manifest says
    audio: str  # checksum of the prepared samples

    def dtype_of(self, stage: str) -> str:
        """Return the dtype of a stage's products."""
        others = {"mel": "float32", "latents": self.token2wav_dtype, "waveform": self.vocoder_dtype}
        return others.get(stage, self.dtype)


@torch.inference_mode()
def compute(model: CovoAudio, waveform: Tensor, given: Mapping[str, Tensor]) -> Stages:
    """Return what each stage gives. waveform: [N] at 24 kHz, prepared; given: stages of a file, {} for a first run.

    mel [segments, M, 3000], encoder [segments, frames, C], adapter [frames, C], rows [layers, 2, G, P, D]: keys and
    values of the prompt, exact: those of the system prompt as the checkpoint has them, of float32 arithmetic, tokens
    [STEPS], logits [STEPS, V], latents [frames, Z], waveform [N]; all float32 but the ids. The last two only with
    token2wav, exact only if the checkpoint has it.
    """
    encoder, device, dtype = model.networks.encoder, model.device, model.dtype
    stages: Stages = {"mel": audio.features(waveform, model.config.encoder.num_mels)}
    mel = given.get("mel", stages["mel"])
    stages["encoder"] = torch.cat([encoder.encoder(row[None].to(device, dtype)) for row in mel])
    states = given.get("encoder", stages["encoder"]).to(device, dtype)
    stages["adapter"] = torch.cat([encoder.adapter(row[None])[0] for row in states])
    features = given.get("adapter", stages["adapter"]).to(device, dtype)
    count = audio.num_placeholders(waveform.shape[0], model.config.adapter.num_layers)
    stages |= _logits(model, features[:count], given.get("tokens"))
    if prefix := stored_prefix(model.manifest):
        stages["exact"] = torch.stack((prefix.keys, prefix.values), 1)
    if model.voice is not None:
        speech, voice = model.speech, model.voice.to(device)
        num_codes = speech.config.dit.num_codes
        codes = torch.tensor([(7919 * i + 13) % num_codes for i in range(CODES)], device=device)
        size = (speech.num_frames(CODES, voice), speech.config.dit.latent_dim)
        noise = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
        *_, latents = speech.solve(torch.cat((voice.prompt_codes, codes)), voice.prompt_latents, noise, voice)
        stages["latents"] = speech.statistics(latents)
        latents = given.get("latents", stages["latents"]).to(device)
        stages["waveform"] = speech.vocoder(latents.T[None])[0]
    model.weights.wait()
    return {name: _plain(tensor) for name, tensor in stages.items()}


def _logits(model: CovoAudio, features: Tensor, tokens: Tensor | None) -> Stages:
    """Return the rows of the prompt, the logits after it and after each of the tokens but the last, and the tokens.

    tokens: greedy ones if none are given.
    """
    llm, device = model.networks.llm, model.device
    ids = prompt.first_round(model.tokenizer, prompt.DEFAULT_SYSTEM_PROMPT, features.shape[0])
    if len(ids) + STEPS > model.max_context:
        raise CheckError(f"the question needs {len(ids)} of {model.max_context} tokens: name a shorter WAV")
    first = ids.index(model.manifest.special_tokens["cAUDIO"])
    embeddings = llm.embed(torch.tensor(ids, device=device))
    embeddings[first : first + features.shape[0]] = features
    decoder = model.decoder(1)  # on all ranks
    hidden = decoder.fill(0, embeddings, 0)
    filled = torch.stack(decoder.read(0, len(ids)).tensors).unflatten(0, (2, -1)).transpose(0, 1)
    decoder.begin(0, torch.tensor(ids, device=device), hidden, len(ids), 0, Sampling())
    logits, chosen = [decoder.logits], []
    for step in range(STEPS):
        chosen.append(logits[-1].argmax(-1) if tokens is None else tokens[step : step + 1].to(device))
        if step + 1 < STEPS:
            decoder.place(0, len(ids) + step, chosen[-1])
            decoder.step(1)
            logits.append(decoder.logits)
    return {"rows": filled, "tokens": torch.cat(chosen), "logits": torch.cat(logits)}


def compare(
    found: Stages, expected: Stages, dtypes: Mapping[str, str], formats: tuple[str, str] | None = None
) -> list[Finding]:
    """Return the findings of two runs. dtypes: {stage: the coarser one of the two}.

    formats: those of the LLM's weights here and in the file if they are not the same. Then what rows and logits differ
    by is what the format costs: it is told, and bounded by nothing.
    """
    findings = []
    for name, bounds in BOUNDS.items():
        if name not in expected and name not in found:
            continue
        if name not in expected or name not in found:
            where = "the file" if name in expected else "this run"
            findings.append(Finding(name, f"only in {where}", "in both", "", False))
            continue
        a, b = found[name].double(), expected[name].double()
        if a.shape != b.shape:
            findings.append(Finding(name, f"{list(a.shape)}", f"{list(b.shape)}, as in the file", "", False))
            continue
        used = dtypes[name]
        error = float((a - b).norm() / b.norm().clamp(min=1e-30))
        source = f"{SOURCE.format(dtype=used)}; largest difference {float((a - b).abs().max()):.2e}"
        source += f", {_snr_db(error)}" if name == "waveform" else ""
        if name in OF_LLM and formats:
            cost = f"the cost of weights in {formats[0]} against {formats[1]}, rounding included"
            findings.append(Finding(name, f"{error:.2e}", cost, source))
        else:
            findings.append(below(name, error, bounds[used], source, ".2e"))
    if "logits" in found and "logits" in expected:
        same = found["logits"].argmax(-1) == expected["logits"].argmax(-1)
        findings.append(Finding("likeliest token", f"{int(same.sum())} of {len(same)} equal", "near ties may differ"))
    return findings


def coarser(dtypes: Iterable[str]) -> str:
    """Return the dtype that rounds most."""
    return max(dtypes, key=COARSENESS.index)


def by_layer(found: Tensor, expected: Tensor) -> Tensor:
    """Return the relative error of each layer's rows [layers], float64, over the tokens that both have, from the first.

    found, expected: [layers, 2, G, P, D].
    """
    length = min(found.shape[3], expected.shape[3])
    a, b = (rows[:, :, :, :length].double().flatten(1) for rows in (found, expected))
    return (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-30)


def rounding(name: str, stages: Stages, dtype: str) -> Finding:
    """Return the finding on how far a run's rows of the system prompt are from the exact ones: its own error.

    dtype: the coarser one of the run and of its checkpoint.
    """
    errors = by_layer(stages["rows"], stages["exact"])
    source = f"{SOURCE.format(dtype=dtype)}; {_percents(errors)}"
    return below(name, float(errors.max()), BOUNDS["rows"][dtype], source, ".2e")


def cost(found: Stages, expected: Stages, formats: tuple[str, str]) -> Finding:
    """Return the finding on what a format of weights costs each layer, without any rounding but the rows' own."""
    errors = by_layer(found["exact"], expected["exact"])
    bound = f"the cost of weights in {formats[0]} against {formats[1]}, both multiplied in float32"
    return Finding("layers, the format's cost", f"{float(errors.max()):.2e}", bound, _percents(errors))


def _percents(errors: Tensor) -> str:
    return f"by layer, %: {' '.join(f'{100 * error:.2g}' for error in errors.tolist())}"


def save(path: Path, stages: Stages, origin: Origin) -> None:
    """Write a file of stages, as output.write does: safetensors, with its origin as metadata."""
    output.write(path, as_safetensors(stages, {"covo_check": "stages 4", **asdict(origin)}))


def load(path: Path) -> tuple[Stages, Origin]:
    """Return what `save` wrote. Raises CheckError if the file is not of that kind."""
    if not path.is_file():  # before the open: opening a pipe would wait for ever
        raise CheckError(f"{path}: no such file of `covo-check stages --save`")
    try:
        with safe_open(path, "pt") as file:
            data = file.metadata() or {}
            if data.pop("covo_check", "") != "stages 4":
                raise CheckError(f"{path}: not a file of `covo-check stages --save`")
            return {name: file.get_tensor(name) for name in file.keys()}, Origin(**data)  # noqa: SIM118 - not a dict
    except (SafetensorError, TypeError) as error:
        raise CheckError(f"{path}: damaged, or not a file of `covo-check stages --save`: {error}") from error


def run(subject: Subject, save_to: Path | None = None, against: Path | None = None, speech: bool = True) -> Result:
    """Return the findings of one run; saves it, or compares it with a file, or both.

    A file that is there is replaced only if it is one of stages.
    """
    from covo_npu.runtime import CovoAudio

    if save_to:
        output.require_writable(save_to, lambda content: b'"covo_check":"stages ' in content[:4096])
    ckpt = subject.require_ckpt()
    samples, rate, label = read_question(subject.wav)
    waveform = audio.prepare(samples, rate)
    expected, other = load(against) if against else ({}, None)
    sound = xxhash.xxh3_128_hexdigest(waveform.numpy().tobytes())
    manifest, digest = read_manifest(ckpt), manifest_digest(ckpt)
    weights = manifest.weights
    source = xxhash.xxh3_128_hexdigest(json.dumps(manifest.source, sort_keys=True).encode())
    formats = None
    if other:
        _require_same("audio", sound, other.audio, "name the same WAV")
        if source == other.source and weights != other.weights and {weights, other.weights} & INT8.keys():
            formats = (weights, other.weights)
        else:
            _require_same("checkpoint", digest, other.checkpoint, "name the same checkpoint")
    with CovoAudio.load(ckpt, subject.options, speech=speech, graph="off") as model:
        stages, report = compute(model, waveform, expected), model.report
    origin = Origin(
        report.device, report.backend, report.dtype, report.token2wav_dtype, report.vocoder_dtype,
        torch.__version__, version("covo-npu"), digest, source, weights, sound,
    )  # fmt: skip
    findings = [
        Finding(f"{name} is finite", str(list(tensor.shape)), "no NaN, no infinity", "", _finite(tensor))
        for name, tensor in stages.items()
    ]
    if "exact" in stages:
        findings.append(rounding("layers, rounding here", stages, coarser((origin.dtype, manifest.dtype))))
    title = f"{_with_what(origin)}; {label}"
    if other:
        wanted = {name: tensor for name, tensor in expected.items() if speech or name not in SPEECH}
        dtypes = {stage: coarser(one.dtype_of(stage) for one in (origin, other)) for stage in BOUNDS}
        findings += compare(stages, wanted, dtypes, formats)
        if formats and "exact" in stages and "exact" in expected:
            _require_same("shape of rows", _shapes(stages), _shapes(expected), "save it again")
            dtype = coarser((origin.dtype, other.dtype))
            findings += [cost(stages, expected, formats), rounding("layers, rounding in the file", expected, dtype)]
        title += f"; against {_with_what(other)}"
    if save_to:
        save(save_to, stages, origin)
        findings.append(Finding("saved", f"{save_to} ({save_to.stat().st_size / 1e6:.1f} MB)"))
    return Result("stages", title, tuple(findings))


def examine(subject: Subject) -> Result:
    """Return the findings of one run; without a checkpoint, of a made-up one against the CPU."""
    if subject.ckpt is not None:
        return run(subject)
    if open_device(subject.options.device).type == "cpu":
        return Result(
            "stages", "left out", (Finding("stages", "the CPU is what a device is compared with: no --ckpt given"),)
        )
    with with_checkpoint(subject) as (named, _), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cpu.stages"
        run(replace(named, options=replace(subject.options, device="cpu", backend=None)), save_to=file)
        return run(named, against=file)


def manifest_digest(folder: Path) -> str:
    """Return a checksum of what a checkpoint's manifest says but for its files: what it was made of, and how.

    It is the same for any number of ranks. Raises CheckpointError as read_manifest does.
    """
    body = json.loads((read_manifest(folder).folder / MANIFEST).read_bytes())
    said = {key: value for key, value in body.items() if key not in FILES}
    return xxhash.xxh3_128_hexdigest(json.dumps(said, sort_keys=True).encode())


def _with_what(origin: Origin) -> str:
    dtypes = f"{origin.dtype}, weights {origin.weights}"
    if origin.token2wav_dtype:
        dtypes += f", flow matching {origin.token2wav_dtype}, vocoder {origin.vocoder_dtype}"
    return f"{origin.device}, {origin.backend}, {dtypes}, torch {origin.torch}"


def _require_same(what: str, found: str, expected: str, advice: str) -> None:
    if found != expected:
        raise CheckError(f"the {what} is not that of the file (expected {expected}, found {found}): {advice}")


def _shapes(stages: Stages) -> str:
    return ", ".join(f"{name} {list(stages[name].shape)}" for name in ("rows", "exact") if name in stages)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all()) if tensor.is_floating_point() else True


def _plain(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().contiguous()


def _snr_db(error: float) -> str:
    return f"signal to noise {-20 * log10(error):.0f} dB" if error else f"signal to noise {inf} dB"


@check("stages", wav=True, loading=("device", "dtype", "token2wav_dtype", "vocoder_dtype", "backend", "tp"))
@click.option("--save", "save_to", type=options.PATH, help="Write what every stage gives to this file.")
@click.option("--against", type=options.PATH, help="Compare with a file of --save.")
@click.option("--speech/--no-speech", default=True, show_default=True, help="Include latents and waveform.")
def command(subject: Subject, save_to: Path | None, against: Path | None, speech: bool) -> Result:
    """Compare two devices stage by stage: mel, encoder, adapter, rows of the KV cache, logits, latents, waveform.

    The checkpoints may be of different numbers of ranks, if they were made of the same source.

    \b
    covo-check stages --ckpt npu_ckpt --device cpu --save cpu.stages
    covo-check stages --ckpt npu_ckpt --device npu:0 --against cpu.stages
    covo-check stages --ckpt npu_ckpt_tp2 --tp 2 --device npu:0 --against cpu.stages
    """
    return run(subject, save_to, against, speech)
