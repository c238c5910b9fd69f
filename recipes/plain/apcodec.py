"""The rival of the benchmark: APCodec as a careful user runs the published code, without audiotok.

Careful: float32, `torch.no_grad`, and right: one clip after the other, since the published graph has no masks (padding
changes its codes, and with the norm over time those of every frame); each clip is padded with silence to whole frames,
so that nothing of it is lost; phases that hang on rounding are settled, as our codes have them. Plain: eager layers in
the published structure (convolutions on channels before time, pointwise layers on transposed frames), weight norm in
every call, the whole matrix of distances to a codebook that is normalised in every call, and torch's own transforms.

Nothing is shared with the package's model but the weights, so equal codes also mean two implementations that agree.
Shapes: N samples, K bins, T transform frames, F code frames, D latent channels, Q codebooks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from audiotok import ApCodecModel


class PlainApCodec:
    """Codes of waveforms and back, of the published networks (not of the causal one, which nobody published).

    Args:
        codec: gives configuration and weights, which are not copied.
        phase: "settled", as our codes have it, or "published": the transform in float32.
    """

    def __init__(self, codec: ApCodecModel, phase: str = "settled") -> None:
        self.config = codec.config
        self.weights = codec.state_dict()
        self.device = codec.device
        self.phase = phase

    @torch.no_grad()
    def encode(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Waveforms `[N_i]`, one after the other → codes `[Q, F_i]` of each."""
        return [self._encode(clip) for clip in clips]

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Codes `[Q, F_i]`, one after the other → waveforms, `(r * F_i - 1) * hop` samples each."""
        return [self._decode(rows) for rows in codes]

    def _encode(self, clip: Tensor) -> Tensor:
        log_amplitude, angle = self._features(clip)
        halves = [
            self._convolution(f"encoder.{name}.downsample", self._trunk(f"encoder.{name}", x), self._ratio)
            for name, x in (("amplitude", log_amplitude), ("phase", angle))
        ]
        return self._quantize(self._convolution("encoder.latent_conv", torch.cat(halves, dim=1)))

    def _decode(self, codes: Tensor) -> Tensor:
        quantized = torch.stack([self._lookup(q, row) for q, row in enumerate(codes)]).sum(dim=0)
        z = self._convolution("decoder.latent_conv", quantized.transpose(0, 1)[None])
        amplitude, phase = (
            self._trunk(f"decoder.{name}", self._upsampling(f"decoder.{name}.upsample", z))
            for name in ("amplitude", "phase")
        )
        log_amplitude = self._convolution("decoder.log_amplitude_conv", amplitude)
        real = self._convolution("decoder.real_conv", phase)
        imaginary = self._convolution("decoder.imaginary_conv", phase)
        return self._inverse(log_amplitude, torch.atan2(imaginary, real))

    @property
    def _ratio(self) -> int:
        return self.config.downsampling_ratio

    # Transforms

    def _features(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Log amplitude and phase `[1, K, T]` of a clip and the silence that fills its last code frame."""
        config, hop = self.config, self.config.stft_hop_length
        frames = -(-(len(clip) + hop) // (hop * self._ratio)) * self._ratio
        samples = max((frames - 1) * hop, config.n_fft // 2 + 1)  # the reflection needs one more than it takes
        wave = F.pad(clip, (0, samples - len(clip)))[None]
        if self.phase == "settled":
            wave = wave.double()
        window = torch.hann_window(config.win_length, dtype=wave.dtype, device=self.device)
        spectrum = torch.stft(
            wave, config.n_fft, hop, config.win_length, window, center=True, pad_mode="reflect", return_complex=True
        )[..., :frames]
        log_amplitude = ((spectrum.real**2 + spectrum.imag**2).sqrt() + 1e-5).log()
        return log_amplitude.float(), self._angle(spectrum).float()

    def _angle(self, spectrum: Tensor) -> Tensor:
        real, imaginary = spectrum.real, spectrum.imag
        if self.phase == "settled":
            loudest = torch.maximum(real.abs(), imaginary.abs()).amax(dim=1, keepdim=True)
            for part in (real, imaginary):
                part[part.abs() <= 1e-12 * loudest] = 0.0  # what the rounding of float64 leaves of a zero
        return torch.atan2(imaginary, real)

    def _inverse(self, log_amplitude: Tensor, phase: Tensor) -> Tensor:
        config, amplitude = self.config, log_amplitude.exp()
        spectrum = torch.complex(amplitude * phase.cos(), amplitude * phase.sin())
        window = torch.hann_window(config.win_length, device=self.device)
        return torch.istft(spectrum, config.n_fft, config.stft_hop_length, config.win_length, window, center=True)[0]

    # Layers

    def _normed(self, name: str) -> Tensor:
        """A weight of which direction and gain are stored."""
        direction = self.weights[f"{name}.weight_v"]
        norm = direction.norm(dim=tuple(range(1, direction.ndim)), keepdim=True)
        return direction * (self.weights[f"{name}.weight_g"] / norm)

    def _convolution(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self._normed(name)
        return F.conv1d(x, weight, self.weights[f"{name}.bias"], stride, (weight.shape[-1] - 1) // 2)

    def _upsampling(self, name: str, x: Tensor) -> Tensor:
        weight = self._normed(name)
        padding = (weight.shape[-1] - self._ratio) // 2
        return F.conv_transpose1d(x, weight, self.weights[f"{name}.bias"], self._ratio, padding)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps=1e-6)

    def _trunk(self, branch: str, x: Tensor) -> Tensor:
        """`[1, channels, T]` → `[1, size, T]`."""
        name = f"{branch}.trunk"
        x = F.conv1d(x, self.weights[f"{name}.embed.weight"], self.weights[f"{name}.embed.bias"], padding=3)
        x = self._norm(f"{name}.norm", x.transpose(1, 2)).transpose(1, 2)
        for i in range(self.config.num_hidden_layers):
            x = x + self._block(f"{name}.stack.layers.{i}", x)
        x = self._norm(f"{name}.stack.layer_norm", x.transpose(1, 2))
        return self._linear(f"{branch}.out_proj", x).transpose(1, 2)

    def _block(self, name: str, x: Tensor) -> Tensor:
        kernel, bias = self.weights[f"{name}.depthwise_conv.weight"], self.weights[f"{name}.depthwise_conv.bias"]
        x = F.conv1d(x, kernel, bias, padding=3, groups=len(kernel)).transpose(1, 2)
        x = F.gelu(self._linear(f"{name}.up_proj", self._norm(f"{name}.layer_norm", x)))
        if self.config.response_norm:
            norm = x.norm(dim=1, keepdim=True)
            response = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
            gamma, beta = (self.weights[f"{name}.response_norm.{key}"] for key in ("gamma", "beta"))
            return self._linear(f"{name}.down_proj", gamma * (x * response) + beta + x).transpose(1, 2)
        return (self.weights[f"{name}.scale"] * self._linear(f"{name}.down_proj", x)).transpose(1, 2)

    # Codebooks

    def _projected(self, name: str, x: Tensor) -> Tensor:
        if not self.config.codebook_projections:
            return x
        return F.linear(x, self._normed(name), self.weights[f"{name}.bias"])

    def _quantize(self, latents: Tensor) -> Tensor:
        """`[1, D, F]` → `[Q, F]`."""
        residual, codes = latents[0].transpose(0, 1), []
        for q in range(self.config.num_codes):
            z = self._projected(f"quantizer.stages.{q}.in_proj", residual)
            book = self.weights[f"quantizer.stages.{q}.codebook.weight"]
            found, rows = F.normalize(z, dim=-1), F.normalize(book, dim=-1)
            distances = found.square().sum(1, keepdim=True) - 2 * found @ rows.t() + rows.square().sum(1)
            codes.append(distances.argmin(dim=1))
            taken = z + (book[codes[-1]] - z)  # as the straight-through step rounds it
            residual = residual - self._projected(f"quantizer.stages.{q}.out_proj", taken)
        return torch.stack(codes)

    def _lookup(self, q: int, codes: Tensor) -> Tensor:
        rows = F.embedding(codes, self.weights[f"quantizer.stages.{q}.codebook.weight"])
        return self._projected(f"quantizer.stages.{q}.out_proj", rows)
