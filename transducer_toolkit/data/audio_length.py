# SPDX-License-Identifier: Apache-2.0
"""Finds audio files that end before the length in their header, or hold more than it says.

libsndfile reads such files without an error: it stops where the file or the header ends.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator

__all__ = ["check_length"]

Buffer = bytes | mmap.mmap

# A header is wrong by a few bytes if its writer counted itself.
SLACK_BYTES = 64
# Part of the audio that may follow unannounced: tags and padding.
MAX_UNANNOUNCED = 0.01
# A program that writes to a pipe does not know the length and writes one about 2 or 4 GiB.
_UNKNOWN_SIZES = (range(0x7FFF0000, 0x80010000), range(0xFFFF0000, 2**32))


def check_length(path: str | os.PathLike[str]) -> None:
    """Raise an error if a file is shorter or longer than its header announces.

    Checks WAV, RF64, W64, AIFF, AU, CAF, NIST and VOC files, Ogg files (Vorbis, Opus, FLAC) and
    several FLAC files in one. The decoder itself refuses a truncated FLAC file.
    :mod:`~transducer_toolkit.data.mp3` checks MP3 files. The length that a program wrote to a pipe,
    such as 0xffffffff, announces nothing.

    Args:
        path: an audio file.

    Raises:
        ValueError: the file breaks off, or holds audio that its header does not announce.

    Example:
        >>> check_length("speech.wav")  # doctest: +SKIP
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            problem = _problem(data)
    if problem:
        raise ValueError(f"{os.fspath(path)} {problem}")


def _problem(data: Buffer) -> str | None:
    if data[:4] == b"OggS":
        return _ogg_problem(data)
    if data[:4] == b"fLaC":
        second = data.find(b"fLaC\x00\x00\x00\x22", 4)
        return None if second < 0 else _several("FLAC")
    span = _audio_span(data)
    if span is None:
        return None
    start, end = span
    if end > len(data) + SLACK_BYTES:
        return (
            f"breaks off: its header announces {end - start} bytes of audio, the file has "
            f"{len(data) - start}; get the complete file"
        )
    rest = len(data) - end
    if data[:4] == b"RIFF" and rest > SLACK_BYTES + MAX_UNANNOUNCED * (end - start):
        follows = bytes(data[end : end + 5])
        # A chunk has a name; without the padding byte that the standard asks for, it starts at end.
        has_chunk = any(name.isascii() and name.isalnum() for name in (follows[:3], follows[1:4]))
        if not has_chunk and bytes(data[end:]).strip(b"\0"):
            return (
                f"holds {rest} bytes after the {end - start} bytes of audio that its header "
                "announces: repair the header, for example with ffmpeg or sox --ignore-length"
            )
    return None


def _several(kind: str) -> str:
    return (
        f"holds several {kind} streams in sequence, of which only the first would be read: convert "
        "it to one stream"
    )


def _audio_span(data: Buffer) -> tuple[int, int] | None:
    """Return start and announced end of the audio, in bytes; None if they are not announced."""
    kind = bytes(data[:4])
    if kind in (b"RIFF", b"RIFX", b"RF64"):
        return _riff_span(data, "big" if kind == b"RIFX" else "little")
    if kind == b"FORM":
        return _find_chunk(_chunks(data, 12, 4, "big"), b"SSND")
    if kind == b"caff":
        return _find_chunk(_chunks(data, 8, 8, "big", align=1), b"data")
    if kind == b"riff":
        return _w64_span(data)
    if kind in (b".snd", b"dns."):
        order = "big" if kind == b".snd" else "little"
        start, size = _uint(data, 4, 4, order), _uint(data, 8, 4, order)
        return None if _is_unknown(size) else (start, start + size)
    if kind == b"NIST":
        return _nist_span(data)
    if data[:19] == b"Creative Voice File":
        return _voc_span(data)
    return None


def _uint(data: Buffer, at: int, num_bytes: int, order: str) -> int:
    return int.from_bytes(data[at : at + num_bytes], "big" if order == "big" else "little")


def _is_unknown(size: int) -> bool:
    return size == 2**64 - 1 or any(size in sizes for sizes in _UNKNOWN_SIZES)


def _chunks(
    data: Buffer, at: int, size_bytes: int, order: str, *, align: int = 2
) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and announced size of the chunks."""
    while at + 4 + size_bytes <= len(data):
        name, size = bytes(data[at : at + 4]), _uint(data, at + 4, size_bytes, order)
        at += 4 + size_bytes
        yield name, at, size
        at += size + -size % align


def _find_chunk(chunks: Iterator[tuple[bytes, int, int]], name: bytes) -> tuple[int, int] | None:
    for found, start, size in chunks:
        if found == name:
            return None if _is_unknown(size) else (start, start + size)
    return None


def _riff_span(data: Buffer, order: str) -> tuple[int, int] | None:
    size_64 = None
    for name, start, size in _chunks(data, 12, 4, order):
        if name == b"ds64":
            size_64 = _uint(data, start + 8, 8, order)
        elif name == b"data":
            if size == 0xFFFFFFFF and size_64:
                return None if _is_unknown(size_64) else (start, start + size_64)
            return None if _is_unknown(size) else (start, start + size)
    return None


def _w64_span(data: Buffer) -> tuple[int, int] | None:
    at = 40  # after the GUID and size of the file, and the GUID of its type
    while at + 24 <= len(data):
        size = _uint(data, at + 16, 8, "little")  # includes GUID and size
        if data[at : at + 4] == b"data":
            return None if _is_unknown(size) else (at + 24, at + size)
        at += max(24, size + -size % 8)
    return None


def _nist_span(data: Buffer) -> tuple[int, int] | None:
    head = bytes(data[:1024])
    numbers = [
        re.search(rb"\n%s -i (\d+)" % name, head)
        for name in (b"sample_count", b"sample_n_bytes", b"channel_count")
    ]
    start = re.match(rb"NIST_1A\s+(\d+)\s", head)
    if start is None or numbers[0] is None or numbers[1] is None:
        return None
    size = 1
    for number in numbers:
        size *= 1 if number is None else int(number[1])
    return int(start[1]), int(start[1]) + size


def _voc_span(data: Buffer) -> tuple[int, int] | None:
    at = first = _uint(data, 20, 2, "little")
    while at + 4 <= len(data) and data[at] != 0:
        at += 4 + _uint(data, at + 1, 3, "little")
    return first, at


def _ogg_problem(data: Buffer) -> str | None:
    """Walk the pages: each stream must end with a page that says so, and none may follow."""
    has_ended: dict[bytes, bool] = {}  # by serial number
    at, has_audio = 0, False
    while at >= 0:
        num_segments = data[at + 26] if at + 27 <= len(data) else 0
        sizes = data[at + 27 : at + 27 + num_segments]
        end = at + 27 + num_segments + sum(sizes)
        if at + 27 > len(data) or len(sizes) < num_segments or end > len(data):
            return "breaks off within an Ogg page: get the complete file"
        flags, serial = data[at + 5], bytes(data[at + 14 : at + 18])
        is_first, is_last = bool(flags & 2), bool(flags & 4)
        if is_first and has_audio:
            return _several("Ogg")
        has_audio = has_audio or not is_first
        has_ended[serial] = is_last or has_ended.get(serial, False)
        at = end if data[end : end + 4] == b"OggS" else data.find(b"OggS", end)
    if not all(has_ended.values()):
        return "breaks off: the last page of its Ogg stream is missing; get the complete file"
    return None
