"""Running a run again, from its folder alone, and comparing every number.

The config is the folder's `resolved.json`, the pairs are those saved in it; the model is found by
name, in `weights/` or where it is said to lie, and refused unless its files have the hashes of
the manifest. Read besides are the checkpoints that a step names, and, where the saved pairs are
missing, the folder of pairs that the config names. No code of the folder is executed. It runs in
this process, wherever the first run was computed.

A folder from which only what a run makes anew was taken away (report, figures, pairs that a config
makes, results whose numbers are large) can still be run again: pairs are made as at first and must
have the digest of the manifest, and what is left of the results is compared.

With equal versions on an equal machine every number must be the same. Elsewhere sums are added up
in another order: then numbers agree within `RELATIVE` of the largest value of their array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from mechmm.runs import manifest as manifests
from mechmm.runs.config import Config
from mechmm.runs.difference import Difference, diff, print_difference
from mechmm.runs.engines import Engine
from mechmm.runs.folder import Run
from mechmm.runs.hub import commit_of
from mechmm.runs.models import differing
from mechmm.runs.paths import FIGURES, PAIRS, RESULTS, WEIGHTS, RunError
from mechmm.runs.runner import run
from mechmm.runs.unchanged import checkpoints
from mechmm.runs.verification import Verification, verify

RELATIVE = 1e-4
"""Of an array's largest value, on another machine or with other versions."""
MADE_ANEW = ("report.html", f"{FIGURES}/", f"{PAIRS}/", f"{RESULTS}/")
"""Files that a folder can do without."""
MATTERS = ("mechmm", "packages", "python", "platform", "processor", "device", "dtype", "threads")
"""Entries of a manifest on which the last digits may depend."""


@dataclass(frozen=True)
class Replay:
    """A run and its repetition.

    Attributes:
        difference: between them.
        relative: how far numbers may be apart: 0 with equal versions on an equal machine.
        folder: of the new run, where it was kept.
        absent: files of the first run that were not there.
        elsewhere: entries of the manifests on which last digits depend, and that differ.
        threads: of the first run, where this process has another number.
    """

    difference: Difference
    relative: float
    folder: Path | None
    absent: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    threads: int | None = None

    @property
    def agrees(self) -> bool:
        """Whether settings are the same, and every number as near as it has to be."""
        return not len(self.difference.settings) and self.difference.agrees(self.relative)

    def as_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        facts = {"agrees": self.agrees, "relative": self.relative, "absent": list(self.absent)}
        return {**facts, "elsewhere": list(self.elsewhere), **self.difference.as_json()}


def replay(
    folder: str | Path, out: str | Path | None = None, *, model: str | Path | None = None
) -> Replay:
    """Run a run again and compare.

    Args:
        folder: of a finished run, which may lack what a run makes anew.
        out: a new folder for the new run; default: a temporary one, which goes again.
        model: folder of the model's files; default: `weights/` of the run, else where its config
            says.

    Raises:
        FileNotFoundError: the folder is no run.
        RunError: it does not verify, is of a newer format, or the files of the model or of a
            checkpoint are others now.
        ConfigError: its config is of a mechmm with other methods.
        Interrupted: Ctrl-C.
    """
    folder = Path(folder)
    found = verify(folder)
    if not _enough(found):
        raise RunError(f"{folder} does not verify, so that it says nothing to replay it; {found}")
    old = Run.open(folder)
    config, weights = old.config, folder / WEIGHTS
    source = Path(model) if model else weights if weights.is_dir() else None
    _check_model(old, source)
    _check_checkpoints(old, config)
    engine = Engine(chunk=config.engine.chunk, tokens=config.engine.tokens)
    anew = any(name.startswith(f"{PAIRS}/") for name in found.missing)
    with TemporaryDirectory(prefix="mechmm-replay-") as near:
        new = Path(out) if out else Path(near) / "run"
        saved = None if anew else folder / PAIRS
        again = run(replace(config, engine=engine), new, saved=saved, source=source)
        _check_same(old, again)
        _check_checkpoints(old, config)  # those that the hub gave meanwhile
        apart = diff(folder, new, partial=bool(found.missing))
        elsewhere = _elsewhere(old.manifest, again.manifest)
        exact = not elsewhere and (_tells_all(old.manifest) or apart.agrees())
        threads = old.manifest["threads"] if "threads" in elsewhere else None
        kept = new if out else None
        return Replay(apart, 0.0 if exact else RELATIVE, kept, found.missing, elsewhere, threads)


def _enough(found: Verification) -> bool:
    """Whether nothing changed, and nothing is missing but what a run makes anew."""
    return replace(found, missing=()).ok and all(n.startswith(MADE_ANEW) for n in found.missing)


def _check_model(old: Run, source: Path | None) -> None:
    """Refuse, before it is loaded, a model whose files are others now."""
    named = old.manifest["model"]
    base = old.folder / old.manifest.get("base", ".") if source is None else Path()
    name = str(named["name"] if source is None else source.absolute())
    folder = manifests.model_folder(name, base, named.get("revision"))
    now = {} if folder is None else manifests.files_of(folder)
    if not now and (source is not None or name.startswith(".")):
        raise RunError(
            f"there is no model in {source or name}; say where its files lie with --model"
        )
    commit = commit_of(folder)
    if commit is not None:  # loading brings what is missing
        now = {**named["files"], **now}
    if now:
        _refuse_other(named, {"files": now, "commit": commit})


def _check_checkpoints(old: Run, config: Config) -> None:
    """Refuse checkpoints whose files are others now; those of the hub may still have to come."""
    known, nothing = old.manifest.get("checkpoints", {}), manifests.combined({})
    for name, files in checkpoints(config).items():
        before, now = known.get(name, nothing), manifests.combined(files)
        if nothing not in (before, now) and before != now:
            raise RunError(
                f"the checkpoint {name} is not the one that ran: its files have the SHA-256 {now}, "
                f"the run's had {before}; put the run's files back where its config says"
            )


def _check_same(old: Run, new: Run) -> None:
    """The same once more for a model that the hub gave meanwhile, and for pairs made anew."""
    _refuse_other(old.manifest["model"], new.manifest["model"])
    for name, pairs in old.manifest["pairs"].items():
        if new.manifest["pairs"][name]["sha256"] != pairs["sha256"]:
            raise RunError(
                f"the pairs {name} come out otherwise here than in {old.folder}, from which they "
                "are missing; replay a folder that has its pairs"
            )


def _refuse_other(named: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    before, now = named["files"], found["files"]
    differ = differing(named, found)
    if not differ:
        return
    name = differ[0]
    raise RunError(
        f"the model {named['name']} is not the one that ran: {name} has the SHA-256 "
        f"{now.get(name, 'of no file')}, the run's had {before.get(name, 'none')}"
        + (f" ({len(differ) - 1} more files differ)" if len(differ) > 1 else "")
        + "; get that version of the model, and say where it lies with --model"
    )


def _elsewhere(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    """Entries that differ, of those that the old manifest has."""
    return tuple(key for key in MATTERS if key in old and old[key] != new.get(key))


def _tells_all(old: Mapping[str, Any]) -> bool:
    """Whether a manifest says all on which last digits depend; older ones have no processor, so
    that of theirs equal numbers cannot be demanded."""
    return all(key in old for key in MATTERS)


def print_replay(found: Replay) -> None:
    """The comparison, and what it means."""
    print_difference(found.difference, found.relative)
    near = f"within {found.relative:g} of the largest value of their array"
    wanted = near if found.relative else "equal, as they must with equal versions and machine"
    said = f"agrees: all numbers are {wanted}" if found.agrees else f"differs: not all are {wanted}"
    if found.absent:
        said += f" (of what is there: {len(found.absent)} files of the run were left out)"
    Console().print(said, highlight=False)
    if found.elsewhere:
        print(f"not as the run had it: {', '.join(found.elsewhere)}")
    if found.threads is not None:
        others = " and the rest as it was" if len(found.elsewhere) > 1 else ""
        print(f"with OMP_NUM_THREADS={found.threads}{others} all numbers would have to be equal")
    if found.folder is not None:
        print(f"run: {found.folder}")
