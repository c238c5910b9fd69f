"""The rival of the benchmark: AUV as a careful user runs the published code, without audiotok.

Careful: float32, eval mode, `torch.no_grad`, a whole batch at once, and right: clips of different lengths are padded
to the longest, with the reflection at each clip's own end and masks in attention, convolution and overlap-add, so that
every clip has the codes that it has alone. Plain: eager modules in the published structure (pointwise convolutions
on transposed frames, weight norm computed in every call), the whole matrix of distances to a codebook that is
normalised in every call, and work on padding.

Nothing is shared with the package's model but the weights, so equal codes also mean two implementations that agree.
Shapes: B clips, N samples, F frames, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from audiotok import AuvModel
from audiotok.codecs.auv.configuration_auv import AuvStack

SUBFRAMES, SUBFRAME_BANDS = 4, 64


class PlainAuv:
    """Codes of waveforms and back.

    Args:
        codec: gives configuration and weights, which are not copied.
    """

    def __init__(self, codec: AuvModel) -> None:
        self.config = codec.config
        self.weights = codec.state_dict()
        self.device = codec.device

    @torch.no_grad()
    def encode(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Waveforms `[N_i]` as one batch → codes `[Q, F_i]` of each."""
        hop = self.config.hop_length
        shortest = self.config.edge + 1  # the reflection needs one sample more than it takes
        whole = [F.pad(clip, (0, max(-len(clip) % hop, shortest - len(clip)))) for clip in clips]
        frames = [len(clip) // hop for clip in whole]
        x = self._linear("encoder.input_proj", self._features(whole, max(frames)))
        x = self._stack("encoder", self.config.encoder_stack, x, self._mask(frames))
        codes = self._quantize(x)
        return [row[:, :count] for row, count in zip(codes, frames, strict=True)]

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Codes `[Q, F_i]` as one batch → waveforms `[F_i * hop]`."""
        frames = [row.shape[1] for row in codes]
        padded = torch.stack([F.pad(row, (0, max(frames) - row.shape[1])) for row in codes])
        x = sum(self._lookup(q, padded[:, q]) for q in range(padded.shape[1]))
        mask = self._mask(frames)
        x = self._linear("decoder.head", self._stack("decoder", self.config.decoder_stack, x, mask))
        audio = self._istft(x, mask)
        return [row[: count * self.config.hop_length] for row, count in zip(audio, frames, strict=True)]

    def _mask(self, frames: list[int]) -> Tensor | None:
        """`[B, F]`, True where a frame exists; a careful user leaves masks out of batches of one length."""
        if min(frames) == max(frames):
            return None
        return torch.arange(max(frames), device=self.device) < torch.tensor(frames, device=self.device)[:, None]

    # Front end

    def _features(self, clips: list[Tensor], num_frames: int) -> Tensor:
        config, features = self.config, {}
        if {"log_magnitude", "phase"} & set(config.input_features):
            spectrum = self._stft(clips, config.n_fft, config.hop_length, config.n_fft, num_frames)
            features["log_magnitude"] = self._standardized((spectrum.abs() + 1e-5).log(), 4, 3)
            imaginary = spectrum.imag.clone()
            imaginary[..., [0, -1]] = 0.0
            features["phase"] = torch.atan2(imaginary, spectrum.real)
        if "subframe_mel" in config.input_features:
            n_fft = 1 << (config.hop_length - 1).bit_length()
            filters = mel_filter_bank(
                n_fft // 2 + 1,
                SUBFRAME_BANDS,
                0.0,
                config.sampling_rate / 2,
                config.sampling_rate,
                mel_scale="slaney",
            )
            hop, count = config.hop_length // SUBFRAMES, num_frames * SUBFRAMES
            spectrum = self._stft(clips, n_fft, hop, config.hop_length, count)
            mel = spectrum.abs() @ torch.from_numpy(filters).float().to(self.device)
            mel = self._standardized((mel + 1e-4).log(), 2, 3)
            features["subframe_mel"] = mel.reshape(len(clips), num_frames, -1)
        return torch.cat([features[name] for name in config.input_features], dim=-1)

    def _standardized(self, x: Tensor, shift: float, scale: float) -> Tensor:
        return (x + shift) / scale if self.config.standardize_features else x

    def _stft(self, clips: list[Tensor], n_fft: int, hop: int, window: int, num_frames: int) -> Tensor:
        """`[B, F, n_fft / 2 + 1]`, each clip reflected at its own end."""
        total, edge = (num_frames - 1) * hop + n_fft, (n_fft - hop) // 2
        rows = [F.pad(clip[None], (edge, edge), mode="reflect")[0, :total] for clip in clips]
        padded = torch.stack([F.pad(row, (0, total - len(row))) for row in rows])
        hann = torch.hann_window(window, device=self.device)
        return torch.stft(padded, n_fft, hop, window, hann, center=False, return_complex=True).transpose(1, 2)

    # Blocks

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _stack(self, side: str, stack: AuvStack, x: Tensor, mask: Tensor | None) -> Tensor:
        block = self._conformer if stack.block_type == "conformer" else self._convnext
        for i in range(stack.num_layers):
            x = block(f"{side}.backbone.layers.{i}", stack, x, mask)
        return self._norm(f"{side}.backbone.layer_norm", x)

    def _conformer(self, name: str, stack: AuvStack, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + 0.5 * self._feed_forward(f"{name}.ffn1", self._norm(f"{name}.ffn1_layer_norm", x))
        x = x + self._attention(f"{name}.attn", stack, self._norm(f"{name}.attn_layer_norm", x), mask)
        x = x + self._convolution(f"{name}.conv_module", stack, x, mask)
        x = x + 0.5 * self._feed_forward(f"{name}.ffn2", self._norm(f"{name}.ffn2_layer_norm", x))
        return self._norm(f"{name}.final_layer_norm", x)

    def _feed_forward(self, name: str, x: Tensor) -> Tensor:
        return self._linear(f"{name}.down_proj", F.gelu(self._linear(f"{name}.up_proj", x), approximate="tanh"))

    def _attention(self, name: str, stack: AuvStack, x: Tensor, mask: Tensor | None) -> Tensor:
        heads = stack.num_attention_heads or self.config.hidden_size // stack.head_dim
        q, k, v = (
            part.view(*x.shape[:2], heads, stack.head_dim).transpose(1, 2)
            for part in self._linear(f"{name}.to_qkv", x).chunk(3, dim=-1)
        )
        scale = None
        if stack.qk_norm:
            scale = stack.qk_norm_scale
            q = F.normalize(q, dim=-1) * self.weights[f"{name}.q_norm.gamma"]
            k = F.normalize(k, dim=-1) * self.weights[f"{name}.k_norm.gamma"]
        keys = None if mask is None else mask[:, None, None, :]
        out = F.scaled_dot_product_attention(_rotate(q), _rotate(k), v, keys, scale=scale)
        return self._linear(f"{name}.to_out", out.transpose(1, 2).reshape(*x.shape[:2], -1))

    def _convolution(self, name: str, stack: AuvStack, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self._norm(f"{name}.layer_norm", x).transpose(1, 2)
        x = F.glu(F.conv1d(x, self.weights[f"{name}.pointwise_conv1.weight"][..., None]), dim=1)
        if mask is not None:
            x = x * mask[:, None]
        kernel = self.weights[f"{name}.depthwise_conv.weight"]
        size = kernel.shape[-1]
        # Padding first: with `padding=` the convolution of wide kernels takes ten times as long on a CPU.
        x = F.pad(x, (size - 1, 0) if stack.causal_conv else ((size - 1) // 2, (size - 1) // 2))
        x = F.conv1d(x, kernel, groups=x.shape[1])
        bn = {key: self.weights[f"{name}.conv_norm.{key}"] for key in ("running_mean", "running_var", "weight", "bias")}
        x = F.gelu(F.batch_norm(x, **bn), approximate="tanh")
        return F.conv1d(x, self.weights[f"{name}.pointwise_conv2.weight"][..., None]).transpose(1, 2)

    def _convnext(self, name: str, stack: AuvStack, x: Tensor, mask: Tensor | None) -> Tensor:
        h = (x if mask is None else x * mask[..., None]).transpose(1, 2)
        edge = (stack.conv_kernel_size - 1) // 2
        kernel, bias = self.weights[f"{name}.depthwise_conv.weight"], self.weights[f"{name}.depthwise_conv.bias"]
        h = F.conv1d(F.pad(h, (edge, edge)), kernel, bias, groups=h.shape[1]).transpose(1, 2)
        h = F.gelu(self._linear(f"{name}.up_proj", self._norm(f"{name}.layer_norm", h)))
        return x + self.weights[f"{name}.scale"] * self._linear(f"{name}.down_proj", h)

    # Codebook

    def _projected(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.bias" not in self.weights:
            return x
        gain, direction = self.weights[f"{name}.weight_g"], self.weights[f"{name}.weight_v"]
        return F.linear(x, direction * (gain / direction.norm(dim=1, keepdim=True)), self.weights[f"{name}.bias"])

    def _quantize(self, x: Tensor) -> Tensor:
        """`[B, F, C]` → `[B, Q, F]`."""
        codes = []
        for q in range(len(self.config.codebook_sizes)):
            z = self._projected(f"quantizer.stages.{q}.in_proj", x)
            rows = F.normalize(self.weights[f"quantizer.stages.{q}.codebook.weight"], dim=-1)
            latents = F.normalize(z.flatten(0, 1), dim=-1)
            distances = latents.square().sum(1, keepdim=True) - 2 * latents @ rows.t() + rows.square().sum(1)
            codes.append(distances.argmin(dim=1).view(x.shape[:2]))
            x = x - self._lookup(q, codes[-1])
        return torch.stack(codes, dim=1)

    def _lookup(self, q: int, codes: Tensor) -> Tensor:
        rows = F.embedding(codes, self.weights[f"quantizer.stages.{q}.codebook.weight"])
        return self._projected(f"quantizer.stages.{q}.out_proj", rows)

    # Head

    def _istft(self, x: Tensor, mask: Tensor | None) -> Tensor:
        log_magnitude, phase = x.chunk(2, dim=-1)
        level = log_magnitude.exp().clamp(max=100.0)
        frames = torch.fft.irfft(level * (phase.cos() + 1j * phase.sin()), dim=-1)
        n_fft, hop = self.config.n_fft, self.config.hop_length
        window = torch.hann_window(n_fft, device=self.device)
        frames, energy = frames * window, window.square().expand(*frames.shape)
        if mask is not None:
            frames, energy = frames * mask[..., None], energy * mask[..., None]
        total, cut = (frames.shape[1] - 1) * hop + n_fft, (n_fft - hop) // 2
        signal, envelope = (
            F.fold(part.transpose(1, 2), (1, total), (1, n_fft), stride=(1, hop))[:, 0, 0, cut:-cut]
            for part in (frames, energy)
        )
        return signal / envelope.clamp(min=1e-11)


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions by halves, `[B, H, F, d]`."""
    size = x.shape[-1]
    inverse = 1.0 / 10000.0 ** (torch.arange(0, size, 2, device=x.device).float() / size)
    angles = (torch.arange(x.shape[2], device=x.device).float()[:, None] * inverse).repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
