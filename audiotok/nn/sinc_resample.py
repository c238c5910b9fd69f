"""Resampling as published codecs do it before they encode: a windowed sinc in float32.

`audiotok.audio` resamples recordings with soxr, which is better and faster. This one is for parity: codes react to
the last bit of the waveform, and published pipelines resample with this filter (the default of torchaudio: Hann
window, 6 zero crossings, cut-off at 0.99 of the lower Nyquist rate).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from audiotok.errors import IntegerAudioError, SamplingRateError

ZERO_CROSSINGS = 6
ROLLOFF = 0.99


def sinc_resample(waveform: Tensor, orig_rate: int, new_rate: int) -> Tensor:
    """Waveforms `[..., n]` at `orig_rate` → `[..., ceil(n * new_rate / orig_rate)]` at `new_rate`.

    Computed in float32 and given back in the waveform's dtype; equal rates give the waveform itself.

    Raises:
        SamplingRateError: a rate that is no positive integer.
        IntegerAudioError: integer samples, whose full scale is unknown.
    """
    for name, rate in (("orig_rate", orig_rate), ("new_rate", new_rate)):
        if not isinstance(rate, int) or rate < 1:
            raise SamplingRateError(f"{name}={rate!r} is not legal: give a positive whole number of Hz.")
    if not waveform.is_floating_point():
        raise IntegerAudioError(f"The waveform is {waveform.dtype}: waveforms are float, full scale 1.0.")
    if orig_rate == new_rate:
        return waveform
    shared = math.gcd(orig_rate, new_rate)
    orig, new = orig_rate // shared, new_rate // shared
    filters, width = polyphase_filters(orig, new, waveform.device)
    flat = F.pad(waveform.reshape(-1, 1, waveform.shape[-1]).float(), (width, width + orig))
    # One output channel a phase; side by side they are consecutive samples.
    out = F.conv1d(flat, filters[:, None], stride=orig).transpose(1, 2).flatten(1)
    length = -(-new * waveform.shape[-1] // orig)
    return out[:, :length].reshape(*waveform.shape[:-1], length).to(waveform.dtype)


def polyphase_filters(orig: int, new: int, device: torch.device) -> tuple[Tensor, int]:
    """The filter of each of `new` output samples in `orig` input samples, `[new, 2 * width + orig]`, and the width.

    The factors are multiplied in the published order: another one changes last bits, and then codes.
    """
    cutoff = min(orig, new) * ROLLOFF
    width = math.ceil(ZERO_CROSSINGS * orig / cutoff)
    position = torch.arange(-width, width + orig, dtype=torch.float32, device=device) / orig
    phase = torch.arange(0, -new, -1, dtype=torch.float32, device=device)[:, None] / new
    t = ((phase + position) * cutoff).clamp(-ZERO_CROSSINGS, ZERO_CROSSINGS)
    window = torch.cos(t * math.pi / ZERO_CROSSINGS / 2) ** 2
    t = t * math.pi
    sinc = torch.where(t == 0, 1.0, t.sin() / t)
    return sinc * (window * (cutoff / orig)), width
