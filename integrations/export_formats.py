"""Exporting a corpus for a trainer: the table of formats, and what all of them share.

Whatever the format, an export is a folder that appears whole or not at all, with an `export.json` that says which
tokenizer and layout its ids are of. Documents come in the order of shards and rows, which is that of a hash of the
clips' ids, or in a drawn one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audiotok import __version__
from audiotok.errors import (
    CodesError,
    OptionError,
    OutputExistsError,
    OutputNotWritableError,
    check_choice,
    check_number,
)
from audiotok.integrations.corpus_reading import CODES, Corpus
from audiotok.integrations.corpus_storage import writing
from audiotok.integrations.export_arrow import write_arrow
from audiotok.integrations.export_ids import Documents, Watch, unwatched
from audiotok.integrations.export_megatron import check_one_dimension, write_megatron
from audiotok.integrations.export_memmap import write_memmap
from audiotok.integrations.export_webdataset import check_array, write_webdataset

SIDECAR, SIDECAR_FORMAT = "export.json", 1
SHARD_SIZE = 512 << 20
# Columns that exports make.
RESERVED = ("input_ids", "piece", "audio_length")


@dataclass(frozen=True)
class Format:
    """A format of exports.

    Attributes:
        about: what it is for, in a line.
        write: `(documents, folder, as_codes, shard_size)` → what export.json says of the files.
        check: refuses, before the work, documents that the format has no room for.
        takes_columns: the clips' other columns go along.
        takes_codes: without a layout, codes are written rather than ids.
    """

    about: str
    write: Callable[[Documents, Path, bool, int], dict[str, Any]]
    check: Callable[[Documents, bool], None] = lambda documents, as_codes: None
    takes_columns: bool = False
    takes_codes: bool = False


FORMATS: dict[str, Format] = {
    "memmap": Format(
        "one flat file of ids and offsets of documents; for TrainingWindows, nanoGPT and NumPy",
        lambda documents, folder, as_codes, shard_size: write_memmap(documents, folder),
    ),
    "megatron": Format(
        ".bin and .idx of Megatron-LM's indexed dataset",
        lambda documents, folder, as_codes, shard_size: write_megatron(documents, folder),
        lambda documents, as_codes: check_one_dimension(documents),
    ),
    "webdataset": Format(
        "tars of one sample a clip: codes, or ids of a layout",
        write_webdataset,
        check_array,
        takes_columns=True,
        takes_codes=True,
    ),
    "arrow": Format(
        "a folder for datasets.load_from_disk",
        lambda documents, folder, as_codes, shard_size: write_arrow(documents, folder, shard_size),
        takes_columns=True,
    ),
}


def export(
    corpus: str | os.PathLike[str] | Corpus,
    format: str,
    output: str | os.PathLike[str],
    *,
    layout: str | None = None,
    bos: bool = False,
    eos: bool = False,
    window: int | None = None,
    shuffle: int | None = None,
    split: str | None = None,
    columns: Sequence[str] | None = None,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    allow_unfinished: bool = False,
    watch: Watch = unwatched,
) -> dict[str, Any]:
    """Write a corpus in the format of a trainer.

    Args:
        corpus: a folder, or a URL that fsspec opens; or one that is open, then `split` and `allow_unfinished` are its.
        format: one of `FORMATS`.
        output: a folder of this machine that does not exist yet.
        layout: of the ids; None for the codec's default. For webdataset, None writes codes.
        bos, eos: `<|audio_start|>` before, `<|audio_end|>` behind each clip (1-D layouts).
        window: cut clips of more ids (steps, for a 2-D layout) than this on edges of frames; None keeps them whole.
        shuffle: a seed: shards in another order, and the clips of a row group among themselves.
        columns: that go along (webdataset, arrow), beside `id` and `audio_length`; None for those of the source.
        shard_size: bytes of a file (webdataset, arrow), about.
        overwrite: replace an export that is there.
        watch: is told how many clips of how many are done.

    Returns:
        What is in the export's `export.json`.

    Raises:
        OptionError: a format, layout or option that does not fit.
        CodesError: no corpus, without clips, or damaged.
        OutputExistsError, OutputNotWritableError: nothing is left behind.
    """
    check_choice("format", format, FORMATS)
    check_number("shard_size", shard_size, 1)
    chosen, target = FORMATS[format], _local(output)
    opened = corpus if isinstance(corpus, Corpus) else Corpus(corpus, split, allow_unfinished)
    as_codes = chosen.takes_codes and layout is None
    if as_codes and (bos or eos or window is not None):
        raise OptionError("bos, eos and window are matters of ids: choose a layout, or leave them out.")
    taken = _columns(opened, columns) if chosen.takes_columns else ()
    if columns is not None and not chosen.takes_columns:
        raise OptionError(f'The format "{format}" holds ids alone: leave columns out, or choose webdataset or arrow.')
    documents = Documents(opened, layout, bos, eos, window, shuffle, taken, watch)
    chosen.check(documents, as_codes)
    if not opened.num_clips:
        raise CodesError(f"{opened.place} has no clips: there is nothing to export.")
    with whole_folder(target, overwrite) as folder:
        sidecar = _describe(documents, format, as_codes) | chosen.write(documents, folder, as_codes, shard_size)
        (folder / SIDECAR).write_text(json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return sidecar


def _local(output: str | os.PathLike[str]) -> Path:
    if "://" in os.fspath(output):
        raise OptionError(f"{output} is a URL: export to a folder of this machine, and copy it there.")
    return Path(output).absolute()


def _columns(corpus: Corpus, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Columns that go along, the id first."""
    legal = [name for name in corpus.columns if name not in CODES]
    for name in wanted or ():
        check_choice("columns", name, legal)
    columns = tuple(dict.fromkeys(["id", *(corpus.record.columns if wanted is None else wanted)]))
    taken = [name for name in columns if name in RESERVED]
    if taken:
        raise OptionError(
            f"The column {taken[0]} has the name of one that the export makes: name those to take along, without it."
        )
    return columns


def _describe(documents: Documents, format: str, as_codes: bool) -> dict[str, Any]:
    """What export.json says, whatever the format."""
    corpus, layout, vocabulary = documents.corpus, documents.layout, documents.corpus.vocabulary
    tokenizer = {key: corpus.record.tokenizer[key] for key in ("name", "class", "fingerprint", "options", "dtype")}
    variable = corpus.facts.variable_depth
    ids = {
        "layout": layout.name,
        "vocab_size": vocabulary.size,
        "pad_token_id": vocabulary.pad_token_id,
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
        "bos": documents.bos,
        "eos": documents.eos,
        "window": documents.window,
        # Where windows may begin: every so many ids of a document, or at ids below that number.
        "frame_ids": documents.frame_ids,
        "frame_begins_below": vocabulary.codebook_sizes[0] if variable else None,
    }
    return {
        "export_format": SIDECAR_FORMAT,
        "audiotok": __version__,
        "format": format,
        "corpus": corpus.place,
        "corpus_finished": corpus.record.finished,
        "tokenizer": tokenizer,
        "codebook_sizes": list(vocabulary.codebook_sizes),
        "sampling_rate": corpus.facts.sampling_rate,
        "shuffle": documents.shuffle,
        **({} if as_codes else ids),
    }


@contextmanager
def whole_folder(target: Path, overwrite: bool) -> Generator[Path]:
    """A folder to write into, which takes its name when the block ends well and is removed when it does not.

    Raises:
        OutputExistsError: something is there that may not be replaced.
        OutputNotWritableError: no rights, no space, or its parent is missing.
    """
    _check_free(target, overwrite)
    part = target.with_name(f".{target.name}.{os.urandom(4).hex()}.part")
    old = part.with_suffix(".old")
    with writing(target):
        try:
            part.mkdir()
            yield part
            _flush(part)
            _check_free(target, overwrite)
            if target.exists():
                os.rename(target, old)
            os.rename(part, target)
        finally:
            if old.exists() and not target.exists():
                os.rename(old, target)
            for left in (part, old):
                shutil.rmtree(left, ignore_errors=True)


def _check_free(target: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise OutputNotWritableError(f"{target.parent} is no folder: make it first, or choose another place.")
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / SIDECAR).is_file():
        raise OutputExistsError(f"{target} exists and is no export (it has no {SIDECAR}): choose another folder.")
    if not overwrite:
        raise OutputExistsError(f"{target} exists: choose another folder, or replace it with --overwrite.")


def _flush(folder: Path) -> None:
    """A name must not outlive, in a crash, what it stands for."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
