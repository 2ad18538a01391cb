"""What every benchmark shares: interleaved timing, peak memory, the table and its JSON.

Sides of a comparison run in turn in one process, so that whatever else the machine does meets all
of them alike. On a CPU the clock counts the process's own seconds, on a GPU seconds on the wall.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import operator
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Read when torch is first imported, so this module comes first: no notices of the profiler.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch.profiler import ProfilerActivity, profile

Side = Callable[[], object]
SIGNS = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Elsewhere:
    """What a side gives back that ran in another process, and what it took there."""

    milliseconds: float


@dataclass(frozen=True)
class Row:
    """One comparison: the median of `ours` over that of `theirs` is `ratio`, `goal` its bound.

    Where more is better, as in how many times less ours takes, it is theirs over ours.

    Attributes:
        noise: standard error of the ratio, from its scatter over the rounds.
        difference: the largest between numbers that both sides give.
        met: whether the goal is met, or None without a goal or a run.
        note: why it was not run; then there are no numbers.
    """

    job: str
    against: str
    unit: str
    ours: float | None = None
    theirs: float | None = None
    ratio: float | None = None
    noise: float | None = None
    goal: str | None = None
    met: bool | None = None
    difference: float | None = None
    note: str | None = None


def compare(
    job: str,
    against: str,
    unit: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    goal: str | None,
    difference: float | None = None,
    turned: bool = False,
) -> Row:
    """A row of what two sides took in every round; a goal reads `"<= 1.03"`, `"< 1"` or `">= 4"`.

    Args:
        turned: the ratio is theirs over ours.
    """
    mine, other = statistics.median(ours), statistics.median(theirs)
    above, below = (theirs, ours) if turned else (ours, theirs)
    ratio, met = (other / mine if turned else mine / other), None
    if goal is not None:
        sign, bound = goal.split()
        met = SIGNS[sign](ratio, float(bound))
    noise = _error([one / two for one, two in zip(above, below, strict=True)])
    return Row(job, against, unit, mine, other, ratio, noise, goal, met, difference)


def _error(values: Sequence[float]) -> float:
    """Standard error of a median, from the middle half of the values."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return 0.93 * (high - low) / len(values) ** 0.5


def parser(what: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    options = argparse.ArgumentParser(description=what)
    options.add_argument("--quick", action="store_true", help="fewer rounds, under a minute")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    return options


def settle() -> None:
    """One thread, and freed memory is kept (in glibc): else the kernel hands out and clears the
    same pages again in every run, in more of them for one side than for another, by chance."""
    torch.set_num_threads(1)
    keep = getattr(ctypes.CDLL(None), "mallopt", None)
    if keep is not None:
        trim_threshold, mmap_threshold = -1, -3
        keep(trim_threshold, 2**31 - 1)
        keep(mmap_threshold, 2**30)


def interleaved(
    sides: Mapping[str, Side], rounds: int, device: str = "cpu", warm: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of every side in every round; each round begins with another side.

    Args:
        warm: every side has run already, so that none runs once more before its first round.
    """
    names = list(sides)
    found: dict[str, list[float]] = {name: [] for name in names}
    for side in () if warm else sides.values():
        side()
    gc.collect()
    gc.freeze()  # what was built before is not searched for garbage again, in nobody's turn
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(milliseconds(sides[name], device))
    gc.unfreeze()
    return found


def milliseconds(side: Side, device: str) -> float:
    """What one run of a side takes."""
    gc.collect()
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    found = side()
    if device != "cpu":
        torch.cuda.synchronize()
    taken = 1000 * (clock() - start)
    return found.milliseconds if isinstance(found, Elsewhere) else taken


def peak_bytes(side: Side, device: str = "cpu", warm: bool = False) -> int:
    """The most that tensors take at once while a side runs, beyond what they took before.

    As PyTorch's allocator counts, so exact: two runs give the same number.

    Args:
        warm: the side has run already, so that it does not run once more before it is measured.
    """
    if not warm:
        side()
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        side()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def peak_resident(side: Side) -> int:
    """The most memory that the process takes while a side runs, beyond what it took before; what
    Python objects take counts, too. Linux only; 0 elsewhere."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return 0
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = _kilobytes(status, "VmRSS")
    kept = side()
    peak = _kilobytes(status, "VmHWM")
    del kept
    return 1024 * (peak - before)


def _kilobytes(status: Path, name: str) -> int:
    lines = (line.split() for line in status.read_text().splitlines())
    return next(int(words[1]) for words in lines if words[0] == f"{name}:")


def report(rows: Sequence[Row], file: Path | None = None) -> None:
    """Print the table and its ratios as JSON; write all of every row to a file, if one is given."""
    print(table(rows))
    fields = ("job", "against", "ratio", "goal", "met")
    print(json.dumps([{name: getattr(row, name) for name in fields} for row in rows]))
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    heads = ("job", "against", "ours", "theirs", "ratio", "goal", "met")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(row))} |" for row in rows)])


def _cells(row: Row) -> list[str]:
    if row.ratio is None:
        return [row.job, row.against, "", "", "", "", f"not run: {row.note}"]
    ratio = f"{row.ratio:.3f}" + (f" ± {row.noise:.3f}" if row.noise else "")
    values = [f"{row.ours:.4g} {row.unit}", f"{row.theirs:.4g} {row.unit}", ratio]
    met = {True: "yes", False: "no", None: ""}[row.met]
    return [row.job, row.against, *values, row.goal or "", met]
