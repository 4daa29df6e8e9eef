"""Flows: every layer's round trip and log-determinant against autograd's Jacobian, the fast route against the slow one, what may be kept and for how long, and other people's flows with our weights."""
import copy
import io
import math
import pickle

import pytest
import torch
from flow_peers import normflows_twin, zuko_twin
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from fairbook.flows import ActNorm, AdditiveCoupling, AffineCoupling, Glow, InvertibleLinear, Split, Squeeze, VectorFlow

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
DTYPES = {torch.float32: 1e-4, torch.float64: 1e-11}


def shaken(module, size=.1):
    with torch.no_grad():
        for p in module.parameters(): p.add_(size * torch.randn_like(p))
    return module


def started(flow, x, size=.1, mode="eval"):
    "The flow after its first batch, with noise on every weight."
    flow.train()(x)
    return getattr(shaken(flow, size), mode)()


def true_log_det(layer, x):
    jacobians = [torch.autograd.functional.jacobian(lambda t: layer(t[None])[0].flatten(), t).reshape(t.numel(), t.numel()) for t in x]
    return torch.stack([torch.linalg.slogdet(J).logabsdet for J in jacobians])


LAYERS = {
    "actnorm": (lambda: ActNorm(4), (4,)),
    "actnorm on images": (lambda: ActNorm(3), (3, 2, 2)),
    "lu": (lambda: InvertibleLinear(5, "lu"), (5,)),
    "lu on images": (lambda: InvertibleLinear(4, "lu"), (4, 2, 3)),
    "orthogonal": (lambda: InvertibleLinear(5, "orthogonal"), (5,)),
    "orthogonal on images": (lambda: InvertibleLinear(4, "orthogonal"), (4, 2, 3)),
    "one channel": (lambda: InvertibleLinear(1, "orthogonal"), (1, 3)),
    "additive": (lambda: AdditiveCoupling(5, nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2))), (5,)),
    "affine": (lambda: AffineCoupling(5, nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 4))), (5,)),
    "affine on images": (lambda: AffineCoupling(4, nn.Conv2d(2, 4, 3, padding=1)), (4, 3, 2)),
    "squeeze": (Squeeze, (2, 4, 2)),
}
FLOWS = {
    "vector, affine": (lambda: VectorFlow(5, 4, 8), (5,)),
    "vector, additive, lu": (lambda: VectorFlow(4, 3, 8, coupling="additive", mixing="lu", depth=1), (4,)),
    "vector of 2": (lambda: VectorFlow(2, 2, 4), (2,)),
    "glow, additive": (lambda: Glow((1, 4, 4), 2, 2, hidden=6, n_bits=None), (1, 4, 4)),
    "glow, affine, orthogonal": (lambda: Glow((3, 2, 4), 2, 1, hidden=6, coupling="affine", mixing="orthogonal", n_bits=None), (3, 2, 4)),
}
EVERYTHING = LAYERS | FLOWS
cases = lambda table: pytest.mark.parametrize("make, shape", table.values(), ids=table.keys())


# ---------------------------------------------------------------- the contract, for every layer and flow

@cases(EVERYTHING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_round_trip(make, shape, dtype, device):
    layer, x = make().to(device, dtype), 2 + 3 * torch.randn(16, *shape, dtype=dtype, device=device)
    started(layer, x)
    z, log_det = layer(x)
    assert z.dtype == log_det.dtype == dtype and z.device == x.device and log_det.shape == (16,)
    assert (layer.inverse(z) - x).abs().max() <= DTYPES[dtype]
    with torch.no_grad(): assert (layer.inverse(layer(x)[0]) - x).abs().max() <= DTYPES[dtype]
    assert layer(x[:0])[0].shape == z[:0].shape


@cases(EVERYTHING)
def test_log_det_is_autograds(make, shape):
    layer, x = make().double(), torch.randn(8, *shape, dtype=torch.float64)
    started(layer, x)
    assert torch.allclose(layer(x)[1], true_log_det(layer, x), atol=1e-10)
    with torch.no_grad(): assert torch.allclose(layer(x)[1], true_log_det(layer, x), atol=1e-10)


@cases(EVERYTHING)
def test_training_and_evaluation_agree(make, shape):
    layer, x = make().double(), torch.randn(8, *shape, dtype=torch.float64)
    started(layer, x, mode="train")
    trained = *layer(x), layer.inverse(layer(x)[0])
    for a, b in zip(trained, (*layer.eval()(x), layer.inverse(layer(x)[0]))): assert torch.allclose(a, b, atol=1e-12)


@cases(EVERYTHING)
def test_samples_do_not_see_each_other(make, shape):
    layer, x = make().double(), torch.randn(8, *shape, dtype=torch.float64)
    started(layer, x, mode="train")
    assert torch.allclose(layer(x)[0][3:4], layer(x[3:4])[0], atol=1e-12) and torch.allclose(layer(x)[1][3:4], layer(x[3:4])[1], atol=1e-12)


@cases(EVERYTHING)
def test_gradients(make, shape):
    layer, x = make().double(), torch.randn(3, *shape, dtype=torch.float64)
    started(layer, x, mode="train")
    assert torch.autograd.gradcheck(lambda t: layer(t), x.clone().requires_grad_(), atol=1e-5)
    assert torch.autograd.gradcheck(layer.inverse, layer(x)[0].detach().requires_grad_(), atol=1e-5)


@cases(EVERYTHING)
def test_gradients_reach_every_parameter(make, shape):
    layer, x = make().double(), torch.randn(8, *shape, dtype=torch.float64)
    if not list(layer.parameters()): pytest.skip("has no parameters")
    started(layer, x, mode="train")
    loss = -layer.log_prob(x).mean() if hasattr(layer, "log_prob") else sum(t.square().sum() for t in layer(x)) + layer.inverse(x).sum()
    loss.backward()
    for name, p in layer.named_parameters(): assert p.numel() == 0 or (p.grad is not None and p.grad.abs().max() > 0), name


@cases(EVERYTHING)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: torch.load(_saved(m), weights_only=False)], ids=["deepcopy", "pickle", "torch.save"])
def test_copies(make, shape, copied):
    layer, x = make().double(), torch.randn(8, *shape, dtype=torch.float64)
    started(layer, x)
    with torch.no_grad():
        z = layer(x)[0]
        layer.inverse(z)                                        # something is kept now
        twin = copied(layer)
        assert torch.equal(twin(x)[0], z) and torch.equal(twin.inverse(z), layer.inverse(z))
        shaken(twin)
        assert torch.equal(layer(x)[0], z) and (twin.inverse(twin(x)[0]) - x).abs().max() < 1e-10


def _saved(m):
    torch.save(m, file := io.BytesIO())
    file.seek(0)
    return file


@cases(EVERYTHING)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_also_through_safetensors(make, shape, assign):
    layer, twin, x = make().double(), make().double(), torch.randn(8, *shape, dtype=torch.float64)
    started(layer, x)
    z, _ = layer(x)
    twin.eval()
    with torch.no_grad(): twin(x)                               # keeps the wrong matrices
    state = load_safetensors(save_safetensors({k: v.contiguous() for k, v in layer.state_dict().items()}))
    twin.load_state_dict(state, assign=assign)
    with torch.no_grad(): assert torch.allclose(twin(x)[0], z, atol=1e-12) and torch.allclose(twin.inverse(z), x, atol=1e-10)
    assert torch.allclose(twin.train()(x[:2] + 5)[0], layer(x[:2] + 5)[0], atol=1e-12)      # the start is not repeated


# ---------------------------------------------------------------- ActNorm

def test_actnorm_starts_once_in_training_only():
    norm, x = ActNorm(3).double(), 7 + 2 * torch.randn(50, 3, 4, dtype=torch.float64)
    assert torch.equal(norm.eval()(x)[0], x) and not norm.started
    y = norm.train()(x)[0].transpose(0, 1).flatten(1)
    assert norm.started and y.mean(1).abs().max() < 1e-12 and (y.std(1) - 1).abs().max() < 1e-12
    assert torch.equal(norm(x + 100)[0], norm.eval()(x + 100)[0])


def test_actnorm_survives_a_constant_channel():
    y, log_det = ActNorm(2)(torch.tensor([[1., 5.], [3., 5.]]))
    assert y.isfinite().all() and (y[:, 1] == 0).all() and log_det.isfinite().all()


# ---------------------------------------------------------------- InvertibleLinear

@given(n=st.integers(1, 12), mixing=st.sampled_from(["lu", "orthogonal"]), size=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_numbers_give_an_invertible_matrix(n, mixing, size, seed):
    torch.manual_seed(seed)
    mix = shaken(InvertibleLinear(n, mixing).double(), size)
    W, inverse = mix.matrix(), mix.inverse_matrix()
    condition = torch.linalg.cond(W).item()
    assert (W @ inverse - torch.eye(n)).abs().max() <= 1e-13 * n * condition
    assert abs(torch.linalg.slogdet(W).logabsdet - mix(torch.zeros(1, n).double())[1]) <= 1e-12 * n * condition
    if mixing == "orthogonal": assert condition <= 1 + 1e-10


@pytest.mark.parametrize("mixing", ["lu", "orthogonal"])
def test_casting_keeps_all_digits(mixing):
    mix, x = InvertibleLinear(64, mixing).double(), torch.randn(9, 64, dtype=torch.float64)
    cast = copy.deepcopy(mix).float().double()
    assert (cast.inverse(cast(x)[0]) - x).abs().max() < 1e-12


# what changes parameters, and may not leave a stale matrix behind
def _adam(m):
    optimiser = torch.optim.Adam(m.parameters(), .1)
    with torch.enable_grad(): sum(p.square().sum() for p in m.parameters()).backward()
    optimiser.step()

def _replace(m):
    for part in m.modules():
        for name, p in list(part._parameters.items()): setattr(part, name, nn.Parameter(p.detach() + .1))

CHANGES = {
    "optimiser": _adam,
    "in place": shaken,
    "load_state_dict": lambda m: m.load_state_dict({k: v + .1 if v.is_floating_point() else v for k, v in m.state_dict().items()}),
    "load_state_dict, assigned": lambda m: m.load_state_dict({k: v + .1 if v.is_floating_point() else v for k, v in m.state_dict().items()}, assign=True),
    "new parameters": _replace,
    "data, then eval": lambda m: ([p.data.add_(.1) for p in m.parameters()], m.eval()),
    "data, then train and eval": lambda m: ([p.data.add_(.1) for p in m.parameters()], m.train(), m.eval()),
    "number format": lambda m: (m.float(), shaken(m), m.double()),
    "a layer replaced": lambda m: m.levels[0].steps.__setitem__(0, copy.deepcopy(shaken(m.levels[0].steps[1]))) if isinstance(m, Glow) else shaken(m),
}
KEEPERS = {
    "linear, lu": (lambda: InvertibleLinear(4), (4,)), "linear, orthogonal": (lambda: InvertibleLinear(4, "orthogonal"), (4,)),
    "vector": (lambda: VectorFlow(4, 2, 8), (4,)), "glow": (lambda: Glow((1, 4, 4), 2, 2, hidden=6, n_bits=None), (1, 4, 4)),
    "glow, affine, orthogonal": (lambda: Glow((1, 4, 4), 2, 2, hidden=6, coupling="affine", mixing="orthogonal", n_bits=None), (1, 4, 4)),
}


@cases(KEEPERS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_nothing_stale_is_kept(make, shape, change):
    m, x = make().double(), torch.randn(8, *shape, dtype=torch.float64)
    started(m, x)
    with torch.no_grad(): before = m(x)[0], m.inverse(m(x)[0])
    change(m)
    z = m(x)[0]                                                 # gradients wanted: nothing kept is used
    with torch.no_grad():
        assert (z - before[0]).abs().max() > 1e-3               # the change changed something
        assert torch.allclose(m(x)[0], z, atol=1e-11) and torch.allclose(m.inverse(z), x, atol=1e-9)


def test_matrices_are_kept_in_evaluation_without_gradients():
    mix = InvertibleLinear(4).eval()
    with torch.no_grad(): assert mix.matrix() is mix.matrix() and mix.inverse_matrix() is mix.inverse_matrix()
    assert mix.matrix() is not mix.matrix() and mix.matrix().requires_grad
    mix.requires_grad_(False)
    assert mix.matrix() is mix.matrix()
    with torch.no_grad(): assert mix.train().matrix() is not mix.matrix()


def test_what_inference_mode_kept_serves_autograd_later():
    mix = InvertibleLinear(4).eval().requires_grad_(False)
    with torch.inference_mode(): mix.matrix()
    x = torch.ones(1, 4, requires_grad=True)
    mix(x)[0].sum().backward()
    assert torch.allclose(x.grad[0], mix.matrix().sum(0))


def test_frozen_flow_passes_gradients_to_the_latent():
    flow = started(Glow((1, 4, 4), 2, 2, hidden=6, n_bits=None).double(), torch.randn(8, 1, 4, 4).double()).requires_grad_(False)
    assert torch.autograd.gradcheck(flow.inverse, torch.randn(2, 16).double().requires_grad_(), atol=1e-5)


# ---------------------------------------------------------------- couplings

@given(n=st.integers(2, 9), bound=st.floats(.1, 5), scale=st.floats(0, 1e6), seed=st.integers(0, 99))
def test_affine_coupling_stretches_within_its_bound(n, bound, scale, seed):
    torch.manual_seed(seed)
    layer, x = AffineCoupling(n, nn.Linear(n - n // 2, 2 * (n // 2)), bound).double(), scale * torch.randn(5, n, dtype=torch.float64)
    assert (layer(x)[1].abs() <= bound * (n // 2) * (1 + 1e-12)).all()


def test_coupling_keeps_its_first_channels():
    for layer in AdditiveCoupling(5, nn.Linear(3, 2)), AffineCoupling(5, nn.Linear(3, 4)):
        x = torch.randn(3, 5)
        assert torch.equal(layer(x)[0][:, :3], x[:, :3]) and (layer(x)[0][:, 3:] != x[:, 3:]).all()


# ---------------------------------------------------------------- the vector flow

@pytest.mark.parametrize("size", [0., .02])
def test_bar_round_trip_of_sixteen_blocks_at_512(size):
    x = torch.randn(64, 512, dtype=torch.float64)
    flow = started(VectorFlow(512, 16, 512).double(), x, size)
    with torch.no_grad(): assert (flow.inverse(flow(x)[0]) - x).abs().max() <= 1e-12
    flow, x32 = flow.float(), x.float()
    with torch.no_grad(): assert (flow.inverse(flow(x32)[0]) - x32).abs().max() <= 5e-5


def test_a_fresh_flow_only_rotates():
    x = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6).double()
    flow = VectorFlow(6, 10, 16).double()
    z, log_det = flow(x)
    norm = flow.steps[0].norm
    assert torch.allclose(log_det, sum(s.norm.log_scale.sum() for s in flow.steps).expand(500)) and torch.allclose(z.mean(0), torch.zeros(6).double(), atol=1e-9)
    fresh = VectorFlow(6, 10, 16).double().eval()
    assert torch.allclose(fresh(x)[0].norm(dim=1), x.norm(dim=1)) and norm.started


def test_log_prob_integrates_to_one():
    flow = shaken(VectorFlow(2, 4, 8).double()).eval()
    ticks = torch.linspace(-12, 12, 401, dtype=torch.float64)
    with torch.no_grad(): assert abs(flow.log_prob(torch.cartesian_prod(ticks, ticks)).exp().sum() * (ticks[1] - ticks[0])**2 - 1) < 1e-3


def test_training_by_likelihood_finds_the_law():
    "Correlated normals: the log-density learnt is the true one, up to sampling error."
    cov = torch.tensor([[2., 1.2], [1.2, 1.]], dtype=torch.float64)
    law = torch.distributions.MultivariateNormal(torch.tensor([1., -2.], dtype=torch.float64), cov)
    x, new = law.sample((2000,)), law.sample((2000,))
    flow = VectorFlow(2, 3, 8).double()
    optimiser = torch.optim.Adam(flow.parameters(), .02)
    for _ in range(150):
        optimiser.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimiser.step()
    assert abs(flow.log_prob(new).mean() - law.log_prob(new).mean()) < .03
    drawn = flow.eval().sample(4000, generator=torch.Generator().manual_seed(0))
    assert (drawn.T.cov() - cov).abs().max() < .25


@pytest.mark.parametrize("coupling", ["affine", "additive"])
@pytest.mark.parametrize("mixing", ["lu", "orthogonal"])
def test_zuko_computes_the_same(coupling, mixing):
    pytest.importorskip("zuko")
    flow, x = VectorFlow(7, 5, 16, coupling=coupling, mixing=mixing).double(), torch.randn(32, 7, dtype=torch.float64)
    started(flow, x, .05)
    twin = zuko_twin(flow)
    with torch.no_grad():
        (z, log_det), (theirs, ladj) = flow(x), twin.call_and_ladj(x)
        assert (z - theirs).abs().max() < 1e-12 and (log_det - ladj).abs().max() < 1e-12
        assert (flow.inverse(z) - twin.inv(z)).abs().max() < 1e-11


# ---------------------------------------------------------------- images

def test_squeeze_is_a_reordering_by_patches():
    x = torch.arange(16.).view(1, 1, 4, 4)
    assert Squeeze()(x)[0][0, :, 0, 0].tolist() == [0, 1, 4, 5] and Squeeze()(x)[0][0, 0].flatten().tolist() == [0, 2, 8, 10]


def test_split_prior_is_a_normal():
    cut, x = shaken(Split(6)).double(), torch.randn(4, 6, 3, 2, dtype=torch.float64)
    kept, off = cut(x)
    mean, log_std = cut._law(kept)
    assert torch.allclose(cut.log_prob(kept, off), torch.distributions.Normal(mean, log_std.exp()).log_prob(off).sum((1, 2, 3)))
    assert torch.equal(cut.inverse(kept, off), x) and (log_std.abs() <= 4).all()
    many = torch.stack([cut.sample(kept, .5) for _ in range(2000)])
    assert (many.mean(0) - mean).abs().max() < .1 and (many.std(0) / (.5 * log_std.exp()) - 1).abs().max() < .1


@pytest.mark.parametrize("coupling, mixing", [("additive", "lu"), ("affine", "orthogonal")])
@pytest.mark.parametrize("K, L, hidden, side", [(1, 1, 1, (2, 2)), (2, 2, 16, (8, 4)), (4, 3, 32, (16, 16))])
def test_fast_route_is_the_slow_route(coupling, mixing, K, L, hidden, side):
    for dtype, tol in (torch.float32, 1e-6), (torch.float64, 1e-12):
        flow, x = Glow((3, *side), K, L, coupling=coupling, mixing=mixing, hidden=hidden, n_bits=None).to(dtype), torch.randn(5, 3, *side, dtype=dtype)
        started(flow, x, .01)
        z, log_det = flow(x)
        slow = z, log_det, flow.inverse(z)
        with torch.no_grad(): fast = *flow(x), flow.inverse(z)
        for s, f in zip(slow, fast): assert (s - f).abs().max() <= tol * s.abs().max().clamp(min=1)


def test_portions_do_not_matter(monkeypatch):
    flow, x = Glow((1, 8, 8), 2, 2, hidden=8, coupling="affine", n_bits=None).double(), torch.randn(7, 1, 8, 8, dtype=torch.float64)
    started(flow, x)
    with torch.no_grad():
        z, log_det = flow(x)
        monkeypatch.setattr("fairbook.flows._PORTION", (300, 300))
        assert torch.allclose(flow(x)[0], z, atol=1e-12) and torch.allclose(flow(x)[1], log_det, atol=1e-12) and torch.allclose(flow.inverse(z), x, atol=1e-11)


def test_the_caller_keeps_its_tensors():
    flow, x = Glow((1, 4, 4), 2, 1, hidden=4, coupling="affine", n_bits=None), torch.randn(1, 1, 4, 4)
    started(flow, x)
    with torch.no_grad():
        z, before = flow(x)[0], x.clone()
        kept = z.clone()
        flow.inverse(z)
        assert torch.equal(z, kept) and torch.equal(x, before)


def test_latent_is_finest_part_first():
    flow, x = Glow((3, 8, 8), 2, 3, hidden=8, n_bits=None).double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    started(flow, x)
    z, _ = flow(x)
    assert flow.latent_shapes == [(6, 4, 4), (12, 2, 2), (48, 1, 1)] and sum(map(math.prod, flow.latent_shapes)) == z.shape[1] == flow.dim
    kept, off = flow.splits[0](flow.levels[0](flow.squeeze(x)[0])[0])
    assert torch.allclose(z[:, :96], off.flatten(1))
    kept, off = flow.splits[1](flow.levels[1](flow.squeeze(kept)[0])[0])
    assert torch.allclose(z[:, 96:144], off.flatten(1)) and torch.allclose(z[:, 144:], flow.levels[2](flow.squeeze(kept)[0])[0].flatten(1))


def test_log_prob_of_glow_is_the_formula():
    flow, x = Glow((1, 4, 4), 2, 2, hidden=6, coupling="affine", n_bits=None).double(), torch.randn(4, 1, 4, 4, dtype=torch.float64)
    started(flow, x)
    z, log_det = flow(x)
    off, last = z[:, :8].view(4, 2, 2, 2), z[:, 8:].view(4, 8, 1, 1)
    kept = flow.squeeze.inverse(flow.levels[1].inverse(last))
    law = torch.distributions.Normal(flow.prior[0], flow.prior[1].exp())
    assert torch.allclose(flow.log_prob(x), log_det + flow.splits[0].log_prob(kept, off) + law.log_prob(last).sum((1, 2, 3)))
    with torch.no_grad(): assert torch.allclose(flow.log_prob(x), log_det + flow.splits[0].log_prob(kept, off) + law.log_prob(last).sum((1, 2, 3)))


@given(n_bits=st.integers(1, 8))
def test_quantising_is_what_dropping_bits_is(n_bits):
    flow = Glow((1, 16, 16), 1, 1, hidden=2, n_bits=n_bits)
    x = (torch.arange(256) / 255).view(1, 1, 16, 16)
    q = flow.quantize(x)
    assert torch.equal((q * 2**n_bits - .5).round().long().flatten(), torch.arange(256) // 2**(8 - n_bits))
    assert torch.equal(flow.quantize(q), q) and (q - x).abs().max() <= .5 / 2**n_bits + 1 / 255


@pytest.mark.parametrize("n_bits", [1, 5, 8])
def test_round_trip_is_quantising(n_bits):
    flow, x = Glow((3, 8, 8), 4, 2, hidden=16, n_bits=n_bits), torch.rand(6, 3, 8, 8)
    started(flow, x, .02)
    with torch.no_grad(): back = flow.inverse(flow(x)[0])
    assert (back - flow.quantize(x)).abs().max() < 1e-5 and torch.equal(flow.quantize(back.clamp(0, 1)), flow.quantize(x))


def test_bits_of_noise():
    "A fresh flow takes uniform values for normal ones and pays the difference of entropies."
    for n_bits in 3, 5:
        flow, x = Glow((3, 16, 16), 2, 2, hidden=8, n_bits=n_bits).double(), torch.rand(64, 3, 16, 16, dtype=torch.float64)
        gen = lambda: torch.Generator().manual_seed(1)
        assert abs(flow.bits_per_dim(x, gen()).mean() - n_bits - .5 * math.log2(2 * math.pi * math.e / 12)) < .01
        assert torch.equal(flow.log_prob(x, gen()), flow.log_prob(x, gen())) and not torch.equal(flow.log_prob(x), flow.log_prob(x))


def test_samples_have_the_density_they_should():
    "E[exp(-log p(x))] over a box equals its volume only if samples follow log_prob: compare the entropy by samples with the one by weights."
    flow = shaken(Glow((1, 2, 2), 2, 1, hidden=6, n_bits=None).double(), .1).eval()
    x = flow.sample(20_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): by_samples, (z, log_det) = -flow.log_prob(x), flow(x)
    wide = 3 * torch.randn(50_000, 4, dtype=torch.float64)
    with torch.no_grad():
        log_p = flow.log_prob(wide.view(-1, 1, 2, 2))
        weight = (log_p - torch.distributions.Normal(0., 3.).log_prob(wide).sum(1)).exp()
    by_weights = -(weight * log_p)
    assert abs(by_samples.mean() - by_weights.mean()) < 4 * (by_samples.var() / 20_000 + by_weights.var() / 50_000).sqrt()


@pytest.mark.parametrize("make", [lambda: VectorFlow(4, 2, 8), lambda: Glow((1, 4, 4), 2, 2, hidden=4)], ids=["vector", "glow"])
def test_samples_follow_generator_and_temperature(make):
    flow = shaken(make()).eval()
    gen = lambda: torch.Generator().manual_seed(3)
    assert torch.equal(flow.sample(3, generator=gen()), flow.sample(3, generator=gen())) and not torch.equal(flow.sample(3), flow.sample(3))
    cold = flow.sample(2, temperature=0)
    assert torch.allclose(cold[0], cold[1], atol=1e-5) and not flow.sample(1).requires_grad


@settings(max_examples=15)
@given(K=st.integers(1, 4), L=st.integers(1, 3), hidden=st.integers(1, 12), channels=st.integers(1, 3), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
def test_normflows_computes_the_same(K, L, hidden, channels, seed):
    pytest.importorskip("normflows")
    torch.manual_seed(seed)
    flow, x = Glow((channels, 8, 16), K, L, hidden=hidden, n_bits=None).double(), torch.randn(4, channels, 8, 16, dtype=torch.float64)
    started(flow, x, .05)
    twin = normflows_twin(flow)
    with torch.no_grad():
        (z, log_det), (parts, theirs) = flow(x), twin.inverse_and_log_det(x)
        assert torch.allclose(z, torch.cat([p.flatten(1) for p in reversed(parts)], 1), atol=1e-9) and torch.allclose(log_det, theirs, atol=1e-9)
        assert torch.allclose(flow.inverse(z), twin.forward_and_log_det(parts)[0], atol=1e-8)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bar_inversion_error_no_worse_than_normflows():
    "Full depth in float32: our error is at most normflows' on the same weights, on average over seeds."
    pytest.importorskip("normflows")
    ours, theirs = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        flow, x = Glow((3, 64, 64), 32, 4, hidden=32, n_bits=None), torch.rand(2, 3, 64, 64) - .5
        with torch.no_grad():
            for name, p in flow.named_parameters():
                if ".last." in name: p.add_(.01 * torch.randn_like(p))
            flow(x)
            twin, flow = normflows_twin(flow), flow.eval()
            ours.append((flow.inverse(flow(x)[0]) - x).abs().max().item())
            theirs.append((twin.forward_and_log_det(twin.inverse_and_log_det(x)[0])[0] - x).abs().max().item())
    assert sum(ours) <= sum(theirs) * 1.1, (ours, theirs)


# ---------------------------------------------------------------- bad input

GLOW = lambda: Glow((1, 4, 4), 1, 2, hidden=2)
NAN = torch.full((1, 1, 4, 4), math.nan)


@pytest.mark.parametrize("call, says", [
    (lambda: ActNorm(0), "at least 1, got 0"),
    (lambda: ActNorm(3)(torch.ones(4, 2)), r"works on 3 channels.*\[4, 2\]"),
    (lambda: ActNorm(3)(torch.ones(1, 3)), "at least two values"),
    (lambda: ActNorm(3).inverse(torch.ones(3)), "works on 3 channels"),
    (lambda: InvertibleLinear(3, "qr"), "'lu' or 'orthogonal', got 'qr'"),
    (lambda: InvertibleLinear(3)(torch.ones(1, 4)), "works on 3 channels"),
    (lambda: AdditiveCoupling(1, nn.Identity()), "at least 2, got 1"),
    (lambda: AdditiveCoupling(4, nn.Linear(2, 3))(torch.ones(1, 4)), r"net must map \[1, 2\] to \[1, 2\].*gave \[1, 3\]"),
    (lambda: AffineCoupling(4, nn.Linear(2, 2))(torch.ones(1, 4)), r"net must map \[1, 2\] to \[1, 4\]"),
    (lambda: AffineCoupling(4, nn.Linear(2, 4), bound=0), "bound must be positive"),
    (lambda: AffineCoupling(4, nn.Linear(2, 4), bound=math.inf), "bound must be positive"),
    (lambda: Squeeze()(torch.ones(1, 1, 3, 2)), r"even sides, got \[1, 1, 3, 2\]"),
    (lambda: Squeeze().inverse(torch.ones(1, 3, 2, 2)), r"\[b, 4c, h, w\]"),
    (lambda: Split(3), "must be even"),
    (lambda: Split(4)(torch.ones(1, 3, 2, 2)), "works on 4 channels"),
    (lambda: Split(4).inverse(torch.ones(1, 2, 2, 2), torch.ones(1, 1, 2, 2)), "works on 2 channels"),
    (lambda: VectorFlow(1), "dim must be at least 2, got 1"),
    (lambda: VectorFlow(4, 0), "n_blocks must be at least 1"),
    (lambda: VectorFlow(4, hidden=0), "hidden must be at least 1"),
    (lambda: VectorFlow(4, coupling="spline"), "'additive' or 'affine', got 'spline'"),
    (lambda: VectorFlow(4, mixing="none"), "'lu' or 'orthogonal'"),
    (lambda: VectorFlow(4)(torch.ones(2, 5)), r"x must be \[batch, 4\].*\[2, 5\]"),
    (lambda: VectorFlow(4)(torch.ones(4)), r"x must be \[batch, 4\]"),
    (lambda: VectorFlow(4).inverse(torch.ones(2, 3)), r"z must be \[batch, 4\]"),
    (lambda: VectorFlow(4)(torch.ones(2, 4).double()), r"float64 and the flow torch.float32.*\.to"),
    (lambda: VectorFlow(4)(torch.tensor([[0., 1., math.inf, math.nan]])), "2 values that are not finite"),
    (lambda: VectorFlow(4).sample(0), "n must be at least 1"),
    (lambda: VectorFlow(4).sample(2, temperature=-1), "temperature must be at least 0"),
    (lambda: Glow((3, 20, 16), L=3), "2\\^L = 8 must divide height 20"),
    (lambda: Glow((3, 16, 4), L=3), "must divide height 16 and width 4"),
    (lambda: Glow((0, 16, 16)), "channels must be at least 1"),
    (lambda: Glow((3, 16, 16), K=0), "K must be at least 1"),
    (lambda: Glow((3, 16, 16), L=0), "L must be at least 1"),
    (lambda: Glow((3, 16, 16), hidden=0), "hidden must be at least 1"),
    (lambda: Glow((3, 16, 16), coupling="x"), "'additive' or 'affine'"),
    (lambda: Glow((3, 16, 16), n_bits=0), "n_bits must be from 1 to 16"),
    (lambda: Glow((3, 16, 16), n_bits=17), "n_bits must be from 1 to 16"),
    (lambda: GLOW()(torch.ones(1, 3, 4, 4)), r"x must be \[batch, 1, 4, 4\].*\[1, 3, 4, 4\]"),
    (lambda: GLOW()(NAN), "16 values that are not finite"),
    (lambda: GLOW()(torch.full((1, 1, 4, 4), 255.)), r"in \[0, 1\].*divide 8-bit images by 255"),
    (lambda: GLOW()(-torch.ones(1, 1, 4, 4)), r"in \[0, 1\]"),
    (lambda: GLOW().log_prob(NAN), "not finite"),
    (lambda: GLOW().inverse(torch.ones(1, 15)), r"z must be \[batch, 16\].*\[1, 15\]"),
    (lambda: GLOW().inverse(torch.ones(16)), r"z must be \[batch, 16\]"),
    (lambda: GLOW().inverse(NAN.view(1, 16)), "not finite"),
    (lambda: GLOW().sample(1, temperature=math.nan), "temperature"),
])
def test_bad_input(call, says, untyped):
    with pytest.raises(ValueError, match=says): call()
