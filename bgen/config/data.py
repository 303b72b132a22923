"""Settings of what is read, from where and in what order (bgen/README.md, "Store" and "Order")."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bgen.config.section import Address, Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, Section


class TrajectoriesConfig(Section):
    """The flow is trained on trajectories of populations instead of single cells (:mod:`bgen.order.trajectories`)."""

    along: Literal["time", "perturbation"] = Field(
        "time",
        description="time: populations of one system by the store's time; perturbation: a system's control population, "
        "then its population under one perturbation, at up to `times` - 1 times if the store has several.",
    )
    system: list[str] = Field(
        default_factory=list,
        description="obs columns (roles or names) that together name a system, such as donor; none: all is one.",
    )
    times: Annotated[int, Field(ge=2)] = Field(8, description="Time points of a trajectory, T, at most.")
    cells: PositiveInt = Field(32, description="Cells drawn per time point, N.")
    pool: PositiveInt = Field(
        16_384,
        description="Cells of each lane, about, from which trajectories are drawn; twice as many are in memory. The"
        " more, the more trajectories are mixed, and the less is decoded that is not used.",
    )

    @property
    def size(self) -> int:
        """Cells of one trajectory, T N."""
        return self.times * self.cells


class WeightingConfig(Section):
    """Sampling by source: source s of n_s cells gets a share proportional to n_s^(1 / temperature)."""

    temperature: Annotated[float, Field(ge=1)] = Field(
        description="1 takes the cells as they are; the higher, the more equal the shares of large and small sources."
    )
    by: str | None = Field(None, description="Categories of this obs column (role or name); null: the input files.")


class Access(Section):
    """How stores at an address (s3://, gs://, https://) are read."""

    cache: Path | None = Field(
        None,
        description="Local folder for copies, and for numbers per cell that the processes of a machine share (also of a"
        " local store: 5 bytes a cell, and 1 to 4 for each column in use); null: bgen in the user's cache folder"
        " (XDG_CACHE_HOME).",
    )
    cache_bytes: PositiveInt = Field(20 << 30, description="Bytes of chunks that are kept there, of each store.")
    retries: NonNegativeInt = Field(6, description="How often a request that failed is made again.")
    first_pause: NonNegativeFloat = Field(
        0.5, description="Seconds before the first retry; the pause doubles with each."
    )
    longest_pause: NonNegativeFloat = Field(20.0, description="Seconds before a retry, at most.")
    anonymous: bool = Field(
        False,
        description="Read a public bucket without credentials; else they are found as AWS's and Google's tools do.",
    )
    requester_pays: str | None = Field(
        None, description="Google Cloud project that is billed, for a bucket (gs://) whose readers pay."
    )
    endpoint: Address | None = Field(None, description="Of an S3 server other than Amazon's; null: AWS_ENDPOINT_URL.")
    region: str | None = Field(None, description="Of an S3 server; null: AWS_REGION.")
    threads: PositiveInt = Field(16, description="Requests at a time.")

    def folder(self) -> Path:
        """Return the local folder."""
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return self.cache or Path(home) / "bgen"


class AnnDataConfig(Section):
    """What AnnData in zarr does not say itself; stores of `bgen data build` need none of it."""

    matrix: str = Field("X", description="Where the counts are: X, layers/counts, ...")
    roles: dict[str, str] = Field(
        default_factory=dict, description="Role to obs column: cell_type, batch, time, perturbation, ..."
    )
    control: str | None = Field(None, description="The perturbation that means none.")
    splits: dict[str, Fraction] = Field(
        default_factory=lambda: {"train": 0.8, "valid": 0.1, "test": 0.1}, description="Split to fraction of the cells."
    )
    split_by: str | None = Field(None, description="Column or role whose values are kept together in one split.")
    held_out: dict[str, list[str]] = Field(
        default_factory=dict, description="Split to the values of split_by that it consists of."
    )
    seed: NonNegativeInt = Field(0, description="Of the splits.")


class DataConfig(Section):
    """Which cells are read, and in what order."""

    store: Address = Field(
        description="Folder or address (s3://, gs://, https://) of a store that `bgen data build` wrote, of its"
        " WebDataset form, or AnnData in zarr."
    )
    split: str = Field("train", description="Split to train on.")
    valid: str = Field("valid", description="Split for the held-out loss.")
    lanes: PositiveInt = Field(8, description="Lanes that an epoch is dealt to; at least the most ranks planned.")
    window: PositiveInt = Field(16, description="Chunks of each lane among which rows are shuffled.")
    prefetch: PositiveInt = Field(4, description="Steps read ahead of the training loop.")
    threads: PositiveInt = Field(2, description="Threads of each rank that read and decode.")
    weighting: WeightingConfig | None = Field(None, description="Sampling by source; null: each cell once an epoch.")
    trajectories: TrajectoriesConfig | None = Field(
        None, description="Stage flow: train on trajectories of populations; null: on single cells."
    )
    on_damage: Literal["stop", "skip"] = Field(
        "stop",
        description="What a damaged chunk does. stop: it is named and the run ends; skip: other cells take the place of"
        " its own, and are counted in the record (damaged_cells).",
    )
    access: Access = Access()
    anndata: AnnDataConfig = AnnDataConfig()

    @model_validator(mode="after")
    def _held_out_is_held_out(self) -> DataConfig:
        if self.split == self.valid:
            raise ValueError(f"valid: '{self.valid}' is the split that is trained on; it tells nothing held out")
        if self.weighting is not None and self.trajectories is not None:
            raise ValueError("weighting: trajectories draw systems alike; weighting is for single cells")
        return self
