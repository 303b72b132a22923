"""Writing results: never over something that is there, and whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
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


def require_new_h5ad(path: Path) -> None:
    """As :func:`require_new_file`, and raise UserError for a name that promises another format, such as cells.csv."""
    if re.fullmatch(r"\.[A-Za-z]\w*", path.suffix) and path.suffix.lower() not in (".h5ad", ".h5", ".hdf5"):
        raise UserError(
            f"Cells are written as .h5ad, not as {path.suffix}: give --out {path.with_suffix('.h5ad')}. In Python,"
            " anndata.read_h5ad(...).to_df().to_csv(...) makes a table of it."
        )
    require_new_file(path)


def require_new_folder(path: Path) -> None:
    """Raise UserError if a folder is there already and not empty."""
    require_local(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already and not empty. Choose another --out, or remove it first.")


@contextmanager
def whole(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Give a place to write a file or folder, which is moved to ``path`` when all went well, and else vanishes.

    The place lies beside ``path``, in a folder of a name that nobody can foresee and that only this user may enter: in
    a folder that others write in, they can plant nothing there, neither a file nor a link to one.

    Parameters
    ----------
    path
        The final place.
    replace
        Whether a file that is there by then is replaced; a folder never is.

    Raises
    ------
    UserError
        If it is there and must not be replaced.
    OSError
        If it cannot be written.
    """
    private = Path(tempfile.mkdtemp(prefix=".bgen-", dir=path.parent))
    try:
        half = private / path.name
        yield half
        if replace:
            half.replace(path)
        else:
            _move_new(half, path)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _move_new(half: Path, path: Path) -> None:
    """Move a file or folder to where nothing is; two programs that do so at once cannot both succeed."""
    try:
        if half.is_dir():
            if path.exists() or path.is_symlink():
                raise FileExistsError
            half.rename(path)
        else:
            os.link(half, path, follow_symlinks=False)
    except FileExistsError:
        raise UserError(f"{path} is there already. Choose another --out, or remove it first.") from None
    except OSError:  # a file system without links
        if path.exists():
            raise UserError(f"{path} is there already. Choose another --out, or remove it first.") from None
        half.rename(path)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all; its folder is made. Several processes may do so at once.

    Raises
    ------
    OSError
        If it cannot be written; what was there before is there still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as half:
        half.write_bytes(data)


def write_result(path: Path, text: str) -> None:
    """Write a file of text, whole or not at all, over one that is there.

    Raises
    ------
    UserError
        If it cannot be written; what was there before is there still.
    """
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}. Is the disk full?") from None


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
    """Write an .h5ad, whole or not at all, where no file is yet.

    Raises
    ------
    UserError
        If one is there, or it cannot be written.
    """
    try:
        with whole(path, replace=False) as half, slashes_in_names():
            adata.write_h5ad(half, compression="gzip")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}. Is the disk full?") from None
    except ValueError as error:
        if "NULL" not in str(error):  # how h5py says it
            raise
        raise UserError(f"{path} cannot be written: a text in uns holds a NUL character. Remove it.") from None


def sync_file(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
