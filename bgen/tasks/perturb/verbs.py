"""The verbs of a loaded model that perturb a user's cells: perturb and screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack

import pandas as pd
from anndata import AnnData

from bgen.progress import Progress
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.perturb.perturb import perturb_cells
from bgen.tasks.perturb.rank import rank_perturbations
from bgen.tasks.perturb.table import perturb_table
from bgen.tasks.user_cells import Cells, Reading, UserCells


class PerturbVerbs(AnnDataModel):
    """What a model that was trained on perturbations does with control cells."""

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
        """Predict what control cells become under a perturbation. They keep their counts where nothing changes.

        Parameters
        ----------
        data
            A file, a store, AnnData in memory, or what :meth:`read` gave.
        perturbation
            A gene or drug, or several: a label as in the training data ("A+B"), or a list. Or a table with a column
            ``perturbation``, and ``dose`` and ``time`` where the model needs them: the cells of all its rows.
        control
            obs column and value that choose the control cells; "all": all are controls; None: those with the model's
            own control labels, or all if the data does not have that column.
        dose
            In the unit of training, or text with a unit ("10 uM"); needed where training had several doses.
        time
            Since the perturbation, in the model's unit; needed where training had several times.
        n
            Cells to predict (of each row); default: one for each control cell.
        seed
            The same seed gives the same cells.
        reading
            ``counts``, ``gene_column``, ``floor`` and others: see :meth:`read`.

        Returns
        -------
        AnnData
            Integer counts (CSR float32) of the model's genes, and the control cells' obs with ``control_cell`` (the
            cell that each was predicted from), ``perturbation`` and ``dose``; of a table, ``query`` is the number
            of the row. ``uns["bgen"]`` says what training has not seen, and which cells were the controls.

        Raises
        ------
        UserError
            If the model knows no perturbations, there are no control cells, or nothing is known of the perturbation.

        Examples
        --------
        >>> import anndata
        >>> import bgen
        >>> screen = anndata.read_h5ad("bgen-demo/cells.h5ad")  # which `bgen demo` makes
        >>> model = bgen.load("bgen-demo/model").finetune(
        ...     screen, "screen", task="perturb", perturbation="perturbation", control="control", mode="head",
        ...     overrides=["train.steps=5", "track.mlflow=false", "track.progress=false"],  # few steps: an example
        ...     say=lambda sentence: None,
        ... )
        >>> label = next(label for label in screen.obs["perturbation"].unique() if label != "control")
        >>> cells = model.perturb(screen, label, n=100, seed=0)
        >>> cells.n_obs, cells.obs["perturbation"].unique().tolist() == [label]
        (100, True)
        """
        cells = self.read(data, **reading)
        if isinstance(perturbation, pd.DataFrame):
            return perturb_table(self, cells, perturbation, control=control, n=n, seed=seed, progress=progress)
        return perturb_cells(
            self, cells, perturbation, control=control, dose=dose, time=time, n=n, seed=seed, progress=progress
        )

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

        Parameters
        ----------
        data
            A file, a store, AnnData in memory, or what :meth:`read` gave.
        towards
            obs column and value of the cells that control cells are to become.
        perturbations
            Labels, also those that training has not seen; None: all that it has.
        control, time, seed
            As for :meth:`perturb`.
        dose
            As for :meth:`perturb`; None: the highest that each was trained at.
        reading
            ``counts``, ``gene_column``, ``floor`` and others: see :meth:`read`.

        Returns
        -------
        DataFrame
            Best first: ``perturbation``, ``dose``, ``nearer`` (the share of the distance to the target that it
            closes), ``way`` (cosine of the mean movement with the way from control to target), ``moved`` (its
            length over that of the way) and ``seen`` (whether training had it).

        Raises
        ------
        UserError
            If there are too few target or control cells, or the model does not know a perturbation.

        Examples
        --------
        >>> import anndata
        >>> import bgen
        >>> cells = anndata.read_h5ad("bgen-demo/cells.h5ad")  # which `bgen demo` makes
        >>> model = bgen.load("bgen-demo/model").finetune(
        ...     cells, "screen", task="perturb", perturbation="perturbation", control="control", mode="head",
        ...     overrides=["train.steps=5", "track.mlflow=false", "track.progress=false"],  # few steps: an example
        ...     say=lambda sentence: None,
        ... )
        >>> label = next(label for label in cells.obs["perturbation"].unique() if label != "control")
        >>> ranked = model.screen(cells, towards=("perturbation", label))
        >>> ranked.columns.tolist()
        ['perturbation', 'dose', 'nearer', 'way', 'moved', 'seen']
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
