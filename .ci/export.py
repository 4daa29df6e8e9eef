"Fails when `fairbook/` is not what the notebooks export, or a notebook is not clean. Looks at a copy; changes nothing."
import difflib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pages import ROOT

EXPORT = "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()"


def files(root, *patterns): return {p.relative_to(root) for pattern in patterns for p in root.glob(pattern) if ".ipynb_checkpoints" not in p.parts}


def problems(root=ROOT) -> list[str]:
    "One readable text for each file that exporting and cleaning would change, add or remove."
    with tempfile.TemporaryDirectory() as tmp:
        fresh = Path(tmp, "book")
        (fresh / "fairbook").mkdir(parents=True)
        for name in ["settings.ini", "pyproject.toml", "fairbook/__init__.py"]: shutil.copy(root / name, fresh / name)
        shutil.copytree(root / "nbs", fresh / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        run = subprocess.run([sys.executable, "-W", "ignore", "-c", EXPORT], cwd=fresh, capture_output=True, text=True)
        if run.returncode: return [f"the notebooks cannot be exported:\n{run.stderr.strip()[-3000:]}"]
        modules, books = ["fairbook/**/*.py"], ["nbs/**/*.ipynb"]
        return compare(root, fresh, modules, "out of sync with the notebooks: run `make export`") + compare(
            root, fresh, books, "not clean: run `make export`")


def compare(old, new, patterns, cure) -> list[str]:
    found = []
    for name in sorted(files(old, *patterns) | files(new, *patterns)):
        if not (new / name).exists(): found.append(f"{name} is exported by no notebook: delete it, its code belongs into `nbs/`")
        elif not (old / name).exists(): found.append(f"{name} is missing: run `make export`")
        elif (a := (old / name).read_text()) != (b := (new / name).read_text()):
            diff = list(difflib.unified_diff(a.splitlines(), b.splitlines(), f"{name} (now)", f"{name} (after make export)", lineterm="", n=1))
            more = [f"... and {len(diff) - 40} more lines"] if len(diff) > 40 else []
            found.append("\n".join([f"{name} is {cure}", *(line[:200] for line in diff[:40]), *more]))
    return found


if __name__ == "__main__":
    found = problems()
    print("\n\n".join(found) or "fairbook/ is in sync with the notebooks, and they are clean")
    sys.exit(bool(found))
