"""Importing a package's submodules without running its __init__."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bgen.nn.scans import published_kernels as kernels


def test_import_through_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mamba_ssm"
    (package / "ops").mkdir(parents=True)
    (package / "__init__.py").write_text("import selective_scan_cuda\n")
    (package / "ops" / "__init__.py").write_text("")
    (package / "ops" / "inner.py").write_text("from mamba_ssm.ops.other import VALUE\n")
    (package / "ops" / "other.py").write_text("VALUE = 7\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(ImportError):
            __import__("mamba_ssm.ops.inner")
        assert kernels.import_published("ops.inner").VALUE == 7
        assert "mamba_ssm" not in sys.modules
        with pytest.raises(ImportError):
            kernels.import_published("ops.absent")
        assert "mamba_ssm" not in sys.modules
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
            del sys.modules[name]


def test_the_error_of_a_missing_package() -> None:
    if kernels.missing("mamba2") is None:
        pytest.skip("mamba-ssm is installed here")
    with pytest.raises(ImportError, match="mamba_ssm is not installed"):
        kernels.import_published("ops.triton.ssd_combined")
