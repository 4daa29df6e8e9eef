"""Seeded batches that break projection solvers: shared by the tests of `fairbook.projection` and `fairbook.fairness_layer`.

`stress_batches` yields batches for parity between disjoint groups; `stress_rows` yields general rows, many of them redundant.
Kinds rotate, so any 12 consecutive batches hold every kind of values. All tensors are float64 on the CPU."""
from itertools import combinations

import torch

KINDS = ("ordinary", "far", "saturated", "ties", "singletons", "pinned", "empty", "edges", "tiny", "imbalanced", "one_sided", "unbounded")
ROW_KINDS = ("pairs", "mean", "marginal", "odds", "residual", "duplicates", "user", "ranges")


def _groups(kind: str, n: int, k: int, gen: torch.Generator) -> torch.Tensor:
    "Group of each sample: each of the k groups has a sample if n allows, except for the kinds that want it otherwise."
    g = torch.randint(k, (n,), generator=gen)
    if kind == "imbalanced": g = torch.where(torch.rand(n, generator=gen) < .97, 0, g)
    if kind == "singletons":                              # every group but one has a single sample
        g, m = torch.zeros_like(g), min(n, k) - 1
        g[torch.randperm(n, generator=gen)[:m]] = torch.arange(1, m + 1)
    elif kind == "empty" and k > 1: g = torch.where(g == int(torch.randint(k, (1,), generator=gen)), (g + 1) % k, g)
    elif n >= k: g[torch.randperm(n, generator=gen)[:k]] = torch.arange(k)
    return g


def _values(kind: str, g: torch.Tensor, k: int, gen: torch.Generator) -> torch.Tensor:
    "Raw values, before any box."
    n, rand, randn = len(g), lambda *s: torch.rand(*s, generator=gen).double(), lambda *s: torch.randn(*s, generator=gen).double()
    level = randn(k)
    if kind == "far": return 10 * randn(n)
    if kind == "saturated": return torch.where(rand(n) < .5, 1., 0.) + torch.where(rand(n) < .5, 0., 1.) * randn(n) * 1e-3 + 5 * level[g]
    if kind == "ties": return (4 * rand(n)).round() / 4
    if kind == "pinned":                                  # whole groups far above or below the box, the others inside it
        far = torch.where(rand(k) < .4, 0., torch.where(rand(k) < .5, -1., 1.))
        return torch.where(far[g] == 0, rand(n), 50 * far[g] + randn(n))
    if kind == "edges": return torch.randint(2, (n,), generator=gen).double()
    if kind == "unbounded": return 3 * randn(n) + 3 * level[g]
    return torch.sigmoid(1.5 * randn(n) + level[g])


def stress_batches(n_batches: int, seed: int = 0, max_n: int = 2048):
    "Yields `n_batches` times (z [n] float64, groups [n] int64, n_groups, tol in [0, .05], bounds (lo, hi) or None)."
    gen = torch.Generator().manual_seed(seed)
    for i in range(n_batches):
        kind = KINDS[i % len(KINDS)]
        n = 4 + i % 5 if kind == "tiny" else int(4 * (max_n / 4) ** float(torch.rand((), generator=gen)))
        k = 2 + int(torch.randint(3 if kind == "tiny" else 13, (1,), generator=gen)) if i % 9 else min(50, max(2, n // 3))
        tol = (0., 0., 1e-6, .01, .05)[int(torch.randint(5, (1,), generator=gen))]
        if i % 4 == 0: tol = .05 * float(torch.rand((), generator=gen))
        bounds = {"unbounded": None, "one_sided": (0., float("inf"))}.get(kind, (-3.5, 3.5) if i % 11 == 10 else (0., 1.))
        g = _groups(kind, n, k, gen)
        yield _values(kind, g, k, gen), g, k, tol, bounds


def mean_rows(g: torch.Tensor, k: int) -> torch.Tensor:
    "Rows of group means [k, n]; an empty group gives an all-zero row."
    hot = torch.nn.functional.one_hot(g, k).double().T
    return hot / hot.sum(1, keepdim=True).clamp(min=1)


def pair_rows(g: torch.Tensor, k: int) -> torch.Tensor:
    "Rows m_a - m_b of all pairs [k(k-1)/2, n]; a pair with an empty group gives an all-zero row."
    m = mean_rows(g, k)
    rows = [(m[a] - m[b]) * bool(m[a].any() and m[b].any()) for a, b in combinations(range(k), 2)]
    return torch.stack(rows)


def stress_rows(n_batches: int, seed: int = 0, max_n: int = 2048):
    "Yields `n_batches` times (z [n], rows [K, n], lower [K], upper [K], bounds): always feasible, K <= 50 or pairs of at most 14 groups."
    gen = torch.Generator().manual_seed(seed + 10_000)
    rand = lambda *s: torch.rand(*s, generator=gen).double()
    for i, (z, g, k, tol, bounds) in enumerate(stress_batches(n_batches, seed, max_n)):
        kind, n = ROW_KINDS[(i // len(KINDS) + i) % len(ROW_KINDS)], len(z)
        lo, hi = bounds if bounds is not None else (-float("inf"), float("inf"))
        inside = lo + (hi - lo) * rand(n) if hi < float("inf") else max(lo, 0.) + rand(n)      # some feasible point
        if kind == "pairs":
            if k > 14: g, k = g % 14, 14
            rows = pair_rows(g, k)
            lower, upper = torch.full((len(rows),), -tol).double(), torch.full((len(rows),), tol).double()
            if i % 3 == 0:                               # the same as 182 one-sided rows
                rows, lower, upper = torch.cat([rows, -rows]), torch.full((2 * len(rows),), -float("inf")).double(), torch.cat([upper, upper])
        elif kind == "mean":                             # rows m_g - overall mean, rank k - 1
            rows = mean_rows(g, k)
            rows = rows - rows.any(1, keepdim=True).double() / n
            lower, upper = torch.full((k,), -tol).double(), torch.full((k,), tol).double()
        elif kind in ("marginal", "odds"):
            cols = torch.randint(2, (n, 5), generator=gen) if kind == "marginal" else g[:, None] % 3
            cells = [torch.nn.functional.one_hot(cols[:, j], 3).double().T for j in range(cols.shape[1])]
            if kind == "odds":                           # groups within each label
                label = torch.randint(2, (n,), generator=gen).double()
                cells = [c * label for c in cells] + [c * (1 - label) for c in cells]
            rows = []
            for c in cells:
                m = c / c.sum(1, keepdim=True).clamp(min=1)
                rows += [(m[a] - m[b]) * bool(m[a].any() and m[b].any()) for a, b in combinations(range(3), 2)]
            rows = torch.stack(rows)
            lower, upper = torch.full((len(rows),), -tol).double(), torch.full((len(rows),), tol).double()
        elif kind == "residual":                         # 10 rows of rank 6: both values of 5 overlapping attributes
            cols = torch.randint(2, (n, 5), generator=gen).double()
            rows = torch.cat([cols, 1 - cols], 1).T
            rows = rows / rows.sum(1, keepdim=True).clamp(min=1)
            lower, upper = rows @ inside - tol, rows @ inside + tol
        elif kind == "duplicates":                       # repeated, negated, rescaled and all-zero rows, mixed equalities
            m = mean_rows(g, k)[:12]
            rows = torch.cat([m, 3 * m, -.01 * m[:5], torch.zeros(2, n).double(), m.sum(0, keepdim=True)])
            at = rows @ inside
            slack = torch.where(rand(len(rows)) < .5, 0., tol) * rows.abs().sum(1)
            lower, upper = at - slack, at + slack
        elif kind == "user":                             # dense rows of mixed scale, mixed sides
            K = int(torch.randint(1, min(51, max(2, n)), (1,), generator=gen))
            rows = torch.randn(K, n, generator=gen).double() * 10 ** (4 * rand(K, 1) - 2)
            at, side = rows @ inside, torch.randint(4, (K,), generator=gen)
            width = tol * rows.norm(dim=1)
            lower = torch.where(side == 0, -float("inf"), at - width)
            upper = torch.where(side == 1, float("inf"), torch.where(side == 3, at + width, at + 2 * width))
        else:                                            # sums over overlapping index ranges, some of them single samples
            K = int(torch.randint(2, 50, (1,), generator=gen))
            a, size = torch.randint(n, (K,), generator=gen), (n * rand(K) ** 3).long() + 1
            t = torch.arange(n)
            rows = ((t >= a[:, None]) & (t < (a + size)[:, None])).double()
            lower = rows @ inside - tol
            upper = torch.where(rand(K) < .5, lower + 2 * tol, float("inf"))
        yield z, rows, lower, upper, bounds
