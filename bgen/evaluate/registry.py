"""All protocols by id, with how each scores and the page that it writes.

There are three kinds of question, each with its own evidence: whether generated cells look like unseen real ones,
whether predicted perturbed cells look like held-out ones, and whether a generated time point is near the real one.
Protocols of one kind take the same evidence, so any of them can replace the current one (:data:`CURRENT`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from bgen.errors import UserError, nearest
from bgen.evaluate.metrics.metric import Metric
from bgen.evaluate.protocols import distribution, perturbation, time_point
from bgen.evaluate.protocols.perturbation import HeldOut
from bgen.evaluate.protocols.perturbation_scores import PerturbationScores
from bgen.evaluate.protocols.scores import Scores
from bgen.evaluate.protocols.time_point import Pool, TimeScores
from bgen.evaluate.reports.distribution import write_report
from bgen.evaluate.reports.perturbation import write_perturbation_report


class ScoreCells(Protocol):
    """How generated cells are scored."""

    def __call__(
        self,
        train: AnnData,
        test: AnnData,
        generated: AnnData,
        *,
        cell_type: str | None = None,
        conditions: Sequence[str] = (),
        seeds: int = 3,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Scores:
        """See :func:`bgen.evaluate.protocols.distribution.evaluate`."""
        ...


class ReportCells(Protocol):
    """How the page of generated cells is written."""

    def __call__(
        self,
        path: Path,
        scores: Scores,
        train: AnnData,
        test: AnnData,
        generated: AnnData,
        *,
        seed: int = 0,
        losses: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        title: str = "How good are the generated cells?",
        provenance: Mapping[str, object] | None = None,
    ) -> Path:
        """See :func:`report_cells`."""
        ...


class ScorePerturbations(Protocol):
    """How predicted perturbations are scored."""

    def __call__(self, train: sp.csr_matrix, held_out: Sequence[HeldOut], *, seeds: int = 3) -> PerturbationScores:
        """See :func:`bgen.evaluate.protocols.perturbation.evaluate_perturbations`."""
        ...


class ReportPerturbations(Protocol):
    """How the page of predicted perturbations is written."""

    def __call__(
        self, path: Path, scores: PerturbationScores, *, provenance: Mapping[str, object] | None = None
    ) -> Path:
        """See :func:`bgen.evaluate.reports.perturbation.write_perturbation_report`."""
        ...


class ScoreTimePoint(Protocol):
    """How a generated time point is scored."""

    def __call__(
        self,
        real: NDArray[Any],
        generated: NDArray[Any],
        baselines: Mapping[str, Pool],
        *,
        seeds: int = 3,
        setting: Mapping[str, int | float | str] | None = None,
    ) -> TimeScores:
        """See :func:`bgen.evaluate.protocols.time_point.evaluate_time_point`."""
        ...


@dataclass(frozen=True)
class EvaluationProtocol:
    """What every protocol says of itself.

    Attributes
    ----------
    id
        Name with a version: a change of any figure needs a new one.
    metrics
        Its figures, in order.
    """

    id: str
    metrics: Sequence[Metric[Any]]


@dataclass(frozen=True)
class CellsProtocol(EvaluationProtocol):
    """Do generated cells look like unseen real ones?"""

    evaluate: ScoreCells
    report: ReportCells


@dataclass(frozen=True)
class PerturbationProtocol(EvaluationProtocol):
    """Do predicted perturbed cells look like held-out real ones?"""

    evaluate: ScorePerturbations
    report: ReportPerturbations


@dataclass(frozen=True)
class TimePointProtocol(EvaluationProtocol):
    """Is a generated time point near the real one? It has a table, and no page of its own."""

    evaluate: ScoreTimePoint


def report_cells(
    path: Path,
    scores: Scores,
    train: AnnData,
    test: AnnData,
    generated: AnnData,
    *,
    seed: int = 0,
    losses: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    title: str = "How good are the generated cells?",
    provenance: Mapping[str, object] | None = None,
) -> Path:
    """Write the page of generated cells beside a baseline that is drawn with ``seed``.

    The other parameters are those of :func:`bgen.evaluate.reports.distribution.write_report`.
    """
    column = scores.setting.get("cell_type")
    cell_type = column if isinstance(column, str) else None
    baseline = distribution.baseline_cells(train, test, cell_type=cell_type, seed=seed)
    return write_report(
        path, scores, train, test, generated, baseline, losses=losses, title=title, provenance=provenance
    )


PROTOCOLS: dict[str, EvaluationProtocol] = {
    protocol.id: protocol
    for protocol in (
        CellsProtocol(distribution.PROTOCOL, distribution.METRICS, distribution.evaluate, report_cells),
        PerturbationProtocol(
            perturbation.PROTOCOL,
            perturbation.METRICS,
            perturbation.evaluate_perturbations,
            write_perturbation_report,
        ),
        TimePointProtocol(time_point.PROTOCOL, time_point.METRICS, time_point.evaluate_time_point),
    )
}
"""Id to protocol."""

CURRENT: dict[type[EvaluationProtocol], str] = {
    CellsProtocol: distribution.PROTOCOL,
    PerturbationProtocol: perturbation.PROTOCOL,
    TimePointProtocol: time_point.PROTOCOL,
}
"""Kind of question to the protocol that answers it unless another is asked for."""

Kind = TypeVar("Kind", bound=EvaluationProtocol)


def find_protocol(kind: type[Kind], id: str | None = None) -> Kind:
    """Return the protocol of an id, by default the current one of its kind.

    Raises
    ------
    UserError
        If there is no such protocol of that kind.
    """
    wanted = CURRENT[kind] if id is None else id
    found = PROTOCOLS.get(wanted)
    if not isinstance(found, kind):
        there = [name for name, protocol in PROTOCOLS.items() if isinstance(protocol, kind)]
        raise UserError(f"There is no protocol '{wanted}' for this question.{nearest(wanted, there)}")
    return found
