"Reports on edits: effect, drift and problems of edits whose answer is known."
import math

import pytest
import torch

from fairbook.edit_reports import EditReport, report_edits

Y, S = torch.arange(2000) % 2, torch.arange(2000) // 2 % 2
read = lambda c, K=2: lambda e: torch.stack([-e[:, c], e[:, c]], 1)


def plane(dtype): return torch.stack([2. * Y - 1, 4. * S - 2], 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("move, effect, drift", [((2., 0.), 1., 0.), ((0., 0.), 0., 0.), ((-2., 0.), -1., 0.), ((6., 0.), 3., 0.), ((2., .8), 1., .2), ((2., 4.), 1., 1.)])
def test_known_moves(dtype, move, effect, drift):
    x = plane(dtype)
    r = report_edits(x, x + (1 - 2. * Y)[:, None].to(dtype) * torch.tensor(move, dtype=dtype), Y, 1 - Y, read(0), [read(1)])
    assert r.effect == pytest.approx(effect, abs=1e-5) and r.drift == pytest.approx(drift, abs=1e-5) and r.n == 2000
    assert r.flips == float(effect > .5) and bool(r.problem) == (not .5 <= effect <= 2 or drift > .25)


def test_several_classes_and_a_constant_in_the_logits():
    y = torch.arange(900) % 3
    x = torch.nn.functional.one_hot(y, 3).double()
    to = (y + 1) % 3
    r, shifted = (report_edits(x, torch.nn.functional.one_hot(to, 3).double(), y, to, reader) for reader in (lambda e: e, lambda e: e + 7 * e[:, :1] + 5))
    assert r.effect == pytest.approx(1) and shifted.effect == pytest.approx(1) and r.flips == 1


def test_a_reader_that_is_blind_gives_no_verdict():
    x = plane(torch.float64)
    r = report_edits(x, -x, Y, 1 - Y, lambda e: torch.zeros(len(e), 2).double(), [read(1)])
    assert math.isnan(r.effect) and not r.acts and "do nothing" in r.problem


def test_a_reader_of_others_that_sees_one_class_only_is_a_problem():
    x = plane(torch.float64)
    r = report_edits(x, x * torch.tensor([-1., 1.]), Y, 1 - Y, read(0), [lambda e: torch.tensor([[1., 0.]]).double().expand(len(e), 2)])
    assert math.isnan(r.drift) and r.problem


def test_limits_are_the_callers():
    x = plane(torch.float64)
    assert report_edits(x, x * torch.tensor([-1., 1.]), Y, 1 - Y, read(0), max_effect=.9).problem
    assert EditReport("label", 1., .2, 1., 50, max_drift=.1).problem.startswith("they drag")


def test_few_edits_are_no_evidence():
    assert "19 rows only" in EditReport("label", 1., 0., 1., 19).problem and not EditReport("label", 1., 0., 1., 20).problem and not EditReport("label", 1., 0., 1., 5, min_edits=5).problem


X = plane(torch.float64)
BAD = [(dict(after=X[:5]), "must have the same rows"), (dict(to=Y[:5]), "must have the same rows"), (dict(decided=Y + 1), "codes in 0 .. 1"), (dict(to=Y - 1), "codes in 0 .. 1"), (dict(min_effekt=.5), "no limit 'min_effekt'; it has min_effect, max_effect")]


@pytest.mark.parametrize("change, complaint", BAD, ids=[c + str(i) for i, (_, c) in enumerate(BAD)])
def test_bad_input_is_named(untyped, change, complaint):
    with pytest.raises(ValueError) as error: report_edits(**{"before": X, "after": -X, "decided": Y, "to": 1 - Y, "reader": read(0), **change})
    assert complaint in str(error.value)


def test_a_blind_reader_among_others_is_not_drowned():
    x = plane(torch.float64)
    blind = lambda e: torch.tensor([[1., 0.]]).double().expand(len(e), 2)
    for others in ([read(1), blind], [blind, read(1)]): assert math.isnan(report_edits(x, x * torch.tensor([-1., 1.]), Y, 1 - Y, read(0), others).drift)
