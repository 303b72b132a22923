"""Rectified flow in the whitened latent space of a codec, with the log library size as one more dimension.

Axes: B trajectories, T time points, N cells per time point (a static cell is a trajectory with T = N = 1), D latent
size (the flow has D + 1 dimensions), C width of the condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from bgen.config.flow import FlowConfig, MemberSizes, SampleConfig
from bgen.data.batch import CellBatch
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.errors import UserError, nearest
from bgen.flow.guidance import guide
from bgen.flow.loss import endpoint_loss, velocity_loss
from bgen.flow.path import interpolate, over_cells, velocity, velocity_from_data
from bgen.flow.patterns import PATTERNS, draw_observed
from bgen.flow.plans import Plans
from bgen.flow.solvers import Velocity, integrate
from bgen.flow.start import KINDS, Starts, couple, neighbours, start, starts_of
from bgen.flow.times import sample_times
from bgen.models.backbones.registry import build_backbone
from bgen.models.codec import Codec
from bgen.models.generators.average_effects import AverageEffects
from bgen.models.generators.conditions import Condition, ConditionEmbedding, drop_conditions
from bgen.models.generators.growth import GrowthRate
from bgen.nn.mup import learning_rate_scales, start_heads
from bgen.nn.random import Stream, normal, uniform


@dataclass(frozen=True)
class Places:
    """Where cells are generated, and what is known of them.

    Attributes
    ----------
    mask
        bool ``[B, T, N]``: places that hold a cell.
    time
        ``[B, T]``: when the time points are, in the store's unit, ascending.
    observed
        bool ``[B, T]``: time points that are given (see :mod:`bgen.flow.patterns`); None: none.
    latents
        ``[B, T, N, D + 1]``: whitened, where observed; anything elsewhere. Needed if ``observed`` is.
    start
        ``[B, T, N, D + 1]``: where each generated cell starts; None: as training had it (see :mod:`bgen.flow.start`).
    """

    mask: Tensor
    time: Tensor
    observed: Tensor | None = None
    latents: Tensor | None = None
    start: Tensor | None = None

    def of(self, rows: slice) -> Places:
        """Return those of some of the B trajectories."""
        held = {part.name: getattr(self, part.name) for part in fields(self)}
        some: dict[str, Any] = {name: None if tensor is None else tensor[rows] for name, tensor in held.items()}
        return Places(**some)

    def to(self, device: torch.device) -> Places:
        """Return the same on a device."""
        held = {part.name: getattr(self, part.name) for part in fields(self)}
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device, non_blocking=True) for name, tensor in held.items()
        }
        return Places(**moved)


class LatentFlow(nn.Module):
    """A frozen codec, such as a VAE, and the velocity network that generates its latents.

    The parameters of the codec do not require gradients, and it stays in evaluation mode; its state is saved with the
    model, always under ``vae.``.

    Parameters
    ----------
    config
        Settings.
    codec
        Trained, with its whitening fitted.
    categories
        Categorical condition to its number of categories.
    numbers
        Numeric condition to its mean and standard deviation over the training cells, in its unit.
    sets
        Condition that is a set of members to its sizes.

    Attributes
    ----------
    averages
        Average effects of perturbations, which go with the flow once it is trained; None: none were estimated.
    growth
        Learned growth of cells over time (``flow.coupling.growth``); None: there is none.
    plans
        In training with ``flow.coupling.cells``: plans between the populations of its batches, given by the stage.
    """

    def __init__(
        self,
        config: FlowConfig,
        codec: Codec,
        categories: Mapping[str, int],
        numbers: Mapping[str, tuple[float, float]],
        sets: Mapping[str, MemberSizes] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vae: Codec = codec.requires_grad_(False).eval()
        self.size = codec.size
        self.conditions = ConditionEmbedding(categories, numbers, config.backbone.width, sets)
        self.outputs = self.size * (len(KINDS) if config.source == "neighbours" else 1)
        self.backbone = build_backbone(self.size, config.backbone, self.outputs)
        self.averages: AverageEffects | None = None
        self.growth = GrowthRate(self.size, config.backbone.width) if config.coupling.growth else None
        self.plans: Plans | None = None
        if sets:  # what members do to all cells alike, which is most of it
            self.shift = nn.Linear(config.backbone.width, self.size, bias=False)
            nn.init.zeros_(self.shift.weight)
        if config.backbone.transfer_from is not None:
            for module, twin in self._twins():
                start_heads(module, twin)

    def train(self, mode: bool = True) -> LatentFlow:
        """Switch the velocity network; the codec stays in evaluation mode."""
        super().train(mode)
        self.vae.eval()
        return self

    def forward(self, batch: CellBatch) -> dict[str, Tensor]:
        """Return the ``loss`` per cell: mean squared error of the velocity per dimension.

        In a :class:`TrajectoryBatch` every time point has a flow time of its own, observed ones are at t = 0 and do not
        count, and every place of a trajectory carries the mean over its cells that count. Everything
        random comes from ``batch.keys``, also in evaluation.
        """
        self.conditions.require_present(batch.obs)
        z1 = normal(batch.keys, Stream.FLOW_NOISE, self.size)
        if isinstance(batch, TrajectoryBatch):
            z0 = self.vae.latents(batch) if batch.whitened is None else batch.whitened
            return self._trajectory_loss(batch, z0.unflatten(0, batch.mask.shape), z1.unflatten(0, batch.mask.shape))
        z0 = self.vae.latents(batch)
        t = sample_times(self.config.t_sampling, batch.keys, batch.slots, batch.step)
        condition = self.conditions(batch.obs, self._hidden(batch.keys), batch.keys if self.training else None)
        z0, z1, t = z0[:, None, None], z1[:, None, None], t[:, None]
        predicted = self.velocity(interpolate(z0, z1, t), t, condition[:, None])
        return {"loss": velocity_loss(predicted, velocity(z0, z1))}

    def check_batch(self, batch: CellBatch) -> None:
        """See :class:`bgen.train.stages.stage.ChecksBatches`."""
        if isinstance(batch, TrajectoryBatch):
            self.backbone.check_times(batch.mask, batch.time)

    def _trajectory_loss(self, batch: TrajectoryBatch, z0: Tensor, z1: Tensor) -> dict[str, Tensor]:
        B, T, N = batch.mask.shape
        read = z0
        if batch.moved is not None:
            z0 = z0 + batch.moved[:, :, None]
        keys_BT, slots_BT = batch.keys.view(B, T, N)[..., 0], batch.slots.view(B, T, N)[..., 0] // (T * N)
        keys_B, patterns = keys_BT[:, 0], self.config.patterns
        places = torch.arange(T, device=slots_BT.device).repeat(B)
        t = sample_times(self.config.t_sampling, keys_BT.flatten(), slots_BT.flatten(), batch.step, places).view(B, T)
        independent_B1 = uniform(keys_B, Stream.SHARED_TIME, 1) < patterns.independent
        t = torch.where(independent_B1, t, t[:, :1])
        weights = {name: getattr(patterns, name) for name in PATTERNS}
        observed = draw_observed(keys_B, batch.exists, batch.control, weights)
        t = torch.where(observed, 0.0, t)
        starts = None
        if self.config.source == "neighbours":
            if self.config.coupling.cells > 0:
                z1 = self._planned(batch, read, observed, z1)
            else:
                moved = start(z0, batch.mask, batch.time, observed, z1, keys_BT)
                z1 = couple(z0, moved, batch.mask, ~observed & observed.any(1, keepdim=True))
            starts = self._starts(batch.mask, batch.time, observed)
        hidden, keys = self._hidden(keys_B).repeat_interleave(T, 0), keys_B.repeat_interleave(T)
        condition, acting = (
            part.view(B, T, -1)
            for part in self.conditions.with_acting(batch.population_obs(), hidden, keys if self.training else None)
        )
        shift = self._shift(acting, batch.mask, observed)
        z_t = interpolate(z0, z1, t)
        predicted = self.velocity(z_t, t, condition, batch.mask, batch.time, starts, shift)
        counts = batch.mask & ~observed[..., None]
        loss_B = velocity_loss(predicted, velocity(z0, z1), counts)
        if self.config.endpoint > 0:
            loss_B = loss_B + self.config.endpoint * endpoint_loss(z_t - over_cells(t) * predicted, z0, counts)
        if self.growth is not None and starts is not None:
            time = batch.time / self.config.backbone.time.scale
            loss_B = loss_B + self.growth.loss(z0, z1, condition.detach(), batch.mask, time, observed, starts)
        return {"loss": loss_B.repeat_interleave(T * N)}

    def _planned(self, batch: TrajectoryBatch, read: Tensor, observed: Tensor, noise: Tensor) -> Tensor:
        """Return the start of every cell by the plans of whole populations; ``read`` are latents that nothing moved."""
        assert self.plans is not None, "the stage gives them before the first batch"
        assert batch.population is not None, "batches of such a stage say which populations they hold"
        uniform_BTN = uniform(batch.keys, Stream.PARTNER, 1).view(batch.mask.shape)
        return self.plans.start(
            read, batch.mask, batch.time, observed, noise, batch.population, uniform_BTN, batch.moved
        )

    def _shift(self, acting: Tensor, mask: Tensor, observed: Tensor) -> Tensor | None:
        """Return what members do to all cells alike ``[B, T, D + 1]``, at time points beside an observed one.

        It is that of the members ``acting [B, T, C]`` beyond those that act at that one already: on control cells all.
        """
        if not self.conditions.set_names or self.config.source != "neighbours":
            return None
        before, after = neighbours(mask.any(-1), observed)
        beside = (before >= 0) ^ (after >= 0)
        source = torch.where(before >= 0, before, after).clamp_min(0)
        already = acting.gather(1, source[..., None].expand_as(acting))
        shift: Tensor = self.shift(acting - already)
        return shift * (beside & ~observed)[..., None]

    def _starts(self, mask: Tensor, time: Tensor, observed: Tensor) -> Starts:
        """What the network's output means at each time point."""
        return starts_of(time, mask.any(-1), observed, self.config.backbone.time.scale)

    def _hidden(self, keys: Tensor) -> Tensor:
        """Return which cells have their conditions hidden, ``[B]``, or which of them, ``[B, K]``."""
        jointly, each = self.config.condition_dropout, self.config.condition_dropout_each
        n = len(self.conditions.told_apart)
        return drop_conditions(keys, jointly, each, n) if self.training else drop_conditions(keys, 0.0)

    def training_flops(self, batch: CellBatch) -> int:
        """Floating-point operations: forward and backward through the network, forward through the frozen codec."""
        B, T, N = batch.mask.shape if isinstance(batch, TrajectoryBatch) else (len(batch), 1, 1)
        latents = self.vae.latents_flops(len(batch), len(batch.counts))
        growth = 0 if self.growth is None else self.growth.flops(B, T, N)
        return latents + 3 * (self.backbone.flops(B, T, N) + self.conditions.flops(B * T) + growth)

    def learning_rate_scales(self) -> dict[str, float]:
        """See :class:`bgen.nn.mup.Transfers`."""
        if self.config.backbone.transfer_from is None:
            return {}
        names = {id(module): name for name, module in self.named_children()}
        return {
            f"{names[id(module)]}.{name}": scale
            for module, twin in self._twins()
            for name, scale in learning_rate_scales(module, twin).items()
        }

    def _twins(self) -> list[tuple[nn.Module, nn.Module]]:
        """Pair what is trained with itself at the width that the learning rate is transferred from."""
        base = self.config.backbone.narrowed()
        categories = self.conditions.sizes
        numbers = dict.fromkeys(self.conditions.number_names, (0.0, 1.0))
        with torch.device("meta"):
            sets = {name: part.sizes for name, part in self.conditions.member_embeddings.items()}
            conditions = ConditionEmbedding(categories, numbers, base.width, sets)
            twins: list[tuple[nn.Module, nn.Module]] = [
                (self.conditions, conditions),
                (self.backbone, build_backbone(self.size, base, self.outputs)),
            ]
            if self.growth is not None:
                twins.append((self.growth, GrowthRate(self.size, base.width)))
            return [*twins, (self.shift, nn.Linear(base.width, self.size, bias=False))] if sets else twins

    def velocity(
        self,
        z_t: Tensor,
        t: Tensor,
        condition: Tensor,
        mask: Tensor | None = None,
        time: Tensor | None = None,
        starts: Starts | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Velocity ``[B, T, N, D + 1]`` at ``z_t`` of that shape.

        ``t [B, T]``, embedded ``condition [B, T, C]``, and ``mask [B, T, N]``, ``time [B, T]`` and ``starts`` (None:
        all from noise) of a trajectory; ``shift [B, T, D + 1]`` is added to that of every cell.
        """
        outputs = self.backbone(z_t, t, condition, mask, time).float()
        if starts is not None:
            v = starts.velocity(outputs)
            return v if shift is None else v + shift[:, :, None].float()
        output = outputs[..., : self.size]  # of those of KINDS, noise is the first
        return velocity_from_data(z_t, output, t) if self.config.prediction == "data" else output

    def sample(
        self,
        conditions: Mapping[str, Tensor],
        n: int,
        keys: Tensor,
        settings: SampleConfig,
        log_library: Tensor | None = None,
    ) -> Tensor:
        """Generate whitened latents ``[n, D + 1]``; ``vae.unwhiten`` and ``vae.decode`` turn them into counts.

        What is given may lie on the CPU; the result is where the model is.

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
            coordinate is then held on its own straight path, ``(1 - t) fixed + t noise``, at every t, so the state is
            generated to go with that size. Give ``vae.decode`` the same sizes, because ``vae.unwhiten`` would limit
            them.
        """
        assert len(keys) == n, "one key per cell"
        columns = {name: column[:, None] for name, column in conditions.items()}
        library = None if log_library is None else log_library[:, None, None]
        return self._integrate(columns, keys[:, None, None], settings, library, None)[:, 0, 0]

    def sample_trajectories(
        self,
        conditions: Mapping[str, Condition],
        keys: Tensor,
        settings: SampleConfig,
        places: Places,
        log_library: Tensor | None = None,
    ) -> Tensor:
        """Generate whitened latents ``[B, T, N, D + 1]`` where nothing is observed, given what is.

        Joint generation, forecast, interpolation and prediction of a perturbation are the same call with different time
        points observed. Observed latents come back as they were given; places without a cell are zero. What is given
        may lie on the CPU, where alone times are checked (:meth:`Backbone.check_times`); the result is where the model
        is.

        Parameters
        ----------
        conditions
            Column to codes, numbers or sets per population, ``[B, T]``, otherwise as in :meth:`sample`.
        keys
            int64 ``[B, T, N]``: the noise is a pure function of them.
        settings
            Solver, steps, guidance.
        places
            Which cells there are, when, and what is known.
        log_library
            ``[B, T, N]``, otherwise as in :meth:`sample`.
        """
        assert keys.shape == places.mask.shape, "one key per place"
        assert (places.observed is None) == (places.latents is None), "what is observed is given, and nothing else"
        return self._integrate(conditions, keys, settings, log_library, places)

    @torch.no_grad()
    def grown(self, z: Tensor, conditions: Mapping[str, Condition], gap: float) -> Tensor | None:
        """Return how often each cell of an observed population is the start of cells a ``gap`` later, relatively.

        ``z [n, D + 1]`` are whitened latents, ``conditions`` those of the population, ``[1]`` each; None: all alike.
        What is given may lie on the CPU; the result is where the model is.
        """
        if self.growth is None:
            return None
        device = self.vae.device
        told = {name: column.to(device) for name, column in conditions.items()}
        shown = torch.zeros(1, dtype=torch.bool, device=device)
        rates: Tensor = self.growth(z.to(device), self.conditions(told, shown))
        return (rates * (gap / self.config.backbone.time.scale)).softmax(0)

    @torch.no_grad()
    def _integrate(
        self,
        conditions: Mapping[str, Condition],
        keys: Tensor,
        settings: SampleConfig,
        log_library: Tensor | None,
        places: Places | None,
    ) -> Tensor:
        """Carry noise to latents ``[B, T, N, D + 1]``."""
        self.conditions.require_known(conditions)
        device = self.vae.device
        if places is not None:
            if places.time.device.type == "cpu":
                self.backbone.check_times(places.mask, places.time)
            places = places.to(device)
        keys = keys.to(device, non_blocking=True)
        conditions = {name: column.to(device, non_blocking=True) for name, column in conditions.items()}
        log_library = None if log_library is None else log_library.to(device, non_blocking=True)
        z1 = settings.noise * normal(keys.flatten(), Stream.FLOW_START, self.size).unflatten(0, keys.shape)
        columns = {name: column.flatten() for name, column in conditions.items()}
        v = self._guided(columns, settings, keys, places)
        if places is not None and places.start is not None:
            z1 = places.start
        elif places is not None and self.config.source == "neighbours":
            z1 = _start(places, z1, keys)  # before the library is held: its way begins where the cell does
        if log_library is not None:
            v = _hold_last(v, z1[..., -1] - self.vae.whiten_library(log_library))
        if places is None:
            return integrate(v, z1, settings.steps, settings.solver, settings.tolerance)
        if places.observed is not None and places.latents is not None:
            moving = places.mask & ~places.observed[..., None]
            z1, v = torch.where(places.observed[..., None, None], places.latents, z1), _hold(v, moving)
        z0 = integrate(v, z1, settings.steps, settings.solver, settings.tolerance)
        return z0 * places.mask[..., None]

    def _guided(
        self, columns: Mapping[str, Condition], settings: SampleConfig, keys: Tensor, places: Places | None
    ) -> Velocity:
        """``v(z, t)`` under conditions ``[B T]``, guided as the settings say; UserError if training forbids it."""
        known, shape = self.conditions.told_apart, keys.shape[:2]
        self._require_guidable(settings)
        shown = torch.zeros(shape.numel(), dtype=torch.bool, device=keys.device)
        of_each = []
        for name, scale in settings.guidance_of.items():
            hidden = torch.zeros(shape.numel(), len(known), dtype=torch.bool, device=keys.device)
            hidden[:, known.index(name)] = True
            of_each.append((self._velocity_at(columns, hidden, shape, places), scale))
        return guide(
            self._velocity_at(columns, shown, shape, places),
            self._velocity_at(columns, ~shown, shape, places),
            settings.guidance,
            settings.guidance_interval,
            of_each,
        )

    def _require_guidable(self, settings: SampleConfig) -> None:
        """Raise UserError for guidance by what training never hid."""
        known = self.conditions.told_apart
        for name in settings.guidance_of:
            if name not in known:
                raise UserError(f"There is no condition '{name}' to be guided by.{nearest(name, known)}")
        single = any(scale != 1 for scale in settings.guidance_of.values())
        hidden_each = self.config.condition_dropout_each > 0
        if single and len(known) > 1 and not hidden_each:
            raise UserError(
                "The model cannot be guided by single conditions: training hid all of them together only. Train it with"
                " flow.condition_dropout_each=0.1, or guide by all together (--guidance)."
            )
        jointly = settings.guidance != 1 or (single and len(known) == 1)
        hidden_jointly = self.config.condition_dropout > 0 or (hidden_each and len(known) == 1)
        if jointly and known and not hidden_jointly:
            raise UserError(
                "The model cannot be guided: training always told it the conditions. Train it with"
                " flow.condition_dropout=0.15, or leave guidance at 1."
            )

    def _velocity_at(
        self, columns: Mapping[str, Condition], hidden: Tensor, shape: tuple[int, ...], places: Places | None
    ) -> Velocity:
        """``v(z, t)`` for ``z [B, T, N, D + 1]`` under conditions ``[B T]``, hidden or not; observed time points are at
        t = 0.
        """
        condition, acting = (part.unflatten(0, shape) for part in self.conditions.with_acting(columns, hidden))
        mask, time = (None, None) if places is None else (places.mask, places.time)
        observed = None if places is None else places.observed
        starts, shift = None, None
        if self.config.source == "neighbours" and places is not None and places.observed is not None:
            starts = self._starts(places.mask, places.time, places.observed)
            shift = self._shift(acting, places.mask, places.observed)

        def v(z: Tensor, t: float) -> Tensor:
            times = torch.full(z.shape[:2], t, device=z.device)
            if observed is not None:
                times = times * ~observed
            return self.velocity(z, times, condition, mask, time, starts, shift)

        return v


def _start(places: Places, z1: Tensor, keys: Tensor) -> Tensor:
    """Return what the noise ``z1 [B, T, N, D + 1]`` becomes where observed time points tell where to start."""
    if places.observed is None or places.latents is None:
        return z1
    return start(places.latents, places.mask, places.time, places.observed, z1, keys[..., 0])


def _hold_last(v: Velocity, slope: Tensor) -> Velocity:
    """Replace the last coordinate's velocity by a constant ``slope``; every solver integrates that exactly."""

    def held(z: Tensor, t: float) -> Tensor:
        return torch.cat((v(z, t)[..., :-1], slope[..., None]), dim=-1)

    return held


def _hold(v: Velocity, moving: Tensor) -> Velocity:
    """Let only the cells ``moving [B, T, N]`` move."""

    def held(z: Tensor, t: float) -> Tensor:
        return v(z, t) * moving[..., None]

    return held
