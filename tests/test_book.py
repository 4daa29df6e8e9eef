"The book keeps its own rules. Each rule is also tried on something that breaks it: a check that cannot fail is no check."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import book_checks as rules
import export
import nbformat
import pages
import preview
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = pages.ROOT
NOTEBOOKS = pages.notebooks()
NAMES = [p.relative_to(ROOT / "nbs").as_posix() for p in NOTEBOOKS]
CHECKS = [rules.check_title, rules.check_lengths, rules.check_imports, rules.check_alt_text, rules.check_assertions, rules.check_outputs, rules.check_data, rules.check_links]


def passes(found): assert not found, "\n" + "\n".join(found)


# --- the book as it is

@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_notebook(check, path): passes(check(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_citations_resolve(path): passes(rules.check_citations(path, ROOT / "nbs/references.bib"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_quarto_filter(path): passes(rules.check_filter(path))


@pytest.mark.parametrize("check", [rules.check_quarto, rules.check_settings, rules.check_pins, rules.check_top_level], ids=lambda c: c.__name__)
def test_repository(check): passes(check(ROOT))


def test_readme(): passes(rules.check_readme(ROOT / "README.md"))


# --- the rules themselves, on notebooks made to break them

TITLE = new_markdown_cell("# Bars\n\n> A page about bars")
md, py = new_markdown_cell, new_code_cell
PNG = [new_output("display_data", data={"image/png": "iVBORw0KGgo="})]
STDERR = [new_output("stream", name="stderr", text="a warning")]
ERROR = [new_output("error", ename="ValueError", evalue="no", traceback=[])]
STEPS = [py("x = 1")] * 9
LONG = "\n".join(f"x{i} = {i}" for i in range(31))
DEFINE, USE = "#| exports\ndef double(x): return 2 * x", "assert double(2) == 4"
CLASS = "class Long:\n" + "\n".join(f"    x{i} = {i}" for i in range(31))


def write(tmp_path, cells, name="ch99_bars.ipynb"):
    path = tmp_path / name
    nbformat.write(new_notebook(cells=[nbformat.from_dict(dict(c, id=f"cell-{i}")) for i, c in enumerate(cells)]), path)
    return path


GOOD = [
    (rules.check_title, [TITLE]),
    (rules.check_lengths, [TITLE, *STEPS, py(CLASS)]),
    (rules.check_lengths, [TITLE, *STEPS, py("#| fig-alt: not counted\n\n" + "\n\n".join("abcde"))]),
    (rules.check_data, [py("law = law_school_matching(data=load_law_school())", metadata={"tags": ["needs-data"]}), py("law.F", metadata={"tags": ["needs-data"]})]),
    (rules.check_imports, [py("import torch\nfrom torch import nn"), py("#| export\nimport torch\nx = 1"), py("%load_ext autoreload\nx = 1")]),
    (rules.check_alt_text, [py('#| fig-alt: "two bars: level"\n#| fig-cap: Two bars\nplt.show()', outputs=PNG), md("![bars](bars.png) and `![](code)`")]),
    (rules.check_alt_text, [py("#| fig-alt: bars that move\nHTML(anim.to_jshtml())")]),
    (rules.check_assertions, [py(DEFINE), py("import math"), py("double(3)"), py(USE)]),
    (rules.check_assertions, [py("#| export\nimport math"), py("#| exporti\ndef _help(): pass"), py("#| exports\n@patch\ndef f(self: A): pass")]),
    (rules.check_assertions, [py(DEFINE), py("with pytest.raises(TypeError): double(None)")]),
    (rules.check_outputs, [py("1/0", outputs=ERROR, metadata={"tags": ["raises-exception"]}), py("1")]),
    (rules.check_links, [md("## The $G$ groups, *again*: `a_b`\n\n[up](#the-g-groups-again-a_b) [web](https://x.org) `[no](gone.ipynb)`")]),
    (rules.check_links, [md("## Same"), md("## Same"), md("[second](#same-1) [self](ch99_bars.ipynb#same)")]),
    (rules.check_links, [py(DEFINE), md("[api](#double) [mark](#here) {#here}")]),
]
BAD = [
    (rules.check_title, [md("# Bars"), md("> A page about bars")], "summary"),
    (rules.check_title, [py("x = 1")], "first cell"),
    (rules.check_title, [], "first cell"),
    (rules.check_lengths, [*STEPS, *STEPS, py(LONG)], "31 lines"),
    (rules.check_lengths, [*STEPS, *STEPS, py(CLASS + "\ny = 1")], "33 lines"),
    (rules.check_lengths, [py("\n".join("abcdef"))], "median"),
    (rules.check_lengths, [*STEPS[:8], py("\n".join("abcdefghijklmnop"))], "90 %"),
    (rules.check_imports, [py("import torch\ntorch.ones(2)")], "cell 0 (cell-0)"),
    (rules.check_imports, [py("%matplotlib inline\nimport torch\nx = 1")], "imports stand"),
    (rules.check_imports, [py("def f():\n    import torch")], "imports stand"),
    (rules.check_alt_text, [py("#| fig-cap: Bars\nplot()", outputs=PNG)], "fig-alt"),
    (rules.check_alt_text, [py("#| fig-alt: bars\nplot()", outputs=PNG)], "fig-cap"),
    (rules.check_alt_text, [py("#| fig-cap: Bars\nplt.plot([1])\nplt.show()")], "fig-alt"),
    (rules.check_alt_text, [py("HTML(anim.to_jshtml())")], "fig-alt"),
    (rules.check_alt_text, [py("#| fig-alt: bars: level\n#| fig-cap: Bars\nplt.show()")], "quote"),
    (rules.check_alt_text, [md("![](bars.png)")], "alternative text"),
    (rules.check_alt_text, [md('<img src="bars.png">')], "alternative text"),
    (rules.check_alt_text, [py("x", outputs=[new_output("display_data", data={"image/svg+xml": "<svg/>"})])], "SVG"),
    (rules.check_assertions, [py(DEFINE), py("double(2)")], "`double`"),
    (rules.check_assertions, [py(DEFINE), py("assert 1 + 1 == 2")], "`double`"),
    (rules.check_assertions, [py(DEFINE), py("double(2)\nassert True")], "`double`"),
    (rules.check_assertions, [py(DEFINE), py("1"), py("2"), py("3"), py(USE)], "`double`"),
    (rules.check_assertions, [py(DEFINE), py(USE, metadata={"tags": ["nbval-skip"]})], "`double`"),
    (rules.check_assertions, [py("#| export\nTABLE = {}")], "`TABLE`"),
    (rules.check_outputs, [py("1/0", outputs=ERROR)], "ValueError"),
    (rules.check_outputs, [py("warn()", outputs=STDERR)], "stderr"),
    (rules.check_outputs, [py("cry()", outputs=[{**STDERR[0], "name": "stdout", "text": "/usr/lib/site-packages/torch"}])], "path of this machine"),
    (rules.check_data, [py("law = law_school_matching()", metadata={"tags": ["needs-data"]}), py("load_adult()")], "which files"),
    (rules.check_links, [md("[gone](gone.ipynb)")], "gone.ipynb"),
    (rules.check_links, [md("![picture](images/gone.png)")], "images/gone.png"),
    (rules.check_links, [md("## Two groups\n[x](#two-group)")], "near: two-groups"),
    (rules.check_links, [md("## Two groups\n[x](ch99_bars.ipynb#Two-groups)")], "#Two-groups"),
    (rules.check_links, [md("```\n## In code\n```\n[x](#in-code)")], "#in-code"),
]


@pytest.mark.parametrize("check, cells", GOOD)
def test_rule_accepts(tmp_path, check, cells):
    (tmp_path / "bars.png").touch()
    passes(check(write(tmp_path, cells)))


@pytest.mark.parametrize("check, cells, complaint", BAD)
def test_rule_complains(tmp_path, check, cells, complaint):
    found = check(write(tmp_path, cells))
    assert len(found) == 1 and complaint in found[0] and "ch99_bars.ipynb" in found[0], found


def test_length_rules_hold_for_chapters_and_library_only(tmp_path):
    assert rules.check_lengths(write(tmp_path, [py(LONG)])) and not rules.check_lengths(write(tmp_path, [py(LONG)], "index.ipynb"))


@pytest.mark.parametrize("text, complaint", [
    ("see [@known; -@known, p. 3], @known and a@b.org, `@code`", None), ("@fig-bars shows it, as does @eq-one", None),
    ("see [@unknown]", "@unknown"), ("see @unknown.", "@unknown"), ("in @fig-gone", "@fig-gone")])
def test_citation_rule(tmp_path, text, complaint):
    (tmp_path / "references.bib").write_text("@book{known,\n title = {Known}\n}\n")
    path = write(tmp_path, [md(text), md("$$x$$ {#eq-one}"), py("#| label: fig-bars\n1")])
    found = rules.check_citations(path, tmp_path / "references.bib")
    assert not found if complaint is None else len(found) == 1 and complaint in found[0]


@pytest.mark.parametrize("heading, anchor", [
    ("The smallest repair that closes a gap", "the-smallest-repair-that-closes-a-gap"), ("3. What `f_x` does", "what-f_x-does"), ("A - b", "a---b"),
    ("Théorème: l'été", "théorème-lété"), ("*Why* G >= 4?", "why-g-4"), ("[A link](x.html) here", "a-link-here"), ("2026", "section"), ("v1.2", "v1.2"),
    ("a -- dash", "a-dash"), ("Level & `_private`", "level-_private"), ("_All of it_", "all-of-it"), ("what $\\hat{y}_i$ is", "what-haty_i-is"), ("<b>x</b> y", "x-y")])
def test_slug_is_that_of_pandoc(heading, anchor): assert pages.slug(heading) == anchor


@pytest.fixture(scope="module")
def small_book(tmp_path_factory):
    "A small book that keeps every rule of the repository."
    tmp_path = tmp_path_factory.mktemp("book")
    for name in ["settings.ini", "pyproject.toml", "constraints.txt", "_quarto.yml", "Makefile", "README.md", "LICENSE", "CITATION.cff"]: shutil.copy(ROOT / name, tmp_path)
    for name in ["nbs/images", "fairbook", "tests", "benchmarks"]: (tmp_path / name).mkdir(parents=True)
    (tmp_path / "fairbook/__init__.py").write_text((ROOT / "fairbook/__init__.py").read_text())
    nb = new_notebook(cells=[TITLE, py("#| default_exp bars"), py("#| exports\ndef double(x): return 2 * x")])
    (tmp_path / "nbs/lib_bars.ipynb").write_text(nbformat.writes(nb))
    (tmp_path / "nbs/references.bib").touch()
    (tmp_path / "nbs/images/favicon.svg").touch()
    sidebar = "website: {favicon: nbs/images/favicon.svg, sidebar: {contents: [{section: Library, contents: [nbs/lib_bars.ipynb]}]}}"
    (tmp_path / "_quarto.yml").write_text(f'project: {{render: ["nbs/*.ipynb"]}}\nbibliography: nbs/references.bib\n{sidebar}\n')
    subprocess.run([sys.executable, "-c", export.EXPORT], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


@pytest.fixture
def book(small_book, tmp_path): return shutil.copytree(small_book, tmp_path, dirs_exist_ok=True)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_small_book_keeps_the_rules(book):
    for check in [export.problems, rules.check_quarto, rules.check_settings, rules.check_pins, rules.check_top_level]: passes(check(book))
    passes(rules.check_filter(book / "nbs/lib_bars.ipynb"))


@pytest.mark.parametrize("file, old, new, complaint", [
    ("fairbook/bars.py", "2 * x", "3 * x", "out of sync"), ("nbs/lib_bars.ipynb", "2 * x", "x + x", "out of sync"),
    ("nbs/lib_bars.ipynb", '"execution_count": null', '"execution_count": 7', "not clean"), ("nbs/lib_bars.ipynb", "def double", "def double(", "SyntaxError")])
def test_export_check_complains(book, file, old, new, complaint):
    edit(book / file, old, new)
    before = {p: p.read_bytes() for p in book.rglob("*") if p.is_file()}
    found = export.problems(book)
    assert found and complaint in "\n".join(found)
    assert before == {p: p.read_bytes() for p in book.rglob("*") if p.is_file()}, "the check changed the book"


def test_export_check_finds_modules_without_a_notebook(book):
    (book / "fairbook/core.py").write_text("x = 1\n")
    (book / "fairbook/bars.py").unlink()
    found = export.problems(book)
    assert len(found) == 2 and "bars.py is missing" in found[0] and "core.py is exported by no notebook" in found[1]


@pytest.mark.parametrize("check, file, old, new, complaint", [
    (rules.check_quarto, "_quarto.yml", "nbs/lib_bars.ipynb", "nbs/lib_gone.ipynb", "names nbs/lib_gone.ipynb"),
    (rules.check_quarto, "_quarto.yml", "[nbs/lib_bars.ipynb]", "[]", "misses nbs/lib_bars.ipynb"),
    (rules.check_quarto, "_quarto.yml", "[nbs/lib_bars.ipynb]", "[nbs/lib_bars.ipynb, nbs/lib_bars.ipynb]", "twice"),
    (rules.check_quarto, "_quarto.yml", "nbs/references.bib", "nbs/gone.bib", "nbs/gone.bib"),
    (rules.check_settings, "settings.ini", "min_python = 3.11", "min_python = 3.10", "lowest Python"),
    (rules.check_settings, "settings.ini", "update_pyproject = False", "update_pyproject = True", "update_pyproject"),
    (rules.check_settings, "pyproject.toml", 'license = "Apache-2.0"', 'license = "MIT"', "licence"),
    (rules.check_settings, "pyproject.toml", 'description = "A textbook', 'description = "The textbook', "description"),
    (rules.check_settings, "fairbook/__init__.py", '__version__ = "', '__version__ = "9', "version"),
    (rules.check_pins, "constraints.txt", "torch==", "torch>=", "not an exact pin"),
    (rules.check_pins, "constraints.txt", "nbval==0.11.0\n", "", "pins no nbval"),
    (rules.check_pins, "constraints.txt", "nbval==0.11.0", "nbval==0.10.0", "does not satisfy"),
])
def test_repository_rule_complains(book, check, file, old, new, complaint):
    edit(book / file, old, new)
    assert complaint in "\n".join(check(book))


def test_top_level_rule_complains(book):
    (book / "setup.py").touch()
    (book / "LICENSE").unlink()
    found = rules.check_top_level(book)
    assert len(found) == 2 and "setup.py does not belong" in found[0] and "LICENSE is missing" in found[1]


@pytest.mark.parametrize("source, complaint", [("#| exports\nraise RuntimeError('at docs time')", "nbdev_filter fails"), ("x = 1\n#| slow", "#| slow"), ("#| evla: false\nx = 1", "#| evla:")])
def test_filter_rule_complains(book, source, complaint):
    path = book / "nbs/lib_bars.ipynb"
    nb = pages.read(path)
    nb.cells.append(py(source))
    nbformat.write(nb, path)
    assert complaint in "\n".join(rules.check_filter(path))


@pytest.mark.parametrize("text, complaint", [
    ("[licence](LICENSE)\n```python\nx = 1\n```\n```python\nassert x == 1\n```\n", None),
    ("```python\nassert 1 == 2\n```\n", "AssertionError"), ("no example\n", "no Python example"), ("![p](gone.png)\n```python\n1\n```\n", "gone.png")])
def test_readme_rule(book, text, complaint):
    (book / "README.md").write_text(text)
    found = rules.check_readme(book / "README.md")
    assert not found if complaint is None else complaint in "\n".join(found)


# --- pages without Quarto

def test_preview_does_what_quarto_would(book):
    (book / "nbs/references.bib").write_text("@book{known,\n title = {Gaps},\n author = {Mont{\\'u}far, G. and Li, A.},\n year = {2026}\n}\n")
    (book / "nbs/solutions").mkdir()
    write(book / "nbs/solutions", [md("# Answers\n\n> To all"), md("[bars](../lib_bars.ipynb#two-groups) and [api](../lib_bars.ipynb#double)")], "ch01.ipynb")
    edit(book / "_quarto.yml", "[nbs/lib_bars.ipynb]", "[nbs/lib_bars.ipynb, nbs/solutions/ch01.ipynb]")
    write(book / "nbs", [TITLE, md("## Two groups\n\nAs in [@known]; [x](solutions/ch01.ipynb)\n\n<details><summary>Hint</summary>\n\nCount them.\n\n</details>"), py(DEFINE),
                         py('#| fig-alt: "a: level bars"\n#| fig-cap: "Two bars"\nplt.show()', outputs=PNG)], "lib_bars.ipynb")
    preview.main(book / "nbs", book / "_preview", book)
    page, other = (BeautifulSoup((book / "_preview" / name).read_text(), "html.parser") for name in ("lib_bars.html", "solutions/ch01.html"))
    assert page.find(id="two-groups").name == "h2" and page.find(id="double") and page.title.string == "Bars"
    assert [i["alt"] for i in page.find_all("img")] == ["a: level bars"] and "#|" not in page.get_text() and "Two bars" in page.get_text()
    assert "Count them." in page.select_one(".jp-Cell details").get_text()
    assert page.find("a", string="Montúfar and Li 2026")["href"] == "#ref-known" and "Gaps" in page.find(id="ref-known").get_text()
    assert {"solutions/ch01.html"} == {a["href"] for a in page.find_all("a", string=["x", "Answers"])}
    assert [a["href"] for a in other.select(".jp-Cell a") if ".html" in a["href"]] == ["../lib_bars.html#two-groups", "../lib_bars.html#double"]
    assert other.find("a", string="Bars")["href"] == "../lib_bars.html"


# --- notebooks under nbval

def test_nbval_sees_cleaned_cells_and_skips_those_without_data(tmp_path):
    out = lambda text: [new_output("stream", text=text)]
    cells = [py("print(1)", outputs=out("1\n")), py("print(1)", outputs=out("2\n")), py("print(1)"),
             py("load_adult()", outputs=out("stored\n"), metadata={"tags": ["needs-data"]})]
    shutil.copy(ROOT / "nbs/conftest.py", tmp_path)
    write(tmp_path, cells)
    run = subprocess.run([sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-rs", "-p", "no:cacheprovider", "--nbval", tmp_path],
                         cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, FAIRBOOK_DATA=str(tmp_path / "none")))
    assert "2 failed, 1 passed, 1 skipped" in run.stdout and "not in FAIRBOOK_DATA: adult" in run.stdout, run.stdout


# --- cells that need data

def test_needs_data_cells_are_held_back_where_the_data_are_not(monkeypatch):
    from fairbook import multiclass_data as data
    monkeypatch.setattr(data, "is_available", lambda name: name == "adult")
    cell = lambda source, tags=("needs-data",): py(source, metadata={"tags": list(tags)})
    assert pages.missing_data(new_notebook(cells=[cell("load_adult()"), py("load_dutch()"), cell("load_x()", ["other"])])) == []
    assert pages.missing_data(new_notebook(cells=[cell("a = data.load_adult()"), cell("load_dutch().rows")])) == ["dutch"]


def test_a_data_set_that_a_module_keeps_to_itself(monkeypatch, tmp_path):
    notebook = new_notebook(cells=[py("load_shapes3d_frames()", metadata={"tags": ["needs-data"]})])
    monkeypatch.setenv("FAIRBOOK_DATA", str(tmp_path))
    assert pages.missing_data(notebook) == ["shapes3d_frames"]
    (tmp_path / "shapes3d").mkdir()
    (tmp_path / pages.OWN_FILES["shapes3d_frames"]).touch()
    assert pages.missing_data(notebook) == []
