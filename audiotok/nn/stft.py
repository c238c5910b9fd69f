"""Short-time Fourier transforms for batches of clips of different lengths.

Shapes: B clips, N samples, F frames, `n_fft` window length, `hop` samples between frames. Every clip is
reflected at its own end (`reflect_pad`), so that a clip in a padded batch has the frames it has alone.
Windows are computed where they are used: a few microseconds, and nothing to lose when a model is built on the
meta device or cast to another dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reflect_pad(waveform: Tensor, pad: int, lengths: list[int] | None, total: int) -> Tensor:
    """Reflect each clip at both of its own ends (edge sample not repeated) and lay it in a buffer of zeros.

    Args:
        waveform: `[B, N]`.
        pad: samples reflected on each side; each length must exceed it.
        lengths: samples of each clip, None if all have N.
        total: samples of the buffer; what is longer is cut (no frame reads it).

    Returns:
        `[B, total]`.
    """
    if lengths is None or all(n == waveform.shape[-1] for n in lengths):
        padded = F.pad(waveform[:, None], (pad, pad), mode="reflect")[:, 0]
        return F.pad(padded, (0, max(0, total - padded.shape[-1])))[:, :total]
    last = torch.tensor(lengths, device=waveform.device)[:, None] - 1
    position = torch.arange(total, device=waveform.device) - pad
    source = last - (last - position.abs()).abs()  # fold at 0, then at the clip's last sample
    inside = position <= last + pad
    return waveform.gather(1, source.clamp(min=0).expand(len(lengths), -1)) * inside


def stft(padded: Tensor, n_fft: int, hop: int, win_length: int | None = None, double: bool = False) -> Tensor:
    """Complex one-sided spectrum `[B, n_fft // 2 + 1, F]` of already padded clips, periodic Hann.

    In float32, or in float64 if `double`.
    """
    padded = padded.double() if double else padded.float()
    window = torch.hann_window(win_length or n_fft, device=padded.device, dtype=padded.dtype)
    return torch.stft(padded, n_fft, hop, win_length or n_fft, window, center=False, return_complex=True)


def magnitude(spectrum: Tensor) -> Tensor:
    """sqrt(re^2 + im^2) with a zero gradient, not NaN, where the spectrum is silent."""
    power = spectrum.real.square() + spectrum.imag.square()
    if not power.requires_grad:
        return power.sqrt()
    silent = power == 0
    return power.masked_fill(silent, 1.0).sqrt().masked_fill(silent, 0.0)


def phase(spectrum: Tensor) -> Tensor:
    """atan2(im, re) in (-pi, pi] of `[B, bins, F]`, the same on every machine where the sign of a zero decides.

    FFT libraries disagree on signed zeros: a silent bin may have re = -0 (phase pi, not 0), and the lowest and
    highest bin, real by nature, may have im = -0 or a rounding residue (phase -pi, not pi). Both are set to +0.
    """
    real, imaginary = spectrum.real, spectrum.imag.clone()
    imaginary[:, [0, -1]] = 0.0
    silent = (real == 0) & (imaginary == 0)
    return torch.atan2(imaginary.masked_fill(silent, 0.0), real.masked_fill(silent, 0.0))


def overlap_add(frames: Tensor, hop: int) -> Tensor:
    """Sum frames `[B, F, n]`, each `hop` later, to `[B, (F - 1) * hop + n]`."""
    batch, num_frames, length = frames.shape
    overlaps = -(-length // hop)
    pieces = F.pad(frames, (0, overlaps * hop - length)).reshape(batch, num_frames, overlaps, hop)
    out = frames.new_zeros(batch, num_frames + overlaps - 1, hop)
    for i in range(overlaps):
        out[:, i : i + num_frames] += pieces[:, :, i]
    return out.flatten(1)[:, : (num_frames - 1) * hop + length]


def inverse_frames(spectrum: Tensor, win_length: int | None = None) -> tuple[Tensor, Tensor]:
    """Windowed frames `[B, F, win_length]` of a spectrum `[B, F, n_fft // 2 + 1]`, to be overlapped; and the window.

    The imaginary parts of the lowest and highest bin are ignored.
    """
    if spectrum.device.type != "cpu":  # the CPU's inverse FFT ignores them; others may not
        imaginary = spectrum.imag.clone()
        imaginary[..., [0, -1]] = 0.0
        spectrum = torch.complex(spectrum.real, imaginary)
    frames = torch.fft.irfft(spectrum, dim=-1)
    n_fft = frames.shape[-1]
    length = win_length or n_fft
    window = torch.hann_window(length, device=frames.device)
    return frames[..., (n_fft - length) // 2 :][..., :length] * window, window


def istft(
    spectrum: Tensor, hop: int, valid: Tensor | None = None, win_length: int | None = None, center: bool = False
) -> Tensor:
    """Waveform of a one-sided spectrum `[B, F, n_fft // 2 + 1]`, the inverse of `stft`.

    Args:
        spectrum: complex; the imaginary parts of the lowest and highest bin are ignored.
        hop: samples between frames.
        valid: `[B, F]` bool, frames that exist; others add neither signal nor window energy.
        win_length: of the Hann window in the middle of the transform; None for n_fft.
        center: cut half a window from both ends, as from a centred transform, which leaves (F - 1) * hop samples.
            Otherwise (win_length - hop) / 2 are cut from both ends, which leaves F * hop.

    Returns:
        `[B, samples]`, the window energy divided out.
    """
    frames, window = inverse_frames(spectrum, win_length)
    length = len(window)
    energy = window.square().expand(1, frames.shape[1], length)
    if valid is not None:
        frames = frames * valid[..., None]
        energy = energy * valid[..., None]
    cut = length // 2 if center else (length - hop) // 2
    total = overlap_add(frames, hop)[:, cut:-cut]
    envelope = overlap_add(energy, hop)[:, cut:-cut]
    if valid is not None:
        envelope = envelope.masked_fill(envelope == 0, 1.0)  # behind a clip's end there is nothing to divide
    return total / envelope
