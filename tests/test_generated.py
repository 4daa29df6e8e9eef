"""Generated sets against their truth, and look-alikes that go through the loaders of the tables they imitate."""
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from fairbook import generated
from fairbook.data import load_employees, load_sba
from fairbook.generated import BIASED_REGRESSION_SETTINGS

MAKERS = {
    "gaussians": lambda seed: generated.make_gaussians(200, seed=seed), "circles": lambda seed: generated.make_circles(200, seed=seed),
    "biased_regression": lambda seed: generated.make_biased_regression(n=200, d=40, seed=seed),
    "employees": lambda seed: generated.make_employees(200, seed=seed), "loans": lambda seed: generated.make_loans(200, seed=seed),
}


@pytest.mark.parametrize("name", MAKERS)
def test_generated_sets_are_functions_of_the_seed(name):
    one, same, other = MAKERS[name](1), MAKERS[name](1), MAKERS[name](2)
    assert one.name == name and len(one) == 200 and one.settings["seed"] == 1
    assert one.features.equals(same.features) and one.label.equals(same.label) and one.truth.equals(same.truth)
    assert not one.features.equals(other.features) and one.truth is not None


@pytest.mark.parametrize("name", MAKERS)
def test_generated_sets_leave_the_global_random_state_alone(name):
    np.random.seed(3), torch.manual_seed(3)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    MAKERS[name](0)
    assert np.array_equal(before[0], np.random.get_state()[1]) and torch.equal(before[1], torch.get_rng_state())


def test_generated_sets_do_not_depend_on_the_hash_seed():
    import subprocess
    import sys
    code = "from fairbook.generated import *; print(make_employees(50).encoded().sum().sum(), make_loans(50).encoded().sum().sum())"
    out = {subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": s}, capture_output=True, text=True, check=True).stdout for s in "12"}
    assert len(out) == 1 and out.pop().strip()


@given(st.integers(10, 500), st.floats(.1, .9), st.sampled_from([generated.make_gaussians, generated.make_circles, lambda **k: generated.make_biased_regression(d=20, **k)]))
def test_group_sizes_are_exact(n, minority, make):
    ones = round(minority * n)
    assert make(n=n, minority=minority).base_rates().rows.tolist() == [n - ones, ones]


@pytest.mark.parametrize("maker, columns", [(lambda: generated.make_gaussians(100_000, .2, seed=5), ["score", "score_blind"]), (lambda: generated.make_circles(100_000, .3, 2.), ["score"]),
                                            (lambda: generated.make_loans(100_000), ["score"])])
def test_scores_are_calibrated(maker, columns):
    ds = maker()
    for column in columns:
        score = ds.truth[column]
        bins = (score * 20).astype(int)
        counts = bins.groupby(bins).size()
        gap = (score - ds.label).groupby(bins).mean()
        assert (gap.abs() <= 4.5 * .5 / np.sqrt(counts)).all()  # 4.5 standard errors, in every bin


def test_gaussians_blind_score_is_the_marginal_of_the_density():
    "Oracle: Bayes' rule summed over the four (label, group) cells, with scipy's densities."
    from scipy.stats import multivariate_normal as normal
    ds = generated.make_gaussians(400, minority=.25, rates=(.2, .7), separation=1.5, shift=.8)
    x = ds.features.to_numpy()
    joint = lambda y, s: (.25, .75)[s == 0] * (lambda r: r if y else 1 - r)((.2, .7)[s]) * normal([.75 * (2 * y - 1), .4 * (2 * s - 1)]).pdf(x)
    blind = (joint(1, 0) + joint(1, 1)) / sum(joint(y, s) for y in (0, 1) for s in (0, 1))
    assert np.allclose(ds.truth.score_blind, blind, atol=1e-12)
    group = ds.groups()[0].numpy()
    aware = np.where(group == 1, joint(1, 1) / (joint(1, 1) + joint(0, 1)), joint(1, 0) / (joint(1, 0) + joint(0, 0)))
    assert np.allclose(ds.truth.score, aware, atol=1e-12)


def test_knowing_the_group_ranks_better():
    ds = generated.make_gaussians(20_000, shift=.5)
    assert roc_auc_score(ds.label, ds.truth.score) > roc_auc_score(ds.label, ds.truth.score_blind)


def test_circles_radii():
    ds = generated.make_circles(5000, noise=.01)
    radius = np.linalg.norm(ds.features, axis=1)
    group = ds.groups()[0].numpy()
    assert abs(radius[group == 1].mean() - .5) < .01 and abs(radius[group == 0].mean() - 1) < .01


@pytest.mark.parametrize("i", range(32))
def test_the_32_settings(i):
    setting = BIASED_REGRESSION_SETTINGS[i]
    ds = generated.make_biased_regression(**setting, n=2000, d=60, seed=i)
    group = ds.groups()[0].numpy()
    assert ds.features.shape == (2000, 61) and np.array_equal(ds.features.group, group) and (group == 1).mean() == setting["minority"]
    assert ds.settings["bounds"] == {"loose": (-3.5, 3.5), "tight": (0., 3.5)}[setting["box"]]
    # undo the last two steps: .85 for group 0, one common scale; what is left is score + bias + noise
    value = lambda column, g: column / np.where(g == 0, .85, 1.)
    flip = value(ds.truth.noise_free, group) - value(ds.truth.other_group, 1 - group)
    scale = 2 * setting["effect"] / np.abs(flip)
    assert np.allclose(scale, scale.iloc[0]) and ((flip > 0) == (group == 1)).all()
    noise = value(ds.label - ds.truth.noise_free, group) * scale
    assert abs(noise.std() / setting["noise"] - 1) < .1 and abs(noise.mean()) < .1
    assert abs(value(ds.label, group).mean()) < 1e-9 and abs(value(ds.label, group).std(ddof=0) - 1) < 1e-9


@pytest.mark.parametrize("nonlinear", [False, True])
def test_the_score_is_linear_or_not(nonlinear):
    ds = generated.make_biased_regression(noise=1e-9, nonlinear=nonlinear, n=3000, d=40, minority=.5)
    group = ds.groups()[0].numpy()
    target = ds.truth.noise_free / np.where(group == 0, .85, 1.)
    design = np.column_stack([ds.features, np.ones(3000)])
    _, residual, *_ = np.linalg.lstsq(design, target, rcond=None)
    assert (residual[0] < 1e-12) == (not nonlinear)


def test_features_of_the_family_do_not_know_the_group():
    ds = generated.make_biased_regression(minority=.5, n=20_000, d=40)
    x, group = ds.features.drop(columns="group").to_numpy(), ds.groups()[0].numpy()
    gap = x[group == 1].mean(0) - x[group == 0].mean(0)
    assert np.abs(gap).max() < 5 * 2 / np.sqrt(20_000)
    assert np.allclose(x.mean(0), 0, atol=1e-9) and np.allclose(x.std(0), 1, atol=1e-9)


def test_paper_size():
    ds = generated.make_biased_regression()
    assert ds.features.shape == (40_000, 151) and ds.tensors()[0].dtype == torch.get_default_dtype()


@pytest.mark.parametrize("seed", range(5))
def test_employee_counts(seed):
    ds = generated.make_employees(seed=seed)
    assert {c: int(ds.groups(c)[0].sum()) for c in ds.sensitive_features} == {"age": 140, "manager": 221, "sex": 725, "degree": 100, "marital": 548}
    assert ds.encoded().shape == (1200, 63) and ds.label.between(0, 1).all() and "EmpNumber" not in ds.features
    assert abs(ds.label.mean() - .5) < .04
    fit = np.linalg.lstsq(np.column_stack([ds.encoded(), np.ones(1200)]), ds.label, rcond=None)[0]
    mse = ((np.column_stack([ds.encoded(), np.ones(1200)]) @ fit - ds.label)**2).mean()
    assert mse > .9 * ds.label.var()  # 63 columns of noise explain about 1/20 of it


@given(st.integers(12, 400))
def test_employee_shares_at_any_size(n):
    ds = generated.make_employees(n)
    counts = dict(age=140, manager=221, sex=725, degree=100, marital=548)
    assert all(int(ds.groups(c)[0].sum()) == round(n * k / 1200) > 0 for c, k in counts.items())
    f = ds.features
    assert (f.ExperienceYearsAtThisCompany <= f.TotalWorkExperienceInYears).all() and (f.TotalWorkExperienceInYears <= f.Age - 18).all()


def test_employees_round_trip(tmp_path):
    table, made = generated._employee_table(300, 4), generated.make_employees(300, seed=4)
    table.assign(EmpNumber="E1", Name="A PERSON").to_csv(tmp_path / "e.csv", index=False)
    loaded = load_employees(tmp_path / "e.csv")
    assert loaded.encoded().equals(made.encoded()) and loaded.label.equals(made.label) and loaded.truth is None
    assert loaded.groups()[0].equal(made.groups()[0]) and "none stated" in loaded.licence
    assert "quoted" in loaded.warnings[0] and "quoted" not in made.warnings[0]  # of the original it is hearsay, of the look-alike a fact


def test_sba_round_trip(tmp_path):
    table, made = generated._loan_table(300, 4)[0], generated.make_loans(300, seed=4)
    table.assign(Name="A BUSINESS", ChgOffDate="1-Jan-10").to_csv(tmp_path / "s.csv", index=False)
    loaded = load_sba(str(tmp_path / "s.csv"))
    assert loaded.encoded().equals(made.encoded()) and loaded.label.equals(made.label) and loaded.truth is None
    assert loaded.groups()[0].equal(made.groups()[0]) and loaded.name == "sba" and made.name == "loans"
    assert all(any("Recession" in w for w in ds.warnings) for ds in (loaded, made))


BAD = [
    (generated.make_gaussians, dict(n=0), "n must"), (generated.make_gaussians, dict(n=2.5), "n must be a whole number.*2.5"),
    (generated.make_gaussians, dict(n=float("nan")), "n must"), (generated.make_circles, dict(n=20.), "n must"),
    (generated.make_gaussians, dict(minority=0.), "minority"), (generated.make_gaussians, dict(minority=1.), "minority"),
    (generated.make_gaussians, dict(n=5, minority=.01), "minority"), (generated.make_gaussians, dict(minority=float("nan")), "minority"),
    (generated.make_gaussians, dict(rates=(0., .5)), "rates"), (generated.make_gaussians, dict(rates=(.5, float("nan"))), "rates"),
    (generated.make_gaussians, dict(separation=0.), "separation"), (generated.make_gaussians, dict(shift=float("inf")), "shift"),
    (generated.make_circles, dict(n=1), "n must"), (generated.make_circles, dict(effect=-1.), "effect"), (generated.make_circles, dict(noise=0.), "noise"),
    (generated.make_biased_regression, dict(box="wide"), "box.*'wide'"), (generated.make_biased_regression, dict(d=10), "d must"),
    (generated.make_biased_regression, dict(d=40.5), "d must"), (generated.make_biased_regression, dict(n=99.5), "n must"),
    (generated.make_biased_regression, dict(effect=0.), "effect"), (generated.make_biased_regression, dict(noise=float("nan")), "noise"),
    (generated.make_biased_regression, dict(minority=-.2), "minority"), (generated.make_employees, dict(n=11), "n must"),
    (generated.make_employees, dict(n=20.5), "n must"), (generated.make_loans, dict(n=1), "n must"), (generated.make_loans, dict(n=2.5), "n must"),
]


@pytest.mark.parametrize("call, arguments, message", BAD)
def test_bad_arguments(call, arguments, message, untyped):
    with pytest.raises(ValueError, match=message): call(**arguments)


def test_sizes_may_be_numpy_integers(untyped): assert len(generated.make_gaussians(np.int64(20))) == 20
