"""Where files come from: a folder of the user's, the cache, or a download checked by its sum."""

from __future__ import annotations

import gzip
import hashlib
import os
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from pyro_vae.errors import CorruptFileError, DataError


@dataclass(frozen=True)
class Source:
    """One file of a data set.

    Args:
        path: below the data folder, below the cache and below a mirror.
        url: where it is published; None for a file that nobody serves.
        checksum: of the file, `"md5:..."` or `"sha256:..."`; None where none is known, and then
            the file is never downloaded: the user supplies it.
        unpacked: the same of the bytes inside a gzip wrapper, which may be packed anew.
    """

    path: str
    url: str | None = None
    checksum: str | None = None
    unpacked: str | None = None


@dataclass(frozen=True)
class Store:
    """Finds files, and downloads those it may.

    Args:
        folder: files already there, looked at first. Default: `PYRO_VAE_DATA`, or none.
        cache: what downloads fill. Default: `PYRO_VAE_CACHE`, or the user's cache folder.
        mirror: base URL to download from in place of each file's own. Default:
            `PYRO_VAE_MIRROR`, or none.
    """

    folder: Path | None
    cache: Path
    mirror: str | None

    @classmethod
    def open(cls, folder: str | os.PathLike[str] | None = None, mirror: str | None = None) -> Store:
        """A store at these places, or where the environment says."""
        place = folder or os.environ.get("PYRO_VAE_DATA") or None
        cache = os.environ.get("PYRO_VAE_CACHE")
        if not cache:
            import pooch

            cache = pooch.os_cache("pyro_vae")
        mirror = mirror or os.environ.get("PYRO_VAE_MIRROR") or None
        return cls(None if place is None else Path(place), Path(cache), mirror)

    def find(self, source: Source) -> Path | None:
        """The file if it is already here and whole, else None.

        Raises:
            CorruptFileError: the file in `folder` is not the published one. (One in the cache
                that is not is removed instead, and None returned.)
            DataError: `folder` is no folder.
        """
        if self.folder is not None:
            if not self.folder.is_dir():
                raise DataError(f"{self.folder}: no such folder of data sets")
            path = self.folder / source.path
            if path.is_file():
                if fault := _fault(path, source):
                    raise CorruptFileError(f"{path}: {fault}")
                return path
        path = self.cache / source.path
        if not path.is_file():
            return None
        if _fault(path, source):
            path.unlink()
            return None
        return path

    def fetch(self, source: Source) -> Path:
        """The file, downloaded if it is not here yet.

        A download is written beside the cache, checked, and only then moved into it, so an
        interrupted or wrong one leaves nothing behind.

        Raises:
            CorruptFileError: a download that broke off or whose checksum is wrong.
            DataError: the file can't be had; the message says where to put it by hand.
        """
        found = self.find(source)
        if found is not None:
            return found
        if source.checksum is None or (source.url is None and self.mirror is None):
            raise DataError(
                self._by_hand(source, "no checksum is known to check a download by, so it")
            )
        return self._download(source)

    def mirrored(self, source: Source) -> Path | None:
        """The file downloaded from the mirror; None where there is no mirror, or not this file.

        Raises:
            CorruptFileError: the mirror's is not the file, or broke off.
        """
        if self.mirror is None:
            return None
        try:
            return self._download(source)
        except CorruptFileError:
            raise
        except DataError:
            return None

    def _download(self, source: Source) -> Path:
        url = f"{self.mirror.rstrip('/')}/{source.path}" if self.mirror else str(source.url)
        target = self.cache / source.path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-")
        except OSError as error:
            raise DataError(
                f"cannot write {target.parent} ({error}); set PYRO_VAE_CACHE to another folder"
            ) from error
        with scratch as folder:
            part = Path(folder) / target.name
            self._pull(url, part, source)
            if fault := _fault(part, source):
                raise CorruptFileError(f"{url}: {fault}; nothing was kept, so try again")
            os.replace(part, target)
        return target

    def _pull(self, url: str, part: Path, source: Source) -> None:
        import pooch
        import requests

        broken = (
            requests.exceptions.ChunkedEncodingError,
            requests.exceptions.ContentDecodingError,
        )
        responses: list[requests.Response] = []
        pull = pooch.HTTPDownloader(
            progressbar=sys.stderr.isatty(),
            chunk_size=2**16,
            headers={"Accept-Encoding": "identity"},  # the bytes as published
            hooks={"response": lambda response, *_, **__: responses.append(response)},
        )
        try:
            pull(url, str(part), None)
        except broken as error:
            raise CorruptFileError(
                f"{url}: the download broke off ({error}); nothing was kept, so try again"
            ) from error
        except (OSError, ValueError) as error:
            raise DataError(self._by_hand(source, f"{url} cannot be had ({error}). It")) from error
        finally:
            for response in responses:
                response.close()

    def _by_hand(self, source: Source, why: str) -> str:
        places = [str(place / source.path) for place in (self.folder, self.cache) if place]
        get = f" from {source.url}" if source.url else ""
        return (
            f"{source.path}: {why} has to be supplied by hand: get it{get} and put it at "
            f"{' or '.join(places)}. (PYRO_VAE_DATA or folder= names a folder of such files.)"
        )


def digest(path: Path, algorithm: str, *, unpacked: bool = False) -> str:
    """Checksum of a file, or of what its gzip wrapper holds, as `"md5:..."`."""
    with gzip.open(path) if unpacked else open(path, "rb") as stream:
        return f"{algorithm}:{hashlib.file_digest(stream, algorithm).hexdigest()}"


def _fault(path: Path, source: Source) -> str | None:
    """What is wrong with a file, or None: expected and found."""
    if source.checksum is None:
        return None
    found = digest(path, source.checksum.partition(":")[0])
    if found == source.checksum:
        return None
    fault = f"expected {source.checksum}, found {found} ({path.stat().st_size} bytes)"
    if source.unpacked is None:
        return fault
    try:
        inside = digest(path, source.unpacked.partition(":")[0], unpacked=True)
    except (OSError, EOFError, zlib.error) as error:
        return f"{fault}, and unpacking it fails: {error}"
    if inside == source.unpacked:
        return None
    return f"{fault}; unpacked, expected {source.unpacked}, found {inside}"
