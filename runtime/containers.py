"""Where recordings begin and end in a file: what libsndfile does not look for. The sizes in a header are hints.

People join files, pause recordings, pull the plug, write into pipes: then one file holds several recordings, or a
header states what nobody wrote. Sources: RFC 3533 (Ogg), EBU Tech 3306 (RF64), RFC 9639 (FLAC); the chunks of RIFF and
IFF: "Multimedia Programming Interface and Data Specifications 1.0", "EA IFF 85".
"""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

FIRST_SCAN_BYTES, SCAN_BYTES = 1 << 12, 1 << 20
# What a file has at most: each costs time, however short it is. Pages of Ogg that are cut off count as recordings do.
MOST_RECORDINGS, MOST_CHUNKS, MOST_CHUNKS_BEFORE = 20_000, 64, 10_000  # chunks: behind and before the samples
UNKNOWN_SIZE = 0x7FFF0000  # from here on a size of 32 bits means that the writer could not know it
LONGEST_TRAILER = 1 << 16
TRAILERS = (b"ID3", b"TAG", b"APETAGEX")  # tags that players leave behind the last chunk
CUT_CHUNKS = (b"LIST", b"id3 ", b"bext", b"cue ", b"smpl", b"fact", b"iXML", b"ANNO", b"NAME", b"junk", b"JUNK")
LONGEST_FRAME = 1 << 12  # of MP3, and more
AU_HEADER, WAVE64_HEADER = 24, 40  # bytes that a recording has at least: a header that states fewer does not split
CAF_CHUNKS = (
    b"free",
    b"info",
    b"pakt",
    b"chan",
    b"uuid",
    b"strg",
    b"mark",
    b"regn",
    b"peak",
    b"ovvw",
    b"edct",
    b"umid",
    b"caff",
)
NO_MASK = -1


@dataclass(frozen=True, slots=True)
class Part:
    """One recording: bytes start..stop of a file, some of them replaced.

    doubt: how header and content disagree, "" if they do not. mask: which loudspeakers the channels are for (WAV's
    dwChannelMask), NO_MASK if that is not said. skipped: bytes behind it that belong to no recording.
    """

    start: int
    stop: int
    replaced: tuple[tuple[int, bytes], ...] = ()
    doubt: str = ""
    mask: int = NO_MASK
    skipped: int = 0


class Window(io.RawIOBase):
    """A part of a file that can be sought in, as a file of its own."""

    def __init__(self, file: BinaryIO, part: Part) -> None:
        self._file, self._part, self._at = file, part, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place, and return it."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._part.stop - self._part.start}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, at most `size`; all that are left if it is negative."""
        begin = self._part.start + self._at
        left = max(0, self._part.stop - begin)
        data = bytearray(_at(self._file, begin, left if size < 0 else min(size, left)))
        for place, value in self._part.replaced:
            for offset, byte in enumerate(value, place - begin):
                if 0 <= offset < len(data):
                    data[offset] = byte
        self._at += len(data)
        return bytes(data)

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        """Fill the target as far as there are bytes; return how many came."""
        data = self.read(len(target))
        target[: len(data)] = data
        return len(data)


def parts(file: BinaryIO) -> list[Part]:
    """Return the recordings of a file that can be sought in, at least one: what is not understood is one to its end.

    Behind more than MOST_RECORDINGS no others are looked for.
    """
    size = file.seek(0, os.SEEK_END)
    found: list[Part] = []
    start = 0
    while start < size and len(found) <= MOST_RECORDINGS:
        head = _at(file, start, 16)
        split = next((split for magic, split in FORMATS if magic.match(head)), None)
        if split is None and found:  # what follows the last recording is none
            break
        found += split(file, start, size) if split else [Part(start, size)]
        start = found[-1].stop + found[-1].skipped
    return found


# --- chunks: RIFF, RIFX, RF64, BW64 with data; FORM with SSND or BODY


def _chunks(file: BinaryIO, start: int, size: int) -> list[Part]:
    kind = _at(file, start, 4)
    order = "big" if kind in (b"FORM", b"RIFX") else "little"
    at, mask, long_size = start + 12, NO_MASK, 0
    for _ in range(MOST_CHUNKS_BEFORE):
        if at + 8 > size:
            break
        head = _at(file, at, 8)
        stated = int.from_bytes(head[4:], order)  # type: ignore[arg-type]
        if head[:4] == b"ds64":  # a RIFF beyond 4 GB: sizes of 64 bits
            long_size = int.from_bytes(_at(file, at + 16, 8), "little")
        elif head[:4] == b"fmt " and stated >= 24:
            mask = int.from_bytes(_at(file, at + 28, 4), order)  # type: ignore[arg-type]
        elif head[:4] in (b"data", b"SSND", b"BODY"):
            stated = long_size if long_size and stated == 0xFFFFFFFF else stated
            return [_samples(file, start, at, stated, size, mask, kind, order)]
        at += 8 + stated + stated % 2
    return [Part(start, size)]


def _samples(file: BinaryIO, start: int, at: int, stated: int, size: int, mask: int, kind: bytes, order: str) -> Part:
    """Return the recording whose chunk of samples is at `at`, with its sizes mended."""
    begin = at + 8
    if stated <= size - begin and (stop := _end_of_chunks(file, begin + stated + stated % 2, size, order)) is not None:
        return Part(start, stop, mask=mask)
    form = _at(file, start + 8, 4)
    stop = _found(file, begin, size, re.compile(re.escape(kind) + rb".{4}" + re.escape(form), re.DOTALL))
    there = stop - begin
    doubt = "" if stated >= UNKNOWN_SIZE and not kind.endswith(b"64") else _differing(stated, there)
    whole, samples = stop - start - 8, there
    if max(whole, samples) >= 1 << 32:
        return Part(start, stop, doubt=doubt, mask=mask)
    sizes = ((start + 4, whole), (at + 4, samples))
    replaced = tuple((place, value.to_bytes(4, order)) for place, value in sizes)  # type: ignore[arg-type]
    return Part(start, stop, replaced, doubt, mask)


def _end_of_chunks(file: BinaryIO, at: int, size: int, order: str) -> int | None:
    """Return where the chunks end that begin at `at`: at the file's end or a next recording. None: these are none."""
    for _ in range(MOST_CHUNKS):
        if at >= size:
            break
        head = _at(file, at, 12)
        if any(magic.match(head) for magic, split in FORMATS if split is not _mpeg):  # samples look like its head
            return at
        if head.startswith(TRAILERS):
            return size
        if size - at <= LONGEST_TRAILER and not _at(file, at, size - at).strip(b"\0"):
            return size
        length = int.from_bytes(head[4:8], order)  # type: ignore[arg-type]
        fits = len(head) >= 8 and at + 8 + length <= size
        if not (fits or head[:4] in CUT_CHUNKS) or not all(32 <= byte < 127 for byte in head[:4]):
            return None
        at += 8 + length + length % 2
    return size if at >= size else None


# --- others


def _au(file: BinaryIO, start: int, size: int) -> list[Part]:
    offset, stated = (int.from_bytes(_at(file, start + place, 4), "big") for place in (4, 8))
    there = size - start - offset
    if stated >= UNKNOWN_SIZE or stated == there:
        return [Part(start, size)]
    if offset >= AU_HEADER and stated < there and _at(file, start + offset + stated, 4) == b".snd":
        return [Part(start, start + offset + stated)]
    return [Part(start, size, ((start + 8, b"\xff" * 4),), _differing(stated, there))]


def _caf(file: BinaryIO, start: int, size: int) -> list[Part]:
    at = start + 8
    for _ in range(MOST_CHUNKS_BEFORE):
        if at + 12 > size:
            break
        head = _at(file, at, 12)
        stated = int.from_bytes(head[4:], "big", signed=True)
        if head[:6] == b"caff\0\1":
            return [Part(start, at)]
        if head[:4] == b"data" and stated >= 0:
            end = at + 12 + stated
            padded = next(
                (place for place in (end, end + 1) if place == size or _at(file, place, 4) in CAF_CHUNKS), None
            )
            if padded is not None:
                at = padded
                continue
            stop = _found(file, at + 12, size, re.compile(rb"caff\x00\x01"))
            there = stop - at - 12
            return [Part(start, stop, ((at + 4, there.to_bytes(8, "big")),), _differing(stated, there))]
        if stated < 0:
            break
        at += 12 + stated
    return [Part(start, size)]


def _wave64(file: BinaryIO, start: int, size: int) -> list[Part]:
    stop = start + int.from_bytes(_at(file, start + 16, 8), "little")
    if start + WAVE64_HEADER <= stop < size and _at(file, stop, 4) == b"riff":
        return [Part(start, stop)]
    return [Part(start, size, doubt=_differing(stop - start, size - start) if stop > size else "")]


def _ogg(file: BinaryIO, start: int, size: int) -> list[Part]:
    """Pages that open streams begin a recording if others stood before. A page that is cut off is left out."""
    found: list[Part] = []
    at, opening, cut = start, True, 0
    while at < size and len(found) <= MOST_RECORDINGS:
        head = _at(file, at, 27 + 255)
        end = at + 27 + head[26] + sum(head[27 : 27 + head[26]]) if len(head) > 26 else size + 1
        whole = head[:4] == b"OggS" and (end == size or (end < size and _at(file, end, 4) == b"OggS"))
        opens = whole and bool(head[5] & 2)
        if opens and not opening:
            found.append(Part(start, at))
            start = at
        if not whole:
            cut += 1
            end = _found(file, at + 1, size, re.compile(rb"OggS\0")) if cut <= MOST_RECORDINGS else size
            if at > start and (end + 5 >= size or _at(file, end + 5, 1)[0] & 2):
                doubt = f"it holds {end - at} bytes that are no whole page of Ogg: it was cut off there"
                found.append(Part(start, at, doubt=doubt, skipped=end - at))
                start, opens = end, True
        at, opening = end, opens
    return found if start == size else [*found, Part(start, size)]


def _flac(file: BinaryIO, start: int, size: int) -> list[Part]:
    return _cut_at(file, start, size, re.compile(rb"fLaC[\x00\x80]\x00\x00\x22", re.DOTALL), start)


def _mpeg(file: BinaryIO, start: int, size: int) -> list[Part]:
    """A frame that tells how many follow, its side information empty, begins a recording. The first has its own."""
    head = _at(file, start, 10)
    tag = int("".join(f"{byte & 127:07b}" for byte in head[6:10]) or "0", 2) if head[:3] == b"ID3" else 0
    pattern = re.compile(rb"\xff[\xe2-\xff]..(?:\x00{9}|\x00{17}|\x00{32})(?:Xing|Info)", re.DOTALL)
    return _cut_at(file, start, size, pattern, start + tag + LONGEST_FRAME)


def _cut_at(file: BinaryIO, start: int, size: int, pattern: re.Pattern[bytes], after: int) -> list[Part]:
    """Return the recordings that begin where a pattern matches behind `after`."""
    matches = (place for place in _places(file, start, size, pattern) if place > after)
    places = [*itertools.islice(matches, MOST_RECORDINGS + 1)]
    return [Part(*bounds) for bounds in zip([start, *places], [*places, size], strict=True)]


Split = Callable[[BinaryIO, int, int], list[Part]]
FORMATS: tuple[tuple[re.Pattern[bytes], Split], ...] = (
    (re.compile(rb"(RIFF|RIFX|RF64|BW64)....WAVE|FORM....(AIFF|AIFC|8SVX|16SV)", re.DOTALL), _chunks),
    (re.compile(rb"OggS"), _ogg),
    (re.compile(rb"fLaC"), _flac),
    (re.compile(rb"ID3|\xff[\xe2-\xff]"), _mpeg),
    (re.compile(rb"\.snd"), _au),
    (re.compile(rb"caff"), _caf),
    (re.compile(rb"riff\x2e\x91\xcf\x11"), _wave64),
)

# --- what libsndfile cannot read

FOREIGN: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), name)
    for pattern, name in (
        (rb"\x1a\x45\xdf\xa3", "WebM or Matroska, as browsers record it"),
        (rb"....(ftyp|moov|mdat|wide|free|skip)", "MP4, M4A or QuickTime, as phones record it"),
        (rb"#!AMR", "AMR, as phones record it"),
        (rb"\x02?#!SILK", "SILK, as messengers send it"),
        (rb"\xff[\xf0\xf1\xf8\xf9]", "AAC"),
        (rb"ADIF", "AAC"),
        (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "WMA"),
        (rb"\x0b\x77", "AC-3"),
        (rb"wvpk", "WavPack"),
        (rb"MAC ", "Monkey's Audio"),
        (rb"MPCK|MP\+", "Musepack"),
        (rb"TTA1", "True Audio"),
        (rb"DSD |FRM8", "DSD"),
        (rb"\.RMF|\.ra\xfd", "RealAudio"),
        (rb"FLV\x01", "Flash video"),
        (rb"RIFF....AVI ", "AVI video"),
        (rb"\x00\x00\x01\xba", "MPEG video"),
        (rb"\x47.{187}\x47", "MPEG video"),
        (rb"OggS.{24,60}(Speex   |\x80theora)", "Speex or Theora in Ogg"),
    )
)
OTHER: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), name)
    for pattern, name in (
        (rb"version https://git-lfs", "a pointer of git-lfs: git lfs pull fetches the file"),
        (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "an archive: unpack it first"),
        (rb"\s*<(!doctype|html|\?xml)", "a web page: download the recording again"),
        (rb"\s*[{\[]\s*(\"|\])", "JSON: download the recording again, or name it with --batch if it lists dialogues"),
        (rb"MThd", "MIDI, which holds notes and no sound"),
        (rb"%PDF|\x89PNG|\xff\xd8\xff|GIF8", "a document or a picture"),
    )
)


def foreign(file: BinaryIO) -> tuple[str, bool]:
    """Return what a file is that libsndfile does not read, "" if nobody knows, and whether ffmpeg may convert it."""
    head = _at(file, 0, 512)
    for table, converts in ((OTHER, False), (FOREIGN, True)):
        for pattern, name in table:
            if pattern.match(head):
                return name, converts
    return "", any(magic.match(head) for magic, _ in FORMATS)


# --- bytes


def _differing(stated: int, there: int) -> str:
    return f"its header states {stated} bytes of samples, {there} are there"


def _at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _places(file: BinaryIO, start: int, size: int, pattern: re.Pattern[bytes], longest: int = 64) -> Iterator[int]:
    """Yield where a pattern of at most `longest` bytes matches, block by block."""
    scanned = FIRST_SCAN_BYTES  # who wants the first match alone may find it near
    while start < size:
        block, reached = _at(file, start, scanned + longest), start
        for match in pattern.finditer(block):
            if match.start() < scanned:
                reached = start + match.end()
                yield start + match.start()
        start = max(start + scanned, reached)
        scanned = min(2 * scanned, SCAN_BYTES)


def _found(file: BinaryIO, start: int, size: int, pattern: re.Pattern[bytes]) -> int:
    """Return where a pattern matches first, the size if nowhere."""
    return next(_places(file, start, size, pattern), size)
