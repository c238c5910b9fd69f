"""The folder that `audiotok tokenize` wrote, read as `decode` reads a file of codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from audiotok.cli.clip_files import StoredClip
from audiotok.cli.loading import Origin
from audiotok.errors import CodesError
from audiotok.integrations.corpus_reading import ClipBlock, Corpus

if TYPE_CHECKING:
    import numpy as np

    from audiotok.tokenizer import AudioTokenizer

COLUMNS = ("id", "audio_length")


class CorpusReader:
    """Clips of a corpus, finished or not.

    Args:
        path: a folder or a URL.
        wanted: ids of the clips; none for all of them.
    """

    def __init__(self, path: str, wanted: Sequence[str] = ()) -> None:
        self.name, self._wanted = path, wanted
        self._corpus = Corpus(path, allow_unfinished=True)
        tokenizer, facts = self._corpus.record.tokenizer, self._corpus.facts
        self.origin = Origin(
            tokenizer=tokenizer["name"],
            layout=self._corpus.layout().name,
            options=tokenizer["options"],
            fingerprint=tokenizer["fingerprint"],
            codebook_sizes=list(facts.codebook_sizes),
            sampling_rate=facts.sampling_rate,
            audiotok_version="",
        )

    def __iter__(self) -> Iterator[StoredClip]:
        if not self._wanted:
            for block in self._corpus.blocks(COLUMNS):
                for row in range(len(block)):
                    yield self._stored(block, row)
            return
        found: set[str] = set()
        for block, row in self._corpus.find(self._wanted, COLUMNS):
            found.add(block.ids[row])
            yield self._stored(block, row)
        if missing := [one for one in self._wanted if one not in found]:
            raise CodesError(f"{self.name} has no clip {missing[0]!r}: give ids as its column id has them.")

    def _stored(self, block: ClipBlock, row: int) -> StoredClip:
        def ids(tokenizer: AudioTokenizer) -> np.ndarray:
            return tokenizer.codes_to_ids(*self._corpus.order.clip(block, row))

        return StoredClip(block.ids[row], block.columns["audio_length"][row].as_py(), ids)
