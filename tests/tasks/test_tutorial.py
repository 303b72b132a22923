"""The tutorial notebooks: what is committed is whole and small, and their cells run as they stand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 300_000


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def shown(notebook: Any) -> str:
    return json.dumps([cell["outputs"] for cell in code_cells(notebook)])


TUTORIALS = {
    "bgen/tasks/tutorial.ipynb": (3, "labels were told by"),
    "bgen/tasks/perturb/tutorial.ipynb": (2, "share explained"),
    "bgen/tasks/time/tutorial.ipynb": (2, "OT-midpoint"),
}
"""Each with its number of pictures, and words that its last results have."""


@pytest.fixture(scope="module", params=TUTORIALS)
def path(request: pytest.FixtureRequest) -> Path:
    return ROOT / request.param


@pytest.fixture(scope="module")
def committed(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_all_are_tested() -> None:
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "bgen").rglob("*.ipynb")} == set(TUTORIALS)


def test_it_is_small(path: Path) -> None:
    assert path.stat().st_size < MOST_BYTES


def test_it_was_run_from_top_to_bottom_without_an_error(path: Path, committed: Any) -> None:
    cells = code_cells(committed)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    pictures, words = TUTORIALS[path.relative_to(ROOT).as_posix()]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
    assert words in shown(committed)


def test_it_names_no_place_of_the_machine_it_ran_on(committed: Any) -> None:
    assert not [word for word in ("/tmp", "/home", "/root", "site-packages") if word in shown(committed)]


def test_it_has_one_title_and_parts_below_it(committed: Any) -> None:
    text = "\n".join("".join(cell["source"]) for cell in committed["cells"] if cell["cell_type"] == "markdown")
    assert text.startswith("# ")
    headings = [line.partition(" ")[0] for line in text.splitlines() if line.startswith("#")]
    assert headings == ["#", *["##"] * (len(headings) - 1)]
    assert len(headings) > 5


def test_its_links_lead_to_pages(path: Path, committed: Any) -> None:
    text = "".join("".join(cell["source"]) for cell in committed["cells"] if cell["cell_type"] == "markdown")
    links = [part.split(")")[0].partition("#")[0] for part in text.split("](")[1:]]
    assert links
    assert not [link for link in links if not (path.parent / link).is_file()]


def test_a_screen_takes_fifteen_cells_without_yaml_or_a_shell() -> None:
    notebook = json.loads((ROOT / "bgen/tasks/perturb/tutorial.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    assert len(sources) <= 15
    assert not [
        line for source in sources for line in source.splitlines() if line.startswith(("!", "%")) or ".yaml" in line
    ]
    first = next(place for place, source in enumerate(sources) if "read_h5ad" in source)
    last = next(place for place, source in enumerate(sources) if "bgen.plot.effect" in source)
    assert first < last


@pytest.mark.slow
def test_its_cells_run(path: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "tests/docs/run_notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    notebooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebooks)
    made = notebooks.run(path, tmp_path)
    assert TUTORIALS[path.relative_to(ROOT).as_posix()][1] in shown(made)
