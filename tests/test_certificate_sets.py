"""`fairbook.certificate_sets`: certificates that come back bit by bit, folders that know what they are about, and sets that do not depend on who made them in what order."""
import json
import math
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from fairbook.certificate_sets import CertifiedSet, certify_many, fingerprint, load_certificates, save_certificates
from fairbook.smoothing import Certificate, center_smoothing

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
BUG = lambda reason: pytest.mark.xfail(strict=True, reason=f"open: {reason}")      # strict: the mark must go when it is repaired
numbers = st.floats(allow_nan=False)
fields = st.fixed_dictionaries(dict(kind=st.sampled_from(["center", "lattice", "exact_line", "projection", "randomized"]), certified=st.booleans(), radius=numbers, bound=numbers, confidence=numbers,
                                    evaluations=st.integers(0, 10**9), abstained=st.booleans(), counterexample=st.none() | st.lists(numbers, min_size=1, max_size=3).map(tuple),
                                    label=st.none() | st.integers(0, 50), center=st.none() | st.lists(st.floats(), min_size=1, max_size=4)))


def bits(x): return None if x is None else (x.dtype, x.view(torch.int64).tolist())
def numbered(rows): return [Certificate("lattice", i % 2 == 0, float(i), math.inf, 1., i, False, (i / 7,) if i % 3 else None, i % 4, torch.tensor([i / 3]).double()) for i in rows]


# --- files

@settings(max_examples=60)
@given(st.lists(fields, max_size=4), st.text(max_size=5))
def test_certificates_come_back_bit_by_bit(tmp_path_factory, some, about):
    some = [Certificate(**r | {"center": None if r["center"] is None else torch.tensor(r["center"], dtype=torch.float64)}) for r in some]
    back = load_certificates(save_certificates(some, tmp_path_factory.mktemp("c") / "a.json", about), about)
    assert back == some and [asdict(replace(c, center=None)) for c in back] == [asdict(replace(c, center=None)) for c in some]
    for a, b in zip(back, some):
        assert (a.center is None) == (b.center is None) and (a.center is None or torch.equal(a.center.isnan(), b.center.isnan()) and bits(a.center.nan_to_num(7.)) == bits(b.center.nan_to_num(7.)))
        assert type(a.counterexample) is type(b.counterexample) and type(a.certified) is bool and str(a.radius) == str(b.radius)


def test_a_certificate_of_a_real_run_comes_back(tmp_path):
    c = center_smoothing(lambda t: torch.cat([t, t.sin()], 1), 1, sigma=.65, eps=1., head=nn.Linear(2, 2), n=500, n_center=500, seed=3)
    back, = load_certificates(save_certificates([c], tmp_path / "new" / "c.json"))
    assert back == c and bits(back.center) == bits(c.center)


def test_a_changed_file_and_another_fingerprint_are_refused(tmp_path):
    path = save_certificates(numbered(range(3)), tmp_path / "c.json", "abc")
    for other in ("", "abd", "abc "):
        with pytest.raises(ValueError, match="c.json holds certificates of other people, another model or other options"): load_certificates(path, other)
    path.write_text(path.read_text().replace('"certified": false', '"certified": true'))
    with pytest.raises(ValueError, match="damaged"): load_certificates(path, "abc")
    save_certificates(numbered(range(3)), path, "abc")
    (tmp_path / "c.json.sha256").unlink()
    with pytest.raises(ValueError, match="not beside"): load_certificates(path, "abc")
    with pytest.raises(FileNotFoundError): load_certificates(tmp_path / "none.json")


# --- fingerprints

simple = st.recursive(st.integers() | st.text(max_size=3) | st.booleans() | st.none() | st.floats(allow_nan=False), lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=2), s, max_size=3), max_leaves=6)


@settings(max_examples=60)
@given(simple, simple)
def test_equal_things_have_equal_prints_and_others_not(a, b):
    say = lambda x: json.dumps(x, sort_keys=True)                               # tells 1, True and 1.0 apart, dictionaries and lists
    assert fingerprint(a) == fingerprint(a) and (fingerprint(a) == fingerprint(b)) == (say(a) == say(b)) and len(fingerprint(a)) == 16 and int(fingerprint(a), 16) >= 0


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=3), st.integers(), min_size=2, max_size=5), st.randoms())
def test_the_order_of_keys_does_not_matter(d, random):
    keys = list(d)
    random.shuffle(keys)
    assert fingerprint(d) == fingerprint({k: d[k] for k in keys}) and fingerprint({"x": d}) == fingerprint({"x": {k: d[k] for k in keys}})


def test_tensors_differ_by_type_shape_and_value():
    x = torch.arange(6.)
    many = [x, x.double(), x.int(), x.view(2, 3), x.view(3, 2), x.view(6, 1), x.flip(0), x + torch.tensor([0, 0, 0, 1e-6, 0, 0]), x[:0], x.double()[:0], x[:5], torch.tensor(0.), torch.tensor([0.]), torch.tensor([-0.]), x.bfloat16(), x > 2]
    assert len({fingerprint(t) for t in many}) == len(many)
    assert fingerprint(x) == fingerprint(x.clone().requires_grad_()) and fingerprint(x.view(2, 3).T) == fingerprint(x.view(2, 3).T.contiguous()) != fingerprint(x.view(3, 2))



def test_a_dictionary_is_no_list(): assert fingerprint({"a": 1}) != fingerprint(["a", 1]) and fingerprint({}) != fingerprint([])



def test_long_arrays_differ_or_are_refused():
    x = np.zeros(5000)
    y = x.copy()
    y[2500] = 1
    try: assert fingerprint(x) != fingerprint(y)
    except (TypeError, ValueError): pass



def test_functions_are_told_apart_by_what_they_do_or_refused():
    make = lambda r: lambda c: r
    try: assert fingerprint(make(1.)) == fingerprint(make(1.)) != fingerprint(make(2.))
    except (TypeError, ValueError): pass


def test_nesting_and_places_matter():
    a, b = torch.ones(2), torch.zeros(2)
    assert len({fingerprint(*things) for things in [(a, b), (b, a), ([a, b],), ([a], b), ([[a]], b), (a,), (), ({"a": a, "b": b},), ({"a": b, "b": a},), ("ab",), ("a", "b"), (None,), ("None",)]}) == 13
    assert fingerprint((1, 2)) == fingerprint([1, 2])


def test_modules_differ_by_layers_weights_and_buffers():
    def net(change=lambda n: None, layer=nn.ReLU):
        torch.manual_seed(0)
        change(n := nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), layer()))
        return n
    def nudge(n): n[0].weight.data[0, 0] += 1e-6
    def shift(n): n[1].running_mean[2] = 1.
    def eps(n): n[1].eps = 1e-3
    many = [net(), net(layer=nn.Tanh), net(nudge), net(shift), net(eps), net().double()]
    assert len({fingerprint(n) for n in many}) == len(many) and fingerprint(net()) == fingerprint(net()) == fingerprint(net().eval())


@pytest.mark.parametrize("device", DEVICES)
def test_prints_do_not_depend_on_the_device(device):
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    assert fingerprint(net, net.weight) == (fingerprint(net.to(device), net.weight) if device != "cpu" else fingerprint(net, net.weight.clone()))


# --- many people

@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 50))
def test_certificates_are_in_the_order_of_people_for_any_chunk(n, chunk):
    calls = []
    found = certify_many(lambda rows: calls.append(rows) or numbered(rows), n, chunk=chunk)
    assert found.certificates == numbered(range(n)) and [i for rows in calls for i in rows] == list(range(n)) and max(map(len, calls)) == min(chunk, n)


@pytest.mark.parametrize("workers, chunk", [(1, 25), (2, 3), (2, 100)])
def test_workers_do_not_change_anything(workers, chunk, tmp_path):
    work = eval("lambda rows: [C('lattice', i % 2 == 0, float(i), 1 / (i + 1), 1., i) for i in rows]", {"C": Certificate})      # no file of this name is on the workers' path
    want = [Certificate("lattice", i % 2 == 0, float(i), 1 / (i + 1), 1., i) for i in range(11)]
    for folder in (None, tmp_path, tmp_path): assert certify_many(work, 11, chunk=chunk, workers=workers, folder=folder, about="x").certificates == want


@pytest.mark.parametrize("kill", [0, 1, 3])
def test_a_killed_run_certifies_only_what_is_missing(kill, tmp_path):
    calls = []
    def work(rows, limit):
        if len(calls) == limit: raise KeyboardInterrupt
        calls.append(rows[0])
        return numbered(rows)
    with pytest.raises(KeyboardInterrupt): certify_many(partial(work, limit=kill), 11, folder=tmp_path, about="x", chunk=3)
    found = certify_many(partial(work, limit=-1), 11, folder=tmp_path, about="x", chunk=3)
    assert found.certificates == numbered(range(11)) and sorted(calls) == [0, 3, 6, 9] and calls[:kill] == [0, 3, 6][:kill]
    (tmp_path / "people_000003_000005.json").unlink()                            # a part that is lost is made again, no other
    again = certify_many(partial(work, limit=-1), 11, folder=tmp_path, about="x", chunk=3)
    assert again.certificates == found.certificates and calls[4:] == [3] and bits(again[10].center) == bits(found[10].center)


def test_a_folder_about_something_else_is_refused(tmp_path):
    certify_many(numbered, 4, folder=tmp_path, about="x")
    with pytest.raises(ValueError, match="another model"): certify_many(numbered, 4, folder=tmp_path, about="y")
    path = tmp_path / "people_000000_000003.json"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"): certify_many(numbered, 4, folder=str(tmp_path), about="x")


def test_an_error_in_a_chunk_comes_through_and_leaves_no_file(tmp_path):
    def work(rows): raise ZeroDivisionError("in person 0")
    with pytest.raises(ZeroDivisionError, match="person 0"): certify_many(work, 2, folder=tmp_path, about="x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("work", [lambda rows: numbered(rows)[1:], lambda rows: numbered([*rows, 9]), lambda rows: [None for _ in rows], lambda rows: [asdict(c) for c in numbered(rows)], lambda rows: []])
def test_answers_that_are_no_certificates_are_refused(work, tmp_path):
    with pytest.raises(ValueError, match="one Certificate for each of the 4 people"): certify_many(work, 4, folder=tmp_path, about="x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [dict(n=0), dict(n=-3), dict(chunk=0), dict(workers=0), dict(workers=-2)])
def test_bad_counts_are_refused(change):
    (name, value), = change.items()
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"): certify_many(numbered, **dict(n=3) | change)


# --- rates

PEOPLE = CertifiedSet([Certificate("center", True, 1., 2., .99, 100, label=0), Certificate("center", False, 3., 2., .99, 200, label=1), Certificate("center", False, math.inf, 2., .99, 300, abstained=True),
                       Certificate("center", True, 2., 4., .99, 400, label=1)])


def test_rates_by_hand():
    assert PEOPLE.labels.tolist() == [0, 1, -1, 1] and len(PEOPLE) == 4 and PEOPLE[3].radius == 2
    assert PEOPLE.rates() == {"certified": 50., "abstained": 25., "radius": 2.5, "evaluations": 250.}
    assert PEOPLE.rates([0, 1, 1, 0])["accuracy"] == 50 and PEOPLE.rates(torch.tensor([0, 1, -1, 1]))["accuracy"] == 100
    assert PEOPLE.rates(PEOPLE.labels.numpy())["accuracy"] == 100 and CertifiedSet(PEOPLE.certificates[2:3]).rates()["radius"] == math.inf


def test_the_table_has_a_row_for_each():
    t = PEOPLE.table()
    assert t.certified.tolist() == [True, False, False, True] and "center" not in t and t.evaluations.sum() == 1000 and len(CertifiedSet([]).table()) == 0


def test_bad_rates_are_refused():
    with pytest.raises(ValueError, match="no certificates to sum up"): CertifiedSet([]).rates()
    for y in ([0, 1], torch.zeros(5)):
        with pytest.raises(ValueError, match=f"one class for each of the 4 people, got {len(y)}"): PEOPLE.rates(y)



def test_classes_in_a_column_are_no_table_of_pairs():
    "[n, 1] against [n] would compare everybody with everybody."
    y = torch.tensor([0, 1, 1, 0])
    try: assert PEOPLE.rates(y[:, None])["accuracy"] == 50
    except ValueError as e: assert "y must hold one class" in str(e)


@pytest.mark.parametrize("device", DEVICES)
def test_classes_on_a_device(device): assert PEOPLE.rates(torch.tensor([0, 1, 1, 0], device=device))["accuracy"] == 50


def test_a_bar_is_drawn_on_request(capsys):
    certify_many(numbered, 4, chunk=2, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_a_folder_without_a_fingerprint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pass about=fingerprint"): certify_many(numbered, 4, folder=tmp_path)
    assert not list(tmp_path.iterdir())
