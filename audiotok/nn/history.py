"""What causal layers remember between the pieces of a stream.

A causal layer reads some frames before its own: at the start of a clip they are zeros, in a stream they are the last
ones of the piece before. The state belongs to whoever streams, never to the layer, so one model serves any number of
streams at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class History:
    """The state of the layers of one stream; empty at the start of a clip. Weights must not change meanwhile.

    Attributes:
        inputs: of each layer the last ones, as many as it looks back.
        weights: of weight-normalised layers, normalised once a stream and not once a piece.
    """

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, Tensor] = {}
        self.weights: dict[nn.Module, Tensor] = {}


def extend_left(x: Tensor, count: int, history: History | None, layer: nn.Module, dim: int = -1) -> Tensor:
    """`x` with the `count` frames before it along `dim`; the history then holds the last `count` of them all.

    Args:
        history: of the stream that `x` is a piece of; None where `x` is a whole clip.
        layer: whose input `x` is.
    """
    if count == 0:
        return x
    before = None if history is None else history.inputs.get(layer)
    if before is None:
        shape = list(x.shape)
        shape[dim] = count
        before = x.new_zeros(shape)
    extended = torch.cat([before, x], dim=dim)
    if history is not None:
        history.inputs[layer] = extended.narrow(dim, extended.shape[dim] - count, count)
    return extended


def weight_of(layer: Any, history: History | None) -> Tensor:
    """`layer.weight`, computed once a stream."""
    if history is None:
        return layer.weight
    if layer not in history.weights:
        history.weights[layer] = layer.weight
    return history.weights[layer]
