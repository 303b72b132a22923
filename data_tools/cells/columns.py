"""Columns of obs of very many cells: codes of the smallest type and numbers, in files without a name.

Axes: N cells of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.order.groups import TEXTS as TEXTS_AT_ONCE
from bgen.order.groups import parts
from bgen.store.format.columns import whole_as_text
from data_tools.cells.mapped import chosen, fill, room
from data_tools.cells.texts import Texts

TEXTS = "texts"
"""Attribute of a frame: the names of its columns that were texts, and are categories in their order now."""


class Table(Protocol):
    """Columns by name: a DataFrame, or the columns that files have in common."""

    @property
    def columns(self) -> Any:
        """Their names."""

    @property
    def index(self) -> pd.Index:
        """Names or numbers of the cells."""

    def __len__(self) -> int: ...
    def __contains__(self, name: Any, /) -> bool: ...
    def __getitem__(self, name: Any, /) -> pd.Series: ...
    def assign(self, **changed: Any) -> Any:
        """Return them with some columns replaced or added."""


class Joined:
    """The columns of the obs of several files, over the cells that are kept.

    A column is what ``pd.concat`` makes of it, except that texts are categories in the order of the texts.

    Parameters
    ----------
    every
        Take columns that some files do not have, too: their cells have no value. Otherwise those that all files have.
    """

    def __init__(
        self, frames: Sequence[pd.DataFrame], keeps: Sequence[NDArray[np.bool_]], *, every: bool = False
    ) -> None:
        self._frames, self._keeps, self._every = frames, keeps, every
        self._n = sum(int(np.count_nonzero(keep)) for keep in keeps)
        names = dict.fromkeys(name for frame in frames for name in frame)
        self.columns = [name for name in names if every or all(name in frame for frame in frames)]
        self._made: dict[Any, pd.Series] = {}

    @property
    def index(self) -> pd.Index:
        """Numbers of the cells."""
        return pd.RangeIndex(self._n)

    def __len__(self) -> int:
        return self._n

    def __contains__(self, name: Any) -> bool:
        return name in self.columns

    def __getitem__(self, name: Any) -> pd.Series:
        if name not in self.columns:
            raise KeyError(name)
        if name not in self._made:
            self._made[name] = pd.Series(self._join(name), index=self.index, name=name, copy=False)
        return self._made[name]

    def assign(self, **changed: Any) -> Joined:
        """Return the columns with some replaced or added."""
        other = Joined(self._frames, self._keeps, every=self._every)
        other.columns = [*self.columns, *(name for name in changed if name not in self.columns)]
        other._made = self._made | {
            name: pd.Series(values, index=self.index, name=name, copy=False) for name, values in changed.items()
        }
        return other

    def _join(self, name: Any) -> Any:
        columns = [frame[name].array if name in frame else None for frame in self._frames]
        dtypes = [column.dtype for column in columns if column is not None]
        gaps = len(dtypes) < len(columns)
        if len(columns) == 1:
            return self._of_one(columns[0])
        plain = all(isinstance(dtype, np.dtype) for dtype in dtypes)
        mixed = len(set(dtypes)) > 1 and not self._every and not all(keep.any() for keep in self._keeps)
        if (
            plain
            and not mixed
            and (all(d.kind in "iuf" for d in dtypes) or (set(dtypes) == {np.dtype(bool)} and not gaps))
        ):
            kind = np.result_type(*dtypes)
            return self._fill(columns, np.dtype(np.float64) if gaps and kind.kind != "f" else kind)
        if all(isinstance(dtype, pd.CategoricalDtype) for dtype in dtypes):
            texts = [name in frame.attrs.get(TEXTS, ()) for frame in self._frames if name in frame]
            if len(set(dtypes)) == 1 and (not any(texts) or len(dtypes) == 1):
                return self._recode(columns, dtypes[0])
            if all(pd.api.types.infer_dtype(dtype.categories) in ("string", "empty") for dtype in dtypes):
                distinct = sorted({text for dtype in dtypes for text in dtype.categories})
                return self._recode(columns, pd.CategoricalDtype(pd.Index(distinct, dtype=object)))
        frames = [
            pd.DataFrame({} if column is None else {0: column}, index=pd.RangeIndex(len(keep)))
            for column, keep in zip(columns, self._keeps, strict=True)
        ]
        if self._every:
            return pd.concat(frames)[0].array[np.concatenate(self._keeps)]
        return pd.concat([frame.loc[keep] for frame, keep in zip(frames, self._keeps, strict=True)])[0].array

    def _of_one(self, column: Any) -> Any:
        keep = self._keeps[0]
        if isinstance(column.dtype, pd.CategoricalDtype):
            return pd.Categorical.from_codes(chosen(column.codes, keep), dtype=column.dtype)
        if isinstance(column.dtype, np.dtype) and column.dtype.kind in "biuf":
            return chosen(np.asarray(column), keep)
        return column if keep.all() else column[keep]

    def _recode(self, columns: Sequence[Any], dtype: pd.CategoricalDtype) -> pd.Categorical:
        kind = code_type(len(dtype.categories))
        tables = [
            None if column is None else np.append(dtype.categories.get_indexer(column.categories), -1).astype(kind)
            for column in columns
        ]  # code -1 is the last entry
        return pd.Categorical.from_codes(self._fill(columns, kind, tables), dtype=dtype)

    def _fill(self, columns: Sequence[Any], dtype: np.dtype[Any], tables: Sequence[Any] = ()) -> NDArray[Any]:
        """Write columns one after another: numbers, or codes that a table makes others of; NaN and -1 for none."""
        out, at = room(self._n, dtype), 0
        for number, (column, keep) in enumerate(zip(columns, self._keeps, strict=True)):
            for part in parts(len(keep)):
                there = keep[part]
                here = slice(at, at + int(np.count_nonzero(there)))
                if column is None:
                    out[here] = -1 if tables else np.nan
                elif tables:
                    out[here] = tables[number][column.codes[part][there]]
                else:
                    out[here] = np.asarray(column[part])[there]
                at = here.stop
        return out


def code_type(n: int) -> np.dtype[Any]:
    """Return the type that pandas has codes of so many categories in."""
    return np.dtype(next(kind for kind in (np.int8, np.int16, np.int32, np.int64) if n < np.iinfo(kind).max))


def compact(obs: pd.DataFrame, names: Texts) -> pd.DataFrame:
    """Return obs without names, which are added to ``names``, its columns in files where that is possible."""
    for part in parts(len(obs), TEXTS_AT_ONCE):
        names.append(obs.index[part].to_numpy(object))
    found: dict[Any, Any] = {}
    texts = set()
    if not obs.columns.is_unique:
        return obs.set_axis(pd.RangeIndex(len(obs)))
    for name in list(obs.columns):
        column = obs[name].array
        if isinstance(column.dtype, pd.CategoricalDtype):
            codes = column.codes
            found[name] = pd.Categorical.from_codes(
                fill(len(codes), codes.dtype, codes.__getitem__), dtype=column.dtype
            )
        elif isinstance(column.dtype, np.dtype) and column.dtype.kind in "biuf":
            values = np.asarray(column)
            found[name] = fill(len(values), values.dtype, values.__getitem__)
        elif column.dtype == object and pd.api.types.infer_dtype(column, skipna=False) == "string":
            found[name] = categories_of(len(column), (np.asarray(column[part], object) for part in parts(len(column))))
            texts.add(name)
        else:
            found[name] = column
    return frame_of(found, len(obs), texts)


def frame_of(columns: dict[Any, Any], n: int, texts: set[Any]) -> pd.DataFrame:
    """Return columns as a frame that shares memory with them; those named in ``texts`` were texts."""
    frame = pd.DataFrame(columns, index=pd.RangeIndex(n), copy=False)
    frame.attrs[TEXTS] = texts
    return frame


def categories_of(n: int, texts: Iterator[NDArray[Any]]) -> pd.Categorical[Any]:
    """Return ``n`` texts, given in parts, as categories in their order."""
    numbers: dict[str, int] = {}
    codes, at = room(n, np.int32), 0
    for some in texts:
        code, distinct = pd.factorize(some)
        table = np.array([numbers.setdefault(text, len(numbers)) for text in distinct], np.int32)
        codes[at : at + len(some)] = table[code]
        at += len(some)
    known = np.empty(len(numbers), object)
    known[:] = list(numbers)
    order = np.argsort(known)
    rank = np.empty(len(order), code_type(len(order)))
    rank[order] = np.arange(len(order))
    small = fill(n, rank.dtype, lambda part: rank[codes[part]])
    return pd.Categorical.from_codes(small, dtype=pd.CategoricalDtype(pd.Index(known[order], dtype=object)))


def read_stored(group: Any, names: Texts, require: Callable[[pd.Index], None]) -> pd.DataFrame | None:
    """Read obs from a group that anndata wrote, as :func:`compact` gives it, a part of the cells at a time.

    Parameters
    ----------
    require
        Refuses names that no store can hold.

    Returns
    -------
    pd.DataFrame | None
        None, and nothing is read, where the group is an unusual one.
    """
    attributes = dict(group.attrs)
    if (attributes.get("encoding-type"), attributes.get("encoding-version")) != ("dataframe", "0.2.0"):
        return None
    order, key = [str(name) for name in attributes.get("column-order", ())], attributes.get("_index")
    if key not in group or len(set(order)) < len(order) or any(name not in group for name in order):
        return None
    if (n := _length(index := group[key])) is None or dict(index.attrs).get("encoding-type") != "string-array":
        return None
    kinds = {name: dict(group[name].attrs).get("encoding-type") for name in order}
    for name, kind in kinds.items():
        item = group[name]
        if kind == "categorical" and ("codes" not in item or "categories" not in item or "ordered" not in item.attrs):
            return None
        known = kind in ("array", "string-array", "categorical")
        if known and _length(item["codes"] if kind == "categorical" else item) != n:
            return None
    for part in parts(n, TEXTS_AT_ONCE):
        some = index.asstr()[part]
        require(pd.Index(some))
        names.append(some)
    found: dict[Any, Any] = {}
    texts = set()
    for name, kind in kinds.items():
        item = group[name]
        if kind == "categorical":
            codes = item["codes"]
            found[name] = pd.Categorical.from_codes(
                fill(n, codes.dtype, codes.__getitem__),
                categories=anndata.io.read_elem(item["categories"]),
                ordered=bool(item.attrs["ordered"]),
            )
        elif kind == "array" and item.dtype.kind in "biuf":
            found[name] = fill(n, item.dtype, item.__getitem__)
        elif kind == "string-array":
            found[name] = categories_of(n, (item.asstr()[part] for part in parts(n, TEXTS_AT_ONCE)))
            texts.add(name)
        else:
            found[name] = pd.Series(anndata.io.read_elem(item)).array
            if len(found[name]) != n:
                raise ValueError("All arrays must be of the same length")
    return frame_of(found, n, texts)


def _length(item: Any) -> int | None:
    """Return the length of an array in one dimension."""
    shape = getattr(item, "shape", None)
    return int(shape[0]) if shape is not None and len(shape) == 1 else None


def whole_as_categories(values: pd.Series) -> pd.Series:
    """Return whole numbers as texts (:func:`bgen.store.format.columns.whole_as_text`), as categories where all are."""
    numbers = as_floats(values)
    if any(np.isnan(numbers[part]).any() for part in parts(len(numbers))):
        return whole_as_text(values)
    distinct = np.zeros(0)
    for part in parts(len(numbers)):
        distinct = np.unique(np.concatenate([distinct, numbers[part]]))
    texts, place = np.unique(np.array([str(int(number)) for number in distinct], object), return_inverse=True)
    table = place.astype(code_type(len(texts)))
    codes = fill(len(numbers), table.dtype, lambda part: table[np.searchsorted(distinct, numbers[part])])
    named = pd.Categorical.from_codes(codes, dtype=pd.CategoricalDtype(pd.Index(texts, dtype=object)))
    return pd.Series(named, index=values.index, copy=False)


def as_floats(values: pd.Series) -> NDArray[np.float64]:
    """Return numbers as float64, NaN where there is none."""
    if isinstance(values.dtype, np.dtype) and values.dtype == np.float64:
        return values.to_numpy()
    return fill(len(values), np.float64, lambda part: values.iloc[part].to_numpy(np.float64, na_value=np.nan))


def count_texts(values: pd.Series, renamed: Callable[[pd.Series], pd.Series] | None = None) -> pd.Series:
    """Return how many cells have each text, most frequent first: ``values.dropna().astype(str).value_counts()``.

    Parameters
    ----------
    renamed
        Makes other texts of them, elementwise; "" counts as none.
    """
    if not isinstance(values.dtype, pd.CategoricalDtype):
        texts = values.astype(str)[values.notna().to_numpy()]
        texts = texts if renamed is None else renamed(texts)
        return texts.value_counts()
    codes, categories = values.array.codes, values.array.categories
    sizes = np.zeros(len(categories) + 1, np.int64)
    first = np.full(len(categories) + 1, len(codes), np.int64)
    for part in parts(len(codes)):
        code = codes[part].astype(np.int64)
        code[code < 0] = len(categories)
        sizes += np.bincount(code, minlength=len(sizes))
        here = np.full(len(sizes), len(codes), np.int64)
        here[code[::-1]] = np.arange(part.stop - 1, part.start - 1, -1)  # the first one is written last
        np.minimum(first, here, out=first)
    there = np.flatnonzero(sizes[:-1])
    there = there[np.argsort(first[there])]
    texts = pd.Series(np.asarray(categories[there].astype(str), object))
    texts = texts if renamed is None else renamed(texts)
    found: dict[str, int] = {}
    for text, size in zip(texts, sizes[there].tolist(), strict=True):
        found[text] = found.get(text, 0) + size
    counted = pd.Series(np.array(list(found.values()), np.int64), index=pd.Index(list(found), dtype=object))
    return counted.sort_values(ascending=False)
