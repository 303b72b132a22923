from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from bgen.config.load import find_config, load_config, load_either, load_finetune, packaged_configs, to_yaml, validate
from bgen.config.run import Config
from bgen.config.section import named_files
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


@pytest.mark.parametrize("value", ["5", "[[1]]", "[a: b]", "{a: b}", "true"])
def test_extends_names_files(tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match="extends names a file or a list of files"):
        load_config(write(tmp_path / "x.yaml", f"extends: {value}\n"))


def test_files_that_extend_the_same_ones_are_read_once(tmp_path: Path) -> None:
    write(tmp_path / "f0.yaml", "extends: vae\n")
    for number in range(1, 25):  # 2^24 ways lead to the first one
        write(tmp_path / f"f{number}.yaml", f"extends: [f{number - 1}, f{number - 1}]\n")
    assert load_config(tmp_path / "f24.yaml", ["data.store=s", "out=o"]).stage == "vae"
    write(tmp_path / "g0.yaml", "extends: vae\n")
    for number in range(1, 40):
        write(tmp_path / f"g{number}.yaml", f"extends: g{number - 1}\n")
    with pytest.raises(UserError, match="more than 30 configurations extend one another"):
        load_config(tmp_path / "g39.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in pairwise("abcdefghijklmnopqr")), "aliases"),
        ("a: &a [*a]\n", "aliases"),
        ("[" * 20_000, "nested too deeply"),
        ("a: " + "9" * 5000 + "\n", "not valid YAML"),
        ("#" * 2_000_000, "it is no configuration"),
        ("a: \x00", "not valid YAML"),
    ],
)  # fmt: skip
def test_yaml_that_would_take_all_memory_or_time(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config(write(tmp_path / "x.yaml", text))
    assert len(str(error.value)) < 2000


def test_numbers_are_finite_and_long_values_are_shortened(base: Path) -> None:
    for override in ("train.learning_rate=.inf", "train.learning_rate=.nan"):
        with pytest.raises(UserError, match=r"train\.learning_rate"):
            load_config(base, [override])
    with pytest.raises(UserError) as error:
        load_config(base, [f"train.steps={'x' * 5000}"])
    assert len(str(error.value)) < 600


def test_a_fine_tuning_names_its_parent_and_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    config = load_finetune("finetune", ["parent=models/blood", "train.steps=7"])
    assert (config.parent, config.flow.vae, config.train.steps) == (Path("models/blood"), None, 7)
    assert load_either(write(tmp_path / "resolved.yaml", to_yaml(config))) == config
    with pytest.raises(UserError, match="data: unknown key"):
        load_finetune("finetune", ["data.store=store"])
    with pytest.raises(UserError, match="parent: unknown key"):
        load_config("finetune")
    assert type(load_either("vae")) is Config


def test_levels_are_fitted_where_cells_are_generated_one_by_one() -> None:
    flow = ["data.store=store", "flow.vae=vae", "train.global_batch=64"]
    assert load_config("flow", flow).flow.fit_levels
    with pytest.raises(UserError, match=r"flow\.fit_levels"):
        load_config("flow", [*flow, "data.trajectories={system: [donor], times: 2, cells: 8}"])
    with pytest.raises(UserError, match=r"flow\.fit_levels"):
        load_finetune("finetune", ["parent=model", "flow.fit_levels=true"])


# Those of sizes are parts that others extend; tests/models/backbones/test_sizes.py reads them so.
WHOLE = sorted(path for path in packaged_configs().rglob("*.yaml") if packaged_configs() / "sizes" not in path.parents)


@pytest.mark.parametrize("path", WHOLE, ids=lambda p: p.stem)
def test_every_packaged_config_is_valid(path: Path) -> None:
    assert find_config(path.relative_to(packaged_configs()).with_suffix("")) == path
    load_either(path)


def test_nearest() -> None:
    assert nearest("celltype", ["cell_type", "batch"]) == " Did you mean 'cell_type'?"
    assert nearest("Batch", ["cell_type", "batch"]) == " Did you mean 'batch'?"
    assert nearest("zzz", ["a", "b"]) == nearest("zzz", ["a", "b", "a"]) == " There are: a, b."
    assert nearest("zzz", []) == ""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("flow.mixing.share=0.5", "only trajectories along a perturbation are mixed"),
        ("flow.endpoint=0.5", "single cells are no populations"),
    ],
)
def test_settings_of_populations_need_populations(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config("flow", ["data.store=s", override])
    load_config("perturbation", ["data.store=s", override])
    if "mixing" in override:
        with pytest.raises(UserError, match=words):
            load_config("trajectories", ["data.store=s", override])


def test_the_files_that_a_section_names_are_found_wherever_they_stand() -> None:
    config = load_config(
        "vae", ["vae.encoder={name: gene_set, groups: {file: a.gmt}, vectors: {files: [b.csv, c.csv]}}"]
    )
    assert {path.name for path in named_files(config.vae)} == {"a.gmt", "b.csv", "c.csv"}
    assert named_files(None) == []
