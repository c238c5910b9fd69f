"""APCodec trains on the published losses, on masked batches as on clips alone, and after a teacher."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from audiotok import ApCodecConfig, ApCodecModel
from audiotok.codecs.apcodec.blocks_apcodec import Decoded
from audiotok.codecs.apcodec.losses_apcodec import ReconstructionLosses
from audiotok.errors import ConfigError

SMALL = {
    "sampling_rate": 8000,
    "n_fft": 64,
    "win_length": 32,
    "stft_hop_length": 8,
    "downsampling_ratio": 4,
    "trunk_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "amplitude_size": 12,
    "phase_size": 8,
    "hidden_size": 8,
    "num_codebooks": 3,
    "codebook_size": 32,
    "upsample_kernel_size": 8,
    "num_mels": 10,
}
CAUSAL = {**SMALL, "causal": True, "response_norm": False, "downsample_kernel_size": 6}
# Their names in the recorded file → ours.
RECORDED = {
    "L_A": "amplitude",
    "L_IP": "phase",
    "L_GD": "group_delay",
    "L_PTD": "phase_difference",
    "L_C": "consistency",
    "L_R": "real",
    "L_I": "imaginary",
    "L_Mel": "log_mel",
    "L_Mel_L2": "log_mel_squared",
}


def small(seed: int = 0, **keys: object) -> ApCodecModel:
    torch.manual_seed(seed)
    return ApCodecModel(ApCodecConfig(**{**SMALL, **keys}))


def noise(batch: int, samples: int, seed: int = 1) -> Tensor:
    return 0.1 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed))


# The recorded losses


@pytest.fixture
def recorded(golden: Callable) -> dict[str, Tensor]:
    return golden("apcodec").vectors("losses/vectors")


def test_reconstruction_losses(recorded: dict[str, Tensor]) -> None:
    """The decoder's spectrum is that of `src`, its waveform is `y_g`, the recording is `y`."""
    losses = ReconstructionLosses(ApCodecConfig())
    front_end, samples = losses.front_end, recorded["y"].shape[1]
    lengths, kinds = [samples] * 2, ["published"] * 2
    log_amplitude, phase = front_end(recorded["src"], lengths, kinds)
    decoded = Decoded(log_amplitude, phase, log_amplitude, log_amplitude, [], [])
    found = losses(front_end(recorded["y"], lengths, kinds), decoded, recorded["y_g"], lengths)
    assert set(found) == set(RECORDED.values())
    for theirs, ours in RECORDED.items():
        torch.testing.assert_close(found[ours][None], recorded[f"loss.{theirs}"], rtol=1e-4, atol=0, msg=ours)


def test_published_weights(recorded: dict[str, Tensor]) -> None:
    """Those that `ApCodecModel.forward` names make the generator's loss of the recorded terms."""
    weights = {"amplitude": 45, "phase": 100, "group_delay": 100, "phase_difference": 100, "consistency": 20}
    weights |= {"real": 45, "imaginary": 45, "log_mel": 45, "log_mel_squared": 45}
    total = sum(weights[ours] * recorded[f"loss.{theirs}"] for theirs, ours in RECORDED.items())
    total += 2.5 * recorded["loss.commitment_loss_in"] + 10 * recorded["loss.codebook_loss_in"]
    total += recorded["loss.L_GAN_G"] + recorded["loss.L_FM"]
    torch.testing.assert_close(total, recorded["loss.L_G"], rtol=1e-5, atol=0)
    assert ApCodecConfig().commitment_cost == 2.5 / 10


def test_log_mel(recorded: dict[str, Tensor]) -> None:
    losses = ReconstructionLosses(ApCodecConfig())
    for name, mel in (("y", "mel"), ("y_g", "mel_g")):
        wave = recorded[name]
        spectrum = losses.front_end.spectrum(wave, [wave.shape[1]] * 2, recorded[mel].shape[-1])
        torch.testing.assert_close(losses.log_mel(spectrum), recorded[mel], atol=1e-4, rtol=0)


@pytest.mark.parametrize("network", ["v1", "v2"])
def test_forward_gives_the_recorded_quantizer_losses(network: str, golden: Callable) -> None:
    from audiotok.codecs.apcodec.conversion_apcodec import convert

    files, case = golden("apcodec"), f"tiny_{network}"
    config, state = convert([files.path(f"{case}/weights.safetensors")], files.path(f"{case}/config.json"))
    codec = ApCodecModel(config).train()
    codec.load_state_dict(state)
    v = files.vectors(f"{case}/vectors")
    output = codec(v["audio"][:, None])
    assert torch.equal(output.audio_codes, v["codes"].long())
    torch.testing.assert_close(output.audio_values, v["audio_out"], atol=2e-5, rtol=0)
    for name in ("commitment", "codebook"):
        torch.testing.assert_close(output.losses[name][None], v[f"quantizer.{name}_loss"], rtol=1e-4, atol=0)
    expected = config.commitment_cost * output.losses["commitment"] + output.losses["codebook"]
    torch.testing.assert_close(output.loss, expected)


# Gradients


def reached(codec: ApCodecModel, loss: Tensor) -> set[str]:
    """Parts of the model that a loss moves."""
    codec.zero_grad()
    loss.backward(retain_graph=True)
    touched = {name for name, p in codec.named_parameters() if p.grad is not None and bool(p.grad.any())}
    return {".".join(name.split(".")[:2]) if "quantizer" not in name else "quantizer" for name in touched}


@pytest.mark.parametrize("keys", [{}, {"response_norm": False, "codebook_projections": False}, CAUSAL], ids=str)
def test_each_loss_moves_its_own_side(keys: dict) -> None:
    codec = small(**keys).train()
    losses = codec(noise(2, 400)).losses
    encoder = {"encoder.amplitude", "encoder.phase", "encoder.latent_conv"}
    shared = encoder | {"decoder.latent_conv"} | ({"quantizer"} if codec.config.codebook_projections else set())
    amplitude = {"decoder.amplitude", "decoder.log_amplitude_conv"}
    phase = {"decoder.phase", "decoder.real_conv", "decoder.imaginary_conv"}
    assert reached(codec, losses["amplitude"]) - {"quantizer"} == (shared | amplitude) - {"quantizer"}
    for name in ("phase", "group_delay", "phase_difference"):
        assert reached(codec, losses[name]) - {"quantizer"} == (shared | phase) - {"quantizer"}
    for name in ("real", "imaginary", "consistency", "log_mel", "log_mel_squared"):
        assert reached(codec, losses[name]) >= (shared | amplitude | phase) - {"quantizer"}
    assert encoder <= reached(codec, losses["commitment"])
    assert not any(part.startswith("decoder") for part in reached(codec, losses["commitment"]))
    assert not any(part.startswith("decoder") for part in reached(codec, losses["codebook"]))


@pytest.mark.parametrize("projections", [True, False])
def test_gradients_pass_straight_through_the_quantizer(projections: bool) -> None:
    """As if each stage were its projections alone, on the rows that were found: the formula of the paper."""
    codec = small(codebook_projections=projections)
    latents = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(2), requires_grad=True)
    result = codec.quantizer(latents)
    weight = torch.randn(result.quantized.shape, generator=torch.Generator().manual_seed(3))
    (found,) = torch.autograd.grad((result.quantized * weight).sum(), latents)
    residual = latents.transpose(1, 2)
    total = torch.zeros_like(residual)
    for stage in codec.quantizer.in_order:
        passed = stage.out_proj(stage.in_proj(residual))
        residual, total = residual - passed, total + passed
    (expected,) = torch.autograd.grad((total.transpose(1, 2) * weight).sum(), latents)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert bool(found.any())


# Masked batches


@pytest.mark.parametrize("keys", [{}, {"response_norm": False}, CAUSAL], ids=["v2", "v1", "causal"])
def test_losses_of_a_padded_batch(keys: dict) -> None:
    """The mean over the frames that exist: of clips alone, weighed by their frames."""
    codec, lengths = small(**keys).eval(), [501, 203, 97]
    waves = noise(3, 501)
    mask = (torch.arange(501) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        together = codec(waves, mask)
        alone = [codec(waves[i : i + 1, :, :n], torch.ones(1, n)) for i, n in enumerate(lengths)]
    counts = torch.tensor([codec.facts.num_frames(n) * codec.config.downsampling_ratio for n in lengths]).float()
    hop = codec.config.stft_hop_length
    heard = torch.tensor([codec.facts.held_samples(codec.facts.num_frames(n)) // hop for n in lengths]).float()
    for name in RECORDED.values():
        weights = counts
        if codec.config.causal and name in ("consistency", "log_mel", "log_mel_squared"):
            weights = heard
        expected = (torch.stack([one.losses[name] for one in alone]) * weights).sum() / weights.sum()
        torch.testing.assert_close(together.losses[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    frames = torch.tensor([codec.facts.num_frames(n) for n in lengths]).float()
    for name in ("commitment", "codebook"):
        expected = (torch.stack([one.losses[name] for one in alone]) * frames).sum() / frames.sum()
        torch.testing.assert_close(together.losses[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(together.audio_values[i : i + 1, :, :n], alone[i].audio_values, atol=1e-5, rtol=0)
        assert not bool(together.audio_values[i, :, n:].any())


def test_noise_stands_for_the_search() -> None:
    codec, waves = small().train(), noise(2, 400)
    output = codec(waves, latent_noise=torch.tensor([0.0, 0.5]))
    assert output.audio_codes is None and output.loss is None
    assert not {"commitment", "codebook"} & set(output.losses)
    sum(output.losses.values()).backward()
    assert bool(codec.encoder.latent_conv.weight_v.grad.any())
    with torch.no_grad():
        again = codec(waves, latent_noise=torch.tensor([0.0, 0.5])).audio_values
    assert torch.equal(output.audio_values[0], again[0])
    assert not torch.equal(output.audio_values[1], again[1])


def test_training_starts_as_published() -> None:
    codec = small()
    trunk = codec.encoder.amplitude.trunk
    assert not trunk.embed.bias.any() and not trunk.stack.layers[0].up_proj.bias.any()
    assert trunk.embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not trunk.stack.layers[0].response_norm.gamma.any()
    assert not codec.decoder.latent_conv.bias.any() and codec.encoder.latent_conv.bias.any()
    assert codec.encoder.amplitude.out_proj.bias.any()
    assert small(response_norm=False).encoder.phase.trunk.stack.layers[1].scale[0].item() == 1 / 2
    assert codec.quantizer.in_order[0].codebook.weight.std().item() == pytest.approx(1, rel=0.15)


# A teacher


def test_a_teacher_is_matched_frame_by_frame() -> None:
    """Its features lie on ours: a teacher with the student's transform of delayed sound has the same spectra."""
    student, teacher = small(**CAUSAL).eval(), small(seed=1).eval()
    waves = noise(1, 640)
    with torch.no_grad():
        frames = student.encoder.front_end.num_frames(640)
        held = student.facts.held_samples(frames // 4)
        samples = held + student.config.delay
        delayed = torch.nn.functional.pad(waves[:, 0], (student.config.delay, held - 640))
        mine = student.encoder.front_end(waves[:, 0], [640], ["settled"])
        theirs = teacher.encoder.front_end(delayed, [samples], ["settled"])
        inner = slice(1, frames - 1)  # the teacher reflects at both ends of what is held
        torch.testing.assert_close(mine[0][..., inner], theirs[0][..., inner], atol=1e-5, rtol=0)
        targets = student.distillation_targets(teacher, waves)
        latents = teacher.encoder(delayed, [samples], ["settled"]).latents
    assert any(torch.equal(target, latents.transpose(1, 2)) for target in targets)
    output = student(waves, distillation_targets=targets)
    assert len(targets) == 4 * 3 + 5
    assert {target.shape[1] for target in targets} == {frames, frames // 4}
    assert not any(target.requires_grad for target in targets)
    assert output.losses["distillation"].item() > 0


def test_distillation_moves_the_student_alone_and_ends_at_its_teacher() -> None:
    student, teacher = small(**CAUSAL).train(), small(seed=1).eval()
    waves = noise(2, 640)
    targets = student.distillation_targets(teacher, waves)
    output = student(waves, distillation_targets=targets)
    output.losses["distillation"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    moved = [name for name, p in student.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert {name.split(".")[0] for name in moved} >= {"encoder", "decoder"}
    twin, ones = small(seed=1).eval(), torch.ones(2, 640)  # a student that is its teacher has nothing to learn
    same = twin(waves, ones, distillation_targets=twin.distillation_targets(teacher, waves, ones))
    assert same.losses["distillation"].item() < 1e-9


def test_distillation_counts_only_frames_that_exist() -> None:
    student, teacher = small(**CAUSAL).eval(), small(seed=1).eval()
    waves, lengths = noise(2, 640), [640, 256]
    mask = (torch.arange(640) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        together = student(waves, mask, distillation_targets=student.distillation_targets(teacher, waves, mask))
        alone = []
        for i, n in enumerate(lengths):
            clip, ones = waves[i : i + 1, :, :n], torch.ones(1, n)
            alone.append(student(clip, ones, distillation_targets=student.distillation_targets(teacher, clip, ones)))
    frames = torch.tensor([student.facts.num_frames(n) for n in lengths]).float()
    expected = (torch.stack([one.losses["distillation"] for one in alone]) * frames).sum() / frames.sum()
    torch.testing.assert_close(together.losses["distillation"], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("keys", [{"trunk_size": 20}, {"hidden_size": 4}, {"win_length": 24}, CAUSAL], ids=str)
def test_teachers_that_do_not_fit_are_refused(keys: dict) -> None:
    student = small(**CAUSAL)
    with pytest.raises(ConfigError, match="eacher"):
        student.distillation_targets(small(**keys), noise(1, 320))
