"""Clips → codes: recordings are decoded in threads ahead of the model, which encodes them alone or in batches.

libsndfile and soxr let go of Python's lock while they work, so threads keep one model busy. On a CPU clips go through
the model one by one, in order; elsewhere a pool of them is sorted by length and cut into batches under a budget of
seconds, padding included.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from audiotok.audio import Downmix, open_audio
from audiotok.certified import Certificate
from audiotok.encoding import ClipCodes, ClipEncoder
from audiotok.errors import AudioTokError
from audiotok.integrations.corpus_record import Filters
from audiotok.integrations.corpus_shards import Certified, Failure

GPU_BATCH_SECONDS, GPU_WORKERS, CPU_WORKERS = 240.0, 8, 2
POOL_BATCHES = 16  # batches of clips that are sorted by length together
MAX_PADDING = 0.04  # share of a batch; a clip that would make it more begins another one
SILENT_WINDOW_S, SILENT_LEVEL = 0.02, 1e-3
# No fault of a clip: memory, and a GPU that failed, after which nothing on it works.
FATAL = (MemoryError, torch.OutOfMemoryError, *filter(None, [getattr(torch, "AcceleratorError", None)]))
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """What became of a clip: codes or a failure.

    Attributes:
        clip: its row of the source, with `id` and `locator`.
        certified: of a clip with codes.
        error: of a failure, what was raised.
    """

    clip: dict[str, Any]
    codes: ClipCodes | None = None
    failure: Failure | None = None
    certified: Certified | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Heard:
    """A decoded recording, `[C, N]` at the codec's rate; no samples where it is too long to be held whole."""

    clip: dict[str, Any]
    samples: np.ndarray | None


def batch_seconds_of(device: torch.device, asked: float | None = None) -> float | None:
    """Seconds of audio a batch, unless others are asked for: None, which is clip by clip, on a CPU."""
    return asked or (None if device.type == "cpu" else GPU_BATCH_SECONDS)


def num_workers_of(device: torch.device, asked: int | None = None) -> int:
    """Threads that decode recordings, unless another number is asked for."""
    return asked or (CPU_WORKERS if device.type == "cpu" else GPU_WORKERS)


class ClipOpener(Protocol):
    """What a `Pipeline` needs of a source."""

    def open(self, locator: Any) -> Any: ...

    def where(self, locator: Any) -> str: ...


class FilteredOut(Exception):
    """A clip that the user does not want."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


class Pipeline:
    """Encodes clips of one source.

    Args:
        batch_seconds: of audio, padding included, in a batch; None for one clip at a time.
        num_workers: threads that decode.
    """

    def __init__(
        self,
        source: ClipOpener,
        encoder: ClipEncoder,
        filters: Filters,
        downmix: Downmix,
        batch_seconds: float | None,
        num_workers: int,
    ) -> None:
        self.source, self.encoder, self.filters, self.downmix = source, encoder, filters, downmix
        self.facts = encoder.codec.facts
        self.budget = None if batch_seconds is None else max(1, round(batch_seconds * self.facts.sampling_rate))
        self.num_workers = num_workers
        self.padded_samples = self.encoded_samples = 0

    def run(self, clips: Iterable[dict[str, Any]], must_stop: Callable[[], bool] = lambda: False) -> Iterator[Done]:
        """What became of each clip. Once `must_stop` says so, no more are begun; those that were are finished."""
        heard = self._decoded(clips, must_stop)
        if self.budget is None:
            for one in heard:
                yield one if isinstance(one, Done) else self._encode_alone(one)
            return
        pool: list[Heard] = []
        held = 0
        for one in heard:
            if isinstance(one, Done):
                yield one
            elif one.samples is None:
                yield self._encode_alone(one)
            else:
                pool.append(one)
                held += one.samples.shape[1]
            if held >= POOL_BATCHES * self.budget:
                yield from self._encode_pool(pool)
                pool, held = [], 0
        yield from self._encode_pool(pool)

    # Recordings → waveforms, in threads

    def _decoded(self, clips: Iterable[dict[str, Any]], must_stop: Callable[[], bool]) -> Iterator[Heard | Done]:
        """In the order of `clips`, some clips ahead."""
        ahead = self.num_workers + 2
        with ThreadPoolExecutor(self.num_workers, thread_name_prefix="audiotok-decode") as threads:
            waiting: deque[Future[Heard | Done]] = deque()
            try:
                for clip in clips:
                    if must_stop():
                        break
                    waiting.append(threads.submit(self._hear, clip))
                    if len(waiting) >= ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _hear(self, clip: dict[str, Any]) -> Heard | Done:
        try:
            with self._open(clip) as stream:
                self._check_header(stream.info)
                limit = self.encoder.longest_whole
                samples = stream.read(limit + 1)
            if samples.shape[1] > limit:
                return Heard(clip, None)
            self._check_samples(samples)
            return Heard(clip, samples)
        except Exception as error:
            return self._failed(clip, error)

    def _open(self, clip: dict[str, Any]) -> Any:
        return open_audio(
            self.source.open(clip["locator"]),
            target_rate=self.facts.sampling_rate,
            channels=self.facts.channels,
            downmix=self.downmix,
        )

    def _check_header(self, info: Any) -> None:
        least, most, rate = self.filters.min_duration, self.filters.max_duration, self.filters.min_sampling_rate
        if rate is not None and info.sampling_rate < rate:
            raise FilteredOut("min_sampling_rate", f"it was sampled at {info.sampling_rate} Hz, below {rate}")
        if info.duration is not None:
            self._check_duration(info.duration, least, most)

    def _check_samples(self, samples: np.ndarray) -> None:
        self._check_duration(
            samples.shape[1] / self.facts.sampling_rate, self.filters.min_duration, self.filters.max_duration
        )
        if self.filters.max_silence is not None:
            share = silent_share(samples, self.facts.sampling_rate)
            if share > self.filters.max_silence:
                raise FilteredOut("max_silence", f"{share:.0%} of it is silent, above {self.filters.max_silence:.0%}")

    @staticmethod
    def _check_duration(duration: float, least: float | None, most: float | None) -> None:
        if least is not None and duration < least:
            raise FilteredOut("min_duration", f"it lasts {duration:.3f} s, below {least:g}")
        if most is not None and duration > most:
            raise FilteredOut("max_duration", f"it lasts {duration:.3f} s, above {most:g}")

    def _failed(self, clip: dict[str, Any], error: Exception) -> Done:
        """A bad clip is named and the run goes on; what is no fault of the clip ends the run."""
        if isinstance(error, FATAL):
            raise error
        name = error.name if isinstance(error, FilteredOut) else type(error).__name__
        if not isinstance(error, (AudioTokError, FilteredOut)):
            logger.warning("%s: unexpected %s: %s", clip["id"], name, error)
        where = self.source.where(clip["locator"])
        return Done(clip, failure=Failure(clip["id"], name, " ".join(str(error).split()), where), error=error)

    # Waveforms → codes

    def _encode_alone(self, heard: Heard) -> Done:
        try:
            if heard.samples is None:
                codes = next(iter(self.encoder.encode([self.source.open(heard.clip["locator"])], downmix=self.downmix)))
                length = codes.audio_length
                self._check_duration(
                    length / self.facts.sampling_rate, self.filters.min_duration, self.filters.max_duration
                )
            else:
                codes, length = self.encoder.encode_batch([heard.samples])[0], heard.samples.shape[1]
        except Exception as error:
            return self._failed(heard.clip, error)
        self.encoder.certificates.clear()
        self.padded_samples += length
        self.encoded_samples += length
        return Done(heard.clip, codes, certified=Certified(1))

    def _encode_pool(self, pool: list[Heard]) -> Iterator[Done]:
        """In batches of similar length; results in the order of the pool."""
        order = sorted(range(len(pool)), key=lambda i: pool[i].samples.shape[1])
        done: dict[int, Done] = {}
        start = 0
        while start < len(order):
            stop = self._batch_end(pool, order, start)
            batch = [pool[i] for i in order[start:stop]]
            try:
                results = self._encode_batch(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self._shrink_budget(batch)
                continue
            done |= dict(zip(order[start:stop], results, strict=True))
            start = stop
        yield from (done[i] for i in range(len(pool)))

    def _batch_end(self, pool: list[Heard], order: list[int], start: int) -> int:
        """The longest run of clips from `start` whose padded batch keeps to the budget and is not padded too much."""
        stop, held = start + 1, pool[order[start]].samples.shape[1]
        while stop < len(order):
            length = pool[order[stop]].samples.shape[1]
            padded = (stop + 1 - start) * length
            if padded > self.budget or held + length < (1 - MAX_PADDING) * padded:
                break
            stop, held = stop + 1, held + length
        return stop

    def _encode_batch(self, batch: list[Heard]) -> list[Done]:
        if len(batch) == 1:
            return [self._encode_alone(batch[0])]
        self.encoder.certificates.clear()
        options = {key: [value] * len(batch) for key, value in self.encoder.options.items()}
        try:
            clips = self.encoder.encode_batch([one.samples for one in batch], options)
        except FATAL:
            raise
        except Exception:  # one of them is bad: find out which
            return [self._encode_alone(one) for one in batch]
        lengths = [one.samples.shape[1] for one in batch]
        self.padded_samples += max(lengths) * len(batch)
        self.encoded_samples += sum(lengths)
        shares = _shares(self.encoder.certificates[0] if self.encoder.certify else None, len(batch))
        return [Done(one.clip, codes, certified=share) for one, codes, share in zip(batch, clips, shares, strict=True)]

    def _shrink_budget(self, batch: list[Heard]) -> None:
        """Out of memory: half of what was just tried, for good."""
        torch.cuda.empty_cache()
        tried = len(batch) * max(one.samples.shape[1] for one in batch)
        self.budget = max(1, tried // 2)
        seconds = self.budget / self.facts.sampling_rate
        logger.warning("out of memory: batches of %.0f s of audio from here on", seconds)


def _shares(certificate: Certificate | None, count: int) -> list[Certified]:
    """A batch's certificate, told once: with its first clip."""
    if certificate is None:
        return [Certified() for _ in range(count)]
    margin = certificate.smallest_margin
    whole = Certified(count, certificate.num_reencoded, margin if np.isfinite(margin) else None)
    return [whole, *(Certified() for _ in range(count - 1))]


def silent_share(samples: np.ndarray, sampling_rate: int) -> float:
    """Share of windows of 20 ms of `[C, N]` whose root mean square is below -60 dB of full scale, in all channels."""
    window = max(1, round(SILENT_WINDOW_S * sampling_rate))
    count = max(1, samples.shape[1] // window)
    cut = samples[:, : count * window] if samples.shape[1] >= window else samples
    levels = np.sqrt(np.square(cut.reshape(len(cut), count, -1), dtype=np.float64).mean(axis=2)).max(axis=0)
    return float((levels < SILENT_LEVEL).mean())
