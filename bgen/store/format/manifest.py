"""``manifest.json``: what a store holds, and the checksum of every file in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from bgen.cpus import cpus
from bgen.errors import Unreachable, UserError

NAME = "manifest.json"
VERSION = 1

MOST_BYTES = 128 << 20
"""Bytes of a manifest or an index, at most."""

Number = Annotated[int, Field(ge=0, lt=1 << 62)]


def require_inside(name: str) -> str:
    """Return the name of a file of a store, a path with ``/`` that stays in the store's folder.

    Raises
    ------
    ValueError
        If it leads elsewhere, or could on some system.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or not name.isprintable():
        raise ValueError(f"'{name}' is no name of a file in a store")
    return name


FileName = Annotated[str, AfterValidator(require_inside)]


class Part(BaseModel):
    """A part of the manifest; unknown keys are errors, since they come from another version of bgen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Column(Part):
    """A column of obs: codes of categories, or numbers."""

    kind: Literal["category", "number"]
    categories: list[str] = Field(default_factory=list, description="Their names in the order of the codes.")


class File(Part):
    """A file of the store."""

    bytes: Number
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Source(Part):
    """An input file, as it was read."""

    name: str
    bytes: int
    cells: int
    kept: int
    matrix: str
    kind: str = Field("", description="What the file is: h5ad, 10x h5, ...")
    rounding: str = Field("none", description="How its values became integers.")
    genes: int = Field(0, description="Genes of the store that it has.")
    genes_left_out: int = Field(0, description="Its genes that the reference vocabulary does not have.")
    fixes: list[str] = Field(default_factory=list, description="What was mended while reading, by check id.")


class Manifest(Part):
    """Everything about a store but its arrays."""

    format: Literal["bgen-store"] = "bgen-store"
    version: Literal[1] = 1
    created_by: str
    profile: Literal["small", "fast"]
    organism: str
    n_cells: Number
    n_genes: Annotated[int, Field(ge=0, lt=1 << 31)]
    n_nonzeros: Number
    n_chunks: Number
    gap_bytes: Annotated[int, Field(gt=0, lt=1 << 62, description="Bytes of a chunk of gaps.")]
    count_bytes: Annotated[int, Field(gt=0, lt=1 << 62, description="Bytes of a chunk of counts.")]
    genes_sha256: str = Field(description="Hash of the gene ids in the store's order.")
    columns: dict[str, Column]
    roles: dict[str, str] = Field(
        description="cell_type, batch, donor, time, ...: name of the column; more conditions are condition_2, ..."
    )
    left_out: list[str] = Field(default_factory=list, description="obs columns with too many distinct texts.")
    units: dict[str, str] = Field(default_factory=dict, description="Unit of time and of dose.")
    control: str | None = Field(None, description="The category of the perturbation column that means 'none'.")
    split_by: str | None = Field(None, description="Column whose values are kept together in one split; None: cells.")
    held_out: dict[str, list[str]] = Field(
        default_factory=dict, description="Split to the values of split_by that were put there by name."
    )
    vocabulary: str = Field("union", description="union of the inputs' genes, or the name of a reference file.")
    splits: dict[str, Number] = Field(description="Split to number of cells; a split's code is its place here.")
    seed: int
    sources: list[Source]
    files: dict[FileName, File]
    fingerprint: str = ""

    def with_fingerprint(self) -> Manifest:
        """Return the manifest with the fingerprint of everything else in it."""
        full = Manifest.model_validate(self.model_dump())
        return full.model_copy(update={"fingerprint": full.digest()})

    def digest(self) -> str:
        """Return the hash of everything that is set but the fingerprint.

        A field that was not written does not count, so that the manifests of older stores stay valid.
        """
        bare = self.model_copy(update={"fingerprint": ""})
        return hashlib.sha256(bare.model_dump_json(exclude_unset=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``, the last file of a store."""
        (folder / NAME).write_text(json.dumps(self.model_dump(), indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read and validate the manifest of a store.

    Raises
    ------
    UserError
        If there is none, or it was damaged, or another version of bgen wrote it.
    """
    path = folder / NAME
    if not folder.exists():
        raise UserError(f"There is no store at {folder}. `bgen data build` writes one.")
    if not path.is_file():
        raise UserError(
            f"{folder} is not a store: it has no {NAME}. `bgen data build` writes one when it has finished."
        )
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
        tree: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). Build the store again.") from None
    except OSError as error:
        raise Unreachable(f"{path} cannot be read ({error}).") from None
    if isinstance(tree, dict) and tree.get("version", VERSION) != VERSION:
        raise UserError(f"{path} has version {tree['version']}; this bgen reads version {VERSION}.")
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is damaged: {where}: {first['msg']}. Build the store again.") from None
    if manifest.digest() != manifest.fingerprint:
        raise UserError(f"{path} was changed after the store was built. Build the store again.")
    return manifest


def hash_file(path: Path) -> File:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return File(bytes=path.stat().st_size, sha256=digest)


def hash_bytes(data: bytes) -> File:
    """Return size and SHA-256 of the bytes of a file."""
    return File(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def hash_folder(
    folder: Path, *, known: Mapping[str, File] = MappingProxyType({}), leave_out: str = ""
) -> dict[str, File]:
    """Return the :class:`File` of every file below a folder but the manifest, by its path there.

    Parameters
    ----------
    known
        Files that were hashed already.
    leave_out
        A folder in it that does not count.
    """
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    names = [path.as_posix() for path in paths if path.parts[0] != leave_out]
    with ThreadPoolExecutor(cpus() + 4) as pool:
        return dict(zip(names, pool.map(lambda name: known.get(name) or hash_file(folder / name), names), strict=True))


def read_checked(folder: Path, name: str, file: File) -> bytes:
    """Return the bytes of a file of a store, which are those that were written.

    Raises
    ------
    ValueError
        If they are not, or it is missing.
    OSError
        If it cannot be read.
    """
    try:
        with (folder / name).open("rb") as stream:
            data = stream.read(file.bytes + 1)
    except FileNotFoundError:
        raise ValueError(f"{name} is missing") from None
    return require_written(data, name, file)


def require_written(data: bytes, name: str, file: File) -> bytes:
    """Return the bytes of a file of a store.

    Raises
    ------
    ValueError
        If they are not those that were written.
    """
    if len(data) != file.bytes or hash_bytes(data) != file:
        raise ValueError(f"{name} does not have the bytes that were written")
    return data


def check_files(folder: Path, manifest: Manifest, *, checksums: bool, below: str = "") -> list[str]:
    """Compare the files of a store with its manifest and describe each difference.

    Parameters
    ----------
    checksums
        Read every byte; otherwise only compare the sizes.
    below
        Only files whose path in the store begins so.
    """
    wanted = {name: file for name, file in manifest.files.items() if name.startswith(below)}

    def look(item: tuple[str, File]) -> str | None:
        name, file = item
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            if path.stat().st_size != file.bytes:
                return f"{name} has {path.stat().st_size:,} bytes, not {file.bytes:,}"
            if checksums and hash_file(path).sha256 != file.sha256:
                return f"{name} does not have the bytes that were written (its checksum differs)"
        except OSError as error:
            return f"{name} cannot be read ({error})"
        return None

    with ThreadPoolExecutor(cpus() + 4) as pool:
        return [problem for problem in pool.map(look, wanted.items()) if problem]
