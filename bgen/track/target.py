"""What a mirror sends where: all of it can be written as JSON, since the mirror is a process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bgen.passwords import without_passwords

Kind = Literal["mlflow", "tensorboard", "wandb"]
TITLES: dict[Kind, str] = {"mlflow": "MLflow at", "tensorboard": "TensorBoard in", "wandb": "Weights & Biases,"}


@dataclass(frozen=True)
class Target:
    """What is sent where.

    Attributes
    ----------
    record
        The JSONL file; rows are only ever appended while something is sent from it.
    uri
        MLflow's tracking URI; folder of TensorBoard's event files; what W&B calls the project.
    experiment, run_name
        Where the run appears.
    run
        Identifier of the training run, the same across restarts; the MLflow run carries it as a tag.
    params
        The resolved configuration, flattened; logged when the run is created (MLflow does not allow changes).
    artifacts
        Files logged at every start, as ``attempt_N/<name>``.
    dataset
        Name, digest and place of the training data: the run's input. None: not said.
    checkpoints
        Folder of checkpoints; those that the record names are logged as ``checkpoints/<name>``. None: they are not.
    kind
        Who gets it; artifacts, dataset and checkpoints go to MLflow alone.
    """

    record: str
    uri: str
    experiment: str
    run_name: str
    run: str
    params: dict[str, str]
    artifacts: list[str]
    dataset: tuple[str, str, str] | None = None
    checkpoints: str | None = None
    kind: Kind = "mlflow"

    @property
    def place(self) -> str:
        """The tracking URI as it may be shown."""
        return without_passwords(self.uri)
