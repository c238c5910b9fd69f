"""What the benchmark measures: codecs beside a plain rival, layouts beside a memory copy, memory, precision.

Rivals run in turn (A B B A ...) in one process, so that a machine that is busy with something else slows both, and
medians are kept. Times are wall seconds with CPU seconds beside them; layouts count CPU seconds alone.
"""

from __future__ import annotations

import copy
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiotok import AudioCodec, AudioTokenizer, AudioVocabulary, AuvModel
from audiotok.codec import CodecOutput
from audiotok.encoding import ClipCodes
from audiotok.layouts import get_layout
from audiotok.recipes.benchmark_models import Waveform, load_tokenizer, synthetic_clips
from audiotok.recipes.plain import PlainCodec, plain_rival

# Audio of a clip in a batch may differ from that of the clip alone by this much (rounding).
AUDIO_ATOL = 1e-5


@dataclass(frozen=True)
class Timing:
    """Median seconds of a run, of the wall clock and of all threads of the process."""

    wall: float
    cpu: float


def measure_in_turn(runs: Mapping[str, Callable[[], Any]], repeats: int, warm: bool = False) -> dict[str, Timing]:
    """Median times of runs that take turns, each after one run that is not counted (`warm`: they ran already)."""
    names = list(runs)
    for name in [] if warm else names:
        runs[name]()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            _wait()
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            _wait()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: Timing(*(statistics.median(column) for column in zip(*t, strict=True))) for name, t in times.items()}


def _wait() -> None:
    """A GPU works on while Python goes on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Codecs


@dataclass(frozen=True)
class CodecRow:
    """One workload of one codec.

    Attributes:
        model, direction, lengths, clips: "encode" or "decode" of clips of "equal" or "ragged" lengths.
        audio_seconds: of all clips together.
        ours, plain: seconds of the tokenizer as it comes, and of the plain rival with all clips as one batch.
        batched: seconds of our model with all clips as one masked batch, without certification.
        ours_equal: codes (audio within 1e-5) are those of each clip alone. This must be true.
        plain_differing, batched_differing, total: codes (samples) that are not those of the clip alone.
    """

    model: str
    direction: str
    lengths: str
    clips: int
    audio_seconds: float
    ours: Timing
    plain: Timing
    batched: Timing
    ours_equal: bool
    plain_differing: int
    batched_differing: int
    total: int

    @property
    def ratio(self) -> float:
        """How many times as fast as the plain rival, by the wall clock."""
        return self.plain.wall / self.ours.wall


def measure_codec(
    name: str, tokenizer: AudioTokenizer, workloads: Mapping[str, list[list[Waveform]]], repeats: int
) -> Iterator[CodecRow]:
    """Encode and decode each workload.

    Args:
        tokenizer: of a family that has a plain rival.
        workloads: "equal" and "ragged" → lists of clips that are handed over at once.
    """
    plain = plain_rival(tokenizer.codec)
    for lengths, batches in workloads.items():
        for clips in batches:
            for direction, measure in (("encode", _encode_runs), ("decode", _decode_runs)):
                runs, alone = measure(tokenizer, plain, clips)
                differing = {key: _differing(run(), alone) for key, run in runs.items()}
                times = measure_in_turn(runs, repeats, warm=True)
                yield CodecRow(
                    model=name,
                    direction=direction,
                    lengths=lengths,
                    clips=len(clips),
                    audio_seconds=sum(map(len, clips)) / tokenizer.sampling_rate,
                    ours=times["ours"],
                    plain=times["plain"],
                    batched=times["batched"],
                    ours_equal=differing["ours"] == 0,
                    plain_differing=differing["plain"],
                    batched_differing=differing["batched"],
                    total=sum(row.size for row in alone),
                )


Runs = dict[str, Callable[[], list[np.ndarray]]]


def _encode_runs(tokenizer: AudioTokenizer, plain: PlainCodec, clips: list[Waveform]) -> tuple[Runs, list[np.ndarray]]:
    """What is compared, and the codes of each clip alone."""
    rate, device = tokenizer.sampling_rate, tokenizer.codec.device

    def batched() -> list[np.ndarray]:
        return _marked(tokenizer.encode_audio(clips, rate, batch_size=len(clips), certify=False))

    runs: Runs = {
        "ours": lambda: _marked(tokenizer.encode_audio(clips, rate)),
        "plain": lambda: _arrays(plain.encode([torch.from_numpy(clip).to(device) for clip in clips])),
        "batched": batched,
    }
    return runs, encode_alone(tokenizer.codec, clips)


def _marked(clips: Sequence[ClipCodes]) -> list[np.ndarray]:
    """Codes `[Q, T]`, -1 where a frame has none of a codebook."""
    return [
        c.codes if c.depths is None else np.where(np.arange(len(c.codes))[:, None] < c.depths, c.codes, -1)
        for c in clips
    ]


def _decode_runs(tokenizer: AudioTokenizer, plain: PlainCodec, clips: list[Waveform]) -> tuple[Runs, list[np.ndarray]]:
    """What is compared, and the audio of each clip alone."""
    codec, lengths = tokenizer.codec, [len(clip) for clip in clips]
    codes = [torch.from_numpy(rows).to(codec.device) for rows in encode_alone(codec, clips)]
    ids = [_ids(tokenizer, rows) for rows in codes]
    longest = max(rows.shape[1] for rows in codes)
    padded = torch.stack([torch.nn.functional.pad(rows, (0, longest - rows.shape[1]), value=-1) for rows in codes])

    @torch.inference_mode()
    def decode(rows: Tensor, samples: list[int]) -> list[np.ndarray]:
        given = CodecOutput(audio_codes=rows.clamp_min(0), audio_codes_mask=rows >= 0)
        audio = codec.decode(given, lengths=samples).cpu().numpy()
        return [wave[0, :n] for wave, n in zip(audio, samples, strict=True)]

    runs: Runs = {
        "ours": lambda: [audio[0].numpy() for audio in tokenizer.batch_decode(ids, lengths)],
        "plain": lambda: [a[:n] for a, n in zip(_arrays(plain.decode(codes)), lengths, strict=True)],
        "batched": lambda: decode(padded, lengths),
    }
    return runs, [decode(rows[None], [n])[0] for rows, n in zip(codes, lengths, strict=True)]


def _ids(tokenizer: AudioTokenizer, codes: Tensor) -> list[int]:
    depths = (codes >= 0).sum(dim=0) if tokenizer.codec.facts.variable_depth else None
    return tokenizer.codes_to_ids(codes.clamp_min(0), depths)


@torch.inference_mode()
def encode_alone(codec: AudioCodec, clips: Sequence[Waveform]) -> list[np.ndarray]:
    """Codes `[Q, T]` of each clip in the canonical shape: alone, float32; -1 where a frame has none of a codebook."""
    codes = []
    for clip in clips:
        values = torch.from_numpy(clip)[None, None].to(codec.device)
        mask = torch.ones(1, len(clip), dtype=torch.long, device=codec.device)
        found = codec.encode(values, mask)
        codes.append(found.audio_codes.where(found.audio_codes_mask, -1)[0].cpu().numpy())
    return codes


def _arrays(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    return [tensor.cpu().numpy() for tensor in tensors]


def _differing(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> int:
    """Codes that are not equal, or samples that are further apart than rounding explains."""
    count = 0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            count += max(a.size, b.size)
        else:
            count += int(np.count_nonzero(a != b if a.dtype.kind == "i" else np.abs(a - b) > AUDIO_ATOL))
    return count


# Layouts


@dataclass(frozen=True)
class LayoutRow:
    """Ids per CPU second of one layout, there and back, of a copy of as many ids, and of a Python loop over them."""

    layout: str
    codebooks: int
    ids: int
    to_ids: float
    to_codes: float
    copy: float
    loop: float
    equal: bool


LAYOUTS: list[tuple[str, tuple[int, ...], tuple[int, ...] | None]] = [
    ("interleaved", (20480,), None),
    ("interleaved", (1024,) * 8, None),
    ("coarse_first", (1024,) * 8, None),
    ("parallel", (1024,) * 8, None),
    ("delay", (1024,) * 8, None),
    ("variable", (1024,) * 8, None),
    ("multirate", (4096,) * 3, (4, 2, 1)),
]
# A Python loop is timed on so many ids at most.
LOOP_IDS = 200_000


def measure_layouts(num_frames: int, repeats: int, seed: int = 0) -> Iterator[LayoutRow]:
    """Codes ↔ ids of clips of `num_frames` frames (a multiple of 4)."""
    rng = np.random.default_rng(seed)
    for name, sizes, strides in LAYOUTS:
        layout = get_layout(name, AudioVocabulary(sizes), strides, variable_depth=name == "variable")
        lengths = [num_frames // stride for stride in strides or (1,) * len(sizes)]
        codes: Any = [rng.integers(size, size=n) for size, n in zip(sizes, lengths, strict=True)]
        depths = None
        if strides is None:
            codes = np.stack(codes)
        if name == "variable":
            depths = rng.integers(1, len(sizes) + 1, size=num_frames)
            codes *= np.arange(len(sizes))[:, None] < depths
        yield _layout_row(layout, codes, depths, repeats)


def _layout_row(layout: Any, codes: Any, depths: np.ndarray | None, repeats: int) -> LayoutRow:
    ids = layout.codes_to_ids(codes, depths)
    back = layout.ids_to_codes(ids).codes
    pairs = zip(back, codes, strict=True)
    some, offset = ids.ravel()[:LOOP_IDS].tolist(), 7
    times = measure_in_turn(
        {
            "to_ids": lambda: layout.codes_to_ids(codes, depths),
            "to_codes": lambda: layout.ids_to_codes(ids),
            "copy": ids.copy,
            "loop": lambda: [i + offset for i in some],
        },
        repeats,
    )
    count = {"to_ids": ids.size, "to_codes": ids.size, "copy": ids.size, "loop": len(some)}
    # CPU time: one pass takes milliseconds, and other work on the machine would show in the wall clock.
    rates = {key: count[key] / timing.cpu for key, timing in times.items()}
    equal = all(np.array_equal(a, b) for a, b in pairs)
    return LayoutRow(layout.name, len(codes), ids.size, **rates, equal=equal)


# Memory


@dataclass(frozen=True)
class MemoryRow:
    """Resident memory of a fresh process, MiB: with the model loaded, and at its peak over one and two clips' length.

    Attributes:
        seconds: of the shorter clip; the longer one has twice as many.
        per_minute: what a minute of audio more adds to the peak.
    """

    model: str
    direction: str
    seconds: float
    loaded: float
    peak: float
    peak_twice: float

    @property
    def per_minute(self) -> float:
        return (self.peak_twice - self.peak) * 60 / self.seconds


def measure_memory(name: str, seconds: float, threads: int) -> Iterator[MemoryRow]:
    """Each direction in a process of its own, so that one's peak does not hide the other's."""
    for direction in ("encode", "decode"):
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            loaded, peak, twice = pool.submit(_memory_of, name, direction, seconds, threads).result()
        yield MemoryRow(Path(name).stem, direction, seconds, loaded, peak, twice)


def _memory_of(name: str, direction: str, seconds: float, threads: int) -> tuple[float, float, float]:
    torch.set_num_threads(threads)
    tokenizer = load_tokenizer(name)
    rate = tokenizer.sampling_rate
    found = [peak_memory()]
    for length in (seconds, 2 * seconds):
        if direction == "encode":
            tokenizer.encode_audio(synthetic_clips([length], rate), rate)
        else:
            frames = tokenizer.codec.facts.num_frames(round(length * rate))
            sizes = tokenizer.codec.facts.codebook_sizes
            codes = torch.from_numpy(np.stack([np.arange(frames) * 7919 % size for size in sizes]))
            tokenizer.decode(_ids(tokenizer, codes))
        found.append(peak_memory())
    return found[0], found[1], found[2]


def peak_memory() -> float:
    """MiB that this process has held at most.

    Linux counts what the parent held before the exec into `ru_maxrss`, but not into VmHWM.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


# Precision


@dataclass(frozen=True)
class PrecisionRow:
    """One way to compute that may change codes, beside float32: its speed-up and the codes that differ.

    Attributes:
        error: why it did not run; then nothing else is known.
    """

    model: str
    variant: str
    speedup: float | None = None
    differing: int | None = None
    codes: int | None = None
    error: str | None = None


Variant = tuple[AudioCodec, Callable[[], AbstractContextManager]]


def measure_precision(
    name: str, codec: AudioCodec, clips: Sequence[Waveform], repeats: int, compiled: bool
) -> Iterator[PrecisionRow]:
    """Each variant of `codec` that the device has, clip by clip."""
    with exact_float32():
        expected = encode_alone(codec, clips)
    for variant, make in _variants(codec, compiled).items():
        try:
            model, context = make()
            yield _precision_row(name, variant, codec, model, context, clips, expected, repeats)
        except RuntimeError as error:  # no compiler, or a kernel that this device lacks
            yield PrecisionRow(name, variant, error=str(error).strip().splitlines()[0])


def _precision_row(
    name: str,
    variant: str,
    codec: AudioCodec,
    model: AudioCodec,
    context: Callable[[], AbstractContextManager],
    clips: Sequence[Waveform],
    expected: list[np.ndarray],
    repeats: int,
) -> PrecisionRow:
    def changed() -> list[np.ndarray]:
        with context():
            return encode_alone(model, clips)

    def exact() -> list[np.ndarray]:
        with exact_float32():
            return encode_alone(codec, clips)

    differing = _differing(changed(), expected)
    times = measure_in_turn({"float32": exact, "variant": changed}, repeats)
    total = sum(rows.size for rows in expected)
    return PrecisionRow(name, variant, times["float32"].wall / times["variant"].wall, differing, total)


def _variants(codec: AudioCodec, compiled: bool) -> dict[str, Callable[[], Variant]]:
    """Ways to compute, each made when its turn comes."""
    device = codec.device.type
    halves = {"bfloat16": torch.bfloat16}
    if device == "cuda":
        halves["float16"] = torch.float16
    makers: dict[str, Callable[[], Variant]] = {}
    for label, dtype in halves.items():
        makers[f"{label} autocast"] = lambda dtype=dtype: (codec, lambda: torch.autocast(device, dtype))
        makers[f"{label} weights"] = lambda dtype=dtype: (copy.deepcopy(codec).to(dtype), nullcontext)
    if device == "cuda":
        makers["TF32"] = lambda: (codec, tf32)
    if compiled or device == "cuda":
        makers["torch.compile"] = lambda: (_compiled(codec), exact_float32)
    return makers


def _compiled(codec: AudioCodec) -> AudioCodec:
    """The blocks of AUV's encoder; the front end gains nothing and its spectra are not compiled well."""
    if not isinstance(codec, AuvModel):
        raise RuntimeError(f"which parts of {type(codec).__name__} to compile was not worked out")
    model = copy.deepcopy(codec)
    model.encoder.backbone.compile(dynamic=True)
    return model


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32: PyTorch allows it in cuDNN's convolutions unless told otherwise."""
    with _float32_precision("highest", tf32_convolutions=False):
        yield


@contextmanager
def tf32() -> Iterator[None]:
    with _float32_precision("high", tf32_convolutions=True):
        yield


@contextmanager
def _float32_precision(matmul: str, tf32_convolutions: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32_convolutions):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
