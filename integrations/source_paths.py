"""Paths that a manifest or dataset names: where they lead, and that they lead nowhere else."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from audiotok.errors import AudioFileNotFoundError, AudioInputError, AudioNotReadableError
from audiotok.integrations.source_storage import Files, locate, reading

# What may lead out of the folder; all other paths need no closer look while they are listed.
_SUSPICIOUS = r"^/|://|(^|/)\.\.(/|$)"


class Place(NamedTuple):
    """A file or folder."""

    files: Files
    path: str

    def holds(self, other: Place) -> bool:
        """Whether `other` lies inside or is the same, as both are written."""
        root, path = (posixpath.normpath("/" + place.path.lstrip("/")) for place in (self, other))
        return self.files == other.files and (path == root or path.startswith(root.rstrip("/") + "/"))

    def holds_all(self) -> bool:
        """Whether it is the root of its files."""
        return not self.path.strip("/")

    def real(self) -> Place:
        return Place(self.files, self.files.real(self.path))

    def join(self, path: str) -> Place | None:
        """`path` seen from here, be it relative, absolute, or a URL below this place; None for other URLs."""
        if "://" not in path:
            return Place(self.files, posixpath.join(self.path, path))
        scheme, _, rest = path.partition("://")
        own_scheme, _, own_rest = self.files.url(self.path).partition("://")
        prefix = "" if self.holds_all() else own_rest.strip("/") + "/"
        if scheme != own_scheme or not rest.lstrip("/").startswith(prefix):
            return None
        return Place(self.files, posixpath.join(self.path, rest.lstrip("/").removeprefix(prefix).lstrip("/")))


class AudioPaths:
    """Opens the paths that stand in a manifest.

    A relative path is one below `audio_root` if there is such a file, else one below the manifest's folder. Whether
    it stays inside of either is decided twice: by its spelling while it is listed, and with all links followed when
    it is opened.

    Args:
        folder: of the manifest.
        audio_root: the folder or URL that the user allows, if any; "/" allows all and says nothing of relative paths.
        trusted: more folders that absolute paths may lead to.
    """

    def __init__(self, folder: Place, audio_root: str | None, trusted: Sequence[str] = ()) -> None:
        asked = [] if audio_root is None else [Place(*locate(audio_root))]
        allowed = [*asked, folder, *(Place(*locate(name)) for name in trusted)]
        self._origins = [*(place for place in asked if not place.holds_all()), folder]
        self._allowed = list(dict.fromkeys([*allowed, *(place.real() for place in allowed)]))
        self._prefixes = tuple(place.files.url(place.path).rstrip("/") + "/" for place in self._allowed)

    def check(self, paths: pa.Array, where: Callable[[int], str]) -> None:
        """Refuse what leads out by its spelling; `where` names a path by its index.

        Raises:
            AudioNotReadableError: a path leads out.
        """
        suspicious = pc.match_substring_regex(paths, _SUSPICIOUS)
        climbs = pc.match_substring(paths, "..")
        for prefix in self._prefixes:
            plainly_inside = pc.and_not(pc.starts_with(paths, prefix), climbs)
            suspicious = pc.and_not(suspicious, plainly_inside)
        for index in pc.indices_nonzero(suspicious).to_pylist():
            if not self._candidates(path := paths[index].as_py()):
                raise self._outside(path, where(index))

    def open(self, path: str, where: str) -> Any:
        """The recording, as `open_audio` takes it; `where` stands in the messages.

        Raises:
            AudioFileNotFoundError, AudioIsDirectoryError, AudioNotReadableError
        """
        candidates = self._candidates(path)
        if not candidates:
            raise self._outside(path, where)
        try:
            place = _there(candidates)
            with reading(place.path):
                real = place.real()
            if any(allowed.holds(real) for allowed in self._allowed):
                return real.files.recording(real.path)
        except AudioInputError as error:
            raise type(error)(f"{where}: {error}") from error
        raise self._outside(path, where)

    def _candidates(self, path: str) -> list[Place]:
        """Where the path may lead to, as it is spelled."""
        origins = self._allowed if "://" in path else self._origins
        places = dict.fromkeys(origin.join(path) for origin in origins)
        return [place for place in places if place and any(allowed.holds(place) for allowed in self._allowed)]

    def _outside(self, path: str, where: str) -> AudioNotReadableError:
        places = " and ".join(dict.fromkeys(place.files.url(place.path) for place in self._origins))
        return AudioNotReadableError(
            f"{where}: the path {path!r} leads out of {places}: name the folder that may be read as audio_root "
            '("/" allows every path).'
        )


def _there(places: list[Place]) -> Place:
    """The first that exists; the only one unseen."""
    if len(places) == 1:
        return places[0]
    for files, path in places:
        if files.is_file(path) or files.is_folder(path):
            return Place(files, path)
    names = " and no ".join(place.path for place in places)
    raise AudioFileNotFoundError(f"There is no {names}: check the path and audio_root.")
