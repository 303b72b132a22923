"""Rectified flow in the whitened latent space of a trained VAE, with the log library size as one more dimension.

Axes: B cells (each a trajectory with T = N = 1), D latent size (the flow has D + 1 dimensions), C width of the
condition.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bgen.config.schema import FlowConfig, SampleConfig
from bgen.data.batch import CellBatch
from bgen.flow.guidance import guide
from bgen.flow.loss import velocity_loss
from bgen.flow.path import interpolate, velocity, velocity_from_data
from bgen.flow.solvers import Velocity, integrate
from bgen.flow.times import sample_times
from bgen.models.backbone.registry import build_backbone
from bgen.models.conditions import ConditionEmbedding, drop_conditions
from bgen.models.vae import VAE
from bgen.nn.random import Stream, normal


class LatentFlow(nn.Module):
    """A frozen VAE and the velocity network that generates its latents.

    The VAE's parameters do not require gradients and it stays in evaluation mode; its state is saved with the model.

    Parameters
    ----------
    config
        Settings.
    vae
        Trained, with its whitening fitted.
    categories
        Categorical condition to its number of categories.
    numbers
        Numeric condition to its mean and standard deviation over the training cells, in its unit.
    """

    def __init__(
        self,
        config: FlowConfig,
        vae: VAE,
        categories: Mapping[str, int],
        numbers: Mapping[str, tuple[float, float]],
    ) -> None:
        super().__init__()
        self.config = config
        self.vae = vae.requires_grad_(False).eval()
        self.size = vae.config.latent + 1
        self.conditions = ConditionEmbedding(categories, numbers, config.backbone.width)
        self.backbone = build_backbone(self.size, config.backbone)

    def train(self, mode: bool = True) -> LatentFlow:
        """Switch the velocity network; the VAE stays in evaluation mode."""
        super().train(mode)
        self.vae.eval()
        return self

    def forward(self, batch: CellBatch) -> dict[str, Tensor]:
        """Return the per-cell ``loss [B]``: mean squared error of the velocity per dimension.

        Latents are posterior samples. Everything random comes from ``batch.keys``, also in evaluation.
        """
        self.conditions.require_present(batch.obs)
        z0 = self.vae.latents(batch)
        z1 = normal(batch.keys, Stream.FLOW_NOISE, self.size)
        t = sample_times(self.config.t_sampling, batch.keys, batch.slots, batch.step)
        hidden = drop_conditions(batch.keys, self.config.condition_dropout if self.training else 0.0)
        condition = self.conditions(batch.obs, hidden)
        z0, z1, t = z0[:, None, None], z1[:, None, None], t[:, None]
        predicted = self.velocity(interpolate(z0, z1, t), t, condition[:, None])
        return {"loss": velocity_loss(predicted, velocity(z0, z1))}

    def velocity(self, z_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity ``[B, T, N, D + 1]`` at ``z_t`` of that shape, ``t [B, T]``, embedded ``condition [B, T, C]``."""
        output = self.backbone(z_t, t, condition).float()
        return velocity_from_data(z_t, output, t) if self.config.prediction == "data" else output

    @torch.no_grad()
    def sample(
        self,
        conditions: Mapping[str, Tensor],
        n: int,
        keys: Tensor,
        settings: SampleConfig,
        log_library: Tensor | None = None,
    ) -> Tensor:
        """Generate whitened latents ``[n, D + 1]``; ``vae.unwhiten`` and ``vae.decode`` turn them into counts.

        Parameters
        ----------
        conditions
            Column to codes int64 ``[n]`` (-1 = any) or numbers float ``[n]`` (NaN = any); absent columns are free.
        n
            Number of cells.
        keys
            int64 ``[n]``: the noise is a pure function of them.
        settings
            Solver, steps, guidance.
        log_library
            ``[n]`` natural logs of the total counts to generate, or None to let the model draw them. The last
            coordinate is then held on its own straight path, ``(1 - t) fixed + t noise``, at every t: the state is
            generated as it goes with that size. Give ``vae.decode`` the same sizes: ``vae.unwhiten`` would limit them.
        """
        assert len(keys) == n, "one key per cell"
        self.conditions.require_known(conditions)
        z1 = normal(keys, Stream.FLOW_START, self.size)
        shown = torch.zeros(n, dtype=torch.bool, device=keys.device)
        v = guide(
            self._velocity_at(self.conditions(conditions, shown)),
            self._velocity_at(self.conditions(conditions, ~shown)),
            settings.guidance,
            settings.guidance_interval,
        )
        if log_library is not None:
            fixed = (log_library - self.vae.latent_mean[-1]) / self.vae.latent_std[-1]
            v = _hold_last(v, z1[:, -1] - fixed)
        return integrate(v, z1, settings.steps, settings.solver)

    def _velocity_at(self, condition: Tensor) -> Velocity:
        """``v(z, t)`` for static cells ``z [n, D + 1]`` with conditions ``[n, C]``."""

        def v(z: Tensor, t: float) -> Tensor:
            times = torch.full((len(z), 1), t, device=z.device)
            return self.velocity(z[:, None, None], times, condition[:, None])[:, 0, 0]

        return v


def _hold_last(v: Velocity, slope: Tensor) -> Velocity:
    """Replace the last coordinate's velocity by a constant ``slope [n]``; every solver integrates that exactly."""

    def held(z: Tensor, t: float) -> Tensor:
        return torch.cat((v(z, t)[:, :-1], slope[:, None]), dim=1)

    return held
