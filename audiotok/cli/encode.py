"""`audiotok encode`: recordings → codes.parquet or ids.txt."""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audiotok.cli import options as cli
from audiotok.cli.loading import load_tokenizer
from audiotok.cli.options import DEFAULT_TOKENIZER
from audiotok.cli.outputs import check_free, standard_output, whole_file
from audiotok.cli.reporting import Meter, Report, counted, seconds_done
from audiotok.errors import AudioInputError, OptionError

if TYPE_CHECKING:
    from audiotok.encoding import ClipCodes, ClipEncoder, Watch
    from audiotok.tokenizer import AudioTokenizer

STDIN = STDOUT = "-"
EXAMPLES = """\b
Examples:
  audiotok encode talk.flac                            ids on the terminal
  audiotok encode *.wav -o codes.parquet               codes of many recordings
  audiotok encode song.mp3 --downmix mean -o ids.txt   a stereo recording
  cat talk.wav | audiotok encode - | audiotok decode - -o - > back.wav

\b
codes.parquet has one row a clip: id (the file's name), codes (frame by frame, coarse to fine, in no layout),
num_frames, audio_length (samples at the codec's rate), duration (seconds); and depths for codecs that vary it.
ids.txt has one line a clip, behind a header line "# audiotok ids {...}" that names the tokenizer, the layout and
the fingerprint:  NAME <tab> AUDIO LENGTH <tab> IDS, with "|" between the streams of a 2-D layout.

\b
A recording that cannot be used is reported, the others go on, and the exit code is 3.
"""


def encode(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE", help="Recordings (wav, flac, ogg, mp3, ...); - is one on stdin.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="codes.parquet, ids.txt, or - for ids on stdout.")
    ] = "-",
    tokenizer: cli.Tokenizer = DEFAULT_TOKENIZER,
    layout: cli.Layout = None,
    domain: cli.Domain = None,
    option: cli.Options = None,
    chunk_length_s: cli.ChunkLength = None,
    context_s: cli.Context = None,
    downmix: cli.Downmix = None,
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", help="Clips encoded at once; codes do not depend on it. Default: 1 on a CPU."),
    ] = None,
    device: cli.Device = None,
    overwrite: cli.Overwrite = False,
    as_json: cli.AsJson = False,
    quiet: cli.Quiet = False,
) -> None:
    """Recordings to codes or ids."""
    report = Report(quiet, as_json)
    named = name_clips(files)
    _check_output(output, overwrite)
    wanted = cli.codec_options(option, domain, chunk_length_s, context_s)
    with report.progress(shares_terminal=output == STDOUT) as meter:
        tok = load_tokenizer(tokenizer, layout, device, wanted)
        progress = _Progress(meter, report, len(files), tok.sampling_rate)
        found = encode_files(tok.encoder(batch_size), named, cli.parse_downmix(downmix), report, progress)
        clips = []
        with _open_sink(output, tok, overwrite, as_json) as sink:
            for clip_id, clip in found:
                clips.append(sink(clip_id, clip))
                progress.finished()
            if not clips:  # leaves the block by an exception, without a file of nothing
                report.finish()
    _tell(report, tok, output, len(files), clips)
    report.finish()


def name_clips(files: Sequence[str]) -> dict[str, str]:
    """Clip id → path. Ids are file names; where recordings lie in several folders, with the part of the path in
    which they differ. "-" has the id "stdin"."""
    if STDIN in files:
        if len(files) > 1:
            raise typer.BadParameter("- (stdin) must be the only recording.", param_hint="FILE")
        return {"stdin": STDIN}
    paths = [os.path.abspath(file) for file in files]
    path, count = Counter(paths).most_common(1)[0]
    if count > 1:
        raise typer.BadParameter(f"{path} is given {count} times.", param_hint="FILE")
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    ids = (os.fsencode(os.path.relpath(path, common)).decode(errors="backslashreplace") for path in paths)
    return dict(zip(ids, files, strict=True))


def encode_files(
    encoder: ClipEncoder, files: dict[str, str], downmix: Any, report: Report, progress: _Progress
) -> Iterator[tuple[str, ClipCodes]]:
    """Codes of each recording, in order; those that cannot be used are reported and left out.

    Args:
        files: clip id → path, or "-".
    """
    from audiotok.encoding import POOL_BATCHES

    names = iter(files)
    size = encoder.batch_size * (POOL_BATCHES if encoder.batch_size > 1 else 1)
    while group := list(itertools.islice(names, size)):
        try:
            sources = [as_source(files[name]) for name in group]
            clips = list(encoder.encode(sources, downmix=downmix, watch=progress.among(group)))
        except AudioInputError as error:
            if len(group) == 1:
                report.failed(group[0], error)
                continue
            for name in group:  # one by one, to find the bad ones; the codes are those of the batch
                yield from encode_files(encoder, {name: files[name]}, downmix, report, progress)
        else:
            yield from zip(group, clips, strict=True)


class _Progress:
    """Shows on one line which recording is being encoded, how far it is, and the share of all that is done."""

    def __init__(self, meter: Meter, report: Report, num_files: int, sampling_rate: int) -> None:
        self._meter, self._report, self._num_files, self._rate = meter, report, num_files, sampling_rate
        self._num_encoded = 0
        meter.begin("encoding", num_files if num_files > 1 else None)

    def among(self, clip_ids: Sequence[str]) -> Watch:
        """What an encoder of these recordings tells how far it is."""
        return lambda place, done, total: self._show(clip_ids[place], done, total)

    def finished(self) -> None:
        """One more recording is encoded."""
        self._num_encoded += 1
        self._meter.update(self._num_finished)

    @property
    def _num_finished(self) -> int:
        return self._num_encoded + len(self._report.failures)

    def _show(self, clip_id: str, done: int, total: int | None) -> None:
        seconds = seconds_done(clip_id, done / self._rate, None if total is None else total / self._rate)
        if done and total:  # not where a recording is encoded whole, or its length is unknown
            self._meter.update(self._num_finished + min(done / total, 1), seconds, self._num_files)
        else:
            self._meter.update(self._num_finished, seconds)


def as_source(path: str) -> Any:
    """What `load_audio` takes for a path, or for "-"."""
    return sys.stdin.buffer if path == STDIN else path


def _check_output(output: str, overwrite: bool) -> None:
    """Before the work, not after it."""
    if output == STDOUT:
        return
    if Path(output).suffix.lower() not in (".parquet", ".txt"):
        raise OptionError(
            f"--output {output!r} is not legal: its name must end in .parquet (codes) or .txt (ids); or - for ids on "
            "stdout."
        )
    check_free(Path(output), overwrite)


@contextmanager
def _open_sink(
    output: str, tokenizer: AudioTokenizer, overwrite: bool, as_json: bool
) -> Generator[Callable[[str, ClipCodes], dict[str, Any]]]:
    """Writes a clip where it belongs and gives what JSON says of it: on stdout that includes the ids."""
    from audiotok.cli.codes_file import CodesWriter
    from audiotok.cli.ids_file import IdsWriter

    if output == STDOUT and as_json:
        yield lambda clip_id, clip: _summary(clip_id, clip, tokenizer) | {"ids": _ids(clip, tokenizer)}
        return
    with nullcontext(standard_output()) if output == STDOUT else whole_file(Path(output), overwrite) as file:
        is_parquet = Path(output).suffix.lower() == ".parquet"
        writer = CodesWriter(file, tokenizer) if is_parquet else IdsWriter(file, tokenizer)

        def write(clip_id: str, clip: ClipCodes) -> dict[str, Any]:
            writer.write(clip_id, clip)
            return _summary(clip_id, clip, tokenizer)

        try:
            yield write
        finally:
            writer.close()  # also where the file will be thrown away: Arrow would write into it later


def _summary(clip_id: str, clip: ClipCodes, tokenizer: AudioTokenizer) -> dict[str, Any]:
    facts = tokenizer.codec.facts
    return {
        "id": clip_id,
        "num_frames": clip.codes[0].shape[-1] * facts.codebook_strides[0],
        "audio_length": clip.audio_length,
        "duration": clip.audio_length / facts.sampling_rate,
    }


def _ids(clip: ClipCodes, tokenizer: AudioTokenizer) -> list[Any]:
    return tokenizer.codes_to_ids(clip.codes, clip.depths).tolist()


def _tell(report: Report, tokenizer: AudioTokenizer, output: str, num_files: int, clips: list[dict[str, Any]]) -> None:
    if output != STDOUT or report.failures:
        done = f"{len(clips)} of {counted(num_files, 'recording')} encoded"
        report.note(f"{done}, {sum(clip['duration'] for clip in clips):.1f} s of audio, to {output}")
    if report.as_json:
        made_by = {
            "tokenizer": tokenizer.name_or_path,
            "layout": tokenizer.layout.name,
            "fingerprint": tokenizer.fingerprint,
        }
        report.result(made_by | {"output": output, "clips": clips, "failed": report.failures})
