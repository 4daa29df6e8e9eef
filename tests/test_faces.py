"""`fairbook.faces` on generated folders in the true layouts."""
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from fairbook.faces import CelebA, FaceResult, FairFace, SimpleCNN, StratifiedBatches, make_tiny_faces, train_faces
from fairbook.metrics import group_means, mean_gap



@pytest.fixture(scope="module")
def celeba(tmp_path_factory): return make_tiny_faces(tmp_path_factory.mktemp("celeba"), n=100)


@pytest.fixture(scope="module")
def fairface(tmp_path_factory): return make_tiny_faces(tmp_path_factory.mktemp("fairface"), "fairface", n=150)


class MatchMeans(torch.nn.Module):
    "Exact projection on equal group means."
    def forward(self, logits, groups): return logits - group_means(logits, groups).mean[groups] + logits.mean()


# ---------------------------------------------------------------- the generator

@pytest.mark.parametrize("kind", ["celeba", "fairface"])
def test_generator_repeats_itself_and_leaves_other_files_alone(tmp_path, kind):
    a, b, c = (make_tiny_faces(tmp_path / x, kind, n=40, seed=s) for x, s in (("a", 1), ("b", 1), ("c", 2)))
    files = sorted(p.relative_to(a) for p in a.rglob("*.*"))
    assert all((a / f).read_bytes() == (b / f).read_bytes() for f in files) and len(files) == 42
    assert any((a / f).read_bytes() != (c / f).read_bytes() for f in files)
    with pytest.raises(ValueError, match="`root` must be an empty folder"): make_tiny_faces(a, kind)


def test_generator_refuses_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="`kind` must be 'celeba' or 'fairface', got 'faces'"): make_tiny_faces(tmp_path, "faces")
    with pytest.raises(ValueError, match="`n` must be at least 40"): make_tiny_faces(tmp_path, n=10)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- CelebA

def test_celeba_labels_groups_and_splits_by_hand(celeba):
    rows = [line.split() for line in (celeba / "list_attr_celeba.txt").read_text().splitlines()]
    parts = dict(line.split() for line in (celeba / "list_eval_partition.txt").read_text().splitlines())
    assert rows[0] == ["100"] and len(rows[1]) == 40 and len(rows) == 102
    for number, split in enumerate(["train", "valid", "test"]):
        data = CelebA(celeba, split, target="Eyeglasses", sensitive=("Young", "Male", "Bald"), size=16)
        mine = [r for r in rows[2:] if parts[r[0]] == str(number)]
        value = lambda r, name: int(r[1 + rows[1].index(name)] == "1")
        assert data.files == [r[0] for r in mine]
        assert data.labels.tolist() == [value(r, "Eyeglasses") for r in mine]
        assert data.groups.tolist() == [4 * value(r, "Young") + 2 * value(r, "Male") + value(r, "Bald") for r in mine]
        assert data.group_names[5] == "Young=1, Male=0, Bald=1" and len(data.group_names) == 8


def test_pictures_are_normalised_squares(celeba):
    data = CelebA(celeba, size=24)
    x, y, g = data[3]
    assert x.shape == (3, 24, 24) and x.dtype == torch.float32 and (y, g) == (int(data.labels[3]), int(data.groups[3]))
    with Image.open(celeba / "img_align_celeba" / data.files[3]) as picture:
        square = picture.convert("RGB").crop((0, 20, 178, 198)).resize((24, 24), Image.Resampling.BICUBIC)
    want = (torch.tensor(np.array(square)).permute(2, 0, 1) / 255 - torch.tensor([.485, .456, .406]).view(3, 1, 1)) / torch.tensor([.229, .224, .225]).view(3, 1, 1)
    torch.testing.assert_close(x, want, atol=.02, rtol=0)


def test_default_size_and_workers(celeba):
    x, y, g = next(iter(DataLoader(CelebA(celeba), batch_size=4, num_workers=1)))
    assert x.shape == (4, 3, 224, 224) and y.dtype == g.dtype == torch.int64


def test_grey_pictures_become_three_channels(tmp_path):
    root = make_tiny_faces(tmp_path, n=40)
    path = root / "img_align_celeba" / "000001.jpg"
    Image.open(path).convert("L").save(path)
    assert CelebA(root, size=16)[0][0].shape == (3, 16, 16)


# ---------------------------------------------------------------- FairFace

def test_fairface_labels_and_groups_by_hand(fairface):
    table = pd.read_csv(fairface / "fairface_label_train.csv")
    data = FairFace(fairface, "train", size=16)
    old = {"30-39", "40-49", "50-59", "60-69", "more than 70"}
    assert data.labels.tolist() == [int(a in old) for a in table["age"]]
    assert [data.group_names[g] for g in data.groups] == [f"{a}, {b}" for a, b in zip(table["gender"], table["race"])]
    assert len(set(data.group_names)) == 14 and len(data) == 120 and len(FairFace(fairface, "val")) == 30


def test_fairface_codes_do_not_depend_on_who_is_present(tmp_path):
    root = make_tiny_faces(tmp_path, "fairface", n=40)
    names = FairFace(root, "val").group_names
    path = root / "fairface_label_val.csv"
    table = pd.read_csv(path)
    table[table["race"] == table["race"][0]].to_csv(path, index=False)   # one race left
    data = FairFace(root, "val", size=16)
    assert data.group_names == names and data.group_names[int(data.groups[0])].endswith(table["race"][0])


# ---------------------------------------------------------------- what is absent or damaged

@pytest.mark.parametrize("name", ["list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba", "img_align_celeba/000002.jpg"])
def test_celeba_names_what_is_absent_and_where_to_get_it(tmp_path, name):
    root = make_tiny_faces(tmp_path / "root", n=40)
    (root / name).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError) as e: CelebA(root)
    assert name in str(e.value) and "https://mmlab.ie.cuhk.edu.hk" in str(e.value) and "non-commercial" in str(e.value)


@pytest.mark.parametrize("name", ["fairface_label_train.csv", "train", "train/5.jpg"])
def test_fairface_names_what_is_absent_and_where_to_get_it(tmp_path, name):
    root = make_tiny_faces(tmp_path / "root", "fairface", n=40)
    (root / name).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError) as e: FairFace(root)
    assert name in str(e.value) and "https://github.com/joojs/fairface" in str(e.value) and "CC BY 4.0" in str(e.value)


def test_absence_of_several_pictures_is_counted(tmp_path):
    root = make_tiny_faces(tmp_path, n=40)
    for i in (2, 3, 7): (root / f"img_align_celeba/{i:06}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="000002.jpg is not there, nor are 2 others"): CelebA(root)


def _edit(name, change):
    def damage(root): (root / name).write_text(change((root / name).read_text()))
    return damage


DAMAGE = {
    "rows cut off": ("celeba", _edit("list_attr_celeba.txt", lambda t: t[:len(t) // 2].rsplit("\n", 1)[0] + "\n"), "list_attr_celeba.txt is damaged: it promises 40 rows"),
    "cut within a row": ("celeba", _edit("list_attr_celeba.txt", lambda t: t[:-30]), "list_attr_celeba.txt is damaged"),
    "odd entry": ("celeba", _edit("list_attr_celeba.txt", lambda t: t.replace("000002.jpg -1", "000002.jpg  0").replace("000002.jpg  1", "000002.jpg  0")), "list_attr_celeba.txt is damaged"),
    "partition cut off": ("celeba", _edit("list_eval_partition.txt", lambda t: "".join(t.splitlines(True)[:-2])), "list_eval_partition.txt gives no split for 000039.jpg"),
    "unknown split": ("celeba", _edit("list_eval_partition.txt", lambda t: t.replace("000004.jpg 0", "000004.jpg 7")), "gives no split for 000004.jpg"),
    "broken picture": ("celeba", lambda root: (root / "img_align_celeba/000001.jpg").write_bytes(b"not a picture"), "cannot read .*000001.jpg"),
    "picture cut off": ("celeba", lambda root: (root / "img_align_celeba/000001.jpg").write_bytes((root / "img_align_celeba/000001.jpg").read_bytes()[:900]), "cannot read .*000001.jpg"),
    "unknown race": ("fairface", _edit("fairface_label_train.csv", lambda t: t.replace("White", "Whyte")), r"column 'race' of FairFace has unknown entries \['Whyte'\]"),
    "no column": ("fairface", _edit("fairface_label_train.csv", lambda t: t.replace("gender", "sex", 1)), "no column 'gender'"),
}


@pytest.mark.parametrize("kind, damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_refused(tmp_path, kind, damage, message):
    root = make_tiny_faces(tmp_path, kind, n=40)
    damage(root)
    with pytest.raises(ValueError, match=message): (CelebA if kind == "celeba" else FairFace)(root, size=16)[0]


ARGUMENTS = {
    "target": (dict(target="Smile"), "no attribute 'Smile'; similar ones: Smiling"),
    "sensitive": (dict(sensitive=("Male", "Old")), "no attribute 'Old'; similar ones"),
    "nothing similar": (dict(target="zzz"), "similar ones: none"),
    "split": (dict(split="val"), r"`split` must be one of \['train', 'valid', 'test'\], got 'val'"),
    "size": (dict(size=0), "`size` must be a positive number"),
}


@pytest.mark.parametrize("arguments, message", ARGUMENTS.values(), ids=ARGUMENTS)
def test_celeba_bad_arguments(celeba, arguments, message):
    with pytest.raises(ValueError, match=message): CelebA(celeba, **arguments)


def test_fairface_bad_split(fairface):
    with pytest.raises(ValueError, match="`split` must be 'train' or 'val', got 'test'"): FairFace(fairface, "test")


# ---------------------------------------------------------------- stratified batches

def group_vectors(): return st.lists(st.integers(5, 60), min_size=1, max_size=5)


@given(group_vectors(), st.integers(5, 25), st.integers(0, 5))
def test_batches_have_constant_composition_and_no_repetition(sizes, batch_size, seed):
    groups = torch.repeat_interleave(torch.arange(0, 2 * len(sizes), 2), torch.tensor(sizes))   # odd codes are absent
    groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]
    if batch_size > sum(sizes):
        with pytest.raises(ValueError, match="is too large"): StratifiedBatches(groups, batch_size, seed)
        return
    batches = StratifiedBatches(groups, batch_size, seed)
    drawn = list(batches)
    flat = sum(drawn, [])
    assert len(drawn) == len(batches) and len(set(flat)) == len(flat) == len(groups) - batches.n_dropped
    for batch in drawn:
        assert len(batch) == batch_size
        assert {c: int((groups[batch] == c).sum()) for c in groups.unique().tolist()} == batches.per_group
    exact = {2 * k: n * batch_size / sum(sizes) for k, n in enumerate(sizes)}
    if min(exact.values()) >= 1: assert all(abs(batches.per_group[c] - e) < 1 + 1e-9 for c, e in exact.items())


@given(group_vectors(), st.floats(0, .5), st.integers(0, 20))
def test_batch_gaps_within_tol_bound_the_pooled_gap(sizes, tol, seed):
    g = torch.Generator().manual_seed(seed)
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    z = torch.randn(len(groups), dtype=torch.float64, generator=g) * 3
    out, seen = [], []
    for batch in map(torch.tensor, StratifiedBatches(groups, len(sizes) + 2, seed)):   # every batch at another level, its gap exactly within tol
        shift = 5 * torch.randn(1, dtype=torch.float64, generator=g) + tol * torch.rand(len(sizes), dtype=torch.float64, generator=g)
        out.append(MatchMeans()(z[batch], groups[batch]) + shift[groups[batch]])
        seen.append(groups[batch])
    pooled = mean_gap(torch.cat(out), torch.cat(seen)).value
    assert pooled.isnan() == (len(sizes) == 1) and not pooled > tol + 1e-12


def test_batches_differ_between_passes_and_repeat_by_seed():
    groups = torch.arange(60) % 3
    a, b, c = (StratifiedBatches(groups, 12, seed) for seed in (0, 0, 1))
    first, second = list(a), list(a)
    assert first != second and [list(b), list(b)] == [first, second] and list(c) != first
    assert sum(len(x) for x in first) == 60 and a.n_dropped == 0


def test_small_group_keeps_a_place_and_ends_the_pass():
    groups = torch.tensor([0] * 997 + [1] * 3)
    batches = StratifiedBatches(groups, 100)
    assert batches.per_group == {0: 99, 1: 1} and len(batches) == 3 and batches.n_dropped == 700


@pytest.mark.parametrize("groups, batch_size, message", [
    (torch.arange(20) % 4, 3, "`batch_size` must be at least the number of groups, 4, got 3"),
    (torch.arange(20) % 4, 40, r"`batch_size` 40 is too large for groups of sizes \[5, 5, 5, 5\]")])
def test_batches_bad_input(groups, batch_size, message):
    with pytest.raises(ValueError, match=message): StratifiedBatches(groups, batch_size)


# ---------------------------------------------------------------- network and training

def test_simple_cnn_contract():
    net = SimpleCNN(width=8)
    x = torch.randn(3, 3, 20, 31)
    assert net(x).shape == (3, 1)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))   # one picture's output does not depend on the others
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    twin = SimpleCNN(width=8)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(net(x), twin(x))
    with pytest.raises(ValueError, match="`width` must be a positive multiple of 4, got 6"): SimpleCNN(width=6)


class Tiny(torch.nn.Module):
    "A linear model of the mean colour: fast."
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 1)
    def forward(self, x): return self.head(x.mean((2, 3)))


def test_training_learns_the_label(tmp_path):
    root = make_tiny_faces(tmp_path, n=400)
    torch.manual_seed(0)
    r = train_faces(SimpleCNN(), CelebA(root, size=32), CelebA(root, "test", size=32), epochs=10, batch_size=16)
    assert isinstance(r, FaceResult) and r.accuracy > .9 and r.losses[-1] < r.losses[0] / 3 and len(r.losses) == 10
    assert r.seconds_per_epoch > 0 and float(r.gap) > .5


def test_layer_closes_the_pooled_gap_and_is_used_in_training(celeba):
    train, test, calls = CelebA(celeba, size=16), CelebA(celeba, "test", size=16), []

    def layer(logits, groups):
        calls.append((len(logits), torch.bincount(groups, minlength=4).tolist()))
        return MatchMeans()(logits, groups)

    r = train_faces(Tiny(), train, test, layer=layer, epochs=2, batch_size=8)
    assert float(r.gap) < 1e-6 and calls[-1][0] == len(test)
    assert all(c == calls[0] for c in calls[:-1]) and calls[0][0] == 8 and len(calls) == 1 + 2 * len(StratifiedBatches(train.groups, 8))


def test_a_module_with_parameters_can_be_trained_and_figures_are_those_of_the_test_set(celeba):
    train, test, model = CelebA(celeba, size=16), CelebA(celeba, "test", size=16), Tiny()
    before = model.head.weight.clone()
    r = train_faces(model, train, test, epochs=1, batch_size=16, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=.1))
    assert not torch.equal(before, model.head.weight)
    z = model(torch.stack([x for x, _, _ in test])).flatten().detach()
    assert r.accuracy == pytest.approx(((z > 0) == test.labels).double().mean().item())
    torch.testing.assert_close(r.gap.by_group, group_means(z, test.groups, n_groups=4).mean, equal_nan=True)


def test_same_seed_same_result(celeba):
    def run(seed):
        torch.manual_seed(0)
        return train_faces(Tiny(), CelebA(celeba, size=16), CelebA(celeba, "test", size=16), epochs=2, batch_size=8, seed=seed).losses
    assert run(0) == run(0) != run(1)


def test_fourteen_groups_and_groups_without_test_pictures(fairface):
    train, test = FairFace(fairface, "train", size=16), FairFace(fairface, "val", size=16)
    r = train_faces(Tiny(), train, test, epochs=1, batch_size=14)
    assert r.gap.by_group.shape == (14,) and r.gap.n_not_estimable == 14 - len(test.groups.unique())


@pytest.mark.parametrize("layer, message", [
    (lambda z, g: z[:-1], "`layer` must return finite logits of shape"),
    (lambda z, g: z[:, None], "`layer` must return finite logits of shape"),
    (lambda z, g: z * torch.nan, "finite: False")])
def test_a_layer_that_breaks_the_logits_is_named(celeba, layer, message):
    with pytest.raises(ValueError, match=message):
        train_faces(Tiny(), CelebA(celeba, size=16), CelebA(celeba, "test", size=16), layer=layer, batch_size=8)


def test_no_epochs(celeba):
    with pytest.raises(ValueError, match="`epochs` must be at least 1, got 0"): train_faces(Tiny(), CelebA(celeba), CelebA(celeba), epochs=0)
