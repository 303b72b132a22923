"""Times and doses, as numbers or as text: "day 3", "24h", "E8.5", "10 uM".

Every value of a column is understood, with its unit, or named: none is dropped.

Axes: N cells.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.cells.columns import as_floats, count_texts
from data_tools.cells.mapped import fill

Quantity = Literal["time", "dose"]

UNITS = {
    "hours": ("h", "hr", "hrs", "hour", "hours", "hpf", "hpi", "hpt"),
    "days": ("d", "day", "days", "dpf", "dpi", "dpt"),
    "minutes": ("m", "min", "mins", "minute", "minutes"),
    "seconds": ("s", "sec", "secs", "second", "seconds"),
    "weeks": ("w", "wk", "wks", "week", "weeks"),
    "months": ("mo", "month", "months"),
    "years": ("y", "yr", "yrs", "year", "years"),
}
"""Units of time and how they are written."""

SECONDS = {
    "seconds": 1.0, "minutes": 60.0, "hours": 3600.0, "days": 86400.0, "weeks": 604800.0, "months": 2629746.0,
    "years": 31556952.0,
}  # fmt: skip

SINCE = {"e": "embryonic", "p": "postnatal"}
"""Letters before a number of days: "E8.5", "P7". Days since fertilisation and since birth are not one scale."""

TIME_WORDS = ("t", "tp", "time", "timepoint", "stage")
DOSE_WORDS = ("dose", "conc", "concentration")

AMOUNTS = {
    "pM": ("molar", 1e-12), "nM": ("molar", 1e-9), "uM": ("molar", 1e-6), "mM": ("molar", 1e-3), "M": ("molar", 1.0),
    "pg/ml": ("mass", 1e-12), "ng/ml": ("mass", 1e-9), "ug/ml": ("mass", 1e-6), "mg/ml": ("mass", 1e-3),
    "Gy": ("radiation", 1.0), "mGy": ("radiation", 1e-3),
}  # fmt: skip
"""Units of dose that can be converted into each other."""

MISSING = {"", "nan", "na", "n/a", "none", "null", "<na>", "unknown"}
"""Texts, in lower case, that mean that there is no value."""

_NUMBER = r"(?P<number>[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)"
_WORD_FIRST = re.compile(rf"^(?P<word>[A-Za-z]+)(?:\s+|[\s_]*[_=:][\s_]*|-(?=\d))?{_NUMBER}\s*(?P<unit>.*)$")
_NUMBER_FIRST = re.compile(rf"^{_NUMBER}[\s_]*(?P<unit>.*)$")
_UNIT = re.compile(r"^[A-Za-z%][A-Za-z0-9%/^.\s-]*$")


def time_unit(text: str) -> str | None:
    """Return the unit in a text such as "h", "Hours" or "minutes after first cleavage", None if there is none."""
    first = re.match(r"[a-z]+", text.strip().lower())
    return next((unit for unit, written in UNITS.items() if first and first[0] in written), None)


def dose_unit(text: str) -> str:
    """Return a unit of dose as bgen writes it: "µM" and "um" are "uM"; an unknown one as it is."""
    plain = text.strip().replace("µ", "u").replace("μ", "u")  # micro sign, Greek mu
    if plain in AMOUNTS:
        return plain
    folded = {unit.lower(): unit for unit in AMOUNTS if unit != "mM"} | {"mm": "mM"}
    return folded.get(plain.lower(), plain)


@dataclass(frozen=True)
class Quantities:
    """A column of times or doses.

    Attributes
    ----------
    numbers
        float64 ``[N]``, in ``unit``; NaN where there is no value, or none that is understood.
    unit
        The unit that the texts say, None if they say none.
    read
        Distinct texts to their numbers, in the order of the numbers; empty for a column of numbers.
    wrong
        Texts that are not understood, or not in the same unit, to the number of their cells.
    missing
        bool ``[N]``: cells without a value.
    """

    numbers: NDArray[np.float64]
    unit: str | None
    read: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, int] = field(default_factory=dict)
    missing: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))

    def sentence(self, column: str) -> str:
        """Say how the texts of a column were understood."""
        shown = [f"'{text}' is {number:g}" for text, number in self.read.items()]
        some = ", ".join(shown[:4]) + (f", ... {shown[-1]}" if len(shown) > 4 else "")
        return f"The texts of obs['{column}'] are read as {self.unit or 'numbers'}: {some}."

    def complaint(self) -> str:
        """Name the texts that are not understood, with their cells."""
        some = [f"'{text}' ({n:,} cells)" for text, n in self.wrong.items()]
        return f"{', '.join(some[:4])}{', ...' if len(some) > 4 else ''}"


def read_quantities(values: pd.Series, what: Quantity, unit: str | None = None) -> Quantities:
    """Read a column of times or doses.

    Parameters
    ----------
    values
        Numbers, texts, categories, or all of them.
    unit
        The unit to give numbers in; a number without a unit is in this one. None: the unit of the texts; if they have
        several of one kind ("24h", "2d"), the smallest one. Then a number other than 0 must have a unit if another has.
    """
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        numbers = as_floats(values)
        return Quantities(numbers, None, missing=np.isnan(numbers))
    counts, missing, numbers_of = _count(values)
    parsed = {text: found for text in counts.index if (found := _parse(str(text), what)) is not None}
    units = [own for _, own in parsed.values() if own]
    wanted = (_canonical(unit, what) if unit else None) or _common(units, what)
    since = pd.Series([_since(own)[0] for own in units if _since(own)[0]], dtype=str).mode().tolist()
    read: dict[str, float] = {}
    for text, (number, own) in parsed.items():
        if own is not None and what == "time" and _since(own)[0] not in ("", *since[:1]):
            continue
        if own is None:
            if unit is not None or not units or number == 0:
                read[text] = number
        elif (factor := _factor(own, wanted, what)) is not None:
            read[text] = number * factor
    wrong = {str(text): int(n) for text, n in counts.items() if text not in read}
    read = dict(sorted(read.items(), key=lambda item: item[1]))
    numbers = numbers_of(read)
    plain = wanted if wanted is None or what == "dose" else _since(wanted)[1]
    return Quantities(numbers, plain if units or unit else None, read, wrong, missing)


def _count(
    values: pd.Series,
) -> tuple[pd.Series, NDArray[np.bool_], Callable[[dict[str, float]], NDArray[np.float64]]]:
    """Return how many cells have each text, which have none, and what looks up the numbers of all cells' texts."""
    if not isinstance(values.dtype, pd.CategoricalDtype):
        texts = values.astype(object).where(values.notna().to_numpy(), "").astype(str).str.strip()
        missing = texts.str.lower().isin(MISSING).to_numpy()
        return texts[~missing].value_counts(), missing, lambda read: np.asarray(texts.map(read), np.float64)
    codes = values.array.codes
    of_codes = pd.Series([*values.array.categories.astype(object).astype(str).str.strip(), ""], dtype=object)
    without = of_codes.str.lower().isin(MISSING).to_numpy()  # code -1 is the last entry
    counts = count_texts(values, lambda texts: texts.str.strip())
    counts = counts[~counts.index.to_series().str.lower().isin(MISSING).to_numpy()]

    def look_up(read: dict[str, float]) -> NDArray[np.float64]:
        table = np.asarray(of_codes.map(read), np.float64)
        return fill(len(codes), np.float64, lambda part: table[codes[part]])

    return counts, fill(len(codes), bool, lambda part: without[codes[part]]), look_up


def _parse(text: str, what: Quantity) -> tuple[float, str | None] | None:
    """Return number and unit of a text; embryonic days are of the unit "embryonic days"."""
    found = _NUMBER_FIRST.match(text)
    word = ""
    if found is None:
        found = _WORD_FIRST.match(text)
        if found is None:
            return None
        word = found["word"].lower()
    number, rest = float(found["number"]), found["unit"].strip(" _")
    if not np.isfinite(number):
        return None
    unit = None
    if rest:
        unit = _written_unit(rest, what)
        if unit is None:
            return None
    if word:
        named = time_unit(word) if what == "time" else None
        if what == "time" and word in SINCE and unit in (None, "days"):
            return number, f"{SINCE[word]} days"
        if named and unit is None:
            return number, named
        if word not in (TIME_WORDS if what == "time" else DOSE_WORDS):
            return None
    return number, unit


def _written_unit(text: str, what: Quantity) -> str | None:
    if what == "time":
        word = re.match(r"^[A-Za-z]+$", text)
        return time_unit(text) if word else None
    plain = dose_unit(text)
    return plain if _UNIT.match(plain) and len(plain) <= 12 else None


def _canonical(unit: str, what: Quantity) -> str:
    return (time_unit(unit) or unit.strip()) if what == "time" else dose_unit(unit)


def _since(unit: str) -> tuple[str, str]:
    """Return since when a time is counted, if that is said, and its unit."""
    for name in SINCE.values():
        if unit.startswith(f"{name} "):
            return name, unit.removeprefix(f"{name} ")
    return "", unit


def _size(unit: str, what: Quantity) -> tuple[str, float] | None:
    """Return the kind of a unit and its size, if it can be converted."""
    if what == "dose":
        return AMOUNTS.get(unit)
    since, plain = _since(unit)
    return (since or "time", SECONDS[plain]) if plain in SECONDS else None


def _common(units: list[str], what: Quantity) -> str | None:
    """Return the unit that a column is read in: the smallest one of the kind that most texts are of."""
    if not units:
        return None
    sizes = {unit: _size(unit, what) or (unit, 0.0) for unit in units}
    kind = pd.Series([sizes[unit][0] for unit in units]).value_counts().index[0]
    return min((unit for unit in units if sizes[unit][0] == kind), key=lambda unit: sizes[unit][1])


def _factor(unit: str, wanted: str | None, what: Quantity) -> float | None:
    """Return what a number in a unit is multiplied by, None if it cannot be converted."""
    if unit == wanted or wanted is None:
        return 1.0
    own, other = _size(unit, what), _size(wanted, what)
    if own is None or other is None:
        return None
    if own[0] != other[0] and not (what == "time" and other[0] == "time"):  # E8.5 may be asked for in plain days
        return None
    factor = own[1] / other[1]
    return float(round(factor)) if factor >= 1 and abs(factor - round(factor)) < 1e-9 * factor else factor
