"""Metrics and protocols that come from outside, through the registries alone, run as bgen's own do."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anndata import AnnData
from rich.console import Console
from scipy import sparse

from bgen.errors import UserError
from bgen.evaluate import registry
from bgen.evaluate.metrics import conditions, counts, distribution, effects
from bgen.evaluate.metrics.distribution import Points
from bgen.evaluate.metrics.metric import Metric
from bgen.evaluate.metrics.registry import METRICS, choose_metrics
from bgen.evaluate.metrics.space import fit_space
from bgen.evaluate.protocols.distribution import fit_reference, measure
from bgen.evaluate.protocols.scores import Estimate, Score, Scores
from bgen.evaluate.registry import PROTOCOLS, CellsProtocol, PerturbationProtocol, TimePointProtocol, find_protocol
from bgen.evaluate.reports.page import write_page
from bgen.tasks.evaluate import score
from bgen.tasks.load import load_model

Draw = Callable[[int, int], AnnData]
EVALUATE = Path(registry.__file__).parent


@pytest.fixture(autouse=True)
def registries_as_they_were() -> Iterator[None]:
    before = dict(METRICS), dict(PROTOCOLS)
    yield
    for there, was in zip((METRICS, PROTOCOLS), before, strict=True):
        there.clear()
        there.update(was)  # type: ignore[arg-type]


def run_page(folder: str) -> dict[str, Any]:
    """Execute the Python of a page "To add one" and return its names."""
    (code,) = re.findall(r"```python\n(.*?)```", (EVALUATE / folder / "README.md").read_text(encoding="utf-8"), re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def run(demo: Any, tmp_path: Path, protocol: str) -> tuple[str, dict[str, Any], str, str]:
    """Score the demo's model; return table, JSON, page and card."""
    model = Path(shutil.copytree(demo.model, tmp_path / "model"))
    scores = score(load_model(model), demo.store, tmp_path / "report", seeds=2, protocol=protocol)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(scores.table())
    told = json.loads((tmp_path / "report" / "metrics.json").read_text())
    page = (tmp_path / "report" / "report.html").read_text()
    return console.export_text(), told, page, (model / "README.md").read_text()


def test_the_metric_of_the_page_is_measured(draw: Draw) -> None:
    gap = run_page("metrics")["LIBRARY_GAP"]
    assert choose_metrics("library_gap") == (gap,)
    train, real = draw(1, 300), draw(2, 100)
    twice, other = sparse.csr_matrix(real.X * 2), sparse.csr_matrix(draw(3, 100).X)
    reference, cells = fit_reference(sparse.csr_matrix(train.X)), sparse.csr_matrix(real.X)
    values = [measure(reference, cells, made, (gap,))["library_gap"] for made in (cells, other, twice)]
    assert values[0] == 0
    assert values[1] < 0.3
    assert values[2] == pytest.approx(1)


@pytest.mark.parametrize(
    ("protocol", "keys"),
    [
        ("sizes-v1", ["w2", "energy", "library_ks"]),
        pytest.param("sizes-v2", ["w2", "library_gap"], marks=pytest.mark.slow),  # both are from outside below, too
    ],
)
def test_the_protocol_of_the_page_takes_a_metric_from_outside(
    protocol: str, keys: list[str], demo: Any, tmp_path: Path
) -> None:
    run_page("metrics")
    names = run_page("protocols")
    with_gap = choose_metrics("w2", "library_gap")
    PROTOCOLS["sizes-v2"] = CellsProtocol(
        "sizes-v2",
        with_gap,
        names["partial"](names["evaluate"], protocol="sizes-v2", metrics=with_gap),
        registry.report_cells,
    )
    table, told, page, card = run(demo, tmp_path, protocol)
    assert (told["protocol"], list(told["metrics"])[: len(keys)]) == (protocol, keys)
    for key in keys:
        for text in (table, page, card):
            assert METRICS[key].title in text
    assert f"Protocol `{protocol}`" in card
    assert protocol in table
    assert protocol in page


def evaluate_medians(
    train: AnnData,
    test: AnnData,
    generated: AnnData,
    *,
    cell_type: str | None = None,
    conditions: Sequence[str] = (),
    seeds: int = 3,
    on_progress: Any,
) -> Scores:
    """A protocol of its own: distance of the medians of halves, with training cells as baseline."""
    space = fit_space(sparse.csr_matrix(train.X))
    points = [space.project(sparse.csr_matrix(cells.X)) for cells in (test, generated, train, test)]
    rows = []
    for row in points[1:]:
        values = []
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            real, other = (some[rng.permutation(len(some))[:50]] for some in (points[0], row))
            values.append(choose_metrics("medians")[0].compute(Points(real, other)))
        rows.append(Estimate(tuple(values)))
    on_progress(1, 1)
    return Scores("medians-v1", 50, seeds, {}, (Score(choose_metrics("medians")[0], *rows),))


def report_medians(path: Path, scores: Scores, *_: AnnData, **__: object) -> Path:
    return write_page(path, "Medians", scores.headline(), [f"<p>{scores['medians'].verdict}</p>"])


def test_a_metric_and_a_protocol_of_ones_own_go_to_table_json_page_and_card(demo: Any, tmp_path: Path) -> None:
    def between(pair: Points) -> float:
        return float(np.linalg.norm(np.median(pair.real, 0) - np.median(pair.other, 0)))

    METRICS["medians"] = Metric("medians", "distance of medians", "lower", 2, "How far medians lie apart.", between)
    PROTOCOLS["medians-v1"] = CellsProtocol("medians-v1", choose_metrics("medians"), evaluate_medians, report_medians)
    table, told, page, card = run(demo, tmp_path, "medians-v1")
    assert "distance of medians" in table
    assert told["metrics"]["medians"]["model"]["mean"] > told["metrics"]["medians"]["ceiling"]["mean"] - 1
    assert told["headline"] in page
    assert "Protocol `medians-v1`" in card
    assert "distance of medians (lower is better)" in card


def test_every_metric_has_a_key_of_its_own() -> None:
    every = [*distribution.METRICS, *counts.METRICS, *conditions.METRICS, *effects.METRICS]
    assert len(METRICS) == len(every)
    for protocol in PROTOCOLS.values():
        for metric in protocol.metrics:
            assert metric.compute is METRICS[metric.key].compute


def test_what_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match=r"no metric 'w3'.*'w2'|no metric 'w3'.*'w1'"):
        choose_metrics("w2", "w3")
    assert find_protocol(CellsProtocol).id == "distribution-v2"
    assert find_protocol(PerturbationProtocol).id == "perturbation-v4"
    assert find_protocol(TimePointProtocol).id == "time-point-v2"
    with pytest.raises(
        UserError, match=r"no protocol 'distribution-v9' for this question\. Did you mean 'distribution-v2'"
    ):
        find_protocol(CellsProtocol, "distribution-v9")
    with pytest.raises(UserError, match="no protocol 'distribution-v2' for this question"):
        find_protocol(PerturbationProtocol, "distribution-v2")
