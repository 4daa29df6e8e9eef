"""3D-Shapes-like scenes: rays against sphere tracing, the order of the original, symmetries of the scene, splits, and agreement with real pictures."""
import colorsys
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader

from fairbook import shapes3d
from fairbook.data import data_folder
from fairbook.shapes3d import (FACTORS, SHAPES, Scene, Shapes3D, camera_rays, compose, geometry_frames, geometry_layers, hit_box, hit_capsule, hit_cylinder,
                               hit_plane, hit_sphere, hue_to_rgb, index_to_levels, label_map, levels_to_factors, levels_to_index, load_shapes3d_frames, render)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
FILM = pytest.mark.skipif(not (data_folder() / "shapes3d/3dshapes.gif").exists(), reason="the film of 3D Shapes is not in the data folder")
GRIDS = pytest.mark.skipif(not (data_folder() / "shapes3d/sample_0.png").exists(), reason="the sample pictures of 3D Shapes are not in the data folder")
DOUBLE = torch.float64


def vector(*x): return torch.tensor(x, dtype=DOUBLE)
def scene_of(hue=(.1, .5, .8), scale=1., shape=0, angle=0., dtype=DOUBLE): return torch.tensor([*hue, scale, shape, angle], dtype=dtype)


# --- the oracle: distance functions and steps, no equation is solved

def sd_plane(p, height): return (p[..., 1] - height).abs()
def sd_sphere(p, centre, r): return (p - centre).norm(dim=-1) - r

def sd_box(p, low, high):
    q = (p - (low + high) / 2).abs() - (high - low) / 2
    return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)

def sd_cylinder(p, r, low, high):
    q = torch.stack([p[..., ::2].norm(dim=-1) - r, (p[..., 1] - (low + high) / 2).abs() - (high - low) / 2], -1)
    return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)

def sd_capsule(p, r, low, high):
    core = torch.stack([torch.zeros_like(p[..., 1]), p[..., 1].clamp(low + r, high - r), torch.zeros_like(p[..., 1])], -1)
    return (p - core).norm(dim=-1) - r

def march(distance, o, d, far=60., steps=400):
    """Sphere tracing: (distance travelled or inf, whether that is sure). A ray that grazes a surface creeps along it in ever smaller steps; one that has
    not arrived anywhere in `steps`, or that passed within 1e-5 of the surface, is not sure."""
    t, least = torch.zeros_like(d[..., 0]), torch.full_like(d[..., 0], math.inf)
    for _ in range(steps):
        s = distance(o + t[..., None] * d)
        least = torch.where(t < far, torch.minimum(least, s), least)
        t = torch.where((s > 1e-9) & (t < far), t + s, t)
    return torch.where(least < 1e-8, t, torch.full_like(t, math.inf)), (least < 1e-8) | ((least > 1e-5) & (t >= far))

def solids(r, h, y):
    "name: (our function, its arguments, distance function)."
    c, low, high, half = vector(.2, y, -.3), vector(-r, y, -r / 2), vector(r, y + h, r / 2), (vector(r)[0], vector(y)[0], vector(y + h)[0])
    tall = (half[0], half[1], half[1] + 2 * r + h)
    return {"sphere": (hit_sphere, (c, half[0]), lambda p: sd_sphere(p, c, r)), "box": (hit_box, (low, high), lambda p: sd_box(p, low, high)),
            "cylinder": (hit_cylinder, half, lambda p: sd_cylinder(p, r, y, y + h)), "capsule": (hit_capsule, tall, lambda p: sd_capsule(p, r, *tall[1:]))}

@pytest.mark.parametrize("name", ["sphere", "box", "cylinder", "capsule"])
@given(seed=st.integers(0, 10**6), r=st.floats(.2, 1.5), h=st.floats(.1, 3), y=st.floats(-1, 1))
@settings(max_examples=25)
def test_hits_are_where_sphere_tracing_stops(name, seed, r, h, y):
    gen = torch.Generator().manual_seed(seed)
    hit, args, distance = solids(r, h, y)[name]
    o = torch.randn(200, 3, dtype=DOUBLE, generator=gen)
    o = o / o.norm(dim=1, keepdim=True) * 8   # outside of every solid
    middle = {"sphere": vector(.2, y, -.3), "capsule": vector(0, y + r + h / 2, 0)}.get(name, vector(0, y + h / 2, 0))
    d = middle + r * torch.randn(200, 3, dtype=DOUBLE, generator=gen) - o   # towards the solid
    d = d / d.norm(dim=1, keepdim=True)
    (t, n), (expected, clear) = hit(o, d, *args), march(distance, o, d)
    assert (t.isinf() == expected.isinf())[clear].all() and clear.sum() > 150
    both = clear & t.isfinite() & expected.isfinite()
    assert both.any() and (t - expected)[both].abs().max() < 1e-4
    p, e = (o + t[:, None] * d)[both], 1e-5
    slope = torch.stack([(distance(p + e * u) - distance(p - e * u)) / (2 * e) for u in torch.eye(3, dtype=DOUBLE)], -1)
    inner = (slope.norm(dim=1) - 1).abs() < 1e-6   # not on an edge, where no normal exists
    assert torch.allclose(n[both][inner], slope[inner], atol=1e-3) and torch.allclose(n[both].norm(dim=1), torch.ones(int(both.sum()), dtype=DOUBLE))
    assert ((n[both] * d[both]).sum(1) <= 1e-6).all()   # normals look towards the origin of the ray


@given(seed=st.integers(0, 10**6), height=st.floats(-2, 2))
def test_planes(seed, height):
    gen = torch.Generator().manual_seed(seed)
    o, d = torch.randn(2, 50, 3, dtype=DOUBLE, generator=gen)
    t, n = hit_plane(o, d, height)
    assert torch.allclose((o + t[:, None] * d)[t.isfinite(), 1], torch.tensor(height, dtype=DOUBLE))
    assert (t.isfinite() == ((height - o[:, 1]) * d[:, 1] > 0)).all() and ((n * d).sum(1)[t.isfinite()] < 0).all()


def test_rays_behind_and_beside_miss():
    away = vector(0, 0, 1)
    for hit, args, _ in solids(.5, 1., 0.).values(): assert hit(vector(0, .5, 5), away, *args)[0].isinf() and hit(vector(5, 9, 5), away, *args)[0].isinf()
    assert hit_plane(vector(0, 1, 0), vector(1, 0, 0))[0].isinf()


def marched_labels(factors, size, scene):
    "The label map by sphere tracing, one ray per pixel; -1 where two surfaces are too close to call."
    s, shape, angle = factors[3].item(), int(factors[4]), factors[5:6]
    o, d = camera_rays(angle, size, scene)
    shift = vector(0, 0, scene.offset)
    if shape == 0:
        w, h = scene.cube[0] * s, scene.cube[1] * s
        thing = lambda p: sd_box(p - shift, vector(-w / 2, 0, -w / 2), vector(w / 2, h, w / 2))
    elif shape == 2: thing = lambda p: sd_sphere(p - shift, vector(0, scene.sphere[1] * s, 0), scene.sphere[0] * s)
    else:
        r, h = (s * x for x in (scene.cylinder if shape == 1 else scene.capsule))
        thing = lambda p: (sd_cylinder if shape == 1 else sd_capsule)(p - shift, r, torch.tensor(0.).double(), torch.tensor(h).double())
    thick, S, B, H = 3., scene.side, scene.back, scene.wall
    slabs = [(vector(-S - thick, 0, -B - thick), vector(-S, H, 30)), (vector(S, 0, -B - thick), vector(S + thick, H, 30)), (vector(-S, 0, -B - thick), vector(S, H, -B))]
    wall = lambda p: torch.stack([sd_box(p, a, b) for a, b in slabs]).amin(0)
    floor = lambda p: torch.maximum(sd_box(p, vector(-S, -thick, -B), vector(S, 0, 30)), torch.zeros(1, dtype=DOUBLE))
    marched = [march(f, o[0], d[0]) for f in (wall, floor, thing)]
    found = torch.stack([torch.full_like(d[0, ..., 0], 59.)] + [t for t, _ in marched])
    near, sure = found.sort(0).values, torch.stack([sure for _, sure in marched]).all(0)
    return torch.where(sure & (near[1] - near[0] > 1e-3), found.argmin(0), -1)

@given(st.integers(0, 3), st.floats(.75, 1.25), st.floats(-30, 30))
@settings(max_examples=12)
def test_label_maps_are_what_sphere_tracing_sees(shape, scale, angle):
    f = scene_of(scale=scale, shape=shape, angle=angle)
    ours, theirs = label_map(f, 24, samples=1), marched_labels(f, 24, Scene())
    sure = theirs >= 0
    assert (ours == theirs)[sure].all() and sure.float().mean() > .9


@pytest.mark.parametrize("shape", range(4))
def test_shadows_are_where_a_walk_to_the_lamp_is_stopped(shape):
    scene, f = Scene(), scene_of(shape=shape, angle=13.)
    hits = shapes3d._trace(shape, f[3:4], f[5:6], 40, scene)
    floor = hits.point[hits.surface == 2]
    to = vector(*scene.lamp) - floor
    l, dark = to / to.norm(dim=1, keepdim=True), torch.zeros(len(floor), dtype=torch.bool)
    for t in torch.linspace(.002, 6, 1500).double():   # small blind steps
        p = (floor + t * l - vector(0, 0, scene.offset))
        w, h = (x for x in ((scene.cube, scene.cylinder, scene.sphere, scene.capsule)[shape]))
        dark |= {0: lambda: ((p[:, ::2].abs() <= w / 2).all(1) & (p[:, 1] <= h) & (p[:, 1] >= 0)), 1: lambda: (p[:, ::2].norm(dim=1) <= w) & (p[:, 1] <= h),
                 2: lambda: sd_sphere(p, vector(0, h, 0), w) <= 0, 3: lambda: sd_capsule(p, w, torch.tensor(0.).double(), torch.tensor(h).double()) <= 0}[shape]()
    _, lit = shapes3d._lamp(hits, scene)
    assert (lit[hits.surface == 2] == ~dark).float().mean() > .995 and dark.any()


# --- the order of the original, colours

@given(st.lists(st.integers(0, 479_999), min_size=1, max_size=30))
def test_index_and_levels_follow_the_row_major_order(index):
    levels = index_to_levels(torch.tensor(index))
    assert levels.tolist() == np.stack(np.unravel_index(index, tuple(FACTORS.values())), 1).tolist()
    assert levels_to_index(levels).tolist() == index


def test_values_are_those_of_the_original():
    values = levels_to_factors(index_to_levels(torch.arange(480_000)))
    grid = [np.arange(10) / 10] * 3 + [np.linspace(.75, 1.25, 8), np.arange(4.), np.linspace(-30, 30, 15)]
    for column, expected in zip(values.unbind(1), grid): assert np.allclose(column.unique(), expected)
    assert torch.allclose(values[:15, 5], torch.linspace(-30, 30, 15, dtype=DOUBLE))


@given(st.floats(0, 1))
def test_hues_are_those_of_the_standard_library(h):
    assert np.allclose(hue_to_rgb(torch.tensor(h, dtype=DOUBLE)), colorsys.hsv_to_rgb(h, 1, 1), atol=1e-12)


# --- properties of the pictures

@given(st.integers(0, 3), st.floats(.75, 1.25), st.floats(0, 30))
@settings(max_examples=15)
def test_mirrored_camera_mirrored_labels(shape, scale, angle):
    "The scene, without its lamp, is symmetric: turning left mirrors turning right."
    left, right = (label_map(scene_of(scale=scale, shape=shape, angle=a), 32) for a in (-angle, angle))
    assert (left == right.flip(-1)).float().mean() > .998


@pytest.mark.parametrize("shape", range(4))
@pytest.mark.parametrize("size, samples", [(21, 1), (7, 3)])
def test_the_middle_column_sees_the_wall(size, samples, shape):
    "With an odd number of rays one of them runs straight to the back, parallel to the side walls."
    f = scene_of(scale=.75, shape=shape)
    labels = label_map(f, size, samples)
    assert (labels == labels.flip(-1)).all() and 1 in labels[:, size // 2] and geometry_layers(f, size, samples).isfinite().all()


@given(st.floats(.3, 5), st.integers(0, 3))
@settings(max_examples=12)
def test_a_room_of_another_size_is_the_same_picture(factor, shape):
    "Theorem behind fixing `radius`: pictures depend on ratios of lengths only."
    one, grow = Scene(), lambda x: tuple(factor * y for y in x) if isinstance(x, tuple) else factor * x
    lengths = ("radius", "height", "back", "side", "wall", "offset", "cube", "cylinder", "sphere", "capsule", "lamp")
    other = replace(one, **{name: grow(getattr(one, name)) for name in lengths})
    f = scene_of(shape=shape, angle=11.)
    assert ((render(f, 32, scene=one) - render(f, 32, scene=other)).abs() > 1e-6).float().mean() < .002


def test_smaller_pictures_are_means_of_larger_ones():
    f = torch.stack([scene_of(shape=k, angle=10. * k - 15) for k in range(4)])
    assert torch.allclose(geometry_layers(f, 16, samples=6), avg_pool2d(geometry_layers(f, 32, samples=3), 2))


def test_the_first_and_the_last_hue_are_the_same():
    a, b = (render(scene_of((h, h, h), shape=3), 16) for h in (0., 1.))
    assert torch.allclose(a, b)


def test_each_layer_answers_to_its_own_hue():
    f = scene_of(shape=2, angle=-20.)
    label, base = label_map(f, 32), render(f, 32)
    whole = (geometry_layers(f[None], 32)[0, [0, 1, 2, 4]] > 0).sum(0) == 1
    for k, surface in enumerate((2, 1, 3)):
        g = f.clone()
        g[k] = .33
        changed = (render(g, 32) - base).abs().sum(0) > 1e-9
        assert (changed == (label == surface))[whole].all()


def test_more_rays_change_little_and_less_and_less():
    f = scene_of(shape=1, angle=17.)
    fine = render(f, 32, samples=12)
    errors = [(render(f, 32, samples=k) - fine).abs().mean().item() for k in (1, 3, 6)]
    assert errors[0] > errors[1] > errors[2] and errors[1] < .005


def test_gradients_in_the_hues_and_none_in_the_geometry():
    dim = Scene(light=.2, ambient=.2, gloss=.02)   # nothing is clipped
    f = torch.stack([scene_of((.05, .4, .72), shape=k, angle=9. * k) for k in (0, 3)]).requires_grad_()
    fixed = f.detach()
    assert torch.autograd.gradcheck(lambda h: render(torch.cat([h, fixed[:, 3:]], 1), 6, 2, dim), (f[:, :3].detach().requires_grad_(),))
    grad, = torch.autograd.grad(render(f, 8).sum(), f)
    assert (grad[:, 3:] == 0).all() and (grad[:, :3] != 0).any()


def test_angles_beyond_the_original_only_on_request():
    f = scene_of(shape=3, angle=30.)
    assert torch.equal(render(f, 16), render(f, 16, strict=False))
    for a in (31., -95., 180.): assert render(scene_of(angle=a), 16, strict=False).isfinite().all() and label_map(scene_of(angle=a), 16, strict=False).ge(0).all()
    assert torch.allclose(render(scene_of(angle=400.), 16, strict=False), render(scene_of(angle=40.), 16, strict=False), atol=.05)


def test_pictures_jump_as_the_angle_moves():
    "Why no Lipschitz bound over the angle can hold: halving an interval 34 times leaves the movement where it was."
    seen, low, high = lambda a: render(scene_of((.1, .6, .3), angle=a), 32).flatten(), -4.9, -4.8
    for _ in range(34):
        middle = (low + high) / 2
        a, b, c = map(seen, (low, middle, high))
        low, high = (low, middle) if (b - a).norm() > (c - b).norm() else (middle, high)
    assert high - low < 1e-11 and (seen(high) - seen(low)).norm() > .1


def test_many_scenes_are_drawn_in_parts(monkeypatch):
    f = torch.stack([scene_of(shape=k % 4, angle=3. * k) for k in range(9)])
    whole, labels = geometry_layers(f, 8), label_map(f, 8)
    monkeypatch.setattr(shapes3d, "_RAYS", 600)   # one scene at a time
    assert torch.equal(geometry_layers(f, 8), whole) and torch.equal(label_map(f, 8), labels)


def test_empty_batches_and_single_scenes():
    none = torch.zeros(0, 6)
    assert render(none, 8).shape == (0, 3, 8, 8) and label_map(none, 8).shape == (0, 8, 8) and geometry_layers(none.double(), 8).dtype == DOUBLE
    assert torch.equal(geometry_layers(scene_of(), 8), geometry_layers(scene_of()[None], 8)[0])
    assert levels_to_factors(torch.zeros(2, 6, dtype=torch.long), torch.float32).dtype == torch.float32


def test_gradients_in_the_layers():
    layers = (.2 * torch.rand(1, 5, 3, 3, dtype=DOUBLE)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: compose(x, torch.tensor([[.1, .4, .9]], dtype=DOUBLE)), (layers,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_dtypes_devices_and_batches(device, dtype):
    f = torch.stack([scene_of(shape=k, angle=7. * k, dtype=dtype) for k in (3, 0, 2, 1, 3, 0)]).to(device)
    x = render(f.reshape(2, 3, 6), 16)
    assert x.shape == (2, 3, 3, 16, 16) and x.dtype == dtype and x.device.type == device
    assert torch.allclose(x[1, 0], render(f[3], 16), atol=1e-5) and 0 <= x.min() and x.max() <= 1
    assert torch.allclose(x.double().cpu(), render(f.double().cpu(), 16).reshape(x.shape), atol=.05) and label_map(f, 16).device.type == device


# --- the data set

def test_pictures_of_the_grid_are_those_of_render():
    everything = Shapes3D(32, "all")
    rows = torch.randint(480_000, (40,), generator=torch.Generator().manual_seed(1))
    x, levels = everything.batch(rows)
    assert (levels == index_to_levels(rows)).all() and torch.allclose(x, render(levels_to_factors(levels).float(), 32), atol=1e-5)


def test_splits_are_a_division():
    parts = [Shapes3D(8, s, correlated=False) for s in ("train", "valid", "test")]
    assert [len(p) for p in parts] == [384_000, 48_000, 48_000] and torch.cat([p.index for p in parts]).unique().numel() == 480_000
    assert (Shapes3D(8, "test").index == parts[2].index).all() and (Shapes3D(8, "test", seed=1).index != parts[2].index).any()
    assert [len(range(0, n, 320)) for n in (47_680, 47_681, 48_000, 48_001)] == [149, 150, 150, 151]   # sizes that give the paper's number of test pictures


@pytest.mark.parametrize("target, sensitive", [("object_hue", "orientation"), ("shape", "scale"), ("orientation", "wall_hue")])
def test_the_correlated_split_by_its_definition(target, sensitive):
    kept, full = (Shapes3D(8, correlated=c, target=target, sensitive=sensitive) for c in (True, False))
    def half(row, name):
        level, n = row[list(FACTORS).index(name)], FACTORS[name]
        return 0 if level < n // 2 else None if n % 2 and level == n // 2 else 1
    sample = full.index[:4000]
    rows = index_to_levels(sample).tolist()
    expected = [i for i, r in zip(sample.tolist(), rows) if half(r, target) == half(r, sensitive) is not None]
    assert kept.index[:len(expected)].tolist() == expected


def test_the_paper_drops_the_middle_angle():
    levels = index_to_levels(Shapes3D(8).index)
    assert {(h, a) for h, a in levels[:, [2, 5]].tolist()} == {(h, a) for h in range(5) for a in range(7)} | {(h, a) for h in range(5, 10) for a in range(8, 15)}


@pytest.mark.parametrize("workers, size", [(0, 7), (0, 50), (2, 7)])
def test_loaders_give_the_same_pictures_however_they_ask(workers, size):
    test = Shapes3D(8, "test", samples=1)
    some = torch.utils.data.Subset(test, range(100))
    batches = list(DataLoader(some, batch_size=size, num_workers=workers))
    x, levels = (torch.cat(b) for b in zip(*batches))
    assert torch.allclose(x, test.batch(list(range(100)))[0], atol=1e-6) and (levels_to_index(levels) == test.index[:100]).all()


def test_pickle_and_single_items():
    test = pickle.loads(pickle.dumps(Shapes3D(8, "test", samples=1)))
    x, levels = test[17]
    assert x.shape == (3, 8, 8) and levels.shape == (6,) and torch.allclose(x, Shapes3D(8, "test", samples=1)[17][0])


@pytest.mark.parametrize("factor", FACTORS)
def test_similar_scenes_differ_in_one_factor_only(factor):
    test, k = Shapes3D(8, "test", samples=1), list(FACTORS).index(factor)
    x, levels = test.similar(4, factor)
    own = index_to_levels(test.index[4])
    assert levels[:, k].tolist() == list(range(FACTORS[factor])) and (levels == own).sum(1).min() == 5 and len(x) == FACTORS[factor]
    assert torch.allclose(x[own[k]], test[4][0], atol=1e-6)


def test_items_by_slice_tensor_mask_and_number():
    test = Shapes3D(8, "test", samples=1)
    expected, mask = test.batch([3, 4, 5]), torch.zeros(len(test), dtype=torch.bool)
    mask[3:6] = True
    for rows in (slice(3, 6), torch.tensor([3, 4, 5]), [3, 4, 5], np.array([3, 4, 5]), mask):
        assert all(torch.equal(a, b) for a, b in zip(test[rows], expected))
    assert torch.allclose(test[torch.tensor(4)][0], expected[0][1], atol=1e-6) and torch.equal(test[-1][1], test[len(test) - 1][1])
    assert test.batch([])[0].shape == (0, 3, 8, 8) and test[5:5][1].shape == (0, 6)
    with pytest.raises(IndexError): test[len(test)]


@pytest.mark.parametrize("target, sensitive", [("object_hue", "orientation"), ("shape", "floor_hue")])
def test_labels_and_repr_and_warm(target, sensitive):
    test = Shapes3D(8, "test", target=target, sensitive=sensitive, samples=1, seed=3)
    levels = test.batch([0, 1, 2])[1]
    y, s = test.labels(levels)
    assert y.tolist() == levels[:, list(FACTORS).index(target)].tolist() and s.tolist() == levels[:, list(FACTORS).index(sensitive)].tolist()
    assert (test.target, test.sensitive, test.split, test.seed, test.correlated) == (target, sensitive, "test", 3, True)
    assert all(x in repr(test) for x in (target, sensitive, "48000", "seed=3")) and test.warm() is test


def test_similar_for_many_rows_and_orbits():
    test = Shapes3D(8, "test", samples=1)
    x, levels = test.similar([4, 9, 2])
    assert x.shape == (3, 15, 3, 8, 8) and torch.allclose(x[1], test.similar(9)[0], atol=1e-6) and torch.equal(levels[2], test.similar(2)[1])
    angles = levels_to_factors(levels[0])[:, 5]
    turned, factors = test.orbit([4, 9, 2], angles)
    assert turned.dtype == DOUBLE and torch.allclose(factors, levels_to_factors(levels)) and (turned - x).abs().mean() < 1e-3
    assert test.orbit(4, torch.tensor([7.3]))[0].shape == (1, 3, 8, 8) and test.orbit(4, torch.tensor([33.]), strict=False)[1][0, 5] == 33


@pytest.mark.parametrize("device", DEVICES)
def test_devices_of_the_data_set(device):
    x, levels = Shapes3D(8, "test", samples=1, device=device).batch([0, 5])
    assert x.device.type == levels.device.type == geometry_frames(8, 1, device=device).device.type == device
    assert torch.allclose(x.cpu(), Shapes3D(8, "test", samples=1).batch([0, 5])[0], atol=.05)


def test_frames_are_kept_once():
    assert geometry_frames(8, 1) is geometry_frames(size=8, samples=1, device=torch.device("cpu")) is geometry_frames(8, 1, Scene()) and Shapes3D(8).batch([0])[0].shape == (1, 3, 8, 8)
    assert not torch.equal(geometry_frames(8, 1), geometry_frames(8, 1, Scene(fov=60.)))


# --- real pictures

@FILM
def test_labels_agree_with_real_frames():
    "At least 99.5 % of the pixels of the first fifteen frames, labelled by the strongest colour."
    real = load_shapes3d_frames()[:15]
    red, green, blue = real.unbind(1)
    sky = (red > .3) & (green > .62) & (blue > .6)
    thing = (green > .45) & ~sky & (green > 1.1 * blue) & (green > red)
    seen = torch.where(sky, 0, torch.where(thing, 3, torch.where(blue > red, 1, 2)))
    ours = label_map(torch.stack([scene_of(scale=.75, angle=a) for a in torch.linspace(-30, 30, 15).tolist()]))
    assert (ours == seen).float().mean() >= .995


@FILM
def test_colours_agree_with_real_frames():
    real = load_shapes3d_frames()
    f = torch.tensor([[0, .6, .3, .75, 0, a] for a in torch.linspace(-30, 30, 15)] + [[0, .6, .3, .75, k, 30] for k in (1, 2, 3)]).float()
    assert (render(f) - real[:18]).abs().mean() < .012


def sample_pictures():
    "The 50 pictures [50, 3, 64, 64] of the original's loading notebook: two grids of 5 x 5, plotted without smoothing."
    middles = lambda starts, stops: ((np.arange(64) + .5) / 64 * (np.array(stops) - starts)[:, None] + np.array(starts)[:, None]).astype(int)
    rows = middles([6.7, 179.7, 352.7, 525.7, 698.7], [151, 324, 497, 671, 844])   # where the 64 x 64 pixels of each panel lie, from their boundaries
    columns = middles([7, 180, 354, 527, 700], [153, 326, 499, 672, 845])
    grids = [np.asarray(Image.open(data_folder() / f"shapes3d/sample_{k}.png").convert("RGB")) for k in (0, 1)]
    return torch.from_numpy(np.stack([g[np.ix_(a, b)] for g in grids for a in rows for b in columns])).movedim(-1, 1).float() / 255

@GRIDS
def test_pictures_that_the_fit_has_never_seen():
    "Each of the 50 is within 1.6 % of one of the 480 geometries in its own hues, and within 1.3 % on average."
    colours, errors = hue_to_rgb(torch.arange(10) / 10), []
    hue = lambda patch: ((colours / colours.norm(dim=1, keepdim=True)) @ patch.mean((1, 2))).argmax() / 10
    for x in sample_pictures():
        hues = torch.stack([hue(x[:, 58:63, 2:30]), hue(x[:, 28:34, 1:10]), hue(x[:, 44:50, 31:33])])
        errors.append((compose(geometry_frames(64), hues.expand(480, 3)) - x).abs().mean((1, 2, 3)).min().item())
    assert np.mean(errors) < .013 and np.max(errors) < .016


# --- bad inputs

GOOD = scene_of()

def bad(k, value):
    f = GOOD.clone()
    f[k] = value
    return f

@pytest.mark.parametrize("call, message", [
    (lambda: index_to_levels(torch.tensor([480_000])), "index.*between 0 and 479999.*480000"),
    (lambda: index_to_levels(torch.tensor([-1])), "index.*-1"),
    (lambda: levels_to_index(torch.tensor([0, 0, 0, 8, 0, 0])), "scale must lie between 0 and 7"),
    (lambda: levels_to_factors(torch.tensor([0, 0, -1, 0, 0, 0])), "object_hue.*-1"),
    (lambda: render(bad(0, 1.1)), "floor_hue must lie between 0 and 1, got 1.1"),
    (lambda: render(bad(1, math.nan)), "wall_hue.*nan"),
    (lambda: render(bad(3, .5)), "scale must lie between 0.75 and 1.25"),
    (lambda: label_map(bad(5, 31.)), "orientation.*31"),
    (lambda: label_map(bad(4, 1.5)), "shape must be 0, 1, 2 or 3"),
    (lambda: geometry_layers(bad(4, 4.)[None]), "shape must lie between 0 and 3"),
    (lambda: render(torch.zeros(5)), "float tensor .*6.*shape .5"),
    (lambda: render(torch.zeros(6, dtype=torch.long)), "float tensor"),
    (lambda: render(GOOD, 0), "`size` must be a whole number from 1"),
    (lambda: render(GOOD, 8, samples=17), "`samples` must be a whole number from 1 to 16"),
    (lambda: render(GOOD.half()), "float32 or float64.*float16"),
    (lambda: render(bad(5, math.inf), strict=False), "orientation.*inf"),
    (lambda: camera_rays(torch.zeros(1), 0), "`size` must be a whole number from 1.*0"),
    (lambda: compose(torch.zeros(2, 5, 4, 4), torch.zeros(1, 3)), "one row per set.*2.*1, 3"),
    (lambda: Scene(fov=200.), "`fov` must lie between 0 and 180.*200"),
    (lambda: Scene(wall=-1.), "`wall` is a length"),
    (lambda: Shapes3D(8, correlated="no"), "`correlated` must be True or False, got 'no'"),
    (lambda: Shapes3D(8, "test", samples=1)[[.5]], "`rows` must be whole numbers"),
    (lambda: Shapes3D(8, "test", samples=1).orbit(0, torch.tensor([31.])), "orientation.*31"),
    (lambda: Shapes3D(2000), "`size`.*2000"),
    (lambda: Shapes3D(8, "validation"), "`split` must be one of.*'valid'.*'validation'"),
    (lambda: Shapes3D(8, target="hue"), "`target` must be one of"),
    (lambda: Shapes3D(8, sensitive="angle"), "`sensitive` must be one of"),
    (lambda: Shapes3D(8, target="shape", sensitive="shape"), "two factors"),
    (lambda: Shapes3D(8, "test", samples=1).similar(0, "angle"), "`factor` must be one of")])
def test_bad_input(call, message, untyped):
    with pytest.raises(ValueError, match=message): call()


def test_names(): assert len(SHAPES) == 4 and math.prod(FACTORS.values()) == 480_000
