"Fair latents: losses, floors, the network, its edits, its files."
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from fairlearn.metrics import MetricFrame
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.utils.validation import check_is_fitted

from fairbook.fair_latent import (
    EditReport, FairLatent, UntrustedEdit, diagonal_loss, dp_floor, edit_gate, equal_variance_loss, gaussian_loss, load_fair_latent, odds_gap, pair_loss, pull_floor,
    save_fair_latent, whitening_split)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def sample(n=2000, d=6, seed=0, n_labels=2, n_groups=2, agree=.8):
    "Bent latents: label and group in noisy coordinates of their own, mixed, with a curve."
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(n_labels, (n,), generator=g)
    s = torch.where(torch.rand(n, generator=g) < agree, y % n_groups, torch.randint(n_groups, (n,), generator=g))
    x = torch.randn(n, d, generator=g)
    x[:, 0] = x[:, 0] + 2. * y
    x[:, 1] = .4 * x[:, 1] + 2. * s + .2 * x[:, 0]**2
    return x @ torch.linalg.qr(torch.randn(d, d, generator=g))[0], y, s


@pytest.fixture(scope="module")
def fitted():
    E, y, s = sample()
    return FairLatent(n_steps=150, random_state=0).fit(E, y, sensitive_features=s), E, y, s


# --- losses and floors

@given(st.integers(2, 6), st.floats(.1, 5), st.integers(0, 1000))
def test_both_losses_vanish_on_multiples_of_the_identity_and_only_there(d, c, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(60, d, dtype=torch.float64, generator=g)
    white = c * (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    assert diagonal_loss(white) < 1e-18 * c**4 + 1e-20 and equal_variance_loss(white) < 1e-18 * c**4 + 1e-20
    assert diagonal_loss(x) + equal_variance_loss(x) > 1e-6
    C = torch.cov(x.T)
    bound = torch.stack([C.det(), C.diagonal().prod(), (C.trace() / d)**d])
    assert (bound.diff() > 0).all()                                                    # Hadamard, and the means


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_are_differentiable(dtype):
    z = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    target, partner = torch.arange(12) % 3, (torch.arange(12) + 6) % 12
    for f in (diagonal_loss, equal_variance_loss, lambda v: pair_loss(v, target, partner), lambda v: gaussian_loss(v, v.sum(1))): assert torch.autograd.gradcheck(f, (z,))
    assert all(f(z.detach().to(dtype)).dtype == dtype for f in (diagonal_loss, equal_variance_loss))


def test_gaussian_loss_is_the_likelihood():
    z, log_det = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    log_p = torch.tensor(stats.norm.logpdf(z.numpy()).sum(1)) + log_det
    assert gaussian_loss(z, log_det) == pytest.approx(-(log_p.mean() / 4 + .5 * math.log(2 * math.pi)).item())


@given(st.integers(1, 6), st.integers(2, 4), st.integers(0, 1000))
def test_theorem_1_no_data_below_the_floor(d, K, seed):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(K, 2, 25, d, dtype=torch.float64, generator=g) * (1 + torch.rand(K, 2, 1, d, generator=g)) + 3 * torch.randn(K, 2, 1, d, generator=g)
    flat = z.reshape(-1, d) - z.mean((0, 1, 2))
    z = (flat @ torch.linalg.inv(torch.linalg.cholesky(flat.T @ flat / len(flat))).T).reshape(z.shape)
    assert ((z[:, 0, :, None] - z[:, 1, None])**2).mean() >= pull_floor(d, K) - 1e-9


def test_pair_loss_never_shows_more_than_log_n():
    "log N - L <= log N for N candidates, however good the code; here it comes close."
    z = 50. * torch.nn.functional.one_hot(torch.arange(64) // 2 % 2, 2).double()
    target, partner = torch.arange(64) // 2 % 2, (torch.arange(64) + 4) % 64
    assert 0 <= pair_loss(z, target, partner) < 1e-12


@given(st.lists(st.floats(.01, .99), min_size=4, max_size=4))
def test_theorem_2_for_two_labels(p):
    r0, r1, b0, b1 = p
    rates, base = torch.tensor([[1 - r0, r0], [1 - r1, r1]], dtype=torch.float64), torch.tensor([[1 - b0, b0], [1 - b1, b1]], dtype=torch.float64)
    assert dp_floor(rates, base) == pytest.approx(abs(r1 - r0) * abs(b1 - b0), abs=1e-12)


def test_theorem_2_on_a_law_with_three_labels():
    g = torch.Generator().manual_seed(0)
    rates, base = (torch.rand(*shape, generator=g, dtype=torch.float64) for shape in ((3, 3), (4, 3)))
    rates, base = rates / rates.sum(1, keepdim=True), base / base.sum(1, keepdim=True)
    joint = base[:, :, None] * rates[None]                                             # P(y, decision | group): independent given y
    by_group = joint.sum(1)
    assert dp_floor(rates, base) == pytest.approx((by_group.amax(0) - by_group.amin(0)).max().item())


def test_odds_gap_is_that_of_fairlearn():
    g = torch.Generator().manual_seed(0)
    y, p, s = (torch.randint(k, (900,), generator=g) for k in (3, 3, 4))
    frames = [MetricFrame(metrics=accuracy_score, y_true=y[y == k], y_pred=p[y == k], sensitive_features=s[y == k]).difference() for k in range(3)]
    assert odds_gap(y, p, s) == pytest.approx(sum(frames) / 3) and odds_gap(y, p, s, reduce="max") == pytest.approx(max(frames))
    assert math.isnan(odds_gap([0, 1], [0, 1], [0, 0]))


# --- the network

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 5e-5), (torch.float64, 1e-10)])
def test_round_trip_after_training(dtype, tol, device):
    E, y, s = (t.to(device) for t in sample())
    m = FairLatent(n_steps=60, random_state=0).fit(E.to(dtype), y, sensitive_features=s)
    Z = m.transform(E.to(dtype))
    assert Z.dtype == dtype and Z.device == E.device and (m.inverse_transform(Z) - E.to(dtype)).abs().max() < tol


def test_log_determinant_is_that_of_autograd(fitted):
    model, E, _, _ = fitted
    x = model.split_.transform(E[:3])
    J = torch.stack([torch.autograd.functional.jacobian(lambda v: model._map(v[None])[0][0], row) for row in x])
    assert (torch.linalg.slogdet(J)[1] - model._map(x)[1]).abs().max() < 1e-4


def test_without_steps_to_speak_of_it_is_the_closed_form():
    E, y, s = sample()
    E = E.double()
    m = FairLatent(n_steps=1, learning_rate=1e-300, random_state=0).fit(E, y, sensitive_features=s)
    assert (m.transform(E) - m.split_.transform(E)).abs().max() < 2e-2                  # ActNorm divides by n, the covariance by n - 1


def test_it_closes_the_gap_that_a_linear_head_has():
    E, y, s = sample(12_000, agree=.9)
    new, old = slice(6000, None), slice(0, 6000)
    head = LogisticRegression(max_iter=1000).fit(E[old], y[old])
    model = FairLatent(n_steps=150, random_state=0).fit(E[old], y[old], sensitive_features=s[old])
    before, after = (odds_gap(y[new], torch.as_tensor(decided), s[new]) for decided in (head.predict(E[new]), model.predict(E[new])))
    assert before > .2 and after < .25 * before


def test_same_seed_same_network_and_the_callers_random_state_is_left_alone():
    E, y, s = sample(400)
    before = torch.random.get_rng_state()
    a, b, c = (FairLatent(n_steps=5, random_state=r).fit(E, y, sensitive_features=s).transform(E) for r in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(before, torch.random.get_rng_state())


def test_scikit_learn_manners(fitted):
    model, E, y, s = fitted
    check_is_fitted(model)
    assert clone(model).get_params() == model.get_params() and not hasattr(clone(model), "flow_")
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.transform(E), model.transform(E)) and set(model.history_) == {"gaussian", "diagonal", "equal", "pair"} and len(model.history_["pair"]) == 150


def test_several_labels_groups_and_attributes():
    E, y, s = sample(3000, 8, n_labels=3, n_groups=3)
    t = torch.randint(2, (3000,), generator=torch.Generator().manual_seed(1))
    E = E + 2. * t[:, None] * torch.nn.functional.one_hot(torch.tensor(7), 8)
    m = FairLatent(n_sensitive_dims=(2, 1), n_steps=100, random_state=0)
    with pytest.raises(ValueError, match="directions"): m.fit(E, y, sensitive_features=torch.stack([s, t], 1))
    E = torch.cat([E, torch.randn(3000, 12, generator=torch.Generator().manual_seed(2))], 1)
    m.fit(E, y, sensitive_features=torch.stack([s, t], 1))
    assert m.widths_ == (2, 2, 1, 15) and m.classes_ == [0, 1, 2] and m.groups_ == [[0, 1, 2], [0, 1]] and set(m.gate_) == {"label", "sensitive 0", "sensitive 1"}
    to = (torch.tensor(m.predict(E)) + 1) % 3
    assert (torch.tensor(m.predict(m.counterfactual(E, to, force=True))) == to).double().mean() > .999


# --- edits

def test_an_edit_moves_one_block_and_reaches_its_mirror_image(fitted):
    model, E, _, _ = fitted
    now = torch.tensor(model.predict(E))
    edited = model.counterfactual(E, 1 - now, force=True)
    Z, Z2 = model.transform(E), model.transform(edited)
    a, b = (model.label_head_.logits(z) for z in (Z, Z2))
    assert (Z[:, 1:] - Z2[:, 1:]).abs().max() < 1e-3 and ((a[:, 1] - a[:, 0]) + (b[:, 1] - b[:, 0])).abs().max() < 1e-2
    assert (model.counterfactual(E, now, force=True) - E).abs().max() < 1e-3                       # already there
    half = model.transform(model.counterfactual(E, 1 - now, strength=.5, force=True))
    assert (model.label_head_.logits(half).diff(dim=1)).abs().max() < 1e-2                         # on the wall
    other = torch.tensor(model.predict_sensitive(E))
    moved = model.transform(model.counterfactual(E, (1 - other).tolist(), of="sensitive", force=True))
    assert (moved[:, 0] - Z[:, 0]).abs().max() < 1e-3


def test_the_gate_refuses(fitted):
    model, E, _, _ = fitted
    from copy import copy
    spoiled = copy(model)
    for report, word in ((EditReport("label", .1, 0., 0., 90), "do nothing"), (EditReport("label", 9., 0., 1., 90), "leave the data"), (EditReport("label", -9., 0., 1., 90), "leave the data"), (EditReport("label", 1., 0., .2, 90), "do not arrive"), (EditReport("label", 1., .9, 1., 90), "drag"), (EditReport("label", 1., 0., 1., 9), "9 rows only")):
        spoiled.gate_ = {**model.gate_, "label": report}
        with pytest.raises(UntrustedEdit, match=word): spoiled.counterfactual(E, 1)
        assert spoiled.counterfactual(E, 1, force=True).shape == E.shape


def test_the_gate_sees_an_inert_edit():
    "Two copies of the label's coordinate; edits move one, readers see the other: planted by hand."
    E, y, s = sample()
    m = FairLatent(n_steps=1, random_state=0).fit(E, y, sensitive_features=s)
    inert = edit_gate(m, E, readers=[lambda e: E_logits(e, E, y), m.readers_[1].logits])
    assert not inert.acts and m.gate_["label"].acts


def E_logits(e, E, y):
    "A reader that sees only what edits leave alone: the nearest labelled row by index."
    return torch.nn.functional.one_hot(y[:len(e)], 2).to(e)


def test_strengths_that_the_gate_has_not_tried_are_refused():
    E, y, s = sample()
    E = E.double()
    model = FairLatent(n_steps=20, random_state=0).fit(E, y, sensitive_features=s)
    model.gate_ = {"label": EditReport("label", 1., 0., 1., 90)}
    for strength in (1.5, -.1):
        with pytest.raises(UntrustedEdit, match=f"strength {strength}"): model.counterfactual(E, 1, strength=strength)
    Z, far = model.transform(E), model.transform(model.counterfactual(E, 1, strength=1.5, force=True))
    assert torch.allclose(far - Z, 1.5 * (model.transform(model.counterfactual(E, 1)) - Z), atol=1e-8)


E_three = sample(600, 8, n_labels=3)


@given(st.integers(0, 10_000))
def test_mirror_images_arrive_wherever_the_classes_win_somewhere(fitted, seed):
    "In K - 1 dimensions with walls in general position every class has a cone of its own."
    g = torch.Generator().manual_seed(seed)
    K = int(torch.randint(2, 7, (), generator=g))
    h = fitted[0].label_head_._replace(columns=slice(0, K - 1), weight=torch.randn(K, K - 1, generator=g, dtype=torch.float64), bias=torch.randn(K, generator=g, dtype=torch.float64))
    edges = h.weight[1:] - h.weight[:1]
    if torch.linalg.cond(edges) > 30: return
    z, to = 3 * torch.randn(50, K - 1, generator=g, dtype=torch.float64), torch.randint(K, (50,), generator=g)
    assert (h.logits(h.mirror(z, to)).argmax(1) == to).all()


def test_a_class_that_wins_nowhere_is_warned_of():
    model = FairLatent(n_steps=1, random_state=0).fit(E_three[0], E_three[1], sensitive_features=E_three[2])
    model.label_head_ = model.label_head_._replace(weight=torch.tensor([[1., 0.], [-1., 0.], [0., 0.]]), bias=torch.tensor([0., 0., -1.]))
    with pytest.warns(UserWarning, match="600 of 600 rows find no mirror image"): model.counterfactual(E_three[0], 2, force=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.counterfactual(E_three[0], 1, force=True)


def test_gate_through_a_generator_reads_what_survives(fitted):
    model, E, _, _ = fitted
    class Forgets:
        encode = staticmethod(lambda x: x)
        decode = staticmethod(lambda e: e * 0 + E.mean(0))
    assert edit_gate(model, E, generator=Forgets).problem


# --- files

def test_files_keep_everything(fitted, tmp_path):
    model, E, _, _ = fitted
    again = load_fair_latent(save_fair_latent(model, tmp_path / "m.safetensors"))
    assert torch.equal(again.transform(E), model.transform(E)) and again.gate_ == model.gate_ and again.widths_ == model.widths_
    now = 1 - torch.tensor(model.predict(E))
    assert torch.equal(again.counterfactual(E, now, force=True), model.counterfactual(E, now, force=True)) and (again.predict(E) == model.predict(E)).all()
    assert edit_gate(again, E) == edit_gate(model, E)


def test_files_keep_options_of_all_kinds(untyped, tmp_path):
    E, y, s = sample(200)
    options = dict(n_label_dims=np.int64(1), n_sensitive_dims=(np.int64(2),), n_blocks=np.int32(2), pair_weight=np.float32(.5), n_steps=np.int64(2), random_state=np.int64(3))
    model = FairLatent(**options).fit(E, y, sensitive_features=s)
    again = load_fair_latent(save_fair_latent(model, tmp_path / "m.safetensors"))
    assert again.get_params() == {**model.get_params(), **options} and model.widths_ == (1, 2, 3) and torch.equal(again.transform(E), model.transform(E))
    kept = save_fair_latent(FairLatent(n_steps=2, random_state=np.random.RandomState(0)).fit(E, y, sensitive_features=s), tmp_path / "r.safetensors")
    assert load_fair_latent(kept).random_state is None


def test_files_that_are_not_to_be_trusted(fitted, tmp_path):
    model = fitted[0]
    path = save_fair_latent(model, tmp_path / "m.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="sha256"): load_fair_latent(path)
    torch.save({"a": torch.zeros(2)}, tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="pickle"): load_fair_latent(tmp_path / "p.safetensors")
    from fairbook.tensor_files import save_tensors
    with pytest.raises(ValueError, match="no FairLatent"): load_fair_latent(save_tensors({"a": torch.zeros(2)}, tmp_path / "o.safetensors"))
    with pytest.raises(FileNotFoundError): load_fair_latent(tmp_path / "none.safetensors")


# --- bad input

E0, Y0, S0 = sample(200)
BAD_FIT = [
    (dict(n_blocks=0), {}, "n_blocks must be a whole number, at least 1"), (dict(n_steps=0), {}, "n_steps must be a whole number, at least 1"), (dict(batch_size=2.5), {}, "batch_size must be a whole number, at least 1, got 2.5"), (dict(pair_weight=-1.), {}, "pair_weight must be finite"),
    (dict(temperature=0.), {}, "temperature must be finite and above 0"), (dict(validation_fraction=1.), {}, "validation_fraction must be in"), (dict(start="warm"), {}, "'whitening' or 'random'"),
    (dict(n_label_dims=6), {}, "do not fit"), (dict(n_label_dims=1.5), {}, "widths of blocks must be whole numbers"), (dict(n_sensitive_dims=("2",)), {}, "widths of blocks must be whole numbers"),
    ({}, dict(E=E0.half()), "must be float32 or float64, got torch.float16"), ({}, dict(y=torch.stack([Y0, Y0], 1)), "y must be one value for each row, got 2 columns"), (dict(n_sensitive_dims=(1, 1)), {}, "one width for each of the 1"), (dict(learning_rate=1e30), {}, "not finite"),
    ({}, dict(E=E0.where(E0 > -9, torch.nan).index_fill(0, torch.tensor([3]), torch.inf)), "first in row 3"), ({}, dict(E=E0[:, :0]), "latents of 0"), ({}, dict(y=Y0[:9]), "y has 9 rows"),
    ({}, dict(sensitive_features=torch.zeros(200, dtype=torch.long)), "two groups"), ({}, dict(y=torch.where((Y0 == 0) & (S0 == 1), 1, Y0)), "label 0 with group 1 (0 rows)"),
]


@pytest.mark.parametrize("options, data, complaint", BAD_FIT, ids=[c for *_, c in BAD_FIT])
def test_bad_fits_are_named(untyped, options, data, complaint):
    with pytest.raises(ValueError) as error:
        given = {"E": E0, "y": Y0, "sensitive_features": S0, **data}
        FairLatent(**{"n_steps": 5, "random_state": 0, **options}).fit(given["E"], given["y"], sensitive_features=given["sensitive_features"])
    assert complaint in str(error.value)


BAD_USE = [
    (lambda m, E: m.transform(E[:, :3]), "must have 6 columns"), (lambda m, E: m.transform(E.double()), "E must be torch.float32 on cpu, as in fit, got torch.float64"), (lambda m, E: m.inverse_transform(E.double()), "Z must be torch.float32 on cpu"),
    (lambda m, E: m.counterfactual(E, 1, strength=math.nan), "strength must be finite"), (lambda m, E: edit_gate(m, E, min_effekt=1.), "no limit 'min_effekt'"), (lambda m, E: m.inverse_transform(E[:, :3]), "Z must have 6 columns"), (lambda m, E: m.counterfactual(E, 7), "to must be one of [0, 1], got 7"),
    (lambda m, E: m.counterfactual(E, [0, 1]), "one value, or one for each of 2000 rows"), (lambda m, E: m.counterfactual(E, 1, of="group"), "'label' or 'sensitive'"),
    (lambda m, E: m.counterfactual(E, 1, of="sensitive", attribute=3), "attribute must be in 0 .. 0"), (lambda m, E: edit_gate(m, E, readers=[1]), "one function for the label"),
    (lambda m, E: pull_floor(0, 2), "n_dims >= 1"), (lambda m, E: odds_gap([0, 1], [0, 1], [0, 1], reduce="sum"), "'mean' or 'max'"),
    (lambda m, E: dp_floor(torch.ones(2, 2), torch.eye(2)), "rates must be a table"), (lambda m, E: dp_floor(torch.eye(2), torch.eye(3)), "must agree"),
]


@pytest.mark.parametrize("call, complaint", BAD_USE, ids=[c for _, c in BAD_USE])
def test_bad_use_is_named(untyped, fitted, call, complaint):
    with pytest.raises(ValueError) as error: call(*fitted[:2])
    assert complaint in str(error.value)


@pytest.mark.parametrize("call", [lambda m, E: m.transform(E), lambda m, E: m.inverse_transform(E), lambda m, E: m.predict(E), lambda m, E: m.predict_sensitive(E), lambda m, E: m.counterfactual(E, 1), lambda m, E: edit_gate(m, E), lambda m, E: save_fair_latent(m, "never.safetensors")])
def test_before_the_fit(call):
    with pytest.raises(NotFittedError): call(FairLatent(), E0)


def test_the_split_is_where_it_starts(fitted):
    model, E, y, s = fitted
    assert model.split_.widths == whitening_split(E, y, s).widths == (1, 5, 0)
