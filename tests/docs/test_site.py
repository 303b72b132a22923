"""The site: every page of the repository is in it, and it builds without a warning where its extra is installed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site() -> Any:
    spec = importlib.util.spec_from_file_location("build_site", ROOT / ".site/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_it_once(site: Any) -> None:
    listed = [page for group in site.PAGES.values() for page in group if page not in site.MADE]
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in ("bgen", "configs", "data_tools", "launch")
        for pattern in ("*.md", "*.ipynb")
        for path in (ROOT / folder).rglob(pattern)
        if ".ipynb_checkpoints" not in path.parts
    }
    assert set(listed) == there | {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    assert len(listed) == len(set(listed))


def test_links_lead_to_pages_pictures_or_names_of_files(site: Any, tmp_path: Path) -> None:
    site.collect(tmp_path)
    assert (tmp_path / ".readme/cells.png").is_file()
    for page in tmp_path.rglob("*.md"):
        for target in re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), (page, target)
    text = (tmp_path / "bgen/README.md").read_text(encoding="utf-8")
    assert "[`data_tools/inputs/registry.py`](" not in text
    assert "`data_tools/inputs/registry.py`" in text


def test_the_gallery_has_a_picture_of_each_function_that_draws(site: Any, tmp_path: Path) -> None:
    from bgen import plot

    site.collect(tmp_path)
    text = (tmp_path / "gallery.md").read_text(encoding="utf-8")
    shown = {name for line in re.findall(r"^## (.+)$", text, re.MULTILINE) for name in line.split(", ")}
    draws = {f"plot.{name}" for name, one in vars(plot).items() if getattr(one, "__module__", "") == plot.__name__}
    assert shown == {name for name in draws if not name.startswith("plot._")} - site.TABLES
    pictures = re.findall(r"^!\[.+\]\((gallery/.+)\)$", text, re.MULTILINE)
    assert len(set(pictures)) == len(pictures) > 3
    for picture in pictures:
        content = (tmp_path / picture).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < 100_000


def test_python_names_what_there_is(site: Any) -> None:
    import bgen

    assert {*site.FUNCTIONS, "plot"} == set(dir(bgen)) - {"__version__"}


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_nb", "sphinx_book_theme")),
    reason="not installed: sphinx, myst-nb, sphinx-book-theme (extra docs)",
)
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / ".site/build.py", tmp_path / "site"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    python = (tmp_path / "site/python.html").read_text(encoding="utf-8")
    assert "Train a VAE of counts" in python
    assert (tmp_path / "site/bgen/tasks/tutorial.html").is_file()
    assert "_images/perturb-" in (tmp_path / "site/gallery.html").read_text(encoding="utf-8")
