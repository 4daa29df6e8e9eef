"""`fairbook.multiclass_data`: the generated law against Bayes' rule by scipy, loaders of downloads on files in the true format, and the real files where they are."""
import dataclasses
import itertools
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from torch.utils.data import DataLoader

from fairbook import data, multiclass_data
from fairbook.faces import CelebA, make_tiny_faces
from fairbook.multiclass_data import (MulticlassData, celeba_four_class, is_available, load_acs_education, load_acs_quintiles,
                                      load_dutch_education, load_enem, make_multiclass, predict_pairs, train_pairs)

# ---------------------------------------------------------------- the generated law

LAWS = st.fixed_dictionaries(dict(n=st.integers(1, 40), n_groups=st.integers(1, 4), n_classes=st.integers(2, 5), seed=st.integers(0, 99),
                                  separation=st.floats(.1, 4), shift=st.floats(.1, 4)))


@given(law=LAWS)
def test_joint_is_bayes_rule(law):
    known = make_multiclass(**law)
    share, centres = known.settings["share"], known.settings["centres"]
    joint = np.zeros((law["n"], *share.shape))
    for a, y in itertools.product(*map(range, share.shape)):
        joint[:, a, y] = share[a, y] * multivariate_normal(centres[a, y]).pdf(known.features)
    assert np.allclose(known.joint, joint / joint.sum((1, 2), keepdims=True), atol=1e-10)
    assert known.joint.dtype == torch.float64 and np.isclose(share.sum(), 1)


@given(law=LAWS)
def test_seed_draws_and_does_not_change_the_law(law):
    one, same, other = make_multiclass(**law), make_multiclass(**law), make_multiclass(**law | dict(seed=law["seed"] + 1))
    assert one.features.equals(same.features) and one.label.equals(same.label) and not one.features.equals(other.features)
    assert (one.settings["share"] == other.settings["share"]).all() and (one.settings["centres"] == other.settings["centres"]).all()


def test_pairs_have_their_shares_and_centres():
    known = make_multiclass(200_000, n_groups=2, n_classes=4, seed=3)
    pair = known.groups()[0].numpy() * 4 + known.label.to_numpy()
    assert np.abs(np.bincount(pair) / len(known) - known.settings["share"].ravel()).max() < .005
    means = known.features.groupby(pair).mean().to_numpy()
    assert np.abs(means - known.settings["centres"].reshape(-1, 2)).max() < .05


def test_parts_keep_their_posterior():
    known = make_multiclass(60)
    rows = torch.tensor([5, 3, 50])
    assert torch.equal(known.take(rows).joint, known.joint[rows])
    train, test = known.split()
    for part in (train, test, pickle.loads(pickle.dumps(test)), dataclasses.replace(train, name="other")):
        assert isinstance(part, MulticlassData) and torch.allclose(part.joint, part.posterior(torch.tensor(part.features.to_numpy())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2,), (5, 2), (2, 3, 2), (0, 2)])
def test_posterior_shapes(dtype, shape):
    known = make_multiclass(5, n_groups=2, n_classes=4)
    joint = known.posterior(100 * torch.randn(shape, dtype=dtype, requires_grad=True))
    assert joint.shape == (*shape[:-1], 2, 4) and torch.allclose(joint.sum((-1, -2)), torch.ones(shape[:-1], dtype=torch.float64))


@pytest.mark.parametrize("arguments, message", [
    (dict(n=0), "n must be.*got 0"), (dict(n=2.5), "n must be"), (dict(n_groups=0), "n_groups must be"), (dict(n_classes=1), "n_classes must be.*at least 2"),
    (dict(separation=0.), "separation must be positive"), (dict(shift=-1.), "shift must be positive"), (dict(shift=float("nan")), "shift must be positive")])
def test_bad_laws(arguments, message, untyped): pytest.raises(ValueError, make_multiclass, **arguments).match(message)


# ---------------------------------------------------------------- fifths

@given(values=st.lists(st.integers(0, 30), min_size=1, max_size=60), m=st.integers(2, 6))
def test_classes_are_ordered_complete_and_cut_where_numpy_says(values, m):
    values = pd.Series(values, name="v", index=range(7, 7 + len(values)))
    try: label, cuts = multiclass_data._quantile_classes(values, m, "toy")
    except ValueError: return
    assert set(label) == set(range(m)) and label.index.equals(values.index) and list(cuts) == sorted(set(cuts))
    assert label[values.sort_values(kind="stable").index].is_monotonic_increasing
    assert label.tolist() == [sum(v >= c for c in np.quantile(values, np.arange(1, m) / m)) for v in values]


@given(n=st.integers(2, 60), m=st.integers(2, 6))
def test_without_ties_classes_are_equal_up_to_one_row(n, m):
    if n < m: pytest.raises(ValueError, multiclass_data._quantile_classes, pd.Series(range(n), name="v"), m, "toy").match("too few")
    else:
        sizes = multiclass_data._quantile_classes(pd.Series(range(n), name="v"), m, "toy")[0].value_counts()
        assert sizes.max() - sizes.min() <= 1


# ---------------------------------------------------------------- ENEM: all 76 columns of the true header

HEADER = """NU_INSCRICAO;NU_ANO;TP_FAIXA_ETARIA;TP_SEXO;TP_ESTADO_CIVIL;TP_COR_RACA;TP_NACIONALIDADE;TP_ST_CONCLUSAO;TP_ANO_CONCLUIU;TP_ESCOLA;
TP_ENSINO;IN_TREINEIRO;CO_MUNICIPIO_ESC;NO_MUNICIPIO_ESC;CO_UF_ESC;SG_UF_ESC;TP_DEPENDENCIA_ADM_ESC;TP_LOCALIZACAO_ESC;TP_SIT_FUNC_ESC;
CO_MUNICIPIO_PROVA;NO_MUNICIPIO_PROVA;CO_UF_PROVA;SG_UF_PROVA;TP_PRESENCA_CN;TP_PRESENCA_CH;TP_PRESENCA_LC;TP_PRESENCA_MT;CO_PROVA_CN;
CO_PROVA_CH;CO_PROVA_LC;CO_PROVA_MT;NU_NOTA_CN;NU_NOTA_CH;NU_NOTA_LC;NU_NOTA_MT;TX_RESPOSTAS_CN;TX_RESPOSTAS_CH;TX_RESPOSTAS_LC;
TX_RESPOSTAS_MT;TP_LINGUA;TX_GABARITO_CN;TX_GABARITO_CH;TX_GABARITO_LC;TX_GABARITO_MT;TP_STATUS_REDACAO;NU_NOTA_COMP1;NU_NOTA_COMP2;
NU_NOTA_COMP3;NU_NOTA_COMP4;NU_NOTA_COMP5;NU_NOTA_REDACAO;""".replace("\n", "").split(";")[:-1] + [f"Q{k:03}" for k in range(1, 26)]


def participant(k, **other):
    "One line of the file: everybody counts, unless `other` says otherwise."
    rng = np.random.default_rng(k)
    line = dict.fromkeys(HEADER, "") | {f"TP_PRESENCA_{e}": 1 for e in ("CN", "CH", "LC", "MT")} | {f"Q{q:03}": "AB"[rng.integers(2)] for q in range(1, 26)}
    line |= dict(NU_INSCRICAO=200_000_000_000 + k, NU_ANO=2020, TP_FAIXA_ETARIA=rng.integers(1, 21), TP_SEXO="FM"[rng.integers(2)], TP_COR_RACA=1 + k % 5,
                 TP_ST_CONCLUSAO=1, IN_TREINEIRO=0, SG_UF_PROVA="MA", NO_MUNICIPIO_PROVA="São Luís", NU_NOTA_CH=400.5 + k, Q005=rng.integers(1, 21))
    return line | other


def write(path, lines):
    pd.DataFrame(lines, columns=HEADER).to_csv(path, sep=";", encoding="latin-1", index=False)
    return path


@pytest.fixture
def enem_file(tmp_path): return tmp_path / "MICRODADOS_ENEM_2020.csv"


def test_header_has_76_columns(): assert len(HEADER) == len(set(HEADER)) == 76


def test_enem_by_hand(enem_file):
    ds = load_enem(write(enem_file, [participant(k) for k in range(50)]))
    assert ds.label.tolist() == [k // 10 for k in range(50)] and len(ds.settings["cuts"]) == 4
    assert ds.groups()[0].tolist() == [k % 5 for k in range(50)] and ds.groups()[1] == ("branca", "preta", "parda", "amarela", "indígena")
    assert set(ds.features) == {f"Q{k:03}" for k in range(1, 25)} | {"SG_UF_PROVA", "TP_FAIXA_ETARIA", "TP_SEXO"}
    assert ds.features.Q005.tolist() == [participant(k)["Q005"] for k in range(50)] and ds.name == "enem" and ds.warnings
    assert torch.isfinite(ds.tensors()[0]).all()


EXCLUDED = {
    "absent": dict(TP_PRESENCA_MT=0, NU_NOTA_MT=""), "eliminated": dict(TP_PRESENCA_LC=2), "practice": dict(IN_TREINEIRO=1), "still in school": dict(TP_ST_CONCLUSAO=2),
    "race not stated": dict(TP_COR_RACA=0), "race unknown": dict(TP_COR_RACA=6), "no score": dict(NU_NOTA_CH=""), "no answer": dict(Q006="")}


@pytest.mark.parametrize("other", EXCLUDED.values(), ids=EXCLUDED)
def test_enem_leaves_out(enem_file, other):
    lines = [participant(k) for k in range(20)]
    ds = load_enem(write(enem_file, lines[:7] + [participant(99, **other)] + lines[7:]))
    assert len(ds) == 20 and ds.label.tolist() == [k // 4 for k in range(20)]


@pytest.mark.parametrize("chunk_rows", [1, 7, 50, 1000])
def test_enem_pieces_do_not_change_the_result(enem_file, chunk_rows):
    write(enem_file, [participant(k, TP_COR_RACA=k % 7) for k in range(60)])
    whole, pieces = load_enem(enem_file), load_enem(enem_file, chunk_rows=chunk_rows)
    pd.testing.assert_frame_equal(whole.features, pieces.features)
    assert whole.label.equals(pieces.label) and whole.sensitive_features.equals(pieces.sensitive_features)


BROKEN = {
    "unknown answer": (dict(Q006="Z"), r"column Q006 holds \['Z'\]"), "unknown state": (dict(SG_UF_PROVA="XX"), "column SG_UF_PROVA"),
    "unknown race": (dict(TP_COR_RACA=7), "column TP_COR_RACA"), "decimal comma": (dict(NU_NOTA_CH="512,3"), "not in the expected format.*512,3")}


@pytest.mark.parametrize("other, message", BROKEN.values(), ids=BROKEN)
def test_enem_refuses(enem_file, other, message):
    write(enem_file, [participant(k) for k in range(9)] + [participant(9, **other)])
    pytest.raises(ValueError, load_enem, enem_file).match(message)


@pytest.mark.parametrize("lost", ["NU_NOTA_CH", "TP_COR_RACA", "Q024", "TP_PRESENCA_MT", "IN_TREINEIRO"])
def test_enem_names_a_missing_column(enem_file, lost):
    pd.DataFrame([participant(k) for k in range(9)]).drop(columns=lost).to_csv(enem_file, sep=";", index=False)
    pytest.raises(ValueError, load_enem, enem_file).match(rf"lacks the columns \['{lost}'\]")


def test_enem_wrong_separator_empty_file_nobody_left_bad_arguments(enem_file, untyped):
    pytest.raises(FileNotFoundError, load_enem, enem_file).match("is not there.*inep")
    pytest.raises(FileNotFoundError, load_enem, str(enem_file))
    pd.DataFrame([participant(1)]).to_csv(enem_file, index=False)
    pytest.raises(ValueError, load_enem, enem_file).match("lacks the columns")
    pytest.raises(ValueError, load_enem, write(enem_file, [])).match("no row")
    pytest.raises(ValueError, load_enem, write(enem_file, [participant(1, IN_TREINEIRO=1)])).match("no row")
    pytest.raises(ValueError, load_enem, write(enem_file, [participant(k) for k in range(4)])).match("too few for n_classes=5")
    pytest.raises(ValueError, load_enem, enem_file, n_classes=1).match("n_classes must be")
    pytest.raises(ValueError, load_enem, enem_file, chunk_rows=0).match("chunk_rows must be")


# ---------------------------------------------------------------- ACS person files

def persons(n=200, seed=0):
    "Person records with some of the true columns, in another order than the loader's, and blanks for children."
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(dict(
        RT="P", SERIALNO=[f"2018GQ{k:07}" for k in range(n)], ST="06", PWGTP=rng.integers(0, 3, n), AGEP=rng.integers(0, 96, n), COW=rng.integers(1, 10, n),
        MAR=rng.integers(1, 6, n), RELP=rng.integers(0, 18, n), SCHL=rng.integers(1, 25, n), SEX=rng.integers(1, 3, n), WKHP=rng.integers(0, 99, n),
        OCCP="0120", PINCP=rng.integers(-5, 900, n) * 100, POBP="006", RAC1P=rng.integers(1, 10, n), NAICSP="4MS"))
    table.loc[table.AGEP < 16, ["COW", "WKHP", "OCCP", "PINCP"]] = None
    return table


def counted(t): return t[(t.AGEP > 16) & (t.PINCP > 100) & (t.WKHP > 0) & (t.PWGTP >= 1)]


@pytest.fixture
def states(tmp_path):
    for k in (1, 2): persons(seed=k).to_csv(tmp_path / f"psam_p0{k}.csv", index=False)
    (tmp_path / "psam_h01.csv").write_text("RT,SERIALNO\nH,1\n")
    return tmp_path


@pytest.mark.parametrize("chunk_rows", [1, 33, 10_000])
def test_acs_by_hand(states, chunk_rows):
    ds, rows = load_acs_quintiles(states, chunk_rows=chunk_rows), counted(pd.concat([persons(seed=1), persons(seed=2)]))
    assert ds.features.AGEP.tolist() == rows.AGEP.tolist() and set(ds.features) == set("AGEP COW SCHL MAR OCCP POBP RELP WKHP SEX".split())
    assert ds.label.tolist() == [sum(v >= c for c in np.quantile(rows.PINCP, [.2, .4, .6, .8])) for v in rows.PINCP]
    assert ds.groups()[0].tolist() == [{1: 0, 2: 1, 3: 2, 4: 2, 5: 2, 6: 3, 7: 3, 8: 4, 9: 4}[r] for r in rows.RAC1P]
    assert set(ds.features.OCCP) == {120} and ds.label.value_counts().max() - ds.label.value_counts().min() <= 5


def test_acs_one_file_and_the_nation(states, tmp_path):
    assert len(load_acs_quintiles(states / "psam_p01.csv")) == len(counted(persons(seed=1)))
    persons(seed=3).to_csv(states / "psam_pusa.csv", index=False)
    pytest.raises(ValueError, load_acs_quintiles, states).match("count twice")
    for k in (1, 2): (states / f"psam_p0{k}.csv").unlink()
    assert len(load_acs_quintiles(str(states))) == len(counted(persons(seed=3)))


def test_acs_blanks_become_a_code_of_their_own(states):
    persons(seed=1).assign(COW=" ").to_csv(states / "psam_p01.csv", index=False)
    assert set(load_acs_quintiles(states / "psam_p01.csv").features.COW) == {-1}


@pytest.mark.parametrize("change, message", [
    (lambda t: t.rename(columns={"RELP": "RELSHIPP"}), r"lacks the columns \['RELP'\]"), (lambda t: t.drop(columns=["PWGTP", "SEX"]), r"\['SEX', 'PWGTP'\]"),
    (lambda t: t.assign(RAC1P=10), r"RAC1P holds \[10"), (lambda t: t.assign(RAC1P=""), "RAC1P"), (lambda t: t.assign(SCHL="bachelor"), "not in the expected format.*bachelor"),
    (lambda t: t.assign(PINCP=50_000), "ties leave a class empty"), (lambda t: t.assign(WKHP=0), "no row of psam_p01.csv")])
def test_acs_refuses(states, change, message):
    change(persons(seed=1)).to_csv(states / "psam_p01.csv", index=False)
    pytest.raises(ValueError, load_acs_quintiles, states / "psam_p01.csv").match(message)


def test_acs_says_where_to_get_what_is_absent(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"): pytest.raises(FileNotFoundError, load_acs_quintiles, path).match("folktables")


# ---------------------------------------------------------------- faces

@pytest.fixture(scope="module")
def celeba(tmp_path_factory): return make_tiny_faces(tmp_path_factory.mktemp("celeba"), n=100)


@pytest.mark.parametrize("split, n", [("train", 70), ("valid", 10), ("test", 20)])
def test_four_classes_are_two_labels(celeba, split, n):
    four = celeba_four_class(celeba, split, size=16)
    smiling, nose = CelebA(celeba, split, "Smiling", ("Male",), 16), CelebA(celeba, split, "Big_Nose", ("Male",), 16)
    assert torch.equal(four.labels, 2 * smiling.labels + nose.labels) and torch.equal(four.groups, smiling.groups) and len(four) == n
    assert four.group_names == smiling.group_names and four.class_names[2] == "Smiling=1, Big_Nose=0"
    x, y, a = next(iter(DataLoader(four, 8)))
    assert x.shape == (8, 3, 16, 16) and torch.equal(y, four.labels[:8]) and torch.equal(a, four.groups[:8])


def test_four_classes_refuse_as_celeba(celeba, tmp_path):
    assert celeba_four_class(celeba, "test")[0][0].shape == (3, 128, 128)
    pytest.raises(ValueError, celeba_four_class, celeba, "val").match("split")
    pytest.raises(FileNotFoundError, celeba_four_class, tmp_path).match("celeba|CelebA")


# ---------------------------------------------------------------- education, from the real files

def real(name): return pytest.mark.skipif(not is_available(name), reason=f"the files of {name} are not in FAIRBOOK_DATA")


@real("dutch_education")
def test_dutch_education():
    ds, source = load_dutch_education(), data.load_dutch()
    assert len(ds) == 60_200 and ds.label.tolist() == (source.features.edu_level[source.features.edu_level > 0] - 1).tolist()
    assert not {"edu_level", "sex"} & set(ds.features) and ds.features.shape[1] == source.features.shape[1] - 2
    assert ds.sensitive_features.sex.equals(source.sensitive_features.sex[ds.label.index]) and "220" in ds.warnings[0]
    more = load_dutch_education(keep_outcome=True).features
    assert more.high_occupation.equals(source.label[ds.label.index].rename("high_occupation")) and more.drop(columns="high_occupation").equals(ds.features)


@real("acs_education")
def test_acs_education():
    ds, source = load_acs_education("SD"), data.load_acs_income("SD")
    band = lambda code: 0 if code <= 15 else 1 if code <= 17 else 2 if code <= 20 else 3 if code == 21 else 4
    assert ds.label.tolist() == source.features.SCHL.map(band).tolist() and set(ds.label) == set(range(5))
    assert set(source.features) - set(ds.features) == {"SCHL", "SEX", "RAC1P"} and ds.groups()[1] == source.groups()[1]
    assert load_acs_education(["SD"], keep_outcome=True).features.high_income.tolist() == source.label.tolist()
    assert ds.settings["states"] == ("SD",) and len(ds.settings["classes"]) == 5
    pytest.raises(ValueError, load_acs_education, "CA").match("states must be")


@real("acs_education")
def test_acs_education_of_all_states(): assert len(load_acs_education()) == len(data.load_acs_income())


def test_loaders_go_through_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRBOOK_DATA", str(tmp_path))
    monkeypatch.setenv("FAIRBOOK_OFFLINE", "1")
    for load in (load_dutch_education, load_acs_education):
        pytest.raises(data.DatasetUnavailable, load)
        assert not is_available(load.__name__.removeprefix("load_"))


@pytest.mark.parametrize("name", ["enem", "acs_quintiles", "sba"])
def test_own_files_are_never_at_hand(name): assert not is_available(name)


@pytest.mark.parametrize("name", ["", "education", "dutch_educaton"])
def test_unknown_names(name): pytest.raises(ValueError, is_available, name).match("no data set")


# --- a network of pairs

def tiny(width): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, width))


def test_pairs_are_trained_reproducibly_and_read_in_order(celeba):
    data, nets, losses = celeba_four_class(celeba, "train", 16), [], []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(tiny(8))
        losses.append(train_pairs(nets[-1], data, 4, epochs=3, batch_size=32))
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    joint, y, a = predict_pairs(nets[0], data, 4, batch_size=7)
    assert joint.shape == (len(data), 2, 4) and torch.allclose(joint.sum((1, 2)), torch.ones(len(data)).double()) and torch.equal(y, data.labels) and torch.equal(a, data.groups)
    x = torch.stack([data[k][0] for k in range(5)])
    assert torch.allclose(joint[:5].flatten(1), nets[0](x).double().softmax(1), atol=1e-6)


@pytest.mark.parametrize("width, n_classes, options, words", [(9, 4, {}, "logits"), (4, 4, {}, "room for 1 groups"), (8, 2, {}, "class 3"), (8, 4, dict(epochs=0), "epochs"), (8, 4, dict(batch_size=0), "batch_size"), (8, 4, dict(learning_rate=1e30), "not finite")])
def test_pairs_reject(celeba, width, n_classes, options, words):
    with pytest.raises(ValueError, match=words): train_pairs(tiny(width), celeba_four_class(celeba, "train", 16), n_classes, **dict(epochs=2, batch_size=16) | options)
