from __future__ import annotations

from bgen.bench.speed import ssd


def test_scans_and_blocks_are_measured(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(ssd, "SHAPES", ((64, 2),))
    found = ssd.bench_ssd(1)
    (scan,) = found["scan"]
    assert scan["loop"] > scan["chunked"] > 0
    assert scan["ratio"] == scan["loop"] / scan["chunked"]
    assert found["block"]["bgen"] > 0
