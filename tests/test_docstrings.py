"""Every public function and class of every module has an example in its docstring, and the example does what it says.

The docstring ends in one paragraph `Example: ...`. Its code, in backquotes, runs after `from fairbook.<module> import *` and `PREAMBLE`, in an empty copy
of the book; the last expression is its value. It may go on with "gives" and a result (its repr, or numbers to three decimals; tensors are shown as lists)
or with "raises" and an error. `Example (needs ...): ...` names a file that not everybody has: such code is compiled, not run."""
import ast
import builtins
import importlib
import inspect
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

MODULES = sorted(p.stem for p in (Path(__file__).resolve().parents[1] / "fairbook").glob("*.py") if p.stem not in ("__init__", "_modidx"))
PREAMBLE = "import math\nimport numpy as np\nimport pandas as pd\nimport torch\nfrom torch import nn"
EXAMPLE = re.compile(r"Example(?P<needs> \(needs [^)]+\))?: `(?P<code>[^`]+)`(?: (?P<verb>gives|raises) `(?P<result>[^`]+)`)?\.")


def public(module):
    "The functions and classes that the module defines and exports; names that it only passes on belong to another module."
    home = importlib.import_module(f"fairbook.{module}")
    return [name for name in home.__all__ if callable(getattr(home, name)) and getattr(home, name).__module__ == home.__name__]


def example(doc):
    "The parts of the last paragraph of a docstring, or None if that is no example."
    last = re.sub(r"\s*\n\s*", " ", inspect.cleandoc(doc or "").split("\n\n")[-1])
    return EXAMPLE.fullmatch(last)


def run(code, space):
    "The value of the last expression of `code`; None if it does not end in one."
    tree = ast.parse(code)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<example>", "exec"), space)
    return None if last is None else eval(compile(last, "<example>", "eval"), space)


def agree(value, result):
    "Is `value` what the docstring shows as `result`?"
    if repr(value) == result: return True
    try: shown = ast.literal_eval(result)
    except (SyntaxError, ValueError): return False
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)): value = value.tolist()
    return _agree(value, shown)


def _agree(value, shown):
    if isinstance(shown, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(value) == len(shown) and all(map(_agree, value, shown))
    if isinstance(shown, float): return isinstance(value, float) and abs(value - shown) <= 5e-4
    return type(value) is type(shown) and value == shown


@pytest.fixture
def empty_book(tmp_path, monkeypatch):
    "An empty copy of the book around the working directory, an empty data folder, and registers that forget what the example registers."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAIRBOOK_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("FAIRBOOK_RECORD", raising=False)
    exercises = importlib.import_module("fairbook.exercises")
    monkeypatch.setattr(exercises, "_CHECKS", dict(exercises._CHECKS))
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("module, name", [(m, n) for m in MODULES for n in public(m)], ids=lambda x: x)
def test_example_in_the_docstring(module, name, empty_book):
    home = importlib.import_module(f"fairbook.{module}")
    found = example(vars(getattr(home, name)).get("__doc__", getattr(home, name).__doc__))
    assert found, f"the docstring of fairbook.{module}.{name} must end in a paragraph 'Example: `code` gives `result`.', see {Path(__file__).name}"
    assert inspect.isclass(getattr(home, name)) or f"{name}(" in found["code"], f"the example of {name} does not call it"
    space = {}
    exec(f"{PREAMBLE}\nfrom fairbook.{module} import *", space)
    if found["needs"]: compile(found["code"], name, "exec")
    elif found["verb"] == "raises":
        with pytest.raises(space[found["result"]] if found["result"] in space else getattr(builtins, found["result"])): run(found["code"], space)
    else:
        value = run(found["code"], space)
        assert found["verb"] is None or agree(value, found["result"]), f"{found['code']} gives {value!r}, the docstring says {found['result']}"


def test_every_module_was_visited():
    silent = {m for m in MODULES if not public(m)}     # these only pass names on: `check`, or what library notebooks define
    assert len(MODULES) >= 10 and silent <= {"exercises_ch02", "exercises_ch03", "exercises_ch04", "exercises_ch05", "optfair"} and all(importlib.import_module(f"fairbook.{m}").__all__ for m in silent)


@pytest.mark.parametrize("doc", [None, "", "Does it.", "Does it. Example: `f(1)` gives `2`.", "Does it.\n\nExample: f(1) gives 2.", "Does it.\n\nExample: `f(1)` gives `2`, or so.",
                                 "Does it.\n\nExample: `f(1)` gives `2`.\n\nRaises `ValueError`."])
def test_what_is_no_example(doc): assert example(doc) is None


@pytest.mark.parametrize("value, result", [
    (torch.tensor([.1, .2]), "[.1, .3]"), (torch.tensor([.1, .2]), "[.1]"), (torch.tensor([1, 2]), "[1., 2.]"), (torch.tensor([[1.]]), "[1.]"),
    (1, "True"), (None, "0"), (float("nan"), "0."), ("a", "'b'"), (.5, "0.501"), (.5, "x"), ({"a": 1}, "{'a': 2}")])
def test_what_does_not_agree(value, result): assert not agree(value, result)


@pytest.mark.parametrize("value, result", [
    (torch.tensor([.1, .2]), "[.1, .2]"), (torch.tensor([1, 2]), "[1, 2]"), (torch.Size([2, 1]), "(2, 1)"), (np.float64(.5), ".5"), (.5, "0.5004"),
    (float("nan"), "nan"), ({"a": 1}, "{'a': 1}"), (("a", 1), "('a', 1)")])
def test_what_agrees(value, result): assert agree(value, result)
