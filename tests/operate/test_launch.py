"""What `bgen launch` renders: right shell, right YAML, one environment everywhere; and a run that it really starts."""

from __future__ import annotations

import math
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefork import python

from bgen.config.load import load_config
from bgen.errors import UserError
from bgen.operate.launch import TARGETS, Launch, fill, launch, packaged_templates
from bgen.operate.launch_environment import forwarded, read_environment
from bgen.operate.plan import plan
from bgen.track import record

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {
    "torchrun": ["hosts=n0,n1"],
    "deepspeed": ["hosts=n0,n1"],
    "k8s": ["image=registry.example/bgen:1"],
    "jobset": ["image=registry.example/bgen:1"],
    "sky": [f"package={ROOT}"],
}
SHELL = [name for name, target in TARGETS.items() if target.template.endswith(".sh")]
FIXED = {v.name: v.value for v in read_environment(packaged_templates() / "environment.yaml", "cuda") if v.value}


@pytest.fixture(autouse=True)
def _quiet_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Render in an empty folder, with none of this shell's variables that would be handed on."""
    monkeypatch.chdir(tmp_path)
    names = re.compile(forwarded(read_environment(packaged_templates() / "environment.yaml", "cuda")))
    for name in list(os.environ):
        if names.fullmatch(name):
            monkeypatch.delenv(name)


def render(target: str, **options: Any) -> Launch:
    options = {
        "nodes": 1 if target == "local" else 2,
        "ranks_per_node": 4,
        "settings": NEEDED.get(target, []),
    } | options
    options["overrides"] = ["out=/data/runs/My_run", "data.store=/data/store", *options.pop("overrides", [])]
    return launch("vae", target, **options)


def documents(made: Launch) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(made.script.read_text()))


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_renders_whole(target: str) -> None:
    made = render(target)
    text = made.script.read_text()
    assert "{{" not in text
    assert "bgen train" in text
    assert "--resume" in text
    assert (made.script.parent / "logs").is_dir()
    assert made.code is None
    config = load_config(made.script.parent / "config.yaml")
    assert config == load_config("vae", ["out=/data/runs/My_run", "data.store=/data/store"])
    for name in FIXED:
        assert name in text, "one environment for all"


@pytest.mark.parametrize("target", SHELL)
def test_shell_is_shell(target: str) -> None:
    made = render(target)
    checked = subprocess.run(["bash", "-n", made.script], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    exports = re.findall(r'^export (\w+)="\$\{\1:-(.*)\}"$', made.script.read_text(), re.M)
    assert dict(exports) == FIXED


def test_broken_shell_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "bad.sh").write_text(render("slurm").script.read_text().replace("if tail", "tail"))
    assert subprocess.run(["bash", "-n", tmp_path / "bad.sh"], capture_output=True, check=False).returncode != 0


def torchrun_options(text: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+)=(\S+)", text))


def test_torchrun_on_two_hosts() -> None:
    options = torchrun_options(render("torchrun").script.read_text().split("exec ")[1])
    assert options["nnodes"] == "2"
    assert options["nproc-per-node"] == "4"
    assert options["rdzv-backend"] == "c10d"
    assert options["rdzv-endpoint"] == "n0:29400"
    assert options["max-restarts"] == "100"
    assert "train.max_restarts=3 --resume" in render("torchrun", out=Path("again")).script.read_text()


def test_torchrun_that_goes_on_with_fewer_hosts() -> None:
    made = render("torchrun", min_nodes=1, settings=["hosts=n0,n1", "restarts=7", "join_timeout=60"])
    options = torchrun_options(made.script.read_text().split("exec ")[1])
    assert options["nnodes"] == "1:2"
    assert "train.max_restarts=7 --resume" in made.script.read_text()
    assert "join_timeout=60" in options["rdzv-conf"]


def test_deepspeed_gets_a_hostfile_and_the_module() -> None:
    made = render("deepspeed")
    assert (made.script.parent / "hostfile").read_text() == "n0 slots=4\nn1 slots=4\n"
    text = made.script.read_text()
    assert re.search(r"--module bgen train \S+/config.yaml --resume$", text.strip())
    assert "--master_addr=n0" in text
    assert f"export DS_ENV_FILE={made.script.parent}/.deepspeed_env" in text


def test_a_hostfile_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("# my cluster\nn5 slots=8\n\nn6 slots=8  # the slow one\n")
    made = render("deepspeed", settings=["hosts=hosts.txt"])
    assert (made.script.parent / "hostfile").read_text() == "n5 slots=4\nn6 slots=4\n"


def test_slurm_asks_for_what_is_needed() -> None:
    text = render("slurm", settings=["partition=gpu", "account=lab", "time=02:00:00"]).script.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
    assert options["nodes"] == "2"
    assert options["ntasks-per-node"] == "1"
    assert options["gpus-per-node"] == "4"
    assert (options["partition"], options["account"], options["time"]) == ("gpu", "lab", "02:00:00")
    assert options["signal"] == "B:USR2@120"
    assert "requeue" in options
    assert "qos" not in options
    # What Slurm reads must stand before the first command.
    first_command = text.index("\nset -")
    assert all(match.start() < first_command for match in re.finditer("#SBATCH", text))


def test_without_gpus_none_are_asked_for() -> None:
    assert "--gpus-per-node" not in render("slurm", device="cpu").script.read_text()
    job = documents(render("k8s", device="cpu"))[1]
    assert set(job["spec"]["trainer"]["resourcesPerNode"]["limits"]) == {"cpu", "memory"}
    assert 'DS_ACCELERATOR:-cpu}"' in render("local", device="cpu").script.read_text()


def test_kubeflow_trainjob() -> None:
    config, job = documents(render("k8s"))
    assert (config["kind"], config["metadata"]["name"]) == ("ConfigMap", "my-run-config")
    assert yaml.safe_load(config["data"]["config.yaml"])["out"] == "/data/runs/My_run"
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert set(job["spec"]) == {"runtimeRef", "trainer", "runtimePatches"}
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "4"
    names = [entry["name"] for entry in trainer["env"]]
    assert len(names) == len(set(names))
    reserved = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
    assert not reserved & set(names), "the operator refuses these"
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert (node["name"], pod["containers"][0]["name"]) == ("node", "node"), "as in the runtime torch-distributed"
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_jobset() -> None:
    _, job = documents(render("jobset"))
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (node,) = job["spec"]["replicatedJobs"]
    spec = node["template"]["spec"]
    assert (spec["completionMode"], spec["backoffLimit"]) == ("Indexed", 0)
    assert spec["completions"] == spec["parallelism"] == 2
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    script = container["command"][2]
    # <jobset>-<replicated job>-<job>-<pod>.<subdomain, the jobset's name>
    assert torchrun_options(script)["rdzv-endpoint"] == "my-run-node-0-0.my-run:29500"
    assert pod["terminationGracePeriodSeconds"] > int(FIXED["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])


@pytest.mark.parametrize("target", ["k8s", "jobset", "sky"])
def test_scripts_inside_yaml_are_shell(target: str) -> None:
    document = documents(render(target))[-1]
    if target == "sky":
        script = document["run"]
    elif target == "k8s":
        script = document["spec"]["trainer"]["command"][2]
    else:
        spec = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        script = spec["containers"][0]["command"][2]
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    options = torchrun_options(script)
    assert options["rdzv-backend"] == "c10d"
    assert options["rdzv-conf"].startswith("is_host=")
    assert "-m bgen train" in script


def test_skypilot() -> None:
    (task,) = documents(render("sky", settings=[*NEEDED["sky"], "accelerator=A100", "volume=atlas"]))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (2, "A100:4")
    assert task["volumes"] == {"/data": "atlas"}
    assert task["envs"] == FIXED
    assert "secrets" not in task


def test_variables_are_handed_on_and_keys_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", 'IN"FO')
    monkeypatch.setenv("BGEN_ANYTHING", "yes")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("PYTHONPATH", "/only/here")
    monkeypatch.setenv("UNRELATED", "no")
    for target in TARGETS:
        made = render(target)
        everything = "".join(file.read_text() for file in made.files)
        assert "hush-hush" not in everything
        assert "UNRELATED" not in everything
        if target == "k8s":
            env = {entry["name"]: entry for entry in documents(made)[1]["spec"]["trainer"]["env"]}
            assert env["NCCL_DEBUG"]["value"] == 'IN"FO'
            assert env["BGEN_ANYTHING"]["value"] == "yes"
            reference = env["AWS_SECRET_ACCESS_KEY"]["valueFrom"]["secretKeyRef"]
            assert reference == {"name": "bgen", "key": "AWS_SECRET_ACCESS_KEY", "optional": True}
            assert "PYTHONPATH" not in env
        if target == "sky":
            (task,) = documents(made)
            assert task["secrets"] == {"AWS_SECRET_ACCESS_KEY": None}
            assert task["envs"]["NCCL_DEBUG"] == 'IN"FO'
            assert made.command[:6] == ["sky", "jobs", "launch", "--yes", "--secret", "AWS_SECRET_ACCESS_KEY"]


@pytest.mark.parametrize("target", ["k8s", "jobset", "sky"])
def test_no_password_and_no_secret_is_written(target: str, monkeypatch: pytest.MonkeyPatch, bgen: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:hush-hush@mlflow.example/x")
    monkeypatch.setenv("BGEN_TOKEN", "hush-hush")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    made = render(target, overrides=["track.uri=https://bob:hush-hush@other.example"])
    everything = "".join(file.read_text() for file in made.files)
    assert "hush-hush" not in everything
    assert "https://mlflow.example/x" in everything
    assert "https://other.example" in everything
    assert "INFO" in everything
    assert [note.split(" is not written")[0] for note in made.notes if "is not written" in note] == [
        "The password in track.uri",
        "The password in MLFLOW_TRACKING_URI",
        "BGEN_TOKEN",
    ]
    with pytest.raises(UserError, match=r"data\.store=https://h/store was given with a password"):
        render(target, out=Path("other"), overrides=["data.store=https://ann:hush-hush@h/store"])
    said = bgen("launch", "vae", "out=/data/x", "data.store=/data/s", "--target", "jobset", "--set", "image=i")
    assert said.code == 0
    assert "BGEN_TOKEN is not written" in said.err


def test_what_sky_installs_travels_with_the_job(tmp_path: Path) -> None:
    (task,) = documents(render("sky"))
    assert task["file_mounts"]["/tmp/bgen/source"] == str(ROOT)
    assert task["setup"].strip() == 'pip install "/tmp/bgen/source[gpu]"'
    wheel = tmp_path / "bgen_flow-1.0-py3-none-any.whl"
    wheel.write_bytes(b"")
    (task,) = documents(render("sky", settings=[f"package={wheel}"], device="cpu", out=Path("cpu")))
    assert task["file_mounts"][f"/tmp/bgen/{wheel.name}"] == str(wheel)
    assert task["setup"].strip() == f'pip install "/tmp/bgen/{wheel.name}"'
    assert "image_id" not in task["resources"]
    # an image holds the packages of the lock, which are not to be replaced
    (task,) = documents(render("sky", settings=[f"package={wheel}", "image=r.org/bgen:1"], out=Path("image")))
    assert task["resources"]["image_id"] == "docker:r.org/bgen:1"
    assert task["setup"].strip() == f'pip install --no-deps "/tmp/bgen/{wheel.name}"'
    with pytest.raises(UserError, match="is neither a wheel nor a checkout"):
        render("sky", settings=[f"package={tmp_path}"], out=Path("none"))


def test_a_host_gets_cpus_and_memory_for_all_its_ranks() -> None:
    limits = documents(render("jobset", ranks_per_node=8))[1]["spec"]["replicatedJobs"][0]["template"]["spec"]
    limits = limits["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "64", "memory": "320Gi", "nvidia.com/gpu": "8"}
    limits = documents(render("k8s", ranks_per_node=1))[1]["spec"]["trainer"]["resourcesPerNode"]["limits"]
    assert (limits["cpu"], limits["memory"]) == ("8", "64Gi")
    given = render("k8s", settings=[*NEEDED["k8s"], "cpus=3", "memory=9Gi"], out=Path("given"))
    limits = documents(given)[1]["spec"]["trainer"]["resourcesPerNode"]["limits"]
    assert (limits["cpu"], limits["memory"]) == ("3", "9Gi")
    assert "--cpus-per-task=64\n" in render("slurm", ranks_per_node=8).script.read_text()
    (task,) = documents(render("sky", ranks_per_node=8))
    assert (task["resources"]["cpus"], task["resources"]["memory"]) == ("64+", "320+")


def test_memory_of_a_host_is_that_of_the_plan(demo: Any) -> None:
    mount = demo.store.parent
    overrides = [f"data.store={demo.store}", f"out={mount}/run"]
    given = {"overrides": overrides, "settings": [*NEEDED["k8s"], f"mount={mount}"]}
    made = render("k8s", **given)
    planned = plan("vae", overrides, nodes=2, ranks_per_node=4, gpu="H100").host
    limits = documents(made)[1]["spec"]["trainer"]["resourcesPerNode"]["limits"]
    assert limits["memory"] == f"{math.ceil(planned / 2**30)}Gi"
    assert limits["memory"] != "160Gi"
    assert made.notes == []
    (task,) = documents(render("sky", overrides=overrides, settings=[*NEEDED["sky"], f"mount={mount}"]))
    assert task["resources"]["memory"] == f"{math.ceil(planned / 2**30)}+"
    (said,) = render("jobset", out=Path("elsewhere")).notes
    assert "memory=160Gi a host is a guess, since the run was not planned" in said
    assert "/data/store" in said
    (said,) = render("jobset", out=Path("remote"), overrides=["data.store=s3://bucket/store"]).notes
    assert "bgen plan would read the store at its address" in said


def test_a_disk_that_is_full_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        render("slurm", out=Path("full"))
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_render_into_one_folder_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = Path.rename

    def overtaken(self: Path, target: Path) -> Path:
        (target / "logs").mkdir(parents=True)
        return renamed(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    with pytest.raises(UserError, match="cannot be written: Directory not empty"):
        render("slurm", out=Path("one"))
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_slurm_queues_again_after_progress_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the rendered script with programs in place of Slurm's; the step fails each time."""
    tools, run = tmp_path / "bin", tmp_path / "run"
    tools.mkdir()
    run.mkdir()
    (run / "record.jsonl").write_text("{}\n")
    new = "run/checkpoints/step_$(cat saves)"
    fail = f"#!/bin/sh\n[ -e saves ] && mkdir -p {new} && touch {new}/COMMITTED\nexit 1\n"
    for name, text in {"srun": fail, "scontrol": '#!/bin/sh\n[ "$1" = requeue ] && touch requeued\necho h0\n'}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "h0")
    made = launch("vae", "slurm", nodes=1, overrides=["out=run", "data.store=store"])

    def start() -> tuple[int, bool]:
        (tmp_path / "requeued").unlink(missing_ok=True)
        code = subprocess.run(["bash", made.script], capture_output=True, check=False).returncode
        return code, (tmp_path / "requeued").exists()

    assert start() == (1, False)
    (tmp_path / "saves").write_text("00000005")
    assert start() == (0, True)
    assert start() == (1, False), "no newer checkpoint than before"
    (tmp_path / "saves").write_text("00000010")
    assert start() == (0, True)


def test_jobset_does_not_count_disruptions() -> None:
    _, job = documents(render("jobset", settings=[*NEEDED["jobset"], "restarts=5"]))
    policy = job["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == (
        "RestartJobSetAndIgnoreMaxRestarts",
        ["PodFailurePolicy"],
    )
    (pods,) = job["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert pods == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def test_deepspeed_is_told_the_variables_in_a_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the rendered script with a program in place of Python that looks at what the launcher would read."""
    seen = tmp_path / "seen"
    look = tmp_path / "look"
    look.write_text(f'#!/bin/sh\ncp -p "$DS_ENV_FILE" {seen}\necho "$@" > {seen}.arguments\nexit 3\n')
    look.chmod(0o755)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    monkeypatch.setenv("UNRELATED", "no")
    made = render("deepspeed", settings=["hosts=n0,n1", f"python={look}"])
    assert subprocess.run(["bash", made.script], check=False).returncode == 3
    variables = dict(line.split("=", 1) for line in seen.read_text().splitlines())
    assert variables == {**FIXED, "AWS_SESSION_TOKEN": "token"}
    assert stat.S_IMODE(seen.stat().st_mode) == 0o600
    assert not (made.script.parent / ".deepspeed_env").exists(), "it holds a key: not kept"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "slrum"}, "Did you mean 'slurm'"),
        ({"target": "slurm", "overrides": ["train.global_batch=100"]}, "does not divide among 8 ranks"),
        ({"target": "torchrun", "min_nodes": 1, "nodes": 3, "settings": ["hosts=a,b,c"]}, "does not divide among 12"),
        ({"target": "slurm", "overrides": ["train.stepz=1"]}, "Did you mean 'steps'"),
        ({"target": "slurm", "settings": ["partitoin=x"]}, "Did you mean 'partition'"),
        ({"target": "slurm", "settings": ["partition"]}, "write name=value"),
        ({"target": "slurm", "settings": ["partition=a; rm"]}, "character that a shell would read"),
        ({"target": "slurm", "min_nodes": 1}, "only torchrun can go on with fewer"),
        ({"target": "torchrun", "settings": []}, "needs --set hosts=..."),
        ({"target": "torchrun", "settings": ["hosts=a,a"]}, "names 1 hosts, but nodes is 2"),
        ({"target": "k8s", "settings": []}, "needs --set image=..."),
        ({"target": "k8s", "overrides": ["out=runs/x"]}, "out=runs/x lies elsewhere"),
        ({"target": "local", "nodes": 2}, "this machine, not 2 nodes"),
        ({"target": "local", "ranks_per_node": 0}, "at least 1"),
    ],
)
def test_mistakes_are_found_before_the_queue(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        render(**options)
    assert list(tmp_path.iterdir()) == []


def test_submit_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--submit needs 'sbatch'"):
        render("slurm", submit=True)


def test_what_was_rendered_is_not_overwritten() -> None:
    render("slurm", out=Path("there"))
    with pytest.raises(UserError, match="there already"):
        render("slurm", out=Path("there"))


def test_submit_runs_the_start_command_and_returns_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = tmp_path / "called"
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\necho "$@" > {called}\nexit 7\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}")
    made = render("slurm", submit=True)
    assert made.code == 7
    assert called.read_text().strip() == str(made.script)


def test_fill_keeps_the_indent_and_leaves_what_it_put_in_alone() -> None:
    assert fill("a:\n  {{x}}\nb: {{y}}!\n", {"x": "1\n2\n", "y": "{{x}}"}) == "a:\n  1\n  2\nb: {{x}}!\n"
    assert fill("a:\n  {{x}}\nb: {{x}}!\n", {"x": ""}) == "a:\nb: !\n"
    with pytest.raises(KeyError):
        fill("{{nothing}}", {})


def test_the_readme_names_every_target_file_and_setting() -> None:
    text = (packaged_templates() / "README.md").read_text()
    for name, target in TARGETS.items():
        assert f"`{name}`" in text
        assert target.template in text
        for setting in target.settings:
            assert f"`{setting}`" in text, setting


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ranks_on_this_machine(bgen: Any, demo: Any, tmp_path: Path, ranks: int) -> None:
    """The real thing: rendered, started, trained, logs per rank; and the losses of a run that no launcher started."""
    common = [f"data.store={demo.store}", "train.steps=6", "train.log_every=1", "train.global_batch=64"]
    common += ["track.mlflow=false", "train.eval_every=0", "train.patience=0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHON_EXEC", python())
        made = launch(
            "demo/vae",
            "local",
            ranks_per_node=ranks,
            device="cpu",
            overrides=[f"out={tmp_path}/launched", *common],
            settings=[f"python={python()}"],
            submit=True,
        )
    assert made.code == 0
    logs = sorted((made.script.parent / "logs").glob("*/attempt_0/*/stderr.log"))
    assert [log.parent.name for log in logs] == [str(rank) for rank in range(ranks)]
    assert (tmp_path / "launched" / "model" / "model.safetensors").is_file()
    alone = bgen("train", "demo/vae", f"out={tmp_path}/alone", *common)
    assert alone.code == 0, alone.err
    losses = [
        [row["loss"] for row in record.read(tmp_path / run / "record.jsonl") if row["kind"] == "train"]
        for run in ("launched", "alone")
    ]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
