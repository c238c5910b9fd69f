"""Weight-normalised linear layer (Salimans & Kingma, arXiv 1602.07868), kept as two plain parameters.

torch's parametrization makes a module that cannot be pickled, hence not hashed by `datasets` nor sent to a worker
process; two parameters and one line of arithmetic do the same.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init


class WeightNormLinear(nn.Module):
    """`y = x W^T + b` with each row of W written as `weight_g * weight_v / |weight_v|`.

    Parameters: `weight_g` `[out, 1]`, `weight_v` `[out, in]`, `bias` `[out]`.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.weight_g = nn.Parameter(torch.empty(out_features, 1))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As torch starts a linear layer, with the gain equal to the norm of each row."""
        bound = 1 / math.sqrt(self.weight_v.shape[1])
        init.uniform_(self.weight_v, -bound, bound)
        init.uniform_(self.bias, -bound, bound)
        init.copy_(self.weight_g, self.weight_v.norm(dim=1, keepdim=True))

    @property
    def weight(self) -> Tensor:
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
