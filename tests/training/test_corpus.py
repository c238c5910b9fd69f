"""The corpus, its cache, and the clips that are held out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiotok.errors import AudioFileNotFoundError, AudioInputError
from audiotok.recipes.training import corpus as corpus_module
from audiotok.recipes.training.config import TrainConfig
from audiotok.recipes.training.corpus import Clip, Corpus, hold_out, open_corpus
from audiotok.recipes.training.data import validation_set
from training.helpers import RATE, write_metadata

# Corpus


def test_corpus_is_mono_at_the_rate_with_copies_of_speech_only(corpus: Corpus):
    by_name = {(clip.file_name, clip.speed): clip for clip in corpus.clips}
    assert by_name["1.wav", 1.0].length == pytest.approx(1.2 * RATE, abs=2)  # stereo, 22 050 Hz
    assert by_name["0.wav", 0.89].length == pytest.approx(1.2 * RATE / 0.89, abs=2)
    assert {clip.domain for clip in corpus.clips if clip.speed != 1.0} == {"speech"}
    assert len(corpus.samples) == sum(clip.length for clip in corpus.clips)


def test_corpus_holds_the_recording_itself(corpus: Corpus, folder: Path):
    samples, _ = soundfile.read(folder / "0.wav")
    clip = next(clip for clip in corpus.clips if clip.file_name == "0.wav" and clip.speed == 1.0)
    assert np.abs(corpus.audio(clip) - samples).max() <= 1 / 32767


def test_cache_is_reused_and_named_after_what_it_depends_on(folder: Path, cache: Path, corpus: Corpus, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the cache was built again")

    monkeypatch.setattr(corpus_module, "load_audio", refuse)
    assert open_corpus(folder, cache, RATE, {"speech": [0.89]}).path == corpus.path
    for rate, copies in ((8_000, {"speech": [0.89]}), (RATE, {}), (RATE, {"speech": [0.9]})):
        with pytest.raises(AssertionError, match="built again"):
            open_corpus(folder, cache, rate, copies)


def test_cache_notices_changed_metadata_and_changed_files(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), RATE)
    keys = []
    for domain, samples in (("speech", 100), ("music", 100), ("music", 101)):
        soundfile.write(tmp_path / "a.wav", np.zeros(samples), RATE)
        rows = [{"file_name": "a.wav", "domain": domain}]
        keys.append(corpus_module.corpus_key(tmp_path, rows, RATE, {}))
    assert len(set(keys)) == 3


def test_a_cache_that_was_never_finished_is_not_used(folder: Path, tmp_path: Path, monkeypatch):
    calls = []

    def fail_at_third(path: Path, **options: object) -> object:
        calls.append(path)
        if len(calls) == 3:
            raise AudioInputError("broken")
        return load(path, **options)

    load = corpus_module.load_audio
    monkeypatch.setattr(corpus_module, "load_audio", fail_at_third)
    with pytest.raises(AudioInputError, match="broken"):
        open_corpus(folder, tmp_path, RATE, {})
    assert not list(tmp_path.iterdir())
    assert len(open_corpus(folder, tmp_path, RATE, {}).clips) == 14


def test_loud_recordings_are_scaled_not_clipped(tmp_path: Path):
    wave = 2.5 * np.sin(np.arange(4000) * 0.05)
    soundfile.write(tmp_path / "loud.wav", wave, RATE, subtype="FLOAT")
    write_metadata(tmp_path, [{"file_name": "loud.wav", "domain": "sound"}])
    corpus = open_corpus(tmp_path, tmp_path / "cache", RATE, {})
    assert np.abs(corpus.audio(corpus.clips[0]) - wave / np.abs(wave).max()).max() < 1e-3


def test_metadata_that_cannot_be_used_is_refused(tmp_path: Path):
    with pytest.raises(AudioInputError, match=r"no metadata\.csv"):
        open_corpus(tmp_path, tmp_path, RATE, {})
    write_metadata(tmp_path, [{"file_name": "a.wav", "label": "x"}])
    with pytest.raises(AudioInputError, match='column "domain"'):
        open_corpus(tmp_path, tmp_path, RATE, {})
    write_metadata(tmp_path, [{"file_name": "a.wav", "domain": "speech"}])
    with pytest.raises(AudioFileNotFoundError, match=r"a\.wav"):
        open_corpus(tmp_path, tmp_path, RATE, {})


def test_metadata_may_be_json_lines_in_a_train_folder(tmp_path: Path):
    (tmp_path / "train").mkdir()
    soundfile.write(tmp_path / "train" / "a.wav", np.zeros(100), RATE)
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "a.wav", "domain": "speech"}\n\n')
    assert len(open_corpus(tmp_path, tmp_path / "cache", RATE, {}).clips) == 1


# Held-out clips


def clips_of(groups: list[str], domain: str = "speech") -> list[Clip]:
    return [Clip(f"{g}_{i}", domain, g, 0, 100, s) for g in groups for i, s in enumerate((1.0, 0.9))]


def test_held_out_groups_are_whole_stable_and_about_the_share_asked_for():
    clips = clips_of([f"speaker:{i}" for i in range(400)])
    training, validation = hold_out(clips, 0.05)
    held = {clip.group for clip in validation}
    assert held.isdisjoint(clip.group for clip in training)
    assert 8 <= len(held) <= 35
    assert all(clip.speed == 1.0 for clip in validation)
    fewer = hold_out([c for c in clips if c.group != "speaker:7"], 0.05)[1]
    assert {clip.group for clip in fewer} == held - {"speaker:7"}


def test_each_domain_holds_something_out_unless_it_has_one_group():
    clips = clips_of(["a", "b"], "music") + clips_of(["only"], "sound") + clips_of(["x", "y"], "speech")
    training, validation = hold_out(clips, 1e-9)
    assert Counter(clip.domain for clip in validation) == {"music": 1, "speech": 1}
    assert "sound" in {clip.domain for clip in training}
    assert hold_out(clips, 0.0)[1] == []


def test_validation_set_takes_turns_between_groups(corpus: Corpus, tiny: TrainConfig):
    chosen = validation_set(corpus, [c for c in corpus.clips if c.speed == 1.0], tiny.data, 8, 0.5)
    assert Counter((domain, of_the_codec) for _, domain, of_the_codec in chosen) == {
        ("speech", "speech"): 4,
        ("music", "music"): 2,
        ("sound", "audio"): 2,
    }
    assert all(audio.shape == (1, 1, 8000) for audio, *_ in chosen)
