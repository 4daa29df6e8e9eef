"""Contracts, properties and oracles of `fairbook.metrics`."""
import math

import numpy as np
import pandas as pd
import pytest
import torch
from fairlearn import metrics as fl
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fairbook.metrics import (GroupMeans, GroupMetric, Interval, bootstrap_interval, confusion_rates, demographic_parity, equal_opportunity,
                              equalized_odds, group_confusion, group_means, mean_gap, worst_group_accuracy)

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@st.composite
def samples(draw, G=st.integers(2, 4), m=st.just(2), full=True, max_n=40):
    "y_true, y_pred, groups and the numbers of groups and classes; with `full`, every (group, class) cell has a member."
    G, m = draw(G), draw(m)
    cells = [(a, y) for a in range(G) for y in range(m)] if full else []
    cells += draw(st.lists(st.tuples(st.integers(0, G - 1), st.integers(0, m - 1)), min_size=0 if full else 1, max_size=max_n))
    a, y = torch.tensor(cells).T
    yhat = torch.tensor(draw(st.lists(st.integers(0, m - 1), min_size=len(a), max_size=len(a))))
    return y, yhat, a, G, m


# ---------------------------------------------------------------- oracle: fairlearn

ORACLES = [
    (lambda y, p, a: demographic_parity(p, a), fl.demographic_parity_difference),
    (equal_opportunity, fl.equal_opportunity_difference),
    (equalized_odds, fl.equalized_odds_difference),
    (worst_group_accuracy, lambda y, p, *, sensitive_features: fl.MetricFrame(
        metrics=lambda t, q: np.mean(t == q), y_true=y, y_pred=p, sensitive_features=sensitive_features).group_min()),
]


@pytest.mark.parametrize("ours, theirs", ORACLES, ids=["demographic_parity", "equal_opportunity", "equalized_odds", "worst_group_accuracy"])
@given(data=samples())
@settings(max_examples=60)
def test_equals_fairlearn_on_binary_cases(ours, theirs, data):
    y, yhat, a, *_ = data
    assert float(ours(y, yhat, a)) == pytest.approx(theirs(y, yhat, sensitive_features=a), abs=1e-12)


@given(samples(full=False))
def test_group_means_equal_pandas(data):
    y, yhat, a, G, _ = data
    values = torch.linspace(-1, 2, len(a), dtype=torch.float64)
    means = pd.Series(values).groupby(a.numpy()).mean().reindex(range(G))
    result = group_means(values, a, n_groups=G)
    assert torch.allclose(result.mean, torch.tensor(means.to_numpy()), atol=1e-12, equal_nan=True)
    assert result.count.tolist() == [int((a == g).sum()) for g in range(G)]


# ---------------------------------------------------------------- properties

METRICS = [lambda y, p, a, **k: demographic_parity(p, a, **k), equalized_odds,
           lambda y, p, a, **k: equal_opportunity(y, p, a, positive=None, **k)]
IDS = ["demographic_parity", "equalized_odds", "equal_opportunity"]


@pytest.mark.parametrize("metric", METRICS, ids=IDS)
@given(data=samples(m=st.integers(2, 4), full=False))
def test_population_le_pairwise_le_twice_population(metric, data):
    y, yhat, a, G, m = data
    pair, pop = (metric(y, yhat, a, n_groups=G, n_classes=m, convention=c) for c in ("pairwise", "population"))
    assert pair.value.isnan() == pop.value.isnan() and pair.n_not_estimable == pop.n_not_estimable
    assume(not pair.value.isnan())
    assert pop.value <= pair.value + 1e-12 and pair.value <= 2 * pop.value + 1e-12
    assert 0 <= pair.value <= 1


@given(samples(G=st.just(2), full=True))
def test_two_groups_population_is_the_larger_share_of_pairwise(data):
    _, yhat, a, *_ = data
    share = a.double().mean()
    pair, pop = (demographic_parity(yhat, a, convention=c).value for c in ("pairwise", "population"))
    assert pop.item() == pytest.approx((pair * max(share, 1 - share)).item(), abs=1e-12)


@pytest.mark.parametrize("metric", METRICS + [worst_group_accuracy], ids=IDS + ["worst"])
@given(data=samples(G=st.integers(1, 3), m=st.integers(2, 3), full=False), absent=st.integers(0, 3))
def test_an_absent_group_does_not_renumber_the_others(metric, data, absent):
    y, yhat, a, G, m = data
    absent = min(absent, G)
    before = metric(y, yhat, a, n_groups=G, n_classes=m)
    after = metric(y, yhat, a + (a >= absent), n_groups=G + 1, n_classes=m)   # a new empty group at position `absent`
    keep = [g for g in range(G + 1) if g != absent]
    torch.testing.assert_close(after.by_group[keep], before.by_group, equal_nan=True)
    torch.testing.assert_close(after.value, before.value, equal_nan=True)
    assert after.by_group[absent].isnan().all() and after.count[absent].sum() == 0
    assert after.n_not_estimable == before.n_not_estimable + after.count[absent].numel()


@pytest.mark.parametrize("metric", METRICS, ids=IDS)
@given(data=samples(G=st.just(3), m=st.just(3)), order=st.permutations(range(3)))
def test_renaming_the_groups_changes_nothing(metric, data, order):
    y, yhat, a, G, m = data
    new = torch.tensor(order)[a]
    for convention in ("pairwise", "population"):
        x, z = (metric(y, yhat, g, convention=convention, n_classes=m) for g in (a, new))
        torch.testing.assert_close(x.value, z.value)
        torch.testing.assert_close(x.by_group, z.by_group[list(order)])


@given(samples(m=st.integers(2, 4), full=False))
def test_confusion_counts_by_loop(data):
    y, yhat, a, G, m = data
    confusion = group_confusion(y, yhat, a, n_classes=m, n_groups=G)
    loop = torch.zeros(G, m, m, dtype=torch.int64)
    for i in range(len(y)): loop[a[i], y[i], yhat[i]] += 1
    assert torch.equal(confusion, loop)
    rates, rows = confusion_rates(confusion), confusion.sum(-1)
    assert torch.equal(rates.isnan().any(-1), rows == 0)
    assert torch.allclose(rates.sum(-1)[rows > 0], torch.ones(1, dtype=torch.float64))


@given(samples(full=False), st.floats(-3, 3), st.floats(.1, 3))
def test_mean_gap_ignores_shifts_and_scales(data, shift, scale):
    y, yhat, a, G, _ = data
    values = (y + 2 * yhat).double()
    gap, moved = mean_gap(values, a, n_groups=G), mean_gap(scale * values + shift, a, n_groups=G)
    torch.testing.assert_close(moved.value, scale * gap.value, equal_nan=True, atol=1e-12, rtol=1e-12)


@given(samples())
def test_mean_gap_of_decisions_is_demographic_parity(data):
    _, yhat, a, *_ = data
    assert float(mean_gap(yhat.double(), a)) == pytest.approx(float(demographic_parity(yhat, a)), abs=1e-12)


# ---------------------------------------------------------------- nothing to compare is NaN, never 0

def test_one_group_is_not_comparable():
    y, p, a = [0, 1, 1], [0, 1, 0], [0, 0, 0]
    for r in (demographic_parity(p, a, n_groups=2), equalized_odds(y, p, a, n_groups=2), equal_opportunity(y, p, a, n_groups=2),
              demographic_parity(p, a, convention="population"), mean_gap(torch.rand(3), a, n_groups=2)):
        assert math.isnan(float(r))
    assert float(worst_group_accuracy(y, p, a, n_groups=2)) == pytest.approx(2 / 3)


def test_no_samples_at_all():
    none = torch.zeros(0, dtype=torch.int64)
    for r in (demographic_parity(none, none, n_groups=3, n_classes=2), equalized_odds(none, none, none, n_groups=3, n_classes=2),
              equal_opportunity(none, none, none, n_groups=3, n_classes=2), mean_gap(torch.zeros(0), none, n_groups=3)):
        assert math.isnan(float(r)) and r.n_not_estimable == r.count.numel()
    assert math.isnan(float(worst_group_accuracy(none, none, none, n_groups=3, n_classes=2)))


def test_no_positive_label_leaves_equal_opportunity_unknown():
    r = equal_opportunity([0, 0, 0], [0, 1, 0], [0, 1, 1])
    assert math.isnan(float(r)) and r.n_not_estimable == 2
    assert math.isnan(float(equal_opportunity([0, 0], [0, 0], [0, 1])))


def test_one_empty_cell_is_left_out_and_counted():
    y, p, a = [0, 0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 2]
    r = equalized_odds(y, p, a)
    assert r.n_not_estimable == 2 and r.count.tolist() == [[2, 2], [2, 0], [0, 1]]
    assert r.by_group[1, 1].isnan().all() and r.by_group[2, 0].isnan().all()
    assert float(r) == 1.0   # class 1: groups 0 and 2 differ by 1; class 0: groups 0 and 1 by 1/2


def test_zero_weights_are_not_estimable():
    r = mean_gap(torch.tensor([1., 2., 3.]), [0, 1, 1], weights=torch.tensor([1., 0., 0.]))
    assert math.isnan(float(r)) and r.n_not_estimable == 1 and r.count.tolist() == [1, 2]


# ---------------------------------------------------------------- contract: dtypes, shapes, devices, gradients

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_follow_the_first_argument(dtype, device):
    values = torch.rand(2, 5, 12, dtype=dtype, device=device)
    groups = torch.arange(12) % 3
    r = mean_gap(values, groups, n_groups=4, weights=torch.rand(12, dtype=dtype))
    assert r.value.dtype == dtype and r.value.shape == (2, 5) and r.by_group.shape == (2, 5, 4) and r.n_not_estimable == 1
    assert r.value.device == values.device and r.count.device == values.device
    one = mean_gap(values[1, 2], groups, n_groups=4, weights=torch.ones(12, dtype=dtype))
    assert one.value.shape == () and r.by_group.isnan().sum() == 10
    y = torch.ones(12, dtype=torch.int32, device=device)
    assert group_confusion(y, np.ones(12, dtype=np.int8), groups).device == y.device


def test_weights_are_repetitions():
    values, groups, times = torch.rand(6, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 2, 2]), torch.tensor([1, 2, 3, 1, 2, 5])
    weighted = group_means(values, groups, weights=times.double()).mean
    torch.testing.assert_close(weighted, group_means(values.repeat_interleave(times), groups.repeat_interleave(times)).mean)


def test_float32_means_are_summed_in_float64():
    n = 1_000_000
    exact = torch.full((n,), .1).double().mean()
    assert abs(group_means(torch.full((n,), .1), torch.zeros(n, dtype=torch.int64)).mean[0] - exact) < 1e-8


def test_gradients():
    groups = torch.tensor([0, 0, 2, 2, 2, 3])
    values = torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.tensor([1., 2., 0., 1., 3., 1.], dtype=torch.float64, requires_grad=True)
    means = lambda v, w: group_means(v, groups, n_groups=5, weights=w).mean[..., [0, 2, 3]]
    assert torch.autograd.gradcheck(means, (values, weights.detach() + .5))
    assert torch.autograd.gradcheck(lambda v: mean_gap(v, groups, n_groups=5).value, (values,))
    mean_gap(values, groups, n_groups=5, weights=weights).value.sum().backward()
    assert values.grad.isfinite().all() and weights.grad.isfinite().all()


@pytest.mark.parametrize("kind", [list, np.array, pd.Series, lambda x: torch.tensor(x, dtype=torch.int32), lambda x: np.array(x, dtype=np.uint8)])
def test_label_vectors_of_every_kind(kind):
    y, p, a = ([0, 0, 1, 1, 1], [0, 1, 1, 0, 1], [0, 1, 0, 1, 1])
    assert float(equalized_odds(kind(y), kind(p), kind(a))) == float(equalized_odds(torch.tensor(y), torch.tensor(p), torch.tensor(a)))
    assert float(demographic_parity(np.array(p, dtype=bool), a)) == float(demographic_parity(p, a))


def test_results_are_frozen_and_say_what_they_are():
    r = demographic_parity([0, 1], [0, 1])
    assert isinstance(r, GroupMetric) and repr(r) == "GroupMetric(value=1.0, n_groups=2, n_not_estimable=0)"
    with pytest.raises(AttributeError): r.value = 0
    with pytest.raises(AttributeError): group_means(torch.rand(2), [0, 1]).mean = 0
    assert isinstance(group_means(torch.rand(2), [0, 1]), GroupMeans)


# ---------------------------------------------------------------- bootstrap

def test_bootstrap_covers_a_known_mean():
    hits = 0
    for seed in range(60):
        x = torch.randn(80, generator=torch.Generator().manual_seed(seed))
        interval = bootstrap_interval(lambda i: x[i].mean(), 80, n_boot=200, seed=seed, level=.9)
        hits += interval.low <= 0 <= interval.high
    assert hits >= 44   # 90 % of 60 is 54; fewer than 44 has probability below 1e-4


def test_bootstrap_is_seeded_and_counts_what_it_cannot_estimate():
    yhat, a = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 0, 1])
    stat = lambda i: demographic_parity(yhat[i], a[i], n_groups=2)
    x = bootstrap_interval(stat, 4, n_boot=400)
    assert x == bootstrap_interval(stat, 4, n_boot=400) != bootstrap_interval(stat, 4, n_boot=400, seed=1)
    assert 60 < x.n_not_estimable < 200   # the member of group 1 is absent from a draw with probability (3/4)^4 = .32
    never = bootstrap_interval(lambda i: float("nan"), 4, n_boot=5)
    assert isinstance(never, Interval) and math.isnan(never.low) and math.isnan(never.high) and never.n_not_estimable == 5


@pytest.mark.parametrize("none", [[], np.zeros(0, int), torch.zeros(0).long()], ids=["list", "array", "tensor"])
def test_nobody_has_two_classes_and_no_gap(none):
    for metric in (demographic_parity(none, none, n_groups=3), equalized_odds(none, none, none, n_groups=3)):
        assert metric.value.isnan() and metric.by_group.shape[-1] == 2 and metric.by_group.isnan().all()


# ---------------------------------------------------------------- bad input

v, g = torch.rand(4), [0, 1, 0, 1]
BAD = {
    "NaN value": (lambda: group_means(torch.tensor([1., torch.nan]), [0, 1]), "`values` must be finite, got 1"),
    "infinite value": (lambda: mean_gap(torch.tensor([1., torch.inf]), [0, 1]), "`values` must be finite"),
    "integer values": (lambda: group_means(torch.arange(4), g), "`values` must be floats"),
    "scalar values": (lambda: group_means(torch.tensor(1.), g), "`values` must be floats of shape"),
    "short groups": (lambda: group_means(v, [0, 1]), r"`groups` must have shape \[4\]"),
    "no groups for no values": (lambda: group_means(torch.zeros(0), torch.zeros(0).long()), "`groups` needs at least one code"),
    "float groups": (lambda: group_means(v, torch.rand(4)), "`groups` must hold integer codes.*float32"),
    "names": (lambda: group_means(v, ["a", "b", "a", "b"]), "`groups` must hold integer codes.*pandas.Categorical"),
    "missing group": (lambda: group_means(v, [0, 1, -1, 0]), r"`groups` must lie in 0 .. 1, got -1"),
    "group out of range": (lambda: mean_gap(v, [0, 1, 2, 0], n_groups=2), "`groups` must lie in 0 .. 1, got 0 .. 2"),
    "zero groups": (lambda: mean_gap(v, g, n_groups=0), "`groups` needs at least one code"),
    "negative weight": (lambda: mean_gap(v, g, weights=torch.tensor([1., -1., 1., 1.])), "`weights` must be finite and >= 0"),
    "NaN weight": (lambda: mean_gap(v, g, weights=torch.full((4,), torch.nan)), "`weights` must be finite"),
    "short weights": (lambda: mean_gap(v, g, weights=torch.ones(3)), r"`weights` must have shape \[4\]"),
    "array of values": (lambda: mean_gap(np.array([.1, .2]), [0, 1]), r"`values` must be a torch tensor, got ndarray.*torch.as_tensor"),
    "list of values": (lambda: group_means([.1, .2], [0, 1]), "`values` must be a torch tensor, got list"),
    "list of weights": (lambda: group_means(v[:2], [0, 1], weights=[1, 2]), "`weights` must be a torch tensor, got list.*torch.as_tensor"),
    "nobody, no number of groups": (lambda: demographic_parity([], []), "`groups` needs at least one code.*n_groups"),
    "matrix of labels": (lambda: group_confusion(torch.zeros(2, 2).long(), g, g), r"`y_true` must have shape \[n\]"),
    "short predictions": (lambda: group_confusion([0, 1], [0], [0, 1]), r"`y_pred` must have shape \[2\]"),
    "one prediction for none": (lambda: group_confusion(np.zeros(0, int), [0], [0], n_classes=2), r"`y_pred` must have shape \[0\]"),
    "scores for labels": (lambda: equalized_odds(np.array([.2, .8]), [0, 1], [0, 1]), "`y_true` must hold integer codes.*threshold"),
    "class out of range": (lambda: demographic_parity([0, 3], [0, 1], n_classes=2), "`y_pred` must lie in 0 .. 1"),
    "unknown convention": (lambda: demographic_parity([0, 1], [0, 1], convention="max"), "`convention` must be"),
    "unknown class": (lambda: equal_opportunity([0, 1], [0, 1], [0, 1], positive=2), "`positive` must be None or a class in 0 .. 1, got 2"),
    "level": (lambda: bootstrap_interval(lambda i: 0., 4, level=1.), "level=1.0"),
    "n_boot": (lambda: bootstrap_interval(lambda i: 0., 4, n_boot=0), "n_boot=0"),
    "n": (lambda: bootstrap_interval(lambda i: 0., 0), "n=0"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD)
def test_bad_input(untyped, call, message):
    with pytest.raises(ValueError, match=message): call()
