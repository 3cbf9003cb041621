"""covo-run on two ranks as a user starts it, and how it ends when one of them is killed or stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from covo_npu.runtime.process import SAFE_PATH
from covo_npu.runtime.ranks import TORCHRUN, Leader

AUDIO = Path(__file__).parents[1] / "data" / "audio"
ENGLISH = AUDIO / "question_en_48k_24bit.wav"
RUN = [sys.executable, "-m", "covo_npu.runtime.cli.run"]
END_S = 30.0  # what is promised: until then all ranks have ended


@pytest.fixture(scope="module")
def two_ranks(convert_tiny: Callable[..., Path]) -> Path:
    return convert_tiny("float32", 2)


def arguments(ckpt: Path, *more: str) -> list[str]:
    return ["--ckpt", str(ckpt), "--tp", "2", "--device", "cpu", "--mode", "a2t", *more]


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def runs(process: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def waiting(two_ranks: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """covo-run that is ready and waits for a question from a pipe, and the process of its rank 1."""
    with subprocess.Popen(
        [*RUN, *arguments(two_ranks)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "ready in" in process.stdout.readline()
        (rank1,) = children(process.pid)
        yield process, rank1
        for left in (process.pid, rank1):
            if runs(left):
                os.kill(left, signal.SIGKILL)


def ended(process: subprocess.Popen[str], *others: int) -> tuple[int, str]:
    """Return the exit code and stderr of a process that ends, with the others, in time."""
    end = time.monotonic() + END_S
    code = process.wait(END_S)
    while any(runs(other) for other in others):
        assert time.monotonic() < end, "a rank is left"
        time.sleep(0.1)
    assert process.stderr is not None
    return code, process.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGKILL, "rank 1 of 2 has ended (signal 9): all ranks are ended\n"),
        (signal.SIGSTOP, "rank 1 of 2 gives no sign of life: all ranks are ended\n"),
    ],
)
@pytest.mark.parametrize("busy", [False, True], ids=["waiting", "decoding"])
def test_a_follower_that_is_killed_or_stopped_ends_all(
    waiting: tuple[subprocess.Popen[str], int], number: int, says: str, busy: bool
) -> None:
    process, rank1 = waiting
    assert process.stdin is not None
    if busy:
        process.stdin.write(f"{ENGLISH}\n")
        process.stdin.flush()
        time.sleep(0.5)
    os.kill(rank1, number)
    code, err = ended(process, rank1)
    assert code == 1 and err.partition(": ")[2] == says  # after the program's name


@pytest.mark.slow
def test_a_follower_leaves_what_asks_for_an_end_to_rank_0(waiting: tuple[subprocess.Popen[str], int]) -> None:
    """As from a terminal or a service manager, which signals all processes at once."""
    process, rank1 = waiting
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(rank1, number)
    time.sleep(0.5)
    assert runs(rank1) and process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{ENGLISH}\n")
    process.stdin.close()
    assert "ready in" not in process.stdout.read() and process.wait(END_S) == 0 and not runs(rank1)


def test_when_rank_0_is_killed_the_others_end(waiting: tuple[subprocess.Popen[str], int]) -> None:
    process, rank1 = waiting
    process.kill()
    code, err = ended(process, rank1)
    assert code == -signal.SIGKILL and "rank 0 of 2 has ended" in err and err.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_rank_0_ends_all_as_ever(
    waiting: tuple[subprocess.Popen[str], int], number: int, code: int
) -> None:
    process, rank1 = waiting
    process.send_signal(number)
    found, err = ended(process, rank1)
    assert (found, len(err.strip().splitlines())) == (code, 1) and "rank" not in err, err


def test_torchrun_starts_the_ranks_as_well(two_ranks: Path, tmp_path: Path, golden: Callable) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    expected = golden("dialogue_fp32_three_rounds_a2t")
    wav = AUDIO / Path(str(expected["r0_audio"])).name
    command = [*torchrun, "-m", "covo_npu.runtime.cli.run"]
    more = ["--max-new-tokens", "48", "--json", str(tmp_path / "reply.json"), str(wav)]
    done = subprocess.run([*command, *arguments(two_ranks, *more)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 1, "only rank 0 speaks"
    report = json.loads((tmp_path / "reply.json").read_text())
    assert report["rounds"][0]["tokens"] == expected["r0_tokens"].tolist()
    assert [place["rank"] for place in report["load"]["placed"]] == [0, 1]


def test_another_number_of_processes_than_ranks_is_refused(two_ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(TORCHRUN, ("0", "3", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    done = subprocess.run([*RUN, *arguments(two_ranks)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "torchrun has started 3 processes for --tp 2" in done.stderr


def test_a_rank_that_waits_for_rank_0_ends_when_asked(two_ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 may have refused what it was asked for: torchrun then asks the others to end and kills them 30 s later."""
    with socket.create_server(("127.0.0.1", 0)) as rank0:
        for name, value in zip(TORCHRUN, ("1", "2", "127.0.0.1", str(rank0.getsockname()[1])), strict=True):
            monkeypatch.setenv(name, value)
        with subprocess.Popen([*RUN, *arguments(two_ranks)]) as process:
            connection, _ = rank0.accept()
            process.terminate()
            try:
                assert process.wait(10) == -signal.SIGTERM
            finally:
                process.kill()
                connection.close()


@pytest.mark.skipif(not SAFE_PATH, reason="Python can leave the working folder out from 3.11 on")
def test_what_lies_in_the_working_folder_is_no_package_of_a_rank(two_ranks: Path, tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('a file of the user, not a module')\n")
    command = [Path(sys.executable).with_name("covo-run"), *arguments(two_ranks, "--max-new-tokens", "2", str(ENGLISH))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_rank_has_a_device_of_its_own_wherever_rank_0_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # as for the one process of torchrun --nproc-per-node 1
    told = tmp_path / "told"
    leader = Leader(2, [sys.executable, "-c", f"import os; open({str(told)!r}, 'w').write(os.environ['LOCAL_RANK'])"])
    leader._children[1].wait()
    leader.close()
    assert told.read_text() == "1"


def test_damage_in_another_ranks_file_is_told_before_any_text(two_ranks: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in two_ranks.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    file = damaged / "llm-rank1of2.safetensors"
    content = bytearray(file.read_bytes())
    content[-2000] ^= 1
    file.write_bytes(content)
    done = subprocess.run([*RUN, *arguments(damaged, str(ENGLISH))], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "rank 1 of 2" in done.stderr and "damaged in the block" in done.stderr
    assert done.stderr.count("\n") == 1 and "first token" not in done.stdout
