"""The latents of a corpus as one flat file of vectors, to fit a quantizer to.

FOLDER/latents.f32      float32 `[N, D]`, clip after clip, without padding
FOLDER/clips.jsonl      first line: what the vectors depend on; then one line a clip, written when it is whole

Clips are in an order of their own (by a hash of their names), so that the first vectors are a fair share of all. A
store that was not finished goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audiotok.codec import AudioCodec
from audiotok.errors import CheckpointError
from audiotok.recipes.training.corpus import Clip, Corpus, unit_hash

Bar = Callable[[list[Clip], str], Iterable[Clip]]


class LatentStore:
    """Vectors of clips on disk.

    Args:
        folder: made if it is not there.
        about: what the vectors depend on besides the clips (the codec's fingerprint, the corpus), as JSON values; a
            store that was begun with others is refused.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, json.loads(json.dumps(about))
        self.vectors_file, self.clips_file = folder / "latents.f32", folder / "clips.jsonl"

    def collect(self, codec: AudioCodec, corpus: Corpus, clips: list[Clip], bar: Bar) -> np.ndarray:
        """Encode what is missing; the vectors of all clips, mapped into memory, `[N, D]`.

        Raises:
            CheckpointError: the store was begun with another codec or corpus.
        """
        clips = sorted(clips, key=lambda clip: (unit_hash(clip.file_name), clip.offset))
        done = self._open([[clip.file_name, clip.offset] for clip in clips])
        with self.vectors_file.open("ab") as vectors, self.clips_file.open("a", encoding="utf-8") as index:
            for clip in bar(clips[len(done) :], "encoding") if len(done) < len(clips) else []:
                found = clip_latents(codec, corpus.audio(clip))
                vectors.write(found.tobytes())
                vectors.flush()
                index.write(json.dumps({"file_name": clip.file_name, "shape": found.shape}) + "\n")
                index.flush()
        lines = self._lines()
        return np.memmap(self.vectors_file, np.float32, "r", shape=(_count(lines), lines[0]["shape"][1]))

    def _open(self, order: list[list[Any]]) -> list[dict[str, Any]]:
        """Lines of the clips that are there; what was half written behind them is cut off."""
        self.folder.mkdir(parents=True, exist_ok=True)
        head = json.dumps({**self.about, "clips": order}, sort_keys=True)
        if not self.clips_file.is_file():
            self.vectors_file.write_bytes(b"")
            self.clips_file.write_text(head + "\n", encoding="utf-8")
        text = self.clips_file.read_text(encoding="utf-8")
        if text.partition("\n")[0] != head:
            raise CheckpointError(
                f"{self.folder} holds latents of another codec or other clips: remove it, or name another folder."
            )
        self.clips_file.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        lines = self._lines()
        size = 4 * _count(lines) * (lines[0]["shape"][1] if lines else 0)
        with self.vectors_file.open("r+b") as file:
            file.truncate(size)
        return lines

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.clips_file.read_text(encoding="utf-8").splitlines()[1:]]


def _count(lines: list[dict[str, Any]]) -> int:
    return sum(line["shape"][0] for line in lines)


@torch.inference_mode()
def clip_latents(codec: AudioCodec, samples: np.ndarray) -> np.ndarray:
    """Latents `[F, D]` float32 of one mono clip `[N]` at the codec's rate, of its true frames only."""
    values = torch.from_numpy(np.ascontiguousarray(samples))[None, None].to(codec.device)
    latents = codec.latents(values, torch.ones(1, len(samples), device=codec.device))
    frames = codec.facts.num_frames(len(samples))
    return np.ascontiguousarray(latents[0, :, :frames].T.float().cpu().numpy())
