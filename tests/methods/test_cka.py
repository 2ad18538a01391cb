"""The estimator is the U-statistic, unbiased, and the same up to rotation and scale."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

import mechmm as mm
from mechmm.methods.cka import _compared, hsic
from mechmm.model.batch import Batch
from mechmm.results.result import Result, concat
from mechmm.testing import tiny, tiny_inputs


def kernels(n, *widths, seed=0):
    random = torch.Generator().manual_seed(seed)
    states = [torch.randn(n, width, generator=random).double() for width in widths]
    return [x @ x.T for x in states]


def test_it_is_the_direct_sum_over_four_examples():
    """HSIC as a U-statistic: the mean over all ordered quadruples of different examples of
    k_ij l_ij + k_ij l_qr - 2 k_ij l_iq (Song et al. 2012, theorem 3)."""
    k, m = kernels(6, 3, 4)
    terms = [
        k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in permutations(range(6), 4)
    ]
    torch.testing.assert_close(hsic(k, m), torch.stack(terms).mean())


def test_it_is_unbiased_where_the_biased_one_is_not():
    values = torch.stack([hsic(*kernels(12, 40, 40, seed=s)) for s in range(200)])
    within = torch.stack([hsic(*[kernels(12, 40, seed=s)[0]] * 2) for s in range(200)]).mean()
    assert abs(values.mean() / within) < 0.02
    centre = torch.eye(12).double() - 1 / 12
    biased = torch.stack(
        [
            ((centre @ k @ centre) * (centre @ m @ centre)).sum() / 121
            for k, m in (kernels(12, 40, 40, seed=s) for s in range(20))
        ]
    )
    assert biased.mean() / within > 0.5


def test_rotation_scale_and_shift_change_nothing():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(30, 8, generator=random)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=random))[0]
    noise = torch.randn(30, 8, generator=random)
    cross, own, others, null = _compared([x], [3 * x @ rotation + 7, noise], 30, 20, 0)
    value = cross.mean(-1) / (own.mean(-1)[:, None] * others.mean(-1)).sqrt()
    assert float(value[0, 0]) == pytest.approx(1, abs=1e-5)
    assert abs(float(value[0, 1])) < 0.3
    assert null.abs().max() < 0.3


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "mllama", "clip"])
def test_layers_towers_and_models(family, tmp_path):
    model = tiny(family)
    batches = [Batch.from_inputs(model, **tiny_inputs(model, (1,) * 4, seed=s)) for s in (0, 1)]
    tower = "text" if family == "clip" else "language"
    sites = mm.sites.residual(model, ["text"], layers=[0, 1], towers=[tower])
    sites += mm.sites.residual(model, ["image"], layers=[1], towers=["vision"])
    found = mm.cka(model, batches, sites, size=4, n_permuted=5)
    values = found.values()
    torch.testing.assert_close(values.diagonal(), torch.ones(3), check_dtype=False)
    torch.testing.assert_close(values, values.T)
    assert found.cross.shape == (3, 3, 2)
    if family != "llava":
        return
    other = mm.untrained(model, 1)
    across = mm.cka(model, batches, sites, other=other, size=8, n_permuted=5)
    assert across.names[1].startswith("another ")
    assert float(across.values().diagonal().min()) < 0.99
    assert Result.load(across.save(tmp_path / "cka")).equals(across)
    assert "permuted" in across.page("CKA").html()


def test_minibatches_of_two_runs_join():
    model = tiny("llava")
    batches = [Batch.from_inputs(model, **tiny_inputs(model, (1,) * 4, seed=s)) for s in (0, 1)]
    sites = mm.sites.residual(model, ["text"], layers=[0, 1], towers=["language"])
    whole = mm.cka(model, batches, sites, size=4, n_permuted=1)
    parts = [mm.cka(model, [batch], sites, size=4, n_permuted=1) for batch in batches]
    joined = torch.cat([part.cross for part in parts], -1)
    torch.testing.assert_close(whole.cross, joined, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="differ in `null`"):
        concat(parts)


def test_what_cannot_be_compared():
    model = tiny("llava")
    batch = Batch.from_inputs(model, **tiny_inputs(model, (1,) * 3))
    sites = mm.sites.residual(model, ["text"], layers=[1], towers=["language"])
    with pytest.raises(ValueError, match="3 examples in minibatches of 256"):
        mm.cka(model, [batch], sites)
    with pytest.raises(ValueError, match="3 examples beside 6; give both sides the same"):
        mm.cka(model, [batch], sites, other_data=[batch, batch])
    with pytest.raises(ValueError, match="3 examples; the unbiased estimator needs 4"):
        hsic(*kernels(3, 2, 2))
    with pytest.raises(ValueError, match="there are no batches"):
        mm.cka(model, [], sites)
