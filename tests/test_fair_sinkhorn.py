"""What chapter 4 itself exports: conversion to and from POT, the paper's conditional gradient, and the trade-off curve."""
import math

import numpy as np
import ot
import pytest
import torch

from fairbook.fair_sinkhorn import fair_sinkhorn, from_pot, generalized_conditional_gradient, penalized_sinkhorn, to_pot, tradeoff_curve
from fairbook.projection import ConvergenceWarning

F = torch.tensor([[.3, .2], [.1, .4]], dtype=torch.float64)


@pytest.fixture
def problem():
    "Cost [20, 10] and groups; the margins of F are those of the groups."
    C = torch.rand(20, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return C, torch.arange(20) // 10, (torch.arange(10) >= 4).long()


def test_pot_solves_the_problem_that_it_is_given(problem):
    r = fair_sinkhorn(*problem, F, .2)
    given = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in to_pot(r).items() if k != "warmstart"}
    assert np.abs(ot.sinkhorn(**given, stopThr=1e-13) - r.plan.numpy()).max() < 1e-10


def test_a_solution_of_pot_is_a_start(problem):
    C, s, w = problem
    _, log = ot.sinkhorn(torch.full((20,), .05, dtype=torch.float64), torch.full((10,), .1, dtype=torch.float64), C, .2, log=True, stopThr=1e-13)
    r = fair_sinkhorn(C, 0 * s, 0 * w, [[1.]], .2)
    assert fair_sinkhorn(C, 0 * s, 0 * w, [[1.]], .2, init=from_pot(log["u"], log["v"], r)).n_iter <= 2 < r.n_iter


@pytest.mark.parametrize("lam", [.1, 3., 30.])
def test_conditional_gradient_ends_at_the_plan_of_the_dual(problem, lam):
    slow, fast = generalized_conditional_gradient(*problem, F.tolist(), .2, lam), penalized_sinkhorn(*problem, F, .2, lam)
    assert slow.converged and slow.gaps[-1] <= 1e-9
    torch.testing.assert_close(slow.plan, fast.plan, atol=2e-5, rtol=0)       # a gap of 1e-9 bounds the plan by its root
    assert all(x >= y - 1e-12 for x, y in zip(slow.values, slow.values[1:]))


def test_conditional_gradient_says_when_it_stops_early(problem):
    with pytest.warns(ConvergenceWarning, match="use penalized_sinkhorn"): r = generalized_conditional_gradient(*problem, F, .2, 30., max_iter=2)
    assert not r.converged and len(r.gaps) == 2


@pytest.mark.parametrize("change, message", [
    (dict(lam=-1.), "lam must be positive and finite, got -1"), (dict(lam=math.inf), "use fair_sinkhorn"), (dict(lam=math.nan), "lam must be positive"),
    (dict(max_iter=0), "max_iter must be at least 1"), (dict(s=torch.full((20,), -1)), "s must"), (dict(F=[[.5, .5]]), "s must|w must"),
    (dict(F=[[.3, -.2], [.1, .4]]), "F must hold finite masses"), (dict(reg=0.), "reg must be positive"), (dict(reg=torch.ones(2)), "not a batch"),
    (dict(C=torch.full((20, 10), math.nan)), "C holds 200 NaN"), (dict(C=torch.zeros(20, 10).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(math.inf))), "can forbid pairs"), (dict(C=torch.zeros(2, 20, 10)), "not a batch")])
def test_conditional_gradient_refuses(problem, change, message, untyped):
    C, s, w = problem
    with pytest.raises(ValueError, match=message): generalized_conditional_gradient(**dict(dict(C=C, s=s, w=w, F=F, reg=.2, lam=1.), **change))


@pytest.mark.parametrize("penalty", ["l2", "l1", "kl"])
def test_the_curve_falls_from_plain_to_fair(problem, penalty):
    curve = tradeoff_curve(*problem, F, .2, [10., .01, 1.], penalty=penalty)
    assert curve.lam.tolist() == [.01, 1., 10.] and curve.results.converged.all()
    assert (curve.violation.diff() <= 1e-12).all() and (curve.value.diff() >= -1e-9).all()
    assert curve.plain.cost < curve.fair.cost and ((curve.fair.group_mass - F)**2).sum() < 1e-16
    _, _, _, a, b, _ = curve.results.problem
    P = curve.results.plan
    entropy = .2 * (P * (P / torch.outer(a, b)).log()).sum((-2, -1))
    torch.testing.assert_close(curve.value, curve.cost + entropy, atol=1e-8, rtol=0)


def test_a_zero_of_the_target_leaves_the_curve_finite(problem):
    curve = tradeoff_curve(*problem, [[.4, .1], [0., .5]], .2, [.1, 1.], penalty="kl")
    assert curve.value.isfinite().all() and (curve.results.group_mass[:, 1, 0] == 0).all()


def test_a_target_with_other_margins_has_no_fair_end(problem):
    curve = tradeoff_curve(*problem, [[.5, .2], [.1, .2]], .2, [1.])
    assert curve.fair is None and curve.violation > 0


@pytest.mark.parametrize("change, message", [
    (dict(C=np.zeros((20, 10))), "C must be a tensor"), (dict(C=torch.full((20, 10), math.inf)), "all pairs are forbidden"),
    (dict(C=torch.zeros(2, 20, 10)), r"tensor \[n, m\], got \[2, 20, 10\]"), (dict(lams=[]), "at least one penalty"), (dict(lams=[-1.]), "lam")])
def test_the_curve_refuses(problem, change, message, untyped):
    C, s, w = problem
    with pytest.raises(ValueError, match=message): tradeoff_curve(**dict(dict(C=C, s=s, w=w, F=F, reg=.2), **change))
