"""A run that is killed at any moment and taken up again ends with the files of one that was not.

Processes are forked from one that has the model, and kill themselves (SIGKILL) at an operation on a
file: before it, or with the file half-written.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import CONFIG, contents

import mechmm as mm
from mechmm.runs import manifest, runner, steps
from mechmm.runs.config import load

OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
Moment = Callable[[str, str], bool]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("killed") / "demo.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module", autouse=True)
def loaded(config):
    """The model is loaded once for all processes, and the repository is not looked at, which
    somebody may edit meanwhile."""
    found = runner.load_model(load(config).model, config.parent)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner, "load_model", lambda *asked: found)
        patched.setattr(manifest, "repository", lambda base: None)
        yield


@pytest.fixture(scope="module")
def whole(config):
    out = config.parent / "whole"
    assert forked(config, lambda: mm.runs.run(config, out)) == 0
    return contents(out)


def forked(config: Path, work: Callable[[], object]) -> int:
    """The exit code of a process that does some work, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # the others of a pool do not outlive a fork
        try:
            work()
        except BaseException:
            (config.parent / "error").write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die(near: Path, moment: Moment, half: bool) -> None:
    """Let this process kill itself at an operation on a file near a folder."""

    dying = False

    def hook(event: str, given: tuple) -> None:
        nonlocal dying
        if dying or event not in OPERATIONS:
            return
        path, last = str(given[0]), given[-1]
        opened = event == "open"
        if opened and not last & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        relative = not opened and isinstance(last, int) and last >= 0  # to a folder: of a rmtree
        if not (path.startswith(str(near)) or relative) or not moment(event, path):
            return
        dying = True
        if half and opened:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(file, b'{"half')
        os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed(config: Path, out: Path, moment: Moment, half: bool = False) -> int:
    def work() -> None:
        die(config.parent, moment, half)
        mm.runs.run(config, out)

    return forked(config, work)


def end(config: Path, out: Path) -> dict[str, bytes]:
    """Take a killed run up, or begin it again where it had not begun; all that is there then."""

    compute = steps.run_part

    def computed(config, step, parts, number, *rest):
        assert not (out / "steps" / step.name / f"{number:05d}").exists()
        assert not (out / "results" / step.name).exists()
        return compute(config, step, parts, number, *rest)

    def work() -> None:
        steps.run_part = computed
        if (out / "manifest.json").exists():
            mm.runs.resume(out)
        else:
            with pytest.raises(FileNotFoundError, match=r"begun again, with mechmm run CONFIG"):
                mm.runs.resume(out)
            mm.runs.run(config, out)

    error = config.parent / "error"
    assert forked(config, work) == 0, error.read_text()
    assert not list(config.parent.glob(f".{out.name}*"))
    return contents(out)


MOMENTS = {
    "before the folder has its name": ("os.rename", r"/\.out\.\w+"),
    "a chunk, half-written": ("open", r"steps/exit/\.00001\.\w+/result.json"),
    "within the removal of chunks": ("os.remove", r"result\.json"),
    "before a single chunk becomes the result": ("os.rename", r"steps/said/00000"),
    "before the page is there": ("os.rename", r"/\.report\.html\.\w+"),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_killed_at_a_moment_it_ends_with_the_same_files(config, whole, name):
    event, path = MOMENTS[name]
    out = config.parent / "out"

    def moment(now: str, where: str) -> bool:
        return now == event and re.search(f"{path}$", where) is not None

    assert killed(config, out, moment, half=True) == -signal.SIGKILL
    assert end(config, out) == whole
    out.rename(config.parent / name.replace(" ", "-"))


def test_killed_while_it_sweeps_up_it_leaves_what_can_be_swept_up(config, whole):
    out = config.parent / "swept"
    begun = ("os.rename", r"/\.swept\.\w+$")
    sweeping = ("os.rmdir", r"images$")
    for event, path in (begun, sweeping, sweeping):
        code = killed(config, out, lambda now, at, e=event, p=path: now == e and re.search(p, at))
        assert code == -signal.SIGKILL
    (left,) = config.parent.glob(".swept.*")
    assert (left / ".lock").exists()
    assert end(config, out) == whole


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["before", "within"])
def test_killed_at_every_moment_it_ends_with_the_same_files(config, whole, half):
    for number in range(1, 1000):
        out, count = config.parent / f"{half}-{number}", iter(range(1, 1000))
        code = killed(config, out, lambda *_, n=number, c=count: next(c) == n, half)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert end(config, out) == whole, number
        shutil.rmtree(out)
    assert number > 100
