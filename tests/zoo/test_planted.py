"""Planted models answer, by the circuit that they are said to have and by nothing else."""

from __future__ import annotations

import json
import re
from functools import cache

import numpy as np
import pytest
import torch
from ablation import Ablation

from mechmm.model.hooked import HookedMultimodal
from mechmm.zoo import planted

SEEDS = (0, 1, 2)
N = 8


@cache
def build(task: str, seed: int = 0) -> planted.Planted:
    return planted.build(task, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("task", [*planted.TASKS, *planted.REDUNDANT])
def test_it_answers_by_its_circuit_alone(task, seed):
    made = build(task, seed)
    answers = made.pairs(16, seed=2).check()
    assert answers["clean_right"].all()
    assert answers["flips"].all()
    run = Ablation(made, N)
    true = set(made.edges)
    assert true <= set(run.reference.edges)
    assert run.faithfulness(true).min() >= 0.99
    assert run.faithfulness(lambda edge: edge not in true).abs().max() <= 0.01


def check_single_edges(task: str, seed: int, false_edges: int | None) -> None:
    """Every true edge is necessary in pairs of some kind, no other one in any pair."""
    made = build(task, seed)
    run = Ablation(made, 8)
    false = [edge for edge in run.reference.edges if edge not in made.edges]
    if false_edges is not None:
        chosen = np.random.default_rng(seed).permutation(len(false))[:false_edges]
        false = [false[i] for i in chosen]
    kinds = np.array([pair.meta["kind"] for pair in run.pairs])
    needed = run.effects(made.edges)
    by_kind = torch.stack([needed[:, kinds == kind].mean(1) for kind in set(kinds)])
    assert by_kind.max(0).values.min() >= 0.1
    unneeded = run.effects(false)
    assert unneeded.abs().max() < 0.01
    # So a ranking by the mean over all pairs puts every true edge first.
    assert needed.mean(1).min() > 10 * unneeded.mean(1).abs().max()


@pytest.mark.parametrize("task", planted.TASKS)
def test_single_edges(task):
    check_single_edges(task, seed=0, false_edges=24)


@pytest.mark.slow
@pytest.mark.parametrize("task", planted.TASKS)
def test_every_single_edge(task):
    check_single_edges(task, seed=1, false_edges=None)


def test_either_of_two_heads_is_enough():
    """So no ablation of a single edge tells the edges of both from those that carry nothing."""
    made = build("backup_heads")
    run = Ablation(made, N)
    heads = [made.roles["read"], made.roles["again"]]
    own = [{edge for edge in made.edges if head in edge} for head in heads]
    spared = [run.effects([edge]).abs().max() for edge in own[0] | own[1]]
    assert len(spared) == 6
    assert max(spared) < 1e-3
    for gone in own:
        assert run.faithfulness(lambda edge, gone=gone: edge not in gone).min() > 0.99
    both = own[0] | own[1]
    assert run.faithfulness(lambda edge: edge not in both).abs().max() < 0.01
    others = [edge for edge in made.edges if edge not in both]
    assert run.effects(others).mean(1).min() > 0.1


@pytest.mark.parametrize("task", planted.TASKS)
def test_every_part_is_there(task):
    """A vision head and MLP, the projector, heads that move the question and read by it, MLPs; only
    copying from the text leaves the picture out."""
    made = build(task)
    nodes = set(made.nodes)
    sees = {made.roles["see"], made.roles["bring"], "projector"}
    assert sees <= nodes if task != "copy_from_text" else not sees & nodes
    asking = {node for role, node in made.roles.items() if role.startswith("ask")}
    assert asking <= nodes
    assert any(edge.endswith("<q>") for edge in made.edges)
    assert any(edge.endswith("->logits") and edge.startswith("m") for edge in made.edges)


def test_noise_is_as_long_as_the_circuit_and_answers_to_the_pair():
    run = Ablation(build("shape_of_color"), N)
    values = run.reference.values(run.clean)
    circuit = set(run.made.nodes)
    for tower in ("vision.", ""):
        length, change = {}, {}
        for name, value in values.items():
            if re.fullmatch(re.escape(tower) + r"(a\d+\.h\d+|m\d+)", name):
                length[name] = value.norm(dim=-1).mean()
                change[name] = (value - run.other[name]).norm(dim=-1).mean()
        noise = [name for name in length if name not in circuit]
        usual = torch.stack([length[name] for name in length if name in circuit]).mean()
        assert len(noise) > 2 * (len(length) - len(noise))
        for name in noise:
            assert usual / 3 < length[name] < 3 * usual
            assert change[name] > 0.01 * usual


def test_seeds_share_neither_basis_nor_places():
    first, second = (build("color_at_cell", seed).model.hf_model for seed in (0, 1))
    mine, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    streams = ("embed_tokens.weight", "lm_head.weight", "position_embedding.weight")
    for name in (n for n in mine if n.endswith(streams)):
        rows = torch.cat([mine[name], theirs[name]])
        rows = rows[rows.norm(dim=1) > 0]
        # No coordinate holds much of what is written or read.
        assert (rows.abs().amax(1) / rows.norm(dim=1)).max() < 0.6
        mean = torch.cosine_similarity(mine[name].mean(0), theirs[name].mean(0), dim=0)
        assert mean.abs() < 0.4
    assert len({build(task, seed).nodes for task in planted.TASKS for seed in SEEDS}) == 18


def test_norms_have_random_weights():
    model = build("color_at_cell").model.hf_model
    norms = [p for name, p in model.named_parameters() if "norm" in name and "weight" in name]
    inside = [p for p in norms if p.std() > 0.1]
    assert len(inside) == 2 * 4 + 2 * 4 + 1  # all but those at the ends of the vision tower


def test_the_same_seed_gives_the_same_model():
    state = torch.random.get_rng_state()
    again = planted.build("count_to_two", 1)
    assert torch.equal(state, torch.random.get_rng_state())
    one = build("count_to_two", 1)
    assert again.edges == one.edges
    pairs = zip(one.model.hf_model.parameters(), again.model.hf_model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert one.pairs(6).content_hash() == again.pairs(6).content_hash()
    assert one.pairs(6).content_hash() != one.pairs(6, seed=1).content_hash()


def test_saved_is_loaded(tmp_path):
    made = build("prior_overridden")
    made.save(tmp_path / "model")
    loaded = HookedMultimodal.from_pretrained(tmp_path / "model")
    pair = made.pairs(1)[0]
    prompts = [pair.clean.text], list(pair.clean.images)
    with torch.no_grad():
        logits = [model(model.encode(*prompts)) for model in (made.model, loaded)]
    assert torch.equal(*logits)
    truth = json.loads((tmp_path / "model" / "truth.json").read_text())
    assert (truth["task"], truth["seed"]) == ("prior_overridden", 0)
    assert tuple(truth["edges"]) == made.edges
    assert tuple(truth["nodes"]) == made.nodes


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="did you mean color_at_cell"):
        planted.build("colour_at_cell")
    with pytest.raises(ValueError, match=r"no planted task 'xyz'.*color_at_cell"):
        planted.build("xyz")
    with pytest.raises(ValueError, match="0 or more, not -1"):
        planted.build("color_at_cell", seed=-1)
    with pytest.raises(ValueError, match="0 pairs"):
        build("color_at_cell").pairs(0)
