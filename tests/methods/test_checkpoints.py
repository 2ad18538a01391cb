"""A method over checkpoints is the method on each of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import mechmm as mm
from mechmm.data import shapes
from mechmm.results.result import Result
from mechmm.testing import tiny
from mechmm.zoo.recipe import build_model, save


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of one architecture."""
    root = tmp_path_factory.mktemp("history")
    for seed in (0, 1):
        save(build_model(seed).eval(), root / f"step-{seed}")
    return [root / "step-0", root / "step-1"]


def heads(model):
    sites = mm.sites.heads(model, towers=["language"], layers=[5])
    return mm.patch(model, shapes.pairs(model, "color", 2, seed=1), sites, n_null=0)


@pytest.fixture(scope="module")
def found(folders):
    return mm.over_checkpoints(heads, folders)


def test_it_is_what_the_method_finds_on_each(found, folders):
    assert found.checkpoints == ("step-0", "step-1", "untrained")
    for folder, result in zip(folders, found.results, strict=False):
        assert heads(mm.HookedMultimodal.from_pretrained(folder)).equals(result)
    values = [result.values for result in found.results]
    assert torch.equal(values[0], values[2])  # the model before training, from the same seed
    assert not torch.equal(values[1], values[2])


def test_the_shipped_model_is_a_checkpoint_by_its_name(folders):
    found = mm.over_checkpoints(heads, [folders[0], "mechmm/demo"], null=False)
    assert found.checkpoints == ("step-0", "mechmm/demo")
    assert heads(mm.HookedMultimodal.from_pretrained("mechmm/demo")).equals(found.results[1])


def test_measures_are_numbers_or_one_per_example(found):
    measures = {"clean": lambda r: r.clean, "largest": lambda r: float(r.values.max())}
    table = found.measured(measures)
    assert len(table) == 6
    clean = table[table["measure"] == "clean"]
    assert np.allclose(clean["value"], [float(r.clean.mean()) for r in found.results])
    assert (clean["low"] <= clean["value"]).all()
    assert (clean["value"] <= clean["high"]).all()
    assert table.loc[table["measure"] == "largest", "low"].isna().all()
    figures = found.plot(measures)
    assert set(figures) == {"clean", "largest"}
    assert list(figures["clean"].data[0].x) == pytest.approx(clean["value"][:2].tolist())


def test_tables_say_the_checkpoint_and_saved_is_loaded(found, tmp_path):
    table = found.to_dataframe()
    assert table["checkpoint"].unique().tolist() == ["step-0", "step-1", "untrained"]
    assert Result.load(found.save(tmp_path / "over")).equals(found)


@dataclass(frozen=True, eq=False)
class Weights(Result):
    norm: Float[Tensor, " layer"] = field(metadata={"axis": 0})

    def to_dataframe(self) -> pd.DataFrame:
        return pd.DataFrame({"norm": self.norm.numpy()})


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "clip", "vit", "idefics3"])
def test_every_family_has_its_untrained_self(family, tmp_path):
    model = tiny(family)
    model.hf_model.save_pretrained(tmp_path / "trained")

    def norms(model):
        weights = [p for p in model.hf_model.parameters() if p.ndim > 1]
        return Weights(torch.stack([w.detach().float().norm() for w in weights]))

    found = mm.over_checkpoints(norms, [tmp_path / "trained"])
    kept, null = (result.norm for result in found.results)
    assert torch.equal(kept, norms(model).norm)
    assert (kept != null).float().mean() > 0.9


def test_bad_checkpoints_are_refused_before_anything_runs(folders, tmp_path):
    def never(model):
        raise AssertionError("ran")

    tiny("llava").hf_model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"checkpoint other is of another architecture than step"):
        mm.over_checkpoints(never, [*folders, tmp_path / "other"])
    with pytest.raises(ValueError, match="no checkpoints"):
        mm.over_checkpoints(never, [])
    with pytest.raises(ValueError, match="would be named 'step-0'"):
        mm.over_checkpoints(never, [folders[0], folders[0]])
    with pytest.raises(OSError, match="nowhere"):
        mm.over_checkpoints(never, [tmp_path / "nowhere"])
    with pytest.raises(TypeError, match="the method gave a dict"):
        mm.over_checkpoints(lambda model: {}, folders[:1])
