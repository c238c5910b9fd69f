"""Recordings in, waveforms out: every kind of source, every format, channels, real recordings."""

from __future__ import annotations

import csv
import io
import math
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from audio_signals import decibels, noise, tone

from audiotok import audio
from audiotok.audio import Waveform, load_audio, open_audio, probe
from audiotok.errors import ChannelError


def encoded(samples: np.ndarray, rate: int, format: str, subtype: str | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.T, rate, format=format, subtype=subtype, **options)
    return buffer.getvalue()


# Sources


class TestSources:
    """The same clip, whatever it comes in."""

    samples = noise(2, 1000)

    @pytest.fixture
    def path(self, write_audio):
        return write_audio("clip.wav", self.samples, 16_000, "FLOAT")

    def sources(self, path: Path) -> dict[str, object]:
        content = path.read_bytes()
        decoder = SimpleNamespace(
            get_all_samples=lambda: SimpleNamespace(data=torch.from_numpy(self.samples), sample_rate=16_000)
        )
        return {
            "Path": path,
            "str": str(path),
            "bytes": content,
            "bytearray": bytearray(content),
            "memoryview": memoryview(content),
            "BytesIO": io.BytesIO(content),
            "row with bytes": {"bytes": content, "path": "/of/another/machine.wav"},
            "row with path": {"bytes": None, "path": str(path)},
            "row with array": {"array": self.samples, "sampling_rate": 16_000, "path": None},
            "decoder": decoder,
            "Waveform": Waveform(self.samples, 16_000),
        }

    def test_sources_that_know_their_rate(self, path):
        for name, source in self.sources(path).items():
            wave = load_audio(source)
            assert wave.sampling_rate == 16_000, name
            assert wave.samples.dtype == np.float32 and wave.samples.flags.c_contiguous, name
            np.testing.assert_array_equal(wave.samples, self.samples, err_msg=name)
            assert probe(source).num_samples == 1000, name

    def test_arrays_need_their_rate(self):
        arrays = {
            "float32": self.samples,
            "float64": self.samples.astype(np.float64),
            "list": self.samples.tolist(),
            "tensor": torch.from_numpy(self.samples),
            "tensor with gradient": torch.from_numpy(self.samples).requires_grad_(),
            "not contiguous": np.asfortranarray(self.samples),
        }
        for name, array in arrays.items():
            wave = load_audio(array, sampling_rate=24_000)
            assert wave.sampling_rate == 24_000
            np.testing.assert_array_equal(wave.samples, self.samples, err_msg=name)

    def test_half_precision_is_cast(self):
        for half in (torch.bfloat16, torch.float16):
            tensor = torch.from_numpy(self.samples).to(half)
            np.testing.assert_array_equal(load_audio(tensor, sampling_rate=8000).samples, tensor.float().numpy())

    def test_one_dimension_is_mono(self):
        assert load_audio([0.0, 0.5], sampling_rate=8000).samples.shape == (1, 2)

    def test_result_shares_no_memory(self):
        array = self.samples.copy()
        load_audio(array, sampling_rate=8000).samples[:] = 0
        np.testing.assert_array_equal(array, self.samples)

    def test_file_object_is_read_from_its_start_and_stays_open(self, path):
        with path.open("rb") as file:
            file.seek(17)
            np.testing.assert_array_equal(load_audio(file).samples, self.samples)
            assert not file.closed

    def test_pipe(self, path):
        read_end, write_end = os.pipe()
        writer = threading.Thread(target=lambda: (os.write(write_end, path.read_bytes()), os.close(write_end)))
        writer.start()
        with open(read_end, "rb") as pipe:
            np.testing.assert_array_equal(load_audio(pipe).samples, self.samples)
        writer.join()

    def test_named_pipe(self, path, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(path.read_bytes()))
        writer.start()
        np.testing.assert_array_equal(load_audio(tmp_path / "pipe").samples, self.samples)
        writer.join()

    def test_reader_that_returns_little_at_a_time(self, path):
        class Trickle(io.BytesIO):
            def read(self, count=-1):
                return super().read(min(count, 7))

        np.testing.assert_array_equal(load_audio(Trickle(path.read_bytes())).samples, self.samples)

    def test_file_is_closed(self, path):
        before = len(os.listdir("/proc/self/fd"))
        load_audio(path)
        probe(path)
        with pytest.raises(ChannelError):
            load_audio(path, channels=1)
        assert len(os.listdir("/proc/self/fd")) == before

    def test_two_values_of_two_channels(self):
        """What could be read both ways is settled by the channels that are asked for."""
        square = np.array([[0.1, 0.2], [0.3, 0.4]], np.float32)
        np.testing.assert_array_equal(load_audio(square, sampling_rate=8000, channels=2).samples, square)
        single = square[:, :1]
        np.testing.assert_array_equal(load_audio(single, sampling_rate=8000, channels=2).samples, single)


# Formats


@pytest.mark.parametrize(
    ("name", "subtype", "error_db"),
    [
        ("a.wav", "PCM_U8", -35),
        ("a.wav", "PCM_16", -80),
        ("a.wav", "PCM_24", -130),
        ("a.wav", "PCM_32", -130),
        ("a.wav", "FLOAT", -1000),
        ("a.wav", "DOUBLE", -1000),
        ("a.wav", "ULAW", -25),
        ("a.aiff", "PCM_16", -80),
        ("a.au", "PCM_16", -80),
        ("a.w64", "PCM_16", -80),
        ("a.rf64", "PCM_16", -80),
        ("a.caf", "PCM_16", -80),
        ("a.flac", "PCM_16", -80),
        ("a.flac", "PCM_24", -130),
        ("a.ogg", "VORBIS", -15),
        ("a.ogg", "OPUS", -15),
        ("a.mp3", None, -15),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_formats(write_audio, name, subtype, error_db, channels):
    original = np.stack([tone(48_000, 0.5), tone(48_000, 0.5, 700)])[:channels]
    path = write_audio(name, original, 48_000, subtype)
    wave = load_audio(path)
    assert wave.samples.shape == (channels, 24_000) and wave.sampling_rate == 48_000
    info = probe(path)
    assert (info.channels, info.num_samples, info.duration) == (channels, 24_000, 0.5)
    if error_db == -1000:
        np.testing.assert_array_equal(wave.samples, original)
    else:
        assert decibels(wave.samples - original, original) < error_db
    np.testing.assert_array_equal(wave.samples, soundfile.read(path, dtype="float32", always_2d=True)[0].T)


def test_values_beyond_full_scale_are_kept(write_audio):
    path = write_audio("loud.wav", np.array([0.0, 1.5, -2.5]), 16_000, "FLOAT")
    assert load_audio(path).samples.tolist() == [[0.0, 1.5, -2.5]]


def test_misleading_suffix(write_audio):
    """The content decides; soundfile alone refuses a file called .raw."""
    path = write_audio("a.wav", tone(16_000, 0.1), 16_000)
    for suffix in (".raw", ".mp3", ".txt", ""):
        path = path.rename(path.with_suffix(suffix))
        assert probe(path).format == "WAV"


@pytest.mark.parametrize(
    ("riff", "data"),
    [
        pytest.param(0xFFFFFFFF, 0xFFFFFFFF, id="ffmpeg"),
        pytest.param(0x7FFFF024, 0x7FFFF000, id="sox"),
        pytest.param(0x80000024, 0x80000000, id="arecord"),
        pytest.param(0, 0, id="left open"),
        pytest.param(36, 0, id="left open, written header"),
    ],
)
def test_wav_written_to_a_pipe(riff, data):
    """Its header holds placeholders for the length; the samples are all there."""
    samples = tone(16_000, 0.5)
    content = bytearray(encoded(samples, 16_000, "WAV", "PCM_16"))
    struct.pack_into("<I", content, 4, riff)
    struct.pack_into("<I", content, 40, data)
    wave = load_audio(bytes(content))
    np.testing.assert_array_equal(wave.samples, load_audio(encoded(samples, 16_000, "WAV", "PCM_16")).samples)


def test_flac_of_unknown_length():
    """A FLAC encoder that writes to a pipe leaves the number of samples at 0."""
    content = bytearray(encoded(noise(1, 10_000), 16_000, "FLAC", "PCM_16"))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    assert probe(bytes(content)).num_samples is None
    assert load_audio(bytes(content)).num_samples == 10_000


def test_flac_with_a_tag_behind_the_audio():
    content = encoded(noise(1, 10_000), 16_000, "FLAC", "PCM_16")
    np.testing.assert_array_equal(load_audio(content + b"TAG" + bytes(125)).samples, load_audio(content).samples)


def test_mp3_blocks_equal_the_whole(monkeypatch):
    """soundfile seeks after each read, which restarts the decoder in the middle of the bit reservoir."""
    content = encoded(tone(24_000, 1.0, 191, 0.3), 24_000, "MP3")
    whole = load_audio(content).samples
    np.testing.assert_allclose(whole[0], soundfile.read(io.BytesIO(content), dtype="float32")[0], atol=1e-6)
    monkeypatch.setattr(audio, "_BLOCK_VALUES", 1000)
    np.testing.assert_array_equal(load_audio(content).samples, whole)


@pytest.mark.parametrize("loud_first", [True, False])
def test_mp3_without_a_length(loud_first):
    """libsndfile guesses the length from the first frame: 23 % of the file, or 186 %."""
    parts = [0.3 * np.random.default_rng(0).standard_normal(96_000), np.zeros(96_000)]
    samples = np.concatenate(parts if loud_first else parts[::-1]).astype(np.float32)
    content = encoded(samples, 48_000, "MP3", bitrate_mode="VARIABLE", compression_level=0.3)
    assert b"Xing" in content[:100]
    bare = content[_mp3_frame_length(content) :]
    wave = load_audio(bare)
    assert probe(bare).num_samples is None
    # Without the tag the encoder's delay stays in: 1105 samples in front, and the last frame is whole.
    assert 0 < wave.num_samples - 192_000 < 3 * 1152
    np.testing.assert_allclose(wave.samples[0, 1105:][:190_000], load_audio(content).samples[0, :190_000], atol=1e-3)
    with_id3 = b"ID3\x03\x00\x00\x00\x02\x00\x00" + bytes(2 << 14) + bare  # 32 KiB: a picture
    assert load_audio(with_id3).num_samples == wave.num_samples


def test_stream_of_unknown_length_is_left_early():
    """The thread behind it ends."""
    content = encoded(noise(1, 100_000), 48_000, "MP3", bitrate_mode="CONSTANT")
    frames = content[_mp3_frame_length(content) :] * 20  # more than a pipe holds
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with open_audio(frames) as stream:
        assert stream.num_samples is None
        assert stream.read(1000).shape == (1, 1000)
        assert threading.active_count() == before[0] + 1
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def _mp3_frame_length(content: bytes) -> int:
    kbps = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[content[2] >> 4]
    rate = (44_100, 48_000, 32_000)[content[2] >> 2 & 3]
    return 144_000 * kbps // rate + (content[2] >> 1 & 1)


# Channels


@pytest.mark.parametrize(
    ("count", "channels", "downmix", "expected"),
    [
        (1, 1, None, [[1, 2, 3]]),
        (2, None, None, [[1, 2, 3], [3, 4, 5]]),
        (2, 2, None, [[1, 2, 3], [3, 4, 5]]),
        (2, 1, "mean", [[2, 3, 4]]),
        (2, None, "mean", [[2, 3, 4]]),
        (2, 1, 0, [[1, 2, 3]]),
        (2, 1, 1, [[3, 4, 5]]),
        (2, None, 1, [[3, 4, 5]]),
        (1, 2, "repeat", [[1, 2, 3], [1, 2, 3]]),
        (1, 1, "mean", [[1, 2, 3]]),
        (2, 2, "mean", [[1, 2, 3], [3, 4, 5]]),
        (2, 2, "repeat", [[1, 2, 3], [3, 4, 5]]),
    ],
)
def test_channels(count, channels, downmix, expected):
    samples = np.array([[1.0, 2, 3], [3.0, 4, 5]])[:count]
    wave = load_audio(samples, sampling_rate=8000, channels=channels, downmix=downmix)
    assert wave.samples.tolist() == expected


def test_many_channels(write_audio):
    samples = noise(40, 5000)
    path = write_audio("a.wav", samples, 48_000, "FLOAT")
    np.testing.assert_allclose(load_audio(path, downmix="mean").samples[0], samples.mean(axis=0), atol=1e-7)


# Real recordings


def test_real_recordings(shared):
    """The test set: rate, channels and length as listed; of every fourth, the samples as soundfile decodes them."""
    with (shared / "data/test/metadata.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 400
    for number, row in enumerate(rows):
        path = shared / "data/test" / row["file_name"]
        info = probe(path)
        assert (info.sampling_rate, info.channels) == (int(row["sample_rate"]), int(row["channels"])), path
        assert info.duration == pytest.approx(float(row["duration"]), abs=0.006), path
        if number % 4 == 0:
            wave = load_audio(path)
            assert wave.num_samples == info.num_samples
            np.testing.assert_array_equal(wave.samples, soundfile.read(path, dtype="float32", always_2d=True)[0].T)


@pytest.mark.parametrize(
    ("name", "channels", "seconds", "peak"),
    [
        ("speech/jfk_44k_stereo.flac", 2, 11.00, 0.78),
        ("speech/remy_002_48k.flac", 1, 4.61, 0.31),
        ("speech/digits/6_yweweler_3.flac", 1, 0.14, 0.04),
        ("music/sonicpi_tabla_ke1.flac", 1, 0.04, 0.84),
        ("music/opensurge_gimacian_01.ogg", 2, 20.00, 1.26),
        ("sound/ccsounds_thunder_near.ogg", 1, 14.00, 2.69),
        ("sound/ccsounds_weather_sunny_autumn.ogg", 1, 14.61, 0.03),
        ("sound/opensurge_sfx_deny.flac", 1, 0.46, 1.00),
        ("sound/humpback_dc_offset.ogg", 1, 10.00, 0.66),
        ("sound/robin_stereo.ogg", 2, 2.70, 0.81),
    ],
)
def test_awkward_recordings(shared, name, channels, seconds, peak):
    path = shared / "data/test" / name
    wave = load_audio(path)
    assert wave.channels == channels
    assert wave.duration == pytest.approx(seconds, abs=0.006)
    assert np.abs(wave.samples).max() == pytest.approx(peak, abs=0.006)
    mono = load_audio(path, target_rate=24_000, channels=1, downmix="mean")
    assert mono.num_samples == math.ceil(wave.num_samples * 24_000 / wave.sampling_rate)


def test_import_is_light():
    script = "import sys, audiotok.audio; print(*({'torch', 'transformers', 'datasets', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "\n"


@pytest.mark.parametrize("rate", [np.array(16_000), torch.tensor(16_000), np.int64(16_000)])
def test_a_rate_may_be_a_number_in_an_array(rate: object) -> None:
    """As rows of `datasets` have it in the format of NumPy or torch."""
    found = load_audio({"array": np.zeros(10), "sampling_rate": rate})
    assert found.sampling_rate == 16_000
