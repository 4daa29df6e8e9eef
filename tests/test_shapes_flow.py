"""`fairbook.shapes_flow`: the shipped weights, the training that made them, latents that do not depend on the batch, and the flow whose way back misses."""
import shutil
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import fairbook
from fairbook import flow_training, shapes_flow
from fairbook.flow_training import save_tensors
from fairbook.flows import Glow
from fairbook.shapes3d import Shapes3D
from fairbook.shapes_flow import encode_scenes, load_shapes_flow, new_shapes_flow, round_trip_error, train_shapes_flow

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
BUG = lambda reason: pytest.mark.xfail(strict=True, reason=f"open: {reason}")      # strict: the mark must go when it is repaired
WEIGHTS = Path(fairbook.__file__).parent / "weights"
SHIPPED = load_shapes_flow()
same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def small(seed=0, gain=0.):
    "A small flow that is not the identity; its couplings shift by numbers of size `gain`."
    torch.manual_seed(seed)
    flow = new_shapes_flow(8, 2, 2, 8)
    with torch.no_grad():
        for name, p in flow.named_parameters():
            if "net.last" in name: p.copy_(gain * torch.randn_like(p))
    return flow.eval()


def draws(n, d, dtype=torch.float32): return torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(5))


# --- the files

def test_the_shipped_flow_is_frozen_in_shape_and_in_evaluation_mode():
    assert SHIPPED.image_shape == (3, 32, 32) and SHIPPED.n_bits == 5 and not SHIPPED.training and same(SHIPPED, load_shapes_flow())
    assert all(p.isfinite().all() for p in SHIPPED.parameters()) and SHIPPED.levels[0].steps[0].norm.started


def test_a_changed_byte_is_refused(tmp_path, monkeypatch):
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr(shapes_flow, "files", lambda package: tmp_path)
    assert same(load_shapes_flow(), SHIPPED)
    path = tmp_path / "weights" / "shapes32.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="shapes32.safetensors has sha256 .* damaged"): load_shapes_flow()


def test_weights_are_small_and_are_packaged():
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    patterns = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fairbook"]
    assert sum(p.stat().st_size for p in files) <= 12e6 and {p.name for p in files} >= {"shapes32.safetensors", "shapes32.safetensors.sha256"}
    assert all(any(fnmatch(str(p.relative_to(WEIGHTS.parent)), pattern) for pattern in patterns) for p in files)


def test_the_shipped_flow_has_learnt_scenes():
    "Scenes that it has not seen cost less than half the bits of an untrained flow, and noise costs more than scenes."
    x, bits = Shapes3D(32, "test").batch(list(range(0, 4000, 100)))[0], lambda flow, x: float(flow.bits_per_dim(x, torch.Generator().manual_seed(0)).mean())
    torch.manual_seed(0)
    with torch.no_grad(): assert bits(SHIPPED, x) < .5 * bits(new_shapes_flow().eval(), x) and bits(SHIPPED, x) < .5 * bits(SHIPPED, torch.rand_like(x))


# --- the way back

def test_the_way_back_of_the_shipped_flow():
    z = torch.cat([draws(16, SHIPPED.dim), 3 * draws(4, SHIPPED.dim), encode_scenes(SHIPPED, Shapes3D(32, "test"), range(12))[0]])
    assert round_trip_error(SHIPPED, z).max() < 2e-3 and round_trip_error(load_shapes_flow().double(), z.double()).max() < 1e-10
    assert SHIPPED.n_bits == 5                                                  # the copy lost its bins, not the flow


class Missing(Glow):
    "A flow whose way back misses by a known vector for each row; its bins must be off, or pictures would be rounded."
    def inverse(self, z): return z.view(-1, 3, 2, 2)
    def forward(self, x): return x.flatten(1) + self.by if self.n_bits is None else None, None


@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]))
def test_the_error_is_the_distance_by_which_the_way_back_misses(seed, dtype):
    flow, gen = Missing((3, 2, 2), 1, 1, hidden=2).eval(), torch.Generator().manual_seed(seed)
    flow.by = torch.randn(4, 12, generator=gen, dtype=dtype)
    got = round_trip_error(flow, torch.randn(4, 12, generator=gen, dtype=dtype))
    assert got.shape == (4,) and got.dtype == dtype and flow.n_bits == 5 and torch.allclose(got, flow.by.square().sum(1).sqrt(), atol=1e-5)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.floats(0, .3))
def test_additive_couplings_lead_back_whatever_their_weights(seed, gain):
    assert round_trip_error(small(seed, gain).double(), draws(3, 192, torch.float64)).max() < 1e-9


@pytest.mark.parametrize("gain, low, high", [(1e-2, 0, 1e-4), (10., 1., float("inf"))])
def test_a_flow_with_large_weights_loses_its_way(gain, low, high):
    "Additive couplings are bijections for all weights; floating point is not. More digits help."
    error, fine = (round_trip_error(small(0, gain).to(dtype), draws(8, 192, dtype)) for dtype in (torch.float32, torch.float64))
    assert low <= error.min() and error.max() < high and fine.max() < 1e-6 * error.max()



@pytest.mark.parametrize("use", [lambda f: round_trip_error(f, draws(3, 192)), lambda f: encode_scenes(f, Shapes3D(8, "test", samples=1), [0, 1, 2])])
def test_looking_at_a_flow_does_not_change_it(use):
    flow = new_shapes_flow(8, 1, 1, 4)
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    try: use(flow)
    except ValueError: pass
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())



def test_another_training_with_the_same_path_is_another_training(tmp_path):
    flows = [train_shapes_flow(tmp_path / "f", small(), n=8, epochs=1, batch_size=4, seed=seed, progress=False) for seed in (0, 1)]
    assert not same(*flows)


# --- latents of scenes

@pytest.mark.parametrize("batch_size", [1, 7, 23])
def test_latents_do_not_depend_on_the_batch(batch_size):
    scenes, rows = Shapes3D(32, "test"), [3, 5, 47_999, 3] + list(range(19))
    (z, levels), (other, other_levels) = encode_scenes(SHIPPED, scenes, rows), encode_scenes(SHIPPED, scenes, rows, batch_size=batch_size)
    assert (z - other).abs().max() < 1e-5 and torch.equal(levels, other_levels) and torch.equal(levels, scenes.batch(rows)[1]) and not z.requires_grad
    with torch.no_grad(): assert (z[2] - SHIPPED(scenes.batch([47_999])[0])[0][0]).abs().max() < 1e-5
    assert torch.equal(z[0], z[3]) or (z[0] - z[3]).abs().max() < 1e-5


def test_all_rows_and_decoding():
    flow, scenes = small(1, .1), Shapes3D(8, "test", samples=1)
    scenes.index = scenes.index[:33]
    z, levels = encode_scenes(flow, scenes, batch_size=10)
    x = scenes.batch(list(range(33)))[0]
    with torch.no_grad(): assert len(z) == len(levels) == 33 and (flow.inverse(z) - flow.quantize(x)).abs().max() < 1e-4



def test_a_mask_takes_the_rows_that_it_marks(untyped):
    "As in `Shapes3D.batch`."
    flow, scenes = small(1, .1), Shapes3D(8, "test", samples=1)
    scenes.index = scenes.index[:30]
    mask = torch.arange(30) % 3 == 1
    assert torch.equal(encode_scenes(flow, scenes, mask, batch_size=10)[1], scenes.batch(mask)[1])


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match="scenes have 16 pixels along a side, the flow takes 8; use Shapes3D.8"): encode_scenes(small(), Shapes3D(16, "test"), [0])


# --- training

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flows")
    return [train_shapes_flow(folder / f"{k}.safetensors", small(), n=96, epochs=k, batch_size=16, progress=False) for k in (1, 6)], folder


def test_more_passes_cost_fewer_bits(trained):
    (short, long), folder = trained
    x = Shapes3D(8, "test").batch(list(range(100)))[0]
    with torch.no_grad(): few, many = (float(f.bits_per_dim(x, torch.Generator().manual_seed(0)).mean()) for f in (short, long))
    assert many < few - .2 and not long.training and same(flow_training.load_flow(small(9), folder / "6.safetensors"), long)


def test_a_killed_training_ends_with_the_same_weights(trained, tmp_path, monkeypatch):
    options = dict(n=96, epochs=6, batch_size=16, progress=False)
    def save_then_die(*args):
        save_tensors(*args)
        if flow_training.load_tensors(args[1])[0]["history"].shape[0] == 3: raise KeyboardInterrupt
    monkeypatch.setattr(flow_training, "save_tensors", save_then_die)
    with pytest.raises(KeyboardInterrupt): train_shapes_flow(tmp_path / "f.safetensors", small(), **options)
    assert not (tmp_path / "f.safetensors").exists() and list(tmp_path.glob("f.safetensors.*.checkpoint"))
    monkeypatch.undo()
    assert same(train_shapes_flow(str(tmp_path / "f.safetensors"), small(3), **options), trained[0][1])      # the checkpoint knows the weights


def test_the_default_flow_is_the_shipped_shape_and_its_seed_matters(tmp_path):
    tiny = [train_shapes_flow(tmp_path / f"{i}", n=4, epochs=1, batch_size=2, seed=seed, progress=False) for i, seed in enumerate((0, 0, 1))]
    assert same(tiny[0], tiny[1]) and not same(tiny[0], tiny[2])
    assert [v.shape for v in tiny[0].state_dict().values()] == [v.shape for v in SHIPPED.state_dict().values()]


@pytest.mark.parametrize("device", DEVICES)
def test_devices(device, tmp_path):
    flow, (z, levels) = load_shapes_flow(device), encode_scenes(load_shapes_flow(device), Shapes3D(32, "test"), [1, 2])
    assert flow.prior.device.type == device and z.device.type == levels.device.type == "cpu" and (z - encode_scenes(SHIPPED, Shapes3D(32, "test"), [1, 2])[0]).abs().max() < 1e-3
    assert round_trip_error(flow, z.to(device)).max() < 2e-3
    assert train_shapes_flow(tmp_path / "f", small(), n=8, epochs=1, batch_size=4, device=device, progress=False).prior.device.type == device


@pytest.mark.parametrize("options, message", [(dict(epochs=0), "epochs must be"), (dict(batch_size=1), "batch_size must be"), (dict(n=1), "at least 2 rows")])
def test_bad_training_is_refused_and_leaves_no_file(options, message, tmp_path):
    with pytest.raises(ValueError, match=message): train_shapes_flow(tmp_path / "f", small(), **dict(n=8, epochs=1, progress=False) | options)
    assert not list(tmp_path.iterdir())
