"""`fairbook.fair_training`: the calibrated loss against its theorem, the proximal step against cvxpy, the estimator against scikit-learn's checks and exact optima."""
import math
import pickle
import warnings

import cvxpy as cp
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import config_context
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from fairbook.data import is_available, load_adult
from fairbook.fair_baselines import Reweighing
from fairbook.fair_dual import fair_scores, solve_lp
from fairbook.fair_estimators import OptFairPostprocessor, _pick, row_uniforms
from fairbook.fair_training import OptFairClassifier, Round, _encode_groups, calibrated_loss, calibrated_targets, prox_l1_ball
from fairbook.fairness_constraints import fairness_constraints, make_finite_law
from fairbook.metrics import demographic_parity
from fairbook.multiclass_data import make_multiclass
from fairbook.projection import ConvergenceWarning

SMALL = make_multiclass(600)
GROUP = SMALL.groups("group")[0].numpy()
CRITERIA = st.sampled_from(["dp", "eop", "eo", ["dp", "eo"]])


def fit(est, data=SMALL, **more): return est.fit(data.features.to_numpy(), data.label.to_numpy(), sensitive_features=data.sensitive_features, **more)


def some_law(seed, g, m, criteria):
    "A random joint posterior, constraints bound to it, and multipliers."
    gen = torch.Generator().manual_seed(seed)
    joint = torch.rand(15, g * m, generator=gen, dtype=torch.float64).softmax(1).reshape(15, g, m)
    constraints = fairness_constraints(criteria, joint)
    return joint, constraints, torch.randn(len(constraints), generator=gen, dtype=torch.float64) / 5


# ---------------------------------------------------------------- the loss

@given(seed=st.integers(0, 999), g=st.integers(1, 4), m=st.integers(2, 5), criteria=CRITERIA)
def test_theorem_5_1_any_row_constant_keeps_the_argmax(seed, g, m, criteria):
    joint, constraints, lam = some_law(seed, g, m, criteria)
    beta = fair_scores(joint, lam, constraints)
    for kappa in ("row", "global"):
        target = torch.einsum("nay,ayi->ni", joint, calibrated_targets(lam, constraints, kappa))
        added = target - beta
        assert (target >= 0).all() and torch.allclose(added, added[:, :1].expand_as(added), atol=1e-9)


@given(seed=st.integers(0, 999), g=st.integers(1, 4), m=st.integers(2, 5), criteria=CRITERIA)
def test_rows_are_the_sharpest_targets(seed, g, m, criteria):
    _, constraints, lam = some_law(seed, g, m, criteria)
    row, one = (calibrated_targets(lam, constraints, kappa) for kappa in ("row", "global"))
    assert (row <= one + 1e-12).all() and (row.amin(2) == 0).all()


@pytest.mark.parametrize("kappa", ["row", "global"])
def test_without_multipliers_it_is_cross_entropy(kappa):
    constraints, logits = fairness_constraints("eo", make_finite_law().joint), torch.randn(30, 3, dtype=torch.float64)
    y, a, w = torch.randint(3, (30,)), torch.randint(3, (30,)), torch.rand(30, dtype=torch.float64)
    loss = calibrated_loss(logits, y, a, torch.zeros(len(constraints)), constraints, kappa=kappa, weights=w)
    assert torch.isclose(loss, torch.nn.functional.cross_entropy(logits, y, reduction="none") @ w / w.sum(), atol=1e-4 if kappa == "global" else 1e-12)


@pytest.mark.parametrize("kappa", ["row", "global"])
def test_loss_gradients(kappa):
    constraints = fairness_constraints(["dp", "eo"], make_finite_law().joint)
    y, a = torch.randint(3, (8,)), torch.randint(3, (8,))
    logits, lam = torch.randn(8, 3, dtype=torch.float64, requires_grad=True), (torch.randn(len(constraints), dtype=torch.float64) / 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, l: calibrated_loss(f, y, a, l, constraints, kappa=kappa), (logits, lam))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_keeps_the_type(dtype):
    constraints = fairness_constraints("dp", make_finite_law().joint)
    assert calibrated_loss(torch.zeros(2, 3, dtype=dtype), torch.tensor([0, 1]), torch.tensor([2, 1]), torch.zeros(9), constraints).dtype == dtype


BOUND = fairness_constraints("dp", n_groups=2, n_classes=2).bind(torch.full((2, 2), .25))
TWO = torch.tensor([0, 1])
@pytest.mark.parametrize("change, says", [
    (dict(logits=torch.zeros(2, 3)), "columns"), (dict(y=torch.tensor([0, 2])), "y must lie in 0 .. 1"), (dict(y=torch.tensor([0., 1.])), "integer"),
    (dict(y=torch.tensor([0])), "one code per row"), (dict(groups=torch.tensor([-1, 0])), "groups must lie"), (dict(lam=torch.zeros(3)), r"\[4\]"),
    (dict(kappa="col"), "kappa"), (dict(weights=torch.tensor([-1., 1.])), "weights"), (dict(constraints=fairness_constraints("dp", n_groups=2, n_classes=2)), "normalisers")])
def test_loss_bad_input(untyped, change, says):
    good = dict(logits=torch.zeros(2, 2), y=TWO, groups=TWO, lam=torch.zeros(4), constraints=BOUND, kappa="row", weights=None) | change
    with pytest.raises(ValueError, match=says): calibrated_loss(*[good.pop(k) for k in ("logits", "y", "groups", "lam", "constraints")], **good)


# ---------------------------------------------------------------- the proximal step

@given(seed=st.integers(0, 999), K=st.integers(1, 8), radius=st.floats(.05, 5), one=st.booleans())
@settings(max_examples=40)
def test_prox_is_cvxpys(seed, K, radius, one):
    v, xi, eta = torch.randn(3, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    xi, eta, u = xi.abs() / 3, torch.ones(K, dtype=torch.float64) if one else eta.abs() + .1, cp.Variable(K)
    goal = cp.sum_squares(cp.multiply(u - v.numpy(), (2 * eta).rsqrt().numpy())) + xi.numpy() @ cp.abs(u)
    cp.Problem(cp.Minimize(goal), [cp.norm1(u) <= radius]).solve(solver=cp.CLARABEL)
    assert torch.allclose(prox_l1_ball(v, xi, radius, eta), torch.tensor(u.value), atol=1e-4)


@pytest.mark.parametrize("change, says", [(dict(radius=0.), "radius"), (dict(xi=-1.), "xi >= 0"), (dict(step=0.), "step must be > 0"), (dict(radius=math.nan), "radius")])
def test_prox_bad_input(change, says):
    with pytest.raises(ValueError, match=says): prox_l1_ball(torch.ones(3), **dict(xi=.1) | change)


# ---------------------------------------------------------------- groups

@pytest.mark.parametrize("given_, levels", [
    (["b", "a"] * 10, ("a", "b")), (np.array([1, 0] * 10), (0, 1)), (torch.tensor([True, False] * 10), (False, True)), ([1, "a"] * 10, (1, "a")),
    (pd.Series([2., 1.] * 10, index=[5] * 20), (1., 2.)), (pd.DataFrame(dict(u=pd.Categorical(["x", "y"] * 10, ["z", "y", "x"]), v=[1, 2] * 10)), (("x", 1), ("y", 2))),
    (np.array([["a", "c"], ["b", "c"]] * 10), (("a", "c"), ("b", "c")))])
def test_groups_in_any_form(given_, levels):
    codes, found = _encode_groups(given_, 20)
    assert found == levels and sorted(set(codes[:2].tolist())) == [0, 1] and codes[::2].ptp() == 0 if hasattr(codes, "ptp") else found == levels
    again, _ = _encode_groups(given_, 20, known=found)
    assert np.array_equal(codes, again)


@pytest.mark.parametrize("given_, n, known, says", [
    (["a"], 2, None, "one row for each of the 2"), ("a", 1, None, "one value per row"), (5, 1, None, "one value per row"), (["a", None], 2, None, "missing values in 1"),
    ([1., math.nan], 2, None, "missing"), ([[["a"]]], 1, None, "plain values"), (["a", "z"], 2, ("a",), "fit has not seen"), (None, 2, ("a", "b"), "is missing")])
def test_groups_bad_input(given_, n, known, says):
    with pytest.raises(ValueError, match=says): _encode_groups(given_, n, known)


def test_tiny_groups_warn():
    with pytest.warns(UserWarning, match="fewer than 10 rows"): _encode_groups(["a"] * 30 + ["b"], 31)


# ---------------------------------------------------------------- the estimator

class SmallNet:
    "A function (n_features, n_classes) -> module that prints the same in every process, as the names of tests must."
    def __call__(self, d, m): return torch.nn.Sequential(torch.nn.Linear(d, 8), torch.nn.ReLU(), torch.nn.Linear(8, m))
    def __repr__(self): return "small_net"


small_net = SmallNet()


SETTINGS = [OptFairClassifier(), OptFairClassifier(criteria=["dp", "eo"], kappa="global", convention="pairwise", xi=.1, step=None, n_rounds=5),
            OptFairClassifier(criteria="eop", xi=0., radius=2., weight_decay=.01, n_rounds=4), OptFairClassifier(prediction="mixture", n_rounds=6),
            OptFairClassifier(prediction="mixture", random_state=5, kappa="global", n_rounds=3), OptFairClassifier(small_net, n_rounds=2, final_epochs=30, batch_size=32, random_state=0)]


def not_for_minibatches(est):
    "Steps on random minibatches do not repeat a row of weight 2 twice, nor skip one of weight 0."
    why = "AdamW on shuffled minibatches is not a function of the weighted sample"
    return {"check_sample_weight_equivalence_on_dense_data": why} if est.module else {}


@parametrize_with_checks(SETTINGS, expected_failed_checks=not_for_minibatches)
@pytest.mark.filterwarnings("ignore")
def test_sklearn(estimator, check, untyped): check(estimator)


@pytest.mark.filterwarnings("ignore")
def test_unconstrained_is_logistic_regression():
    ours = fit(OptFairClassifier(xi=1., weight_decay=1e-3, kappa="row"))
    peer = LogisticRegression(C=1 / (len(SMALL) * 1e-3), tol=1e-10, max_iter=1000).fit(SMALL.features, SMALL.label)
    assert np.allclose(ours.predict_proba(SMALL.features.to_numpy()), peer.predict_proba(SMALL.features), atol=1e-6) and ours.converged_


@pytest.mark.parametrize("criteria", ["dp", "eop", "eo"])
def test_mixture_approaches_the_exact_optimum(criteria):
    "Theorem 5.2 on a law where each x has logits of its own."
    law = make_finite_law()
    x, a, y = torch.cartesian_prod(torch.arange(12), torch.arange(3), torch.arange(3)).T.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rule = OptFairClassifier(criteria=criteria, xi=.05, prediction="mixture", n_rounds=600, step=None, radius=4., random_state=0).fit(
            np.eye(12)[x], y, sensitive_features=a, sample_weight=law.probability.flatten().numpy())
    exact = solve_lp(law.joint, fairness_constraints(criteria, n_groups=3, n_classes=3), .05, weights=law.weights)
    assert rule.outcome_.excess < .005 and abs(rule.outcome_.risk - exact.risk) < .005


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", [None, small_net], ids=["linear", "network"])
def test_knob_and_determinism(module):
    est = OptFairClassifier(module, criteria="eo", random_state=3, n_rounds=12)
    loose, tight, again = (fit(clone(est).set_params(xi=xi)) for xi in (1., .05, .05))
    assert tight.outcome_.violation < .6 * loose.outcome_.violation and tight.outcome_.risk > loose.outcome_.risk
    assert np.array_equal(tight.predict_proba(SMALL.features.to_numpy()), again.predict_proba(SMALL.features.to_numpy()))
    before = torch.random.get_rng_state()
    fit(est)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.filterwarnings("ignore")
def test_outcome_is_what_predictions_do():
    est = fit(OptFairClassifier(criteria="dp", xi=.1))
    h = torch.nn.functional.one_hot(torch.tensor(est.predict(SMALL.features.to_numpy())), 3).double()
    rates = torch.stack([h[GROUP == b].mean(0) for b in range(3)])
    assert math.isclose((rates - h.mean(0)).abs().max(), est.outcome_.violation, abs_tol=1e-9) and isinstance(est.outcome_, Round)


@pytest.mark.filterwarnings("ignore")
def test_weights_are_repetitions_with_groups():
    w = np.random.default_rng(0).integers(0, 3, len(SMALL))
    weighted = fit(OptFairClassifier(xi=.15), sample_weight=w)
    X, y, a = (np.repeat(t, w, axis=0) for t in (SMALL.features.to_numpy(), SMALL.label.to_numpy(), GROUP))
    repeated = OptFairClassifier(xi=.15, tol=weighted.tol).fit(X, y, sensitive_features=a)
    assert abs(weighted.outcome_.violation - repeated.outcome_.violation) < .02 and abs(weighted.outcome_.risk - repeated.outcome_.risk) < .02


@pytest.mark.filterwarnings("ignore")
def test_pickle_and_grid_search_with_routing():
    est = fit(OptFairClassifier(prediction="mixture", xi=.1, random_state=0))
    assert np.array_equal(pickle.loads(pickle.dumps(est)).predict(SMALL.features.to_numpy()), est.predict(SMALL.features.to_numpy()))
    with config_context(enable_metadata_routing=True):
        search = GridSearchCV(OptFairClassifier(n_rounds=5), dict(xi=[.1, 1.]), cv=2).fit(SMALL.features.to_numpy(), SMALL.label.to_numpy(), sensitive_features=GROUP)
        asks = {type(e).__name__: e.get_metadata_routing().fit.requests for e in (OptFairClassifier(), OptFairPostprocessor(), Reweighing())}
    assert search.best_params_["xi"] == 1. and search.best_estimator_.groups_ == (0, 1, 2)
    assert all(request["sensitive_features"] is True and request["sample_weight"] is None for request in asks.values()), asks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", [None, small_net], ids=["linear", "network"])
def test_mixture_draws_by_content(module):
    est = fit(OptFairClassifier(module, criteria="eo", xi=.05, prediction="mixture", n_rounds=10, random_state=4))
    X = SMALL.features.to_numpy()
    p, labels = est.predict_proba(X), est.predict(X)
    assert len(est.mixture_) > 1 and (p.max(1) < 1).any() and np.allclose(p * len(est.mixture_), np.round(p * len(est.mixture_)))
    assert np.array_equal(labels, est.classes_[_pick(p, row_uniforms(X, est.hash_key_))]) and np.array_equal(est.predict(X[::-3]), labels[::-3])
    open_rows = p.max(1) < 1
    keys = np.mean([np.eye(3)[_pick(p, row_uniforms(X, k))] for k in range(200)], axis=0)
    assert np.abs(keys - p)[open_rows].max() < 5 * .5 / 200**.5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("criteria, xi", [("dp", .1), ("eo", .05), ("eo", .005), (["dp", "eo"], .02)], ids=str)
@pytest.mark.parametrize("module", [None, small_net], ids=["linear", "network"])
def test_no_round_misses_the_bound_by_less(criteria, xi, module):
    est = fit(OptFairClassifier(module, criteria=criteria, xi=xi, n_rounds=15, random_state=0))
    grain = float(est.constraints_.coefficients().abs().max()) / len(SMALL)
    assert est.outcome_.excess <= max(min(r.excess for r in est.history_), est.tol + grain) + 1e-12
    assert est.converged_ == (est.outcome_.excess <= est.tol + grain)
    if module is None: assert abs(est.outcome_.size - float(est.lambda_.abs().sum())) < 1e-12          # the multipliers belong to the rule


@pytest.mark.filterwarnings("ignore")
def test_several_columns_are_intersections():
    table = pd.DataFrame(dict(u=GROUP > 0, v=np.arange(600) % 2))
    est = OptFairClassifier(xi=.2).fit(SMALL.features, SMALL.label, sensitive_features=table)
    assert est.groups_ == ((False, 0), (False, 1), (True, 0), (True, 1)) and est.lambda_.shape == (12,)


@pytest.mark.filterwarnings("ignore")
def test_pictures_and_own_bounds():
    X, y = np.random.default_rng(0).normal(size=(60, 1, 4, 4)), np.arange(60) % 2
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    before = net[1].weight.detach().clone()
    est = OptFairClassifier(net, xi=[.5, .5, .2, .2], random_state=0, n_rounds=3).fit(X, y, sensitive_features=np.arange(60) % 3 % 2)
    assert est.predict(X).shape == (60,) and torch.equal(net[1].weight, before)


def test_warnings():
    with pytest.warns(UserWarning, match="everybody is one group"): OptFairClassifier().fit(SMALL.features, SMALL.label)
    with pytest.warns(ConvergenceWarning, match="exceeds xi"): fit(OptFairClassifier(xi=0., n_rounds=1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change, says", [
    (dict(xi=-.1), "xi must be finite and >= 0"), (dict(xi=[.1, .2]), "each of the 9 constraints"), (dict(xi="a"), "xi must be a number"), (dict(criteria="fair"), "unknown criterion"),
    (dict(kappa="col"), "kappa must be one of"), (dict(prediction="best"), "prediction must be one of"), (dict(n_rounds=0), "n_rounds must be"), (dict(step=0.), "step must be"),
    (dict(radius=-1.), "radius must be"), (dict(tol=-1.), "tol must be"), (dict(step=None, xi=0.), "needs a finite radius"), (dict(module=5), "module must be None"),
    (dict(module=torch.nn.Linear(2, 4)), r"logits \[n, 3\]"), (dict(weight_decay=math.nan), "weight_decay")])
def test_bad_settings(change, says):
    with pytest.raises(ValueError, match=says): fit(OptFairClassifier(**change))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change, says", [
    (dict(y=np.zeros(600)), "one class"), (dict(sample_weight=np.zeros(600)), "non-zero"), (dict(sensitive_features=GROUP[:5]), "one row for each of the 600"),
    (dict(sensitive_features=SMALL.label, criteria="eo"), "no mass in class"), (dict(X=np.full((600, 2), np.nan)), "NaN")])
def test_bad_data(change, says):
    good = dict(X=SMALL.features.to_numpy(), y=SMALL.label, sensitive_features=GROUP) | change
    est = OptFairClassifier(criteria=good.pop("criteria", "dp"))
    with pytest.raises(ValueError, match=says): est.fit(good.pop("X"), good.pop("y"), **good)


# ---------------------------------------------------------------- Adult

@pytest.mark.skipif(not is_available("adult"), reason="Adult is not in the data folder")
@pytest.mark.parametrize("xi, accuracy, violation", [(.05, .8432, .083), (.0155, .8328, .029)])
def test_adult_frontier(xi, accuracy, violation):
    "The figures that the chapter must reach, mean of two seeds; settings were chosen on the rows left out."
    train, test = load_adult("train"), load_adult("test")
    (X, Xt), number = (d.encoded(drop=["sex", "fnlwgt"]) for d in (train, test)), [c for c in train.features.select_dtypes("number") if c != "fnlwgt"]
    Xt[number], X[number] = (Xt[number] - X[number].mean()) / X[number].std(), (X[number] - X[number].mean()) / X[number].std()
    reached = []
    for seed in range(2):
        rows = np.random.default_rng(seed).permutation(len(X))[:int(.7 * len(X))]
        est = OptFairClassifier(xi=xi).fit(X.iloc[rows], train.label.iloc[rows], sensitive_features=train.sensitive_features.sex.iloc[rows])
        decision = est.predict(Xt)
        reached.append([(decision == test.label).mean(), float(demographic_parity(decision, test.groups("sex")[0]))])
    reached = np.mean(reached, 0)
    assert reached[0] >= accuracy and reached[1] <= violation
