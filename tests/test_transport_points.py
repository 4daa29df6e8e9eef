"""Transport of point clouds: the dense solver and a convex solver as referees, a true certificate, no matrix in memory, and the GPU kernel in Triton's interpreter."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import cvxpy as cp
import pytest
import torch
from hypothesis import given, settings, strategies as st

from fairbook import transport_points
from fairbook.group_targets import InfeasibleTarget
from fairbook.group_transport import fair_sinkhorn, penalized_sinkhorn
from fairbook.projection import ConvergenceWarning
from fairbook.transport_points import fair_sinkhorn_points

ROOT = Path(__file__).resolve().parents[1]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def problem(n=60, m=45, K_s=3, K_w=2, d=2, seed=0, uniform=True):
    "Points, groups (all present), weights, and a feasible target that is neither independence nor what the points would choose."
    gen = torch.Generator().manual_seed(seed)
    s, w = (torch.cat([torch.arange(k), torch.randint(k, (size - k,), generator=gen)]) for k, size in ((K_s, n), (K_w, m)))
    X, Y = (torch.randn(k, d, generator=gen, dtype=torch.float64) / (2 * d**.5) for k in (n, m))
    X[:, 0] += .5 * s
    Y[:, 0] += .5 * w
    a, b = (torch.ones(k).double() if uniform else .2 + torch.rand(k, generator=gen, dtype=torch.float64) for k in (n, m))
    a, b = a / a.sum(), b / b.sum()
    p, q = torch.zeros(K_s).double().index_add_(0, s, a), torch.zeros(K_w).double().index_add_(0, w, b)
    F = .3 + torch.rand(K_s, K_w, generator=gen, dtype=torch.float64)
    for _ in range(2000):
        F = F * (p / F.sum(1))[:, None]
        F = F * (q / F.sum(0))
    return X, Y, s, w, F, a, b


def cost(X, Y): return (X[:, None] - Y).square().sum(-1)


@pytest.mark.parametrize("chunk", [None, 1, 700])
@pytest.mark.parametrize("lam", [None, 2., 200.])
@pytest.mark.parametrize("d, K_s, K_w, ratio", [(1, 2, 2, .1), (2, 3, 2, .02), (16, 2, 4, .05), (64, 4, 1, .02)])
def test_same_as_the_dense_solver(d, K_s, K_w, ratio, lam, chunk):
    X, Y, s, w, F, a, b = problem(70, 50, K_s, K_w, d, uniform=False)
    C = cost(X, Y)
    reg = ratio * float(C.max())
    dense = fair_sinkhorn(C, s, w, F, reg, a, b) if lam is None else penalized_sinkhorn(C, s, w, F, reg, lam, a, b)
    points = fair_sinkhorn_points(X, Y, s, w, F, reg, a, b, lam=lam, chunk=chunk)
    assert points.converged and abs(points.plan - dense.plan).max() <= 1e-9
    assert abs(points.cost - dense.cost) <= 1e-8 and abs(points.group_mass - dense.group_mass).max() <= 1e-9
    assert points.gap <= 1e-7 and abs(points.violation - dense.violation) <= 1e-9


@pytest.mark.parametrize("lam", [None, 5.])
def test_optimal_for_a_convex_solver(lam):
    X, Y, s, w, F, a, b = problem(12, 9, uniform=False)
    C, reg = cost(X, Y), .1
    A, B = (torch.nn.functional.one_hot(t, k).double().numpy() for t, k in ((s, 3), (w, 2)))
    Z, base = cp.Variable((12, 9), nonneg=True), torch.outer(a, b).numpy()            # Z = P / ab: entries near 1, which the solver likes
    P = cp.multiply(base, Z)
    G = A.T @ P @ B
    fit = [G == F.numpy()] if lam is None else []
    value = cp.sum(cp.multiply(C.numpy(), P)) + reg * cp.sum(cp.multiply(base, -cp.entr(Z))) + (0 if lam is None else lam * cp.sum_squares(G - F.numpy()))
    cp.Problem(cp.Minimize(value), [cp.sum(P, 1) == a.numpy(), cp.sum(P, 0) == b.numpy(), *fit]).solve("CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    ours = fair_sinkhorn_points(X, Y, s, w, F, reg, a, b, lam=lam)
    assert abs(ours.plan - torch.from_numpy(P.value)).max() < 1e-8 and abs(ours.cost - (C * torch.from_numpy(P.value)).sum()) < 1e-8


def objective(P, C, a, b, reg): return (P * C).sum() + reg * torch.special.xlogy(P, P / torch.outer(a, b)).sum()


@pytest.mark.parametrize("lam", [None, 3.])
@pytest.mark.parametrize("max_iter", [1, 2, 4, 8, 12])
def test_the_gap_bounds_the_rounded_plan(max_iter, lam):
    "Rounds the plan again, by matrices, and compares its value with that of the solution."
    X, Y, s, w, F, a, b = problem(40, 30, uniform=False)
    C, reg = cost(X, Y), .05
    with pytest.warns(ConvergenceWarning): early = fair_sinkhorn_points(X, Y, s, w, F, reg, a, b, lam=lam, max_iter=max_iter, tol=0.)
    best = fair_sinkhorn_points(X, Y, s, w, F, reg, a, b, lam=lam, tol=1e-11)
    A, B = torch.nn.functional.one_hot(s, 3).double(), torch.nn.functional.one_hot(w, 2).double()
    P = early.plan * (b / early.plan.sum(0)).clamp(max=1)
    if lam is None: P = P * (F / (A.T @ P @ B)).clamp(max=1)[s][:, w]
    da, db, dF = (a - P.sum(1)).clamp(min=0), (b - P.sum(0)).clamp(min=0), (F - A.T @ P @ B).clamp(min=0)
    e = torch.outer(da, db) / da.sum() if lam is not None else torch.outer(da, db) * (dF / torch.outer(dF.sum(1), dF.sum(0)))[s][:, w]
    P = P + e
    assert abs(P.sum(1) - a).max() < 1e-15 and abs(P.sum(0) - b).max() < 1e-15
    penalty = lambda Q: 0 if lam is None else lam * (A.T @ Q @ B - F).square().sum()
    excess = objective(P, C, a, b, reg) + penalty(P) - objective(best.plan, C, a, b, reg) - penalty(best.plan)
    assert -1e-9 <= excess <= early.gap and early.gap > 0
    assert lam is not None or abs(A.T @ P @ B - F).max() < 1e-15


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), n=st.integers(5, 40), m=st.integers(5, 40), K=st.tuples(st.integers(1, 4), st.integers(1, 4)), d=st.integers(1, 5), lam=st.sampled_from([None, .5, 50.]))
def test_margins_group_masses_and_subsidies(seed, n, m, K, d, lam):
    X, Y, s, w, F, a, b = problem(n, m, *K, d, seed, uniform=False)
    r = fair_sinkhorn_points(X, Y, s, w, F, .2, a, b, lam=lam)
    assert r.converged and abs(r.plan.sum(1) - a).sum() < 1e-12 and abs(r.plan.sum(0) - b).sum() < 2e-9 and 0 <= r.gap < 1e-6
    if lam is None: assert abs(r.group_mass - F).sum() < 2e-9
    else: assert abs(r.h + 2 * lam * (r.group_mass - F)).max() < 1e-8 * lam


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50))
def test_invariant_under_shifts_rotations_and_order(seed, shift):
    X, Y, s, w, F, a, b = problem(30, 20, seed=seed)
    r = fair_sinkhorn_points(X, Y, s, w, F, .1, a, b)
    turn, mix = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64))[0], torch.randperm(30)
    moved = fair_sinkhorn_points(X[mix] @ turn + shift, Y @ turn + shift, s[mix], w, F, .1, a, b)
    assert abs(moved.plan - r.plan[mix]).max() < 1e-8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lam", [None, 20.])
@pytest.mark.parametrize("ratio", [.1, .01])
def test_single_precision_has_a_true_certificate(ratio, lam, device):
    X, Y, s, w, F, a, b = (t.to(device) for t in problem(400, 300, d=3))
    reg = ratio * float(cost(X, Y).max())
    r = fair_sinkhorn_points(X.float(), Y.float(), s, w, F, reg, lam=lam)
    fine = fair_sinkhorn_points(X.float().double(), Y.float().double(), s, w, F, reg, lam=lam)
    value = lambda r: objective(r.plan, cost(X.float().double(), Y.float().double()), a, b, reg) + (0 if lam is None else lam * r.violation)
    assert r.converged and r.f.dtype == torch.float64 and 0 <= r.gap < 1e-4 and abs(value(r) - value(fine)) < 1e-4
    assert abs(r.apply(torch.ones(300, device=device)) - 1 / 400).max() < 1e-6


def test_a_part_of_the_points_is_a_good_start():
    X, Y, s, w, F, a, b = problem(2600, 1700, uniform=False)
    calls, thin = [], transport_points._thin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport_points, "_thin", lambda side, *rest: calls.append(len(side)) or thin(side, *rest))
        r = fair_sinkhorn_points(X, Y, s, w, F, .05, a, b, tol=1e-7)
    assert calls == [2600, 1700] and r.converged
    x = fair_sinkhorn_points(X, Y, s, w, F, .05, a, b, tol=1e-7, init=transport_points.PointTransport(**{**vars(r), "f": 0 * r.f, "g": 0 * r.g, "h": 0 * r.h}))
    assert abs(x.cost - r.cost) < 1e-6 and torch.allclose(x.apply(Y), r.apply(Y), atol=1e-8)


def test_a_part_keeps_the_masses_of_groups_even_tiny_ones():
    X, Y, s, w, F, a, b = problem(900, 50, uniform=False)
    s[:] = torch.tensor([0] * 890 + [1] * 3 + [2] * 7)
    side = transport_points._Side(X, s, a, 4)
    part = transport_points._thin(side, 5, 0)
    assert torch.allclose(part.mass, side.mass) and [j - i for i, j in part.ranges] == [111, 3, 5, 0]


def test_empty_groups_and_closed_blocks():
    X, Y, s, w, *_ = problem(40, 30)
    s, w = 2 * (s > 0), 2 * (w > 0)                                  # group 1 is empty on both sides
    p, q = torch.bincount(s, minlength=3).double() / 40, torch.bincount(w, minlength=3).double() / 30
    r = fair_sinkhorn_points(X, Y, s, w, torch.outer(p, q), .3)
    assert r.converged and r.group_mass[1].sum() == 0 and (r.h[1] == -torch.inf).all() and r.gap < 1e-7
    lean = fair_sinkhorn_points(X, Y, s, w, torch.outer(p, q), .3, lam=4.)
    assert lean.converged and lean.h.isfinite().all() and lean.gap < 1e-7
    closed = torch.zeros(3, 3, dtype=torch.float64)
    t = min(float(p[0]), float(q[2])) / 2
    closed[0, 2], closed[0, 0], closed[2, 0], closed[2, 2] = p[0], 0., q[0], p[2] - q[0]
    assert t > 0 and (closed >= 0).all()
    shut = fair_sinkhorn_points(X, Y, s, w, closed, .3)
    assert shut.converged and shut.plan[s == 0][:, w == 0].abs().max() == 0 and 0 <= shut.gap < 1e-7
    again = fair_sinkhorn_points(X, Y, s, w, torch.outer(p, q), .3, init=shut)          # a start with closed blocks opens them
    assert abs(again.plan - r.plan).max() < 1e-9


def test_products_with_the_plan():
    X, Y, s, w, F, a, b = problem(30, 20)
    r = fair_sinkhorn_points(X, Y, s, w, F, .1)
    V, U = torch.randn(20, 3, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    assert torch.allclose(r.apply(V), r.plan @ V, atol=1e-14) and r.apply(V[:, 0]).shape == (30,)
    assert torch.allclose(r.apply_transpose(U), r.plan.T @ U, atol=1e-14) and r.apply(V.float()).dtype == torch.float32


@pytest.mark.parametrize("method, bad, says", [
    ("apply", torch.ones(19), r"\[20\] or \[20, k\], got torch.float32 \[19\]"), ("apply", torch.ones(20, 2, 2), r"\[20, 2, 2\]"),
    ("apply", torch.ones(20).long(), "int64"), ("apply", [1.] * 20, "list"), ("apply_transpose", torch.ones(20), r"\[30\] or \[30, k\]")])
def test_products_refuse(method, bad, says, untyped):
    X, Y, s, w, F, *_ = problem(30, 20)
    with pytest.raises(ValueError, match=says): getattr(fair_sinkhorn_points(X, Y, s, w, F, .5), method)(bad)


def test_a_large_plan_is_not_formed(monkeypatch):
    X, Y, s, w, F, *_ = problem(30, 20)
    r = fair_sinkhorn_points(X, Y, s, w, F, .5)
    monkeypatch.setattr(transport_points, "_MOST", 599)
    with pytest.raises(ValueError, match=r"plan of 30 x 20 pairs .* use apply\(V\)"): r.plan


NAN = torch.tensor([[float("nan"), 0.]] + [[0., 0.]] * 29, dtype=torch.float64)
BAD = {
    "NaN": (dict(X=NAN), "X holds 1 points with NaN or infinite coordinates; drop or impute"),
    "infinite": (dict(Y=torch.full((20, 2), torch.inf).double()), "Y holds 20 points"),
    "one-dimensional": (dict(X=torch.ones(30)), r"X must be a float32 or float64 tensor of points \[n, d\], got torch.float32 \[30\].*\[:, None\]"),
    "integers": (dict(Y=torch.ones(20, 2).long()), "Y must be a float32 or float64 tensor"),
    "a list": (dict(X=[[0., 0.]]), "X must be .* got list"),
    "no points": (dict(X=torch.ones(0, 2)), "X must be"),
    "d differs": (dict(Y=torch.ones(20, 3).double()), "same number of coordinates, got 2 and 3"),
    "dtype differs": (dict(Y=torch.ones(20, 2)), "one dtype and one device, got torch.float64 on cpu and torch.float32"),
    "groups too few": (dict(s=torch.zeros(29).long()), r"s must be an integer tensor \[30\].*got torch.int64 \[29\]"),
    "groups float": (dict(w=torch.zeros(20)), r"w must be an integer tensor \[20\]"),
    "group out of range": (dict(s=torch.full((30,), 3)), r"s must lie in 0\.\.2, .* from 3 to 3"),
    "negative group": (dict(w=torch.full((20,), -1)), r"w must lie in 0\.\.1"),
    "F a vector": (dict(F=[.5, .5]), r"F must be a table \[K_s, K_w\], got shape \[2\]"),
    "negative F": (dict(F=torch.full((3, 2), -1.), lam=1.), "F must hold finite masses >= 0"),
    "NaN F": (dict(F=torch.full((3, 2), float("nan")), lam=1.), "F must hold finite masses"),
    "reg zero": (dict(reg=0.), "reg must be positive and finite, got 0.0; for a plan without entropy .* ot.emd"),
    "reg NaN": (dict(reg=float("nan")), "reg must be positive"),
    "lam zero": (dict(lam=0.), "lam must be positive and finite, got 0.0; lam=None prescribes"),
    "tol negative": (dict(tol=-1.), "tol must be a number >= 0, got -1.0"),
    "max_iter": (dict(max_iter=0), "max_iter must be an integer >= 1, got 0"),
    "chunk": (dict(chunk=0), "chunk must be an integer >= 1, got 0"),
    "weights negative": (dict(a=torch.tensor([-1.] + [2 / 29] * 29)), "a must be positive and finite, got a smallest weight of -1.0"),
    "weights short": (dict(b=torch.ones(3) / 3), r"b must have shape \[20\], got \[3\]"),
    "weights off": (dict(a=torch.ones(30)), "a must sum to 1, got 30; divide it by its sum"),
    "backend": (dict(backend="cuda"), "backend must be 'auto', 'torch' or 'triton', got 'cuda'"),
    "triton in float64": (dict(backend="triton"), r"takes float32 points .* got torch.float64 \[30, 2\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, untyped):
    X, Y, s, w, F, *_ = problem(30, 20)
    change, says = BAD[name]
    with pytest.raises(ValueError, match=says): fair_sinkhorn_points(**{**dict(X=X, Y=Y, s=s, w=w, F=F, reg=.1), **change})


def test_infeasible_target_is_refused():
    X, Y, s, w, F, *_ = problem(30, 20)
    with pytest.raises(InfeasibleTarget, match="off p by up to 0.02"): fair_sinkhorn_points(X, Y, s, w, F + torch.tensor([[.01, .01], [0, 0], [-.01, -.01]]), .1)
    other = fair_sinkhorn_points(X[:20], Y, s[:20], w, torch.outer(torch.bincount(s[:20]).double() / 20, F.sum(0)), .1)
    with pytest.raises(ValueError, match="init.f has 20 entries, this problem needs 30"): fair_sinkhorn_points(X, Y, s, w, F, .1, init=other)


def test_triton_asks_for_a_device(monkeypatch):
    X, Y, s, w, F, *_ = problem(30, 20)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="needs points on a CUDA device"): fair_sinkhorn_points(X.float(), Y.float(), s, w, F, .1, backend="triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package triton"): fair_sinkhorn_points(X.float(), Y.float(), s, w, F, .1, backend="triton")


MEMORY = """
import re, sys, warnings, torch
torch.set_num_threads(1)
from fairbook.transport_points import fair_sinkhorn_points
warnings.simplefilter("ignore")
def megabytes(what):
    with open("/proc/self/status") as status: return int(re.search(what + r":\\s+(\\d+)", status.read())[1]) / 1024
def run(n, chunk):
    X, Y, s = torch.randn(n, 2), torch.randn(n, 2), torch.arange(n) % 2
    fair_sinkhorn_points(X, Y, s, s, torch.full((2, 2), .25), 1., max_iter=1, chunk=chunk).apply(torch.ones(n))
run(2000, None)
before = megabytes("VmRSS")
with open("/proc/self/clear_refs", "w") as refs: refs.write("5")       # the peak starts anew
run(6000, eval(sys.argv[1]))
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's counters")
def test_the_matrix_is_never_formed():
    "The matrix of 6000 x 6000 pairs takes 144 MB in float32, 288 in float64; the second run, in one chunk, shows that the measure would see it."
    extra = [float(subprocess.run([sys.executable, "-c", MEMORY, chunk], capture_output=True, text=True, cwd=ROOT, check=True).stdout) for chunk in ("None", "36_000_000")]
    assert extra[0] < 60 and extra[1] > 140, extra


# --- the kernel, on the CPU

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (extra `gpu`, Linux only)")
SHAPES = [(140, 66, 2, 1, 2, False), (50, 70, 2, 3, 1, False), (70, 65, 2, 1, 16, False), (64, 40, 1, 2, 64, False), (40, 35, 2, 1, 100, False), (60, 50, 3, 2, 3, True)]
INTERPRETED = """
import json, sys, torch
sys.path.insert(0, "tests")
torch.set_num_threads(1)
from fairbook import transport_points as t
from test_transport_points import SHAPES, problem
def off(u, v): return float((u - v).abs().max() / u.abs().max())
def compare(n, m, K_s, K_w, d, empty):
    X, Y, s, w, F, a, b = problem(n, m, K_s, K_w, d, uniform=False)
    if empty: s, w = torch.where(s == 1, 0, s), torch.where(w == K_w - 1, 0, w)
    x, y = t._Side(X.float(), s, a, K_s), t._Side(Y.float(), w, b, K_w)
    torch.manual_seed(0)
    f, g, h, V, z = (torch.randn(*shape, dtype=torch.float64) for shape in [(n,), (m,), (K_s, K_w), (m, 20), (K_s, m)])
    if K_w > 1: h[0, -1] = -torch.inf
    one, two = t._TorchPairs(x.double(), y.double(), .05), t._TritonPairs(x, y, .05)
    (f1, M1), (f2, M2) = one.sweep(f, .1 * g, h), two.sweep(f, .1 * g, h)
    at = f1, .1 * g, h
    return [off(f1, f2), off(M1, M2)] + [off(one.apply(*at, v), two.apply(*at, v)) for v in (V, V[:, :1])] + [off(one.smooth(*at, z), two.smooth(*at, z))]
X, Y, s, w, F, a, b = problem(40, 30, 2, 2)
kernel, torch_ = (t.fair_sinkhorn_points(X.float(), Y.float(), s, w, F, .5, backend=k, max_iter=40) for k in ("triton", "torch"))
whole = [bool(kernel.converged), off(torch_.plan, kernel.plan), off(torch_.apply_transpose(torch.ones(40)), kernel.apply_transpose(torch.ones(40)))]
print(json.dumps(dict(passes=[compare(*shape) for shape in SHAPES], whole=whole)))
"""


@pytest.fixture(scope="module")
def interpreted():
    run = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@needs_triton
@pytest.mark.parametrize("k", range(len(SHAPES)), ids=[str(s) for s in SHAPES])
def test_kernel_agrees_with_the_chunks(k, interpreted): assert max(interpreted["passes"][k]) < 1e-5, interpreted["passes"][k]


@needs_triton
def test_kernel_solves_a_problem(interpreted):
    converged, plan, product = interpreted["whole"]
    assert converged and plan < 1e-3 and product < 1e-3


COMPILED = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fairbook import transport_points as t
numbers = dict(out="*fp64", row_tiles="*i32", column_tiles="*i32", pieces="*i32", n_rows="i32", K="i32", v_step="i32", n_values="i32")
found = []
for generation, d, pad in (80, 2, 16), (90, 64, 64):
    for kernel, values in zip(t._kernels() + t._kernels()[1:], (None, 1, 16)):
        constants = dict(D=d, D_PAD=pad, DIRECT=d <= 8, SIZE=64) | ({"VALUES": values} if values else {})
        signature = {name: "constexpr" if name in constants else numbers.get(name, "*fp32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): v for name, v in constants.items()})
        out = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=dict(num_warps=8))
        found.append([len(out.asm["cubin"]), out.asm["ptx"].count("ex2.approx"), out.asm["ptx"].count("tf32"), out.metadata.shared])
print(json.dumps(found))
"""


@needs_triton
def test_kernels_compile_for_two_generations_of_gpus():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, cwd=ROOT, env=env)
    assert run.returncode == 0, run.stderr[-2000:]
    for size, exponentials, rounded, shared in json.loads(run.stdout):
        assert size > 0 and 16 <= exponentials <= 24 and rounded == 0 and shared <= 96 * 1024      # 64 * 64 pairs by 256 threads: 16 each, and the rescaling
