"""`fairbook.group_transport`: right plans for every rule, certificates that hold, and errors that say what to do."""
import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import cvxpy as cp
import ot
from fairbook import group_transport
from fairbook.group_targets import InfeasibleTarget
from fairbook.group_transport import TransportResult, fair_sinkhorn, penalized_sinkhorn, quota_sinkhorn
from fairbook.projection import ConvergenceWarning

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
METHODS = ["auto", "scaling", "log", "stabilized", "newton"]
F2 = torch.tensor([[.2, .3], [.3, .2]], dtype=torch.float64)


def draw(seed, n=40, m=40, K=(2, 2), shift=1., weights=False):
    "Points in the plane, groups (all present, in random order) that are shifted apart, costs with maximum 1, and weights."
    gen = torch.Generator().manual_seed(seed)
    s, w = (torch.arange(size)[torch.randperm(size, generator=gen)] % k for size, k in ((n, K[0]), (m, K[1])))
    x, y = (torch.randn(size, 2, generator=gen).double() + shift * g[:, None] for size, g in ((n, s), (m, w)))
    a, b = (.5 + torch.rand(size, generator=gen).double() if weights else torch.ones(size, dtype=torch.float64) for size in (n, m))
    C = torch.cdist(x, y)**2
    return C / C.max(), s, w, a / a.sum(), b / b.sum()


def masses(s, w, a, b, K):
    p, q = (torch.zeros(k, dtype=torch.float64).index_add_(0, g, x) for k, g, x in ((K[0], s, a), (K[1], w, b)))
    return p, q


def some_target(s, w, a, b, K, seed=0, mix=1.):
    "A random table with the right margins, between independence (mix 0) and a random one."
    p, q = masses(s, w, a, b, K)
    F = torch.outer(p, q) * torch.exp(mix * torch.randn(K, generator=torch.Generator().manual_seed(seed)).double())
    for _ in range(2000): F = F * (p / F.sum(1))[:, None]; F = F * (q / F.sum(0))
    return F * (p / F.sum(1))[:, None]


def referee(C, s, w, a, b, reg, rule, K=(2, 2)):
    "The plan by Clarabel, in entries near 1."
    (n, m), A, B = C.shape, np.eye(K[0])[s], np.eye(K[1])[w]
    ab = np.outer(a, b)
    Q, G = cp.Variable((n, m)), cp.Variable(K)
    value, also = rule(G)
    goal = (cp.sum(cp.multiply(ab * C.numpy(), Q)) + value) / reg + cp.sum(cp.multiply(ab, cp.kl_div(Q, np.ones((n, m)))))
    margins = [Q @ b.numpy() == 1, (a.numpy() @ Q)[1:] == 1, G == A.T @ cp.multiply(ab, Q) @ B]
    cp.Problem(cp.Minimize(goal), margins + also).solve("CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    return ab * Q.value


def objective(P, C, a, b, reg, value):
    "Primal objective of a plan with total mass 1."
    P, ab = P.numpy(), np.outer(a, b)
    linear = (P[P > 0] * C.numpy()[P > 0]).sum()
    return linear + reg * (P[P > 0] * np.log(P[P > 0] / ab[P > 0])).sum() + value(P)


CASES = {"hard": lambda t, *x, **k: fair_sinkhorn(*x, F2, .05, **k), "box": lambda t, *x, **k: quota_sinkhorn(*x, .9 * F2, 1.1 * F2, .05, **k),
         **{kind: (lambda t, *x, kind=kind, **k: penalized_sinkhorn(*x, F2, .05, t, penalty=kind, **k)) for kind in ("l2", "l1", "kl")}}
RULES = {"hard": lambda t: lambda G: (0, [G[0, 0] == F2[0, 0].item()]), "box": lambda t: lambda G: (0, [G >= .9 * F2.numpy(), G <= 1.1 * F2.numpy()]),
         "l2": lambda t: lambda G: (t * cp.sum_squares(G - F2.numpy()), []), "l1": lambda t: lambda G: (t * cp.sum(cp.abs(G - F2.numpy())), []),
         "kl": lambda t: lambda G: (t * cp.sum(cp.kl_div(G, F2.numpy())), [])}
GRID = [("hard", 1.), ("box", 1.)] + [("l2", t) for t in (.1, 1., 10., 100., 1000.)] + [(kind, t) for kind in ("l1", "kl") for t in (.01, .1, 1., 10.)]


@pytest.mark.parametrize("kind, lam", GRID)
def test_the_plan_of_a_general_convex_solver(kind, lam):
    C, s, w, a, b = draw(1)
    result = CASES[kind](lam, C, s, w)
    assert result.converged and 0 <= result.gap <= 1e-9
    assert abs(result.plan.numpy() - referee(C, s, w, a, b, .05, RULES[kind](lam))).max() <= 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["hard", "l2", "l1", "kl", "box"])
def test_all_methods_find_the_same_plan(kind, method):
    C, s, w, a, b = draw(2, 50, 30)
    best = CASES[kind](.3, C, s, w, tol=1e-12, method="log")
    found = CASES[kind](.3, C, s, w, tol=1e-11, method=method)
    assert found.converged and (found.plan - best.plan).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["hard", "l2", "l1", "kl", "box"])
@pytest.mark.parametrize("sweeps", [1, 2, 3, 5, 10, 30])
@pytest.mark.parametrize("method", ["scaling", "newton"])
def test_the_gap_holds_for_plans_that_have_not_converged(kind, sweeps, method):
    C, s, w, a, b = draw(3, 30, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        early, best = CASES[kind](.3, C, s, w, max_iter=sweeps, method=method), CASES[kind](.3, C, s, w, tol=1e-12)
    F = F2.numpy()
    group_mass = lambda P: np.eye(2)[s].T @ P @ np.eye(2)[w]
    value = {"l2": lambda P: .3 * ((group_mass(P) - F)**2).sum(), "l1": lambda P: .3 * abs(group_mass(P) - F).sum(),
             "kl": lambda P: .3 * (group_mass(P) * np.log(group_mass(P) / F) - group_mass(P) + F).sum()}.get(kind, lambda P: 0.)
    P = rounded(early, F if kind == "hard" else None, (.9 * F, 1.1 * F) if kind == "box" else None)
    assert max(abs(P.sum(1) - a).max(), abs(P.sum(0) - b).max()) < 1e-14
    excess = objective(P, C, a, b, .05, value) - objective(best.plan, C, a, b, .05, value)
    assert -1e-9 <= excess <= early.gap + 1e-10
    if kind == "l2" and method == "scaling" and sweeps == 1: assert early.gap > 1e-6 and not early.converged


def rounded(result, F, box):
    "The rounding of the notes, written anew: rows, columns, blocks down; then the deficits as an outer product."
    _, s, w, a, b, _ = result.problem
    P, A, B = result.plan.numpy(), np.eye(2)[s], np.eye(2)[w]
    P = P * np.minimum(1, a.numpy() / P.sum(1))[:, None]
    P = P * np.minimum(1, b.numpy() / P.sum(0))
    G, p, q = A.T @ P @ B, A.T @ a.numpy(), B.T @ b.numpy()
    dp, dq = (p - G.sum(1)).clip(0), (q - G.sum(0)).clip(0)
    goal = G + np.outer(dp, dq) / max(dp.sum(), 1e-300) if F is None else F
    if box is not None:
        inside = group_transport._inside(*map(torch.from_numpy, box), torch.from_numpy(p), torch.from_numpy(q)).numpy()
        while (goal > box[1] + 1e-15).any() or (goal < box[0] - 1e-15).any():
            over = np.maximum(goal - box[1], box[0] - goal).clip(0)
            goal = goal + min(1., (over / np.maximum(abs(goal - inside), 1e-300)).max()) * (inside - goal)
            if np.allclose(goal, inside, atol=1e-15): break
    P = P * np.minimum(1, goal / G)[s][:, w]
    G = A.T @ P @ B
    da, db, dF = (a.numpy() - P.sum(1)).clip(0), (b.numpy() - P.sum(0)).clip(0), (goal - G).clip(0)
    share = dF / np.maximum(dF.sum(1, keepdims=True), 1e-300) / np.maximum(dF.sum(0), 1e-300)
    return torch.from_numpy(P + np.outer(da, db) * share[s][:, w])


@pytest.fixture(scope="module")
def gaussians():
    folder = Path(os.environ.get("FAIRBOOK_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "transport"
    if not (folder / "gaussians_250x25.npz").exists(): pytest.skip("the fixed sample gaussians_250x25.npz is not at hand")
    d = np.load(folder / "gaussians_250x25.npz")
    X, Y, s, w, F = (torch.from_numpy(d[k]) for k in ("X", "Y", "s", "w", "F"))
    return torch.cdist(X.double(), Y.double())**2, s.long(), w.long(), F.double()


# cost minus Sinkhorn's, violation: digits of the reference table
REFERENCE = {1: (.1636668015181486, .20189516463262763), 10: (1.021345972932951, .020071357021923836), 33: (1.3079378536295667, .002471436589253206),
             100: (1.4124123091919725, 2.958204727832555e-4), 1000: (1.4626015381422823, 3.0905539856878754e-6)}


def test_the_reference_table(gaussians):
    C, s, w, F = gaussians
    plain = fair_sinkhorn(C, 0 * s, 0 * w, [[1.]], 1., tol=1e-13)
    assert plain.cost.item() == pytest.approx(1.425407583802665, abs=1e-12)
    for lam, (cost, violation) in REFERENCE.items():
        r = penalized_sinkhorn(C, s, w, F, 1., lam, tol=1e-13)
        assert r.converged and (r.cost - plain.cost).item() == pytest.approx(cost, abs=2e-12) and r.violation.item() == pytest.approx(violation, rel=1e-9)
    r = fair_sinkhorn(C, s, w, F, 1., tol=1e-13)
    assert (r.cost - plain.cost).item() == pytest.approx(1.4683389360129044, abs=2e-12)
    assert (r.h[0, 0] - r.h[0, 1] - r.h[1, 0] + r.h[1, 1]).item() == pytest.approx(-7.049393519103964, abs=1e-9) and r.violation < 1e-24


def test_few_passes_for_every_weight(gaussians):
    C, s, w, F = gaussians
    for lam in np.logspace(0, 3, 13): assert penalized_sinkhorn(C, s, w, F, 1., lam).n_iter <= 70
    far = {m: fair_sinkhorn(C, s, w, F, 1e-3 * C.max(), method=m) for m in ("stabilized", "auto")}
    assert far["auto"].n_passes <= .3 * far["stabilized"].n_passes and far["auto"].gap <= 1e-9


@pytest.mark.parametrize("reg", [.01, .1, 1.])
def test_without_groups_it_is_pot(reg):
    C, s, w, a, b = draw(4, 35, 45, weights=True)
    peer = ot.sinkhorn(a.numpy(), b.numpy(), C.numpy(), reg, method="sinkhorn_log", stopThr=1e-14, numItermax=100_000)
    r = fair_sinkhorn(C, 0 * s, 0 * w, [[1.]], reg, a, b, tol=1e-12)
    assert abs(r.plan.numpy() - peer).max() < 1e-10


def test_fixed_subsidies_in_pot_give_the_fair_plan():
    "The fair plan is the ordinary plan of the cost minus the subsidies."
    C, s, w, a, b = draw(5)
    r = fair_sinkhorn(C, s, w, F2, .1, tol=1e-12)
    peer = ot.sinkhorn(a.numpy(), b.numpy(), (C - r.h[s][:, w]).numpy(), .1, method="sinkhorn_log", stopThr=1e-14, numItermax=100_000)
    assert abs(r.plan.numpy() - peer).max() < 1e-10


@pytest.mark.parametrize("dtype, reg, tol", [(torch.float64, 1e-3, 1e-9), (torch.float32, 1e-2, 2e-6)])
@pytest.mark.parametrize("method", ["auto", "stabilized", "log", "newton"])
def test_small_regularisers(dtype, reg, tol, method):
    C, s, w, a, b = draw(6, 60, 50)
    r = fair_sinkhorn(C.to(dtype), s, w, F2, reg, method=method, max_iter=20_000)
    best = fair_sinkhorn(C, s, w, F2, reg, tol=1e-12)
    assert r.converged and r.residual <= tol and 0 <= r.gap < 1e3 * tol and r.plan.isfinite().all()
    assert abs(r.cost - best.cost) < 1e2 * tol


# ---------- properties

sizes = st.tuples(st.integers(2, 12), st.integers(2, 12), st.integers(1, 3), st.integers(1, 3)).map(lambda t: (max(t[0], t[2]), max(t[1], t[3]), t[2], t[3]))


@settings(max_examples=40)
@given(sizes, st.integers(0, 10**6), st.sampled_from([.02, .1, 1.]), st.sampled_from(METHODS))
def test_margins_and_masses_are_met(size, seed, reg, method):
    n, m, *K = size
    C, s, w, a, b = draw(seed, n, m, K, weights=True)
    F = some_target(s, w, a, b, K, seed)
    r = fair_sinkhorn(C, s, w, F, reg, a, b, method=method, max_iter=50_000)
    A, B, P = torch.eye(K[0]).double()[s], torch.eye(K[1]).double()[w], r.plan
    assert r.converged and (P.sum(1) - a).abs().sum() + (P.sum(0) - b).abs().sum() + (A.T @ P @ B - F).abs().sum() < 1.1e-9
    assert torch.allclose(r.cost, (C * P).sum(), atol=1e-12) and torch.allclose(r.group_mass, A.T @ P @ B, atol=1e-12)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(["hard", "l2", "l1", "kl", "box"]))
def test_order_of_the_samples_does_not_matter(seed, kind):
    C, s, w, a, b = draw(seed, 20, 14)
    gen = torch.Generator().manual_seed(seed + 1)
    i, j = torch.randperm(20, generator=gen), torch.randperm(14, generator=gen)
    r, t = CASES[kind](.3, C, s, w, tol=1e-11), CASES[kind](.3, C[i][:, j], s[i], w[j], tol=1e-11)
    assert (r.plan[i][:, j] - t.plan).abs().max() < 1e-10


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(-2, 2), st.floats(-2, 2))
def test_gauge_leaves_the_plan(seed, x, y):
    C, s, w, a, b = draw(seed, 12, 10)
    r = fair_sinkhorn(C, s, w, F2, .2)
    x, y = torch.tensor([x, -x], dtype=torch.float64), torch.tensor([y, y], dtype=torch.float64)
    moved = TransportResult(**{**{k: getattr(r, k) for k in r.__dataclass_fields__}, "f": r.f + x[s], "g": r.g + y[w], "h": r.h - x[:, None] - y})
    assert torch.allclose(moved.plan, r.plan, rtol=1e-10)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(["l2", "l1", "kl"]), st.sampled_from([.03, .3]))
def test_more_weight_less_violation_more_cost(seed, kind, reg):
    C, s, w, a, b = draw(seed, 24, 18)
    lams = torch.logspace(-2, 2, 7).double()
    path = penalized_sinkhorn(C, s, w, F2, reg, lams, penalty=kind, tol=1e-11)
    G, P = path.group_mass, path.plan
    penalty = {"l2": lambda G: ((G - F2)**2), "l1": lambda G: (G - F2).abs(), "kl": lambda G: G * (G / F2).log() - G + F2}[kind](G).sum((1, 2))
    price = path.cost + reg * (P * (P / a[:, None] / b).log()).sum((1, 2))
    assert (penalty.diff() <= 1e-9).all() and (price.diff() >= -1e-9).all()


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([1e-7, 1e7]), st.sampled_from(["l2", "l1", "kl"]))
def test_limits_of_the_weight(seed, lam, kind):
    C, s, w, a, b = draw(seed, 20, 16)
    soft = penalized_sinkhorn(C, s, w, F2, .1, lam, penalty=kind)
    limit = fair_sinkhorn(C, s, w, F2, .1) if lam > 1 else fair_sinkhorn(C, 0 * s, 0 * w, [[1.]], .1)
    assert (soft.plan - limit.plan).abs().max() < 1e-6


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([.1, 1., 10., 1000.]), st.booleans())
def test_subsidies_are_marginal_penalties(seed, lam, feasible):
    C, s, w, a, b = draw(seed, 20, 16)
    F = F2 if feasible else torch.tensor([[.3, .3], [.1, .4]], dtype=torch.float64)
    r = penalized_sinkhorn(C, s, w, F, .1, lam, tol=1e-11)
    assert (r.h + 2 * lam * (r.group_mass - F)).abs().max() < 1e-6 * max(1, lam)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([.02, .2]))
def test_absolute_penalty_is_exact(seed, reg):
    C, s, w, a, b = draw(seed, 20, 16)
    h = fair_sinkhorn(C, s, w, F2, reg, tol=1e-11).h
    largest = ((h[0, 0] - h[0, 1] - h[1, 0] + h[1, 1]) / 4).abs()
    over, under = (penalized_sinkhorn(C, s, w, F2, reg, t * largest, penalty="l1", tol=1e-11) for t in (1.05, .8))
    assert over.violation < 1e-18 and under.violation > 1e-12


# ---------- shapes, starts, unusual input

def test_batches_over_everything():
    C, s, w, a, b = draw(7, 20, 15)
    F = torch.stack([F2, torch.outer(*masses(s, w, a, b, (2, 2)))]) if (masses(s, w, a, b, (2, 2))[1] == .5).all() else some_target(s, w, a, b, (2, 2)).expand(2, 2, 2)
    one = lambda C, F, reg: fair_sinkhorn(C, s, w, F, reg).plan
    Cs, reg = torch.stack([C, C.sqrt(), 2 * C])[:, None], torch.tensor([.1, .3], dtype=torch.float64)
    many = fair_sinkhorn(Cs, s, w, F, reg)
    assert many.plan.shape == (3, 2, 20, 15) and many.converged.shape == (3, 2)
    for i in range(3):
        for j in range(2): assert (many.plan[i, j] - one(Cs[i, 0], F[j], reg[j])).abs().max() < 1e-9
    box = quota_sinkhorn(C, s, w, torch.stack([.9 * F[0], .5 * F[0]]), 2 * F[0], .1)
    assert box.plan.shape == (2, 20, 15) and box.converged.all() and box.violation.isnan().all()


def test_warm_starts_save_sweeps():
    C, s, w, a, b = draw(8, 60, 40)
    cold = fair_sinkhorn(C, s, w, F2, .05, method="stabilized")
    again = fair_sinkhorn(C, s, w, F2, .05, method="stabilized", init=cold)
    near = penalized_sinkhorn(C, s, w, F2, .05, 100., init=cold)
    assert again.n_iter <= 3 < cold.n_iter and (again.plan - cold.plan).abs().max() < 1e-9 and near.converged
    path = fair_sinkhorn(C, s, w, F2, torch.tensor([.05, .06], dtype=torch.float64))
    assert fair_sinkhorn(C, s, w, F2, torch.tensor([.06, .05], dtype=torch.float64), init=path).converged.all()


@pytest.mark.parametrize("method", METHODS)
def test_a_start_from_a_far_away_regulariser_does_no_harm(method):
    C, s, w, a, b = draw(9, 30, 20)
    for before, after in ((10., .01), (.001, 1.)):
        start = fair_sinkhorn(C, s, w, F2, before)
        with warnings.catch_warnings():
            if method == "scaling": warnings.simplefilter("ignore", ConvergenceWarning)
            r = fair_sinkhorn(C, s, w, F2, after, init=start, method=method)
        assert r.plan.isfinite().all() and (method == "scaling" or r.converged)


def test_zeros_and_empty_groups():
    C, s, w, a, b = draw(10, 30, 20)
    F = torch.tensor([[.5, 0.], [0., .5]], dtype=torch.float64)
    for method in METHODS:
        r = fair_sinkhorn(C, s, w, F, .1, method=method)
        assert r.converged and r.plan[(s[:, None] != w)].max() == 0 and r.gap < 1e-9 and r.h[0, 1] == -math.inf
        G = torch.zeros(3, 4, dtype=torch.float64); G[:2, :2] = F2
        wide = fair_sinkhorn(C, s, w, G, .1, method=method)
        assert wide.converged and (wide.plan - fair_sinkhorn(C, s, w, F2, .1).plan).abs().max() < 1e-9 and 0 <= wide.gap < 1e-9
    assert penalized_sinkhorn(C, s, w, F, .1, 1., penalty="kl").plan[(s[:, None] != w)].max() == 0
    assert quota_sinkhorn(C, s, w, 0 * F, F, .1).plan[(s[:, None] != w)].max() == 0
    for kind in ("l1", "l2", "kl"):
        for table in (G, G + .01):
            r = penalized_sinkhorn(C, s, w, table, .1, 1., penalty=kind)
            assert r.converged and r.h[:2, :2].isfinite().all() and 0 <= r.gap < 1e-8, kind
    loose = quota_sinkhorn(C, s, w, 0 * G - 1, G + math.inf, .1)
    assert loose.converged and (loose.plan - fair_sinkhorn(C, 0 * s, 0 * w, [[1.]], .1).plan).abs().max() < 1e-9


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 50), (50, 3)])
@pytest.mark.parametrize("method", METHODS)
def test_thin_problems(shape, method):
    C, s, w, a, b = draw(11, *shape, (1, 1))
    r = fair_sinkhorn(C, s, w, [[1.]], .1, method=method)
    assert r.converged and r.gap < 1e-9
    if 1 in shape: assert torch.allclose(r.plan, a[:, None] * b)


@pytest.mark.parametrize("method", METHODS)
def test_forbidden_pairs(method):
    C, s, w, a, b = draw(12, 30, 24)
    barred = C.masked_fill((torch.arange(30)[:, None] + torch.arange(24)) % 3 == 0, math.inf)
    with np.errstate(all="raise"): r = fair_sinkhorn(barred, s, w, F2, .1, method=method)
    high = fair_sinkhorn(barred.nan_to_num(posinf=50.), s, w, F2, .1)
    assert r.converged and r.plan[barred.isinf()].max() == 0 and (r.plan - high.plan).abs().max() < 1e-9
    assert 0 <= r.gap <= 1e-9 and r.cost.isfinite()
    for kind in CASES:
        r = CASES[kind](1., barred, s, w, method=method)
        assert r.converged and 0 <= r.gap <= 1e-9, kind


@pytest.mark.parametrize("sweeps", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("seed", range(4))
def test_the_gap_holds_where_pairs_are_forbidden(seed, sweeps):
    "The optimum lies between the dual value of an early stop and that value plus the gap; inf says that there is no certificate."
    C, s, w, a, b = draw(30 + seed, 30, 24)
    barred = C.masked_fill((torch.arange(30)[:, None] + torch.arange(24)) % 3 == 0, math.inf)
    best = fair_sinkhorn(barred, s, w, F2, .05, tol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        early = fair_sinkhorn(barred, s, w, F2, .05, max_iter=sweeps, method="log")
    dual = (early.f @ a + early.g @ b + (early.h * F2).sum() - .05 * (early.plan.sum() - 1)).item()
    optimum = objective(best.plan, barred.nan_to_num(posinf=0.), a, b, .05, lambda P: 0.)
    assert dual - 1e-10 <= optimum <= dual + early.gap + 1e-10 and not early.gap.isnan()
    if sweeps == 16: assert early.gap < 1e-5


@pytest.mark.parametrize("reg", [2e-3, .2])
def test_a_certificate_for_a_large_problem_with_forbidden_pairs(reg):
    C, s, w, a, b = draw(18, 450, 430, (3, 2))
    C[torch.rand(450, 430, generator=torch.Generator().manual_seed(1)) < .3] = math.inf
    r = fair_sinkhorn(C, s, w, some_target(s, w, a, b, (3, 2)), reg)
    assert r.converged and 0 <= r.gap <= 1e-9


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("method", ["auto", "newton"])
def test_clusters_that_hardly_any_mass_connects(seed, method):
    "Forbidden pairs and a small reg: the dual is nearly flat in one direction, and a full Newton step would overflow."
    gen = torch.Generator().manual_seed(seed)
    C = torch.rand(3, 30, 20, generator=gen, dtype=torch.float64)[0]
    a, b = (x / x.sum() for x in (torch.rand(30, generator=gen).double() + .2, torch.rand(20, generator=gen).double() + .2))
    C[torch.rand(30, 20, generator=gen) < .2] = math.inf
    r = fair_sinkhorn(C, torch.zeros(30, dtype=torch.int64), torch.zeros(20, dtype=torch.int64), [[1.]], .001, a, b, tol=2e-11, method=method)
    assert r.converged and r.n_iter < 200


def impossible():
    "Rows of group 0 may go to group 0 only, but the target wants .3 of them elsewhere."
    C, s, w, a, b = draw(13, 20, 20)
    return C.masked_fill((s[:, None] == 0) & (w == 1) & (torch.arange(20)[:, None] > 2), math.inf), s, w


def test_an_impossible_support_is_refused(monkeypatch):
    with pytest.raises(ValueError): fair_sinkhorn(*impossible(), F2, .1)
    monkeypatch.setattr(group_transport, "check_support", lambda *a: False)       # as above its size limit
    for method in ("auto", "log", "newton"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            try: assert not fair_sinkhorn(*impossible(), F2, .1, method=method).converged
            except ValueError as e: assert "dual" in str(e)


@pytest.mark.parametrize("kind", ["hard", "l2", "l1", "kl", "box"])
def test_not_converged_is_said(kind):
    C, s, w, a, b = draw(14)
    with pytest.warns(ConvergenceWarning, match="max_iter"): r = CASES[kind](.3, C, s, w, max_iter=1, tol=1e-13)
    assert not r.converged and r.residual > 1e-13 and r.n_iter <= 2 and r.plan.isfinite().all()


def test_scaling_that_vanishes_names_the_cure():
    C, s, w, a, b = draw(15)
    with pytest.warns(ConvergenceWarning, match="auto"): r = fair_sinkhorn(C, s, w, F2, 1e-4, method="scaling", max_iter=50)
    assert not r.converged and fair_sinkhorn(C, s, w, F2, 1e-4, tol=1e-8).converged


def test_tensors_instead_of_arrays(monkeypatch):
    "The way of a GPU through the code, on the CPU."
    C, s, w, a, b = draw(16, 30, 20)
    G = torch.tensor([[.5, 0.], [0., .5]], dtype=torch.float64)
    usual = {k: run(.3, C, s, w) for k, run in CASES.items()}
    monkeypatch.setattr(group_transport, "_on_cpu", lambda x: False)
    for kind, run in CASES.items():
        for method in METHODS:
            r = run(.3, C, s, w, method=method)
            assert r.converged and r.f.dtype == torch.float64 and (r.plan - usual[kind].plan).abs().max() < 1e-8, (kind, method)
    assert fair_sinkhorn(C, s, w, G, .1).plan[(s[:, None] != w)].max() == 0
    assert fair_sinkhorn(C.masked_fill(torch.arange(20) == torch.arange(30)[:, None], math.inf), s, w, F2, .1).converged
    assert fair_sinkhorn(C.float(), s, w, F2, .1).converged and fair_sinkhorn(C, s, w, F2, 1e-3).converged


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_devices_and_types(device, dtype):
    C, s, w, a, b = draw(17)
    r = fair_sinkhorn(C.to(device, dtype), s.to(device), w.to(device), F2.to(device), .1)
    assert r.converged and r.plan.device.type == device and r.f.dtype == torch.float64
    assert (r.plan.cpu() - fair_sinkhorn(C, s, w, F2, .1).plan).abs().max() < 1e-7


@pytest.mark.filterwarnings("error")
def test_large_enough_for_sparse_newton():
    C, s, w, a, b = draw(18, 450, 430, (3, 2))
    F = some_target(s, w, a, b, (3, 2))
    for kind in ("sparse", "dense"):
        r = fair_sinkhorn(C, s, w, F, 2e-3 if kind == "sparse" else .2, method="newton")
        assert r.converged and r.gap < 1e-8


x = draw(19, 6, 4)
C6, s6, w6 = x[0], x[1], x[2]
BAD = {
    "C is nan": (dict(C=C6 * math.nan), "NaN"), "C is -inf": (dict(C=C6.masked_fill(C6 > .5, -math.inf)), "-inf"), "C of ints": (dict(C=torch.ones(6, 4, dtype=torch.int64)), "float"),
    "C not a tensor": (dict(C=[[1.]]), "list"), "C empty": (dict(C=torch.ones(0, 4)), "entries"), "row shut": (dict(C=C6.index_fill(0, torch.tensor([2]), math.inf)), "row"),
    "column shut": (dict(C=C6.index_fill(1, torch.tensor([2]), math.inf)), "column"), "s too long": (dict(s=torch.zeros(7, dtype=torch.int64)), "s must"),
    "s out of range": (dict(s=s6 + 1), "0..1"), "s negative": (dict(s=s6 - 1), "-1"), "w of floats": (dict(w=w6.double()), "w must"), "w of bools": (dict(w=w6.bool()), "w must"),
    "reg 0": (dict(reg=0.), "linear programme"), "reg < 0": (dict(reg=-1.), "reg"), "reg nan": (dict(reg=math.nan), "reg"), "a negative": (dict(a=torch.tensor([-1., 1, .25, .25, .25, .25])), "a must"),
    "a zero": (dict(a=torch.tensor([0., .2, .2, .2, .2, .2]).double()), "leave out"), "a sum": (dict(a=torch.ones(6).double()), "sum"), "b shape": (dict(b=torch.ones(5).double() / 5), "b must"),
    "F margins": (dict(F=[[.3, .3], [.2, .2]]), "0.1"), "F negative": (dict(F=[[.6, -.1], [-.1, .6]]), "negative"), "F nan": (dict(F=[[math.nan, .1], [.1, .1]]), "F"), "F flat": (dict(F=[.5, .5]), "K_s"),
    "mass in an empty group": (dict(F=[[.25, .25], [.2, .2], [.05, .05]]), "F"), "method": (dict(method="fast"), "newton"), "tol": (dict(tol=0.), "tol"), "tol < 0": (dict(tol=-1.), "tol"), "max_iter": (dict(max_iter=0), "max_iter"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_to_do(case, untyped):
    change, says = BAD[case]
    arguments = {**dict(C=C6, s=s6, w=w6, F=[[.25, .25], [.25, .25]], reg=.1), **change}
    with pytest.raises(ValueError, match=says.replace(".", r"\.")): fair_sinkhorn(**arguments)


@pytest.mark.parametrize("change, says", [(dict(lam=0.), "fair_sinkhorn"), (dict(lam=-1.), "lam"), (dict(lam=math.inf), "fair_sinkhorn"), (dict(penalty="l3"), "l1"), (dict(F=[[-.1, .1], [.5, .5]]), "F")])
def test_bad_penalties(change, says, untyped):
    with pytest.raises(ValueError, match=says): penalized_sinkhorn(**{**dict(C=C6, s=s6, w=w6, F=[[.25, .25], [.25, .25]], reg=.1, lam=1.), **change})


@pytest.mark.parametrize("lower, upper", [([[.6, 0], [0, 0]], [[1., 1], [1, 1]]), ([[0., 0], [0, 0]], [[.2, .2], [.2, .2]]), ([[.3, 0], [0, 0]], [[.2, 1], [1, 1]]), ([[math.nan, 0], [0, 0]], [[1., 1], [1, 1]])])
def test_boxes_that_no_plan_meets(lower, upper, untyped):
    with pytest.raises(ValueError): quota_sinkhorn(C6, s6, w6, lower, upper, .1)


def test_init_of_another_size(untyped):
    other = fair_sinkhorn(*draw(20, 8, 4)[:3], F2, .1)
    with pytest.raises(ValueError, match="init"): fair_sinkhorn(C6, s6, w6, F2, .1, init=other)


def test_results_are_frozen_and_plans_formed_once():
    r = fair_sinkhorn(C6, s6, w6, F2, .1)
    with pytest.raises(AttributeError): r.f = 0
    assert r.plan is r.plan and "plan" not in repr(r)


# ---------- hard corners: targets off their margins, empty groups, rounding

@pytest.mark.parametrize("e", [1e-12, 1e-10, 9e-10])
def test_a_target_off_its_margins_by_rounding_is_snapped(e):
    C, s, w, a, b = draw(21, 30, 20)
    r = fair_sinkhorn(C, s, w, F2 + e * torch.tensor([[1., 0.], [0., -1.]], dtype=torch.float64), .05)
    best = fair_sinkhorn(C, s, w, F2, .05)
    assert r.converged and 0 <= r.gap <= 1e-9 and (r.plan - best.plan).abs().max() < 10 * e + 1e-9 and r.h.abs().max() < 10 * C.max() + 10


def test_a_contradiction_has_no_certificate(monkeypatch):
    "Without the snap potentials run off, and the bound on the gap comes out negative: nan and a warning, never 0."
    C, s, w, a, b = draw(21, 30, 20)
    monkeypatch.setattr(group_transport, "_snapped", lambda F, p, q: F)
    with pytest.warns(ConvergenceWarning, match="no certificate"): r = fair_sinkhorn(C, s, w, F2 + torch.tensor([[1e-4, 0.], [0., -1e-4]], dtype=torch.float64), .05, max_iter=300, method="log")
    assert r.gap.isnan() and not r.converged


def test_boxes_that_miss_their_tables_by_rounding():
    C, s, w, a, b = draw(22, 30, 20)
    off = F2 + 4e-10 * torch.tensor([[1., 0.], [0., -1.]], dtype=torch.float64)
    best = fair_sinkhorn(C, s, w, F2, .05)
    r = quota_sinkhorn(C, s, w, off, off, .05)
    assert r.converged and 0 <= r.gap <= 1e-9 and (r.plan - best.plan).abs().max() < 1e-8


def test_a_tiny_group_without_mass_is_refused():
    C, s, w, a, b = draw(23, 12, 8)
    s[0], a[0], a[1:] = 2, 3e-13, (1 - 3e-13) / 11
    F = torch.zeros(3, 2, dtype=torch.float64)
    F[:2] = torch.outer(*masses(s.clamp(max=1), w, a, b, (2, 2)))
    with pytest.raises(ValueError, match="zero"): fair_sinkhorn(C, s, w, F, .1, a, b)


@pytest.mark.parametrize("kind", ["kl", "l1", "l2"])
@pytest.mark.parametrize("lam", [1e2, 1e5, 1e6])
def test_mass_asked_of_an_empty_group_does_no_harm(kind, lam):
    "All of it is a constant: the plan is that of the other groups."
    C, s, w, a, b = draw(24, 30, 20)
    F = torch.tensor([[.2, .3], [.25, .2], [.05, .05]], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        r = penalized_sinkhorn(C, s, w, F, 1., lam, penalty=kind, max_iter=1000)
    best = penalized_sinkhorn(C, s, w, F[:2], 1., lam, penalty=kind)
    assert r.converged and r.group_mass.shape == (3, 2) and r.group_mass[2].max() == 0 and (r.plan - best.plan).abs().max() < 1e-9
    assert torch.isclose(r.violation, ((r.group_mass - F)**2).sum()) and penalized_sinkhorn(C, s, w, F, 1., lam, penalty=kind, init=r).n_iter <= r.n_iter


@pytest.mark.parametrize("kind", ["kl", "l1", "l2"])
@pytest.mark.parametrize("lam", [1., 1e5])
def test_a_pair_of_groups_without_allowed_pairs_is_a_constant(kind, lam):
    C, s, w, a, b = draw(25, 30, 20, (3, 2))
    barred = C.masked_fill((s[:, None] == 0) & (w == 1), math.inf)
    F = torch.full((3, 2), 1 / 6, dtype=torch.float64)
    r = penalized_sinkhorn(barred, s, w, F, .1, lam, penalty=kind)
    best = penalized_sinkhorn(barred, s, w, F.masked_fill(torch.tensor([[False, True], [False, False], [False, False]]), 0.), .1, lam, penalty=kind)
    assert r.converged and 0 <= r.gap <= 1e-9 * (1 + r.f.abs().max()) and (r.plan - best.plan).abs().max() < 1e-7      # a residual of tol, times the potentials


@pytest.mark.parametrize("F", [[[0., 0.], [.5, .5]], [[0., 0.], [0., 0.]], [[.5, 0.], [0., 0.]]])
def test_kl_refuses_zeros_that_leave_no_plan(F):
    C, s, w, a, b = draw(26, 20, 20)
    with pytest.raises(InfeasibleTarget, match="zeros of F"): penalized_sinkhorn(C, s, w, F, .1, 1., penalty="kl")
    assert penalized_sinkhorn(C, s, w, F, .1, 1., penalty="l1").converged
    barred = C.masked_fill((s[:, None] == 0) & (w == 0), math.inf)
    with pytest.raises(InfeasibleTarget): penalized_sinkhorn(barred, s, w, [[.5, 0.], [0., .5]], .1, 1., penalty="kl")


def test_boxes_that_forbidden_pairs_shut_are_refused():
    C, s, w, a, b = draw(27, 20, 20)
    barred = C.masked_fill((s[:, None] == 0) & (w == 0), math.inf)
    with pytest.raises(InfeasibleTarget): quota_sinkhorn(barred, s, w, [[0., 0.], [0., 0.]], [[1., 0.], [0., 1.]], .1)
    with pytest.raises(InfeasibleTarget, match="forbids every pair"): quota_sinkhorn(barred, s, w, [[.1, 0.], [0., 0.]], [[1., 1.], [1., 1.]], .1)


@pytest.mark.parametrize("lam", [1., 1e2, 1e3])
def test_the_gauge_keeps_kl_fast(lam):
    C, s, w, a, b = draw(28, 40, 30)
    F = torch.tensor([[.3, .3], [.3, .2]], dtype=torch.float64)
    r = penalized_sinkhorn(C, s, w, F, 1., lam, penalty="kl", method="log")
    assert r.converged and r.n_iter < 60 and 0 <= r.gap < 1e-8


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [1e2, 1e5])
def test_heavy_relative_penalties(seed, ratio):
    C, s, w, a, b = draw(40 + seed, 30, 25, weights=True)
    F = some_target(s, w, a, b, (2, 2), seed) * torch.tensor([[1.3, .8], [1.1, 1.]], dtype=torch.float64)
    r = penalized_sinkhorn(C, s, w, F, .04, .04 * ratio, a, b, penalty="kl")
    G = r.group_mass
    assert r.converged and (r.h - r.h.mean() + .04 * ratio * ((G / F).log() - (G / F).log().mean())).abs().max() < 1e-6 * ratio


def test_weights_normalised_in_float32_are_taken():
    C, s, w, a, b = draw(29, 30, 20)
    raw = torch.rand(30, generator=torch.Generator().manual_seed(0))
    r = fair_sinkhorn(C, 0 * s, 0 * w, [[1.]], .1, raw / raw.sum())
    best = fair_sinkhorn(C, 0 * s, 0 * w, [[1.]], .1, raw.double() / raw.double().sum())
    assert r.converged and r.gap < 1e-9 and (r.plan - best.plan).abs().max() < 1e-7 and abs(r.problem[3].sum() - 1) < 1e-15


@pytest.mark.parametrize("change", [lambda C: (C + 1e9, 1.), lambda C: (C, 1e-14), lambda C: (C, 1e-300)])
def test_rounding_is_named_and_soon(change):
    C, s, w, a, b = draw(31, 60, 20)
    C, reg = change(20 * C)
    with pytest.warns(ConvergenceWarning, match="subtract the least cost"): r = fair_sinkhorn(C, s, w, F2, reg)
    assert not r.converged and r.n_iter < 2000


def test_nothing_is_differentiable_and_nothing_fails():
    r = penalized_sinkhorn(C6.clone().requires_grad_(), s6, w6, F2, .1, 1.)
    assert not r.cost.requires_grad and r.converged


@pytest.mark.parametrize("change, says", [(dict(reg=torch.ones(0)), "reg must not be empty"), (dict(reg=None), "reg must hold numbers"), (dict(reg="small"), "reg must hold numbers"), (dict(F=None), "F must hold numbers"),
                                          (dict(F=[[.1, .2], [.3]]), "F must hold numbers"), (dict(reg=torch.ones(3), F=torch.full((2, 2, 2), .25)), r"reg \[3\], F \[2\]"), (dict(max_iter=2.5), "max_iter"), (dict(tol=math.inf), "tol"),
                                          (dict(init=(1, 2, 3)), "init must be a TransportResult, got tuple")])
def test_more_bad_input(change, says, untyped):
    with pytest.raises(ValueError, match=says): fair_sinkhorn(**{**dict(C=C6, s=s6, w=w6, F=[[.25, .25], [.25, .25]], reg=.1), **change})
    with pytest.raises(ValueError, match=says): penalized_sinkhorn(**{**dict(C=C6, s=s6, w=w6, F=[[.25, .25], [.25, .25]], reg=.1, lam=1.), **change})


def test_empty_or_unfit_batches_of_weights(untyped):
    with pytest.raises(ValueError, match="lam must not be empty"): penalized_sinkhorn(C6, s6, w6, F2, .1, torch.ones(0))
    with pytest.raises(ValueError, match=r"reg \[3\].*lam \[2\]"): penalized_sinkhorn(C6, s6, w6, F2, torch.ones(3), torch.ones(2))
    many = penalized_sinkhorn(C6, s6, w6, F2, .1, torch.ones(3))
    with pytest.raises(ValueError, match=r"init has batch shape \[3\]"): penalized_sinkhorn(C6, s6, w6, F2, .1, torch.ones(2), init=many)


@pytest.mark.parametrize("kind", ["kl", "l1", "l2"])
def test_corners_with_tensors_instead_of_arrays(monkeypatch, kind):
    "Empty groups, pairs of groups without allowed pairs and the gauge, the way of a GPU, on the CPU."
    C, s, w, a, b = draw(32, 30, 20, (3, 2))
    barred = C.masked_fill((s[:, None] == 0) & (w == 1), math.inf)
    F = torch.full((4, 2), .15, dtype=torch.float64)
    usual = penalized_sinkhorn(barred, s, w, F, .1, 30., penalty=kind)
    monkeypatch.setattr(group_transport, "_on_cpu", lambda x: False)
    for method in METHODS:
        r = penalized_sinkhorn(barred, s, w, F, .1, 30., penalty=kind, method=method)
        assert r.converged and (r.plan - usual.plan).abs().max() < 1e-8 and r.group_mass[3].max() == 0, method
