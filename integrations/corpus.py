"""What to do with a tokenized corpus: read it, count it, export it to a trainer, publish it.

    from audiotok.integrations import corpus

    for clip in corpus.read("codes/", layout="interleaved"):
        clip["id"], clip["codes"], clip["input_ids"]
    corpus.stats("codes/").bits_per_second
    corpus.export("codes/", "memmap", "ids/", layout="interleaved", bos=True, eos=True)
    corpus.push("codes/", "owner/name", license="cc-by-4.0")

`audiotok tokenize` makes one. None of this loads the codec's weights.
"""

from __future__ import annotations

from audiotok.integrations.corpus_card import Upload, prepare, push
from audiotok.integrations.corpus_reading import Clips, Corpus, read
from audiotok.integrations.corpus_stats import CorpusStats, stats
from audiotok.integrations.export_formats import FORMATS, export

__all__ = ["FORMATS", "Clips", "Corpus", "CorpusStats", "Upload", "export", "prepare", "push", "read", "stats"]
