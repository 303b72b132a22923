"""What a model directory holds of perturbations, checked before it is used.

Numbers of members, labels, contexts and effects that lead nowhere would end in the middle of a verb.
"""

from __future__ import annotations

from torch import Tensor

from bgen.hub.about import Perturbation
from bgen.models.generators.latent_flow import LatentFlow


def require_told(flow: LatentFlow, facts: Perturbation | None, labels: int) -> None:
    """Check the sets of a flow and its average effects.

    Parameters
    ----------
    facts
        What the directory says of perturbations.
    labels
        Categories of the column of labels.

    Raises
    ------
    ValueError
        Naming what is wrong.
    """
    embeddings = flow.conditions.member_embeddings
    if len(embeddings) > 1:
        raise ValueError("it has more than one column of perturbations")
    for name, embedding in embeddings.items():
        sizes = embedding.sizes
        if facts is None:
            raise ValueError("about.perturbation is missing")
        if len(facts.perturbations) != sizes.members or labels != sizes.labels:
            raise ValueError(
                f"sets.{name} are of {sizes.members} perturbations and {sizes.labels} labels, and it names others"
            )
        if sizes.names not in (0, flow.vae.n_genes + len(facts.named)):
            raise ValueError(f"sets.{name}.names is {sizes.names}, and genes and other names are not as many")
        _require_within(f"label_own of {name}", embedding.label_own, -1, sizes.members)
        _require_within(f"label_vector of {name}", embedding.label_vector, -1, sizes.names)
        if not float(embedding.typical_amount) > 0:
            raise ValueError(f"the typical amount of {name} is not positive")
    if flow.averages is not None:
        assert facts is not None, "it is what they are built from"
        of = flow.averages.own_of
        _require_within("contexts of effects", of[:, :1], 0, len(facts.contexts))
        _require_within("sets of effects", of[:, 1:], 0, len(facts.effects))


def _require_within(what: str, numbers: Tensor, low: int, high: int) -> None:
    if numbers.numel() and not low <= int(numbers.min()) <= int(numbers.max()) < max(high, low + 1):
        raise ValueError(f"{what}: {int(numbers.min())} to {int(numbers.max())} are not within {low} to {high - 1}")
