"""Bad audio: every row has its own error class, and a sentence with the value, what is legal and what to do."""

from __future__ import annotations

import errno
import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiotok.audio import load_audio, open_audio, probe
from audiotok.errors import (
    AudioFileNotFoundError,
    AudioInputError,
    AudioIsDirectoryError,
    AudioNotReadableError,
    AudioShapeError,
    ChannelError,
    EmptyAudioError,
    EmptyFileError,
    IntegerAudioError,
    MissingSamplingRateError,
    NonFiniteAudioError,
    NotAudioError,
    OptionError,
    SamplingRateError,
    TruncatedAudioError,
)

RATE = 16_000
SAMPLES = (0.1 * np.random.default_rng(0).standard_normal(8000)).astype(np.float32)


def encoded(format: str, subtype: str | None = None, samples: np.ndarray = SAMPLES) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format=format, subtype=subtype)
    return buffer.getvalue()


# Files


class TestFiles:
    @pytest.mark.parametrize("read", [load_audio, open_audio, probe])
    def test_missing_file(self, tmp_path, read):
        with pytest.raises(AudioFileNotFoundError, match=r"none.wav' does not exist: give the path") as caught:
            read(tmp_path / "none.wav")
        assert isinstance(caught.value, FileNotFoundError | ValueError) and caught.value.exit_code == 3

    def test_folder(self, tmp_path):
        with pytest.raises(AudioIsDirectoryError, match="is a folder: give the path of one audio file") as caught:
            load_audio(tmp_path)
        assert isinstance(caught.value, IsADirectoryError)

    def test_no_rights(self, tmp_path, without_root):
        path = tmp_path / "secret.wav"
        path.write_bytes(encoded("WAV"))
        path.chmod(0)
        with without_root(), pytest.raises(AudioNotReadableError, match=r"Permission denied.*check the path") as caught:
            load_audio(path)
        assert isinstance(caught.value, PermissionError)

    @pytest.mark.parametrize("path", ["a\0b.wav", "x" * 5000])
    def test_impossible_path(self, path):
        with pytest.raises(AudioNotReadableError, match="cannot be opened"):
            load_audio(path)

    @pytest.mark.parametrize("content", [b"hello world " * 1000, bytes(10_000), b"RIFF", b"\xff\xd8\xff\xe0" * 99])
    def test_not_audio(self, tmp_path, content):
        (tmp_path / "a.wav").write_bytes(content)
        with pytest.raises(NotAudioError, match=r"a.wav' is no audio that libsndfile .* understands \(.*give WAV"):
            load_audio(tmp_path / "a.wav")
        with pytest.raises(NotAudioError, match="The bytes object is no audio"):
            load_audio(content)

    def test_empty_file(self, tmp_path):
        (tmp_path / "a.wav").touch()
        with pytest.raises(EmptyFileError, match=r"a.wav' is empty \(0 bytes\)"):
            load_audio(tmp_path / "a.wav")
        with pytest.raises(EmptyFileError, match="The bytes object is empty"):
            load_audio(b"")

    @pytest.mark.parametrize(
        ("format", "subtype", "counts"),
        [
            ("WAV", "PCM_16", r"16000 bytes of audio, the file holds 9582 \(8000 against 4791 samples\)"),
            ("WAV", "PCM_24", r"24000 bytes of audio, the file holds 14382 \(8000 against 4794 samples\)"),
            ("WAV", "FLOAT", r"32000 bytes .* \(8000 against \d+ samples\)"),
            ("WAV", "MS_ADPCM", r"\d+ bytes of audio, the file holds \d+\."),
            ("RF64", "PCM_16", r"16000 bytes .* \(8000 against \d+ samples\)"),
            ("AIFF", "PCM_16", r"16000 bytes .* \(8000 against \d+ samples\)"),
            ("AU", "PCM_16", r"16000 bytes .* \(8000 against \d+ samples\)"),
            ("NIST", "PCM_16", r"16000 bytes .* \(8000 against \d+ samples\)"),
            ("FLAC", "PCM_16", r"promises 8000 samples, decoding fails between sample 0 and 8000 .*Fetch it again"),
            ("MP3", None, r"promises 8000 samples, the file holds \d+\. Fetch it again"),
        ],
    )
    def test_truncated(self, format, subtype, counts):
        content = encoded(format, subtype)
        assert load_audio(content).num_samples >= 8000
        with pytest.raises(TruncatedAudioError, match=f"cut off.*{counts}"):
            load_audio(content[: len(content) * 6 // 10])

    def test_truncated_stream_gives_what_is_there_first(self):
        """FLAC frames hold 4096 samples; the first ones can be had, then the error comes."""
        content = encoded("FLAC", samples=np.tile(SAMPLES, 100))
        with open_audio(content[: len(content) * 9 // 10]) as stream:
            assert stream.read(10_000).shape == (1, 10_000)
            with pytest.raises(
                TruncatedAudioError, match=r"promises 800000 samples, decoding fails between sample \d+"
            ):
                stream.read()

    def test_one_sample_less_than_promised(self):
        with pytest.raises(TruncatedAudioError, match="8000 against 7999 samples"):
            load_audio(encoded("WAV", "PCM_16")[:-2])

    @pytest.mark.parametrize("frames", [2**31 - 1, 2**35])
    def test_header_that_promises_too_much(self, frames):
        """Nothing is reserved for what a header promises."""
        content = bytearray(encoded("FLAC"))
        content[21] = content[21] & 0xF0 | frames >> 32
        struct.pack_into(">I", content, 22, frames & 0xFFFFFFFF)
        assert probe(bytes(content)).num_samples == frames
        with pytest.raises(TruncatedAudioError, match=f"promises {frames} samples"):
            load_audio(bytes(content))

    def test_damaged(self):
        content = bytearray(encoded("FLAC"))
        content[len(content) // 2] ^= 0xFF
        with pytest.raises(TruncatedAudioError, match="cut off or damaged"):
            load_audio(bytes(content))

    def test_mp3_with_a_misleading_tag(self):
        """libsndfile would make up a length from it, and stop there."""
        content = bytearray(encoded("MP3"))
        content[content.index(b"Xing") + 7] &= 0xFE  # its flag for "the number of frames follows"
        with pytest.raises(NotAudioError, match=r"Xing tag without the number of frames.*write it anew \(ffmpeg"):
            load_audio(bytes(content))

    @pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
    def test_absurd_rate_in_the_header(self, rate):
        content = bytearray(encoded("WAV", "PCM_16"))
        struct.pack_into("<I", content, 24, rate)
        with pytest.raises(SamplingRateError, match=f"says {rate} Hz; legal are 1000 to 768000 Hz"):
            load_audio(bytes(content))

    def test_no_samples(self, tmp_path):
        soundfile.write(tmp_path / "a.wav", np.zeros(0), RATE)
        assert probe(tmp_path / "a.wav").num_samples == 0
        with pytest.raises(EmptyAudioError, match="holds 0 samples: give at least one"):
            open_audio(tmp_path / "a.wav")

    def test_nan_in_a_file(self, tmp_path):
        samples = np.tile(SAMPLES, 100)
        samples[[300_000, 300_001]] = np.nan
        soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
        with pytest.raises(NonFiniteAudioError, match=r"2 of the \d+ values .* first \(nan\) at sample 300000 of"):
            load_audio(tmp_path / "a.wav", target_rate=24_000)

    def test_wrong_rate_stated(self, tmp_path):
        soundfile.write(tmp_path / "a.wav", SAMPLES, RATE)
        with pytest.raises(SamplingRateError, match=r"sampling_rate=44100 .* says 16000 Hz: leave .* target_rate"):
            load_audio(tmp_path / "a.wav", sampling_rate=44_100)

    def test_text_file_object(self, tmp_path):
        (tmp_path / "a.txt").write_text("hello")
        with (tmp_path / "a.txt").open() as file, pytest.raises(AudioInputError, match="open it for bytes"):
            load_audio(file)

    def test_failing_file_object(self):
        class Failing(io.BytesIO):
            def read(self, count=-1):
                if self.tell() > 1000:
                    raise OSError(errno.EIO, "cable pulled")
                return super().read(count)

        with pytest.raises(AudioNotReadableError, match="cable pulled"):
            load_audio(Failing(encoded("WAV")))
        closed = io.BytesIO(encoded("WAV"))
        closed.close()
        with pytest.raises(AudioNotReadableError, match="closed"):
            load_audio(closed)

    def test_failing_disk(self, monkeypatch):
        def fail(*arguments, **options):
            raise soundfile.LibsndfileError(2)  # what libsndfile makes of EIO

        with open_audio(encoded("WAV")) as stream:
            monkeypatch.setattr(soundfile.SoundFile, "read", fail)
            with pytest.raises(AudioNotReadableError, match=r"cannot be read between sample 0 and \d+: check the disk"):
                stream.read()

    def test_nothing_is_printed(self, tmp_path):
        """libmpg123 prints remarks; a corpus of old MP3 files must not flood the terminal."""
        (tmp_path / "a.mp3").write_bytes(encoded("MP3")[:1400])
        script = (
            "import sys; from audiotok.audio import load_audio\n"
            "try: load_audio(sys.argv[1])\n"
            "except ValueError: print('here', file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", script, tmp_path / "a.mp3"], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("", "here\n")


# Interruptions


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_interrupt(format, interrupted_after, capfd):
    """Ctrl-C while a file is read stops the program; it is no sign of a cut file."""
    content = encoded(format, samples=np.tile(SAMPLES, 10))
    for delay in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05):
        with pytest.raises(KeyboardInterrupt), interrupted_after(delay):
            while True:
                load_audio(content)
    assert capfd.readouterr().err == ""


# Arrays


class TestArrays:
    @pytest.mark.parametrize(
        ("array", "error", "message"),
        [
            (np.zeros(0), EmptyAudioError, r"shape \[1, 0\] holds no samples"),
            (np.zeros((2, 0)), EmptyAudioError, r"shape \[2, 0\] holds no samples"),
            ([], EmptyAudioError, "holds no samples"),
            (np.zeros(9, np.int16), IntegerAudioError, "int16, whose full scale is unknown: divide .* 32768"),
            (torch.zeros(9, dtype=torch.int32), IntegerAudioError, "int32"),
            ([0, 1], IntegerAudioError, "int64"),
            (np.zeros(9, bool), IntegerAudioError, "bool"),
            (np.zeros(9, complex), AudioInputError, "complex128 is no waveform: give real numbers"),
            (["a", "b"], AudioInputError, "is no waveform"),
            (
                [0.0, np.nan, np.inf],
                NonFiniteAudioError,
                r"2 of the 3 values .* first \(nan\) at sample 1 of",
            ),
            (np.array([[0, 0], [0, -np.inf]]).repeat(2, 1), NonFiniteAudioError, r"\(-inf\) at sample 2 of channel 1"),
            ([0.0, 1e300], NonFiniteAudioError, "first .inf. at sample 1"),
            (np.float32(0.5), AudioShapeError, r"Shape \[\] is no waveform"),
            (np.zeros((1, 1, 9)), AudioShapeError, r"Shape \[1, 1, 9\] .* several clips as a list"),
            (np.zeros((9, 2)), AudioShapeError, r"\[9, 2\] looks like \[samples, channels\].*transpose"),
            (np.zeros((2, 2)), AudioShapeError, r"\[2, 2\] looks like .* or could be read both ways"),
            ([[0.1, 0.2], [0.3]], AudioShapeError, "no rectangular array"),
            (5, AudioInputError, "A int is no waveform"),
            (None, AudioInputError, "A NoneType is no waveform"),
            (object(), AudioInputError, "A object is no waveform"),
        ],
    )
    def test_bad_arrays(self, array, error, message):
        with pytest.raises(error, match=message):
            load_audio(array, sampling_rate=RATE)

    def test_missing_rate(self):
        with pytest.raises(MissingSamplingRateError, match=r"sampling_rate is missing.*sampling_rate=16000"):
            load_audio(SAMPLES)
        with pytest.raises(MissingSamplingRateError, match="missing"):
            load_audio({"array": SAMPLES, "sampling_rate": None})

    @pytest.mark.parametrize("rate", [0, -1, 999, 10**9, 16_000.5, float("nan"), float("inf"), "16000", True])
    def test_absurd_rate(self, rate):
        with pytest.raises(SamplingRateError, match=r"sampling_rate=.* is not legal: .* 1000 to 768000"):
            load_audio(SAMPLES, sampling_rate=rate)
        with pytest.raises(SamplingRateError, match=r"target_rate=.* is not legal"):
            load_audio(SAMPLES, sampling_rate=RATE, target_rate=rate)

    @pytest.mark.parametrize("rate", [np.int64(16_000), 16_000.0, np.float32(16_000)])
    def test_whole_rate_of_another_type(self, rate):
        assert load_audio(SAMPLES, sampling_rate=rate).sampling_rate == 16_000

    @pytest.mark.parametrize("row", [{}, {"bytes": None, "path": None}, {"audio": SAMPLES}])
    def test_row_without_audio(self, row):
        with pytest.raises(AudioInputError, match=r"A dict with the keys \[.*\] holds no audio: it needs"):
            load_audio(row)

    def test_row_with_another_rate(self):
        with pytest.raises(SamplingRateError, match="sampling_rate=8000 was given for a recording that says 16000"):
            load_audio({"array": SAMPLES, "sampling_rate": RATE}, sampling_rate=8000)


# Channels


@pytest.mark.parametrize(
    ("count", "channels", "downmix", "message"),
    [
        (2, 1, None, r'2 channels where 1 is wanted: ask for a downmix \(downmix="mean"'),
        (6, 1, None, "6 channels where 1 is wanted"),
        (64, 1, None, "a list of clips if this is a batch"),
        (1, 2, None, r'1 channel where 2 is wanted: ask for copies .*downmix="repeat"'),
        (1, 2, "mean", "1 channel where 2 is wanted"),
        (6, 2, "mean", "6 channels where 2 is wanted: mix it to 2 channels yourself"),
        (6, 2, 0, "6 channels where 2 is wanted"),
        (2, 1, "repeat", "2 channels where 1 is wanted"),
        (2, 1, 2, "asks for channel 2 of a recording that has 2 channels: legal are 0 to 1"),
        (1, 1, 1, "asks for channel 1 of a recording that has 1 channel"),
    ],
)
def test_channels_are_never_mixed_silently(count, channels, downmix, message):
    samples = np.zeros((count, 100))
    with pytest.raises(ChannelError, match=message):
        load_audio(samples, sampling_rate=RATE, channels=channels, downmix=downmix)


@pytest.mark.parametrize("downmix", ["avg", -1, True, 0.5])
def test_unknown_downmix(downmix):
    with pytest.raises(OptionError, match=r'downmix=.* is not legal: give None \(refuse\), "mean"'):
        load_audio(SAMPLES, sampling_rate=RATE, downmix=downmix)


@pytest.mark.parametrize("channels", [0, -1, 1.5, "2"])
def test_illegal_channels(channels):
    with pytest.raises(OptionError, match=r"channels=.* is not legal: give a count from 1"):
        load_audio(SAMPLES, sampling_rate=RATE, channels=channels)


def test_paths_are_named(tmp_path: Path):
    """Every message about a file says which one."""
    for name, content in {"empty.wav": b"", "text.wav": b"hello" * 99, "cut.wav": encoded("WAV")[:999]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AudioInputError, match=name):
            load_audio(tmp_path / name)
