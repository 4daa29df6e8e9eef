"""Streams of chapter 1: the paper's `OnlinePrimalDual` and our `StreamingParity`, with the theorems as properties."""
import copy
import io
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stress import stress_batches

from fairbook.parity import project_parity
from fairbook.streaming import OnlinePrimalDual, StreamingParity, _gap_prox

TOL = .05


def regimes(n, gap, seed, hold=1, shares=(.1, .9), levels=(0., 2.)):
    "Scores and groups; a coin per stretch of `hold` samples decides level and share of group 1."
    gen = torch.Generator().manual_seed(seed)
    r = torch.randint(2, (-(-n // hold),), generator=gen).repeat_interleave(hold)[:n]
    s = (torch.rand(n, generator=gen) < torch.tensor(shares)[r]).long()
    return torch.randn(n, generator=gen, dtype=torch.float64) + torch.tensor(levels)[r] + gap * (s == 0), s


def four_groups(seed, n=20_000):
    gen = torch.Generator().manual_seed(seed)
    s = torch.multinomial(torch.tensor([.4, .3, .2, .1]), n, replacement=True, generator=gen)
    return torch.randn(n, generator=gen, dtype=torch.float64) + torch.tensor([0., .3, .6, -.4])[s], s


def pooled_gap(y, s):
    m = [y[s == g].mean().item() for g in s.unique()]
    return max(m) - min(m)


def run(module, z, s, b): return torch.cat([module(*batch) for batch in zip(z.split(b), s.split(b))])


def distortion_ratio(y, z, s): return ((y - z).square().mean() / (project_parity(z, s, TOL) - z).square().mean()).item()


# ---------------------------------------------------------------- the bars

@pytest.mark.parametrize("name, limit, make", [
    ("iid", 1.25, lambda q: regimes(20_000, .8, q, shares=(.3, .3), levels=(0., 0.))),
    ("Simpson", 1.5, lambda q: regimes(20_000, 0., q)),
    ("Simpson +", 1.5, lambda q: regimes(20_000, .8, q)),
    ("Simpson -", 1.5, lambda q: regimes(20_000, -.8, q)),
], ids=["iid", "simpson", "simpson+", "simpson-"])
def test_bars_over_ten_seeds(name, limit, make):
    for seed in range(10):
        z, s = make(seed)
        y = StreamingParity(2, TOL)(z, s)              # one call is 20,000 single steps: test_cutting_does_not_matter
        assert pooled_gap(y, s) <= limit * TOL, f"{name}, seed {seed}: pooled gap {pooled_gap(y, s):.4f}"
        assert distortion_ratio(y, z, s) <= 1.1, f"{name}, seed {seed}: distortion {distortion_ratio(y, z, s):.3f}"


def test_regimes_that_last():
    for gap in (0., .8, -.8):
        z, s = regimes(20_000, gap, 0, hold=16)
        y = StreamingParity(2, TOL)(z, s)
        assert pooled_gap(y, s) <= 1.5 * TOL and distortion_ratio(y, z, s) <= 1.1


def test_four_groups():
    for seed in range(3):
        z, s = four_groups(seed)
        stream = StreamingParity(4, TOL)
        y = stream(z, s)
        assert stream.gap == pytest.approx(pooled_gap(y, s), abs=1e-9) and stream.gap <= 1.5 * TOL
        assert distortion_ratio(y, z, s) <= 1.1


def test_first_one_group_then_the_other():
    z, s = regimes(20_000, 0., 0, shares=(.5, .5), levels=(0., 0.))
    s = torch.arange(20_000) // 10_000
    z = z + .8 * (s == 0)
    y = StreamingParity(2, TOL)(z, s)
    assert torch.equal(y[:10_000], z[:10_000]) and pooled_gap(y, s) <= 1.25 * TOL and 1.7 < distortion_ratio(y, z, s) < 2.3


# ---------------------------------------------------------------- theorem 6

@st.composite
def any_stream(draw, max_n=60):
    "Any order of groups, any scores, any settings."
    n_groups, n = draw(st.integers(2, 5)), draw(st.integers(1, max_n))
    s = draw(st.lists(st.integers(0, n_groups - 1), min_size=n, max_size=n))
    z = draw(st.lists(st.floats(-100, 100), min_size=n, max_size=n))
    tol, step = draw(st.floats(0, 3)), draw(st.floats(.001, 1.))
    return torch.tensor(z, dtype=torch.float64), torch.tensor(s), n_groups, tol, step


@settings(max_examples=60)
@given(any_stream())
def test_theorem6_on_any_stream(case):
    z, s, n_groups, tol, step = case
    stream, y, paid, target = StreamingParity(n_groups, tol, step=step), [], 0., 0.
    for i, g in enumerate(s):
        before, seen = stream.debt, stream.count > 0
        assert abs((stream.count * before).sum()) <= 1e-8 * (1 + (stream.count * before).abs().sum())               # the balance
        k = ((stream.total - before) / stream.count)[seen]
        k = z[i] * 0 if i == 0 else ((stream.total - before) / stream.count)[g] if seen[g] else k.min()
        y.append(stream(z[i:i + 1], s[i:i + 1])[0])
        d, after = z[i] - k, stream.debt
        per_head = (after / stream.count)[stream.count > 0]
        scale = 1 + before.square().sum() + d**2 / step
        assert after.square().sum() <= before.square().sum() - step * before[g]**2 + d**2 / step + 1e-9 * scale      # (b)
        paid, target = paid + (y[-1] - z[i])**2, target + d**2
        assert paid <= target * (1 + 1e-9) + 1e-9
        gap = pooled_gap(torch.stack(y), s[:i + 1])
        assert gap <= tol + per_head.max() - per_head.min() + 1e-8                                                 # (a)
    assert math.isnan(stream.gap) if len(s.unique()) < 2 else stream.gap == pytest.approx(gap, abs=1e-8)


@pytest.mark.parametrize("hold, p, r2", [(1, .5, 4.), (16, .1, 4.)])
def test_theorem6_in_expectation(hold, p, r2):
    ends = []
    for seed in range(30):
        stream = StreamingParity(2, TOL)
        stream(*regimes(1500, 0., seed, hold))
        ends.append((stream.debt.square().sum().item(), stream.count.min().item() * max(stream.gap - TOL, 0)))
    debt2, excess = np.mean(ends, 0)
    assert debt2 <= r2 / (p * stream.step**2) and excess <= (2 * r2 / p)**.5 / stream.step


@pytest.mark.parametrize("hold", [1, 16])
def test_theorem6_rate(hold):
    "T * excess stays where it is while T doubles three times: neither 1/sqrt(T), which would give a factor of 2.8, nor slower."
    marks, excess = (1000, 2000, 4000, 8000), []
    for seed in range(20, 40):
        z, s = regimes(8000, 0., seed, hold)
        for y in (StreamingParity(2, TOL)(z, s), z): excess.append([T * max(pooled_gap(y[:T], s[:T]) - TOL, 0) for T in marks])
    ours, raw = np.mean(np.reshape(excess, (20, 2, 4)), 0)
    assert ours.max() <= 1.25 * ours.min() and ours.min() > 0, ours
    assert raw[-1] > 7 * raw[0]                                                                     # without accounts the gap does not close


@settings(max_examples=60)
@given(any_stream())
def test_debts_come_from_the_nearest_fair_means(case):
    z, s, n_groups, tol, step = case
    stream = StreamingParity(n_groups, tol, step=step)
    stream(z, s)
    here = stream.count > 0
    mean, count = (stream.total / stream.count)[here], stream.count[here]
    k = project_parity(mean, torch.arange(len(mean)), tol, weights=count**2)
    assert torch.allclose(stream.debt[here], count * (mean - k), atol=1e-7, rtol=1e-7) and not stream.debt[~here].any()


# ---------------------------------------------------------------- the stream as a module

@settings(max_examples=40)
@given(any_stream(), st.integers(1, 7))
def test_cutting_does_not_matter(case, b):
    z, s, n_groups, tol, step = case
    whole, cut = StreamingParity(n_groups, tol, (-50., 50.), step=step), StreamingParity(n_groups, tol, (-50., 50.), step=step)
    assert torch.equal(whole(z, s), run(cut, z, s, b)) and torch.equal(whole.total, cut.total)


def test_single_steps_equal_one_call():
    z, s = regimes(1000, .8, 1)
    assert torch.equal(run(StreamingParity(2, TOL), z, s, 1), StreamingParity(2, TOL)(z, s))


@pytest.mark.parametrize("make", [lambda: StreamingParity(4, TOL, (-1., 1.)), lambda: OnlinePrimalDual(4, TOL, (-1., 1.))], ids=["ours", "paper"])
def test_state_dict_resumes(make):
    z, s = four_groups(0, 400)
    whole, first, second, file = make(), make(), make(), io.BytesIO()
    y = run(whole, z, s, 8)
    start = run(first, z[:200], s[:200], 8)
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(second)
    assert torch.equal(torch.cat([start, run(second, z[200:], s[200:], 8)]), y)
    assert torch.equal(run(twin, z[200:], s[200:], 8), y[200:])                    # copies share nothing
    assert twin.gap == second.gap == whole.gap


MAKE = {"ours": lambda: StreamingParity(4, TOL, (-1., 1.)), "paper": lambda: OnlinePrimalDual(4, TOL, (-1., 1.))}
CASTS = {"half": lambda m: m.half(), "bfloat16": lambda m: m.bfloat16(), "float": lambda m: m.float(), "to": lambda m: m.to(torch.float16),
         "type": lambda m: m.type(torch.float32), "inside a network": lambda m: torch.nn.Sequential(torch.nn.Linear(2, 2), m).half()[1]}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_books_are_not_rounded(make, cast):
    z, s = four_groups(0, 3000)
    plain, module = make(), make()
    first = run(plain, z[:2600], s[:2600], 8), run(module, z[:2600], s[:2600], 8)
    before = copy.deepcopy(module.state_dict())
    assert cast(module) is module
    assert all(v.dtype == torch.float64 and torch.equal(v, before[k]) for k, v in module.state_dict().items())       # 2600 samples are no float16
    assert torch.equal(*first) and torch.equal(run(plain, z[2600:], s[2600:], 8), run(module, z[2600:], s[2600:], 8)) and plain.gap == module.gap
    other = cast(make())
    other.load_state_dict(module.state_dict())
    assert all(v.dtype == torch.float64 and torch.equal(v, module.state_dict()[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))])
def test_books_move_between_devices(make, device):
    module = make()
    run(module, *four_groups(0, 100), 8)
    before = copy.deepcopy(module.state_dict())
    module.to(device, torch.float16)
    assert all(v.dtype == torch.float64 and v.device.type == device for v in module.buffers())
    if device == "meta": module.to_empty(device="cpu").load_state_dict(before)
    module.to("cpu")
    assert all(v.device.type == "cpu" and torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_box_and_dtype():
    z, s = regimes(2000, .8, 0, shares=(.3, .3), levels=(0., 0.))
    for dtype in (torch.float32, torch.float64):
        stream = StreamingParity(2, .02, (0., 1.))
        y = stream(z.sigmoid().to(dtype), s)
        assert y.dtype == dtype and y.min() >= 0 and y.max() <= 1 and stream.gap == pytest.approx(pooled_gap(y.double(), s), abs=1e-6)


def test_start_is_stated():
    stream = StreamingParity(3, TOL)
    assert math.isnan(stream.gap) and not stream.debt.any()
    one = torch.tensor([.3, .9])
    assert torch.equal(stream(one, torch.tensor([1, 1])), one) and math.isnan(stream.gap)
    assert stream(one[:0], torch.zeros(0, dtype=torch.long)).shape == (0,)
    assert stream.count.tolist() == [0, 2, 0]


def test_gradient_with_shifts_fixed():
    stream = StreamingParity(2, TOL, (0., 1.), step=.5)
    stream(torch.tensor([.9, .1]), torch.tensor([0, 1]))
    z = torch.tensor([.5, .5, -3.], requires_grad=True)
    stream(z, torch.tensor([0, 1, 0])).sum().backward()
    assert z.grad.tolist() == [1., 1., 0.] and not stream.total.requires_grad


# ---------------------------------------------------------------- the paper's scheme

def solver(z, s, weight, penalty, bounds):
    "The inner problem as Clarabel solves it."
    v = cp.Variable(len(z))
    rows = np.stack([(s == g) / (s == g).sum() for g in s.unique()])
    i, j = np.triu_indices(len(rows), 1)
    gap = cp.max(rows @ v) - cp.min(rows @ v) if penalty == "max" else cp.norm1((rows[i] - rows[j]) @ v)
    box = [] if bounds is None else [v >= bounds[0]] + [v <= bounds[1]] * (bounds[1] < math.inf)
    cp.Problem(cp.Minimize(cp.sum_squares(v - z.numpy()) + weight * gap), box).solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    return torch.as_tensor(v.value).clamp(*bounds) if bounds else torch.as_tensor(v.value)


def objective(y, z, s, weight, penalty):
    m = torch.stack([y[s == g].mean() for g in s.unique()])
    return (y - z).square().sum() + weight * (m.max() - m.min() if penalty == "max" else torch.pdist(m[:, None], p=1).sum())


@pytest.mark.parametrize("penalty", ["max", "sum"])
def test_inner_problem_against_a_solver(penalty):
    for i, (z, s, _, _, bounds) in enumerate(stress_batches(72, max_n=24)):
        if len(s.unique()) < 2: continue
        weight = (.01, .1, 1., 5.)[i % 4] * len(z)
        y, best = _gap_prox(z, s, weight, penalty, *(bounds or (-math.inf, math.inf))), solver(z, s, weight, penalty, bounds)
        assert objective(y, z, s, weight, penalty) <= objective(best, z, s, weight, penalty) + 1e-9 * (1 + z.square().sum()), i
        assert torch.allclose(y, best, atol=1e-4), i


@pytest.mark.parametrize("penalty", ["max", "sum"])
@pytest.mark.parametrize("box", [(-math.inf, math.inf), (.2, .8), (.2, math.inf)], ids=["free", "box", "half"])
def test_inner_problem_gradient(penalty, box):
    z = torch.rand(15, dtype=torch.float64, requires_grad=True)
    s = torch.arange(15) % 5 % 4
    for weight in (.1, 1., 30.): assert torch.autograd.gradcheck(lambda x: _gap_prox(x, s, weight, penalty, *box), z)


@settings(max_examples=60)
@given(any_stream(), st.integers(1, 9), st.sampled_from(["max", "sum"]), st.floats(.05, 5.), st.booleans())
def test_theorem4_on_any_stream(case, b, kind, eta0, boxed):
    z, s, n_groups, tol, _ = case
    module, gaps, sizes = OnlinePrimalDual(n_groups, tol, (-30., 30.) if boxed else None, eta0=eta0, penalty=kind, update=kind), [], []
    for x, g in zip(z.split(b), s.split(b)):
        y = module(x, g)
        m = torch.stack([y[g == h].mean() for h in g.unique()])
        if len(m) < 2:
            assert torch.equal(y, x.clamp(-30, 30) if boxed else x)
            continue
        gaps.append(len(x) * (m.max() - m.min() if kind == "max" else torch.pdist(m[:, None], p=1).sum()).item())
        sizes.append(len(x))
        assert module.gap == pytest.approx(sum(gaps) / sum(sizes), abs=1e-8)
        assert module.gap <= module.bound + 1e-8
        assert module.gap <= tol + module.lam.item() * module.steps.item()**.5 / (eta0 * sum(sizes)) + 1e-8      # the last price will do
    assert int(module.steps) == len(gaps) and (gaps or math.isnan(module.gap))


def test_weighted_gap_is_not_the_pooled_gap():
    z, s = regimes(20_000, 0., 0, hold=16)
    module = OnlinePrimalDual(2, TOL)
    y = run(module, z, s, 16)
    assert module.gap < 1.1 * TOL and pooled_gap(y, s) > 1.5
    single = OnlinePrimalDual(2, TOL)
    assert torch.equal(run(single, z[:50], s[:50], 1), z[:50]) and int(single.steps) == 0


def test_price_trains():
    "During training gradients pass the inner problem, and the price does not."
    z = torch.randn(12, requires_grad=True)
    module = OnlinePrimalDual(3, .01, (-1., 1.))
    for _ in range(5): module(z, torch.arange(12) % 3).square().sum().backward()
    assert torch.isfinite(z.grad).all() and module.lam > 0 and not module.lam.requires_grad


# ---------------------------------------------------------------- bad input

v, g = torch.tensor([.1, .9]), torch.tensor([0, 1])
BAD_BATCH = {
    "NaN": (torch.tensor([.1, torch.nan]), g, "z holds 1 NaN or infinite"),
    "infinite": (torch.tensor([.1, torch.inf]), g, "z holds 1 NaN or infinite"),
    "integers": (torch.tensor([1, 2]), g, "z must be a float32 or float64 tensor"),
    "column": (v[:, None], g[:, None], r"z must be one batch of scores \[b\].*squeeze"),
    "scalar": (v[0], g[0], r"z must be one batch of scores \[b\]"),
    "float groups": (v, g.float(), "groups must be an integer tensor"),
    "short groups": (v, g[:1], "groups must have shape"),
    "group 2 of 2": (v, g + 1, r"groups must lie in 0\.\.1, got values from 1 to 2"),
    "negative group": (v, g - 1, r"groups must lie in 0\.\.1, got values from -1"),
}


@pytest.mark.parametrize("kind", [StreamingParity, OnlinePrimalDual])
@pytest.mark.parametrize("z, groups, message", BAD_BATCH.values(), ids=BAD_BATCH)
def test_bad_batch(untyped, kind, z, groups, message):
    module = kind(2, TOL)
    module(v, g)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message): module(z, groups)
    assert all(torch.equal(before[k], x) for k, x in module.state_dict().items())         # refused before any state changed


BAD_SETTING = {
    "one group": (lambda kind: kind(1, TOL), "n_groups must be at least 2, got 1"),
    "negative tol": (lambda kind: kind(2, -.1), "tol must be finite and >= 0, got -0.1"),
    "NaN tol": (lambda kind: kind(2, math.nan), "tol must be finite and >= 0, got nan"),
    "reversed bounds": (lambda kind: kind(2, TOL, (1., 0.)), "bounds must be .*low < high"),
    "zero step": (lambda kind: kind(2, TOL, **{"step" if kind is StreamingParity else "eta0": 0.}), "(step|eta0) must be finite and > 0, got 0.0"),
}


@pytest.mark.parametrize("kind", [StreamingParity, OnlinePrimalDual])
@pytest.mark.parametrize("call, message", BAD_SETTING.values(), ids=BAD_SETTING)
def test_bad_setting(untyped, kind, call, message):
    with pytest.raises(ValueError, match=message): call(kind)


def test_bad_options(untyped):
    with pytest.raises(ValueError, match="step must be at most 1, got 1.5"): StreamingParity(2, TOL, step=1.5)
    with pytest.raises(ValueError, match="penalty must be 'max' or 'sum', got 'mean'"): OnlinePrimalDual(2, TOL, penalty="mean")
    with pytest.raises(ValueError, match="update must be 'max' or 'sum', got 'min'"): OnlinePrimalDual(2, TOL, update="min")
