"""The exported model directory: safetensors, JSON and CSV, no pickle; loads anywhere.

::

    model/
      config.json          kind of model, its settings and sizes, where it comes from
      model.safetensors    weights, whitening statistics
      genes.csv            gene ids and symbols in the model's order
      preprocessing.json   columns: role, categories or mean and standard deviation; normalisation of the input
      conditions.csv       combinations of conditions and covariates in the training cells, and how many cells had each
      gene_vectors.safetensors   how genes that training never saw are known, if the model has vectors of genes
      metrics.json         scores, once the model was evaluated
      README.md            model card
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import stat
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bgen.config.flow import FlowConfig, SampleConfig
from bgen.config.vae import VAEConfig
from bgen.errors import UserError, nearest
from bgen.files import require_local, write_result
from bgen.genes.table import NAME, hash_genes, read_genes, write_genes
from bgen.hub.about import About, read_about
from bgen.hub.addresses import fetch, is_address
from bgen.hub.card import model_card
from bgen.hub.contents import (
    ModelConfig,
    Preprocessing,
    build_like,
    read_combinations,
    read_json,
    read_shapes,
    require_sound,
    validated,
)
from bgen.hub.told import require_told
from bgen.hub.vectors import FILE as VECTORS
from bgen.hub.vectors import read_maps, write_maps
from bgen.models.annotator import Annotator
from bgen.models.codec import CountsCodec
from bgen.models.generators.average_effects import AverageEffects
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.log_counts import LogCounts
from bgen.models.vae.gene_table import GeneTable
from bgen.models.vae.vae import VAE
from bgen.nn.precision import Precision, computing
from bgen.order.groups import parts
from bgen.version import __version__

Found = TypeVar("Found")
Module = VAE | LatentFlow | Annotator
KINDS: dict[type, str] = {VAE: "vae", LatentFlow: "flow", Annotator: "annotator"}
"""Kinds of model, as config.json names them."""

LEFT_OUT: dict[str, Any] = {
    "vae": True,
    "members": {"network", "sets", "vectors"},
    "space": True,
    "log_counts": True,
}
"""Settings of a flow that a model directory does not repeat: files of whoever trained it, and its codec, which stands
by itself.
"""

FORMAT = 1
FILES = ("config.json", "model.safetensors", "genes.csv", "preprocessing.json", "conditions.csv")


@dataclass(frozen=True)
class ColumnInfo:
    """A column that the model knows.

    Attributes
    ----------
    role
        Its role in bgen (cell_type, batch, time, ...), or its own name.
    kind
        "category" or "number".
    categories
        Names in the order of the codes.
    mean, std
        Of a number, over the training cells.
    """

    role: str
    kind: Literal["category", "number"]
    categories: list[str] = field(default_factory=list)
    mean: float = 0.0
    std: float = 1.0


@dataclass(eq=False)
class SavedModel:
    """A model with everything that is needed to use it.

    Attributes
    ----------
    module
        One of :data:`KINDS`, in evaluation mode.
    genes
        Gene table (see :mod:`bgen.genes.table`).
    columns
        Conditions and covariates by column name.
    combinations
        A column per condition and covariate (codes or numbers), and ``cells``: how many training cells had the
        combination.
    sample
        Defaults of generation.
    about
        Organism, units, where the model comes from.
    metrics
        Scores of the evaluation, if there was one.
    precision
        What the network computes in when a user asks; not written into a directory.
    """

    module: Module
    genes: pd.DataFrame
    columns: dict[str, ColumnInfo]
    combinations: pd.DataFrame
    sample: SampleConfig
    about: About
    metrics: dict[str, Any] | None = None
    precision: Precision = "float32"

    @property
    def codec(self) -> CountsCodec:
        """What stands between counts and states."""
        codec = self.module if isinstance(self.module, VAE) else self.module.vae
        assert isinstance(codec, CountsCodec), "no other codec is exported"
        return codec

    @property
    def vae(self) -> VAE:
        """The autoencoder; UserError if there is none."""
        return self.require_vae()

    def require_vae(self) -> VAE:
        """Return the autoencoder; UserError if the model's flow does without one."""
        codec = self.codec
        if not isinstance(codec, VAE):
            raise UserError(
                "This model has no latent space: its flow runs on the log counts of all genes (flow.space=log_counts),"
                " so it generates cells and predicts them, but does not embed, annotate, denoise or integrate any. Take"
                " a VAE, or a flow on one."
            )
        return codec

    @property
    def device(self) -> torch.device:
        """Where the module is: what it is given must be there, and what it returns is."""
        return self.codec.device

    def to(self, device: torch.device) -> SavedModel:
        """Return the model on a device: itself if it is there, else a copy."""
        return self if self.device == device else replace(self, module=copy.deepcopy(self.module).to(device))

    def computing(self) -> AbstractContextManager[object]:
        """Within this, encoder and flow compute in :attr:`precision`; see :mod:`bgen.nn.precision`."""
        return computing(self.device, self.precision)

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`."""
        return KINDS[type(self.module)]

    def column_name(self, name: str) -> str:
        """Return the column that ``name``, a column or a role, means; UserError names the nearest."""
        if name in self.columns:
            return name
        for column, info in self.columns.items():
            if info.role == name:
                return column
        roles = [info.role for info in self.columns.values()]
        raise UserError(f"The model has no condition '{name}'.{nearest(name, [*self.columns, *roles])}")

    def fingerprint(self) -> str:
        """Return the SHA-256 of the weights, which tells this model from every other one."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(_bytes(tensor))
        return digest.hexdigest()


def save_model(model: SavedModel, folder: Path, replace: bool = False) -> None:
    """Write a model directory, whole or not at all.

    Parameters
    ----------
    replace
        Put it in place of one that is there; that one is not lost if the new one cannot be written.

    Raises
    ------
    UserError
        If ``folder`` is there and not empty (unless ``replace``), or cannot be written.
    """
    require_local(folder)
    if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty. Choose another folder, or remove it first.")
    own = uuid.uuid4().hex[:8]
    partial, old = (folder.with_name(f".{folder.name}.{own}.{what}") for what in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
        _write_files(model, partial)
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The model {folder} cannot be written: {error}. Is the disk full?") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_files(model: SavedModel, partial: Path) -> None:
    """Write the files of a model into a folder."""
    codec = model.codec
    config: dict[str, Any] = {
        "format": "bgen-model",
        "format_version": FORMAT,
        "bgen": __version__,
        "kind": model.kind,
        "n_genes": codec.n_genes,
        "covariates": list(codec.covariates),
        **_codec_settings(codec),
        "sample": model.sample.model_dump(mode="json"),
        "about": model.about.as_json(),
    }
    if isinstance(model.module, LatentFlow):
        config["flow"] = model.module.config.model_dump(mode="json", exclude=LEFT_OUT)
        config["conditions"] = model.module.conditions.names
        sets = model.module.conditions.member_embeddings
        config["sets"] = {name: embedding.sizes.model_dump(mode="json") for name, embedding in sets.items()}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.module.state_dict().items()}
    save_file(state, partial / "model.safetensors")
    write_genes(model.genes, partial)
    readable = (partial / NAME).stat().st_mode  # as the umask says; safetensors writes for its owner alone
    write_maps({half: table.map for half, table in _vector_tables(codec).items() if table.map is not None}, partial)
    for name in ("model.safetensors", VECTORS):
        if (partial / name).exists():
            (partial / name).chmod(stat.S_IMODE(readable))
    model.combinations.to_csv(partial / "conditions.csv", index=False)
    preprocessing = {
        "input": "raw integer counts",
        "normalisation": "log1p of counts per 10,000, inside the model",
        "genes_sha256": hash_genes(model.genes["id"].tolist()),
        "columns": {name: asdict(info) for name, info in model.columns.items()},
    }
    _write_json(partial / "preprocessing.json", preprocessing)
    if model.metrics is not None:
        _write_json(partial / "metrics.json", model.metrics)
    _write_json(partial / "config.json", config)
    (partial / "README.md").write_text(model_card(config, model.about, preprocessing, model.metrics), encoding="utf-8")


def _codec_settings(codec: CountsCodec) -> dict[str, Any]:
    """Return the settings of a codec, under its kind."""
    if isinstance(codec, LogCounts):
        return {"log_counts": codec.config.model_dump(mode="json")}
    assert isinstance(codec, VAE), "there is no other"
    return {"vae": codec.config.exported().model_dump(mode="json")}


def add_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Put the scores of an evaluation into a model directory and its card."""
    _write_json(folder / "metrics.json", metrics)
    config, preprocessing = read_json(folder / "config.json"), read_json(folder / "preprocessing.json")
    about = read_about(config["about"], folder / "config.json")
    write_result(folder / "README.md", model_card(config, about, preprocessing, metrics))


def update_about(folder: Path, about: About) -> None:
    """Change what a model directory says of its model, and its card."""
    config, preprocessing = read_json(folder / "config.json"), read_json(folder / "preprocessing.json")
    metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
    config["about"] = about.as_json()
    _write_json(folder / "config.json", config)
    write_result(folder / "README.md", model_card(config, about, preprocessing, metrics))


def load_directory(folder: str | Path, device: torch.device | str = "cpu") -> SavedModel:
    """Load a model directory, or one at a hub or in a registry (:mod:`bgen.hub.addresses`), onto a device.

    Raises
    ------
    UserError
        If it is not one, is incomplete or damaged, or comes from a newer bgen.
    """
    folder = fetch(folder) if is_address(folder) else Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no model directory at {folder}. `bgen export` writes one.")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is not a model directory: {', '.join(missing)} is missing. `bgen export` writes one."
        )
    config, preprocessing = _read_settings(folder)
    columns = {name: ColumnInfo(**facts.model_dump()) for name, facts in preprocessing.columns.items()}
    about = read_about(config.about, folder / "config.json")
    try:
        genes = read_genes(folder)
        same = hash_genes(genes["id"].tolist()) == preprocessing.genes_sha256 and len(genes) == config.n_genes
    except Exception as error:  # whatever pandas says of a damaged file
        raise UserError(f"{folder / 'genes.csv'} is damaged: {str(error)[:200]}. Export the model again.") from None
    if not same:
        raise UserError(f"{folder / 'genes.csv'} is not the gene table that the model was exported with.")
    weights = folder / "model.safetensors"
    try:
        module = build_like(lambda: _build(config, about, columns), read_shapes(weights))
        state = load_file(weights, device="cpu")
        require_sound(state)
        module.load_state_dict(state)
        if isinstance(module, LatentFlow):
            told = next(iter(module.conditions.set_names), None)
            require_told(module, about.perturbation, len(columns[told].categories) if told else 0)
        tables = _vector_tables(module if isinstance(module, VAE) else module.vae)
        for half, of in read_maps(folder, {half: table.vectors.shape[1] for half, table in tables.items()}).items():
            tables[half].map = of
    except UserError:
        raise
    except Exception as error:  # whatever a damaged model makes of the code that builds it
        said = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{folder} is damaged: {said[0][:200]}. Export the model again.") from None
    metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
    return SavedModel(
        module=module.to(device).eval(),
        genes=genes,
        columns=columns,
        combinations=read_combinations(folder / "conditions.csv", preprocessing.columns),
        sample=config.sample,
        about=about,
        metrics=metrics if isinstance(metrics, dict) else None,
    )


def _read_settings(folder: Path) -> tuple[ModelConfig, Preprocessing]:
    """Read what a model directory says of the model, whose columns are all there."""
    tree = read_json(folder / "config.json")
    if not isinstance(tree, dict) or tree.get("format") != "bgen-model" or tree.get("format_version") != FORMAT:
        found = tree if isinstance(tree, dict) else {}
        raise UserError(
            f"{folder / 'config.json'} describes format {found.get('format')} {found.get('format_version')};"
            f" this bgen ({__version__}) reads bgen-model {FORMAT}."
        )
    config = validated(tree, ModelConfig, folder / "config.json")
    if config.kind == "perturbation":
        raise UserError(
            f"{folder} is a perturbation model of an early bgen, which this one ({__version__}) does not read: train it"
            " again with `bgen finetune MODEL screen.h5ad --task perturb`."
        )
    preprocessing = validated(read_json(folder / "preprocessing.json"), Preprocessing, folder / "preprocessing.json")
    amounts = [sizes.amount for sizes in config.sets.values() if sizes.amount is not None]
    named = [*config.covariates, *config.conditions, *config.sets, *amounts]
    if unknown := [name for name in named if name not in preprocessing.columns]:
        raise UserError(f"{folder} is damaged: preprocessing.json has no column '{unknown[0]}'. Export it again.")
    return config, preprocessing


def read_vae_settings(folder: Path) -> tuple[VAEConfig, int, dict[str, int]]:
    """Return the settings of the VAE in a model directory, its genes and its covariates' categories; no weights.

    Raises
    ------
    UserError
        If it is no model directory, or its model has no VAE.
    """
    config, preprocessing = _read_settings(folder)
    if config.vae is None:
        raise UserError(f"The model in {folder} has no VAE.")
    covariates = {name: len(preprocessing.columns[name].categories) for name in config.covariates}
    return validated(config.vae, VAEConfig, folder / "config.json"), config.n_genes, covariates


def count_combinations(columns: Mapping[str, NDArray[Any]], limit: int = 65_536, seed: int = 0) -> pd.DataFrame:
    """Return the distinct combinations of columns ``[n_cells]`` and how many cells have each, most frequent first.

    If there are more than ``limit`` (a number measured per cell), a seeded sample of cells is taken instead.
    """
    n = len(next(iter(columns.values()))) if columns else 0
    if not columns:
        return pd.DataFrame({"cells": [1]})
    counted: pd.Series | None = None
    for part in parts(n):  # a table of all cells takes more than their columns
        some = pd.DataFrame({name: values[part] for name, values in columns.items()}).value_counts(dropna=False)
        if counted is not None:
            both = pd.concat([counted, some]).groupby(level=list(range(len(columns))), dropna=False).sum()
            some = both.sort_values(ascending=False)
        counted = some
        if len(counted) > limit:
            break
    if counted is not None and len(counted) <= limit:
        return counted.rename("cells").reset_index()
    picked = np.sort(np.random.default_rng(seed).choice(n, limit, replace=False))
    return pd.DataFrame({name: values[picked] for name, values in columns.items()}).assign(cells=1)


def _build(config: ModelConfig, about: About, columns: Mapping[str, ColumnInfo]) -> Module:
    codec: VAE | LogCounts
    if config.log_counts is not None and config.kind == "flow":
        codec = LogCounts(config.log_counts, config.n_genes)
    else:
        covariates = {name: len(columns[name].categories) for name in config.covariates}
        codec = VAE(VAEConfig.model_validate(_given(config.vae, "vae")), config.n_genes, covariates)
        if config.kind == "vae":
            return codec
        if config.kind == "annotator":
            return Annotator(codec, torch.ones(len(_given(about.annotation, "about.annotation").labels)))
    of_sets = {*config.sets, *(sizes.amount for sizes in config.sets.values())}
    conditions = {name: columns[name] for name in config.conditions if name not in of_sets}
    flow = LatentFlow(
        FlowConfig.model_validate(config.flow),
        codec,
        {name: len(info.categories) for name, info in conditions.items() if info.kind == "category"},
        {name: (info.mean, info.std) for name, info in conditions.items() if info.kind == "number"},
        config.sets,
    )
    facts = about.perturbation
    if facts is not None and facts.effects:
        flow.averages = AverageEffects.empty(
            len(facts.effects),
            codec.n_genes,
            contexts=len(facts.contexts),
            own=facts.own,
            features=facts.pooling.features,
            directions=facts.pooling.directions,
            regulators=facts.network.components if facts.network else 0,
        )
    return flow


def _given(found: Found | None, name: str) -> Found:
    if found is None:
        raise KeyError(name)
    return found


def parameters(module: nn.Module) -> int:
    """Return how many parameters a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


def _vector_tables(codec: nn.Module) -> dict[str, GeneTable]:
    return codec.vector_tables if isinstance(codec, VAE) else {}


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().reshape(-1).contiguous()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _write_json(path: Path, tree: Any) -> None:
    write_result(path, json.dumps(tree, indent=1, allow_nan=False) + "\n")
