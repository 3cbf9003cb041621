"""How sources arrive: pointers, pages, unfinished downloads, caches. Refused by name, or read like the plain folder."""

import fcntl
import filecmp
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from source_edits import CONFIG, INDEX, PICKLE, SHARDS

from covo_npu.convert.downloads import UNFINISHED

LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 4999999\n"
PROMPT = "token2wav/prompt"
READ = [
    CONFIG, INDEX, *SHARDS, "tokenizer.json", "tokenizer_config.json", PICKLE, "token2wav/config.json",
    "token2wav/global_mean_var.npy", *(f"{PROMPT}/{n}.npy" for n in ("prompt_token", "prompt_latent", "speaker_embed")),
]  # fmt: skip


@pytest.fixture
def same(tmp_path: Path, convert_tiny: Callable[[str], Path]) -> Callable[[], bool]:
    """A function: whether the checkpoint in tmp_path / "target" is that of the tiny source, byte for byte."""
    return lambda: (
        (tmp_path / "target" / "manifest.json").read_bytes()
        == (convert_tiny("bfloat16") / "manifest.json").read_bytes()
    )


# --- something else in the place of a file


@pytest.mark.parametrize("name", READ)
def test_any_file_may_be_a_pointer_of_git_lfs(name: str, source: Path, convert, tmp_path: Path):
    (source / name).write_text(LFS)
    outcome = convert(source)
    assert outcome.code == 1 and "files are pointers of git-lfs, not what they point at (1)" in outcome.err
    assert f"{name}\n" in outcome.err and "git lfs pull" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_all_pointers_are_named_together(source: Path, convert):
    """A clone without git-lfs: everything large is a pointer, and the voice of another clone with it."""
    for name in (*SHARDS, PICKLE, "tokenizer.json"):
        (source / name).write_text(LFS)
    voice = shutil.move(source / PROMPT, source.parent / "voice")
    (Path(voice) / "prompt_latent.npy").write_text(LFS)
    outcome = convert(source, "--voice", str(voice))
    assert "(7)" in outcome.err
    for name in (*SHARDS, PICKLE, "tokenizer.json", f"{voice}/prompt_latent.npy"):
        assert f"  {name}\n" in outcome.err, outcome.err


def test_pointers_among_files_that_nothing_reads_do_not_matter(source: Path, convert, same):
    for name in (
        "consolidated.safetensors",
        "model.safetensors",
        "pytorch_model.bin",
        "vocab.json",
        "assets.tar",
        "README.md",
    ):
        (source / name).write_text(LFS)
    assert convert(source).code == 0 and same()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("<!DOCTYPE html>\n<html><head><title>Log in</title>" + "x" * 3000, "a web page, '<!DOCTYPE html>"),
        ("\n  <HTML>", "a web page"),
        ("<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML message"),
        ('{"error":"Repository not found"}', 'a message of the server, \'{"error":"Repository not found"}\''),
        ("Entry not found", "a message, 'Entry not found'"),
        ("Access to model tencent/Covo-Audio-Chat is restricted", "a message, 'Access to model"),
    ],
)
@pytest.mark.parametrize("name", [SHARDS[1], PICKLE, f"{PROMPT}/prompt_token.npy"])
def test_what_a_server_said_in_the_place_of_a_file_is_shown(name: str, text: str, what: str, source: Path, convert):
    (source / name).write_text(text)
    outcome = convert(source)
    assert outcome.code == 1 and "files are what a server said instead (1)" in outcome.err
    assert f"{name}: {what}" in outcome.err, outcome.err


def test_a_page_in_the_place_of_a_text_file_is_one_too(source: Path, convert):
    (source / CONFIG).write_text("<html>")
    assert f"{CONFIG}: a web page" in convert(source).err


@pytest.mark.parametrize("name", [CONFIG, INDEX, SHARDS[0], "tokenizer.json", PICKLE, f"{PROMPT}/prompt_token.npy"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_folder_or_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(kind, name, source: Path, convert):
    (source / name).unlink()
    (source / name).mkdir() if kind == "folder" else os.mkfifo(source / name)
    outcome = convert(source)
    assert outcome.code == 1 and "files are folders, pipes or devices (1)" in outcome.err and name in outcome.err


# --- downloads that have not ended


@pytest.mark.parametrize("name", [SHARDS[3], PICKLE, CONFIG, f"{PROMPT}/prompt_token.npy"])
@pytest.mark.parametrize("suffix", [".aria2", ".part", ".incomplete", ".crdownload"])
def test_notes_of_a_download_beside_a_file_mean_that_it_is_not_complete(suffix: str, name: str, source: Path, convert):
    """The file has its whole size already: programs make room for all of it first."""
    path = source / name
    path.with_name(path.name + suffix).write_bytes(bytes(40))
    outcome = convert(source)
    assert outcome.code == 1 and "downloads have not ended (1)" in outcome.err, outcome.err
    assert f"{path.name}{suffix} stands beside it" in outcome.err


@pytest.mark.parametrize(
    "left", [*(SHARDS[3] + suffix for suffix in UNFINISHED), f"{SHARDS[3]}.BaiduPCS-Go-downloading",
             f"{SHARDS[3]}.0a1b2c3d.incomplete", f".{SHARDS[3]}.Ab3dE9"]
)  # fmt: skip
def test_every_program_s_way_to_name_them_is_known(left: str, source: Path, convert):
    (source / left).write_bytes(b"")
    outcome = convert(source)
    assert outcome.code == 1 and f"{SHARDS[3]}: {left} stands beside it" in outcome.err


def test_the_unfinished_download_of_a_file_that_is_not_there_yet_is_named(source: Path, convert):
    (source / SHARDS[3]).rename(source / f"{SHARDS[3]}.part")
    assert f"{SHARDS[3]}: {SHARDS[3]}.part stands beside it" in convert(source).err


def test_files_beside_with_other_names_are_no_notes(source: Path, convert, same):
    for name in (f"{SHARDS[3]}.sha256", f"{SHARDS[3]}.bak", f"{INDEX}.orig", "x.part.txt", f".{SHARDS[3]}.swp"):
        (source / name).write_text("")
    outcome = convert(source)
    assert outcome.code == 0 and "warning" not in outcome.err and same()


@pytest.mark.parametrize("place", ["{}.lock", ".cache/huggingface/download/{}.lock"])
def test_a_download_that_is_running_is_seen_by_its_lock(place: str, source: Path, convert, same):
    lock = source / place.format(SHARDS[2])
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        outcome = convert(source)
        assert outcome.code == 1 and f"{SHARDS[2]}: its download is running" in outcome.err, outcome.err
    outcome = convert(source)  # `hf download` leaves its locks behind
    assert outcome.code == 0 and same()
    assert ("warning" in outcome.err) == (place == "{}.lock")


@pytest.mark.parametrize(
    "left",
    [".cache/huggingface/download/mSGg0y.d00d.5f.incomplete", "._____temp/model.bin", "Unconfirmed 7.crdownload"],
)
def test_unfinished_downloads_of_clients_explain_what_is_missing_and_are_mentioned_otherwise(
    left: str, source: Path, convert, same
):
    """A client that was killed and started again completes the file, and may leave the first try where it was."""
    (source / left).parent.mkdir(parents=True, exist_ok=True)
    (source / left).write_bytes(b"x")
    outcome = convert(source)
    assert outcome.code == 0 and same() and f"warning: {source}: unfinished downloads: {left}" in outcome.err
    (source / SHARDS[1]).unlink()
    outcome = convert(source, "--force")
    assert outcome.code == 1 and f"Some have not ended: {left}" in outcome.err, outcome.err


@pytest.mark.parametrize("zeros_from", [0, 8, 0.5])
def test_without_notes_the_zeros_of_what_was_not_downloaded_tell(zeros_from: float, source: Path, convert):
    path = source / SHARDS[3]
    size = path.stat().st_size
    start = int(zeros_from * size) if zeros_from < 1 else 8
    path.write_bytes(path.read_bytes()[:start] + bytes(size - start))
    outcome = convert(source)
    assert outcome.code == 1
    if start > 8:
        assert "tensors are all zeros" in outcome.err and "A download that did not end leaves zeros" in outcome.err
        assert f"in {SHARDS[3]}: [" in outcome.err and "--allow-zeros" in outcome.err
    else:
        assert f"{SHARDS[3]}:" in outcome.err and ("begins with zeros" in outcome.err or "header" in outcome.err)


# --- folders of caches


def snapshot(tiny_source: Path, hub: Path, commit: str) -> Path:
    """The tiny source as `hf download` keeps it."""
    model = hub / "models--tencent--Covo-Audio-Chat"
    blobs, folder = model / "blobs", model / "snapshots" / commit
    blobs.mkdir(parents=True, exist_ok=True)
    for n, path in enumerate(sorted(path for path in tiny_source.rglob("*") if path.is_file())):
        link = folder / path.relative_to(tiny_source)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / f"{n:040x}")
        link.symlink_to(os.path.relpath(blobs / f"{n:040x}", link.parent))
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / "main").write_text(commit)
    return folder


@pytest.mark.parametrize("named", ["hub", "hub/models--tencent--Covo-Audio-Chat", "snapshots", "commit"])
def test_the_only_snapshot_of_a_cache_is_taken(named: str, tiny_source: Path, convert, tmp_path: Path, same):
    folder = snapshot(tiny_source, tmp_path / "hub", "0a1b")
    src = {"snapshots": folder.parent, "commit": folder}.get(named, tmp_path / named)
    outcome = convert(src, "--json", "-")
    assert outcome.code == 0 and same() and json.loads(outcome.out)["src"] == str(folder)


def test_of_several_snapshots_one_must_be_named(tiny_source: Path, convert, tmp_path: Path, same):
    older, newer = (snapshot(tiny_source, tmp_path / "hub", commit) for commit in ("0a1b", "2c3d"))
    outcome = convert(tmp_path / "hub" / "models--tencent--Covo-Audio-Chat")
    assert outcome.code == 1 and "holds 2 snapshots; name one with --src" in outcome.err
    assert f"  {older}\n  {newer} (main)" in outcome.err
    assert convert(older).code == 0 and same()


def test_a_snapshot_that_has_not_ended_says_so(tiny_source: Path, convert, tmp_path: Path):
    folder = snapshot(tiny_source, tmp_path / "hub", "0a1b")
    (folder / SHARDS[2]).unlink()
    (folder.parents[1] / "blobs" / "77ab.incomplete").write_bytes(b"x")
    outcome = convert(tmp_path / "hub")
    assert "shards that the index names are missing (1)" in outcome.err and "77ab.incomplete" in outcome.err


def test_links_without_what_they_lead_to_are_named(tiny_source: Path, convert, tmp_path: Path):
    """A snapshot that was copied without its blobs."""
    folder = snapshot(tiny_source, tmp_path / "hub", "0a1b")
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    outcome = convert(tmp_path / "copy")
    assert outcome.code == 1 and "links lead nowhere (14)" in outcome.err, outcome.err
    assert f"{CONFIG} -> ../../blobs/" in outcome.err and "cp -rL" in outcome.err


def test_a_folder_above_the_weights_names_the_folder_of_the_weights(source: Path, convert, tmp_path: Path):
    outcome = convert(tmp_path, dst=tmp_path.parent / f"{tmp_path.name}-target")
    assert outcome.code == 1 and f"has no {CONFIG}" in outcome.err and f"is it {source}?" in outcome.err


def test_a_source_that_is_no_folder(convert, tmp_path: Path, source: Path):
    assert "no such folder; --src expects" in convert(tmp_path / "absent").err
    outcome = convert(source / SHARDS[0])
    assert outcome.code == 1 and f"is a file; --src expects the folder that it lies in, {source}" in outcome.err
    (tmp_path / "empty").mkdir()
    assert (
        "config.json: no such file; --src expects the folder of the published weights"
        in convert(tmp_path / "empty").err
    )


def test_files_compared_here_are_whole_checkpoints(
    convert_tiny: Callable[[str], Path], source: Path, convert, tmp_path
):
    """What `same` rests on: the manifest holds the digest of every block of every file."""
    assert convert(source).code == 0
    first, second = convert_tiny("bfloat16"), tmp_path / "target"
    assert not filecmp.cmpfiles(first, second, os.listdir(first), shallow=False)[1]
