"""Labels of perturbations: which names a label holds, and which labels mean "not perturbed".

This is the one grammar of labels, for ``data check`` and for every verb:

- A label is one name ("STAT1", "dexamethasone") or several with a separator between them ("STAT1+IRF1"). Their order
  does not matter.
- The separator is "+", unless another one is given. "|", ";" or "," is found by itself where every part of every label
  that holds it is a name that is known: a gene of the data, or a label of its own.
- A separator within brackets, at the end of a label, or with a space on one side only belongs to the name:
  "(+)-catechin", "CD8+" and "Ca2+ ionophore" are one name each.
- A part that means "not perturbed" does not count: "STAT1+ctrl" is "STAT1". A label of such parts alone is a control.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

JOIN = "+"
"""The usual separator, and the one that bgen writes."""

SEPARATORS = ("|", ";", ",")
"""Others that are found by themselves."""

WHOLE = "none"
"""The separator of labels that are one name each."""

CONTROLS = (
    "control", "ctrl", "non-targeting", "nontargeting", "non-targeting control", "ntc", "nt", "neg", "negctrl",
    "negative control", "scramble", "scrambled", "safe-targeting", "unperturbed", "untreated", "dmso_tf", "dmso",
    "vehicle", "mock", "none", "wt", "wild type",
)  # fmt: skip
"""Labels that usually mean "not perturbed"."""

_OPENING, _CLOSING = "([{", ")]}"


def fold(name: str) -> str:
    """Return a name without case and punctuation, for comparison."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


_NEUTRAL = frozenset(map(fold, CONTROLS))


@dataclass(frozen=True)
class Grammar:
    """How the labels of one column are read.

    Attributes
    ----------
    controls
        Labels that mean "not perturbed".
    separator
        Between the names of a label; "none": a label is one name.
    """

    controls: tuple[str, ...]
    separator: str = JOIN

    def parts(self, label: str) -> list[str]:
        """Return the parts of a label, those that mean "not perturbed" among them; of an empty label none."""
        return split_label(label, self.separator)

    def members(self, label: str) -> tuple[str, ...]:
        """Return the perturbations of a label, sorted, each once; none for a control and for an empty label."""
        if label in self.controls:
            return ()
        parts = self.parts(label)
        if len(parts) > 1:
            parts = [part for part in parts if not self._is_neutral(part)]
        return tuple(sorted(set(parts)))

    def is_control(self, label: str) -> bool:
        """Whether a label means "not perturbed"."""
        return label in self.controls or (bool(label) and not self.members(label))

    def _is_neutral(self, part: str) -> bool:
        return part in self.controls or fold(part) in _NEUTRAL or fold(part) in {*map(fold, self.controls)} - {""}

    def sentence(self, cells: Mapping[str, int]) -> str:
        """Say how labels are understood, given how many cells have each."""
        members = {label: self.members(label) for label in cells if label}
        names = {name for found in members.values() for name in found}
        several = [label for label, found in members.items() if len(found) > 1]
        controls = [f"'{label}' ({cells[label]:,} cells)" for label in cells if label and self.is_control(label)]
        said = f"Perturbations: {len(names):,} names, in {len(several):,} combinations"
        if several:
            said += f" with '{self.separator}' between (such as '{several[0]}')"
        said += f"; controls: {', '.join(controls[:5]) or 'none'}{', ...' if len(controls) > 5 else ''}."
        for separator in (JOIN, *SEPARATORS):
            whole = [label for label in members if separator in label and len(members[label]) == 1]
            whole = [label for label in whole if len(split_label(label, separator)) > 1]
            if separator != self.separator and whole:
                said += (
                    f" {len(whole):,} labels with '{separator}', such as '{whole[0]}', are taken as one name each;"
                    f" --separator '{separator}' splits them."
                )
        return said


def split_label(label: str, separator: str) -> list[str]:
    """Return the parts of a label between separators, as this module says; the label alone if there is none."""
    label = label.strip()
    if not label:
        return []
    if separator in ("", WHOLE):
        return [label]
    parts, start, depth = [], 0, 0
    balanced = sum(label.count(sign) for sign in _OPENING) == sum(label.count(sign) for sign in _CLOSING)
    at = 0
    while at < len(label):
        if balanced and label[at] in _OPENING:
            depth += 1
        elif balanced and label[at] in _CLOSING:
            depth = max(0, depth - 1)
        elif depth == 0 and label.startswith(separator, at) and _separates(label, separator, at):
            parts.append(label[start:at])
            at = start = at + len(separator)
            continue
        at += 1
    parts = [part.strip() for part in (*parts, label[start:])]
    return parts if all(parts) else [label]


def _separates(label: str, separator: str, at: int) -> bool:
    """Whether the separator at a place of a label stands between names; "+" has spaces on both sides or on none."""
    if separator != JOIN:
        return True
    before, after = label[at - 1 : at], label[at + 1 : at + 2]
    return before.isspace() == after.isspace()


def read_grammar(
    labels: Iterable[str], controls: Sequence[str], separator: str | None = None, known: Collection[str] = ()
) -> Grammar:
    """Decide how the labels of a column are read.

    Parameters
    ----------
    labels
        The distinct ones; "" for a cell without a label.
    controls
        Those that mean "not perturbed".
    separator
        As the user gave it; None: found.
    known
        Names that a part may have beside those of the labels themselves: genes.
    """
    if separator is not None:
        return Grammar(tuple(controls), separator)
    distinct = {label.strip() for label in labels} - {""}
    if any(len(split_label(label, JOIN)) > 1 for label in distinct):
        return Grammar(tuple(controls))
    for candidate in SEPARATORS:
        several = [split_label(label, candidate) for label in distinct if candidate in label]
        several = [parts for parts in several if len(parts) > 1]
        parts = {part for found in several for part in found}
        if parts and all(part in known or part in distinct or fold(part) in _NEUTRAL for part in parts):
            return Grammar(tuple(controls), candidate)
    return Grammar(tuple(controls))


def alike(cells: Mapping[str, int]) -> list[str]:
    """Say which labels differ only by case or spaces, a sentence for each group, given how many cells have each."""
    groups: dict[str, list[str]] = {}
    for label in cells:
        groups.setdefault("".join(label.split()).casefold(), []).append(label)
    said = []
    for key, group in groups.items():
        if key and len(group) > 1:
            named = " and ".join(f"'{label}' ({cells[label]:,} cells)" for label in group)
            said.append(f"{named} differ only by case or spaces, and are taken as different")
    return said
