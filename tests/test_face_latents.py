"""`fairbook.face_latents` on generated folders in the true layouts."""
import pickle
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError

from fairbook import face_latents
from fairbook.face_latents import (CelebAFaces, CelebAHQ, FaceLatents, UTKFace, encode_faces, face_pictures, load_face_latents,
                                   make_tiny_celebahq, make_tiny_utkface)
from fairbook.faces import CelebA, FairFace, make_tiny_faces
from fairbook.generators import ConvAutoencoder, PCAGenerator, from_diffae, from_diffusers, save_generator
from fairbook.tensor_files import save_tensors, write_checked

SPLITS = ["train", "valid", "test"]
ANNO, MAPPING = "CelebAMask-HQ-attribute-anno.txt", "CelebA-HQ-to-CelebA-mapping.txt"


@pytest.fixture(scope="module")
def hq_root(tmp_path_factory): return make_tiny_celebahq(tmp_path_factory.mktemp("hq"))


@pytest.fixture(scope="module")
def utk_root(tmp_path_factory): return make_tiny_utkface(tmp_path_factory.mktemp("utk"))


@pytest.fixture(scope="module")
def hq(hq_root): return CelebAHQ(hq_root, target="Smiling", sensitive=("Male", "Young"), size=16)


@pytest.fixture(scope="module")
def pca(hq): return PCAGenerator(3).fit(face_pictures(hq))


class Counting:
    "A generator that counts calls, and is interrupted at call number `stop`."
    def __init__(self, inner, stop=None): self.inner, self.stop, self.calls = inner, stop, 0

    def encode(self, images):
        self.calls += 1
        if self.calls == self.stop: raise KeyboardInterrupt
        return self.inner.encode(images)


# ---------------------------------------------------------------- the toy folders

@pytest.mark.parametrize("make", [make_tiny_celebahq, make_tiny_utkface])
def test_toy_folders_repeat_themselves_and_leave_other_files_alone(tmp_path, make):
    a, b, c = (make(tmp_path / x, 24, seed=s) for x, s in (("a", 1), ("b", 1), ("c", 2)))
    content = lambda root: {p.relative_to(root): p.read_bytes() for p in root.rglob("*.*") if p.is_file()}
    assert content(a) == content(b) != content(c) and sum(p.suffix == ".jpg" for p in content(a)) == 24
    with pytest.raises(ValueError, match="`root` must be an empty folder"): make(a)
    with pytest.raises(ValueError, match="`n` must be at least 20"): make(tmp_path / "d", 19)
    assert not (tmp_path / "d").exists()


# ---------------------------------------------------------------- CelebA and CelebA-HQ

def test_celeba_is_the_loader_of_chapter_1_with_names(tmp_path):
    root = make_tiny_faces(tmp_path, n=40)
    for split in SPLITS:
        ours, theirs = CelebAFaces(root, split, "Bald", ["Young", "Male"], 16), CelebA(root, split, "Bald", ("Young", "Male"), 16)
        assert ours.files == theirs.files and torch.equal(ours.labels, theirs.labels) and torch.equal(ours.groups, theirs.groups)
        assert ours.group_names == theirs.group_names and (ours.split, ours.label_name) == (split, "Bald") and torch.equal(ours[0][0], theirs[0][0])
    assert CelebAFaces(root).label_name == "Attractive" and CelebAFaces(root, sensitive="Young").group_names == ["Young=0", "Young=1"]


def test_celebahq_labels_groups_and_splits_by_hand(hq_root):
    rows = [line.split() for line in (hq_root / ANNO).read_text().splitlines()]
    original = {f"{i}.jpg": file for i, _, file in (line.split() for line in (hq_root / MAPPING).read_text().splitlines()[1:])}
    assert rows[0] == ["20"] and len(rows[1]) == 40 and len(rows) == 22
    part = lambda name: 0 if original[name] <= "162770.jpg" else 1 if original[name] <= "182637.jpg" else 2
    value = lambda r, name: int(r[1 + rows[1].index(name)] == "1")
    for number, split in enumerate(SPLITS):
        data = CelebAHQ(hq_root, split, target="Eyeglasses", sensitive=("Young", "Male", "Bald"), size=16)
        mine = [r for r in rows[2:] if part(r[0]) == number]
        assert data.files == [r[0] for r in mine] and len(mine) == [14, 2, 4][number]
        assert data.labels.tolist() == [value(r, "Eyeglasses") for r in mine]
        assert data.groups.tolist() == [4 * value(r, "Young") + 2 * value(r, "Male") + value(r, "Bald") for r in mine]
        assert data.group_names[5] == "Young=1, Male=0, Bald=1" and (data.split, data.label_name) == (split, "Eyeglasses")


def test_celebahq_split_ends_where_celebas_does(tmp_path):
    root = make_tiny_celebahq(tmp_path)
    numbers = [1, 162770, 162771, 182637, 182638, 202599] + [5] * 14
    lines = [f"{i} {k - 1} {k:06}.jpg a{i} b{i}" for i, k in enumerate(numbers)]
    (root / MAPPING).write_text("\n".join(["idx  orig_idx  orig_file  proc_md5  final_md5", *lines[::-1]]))
    files = [[f"{i}.jpg" for i in group] for group in ([0, 1, *range(6, 20)], [2, 3], [4, 5])]
    assert [CelebAHQ(root, s).files for s in SPLITS] == files


def test_celebahq_items(hq, hq_root):
    x, y, g = hq[2]
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32 and (y, g) == (int(hq.labels[2]), int(hq.groups[2]))
    assert CelebAHQ(hq_root)[0][0].shape == (3, 256, 256)


@pytest.mark.parametrize("damage, message", [
    (lambda t: t.replace("20\n", "21\n", 1), "promises 21 rows of 40 times -1 or 1, and has 20"), (lambda t: t[:-5], "fetch it again"),
    (lambda t: "".join(t.splitlines(True)[:-1]), "promises 20 rows of 40 times -1 or 1, and has 19 rows"), (lambda t: t.replace(" -1 ", " 0 ", 1), "damaged"),
    (lambda t: t.replace(" Young", ""), "damaged"), (lambda t: re.sub(r" -?1$", "", t.replace(" Young", ""), flags=re.M), "rows of 39; fetch it again")])
def test_damaged_attributes_are_refused(tmp_path, damage, message):
    path = make_tiny_celebahq(tmp_path) / ANNO
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=message): CelebAHQ(tmp_path)


@pytest.mark.parametrize("old, new, message", [
    ("orig_file", "file", "has no column orig_file"), ("19          ", "77          ", "no picture of CelebA for 19.jpg"), (".jpg", "", None), (".jpg", ".png", "no picture of CelebA for 0.jpg")])
def test_damaged_mapping_is_refused(tmp_path, old, new, message):
    path = make_tiny_celebahq(tmp_path) / MAPPING
    path.write_text(re.sub(rf"^{old}" if old.startswith("19") else re.escape(old), new, path.read_text(), flags=re.M))
    if message is None: assert len(CelebAHQ(tmp_path)) == 14   # numbers without an ending are still numbers
    else:
        with pytest.raises(ValueError, match=message): CelebAHQ(tmp_path)


@pytest.mark.parametrize("name", ["CelebA-HQ-img", ANNO, MAPPING])
def test_celebahq_says_what_is_missing_and_where_to_get_it(tmp_path, name):
    root = make_tiny_celebahq(tmp_path / "hq")
    (root / name).rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=rf"{name} is not there.*non-commercial.*get CelebAMask-HQ.zip from https://github.com/switchablenorms/CelebAMask-HQ"): CelebAHQ(root)


def test_a_listed_picture_that_is_absent_is_found_at_once(tmp_path):
    root = make_tiny_celebahq(tmp_path)
    absent = CelebAHQ(root, "test").files[0]
    (root / "CelebA-HQ-img" / absent).unlink()
    with pytest.raises(FileNotFoundError, match=absent): CelebAHQ(root, "test")
    CelebAHQ(root, "train")


@pytest.mark.parametrize("options, message", [
    (dict(split="val"), "`split` must be one of"), (dict(target="Smilling"), "similar ones: Smiling"), (dict(sensitive="Mal"), "no attribute 'Mal'; similar ones: .*Male"),
    (dict(sensitive=()), "`sensitive` must name"), (dict(sensitive=("Male", "Male")), "`sensitive` must name"), (dict(sensitive="Attractive"), "not the target 'Attractive'"), (dict(size=0), "`size`")])
def test_celebahq_bad_options(hq_root, options, message):
    with pytest.raises(ValueError, match=message): CelebAHQ(hq_root, **options)


# ---------------------------------------------------------------- UTKFace

def test_utkface_labels_and_groups_by_hand(utk_root):
    seen = []
    for split in SPLITS:
        data = UTKFace(utk_root, split, "age", ("race", "gender"), size=16, age_from=50)
        for file, y, g in zip(data.files, data.labels.tolist(), data.groups.tolist()):
            age, gender, race, _ = file.split("_")
            assert y == (int(age) >= 50) and g == 2 * int(race) + int(gender)
        assert data.label_name == "age >= 50" and data.group_names[3] == "race=Black, gender=female" and len(data.group_names) == 10
        seen += data.files
    assert sorted(seen) == sorted(p.name for p in utk_root.iterdir()) and len(seen) == 20


def test_utkface_race_as_label_and_age_as_group(utk_root):
    data = UTKFace(utk_root, target="race", sensitive="age")
    assert data.labels.tolist() == [int(f.split("_")[2]) for f in data.files] and data.group_names == ["age=under 30", "age=30 or older"]
    assert data.groups.tolist() == [int(int(f.split("_")[0]) >= 30) for f in data.files] and data[0][0].shape == (3, 64, 64)


GOOD = ["26_0_2_20170116174525125.jpg.chip.jpg", "1_1_4_20161219230714236.jpg", "55_0_0_20170116232725357jpg.chip.jpg", "24_0_1_20170116220224657 .jpg.chip.jpg",
        "44_1_4_20170116235150272.pg.chip.jpg", "116_1_0_20170120134921760.JPG", "5_0_1_20170116174525125.jpeg"]
ODD = ["39_1_20170116174525125.jpg.chip.jpg", "61_3_20170109150557335.jpg.chip.jpg", "53__0_20170116184028385.jpg", "26_2_2_20170116174525125.jpg", "26_0_5_20170116174525125.jpg", "face.jpg", "_1_2_2017.jpg"]


def test_names_that_lack_a_field_are_skipped_and_counted(tmp_path, utk_root):
    some = next(utk_root.glob("*.jpg"))
    for name in GOOD + ODD + ["README.txt"]: shutil.copy(some, tmp_path / name)
    with pytest.warns(UserWarning, match="skipped 7 of 14 pictures, whose names lack age, gender or race"): data = [UTKFace(tmp_path, s, size=8) for s in SPLITS]
    assert sorted(sum((d.files for d in data), [])) == sorted(GOOD)
    assert all(d[i][0].shape == (3, 8, 8) for d in data for i in range(len(d)))
    for name in GOOD: (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match="among 7 pictures.*UTKFace.tar.gz, from https://susanqq.github.io/UTKFace/"): UTKFace(tmp_path)


def test_utkface_without_a_warning_when_all_names_are_whole(utk_root, recwarn):
    UTKFace(utk_root)
    assert not recwarn.list


def test_utkface_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"away is not there\. UTKFace \(non-commercial research only\)"): UTKFace(tmp_path / "away")


@pytest.mark.parametrize("options, message", [
    (dict(split="val"), "`split`"), (dict(target="sex"), "no column 'sex'; it has age, gender and race"), (dict(sensitive=("race", "hair")), "no column 'hair'"),
    (dict(sensitive="gender"), "not the target 'gender'"), (dict(age_from=0), "`age_from`"), (dict(age_from=117), "`age_from`"), (dict(size=-1), "`size`")])
def test_utkface_bad_options(utk_root, options, message):
    with pytest.raises(ValueError, match=message): UTKFace(utk_root, **options)


@given(st.lists(st.text("abc0123_", min_size=1), min_size=2, unique=True), st.integers(0, 9), st.randoms())
@settings(max_examples=50)
def test_a_picture_stays_in_its_split_whoever_is_around(names, seed, random):
    whole = dict(zip(names, face_latents._hash_split(names, seed)))
    some = random.sample(names, k=len(names) // 2)
    assert all(whole[n] == p for n, p in zip(some, face_latents._hash_split(some, seed))) and set(whole.values()) <= {0, 1, 2}


def test_shares_of_the_hash_split():
    names, n = [f"{i}_0_0_2017.jpg" for i in range(20_000)], 20_000
    count = np.bincount(face_latents._hash_split(names, 3))
    for k, p in zip(count, (.7, .1, .2)): assert abs(k - n * p) < 4.5 * (n * p * (1 - p))**.5


# ---------------------------------------------------------------- pictures

def test_pictures_are_those_of_the_files(utk_root):
    data = UTKFace(utk_root, size=32)
    with Image.open(utk_root / data.files[1]) as picture: want = torch.tensor(np.array(picture.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    got = face_pictures(data, [1, 0])
    torch.testing.assert_close(got[0], want, atol=1e-6, rtol=0)
    assert torch.equal(got.flip(0), face_pictures(data)[:2]) and 0 <= got.min() and got.max() <= 1


# ---------------------------------------------------------------- the table

LEVELS = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.lists(st.text("xyz ", min_size=1, max_size=4), min_size=1, max_size=4, unique=True), min_size=1, max_size=3)


@given(LEVELS, st.integers(0, 10**6))
@settings(max_examples=60)
def test_sensitive_columns_undo_the_crossing(levels, seed):
    rng = np.random.default_rng(seed)
    codes = {c: rng.integers(0, len(v), 7) for c, v in levels.items()}
    s, names = face_latents._span(codes, levels, list(levels))
    table = FaceLatents(torch.zeros(7, 2), torch.zeros(7, dtype=torch.int64), torch.tensor(s), tuple(names), "y", {})
    columns = table.sensitive_columns()
    assert list(columns) == list(levels) and all(np.array_equal(columns[c].numpy(), codes[c]) for c in levels)
    assert all(names[i] == ", ".join(f"{c}={levels[c][codes[c][k]]}" for c in levels) for k, i in enumerate(s))


def test_groups_without_attribute_names_are_not_taken_apart(tmp_path):
    faces = FairFace(make_tiny_faces(tmp_path, "fairface", n=40), "val", size=8)
    table = encode_faces(faces, PCAGenerator(2).fit(face_pictures(faces)))
    assert table.label_name == "label" and table.source["split"] == "not recorded" and len(table.group_names) == 14
    with pytest.raises(ValueError, match="Male=0, Young=1"): table.sensitive_columns()


# ---------------------------------------------------------------- encoding

@pytest.mark.parametrize("batch_size, part_size, num_workers", [(64, 2048, 0), (1, 3, 0), (5, 4, 0), (3, 14, 2)])
def test_latents_do_not_depend_on_batches_parts_and_workers(hq, pca, tmp_path, batch_size, part_size, num_workers):
    table = encode_faces(hq, pca, cache=tmp_path / "x", batch_size=batch_size, part_size=part_size, num_workers=num_workers, progress=True, device="cpu")
    torch.testing.assert_close(table.E, pca.encode(face_pictures(hq)), atol=1e-5, rtol=1e-5)
    assert torch.equal(table.y, hq.labels) and torch.equal(table.s, hq.groups) and table.group_names == tuple(hq.group_names)
    assert table.source["dataset"] == "CelebAHQ" and table.source["generator"] == "PCAGenerator" and table.label_name == "Smiling"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "x.sha256"]


def test_latents_are_those_of_scikit_learn(hq):
    x = face_pictures(hq).double()
    table = encode_faces(hq, PCAGenerator(3, dtype=torch.float64).fit(x))
    theirs = torch.from_numpy(PCA(3, svd_solver="full").fit_transform(x.flatten(1).numpy()))
    assert table.E.dtype == torch.float64
    torch.testing.assert_close(table.E.abs(), theirs.abs(), atol=1e-4, rtol=1e-4)


def toy_diffae(): return SimpleNamespace(encode=lambda x: x.mean((2, 3)), encode_stochastic=lambda x, c, T: x, render=lambda n, c, T: n)
def toy_kl(): return SimpleNamespace(encode=lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mean=x[:, :1, ::4, ::4])), decode=lambda z: SimpleNamespace(sample=z))


@pytest.mark.parametrize("build, d", [(lambda: ConvAutoencoder(5, width=4, epochs=1), 5), (lambda: from_diffae(toy_diffae()), 3), (lambda: from_diffusers(toy_kl()), 16)], ids=["conv", "diffae", "kl"])
@pytest.mark.parametrize("kind", ["celeba", "hq", "utk"])
def test_every_data_set_with_every_generator(tmp_path, kind, build, d):
    data = {"celeba": lambda: CelebAFaces(make_tiny_faces(tmp_path / "f", n=40), size=16), "hq": lambda: CelebAHQ(make_tiny_celebahq(tmp_path / "f"), size=16), "utk": lambda: UTKFace(make_tiny_utkface(tmp_path / "f"), size=16)}[kind]()
    generator = build().fit(x := face_pictures(data))
    table = encode_faces(data, generator, cache=tmp_path / "latents" / "t.safetensors")
    assert table.E.shape == (len(data), d) and not table.E.requires_grad
    torch.testing.assert_close(table.E, generator.encode(x), atol=1e-4, rtol=1e-4)
    back = load_face_latents(tmp_path / "latents" / "t.safetensors")
    assert torch.equal(back.E, table.E) and torch.equal(back.y, table.y) and torch.equal(back.s, table.s)
    assert (back.group_names, back.label_name, back.source) == (table.group_names, table.label_name, table.source)


def test_latents_carry_no_graph(hq):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 2))
    assert not encode_faces(hq, SimpleNamespace(encode=net)).E.requires_grad


def test_every_device_rounds_differently_and_the_cache_bears_it(hq, pca, tmp_path):
    encode_faces(hq, pca, cache=tmp_path / "x")
    class PCAGenerator:
        def __init__(self, off): self.off = off
        def encode(self, images): return pca.encode(images) * (1 + self.off)
    encode_faces(hq, PCAGenerator(1e-3), cache=tmp_path / "x")
    with pytest.raises(ValueError, match="same class but other weights"): encode_faces(hq, PCAGenerator(.05), cache=tmp_path / "x")


# ---------------------------------------------------------------- killed runs

@pytest.mark.parametrize("stop", range(2, 7))
def test_a_killed_run_goes_on_where_it_was(hq, pca, tmp_path, stop):
    want, generator = encode_faces(hq, pca, batch_size=3).E, Counting(pca, stop)
    with pytest.raises(KeyboardInterrupt): encode_faces(hq, generator, cache=tmp_path / "x", batch_size=3, part_size=3)
    assert not (tmp_path / "x").exists()
    table = encode_faces(hq, generator, cache=tmp_path / "x", batch_size=3, part_size=3)
    assert generator.calls == stop + 1 + (5 - (stop - 2))          # five parts, of which stop - 2 were there, and the probes
    assert torch.equal(table.E, want) and sorted(p.name for p in tmp_path.iterdir()) == ["x", "x.sha256"]
    assert encode_faces(hq, generator, cache=tmp_path / "x") and generator.calls == stop + 1 + (5 - (stop - 2)) + 1


def killed(hq, generator, cache):
    with pytest.raises(KeyboardInterrupt): encode_faces(hq, generator, cache=cache, part_size=5)
    return cache.with_name(cache.name + ".parts")


def test_other_parts_are_not_used(hq, pca, tmp_path):
    parts = killed(hq, Counting(pca, 3), tmp_path / "x")
    other = Counting(PCAGenerator(3).fit(face_pictures(hq).flip(3)))
    with pytest.raises(ValueError, match=r"00000000-00000005.safetensors holds other latents: .*other weights"): encode_faces(hq, other, cache=tmp_path / "x", part_size=5)
    assert torch.equal(encode_faces(hq, Counting(pca), cache=tmp_path / "x", part_size=4).E, encode_faces(hq, pca).E) and not parts.exists()


def test_a_part_without_its_sum_is_made_again(hq, pca, tmp_path):
    parts = killed(hq, Counting(pca, 4), tmp_path / "x")
    side, = parts.glob("00000005*.sha256")
    side.unlink()
    next(parts.glob("00000005*")).write_bytes(b"half")
    assert torch.equal(encode_faces(hq, Counting(pca), cache=tmp_path / "x", part_size=5).E, encode_faces(hq, pca).E)


def test_a_kill_while_the_whole_is_written(hq, pca, tmp_path, monkeypatch):
    real, calls = face_latents.save_tensors, []
    def die_at_the_end(tensors, path, words):
        if "y" not in tensors: return real(tensors, path, words)
        real(tensors, path, words)
        (tmp_path / "x.sha256").unlink()
        raise KeyboardInterrupt
    monkeypatch.setattr(face_latents, "save_tensors", die_at_the_end)
    killed(hq, Counting(pca), tmp_path / "x")
    monkeypatch.undo()
    generator = Counting(pca)
    assert torch.equal(encode_faces(hq, generator, cache=tmp_path / "x", part_size=5).E, encode_faces(hq, pca).E) and generator.calls == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "x.sha256"]


def test_nothing_is_written_without_a_cache(hq, pca, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode_faces(hq, pca)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- caches of something else

def test_another_question_about_the_same_pictures(hq, hq_root, pca, tmp_path):
    generator = Counting(pca)
    first = encode_faces(hq, generator, cache=tmp_path / "x")
    other = CelebAHQ(hq_root, target="Bald", sensitive="Male", size=16)
    table = encode_faces(other, generator, cache=tmp_path / "x")
    assert generator.calls == 3 and torch.equal(table.E, first.E) and torch.equal(table.y, other.labels) and torch.equal(table.s, other.groups)
    assert (table.label_name, table.group_names, table.source["label"]) == ("Bald", ("Male=0", "Male=1"), "Bald") and load_face_latents(tmp_path / "x").label_name == "Smiling"


def change_file(root):
    path = root / "CelebA-HQ-img" / CelebAHQ(root).files[4]
    Image.new("RGB", (128, 128)).save(path)
    return CelebAHQ(root, size=16)


@pytest.mark.parametrize("other, words", [
    (lambda root: CelebAHQ(root, "test", size=16), ["split is train there and test here", "pictures is 14 there and 4 here", "files is"]),
    (lambda root: CelebAHQ(root, size=24), ["size is 16 there and 24 here"]), (change_file, ["files is"]),
    (lambda root: UTKFace(make_tiny_utkface(root / "utk"), size=16), ["dataset is CelebAHQ there and UTKFace here"])], ids=["split", "size", "file", "data set"])
def test_a_cache_of_other_pictures_is_refused(tmp_path, other, words):
    root = make_tiny_celebahq(tmp_path / "hq")
    brightness = SimpleNamespace(encode=lambda x: x.mean((2, 3)))
    encode_faces(CelebAHQ(root, size=16), brightness, cache=tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    with pytest.raises(ValueError, match="x holds other latents") as error: encode_faces(other(root), brightness, cache=tmp_path / "x")
    assert all(w in str(error.value) for w in words) and "delete this one" in str(error.value) and (tmp_path / "x").read_bytes() == before
    if words == ["files is"] or words[0].startswith("size"): assert str(error.value).count(" there and ") == 1


@pytest.mark.parametrize("other, words", [
    (lambda x: PCAGenerator(2).fit(x), "latent is 3 numbers, torch.float32 there and 2 numbers"), (lambda x: ConvAutoencoder(3, width=4, epochs=1).fit(x), "generator is PCAGenerator there and ConvAutoencoder here"),
    (lambda x: PCAGenerator(3, dtype=torch.float64).fit(x), "torch.float64"), (lambda x: PCAGenerator(3, whiten=True).fit(x), "other weights"), (lambda x: PCAGenerator(3).fit(x[1:]), "other weights")],
    ids=["length", "class", "dtype", "whitened", "one picture less"])
def test_a_cache_of_another_generator_is_refused(hq, pca, tmp_path, other, words):
    encode_faces(hq, pca, cache=tmp_path / "x")
    with pytest.raises(ValueError, match=words): encode_faces(hq, other(face_pictures(hq)), cache=tmp_path / "x")


def test_files_that_are_no_caches(hq, pca, tmp_path):
    path = tmp_path / "x"
    for write in (lambda: save_generator(pca, path), lambda: save_tensors({"E": torch.zeros(14, 3)}, path)):
        write()
        with pytest.raises(ValueError, match="kind is not given there"): encode_faces(hq, pca, cache=path)
        with pytest.raises(ValueError, match="no finished file of encode_faces"): load_face_latents(path)
    for load in (lambda: encode_faces(hq, pca, cache=path), lambda: load_face_latents(path)):
        write_checked(pickle.dumps({"E": 0}), path)
        with pytest.raises(ValueError, match="is a pickle"): load()
    with pytest.raises(FileNotFoundError): load_face_latents(tmp_path / "none")


def test_a_damaged_cache_is_refused(hq, pca, tmp_path):
    encode_faces(hq, pca, cache=tmp_path / "x")
    data = bytearray((tmp_path / "x").read_bytes())
    data[-3] ^= 4
    (tmp_path / "x").write_bytes(data)
    for load in (lambda: encode_faces(hq, pca, cache=tmp_path / "x"), lambda: load_face_latents(tmp_path / "x")):
        with pytest.raises(ValueError, match="damaged"): load()
    (tmp_path / "x.sha256").unlink()
    with pytest.raises(ValueError, match="not beside"): encode_faces(hq, pca, cache=tmp_path / "x")


def test_a_part_is_no_finished_file(hq, pca, tmp_path):
    part = next(killed(hq, Counting(pca, 3), tmp_path / "x").glob("*.safetensors"))
    with pytest.raises(ValueError, match="no finished file"): load_face_latents(part)


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("generator, message", [
    (object(), "must have a method `encode`, got object"), (PCAGenerator(2), "call fit"), (ConvAutoencoder(2), "call fit"), (from_diffae(toy_diffae()), "call fit|know its pictures"),
    (PCAGenerator(2).fit(torch.rand(5, 3, 8, 8)), r"shape \[3, 8, 8\], the data set gives \[3, 16, 16\]"), (PCAGenerator(2).fit(torch.rand(5, 1, 16, 16)), r"shape \[1, 16, 16\]"),
    (SimpleNamespace(encode=lambda x: x), r"\[4, d\], got torch.float32 \[4, 3, 16, 16\]; flatten"), (SimpleNamespace(encode=lambda x: x[:2].flatten(1)), "flatten|must encode 4"),
    (SimpleNamespace(encode=lambda x: x.flatten(1).long()), "got torch.int64"), (SimpleNamespace(encode=lambda x: x.flatten(1).tolist()), "got list"), (SimpleNamespace(encode=lambda x: x.flatten(1) * float("nan")), "NaN or infinity")])
def test_bad_generators(hq, tmp_path, generator, message):
    with pytest.raises(ValueError, match=message): encode_faces(hq, generator, cache=tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_unfitted_is_said_as_scikit_learn_says_it(hq):
    with pytest.raises(NotFittedError): encode_faces(hq, PCAGenerator(2))


@pytest.mark.parametrize("options", [dict(batch_size=0), dict(part_size=0)])
def test_bad_options(hq, pca, options):
    with pytest.raises(ValueError, match="must be at least 1"): encode_faces(hq, pca, **options)


def test_other_data_sets_and_empty_ones(pca, utk_root, untyped):
    for bad in ([1, 2], torch.utils.data.TensorDataset(torch.zeros(3, 3))):
        with pytest.raises(ValueError, match="`dataset` must be CelebAFaces"): encode_faces(bad, pca)
        with pytest.raises(ValueError, match="`dataset` must be CelebAFaces"): face_pictures(bad)
    empty = next(d for seed in range(200) if not len(d := UTKFace(utk_root, "valid", seed=seed, size=16)))
    with pytest.raises(ValueError, match="no pictures in its split"): encode_faces(empty, pca)


def test_an_unreadable_picture_is_named_and_what_was_done_is_kept(tmp_path):
    root = make_tiny_celebahq(tmp_path / "hq")
    data = CelebAHQ(root, size=16)
    bad = root / "CelebA-HQ-img" / data.files[-1]
    size = bad.stat().st_size
    bad.write_bytes(b"x" * size)
    generator = Counting(SimpleNamespace(encode=lambda x: x.mean((2, 3))))
    with pytest.raises(ValueError, match=rf"cannot read {re.escape(str(bad))}"): encode_faces(data, generator, cache=tmp_path / "x", part_size=7)
    with pytest.raises(ValueError, match="cannot read"): face_pictures(data)
    assert not (tmp_path / "x").exists() and len(list((tmp_path / "x.parts").glob("*.safetensors"))) == 1


def test_large_latents_are_announced(hq, pca, monkeypatch, recwarn):
    encode_faces(hq, pca)
    assert not recwarn.list
    monkeypatch.setattr(face_latents, "_BIG", 14 * 3 * 4 - 1)
    with pytest.warns(UserWarning, match="14 latents of 3 numbers take 0.0 GB"): encode_faces(hq, pca)
    with pytest.warns(UserWarning, match="30000 latents of 16384 numbers take 2.0 GB"): face_latents._warn_if_big(30_000, torch.zeros(4, 16384))
