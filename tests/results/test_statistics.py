"""Bootstrap intervals against brute force, and against what an interval promises."""

import numpy as np
import pytest
import torch

from mechmm.results import statistics
from mechmm.results.statistics import bootstrap_interval


def test_it_is_the_percentile_interval_of_resampled_means() -> None:
    values = np.random.default_rng(0).exponential(size=(3, 12))
    low, high = bootstrap_interval(values, confidence=0.9, resamples=4000)
    draws = np.random.default_rng(1).integers(0, 12, (40_000, 12))
    means = values[:, draws].mean(-1)
    np.testing.assert_allclose(low, np.quantile(means, 0.05, axis=-1), atol=0.03)
    np.testing.assert_allclose(high, np.quantile(means, 0.95, axis=-1), atol=0.03)


def test_two_examples_can_be_worked_out() -> None:
    # Means of two draws from {0, 1}: 0, 1/2, 1 with chances 1/4, 1/2, 1/4.
    low, high = bootstrap_interval(torch.tensor([0.0, 1.0]), confidence=0.4)
    assert (low.item(), high.item()) == (0.5, 0.5)
    low, high = bootstrap_interval(torch.tensor([0.0, 1.0]), confidence=0.6)
    assert (low.item(), high.item()) == (0.0, 1.0)


def test_it_covers_the_mean_about_as_often_as_promised() -> None:
    values = torch.randn(600, 40, generator=torch.Generator().manual_seed(0)) + 2
    low, high = bootstrap_interval(values, confidence=0.9)
    covered = ((low < 2) & (high > 2)).float().mean().item()
    assert 0.84 < covered < 0.94


def test_a_cell_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_interval(values, seed=5)
    alone = bootstrap_interval(values[1, 2], seed=5)
    assert (low[1, 2], high[1, 2]) == alone
    monkeypatch.setattr(statistics, "_NUMBERS", 1000)
    for whole, chunked in zip((low, high), bootstrap_interval(values, seed=5), strict=True):
        assert torch.equal(whole, chunked)
    assert not torch.equal(low, bootstrap_interval(values, seed=6)[0])


def test_nan_and_single_examples_have_no_interval() -> None:
    values = torch.tensor([[0.0, 1.0, float("nan")], [1.0, 1.0, 1.0]])
    low, high = bootstrap_interval(values)
    assert torch.isnan(low[0])
    assert torch.isnan(high[0])
    assert low[1] == high[1] == 1
    assert torch.isnan(torch.stack(bootstrap_interval(torch.ones(2, 1)))).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.bfloat16])
def test_coarse_numbers_give_float32(dtype: torch.dtype) -> None:
    values = torch.tensor([0, 1, 1, 1, 0]).to(dtype)
    low, high = bootstrap_interval(values)
    assert low.dtype == high.dtype == torch.float32
    assert low.item() <= 0.6 <= high.item()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="no examples"):
        bootstrap_interval(torch.zeros(3, 0))
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval(torch.zeros(3), confidence=1.5)
    assert bootstrap_interval(torch.zeros(0, 4))[0].shape == (0,)
