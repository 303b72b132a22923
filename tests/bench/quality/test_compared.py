"""What is said of rows that are compared over seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bgen.bench.quality.compared import Compared

BASE = "base"
AGAINST = {BASE: BASE, "other": BASE}


def test_a_difference_is_one_beyond_three_standard_deviations() -> None:
    base = [{"NLL": 100.0, "accuracy": 0.5, "ms": 1.0}, {"NLL": 101.0, "accuracy": 0.6, "ms": 1.0}]
    far = [{"NLL": 90.0, "accuracy": 0.51, "ms": 2.0}, {"NLL": 91.2, "accuracy": 0.59, "ms": 2.0}]
    found = Compared("", AGAINST, {BASE: base, "other": far})
    assert found.verdict("other", "NLL") == "helps"  # lower is better
    assert found.verdict("other", "accuracy") == "no difference"
    assert found.sentence("other") == "other: helps in NLL (against base)."
    swapped = Compared("", AGAINST, {BASE: far, "other": base})
    assert swapped.verdict("other", "NLL") == "hurts"
    assert found.sentences() == [found.sentence("other")]
    assert found.verdict("other", "ms") == ""


def test_what_chance_marks_is_told() -> None:
    rng = np.random.default_rng(0)
    names = [f"row {number}" for number in range(2000)]
    runs = {name: [{"accuracy": float(rng.normal()), "ms": 1.0} for _ in range(3)] for name in [BASE, *names]}
    own = {f"{name}, control": [{"accuracy": float(rng.normal()), "ms": 1.0} for _ in range(3)] for name in names}
    against = {name: name for name in own} | {name: f"{name}, control" for name in names}
    found = Compared("", against, own | {name: runs[name] for name in names})
    marked = sum(found.verdict(name, "accuracy") != "no difference" for name in names)
    assert abs(marked - found.by_chance()) < 4 * np.sqrt(found.by_chance())
    assert f"about {found.by_chance():.1f} of them" in found.markdown()


def test_the_table_is_a_page_and_a_picture(tmp_path: Path) -> None:
    runs = {BASE: [{"NLL": 100.0, "ms": 1.0}, {"NLL": 101.0, "ms": 1.0}], "other": [{"NLL": 90.0, "ms": 2.0}] * 2}
    found = Compared("Things", AGAINST, runs, note="Less is better.")
    page = found.markdown()
    assert "| | NLL | ms |" in page
    assert "| other | 90.0* | 2.0 |" in page
    assert "- other: helps in NLL (against base)." in page
    found.draw(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    Compared("One", AGAINST, {row: of[:1] for row, of in runs.items()}).draw(tmp_path / "b.png")  # no spread
