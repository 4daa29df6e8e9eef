"""Group targets: existence with its witness, the nearest target, quotas and rules, forbidden pairs; errors that say what to do."""
import itertools
import math
import pickle
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import linprog, nnls

import cvxpy as cp
from fairbook import group_targets
from fairbook.group_targets import (InfeasibleTarget, check_quotas, check_support, check_target, frechet_bounds, independence_target, nearest_target,
                                    quota_bounds, quota_target)

TIGHT = dict(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
f64 = lambda x: torch.tensor(x, dtype=torch.float64)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))
seeds = st.integers(0, 2**32 - 1)


def draw(seed, K_s, K_w, empty=False):
    "A positive table, and margins that are not its own."
    rng = np.random.default_rng(seed)
    F, p, q = rng.gamma(.7, size=(K_s, K_w)) + 1e-3, rng.dirichlet(np.ones(K_s)), rng.dirichlet(np.ones(K_w))
    if empty and K_s > 1: p[0] = 0; p /= p.sum()
    return torch.tensor(F), torch.tensor(p), torch.tensor(q)


def margin_rows(K_s, K_w): return np.vstack([np.kron(np.eye(K_s), np.ones(K_w)), np.kron(np.ones(K_s), np.eye(K_w))])


# --- targets

@given(seeds, sizes)
def test_feasible_iff_margins_by_the_witness(seed, size):
    F, p, q = draw(seed, *size)
    F = check_target(nearest_target(F, p, q), p, q)
    rng = np.random.default_rng(seed)
    s, w = (torch.tensor(np.concatenate([np.arange(K), rng.integers(K, size=6)])) for K in size)
    a, b = (torch.tensor(rng.dirichlet(np.ones(len(g)))) for g in (s, w))
    S, W = torch.eye(size[0]).double()[s], torch.eye(size[1]).double()[w]
    a, b = a * (p / (S.T @ a))[s], b * (q / (W.T @ b))[w]
    plan = a[:, None] * b * (F / torch.outer(p, q))[s][:, w]
    assert (plan >= 0).all() and (plan.sum(1) - a).abs().max() < 1e-14 and (plan.sum(0) - b).abs().max() < 1e-14
    assert (S.T @ plan @ W - F).abs().max() < 1e-14


@given(seeds, sizes, st.floats(1e-6, .5))
def test_every_other_table_is_refused_with_its_gaps(seed, size, shift):
    F, p, q = draw(seed, *size)
    F = nearest_target(F, p, q)
    F[0, 0] += shift
    with pytest.raises(InfeasibleTarget, match="nearest_target.*penalized_sinkhorn") as refusal: check_target(F, p, q)
    assert abs(refusal.value.row_gap - shift) < 1e-12 and abs(refusal.value.column_gap - shift) < 1e-12
    assert (check_target(refusal.value.nearest, p, q) - nearest_target(F, p, q)).abs().max() < 1e-14


@settings(max_examples=30)
@given(seeds, sizes)
def test_frechet_bounds_are_sharp(seed, size):
    _, p, q = draw(seed, *size)
    low, high = frechet_bounds(p, q)
    M, rhs = margin_rows(*size), torch.cat([p, q]).numpy()
    for k in range(M.shape[1]):
        e = np.eye(M.shape[1])[k]
        assert abs(linprog(e, A_eq=M, b_eq=rhs).fun - low.flatten()[k]) < 1e-8 and abs(-linprog(-e, A_eq=M, b_eq=rhs).fun - high.flatten()[k]) < 1e-8


@given(seeds, sizes)
def test_independence_is_a_target_and_scales(seed, size):
    _, p, q = draw(seed, *size)
    G = check_target(independence_target(3 * p, 3 * q), 3 * p, 3 * q)
    assert (G - 3 * torch.outer(p, q)).abs().max() < 1e-14


# --- nearest

@given(seeds, sizes, st.booleans())
def test_nearest_has_the_form_and_the_margins(seed, size, empty):
    F, p, q = draw(seed, *size, empty)
    G = nearest_target(F, p, q)
    assert max((G.sum(1) - p).abs().max(), (G.sum(0) - q).abs().max()) < 1e-15 * 4
    r = (G / F)[p > 0].log()
    assert (r - r.mean(0) - r.mean(1, keepdim=True) + r.mean()).abs().max() < 1e-10
    assert (nearest_target(G, p, q) - G).abs().max() < 1e-14                               # idempotent


@pytest.mark.parametrize("seed", range(8))
def test_nearest_agrees_with_clarabel(seed):
    F, p, q = draw(seed, 2 + seed % 4, 2 + seed // 2 % 4)
    V = cp.Variable(F.shape)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.kl_div(V, F.numpy()))), [cp.sum(V, 1) == p.numpy(), cp.sum(V, 0) == q.numpy()])
    problem.solve(**TIGHT)
    G = nearest_target(F, p, q).numpy()
    assert np.abs(G - V.value).max() < 1e-6
    assert cp.sum(cp.kl_div(G, F.numpy())).value <= problem.value + 1e-9


@given(seeds, st.tuples(st.integers(2, 4), st.integers(2, 4)))
def test_nearest_with_zeros_exists_iff_the_lp_says_so(seed, size):
    rng = np.random.default_rng(seed)
    F = rng.random(size) * (rng.random(size) < .6)
    p, q = (rng.multinomial(6, np.ones(K) / K) / 6 for K in size)
    M, on = margin_rows(*size), F.ravel() > 0
    exists = on.any() and linprog(np.zeros(on.sum()), A_eq=M[:, on], b_eq=np.concatenate([p, q])).status == 0
    if exists:
        G = nearest_target(F, p, q).numpy()
        assert max(np.abs(G.sum(1) - p).max(), np.abs(G.sum(0) - q).max()) < 1e-12 and (G[F == 0] == 0).all()
        on &= G.ravel() > 0                                                                 # where G vanishes every target does, so the optimum over the rest decides:
        slope = np.log(G.ravel()[on] / F.ravel()[on])
        assert slope @ G.ravel()[on] <= linprog(slope, A_eq=M[:, on], b_eq=np.concatenate([p, q])).fun + 1e-8       # no feasible direction goes down
        for k in np.flatnonzero((F.ravel() > 0) & (G.ravel() == 0)):
            assert linprog(-np.eye(F.size)[k], A_eq=M, b_eq=np.concatenate([p, q]), bounds=[(0, None if f else 0) for f in F.ravel() > 0]).fun > -1e-8
    else:
        with pytest.raises(InfeasibleTarget, match="zeros of F") as refusal: nearest_target(F, p, q)
        e = refusal.value
        assert not (F[e.rows] > 0)[:, [c for c in range(size[1]) if c not in e.columns]][p[e.rows] >= 0].any()
        assert abs(p[e.rows].sum() - q[e.columns].sum() - e.missing) < 1e-9 and e.missing > 1e-9


def test_nearest_on_nearly_decoupled_tables():
    for eps in (1e-4, 1e-8, 1e-12):
        G = nearest_target([[1., eps], [eps, 1.]], [.5, .5], [.4999, .5001])
        assert (G.sum(1) - .5).abs().max() < 1e-14 and (G.sum(0) - f64([.4999, .5001])).abs().max() < 1e-14


@pytest.mark.parametrize("small", [1e-6, 1e-9, 3e-10, 1e-11, 1e-13, 1e-20])
def test_nearest_with_zeros_and_a_tiny_group(small):
    "Patterns with a target by construction; the first group has mass `small`, and its row has to add up to it."
    for seed in range(15):
        rng = np.random.default_rng(seed)
        size = rng.integers(2, 6, 2)
        G = rng.gamma(.7, size=size) * (rng.random(size) < .6)
        G[0, 0] += 1e-3
        G[0] *= small / G[0].sum()
        G[-1, -1] += 1.
        G = torch.tensor(G / G.sum())
        near = nearest_target((G > 0) * torch.tensor(rng.gamma(.7, size=size)), G.sum(1), G.sum(0))
        assert max((near.sum(1) - G.sum(1)).abs().max(), (near.sum(0) - G.sum(0)).abs().max()) < 1e-14
        assert (near[G == 0] == 0).all() and abs(near[0].sum() / G[0].sum() - 1) < max(1e-9, 1e-15 / small)


def test_nearest_from_huge_and_tiny_numbers():
    for size in (1e-300, 1e308): assert (nearest_target([[size, size], [size, size]], [.5, .5], [.4, .6]) - f64([[.2, .3], [.2, .3]])).abs().max() < 1e-15


# --- quotas

def random_box(seed, K_s, K_w):
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(K_s)), rng.dirichlet(np.ones(K_w))
    low, high = np.outer(p, q) * 1.2 * rng.random((K_s, K_w)), np.outer(p, q) * (.8 + rng.random((K_s, K_w)))
    return torch.tensor(low), torch.tensor(np.maximum(low, high)), torch.tensor(p), torch.tensor(q)


def least_widening(lower, upper, p, q):
    V, e, f = (cp.Variable(lower.shape, nonneg=True) for _ in range(3))
    return cp.Problem(cp.Minimize(cp.sum(e + f)), [V >= lower.numpy() - e, V <= upper.numpy() + f, cp.sum(V, 1) == p.numpy(), cp.sum(V, 0) == q.numpy()]).solve("HIGHS")


def test_boxes_against_cvxpy_and_hoffman():
    answers = []
    for seed in range(40):
        lower, upper, p, q = box = random_box(seed, 2 + seed % 3, 2 + seed % 2)
        widening = least_widening(*box)
        try: check_quotas(*box); answers.append(True); assert widening < 1e-8
        except InfeasibleTarget as e:
            answers.append(False)
            assert abs(e.missing - widening) < 1e-7
            check_quotas(*e.nearest, p, q)                                                  # the offered box holds a target
            S, T = (torch.isin(torch.arange(len(x)), torch.tensor(g, dtype=torch.long)) for x, g in ((p, e.rows), (q, e.columns)))
            assert p[S].sum() - upper[S][:, ~T].sum() + lower[~S][:, T].sum() - q[T].sum() > 1e-9   # the named groups do contradict
    assert 5 < sum(answers) < 35


def kkt(G, R, M, B, c):
    "Distance of log(G/R) from span(M) + cone of active B rows: zero iff G is the KL projection."
    active = B.flatten(1).numpy()[((B * G).sum((1, 2)) - c).numpy() < 1e-9]
    x = np.vstack([M, -M, active]).T
    return nnls(x, (G / R).log().flatten().numpy())[1]


@pytest.mark.parametrize("seed", range(12))
def test_four_fifths_is_met_and_optimal(seed):
    R, p, q = draw(seed, 2 + seed % 4, 3)
    favoured = [0] if seed % 2 else [0, 2]
    G = quota_target(p, q, "four-fifths", favoured=favoured, reference=R)
    rates = check_target(G, p, q)[:, favoured].sum(1) / p
    assert rates.min() >= .8 * rates.max() - 1e-9
    V = cp.Variable(R.shape)
    rate = lambda s: cp.sum(V[s, favoured]) / float(p[s])
    rule = [rate(s) >= .8 * rate(t) for s, t in itertools.permutations(range(len(p)), 2)]
    problem = cp.Problem(cp.Minimize(cp.sum(cp.kl_div(V, R.numpy()))), rule + [cp.sum(V, 1) == p.numpy(), cp.sum(V, 0) == q.numpy()])
    problem.solve(**TIGHT)
    assert cp.sum(cp.kl_div(G.numpy(), R.numpy())).value <= problem.value + 1e-8
    assert np.abs(G.numpy() - V.value).max() < 1e-5
    B = torch.zeros(len(rule), *R.shape, dtype=torch.float64)
    for k, (s, t) in enumerate(itertools.permutations(range(len(p)), 2)): B[k, s, favoured], B[k, t, favoured] = 1 / p[s], -.8 / p[t]
    assert kkt(G, R, margin_rows(*R.shape), B, torch.zeros(len(rule))) < 1e-7


def test_four_fifths_with_tiny_groups_and_wild_references():
    "Groups down to a billionth of the mass: the answer is a target that meets the rule, or nothing is returned."
    rng, smallest = np.random.default_rng(0), 1.
    for _ in range(60):
        Ks, Kw = rng.integers(2, 8, 2)
        p, q = rng.dirichlet(np.full(Ks, .3)), rng.dirichlet(np.full(Kw, .3))
        G = quota_target(p, q, "four-fifths", favoured=[0], reference=rng.random((Ks, Kw)) ** rng.choice([1, 8, 30])).numpy()
        rates, smallest = G[:, 0] / p, min(smallest, p.min())
        assert max(np.abs(G.sum(1) - p).max(), np.abs(G.sum(0) - q).max()) < 1e-13 and rates.min() >= (.8 - 1e-6) * rates.max()
    assert smallest < 1e-8


def test_a_table_that_is_no_target_is_not_returned(monkeypatch):
    monkeypatch.setattr(group_targets, "_maximise", lambda R, M, r, margins: (R, .1))
    with pytest.raises(RuntimeError, match="still violates a condition by 1.0e-01"): quota_target([.5, .5], [.4, .6], "four-fifths", favoured=0)
    monkeypatch.setattr(group_targets, "_maximise", lambda R, M, r, margins: (R, math.nan))
    with pytest.raises(RuntimeError, match="no target was found"): nearest_target([[1., 2.], [1., 1.]], [.5, .5], [.4, .6])


@pytest.mark.parametrize("rate", [None, .3, .9])
def test_an_empty_group_changes_no_band(rate):
    for three in ([.4, .6, 0.], [.4, 0., .6], [0., .4, .6]):
        keep = torch.tensor(three) > 0
        if rate == .9:
            with pytest.raises(ValueError, match="needs a rate from"): quota_bounds(three, [.3, .7], "four-fifths", favoured=0, rate=rate)
        else:
            for three_, two in zip(quota_bounds(three, [.3, .7], "four-fifths", favoured=0, rate=rate), quota_bounds([.4, .6], [.3, .7], "four-fifths", favoured=0, rate=rate)):
                assert torch.equal(three_[keep], two)


@pytest.mark.parametrize("groups", [0, np.int64(0), [0], (0,), np.array([0]), torch.tensor([0]), torch.tensor(0), [np.int32(0)], range(1)], ids=repr)
def test_group_numbers_of_any_kind(groups):
    assert torch.equal(quota_bounds([.5, .5], [.4, .6], "share", favoured=groups)[0], quota_bounds([.5, .5], [.4, .6], "share", favoured=0)[0])


@pytest.mark.parametrize("groups", [True, [True], 0., [0.], [], [[0]], [0, 0], 2, -1, "a", [[0], [0, 1]], torch.tensor(True)], ids=repr)
def test_what_is_no_group_number(groups, untyped):
    with pytest.raises(ValueError, match="favoured must be one group or distinct groups in 0..1"): quota_bounds([.5, .5], [.4, .6], "share", favoured=groups)


@pytest.mark.parametrize("seed", range(12))
def test_share_is_met_and_optimal(seed):
    R, _, _ = draw(seed, 2, 4)
    p, q, favoured = f64([.45, .55]), R.sum(0) / R.sum(), [0, 3]
    G = quota_target(p, q, "share", favoured=favoured, reference=R, share=.4)
    assert (check_target(G, p, q)[:, favoured] >= .4 * q[favoured] - 1e-12).all()
    low, high = quota_bounds(p, q, "share", favoured=favoured)
    assert (G >= low - 1e-12).all() and (G <= high + 1e-12).all()
    B = torch.stack([torch.eye(8, dtype=torch.float64)[4 * s + w].view(2, 4) for s in (0, 1) for w in favoured])
    assert kkt(G, R, margin_rows(2, 4), B, .4 * q[favoured].repeat(2)) < 1e-7


@given(seeds, st.floats(.2, .99))
def test_a_met_rule_changes_nothing(seed, ratio):
    _, p, q = draw(seed, 3, 3)
    near = independence_target(p, q)
    assert (quota_target(p, q, "four-fifths", favoured=1, reference=near, ratio=ratio) - near).abs().max() < 1e-14


@settings(max_examples=30)
@given(seeds, st.integers(2, 4), st.floats(.3, 1.))
def test_every_target_in_the_four_fifths_box_meets_the_rule(seed, K_s, ratio):
    rng = np.random.default_rng(seed)
    _, p, q = draw(seed, K_s, 3)
    p = (p + .1) / (1 + .1 * K_s)
    low, high = quota_bounds(p, q, "four-fifths", favoured=1, ratio=ratio)
    for _ in range(5):
        c = rng.normal(size=3 * K_s)
        out = linprog(c, A_eq=margin_rows(K_s, 3), b_eq=np.concatenate([p, q]), bounds=np.stack([low.flatten(), high.flatten()], 1), options=dict(primal_feasibility_tolerance=1e-10))
        r = out.x.reshape(K_s, 3)[:, 1] / p.numpy()
        assert r.min() >= ratio * r.max() - 1e-7


@settings(max_examples=30)
@given(seeds, st.floats(.3, .95))
def test_for_two_groups_the_box_is_the_rule(seed, ratio):
    _, p, q = draw(seed, 2, 3)
    V, rows = cp.Variable((2, 3), nonneg=True), lambda V: (V[0, 0] / float(p[0]), V[1, 0] / float(p[1]))
    r, t = rows(V)
    conditions = [r >= ratio * t, t >= ratio * r, cp.sum(V, 1) == p.numpy(), cp.sum(V, 0) == q.numpy()]
    low, high = quota_bounds(p, q, "four-fifths", favoured=0, ratio=ratio)
    fr_low, fr_high = frechet_bounds(p, q)
    least, most = cp.Problem(cp.Minimize(V[0, 0]), conditions).solve("HIGHS"), cp.Problem(cp.Maximize(V[0, 0]), conditions).solve("HIGHS")
    assert abs(least - max(low[0, 0], fr_low[0, 0], q[0] - min(high[1, 0], fr_high[1, 0]))) < 1e-7
    assert abs(most - min(high[0, 0], fr_high[0, 0], q[0] - max(low[1, 0], fr_low[1, 0]))) < 1e-7


# --- forbidden pairs

def brute(ok, s, w, a, b, F):
    I, J = np.nonzero(ok)
    rhs, k = np.concatenate([a, b, np.ravel(F)]), s[I] * F.shape[1] + w[J]
    if not len(I): return False
    A = np.zeros((len(rhs), len(I)))
    for at in (I, len(a) + J, len(a) + len(b) + k): A[at, np.arange(len(I))] = 1
    return linprog(np.zeros(len(I)), A_eq=A, b_eq=rhs).status == 0


def verdict(*args, **kw):
    try: return check_support(*args, **kw)
    except InfeasibleTarget as e: assert e.missing > 0; return False


@pytest.mark.parametrize("even", [True, False])
def test_support_agrees_with_brute_force(even):
    answers = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        n, m, Ks, Kw = (int(k) for k in rng.integers([4, 4, 1, 1], [10, 10, 4, 4]))
        s, w = np.arange(n) % Ks, np.arange(m) % Kw
        a, b = (np.full(k, 1 / k) if even else rng.dirichlet(np.full(k, 5.)) for k in (n, m))
        ok = rng.random((n, m)) < rng.choice([.4, .6, .8])
        p, q = np.bincount(s, a), np.bincount(w, b)
        F = independence_target(p, q) if seed % 2 else nearest_target(rng.random((Ks, Kw)) + .1, p, q)
        answers.append(verdict(ok, s, w, a, b, F))
        assert answers[-1] == brute(ok, s, w, a, b, F.numpy()), seed
        assert verdict(ok, s, w, a, b) == brute(ok, 0 * s, 0 * w, a, b, np.ones((1, 1))), seed
    assert 20 < sum(answers) < 100


def test_support_where_only_the_program_sees_the_contradiction():
    "Margins and every block alone can be carried, all together not: a search for such patterns, then the verdict."
    rng, s, u, seen = np.random.default_rng(0), np.arange(6) % 2, np.full(6, 1 / 6), 0
    for _ in range(400):
        ok, F = rng.random((6, 6)) < .45, np.zeros((2, 2))
        ok[np.arange(6), rng.permutation(6)] = True
        np.add.at(F, (s, s[rng.permutation(6)]), 1 / 6)
        if not brute(ok, s, s, u, u, F):
            with pytest.raises(InfeasibleTarget) as refusal: check_support(ok, s, s, F=F)
            seen += "not all together" in str(refusal.value)
            if seen > 1: break
    assert seen > 0


@pytest.mark.parametrize("density, feasible", [(.5, True), (.02, True), (.004, False)])
def test_support_of_a_million_pairs(density, feasible):
    rng = np.random.default_rng(0)
    ok, s, w = rng.random((1000, 1000)) < density, rng.integers(3, size=1000), rng.integers(2, size=1000)
    F = nearest_target(rng.random((3, 2)) + .3, np.bincount(s) / 1000, np.bincount(w) / 1000)
    assert verdict(ok, s, w, F=F) is feasible


def test_support_by_category_is_merged_and_large():
    "Forty thousand by two hundred, a pattern of five by four categories: eight million pairs, twenty after merging."
    rng = np.random.default_rng(0)
    kind, place = rng.integers(5, size=40_000), rng.integers(4, size=200)
    table = np.ones((5, 4), bool)
    table[0, 1:] = False
    ok, s, w = table[kind][:, place], kind % 2, place % 2
    G = np.ones((5, 4)) * np.bincount(kind)[:, None] * np.bincount(place)
    share = np.bincount(kind)[0] / 40_000
    assert (verdict(ok, s, w) is True) == (share <= np.bincount(place)[0] / 200)
    assert check_support(table[kind][:, place], s, w, max_pairs=20) and not check_support(rng.random((100, 100)) < .9, s[:100], w[:100], max_pairs=100)


@pytest.mark.parametrize("n, m", [(300, 300), (300, 150)])
def test_a_staircase_shrinks_to_its_only_plan(n, m):
    "Tens of thousands of pairs, and one plan: the monotone one. Its group masses are possible, and no others."
    rng = np.random.default_rng(0)
    s, w = rng.integers(2, size=n), rng.integers(2, size=m)
    I, J = np.arange(n * m) // m, np.arange(n * m) // n                                    # the plan in units of 1 / (n m)
    ok = np.arange(m) <= J.reshape(n, m).max(1)[:, None]
    F = np.zeros((2, 2))
    np.add.at(F, (s[I], w[J]), 1 / (n * m))
    assert check_support(ok, s, w, F=F)
    with pytest.raises(InfeasibleTarget, match="cannot be placed"): check_support(ok, s, w, F=F + .5 / n * np.array([[1, -1], [-1, 1]]))


@pytest.mark.parametrize("weights", [None, [.3, .3, .2, .2]])
def test_a_block_without_pairs_carries_nothing(weights):
    ok, s = np.ones((4, 4), bool), [0, 1, 0, 1]
    ok[np.ix_([0, 2], [0, 2])] = False
    ok[0, 0], F = False, np.array([[.25, .25], [.25, .25]]) if weights is None else np.outer([.5, .5], [.5, .5])
    with pytest.raises(InfeasibleTarget, match=r"block \(0, 0\) has no allowed pair that a plan can use, but F asks|no usable pair"): check_support(ok, s, s, weights, weights, F)


# --- errors, types

GOOD = dict(F=[[.3, .2], [.1, .4]], p=[.5, .5], q=[.4, .6])
BAD = [
    (dict(F=[[.3, .2, 0.], [.1, .4, 0.]]), r"shape \[K_s, K_w\] = \[2, 2\], got \[2, 3\]"), (dict(F=[[-.1, .6], [.5, 0.]]), "negative entry"),
    (dict(F=[[math.nan, .2], [.1, .4]]), "NaN or infinite"), (dict(F=[[math.inf, .2], [.1, .4]]), "NaN or infinite"),
    (dict(p=[.5, .6]), "same total"), (dict(p=[-.5, 1.5]), "masses >= 0"), (dict(q=[math.nan, 1.]), "q has 1 NaN"),
    (dict(F=[[.3, .2], [.1, .4]], p=[1., 0.]), "group s = 1 is empty"), (dict(F=[[.2, .2], [.3, .3]]), "F.T does fit"), (dict(tol=-1.), "tol"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_targets(change, message, untyped):
    with pytest.raises(ValueError, match=message): check_target(**GOOD | change)


def test_transposed_hint():
    with pytest.raises(ValueError, match=r"pass F.T"): check_target([[.2, .2], [.1, .2], [.1, .2]], [.4, .6], [.4, .3, .3])


@pytest.mark.parametrize("scale", [1e-12, 1., 1e9])
def test_tolerance_is_relative(scale):
    F = scale * f64([[1, 2], [3, 1]]) / 7
    p, q = F.sum(1), F.sum(0)
    assert torch.equal(check_target(F * (1 + 6e-11), p, q), F * (1 + 6e-11))
    for wrong in (0 * F, F * (1 + 1e-8)):
        with pytest.raises(InfeasibleTarget) as refusal: check_target(wrong, p, q)
        assert "float32" not in str(refusal.value)
    with pytest.raises(InfeasibleTarget, match="rounding of float32"): check_target(F.float(), p, q)


def test_refusals_say_where_the_nearest_target_is_and_know_counts():
    with pytest.raises(InfeasibleTarget, match=r"F \* 0.01 does fit, so divide F by its sum.*`.nearest` of this error") as refusal: check_target([[30, 20], [10, 40]], **{k: GOOD[k] for k in "pq"})
    assert (refusal.value.nearest - f64(GOOD["F"])).abs().max() < 1e-15
    with pytest.raises(InfeasibleTarget) as refusal: check_target([[.3, .3], [.2, .2]], [.5, .5], [.4, .6])
    assert "divide F" not in str(refusal.value) and "float32" not in str(refusal.value)


def test_tables_from_pandas(untyped):
    F = pd.DataFrame(GOOD["F"], ["a", "b"], ["c", "d"])
    assert torch.equal(check_target(F, F.sum(axis=1), F.sum()), f64(GOOD["F"]))


def test_support_reads_groups_without_a_target(untyped):
    ok = np.ones((2, 2), bool)
    for s, w, name in (([0], [0, 1], "s"), ([0, 1], "zz", "w"), ([0, 1], [0, -1], "w"), ([0., 1.], [0, 1], "s")):
        with pytest.raises(ValueError, match=f"{name} must be 2 whole numbers"): check_support(ok, s, w)
    assert check_support(ok, [0, 99], torch.tensor([5, 0]), [2, 0], [1, 1])            # any group numbers, zero weights, any total


@pytest.mark.parametrize("call, message", [
    (lambda p, q: check_target([[.1, .2], [.3]], p, q), "F must be numbers, in lists of equal length"), (lambda p, q: check_target(GOOD["F"], None, q), "p must be|p has"),
    (lambda p, q: quota_target(p, q, "half", favoured=0), "rule must be"), (lambda p, q: quota_target(p, q, "share", favoured=2), "favoured"),
    (lambda p, q: quota_target(p, q, "share", favoured=[0, 0]), "distinct"), (lambda p, q: quota_target(p, q, "share", favoured=0, share=1.5), "share must lie"),
    (lambda p, q: quota_target(p, q, "share", favoured=0, groups=[]), "groups"), (lambda p, q: quota_bounds(p, q, "four-fifths", favoured=[0, 1]), "no box"),
    (lambda p, q: quota_bounds(p, q, "four-fifths", favoured=0, rate=.9), "overall selection rate at 0.4"), (lambda p, q: quota_target(p, q, "share", favoured=0, share=.6), "lower bounds"),
    (lambda p, q: check_quotas([[.5, 0.], [0., 0.]], .1, p, q), "lower exceeds upper"), (lambda p, q: check_quotas(0., math.nan, p, q), "NaN"),
    (lambda p, q: check_quotas(0., .2, p, q), "more than all their upper bounds|hold"), (lambda p, q: quota_target(p, q, "four-fifths", favoured=0, reference=[[.4, .1], [0., .5]]), "zeros of reference"),
    (lambda p, q: check_support(np.ones((2, 2)), [0, 1], [0, 1]), "boolean"), (lambda p, q: check_support(np.ones((2, 2), bool), [0, 2], [0, 1], F=GOOD["F"]), "whole numbers in 0..1"),
    (lambda p, q: check_support(np.eye(2, dtype=bool), [0, 1], [0, 1], p, q), "cannot be placed"), (lambda p, q: check_support(np.ones((2, 2), bool), [0, 1], [0, 1], p, [1., 1.]), "same total"),
])
def test_bad_rules_boxes_and_supports(call, message, untyped):
    with pytest.raises(ValueError, match=message): call([.5, .5], [.4, .6])


@pytest.mark.parametrize("make", [torch.tensor, np.array, list], ids=["torch", "numpy", "list"])
def test_input_types(make):
    F, p, q = make(GOOD["F"]), make(GOOD["p"]), make(GOOD["q"])
    if make is torch.tensor: F, p, q = (torch.tensor(GOOD[k], dtype=torch.float64, requires_grad=True) for k in "Fpq")
    for G in (check_target(F, p, q), nearest_target(F, p, q), independence_target(p, q), *frechet_bounds(p, q), quota_target(p, q, "share", favoured=0, reference=F)):
        assert G.dtype == torch.float64 and G.shape == (2, 2) and not G.requires_grad


def test_rounding_is_not_mass():
    G = check_target([[.3, .2], [.2 + 1e-17, -1e-17]], [.5, .2], [.5, .2])
    assert (G >= 0).all() and G[1, 1] == 0


def test_infeasible_target_survives_pickle():
    with pytest.raises(InfeasibleTarget) as refusal: check_target([[.3, .3], [.2, .2]], [.5, .5], [.4, .6])
    again = pickle.loads(pickle.dumps(refusal.value))
    assert str(again) == str(refusal.value) and torch.equal(again.nearest, refusal.value.nearest)
    assert re.search(r"\[\[0.2, 0.3\], \[0.2, 0.3\]\]", str(again))
