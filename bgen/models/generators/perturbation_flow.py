"""Perturbed cells from control cells: a flow whose source is the control's latent state, anchored to average effects.

    z_1 control, z_0 perturbed,  z_t = (1 - t) z_0 + t z_1,  v(z, t) = sum_p r_p(dose) [ A e_p + u(z, t, e_p) ]
    log of the expected share of gene g = log decoder(z_0)_g + f_g + constant

This is the path of :mod:`bgen.flow.path` with a control cell in the place of noise, so integrating from t = 1 to 0
carries each of the user's control cells to what it would have become. The flow knows how cells differ in their
response, but its average is as noisy as the few cells that it was learnt from. Averages are estimated better one gene
at a time (:mod:`bgen.tasks.perturb.effect_estimates`), also for genes that the latent space cannot hold. So ``f``
brings the average of the predicted cells to that estimate.

A set of perturbations is the sum over its members (or, ``combine: joint``, one network of the sum of their embeddings),
so unseen combinations need no new label. ``e_p = W g_p + own_p``, where ``g_p`` is the co-expression row of the target
gene; so an unseen target has an embedding too. The dose acts through a Hill function with a threshold and slope for
each perturbation, r = d^h / (d^h + c^h); without dose, 1.

Axes: B pairs of cells, K perturbations of a set, P known perturbations, R average effects, D latent size, G genes, C
width, E size of a gene's row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bgen.config.perturb import PerturbConfig
from bgen.data.batch import CellBatch
from bgen.flow.path import interpolate, velocity
from bgen.flow.solvers import integrate
from bgen.flow.times import sample_times
from bgen.models.backbones.mlp import MLPBackbone
from bgen.models.codec import Codec
from bgen.models.likelihoods.negative_binomial import NegativeBinomial
from bgen.nn.random import Stream, uniform


@dataclass
class PerturbationSet:
    """The perturbations of B cells.

    Attributes
    ----------
    known
        int64 ``[B, K]``: numbers of known perturbations, -1 where there is none or it is not known.
    gene
        int64 ``[B, K]``: target genes in the model's order, -1 if there is none (a drug).
    dose
        float32 ``[B, K]`` in the unit of training; NaN: given without dose.
    there
        bool ``[B, K]``: members of the set; the others are padding.
    """

    known: Tensor
    gene: Tensor
    dose: Tensor
    there: Tensor

    def repeat(self, n: int) -> PerturbationSet:
        """Return a set of one row for ``n`` cells."""
        return PerturbationSet(*(x.expand(n, -1) for x in (self.known, self.gene, self.dose, self.there)))


@dataclass
class PairBatch(CellBatch):
    """Perturbed cells (their counts), each with a control cell of the same stratum.

    Attributes
    ----------
    perturbed, control
        ``[B, D + 1]``: whitened latents.
    known, gene, dose, there
        As in :class:`PerturbationSet`.
    """

    perturbed: Tensor = field(default_factory=lambda: torch.zeros(0))
    control: Tensor = field(default_factory=lambda: torch.zeros(0))
    known: Tensor = field(default_factory=lambda: torch.zeros(0))
    gene: Tensor = field(default_factory=lambda: torch.zeros(0))
    dose: Tensor = field(default_factory=lambda: torch.zeros(0))
    there: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def perturbations(self) -> PerturbationSet:
        """The sets."""
        return PerturbationSet(self.known, self.gene, self.dose, self.there)


class PerturbationFlow(nn.Module):
    """A frozen codec, such as a VAE, the flow from control to perturbed latents, and average effects on genes.

    Parameters
    ----------
    config
        Settings.
    codec
        Trained, with its whitening fitted.
    perturbations
        P.
    gene_embedding
        ``[G, E]``: co-expression rows of the genes.
    dose_scale
        A typical dose (geometric mean of those above 0), at which thresholds start.
    effects
        ``[R, G]``: natural logs by which sets of perturbations change expected shares.
    network
        ``[E', G]``: maps the last E' elements of a gene's row to the genes that it regulates; None: unknown.
    """

    decayed = ()
    gene_embedding: Tensor
    dose_scale: Tensor
    effects: Tensor
    network: Tensor

    def __init__(
        self,
        config: PerturbConfig,
        codec: Codec,
        perturbations: int,
        gene_embedding: Tensor,
        dose_scale: float,
        effects: Tensor,
        network: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vae: Codec = codec.requires_grad_(False).eval()
        self.size = codec.size
        width = config.width
        self.register_buffer("gene_embedding", gene_embedding)
        self.register_buffer("dose_scale", torch.tensor(float(dose_scale)))
        self.register_buffer("effects", effects)
        regulated = torch.zeros(0, effects.shape[1]) if network is None else network
        self.register_buffer("network", regulated, persistent=network is not None)
        self.own = nn.Embedding(perturbations, width)
        self.shared = nn.Linear(gene_embedding.shape[1], width, bias=False)
        self.shift = nn.Linear(width, self.size, bias=False)
        self.backbone = MLPBackbone(self.size, width, config.blocks, self.size)
        self.log_threshold = nn.Parameter(torch.zeros(perturbations))
        self.log_slope = nn.Parameter(torch.zeros(perturbations))
        nn.init.normal_(self.own.weight, std=1.0 / width**0.5)
        nn.init.zeros_(self.shift.weight)

    def train(self, mode: bool = True) -> PerturbationFlow:
        """Switch what is trained; the codec stays in evaluation mode."""
        super().train(mode)
        self.vae.eval()
        return self

    def forward(self, batch: PairBatch) -> dict[str, Tensor]:
        """Return the ``loss`` per pair ``[B]``: mean squared error of the velocity per dimension."""
        sets = batch.perturbations
        if self.training and self.config.forget > 0:  # so that the shared part learns to do without the own ones
            forgotten = uniform(batch.keys, Stream.CONDITION_DROPOUT, 1) < self.config.forget
            known = torch.where(forgotten & (sets.gene >= 0), -1, sets.known)
            sets = PerturbationSet(known, sets.gene, sets.dose, sets.there)
        z0, z1 = batch.perturbed, batch.control
        t = sample_times("stratified", batch.keys, batch.slots, batch.step)
        z_t = interpolate(z0[:, None, None], z1[:, None, None], t[:, None])[:, 0, 0]
        return {"loss": (self.velocity(z_t, t, sets) - velocity(z0, z1)).square().mean(1)}

    def embed(self, sets: PerturbationSet) -> Tensor:
        """Embed the members of the sets, ``[B, K, C]``; padding is zero."""
        own = self.own(sets.known.clamp_min(0)) * (sets.known >= 0)[..., None]
        shared = self.shared(self.gene_embedding[sets.gene.clamp_min(0)]) * (sets.gene >= 0)[..., None]
        return (own + shared) * sets.there[..., None]

    def strength(self, sets: PerturbationSet) -> Tensor:
        """``[B, K]``: r, from 0 (no dose) to 1; 1 where no dose is given."""
        at = sets.known.clamp_min(0)
        slope = self.log_slope[at].exp()
        dose = (sets.dose / self.dose_scale).clamp_min(0)
        ratio = (dose.nan_to_num(1.0).clamp_min(1e-12).log() - self.log_threshold[at]) * slope
        response = torch.where(dose > 0, torch.sigmoid(ratio), 0.0)
        return torch.where(sets.dose.isnan(), 1.0, response) * sets.there

    def velocity(self, z_t: Tensor, t: Tensor, sets: PerturbationSet) -> Tensor:
        """Velocity ``[B, D + 1]`` at ``z_t`` of that shape and flow times ``t [B]``."""
        e_BKC, r_BK = self.embed(sets), self.strength(sets)[..., None]
        shift = (r_BK * self.shift(e_BKC)).sum(1)
        if self.config.combine == "joint":
            return shift + self.backbone(z_t[:, None, None], t[:, None], (r_BK * e_BKC).sum(1)[:, None])[:, 0, 0]
        B, K = sets.known.shape
        cells, times = z_t.repeat_interleave(K, 0)[:, None, None], t.repeat_interleave(K)[:, None]
        each = self.backbone(cells, times, e_BKC.flatten(0, 1)[:, None])[:, 0, 0].view(B, K, -1)
        return shift + (r_BK * each).sum(1)

    @torch.no_grad()
    def transport(self, control: Tensor, sets: PerturbationSet, steps: int) -> Tensor:
        """Carry whitened control latents ``[B, D + 1]`` to perturbed ones."""

        def v(z: Tensor, t: float) -> Tensor:
            return self.velocity(z, torch.full((len(z),), t), sets)

        return integrate(v, control, steps, "heun")

    @torch.no_grad()
    def mean_share(self, latents: Tensor, covariates: Mapping[str, Tensor]) -> Tensor:
        """``[G]``: mean over cells of the decoder's expected shares, for whitened latents ``[B, D + 1]``."""
        z, _ = self.vae.unwhiten(latents)
        return self.vae.decode(z, torch.ones(len(z)), covariates).mean.mean(0)

    @torch.no_grad()
    def decode(self, moved: Tensor, folds: Tensor, covariates: Mapping[str, Tensor]) -> NegativeBinomial:
        """Return the distribution of counts for transported latents ``[B, D + 1]`` and log fold changes ``[G]``.

        Since effects are ratios of shares, the share that falling genes lose goes to all genes in proportion.
        """
        z, log_library = self.vae.unwhiten(moved)
        decoded = self.vae.decode(z, log_library.exp(), covariates)
        return NegativeBinomial(decoded.logits + folds, log_library.exp(), decoded.log_theta)
