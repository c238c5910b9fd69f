"""ConvNeXt blocks: a clip in a padded batch is computed as it is alone, with and without the norm over time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from audiotok.errors import ConfigError
from audiotok.nn.convnext import GlobalResponseNorm, VocosBackbone
from audiotok.nn.history import History

FRAMES = [11, 4, 7]


def backbone(**options: bool) -> VocosBackbone:
    torch.manual_seed(0)
    trunk = VocosBackbone(6, 16, 24, 3, **options)
    for parameter in trunk.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return trunk.eval()


def batch() -> tuple[Tensor, Tensor]:
    """Random frames `[B, 6, F]`, also where no frame exists, and which exist."""
    x = torch.randn(len(FRAMES), 6, max(FRAMES), generator=torch.Generator().manual_seed(1))
    return x, torch.arange(max(FRAMES)) < torch.tensor(FRAMES)[:, None]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"response_norm": True, "layer_scale": False}])
def test_what_lies_behind_a_clips_end_changes_nothing(options: dict[str, bool]) -> None:
    trunk, (x, valid) = backbone(**options), batch()
    together = trunk(x, valid)
    for row, count in enumerate(FRAMES):
        alone = trunk(x[row : row + 1, :, :count])[0]
        torch.testing.assert_close(together[row, :count], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("reaches", [False, True])
def test_only_the_norm_over_time_reaches_every_frame(reaches: bool) -> None:
    trunk = VocosBackbone(6, 16, 24, 1, response_norm=reaches).eval()
    for parameter in trunk.parameters():
        parameter.data.add_(0.2)
    x, _ = batch()
    changed = x.clone()
    changed[:, :, -1] += 1  # 10 frames from the first one; convolutions reach 3 + 3
    assert (trunk(x)[:, 0] != trunk(changed)[:, 0]).any() == reaches


@torch.no_grad()
def test_channels_are_weighed_by_their_norm_over_time() -> None:
    norm = GlobalResponseNorm(3)
    norm.gamma.copy_(torch.tensor([1.0, 2.0, 0.5]))
    norm.beta.copy_(torch.tensor([0.0, 0.1, -0.1]))
    z = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(2))
    size = [z[0, :, c].square().sum().sqrt() for c in range(3)]
    for c in range(3):
        expected = norm.gamma[c] * z[0, :, c] * (size[c] / (sum(size) / 3 + 1e-6)) + norm.beta[c] + z[0, :, c]
        torch.testing.assert_close(norm(z, None)[0, :, c], expected)


# Causal


def test_causal_blocks_go_on_where_they_stopped() -> None:
    trunk = backbone(causal=True)
    x = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = trunk(x)
        history = History()
        pieces = [trunk.states(part, None, history)[0] for part in x.split([1, 5, 7, 7], dim=-1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-6, rtol=0)
        changed = x.clone()
        changed[..., 12:] += 1
        torch.testing.assert_close(trunk(changed)[:, :12], expected[:, :12], atol=1e-6, rtol=0)
        assert not torch.equal(trunk(changed)[:, 12], expected[:, 12])


def test_a_causal_block_refuses_the_norm_over_time() -> None:
    with pytest.raises(ConfigError, match="response_norm"):
        VocosBackbone(4, 8, 12, 2, causal=True, response_norm=True)
