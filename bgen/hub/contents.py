"""What the files of a model directory must hold before a model is built of them.

Whoever wrote them: nothing larger than the files themselves is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from bgen.config.flow import LogCountsConfig, MemberSizes, SampleConfig
from bgen.config.section import Section
from bgen.errors import MOST_COUNTS, UserError

Read = TypeVar("Read", bound=BaseModel)
Made = TypeVar("Made", bound=nn.Module)

MOST_JSON = 64 << 20
"""Bytes of a JSON file, at most."""

SPARE = 64
"""Tensors that building a model may make beside those that it keeps; twice as many as it keeps are always allowed."""

_FILLS = {
    *(Tensor.normal_, Tensor.uniform_),
    *(getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")),
}
"""What fills a tensor with numbers and returns it."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


class ColumnFacts(Section):
    """A column in preprocessing.json."""

    role: str
    kind: Literal["category", "number"]
    categories: list[str] = Field(default_factory=list)
    mean: Finite = 0.0
    std: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class Preprocessing(BaseModel):
    """preprocessing.json."""

    genes_sha256: str
    columns: dict[str, ColumnFacts]


class ModelConfig(BaseModel):
    """config.json; the settings of its parts are validated by their own sections. It has a VAE, or a flow without."""

    kind: Literal["vae", "flow", "annotator", "perturbation"]
    n_genes: Annotated[int, Field(gt=0)]
    covariates: list[str]
    vae: dict[str, Any] | None = None
    log_counts: LogCountsConfig | None = None
    sample: SampleConfig
    about: dict[str, Any]
    flow: dict[str, Any] = Field(default_factory=dict)
    conditions: list[str] = Field(default_factory=list)
    sets: dict[str, MemberSizes] = Field(default_factory=dict)


def read_json(path: Path) -> Any:
    """Read a JSON file of a model directory.

    Raises
    ------
    UserError
        If it cannot be read, or is too large to be one.
    """
    try:
        if path.stat().st_size > MOST_JSON:
            raise UserError(f"{path} is damaged: it has {path.stat().st_size:,} bytes. Export the model again.")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {str(error)[:200]}. Export the model again.") from None


def validated(tree: Any, kind: type[Read], path: Path) -> Read:
    """Return what a file holds as a typed record; UserError names the first key that is wrong."""
    try:
        return kind.model_validate(tree)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise UserError(f"{path} is damaged: it is nested too deeply. Export the model again.") from None
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is damaged: {where}: {first['msg']}. Export the model again.") from None


def read_combinations(path: Path, columns: Mapping[str, ColumnFacts]) -> pd.DataFrame:
    """Read conditions.csv: codes or numbers of known columns, and how many cells had each combination.

    Raises
    ------
    UserError
        If it cannot be read, or a column or value of it is wrong.
    """
    try:
        table = pd.read_csv(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    except Exception as error:  # whatever pandas says of a damaged file
        raise UserError(f"{path} is damaged: {str(error)[:200]}. Export the model again.") from None
    problem = _problem(table, columns)
    if problem:
        raise UserError(f"{path} is damaged: {problem}. Export the model again.")
    return table


def _problem(table: pd.DataFrame, columns: Mapping[str, ColumnFacts]) -> str:
    if "cells" not in table or table.empty:
        return "it has no column 'cells', or no row"
    for name in table.columns:
        values = table[name]
        if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
            if values.notna().any():
                return f"'{name}' holds no numbers"
            continue
        numbers = values.to_numpy(np.float64)
        if name == "cells":
            if not (np.isfinite(numbers) & (numbers >= 0)).all() or not numbers.sum() > 0:
                return "'cells' holds no numbers of cells"
        elif name not in columns:
            return f"'{name}' is no column of the model"
        elif np.isinf(numbers).any():
            return f"'{name}' is infinite"
        elif columns[name].kind == "category":
            codes = numbers[~np.isnan(numbers)]
            if not ((codes == np.rint(codes)) & (codes >= -1) & (codes < len(columns[name].categories))).all():
                return f"'{name}' holds codes of no category"
    return ""


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a safetensors file, from its header."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def build_like(make: Callable[[], Made], shapes: Mapping[str, tuple[int, ...]]) -> Made:
    """Build a module after a check, without memory, that its tensors have the shapes of the file.

    Raises
    ------
    ValueError
        If its settings ask for other tensors, or for more of them.
    """
    with at_most(3 * len(shapes) + SPARE, None):
        try:
            with without_memory():
                wanted = {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}
        except RuntimeError:  # a part that reads a number as it is made, which takes memory
            wanted = None
    if wanted is not None and wanted != dict(shapes):
        name = next(name for name in [*wanted, *shapes] if wanted.get(name) != shapes.get(name))
        raise ValueError(f"{name} has the shape {shapes.get(name)}, where the settings say {wanted.get(name)}")
    if wanted is not None:
        return make()
    total = sum(int(np.prod(shape, dtype=object)) for shape in shapes.values())
    with at_most(3 * len(shapes) + SPARE, total):
        return make()


@contextmanager
def without_memory() -> Iterator[None]:
    """Within this, what is made of tensors has shapes and no values (device meta), and nothing is drawn for them."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """Leaves out what fills tensors: where they have no memory, torch loads its compiler for that, in two seconds."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if function in _FILLS:
            return arguments[0] if arguments else options["tensor"]
        return function(*arguments, **options)


@contextmanager
def at_most(tensors: int, numbers: int | None) -> Iterator[None]:
    """Let modules register so many parameters and buffers, each of so many numbers, at most; ValueError beyond."""
    done = 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal done
        done += 1
        if done > tensors:
            raise ValueError("the settings ask for more tensors than the weights are")
        if numbers is not None and tensor is not None and tensor.numel() > numbers and tensor.device.type != "meta":
            raise ValueError(f"the settings ask for {tensor.numel():,} numbers in one tensor")

    handles = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_sound(state: Mapping[str, Tensor]) -> None:
    """Check weights and statistics that were read: finite, and statistics that can be used.

    Raises
    ------
    ValueError
        Naming the tensor.
    """
    for name, tensor in state.items():
        last = name.rpartition(".")[2]
        if last == "log_library_range":
            low, high = tensor.double().tolist()
            limit = float(np.log(MOST_COUNTS))
            if not low <= high or not (high <= limit or np.isinf(high)) or not low < limit:
                raise ValueError(f"{name} is no range of log counts ({low:g} to {high:g})")
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinite numbers")
        elif last == "latent_std" and not bool((tensor > 0).all()):
            raise ValueError(f"{name} is not positive")
