"""Notebooks as web pages by nbconvert, for people without Quarto. `preview.py nbs _preview`, or `preview.py _book` (pages beside notebooks).

What Quarto would do and nbconvert does not: links between pages, Quarto's anchors, alt texts and captions, citations, no directive lines."""
import html
import re
import shutil
import sys
import unicodedata
from os.path import relpath
from pathlib import Path

from bs4 import BeautifulSoup
from nbconvert import HTMLExporter
from nbformat.v4 import new_markdown_cell, new_output

from pages import ROOT, directives, exported_names, headings, pages, read, sidebar, without_directives

STYLE = """
body { max-width: 60rem; margin: 0 auto !important; padding: .5rem 1rem 4rem !important; }
.jp-Cell { padding: 0 !important; margin-bottom: .8rem !important; } .jp-RenderedHTMLCommon { font-size: 16px; overflow-wrap: break-word; }
.jp-RenderedImage img, .jp-RenderedHTML img, .jp-RenderedMarkdown img { max-width: 100%; height: auto; }
.jp-OutputArea-output, .jp-InputArea-editor, mjx-container { overflow-x: auto; }
.figure-caption, .book-nav { font: 14px/1.5 system-ui, sans-serif; } .figure-caption { color: #555; margin: .2rem 0 1rem; }
.book-nav { border-bottom: 1px solid #ddd; padding-bottom: .5rem; margin-bottom: 1rem; } .book-nav ul { margin: .2rem 0; padding-left: 1.2rem; }
.jp-Cell-inputWrapper, .jp-Cell-outputWrapper { min-width: 0; }
"""


def accents(tex: str) -> str:
    "Mont{\\'u}far -> Montúfar, and the same for the other accents that stand above or below a letter."
    marks = dict(zip("'`^\"~cvHk=.", "\u0301\u0300\u0302\u0308\u0303\u0327\u030c\u030b\u0328\u0304\u0307"))
    accent = lambda m: unicodedata.normalize("NFC", m[2].replace("\\i", "i") + marks[m[1]])
    return re.sub(r"\{?\\(['`^\"~=.]|[cvHk](?![a-zA-Z]))\s*\{?(\\i|[a-zA-Z])\}?\}?", accent, tex)


def bibliography(path: Path) -> dict[str, dict[str, str]]:
    "The fields of each entry of a .bib file, names in lower case, TeX accents and line breaks resolved."
    entries = {}
    for entry in re.split(r"^@", path.read_text() if path.exists() else "", flags=re.M)[1:]:
        if head := re.match(r"\w+\{([^,\s]+),", entry):
            fields = re.findall(r"^\s*(\w+)\s*=\s*[{\"](.*?)[}\"]\s*,?\s*(?=^\s*\w+\s*=|^\}|\}\s*\Z)", entry, re.M | re.S)
            entries[head[1]] = {name.lower(): " ".join(accents(value).split()) for name, value in fields}
    return entries


def short(entry) -> str:
    last = lambda name: name.strip("{}") if name.startswith("{") else name.split(",")[0] if "," in name else name.split()[-1]
    names = [last(name) for name in entry.get("author", "?").split(" and ")]
    return (names[0] if len(names) == 1 else " and ".join(names) if len(names) == 2 else f"{names[0]} et al.") + f" {entry.get('year', '')}"


def full(entry) -> str:
    venue = entry.get("journal") or entry.get("booktitle") or entry.get("publisher") or entry.get("howpublished") or ""
    link = entry.get("url") or (f"https://doi.org/{entry['doi']}" if "doi" in entry else "")
    text = html.escape(". ".join(filter(None, [entry.get("author", "").replace(" and ", "; "), entry.get("year"), entry.get("title"), venue])))
    text = re.sub(r"[{}]", "", text)
    return f'{text}. <a href="{html.escape(link)}">{html.escape(link)}</a>' if link else text + "."


def cite(source: str, bib, used: list) -> str:
    "Replaces `[@a; @b]` and `@a` by names that link to the list of references; code and mathematics stay."
    def link(match):
        key = match[0].lstrip("-").lstrip("@")
        if key not in bib: return match[0]
        used.append(key)
        return f"[{short(bib[key])}](#ref-{key})"

    keys = lambda text: re.sub(r"-?(?<![\w.])@[\w:-]*\w", link, text)
    parts = re.split(r"(```.*?```|`[^`\n]*`|\$\$.*?\$\$)", source, flags=re.S)
    return "".join(p if i % 2 else keys(re.sub(r"\[([^\[\]]*?-?@[^\[\]]*)\](?!\()", r"(\1)", p)) for i, p in enumerate(parts))


def prepare(nb, bib):
    "Turns Quarto's conventions into plain notebook cells."
    cells, used = [], []
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = re.sub(r"(?m)^(#{1,6} .*?)\s*\{#[^}]*\}\s*$", r"\1", cite(cell.source, bib, used))
        if cell.cell_type == "code":
            options = directives(cell)
            cell.metadata["preview"] = {"alt": options.get("fig-alt", ""), "names": exported_names(cell)}
            for output in cell.outputs:
                if options.get("fig-alt") and "image/png" in output.get("data", {}): output.metadata.setdefault("image/png", {})["alt"] = options["fig-alt"]
            if options.get("fig-cap") and cell.outputs:
                caption = f'<p class="figure-caption">{html.escape(options["fig-cap"])}</p>'
                cell.outputs.append(new_output("display_data", data={"text/html": caption}))
            cell.source = without_directives(cell.source)
        if cell.source.strip() or cell.get("outputs"): cells.append(cell)
    if used:
        entries = "\n".join(f'<li id="ref-{key}">{full(bib[key])}</li>' for key in sorted(set(used)))
        cells.append(new_markdown_cell(f"### References cited\n\n<ul>\n{entries}\n</ul>"))
    nb.cells = cells


def navigation(parts, here: Path, titles: dict[str, str]):
    "A fold with every page of the book, links relative to `here` (a path inside nbs/)."
    nav = ['<nav class="book-nav"><details><summary>All pages</summary><ul>']
    for part, listed in parts:
        items = [(titles[page], relpath(Path(page).relative_to("nbs").with_suffix(".html"), here.parent)) for page in listed if page in titles]
        links = "".join(f'<li><a href="{href}">{html.escape(title)}</a></li>' for title, href in items)
        nav.append(f"<li>{html.escape(part)}<ul>{links}</ul></li>" if part and links else links)
    return BeautifulSoup("".join(nav) + "</ul></details></nav>", "html.parser")


def finish(page: str, anchors, title: str, extras: list[dict], nav) -> str:
    "Anchors as Quarto writes them, links to .html, alt texts, a contents fold."
    soup = BeautifulSoup(page, "html.parser")
    for heading, anchor in zip(soup.select(".jp-RenderedMarkdown :is(h1, h2, h3, h4, h5, h6)"), anchors): heading["id"] = anchor
    for mark in soup.select("a.anchor-link"): mark["href"] = f"#{mark.parent.get('id', '')}"
    for link in soup.find_all("a", href=True):
        if not re.match(r"[a-z]+:", link["href"]): link["href"] = re.sub(r"\.ipynb(?=#|$)", ".html", link["href"])
    for cell, extra in zip(soup.select(".jp-CodeCell"), extras, strict=True):
        for name in extra["names"]: cell.insert(0, soup.new_tag("a", id=name))
        for image in cell.find_all("img"):
            if extra["alt"] and (not image.get("alt") or image["alt"].startswith("No description")): image["alt"] = extra["alt"]
    soup.title.string = title
    soup.html["lang"] = "en"
    style = soup.new_tag("style")
    style.string = STYLE
    soup.head.append(style)
    soup.body.insert(0, nav)
    return str(soup)


def main(source: Path, out: Path, root=ROOT):
    exporter = HTMLExporter(template_name="lab", exclude_input_prompt=True, exclude_output_prompt=True)
    bib = bibliography(root / "nbs/references.bib")
    chosen = [(page, source / page.relative_to(root / "nbs")) for page in pages(root)]
    notebooks = {str(page.relative_to(root)): read(path) for page, path in chosen if path.exists()}
    titles = {page: headings(nb)[0][0] for page, nb in notebooks.items()}
    for page, nb in notebooks.items():
        here = Path(page).relative_to("nbs")
        anchors = [anchor for _, anchor in headings(nb)]
        prepare(nb, bib)
        extras = [c.metadata["preview"] for c in nb.cells if c.cell_type == "code"]
        body, _ = exporter.from_notebook_node(nb, resources={"metadata": {"path": str(root / Path(page).parent)}})
        target = (out / here).with_suffix(".html")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(finish(body, anchors, titles[page], extras, navigation(sidebar(root), here, titles)))
    for folder in {p.parent for p in (root / "nbs").rglob("images/*")}: shutil.copytree(folder, out / folder.relative_to(root / "nbs"), dirs_exist_ok=True)
    print(f"{len(notebooks)} pages: open {relpath(out)}/index.html")


if __name__ == "__main__": main(*(ROOT / a for a in (sys.argv[1:] * 2)[:2]))
