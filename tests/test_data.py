"""Data sets: the record, files that are what they claim (against a local web server), files of the user's own,
and the real files where they are present."""
import dataclasses
import hashlib
import os
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairbook import data
from fairbook.data import REGISTRY, DataFile, Dataset, DatasetCorrupt, DatasetUnavailable, fetch

BODY = b"age,sex\n" + b"30,male\n" * 5000
SHA = hashlib.sha256(BODY).hexdigest()


# --- files: a web server of our own

class Handler(BaseHTTPRequestHandler):
    "/good: the file; /swapped: other bytes of the same length; /short: fewer bytes, honestly announced; /cut: the line breaks half-way; else 404."
    def do_GET(self):
        self.server.asked.append(self.path)
        kind = self.path.split("/")[1]
        body = {"good": BODY, "swapped": BODY[::-1], "short": BODY[:-1], "cut": BODY[:9000]}.get(kind)
        if body is None: return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY) if kind == "cut" else len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty data folder that does not exist yet, online."
    monkeypatch.setenv("FAIRBOOK_DATA", str(tmp_path / "cache"))
    monkeypatch.delenv("FAIRBOOK_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def registry(server):
    "registry('cut', 'good'): one file, to be had at /cut/x.csv and then at /good/x.csv."
    server.asked = []
    address = f"http://127.0.0.1:{server.server_port}"
    return lambda *kinds: {"set/x.csv": DataFile(SHA, tuple(f"{address}/{kind}/x.csv" for kind in kinds))}


def put(folder, content):
    path = folder / "set" / "x.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def contents(folder): return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_downloads_once(folder, registry, server):
    path = fetch("set/x.csv", registry("good"))
    assert path == folder / "set" / "x.csv" and path.read_bytes() == BODY
    assert fetch("set/x.csv", registry("good")) == path and server.asked == ["/good/x.csv"]


@pytest.mark.parametrize("first", ["absent", "swapped", "short", "cut"])
def test_a_bad_address_gives_way_to_the_next(folder, registry, server, first):
    assert fetch("set/x.csv", registry(first, "good")).read_bytes() == BODY
    assert server.asked == [f"/{first}/x.csv", "/good/x.csv"]
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["x.csv"]


@pytest.mark.parametrize("kind", ["absent", "swapped", "short", "cut"])
def test_a_failed_download_leaves_nothing(folder, registry, kind):
    with pytest.raises(DatasetUnavailable) as error: fetch("set/x.csv", registry(kind))
    assert not [p for p in folder.rglob("*") if p.is_file()]
    assert all(part in str(error.value) for part in (SHA, f"/{kind}/x.csv", str(folder / "set" / "x.csv"), "FAIRBOOK_DATA"))


def test_an_interrupted_download_leaves_nothing(folder, registry, monkeypatch):
    def interrupted(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr("requests.models.Response.iter_content", interrupted)
    with pytest.raises(KeyboardInterrupt): fetch("set/x.csv", registry("good"))
    assert not [p for p in folder.rglob("*") if p.is_file()]


def test_nobody_listens(folder):
    with pytest.raises(DatasetUnavailable, match="127.0.0.1:9"): fetch("set/x.csv", {"set/x.csv": DataFile(SHA, ("http://127.0.0.1:9/x.csv",))})


def test_offline_never_asks(folder, registry, server, monkeypatch):
    files = registry("good")
    monkeypatch.setenv("FAIRBOOK_OFFLINE", "1")
    with pytest.raises(DatasetUnavailable, match="FAIRBOOK_OFFLINE") as error: fetch("set/x.csv", files)
    assert server.asked == [] and not folder.exists()
    assert all(part in str(error.value) for part in (SHA, files["set/x.csv"].urls[0], str(folder / "set" / "x.csv")))


def test_offline_reads_what_is_there(folder, registry, server, monkeypatch):
    monkeypatch.setenv("FAIRBOOK_OFFLINE", "1")
    path = put(folder, BODY)
    assert fetch("set/x.csv", registry("good")) == path and server.asked == []


@pytest.mark.parametrize("value", ["0", ""])
def test_offline_switch_can_be_off(folder, registry, monkeypatch, value):
    monkeypatch.setenv("FAIRBOOK_OFFLINE", value)
    assert fetch("set/x.csv", registry("good")).exists()


@pytest.mark.parametrize("content", [b"", BODY[:-1], BODY[:9000], BODY + b"\n", BODY[::-1], BODY.replace(b"30", b"31", 1)],
                         ids=["empty", "one byte short", "half", "one byte long", "swapped", "edited"])
@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_corrupt_file_raises_and_is_not_touched(folder, registry, server, monkeypatch, content, offline):
    monkeypatch.setenv("FAIRBOOK_OFFLINE", offline)
    path = put(folder, content)
    before = contents(folder)
    with pytest.raises(DatasetCorrupt, match="not used") as error: fetch("set/x.csv", registry("good"))
    assert contents(folder) == before and server.asked == []
    assert str(path) in str(error.value) and SHA in str(error.value) and registry("good")["set/x.csv"].urls[0] in str(error.value)


def test_a_read_only_folder_is_only_read(folder, registry, monkeypatch):
    put(folder, BODY)
    before = contents(folder)
    real = os.open
    def no_writing(path, flags, *args, **kwargs):
        assert not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT), f"opened {path} for writing"
        return real(path, flags, *args, **kwargs)
    monkeypatch.setattr(os, "open", no_writing)
    monkeypatch.setattr(os, "mkdir", lambda *a, **k: pytest.fail("made a folder"))
    (folder / "set").chmod(0o555)
    try: assert fetch("set/x.csv", registry("good")).read_bytes() == BODY
    finally: (folder / "set").chmod(0o755)
    assert contents(folder) == before


def test_a_folder_that_cannot_be_made_is_blamed(tmp_path, registry, server, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FAIRBOOK_DATA", str(tmp_path / "file" / "below"))
    with pytest.raises(DatasetUnavailable, match="folder .*file/below/set cannot be written") as error: fetch("set/x.csv", registry("good"))
    assert server.asked == [] and "No address worked" not in str(error.value) and "FAIRBOOK_DATA" in str(error.value)


def test_a_folder_that_takes_no_files_is_blamed(folder, registry, server, monkeypatch):
    def refuse(*args, **kwargs): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(data.tempfile, "TemporaryFile", refuse)
    with pytest.raises(DatasetUnavailable, match="cannot be written .*Permission denied"): fetch("set/x.csv", registry("good"))
    assert server.asked == []


def test_unknown_file(): pytest.raises(ValueError, fetch, "adult/adult.dat").match("adult/adult.data")


def test_loaders_go_through_fetch(folder, monkeypatch):
    monkeypatch.setenv("FAIRBOOK_OFFLINE", "1")
    for load in (data.load_adult, data.load_dutch, data.load_acs_income, data.load_law_school, data.load_german):
        with pytest.raises(DatasetUnavailable): load()
        assert not data.is_available(load.__name__.removeprefix("load_"))
    assert len(data.load_diabetes()) == 442 and data.is_available("diabetes")
    for name in REGISTRY:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1,2,3\n")
    for load in (data.load_adult, data.load_dutch, data.load_acs_income, data.load_law_school, data.load_german):
        with pytest.raises(DatasetCorrupt): load()


def test_default_folder(monkeypatch):
    monkeypatch.delenv("FAIRBOOK_DATA", raising=False)
    assert "fairbook" in str(data.data_folder()) and data.data_folder().is_absolute()


def pinned(url): return any(len(part) == 40 and set(part) <= set("0123456789abcdef") for part in url.split("/"))


def test_every_address_is_https_and_every_file_has_one_pinned_to_a_commit():
    for name, file in REGISTRY.items():
        assert all(url.startswith("https://") and url.endswith(name.split("/")[1]) for url in file.urls)
        assert any(map(pinned, file.urls))
    assert pinned(REGISTRY["german/german.data"].urls[0])  # its fingerprint is that of the copy


def test_sets_that_need_a_file_of_ones_own_are_never_at_hand(folder):
    assert data.is_available("diabetes") and not data.is_available("sba") and not data.is_available("employees")


# --- the record

def toy(**change):
    x = pd.DataFrame({"a": [1., 2, 3, 4], "b": pd.Categorical(["u", "v", "u", "u"])})
    s = pd.DataFrame({"s": pd.Categorical(["p", "q", "p", "q"]), "t": pd.Categorical(["m"] * 4, categories=["l", "m"])})
    return Dataset(**dict(features=x, label=pd.Series([0, 1, 1, 0], name="y"), sensitive_features=s, name="toy", source="here", licence="free") | change)


def test_record_is_frozen_and_pickles():
    ds = toy()
    with pytest.raises(dataclasses.FrozenInstanceError): ds.name = "other"
    again = pickle.loads(pickle.dumps(ds))
    assert again.features.equals(ds.features) and repr(again) == repr(ds) and "toy" in repr(ds)


@pytest.mark.parametrize("change, message", [
    (dict(label=pd.Series([0, 1, 1], name="y")), "row index"),
    (dict(label=pd.Series([0, 1, 1, 0], index=[1, 2, 3, 4], name="y")), "row index"),
    (dict(truth=pd.DataFrame({"score": [.5]})), "row index"),
    (dict(label=pd.Series([0, 1, np.nan, 0], name="y")), "missing values in .'y'"),
    (dict(features=pd.DataFrame({"a": [1, 2, None, 4]})), "missing values in .'a'"),
    (dict(sensitive_features=pd.DataFrame({"s": pd.Categorical(["p", None, "p", "q"])})), "missing values in .'s'"),
    (dict(features=pd.DataFrame({"word": list("abcd")})), "word.* must be categorical"),
    (dict(sensitive_features=pd.DataFrame({"s": [0, 1, 0, 1]})), "'s'.* must be categorical"),
])
def test_record_refuses(change, message):
    with pytest.raises(ValueError, match=message): toy(**change)


def test_groups_are_intersections_with_fixed_numbers():
    ds = toy()
    codes, names = ds.groups()
    assert names == ("p, l", "p, m", "q, l", "q, m") and codes.tolist() == [1, 3, 1, 3] and codes.dtype == torch.int64
    assert ds.groups("t", "s")[1] == ("l, p", "l, q", "m, p", "m, q")
    assert ds.take([0, 2]).groups()[1] == names and ds.take([0, 2]).groups()[0].tolist() == [1, 1]
    rates = ds.base_rates()
    assert rates.rows.tolist() == [0, 2, 0, 2] and rates["mean y"].isna().tolist() == [True, False, True, False]


@pytest.mark.parametrize("call, message", [
    (lambda ds: ds.groups("sex"), "sex.*'s', 't'"), (lambda ds: ds.base_rates("a"), "'a'"), (lambda ds: ds.tensors("z"), "'z'"),
    (lambda ds: ds.encoded(drop=["c"]), "'c'.*'a', 'b'"), (lambda ds: ds.tensors(drop=["c"]), "drop"), (lambda ds: ds.split(1.5), "test_size.*1.5"), (lambda ds: ds.split(0.), "test_size"),
    (lambda ds: ds.split(float("nan")), "test_size"), (lambda ds: ds.split(1), "test_size"), (lambda ds: ds.split(.99), "empty"),
])
def test_bad_calls(call, message, untyped):
    with pytest.raises(ValueError, match=message): call(toy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, None])
def test_tensors(dtype):
    X, y, s = toy().tensors("s", dtype=dtype)
    assert X.dtype == (dtype or torch.get_default_dtype()) and y.dtype == s.dtype == torch.int64
    assert X.tolist() == [[1, 1, 0], [2, 0, 1], [3, 1, 0], [4, 1, 0]] and s.tolist() == [0, 1, 0, 1]
    assert toy(label=pd.Series([.5, 1, 2, 3], name="y")).tensors(dtype=dtype)[1].dtype == X.dtype
    assert toy().tensors(drop=["b"])[0].shape == (4, 1)


@pytest.mark.parametrize("rows", [[2, 0], np.array([2, 0]), torch.tensor([2, 0])])
def test_take_positions(rows): assert toy().take(rows).label.index.tolist() == [2, 0]


@pytest.mark.parametrize("mask", [np.array([True, False, True, False]), torch.tensor([True, False, True, False]), [True, False, True, False], slice(0, 4, 2)])
def test_take_mask(mask): assert toy().take(mask).features.a.tolist() == [1, 3]


@given(st.integers(0, 2**32 - 1), st.floats(.1, .9))
def test_split_is_a_partition_and_a_function_of_the_seed(seed, size):
    x = pd.DataFrame({"a": np.arange(50.), "b": pd.Categorical(["rare"] + ["u", "v"] * 24 + ["u"])})
    ds = toy(features=x, label=pd.Series(np.arange(50) % 2, name="y"), sensitive_features=x[["b"]], truth=x[["a"]].rename(columns={"a": "score"}))
    train, test = ds.split(size, seed)
    assert sorted([*train.label.index, *test.label.index]) == list(range(50))
    assert list(train.encoded()) == list(test.encoded()) and train.groups()[1] == test.groups()[1]
    assert train.label.index.tolist() == ds.split(size, seed)[0].label.index.tolist()
    assert train.truth.index.equals(train.features.index) and np.array_equal(train.truth.score, ds.truth.score[train.label.index])


# --- files of the user's own

def staff(n=20): return pd.DataFrame([dict.fromkeys(data._EMPLOYEE_COLUMNS, 3) | {c: v[0] for c, v in data.EMPLOYEE_LEVELS.items()} | dict(Age=20 + 2 * i, EmpHourlyRate=30 + i) for i in range(n)])
def sba(n=20): return pd.DataFrame([dict.fromkeys([*data._SBA_NUMBERS, *data._SBA_TEXT, "FranchiseCode", "UrbanRural", "Default"], i % 3) | dict(Term=i) for i in range(n)])


@pytest.mark.parametrize("load, table", [(data.load_employees, staff()), (data.load_sba, sba())])
def test_user_files_keep_known_columns_only(tmp_path, load, table):
    table.assign(Name="A PERSON", ChgOffDate="1-Jan-10").to_csv(tmp_path / "t.csv", index=False)
    from_file, from_table = load(tmp_path / "t.csv"), load(table)
    assert from_file.features.equals(from_table.features) and not {"Name", "ChgOffDate", "Default", "EmpHourlyRate"} & set(from_file.features)
    assert load(table.iloc[3:9]).label.index.tolist() == list(range(3, 9))  # a part of a table keeps its rows' index


def test_employees_values():
    ds = data.load_employees(staff())
    assert np.allclose(ds.label, np.arange(20) / 70) and ds.groups("age")[0].tolist() == [0] * 15 + [1] * 5
    assert ds.features.age_50plus.tolist() == [0] * 15 + [1] * 5 and ds.encoded().shape == (20, 63)


def test_sba_values():
    ds = data.load_sba(sba())
    assert ds.groups("place")[0].tolist() == [i % 3 == 1 for i in range(20)] and ds.features.franchise.tolist() == [i % 3 > 1 for i in range(20)]
    assert "Recession" in ds.features and any("Recession" in w for w in ds.warnings)


def test_sba_missing_codes_become_a_category(tmp_path):
    table = sba().astype({"RevLineCr": object})
    table.loc[3, "RevLineCr"] = None
    table.to_csv(tmp_path / "s.csv", index=False)
    assert data.load_sba(tmp_path / "s.csv").features.RevLineCr[3] == "?"
    with pytest.raises(ValueError, match="Term"): data.load_sba(table.assign(Term=table.Term.where(table.index > 0)))


@pytest.mark.parametrize("load, table, lost", [(data.load_employees, staff(), "Age"), (data.load_sba, sba(), "UrbanRural")])
def test_user_files_without_a_column(load, table, lost):
    with pytest.raises(ValueError, match=f"lacks the columns .'{lost}'"): load(table.drop(columns=lost))


def test_user_file_with_a_new_level():
    with pytest.raises(ValueError, match="MaritalStatus holds .'Widowed'"): data.load_employees(staff().assign(MaritalStatus="Widowed"))


BAD = [
    (data.load_adult, dict(split="valid"), "split.*'valid'"), (data.load_acs_income, dict(states=["CA"]), "CA"), (data.load_acs_income, dict(states=[]), "states"),
    (data.is_available, dict(name="adlut"), "no data set 'adlut'.*'adult'"), (data.is_available, dict(name=""), "no data set ''"),
    (data.is_available, dict(name="adult/adult.data"), "no data set"),
]


@pytest.mark.parametrize("call, arguments, message", BAD)
def test_bad_arguments(call, arguments, message):
    with pytest.raises(ValueError, match=message): call(**arguments)


# --- real files

def real(name): return pytest.mark.skipif(not data.is_available(name), reason=f"the files of {name} are not in FAIRBOOK_DATA")


@pytest.mark.parametrize("name", REGISTRY)
def test_real_files_are_the_published_ones(name):
    if not (data.data_folder() / name).exists(): pytest.skip(f"{name} is not in FAIRBOOK_DATA")
    assert fetch(name) == data.data_folder() / name


@real("adult")
def test_adult():
    train, test, both = map(data.load_adult, ("train", "test", "all"))
    assert (len(train), len(test), len(both)) == (32_561, 16_281, 48_842)
    assert list(train.encoded()) == list(test.encoded()) and both.features.shape[1] == 14
    assert train.groups("sex")[1] == ("Female", "Male") and train.base_rates("sex").rows.tolist() == [10_771, 21_790]
    assert train.label.sum() == 7_841 and test.label.sum() == 3_846
    assert (both.features.workclass == "?").sum() == 2_799 and set(test.label) == {0, 1}
    assert train.base_rates("race").rows.to_dict() == {"Amer-Indian-Eskimo": 311, "Asian-Pac-Islander": 1_039, "Black": 3_124, "Other": 271, "White": 27_816}


ROWS = dict(AK=3_546, CT=19_785, HI=7_731, MN=31_021, NE=10_785, NM=8_711, NV=14_807, RI=5_712, SD=4_899, UT=16_337)


@real("acs_income")
def test_acs_income():
    for state, rows in ROWS.items():
        ds = data.load_acs_income(state)
        assert len(ds) == rows and ds.features.shape[1] == 10 and set(ds.label) == {0, 1}
    both = data.load_acs_income(["AK", "SD"])
    assert len(both) == 3_546 + 4_899 and both.settings["states"] == ("AK", "SD")
    assert both.take(slice(3_546)).base_rates("race").rows.tolist() == [1_427, 2_119]  # from the benchmark's datasheet
    assert both.take(slice(3_546)).base_rates("sex").rows.tolist() == [1_592, 1_954]
    assert len(data.load_acs_income()) == sum(ROWS.values())


@real("law_school")
def test_law_school():
    ds = data.load_law_school()
    assert len(ds) == 20_798 and round(ds.label.mean(), 3) == .89 and ds.features.tier.nunique() == 6
    assert ds.base_rates("race").rows.to_dict() == {"Non-White": 3_307, "White": 17_491}


@real("dutch")
def test_dutch():
    ds = data.load_dutch()
    assert len(ds) == 60_420 and ds.base_rates("sex").rows.to_dict() == {"Female": 30_273, "Male": 30_147}
    assert (ds.features.edu_level == 0).sum() == 220 and ds.label.sum() == 28_763


@real("german")
def test_german():
    ds = data.load_german()
    assert ds.features.shape == (1_000, 20) and ds.label.sum() == 700
    assert ds.base_rates("sex").rows.to_dict() == {"Male": 690, "Female": 310} and ds.base_rates("age").rows.tolist() == [190, 810]


def test_diabetes():
    ds = data.load_diabetes()
    assert len(ds) == 442 and ds.base_rates().rows.to_dict() == {"sex 1": 235, "sex 2": 207} and ds.label.dtype == float


@pytest.mark.parametrize("name", ["adult", "acs_income", "dutch", "law_school", "german", "diabetes"])
def test_records_say_where_they_come_from_and_what_is_wrong(name):
    if not data.is_available(name): pytest.skip(f"the files of {name} are not in FAIRBOOK_DATA")
    ds = getattr(data, f"load_{name}")()
    assert ds.name == name and ds.source and ds.licence and ds.warnings and all(isinstance(w, str) and w for w in ds.warnings)
    assert torch.isfinite(ds.take(slice(500)).tensors(dtype=torch.float64)[0]).all()
