"""QINCo2, QINCo1 and residual quantization give what the published code gives: every recorded case.

Recorded in float32 on another machine. Codes must be equal; the tolerances of the rest are rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from published import close
from torch import Tensor

from audiotok.quantizers import QINCo2, ResidualQuantizer
from audiotok.quantizers.beam_search import Beams, extend
from audiotok.quantizers.implicit_fit import noisy_table
from audiotok.quantizers.residual_kmeans import data_statistics, kmeans_table

VECTOR_ATOL, LOSS_ATOL, GRADIENT_RTOL = 2e-5, 1e-6, 1e-5
# A difference of two distances over the smaller one: rounding moves it by 1e-7 times the length of x over it.
MARGIN_ATOL = 2e-4
# Recorded where nothing was rejected.
NOTHING_REJECTED = 9.0
SETTINGS = [
    ("q1-m4k16d8", "A0B1"),
    ("q1-m8k64d16", "A0B1"),
    *[("q2-m4k32d16", setting) for setting in ("A4B4", "A4B1", "A8B8", "A32B16", "A0B1", "A0B4")],
    *[("q2-m8k256d32", setting) for setting in ("A16B8", "A16B1", "A8B32", "A16B32")],
    *[("q2-node-m8k64d8", setting) for setting in ("A8B8", "A8B1", "A1B8")],
]
FULL = "full-qinco2-L-bigann-8x8"
FULL_SETTINGS = [
    pytest.param(FULL, "A16B4", marks=pytest.mark.slow),
    pytest.param(FULL, "A16B32", marks=pytest.mark.slow),
]
# The setting of each case whose inner values are recorded.
TAPPED = [("q1-m4k16d8", "A0B1"), ("q1-m8k64d16", "A0B1"), ("q2-m4k32d16", "A4B4"), ("q2-m8k256d32", "A16B8")]
TAPPED += [("q2-node-m8k64d8", "A8B8")]
TRAINED = ["q1-m4k16d8", "q2-m4k32d16"]

_quantizers: dict[str, QINCo2] = {}


@pytest.fixture
def vectors(golden: Callable) -> Callable[[str], dict[str, Tensor]]:
    return lambda case: golden("qinco2").vectors(f"{case}/vectors")


@pytest.fixture
def quantizer(golden: Callable) -> Callable[[str], QINCo2]:
    """`quantizer(case)` → the converted quantizer in eval mode, made once."""

    def make(case: str) -> QINCo2:
        if case not in _quantizers:
            files = golden("qinco2")
            _quantizers[case] = QINCo2.from_tensors(files.weights(case), files.config(case))
        return _quantizers[case]

    return make


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def numbers(setting: str) -> dict[str, int]:
    candidates, beam_size = setting[1:].split("B")
    return {"num_candidates": int(candidates), "beam_size": int(beam_size)}


# Encoding and decoding


@pytest.mark.parametrize(("case", "setting"), [*SETTINGS, *FULL_SETTINGS])
def test_codes_and_reconstructions(case: str, setting: str, vectors: Callable, quantizer: Callable) -> None:
    v, q = vectors(case), quantizer(case)
    codes = q.encode(v["x"], **numbers(setting))
    assert torch.equal(codes, v[f"codes.{setting}"].long())
    close(q.decode(codes), v[f"recon.{setting}"], VECTOR_ATOL)


@pytest.mark.parametrize(("case", "setting"), SETTINGS)
def test_a_row_alone_gets_its_codes_of_the_batch(
    case: str, setting: str, vectors: Callable, quantizer: Callable
) -> None:
    v, q = vectors(case), quantizer(case)
    alone = torch.cat([q.encode(row[None], **numbers(setting)) for row in v["x"][:24]])
    assert torch.equal(alone, v[f"codes.{setting}"][:24].long())


@pytest.mark.parametrize(("case", "setting"), [("q1-m4k16d8", "A0B1"), ("q2-m4k32d16", "A4B4")])
def test_encodings_that_end_early(case: str, setting: str, vectors: Callable, quantizer: Callable) -> None:
    v, q = vectors(case), quantizer(case)
    for depth in (1, 2, 3):
        codes = q.encode(v["x"], **numbers(setting), num_quantizers=depth)
        assert torch.equal(codes, v[f"codes_stop{depth}.{setting}"].long())


def test_a_beam_wider_than_the_first_table_is_as_wide_as_it_can_be(vectors: Callable, quantizer: Callable) -> None:
    v, q = vectors("q2-m4k32d16"), quantizer("q2-m4k32d16")
    assert torch.equal(q.encode(v["x"], 32, 33), q.encode(v["x"], 32, 32))


@pytest.mark.parametrize(("case", "setting"), [*SETTINGS, *FULL_SETTINGS])
def test_margins(case: str, setting: str, vectors: Callable, quantizer: Callable) -> None:
    v, q = vectors(case), quantizer(case)
    _, margins = q.encode(v["x"], **numbers(setting), return_margins=True)
    recorded = v[f"margins.{setting}"]
    if f"margins_pre.{setting}" in v:
        recorded = torch.minimum(recorded, v[f"margins_pre.{setting}"])
    wanted = recorded.masked_fill(recorded == NOTHING_REJECTED, torch.inf)
    torch.testing.assert_close(margins, wanted, atol=MARGIN_ATOL, rtol=1e-2)


@pytest.mark.parametrize(("case", "setting"), TAPPED)
def test_prefixes(case: str, setting: str, vectors: Callable, quantizer: Callable) -> None:
    v, q = vectors(case), quantizer(case)
    codes = v[f"codes.{setting}"]
    close(q.normalize(v["x"]), v["x_norm"], VECTOR_ATOL)
    steps = q.decode_steps(codes)
    close(steps.transpose(0, 1), v[f"prefix.{setting}"], VECTOR_ATOL)
    normalized = torch.stack(list(q.reconstructions(codes.long())), dim=1)
    close(normalized, v[f"prefix_norm.{setting}"], VECTOR_ATOL)
    for depth in range(1, q.num_quantizers + 1):
        torch.testing.assert_close(q.decode(codes[:, :depth]), steps[depth - 1])


# Inside the search


@pytest.mark.parametrize(("case", "setting"), TAPPED)
def test_beams_of_every_step(case: str, setting: str, vectors: Callable, quantizer: Callable) -> None:
    v, q = vectors(case), quantizer(case)
    options = numbers(setting)
    x = q.normalize(v["x"])[: len(v[f"step0.beam_codes.{setting}"])]
    beams = Beams.start(x)
    for m, step in enumerate(q.in_order):
        search = step.searcher(options["num_candidates"] or None)
        if f"step{m}.candidates.{setting}" in v:
            residual = (x[:, None] - beams.xhat).flatten(0, 1)
            found = search.choose(residual, 1).index.view(*beams.codes.shape[:2], -1)
            # Beams may stand in another order where their distances are as good as equal.
            same_sets(found, v[f"step{m}.candidates.{setting}"].long(), beams.codes, m, setting, v)
        beams = extend(search, x, beams, 1 if m == q.num_quantizers - 1 else options["beam_size"])
        same_beams(beams, v[f"step{m}.beam_codes.{setting}"].long(), v[f"step{m}.beam_xhat.{setting}"])


def same_sets(found: Tensor, recorded: Tensor, codes: Tensor, m: int, setting: str, v: dict[str, Tensor]) -> None:
    """Candidates of each beam, as sets; beams are matched by their codes."""
    before = v[f"step{m - 1}.beam_codes.{setting}"].long()
    for row in range(len(found)):
        ours = {tuple(c.tolist()): set(f.tolist()) for c, f in zip(codes[row], found[row], strict=True)}
        theirs = {tuple(c.tolist()): set(r.tolist()) for c, r in zip(before[row], recorded[row], strict=True)}
        assert all(ours[beam] == theirs[beam] for beam in ours.keys() & theirs.keys())


def same_beams(beams: Beams, codes: Tensor, xhat: Tensor) -> None:
    """Beams as sets: at most one loser in 200 may differ, winners never."""
    assert torch.equal(beams.codes[:, 0], codes[:, 0])
    close(beams.xhat[:, 0], xhat[:, 0], VECTOR_ATOL)
    missing = 0
    for row in range(len(codes)):
        ours = {tuple(c.tolist()): x for c, x in zip(beams.codes[row], beams.xhat[row], strict=True)}
        for c, x in zip(codes[row], xhat[row], strict=True):
            if tuple(c.tolist()) in ours:
                close(ours[tuple(c.tolist())], x, VECTOR_ATOL)
            else:
                missing += 1
    assert missing <= codes[..., 0].numel() / 200


@pytest.mark.parametrize(("case", "setting"), TAPPED)
def test_codewords_given_a_reconstruction(case: str, setting: str, vectors: Callable, quantizer: Callable) -> None:
    v, q = vectors(case), quantizer(case)
    xhat = v[f"step0.beam_xhat.{setting}"][0, :1]
    everything = torch.arange(q.codebook_size)
    recorded = v[f"step1.all_codewords_row0.{setting}"]
    close(q.in_order[1](everything, xhat.expand(len(everything), -1)), recorded, VECTOR_ATOL)
    close(q.in_order[1].searcher(None).codewords(everything[None], xhat)[0], recorded, VECTOR_ATOL)


# Training


@pytest.mark.parametrize("case", TRAINED)
def test_losses_gradients_and_running_statistics(case: str, vectors: Callable, golden: Callable) -> None:
    v, files = vectors(case), golden("qinco2")
    q = QINCo2.from_tensors(files.weights(case), files.config(case)).train()
    with torch.enable_grad():
        losses = q.loss(v["train.x"])
        losses.total.backward()
    assert torch.equal(losses.codes, v["train.codes"].long())
    close(losses.reconstruction_per_step, v["train.mse_per_step"], LOSS_ATOL)
    close(losses.total, v["train.total"], LOSS_ATOL)
    if "train.substep_per_step" in v:
        close(losses.selection_per_step, v["train.substep_per_step"], LOSS_ATOL)
    for name, parameter in q.named_parameters():
        recorded = v[f"grad.{name}"]
        close(parameter.grad, recorded, GRADIENT_RTOL * float(recorded.abs().max()))
    after = {name.removeprefix("after."): value for name, value in v.items() if name.startswith("after.")}
    assert len(after) == 2 * q.num_quantizers
    for name, value in after.items():
        close(q.state_dict()[name], value, LOSS_ATOL)


# Residual quantization


@pytest.fixture
def residual(vectors: Callable) -> ResidualQuantizer:
    v = vectors("rq-m4k16d8")
    mean, std = data_statistics(v["x"])
    q = ResidualQuantizer(dim=8, num_quantizers=4, codebook_size=16)
    q.set_normalization(mean, std)
    q.set_tables([(v["final.0"] - mean) / std, *[v[f"final.{m}"] / std for m in (1, 2, 3)]])
    return q


def test_residual_quantization(residual: ResidualQuantizer, vectors: Callable) -> None:
    v = vectors("rq-m4k16d8")
    codes, margins = residual.encode(v["x"], return_margins=True)
    assert torch.equal(codes, v["codes"].long())
    close(residual.decode(codes), v["recon"], VECTOR_ATOL)
    close(residual.decode_steps(codes).transpose(0, 1), v["prefix"], VECTOR_ATOL)
    close(margins, v["margins"], MARGIN_ATOL)


def test_kmeans_goes_the_recorded_way_from_the_recorded_start(vectors: Callable) -> None:
    v = vectors("rq-m4k16d8")
    left = v["x"]
    for m in range(4):
        close(kmeans_table(left, 16, iterations=1, start=v[f"init.{m}"]), v[f"iter1.{m}"], VECTOR_ATOL)
        close(kmeans_table(left, 16, iterations=10, start=v[f"init.{m}"]), v[f"final.{m}"], VECTOR_ATOL)
        left = left - v[f"final.{m}"][v["codes"][:, m].long()]


def test_published_tables_of_a_fresh_network(vectors: Callable) -> None:
    v = vectors("rq-m4k16d8")
    mean, std = data_statistics(v["x"])
    close(mean, v["qinit.data_mean"], VECTOR_ATOL)
    close(std, v["qinit.data_std"], VECTOR_ATOL)
    for m in range(4):
        table = (v[f"final.{m}"] - (mean if m == 0 else 0)) / std
        close(noisy_table(table, v[f"qinit.noise.{m}"], 0.1), v[f"qinit.codebook.{m}"], VECTOR_ATOL)


# Sizes


@pytest.mark.parametrize(
    ("dim", "num_quantizers", "network", "trainable", "tensors", "numbers_held"),
    [
        (128, 8, "L", 35_588_736, 285, 35_590_913),
        (128, 16, "L", 76_224_128, 605, 76_228_353),
        (96, 8, "L", 35_207_808, 285, 35_209_441),
        (256, 8, "L", 37_112_448, 285, 37_116_801),
        (768, 8, "L", 43_207_296, 285, 43_220_353),
        (128, 8, "M", 10_816_128, 117, 10_818_305),
        (128, 8, "S", 1_639_296, 75, 1_641_473),
        (64, 24, "S", 4_729_728, 281, 4_732_865),
        (128, 8, "qinco1", 7_832_448, 264, 7_834_625),
        (96, 8, "qinco1", 5_831_328, 264, 5_832_961),
        (256, 8, "qinco1", 16_123_648, 264, 16_128_001),
    ],
)
def test_parameter_counts(
    dim: int, num_quantizers: int, network: str, trainable: int, tensors: int, numbers_held: int
) -> None:
    options = {
        "S": {"num_blocks": 2, "embedding_dim": 128, "hidden_dim": 256},
        "M": {"num_blocks": 4, "embedding_dim": 384, "hidden_dim": 384},
        "L": {"num_blocks": 16, "embedding_dim": 384, "hidden_dim": 384},
        "qinco1": {"num_blocks": 16, "embedding_dim": None, "num_candidates": None, "qinco1_mode": True},
    }[network]
    with torch.device("meta"):
        q = QINCo2(dim, num_quantizers, **options)
    assert sum(p.numel() for p in q.parameters() if p.requires_grad) == trainable
    assert len(q.state_dict()) == tensors
    assert sum(t.numel() for t in q.state_dict().values()) == numbers_held


def test_names_and_shapes_of_a_released_file(shared: Path) -> None:
    manifest = json.loads((shared / "golden" / "qinco2" / "released_manifest.json").read_text())
    with torch.device("meta"):
        q = QINCo2(128, 8, num_blocks=16, embedding_dim=384, hidden_dim=384)
    assert {name: list(value.shape) for name, value in q.state_dict().items()} == manifest
