"""Which positions of a padded batch exist. Shapes: B clips, F frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def valid_frames(frames: Sequence[int], device: torch.device) -> Tensor | None:
    """`[B, F]` bool of the frames that exist; None where all do, which spares every mask."""
    longest = max(frames)
    if min(frames) == longest:
        return None
    return torch.arange(longest, device=device) < torch.tensor(frames, device=device)[:, None]
