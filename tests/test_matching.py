"""Matching problems: what the records promise, margins, forbidden pairs against rules written a second time,
a loader that is given good and bad files, and the reference sample where it is present."""
import hashlib
import itertools
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairbook import matching
from fairbook.data import Dataset, data_folder, is_available
from fairbook.group_targets import nearest_target
from fairbook.group_transport import fair_sinkhorn
from fairbook.matching import (DATING_FEATURES, DATING_LEVELS, Matching, circle_matching, convergence_matching, dating_distances,
                               dating_matching, dating_table, gaussian_matching, law_school_matching, load_dating, match_table)

F64 = torch.float64
PAPER = torch.tensor([[.2, .3], [.28, .22]], dtype=F64)


def students(n=900, seed=0):
    "A made-up law school table: three tiers, two groups, scores that rise with the tier."
    rng = np.random.default_rng(seed)
    tier = rng.choice([2, 4, 5], n, p=[.5, .3, .2])
    table = pd.DataFrame(dict(lsat=rng.normal(30 + 2 * tier, 3), ugpa=rng.normal(3, .3, n), tier=tier.astype(float)))
    race = pd.DataFrame({"race": pd.Categorical(rng.choice(["Non-White", "White"], n, p=[.3, .7]))})
    return Dataset(table, pd.Series(np.ones(n, int), name="passed"), race, "made up", "a test", "free")


USERS = dating_table(6000, seed=3)
MADE = {
    "gaussians": lambda seed: gaussian_matching(seed=seed), "gaussians, large": lambda seed: gaussian_matching(80, 30, seed=seed),
    "circles": lambda seed: circle_matching(seed=seed), "circles, odd": lambda seed: circle_matching(51, 9, seed, flips=(0, 1)),
    "convergence": lambda seed: convergence_matching(60, 41, seed=seed), "dating": lambda seed: dating_matching(40, seed),
    "dating, order": lambda seed: dating_matching(40, seed, income_code="order"), "loaded": lambda seed: load_dating(USERS, 100, seed),
    "law": lambda seed: law_school_matching(200, 40, seed, data=students()),
    "law, selective": lambda seed: law_school_matching(200, 40, seed, seats="selective", target="observed", data=students())}


# --- every problem

@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_contract(make):
    m = make(1)
    n, k = len(m.X), len(m.Y)
    assert m.X.dtype == m.Y.dtype == m.C.dtype == m.F.dtype == m.a.dtype == F64 and m.s.dtype == m.w.dtype == torch.int64
    assert m.C.shape == (n, k) and m.s.shape == (n,) and m.w.shape == (k,) and len(m.columns) == m.X.shape[1] or m.name == "dating"
    assert (m.C >= 0).all() and not m.C.isnan().any()
    assert m.F.shape == (len(m.s_names), len(m.w_names)) == (len(m.p), len(m.q)) and (m.F >= 0).all()
    assert torch.allclose(m.p, m.s.bincount(minlength=len(m.p)).to(F64) / n) and torch.allclose(m.q, m.w.bincount(minlength=len(m.q)).to(F64) / k)
    assert torch.allclose(m.F.sum(1), m.p, atol=1e-11, rtol=0) and torch.allclose(m.F.sum(0), m.q, atol=1e-11, rtol=0)
    assert "\n" not in repr(m) and len(repr(m)) < 120 and m.source and m.licence


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_seeds(make):
    one, again, other = make(1), make(1), make(2)
    assert all(torch.equal(getattr(one, k), getattr(again, k)) for k in "XYswFC")
    assert not torch.equal(one.X, other.X)


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_to(make):
    m = make(1).to(torch.float32)
    assert all(getattr(m, k).dtype == torch.float32 for k in "XYC") and all(getattr(m, k).dtype == F64 for k in "Fabpq") and m.s.dtype == torch.int64
    assert torch.equal(m.C.isinf(), make(1).C.isinf()) and m.to("cpu").X.device.type == "cpu"
    back = pickle.loads(pickle.dumps(m))
    assert torch.equal(back.C, m.C) and back.s_names == m.s_names


def test_to_a_device():
    if not torch.cuda.is_available(): pytest.skip("no CUDA device")
    m = gaussian_matching().to("cuda", torch.float32)
    assert all(getattr(m, k).is_cuda for k in "XYFCabsw") and m.p.is_cuda and m.X.dtype == torch.float32 and m.a.dtype == F64


@pytest.mark.parametrize("make", [gaussian_matching, lambda: circle_matching(51, 9, flips=(0, 1)), lambda: convergence_matching(60, 41)], ids=["gaussians", "circles", "convergence"])
def test_a_float32_problem_can_be_handed_to_the_solver(make):
    m = make().to(torch.float32)
    out = fair_sinkhorn(m.C, m.s, m.w, m.F, 1., m.a, m.b)
    S, W = (torch.nn.functional.one_hot(g).double() for g in (m.s, m.w))
    assert bool(out.converged) and (S.T @ out.plan.double() @ W - m.F).abs().max() < 1e-5


def test_weights_of_float32_are_mended():
    a = torch.rand(250, generator=torch.Generator().manual_seed(0)) + .1
    m = Matching(torch.rand(250, 2), torch.rand(3, 2), torch.arange(250) % 2, W, a=a / a.sum())
    assert m.a.dtype == F64 and abs(m.a.sum() - 1) < 1e-14 and (m.a - a.double() / a.double().sum()).abs().max() < 1e-8
    kept = torch.tensor([.1, .2, .3, .4], dtype=F64)
    assert torch.equal(Matching(X, Y, S, W, a=kept).a, kept)


def test_frozen():
    with pytest.raises(AttributeError): gaussian_matching().F = PAPER


# --- the reference sample, and its law

def test_reference_sample():
    file = data_folder() / "transport/gaussians_250x25.npz"
    if not file.exists(): pytest.skip(f"{file.name} is not in the data folder")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == "7b32933b2ec7eb7c7ece2de175883444bcb2d8b233c6eca3a83245ae52589935"
    m = gaussian_matching()
    with np.load(file) as known:
        for k in "XYF": assert np.abs(known[k] - getattr(m, k).numpy()).max() < 1e-14, k     # up to the last digit of the C library's log
        for k in "sw": assert (known[k] == getattr(m, k).numpy()).all()


def test_reference_sample_by_heart():
    "A few of its numbers, for machines without the file."
    m = gaussian_matching()
    assert torch.allclose(m.X[[0, 3]], torch.tensor([[.09934283, -.02765286], [.31584256, .15348695]], dtype=F64), atol=5e-9, rtol=0)
    assert torch.allclose(m.Y[[0, 12]], torch.tensor([[1.18523551, 1.38188333], [2.34734817, .13902358]], dtype=F64), atol=5e-9, rtol=0)


def test_law_of_the_gaussians():
    students, schools = gaussian_matching(20_000, 2, scale=.5, seed=7), gaussian_matching(2, 20_000, scale=.5, seed=8)
    for points, groups, centres in (students.X, students.s, [[0, 0], [2, 0]]), (schools.Y, schools.w, [[1, 1], [2.5, .5]]):
        for g, centre in enumerate(centres):
            mine = points[groups == g]
            assert ((mine.mean(0) - torch.tensor(centre)).abs() < 5 * .5 / len(mine) ** .5).all()
            assert ((mine.std(0) - .5).abs() < 5 * .5 / (2 * len(mine)) ** .5).all()


@pytest.mark.parametrize("m, moved", [(25, False), (24, True), (100, True), (50, True), (75, True), (26, True)])
def test_target_fits_or_says_so(m, moved):
    problem = gaussian_matching(100, m)
    assert bool(problem.warnings) == moved and torch.allclose(problem.F, PAPER, atol=1e-13) != moved


@given(st.integers(2, 60), st.integers(2, 60), st.integers(0, 10))
@settings(max_examples=30)
def test_circles_flip_exactly(n, m, seed):
    flips = min(4, n - 1), min(2, m - 1)
    c = circle_matching(n, m, seed, flips, noise=.01, spread=.01)
    for points, groups, k in (c.X, c.s, flips[0]), (c.Y, c.w, flips[1]):
        assert ((points.norm(dim=1) < 1).long() != groups).sum() == k


# --- dating

def likes(one, other):
    "The rules of the paper's code as sentences, written without looking at the table in the library."
    (gender, orientation), (target, his) = one, other
    if orientation in ("Bisexual", "Pansexual"): return True
    if gender == "Male": return target == ("Female" if orientation == "Straight" else "Male")
    if gender == "Female": return target == ("Male" if orientation == "Straight" else "Female")
    own = {"Gay": "Male", "Lesbian": "Female"}.get(orientation)
    if gender == "Non-binary": return target in ({own, "Non-binary"} if own else {"Male", "Female", "Non-binary"})
    if orientation == "Straight": return target in ("Male", "Female", "Prefer Not to Say") or his == "Straight"
    if gender == "Prefer Not to Say": return his == orientation
    return target in (own, "Prefer Not to Say") or (target, his) == (gender, orientation)


def test_match_table():
    table = match_table()
    kinds = [tuple(k.split(", ")) for k in table.index]
    wanted = {(g, o) for g, o in itertools.product(("Male", "Female", "Non-binary", "Transgender", "Prefer Not to Say"), ("Straight", "Gay", "Lesbian", "Bisexual", "Pansexual"))}
    assert set(kinds) == wanted - {("Male", "Lesbian"), ("Female", "Gay")} and list(table.index) == list(table.columns)
    assert table.values.tolist() == [[likes(k, l) and likes(l, k) for l in kinds] for k in kinds]


@pytest.fixture
def sampled(monkeypatch):
    "A dating problem of 60 against 60, and the rows of the table that it was made from."
    kept, thin = [], matching._thin
    def spy(*args):
        kept.append(thin(*args))
        return kept[-1]
    monkeypatch.setattr(matching, "_thin", spy)
    return dating_matching(60, seed=5), kept[0]


def test_forbidden_pairs(sampled):
    "Pair by pair, from the gender and orientation of the people who ended up in the problem."
    m, rows = sampled
    people = list(zip(rows.gender, rows.sexual_orientation))
    for i, j in itertools.product(range(60), range(60)):
        one, other = people[i], people[60 + j]
        assert bool(m.C[i, j].isfinite()) == (likes(one, other) and likes(other, one))


def test_cost_by_hand(sampled):
    "The nine distances of the text, one pair at a time, in plain Python."
    m, rows = sampled
    rows, rank = rows.to_dict("records"), {c: DATING_LEVELS[c].index for c in ("income_bracket", "education_level")}
    def nine(x, y):
        both = len(set(x["interest_tags"].split(", ")) & set(y["interest_tags"].split(", ")))
        return [5 / both if both else 5, *(5 * (x[c] != y[c]) for c in ("location_type", "app_usage_time_label", "swipe_time_of_day")),
                *(abs(x[c] - y[c]) for c in ("likes_received", "bio_length", "emoji_usage_rate")),
                *(k * abs(rank[c](x[c]) - rank[c](y[c])) for k, c in ((20, "education_level"), (60, "income_bracket")))]
    D = np.array([[nine(x, y) for y in rows[60:]] for x in rows[:60]])
    D /= D.max()
    assert np.abs(D - dating_distances(m.X, m.Y).numpy()).max() < 1e-12 and D.shape[-1] == len(DATING_FEATURES)
    C = m.C.numpy()
    assert np.abs(D.sum(-1) - C)[np.isfinite(C)].max() < 1e-12
    assert [rows[i]["income_bracket"] for i in range(60)] == [m.s_names[k] for k in m.s]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 100))
@settings(max_examples=30)
def test_distances_are_symmetric_and_batched(n, m, seed):
    rng = np.random.default_rng(seed)
    X, Y = (torch.from_numpy(np.c_[rng.random((2 * k, 4)) < .5, rng.integers(0, 3, (2 * k, 3)), rng.normal(size=(2 * k, 5))].astype(float)).reshape(2, k, 12) for k in (n, m))
    D = dating_distances(X, Y)
    assert D.shape == (2, n, m, 9) and torch.allclose(D, dating_distances(Y, X).transpose(1, 2)) and torch.allclose(D[1], dating_distances(X[1], Y[1]))
    assert (D >= 0).all() and torch.allclose(D.amax((1, 2, 3)), torch.ones(2, dtype=F64))
    assert (dating_distances(X, X)[..., 1:].diagonal(dim1=1, dim2=2) == 0).all()


@pytest.mark.parametrize("n", [40, 100, 500])
def test_margins_of_the_dating_sample(n):
    m = dating_matching(n, seed=2)
    both = torch.cat([m.s, m.w]).bincount(minlength=7) / (2 * n)
    assert (both - matching._INCOME_SHARES).abs().max() <= 9 / (2 * n)          # nine cells, each off by less than one person
    education = torch.cat([m.X, m.Y])[:, m.columns.index("education")]
    school = (education / 20).long().bincount(minlength=9)[:5] / (2 * n)
    assert (school - matching._SCHOOLING / 229777).abs().max() <= 7 / (2 * n) + 1e-3


def test_table_has_independent_columns_and_right_labels():
    table = dating_table(30_000, seed=4)
    assert list(table) == list(matching._DATING_COLUMNS) and all(set(table[c]) == set(v) for c, v in DATING_LEVELS.items())
    for c, levels in DATING_LEVELS.items():
        if c == "app_usage_time_label": continue
        counts = table[c].value_counts()
        assert (((counts - len(table) / len(levels)) / (len(table) / len(levels)) ** .5).abs() < 5).all(), c
    tags = table.interest_tags.str.split(", ")
    assert (tags.map(lambda t: len(set(t))) == 3).all() and set(itertools.chain(*tags)) == set(matching._TAGS) and len(matching._TAGS) == 49
    assert table.groupby("swipe_right_label").swipe_right_ratio.min()[["Balanced", "Optimistic", "Swipe Maniac"]].tolist() == [.2, .4, .7]
    for c, top in dict(likes_received=200, bio_length=500, last_active_hour=23).items(): assert table[c].min() == 0 and table[c].max() == top


def test_round_trip(tmp_path):
    USERS.to_csv(tmp_path / "users.csv", index=False)
    one, two = load_dating(tmp_path / "users.csv", 80, seed=1), load_dating(str(tmp_path / "users.csv"), 80, seed=1)
    direct = load_dating(USERS, 80, seed=1)
    assert all(torch.equal(getattr(one, k), getattr(direct, k)) and torch.equal(getattr(one, k), getattr(two, k)) for k in "XYswFC")
    assert "do not re-publish" in one.licence


def test_only_the_columns_in_use_are_needed():
    lean = USERS.drop(columns=["match_outcome", "app_usage_time_min", "swipe_right_label", "mutual_matches"])
    assert torch.equal(load_dating(lean, 50).C, load_dating(USERS, 50).C)


def test_largest_sample_and_other_indexes():
    most = load_dating(USERS)
    assert len(most.X) == len(most.Y) > 200
    with pytest.raises(ValueError, match=f"can give {len(most.X)} people"): load_dating(USERS, len(most.X) + 1)
    assert torch.equal(load_dating(USERS.set_index(np.arange(6000) % 7), 50).C, load_dating(USERS, 50).C)


def test_income_code_changes_the_cost_and_nothing_else():
    rank, order = load_dating(USERS, 80), load_dating(USERS, 80, income_code="order")
    assert torch.equal(rank.s, order.s) and torch.equal(rank.F, order.F) and torch.equal(rank.C.isinf(), order.C.isinf()) and not torch.equal(rank.C, order.C)
    first = list(dict.fromkeys(USERS[(USERS.gender + ", " + USERS.sexual_orientation).isin(match_table().index)].income_bracket))
    assert (order.X[:, -1] / 60).tolist() == [first.index(order.s_names[k]) for k in order.s]
    assert (rank.X[:, -1] / 60).tolist() == rank.s.tolist()


# --- law school

def test_law_school_construction():
    data = students()
    m = law_school_matching(300, 50, seed=1, data=data)
    scores = data.features[["lsat", "ugpa"]]
    z = ((scores - scores.mean()) / scores.std(ddof=0)).assign(tier=data.features.tier)
    for k, (tier, rows) in enumerate(z.groupby("tier")):
        assert np.abs(m.Y[m.w == k].numpy() - rows[["lsat", "ugpa"]].mean().to_numpy()).max() < 1e-12 and m.w_names[k] == f"tier {int(tier)}"
        assert abs(int((m.w == k).sum()) - 50 * len(rows) / len(z)) < 1
    assert torch.allclose(m.F, torch.outer(m.p, m.q)) and torch.allclose(m.C[3, 7], (m.X[3] - m.Y[7]).square().sum())
    drawn = {tuple(r) for r in m.X.numpy().round(12)}
    assert drawn <= {tuple(r) for r in z[["lsat", "ugpa"]].to_numpy().round(12)} and len(drawn) == 300


def test_law_school_observed_target_and_selective_seats():
    data = students()
    everybody = law_school_matching(len(data), 90, target="observed", data=data)
    table = pd.crosstab(data.sensitive_features.race, data.features.tier).to_numpy() / len(data)
    seats_as_students = nearest_target(table, everybody.p, everybody.q)
    assert torch.allclose(everybody.F, seats_as_students, atol=1e-11) and (everybody.F - torch.from_numpy(table)).abs().max() < .02
    two = law_school_matching(200, 90, seats="selective", data=data)
    assert len(two.w_names) == 2 and abs(float(two.q[1]) - (data.features.tier > 2).mean()) < .02


@pytest.mark.skipif(not is_available("law_school"), reason="the law school file is not in the data folder")
def test_law_school_real():
    m = law_school_matching()
    assert m.X.shape == (1500, 2) and m.Y.shape == (300, 2) and m.s_names == ("Non-White", "White") and len(m.w_names) == 6
    assert abs(float(m.p[0]) - 3307 / 20798) < 4 * (.16 * .84 / 1500) ** .5 and len(m.warnings) == 4
    assert any("construction" in w for w in m.warnings) and "re-publish" in m.licence


# --- bad input

X, Y, S, W = torch.rand(4, 2), torch.rand(3, 2), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1])
NAN, INF = torch.tensor(float("nan")), torch.tensor(float("inf"))
RECORDS = {
    "NaN in X": (dict(X=X * NAN), "X must be"), "empty X": (dict(X=X[:0], s=S[:0]), "X must be"), "X of one dimension": (dict(X=X[:, 0]), "X must be"),
    "infinite Y": (dict(Y=Y * INF), "Y must be"), "short s": (dict(s=S[:3]), "s must hold"), "negative group": (dict(w=W - 1), "w must lie in 0 to 0"),
    "group without a name": (dict(s_names=("only",)), "s must lie in 0 to 0"), "columns differ": (dict(Y=torch.rand(3, 5)), "X and Y have 2 and 5 columns"),
    "cost turned": (dict(C=torch.rand(3, 4)), r"C must be \[4, 3\]"), "NaN in C": (dict(C=torch.full((4, 3), float("nan"))), "C holds NaN"),
    "-inf in C": (dict(C=torch.full((4, 3), -float("inf"))), "C holds NaN or -inf"),
    "nobody for a row": (dict(C=torch.tensor([[0., 0, 0]] * 3 + [[float("inf")] * 3])), r"rows \[3\] of X have no allowed pair"),
    "nobody for a column": (dict(C=torch.tensor([[0., 0, float("inf")]] * 4)), r"rows \[2\] of Y have no allowed pair"),
    "negative weight": (dict(a=torch.tensor([1., 1, -.5, -.5])), "a must hold 4 weights"), "weights of sum 2": (dict(b=torch.full((3,), 2 / 3)), "b must hold 3 weights"),
    "zero weight": (dict(a=torch.tensor([0., .5, .25, .25])), "a must hold 4 weights, all positive.*drop rows of weight 0"),
    "list for X": (dict(X=[[0., 1.]] * 4), "X must be a tensor, got list"), "numpy for s": (dict(s=S.numpy()), "s must be a tensor, got ndarray"),
    "list for a": (dict(a=[.25] * 4), "a must be a tensor"), "whole numbers for X": (dict(X=torch.ones(4, 2).long()), "X must be of a floating dtype"),
    "float groups": (dict(s=S.float()), "s must hold whole numbers, got torch.float32"), "boolean groups": (dict(w=W.bool()), "w must hold whole numbers"),
    "numpy for C": (dict(C=np.zeros((4, 3))), "C must be a tensor of a floating dtype, got ndarray"), "whole C": (dict(C=torch.zeros(4, 3).long()), "C must be a tensor of a floating dtype"),
    "list for F": (dict(F=[[.25, .25]] * 2), "F must be a tensor"), "infinite F": (dict(F=torch.ones(2, 2) * INF), r"F must be a tensor \[2, 2\] of finite"),
    "F too large": (dict(F=torch.rand(3, 2)), r"F must be a tensor \[2, 2\]"), "negative F": (dict(F=-torch.ones(2, 2)), "F must be")}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("wrong, message", RECORDS.values(), ids=RECORDS)
def test_bad_records(wrong, message):
    with pytest.raises(ValueError, match=message): Matching(**dict(X=X, Y=Y, s=S, w=W) | wrong)


ONE = torch.ones(2)
CALLS = {
    "half a student": (lambda: gaussian_matching(n=2.5), "n must be a whole number"), "one school": (lambda: gaussian_matching(m=1), "m must be a whole number"),
    "no noise": (lambda: gaussian_matching(scale=0.), "scale must be positive"), "NaN noise": (lambda: circle_matching(noise=float("nan")), "noise must be positive"),
    "too many flips": (lambda: circle_matching(10, 10, flips=(10, 0)), "flips must be fewer"), "one number of flips": (lambda: circle_matching(flips=3), "flips must be two whole numbers"), "three flips": (lambda: circle_matching(flips=(1, 1, 1)), "flips must be two"),
    "negative flips": (lambda: circle_matching(flips=(-1, 0)), "flips"),
    "no dimension": (lambda: convergence_matching(d=0), "d must be"), "empty table": (lambda: dating_table(0), "n must be"),
    "few people": (lambda: dating_matching(5), "n must be a whole number, at least 20"), "other code": (lambda: dating_matching(30, income_code="rang"), "income_code must be"),
    "integers": (lambda: gaussian_matching().to(torch.int64), "dtype must be a floating"),
    "distances, columns": (lambda: dating_distances(torch.ones(2, 9), torch.ones(2, 10)), "same columns"),
    "distances, too few": (lambda: dating_distances(torch.ones(2, 8), torch.ones(2, 8)), "at least one interest"),
    "missing column": (lambda: load_dating(USERS.drop(columns=["bio_length", "gender"])), r"lacks the columns \['gender', 'bio_length'\]"),
    "unknown level": (lambda: load_dating(USERS.replace({"education_level": {"PhD": "Ph.D."}})), "education_level holds"),
    "missing level": (lambda: load_dating(USERS.assign(gender=USERS.gender.where(USERS.index > 0))), "gender holds"),
    "text for a number": (lambda: load_dating(USERS.assign(bio_length="long")), "bio_length must hold finite"),
    "gap in a number": (lambda: load_dating(USERS.assign(likes_received=np.nan)), "likes_received must hold finite"),
    "no interests": (lambda: load_dating(USERS.assign(interest_tags=np.nan)), "interest_tags must hold text"),
    "nobody left": (lambda: load_dating(USERS[USERS.sexual_orientation == "Queer"]), "no row has a combination"),
    "no rows": (lambda: load_dating(USERS[:0]), "no row has a combination"),
    "a bracket without rows": (lambda: load_dating(USERS[USERS.income_bracket != "High"]), "income bracket or a wanted level of education has no rows"),
    "a level without rows": (lambda: load_dating(USERS[USERS.education_level != "Diploma"]), "income bracket or a wanted level of education has no rows"),
    "no advanced degree": (lambda: load_dating(USERS[~USERS.education_level.isin(DATING_LEVELS["education_level"][5:])]), "income bracket or a wanted level of education has no rows"),
    "too many people": (lambda: load_dating(USERS, 5000), "ask for fewer"), "nobody asked for": (lambda: load_dating(USERS, 0), "n must be"),
    "seats": (lambda: law_school_matching(seats="rank", data=students()), "seats must be"), "target": (lambda: law_school_matching(target="fair", data=students()), "target must be"),
    "more applicants than rows": (lambda: law_school_matching(5000, data=students()), "ask for fewer"), "no seat for a tier": (lambda: law_school_matching(50, 2, data=students()), "without a seat"),
    "data without tiers": (lambda: law_school_matching(5, 5, data=Dataset(students().features[["lsat"]], students().label, students().sensitive_features, "x", "y", "z")), r"lacks \['ugpa', 'tier'\]")}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("call, message", CALLS.values(), ids=CALLS)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message): call()
