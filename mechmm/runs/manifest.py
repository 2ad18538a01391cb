"""What a run's manifest says: versions, code, model files, pairs, resources, digests of outputs.

No environment, no host name and no path of the machine is written; addresses lose their
credentials.
"""

from __future__ import annotations

import platform
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch

import mechmm
from mechmm.model.hooked import DEMO
from mechmm.runs.paths import LOCK, MANIFEST
from mechmm.runs.verification import file_digest

MOST = 200_000
"""Characters of a diff that are kept."""
_ALSO = ("huggingface-hub", "tokenizers")
_MODEL_FILES = (
    ".json",
    ".safetensors",
    ".bin",
    ".model",
    ".txt",
    ".jinja",
    ".py",
    ".pt",
    ".tiktoken",
)
# Up to the last @, which a password may have, too.
_USERINFO = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s'\"]*@")


def machine() -> dict[str, Any]:
    """Versions and the kind of machine."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "packages": packages(),
    }


def processor(device: torch.device) -> str:
    """What computed: the card, or the processor with the instructions that torch uses. The last
    digits of sums depend on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def packages() -> dict[str, str]:
    """Versions of mechmm's dependencies."""
    named = [re.split(r"[^\w.-]", r)[0] for r in _required() if "extra ==" not in r]
    found = {}
    for name in sorted({*named, *_ALSO}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _required() -> list[str]:
    try:
        return requires("mechmm") or []
    except PackageNotFoundError:
        return []


def peak_memory() -> int:
    """Most bytes of memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# Files ---------------------------------------------------------------------------------------


def outputs(folder: Path) -> dict[str, str]:
    """SHA-256 by relative path of every file but the manifest and what begins with a dot."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = ((path.relative_to(folder), path) for path in files)
    return {
        name.as_posix(): file_digest(path)
        for name, path in named
        if name.as_posix() not in (MANIFEST, LOCK) and not any(p[0] == "." for p in name.parts)
    }


def model_files(name: str, base: Path, revision: str | None = None) -> dict[str, str]:
    """SHA-256 by name of a model's files: of the shipped model, a folder, or the hub's snapshot."""
    folder = model_folder(name, base, revision)
    return {} if folder is None else files_of(folder)


def files_of(folder: Path) -> dict[str, str]:
    """SHA-256 by name of the files of a model in a folder."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return {path.name: file_digest(path) for path in files if path.suffix in _MODEL_FILES}


def combined(files: Mapping[str, str]) -> str:
    """One SHA-256 over names and digests."""
    return sha256("".join(f"{k} {v}\n" for k, v in sorted(files.items())).encode()).hexdigest()


def model_folder(name: str, base: Path, revision: str | None = None) -> Path | None:
    """Where a model's files lie, None where they are not on this machine."""
    if name == DEMO:
        return Path(mechmm.__file__).parent / "zoo" / "demo"
    if (base / name).is_dir():
        return base / name
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


# Code ----------------------------------------------------------------------------------------


def git(base: Path) -> dict[str, Any] | None:
    """Commit, changes and address of the repository that the config lies in, else of mechmm's;
    None outside of any. Untracked files, such as runs, are no changes."""
    root = repository(base)
    if root is None:
        return None
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    remote = _git(root, "config", "--get", "remote.origin.url")
    return {
        "commit": (_git(root, "rev-parse", "HEAD") or "").strip() or None,
        "dirty": bool(status and status.strip()),
        "diff": _cut(without_credentials(_git(root, "diff", "HEAD", "--no-ext-diff") or "")),
        "remote": address((remote or "").strip()),
    }


def repository(base: Path) -> Path | None:
    """The root of the repository that the config lies in, else of mechmm's."""
    for folder in (base, Path(mechmm.__file__).parent):
        root = _git(folder, "rev-parse", "--show-toplevel")
        if root and root.strip():
            return Path(root.strip())
    return None


def lock_digest(base: Path) -> str | None:
    """SHA-256 of the repository's requirements.lock."""
    root = repository(base)
    path = None if root is None else root / "requirements.lock"
    return file_digest(path) if path is not None and path.is_file() else None


def address(remote: str) -> str | None:
    """A repository's address without user, password, token and query; of a path its name."""
    remote = without_credentials(remote)
    if not remote:
        return None
    if "://" in remote and not remote.startswith("file:"):
        return re.split(r"[?#]", remote)[0]
    scp = re.fullmatch(r"(?:[^/@\s]+@)?([\w.-]+\.[\w.-]+):([^\s]+)", remote)
    if scp:
        return f"{scp[1]}:{scp[2]}"
    return Path(remote.removeprefix("file:")).name


def without_credentials(text: str) -> str:
    """A text whose addresses have no user, password or token."""
    return _USERINFO.sub(r"\1", text)


def _cut(diff: str) -> str:
    if len(diff) <= MOST:
        return diff
    return f"{diff[:MOST]}\n... cut: {len(diff) - MOST} more characters\n"


def _git(folder: Path, *words: str) -> str | None:
    """What git says, None where it fails or is not there."""
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.decode(errors="replace")
