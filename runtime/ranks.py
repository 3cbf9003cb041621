"""The processes of tensor-parallel ranks: started or joined, told what to do, watched, and ended together.

Rank 0 is the process that the user has started; the others follow it. Tensors go through torch.distributed. All else
goes over one socket to each follower, a JSON object a line: what rank 0 calls, faults, and a sign of life every
BEAT_S. A peer whose connection closes has ended; one that is silent for SILENCE_S, or that lets the others wait in a
collective for STANDSTILL_S, hangs. Then all ranks end, with one message that names it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore, rendezvous  # type: ignore[attr-defined]

from covo_npu.kernels.errors import CovoError, first_line
from covo_npu.runtime.parallel import BACKENDS, Collectives, Tally

BEAT_S = 1.0
SILENCE_S = 8.0
STANDSTILL_S = 15.0
WORKS = 0.1  # the part of a processor that a rank uses at least while it computes
GRACE_S = 4.0  # for whoever finds a fault to end by itself, before all is ended
STORE_TIMEOUT = timedelta(seconds=60)  # how long a rank may take to start
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # the watch is what ends a hang, not this
ADDRESS = "covo_npu/rank0"  # the key under which rank 0 tells where it listens
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Message = dict[str, Any]


class RankError(CovoError):
    """A rank has ended, hangs, or could not start: nothing goes on."""


def launched() -> bool:
    """Return whether torchrun has started this process as one of several ranks."""
    return all(name in os.environ for name in TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


def follows(tp: int) -> bool:
    """Return whether torchrun has started this process as another of `tp` ranks than the first."""
    return tp > 1 and launched() and os.environ["RANK"] != "0"


class Link:
    """One end of the connection between rank 0 and a follower."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(SILENCE_S)
        self._socket, self._lines, self._lock = connection, connection.makefile("rb"), threading.Lock()

    def tell(self, message: Message) -> None:
        """Send a message. One that nobody hears is lost: the reading end finds out why."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> Message | None:
        """Return the next message, None if the peer's connection has closed. Raises TimeoutError if it is silent."""
        try:
            line = self._lines.readline()
        except ConnectionError:
            return None
        return json.loads(line) if line.endswith(b"\n") else None


class Leader:
    """Rank 0's side. Made before its weights are loaded, `ready` after: followers load at the same time."""

    def __init__(self, size: int, follower: Sequence[str], share_cores: bool = False) -> None:
        """follower: the command of a follower's process, without its rank; not used under torchrun.

        share_cores: ranks that this process starts get equal parts of its threads, of which it has one until it closes.
        """
        if dist.is_initialized():
            raise RankError("this process has tensor-parallel ranks already: close that model first")
        if launched() and (processes := int(os.environ["WORLD_SIZE"])) != size:
            raise RankError(f"torchrun has started {processes} processes for --tp {size}: one a rank is needed")
        self.size, self.tally, self.fault = size, Tally(), ""
        self.placed: dict[int, Message] = {}  # what each follower has loaded, and where
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._links: dict[int, Link] = {}
        self._counts: dict[int, int] = {}  # collectives that each rank has begun
        self._verified: set[int] = set()
        self._mourners: list[Callable[[RankError], object]] = []  # who wants to know that nothing goes on
        self._changed, self._lock = threading.Condition(), threading.RLock()
        self._worked: dict[int, float] = {}  # seconds of processor time that each rank has used
        self._waits, self._moved = 0, 0.0  # watched blocks, which may stand in one another; when a rank last moved
        self._handles = 0
        self._dropped: deque[int] = deque()  # handles of what followers may free
        self._closing, self._on_cpu = False, False
        self._threads = 0  # that this process had, if it shares them
        host = os.environ["MASTER_ADDR"] if launched() else "127.0.0.1"
        if launched():
            self._store, _, _ = next(rendezvous("env://", timeout=STORE_TIMEOUT))
        else:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT)
        self._server = socket.create_server((host, 0))
        self._store.set(ADDRESS, f"{host}:{self._server.getsockname()[1]}")
        if not launched():
            if share_cores:
                self._threads = torch.get_num_threads()
                torch.set_num_threads(max(1, self._threads // size))
            self._start(follower, host, self._store.port)
        atexit.register(self.close)  # of a model that nobody closes
        threading.Thread(target=self._accept, name="ranks-accept", daemon=True).start()
        threading.Thread(target=self._watch, name="ranks-watch", daemon=True).start()

    def _start(self, follower: Sequence[str], host: str, port: int) -> None:
        for rank in range(1, self.size):
            variables = dict(zip(TORCHRUN, (str(rank), str(self.size), host, str(port)), strict=True))
            # LOCAL_RANK, which chooses the device, may be that of this process: of torchrun with one, for instance.
            variables |= {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(torch.get_num_threads())}
            self._children[rank] = subprocess.Popen(follower, env={**os.environ, **variables}, stdin=subprocess.DEVNULL)

    # --- what rank 0 does

    def ready(self, device: torch.device) -> None:
        """Return when all ranks have loaded their weights and can compute together. Raises RankError."""
        self._on_cpu = device.type == "cpu"
        self._until(lambda: len(self.placed) == self.size - 1)
        with self._whole():
            connect(self._store, 0, self.size, device)

    def verified(self) -> None:
        """Return when every follower's weights are known to be right. Raises RankError."""
        self._until(lambda: len(self._verified) == self.size - 1)

    def when_lost(self, tell: Callable[[RankError], object]) -> None:
        """Let a function be called, in any thread, as soon as nothing goes on. The process has GRACE_S to end then."""
        with self._changed:
            self._mourners.append(tell)
            lost = self.fault
        if lost:
            tell(RankError(lost))

    def handle(self) -> int:
        """Return a new number, under which followers keep what they make."""
        self._handles += 1
        return self._handles

    def drop(self, handle: int) -> None:
        """Let followers free what they keep under a handle, with the next command.

        The collector may call this in any thread, whatever that thread holds: it takes no lock.
        """
        self._dropped.append(handle)

    @contextlib.contextmanager
    def command(self, name: str, handle: int, *arguments: Any) -> Iterator[None]:
        """Let all followers do what the caller does inside. Raises RankError for whatever fails there."""
        with self.watched():
            while self._dropped:
                self._tell("close", self._dropped.popleft())
            self._tell(name, handle, *arguments)
            yield

    def _tell(self, name: str, handle: int, *arguments: Any) -> None:
        for link in self._links.values():
            link.tell({"do": name, "handle": handle, "with": arguments})

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Let a standstill of the ranks end what the caller waits for inside: on a device a step only begins here."""
        with self._lock, self._whole():
            self._waits += 1
            self._moved = time.monotonic()
            try:
                yield
            finally:
                self._waits -= 1

    def close(self) -> None:
        """End all ranks. Followers that do not end by themselves are killed."""
        if self._closing:
            return
        self._closing = True
        for link in self._links.values():
            link.tell({"end": True})
        patience = time.monotonic() + GRACE_S
        for rank, child in self._children.items():
            try:
                child.wait(max(0.0, patience - time.monotonic()) if rank in self._links else 0.0)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        atexit.unregister(self.close)
        if self._threads:
            torch.set_num_threads(self._threads)
        self._server.close()
        if dist.is_initialized() and (self._on_cpu or not self.fault):  # a device's would wait for those that are gone
            dist.destroy_process_group()

    # --- what goes wrong

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """What fails inside leaves the ranks out of step, whoever's fault it is."""
        if self.fault:
            raise RankError(self.fault)
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            with self._changed:  # a rank that is gone fails the collectives of the others a moment before it is missed
                self._changed.wait_for(lambda: self.fault or self._closing, timeout=GRACE_S)
            self._fail(f"rank 0 of {self.size}: {first_line(error)}")
            raise RankError(self.fault or "this model was closed, and with it its ranks: load it again") from error
        except BaseException:  # Ctrl-C: whoever goes on after it, in a notebook for one, does so without the ranks
            self.fault = self.fault or "the ranks were interrupted in a step: close this model and load it again"
            raise

    def _until(self, done: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.fault or done())
        if self.fault:
            raise RankError(self.fault)

    def _fail(self, message: str) -> None:
        """Note the first fault, and see to it that this process ends."""
        with self._changed:
            if self.fault or self._closing:
                return
            self.fault, mourners = message, list(self._mourners)
            self._changed.notify_all()
        threading.Thread(target=self._end_process, name="ranks-end", daemon=True).start()
        for tell in mourners:
            tell(RankError(message))

    def _end_process(self) -> None:
        """End the process if it has not begun to end by itself: it may wait for a rank that never comes."""
        time.sleep(GRACE_S)
        if not self._closing:
            for child in self._children.values():
                child.kill()
            leave(self.fault)

    # --- who is alive

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while len(self._links) < self.size - 1:
                connection, _ = self._server.accept()
                link = Link(connection)
                hello = link.hear()
                rank = int(hello["rank"]) if hello else 0
                if 0 < rank < self.size:
                    self._links[rank] = link
                    threading.Thread(target=self._listen, args=(rank, link), name=f"rank-{rank}", daemon=True).start()

    def _listen(self, rank: int, link: Link) -> None:
        name = f"rank {rank} of {self.size}"
        try:
            while (message := link.hear()) is not None:
                self._take(rank, name, message)
        except TimeoutError:
            self._fail(f"{name} gives no sign of life: all ranks are ended")
        self._fail(f"{name} has ended{self._how(rank)}: all ranks are ended")

    def _take(self, rank: int, name: str, message: Message) -> None:
        if "fault" in message:
            self._fail(f"{name}: {message['fault']}")
        if "collectives" in message:
            self._note(rank, message["collectives"], message["worked_s"])
        with self._changed:
            if "placed" in message:
                self.placed[rank] = message["placed"]
            if message.get("verified"):
                self._verified.add(rank)
            self._changed.notify_all()

    def _how(self, rank: int) -> str:
        """Return how a child has ended, if it is one of ours."""
        child = self._children.get(rank)
        if child is None:
            return ""
        try:
            code = child.wait(1.0)
        except subprocess.TimeoutExpired:
            return ""
        return f" (signal {-code})" if code < 0 else f" (exit code {code})"

    def _note(self, rank: int, count: int, worked_s: float) -> None:
        """Note how far a rank is. One that computes on the CPU moves, too; one that waits there uses no time."""
        moved = count > self._counts.get(rank, -1)
        if self._on_cpu and worked_s - self._worked.get(rank, 0.0) > WORKS * BEAT_S:
            moved = True
        self._counts[rank], self._worked[rank] = count, worked_s
        if moved:
            self._moved = time.monotonic()

    def _watch(self) -> None:
        while not self._closing:
            for link in list(self._links.values()):
                link.tell({"alive": True})
            for rank, child in self._children.items():
                if rank not in self._links and child.poll() is not None:
                    self._fail(f"rank {rank} of {self.size} could not start (exit code {child.returncode})")
            self._note(0, self.tally.collectives, time.process_time())
            if self._waits and time.monotonic() - self._moved > STANDSTILL_S:
                behind = min(self._counts, key=lambda rank: self._counts[rank])
                self._fail(f"rank {behind} of {self.size} hangs: the others wait for it; all ranks are ended")
            time.sleep(BEAT_S)


class Follower:
    """The side of any other rank."""

    def __init__(self) -> None:
        self._store, self.rank, self.size = next(rendezvous("env://", timeout=STORE_TIMEOUT))
        host, _, port = self._store.get(ADDRESS).decode().rpartition(":")
        self.tally = Tally()
        self._link = Link(socket.create_connection((host, int(port)), timeout=STORE_TIMEOUT.total_seconds()))
        self._link.tell({"rank": self.rank})
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        for work in (self._listen, self._beat):
            threading.Thread(target=work, name=f"rank{work.__name__}", daemon=True).start()

    def ready(self, device: torch.device, num_bytes: int) -> None:
        """Tell what was loaded; return when all ranks can compute together."""
        self._link.tell({"placed": {"device": str(device), "bytes": num_bytes}})
        connect(self._store, self.rank, self.size, device)

    def verified(self) -> None:
        """Tell that the weights are known to be right."""
        self._link.tell({"verified": True})

    def failed(self, error: BaseException) -> NoReturn:
        """Tell what has gone wrong, and end this process."""
        self._link.tell({"fault": first_line(error)})
        leave("")

    def commands(self) -> Iterator[tuple[str, int, list[Any]]]:
        """Yield what rank 0 does, until it ends."""
        while "end" not in (message := self._inbox.get()):
            yield message["do"], message["handle"], message["with"]
        dist.destroy_process_group()

    def _listen(self) -> None:
        says = f"rank 0 of {self.size} has ended: all ranks are ended"
        try:
            while (message := self._link.hear()) is not None:
                if "alive" not in message:
                    self._inbox.put(message)
                if "end" in message:
                    time.sleep(GRACE_S)  # the main thread may be in a collective that never ends
                    os._exit(0)
        except TimeoutError:
            says = f"rank 0 of {self.size} gives no sign of life: all ranks are ended"
        leave(says if self.rank == 1 else "")  # all followers see it, one tells

    def _beat(self) -> None:
        while True:
            self._link.tell({"collectives": self.tally.collectives, "worked_s": time.process_time()})
            time.sleep(BEAT_S)


def connect(store: Store, rank: int, size: int, device: torch.device) -> None:
    """Make the default process group, and use it once: later its first use could wait for connections."""
    backend = BACKENDS[device.type]
    dist.init_process_group(
        backend, store=PrefixStore("covo_npu/group", store), rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT
    )
    dist.all_reduce(torch.ones(1, device=device))


def collectives(side: Leader | Follower) -> Collectives:
    """Return the group of a rank. It can be used when the side is ready."""
    return Collectives(side.rank if isinstance(side, Follower) else 0, side.size, side.tally)


def leave(message: str) -> NoReturn:
    """End this process at once, whatever its threads wait for."""
    if message:
        sys.stderr.write(f"covo-npu: {message}\n")
        sys.stderr.flush()
    os._exit(1)
