"""Export `webdataset`: tars of one sample a clip, for the `webdataset` package and whatever else reads tars in order.

    shard-000000.tar
        speech%2F0001%2Ewav.npy        codes, [Q, T]  (of a layout: .ids.npy, [L] or [Q, S])
        speech%2F0001%2Ewav.depths.npy [T], codecs of variable depth only
        speech%2F0001%2Ewav.json       id, audio_length, and the columns of the source

A sample's key is its clip's id with everything but letters, digits, - and _ as %XX: readers split names at the first
dot and group by folder. `urllib.parse.unquote` makes the id of it, which the JSON holds as well. Where a window cuts
clips, -000000 and so on follow. The same corpus gives the same bytes: headers carry no time and no user.
"""

from __future__ import annotations

import datetime
import decimal
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from audiotok.errors import OptionError
from audiotok.integrations.export_ids import Documents

SHARD_NAME = "shard-{:06d}.tar"
_UNSAFE = re.compile(rb"[^A-Za-z0-9_-]")
_BLOCK = 512  # bytes: tar pads each file, and its header, to these

Sample = tuple[str, dict[str, bytes]]  # a key, and the files of its sample by extension


def safe_key(clip_id: str) -> str:
    """A clip's id as a key that no reader takes apart; `urllib.parse.unquote` is the inverse."""
    return _UNSAFE.sub(lambda found: b"%%%02X" % found[0][0], clip_id.encode()).decode()


def write_webdataset(documents: Documents, folder: Path, as_codes: bool, shard_size: int) -> dict[str, Any]:
    """Write the files into an empty folder; what export.json says of them comes back.

    Args:
        as_codes: codes, rather than ids in the documents' layout.
        shard_size: bytes, at which a tar ends; a larger sample has one to itself.

    Raises:
        OptionError: codes of several rates, or a column that JSON has no words for.
    """
    check_array(documents, as_codes)
    samples = _code_samples(documents) if as_codes else _id_samples(documents)
    tars = Tars(folder, shard_size)
    try:
        for key, files in samples:
            tars.add(key, files)
    finally:
        tars.close()
    return {
        "content": "codes" if as_codes else "ids",
        "shards": [SHARD_NAME.format(number) for number in range(tars.count)],
        "samples": tars.samples,
    }


def check_array(documents: Documents, as_codes: bool) -> None:
    """Raise `OptionError` for codes that are no one array."""
    if as_codes and max(documents.corpus.facts.codebook_strides) > 1:
        raise OptionError(
            "Codebooks of different rates are no one array of codes: choose a layout, such as --layout multirate."
        )


def _code_samples(documents: Documents) -> Iterator[Sample]:
    corpus, done = documents.corpus, 0
    columns, total = (*documents.columns, "audio_length"), corpus.num_clips
    dtype = np.min_scalar_type(max(corpus.facts.codebook_sizes) - 1)
    for block in corpus.blocks(columns, shuffle=documents.shuffle):
        for i, row in enumerate(block.columns.to_pylist()):
            codes, depths = corpus.order.clip(block, i)
            files = {"npy": _npy(codes.astype(dtype)), "json": _json(row)}
            if depths is not None:
                files["depths.npy"] = _npy(depths.astype(np.uint8))
            yield safe_key(row["id"]), files
        done += len(block)
        documents.watch(done, total)


def _id_samples(documents: Documents) -> Iterator[Sample]:
    for block in documents:
        pieces, lengths = block.pieces.tolist(), block.audio_lengths.tolist()
        for i, row in enumerate(block.columns.to_pylist()):
            key, row = safe_key(row["id"]), row | {"audio_length": lengths[i]}
            if documents.window is not None:
                key, row = f"{key}-{pieces[i]:06d}", row | {"piece": pieces[i]}
            yield key, {"ids.npy": _npy(block.document(i)), "json": _json(row)}


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array))
    return buffer.getvalue()


def _json(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=_plain).encode()


def _plain(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    raise OptionError(
        f"JSON has no words for a {type(value).__name__} ({value!r:.40}): name the columns to take along with "
        "columns=... (--columns), without that one."
    )


class Tars:
    """Tar files of about one size, numbered."""

    def __init__(self, folder: Path, shard_size: int) -> None:
        self.folder, self.shard_size, self.count, self.samples = folder, shard_size, 0, 0
        self._tar: tarfile.TarFile | None = None

    def add(self, key: str, files: dict[str, bytes]) -> None:
        size = sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for data in files.values())
        if self._tar is not None and self._tar.offset + size > self.shard_size:
            self.close()
        if self._tar is None:
            self._tar = tarfile.open(self.folder / SHARD_NAME.format(self.count), "w", format=tarfile.GNU_FORMAT)
            self.count += 1
        for extension, data in files.items():
            header = tarfile.TarInfo(f"{key}.{extension}")  # as it comes: no time, no user, rights 644
            header.size = len(data)
            self._tar.addfile(header, io.BytesIO(data))
        self.samples += 1

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
