"""What a user holds: an exported model with all its verbs, AnnData in and AnnData out."""

from __future__ import annotations

import html
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

import pandas as pd

from bgen.distributed.world import device_of
from bgen.errors import UserError
from bgen.hub.addresses import fetch, is_address
from bgen.hub.directory import SavedModel, load_directory, save_model
from bgen.nn.precision import precision_of
from bgen.notebooks import progress_bar
from bgen.progress import Say
from bgen.store.store import Store
from bgen.tasks.cells.verbs import CellVerbs
from bgen.tasks.extend import extend_model
from bgen.tasks.gene_list import GeneList
from bgen.tasks.perturb.verbs import PerturbVerbs
from bgen.tasks.time.verbs import GeneratorVerbs
from bgen.tasks.user_cells import Cells, Reading
from bgen.track import record

if TYPE_CHECKING:
    from bgen.evaluate.protocols.scores import Scores


class Model(GeneratorVerbs, CellVerbs, PerturbVerbs):
    """An exported model, loaded, with a method for each verb of the command line.

    A method that takes cells takes a file of any format that ``bgen data check`` reads, a store, AnnData in memory, or
    the result of :meth:`read`, whose keyword arguments each of them has.

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

        Examples
        --------
        >>> import bgen
        >>> history = bgen.load("bgen-demo/vae/model").history  # `bgen demo` makes it
        >>> "train/loss" in history and "valid/loss" in history
        True
        """
        found = {} if self.folder is None else record.beside(self.folder)
        if not found:
            raise UserError("No record of a training lies beside this model: it was moved, or is in memory only.")
        return pd.concat({stage: record.as_frame(rows) for stage, rows in found.items()}, names=["stage"])

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the model as a directory that :func:`bgen.load` reads anywhere: safetensors and JSON, no pickle.

        Parameters
        ----------
        folder
            New folder; it becomes the model's own.

        Raises
        ------
        UserError
            If the folder is there and not empty.

        Examples
        --------
        >>> import bgen
        >>> model = bgen.load("bgen-demo/model")  # which `bgen demo` makes
        >>> folder = model.save("for-my-colleague")
        >>> bgen.load(folder).saved.fingerprint() == model.saved.fingerprint()
        True
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

        Parameters
        ----------
        data
            A store with splits train and test, or its folder or address.
        out
            New folder for ``report.html`` and ``metrics.json``. The card in the model's own directory gets the scores,
            too.
        seeds
            Repetitions of each figure: which cells are compared.
        progress
            Show a progress bar.

        Returns
        -------
        Scores
            A table where it is shown; :func:`bgen.plot.scores` draws it; ``headline()`` is a sentence to quote.

        Raises
        ------
        UserError
            If the model generates no cells, the store has no such splits or other genes, or ``out`` is not empty.

        Examples
        --------
        >>> import bgen
        >>> model = bgen.load("bgen-demo/model")  # `bgen demo` makes it, and the store
        >>> scores = model.evaluate("bgen-demo/store", "report", seeds=2, progress=False)
        >>> bool(scores.headline())
        True
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
        say: Say | None = None,
        **reading: Unpack[Reading],
    ) -> Model:
        """Adapt the model to cells, and return the new one, which is also written to ``out/model``.

        Parameters
        ----------
        data
            Your cells, with raw counts: a file, a store, or AnnData in memory.
        out
            New folder of the run.
        task
            What it is adapted to: "generate" (your cells), "annotate" (their ``label``), "perturb" (a screen) or "time"
            (a time course).
        mode
            How much is trained: "full", "lora" or "head".
        label
            annotate: obs column of the labels.
        perturbation, control, separator
            perturb: obs column of the perturbations, its label or labels of control cells, and what stands between
            the members of a combination (default: found, or "+").
        dose
            perturb: obs column of doses.
        time
            time: obs column of times.
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
        say
            Told what is matched, new and trained; default: it is printed.
        reading
            ``counts``, ``gene_column``, ``floor`` and others: see :meth:`read`.

        Raises
        ------
        UserError
            If the model is in memory only (:meth:`save` it first), the cells or columns do not fit task or model, or
            ``out`` is not empty.

        Examples
        --------
        >>> import bgen
        >>> model = bgen.load("bgen-demo/model")  # `bgen demo` makes it, and the cells
        >>> quick = ["train.steps=5", "track.mlflow=false", "track.progress=false"]  # an example; leave train.steps out
        >>> mine = model.finetune(
        ...     "bgen-demo/cells.h5ad", "mine", task="generate", mode="lora", overrides=quick, say=lambda sentence: None
        ... )
        >>> mine.generate(10, seed=0).n_obs
        10
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
        finetune(self.folder, data, Path(out), request, overrides=overrides, resume=resume, say=say)
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
        """Return a model that also knows genes which it was not trained on, by what is known of them.

        The model must have vectors of genes: from files or gene sets (``vectors`` of its encoder and decoder).

        Parameters
        ----------
        genes
            Ids; a file or table of them; or cells that have them. Those that the model knows stay as they are; those
            of which nothing is known are left out, and named.
        vectors
            Files with vectors of the new genes, made in the same way as those of training, whose files lack them.
        sets
            Gene sets (.gmt) with the names of those of training, and the new genes.
        orthologs
            File with a new gene and, in the second column, the gene of the model whose vector it gets.
        gene_column
            Column with the ids of ``genes``.
        say
            Told how many genes are known by what, and how well.

        Raises
        ------
        UserError
            If the model has no vectors, a file cannot be used, or no gene is left to be added.

        Examples
        --------
        >>> import anndata, bgen, numpy, pandas
        >>> cells = anndata.read_h5ad("bgen-demo/cells.h5ad")  # which `bgen demo` makes
        >>> names = [*cells.var_names, "new"]
        >>> vectors = pandas.DataFrame(numpy.random.default_rng(0).normal(size=(len(names), 5)), index=names)
        >>> vectors.to_csv("vectors.csv")
        >>> known = {"name": "gene_table", "rows": 6, "vectors": {"files": ["vectors.csv"], "size": 4}}
        >>> coded = {"name": "gene_set", "rows": 6, "vectors": {"files": ["vectors.csv"], "size": 4}}
        >>> quick = {"steps": 5, "global_batch": 64, "track": {"progress": False, "mlflow": False}}
        >>> vae = bgen.train_vae(cells, "vae", encoder=coded, decoder=known, fit_levels=False, **quick)
        >>> grown = vae.model.add_genes(["new"], say=lambda sentence: None)
        >>> len(grown.genes) - len(vae.model.genes)
        1
        """
        saved = extend_model(
            self.saved, genes, vectors=vectors, sets=sets, orthologs=orthologs, gene_column=gene_column, say=say
        )
        return Model(saved)


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
        If it is no model, is incomplete or damaged, comes from a newer bgen, or has another fingerprint; if there is no
        such device; or if the hub or registry has no such model, or cannot be asked.

    Examples
    --------
    >>> import bgen
    >>> model = bgen.load("bgen-demo/model")  # which `bgen demo` makes
    >>> sorted(model.conditions)
    ['cell_type', 'perturbation', 'time']
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
