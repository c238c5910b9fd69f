"""codes.parquet and ids.txt, and files that appear whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from audiotok import AudioTokenizer
from audiotok.cli.ids_file import IdsReader, IdsWriter
from audiotok.cli.outputs import ClipNames, whole_file
from audiotok.clip_rows import FrameOrder
from audiotok.encoding import ClipCodes
from audiotok.errors import CodesError, OutputExistsError
from audiotok.vocabulary import AudioVocabulary


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@example("# audiotok ids {}.wav")
@example("tab\tline\nreturn\r back\\slash \\t")
def test_any_name_survives_a_line(tok: AudioTokenizer, name: str) -> None:
    file = io.BytesIO()
    IdsWriter(file, tok).write(name, ClipCodes(np.array([[1, 2]]), 12))
    file.seek(0)
    (clip,) = IdsReader(file, "test")
    assert (clip.id, clip.audio_length, clip.ids(tok).tolist()) == (name, 12, [1, 2])


@given(st.data())
def test_frame_order_is_a_bijection(data: st.DataObject) -> None:
    """Fixed, multi-rate and variable-depth codecs."""
    sizes = tuple(data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=4)))
    kind = data.draw(st.sampled_from(["fixed", "multirate", "variable"]))
    strides = tuple(2 ** (len(sizes) - 1 - q) for q in range(len(sizes))) if kind == "multirate" else (1,) * len(sizes)
    facts = SimpleNamespace(codebook_strides=strides, num_codebooks=len(sizes), variable_depth=kind == "variable")
    order = FrameOrder(SimpleNamespace(codec=SimpleNamespace(facts=facts), vocabulary=AudioVocabulary(sizes)))
    num_frames = data.draw(st.integers(0, 5)) * strides[0]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = [rng.integers(0, size, num_frames // stride) for size, stride in zip(sizes, strides, strict=True)]
    depths = rng.integers(1, len(sizes) + 1, num_frames) if kind == "variable" else None
    codes: Any = rows if max(strides) > 1 else np.stack(rows)
    if depths is not None:
        codes *= np.arange(len(sizes))[:, None] < depths
    flat, found_frames = order.flatten(codes, depths)
    assert found_frames == num_frames and (flat >= 0).all() and (flat < max(sizes)).all()
    restored, found_depths = order.restore(flat, num_frames, depths)
    assert all(np.array_equal(a, b) for a, b in zip(restored, codes, strict=True))
    assert found_depths is depths
    if num_frames:
        with pytest.raises(CodesError):
            order.restore(flat[1:], num_frames, depths)


def test_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "result"
    with pytest.raises(KeyboardInterrupt), whole_file(path, overwrite=False) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with whole_file(path, overwrite=False) as file:
        file.write(b"whole")
        assert not path.exists()
    with pytest.raises(OutputExistsError), whole_file(path, overwrite=False):
        pytest.fail("the file is there")
    with pytest.raises(KeyboardInterrupt), whole_file(path, overwrite=True) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"whole"]


def test_clip_names() -> None:
    names = ClipNames(Path("out"), "wav")
    given_names = ["talk.mp3", "talk.flac", "v1.5", "a/b.WAV"]
    assert [str(names.path_for(n)) for n in given_names] == [
        "out/talk.wav",
        "out/talk.flac.wav",
        "out/v1.5.wav",
        "out/a/b.wav",
    ]
    for wrong in ("../up", "/root", "a/../../up", "", "v1.5"):
        with pytest.raises(CodesError):
            names.path_for(wrong)
