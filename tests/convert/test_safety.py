"""A destination appears whole or not at all: kills, interrupts, a full disk, a second converter, --force."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from covo_npu.convert import folder, stream
from covo_npu.convert.cli import main
from covo_npu.convert.errors import ConvertError
from covo_npu.convert.folder import check_space, new_folder
from covo_npu.convert.shards import read_shards
from covo_npu.runtime import output
from covo_npu.runtime.checkpoint.format import FILE_NAMES, CheckpointError, read_manifest
from covo_npu.runtime.process import SAFE_PATH

CONVERT = Path(sys.executable).with_name("covo-convert")
KILL_AT = Path(__file__).with_name("kill_at.py")


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory, tiny_source: Path) -> Path:
    """A converted checkpoint that differs from the tiny one: text only."""
    folder = tmp_path_factory.mktemp("older") / "checkpoint"
    assert main(["--src", str(tiny_source), "--dst", str(folder), "--no-token2wav"]) == 0
    return folder


@pytest.fixture(scope="module")
def changed_source(tmp_path_factory: pytest.TempPathFactory, tiny_source: Path) -> Path:
    """The tiny source with another byte in it."""
    folder = tmp_path_factory.mktemp("other") / "source"
    shutil.copytree(tiny_source, folder)
    shard = folder / "model-00003-of-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    return folder


def killed(source: Path, folder: Path, *options: str | Path) -> dict:
    folder.mkdir()
    command = [sys.executable, *SAFE_PATH, KILL_AT, source, folder / "checkpoint", *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "points", "none", "then_new"),
    # What random times meet depends on the machine; the steps are the same everywhere and meet every state.
    [(["--times", "16"], 16, 1, 0), (["--steps", "--text-only"], 16, 12, 2)],
    ids=["times", "steps"],
)
def test_kill_9_at_any_moment_leaves_all_or_nothing(
    options: list[str], points: int, none: int, then_new: int, tiny_source: Path, tmp_path: Path
):
    report = killed(tiny_source, tmp_path / "parent", *options)
    assert report["points"] >= points and report["killed"] >= points // 4, report
    states = Counter(report["states"])
    assert set(states) <= {"none", "new", "then new"}, states
    assert states["none"] >= none and states["then new"] >= then_new, states


@pytest.mark.slow
@pytest.mark.parametrize("renames", [[], ["--two-renames"]], ids=["exchange", "two renames"])
def test_kill_9_under_force_leaves_the_old_one_or_the_new_one(
    renames: list[str], changed_source: Path, tmp_path: Path, older: Path
):
    options = ["--times", "4", "--steps", "--text-only", "--force", "--old", older, *renames]
    report = killed(changed_source, tmp_path / "parent", *options)
    states = Counter(report["states"])
    assert set(states) <= {"old", "new", "then new"} | ({"none"} if renames else set()), states
    assert states["old"] >= 8 and states["new"] >= 1 and states["then new"] >= 3, states
    if renames:
        assert states["none"] <= 2, "only between the two renames"


def test_what_a_kill_between_two_renames_took_away_is_put_back(tiny_source: Path, older: Path, tmp_path: Path, capfd):
    shutil.copytree(older, tmp_path / ".checkpoint.retired")
    assert main(["--src", str(tiny_source), "--dst", str(tmp_path / "checkpoint")]) == 1
    assert "exists; --force replaces it" in capfd.readouterr().err
    assert read_manifest(tmp_path / "checkpoint").config.token2wav is None, "the old one is back"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(number: signal.Signals, tiny_source: Path, tmp_path: Path):
    parent = tmp_path / "parent"
    parent.mkdir()
    slow = (
        "import sys, time; from covo_npu.convert import stream, cli; write = stream._Target.write\n"
        "def slowly(*a): print('writing', flush=True); time.sleep(1); return write(*a)\n"
        "stream._Target.write = slowly; sys.exit(cli.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, *SAFE_PATH, "-c", slow, "--src", tiny_source, "--dst", parent / "checkpoint"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.strip() == f"covo-convert: {'interrupted' if number == signal.SIGINT else 'terminated'}"
    assert list(parent.iterdir()) == []


def test_a_file_that_may_not_grow_is_a_full_disk(tiny_source: Path, tmp_path: Path):
    parent = tmp_path / "parent"
    parent.mkdir()
    result = subprocess.run(
        [CONVERT, "--src", tiny_source, "--dst", parent / "checkpoint"],
        capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)),
    )  # fmt: skip
    assert result.returncode == 1 and result.stdout == ""
    assert "File too large; what was written is removed" in result.stderr and "Traceback" not in result.stderr
    assert list(parent.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tiny_source: Path, tmp_path: Path, monkeypatch, capfd):
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream.os, "pwrite", full)
    assert main(["--src", str(tiny_source), "--dst", str(tmp_path / "checkpoint")]) == 1
    assert "No space left on device; what was written is removed; make room" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), EOFError("ends at 4096")], ids=str)
def test_a_source_that_cannot_be_read_to_its_end_is_named(
    error: Exception, tiny_source: Path, convert: Callable, tmp_path: Path, monkeypatch
):
    def fails(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(stream.SourceFile, "read_into", fails)
    outcome = convert(tiny_source)
    assert outcome.code == 1 and "while llm.model.embed_tokens.weight is read" in outcome.err
    assert f"{tiny_source / 'model-00002-of-00004.safetensors'}: {error.args[-1]} " in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_free_space_is_checked_before_anything_is_written(tiny_source: Path, tmp_path: Path, monkeypatch, capfd):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=70_000_000))
    assert main(["--src", str(tiny_source), "--dst", str(tmp_path / "checkpoint")]) == 1
    err = capfd.readouterr().err
    assert "0.01 GB are needed, 0.07 GB are free" in err and "nothing was written" in err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConvertError, match="make room"):
        check_space(tmp_path / "not" / "there", 10**15)


def test_a_second_converter_is_refused_while_one_is_at_work(tiny_source: Path, tmp_path: Path, capfd):
    with new_folder(tmp_path / "checkpoint") as partial:
        (partial / "x").write_text("mine")
        command = [CONVERT, "--src", tiny_source, "--dst", tmp_path / "checkpoint"]
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 1 and "another process is writing there" in second.stderr
        assert (partial / "x").read_text() == "mine", "the first one's work is not touched"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_what_a_killed_converter_left_is_cleared(tiny_source: Path, tmp_path: Path):
    stale = tmp_path / ".checkpoint.partial-99999"
    stale.mkdir()
    (stale / "llm-rank0of1.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / ".checkpoint.lock").write_text("")  # a lock file that nobody holds
    others = [".checkpoint.partial-2.partial-1", ".checkpoint2.partial-1"]  # of other destinations
    for name in others:
        (tmp_path / name).mkdir()
    assert main(["--src", str(tiny_source), "--dst", str(tmp_path / "checkpoint")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [*others, "checkpoint"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS], ids=errno.errorcode.get)
def test_file_systems_without_locks_modes_and_syncs_of_folders_work(
    code: int, tiny_source: Path, convert: Callable, tmp_path: Path, monkeypatch, caplog
):
    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    def no_modes(*arguments: object, **keywords: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    sync = os.fsync
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "fsync", lambda fd: refuse() if stat.S_ISDIR(os.fstat(fd).st_mode) else sync(fd))
    monkeypatch.setattr(os, "chmod", no_modes)
    output.warn_once.cache_clear()
    assert convert(tiny_source).code == 0 and convert(tiny_source, "--force").code == 0
    read_manifest(tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "has no locks" in said[0] and "cannot put a file or folder on the disk" in said[1], said


def test_a_disk_that_fails_while_a_folder_is_synced_is_an_error(tmp_path: Path, monkeypatch):
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"), new_folder(tmp_path / "checkpoint"):
        pass


def test_a_lock_that_was_removed_meanwhile_does_not_count(tmp_path: Path, monkeypatch):
    """The first holder unlinks its lock file while the second has it open: the second must lock the new file."""
    locked, seen = fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        if not seen:
            (tmp_path / ".checkpoint.lock").unlink()
        seen.append(fd)
        locked(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with new_folder(tmp_path / "checkpoint"):
        assert len(seen) == 2
        assert os.path.samestat(os.fstat(seen[-1]), (tmp_path / ".checkpoint.lock").stat())


def test_an_error_inside_leaves_nothing(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "checkpoint") as partial:
        (partial / "file").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


# --- destinations


def test_an_existing_checkpoint_is_kept_without_force_and_replaced_with_it(
    tiny_source: Path, convert: Callable, older: Path, tmp_path: Path
):
    target = tmp_path / "target"
    shutil.copytree(older, target)
    refused = convert(tiny_source)
    assert refused.code == 1 and "exists; --force replaces it" in refused.err
    assert read_manifest(target).config.token2wav is None
    assert convert(tiny_source, "--force").code == 0
    assert read_manifest(target).config.token2wav is not None
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_failed_conversion_under_force_keeps_the_old_one(
    source: Path, convert: Callable, older: Path, tmp_path: Path
):
    shutil.copytree(older, tmp_path / "target")
    os.truncate(source / "model-00002-of-00004.safetensors", 1000)
    assert convert(source, "--force").code == 1
    assert read_manifest(tmp_path / "target").config.token2wav is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_force_does_not_remove_what_is_no_checkpoint(tiny_source: Path, convert: Callable, tmp_path: Path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.tex").write_text("years of work")
    outcome = convert(tiny_source, "--force")
    assert outcome.code == 1 and "holds something else than a converted checkpoint" in outcome.err
    assert (tmp_path / "target" / "thesis.tex").exists()


def test_force_does_not_remove_what_somebody_put_beside_a_checkpoint(
    tiny_source: Path, convert: Callable, older: Path, tmp_path: Path
):
    shutil.copytree(older, tmp_path / "target")
    (tmp_path / "target" / "replies").mkdir()
    (tmp_path / "target" / "my.safetensors").write_text("a week of training")
    outcome = convert(tiny_source, "--force")
    assert outcome.code == 1 and "else than a converted checkpoint: my.safetensors; replies; --force" in outcome.err
    assert (tmp_path / "target" / "my.safetensors").exists() and (tmp_path / "target" / "replies").exists()


def test_all_files_that_a_checkpoint_may_have_are_known(convert_tiny: Callable):
    names = [path.name for path in convert_tiny("float32", 2).iterdir()]
    assert len(names) == 7 and all(map(FILE_NAMES.fullmatch, names))


def test_an_empty_folder_is_as_good_as_none(tiny_source: Path, convert: Callable, tmp_path: Path):
    (tmp_path / "target").mkdir()
    assert convert(tiny_source).code == 0
    read_manifest(tmp_path / "target")


def test_parents_of_the_destination_are_made(tiny_source: Path, convert: Callable, tmp_path: Path):
    assert convert(tiny_source, dst=tmp_path / "a" / "b" / "target").code == 0
    read_manifest(tmp_path / "a" / "b" / "target")


def test_a_destination_that_is_a_link_stays_one(tiny_source: Path, convert: Callable, older: Path, tmp_path: Path):
    shutil.copytree(older, tmp_path / "real")
    (tmp_path / "target").symlink_to("real")
    assert convert(tiny_source, "--force").code == 0
    assert (tmp_path / "target").is_symlink() and read_manifest(tmp_path / "real").config.token2wav is not None


def test_links_that_lead_to_themselves_are_one_message(tiny_source: Path, convert: Callable, tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    for outcome in (convert(tmp_path / "loop"), convert(tiny_source, dst=tmp_path / "loop")):
        assert outcome.code == 1 and "loop" in outcome.err and outcome.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize("place", ["same", "inside", "around"])
def test_source_and_destination_may_not_overlap(place: str, source: Path, convert: Callable):
    target = {"same": source, "inside": source / "converted", "around": source.parent}[place]
    before = sorted(source.rglob("*"))
    outcome = convert(source, "--force", dst=target)
    assert outcome.code == 1 and "overlap" in outcome.err
    assert sorted(source.rglob("*")) == before


@pytest.mark.parametrize("name", ["é" * 127, "x" * 255, "caf\udce9", "a b*[c]?"])
def test_any_name_that_a_file_system_takes_will_do(
    name: str, tiny_source: Path, convert: Callable, tmp_path: Path, convert_tiny: Callable
):
    source = tmp_path / f"{name[:100]}-source"
    shutil.copytree(tiny_source, source)
    for _ in ("new", "replaced"):
        stale = folder._beside(tmp_path / name, "partial-99999")
        stale.mkdir()
        assert convert(source, "--force", dst=tmp_path / name).code == 0
        assert {path.name for path in tmp_path.iterdir()} == {name, source.name}
    assert (tmp_path / name / "manifest.json").read_bytes() == (convert_tiny("bfloat16") / "manifest.json").read_bytes()


def test_a_destination_that_is_a_file(tiny_source: Path, convert: Callable, tmp_path: Path):
    (tmp_path / "target").write_text("a file")
    outcome = convert(tiny_source, "--force")
    assert outcome.code == 1 and "is not a folder" in outcome.err


def test_a_destination_on_which_a_file_system_is_mounted(tiny_source: Path, convert: Callable):
    outcome = convert(tiny_source, "--force", dst=Path("/proc"))
    assert outcome.code == 1 and "/proc is where a file system is mounted" in outcome.err


def test_checkpoints_are_readable_by_all_whatever_the_umask(tiny_source: Path, convert: Callable, tmp_path: Path):
    before = os.umask(0o077)
    try:
        assert convert(tiny_source).code == 0
    finally:
        os.umask(before)
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "target").iterdir()} == {0o644}


# --- the command line


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny_source: Path, convert: Callable, tmp_path: Path):
    outcome = convert(tiny_source, "--dry-run")
    assert outcome.code == 0 and list(tmp_path.iterdir()) == []
    for part in ("llm-rank0of1.safetensors: 24 tensors", "116 folded", "15 fused", "left out", "nothing was written"):
        assert part in outcome.out
    report = json.loads(convert(tiny_source, "--dry-run", "--json", "-").out)
    assert report["tensors_in"] == 923 and report["tensors_out"] == 567 and list(tmp_path.iterdir()) == []


def test_a_verbose_dry_run_has_one_line_for_every_tensor_with_all_its_names(tiny_source: Path, convert: Callable):
    lines = [line for line in convert(tiny_source, "--dry-run", "-v").out.splitlines() if " <- " in line]
    assert len(lines) == 567
    layer = "llm.model.layers.1.self_attn"
    assert (
        f"llm.layers.1.qkv_proj.weight <- {layer}.q_proj.weight + {layer}.k_proj.weight + {layer}.v_proj.weight: "
        "rows [288, 224] BF16 in llm-rank0of1.safetensors"
    ) in lines
    (bias,) = [line for line in lines if line.startswith("encoder.layers.0.qkv_proj.bias <- ")]
    assert bias.endswith(
        "encoder.layers.0.self_attn.q_proj.bias + zeros + encoder.layers.0.self_attn.v_proj.bias: "
        "rows [192] BF16 in encoder.safetensors"
    )
    named = " ".join(lines)
    for name in read_shards(tiny_source).tensors:
        assert f" {name}" in named, name
    rows = json.loads(convert(tiny_source, "--dry-run", "-v", "--json", "-").out)["tensors"]
    assert [row["target"] for row in rows] == [line.partition(" <- ")[0] for line in lines]


def test_json_is_one_object_that_agrees_with_the_disk(tiny_source: Path, convert: Callable, tmp_path: Path):
    outcome = convert(tiny_source, "--json", "-")
    report = json.loads(outcome.out)
    assert "567 out (12.61 MB)" in outcome.err  # what people read goes there
    assert report["bytes_written"] == sum(path.stat().st_size for path in (tmp_path / "target").iterdir())
    assert report["files"]["token2wav.safetensors"]["tensors"] == 494 and report["seconds"] > 0


def test_the_summary_says_what_came_in_and_what_went_out(tiny_source: Path, convert: Callable):
    out = convert(tiny_source).out
    assert "923 tensors in (12.63 MB), 567 out (12.61 MB), bfloat16" in out
    assert "left out: token2latent.blocks.{}.attn.rotary.* 2 tensors" in out and "GB/s" in out


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["--tp", "0"], 2, "--tp"),
        (["--tp", "4"], 1, "4 tensor-parallel ranks cannot share 14 heads, 2 kv heads evenly"),
        (["--dtype", "int8"], 2, "'int8' is not one of"),
        (["--voice", "nowhere"], 1, "nowhere: no such folder; a voice is one with prompt_token.npy"),
        (["--nonsense"], 2, "No such option"),
    ],
)
def test_wrong_options(options: list[str], code: int, part: str, tiny_source: Path, convert: Callable, tmp_path: Path):
    outcome = convert(tiny_source, *options)
    assert outcome.code == code and part in outcome.err and outcome.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_half_is_no_checkpoint(convert_tiny: Callable[[str], Path], tmp_path: Path):
    """What the promise of all or nothing rests on: a folder whose manifest is not written yet is refused."""
    shutil.copytree(convert_tiny("bfloat16"), tmp_path / "half")
    (tmp_path / "half" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="the conversion did not finish"):
        read_manifest(tmp_path / "half")
