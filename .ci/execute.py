"""Executes notebooks. `execute.py` runs the whole book into `_book/`; `execute.py nbs/ch01*.ipynb` runs these in place.

Nothing is downloaded: cells tagged `needs-data` run where their files are and keep their stored outputs elsewhere."""
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from pages import ROOT, missing_data, pages, read, tags


def execute(path: Path, out: Path) -> str:
    "Runs the notebook at `path` in its own folder, writes it to `out` and returns a remark."
    nb, remark = read(path), ""
    held = [c for c in nb.cells if "needs-data" in tags(c)]
    if held and (missing := missing_data(nb)):
        if path == out: raise FileNotFoundError(f"results need all data; {', '.join(missing)} not found: load each once with fairbook.data, or set FAIRBOOK_DATA")
        remark = f"{len(held)} cells kept their stored output (no data here: {', '.join(missing)})"
    else: held = []
    for cell in held: cell.metadata["tags"] = [*tags(cell), "skip-execution"]
    NotebookClient(nb, timeout=1800, kernel_name="python3", record_timing=False, extra_arguments=["--IPKernelApp.log_level=40"],
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in held: cell.metadata["tags"].remove("skip-execution")
    out.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, out)
    return remark


def main(chosen: list[Path]) -> int:
    os.environ["FAIRBOOK_OFFLINE"] = "1"
    todo, failed, began = chosen or pages(), 0, time.time()
    for path in todo:
        out = path if chosen else ROOT / "_book" / path.relative_to(ROOT / "nbs")
        print(f"{path.relative_to(ROOT)} ...", end=" ", flush=True)
        start = time.time()
        try: print(f"{execute(path, out) or 'done'}, {time.time() - start:.0f} s")
        except (CellExecutionError, FileNotFoundError) as error:
            failed += 1
            print(f"FAILED after {time.time() - start:.0f} s\n{error}")
    print(f"{len(todo) - failed} of {len(todo)} notebooks ran, in {time.time() - began:.0f} s")
    return failed


if __name__ == "__main__": sys.exit(min(1, main([Path(a).resolve() for a in sys.argv[1:]])))
