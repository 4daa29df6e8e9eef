"""Toy faces: the law they are drawn from, the same faces from the same seed wherever they are drawn, and a reader that is exact on drawings and close on decoded ones."""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest, norm, uniform
from sklearn.decomposition import PCA

from fairbook.toy_faces import Faces, draw_faces, make_faces, read_faces

READ = "curvature", "hue", "background"


@pytest.fixture(scope="module")
def many(): return make_faces(10_000, seed=3)


def correlation(a, b): return np.corrcoef(np.asarray(a, float), np.asarray(b, float))[0, 1]


def script(code, **env):
    "What a fresh interpreter prints."
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": "", "OMP_NUM_THREADS": "1", **env}).stdout.strip()


# ---------------------------------------------------------------- the record

@pytest.mark.parametrize("n, size", [(1, 32), (7, 32), (1001, 32), (3, 64), (2, 96)])
def test_the_record(n, size):
    faces = make_faces(n, size=size)
    assert isinstance(faces, Faces) and len(faces) == n
    assert faces.images.shape == (n, 3, size, size) and faces.images.dtype == torch.float32
    assert 0 <= faces.images.min() and faces.images.max() <= 1
    for label in faces.y, faces.s, faces.s2: assert label.shape == (n,) and label.dtype == torch.int64 and set(label.tolist()) <= {0, 1}
    assert set(faces.factors) == {"curvature", "hue", "background", "centre_x", "centre_y", "radius", "thickness", "eye_gap"}
    assert all(v.shape == (n,) and v.dtype == torch.float32 for v in faces.factors.values())
    assert (faces.rho, faces.rho2) == (.85, .5)


def test_the_record_is_frozen():
    with pytest.raises(AttributeError): make_faces(2).rho = .5


def test_same_seed_same_faces():
    a, torch_state = make_faces(1500, seed=5), torch.get_rng_state()
    torch.rand(10)
    b, other = make_faces(1500, seed=5), make_faces(1500, seed=6)
    assert torch.equal(a.images, b.images) and torch.equal(a.y, b.y) and torch.equal(a.s2, b.s2) and not torch.equal(a.y, other.y)
    torch.set_rng_state(torch_state)
    make_faces(3)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_no_trace_of_hash_seed_or_threads():
    code = "import torch, hashlib; torch.set_num_threads({}); from fairbook.toy_faces import make_faces; print(hashlib.sha256(make_faces(300, seed=4).images.numpy().tobytes()).hexdigest())"
    assert script(code.format(1), PYTHONHASHSEED="1") == script(code.format(3), PYTHONHASHSEED="2", OMP_NUM_THREADS="3")


def test_little_memory_beside_the_pictures():
    "20,000 faces are 234 MiB; what is drawn on the way must not come near a second copy."
    code = ("import resource as r, torch; torch.set_num_threads(1); from fairbook.toy_faces import make_faces; make_faces(2000); before = r.getrusage(r.RUSAGE_SELF).ru_maxrss; "
            "f = make_faces(20_000); print((r.getrusage(r.RUSAGE_SELF).ru_maxrss - before) / 1024 - f.images.numel() * 4 / 2**20)")
    assert float(script(code)) < 80


def test_drawn_in_chunks_as_one_by_one(many):
    few = {k: v[990:1010] for k, v in many.factors.items()}
    assert torch.equal(draw_faces(few), many.images[990:1010])


# ---------------------------------------------------------------- the law

@pytest.mark.parametrize("rho, rho2", [(.85, .5), (.5, .9), (0, 1), (1., 0.), (.95, .2)])
def test_correlations_as_asked(rho, rho2):
    faces = make_faces(10_000, rho=rho, rho2=rho2, seed=1)
    for s, p in (faces.s, rho), (faces.s2, rho2):
        assert abs((s == faces.y).double().mean() - p) <= 4.5 * math.sqrt(p * (1 - p) / 10_000)
    assert abs(faces.y.double().mean() - .5) <= 4.5 * .005


def test_attributes_independent_given_the_label():
    faces = make_faces(40_000, rho2=.8)
    for y in 0, 1:
        at = faces.y == y
        assert abs(correlation(faces.s[at], faces.s2[at])) < 4.5 / math.sqrt(at.sum())


def test_factors_follow_their_law(many):
    f = many.factors
    for z in (f["curvature"] - (many.y - .5)) / .6, (f["hue"] - 1.4 * (many.s - .5)) / .3, (f["background"] - .25 - .2 * (many.s2 - .5)) / .03:
        assert kstest(z.numpy(), norm.cdf).pvalue > 1e-3
    for name, low, high in ("centre_x", -.4, .4), ("centre_y", -.4, .4), ("radius", 12, 13), ("thickness", 1.2, 1.8), ("eye_gap", 8, 10):
        assert kstest(f[name].numpy(), uniform(low, high - low).cdf).pvalue > 1e-3


def test_nuisances_say_nothing(many):
    for name in "centre_x", "centre_y", "radius", "thickness", "eye_gap":
        for label in many.y, many.s, many.s2: assert abs(correlation(many.factors[name], label)) < 4.5 / 100


def test_bayes_accuracy_of_the_mouth(many):
    p = norm.cdf(.5 / .6)
    assert abs(((many.factors["curvature"] > 0) == many.y.bool()).double().mean() - p) < 4.5 * math.sqrt(p * (1 - p) / 10_000)


@pytest.mark.parametrize("n", [8, 4000, 4003])
def test_balanced(n):
    faces = make_faces(n, rho=.95, balanced=True)
    counts = torch.bincount(4 * faces.y + 2 * faces.s + faces.s2, minlength=8)
    assert counts.max() - counts.min() <= (n % 8 > 0) and (faces.rho, faces.rho2) == (.5, .5)
    if n == 4000: assert faces.y[:500].double().mean() != faces.y.double().mean() and .35 < faces.y[:500].double().mean() < .65   # in random order


# ---------------------------------------------------------------- the reader

@pytest.mark.parametrize("size", [32, 64])
def test_the_reader_is_exact_on_drawings(size):
    faces = make_faces(2000, size=size, seed=9)
    read = read_faces(faces.images)
    for name in READ:
        assert (getattr(read, name) - faces.factors[name]).abs().max() < 2e-4
        assert correlation(getattr(read, name), faces.factors[name]) >= .9999


@given(k=st.floats(-3.4, 3.4), t=st.floats(-2.4, 2.4), b=st.floats(0, 1), x=st.floats(-.4, .4), y=st.floats(-.4, .4), r=st.floats(12, 13), w=st.floats(1.2, 1.8), e=st.floats(8, 10))
def test_exact_for_every_face(k, t, b, x, y, r, w, e):
    one = {"curvature": k, "hue": t, "background": b, "centre_x": x, "centre_y": y, "radius": r, "thickness": w, "eye_gap": e}
    read = read_faces(draw_faces({name: torch.tensor([v], dtype=torch.float64) for name, v in one.items()}))
    assert abs(read.curvature - k) < 1e-8 and abs(read.hue - t) < 1e-8 and abs(read.background - b) < 1e-8


def test_the_reader_survives_principal_components():
    train, test = make_faces(3000, seed=1), make_faces(3000, seed=2)
    pca = PCA(32, svd_solver="randomized", random_state=0).fit(train.images.flatten(1).numpy())
    read = read_faces(torch.from_numpy(pca.inverse_transform(pca.transform(test.images.flatten(1).numpy()))).float().view_as(test.images))
    assert correlation(read.curvature, test.factors["curvature"]) >= .995
    assert correlation(read.hue, test.factors["hue"]) >= .995 and correlation(read.background, test.factors["background"]) >= .995


def test_the_reader_bears_noise(many):
    read = read_faces(many.images[:2000] + .005 * torch.randn(2000, 3, 32, 32))
    for name in READ: assert correlation(getattr(read, name), many.factors[name][:2000]) >= .98


def test_the_reader_sees_nothing_where_nothing_is(many):
    assert read_faces(torch.full((2, 3, 32, 32), .5)).curvature.isnan().all()
    shuffled = many.factors["curvature"][torch.randperm(10_000)]
    assert abs(correlation(read_faces(many.images).curvature, shuffled)) < .05


def test_a_face_redrawn_with_one_factor_changed(many):
    few = {k: v[:50] for k, v in many.factors.items()}
    before, after = read_faces(draw_faces(few)), read_faces(draw_faces(few | {"curvature": -few["curvature"]}))
    assert torch.allclose(after.curvature, -before.curvature, atol=1e-4) and torch.allclose(after.hue, before.hue, atol=1e-5)


def test_drawing_is_differentiable():
    f = {k: v.double().requires_grad_() for k, v in make_faces(2, seed=8).factors.items()}
    names, values = zip(*f.items())
    weight = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *v: (draw_faces(dict(zip(names, v))) * weight).sum(), values, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_kept(dtype):
    images = draw_faces({k: v.to(dtype) for k, v in make_faces(3).factors.items()})
    assert images.dtype == dtype and read_faces(images).curvature.dtype == dtype
    assert read_faces(images[:0]).hue.shape == (0,)


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("kwargs, word", [
    ({"n": 0}, "n must"), ({"n": -3}, "n must"), ({"n": 2.5}, "n must"), ({"n": 5, "rho": -.1}, "rho"), ({"n": 5, "rho": 1.01}, "rho"), ({"n": 5, "rho": math.nan}, "rho"),
    ({"n": 5, "rho2": 2}, "rho2"), ({"n": 5, "size": 16}, "size"), ({"n": 5, "size": 48}, "size"), ({"n": 5, "size": 0}, "size"), ({"n": 5, "seed": None}, "seed")])
def test_bad_requests(kwargs, word, untyped):
    with pytest.raises(ValueError, match=word): make_faces(kwargs.pop("n"), **kwargs)


@pytest.mark.parametrize("images, word", [
    (torch.rand(3, 32, 32), "n, 3, size, size"), (torch.rand(2, 1, 32, 32), "n, 3, size, size"), (torch.rand(2, 3, 32, 64), "square"), (torch.rand(2, 3, 40, 40), "multiple of 32"),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "255"), (torch.full((1, 3, 32, 32), math.nan), "finite")])
def test_bad_images(images, word, untyped):
    with pytest.raises(ValueError, match=word): read_faces(images)


@pytest.mark.parametrize("change, word", [
    (lambda f: {k: v for k, v in f.items() if k != "hue"}, "hue"), (lambda f: f | {"beard": f["hue"]}, "beard"), (lambda f: f | {"hue": f["hue"][:1]}, "length"),
    (lambda f: f | {"hue": f["hue"] * math.inf}, "finite"), (lambda f: {k: v[:, None] for k, v in f.items()}, "vectors")])
def test_bad_factors(change, word, untyped):
    with pytest.raises(ValueError, match=word): draw_faces(change(make_faces(3).factors))
