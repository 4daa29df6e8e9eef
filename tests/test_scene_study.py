"""`fairbook.scene_study`: draws, directions, the models of chapter 2's tables, their files, and the training that made them."""
import shutil
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.decomposition import PCA
from torch import nn

import fairbook
from fairbook import scene_study
from fairbook.lassi import LassiEncoder, SimilaritySet, certify_dataset, mlp_encoder
from fairbook.scene_study import (MODELS, SIGMAS, SceneDraw, SceneModel, draw_scenes, level_means, load_scene_model, make_weights, pair_vectors, rotation_latents, save_scene_model,
                                  shipped_file, shipped_similarity, similar_sets, train_scene_model, variation_directions)
from fairbook.shapes3d import Shapes3D
from fairbook.shapes_flow import load_shapes_flow, new_shapes_flow

WEIGHTS = Path(fairbook.__file__).parent / "weights"
FLOW = load_shapes_flow()
TINY = new_shapes_flow(8, 1, 1, 4).eval()
gen = lambda seed=0: torch.Generator().manual_seed(seed)
same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- scenes and directions

def test_draws_repeat_differ_by_seed_and_keep_their_rows():
    one, again, other = (draw_scenes(TINY, "train", 20, s) for s in (3, 3, 4))
    assert one.z.equal(again.z) and not one.rows.equal(other.rows) and one.y.shape == (20,)
    scenes = Shapes3D(8, "train")
    x, levels = scenes.batch(one.rows)
    with torch.no_grad(): assert torch.allclose(TINY(x)[0], one.z, atol=1e-5)
    assert scenes.labels(levels)[0].equal(one.y)


def test_training_draws_are_biased_and_test_draws_are_not():
    side = lambda split: (draw_scenes(TINY, split, 300, 1), Shapes3D(8, split))
    for split, want in (("train", 1.), ("test", .5)):
        d, scenes = side(split)
        s = scenes.labels(scenes.batch(d.rows)[1])[1]
        agree = ((d.y < 5) == (s < 7))[s != 7].float().mean()
        assert abs(agree - want) < .1 and (want < 1 or agree == 1)


@pytest.mark.parametrize("n", [0, -1, 10**7])
def test_impossible_numbers_of_scenes_are_refused(n):
    with pytest.raises(ValueError, match="n must be between 1 and"): draw_scenes(TINY, "test", n)


def test_level_means_are_means_of_levels():
    means, scenes = level_means(TINY, 400, 5), Shapes3D(8, correlated=False)
    rows = torch.randperm(len(scenes), generator=gen(5))[:400]
    x, levels = scenes.batch(rows)
    with torch.no_grad(): z = TINY(x)[0]
    for k in (0, 7, 14): assert torch.allclose(means[k], z[levels[:, 5] == k].mean(0), atol=1e-4)
    assert level_means(TINY, 200, sensitive="scale").shape == (8, TINY.dim)


def test_a_level_that_was_not_drawn_is_named():
    with pytest.raises(ValueError, match="no scene of level .* of orientation was drawn; raise n"): level_means(TINY, 5)


@given(st.integers(2, 9))
@settings(max_examples=8, deadline=None)
def test_pairs_are_all_differences_across_the_middle(n):
    means = torch.randn(n, 4, generator=gen(n))
    want = [means[j] - means[i] for i in range(n) for j in range(n) if 2 * i < n - 1 < 2 * j]
    assert torch.equal(pair_vectors(means), torch.stack(want))


def test_directions_are_principal_components_of_differences():
    v = torch.randn(30, 4, 12, generator=gen(), dtype=torch.float64) * torch.arange(1, 13)
    apart = (v - v.mean(1, keepdim=True)).flatten(0, 1)
    fit, got = PCA(svd_solver="full").fit(torch.cat([apart, -apart]).numpy()), variation_directions(v, 5)
    assert torch.allclose(got.norm(dim=1), torch.from_numpy(fit.explained_variance_[:5] * (239 / 240)).sqrt(), rtol=1e-6)
    cosines = (torch.nn.functional.normalize(got, dim=1) * torch.from_numpy(fit.components_[:5])).sum(1).abs()
    assert torch.allclose(cosines, torch.ones(5, dtype=torch.float64), atol=1e-5)
    assert variation_directions(v, 5).equal(got) and torch.allclose(variation_directions(v + torch.randn(30, 1, 12, generator=gen(1)), 5).abs(), got.abs(), atol=1e-4)      # people may differ as they like


def test_directions_do_not_touch_the_random_numbers_of_others():
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    variation_directions(torch.randn(5, 3, 6, generator=gen()), 2)
    assert torch.rand(2).equal(want)


BAD = {"one version": (torch.zeros(5, 1, 3), 1, "at least two versions"), "a matrix": (torch.zeros(5, 3), 1, r"got \[5, 3\]"), "NaN": (torch.full((5, 2, 3), float("nan")), 1, "NaN"), "none": (torch.zeros(5, 2, 3), 0, "between 1 and 3"),
       "too many": (torch.zeros(5, 2, 3), 4, "between 1 and 3, the number"), "few people": (torch.zeros(1, 3, 9), 3, "between 1 and 2")}

@pytest.mark.parametrize("name", BAD)
def test_bad_versions_are_refused(name, untyped):
    v, k, message = BAD[name]
    with pytest.raises(ValueError, match=message): variation_directions(v, k)


def test_rotations_are_the_same_scene_from_every_angle():
    got = rotation_latents(TINY, 3, "test", 5)
    scenes = Shapes3D(8, "test", correlated=False)
    x = scenes.similar(torch.randperm(len(scenes), generator=gen(5))[:3])[0]
    with torch.no_grad(): assert torch.allclose(got[1], TINY(x[1])[0], atol=1e-5)
    assert rotation_latents(TINY, 2, sensitive="scale").shape == (2, 8, TINY.dim)


def test_the_mean_vector_weighs_levels_alike_and_leaves_the_middle_out():
    means = torch.tensor([[0.], [2.], [100.], [5.], [7.]])
    sets = similar_sets(means)
    assert list(sets) == ["mean", "pairs"] and sets["mean"].a.tolist() == [[5.]] and sets["pairs"].n_attributes == 4
    sets = similar_sets(means, torch.randn(6, 3, 1, generator=gen()), 1)
    assert sets["rotations"].eps == 1.5 and sets["rotations"].a.shape == (1, 1)


# --- models

Z, Y = torch.randn(120, 6, generator=gen(1)), torch.arange(120) % 3
DRAW, SETS = SceneDraw(Z, Y, torch.arange(120)), similar_sets(torch.randn(5, 6, generator=gen(2)), torch.randn(8, 4, 6, generator=gen(3)), 3)
small = lambda name, **o: train_scene_model(name, DRAW, SETS, **dict(widths=(8, 4), epochs=1, sigmas=(1., 2.5)) | o)
LATENT = [name for name in MODELS if not name.startswith("v1")]

@pytest.mark.parametrize("name", LATENT)
def test_every_model_trains_repeats_and_comes_back_from_its_file(name, tmp_path):
    model, again = small(name), small(name)
    assert same(model.encoder, again.encoder) and all(same(model.heads[s], again.heads[s]) for s in (1., 2.5)) and not same(small(name, seed=1).encoder, model.encoder)
    back = load_scene_model(name, save_scene_model(model, tmp_path / "m.safetensors"))
    assert back.encoder.codes(Z).equal(model.encoder.codes(Z)) and back.heads[2.5](Z[:, :4]).equal(model.heads[2.5](Z[:, :4])) and not back.encoder.training and list(back.heads) == [1., 2.5]
    assert all(torch.equal(v, v.half().float()) for v in model.encoder.body.state_dict().values() if v.is_floating_point())


def test_version_1_trains_on_pictures_and_comes_back(tmp_path):
    draw = draw_scenes(TINY, "train", 30)
    sets = similar_sets(level_means(TINY, 300))
    model = train_scene_model("v1 contrastive", draw, sets, flow=TINY, epochs=1, n_attack=1, sigmas=(1.,))
    back = load_scene_model("v1 contrastive", save_scene_model(model, tmp_path / "m.safetensors"), flow=TINY)
    assert model.encoder.on_images and back.encoder.codes(draw.z).equal(model.encoder.codes(draw.z)) and "flow" not in str([k for k in (tmp_path / "m.safetensors").read_bytes()[:3000].decode("latin1").split('"')])


def test_projected_models_ignore_their_directions():
    for name, exact in (("project", True), ("project, rotations", False)):
        model = small(name)
        a = SETS[MODELS[name][0]].a
        moved = model.encoder.codes(Z + 3 * a[0]) - model.encoder.codes(Z)
        assert moved.abs().max() < (1e-5 if exact else 3e-2) < (small("naive").encoder.codes(Z + 3 * a[0]) - small("naive").encoder.codes(Z)).abs().max()
        assert (model.encoder.basis is not None) == exact      # the second is folded into the first layer, and rounded with it


def test_options_of_the_caller_come_before_those_of_the_model():
    assert not same(small("LASSI", adversarial=50., epochs=4).encoder, small("LASSI", epochs=4).encoder) and same(small("LASSI", adversarial=0., epochs=2).encoder, small("naive", epochs=2).encoder)


@pytest.mark.parametrize("call, message", [(lambda: train_scene_model("lassi", DRAW, SETS), "name must be one of .*'LASSI, rotations'"), (lambda: load_scene_model("none"), "name must be one of"),
                                           (lambda: train_scene_model("LASSI, rotations", DRAW, similar_sets(torch.randn(3, 6))), "'rotations', which is not there; pass versions="), (lambda: small("LASSI", epochs=0), "epochs must be at least 1")])
def test_bad_names_are_refused(call, message):
    with pytest.raises(ValueError, match=message): call()


# --- the shipped files

@pytest.mark.parametrize("name", MODELS)
def test_shipped_models_are_whole_small_and_packaged(name):
    path = shipped_file(name)
    patterns = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fairbook"]
    assert path.parent == WEIGHTS and path.is_file() and path.with_name(path.name + ".sha256").is_file() and any(fnmatch(f"weights/{path.name}", p) for p in patterns)
    model = load_scene_model(name, flow=FLOW)
    assert tuple(model.heads) == SIGMAS and not model.encoder.training and model.encoder.on_images == name.startswith("v1")


def test_all_weights_together_are_at_most_12_mb():
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12e6
    assert {p.name for p in files} == {f"{n}{e}" for n in ("shapes32.safetensors", "shapes32_means.safetensors", *(shipped_file(m).name for m in MODELS)) for e in ("", ".sha256")}


def test_a_changed_byte_is_refused(tmp_path, monkeypatch):
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr(scene_study, "files", lambda package: tmp_path)
    path = tmp_path / "weights" / shipped_file("LASSI").name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="lassi.safetensors has sha256 .* damaged"): load_scene_model("LASSI")
    assert load_scene_model("naive").heads


def test_the_shipped_models_do_what_the_tables_say():
    test, similar = draw_scenes(FLOW, "test", 80, 4321), shipped_similarity()
    accuracy, certified = {}, {}
    for name in LATENT:
        m = load_scene_model(name)
        found = certify_dataset(test.z[:40], m.encoder, m.heads[1.], similar, "exact_line")
        accuracy[name], certified[name] = (m.heads[1.](m.encoder.codes(test.z)).argmax(1) == test.y).float().mean().item(), found.rates()["certified"]
    assert accuracy["naive"] < .85 and min(v for k, v in accuracy.items() if k != "naive") > .9 and accuracy["LASSI, rotations"] > .97
    assert certified["naive"] < 70 and min(v for k, v in certified.items() if k != "naive") > 90 and certified["project"] == 100


def test_the_shipped_vector_is_the_difference_that_means_of_other_scenes_give():
    a, again = shipped_similarity().a[0], similar_sets(level_means(FLOW, 1500, 123))["mean"].a[0]
    assert shipped_similarity().eps == 1 and torch.cosine_similarity(a, again, dim=0) > .9 and .8 < a.norm() / again.norm() < 1.25


def test_make_weights_writes_what_it_says(tmp_path):
    out = make_weights(tmp_path, ["LASSI", "project, rotations"], n=60, n_means=400, n_versions=16, k=20, flow=TINY, widths=(8, 4), epochs=1, sigmas=(1.,))
    assert list(out) == ["means", "LASSI", "project, rotations"] and all(p.is_file() and p.with_name(p.name + ".sha256").is_file() for p in out.values())
    assert out["LASSI"].name == shipped_file("LASSI").name and load_scene_model("LASSI", out["LASSI"]).encoder.codes(torch.zeros(2, TINY.dim)).shape == (2, 4)
