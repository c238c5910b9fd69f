"""`audiotok decode`: codes.parquet, ids.txt or a corpus → recordings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audiotok.cli import options as cli
from audiotok.cli.clip_files import StoredClip, open_clips
from audiotok.cli.loading import TokenizerShelf
from audiotok.cli.outputs import AUDIO_FORMATS, ClipNames, check_free, is_folder_name, new_folder, standard_output
from audiotok.cli.reporting import Meter, Report, counted, seconds_done
from audiotok.errors import CodesError, OptionError, TokenError, check_choice

if TYPE_CHECKING:
    from audiotok.tokenizer import AudioTokenizer

EXAMPLES = """\b
Examples:
  audiotok decode codes.parquet -o talk.flac          one clip
  audiotok decode codes.parquet -o decoded/           many clips, named as they were
  audiotok decode ids.txt -o decoded --format ogg
  audiotok decode corpus/ --id talks/7.flac -o 7.wav  a clip of a corpus
  audiotok decode - -o - < ids.txt > talk.wav         pipes
  audiotok decode hour.parquet -o hour.flac --chunk-length-s 30 --context-s 5     a codec that attends over the clip
  echo "17 4 2001" | audiotok decode - -t audiotok/auv-mini -o sound.wav

\b
The files name the tokenizer that made them, and its fingerprint is checked: ids of another one are refused.
Lines of ids alone, without name and header, are decoded with the tokenizer that --tokenizer names.
A clip that cannot be decoded is reported, the others go on, and the exit code is 4.
Windows bound the memory; where the codec attends over the whole clip they change the sound, elsewhere they come unasked
and change nothing.
"""


def decode(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE", help="codes.parquet, ids.txt or a folder of `audiotok tokenize`; - is ids on stdin."
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="PLACE",
            help="A file (.wav, .flac, .ogg) for one clip, a folder for many (a name without a suffix, or with / at "
            "its end), or - for stdout.",
        ),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            "-t",
            metavar="NAME",
            help="Where the tokenizer is now. Default: the name that the file holds.",
            autocompletion=cli.complete_tokenizer,
        ),
    ] = None,
    id: Annotated[
        list[str] | None, typer.Option("--id", metavar="ID", help="A clip of the folder; may be repeated.")
    ] = None,
    layout: Annotated[str | None, typer.Option(metavar="NAME", help="Of ids without a header.")] = None,
    format: Annotated[
        str | None, typer.Option(metavar="NAME", help="wav, flac or ogg, for folders and stdout. Default: wav.")
    ] = None,
    chunk_length_s: cli.ChunkLength = None,
    context_s: cli.Context = None,
    force: Annotated[bool, typer.Option("--force", help="Decode what another tokenizer made.")] = False,
    device: cli.Device = None,
    overwrite: cli.Overwrite = False,
    as_json: cli.AsJson = False,
    quiet: cli.Quiet = False,
) -> None:
    """Codes or ids back to recordings."""
    report = Report(quiet, as_json)
    if format is not None:
        check_choice("--format", format, AUDIO_FORMATS)
    if as_json and output == "-":
        raise typer.BadParameter("stdout takes the sound: give a file to have --json.", param_hint="--output")
    with report.progress() as meter:
        clips = _open_all(files, id or [], TokenizerShelf(tokenizer, layout, device, force), report)
        decoder = _Decoder(report, meter, overwrite, {"chunk_length_s": chunk_length_s, "context_s": context_s})
        if output != "-" and is_folder_name(output):
            decoder.to_folder(clips, Path(output), format or "wav")
        else:
            decoder.to_one_file(clips, output, format)
    seconds = sum(clip["duration"] for clip in decoder.done)
    if output != "-" and decoder.done:
        report.note(f"{counted(len(decoder.done), 'clip')} decoded, {seconds:.1f} s of audio, to {output}")
    if as_json:
        report.result({"output": output, "clips": decoder.done, "failed": report.failures})
    report.finish()


def _open_all(
    files: list[str], wanted: list[str], shelf: TokenizerShelf, report: Report
) -> Iterator[tuple[AudioTokenizer, StoredClip]]:
    """The clips of all files, each with its tokenizer; a file that cannot be used is reported and left out."""
    for file in files:
        try:
            with open_clips(file, wanted) as found:
                tokenizer = shelf.tokenizer_for(found.origin, found.name)
                for clip in found:
                    yield tokenizer, clip
        except TokenError as error:
            report.failed(file, error)


class _Decoder:
    """Decodes clips into files.

    Attributes:
        done: what JSON says of each clip.
    """

    def __init__(self, report: Report, meter: Meter, overwrite: bool, windows: dict[str, float | None]) -> None:
        self._report, self._meter, self._overwrite, self._windows = report, meter, overwrite, windows
        self.done: list[dict[str, Any]] = []

    def to_folder(self, clips: Iterator[tuple[AudioTokenizer, StoredClip]], folder: Path, format: str) -> None:
        """A file for each clip; one that cannot be decoded is reported and left out."""
        names = ClipNames(folder, format)
        with new_folder(folder):
            for tokenizer, clip in clips:
                try:
                    path = names.path_for(clip.id)
                    with new_folder(path.parent):
                        check_free(path, self._overwrite)
                        self._decode(tokenizer, clip, path, format)
                except TokenError as error:
                    self._report.failed(clip.id, error)

    def to_one_file(self, clips: Iterator[tuple[AudioTokenizer, StoredClip]], output: str, format: str | None) -> None:
        """The only clip into a file, or to stdout.

        Raises:
            CodesError: there is none, or more than one.
        """
        if output != "-":
            _check_suffix(output, format)
            check_free(Path(output), self._overwrite)
        first_two = list(itertools.islice(clips, 2))
        self._report.finish()
        if len(first_two) != 1:
            raise CodesError(
                "The input holds no clip."
                if not first_two
                else "The input holds several clips: give a folder, -o NAME/."
            )
        target: Any = Path(output) if output != "-" else standard_output("Sound")
        self._decode(*first_two[0], target, format or ("wav" if output == "-" else None))

    def _decode(self, tokenizer: AudioTokenizer, clip: StoredClip, target: Any, format: str | None) -> None:
        """Piece by piece: hours of audio need no more memory than a window."""
        from audiotok.audio import AudioWriter

        facts = tokenizer.codec.facts
        rate = facts.output_sampling_rate
        seconds = None if clip.audio_length is None else facts.output_length(clip.audio_length) / rate
        self._meter.begin(clip.id, seconds)
        pieces = tokenizer.decode_blocks(clip.ids(tokenizer), clip.audio_length, **self._windows)
        first = next(pieces, None)
        if first is None:
            raise CodesError(f"The clip {clip.id!r} holds no ids: give at least those of one frame.")
        with AudioWriter(target, rate, channels=facts.channels, format=format, overwrite=self._overwrite) as writer:
            for piece in itertools.chain([first], pieces):
                writer.write(piece)
                done = writer.num_samples / rate
                self._meter.update(done, seconds_done(clip.id, done, seconds))
        self.done.append(
            {
                "id": clip.id,
                "file": str(target) if isinstance(target, Path) else "-",
                "tokenizer": tokenizer.name_or_path,
                "num_samples": writer.num_samples,
                "sampling_rate": rate,
                "duration": writer.num_samples / rate,
            }
        )


def _check_suffix(output: str, format: str | None) -> None:
    suffix = Path(output).suffix.lower().removeprefix(".")
    if suffix not in AUDIO_FORMATS or format not in (None, suffix):
        raise OptionError(
            f"--output {output!r}" + (f" with --format {format}" if format else "") + " is not legal: a file ends in "
            f".{', .'.join(AUDIO_FORMATS)} and needs no --format; a folder's name ends with /."
        )
