"""What a legal waveform is, and the checks that files, arrays, feature extractors and writers share.

Shapes: C channels, N samples of each channel. A waveform is float32 `[C, N]`; full scale is ±1, and samples
beyond it are legal (lossy codecs decode to them) and kept. Blocks on their way through a decoder or resampler
are `[N, C]`, the order of both libraries.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from audiotok.errors import (
    AudioInputError,
    AudioShapeError,
    ChannelError,
    EmptyAudioError,
    IntegerAudioError,
    MissingSamplingRateError,
    NonFiniteAudioError,
    OptionError,
    SamplingRateError,
)

FloatArray: TypeAlias = NDArray[np.float32]

# None refuses other channel counts than asked for; "mean" averages to mono; an index takes that one channel
# (0 is left); "repeat" copies mono into every channel.
Downmix: TypeAlias = Literal["mean", "repeat"] | int | None

# Under 1 kHz nothing audible is left (telephone speech has 8 kHz); 768 kHz is the fastest PCM that converters
# make. A rate outside is a corrupt header, a rate in kHz, or no audio.
MIN_SAMPLING_RATE = 1_000
MAX_SAMPLING_RATE = 768_000


@dataclass(frozen=True, eq=False)
class Waveform:
    """Decoded audio: `samples` float32 `[C, N]`, and `sampling_rate` in Hz."""

    samples: FloatArray
    sampling_rate: int

    @property
    def channels(self) -> int:
        return self.samples.shape[0]

    @property
    def num_samples(self) -> int:
        return self.samples.shape[1]

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.num_samples / self.sampling_rate


def check_sampling_rate(value: Any, name: str = "sampling_rate") -> int:
    """The rate as an int in Hz.

    Raises:
        MissingSamplingRateError: it is None.
        SamplingRateError: it is no whole number from 1,000 to 768,000.
    """
    if value is None:
        raise MissingSamplingRateError(
            f"{name} is missing: an array does not know its rate. Pass it in Hz, for example {name}=16000."
        )
    if getattr(value, "ndim", None) == 0:  # as rows of datasets in the format of NumPy or torch have it
        value = value.item()
    whole = isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value // 1
    if not whole or not MIN_SAMPLING_RATE <= value <= MAX_SAMPLING_RATE:
        raise SamplingRateError(
            f"{name}={value!r} is not legal: give a whole number of Hz from {MIN_SAMPLING_RATE} to {MAX_SAMPLING_RATE}."
        )
    return int(value)


def as_samples(audio: Any, *, channels: int | None = None) -> FloatArray:
    """An array, tensor or list as a checked waveform, float32 `[C, N]`.

    Args:
        audio: `[N]` or `[C, N]` of floats: NumPy array, torch tensor on any device, anything with `__array__`,
            or (nested) list. float16 and float64 are cast; the result may share memory with the input.
        channels: the count that the caller wants, if it wants one. It settles the shapes that could be read in
            two ways, such as `[2, 2]`; other counts are *not* refused here (see `channel_map`).

    Raises:
        IntegerAudioError, AudioShapeError, EmptyAudioError, NonFiniteAudioError: as their names say.
        AudioInputError: the values are no real numbers.
    """
    array = _to_numpy(audio)
    _check_dtype(array)
    array = _channels_first(array, channels)
    if array.size == 0:
        raise EmptyAudioError(f"The array of shape {list(array.shape)} holds no samples: give at least one.")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf and is refused as such below
        samples = np.ascontiguousarray(array, dtype=np.float32)
    check_finite(samples)
    return samples


def _to_numpy(audio: Any) -> NDArray[Any]:
    if all(hasattr(audio, name) for name in ("detach", "cpu", "is_floating_point")):  # a torch tensor
        tensor = audio.detach().cpu()
        # NumPy has no bfloat16; integer tensors keep their dtype, to be refused.
        return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
    if not isinstance(audio, np.ndarray | list | tuple) and not hasattr(audio, "__array__"):
        raise AudioInputError(
            f"A {type(audio).__name__} is no waveform: give a NumPy array, a torch tensor or a list of floats."
        )
    try:
        return np.asarray(audio)
    except (ValueError, TypeError) as error:  # ragged rows, or rows of something else
        raise AudioShapeError(
            f"The {type(audio).__name__} is no rectangular array ({error}): give one clip as [samples] or "
            "[channels, samples], several clips as a list to a call that takes batches."
        ) from error


def _check_dtype(array: NDArray[Any]) -> None:
    if array.size == 0 or array.dtype.kind == "f":  # np.asarray([]) is float64, an empty list of lists may not be
        return
    if array.dtype.kind in "iub":
        raise IntegerAudioError(
            f"The array is {array.dtype}, whose full scale is unknown: divide it by that first, for example "
            "audio.astype('float32') / 32768 for 16-bit samples."
        )
    raise AudioInputError(f"An array of dtype {array.dtype} is no waveform: give real numbers, such as float32.")


def _channels_first(array: NDArray[Any], channels: int | None) -> NDArray[Any]:
    if array.ndim == 1:
        return array[None, :]
    if array.ndim != 2:
        raise AudioShapeError(
            f"Shape {list(array.shape)} is no waveform: give one clip as [samples] or [channels, samples], several "
            "clips as a list."
        )
    count, length = array.shape
    if length and count > 1 and count >= length and count != channels:
        raise AudioShapeError(
            f"Shape {list(array.shape)} looks like [samples, channels], or could be read both ways; legal is "
            "[channels, samples]: pass the transpose (audio.T), or say channels= if it is right as it is."
        )
    return array


def check_finite(samples: FloatArray, *, start: int = 0) -> None:
    """Raise `NonFiniteAudioError` if `[C, N]` samples, the first of which is number `start`, hold NaN or inf."""
    finite = np.isfinite(samples)
    if finite.all():
        return
    bad = np.argwhere(~finite.T)  # in order of time
    index, channel = bad[0]
    raise NonFiniteAudioError(
        f"{len(bad)} of the {samples.size} values from sample {start} to {start + samples.shape[1] - 1} are NaN or "
        f"infinite, the first ({samples[channel, index]}) at sample {start + index} of channel {channel}. Only "
        "finite values are legal: repair the recording, or replace them (numpy.nan_to_num)."
    )


class ChannelMap(NamedTuple):
    """How blocks `[N, C]` of a recording become blocks `[N, channels]`."""

    channels: int
    apply: Callable[[FloatArray], FloatArray]


def channel_map(count: int, channels: int | None, downmix: Downmix = None) -> ChannelMap:
    """The way from `count` channels to the `channels` that are wanted, by the policy `downmix`.

    The policy is used only where the counts differ, so one policy serves a corpus of mono and stereo files.
    Without `channels`, "mean" and an index give mono, and other recordings stay as they are.

    Raises:
        ChannelError: the counts differ and the policy does not lead from one to the other.
        OptionError: `channels` or `downmix` is none of the legal values.
    """
    if channels is not None and (not isinstance(channels, int) or channels < 1):
        raise OptionError(f"channels={channels!r} is not legal: give a count from 1, or None for what there is.")
    _check_downmix(downmix)
    takes_one = downmix == "mean" or isinstance(downmix, int)
    wanted = channels if channels is not None else (1 if takes_one else count)
    if isinstance(downmix, int) and downmix >= count:
        raise ChannelError(
            f"downmix={downmix} asks for channel {downmix} of a recording that has {_plural(count)}: legal are 0 to "
            f'{count - 1}, or downmix="mean".'
        )
    if count == wanted:
        return ChannelMap(count, lambda block: block)
    if takes_one and wanted == 1:
        return ChannelMap(1, _mean if downmix == "mean" else lambda block: block[:, downmix : downmix + 1])
    if downmix == "repeat" and count == 1:
        return ChannelMap(wanted, lambda block: np.repeat(block, wanted, axis=1))
    raise ChannelError(f"The recording has {_plural(count)} where {wanted} is wanted: {_way_out(count, wanted)}.")


def _check_downmix(downmix: Any) -> None:
    index = isinstance(downmix, int) and not isinstance(downmix, bool) and downmix >= 0
    if not index and downmix not in (None, "mean", "repeat"):
        raise OptionError(
            f'downmix={downmix!r} is not legal: give None (refuse), "mean", a channel index from 0, or "repeat" '
            "(mono into every channel)."
        )


def _mean(block: FloatArray) -> FloatArray:
    return block.mean(axis=1, dtype=np.float64, keepdims=True).astype(np.float32)


def _way_out(count: int, wanted: int) -> str:
    if wanted == 1:
        hint = ", or a list of clips if this is a batch" if count > 8 else ""
        return f'ask for a downmix (downmix="mean", or an index such as downmix=0 for one channel){hint}'
    if count == 1:
        return 'ask for copies of the one channel (downmix="repeat")'
    return f"mix it to {_plural(wanted)} yourself, there is no rule for that"


def _plural(count: int) -> str:
    return f"{count} channel" if count == 1 else f"{count} channels"
