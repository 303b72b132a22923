"""How the command line describes splits; :mod:`bgen.store.splits` draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bgen.errors import UserError
from bgen.store.splits import DEFAULT, Codes, assign, assign_groups, group_names, require_cells

__all__ = ["DEFAULT", "Codes", "assign", "assign_groups", "describe_shares", "group_names", "parse_held_out"]
__all__ += ["parse_splits", "require_cells"]


def parse_splits(text: str) -> dict[str, float]:
    """Read ``train=0.8,valid=0.1,test=0.1``.

    Raises
    ------
    UserError
        If it has another form, or the fractions do not add up to 1.
    """
    splits: dict[str, float] = {}
    for part in text.split(","):
        name, sign, value = part.strip().partition("=")
        try:
            splits[name] = float(value)
        except ValueError:
            sign = ""
        if not sign or not name or splits[name] < 0:
            raise UserError(f"'{text}' does not describe splits: write train=0.8,valid=0.1,test=0.1.")
    if abs(sum(splits.values()) - 1) > 1e-6:
        raise UserError(f"The fractions of the splits '{text}' add up to {sum(splits.values()):g}, not to 1.")
    return splits


def describe_shares(wanted: Mapping[str, float], cells: Mapping[str, int], column: str) -> list[str]:
    """Return a sentence for each split whose share of the cells is far from what was asked for.

    Parameters
    ----------
    wanted
        Split to fraction.
    cells
        Split to its cells.
    column
        Whose values are kept together.
    """
    total = sum(cells.values())
    far = {name: cells[name] / total for name in wanted if abs(cells[name] / total - wanted[name]) > 0.05}
    return [
        f"The split '{name}' has {share:.1%} of the cells, not {wanted[name]:.1%}: values of {column} are kept whole."
        for name, share in far.items()
    ]


def parse_held_out(texts: Sequence[str]) -> dict[str, list[str]]:
    """Read texts such as ``test=48,72``: split to the values of the split column that go there.

    Raises
    ------
    UserError
        If one has another form.
    """
    held_out: dict[str, list[str]] = {}
    for text in texts:
        name, sign, values = text.partition("=")
        if not sign or not name.strip() or not values.strip():
            raise UserError(f"'{text}' does not say what to hold out: write test=48,72 (split=values).")
        held_out.setdefault(name.strip(), []).extend(value.strip() for value in values.split(","))
    return held_out
