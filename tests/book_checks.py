"""The rules of the book that a machine can check. Each check returns a list of complaints, empty when all is well.

A complaint names the notebook and the cell (number and id), and says what to do."""
import ast
import contextlib
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import yaml
from IPython.core.inputtransformer2 import TransformerManager
from nbdev.cli import nbdev_filter
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pages import ROOT, directives, exported_names, headings, loaders, notebooks, read, sidebar, tags, without_directives

TOP = set("nbs fairbook tests benchmarks _quarto.yml settings.ini pyproject.toml constraints.txt Makefile README.md LICENSE CITATION.cff".split())
BUILT = {"_docs", "_book", "_preview", "build", "dist"}
QUARTO = re.compile(r"(label|fig-[\w-]+|tbl-[\w-]+|code-[\w-]+|lst-[\w-]+|layout[\w-]*|column|echo|output|eval|warning|include|classes)$")


# --- what a cell is

def python(cell) -> ast.Module: return ast.parse(TransformerManager().transform_cell(without_directives(cell.source)))
def is_exported(cell): return bool({"export", "exports", "exporti"} & directives(cell).keys())
def is_import(node): return isinstance(node, (ast.Import, ast.ImportFrom))
def lines(cell): return [line for line in without_directives(cell.source).splitlines() if line.strip()]
def code_cells(nb): return [(i, c) for i, c in enumerate(nb.cells) if c.cell_type == "code" and without_directives(c.source).strip()]
def at(path, i, cell): return f"{Path(path).name}, cell {i} ({cell.get('id', 'no id')}): "
def prose(source): return re.sub(r"^(```|~~~).*?^\1|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$|<!--.*?-->", " ", source, flags=re.S | re.M)


# --- one notebook

def check_title(path):
    first = read(path).cells[:1]
    if first and first[0].cell_type == "markdown" and re.match(r"# \S[^\n]*\n+> \S", first[0].source): return []
    return [f"{Path(path).name}: the first cell must be markdown, '# Title', a blank line, '> one-line summary'"]


def check_lengths(path):
    "Chapters and library notebooks: median <= 5 lines, 90 % <= 15, none > 30 except a lone class."
    if not Path(path).name.startswith(("ch", "lib_")): return []
    cells = code_cells(read(path))
    sizes = [len(lines(c)) for _, c in cells] or [0]
    found = [f"{at(path, i, c)}{n} lines; split it into steps of at most 30 (a class can grow by @patch)"
             for (i, c), n in zip(cells, sizes) if n > 30 and not all(isinstance(x, ast.ClassDef) for x in python(c).body)]
    longest = ", ".join(f"cell {i}: {n}" for (i, _), n in sorted(zip(cells, sizes), key=lambda t: -t[1])[:5])
    if statistics.median(sizes) > 5: found.append(f"{Path(path).name}: the median code cell has {statistics.median(sizes):g} lines, at most 5 are allowed; one idea per cell")
    if sum(n <= 15 for n in sizes) < .9 * len(sizes): found.append(f"{Path(path).name}: fewer than 90 % of the code cells have at most 15 lines; longest: {longest}")
    return found


def check_imports(path):
    "The page builder executes any cell that imports, so in cells that are not exported imports stand alone."
    return [at(path, i, c) + "imports stand in a cell of their own; move the other statements to the next cell"
            for i, c in code_cells(read(path)) if not is_exported(c)
            and any(is_import(n) for n in ast.walk(python(c))) and not all(is_import(n) for n in python(c).body)]


def check_alt_text(path):
    found = []
    for i, c in enumerate(read(path).cells):
        if c.cell_type == "markdown":
            if re.search(r"!\[\s*\]\(", prose(c.source)) or any(not re.search(r"alt=[\"'][^\"']", t) for t in re.findall(r"<img\b[^>]*>", prose(c.source))):
                found.append(at(path, i, c) + "an image without alternative text; write ![what it shows](file)")
            continue
        data = {kind for o in c.get("outputs", []) for kind in o.get("data", {})}
        picture = bool({"image/png", "image/jpeg"} & data) or "plt.show()" in c.source
        try: options = directives(c)
        except yaml.YAMLError as error:
            found.append(at(path, i, c) + f"a `#|` line is not YAML ({error}); quote its value")
            continue
        if "image/svg+xml" in data: found.append(at(path, i, c) + "stores an SVG, which never reproduces; use PNG")
        for option, needed in ("fig-alt", picture or "to_jshtml" in c.source), ("fig-cap", picture):
            if needed and not options.get(option): found.append(at(path, i, c) + f"draws, so it needs a line `#| {option}: ...` at its top")
            elif ": " in (raw := "".join(re.findall(rf"^#\|\s*{option}:[ \t]*(.*)$", c.source, re.M))) and raw[0] not in "'\"":
                found.append(at(path, i, c) + f"quote the value of {option}: it has a colon, which YAML reads as a key")
    return found


def _asserts(tree):
    "Does this code state something that could fail?"
    named = lambda f: f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "")
    return any((isinstance(n, ast.Assert) and not isinstance(n.test, ast.Constant))
               or (isinstance(n, ast.Call) and re.match(r"assert_|test_\w+$|raises$", named(n.func))) for n in ast.walk(tree))


def _names(tree): return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}


def check_assertions(path):
    "Every exported symbol is used and asserted about in one of the next three cells that are neither exported nor imports."
    cells, found = code_cells(read(path)), []
    for k, (i, c) in enumerate(cells):
        names = exported_names(c)
        later = [python(d) for _, d in cells[k + 1:] if names and not is_exported(d) and "nbval-skip" not in tags(d) and "eval" not in directives(d)]
        shown = [t for t in later if not all(map(is_import, t.body))][:3]
        found += [at(path, i, c) + f"`{name}` is exported, but none of the next 3 cells uses it and holds an `assert` that could fail"
                  for name in names if not any(name in _names(t) and _asserts(t) for t in shown)]
    return found


def check_outputs(path):
    found = []
    for i, c in enumerate(read(path).cells):
        for o in c.get("outputs", []):
            if o.output_type == "error" and "raises-exception" not in tags(c): found.append(at(path, i, c) + f"stores an error ({o.ename}); fix and re-run it")
            if re.search(rf"site-packages|{re.escape(str(ROOT))}/", str(o)):
                found.append(at(path, i, c) + "stores a path of this machine; print less")
            if o.get("name") == "stderr" and "nbval-ignore-output" not in tags(c): found.append(at(path, i, c) + "stores text from stderr; cure the warning and re-run")
    return found


def check_data(path):
    "Cells that need data say which, where `missing_data` looks: else they are run where the files are not."
    needy = [(i, c) for i, c in enumerate(read(path).cells) if "needs-data" in tags(c)]
    if not needy or any(loaders(c.source) for _, c in needy): return []
    return [at(path, *needy[0]) + "is tagged needs-data, but no cell with this tag calls a `load_...()`, so nothing says which files are meant; load the data there, not inside another function"]


def anchors(path) -> set[str]:
    "Every target of `page#anchor`: headings, explicit ids, and exported names (their API entry)."
    nb = read(path)
    explicit = {a for c in nb.cells for a in re.findall(r"\{#([\w.:-]+)|\bid=[\"']([\w.:-]+)", c.source) for a in a if a}
    return {a for _, a in headings(nb)} | explicit | {n for c in nb.cells if c.cell_type == "code" for n in exported_names(c)}


def check_links(path):
    "Relative links and images lead to files of the book, and their #anchors exist."
    path, found = Path(path), []
    for i, c in enumerate(read(path).cells):
        if c.cell_type != "markdown": continue
        text = prose(c.source)
        for link in re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)", text) + re.findall(r"(?:href|src)=[\"']([^\"']+)", text):
            if re.match(r"[a-z][a-z+.-]*:|//", link): continue
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            if not target.exists(): found.append(at(path, i, c) + f"link to {file}, which does not exist")
            elif anchor and target.suffix == ".ipynb" and anchor not in (there := anchors(target)):
                near = [a for a in sorted(there) if a[:4] == anchor[:4]]
                found.append(at(path, i, c) + f"link to #{anchor}, but {target.name} has no such heading{'; near: ' + ', '.join(near) if near else ''}")
    return found


def check_citations(path, bib):
    "Citation keys are in references.bib; cross-references (@fig-, @eq-, ...) have their label in the same notebook."
    keys = set(re.findall(r"^@\w+\{([^,\s]+),", Path(bib).read_text(), re.M))
    nb, found = read(path), []
    labels = {directives(c).get("label") for c in nb.cells} | {a for c in nb.cells for a in re.findall(r"\{#([\w-]+)", c.source)}
    for i, c in enumerate(nb.cells):
        if c.cell_type != "markdown": continue
        for key in re.findall(r"(?<![\w.\\/])@([A-Za-z][\w:.-]*\w)", prose(c.source)):
            if re.match(r"(fig|tbl|eq|sec|thm|lem|cor|prp|def|exm|exr|sol|lst)-", key):
                if key not in labels: found.append(at(path, i, c) + f"refers to @{key}, but no label of that name is in this notebook")
            elif key not in keys: found.append(at(path, i, c) + f"cites @{key}, which is not in {Path(bib).name}")
    return found


def check_filter(path):
    "Runs what Quarto will run, and looks for directives that would be printed on the page."
    path, silent = Path(path).resolve(), io.StringIO()
    try:
        with contextlib.chdir(path.parent), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent): page = nbdev_filter(path.read_text(), printit=False)
    except Exception as e: return [f"{path.name}: nbdev_filter fails, so Quarto will. {type(e).__name__}: {e}"]
    finally: os.environ.pop("IN_TEST", None)
    found = []
    for cell in json.loads(page)["cells"]:
        for raw in re.findall(r"^\s*#\|\s*(\S+)", "".join(cell.get("source", "")), re.M):
            if not QUARTO.match(raw.rstrip(":")): found.append(f"{path.name} ({cell.get('id')}): nbdev_filter leaves `#| {raw}`, which the page would print; remove it")
    return found


# --- the whole repository

def check_quarto(root):
    "The sidebar names every notebook once, and no page, bibliography or favicon that is not there."
    config = yaml.safe_load((root / "_quarto.yml").read_text())
    listed = [page for _, part in sidebar(root) for page in part]
    there = {p.relative_to(root).as_posix() for p in notebooks(root)}
    files = [config.get("bibliography"), config["website"].get("favicon"), *[p for p in config["project"].get("render", []) if "*" not in p]]
    return ([f"_quarto.yml names {p}, which does not exist" for p in sorted({*listed, *filter(None, files)}) if not (root / p).exists()]
            + [f"_quarto.yml misses {p}: add it to the sidebar" for p in sorted(there - set(listed))]
            + [f"_quarto.yml lists {p} twice" for p in sorted({p for p in listed if listed.count(p) > 1})])


def check_settings(root):
    "settings.ini (read by nbdev) and pyproject.toml (read by pip) say the same."
    ini = ConfigParser(interpolation=None)
    ini.read(root / "settings.ini")
    ini, toml = ini["DEFAULT"], tomllib.loads((root / "pyproject.toml").read_text())
    project = toml["project"]
    version = re.search(r'__version__ = "(.*)"', (root / ini["lib_path"] / "__init__.py").read_text())
    same = {"name": (ini["lib_name"], project["name"]), "description": (ini["description"], project["description"]),
            "licence": ({"apache2": "Apache-2.0"}.get(ini["license"]), project["license"]),
            "lowest Python": (ini["min_python"], project["requires-python"].split(",")[0].removeprefix(">=")),
            "author": ((ini["author"], ini["author_email"]), tuple(project["authors"][0].values())),
            "version": (ini["version"], version and version[1]),
            "source of the version": ("fairbook.__version__", "version" in project["dynamic"] and toml["tool"]["setuptools"]["dynamic"]["version"]["attr"]),
            "home": (ini["git_url"], project["urls"]["Source"]),
            "update_pyproject": (ini["update_pyproject"], "False"), "cell tags kept": (ini["allowed_cell_metadata_keys"], "tags")}
    return [f"settings.ini and pyproject.toml disagree on the {what}: {a!r} and {b!r}" for what, (a, b) in same.items() if a != b]


def check_pins(root, extras=("dev", "peers", "gpu")):
    "Every requirement of the package and of the extras that make installs has an exact pin that satisfies it."
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    pins = {canonicalize_name(r.name): r for line in (root / "constraints.txt").read_text().splitlines()
            if line.strip() and not line.startswith("#") for r in [Requirement(line)]}
    found = [f"constraints.txt: {r} is not an exact pin" for r in pins.values() if not re.fullmatch(r"==[\w.]+", str(r.specifier))]
    for r in map(Requirement, project["dependencies"] + [r for e in extras for r in project["optional-dependencies"][e]]):
        pin = pins.get(canonicalize_name(r.name))
        if pin is None: found.append(f"constraints.txt pins no {r.name}")
        elif not r.specifier.contains(str(pin.specifier).removeprefix("==")): found.append(f"constraints.txt: {pin} does not satisfy {r}")
    return found


def check_top_level(root):
    "The allowed names at the top of the repository and no others; what git ignores does not count."
    git = shutil.which("git") if (root / ".git").exists() else None
    run = subprocess.run([git, "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True) if git else None
    if run and run.returncode == 0: names = {line.split("/")[0] for line in run.stdout.splitlines() if (root / line).exists()}
    else: names = {p.name for p in root.iterdir()} - BUILT - {p.name for p in root.glob("*.egg-info")} - {"__pycache__"}
    names = {n for n in names if not n.startswith(".")}
    return [f"{n} does not belong at the top of the repository" for n in sorted(names - TOP)] + [f"{n} is missing at the top of the repository" for n in sorted(TOP - names)]


def check_readme(path):
    "Relative links and images of the README lead somewhere, and its Python blocks run, in order, in one session."
    path, text = Path(path), Path(path).read_text()
    found = [f"{path.name} links to {link}, which does not exist" for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
             if not re.match(r"[a-z]+:", link) and not (path.parent / link).exists()]
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
    run = subprocess.run([sys.executable, "-c", code], cwd=path.parent, capture_output=True, text=True)
    if not code: found.append(f"{path.name} shows no Python example")
    elif run.returncode: found.append(f"the Python example of {path.name} fails:\n{run.stderr.strip()[-1500:]}")
    return found
