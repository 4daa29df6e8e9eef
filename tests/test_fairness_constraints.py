"""Fairness constraints: the integer-defined law, every family against rates written by hand and against other people's metrics, conversions, ranks, bad input."""
import pickle

import numpy as np
import pytest
import torch
from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference
from hypothesis import given, settings
from hypothesis import strategies as st

from fairbook.fairness_constraints import constraint_values, fairness_constraints, group_confusion_matrices, make_finite_law
from fairbook.metrics import demographic_parity, equal_opportunity, equalized_odds

F64 = torch.float64
CRITERIA = ["dp", "eop", "eo"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
sizes = st.tuples(st.integers(1, 20), st.integers(1, 5), st.integers(2, 5))


def posterior(n, g, m, seed, dtype=F64):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(g * m), n).reshape(n, g, m)).to(dtype)


def rule(n, m, seed, dtype=F64): return torch.from_numpy(np.random.default_rng(seed + 99).dirichlet(np.ones(m), n)).to(dtype)


def rate(joint, h, w, a, i, j):
    "P(decision j | A=a, Y=i) by a loop over rows; None: not conditioned on it."
    top = bottom = 0.
    for x in range(len(joint)):
        p = sum(float(joint[x, b, c]) for b in range(joint.shape[1]) for c in range(joint.shape[2]) if a in (None, b) and i in (None, c))
        top, bottom = top + float(w[x]) * p * float(h[x, j]), bottom + float(w[x]) * p
    return top / bottom


def index(name):
    "The numbers in a label such as 'eo b=1 i=0 j=2'."
    return {k: int(v) for k, v in (part.split("=") for part in name.split()[1:])}


# --- the law

def test_law_by_heart():
    law = make_finite_law()
    counts = (law.probability * 2942).round().long()
    assert counts.sum() == 2942 and counts[0].tolist() == [[18, 12, 21], [18, 4, 9], [33, 11, 22]]
    assert counts.sum((0, 2)).tolist() == [951, 876, 1115] and counts.sum((0, 1)).tolist() == [1122, 771, 1049]
    assert (law.probability * 2942 - counts).abs().max() < 1e-11


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 6))
def test_law_of_any_size(n_x, g, m):
    law = make_finite_law(n_x, g, m)
    assert law.probability.shape == law.joint.shape == (n_x, g, m) and (law.probability > 0).all()
    assert torch.allclose(law.joint.sum((1, 2)), torch.ones(n_x, dtype=F64)) and torch.allclose(law.joint * law.weights[:, None, None], law.probability)


@pytest.mark.parametrize("size", [(0, 2, 2), (2, 0, 2), (2, 2, -1)])
def test_law_without_size(size):
    with pytest.raises(ValueError, match="at least 1"): make_finite_law(*size)


# --- the families

@pytest.mark.parametrize("convention", ["population", "pairwise"])
@pytest.mark.parametrize("criterion", CRITERIA)
@given(sizes, st.integers(0, 99))
@settings(max_examples=8)
def test_every_row_is_the_difference_that_its_name_says(criterion, convention, size, seed):
    joint, h = posterior(*size, seed), rule(size[0], size[2], seed)
    w = torch.from_numpy(np.random.default_rng(seed).uniform(.1, 2, size[0]))
    S = fairness_constraints(criterion, joint, convention=convention, weights=w)
    D = constraint_values(joint, h, S, w)
    assert len(D) == len(S) == len(S.names) == len(S.coefficients())
    for name, d in zip(S.names, D):
        k = index(name)
        i, j = k.get("i"), k.get("j", k.get("i"))
        left = rate(joint, h, w, k["b"] if "c" in k else None, i, j)
        assert abs(float(d) - (left - rate(joint, h, w, k.get("c", k["b"]), i, j))) < 1e-10, name


@given(sizes, st.integers(0, 99))
def test_constants_satisfy_everything(size, seed):
    joint = posterior(*size, seed)
    constant = torch.eye(size[2], dtype=F64)[[seed % size[2]] * size[0]]
    for convention in ("population", "pairwise"):
        D = constraint_values(joint, constant, fairness_constraints(CRITERIA, n_groups=size[1], n_classes=size[2], convention=convention))
        assert (D.abs() < 1e-12).all()


@pytest.mark.parametrize("criterion", CRITERIA)
@given(st.tuples(st.integers(1, 20), st.integers(2, 5), st.integers(2, 5)), st.integers(0, 99))
@settings(max_examples=20)
def test_conversion_lemma(criterion, size, seed):
    joint, h = posterior(*size, seed), rule(size[0], size[2], seed)
    pop, pair = (constraint_values(joint, h, fairness_constraints(criterion, joint, convention=c)).abs().max() for c in ("population", "pairwise"))
    assert pop <= pair + 1e-12 and pair <= 2 * pop + 1e-12


@given(st.integers(1, 20), st.integers(2, 4), st.integers(0, 99))
def test_two_groups_convert_exactly(n, m, seed):
    joint, h = posterior(n, 2, m, seed), rule(n, m, seed)
    mass = joint.mean(0)
    for criterion, share in (("dp", mass.sum(1)[:, None].expand(2, m)), ("eop", mass / mass.sum(0))):
        pop = constraint_values(joint, h, fairness_constraints(criterion, joint)).reshape(2, m).abs().amax(0)
        pair = constraint_values(joint, h, fairness_constraints(criterion, joint, convention="pairwise")).abs()
        assert torch.allclose(pop, (1 - share.amin(0)) * pair, atol=1e-12)


@pytest.mark.parametrize("convention", ["population", "pairwise"])
@pytest.mark.parametrize("g, m", [(1, 3), (2, 2), (2, 4), (3, 3), (4, 2), (5, 3)])
def test_ranks(g, m, convention):
    mass = make_finite_law(24, g, m).probability.sum(0)
    ranks = [fairness_constraints(c, n_groups=g, n_classes=m, convention=convention).rank(mass) for c in CRITERIA]
    assert ranks == [(g - 1) * (m - 1), (g - 1) * m, (g - 1) * m * (m - 1)]
    both = fairness_constraints(["dp", "eo"], n_groups=g, n_classes=m, convention=convention)
    assert both.rank(mass) <= ranks[0] + ranks[2] and both.bind(mass).rank() == both.rank(mass)


@pytest.mark.parametrize("convention", ["population", "pairwise"])
@pytest.mark.parametrize("g, m", [(2, 2), (3, 3), (2, 5), (5, 3), (4, 6)])
def test_rank_without_masses_is_that_of_most_masses(g, m, convention):
    "Parity follows from equalized odds where group and class are independent; otherwise it adds min(g - 1, m - 1) (m - 1) constraints."
    both = fairness_constraints(["dp", "eo"], n_groups=g, n_classes=m, convention=convention)
    odds = (g - 1) * m * (m - 1)
    mass = torch.from_numpy(np.random.default_rng(7).dirichlet(np.ones(g * m)).reshape(g, m))
    assert both.rank() == both.rank(mass) == odds + min(g - 1, m - 1) * (m - 1)
    assert both.rank(mass.sum(1, keepdim=True) * mass.sum(0)) == odds


def test_paper_matrices():
    law = make_finite_law()
    w, pi, joint_mass = law.probability.sum((0, 2)), law.probability.sum((0, 1)), law.probability.sum(0)
    dp, eop, eo = (fairness_constraints(c, law.joint, weights=law.weights) for c in CRITERIA)
    for k, name in enumerate(dp.names):
        column = torch.eye(3, dtype=F64)[index(name)["j"]].expand(3, 3)
        for a in range(3): assert torch.allclose(dp.matrices()[k, a], (w[a] - float(a == index(name)["b"])) * column, atol=1e-12)
    for S in eop, eo:
        for k, name in enumerate(S.names):
            b, i = index(name)["b"], index(name)["i"]
            j = index(name).get("j", i)
            for a in range(3):
                wanted = torch.zeros(3, 3, dtype=F64)
                wanted[i, j] = w[a] * (1 / pi[i] - float(a == b) / joint_mass[b, i])
                assert torch.allclose(S.matrices()[k, a], wanted, atol=1e-12)


def test_stacking_and_rows():
    law = make_finite_law()
    own = torch.randn(4, 3, 3, 3, dtype=F64)
    S = fairness_constraints(["eo", own, "dp"], law.joint, weights=law.weights)
    assert len(S) == 27 + 4 + 9 and S.rows("own") == slice(27, 31) == S.rows(1) and S.rows("dp") == slice(31, 40)
    assert torch.allclose(S.matrices()[S.rows("own")], own) and S.names[27] == "own 0"
    parts = [fairness_constraints(c, law.joint, weights=law.weights).coefficients() for c in ("eo", own, "dp")]
    assert torch.equal(S.coefficients(), torch.cat(parts))
    again = pickle.loads(pickle.dumps(S))
    assert torch.equal(again.coefficients(), S.coefficients()) and "K=40" in repr(S) and "not bound" not in repr(S)


@given(sizes, st.integers(0, 99))
def test_score_matrices_price_the_constraints(size, seed):
    joint, h = posterior(*size, seed), rule(size[0], size[2], seed)
    S = fairness_constraints(CRITERIA, joint)
    lam = torch.randn(len(S), dtype=F64)
    Q = group_confusion_matrices(joint, h)
    assert torch.isclose((S.score_matrices(lam) * Q).sum(), Q.diagonal(dim1=1, dim2=2).sum() - lam @ S.values(Q), atol=1e-10)


def test_gradients():
    joint, h, S = posterior(5, 2, 3, 0), rule(5, 3, 0), fairness_constraints("eo", n_groups=2, n_classes=3).bind(posterior(5, 2, 3, 1).mean(0))
    logits = torch.randn(5, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: constraint_values(joint, z.softmax(1), S), logits)
    assert torch.autograd.gradcheck(S.score_matrices, torch.randn(len(S), dtype=F64, requires_grad=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_dtypes_and_devices(dtype, device):
    joint, h = posterior(50, 3, 3, 0, dtype).to(device), rule(50, 3, 0, dtype).to(device)
    S = fairness_constraints(["dp", "eo"], joint)
    D = constraint_values(joint, h, S)
    assert D.dtype == F64 and D.device.type == device and S.mass.device.type == device
    assert torch.allclose(D.cpu(), constraint_values(posterior(50, 3, 3, 0), rule(50, 3, 0), fairness_constraints(["dp", "eo"], n_groups=3, n_classes=3)), atol=1e-5)


# --- other people's metrics

@given(st.integers(2, 4), st.integers(0, 999))
@settings(max_examples=20)
def test_samples_are_a_special_case(m, seed):
    rng = np.random.default_rng(seed)
    a, y, yhat = np.r_[np.arange(3).repeat(m), rng.integers(0, 3, 60)], np.r_[np.tile(np.arange(m), 3), rng.integers(0, m, 60)], rng.integers(0, m, 60 + 3 * m)
    joint = torch.zeros(len(a), 3, m, dtype=F64)
    joint[range(len(a)), a, y] = 1
    measured = lambda c, k: float(constraint_values(joint, torch.eye(m, dtype=F64)[yhat], fairness_constraints(c, joint, convention=k)).abs().max())
    for k in ("population", "pairwise"):
        assert abs(measured("dp", k) - float(demographic_parity(yhat, a, n_classes=m, convention=k))) < 1e-12
        assert abs(measured("eop", k) - float(equal_opportunity(y, yhat, a, positive=None, n_classes=m, convention=k))) < 1e-12
        assert abs(measured("eo", k) - float(equalized_odds(y, yhat, a, n_classes=m, convention=k))) < 1e-12
    if m == 2:
        assert abs(measured("dp", "pairwise") - demographic_parity_difference(y, yhat, sensitive_features=a)) < 1e-12
        assert abs(measured("eo", "pairwise") - equalized_odds_difference(y, yhat, sensitive_features=a)) < 1e-12


# --- bad input

J = posterior(6, 2, 3, 0)
H = rule(6, 3, 0)
BAD = {
    "sum": (lambda: fairness_constraints("dp", 2 * J), "sum to 1"), "negative": (lambda: fairness_constraints("dp", J - .5), ">= 0"),
    "nan": (lambda: fairness_constraints("dp", J / J.new_tensor([0., 1., 1.])), "NaN"), "nan only": (lambda: fairness_constraints("dp", J * float("nan")), "NaN"),
    "flat": (lambda: fairness_constraints("dp", J.flatten(1)), r"\[n, groups, classes\]"), "array": (lambda: fairness_constraints("dp", J.numpy()), "ndarray"),
    "integers": (lambda: fairness_constraints("dp", J.long()), "float tensor"), "no rows": (lambda: fairness_constraints("dp", J[:0]), r"\[0, 2, 3\]"),
    "unknown": (lambda: fairness_constraints("parity", J), "unknown criterion 'parity'"), "none": (lambda: fairness_constraints([], J), "empty"),
    "twice": (lambda: fairness_constraints(["dp", "dp"], J), "twice"), "convention": (lambda: fairness_constraints("dp", J, convention="ratio"), "convention"),
    "no size": (lambda: fairness_constraints("dp"), "n_groups and n_classes"), "size": (lambda: fairness_constraints("dp", J, n_groups=3), "agree"),
    "one class": (lambda: fairness_constraints("dp", n_groups=2, n_classes=1), "2 classes"), "own": (lambda: fairness_constraints(torch.ones(2, 3, 3), J), "own matrices"),
    "own size": (lambda: fairness_constraints(torch.ones(2, 3, 3, 3), J), "agree"), "own nan": (lambda: fairness_constraints(torch.full((2, 2, 3, 3), float("nan")), J), "finite"),
    "group": (lambda: fairness_constraints("dp", n_groups=2, n_classes=2).bind(torch.tensor([[.5, .5], [0., 0.]])), "group 1 has no mass"),
    "class": (lambda: fairness_constraints("dp", n_groups=2, n_classes=2).bind(torch.tensor([[.5, 0.], [.5, 0.]])), "class 1 has no mass"),
    "cell": (lambda: fairness_constraints("eo", n_groups=2, n_classes=2).bind(torch.tensor([[.5, 0.], [.2, .3]])), "group 0 has no mass in class 1"),
    "mass": (lambda: fairness_constraints("dp", n_groups=2, n_classes=2).bind(torch.tensor([[5., 1.], [.2, .3]])), "sum to 1"),
    "mass shape": (lambda: fairness_constraints("dp", n_groups=2, n_classes=2).bind(torch.tensor([.5, .5])), r"\[2, 2\]"),
    "not bound": (lambda: fairness_constraints("dp", n_groups=2, n_classes=3).coefficients(), "no normalisers"),
    "rows": (lambda: fairness_constraints("dp", J).rows("eo"), "no criterion 'eo'"), "rows 7": (lambda: fairness_constraints("dp", J).rows(7), "no criterion 7"),
    "h": (lambda: group_confusion_matrices(J, H[:, :2]), r"\[6, 3\]"), "h sum": (lambda: group_confusion_matrices(J, 2 * H), "distribution"),
    "h logits": (lambda: group_confusion_matrices(J, torch.tensor([[2., -1., 0.]] * 6)), "distribution"),
    "weights": (lambda: group_confusion_matrices(J, H, torch.ones(5)), "one entry per row"), "negative weights": (lambda: group_confusion_matrices(J, H, -torch.ones(6)), ">= 0"),
    "zero weights": (lambda: group_confusion_matrices(J, H, torch.zeros(6)), "not all 0")}


@pytest.mark.parametrize("act, message", BAD.values(), ids=BAD)
def test_bad_input(act, message, untyped):
    with pytest.raises(ValueError, match=message): act()


def test_an_absent_cell_does_not_matter_for_parity():
    S = fairness_constraints("dp", n_groups=2, n_classes=2).bind(torch.tensor([[.5, 0.], [.2, .3]]))
    assert S.coefficients().isfinite().all()
