"""What APCodec sees of a waveform: log amplitude and phase of a transform with short hops.

The phase is where rounding bites. Reflected at its start, a clip's first frame is symmetric, its spectrum real, and
where that is negative the phase is +pi or -pi by the sign of a rounding error: the encoder gets another input on
another machine. The same holds for all structural zeros (silence, constants, square waves), and nearly for bins far
below the rest of their frame. Two ways to take the phase are therefore offered:

    settled     transform in float64; what is too small for float64 to tell from zero is +0. The same phase on every
                machine, in every batch and window.
    published   of `torch.stft` in float32, as the published code has it: equal to it on the same machine, another one
                on machines whose FFT rounds otherwise. Only silent bins have the phase 0, as the recorded vectors
                have it but for a few: with the -0 that some FFTs give, silence before a clip would change its codes.

Shapes: B clips, N samples, K bins, T transform frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiotok.codecs.apcodec.configuration_apcodec import ApCodecConfig
from audiotok.nn.stft import magnitude, reflect_pad, stft

PHASES = ("settled", "published")
# Added to the amplitude before the logarithm.
AMPLITUDE_FLOOR = 1e-5
# Of the largest real or imaginary part of a frame. Rounding of a float64 transform stays under 1e-15 of it, while the
# last bit of a float32 sample makes some 1e-8: what lies under this is zero by structure.
RESOLUTION = 1e-12


def settled_phase(spectrum: Tensor) -> Tensor:
    """atan2(im, re) in (-pi, pi] of a float64 spectrum `[..., K, T]`, in float32.

    Real and imaginary parts that float64 cannot tell from zero are +0, so that no phase hangs on their sign.
    """
    parts = torch.view_as_real(spectrum)
    size = parts.detach().abs()
    resolvable = RESOLUTION * size.amax(dim=(-3, -1), keepdim=True)
    real, imaginary = parts.masked_fill(size <= resolvable, 0.0).unbind(-1)
    return torch.atan2(imaginary, real).float()


def published_phase(spectrum: Tensor) -> Tensor:
    """atan2(im, re) of `[..., K, T]`, +0 where a bin is zero, whatever the signs of its zeros."""
    silent = spectrum == 0
    return torch.atan2(spectrum.imag.masked_fill(silent, 0.0), spectrum.real.masked_fill(silent, 0.0))


class ApCodecFrontEnd(nn.Module):
    """Waveforms → log amplitudes and phases. No parameters; float32 whatever the model computes in."""

    def __init__(self, config: ApCodecConfig) -> None:
        super().__init__()
        self.n_fft, self.win_length, self.hop = config.n_fft, config.win_length, config.stft_hop_length
        self.ratio, self.causal, self.delay = config.downsampling_ratio, config.causal, config.delay

    def num_frames(self, num_samples: int) -> int:
        """T of a clip. Centred: as many as the published code has. Causal: those of the code frames that hold it."""
        if self.causal:
            return -(-(num_samples + self.win_length // 2) // (self.ratio * self.hop)) * self.ratio
        return num_samples // self.hop + 1

    def forward(self, waveform: Tensor, lengths: Sequence[int], phases: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`[B, N]` → log amplitudes and phases, `[B, K, T]` each, zero behind a clip's last frame.

        Clip by clip: the rounding of a transform may depend on how many are made at once, and a phase may hang on
        it. So a clip has the features that it has alone, bit for bit.

        Args:
            lengths: samples of each clip. phases: of `PHASES`, one a clip.
        """
        frames = [self.num_frames(n) for n in lengths]
        features = []
        for row, (samples, count, kind) in enumerate(zip(lengths, frames, phases, strict=True)):
            log_amplitude, angle = self.features(self.padded(waveform[row : row + 1, :samples], count), kind)
            features.append(F.pad(torch.cat([log_amplitude, angle]), (0, max(frames) - count)))
        log_amplitudes, angles = torch.stack(features, dim=1)
        return log_amplitudes, angles

    def features(self, padded: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """Log amplitude and phase `[B, K, T]` of all transforms that fit padded clips `[B, N]`."""
        settled = kind == "settled"
        spectrum = stft(padded, self.n_fft, self.hop, self.win_length, double=settled)
        log_amplitude = (magnitude(spectrum) + AMPLITUDE_FLOOR).log().float()
        return log_amplitude, settled_phase(spectrum) if settled else published_phase(spectrum)

    def spectrum(self, waveform: Tensor, lengths: Sequence[int], frames: int) -> Tensor:
        """Complex `[B, K, frames]` of waveforms `[B, N]` that are zero behind their ends, in float32."""
        return stft(self.padded(waveform, frames, lengths), self.n_fft, self.hop, self.win_length)

    def padded(self, waveform: Tensor, frames: int, lengths: Sequence[int] | None = None) -> Tensor:
        """Clips `[B, N]` with what the windows of `frames` frames see beyond their ends."""
        half, total = self.n_fft // 2, (frames - 1) * self.hop + self.n_fft
        if self.causal:  # zeros, as at the start of a stream
            left = half + self.delay
            return F.pad(waveform, (left, max(0, total - left - waveform.shape[1])))[:, :total]
        # Clips too short to be reflected, which the published code refuses, go on with silence.
        waveform = F.pad(waveform, (0, max(0, half + 1 - waveform.shape[1])))
        return reflect_pad(waveform, half, None if lengths is None else [max(n, half + 1) for n in lengths], total)
