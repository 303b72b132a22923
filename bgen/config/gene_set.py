"""Settings of the encoder that reads a cell as a set of genes, and of the decoder with rows from a gene table.

The components are :mod:`bgen.models.vae.encoders.gene_set` and :mod:`bgen.models.vae.decoders.gene_table`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field, model_validator

from bgen.config.components import NamedSection
from bgen.config.section import Fraction, NonNegativeInt, PositiveInt, Section

Part = TypeVar("Part", bound=Section)


def without_files(part: Part | None) -> Part | None:
    """Return a section without the files that it names."""
    files: dict[str, object] = {"files": [], "sets": None, "file": None}
    kept = {} if part is None else {name: value for name, value in files.items() if name in type(part).model_fields}
    return None if part is None else part.model_copy(update=kept)


class VectorsConfig(Section):
    """What is known of genes by their names (:mod:`bgen.genes.vectors`), as a source of their rows in a gene table."""

    files: list[Path] = Field(
        default_factory=list, description="CSV or TSV files, a gene's name and its vector in each row."
    )
    sets: Path | None = Field(None, description="Gene sets (.gmt); genes are known by the sets that they are in.")
    size: PositiveInt = Field(32, description="Numbers of a vector, to which those of all sources are reduced.")
    residual_dropout: Fraction = Field(
        0.2, description="Share of genes that are known by their vectors alone, drawn anew at every step of training."
    )


class GroupsConfig(Section):
    """Gene sets as tokens, each of which reads the genes of its set."""

    file: Path | None = Field(None, description="Gene sets (.gmt); training needs it, a trained model does not.")
    tokens: PositiveInt = Field(32, description="Sets that are chosen: those that together hold the most genes.")
    bias: Literal["soft", "hard"] = Field(
        "soft", description="Whether a token reads members more than others, as much as is learned, or members only."
    )
    at_least: PositiveInt = Field(5, description="Genes of the model that a set holds, at least.")
    at_most: PositiveInt = Field(300, description="Genes of the model that a set holds, at most.")
    hierarchy: bool = Field(
        False, description="Whether a token looks more at those whose sets hold its own, or lie in it; by token_blocks."
    )
    shuffled: bool = Field(False, description="Control: each gene is in the sets of another gene.")


class NetworkConfig(Section):
    """Regulators as tokens, each of which reads the genes that it acts on."""

    file: Path | None = Field(
        None, description="CSV of edges (source, target, signed weight); training needs it, a trained model does not."
    )
    tokens: PositiveInt = Field(32, description="Regulators that are chosen: those that act on the most genes.")
    bias: Literal["soft", "hard"] = Field(
        "soft", description="Whether a token reads targets more than others, as much as is learned, or targets only."
    )
    at_least: PositiveInt = Field(5, description="Genes of the model that a regulator acts on, at least.")
    relations: bool = Field(
        False,
        description="Whether a token looks more at its regulators and at what it regulates; by token_blocks.",
    )
    shuffled: bool = Field(False, description="Control: each gene has the regulators of another gene.")


class GeneSetEncoderConfig(NamedSection):
    """The set of expressed genes, read by a few tokens; its sizes are its own, not the VAE's ``hidden``, ``blocks``."""

    name: Literal["gene_set"] = "gene_set"
    weighting: Literal["molecules", "log", "genes"] = Field(
        "molecules",
        description="How much an expressed gene counts: as often as it was counted; the logarithm of 1 + counts per "
        "10,000; or each the same.",
    )
    values: bool = Field(
        False, description="Whether what a gene adds, beside how much it counts, depends on its count as well."
    )
    attention: bool = Field(
        True,
        description="Whether each token weighs genes by attention; false: the plain mean over expressed genes, for "
        "which one token is enough.",
    )
    tokens: PositiveInt = Field(8, description="Tokens that read the genes, M.")
    width: PositiveInt = Field(64, description="Width of a token, a multiple of heads; 32 a head are quick.")
    heads: PositiveInt = Field(2, description="Heads of the attention, to genes and among tokens.")
    token_blocks: NonNegativeInt = Field(0, description="Blocks of attention among the tokens of a cell.")
    rows: PositiveInt = Field(128, description="Width of a gene's row in the gene table, E.")
    vectors: VectorsConfig | None = Field(None, description="What rows are made from beside learning; null: nothing.")
    groups: GroupsConfig | None = Field(None, description="Further tokens that read gene sets; null: none.")
    network: NetworkConfig | None = Field(None, description="Further tokens that read regulons; null: none.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is no multiple of heads={self.heads}")
        if not self.attention and self.tokens > 1:
            raise ValueError(f"attention=false gives every token the same mean: choose tokens=1 (it is {self.tokens})")
        related = (self.groups is not None and self.groups.hierarchy) or (self.network and self.network.relations)
        if related and not self.token_blocks:
            raise ValueError("tokens look at one another in token_blocks only: set token_blocks=1 or more")
        if not self.attention and (self.groups is not None or self.network is not None):
            raise ValueError("groups and network need attention=true")
        return self

    def exported(self) -> Self:
        """See :class:`NamedSection`."""
        parts = {"vectors": self.vectors, "groups": self.groups, "network": self.network}
        return self.model_copy(update={name: without_files(part) for name, part in parts.items()})


class RankedEncoderConfig(NamedSection):
    """Genes in the order of their ranks, for comparison: attention among the first of them; its sizes are its own."""

    name: Literal["ranked"] = "ranked"
    genes: PositiveInt = Field(256, description="Genes that are read: those of the highest ranks, K.")
    width: PositiveInt = Field(64, description="Width of a token, a multiple of heads.")
    heads: PositiveInt = Field(2, description="Heads of the attention.")
    token_blocks: PositiveInt = Field(1, description="Blocks of full attention among the genes of a cell.")
    rows: PositiveInt = Field(96, description="Width of a gene's row in the gene table, E.")
    shuffled: bool = Field(False, description="Control: genes stand in one random order, the same in every cell.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is no multiple of heads={self.heads}")
        return self


class GeneTableDecoderConfig(NamedSection):
    """The decoder ``state_vector``, with rows of genes that are made from a gene table beside rows of their own."""

    name: Literal["gene_table"] = "gene_table"
    rows: PositiveInt = Field(96, description="Width of a gene's row in the gene table, E.")
    vectors: VectorsConfig | None = Field(None, description="What the table is made from; null: it is learned.")

    def exported(self) -> Self:
        """See :class:`NamedSection`."""
        return self.model_copy(update={"vectors": without_files(self.vectors)})
