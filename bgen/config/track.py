"""Settings of what is recorded of a run, and where."""

from __future__ import annotations

from pydantic import Field

from bgen.config.section import Address, Section


class TrackConfig(Section):
    """Where metrics go. The JSONL record in the run folder is always written; the others mirror it."""

    mlflow: bool = Field(True, description="Mirror the record to MLflow.")
    uri: Address | None = Field(
        None,
        description="Default: MLFLOW_TRACKING_URI, else sqlite beside the run folder. A password in it is written "
        "nowhere; for `bgen track sync` later, set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
    )
    tensorboard: bool = Field(False, description="Mirror it to OUT/tensorboard too (extra tensorboard).")
    wandb: bool = Field(
        False,
        description="Mirror it to Weights & Biases too (extra wandb); WANDB_MODE=offline keeps it in the run folder.",
    )
    experiment: str = "bgen"
    run_name: str | None = Field(None, description="Default: the run folder's name.")
    progress: bool = Field(True, description="Show a progress bar on rank 0.")
    checkpoints: bool = Field(False, description="Send each checkpoint to MLflow too, as an artifact of the run.")
    system: bool = Field(True, description="Record each host's CPU, memory, disk, network and GPU use.")
