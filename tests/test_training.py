"`fit_parity` trains by six methods; each is held against what it promises, the augmented Lagrangian against cvxpy."
import cvxpy as cp
import numpy as np
import pytest
import torch
from fairbook.fairness_layer import METHODS, DemographicParity, EqualizedOdds, FairnessLayer, MarginalParity, fit_parity
from torch import nn

PROJECTING = ("projection", "penalty_projection", "layer")


def data(n=90, d=3, shift=1., seed=0, n_groups=2):
    "Features, real targets and groups; the first feature and the target are higher in higher groups."
    gen = torch.Generator().manual_seed(seed)
    s = torch.arange(n) % n_groups
    X = torch.randn(n, d, generator=gen, dtype=torch.float64)
    X[:, 0] += shift * s
    return X, X.sum(1) + .3 * torch.randn(n, generator=gen, dtype=torch.float64), s


def network(d=3, hidden=8, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, 1)).double()


def linear(d=3):
    torch.manual_seed(0)
    return nn.Linear(d, 1).double()


def gap(p, s): return max(abs(float(p[s == g].mean() - p[s == h].mean())) for g in s.unique() for h in s.unique())
def weights(fit): return torch.cat([p.detach().flatten() for p in fit.model.parameters()])


# --- every method, on every kind of output

@pytest.mark.parametrize("on, bounds", [("output", None), ("output", (-1., 1.)), ("logit", None), ("probability", None), ("probability", (.01, .99))])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_keeps_its_promise(method, on, bounds):
    X, y, s = data(n_groups=3)
    if on == "probability": y = (y > y.median()).double()
    fit = fit_parity(network(), X, y, s, FairnessLayer(DemographicParity(.05), bounds, on), method=method, epochs=3, batch_size=32)
    p = fit.predict(X, s)
    assert p.shape == (90,) and p.dtype == torch.float64 and p.isfinite().all() and not p.requires_grad
    assert fit.method == method and len(fit.losses) == 9 and np.isfinite(fit.losses).all() and fit.seconds_per_epoch > 0     # one loss a step
    if method in PROJECTING: assert gap(p, s) <= .05 + 1e-12
    if on == "probability" or (bounds and method in PROJECTING): assert p.min() >= (bounds or (0, 1))[0] and p.max() <= (bounds or (0, 1))[1]


def test_float32():
    X, y, s = data()
    fit = fit_parity(network().float(), X.float(), y.float(), s, FairnessLayer(DemographicParity(.05)), epochs=2, batch_size=32)
    p = fit.predict(X.float(), s)
    assert p.dtype == torch.float32 and gap(p, s) <= .05 + 1e-6


def test_training_lowers_the_loss():
    X, y, s = data()
    for method in METHODS:
        losses = fit_parity(network(), X, y, s, FairnessLayer(DemographicParity(.5)), method=method, rho=.1, epochs=60, batch_size=90, lr=1e-2).losses
        assert losses[-1] < .5 * losses[0], method


def test_one_output_or_a_column():
    "A network may return [n] or [n, 1]."
    X, y, s = data()
    class Flat(nn.Module):
        def __init__(self): super().__init__(); self.net = network()
        def forward(self, X): return self.net(X).squeeze(1)
    column, flat = (fit_parity(net, X, y, s, FairnessLayer(DemographicParity(.05)), epochs=2) for net in (network(), Flat()))
    assert torch.equal(column.predict(X, s), flat.predict(X, s))


def test_predict_turns_dropout_off():
    X, y, s = data()
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(.5), nn.Linear(8, 1)).double()
    for method in METHODS:
        fit = fit_parity(net, X, y, s, FairnessLayer(DemographicParity(.05)), method=method, epochs=1)
        assert torch.equal(fit.predict(X, s), fit.predict(X, s))


# --- what distinguishes the methods

def test_projection_is_the_plain_network_projected():
    X, y, s = data()
    layer = FairnessLayer(DemographicParity(.05))
    plain, projection = (fit_parity(network(), X, y, s, layer, method=m, epochs=5, batch_size=32) for m in ("plain", "projection"))
    assert torch.equal(weights(plain), weights(projection)) and plain.losses == projection.losses
    assert torch.equal(projection.predict(X, s), layer(plain.predict(X, s), s))
    assert gap(plain.predict(X, s), s) > .05


def test_penalty_projection_is_the_penalty_network_projected():
    X, y, s = data()
    layer = FairnessLayer(DemographicParity(.05))
    penalty, projected = (fit_parity(network(), X, y, s, layer, method=m, epochs=5, batch_size=32) for m in ("penalty", "penalty_projection"))
    assert torch.equal(weights(penalty), weights(projected))
    assert torch.equal(projected.predict(X, s), layer(penalty.predict(X, s), s))


def test_a_layer_that_never_binds_is_plain_training():
    X, y, s = data()
    layer = FairnessLayer(DemographicParity(1e3))
    plain = fit_parity(network(), X, y, s, layer, method="plain", epochs=5, batch_size=32)
    for method in METHODS:
        other = fit_parity(network(), X, y, s, layer, method=method, epochs=5, batch_size=32)
        torch.testing.assert_close(weights(plain), weights(other), rtol=0, atol=1e-12)


def test_a_heavier_penalty_leaves_a_smaller_gap():
    X, y, s = data()
    gaps = [gap(fit_parity(linear(), X, y, s, FairnessLayer(DemographicParity(.05)), method="penalty", rho=rho, epochs=400, batch_size=90, lr=3e-2).predict(X, s), s)
            for rho in (0.01, 1., 10., 100.)]
    assert all(a > b for a, b in zip(gaps, gaps[1:])) and gaps[-1] > .05          # and never quite reaches the tolerance


@pytest.mark.parametrize("bounds", [(0., 3.), (-1., 2.)])
def test_training_through_the_layer_is_better_in_sample_than_projecting_afterwards(bounds):
    "`layer` minimises what `projection` only evaluates."
    X, y, s = data(shift=3.)
    layer = FairnessLayer(DemographicParity(.05), bounds)
    errors = {m: float((fit_parity(linear(), X, y, s, layer, method=m, epochs=600, batch_size=90, lr=3e-2).predict(X, s) - y).square().mean()) for m in ("projection", "layer")}
    assert errors["layer"] < errors["projection"] - 5e-4


def test_the_anchor_keeps_the_raw_scores_near_the_projected_ones():
    X, y, s = data()
    X, raw = torch.cat([X, s[:, None].double()], 1), {}          # the model knows the group, so it can do what the anchor asks
    for anchor in (0., 1.):
        fit = fit_parity(linear(4), X, y, s, FairnessLayer(DemographicParity(.05)), anchor=anchor, epochs=400, batch_size=90, lr=3e-2)
        raw[anchor] = gap(fit.model(X).detach().squeeze(1), s)
    assert raw[1.] < .1 and raw[0.] > .5


# --- the constrained optimum, from somebody else's solver

def optimum(X, y, s, tol):
    "Least squares by a linear model whose group means differ by at most `tol`."
    w, b = cp.Variable(X.shape[1]), cp.Variable()
    p = X.numpy() @ w + b
    mean = [cp.sum(p[s.numpy() == g]) / int((s == g).sum()) for g in s.unique().tolist()]
    rows = [cp.abs(m - k) <= tol for i, m in enumerate(mean) for k in mean[:i]]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(p - y.numpy()) / len(y)), rows)
    problem.solve("CLARABEL", tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return problem.value, torch.tensor(p.value)


@pytest.mark.parametrize("n_groups, tol, epochs", [(2, .05, 1500), (2, 0., 1500), (3, .1, 2500)])
def test_augmented_lagrangian_reaches_the_constrained_optimum(n_groups, tol, epochs):
    "Full batch, linear model: the tolerance within 1e-3 and the optimal error within 1e-3, where the penalty of equal weight misses the tolerance by far."
    X, y, s = data(n_groups=n_groups)
    best, p_best = optimum(X, y, s, tol)
    how = dict(rho=.1, epochs=epochs, batch_size=len(X), lr=3e-2)
    p = fit_parity(linear(), X, y, s, FairnessLayer(DemographicParity(tol)), method="augmented_lagrangian", **how).predict(X, s)
    assert gap(p, s) <= tol + 1e-3
    assert abs(float((p - y).square().mean()) - best) < 1e-3
    torch.testing.assert_close(p, p_best, rtol=0, atol=2e-2)
    penalty = fit_parity(linear(), X, y, s, FairnessLayer(DemographicParity(tol)), method="penalty", **how).predict(X, s)
    assert gap(penalty, s) > tol + .1


def test_least_squares_without_a_constraint():
    "`plain` finds the ordinary least-squares solution."
    X, y, s = data()
    p = fit_parity(linear(), X, y, s, FairnessLayer(DemographicParity(0.)), method="plain", epochs=1000, batch_size=len(X), lr=3e-2).predict(X, s)
    A, y = np.c_[X, np.ones(len(X))], y.numpy()
    np.testing.assert_allclose(p, A @ np.linalg.lstsq(A, y, rcond=None)[0], atol=1e-6)


# --- other constraints

def test_equalized_odds_gets_the_labels():
    "Means agree within each label, in training (the layer would raise without labels) and at prediction."
    X, y, s = data()
    labels = (y > y.median()).double()
    layer = FairnessLayer(EqualizedOdds(.02), on="probability")
    fit = fit_parity(network(), X, labels, s, layer, epochs=3, batch_size=45)
    p = fit.predict(X, s, labels)
    assert all(gap(p[labels == c], s[labels == c]) <= .02 + 1e-12 for c in (0, 1))
    with pytest.raises(ValueError, match="needs the labels"): fit.predict(X, s)


@pytest.mark.parametrize("method", ["penalty", "augmented_lagrangian"])
def test_soft_methods_with_equalized_odds(method):
    X, y, s = data(shift=3.)
    labels = (y > y.median()).double()
    fits = [fit_parity(network(), X, labels, s, FairnessLayer(EqualizedOdds(0.), on="probability"), method=m, rho=10., epochs=40, batch_size=90, lr=1e-2) for m in ("plain", method)]
    worst = [max(gap(p[labels == c], s[labels == c]) for c in (0, 1)) for p in (f.predict(X, s, labels) for f in fits)]
    assert worst[1] < .7 * worst[0]


def test_two_attributes():
    X, y, s = data()
    two = torch.stack([s, (X[:, 1] > 0).long()], 1)
    p = fit_parity(network(), X, y, two, FairnessLayer(MarginalParity(.05)), epochs=2, batch_size=90).predict(X, two)
    assert gap(p, two[:, 0]) <= .05 + 1e-8 and gap(p, two[:, 1]) <= .05 + 1e-8


@pytest.mark.parametrize("method", METHODS)
def test_batches_without_some_group(method):
    "Small batches miss groups; nothing breaks, and the promise at prediction holds."
    X, y, _ = data()
    s = (torch.arange(90) % 30 == 0).long() + (torch.arange(90) % 45 == 1).long() * 2
    fit = fit_parity(network(), X, y, s, FairnessLayer(DemographicParity(.05, n_groups=3)), method=method, epochs=2, batch_size=8)
    assert weights(fit).isfinite().all()
    if method in PROJECTING: assert gap(fit.predict(X, s), s) <= .05 + 1e-12


# --- repeatability and errors

@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides(method):
    X, y, s = data()
    run = lambda seed: fit_parity(network(), X, y, s, FairnessLayer(DemographicParity(.05)), method=method, epochs=3, batch_size=32, seed=seed)
    torch.manual_seed(1); a = run(7)
    torch.manual_seed(2); b = run(7)
    assert torch.equal(weights(a), weights(b)) and a.losses == b.losses
    assert not torch.equal(weights(a), weights(run(8)))


def test_the_global_random_state_is_left_alone():
    X, y, s = data()
    net, before = network(), torch.get_rng_state()
    fit_parity(net, X, y, s, FairnessLayer(DemographicParity(.05)), epochs=1)
    assert torch.equal(before, torch.get_rng_state())


def test_unknown_method():
    X, y, s = data()
    net = network()
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="method must be one of .*'layer'.* got 'fair'"): fit_parity(net, X, y, s, FairnessLayer(DemographicParity(.05)), method="fair")
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_missing_groups_can_be_an_error():
    X, y, s = data()
    layer = FairnessLayer(DemographicParity(.05, n_groups=3), missing="error")
    with pytest.raises(ValueError, match=r"groups \[2\] are absent"): fit_parity(network(), X, y, s, layer, epochs=1)


@pytest.mark.parametrize("method", METHODS)
def test_no_epochs_return_the_model_as_it_came(method):
    X, y, s = data()
    layer = FairnessLayer(DemographicParity(.05))
    net = network()
    fit = fit_parity(net, X, y, s, layer, method=method, epochs=0)
    assert fit.losses == [] and 0 <= fit.seconds_per_epoch < 1 and all(torch.equal(a, b) for a, b in zip(net.parameters(), network().parameters()))
    assert torch.equal(fit.predict(X, s), layer(net(X).squeeze(1), s) if method in PROJECTING else net(X).squeeze(1))


@pytest.mark.parametrize("name, value, least", [("epochs", -1, 0), ("batch_size", 0, 1), ("dual_every", 0, 1)])
def test_counts_out_of_range(name, value, least):
    X, y, s = data()
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {value}"):
        fit_parity(network(), X, y, s, FairnessLayer(DemographicParity(.05)), **{name: value})


def test_training_leaves_a_learned_tolerance_alone():
    "It is the network that is trained; the tolerance gets a gradient, and the multipliers none."
    X, y, s = data()
    for method in METHODS:
        tol = nn.Parameter(torch.tensor(.05))
        learned, fixed = (fit_parity(network(), X, y, s, FairnessLayer(DemographicParity(t)), method=method, epochs=3, batch_size=32) for t in (tol, .05))
        torch.testing.assert_close(weights(learned), weights(fixed), rtol=0, atol=1e-6)
        assert tol.item() == torch.tensor(.05).item()
