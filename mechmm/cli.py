"""The command line: parse, call, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Mechanistic interpretability for multimodal models, from pixel to answer token.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
zoo = typer.Typer(
    help="The shipped demo model: train it, evaluate it, read its card.", no_args_is_help=True
)
app.add_typer(zoo, name="zoo")
bench = typer.Typer(help="Try methods where the answer is known.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Name = Annotated[str, typer.Argument(help="A hub name, a local folder, or mechmm/demo (shipped).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON, nothing else.")]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run.")]
SITES = ("residual", "heads", "mlps", "attention", "patches", "projector")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("out/demo"),
) -> None:
    """Ask the demo model about a picture, patch both towers and write one HTML report."""
    from mechmm.zoo.demonstration import demonstrate

    demonstrate(out)


@app.command()
def info(name: Name, as_json: AsJson = False) -> None:
    """What a model is: towers, sizes, hook points."""
    from mechmm.runs.describe import describe, print_description

    found = describe(_load(name))
    print(json.dumps(found)) if as_json else print_description(found)


@app.command()
def families(as_json: AsJson = False) -> None:
    """The architectures that can be hooked: towers, media, projectors, how a run can resume."""
    from mechmm.runs.families import family_table
    from mechmm.runs.terminal import print_table

    table = family_table()
    print(table.to_json(orient="records")) if as_json else print_table(table, "Families")


@app.command()
def audit(name: Name, as_json: AsJson = False) -> None:
    """Run every hook point of a model: does it fire, does an edit matter, does a gradient reach it?

    Exit code 1 if any hook is dead.
    """
    from mechmm.model.audit import audit as run
    from mechmm.runs.describe import example_batch

    model = _load(name)
    found = run(model, example_batch(model))
    print(found.to_dataframe().to_json(orient="records") if as_json else found)
    raise typer.Exit(1 if found.dead else 0)


@app.command()
def patch(
    model: Annotated[str, typer.Option(help="A hub name, a local folder, or mechmm/demo.")],
    pairs: Annotated[Path, typer.Option(help="Folder written by PairDataset.save.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the result and its report; must be new.")
    ] = None,
    sites: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(SITES)}.")
    ] = "residual,heads",
    spans: Annotated[
        str, typer.Option(help="Comma-separated spans for residual, attention and mlps.")
    ] = "image,question,last",
    metric: Annotated[
        str, typer.Option(help="logit_diff, log_prob, prob, kl or accuracy.")
    ] = "logit_diff",
    direction: Annotated[
        str, typer.Option(help="denoise, noise, zero, mean or resample.")
    ] = "denoise",
    seed: Annotated[int, typer.Option(help="Of the null, of resample and of the screen.")] = 0,
    screen: Annotated[
        float | None,
        typer.Option(help="Patch only this share of sites, chosen by attribution patching."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Of one forward pass; default: found by a short trial.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Recorded activations at once, for example 2GB.")
    ] = None,
    state: Annotated[
        str, typer.Option(help="Where recorded activations are kept: device, cpu or disk.")
    ] = "device",
    plan: Annotated[bool, typer.Option("--plan", help="Say what would run, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Patch every site of every pair, one at a time; save the numbers and a report.

    Ctrl-C ends the run and saves what is finished; the exit code is 130 then.
    """
    from mechmm.runs.patch import Job, facts_of, patch_folder, plan_folder

    names, places = ([n.strip() for n in text.split(",")] for text in (sites, spans))
    job = Job(pairs, names, places, metric, direction, seed, screen, tokens, budget, state)
    if plan:
        found = plan_folder(_load(model), job)
        print(json.dumps(facts_of(found)) if as_json else found)
        return
    if out is None:
        raise ValueError("patch needs --out, a new folder for the result (or --plan)")
    found = patch_folder(_load(model), job, out, as_json)
    if as_json:
        print(found.to_dataframe().to_json(orient="records"))
    if found.interrupted:
        said = f"interrupted, {found.missing} cells are missing; the others are in {out}"
        print(f"mechmm: {said}", file=sys.stderr)
        raise typer.Exit(130)


@app.command()
def run(
    config: Annotated[str | None, typer.Argument(help="A TOML file; see docs/runs.md.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value each, for example pairs.color.n=8.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the run; must be new.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder of an interrupted run to go on with; key=value of headlines."),
    ] = None,
) -> None:
    """Run a config: pairs, steps, headlines and a report, in one folder that can be run again.

    Ctrl-C ends the run and keeps what is finished; the exit code is 130 then.
    """
    from mechmm.runs.command import run_command

    raise typer.Exit(run_command(config, overrides or [], out, resume))


@app.command()
def verify(folder: RunFolder, as_json: AsJson = False) -> None:
    """Check every file of a run's folder against its manifest. Exit code 1 if anything differs."""
    from dataclasses import asdict

    from mechmm.runs.verification import verify

    with _refusals():
        found = verify(folder)
    print(json.dumps({"ok": found.ok, **asdict(found)}) if as_json else found)
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def diff(first: RunFolder, second: RunFolder, as_json: AsJson = False) -> None:
    """What differs between two runs: settings, versions, numbers, headlines.

    Exit code 1 if settings or values do.
    """
    from mechmm.runs.difference import diff, print_difference

    with _refusals():
        found = diff(first, second)
    print(json.dumps(found.as_json())) if as_json else print_difference(found)
    raise typer.Exit(0 if found.same else 1)


@app.command()
def replay(
    folder: RunFolder,
    out: Annotated[Path | None, typer.Option(help="Keep the new run in this new folder.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Where the model's files lie, if not where they did.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a run again from its folder alone and compare every number. Exit code 1 if one differs.

    With equal versions on an equal machine all numbers must be the same, elsewhere within 1e-4 of
    the largest value of their array.
    """
    from mechmm.runs.replaying import print_replay, replay
    from mechmm.runs.runner import Interrupted

    try:
        with _refusals():
            found = replay(folder, out, model=model)
    except Interrupted as error:
        print("mechmm: interrupted" if out is None else f"mechmm: {error}", file=sys.stderr)
        raise typer.Exit(130) from None
    print(json.dumps(found.as_json())) if as_json else print_replay(found)
    raise typer.Exit(0 if found.agrees else 1)


@app.command()
def pack(
    folder: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="A new .zip file; default: beside the folder.")
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="The model's files go along (safetensors only).")
    ] = False,
    model: Annotated[
        Path | None, typer.Option(help="Where the model's files lie, if not where they did.")
    ] = None,
    author: Annotated[
        list[str] | None, typer.Option(help="For CITATION.cff; may be given several times.")
    ] = None,
) -> None:
    """Write a run as one archive to publish."""
    from mechmm.runs.archive import pack, weights_of

    with _refusals():
        if model is not None and not weights:
            raise ValueError("--model says where the weights lie: give --weights, too")
        along = (model or weights_of(folder)) if weights else None
        print(pack(folder, out, weights=along, authors=author or ()))


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="Written by mechmm pack.")],
    out: Annotated[
        Path | None, typer.Option(help="A new folder; default: the archive's name, here.")
    ] = None,
    limit: Annotated[
        str | None, typer.Option(help="Bytes that it may unpack to; default: 4GiB.")
    ] = None,
) -> None:
    """Write the run in an archive into a new folder and verify it; nothing in it is executed."""
    from mechmm.runs.archive import Limits, unpack

    with _refusals():
        print(unpack(file, out, Limits() if limit is None else Limits(size=_bytes(limit))))


@app.command()
def view(
    folders: Annotated[list[Path], typer.Argument(help="Runs, or folders with runs in them.")],
    port: Annotated[int, typer.Option(help="Where to answer, on this machine alone.")] = 8765,
) -> None:
    """Show runs in a browser: a list to filter, two side by side, and their pages.

    Only this machine can reach it (127.0.0.1), and it only reads. Exit code 1 if the port is in use
    or a folder has no run.
    """
    from mechmm.runs.view import view as show

    with _refusals():
        show(folders, port)


@zoo.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the model.")],
    seed: Annotated[int, typer.Option(help="Of the weights and of every batch.")] = 0,
    phases: Annotated[
        int | None, typer.Option(help="Only the first so many of its phases; default: all.")
    ] = None,
) -> None:
    """Train the demo model from a seed; run again to go on from the last checkpoint.

    The model is kept on the way, too, in the folder history: see mechmm.over_checkpoints.
    """
    from mechmm.zoo.training import PHASES, Trainer

    if phases is not None and not 1 <= phases <= len(PHASES):
        raise ValueError(f"--phases is {phases}; training has {len(PHASES)}, give 1 to that many")
    Trainer(out, seed, PHASES[:phases]).run()


@zoo.command()
def plant(
    task: Annotated[str, typer.Option(help="color_at_cell, same_color or prior_overridden.")],
    out: Annotated[Path, typer.Option(help="Folder for the model and its true circuit.")],
    seed: Annotated[int, typer.Option(help="Of the weights and of every batch.")] = 0,
) -> None:
    """Train a small model whose circuit is known, in minutes."""
    from mechmm.zoo.planted.training import train as run

    run(task, seed).save(out)


@zoo.command()
def evaluate(
    name: Annotated[
        str, typer.Option("--model", help="mechmm/demo or a local folder.")
    ] = "mechmm/demo",
    n: Annotated[int, typer.Option(help="Questions per row.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the scenes.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Accuracy per kind of question on scenes that the model has never seen."""
    from mechmm.runs.terminal import print_table
    from mechmm.zoo.evaluation import evaluate as run

    table = run(_load(name), n, seed)
    print(table.to_json(orient="records")) if as_json else print_table(table, "Accuracy")


@zoo.command()
def card() -> None:
    """The demo model's card."""
    from importlib.resources import files

    print((files("mechmm") / "zoo" / "demo" / "README.md").read_text())


@bench.command()
def circuits(
    models: Annotated[
        str,
        typer.Option(help="Comma-separated: compiled, redundant, trained, demo, or single ones."),
    ] = "",
    methods: Annotated[
        str, typer.Option(help="Comma-separated methods of mechmm.attribute; default: all.")
    ] = "",
    pairs: Annotated[int, typer.Option(help="To make scores on, and as many to test on.")] = 12,
    steps: Annotated[int, typer.Option(help="Of integrated gradients.")] = 5,
    seed: Annotated[int, typer.Option(help="Of pairs and random scores.")] = 0,
    file: Annotated[Path | None, typer.Option("--json", help="Write all rows here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a page with figures.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="8 pairs, quick methods.")] = False,
) -> None:
    """Score edges with every method, on models whose circuit is known and on the demo model."""
    from mechmm.runs.bench import Bench, bench_circuits

    cases, tried = ([n.strip() for n in text.split(",") if n] for text in (models, methods))
    bench_circuits(Bench(cases, tried, pairs, steps, seed, quick), file, out)


@contextmanager
def _refusals() -> Iterator[None]:
    """What a folder or an archive is refused for, on stderr; exit code 1."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        print(f"mechmm: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


def _bytes(text: str) -> int:
    from mechmm.runs.patch import bytes_of

    return bytes_of(text)


def _load(name: str):
    from mechmm.model.hooked import HookedMultimodal

    return HookedMultimodal.from_pretrained(name)


def main() -> None:
    """Entry point: errors that a user can mend are one line on stderr, with exit code 2."""
    try:
        app()
    except (ValueError, KeyError, OSError) as error:
        print(f"mechmm: {error}", file=sys.stderr)
        raise SystemExit(2) from error
