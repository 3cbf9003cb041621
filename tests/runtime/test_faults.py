"""Damage and hostile files: always one clear message with the right file's name, no crash, no hang, no thread left."""

import errno
import gc
import os
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from made_checkpoint import LLM, large_tensors, small_tensors, write_checkpoint

from covo_npu.runtime.checkpoint import loader
from covo_npu.runtime.checkpoint.format import BLOCK_BYTES, CheckpointError, read_manifest
from covo_npu.runtime.checkpoint.loader import load_tensors

CPU = torch.device("cpu")
MODES = ["mmap", "eager", "staged"]
FILES = list(small_tensors())


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "ckpt", small_tensors())


def load(folder, mode="mmap", files=FILES, **options):
    """Read the manifest, load all files, wait for the verification; leave no reader behind."""
    weights = load_tensors(read_manifest(folder), files, CPU, mode=mode, **options)
    try:
        weights.wait()
    finally:
        weights.close()
    return weights


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("weights-")]


# --- every region of every file, flipped


def test_every_flipped_byte_is_detected(folder):
    rng, flips = random.Random(5), 0
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        edges = {0, 7, 8, len(data) - 1, 4095, 4096, 4097}
        places = sorted({p for p in edges if p < len(data)} | {rng.randrange(len(data)) for _ in range(150)})
        for number, place in enumerate(places):
            damaged = bytearray(data)
            damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError) as caught:
                load(folder, MODES[number % 3])
            assert path.name in str(caught.value), f"byte {place} of {path.name}"
            flips += 1
        path.write_bytes(data)
        load(folder)
    assert flips >= 500
    assert not readers()


def test_damage_is_detected_on_kernels_that_cannot_populate(folder, monkeypatch):
    monkeypatch.setattr(loader, "MADV_POPULATE_READ", 12345)
    load(folder)
    with (folder / LLM).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(CheckpointError, match=f"{LLM}: damaged"):
        load(folder)


@pytest.mark.parametrize("mode", MODES)
def test_without_the_check_damage_passes(folder, mode):
    """Shows that the check is what finds it, and that the switch is a switch."""
    offset = read_manifest(folder).files[LLM].tensors["llm.norm.weight"].offset
    with (folder / LLM).open("r+b") as file:
        file.seek(offset)
        file.write(b"\x7f\x7f")
    weights = load(folder, mode, check=False)
    assert not torch.equal(weights.tensors["llm.norm.weight"], small_tensors()[LLM]["llm.norm.weight"])
    with pytest.raises(CheckpointError, match=LLM):
        load(folder, mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_damaged_block_is_named(tmp_path, mode):
    folder = write_checkpoint(tmp_path / "ckpt", large_tensors())
    expected = read_manifest(folder).files[LLM].blocks[1]
    with (folder / LLM).open("r+b") as file:
        file.seek(BLOCK_BYTES + 12345)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 16]))
    with pytest.raises(
        CheckpointError, match=f"offset {BLOCK_BYTES}: checksum expected {expected}, found [0-9a-f]{{32}}"
    ):
        load(folder, mode, files=list(large_tensors()))
    assert not readers()


def test_mapped_damage_is_known_before_wait_returns_and_stays_known(folder, monkeypatch):
    gate, real = threading.Event(), loader._populated
    monkeypatch.setattr(loader, "_populated", lambda *arguments: gate.wait(10) and real(*arguments))
    with (folder / LLM).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    weights = load_tensors(read_manifest(folder), FILES, CPU)
    gate.set()
    for ask in (weights.wait, weights.wait, lambda: weights.wait(LLM)):
        with pytest.raises(CheckpointError, match=LLM):
            ask()


def test_a_file_can_be_waited_for_without_those_behind_it(folder, monkeypatch):
    """What is damaged or slow in the last file is no concern of who needs the first ones only."""
    gate, real = threading.Event(), loader._populated
    monkeypatch.setattr(loader, "MAX_THREADS", 1)
    monkeypatch.setattr(
        loader, "_populated", lambda flat, block: (block.file < 2 or gate.wait(10)) and real(flat, block)
    )
    first, second, last = FILES
    with (folder / last).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    weights = load_tensors(read_manifest(folder), FILES, CPU)
    weights.wait(first, second)
    assert readers(), "the last file is not read yet"
    gate.set()
    with pytest.raises(CheckpointError, match=last):
        weights.wait(last)
    with pytest.raises(CheckpointError, match=last):
        weights.wait()
    weights.wait(first, second)
    assert not readers()


# --- files that are not what they were


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _pointer(path: Path) -> None:
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 123456\n".ljust(131))


@pytest.mark.parametrize("name", [*FILES, "tokenizer.json"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_truncate, "expected [0-9]+ bytes, found [0-9]+"),
        (_grow, "expected [0-9]+ bytes, found [0-9]+"),
        (_empty, "found 0"),
        (Path.unlink, "missing"),
        (_folder, "not a regular file"),
        (_pipe, "not a regular file"),
        (_dangle, "missing: the link leads to nowhere, where nothing is"),
        (_pointer, "found 131; a pointer of git-lfs: git lfs pull fetches the file"),
    ],
)
def test_changed_files_are_refused(folder, name, change, message):
    change(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: .*{message}"):
        load(folder)


def test_a_checkpoint_of_links_as_caches_and_volumes_have_it_loads(folder, tmp_path):
    """Hugging Face's cache: snapshots/<commit> holds links into blobs. A folder that is a link works, too."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b2c"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for n, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, blobs / f"{n:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{n:040x}")
    (tmp_path / "link").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "link"):
        tensors = load(place).tensors
        for name, expected in small_tensors()[LLM].items():
            assert torch.equal(tensors[name], expected)
    with pytest.raises(CheckpointError, match=r"a cache folder; name the checkpoint in it: .*/snapshots/0a1b2c"):
        read_manifest(tmp_path / "hub")
    blob = (snapshot / LLM).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=f"{LLM}: damaged"):
        load(snapshot)


def test_a_manifest_that_is_a_git_lfs_pointer_says_so(folder):
    _pointer(folder / "manifest.json")
    with pytest.raises(CheckpointError, match=r"manifest\.json: a pointer of git-lfs"):
        load(folder)


def test_manifest_that_is_a_pipe_is_refused(folder):
    _pipe(folder / "manifest.json")
    with pytest.raises(CheckpointError, match=r"manifest\.json: not a regular file"):
        load(folder)


@pytest.mark.parametrize("mode", MODES)
def test_file_that_becomes_a_pipe_is_refused(folder, mode):
    manifest = read_manifest(folder)
    _pipe(folder / LLM)
    with pytest.raises(CheckpointError, match=f"{LLM}: changed since it was opened"):
        load_tensors(manifest, FILES, CPU, mode=mode)


def test_swapped_files_are_refused(folder):
    (folder / LLM).rename(folder / "x")
    (folder / "encoder.safetensors").rename(folder / LLM)
    (folder / "x").rename(folder / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=LLM) as caught:
        load(folder)
    assert "encoder.safetensors" in str(caught.value)


def test_files_of_another_conversion_are_refused(folder, tmp_path):
    """Same names, same sizes, same headers, other weights: only the checksums can tell."""
    tensors = small_tensors()
    tensors[LLM]["llm.norm.weight"] = tensors[LLM]["llm.norm.weight"] + 1
    other = write_checkpoint(tmp_path / "other", tensors)
    shutil.copy(other / LLM, folder / LLM)
    for mode in MODES:
        with pytest.raises(CheckpointError, match=f"{LLM}: damaged"):
            load(folder, mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_file_that_changes_after_the_manifest_was_read(folder, mode):
    manifest = read_manifest(folder)
    _truncate(folder / LLM)
    with pytest.raises(CheckpointError, match=f"{LLM}: changed since it was opened"):
        load_tensors(manifest, FILES, CPU, mode=mode)
    (folder / LLM).unlink()
    with pytest.raises(CheckpointError, match=f"{LLM}: cannot be read: No such file"):
        load_tensors(manifest, FILES, CPU, mode=mode)
    assert not readers()


@pytest.mark.parametrize("mode", MODES)
def test_a_file_that_is_cut_while_it_is_read(folder, mode, monkeypatch):
    path = folder / LLM
    home, name = (loader, "_populated") if mode == "mmap" else (loader.os, "preadv")
    real = getattr(home, name)

    def cut_then_read(*arguments):
        os.truncate(path, 4096)
        return real(*arguments)

    monkeypatch.setattr(home, name, cut_then_read)
    with pytest.raises(CheckpointError, match=f"{LLM}: ends at byte 4096.*changed while it was read"):
        load(folder, mode, files=[LLM])
    assert not readers()


@pytest.mark.parametrize("mode", MODES)
def test_a_broken_disk(folder, mode, monkeypatch):
    def broken(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(loader.os, "preadv", broken)
    monkeypatch.setattr(loader, "_populated", lambda flat, block: False)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        load(folder, mode)
    assert not readers()


# --- memory


def test_device_out_of_memory_says_needed_and_free(folder, monkeypatch):
    def full(*size, **options):
        raise torch.OutOfMemoryError("out of memory. Tried to allocate")

    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(torch.cpu, "mem_get_info", lambda device: (3_000_000_000, 8_000_000_000), raising=False)
    with pytest.raises(CheckpointError, match=r"need 0\.0 GB on cpu, 3\.0 GB is free \(out of memory"):
        load(folder, "staged")


def test_pinned_memory_that_cannot_be_had(folder, monkeypatch):
    real = torch.empty

    def empty(*size, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("cannot page-lock\nand a long trace")
        return real(*size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(CheckpointError, match=r"cannot page-lock; staging takes page-locked memory: .*ulimit -l"):
        load(folder, "staged")
    assert not readers()


def test_eager_load_that_does_not_fit(folder, monkeypatch):
    monkeypatch.setattr(loader, "available_memory_bytes", lambda: 1000.0)
    with pytest.raises(CheckpointError, match=r"an eager load needs .* a mapped load needs none"):
        load(folder, "eager")


def test_a_failed_eager_load_frees_its_memory(tmp_path):
    folder = write_checkpoint(tmp_path / "ckpt", large_tensors())
    with (folder / LLM).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")

    def attempt() -> None:
        with pytest.raises(CheckpointError):
            load(folder, "eager", files=list(large_tensors()))
        gc.collect()

    attempt()
    before = _anonymous()
    for _ in range(3):
        attempt()
    assert _anonymous() - before < 30e6  # one leaked load would be 56 MB


def _anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon"))


# --- other processes and other users

LOAD = textwrap.dedent("""
    import sys, torch
    from covo_npu.runtime.checkpoint.format import CheckpointError, read_manifest
    from covo_npu.runtime.checkpoint.loader import load_tensors
    try:
        manifest = read_manifest(sys.argv[1])
        weights = load_tensors(manifest, sys.argv[2:], torch.device("cpu"))
        weights.wait()
        print(sum(float(t.double().sum()) for t in weights.tensors.values()))
    except CheckpointError as error:
        sys.exit(f"refused: {error}")
""")


def _start(folder: Path, files: list[str], code: str = LOAD) -> subprocess.Popen:
    command = [sys.executable, "-c", code, str(folder), *files]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd="/"
    )


def test_two_processes_at_once(tmp_path):
    folder = write_checkpoint(tmp_path / "ckpt", large_tensors())
    processes = [_start(folder, list(large_tensors())) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    expected = sum(float(t.double().sum()) for part in large_tensors().values() for t in part.values())
    assert [float(output) for output, _ in results] == pytest.approx([expected, expected])


@pytest.mark.parametrize(("locked", "named"), [(".", "ckpt"), (LLM, LLM), ("manifest.json", "manifest.json")])
def test_what_may_not_be_read(locked, named):
    """As another user if we are root, who may read everything. Not in pytest's folders, which are closed to others."""
    become = "import os\nif os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    # imports first: the interpreter's own files may belong to root alone
    code = LOAD.replace("try:\n", become + "try:\n", 1)
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = write_checkpoint(Path(place) / "ckpt", small_tensors())
        folder.chmod(0o755)
        (folder / locked).chmod(0)
        process = _start(folder, FILES, code)
        _, complaint = process.communicate(timeout=120)
        (folder / locked).chmod(0o755)
    assert process.returncode == 1
    assert complaint.startswith("refused: "), complaint
    assert "Permission denied" in complaint
    assert named in complaint
