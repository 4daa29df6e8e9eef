"""Chapter 4: point clouds without the matrix. A sweep beside one over a stored matrix; growth of time and memory up to n = m = 100,000.

"One sweep" is the row update with the mass that every column then gets from every group, one pass over all pairs, and from these the column and the group update."""
import json
import subprocess
import sys
import time

import pytest
import torch

from fairbook import group_transport as gt
from fairbook.transport_points import _Side, _TorchPairs, _TritonPairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIMER = time.perf_counter if DEVICE == "cuda" else time.process_time         # on the CPU what other programs do does not count

ALONE = """
import json, re, sys, time, torch
torch.set_num_threads(1)
from fairbook.transport_points import _Rule, _Side, _TorchPairs, _move
def megabytes(what):
    with open("/proc/self/status") as status: return int(re.search(what + r":\\s+(\\d+) kB", status.read())[1]) * 1024 / 1e6
def sweeps(n, rounds):
    "Processor seconds of the fastest sweep, and the mass that columns then get from all rows, which is 1 as the rows are right."
    gen, s, weight, seconds = torch.Generator().manual_seed(0), torch.arange(n) % 2, torch.ones(n).double() / n, []
    x, y = (_Side(torch.randn(n, 2, generator=gen).double() + s[:, None], s, weight, 2) for _ in range(2))
    pairs, rule, at = _TorchPairs(x, y, .5), _Rule(torch.full((2, 2), .25).double(), None, x.mass, y.mass), (0 * x.weight, 0 * y.weight, torch.zeros(2, 2).double())
    for _ in range(rounds):
        start = time.process_time()
        f, M = pairs.sweep(*at)
        at = _move(pairs, rule, f, *at[1:], M)
        seconds.append(time.process_time() - start)
    return min(seconds), float(M.sum())
sweeps(2000, 2)
before = megabytes("VmRSS")
with open("/proc/self/clear_refs", "w") as refs: refs.write("5")       # the peak starts anew
seconds, mass = sweeps(int(sys.argv[1]), int(sys.argv[2]))
print(json.dumps(dict(seconds=seconds, mass=mass, extra_mb=megabytes("VmHWM") - before)))
"""


def sides(n, d, dtype, K=2):
    gen = torch.Generator().manual_seed(0)
    s, weight = torch.arange(n) % K, torch.ones(n).double() / n
    return [_Side((torch.randn(n, d, generator=gen) + s[:, None]).to(DEVICE, dtype), s.to(DEVICE), weight.to(DEVICE), K) for _ in range(2)]


def sweep(pairs, zero, h):
    pairs.sweep(zero, zero, h)
    if DEVICE == "cuda": torch.cuda.synchronize()


@pytest.mark.parametrize("K", [1, 2, 7])
@pytest.mark.parametrize("d", [2, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.benchmark(group="ch04 points sweep n=4000", timer=TIMER)
def test_sweep(benchmark, d, dtype, K):
    x, y = sides(4000, d, dtype, K)
    engine = _TritonPairs if DEVICE == "cuda" and dtype == torch.float32 else _TorchPairs
    zero, h = torch.zeros(4000, dtype=torch.float64, device=DEVICE), torch.zeros(K, K, dtype=torch.float64, device=DEVICE)
    benchmark.extra_info.update(n=4000, d=d, K=K, dtype=str(dtype)[6:], method=engine.__name__, device=DEVICE)
    benchmark.pedantic(sweep, args=(engine(x, y, float(d)), zero, h), rounds=10, warmup_rounds=1)


def stored(how):
    "A function that makes one sweep in float64 from a stored cost of the same points: plain logsumexp over rows and columns (one group), or the general solver's sweep in logarithms or around stored exponentials (two groups)."
    x, y = sides(4000, 2, torch.float64)
    C, zero, h = torch.cdist(x.X, y.X)**2, torch.zeros(4000, dtype=torch.float64, device=DEVICE), torch.zeros(2, 2, dtype=torch.float64, device=DEVICE)
    if how != "logsumexp":
        p = gt._Problem(C, x.group, y.group, x.weight, y.weight, (2, 2))
        return (gt._LogSweep if how == "log" else gt._StoredSweep)(p, 2., *map(p.array, (zero, zero, h))).sweep
    def plain():
        f = -2 * torch.logsumexp(y.weight.log() - C / 2, 1)
        return -2 * torch.logsumexp(x.weight.log()[:, None] + (f[:, None] - C) / 2, 0)
    return plain


@pytest.mark.parametrize("how", ["logsumexp", "log", "stored"])
@pytest.mark.benchmark(group="ch04 points sweep n=4000", timer=TIMER)
def test_sweep_of_a_stored_matrix(benchmark, how):
    run = stored(how)
    def once():
        run()
        if DEVICE == "cuda": torch.cuda.synchronize()
    benchmark.extra_info.update(n=4000, d=2, K=1 if how == "logsumexp" else 2, dtype="float64", method=f"matrix, {how}", device=DEVICE)
    benchmark.pedantic(once, rounds=10, warmup_rounds=1)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's counters")
@pytest.mark.parametrize("n, rounds", [(5000, 5), (10_000, 3), (20_000, 3), (100_000, 1)])
@pytest.mark.benchmark(group="ch04 points growth")
def test_growth(benchmark, n, rounds):
    "Sweeps in float64 on the CPU, in a process of its own for each n: processor time, and peak memory from before the points were drawn."
    found = {}
    def once(): found.update(json.loads(subprocess.run([sys.executable, "-c", ALONE, str(n), str(rounds)], capture_output=True, text=True, check=True).stdout))
    benchmark.pedantic(once, rounds=1)
    assert found["extra_mb"] <= 1000 and abs(found["mass"] - 1) < 1e-9
    benchmark.extra_info.update(n=n, d=2, K=2, dtype="float64", sweeps=rounds, method="_TorchPairs", device="cpu", **found)
