"""Training of sequence encoders: that they learn order, which no share of words holds; the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bgen.config.sequences import SequenceConfig, SequenceTraining
from bgen.errors import UserError
from bgen.genes.sequences import UNKNOWN, kmer_shares, shuffled
from bgen.models.sequences.regression import SequenceRegression, _groups, fit_sequences, shifted
from bgen.models.sequences.words import fit_words
from data_tools.simulate.promoters import simulate_promoters

SMALL = SequenceConfig(mixer="hyena", channels=8, size=4, word=2, pool=2, blocks=1, dropout=0)


def some(n: int = 96) -> tuple[np.ndarray, np.ndarray]:
    codes = np.random.default_rng(0).integers(0, 4, (n, 20)).astype(np.uint8)
    return codes, np.column_stack(((codes == 2).mean(1), np.random.default_rng(1).normal(3, 2, n)))


def test_a_network_learns_and_gives_targets_on_their_scale() -> None:
    codes, targets = some()
    training = SequenceTraining(epochs=40, batch=16, learning_rate=1e-2, shift=0)
    fitted = fit_sequences(codes, targets, np.array([1.0, 0.0]), SMALL, training, 0)
    error = np.square(fitted.predict(codes) - targets).mean(0) / targets.var(0)
    assert error[0] < 0.3
    assert fitted.vectors(codes).shape == (96, 4)
    assert not fitted.network.training


def test_order_is_learnt_where_words_tell_nothing() -> None:
    """Of two motifs in every promoter, which comes first decides; shuffled positions destroy it."""
    made = simulate_promoters(genes=600, length=40, cells=40, seed=0)
    codes = np.array([["ACGT".index(letter) for letter in text] for text in made.fasta.split("\n")[1::2]], np.uint8)
    targets, held = np.where(made.first, 1.0, -1.0)[:, None], np.arange(600) % 5 == 0

    def missed(told: np.ndarray) -> float:
        return float(np.square(told - targets)[held].mean())  # of a variance of 1

    shares = kmer_shares(codes, 4)
    assert missed(fit_words(shares[~held], targets[~held]).predict(shares)) > 0.95
    training = SequenceTraining(epochs=35, batch=64, learning_rate=3e-3, shift=0)
    config = SequenceConfig(mixer="hyena", pool=4)
    fitted = fit_sequences(codes[~held], targets[~held], np.ones(1), config, training, 0)
    assert missed(fitted.predict(codes)) < 0.3
    assert missed(fitted.predict(shuffled(codes, 0))) > 0.7


def test_the_same_seed_gives_the_same_vectors() -> None:
    codes, targets = some(40)
    first, again, other = (
        fit_sequences(codes, targets, np.ones(2), SMALL, SequenceTraining(epochs=2), seed).vectors(codes)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_sequences_are_moved_and_nothing_comes_in() -> None:
    codes = np.arange(4, dtype=np.uint8)[None].repeat(50, 0)
    moved = {tuple(row) for row in shifted(codes, np.random.default_rng(0), 1)}
    assert moved == {(0, 1, 2, 3), (UNKNOWN, 0, 1, 2), (1, 2, 3, UNKNOWN)}
    np.testing.assert_array_equal(shifted(codes, np.random.default_rng(0), 0), codes)


def test_a_training_that_runs_away_is_told() -> None:
    codes, targets = some(40)
    targets[3] = np.nan
    with pytest.raises(UserError, match="no number at step 0"):
        fit_sequences(codes, targets, np.ones(2), SMALL, SequenceTraining(epochs=1), 0)


@pytest.mark.parametrize("mixer", ["hyena", "mamba2", "attention", "convolution"])
def test_matrices_decay_and_nothing_else_does(mixer: str) -> None:
    network = SequenceRegression(SMALL.model_copy(update={"mixer": mixer}), 20, 2)
    decaying, others = (group["params"] for group in _groups(network, 0.1))
    assert isinstance(decaying, list)
    assert isinstance(others, list)
    assert len(decaying) + len(others) == len(list(network.parameters()))
    linear = [module.weight for module in network.modules() if isinstance(module, torch.nn.Linear)]
    assert {id(one) for one in decaying} == {id(one) for one in (*linear, network.encoder.words.rows)}
