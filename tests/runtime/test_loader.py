"""The loader: what it hands out is what the stock reader reads, in every mode, and where it lies in memory."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from made_checkpoint import LLM, large_tensors, small_tensors, write_checkpoint
from safetensors.torch import load_file

from covo_npu.runtime.checkpoint import loader
from covo_npu.runtime.checkpoint.format import BLOCK_BYTES, CheckpointError, read_manifest
from covo_npu.runtime.checkpoint.loader import load_tensors

CPU = torch.device("cpu")
MODES = ["mmap", "eager", "staged"]
SMALL, LARGE = list(small_tensors()), list(large_tensors())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("small") / "ckpt", small_tensors())


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("large") / "ckpt", large_tensors())


def no_reader_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("weights-")]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("fixture", "files"), [("small", SMALL), ("large", LARGE)])
def test_tensors_equal_the_stock_readers(request, fixture, files, mode, check):
    folder = request.getfixturevalue(fixture)
    expected = {key: t for name in files for key, t in load_file(folder / name).items() if not key.startswith("__pad")}
    with load_tensors(read_manifest(folder), files, CPU, mode=mode, check=check) as weights:
        weights.wait()
        assert weights.tensors.keys() == expected.keys()
        for name, tensor in weights.tensors.items():
            assert tensor.dtype == expected[name].dtype
            assert tensor.shape == expected[name].shape
            assert torch.equal(tensor, expected[name]), name
        assert weights.report.mode == mode
        assert weights.report.checked == check
        assert weights.report.bytes == sum((folder / name).stat().st_size for name in files)
    assert no_reader_is_left()


def test_a_staged_tensor_is_the_whole_of_its_memory(large):
    """What torch_npu casts and caches by: the size of the memory that a weight lies in, and where in it it starts."""
    weights = load_tensors(read_manifest(large), LARGE, CPU, mode="staged")
    for tensor in weights.tensors.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.storage_offset() == 0


@pytest.mark.parametrize("mode", ["mmap", "eager"])
def test_tensors_are_aligned_views_of_one_memory_a_file(small, mode):
    manifest = read_manifest(small)
    weights = load_tensors(manifest, [LLM], CPU, mode=mode)
    assert len({tensor.untyped_storage().data_ptr() for tensor in weights.tensors.values()}) == 1
    assert all(tensor.data_ptr() % 64 == 0 for tensor in weights.tensors.values() if tensor.numel())
    assert all(tensor.is_contiguous() for tensor in weights.tensors.values())
    weights.wait()


def test_mapped_tensors_are_the_file_itself(large):
    """The kernel's list of mappings names the file where the tensors lie, and they take no anonymous memory."""
    before = _anonymous()
    weights = load_tensors(read_manifest(large), LARGE, CPU, mode="mmap")
    weights.wait()
    assert sum(float(t.float().sum()) for t in weights.tensors.values()) != 0
    address = weights.tensors["llm.0"].data_ptr()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    inside = [line for line in lines if int(line[0].split("-")[0], 16) <= address < int(line[0].split("-")[1], 16)]
    assert inside[0][-1] == str(large / LLM)
    assert _anonymous() - before < 40e6  # scratch of the readers and one float copy of a tensor, not the 56 MB of files


def test_a_mapped_load_needs_no_data_memory(large):
    """Where the data segment is limited to less than the files, as containers and administrators do."""
    code = (
        "import resource, sys, threading, torch, warnings; warnings.simplefilter('error')\n"
        "from covo_npu.runtime.checkpoint.format import read_manifest\n"
        "from covo_npu.runtime.checkpoint.loader import load_tensors\n"
        "used = int([line for line in open('/proc/self/status') if line.startswith('VmData')][0].split()[1]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + 40_000_000,) * 2)\n"
        "threading.stack_size(1 << 20)\n"
        "weights = load_tensors(read_manifest(sys.argv[1]), sys.argv[2:], torch.device('cpu')); weights.wait()\n"
        "print(len(weights.tensors))"
    )
    command = [sys.executable, "-c", code, str(large), *LARGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert (done.returncode, done.stdout) == (0, "13\n"), done.stderr


def _anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon"))


def test_eager_tensors_survive_the_files(tmp_path):
    folder = write_checkpoint(tmp_path / "ckpt", small_tensors())
    weights = load_tensors(read_manifest(folder), [LLM], CPU, mode="eager")
    for file in folder.iterdir():
        file.unlink()
    assert torch.equal(weights.tensors["llm.scalar"], torch.tensor(3.25))


def test_tensors_outlive_their_weights(small):
    tensors = load_tensors(read_manifest(small), SMALL, CPU).tensors
    expected = small_tensors()
    assert all(torch.equal(tensors[key], t) for part in expected.values() for key, t in part.items())


@pytest.mark.parametrize("mode", MODES)
def test_short_reads_are_continued(monkeypatch, large, mode):
    real = loader.os.preadv
    monkeypatch.setattr(loader, "_populated", lambda flat, block: False)
    monkeypatch.setattr(loader.os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:300_007]], at))
    weights = load_tensors(read_manifest(large), ["encoder.safetensors"], CPU, mode=mode)
    weights.wait()
    expected = large_tensors()["encoder.safetensors"]
    assert all(torch.equal(weights.tensors[key], tensor) for key, tensor in expected.items())


class WatchedEvent:
    """An event that knows whether its copy may still run; to record it again without a wait is the fault to find."""

    faults = 0
    reused = 0

    def __init__(self) -> None:
        self._pending = False

    def record(self, stream: object = None) -> None:
        WatchedEvent.faults += self._pending
        self._pending = True

    def synchronize(self) -> None:
        WatchedEvent.reused += self._pending
        self._pending = False


@pytest.fixture
def watched(monkeypatch):
    WatchedEvent.faults = WatchedEvent.reused = 0
    monkeypatch.setattr(torch.cpu, "Event", WatchedEvent)
    monkeypatch.setattr(loader, "MAX_SLABS", 2)
    monkeypatch.setattr(loader, "MAX_THREADS", 2)
    return WatchedEvent


def test_a_slab_is_waited_for_before_it_is_filled_again(large, watched):
    load_tensors(read_manifest(large), LARGE, CPU, mode="staged")
    assert watched.reused >= 3  # five blocks through two slabs
    assert watched.faults == 0


def test_a_ring_that_does_not_wait_would_be_seen(large, watched, monkeypatch):
    monkeypatch.setattr(loader._Slab, "ready", lambda slab, pinned: torch.empty(BLOCK_BYTES, dtype=torch.uint8))
    load_tensors(read_manifest(large), LARGE, CPU, mode="staged")
    assert watched.faults > 0


def test_slabs_are_pinned_where_there_is_a_device(small, monkeypatch):
    asked = []
    real = torch.empty

    def empty(*size, pin_memory=False, **options):
        asked.append(pin_memory)
        return real(*size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    load_tensors(read_manifest(small), [LLM], CPU, mode="staged")
    assert asked.count(True) == 1 and asked[-1]  # one slab, after the device's tensors


def test_an_eager_load_is_for_the_cpu(small):
    """Whoever asks for it by name is told, not silently given something else. meta stands for a device."""
    with pytest.raises(
        CheckpointError, match=r"an eager load is one into the memory of the CPU; for meta leave out --load"
    ):
        load_tensors(read_manifest(small), [LLM], torch.device("meta"), mode="eager")


def test_blocks_are_read_in_the_order_of_use(large, monkeypatch):
    seen = []
    real = loader._populated
    monkeypatch.setattr(loader, "MAX_THREADS", 1)
    monkeypatch.setattr(
        loader, "_populated", lambda flat, block: seen.append((block.file, block.index)) or real(flat, block)
    )
    load_tensors(read_manifest(large), LARGE, CPU).wait()
    assert seen == sorted(seen)
    assert len(seen) == sum(-(-(large / name).stat().st_size // BLOCK_BYTES) for name in LARGE)


def test_close_stops_the_reader(large, monkeypatch):
    gate = threading.Event()
    done = []

    def populated(flat, block):
        gate.wait(10)
        done.append(block)
        return True

    monkeypatch.setattr(loader, "_populated", populated)
    weights = load_tensors(read_manifest(large), LARGE, CPU)
    threading.Timer(0.05, gate.set).start()
    weights._crew._stopped = True  # as close() begins, before it waits for the blocks in flight
    weights.close()
    assert len(done) <= 2
    assert no_reader_is_left()


def test_descriptors_are_closed(small):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for mode in MODES:
        with load_tensors(read_manifest(small), SMALL, CPU, mode=mode) as weights:
            weights.wait()
        del weights
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_file_that_holds_no_weights_is_refused(small):
    with pytest.raises(CheckpointError, match=r"has no weights tokenizer\.json; it holds encoder"):
        load_tensors(read_manifest(small), ["tokenizer.json"], CPU)
