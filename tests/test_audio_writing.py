"""Waveforms to files and back: what is kept, what is said, and that nothing partial is ever left behind."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest

from audiotok import audio_writing
from audiotok.audio import AudioClippingWarning, AudioWriter, load_audio, probe, save_audio
from audiotok.errors import (
    AudioTokError,
    ChannelError,
    EmptyAudioError,
    NonFiniteAudioError,
    OptionError,
    OutputError,
    OutputExistsError,
    OutputNotWritableError,
)

RATE = 16_000
SAMPLES = (0.1 * np.random.default_rng(0).standard_normal(8000)).astype(np.float32)


def noise(channels: int, samples: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal((channels, samples))).astype(np.float32)


class TestWriting:
    @pytest.mark.parametrize(
        ("name", "subtype", "error"),
        [
            ("a.wav", None, 0),
            ("a.wav", "PCM_16", 0.5 / 2**15),
            ("a.wav", "PCM_24", 0.5 / 2**23),
            ("a.flac", None, 0.5 / 2**15),
            ("a.flac", "PCM_24", 0.5 / 2**23),
        ],
    )
    @pytest.mark.parametrize("channels", [1, 2])
    def test_round_trip(self, tmp_path, name, subtype, error, channels):
        samples = noise(channels, 70_000)
        save_audio(tmp_path / name, samples, 44_100, subtype=subtype)
        wave = load_audio(tmp_path / name)
        assert wave.sampling_rate == 44_100 and wave.samples.shape == samples.shape
        assert np.abs(wave.samples - samples).max() <= error * 1.0001
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_vorbis(self, tmp_path):
        angle = 2 * np.pi * np.arange(88_200) / 44_100
        samples = np.stack([0.5 * np.sin(440 * angle), 1.2 * np.sin(700 * angle)])  # it keeps what is beyond ±1
        save_audio(tmp_path / "a.ogg", samples, 44_100)
        error = load_audio(tmp_path / "a.ogg").samples - samples
        assert np.mean(error**2) < 0.01 * np.mean(samples**2)

    def test_float_wav_keeps_everything(self, tmp_path):
        save_audio(tmp_path / "a.wav", [2.5, -1.25, 1e-30], 16_000)
        assert load_audio(tmp_path / "a.wav").samples.tolist() == [np.float32([2.5, -1.25, 1e-30]).tolist()]

    @pytest.mark.parametrize(("name", "subtype"), [("a.wav", "PCM_16"), ("a.flac", "PCM_24"), ("a.wav", "PCM_24")])
    def test_clipping_is_said(self, tmp_path, name, subtype):
        with pytest.warns(AudioClippingWarning, match=r"2 of 4 values .* beyond ±1 .*FLOAT"):
            save_audio(tmp_path / name, [1.5, -3.0, 1.0, -1.0], 16_000, subtype=subtype)
        np.testing.assert_allclose(load_audio(tmp_path / name).samples, [[1, -1, 1, -1]], atol=1e-4)

    def test_rounding_adds_no_offset(self, tmp_path):
        save_audio(tmp_path / "a.wav", noise(1, 100_000), 16_000, subtype="PCM_16")
        error = load_audio(tmp_path / "a.wav").samples - noise(1, 100_000)
        assert abs(error.mean()) < 0.01 / 2**15

    def test_pieces(self, tmp_path):
        samples = noise(2, 100_000)
        with AudioWriter(tmp_path / "a.wav", 24_000, channels=2) as writer:
            for start in range(0, 100_000, 7_001):
                writer.write(samples[:, start : start + 7_001])
            assert writer.num_samples == 100_000
            assert not (tmp_path / "a.wav").exists()
        np.testing.assert_array_equal(load_audio(tmp_path / "a.wav").samples, samples)

    def test_file_object(self):
        target = io.BytesIO()
        save_audio(target, [0.1, 0.2], 16_000, format="flac")
        assert load_audio(target).num_samples == 2

    def test_pipe(self):
        read_end, write_end = os.pipe()
        with open(write_end, "wb") as pipe:
            save_audio(pipe, [0.1, 0.2], 16_000, format="wav")
        with open(read_end, "rb") as pipe:
            assert load_audio(pipe).num_samples == 2

    def test_suffix_is_not_case_sensitive(self, tmp_path):
        save_audio(tmp_path / "A.FLAC", [0.1], 16_000)
        assert probe(tmp_path / "A.FLAC").format == "FLAC"

    def test_shape_that_could_be_read_in_two_ways(self, tmp_path):
        save_audio(tmp_path / "a.wav", np.array([[0.1], [0.2]]), 16_000, channels=2)
        assert load_audio(tmp_path / "a.wav").samples.shape == (2, 1)

    def test_overwrite(self, tmp_path):
        save_audio(tmp_path / "a.wav", [0.1], 16_000)
        save_audio(tmp_path / "a.wav", [0.1, 0.2], 16_000, overwrite=True)
        assert probe(tmp_path / "a.wav").num_samples == 2

    def test_new_file_has_the_usual_rights(self, tmp_path):
        save_audio(tmp_path / "a.wav", [0.1], 16_000)
        (tmp_path / "b").touch()
        assert (tmp_path / "a.wav").stat().st_mode == (tmp_path / "b").stat().st_mode

    def test_killed_writer_leaves_nothing_under_the_name(self, tmp_path):
        script = (
            "import os, sys; from audiotok.audio import AudioWriter\n"
            "w = AudioWriter(sys.argv[1], 16000); w.write([0.1] * 99999); os._exit(9)"
        )
        subprocess.run([sys.executable, "-c", script, tmp_path / "a.wav"], check=False)
        assert not (tmp_path / "a.wav").exists()


class TestBadOutput:
    def test_exists(self, tmp_path):
        (tmp_path / "a.wav").write_text("precious")
        with pytest.raises(OutputExistsError, match="exists: give another path, or ask to overwrite it") as caught:
            save_audio(tmp_path / "a.wav", SAMPLES, RATE)
        assert isinstance(caught.value, FileExistsError) and caught.value.exit_code == 6
        assert (tmp_path / "a.wav").read_text() == "precious"
        assert len(list(tmp_path.iterdir())) == 1

    def test_appears_while_writing(self, tmp_path):
        writer = AudioWriter(tmp_path / "a.wav", RATE)
        writer.write(SAMPLES)
        (tmp_path / "a.wav").write_text("precious")
        with pytest.raises(OutputExistsError):
            writer.close()
        assert (tmp_path / "a.wav").read_text() == "precious"
        assert len(list(tmp_path.iterdir())) == 1

    def test_folder(self, tmp_path):
        for overwrite in (False, True):
            with pytest.raises(OutputNotWritableError, match="is a folder"):
                save_audio(tmp_path, SAMPLES, RATE, format="wav", overwrite=overwrite)

    def test_impossible_path(self):
        with pytest.raises(OutputNotWritableError, match="null"):
            save_audio("a\0b.wav", SAMPLES, RATE)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(OutputNotWritableError, match=r"No such file or directory.*check the folder"):
            save_audio(tmp_path / "none" / "a.wav", SAMPLES, RATE)

    def test_no_rights(self, tmp_path, without_root):
        tmp_path.chmod(0o555)
        with without_root(), pytest.raises(OutputNotWritableError, match="Permission denied"):
            save_audio(tmp_path / "a.wav", SAMPLES, RATE)

    @pytest.mark.parametrize(
        ("name", "samples", "room"),
        [
            ("a.wav", 500_000, 20_000),
            ("a.wav", 3_000, 40),
            ("a.flac", 500_000, 20_000),
            ("a.flac", 3_000, 4_000),  # held back until the file is closed, when libsndfile reports nothing
            ("a.flac", 5_000, 9_000),
            ("a.ogg", 500_000, 20_000),
            ("a.ogg", 3_000, 4_000),
            ("a.ogg", 20_000, 9_000),
        ],
    )
    def test_disk_full(self, tmp_path, name, samples, room):
        """With a limit on the size of files, the kernel refuses to write on, as on a full disk."""
        script = (
            "import resource, signal, sys, numpy as np; from audiotok.audio import save_audio\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "samples = np.random.default_rng(0).uniform(-1, 1, int(sys.argv[2]))\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)\n"
            "try: save_audio(sys.argv[1], samples, 16000)\n"
            "except Exception as error: message = type(error).__name__ + str(error)\n"
            "else: message = 'no error'\n"
            "sys.exit(message)"  # to stderr, a pipe: the limit holds for files
        )
        command = [sys.executable, "-c", script, str(tmp_path / name), str(samples), str(room)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stderr.startswith("OutputNotWritableError") and "File too large" in done.stderr
        assert not list(tmp_path.iterdir())

    def test_broken_pipe(self):
        read_end, write_end = os.pipe()
        os.close(read_end)
        with pytest.raises(OutputNotWritableError, match=r"the file object cannot be written .Broken pipe"):
            with open(write_end, "wb", buffering=0) as pipe:
                save_audio(pipe, SAMPLES, RATE, format="wav")

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("a.mp3", {}, r"suffix '.mp3' .* names no format that can be written: use .wav, .flac, .ogg"),
            ("a", {}, "suffix '' of"),
            ("a.wav", {"format": "wave"}, "format='wave' is not legal.*Did you mean"),
            ("a.wav", {"subtype": "PCM_8"}, "subtype='PCM_8' is not legal: choose one of FLOAT, PCM_16, PCM_24"),
            ("a.flac", {"subtype": "FLOAT"}, "choose one of PCM_16, PCM_24"),
            ("a.ogg", {"sampling_rate": 384_000}, r"ogg cannot hold 1 channels at 384000 Hz: .* up to 192000 Hz"),
            ("a.flac", {"samples": np.zeros((9, 10))}, "flac cannot hold 9 channels at 16000 Hz: it takes 1 to 8"),
            ("a.wav", {"sampling_rate": 0}, "sampling_rate=0 is not legal"),
        ],
    )
    def test_illegal_options(self, tmp_path, name, options, message):
        arguments = {"samples": SAMPLES, "sampling_rate": RATE} | options
        with pytest.raises(AudioTokError, match=message):
            save_audio(tmp_path / name, **arguments)
        assert not list(tmp_path.iterdir())

    def test_file_object_without_format(self):
        with pytest.raises(OptionError, match="A file object has no suffix: say format="):
            save_audio(io.BytesIO(), SAMPLES, RATE)

    def test_text_file_object(self):
        with pytest.raises(OptionError, match="A StringIO takes no audio"):
            save_audio(io.StringIO(), SAMPLES, RATE, format="wav")

    def test_bad_samples_leave_nothing(self, tmp_path):
        with pytest.raises(NonFiniteAudioError), AudioWriter(tmp_path / "a.wav", RATE) as writer:
            writer.write(SAMPLES)
            writer.write([0.0, np.nan])
        assert not list(tmp_path.iterdir())

    def test_error_in_the_block_leaves_nothing(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), AudioWriter(tmp_path / "a.wav", RATE) as writer:
            writer.write(SAMPLES)
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())

    def test_nothing_written(self, tmp_path):
        with pytest.raises(EmptyAudioError, match="Nothing was written"), AudioWriter(tmp_path / "a.wav", RATE):
            pass
        assert not list(tmp_path.iterdir())

    def test_other_channels(self, tmp_path):
        with AudioWriter(tmp_path / "a.wav", RATE, channels=2) as writer:
            with pytest.raises(ChannelError, match="A piece has 1 channels where 2 were announced"):
                writer.write(SAMPLES)
            writer.write(np.stack([SAMPLES, SAMPLES]))
        with pytest.raises(OptionError, match="writer is closed"):
            writer.write(SAMPLES)

    def test_more_than_a_wav_file_holds(self, tmp_path, monkeypatch):
        monkeypatch.setattr(audio_writing, "_MAX_WAV_BYTES", 40_000)
        with pytest.raises(OutputError, match="would hold 64000 bytes of audio, a WAV file at most 40000: write FLAC"):
            with AudioWriter(tmp_path / "a.wav", RATE) as writer:
                writer.write(SAMPLES)
                writer.write(SAMPLES)
        assert not list(tmp_path.iterdir())

    @pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
    def test_interrupt(self, tmp_path, name, interrupted_after, capfd):
        for delay in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05):
            with pytest.raises(KeyboardInterrupt), AudioWriter(tmp_path / name, RATE) as writer:
                with interrupted_after(delay):
                    while True:
                        writer.write(SAMPLES)
            assert not list(tmp_path.iterdir())
        assert capfd.readouterr().err == ""
