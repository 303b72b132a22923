"""Train one side of ``bgen bench train --versus`` in a process of its own: ``python versus_worker.py JSON``.

This file runs in the side's own Python environment, where bgen need not be, so it imports nothing of bgen but to train
bgen. Both sides train as their users would, with data loading, logging and checkpoints; then the same function here
judges both on the same held-out cells, in float64.

Axes: B cells, G genes, D latent size.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLES = 10
"""Posterior samples per held-out cell."""

JUDGED_AT_ONCE = 512


@dataclass(frozen=True)
class Job:
    """What to train.

    Attributes
    ----------
    side
        Name of a function below.
    folder
        Holds ``train.npz`` and ``test.npz`` (counts as scipy CSR), and ``store``, the same for bgen.
    out
        New folder for what the training leaves.
    batch, epochs, kl_epochs
        Cells per step; passes over the training cells; passes over which the KL weight rises from 0 to 1.
    hidden, latent
        Width of the one hidden layer of encoder and decoder, and size of the latent.
    learning_rate
        Adam's; bgen warms up and decays from it, scvi-tools keeps it.
    precision
        bgen's ``train.precision``.
    ranks, threads
        Processes of bgen, and threads of torch in each; None: as many as the side takes by itself.
    seed
        Seed.
    """

    side: str
    folder: str
    out: str
    batch: int
    epochs: int
    kl_epochs: int
    hidden: int
    latent: int
    learning_rate: float
    precision: str
    ranks: int
    threads: int | None
    seed: int


@dataclass(frozen=True)
class Trained:
    """What a side hands over.

    Attributes
    ----------
    version
        Of the side's library.
    cells, seconds
        Cells that were trained on after the first epoch, and how long it took.
    judge
        Yields blocks of held-out cells: counts ``[B, G]``, mean and log-variance of the posterior ``[B, D]``, and the
        function from z ``[B, D]`` to mean ``[B, G]`` and inverse dispersion ``[G]``; all float64 arrays.
    """

    version: str
    cells: int
    seconds: float
    judge: Callable[[], Iterator[tuple[Any, Any, Any, Callable[[Any], tuple[Any, Any]]]]]


def bgen(job: Job) -> Trained:
    """Train with ``bgen train``'s own function, on a store."""
    import numpy as np
    import torch

    from bgen.config.load import load_config
    from bgen.data.loader import CountReader
    from bgen.hub.directory import load_directory
    from bgen.store.open import open_store
    from bgen.track.record import read
    from bgen.train.run import train
    from bgen.version import __version__

    store = open_store(str(Path(job.folder) / "store"))
    epoch = len(store.cells_of_split("train")) / job.batch
    per_epoch = math.ceil(epoch)
    settings = {
        "data.store": store.folder,
        "out": job.out,
        "seed": job.seed,
        "vae.hidden": job.hidden,
        "vae.latent": job.latent,
        "vae.blocks": 0,
        "vae.kl_weight": 1.0,
        "vae.thinning": 0.0,  # the same objective as scvi-tools'
        "vae.kl_warmup": math.ceil(job.kl_epochs * epoch),
        "train.steps": math.ceil(job.epochs * epoch),
        "train.global_batch": job.batch,
        "train.learning_rate": job.learning_rate,
        "train.precision": job.precision,
        "train.optimizer": "fused_adamw",
        "train.zero": 0 if job.ranks == 1 else 1,  # one rank has nobody to split with
        "train.warmup": per_epoch,
        "train.eval_every": 0,
        "train.patience": 0,
        "train.log_every": per_epoch,
        "track.mlflow": False,  # its process would take a core
    }
    result = train(load_config("vae", [f"{name}={value}" for name, value in settings.items()]))
    rows = [row for row in read(result.record) if row["kind"] == "train"]

    def judge() -> Iterator[tuple[Any, Any, Any, Callable[[Any], tuple[Any, Any]]]]:
        vae = load_directory(Path(job.out) / "model").vae.eval()
        cells = store.cells_of_split("test")
        for start in range(0, len(cells), JUDGED_AT_ONCE):
            batch = CountReader(store).read_cells(cells[start : start + JUDGED_AT_ONCE])
            counts = np.zeros((len(batch), batch.n_genes))
            counts[batch.rows.numpy(), batch.indices.numpy()] = batch.counts.numpy()
            mean, logvar = (tensor.double().numpy() for tensor in vae.encode(batch))

            def decode(z: Any, library: torch.Tensor = batch.library) -> tuple[Any, Any]:
                made = vae.decode(torch.from_numpy(z).float(), library, {})
                return made.rate.double().numpy(), made.log_theta.exp().double().numpy()

            yield counts, mean, logvar, decode

    cells = (rows[-1]["step"] - rows[0]["step"]) * job.batch
    return Trained(__version__, cells, rows[-1]["time"] - rows[0]["time"], judge)


def scvi(job: Job) -> Trained:
    """Train scvi-tools' SCVI on an AnnData in memory, CSR as its users have it."""
    import anndata
    import numpy as np
    import scipy.sparse as sp
    import scvi as package
    import torch
    from lightning.pytorch.callbacks import Callback

    package.settings.seed = job.seed
    adata = anndata.AnnData(sp.load_npz(Path(job.folder) / "train.npz"))
    package.model.SCVI.setup_anndata(adata)
    model = package.model.SCVI(
        adata, n_hidden=job.hidden, n_latent=job.latent, n_layers=1, gene_likelihood="nb", dispersion="gene"
    )
    ends: list[float] = []

    class Clock(Callback):
        """Notes when the epochs end."""

        def on_train_epoch_end(self, *_: Any) -> None:
            """Note the time."""
            ends.append(time.time())

    model.train(
        max_epochs=job.epochs,
        batch_size=job.batch,
        train_size=1.0,
        accelerator="cpu",
        callbacks=[Clock()],
        plan_kwargs={"n_epochs_kl_warmup": job.kl_epochs, "lr": job.learning_rate},
    )

    def judge() -> Iterator[tuple[Any, Any, Any, Callable[[Any], tuple[Any, Any]]]]:
        module = model.module.eval()
        test = sp.csr_matrix(sp.load_npz(Path(job.folder) / "test.npz"))
        for start in range(0, test.shape[0], JUDGED_AT_ONCE):
            counts = test[start : start + JUDGED_AT_ONCE].toarray()
            batch_index = torch.zeros(len(counts), 1, dtype=torch.long)
            found = module.inference(torch.from_numpy(counts).float(), batch_index)
            mean, logvar = found["qz"].loc.double().numpy(), 2 * found["qz"].scale.double().log().numpy()

            def decode(z: Any, library: Any = found["library"], batch_index: Any = batch_index) -> tuple[Any, Any]:
                made = module.generative(torch.from_numpy(z).float(), library, batch_index)["px"]
                return made.mu.double().numpy(), made.theta.double().numpy()

            yield counts.astype(np.float64), mean, logvar, decode

    return Trained(package.__version__, (job.epochs - 1) * adata.n_obs, ends[-1] - ends[0], judge)


SIDES = {f.__name__: f for f in (bgen, scvi)}


def nb_log_prob(counts: Any, mean: Any, theta: Any) -> Any:
    """Log-probability of counts ``[B, G]`` under the negative binomial, by the textbook formula, in float64."""
    import numpy as np
    from scipy.special import gammaln

    mean = np.maximum(mean, 1e-8)
    log_total = np.log(theta + mean)
    return (
        gammaln(counts + theta)
        - gammaln(theta)
        - gammaln(counts + 1)
        + theta * (np.log(theta) - log_total)
        + counts * (np.log(mean) - log_total)
    )


def held_out(trained: Trained) -> dict[str, float]:
    """Means over the held-out cells, in nats a cell.

    ``nll`` = E_q[-log p(x | z)], over posterior samples; ``kl`` = KL(q || N(0, 1)); ``bound`` = their sum, an upper
    bound of -log p(x).
    """
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    nll, kl, n = 0.0, 0.0, 0
    with torch.no_grad():
        for counts, mean, logvar, decode in trained.judge():
            kl += 0.5 * float((mean**2 + np.exp(logvar) - 1 - logvar).sum())
            n += len(counts)
            for _ in range(SAMPLES):
                z = mean + np.exp(0.5 * logvar) * rng.standard_normal(mean.shape)
                nll -= float(nb_log_prob(counts, *decode(z)).sum()) / SAMPLES
    return {"nll": nll / n, "kl": kl / n, "bound": (nll + kl) / n}


def main() -> None:
    """Train and judge, as the JSON in the argument says; the last line of the output is the result as JSON."""
    import torch

    job = Job(**json.loads(sys.argv[1]))
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    trained = SIDES[job.side](job)
    if os.environ.get("RANK", "0") != "0":
        return
    rate = {"cells_per_s": trained.cells / trained.seconds, "seconds": trained.seconds}
    versions = {"version": trained.version, "torch": torch.__version__, "python": sys.version.split()[0]}
    print(json.dumps({**rate, **held_out(trained), **versions}), flush=True)


if __name__ == "__main__":
    main()
