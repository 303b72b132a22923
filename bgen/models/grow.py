"""A trained model with more genes, batches or conditions than it was trained with.

Everything old keeps its weights, so what the model says of old categories and genes does not change. The component that
has new rows decides how they start: a new category starts like "unknown", a new gene at its average share of the
counts, independent of the state.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bgen.config.flow import MemberSizes
from bgen.errors import UserError
from bgen.models.codec import Codec, CountsCodec
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.generators.members import MemberEmbedding
from bgen.models.vae.gene_table import GeneTable
from bgen.models.vae.vae import VAE


@runtime_checkable
class HasCategories(Protocol):
    """A module with a row for each of its ``categories``."""

    categories: int

    def start_categories(self, known: int) -> None:
        """Let all categories but the first ``known`` start like the unknown."""
        ...


def grow_codec(codec: CountsCodec, covariates: Mapping[str, int], new_shares: Tensor | None = None) -> CountsCodec:
    """Return a codec with rows for what is new; see :func:`grow_vae`.

    Raises
    ------
    UserError
        If it cannot have new genes.
    """
    if isinstance(codec, VAE):
        return grow_vae(codec, covariates, new_shares)
    if new_shares is not None and len(new_shares):
        raise UserError(
            "--add-genes: the flow of this model runs on the log counts of its genes (flow.space=log_counts), so it"
            " takes no new ones. Leave --add-genes out, or take a model with a VAE."
        )
    return copy.deepcopy(codec)


def grow_vae(vae: VAE, covariates: Mapping[str, int], new_shares: Tensor | None = None) -> VAE:
    """Return a VAE with at least as many categories, and with new genes last.

    Parameters
    ----------
    covariates
        Covariate to its number of categories, in the old order.
    new_shares
        ``[new genes]``: counts of each new gene, in units of all counts of the old genes.
    """
    shares = torch.zeros(0) if new_shares is None else new_shares.clamp_min(1e-8)
    grown = VAE(vae.config, vae.n_genes + len(shares), covariates)
    _take_over(vae, grown)
    if len(shares):
        grown.encoder.start_genes(vae.n_genes)
        grown.decoder.start_genes(vae.n_genes, shares)
    return grown.eval()


@torch.no_grad()
def extend_vae(vae: VAE, vectors: Mapping[str, Tensor], trained: Tensor) -> tuple[VAE, float]:
    """Return a VAE with new genes last that no training has seen, known by their vectors; and how well they are known.

    Cells that it generates gain the counts of new genes, and keep those of old ones, where the state is average.

    Parameters
    ----------
    vectors
        For each of ``vae.vector_tables`` ``[new genes, F]``; that of the decoder has to be among them.
    trained
        ``[G]``, bool: the genes that training has seen.

    Returns
    -------
    float
        As :meth:`bgen.models.vae.decoders.decoder.Decoder.foretell_genes`.
    """
    known, added = vae.n_genes, len(vectors["decoder"])
    grown = grow_vae(vae, vae.covariates, torch.ones(added))
    for half, table in grown.vector_tables.items():
        table.tell(known, vectors[half])
    state = grown.latent_mean[None, :-1]
    r2 = grown.decoder.foretell_genes(trained, state)
    shares = grown.decode(state, torch.ones(1), {}).mean[0].double()
    larger = float((shares.sum() / shares[:known].sum()).log())
    grown.latent_mean[-1] += larger
    grown.log_library_range += larger
    return grown, r2


def grow_flow(flow: LatentFlow, codec: Codec, categories: Mapping[str, int]) -> LatentFlow:
    """Return a flow on a grown codec, with at least as many categories of each condition, in the old order."""
    added, known = codec.n_genes - flow.vae.n_genes, flow.vae.n_genes
    embeddings = flow.conditions.member_embeddings
    sets = {
        name: part.sizes.model_copy(update={"names": part.sizes.names + added}) if part.sizes.names else part.sizes
        for name, part in embeddings.items()
    }
    grown = _like(flow, codec, categories, sets)
    for name, part in grown.conditions.member_embeddings.items():
        _take_over_members(embeddings[name], part)
        old = embeddings[name]
        if len(old.vectors):  # the genes stand first, and nothing is known of new ones
            vectors = torch.cat(
                [old.vectors[:known], old.vectors.new_zeros(added, old.vectors.shape[1]), old.vectors[known:]]
            )
            part.vectors.copy_(vectors)
        part.label_own.copy_(old.label_own)
        part.label_vector.copy_(torch.where(old.label_vector >= known, old.label_vector + added, old.label_vector))
        part.typical_amount.copy_(old.typical_amount)
    if flow.averages is not None:
        grown.averages = flow.averages.with_genes(added) if added else flow.averages
    return grown.eval()


def grow_members(flow: LatentFlow, column: str, sizes: MemberSizes) -> LatentFlow:
    """Return a flow whose sets are labels of another column, with further members after its own.

    What labels mean, and vectors by name, have to be told anew (:meth:`MemberEmbedding.describe`). New members begin
    like ones that were never seen: with what is known by their names alone.
    """
    (old,) = flow.conditions.member_embeddings.values()
    grown = _like(flow, flow.vae, flow.conditions.sizes, {column: sizes})
    _take_over_members(old, grown.conditions.member_embeddings[column])
    return grown.eval()


def _like(flow: LatentFlow, codec: Codec, categories: Mapping[str, int], sets: Mapping[str, MemberSizes]) -> LatentFlow:
    """Return a flow of other sizes with the weights of the old one, but for those of members."""
    numbers = dict.fromkeys(flow.conditions.number_names, (0.0, 1.0))  # the state brings their statistics
    grown = LatentFlow(flow.config, codec, categories, numbers, sets)
    _take_over(flow.conditions, grown.conditions, without="sets.")
    _take_over(flow.backbone, grown.backbone)
    if sets:
        _take_over(flow.shift, grown.shift)
    if flow.growth is not None and grown.growth is not None:
        _take_over(flow.growth, grown.growth)
    return grown


@torch.no_grad()
def _take_over_members(old: MemberEmbedding, grown: MemberEmbedding) -> None:
    """Give an embedding of members the weights of one with fewer; new ones have none of their own."""
    n = old.sizes.members
    for part, before in (
        (grown.own.weight, old.own.weight),
        (grown.log_threshold, old.log_threshold),
        (grown.log_slope, old.log_slope),
    ):
        part.zero_()
        part[:n] = before
    if old.known_by_name is not None and grown.known_by_name is not None:
        grown.known_by_name.load_state_dict(old.known_by_name.state_dict())
    grown.unknown.copy_(old.unknown)


def _take_over(old: nn.Module, grown: nn.Module, without: str = "-") -> None:
    """Give a larger module the weights of the old one, whose rows stand first; ``without`` those of one part."""
    state: dict[str, Tensor] = {}
    new = grown.state_dict()
    state |= {name: tensor for name, tensor in new.items() if name.startswith(without)}
    for name, tensor in old.state_dict().items():
        if name.startswith(without):
            continue
        state[name] = new[name].clone()
        state[name][tuple(slice(0, n) for n in tensor.shape)] = tensor
    grown.load_state_dict(state)
    parts = dict(old.named_modules())
    for name, part in grown.named_modules():
        if isinstance(part, GeneTable):
            table = parts[name]
            assert isinstance(table, GeneTable), "the same but for sizes"
            part.map = table.map
        if isinstance(part, HasCategories):
            known = parts[name]
            assert isinstance(known, HasCategories), "the same but for sizes"
            part.start_categories(known.categories)
