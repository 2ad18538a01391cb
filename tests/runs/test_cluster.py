"""Runs over Ray workers give what one process gives, also where a worker is killed on the way.

Tests that start Ray are slow; they are skipped where it is not installed."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.part import Message, Part, Sent
from mechmm.runs import cluster, engines
from mechmm.runs.config import load
from mechmm.runs.paths import RunError
from mechmm.runs.place import ConfigError
from mechmm.runs.runner import run

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
CONFIG = """
name = "shared"
[model]
name = "mechmm/demo"
[pairs.color]
make = "shapes.pairs"
kind = "color"
n = 4
[[steps]]
name = "patched"
method = "patch"
sites = { kind = "residual", spans = ["object", "last"], layers = [1, 2] }
n_null = 1
[[steps]]
name = "objects"
method = "ablate_tokens"
spans = ["object"]
[[steps]]
name = "found"
method = "attribute"
algorithm = "eap"
granularity = "node"
[[steps]]
name = "both"
method = "overlap"
circuit = { step = "found", n = 5 }
other_circuit = { step = "found", n = 9 }
n_random = 5
[engine]
chunk = 1
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


RAY = ["engine.name=ray", "engine.workers=2"]


def test_a_part_that_was_sent_is_the_part(tmp_path):
    model = mm.HookedMultimodal.from_pretrained("mechmm/demo")
    whole = shapes.pairs(model, "color", 4, seed=0)
    part = Part(whole, 2, 2)
    sent = Sent(pickle.loads(pickle.dumps(Message.of(part))), model)
    assert len(sent) == 2
    assert sent.spans == whole.spans
    assert sent.content_hash() == part.content_hash()
    assert sent.first.pairs[0].answer == whole[0].answer
    one, other = part.batch([1]), sent.batch([1])
    assert one.numbers == other.numbers == (3,)
    assert torch.equal(one.clean.input_ids, other.clean.input_ids)
    assert all(
        torch.equal(v, other.clean.layout.defined[n]) for n, v in one.clean.layout.defined.items()
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.name=slurm", "unknown engine 'slurm'"),
        ("engine.workers=2", 'are for name = "ray"'),
        ("engine.retries=-1", r"engine\.retries: must be 0 or more"),
        ("engine.gpu=1", "unknown key"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(config, override, said):
    with pytest.raises(ConfigError, match=said):
        load(config, [override])


def test_without_ray_nothing_begins(config, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"needs Ray, which is not installed: pip install 'mechmm\["):
        run(config, tmp_path / "run", RAY)
    assert not (tmp_path / "run").exists()


class Nothing:
    """Ray, as far as it ends a worker."""

    def kill(self, worker):
        pass


def test_only_workers_that_die_while_loading_count_as_lost(config, monkeypatch):
    monkeypatch.setattr(cluster, "_ray", Nothing)
    monkeypatch.setattr(cluster.Workers, "_start", lambda self: None)
    found = load(config, [*RAY, "engine.retries=1"])
    workers, tries = cluster.Workers(found, {}, None), {0: 0, 1: 0, 2: 0}
    for number in tries:
        workers._replace(None, found.steps[0], number, tries, OSError("killed"))
    workers._replace(None, found.steps[0], None, tries, OSError("killed"))
    with pytest.raises(RunError, match="died while they loaded"):
        workers._replace(None, found.steps[0], None, tries, OSError("killed"))


# With Ray ------------------------------------------------------------------------------------


def files(folder):
    """All numbers, tables and figures, byte by byte."""
    paths = [p for part in ("results", "figures") for p in (folder / part).rglob("*")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file()}


def running():
    """Processes of workers of this test that are running a chunk."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            if "".join(process.cmdline()).startswith("ray::Worker.run"):
                found.append(process.pid)
    return found


@pytest.mark.slow
@with_ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_workers_give_the_bytes_of_one_process_also_when_one_is_killed(
    config, tmp_path, monkeypatch
):
    alone = files(run(config, tmp_path / "alone").folder)
    assert len(alone) > 10
    assert files(run(config, tmp_path / "shared", RAY).folder) == alone

    killed, tell = [], cluster.Workers._tell

    def told(self, report, count, finished):
        """Kill a worker that is running a chunk as soon as another chunk is finished."""
        tell(self, report, count, finished)
        if finished and not killed and (pids := running()):
            os.kill(pids[0], signal.SIGKILL)
            killed.append(pids[0])

    monkeypatch.setattr(cluster.Workers, "_tell", told)
    assert files(run(config, tmp_path / "killed", RAY).folder) == alone
    assert len(killed) == 1


@pytest.mark.slow
@with_ray
@pytest.mark.filterwarnings("ignore")
def test_a_chunk_that_kills_every_worker_is_named(config, tmp_path, monkeypatch):
    def told(self, report, count, finished):
        if finished:
            for pid in running():
                os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(cluster.Workers, "_tell", told)
    with pytest.raises(RunError, match=r"the worker of chunk \d died 2 times .*--resume"):
        run(config, tmp_path / "run", [*RAY, "engine.retries=1"])
    assert any((tmp_path / "run" / "steps" / "patched").iterdir())


@contextmanager
def ray_started():
    """The address of a cluster that `ray start` makes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = Path(sys.executable).with_name("ray")
    options = ["--head", "--block", "--num-cpus=2", "--include-dashboard=false"]
    started = subprocess.Popen(
        [ray, "start", *options, f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        started.terminate()
        started.wait(60)


@pytest.mark.slow
@with_ray
def test_a_cluster_that_runs_already_gives_the_bytes_of_one_process(config, tmp_path, monkeypatch):
    alone = files(run(config, tmp_path / "alone").folder)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    mechmm = Path(sys.executable).with_name("mechmm")
    with ray_started() as address:
        words = [*RAY, f'engine.address="{address}"', "--out", tmp_path / "shared"]
        done = subprocess.run([mechmm, "run", config, *words], capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "shared") == alone
