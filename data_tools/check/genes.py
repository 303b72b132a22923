"""Which genes a file has: identity, duplicates, naming system and organism (checks G01 to G03).

Axes: M columns of a file, G final genes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.errors import nearest
from data_tools.check.findings import Finding, Level, listed

MergeDuplicates = Literal["no", "sum"]

SYSTEMS = {
    "Ensembl": r"^ENS[A-Z]{0,6}G\d{11}(?:\.\d+)?(?:_PAR_Y)?$",
    "WormBase": r"^WBGene\d{8}$",
    "FlyBase": r"^FBgn\d{7}$",
    "spike-in": r"^ERCC-\d{5}$",
    "interval": r"^(?:chr)?[A-Za-z0-9._]{1,20}[:_-]\d{2,}[-_]\d{2,}$",
    "number": r"^\d+(?:\.0)?$",
    "counter": r"^(?:V|X|x|var|gene|Gene|GENE|feature|Feature|g|G)[_.\-]?\d+$",
}
"""Naming systems, by how an id is written, tried in this order; anything else is a symbol."""

SYMBOL_COLUMNS = ("feature_name", "gene_symbol", "gene_symbols", "symbol", "gene_name", "gene_names", "gene_short_name")
ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl", "ensembl_gene_id", "feature_id")
KIND_COLUMNS = ("feature_types", "feature_type")

# What a spreadsheet makes of MARCH1, SEPT2, DEC1: 1-Mar, Sep-02, 2021-09-02, Mar-01.
DATE = r"^(?:\d{1,2}-(?:Mar|Sep|Dec)|(?:Mar|Sep|Dec)-\d{1,2}|(?:19|20)\d\d-(?:03|09|12)-\d\d(?: 00:00:00)?)$"

ORGANISMS = {
    "Homo sapiens": ("human", "h. sapiens", "hsapiens", "9606", "ncbitaxon:9606"),
    "Mus musculus": ("mouse", "m. musculus", "mmusculus", "10090", "ncbitaxon:10090"),
    "Rattus norvegicus": ("rat", "10116", "ncbitaxon:10116"),
    "Danio rerio": ("zebrafish", "d. rerio", "7955", "ncbitaxon:7955"),
    "Drosophila melanogaster": ("fly", "fruit fly", "d. melanogaster", "7227", "ncbitaxon:7227"),
    "Caenorhabditis elegans": ("worm", "c. elegans", "celegans", "6239", "ncbitaxon:6239"),
    "Macaca mulatta": ("rhesus macaque", "9544", "ncbitaxon:9544"),
    "Sus scrofa": ("pig", "9823", "ncbitaxon:9823"),
    "Gallus gallus": ("chicken", "9031", "ncbitaxon:9031"),
}
PREFIXES = {
    r"^ENSG\d": "Homo sapiens",
    r"^ENSMUSG\d": "Mus musculus",
    r"^ENSRNOG\d": "Rattus norvegicus",
    r"^ENSDARG\d": "Danio rerio",
    r"^ENSMMUG\d": "Macaca mulatta",
    r"^ENSSSCG\d": "Sus scrofa",
    r"^ENSGALG\d": "Gallus gallus",
    r"^FBgn\d": "Drosophila melanogaster",
    r"^WBGene\d": "Caenorhabditis elegans",
    r"^(?:GRCh38|hg19|hg38)_": "Homo sapiens",
    r"^(?:GRCm38|GRCm39|mm10|mm39)_": "Mus musculus",
}


@dataclass
class Genes:
    """The genes of a file.

    Attributes
    ----------
    ids, symbols
        ``[G]``: final ids, in order of first appearance, and symbols (the id where there is none).
    gene_map
        int64 ``[M]``: number of the id that a column belongs to, -1 = left out.
    system
        Naming system of most ids: a key of :data:`SYSTEMS`, "symbol", or "none" for genes without names.
    findings
        What was found, in terms of this file.
    """

    ids: pd.Index
    symbols: pd.Index
    gene_map: NDArray[np.int64]
    system: str
    findings: list[Finding] = field(default_factory=list)


def resolve_genes(
    var: pd.DataFrame,
    gene_column: str | None = None,
    merge_duplicates: MergeDuplicates = "no",
    *,
    accept_unnamed: bool = False,
    synthetic: bool = False,
) -> Genes:
    """Decide which gene each column is.

    Columns that 10x marks as something other than gene expression (antibodies, guides) are left out, and versions of
    Ensembl ids are cut off; both are reported. Ids that occur twice are an error unless they are to be summed.

    Parameters
    ----------
    var
        Annotation of the M columns.
    gene_column
        Column of ``var`` with the ids; default: its index.
    synthetic
        The genes are simulated, so that "G0012" is a name.
    """
    findings: list[Finding] = []

    def add(id: str, level: Level, message: str) -> None:
        findings.append(Finding(id, level, message))

    if gene_column is not None and gene_column not in var:
        add("G02", "error", f"--gene-column: var has no column '{gene_column}'.{nearest(gene_column, var.columns)}")
        gene_column = None
    names = var.index if gene_column is None else pd.Index(var[gene_column])
    missing = np.asarray(names.isna())
    ids = names.astype(str).str.strip()
    missing |= np.asarray(ids.isin(["", "nan", "None", "NaN", "<NA>"]))
    keep = _expression(var, findings)
    if (missing & keep).any():
        other = _better_column(var, gene_column)
        add("G01", "error", f"{(missing & keep).sum():,} genes have no id.{other} Name them or remove them.")
        keep &= ~missing

    ids = _without_versions(ids, keep, findings)
    system = _check_system(ids[keep], var, gene_column, accept_unnamed, synthetic, findings)
    dates = ids[keep & np.asarray(ids.str.match(DATE))]
    if len(dates):
        add("G01", "error", f"{len(dates)} gene symbols became dates in a spreadsheet: {listed(dates)}. "
            "Restore them in var (1-Mar is MARCHF1 or MTARC1, 2-Sep is SEPTIN2, 1-Dec is DELEC1)"
            f"{_better_column(var, gene_column) or ' and write the file again.'}")  # fmt: skip

    final = pd.Index(ids[keep].unique())
    gene_map = np.where(keep, final.get_indexer(ids), -1).astype(np.int64)
    repeated = ids[keep][ids[keep].duplicated()].unique()
    if len(repeated):
        message = f"{len(repeated):,} gene ids occur more than once: {listed(repeated)}."
        if merge_duplicates == "sum":
            add("G01", "fix", f"{message} Their counts are added up.")
        else:
            other = _better_column(var, gene_column)
            add("G01", "error", f"{message} Add them up with --merge-duplicates sum, or make them unique.{other}")
    first = pd.Series(np.flatnonzero(keep)).groupby(gene_map[keep], sort=True).first().to_numpy()
    return Genes(final, _symbols(var, final, first, gene_column), gene_map, system, findings)


def _expression(var: pd.DataFrame, findings: list[Finding]) -> NDArray[np.bool_]:
    """Return which columns are genes, by 10x's feature type."""
    keep = np.ones(len(var), dtype=bool)
    for column in KIND_COLUMNS:
        kinds = var[column].astype(str) if column in var else pd.Series(dtype=str)
        if (kinds == "Gene Expression").any() and (kinds != "Gene Expression").any():
            keep = (kinds == "Gene Expression").to_numpy()
            others = kinds[~keep].value_counts()
            what = ", ".join(f"{n:,} '{kind}'" for kind, n in others.items())
            findings.append(Finding("G02", "fix", f"features that are not genes are left out: {what}."))
            break
    return keep


def _without_versions(ids: pd.Index, keep: NDArray[np.bool_], findings: list[Finding]) -> pd.Index:
    versioned = np.asarray(ids.str.match(r"^ENS[A-Z]{0,6}G\d{11}\.\d+")) & keep
    if not versioned.any():
        return ids
    cut = ids.str.replace(r"^(ENS[A-Z]{0,6}G\d{11})\.\d+", r"\1", regex=True)
    i = int(np.flatnonzero(versioned)[0])
    findings.append(
        Finding(
            "G01", "fix", f"{versioned.sum():,} Ensembl ids carry a version, which is cut off: {ids[i]} is {cut[i]}."
        )
    )
    return cut


def systems_of(ids: pd.Index) -> pd.Series:
    """Return the naming system of each id."""
    system = pd.Series("symbol", index=range(len(ids)))
    for name, pattern in reversed(SYSTEMS.items()):
        system[np.asarray(ids.str.match(pattern))] = name
    return system


def _check_system(
    ids: pd.Index,
    var: pd.DataFrame,
    gene_column: str | None,
    accept_unnamed: bool,
    synthetic: bool,
    findings: list[Finding],
) -> str:
    """Check G02 on one file, and return the naming system of most ids."""
    share = systems_of(ids).value_counts(normalize=True)
    main = str(share.index[0]) if len(share) else "symbol"
    other = _better_column(var, gene_column)
    where = "the index of var" if gene_column is None else f"var['{gene_column}']"
    if main in ("number", "counter"):
        numbers = np.asarray(ids.str.extract(r"(\d+)", expand=False), dtype=float)
        numbers = numbers[np.isfinite(numbers)]
        # Positions of a subset of genes are small and ascend; Entrez ids do neither.
        in_sequence = numbers.max() < 2 * len(ids) or (numbers.max() < 70_000 and (np.diff(numbers) > 0).all())
        if main == "counter" and (synthetic or not in_sequence):
            return "symbol"
        if in_sequence:
            unnamed = (
                f"the genes have no names: {where} only counts them ({listed(ids, 3)}). A model trained on them can "
                "never be matched to other data."
            )
            if accept_unnamed:
                findings.append(Finding("G02", "warning", f"{unnamed} Accepted as you asked (--accept-unnamed-genes)."))
            else:
                fix = other or " Put gene ids into var, or go on with the numbers: --accept-unnamed-genes."
                findings.append(Finding("G02", "error", f"{unnamed}{fix}"))
            return "none"
        findings.append(
            Finding("G02", "warning", f"gene ids are numbers ({listed(ids, 3)}): taken as Entrez ids.{other}")
        )
        return "number"
    if main == "interval":
        findings.append(
            Finding(
                "G02",
                "error",
                f"{where} holds genomic intervals ({listed(ids, 3)}), not genes: is this chromatin accessibility"
                f" (ATAC)? bgen models counts of genes: give the file or modality with these.{other}",
            )
        )
        return main
    named = share.drop("spike-in", errors="ignore")
    if len(named) > 1 and named.iloc[1] > 0.01 and main != "spike-in":
        parts = ", ".join(f"{part:.0%} {name}" for name, part in named[named > 0.01].items())
        examples = listed(ids[(systems_of(ids) == named.index[1]).to_numpy()], 3)
        findings.append(
            Finding(
                "G02", "warning", f"{where} mixes naming systems: {parts}, such as {examples}. They are kept.{other}"
            )
        )
    if spikes := int(ids.str.match(SYSTEMS["spike-in"]).sum()):
        findings.append(
            Finding("G02", "warning", f"{spikes} ERCC spike-ins are kept as genes. Remove them if they are not wanted.")
        )
    return main


def _better_column(var: pd.DataFrame, gene_column: str | None) -> str:
    """Return " Or use var['x'] ...", a hint at a column with unique and proper ids, or an empty string."""
    for column in (*ID_COLUMNS, *SYMBOL_COLUMNS):
        if column in var and column != gene_column and not var[column].isna().any() and var[column].is_unique:
            main = systems_of(pd.Index(var[column].astype(str))).mode()[0]
            if main not in ("number", "counter", "interval"):
                what = "symbols" if main == "symbol" else f"{main} ids"
                return f" var['{column}'] has unique {what}: --gene-column {column}."
    return ""


def _symbols(var: pd.DataFrame, ids: pd.Index, first: NDArray[np.int64], gene_column: str | None) -> pd.Index:
    """Return the symbols of the final ids; ``first [G]`` is the column that each was first seen in."""
    for column in SYMBOL_COLUMNS:
        if column in var and column != gene_column:
            found = var[column].astype(object).to_numpy()[first]
            return pd.Index(np.where(pd.isna(found), ids, found).astype(str))
    if gene_column is not None and systems_of(ids).mode()[0] != "symbol":
        return pd.Index(var.index.astype(str)[first])
    return ids


def latin(name: str) -> str:
    """Return the Latin name of an organism given by a usual name or taxon number; an unknown one as it is."""
    folded = name.strip().lower()
    for organism, names in ORGANISMS.items():
        if folded in (organism.lower(), *names):
            return organism
    return name.strip()


def _organisms_of(ids: pd.Index, symbols: pd.Index) -> dict[str, float]:
    """Return the share of ids that show each organism by their prefix, shares below 1 % left out."""
    found: dict[str, float] = {}
    for names in (ids, symbols):
        for pattern, organism in PREFIXES.items():
            if (share := float(names.str.match(pattern).mean())) > 0.01:
                found[organism] = max(found.get(organism, 0.0), share)
        if found:
            break
    return found


def resolve_organism(
    given: str | None, uns: dict[str, Any], obs: pd.DataFrame, genes: Genes, where: str
) -> tuple[str, list[Finding]]:
    """Decide the organism of a file (check G03): given, else declared in uns or obs, else read from the genes."""
    findings: list[Finding] = []
    declared: list[str] = []
    for key in ("organism", "species", "organism_ontology_term_id"):
        if isinstance(uns.get(key), str):
            declared.append(latin(uns[key]))
        elif key in obs:
            declared += [latin(str(value)) for value in obs[key].dropna().unique()]
        if declared:
            break
    declared = sorted(set(declared))
    shown = _organisms_of(genes.ids, genes.symbols)

    def add(level: Level, message: str) -> None:
        findings.append(Finding("G03", level, message, where))

    if len(shown) > 1:
        parts = ", ".join(f"{share:.0%} {organism}" for organism, share in shown.items())
        add("error", f"the genes are of several organisms: {parts}. Write one file per organism.")
    if given is None and len(declared) > 1:
        add("error", f"the cells are of several organisms: {listed(declared)}. Write one file per organism.")
    organism = latin(given) if given else (declared[0] if len(declared) == 1 else None)
    if organism and len(shown) == 1 and organism not in shown:
        source = "--organism says" if given else "the file says"
        fix = "" if given else f" Correct it, or say --organism '{next(iter(shown))}'."
        add("error", f"{source} {organism}, but the gene ids are of {next(iter(shown))}.{fix}")
    if organism or len(declared) > 1:
        return organism or "unknown", findings
    if len(shown) == 1:
        return next(iter(shown)), findings
    guess = _guess(genes.symbols) if genes.system == "symbol" else None
    if guess:
        add("warning", f"the organism is not declared. Taken as {guess[0]}: {guess[1]}. To be sure: --organism NAME.")
        return guess[0], findings
    add("warning", "the organism is not declared and the genes do not show it. Say it with --organism NAME.")
    return "unknown", findings


def _guess(symbols: Iterable[str]) -> tuple[str, str] | None:
    """Guess human or mouse by how symbols are written: GAPDH or Gapdh."""
    words = [symbol for symbol in symbols if re.match(r"^[A-Za-z]{2}", symbol)]
    if not words:
        return None
    upper = sum(word[1:].upper() == word[1:] and word[0].isupper() for word in words) / len(words)
    title = sum(bool(re.match(r"^[A-Z][a-z]", word)) for word in words) / len(words)
    if upper > 0.8:
        return "Homo sapiens", f"{upper:.0%} of the symbols are upper case"
    if title > 0.6:
        return "Mus musculus", f"{title:.0%} of the symbols are written like Gapdh"
    return None
