"""Where results go: nothing of anybody's is destroyed, whatever stands at the place."""

import errno
import json
import os
import pty
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest

from covo_npu.runtime import output
from covo_npu.runtime.cli import console
from covo_npu.runtime.output import OutputError


def listing(folder):
    return sorted(os.listdir(folder))


def test_a_new_file_never_touches_what_is_there(tmp_path):
    taken = tmp_path / "a.wav"
    taken.write_bytes(b"mine")
    (tmp_path / "a-2.wav").symlink_to("nowhere")
    os.mkfifo(tmp_path / "a-3.wav")
    assert output.write_new(taken, b"new") == tmp_path / "a-4.wav"
    assert output.write_new(taken, b"newer") == tmp_path / "a-5.wav"
    assert taken.read_bytes() == b"mine" and (tmp_path / "a-4.wav").read_bytes() == b"new"
    assert listing(tmp_path) == ["a-2.wav", "a-3.wav", "a-4.wav", "a-5.wav", "a.wav"]


def test_many_writers_of_one_name_get_a_file_each(tmp_path):
    with ThreadPoolExecutor(20) as threads:
        places = list(threads.map(lambda i: output.write_new(tmp_path / "a", b"%d" % i), range(20)))
    assert len(set(places)) == 20 and sorted(int(place.read_bytes()) for place in places) == list(range(20))
    assert len(listing(tmp_path)) == 20


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_file_systems_without_links_and_syncs_work(code, tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(b"mine")
    assert output.write_new(tmp_path / "a", b"new") == tmp_path / "a-2"
    assert (tmp_path / "a").read_bytes() == b"mine" and (tmp_path / "a-2").read_bytes() == b"new"
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EINVAL, "no")))
    output.warn_once.cache_clear()
    output.write(tmp_path / "b", b"1")
    output.write(tmp_path / "b", b"2")
    assert (tmp_path / "b").read_bytes() == b"2" and len(caplog.records) == 1
    assert listing(tmp_path) == ["a", "a-2", "b"]


def test_pipes_and_devices_are_written_into(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with ThreadPoolExecutor(1) as thread:
            got = thread.submit((tmp_path / "pipe").read_bytes)
            output.write(tmp_path / name, b"data")
        assert got.result() == b"data" and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    primary, secondary = pty.openpty()
    (tmp_path / "terminal").symlink_to(os.ttyname(secondary))
    output.write(tmp_path / "terminal", b"data")
    assert os.read(primary, 10) == b"data" and (tmp_path / "terminal").is_symlink()
    os.close(primary)
    os.close(secondary)
    reader, writer = os.pipe()
    output.write(f"/dev/fd/{writer}", b"into")
    assert os.read(reader, 10) == b"into"
    os.write(writer, b"still open")
    os.close(reader)
    os.close(writer)


def test_links_are_followed_and_modes_kept(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "r.json", tmp_path / "link"
    link.symlink_to(target)
    output.write(link, b"1")  # a link to nothing yet
    target.chmod(0o640)
    output.write(link, b"2")
    assert link.is_symlink() and target.read_bytes() == b"2" and stat.S_IMODE(target.stat().st_mode) == 0o640
    assert listing(tmp_path) == ["link", "real"] and listing(tmp_path / "real") == ["r.json"]


def test_a_file_that_cannot_be_renamed_over_is_written_in_place(tmp_path, monkeypatch):
    """As one that is mounted into a container."""

    def busy(self, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    (tmp_path / "r.json").write_bytes(b"longer than the new one")
    monkeypatch.setattr(Path, "replace", busy)
    output.write(tmp_path / "r.json", b"new")
    assert (tmp_path / "r.json").read_bytes() == b"new" and listing(tmp_path) == ["r.json"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "r.json").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
    for write in (output.write, output.write_new):
        with pytest.raises(OutputError, match=r"r\.json: cannot be written: disk full"):
            write(tmp_path / "r.json", b"new")
    assert (tmp_path / "r.json").read_bytes() == b"old" and listing(tmp_path) == ["r.json"]


def test_what_cannot_be_written_in_its_place_is_kept_elsewhere(tmp_path):
    (tmp_path / "file").touch()
    place, why = output.keep(tmp_path / "file" / "a.wav", b"speech")
    assert place.read_bytes() == b"speech" and str(place) in why and "cannot be written" in why
    assert output.keep(tmp_path / "a.wav", b"speech") == (tmp_path / "a.wav", "")


SHIFT_JIS = os.fsdecode("あ".encode("shift_jis") * 120)  # no byte of it begins a character of UTF-8


@pytest.mark.parametrize(
    "stem", ["x" * 300, "关于" * 100, "é" + "ö" * 200, os.fsdecode(b"caf\xe9" * 80), SHIFT_JIS, "short"]
)
def test_names_are_cut_to_what_a_file_system_takes(stem, tmp_path):
    place = output.fitting(tmp_path, stem, "-01.wav")
    assert output.write_new(place, b"1") == place and output.write_new(place, b"2") != place
    assert os.fsencode(place.name).decode("utf-8", "surrogateescape").endswith("-01.wav")
    assert output.fitting(tmp_path, stem, "-01.wav") == place != output.fitting(tmp_path, stem + "y", "-01.wav")
    assert (place.name == f"{stem}-01.wav") == (stem == "short")
    if "caf" not in stem and stem != SHIFT_JIS:
        place.name.encode("utf-8")  # no half characters


def ours(content):
    return content.startswith(b"ours")


@pytest.mark.parametrize(
    "kind", ["folder", "below a file", "somebody's", "socket", "long", "nul", "empty name", "loop"]
)
def test_what_cannot_be_written_is_known_before(kind, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "loop").symlink_to("loop")
    server = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    server.bind("socket")
    place = {
        "folder": tmp_path, "below a file": tmp_path / "file" / "x", "somebody's": tmp_path / "file", "long": "x" * 256,
        "socket": tmp_path / "socket", "nul": "a\0b", "empty name": "", "loop": tmp_path / "loop",
    }[kind]  # fmt: skip
    before = listing(tmp_path)
    with pytest.raises(OutputError):
        output.require_writable(place, ours)
    server.close()
    assert listing(tmp_path) == before and (tmp_path / "file").read_bytes() == b"mine"


def test_what_can_be_written_is_left_alone(tmp_path):
    (tmp_path / "mine").write_bytes(b"ours, from before")
    (tmp_path / "nothing").touch()
    os.mkfifo(tmp_path / "pipe")
    for place in ("mine", "nothing", "pipe", "new/folder/x", "x" * 255, "/dev/null", "/dev/fd/1"):
        output.require_writable(tmp_path / place, ours)
    assert listing(tmp_path) == ["mine", "nothing", "pipe"]


def test_a_report_replaces_a_report_and_nothing_else(tmp_path):
    @click.command()
    def command():
        console.write_json(str(tmp_path / "r.json"), {"rounds": [1.5], "name": "caf\udce9 \ud800 好"})

    assert console.run(command, "covo-test", []) == 0 == console.run(command, "covo-test", [])
    report = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert report == {"command": "covo-test", "rounds": [1.5], "name": r"caf\xe9 \ud800 好"}
    for content in (
        b'{"version": 1, "command": "npm"}',
        b"RIFF",
        b"[]",
        b'{"id": "d1", "audio": "x.wav"}',
        b"[" * 10**5,
    ):
        (tmp_path / "r.json").write_bytes(content)
        assert console.run(command, "covo-test", []) == 1
        assert (tmp_path / "r.json").read_bytes() == content


def test_closed_descriptors_become_no_files(tmp_path):
    """With stdout closed, the next file that is opened would be descriptor 1, and get what others print."""
    program = (
        "import os, sys; assert sys.stdin is sys.stdout is None\n"
        "from covo_npu.runtime.cli import console; console._prepare_streams()\n"
        "sys.exit(open(sys.argv[1], 'wb').fileno() < 3)"
    )
    command = ["bash", "-c", 'exec "$@" <&- >&-', "bash", sys.executable, "-c", program, tmp_path / "x"]
    assert subprocess.run(command, stderr=subprocess.PIPE).returncode == 0
