"""Generators: one contract for all, principal components against scikit-learn and Eckart-Young, an autoencoder that is frozen and reproducible, files that are checked before they are opened, and adapters against stand-ins with the interfaces of the real models."""
import copy
import json
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from torch import nn

from fairbook import generators
from fairbook.generators import ConvAutoencoder, ImageGenerator, PCAGenerator, from_diffae, from_diffusers, load_generator, psnr, save_generator
from fairbook.projection import ConvergenceWarning
from fairbook.tensor_files import save_tensors
from fairbook.toy_faces import make_faces, read_faces

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


class ToyKL(nn.Module):
    "diffusers' AutoencoderKL in miniature: an invertible mix of channels on blocks of 2x2, with noise in its sample that nobody may use."
    def __init__(self, factor=.18215, shift=.1):
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=factor, shift_factor=shift)
        self.mix, self.batches = nn.Parameter(torch.eye(3) + .2 * torch.ones(3, 3)), []

    def encode(self, x):
        assert x.dtype == self.mix.dtype and -1 - 1e-5 <= x.min() and x.max() <= 1 + 1e-5
        self.batches.append(len(x))
        mean = torch.einsum("ij,njhw->nihw", self.mix, x[:, :, ::2, ::2])
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, sample=lambda: mean + torch.randn_like(mean)))

    def decode(self, z):
        return SimpleNamespace(sample=torch.einsum("ij,njhw->nihw", self.mix.inverse(), z).repeat_interleave(2, 2).repeat_interleave(2, 3))


class ToyDiffAE(nn.Module):
    "DiffAE's LitModel in miniature: semantics are the mean colours times 5, the stochastic code is the rest; it notes the steps."
    def __init__(self, stats=None):
        super().__init__()
        self.weight, self.steps = nn.Parameter(torch.tensor(5.)), []
        self.conds_mean, self.conds_std = stats or (None, None)

    def encode(self, x):
        assert -1 - 1e-5 <= x.min() and x.max() <= 1 + 1e-5
        return self.weight * x.mean((2, 3))

    def encode_stochastic(self, x, cond, T=None):
        self.steps.append(T)
        return x - (cond / self.weight)[:, :, None, None]

    def render(self, noise, cond=None, T=None):
        self.steps.append(T)
        return (noise + (cond / self.weight)[:, :, None, None] + 1) / 2


def blocks(n=30, size=8, seed=0):
    "Colour pictures of 2x2 blocks."
    return torch.rand(n, 3, size // 2, size // 2, generator=torch.Generator().manual_seed(seed)).repeat_interleave(2, 2).repeat_interleave(2, 3)


def with_codes(images):
    g = from_diffae(ToyDiffAE()).fit(images)
    return g.with_code(g.stochastic(images))


MAKE = {
    "pca": lambda x: PCAGenerator(6).fit(x),
    "whitened": lambda x: PCAGenerator(6, whiten=True).fit(x),
    "conv": lambda x: ConvAutoencoder(6, width=4, epochs=2).fit(x),
    "diffusers": lambda x: from_diffusers(ToyKL()).fit(x),
    "diffae": with_codes,
}
every = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
FITTED = {k: MAKE[k] for k in ("pca", "whitened", "conv")}
ours = pytest.mark.parametrize("make", FITTED.values(), ids=FITTED.keys())


@pytest.fixture(scope="module")
def faces(): return make_faces(3000, seed=1), make_faces(1000, seed=2)


# ---------------------------------------------------------------- the contract

@every
def test_contract(make):
    x = blocks()
    g = make(x)
    E = g.encode(x)
    back = g.decode(E)
    assert isinstance(g, ImageGenerator) and g.image_shape == (3, 8, 8) and E.shape == (30, g.dim) and back.shape == x.shape
    assert E.dtype == back.dtype == torch.float32 and not E.requires_grad and not back.requires_grad
    assert g.reconstruction_error(x) == pytest.approx(psnr(x, back), abs=1e-3)
    assert torch.equal(g.encode(x), E) and torch.equal(g.decode(E), back)             # frozen, no noise
    assert torch.allclose(g.encode(x[3:7]), E[3:7], atol=1e-5)                        # a latent depends on its picture only


@every
def test_gradients_pass_through_to_the_latent_and_nowhere_else(make):
    x = blocks()
    g = make(x)
    E = g.encode(x).requires_grad_()
    picked = torch.randn_like(x)
    slope, = torch.autograd.grad((g.decode(E) * picked).sum(), E)
    direction = torch.randn_like(E)
    with torch.no_grad(): ahead, behind = ((g.decode(E + h * direction) * picked).double().sum() for h in (1e-2, -1e-2))
    assert (slope * direction).sum().item() == pytest.approx((ahead - behind).item() / 2e-2, rel=2e-2, abs=2e-2)
    assert all(p.grad is None for net in ("encoder_", "decoder_") for p in getattr(g, net, nn.Identity()).parameters())


@every
def test_gradients_pass_through_to_the_picture(make):
    x = blocks()
    g = make(x)
    x = x.clone().requires_grad_()
    slope, = torch.autograd.grad(g.encode(x).square().sum(), x)
    assert slope.isfinite().all() and slope.abs().sum() > 0


@every
def test_wrong_shapes_and_values(make, untyped):
    x = blocks()
    g = make(x)
    E = g.encode(x)
    for bad, word in (x[0], "images"), (x[:, :1], "images"), (x[..., :4], "images"), (x * math.nan, "finite"), ((255 * x).byte(), "uint8"):
        with pytest.raises(ValueError, match=word): g.encode(bad)
    for bad, word in (E[0], "E must"), (E[:, 1:], str(g.dim)), (E * math.inf, "finite"), (E.long(), "int64"):
        with pytest.raises(ValueError, match=word): g.decode(bad)


@pytest.mark.parametrize("g", [PCAGenerator(), ConvAutoencoder(), from_diffusers(ToyKL()), from_diffae(ToyDiffAE())], ids=lambda g: type(g).__name__)
def test_not_fitted(g):
    with pytest.raises(NotFittedError, match="fit"): g.encode(blocks())
    with pytest.raises(NotFittedError, match="fit"): g.image_shape


@ours
def test_refit_clone_and_pickle(make):
    x = blocks()
    g = make(x)
    assert torch.equal(make(x).encode(x), g.encode(x))
    assert torch.equal(clone(g).fit(x).encode(x), g.encode(x)) and not hasattr(clone(g), "mean_")
    assert torch.equal(pickle.loads(pickle.dumps(g)).encode(x), g.encode(x)) and torch.equal(copy.deepcopy(g).encode(x), g.encode(x))


@ours
@pytest.mark.parametrize("device", DEVICES)
def test_devices(make, device):
    x = blocks().to(device)
    g = make(x)
    assert g.encode(x).device == x.device and g.decode(g.encode(x)).device == x.device and g.encode(x.cpu()).device.type == "cpu"


# ---------------------------------------------------------------- PSNR

@given(sigma=st.floats(1e-3, .3))
def test_psnr_of_a_known_error(sigma):
    x = torch.rand(2, 3, 4, 4)
    assert psnr(x, x + sigma) == pytest.approx(-20 * math.log10(sigma), abs=1e-2)


def test_psnr_refuses(untyped):
    for bad in (torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 5)), (torch.rand(0, 1, 4, 4),) * 2:
        with pytest.raises(ValueError, match="psnr"): psnr(*bad)


# ---------------------------------------------------------------- principal components

def test_against_scikit_learn():
    x = torch.rand(200, 2, 5, 6, dtype=torch.float64) * torch.linspace(.1, 2, 6, dtype=torch.float64)
    theirs = PCA(7, svd_solver="full").fit(x.flatten(1).numpy())
    for whiten in False, True:
        g = PCAGenerator(7, whiten=whiten).fit(x)
        E, E_theirs = g.encode(x), torch.from_numpy(theirs.transform(x.flatten(1).numpy())) / (torch.from_numpy(theirs.explained_variance_).sqrt() if whiten else 1)
        assert torch.allclose(E.abs(), E_theirs.abs(), atol=1e-9)
        assert torch.allclose(g.decode(E).flatten(1), torch.from_numpy(theirs.inverse_transform(theirs.transform(x.flatten(1).numpy()))), atol=1e-9)
        assert torch.allclose(g.explained_variance_, torch.from_numpy(theirs.explained_variance_))


def test_the_iteration_against_the_full_decomposition(faces):
    x = faces[0].images[:1200, :, ::2, ::2]                                            # 768 numbers: the iteration is used
    g, theirs = PCAGenerator(12, dtype=torch.float64).fit(x), PCA(12, svd_solver="full").fit(x.flatten(1).double().numpy())
    assert g.converged_ and torch.allclose(g.explained_variance_, torch.from_numpy(theirs.explained_variance_), rtol=1e-9)
    cosines = torch.linalg.svdvals(g.components_ @ torch.from_numpy(theirs.components_).T)
    assert (1 - cosines).abs().max() < 1e-9


def test_eckart_young():
    "No other linear encoder and decoder with as many numbers does better; the error is the variance that is left."
    x = torch.randn(100, 1, 4, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    g = PCAGenerator(4).fit(x)
    X, best = (x - x.mean(0)).flatten(1), (g.decode(g.encode(x)) - x).square().sum()
    left = torch.linalg.eigvalsh(X.T @ X)[:-4].sum()
    assert torch.isclose(best, left)
    for _ in range(50):
        Q = torch.linalg.qr(g.components_.T + .3 * torch.randn(20, 4, dtype=torch.float64))[0]
        assert (X - X @ Q @ Q.T).square().sum() > best


@given(k=st.integers(1, 9), n=st.integers(10, 30), seed=st.integers(0, 99))
def test_orthonormal_rows_with_their_largest_entry_positive(k, n, seed):
    g = PCAGenerator(k).fit(torch.randn(n, 1, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    assert torch.allclose(g.components_ @ g.components_.T, torch.eye(k, dtype=torch.float64), atol=1e-9)
    assert (g.components_.gather(1, g.components_.abs().argmax(1, keepdim=True)) > 0).all() and (g.explained_variance_.diff() <= 1e-9).all()


def test_a_decoded_picture_is_a_fixed_point(faces):
    g = PCAGenerator(16, dtype=torch.float64).fit(faces[0].images[:600])
    E = g.encode(faces[1].images)
    assert E.dtype == torch.float64 and (g.encode(g.decode(E)) - E).abs().max() < 1e-10


def test_whitened_latents(faces):
    E = PCAGenerator(8, whiten=True).fit(faces[0].images).encode(faces[0].images)
    assert torch.allclose(torch.cov(E.T), torch.eye(8), atol=1e-3) and E.mean(0).abs().max() < 1e-3


def test_faces_survive(faces):
    train, test = faces
    g = PCAGenerator(32).fit(train.images)
    read = read_faces(g.decode(g.encode(test.images)))
    assert g.reconstruction_error(test.images) >= 44.9
    for name, least in ("curvature", .995), ("hue", .9999): assert torch.corrcoef(torch.stack([getattr(read, name), test.factors[name]]))[0, 1] >= least


def test_says_when_it_did_not_settle(monkeypatch, faces):
    monkeypatch.setattr(generators, "_subspace", lambda X, k, slow=generators._subspace: slow(X, k, max_iter=1))
    with pytest.warns(ConvergenceWarning, match="settle"): g = PCAGenerator(8).fit(faces[0].images[:700])
    assert not g.converged_


@pytest.mark.parametrize("kwargs, x, word", [
    ({"n_components": 5}, torch.rand(5, 1, 4, 4), "at most 4"), ({"n_components": 17}, torch.rand(50, 1, 4, 4), "at most 16"), ({"n_components": 0}, torch.rand(5, 1, 4, 4), "n_components"),
    ({"n_components": 2.5}, torch.rand(5, 1, 4, 4), "n_components"), ({}, torch.rand(5, 16), "images"), ({}, torch.full((5, 1, 4, 4), math.nan), "finite"),
    ({"n_components": 3, "whiten": True}, torch.arange(9.)[:, None, None, None].expand(9, 1, 4, 4), "whiten"), ({"whiten": True}, torch.ones(9, 1, 4, 4), "whiten")])
def test_pca_refuses(kwargs, x, word, untyped):
    with pytest.raises(ValueError, match=word): PCAGenerator(**{"n_components": 2} | kwargs).fit(x)


# ---------------------------------------------------------------- the autoencoder

def test_it_learns_something_not_linear():
    "Pictures of a spot on a ring have one latent number and a half; two linear components do worse than the network with two."
    angle = 2 * math.pi * torch.rand(1000, generator=torch.Generator().manual_seed(0))
    p = torch.arange(16.) - 7.5
    x = torch.exp(-((p - 4 * angle.cos()[:, None, None])**2 + (p[:, None] - 4 * angle.sin()[:, None, None])**2) / 4)[:, None]
    conv, pca = ConvAutoencoder(2, width=16, epochs=15).fit(x[:800]), PCAGenerator(2).fit(x[:800])
    assert conv.reconstruction_error(x[800:]) > pca.reconstruction_error(x[800:]) + 2


def test_latents_are_standardised_and_weights_frozen():
    x = blocks(80)
    g = ConvAutoencoder(5, width=4, epochs=3).fit(x)
    E = g.encode(x)
    assert E.mean(0).abs().max() < 1e-4 and (E.std(0) - 1).abs().max() < 1e-4
    assert len(g.history_) == 3 and g.history_[-1] < g.history_[0]
    for net in g.encoder_, g.decoder_: assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_seeds_and_the_global_generator():
    x = blocks(40)
    state = torch.get_rng_state()
    a = ConvAutoencoder(3, width=4, epochs=1, random_state=1).fit(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    b, c = ConvAutoencoder(3, width=4, epochs=1, random_state=1).fit(x), ConvAutoencoder(3, width=4, epochs=1, random_state=2).fit(x)
    assert torch.equal(a.encode(x), b.encode(x)) and not torch.equal(a.encode(x), c.encode(x))


def test_trains_under_no_grad_and_leaves_no_graph():
    with torch.no_grad(): g = ConvAutoencoder(3, width=4, epochs=2).fit(blocks(40))
    assert g.history_[1] != g.history_[0] and not g.latent_mean_.requires_grad


def test_progress_bar(capsys):
    ConvAutoencoder(2, width=4, epochs=2, progress=True).fit(blocks(10))
    assert "epoch" in capsys.readouterr().err
    ConvAutoencoder(2, width=4, epochs=2).fit(blocks(10))
    assert capsys.readouterr().err == ""


def test_double_pictures_in_double_pictures_out():
    x = blocks(20)
    g = ConvAutoencoder(3, width=4, epochs=1).fit(x)
    assert g.encode(x.double()).dtype == g.decode(g.encode(x.double())).dtype == torch.float64 and torch.allclose(g.encode(x.double()).float(), g.encode(x))


@pytest.mark.parametrize("kwargs, x, word", [
    ({}, torch.rand(4, 1, 12, 8), "multiples of 8"), ({}, torch.rand(1, 1, 8, 8), "at least 2"), ({"dim": 0}, blocks(4), "dim"), ({"width": -1}, blocks(4), "width"), ({"epochs": 0}, blocks(4), "epochs"),
    ({"batch_size": 0}, blocks(4), "batch_size"), ({"lr": 0.}, blocks(4), "lr"), ({"lr": math.nan}, blocks(4), "lr"), ({"lr": 1e30, "epochs": 5}, blocks(40), "diverged"), ({}, blocks(4) * math.inf, "finite")])
def test_conv_refuses(kwargs, x, word, untyped):
    with pytest.raises(ValueError, match=word): ConvAutoencoder(**{"dim": 2, "width": 4, "epochs": 1} | kwargs).fit(x)


# ---------------------------------------------------------------- files

@ours
def test_comes_back_as_it_was(make, tmp_path):
    x = blocks()
    g = make(x)
    back = load_generator(save_generator(g, tmp_path / "g.safetensors"))
    assert type(back) is type(g) and back.image_shape == g.image_shape and torch.equal(back.encode(x), g.encode(x)) and torch.equal(back.decode(g.encode(x)), g.decode(g.encode(x)))
    assert {k: v for k, v in back.get_params().items() if k != "device"} == {k: v for k, v in g.get_params().items() if k != "device"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.safetensors", "g.safetensors.sha256"]
    assert clone(back).fit(x).dim == g.dim


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dtype_comes_back(dtype, tmp_path):
    back = load_generator(str(save_generator(PCAGenerator(2, dtype=dtype).fit(blocks()), str(tmp_path / "g"))))
    assert back.dtype == dtype and back.encode(blocks()).dtype == dtype


def test_what_is_damaged_or_no_generator_is_not_loaded(tmp_path):
    "What a file of tensors refuses is tested with it."
    path = save_generator(PCAGenerator(2).fit(blocks()), tmp_path / "g.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"): load_generator(path)
    for words in (None, "", "{}", json.dumps({"kind": "PCAGenerator", "params": {"bad": 1}}), json.dumps({"kind": "ConvAutoencoder", "params": {"dim": 2, "device": None}, "image_shape": [1, 8, 8]})):
        save_tensors({"x": torch.ones(2)}, path, None if words is None else {"fairbook": words})
        with pytest.raises(ValueError, match="no generator"): load_generator(path)


def test_what_is_not_kept(tmp_path, untyped):
    with pytest.raises(ValueError, match="adapters"): save_generator(from_diffusers(ToyKL()).fit(blocks()), tmp_path / "g")
    with pytest.raises(NotFittedError): save_generator(PCAGenerator(), tmp_path / "g")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- adapters

def test_diffusers_round_trip_scale_and_batches():
    model, x = ToyKL(), blocks(37)
    g = from_diffusers(model, (3, 8, 8), batch_size=10)
    model.batches.clear()
    E = g.encode(x)
    assert model.batches == [10, 10, 10, 7] and not model.training and g.latent_shape == (3, 4, 4) and g.dim == 48
    with torch.no_grad(): mean = model.encode(2 * x - 1).latent_dist.mean
    assert torch.allclose(E, ((mean - .1) * .18215).flatten(1), atol=1e-6)
    assert torch.allclose(g.decode(E), x, atol=1e-5) and g.fit(x) is g


def test_diffusers_without_shift_and_in_another_format():
    x = blocks()
    model = ToyKL(.5).double()
    model.config.shift_factor = None
    g = from_diffusers(model).fit(x)
    assert g.encode(x).dtype == torch.float32 and torch.allclose(g.decode(g.encode(x)), x, atol=1e-5)


@pytest.mark.parametrize("size, large", [(32, False), (64, True)])
def test_diffusers_warns_of_a_large_latent(size, large):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        g = from_diffusers(ToyKL(), (3, size, size))
    assert [str(g.dim) in str(w.message) and "spatial" in str(w.message) for w in caught] == [True] * large


def test_diffae_keeps_the_person():
    x, model = blocks(), ToyDiffAE()
    g = from_diffae(model, steps_encode=7, steps_decode=3).fit(x)
    E, code = g.encode(x), g.stochastic(x)
    assert torch.allclose(g.decode(E, code), x, atol=1e-5) and set(model.steps) == {7, 3} and not model.training
    assert g.reconstruction_error(x) > 90 and psnr(x, g.decode(E, code.flip(0))) < 20
    assert E.mean(0).abs().max() < 1e-5 and (E.std(0) - 1).abs().max() < 1e-5
    bound = g.with_code(code)
    assert torch.equal(bound.decode(E), g.decode(E, code)) and g.code is None
    assert torch.equal(g.with_code(code[:1]).decode(E), g.decode(E, code[:1].expand_as(code)))


def test_diffae_statistics():
    x, mean, std = blocks(), torch.tensor([[1., 2, 3]]), torch.tensor([[.5, 1, 2]])
    with torch.no_grad(): raw = ToyDiffAE().encode(2 * x - 1)
    for g in from_diffae(ToyDiffAE((mean, std)), (3, 8, 8)), from_diffae(ToyDiffAE(), mean=mean[0], std=std[0]).fit(x), from_diffae(ToyDiffAE((mean + 1, std)), mean=mean, std=std).fit(x):
        assert torch.allclose(g.encode(x), (raw - mean) / std, atol=1e-5) and torch.allclose(g.decode(g.encode(x), g.stochastic(x)), x, atol=1e-5)


def test_diffae_refuses(untyped):
    x = blocks()
    g = from_diffae(ToyDiffAE()).fit(x)
    E = g.encode(x)
    with pytest.raises(ValueError, match="stochastic code"): g.decode(E)
    with pytest.raises(ValueError, match="code"): g.decode(E, g.stochastic(x)[:3])
    with pytest.raises(ValueError, match="code"): g.with_code(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match="together"): from_diffae(ToyDiffAE(), mean=torch.zeros(3))
    with pytest.raises(ValueError, match="3 numbers"): from_diffae(ToyDiffAE(), (3, 8, 8), mean=torch.zeros(4), std=torch.ones(4))
    with pytest.raises(ValueError, match="positive"): from_diffae(ToyDiffAE(), (3, 8, 8), mean=torch.zeros(3), std=torch.tensor([1., 0, 1]))
    with pytest.raises(ValueError, match="more images"): from_diffae(ToyDiffAE()).fit(x[:1])
    with pytest.raises(NotFittedError, match="mean and std"): from_diffae(ToyDiffAE(), (3, 8, 8)).encode(x)
    with pytest.raises(ValueError, match="steps_decode"): from_diffae(ToyDiffAE(), steps_decode=0)
    with pytest.raises(ValueError, match="render"): from_diffae(SimpleNamespace(encode=len, encode_stochastic=len))
    with pytest.raises(ValueError, match="decode"): from_diffusers(SimpleNamespace(encode=len))
    with pytest.raises(ValueError, match="batch_size"): from_diffusers(ToyKL(), batch_size=0)
