"""Writing results: never over something that is there, and whole or not at all."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bgen.errors import UserError

if TYPE_CHECKING:
    from anndata import AnnData


def require_local(path: Path) -> None:
    """Raise UserError for an address such as ``s3://bucket/x``: it would silently become a folder called "s3:"."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(path))
    if scheme:
        raise UserError(
            f"{path} is an address: bgen writes to this machine's file systems. Choose another --out, and copy it there"
            f" with a tool for {scheme[1]}."
        )


def require_new_file(path: Path) -> None:
    """Raise UserError if a file is there already, or its folder is not; checked before long work begins."""
    require_local(path)
    if path.exists():
        raise UserError(f"{path} is there already. Choose another --out, or remove it first.")
    if not path.resolve().parent.is_dir():
        raise UserError(f"The folder {path.resolve().parent} is not there. Make it first, or choose another --out.")


def require_new_folder(path: Path) -> None:
    """Raise UserError if a folder is there already and not empty."""
    require_local(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already and not empty. Choose another --out, or remove it first.")


@contextmanager
def slashes_in_names() -> Iterator[None]:
    """Let anndata write names of columns that hold a '/' into an .h5ad; every version reads them back.

    anndata 0.13 refuses such names unless it is told otherwise, yet cells come with them: anndata wrote them for years.
    """
    import anndata

    with anndata.settings.override(disallow_forward_slash_in_h5ad=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Forward slashes will be ", FutureWarning)
        yield


def write_h5ad(adata: AnnData, path: Path) -> None:
    """Write an .h5ad, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with slashes_in_names():
            adata.write_h5ad(partial, compression="gzip")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}. Is the disk full?") from None
    finally:
        partial.unlink(missing_ok=True)
