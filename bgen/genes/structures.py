"""What is known of a drug by its structure: Morgan fingerprints of SMILES (Rogers and Hahn, J. Chem. Inf. Model. 2010).

A bit says that some neighbourhood of two bonds occurs in the molecule, so drugs of one family share many. RDKit (extra
``drugs``) reads the SMILES.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from bgen.errors import UserError

RADIUS, BITS = 2, 2048
"""Of the fingerprints: those that the field calls ECFP4."""

LONGEST = 5_000
"""Characters of a SMILES, at most."""


def read_structures(path: Path) -> tuple[list[str], sp.csr_matrix]:
    """Read a CSV or TSV file with a name and its SMILES in each row, and a heading: names, and bits ``[rows, BITS]``.

    Raises
    ------
    UserError
        If the file cannot be read, a SMILES is none, a name comes twice, or RDKit is missing.
    """
    if not path.is_file():
        raise UserError(f"flow.members.structures: there is no file {path}.")
    try:
        from rdkit.Chem import MolFromSmiles
        from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
        from rdkit.rdBase import BlockLogs
    except ImportError:
        raise UserError(
            "flow.members.structures needs RDKit: install the extra, as in `pip install 'bgen-flow[drugs]'`."
        ) from None
    try:
        separator = "\t" if path.suffix.lower() in (".tsv", ".txt", ".smi") else ","
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except (ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise UserError(f"{path} is no table of structures: {str(error)[:200]}.") from None
    if table.shape[1] < 2 or not len(table):
        raise UserError(f"{path} is no table of structures: it needs a heading, and rows of a name and its SMILES.")
    names = [name.strip() for name in table.iloc[:, 0]]
    twice = pd.Index(names).duplicated()
    if twice.any():
        raise UserError(f"{path}: '{names[int(np.flatnonzero(twice)[0])]}' has two structures.")
    generator, bits = GetMorganGenerator(radius=RADIUS, fpSize=BITS), []
    with BlockLogs():  # what it says of a SMILES that it cannot read; the row is named here
        for row, (name, smiles) in enumerate(zip(names, table.iloc[:, 1], strict=True), 2):
            molecule = MolFromSmiles(smiles.strip()) if len(smiles) <= LONGEST else None
            if molecule is None or not molecule.GetNumAtoms():
                raise UserError(f"{path}, line {row}: '{smiles[:80]}' of '{name}' is no SMILES.")
            bits.append(list(generator.GetFingerprint(molecule).GetOnBits()))
    indptr = np.concatenate([[0], np.cumsum([len(found) for found in bits])])
    columns = np.concatenate([np.asarray(found, np.int64) for found in bits])
    return names, sp.csr_matrix((np.ones(len(columns)), columns, indptr), (len(names), BITS))
