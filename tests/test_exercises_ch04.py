"Chapter 4: every check takes its solution, rejects wrong answers with words that help, and never lets another exception escape."
import re

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, root
from test_exercises import asked, complaint, raises, rejection, silence, solved

from fairbook.exercises import _CHECKS, NotYet
from fairbook.exercises_ch04 import _court, _masses, _miss, _pairs, _scaled, _unexplained, check

IDS = sorted(id for id in _CHECKS if id.startswith("ch04."))
one = lambda g: torch.nn.functional.one_hot(g).double()
real = lambda x: torch.tensor(x, dtype=torch.float64)


# --- right answers, other than those of the solutions

def witness(a, b, s, w, F):
    "Corner rule, block by block: few positive entries."
    plan = torch.zeros(len(a), len(b), dtype=torch.float64)
    rows, cols = a[:, None] * (F / F.sum(1, keepdim=True).clamp(min=1e-300))[s], b[:, None] * (F / F.sum(0).clamp(min=1e-300)).T[w]
    for k in range(F.shape[0]):
        for l in range(F.shape[1]):
            r, c = rows[:, l] * (s == k), cols[:, k] * (w == l)
            ends_r, ends_c = r.cumsum(0)[:, None], c.cumsum(0)
            plan += (torch.minimum(ends_r, ends_c) - torch.maximum(ends_r - r[:, None], ends_c - c)).clamp(min=0)
    return plan


def corner(h): return h - h[-1:] - h[:, -1:] + h[-1, -1]


def judge_by_least_squares(plan, C, s, w, F, a, b, reg):
    if plan.min() <= 0: return False
    sums = max((plan.sum(1) - a).abs().max(), (plan.sum(0) - b).abs().max(), (_masses(plan, s, w, F.shape) - F).abs().max())
    return bool(sums < 1e-8 and _unexplained(plan, C, a, b, [(s, w)], reg) < 1e-7)


def step_by_cases(phi, F, lam, reg):
    h = torch.zeros_like(phi)
    for at in np.ndindex(*phi.shape):
        if phi[at] < F[at]: h[at] = min(lam, reg * float(torch.log(F[at] / phi[at])))
    return h


def coarse_by_root(G, p, q):
    "SciPy's root finder for log y, y_0 = 1."
    G, p, q = (np.asarray(t) for t in (G, p, q))
    scale = lambda t: (lambda y: (p / (G @ y), y))(np.exp(np.clip(np.r_[0., t], -30, 30)))
    miss = lambda t: (lambda x, y: ((x @ G * y - q) / q)[1:])(*scale(t))
    return scale(root(miss, np.zeros(len(q) - 1), method="lm", tol=1e-15).x) if len(q) > 1 else scale([])


PATTERN = [[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], [0, 0, 1], [0, 1, 2, 3], [[1/4, 1/4, 1/12, 1/12], [0, 0, 1/6, 1/6]]
TURNED = tuple(np.array(PATTERN[0]).T.tolist()), PATTERN[2], PATTERN[1], np.array(PATTERN[3]).T.tolist()


def cycle(y, N, s, rng):
    "One draw by moving along directions that keep all sums, up or down at random, until all numbers are whole."
    n, L = y.shape
    S = np.eye(N.shape[0])[s]
    A = np.r_[np.c_[np.kron(np.eye(n), np.ones(L)), np.zeros((n, N.size))], np.c_[np.kron(S.T, np.eye(L)), -np.eye(N.size)], np.c_[np.zeros((L, n * L)), np.kron(np.ones(N.shape[0]), np.eye(L))]]
    x = np.r_[y.ravel(), N.ravel()]
    while (loose := abs(x - x.round()) > 1e-7).any():
        d = np.linalg.svd(A[:, loose])[2][-1]
        d = np.where(abs(d) > 1e-9, d, 0.)
        up, down = ((np.where(e > 0, np.ceil(x[loose]) - x[loose], np.floor(x[loose]) - x[loose])[e != 0] / e[e != 0]).min() for e in (d, -d))
        x[loose] += d * (up if rng.random() < down / (up + down) else -down)
    return x[:n * L].reshape(n, L).round()


def assign_by_cycles(plan, s, w, draws, seed):
    rng, share = np.random.default_rng(seed), len(plan) * plan.numpy()
    W, S, w = one(w).numpy(), one(s).numpy(), w.numpy()
    seats, found = np.repeat(np.arange(len(w)), share.sum(0).round().astype(int)), []
    for _ in range(draws):
        side = cycle(share @ W, S.T @ share @ W, s.numpy(), rng).argmax(1)
        school = np.empty(len(plan), int)
        for l in range(W.shape[1]): school[side == l] = rng.permutation(seats[w[seats] == l])
        found.append(school)
    return np.array(found)


def two_tables_by_drift(C, a, b, s, s2, w, F1, F2, reg):
    "No linear program: if the sums are still wrong in the end, there is no plan."
    plan = _scaled(torch.exp(-C / reg), a, b, [(s, w, F1), (s2, w, F2)], 5000)
    off = max((plan.sum(1) - a).abs().max(), (plan.sum(0) - b).abs().max(), (_masses(plan, s, w, F1.shape) - F1).abs().max())
    return plan if off < 1e-9 else None


RIGHT = [("ch04.1", witness), ("ch04.2", corner), ("ch04.3", judge_by_least_squares), ("ch04.4", step_by_cases), ("ch04.5", coarse_by_root),
         ("ch04.6", PATTERN), ("ch04.6", TURNED), ("ch04.7", assign_by_cycles), ("ch04.8", two_tables_by_drift)]


@pytest.mark.parametrize("id, answer", RIGHT)
def test_other_right_answers_pass(id, answer, capsys):
    check(id, answer)
    assert capsys.readouterr().out == f"{id}: correct\n"


# --- wrong answers: what a reader may well try, and words that the complaint must have

def rows_ok(P, C, s, w, F, a, b, reg): return (P.sum(1) - a).abs().max() < 1e-8
def cols_ok(P, C, s, w, F, a, b, reg): return (P.sum(0) - b).abs().max() < 1e-8
def table_ok(P, C, s, w, F, a, b, reg): return (_masses(P, s, w, F.shape) - F).abs().max() < 1e-8
def form_ok(P, C, s, w, F, a, b, reg): return _unexplained(P, C, a, b, [(s, w)], reg) < 1e-7
def block_form(P, C, s, w, F, a, b, reg):
    return all(_unexplained(P[s == k][:, w == l], C[s == k][:, w == l], a[s == k], b[w == l], [], reg) < 1e-7 for k in range(F.shape[0]) for l in range(F.shape[1]))
def plain_form(P, C, s, w, F, a, b, reg): return _unexplained(P, C, a, b, [], reg) < 1e-7
def judge(*conditions): return lambda *case: all(bool(c(*case)) for c in conditions)


def alternate(rounds):
    def coarse(G, p, q):
        y = torch.ones_like(q)
        for _ in range(rounds):
            x = p / (G @ y)
            y = q / (x @ G)
        return x, y
    return coarse


def pattern(allowed=PATTERN[0], s=PATTERN[1], w=PATTERN[2], F=PATTERN[3]): return allowed, s, w, F


def independent(plan, s, w, draws, seed): return torch.multinomial(plan, draws, True, generator=torch.Generator().manual_seed(seed)).T


def matching(noise):
    "The assignment of largest plan, up to noise: whole seats, and neither table nor chances."
    def assign(plan, s, w, draws, seed):
        seats = torch.arange(len(w)).repeat_interleave((len(plan) * plan.sum(0)).round().long())
        gen = torch.Generator().manual_seed(seed)
        return np.array([seats[linear_sum_assignment(-(plan + noise * torch.rand(plan.shape, generator=gen))[:, seats])[1]].numpy() for _ in range(draws)])
    return assign


def mixture_of_matchings(plan, s, w, draws, seed):
    "Birkhoff and von Neumann: seats and all chances are right, the table is right on average only."
    seats = torch.arange(len(w)).repeat_interleave((len(plan) * plan.sum(0)).round().long()).numpy()
    left = (len(plan) * plan.numpy())[:, seats] / np.bincount(seats)[seats]
    found, weights = [], []
    while left.max() > 1e-9:
        i, j = linear_sum_assignment(-np.log(np.maximum(left, 1e-12)))
        found.append(seats[j])
        weights.append(left[i, j].min())
        left[i, j] -= weights[-1]
    return np.array(found)[np.random.default_rng(seed).choice(len(found), draws, p=np.array(weights) / sum(weights))]


def conditioned(plan, s, w, draws, seed):
    "Independent draws, kept if seats and table are right: every draw is, the chances are not."
    gen, W, S, found = torch.Generator().manual_seed(seed), one(w), one(s), []
    share, seats = len(plan) * plan, (len(plan) * plan).sum(0)
    while len(found) < draws:
        d = torch.nn.functional.one_hot(torch.multinomial(plan, 1, generator=gen).squeeze(1), len(w)).double()
        if (d.sum(0) - seats).abs().max() < .5 and (S.T @ (d - share) @ W).abs().max() < 1 - 1e-6: found.append(d.argmax(1).tolist())
    return found


def both(K, reg_of=lambda reg: reg): return lambda C, a, b, s, s2, w, F1, F2, reg: _scaled(K(C, reg), a, b, [(s, w, F1), (s2, w, F2)])
def none_if_not(f):
    "Answers None where the tables contradict each other, else `f`."
    def answer(C, a, b, s, s2, w, F1, F2, reg):
        wishes = [(np.outer(g == k, w == l), F[k, l].item()) for g, F in ((s, F1), (s2, F2)) for k, l in np.ndindex(*F.shape)]
        return None if _miss(np.ones(C.shape), wishes, a, b) > 1e-6 else f(C, a, b, s, s2, w, F1, F2, reg)
    return answer


gibbs = lambda C, reg: torch.exp(-C / reg)
WRONG = {
    "ch04.1": [
        (lambda a, b, s, w, F: torch.outer(a, b), "group masses"),
        (lambda a, b, s, w, F: F[s][:, w] / torch.outer(torch.bincount(s)[s], torch.bincount(w)[w]), "F = [[0.1, 0.4], [0.2, 0.3]]"),   # uniform within blocks
        (lambda a, b, s, w, F: torch.outer(a, b) * F[s][:, w], "rows"),
        (lambda a, b, s, w, F: torch.outer(a, b) * (F / F.sum(1, keepdim=True))[s][:, w], "rows"),
        (lambda a, b, s, w, F: torch.outer(a, b) * (one(s) @ (F / torch.outer(one(s).T @ a, F.sum(0)))[:int(s.max()) + 1] @ one(w).T), "NaN"),   # 0/0 spreads
        (lambda a, b, s, w, F: witness(a, b, s, w, F).T, "got shape"),
        (lambda a, b, s, w, F: witness(a, b, s, w, F) + .01 * torch.outer(one(s)[:, 0] - one(s)[:, -1], one(w)[:, 0] - one(w)[:, -1]), "group masses"),
        (lambda a, b, s, w, F: witness(a, b, s, w, F).float(), "rows"),
    ],
    "ch04.2": [
        (lambda h: h, "give the same plan"),
        (lambda h: 0 * h, "another plan"),
        (lambda h: h - h.mean(), "give the same plan"),
        (lambda h: h - h.mean(0), "give the same plan"),
        (lambda h: h - h.mean(1, keepdim=True), "give the same plan"),
        (lambda h: h - h.mean(0) - h.mean(1, keepdim=True), "give the same plan"),                  # forgets the overall mean
        (lambda h: corner(h) / corner(h).abs().max().clamp(min=1e-9), "another plan"),                # size counts
        (lambda h: h[0, 0] - h[0, -1] - h[-1, 0] + h[-1, -1], "shape"),                               # the contrast alone
        (lambda h: corner(h).sort(1).values, "another plan"),
    ],
    "ch04.3": [
        (lambda *_: True, "accept"), (lambda *_: False, "refuse"), (lambda *_: "yes", "True or False"),
        (judge(cols_ok, table_ok, form_ok), "row sums"),
        (judge(rows_ok, table_ok, form_ok), "column sums"),
        (judge(rows_ok, cols_ok, form_ok), "group masses are wrong"),
        (judge(rows_ok, cols_ok, table_ok), "ignores the cost"),
        (judge(rows_ok, cols_ok, table_ok, block_form), "every block"),
        (judge(rows_ok, cols_ok, table_ok, plain_form), "refuse"),
        (lambda P, C, s, w, F, a, b, reg: judge(rows_ok, cols_ok, table_ok, form_ok)(P, C, s, w, F, a, b, 1.), "reg = 0.5"),        # ignores reg
        (lambda P, C, s, w, F, a, b, reg: judge(rows_ok, cols_ok, table_ok, form_ok)(P, -C, s, w, F, a, b, reg), "refuse"),       # wrong sign
    ],
    "ch04.4": [
        (lambda phi, F, lam, reg: reg * torch.log(F / phi), "welcome"),
        (lambda phi, F, lam, reg: (reg * torch.log(F / phi)).clamp(-lam, lam), "welcome"),
        (lambda phi, F, lam, reg: (reg * torch.log(F / phi)).clamp(min=0), "only 0.01"),
        (lambda phi, F, lam, reg: torch.log(F / phi).clamp(0, lam), "reg = 0.1"),                     # forgets reg
        (lambda phi, F, lam, reg: (reg * torch.log(phi / F)).clamp(0, lam), "for phi"),
        (lambda phi, F, lam, reg: torch.where(phi < F, lam, 0.), "more than enough"),                # all or nothing
        (lambda phi, F, lam, reg: lam * (F - phi).clamp(min=0), "missing"),                           # a step of a gradient
        (lambda phi, F, lam, reg: reg * torch.log(F / phi).clamp(0, lam), "for phi"),
        (lambda phi, F, lam, reg: (reg * torch.log(F.sum() / phi.sum())).clamp(0, lam) + 0 * phi, "for phi"),
    ],
    "ch04.5": [
        (lambda G, p, q: (torch.ones_like(p), torch.ones_like(q)), "miss"),
        (alternate(1), "rows"), (alternate(20), "rows"), (alternate(2000), "e-"),
        (lambda G, p, q: (p / G.sum(1), q / G.sum(0)), "miss"),
        (lambda G, p, q: coarse_by_root(G, p, q)[::-1], "for G"),
        (lambda G, p, q: tuple(-torch.as_tensor(v) for v in coarse_by_root(G, p, q)), "positive"),
        (lambda G, p, q: np.outer(*coarse_by_root(G, p, q))[..., None], "for G"),
        (lambda G, p, q: tuple(torch.as_tensor(v).float() for v in coarse_by_root(G, p, q)), "miss"),
    ],
    "ch04.6": [
        (pattern([[1] * 4] * 3), "has all of F"),
        (pattern([[0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]), "no plan at all"),
        (([[0, 1], [1, 1]], [0, 1], [0, 1], [[.25, .25], [.25, .25]]), "alone is out of reach"),
        (pattern([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]), "no plan at all"),
        (pattern(F=[[1/6, 1/6, 1/6, 1/6], [1/12] * 4]), "has all of F"),
        (pattern(F=[[1/6 + 1e-4, 1/6 + 1e-4, 1/6 - 1e-4, 1/6 - 1e-4], [1/12 - 1e-4] * 2 + [1/12 + 1e-4] * 2]), "0.001"),       # by a hair
        (pattern(F=[[1/4, 1/4, 1/6, 1/6], [0, 0, 1/6, 1/6]]), "rows of F"),
        (pattern(F=[[1/4, 1/4, 0, 1/6], [0, 0, 1/6, 1/6]]), "columns of F"),
        (([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], [0, 0, 1, 1], [0, 1, 2, 3], [[1/8] * 4] * 2), "at most 7"),
        (pattern(w=[0, 1, 2, 4]), "without gaps"), (pattern(s=[0, 1]), "each of the 3 rows"), (pattern(F=[[1.]]), "a table [2, 4]"),
        (pattern([[0, 0, .5, 1], [1, 1, 1, 1], [1, 1, 1, 1]]), "zeros and ones"), (pattern(F=[[-1.] * 4] * 2), "negative"), (PATTERN[:3], "(allowed, s, w, F)"),
    ],
    "ch04.7": [
        (independent, "wrong seats"),
        (matching(0.), "of the draws"), (matching(1.), "plan = "),
        (mixture_of_matchings, "wrong table"),
        (conditioned, "of the draws"),
        (lambda plan, s, w, draws, seed: assign_by_cycles(plan, s, w, draws, seed)[0], "400 draws"),
        (lambda plan, s, w, draws, seed: np.repeat(assign_by_cycles(plan, s, w, 1, seed), draws, 0), "of the draws"),
        (lambda plan, s, w, draws, seed: assign_by_cycles(plan, s, w, draws, seed) + 1, "numbered 0 to 1"),
        (lambda plan, s, w, draws, seed: assign_by_cycles(plan, s, w, draws, seed) + .5, "numbered 0 to 1"),
    ],
    "ch04.8": [
        (lambda *_: None, "you return None"),
        (both(gibbs), "no plan has both"),
        (none_if_not(lambda C, a, b, s, s2, w, F1, F2, reg: _scaled(gibbs(C, reg), a, b, [(s, w, F1)])), "group masses"),
        (none_if_not(lambda C, a, b, s, s2, w, F1, F2, reg: _scaled(gibbs(C, reg), a, b, [(s2, w, F2)])), "group masses"),
        (none_if_not(both(lambda C, reg: 0 * C + 1)), "not the cheapest"),                            # ignores the cost
        (none_if_not(both(lambda C, reg: gibbs(C, 1.))), "not the cheapest"),                         # ignores reg
        (none_if_not(lambda C, a, b, s, s2, w, F1, F2, reg: _scaled(gibbs(C, reg), a, b, [(s, w, F1), (s2, w, F2)], 5)), "are wrong"),
        (none_if_not(lambda C, a, b, s, s2, w, F1, F2, reg: torch.outer(a, b) * (F1 / torch.outer(F1.sum(1), F1.sum(0)))[s][:, w] * (F2 / torch.outer(F2.sum(1), F2.sum(0)))[s2][:, w]), "are wrong"),
        (lambda C, a, b, s, s2, w, F1, F2, reg: None if (s == s2).all() else both(gibbs)(C, a, b, s, s2, w, F1, F2, reg), "you return None"),
    ],
}
test_wrong_answers_are_rejected = rejection(WRONG)


def test_there_are_eight_and_each_has_wrong_answers_that_it_must_reject():
    assert IDS == [f"ch04.{k}" for k in range(1, 9)]
    assert set(WRONG) == set(IDS) == {id for id, _ in RIGHT} and min(map(len, WRONG.values())) >= 5


test_junk_gets_a_complaint_and_no_other_exception = complaint(IDS, [([[]], [], [], [[]]), ([[1, 0], [1]], [0, 1], [0], [[1.]]), ([[1]], [np.nan], [0], [[1.]])])
test_unanswered = silence(IDS)


def test_the_readers_own_error_is_shown():
    with pytest.raises(NotYet, match="ZeroDivisionError: in the answer; for a = ") as error: check("ch04.1", raises)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_answers_may_write_into_their_arguments():
    "The exhibits of the court are made once and shown many times."
    def careless(*args):
        for a in args:
            if torch.is_tensor(a): a.zero_()
        return True
    for _ in range(2):
        with pytest.raises(NotYet, match="ignores the cost"): check("ch04.3", careless)
    check("ch04.3", judge_by_least_squares)


def test_the_chapters_default_dtype_is_no_trouble():
    "The chapter sets float64 as default, everything above ran with float32."
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for id, answer in RIGHT:
            if answer is not assign_by_cycles: check(id, answer)
        with pytest.raises(NotYet, match="wrong seats"): check("ch04.7", independent)
    finally: torch.set_default_dtype(before)


# --- the oracles behind the checks

def test_forgeries_break_one_condition_each():
    names = {"row sums": "rows", "column sums": "cols", "group masses are wrong": "table", "ignores the cost": "form", "half of reg": "form", "every block": "form"}
    for P, *case, wrong in _court():
        broken = {name for name, ok in (("rows", rows_ok), ("cols", cols_ok), ("table", table_ok), ("form", form_ok)) if not ok(P, *case)}
        assert broken == {names[words] for words in names if words in wrong}, wrong


def test_pairs_of_tables_of_both_kinds():
    possible = []
    for C, a, b, s, s2, w, F1, F2 in _pairs():
        for g, F in ((s, F1), (s2, F2)): assert torch.allclose(F.sum(1), one(g).T @ a) and torch.allclose(F.sum(0), one(w).T @ b)
        possible.append(two_tables_by_drift(C, a, b, s, s2, w, F1, F2, 1.) is not None)
    assert possible == [True, True, False, False, False, True, True]


# --- the book: statements and solutions

test_solutions_pass = solved("ch04", IDS)
test_chapter_asks_every_exercise_once_and_links_to_its_solution = asked("ch04", IDS)
