"""`audiotok roundtrip`: a recording → ids → a recording, with scores and a picture of both."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audiotok.cli import options as cli
from audiotok.cli.encode import STDIN, as_source
from audiotok.cli.loading import load_tokenizer
from audiotok.cli.options import DEFAULT_TOKENIZER
from audiotok.cli.outputs import check_free, new_folder, whole_file
from audiotok.cli.reporting import Meter, Report, seconds_done, table

if TYPE_CHECKING:
    import numpy as np

    from audiotok.audio import Waveform
    from audiotok.encoding import ClipCodes
    from audiotok.metrics import Metrics
    from audiotok.tokenizer import AudioTokenizer

EXAMPLES = """\b
Examples:
  audiotok roundtrip talk.flac                          talk.decoded.wav, talk.metrics.json, talk.roundtrip.png
  audiotok roundtrip song.mp3 --downmix mean -o tried/
  audiotok roundtrip talk.flac -t ./my-checkpoint --json

\b
The whole recording is held in memory, for its scores and its picture.
"""


def roundtrip(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A recording (wav, flac, ogg, mp3, ...); - is stdin.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="FOLDER", help="Where the three files go.")] = ".",
    tokenizer: cli.Tokenizer = DEFAULT_TOKENIZER,
    layout: cli.Layout = None,
    domain: cli.Domain = None,
    option: cli.Options = None,
    chunk_length_s: cli.ChunkLength = None,
    context_s: cli.Context = None,
    downmix: cli.Downmix = None,
    picture: Annotated[bool, typer.Option(help="Draw waveforms, spectrograms and ids.")] = True,
    device: cli.Device = None,
    overwrite: cli.Overwrite = False,
    as_json: cli.AsJson = False,
    quiet: cli.Quiet = False,
) -> None:
    """There and back: the decoded file, scores and a picture."""
    report = Report(quiet, as_json)
    stem = "stdin" if file == STDIN else Path(file).stem
    wanted = cli.codec_options(option, domain, chunk_length_s, context_s)
    with new_folder(Path(output)) as folder, report.progress() as meter:
        files = ResultFiles.named(folder, stem, picture)
        files.check_free(overwrite)
        tok = load_tokenizer(tokenizer, layout, device, wanted)
        result = RoundTrip.of(tok, stem, as_source(file), cli.parse_downmix(downmix), meter)
        meter.begin("writing")
        files.write(result, f"{stem} through {tok.name_or_path}", overwrite)
    data = result.describe(tok) | {"input": file, "files": files.describe()}
    title = f"{stem}: {data['duration']:.2f} s, {data['num_ids']:,} ids, {data['bits_per_second']:,.0f} bits a second"
    report.result(data, table(["score", "(PESQ and STOI judge speech only)"], result.metrics.rows(), title=title))
    report.note("wrote " + ", ".join(files.describe().values()))


@dataclass(frozen=True, eq=False)
class RoundTrip:
    """A recording and what a tokenizer made of it.

    Attributes:
        original, decoded: `[C, N]` float32 at `sampling_rate`, the codec's output rate.
        sampling_rate: Hz.
        clip: the codes between.
        metrics: of the pair.
    """

    original: np.ndarray
    decoded: np.ndarray
    sampling_rate: int
    clip: ClipCodes
    metrics: Metrics

    @classmethod
    def of(
        cls,
        tok: AudioTokenizer,
        name: str,
        source: Any,
        downmix: Any,
        meter: Meter,
        metrics: Iterable[str] | None = None,
    ) -> RoundTrip:
        """Encode and decode a recording.

        Args:
            name: of the recording, for the meter, which shows how far it is.
            source, downmix: as in `load_audio`.
            metrics: names from `METRICS`; None for all.
        """
        from audiotok.audio import load_audio
        from audiotok.metrics import METRICS, compare

        facts, rate = tok.codec.facts, tok.codec.facts.output_sampling_rate
        meter.begin(f"reading {name}")
        wave = load_audio(source, target_rate=facts.sampling_rate, channels=facts.channels, downmix=downmix)
        clip = _encoded(tok, wave, meter, f"encoding {name}")
        decoded = _decoded(tok, clip, meter, f"decoding {name}")
        meter.begin(f"scoring {name}")
        original = load_audio(wave, target_rate=rate).samples
        return cls(original, decoded, rate, clip, compare(original, decoded, rate, metrics or METRICS))

    def describe(self, tok: AudioTokenizer) -> dict[str, Any]:
        """What JSON says of it."""
        facts = tok.codec.facts
        return {
            "tokenizer": tok.name_or_path,
            "layout": tok.layout.name,
            "fingerprint": tok.fingerprint,
            "num_ids": tok.codes_to_ids(self.clip.codes, self.clip.depths).shape[-1],
            "audio_length": self.clip.audio_length,
            "duration": self.clip.audio_length / facts.sampling_rate,
            "ids_per_second": float(facts.ids_per_second(tok.layout.name)),
            "bits_per_second": facts.bits_per_second(),
            "metrics": dict(self.metrics),
            "skipped": self.metrics.skipped,
        }

    def picture(self, title: str) -> bytes:
        """The figure as PNG."""
        from audiotok.cli.pictures import roundtrip_figure

        figure = roundtrip_figure(self.original, self.decoded, self.sampling_rate, self.clip.codes, title)
        png = io.BytesIO()
        figure.savefig(png, format="png")
        return png.getvalue()


def _encoded(tok: AudioTokenizer, wave: Waveform, meter: Meter, step: str) -> ClipCodes:
    """The codes of a recording at the codec's rate."""
    meter.begin(step)

    def watch(place: int, done: int, total: int | None) -> None:
        if done:  # a recording that is encoded whole has no share
            seconds = done / wave.sampling_rate
            meter.update(seconds, seconds_done(step, seconds, wave.duration), wave.duration)

    (clip,) = tok.encoder().encode([wave], watch=watch)
    return clip


def _decoded(tok: AudioTokenizer, clip: ClipCodes, meter: Meter, step: str) -> np.ndarray:
    """`[C, N]`, the clip's samples at the codec's output rate."""
    import numpy as np

    facts = tok.codec.facts
    rate = facts.output_sampling_rate
    duration, pieces, done = facts.output_length(clip.audio_length) / rate, [], 0.0
    meter.begin(step, duration)
    for piece in tok.decode_blocks(tok.codes_to_ids(clip.codes, clip.depths), clip.audio_length):
        pieces.append(piece.numpy())
        done += piece.shape[1] / rate
        meter.update(done, seconds_done(step, done, duration))
    return np.concatenate(pieces, axis=1)


@dataclass(frozen=True)
class ResultFiles:
    """Names of the files of a round trip."""

    audio: Path
    metrics: Path
    picture: Path | None

    @classmethod
    def named(cls, folder: Path, stem: str, picture: bool = True) -> ResultFiles:
        return cls(
            folder / f"{stem}.decoded.wav",
            folder / f"{stem}.metrics.json",
            folder / f"{stem}.roundtrip.png" if picture else None,
        )

    def describe(self) -> dict[str, str]:
        return {name: str(path) for name, path in vars(self).items() if path is not None}

    def check_free(self, overwrite: bool) -> None:
        for path in self.describe().values():
            check_free(Path(path), overwrite)

    def write(self, result: RoundTrip, title: str, overwrite: bool) -> None:
        """All of them; what can fail for another reason than the disk is done before the first."""
        from audiotok.audio import save_audio

        scores = {"metrics": dict(result.metrics), "skipped": result.metrics.skipped}
        contents = {self.metrics: json.dumps(scores, indent=2, allow_nan=False).encode() + b"\n"}
        if self.picture is not None:
            contents[self.picture] = result.picture(title)
        save_audio(self.audio, result.decoded, result.sampling_rate, overwrite=overwrite)
        for path, content in contents.items():
            with whole_file(path, overwrite) as file:
                file.write(content)
