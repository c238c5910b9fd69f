"""Files of codes and of ids: what `encode` and `tokenize` write and `decode` reads, and how each is opened.

codes.parquet   one row a clip; the schema's metadata holds an `Origin` as JSON under the key "audiotok":
    id            string, the file's name
    codes         list of uint16 (uint32 where a codebook is larger): frame by frame, coarse to fine, active codes only
    depths        list of uint8, codes in each frame; only of codecs whose frames vary
    num_frames    int64
    audio_length  int64, samples at the codec's rate
    duration      float64, seconds

ids.txt         UTF-8, one line a clip behind a header with the same JSON:
    # audiotok ids {"tokenizer": "audiotok/auv-mini", "layout": "interleaved", ...}
    talk.flac<TAB>90944<TAB>4379 1201 10993 ...
    The number is the audio length in samples, empty where unknown; tab, newline, # and backslash in a name are
    \\t, \\n, \\# and \\\\. The streams of a 2-D layout are set apart by " | ". A line of ids alone is read as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from audiotok.errors import CodesError, OptionError

if TYPE_CHECKING:
    import numpy as np

    from audiotok.cli.codes_file import CodesReader
    from audiotok.cli.corpus_file import CorpusReader
    from audiotok.cli.ids_file import IdsReader
    from audiotok.tokenizer import AudioTokenizer


@dataclass(frozen=True)
class StoredClip:
    """A clip of a file, not yet looked into.

    Attributes:
        id: its name.
        audio_length: samples at the codec's rate, None where the file does not say.
        ids: gives the ids in a tokenizer's layout; raises `TokenError` for what is no clip of it.
    """

    id: str
    audio_length: int | None
    ids: Callable[[AudioTokenizer], np.ndarray]


@contextmanager
def open_clips(path: str, wanted: Sequence[str] = ()) -> Generator[CodesReader | IdsReader | CorpusReader]:
    """A file that `encode` wrote, or a folder that `tokenize` wrote; "-" is ids on stdin.

    Args:
        wanted: ids of clips of a folder; none for all of them.

    Raises:
        CodesError: there is no such file, or it holds something else.
    """
    from audiotok.cli.codes_file import CodesReader
    from audiotok.cli.ids_file import IdsReader

    if "://" in path or os.path.isdir(path):
        from audiotok.cli.corpus_file import CorpusReader

        yield CorpusReader(path, wanted)
        return
    if wanted:
        raise OptionError(f"--id chooses clips of a folder that `audiotok tokenize` wrote; {path} is none.")
    if path == "-":
        yield IdsReader(sys.stdin.buffer, "stdin")
        return
    try:
        file = open(path, "rb")
    except OSError as error:
        raise unreadable(path, error) from error
    with file:
        yield CodesReader(file, path) if file.peek(4)[:4] == b"PAR1" else IdsReader(file, path)


def unreadable(name: str, error: Exception) -> CodesError:
    """The error, to be raised, for a file that the operating system or Arrow cannot read."""
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return CodesError(
        f"{name} cannot be read ({reason}): give codes.parquet or ids.txt as `audiotok encode` writes them."
    )
