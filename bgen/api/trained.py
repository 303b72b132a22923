"""What training from Python gives back: the run's folder, its history and curves, and the model."""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from bgen.plot import training
from bgen.tasks.load import Model, load_model
from bgen.track import record
from bgen.track.output import RECORD
from bgen.train.run import MODEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Trained:
    """A training that came to its end.

    Attributes
    ----------
    folder
        Run folder: checkpoints, record, resolved configuration, and the model.
    store
        Folder or address of the store that it learnt from; hand it to the next training.

    Examples
    --------
    >>> import bgen
    >>> from data_tools.simulate.simulate import simulate
    >>> quick = {"steps": 20, "global_batch": 64, "track": {"progress": False, "mlflow": False}}
    >>> vae = bgen.train_vae(simulate("tiny", seed=0), "vae", **quick)
    >>> int(vae.history.index.max()), vae.model.saved.kind
    (20, 'vae')
    >>> vae.plot().figure.savefig("losses.png")
    """

    folder: Path
    store: str

    @cached_property
    def model(self) -> Model:
        """The model, with all verbs; ``model.save`` puts it elsewhere."""
        return load_model(self.folder / MODEL)

    @property
    def history(self) -> pd.DataFrame:
        """What was recorded, a row for each step: columns such as ``train/loss`` and ``valid/nll``."""
        return record.as_frame(record.read(self.folder / RECORD))

    def plot(self, axis: Axes | None = None) -> Axes:
        """Draw the loss over the steps, of training and of held-out cells; returns the matplotlib Axes."""
        return training(self.history, axis)

    def _repr_html_(self) -> str:
        last = self.history.ffill().tail(1).round(4).T
        last.columns = ["last value"]
        return f"<p>{html.escape(repr(self))}</p>{last.to_html()}{self.model._repr_html_()}"

    def __repr__(self) -> str:
        return f"<bgen training in {self.folder}: {self.model!r}>"
