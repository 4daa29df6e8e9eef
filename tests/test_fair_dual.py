"""The fair dual: the exact oracle's table, weak duality and the other theorems on random problems, derivatives, cvxpy and HiGHS as referees, every method, bad input."""
import math
import pickle
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fairbook import fair_dual
from fairbook.fair_dual import fair_scores, lp_frontier, solve_dual, solve_dual_path, solve_lp
from fairbook.fairness_constraints import constraint_values, fairness_constraints, group_confusion_matrices, make_finite_law
from fairbook.projection import ConvergenceWarning

F64 = torch.float64
LAW = make_finite_law()
P, W = LAW.joint, LAW.weights
ALL = {"dp": "dp", "eop": "eop", "eo": "eo", "all": ["dp", "eo"]}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
METHODS = ["newton", "lbfgs", "fista", "proximal"]


def unbound(criteria, g=3, m=3, **options): return fairness_constraints(criteria, n_groups=g, n_classes=m, **options)


def crowd(n, g, m, seed=0):
    "A posterior that is logistic in four features."
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 4, dtype=F64, generator=gen) @ torch.randn(4, g * m, dtype=F64, generator=gen)).softmax(1).reshape(n, g, m)


problems = st.tuples(st.sampled_from([1, 2, 5, 12, 40]), st.integers(1, 4), st.integers(2, 4), st.sampled_from([.1, 1., 5.]), st.integers(0, 10**6))
criteria = st.sampled_from(["dp", "eop", "eo", ["dp", "eo"]])
conventions = st.sampled_from(["population", "pairwise"])


def random_joint(n, g, m, spread, seed):
    J = np.random.default_rng(seed).dirichlet(np.full(g * m, spread), n) + 1e-9
    return torch.from_numpy(J / J.sum(1, keepdims=True)).reshape(n, g, m)


# --- the exact oracle

ORACLE = [("dp", .3696, .5830843523, .6016490604, 9), ("eop", .3068, .5632407337, .5862406408, 9),
          ("eo", .3133, .5700576428, .5937690363, 27), ("all", .3696, .5857508102, .6186267845, 36)]


@pytest.mark.parametrize("name, bayes, loose, tight, K", ORACLE)
def test_oracle_table(name, bayes, loose, tight, K):
    S = fairness_constraints(ALL[name], P, weights=W)
    h = torch.nn.functional.one_hot(P.sum(1).argmax(1), 3).to(F64)
    assert len(S) == K and abs(float(constraint_values(P, h, S, W).abs().max()) - bayes) < 5e-5
    for xi, risk in ((.02, loose), (0., tight)):
        exact, found = solve_lp(P, S, xi, weights=W), solve_dual(P, S, xi, weights=W)
        assert abs(exact.risk - risk) < 1e-9 and exact.violation <= xi + 1e-9
        assert found.converged and abs(found.risk - risk) < 2e-5 and found.excess <= 1e-6
        assert found.gap >= found.risk - exact.risk - 1e-9 and found.gap - found.gap_tau <= .001 * math.log(3)


def test_ends_of_the_frontier():
    h = torch.nn.functional.one_hot(P.sum(1).argmax(1), 3).to(F64)
    risk = lambda h: 1 - group_confusion_matrices(P, h, W).diagonal(dim1=1, dim2=2).sum().item()
    assert abs(risk(h) - .3320870156) < 1e-10 and abs(solve_lp(P, unbound("dp"), 1., weights=W).risk - risk(h)) < 1e-9
    assert abs(min(risk(torch.eye(3, dtype=F64)[[j] * 12]) for j in range(3)) - .6186267845) < 1e-10


@pytest.mark.parametrize("name, loose, tight", [("dp", .46102112, .47194881), ("eop", .42192586, .43219637), ("eo", .43247785, .45176000)])
def test_attribute_aware_table(name, loose, tight):
    aware = (torch.eye(3, dtype=F64)[None, :, :, None] * (LAW.probability / LAW.probability.sum(2, keepdim=True))[:, :, None]).reshape(36, 3, 3)
    w = LAW.probability.sum(2).flatten()
    for xi, risk in ((.02, loose), (0., tight)):
        assert abs(solve_lp(aware, unbound(name), xi, weights=w).risk - risk) < 6e-9
        assert abs(solve_dual(aware, unbound(name), xi, weights=w).risk - risk) < 2e-5


GAPS = {"dp": [4.8e-2, 2.6e-2, 5.2e-3, 1.1e-3, 1.0e-4], "eop": [5.2e-2, 2.2e-2, 4.7e-3, 8.8e-4, 1.7e-5],
        "eo": [4.9e-2, 2.0e-2, 3.8e-3, 4.6e-4, 1.1e-4], "all": [4.5e-2, 2.4e-2, 3.9e-3, 4.6e-4, 1.2e-5]}


@pytest.mark.parametrize("name", GAPS)
def test_gap_against_temperature(name):
    S = fairness_constraints(ALL[name], P, weights=W)
    exact = solve_lp(P, S, .02, weights=W).risk
    for tau, known in zip([.3, .1, .03, .01, .003], GAPS[name]):
        d = solve_dual(P, S, .02, weights=W, tau=tau)
        assert abs((d.risk - exact) / known - 1) < .06 and d.risk - exact <= d.gap + 1e-9 <= tau * math.log(3) + 1e-6


@pytest.mark.parametrize("name, violation", [("dp", .0210), ("eop", .0537), ("eo", .1128), ("all", .0617)])
def test_argmax_is_not_the_optimum(name, violation):
    d = solve_dual(P, fairness_constraints(ALL[name], P, weights=W), .02, weights=W)
    hard = torch.nn.functional.one_hot(d.scores(P).argmax(1), 3).to(F64)
    assert abs(float(constraint_values(P, hard, d.constraints, W).abs().max()) - violation) < 5e-5


@given(st.integers(1, 14), st.integers(1, 4), st.integers(2, 4), criteria)
@settings(max_examples=15)
def test_laws_of_any_size(n_x, g, m, which):
    law = make_finite_law(n_x, g, m)
    d, exact = (solve(law.joint, unbound(which, g, m), .03, weights=law.weights) for solve in (solve_dual, solve_lp))
    assert d.converged and -1e-7 <= d.risk - exact.risk <= d.gap + 1e-8


# --- the theorems

@given(problems, criteria, conventions, st.sampled_from([0., .001, .05, .3]), st.sampled_from([1e-4, 1e-3, .02, .3]))
@settings(max_examples=40)
def test_feasible_and_certified_at_every_temperature(problem, which, convention, xi, tau):
    J = random_joint(*problem)
    S = fairness_constraints(which, J, convention=convention)
    d, exact = solve_dual(J, S, xi, tau=tau), solve_lp(J, S, xi)
    assert d.converged and d.excess <= 1e-7
    assert -1e-6 <= d.risk - exact.risk <= min(d.gap, tau * math.log(J.shape[2])) + 1e-6
    assert 0 <= d.gap - d.gap_tau <= tau * math.log(J.shape[2]) and abs(d.gap_tau) <= 1e-7


@given(problems, criteria, st.floats(0, .5), st.integers(0, 99))
@settings(max_examples=40)
def test_weak_duality(problem, which, xi, seed):
    J = random_joint(*problem)
    S = fairness_constraints(which, J)
    lam = torch.randn(len(S), dtype=F64, generator=torch.Generator().manual_seed(seed)) * .5
    bound = 1 - fair_scores(J, lam, S).amax(1).mean() - xi * lam.abs().sum()
    assert bound <= solve_lp(J, S, xi).risk + 1e-9


@given(problems, criteria, st.sampled_from([.01, .05]), st.sampled_from([1e-3, .02]))
@settings(max_examples=20)
def test_kkt_and_multiplier_bound(problem, which, xi, tau):
    J = random_joint(*problem)
    d = solve_dual(J, fairness_constraints(which, J), xi, tau=tau)
    D = constraint_values(J, d.predict_proba(J), d.constraints)
    on = d.lam.abs() > 1e-4
    assert (D[on].abs() > xi - 2e-3).all() and (D[on].sign() == d.lam[on].sign()).all() and (D.abs() <= xi + 1e-6).all()
    constant = 1 - float(J.mean((0, 1)).max())
    assert float(d.lam.abs().sum()) <= (constant - (d.risk - d.gap) + tau * math.log(J.shape[2])) / xi + 1e-6


@pytest.mark.parametrize("name", ALL)
def test_no_constraint_bites_when_xi_is_large(name):
    S = fairness_constraints(ALL[name], P, weights=W)
    smooth = (P.sum(1) / .01).softmax(1)
    free = float(constraint_values(P, smooth, S, W).abs().max())
    d = solve_dual(P, S, free + 1e-6, tau=.01, weights=W)
    assert (d.lam == 0).all() and torch.allclose(d.predict_proba(P), smooth) and solve_dual(P, S, free - 1e-3, tau=.01, weights=W).lam.abs().sum() > 0


def test_multipliers_of_the_program():
    "Where the vertex has unique multipliers, both agree: move xi a little, and the price is the slope."
    for name, S in ((n, fairness_constraints(c, P, weights=W)) for n, c in ALL.items()):
        r = solve_lp(P, S, .05, weights=W)
        sides = [solve_lp(P, S, .05 + e, weights=W).risk for e in (-1e-6, 1e-6)]
        assert abs((sides[1] - sides[0]) / 2e-6 + float(r.lam.abs().sum())) < 1e-3, name
        assert abs(float(1 - W @ fair_scores(P, r.lam, S).amax(1) - .05 * r.lam.abs().sum()) - r.risk) < 1e-8, name
        d = solve_dual(P, S, .05, tau=1e-4, weights=W)
        assert abs(float(d.lam.abs().sum() - r.lam.abs().sum())) < .02 * float(r.lam.abs().sum()), name


def test_multipliers_agree_where_unique():
    J = random_joint(60, 2, 2, 1., 3)
    S = fairness_constraints("dp", J)
    r, d = solve_lp(J, S, .05), solve_dual(J, S, .05, tau=1e-4)
    total = lambda x: x.reshape(2, 2)                      # adding a constant over classes changes no decision
    centred = lambda x: total(x) - total(x).mean(1, keepdim=True)
    free = lambda x: (centred(x) / J.mean(0).sum(1)[:, None]) - centred(x).sum(0)
    assert (free(r.lam) - free(d.lam)).abs().max() < .01


@pytest.mark.parametrize("tau", [.3, .01, .001])
def test_price(tau):
    S = fairness_constraints("dp", P, weights=W)
    top = lambda xi: 1 - solve_dual(P, S, xi, weights=W, tau=tau, tol=1e-11).history[-1].objective
    assert abs((top(.0501) - top(.0499)) / 2e-4 + float(solve_dual(P, S, .05, weights=W, tau=tau, tol=1e-10).lam.abs().sum())) < 2e-3


@given(problems, criteria)
@settings(max_examples=10)
@example((2, 3, 3, 5., 338196), "eo")                      # Newton's method creeps
def test_risk_falls_with_xi(problem, which):
    J = random_joint(*problem)
    path = solve_dual_path(J, unbound(which, *J.shape[1:]), [0., .01, .1, .5])
    assert all(d.converged for d in path) and (np.diff([1 - d.history[-1].objective for d in path]) <= 1e-7).all()
    assert [float(d.xi.max()) if len(d.xi) else x for d, x in zip(path, [0., .01, .1, .5])] == [0., .01, .1, .5]


# --- derivatives, and the kernel form against the dense one

@given(problems, criteria, conventions)
@settings(max_examples=20)
def test_kernel_form(problem, which, convention):
    J = random_joint(*problem)
    S = fairness_constraints(which, J, convention=convention)
    lam, G = torch.randn(len(S), dtype=F64), torch.einsum("nai,kaij->njk", J, S.coefficients())
    assert torch.allclose(fair_scores(J, lam, S), J.sum(1) - G @ lam, atol=1e-7)      # own cells may hold 1e-9 of the mass


@pytest.mark.parametrize("tau", [.5, .05, .005])
def test_derivatives(tau):
    J = crowd(300, 2, 3)
    S = fairness_constraints(["dp", "eo"], J)
    w = torch.rand(300, dtype=F64)
    w = w / w.sum()
    lam = torch.randn(len(S), dtype=F64) * .05
    plain = lambda l: tau * (w @ (fair_scores(J, l, S) / tau).logsumexp(1))
    p = fair_dual._Dual(J, S, w, chunk=64)(lam, tau, True)
    assert abs(p.value - float(plain(lam))) < 1e-13
    assert torch.allclose(-p.D, torch.autograd.functional.jacobian(plain, lam), atol=1e-13)
    assert torch.allclose(p.H, torch.autograd.functional.hessian(plain, lam), atol=1e-4 * float(p.H.abs().max()))
    assert float(torch.linalg.eigvalsh(p.H)[-1]) <= fair_dual._Dual(J, S, w).smoothness() / tau


def test_gradcheck():
    J, S = crowd(6, 2, 2), unbound("eo", 2, 2).bind(crowd(6, 2, 2, 1).mean(0))
    z = torch.randn(6, 4, dtype=F64, requires_grad=True)
    lam = torch.randn(len(S), dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, l: fair_scores(z.softmax(1).reshape(6, 2, 2), l, S), (z, lam))


@pytest.mark.parametrize("n, seed", [(3, 0), (8, 1), (30, 2)])
def test_quadratic_model(n, seed):
    rng = np.random.default_rng(seed)
    A, c, xi, v = rng.normal(size=(2 * n, n)), rng.normal(size=n), rng.uniform(0, 1, n), cp.Variable(n)
    cp.Problem(cp.Minimize(cp.sum_squares(A @ v) / 2 + c @ v + xi @ cp.abs(v))).solve("CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    assert abs(fair_dual._l1_quadratic(A.T @ A, c, xi, rng.normal(size=n)) - v.value).max() < 1e-6


# --- exact equality: the equations of the program are dependent

@pytest.mark.parametrize("convention", ["population", "pairwise"])
@pytest.mark.parametrize("which, scale", [("eo", 2), ("eo", 6), ("eop", 6), ("dp", 8), (["dp", "eo"], 4)], ids=str)
def test_program_with_posteriors_near_zero(which, scale, convention):
    "HiGHS calls some of these infeasible, although any constant decision is feasible, if it gets all K equations."
    for n, seed in (500, 0), (1000, 1), (2000, 2):
        gen = torch.Generator().manual_seed(seed)
        J = (scale * torch.randn(n, 3, dtype=F64, generator=gen) @ torch.randn(3, 4, dtype=F64, generator=gen)).softmax(1).reshape(n, 2, 2)
        S = fairness_constraints(which, J, convention=convention)
        exact, dual = solve_lp(J, S, 0.), solve_dual(J, S, 0., tau=1e-4)
        assert exact.violation < 1e-9 and -1e-6 < dual.risk - exact.risk <= dual.gap + 1e-6 and (exact.h >= 0).all()
        assert abs(float(1 - fair_scores(J, exact.lam, S).amax(1).mean()) - exact.risk) < 1e-7          # its multipliers prove it
        mixed = torch.where(torch.arange(len(S)) % 2 == 0, 0., .01).to(F64)                              # some equal, some bounded
        assert abs(solve_lp(J, S, mixed).risk - solve_dual(J, S, mixed, tau=1e-4).risk) < 2e-5


def test_which_equations_are_needed():
    J, w = crowd(50, 3, 3), np.full(50, 1 / 50)
    S = unbound(["dp", "eo"])
    needed = lambda S, xi: fair_dual._independent(J.flatten(1).numpy(), S.coefficients().numpy(), w, xi)
    own, other = S.bind(J.mean(0)), S.bind(crowd(50, 3, 3, 1).mean(0))
    assert needed(own, np.zeros(36)).sum() == own.rank() == 16 and needed(own, np.full(36, .1)).all()
    assert needed(other, np.zeros(36)).sum() > other.rank()                                              # equations that contradict each other are kept
    with pytest.raises(ValueError, match="no rule meets"): solve_lp(J, other, 0.)


# --- somebody else's solver

@pytest.mark.parametrize("which, tau", [("dp", .1), ("eo", .1), ("eop", .02), (["dp", "eo"], .05)])
def test_smoothed_problem_by_cvxpy(which, tau):
    S = fairness_constraints(which, P, weights=W)
    G = torch.einsum("n,nai,kaij->knj", W, P, S.coefficients()).numpy()
    h, w = cp.Variable((12, 3)), W[:, None].numpy().repeat(3, 1)
    value = cp.sum(cp.multiply(w * P.sum(1).numpy(), h)) + tau * cp.sum(cp.multiply(w, cp.entr(h)))
    problem = cp.Problem(cp.Maximize(value), [cp.sum(h, axis=1) == 1, *(cp.abs(cp.sum(cp.multiply(g, h))) <= .02 for g in G)])
    problem.solve("CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    d = solve_dual(P, S, .02, weights=W, tau=tau)
    assert abs(d.predict_proba(P).numpy() - h.value).max() < 2e-5 and abs(problem.value - d.history[-1].objective) < 1e-7


def test_exact_problem_by_cvxpy():
    J = crowd(80, 3, 3)
    S = fairness_constraints("eo", J, convention="pairwise")
    G, h = torch.einsum("nai,kaij->knj", J, S.coefficients()).numpy() / 80, cp.Variable((80, 3), nonneg=True)
    problem = cp.Problem(cp.Minimize(1 - cp.sum(cp.multiply(J.sum(1).numpy() / 80, h))), [cp.sum(h, axis=1) == 1, *(cp.abs(cp.sum(cp.multiply(g, h))) <= .01 for g in G)])
    problem.solve("CLARABEL", tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    assert abs(solve_lp(J, S, .01).risk - problem.value) < 1e-7


# --- options

@pytest.mark.parametrize("method", METHODS)
def test_methods_agree(method):
    S = fairness_constraints("eo", P, weights=W)
    found, known = (solve_dual(P, S, .02, weights=W, tau=.1, method=m, tol=1e-8) for m in (method, "newton"))
    assert found.converged and abs(found.history[-1].objective - known.history[-1].objective) < 1e-8 and abs(found.risk - known.risk) < 1e-5


@pytest.mark.parametrize("which", ["dp", "eo", ["dp", "eo"]])
@pytest.mark.parametrize("xi", [0., .02])
def test_lbfgs_reaches_low_temperatures(which, xi):
    S = fairness_constraints(which, P, weights=W)
    found, known = (solve_dual(P, S, xi, weights=W, method=m) for m in ("lbfgs", "newton"))
    assert found.converged and abs(found.risk - known.risk) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_dtypes_and_devices(dtype, device):
    J = crowd(3000, 2, 3).to(device, dtype)
    d, known = solve_dual(J, unbound(["dp", "eo"], 2, 3), .01), solve_dual(crowd(3000, 2, 3), unbound(["dp", "eo"], 2, 3), .01)
    h = d.predict_proba(J)
    assert d.converged and d.lam.dtype == F64 and d.lam.device.type == device and h.dtype == dtype and h.device.type == device and d.scores(J).dtype == dtype
    assert abs(d.risk - known.risk) < 1e-6 and (h.double().cpu() - known.predict_proba(crowd(3000, 2, 3))).abs().mean() < 1e-3
    assert float(constraint_values(J, h, d.constraints).abs().max()) < .01 + (1e-4 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 4999, None])
def test_chunks_do_not_matter(chunk):
    J = crowd({1: 60, 7: 500}.get(chunk, 5000), 2, 2)
    one, other = solve_dual(J, unbound("eo", 2, 2), .01, chunk=chunk), solve_dual(J, unbound("eo", 2, 2), .01, chunk=len(J))
    assert abs(one.risk - other.risk) < 1e-7 and torch.allclose(one.lam, other.lam, atol=1e-4)


def test_weights_repeat_rows():
    J = crowd(40, 2, 3)
    times = torch.randint(1, 5, (40,))
    for solve in (solve_dual, solve_lp):
        weighted, repeated = solve(J, unbound("eo", 2, 3), .01, weights=times.to(F64)), solve(J.repeat_interleave(times, 0), unbound("eo", 2, 3), .01)
        assert abs(weighted.risk - repeated.risk) < 1e-6 and torch.allclose(weighted.constraints.mass, repeated.constraints.mass)


def test_rows_without_weight_do_not_count():
    J, w = crowd(50, 2, 2), torch.ones(50, dtype=F64)
    w[::2] = 0
    assert abs(solve_dual(J, unbound("dp", 2, 2), .01, weights=w).risk - solve_dual(J[1::2], unbound("dp", 2, 2), .01).risk) < 1e-7


def test_a_bound_for_each_constraint():
    S = fairness_constraints(["dp", "eo"], P, weights=W)
    xi = torch.full((36,), .05, dtype=F64)
    xi[S.rows("eo")] = .2
    d, r = solve_dual(P, S, xi, weights=W), solve_lp(P, S, xi, weights=W)
    D = S.values(d.confusion)
    assert (D.abs() <= xi + 1e-6).all() and abs(d.risk - r.risk) < 2e-5 and D[S.rows("eo")].abs().max() > .06


def test_own_matrices():
    omega = LAW.probability.sum((0, 2))
    D = (omega - torch.eye(3, dtype=F64))[:, :, None, None] * torch.eye(3, dtype=F64)
    S = fairness_constraints(D, P, weights=W)
    d, r = solve_dual(P, S, .01, weights=W), solve_lp(P, S, .01, weights=W)
    accuracy = d.confusion.diagonal(dim1=1, dim2=2).sum(1) / omega
    assert d.converged and abs(d.risk - r.risk) < 2e-5 and (accuracy - (1 - d.risk)).abs().max() <= .01 + 1e-6


def test_thinned_stages_lead_to_the_same_place():
    J = crowd(9000, 3, 2)
    cold, direct = solve_dual(J, unbound("eo", 3, 2), .01), solve_dual(J, unbound("eo", 3, 2), .01, tau=.1)
    direct = solve_dual(J, unbound("eo", 3, 2), .01, init=direct.lam)
    assert cold.history[0].rows < 9000 == cold.history[-1].rows and abs(cold.risk - direct.risk) < 1e-6 and direct.history[0].rows == 9000


def test_one_group_has_nothing_to_compare():
    J = crowd(50, 1, 3)
    for convention in ("population", "pairwise"):
        d, r = (solve(J, unbound("eo", 1, 3, convention=convention), 0.) for solve in (solve_dual, solve_lp))
        assert d.converged and d.violation < 1e-12 and abs(r.risk - float(1 - J.sum(1).amax(1).mean())) < 1e-9 and abs(d.risk - r.risk) < 1e-3


def test_path_and_frontier():
    xis = [.02, .2, .05, .02]
    path, frontier = solve_dual_path(P, unbound("eo"), xis, weights=W), lp_frontier(P, unbound("eo"), xis, weights=W)
    assert [float(d.xi[0]) for d in path] == xis == [float(r.xi[0]) for r in frontier] and path[0] is path[3]
    assert all(d.converged and abs(d.risk - r.risk) < 2e-5 for d, r in zip(path, frontier))


def test_result_travels():
    d = solve_dual(P, unbound("dp"), .02, weights=W)
    again = pickle.loads(pickle.dumps(d))
    assert torch.equal(again.predict_proba(P), d.predict_proba(P)) and "converged=True" in repr(d) and "\n" not in repr(d)
    with pytest.raises(AttributeError): d.risk = 0.
    steps = []
    solve_dual(P, unbound("dp"), .02, weights=W, progress=steps.append)
    assert [s.objective for s in steps] == [s.objective for s in d.history] and d.n_iter < len(steps)


# --- what cannot be done

@pytest.mark.parametrize("method", METHODS[:2])
def test_unbounded_dual_is_noticed(method):
    bound = unbound("dp").bind(LAW.probability.sum(0) + .01 * torch.tensor([[1.], [-1.], [0.]]) / 3)
    with pytest.warns(ConvergenceWarning, match="no rule can meet"): d = solve_dual(P, bound, .002, weights=W, method=method)
    assert not d.converged and d.risk - d.gap > 1
    with pytest.raises(ValueError, match="no rule meets"): solve_lp(P, bound, .002, weights=W)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert solve_dual(P, bound, .05, weights=W, method=method).converged and solve_dual(P, unbound("dp"), 0., weights=W, method=method).converged


@given(problems, st.floats(0, .02), st.integers(0, 99))
@settings(max_examples=15)
def test_infeasible_exactly_when_the_program_is(problem, xi, seed):
    J = random_joint(*problem)
    mass = J.mean(0) * (1 + .05 * torch.randn(J.shape[1:], dtype=F64, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3))
    S = unbound("dp", *J.shape[1:]).bind(mass / mass.sum())
    try: solve_lp(J, S, xi)
    except ValueError: feasible = False
    else: feasible = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        d = solve_dual(J, S, xi)
    if d.risk - d.gap > 1 + 1e-6: assert not feasible
    if d.converged: assert feasible or d.excess <= 1e-7


def test_stopping_early_is_said():
    with pytest.warns(ConvergenceWarning, match="raise max_iter"): d = solve_dual(P, unbound("eo"), .02, weights=W, method="proximal", max_iter=3)
    exact = solve_lp(P, unbound("eo"), .02, weights=W).risk
    assert not d.converged and d.risk - d.gap <= exact                         # the bound holds anyway


J6 = crowd(6, 2, 3)
S6 = unbound("dp", 2, 3)
BAD = {
    "sum": (lambda f: f(2 * J6, S6, .1), "sum to 1"), "negative": (lambda f: f(J6 - .3, S6, .1), ">= 0"), "nan": (lambda f: f(J6 * float("nan"), S6, .1), "NaN"),
    "shape": (lambda f: f(J6[0], S6, .1), r"\[n, groups, classes\]"), "array": (lambda f: f(J6.numpy(), S6, .1), "ndarray"), "transposed": (lambda f: f(J6.mT, S6, .1), "build them for this joint"),
    "criterion": (lambda f: f(J6, "dp", .1), "fairness_constraints"), "xi": (lambda f: f(J6, S6, -.1), "xi must be >= 0"), "xi nan": (lambda f: f(J6, S6, float("nan")), "xi must be a finite"),
    "xi shape": (lambda f: f(J6, S6, torch.zeros(5)), r"\[6\]"), "weights": (lambda f: f(J6, S6, .1, weights=torch.ones(5)), "one entry per row"),
    "negative weights": (lambda f: f(J6, S6, .1, weights=-torch.ones(6)), ">= 0"),
    "group": (lambda f: f(J6 * torch.tensor([[2.], [0.]]) / (2 * J6[:, :1].sum((1, 2), keepdim=True)), S6, .1), "group 1 has no mass"),
    "class": (lambda f: f(torch.cat([J6[..., :2] / J6[..., :2].sum((1, 2), keepdim=True), 0 * J6[..., :1]], 2), S6, .1), "class 2 has no mass")}


@pytest.mark.parametrize("solve", [solve_dual, solve_lp])
@pytest.mark.parametrize("act, message", BAD.values(), ids=BAD)
def test_bad_problem(act, message, solve, untyped):
    with pytest.raises(ValueError, match=message): act(solve)


@pytest.mark.parametrize("options, message", [
    (dict(tau=0.), "tau must be positive"), (dict(tau=-1.), "tau"), (dict(tau=float("nan")), "tau"), (dict(tol=0.), "tol"), (dict(method="sgd"), "method must be"), (dict(max_iter=0), "max_iter"),
    (dict(chunk=0), "chunk"), (dict(init=torch.zeros(5)), "init"), (dict(init=torch.full((6,), float("nan"))), "init")])
def test_bad_options(options, message, untyped):
    with pytest.raises(ValueError, match=message): solve_dual(J6, S6, .1, **options)


def test_scores_need_the_masses_of_the_fit(untyped):
    with pytest.raises(ValueError, match="no normalisers"): fair_scores(J6, torch.zeros(6, dtype=F64), S6)
    with pytest.raises(ValueError, match="lam must be"): fair_scores(J6, torch.zeros(5, dtype=F64), S6.bind(J6.mean(0)))
