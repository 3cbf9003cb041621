"""covo-check: each check holds on a sound machine and checkpoint, and each of its findings can fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_checkpoint import block_digests, remove_file, replace_file, rewrite_in_layout_1, rewrite_manifest
from safetensors.torch import load_file

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import wav
from covo_npu.runtime.checkpoint.format import PREFIX, read_manifest
from covo_npu.runtime.model import CovoAudio
from covo_npu.runtime.networks.adapter import Adapter
from covo_npu.runtime.networks.qwen2 import DecoderLayer
from covo_npu.runtime.options import LoadOptions
from covo_npu.runtime.parallel import Collectives
from covo_npu.tools import question
from covo_npu.tools.check import all as check_all
from covo_npu.tools.check import ckpt as check_ckpt
from covo_npu.tools.check import cli as check
from covo_npu.tools.check import doctor as check_doctor
from covo_npu.tools.check import ops as check_ops
from covo_npu.tools.check import repeat as check_repeat
from covo_npu.tools.check import stages as check_stages
from covo_npu.tools.check.doctor import Probe
from covo_npu.tools.check.result import Finding, Result, Subject, as_markdown, as_text, below, without_home

COVO_CHECK = Path(sys.executable).with_name("covo-check")


def on(device: str, ckpt: Path | None = None, **options) -> Subject:
    return Subject(ckpt, None, LoadOptions(device, **options))


def failed(result: Result) -> list[str]:
    return [finding.name for finding in result.findings if finding.holds is False]


# --- results


def test_a_result_holds_only_if_nothing_promised_fails():
    informs, holds, fails = (Finding("a", "1", holds=value) for value in (None, True, False))
    assert Result("x", "", (informs, holds)).holds
    assert not Result("x", "", (informs, holds, fails)).holds
    assert "1 of 2 do not hold" in as_text(Result("x", "", (informs, holds, fails)))
    assert "does not hold" in as_markdown(Result("x", "a|b", (fails,)))


def test_nan_is_below_nothing():
    assert below("x", 1.0, 1.0, "").holds is True
    assert below("x", 1.1, 1.0, "").holds is False
    assert below("x", float("nan"), 1.0, "").holds is False


def test_home_is_not_told(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert without_home(f"{tmp_path}/me/x {tmp_path}/me") == "~/x ~"
    assert without_home(f"{tmp_path}/meadow") == f"{tmp_path}/meadow"


# --- the question


def test_the_made_up_question_is_the_same_everywhere():
    samples = question.made_up()
    assert samples.shape == (question.SECONDS * question.RATE,)
    assert np.abs(samples).max() < 0.9
    assert float(np.abs(samples).sum()) == pytest.approx(6538.6, rel=1e-4)


# --- doctor

TORCH = {"version": "2.13.0", "capability": "AVX512", "threads": 2, "works": True}
GPU = {"count": 2, "name": "H200", "free": 6e10, "total": 6.4e10, "works": True}
NPU = {"torch": "2.9.0", "torch_npu": "2.9.0.post1", "count": 1, "name": "Ascend910", "free": 6e10, "total": 6.4e10,
       "works": True}  # fmt: skip


PROCESSOR = {"features": ["avx2", "fma"], "missing": None, "known": ["amx", "avx2"], "usable": ["avx2"]}


def doctor(ckpt=None, device="auto", **answers):
    found = {"torch": Probe(TORCH), "packages": Probe({"numpy": "2.0"}), "npu": Probe(NPU), "cuda": Probe({"count": 0})}
    found |= {"processor": Probe(PROCESSOR), "products": Probe({"lines": []})} | answers
    return check_doctor.examine(on(device, ckpt), lambda name, *rest: found[name])


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
    done = subprocess.run([COVO_CHECK, "doctor", "--ckpt", convert_tiny("float32"), "--device", "cpu", "--json", "-"],
                          capture_output=True, text=True)  # fmt: skip
    result = json.loads(done.stdout)
    assert (done.returncode, result["holds"]) == (0, True), done.stdout
    names = {finding["name"] for finding in result["findings"]}
    assert {"torch", "NPU", "CUDA", "memory", "working folder", "temporary files", "checkpoint"} <= names
    assert any(f["name"] == "covo-run --device cpu" and f["measured"] == "will run" for f in result["findings"])


@pytest.mark.parametrize(
    ("answer", "says", "holds"),
    [
        (Probe(PROCESSOR), "backend cpu: avx2; not on this machine: amx", None),
        (Probe({"features": [], "missing": "no libcovo.so: install gcc"}), "backend native", None),
        (Probe(None, "COVO_MAX_CPU_ISA=mmx: unknown instruction set"), "COVO_MAX_CPU_ISA=mmx", False),
    ],
)
def test_doctor_says_which_kernels_serve_the_processor(answer, says, holds):
    rows = {finding.name: finding for finding in doctor(processor=answer).findings}
    assert says in rows["kernels for CPUs"].measured and rows["kernels for CPUs"].holds is holds
    assert rows["covo-run --device cpu"].holds is (holds is None)
    assert "threads, PyTorch as AVX512" in rows["processor"].measured
    if answer.found:
        assert rows["kernels for CPUs"].fix == (answer.found["missing"] or "")


def test_doctor_imports_nothing_that_may_be_broken():
    code = "import sys; from covo_npu.tools.check import doctor; sys.exit({'torch', 'numpy'} & set(sys.modules) or 0)"
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

    def run(name, environment=None, *arguments):
        if name == "torch":
            return working if environment == {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} else broken
        return Probe({"numpy": "2"}) if name == "packages" else broken

    result = check_doctor.examine(on("npu:0"), run)
    assert {"torch", "torch_npu", "covo-run --device npu:0"} <= set(failed(result))
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in fixes(result)
    assert "set_env.sh" in fixes(result)


def test_doctor_with_a_sound_npu(with_npu):
    result = doctor(device="npu:0")
    assert result.holds, as_text(result)


@pytest.mark.parametrize(
    ("version", "says"), [("8.5.0", "a released pair"), ("9.1.0", "a released pair"), ("8.9.0", None)]
)
def test_doctor_knows_which_torch_npu_was_released_for_cann(with_npu, monkeypatch, version, says):
    monkeypatch.setattr(check_doctor, "_cann_version", lambda home: version)
    found = {finding.name: finding.measured for finding in doctor(device="npu:0").findings}
    assert found.get("CANN and torch_npu") == says
    of_another = doctor(device="npu:0", npu=Probe(NPU | {"torch": "2.13.0", "torch_npu": "2.13.0"}))
    if says:
        [finding] = [finding for finding in of_another.findings if finding.name == "CANN and torch_npu"]
        assert finding.measured == "not a released pair" and "pip install torch==2." in finding.fix


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
    assert {name, "covo-run --device npu:0"} <= set(failed(result))
    assert advice in fixes(result)


def test_doctor_without_set_env(with_npu, monkeypatch):
    monkeypatch.delenv("ASCEND_HOME_PATH")
    assert "source " in fixes(doctor(device="npu:0"))


def test_doctor_looks_at_the_device_that_was_asked_for():
    """One card of two, and a third."""
    asked = []

    def cuda(index):
        asked.append(index)
        return Probe(GPU if int(index) < 2 else {"count": 2})

    def ask(name, *arguments):
        others = {"torch": TORCH, "packages": {"numpy": "2.0"}, "processor": PROCESSOR}
        return cuda(arguments[1]) if name == "cuda" else Probe(others[name])

    for device, rows, holds in (
        ("cuda:1", "covo-run --device cuda:1", True),
        ("cuda:2", "covo-run --device cuda:2", False),
    ):
        found = {finding.name: finding for finding in check_doctor.examine(on(device), ask).findings}
        assert found[rows].holds is holds and found["CUDA"].holds is holds
    assert asked == ["1", "2"]
    assert found["CUDA"].measured == "2 devices can be used" and found["CUDA"].bound == "cuda:2 is one of them"


def test_doctor_asked_for_a_device_that_is_not_there():
    result = doctor(device="cuda:0")
    assert {"CUDA", "covo-run --device cuda:0"} <= set(failed(result))


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


def test_doctor_says_who_multiplies(convert_tiny):
    """Of the tiny checkpoint nothing is measured; what is known of no checkpoint is not told."""
    ckpt = convert_tiny("int8")
    assert check_doctor.probe("products", None, str(ckpt)).found == {"lines": []}
    line = "37888 x 3584 int8, up to rows: 1 covo"
    assert line in as_text(doctor(ckpt=ckpt, products=Probe({"lines": [line]})))
    assert "products" not in as_text(doctor(products=Probe({"lines": [line]})))
    silent = doctor(ckpt=ckpt, products=Probe(None, "no answer"))
    assert "no answer" in as_text(silent) and not failed(silent)


@pytest.mark.parametrize(("dtype", "less"), [("bfloat16", "int8"), ("int8", "int8+head"), ("int8+head", None)])
def test_doctor_advises_on_memory(dtype, less, convert_tiny, with_npu, monkeypatch):
    """The tiny model, whose bytes and format it names, is advised to the next smaller format."""
    monkeypatch.setattr(check_doctor, "available_memory_bytes", lambda: 3.0e9)
    small = Probe({**NPU, "torch": "2.9.0", "torch_npu": "2.9.0", "free": check_doctor.ACTIVATION_BYTES})
    findings = {f.name: f for f in doctor(ckpt=convert_tiny(dtype), npu=small).findings}
    said = {name: finding.fix for name, finding in findings.items()}
    assert (f"products of the LLM in {dtype}, " in findings["checkpoint"].measured) == (dtype != "bfloat16")
    assert "speed of the disk" in said["memory"] and "run out of memory" in said["NPU memory"]
    for name in ("memory", "NPU memory"):
        assert f"a conversion with --weights {less} needs less" in said[name] if less else "--weights" not in said[name]
    large = Probe({**NPU, "torch": "2.9.0", "torch_npu": "2.9.0"})
    assert {f.name: f.fix for f in doctor(ckpt=convert_tiny(dtype), npu=large).findings}["NPU memory"] == ""


def test_doctor_holds_a_card_to_what_one_rank_has(convert_tiny, with_npu):
    """And the memory of a CPU, which all ranks share, to all of it."""
    ckpt = convert_tiny("float32", 2)
    files = {name: file.bytes for name, file in read_manifest(ckpt).files.items() if file.data_start is not None}
    own = sum(files.values()) - files["llm-rank1of2.safetensors"]
    for short, fits in ((0, True), (1, False)):
        free = own + check_doctor.ACTIVATION_BYTES - short
        npu = Probe({**NPU, "torch": "2.9.0", "torch_npu": "2.9.0", "free": free})
        found = {f.name: f for f in doctor(ckpt=ckpt, npu=npu).findings}
        assert (found["NPU memory"].fix == "") is fits
    assert found["memory"].bound.startswith(f"{sum(files.values()) / 1e9:.1f} GB")


def test_doctor_on_a_full_disk(monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(check_doctor.tempfile, "TemporaryFile", full)
    result = doctor()
    assert {"working folder", "temporary files"} <= set(failed(result))
    assert "No space left" in as_text(result)


# --- repeat


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"tokens": [1, 2, 4]}, "tokens"),
        ({"tokens": [1, 2]}, "tokens"),
        ({"text": "b"}, "text"),
        ({"speech": b"x"}, "speech"),
    ],
)
def test_repeat_sees_each_difference(change, name):
    first = {"tokens": [1, 2, 3], "text": "a", "speech": b"wav"}
    second = first | change
    wrong = [finding.name for finding in check_repeat.differences(first, second, "here", "") if not finding.holds]
    assert wrong == [f"{name}, here"]
    assert all(f.holds is None for f in check_repeat.differences(first, second, "here", "", promised=False))


def test_repeat_on_the_tiny_model(convert_tiny):
    result = check_repeat.examine(on("cpu", convert_tiny("float32")))
    assert result.holds, as_text(result)
    assert "64 of 64 equal" in as_text(result)
    assert any("not promised" in finding.bound for finding in result.findings) == (len(os.sched_getaffinity(0)) > 1)


def test_repeat_hands_its_options_on_and_says_why_covo_run_failed(convert_tiny):
    with pytest.raises(CovoError, match=r"covo-run failed: .*unknown backend 'magic'"):
        check_repeat.examine(on("cpu", convert_tiny("float32"), backend="magic"))


# --- stages


@pytest.fixture(scope="module")
def saved(convert_tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("stages") / "cpu.stages"
    result = check_stages.run(on("cpu", convert_tiny("float32")), save_to=path)
    assert result.holds, as_text(result)
    return path


def test_stages_against_the_same_and_against_another_dtype_and_backend(convert_tiny, saved):
    for options, speech in (({}, True), ({"dtype": "bfloat16"}, False), ({"backend": "reference"}, False)):
        result = check_stages.run(on("cpu", convert_tiny("float32"), **options), against=saved, speech=speech)
        assert result.holds, as_text(result)
        compared = set(check_stages.BOUNDS) - set(() if speech else check_stages.SPEECH)
        assert compared <= {finding.name for finding in result.findings}


def percents(finding):
    return [float(figure) / 100 for figure in finding.source.rpartition("%: ")[2].split()]


def test_stages_take_the_dtypes_of_speech(convert_tiny, saved, capsys):
    """On the command line, too; each stage is held to its own dtype."""
    dtypes = ["--token2wav-dtype", "bfloat16", "--vocoder-dtype", "bfloat16", "--dtype", "float32"]
    ckpt = ["--ckpt", str(convert_tiny("float32")), "--device", "cpu"]
    assert check.main(["stages", *ckpt, *dtypes, "--against", str(saved), "--json", "-"]) == 0
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    for stage, dtype in {"logits": "float32", "latents": "bfloat16", "waveform": "bfloat16"}.items():
        assert found[stage]["source"].startswith(f"rounding of {dtype},"), stage


def test_stages_say_what_weights_in_8_bits_cost(convert_tiny, saved, tmp_path):
    """The encoder is the same in both; the logits are told, not judged. Another source has no such comparison."""
    plain, eight = on("cpu", convert_tiny("bfloat16")), on("cpu", convert_tiny("int8"))
    assert check_stages.run(plain, save_to=tmp_path / "plain", speech=False).holds
    result = check_stages.run(eight, save_to=tmp_path / "eight", against=tmp_path / "plain", speech=False)
    assert result.holds, as_text(result)
    found = {finding.name: finding for finding in result.findings}
    for name in ("rows", "logits"):
        assert found[name].holds is None and "weights in int8 against bfloat16" in found[name].bound
        assert 1e-3 < float(found[name].measured) < 0.2
    assert found["encoder"].holds and float(found["encoder"].measured) == 0
    here, there = (load_file(convert_tiny(weights) / PREFIX) for weights in ("int8", "bfloat16"))
    for layer, figure in enumerate(percents(found["layers, the format's cost"])):
        a, b = (torch.cat([t[f"prefix.{kind}"][layer] for kind in ("keys", "values")]).double() for t in (here, there))
        assert figure == pytest.approx(float((a - b).norm() / b.norm()), rel=0.1)  # two digits are told
    for name in ("layers, rounding here", "layers, rounding in the file"):
        assert found[name].holds and len(percents(found[name])) == layer + 1 == 3
        assert max(percents(found[name])) < max(percents(found["layers, the format's cost"]))
    stages, origin = check_stages.load(tmp_path / "plain")
    for change in ({"exact": stages["exact"][:, :1]}, {"rows": stages["rows"][..., :-1, :]}):
        check_stages.save(tmp_path / "odd", {name: t.contiguous() for name, t in (stages | change).items()}, origin)
        with pytest.raises(CovoError, match="the shape of rows is not that of the file"):
            check_stages.run(eight, against=tmp_path / "odd", speech=False)
    headless = check_stages.run(on("cpu", convert_tiny("int8+head")), against=tmp_path / "eight", speech=False)
    found = {finding.name: finding for finding in headless.findings}
    assert headless.holds and "weights in int8+head against int8" in found["logits"].bound
    assert float(found["rows"].measured) == 0 < float(found["logits"].measured) < 0.05  # the head is behind the rows
    stages, origin = check_stages.load(tmp_path / "plain")
    check_stages.save(tmp_path / "other", stages, replace(origin, source="another"))
    with pytest.raises(CovoError, match="the checkpoint is not that of the file"):
        check_stages.run(eight, against=tmp_path / "other", speech=False)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(stage, dtype) for stage, bounds in check_stages.BOUNDS.items() for dtype in bounds]
)
def test_each_stage_can_fail(saved, stage, dtype):
    stages, _ = check_stages.load(saved)
    size = 0.005 if dtype == "float32" else 0.2
    noisy = stages[stage] + size * stages[stage].std() * torch.randn_like(stages[stage])
    for wrong in (noisy, stages[stage] * float("nan")):
        found = check_stages.compare(stages | {stage: wrong}, stages, dict.fromkeys(stages, "float32") | {stage: dtype})
        assert [finding.name for finding in found if finding.holds is False] == [stage]


def test_a_wrong_network_is_named_alone(convert_tiny, saved, monkeypatch):
    """The logits behind it are computed from what the file holds, so they hold."""
    right = Adapter.forward
    monkeypatch.setattr(Adapter, "forward", lambda self, x: 1.01 * right(self, x))
    subject = on("cpu", convert_tiny("float32"))
    assert failed(check_stages.run(subject, against=saved, speech=False)) == ["adapter"]


def test_stages_of_two_ranks_against_those_of_one(convert_tiny, saved, monkeypatch):
    """And a rank whose sums are a little too large is found where they are."""
    subject = on("cpu", convert_tiny("float32", 2), tp=2)
    result = check_stages.run(subject, against=saved)
    assert result.holds, as_text(result)
    right = Collectives.all_reduce
    monkeypatch.setattr(Collectives, "all_reduce", lambda self, x: 1.01 * right(self, x))
    wrong = ["layers, rounding here", "rows", "logits"]
    assert failed(check_stages.run(subject, against=saved, speech=False)) == wrong


def test_a_run_is_held_to_the_checkpoints_own_rows(convert_tiny, monkeypatch):
    """Without any file: sums that are a little too large in one product, where a wrong adapter changes nothing."""
    subject = on("cpu", convert_tiny("bfloat16"))
    name = "layers, rounding here"
    figures = [f for f in check_stages.run(subject, speech=False).findings if f.name == name]
    assert [figure.holds for figure in figures] == [True] and 0 < float(figures[0].measured) < 0.08
    monkeypatch.setattr(Adapter, "forward", lambda self, x, right=Adapter.forward: 1.5 * right(self, x))
    assert check_stages.run(subject, speech=False).holds
    right = DecoderLayer.mlp
    monkeypatch.setattr(DecoderLayer, "mlp", lambda self, x: 1.3 * right(self, x))
    assert failed(check_stages.run(subject, speech=False)) == [name]


def test_stages_of_something_else_are_refused(convert_tiny, saved, tmp_path):
    subject = on("cpu", convert_tiny("float32"))
    other = tmp_path / "other.wav"
    wav.write_wav(other, torch.from_numpy(question.made_up(1.0)), question.RATE)
    with pytest.raises(CovoError, match="the audio is not that of the file"):
        check_stages.run(replace(subject, wav=other), against=saved)
    with pytest.raises(CovoError, match="the checkpoint is not that of the file"):
        check_stages.run(on("cpu", convert_tiny("bfloat16")), against=saved)
    (tmp_path / "rubbish").write_bytes(b"rubbish" * 100)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "rubbish", convert_tiny("float32") / "encoder.safetensors", tmp_path, tmp_path / "pipe"):
        with pytest.raises(CovoError, match=f"{path}: .*(not a|no such) file of `covo-check stages --save`"):
            check_stages.run(subject, against=path)


def test_stages_replace_stages_and_nothing_else(convert_tiny, saved, tmp_path):
    """What cannot be written is known before anything is computed: there is no checkpoint to load."""
    subject = on("cpu", tmp_path / "none")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CovoError, match=r"thesis\.tex: exists and is not a result of this command"):
        check_stages.run(subject, save_to=tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(CovoError, match="cannot be written"):
        check_stages.run(subject, save_to=tmp_path / "thesis.tex" / "x.stages")
    shutil.copy(saved, tmp_path / "cpu.stages")
    (tmp_path / "link").symlink_to("cpu.stages")
    subject = on("cpu", convert_tiny("float32"))
    assert check_stages.run(subject, save_to=tmp_path / "link", against=tmp_path / "link", speech=False).holds
    assert (tmp_path / "link").is_symlink()
    assert "waveform" in check_stages.load(saved)[0].keys() - check_stages.load(tmp_path / "cpu.stages")[0].keys()


def test_a_stage_that_is_missing_or_has_another_shape_fails(saved):
    stages, _ = check_stages.load(saved)
    shorter = {**stages, "waveform": stages["waveform"][:-240]}
    del shorter["latents"]
    wrong = [
        finding.name
        for finding in check_stages.compare(shorter, stages, dict.fromkeys(stages, "float32"))
        if finding.holds is False
    ]
    assert wrong == ["latents", "waveform"]


# --- ckpt


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_checkpoint_holds_against_its_source(convert_tiny, tiny_source, dtype):
    result = check_ckpt.examine_folder(convert_tiny(dtype), tiny_source, None)
    assert result.holds, as_text(result)
    assert len(result.findings) == 8


def test_a_checkpoint_of_layout_1_holds_too(convert_tiny, tiny_source, tmp_path):
    folder = shutil.copytree(convert_tiny("float32"), tmp_path / "ckpt")
    rewrite_in_layout_1(folder)
    result = check_ckpt.examine_folder(folder, tiny_source, None)
    assert result.holds, as_text(result)


# One target of every operation, and of each file.
TARGETS = [
    "llm.layers.1.qkv_proj.weight",
    "llm.layers.2.gate_up_proj.weight",
    "encoder.layers.0.qkv_proj.bias",
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
    remove_file(folder, PREFIX)  # it has seen the right weights
    assert check_ckpt.examine_folder(folder, None, None).holds
    result = check_ckpt.examine_folder(folder, tiny_source, None)
    assert failed(result) == ["tensors against the source"]
    assert f"1 wrong: {target}" in as_text(result)


def test_a_system_prompt_of_the_weights_before_they_were_quantised_is_found(convert_tiny, tmp_path):
    folder = shutil.copytree(convert_tiny("int8"), tmp_path / "ckpt")
    assert check_ckpt.examine_folder(folder, None, None).holds
    tensors = load_file(convert_tiny("bfloat16") / PREFIX)
    replace_file(folder, PREFIX, {name: t for name, t in tensors.items() if not name.startswith("__pad")})
    assert failed(check_ckpt.examine_folder(folder, None, None)) == ["system prompt"]


def test_rows_of_the_system_prompt_that_cannot_be_computed_are_found(convert_tiny, monkeypatch):
    """No numbers in a layer that is not the first: Python's max would pass over them."""
    computed = check_ckpt.computed_prefix

    def broken(manifest):
        rows = computed(manifest)
        values = rows.values.clone()
        values[1] = float("nan")
        return replace(rows, values=values)

    monkeypatch.setattr(check_ckpt, "computed_prefix", broken)
    assert failed(check_ckpt.examine_folder(convert_tiny("float32"), None, None)) == ["system prompt"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_system_prompt_of_other_weights_is_found(convert_tiny, tmp_path, dtype):
    """Under right checksums: the values of one layer off by 3 %, the rows of another prompt, no numbers."""
    for fault in ("a layer", "other ids", "not a number"):
        folder = shutil.copytree(convert_tiny(dtype), tmp_path / fault)
        tensors = {name: t.clone() for name, t in load_file(folder / PREFIX).items() if not name.startswith("__pad")}
        if fault == "a layer":
            tensors["prefix.values"][1] *= 1.03
        elif fault == "other ids":
            tensors["prefix.input_ids"][3] += 1
        else:
            tensors["prefix.keys"][0, 0, 0, 0] = float("nan")
        replace_file(folder, PREFIX, tensors)
        assert failed(check_ckpt.examine_folder(folder, None, None)) == ["system prompt"], fault


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


# --- ops


def test_every_stage_runs_on_the_cpu(convert_tiny):
    result = check_ops.examine(on("cpu", convert_tiny("bfloat16")))
    assert result.holds, as_text(result)
    assert [finding.name for finding in result.findings] == [
        "loading", "encoder and adapter", "prefill and decoding", "sampling", "flow matching and vocoder",
    ]  # fmt: skip


def test_a_stage_that_is_refused_and_one_that_falls_back_fail(monkeypatch, convert_tiny):
    warning = (
        b"[W1125 07:35:28.1 VariableFallbackKernel.cpp:230] Warning: CAUTION: The operator 'aten::cumsum.out' is not "
        b"currently supported on the NPU backend and will fall back to run on the CPU. (function npu_cpu_fallback)\n"
    )

    def encode(self, waveform):
        raise RuntimeError("aten::fft_rfft: error code 161002\nmore of it")

    monkeypatch.setattr(CovoAudio, "encode", encode)
    monkeypatch.setattr(CovoAudio, "token2wav", lambda self, codes: os.write(2, warning))
    result = check_ops.examine(on("cpu", convert_tiny("bfloat16")))
    found = {finding.name: finding.measured for finding in result.findings if not finding.holds}
    assert found["encoder and adapter"] == "refused: aten::fft_rfft: error code 161002"
    assert found["flow matching and vocoder"] == "falls back: aten::cumsum.out"


# --- all, and the command line


@pytest.fixture
def quick_parts(monkeypatch):
    """ops without a checkpoint makes one of half a gigabyte: the tests of ops have another one."""
    monkeypatch.setattr(check_all, "WITHOUT_CKPT", ("doctor",))


@pytest.mark.slow
def test_all_is_all_of_them_and_makes_a_report_whatever_fails(convert_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = shutil.copytree(convert_tiny("float32"), tmp_path / "ckpt")
    os.truncate(folder / "encoder.safetensors", 4096)
    found = list(check_all.results(on("cpu", folder)))
    check_all.write_report(tmp_path / "out", found)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["holds"] is False
    without_weights = {"kernels", "launches", "graphs", "transfer"}  # of these the CPU has no more to say
    assert {r["check"]: r["holds"] for r in report["results"]} == {
        name: name in without_weights for name in check.CHECKS if name != "all"
    }
    text = (tmp_path / "out" / "report.md").read_text()
    assert "encoder.safetensors" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["doctor", "--device", "cpu", "--json", "-"], 0), (["stages", "--ckpt", "nowhere"], 1), (["ckpt"], 2),
     (["ckpt", "--ckpt", "nowhere"], 1), (["nonsense"], 2), (["ops", "--device", "gpu"], 1)],
)  # fmt: skip
def test_exit_codes(arguments, code, capsys):
    assert check.main(arguments) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if "--json" in arguments:
        assert json.loads(said.out)["holds"] is True


def test_all_on_the_command_line(tmp_path, capsys, quick_parts):
    arguments = ["all", "--device", "cpu", "--output"]
    assert check.main([*arguments, str(tmp_path / "report"), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["holds"] is True
    assert "left out" in (tmp_path / "report" / "report.md").read_text()
    (tmp_path / "file").touch()
    assert check.main([*arguments, str(tmp_path / "file")]) == 1
    assert "name another --output" in capsys.readouterr().err


def test_doctor_shows_what_libsndfile_decodes():
    import soundfile

    from covo_npu.tools.check import probes

    says = probes.packages()["soundfile"]
    assert f"libsndfile {soundfile.__libsndfile_version__} decodes WAV, FLAC, MP3" in says
    assert says in as_text(doctor(packages=Probe(probes.packages())))


def test_a_report_does_not_replace_what_no_check_wrote(tmp_path):
    check_all.write_report(tmp_path, [])
    check_all.write_report(tmp_path, [])
    (tmp_path / "report.md").write_text("# My report")
    before = (tmp_path / "report.json").read_bytes()
    with pytest.raises(check_all.CheckError, match=r"report\.md: exists"):
        check_all.write_report(tmp_path, [])
    assert (tmp_path / "report.md").read_text() == "# My report"
    assert (tmp_path / "report.json").read_bytes() == before
