"""The one grammar of perturbation labels."""

from __future__ import annotations

import pytest

from data_tools.check.labels import Grammar, alike, read_grammar


@pytest.mark.parametrize(
    ("label", "members"),
    [
        ("STAT1", ("STAT1",)),
        ("STAT1+IRF1", ("IRF1", "STAT1")),
        ("STAT1 + IRF1", ("IRF1", "STAT1")),
        ("STAT1+ctrl", ("STAT1",)),
        ("ctrl+STAT1", ("STAT1",)),
        ("STAT1+Non-Targeting", ("STAT1",)),
        ("ctrl", ()),
        ("ctrl+ctrl", ()),
        ("", ()),
        ("(+)-catechin", ("(+)-catechin",)),
        ("(+)-catechin+STAT1", ("(+)-catechin", "STAT1")),
        ("CD8+", ("CD8+",)),
        ("Ca2+ ionophore", ("Ca2+ ionophore",)),
        ("poly(I:C)", ("poly(I:C)",)),
        ("5-(N+2)", ("5-(N+2)",)),
        ("A)+B", ("A)", "B")),
        ("A|B", ("A|B",)),
        ("DMSO", ("DMSO",)),  # another control label was given: alone, this is a name like any other
    ],
)
def test_what_a_label_names(label: str, members: tuple[str, ...]) -> None:
    grammar = Grammar(("ctrl",))
    assert grammar.members(label) == members
    assert grammar.is_control(label) == (bool(label) and not members)


def test_controls_may_be_several_and_called_anything() -> None:
    grammar = Grammar(("non-targeting-1", "non-targeting-2", "None"))
    assert [grammar.is_control(name) for name in ("non-targeting-1", "non-targeting-2", "None", "A")] == [1, 1, 1, 0]
    assert grammar.members("A+non-targeting-2") == ("A",)


@pytest.mark.parametrize(
    ("labels", "known", "separator"),
    [
        (["A", "B", "A|B", "ctrl"], [], "|"),
        (["STAT1;IRF1", "ctrl"], ["STAT1", "IRF1"], ";"),
        (["STAT1,ctrl", "ctrl"], ["STAT1"], ","),
        (["A|B", "ctrl"], [], "+"),  # nothing says that these are two names
        (["A|B", "A+B", "A", "B"], [], "+"),
        (["1,2-dichloroethane", "ctrl"], [], "+"),
    ],
)
def test_a_separator_is_found_where_all_parts_are_known(labels: list[str], known: list[str], separator: str) -> None:
    assert read_grammar(labels, ["ctrl"], None, known).separator == separator


def test_a_separator_of_ones_own() -> None:
    assert read_grammar([], ["ctrl"], "_and_").members("A_and_B") == ("A", "B")
    assert read_grammar([], ["ctrl"], "none").members("A+B") == ("A+B",)
    assert read_grammar([], ["ctrl"], "|").members("A+B|C") == ("A+B", "C")


def test_what_was_understood_is_said() -> None:
    cells = {"ctrl": 40, "A+B": 5, "A": 7, "B|C": 3}
    said = Grammar(("ctrl",)).sentence(cells)
    assert "3 names, in 1 combinations with '+' between (such as 'A+B'); controls: 'ctrl' (40 cells)." in said
    assert "1 labels with '|', such as 'B|C', are taken as one name each; --separator '|' splits them." in said


def test_names_that_look_alike() -> None:
    assert alike({"T cell": 3, "B": 1}) == []
    [said] = alike({"Ctrl": 3, "ctrl ": 20, "B": 1})
    assert said.startswith("'Ctrl' (3 cells) and 'ctrl ' (20 cells) differ only by case or spaces")
