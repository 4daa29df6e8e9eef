"Chapter 5: every check takes its solution, rejects wrong answers with words that help, and never lets another exception escape."
import re

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from test_exercises import asked, complaint, raises, rejection, silence, solved

from fairbook.exercises import _CHECKS, NotYet
from fairbook.exercises_ch05 import _best, _charges, _dual, _halves, _mismatches, _models, _moves, _posterior, _random, _risk, _rules, _trials, check
from fairbook.fair_dual import fair_scores, solve_lp
from fairbook.fairness_constraints import constraint_values, fairness_constraints, group_confusion_matrices

IDS = sorted(id for id in _CHECKS if id.startswith("ch05."))
eye = lambda k: torch.eye(k, dtype=torch.float64)
onehot = lambda d, m: torch.nn.functional.one_hot(d, m).double()


# --- right answers, other than those of the solutions

def error_rows(mass):
    "Counts errors instead of hits, group by group."
    omega, (g, m) = mass.sum(1), mass.shape
    D = torch.zeros(g, g, m, m, dtype=torch.float64)
    for b in range(g):
        for a in range(g): D[b, a] = (omega[a] - int(a == b)) * (1 - eye(m))
    return D


def certify_scaled(joint, h, lam, S, xi):
    "Also tries smaller multipliers, which may prove more."
    gaps = [_risk(joint, h) - _dual(joint, S, t * lam, xi) for t in np.linspace(0, 1, 21)]
    return min(gaps), max(0., float(constraint_values(joint, h, S).abs().max()) - xi)


def certify_by_identity(joint, h, lam, S, xi):
    "Regret and slackness, equation (5.6)."
    beta, D = fair_scores(joint, lam, S), constraint_values(joint, h, S)
    return (beta.amax(1) - (h * beta).sum(1)).mean() + (xi * lam.abs() - lam * D).sum(), (D.abs().amax() - xi).clamp(min=0)


def halved(risk, lam, xi): return np.float64(risk + sum(float(x) * abs(float(k)) / 2 for x, k in zip(xi, lam))), "low"
def priced(joint, lam, S, cost): return 7 - _charges(joint, S, lam) - joint.sum(1) - joint.sum(1) @ cost


def vertex(joint, h, S, sign=1.):
    "A vertex of the rules with the same D, of least (or, with sign -1, of largest) risk, within what h draws from."
    n, m = h.shape
    G = torch.einsum("nai,kaij->knj", joint, S.coefficients()).flatten(1).numpy() / n
    _, size, G = np.linalg.svd(G, full_matrices=False)                # rows of D depend on each other
    G = G[size > 1e-12 * size[0]]
    A, b = np.vstack([np.kron(np.eye(n), np.ones(m)), G]), np.r_[np.ones(n), G @ h.flatten().numpy()]
    r = linprog(-sign * joint.sum(1).flatten().numpy() / n, A_eq=A, b_eq=b, bounds=[(0, 1 if p > 0 else 0) for p in h.flatten()], method="highs-ds")
    return torch.tensor(r.x).reshape(n, m)


def least_xi(mean, mass):
    g, m = mean.shape
    return max(abs(float(mean[:, i].sum() / mass[:, i].sum() - mean[b, i] / mass[b, i])) for b in range(g) for i in range(m)) / m


def decide(joint, h, S): return vertex(joint, h, S).argmax(1)


def repair(joint, a, y, h):
    "The same likelihood as in the solution, maximised by L-BFGS."
    g, m = joint.shape[1:]
    theta = torch.zeros(h.shape[1], g * m, dtype=torch.float64, requires_grad=True)
    wanted = .99999 * onehot(a * m + y, g * m) + .00001 * joint.flatten(1)
    tilt = lambda joint, h: torch.log_softmax(joint.flatten(1).log() + h @ theta, 1)
    search = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe")
    def loss():
        search.zero_grad()
        value = -(wanted * tilt(joint, h)).sum(1).mean()
        value.backward()
        return value
    search.step(loss)
    return lambda joint, h: tilt(joint, h).exp().detach().reshape(joint.shape)


RIGHT = [("ch05.1", error_rows), ("ch05.2", certify_scaled), ("ch05.2", certify_by_identity), ("ch05.3", halved), ("ch05.4", priced), ("ch05.5", vertex), ("ch05.6", least_xi),
         ("ch05.7", decide), ("ch05.8", repair)]


@pytest.mark.parametrize("id, answer", RIGHT, ids=[f"{id}-{answer.__name__}" for id, answer in RIGHT])
def test_right_answers_pass(id, answer, capsys):
    check(id, answer)
    assert capsys.readouterr().out == f"{id}: correct\n"


# --- wrong answers: what a reader may well try, and words that the complaint must have

def excess(joint, h, S, xi): return max(0., float(constraint_values(joint, h, S).abs().max()) - xi)
def by_lot(joint, h, S): return torch.multinomial(h, 1, generator=torch.Generator().manual_seed(3))[:, 0]


def by_heart(joint, a, y, h):
    "Knows the rows with records, and no others."
    seen, records = joint, onehot(a * 3 + y, 9).reshape(joint.shape)
    return lambda joint, h: records if torch.equal(joint, seen) else joint


def right_totals(joint, a, y, h):
    "Scales group-class pairs as a whole, whatever the decision."
    shares = onehot(a * 3 + y, 9).mean(0).reshape(3, 3)
    theta = torch.zeros(3, 3, dtype=torch.float64)
    tilt = lambda joint, h: (lambda p: p / p.sum((1, 2), keepdim=True))(joint * theta.exp())
    for _ in range(200): theta = theta + (shares / tilt(joint, h).mean(0)).log()
    return tilt


def forgetful(joint, a, y, h):
    "The mean of the records in each decision cell, with no regard for features; mixtures of cells by least squares."
    cells = torch.linalg.solve(h.T @ h, h.T @ onehot(a * 3 + y, 9))
    return lambda joint, h: (h @ cells).reshape(-1, 3, 3)


def forgetful_tilt(joint, a, y, h):
    "A distribution and right in every cell, but made from the mean of the model."
    blank = lambda joint: joint.mean(0).expand_as(joint).contiguous()
    correct = repair(blank(joint), a, y, h)
    return lambda joint, h: correct(blank(joint), h)


WRONG = {
    "ch05.1": [
        (lambda mass: -error_rows(mass), "the sign is turned"),
        (lambda mass: error_rows(mass) / mass.sum(1)[:, None, None], "your rows give"),                                  # acts on Q, not on C
        (lambda mass: (1 / len(mass) - eye(len(mass)))[:, :, None, None] * (1 - eye(mass.shape[1])), "your rows give"),  # groups count alike
        (lambda mass: eye(len(mass))[:, :, None, None] * eye(mass.shape[1]), "your rows give"),                          # nobody to compare with
        (lambda mass: 0 * error_rows(mass), "your rows give"),
        (lambda mass: error_rows(mass) * mass[:, :, None], "your rows give"),
        (lambda mass: error_rows(mass)[0], "got shape"),
        (lambda mass: error_rows(mass) / 0, "NaN"),
    ],
    "ch05.2": [
        (lambda joint, h, lam, S, xi: (_risk(joint, h) - _dual(joint, S, lam, 0.), excess(joint, h, S, xi)), "no feasible rule"),           # forgets xi |lam|
        (lambda joint, h, lam, S, xi: ((lambda b: (b.amax(1) - (h * b).sum(1)).mean())(fair_scores(joint, lam, S)), excess(joint, h, S, xi)), "no feasible rule"),   # regret only
        (lambda joint, h, lam, S, xi: ((xi * lam.abs() - lam * constraint_values(joint, h, S)).sum(), excess(joint, h, S, xi)), "no feasible rule"),                  # slackness only
        (lambda joint, h, lam, S, xi: (0., excess(joint, h, S, xi)), "no feasible rule"),
        (lambda joint, h, lam, S, xi: (1., excess(joint, h, S, xi)), "more can be proved"),
        (lambda joint, h, lam, S, xi: (_risk(joint, h) - _dual(joint, S, -lam, xi), excess(joint, h, S, xi)), "more can be proved"),        # the other sign
        (lambda joint, h, lam, S, xi: (max(0., certify_by_identity(joint, h, lam, S, xi)[0]), excess(joint, h, S, xi)), "more can be proved"),
        (lambda joint, h, lam, S, xi: (certify_by_identity(joint, h, lam, S, xi)[0], 0.), "above xi"),
        (lambda joint, h, lam, S, xi: (certify_by_identity(joint, h, lam, S, xi)[0], constraint_values(joint, h, S).abs().max() - xi), "above xi"),
        (lambda joint, h, lam, S, xi: certify_by_identity(joint, h, lam, S, xi)[0], "(gap, excess)"),
    ],
    "ch05.3": [
        (lambda risk, lam, xi: (risk, "low"), "prove a risk"),
        (lambda risk, lam, xi: (risk + (xi * lam).sum() / 2, "low"), "prove a risk"),                # signs left in
        (lambda risk, lam, xi: (risk - (xi * lam.abs()).sum() / 2, "low"), "prove a risk"),          # downhill
        (lambda risk, lam, xi: (risk + (xi * lam.abs()).sum(), "low"), "above"),
        (lambda risk, lam, xi: (risk + lam.abs().sum() / 2, "low"), "above"),
        (lambda risk, lam, xi: (risk + xi.mean() * lam.abs().sum() / 2, "low"), "for risk = "),      # one bound for all
        (lambda risk, lam, xi: (halved(risk, lam, xi)[0], "high"), "ever above"),
        (lambda risk, lam, xi: (halved(risk, lam, xi)[0], True), "'low' or 'high'"),
        (lambda risk, lam, xi: halved(risk, lam, xi)[0], "expected (guess"),
    ],
    "ch05.4": [
        (lambda joint, lam, S, cost: fair_scores(joint, lam, S), "in row"),                          # the cost left out
        (lambda joint, lam, S, cost: -joint.sum(1) @ cost, "in row"),                                # the prices left out
        (lambda joint, lam, S, cost: -priced(joint, lam, S, cost), "in row"),
        (lambda joint, lam, S, cost: priced(joint, -lam, S, cost), "in row"),
        (lambda joint, lam, S, cost: priced(joint, lam, S, cost.T), "in row"),
        (lambda joint, lam, S, cost: 2 * priced(joint, lam, S, cost), "in row"),
        (lambda joint, lam, S, cost: fair_scores(joint, lam, S) - joint.sum(1) @ cost, "in row"),    # I and -c, both
        (lambda joint, lam, S, cost: 0 * joint.sum(1), "in row"),
        (lambda joint, lam, S, cost: priced(joint, lam, S, cost).T, "got shape"),
    ],
    "ch05.5": [
        (lambda joint, h, S: h, "draws on"),
        (lambda joint, h, S: onehot(h.argmax(1), h.shape[1]), "D must stay"),
        (lambda joint, h, S: 2 * h, "distribution"),
        (lambda joint, h, S: h.mean(0).expand_as(h), "D must stay"),
        (lambda joint, h, S: _best(joint, S, float(constraint_values(joint, h, S).abs().max()))[2], "D must stay"),   # within the bound, but not the same D
        (lambda joint, h, S: vertex(joint, h, S, sign=-1.), "the risk rises"),
        (lambda joint, h, S: h[:, :1], "got shape"),
    ],
    "ch05.6": [
        (lambda mean, mass: 0., "finds no rule"),
        (lambda mean, mass: 1., "finds one"),
        (lambda mean, mass: (1 - mean.sum(1) / mass.sum(1)).abs().max() / mean.shape[1], "finds no rule"),        # the lemma for parity
        (lambda mean, mass: least_xi(mean, mass) * mean.shape[1], "finds one"),
        (lambda mean, mass: (1 - mean / mass).abs().max() / mean.shape[1], "xi = "),                              # as if everybody's rate were right
        (lambda mean, mass: (mean - mass).abs().max(), "xi = "),
        (lambda mean, mass: -least_xi(mean, mass) - .1, "at least 0"),
        (lambda mean, mass: mean / mass, "got shape"),
    ],
    "ch05.7": [
        (lambda joint, h, S: h.argmax(1), "independent draws"),
        (by_lot, "independent draws"),
        (lambda joint, h, S: h.argmin(1), "never draws"),
        (lambda joint, h, S: vertex(joint, h, S, sign=-1.).argmax(1), "the risk rises"),
        (lambda joint, h, S: torch.zeros(len(h)), "never draws"),
        (lambda joint, h, S: torch.full((len(h),), 5), "numbered"),
        (lambda joint, h, S: torch.full((len(h),), .5), "numbered"),
        (lambda joint, h, S: vertex(joint, h, S), "got shape"),
    ],
    "ch05.8": [
        (lambda joint, a, y, h: lambda joint, h: joint, "rows with records"),
        (right_totals, "rows with records"),
        (by_heart, "on other rows"),
        (forgetful, "distribution"),
        (forgetful_tilt, "become worse"),
        (lambda joint, a, y, h: lambda joint, h: 2 * joint, "distribution"),
        (lambda joint, a, y, h: joint, "expected a function"),
        (lambda joint, a, y, h: lambda joint, h: joint[:2], "got shape"),
    ],
}


test_wrong_answers_are_rejected = rejection(WRONG)


def test_every_check_has_wrong_answers_that_it_must_reject():
    assert set(WRONG) == set(IDS) == {id for id, _ in RIGHT} and min(map(len, WRONG.values())) >= 2


test_junk_gets_a_complaint_and_no_other_exception = complaint(IDS, [lambda *a: ("x", "low"), lambda *a: raises, lambda *a: lambda *b: None, lambda *a: lambda joint, h: joint * float("nan")])
test_unanswered = silence(IDS)


def test_the_readers_own_error_is_shown():
    with pytest.raises(NotYet, match="ZeroDivisionError: in the answer; for mass = ") as error: check("ch05.1", raises)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_answers_may_write_into_their_arguments():
    "Problems are made once and shown many times."
    def careless(*args):
        for a in args:
            if torch.is_tensor(a): a.zero_()
        return 0., 0.
    for id, answer in ("ch05.2", certify_by_identity), ("ch05.3", halved), ("ch05.6", least_xi):
        for _ in range(2):
            with pytest.raises(NotYet): check(id, careless)
        check(id, answer)


def test_the_chapters_default_dtype_is_no_trouble():
    "The chapter sets float64 as default, everything above ran with float32."
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for id, answer in RIGHT: check(id, answer)
        with pytest.raises(NotYet, match="independent draws"): check("ch05.7", by_lot)
    finally: torch.set_default_dtype(before)


# --- the oracles behind the checks

@pytest.mark.parametrize("criteria", ["dp", "eop", "eo", ["dp", "eo"]])
def test_the_linear_program_agrees_with_the_books(criteria):
    joint = _posterior(5, 15, 3, 3)
    S = fairness_constraints(criteria, joint)
    for xi in torch.full((len(S),), .03, dtype=torch.float64), .1 * _random(1, len(S)):
        risk, lam, h = _best(joint, S, xi.numpy())
        assert abs(risk - solve_lp(joint, S, xi).risk) < 1e-8 and abs(risk - _risk(joint, h)) < 1e-9
        assert ((constraint_values(joint, h, S).abs() - xi) <= 1e-7).all() and abs(_dual(joint, S, lam, xi) - risk) < 1e-8


def test_the_linear_program_says_when_nothing_is_feasible():
    joint, mass = _mismatches()[-1]
    assert _best(joint, fairness_constraints("eo", n_groups=3, n_classes=4).bind(mass), 0.) is None


def test_charges_are_the_scores_with_the_sign_turned_and_moves_count_them():
    joint = _posterior(6, 5, 2, 3)
    S = fairness_constraints("eo", joint)
    lam = _random(2, len(S)) - .5
    charges = _charges(joint, S, lam)
    assert torch.allclose(charges, -fair_scores(joint, lam, S), atol=1e-12)
    assert torch.allclose(_moves(joint, S, lam, 1 - eye(3)), charges - charges[:, :1], atol=1e-10)


def test_problems_are_of_all_kinds():
    "Certificates from tight to loose, straight and bent frontiers, mismatches and none: no check is passed by an answer for one kind only."
    slack = [_risk(joint, h) - _dual(joint, S, lam, xi) - _risk(joint, h) + least for joint, h, lam, S, xi, least in _trials()]
    assert min(slack) > -1e-8 and sum(x < 1e-8 for x in slack) >= 4 and sum(x > .01 for x in slack) >= 4
    bent = [true - proved for *_, proved, true in _halves()]
    assert min(bent) > -1e-8 and sum(x < 1e-9 for x in bent) >= 3 and sum(x > 1e-4 for x in bent) >= 3
    assert all((float((joint.mean(0) - mass).abs().max()) < 1e-12) == (k % 2 == 0) for k, (joint, mass) in enumerate(_mismatches()))
    for joint in _posterior(0, 20, 2, 3), _posterior(1, 20, 3, 2): assert all(torch.allclose(h.sum(1), torch.ones(20).double()) for h in _rules(joint))


def test_models_are_wrong_where_it_matters_and_records_are_few():
    for model, truth, a, y, h in _models():
        off = (group_confusion_matrices(model, h) - group_confusion_matrices(truth, h)).abs().max()
        records = (group_confusion_matrices(onehot(a * 3 + y, 9).reshape(-1, 3, 3), h) - group_confusion_matrices(truth, h)).abs().max()
        assert off > .03 > .01 > records and torch.allclose(model.sum((1, 2)), torch.ones(len(model)).double())


# --- the book: statements and solutions

test_solutions_pass = solved("ch05", IDS)
test_chapter_asks_every_exercise_once_and_links_to_its_solution = asked("ch05", IDS)
