from __future__ import annotations

from pathlib import Path

import pytest

from bgen.config.load import find_config, load_config, load_either, load_finetune, packaged_configs, to_yaml, validate
from bgen.config.run import Config
from bgen.errors import UserError, nearest


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.yaml", "stage: vae\nout: run\ndata: {store: store, lanes: 4}\nvae: {latent: 7}\n")


def test_extends_merges_and_overrides_win(tmp_path: Path, base: Path) -> None:
    child = write(tmp_path / "child.yaml", "extends: base.yaml\ndata: {lanes: 2}\ntrain: {steps: 3}\n")
    config = load_config(child, ["train.steps=9", "vae.covariates=[batch]", "train.learning_rate=1e-4"])
    assert (config.data.store, config.data.lanes, config.vae.latent) == ("store", 2, 7)
    assert (config.train.steps, config.vae.covariates, config.train.learning_rate) == (9, ["batch"], 1e-4)


def test_later_base_wins(tmp_path: Path, base: Path) -> None:
    write(tmp_path / "other.yaml", "data: {lanes: 16}\n")
    child = write(tmp_path / "child.yaml", "extends: [base.yaml, other.yaml]\n")
    assert load_config(child).data.lanes == 16


def test_resolved_yaml_reads_back(tmp_path: Path, base: Path) -> None:
    config = load_config(base, ["train.zero=0"])
    assert load_config(write(tmp_path / "resolved.yaml", to_yaml(config))) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stepps=3", ["train.stepps", "unknown key", "'steps'"]),
        ("trian.steps=3", ["trian", "unknown key", "'train'"]),
        ("train.steps=0", ["train.steps", "greater than 0"]),
        ("train.steps=many", ["train.steps", "'many'"]),
        ("vae.likelihood=poisson", ["vae.likelihood", "'nb' or 'zinb'"]),
        ("stage=flow", ["flow.vae"]),
        ("train.steps", ["section.key=value"]),
        ("train.steps=[", ["YAML"]),
    ],
)
def test_mistakes_are_named_with_path_and_nearest(base: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(base, [override])
    for part in parts:
        assert part in str(error.value)


def test_all_mistakes_are_collected() -> None:
    with pytest.raises(UserError) as error:
        validate({"stage": "vae", "data": {"stor": "x"}, "train": {"clip": -1}}, Config, source="x")
    for part in ("data.stor:", "data.store: is needed", "out: is needed", "train.clip"):
        assert part in str(error.value)


def test_missing_file_cycle_and_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no configuration file 'nowhere'"):
        load_config("nowhere")
    loop = write(tmp_path / "loop.yaml", "extends: loop.yaml\n")
    with pytest.raises(UserError, match="extends itself"):
        load_config(loop)
    with pytest.raises(UserError, match="key: value"):
        load_config(write(tmp_path / "list.yaml", "- a\n"))


def test_a_fine_tuning_names_its_parent_and_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    config = load_finetune("finetune", ["parent=models/blood", "train.steps=7"])
    assert (config.parent, config.flow.vae, config.train.steps) == (Path("models/blood"), None, 7)
    assert load_either(write(tmp_path / "resolved.yaml", to_yaml(config))) == config
    with pytest.raises(UserError, match="data: unknown key"):
        load_finetune("finetune", ["data.store=store"])
    with pytest.raises(UserError, match="parent: unknown key"):
        load_config("finetune")
    assert type(load_either("vae")) is Config


# Those of sizes are parts that others extend; tests/models/test_sizes.py reads them so.
WHOLE = sorted(path for path in packaged_configs().rglob("*.yaml") if path.parent.name != "sizes")


@pytest.mark.parametrize("path", WHOLE, ids=lambda p: p.stem)
def test_every_packaged_config_is_valid(path: Path) -> None:
    assert find_config(path.relative_to(packaged_configs()).with_suffix("")) == path
    load_either(path)


def test_nearest() -> None:
    assert nearest("celltype", ["cell_type", "batch"]) == " Did you mean 'cell_type'?"
    assert nearest("Batch", ["cell_type", "batch"]) == " Did you mean 'batch'?"
    assert nearest("zzz", ["a", "b"]) == " There are: a, b."
    assert nearest("zzz", []) == ""
