"""Constraints and layers of chapter 1: right projections, policies for absent groups, state, and errors."""
import copy
import math
import pickle

import cvxpy as cp
import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from torch import nn

from fairbook.fairness_layer import (Constraint, CvxFairnessLayer, DemographicParity, EqualizedOdds, FairnessLayer, LinearConstraint, MarginalParity,
                                     ResidualParity, project_parity)


def batch(seed=0, n=48, n_groups=4, scale=.6):
    gen = torch.Generator().manual_seed(seed)
    groups = torch.cat([torch.arange(n_groups), torch.randint(n_groups, (n - n_groups,), generator=gen)])
    z = .4 + .1 * groups + scale * torch.randn(n, generator=gen, dtype=torch.float64)
    return z, groups, torch.randint(2, (n,), generator=gen)


def cvx_projection(z, rows, lower, upper, bounds):
    "The same problem, solved by Clarabel."
    v, z, rows, lower, upper = cp.Variable(len(z)), z.numpy(), rows.numpy(), lower.numpy(), upper.numpy()
    limits = [rows[np.isfinite(upper)] @ v <= upper[np.isfinite(upper)]] if np.isfinite(upper).any() else []
    limits += [rows[np.isfinite(lower)] @ v >= lower[np.isfinite(lower)]] if np.isfinite(lower).any() else []
    if bounds is not None: limits += [v >= bounds[0], v <= bounds[1]]
    cp.Problem(cp.Minimize(cp.sum_squares(v - z)), limits).solve("CLARABEL", tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
    return torch.tensor(v.value)


def means_differ(y, groups):
    m = torch.stack([y[groups == g].mean() for g in groups.unique()])
    return (m.max() - m.min()).item()


CONSTRAINTS = {
    "parity": (DemographicParity(.03), 1), "odds": (EqualizedOdds(.03), 1), "opportunity": (EqualizedOdds(.03, given=(1,)), 1),
    "marginal": (MarginalParity(.03), 2), "residual": (ResidualParity(.02), 2),
    "own": (LinearConstraint(lambda z, g, y: (torch.stack([torch.ones_like(z), z * 0 + g]) / len(z), z.new_tensor([.4, .5]), z.new_tensor([.5, math.inf]))), 1),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bounds", [None, (0., 1.)])
def test_every_constraint_projects_as_a_convex_solver_does(name, seed, bounds):
    constraint, columns = CONSTRAINTS[name]
    z, g, y = batch(seed)
    g = g if columns == 1 else torch.stack([g % 2, g // 2], 1)
    out = constraint.project(z, g, y, bounds)
    assert (out - cvx_projection(z, *constraint.rows(z, g, y), bounds)).abs().max() < 1e-6
    assert constraint.violation(out, g, y) < 1e-8
    assert constraint.excess(out, g, y).max() < 1e-8


def test_what_the_names_promise():
    z, g, y = batch(1)
    out = EqualizedOdds(.03).project(z, g, y, (0., 1.))
    assert all(means_differ(out[y == c], g[y == c]) <= .03 + 1e-12 for c in (0, 1))
    two = torch.stack([g % 2, g // 2], 1)
    out = MarginalParity(.03).project(z, two, None, (0., 1.))
    assert all(means_differ(out, two[:, j]) <= .03 + 1e-8 for j in (0, 1))
    out = ResidualParity(.02).project(z, two, y, (0., 1.))
    assert all(abs((out - y)[two[:, j] == a].mean()) <= .02 + 1e-8 for j in (0, 1) for a in (0, 1))


def test_monotonicity_is_isotonic_regression():
    z = torch.randn(30, dtype=torch.float64)
    ordered = LinearConstraint(torch.eye(30, dtype=torch.float64).diff(dim=0), lower=torch.zeros(29, dtype=torch.float64))
    y = FairnessLayer(ordered)(z, torch.zeros(30, dtype=torch.long))
    assert np.allclose(y, IsotonicRegression().fit_transform(np.arange(30), z), atol=1e-8)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_gradients_pass_every_constraint(name):
    constraint, columns = CONSTRAINTS[name]
    z, g, y = batch(2, n=24)
    g = g if columns == 1 else torch.stack([g % 2, g // 2], 1)
    if name == "residual": y = torch.full_like(y, 1) * .5
    assert torch.autograd.gradcheck(lambda z: constraint.project(z, g, y, (0., 1.)), z.requires_grad_())


def test_tolerances_can_be_learned():
    z, g, y = batch(3, n=24)
    for make in (DemographicParity, EqualizedOdds, MarginalParity):
        tol = torch.tensor(.05, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t: make(t).project(z, g, y, (0., 1.)), tol)


@pytest.mark.parametrize("make", [lambda t: DemographicParity(t, n_groups=4), EqualizedOdds, MarginalParity], ids=["parity", "odds", "marginal"])
def test_a_learned_tolerance_belongs_to_the_layer(make):
    z, g, y = batch(3)
    layer = FairnessLayer(make(nn.Parameter(torch.tensor(.05))), (0., 1.))
    assert [n for n, _ in nn.Sequential(layer).named_parameters()] == ["0.tol"] and layer.constraint.tol is layer.tol
    opt, first = torch.optim.SGD(layer.parameters(), lr=1e-3), (layer(z, g, y) - z).square().sum()
    first.backward()
    assert layer.tol.grad < 0                                                       # a larger tolerance moves scores less
    opt.step()
    assert (layer(z, g, y) - z).square().sum() < first
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), FairnessLayer(make(nn.Parameter(torch.tensor(.3))), (0., 1.))):
        twin.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)                      # puts another tensor in the place of `tol`
        assert twin.tol is not layer.tol and torch.equal(twin(z, g, y), layer(z, g, y))
        with torch.no_grad(): twin.tol.mul_(0)
        assert not torch.equal(twin(z, g, y), layer(z, g, y))
    with torch.no_grad(): layer.tol.fill_(-.1)
    with pytest.raises(ValueError, match="clamp a learned one"): layer(z, g, y)


def test_a_tolerance_that_is_no_parameter_is_not_registered():
    for tol in (.05, torch.tensor(.05), torch.tensor(.05, requires_grad=True)):
        assert not list(FairnessLayer(DemographicParity(tol)).parameters())


def test_weights_reach_the_projection():
    z, g, y = batch(11)
    w = torch.rand(48, dtype=torch.float64) + .1
    layer = FairnessLayer(DemographicParity(.01), (0., 1.))
    assert torch.equal(layer(z, g, weights=w), project_parity(z, g, .01, (0., 1.), weights=w)) and not torch.equal(layer(z, g, weights=w), layer(z, g))
    assert torch.equal(FairnessLayer(DemographicParity(.01), on="probability")(z, g, weights=w), project_parity(z.sigmoid(), g, .01, (0., 1.), weights=w))
    odds = FairnessLayer(EqualizedOdds(.01), (0., 1.))(z, g, y, weights=w)
    for c in (0, 1): assert torch.equal(odds[y == c], project_parity(z[y == c], g[y == c], .01, (0., 1.), weights=w[y == c]))


@pytest.mark.parametrize("make", [lambda: FairnessLayer(EqualizedOdds(.02), (0., 1.)), lambda: FairnessLayer(DemographicParity(.02, n_groups=4), (0., 1.), missing="carry")], ids=["odds", "carry"])
def test_a_weight_is_a_number_of_copies(make):
    z, g, y = batch(12)
    copies = torch.randint(1, 4, (48,))
    one, many = make(), make()
    for part in (slice(None), g < 3):                                                # with "carry", group 3 is then absent from the second batch
        repeat = lambda t: t[part].repeat_interleave(copies[part])
        assert torch.allclose(many(repeat(z), repeat(g), repeat(y)), one(z[part], g[part], y[part], copies[part].double()).repeat_interleave(copies[part]), atol=1e-10)
    assert torch.allclose(one.mean, many.mean) and torch.allclose(one.share, many.share)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_carry_works_in_a_model_of_any_precision(dtype):
    z, g, _ = batch(6)
    layer = FairnessLayer(DemographicParity(.01, n_groups=4), (0., 1.), missing="carry").to(dtype)
    exact = FairnessLayer(DemographicParity(.01, n_groups=4), (0., 1.), missing="carry")
    for part in (slice(None), g < 3): assert (layer(z[part].float(), g[part]) - exact(z[part], g[part])).abs().max() < (1e-2 if dtype == torch.float16 else 1e-5)


def test_where_the_constraint_applies():
    z, g, _ = batch(4, scale=2.)
    p = FairnessLayer(DemographicParity(.01), on="probability")(z, g)
    assert p.min() >= 0 and p.max() <= 1 and means_differ(p, g) <= .01 + 1e-12
    assert torch.equal(p, project_parity(z.sigmoid(), g, .01, (0., 1.)))
    logits = FairnessLayer(DemographicParity(.01), on="logit")(z, g)
    assert means_differ(logits, g) <= .01 + 1e-12 < means_differ(logits.sigmoid(), g)


def test_skip_counts_and_error_refuses_batches_without_a_group():
    z, g, _ = batch(5)
    few = g < 3
    skip = FairnessLayer(DemographicParity(.01, n_groups=4), (0., 1.))
    assert torch.equal(skip(z[few], g[few]), project_parity(z[few], g[few], .01, (0., 1.))) and skip.incomplete == 1
    skip(z, g)
    assert skip.incomplete == 1
    with pytest.raises(ValueError, match=r"groups \[3\] are absent"):
        FairnessLayer(DemographicParity(.01, n_groups=4), missing="error")(z[few], g[few])


def test_carry_projects_beside_the_running_means():
    z, g, _ = batch(6)
    layer = FairnessLayer(DemographicParity(.01, n_groups=4), (0., 1.), missing="carry")
    assert torch.allclose(layer(z, g), project_parity(z, g, .01, (0., 1.)))                 # nobody absent: nothing carried
    means, shares, few = layer.mean.clone(), layer.share / layer.share.sum(), g < 3
    y = layer.eval()(z[few], g[few])
    stand_in = project_parity(torch.cat([z[few], means[3:]]), torch.cat([g[few], torch.tensor([3])]), .01, (0., 1.),
                              weights=torch.cat([torch.ones(int(few.sum())).double(), shares[3:] * few.sum()]))
    assert torch.allclose(y, stand_in[:-1]) and torch.equal(layer.mean, means)              # eval mode does not learn
    assert means_differ(y, g[few]) <= .01 + 1e-12
    lone = layer(z[g == 0], g[g == 0])                                                       # a batch with one group still moves
    assert (lone - z[g == 0].clamp(0, 1)).abs().max() > 1e-3
    never = FairnessLayer(DemographicParity(.01, n_groups=4), missing="carry")
    assert torch.equal(never.eval()(z[g == 0], g[g == 0]), z[g == 0])                       # nothing known yet: no change


@pytest.mark.parametrize("layer", [
    FairnessLayer(DemographicParity(.02, n_groups=4), (0., 1.), missing="carry"), FairnessLayer(EqualizedOdds(.02), on="probability"),
    FairnessLayer(MarginalParity(.02)), FairnessLayer(ResidualParity(.02), (0., 1.))], ids=lambda l: type(l.constraint).__name__)
def test_state_copies_and_repr(layer):
    z, g, y = batch(7)
    first = layer(z, g, y)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(z, g, y), layer(z, g, y))
    other = FairnessLayer(layer.constraint, layer.bounds, layer.on, layer.missing)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(z[:9], g[:9], y[:9]), layer(z[:9], g[:9], y[:9]))
    assert type(layer.constraint).__name__ in repr(layer) and first.shape == z.shape


def test_a_network_with_the_layer_trains():
    z, g, y = batch(8)
    x = torch.stack([z, g.double()], 1).float()
    net, layer = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), FairnessLayer(DemographicParity(.01), on="probability")
    nn.functional.binary_cross_entropy(layer(net(x).squeeze(1), g).clamp(1e-6, 1 - 1e-6), y.float()).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())


def test_the_convex_layer_agrees_with_the_exact_one_and_compiles_once():
    z, g, _ = batch(9)
    bands = lambda v, mean: [cp.abs(mean[a] - mean[b]) <= .02 for a in range(4) for b in range(a)]
    layer = CvxFairnessLayer(bands, 4, (0., 1.))
    z = z.requires_grad_()
    y, exact = layer(z, g), project_parity(z, g, .02, (0., 1.))
    assert (y - exact).abs().max() < 1e-3
    grad, exact_grad = (torch.autograd.grad(out.square().sum(), z, retain_graph=True)[0] for out in (y, exact))
    assert (grad - exact_grad).abs().max() < 1e-2
    layer(z + .1, g)
    assert len(layer._compiled) == 1
    layer(z[:30], g[:30])
    assert len(layer._compiled) == 2


Z, G, Y = batch(10, n=12)
BAD = [
    (lambda: FairnessLayer(DemographicParity(.1), on="score"), "on must be"),
    (lambda: FairnessLayer(DemographicParity(.1), missing="drop"), "missing must be"),
    (lambda: FairnessLayer(DemographicParity(.1), missing="carry"), "n_groups"),
    (lambda: FairnessLayer(EqualizedOdds(.1, n_groups=4), missing="error"), "needs DemographicParity"),
    (lambda: FairnessLayer(DemographicParity(.1))(Z[:, None], G), "squeeze"),
    (lambda: FairnessLayer(DemographicParity(-.1))(Z, G), "tol must be"),
    (lambda: FairnessLayer(DemographicParity(.1), (1., 0.))(Z, G), "low < high"),
    (lambda: FairnessLayer(DemographicParity(.1, n_groups=2))(Z, G), r"0\.\.1"),
    (lambda: FairnessLayer(EqualizedOdds(.1))(Z, G), "needs the labels"),
    (lambda: FairnessLayer(ResidualParity(.1))(Z, G), "needs the labels"),
    (lambda: FairnessLayer(EqualizedOdds(.1))(Z, G, Y[:5]), "one label per score"),
    (lambda: FairnessLayer(LinearConstraint(torch.ones(1, 12).double()))(Z, G), "lower or upper"),
    (lambda: FairnessLayer(ResidualParity(.1), (0., 1.))(Z, G, Y + 3), "rows"),
    (lambda: CvxFairnessLayer(lambda v, mean: [], 5)(Z, G), r"groups \[4\] are absent"),
    (lambda: Constraint().project(Z, G), None),
    # refused where it is given, before any batch
    (lambda: DemographicParity(-.1), "tol must be finite and >= 0, got -0.1"),
    (lambda: EqualizedOdds(math.nan), "tol must be finite and >= 0, got nan"),
    (lambda: MarginalParity(torch.tensor([.1, -1.])), "tol must be finite and >= 0, got -1"),
    (lambda: ResidualParity(math.inf), "tol must be finite and >= 0, got inf"),
    (lambda: DemographicParity("small"), "tol must be a number or a tensor, got 'small'"),
    (lambda: FairnessLayer(DemographicParity(.1), (1., 0.)), r"low < high.*got \(1.0, 0.0\)"),
    (lambda: FairnessLayer(MarginalParity(.1), (None, 1.)), r"bounds must be \(low, high\).*got \(None, 1.0\)"),
    (lambda: FairnessLayer(ResidualParity(.1), (0., math.nan)), "low < high"),
    (lambda: FairnessLayer(DemographicParity(.1), (0.,)), r"bounds must be \(low, high\)"),
    (lambda: FairnessLayer(DemographicParity(.1), .5), r"bounds must be \(low, high\)"),
    (lambda: CvxFairnessLayer(lambda v, mean: [], 4, (0., None)), r"bounds must be \(low, high\)"),
    # weights
    (lambda: FairnessLayer(DemographicParity(.1))(Z, G, weights=torch.zeros(12)), "weights must be positive"),
    (lambda: FairnessLayer(DemographicParity(.1))(Z, G, weights=torch.ones(5)), "weights must have shape"),
    (lambda: FairnessLayer(MarginalParity(.1))(Z, G, weights=torch.ones(12)), "MarginalParity counts every sample once"),
    (lambda: FairnessLayer(ResidualParity(.1))(Z, G, Y, torch.ones(12)), "ResidualParity counts every sample once"),
    (lambda: FairnessLayer(LinearConstraint(torch.ones(1, 12).double(), upper=torch.ones(1).double()))(Z, G, weights=torch.ones(12)), "LinearConstraint counts every sample once"),
]


@pytest.mark.parametrize("call, message", BAD, ids=[f"{i} {m}" for i, (_, m) in enumerate(BAD)])
def test_bad_input_says_what_to_do(call, message, untyped):
    with pytest.raises(NotImplementedError if message is None else ValueError, match=message): call()


def test_bad_weights_change_no_state(untyped):
    layer = FairnessLayer(DemographicParity(.1, n_groups=5), missing="carry")        # group 4 is absent
    with pytest.raises(ValueError, match="weights must be positive"): layer(Z, G, weights=-torch.ones(12))
    assert layer.incomplete == 0 and layer.mean.isnan().all()


def test_one_open_side_is_written_as_infinity():
    layer = FairnessLayer(DemographicParity(.01), (-math.inf, 1.))
    assert torch.equal(layer(Z, G), project_parity(Z, G, .01, (-math.inf, 1.))) and layer(Z, G).max() <= 1


def test_vmap_is_a_limit_that_the_chapter_states():
    "If this fails, vmap works now: rewrite the sentence under the mini API."
    z, g = torch.randn(3, 12, dtype=torch.float64), torch.arange(12) % 3
    for constraint in (DemographicParity(.1), MarginalParity(.1)):
        with pytest.raises(RuntimeError): torch.func.vmap(lambda z: constraint.project(z, g))(z)
    assert torch.equal(DemographicParity(.1).project(z, g), torch.stack([project_parity(row, g, .1) for row in z]))
