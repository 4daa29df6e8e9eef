"""`project_parity`: exact on every nasty batch, the right gradients, and errors that say what to do."""
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy.optimize import brentq

import cvxpy as cp
from fairbook import parity
from fairbook.parity import parity_residual, project_parity
from stress import pair_rows, stress_batches

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def draw(seed, n=40, n_groups=5, scale=1.):
    "Scores around the unit box, and groups that are all present."
    gen = torch.Generator().manual_seed(seed)
    groups = torch.cat([torch.arange(n_groups), torch.randint(n_groups, (n - n_groups,), generator=gen)])
    return .5 + scale * torch.randn(n, generator=gen, dtype=torch.float64), groups


def nested_bisection(z, s, tol, box):
    "The definition, by two nested root searches: slow, and independent of any sorting."
    parts = [z[s == g] for g in np.unique(s)]
    m0 = [np.clip(x, *box).mean() for x in parts]
    def shift(x, target):
        f = lambda t: np.clip(x + t, *box).mean() - target
        if abs(f(0.)) < 1e-16: return 0.
        return brentq(f, box[0] - x.max() - 1, box[1] - x.min() + 1, xtol=1e-16, rtol=1e-15)
    shifts = lambda a: [shift(x, np.clip(m, a, a + tol)) for x, m in zip(parts, m0)]
    balance = lambda a: sum(len(x) * t for x, t in zip(parts, shifts(a)))
    if max(m0) - min(m0) <= tol: return np.clip(z, *box)
    a = brentq(balance, min(m0), max(m0) - tol, xtol=1e-16, rtol=1e-15)
    t = dict(zip(np.unique(s), shifts(a)))
    return np.clip(z + np.array([t[g] for g in s]), *box)


def test_optimal_on_2000_stress_batches():
    worst = [0., 0., 0.]
    for z, g, n_groups, tol, bounds in stress_batches(2000, seed=11):
        r = parity_residual(project_parity(z, g, tol, bounds, n_groups=n_groups), z, g, tol, bounds)
        worst = [max(w, x) for w, x in zip(worst, (r.excess, r.stationarity, r.balance))]
    assert max(worst) <= 1e-12, worst


def values_and_gradients(z, g, n_groups, tol, bounds, v):
    "Projection and its gradients in the scores and in the tolerance, in one vector each."
    z, tol = z.clone().requires_grad_(), torch.tensor(tol, dtype=torch.float64, requires_grad=True)
    y = project_parity(z, g, tol, bounds, n_groups=n_groups)
    return y.detach(), torch.cat([x.reshape(-1) for x in torch.autograd.grad(y, (z, tol), v)])


OTHER_WAYS = {"always sorted": ("_guess", lambda *_: None), "on tensors": ("_arrays", lambda *xs: xs)}     # tensors: the way of a GPU


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_the_other_ways_through_the_code_give_the_same(way, monkeypatch):
    guesses, guess = [], parity._guess
    for i, (z, g, n_groups, tol, bounds) in enumerate(stress_batches(480, seed=15)):
        case = z, g, n_groups, tol, bounds, torch.randn(len(z), generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        monkeypatch.setattr(parity, "_guess", lambda *a: guesses.append(guess(*a)) or guesses[-1])
        y, grad = values_and_gradients(*case)
        with monkeypatch.context() as other:
            other.setattr(parity, *OTHER_WAYS[way])
            y_, grad_ = values_and_gradients(*case)
            r = parity_residual(y_, z, g, tol, bounds)
        assert max(r.excess, r.stationarity, r.balance) <= 1e-12 and (y - y_).abs().max() < 1e-12
        if way == "on tensors" or i % 12 not in (3, 7): assert (grad - grad_).abs().max() < 1e-9            # ties and edges sit on kinks
    assert 100 < sum(x is None for x in guesses) < len(guesses) - 100                                       # both ways are well covered


def test_rows_that_need_the_sort_do_not_disturb_the_others():
    z, g = torch.stack([pinned_batch("high")[0], draw(6, n=30)[0], pinned_batch("low")[0]]), torch.arange(30) % 3
    y = project_parity(z, g, .01, (0., 1.))
    for i in range(3): assert torch.allclose(y[i], project_parity(z[i], g, .01, (0., 1.)), rtol=0, atol=1e-14)


def test_the_gradient_may_be_batched():
    z, g = draw(7)
    z.requires_grad_()
    f = lambda z: project_parity(z, g, .01, (0., 1.))
    rows = torch.autograd.grad(f(z), z, torch.eye(len(z), dtype=torch.float64), is_grads_batched=True)[0]
    assert torch.allclose(rows, torch.autograd.functional.jacobian(f, z), rtol=0, atol=1e-14)


def test_float32_meets_the_gap_on_stress_batches():
    for z, g, n_groups, tol, bounds in stress_batches(600, seed=12):
        y = project_parity(z.float(), g, tol, bounds, n_groups=n_groups)
        assert y.dtype == torch.float32 and y.isfinite().all()
        y, present = y.double(), torch.bincount(g, minlength=n_groups) > 0
        means = (torch.zeros(n_groups, dtype=torch.float64).index_add_(0, g, y) / torch.bincount(g, minlength=n_groups))[present]
        assert means.max() - means.min() <= tol + 1e-6
        if bounds is not None: assert y.min() >= bounds[0] and y.max() <= bounds[1]


@pytest.mark.parametrize("seed", range(30))
def test_agrees_with_nested_bisection(seed):
    z, g = draw(seed, n=8 + 4 * seed, n_groups=2 + seed % 6, scale=(.3, 1., 5.)[seed % 3])
    tol = (1e-6, .01, .05)[seed // 3 % 3]
    y = project_parity(z, g, tol, (0., 1.))
    assert np.abs(y.numpy() - nested_bisection(z.numpy(), g.numpy(), tol, (0., 1.))).max() < 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_clarabel(seed):
    z, g = draw(seed, n=16 + 5 * seed, n_groups=2 + seed % 6, scale=(.3, 1., 5.)[seed % 3])
    tol, v = (0., .01, .05)[seed // 3 % 3], cp.Variable(len(z))
    rows = pair_rows(g, int(g.max()) + 1).numpy()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(v - z.numpy())), [rows @ v <= tol, rows @ v >= -tol, v >= 0, v <= 1])
    problem.solve("CLARABEL", tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
    y = project_parity(z, g, tol, (0., 1.)).numpy()
    assert np.abs(y - v.value).max() < 1e-7                                        # Clarabel's own accuracy
    assert ((y - z.numpy())**2).sum() <= problem.value + 1e-9                      # never a worse objective


def dense_jacobian(z, y, g, n_groups, tol, bounds):
    "Theorem 3: D - D B' (B D B')^+ B D with the active pair rows."
    lo, hi = bounds if bounds is not None else (-np.inf, np.inf)
    rows = pair_rows(g, n_groups)
    B = torch.cat([rows[(rows @ y) > tol - 1e-9], rows[(rows @ y) < -tol + 1e-9]])
    D = torch.diag(((y > lo + 1e-9) & (y < hi - 1e-9)).double())
    return D - D @ B.T @ torch.linalg.pinv(B @ D @ B.T, atol=1e-10) @ B @ D if len(B) else D


def test_jacobian_is_the_projector_of_theorem_3_also_when_groups_are_pinned():
    pinned = 0
    for i, (z, g, n_groups, tol, bounds) in enumerate(stress_batches(240, seed=13, max_n=48)):
        if i % 12 in (3, 7): continue                                             # ties and edges sit on kinks, where no derivative exists
        z, tol = z.clone().requires_grad_(), max(tol, 1e-3)
        f = lambda z: project_parity(z, g, tol, bounds, n_groups=n_groups)
        y, J = f(z).detach(), torch.autograd.functional.jacobian(f, z)
        assert (J - dense_jacobian(z.detach(), y, g, n_groups, tol, bounds)).abs().max() < 1e-9
        if bounds is not None: pinned += any(((y[g == k] <= 0) | (y[g == k] >= 1)).all() for k in g.unique())
    assert pinned > 20


def pinned_batch(side):
    "Group 0 far outside the box on one side: all its members are clipped, its mean cannot move, and it pins the level."
    gen = torch.Generator().manual_seed(5)
    z = torch.rand(30, generator=gen, dtype=torch.float64) * .5 + .25
    g = torch.arange(30) % 3
    z[g == 0] = (5. if side == "high" else -4.) + torch.randn(10, generator=gen, dtype=torch.float64)
    return z, g


@pytest.mark.parametrize("side", ["high", "low"])
def test_a_pinned_group_fixes_the_level(side):
    z, g = pinned_batch(side)
    y = project_parity(z, g, .01, (0., 1.))
    assert (y[g == 0] == (1. if side == "high" else 0.)).all()
    r = parity_residual(y, z, g, .01, (0., 1.))
    assert max(r.excess, r.stationarity, r.balance) < 1e-13


@pytest.mark.parametrize("batch", ["ordinary", "boxed", "no box", "high", "low", "weighted"])
def test_gradcheck_and_gradgradcheck_in_scores_and_tolerance(batch):
    z, g = pinned_batch(batch) if batch in ("high", "low") else draw(3, n=24, n_groups=4, scale=3. if batch == "boxed" else .3)
    weights = torch.rand(len(z), generator=torch.Generator().manual_seed(1), dtype=torch.float64) + .5 if batch == "weighted" else None
    tol = torch.tensor(.05, dtype=torch.float64, requires_grad=True)
    f = lambda z, tol: project_parity(z, g, tol, None if batch == "no box" else (0., 1.), weights=weights)
    assert torch.autograd.gradcheck(f, (z.requires_grad_(), tol))
    assert torch.autograd.gradgradcheck(f, (z, tol))


def test_gradients_by_central_differences_on_stress_batches():
    checked = 0
    for i, (z, g, n_groups, tol, bounds) in enumerate(stress_batches(240, seed=14, max_n=64)):
        gen, tol, h = torch.Generator().manual_seed(i), max(tol, 1e-3), 1e-6
        d, v = torch.randn(2, len(z), generator=gen, dtype=torch.float64)
        e = torch.randn((), generator=gen).item()
        at = lambda x: project_parity(z + x * d, g, tol + x * e, bounds, n_groups=n_groups)
        right, left = (at(h) - at(0.)) / h, (at(0.) - at(-h)) / h
        if (right - left).abs().max() > 1e-5: continue                            # a kink: no derivative to compare with
        zz, tt = z.clone().requires_grad_(), torch.tensor(tol, dtype=torch.float64, requires_grad=True)
        grad_z, grad_tol = torch.autograd.grad(project_parity(zz, g, tt, bounds, n_groups=n_groups), (zz, tt), v)
        assert abs((grad_z @ d + grad_tol * e - v @ (right + left) / 2).item()) < 1e-6 * max(1., (v.norm() * d.norm()).item())
        checked += 1
    assert checked > 200


seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(2, 60), st.integers(1, 7), st.sampled_from([0., .01, .3]), st.sampled_from([None, (0., 1.), (-1., 4.), (0., np.inf)]))
def test_theorem_2_non_expansive_and_idempotent(seed, n, n_groups, tol, bounds):
    gen = torch.Generator().manual_seed(seed)
    a, b = 3 * torch.randn(2, n, generator=gen, dtype=torch.float64)
    g = torch.randint(n_groups, (n,), generator=gen)
    pa, pb = (project_parity(x, g, tol, bounds) for x in (a, b))
    assert (pa - pb).square().sum() <= (a - b) @ (pa - pb) + 1e-10
    assert torch.allclose(project_parity(pa, g, tol + 1e-12, bounds), pa, atol=1e-9)


@given(seeds, st.integers(2, 60), st.integers(1, 7), st.sampled_from([0., .01, .3]))
def test_symmetries(seed, n, n_groups, tol):
    gen = torch.Generator().manual_seed(seed)
    z, g = torch.randn(n, generator=gen, dtype=torch.float64), torch.randint(n_groups, (n,), generator=gen)
    y, order = project_parity(z, g, tol), torch.randperm(n, generator=gen)
    assert torch.allclose(project_parity(z[order], g[order], tol), y[order], atol=1e-10)             # order of samples
    assert torch.allclose(project_parity(z + 2, g, tol), y + 2, atol=1e-10)                           # translation
    assert torch.allclose(project_parity(5 * z, g, 5 * tol), 5 * y, atol=1e-9)                        # scale
    assert torch.allclose(project_parity(-z, g, tol), -y, atol=1e-10)                                 # reflection
    assert torch.allclose(project_parity(z, n_groups - 1 - g, tol, n_groups=n_groups), y, atol=1e-10)  # names of groups
    assert abs((y - z).sum()) < 1e-9                                                                  # the total is kept without a box


@given(seeds, st.integers(2, 40), st.integers(1, 5))
def test_order_within_a_group_is_kept(seed, n, n_groups):
    gen = torch.Generator().manual_seed(seed)
    z, g = 2 * torch.randn(n, generator=gen, dtype=torch.float64), torch.randint(n_groups, (n,), generator=gen)
    y = project_parity(z, g, .01, (0., 1.))
    for k in range(n_groups):
        assert (y[g == k][z[g == k].argsort()].diff() >= -1e-12).all()


@given(seeds, st.integers(2, 20), st.integers(1, 4))
def test_integer_weights_repeat_samples(seed, n, n_groups):
    gen = torch.Generator().manual_seed(seed)
    z, g, k = torch.randn(n, generator=gen, dtype=torch.float64), torch.randint(n_groups, (n,), generator=gen), torch.randint(1, 5, (n,), generator=gen)
    y = project_parity(z, g, .05, (0., 1.), weights=k.double(), n_groups=n_groups)
    assert torch.allclose(y.repeat_interleave(k), project_parity(z.repeat_interleave(k), g.repeat_interleave(k), .05, (0., 1.), n_groups=n_groups), atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (2, 0), (0,)])
@pytest.mark.parametrize("bounds", [None, (0., 1.)])
def test_shapes_types_devices(device, dtype, shape, bounds):
    gen = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=gen, dtype=torch.float64).to(device, dtype).requires_grad_()
    g = torch.randint(3, shape, generator=gen).to(device)
    y = project_parity(z, g, .02, bounds, n_groups=3)
    assert y.shape == z.shape and y.dtype == dtype and y.device == z.device
    y.sum().backward()
    assert z.grad.shape == z.shape
    if len(shape) == 2 and z.numel():
        rows = torch.stack([project_parity(z[i], g[i], .02, bounds, n_groups=3) for i in range(len(z))])
        assert torch.allclose(y, rows, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0., .3, -2.])
def test_a_box_of_one_value_leaves_that_value_and_no_gradient(dtype, value):
    z, g = (3 * torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype).requires_grad_(), torch.arange(12) % 3
    with torch.no_grad(): z[0] = value
    tol = torch.tensor(.01, dtype=torch.float64, requires_grad=True)
    y = project_parity(z, g, tol, (value, value))
    assert y.dtype == dtype and torch.equal(y, torch.full_like(z, value))
    y.square().sum().backward()
    assert (z.grad == 0).all() and tol.grad == 0
    r = parity_residual(y[1].detach().double(), z[1].detach().double(), g, .01, (y[1, 0].item(),) * 2)
    assert (r.excess, r.stationarity, r.balance) == (0., 0., 0.)


def test_one_tolerance_per_row_and_its_gradient():
    z, g = torch.randn(4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), torch.arange(20) % 3
    tol = torch.tensor([0.01, .05, .1, .2], dtype=torch.float64, requires_grad=True)
    y = project_parity(z, g, tol, (0., 1.))
    for i in range(4): assert torch.allclose(y[i], project_parity(z[i], g, tol[i].item(), (0., 1.)), atol=1e-12)
    assert torch.autograd.gradcheck(lambda t: project_parity(z, g, t, (0., 1.)), tol)


def test_a_single_group_and_absent_groups_are_no_constraint():
    z = torch.tensor([-1., .5, 3.])
    assert torch.equal(project_parity(z, torch.zeros(3, dtype=torch.long), 0., (0., 1.)), z.clamp(0, 1))
    assert torch.equal(project_parity(z, torch.full((3,), 4), 0., (0., 1.), n_groups=9), z.clamp(0, 1))


def test_a_float_tolerance_is_taken_in_double_precision():
    z, g = draw(1)
    y = project_parity(z, g, .05)
    means = torch.stack([y[g == k].mean() for k in range(5)])
    assert means.max() - means.min() <= .05 + 1e-14


def test_compiled_code_may_contain_the_projection():
    z, g = draw(2)
    f = torch.compile(lambda z: 2 * project_parity(z * 1.5, g, .01, (0., 1.)), backend="eager")
    assert torch.allclose(f(z), 2 * project_parity(z * 1.5, g, .01, (0., 1.)))


def test_the_residual_notices_wrong_answers():
    z, g = draw(4)
    y = project_parity(z, g, .02, (0., 1.))
    assert parity_residual(y, z, g, .02, (0., 1.)).balance < 1e-14
    assert parity_residual(y + 1e-3, z, g, .02, (0., 1.)).balance > 1e-4                       # feasible or not, the shifts do not balance
    assert parity_residual(y.clone().index_add_(0, torch.tensor([0, 7]), torch.tensor([1e-3, -1e-3]).double()), z, g, .02, (0., 1.)).stationarity > 1e-4
    assert parity_residual(z.clamp(0, 1), z, g, .02, (0., 1.)).excess > 1e-3
    assert parity_residual(torch.full_like(z, .5), z, g, .02, (0., 1.)).stationarity > .1     # feasible, but far


ok_z, ok_g = torch.rand(6), torch.tensor([0, 1, 2, 0, 1, 2])
BAD = [
    (dict(z=torch.tensor([.1, np.nan, .2, .3, .4, .5])), "1 NaN or infinite"),
    (dict(z=torch.tensor([.1, np.inf, -np.inf, .3, .4, .5])), "2 NaN or infinite"),
    (dict(z=torch.arange(6)), "float32 or float64"),
    (dict(z=[.1, .2]), "float32 or float64"),
    (dict(groups=ok_g.float()), "integer tensor"),
    (dict(groups=ok_g.bool()), "integer tensor"),
    (dict(groups=[0, 1, 2, 0, 1, 2]), "integer tensor"),
    (dict(groups=ok_g[:5]), "shape"),
    (dict(z=torch.rand(6, 1)), "squeeze"),
    (dict(groups=ok_g - 1), "from -1 to 1"),
    (dict(n_groups=2), r"0\.\.1"),
    (dict(tol=-.1), "tol must be finite and >= 0"),
    (dict(tol=float("nan")), "tol"),
    (dict(tol=torch.tensor([.1, .2])), "batch shape"),
    (dict(bounds=(1., 0.)), r"bounds must be \(low, high\) .*got \(1.0, 0.0\)"),
    (dict(bounds=(0., float("nan"))), r"bounds must be .*got \(0.0, nan\)"),
    (dict(bounds=(np.inf, np.inf)), r"bounds must be .*got \(inf, inf\)"),
    (dict(bounds=(-np.inf, -np.inf)), r"bounds must be .*got \(-inf, -inf\)"),
    (dict(bounds=(None, 1.)), "bounds must be .*use -inf/inf for an open side"),
    (dict(bounds=.5), "bounds must be .*got 0.5; use -inf/inf"),
    (dict(bounds=[0., .5, 1.]), r"bounds must be .*got \[0.0, 0.5, 1.0\]; use -inf/inf"),
    (dict(bounds=torch.rand(2, 2)), "bounds must be .*got tensor"),
    (dict(weights=[1.] * 6), "weights must be a tensor, got list"),
    (dict(weights=np.ones(6)), "weights must be a tensor, got ndarray"),
    (dict(weights=torch.tensor([1., 1., 1., 1., 1., 0.])), "positive"),
    (dict(weights=torch.tensor([1., 1., 1., 1., 1., float("nan")])), "positive"),
    (dict(weights=torch.ones(5)), "weights must have shape"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_input_says_what_to_do(change, message, untyped):
    args = dict(z=ok_z, groups=ok_g, tol=.1, bounds=None, n_groups=None, weights=None) | change
    with pytest.raises(ValueError, match=message): project_parity(args.pop("z"), args.pop("groups"), args.pop("tol"), args.pop("bounds"), **args)
