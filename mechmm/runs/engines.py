"""What computes the steps of a run: this process, or workers of a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from mechmm.engine.calibrate import DEFAULT
from mechmm.runs.paths import RunError

ENGINES = ("local", "ray")
PLACES = ("name", "workers", "cpus", "gpus", "address", "retries")
"""Settings that say where a run is computed, and change none of its numbers."""


@dataclass(frozen=True)
class Engine:
    """How steps are run.

    Attributes:
        name: `local`, or `ray`, which the other settings but `chunk` and `tokens` are for.
        chunk: pairs per chunk. tokens: of one forward pass, at most; fixed, because a budget that
            is found by timing would change the order of sums from run to run.
        workers: processes, each with a replica of the model. cpus, gpus: of each.
        address: of a cluster; None: this machine.
        retries: how often a chunk is run again because its worker died.
    """

    name: str = "local"
    chunk: int = 32
    tokens: int = DEFAULT
    workers: int = 1
    cpus: float = 1
    gpus: float = 0
    address: str | None = None
    retries: int = 3

    @property
    def elsewhere(self) -> bool:
        """Whether anything is set that only workers have."""
        return (self.workers, self.cpus, self.gpus, self.address) != (1, 1, 0, None)


LEAST = {"chunk": 1, "tokens": 1, "workers": 1, "cpus": 0, "gpus": 0, "retries": 0}
"""The least value of every number."""


def check_ray() -> None:
    """Refuse to run on workers where Ray is not installed.

    Raises:
        RunError: with how to install it.
    """
    if find_spec("ray") is None:
        raise RunError(
            '[engine] name = "ray" needs Ray, which is not installed: pip install '
            "'mechmm[cluster]', or use name = \"local\""
        )
