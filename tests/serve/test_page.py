"""The page of `bgen serve` in a real browser: cells are generated and perturbed, and their map and genes are seen."""

from __future__ import annotations

import base64
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import pytest

from bgen.tasks.load import Model

sys.path.append(str(Path(__file__).parent))
from bgen_server import running
from browser import Browser, find_chromium

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")),
        reason="not installed: fastapi, uvicorn (extra serve)",
    ),
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: install chromium, or name it in BGEN_CHROMIUM"),
]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    assert CHROMIUM is not None
    made = Browser(CHROMIUM, tmp_path / "profile")
    yield made
    made.close()


def submit(browser: Browser, form: str) -> tuple[str, str]:
    """Press a form's button, wait for the answer, and return what is said and how."""
    browser.run(f"document.querySelector('#{form} button').click()")
    browser.until("!document.querySelector('button').disabled")
    return browser.run("$('said').textContent"), browser.run("$('said').className")


def ink(browser: Browser) -> int:
    """How many pixels of the map are drawn on."""
    count = "[...$('map').getContext('2d').getImageData(0, 0, $('map').width, $('map').height).data]"
    return int(browser.run(f"{count}.filter((value, at) => at % 4 === 3 && value > 0).length"))


def test_cells_are_generated_and_perturbed(browser: Browser, model: Model, demo: Any, tmp_path: Path) -> None:
    with running(model.folder) as server:
        browser.open(server.address)
        assert browser.until("$('name').textContent !== 'bgen' && $('name').textContent") == model.saved.about.name
        assert model.saved.fingerprint()[:12] in browser.run("$('facts').textContent")
        names = model.conditions["perturbation"]
        options = browser.run("[...document.querySelectorAll('[data-condition=perturbation] option')].map(o => o.text)")
        assert options == ["any", *names]

        browser.run("$('n').value = 30; $('seed').value = 5")
        browser.run("document.querySelector('[data-condition=perturbation]').value = '0'")
        said, how = submit(browser, "generate")
        straight = model.generate(30, seed=5, where={"perturbation": names[0]})
        assert (said, how) == (f"30 cells with {int(straight.X.sum()):,} counts.", "")
        assert browser.run("$('map').dataset.points") == "30"
        drawn = ink(browser)
        assert drawn > 30
        normal = straight.X.multiply(1e4 / straight.X.sum(1)).tocsr().log1p()
        most = straight.var_names[normal.mean(0).A1.argmax()]
        assert browser.run("document.querySelector('#genes td').textContent") == most
        assert browser.run("$('genes').rows.length") == 20

        name = browser.run("$('known').options[0].value")
        assert name in names
        browser.run(f"$('perturbation').value = '{name}'")
        said, how = submit(browser, "perturb")
        assert (said, how) == (f"30 cells under {name}.", "")
        assert browser.run("$('map').dataset.points") == "60"
        assert ink(browser) > drawn
        assert "change" in browser.run("$('title').textContent")

        cells = anndata.read_h5ad(demo.cells)
        cells[cells.obs["perturbation"] == "control"][:25].write_h5ad(tmp_path / "mine.h5ad")
        browser.run("$('source').value = 'file'; $('source').dispatchEvent(new Event('change'))")
        browser.choose_file("#file", tmp_path / "mine.h5ad")
        said, how = submit(browser, "perturb")
        assert (said, how) == (f"25 cells under {name}.", "")
        assert browser.run("$('map').dataset.points") == "50"
        assert browser.complaints() == []

        browser.run("$('perturbation').value = '<img src=x onerror=alert(1)>'")
        said, how = submit(browser, "perturb")
        assert (how, "<img" in said) == ("wrong", True)
        assert browser.run("document.images.length") == 0
        assert {address.split("/")[2] for address in browser.asked() if address != "about:blank"} == {
            server.address.removeprefix("http://")
        }
        picture = base64.b64decode(browser.call("Page.captureScreenshot")["data"])
        assert picture.startswith(b"\x89PNG")


def test_the_page_asks_for_the_token(browser: Browser, demo: Any) -> None:
    with running(demo.model, BGEN_TOKEN="secret") as server:
        browser.open(server.address)
        browser.until("$('said') && $('said').className === 'wrong'")
        assert "Bearer" in browser.run("$('said').textContent")
        assert browser.run("$('guard').hidden") is False
        assert browser.run("$('facts').textContent") == ""
        browser.run("$('token').value = 'secret'; $('token').dispatchEvent(new Event('change'))")
        browser.until("$('facts').textContent.includes('fingerprint')")
        assert browser.run("$('perturb').hidden") is not None
        browser.run("$('n').value = 5")
        said, how = submit(browser, "generate")
        assert (said.startswith("5 cells with"), how) == (True, "")
