"""What a user holds: an exported model with all its verbs, AnnData in and AnnData out."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import pandas as pd
from anndata import AnnData

from bgen.distributed.world import device_of
from bgen.errors import UserError
from bgen.evaluate.protocols.time_point import TimeScores
from bgen.hub.addresses import fetch, is_address
from bgen.hub.directory import SavedModel, load_directory, save_model
from bgen.nn.precision import precision_of
from bgen.notebooks import progress_bar
from bgen.progress import Progress, Say
from bgen.store.store import Store
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.cells.annotate import annotate_cells
from bgen.tasks.cells.denoise import denoise_cells
from bgen.tasks.cells.embed import embed_cells
from bgen.tasks.cells.integrate import integrate_cells
from bgen.tasks.extend import extend_model
from bgen.tasks.gene_list import GeneList
from bgen.tasks.generate import read_moments, sample_settings
from bgen.tasks.perturb.perturb import perturb_cells
from bgen.tasks.perturb.rank import rank_perturbations
from bgen.tasks.perturb.table import perturb_table
from bgen.tasks.time.axis import TimeAxis
from bgen.tasks.time.observed import observe
from bgen.tasks.time.predict import predict_times
from bgen.tasks.time.trajectories import generate_as_trained
from bgen.tasks.user_cells import Cells, Reading, UserCells
from bgen.track import record

if TYPE_CHECKING:
    from bgen.evaluate.protocols.scores import Scores


class TimeOptions(Reading, total=False):
    """Keyword arguments of :meth:`Model.predict_times` that :meth:`Model.interpolate` and ``forecast`` take, too."""

    n: int | None
    where: Mapping[str, Any] | None
    library_size: float | None
    sample: Mapping[str, Any] | None
    time_column: str | None
    seed: int
    progress: Progress | None


class Model(AnnDataModel):
    """An exported model, loaded, with a method for each verb of the command line.

    A method that takes cells takes a file of any format that ``bgen data check`` reads, AnnData in memory, or the
    result of :meth:`read`. Keyword arguments say how cells are read (:class:`bgen.tasks.user_cells.Reading`).

    Attributes
    ----------
    folder
        The directory that it was loaded from or saved in last; None: it is in memory only.
    """

    def __init__(self, saved: SavedModel, folder: Path | None = None) -> None:
        super().__init__(saved)
        self.folder = folder

    @property
    def history(self) -> pd.DataFrame:
        """What its trainings recorded, a row for each step: columns such as ``train/loss``, a level for each stage.

        Raises
        ------
        UserError
            If the record does not lie beside the model, as it does in a run folder.
        """
        found = {} if self.folder is None else record.beside(self.folder)
        if not found:
            raise UserError("No record of a training lies beside this model: it was moved, or is in memory only.")
        return pd.concat({stage: record.as_frame(rows) for stage, rows in found.items()}, names=["stage"])

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the model as a directory that :func:`bgen.load` reads anywhere: safetensors and JSON, no pickle.

        Raises
        ------
        UserError
            If the folder is there and not empty.
        """
        self.folder = Path(folder)
        save_model(self.saved, self.folder)
        return self.folder

    def evaluate(
        self,
        data: Store | str | Path,
        out: str | PathLike[str],
        *,
        seeds: int = 3,
        seed: int = 0,
        progress: bool = True,
    ) -> Scores:
        """Score generated cells on a store's test split, beside a baseline and a real-versus-real ceiling.

        Writes ``report.html`` and ``metrics.json`` into ``out``; the model's directory gets the scores into its card.
        See :func:`bgen.tasks.evaluate.score`.
        """
        from bgen.tasks.evaluate import score

        with progress_bar() if progress else nullcontext() as advance:
            return score(self, data, Path(out), seeds=seeds, seed=seed, progress=advance)

    def finetune(
        self,
        data: Cells,
        out: str | PathLike[str],
        *,
        task: Literal["generate", "annotate", "perturb", "time"],
        mode: Literal["full", "lora", "head"] = "full",
        label: str | None = None,
        perturbation: str | None = None,
        control: str | Sequence[str] = (),
        separator: str | None = None,
        dose: str | None = None,
        time: str | None = None,
        within: Sequence[str] = (),
        hold_out: Sequence[str] = (),
        network: str | PathLike[str] | None = None,
        add_genes: bool = False,
        overrides: Sequence[str] = (),
        resume: bool = False,
        **reading: Unpack[Reading],
    ) -> Model:
        """Adapt the model to cells, and return the new one, which is also written to ``out/model``.

        Parameters
        ----------
        task
            What it is adapted to: "generate" (your cells), "annotate" (their ``label``), "perturb" (the screen in the
            columns ``perturbation``, with its ``control`` labels, and ``dose``) or "time" (the course in column
            ``time``).
        mode
            How much is trained: "full", "lora" or "head".
        within
            obs columns: perturb compares within them, a trajectory lies within them.
        hold_out
            perturb: labels (or LABEL@DOSE) that are kept from training, and predictions of which are scored.
        network
            perturb: CSV of a regulatory network, for targets that are not in the data.
        add_genes
            Give the model the data's genes that it does not know.
        overrides
            Such as ``train.steps=500``.
        resume
            Go on with what ``out`` holds.

        Raises
        ------
        UserError
            If the model is in memory only (:meth:`save` it first), or as :func:`bgen.tasks.finetune.finetune.finetune`.
        """
        from bgen.tasks.finetune.finetune import finetune
        from bgen.tasks.finetune.request import Request
        from bgen.tasks.perturb.screen import Columns

        if self.folder is None:
            raise UserError("Fine-tuning starts from a model directory: save this model first (model.save).")
        controls = [control] if isinstance(control, str) else list(control)
        columns = None
        if perturbation is not None and controls:
            columns = Columns(perturbation, controls, dose, list(within), separator)
        request = Request(
            task,
            mode,
            label=label,
            columns=columns,
            add_genes=add_genes,
            hold_out=list(hold_out),
            time=time,
            system=list(within),
            network=None if network is None else Path(network),
            **reading,
        )
        finetune(self.folder, data, Path(out), request, overrides=overrides, resume=resume)
        return load_model(Path(out) / "model", str(self.device), precision=self.saved.precision)

    def _repr_html_(self) -> str:
        saved = self.saved
        asked = "; ".join(
            f"{name}: {known if isinstance(known, str) else ', '.join(map(str, known[:8]))}"
            + (f" and {len(known) - 8} more" if not isinstance(known, str) and len(known) > 8 else "")
            for name, known in self.conditions.items()
        )
        facts = {
            "model": f"{saved.about.name} ({saved.kind})",
            "organism": saved.about.organism,
            "genes": f"{len(self.genes):,}",
            "trained on": f"{saved.about.cells:,} cells",
            "can be asked for": asked or "nothing",
            "directory": str(self.folder) if self.folder else "in memory only",
            "fingerprint": saved.fingerprint()[:16],
        }
        rows = "".join(f"<tr><th>{name}</th><td>{html.escape(str(text))}</td></tr>" for name, text in facts.items())
        return f'<table class="bgen-model">{rows}</table>'

    def generate(
        self,
        n: int = 1000,
        *,
        where: Mapping[str, Any] | None = None,
        library_size: float | None = None,
        times: Sequence[float] | Literal["all"] | None = None,
        guidance: float | None = None,
        guidance_of: Mapping[str, float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        steps: int | None = None,
        solver: str | None = None,
        noise: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> AnnData:
        """Generate cells; see :func:`bgen.tasks.generate.generate_cells`.

        With ``times`` ("all": those of the training cells), whole trajectories with n cells at each time point; see
        :func:`bgen.tasks.time.trajectories.generate_trajectories`. A model trained on trajectories takes all times
        unless others are given.
        """
        settings = sample_settings(
            self.saved.sample,
            guidance=guidance,
            guidance_of=self._by_column(guidance_of),
            guidance_interval=guidance_interval,
            steps=steps,
            solver=solver,
            noise=noise,
        )
        return generate_as_trained(
            self.saved,
            n,
            times=times,
            where=where or {},
            library_size=library_size,
            settings=settings,
            seed=seed,
            progress=progress,
        )

    def interpolate(
        self, data: Cells | UserCells, times: float | Sequence[float], **options: Unpack[TimeOptions]
    ) -> AnnData:
        """Generate cells at time points that the data lack, from the time points around; AnnData of integer counts.

        See :meth:`predict_times`.
        """
        return self.predict_times(data, times, forecast=False, **options)[0]

    def forecast(
        self, data: Cells | UserCells, times: float | Sequence[float], **options: Unpack[TimeOptions]
    ) -> AnnData:
        """Generate cells at later time points from the data before them; otherwise as :meth:`interpolate`."""
        return self.predict_times(data, times, forecast=True, **options)[0]

    def predict_times(
        self,
        data: Cells | UserCells,
        times: float | Sequence[float],
        *,
        forecast: bool,
        n: int | None = None,
        where: Mapping[str, Any] | None = None,
        library_size: float | None = None,
        sample: Mapping[str, Any] | None = None,
        time_column: str | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        **reading: Unpack[Reading],
    ) -> tuple[AnnData, dict[float, TimeScores]]:
        """Generate cells at times that are treated as missing from the data, and score them where the data do hold
        them.

        Parameters
        ----------
        data
            Raw counts, and a time for every cell in obs; see :meth:`read`.
        times
            Times asked for, in the model's unit. Cells that the data hold there are not shown to the model; they are
            what it is compared with (also in ``uns['bgen']['scores']`` of the result).
        forecast
            From earlier time points alone; otherwise from both sides.
        n
            Cells per time; None: as many as the data hold there, else the mean of the neighbours.
        where
            Condition to value: only cells that agree are looked at, and such cells are generated.
        library_size
            Expected total counts of every cell; None: generated.
        sample
            Overrides of the model's :class:`bgen.config.flow.SampleConfig`, such as ``{"steps": 4}``.
        time_column
            obs column of the times; None: the model's name of it, or "time".

        Raises
        ------
        UserError
            If the model knows no trajectories, or data, times or conditions do not fit it.
        """
        TimeAxis.of(self.saved)  # before anything is read
        wanted = read_moments(times).tolist()
        asked = where or {}
        given = dict(sample or {})
        given |= {"guidance_of": self._by_column(given.get("guidance_of"))}
        settings = sample_settings(self.saved.sample, **given)
        return predict_times(
            self.saved,
            observe(self, self.read(data, **reading), asked, time_column),
            wanted,
            forecast=forecast,
            where=asked,
            n=n,
            library_size=library_size,
            settings=settings,
            seed=seed,
            progress=progress,
        )

    def _by_column(self, scales: Mapping[str, float] | None) -> dict[str, float] | None:
        """Return scales of guidance by column, given by column or role."""
        return None if scales is None else {self.saved.column_name(name): value for name, value in scales.items()}

    def embed(
        self,
        data: Cells | UserCells,
        *,
        variance: bool = False,
        neighbours: int | None = None,
        **reading: Unpack[Reading],
    ) -> AnnData:
        """Add latent states, and neighbours for scanpy on request; see :func:`bgen.tasks.cells.embed.embed_cells`.

        Raises
        ------
        UserError
            If the model has no latent space; so do :meth:`annotate`, :meth:`denoise` and :meth:`integrate`.
        """
        self.saved.require_vae()
        return embed_cells(self, self.read(data, **reading), variance=variance, neighbours=neighbours)

    def annotate(
        self,
        data: Cells | UserCells,
        label: str | None = None,
        *,
        threshold: float = 0.5,
        **reading: Unpack[Reading],
    ) -> AnnData:
        """Label cells, with probabilities; see :func:`bgen.tasks.cells.annotate.annotate_cells`."""
        self.saved.require_vae()
        return annotate_cells(self, self.read(data, **reading), label, threshold=threshold)

    def denoise(
        self,
        data: Cells | UserCells,
        *,
        library_size: float | None = None,
        genes: Sequence[str] | None = None,
        **reading: Unpack[Reading],
    ) -> AnnData:
        """Add expected counts as a layer; see :func:`bgen.tasks.cells.denoise.denoise_cells`."""
        self.saved.require_vae()
        return denoise_cells(self, self.read(data, **reading), library_size=library_size, genes=genes)

    def integrate(
        self,
        data: Cells | UserCells,
        *,
        reference: str | None = None,
        batch: str | None = None,
        label: str | None = None,
        neighbours: int | None = None,
        **reading: Unpack[Reading],
    ) -> AnnData:
        """Add a latent and counts without batch effects; see :func:`bgen.tasks.cells.integrate.integrate_cells`."""
        self.saved.require_vae()
        cells = self.read(data, **reading)
        return integrate_cells(self, cells, reference=reference, batch=batch, label=label, neighbours=neighbours)

    def perturb(
        self,
        data: Cells | UserCells,
        perturbation: str | Sequence[str] | pd.DataFrame,
        *,
        control: tuple[str, str] | Literal["all"] | None = None,
        dose: float | str | None = None,
        time: float | None = None,
        n: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        **reading: Unpack[Reading],
    ) -> AnnData:
        """Predict perturbed cells from control cells; see :func:`bgen.tasks.perturb.perturb.perturb_cells`.

        A table of perturbations gives the cells of all its rows: see :func:`bgen.tasks.perturb.table.perturb_table`.
        """
        cells = self.read(data, **reading)
        if isinstance(perturbation, pd.DataFrame):
            return perturb_table(self, cells, perturbation, control=control, n=n, seed=seed, progress=progress)
        return perturb_cells(
            self, cells, perturbation, control=control, dose=dose, time=time, n=n, seed=seed, progress=progress
        )

    def add_genes(
        self,
        genes: GeneList,
        *,
        vectors: Sequence[str | PathLike[str]] = (),
        sets: str | PathLike[str] | None = None,
        orthologs: str | PathLike[str] | None = None,
        gene_column: str | None = None,
        say: Say = print,
    ) -> Model:
        """Return a model with further genes, which no training has seen; see :func:`bgen.tasks.extend.extend_model`."""
        saved = extend_model(
            self.saved, genes, vectors=vectors, sets=sets, orthologs=orthologs, gene_column=gene_column, say=say
        )
        return Model(saved)

    def screen(
        self,
        data: Cells | UserCells,
        towards: tuple[str, str],
        *,
        perturbations: Sequence[str] | None = None,
        control: tuple[str, str] | Literal["all"] | None = None,
        dose: float | str | None = None,
        time: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        **reading: Unpack[Reading],
    ) -> pd.DataFrame:
        """Rank perturbations by how far they move control cells towards other cells of the data.

        See :func:`bgen.tasks.perturb.rank.rank_perturbations`.
        """
        return rank_perturbations(
            self,
            self.read(data, **reading),
            towards,
            perturbations=perturbations,
            control=control,
            dose=dose,
            time=time,
            seed=seed,
            progress=progress,
        )


def load_model(
    folder: str | Path,
    device: str = "auto",
    *,
    precision: str = "float32",
    revision: str | None = None,
    fingerprint: str | None = None,
) -> Model:
    """Load an exported model directory, or a model of a hub.

    Parameters
    ----------
    folder
        A model directory; or ``hf://owner/name`` (extra ``hub``) or ``models:/name/version`` (MLflow's registry), of
        which a copy is kept in a cache.
    device
        Where its network runs: "cpu", "cuda", "cuda:1", "mps", or "auto": a GPU with CUDA if there is one, else the
        CPU. Cells and results are in the CPU's memory anyhow.
    precision
        Of its encoder and flow: "float32", or "bf16", faster on GPUs and less exact (:mod:`bgen.nn.precision`).
    revision
        Of a hub: branch, tag or commit; of a registry: version or alias; default: the newest. Only a commit or a
        version is the same for ever.
    fingerprint
        The first digits, or all, of the fingerprint that the model must have: others are refused.

    Raises
    ------
    UserError
        If it is no model, is incomplete or damaged, or comes from a newer bgen, if there is no such device or
        precision; or as :func:`bgen.hub.addresses.fetch`.
    """
    if is_address(folder):
        place = fetch(folder, revision)
    elif revision is not None:
        raise UserError(f"{folder} is a folder of this machine, which has no revisions.")
    else:
        place = Path(folder)
    saved = load_directory(place, device_of(device))
    model = Model(replace(saved, precision=precision_of(precision, saved.device)), place)
    if fingerprint is not None and not (fingerprint and model.saved.fingerprint().startswith(fingerprint.lower())):
        raise UserError(
            f"{folder} has other weights than asked for: its fingerprint is {model.saved.fingerprint()}, not"
            f" {fingerprint}."
        )
    return model
