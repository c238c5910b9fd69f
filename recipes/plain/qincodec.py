"""The rival of the benchmark: QinCodec as a careful user writes it down from the papers, without audiotok.

Careful: float32, eval mode, `torch.no_grad`, and clip by clip, so that nothing needs a mask and every clip has the
codes that it has alone. Plain: eager calls in the published structure. The autoencoder is Vocos' trunk with
convolutions on channels first. QINCo2's beam search evaluates the whole network of a step for every candidate of
every beam, and ranks with `topk`; vectors are cut into blocks of 65,536 candidates, as the published code does it.

Nothing is shared with the package's model but the weights, so equal codes also mean two implementations that agree.
Shapes: N samples, F frames, D latent dimensions, M steps, K codewords of each, B beams, A candidates a beam.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from audiotok import QinCodecModel

MAX_CANDIDATES = 65_536


class Beams(NamedTuple):
    """Partial codes `[F, B, m]` of each frame and their reconstructions `[F, B, D]`."""

    codes: Tensor
    xhat: Tensor


class PlainQinCodec:
    """Codes of waveforms and back.

    Args:
        codec: gives configuration and weights, which are not copied; of our own autoencoder with QINCo2.
    """

    def __init__(self, codec: QinCodecModel) -> None:
        self.config, self.quantizer = codec.config, codec.config.quantizer_block
        self.weights = codec.state_dict()
        self.device = codec.device

    @torch.no_grad()
    def encode(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Waveforms `[N_i]` → codes `[M, F_i]` of each, `F_i = ceil(N_i / hop)`."""
        return [self._quantize(self._trunk("encoder", self._features(clip))).T for clip in clips]

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Codes `[M, F_i]` → waveforms `[F_i * hop]`."""
        return [self._istft(self._trunk("decoder", self._dequantize(row.T).T)) for row in codes]

    # Spectra

    def _features(self, clip: Tensor) -> Tensor:
        """`[N]` → compressed spectrum `[n_fft + 2, F]`, real parts before imaginary ones."""
        n_fft, hop = self.config.n_fft, self.config.hop_length
        edge = (n_fft - hop) // 2
        padded = F.pad(clip, (edge, -len(clip) % hop + edge))
        window = torch.hann_window(n_fft, device=self.device)
        spectrum = torch.stft(padded, n_fft, hop, n_fft, window, center=False, return_complex=True)
        spectrum = spectrum * (spectrum.real**2 + spectrum.imag**2 + 1e-7) ** ((self.config.feature_exponent - 1) / 2)
        return torch.cat([spectrum.real, spectrum.imag])

    def _istft(self, x: Tensor) -> Tensor:
        """`[F, n_fft + 2]`, log-magnitudes before phases → `[F * hop]`."""
        n_fft, hop = self.config.n_fft, self.config.hop_length
        log_magnitude, phase = x.chunk(2, dim=-1)
        level = log_magnitude.clamp(max=math.log(n_fft / 2)).exp()
        window = torch.hann_window(n_fft, device=self.device)
        frames = torch.fft.irfft(level * (phase.cos() + 1j * phase.sin()), dim=-1) * window
        energy = (window**2).expand(len(x), -1)
        total, cut = (len(x) - 1) * hop + n_fft, (n_fft - hop) // 2
        signal, envelope = (
            F.fold(part.T[None], (1, total), (1, n_fft), stride=(1, hop))[0, 0, 0, cut:-cut]
            for part in (frames, energy)
        )
        return signal / envelope

    # Trunks

    def _trunk(self, side: str, x: Tensor) -> Tensor:
        """`[in, F]` → `[F, out]`."""
        name = f"autoencoder.{side}"
        embed = f"{name}.backbone.embed"
        x = F.conv1d(x[None], self.weights[f"{embed}.weight"], self.weights[f"{embed}.bias"], padding=3)[0].T
        x = self._norm(f"{name}.backbone.norm", x)
        for i in range(self.config.num_layers):
            x = self._block(f"{name}.backbone.stack.layers.{i}", x)
        return self._linear(f"{name}.out", self._norm(f"{name}.backbone.stack.layer_norm", x))

    def _block(self, name: str, x: Tensor) -> Tensor:
        kernel, bias = self.weights[f"{name}.depthwise_conv.weight"], self.weights[f"{name}.depthwise_conv.bias"]
        # Padding first: with `padding=` a depthwise convolution takes up to ten times as long on a CPU.
        u = F.conv1d(F.pad(x.T[None], (3, 3)), kernel, bias, groups=x.shape[1])[0].T
        u = F.gelu(self._linear(f"{name}.up_proj", self._norm(f"{name}.layer_norm", u)))
        return x + self.weights[f"{name}.scale"] * self._linear(f"{name}.down_proj", u)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6)

    # QINCo2

    def _quantize(self, latents: Tensor) -> Tensor:
        """`[F, D]` → codes `[F, M]`."""
        x = (latents - self.weights["quantizer.data_mean"]) / self.weights["quantizer.data_std"]
        block = max(1, MAX_CANDIDATES // (self.quantizer.beam_size * self._num_candidates))
        return torch.cat([self._search(part) for part in x.split(block)])

    def _search(self, x: Tensor) -> Tensor:
        """Codes `[F, M]` of normalised vectors: the beams nearest to them after each step, and the best of the last."""
        beams = Beams(x.new_zeros(len(x), 1, 0, dtype=torch.long), x.new_zeros(len(x), 1, x.shape[1]))
        for step in range(self.config.num_codes):
            last = step == self.config.num_codes - 1
            beams = self._extend(step, x, beams, 1 if last else self.quantizer.beam_size)
        return beams.codes[:, 0]

    def _extend(self, step: int, x: Tensor, beams: Beams, keep: int) -> Beams:
        candidates = self._candidates(step, x[:, None] - beams.xhat)  # [F, B, A]
        before = beams.xhat[:, :, None].expand(*candidates.shape, -1)
        after = before + self._codeword(step, candidates, before)
        distances = (x[:, None, None] - after).square().sum(dim=-1).flatten(1)
        best = distances.topk(min(keep, distances.shape[1]), largest=False).indices  # [F, B]
        frame, beam = torch.arange(len(x), device=x.device)[:, None], best // candidates.shape[2]
        codes = torch.cat([beams.codes[frame, beam], candidates.flatten(1)[frame, best][..., None]], dim=-1)
        return Beams(codes, after.flatten(1, 2)[frame, best])

    def _candidates(self, step: int, residual: Tensor) -> Tensor:
        """The codes to try for residuals `[F, B, D]`, `[F, B, A]`: by the step's second table, or all of them."""
        if step == 0 or self._num_candidates == self.quantizer.codebook_size:
            return torch.arange(self.quantizer.codebook_size, device=residual.device).expand(*residual.shape[:2], -1)
        table = self.weights[f"quantizer.steps.{step}.substep.codebook.weight"]
        distances = residual.square().sum(-1, keepdim=True) + table.square().sum(-1) - 2 * residual @ table.T
        return distances.topk(self._num_candidates, largest=False).indices

    @property
    def _num_candidates(self) -> int:
        return self.quantizer.num_candidates or self.quantizer.codebook_size

    def _codeword(self, step: int, codes: Tensor, xhat: Tensor) -> Tensor:
        """f(c, xhat) for codes `[...]` and the reconstructions so far `[..., D]`, as the papers write it."""
        name = f"quantizer.steps.{step}"
        c = F.embedding(codes, self.weights[f"{name}.codebook.weight"])
        if step == 0:
            return c
        projected = f"{name}.in_proj.weight" in self.weights
        z = self._linear(f"{name}.in_proj", c) if projected else c
        z = z + self._linear(f"{name}.concat.mlp", torch.cat([z, xhat], dim=-1))
        for i in range(self.quantizer.num_blocks):
            block = f"{name}.residual_blocks.{i}"
            z = z + self._linear(f"{block}.down_proj", F.relu(self._linear(f"{block}.up_proj", z)))
        y = self._linear(f"{name}.out_proj", z) if projected else z
        return y if self.quantizer.qinco1_mode else c + y

    def _dequantize(self, codes: Tensor) -> Tensor:
        """Codes `[F, m]`, the first m of any encoding → latents `[F, D]`."""
        xhat = torch.zeros(len(codes), self.config.latent_dim, device=self.device)
        for step, column in enumerate(codes.unbind(1)):
            xhat = xhat + self._codeword(step, column, xhat)
        return xhat * self.weights["quantizer.data_std"] + self.weights["quantizer.data_mean"]
