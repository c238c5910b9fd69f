"""Quantizers of equal bits side by side, on latents and on the audio that is decoded from them.

Shapes: N vectors, D dimensions, M steps.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiotok import AudioTokenizer, QinCodecModel
from audiotok.metrics import mel_distance
from audiotok.quantizers.successive import SuccessiveQuantizer
from audiotok.recipes.evaluation_report import Table
from audiotok.recipes.training.latent_store import clip_latents

Clips = Sequence[np.ndarray]
Bar = Callable[[list[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Contender:
    """A quantizer with one way of searching it.

    Attributes:
        name: for tables.
        search: keywords of `encode`.
    """

    name: str
    quantizer: SuccessiveQuantizer
    search: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """A contender at one rate.

    Attributes:
        codes: a frame.
        mse_per_step: `[codes]`, mean squared error of the latents after each step of an encoding that ends there.
        snr_db: of the latents, after the last step.
        mel: mel distance of the decoded audio, mean over clips.
        encode_ms: processor time of the search (on a CPU; else time), for a second of audio.
    """

    contender: str
    codes: int
    kilobits: float
    mse_per_step: list[float]
    snr_db: float
    mel: float
    encode_ms: float


@dataclass
class Comparison:
    """All outcomes, and what they are measured against.

    Attributes:
        clips, seconds: of the test set. vectors: latents in it. variance: of these, mean over dimensions.
        encoder_ms: processor time of the encoder, for a second of audio.
        continuous_mel: mel distance of audio from latents that are not quantized: no quantizer can pass it.
        own: the wrapped codec's own codes: its name, kilobits a second, and mel distance; None if there are none.
    """

    clips: int
    seconds: float
    vectors: int
    variance: float
    encoder_ms: float
    continuous_mel: float
    own: tuple[str, float, float] | None = None
    outcomes: list[Outcome] = field(default_factory=list)


@torch.inference_mode()
def compare_quantizers(
    codec: QinCodecModel,
    contenders: Sequence[Contender],
    rates: Sequence[int],
    clips: Clips,
    source: AudioTokenizer | None,
    bar: Bar,
) -> Comparison:
    """Every contender at every rate.

    Args:
        codec: whose autoencoder makes and decodes the latents; its own quantizer is not asked.
        rates: codes a frame.
        clips: mono `[samples]` float32 at the codec's rate, that no quantizer was fitted to.
        source: the tokenizer whose autoencoder this is, to compare with its own codes; None if it has none.
    """
    seconds = sum(map(len, clips)) / codec.facts.sampling_rate
    began = _now(codec)
    latents = [torch.from_numpy(clip_latents(codec, clip)) for clip in clips]
    encoder_ms = 1000 * (_now(codec) - began) / seconds
    vectors = torch.cat(latents)
    variance = float((vectors - vectors.mean(dim=0)).square().mean())
    found = Comparison(len(clips), seconds, len(vectors), variance, encoder_ms, _mel(codec, clips, latents))
    if source is not None:
        found.own = _own_codes(source, clips)
    for contender, codes in bar([(c, n) for c in contenders for n in rates], "comparing"):
        began = _now(codec)
        chosen = contender.quantizer.encode(vectors, **contender.search, num_quantizers=codes)
        spent = _now(codec) - began
        steps = contender.quantizer.decode_steps(chosen).cpu()
        errors = [float((step - vectors).square().mean()) for step in steps]
        kilobits = codes * np.log2(contender.quantizer.codebook_size) * float(codec.facts.frame_rate) / 1000
        found.outcomes.append(
            Outcome(
                contender=contender.name,
                codes=codes,
                kilobits=float(kilobits),
                mse_per_step=errors,
                snr_db=float(10 * np.log10(variance / errors[-1])),
                mel=_mel(codec, clips, steps[-1].split([len(part) for part in latents])),
                encode_ms=1000 * spent / seconds,
            )
        )
    return found


def _now(codec: QinCodecModel) -> float:
    """Seconds: of processor time, which other programs do not slow down, or where a device works, of time."""
    if codec.device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def _mel(codec: QinCodecModel, clips: Clips, latents: Iterable[Tensor]) -> float:
    """Mean mel distance of audio decoded from latents `[F, D]` of each clip."""
    rate, distances = codec.facts.output_sampling_rate, []
    for clip, vectors in zip(clips, latents, strict=True):
        audio = codec.decode_latents(vectors.T[None].to(codec.device), [len(clip)])
        distances.append(mel_distance(clip, audio[0, 0].float().cpu().numpy(), rate))
    return float(np.mean(distances))


def _own_codes(source: AudioTokenizer, clips: Clips) -> tuple[str, float, float]:
    rate, distances = source.sampling_rate, []
    for clip, encoded in zip(clips, source.encode_audio(list(clips), rate), strict=True):
        ids = source.codes_to_ids(encoded.codes, encoded.depths)
        distances.append(mel_distance(clip, source.decode(ids, length=len(clip))[0].numpy(), rate))
    return source.name_or_path, source.codec.facts.bits_per_second() / 1000, float(np.mean(distances))


# For people


def rate_table(found: Comparison) -> Table:
    """One row a contender and rate, between what cannot be passed and the source's own codes."""
    rows = [["not quantized", "–", "–", "–", "–", f"{found.continuous_mel:.4f}", "–"]]
    if found.own is not None:
        name, kilobits, mel = found.own
        rows.append([f"{name}, its own codes", "–", f"{kilobits:.2f}", "–", "–", f"{mel:.4f}", "–"])
    for one in sorted(found.outcomes, key=lambda outcome: outcome.codes):
        error = f"{one.mse_per_step[-1] / found.variance:.5f}"
        rows.append(
            [
                one.contender,
                str(one.codes),
                f"{one.kilobits:.2f}",
                error,
                f"{one.snr_db:.2f}",
                f"{one.mel:.4f}",
                f"{one.encode_ms:.2f}",
            ]
        )
    header = "quantizer|codes|kb/s|error / variance|SNR, dB|mel distance|search, ms/s"
    clips = f"Held-out clips: {found.clips}, {found.seconds / 60:.1f} minutes"
    title = f"{clips}. Before the search the encoder takes {found.encoder_ms:.1f} ms/s"
    return Table(title, header.split("|"), rows)


def step_table(found: Comparison) -> Table:
    """The error after each step of the longest encodings, as a share of the variance."""
    most = max(outcome.codes for outcome in found.outcomes)
    rows = [
        [one.contender, *(f"{error / found.variance:.4f}" for error in one.mse_per_step)]
        for one in found.outcomes
        if one.codes == most
    ]
    title = f"Mean squared error after each step of an encoding to {most} codes, as a share of the variance"
    return Table(title, ["quantizer", *(str(step + 1) for step in range(most))], rows)


def curve_csv(found: Comparison) -> str:
    """The numbers behind `rate_table` and the right half of `draw`, a line each; what does not apply is empty."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["quantizer", "codes", "kilobits", "mse", "snr_db", "mel_distance", "search_ms_per_s"])
    lines.writerow(["not quantized", "", "", "", "", found.continuous_mel, ""])
    if found.own is not None:
        name, kilobits, mel = found.own
        lines.writerow([f"{name}, its own codes", "", kilobits, "", "", mel, ""])
    for one in found.outcomes:
        lines.writerow(
            [one.contender, one.codes, one.kilobits, one.mse_per_step[-1], one.snr_db, one.mel, one.encode_ms]
        )
    return text.getvalue()


def draw(found: Comparison, path: Path) -> None:
    """SNR of the latents after each step of the longest encodings, and mel distance over rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    most = max(outcome.codes for outcome in found.outcomes)
    for name in dict.fromkeys(outcome.contender for outcome in found.outcomes):
        mine = sorted((o for o in found.outcomes if o.contender == name), key=lambda outcome: outcome.codes)
        errors = next(outcome.mse_per_step for outcome in mine if outcome.codes == most)
        left.plot(range(1, most + 1), 10 * np.log10(found.variance / np.array(errors)), marker="o", label=name)
        right.plot([o.kilobits for o in mine], [o.mel for o in mine], marker="o", label=name)
    left.set(xlabel=f"step of an encoding to {most} codes", ylabel="SNR of latents, dB", title="Held-out latents")
    left.xaxis.get_major_locator().set_params(integer=True)
    right.axhline(found.continuous_mel, color="grey", linestyle=":", label="not quantized")
    if found.own is not None:
        right.plot([found.own[1]], [found.own[2]], marker="*", linestyle="", color="black", label=found.own[0])
    right.set(xlabel="kb/s", ylabel="mel distance", title="Decoded audio (lower is better)")
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)
