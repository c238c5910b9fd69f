"""Weight-normalised layers are torch's, without its parametrization."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from audiotok.nn.weight_norm import WeightNormConv1d, WeightNormConvTranspose1d, WeightNormLinear

LAYERS = {
    "linear": (WeightNormLinear(6, 4), nn.Linear(6, 4), (2, 5, 6)),
    "conv": (
        WeightNormConv1d(6, 4, 5, stride=2, padding=4, dilation=2),
        nn.Conv1d(6, 4, 5, stride=2, padding=4, dilation=2),
        (2, 6, 20),
    ),
    "transposed": (
        WeightNormConvTranspose1d(6, 4, 5, stride=3, padding=2, output_padding=1),
        nn.ConvTranspose1d(6, 4, 5, stride=3, padding=2, output_padding=1),
        (2, 6, 9),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_layer_is_that_of_torch(kind: str) -> None:
    ours, plain, shape = LAYERS[kind]
    with torch.no_grad():
        ours.weight_g.mul_(torch.rand_like(ours.weight_g) + 0.5)
    theirs = weight_norm(plain)
    state = ours.state_dict()
    theirs.load_state_dict(
        {
            "bias": state["bias"],
            "parametrizations.weight.original0": state["weight_g"],
            "parametrizations.weight.original1": state["weight_v"],
        }
    )
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_layer_starts_as_torch_starts_the_plain_one(kind: str) -> None:
    ours, plain, _ = LAYERS[kind]
    fresh = pickle.loads(pickle.dumps(ours))
    fresh.reset_parameters()
    bound = nn.init._calculate_fan_in_and_fan_out(plain.weight)[0] ** -0.5
    assert 0.8 * bound < fresh.weight_v.abs().max() <= bound
    torch.testing.assert_close(fresh.weight, fresh.weight_v)
