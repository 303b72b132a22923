"""What ``bgen bench loader`` shows: a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

COLOURS = {"bgen": "#1b6ca8", "annbatch": "#d97b29"}
OTHER = "#9aa5ad"


def name_of(row: dict[str, Any]) -> str:
    """Return the name of a row: loader, and the profile of a bgen store."""
    return f"bgen {row['path']}" if row["loader"] == "bgen" else str(row["loader"])


def show(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the table."""
    machine = result["machine"]
    random = ", ".join(f"{types:.1f} at {batch}" for batch, types in result["random_types"].items())
    table = Table(
        title=_atlas(result),
        caption=f"{machine['cpu']}, {machine['cores']} cores; medians of {result['repetitions']} repetitions of"
        f" {result['seconds']:g} s; types per batch at random: {random}; write: from"
        f" h5ad, by bgen with 2 processes, its check included; x: cells per CPU-second over the peer's; CPU over"
        " csr: CPU time of a cell of trajectories over that of bgen's csr",
    )
    columns = (
        "loader batch form threads cells/s per_CPU-s B/cell write_s private_MB first_s types x_annbatch x_cellstream"
        " CPU_over_csr"
    )
    for column in columns.split():
        table.add_column(column.replace("_", " "), justify="left" if column in ("loader", "form") else "right")
    for row in result["rows"]:
        ratios = [row.get(f"cpu_over_{peer}") for peer in ("annbatch", "cellstream")]
        table.add_row(
            name_of(row),
            str(row["batch"]),
            row["form"],
            str(row["threads"]),
            f"{row['wall_rate']:,.0f}",
            f"{row['cpu_rate']:,.0f}",
            f"{row['bytes_per_cell']:,.0f}",
            f"{row['write_s']:.0f}" if row.get("write_s") else "",
            f"{row['private_mb']:,.0f}",
            f"{row['first_batch_s']:.2f}",
            f"{row['types']:.1f}" if row.get("types") else "",
            *(f"{ratio:.2f}" if ratio else "" for ratio in ratios),
            f"{row['cpu_per_cell_over_csr']:.2f}" if "cpu_per_cell_over_csr" in row else "",
            style="bold" if row["loader"] == "bgen" else None,
        )
    (console or Console(width=140)).print(table)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw cells per CPU-second by form at the first batch size, and bytes per cell."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = result["rows"][0]["batch"]
    rows = [row for row in result["rows"] if row["batch"] == first and row["threads"] == 1]
    groups = [[row for row in rows if (row["form"] == "dense") == dense] for dense in (False, True)]
    sizes = list({name_of(row): row for row in rows}.values())
    figure = Figure(figsize=(11, 1.8 + 0.34 * (len(rows) + 2)), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(1, 2, width_ratios=(3, 2))
    left, right = halves
    axes = left.subplots(2, 1, height_ratios=[max(1, len(group)) for group in groups])
    for group, axis, title in zip(groups, axes, ("sparse batches", "dense batches"), strict=True):
        group = sorted(group, key=lambda row: row["cpu_rate"])
        labels = [name_of(row) + (f" ({row['form']})" if row["loader"] == "bgen" else "") for row in group]
        _bars(axis, labels, [row["cpu_rate"] / 1000 for row in group], group, "{:,.0f}k")
        axis.set_title(f"Thousand cells per CPU-second, {title} of {first}", loc="left", fontsize=10)
    axis = right.subplots()
    sizes.sort(key=lambda row: -row["bytes_per_cell"])
    _bars(axis, [name_of(row) for row in sizes], [row["bytes_per_cell"] / 1000 for row in sizes], sizes, "{:.2f} kB")
    axis.set_title("Kilobytes per cell on disk", loc="left", fontsize=10)
    figure.suptitle(f"{_atlas(result)}; {result['machine']['cpu']}, {result['date'][:10]}", fontsize=9)
    figure.savefig(path, dpi=130)


def _atlas(result: dict[str, Any]) -> str:
    atlas = result["atlas"]
    return f"{atlas['cells']:,} cells x {atlas['genes']:,} genes, {atlas['nonzeros_per_cell']:,.0f} non-zeros a cell"


def _bars(axis: Any, labels: list[str], values: list[float], rows: list[dict[str, Any]], style: str) -> None:
    places = range(len(values))
    bars = axis.barh(places, values, color=[COLOURS.get(row["loader"], OTHER) for row in rows], height=0.7)
    axis.bar_label(bars, [style.format(value) for value in values], padding=3, fontsize=8)
    axis.set_yticks(places, labels, fontsize=9)
    axis.set_xlim(0, max(values, default=1) * 1.18)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", labelsize=8)
