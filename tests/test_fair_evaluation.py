"Judging rules on labelled rows, beside fairlearn's metrics."
import numpy as np
import pytest
import torch
from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference
from hypothesis import given, settings, strategies as st

from fairbook.fair_evaluation import Judgement, judge_rule, mean_interval, read_frontier, violation_by_chance


def rows(n=400, g=2, m=2, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.integers(g, size=n)
    return rng.integers(m, size=n), a, (rng.integers(m, size=n) + (a == 0)) % m


@pytest.mark.parametrize("g", [2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_against_fairlearn(g, seed):
    y, a, h = rows(g=g, seed=seed)
    dp, eo = (judge_rule(torch.from_numpy(h), y, a, c, g, 2) for c in ("dp", "eo"))
    assert dp.between_groups == pytest.approx(demographic_parity_difference(y, h, sensitive_features=a), abs=1e-12)
    assert eo.between_groups == pytest.approx(equalized_odds_difference(y, h, sensitive_features=a), abs=1e-12)
    assert dp.accuracy == eo.accuracy == pytest.approx((y == h).mean(), abs=1e-12)


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 4), st.sampled_from(["dp", "eop", "eo"]))
@settings(max_examples=30, deadline=None)
def test_conventions_bracket_each_other_and_draws_are_expectations(seed, g, m, criterion):
    y, a, h = rows(500, g, m, seed)
    sure = judge_rule(torch.from_numpy(h), y, a, criterion, g, m)
    assert sure.from_everybody <= sure.between_groups + 1e-12 and sure.between_groups <= 2 * sure.from_everybody + 1e-12
    assert sure == judge_rule(torch.nn.functional.one_hot(torch.from_numpy(h), m).double(), y, a, criterion, g, m)
    drawn = judge_rule(torch.full((len(y), m), 1 / m), y, a, criterion, g, m)
    assert drawn.between_groups < 1e-6 and drawn.accuracy == pytest.approx(1 / m, abs=1e-6)


def test_one_group_has_nothing_to_compare():
    assert judge_rule(torch.tensor([0, 1]), np.array([0, 1]), np.array([0, 0]), "dp", 1, 2) == Judgement(1., 0., 0.)


@pytest.mark.parametrize("change, word", [
    (dict(y=np.array([0, 1, 2])), "y must lie in 0 to 1"), (dict(a=np.array([0, 1, -1])), "a must lie"), (dict(h=torch.tensor([0, 3, 1])), "h must lie"), (dict(a=np.array([0, 1])), "same length"),
    (dict(h=torch.ones(2, 2)), "h must be"), (dict(h=torch.ones(3, 3)), "h must be"), (dict(y=np.array([0., 1., 1.])), "whole-number"), (dict(criteria="fairness"), "fairness"),
])
def test_judge_rejects(untyped, change, word):
    with pytest.raises(ValueError, match=word): judge_rule(**dict(h=torch.tensor([0, 1, 1]), y=np.array([0, 1, 1]), a=np.array([0, 1, 1]), criteria="dp") | change)


def test_interval_is_scipys_and_rejects():
    from scipy import stats
    x = np.random.default_rng(0).normal(size=7)
    mean, half = mean_interval(x, .9)
    assert (mean - half, mean + half) == pytest.approx(stats.ttest_1samp(x, 0).confidence_interval(.9))
    with pytest.raises(ValueError, match="at least two"): mean_interval(x[:1])
    with pytest.raises(ValueError, match="level"): mean_interval(x, 1.)


@pytest.mark.parametrize("g, m", [(2, 2), (3, 4)])
def test_chance_falls_with_the_root_of_n(g, m):
    joint = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(g * m), 16_000)).reshape(-1, g, m)
    h = torch.nn.functional.one_hot(torch.arange(len(joint)) % m, m).double()      # independent of x: no violation but chance
    many, few = violation_by_chance(joint, h, "dp", 40), violation_by_chance(joint[:1000], h[:1000], "dp", 40)
    assert 2.5 < few.mean() / many.mean() < 6 and (many == violation_by_chance(joint, h, "dp", 40)).all() and many.shape == (40,)
    with pytest.raises(ValueError, match="draws"): violation_by_chance(joint, h, "dp", 0)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6, unique_by=lambda p: p[0]), st.randoms())
@settings(max_examples=50, deadline=None)
def test_reading_a_frontier(points, random):
    v, acc = np.array(points).T
    shuffled = random.sample(points, len(points))
    at = float(v.min() + (v.max() - v.min()) * .3)
    assert read_frontier(v, acc, at) == read_frontier(*np.array(shuffled).T, at)
    best = [max(y for x, y in points if x <= at) for at, _ in points]                # a rule that is worse in both does not count
    assert [read_frontier(v, acc, float(x)) for x, _ in points] == pytest.approx(best)
    assert read_frontier(v, acc, v.max() + 1) == acc.max() and read_frontier(v, acc, v.min() - .01) == acc[v.argmin()]


def test_overlap_widens_as_in_nadeau_and_bengio():
    x = np.random.default_rng(1).normal(size=10)
    assert mean_interval(x, overlap=.25)[1] / mean_interval(x)[1] == pytest.approx((1 + 10 * .25)**.5)
    with pytest.raises(ValueError, match="overlap"): mean_interval(x, overlap=-.1)
