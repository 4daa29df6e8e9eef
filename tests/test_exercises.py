"Every check takes its solution, rejects wrong answers with words that help, and never lets another exception escape."
import contextlib
import io
import re

import numpy as np
import pages
import pytest
import torch

from fairbook.exercises import _CHECKS, NotYet, check, exercise
from fairbook.fairness_layer import project_parity

IDS = sorted(id for id in _CHECKS if id.startswith("ch01."))
mean = lambda y, s, g: y[s == g].mean()
spread = lambda y, s: max(mean(y, s, g) for g in s.unique()) - min(mean(y, s, g) for g in s.unique())
free = lambda x: torch.full((len(x),), torch.inf, dtype=x.dtype)


# --- wrong answers: what a reader may well try, and words that the complaint must have

def rows_of(pairs, sign=1., tol=0., absent=False):
    "Four-fifths rows for chosen ordered pairs of group positions."
    def make(z, groups, y):
        ids = range(int(groups.max()) + 1) if absent else groups.unique()
        means = torch.stack([(groups == g) / (groups == g).sum().clamp(min=1) for g in ids]).to(z.dtype)
        rows = torch.stack([means[i] - .8 * means[j] for i in range(len(means)) for j in range(len(means)) if i != j and pairs(i, j)])
        return sign * rows, torch.zeros(len(rows), dtype=z.dtype) - tol, free(rows)
    return make


def rows_by_raw_order(z, groups, y):
    "Constrains only the groups that are highest and lowest before the projection."
    ids = groups.unique()
    means = torch.stack([(groups == g) / (groups == g).sum() for g in ids]).to(z.dtype)
    raw = means @ z
    row = means[raw.argmin()] - .8 * means[raw.argmax()]
    return row[None], torch.zeros(1, dtype=z.dtype), free(row[:1])


def rows_of_difference(z, groups, y):
    "A tolerance of 0.2 instead of a ratio."
    ids = groups.unique()
    means = torch.stack([(groups == g) / (groups == g).sum() for g in ids]).to(z.dtype)
    rows = (means[:, None] - means).flatten(0, 1)
    return rows, torch.full((len(rows),), -.2, dtype=z.dtype), free(rows)


def fits(y, z, s, tol): return spread(y, s) <= tol + 1e-8
def one_shift(y, z, s, tol): return all((y - z)[s == g].std(correction=0) < 1e-8 for g in s.unique())
def balanced(y, z, s, tol): return abs((y - z).sum()) < 1e-8
def tight(y, z, s, tol): return abs(spread(y, s) - tol) < 1e-8 or (y == z).all()
def same_order(y, z, s, tol): return len(s.unique()) > 2 or (mean(y, s, 1) - mean(y, s, 0)) * (mean(z, s, 1) - mean(z, s, 0)) >= 0
def judge(*conditions): return lambda *case: all(bool(c(*case)) for c in conditions)

product_plan = lambda a, b: a[:, None] * b / b.sum()
def circulate(a, b, size):
    plan = product_plan(a, b)
    plan[0, 0] += size; plan[1, 1] += size; plan[0, 1] -= size; plan[1, 0] -= size
    return plan


def by_rank(z, groups, move):
    "Shifts people of equal rank towards each other: `move(d)` for raw differences d."
    i, j = ((groups == g).nonzero().squeeze(-1) for g in (0, 1))
    i, j = i[z[i].argsort()], j[z[j].argsort()]
    y, d = z.clone(), z[i] - z[j]
    y[i] -= move(d) / 2
    y[j] += move(d) / 2
    return y


def geodesic(z, groups, tol):
    "Moves everybody the same fraction of the way to the common distribution."
    return by_rank(z, groups, lambda d: d * max(0., 1 - tol / d.abs().mean().item()))


def paired_by_index(z, groups, tol):
    "The right threshold for the wrong pairs: people are paired as they come, not by rank."
    i, j = ((groups == g).nonzero().squeeze(-1) for g in (0, 1))
    d = z[i] - z[j]
    top = d.abs().sort(descending=True).values.cumsum(0) - len(d) * tol
    move = d.clamp(-(t := (top / torch.arange(1, len(d) + 1)).max().clamp(min=0)), t) / 2
    y = z.clone()
    y[i], y[j] = z[i] - move, z[j] + move
    return y


LEVEL = lambda level, n0, n1: ([level] * (n0 + n1), [0] * n0 + [1] * n1)
WRONG = {
    "ch01.1": [
        (lambda n0, n1, gap, most: 0., "move"),
        (lambda n0, n1, gap, most: abs(gap), "smaller one"),
        (lambda n0, n1, gap, most: max(0., abs(gap) - 2 * most), "move"),                                  # as if the groups were equally large
        (lambda n0, n1, gap, most: max(0., abs(gap) - most * (n0 + n1) / min(n0, n1)), "move"),            # the large group's fear
        (lambda n0, n1, gap, most: max(0., abs(gap) - most), "smaller one"),
        (lambda n0, n1, gap, most: max(0., gap - most * (n0 + n1) / max(n0, n1)), "gap = -1.0"),           # forgets the sign
        (lambda n0, n1, gap, most: abs(gap) - most * (n0 + n1) / max(n0, n1), "at least 0"),
    ],
    "ch01.2": [
        (lambda *_: True, "accept"), (lambda *_: False, "refuse"),
        (judge(fits), "accept"),
        (judge(fits, balanced, tight), "shifted differently"),
        (judge(fits, one_shift, tight), "do not balance"),
        (judge(fits, one_shift, balanced), "closer together"),
        (judge(fits, one_shift, balanced, tight), "changed places"),
        (judge(fits, one_shift, balanced, tight, same_order), "already"),
        (lambda y, z, groups, tol: bool((y == project_parity(z, groups, 0.)).all()), "refuse"),
        (lambda y, z, groups, tol: "yes", "True or False"),
    ],
    "ch01.3": [
        ([LEVEL(0., 5, 1), LEVEL(1., 5, 1)], "pooled gap"),                       # equal shares
        ([LEVEL(0., 1, 4), LEVEL(1., 4, 1)], "0.6"),                              # right idea, too few
        ([LEVEL(0., 10, 0), LEVEL(1., 0, 10)], "both groups"),
        ([LEVEL(0., 1, 10), LEVEL(2., 10, 1)], "between 0 and 1"),
        ([LEVEL(0., 1, 99), LEVEL(1., 99, 1)], "at most 50"),
        ([LEVEL(0., 1, 19), ([1.] * 19 + [.5], [0] * 19 + [1])], "gap of its own"),
        ([LEVEL(0., 1, 19)], "two batches"),
        ([LEVEL(float("nan"), 1, 19), LEVEL(1., 19, 1)], "NaN"),
    ],
    "ch01.4": [
        (lambda a, b: (product_plan(a, b), product_plan(a, b)), "same"),
        (lambda a, b: (product_plan(a, b), 2 * product_plan(a, b)), "lifted"),
        (lambda a, b: (a[:, None] / len(b) + 0 * b, circulate(a, b, .01)), "lowered"),
        (lambda a, b: (product_plan(a, b), circulate(a, b, 1.)), "not negative"),
        (lambda a, b: (product_plan(a, b), circulate(a, b, 1e-8)), "same"),
        (lambda a, b: (product_plan(a, b).T, circulate(a, b, .01).T), "lifted"),
        (lambda a, b: product_plan(a, b)[None], "two tables"),
    ],
    "ch01.5": [
        (rows_of(lambda i, j: i < j), "allow"),                                   # one direction only
        (rows_of(lambda i, j: abs(i - j) == 1), "allow"),                         # neighbours only
        (rows_of(lambda i, j: True, sign=-1.), "forbid"),
        (rows_of(lambda i, j: True, absent=True), "groups = [0, 0, 0, 2, 2]"),    # an absent group constrains
        (rows_of(lambda i, j: True, tol=.05), "allow"),
        (rows_by_raw_order, "allow"), (rows_of_difference, "rule"),
        (lambda z, groups, y: (z[None] * float("nan"), torch.zeros(1), torch.ones(1)), "rule"),
    ],
    "ch01.6": [
        (lambda z, groups: torch.arange(len(z)), "at least 0.4"),
        (lambda z, groups: groups.argsort(stable=True), "at least 0.4"),          # one group first
        (lambda z, groups: z.argsort(), "at least 0.4"),
        (lambda z, groups: torch.zeros(len(z)), "permutation"),
        (lambda z, groups: (z * (1 - 2 * groups)).argsort(descending=True)[:1000], "2000"),
    ],
    "ch01.7": [
        (lambda z, groups, tol: z, "apart"),
        (lambda z, groups, tol: project_parity(z, groups, tol), "apart"),         # means only
        (lambda z, groups, tol: by_rank(z, groups, lambda d: d), "for nothing"),  # ignores the tolerance
        (geodesic, "not the nearest"),
        (paired_by_index, "for z"),
        (lambda z, groups, tol: by_rank(z, groups, lambda d: d - d.clamp(-tol, tol)), "for z"),
        (lambda z, groups, tol: z * 0 + z.mean(), "for z"),
    ],
    "ch01.8": [
        (lambda *_: [[0., 1.], [0., 1.]], "means of your groups"),                # a perfect predictor
        (lambda *_: [[.5, .5], [.5, .5]], "possible"),
        (lambda p0, p1, tol, odds: [[0., v := min(1, tol / max(abs(p1 - p0), 1e-9))], [0., v]] if p0 != p1 else [[0, 1], [0, 1]], "possible"),  # forgets odds_tol
        (lambda *_: [[0., 2.], [0., 2.]], "[0, 1]"),
        (lambda p0, p1, *_: [[0., 1.], [0., p0 / p1]] if p1 > p0 else [[0., p1 / p0], [0., 1.]], "given the label"),  # parity only
        (lambda *_: [[0., 0.], [0., float("nan")]], "NaN"),
    ],
}


def rejection(wrong):
    "The test that every answer of a table {id: [(answer, words)]} is rejected, with those words and nothing printed."
    cases = [pytest.param(id, *case, id=f"{id}-{k}") for id, answers in wrong.items() for k, case in enumerate(answers)]
    @pytest.mark.parametrize("id, answer, words", cases)
    def test(id, answer, words, capsys):
        with pytest.raises(NotYet) as error: check(id, answer)
        assert words in str(error.value), str(error.value)
        assert capsys.readouterr().out == ""
    return test


test_wrong_answers_are_rejected = rejection(WRONG)


def test_every_check_has_wrong_answers_that_it_must_reject():
    assert set(WRONG) == set(IDS) and min(map(len, WRONG.values())) >= 2


def raises(*args): raise ZeroDivisionError("in the answer")
JUNK = [0, 3.5, float("nan"), "yes", True, object(), [], (1, 2), (1, 2, 3, 4), [([], []), ([], [])], (None,) * 4, {"a": 1}, torch.ones(3), lambda: 0, raises, lambda *a: None, lambda *a: float("nan"), lambda *a: "yes",
        lambda *a: torch.tensor([]), lambda *a: [[[1.]]], lambda *a: a[0], lambda *a: (None, None), lambda *a: (a[0], a[0], a[0]), lambda *a: np.nan * np.ones((2, 2)), lambda *a: np.array([["x"]]),
        lambda *a: -torch.inf * torch.ones(2, 2)]


def complaint(ids, junk=()):
    "The test that junk, this chapter's own among it, gets a complaint and no other exception."
    @pytest.mark.parametrize("id", ids)
    def test(id):
        for answer in (*JUNK, *junk):
            with pytest.raises(NotYet): check(id, answer)
    return test


def silence(ids):
    "The test that an exercise without an answer says so."
    @pytest.mark.parametrize("id", ids)
    def test(id, capsys):
        assert check(id, None) is None
        assert capsys.readouterr().out == f"{id}: not answered yet\n"
    return test


test_junk_gets_a_complaint_and_no_other_exception = complaint(IDS)
test_unanswered = silence(IDS)


def test_the_readers_own_error_is_shown():
    with pytest.raises(NotYet, match="ZeroDivisionError: in the answer; for n0 = 1") as error: check("ch01.1", raises)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_answers_may_write_into_their_arguments():
    def careless(y, z, groups, tol):
        y.zero_(), z.zero_(), groups.zero_()
        return True
    with pytest.raises(NotYet, match=re.escape("z = [0.1, 0.3, 0.7, 0.9]")): check("ch01.2", careless)


# --- the register

@pytest.mark.parametrize("answer", [None, 1])
def test_unknown_id_lists_the_known_ones(answer):
    with pytest.raises(ValueError, match=r"ch01\.1, .*ch01\.8.*got 'ch01\.99'"): check("ch01.99", answer)


def test_ids_are_unique_but_a_cell_can_be_run_again(monkeypatch):
    monkeypatch.setattr("fairbook.exercises._CHECKS", {})
    def one(answer): raise NotYet("first")
    def two(answer): raise NotYet("second")
    exercise("ch00.1")(one)
    with pytest.raises(ValueError, match="'ch00.1' belongs to one"): exercise("ch00.1")(two)
    with pytest.raises(NotYet, match="first"): check("ch00.1", 0)
    two.__name__ = "one"
    exercise("ch00.1")(two)
    with pytest.raises(NotYet, match="second"): check("ch00.1", 0)


# --- the book: statements and solutions

source = lambda path: "\n".join(c.source for c in pages.read(path).cells if c.cell_type == "code")


def solved(chapter, ids):
    "The test that the code of the solutions runs, and every check of the chapter says correct."
    def test():
        path = pages.ROOT / f"nbs/solutions/{chapter}.ipynb"
        out, names, before = io.StringIO(), {}, torch.get_default_dtype()
        try:
            with contextlib.redirect_stdout(out): exec(compile(source(path), str(path), "exec"), names)
        finally: torch.set_default_dtype(before)
        assert list(dict.fromkeys(re.findall(r"^(\S+): correct$", out.getvalue(), re.M))) == ids and "not answered" not in out.getvalue()
        assert {f"exercise-{id.split('.')[1]}" for id in ids} <= {anchor for _, anchor in pages.headings(pages.read(path))}
    return test


def asked(chapter, ids):
    "The test that the chapter asks every exercise once, with a hint and a link to its solution."
    def test():
        parts = sorted((pages.ROOT / "nbs").glob(f"{chapter}_*.ipynb"))
        assert re.findall(r'^check\("([\w.]+)", answer_\d+\)$', "\n".join(map(source, parts)), re.M) == ids
        text = "\n".join(c.source for path in parts for c in pages.read(path).cells if c.cell_type == "markdown")
        for id in ids: assert f"(solutions/{chapter}.ipynb#exercise-{id.split('.')[1]})" in text
        assert text.count("<summary>Hint</summary>") == text.count("<summary>Solution</summary>") == len(ids)
    return test


test_solutions_pass = solved("ch01", IDS)
test_chapter_asks_every_exercise_once_and_links_to_its_solution = asked("ch01", IDS)
