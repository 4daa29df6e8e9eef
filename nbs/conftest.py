"Hooks for nbval: notebooks are stored without execution counts, and cells tagged `needs-data` run only where the data are."
import functools

import pytest
from pages import missing_data, tags


@functools.cache
def _missing(notebook): return missing_data(notebook.nb)


def pytest_itemcollected(item):
    cell = getattr(item, "cell", None)
    if cell is None: return
    if cell.get("execution_count") is None: cell["execution_count"] = 0  # nbval takes None for "never run"
    if "needs-data" in tags(cell) and (missing := _missing(item.parent)):
        item.add_marker(pytest.mark.skip(reason=f"needs data that are not in FAIRBOOK_DATA: {', '.join(missing)}"))
