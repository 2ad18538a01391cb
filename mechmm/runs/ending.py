"""How a run ends: headlines, verdict, page and digests; or an error, which leaves what is done."""

from __future__ import annotations

import errno
import shutil

from mechmm.results.store import write_whole
from mechmm.runs import headlines as heads
from mechmm.runs import manifest, tables
from mechmm.runs.folder import Run, as_json
from mechmm.runs.job import Job
from mechmm.runs.paths import FINISHED, HEADLINES, RESULTS, STEPS, RunError


def finish(job: Job) -> Run:
    """Read the headlines of a run whose steps are done, and make its page.

    Raises:
        HeadlineError: headlines that ask what the tables do not have.
    """
    from mechmm.runs import page  # plotly takes long to load

    if (job.out / STEPS).exists():
        shutil.rmtree(job.out / STEPS)
    asked = job.config.headlines
    read = {
        step: tables.read_each(job.result(step), (h.table for h in asked if h.step == step))
        for step in {headline.step for headline in asked}
    }
    found = heads.all_measured(asked, read, job.out)
    write_whole(job.out / HEADLINES, as_json(found))
    job.note(headlines=found, verdict=heads.verdict(found))
    page.write(job.out)
    job.note(state=FINISHED, outputs=manifest.outputs(job.out))
    return Run.open(job.out)


def fail(job: Job, error: Exception) -> None:
    """A new run that has finished nothing leaves nothing behind; a resumed one stays.

    Raises:
        RunError: the disk is full.
    """
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        raise RunError(
            f"the disk is full; finished chunks are intact: make room, then go on with "
            f"mechmm run --resume {job.out}"
        ) from error
    if job.new and not any((job.out / name).exists() for name in (STEPS, RESULTS)):
        shutil.rmtree(job.out)
