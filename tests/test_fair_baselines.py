"""`fairbook.fair_baselines`: every knob lowers its own violation, promises of the papers hold, and bad input is refused."""
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from fairbook.fair_baselines import FairBatch, FDivergencePenalty, FrappeHead, Reweighing, _divergence, _shares
from fairbook.metrics import demographic_parity
from fairbook.multiclass_data import make_multiclass

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


RANDOM = dict(check_sample_weight_equivalence_on_dense_data="rows are drawn at random, so repeated rows and weights give other draws")


@parametrize_with_checks([kind(epochs=50, learning_rate=.05) for kind in ALL], expected_failed_checks=lambda est: RANDOM if isinstance(est, (FairBatch, FrappeHead)) else {})
@pytest.mark.filterwarnings("ignore")
def test_sklearn(estimator, check): check(estimator)


@pytest.mark.parametrize("kind, knob, values, violation, drop", [
    (Reweighing, "strength", (0, 1), dp, .0), (FairBatch, "rate", (0, .1), recall, .03), (FDivergencePenalty, "strength", (0, 30, 100), dp, .03),
    (FrappeHead, "strength", (0, 50, 200), dp, .03)])
def test_violation_falls_as_the_knob_grows(kind, knob, values, violation, drop):
    module = None if kind in (Reweighing, FairBatch) else NET
    found = [violation(fit(kind(module=module, epochs=80, random_state=0, **{knob: v}))) for v in values]
    assert all(b < a - drop for a, b in zip(found, found[1:]))


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
    (FrappeHead(FrozenEstimator(LogisticRegression().fit(X, Y > 0))), {}, "estimator must have the classes"), (Reweighing(module="big"), {}, "module must be None"),
    (Reweighing(), dict(sensitive_features=A[:3]), "one row for each"), (FairBatch(), dict(y=0 * Y), "one class"), (FrappeHead(epochs=0), {}, "epochs must be")])
def test_bad_input(est, change, says):
    with pytest.raises(ValueError, match=says): est.fit(X, **dict(y=Y, sensitive_features=A) | change)
