"""`fairbook.smoothing`: certificates that are sound, exact where they say so, hold as often as they say, and refuse what they can not certify."""
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, getcontext
from fractions import Fraction
from itertools import combinations

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import binom, binomtest, norm
from torch import nn

from fairbook import smoothing
from fairbook.smoothing import (Certificate, center_smoothing, exact_line, lattice_smoothing, line_coordinates, line_path, linear_radius,
                                projection_certificate, quantile_rank, randomized_smoothing, shifted_mass)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
F64 = torch.empty(0, dtype=torch.float64)
seeds = st.integers(0, 2**31 - 1)


def mlp(seed, widths, last=False, scale=1.5):
    "A random ReLU network in float64."
    gen = torch.Generator().manual_seed(seed)
    layers = [m for n, k in zip(widths, widths[1:]) for m in (nn.Linear(n, k), nn.ReLU())]
    for m in layers[::2]:
        m.weight.data = scale * torch.randn(m.weight.shape, generator=gen) / m.in_features ** .5
        m.bias.data = torch.randn(m.bias.shape, generator=gen)
    return nn.Sequential(*(layers if last else layers[:-1])).double()


def case(seed, widths=(4, 12, 9, 3), last=False):
    "A network, a linear head, an individual, a direction."
    gen = torch.Generator().manual_seed(seed + 1)
    head = nn.Linear(widths[-1], 3).double()
    head.weight.data, head.bias.data = torch.randn(3, widths[-1], generator=gen).double(), torch.randn(3, generator=gen).double()
    return mlp(seed, widths, last), head, torch.randn(widths[0], generator=gen, dtype=torch.float64), torch.randn(widths[0], generator=gen, dtype=torch.float64)


# --- Lemma 1, Theorem 2, Proposition 3

@given(seeds, st.floats(-3, 3), st.floats(.3, 3))
def test_lemma_1_no_set_loses_more_than_the_half_space(seed, shift, sigma):
    edges = np.sort(np.random.default_rng(seed).normal(0, 2 * sigma, 8))
    mass = lambda m: sum(norm.cdf(b, m, sigma) - norm.cdf(a, m, sigma) for a, b in edges.reshape(4, 2))
    assert mass(shift) >= shifted_mass(mass(0.), abs(shift) / sigma) - 1e-12


def test_the_half_space_is_the_equality_case():
    for p in (.1, .5, .9): assert abs(norm.cdf(norm.ppf(p), 1.3, 1) - shifted_mass(p, 1.3)) < 1e-14
    assert abs(shifted_mass(shifted_mass(.7, 2.), -2.) - .7) < 1e-13


@pytest.mark.parametrize("n", [1, 7, 400])
@pytest.mark.parametrize("alpha", [.001, .3])
def test_lower_limit_is_scipys_one_sided_exact_interval(n, alpha):
    for k in {0, 1, n // 2, n}:
        want = binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low
        assert abs(smoothing._lower(k, n, alpha) - want) < 1e-9


def test_randomized_radius_is_the_formula_on_the_counts():
    h = lambda x: (x.norm(dim=1) > 1).long()
    x = torch.tensor([.3, .1, 0.], dtype=torch.float64)
    got = randomized_smoothing(h, x, sigma=.4, n=5000, n0=50, alpha=.01, seed=3)
    noise = .4 * np.random.default_rng([0, 3]).standard_normal((5050, 3))[50:]
    k = int((np.linalg.norm(x.numpy() + noise, axis=1) <= 1).sum())
    low = binomtest(k, 5000, alternative="greater").proportion_ci(.99, method="exact").low
    assert got.label == 0 and abs(got.bound - .4 * norm.ppf(low)) < 1e-6 and got.evaluations == 5050 and got.confidence == .99


def test_theorem_2_coverage_in_3000_repeats():
    "h = 1[x > 0] at x = .7: the true radius is .7."
    runs = [randomized_smoothing(lambda x: x[:, 0] > 0, torch.tensor([.7]), sigma=1., n=200, n0=10, alpha=.05, seed=s) for s in range(3000)]
    wrong = sum(r.bound > .7 for r in runs if r.label == 1) + sum(not r.abstained and r.label == 0 for r in runs)
    assert binom.ppf(1e-4, 3000, .015) < wrong <= binom.ppf(1 - 1e-5, 3000, .05)


def test_randomized_abstains_on_the_boundary():
    runs = [randomized_smoothing(lambda x: x[:, 0] > 0, torch.tensor([0.]), sigma=1., n=1000, seed=s) for s in range(50)]
    assert sum(r.abstained for r in runs) >= 48 and all(r.label is None and r.bound == 0 and not r.certified for r in runs if r.abstained)


@given(seeds, st.integers(2, 6), st.integers(1, 5))
def test_proposition_3_no_shorter_move_changes_the_class(seed, n_classes, d):
    gen = torch.Generator().manual_seed(seed)
    head, c = nn.Linear(d, n_classes).double(), 3 * torch.randn(20, d, generator=gen, dtype=torch.float64)
    r, label = linear_radius(head, c), head(c).argmax(-1)
    steps = torch.randn(50, 20, d, generator=gen, dtype=torch.float64)
    assert (head(c + (1 - 1e-12) * r[:, None] * steps / steps.norm(dim=-1, keepdim=True)).argmax(-1) == label).all()


@pytest.mark.parametrize("seed", range(5))
def test_linear_radius_is_the_solution_of_the_quadratic_programs(seed):
    torch.manual_seed(seed)
    head, c = nn.Linear(4, 3).double(), torch.randn(4, dtype=torch.float64)
    W, b, label = head.weight.detach().numpy(), head.bias.detach().numpy(), int(head(c).argmax())
    def nearest(j):
        v = cp.Variable(4)
        return cp.Problem(cp.Minimize(cp.norm(v)), [(W[j] - W[label]) @ (v + c.numpy()) + b[j] - b[label] >= 0]).solve("CLARABEL")
    assert abs(float(linear_radius(head, c)) - min(nearest(j) for j in range(3) if j != label)) < 1e-6


def test_linear_radius_at_the_edges():
    head = nn.Linear(2, 3).double()
    head.weight.data[1], head.bias.data = head.weight.data[0], F64.new_tensor([1., 0., -100.])
    assert linear_radius(head, F64.new_zeros(2)) > 50                      # class 1 never wins, though its row is that of class 0
    one = nn.Linear(2, 1, bias=False).double()
    assert linear_radius(one, F64.new_zeros(2)) == 0 and linear_radius(one, one.weight.data[0] / one.weight.data.norm()) == pytest.approx(1)


# --- center smoothing

def smallest_ball(Z, k):
    "Least radius of any disc that holds k of the points: its circle goes through two points (as a diameter) or three."
    best = np.inf
    for a, b in combinations(Z, 2):
        c, r = (a + b) / 2, np.linalg.norm(a - b) / 2
        if r < best and (np.linalg.norm(Z - c, axis=1) <= r + 1e-12).sum() >= k: best = r
    for p in combinations(Z, 3):
        M, rhs = 2 * (np.array(p[1:]) - p[0]), [q @ q - p[0] @ p[0] for q in p[1:]]
        if abs(np.linalg.det(M)) < 1e-12: continue
        c = np.linalg.solve(M, rhs)
        r = np.linalg.norm(c - p[0])
        if r < best and (np.linalg.norm(Z - c, axis=1) <= r + 1e-12).sum() >= k: best = r
    return best


@settings(max_examples=25)
@given(seeds, st.integers(4, 11))
def test_small_ball_is_a_2_approximation(seed, n):
    Z = np.random.default_rng(seed).standard_normal((n, 2))
    k = (n + 1) // 2
    c, r = smoothing._small_ball(torch.from_numpy(Z), k)
    best = smallest_ball(Z, k)
    assert best - 1e-9 <= r <= 2 * best + 1e-9
    assert (np.linalg.norm(Z - c.numpy(), axis=1) <= r + 1e-12).sum() >= k


@pytest.mark.parametrize("d, offset, copies", [(1, 0., 1), (3, 1e7, 1), (40, -1e3, 1), (2, 5., 4)])
def test_small_ball_is_the_one_of_the_loop(d, offset, copies):
    Z = torch.randn(120, d, dtype=torch.float64).repeat(copies, 1) + offset
    radii = torch.stack([(Z - x).norm(dim=-1).kthvalue(60).values for x in Z])
    c, r = smoothing._small_ball(Z, 60)
    assert r == pytest.approx(float(radii.min()), rel=1e-9) and float((Z - c).norm(dim=-1).kthvalue(60).values) == pytest.approx(r, rel=1e-12)
    assert smoothing._small_ball(torch.zeros(30, d, dtype=torch.float64), 15)[1] == 0


@given(st.integers(1, 3000), st.floats(.02, .98), st.floats(1e-4, .3))
def test_ranks_are_the_least_that_keep_the_level(n, q, alpha):
    k = quantile_rank(n, q, alpha)
    assert (k == n + 1 or binom.sf(k - 1, n, q) <= alpha) and binom.sf(k - 2, n, q) > alpha
    any_, dkw = quantile_rank(n, q, alpha, "anytime"), quantile_rank(n, q, alpha, "dkw")
    assert k <= any_ and k <= dkw                                            # exact is never worse
    assert dkw == n + 1 or dkw / n >= q + math.sqrt(math.log(1 / alpha) / 2 / n) - 1e-12


@settings(max_examples=20)
@given(st.floats(.5, .98), st.floats(.01, .2))
def test_anytime_ranks_keep_their_level_over_all_looks(q, alpha):
    "Exact probability, by dynamic programming, that S_m reaches the rank at any m <= 300: it is at most alpha."
    alive, lost = np.array([1.]), 0.
    for m in range(1, 301):
        alive = np.append(alive * (1 - q), 0.) + np.append(0., alive * q)
        k = quantile_rank(m, q, alpha, "anytime")
        lost, alive[k:] = lost + alive[k:].sum(), 0.
    assert .1 * alpha < lost + (alpha if quantile_rank(300, q, alpha, "anytime") > 300 else 0.) and lost <= alpha


def plain_center_smoothing(f, sigma, eps, n, alpha, delta, seed):
    "The procedure of the paper, line by line, on the same draws: loops, medians by order statistics, Hoeffding and DKW."
    draw = lambda step: f(torch.from_numpy(sigma * np.random.default_rng([step, seed]).standard_normal((n, 1)))).numpy()
    Z, fresh, again = draw(1), draw(2), draw(3)
    medians = [np.sort(np.linalg.norm(Z - x, axis=1))[(n + 1) // 2 - 1] for x in Z]
    c, r = Z[np.argmin(medians)], min(medians)
    delta_1 = math.sqrt(math.log(2 / (alpha / 2)) / 2 / n)
    p = (np.linalg.norm(fresh - c, axis=1) <= r).mean()
    q = norm.cdf(norm.ppf(.5 + delta) + eps / sigma) + math.sqrt(math.log(1 / (alpha / 2)) / 2 / n)
    d = np.sort(np.linalg.norm(again - c, axis=1))
    return max(delta_1, .5 - (p - delta_1)) > delta or q > 1, 3 * d[math.ceil(n * q) - 1]


CODES = {"line": lambda t: t, "bent": lambda t: torch.cat([t, t.abs(), (3 * t).sin()], 1), "jump": lambda t: torch.cat([(t > .2).to(t), t.tanh()], 1),
         "network": lambda t: mlp(5, (1, 20, 8))(t)}


@pytest.mark.parametrize("code", CODES)
def test_dkw_is_the_papers_procedure(code):
    f = lambda t: CODES[code](t).detach()
    for seed in range(4):
        got = center_smoothing(f, 1, sigma=.8, eps=.5, n=2000, n_center=2000, bound="dkw", seed=seed, like=F64)
        abstained, radius = plain_center_smoothing(f, .8, .5, 2000, .01, .05, seed)
        assert got.abstained == abstained and (abstained or got.radius == pytest.approx(radius, rel=1e-12)) and got.evaluations == 6000


@pytest.mark.parametrize("code", CODES)
def test_exact_reaches_the_papers_radius_with_a_seventh_of_the_evaluations(code):
    run = lambda seed, **kw: center_smoothing(CODES[code], 1, sigma=.65, eps=1., seed=seed, like=F64, **kw)
    ours, paper = [run(s) for s in range(12)], [run(s, n=10_000, n_center=5000, bound="dkw") for s in range(5)]
    assert sum(c.abstained for c in ours) <= 1 and all(c.evaluations == 4000 <= 30_000 / 7 for c in ours)
    assert np.mean([c.radius for c in ours if not c.abstained]) <= 1.02 * np.mean([c.radius for c in paper if not c.abstained])


FEW = dict(sigma=1., eps=1., n=260, n_center=120, alpha=.1, delta=.2, like=F64)


def test_theorem_5_coverage_in_1000_pairs_of_runs():
    for code in ("bent", "jump"):
        at = lambda x, seed: center_smoothing(lambda t: CODES[code](t + x), 1, seed=seed, **FEW)
        pairs = [(at(0., 2 * s), at(1., 2 * s + 1)) for s in range(500)]
        answered = [(a, b) for a, b in pairs if not (a.abstained or b.abstained)]
        far = sum(float((a.center - b.center).norm()) > a.radius for a, b in answered)
        assert len(answered) > 400 and far <= binom.ppf(1 - 1e-5, 500, .1)


@pytest.mark.parametrize("sequential", [False, True])
def test_the_ball_is_as_heavy_as_it_must_be_in_1000_repeats(sequential):
    "f(t) = t: the mass of the ball is known. At most .045 of the runs may be wrong; the exact rank comes near that."
    more = dict(sequential=True, head=lambda c: 9.) if sequential else {}
    runs = [center_smoothing(lambda t: t, 1, seed=s, **FEW | more) for s in range(1000)]
    mass = lambda c: norm.cdf(float(c.center) + c.radius / 3) - norm.cdf(float(c.center) - c.radius / 3)
    wrong = sum(mass(c) < shifted_mass(.7, -1.) for c in runs if not c.abstained and c.radius < math.inf)
    assert wrong <= binom.ppf(1 - 1e-5, 1000, .045) and (sequential or wrong > 10)


def test_sequential_decides_clear_cases_within_300_draws():
    for tolerated, certified in ((30., True), (.3, False)):
        for seed in range(20):
            c = center_smoothing(lambda t: t, 1, sigma=.65, eps=1., head=lambda _: tolerated, sequential=True, seed=seed, like=F64)
            assert c.certified == certified and c.evaluations <= 1300 and not c.abstained


def test_a_sequential_run_that_ends_early_uses_a_prefix_of_the_draws():
    got = center_smoothing(CODES["bent"], 1, sigma=1., eps=.5, sequential=True, head=lambda c: 40., like=F64, seed=4)
    noise = np.random.default_rng([2, 4]).standard_normal((3000, 1))[:got.evaluations - 1000]
    d = np.sort((CODES["bent"](torch.from_numpy(noise)) - got.center).norm(dim=-1).numpy())
    k = quantile_rank(len(d), shifted_mass(.65, -.5), .0045, "anytime")
    assert got.radius == pytest.approx(3 * d[k - 1]) and len(d) < 3000


def test_a_constant_code_has_radius_0_and_is_certified():
    c = center_smoothing(lambda t: torch.ones(len(t), 4), 2, sigma=1., eps=1., head=nn.Linear(4, 2))
    assert c.radius == 0 and c.certified and not c.abstained and c.label in (0, 1)


def test_a_check_that_fails_abstains():
    c = center_smoothing(CODES["bent"], 1, sigma=1., eps=.2, n=300, delta=.05, head=lambda c: 1e9, like=F64)      # 300 draws can not prove a mass of .45
    assert c.abstained and c.radius == math.inf and not c.certified and c.label is None


@pytest.mark.parametrize("kind", ["center", "sequential", "dkw", "randomized", "lattice"])
def test_same_seed_same_certificate_for_any_batch_size(kind):
    f, head = (lambda t: torch.cat([t, t.sin()], 1)), (lambda c: 20.)
    def run(batch_size, seed=0):
        if kind == "randomized": return randomized_smoothing(lambda x: x[:, 0] > 0, torch.tensor([.5]), sigma=1., n=500, seed=seed, batch_size=batch_size)
        if kind == "lattice": return lattice_smoothing(f, [.1, .2][:1], eps=.5, width=1., step=.1, batch_size=batch_size)
        return center_smoothing(f, 1, sigma=1., eps=.5, head=head, seed=seed, batch_size=batch_size, sequential=kind == "sequential",
                                **dict(bound="dkw", n=3000, n_center=1300) if kind == "dkw" else {})
    first = run(1000)
    assert first == run(7) == run(10**6) and (kind == "lattice" or first != run(1000, seed=1))


def test_a_float32_network_called_row_by_row_has_one_certificate():
    "In larger batches its rounding, and so the certificate, may depend on the size of the batch."
    net, head = mlp(5, (1, 20, 8)).float(), nn.Linear(8, 2)
    f = lambda t: torch.cat([net(x.clone()) for x in t.split(1)])
    for run in (lambda b: center_smoothing(f, 1, sigma=1., eps=.3, n=400, n_center=600, head=head, batch_size=b), lambda b: lattice_smoothing(f, [.1], eps=.5, width=1., step=.1, head=head, batch_size=b),
                lambda b: randomized_smoothing(lambda x: head(f(x)), torch.tensor([.5]), sigma=.1, n=300, batch_size=b)):
        assert run(1) == run(7) == run(1000)


# --- exact_line

def exact_fractions(net, head, z, a, eps):
    "All in rationals: knots, the squared supremum, the classes at the knots. Slow, and free of rounding."
    F = lambda x: [Fraction(v) for v in x.tolist()]
    dot = lambda w, x: sum((p * q for p, q in zip(w, x)), Fraction(0))
    z, a, eps = F(z), F(a), Fraction(eps)
    ts = [-eps, Fraction(0), eps]
    X = [[p + t * q for p, q in zip(z, a)] for t in ts]
    for layer in net:
        if isinstance(layer, nn.Linear):
            W, b = [F(r) for r in layer.weight], F(layer.bias)
            X = [[dot(w, x) + c for w, c in zip(W, b)] for x in X]
            continue
        new = {t: x for t, x in zip(ts, X)}
        for (s, x), (t, y) in zip(zip(ts, X), list(zip(ts, X))[1:]):
            for p, q in zip(x, y):
                if p * q < 0:
                    part = p / (p - q)
                    new[s + (t - s) * part] = [u + (v - u) * part for u, v in zip(x, y)]
        ts = sorted(new)
        X = [[max(v, Fraction(0)) for v in new[t]] for t in ts]
    origin = X[ts.index(0)]
    squared = max(sum((p - q) ** 2 for p, q in zip(x, origin)) for x in X)
    W, b = [F(r) for r in head.weight], F(head.bias)
    scores = [[dot(w, x) + c for w, c in zip(W, b)] for x in X]
    label = scores[ts.index(0)].index(max(scores[ts.index(0)]))
    return ts, squared, all(s[label] > v for s in scores for j, v in enumerate(s) if j != label), label


@settings(max_examples=30)
@given(seeds, st.booleans(), st.sampled_from([.25, 1., 3.]), st.integers(1, 3))
def test_proposition_6_against_rational_arithmetic(seed, last, eps, depth):
    net, head, z, a = case(seed, (3, 6, 5, 4)[:depth] + (2,), last)
    ts, squared, fair, label = exact_fractions(net, head, z, a, eps)
    c, path = exact_line(net, z, a, eps, head=head), line_path(net, z, a, eps)
    sup = math.sqrt(squared)
    assert sup <= c.radius <= sup + 1e-10 and c.label == label and c.certified == fair and not c.abstained
    assert np.allclose(np.unique(path.t.numpy().round(9)), np.unique(np.array([float(t) for t in ts]).round(9)), atol=1e-8)


# Merging two maps rounds as well: products that cancel, and a BatchNorm whose mean is far from 0.

def cancelling():
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    net[0].weight.data, net[1].weight.data = F64.new_tensor([[.1e8], [.3e8]]), F64.new_tensor([[.3, -.1]])
    return net


def test_the_rounding_of_merged_maps_is_in_the_radius():
    net = cancelling()
    (p, q), (r, s) = ([Fraction(x) for x in w.flatten().tolist()] for w in (net[0].weight, net[1].weight))
    slope = abs(p * r + q * s)                                               # in rational arithmetic
    c = exact_line(net, F64.new_ones(1), F64.new_ones(1), 1.)
    assert slope > Fraction(1, 10**10) and slope <= Fraction(c.radius) and c.radius < 1e-6
    path = line_path(net, F64.new_ones(1), F64.new_ones(1), 1.)
    assert all(abs(Fraction(v) - (1 + Fraction(t)) * (p * r + q * s)) <= Fraction(path.error) for t, v in zip(path.t.tolist(), path.values[:, 0].tolist()))


@pytest.mark.parametrize("bias", [1e-10, -1e-10, 1e-5])
def test_a_decision_within_the_rounding_of_merged_maps_is_not_certified(bias):
    net, head = cancelling(), nn.Linear(1, 1).double()
    head.weight.data, head.bias.data = F64.new_tensor([[1.]]), F64.new_tensor([bias])
    (p, q), (r, s) = ([Fraction(x) for x in w.flatten().tolist()] for w in (net[0].weight, net[1].weight))
    scores = [Fraction(t) * (p * r + q * s) + Fraction(bias) for t in (-1, 0, 1)]
    fair = min(scores) > 0 or max(scores) < 0
    c = exact_line(net, F64.new_zeros(1), F64.new_ones(1), 1., head=head)
    assert c.certified <= fair and (bias == 1e-5) == c.certified == fair and (c.certified or c.abstained or c.counterexample)


def test_the_rounding_of_batchnorm_is_in_the_error():
    getcontext().prec = 60
    net = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)).double().eval()
    net[0].weight.data, net[0].bias.data = F64.new_ones(1, 1), F64.new_tensor([1e7 + .3])
    net[1].running_mean, net[1].running_var = F64.new_tensor([1e7]), F64.new_tensor([.7])
    scale = 1 / (Decimal(net[1].running_var.item()) + Decimal(net[1].eps)).sqrt()
    path = line_path(net, F64.new_zeros(1), F64.new_ones(1), 1.)
    off = max(abs(Decimal(v) - scale * (Decimal(t) + Decimal(1e7 + .3) - Decimal(1e7))) for t, v in zip(path.t.tolist(), path.values[:, 0].tolist()))
    assert Decimal("1e-10") < off <= Decimal(path.error) and path.error < 1e-6


@settings(max_examples=25)
@given(seeds, st.booleans())
def test_merged_maps_against_rational_arithmetic(seed, cancel):
    net, _, z, a = case(seed, (3, 6, 5, 4))
    net = nn.Sequential(net[0], net[2], nn.ReLU(), net[4], nn.Linear(4, 2).double())
    if cancel: net[0].weight.data[3:], net[0].bias.data[3:], net[1].weight.data[:, 3:] = 1e9 * net[0].weight.data[:3], 1e9 * net[0].bias.data[:3], -net[1].weight.data[:, :3] / 1e9
    head = nn.Linear(2, 2).double()
    _, squared, fair, label = exact_fractions(net, head, z, a, 1.)
    c = exact_line(net, z, a, 1., head=head)
    assert squared <= Fraction(c.radius) ** 2 and c.radius <= math.sqrt(squared) + (1e-4 if cancel else 1e-9)
    assert c.abstained or c.certified == fair and c.label == label


@settings(max_examples=60)
@given(seeds, st.booleans(), st.integers(1, 3), st.sampled_from([(1., 1.), (1e6, 1.), (1., 1e-10), (1e-4, 2.)]))
def test_ties_and_extreme_sizes_are_decided_rightly_or_not_at_all(seed, last, depth, sizes):
    "Small integers: knots coincide, units vanish on whole pieces, classes tie. Huge weights: the biases of the head are lost to rounding."
    rng, (scale, eps) = np.random.default_rng(seed), sizes
    net, head, z, a = case(seed, (3, 6, 5, 4)[:depth] + (2,), last)
    whole = lambda x: torch.from_numpy(rng.integers(-2, 3, tuple(x.shape)).astype(float))
    for m in [m for m in net if isinstance(m, nn.Linear)]: m.weight.data, m.bias.data = scale * whole(m.weight), whole(m.bias)
    head.weight.data, head.bias.data, z, a = whole(head.weight), whole(head.bias), whole(z), whole(a) + F64.new_tensor([.5, 0., 0.])
    _, squared, fair, label = exact_fractions(net, head, z, a, eps)
    c = exact_line(net, z, a, eps, head=head)
    assert math.sqrt(squared) <= c.radius and (c.abstained or c.certified == fair and c.label == label)


@settings(max_examples=25)
@given(seeds, st.booleans(), st.integers(1, 4))
def test_path_is_torchs_network_everywhere(seed, last, depth):
    net, _, z, a = case(seed, (5, 40, 30, 20, 10)[:depth] + (3,), last)
    path, t = line_path(net, z, a, 2.), torch.linspace(-2, 2, 4001, dtype=torch.float64)
    with torch.no_grad(): y = net(z + t[:, None] * a).numpy()
    line = np.stack([np.interp(t, path.t, v) for v in path.values.T.numpy()], 1)
    assert np.linalg.norm(line - y, axis=1).max() <= path.error + 1e-12 and path.error < 1e-9
    assert (path.t.diff() >= 0).all() and path.t[0] == -2 and path.t[-1] == 2 and (path.t == 0).any()


@pytest.mark.parametrize("widths", [(6, 24, 16, 2), (8, 200, 100, 30), (5, 300, 4), (7, 4), (4, 30, 30, 30, 30, 5)])
def test_supremum_agrees_with_a_grid_of_100000_points(widths):
    net, head, z, a = case(7, widths)
    c, t = exact_line(net, z, a, 1.5, head=head), torch.linspace(-1.5, 1.5, 100_001, dtype=torch.float64)
    t = torch.cat([t, line_path(net, z, a, 1.5).t])                         # the grid, and the knots, by torch's own network
    with torch.no_grad():
        far = (net(z + t[:, None] * a) - net(z)).norm(dim=-1).max().item()
        same = bool((head(net(z + t[:, None] * a)).argmax(-1) == c.label).all())
    assert far - 1e-12 <= c.radius <= far + 1e-9 and same == c.certified


@given(seeds)
def test_a_counterexample_is_one_and_is_there_whenever_the_head_wavers(seed):
    net, head, z, a = case(seed)
    c = exact_line(net, z, a, 2., head=head)
    at = lambda t: int(head(net(z + t * a)).argmax())
    with torch.no_grad(): swept = head(net(z + torch.linspace(-2, 2, 3001, dtype=torch.float64)[:, None] * a)).argmax(-1)
    assert at(0.) == c.label and (c.counterexample is None or at(c.counterexample[0]) != c.label and abs(c.counterexample[0]) <= 2)
    assert not c.certified or (swept == c.label).all()
    assert c.certified or c.abstained or c.counterexample is not None


@given(seeds)
def test_a_radius_below_the_bound_certifies(seed):
    net, head, z, a = case(seed)
    c = exact_line(net, z, a, .1, head=head)
    assert c.certified or c.radius >= c.bound
    by_radius = exact_line(net, z, a, .1, head=lambda code: float(linear_radius(head, code)))
    assert by_radius.certified == (c.radius < c.bound) and by_radius.radius == c.radius


def test_rows_are_certified_as_they_are_alone():
    net, head, _, a = case(3)
    Z = torch.randn(9, 4, dtype=torch.float64)
    for row, z in zip(exact_line(net, Z, a, 1., head=head), Z):
        alone = exact_line(net, z, a, 1., head=head)
        assert row == alone and torch.equal(row.center, alone.center)
    assert exact_line(net, Z[:0], a, 1.) == exact_line(net, Z[:0], a, 1., workers=2) == []


@pytest.fixture
def torch_threads():
    "Sets torch's number of threads; it is as before after the test."
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["none", "linear", "function"])
@pytest.mark.parametrize("widths", [(4, 12, 9, 3), (769, 300, 120, 33), (7, 4)])
def test_no_bit_depends_on_workers_threads_or_batch(widths, kind, torch_threads):
    net, linear, _, a = case(3, widths)
    head = {"none": None, "linear": linear, "function": lambda c: float(c.norm()) / 5}[kind]
    Z = torch.randn(7, widths[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    same = lambda found, want: found == want and all(torch.equal(c.center, d.center) for c, d in zip(found, want))
    first = exact_line(net, Z, a, .5, head=head)
    for threads in (1, 2):
        torch_threads(threads)
        for workers in (1, 2, 3):
            run = lambda z: exact_line(net, z, a, .5, head=head, workers=np.int64(workers))
            assert same(run(Z), first) and same(run(Z[2:5]), first[2:5]) and same([run(z) for z in Z], first)
            assert torch.get_num_threads() == threads


def test_workers_are_threads_with_one_torch_thread_each(monkeypatch, torch_threads):
    torch_threads(2)
    net, linear, _, a = case(3)
    Z, certify, meet, seen = torch.randn(2, 4, dtype=torch.float64), smoothing._certify_line, threading.Barrier(2, timeout=60), []
    def together(*args):
        meet.wait()                                                          # nobody passes alone
        seen.append((threading.get_ident(), torch.get_num_threads()))
        return certify(*args)
    def head(c): seen.append((threading.get_ident(), torch.get_num_threads())); return 1.
    monkeypatch.setattr(smoothing, "_certify_line", together)
    exact_line(net, Z, a, 1., head=head, workers=2)
    here = threading.get_ident()
    assert len({i for i, _ in seen[:2]} | {here}) == 3 and [n for _, n in seen] == [1, 1, 2, 2] and [i for i, _ in seen[2:]] == [here, here]


@pytest.mark.parametrize("workers", [1, 2])
def test_torchs_threads_are_restored_after_an_error(workers, torch_threads):
    torch_threads(2)
    with pytest.raises(ValueError, match="head takes 5 features"): exact_line(RELU, torch.ones(3, 2), ONE, 1., head=nn.Linear(5, 2), workers=workers)
    assert torch.get_num_threads() == 2


def test_calls_from_several_threads_at_once(torch_threads):
    torch_threads(2)
    net, head, _, a = case(3, (40, 60, 30, 5))
    Z = torch.randn(12, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = exact_line(net, Z, a, 1., head=head)
    with ThreadPoolExecutor(3) as pool: found = list(pool.map(lambda z: exact_line(net, z, a, 1., head=head, workers=2), Z))
    assert found == want and torch.get_num_threads() == 2


def test_a_spike_between_grid_points_is_found():
    net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    net[0].weight.data, net[0].bias.data = F64.new_ones(3, 1), F64.new_tensor([1e-7 - .3, -.3, -1e-7 - .3])
    net[2].weight.data, net[2].bias.data = F64.new_tensor([[1e7, -2e7, 1e7]]), F64.new_zeros(1)
    assert exact_line(net, F64.new_zeros(1), F64.new_ones(1), 1.).radius == pytest.approx(1, abs=1e-6)


def test_batchnorm_dropout_flatten_and_nesting_are_folded():
    net = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(.4)), nn.Linear(20, 15), nn.Linear(15, 9), nn.ReLU(),
                        nn.BatchNorm1d(9), nn.Linear(9, 4), nn.Identity(), nn.BatchNorm1d(4, affine=False))
    with torch.no_grad():
        for _ in range(20): net(torch.randn(64, 6))
    net.eval()
    z, a = torch.randn(6), torch.randn(6)
    path, t = line_path(net, z, a, 1.), torch.linspace(-1, 1, 501, dtype=torch.float64)
    with torch.no_grad(): y = net.double()(z.double() + t[:, None] * a.double()).numpy()
    assert np.abs(np.stack([np.interp(t, path.t, v) for v in path.values.T.numpy()], 1) - y).max() < 1e-9


def test_dead_layers_flat_directions_and_ties():
    net, head, z, a = case(1)
    net[0].weight.data.zero_()                                              # nothing depends on t
    c = exact_line(net, z, a, 1., head=head)
    assert c.radius < 1e-10 and c.certified and c.evaluations == 3
    head.weight.data, head.bias.data = torch.zeros(3, 3).double(), torch.zeros(3).double()
    tie = exact_line(net, z, a, 1., head=head)
    assert tie.abstained and not tie.certified and tie.bound == 0 and tie.counterexample is None
    assert exact_line(net, z, a, 0.).radius == 0


@pytest.mark.parametrize("m", [1, 2, 63, 64, 65, 500])
def test_the_second_layers_sums_equal_the_products(m):
    gen = torch.Generator().manual_seed(m)
    u, v, W, b = (torch.randn(*s, generator=gen, dtype=torch.float64) for s in ((m,), (m,), (17, m), (17,)))
    t, j = smoothing._first_knots(u, v, 4.)
    X, bound = smoothing._second_fast(t, j, u, v, W.T.contiguous(), b)
    size = W.norm() * (u.norm() + 4 * v.norm())
    assert (X - smoothing._second_plain(t, u, v, W, b)).norm(dim=-1).max() <= bound + smoothing._gamma(m) * size < 1e-12 * (size + b.norm())


@given(seeds, st.floats(.1, 20))
def test_theorem_8_a_projected_network_does_not_move(seed, eps):
    net, head, z, a = case(seed)
    flat = projection_certificate(net, z, a, head=head)
    net[0].weight.data -= torch.outer(net[0].weight.data @ a, a) / (a @ a)
    line = exact_line(net, z, a, eps, head=head)
    assert line.radius < 1e-8 and line.label == flat.label and (line.certified or line.abstained) and torch.allclose(line.center, flat.center)
    assert flat.radius == 0 and flat.bound == pytest.approx(line.bound, abs=1e-9) and flat.evaluations == 1


# --- lattice

def brute_average(f, tau, width, step):
    "The mean of f over the box around tau, each point rounded to the lattice, from the definition; [B, k] -> [B, d]."
    j = torch.arange(-200, 201, dtype=torch.float64)
    overlap = lambda x: (torch.minimum(x[:, None] + width, step * (j + .5)) - torch.maximum(x[:, None] - width, step * (j - .5))).clamp(min=0) / (2 * width)
    out = []
    for x in tau:
        ws = [overlap(c[None])[0] for c in x]
        keep = [w.nonzero()[:, 0] for w in ws]
        points = torch.cartesian_prod(*[step * j[k] for k in keep]).reshape(-1, len(x))
        w = torch.cartesian_prod(*[w[k] for w, k in zip(ws, keep)]).reshape(-1, len(x)).prod(1)
        out.append(w @ f(points).double())
    return torch.stack(out)


def wave(seed, k):
    "A bounded function with jumps, of k variables."
    gen = torch.Generator().manual_seed(seed)
    A, b = 2 * torch.randn(k, 3, generator=gen, dtype=torch.float64), torch.randn(3, generator=gen, dtype=torch.float64)
    return lambda s: torch.cat([(s @ A + b).sin(), ((s @ A[:, :1]) > .2).double()], 1)


@settings(max_examples=25)
@given(seeds, st.floats(-2, 2), st.floats(.05, 1.5), st.floats(.05, 1.5), st.floats(.05, .4))
def test_theorem_7_one_attribute_is_exact(seed, tau, eps, width, step):
    f = wave(seed, 1)
    c = lattice_smoothing(f, [tau], eps=eps, width=width, step=step, like=F64)
    t = torch.linspace(tau - eps, tau + eps, 801, dtype=torch.float64)[:, None]
    here, there = brute_average(f, F64.new_tensor([[tau]]), width, step), brute_average(f, t, width, step)
    far = (there - here).norm(dim=-1).max().item()
    assert far <= c.radius + 1e-12 and c.radius <= far + 6 * (2 * eps / 800) / (2 * width)             # the average has slope at most diameter / (2 width)
    assert c.evaluations <= math.ceil(2 * (width + eps) / step) + 2 and torch.allclose(c.center, here[0])


@settings(max_examples=10)
@given(seeds, st.integers(2, 3), st.integers(1, 3))
def test_several_attributes_are_bounded_from_above(seed, k, refine):
    f, rng = wave(seed, k), np.random.default_rng(seed)
    tau, eps, width, step = torch.from_numpy(rng.normal(size=k)), .4, .5, .25
    c = lattice_smoothing(f, tau, eps=eps, width=width, step=step, refine=refine, like=F64)
    moves = torch.from_numpy(rng.normal(size=(60, k)))
    moves = eps * moves / moves.norm(dim=1, keepdim=True) * torch.from_numpy(rng.random((60, 1))) ** (1 / k)
    far = (brute_average(f, tau + moves, width, step) - c.center).norm(dim=-1).max().item()
    assert far <= c.radius and c.evaluations <= (math.ceil(2 * (width + eps) / step) + 2) ** k
    assert refine == 1 or c.radius <= lattice_smoothing(f, tau, eps=eps, width=width, step=step, like=F64).radius + 1e-12


@given(seeds, st.integers(1, 2))
def test_lattice_decisions_hold_and_counterexamples_are_ones(seed, k):
    f, head = wave(seed, k), nn.Linear(4, 2).double()
    tau, eps = F64.new_full((k,), .3), .5
    c = lattice_smoothing(f, tau, eps=eps, width=.4, step=.2, refine=k, head=head, like=F64)
    t = eps * torch.nn.functional.normalize(torch.randn(40, k, dtype=torch.float64), dim=1)
    if k == 1: assert c.certified or c.abstained or c.counterexample is not None
    if c.certified: assert (head(brute_average(f, tau + t, .4, .2)).argmax(-1) == c.label).all()
    if c.counterexample:
        bad = F64.new_tensor(c.counterexample)
        assert bad.norm() <= eps * (1 + 1e-9) and int(head(brute_average(f, (tau + bad)[None], .4, .2)).argmax()) != c.label


def test_all_similar_individuals_share_the_lattice():
    seen = []
    def f(s): seen.append(s.clone()); return s.sin()
    for tau in (.2, .7): lattice_smoothing(f, [tau], eps=.5, width=1., step=.1, like=F64)
    a, b = (set(x[:, 0].tolist()) for x in seen)
    assert len(a & b) > 20 and lattice_smoothing(torch.sin, [.2], eps=.5, width=1., step=.1, slack=.25).radius == pytest.approx(
        .25 + lattice_smoothing(torch.sin, [.2], eps=.5, width=1., step=.1).radius)


@given(seeds, st.integers(1, 3))
def test_coordinates_and_rest(seed, k):
    gen = torch.Generator().manual_seed(seed)
    A, Z, shift = torch.randn(k, 7, generator=gen).double(), torch.randn(5, 7, generator=gen).double(), torch.randn(k, generator=gen).double()
    tau, rest = line_coordinates(Z, A if k > 1 else A[0])
    assert torch.allclose(tau @ A + rest, Z) and (rest @ A.T).abs().max() < 1e-11
    moved = line_coordinates(Z + shift @ A, A)
    assert torch.allclose(moved[0], tau + shift, atol=1e-7) and torch.allclose(moved[1], rest, atol=1e-9)


# --- types, devices, bad input

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_devices_and_numpy_integers(dtype, device):
    net, head, z, a = case(2)
    net, head, z, a, like = net.to(device, dtype), head.to(device, dtype), z.to(device, dtype), a.to(device, dtype), torch.empty(0, dtype=dtype, device=device)
    f = lambda t: net(z + t @ a[None])
    found = [exact_line(net, z, a, np.float32(.5), head=head), center_smoothing(f, np.int64(1), sigma=1, eps=.5, n=np.int32(800), n_center=np.int64(1000), head=head, like=like, seed=np.int64(2)),
             lattice_smoothing(lambda s: net(line_coordinates(z, a)[1] + s @ a[None]), line_coordinates(z, a)[0].cpu(), eps=1, width=1, step=.1, head=head, like=like),
             projection_certificate(net, z, a, head=head), randomized_smoothing(lambda x: head(net(x)), z, sigma=np.float64(.1), n=np.int64(500))]
    for c in found: assert isinstance(c, Certificate) and isinstance(c.radius, float) and isinstance(c.certified, bool) and isinstance(c.evaluations, int)
    twin, x, v = mlp(2, (4, 12, 9, 3)).to(dtype).double(), z.double().cpu(), a.double().cpu()
    t = torch.linspace(-.5, .5, 2001, dtype=torch.float64)[:, None]
    with torch.no_grad(): assert (twin(x + t * v) - twin(x)).norm(dim=-1).max() <= found[0].radius


RELU = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
ONE = torch.ones(2)
CENTER = lambda f=lambda t: t, k=1, **kw: center_smoothing(f, k, **dict(sigma=1., eps=1.) | kw)
LATTICE = lambda f=lambda s: s, tau=(0.,), **kw: lattice_smoothing(f, list(tau), **dict(eps=1., width=1., step=.5) | kw)
COHEN = lambda h=lambda x: x[:, 0] > 0, x=torch.zeros(1), **kw: randomized_smoothing(h, x, **dict(sigma=1.) | kw)
BAD = {
    "sigma = 0": (lambda: CENTER(sigma=0.), "sigma must be"), "sigma < 0": (lambda: COHEN(sigma=-1.), "sigma must be"), "sigma NaN": (lambda: CENTER(sigma=math.nan), "sigma must be"),
    "sigma too small": (lambda: CENTER(sigma=.01), "use sigma >= "), "delta too large": (lambda: CENTER(delta=.4999999, sigma=.1), "smaller delta"), "radius out of reach": (lambda: COHEN(sigma=.01, radius=1.), "larger sigma"),
    "eps < 0": (lambda: CENTER(eps=-.1), "eps must be"), "eps < 0, line": (lambda: exact_line(RELU, ONE, ONE, -1.), "eps must be"), "eps < 0, lattice": (lambda: LATTICE(eps=-1.), "eps must be"),
    "eps infinite": (lambda: exact_line(RELU, ONE, ONE, math.inf), "eps must be"),
    "alpha = 0": (lambda: CENTER(alpha=0.), "alpha must be"), "alpha = 1": (lambda: COHEN(alpha=1.), "alpha must be"), "alpha, rank": (lambda: quantile_rank(5, .5, 2.), "alpha must be"),
    "delta": (lambda: CENTER(delta=.5), "delta must be"), "bound": (lambda: CENTER(bound="hoeffding"), "'exact' or 'dkw'"), "rank's bound": (lambda: quantile_rank(5, .5, .1, "no"), "'anytime'"),
    "sequential without head": (lambda: CENTER(sequential=True), "needs bound='exact' and a head"),
    "n too small": (lambda: CENTER(n=10), "use n >= "), "n_center too small": (lambda: CENTER(n_center=20), "use n_center >= "), "n = 0": (lambda: CENTER(n=0), "n must be at least 1"),
    "n too small, dkw": (lambda: CENTER(n=10, bound="dkw"), "use n >= "), "n too small, Cohen": (lambda: COHEN(n=5), "use n >= 10"), "n too small for the radius": (lambda: COHEN(n=100, radius=3.), "use n >= 5114"),
    "no dims": (lambda: CENTER(k=0), "n_dims must be"), "batch": (lambda: CENTER(batch_size=0), "batch_size must be"),
    "no workers": (lambda: exact_line(RELU, ONE, ONE, 1., workers=0), "workers must be at least 1, got 0"), "workers < 0": (lambda: exact_line(RELU, ONE, ONE, 1., workers=-2), "workers must be"),
    "f of wrong shape": (lambda: CENTER(lambda t: t[:, 0]), r"f must map a batch \[1000, 1\]"), "f loses rows": (lambda: CENTER(lambda t: t[1:]), "f must map"), "f gives no tensor": (lambda: CENTER(lambda t: 1.), "got float"),
    "f NaN": (lambda: CENTER(lambda t: t / 0 * 0), "NaN"), "f NaN, lattice": (lambda: LATTICE(lambda s: s.log()), "NaN"),
    "h of wrong shape": (lambda: COHEN(lambda x: x[:, :, None]), "class numbers"), "h of floats": (lambda: COHEN(lambda x: x[:, 0]), "class numbers"), "h negative": (lambda: COHEN(lambda x: -torch.ones(len(x)).long()), "class numbers"),
    "h of classes in a column": (lambda: COHEN(lambda x: (x > 0).long()), "single column: floating point"), "h NaN": (lambda: COHEN(lambda x: torch.cat([x, x / 0 * 0], 1)), "NaN"), "x NaN": (lambda: COHEN(x=torch.tensor([math.nan])), "x holds NaN"),
    "tanh": (lambda: exact_line(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), ONE, ONE, 1.), r"Tanh\(\).*lattice_smoothing"), "relu first": (lambda: exact_line(nn.ReLU(), ONE, ONE, 1.), "beginning with a Linear"),
    "conv": (lambda: line_path(nn.Sequential(nn.Conv1d(1, 1, 1)), ONE, ONE, 1.), "Conv1d"), "batchnorm training": (lambda: exact_line(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), ONE, ONE, 1.), "net.eval"),
    "dropout training": (lambda: exact_line(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), ONE, ONE, 1.), "net.eval"), "empty net": (lambda: exact_line(nn.Sequential(), ONE, ONE, 1.), "no Linear"),
    "zero direction": (lambda: exact_line(RELU, ONE, 0 * ONE, 1.), "a is zero"), "zero direction, coordinates": (lambda: line_coordinates(ONE, 0 * ONE), "a is zero"), "dependent": (lambda: line_coordinates(ONE, torch.ones(2, 2)), "dependent"),
    "NaN direction": (lambda: exact_line(RELU, ONE, ONE * math.nan, 1.), "a holds NaN"), "NaN point": (lambda: exact_line(RELU, ONE * math.nan, ONE, 1.), "z holds NaN"),
    "a does not fit z": (lambda: exact_line(RELU, ONE, torch.ones(3), 1.), "z must be"), "z does not fit net": (lambda: exact_line(RELU, torch.ones(3), torch.ones(3), 1.), "first layer of net takes 2"),
    "coordinates misfit": (lambda: line_coordinates(ONE, torch.ones(3)), "with the n of z"),
    "head of other width": (lambda: exact_line(RELU, ONE, ONE, 1., head=nn.Linear(5, 2)), "head takes 5 features"), "head gives scores": (lambda: CENTER(head=lambda c: torch.ones(3)), "one distance"),
    "head negative": (lambda: LATTICE(head=lambda c: -1.), "must be >= 0"), "head nonsense": (lambda: CENTER(head=lambda c: "far"), "one distance"), "radius of other width": (lambda: linear_radius(nn.Linear(3, 2), ONE), "head takes 3"),
    "four attributes": (lambda: LATTICE(tau=(0., 0., 0., 0.)), "1 to 3 attributes, got 4"), "no attribute": (lambda: LATTICE(tau=()), "got 0"), "width": (lambda: LATTICE(width=0.), "width must be"), "step": (lambda: LATTICE(step=-1.), "step must be"),
    "slack": (lambda: LATTICE(slack=-1.), "slack must be"), "refine": (lambda: LATTICE(refine=0), "refine must be"), "tau NaN": (lambda: LATTICE(tau=(math.nan,)), "tau holds NaN"),
}


class Residual(nn.Sequential):
    def forward(self, x): return x + super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x): return 2 * super().forward(x)


def altered(change, net=None):
    "A network that does not compute what its layers say."
    net = net or nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    change(net)
    return net


ALTERED = {
    "residual": lambda: nn.Sequential(Residual(nn.Linear(2, 2), nn.ReLU())), "residual at the top": lambda: Residual(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), "subclass of Linear": lambda: nn.Sequential(Doubled(2, 2)),
    "hook": lambda: altered(lambda net: net[0].register_forward_hook(lambda m, x, y: y + 1)), "hook on the whole": lambda: altered(lambda net: net.register_forward_hook(lambda m, x, y: 2 * y)),
    "pre-hook": lambda: altered(lambda net: net[2].register_forward_pre_hook(lambda m, x: (x[0] + 1,))), "forward of one object": lambda: altered(lambda net: setattr(net[2], "forward", lambda x: x[:, :2])),
    "a hook's stale weight": lambda: altered(lambda net: nn.utils.spectral_norm(net[0])),
}


@pytest.mark.parametrize("name", ALTERED)
@pytest.mark.parametrize("certify", [exact_line, line_path])
def test_a_network_that_does_something_else_is_refused(name, certify):
    with pytest.raises(ValueError, match="forward of its own|hooks"): certify(ALTERED[name](), ONE, ONE, 1.)


def test_what_escapes_the_inspection_is_seen_in_the_value():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    hook = nn.modules.module.register_module_forward_hook(lambda m, x, y: y + .01 if m is net[2] else None)
    try:
        with pytest.raises(ValueError, match="its own answer"): exact_line(net, ONE, ONE, 1.)
    finally: hook.remove()
    assert exact_line(net, ONE, ONE, 1.).radius < math.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_of_the_networks_own_precision_is_no_reason_to_refuse(dtype):
    for seed in range(20):
        net, _, z, a = case(seed, (40, 60, 30, 5))
        net = nn.Sequential(net[0], nn.BatchNorm1d(60).double(), *net[1:])
        net[1].running_mean, net[1].running_var = 100 * torch.randn(60).double(), 1e-3 + torch.rand(60).double()
        assert exact_line(net.to(dtype).eval(), z, a, 1.).radius < math.inf
    parametrized = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(40, 3)))
    assert exact_line(parametrized, z, a, 1.).radius < math.inf


def test_without_a_head_nothing_is_decided():
    net, _, z, a = case(4)
    for c in (exact_line(net, z, a, 1.), CENTER(), LATTICE(), projection_certificate(net, z, a)): assert not c.certified and c.bound == math.inf and c.radius < math.inf
    for c in (exact_line(net, z, a, 1., head=lambda c: math.inf), CENTER(head=lambda c: math.inf), LATTICE(head=lambda c: math.inf)): assert c.certified


@pytest.mark.parametrize("tau", [(.3,), (.3, -.2), (.1, .2, .3)])
def test_a_lattice_with_eps_0_decides_at_the_point(tau):
    f, head = wave(0, len(tau)), nn.Linear(4, 2).double()
    for slack in (0., .01):
        c = lattice_smoothing(f, list(tau), eps=0., width=.4, step=.2, refine=2, head=head, slack=slack, like=F64)
        assert c.radius == slack and c.certified == (c.bound > slack) and c.label == int(head(c.center).argmax()) and c.counterexample is None
        assert lattice_smoothing(f, list(tau), eps=0., width=.4, step=.2, slack=slack, like=F64).radius == slack


def test_a_counterexample_at_either_end_is_returned():
    "The averaged code is tau itself, the decision changes between 0 and eps: only an end point can be the counterexample."
    for tau in np.random.default_rng(0).normal(size=200):
        for sign in (1., -1.):
            head = nn.Linear(1, 1).double()
            head.weight.data, head.bias.data = F64.new_tensor([[sign]]), F64.new_tensor([-sign * tau - .29])
            c = lattice_smoothing(lambda s: s, [tau], eps=.3, width=1., step=.25, head=head, like=F64)
            assert not c.certified and not c.abstained and sign * c.counterexample[0] > .28 and abs(c.counterexample[0]) <= .3


@pytest.mark.parametrize("bound", ["exact", "dkw"])
@pytest.mark.parametrize("sigma", [.2, .21, .01])
@pytest.mark.parametrize("delta", [.07, .4])
def test_a_small_sigma_is_refused_at_once_with_a_sigma_that_works(sigma, delta, bound):
    for sequential in (False, True)[:1 + (bound == "exact")]:
        more = dict(sequential=True, head=lambda c: 1.) if sequential else {}
        with pytest.raises(ValueError, match="n=100000") as e: CENTER(sigma=sigma, bound=bound, delta=delta, **more)
        better = float(str(e.value).split("sigma >= ")[1].split()[0])
        plan = lambda sigma: smoothing._plan(sigma, 1., 100_000, 10_000, .01, delta, bound, sequential, more.get("head"))
        assert plan(better).n == 100_000 and sigma < better
        with pytest.raises(ValueError): plan(.99 * better)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_a_cure(name, untyped):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize("alpha, delta, sigma", [(.01, .07, .65), (.001, .2, 1.), (.1, .05, 2.)])
@pytest.mark.parametrize("bound", ["exact", "dkw"])
def test_the_numbers_that_an_error_asks_for_are_the_least(alpha, delta, sigma, bound):
    run = lambda **kw: center_smoothing(lambda t: t, 1, sigma=sigma, eps=1., alpha=alpha, delta=delta, bound=bound, **kw)
    for name, other in (("n", dict(n_center=20_000 if bound == "dkw" else 5000)), ("n_center", dict(n=60_000))):
        if name == "n": other = dict(n_center=4000)
        with pytest.raises(ValueError) as e: run(**{name: 1} | other)
        least = int(str(e.value).split(">= ")[1])
        assert smoothing._plan(sigma, 1., *((least, 4000) if name == "n" else (60_000, least)), alpha, delta, bound, False, None)
        with pytest.raises(ValueError): smoothing._plan(sigma, 1., *((least - 1, 4000) if name == "n" else (60_000, least - 1)), alpha, delta, bound, False, None)
