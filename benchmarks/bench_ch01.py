"""Chapter 1: the exact parity projection beside cvxpylayers, in one process and on one thread.

Every benchmark is one forward and one backward pass, float64, scores uniform in the box [0, 1], tol .01."""
import subprocess
import sys
from pathlib import Path

import cvxpy as cp
import pytest
import torch
from cvxpylayers.torch import CvxpyLayer

from fairbook.parity import project_parity
from fairbook.projection import project_rows
from fairbook.streaming import StreamingParity

TOL = .01


def batch(n, n_groups, seed=0):
    gen = torch.Generator().manual_seed(seed)
    groups = torch.randint(n_groups, (n,), generator=gen)
    return (.2 * torch.rand(n_groups, generator=gen)[groups] + .8 * torch.rand(n, generator=gen)).double(), groups


def passes(project, z, groups):
    "One forward and one backward pass."
    z = z.clone().requires_grad_()
    project(z, groups).square().sum().backward()
    return z.grad


def mean_rows(groups, n_groups):
    member = torch.nn.functional.one_hot(groups, n_groups).double().T
    return member / member.sum(1, keepdim=True)


def convex_layer(groups, n_groups):
    "The pair form through cvxpylayers, compiled for these groups."
    n, rows = len(groups), mean_rows(groups, n_groups).numpy()
    v, z, tol = cp.Variable(n), cp.Parameter(n), cp.Parameter(nonneg=True)
    pairs = [cp.abs((rows[g] - rows[h]) @ v) <= tol for g in range(n_groups) for h in range(g)]
    layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(v - z)), pairs + [v >= 0, v <= 1]), parameters=[z, tol], variables=[v])
    limit = torch.tensor(TOL, dtype=torch.float64)
    return lambda z, groups: layer(z, limit)[0]


exact = lambda n_groups: lambda z, groups: project_parity(z, groups, TOL, (0., 1.), n_groups=n_groups)


@pytest.mark.parametrize("n_groups", [2, 5, 10, 20, 50])
@pytest.mark.benchmark(group="ch01 parity n=2048")
def test_project_parity(benchmark, n_groups):
    z, groups = batch(2048, n_groups)
    benchmark.extra_info.update(n=2048, n_groups=n_groups, method="project_parity")
    benchmark(passes, exact(n_groups), z, groups)


@pytest.mark.parametrize("how", ["cached", "rebuilt"])
@pytest.mark.parametrize("n, n_groups", [(128, 10), (2048, 2), (2048, 10)])
@pytest.mark.benchmark(group="ch01 cvxpylayers")
@pytest.mark.filterwarnings("ignore")
def test_cvxpylayers(benchmark, n, n_groups, how):
    z, groups = batch(n, n_groups)
    benchmark.extra_info.update(n=n, n_groups=n_groups, method=f"cvxpylayers, {how}")
    layer = convex_layer(groups, n_groups)
    run = passes if how == "cached" else lambda _, z, groups: passes(convex_layer(groups, n_groups), z, groups)
    benchmark.pedantic(run, args=(layer, z, groups), rounds=7 if how == "cached" else 3, warmup_rounds=1)


@pytest.mark.parametrize("n", [128, 10_000, 100_000, 300_000, 1_000_000])
@pytest.mark.benchmark(group="ch01 parity growth")
def test_growth(benchmark, n):
    z, groups = batch(n, 10)
    benchmark.extra_info.update(n=n, n_groups=10, method="project_parity", peak_mb=peak_mb(n))
    benchmark.pedantic(passes, args=(exact(10), z, groups), rounds=5 if n > 10_000 else 50, warmup_rounds=1)


def peak_mb(n):
    "Peak memory that one pass adds, in MiB, measured in a process of its own (Linux; elsewhere NaN)."
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, "benchmarks")
from bench_ch01 import *
torch.set_num_threads(1)
status = lambda: {{k: int(v.split()[0]) for k, v in (line.split(":") for line in Path("/proc/self/status").open() if line.startswith("Vm"))}}
passes(exact(10), *batch(100, 10))
z, groups = batch({n}, 10)
Path("/proc/self/clear_refs").write_text("5")                # the high-water mark starts anew
before = status()["VmRSS"]
passes(exact(10), z, groups)
print((status()["VmHWM"] - before) / 1024)"""
    if not Path("/proc/self/clear_refs").exists(): return float("nan")
    return round(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout), 1)


@pytest.mark.parametrize("kind", ["overlapping", "redundant bands", "far outside the box"])
@pytest.mark.parametrize("rows", [10, 50])
@pytest.mark.benchmark(group="ch01 rows n=2048")
def test_project_rows(benchmark, rows, kind):
    z, _ = batch(2048, 2)
    gen = torch.Generator().manual_seed(1)
    if kind == "overlapping":                              # overlapping attributes: mean of each near the overall mean
        member = torch.randint(2, (2048, rows), generator=gen).double()
        B = (member / member.sum(0) - 1 / 2048).T
        target = torch.zeros(rows, dtype=torch.float64)
    else:                                                  # both values of overlapping attributes, near given means: half the rank
        member = torch.randint(2, (2048, rows // 2), generator=gen).double()
        B = torch.cat([member / member.sum(0), (1 - member) / (1 - member).sum(0)], 1).T
        target = B @ torch.rand(2048, generator=gen, dtype=torch.float64)
    if kind == "far outside the box": z = .5 + 10 * torch.randn(2048, generator=gen, dtype=torch.float64)
    benchmark.extra_info.update(n=2048, rows=rows, kind=kind, method="project_rows")
    benchmark(passes, lambda z, _: project_rows(z, B, target - .001, target + .001, (0., 1.)), z, None)


@pytest.mark.benchmark(group="ch01 stream")
def test_streaming(benchmark):
    z, groups = batch(2000, 2)
    benchmark.extra_info.update(n=2000, method="StreamingParity, one sample per call")
    stream = StreamingParity(2, .05)
    benchmark.pedantic(lambda: [stream(z[i:i + 1], groups[i:i + 1]) for i in range(2000)], rounds=5, warmup_rounds=1)
