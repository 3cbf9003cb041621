"""covo-check: each check holds on a sound machine and checkpoint, and each of its findings can fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_checkpoint import rewrite_manifest

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import audio
from covo_npu.runtime.adapter import Adapter
from covo_npu.runtime.checkpoint import block_digests, read_manifest
from covo_npu.tools import (
    check,
    check_all,
    check_ckpt,
    check_doctor,
    check_mel,
    check_ops,
    check_repeat,
    check_stages,
    question,
)
from covo_npu.tools.check_doctor import Probe
from covo_npu.tools.check_result import Finding, Result, Subject, as_markdown, as_text, below, without_home

COVO_CHECK = Path(sys.executable).with_name("covo-check")


def failed(result: Result) -> list[str]:
    return [finding.name for finding in result.findings if finding.holds is False]


# --- results


def test_a_result_holds_only_if_nothing_promised_fails():
    informs, holds, fails = (Finding("a", "1", holds=value) for value in (None, True, False))
    assert Result("x", "", (informs, holds)).holds
    assert not Result("x", "", (informs, holds, fails)).holds
    assert "1 of 2 do not hold" in as_text(Result("x", "", (informs, holds, fails)))
    assert "does not hold" in as_markdown([Result("x", "a|b", (fails,))])


def test_nan_is_below_nothing():
    assert below("x", 1.0, 1.0, "").holds is True
    assert below("x", 1.1, 1.0, "").holds is False
    assert below("x", float("nan"), 1.0, "").holds is False


def test_home_is_not_told(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert without_home(f"{tmp_path}/me/x {tmp_path}/me") == "~/x ~"
    assert without_home(f"{tmp_path}/meadow") == f"{tmp_path}/meadow"


# --- mel


def test_mel_holds_on_the_cpu_by_the_documents_own_figures():
    result = check_mel.examine(Subject(None, None, "cpu"))
    assert result.holds, as_text(result)
    assert sum(finding.source == check_mel.DOCUMENT for finding in result.findings) >= 3


def test_mel_with_the_filters_of_a_checkpoint(convert_tiny):
    for dtype in ("float32", "bfloat16"):  # the front end is float32 in both
        assert torch.equal(check_mel.filters_of(convert_tiny(dtype)), check_mel.mel_filters(128))
    assert check_mel.examine(Subject(convert_tiny("bfloat16"), None, "cpu")).holds


def test_the_exact_mel_is_the_golden_one(golden):
    arrays = golden("frontend_question_en_48k_24bit")
    exact = check_mel.exact_log_mel(torch.from_numpy(arrays["wav16k"][: int(arrays["wav16k"].shape[-1])]).flatten(),
                                    check_mel.mel_filters(128))  # fmt: skip
    stride = int(arrays["mel_stride"])
    assert np.abs(exact[:, ::stride].numpy() - arrays["mel"][0]).max() < 1e-4


@pytest.mark.parametrize(
    "mutant",
    [
        lambda mel: mel.roll(1, dims=1),
        lambda mel: mel + 3e-5,
        lambda mel: mel.bfloat16().float(),
        lambda mel: mel.index_fill(1, torch.tensor([1000]), float("nan")),
    ],
    ids=["one frame late", "off by a little", "rounded to bfloat16", "NaN"],
)
def test_a_wrong_mel_fails(monkeypatch, mutant):
    right = audio.log_mel
    monkeypatch.setattr(audio, "log_mel", lambda s, f, transform=None: (
        right(s, f, transform) if transform else mutant(right(s, f))))  # fmt: skip
    assert failed(check_mel.examine(Subject(None, None, "cpu")))


def test_the_made_up_question_is_the_same_everywhere():
    samples = question.made_up()
    assert samples.shape == (question.SECONDS * question.RATE,)
    assert np.abs(samples).max() < 0.9
    assert float(np.abs(samples).sum()) == pytest.approx(6538.6, rel=1e-4)


# --- doctor

TORCH = {"version": "2.13.0", "capability": "AVX512", "threads": 2, "works": True}
NPU = {"torch": "2.9.0", "torch_npu": "2.9.0.post1", "count": 1, "name": "Ascend910", "free": 6e10, "total": 6.4e10,
       "works": True}  # fmt: skip


def doctor(ckpt=None, device="auto", **answers):
    found = {"torch": Probe(TORCH), "packages": Probe({"numpy": "2.0"}), "npu": Probe(NPU), "cuda": Probe({"count": 0})}
    found |= answers
    return check_doctor.examine(Subject(ckpt, None, device), lambda name, environment=None: found[name])


def fixes(result: Result) -> str:
    return " | ".join(finding.fix for finding in result.findings if finding.holds is False)


@pytest.fixture
def with_npu(monkeypatch, tmp_path):
    """A machine with driver, CANN and torch_npu, as far as files and the environment go."""
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    (tmp_path / "set_env.sh").touch()
    real = check_doctor.find_spec
    monkeypatch.setattr(check_doctor, "find_spec", lambda name: name == "torch_npu" or real(name))
    real_glob = Path.glob
    nodes = [Path("/dev/davinci0")]
    monkeypatch.setattr(Path, "glob", lambda self, what: iter(nodes) if "davinci" in what else real_glob(self, what))


def test_doctor_on_this_machine(convert_tiny):
    done = subprocess.run([COVO_CHECK, "doctor", "--ckpt", convert_tiny("float32"), "--device", "cpu", "--json"],
                          capture_output=True, text=True)  # fmt: skip
    result = json.loads(done.stdout)
    assert (done.returncode, result["holds"]) == (0, True), done.stdout
    names = {finding["name"] for finding in result["findings"]}
    assert {"Python", "torch", "NPU", "CUDA", "memory", "working folder", "checkpoint", "page cache"} <= names
    assert any(f["name"] == "covo-run --device cpu" and f["measured"] == "will run" for f in result["findings"])


def test_doctor_imports_nothing_that_may_be_broken():
    code = "import sys; from covo_npu.tools import check_doctor; sys.exit({'torch', 'numpy'} & set(sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("body", "says", "advice"),
    [
        ("raise ImportError('libhccl.so: cannot open shared object file')", "libhccl.so", "set_env.sh"),
        ("raise ImportError('x.so: undefined symbol: _ZN3c10')", "undefined symbol", "matching pair"),
        ("raise RuntimeError('odd')", "odd", "--force-reinstall torch"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV", "--force-reinstall torch"),
        ("import time; time.sleep(60)", "no answer within 2 s", "--force-reinstall torch"),
    ],
)
def test_doctor_survives_a_broken_torch(tmp_path, monkeypatch, body, says, advice):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(check_doctor, "LIMIT_S", 2)
    probe = check_doctor.probe("torch")
    assert probe.found is None
    assert says in probe.reason
    result = doctor(torch=probe)
    assert {"torch", "covo-run --device cpu"} <= set(failed(result))
    assert advice in fixes(result)


def test_doctor_names_the_plug_in_that_breaks_torch(with_npu):
    broken, working = Probe(None, "ImportError: libhccl.so: cannot open shared object file"), Probe(TORCH)

    def run(name, environment=None):
        if name == "torch":
            return working if environment == {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} else broken
        return Probe({"numpy": "2"}) if name == "packages" else broken

    result = check_doctor.examine(Subject(None, None, "npu:0"), run)
    assert {"torch", "torch_npu", "covo-run --device npu"} <= set(failed(result))
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in fixes(result)
    assert "set_env.sh" in fixes(result)


def test_doctor_with_a_sound_npu(with_npu):
    result = doctor(device="npu:0")
    assert result.holds, as_text(result)


@pytest.mark.parametrize(
    ("answer", "name", "advice"),
    [
        (Probe(None, "ModuleNotFoundError: No module named 'yaml'"), "torch_npu", "pip install yaml"),
        (Probe(NPU | {"torch_npu": "2.7.1"}), "torch_npu", "torch_npu==2.9"),
        (Probe(NPU | {"count": 0}), "NPU", "ASCEND_RT_VISIBLE_DEVICES"),
        (Probe(NPU | {"works": False}), "NPU", "restart"),
        (Probe(None, "RuntimeError: aclInit failed, error code 507008"), "torch_npu", "/dev/davinci"),
    ],
)
def test_doctor_with_a_broken_npu(with_npu, answer, name, advice):
    result = doctor(device="npu:0", npu=answer)
    assert {name, "covo-run --device npu"} <= set(failed(result))
    assert advice in fixes(result)


def test_doctor_without_set_env(with_npu, monkeypatch):
    monkeypatch.delenv("ASCEND_HOME_PATH")
    assert "source " in fixes(doctor(device="npu:0"))


def test_doctor_asked_for_a_device_that_is_not_there():
    result = doctor(device="cuda:0")
    assert {"CUDA", "covo-run --device cuda"} <= set(failed(result))


@pytest.mark.parametrize("missing", ["tqdm", "xxhash", "torch"])
def test_doctor_runs_without_a_package(tmp_path, missing):
    """The command itself, on a machine where importing the package fails."""
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{missing}'\")")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([COVO_CHECK, "doctor", "--ckpt", tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and not done.stderr, done.stderr
    assert f"No module named '{missing}'" in done.stdout
    assert "covo-run --device cpu   will not run" in done.stdout


def test_doctor_with_a_broken_package():
    result = doctor(packages=Probe({"tokenizers": "! ImportError: bad ELF"}))
    assert {"tokenizers", "covo-run --device cpu"} <= set(failed(result))
    assert "--force-reinstall tokenizers" in fixes(result)


def test_doctor_with_checkpoints_in_all_states(tmp_path, convert_tiny, tiny_source):
    assert "checkpoint" in failed(doctor(ckpt=tmp_path / "nowhere"))
    assert "convert it first" in as_text(doctor(ckpt=tiny_source))
    damaged = shutil.copytree(convert_tiny("float32"), tmp_path / "ckpt")
    os.truncate(damaged / "encoder.safetensors", 5000)
    result = doctor(ckpt=damaged)
    assert "checkpoint" in failed(result)
    assert "encoder.safetensors" in as_text(result)


def test_doctor_on_a_full_disk(monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(check_doctor.tempfile, "TemporaryFile", full)
    result = doctor()
    assert {"working folder", "temporary files"} <= set(failed(result))
    assert "No space left" in as_text(result)


def test_cached_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    assert check_doctor.cached_bytes(path) == 100_000
    (tmp_path / "empty").touch()
    assert check_doctor.cached_bytes(tmp_path / "empty") == 0


# --- repeat


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"tokens": (1, 2, 4)}, "tokens"),
        ({"tokens": (1, 2)}, "tokens"),
        ({"text": "b"}, "text"),
        ({"wav": b"x"}, "waveform"),
    ],
)
def test_repeat_sees_each_difference(change, name):
    first = check_repeat.Answer((1, 2, 3), "a", b"wav")
    second = replace(first, **change)
    wrong = [finding.name for finding in check_repeat.differences(first, second, "here", "") if not finding.holds]
    assert wrong == [f"{name}, here"]
    assert all(f.holds is None for f in check_repeat.differences(first, second, "here", "", promised=False))


def test_repeat_on_the_tiny_model(convert_tiny):
    result = check_repeat.examine(Subject(convert_tiny("float32"), None, "cpu"))
    assert result.holds, as_text(result)
    assert "64 of 64 equal" in as_text(result)
    assert any("not promised" in finding.bound for finding in result.findings) == (torch.get_num_threads() > 1)


# --- stages


@pytest.fixture(scope="module")
def saved(convert_tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("stages") / "cpu.stages"
    result = check_stages.run(Subject(convert_tiny("float32"), None, "cpu"), save_to=path)
    assert result.holds, as_text(result)
    return path


def test_stages_against_the_same_and_against_another_dtype_and_backend(convert_tiny, saved):
    subject = Subject(convert_tiny("float32"), None, "cpu")
    options = ({}, {"dtype": "bfloat16", "speech": False}, {"backend": "reference", "speech": False})
    for chosen in options:
        result = check_stages.run(subject, against=saved, **chosen)
        assert result.holds, as_text(result)
        compared = set(check_stages.BOUNDS) - set(() if chosen.get("speech", True) else check_stages.SPEECH)
        assert compared <= {finding.name for finding in result.findings}


@pytest.mark.parametrize("stage", check_stages.BOUNDS)
@pytest.mark.parametrize("dtype", check_stages.COARSENESS)
def test_each_stage_can_fail(saved, stage, dtype):
    stages, _ = check_stages.load(saved)
    size = 0.2 if dtype != "float32" and stage not in check_stages.ALWAYS_FLOAT32 else 0.005
    wrong = stages | {stage: stages[stage] + size * stages[stage].std() * torch.randn_like(stages[stage])}
    assert [f.name for f in check_stages.compare(wrong, stages, dtype, dtype) if f.holds is False] == [stage]
    wrong = stages | {stage: stages[stage] * float("nan")}
    assert [f.name for f in check_stages.compare(wrong, stages, dtype, dtype) if f.holds is False] == [stage]


def test_a_wrong_network_is_named_alone(convert_tiny, saved, monkeypatch):
    """The logits behind it are computed from what the file holds, so they hold."""
    right = Adapter.forward
    monkeypatch.setattr(Adapter, "forward", lambda self, x: 1.01 * right(self, x))
    subject = Subject(convert_tiny("float32"), None, "cpu")
    assert failed(check_stages.run(subject, against=saved, speech=False)) == ["adapter"]


def test_stages_of_something_else_are_refused(convert_tiny, saved, tmp_path):
    subject = Subject(convert_tiny("float32"), None, "cpu")
    other = tmp_path / "other.wav"
    audio.write_wav(other, torch.from_numpy(question.made_up(1.0)), question.RATE)
    with pytest.raises(CovoError, match="the audio is not that of the file"):
        check_stages.run(replace(subject, wav=other), against=saved)
    with pytest.raises(CovoError, match="the checkpoint is not that of the file"):
        check_stages.run(Subject(convert_tiny("bfloat16"), None, "cpu"), against=saved)
    (tmp_path / "rubbish").write_bytes(b"rubbish" * 100)
    for path in (tmp_path / "rubbish", convert_tiny("float32") / "encoder.safetensors"):
        with pytest.raises(CovoError, match="not a file of `covo-check stages --save`"):
            check_stages.run(subject, against=path)


def test_a_stage_that_is_missing_or_has_another_shape_fails(saved):
    stages, _ = check_stages.load(saved)
    shorter = {**stages, "waveform": stages["waveform"][:-240]}
    del shorter["latents"]
    wrong = [
        finding.name
        for finding in check_stages.compare(shorter, stages, "float32", "float32")
        if finding.holds is False
    ]
    assert wrong == ["latents", "waveform"]


# --- ckpt


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_checkpoint_holds_against_its_source(convert_tiny, tiny_source, dtype):
    result = check_ckpt.examine_folder(convert_tiny(dtype), tiny_source, None)
    assert result.holds, as_text(result)
    assert len(result.findings) == 7


# One target of every operation, and of each file.
TARGETS = [
    "llm.layers.1.qkv_proj.weight",
    "llm.layers.2.gate_up_proj.weight",
    "encoder.layers.0.qkv_proj.bias",
    "frontend.mel_filters",
    "voice.prompt_latents",
    "statistics.mean",
    "statistics.std",
    "vocoder.filters.down",
    "vocoder.conv_pre.weight",
    "vocoder.stages.0.upsample.weight",
    "vocoder.act_post.alpha",
    "vocoder.act_post.inverse_beta",
    "dit.token_embedding.weight",
]


@pytest.mark.parametrize("target", TARGETS)
def test_a_changed_value_under_a_right_checksum_is_found(convert_tiny, tiny_source, tmp_path, target):
    """As if the converter had a fault: the file and its checksums agree, only the source can tell."""
    folder = shutil.copytree(convert_tiny("float32"), tmp_path / "ckpt")
    file = next(f for f in read_manifest(folder).files.values() if target in f.tensors)
    place = file.tensors[target]
    values = np.memmap(file.path, np.float32, "r+", place.offset, place.shape)
    at = np.unravel_index(np.abs(values).argmax(), values.shape)
    values[at] *= 1 + 1e-3
    values.flush()
    rewrite_manifest(folder, lambda data: data["files"][file.name].update(xxh3_128=block_digests(file.path)))
    assert check_ckpt.examine_folder(folder, None, None).holds
    result = check_ckpt.examine_folder(folder, tiny_source, None)
    assert failed(result) == ["tensors against the source"]
    assert f"1 wrong: {target}" in as_text(result)


def test_swapped_rows_are_found(convert_tiny, tiny_source, tmp_path):
    folder = shutil.copytree(convert_tiny("bfloat16"), tmp_path / "ckpt")
    file = next(f for f in read_manifest(folder).files.values() if "llm.layers.0.gate_up_proj.weight" in f.tensors)
    place = file.tensors["llm.layers.0.gate_up_proj.weight"]
    values = np.memmap(file.path, np.uint16, "r+", place.offset, place.shape)
    half = place.shape[0] // 2
    values[:] = np.concatenate((values[half:], values[:half]))
    values.flush()
    rewrite_manifest(folder, lambda data: data["files"][file.name].update(xxh3_128=block_digests(file.path)))
    assert "gate_proj.weight differ" in as_text(check_ckpt.examine_folder(folder, tiny_source, None))


def test_a_flipped_byte_is_found(convert_tiny, tmp_path):
    folder = shutil.copytree(convert_tiny("float32"), tmp_path / "ckpt")
    path = folder / "token2wav.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    result = check_ckpt.examine_folder(folder, None, None)
    assert failed(result) == ["checksums"]
    assert "token2wav.safetensors at 0" in as_text(result)


def test_another_source_is_found(convert_tiny, tiny_source, tmp_path):
    source = shutil.copytree(tiny_source, tmp_path / "source")
    (source / "config.json").write_text((source / "config.json").read_text() + "\n")
    assert failed(check_ckpt.examine_folder(convert_tiny("float32"), source, None)) == ["small files of the source"]
    shutil.rmtree(source / "token2wav")
    assert failed(check_ckpt.examine_folder(convert_tiny("float32"), source, None)) == ["source"]


def test_no_checkpoint_at_all(tmp_path):
    assert failed(check_ckpt.examine_folder(tmp_path, None, None)) == ["manifest and headers"]


# --- all, and the command line


@pytest.fixture
def quick_parts(monkeypatch):
    """All parts but ops, which takes half a minute; what it adds to the report is tested by itself."""
    monkeypatch.setattr(check_all, "PARTS", {name: needs for name, needs in check_all.PARTS.items() if name != "ops"})


def test_ops_is_a_part_of_the_report(monkeypatch):
    rows = [check_ops.Row("encoder", "aten::mm", "bfloat16", 3, check_ops.KERNEL, ""),
            check_ops.Row("vocoder", "aten::fft", "float32", 1, check_ops.FALLS_BACK, "no kernel")]  # fmt: skip
    monkeypatch.setattr(check_ops, "operators", lambda subject: rows)
    monkeypatch.setattr(check_ops.work, "made_up", lambda device: SimpleNamespace(device="cpu"))
    assert failed(check_ops.examine(Subject(None, None, "cpu"))) == ["vocoder"]
    assert "ops" in check_all.PARTS


def test_all_makes_a_report_whatever_fails(convert_tiny, tmp_path, monkeypatch, quick_parts):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = shutil.copytree(convert_tiny("float32"), tmp_path / "ckpt")
    os.truncate(folder / "encoder.safetensors", 4096)
    found = list(check_all.results(Subject(folder, None, "cpu")))
    check_all.write_report(tmp_path / "out", found)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["holds"] is False
    assert [(r["check"], r["holds"]) for r in report["results"]][:3] == [
        ("doctor", False),
        ("mel", False),  # its filter bank lies in the damaged file
        ("ckpt", False),
    ]
    assert {r["check"] for r in report["results"]} == set(check_all.PARTS)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "encoder.safetensors" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("name", check.CHECKS)
def test_every_check_has_help(name, capsys):
    assert check.main([name, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["mel", "--json"], 0), (["mel", "nowhere.wav"], 1), (["ckpt", "nowhere"], 1), (["ckpt"], 2), (["nonsense"], 2),
     (["stages", "--ckpt", "nowhere"], 1), (["mel", "--device", "gpu"], 1)],
)  # fmt: skip
def test_exit_codes(arguments, code, capsys):
    assert check.main(arguments) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if "--json" in arguments:
        assert json.loads(said.out)["holds"] is True


def test_all_on_the_command_line(tmp_path, capsys, quick_parts):
    assert check.main(["all", "--device", "cpu", "--output", str(tmp_path / "report"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["holds"] is True
    assert "left out" in (tmp_path / "report" / "report.md").read_text()
    (tmp_path / "file").touch()
    assert check.main(["all", "--device", "cpu", "--output", str(tmp_path / "file")]) == 1
    assert "name another --output" in capsys.readouterr().err
