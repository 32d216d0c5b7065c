# SPDX-License-Identifier: Apache-2.0
"""Compares the length that the header of an MP3 file announces with the frames in the file.

Decoders believe the first frame ("Xing", "Info" or "VBRI" header). If it announces too few frames,
as in a file made by ``cat a.mp3 b.mp3``, they stop early and report no error. Without such a
header, they estimate the length from the first bit rate, and stop early if others follow.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import NamedTuple

__all__ = ["Mp3Header", "correct_header", "count_frames", "read_header"]

Buffer = bytes | mmap.mmap

_KBPS_MPEG1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBPS_MPEG2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_TAIL_TAG_BYTES = 128  # ID3v1
MAX_FOREIGN_SHARE = 0.1  # of a file, in bytes that are neither frames nor tags


class Mp3Header(NamedTuple):
    """The announced length: where it is in the file, and the number of frames and bytes."""

    start: int  # of the frame that holds the header
    num_frames_at: int
    num_frames: int  # without the header's own frame
    num_bytes_at: int | None
    num_bytes: int | None


def read_header(data: Buffer) -> Mp3Header | None:
    """Return the header of an MPEG layer III file; None if the file announces no length."""
    start = _skip_id3(data, 0)
    if not _frame_bytes(data, start):
        return None
    at = start + 4 + _side_bytes(data[start : start + 4])
    if data[at : at + 4] in (b"Xing", b"Info"):
        (flags,) = struct.unpack(">I", data[at + 4 : at + 8])
        if not flags & 1:
            return None
        num_bytes_at = at + 12 if flags & 2 else None
        num_frames_at = at + 8
    elif data[start + 36 : start + 40] == b"VBRI":
        num_bytes_at, num_frames_at = start + 46, start + 50
    else:
        return None
    num_bytes = None if num_bytes_at is None else _uint32(data, num_bytes_at)
    return Mp3Header(start, num_frames_at, _uint32(data, num_frames_at), num_bytes_at, num_bytes)


def count_frames(data: Buffer, start: int) -> tuple[int, bool]:
    """Count the frames from ``start``.

    Returns:
        The number of complete frames, and whether the last frame is incomplete.

    Raises:
        ValueError: much of the file is neither frames of the first one's kind nor tags.
    """
    first = data[start : start + 4]
    count, at, foreign = 0, start, 0
    while at + 4 <= len(data):
        num_bytes = _frame_bytes(data, at, like=first)
        if num_bytes and at + num_bytes <= len(data):
            count += 1
            at += num_bytes
        elif num_bytes:
            return count, True
        elif (after := _skip_tag(data, at)) > at:
            at = after
        else:
            after = _next_frame(data, at + 1, first)
            if bytes(data[at:after]).strip(b"\0"):
                foreign += after - at
            at = after
    if foreign > MAX_FOREIGN_SHARE * len(data):
        raise ValueError(
            f"{foreign} of its {len(data)} bytes are no MP3 frames of the sample rate of the first"
        )
    return count, False


def correct_header(path: str | os.PathLike[str], *, num_samples: int) -> bytes | None:
    """Return the content of an MP3 file with a header that announces its true length.

    Args:
        path: an MP3 file.
        num_samples: number of samples per channel that the decoder expects.

    Returns:
        None if the decoder expects the true length.

    Raises:
        ValueError: the file ends before its announced length, or much of it is not MP3.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = _skip_id3(data, 0)
        first = bytes(data[start : start + 4])
        if not _frame_bytes(data, start):
            return None  # layer I or II, or free format
        header = read_header(data)
        rest = len(data) - start
        has_tag = data[-_TAIL_TAG_BYTES : 3 - _TAIL_TAG_BYTES] == b"TAG"
        if header is not None and header.num_bytes == rest - has_tag * _TAIL_TAG_BYTES:
            return None
        try:
            counted, is_incomplete = count_frames(data, start)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} cannot be read as audio: {error}") from error
        if header is None:
            frame_samples = 1152 if first[1] >> 3 & 3 == 3 else 576
            if abs(counted * frame_samples - num_samples) <= 2 * frame_samples:
                return None
            return data[:start] + _header_frame(first, counted, rest) + data[start:]
        num_frames = counted - 1  # without the header's own frame
        # Some encoders count the header's frame too.
        if num_frames < header.num_frames - (0 if is_incomplete else 1):
            raise ValueError(
                f"{os.fspath(path)} breaks off: its header announces {header.num_frames} MP3 "
                f"frames, the file has {num_frames}; get the complete file"
            )
        if num_frames <= header.num_frames + 1:
            return None
        content = bytearray(data)
    content[header.num_frames_at : header.num_frames_at + 4] = struct.pack(">I", num_frames)
    if header.num_bytes_at is not None:
        content[header.num_bytes_at : header.num_bytes_at + 4] = struct.pack(">I", rest)
    return bytes(content)


def _header_frame(first: bytes, num_frames: int, num_bytes: int) -> bytes:
    """Return a "Xing" frame for frames like the one that begins with ``first``."""
    # No checksum; bit rate 8 of the table gives at least 192 bytes; no padding.
    head = bytes([0xFF, first[1] | 1, 0x80 | first[2] & 0x0C, first[3]])
    size = _frame_bytes(head, 0)
    fields = struct.pack(">4sIII", b"Xing", 3, num_frames, num_bytes + size)
    return (head + bytes(_side_bytes(head)) + fields).ljust(size, b"\0")


def _side_bytes(head: Buffer) -> int:
    version, is_mono = head[1] >> 3 & 3, head[3] >> 6 == 3
    if version == 3:
        return 17 if is_mono else 32
    return 9 if is_mono else 17


def _uint32(data: Buffer, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def _frame_bytes(data: Buffer, at: int, *, like: bytes | None = None) -> int:
    """Return the length of the layer III frame at ``at``; 0 if there is none.

    Args:
        like: a frame header that must have the same version and sample rate.
    """
    head = data[at : at + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:  # sync bits and layer III
        return 0
    version, bitrate, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or rate == 3 or bitrate in (0, 15):
        return 0
    if like is not None and (version, rate) != (like[1] >> 3 & 3, like[2] >> 2 & 3):
        return 0
    kbps, factor = (_KBPS_MPEG1, 144) if version == 3 else (_KBPS_MPEG2, 72)
    return factor * 1000 * kbps[bitrate] // _RATES[version][rate] + (head[2] >> 1 & 1)


def _next_frame(data: Buffer, at: int, like: bytes) -> int:
    """Return the start of the next two frames in sequence or of a tag, else the end of the data."""
    while (at := data.find(b"\xff", at)) >= 0:
        num_bytes = _frame_bytes(data, at, like=like)
        if num_bytes and _frame_bytes(data, at + num_bytes, like=like):
            return at
        at += 1
    return len(data)


def _skip_id3(data: Buffer, at: int) -> int:
    while data[at : at + 3] == b"ID3" and at + 10 <= len(data):
        size = 0
        for byte in data[at + 6 : at + 10]:
            size = size << 7 | byte & 0x7F
        at += 10 + size
    return at


def _skip_tag(data: Buffer, at: int) -> int:
    """Return the end of the tag that starts at ``at``, or ``at`` if there is none."""
    if data[at : at + 3] == b"ID3":
        return _skip_id3(data, at)
    if data[at : at + 3] == b"TAG":
        return at + _TAIL_TAG_BYTES
    if data[at : at + 8] == b"APETAGEX":
        return at + 32 + int.from_bytes(data[at + 12 : at + 16], "little")
    return at
