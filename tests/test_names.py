"""Names from users' files: printed without effect on the terminal, written without nesting."""

from __future__ import annotations

import io

import pytest

from bgen.cli.terminal import Terminal
from bgen.names import in_code, in_markdown, index_name, keys, shown


def test_what_steers_a_terminal_is_shown() -> None:
    assert shown("a\x1b[2Jb\r\u202e\x07") == "a\\x1b[2Jb\\r\\u202e\\x07"
    assert shown("Größe µ 細胞\n\tß") == "Größe µ 細胞\n\tß"


@pytest.mark.parametrize("name", ["[/x]", "[bold]x", "[link=file:///]x[/]", ":smile:", "a\\[b]"])
def test_the_terminal_follows_no_markup(name: str) -> None:
    out = io.StringIO()
    Terminal(file=out, width=100).print(f"column {name}")
    assert out.getvalue() == f"column {name}\n"


def test_keys_do_not_nest_and_are_unique() -> None:
    assert keys(["NK/T", "NK_T", "T", "", "..", "a\x00b"]) == {
        "NK/T": "NK_T_2", "NK_T": "NK_T", "T": "T", "": "_", "..": "__", "a\x00b": "a_b",
    }  # fmt: skip
    assert index_name("cell", ["a"]) == "cell"
    assert index_name("cell", ["cell"]) is None


def test_markdown_shows_a_name_and_nothing_else() -> None:
    assert in_markdown("<b>x</b> ![i](u) a|b") == r"&lt;b&gt;x&lt;/b&gt; \!\[i\](u) a\|b"
    assert in_code("a`b|c\n") == "a'b/c"
