"Chapter 2: every check takes its solution, rejects wrong answers with words that help, and never lets another exception escape."
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from test_exercises import asked, complaint, raises, rejection, silence, solved
from torch.nn.functional import normalize

from fairbook.exercises import _CHECKS, NotYet
from fairbook.exercises_ch02 import _CLAIMS, _beside, _budget, _curves, _ellipsoids, _first_change, _heads, _LINES, _may_claim, _mirrors, _networks, _normal, _ranks, _samples, _scores, _wall, check
from fairbook.smoothing import center_smoothing, line_path, quantile_rank

IDS = sorted(id for id in _CHECKS if id.startswith("ch02."))


# --- right answers, other than those of the solutions

def tolerated(weight, bias, code):
    "Every wall's shortest move by a pseudo-inverse."
    scores = weight @ code + bias
    A = int(scores.argmax())
    moves = [torch.linalg.pinv(w[None])[:, 0] * (scores[j] - scores[A]) for j in range(len(bias)) if (w := weight[A] - weight[j]).any()]
    move = min(moves, key=torch.norm, default=None)
    return (math.inf, 0 * code) if move is None else (move.norm(), move)


def claim(r, R, levels, m, wanted):
    "In fractions, and one person after the other."
    ball, check_, radius, head = (Fraction(str(x)) for x in levels)
    if r >= R: return 0., 0
    left, most = 1 - radius - head, 0
    if left >= wanted and ball + check_ == 0: most = math.inf
    while most < math.inf and left - (most + 1) * (ball + check_) >= Fraction(str(wanted)): most += 1
    return float(max(Fraction(0), left - m * (ball + check_))), most


def mirror(z, w, b, V, change=-2., targets=0.):
    "The least-norm solution of all equations at once."
    rows, want = torch.cat([V, w[None]]), torch.cat([targets * torch.ones(len(V), len(z), dtype=z.dtype), change * (z @ w + b)[None]])
    x = torch.linalg.lstsq(rows, want, rcond=1e-9, driver="gelsd").solution
    return None if (rows @ x - want).abs().max() > 1e-6 else z + x.T


def pieces(W1, b1, W2, b2, z, a):
    "Each piece of the line with its activations, from those in its middle: ends, and leads y + t s there."
    u, v = W1 @ z + b1, W1 @ a
    knots = sorted({x for x in (-u / v).tolist() if math.isfinite(x)})
    A = int(_scores(0., W1, b1, W2, b2, z, a).argmax())
    D, d = W2[A] - W2, b2[A] - b2
    for low, high in zip([-math.inf, *knots], [*knots, math.inf]):
        middle = (low + high) / 2 if math.isfinite(low + high) else high - 1 if math.isfinite(high) else low + 1 if math.isfinite(low) else 0.
        on = (u + middle * v > 0).to(u)
        yield low, high, D @ (on * u) + d, D @ (on * v)


def reach(*net):
    "Smallest zero of a lead, over all pieces."
    found = math.inf
    for low, high, y, s in pieces(*net):
        for t in (-y / s).tolist():
            if math.isfinite(t) and low <= t <= high: found = min(found, abs(t))
    return found


def witness(h, tau, eps):
    "From the other end, and by labels."
    low, high = (0., h(0.)), (tau, h(tau))
    while abs(low[0] - high[0]) > eps:
        middle = (low[0] + high[0]) / 2
        said = h(middle)
        low, high = (low, (middle, said)) if said != low[1] else ((middle, said), high)
    return torch.tensor(high[0], dtype=torch.float64), torch.tensor(low[0], dtype=torch.float64)


def farthest(mid, root, P, starts=4, steps=1500):
    "Largest |P (mid + root x)|, |x| <= 1, by going where the gradient points; it climbs, as the function is convex."
    x = normalize(_normal(0, starts, len(mid)))
    for _ in range(steps): x = normalize((mid + x @ root) @ P @ P @ root, dim=1, eps=1e-300)
    return float(((mid + x @ root) @ P).norm(dim=1).max())


def tube(points, lengths, a, narrow=1., middle=1., across=True):
    "By climbing, piece by piece."
    line = a.outer(a) / (a @ a)
    eps = rho = 0.
    for p, q, length in zip(points, points[1:], lengths):
        mid, h = middle * (p + q) / 2, (q - p) / 2
        B2 = narrow * (length**2 / 4 - h @ h).clamp(min=0)
        size, V = torch.linalg.eigh(B2 * torch.eye(len(a), dtype=a.dtype) + h.outer(h))
        root = V * size.clamp(min=0).sqrt() @ V.T
        eps = max(eps, farthest(mid, root, line, steps=50) / float(a.norm()))
        rho = max(rho, farthest(mid, root, torch.eye(len(a), dtype=a.dtype) - line))
    return eps, rho


def median_bounds(scores, sigma, eps, alpha, rank=None):
    "With the library's rank."
    n = len(scores)
    k = quantile_rank(n, norm.cdf(eps / sigma), alpha / 2) if rank is None else rank(n, eps / sigma, alpha)
    line = torch.cat([torch.tensor([-math.inf]), scores.sort().values, torch.tensor([math.inf])])
    return line[n + 1 - k].item(), line[k].item()


RIGHT = [("ch02.1", tolerated), ("ch02.2", claim), ("ch02.3", mirror), ("ch02.4", reach), ("ch02.5", witness), ("ch02.6", tube), ("ch02.7", median_bounds)]


@pytest.mark.parametrize("id, answer", RIGHT, ids=[f"{id}-{answer.__name__}" for id, answer in RIGHT])
def test_right_answers_pass(id, answer, capsys):
    check(id, answer)
    assert capsys.readouterr().out == f"{id}: correct\n"


# --- wrong answers: what a reader may well try, and words that the complaint must have

def to_wall(measure):
    "As in the solution, with another way to choose and to measure."
    def answer(weight, bias, code):
        scores = weight @ code + bias
        A = int(scores.argmax())
        return measure(weight[A] - weight, scores[A] - scores, A, weight, code)
    return answer


def runner_up(w, lead, A, weight, code):
    j = int(lead.index_fill(0, torch.tensor(A), math.inf).argmin())
    return (lead[j] / w[j].norm(), -lead[j] * w[j] / w[j].square().sum()) if w[j].any() else (math.inf, 0 * code)


def nearest(scale=1., divide=lambda w, weight: w.norm(dim=1)):
    def measure(w, lead, A, weight, code):
        far = torch.where((w != 0).any(1), lead / divide(w, weight), math.inf)
        j = int(far.argmin())
        return (math.inf, 0 * code) if far[j] == math.inf else (far[j], -scale * far[j] * normalize(w[j], dim=0))
    return to_wall(measure)


def levels_each(paid, once):
    "Which levels are paid for each, and which once."
    def answer(r, R, levels, m, wanted):
        each, fixed = sum(levels[i] for i in paid), 1 - sum(levels[i] for i in once)
        most = 0 if r >= R or fixed < wanted else math.inf if each == 0 else math.floor((fixed - wanted) / each)
        return (max(0., fixed - m * each) if r < R else 0.), most
    return answer


def by_knots(*net):
    "Looks at the knots alone."
    u, v = net[0] @ net[4] + net[1], net[0] @ net[5]
    t = (-u / v)[(v != 0)]
    other = t[_scores(t, *net).argmax(1) != _scores(0., *net).argmax()]
    return other.abs().min() if len(other) else math.inf


def by_grid(*net):
    t = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    other = t[_scores(t, *net).argmax(1) != _scores(0., *net).argmax()]
    return other.abs().min() if len(other) else math.inf


def first_piece(*net):
    "As if the network were linear."
    return min(abs(t) for low, high, y, s in pieces(*net) if low <= 0 <= high for t in [*(-y / s)[s != 0].tolist(), math.inf])


def inside(*net):
    "Forgets the rays."
    return min((abs(t) for low, high, y, s in pieces(*net) if math.isfinite(low + high) for t in (-y / s).tolist() if low <= t <= high), default=math.inf)


def one_side(*net):
    return min((t for low, high, y, s in pieces(*net) for t in (-y / s).tolist() if max(low, 0) <= t <= high and math.isfinite(t)), default=math.inf)


def chain(h, tau, eps):
    t = np.linspace(0, tau, math.ceil(abs(tau) / eps) + 1)
    said = [h(x) for x in t]
    k = next(k for k in range(len(t) - 1) if said[k] != said[k + 1])
    return t[k], t[k + 1]


def halves(left, stop=1.):
    def answer(h, tau, eps):
        p, q = 0., tau
        while abs(p - q) > stop * eps: p, q = (((p + q) / 2, q) if left(h((p + q) / 2), h(0.)) else (p, (p + q) / 2))
        return p, q
    return answer


def points_only(points, lengths, a):
    t = points @ a / (a @ a)
    return t.abs().max(), (points - t[:, None] * a).norm(dim=1).max()


def swollen(points, lengths, a):
    "A ball of half the length about each middle."
    mid = (points[1:] + points[:-1]) / 2
    t = mid @ a / (a @ a)
    return (t.abs() + lengths / 2 / a.norm()).max(), ((mid - t[:, None] * a).norm(dim=1) + lengths / 2).max()


def box(points, lengths, a):
    "The long axis points away from the line."
    mid, h = (points[1:] + points[:-1]) / 2, (points[1:] - points[:-1]) / 2
    off = lambda x: (x - (x @ a / (a @ a))[:, None] * a).norm(dim=1)
    return tube(points, lengths, a)[0], (off(mid) + (lengths**2 / 4 - h.square().sum(1) + off(h)**2).clamp(min=0).sqrt()).max()


def rank(q=lambda shift: norm.cdf(shift), level=lambda alpha: alpha / 2, bound="exact", more=0):
    return lambda *args: median_bounds(*args, rank=lambda n, shift, alpha: min(n + 1, quantile_rank(n, q(shift), level(alpha), bound) + more))


def plug_in(scores, sigma, eps, alpha):
    q = torch.tensor([norm.cdf(-eps / sigma), norm.cdf(eps / sigma)], dtype=scores.dtype)
    return tuple(scores.quantile(q).tolist())


WRONG = {
    "ch02.1": [
        (to_wall(runner_up), "and no further"),
        (nearest(divide=lambda w, weight: 2 * w.norm(dim=1)), "and no further"),
        (nearest(divide=lambda w, weight: weight.norm(dim=1)), "and no further"),                                  # the rival's own weights
        (nearest(divide=lambda w, weight: w.norm(dim=1)**2), "and no further"),
        (nearest(scale=-1.), "still leads"),                                                                       # away from the wall
        (nearest(scale=.5), "the shortest move"),
        (lambda weight, bias, code: tolerated(weight, 0 * bias, code), "and no further"),
        (lambda weight, bias, code: (tolerated(weight, bias, code)[0], 0 * code), "the shortest move"),
        (lambda weight, bias, code: (R, m) if (R := (m := tolerated(weight, bias, code)[1]).norm()) > 0 else (0., m), "no rival"),
        (lambda weight, bias, code: (math.inf, 0 * code), "and no further"),
        (lambda weight, bias, code: tolerated(weight, bias, code)[0], "expected (R, move"),
        (lambda weight, bias, code: (1., weight), "got shape"),
    ],
    "ch02.2": [
        (levels_each((0, 1, 2, 3), ()), "ball and check"),                                                         # all is paid for everybody
        (levels_each((0, 1, 2), (3,)), "ball and check"),
        (levels_each((), (0, 1, 2, 3)), "can be claimed"),                                                         # "for all", as in the paper
        (levels_each((0, 1), (2,)), "can be claimed"),                                                             # forgets the head
        (levels_each((0,), (1, 2, 3)), "can be claimed"),
        (lambda r, R, levels, m, wanted: ((1 - levels[2] - levels[3]) * (1 - levels[0] - levels[1])**m if r < R else 0., 0), "can be claimed"),   # independence
        (lambda r, R, levels, m, wanted: claim(r, R + 1e-9, levels, m, wanted), "less than R"),
        (lambda r, R, levels, m, wanted: (claim(r, R, levels, m, wanted)[0], 17), "people, you say 17"),
        (lambda r, R, levels, m, wanted: (claim(r, R, levels, m, wanted)[0], claim(r, R, levels, m, wanted)[1] + 1), "up to"),
        (lambda r, R, levels, m, wanted: (1 - levels[2] - levels[3] - m * (levels[0] + levels[1]) if r < R else 0., claim(r, R, levels, m, wanted)[1]), "probability 0,"),   # below zero
        (lambda r, R, levels, m, wanted: (claim(r, R, levels, m, wanted)[0], min(10**6, claim(r, R, levels, m, wanted)[1])), "up to inf"),
        (lambda r, R, levels, m, wanted: claim(r, R, levels, m, wanted)[0], "expected (p, most"),
    ],
    "ch02.3": [
        (lambda z, w, b, V: z - 2 * ((z @ w + b) / (w @ w))[:, None] * w, "a target's score"),                     # reflects at the boundary
        (lambda z, w, b, V: mirror(z, w, b, V, change=-1.), "mirror image should"),                                # to the boundary only
        (lambda z, w, b, V: mirror(z, w, 0., V), "mirror image should"),
        (lambda z, w, b, V: mirror(z, w, b, V[:1]), "a target's score"),                                           # one target only
        (lambda z, w, b, V: mirror(z, w, b, V, targets=.01), "a target's score"),
        (lambda z, w, b, V: z - 2 * ((z @ w + b) / (_beside(w, V) @ _beside(w, V)))[:, None] * w, "mirror image should"),
        (lambda z, w, b, V: z - 2 * ((z @ w + b) / _beside(w, V).norm())[:, None] * _beside(w, V), "mirror image should"),   # as if it were a unit vector
        (lambda z, w, b, V: z - 2 * ((z @ w + b) / (w @ (w - V[0] * (w @ V[0]))))[:, None] * (w - V[0] * (w @ V[0])), "a target's score"),    # as if normals were unit vectors
        (lambda z, w, b, V: None if (new := mirror(z, w, b, V)) is None else new + 5 * torch.linalg.svd(torch.cat([V, w[None]]), full_matrices=True)[2][-1] * (V.shape[0] + 1 < z.shape[1]), "is enough"),
        (lambda z, w, b, V: None, "there is one"),
        (lambda z, w, b, V: z if mirror(z, w, b, V) is None else mirror(z, w, b, V), "None is wanted"),
        (lambda z, w, b, V: w, "got shape"),
    ],
    "ch02.4": [
        (by_grid, "wins just beyond"),
        (by_knots, "wins just beyond"),
        (first_piece, "your eps is"),
        (inside, "wins just beyond"),
        (one_side, "wins just beyond"),
        (lambda *net: .999 * reach(*net), "everybody with |t| <"),
        (lambda *net: 1.001 * reach(*net), "wins just beyond"),
        (lambda *net: reach(*net) * net[5].norm(), "your eps is"),                                                 # in units of z, not of a
        (lambda *net: r if (r := reach(*net)) == math.inf else min(r, 1000.), "3001"),
        (lambda *net: reach(*net) if reach(*net) < 1e9 else 1e9, "no other class ever wins"),
        (lambda *net: math.inf, "wins just beyond"),
        (lambda *net: 0., "everybody with |t| <"),
        (lambda *net: -reach(*net), "everybody with |t| <"),
        (lambda *net: net[4], "got shape"),
    ],
    "ch02.5": [
        (chain, "times are enough"),
        (lambda h, tau, eps: (0., min(eps, abs(tau))), "get the answer"),
        (lambda h, tau, eps: (0., tau), "apart"),
        (lambda h, tau, eps: (tau, tau - eps), "get the answer"),
        (halves(lambda said, first: said == first), "times are enough"),                                           # asks h(0) again and again
        (halves(lambda said, first: said != first), "get the answer"),                                             # the wrong half
        (halves(lambda said, first: said == 0), "times are enough"),
        (halves(lambda said, first: said == first, stop=2.), "apart"),
        (lambda h, tau, eps: witness(h, abs(tau), eps), "get the answer"),                                         # forgets the sign
        (lambda h, tau, eps: 0., "expected (p, q"),
    ],
    "ch02.6": [
        (points_only, "a curve may pass"),
        (swollen, "is enough"),
        (box, "is enough"),
        (lambda points, lengths, a: tube(points, (points[1:] - points[:-1]).norm(dim=1), a), "a curve may pass"),  # as if straight
        (lambda points, lengths, a: tube(points, lengths, a, narrow=.25), "a curve may pass"),
        (lambda points, lengths, a: tube(points, lengths, a, narrow=4.), "is enough"),                             # B twice as large
        (lambda points, lengths, a: tube(points, lengths, a, middle=0.), "a curve may pass"),
        (lambda points, lengths, a: (tube(points, lengths, a)[0] * float(a.norm()), tube(points, lengths, a)[1]), "your eps is"),   # in units of z
        (lambda points, lengths, a: tube(points[:2], lengths[:1], a), "a curve may pass"),
        (lambda points, lengths, a: tube(points, lengths, a)[::-1], "your eps is"),
        (lambda points, lengths, a: (1e9, 1e9), "is enough"),
        (lambda points, lengths, a: (0., 0.), "a curve may pass"),
        (lambda points, lengths, a: (math.inf, math.inf), "infinite"),
        (lambda points, lengths, a: 1., "expected (eps, rho"),
    ],
    "ch02.7": [
        (plug_in, "leaves out"),                                                                                   # the quantile of the sample
        (rank(q=lambda shift: .5), "leaves out"),                                                                  # the median of the first person only
        (rank(level=lambda alpha: alpha), "leaves out"),                                                           # one side's level for both
        (rank(level=lambda alpha: alpha / 4), "is safe already"),
        (rank(bound="dkw"), "is safe already"),
        (rank(more=1), "is safe already"),
        (rank(more=-1), "leaves out"),
        (rank(q=lambda shift: norm.cdf(2 * shift)), "is safe already"),
        (lambda scores, sigma, eps, alpha: (scores.min().item(), scores.max().item()), "is safe already"),
        (lambda scores, sigma, eps, alpha: tuple(max(-99., min(99., x)) for x in median_bounds(scores, sigma, eps, alpha)), "nothing but"),     # no infinite ends
        (lambda scores, sigma, eps, alpha: (-math.inf, math.inf), "is safe already"),
        (lambda scores, sigma, eps, alpha: (scores.mean().item() - eps, scores.mean().item() + eps), "your low is"),
        (lambda scores, sigma, eps, alpha: median_bounds(scores, sigma, eps, alpha)[::-1], "your low is"),
        (lambda scores, sigma, eps, alpha: scores.median(), "expected (low, high"),
    ],
}


test_wrong_answers_are_rejected = rejection(WRONG)


def test_every_check_has_wrong_answers_that_it_must_reject():
    assert set(WRONG) == set(IDS) == {id for id, _ in RIGHT} and min(map(len, WRONG.values())) >= 2


test_junk_gets_a_complaint_and_no_other_exception = complaint(IDS, [lambda *a: ("x", "y"), lambda *a: ("a", math.inf), lambda *a: -math.inf, lambda *a: math.inf, lambda *a: (math.inf, math.inf), lambda *a: (-math.inf, -math.inf),
                                                                    lambda *a: (1j, 1j), lambda *a: (a[0], a[-1]), lambda *a: (math.nan, math.nan), lambda h, *a: (h("x"), 0.), lambda h, *a: (h(None), 0.)])
test_unanswered = silence(IDS)


def test_the_readers_own_error_is_shown():
    with pytest.raises(NotYet, match="ZeroDivisionError: in the answer; for weight = ") as error: check("ch02.1", raises)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_answers_may_write_into_their_arguments():
    "Problems are made once and shown many times."
    def careless(*args):
        for a in args:
            if torch.is_tensor(a): a.zero_()
        return 0., 0.
    for id, answer in RIGHT:
        if id in ("ch02.2", "ch02.5", "ch02.6"): continue                  # no tensors, or slow
        for _ in range(2):
            with pytest.raises(NotYet): check(id, careless)
        check(id, answer)


def test_the_chapters_default_dtype_is_no_trouble():
    "The solutions set float64 as default, everything above ran with float32."
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for id, answer in RIGHT:
            if answer is not tube: check(id, answer)                       # slow, and its solution runs so
        with pytest.raises(NotYet, match="wins just beyond"): check("ch02.4", by_grid)
    finally: torch.set_default_dtype(before)


# --- the oracles behind the checks

def test_heads_are_of_all_kinds():
    walls = [_wall(*h)[1] for h in _heads()]
    assert 0. in walls and math.inf in walls and {len(b) for _, b, _ in _heads()} == {2, 3, 4, 5}
    assert any(0 < far < runner_up(w[(A := int((w @ c + b).argmax()))] - w, (w @ c + b)[A] - (w @ c + b), A, w, c)[0] - 1e-6 < math.inf for (w, b, c), far in zip(_heads(), walls))


def test_claims_are_not_on_the_edge():
    "No answer hangs on how a sum of levels is rounded."
    for r, R, levels, m, wanted in _CLAIMS:
        p, most = _may_claim(r, R, levels, m, wanted)
        exact = claim(r, R, levels, m, wanted)
        assert abs(p - exact[0]) < 1e-12 and most == exact[1]
        if 0 < most < math.inf: assert min(_may_claim(r, R, levels, most, 0)[0] - wanted, wanted - _may_claim(r, R, levels, most + 1, 0)[0]) > 1e-6
    assert {0, 17, math.inf} <= {_may_claim(*c)[1] for c in _CLAIMS}


def test_a_radius_fails_for_all_or_for_none():
    "Why its level is paid once: on f(t) = t the mass of the first person's ball under every similar person's cloud is settled by the first person's draws."
    wrong = few = 0
    for seed in range(200):
        run = center_smoothing(lambda t: t, 1, sigma=1., eps=1., n=250, n_center=150, alpha=.2, delta=.2, seed=seed, like=torch.empty(0, dtype=torch.float64))
        c, R, t = float(run.center), run.radius / 3, np.linspace(-1, 1, 101)
        light = (norm.cdf(c + R - t) - norm.cdf(c - R - t) < .7).any()
        wrong, few = wrong + light, few + 1
    assert wrong <= binom.ppf(.9999, few, .45 * .2)


def test_mirrors_are_of_both_kinds():
    assert {free for *_, free in _mirrors()} == {True, False} and any(torch.linalg.matrix_rank(V) < len(V) for _, _, _, V, _ in _mirrors())
    for z, w, b, V, free in _mirrors(): assert (mirror(z, w, b, V) is not None) == free


def test_the_first_change_is_seen_on_the_librarys_line():
    for W1, b1, W2, b2, z, a in _networks()[:5]:
        net = torch.nn.Sequential(torch.nn.Linear(*W1.T.shape), torch.nn.ReLU(), torch.nn.Linear(*W2.T.shape)).double()
        for p, x in zip(net.parameters(), (W1, b1, W2, b2)): p.data = x
        t = _first_change(W1, b1, W2, b2, z, a)
        if t == math.inf: continue
        path = line_path(net, z, a, 1.01 * abs(t))
        label = path.values[path.t == 0][0].argmax()
        other = path.values.argmax(1) != label
        assert other.any() and (path.t[other].abs() >= abs(t) - 1e-9).all()


def test_the_budget_is_what_an_adversary_leaves():
    "Somebody who always leaves the longer part undecided: after k questions the change may be anywhere in |tau| / 2^k."
    for tau, eps in (1., .125), (-7., .3):
        low, high, asked_ = 0., tau, 0
        def h(t):
            nonlocal low, high, asked_
            asked_ += 1
            if abs(t - low) <= abs(t - high) and abs(t) <= abs(high): low = t if abs(t) > abs(low) else low
            elif abs(t) < abs(high): high = t
            return int(abs(t) >= abs(high))
        witness(h, tau, eps)
        assert asked_ == _budget(tau, eps) and abs(high - low) <= eps


def test_lines_change_their_mind():
    assert all(h(0.) != h(tau) and eps > 0 for _, h, tau, eps in _LINES)
    assert min(tau for *_, tau, _ in _LINES) < 0 and any(abs(tau) < eps for *_, tau, eps in _LINES) and any(len({h(t) for t in np.linspace(0, tau, 999)}) > 2 for _, h, tau, _ in _LINES)


@pytest.mark.parametrize("number", range(3))
def test_curves_stay_in_their_ellipsoid_and_come_near_its_end(number):
    "Detours through random points, as long as allowed."
    points, lengths, a = _curves()[number]
    t, rho = _ellipsoids(points, lengths, a)
    for k, (p, q, length) in enumerate(zip(points, points[1:], lengths)):
        x, h = normalize(_normal(k, 100_000, len(p))), (q - p) / 2
        B = (length**2 / 4 - h @ h).sqrt()
        y = (p + q) / 2 + B * x + (length / 2 - B) * (x @ h / (h @ h))[:, None] * h
        assert ((y - p).norm(dim=1) + (y - q).norm(dim=1) - length).abs().max() < 1e-9
        at = y @ a / (a @ a)
        for seen, most in (at.abs().max(), t[k]), ((y - at[:, None] * a).norm(dim=1).max(), rho[k]): assert .97 * most < seen <= most + 1e-9


def test_ranks_are_the_least_that_are_safe():
    for n, sigma, eps, alpha in (100, 1., 0., .05), (1000, .65, 1., .01), (20, .5, 1., .05):
        low, high = _ranks(n, sigma, eps, alpha)
        q = norm.cdf(eps / sigma)
        assert low == n + 1 - high and binom.sf(high - 1, n, q) <= alpha / 2 and (high == 1 or binom.sf(high - 2, n, q) > alpha / 2)
    assert any(_ranks(len(s), *rest)[1] > len(s) for s, *rest in _samples()) and any(len(s.unique()) < len(s) / 2 for s, *_ in _samples())


@pytest.mark.parametrize("score", [lambda t: t, lambda t: t**3 - t, np.sign, lambda t: np.sin(3 * t)], ids=["line", "cubic", "jump", "wave"])
def test_median_bounds_cover_all_medians_at_once(score):
    rng, n, sigma, eps, alpha, repeats = np.random.default_rng(0), 200, .8, .5, .1, 1000
    grid, noise = np.linspace(-eps, eps, 21), sigma * norm.ppf((np.arange(20_000) + .5) / 20_000)
    medians = np.array([np.median(score(t + noise)) for t in grid])
    low, high = np.array(_ranks(n, sigma, eps, alpha)) - 1
    drawn = np.sort(score(sigma * rng.normal(size=(repeats, n))), axis=1)
    misses = ((drawn[:, [low]] > medians + 1e-3) | (drawn[:, [high]] < medians - 1e-3)).any(1).sum()
    assert misses <= binom.ppf(.9999, repeats, alpha)


# --- the book: statements and solutions

test_solutions_pass = solved("ch02", IDS)
test_chapter_asks_every_exercise_once_and_links_to_its_solution = asked("ch02", IDS)
