"""`project_rows`: no failure on nasty batches, gradients of all arguments, and errors that name the rows."""
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from fairbook.parity import project_parity
from fairbook.projection import ConvergenceWarning, _Arrays, _gram, _Rows, project_rows, solve_rows
from stress import KINDS, ROW_KINDS, mean_rows, pair_rows, stress_batches, stress_rows

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
INF = float("inf")


def certificate(z, rows, lower, upper, bounds, found):
    "Worst violation of: y is the clip (R.2), rows within bounds, multipliers only on the side that is met. Rows scaled to length one."
    lo, hi = bounds if bounds is not None else (-INF, INF)
    length = rows.norm(dim=1)
    length = torch.where(length > 0, length, 1.)
    clip = (z - rows.T @ found.lam).clamp(lo, hi)
    at, lam = rows @ found.y / length, found.lam * length
    lower, upper = lower / length, upper / length
    outside = torch.maximum(lower - at, at - upper).amax().clamp(min=0)
    side = torch.where(lam > 0, torch.minimum(lam, (upper - at).abs()), torch.minimum(-lam, (at - lower).abs()))
    return float((clip - found.y).abs().max()), float(outside), float(side.amax())


def test_no_failure_on_500_stress_batches():
    worst, kinds = 0., set()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        for i, (z, rows, lower, upper, bounds) in enumerate(stress_rows(500, seed=0)):
            found, scale = solve_rows(z, rows, lower, upper, bounds), max(1., float(z.abs().max()))
            assert found.converged
            worst = max(worst, *(v / scale for v in certificate(z, rows, lower, upper, bounds, found)))
            assert certificate(z, rows, lower, upper, bounds, found)[1] <= 1e-8
            kinds.add((KINDS[i % len(KINDS)], ROW_KINDS[(i // len(KINDS) + i) % len(ROW_KINDS)]))
    assert worst < 1e-10
    assert len(kinds) == len(KINDS) * len(ROW_KINDS)


def test_nearly_redundant_rows_converge():
    "Rows that miss redundancy by 1e-6: multipliers are huge, the scores are not."
    gen = torch.Generator().manual_seed(0)
    for z, rows, lower, upper, bounds in stress_rows(48, seed=5, max_n=200):
        rows = rows + 1e-6 * rows.norm(dim=1, keepdim=True) * torch.randn(rows.shape, generator=gen).double()
        middle = rows @ torch.rand(len(z), generator=gen).double()
        half = torch.where((upper - lower).isfinite(), (upper - lower) / 2, .05)
        assert solve_rows(z, rows, middle - half, middle + half, bounds).kkt_residual < 1e-8


def clarabel(z, rows, lower, upper, bounds):
    lower, upper, rows, y = lower.numpy(), upper.numpy(), rows.numpy(), cp.Variable(len(z))
    at = rows @ y
    limits = [at[j] >= lower[j] for j in range(len(rows)) if np.isfinite(lower[j])] + [at[j] <= upper[j] for j in range(len(rows)) if np.isfinite(upper[j])]
    lo, hi = bounds if bounds is not None else (-INF, INF)
    limits += [y >= lo] * bool(np.isfinite(lo)) + [y <= hi] * bool(np.isfinite(hi))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(y - z.numpy())), limits)
    problem.solve("CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return torch.tensor(y.value) if problem.status == "optimal" else None


def test_equals_a_convex_solver():
    compared = 0
    for z, rows, lower, upper, bounds in stress_rows(60, seed=21, max_n=64):
        if len(rows) > 40: continue
        reference = clarabel(z, rows, lower, upper, bounds)
        if reference is None: continue
        y, scale = project_rows(z, rows, lower, upper, bounds), max(1., float(z.abs().max()))
        # the exact projection is at most as far as any feasible point, and within sqrt(excess) of it
        assert (y - z).square().sum() <= (reference - z).square().sum() + 1e-6 * scale ** 2
        assert (y - reference).abs().max() < 1e-5 * scale
        compared += 1
    assert compared > 30


def test_equals_the_sorted_projection_on_disjoint_groups():
    "Values and gradients of the other solver of this library, which shares no line with this one."
    smooth, gradients = ("ordinary", "far", "singletons", "pinned", "empty", "imbalanced", "unbounded"), 0
    for i, (z, g, k, tol, bounds) in enumerate(stress_batches(120, seed=4, max_n=300)):
        if k > 14: continue
        rows, scale, v = pair_rows(g, k), max(1., float(z.abs().max())), torch.randn(len(z), dtype=torch.float64)
        z, t = z.requires_grad_(), torch.tensor(tol, dtype=torch.float64, requires_grad=True)
        y, other = project_rows(z, rows, -t.expand(len(rows)), t.expand(len(rows)), bounds), project_parity(z, g, t, bounds, n_groups=k)
        assert (y - other).abs().max() < 1e-9 * scale
        if KINDS[i % len(KINDS)] not in smooth or tol < 1e-3: continue                # no unique gradient at ties and at tol = 0
        for ours, theirs in zip(*(torch.autograd.grad(o, [z, t], v) for o in (y, other))): assert (ours - theirs).abs().max() < 1e-7 * scale
        gradients += 1
    assert gradients > 20


@pytest.mark.parametrize("seed", range(12))
def test_gradients_by_finite_differences(seed):
    gen = torch.Generator().manual_seed(seed)
    n, K = 9, 3
    rows = torch.randn(K, n, generator=gen).double()
    z = 2 * torch.randn(n, generator=gen).double()
    inside = rows @ (torch.rand(n, generator=gen).double() * 2 - 1)
    lower, upper = inside - torch.tensor([.1, .02, 4.]), inside + torch.tensor([.2, .3, 4.])
    inputs = [t.clone().requires_grad_() for t in (z, rows, lower, upper)]
    layer = lambda *a: project_rows(*a, (-1., 1.))
    assert torch.autograd.gradcheck(layer, inputs, atol=1e-6)
    assert torch.autograd.gradgradcheck(layer, inputs, atol=1e-5)


def test_gradgrad_for_z_is_zero_almost_everywhere():
    z = torch.rand(20, dtype=torch.float64, requires_grad=True)
    y = project_rows(z, mean_rows(torch.arange(20) % 3, 3), .4, .45, (0., 1.))
    g, = torch.autograd.grad(y.square().sum(), z, create_graph=True)
    H, = torch.autograd.grad(g.sum(), z)
    J = torch.autograd.functional.jacobian(lambda t: project_rows(t, mean_rows(torch.arange(20) % 3, 3), .4, .45, (0., 1.)), z)
    assert torch.allclose(H, 2 * J.T @ (J @ torch.ones(20, dtype=torch.float64)), atol=1e-12)        # nothing but 2 J'J


def test_jacobian_is_an_orthogonal_projector_with_redundant_rows():
    gen = torch.Generator().manual_seed(1)
    for z, g, k, tol, bounds in stress_batches(36, seed=8, max_n=60):
        if k > 14: continue
        rows, tol = pair_rows(g, k), tol + .01
        f = lambda t: project_rows(t, rows, -tol, tol, bounds)
        J = torch.autograd.functional.jacobian(f, z)
        assert (J - J.T).abs().max() < 1e-11 and (J @ J - J).abs().max() < 1e-11
        order, size = torch.randperm(2 * len(rows), generator=gen), torch.rand(2 * len(rows), generator=gen).double() + .5
        other = torch.cat([rows, -rows])[order] * size[:, None]                       # every row twice, in any order, sign and scale
        assert (J - torch.autograd.functional.jacobian(lambda t: project_rows(t, other, -tol * size, tol * size, bounds), z)).abs().max() < 1e-10


def test_common_tolerance_of_redundant_rows():
    gen = torch.Generator().manual_seed(2)
    g = torch.arange(60) % 6
    z = torch.rand(60, generator=gen).double() + .1 * g
    rows, v = pair_rows(g, 6), torch.randn(60, generator=gen).double()
    f = lambda t: v @ project_rows(z, rows, -t.expand(15), t.expand(15), (0., 1.2))
    t = torch.tensor(.03, dtype=torch.float64, requires_grad=True)
    exact, = torch.autograd.grad(f(t), t)
    assert abs(exact - (f(t + 1e-6) - f(t - 1e-6)) / 2e-6) < 1e-6


def test_pinned_groups_in_values_and_gradients():
    "Group 0 is clipped as a whole on an open set of z: its mean cannot move."
    z = torch.tensor([-9., -8., .4, .9, .7, .2], dtype=torch.float64, requires_grad=True)
    rows, t = pair_rows(torch.tensor([0, 0, 1, 1, 2, 2]), 3), torch.tensor(.3, dtype=torch.float64, requires_grad=True)
    f = lambda z, t: project_rows(z, rows, -t.expand(3), t.expand(3), (0., 1.))
    y = f(z, t)
    assert torch.equal(y[:2], torch.zeros(2, dtype=torch.float64)) and abs(y[2:4].mean() - .3) < 1e-14
    assert torch.autograd.gradcheck(f, [z, t]) and torch.autograd.gradgradcheck(f, [z, t])


@given(st.integers(0, 10**6))
def test_projections_do_not_expand_and_are_idempotent(seed):
    gen = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, 12, generator=gen).double()
    a, b = 3 * torch.randn(2, 12, generator=gen).double()
    upper = rows @ torch.rand(12, generator=gen).double()
    ya, yb = (project_rows(t, rows, upper - .1, upper, (0., 1.)) for t in (a, b))
    assert (ya - yb).norm() <= (a - b).norm() + 1e-10
    assert (project_rows(ya, rows, upper - .1, upper, (0., 1.)) - ya).abs().max() < 1e-10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_types_and_devices(device, dtype):
    gen = torch.Generator().manual_seed(3)
    z = torch.randn(2, 3, 30, generator=gen).to(device, dtype)
    rows = torch.randn(2, 3, 2, 30, generator=gen).to(device, dtype)
    y = project_rows(z, rows, torch.zeros(2, device=device, dtype=dtype), .1, (-1, 1))
    assert y.shape == z.shape and y.dtype == dtype and y.device == z.device
    for i in np.ndindex(2, 3):
        alone = project_rows(z[i], rows[i], 0., .1, (-1, 1))
        assert torch.equal(alone, y[i])
        at = rows[i] @ y[i]
        slack = 1e-12 if dtype == torch.float64 else 1e-5
        assert at.min() >= -slack and at.max() <= .1 + slack
    shared = solve_rows(z, rows[0, 0], 0., .1)
    assert shared.lam.shape == (2, 3, 2) and shared.converged.all() and shared.n_iter.shape == (2, 3)


def test_batched_gradients_with_shared_rows():
    z = torch.randn(3, 15, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, 15, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, rows: project_rows(z, rows, -.1, .1, (-1., 1.)), [z, rows], atol=1e-6)


def test_sparse_rows_no_rows_and_no_samples():
    z, rows = torch.randn(10).double(), mean_rows(torch.arange(10) % 2, 2)
    assert torch.allclose(project_rows(z, rows.to_sparse(), 0., .1), project_rows(z, rows, 0., .1), atol=1e-14)
    assert torch.equal(project_rows(z, rows[:0], 0., .1, (0, 1)), z.clamp(0, 1))
    assert project_rows(z[:0], rows[:, :0], 0., .1).shape == (0,)
    assert project_rows(torch.empty(0, 10).double(), rows, 0., .1).shape == (0, 10)


def test_inside_a_compiled_function():
    rows, z = torch.randn(3, 20).double(), torch.randn(20).double().requires_grad_()
    twice = torch.compile(lambda t: 2 * project_rows(t, rows, -.1, .1, (0., 1.)), backend="eager")
    grads = [torch.autograd.grad(f(z).square().sum(), z)[0] for f in (twice, lambda t: 2 * project_rows(t, rows, -.1, .1, (0., 1.)))]
    assert torch.equal(*grads)


def test_equations_and_all_zero_rows():
    z, rows = torch.randn(10).double(), torch.stack([torch.ones(10), torch.zeros(10)]).double()
    y = project_rows(z, rows, torch.tensor([1., -1.]).double(), torch.tensor([1., 1.]).double())
    assert torch.allclose(y, z + (1 - z.sum()) / 10, atol=1e-14)
    with pytest.raises(ValueError, match=r"rows \[1\].*row 1 by 0.5"):
        project_rows(z, rows, torch.tensor([1., .5]).double(), torch.tensor([1., 1.]).double())


def test_contradictions_are_named():
    "Many rows, two of which clash; and a band that the box cannot reach."
    gen = torch.Generator().manual_seed(0)
    rows = mean_rows(torch.randint(5, (200,), generator=gen), 5)
    rows = torch.cat([rows, rows[2:3]])
    lower, upper = torch.full((6,), .1).double(), torch.full((6,), .8).double()
    lower[5], upper[5] = .9, 1.
    with pytest.raises(ValueError, match=r"rows \[2, 5\].*violation is 0.1 "):
        project_rows(torch.randn(200, generator=gen).double(), rows, lower, upper, (0., 1.))
    lower[5], upper[5], lower[1], upper[1] = .1, .8, 1.2, 1.3
    with pytest.raises(ValueError, match=r"rows \[1\].*row 1 by 0.2"):
        project_rows(torch.randn(200, generator=gen).double(), rows, lower, upper, (0., 1.))
    z = torch.zeros(2, 200).double()
    with pytest.raises(ValueError, match=r"batch element \(0,\)"): project_rows(z, rows, lower, upper, (0., 1.))


def test_infeasible_stress_batches_never_pass_silently():
    for z, rows, lower, upper, bounds in stress_rows(48, seed=2, max_n=100):
        rows = torch.cat([rows, torch.ones(2, len(z)).double() / len(z)])
        lower, upper = torch.cat([lower, torch.tensor([.5, -INF]).double()]), torch.cat([upper, torch.tensor([INF, .499]).double()])
        with pytest.raises(ValueError, match="total violation is"): project_rows(z, rows, lower, upper, bounds)


def test_barely_feasible_is_solved():
    "One point is left: every sample at the upper end of the box."
    z, rows = torch.randn(50).double(), torch.ones(1, 50).double() / 50
    assert (project_rows(z, rows, 1., 2., (0., 1.)) - 1).abs().max() < 1e-8


def test_warns_when_stopped_early():
    z, rows, lower, upper, bounds = list(stress_rows(14, seed=0))[13]
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        assert not solve_rows(z, rows, lower, upper, bounds, max_iter=1).converged


GOOD = dict(z=torch.zeros(4), rows=torch.ones(2, 4), lower=-1., upper=1., bounds=(0, 1))
BAD = [
    (dict(z=torch.tensor([0., float("nan"), 0., 0.])), r"z contains nan at \[1\]"),
    (dict(z=torch.tensor([0., INF, 0., 0.])), r"z contains inf at \[1\]"),
    (dict(z=torch.zeros(4, dtype=torch.int64)), "z must be a float tensor"),
    (dict(z=torch.tensor(1.)), "z must be a float tensor"),
    (dict(rows=torch.ones(2, 5)), "n = 4"),
    (dict(rows=torch.ones(4)), "rows must be"),
    (dict(rows=torch.full((2, 4), INF)), "rows contains inf"),
    (dict(rows=torch.ones(2, 4, dtype=torch.int64)), "rows must be a float tensor"),
    (dict(rows=torch.ones(3, 2, 4)), "leading dimensions"),
    (dict(lower=torch.zeros(3)), "lower must be a number or have one entry for each of the 2 rows"),
    (dict(upper=torch.ones(1)), "upper must be a number"),
    (dict(lower=float("nan")), "lower contains nan"),
    (dict(lower=INF), "lower contains inf"),
    (dict(upper=-INF), "upper contains -inf"),
    (dict(lower=torch.tensor([0., 2.])), "lower must not exceed upper, got 2 > 1 in row 1"),
    (dict(bounds=(1, 0)), "bounds must be"),
    (dict(bounds=(0, float("nan"))), "bounds must be"),
    (dict(bounds=(INF, INF)), "bounds must be"),
    (dict(bounds=(None, 1.)), r"bounds must be \(low, high\) with two numbers, got \(None, 1.0\); use -inf/inf for an open side"),
    (dict(bounds=1.), "bounds must be .* two numbers, got 1.0"),
    (dict(bounds=(0, .5, 1)), "bounds must be .* two numbers"),
    (dict(bounds=(0,)), "bounds must be .* two numbers"),
    (dict(bounds=("a", "b")), "bounds must be .* two numbers"),
]


def test_a_box_of_one_point_is_a_box():
    z, rows = torch.randn(6).double(), torch.ones(1, 6).double()
    assert torch.equal(project_rows(z, rows, 0., 6., (.5, .5)), torch.full((6,), .5).double())
    with pytest.raises(ValueError, match="total violation is"): project_rows(z, rows, 4., 6., (.5, .5))


def test_the_kept_gram_matrix_does_not_drift():
    "Steps that add and drop samples, down to a few small ones: what is left is no rounding error of what was there."
    gen = torch.Generator().manual_seed(0)
    B = torch.randn(8, 300, generator=gen).double() * 10 ** (-4 * torch.rand(300, generator=gen).double())
    order, work = B.norm(dim=0).argsort(descending=True), _Arrays(_Rows(B[0], B, B[:, 0], B[:, 0], 0., 1.))
    for k in list(range(0, 300, 3)) + list(range(299, 0, -7)):
        free = torch.ones(300, dtype=torch.bool)
        free[order[:k]] = False
        exact = (B * free) @ B.T
        assert (torch.tensor(_gram(work, free.numpy())) - exact).abs().max() < 1e-11 * exact.trace()


@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
@pytest.mark.parametrize("function", [project_rows, solve_rows])
def test_bad_input(untyped, function, change, message):
    with pytest.raises(ValueError, match=message): function(**GOOD | change)
