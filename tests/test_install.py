"`pip install fairbook` gives the library: every module imports without Jupyter, nbdev or any extra."
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = sorted(p.stem for p in (Path(__file__).resolve().parents[1] / "fairbook").glob("*.py") if p.stem not in ("__init__", "_modidx"))
EXTRAS = ["nbdev", "execnb", "nbval", "nbconvert", "jupyterlab", "notebook", "pytest", "hypothesis", "beartype", "fairlearn", "clarabel", "ray", "triton", "bs4", "yaml"]
IMPORT = """
import importlib, sys
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in %r else self.finder.find_spec(name, path, target)
sys.meta_path = [Without(f) for f in sys.meta_path]
importlib.import_module(%r)
"""


def import_bare(module, absent=EXTRAS):
    return subprocess.run([sys.executable, "-c", IMPORT % (absent, module)], capture_output=True, text=True)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_without_the_extras(module):
    run = import_bare(f"fairbook.{module}")
    assert run.returncode == 0, f"fairbook.{module} needs more than the runtime dependencies:\n{run.stderr[-1500:]}"


def test_the_blocker_blocks():
    assert "No module named 'pytest'" in import_bare("pytest").stderr
    assert import_bare("pytest", absent=[]).returncode == 0
