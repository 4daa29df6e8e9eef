"What scripts and tests know about the book: its pages and their order, its cells, its anchors, and which data are here."
import ast
import itertools
import re
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]


def notebooks(root=ROOT) -> list[Path]:
    "Every notebook of the book, by name."
    return sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def sidebar(root=ROOT) -> list[tuple[str, list[str]]]:
    "The sidebar of `_quarto.yml` as (part, pages); pages are paths from the top of the repository."
    contents = yaml.safe_load((root / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    page = lambda entry: entry["href"] if isinstance(entry, dict) else entry
    return [(c["section"], [page(p) for p in c["contents"]]) if isinstance(c, dict) and "section" in c else ("", [page(c)]) for c in contents]


def pages(root=ROOT) -> list[Path]:
    "Every notebook, those of the sidebar first and in its order."
    listed = [root / p for _, part in sidebar(root) for p in part]
    return [p for p in listed if p.exists()] + [p for p in notebooks(root) if p not in listed]


def read(path): return nbformat.read(path, as_version=4)


def tags(cell) -> list[str]: return cell.metadata.get("tags", [])


def directives(cell) -> dict[str, str]:
    "The `#| name: value` lines of a code cell; value is '' for a bare `#| name`, the rest of the line for `#| name value`."
    lines = re.findall(r"^#\|\s*([\w-]+):?[ \t]*(.*?)\s*$", cell.source, re.M) if cell.cell_type == "code" else []
    return {name: yaml.safe_load(value) if value[:1] in ("'", '"') else value for name, value in lines}


def without_directives(source) -> str: return re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")


def slug(text: str) -> str:
    "The anchor that Pandoc, and so Quarto, gives to a heading."
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)  # a link counts with its text only
    text = re.sub(r"<[^>]+>|-{2,}|\.{3}", "", text)  # tags; dashes and dots that become punctuation
    text = re.sub(r"(?<![\w`])_([^_`]+)_(?!\w)", r"\1", text)  # emphasis, but not snake_case
    text = "-".join("".join(c for c in text.lower() if c.isalnum() or c in "_-. \t").split())
    return re.sub(r"^[^a-zA-ZÀ-￿]+", "", text) or "section"


def headings(nb) -> list[tuple[str, str]]:
    "(text, anchor) of every heading; an explicit `{#anchor}` wins, and repeated anchors get -1, -2, ... as in Pandoc."
    seen, found = set(), []
    for cell in nb.cells:
        if cell.cell_type != "markdown": continue
        source = re.sub(r"^(```|~~~).*?^\1", "", cell.source, flags=re.M | re.S)
        for text in re.findall(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t#]*$", source, re.M):
            text, explicit, _ = re.fullmatch(r"(.*?)(?:\s*\{#([\w.:-]+)[^}]*\})?(\s*\{[^}]*\})?", text).groups()
            anchor = explicit or slug(text)
            anchor = next(a for a in itertools.chain([anchor], (f"{anchor}-{k}" for k in itertools.count(1))) if a not in seen)
            seen.add(anchor)
            found.append((text, anchor))
    return found


def loaders(source) -> set[str]:
    "Names of the data sets that a piece of code loads."
    return set(re.findall(r"\bload_(\w+)\(", source))


OWN_FILES = {"shapes3d_frames": "shapes3d/3dshapes.gif"}   # data sets that a module keeps to itself: name of the loader, file


def missing_data(nb) -> list[str]:
    """Names of the data sets that the `needs-data` cells of this notebook load and whose files are not here.
    Where one is missing, none of these cells runs: they may use each other's results."""
    from fairbook import multiclass_data as data
    from fairbook.data import data_folder

    source = "\n".join(c.source for c in nb.cells if "needs-data" in tags(c))
    here = lambda name: (data_folder() / OWN_FILES[name]).exists() if name in OWN_FILES else data.is_available(name)
    return [name for name in sorted(loaders(source)) if not here(name)]


def exported_names(cell) -> list[str]:
    "Public names that an `#| export` or `#| exports` cell defines; methods added by `@patch` belong to their class and are left out."
    if not {"export", "exports"} & directives(cell).keys(): return []
    patched = lambda node: any(ast.unparse(d).split("(")[0] == "patch" for d in node.decorator_list)
    names = []
    for node in ast.parse(without_directives(cell.source)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not patched(node): names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [t.id for t in targets if isinstance(t, ast.Name)]
    return [n for n in names if not n.startswith("_")]
