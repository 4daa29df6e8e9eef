"Files that come back as they were, or not at all."
import hashlib
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fairbook import tensor_files
from fairbook.tensor_files import load_tensors, read_checked, save_tensors, write_checked


@given(st.dictionaries(st.text("abc.", min_size=1), st.lists(st.floats(width=32), max_size=5), min_size=1), st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
@settings(max_examples=30, deadline=None)
def test_round_trip(tmp_path_factory, numbers, words):
    tensors = {k: torch.tensor(v) for k, v in numbers.items()}
    back, said = load_tensors(save_tensors(tensors, tmp_path_factory.mktemp("files") / "t", words))
    assert back.keys() == tensors.keys() and all(torch.equal(back[k].nan_to_num(7), tensors[k].nan_to_num(7)) for k in back) and said == words


def test_the_sum_is_what_sha256sum_writes(tmp_path):
    path = write_checked(b"abc", tmp_path / "new" / "a.bin")
    assert (tmp_path / "new" / "a.bin.sha256").read_text() == f"{hashlib.sha256(b'abc').hexdigest()}  a.bin\n" and read_checked(str(path)) == b"abc"


@pytest.mark.parametrize("where", [0, 9, 50, -1])
def test_one_wrong_bit(where, tmp_path):
    path = save_tensors({"x": torch.ones(20)}, tmp_path / "t")
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"): load_tensors(path)


class Bomb:
    def __reduce__(self): return (pytest.fail, ("the pickle was opened",))


@pytest.mark.parametrize("write", [lambda p: p.write_bytes(pickle.dumps(Bomb())), lambda p: torch.save({"x": Bomb()}, p), lambda p: torch.save({"x": Bomb()}, p, _use_new_zipfile_serialization=False)], ids=["pickle", "torch", "old torch"])
def test_a_pickle_is_not_opened_even_with_the_right_sum(write, tmp_path):
    write(path := tmp_path / "t")
    write_checked(path.read_bytes(), path)
    with pytest.raises(ValueError, match="pickle"): load_tensors(path)


def test_no_sum_no_file_other_files(tmp_path):
    path = save_tensors({"x": torch.ones(2)}, tmp_path / "t")
    (tmp_path / "t.sha256").write_text("")
    with pytest.raises(ValueError, match="says nothing"): load_tensors(path)
    (tmp_path / "t.sha256").unlink()
    with pytest.raises(ValueError, match="not beside"): load_tensors(path)
    with pytest.raises(FileNotFoundError): load_tensors(tmp_path / "none")
    for data in (b"", b"hello, this is no file of tensors"):
        with pytest.raises(ValueError, match="not a safetensors file"): load_tensors(write_checked(data, path))


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_tensors({"x": torch.zeros(2)}, tmp_path / "t")
    def die(self, target): raise KeyboardInterrupt
    monkeypatch.setattr(tensor_files.Path, "replace", die)
    with pytest.raises(KeyboardInterrupt): save_tensors({"x": torch.ones(2)}, path)
    monkeypatch.undo()
    assert load_tensors(path)[0]["x"].tolist() == [0, 0] and sorted(p.name for p in tmp_path.iterdir()) == ["t", "t.sha256"]
