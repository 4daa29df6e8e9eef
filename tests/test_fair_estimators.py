"""OptFairPostprocessor: scikit-learn's contract, the bound and its certificate, decisions by hash, groups, labels, calibration, and errors."""
import pickle
import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from fairlearn.metrics import MetricFrame, demographic_parity_difference, selection_rate
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse
from scipy.stats import kstest
from sklearn import config_context
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import GridSearchCV, KFold, ShuffleSplit, cross_val_predict, cross_validate
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from fairbook.data import is_available, load_adult
from fairbook.fair_dual import fair_scores, solve_dual, solve_lp
from fairbook.fair_estimators import OptFairPostprocessor, _calibrator, _pick, row_uniforms
from fairbook.fairness_constraints import constraint_values, fairness_constraints
from fairbook.metrics import demographic_parity, equalized_odds
from fairbook.multiclass_data import load_acs_education, load_dutch_education, make_multiclass

DATA, TEST = make_multiclass(1200, seed=0), make_multiclass(4000, seed=1)
X, Y, S = DATA.features.to_numpy(), DATA.label.to_numpy(), DATA.sensitive_features["group"].astype(str).to_numpy()
GIVEN = dict(sensitive_features=S)


def fitted(*args, **settings): return OptFairPostprocessor(*args, **settings).fit(X, Y, **GIVEN)


def one_hot(a, y, g, m): return torch.nn.functional.one_hot(torch.as_tensor(np.asarray(a) * m + np.asarray(y)), g * m).reshape(-1, g, m).double()


# --- scikit-learn's contract: no check is exempt

ESTIMATORS = [OptFairPostprocessor(), OptFairPostprocessor(DecisionTreeClassifier(max_depth=3), criteria=["dp", "eo"], method="argmax"), OptFairPostprocessor(recalibrate="vector", cv=3),
              OptFairPostprocessor(criteria="eop", convention="pairwise", xi=0., tau=.1, random_state=3), OptFairPostprocessor(method="draw", attribute_aware=True),
              OptFairPostprocessor(recalibrate="isotonic"), OptFairPostprocessor(criteria="eo", recalibrate=True)]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks(ESTIMATORS, expected_failed_checks=lambda estimator: {})
def test_scikit_learn(estimator, check, untyped): check(estimator)


@pytest.mark.parametrize("copy", [clone, lambda e: pickle.loads(pickle.dumps(e))], ids=["clone", "pickle"])
def test_copies_decide_alike(copy):
    e = fitted(criteria="eo", xi=.03, random_state=3)
    twin = copy(e)
    if not hasattr(twin, "classes_"): twin.fit(X, Y, **GIVEN)
    assert np.array_equal(twin.predict(TEST.features.to_numpy()), e.predict(TEST.features.to_numpy()))
    assert np.array_equal(twin.lambda_, e.lambda_)


def test_own_matrices_survive_clone_and_grid_search():
    named = fitted(xi=.02)
    D = named.constraints_.matrices()
    own = fitted(criteria=D, xi=.02)
    assert np.allclose(own.predict_proba(X), named.predict_proba(X), atol=1e-4) and own.constraints_.names[0] == "own 0"
    assert np.allclose(fitted(criteria=D.numpy(), xi=.02).lambda_, own.lambda_)
    assert torch.equal(clone(own).criteria, D)


def test_sensitive_features_are_routed():
    with config_context(enable_metadata_routing=True):
        chain = make_pipeline(StandardScaler(), OptFairPostprocessor(xi=.02))
        search = GridSearchCV(chain, {"optfairpostprocessor__xi": [.02, .4]}, cv=3).fit(X, Y, **GIVEN)
        assert search.best_estimator_[-1].groups_ == ("group 0", "group 1", "group 2") and search.best_params_["optfairpostprocessor__xi"] == .4
        scores = cross_validate(OptFairPostprocessor(attribute_aware=True), X, Y, cv=3, params=GIVEN)["test_score"]
        assert np.isfinite(scores).all() and scores.min() > .5
        out = cross_val_predict(OptFairPostprocessor(), X, Y, cv=3, params=GIVEN, method="predict_proba")
        weighted = make_pipeline(StandardScaler().set_fit_request(sample_weight=True), OptFairPostprocessor().set_fit_request(sample_weight=True)).fit(X, Y, **GIVEN, sample_weight=np.ones(len(Y)))
    assert out.shape == (len(Y), 3) and np.allclose(weighted[-1].predict_joint(weighted[0].transform(X)), fitted().predict_joint(X), atol=1e-3)


def test_a_pipeline_without_routing():
    chain = make_pipeline(StandardScaler(), OptFairPostprocessor()).fit(X, Y, optfairpostprocessor__sensitive_features=S)
    assert np.allclose(chain.predict_proba(X), fitted().predict_proba(X), atol=1e-2)


def test_feature_names_and_numbers():
    e = OptFairPostprocessor().fit(DATA.features, Y, **GIVEN)
    assert e.feature_names_in_.tolist() == ["x0", "x1"] and e.n_features_in_ == 2
    with pytest.raises(ValueError, match="feature names"): e.predict(DATA.features[["x1", "x0"]])
    with pytest.raises(ValueError, match="3 features"): e.predict(np.zeros((2, 3)))


# --- the bound, and how far from the best

@pytest.mark.parametrize("criteria", ["dp", "eop", "eo", ["dp", "eo"]], ids=str)
@pytest.mark.parametrize("convention", ["population", "pairwise"])
@pytest.mark.parametrize("xi", [0., .02])
def test_bound_and_certificate(criteria, convention, xi):
    e = fitted(criteria=criteria, xi=xi, convention=convention)
    joint = torch.from_numpy(e.predict_joint(X))
    h = torch.from_numpy(e.predict_proba(X))
    assert e.certificate_.converged and constraint_values(joint, h, e.constraints_).abs().max() <= xi + 1e-6
    best = solve_lp(joint, e.constraints_, xi)
    assert -1e-6 <= e.certificate_.risk - best.risk <= e.certificate_.gap + 1e-6 and e.certificate_.gap <= 1e-3 * np.log(3) + 1e-6
    assert abs(1 - float((joint.sum(1) * h).sum(1).mean()) - e.certificate_.risk) < 1e-9


def test_new_rows_keep_the_bound_up_to_sampling():
    big = make_multiclass(20_000, seed=5)
    e = OptFairPostprocessor(xi=.01).fit(big.features, big.label, sensitive_features=big.sensitive_features)
    h = torch.from_numpy(e.predict_proba(TEST.features))
    assert constraint_values(TEST.joint, h, fairness_constraints("dp", TEST.joint)).abs().max() < .02


def test_attribute_aware_is_no_worse_and_needs_the_group():
    blind, aware = fitted(xi=.01), fitted(xi=.01, attribute_aware=True)
    assert aware.certificate_.risk <= blind.certificate_.risk + 1e-3
    assert np.allclose(aware.predict_joint(X, sensitive_features=S).sum((1, 2)), 1) and aware.score(X, Y, sensitive_features=S) > .5
    with pytest.raises(ValueError, match="sensitive_features"): aware.predict(X)
    with pytest.raises(ValueError, match="has not seen"): aware.predict(X[:2], sensitive_features=["group 0", "other"])


def test_no_groups_no_constraint():
    with pytest.warns(UserWarning, match="nothing is constrained"): e = OptFairPostprocessor().fit(X, Y)
    plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(X, Y)
    assert not e.lambda_.any() and e.groups_ == (None,) and np.array_equal(e.predict(X), plain.predict(X))


@pytest.mark.parametrize("xi", [.5, np.full(9, .5)], ids=["number", "array"])
def test_a_loose_bound_changes_nothing(xi):
    e = fitted(xi=xi)
    assert not e.lambda_.any() and np.array_equal(e.predict(X), e.classes_[e.predict_joint(X).sum(1).argmax(1)])


@pytest.mark.parametrize("make", [lambda: LogisticRegression(), lambda: GaussianNB(), lambda: RandomForestClassifier(10, min_samples_leaf=20, random_state=0), lambda: make_pipeline(StandardScaler(), LogisticRegression())])
def test_a_weight_is_a_number_of_copies(make):
    w = np.random.default_rng(0).integers(0, 3, len(Y))
    many = np.repeat(np.arange(len(Y)), w)
    one = OptFairPostprocessor(make(), tau=.05).fit(X, Y, **GIVEN, sample_weight=w)
    two = OptFairPostprocessor(make(), tau=.05).fit(X[many], Y[many], sensitive_features=S[many])
    if not isinstance(make(), RandomForestClassifier): assert np.allclose(one.predict_proba(X), two.predict_proba(X), atol=2e-2)
    assert abs(one.certificate_.risk - two.certificate_.risk) < (.05 if isinstance(make(), RandomForestClassifier) else 1e-3)


def test_rows_without_weight_do_not_count():
    keep = Y != 1
    odd = np.where(keep, S, "nobody")
    one = OptFairPostprocessor().fit(X, Y, sensitive_features=odd, sample_weight=keep.astype(float))
    two = OptFairPostprocessor().fit(X[keep], Y[keep], sensitive_features=S[keep])
    assert one.groups_ == two.groups_ and one.classes_.tolist() == [0, 2] and np.allclose(one.predict_proba(X), two.predict_proba(X), atol=1e-3)


# --- decisions

DTYPES = [np.float64, np.float32, np.int64, np.int8, np.bool_]


@given(hnp.arrays(np.int8, st.tuples(st.integers(1, 30), st.integers(1, 4)), elements=st.integers(0, 1)), st.integers(0, 2**64 - 1), st.permutations(range(30)))
def test_hash_depends_on_content_alone(x, key, order):
    u, order = row_uniforms(x, key), [i for i in order if i < len(x)]
    for same in (*(x.astype(d) for d in DTYPES), np.asfortranarray(x), x.tolist(), pd.DataFrame(x), pd.DataFrame(x).astype("category"), sparse.csr_array(x), torch.tensor(x), -(-x.astype(float))):
        assert np.array_equal(row_uniforms(same, key), u)
    assert np.array_equal(row_uniforms(x[order], key), u[order]) and ((0 <= u) & (u < 1)).all()
    assert len(set(u)) == len(np.unique(x, axis=0))


@pytest.mark.parametrize("x", [np.arange(4000.)[:, None], make_multiclass(4000).features, pd.DataFrame({"id": [f"person {k}" for k in range(4000)]})], ids=["count", "normal", "text"])
@pytest.mark.parametrize("key", [0, 1, 2**40])
def test_hash_looks_uniform(x, key):
    u = row_uniforms(x, key)
    assert kstest(u, "uniform").pvalue > 1e-3 and abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 4 / len(u)**.5


def test_hash_of_mixed_tables():
    table = pd.DataFrame({"a": [1, 2, 1], "b": ["x", "y", "x"], "c": [None, "z", None], "d": [np.nan, 0., np.nan]})
    u = row_uniforms(table)
    assert u[0] == u[2] != u[1] and np.array_equal(row_uniforms(table.astype({"b": "category", "a": np.float32})), u)
    assert np.array_equal(row_uniforms(table.to_numpy()), row_uniforms(table.astype(object)))
    assert (row_uniforms(["a text", "another", "a text"]) == row_uniforms(["a text"])).tolist() == [True, False, True]


def test_hash_of_lists_of_mixed_kind():
    "numpy would turn numbers beside text into text; the hash does not."
    table = pd.DataFrame({"age": [31, 44], "job": ["nurse", "clerk"], "in": [True, False]})
    rows = table.to_numpy().tolist()
    for same in (rows, [tuple(r) for r in rows], [[31., "nurse", 1], [44, "clerk", np.bool_(False)]], np.array(rows, dtype=object)):
        assert np.array_equal(row_uniforms(same), row_uniforms(table))
    assert np.array_equal(row_uniforms([["a"], ["b"]]), row_uniforms(np.array([["a"], ["b"]]))) and not np.array_equal(row_uniforms(np.array(rows)), row_uniforms(table))


@pytest.mark.parametrize("key", [-1, 2**64])
def test_a_key_out_of_range(key):
    with pytest.raises(ValueError, match="seed"): row_uniforms(X, key)


@given(hnp.arrays(float, st.tuples(st.integers(1, 20), st.integers(2, 5)), elements=st.floats(0, 1)), st.integers(0, 99))
def test_pick_follows_the_probabilities(p, seed):
    p = p + 1e-12
    p /= p.sum(1, keepdims=True)
    chosen = _pick(p, np.random.default_rng(seed).random(len(p)))
    assert (p[np.arange(len(p)), chosen] > 0).all() and ((0 <= chosen) & (chosen < p.shape[1])).all()
    grid = (np.arange(2000) + .5) / 2000
    assert np.abs(np.bincount(_pick(p[:1].repeat(2000, 0), grid), minlength=p.shape[1]) / 2000 - p[0]).max() < 1e-3


def test_methods_of_deciding():
    e = fitted(xi=0., tau=.05, random_state=1)
    p = e.predict_proba(TEST.features.to_numpy())
    rows = TEST.features.to_numpy()
    assert np.array_equal(e.predict(rows, method="argmax"), p.argmax(1))
    for method in ("hash", "draw"):
        labels = e.predict(rows, method=method)
        for j in range(3):
            assert abs((labels == j).mean() - p[:, j].mean()) < 4 * (p[:, j] * (1 - p[:, j])).sum()**.5 / len(p)
    assert np.array_equal(e.predict(rows), e.predict(rows[::-1])[::-1]) and np.array_equal(e.predict(rows.astype(np.float32))[:50], e.predict(rows)[:50])
    assert np.array_equal(e.predict(rows, method="draw"), e.predict(rows, method="draw"))
    other, fresh = clone(e).set_params(random_state=2).fit(X, Y, **GIVEN), clone(e).set_params(random_state=None, method="draw").fit(X, Y, **GIVEN)
    assert not np.array_equal(other.predict(rows), e.predict(rows)) and not np.array_equal(fresh.predict(rows), fresh.predict(rows))


def test_a_warm_rule_without_multipliers_still_draws():
    "At tau = 1 the rule meets its bound by drawing alone; its argmax would break it. At tau = 1e-3 and a wide bound, argmax does."
    data = make_multiclass(4000, seed=2)
    exact = lambda **how: OptFairPostprocessor(prefit=True, **how).fit(data.joint.flatten(1).numpy(), data.label, sensitive_features=data.sensitive_features)
    dp = fairness_constraints("dp", data.joint)
    violation = lambda e, how: constraint_values(data.joint, torch.nn.functional.one_hot(torch.as_tensor(e.predict(data.joint.flatten(1).numpy(), method=how)), 3).double(), dp).abs().max().item()
    warm, cold = exact(xi=.1, tau=1.), exact(xi=.5)
    assert not warm.lambda_.any() and warm.draws_ and violation(warm, "hash") < .1 < .15 < violation(warm, "argmax")
    assert not cold.lambda_.any() and not cold.draws_ and violation(cold, "hash") == violation(cold, "argmax")


def test_hash_over_keys_is_the_rule():
    J = np.tile(np.random.default_rng(0).dirichlet(np.ones(9), 5), (40, 1))
    e = OptFairPostprocessor(prefit=True, xi=0., criteria="eo").fit(J, np.arange(200) % 3, sensitive_features=np.arange(200) // 3 % 3)
    mean = np.mean([np.eye(3)[_pick(e.predict_proba(J), row_uniforms(J, k))] for k in range(400)], axis=0)
    assert np.abs(mean - e.predict_proba(J)).max() < 5 * .5 / 20


# --- models

def test_four_ways_in():
    pairs = pd.factorize(S, sort=True)[0] * 3 + Y
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(X, pairs)
    ways = [fitted(), fitted(model), fitted(model, prefit=True), fitted(FrozenEstimator(model), prefit=True), fitted(lambda x: model.predict_proba(x).reshape(-1, 3, 3), prefit=True),
            fitted(lambda x: torch.tensor(model.predict_proba(x), requires_grad=True), prefit=True)]
    for e in ways[1:]: assert np.allclose(e.predict_joint(X), ways[0].predict_joint(X)) and np.allclose(e.predict_proba(X), ways[0].predict_proba(X))
    assert ways[2].estimator_ is model and ways[1].estimator_ is not model
    J = model.predict_proba(X)
    for joint in (J, J.reshape(-1, 3, 3)):
        assert np.allclose(OptFairPostprocessor(prefit=True).fit(joint, Y, **GIVEN).predict_proba(joint), ways[0].predict_proba(X))
    assert np.allclose(clone(ways[3]).fit(X, Y, **GIVEN).lambda_, ways[0].lambda_)


def test_scores_rank_as_the_rule_does():
    e = fitted(criteria="eo", xi=.02)
    beta = e.scores(X)
    assert np.allclose(beta, fair_scores(torch.from_numpy(e.predict_joint(X)), e.certificate_.lam, e.constraints_).numpy())
    assert np.array_equal(beta.argmax(1), e.predict_proba(X).argmax(1))


@pytest.mark.parametrize("labels", [np.array(["b", "a", "c"]), np.array([10, -3, 7]), np.array(["b", "a", "c"], dtype=object), np.array([2.5, .5, 1.]) * 2], ids=["text", "int", "object", "float"])
def test_labels_of_any_kind(labels):
    e = OptFairPostprocessor().fit(X, labels[Y], **GIVEN)
    assert e.classes_.tolist() == sorted(labels.tolist()) and e.predict(X).dtype == labels.dtype and set(e.predict(X)) <= set(labels)
    assert abs(accuracy_score(labels[Y], e.predict(X)) - e.score(X, labels[Y])) < 1e-12


def test_two_classes_of_truth_values():
    e = OptFairPostprocessor().fit(X, Y > 0, **GIVEN)
    assert e.predict(X).dtype == bool and e.classes_.tolist() == [False, True]


def test_several_columns_are_intersections():
    two = pd.DataFrame({"group": S, "side": np.where(X[:, 0] > 0, "r", "l")})
    e = OptFairPostprocessor(xi=.05).fit(X, Y, sensitive_features=two)
    assert e.groups_ == tuple((g, k) for g in ("group 0", "group 1", "group 2") for k in "lr") and len(e.lambda_) == 18
    assert e.report(X, Y, two.to_numpy()).loc["expected"].index.tolist()[:2] == ["all", "group 0, l"]
    lone = OptFairPostprocessor(xi=.05).fit(X, Y, sensitive_features=pd.DataFrame(S))
    assert lone.groups_ == ("group 0", "group 1", "group 2") and np.allclose(lone.lambda_, fitted(xi=.05).lambda_)


def test_absent_pairs_have_probability_zero():
    keep = ~((S == "group 2") & (Y == 1))
    for settings in ({}, dict(cv=4), dict(estimator=KNeighborsClassifier(20))):
        e = OptFairPostprocessor(**settings).fit(X[keep], Y[keep], sensitive_features=S[keep])
        assert e.predict_joint(X)[:, 2, 1].max() == 0 and e.certificate_.converged


def test_sparse_rows():
    dense, thin = fitted(), OptFairPostprocessor().fit(sparse.csr_array(X), Y, **GIVEN)
    assert np.abs(thin.predict_joint(sparse.csr_array(X)) - dense.predict_joint(X)).mean() < .01 and set(thin.predict(sparse.csr_array(X[:50]))) <= {0, 1, 2}


def test_rows_of_text_reach_the_model():
    from sklearn.feature_extraction.text import CountVectorizer
    texts = [f"{'low' if y == 0 else 'high'} {s.replace(' ', '')} {k % 7}" for k, (y, s) in enumerate(zip(Y, S))]
    e = OptFairPostprocessor(make_pipeline(CountVectorizer(), LogisticRegression())).fit(texts, Y == 0, sensitive_features=S)
    assert e.score(texts, Y == 0) > .7 and np.array_equal(e.predict(texts[:9]), e.predict(texts)[:9])


# --- posteriors of rows that the model has not seen

def test_out_of_fold_posteriors_differ_and_are_repeatable():
    tree = DecisionTreeClassifier(min_samples_leaf=5, random_state=0)
    seen, unseen = fitted(tree), fitted(tree, cv=5)
    assert unseen.certificate_.risk > seen.certificate_.risk and np.array_equal(fitted(tree, cv=5).lambda_, unseen.lambda_)
    assert np.allclose(unseen.predict_joint(X), seen.predict_joint(X))                    # one and the same final model
    assert fitted(tree, cv=KFold(3)).certificate_.converged


@pytest.mark.parametrize("kind", ["matrix", "vector", "isotonic"])
def test_calibration_repairs_what_it_can_express(kind):
    rng = np.random.default_rng(0)
    true = rng.dirichlet(np.ones(4), 20_000)
    z = _pick(true, rng.random(len(true)))
    sharp = true**3 / (true**3).sum(1, keepdims=True)
    repaired = _calibrator(kind).fit(sharp, z, np.ones(len(z)))(sharp)
    assert log_loss(z, repaired) < log_loss(z, sharp) - .1 and np.abs(repaired - true).mean() < (.01 if kind != "isotonic" else .05) < np.abs(sharp - true).mean()
    assert np.allclose(repaired.sum(1), 1) and (repaired >= 0).all()


@pytest.mark.parametrize("kind", ["matrix", "vector", "isotonic"])
def test_weights_of_a_calibrator_are_copies(kind):
    rng = np.random.default_rng(1)
    p, w = rng.dirichlet(np.ones(3), 400), rng.integers(0, 3, 400)
    z = _pick(p**2, rng.random(400))
    one, two = _calibrator(kind).fit(p, z, w.astype(float)), _calibrator(kind).fit(p.repeat(w, 0), z.repeat(w), np.ones(w.sum()))
    assert np.abs(one(p) - two(p)).max() < 2e-3


@pytest.mark.parametrize("prefit", [False, True])
def test_recalibrate_makes_the_promise_honest(prefit):
    base = DecisionTreeClassifier(min_samples_leaf=3, random_state=0)
    half = len(Y) // 2
    codes = pd.factorize(S, sort=True)[0]
    if prefit: base.fit(X[:half], codes[:half] * 3 + Y[:half])
    rows = slice(half, None) if prefit else slice(None)
    off = {}
    for kind in (False, True):
        e = OptFairPostprocessor(base, prefit=prefit, recalibrate=kind).fit(X[rows], Y[rows], sensitive_features=S[rows])
        h = e.predict_proba(TEST.features.to_numpy())
        off[kind] = abs(h[np.arange(len(h)), TEST.label].mean() - 1 + e.certificate_.risk)
    assert off[True] < .5 * off[False]


# --- report

def test_report_agrees_with_other_peoples_metrics():
    e = fitted(criteria="eo", xi=.02)
    rows, y, s = TEST.features.to_numpy(), TEST.label.to_numpy(), TEST.sensitive_features["group"].astype(str).to_numpy()
    table, labels = e.report(rows, y, s), e.predict(rows)
    every = table.loc[("hash", "all")]
    assert abs(every["accuracy"] - accuracy_score(y, labels)) < 1e-12 and every["rows"] == len(y)
    theirs = [demographic_parity_difference(y, labels == j, sensitive_features=s) for j in range(3)]
    assert abs(every["dp pairwise"] - max(theirs)) < 1e-12
    frame = MetricFrame(metrics=selection_rate, y_true=y, y_pred=labels == 1, sensitive_features=s)
    assert np.allclose(table.loc["hash"].loc[["group 0", "group 1", "group 2"], "P(1)"], frame.by_group)
    assert table.loc["argmax"].loc["all", "accuracy"] == pytest.approx(accuracy_score(y, e.predict(rows, method="argmax")))
    assert table.index.names == ["decision", "group"] and table.shape == (12, 14) and not table.isna().any(axis=None)


@pytest.mark.parametrize("criterion", ["dp", "eop", "eo"])
@pytest.mark.parametrize("convention", ["population", "pairwise"])
def test_report_agrees_with_the_constraints(criterion, convention):
    e = fitted(xi=.03)
    codes = pd.factorize(S, sort=True)[0]
    D = constraint_values(one_hot(codes, Y, 3, 3), torch.from_numpy(e.predict_proba(X)), fairness_constraints(criterion, n_groups=3, n_classes=3, convention=convention))
    column = criterion if convention == "population" else f"{criterion} pairwise"
    table = e.report(X, Y, S).loc["expected"]
    assert table.loc["all", column] == pytest.approx(D.abs().max().item(), abs=1e-12)
    if convention == "population": assert np.allclose(table[column][1:], D.abs().reshape(3, -1).amax(1))


def test_report_of_weights_and_of_absent_cells():
    e, w = fitted(), np.random.default_rng(0).integers(1, 3, len(Y))
    assert np.allclose(e.report(X, Y, S, sample_weight=w).loc["expected"], e.report(X.repeat(w, 0), Y.repeat(w), S.repeat(w)).loc["expected"])
    few = (S == "group 0") & (Y < 2)
    part = e.report(X[few], Y[few], S[few]).loc["expected"]
    assert np.isnan(part.loc["group 1", "accuracy"]) and np.isnan(part.loc["all", "P(2 | 2)"]) and part.loc["all", "accuracy"] > 0 and part.loc["all", "dp"] == 0


# --- what is refused, and what is warned about

BAD = {
    "short groups": (dict(), dict(sensitive_features=S[:-1]), "sensitive_features .* one row for each of the 1200 rows"),
    "missing groups": (dict(), dict(sensitive_features=np.where(np.arange(len(S)) > 3, S, None)), "sensitive_features has missing values in 4 rows"),
    "negative xi": (dict(xi=-.01), GIVEN, "xi must be a finite number >= 0"), "nan xi": (dict(xi=float("nan")), GIVEN, "xi must be"), "text xi": (dict(xi="small"), GIVEN, "xi must be"),
    "short xi": (dict(xi=np.ones(4)), GIVEN, "one entry per constraint"), "zero tau": (dict(tau=0), GIVEN, "tau must be"),
    "criterion": (dict(criteria="parity"), GIVEN, "unknown criterion 'parity'"), "no criterion": (dict(criteria=[]), GIVEN, "criteria is empty"),
    "own size": (dict(criteria=torch.zeros(2, 2, 3, 3)), GIVEN, "must agree"),
    "method": (dict(method="coin"), GIVEN, "method must be one of"), "recalibrate": (dict(recalibrate="platt"), GIVEN, "recalibrate must be one of"),
    "convention": (dict(convention="both"), GIVEN, "convention must be one of"), "cv with prefit": (dict(prefit=True, cv=3), GIVEN, "cv has no use"),
    "split twice": (dict(cv=ShuffleSplit(3)), GIVEN, "exactly one test fold"),
    "columns": (dict(prefit=True), GIVEN, r"need \[n, 9\] or \[n, 3, 3\]"), "logits": (dict(prefit=True, estimator=lambda x: np.full((len(x), 9), -1.)), GIVEN, "posterior must be >= 0"),
    "sum": (dict(prefit=True, estimator=lambda x: np.full((len(x), 9), .2)), GIVEN, "must sum to 1"), "nan": (dict(prefit=True, estimator=lambda x: np.full((len(x), 9), np.nan)), GIVEN, "NaN"),
    "weights": (dict(), dict(**GIVEN, sample_weight=-np.ones(len(Y))), "(?i)negative"), "no weight": (dict(), dict(**GIVEN, sample_weight=np.zeros(len(Y))), "(?i)non-zero|is 0"),
    "weights not taken": (dict(estimator=KNeighborsClassifier()), dict(**GIVEN, sample_weight=np.ones(len(Y))), "KNeighborsClassifier.fit does not take it"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, untyped):
    settings, named, message = BAD[name]
    with pytest.raises(ValueError, match=message): OptFairPostprocessor(**settings).fit(X, Y, **named)


@pytest.mark.parametrize("y, message", [(np.zeros(len(Y)), "at least 2 classes"), (X[:, 0], "Unknown label type"), (Y[:-1], "inconsistent")])
def test_bad_labels(y, message):
    with pytest.raises(ValueError, match=message): OptFairPostprocessor().fit(X, y, **GIVEN)


@pytest.mark.parametrize("criteria", ["eo", "eop", ["dp", "eo"]], ids=str)
def test_a_pair_without_rows(criteria):
    keep = ~((S == "group 2") & (Y == 1))
    with pytest.raises(ValueError, match="group 'group 2' has no rows of class 1"): OptFairPostprocessor(criteria=criteria).fit(X[keep], Y[keep], sensitive_features=S[keep])


def test_what_predict_and_report_refuse():
    e = fitted()
    with pytest.raises(ValueError, match="method must be"): e.predict(X, method="best")
    with pytest.raises(ValueError, match="has not seen"): e.report(X, Y, np.where(S == "group 1", "group 9", S))
    with pytest.raises(ValueError, match="y holds .5., which fit has not seen"): e.report(X, Y.clip(1) * 5 - 5, S)
    with pytest.raises(ValueError, match="sensitive_features is missing"): e.report(X, Y)
    with pytest.raises(ValueError, match="inconsistent"): e.report(X, Y[:-1], S)
    with pytest.raises(ValueError, match="Reshape your data"): e.predict(X[0])
    with pytest.raises(NotFittedError): OptFairPostprocessor().report(X, Y, S)
    with pytest.raises(NotFittedError): OptFairPostprocessor().scores(X)


def test_warnings():
    few = np.where(np.arange(len(S)) < 29, "few", S)
    with pytest.warns(UserWarning, match="fewer than 30 rows: {'few': 29}"): OptFairPostprocessor().fit(X, Y, sensitive_features=few)
    blind = lambda x: np.eye(9)[[0, 1, 2]][np.arange(len(x)) % 3]
    with pytest.warns(UserWarning, match="does not see them"): e = fitted(blind, prefit=True)
    assert e.certificate_.converged and np.isfinite(e.predict_proba(X)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(criteria=["dp", "eo"], xi=.02)


# --- real data

@cache
def held_out(name):
    "A posterior of (group, class) by logistic regression on 8000 rows (Adult: all of the test file) that the model has not seen, and their actual groups and classes [n, g, m]."
    if name == "adult":
        train, test = load_adult("train"), load_adult("test")
        (x, x2), (a, a2) = [d.encoded(drop=["sex", "fnlwgt"]) for d in (train, test)], [d.groups("sex")[0].numpy() for d in (train, test)]
        y, y2 = train.label.to_numpy(), test.label.to_numpy()
    else:
        data, columns = (load_dutch_education(), ["sex"]) if name == "dutch" else (load_acs_education(["MN", "CT"]), ["sex", "race"])
        rows, a, y, order = data.encoded(drop=[c for c in ("OCCP", "POBP") if c in data.features]), data.groups(*columns)[0].numpy(), data.label.to_numpy(), np.random.default_rng(2).permutation(len(data))
        new, old = order[:8000], order[8000:18_000]
        x, x2, a, a2, y, y2 = rows.iloc[old], rows.iloc[new], a[old], a[new], y[old], y[new]
    g, m = a.max() + 1, y.max() + 1
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x, a * m + y)
    return model.predict_proba(x2), one_hot(a2, y2, g, m)


def plug_in(name, criterion, xi):
    "The estimator on the features of the held-out rows; what it reads of their labels is names only."
    J, actual = held_out(name)
    a, y = (actual.flatten(1).argmax(1) // actual.shape[2]).numpy(), (actual.flatten(1).argmax(1) % actual.shape[2]).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)                                                      # groups of few rows
        return OptFairPostprocessor(prefit=True, criteria=criterion, xi=xi).fit(J, y, sensitive_features=a)


needs = {"adult": ["adult"], "dutch": ["dutch"], "acs": ["acs_income"]}
on_data = pytest.mark.parametrize("name", [pytest.param(k, marks=pytest.mark.skipif(not all(map(is_available, v)), reason=f"needs {v} in FAIRBOOK_DATA")) for k, v in needs.items()])


@on_data
@pytest.mark.parametrize("criterion", ["dp", "eop", "eo"])
def test_plug_in_and_exact_program_at_the_same_measured_violation(name, criterion):
    "Both rules read one posterior of rows that the model has not seen. Judged by actual groups and labels: accuracy of ours where our frontier has the violation of theirs."
    J, actual = held_out(name)
    judge = fairness_constraints(criterion, n_groups=actual.shape[1], n_classes=actual.shape[2])
    judged = lambda h: (constraint_values(actual, h, judge).abs().max().item(), float((actual.sum(1) * h).sum(1).mean()))
    for xi in (.1, .02, .001) if name == "adult" else (.03, .01) if criterion == "eo" else (.03, .01, .003):
        fits = [plug_in(name, criterion, x) for x in xi * np.geomspace(.4, 2.5, 17)]
        assert all(e.certificate_.converged and e.certificate_.excess <= 1e-6 for e in fits)
        violation, accuracy = np.array([judged(torch.from_numpy(e.predict_proba(J))) for e in fits]).T
        place = np.linspace(0, 16, 3201)                                                                  # the frontier between the 17 bounds, straight
        violation, accuracy = np.interp(place, range(17), violation), np.interp(place, range(17), accuracy)
        theirs = judged(solve_lp(torch.from_numpy(fits[8].predict_joint(J)), fits[8].constraints_, xi).h)
        off = violation - theirs[0]
        same = np.flatnonzero(np.append(off[:-1] * off[1:] <= 0, False))
        at = same[abs(place[same] - 8).argmin()] if len(same) else abs(off).argmin()                      # passed more than once: where the bound is nearest to xi; never: nearest violation
        assert abs(off[at]) <= 1e-3 and abs(accuracy[at] - theirs[1]) < .002, (xi, off[at], accuracy[at], theirs)


@on_data
@pytest.mark.parametrize("criterion", ["dp", "eo"])
def test_exact_equality_on_held_out_rows(name, criterion):
    "At xi = 0 the dual stays bounded, and the exact program finds its optimum although its equations are dependent."
    e = plug_in(name, criterion, 0.)
    J = torch.from_numpy(e.predict_joint(held_out(name)[0]))[:3000]
    exact, dual = solve_lp(J, e.constraints_.bind(J.mean(0)), 0.), solve_dual(J, e.constraints_.bind(J.mean(0)), 0.)
    assert e.certificate_.converged and dual.converged and exact.violation < 1e-8 and -1e-6 < dual.risk - exact.risk <= dual.gap + 1e-6


@pytest.mark.skipif(not (is_available("dutch") and is_available("acs_income")), reason="needs the Dutch census and ACS in FAIRBOOK_DATA")
@pytest.mark.parametrize("load, columns", [(load_dutch_education, ["sex"]), (lambda: load_acs_education("RI"), ["sex", "race"])], ids=["dutch", "acs"])
@pytest.mark.parametrize("criterion", ["dp", "eop", "eo"])
def test_the_dual_is_bounded_on_real_data(load, columns, criterion):
    data = load()
    part = data.take(np.random.default_rng(2).permutation(len(data))[:3000])
    rows = part.encoded(drop=[c for c in ("OCCP", "POBP") if c in part.features])
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, part.groups(*columns)[0].numpy() * 5 + part.label)
    for xi in (.1, .01, 0.):
        e = OptFairPostprocessor(FrozenEstimator(model), prefit=True, criteria=criterion, xi=xi).fit(rows, part.label, sensitive_features=part.sensitive_features[columns])
        assert e.certificate_.converged and e.certificate_.excess <= 1e-6 and e.certificate_.gap < 1e-3 * np.log(5)
