"""Names that users' files bring along: how they are shown, and how they are written.

Names of columns, labels and files may hold anything. :func:`shown` is how they reach a terminal, and :func:`keys` how
they become keys of a file.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable

_KEPT = "\n\t"
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of characters that steer a terminal or do not show: controls, formats, surrogates, line separators."""


def shown(text: object) -> str:
    """Return a text as it may be printed: characters that steer a terminal, or do not show, are written as escapes.

    Line breaks and tabs stay.
    """
    raw = str(text)
    if raw.isprintable():
        return raw
    return "".join(
        sign if sign in _KEPT or unicodedata.category(sign) not in _HIDDEN else sign.encode("unicode_escape").decode()
        for sign in raw
    )


def in_markdown(text: object) -> str:
    """Return a text as Markdown shows it: no HTML, link, image, emphasis or cell of a table comes of it."""
    plain = html.escape(" ".join(shown(text).split()), quote=False)
    return re.sub(r"([\\`*\[\]|!#~])", r"\\\1", plain)


def in_code(text: object) -> str:
    """Return a text as Markdown shows it between backticks."""
    return " ".join(shown(text).replace("`", "'").replace("|", "/").split())


def keys(names: Iterable[object]) -> dict[str, str]:
    """Return for each name a key that can be written: into HDF5, zarr and JSON, in one group.

    A "/" would nest, and an empty name, "." or a control character cannot be written: they become "_". Keys are unique.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    distinct = list(dict.fromkeys(map(str, names)))
    for name in sorted(distinct, key=lambda name: _plain(name) != name):  # names that need no change keep theirs
        key, number = _plain(name), 2
        while key in taken:
            key, number = f"{_plain(name)}_{number}", number + 1
        found[name] = key
        taken.add(key)
    return {name: found[name] for name in distinct}


def key(name: object) -> str:
    """Return the key that one name becomes; see :func:`keys`."""
    return _plain(str(name))


def index_name(name: str, columns: Iterable[object]) -> str | None:
    """Return the name of an index beside columns: none if a column has it, since a file cannot hold both."""
    return None if name in {str(column) for column in columns} else name


def _plain(name: str) -> str:
    plain = "".join("_" if sign == "/" or unicodedata.category(sign) in _HIDDEN else sign for sign in name)
    return plain if not re.fullmatch(r"\.*", plain) else "_" * max(1, len(plain))
