"""Seeded mutations of every kind of file that comes from outside: each must be used or refused with one clear error.

usage: python tests/fuzz/fuzz.py TARGET --source FOLDER --ckpt FOLDER [--seconds S] [--seed N] [--keep FOLDER]

A case fails if it raises anything but a CovoError, takes longer than CASE_S, or asks for more than MEMORY_BYTES. The
input is on disk before it is tried. Prints one JSON object; exit code 1 if a case failed. The same seed gives the same
cases.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import xxhash

from covo_npu.convert.plan import Plan, make_plan
from covo_npu.convert.source import SourceCheckpoint, open_source
from covo_npu.convert.write import write_checkpoint
from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import CovoAudio, Session, audio
from covo_npu.runtime.checkpoint import format as checkpoint
from covo_npu.runtime.checkpoint.loader import load_tensors
from covo_npu.runtime.cli.batch import read_items
from covo_npu.runtime.tokenizer import Tokenizer
from covo_npu.tools.check import stages as check_stages

CASE_S = 20
MEMORY_BYTES = 2 * 2**30  # beyond what the process holds at its start
NUMBERS = (0, 1, 2, 7, 127, 128, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1)
ODD_NUMBERS = (-1, 0, 1, 3, 2**20, 2**31, 2**53, 2**63, 2**70, 0.5, -1.5, 1e-320, 1e308, float("nan"), float("inf"))
ODD_TEXTS = ("", "x", "../x", "/etc/passwd", "\x00", "a\x1b[2J", "é" * 99, "0" * 5000, "BF16", "F64")
VALUES = (None, True, *ODD_NUMBERS, *ODD_TEXTS, [], {}, [[]], [None], {"a": []}, [2**62] * 8)

Case = Callable[[random.Random], bytes | None]  # changes the working folder; returns what it wrote, to keep it


# --- mutations


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes after one to eight changes, most of them near the start, where headers are."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not out:
            break
        near = min(len(out), rng.choice((16, 64, 512, len(out))))
        at = rng.randrange(near)
        change = rng.randrange(8)
        if change == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            out[at] = rng.choice((0, 1, 127, 128, 255))
        elif change in (2, 3):
            size = rng.choice((2, 4, 8))
            number = rng.choice(NUMBERS) % 2 ** (8 * size)
            out[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
        elif change == 4:
            del out[rng.randrange(len(out)) :]
        elif change == 5:
            del out[at : at + rng.randrange(1, 64)]
        elif change == 6:
            out[at:at] = rng.randbytes(rng.randrange(1, 64))
        else:
            start = rng.randrange(len(out))
            out[at:at] = out[start : start + rng.randrange(1, 200)]
    return bytes(out)


def mutated_json(rng: random.Random, value: Any) -> Any:
    """Return a JSON value after one to three changes of its structure."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        node, key = rng.choice(list(_places(value)))
        change = rng.randrange(6)
        if change < 3:
            node[key] = copy.deepcopy(rng.choice(VALUES))
        elif change == 3 and type(node[key]) is int:
            node[key] = rng.choice((node[key] + 1, node[key] - 1, -node[key], node[key] * 2, node[key] << 40))
        elif change == 4:
            del node[key]
        elif isinstance(node, dict):
            node[rng.choice(("x", "../x", "", "__pad.0", str(key) + ".x"))] = copy.deepcopy(node[key])
        else:
            node.insert(key, copy.deepcopy(node[key]))
        if not value:
            return value
    return value


def _places(value: Any, limit: int = 12) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of a JSON value's nodes; of long containers some, so that all depths get their share."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if len(keys) > limit:
        keys = keys[: limit // 3] + keys[len(keys) // 2 :][: limit // 3] + keys[-(limit // 3) :]
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)) and value[key]:
            yield from _places(value[key])


# --- targets: each returns a function that makes one case in the working folder and tries it


def audio_files(folder: Path, source: Path, ckpt: Path) -> Case:
    samples = (0.3 * np.random.Generator(np.random.PCG64(1)).standard_normal((2400, 2))).clip(-1, 1)
    seeds = []
    for form, subtype in (("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("WAV", "IMA_ADPCM"),
                          ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
                          ("AIFF", "PCM_16"), ("CAF", "ALAC_16"), ("W64", "PCM_16"), ("AU", "PCM_16")):  # fmt: skip
        for rate in (8000, 48000) if subtype == "OPUS" else (16000, 44100):
            file = io.BytesIO()
            soundfile.write(file, samples[:, : 1 if subtype == "IMA_ADPCM" else 2], rate, subtype, format=form)
            seeds.append((form.lower(), file.getvalue()))

    def case(rng: random.Random) -> bytes:
        form, data = rng.choice(seeds)
        if rng.random() < 0.2:
            data += rng.choice(seeds)[1]  # joined
        data = mutated(rng, data if rng.random() < 0.9 else data[:200] + rng.choice(seeds)[1][-500:])
        path = folder / f"case.{form}"
        path.write_bytes(data)
        read, rate = audio.read_audio(path, 120.0, warn=lambda line: None)
        waveform = audio.prepare(read[: 10 * rate], rate)
        assert waveform.isfinite().all()
        assert audio.num_placeholders(waveform.shape[0]) > 0
        return data

    return case


def manifests(folder: Path, source: Path, ckpt: Path) -> Case:
    """Manifests that lie, under a right checksum, and damaged ones."""
    work = _linked(ckpt, folder / "ckpt")
    path = work / checkpoint.MANIFEST
    original = path.read_bytes()
    body = json.loads(original)
    del body["manifest_xxh3_128"]

    def case(rng: random.Random) -> bytes:
        if rng.random() < 0.1:
            data = mutated(rng, original)
        else:
            part = rng.choice(
                (None, "config", "config", "config", "files", "tensors", "special_tokens", "tensor_parallel")
            )
            changed = dict(body)
            changed[part], changed = (
                (mutated_json(rng, body[part]), changed) if part else (None, mutated_json(rng, body))
            )
            changed.pop(None, None)
            data = checkpoint.manifest_bytes(changed)
        _replace(path, data)
        _load(work)
        return data

    return case


def headers(folder: Path, source: Path, ckpt: Path) -> Case:
    """Headers of safetensors files that lie, in files whose checksums are right."""
    work = _linked(ckpt, folder / "ckpt")
    body = json.loads((work / checkpoint.MANIFEST).read_bytes())
    del body["manifest_xxh3_128"]
    names = [name for name, file in body["files"].items() if file["data_start"]]
    originals = {name: (work / name).read_bytes() for name in names}

    def case(rng: random.Random) -> bytes:
        name = rng.choice(names)
        start = body["files"][name]["data_start"]
        head = originals[name][:start]
        if rng.random() < 0.3:
            head = mutated(rng, head)
        else:
            text = json.dumps(mutated_json(rng, json.loads(head[8:]))).encode()
            head = head[:8] + text.ljust(start - 8) if rng.random() < 0.7 else len(text).to_bytes(8, "little") + text
        data = head + originals[name][start:]
        _replace(work / name, data)
        changed = copy.deepcopy(body)
        entry, block = changed["files"][name], checkpoint.BLOCK_BYTES
        digests = [xxhash.xxh3_128_hexdigest(data[at : at + block]) for at in range(0, len(data), block)]
        entry["bytes"], entry["xxh3_128"] = len(data), digests
        _replace(work / checkpoint.MANIFEST, checkpoint.manifest_bytes(changed))
        try:
            _load(work)
        finally:
            _replace(work / name, originals[name])
        return head

    return case


def tokenizers(folder: Path, source: Path, ckpt: Path) -> Case:
    manifest = checkpoint.read_manifest(ckpt)
    original = (ckpt / checkpoint.TOKENIZER).read_bytes()
    data = json.loads(original)

    def case(rng: random.Random) -> bytes:
        text = mutated(rng, original) if rng.random() < 0.3 else json.dumps(mutated_json(rng, data)).encode()
        _replace(folder / "tokenizer.json", text)
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json", manifest.special_tokens)
        tokenizer.decode(tokenizer.encode("Guten Tag, 你好 <|im_end|> \n"))
        return text

    return case


def sources(folder: Path, source: Path, ckpt: Path) -> Case:
    """The files of a source checkpoint, one changed at a time."""
    work = _linked(source, folder / "source")
    names = ["config.json", "config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
             "token2wav/config.json", "token2wav/model.pt", "token2wav/global_mean_var.npy",
             "token2wav/prompt/prompt_token.npy", "token2wav/prompt/prompt_latent.npy",
             "model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors"]  # fmt: skip
    originals = {name: (work / name).read_bytes() for name in names}

    def case(rng: random.Random) -> bytes:
        name = rng.choice(names)
        data = originals[name]
        if name.endswith("json") and rng.random() < 0.8:
            data = json.dumps(mutated_json(rng, json.loads(data))).encode()
        elif name.endswith("safetensors") and rng.random() < 0.6:
            length = int.from_bytes(data[:8], "little")
            text = json.dumps(mutated_json(rng, json.loads(data[8 : 8 + length]))).encode()
            data = len(text).to_bytes(8, "little") + text + data[8 + length :]
        else:
            data = mutated(rng, data)
        _replace(work / name, data)
        try:
            opened = open_source(work)
            plan = make_plan(opened, torch.bfloat16)
            if rng.random() < 0.2:
                _write(plan, opened, folder / "written", rng.random() < 0.5)
        finally:
            _replace(work / name, originals[name])
        return data

    return case


def values(folder: Path, source: Path, ckpt: Path) -> Case:
    """Weights, statistics and voices with bytes changed in the middle, cast or not: written finite, or refused."""
    work = _linked(source, folder / "source")
    names = [*(path.name for path in source.glob("model-*.safetensors")), "token2wav/model.pt",
             "token2wav/global_mean_var.npy", "token2wav/prompt/prompt_latent.npy"]  # fmt: skip
    originals = {name: (work / name).read_bytes() for name in names}

    def case(rng: random.Random) -> bytes:
        name = rng.choice(names)
        data = bytearray(originals[name])
        for _ in range(rng.choice((1, 3, 30))):
            at = rng.randrange(len(data) // 3, len(data))
            size = min(rng.choice((1, 2, 4, 4096, 2**18)), len(data) - at)
            fill = rng.choice((b"\xff", b"\x7f", b"\0", b"\x80\x7f", b"\0\0\x80\xff", None))
            data[at : at + size] = rng.randbytes(size) if fill is None else (fill * size)[:size]
        _replace(work / name, bytes(data))
        try:
            opened = open_source(work)
            dtype = rng.choice((torch.bfloat16, torch.float16, torch.float32))
            _write(make_plan(opened, dtype, rng.random() < 0.3), opened, folder / "written", rng.random() < 0.5)
        finally:
            _replace(work / name, originals[name])
        return bytes(data)

    return case


def _write(plan: Plan, source: SourceCheckpoint, target: Path, allow_zeros: bool) -> None:
    """Convert; what is written must be a checkpoint without a value that is not finite."""
    target.mkdir()
    try:
        write_checkpoint(plan, source, target, allow_zeros=allow_zeros)
        manifest = checkpoint.read_manifest(target)
        files = [file.name for file in manifest.files.values() if file.data_start is not None]
        with load_tensors(manifest, files, torch.device("cpu")) as weights:
            weights.wait()
            bad = [name for name, tensor in weights.tensors.items() if not tensor.isfinite().all()]
        assert not bad, bad
    finally:
        shutil.rmtree(target)


def arrivals(folder: Path, source: Path, ckpt: Path) -> Case:
    """Files that are missing, cut, empty, zeros, pointers, pages, links or folders; odd files beside them."""
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    texts = (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"<html>", b"Entry not found", b"",
             b"{}", b"[]", b"null", b"\xef\xbb\xbf{}", b"PK\x03\x04", b"GGUF", b"\x93NUMPY\x01\x00")  # fmt: skip
    beside = (".aria2", ".part", ".lock", ".incomplete", ".bin", ".index.json", "~", " (1)")

    def case(rng: random.Random) -> None:
        work = folder / "source"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(source, work)  # no links: the changes below must not reach the original
        path = work / rng.choice(names)
        data = path.read_bytes()
        changes: list[Callable[[], object]] = [
            lambda: path.unlink(),
            lambda: _replace(path, data[: rng.randrange(len(data))]),
            lambda: _replace(path, rng.choice(texts)),
            lambda: _replace(path, data[: rng.choice((0, 8, len(data) // 2))].ljust(len(data), b"\0")),
            lambda: (path.unlink(), path.mkdir()),
            lambda: (path.unlink(), path.symlink_to(rng.choice(("nowhere", path.name, "..", "/dev/null")))),
            lambda: _replace(path.with_name(path.name + rng.choice(beside)), rng.choice(texts)),
            lambda: path.rename(path.with_name(path.name + rng.choice(beside))),
            lambda: path.rename(work / "model.safetensors"),
            lambda: (work / rng.choice(names[:3])).replace(work / rng.choice(names[3:])),
            lambda: (path.unlink(), os.mkfifo(path)),
        ]
        for change in rng.choices(changes, k=rng.choice((1, 1, 2))):
            with contextlib.suppress(OSError):
                change()
        make_plan(open_source(rng.choice((work, work, folder))), torch.bfloat16)

    return case


def stages(folder: Path, source: Path, ckpt: Path) -> Case:
    """Files of `covo-check stages --save`, which people send each other."""
    origin = check_stages.Origin("cpu", "native", "float32", "float32", "float32", "2", "0", "0", "0", "float32", "0")
    check_stages.save(folder / "seed", {"mel": torch.zeros(1, 8, 9), "logits": torch.zeros(2, 9)}, origin)
    original = (folder / "seed").read_bytes()

    def case(rng: random.Random) -> bytes:
        data = mutated(rng, original)
        _replace(folder / "case", data)
        check_stages.load(folder / "case")
        return data

    return case


def batches(folder: Path, source: Path, ckpt: Path) -> Case:
    """Files of dialogues for `covo-run --batch`."""
    rows = [{"id": f"d{i}", "audio": ["a.wav", "b.wav"] if i % 2 else "a.wav"} for i in range(4)]
    original = b"".join(json.dumps(row).encode() + b"\n" for row in rows)

    def case(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            data = mutated(rng, original)
        elif rng.random() < 0.05:
            data = original + b"[" * 200_000
        else:
            changed = mutated_json(rng, rows)
            data = b"".join(json.dumps(row).encode() + b"\n" for row in changed)
        _replace(folder / "dialogues.jsonl", data)
        for item in read_items(folder / "dialogues.jsonl"):
            assert item.id
        return data

    return case


TARGETS = {"audio": audio_files, "manifest": manifests, "header": headers, "tokenizer": tokenizers, "source": sources,
           "values": values, "arrival": arrivals, "stages": stages, "batch": batches}  # fmt: skip


# --- the working folder


def _linked(original: Path, copy_: Path) -> Path:
    """Return a copy of a folder whose files are links to the same data until they are replaced."""
    return Path(shutil.copytree(original, copy_, copy_function=_link))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy(source, target)


def _replace(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def _load(folder: Path) -> None:
    model = CovoAudio.load(folder, device="cpu", max_context=1024)
    try:
        mode = "a2t" if model.networks.token2wav is None else "a2ta"
        Session(model, mode=mode, max_new_tokens=2, system="short").say(np.zeros(4800, np.float32), 24000)
        if model.networks.token2wav is not None:
            model.token2wav([0])
    finally:
        model.weights.close()


# --- running


class TimeIsUp(BaseException):
    """A case took too long."""


def fuzz(target: str, source: Path, ckpt: Path, seconds: float, cases: int, seed: int, keep: Path) -> dict[str, Any]:
    """Return how many cases were tried, how they ended, and the first faults. cases: at least, if it takes longer."""
    ends: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        case = TARGETS[target](Path(name), source, ckpt)
        _limit_memory()
        signal.signal(signal.SIGALRM, _time_is_up)
        begin, number = time.monotonic(), 0
        while number < cases or time.monotonic() - begin < seconds:
            signal.alarm(CASE_S)
            try:
                case(random.Random(f"{target}-{seed}-{number}"))
                ends["used"] += 1
            except CovoError as error:
                ends["refused"] += 1
                if len(str(error)) > 20_000:
                    faults.append(_fault(number, error, Path(name), keep, target))
            except BaseException as error:  # whatever it is, it is the finding
                if isinstance(error, KeyboardInterrupt):
                    raise
                faults.append(_fault(number, error, Path(name), keep, target))
            finally:
                signal.alarm(0)
            number += 1
    return {
        "target": target,
        "seed": seed,
        "cases": number,
        **ends,
        "faults": len(faults),
        "first_faults": faults[:200],
    }


def _fault(number: int, error: BaseException, folder: Path, keep: Path, target: str) -> dict[str, Any]:
    place = keep / f"{target}-{number}"
    shutil.rmtree(place, ignore_errors=True)
    if len(list(keep.glob("*"))) < 20:
        newest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_ctime_ns)
        place.mkdir(parents=True)
        shutil.copy(newest, place)
    where = [
        f"{frame.filename.rsplit('/', 2)[-1]}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
    ]
    return {"case": number, "error": f"{type(error).__name__}: {str(error)[:300]}", "where": where[-4:]}


def _limit_memory() -> None:
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()  # data and stack
    resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY_BYTES, held + MEMORY_BYTES))


def _time_is_up(number: int, frame: object) -> None:
    raise TimeIsUp(f"took longer than {CASE_S} s")


def main() -> int:
    """Return 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--ckpt", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cases", type=int, default=1, help="at least, if it takes longer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="where inputs that fail are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = fuzz(**vars(options))
    print(json.dumps(report, indent=1))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
