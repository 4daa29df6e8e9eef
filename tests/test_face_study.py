"""`fairbook.face_study` on generated folders of drawn faces, in the true layouts: the tasks, the loader of FairFace, the flow, the runs and the command line."""
import subprocess
import sys
from dataclasses import replace
from math import isnan

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from fairbook import face_study
from fairbook.certificate_sets import CertifiedSet
from fairbook.face_latents import CelebAFaces, UTKFace, encode_faces, face_pictures, make_tiny_utkface
from fairbook.face_study import FACE_TASKS, SEEDS, FaceTask, FairFaceAges, face_cost, face_data, face_flow, face_table, main, run_face_task, train_face_flow
from fairbook.faces import FairFace, make_tiny_faces
from fairbook.flow_training import load_flow, save_flow
from fairbook.lassi import attribute_vector
from fairbook.smoothing import Certificate

SPLITS = ["train", "valid", "test"]
TASK = FaceTask("toy", "celeba", "Smiling", ("Young",), size=8, every=1, epochs=1)
SMALL = dict(widths=(8, 4), batch_size=10, progress=False)
FEW = dict(SMALL, seeds=(0,), certificates=("exact_line", "project"), methods=("LASSI",))
same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def celeba(tmp_path_factory): return make_tiny_faces(tmp_path_factory.mktemp("celeba"), n=60)


@pytest.fixture(scope="module")
def fairface(tmp_path_factory): return make_tiny_faces(tmp_path_factory.mktemp("fairface"), "fairface", n=100)


@pytest.fixture(scope="module")
def utkface(tmp_path_factory): return make_tiny_utkface(tmp_path_factory.mktemp("utk"), n=60)


@pytest.fixture(scope="module")
def flow():
    "A flow that is no identity."
    torch.manual_seed(3)
    flow = face_flow(8, 1, 1, 4)
    with torch.no_grad():
        for name, p in flow.named_parameters():
            if "net.last" in name: p.copy_(.1 * torch.randn_like(p))
    return flow.eval()


# --- FairFace by age

@pytest.mark.parametrize("target, starts", [("Age-2", ["0-2", "30-39"]), ("Age-3", ["0-2", "20-29", "40-49"]), ("Age-9", "0-2 3-9 10-19 20-29 30-39 40-49 50-59 60-69".split() + ["more than 70"])])
def test_ages_and_race_are_those_of_the_table(fairface, target, starts):
    "The class of a picture is the number of class starts that are not older than it."
    for split in SPLITS:
        data = FairFaceAges(fairface, split, target, 8)
        table = pd.read_csv(fairface / f"fairface_label_{'val' if split == 'test' else 'train'}.csv").set_index("file")
        rows = table.loc[[f"{'val' if split == 'test' else 'train'}/{f}" for f in data.files]]
        years = lambda words: int(words.replace("more than ", "").split("-")[0])
        assert data.labels.tolist() == [sum(years(s) <= years(a) for s in starts) - 1 for a in rows.age]
        assert data.groups.tolist() == (rows.race == "Black").astype(int).tolist() and data.group_names == ["Race=Other", "Race=Black"] and (data.split, data.label_name) == (split, target)


def test_two_ages_are_the_label_of_chapter_1(fairface):
    ours, theirs = FairFaceAges(fairface, "test", size=8), FairFace(fairface, "val", 8)
    assert ours.files == theirs.files and torch.equal(ours.labels, theirs.labels) and torch.equal(ours[3][0], theirs[3][0])


@given(st.integers(1, 300), st.integers(0, 10**6))
def test_a_fifth_is_put_aside_and_nothing_is_lost(n, seed):
    train, valid = (face_study._fairface_rows(n, split, seed) for split in ("train", "valid"))
    assert sorted([*train, *valid]) == list(range(n)) and len(valid) == n // 5 and (np.diff(train) > 0).all() and (np.diff(valid) > 0).all()
    assert np.array_equal(train, face_study._fairface_rows(n, "train", seed))


def test_another_seed_puts_others_aside_but_tests_on_the_same(fairface):
    get = lambda split, seed: FairFaceAges(fairface, split, size=8, seed=seed).files
    assert get("valid", 42) == get("valid", 42) != get("valid", 43) and get("test", 42) == get("test", 43)


@pytest.mark.parametrize("call, error, message", [
    (lambda r: FairFaceAges(r, "val"), ValueError, "`split` must be one of"), (lambda r: FairFaceAges(r, target="Age-4"), ValueError, "`target` must be one of .*'Age-9'"), (lambda r: FairFaceAges(r, size=0), ValueError, "`size`"),
    (lambda r: FairFaceAges(r / "none"), FileNotFoundError, "fairface_label_train.csv is not there. FairFace .CC BY 4.0.: get")])
def test_bad_folders_are_named(fairface, call, error, message):
    with pytest.raises(error, match=message): call(fairface)


@pytest.mark.parametrize("damage, message", [(lambda t: t.drop(columns="file"), "no column 'file'"), (lambda t: t.drop(columns="age"), "no column 'age'"), (lambda t: t.assign(race="Martian"), "unknown entries .'Martian'.")])
def test_damaged_tables_are_named(tmp_path, damage, message):
    root = make_tiny_faces(tmp_path, "fairface", n=40)
    damage(pd.read_csv(root / "fairface_label_val.csv")).to_csv(root / "fairface_label_val.csv", index=False)
    with pytest.raises(ValueError, match=message): FairFaceAges(root, "test")


def test_a_missing_picture_is_named(tmp_path):
    root = make_tiny_faces(tmp_path, "fairface", n=40)
    (root / "val" / "2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="2.jpg is not there"): FairFaceAges(root, "test")


# --- tasks

def test_settings_are_those_of_the_papers():
    "A second copy, written down in another order."
    t = FACE_TASKS
    assert SEEDS == (42, 0, 10, 20, 30) and all(name == task.name for name, task in t.items())
    assert all(x.every == {"celeba": 128 if x.version == 1 else 64, "fairface": 32, "utkface": 16}[x.data] and x.sigma == (.75 if x.version == 1 else .65) for x in t.values())
    assert all(x.eps == (.5 if x.data == "fairface" else 10 if x.vector in ("perpendicular", "discover") else 1) for x in t.values())
    assert t["celeba64-smiling-pale"].sigma_enc == .65 and t["celeba64-smiling-pale-perpendicular"].sigma_enc == 6.5 and t["fairface64-age-3-black"].sigma_enc == .325
    plain = [x for x in t.values() if x.data == "celeba" and x.version == 2 and x.classification == 1]
    assert all(x.adversarial == (.25 if x.target in ("Wearing_Earrings", "Heavy_Makeup") else .05) and x.noise == {"naive": 10, "augment": 10, "LASSI": 2.5} and x.epochs == 5 and x.reconstruction == 0 for x in plain)
    keep = [x for x in t.values() if x.classification == 0]
    assert len(keep) == 35 and all((x.adversarial, x.reconstruction, x.epochs, x.noise["LASSI"]) == (.05, .1, 20, .5) for x in keep)
    assert {x.target: [x.noise[m] for m in ("naive", "augment", "LASSI")] for x in t.values() if x.data == "fairface"} == {"Age-2": [5, 5, .25], "Age-3": [.1, 2.5, .25], "Age-9": [.1, 1, .25]}
    assert all((x.adversarial, x.contrastive) == (.1, .1) and [x.noise[m] for m in ("naive", "adversarial", "LASSI")] == [10, 1, 10] for x in t.values() if x.version == 1)


def test_what_is_quoted_has_a_source_and_is_a_percentage():
    assert sum(bool(x.quoted) for x in FACE_TASKS.values()) == 23 and all(bool(x.quoted) == bool(x.source) for x in FACE_TASKS.values())
    pairs = [p for x in FACE_TASKS.values() for p in x.quoted.values()]
    assert all((isnan(a) or 50 < a < 100) and 0 <= c <= 100 for a, c in pairs)
    assert FACE_TASKS["celeba64-wearing_earrings-young"].quoted == {"naive": (81.4, 59.2), "LASSI": (84.5, 98.0)} and FACE_TASKS["fairface64-age-2-black"].quoted["LASSI"] == (72.0, 95.0)
    assert FACE_TASKS["celeba64-attractive-bald"].quoted["LASSI"][1] == 10.9 and FACE_TASKS["celeba64-attractive-bald"].sensitive == ("Bald",) and not FACE_TASKS["utkface64-gender-black"].quoted


def test_every_task_opens(celeba, fairface, utkface):
    "Names of targets and attributes are those of the data sets."
    where = {"celeba": celeba, "fairface": fairface, "utkface": utkface}
    for task in FACE_TASKS.values():
        table = face_data(replace(task, size=8), where[task.data])["train"]
        found = face_study._attributes(task, encode_faces(table, Flat()))
        assert len(found) == len(task.sensitive) and all(set(a.tolist()) <= {0, 1} for a in found)


class Flat:
    "Latents of one number."
    def encode(self, x): return x[:, 0, 0, :1]


@pytest.mark.parametrize("change, message", [(dict(data="mnist"), "`data` must be one of"), (dict(version=3), "`version` must be one of"), (dict(vector="mean"), "`vector` must be one of"), (dict(sensitive=()), "`sensitive`"), (dict(sensitive="Young"), "`sensitive` must be a tuple"),
                                             (dict(noise={"naive": 1.}), "'LASSI'"), (dict(size=0), "`size`"), (dict(epochs=0), "`epochs`"), (dict(every=0), "`every`"), (dict(eps=0.), "`eps`"), (dict(eps=float("nan")), "`eps`"), (dict(sigma=float("inf")), "`sigma`")])
def test_bad_settings_are_refused(change, message, untyped):
    with pytest.raises(ValueError, match=message): replace(TASK, **change)


def test_attributes_are_columns_of_the_data_set(celeba, utkface):
    task = replace(TASK, sensitive=("Pale_Skin", "Male"))
    data = face_data(task, celeba)["train"]
    pale, male = face_study._attributes(task, encode_faces(data, Flat()))
    assert torch.equal(pale, CelebAFaces(celeba, target="Pale_Skin", size=8).labels) and torch.equal(male, CelebAFaces(celeba, target="Male", sensitive="Young", size=8).labels)
    task = replace(FACE_TASKS["utkface64-age-black"], size=8)
    assert torch.equal(face_study._attributes(task, encode_faces(face_data(task, utkface)["train"], Flat()))[0], (UTKFace(utkface, target="race", sensitive="age", size=8).labels == 1).long())


def test_limits_spread_and_tests_are_thinned(celeba):
    whole, some = face_data(TASK, celeba), face_data(replace(TASK, every=5), celeba, 6)
    assert some["test"].files == whole["test"].files[::5] and len(some["train"]) == 6 and some["train"].files[0] == whole["train"].files[0] and some["train"].files[-1] == whole["train"].files[-1]
    rows = [whole["train"].files.index(f) for f in some["train"].files]
    assert torch.equal(some["train"].labels, whole["train"].labels[rows]) and torch.equal(some["train"].groups, whole["train"].groups[rows]) and torch.equal(some["train"][1][0], whole["train"][rows[1]][0])
    assert len(face_data(TASK, celeba, 10**6)["train"]) == len(whole["train"])


@given(st.integers(1, 10**6), st.integers(2, 10**4))
@settings(max_examples=50)
def test_spread_rows_are_different_and_reach_both_ends(n, k):
    rows = list(face_study._spread(n, k)) if k < 2000 or n < 2000 else None
    if rows is not None: assert len(set(rows)) == min(n, k) and rows[0] == 0 and rows[-1] == n - 1


@pytest.mark.parametrize("task, limit, message", [("celeba64-smiling-pail", None, "similar ones: celeba64-smiling-pale"), ("celeba64-smiling-pale", 1, "`limit` must be at least 2"), (replace(TASK, target="Smile"), None, "no attribute 'Smile'; similar ones: Smiling"), (replace(TASK, target="Young"), None, "not the target")])
def test_tasks_that_do_not_exist_are_named(celeba, task, limit, message):
    with pytest.raises(ValueError, match=message): face_data(task, celeba, limit)


# --- the flow

def test_the_papers_flow_has_the_papers_shape():
    flow = face_flow()
    assert len(flow.levels) == 4 and len(flow.levels[0].steps) == 32 and flow.n_bits == 5 and 60.5e6 < sum(p.numel() for p in flow.parameters()) < 61.5e6 and flow.dim == 12_288
    assert len(face_flow(128, K=1, hidden=2).levels) == 5 and face_flow(16, 1, hidden=2).image_shape == (3, 16, 16)
    with pytest.raises(ValueError, match="must divide height 60"): face_flow(60)


def test_bytes_in_the_file_are_those_of_the_pictures(celeba, tmp_path):
    data = face_data(TASK, celeba)["train"]
    x = face_study._pixels(data, tmp_path / "x.npy", 0, False)
    assert x.dtype == torch.uint8 and x.shape == (len(data), 3, 8, 8) and torch.equal(x, (255 * face_pictures(data)).round().byte())
    (tmp_path / "x.npy").touch()
    assert torch.equal(x, face_study._pixels(None, tmp_path / "x.npy", 0, False)) and [p.name for p in tmp_path.iterdir()] == ["x.npy"]      # read back; no part is left


def test_all_256_bytes_fall_into_the_bins_of_the_paper():
    "floor(v / 8), as the flow sees v / 255."
    v = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    flow = face_flow(16, 1, 1, 2)
    assert torch.equal(flow._units(v.float() / 255), (v // 8) / 32 - .5)


def test_training_learns_and_goes_on_after_a_kill(celeba, tmp_path, monkeypatch):
    from fairbook import flow_training
    data = face_data(TASK, celeba)
    train = lambda name, **o: train_face_flow(data["train"], tmp_path / name / "f", epochs=4, batch_size=12, seed=1, progress=False, flow=None if o.pop("own", 0) else new(), **o)
    def new():
        torch.manual_seed(1)
        return face_flow(8, 1, 1, 4)
    whole = train("a", validation=data["valid"])
    real, calls = flow_training.save_tensors, []
    def dies(*args):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(flow_training, "save_tensors", dies)
    with pytest.raises(KeyboardInterrupt): train("b")
    monkeypatch.setattr(flow_training, "save_tensors", real)
    assert len(list((tmp_path / "b").glob("*.npy"))) == 1
    again = train("b")
    assert same(whole, again) and not again.training and same(load_flow(new(), tmp_path / "b" / "f"), whole) and not list(tmp_path.rglob("*.npy*"))
    with torch.no_grad(): assert whole.bits_per_dim(face_pictures(data["test"])).mean() < new().eval().bits_per_dim(face_pictures(data["test"])).mean()


def test_training_on_bytes_is_training_on_pictures(celeba, tmp_path):
    data, flows = face_data(TASK, celeba)["train"], []
    for _ in range(2):
        torch.manual_seed(5)
        flows.append(face_flow(8, 1, 1, 4))
    train_face_flow(data, tmp_path / "f", flows[0], epochs=2, batch_size=16, progress=False)
    face_study.fit_flow(flows[1], face_pictures(data).clamp(0, 1), epochs=2, batch_size=16)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(flows[0].parameters(), flows[1].parameters()))


def test_the_default_flow_is_seeded_and_leaves_others_random_numbers_alone(celeba, tmp_path, monkeypatch):
    monkeypatch.setattr(face_study, "face_flow", lambda size: face_flow(size, 1, 1, 4))
    data = face_data(TASK, celeba)["train"]
    torch.manual_seed(9)
    want = torch.rand(2)
    torch.manual_seed(9)
    one = train_face_flow(data, tmp_path / "a", epochs=1, progress=False)
    assert torch.rand(2).equal(want) and same(one, train_face_flow(data, tmp_path / "b", epochs=1, progress=False)) and not same(one, train_face_flow(data, tmp_path / "c", epochs=1, seed=1, progress=False))


def test_training_that_can_not_be_is_refused(celeba, tmp_path, monkeypatch):
    data = face_data(TASK, celeba)["train"]
    with pytest.raises(ValueError, match=r"these are \[3, 8, 8\]; make it with face_flow\(8\)"): train_face_flow(data, tmp_path / "f", face_flow(16, 1, 1, 4))
    monkeypatch.setattr(face_study.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(ValueError, match="pixels of 42 pictures take 0.0 GB beside the weights, where 0.0 GB are free"): train_face_flow(data, tmp_path / "f", face_flow(8, 1, 1, 4))
    assert not list(tmp_path.glob("*"))


# --- costs

@pytest.mark.parametrize("size, want", [(64, 29.6), (128, 119.8)])
def test_work_is_that_of_the_convolutions(size, want):
    "Counted on a flow with one step per level, which all cost alike, and against the figures of the notes on the paper."
    flow = face_flow(size, 1, hidden=64)
    pixels = [(size >> i + 1) ** 2 for i in range(len(flow.levels))]
    nets = sum(p * m.weight.numel() for p, level in zip(pixels, flow.levels) for m in level.steps[0].coupling.net.children() if isinstance(m, nn.Conv2d))
    mixing = sum(p * level.steps[0].norm.bias.numel() ** 2 for p, level in zip(pixels, flow.levels))
    task = replace(TASK, size=size)
    assert face_cost(task, K=1, hidden=64)["GFLOP, a picture through the flow"] == pytest.approx(2e-9 * (nets + mixing), rel=1e-9)
    assert face_cost(task)["GFLOP, a picture through the flow"] == pytest.approx(want, abs=.06)


def test_costs_in_words_of_the_notes():
    cost = face_cost("celeba64-smiling-pale")
    assert cost["TFLOP, a certificate of version 1 as published"] == pytest.approx(890, rel=.01) and cost["TFLOP, a lattice on version 1"] == pytest.approx(3.8, abs=.05)
    assert cost["MFLOP, a latent through the MLP"] == pytest.approx(2 * 27.8, abs=.1) and cost["GB, latents"] == pytest.approx(162_770 * 12_288 * 4 / 1e9) and cost["GB, pixels on disk"] == pytest.approx(cost["GB, latents"] / 4)
    assert isnan(face_cost(replace(TASK, sensitive=("Young", "Male", "Bald", "Chubby")))["TFLOP, a lattice on version 1"])


# --- runs

@pytest.fixture(scope="module")
def run(celeba, flow, tmp_path_factory):
    "A run with everything, its cache, and how to repeat it."
    cache = tmp_path_factory.mktemp("cache")
    again = lambda **o: run_face_task(o.pop("task", TASK), celeba, o.pop("flow", flow), **dict(SMALL, seeds=(0, 1), cache=cache) | o)
    return again(), cache, again


def test_a_run_has_all_its_rows(run):
    frame, cache, _ = run
    assert len(frame) == 2 * 4 * 5 and not frame.duplicated(["seed", "method", "certificate"]).any() and set(frame.task) == {"toy"} and frame.people.eq(12).all()
    assert frame[["accuracy", "certified", "abstained", "balanced_accuracy"]].stack().between(0, 100).all()
    assert frame[frame.certificate == "project"].certified.eq(100).all() and (frame[(frame.method == "project") & (frame.certificate == "exact_line")].radius < 1e-4).all()
    assert frame[frame.certificate == "center"].evaluations.eq(4000).all() and frame[frame.certificate == "project"].evaluations.eq(1).all()
    assert (frame[frame.method == "naive"].radius.to_numpy() != frame[frame.method == "LASSI"].radius.to_numpy()).any()
    assert len(list(cache.glob("celebafaces-*.safetensors"))) == 3 and len(list(cache.glob("toy-*.safetensors"))) == 8


def test_the_second_run_finds_everything_and_repeats_the_first(run, monkeypatch):
    frame, cache, again = run
    for name in ("train_encoder", "train_classifier"): monkeypatch.setattr(face_study, name, None)
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}
    assert again().equals(frame) and before == {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}


def test_without_a_cache_nothing_is_written_and_the_answer_is_the_same(run, celeba, tmp_path, monkeypatch):
    frame, _, again = run
    monkeypatch.chdir(tmp_path)
    some = again(cache=None, methods=["LASSI"], seeds=[1])
    pd.testing.assert_frame_equal(some, frame[(frame.method == "LASSI") & (frame.seed == 1)].reset_index(drop=True))
    assert not list(tmp_path.iterdir())


def test_quoted_figures_are_never_used(run):
    frame, _, again = run
    task = replace(TASK, quoted={"LASSI": (12.34, 56.78)}, source="somebody")
    assert again(task=task, cache=None, methods=["LASSI"], seeds=[0]).equals(frame[(frame.method == "LASSI") & (frame.seed == 0)].reset_index(drop=True)) and again(task=task).equals(frame)


def test_seeds_and_settings_make_models_of_their_own(run, tmp_path):
    frame, _, again = run
    n = lambda: len(list(tmp_path.glob("toy-LASSI-*.safetensors")))
    again(cache=tmp_path, methods=("LASSI",), certificates=("project",))
    assert n() == 2
    other = again(task=replace(TASK, adversarial=5., epochs=2), cache=tmp_path, seeds=(0,), methods=("LASSI",), certificates=("exact_line",))
    assert n() == 3 and other.radius[0] != frame[(frame.method == "LASSI") & (frame.certificate == "exact_line")].radius.iloc[0]
    again(widths=(6, 4), cache=tmp_path, seeds=(0,), methods=("LASSI",), certificates=("project",))
    assert n() == 4
    by = frame[frame.method == "naive"].set_index(["seed", "certificate"]).radius
    assert by[0, "exact_line"] != by[1, "exact_line"]


def test_models_from_files_are_the_models(run, celeba, flow):
    _, cache, _ = run
    found = face_study._latents(face_data(TASK, celeba), flow, cache, torch.device("cpu"))
    study = face_study._Study(TASK, found, flow, torch.device("cpu"), (8, 4), 10, cache).prepare()
    assert torch.equal(study.similar.a[0], attribute_vector(found["train"].E, face_study._attributes(TASK, found["train"])[0])) and study.similar.eps == 1.
    with torch.no_grad(): assert torch.allclose(found["test"].E, flow(face_pictures(face_data(TASK, celeba)["test"]))[0], atol=1e-5)
    for method in ("project", "LASSI"):
        (file,) = cache.glob(f"toy-{method}-0-{study.about}.safetensors")
        (e, h), (e2, h2) = study.model(method, 0, file), study.fit(method, 0)
        z = found["test"].E
        assert torch.equal(e.codes(z), e2.codes(z)) and same(h, h2) and not e.training and (e.basis is not None) == (method == "project")


def test_a_model_without_its_sum_is_trained_again(celeba, flow, tmp_path):
    first = run_face_task(TASK, celeba, flow, cache=tmp_path, **FEW)
    (file,) = tmp_path.glob("toy-LASSI-*.safetensors")
    side = file.with_name(file.name + ".sha256")
    side.unlink()
    assert run_face_task(TASK, celeba, flow, cache=tmp_path, **FEW).equals(first) and side.exists()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"): run_face_task(TASK, celeba, flow, cache=tmp_path, **FEW)


def test_processes_do_not_matter(celeba, flow): assert run_face_task(TASK, celeba, flow, workers=2, **FEW).equals(run_face_task(TASK, celeba, flow, **FEW))


def test_the_callers_flow_is_left_alone(celeba, flow):
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    grads = [p.requires_grad for p in flow.parameters()]
    run_face_task(TASK, celeba, flow, version=1, limit=12, **dict(FEW, certificates=("project",), widths=(8,)))
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items()) and grads == [p.requires_grad for p in flow.parameters()] and not flow.training


def test_runs_do_not_touch_the_random_numbers_of_others(celeba, flow):
    torch.manual_seed(4)
    want = torch.rand(2)
    torch.manual_seed(4)
    run_face_task(TASK, celeba, flow, **FEW)
    assert torch.rand(2).equal(want)


def test_options_reach_their_certificate(celeba, flow):
    certificates = ("center", "lattice", "end_to_end")
    frame = run_face_task(TASK, celeba, flow, options={"center": {"n": 2000}, "end_to_end": {"n": 500}}, **dict(FEW, certificates=certificates, limit=4))
    assert frame.set_index("certificate").evaluations[["center", "end_to_end"]].tolist() == [3000, 600]


@pytest.mark.parametrize("name, where", [("fairface64-age-3-black", "fairface"), ("fairface64-age-9-black", "fairface"), ("celeba64-smiling-pale-young-blond", "celeba"), ("celeba64-smiling-young-perpendicular", "celeba"),
                                         ("celeba64-smiling-blond-ramaswamy", "celeba"), ("celeba64-smiling-discover", "celeba"), ("celeba64-arched_eyebrows-young-transfer", "celeba"), ("utkface64-age-black", "utkface")])
def test_every_kind_of_row_runs(name, where, flow, request):
    task = replace(FACE_TASKS[name], size=8, every=4, epochs=1)
    frame = run_face_task(task, request.getfixturevalue(where), flow, **dict(SMALL, seeds=(0,), certificates=("exact_line", "lattice", "project")))
    assert set(frame.method) == {"naive", "LASSI", "project"} | ({"augment"} if task.classification else set())
    assert set(frame.certificate) == {"lattice", "project"} | ({"exact_line"} if len(task.sensitive) == 1 else set()) and frame[frame.certificate == "project"].certified.eq(100).all()


def test_version_1_looks_at_pictures(celeba, flow):
    task = replace(FACE_TASKS["celeba64-smiling-young-v1"], size=8, every=6, epochs=1)
    frame = run_face_task(task, celeba, flow, limit=14, **dict(SMALL, seeds=(0,), methods=("naive", "adversarial", "LASSI"), certificates=("exact_line", "lattice", "project"), widths=(16,)))
    assert len(frame) == 6 and set(frame.certificate) == {"lattice", "project"} and set(frame.version) == {1}
    by = frame[frame.certificate == "lattice"].set_index("method").radius
    assert len(set(by)) == 3
    other = run_face_task(TASK, celeba, flow, version=1, limit=14, **dict(FEW, certificates=("lattice",), widths=(16,)))
    assert set(other.version) == {1} and set(other.task) == {"toy"}


def test_what_each_method_is_told():
    task = FACE_TASKS["celeba64-smiling-pale-v1"]
    told = {m: face_study._losses(task, m) for m in face_study._METHODS}
    assert [(t["adversarial"], t["contrastive"], t["augment"]) for t in told.values()] == [(0, 0, 0), (0, 0, 10), (.1, 0, 0), (.1, .1, 0), (0, 0, 0)]
    transfer = face_study._losses(FACE_TASKS["celeba64-smiling-pale-transfer"], "LASSI")
    assert (transfer["classification"], transfer["reconstruction"], transfer["epochs"]) == (0, .1, 20)


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 2, None])), min_size=1, max_size=30))
def test_rates_are_those_of_scikit_learn(people):
    y = torch.tensor([a for a, _ in people])
    found = CertifiedSet([Certificate("center", b is not None, .1, 1., 1., 7, abstained=b is None, label=b) for _, b in people])
    got, answers = face_study._rates(found, y), [-1 if b is None else b for _, b in people]
    classes = sorted(set(y.tolist()))
    want = np.mean([np.mean([b == c for a, b in zip(y.tolist(), answers) if a == c]) for c in classes])
    assert got["people"] == len(people) and got["balanced_accuracy"] == pytest.approx(100 * want) and got["accuracy"] == pytest.approx(100 * np.mean(y.numpy() == answers))
    if set(answers) <= set(classes) and len(classes) > 1: assert got["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(y, answers))


def test_unknown_labels_give_no_accuracy():
    got = face_study._rates(CertifiedSet([Certificate("lattice", True, .1, 1., 1., 7)]), torch.tensor([0]))
    assert isnan(got["accuracy"]) and isnan(got["balanced_accuracy"]) and got["certified"] == 100


BAD = {"task": (dict(task="smiling"), "there is no task"), "flow size": (dict(flow=face_flow(16, 1, 1, 2).eval()), r"these are \[3, 8, 8\]"), "training": (dict(flow=face_flow(8, 1, 1, 4)), "call flow.eval"),
       "method": (dict(methods=["lassi"]), "`methods` must be a list out of .* got 'lassi'"), "one method": (dict(methods="LASSI"), "`methods` must be a list"), "certificate": (dict(certificates=["centre"]), "got 'centre'"), "options": (dict(options={"centre": {}}), "`options`"),
       "seeds": (dict(seeds=[]), "`seeds` must be whole"), "seed": (dict(seeds=[.5]), "`seeds`"), "true": (dict(seeds=[True]), "`seeds`"), "widths": (dict(widths=(0, 4)), "`widths` must be positive"), "no widths": (dict(widths=()), "`widths`"), "width of version 1": (dict(version=1, widths=(12,)), "multiple of 8"),
       "version": (dict(version=3), "`version` must be one of"), "workers": (dict(workers=0), "`workers` must be at least 1"), "workers on a GPU": (dict(workers=2, device="meta"), "`workers` must be 1 on meta"), "batch": (dict(batch_size=1), "`batch_size`"),
       "nothing": (dict(methods=[]), "nothing is left"), "nothing exact": (dict(version=1, widths=(8,), certificates=["exact_line"]), "nothing is left to do for toy"), "limit": (dict(limit=0), "`limit`")}

@pytest.mark.parametrize("name", BAD)
def test_bad_runs_are_refused_before_the_work(celeba, flow, name, untyped, tmp_path):
    change, message = BAD[name]
    args = {"task": TASK, "flow": flow} | {k: v for k, v in change.items() if k in ("task", "flow")}
    with pytest.raises(ValueError, match=message): run_face_task(args["task"], celeba, args["flow"], **dict(FEW, cache=tmp_path / "c") | {k: v for k, v in change.items() if k not in args})
    assert not (tmp_path / "c").exists()


def test_transfer_has_no_augmentation_alone(celeba, flow):
    with pytest.raises(ValueError, match="augment a target"): run_face_task(replace(TASK, classification=0., reconstruction=.1), celeba, flow, **dict(FEW, methods=["augment"]))


def test_too_little_memory_is_said_with_the_limit_that_fits(celeba, flow, monkeypatch):
    need = 3 * 4 * 192 * (42 + 6 + 12)
    monkeypatch.setattr(face_study, "_memory", lambda: need - 1)
    with pytest.raises(ValueError, match=r"42 training pictures of 8 pixels need about 0.0 GB of memory, this machine has 0.0; pass limit=41"): run_face_task(TASK, celeba, flow, **FEW)
    monkeypatch.setattr(face_study, "_memory", lambda: need)
    assert len(run_face_task(TASK, celeba, flow, **FEW)) == 2


def test_memory_is_a_number_or_unknown(monkeypatch):
    assert face_study._memory() > 1e8
    monkeypatch.delattr(face_study.os, "sysconf")
    assert face_study._memory() == float("inf")


def test_an_attribute_that_nobody_has_is_named(tmp_path, flow):
    root = make_tiny_faces(tmp_path, n=40)
    lines = (root / "list_attr_celeba.txt").read_text().splitlines()
    at = 1 + lines[1].split().index("Bald")
    rows = [line.split() for line in lines[2:]]
    for r in rows: r[at] = "-1"
    (root / "list_attr_celeba.txt").write_text("\n".join([*lines[:2], *(" ".join(r) for r in rows)]) + "\n")
    with pytest.raises(ValueError, match="Bald: attr is 0 for all 28 people"): run_face_task(replace(TASK, sensitive=("Bald",)), root, flow, **FEW)


def test_long_tables_are_thinned_for_linear_classifiers(celeba, flow, monkeypatch):
    "The mean takes everybody, a linear classifier at most so many."
    seen, real = [], face_study.attribute_vector
    monkeypatch.setattr(face_study, "_MOST", 20)
    monkeypatch.setattr(face_study, "attribute_vector", lambda E, *args, **options: (seen.append(len(E)), real(E, *args, **options))[1])
    for vector in ("mean_difference", "perpendicular", "ramaswamy"): run_face_task(replace(TASK, vector=vector), celeba, flow, **dict(FEW, certificates=["project"]))
    assert seen == [42, 20, 20]


# --- the table

def test_tables_are_means_and_keep_quotes_apart(run):
    frame = run[0]
    task = replace(TASK, quoted={"naive": (90., 1.), "LASSI": (91., 99.)})
    table = face_table(frame, task)
    assert len(table) == 20 and table.seeds.eq(2).all()
    for (m, c), row in table.iterrows():
        own = frame[(frame.method == m) & (frame.certificate == c)]
        assert row.certified == pytest.approx(own.certified.mean()) and row.accuracy == pytest.approx(own.accuracy.mean()) and row.spread == pytest.approx(own.certified.std())
        quote = task.quoted.get(m) if c == "center" else None
        assert (row["accuracy, quoted"], row["certified, quoted"]) == quote if quote else isnan(row["certified, quoted"]) and isnan(row["accuracy, quoted"])
    assert face_table(frame, replace(TASK, quoted={})).drop(columns=["accuracy, quoted", "certified, quoted"]).equals(table.drop(columns=["accuracy, quoted", "certified, quoted"]))


def test_a_table_read_back_from_a_file_is_the_table(run, tmp_path):
    run[0].to_csv(tmp_path / "t.csv", index=False)
    pd.testing.assert_frame_equal(face_table(pd.read_csv(tmp_path / "t.csv"), TASK), face_table(run[0], TASK))


def test_frames_of_something_else_are_refused(run):
    with pytest.raises(ValueError, match="no row of 'celeba64-smiling-pale', but of .'toy'."): face_table(run[0], "celeba64-smiling-pale")
    with pytest.raises(ValueError, match="no column 'abstained'"): face_table(run[0].drop(columns=["abstained"]), TASK)
    with pytest.raises(ValueError, match="no column"): face_table(pd.DataFrame(), TASK)


# --- the command line

LINE = "--size 8 --every 3 --epochs 1 --K 1 --L 1 --hidden 4 --widths 8 4 --batch-size 10 --seeds 0 1 --methods naive LASSI --certificates exact_line project --quiet".split()
words = lambda root, tmp, *more: ["celeba64-smiling-young", "--folder", str(root), "--flow", str(tmp / "flow.safetensors"), "--out", str(tmp / "out" / "table.csv"), *LINE, *more]

def test_the_command_line_writes_the_table_that_python_makes(celeba, flow, tmp_path, capsys):
    save_flow(flow, tmp_path / "flow.safetensors")
    assert main(words(celeba, tmp_path, "--cache", str(tmp_path / "cache"))) == 0
    got = pd.read_csv(tmp_path / "out" / "table.csv")
    want = run_face_task(replace(FACE_TASKS["celeba64-smiling-young"], size=8, every=3, epochs=1), celeba, flow, methods=("naive", "LASSI"), certificates=("exact_line", "project"), seeds=(0, 1), widths=(8, 4), batch_size=10, progress=False)
    pd.testing.assert_frame_equal(got, want)
    out = capsys.readouterr().out
    assert "8 rows written to table.csv" in out and "certified, quoted" in out and list((tmp_path / "cache").iterdir())


def test_the_command_line_trains_a_flow_once(celeba, tmp_path, monkeypatch):
    assert main(words(celeba, tmp_path, "--train-flow", "1")) == 0 and (tmp_path / "flow.safetensors").exists()
    monkeypatch.setattr(face_study, "train_face_flow", None)
    assert main(words(celeba, tmp_path, "--train-flow", "1")) == 0


@pytest.mark.parametrize("change, message", [
    (lambda w: w, "there is no flow at .*add --train-flow 10"), (lambda w: ["celeba64-smiling-yung", *w[1:]], "similar ones: celeba64-smiling-young"), (lambda w: w[:2] + ["/nowhere"] + w[3:] + ["--train-flow", "1"], "is not there. CelebA"),
    (lambda w: w + ["--methods", "lassi", "--train-flow", "1"], "got 'lassi'"), (lambda w: w[:1], "required: --folder, --flow, --out"), (lambda w: w + ["--limit", "many"], "invalid int value")])
def test_mistakes_end_with_a_message(celeba, tmp_path, capsys, change, message):
    import re
    with pytest.raises(SystemExit) as end: main(change(words(celeba, tmp_path)))
    assert end.value.code == 2 and re.search(message, " ".join(capsys.readouterr().err.split())) and not (tmp_path / "out").exists()


def test_weights_of_another_flow_are_refused(celeba, tmp_path, capsys):
    save_flow(face_flow(8, 2, 1, 4), tmp_path / "flow.safetensors")
    with pytest.raises(SystemExit): main(words(celeba, tmp_path))
    assert "belongs to another flow" in capsys.readouterr().err


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "fairbook.face_study", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "celeba64-smiling-pale" in done.stdout and "--train-flow" in done.stdout
