"""What a corpus run reads from: a list of clips, whatever it is written in.

    source = open_source("corpus.csv", audio_root="/data/clips")
    for batch in source.batches():  # id, locator, then the columns of source.schema
        ...
    with open_audio(source.open(locator), target_rate=16_000) as stream:  # any clip, in any thread, in any order
        ...

Listing touches no audio and holds a few thousand clips in memory.

    kind      what is there                                                     id of a clip
    folder    a folder, a glob (`**` too) or one file of audio                  path below the folder, with extension
    manifest  .csv .tsv .jsonl .parquet, or a folder or glob of .parquet        a column, else the path as written
    dataset   `datasets.Dataset`, a folder of `save_to_disk`, owner/name        a column, else the path, else the row
    tar       .tar, or a folder or glob of .tar, as WebDataset writes them      tar/key

In a folder with audio and Parquet the audio is meant; audio beside tars is refused as ambiguous.

All but the third are read over fsspec URLs as well (`s3://`, `gs://`, `hf://`, `memory://`).
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from audiotok.errors import AudioFileNotFoundError, AudioInputError, AudioTokError, OptionError, did_you_mean

if TYPE_CHECKING:
    import datasets

    from audiotok.integrations.source_files import FileList
    from audiotok.integrations.source_storage import Files

LEGAL_KINDS = (
    "Legal are a folder or glob of audio files, a manifest (.csv, .tsv, .jsonl, .parquet), a dataset (save_to_disk, "
    "or owner/name on the hub) and WebDataset .tar files."
)
# What a tokenized corpus writes itself, and what a batch is made of.
RESERVED_COLUMNS = ("id", "codes", "depths", "num_frames", "audio_length", "duration", "scales", "locator")
AUDIO_COLUMNS = ("audio", "path", "audio_path", "audio_filepath", "file", "wav", "filename", "file_name")
ID_COLUMNS = ("id", "key", "utt_id", "utterance_id", "clip_id")
BATCH_CLIPS = 4096


class Source(ABC):
    """A list of clips. It pickles, and its methods may run in several threads at once.

    Attributes:
        kind: "folder", "manifest", "dataset" or "tar".
        schema: the columns that pass through, with the types that they have in the source; neither id nor audio.
            Every batch has exactly these.
    """

    kind: ClassVar[str]
    schema: pa.Schema

    @abstractmethod
    def batches(self) -> Iterator[pa.RecordBatch]:
        """The clips in a fixed order, some thousands a batch, without touching audio.

        Columns: `id` (string), `locator` (string, or int64 row number: opaque, for `open` and `where` of this
        source or of one opened alike), then those of `schema`. Ids are never null or empty; that no two are equal
        is not checked.

        Raises:
            AudioInputError: an entry cannot be used; the message says which.
        """

    @abstractmethod
    def open(self, locator: Any) -> Any:
        """One clip, as `audiotok.audio.open_audio` takes it: a path, bytes, a binary file object that needs no
        closing, or {"array", "sampling_rate"}.

        Raises:
            AudioInputError: it is not there, may not be read, or is none of this source.
        """

    @abstractmethod
    def where(self, locator: Any) -> str:
        """The clip's place for messages: "corpus.csv, line 18", "shard-3.tar: 0007.flac", "row 12 of DIR"."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """For provenance, as JSON: `kind`, `path` (or `name`), what was chosen, `columns` with their types."""


@dataclass(frozen=True)
class SourceOptions:
    """The keywords of `open_source`."""

    audio_column: str | None = None
    id_column: str | None = None
    columns: tuple[str, ...] | None = None
    split: str | None = None
    audio_root: str | None = None

    def refuse(self, kind: str, **reasons: str) -> None:
        """Raise `OptionError` if one of these options, which mean nothing for this kind, was given."""
        for option, reason in reasons.items():
            if getattr(self, option) is not None:
                raise OptionError(f"{option}={getattr(self, option)!r} is not legal for a source of {kind}: {reason}.")

    def chosen(self) -> dict[str, Any]:
        """What was given, for `describe`; `columns` are told by the schema."""
        names = ("audio_column", "id_column", "split", "audio_root")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def open_source(
    source: str | os.PathLike[str] | datasets.Dataset,
    *,
    audio_column: str | None = None,
    id_column: str | None = None,
    columns: Sequence[str] | None = None,
    split: str | None = None,
    audio_root: str | os.PathLike[str] | None = None,
) -> Source:
    """The clips of a folder, glob, manifest, dataset or of WebDataset tars; what is there decides which.

    Args:
        source: a path, a glob, a URL that fsspec opens, `owner/name` of a dataset on the hub (where no path of that
            name exists), or a `datasets.Dataset` (a DatasetDict with `split`).
        audio_column: of a manifest or dataset; None takes its `Audio` feature, else the first of audio, path,
            audio_path, audio_filepath, file, wav, filename, file_name that exists. Of tars: the extension of the audio
            members, where a sample has several.
        id_column: None takes the first of id, key, utt_id, utterance_id, clip_id that exists, else the path as
            written, else (Parquet and datasets) the number of the row.
        columns: those that pass through. None: all but id, audio and columns of media bytes; []: none.
        split: of a manifest with a column `split`, only rows that say so; of a DatasetDict or the hub, the part.
        audio_root: the folder (or URL) that paths of a manifest or dataset are relative to; if a file is not there,
            they are relative to the manifest's own folder. It allows paths that are absolute or leave the
            manifest's folder if they stay inside `audio_root`; "/" allows every path.

    Raises:
        AudioFileNotFoundError: there is nothing of that name.
        AudioInputError: what is there is no source, or is damaged.
        OptionError: an option is not legal for what is there.
        MissingDependencyError: the URL needs a package that is not installed.
    """
    if isinstance(columns, str):
        raise OptionError(f"columns={columns!r} is not legal: give a list of names, [{columns!r}].")
    options = SourceOptions(
        audio_column, id_column, None if columns is None else tuple(columns), split, _root_name(audio_root)
    )
    if isinstance(source, str | os.PathLike):
        return _open_name(os.fspath(source), options)
    from audiotok.integrations.source_datasets import open_dataset

    return open_dataset(source, options)


def _root_name(audio_root: str | os.PathLike[str] | None) -> str | None:
    return None if audio_root is None else os.fspath(audio_root)


def _open_name(name: str, options: SourceOptions) -> Source:
    from audiotok.integrations.source_files import FileList
    from audiotok.integrations.source_storage import locate

    if not isinstance(name, str) or not name:
        raise OptionError(f"source={name!r} is not legal. {LEGAL_KINDS}")
    files, path = locate(name)
    if files.is_folder(path):
        if any(all(files.is_file(f"{path}/{mark}") for mark in marks) for marks in _SAVED_DATASET):
            return _open_saved(files, path, name, options)
        return _open_list(FileList.of_folder(files, path, name), options)
    if files.is_file(path):
        return _open_file(files, path, name, options)
    if re.search(r"[*?[]", path):
        return _open_list(FileList.of_glob(files, path, name), options)
    if files.is_local and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        from audiotok.integrations.source_datasets import open_hub

        return open_hub(name, options)
    raise AudioFileNotFoundError(f"{name} does not exist. {LEGAL_KINDS}")


_COMPRESSED = ("gz", "tgz", "bz2", "xz", "zst", "zip", "7z")
# What `save_to_disk` writes beside a Dataset and a DatasetDict.
_SAVED_DATASET = (("state.json", "dataset_info.json"), ("dataset_dict.json",))


def _open_saved(files: Files, path: str, name: str, options: SourceOptions) -> Source:
    from audiotok.integrations.source_datasets import open_saved

    if not files.is_local:
        raise AudioInputError(f"{name} is a folder of save_to_disk, which is read in place: copy it here first.")
    return open_saved(path, name, options)


def _open_file(files: Files, path: str, name: str, options: SourceOptions) -> Source:
    from audiotok.integrations.source_files import AUDIO_EXTENSIONS, FileList, extension
    from audiotok.integrations.source_manifests import JSON_EXTENSIONS, CsvSource, JsonSource

    suffix = extension(path)
    if suffix in ("csv", "tsv"):
        return CsvSource(files, path, name, options)
    if suffix in JSON_EXTENSIONS:
        return JsonSource(files, path, name, options)
    if suffix in AUDIO_EXTENSIONS or suffix in ("parquet", "tar"):
        return _open_list(FileList.of_file(files, path, name), options)
    if suffix in _COMPRESSED:
        raise AudioInputError(f"{name} is compressed, so nothing in it can be read at its place: decompress it first.")
    raise AudioInputError(f'{name} is a file with the extension "{suffix}", which says nothing of clips. {LEGAL_KINDS}')


def _open_list(files: FileList, options: SourceOptions) -> Source:
    from audiotok.integrations.source_files import FolderSource, kind_of
    from audiotok.integrations.source_parquet import ParquetSource
    from audiotok.integrations.source_tars import TarSource

    makers = {"audio": FolderSource, "parquet": ParquetSource, "tar": TarSource}
    return makers[kind_of(files)](files, options)


# What the kinds share


def find_audio_column(names: Sequence[str], options: SourceOptions, where: str) -> str | None:
    """The column that was asked for, else the first of the usual names; None if there is none."""
    if options.audio_column is not None:
        return _asked("audio_column", options.audio_column, names, where)
    return next((name for name in AUDIO_COLUMNS if name in names), None)


def no_audio_column(names: Sequence[str], where: str) -> OptionError:
    """The error, to be raised, where no column could be found."""
    return OptionError(
        f"{where} has none of the columns {', '.join(AUDIO_COLUMNS)}: name the one with the audio, audio_column=..., "
        f"out of {_listed(names)}."
    )


def find_id_column(names: Sequence[str], options: SourceOptions, where: str) -> str | None:
    """As `find_audio_column`, for ids."""
    if options.id_column is not None:
        return _asked("id_column", options.id_column, names, where)
    return next((name for name in ID_COLUMNS if name in names), None)


def find_split_column(names: Sequence[str], options: SourceOptions, where: str) -> str | None:
    """`split`, if a split was asked for."""
    if options.split is None:
        return None
    if "split" not in names:
        raise OptionError(
            f'split={options.split!r} needs a column "split", which {where} has not ({_listed(names)}): leave it out, '
            "or name the files of the split by a glob."
        )
    return "split"


def choose_columns(
    names: Sequence[str], options: SourceOptions, where: str, used: Iterable[str | None], media: Iterable[str] = ()
) -> list[str]:
    """The columns that pass through.

    Args:
        names: all columns of the source.
        used: those for id and audio.
        media: those that hold recordings, pictures or the like: only by name.

    Raises:
        OptionError: a name is unknown, doubled, or one that the corpus writes itself.
    """
    legal = [name for name in names if name not in set(used)]
    chosen = list(options.columns) if options.columns is not None else [name for name in legal if name not in media]
    for name in chosen:
        if name not in legal:
            raise OptionError(
                f'columns: {where} has no column "{name}" to pass through: choose among '
                f"{_listed(legal)}.{did_you_mean(name, legal)}"
            )
        if chosen.count(name) > 1:
            raise OptionError(f'columns: "{name}" is named twice: name each column once.')
    clash = [name for name in chosen if name in RESERVED_COLUMNS]
    if clash:
        rest = [name for name in chosen if name not in clash]
        raise OptionError(
            f'{where} has the column "{clash[0]}", which a tokenized corpus writes itself: rename it in the source, or '
            f"leave it out, columns={rest!r}."
        )
    return chosen


def no_clips(where: str, options: SourceOptions, splits: Iterable[str]) -> AudioTokError:
    """The error, to be raised, for a source without clips, or without clips of the split that was asked for."""
    if found := ", ".join(splits):
        return OptionError(f"split={options.split!r} is in no row of {where}: there are {found}.")
    return AudioInputError(f"{where} lists no clips: it has no rows.")


def clip_batch(ids: pa.Array, locators: pa.Array, columns: Sequence[pa.Array], schema: pa.Schema) -> pa.RecordBatch:
    """One batch of `Source.batches`."""
    fields = [pa.field("id", pa.string()), pa.field("locator", locators.type), *schema]
    return pa.RecordBatch.from_arrays([ids, locators, *columns], schema=pa.schema(fields))


def described(schema: pa.Schema) -> dict[str, str]:
    """The columns and their types, for `Source.describe`."""
    return {field.name: str(field.type) for field in schema}


def _asked(option: str, name: str, names: Sequence[str], where: str) -> str:
    if name not in names:
        raise OptionError(
            f"{option}={name!r} is no column of {where}: choose among {_listed(names)}.{did_you_mean(name, names)}"
        )
    return name


def _listed(names: Sequence[str], limit: int = 30) -> str:
    """The names, or as many as fit into a sentence."""
    shown = ", ".join(names[:limit]) or "no others"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
