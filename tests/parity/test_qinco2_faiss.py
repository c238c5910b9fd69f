"""QINCo1 against Faiss, which implements it in C++: the same codes and reconstructions, on recorded and new vectors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from audiotok.quantizers import QINCo2

faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed (dev extra)")

CASE = "q1-m8k64d16"
# On 3000 vectors Faiss was seen to differ once: rounding near a tie.
OTHER_NEAR_TIES = 1e-5


@pytest.fixture
def vectors(golden: Callable) -> dict[str, Tensor]:
    return golden("qinco2").vectors(f"{CASE}/vectors")


@pytest.fixture
def quantizer(golden: Callable) -> QINCo2:
    files = golden("qinco2")
    return QINCo2.from_tensors(files.weights(CASE), files.config(CASE))


def as_original(q: QINCo2) -> SimpleNamespace:
    """The quantizer as an object with the original QINCo1's attributes, which is what Faiss copies from."""
    sizes = {"d": q.dim, "K": q.codebook_size, "L": len(q.implicit_steps[0].blocks)}
    sizes["h"] = q.implicit_steps[0].blocks[0].up_proj.out_features
    steps = [
        SimpleNamespace(
            **sizes,
            codebook=step.codebook,
            MLPconcat=step.concat.mlp,
            residual_blocks=[nn.Sequential(b.up_proj, nn.ReLU(), b.down_proj) for b in step.blocks],
        )
        for step in q.implicit_steps
    ]
    return SimpleNamespace(**sizes, M=q.num_quantizers, codebook0=q.in_order[0].codebook, steps=steps)


def in_faiss(q: QINCo2, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and reconstructions by Faiss, which knows nothing of the scale."""
    model: Any = faiss.QINCo(as_original(q))
    scaled = (x / q.data_std).detach().numpy().astype(np.float32)
    codes = model.encode(faiss.Tensor2D(scaled))
    return torch.from_numpy(codes.numpy()).long(), torch.from_numpy(model.decode(codes).numpy()) * q.data_std


def test_recorded_vectors(quantizer: QINCo2, vectors: dict[str, Tensor]) -> None:
    codes, reconstructions = in_faiss(quantizer, vectors["x"])
    assert torch.equal(codes, vectors["codes_faiss"].long())
    assert torch.equal(quantizer.encode(vectors["x"]), codes)
    torch.testing.assert_close(quantizer.decode(codes), reconstructions, atol=2e-5, rtol=0)


@torch.no_grad()
def test_new_vectors(quantizer: QINCo2, vectors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    near = vectors["x"].repeat(16, 1)
    x = near + 0.3 * quantizer.data_std * torch.randn(near.shape, generator=generator)
    codes, margins = quantizer.encode(x, return_margins=True)
    theirs, _ = in_faiss(quantizer, x)
    clear = margins.amin(dim=1) > OTHER_NEAR_TIES
    assert torch.equal(codes[clear], theirs[clear])
    assert clear.float().mean() > 0.99


@torch.no_grad()
def test_codes_that_faiss_packed(quantizer: QINCo2, vectors: dict[str, Tensor]) -> None:
    packed = vectors["packed_codes"].to(torch.uint8).numpy()
    codes = faiss.unpack_bitstrings(packed, quantizer.num_quantizers, 6)
    assert np.array_equal(codes, vectors["codes_faiss"].numpy())
    theirs = quantizer.decode(torch.from_numpy(codes.astype(np.int64)))
    torch.testing.assert_close(theirs, vectors["recon_faiss"], atol=2e-5, rtol=0)
    torch.testing.assert_close(theirs, vectors["recon_v1"], atol=2e-5, rtol=0)
