"""The evaluation recipe and its baselines, on small made-up sets; the real test set is `slow`."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import audiotok
from audiotok import AudioTokenizer, AuvAudioTokenizer, AuvConfig, AuvModel
from audiotok.audio import load_audio
from audiotok.encoding import ClipCodes
from audiotok.errors import AudioInputError, MissingDependencyError, NotAudioError, OptionError, OutputExistsError
from audiotok.metrics import METRICS, compare
from audiotok.recipes import baselines, evaluate_codec
from audiotok.recipes.baselines import BASELINES, Baseline, Codec2, Opus, Reconstruction, Waveform, ogg_packet_sizes
from audiotok.recipes.evaluation_report import Clip, Evaluation, Score, as_json, codebook_uses, means, tables, wins

RATE = 16000


@pytest.fixture(scope="module")
def tokenizer() -> AudioTokenizer:
    """A random AUV of 64 entries, of which speech has the middle 32."""
    torch.manual_seed(0)
    stack = {"num_layers": 1, "block_type": "convnext", "conv_kernel_size": 3, "ffn_mult": 2}
    ranges = {"speech": [16, 48], "music": [0, 64], "audio": [0, 64]}
    config = AuvConfig(
        hidden_size=16,
        encoder_config=stack,
        decoder_config=stack,
        codebook_size=64,
        codebook_dim=4,
        domain_ranges=ranges,
    )
    return AuvAudioTokenizer(AuvModel(config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six clips: wide-band stereo, narrow-band and very short speech; music; a sound beyond full scale; silence."""
    rng = np.random.default_rng(0)
    rows = ["file_name,domain,source"]

    def add(name: str, domain: str, rate: int, seconds: float, channels: int = 1, level: float = 0.1) -> None:
        samples = level * rng.standard_normal((round(seconds * rate), channels))
        soundfile.write(tmp_path / name, samples, rate, subtype="FLOAT")
        rows.append(f"{name},{domain},{name[0]}")

    add("b_wide.wav", "speech", 44100, 0.7, channels=2)
    add("a_wide.wav", "speech", 16000, 0.6)
    add("digit.wav", "speech", 8000, 0.3)
    add("song.wav", "music", 44100, 0.043)
    add("bang.wav", "sound", 11025, 0.5, level=3.0)
    add("quiet.wav", "sound", 48000, 0.5, level=0.0)
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


class Halver(Baseline):
    """Half the level at 1 kb/s; counts what it is given."""

    name, speech_only = "Codec 2 700C", True

    def __init__(self) -> None:
        self.calls = 0

    def why_unavailable(self) -> str | None:
        return None

    def _reconstruct(self, waveform: Waveform, sampling_rate: int) -> Reconstruction:
        self.calls += 1
        return Reconstruction(waveform / 2, 1000)


class Absent(Halver):
    name = "Absent"

    def why_unavailable(self) -> str | None:
        return "not found; install it"


# Baselines


def bursts(seconds: float = 3.0, rate: int = RATE) -> Waveform:
    """Tones of 500 Hz, 120 ms each, at irregular times: their onsets show every delay."""
    time = np.arange(round(seconds * rate)) / rate
    gate = np.zeros_like(time)
    for start in (0.31, 0.94, 1.23, 1.9, 2.55):
        gate[(time >= start) & (time < start + 0.12)] = 1
    return (0.3 * gate * np.sin(2 * np.pi * 500 * time)).astype(np.float32)


def delay_ms(reference: Waveform, decoded: Waveform, rate: int) -> float:
    """The lag at which 5 ms loudness envelopes correlate best."""
    window = np.hanning(rate // 200)
    envelopes = [np.convolve(np.abs(w), window, "same")[:: rate // 1000] for w in (reference, decoded)]
    envelopes = [e - e.mean() for e in envelopes]
    return float(np.correlate(envelopes[1], envelopes[0], "full").argmax() - len(envelopes[0]) + 1)


@pytest.fixture(params=[*BASELINES, Codec2("3200")], ids=lambda baseline: baseline.name)
def baseline(request: pytest.FixtureRequest) -> Baseline:
    if reason := request.param.why_unavailable():
        pytest.skip(f"{request.param.name}: {reason}")
    return request.param


@pytest.mark.parametrize("rate", [16000, 44100])
def test_baselines_keep_time(baseline: Baseline, rate: int) -> None:
    result = baseline.reconstruct(bursts(rate=rate), rate)
    tolerance = 2 if isinstance(baseline, Opus) else 12  # a frame of Codec 2 is 20 to 40 ms
    assert abs(delay_ms(bursts(rate=rate), result.waveform, rate)) <= tolerance


@pytest.mark.parametrize("samples", [1, 2, 319, 688, 16001])
def test_baselines_keep_length(baseline: Baseline, samples: int) -> None:
    result = baseline.reconstruct(bursts(rate=RATE)[5000 : 5000 + samples], RATE)
    assert result.waveform.shape == (samples,)
    assert result.waveform.dtype == np.float32
    assert np.isfinite(result.waveform).all()


def test_baselines_keep_the_end(baseline: Baseline) -> None:
    """What the codec holds back by its delay, or drops with a partial frame, must have been flushed out."""
    tone = bursts(1.021)[: round(1.021 * RATE)]
    assert np.abs(tone[-80:]).max() > 0.1
    assert np.abs(baseline.reconstruct(tone, RATE).waveform[-80:]).max() > 0.03


def test_opus_counts_packets_without_container_and_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    speech = bursts(2.0)
    assert 1000 < Opus().reconstruct(speech, RATE).bits_per_second < 7500
    monkeypatch.setattr(baselines, "ogg_packet_sizes", lambda data: [19, 64, 15, 10])
    assert Opus().reconstruct(speech, RATE).bits_per_second == 8 * 25 / 2


def test_ogg_packets_span_segments_and_pages() -> None:
    def page(segments: list[int], content: bytes) -> bytes:
        return b"OggS" + bytes(22) + bytes([len(segments)]) + bytes(segments) + content

    data = page([10, 255, 255], bytes(520)) + page([5, 255, 0], bytes(260))
    assert ogg_packet_sizes(data) == [10, 515, 255]
    with pytest.raises(NotAudioError, match="byte 27 of 31"):
        ogg_packet_sizes(page([], b"") + b"RIFF")


def test_ogg_packets_of_a_real_file_fill_it() -> None:
    file = io.BytesIO()
    soundfile.write(file, bursts(), RATE, format="OGG", subtype="OPUS")
    data = file.getvalue()
    pages = data.count(b"OggS")
    segments = sum(size // 255 + 1 for size in ogg_packet_sizes(data))
    assert sum(ogg_packet_sizes(data)) + 27 * pages + segments == len(data)


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "apt-get install codec2" in Codec2("700C").why_unavailable()
    with pytest.raises(MissingDependencyError, match="Codec 2 700C: c2enc and c2dec not found"):
        Codec2("700C").reconstruct(bursts(), RATE)
    monkeypatch.setattr(soundfile, "available_subtypes", lambda _: {"VORBIS": "Vorbis"})
    with pytest.raises(MissingDependencyError, match=r"Opus 6: libsndfile .* cannot write Opus"):
        Opus().reconstruct(bursts(), RATE)


def test_unknown_modes_of_codec2_are_refused() -> None:
    with pytest.raises(OptionError, match='Did you mean "700C"'):
        Codec2("700")


# Clips


def test_clips_are_grouped_and_sorted(folder: Path) -> None:
    clips = evaluate_codec.read_clips(folder)
    assert [(clip.name, clip.group) for clip in clips] == [
        ("a_wide.wav", "speech"),
        ("b_wide.wav", "speech"),
        ("digit.wav", "narrow-band speech"),
        ("song.wav", "music"),
        ("bang.wav", "sound"),
        ("quiet.wav", "sound"),
    ]
    assert clips[0].source == "a"
    assert [clip.name for clip in evaluate_codec.read_clips(folder, limit=1)] == [
        "a_wide.wav", "digit.wav", "song.wav", "bang.wav",
    ]  # fmt: skip
    groups = {clip.name: clip.group for clip in evaluate_codec.read_clips(folder, min_rate=20000)}
    assert groups["a_wide.wav"] == "narrow-band speech"


def test_folders_that_are_no_test_set_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(AudioInputError, match=r"holds no metadata\.csv"):
        evaluate_codec.read_clips(tmp_path_factory.mktemp("empty"))
    (folder / "metadata.csv").write_text("file_name,domain\na_wide.wav,spech\n", encoding="utf-8")
    with pytest.raises(OptionError, match='Did you mean "speech"'):
        evaluate_codec.read_clips(folder)


# Evaluation


def test_every_clip_goes_through_the_codec_its_latents_and_the_baselines(
    folder: Path, tokenizer: AudioTokenizer
) -> None:
    clips = evaluate_codec.read_clips(folder)
    found = evaluate_codec.evaluate(tokenizer, clips, "tiny", baselines=[Halver(), Absent()])
    assert found.systems("speech") == ["tiny", "tiny (continuous)", "Codec 2 700C"]
    assert found.systems("music") == found.systems("sound") == ["tiny", "tiny (continuous)"]  # it is for speech only
    assert found.not_run == {"Absent": "not found; install it"}
    assert len(found.scores) == 3 * 3 + 3 * 2
    assert {name for s in found.of("speech", "tiny") for name in s.scores} >= {"stoi", "mel_distance"}
    assert not any("stoi" in s.scores for s in found.of("music", "tiny"))
    assert all(math.isfinite(value) for s in found.scores for value in s.scores.values())
    halved = found.of("speech", "Codec 2 700C")
    assert [s.scores["level_ratio_db"] for s in halved] == pytest.approx([-6.0206] * 2, abs=1e-3)


def test_codes_stay_in_the_range_of_the_domain_and_are_counted_in_it(folder: Path, tokenizer: AudioTokenizer) -> None:
    found = evaluate_codec.evaluate(tokenizer, evaluate_codec.read_clips(folder), "tiny", baselines=[])
    spoken = np.concatenate([book for clip in found.codes["speech"] for book in clip])
    assert 16 <= spoken.min() <= spoken.max() < 48
    assert {group: use[0].size for group, use in codebook_uses(found).items()} == {
        "speech": 32, "narrow-band speech": 32, "music": 64, "sound": 64, "all": 64,
    }  # fmt: skip
    frames = 30  # of 0.6 s
    assert found.of("speech", "tiny")[0].bits_per_second == pytest.approx(frames * math.log2(32) / 0.6)
    assert found.of("speech", "tiny (continuous)")[0].bits_per_second is None


def test_ids_give_what_the_tokenizer_gives_and_latents_another_signal(tokenizer: AudioTokenizer) -> None:
    waveform = bursts(0.5)[: RATE // 2 - 7]
    coded, books = evaluate_codec.through_ids(tokenizer, waveform, "music")
    ids = tokenizer(waveform, sampling_rate=RATE, domain="music")["input_ids"]
    expected = tokenizer.decode(ids, length=len(waveform))[0]
    assert torch.equal(torch.from_numpy(coded.waveform), expected)
    assert np.array_equal(books[0], ids)
    continuous = evaluate_codec.through_latents(tokenizer, waveform)
    assert continuous.waveform.shape == waveform.shape
    assert not np.allclose(continuous.waveform, coded.waveform)


def test_codes_that_a_frame_does_not_use_are_not_counted() -> None:
    """A codec of variable depth: three books of 4, 8 and 16 entries, two frames of depth 1 and 3.

    Which of three depths a frame has is told too.
    """
    codes = np.array([[1, 2], [0, 7], [0, 9]])
    fake = SimpleNamespace(
        codec=SimpleNamespace(encode_options=(), facts=SimpleNamespace(codebook_sizes=(4, 8, 16))),
        sampling_rate=RATE,
        encode_audio=lambda audio, rate: [ClipCodes(codes, len(audio[0]), depths=np.array([1, 3]))],
        codes_to_ids=lambda codes, depths: (codes, depths),
        decode=lambda ids, length: torch.zeros(1, length),
    )
    result, books = evaluate_codec.through_ids(fake, np.zeros(RATE, np.float32), "speech")
    assert [book.tolist() for book in books] == [[1, 2], [7], [9]]
    assert result.bits_per_second == pytest.approx(2 * 2 + 3 + 4 + 2 * math.log2(3))


def test_other_codecs_say_that_their_ceiling_is_not_known(tokenizer: AudioTokenizer) -> None:
    other = SimpleNamespace(codec=SimpleNamespace(facts=tokenizer.codec.facts))
    found = evaluate_codec.evaluate(other, [], "other", baselines=[])
    assert "nothing but codes" in found.not_run["other (continuous)"]
    stereo = SimpleNamespace(codec=SimpleNamespace(facts=SimpleNamespace(channels=2)))
    with pytest.raises(AudioInputError, match="other has 2 channels"):
        evaluate_codec.evaluate(stereo, [], "other")


def test_cached_scores_are_those_of_the_first_run(folder: Path, tokenizer: AudioTokenizer, tmp_path: Path) -> None:
    clips = [clip for clip in evaluate_codec.read_clips(folder) if clip.group == "speech"]
    halver, cache = Halver(), tmp_path / "cache"
    cache.mkdir()
    runs = [evaluate_codec.evaluate(tokenizer, clips, "tiny", 16000, [halver], cache) for _ in range(2)]
    assert halver.calls == len(clips)
    assert runs[0].scores == runs[1].scores
    louder = clips[0].path
    soundfile.write(louder, soundfile.read(louder)[0] * 2, RATE, subtype="FLOAT")
    evaluate_codec.evaluate(tokenizer, clips, "tiny", 16000, [halver], cache)
    assert halver.calls == len(clips) + 1


# Report


def made_up(clip: str, system: str, **scores: float) -> Score:
    skipped = {} if "stoi" in scores else {"stoi": "too short"}
    bands = {"500": scores["stoi"], "1000": -2.0} if "stoi" in scores else {}
    return Score(clip, "speech", f"from {clip}", system, 700.0, scores, skipped, bands)


@pytest.fixture
def small() -> Evaluation:
    """Three clips of speech through a codec and its rival; the third is too short for STOI."""
    clips = [Clip(Path(name), name, "speech", f"from {name}") for name in "abc"]
    return Evaluation(
        "mine",
        clips,
        RATE,
        scores=[
            made_up("a", "mine", stoi=0.8, mel_distance=1.0),
            made_up("a", "Codec 2 700C", stoi=0.7, mel_distance=0.5),
            made_up("b", "mine", stoi=0.6, mel_distance=1.0),
            made_up("b", "Codec 2 700C", stoi=0.6, mel_distance=3.0),
            made_up("c", "mine", mel_distance=1.0),
            made_up("c", "Codec 2 700C", mel_distance=3.0),
        ],
        codes={"speech": [[np.array([3, 3])], [np.array([5])]]},
        code_ranges={"speech": [(2, 6)], "all": [(0, 8)]},
        not_run={"Opus 6": "gone"},
    )


def test_means_count_the_clips_that_have_the_score(small: Evaluation) -> None:
    summary = means(small.of("speech", "mine"))
    assert summary["stoi"] == {"mean": pytest.approx(0.7), "clips": 2}
    assert summary["mel_distance"] == {"mean": 1.0, "clips": 3}
    assert summary["bands"] == {"500": pytest.approx(0.7), "1000": -2.0}
    assert summary["bits_per_second"] == 700


def test_wins_know_which_way_is_better_and_a_tie_is_no_win(small: Evaluation) -> None:
    assert wins(small) == {"stoi": (1, 2), "mel_distance": (2, 3)}
    assert wins(small, "Opus 6") == {}


def test_codebooks_are_counted_from_the_start_of_their_range(small: Evaluation) -> None:
    uses = codebook_uses(small)
    assert (uses["speech"][0].distinct, uses["speech"][0].size) == (2, 4)
    assert (uses["all"][0].distinct, uses["all"][0].size) == (2, 8)


def test_tables_show_every_system_and_every_gap(small: Evaluation) -> None:
    found = {table.title.split(":")[0].split(" (")[0]: table for table in tables(small)}
    speech = found["Speech"]
    assert [row[0] for row in speech.rows] == ["mine", "Codec 2 700C"]
    mine = dict(zip(speech.header, speech.rows[0], strict=True))
    assert mine["STOI"] == "0.700†"
    assert mine["mel distance"] == "1.000"
    assert mine["PESQ-WB"] == "–"
    assert mine["worst band"] == "-2.0 at 1000 Hz"
    assert [row[0] for row in found["Speech by source"].rows] == ["from a", "from b", "from c"]
    assert found["Not scored"].rows == [
        ["all", "Opus 6", "gone"],
        ["STOI of 1 clips: speech", "mine, Codec 2 700C", "too short"],
    ]
    assert "| mine | 0.70 | – | – | 0.700† |" in speech.markdown()
    assert all(table.rich().row_count == len(table.rows) for table in found.values())


def test_json_holds_every_clip(small: Evaluation) -> None:
    report = json.loads(json.dumps(as_json(small), allow_nan=False))
    assert report["groups"]["speech"]["mine"]["stoi"]["clips"] == 2
    assert report["wins"]["Codec 2 700C"]["mel_distance"] == {"wins": 2, "clips": 3}
    assert report["not_run"] == {"Opus 6": "gone"}
    assert len(report["scores"]) == 6


# Command line


def test_the_command_writes_json_and_markdown(
    folder: Path,
    tokenizer: AudioTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(audiotok.AutoAudioTokenizer, "from_pretrained", lambda name, device: tokenizer)
    report, table = tmp_path / "report.json", tmp_path / "table.md"
    evaluate_codec.run("some/tiny", folder, report, table, limit=1, baselines=False)
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["model"] == "tiny"
    assert found["fingerprint"] == tokenizer.fingerprint
    assert found["clips"] == {"speech": 1, "narrow-band speech": 1, "music": 1, "sound": 1}
    assert "### Use of the codebooks: tiny" in table.read_text(encoding="utf-8")
    assert "tiny (continuous)" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(OutputExistsError, match="--overwrite"):
        evaluate_codec.run("some/tiny", folder, report)


# The real test set


@pytest.mark.slow
@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        (Codec2("700C"), {"pesq_wb": 1.285, "pesq_nb": 1.830, "stoi": 0.697, "estoi": 0.565, "mel_distance": 3.101}),
        (Codec2("1300"), {"pesq_wb": 1.336, "pesq_nb": 2.010, "stoi": 0.762, "estoi": 0.605, "mel_distance": 2.937}),
        (Opus(), {"pesq_wb": 2.051, "pesq_nb": 2.979, "stoi": 0.876, "estoi": 0.793, "mel_distance": 1.257}),
    ],
    ids=lambda value: value.name if isinstance(value, Baseline) else "",
)
def test_baselines_on_held_out_speech(baseline: Baseline, expected: dict[str, float], shared: Path) -> None:
    """Codec 2 1.0.5 (Debian) and libsndfile 1.2.2, 37 clips."""
    if reason := baseline.why_unavailable():
        pytest.skip(f"{baseline.name}: {reason}")
    clips = [clip for clip in evaluate_codec.read_clips(shared / "data" / "test") if clip.group == "speech"]
    scores = []
    for clip in clips:
        reference = load_audio(clip.path, target_rate=RATE, channels=1, downmix="mean").samples[0]
        scores.append(compare(reference, baseline.reconstruct(reference, RATE).waveform, RATE, expected))
    assert len(scores) == 37
    for name, value in expected.items():
        assert np.mean([s[name] for s in scores]) == pytest.approx(value, abs=0.02), METRICS[name].label
