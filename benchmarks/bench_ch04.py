"""Chapter 4: sweeps with group targets beside POT's, in one process and on one thread. Ratios are formed from minima.

Sweeps are the difference between a long and a short run, so that neither side pays for its set-up. Peers: POT 0.9.7 `sinkhorn_knopp` (numpy) for stored
exponentials and `sinkhorn_log` (torch) for the safe form; `straightforward` is the plain reading of the algorithm, rebuilding the scaled matrix and the plan."""
import time

import numpy as np
import ot
import pytest
import torch

from fairbook import group_transport as gt
from fairbook.fair_sinkhorn import generalized_conditional_gradient
from fairbook.group_transport import fair_sinkhorn, penalized_sinkhorn
from fairbook.matching import gaussian_matching

F = torch.tensor([[.2, .3], [.3, .2]], dtype=torch.float64)
SHORT, LONG = 10, 110                                               # both multiples of ten: POT tests its margins every tenth sweep


def problem(n, seed=0):
    "Points in the unit square, two groups, squared distances with maximum 1."
    gen = torch.Generator().manual_seed(seed)
    x, y = torch.rand(2, n, 2, generator=gen).double()
    s = w = torch.arange(n) % 2
    C = torch.cdist(x + .3 * s[:, None], y + .3 * w[:, None])**2
    return C / C.max(), s, w


def gaussians():
    "The sample of the reference table: 250 x 25, squared distances up to 10.5."
    town = gaussian_matching()
    return town.C, town.s, town.w, town.F


def straightforward(C, s, w, F, reg, sweeps):
    (n, m), K = C.shape, torch.exp(-C / reg)
    A, B = torch.eye(2).double()[s], torch.eye(2).double()[w]
    v, L = torch.ones(m).double() / m, torch.ones(2, 2).double() / 4
    for _ in range(sweeps):
        u = 1 / n / ((K * L[s][:, w]) @ v)
        v = 1 / m / ((K * L[s][:, w]).T @ u)
        L = F / (A.T @ (u[:, None] * K * v) @ B)


def ours(C, s, w, F, reg, sweeps, kind):
    (n, m), K = C.shape, (2, 2)
    p = gt._Problem(C, s, w, torch.full((n,), 1 / n).double(), torch.full((m,), 1 / m).double(), K)
    state = kind(p, reg, p.zeros(n), p.zeros(m), p.zeros(*K))
    gt._sweeps(p, gt._Exactly(p, F.numpy()), state, 0., sweeps)


def peer(C, reg, sweeps, log):
    a = torch.full((len(C),), 1 / len(C)).double()
    if log: return ot.bregman.sinkhorn_log(a, a, C, reg, numItermax=sweeps, stopThr=0)
    return ot.bregman.sinkhorn_knopp(a.numpy(), a.numpy(), C.numpy(), reg, numItermax=sweeps, stopThr=0)


WAYS = {"fair, stored": lambda C, s, w, reg, k: ours(C, s, w, F, reg, k, gt._StoredSweep), "fair, log": lambda C, s, w, reg, k: ours(C, s, w, F, reg, k, gt._LogSweep),
        "straightforward": lambda C, s, w, reg, k: straightforward(C, s, w, F, reg, k),
        "POT, stored": lambda C, s, w, reg, k: peer(C, reg, k, False), "POT, log": lambda C, s, w, reg, k: peer(C, reg, k, True)}


def clock(run, *args):
    "Processor time of this thread: what other programs do does not count."
    start = time.thread_time()
    run(*args)
    return time.thread_time() - start


def sweep_times(n, rounds, ways=WAYS, reg=.1):
    "Seconds per sweep of each way: minimum long run minus minimum short run. The ways take turns; each turn starts with a run that is not counted, so that memory is in place."
    C, s, w = problem(n)
    times = {way: ([], []) for way in ways}
    sizes = {way: (2, 5) if "stored" not in way and n > 1000 else (SHORT, LONG) for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            run(C, s, w, reg, sizes[way][0])
            for k, found in zip(sizes[way], times[way]): found.append(clock(run, C, s, w, reg, k))
    return {way: (min(long) - min(short)) / (sizes[way][1] - sizes[way][0]) for way, (short, long) in times.items()}


@pytest.mark.parametrize("n, rounds", [(500, 10), (2000, 5), (5000, 2)])
@pytest.mark.benchmark(group="ch04 sweeps")
@pytest.mark.filterwarnings("ignore")
def test_sweeps(benchmark, n, rounds):
    t = sweep_times(n, rounds, WAYS if n < 5000 else {k: v for k, v in WAYS.items() if k != "straightforward"})
    ratios = {"stored / POT": t["fair, stored"] / t["POT, stored"], "log / POT": t["fair, log"] / t["POT, log"]}
    if "straightforward" in t: ratios["straightforward / stored"] = t["straightforward"] / t["fair, stored"]
    benchmark.extra_info.update(n=n, **{k: round(v, 3) for k, v in ratios.items()})
    benchmark.pedantic(WAYS["fair, stored"], args=(*problem(n), .1, SHORT), rounds=3)


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3])
@pytest.mark.benchmark(group="ch04 passes")
@pytest.mark.filterwarnings("ignore")
def test_passes(benchmark, scale):
    C, s, w = problem(150)
    plain = fair_sinkhorn(C, s, w, F, scale, method="stabilized")
    best = benchmark(fair_sinkhorn, C, s, w, F, scale)
    benchmark.extra_info.update(reg=scale, passes=best.n_passes.item(), passes_of_sweeps=plain.n_passes.item(), gap=best.gap.item(), ratio=round(best.n_passes.item() / plain.n_passes.item(), 3))


@pytest.mark.parametrize("lam", [1., 3., 10., 33., 100., 333., 1000.])
@pytest.mark.benchmark(group="ch04 penalised 250x25")
def test_penalized(benchmark, lam):
    C, s, w, F = gaussians()
    r = benchmark(penalized_sinkhorn, C, s, w, F, 1., lam)
    benchmark.extra_info.update(lam=lam, n_iter=r.n_iter.item(), gap=r.gap.item())
    assert r.converged and r.n_iter <= 70 and r.gap <= 1e-9


@pytest.mark.parametrize("inner", ["stabilized", "auto"])
@pytest.mark.parametrize("lam", [33., 1000.])
@pytest.mark.benchmark(group="ch04 penalised 250x25")
def test_conditional_gradient(benchmark, lam, inner):
    "The paper's algorithm to the same gap, 1e-9, with sweeps inside as in the paper (`stabilized`), and with our Newton steps inside (`auto`)."
    C, s, w, F = gaussians()
    ours = min(clock(penalized_sinkhorn, C, s, w, F, 1., lam) for _ in range(30))
    run = lambda: generalized_conditional_gradient(C, s, w, F, 1., lam, method=inner)
    result = benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(lam=lam, inner=inner, gap=result.gaps[-1], steps=len(result.gaps), sweeps=result.n_sweeps, ratio=round(min(clock(run) for _ in range(3)) / ours))
    assert result.converged
