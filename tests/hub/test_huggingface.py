"""Models at a hub: pushed and fetched by the real library from a server on loopback that speaks its protocol."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bgen.errors import UserError
from bgen.hub import huggingface
from bgen.tasks.load import load_model

sys.path.append(str(Path(__file__).parent))
from hub_server import Hub, serving

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="not installed: huggingface_hub (extra hub)"
)
# What the library itself calls of the one below it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ADDRESS = "hf://lab/blood"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", "secret")
        if importlib.util.find_spec("huggingface_hub") is not None:
            from huggingface_hub import constants

            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
            monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
            monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


@needs_library
def test_a_round_trip_keeps_the_fingerprint(hub: Hub, demo: Any, bgen: Any) -> None:
    done = bgen("push", demo.model, ADDRESS, "--private")
    assert done.code == 0, done
    first = hub.repos["lab/blood"]["commits"][-1][0]
    assert f"{ADDRESS}@{first}" in done.out
    assert hub.repos["lab/blood"]["private"]
    files = hub.repos["lab/blood"]["commits"][-1][1]
    assert {"config.json", "model.safetensors", "genes.csv", "README.md"} <= set(files)
    assert hub.objects, "weights go the way of large files"
    straight = load_model(demo.model)
    fetched = load_model(ADDRESS)
    assert fetched.saved.fingerprint() == straight.saved.fingerprint()
    assert (fetched.generate(5, seed=1).X != straight.generate(5, seed=1).X).nnz == 0
    hub.asked.clear()
    load_model(ADDRESS, revision=first)  # a commit does not change: it is in the cache
    assert not [path for command, path in hub.asked if "/resolve/" in path]


@needs_library
def test_commands_take_addresses_and_revisions(hub: Hub, demo: Any, bgen: Any, tmp_path: Path) -> None:
    assert bgen("push", demo.model, ADDRESS).code == 0
    first = hub.repos["lab/blood"]["commits"][-1][0]
    assert bgen("push", demo.vae / "model", ADDRESS).code == 0  # another model, with other files
    assert "conditions.csv" in hub.repos["lab/blood"]["commits"][-1][1]
    done = bgen("generate", f"{ADDRESS}@{first}", "--n", 4, "--out", tmp_path / "new.h5ad")
    assert done.code == 0, done
    done = bgen("generate", ADDRESS, "--n", 4, "--out", tmp_path / "none.h5ad")
    assert (done.code, "generate" in done.err) == (2, True)  # the newest is a VAE
    tuned = ["--task", "generate", "--out", tmp_path / "tuned", "train.steps=2", "track.mlflow=false"]
    done = bgen("finetune", f"{ADDRESS}@{first}", demo.cells, *tuned)
    assert done.code == 0, done


@needs_library
def test_what_was_changed_in_the_cache_is_refused(hub: Hub, demo: Any) -> None:
    huggingface.push(demo.model, ADDRESS)
    folder = huggingface.fetch(ADDRESS)
    for name in ("model.safetensors", "genes.csv"):  # a large file and a small one have different checksums
        place = (folder / name).resolve()
        whole = place.read_bytes()
        place.chmod(0o644)
        place.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name} is not what the hub says it is"):
            huggingface.fetch(ADDRESS)
        place.write_bytes(whole)
    assert huggingface.fetch(ADDRESS) == folder
    with pytest.raises(UserError, match="has other weights"):
        load_model(ADDRESS, fingerprint="0" * 16)
    known = load_model(ADDRESS).saved.fingerprint()
    assert load_model(ADDRESS, fingerprint=known[:16]).saved.fingerprint() == known


@needs_library
@pytest.mark.parametrize("name", ["model.safetensors", "genes.csv"])  # a large file and a small one
def test_what_was_changed_on_the_way_is_refused(hub: Hub, demo: Any, name: str) -> None:
    huggingface.push(demo.model, ADDRESS)
    hub.changed_on_the_way = {name}
    for _ in range(2):  # what is refused is not taken from the cache either
        with pytest.raises(UserError, match=f"{name} is not what the hub says it is") as raised:
            load_model(ADDRESS)
    hub.changed_on_the_way.clear()
    Path(str(raised.value).partition("Remove ")[2].partition(", and load")[0]).unlink()
    assert load_model(ADDRESS).saved.fingerprint() == load_model(demo.model).saved.fingerprint()


@needs_library
def test_a_hub_that_is_away_leaves_the_cache(hub: Hub, demo: Any) -> None:
    huggingface.push(demo.model, ADDRESS)
    load_model(ADDRESS)
    address = hub.address
    hub.shutdown()
    hub.server_close()
    code = f"import bgen; print(len(bgen.load('{ADDRESS}').genes)); bgen.load('hf://lab/other')"
    from huggingface_hub import constants

    environment = {**os.environ, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": address}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == str(len(load_model(demo.model).genes)), done.stderr
    assert "lab/other is not in the cache of this machine, and HF_HUB_OFFLINE is set." in done.stderr


@needs_library
@pytest.mark.parametrize(
    ("address", "options", "told"),
    [
        ("hf://lab/none", {}, "The hub has no model lab/none"),
        (ADDRESS, {"revision": "v9"}, "lab/blood has no revision 'v9'"),
        (f"{ADDRESS}@main", {"revision": "other"}, "give one of them"),
        ("hf://lab", {}, "write hf://owner/name"),
        ("hf://lab/a--b", {}, "no name of a model"),
    ],
)
def test_mistakes_are_one_sentence(hub: Hub, demo: Any, address: str, options: dict[str, str], told: str) -> None:
    huggingface.push(demo.model, ADDRESS)
    with pytest.raises(UserError, match=told) as raised:
        load_model(address, **options)
    assert "\n" not in str(raised.value)


@needs_library
def test_who_may_not_is_told(hub: Hub, demo: Any, bgen: Any, tmp_path: Path) -> None:
    hub.token = "another"
    with pytest.raises(UserError, match="set HF_TOKEN"):
        load_model(ADDRESS)
    done = bgen("push", demo.model, ADDRESS)
    assert (done.code, "Traceback" in done.err) == (2, False)
    (tmp_path / "empty").mkdir()
    done = bgen("push", tmp_path / "empty", ADDRESS)
    assert (done.code, "is not a model directory" in done.err) == (2, True)


def test_without_the_library_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'bgen-flow\[hub\]'"):
        load_model(ADDRESS)
