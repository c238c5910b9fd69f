"""Publishing a finished corpus as a dataset of the hub: its card, the files that go, and the upload.

What goes: `audiotok.json`, `data/*.parquet`, the folder `tokenizer/` where there is one, and a card. What failed
(`errors.jsonl`) stays at home, as it names the source's files.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from audiotok.errors import OptionError, OutputExistsError, OutputNotWritableError
from audiotok.integrations.corpus_pages import tables
from audiotok.integrations.corpus_reading import Corpus
from audiotok.integrations.corpus_record import RECORD
from audiotok.integrations.corpus_shards import DATA
from audiotok.integrations.corpus_stats import CorpusStats, stats
from audiotok.integrations.corpus_storage import LocalFiles
from audiotok.integrations.export_ids import Watch, unwatched

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD, TOKENIZER = "README.md", "tokenizer"
REPO_TYPE = "dataset"
TAGS = ["audio", "audiotok", "audio-tokens"]
# The hub's classes of size, by rows: up to a thousand, and ten times as many each.
_SIZES = "n<1K 1K<n<10K 10K<n<100K 100K<n<1M 1M<n<10M 10M<n<100M 100M<n<1B 1B<n<10B 10B<n<100B".split()


@dataclass(frozen=True)
class Upload:
    """What would be uploaded.

    Attributes:
        card: README.md.
        files: names in the repository, the same as in the corpus, and bytes; without the card.
    """

    repo: str
    card: str
    files: list[tuple[str, int]]

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        files = [{"name": name, "bytes": size} for name, size in self.files]
        return {"repo": self.repo, "bytes": self.size, "files": files, "card": self.card}


def prepare(corpus: str | os.PathLike[str], repo: str, license: str, watch: Watch = unwatched) -> Upload:
    """Card and files of a finished corpus; nothing leaves this machine.

    Args:
        corpus: a folder of this machine.
        repo: `owner/name` on the hub.
        license: of the codes, as the hub names it ("cc-by-4.0", "other", "unknown"): that of the recordings has a say
            in it.
        watch: is told how many clips of how many are counted.

    Raises:
        CodesError: no corpus, without clips, or damaged.
        OptionError: the corpus is not finished or not on this machine, or the repository's name is not legal.
    """
    _check_repo(repo)
    if not license:
        raise OptionError("The license is empty: give what the hub calls it, such as cc-by-4.0, other or unknown.")
    opened = Corpus(corpus)
    if not isinstance(opened.files, LocalFiles):
        raise OptionError(f"{opened.place} is not on this machine: copy it to a folder first.")
    names = [*_tokenizer_files(opened.files), *(name.data for name in opened.shards), RECORD]
    sizes = [(opened.files.folder / name).stat().st_size for name in names]
    return Upload(repo, card(opened, stats(opened, watch=watch), repo, license), list(zip(names, sizes, strict=True)))


def push(
    corpus: str | os.PathLike[str],
    repo: str,
    license: str,
    *,
    private: bool | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    watch: Watch = unwatched,
) -> str:
    """Upload a finished corpus to a dataset repository, made if it is missing; its address.

    Args:
        corpus, repo, license, watch: as for `prepare`.
        private: of a repository that is made here; None for the owner's default.
        overwrite: remove shards that are there and not here, and replace the card. Without it, the first are
            refused, and a card stays as it is.
        token: of the hub; None for the one that `hf auth login` saved.

    Raises:
        OutputExistsError: the repository holds shards of another corpus.
        OutputNotWritableError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    upload = prepare(corpus, repo, license, watch)
    api = HfApi(token=token)
    with _talking_to_the_hub(repo):
        address = api.create_repo(repo, private=private, repo_type=REPO_TYPE, exist_ok=True)
        there = set(api.list_repo_files(repo, repo_type=REPO_TYPE))
        foreign = sorted(name for name in there - {name for name, _ in upload.files} if name.startswith(f"{DATA}/"))
        if foreign and not overwrite:
            raise OutputExistsError(
                f"{repo} holds {len(foreign)} files in {DATA}/ that are not of this corpus ({', '.join(foreign[:3])}): "
                "choose another repository, or remove them with --overwrite."
            )
        _upload(api, upload, os.fspath(corpus), foreign, with_card=overwrite or CARD not in there)
    return str(address)


def _upload(api: HfApi, upload: Upload, folder: str, foreign: Sequence[str], with_card: bool) -> None:
    """The codes, then the card: who reads of them finds them."""
    api.upload_folder(
        repo_id=upload.repo,
        folder_path=folder,
        repo_type=REPO_TYPE,
        allow_patterns=[RECORD, f"{DATA}/*.parquet", f"{TOKENIZER}/*"],
        delete_patterns=list(foreign) or None,
        commit_message="Upload tokenized corpus",
    )
    if with_card:
        api.upload_file(
            path_or_fileobj=upload.card.encode(),
            path_in_repo=CARD,
            repo_id=upload.repo,
            repo_type=REPO_TYPE,
            commit_message="Describe the corpus",
        )


def _tokenizer_files(files: LocalFiles) -> list[str]:
    return files.names(TOKENIZER)


def _check_repo(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OptionError(f"{repo!r} is no name of a repository ({error}): give owner/name.") from error


@contextmanager
def _talking_to_the_hub(repo: str) -> Generator[None]:
    from huggingface_hub.errors import HfHubHTTPError

    # OSError, and what its HTTP library raises where there is no network: that library is not the same in all versions.
    failures = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
    try:
        yield
    except OutputExistsError:
        raise
    except failures as error:
        raise OutputNotWritableError(
            f"{repo} cannot be written ({error}): check the name, your rights (`hf auth login`) and the network, and "
            "run the same command again; what is uploaded stays."
        ) from error


# The card


def card(corpus: Corpus, figures: CorpusStats, repo: str, license: str) -> str:
    """README.md: front matter that the hub and `load_dataset` read, what the codes are, and how to read them."""
    from huggingface_hub import DatasetCardData

    files = [{"split": split, "path": f"{DATA}/{split}-*.parquet"} for split in corpus.splits]
    matter = DatasetCardData(
        license=license,
        tags=TAGS,
        size_categories=_size_category(figures.clips),
        configs=[{"config_name": "default", "data_files": files}],
    )
    title = repo.rpartition("/")[2]
    parts = [f"# {title}: {figures.hours:,.1f} hours as codes", _about(corpus), _how_to_read(corpus, repo)]
    parts += [f"## {name}\n\n{_markdown(heads, rows)}" for name, heads, rows in tables(figures)]
    return f"---\n{matter.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _size_category(rows: int) -> str:
    return next((name for power, name in enumerate(_SIZES, 3) if rows < 10**power), _SIZES[-1])


def _about(corpus: Corpus) -> str:
    made, facts = corpus.record.tokenizer, corpus.facts
    options = ", ".join(f"`{key}={value}`" for key, value in made["options"].items()) or "none"
    sizes = ", ".join(f"{size:,}" for size in facts.codebook_sizes)
    rows = [
        ["tokenizer", f"`{made['name']}` ({made['class']})"],
        ["fingerprint", f"`{made['fingerprint']}`"],
        ["options", options],
        ["weights in", made["dtype"]],
        ["sampling rate", f"{facts.sampling_rate:,} Hz"],
        ["frames", f"{float(facts.frame_rate):g} a second"],
        ["codebooks", sizes],
        ["columns", ", ".join(f"`{name}`" for name in corpus.columns)],
    ]
    return f"Recordings as codes of a neural audio codec, one row a clip.\n\n{_markdown(['', ''], rows)}"


def _how_to_read(corpus: Corpus, repo: str) -> str:
    name, layout = corpus.record.tokenizer["name"], corpus.layout_names[0]
    return (
        "## How to read it\n\n```python\nfrom audiotok.integrations import corpus\n\n"
        f'for clip in corpus.read("hf://datasets/{repo}", layout="{layout}"):\n'
        '    print(clip["id"], clip["codes"], clip["input_ids"])\n```\n\n'
        f'`datasets.load_dataset("{repo}")`, pandas and DuckDB read the Parquet files as they are; `codes` lie frame '
        "by frame, coarse to fine. And back to sound:\n\n```python\nfrom audiotok import AutoAudioTokenizer\n\n"
        f'tok = AutoAudioTokenizer.from_pretrained("{name}", layout="{layout}")\n'
        'wave = tok.decode(clip["input_ids"], clip["audio_length"])\n```'
    )


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, rows)])
