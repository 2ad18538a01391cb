"""A run as one file to publish, and back.

An archive is a zip file with one folder in it: the files that the manifest names, the manifest,
`CITATION.cff`, and the model's files under `weights/` where asked for. Names are sorted, times and
permissions are constant, so that the same folder gives the same bytes (with the same zlib).

Unpacking trusts nothing that the archive says of itself: names, kinds, number and size of its
entries are checked before anything is written, sizes again while it is written, and SHA-256 of
every file at the end. Nothing in it is executed or unpickled.
"""

from __future__ import annotations

import json
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from mechmm.runs.citation import citation
from mechmm.runs.paths import CITATION, MANIFEST, RESOLVED, WEIGHTS, parse_manifest, read_manifest
from mechmm.runs.verification import BLOCK, expected, file_digest, is_inside, verify

FILES = 100_000
"""Entries that an archive may have."""
BYTES = 4 << 30
"""Bytes that an archive may unpack to, unless more are allowed."""
CODE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".py", ".pyc", ".so")
"""Ends of names of files that may run code when they are loaded."""
SUFFIX = ".zip"
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Others ask for as much memory as the archive likes."""
_TIME = (1980, 1, 1, 0, 0, 0)
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    UnicodeDecodeError,
)


class ArchiveError(ValueError):
    """An archive is damaged, is no archive of a run, or must not be unpacked."""


@dataclass(frozen=True)
class Limits:
    """What an archive may unpack to: so many files, so many bytes."""

    files: int = FILES
    size: int = BYTES


# Packing -------------------------------------------------------------------------------------


def pack(
    folder: str | Path,
    file: str | Path | None = None,
    *,
    weights: str | Path | None = None,
    authors: Sequence[str] = (),
) -> Path:
    """Write a run's folder as one archive, wholly or not at all.

    Args:
        folder: of a finished run.
        file: a new file ending in `.zip`; default: the folder's name, beside it.
        weights: folder of the model, whose files go along; they must be those of the run.
        authors: for `CITATION.cff`, unless the folder holds one already.

    Returns:
        The file.

    Raises:
        FileNotFoundError, RunError: the folder is no run.
        ArchiveError: the run does not verify, the weights are not those that it used or might
            run code when loaded, or the file has another ending.
        FileExistsError: the file exists.
    """
    folder = Path(folder)
    file = Path(file) if file else folder.absolute().with_name(f"{folder.absolute().name}{SUFFIX}")
    if file.suffix != SUFFIX:
        raise ArchiveError(f"{file} must end in {SUFFIX}")
    if file.exists():
        raise FileExistsError(f"{file} exists; give a new file")
    manifest = read_manifest(folder)
    found = verify(folder)
    if not found.ok:
        raise ArchiveError(f"{folder} does not verify and is not packed; {found}")
    inside = {name: folder / name for name in (*manifest["outputs"], MANIFEST)}
    inside |= _weights(folder, manifest, weights)
    with _unfinished(file) as near:
        _write(near, manifest["name"], inside, _citation(folder, manifest, found.digest, authors))
        near.rename(file)
    return file


def weights_of(folder: str | Path) -> Path:
    """Where the model of a run lies on this machine.

    Raises:
        FileNotFoundError: nowhere.
    """
    from mechmm.runs.manifest import model_folder

    folder = Path(folder)
    manifest = read_manifest(folder)
    name, revision = manifest["model"].get("name"), manifest["model"].get("revision")
    found = model_folder(str(name), folder / manifest.get("base", "."), revision)
    if found is None:
        raise FileNotFoundError(
            f"the model {name} of {folder} is not on this machine; say where it is with --model"
        )
    return found


def _citation(
    folder: Path, manifest: Mapping[str, Any], digest: str, authors: Sequence[str]
) -> bytes:
    kept = folder / CITATION
    if kept.is_file():
        return kept.read_bytes()
    question = json.loads((folder / RESOLVED).read_bytes()).get("question", "")
    return citation(manifest, digest, authors, str(question)).encode()


def _weights(
    folder: Path, manifest: Mapping[str, Any], given: str | Path | None
) -> dict[str, Path]:
    """The model's files by path in the archive, checked."""
    source = Path(given) if given else folder / WEIGHTS
    if given is None and not source.is_dir():
        return {}
    digests = manifest["model"].get("files", {})
    if not digests:
        raise ArchiveError(f"the manifest of {folder} has no hashes of the model's files")
    for name, digest in digests.items():
        path = source / name
        if not path.is_file() or file_digest(path) != digest:
            raise ArchiveError(f"{path} is missing or not the file that the run used")
        _refuse_code(name, folder)
    return {f"{WEIGHTS}/{name}": source / name for name in digests}


def _refuse_code(name: str, where: str | Path) -> None:
    if name.lower().endswith(CODE):
        raise ArchiveError(
            f"{where}: {name!r} may run code when it is loaded, which an archive must not hold; "
            "save the model as safetensors, or publish the run without its weights"
        )


def _write(near: Path, top: str, inside: Mapping[str, Path], cite: bytes) -> None:
    with zipfile.ZipFile(near, "w") as archive:
        for name in sorted((*inside, CITATION)):
            entry = zipfile.ZipInfo(f"{top}/{name}", _TIME)
            entry.create_system, entry.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            stored = name.startswith(f"{WEIGHTS}/")
            entry.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
            if name == CITATION:
                archive.writestr(entry, cite)
                continue
            entry.file_size = inside[name].stat().st_size  # decides whether it is zip64
            with inside[name].open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, BLOCK)


# Unpacking -----------------------------------------------------------------------------------


def unpack(
    file: str | Path, folder: str | Path | None = None, limits: Limits | None = None
) -> Path:
    """Write the run in an archive into a new folder, verified, wholly or not at all.

    Args:
        file: written by `pack`; it may come from anybody.
        folder: a new one; default: the archive's name without its ending, in this directory.
        limits: of files and bytes; default: 100,000 and 4 GiB.

    Returns:
        The folder.

    Raises:
        ArchiveError: the file is no archive or a damaged one; an entry leads out of the folder, is
            no plain file, is not of the run, or may run code; there are too many entries or bytes;
            or what was unpacked does not verify.
        RunError: the manifest cannot be read, or is of a newer format.
        FileExistsError: the folder holds something.
        FileNotFoundError: there is no such file.
    """
    file = Path(file)
    folder = Path(folder) if folder else Path(file.name.removesuffix(SUFFIX))
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; give a new one")
    with _opened(file) as archive, _unfinished(folder) as near:
        room = shutil.disk_usage(near.parent).free
        entries = _checked(archive, file, limits or Limits(), room)
        near.mkdir(parents=True)
        for name, entry in entries.items():
            _extract(archive, entry, near / name)
        found = verify(near)
        if not found.ok:
            raise ArchiveError(f"what {file} holds is not the run of its manifest; {found}")
        if folder.exists():
            folder.rmdir()
        near.rename(folder)
    return folder


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """An archive; whatever goes wrong while reading it is said in one way."""
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except _BROKEN as error:
        raise ArchiveError(
            f"{file} cannot be read as an archive of a run ({error}); fetch it again"
        ) from error


def _checked(
    archive: zipfile.ZipFile, file: Path, limits: Limits, room: int
) -> dict[str, zipfile.ZipInfo]:
    """Entries by path within the folder, after every check that needs no unpacking.

    Args:
        room: bytes free where they go.
    """
    entries = [e for e in archive.infolist() if not (e.is_dir() and e.file_size == 0)]
    if len(entries) > limits.files:
        raise ArchiveError(f"{file} has {len(entries)} files, more than {limits.files}")
    size = sum(entry.file_size for entry in entries)
    if size > limits.size:
        raise ArchiveError(
            f"{file} would unpack to {size:,} bytes, more than {limits.size:,}; allow more "
            "(--limit) if you trust it"
        )
    if size > room:
        raise ArchiveError(f"{file} would unpack to {size:,} bytes; the disk has {room:,}")
    named: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        _check_entry(entry, file)
        named[entry.filename] = entry
    folded = {name.casefold() for name in named}
    tops = {PurePosixPath(name).parts[0] for name in named}
    folders = {str(above) for name in folded for above in PurePosixPath(name).parents}
    if len(folded) < len(entries) or folded & folders or len(tops) != 1:
        raise ArchiveError(
            f"{file} is no archive of a run: it must hold one folder, each file once"
        )
    inside = {name.split("/", 1)[-1]: entry for name, entry in named.items()}
    _check_names(archive, inside, file)
    return inside


def _check_entry(entry: zipfile.ZipInfo, file: Path) -> None:
    name = entry.orig_filename
    if not is_inside(name) or "/" not in name:
        raise ArchiveError(f"{file}: the entry {name!r} would not lie in the run's folder")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise ArchiveError(f"{file}: the entry {name!r} is a link or device, not a file")
    if entry.flag_bits & 1:
        raise ArchiveError(f"{file}: the entry {name!r} is encrypted")
    if entry.compress_type not in PACKED:
        raise ArchiveError(f"{file}: the entry {name!r} is packed otherwise than by mechmm pack")
    _refuse_code(name, file)


def _check_names(
    archive: zipfile.ZipFile, inside: Mapping[str, zipfile.ZipInfo], file: Path
) -> None:
    """Only what the manifest names, and the two files beside it."""
    if MANIFEST not in inside:
        raise ArchiveError(f"{file} is no archive of a run: it has no {MANIFEST}")
    if inside[MANIFEST].file_size > 64 * BLOCK:
        raise ArchiveError(f"{file}: its {MANIFEST} has {inside[MANIFEST].file_size:,} bytes")
    manifest = parse_manifest(archive.read(inside[MANIFEST]), file)
    known = {*expected(manifest, file), MANIFEST, CITATION}
    if odd := sorted(set(inside) - known):
        raise ArchiveError(f"{file} holds {odd[0]!r}, which its manifest does not name")


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    """Write one file, and never more of it than it was said to have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    left = entry.file_size
    with archive.open(entry) as source, path.open("xb") as target:
        while block := source.read(BLOCK):
            left -= len(block)
            if left < 0:
                raise ArchiveError(f"{entry.filename!r} is larger than the archive says")
            target.write(block)
    if left:
        raise ArchiveError(f"{entry.filename!r} is shorter than the archive says")


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A name beside a file or folder for what is not finished; gone at the end."""
    near = path.absolute().with_name(f".{path.name}.{uuid4().hex[:8]}")
    near.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield near
    finally:
        shutil.rmtree(near, ignore_errors=True) if near.is_dir() else near.unlink(missing_ok=True)
