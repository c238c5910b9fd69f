"""What the headers of audio files promise, where libsndfile does not say: the length of the audio in the file.

libsndfile shortens a cut file silently to what is there, and takes the placeholder lengths of files written to a
pipe at their word. Here are the few bytes that tell both apart from a whole file, for WAV, RF64, AIFF, AU and NIST
SPHERE, and the tag that says whether an MP3 file knows its length.
"""

from __future__ import annotations

import re
import struct
from typing import BinaryIO, NamedTuple

_MAX_CHUNKS = 1000  # a file of zeros is an endless row of empty chunks


class AudioChunk(NamedTuple):
    """Where a file keeps its audio: `available` bytes from `offset` on, of which the header promises `size`.

    With `is_streamed`, `size` is a placeholder: the writer could not go back to fill it in.
    """

    offset: int
    size: int
    available: int
    is_streamed: bool = False


def find_audio_chunk(file: BinaryIO, file_size: int) -> AudioChunk | None:
    """The audio of a WAV, RF64, AIFF, AU or NIST file; None for other formats and broken headers."""
    file.seek(0)
    head = bytes(read_fully(file, 1024))
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


def has_mp3_length(file: BinaryIO) -> bool:
    """True if an MP3 file starts with a Xing or Info tag that holds its number of frames."""
    file.seek(0)
    tag = read_fully(file, 10)
    if tag[:3] == b"ID3" and len(tag) == 10:  # its size comes as four times seven bits
        file.seek(10 + sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True)))
    else:
        file.seek(0)
    head = bytes(read_fully(file, 4096))
    places = [head.find(name) for name in (b"Xing", b"Info")]
    return any(0 <= at < len(head) - 7 and head[at + 7] & 1 for at in places)  # flag 1: the number follows


def read_fully(file: BinaryIO, count: int) -> bytearray:
    """Up to `count` bytes, fewer only at the end of the file: a raw `read` may return less than is there."""
    data = bytearray()
    while len(data) < count:
        piece = file.read(count - len(data))
        if not piece:
            break
        data += piece
    return data


# Each returns (offset of the audio, its promised bytes, whether those are a placeholder), or None.


def _find_in_wav(file: BinaryIO, head: bytes, file_size: int) -> tuple[int, int, bool] | None:
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


def _find_in_aiff(file: BinaryIO) -> tuple[int, int, bool] | None:
    offset, size, _ = _walk_chunks(file, ">", b"SSND")
    return None if offset is None else (offset + 8, max(0, size - 8), False)  # 8 bytes of alignment come first


def _walk_chunks(file: BinaryIO, order: str, wanted: bytes) -> tuple[int | None, int, int]:
    """Offset and size of the wanted chunk, and the 64-bit size of the audio that an RF64 file states before it."""
    large_size, position = 0, 12
    for _ in range(_MAX_CHUNKS):
        file.seek(position)
        header = read_fully(file, 8)
        if len(header) < 8:
            break
        name, size = struct.unpack(f"{order}4sI", header)
        if name == wanted:
            return position + 8, size, large_size
        if name == b"ds64":  # sizes of the file, then of the audio
            large_size = int.from_bytes(read_fully(file, 16)[8:], "little")
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
