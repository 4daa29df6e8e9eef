"The closed-form split: its four properties, widths, several attributes, bad input."
import pytest
import torch
from concept_erasure import LeaceEraser
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression

from fairbook.latent_split import WhiteningSplit, whitening_split


def sample(n=600, d=8, n_labels=2, n_groups=2, seed=0, dtype=torch.float64):
    "Latents whose means and spreads depend on dependent labels and groups."
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(n_labels, (n,), generator=g)
    s = torch.where(torch.rand(n, generator=g) < .6, y % n_groups, torch.randint(n_groups, (n,), generator=g))
    E = torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)
    E = E + 2 * torch.randn(n_labels, d, generator=g, dtype=torch.float64)[y] + 2 * torch.randn(n_groups, d, generator=g, dtype=torch.float64)[s]
    return E.to(dtype), y, s


def gap_of_means(Z, y, s):
    "Largest difference between groups of a mean, given the label."
    means = lambda k: torch.stack([Z[(y == k) & (s == a)].mean(0) for a in s.unique()])
    return max((m.amax(0) - m.amin(0)).max().item() for m in map(means, y.unique()))


def even_covariance(Z, y, s):
    "Covariance in which every cell weighs the same."
    cells = [Z[(y == k) & (s == a)] for k in y.unique() for a in s.unique()]
    mean = torch.stack([c.mean(0) for c in cells]).mean(0)
    return torch.stack([(c - mean).T @ (c - mean) / len(c) for c in cells]).mean(0)


def test_one_block_for_the_attribute_holds_the_direction_of_the_groups():
    "With few dimensions the largest contrasts come first: nothing large is left to the rest."
    for seed in range(6):
        E, y, s = sample(600, 8, seed=seed)
        Z = whitening_split(E, y, s, n_sensitive_dims=1).transform(E)
        gaps = [gap_of_means(Z[:, c], y, s) for c in (slice(0, 1), slice(1, 2), slice(2, None))]
        assert gaps[0] < 1e-9 and gaps[1] > 2 * gaps[2]


def test_moving_the_label_leaves_the_attribute_where_cells_are_even():
    "In the plane: label and attribute in coordinates of their own, dependent. The split's label axis is that of the label."
    g = torch.Generator().manual_seed(0)
    y = torch.randint(2, (20_000,), generator=g)
    s = torch.where(torch.rand(20_000, generator=g) < .9, y, 1 - y)
    E = torch.randn(20_000, 4, generator=g, dtype=torch.float64) * .5
    E[:, 0] += 2. * y
    E[:, 1] += 2. * s
    axis = whitening_split(E, y, s).inverse[:, 0]
    assert axis[1].abs() < .03 * axis[0].abs()


@given(st.integers(2, 4), st.integers(2, 3), st.integers(0, 10_000))
def test_whitened_means_agree_and_nothing_is_lost(K, G, seed):
    E, y, s = sample(400, 4 + K * G, K, G, seed)
    split = whitening_split(E, y, s)
    Z = split.transform(E)
    assert split.widths == (K - 1, E.shape[1] - K + 1, 0)
    assert (even_covariance(Z, y, s) - torch.eye(E.shape[1])).abs().max() < 1e-9
    assert gap_of_means(Z[:, :K - 1], y, s) < 1e-9 and gap_of_means(Z, y, s) > .1
    assert (split.inverse_transform(Z) - E).abs().max() < 1e-9 * E.abs().max()
    assert (split.matrix @ split.inverse - torch.eye(E.shape[1])).abs().max() < 1e-9


@pytest.mark.parametrize("width", [1, 2, 5, 6])
def test_no_linear_reader_finds_the_group_at_a_given_label(width):
    E, y, s = sample()
    Z = whitening_split(E, y, s, width).transform(E)[:, :width]
    for k in (0, 1): assert LinearRegression().fit(Z[y == k], s[y == k].double()).score(Z[y == k], s[y == k].double()) < 1e-12


def test_labels_are_as_far_apart_as_in_the_eraser_of_others():
    "LEACE given the label leaves at most as much between the labels, in whitened units along one direction."
    E, y, s = sample(2000)
    z = whitening_split(E, y, s).transform(E)[:, 0]
    ours = (z[y == 1].mean() - z[y == 0].mean()).abs()
    ym, sm = (torch.stack([v[y == k].mean(0) for k in (0, 1)])[y] for v in (E, s.double()))
    eraser = LeaceEraser.fit(E - ym, s.double() - sm)
    erased = (E - E.mean(0)) @ eraser.P.T
    w = torch.linalg.pinv(torch.cov(erased.T)) @ (erased[y == 1].mean(0) - erased[y == 0].mean(0))
    read = erased @ w / (erased @ w).std()
    theirs = (read[y == 1].mean() - read[y == 0].mean()).abs()
    assert gap_of_means((erased @ w)[:, None], y, s) < .15 and ours > .8 * theirs


def test_a_block_for_each_attribute_holds_what_it_changes_alone():
    E, y, s = sample(3000, 14)
    t = torch.randint(3, (3000,), generator=torch.Generator().manual_seed(5))
    E = E + 3 * torch.randn(3, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(6))[t]
    split = whitening_split(E, y, torch.stack([s, t], 1), n_sensitive_dims=(1, 2))
    Z = split.transform(E)
    assert split.widths == (1, 1, 2, 10)
    spread = lambda v, c: torch.stack([Z[v == a].mean(0) for a in v.unique()]).var(0)[c].sum()
    assert spread(t, slice(2, 4)) > 5 * spread(t, slice(4, None)) and spread(t, slice(0, 1)) < .02


def test_values_may_be_words_and_follow_device_and_format():
    E, y, s = sample(dtype=torch.float32)
    words = ["no" if k == 0 else "yes" for k in y]
    a, b = whitening_split(E, y, s), whitening_split(E, words, s.numpy())
    assert torch.equal(a.matrix, b.matrix) and a.matrix.dtype == torch.float64 and a.matrix.is_contiguous()
    assert a.transform(E).dtype == torch.float32 and (a.inverse_transform(a.transform(E)) - E).abs().max() < 1e-4


E, Y, S = sample(60)
MISSING = torch.where((Y == 1) & (S == 0), 0, Y)
BAD = [
    (dict(E=E[:, 0]), "must be a floating-point tensor of latents"),
    (dict(E=E.long()), "must be a floating-point tensor of latents"),
    (dict(E=E.where(torch.arange(60)[:, None] != 7, torch.nan)), "NaN or infinity in 1 rows, first in row 7"),
    (dict(y=Y[:50]), "y has 50 rows, but there are 60"),
    (dict(y=[None] + ["a", "b"] * 29 + ["a"]), "y has missing values in 1 rows"),
    (dict(y=torch.zeros(60, dtype=torch.long)), "at least two labels and two groups, got 1 and 2"),
    (dict(sensitive_features=torch.zeros(60, dtype=torch.long)), "at least two labels and two groups, got 2 and 1"),
    (dict(y=MISSING), "label 1 with group 0 (0 rows)"),
    (dict(E=E.half()), "must be float32 or float64, got torch.float16"),
    (dict(y=torch.stack([Y, Y], 1)), "y must be one value for each row, got 2 columns"),
    (dict(n_label_dims=1.), "widths of blocks must be whole numbers"),
    (dict(n_label_dims=0), "do not fit"),
    (dict(n_label_dims=8), "do not fit"),
    (dict(n_label_dims=7), "at most 6 of 8 dimensions are left for the label"),
    (dict(n_sensitive_dims=8), "do not fit"),
    (dict(n_sensitive_dims=(2, 2)), "one width for each of the 1 attributes"),
    (dict(E=torch.cat([E[:, :7], E[:, :1]], 1)), "varies in only 7 of 8 directions"),
]


@pytest.mark.parametrize("change, complaint", BAD, ids=[c for _, c in BAD])
def test_bad_input_is_named(untyped, change, complaint):
    with pytest.raises(ValueError) as error: whitening_split(**{"E": E, "y": Y, "sensitive_features": S, **change})
    assert complaint in str(error.value)


def test_result_is_frozen():
    split = whitening_split(E, Y, S)
    assert isinstance(split, WhiteningSplit)
    with pytest.raises(AttributeError): split.widths = (2, 6, 0)
