"""Stats are what counting by hand gives, and bits are what the layout's grammar leaves open."""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from audiotok.errors import CodesError, OptionError, OutputExistsError
from audiotok.integrations.corpus import Corpus, CorpusStats, stats
from audiotok.integrations.corpus_pages import page, tables
from corpus.after_fixtures import KINDS, Made, command, edit_record, make_corpus


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    return make_corpus(tmp_path / "codes", request.param)


def seconds(made: Made) -> float:
    return sum(clip.audio_length for clip in made.clips) / made.tokenizer.sampling_rate


def streams(made: Made) -> list[list[int]]:
    """The codes of each codebook, one list for a shared one."""
    facts = made.tokenizer.codec.facts
    found: list[list[int]] = [[] for _ in facts.codebook_sizes]
    for clip in made.clips:
        for book, row in enumerate(clip.codes):
            found[book] += (row if clip.depths is None else row[clip.depths > book]).tolist()
    return [sum(found, [])] if facts.shared_codebook else found  # noqa: RUF017


def entropy(values: list[int]) -> float:
    return -sum(n / len(values) * math.log2(n / len(values)) for n in Counter(values).values())


# What is counted


def test_sums(made: Made) -> None:
    found, books = stats(made.folder), streams(made)
    assert found.clips == 11
    assert found.hours == pytest.approx(seconds(made) / 3600)
    assert found.frames == sum(made.num_frames)
    assert found.codes == sum(map(len, books))
    assert (found.shards, found.splits, found.finished) == (3, ["train"], True)


def test_codebooks(made: Made) -> None:
    facts = made.tokenizer.codec.facts
    found, books = stats(made.folder), streams(made)
    assert len(found.codebooks) == len(books) == len(found.counts)
    for one, size, codes, counts in zip(found.codebooks, facts.codebook_sizes, books, found.counts, strict=False):
        assert (one.size, one.codes, one.used) == (size, len(codes), len(set(codes)))
        assert one.entropy == pytest.approx(entropy(codes))
        assert one.perplexity == pytest.approx(2 ** entropy(codes))
        assert one.most_common == pytest.approx(Counter(codes).most_common(1)[0][1] / len(codes))
        assert np.array_equal(counts, np.bincount(codes, minlength=size))


def test_bits_are_those_that_the_grammar_leaves_open(made: Made) -> None:
    """Step by step through the layout, as a sampler goes."""
    layout, bits = Corpus(made.folder).layout(), 0.0
    for ids in made.input_ids(layout.name):
        state = layout.start()
        for one in ids.tolist():
            bits += math.log2(sum(end - first for first, end in layout.legal_ranges(state)))
            state = layout.advance(state, one)
    assert stats(made.folder).bits_per_second == pytest.approx(bits / seconds(made))


def test_entropy_counts_depths_where_they_vary(made: Made) -> None:
    bits = sum(len(codes) * entropy(codes) for codes in streams(made))
    found = stats(made.folder)
    depths = [depth for clip in made.clips if clip.depths is not None for depth in clip.depths.tolist()]
    if depths:
        bits += len(depths) * entropy(depths)
        assert found.depths == [depths.count(depth) for depth in (1, 2, 3)]
    else:
        assert found.depths is None
    assert found.entropy_per_second == pytest.approx(bits / seconds(made))


def test_layouts(made: Made) -> None:
    found = stats(made.folder)
    assert [one.layout for one in found.layouts] == list(Corpus(made.folder).layout_names)
    for one in found.layouts:
        lengths = [ids.shape[-1] for ids in made.input_ids(one.layout)]
        assert one.positions == sum(lengths)
        assert one.positions_per_second == pytest.approx(sum(lengths) / seconds(made))
        assert one.seconds_in[8192] == pytest.approx(8192 * seconds(made) / sum(lengths))
        assert one.streams == (made.tokenizer.codec.facts.num_codebooks if one.layout in ("parallel", "delay") else 1)


def test_lengths(made: Made) -> None:
    facts, found = made.tokenizer.codec.facts, stats(made.folder).lengths
    durations = sorted(clip.audio_length / facts.sampling_rate for clip in made.clips)
    assert (found.shortest, found.longest) == (durations[0], durations[-1])
    assert found.mean == pytest.approx(np.mean(durations))
    frame = facts.frame_multiple * facts.hop_length / facts.sampling_rate
    for quantile, value in found.quantiles.items():
        assert value == pytest.approx(np.quantile(durations, quantile, method="inverted_cdf"), abs=frame)
    assert sum(found.clips) == 11
    frames = sum(made.num_frames) / float(facts.frame_rate)
    assert sum(found.hours) == pytest.approx(frames / 3600)
    assert all(a < b for a, b in zip(found.edges[:-1], found.edges[1:], strict=True))


def test_one_code(tmp_path: Path) -> None:
    made = make_corpus(tmp_path / "codes", num_clips=1, frames=(1, 2))
    found = stats(made.folder)
    assert (found.codebooks[0].entropy, found.codebooks[0].perplexity, found.entropy_per_second) == (0, 1, 0)
    assert page(found, ".png")


def test_it_is_one_pass_with_progress(tmp_path: Path) -> None:
    made, told = make_corpus(tmp_path / "codes"), []
    stats(made.folder, watch=lambda done, total: told.append((done, total)))
    assert told == [(4, 11), (8, 11), (11, 11)]


def test_json_is_plain(made: Made) -> None:
    values = stats(made.folder).to_json()
    assert json.loads(json.dumps(values, allow_nan=False))["clips"] == 11
    assert "counts" not in values


# What cannot be counted


def test_unfinished_and_empty(tmp_path: Path) -> None:
    made = make_corpus(tmp_path / "codes", finished=False)
    with pytest.raises(OptionError, match="is not finished"):
        stats(made.folder)
    found = stats(made.folder, allow_unfinished=True)
    assert not found.finished and "(not finished)" in tables(found)[0][0]
    for path in (made.folder / "data").iterdir():
        path.unlink()
    with pytest.raises(CodesError, match="has no clips: there is nothing to count"):
        stats(made.folder, allow_unfinished=True)


# Pages


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> list[CorpusStats]:
    kinds = ("auv", "apcodec", "vrvq")  # one codebook, several, depths
    return [stats(make_corpus(tmp_path_factory.mktemp("pages") / kind, kind).folder) for kind in kinds]


def test_pages_stand_alone(figures: list[CorpusStats]) -> None:
    for found in figures:
        text = page(found, ".html").decode()
        assert text.startswith("<!doctype html>")
        assert found.fingerprint in text
        assert not re.search(r"https?:|src=\"(?!data:)|@import|url\(", text)
        png = base64.b64decode(text.split("base64,")[1].split('"')[0])
        assert png.startswith(b"\x89PNG")
    assert page(found, ".PNG") == png


def test_pages_show_names_as_text(tmp_path: Path) -> None:
    made = make_corpus(tmp_path / "<b>codes</b>")
    edit_record(made.folder, tokenizer={"name": "<script>$x_1$</script>"})
    text = page(stats(made.folder), ".html").decode()
    assert "<b>codes" not in text and "<script>" not in text and "&lt;b&gt;codes" in text


def test_tables_have_as_many_cells_as_heads(figures: list[CorpusStats]) -> None:
    for found in figures:
        for _, heads, rows in tables(found):
            assert rows and all(len(row) == len(heads) for row in rows)


# The command


def test_the_command(tmp_path: Path) -> None:
    made = make_corpus(tmp_path / "codes", "vrvq")
    page_file = tmp_path / "page.html"
    result = command("stats", made.folder, "--page", page_file)
    assert "positions a second" in result.stdout and "perplexity" in result.stdout
    assert page_file.read_text().endswith("</html>\n")
    said = command("stats", made.folder, "--json").stdout
    assert json.loads(said) == json.loads(json.dumps(stats(made.folder).to_json()))
    assert command("stats", made.folder, "-q").stdout == ""
    with pytest.raises(OutputExistsError, match="--overwrite"):
        command("stats", made.folder, "--page", page_file)
    command("stats", made.folder, "--page", page_file, "--overwrite")


def test_a_page_of_another_kind_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"A page cannot be a .pdf: choose .html or .png"):
        command("stats", tmp_path / "no corpus", "--page", tmp_path / "page.pdf")
