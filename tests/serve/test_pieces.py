"""Large answers leave in pieces that are JSON once they are together."""

from __future__ import annotations

import importlib.util
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bgen.serve.pieces import BLOCK, json_pieces, plain, values_in

sys.path.append(str(Path(__file__).parent))
from bgen_server import running


def test_pieces_make_what_json_makes_of_all() -> None:
    draw = np.random.default_rng(0)
    arrays = {
        "data": draw.normal(size=3 * BLOCK + 5).astype(np.float32),
        "indptr": np.arange(7, dtype=np.int32),
        "X": draw.normal(size=(BLOCK // 3 + 1, 10)),
        "none": np.zeros(0),
        "rows of none": np.zeros((2, 0)),
    }
    tree = {"cells": ['a "quoted" ä'] * (BLOCK + 1), "counts": arrays, "empty": {}, "list": [], "one": None, "n": 3.5}
    pieces = list(json_pieces(tree))
    assert "".join(pieces) == json.dumps(plain(tree))
    assert plain(tree)["counts"] == {name: array.tolist() for name, array in arrays.items()}
    assert max(map(len, pieces)) < 30 * BLOCK
    assert values_in(tree) == BLOCK + 1 + 3 * BLOCK + 5 + 7 + 10 * (BLOCK // 3 + 1) + 2


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")),
    reason="not installed: fastapi, uvicorn (extra serve)",
)
def test_a_server_sends_a_large_answer_in_pieces(demo: Any) -> None:
    with running(demo.model) as server:
        for n, large in ((2, False), (400, True)):
            asked = urllib.request.Request(f"{server.address}/generate", json.dumps({"n": n, "seed": 0}).encode())
            with urllib.request.urlopen(asked, timeout=300) as answer:
                assert (answer.headers.get("Transfer-Encoding") == "chunked") == large
                told = json.load(answer)
            assert len(told["cells"]) == n
            assert len(told["counts"]["data"]) == told["counts"]["indptr"][-1] == len(told["counts"]["indices"])
