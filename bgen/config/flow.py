"""Settings of the rectified flow, and of sampling from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bgen.config.backbone import BackboneConfig
from bgen.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class PatternsConfig(Section):
    """How often training on trajectories observes which time points (:mod:`bgen.flow.patterns`).

    An observed time point is held at flow time t = 0 and does not enter the loss. The weights need not add up to 1; a
    pattern is left out where a trajectory is too short for it or has no control.
    """

    noise: NonNegativeFloat = Field(1.0, description="Weight of observing nothing: joint generation.")
    forecast: NonNegativeFloat = Field(1.0, description="Weight of observing the past, up to a random time point.")
    interpolate: NonNegativeFloat = Field(1.0, description="Weight of observing all but one time point in between.")
    perturb: NonNegativeFloat = Field(1.0, description="Weight of observing the control populations.")
    independent: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Share of trajectories whose time points have independent flow times; others share one."
    )

    @model_validator(mode="after")
    def _some_pattern(self) -> PatternsConfig:
        if not self.noise + self.forecast + self.interpolate + self.perturb > 0:
            raise ValueError("at least one of noise, forecast, interpolate and perturb must be above 0")
        return self


class MembersConfig(Section):
    """A condition that is a set of members with amounts (:mod:`bgen.models.generators.members`)."""

    column: str = Field("perturbation", description="obs column (role or name) of the labels, such as A+B.")
    amount: str | None = Field(
        None, description="obs column (role or name) of the amount, which all members of a label have; null: none."
    )
    separator: str | None = Field(None, description="Between the names of a label; null: found, usually +.")
    forget: Fraction = Field(0.2, description="Share of training sets whose members count as never seen.")
    components: NonNegativeInt = Field(
        16, description="Size of the co-expression rows by which genes are known; 0: none."
    )
    network: Path | None = Field(
        None, description="CSV of a regulatory network (source, target, weight); its regulators are known by it."
    )
    sets: Path | None = Field(None, description="Gene sets (.gmt); genes are known by the sets that they are in.")
    vectors: list[Path] = Field(
        default_factory=list,
        description="CSV or TSV files, a name and its vector in each row: of genes, drugs, anything.",
    )
    structures: list[Path] = Field(
        default_factory=list,
        description="CSV or TSV files, a drug and its SMILES in each row: drugs known by fingerprints (extra drugs).",
    )


class MemberSizes(Section):
    """Sizes of :class:`bgen.models.generators.members.MemberEmbedding`, as a model directory keeps them."""

    members: NonNegativeInt
    labels: NonNegativeInt
    largest: PositiveInt
    names: NonNegativeInt
    vector: NonNegativeInt
    amount: str | None = Field(description="obs column of the amounts.")
    forget: Fraction


class MixingConfig(Section):
    """Populations mixed between systems, as augmentation of trajectories along a perturbation."""

    share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Share of trajectories that are moved towards other systems; 0: none."
    )
    concentration: PositiveFloat = Field(
        0.5, description="Of the Dirichlet distribution that the other systems' weights are drawn from."
    )
    cells: PositiveInt = Field(64, description="Cells of a population, at most, from which its mean is taken.")


class CouplingConfig(Section):
    """How starts from neighbours are planned (:mod:`bgen.flow.plans`)."""

    cells: NonNegativeInt = Field(
        0,
        description="Cells of each population, at most, that starts are planned over; they are encoded once, and each "
        "rank holds them in memory. 0: plans are between the cells of a trajectory alone.",
    )
    growth: bool = Field(
        False,
        description="Over time: let earlier cells be the partner of more or fewer later ones (unbalanced optimal "
        "transport, see bgen/flow/growth.py), learn how they grow, and let forecasts start from them accordingly.",
    )
    penalty: PositiveFloat = Field(
        0.1, description="How dear growth is, in mean squared distances between the two populations; large: none."
    )

    @model_validator(mode="after")
    def _growth_is_planned(self) -> CouplingConfig:
        if self.growth and self.cells == 0:
            raise ValueError("growth: is found in whole populations; set cells, such as 1024, to plan starts over them")
        return self


class LogCountsConfig(Section):
    """The space of a flow without a latent (:mod:`bgen.models.log_counts`)."""

    scale: Literal["one", "gene"] = Field(
        "one",
        description="What the logarithms of a gene are divided by: one number for all genes, or its own spread. Their "
        "mean is subtracted in both.",
    )
    counts: Literal["rounded", "poisson", "nb"] = Field(
        "rounded",
        description="How integers come of generated expectations: the nearest, a Poisson draw, or one from a negative "
        "binomial with the gene's dispersion among all training cells.",
    )


class FlowConfig(Section):
    """The rectified flow (bgen/README.md, "Flow")."""

    space: Literal["latent", "log_counts"] = Field(
        "latent",
        description="What flows: latent states of a VAE, or log(1 + counts per 10,000) of all genes, without a VAE.",
    )
    vae: Path | None = Field(
        None, description="Run folder or exported directory of the VAE; needed by stage flow in the space latent."
    )
    log_counts: LogCountsConfig = LogCountsConfig()
    backbone: BackboneConfig = BackboneConfig()
    conditions: list[str] = Field(
        default_factory=list, description="obs columns (roles or names) that generation can be asked for."
    )
    members: MembersConfig | None = Field(
        None, description="A further condition that is a set of members with amounts; null: there is none."
    )
    mixing: MixingConfig = MixingConfig()
    endpoint: NonNegativeFloat = Field(
        0.0,
        description="Weight of a further loss on trajectories: the energy distance between the cells of a population "
        "and where the velocity leads theirs.",
    )
    averages: bool = Field(
        True, description="After training along perturbations, estimate average effects to go with the flow."
    )
    own_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Share of the flow's own answer in how cells change on average, beside average effects."
    )
    condition_dropout: Fraction = Field(0.15, description="Probability that training hides a cell's conditions.")
    condition_dropout_each: Fraction = Field(
        0.0, description="Probability that training hides each condition by itself: needed to guide by single ones."
    )
    t_sampling: Literal["uniform", "stratified", "logit_normal"] = Field(
        "stratified", description="Distribution of the flow time t in training."
    )
    patterns: PatternsConfig = PatternsConfig()
    source: Literal["noise", "neighbours"] = Field(
        "noise",
        description="What flows into data. neighbours: on trajectories, time points with an observed neighbour start "
        "from it, or from the displacement interpolation of both (see bgen/flow/start.py); all others from noise. The "
        "network has an output for each.",
    )
    coupling: CouplingConfig = CouplingConfig()
    prediction: Literal["velocity", "data"] = Field("velocity", description="What the network's output means.")
    fit_levels: bool = Field(
        False,
        description="After training, move each gene's logit in the flow's copy of the VAE to where generated cells "
        "have the mean of log(1 + counts per 10,000) of training cells.",
    )

    @model_validator(mode="after")
    def _velocity_from_neighbours(self) -> FlowConfig:
        if self.source == "neighbours" and self.prediction == "data":
            raise ValueError("source: neighbours learns velocities; leave prediction at velocity")
        return self

    @model_validator(mode="after")
    def _coupling_has_a_use(self) -> FlowConfig:
        if self.coupling.cells > 0 and self.source != "neighbours":
            raise ValueError("coupling: plans starts from neighbours; set source: neighbours, or coupling.cells: 0")
        if self.coupling.growth and self.members is not None:
            raise ValueError(
                "coupling.growth: cells grow along time; under perturbations each control cell has one answer. Set it "
                "to false"
            )
        return self


class SampleConfig(Section):
    """Defaults of generation; `bgen generate` can override each."""

    solver: Literal["euler", "heun", "midpoint", "adaptive"] = Field(
        "heun", description="ODE solver; adaptive (Dormand-Prince) chooses its own steps by the tolerance."
    )
    steps: Annotated[int, Field(gt=0, le=10_000)] = Field(
        20, description="Solver steps from t = 1 (noise) to t = 0 (data); adaptive has its own."
    )
    tolerance: Annotated[float, Field(ge=1e-9, le=1)] = Field(
        1e-3, description="Relative and absolute error that solver adaptive allows."
    )
    noise: Annotated[float, Field(gt=0, le=100)] = Field(
        1.0,
        description="Standard deviation of the noise that generation starts from. Above 1, generated cells cover more "
        "of the real ones, but more of them lie further out; below 1, the reverse.",
    )
    guidance: Annotated[float, Field(ge=0, le=1000)] = Field(
        1.0, description="Guidance scale; 1 is the conditional model itself."
    )
    guidance_of: dict[str, Annotated[float, Field(ge=0, le=1000)]] = Field(
        default_factory=dict, description="Guidance scale of single conditions, beside that of all; 1: none."
    )
    guidance_interval: tuple[float, float] = Field((0.0, 1.0), description="Range of t in which guidance acts.")

    @model_validator(mode="after")
    def _interval_within_time(self) -> SampleConfig:
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval: from {low:g} to {high:g} is no range within 0 to 1")
        return self
