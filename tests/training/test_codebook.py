"""Code books: k-means, nested fits, moving averages and the rows that they revive."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from audiotok.recipes.training.codebook import MovingAverageBook, fit_nested_book, nearest_rows, spherical_kmeans


def around(direction: int, count: int, seed: int = 0, width: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 4, generator=generator) * width
    return F.normalize(noise + torch.eye(4)[direction], dim=1)


def test_nearest_rows_agree_with_all_pairs():
    latents, rows = around(0, 300, width=1.0), around(0, 50, seed=1, width=1.0)
    index, similarity = nearest_rows(latents, rows)
    assert torch.equal(index, (latents @ rows.T).argmax(dim=1))
    assert torch.allclose(similarity, (latents * rows[index]).sum(1), atol=1e-6)


def test_kmeans_finds_well_separated_directions_and_keeps_fixed_rows():
    latents = torch.cat([around(d, 100, seed=d, width=0.05) for d in range(4)])
    fixed = torch.eye(4)[:1].clone()
    rows = spherical_kmeans(latents, 3, 10, torch.Generator().manual_seed(0), fixed)
    assert torch.equal(fixed, torch.eye(4)[:1])
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    assert set((rows @ torch.eye(4)).argmax(dim=1).tolist()) == {1, 2, 3}
    assert nearest_rows(latents, torch.cat([fixed, rows]))[1].mean() > 0.99


def test_kmeans_with_fewer_latents_than_rows_gives_distinct_unit_rows():
    rows = spherical_kmeans(around(0, 5), 12, 2, torch.Generator().manual_seed(0))
    assert rows.shape == (12, 4)
    assert torch.isfinite(rows).all()
    assert torch.allclose(rows.norm(dim=1), torch.ones(12), atol=1e-5)


def test_nested_fit_respects_ranges():
    """Speech rows see speech only; the rest of the book serves what speech rows do not cover."""
    ranges = {"speech": (0, 8), "vocal": (0, 12), "music": (0, 24), "audio": (0, 24), "other": (12, 24)}
    latents = {"speech": around(0, 400), "music": around(1, 300, 1), "audio": around(2, 300, 2)}
    book = fit_nested_book(latents, ranges, 24, 5, seed=0)
    assert torch.allclose(book.norm(dim=1), torch.ones(24), atol=1e-5)
    assert (book[:8] @ torch.eye(4)).argmax(dim=1).eq(0).all()
    assert {1, 2} == set((book[8:] @ torch.eye(4)).argmax(dim=1).tolist())
    alone = fit_nested_book({"speech": latents["speech"]}, ranges, 24, 5, seed=0)
    assert torch.equal(book[:8], alone[:8])


RANGES = {"speech": (0, 4), "music": (0, 8), "all": (0, 8)}


def moving_book(**options: object) -> MovingAverageBook:
    rows = around(3, 8, seed=9, width=1.0)
    return MovingAverageBook(rows.clone(), RANGES, **options)


def test_rows_move_to_the_latents_that_chose_them_and_others_stay():
    book = moving_book(decay=0.5)
    before = book.weight.clone()
    target = F.normalize(torch.tensor([1.0, 2.0, 3.0, 4.0]), dim=0)
    for _ in range(20):
        book.update(target.expand(1, 2, 4).transpose(1, 2), torch.tensor([[2, 2]]), ["speech"])
    assert torch.allclose(book.weight[2], target, atol=1e-4)
    others = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(book.weight[others], before[others])
    assert torch.allclose(book.weight.norm(dim=1), torch.ones(8), atol=1e-5)


def test_dead_rows_are_revived_with_latents_of_the_narrowest_domain_that_may_use_them():
    book = moving_book(revive_after=2)
    speech, music = around(0, 4, 1, 0.01), around(1, 4, 2, 0.01)
    latents = torch.stack([speech, music]).transpose(1, 2)
    codes = torch.tensor([[0, 0, 0, 0], [5, 5, 5, 5]])
    for _ in range(3):
        book.update(latents, codes, ["speech", "music"])
    closest = (book.weight @ torch.eye(4)).argmax(dim=1).tolist()
    assert closest[1:4] == [0, 0, 0]  # rows of speech, from speech
    assert [closest[i] for i in (4, 6, 7)] == [1, 1, 1]  # the rest, from music
    assert book.num_revived == 6
    assert book.unseen.max() == 0


def test_rows_in_use_and_runs_past_the_limit_are_not_revived():
    book = moving_book(revive_after=2)
    latents = around(0, 8, 1).T[None]
    before = book.weight.clone()
    for _ in range(5):
        book.update(latents, torch.zeros(1, 8, dtype=torch.long), ["music"], revive=False)
    assert book.num_revived == 0
    assert torch.equal(book.weight[1:], before[1:])
    everything = moving_book(revive_after=2)
    for _ in range(5):
        everything.update(latents, torch.arange(8)[None], ["music"])
    assert everything.num_revived == 0


def test_two_processes_hold_the_book_of_one():
    """Half a batch each, sums added up and latents joined, gives the same book, revived rows included."""
    whole = moving_book(revive_after=1)
    latents, codes = around(0, 12, 3, 1.0).view(4, 3, 4).transpose(1, 2), torch.randint(0, 3, (4, 3))
    domains = ["speech", "music", "speech", "music"]
    other: list[torch.Tensor] = []
    half = moving_book(revive_after=1, reduce=lambda t: t + other.pop(0), gather=lambda t: torch.cat([t, other.pop(0)]))
    for _ in range(4):
        reviving = bool((whole.unseen + 1 > 1)[3:].any())
        whole.update(latents, codes, domains)
        counted = F.pad(latents[2:].transpose(1, 2).reshape(-1, 4), (0, 1), value=1.0)
        other[:] = [torch.zeros(8, 5).index_add_(0, codes[2:].flatten(), counted)]
        if reviving:
            names = sorted(RANGES, key=lambda n: (RANGES[n][1] - RANGES[n][0], n))
            owners = torch.tensor([names.index(d) for d in domains[2:]]).repeat_interleave(3)
            other += [latents[2:].transpose(1, 2).reshape(-1, 4), owners]
        half.update(latents[:2], codes[:2], domains[:2])
        other.clear()
    assert whole.num_revived > 0
    assert half.num_revived == whole.num_revived
    assert torch.allclose(half.weight, whole.weight, atol=1e-6)
