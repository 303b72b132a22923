from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from anndata import AnnData

from bgen.evaluate.metrics.registry import choose_metrics
from bgen.evaluate.protocols.distribution import baseline_cells, evaluate
from bgen.evaluate.reports import pictures
from bgen.evaluate.reports.distribution import write_report

Draw = Callable[[int, int], AnnData]
ROWS = [
    {"kind": "event", "step": 0, "event": "start"},
    {"kind": "train", "step": 10, "loss": 5.0, "nll": 4.0},
    {"kind": "train", "step": 20, "loss": 3.0, "nll": None},
    {"kind": "train", "step": 30, "loss": 2.5, "nll": 2.0},
    {"kind": "valid", "step": 20, "loss": 3.5, "nll": 3.2},
]


@pytest.mark.parametrize("cell_type", ["kind", pytest.param(None, marks=pytest.mark.slow)])
def test_report_is_one_file_with_sentence_table_and_pictures(draw: Draw, tmp_path: Path, cell_type: str | None) -> None:
    train, test, real = draw(1, 200), draw(2, 100), draw(3, 100)
    scores = evaluate(train, test, real, cell_type=cell_type, seeds=2)
    base = baseline_cells(train, test, cell_type=cell_type)
    losses = {"vae": ROWS, "flow": [row for row in ROWS if row["kind"] != "valid"]}
    facts, title, target = {"model": "<m>"}, "A <b> & c", tmp_path / "report.html"
    path = write_report(target, scores, train, test, real, base, losses=losses, title=title, provenance=facts)
    page = path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert "<h1>A &lt;b&gt; &amp; c</h1>" in page
    assert "&lt;m&gt;" in page
    assert scores.headline() in page
    assert "figures are rough" in page
    for score in scores.scores:
        assert score.metric.title in page
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == (6 if cell_type else 4)  # two of the labels
    for image in images:
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(image)))
        assert pixels.std() > 0.03  # not blank
    assert "http" not in page  # nothing is fetched


def test_report_without_losses_has_no_training_section(draw: Draw, tmp_path: Path) -> None:
    train, test = draw(1, 200), draw(2, 60)
    scores = evaluate(train, test, draw(3, 60), seeds=2, metrics=choose_metrics("energy", "precision"))
    page = write_report(tmp_path / "r.html", scores, train, test, draw(3, 60), baseline_cells(train, test)).read_text()
    assert "<h2>Training" not in page
    assert page.count("data:image/png") == 3


def test_hero_picture_is_small(draw: Draw, tmp_path: Path) -> None:
    path = pictures.hero_picture(tmp_path / "hero.png", draw(1, 200), draw(2, 300), draw(3, 300), cell_type="kind")
    assert path.stat().st_size < 250_000
    height, width = matplotlib.image.imread(path).shape[:2]
    assert width > 1000 > height


def test_layout_is_deterministic_joint_and_of_equal_sizes(draw: Draw) -> None:
    sets = pictures.read_sets({"train": draw(1, 100), "real": draw(2, 60), "generated": draw(3, 80)}, "kind")
    panels = pictures.joint_layout(sets)
    assert [(panel.name, panel.xy.shape) for panel in panels] == [("real", (60, 2)), ("generated", (60, 2))]
    for panel, again in zip(panels, pictures.joint_layout(sets), strict=True):
        np.testing.assert_array_equal(panel.xy, again.xy)


def test_loss_curves() -> None:
    what, curves = pictures.loss_curves(ROWS)
    assert what == "nll"
    assert curves == {"train": ((10, 30), (4.0, 2.0)), "held out": ((20,), (3.2,))}
    what, curves = pictures.loss_curves([{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "valid", "step": 1}])
    assert (what, curves) == ("loss", {"train": ((1,), (2.0,))})
    assert pictures.loss_figure({"vae": ROWS[:1]}) is None


def test_types_keep_one_colour_and_the_rest_share_grey() -> None:
    names = np.array([f"t{i:02d}" for i in range(12) for _ in range(30 - i)])
    panel = pictures.Panel("real", np.zeros((len(names), 2), dtype=np.float32), names)
    colours = pictures.type_colours([panel])
    assert list(colours) == [f"t{i:02d}" for i in range(9)] + [pictures.OTHER]
    assert len(set(colours.values())) == 10
    few = pictures.Panel("real", panel.xy[:2], np.array(["b", "b"]))
    new = pictures.Panel("generated", panel.xy[:2], np.array(["a", "b"]))
    assert list(pictures.type_colours([few, new])) == ["b", "a"]
    assert pictures.type_colours([pictures.Panel("real", panel.xy[:2], None)]) == {}
