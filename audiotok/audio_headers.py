"""What the headers of audio files promise, where libsndfile does not say: the length of the audio in the file.

libsndfile shortens a cut file silently to what is there, and takes the placeholder lengths of files written to a
pipe at their word. Here are the few bytes that tell both apart from a whole file, for WAV, RF64, AIFF, AU and NIST
SPHERE, and the tag that says whether an MP3 file knows its length. Files are given by their descriptors, and read
without moving their position.
"""

from __future__ import annotations

import os
import re
import struct
from typing import NamedTuple

_MAX_CHUNKS = 1000  # a file of zeros is an endless row of empty chunks


class AudioChunk(NamedTuple):
    """Where a file keeps its audio: `available` bytes from `offset` on, of which the header promises `size`.

    With `is_streamed`, `size` is a placeholder: the writer could not go back to fill it in.
    """

    offset: int
    size: int
    available: int
    is_streamed: bool = False


def find_audio_chunk(file: int) -> AudioChunk | None:
    """The audio of a WAV, RF64, AIFF, AU or NIST file; None for other formats and broken headers."""
    file_size = os.fstat(file).st_size
    head = os.pread(file, 1024, 0)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":
        found = _find_in_wav(file, head, file_size)
    elif head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        found = _find_in_aiff(file)
    elif head[:4] == b".snd" and len(head) >= 12:
        offset, size = struct.unpack(">II", head[4:12])
        found = (offset, size, size == 0xFFFFFFFF)  # the placeholder that the format defines
    elif head[:7] == b"NIST_1A":
        found = _find_in_nist(head)
    else:
        found = None
    if found is None:
        return None
    offset, size, is_streamed = found
    return AudioChunk(offset, size, max(0, file_size - offset), is_streamed)


def mp3_start(file: int) -> int:
    """Where the first frame of an MP3 file is: behind its ID3v2 tags."""
    start = 0
    for _ in range(_MAX_CHUNKS):
        tag = os.pread(file, 10, start)
        if tag[:3] != b"ID3" or len(tag) < 10:
            break
        start += 10 + sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))  # 4 x 7 bits
    return start


def has_mp3_length(file: int) -> bool:
    """True if the first frame of an MP3 file is a Xing or Info tag that states the number of frames."""
    frame = os.pread(file, 64, mp3_start(file))  # at most 38 bytes of it come before the tag
    places = [frame.find(name) for name in (b"Xing", b"Info")]
    return any(0 <= at < len(frame) - 7 and frame[at + 7] & 1 for at in places)  # flag 1: the number follows


# Each returns (offset of the audio, its promised bytes, whether those are a placeholder), or None.


def _find_in_wav(file: int, head: bytes, file_size: int) -> tuple[int, int, bool] | None:
    order = ">" if head[:4] == b"RIFX" else "<"
    offset, size, large_size = _walk_chunks(file, order, b"data")
    if offset is None:
        return None
    if head[:4] == b"RF64" and size == 0xFFFFFFFF:
        return offset, large_size, False
    # What sox, arecord, ffmpeg and others leave, less a few bytes of header.
    placeholder = 0x7FFFF000 <= size <= 0x80000000 or size >= 0xFFFFF000
    # A finished file without audio has an outer length that fits; one that was left open has not.
    outer_size = struct.unpack(f"{order}I", head[4:8])[0]
    left_open = size == 0 and file_size > offset and outer_size + 8 != file_size
    return offset, size, placeholder or left_open


def _find_in_aiff(file: int) -> tuple[int, int, bool] | None:
    offset, size, _ = _walk_chunks(file, ">", b"SSND")
    return None if offset is None else (offset + 8, max(0, size - 8), False)  # 8 bytes of alignment come first


def _walk_chunks(file: int, order: str, wanted: bytes) -> tuple[int | None, int, int]:
    """Offset and size of the wanted chunk, and the 64-bit size of the audio that an RF64 file states before it."""
    large_size, position = 0, 12
    for _ in range(_MAX_CHUNKS):
        header = os.pread(file, 24, position)
        if len(header) < 8:
            break
        name, size = struct.unpack(f"{order}4sI", header[:8])
        if name == wanted:
            return position + 8, size, large_size
        if name == b"ds64":  # sizes of the file, then of the audio
            large_size = int.from_bytes(header[16:], "little")
        position += 8 + size + size % 2
    return None, 0, 0


def _find_in_nist(head: bytes) -> tuple[int, int, bool] | None:
    fields = dict(re.findall(rb"^(\w+) -i (\d{1,15})\s*$", head, re.MULTILINE))
    length = re.match(rb"NIST_1A\n\s*(\d{1,9})\n", head)
    names = (b"sample_count", b"channel_count", b"sample_n_bytes")
    if length is None or any(name not in fields for name in names):
        return None
    count, channels, width = (int(fields[name]) for name in names)
    return int(length[1]), count * channels * width, False
