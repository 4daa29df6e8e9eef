"""`fairbook.fair_baselines`: every knob lowers its own violation, promises of the papers hold, weights repeat rows, the KL projection is cvxpy's, and bad input is refused."""
import inspect
import pickle

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from fairbook import fair_baselines, fair_dual
from fairbook.fair_baselines import FairBatch, FDivergencePenalty, FrappeHead, KLProjection, Reweighing, _divergence, _shares, project_kl
from fairbook.fair_dual import solve_dual
from fairbook.fairness_constraints import constraint_values, fairness_constraints, make_finite_law
from fairbook.metrics import demographic_parity
from fairbook.multiclass_data import make_multiclass
from fairbook.projection import ConvergenceWarning

TRAIN = make_multiclass(1500)
X, Y, A = TRAIN.features.to_numpy(), TRAIN.label.to_numpy(), TRAIN.groups("group")[0].numpy()
ALL = [Reweighing, FairBatch, FDivergencePenalty, FrappeHead]
NET = lambda d, m: torch.nn.Sequential(torch.nn.Linear(d, 12), torch.nn.ReLU(), torch.nn.Linear(12, m))


def dp(rule): return float(demographic_parity(rule.predict(X), A))
def fit(est): return est.fit(X, Y, sensitive_features=A)


def recall(rule):
    hit = rule.predict(X) == Y
    rates = np.array([[hit[(A == a) & (Y == y)].mean() for y in range(3)] for a in range(3)])
    return np.ptp(rates, axis=0).max()


@parametrize_with_checks([kind(epochs=5, learning_rate=.3) for kind in ALL])
@pytest.mark.filterwarnings("ignore")
def test_sklearn(estimator, check): check(estimator)


@pytest.mark.parametrize("kind, knob, values, violation, drop", [
    (Reweighing, "strength", (0, 1), dp, .0), (FairBatch, "rate", (0, .1), recall, .03), (FDivergencePenalty, "strength", (0, 30, 100), dp, .03),
    (FrappeHead, "strength", (0, 50, 200), dp, .03)])
def test_violation_falls_as_the_knob_grows(kind, knob, values, violation, drop):
    module = None if kind in (Reweighing, FairBatch) else NET
    found = [violation(fit(kind(module=module, epochs=80, random_state=0, **{knob: v}))) for v in values]
    assert all(b < a - drop for a, b in zip(found, found[1:]))


@pytest.mark.parametrize("kind", ALL)
def test_weights_repeat_rows_in_every_term(kind):
    "scikit-learn's check knows no groups; here they matter. All rows in one batch, where the claim is exact."
    times, knob = np.random.default_rng(0).integers(0, 4, 300), dict(rate=.2) if kind is FairBatch else dict(strength=.7 if kind is Reweighing else 30)
    est, other = (kind(epochs=20, learning_rate=.1, batch_size=2000, random_state=0, **knob) for _ in range(2))
    est.fit(X[:300], Y[:300], sensitive_features=A[:300], sample_weight=times)
    other.fit(X[:300].repeat(times, 0), Y[:300].repeat(times), sensitive_features=A[:300].repeat(times))
    free = clone(est).set_params(**{k: 0 for k in knob}).fit(X[:300], Y[:300], sensitive_features=A[:300], sample_weight=times)
    p, q = est.predict_proba(X), free.predict_proba(X)
    assert np.allclose(p, other.predict_proba(X), atol=1e-6) and not np.allclose(p, q, atol=1e-3)      # and the knob is at work


@pytest.mark.parametrize("base", [None, make_pipeline(StandardScaler(), LogisticRegression())], ids=["default", "pipeline"])
def test_head_fits_its_base_with_the_weights(base):
    head = FrappeHead(base, epochs=1).fit(X, Y, sensitive_features=A, sample_weight=np.where(Y == 0, 100., 1.))
    known = LogisticRegression(max_iter=1000).fit(X if base is None else head.estimator_[0].transform(X), Y, sample_weight=np.where(Y == 0, 100., 1.))
    assert np.abs(head.estimator_.predict_proba(X) - known.predict_proba(X if base is None else head.estimator_[0].transform(X))).max() < 1e-6
    assert (head.estimator_.predict(X) == 0).mean() > (fit(FrappeHead(base, epochs=1)).estimator_.predict(X) == 0).mean() + .2


def test_head_leaves_a_frozen_base_alone_whatever_the_weights():
    base = LogisticRegression().fit(X, Y)
    head = FrappeHead(FrozenEstimator(base), epochs=1).fit(X, Y, sensitive_features=A, sample_weight=np.where(Y == 0, 100., 1.))
    assert np.array_equal(head.estimator_.predict_proba(X), base.predict_proba(X))


@pytest.mark.parametrize("kind", ALL)
def test_settings_are_stored_as_they_came(kind):
    module, names = torch.nn.Linear(2, 3), [k for k in inspect.signature(kind).parameters]
    est = kind(module=module, epochs=7, device="cpu")
    assert sorted(vars(est)) == sorted(names) == sorted(est.get_params(deep=False)) and est.module is module and est.epochs == 7
    again = clone(est.set_params(epochs=9, learning_rate=.5))
    assert (again.epochs, again.learning_rate) == (9, .5) and pickle.loads(pickle.dumps(again)).get_params(deep=False).keys() == again.get_params(deep=False).keys()


def test_reweighing_makes_group_and_class_independent():
    est = fit(Reweighing(epochs=1, random_state=0))
    rows = est._rows(X, Y, A, None)
    before, after = _shares(rows)[0], _shares(est._weigh(rows))[0]
    assert torch.allclose(after, before.sum(1, keepdim=True) * before.sum(0)) and not torch.allclose(before, after, atol=1e-2)


def test_fair_batch_keeps_class_totals():
    est = fit(FairBatch(rate=.2, epochs=10, random_state=0))
    assert np.allclose(est.sampling_.sum(0), np.bincount(Y) / len(Y)) and (est.sampling_ > 0).all()


def test_divergence_is_scikit_learns_mutual_information():
    s = torch.nn.functional.one_hot(torch.tensor(Y), 3).double()
    assert np.isclose(float(_divergence(s, torch.tensor(A), 3, "kl")), mutual_info_score(A, Y))


@pytest.mark.parametrize("kind", ["kl", "chi2"])
def test_divergence_is_zero_under_independence_and_has_gradients(kind):
    a, s = torch.arange(12) % 3, torch.rand(4, 3, dtype=torch.float64).softmax(1).repeat_interleave(3, 0).requires_grad_()
    assert abs(float(_divergence(s, a, 3, kind).detach())) < 1e-12
    assert torch.autograd.gradcheck(lambda t: _divergence(t.softmax(1), a, 3, kind), torch.randn(12, 3, dtype=torch.float64, requires_grad=True))


def test_head_without_penalty_stays_with_its_base():
    base = LogisticRegression().fit(X, Y)
    head = fit(FrappeHead(FrozenEstimator(base), strength=0., random_state=0))
    assert np.abs(head.predict_proba(X) - base.predict_proba(X)).max() < .05 and np.array_equal(base.coef_, head.estimator_.estimator.coef_)


@pytest.mark.parametrize("kind", ALL)
def test_random_state_decides_everything(kind):
    one, same, other = (fit(kind(module=NET, epochs=2, random_state=s)).predict_proba(X) for s in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.parametrize("kind", ALL)
def test_names_and_intersections(kind):
    names, pairs = np.array(["u", "v", "w"])[Y], np.stack([A > 0, np.arange(1500) % 2], 1)
    est = clone(kind(epochs=2, random_state=0)).fit(X, names, sensitive_features=pairs)
    assert set(est.predict(X)) <= {"u", "v", "w"} and len(est.groups_) == 4
    with pytest.warns(UserWarning, match="one group"): kind(epochs=1).fit(X, names)


@pytest.mark.parametrize("est, change, says", [
    (Reweighing(strength=-1), {}, "strength must be"), (Reweighing(strength=40.), {}, "weights negative"), (FairBatch(rate=-1), {}, "rate must be"),
    (FDivergencePenalty(divergence="tv"), {}, "divergence must be one of"), (FDivergencePenalty(batch_size=0), {}, "batch_size must be"),
    (FrappeHead(FrozenEstimator(LogisticRegression().fit(X, Y > 0))), {}, "estimator must have the classes"),
    (FrappeHead(KNeighborsClassifier()), dict(sample_weight=np.ones(len(Y))), "KNeighborsClassifier.fit does not take it"), (Reweighing(module="big"), {}, "module must be None"),
    (Reweighing(), dict(sensitive_features=A[:3]), "one row for each"), (FairBatch(), dict(y=0 * Y), "one class"), (FrappeHead(epochs=0), {}, "epochs must be")])
def test_bad_input(est, change, says):
    with pytest.raises(ValueError, match=says): est.fit(X, **dict(y=Y, sensitive_features=A) | change)


# --- the KL projection

F64, LAW = torch.float64, make_finite_law()
P, W = LAW.joint, LAW.weights
ALLC = {"dp": "dp", "eop": "eop", "eo": "eo", "all": ["dp", "eo"]}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
problems = st.tuples(st.sampled_from([1, 2, 5, 12, 40]), st.integers(1, 4), st.integers(2, 4), st.sampled_from([.1, 1., 5.]), st.integers(0, 10**6))
criteria, conventions, bounds = st.sampled_from(["dp", "eop", "eo", ["dp", "eo"]]), st.sampled_from(["population", "pairwise"]), st.sampled_from([0., .001, .05, .3])


def unbound(which, g=3, m=3, **options): return fairness_constraints(which, n_groups=g, n_classes=m, **options)
def kl(h, eta): return torch.where(h > 0, h * (h / eta).log(), 0.).sum(1)


def random_joint(n, g, m, spread, seed):
    J = np.random.default_rng(seed).dirichlet(np.full(g * m, spread), n) + 1e-9
    return torch.from_numpy(J / J.sum(1, keepdims=True)).reshape(n, g, m)


def crowd(n, g, m, seed=0):
    "A posterior that is logistic in four features; its groups differ."
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 4, dtype=F64, generator=gen) @ torch.randn(4, g * m, dtype=F64, generator=gen)).softmax(1).reshape(n, g, m)


@pytest.mark.parametrize("xi", [0., .02, .1])
@pytest.mark.parametrize("which", ALLC)
def test_projection_by_cvxpy(which, xi):
    S = fairness_constraints(ALLC[which], P, weights=W)
    G, h, eta = torch.einsum("n,nai,kaij->knj", W, P, S.coefficients()).numpy(), cp.Variable((12, 3)), P.sum(1).numpy()
    problem = cp.Problem(cp.Minimize(cp.sum(W.numpy() @ cp.rel_entr(h, eta))), [cp.sum(h, axis=1) == 1, *(cp.abs(cp.sum(cp.multiply(g, h))) <= xi for g in G)])
    problem.solve("CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    r = project_kl(P, S, xi, weights=W)
    assert r.converged and abs(r.value - problem.value) < 1e-7 and abs(r.predict_proba(P).numpy() - h.value).max() < 1e-4
    assert abs(r.value - float(W @ kl(r.predict_proba(P), P.sum(1)))) < 1e-10 and abs(r.violation - float(constraint_values(P, r.predict_proba(P), S, W).abs().max())) < 1e-10


@given(problems, criteria, conventions, bounds)
@settings(max_examples=40)
def test_projection_meets_its_bound_and_pythagoras(problem, which, convention, xi):
    "Csiszar: KL(q | eta) >= KL(q | h) + KL(h | eta) for every feasible q; here classifiers of low risk, and a constant one."
    J = random_joint(*problem)
    S, eta = fairness_constraints(which, J, convention=convention), J.sum(1)
    r = project_kl(J, S, xi)
    h = r.predict_proba(J)
    assert r.converged and r.violation <= xi + 1e-7 and abs(r.gap) <= 1e-7
    for q in (solve_dual(J, S, xi, tau=.02).predict_proba(J), solve_dual(J, S, xi, tau=.5).predict_proba(J), eta.mean(0).expand_as(eta)):
        assert float(kl(q, eta).mean()) >= float(kl(q, h).mean()) + r.value - 2e-7 * (1 + float(r.lam.abs().sum()))


@given(problems, criteria, bounds, st.integers(0, 99))
@settings(max_examples=30)
def test_weak_duality_of_the_projection(problem, which, xi, seed):
    J = random_joint(*problem)
    S = fairness_constraints(which, J)
    f = fair_baselines._Projection(J, S, torch.full((len(J),), 1 / len(J), dtype=F64))
    lam = torch.randn(len(S), dtype=F64, generator=torch.Generator().manual_seed(seed)) * .5
    assert f.most - f(lam).total(torch.full_like(lam, xi)) <= project_kl(J, S, xi).value + 1e-6


def test_projection_is_the_smoothed_dual_of_tilted_scores():
    "Where eta = softmax(score / tau), the smoothed programme of the scores and the projection of eta are one."
    J, tau = crowd(40, 2, 3), .2
    S = fairness_constraints("dp", J)
    tilted = J.sum(2)[:, :, None] * (J.sum(1) / tau).softmax(1)[:, None]                        # the same groups, eta tilted; dp sees groups only
    d, r = solve_dual(J, S, .01, tau=tau, tol=1e-10), project_kl(tilted, S, .01, tol=1e-10)
    assert torch.allclose(d.predict_proba(J), r.predict_proba(tilted), atol=1e-6) and r.lam.abs().sum() > .01
    assert torch.allclose(S.values(d.confusion), constraint_values(tilted, r.predict_proba(tilted), S), atol=1e-7)


def test_nothing_moves_when_the_bound_is_loose():
    S = fairness_constraints("eo", P, weights=W)
    free = float(constraint_values(P, P.sum(1), S, W).abs().max())
    r = project_kl(P, S, free + 1e-6, weights=W)
    assert r.n_iter == 0 and r.value < 1e-12 and (r.lam == 0).all() and torch.allclose(r.predict_proba(P), P.sum(1)) and project_kl(P, S, free - 1e-3, weights=W).lam.abs().sum() > 0


def test_multipliers_are_the_price_of_the_projection():
    S = fairness_constraints("dp", P, weights=W)
    value = lambda xi: project_kl(P, S, xi, weights=W, tol=1e-11).value
    assert abs((value(.0501) - value(.0499)) / 2e-4 + float(project_kl(P, S, .05, weights=W, tol=1e-11).lam.abs().sum())) < 1e-3
    assert (np.diff([value(x) for x in (0., .01, .05, .2, 1.)]) <= 0).all()


def test_projection_draws_lose_and_argmax_breaks_the_bound():
    J = make_multiclass(4000, seed=2).joint
    S, eta, right = unbound("dp", convention="pairwise"), J.sum(1), lambda h: float((eta * h).sum(1).mean())
    for xi in (.02, .1):
        h = project_kl(J, S, xi).predict_proba(J)
        hard = torch.nn.functional.one_hot(h.argmax(1), 3).to(F64)
        assert right(h) < 1 - solve_dual(J, S, xi).risk - .05 and float(constraint_values(J, hard, S).abs().max()) > 1.2 * xi >= 1.2 * (float(constraint_values(J, h, S).abs().max()) - 1e-7)
    assert abs(right(project_kl(J, S, 1.).predict_proba(J)) - float((eta**2).sum(1).mean())) < 1e-9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_projection_dtypes_and_devices(dtype, device):
    J = crowd(500, 2, 3)
    r, known = project_kl(J.to(device, dtype), unbound("eo", 2), .01), project_kl(J, unbound("eo", 2), .01)
    h = r.predict_proba(J.to(device, dtype))
    assert r.converged and r.lam.abs().sum() > .1 and r.lam.dtype == F64 and r.lam.device.type == device and h.dtype == dtype and h.device.type == device
    assert abs(r.value - known.value) < 1e-6 and (h.double().cpu() - known.predict_proba(J)).abs().max() < 1e-5


def test_projection_weights_repeat_rows():
    J, times = crowd(40, 2, 3), torch.randint(0, 5, (40,))
    one, other = project_kl(J, unbound("eo", 2), .01, weights=times.to(F64)), project_kl(J.repeat_interleave(times, 0), unbound("eo", 2), .01)
    assert one.value > .01 and abs(one.value - other.value) < 1e-9 and torch.allclose(one.predict_proba(J), other.predict_proba(J), atol=1e-5)


def test_chunks_and_lbfgs_lead_to_the_same_projection(monkeypatch):
    J = crowd(3000, 2, 3)
    known = project_kl(J, unbound("eo", 2), .01)
    monkeypatch.setattr(fair_baselines, "_solver", lambda *args: (fair_dual._lbfgs, 2000))
    found = project_kl(J, unbound("eo", 2), .01)
    assert found.converged and found.n_iter > known.n_iter and abs(found.value - known.value) < 1e-7
    f = fair_baselines._Projection
    w = torch.full((3000,), 1 / 3000, dtype=F64)
    one, other = (f(J, known.constraints, w, c)(known.lam, 1., True) for c in (7, 3000))
    assert abs(one.value - other.value) < 1e-12 and torch.allclose(one.D, other.D) and torch.allclose(one.H, other.H, atol=1e-9)


def test_impossible_classes_stay_impossible():
    J = crowd(30, 2, 3)
    J[:10, :, 2] = 0
    J = J / J.sum((1, 2), keepdim=True)
    r = project_kl(J, unbound("dp", 2), .01)
    h = r.predict_proba(J)
    assert r.converged and (h[:10, 2] == 0).all() and h.isfinite().all() and r.lam.abs().sum() > 0


def test_impossible_bound_is_noticed():
    "Where eta is 0 or 1, nothing can move."
    J = torch.zeros(4, 2, 2, dtype=F64)
    J[[0, 1, 2, 3], [0, 0, 1, 1], [0, 1, 1, 1]] = 1
    with pytest.warns(ConvergenceWarning, match="no rule can meet"): r = project_kl(J, unbound("dp", 2, 2), .1)
    assert not r.converged and r.violation == .25
    assert project_kl(J, unbound("dp", 2, 2), .25).converged


def test_projection_stopped_early_says_so():
    with pytest.warns(ConvergenceWarning, match="raise max_iter"): r = project_kl(P, unbound("eo"), .02, weights=W, max_iter=1)
    assert not r.converged and r.n_iter == 1 and r.value - r.gap <= project_kl(P, unbound("eo"), .02, weights=W).value


def test_a_bound_for_each_row_and_nothing_to_compare():
    S, xi = fairness_constraints(["dp", "eo"], P, weights=W), torch.full((36,), .001, dtype=F64)
    xi[S.rows("dp")] = .2
    D = constraint_values(P, project_kl(P, S, xi, weights=W).predict_proba(P), S, W)
    assert (D.abs() <= xi + 1e-7).all() and D[S.rows("dp")].abs().max() > .0015
    J = random_joint(50, 1, 3, 1., 0)
    for convention in ("population", "pairwise"):
        r = project_kl(J, unbound("eo", 1, convention=convention), 0.)
        assert r.converged and r.violation < 1e-12 and torch.allclose(r.predict_proba(J), J.sum(1))


def test_projection_travels():
    r = project_kl(P, unbound("dp"), .02, weights=W)
    again = pickle.loads(pickle.dumps(r))
    assert isinstance(again, KLProjection) and torch.equal(again.predict_proba(P), r.predict_proba(P)) and "converged=True" in repr(r) and "\n" not in repr(r)
    with pytest.raises(AttributeError): r.value = 0.


J6, S6 = random_joint(6, 2, 3, 1., 0), unbound("dp", 2)
BAD = {
    "sum": (lambda f: f(2 * J6, S6, .1), "sum to 1"), "negative": (lambda f: f(J6 - .3, S6, .1), ">= 0"), "nan": (lambda f: f(J6 * float("nan"), S6, .1), "NaN"),
    "shape": (lambda f: f(J6[0], S6, .1), r"\[n, groups, classes\]"), "array": (lambda f: f(J6.numpy(), S6, .1), "ndarray"), "transposed": (lambda f: f(J6.mT, S6, .1), "build them for this joint"),
    "criterion": (lambda f: f(J6, "dp", .1), "fairness_constraints"), "xi": (lambda f: f(J6, S6, -.1), "xi must be >= 0"), "xi nan": (lambda f: f(J6, S6, float("nan")), "xi must be a finite"),
    "xi shape": (lambda f: f(J6, S6, torch.zeros(5)), r"\[6\]"), "weights": (lambda f: f(J6, S6, .1, weights=torch.ones(5)), "one entry per row"),
    "negative weights": (lambda f: f(J6, S6, .1, weights=-torch.ones(6)), ">= 0"), "tol": (lambda f: f(J6, S6, .1, tol=0.), "tol must be"), "max_iter": (lambda f: f(J6, S6, .1, max_iter=0), "max_iter must be"),
    "group": (lambda f: f(J6 * torch.tensor([[2.], [0.]]) / (2 * J6[:, :1].sum((1, 2), keepdim=True)), S6, .1), "group 1 has no mass"),
    "rows to predict": (lambda f: f(J6, S6, .1).predict_proba(J6.numpy()), "ndarray"), "sizes to predict": (lambda f: f(J6, S6, .1).predict_proba(J6.mT), "build them for this joint")}


@pytest.mark.parametrize("act, message", BAD.values(), ids=BAD)
def test_bad_problem(act, message, untyped):
    with pytest.raises(ValueError, match=message): act(project_kl)
