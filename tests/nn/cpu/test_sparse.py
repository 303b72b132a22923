from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from bgen.nn.cpu.sparse import product, transpose


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_of_the_rows_give_the_whole(parts: int) -> None:
    rng = np.random.default_rng(0)
    # widths and numbers of entries that are no multiples of four, an empty row and an empty column
    matrix = sp.random(11, 29, 0.3, format="csr", dtype=np.float32, rng=rng).tolil()
    matrix[4], matrix[:, 7] = 0, 0
    csr = matrix.tocsr()
    arrays = csr.indptr.astype(np.int64), csr.indices, csr.data
    dense = rng.standard_normal((29, 13)).astype(np.float32)
    out = np.full((11, 13), np.nan, np.float32)
    product(*arrays, dense, parts, out)
    np.testing.assert_allclose(out, csr @ dense, rtol=1e-5, atol=1e-6)
    indptr, indices, values = transpose(*arrays, 29, parts)
    expected = csr.T.tocsr()
    expected.sort_indices()
    np.testing.assert_array_equal(indptr, expected.indptr)
    np.testing.assert_array_equal(indices, expected.indices)
    np.testing.assert_array_equal(values, expected.data)
