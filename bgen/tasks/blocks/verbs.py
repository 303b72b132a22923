"""``bgen embed``, ``annotate`` and ``denoise`` of any number of cells, a block at a time, into AnnData in zarr.

Axes: N cells of a batch, G genes of the model, D latent size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from bgen.distributed import world as ranks
from bgen.errors import MOST_COUNTS, UserError, require_number
from bgen.names import key
from bgen.progress import Progress, Say
from bgen.store.remote import is_remote
from bgen.tasks.anndata_model import BATCH, AnnDataModel, cell_batch, decode_batch, encode_batch
from bgen.tasks.batches import LEAST, Batches, filled_up
from bgen.tasks.blocks.cells import Batch, BlockCells
from bgen.tasks.blocks.folder import Room
from bgen.tasks.blocks.opened import Opened
from bgen.tasks.blocks.reference import read_reference
from bgen.tasks.blocks.run import WEEK, BlockVerb, Done, once, together, write_in_blocks
from bgen.tasks.cells.annotate import ABSTAINED, Learnt, decide, learn_labels, own_head, own_labels
from bgen.tasks.cells.denoise import at_size, find_wanted
from bgen.tasks.user_cells import Reading

NO_GENES = pd.DataFrame(index=pd.Index([], dtype=str))


class ModelVerb(BlockVerb):
    """A verb of a model.

    Parameters
    ----------
    model
        The model.
    cells
        The cells, matched to it.
    """

    var = NO_GENES

    def __init__(self, model: AnnDataModel, cells: BlockCells) -> None:
        self.model, self.cells = model, cells
        here = ranks.current()
        self._saved = model.saved if here.size == 1 else model.saved.to(here.device)
        self._codec = self._saved.codec
        self._encoded = Batches(self._saved.device, BATCH)

    def states(
        self, counts: sp.csr_matrix, codes: Mapping[str, NDArray[np.int64]], first: int = 0
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return mean and variance ``[N, D]`` of the latent states of cells with counts ``[N, G]``.

        Raises
        ------
        UserError
            If they are not finite.
        """

        def some(start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            part = filled_up(start, stop) if (stop - start) % LEAST else slice(start, stop)
            batch = cell_batch(counts[part], {name: of[part] for name, of in codes.items()}, first + start)
            mean, variance = encode_batch(self._saved, batch)
            return mean[: stop - start], variance[: stop - start]

        means, variances = zip(*self._encoded.over(counts.shape[0], some), strict=True)
        return np.concatenate(means), np.concatenate(variances)

    def codes(self, batch: Batch) -> dict[str, NDArray[np.int64]]:
        """Return the codes of the model's covariates for a batch."""
        return self.cells.covariates(self._codec.covariates, batch.first, batch.first + batch.counts.shape[0])

    def uns(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """See :class:`BlockVerb`."""
        about = {"embedding_model": self.model.saved.fingerprint()}
        return {"bgen": {**about, "molecules_known": sums["known"] / max(sums["molecules"], 1.0)}}


class EmbedVerb(ModelVerb):
    """Latent means, and with ``variance`` also their variances; see :class:`ModelVerb`."""

    what = "embedding"

    def __init__(self, model: AnnDataModel, cells: BlockCells, variance: bool) -> None:
        super().__init__(model, cells)
        names = ["obsm/X_bgen", *(["obsm/X_bgen_variance"] if variance else [])]
        self.rooms = dict.fromkeys(names, Room(self._codec.size - 1))

    def of_batch(self, batch: Batch) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
        """See :class:`BlockVerb`."""
        return dict(zip(self.rooms, self.states(batch.counts, self.codes(batch), batch.first), strict=False)), {}


class DenoiseVerb(ModelVerb):
    """Expected counts of some genes; see :func:`bgen.tasks.cells.denoise.denoise_cells`."""

    what = "denoising"

    def __init__(
        self, model: AnnDataModel, cells: BlockCells, library_size: float | None, genes: Sequence[str] | None
    ) -> None:
        super().__init__(model, cells)
        known = cells.match.known
        self._library_size, self._known = library_size, np.flatnonzero(known)
        self._decoded = Batches(self._saved.device, BATCH, dense=4 * self._codec.n_genes)
        self._wanted = self._known if genes is None else find_wanted(model, known, genes)
        self.rooms = {"layers/denoised": Room(len(self._wanted))}
        table = model.saved.genes.iloc[self._wanted]
        self.var = pd.DataFrame({"symbol": table["symbol"].to_numpy(dtype=str)}, index=table["id"].to_numpy(dtype=str))

    def of_batch(self, batch: Batch) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
        """See :class:`BlockVerb`."""
        codes = self.codes(batch)
        z, _ = self.states(batch.counts, codes, batch.first)

        def some(start: int, stop: int) -> NDArray[np.float32]:
            part = filled_up(start, stop)
            told = {name: of[part] for name, of in codes.items()}
            return decode_batch(self._saved, z[part], np.ones(len(part), np.float32), told)[: stop - start]

        mean = np.concatenate(list(self._decoded.over(len(z), some)))
        expected = at_size(mean, batch.counts, self._known, self._library_size)
        return {"layers/denoised": expected[:, self._wanted]}, {}

    def uns(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """See :class:`BlockVerb`."""
        size = "as measured" if self._library_size is None else float(self._library_size)
        told = {"model": self.model.saved.fingerprint(), "library_size": size}
        return {**super().uns(sums), "bgen_denoise": told}


class AnnotateVerb(ModelVerb):
    """Labels; see :func:`bgen.tasks.cells.annotate.annotate_cells`.

    Parameters
    ----------
    model, cells
        As for :class:`ModelVerb`.
    label, threshold
        As for that function.
    """

    what = "annotating"

    def __init__(self, model: AnnDataModel, cells: BlockCells, label: str | None, threshold: float) -> None:
        super().__init__(model, cells)
        self._threshold = threshold
        self._learnt: Learnt | None = None
        self._column, self._rare = "", set[str]()
        if label is None:
            self._head, self._summary = own_head(model, threshold)
            self._labels = own_labels(model)
        else:
            self._learnt, self._rare = once(lambda: self._learn(label))
            self._labels = self._learnt.labels
            about = {"model": model.saved.fingerprint(), "label": label, "threshold": threshold}
            self._summary = {**about, **self._learnt.summary}
            self._column = label if label in cells.columns else ""
        name = key(self._summary["label"])
        self._names = [f"obs/{name}_bgen", f"obs/{name}_probability", f"obsm/{name}_probabilities"]
        self._categories = sorted({*map(str, self._labels), ABSTAINED})
        rooms = (Room(None, categories=self._categories), Room(None, np.float64), Room(len(self._labels)))
        self.rooms = dict(zip(self._names, rooms, strict=True))
        if self._learnt is not None:
            self._names.append(f"obs/{name}_novelty")
            self.rooms[self._names[-1]] = Room(None, np.float64)

    def _learn(self, label: str) -> tuple[Learnt, set[str]]:
        """Return what is learnt from reference cells, and labels of too few of them."""
        cells, texts = read_reference(self.cells, label)
        if len(cells):
            counts, codes = self.cells.take(cells), self.cells.covariates_of(self._codec.covariates, cells)
            latents = self.model.whiten(self.states(counts, codes)[0])
        else:
            counts = sp.csr_matrix(np.zeros((0, len(self.cells.match.known)), np.float32))
            latents = np.zeros((0, self._codec.size - 1), np.float32)
        learnt = learn_labels(self.model, counts, latents, texts, label, self.cells.columns)
        return learnt, set(texts) - set(learnt.labels)

    def of_batch(self, batch: Batch) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
        """See :class:`BlockVerb`."""
        mean, _ = self.states(batch.counts, self.codes(batch), batch.first)
        novelty = None
        if self._learnt is None:
            probabilities = (
                self._head.probabilities(torch.from_numpy(mean).to(self._head.device)).cpu().double().numpy()
            )
        else:
            latents = self.model.whiten(mean)
            probabilities = self._learnt.probabilities(batch.counts, latents)
            novelty = self._learnt.novelty.of(latents)
        told, probability = decide(self._labels, probabilities, self._threshold, novelty)
        made = [np.searchsorted(self._categories, told), probability, probabilities]
        made += [] if novelty is None else [novelty]
        abstained = told == ABSTAINED
        given = np.full(len(told), "")
        if self._column:
            given = self.cells.texts(self._column, batch.first, batch.first + len(told))
        bare = (given == "") | np.isin(given, list(self._rare))
        sums = {"abstained": abstained.sum(), "bare": bare.sum(), "bare_abstained": (bare & abstained).sum()}
        return dict(zip(self._names, made, strict=True)), {name: int(number) for name, number in sums.items()}

    def uns(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """See :class:`BlockVerb`."""
        all_labelled = sums["bare"] == 0
        told = {
            **self._summary,
            "query_cells": len(self.cells) if all_labelled else int(sums["bare"]),
            "abstained": int(sums["abstained" if all_labelled else "bare_abstained"]),
            "labels": [str(label) for label in self._labels],
        }
        return {**super().uns(sums), "bgen_annotate": told}


def embed_in_blocks(
    model: AnnDataModel,
    data: str | os.PathLike[str],
    out: Path,
    reading: Reading,
    *,
    variance: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Done:
    """Write ``obsm['X_bgen']``, the latent means of all cells, and with ``variance`` ``obsm['X_bgen_variance']``.

    Parameters
    ----------
    data
        A store (its folder or address), or cells in any format.
    out
        A new folder; see :func:`bgen.tasks.blocks.run.write_in_blocks`, also for ``restart`` and ``progress``.
    reading
        How a file is read; see :class:`bgen.tasks.user_cells.Reading`.
    say
        Told what was matched, on rank 0.

    Raises
    ------
    UserError
        As that function.
    """
    asked = {"the verb": "embed", "--variance": str(variance)}
    return _in_blocks(
        model, data, out, reading, asked, lambda cells: EmbedVerb(model, cells, variance), restart, progress, say
    )


def annotate_in_blocks(
    model: AnnDataModel,
    data: str | os.PathLike[str],
    out: Path,
    reading: Reading,
    *,
    label: str | None = None,
    threshold: float = 0.5,
    restart: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Done:
    """Write labels of all cells; see :func:`bgen.tasks.cells.annotate.annotate_cells`.

    They are learnt from some 20,000 of the labelled cells, and probabilities are an array whose columns are the labels
    in ``uns['bgen_annotate']['labels']``. The other parameters are those of :func:`embed_in_blocks`.
    """
    if not 0 <= threshold < 1:
        raise UserError(f"The threshold is a probability from 0 to below 1, not {threshold:g}.")
    asked = {"the verb": "annotate", "--label": str(label), "--threshold": str(threshold)}
    return _in_blocks(
        model,
        data,
        out,
        reading,
        asked,
        lambda cells: AnnotateVerb(model, cells, label, threshold),
        restart,
        progress,
        say,
    )


def denoise_in_blocks(
    model: AnnDataModel,
    data: str | os.PathLike[str],
    out: Path,
    reading: Reading,
    *,
    library_size: float | None = None,
    genes: Sequence[str] | None = None,
    restart: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Done:
    """Write ``layers['denoised']``, expected counts of the named genes, or of all that the model and the data have.

    See :func:`bgen.tasks.cells.denoise.denoise_cells`; the other parameters are those of :func:`embed_in_blocks`.
    """
    require_number("library_size", library_size, 1, MOST_COUNTS)
    asked = {"the verb": "denoise", "--library-size": str(library_size), "--genes": ",".join(genes or ["all"])}
    return _in_blocks(
        model,
        data,
        out,
        reading,
        asked,
        lambda cells: DenoiseVerb(model, cells, library_size, genes),
        restart,
        progress,
        say,
    )


def _in_blocks(
    model: AnnDataModel,
    data: str | os.PathLike[str],
    out: Path,
    reading: Reading,
    asked: dict[str, str],
    make: Callable[[BlockCells], BlockVerb],
    restart: bool,
    progress: Progress | None,
    say: Say | None,
) -> Done:
    model.saved.require_vae()
    require_number("floor", reading.get("floor"), 0, 1)
    ranks.start()
    ranks.set_timeout(WEEK)
    if is_remote(os.fspath(data)):
        once(lambda: Opened.of(data, reading).state())  # one rank copies what lies elsewhere, the others find it
    opened = together(lambda: Opened.of(data, reading))
    plan = {"the model": model.saved.fingerprint(), "--precision": model.saved.precision, **opened.state(), **asked}

    def prepare() -> BlockVerb:
        found = once(opened.find_counts)
        cells = opened.match(found, model.saved, model.expected_shares())
        if say is not None and ranks.current().is_main:
            for sentence in cells.matched.sentences():
                say(sentence)
        return make(cells)

    return write_in_blocks(out, plan, prepare, restart=restart, progress=progress)
