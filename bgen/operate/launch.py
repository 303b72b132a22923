"""``bgen launch``: render the files that start a run somewhere, and start it if asked to.

The templates are the files of the top-level folder ``launch/``; ``{{name}}`` in them is filled in here. What they need
beyond the configuration is given as ``name=value``, for the settings of :data:`TARGETS`.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bgen.config.load import load_config, to_yaml
from bgen.config.run import Config
from bgen.errors import UserError, nearest
from bgen.files import require_new_folder
from bgen.operate.launch_environment import Variable, forwarded, read_environment
from bgen.operate.plan import host_memory
from bgen.passwords import names_a_secret, without_passwords
from bgen.store.remote import is_remote
from bgen.train.engine.deepspeed_json import batch_plan

Device = Literal["cuda", "cpu"]

LAUNCHER_RESTARTS = 100
"""Restarts that torchrun is allowed in all; the setting ``restarts`` counts those without a new checkpoint."""


def packaged_templates() -> Path:
    """Return the folder of the templates: in an installed bgen, or at the top level of a source checkout."""
    installed = Path(__file__).resolve().parent.parent / "launch"
    return installed if installed.is_dir() else installed.parent.parent / "launch"


@dataclass(frozen=True)
class Target:
    """Somewhere to run.

    Attributes
    ----------
    template
        File in ``launch/``.
    settings
        Name to default; an empty default of a setting in ``required`` is an error.
    program
        What ``--submit`` calls.
    start
        The command that starts the run; ``FILE`` stands for the rendered file.
    shared
        Whether the run sees this file system and starts in the current folder; if not, paths must be absolute.
    """

    template: str
    settings: Mapping[str, str]
    program: str
    start: tuple[str, ...]
    shared: bool = True
    required: tuple[str, ...] = ()
    elastic: bool = False


_EVERYWHERE = {"restarts": "3", "python": sys.executable}
_PER_RANK = {"cuda": (8, 40), "cpu": (1, 8)}
"""CPUs and GiB of memory for each rank of a host, unless they are set, or the plan says how much memory.

A rank on a GPU builds the model in the host's memory: up to 36 GB for the largest flow of configs/sizes, by the sizes
of its weights. Its CPUs launch kernels, read, decode, and write and hash checkpoints.
"""
_LEAST = (8, 64)
"""CPUs and GiB of a host, at least."""
_NETWORK = {
    "interface": ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"),
    "hca": ("NCCL_IB_HCA",),
}
"""Settings of the network between hosts, and the variables that they become."""
_BETWEEN = dict.fromkeys(_NETWORK, "")
_HOSTS = {"hosts": "", "port": "29400", "join_timeout": "600", **_BETWEEN}
_CLUSTER = {"restarts": "3", "port": "29500", "mount": "/data", **_BETWEEN}
_PODS = {**_CLUSTER, "image": "", "claim": "bgen", "namespace": "default", "cpus": "", "memory": "", "rdma": ""}
_SKY = {
    **_CLUSTER,
    "volume": "bgen",
    "infra": "kubernetes",
    "accelerator": "H100",
    "cpus": "",
    "memory": "",
    "package": "",
    "image": "",
    "network_tier": "",
}

TARGETS: dict[str, Target] = {
    "local": Target("local.sh", _EVERYWHERE, "bash", ("bash", "FILE")),
    "torchrun": Target(
        "torchrun.sh", {**_EVERYWHERE, **_HOSTS}, "pdsh", ("bash", "FILE", "all"), required=("hosts",), elastic=True
    ),
    "deepspeed": Target(
        "deepspeed.sh",
        {"python": sys.executable, "hosts": "", "port": "29400", **_BETWEEN},
        "pdsh",
        ("bash", "FILE"),
        required=("hosts",),
    ),
    "slurm": Target(
        "slurm.sh",
        {**_EVERYWHERE, **_BETWEEN}
        | {"partition": "", "account": "", "qos": "", "time": "24:00:00", "cpus": "", "memory": ""},
        "sbatch",
        ("sbatch", "FILE"),
    ),
    "k8s": Target("trainjob.yaml", _PODS, "kubectl", ("kubectl", "apply", "-f", "FILE"), False, ("image",)),
    "jobset": Target("jobset.yaml", _PODS, "kubectl", ("kubectl", "apply", "-f", "FILE"), False, ("image",)),
    "sky": Target("sky.yaml", _SKY, "sky", ("sky", "jobs", "launch", "--yes", "FILE"), False),
}


@dataclass(frozen=True)
class Launch:
    """What was rendered.

    Attributes
    ----------
    script
        The file that starts the run.
    files
        It and those that belong to it.
    command
        What starts the run, as arguments.
    code
        Exit code of that command if it was run, else None.
    notes
        What the user should know beside.
    """

    script: Path
    files: list[Path]
    command: list[str]
    code: int | None
    notes: list[str] = field(default_factory=list)


def launch(
    config_path: str | Path,
    target: str,
    *,
    nodes: int = 1,
    ranks_per_node: int = 1,
    min_nodes: int | None = None,
    device: Device = "cuda",
    overrides: Sequence[str] = (),
    settings: Sequence[str] = (),
    submit: bool = False,
    out: Path | None = None,
) -> Launch:
    """Render the launch files of a run into a new folder.

    Parameters
    ----------
    config_path, overrides
        The configuration, as for ``bgen train``. What it resolves to is written beside the launch file.
    target
        Key of :data:`TARGETS`.
    nodes, ranks_per_node
        Hosts, and processes on each: one per GPU.
    min_nodes
        Go on with so few when others are lost (torchrun only); default: ``nodes``.
    device
        Whether a rank computes on a GPU of its own.
    settings
        ``name=value`` for the target.
    submit
        Start the run as well, and wait until the command that starts it has ended.
    out
        New folder; default: the run's name and the target, in the current folder.

    Raises
    ------
    UserError
        For mistakes that would otherwise show later, in the queue: a wrong configuration, a global batch that cannot be
        divided, settings that are missing or unknown, a program that is not installed, a password that the job would
        need from a file. And if the files cannot be written.
    """
    if target not in TARGETS:
        raise UserError(f"There is no launch target '{target}'.{nearest(target, TARGETS)}")
    place = TARGETS[target]
    config = load_config(config_path, overrides)
    fewest = nodes if min_nodes is None else min_nodes
    _check_size(config, target, nodes, fewest, ranks_per_node)
    values = _read_settings(target, settings)
    if submit and shutil.which(place.program) is None:
        raise UserError(f"--submit needs '{place.program}', which is not installed here. Leave it out to render only.")
    name = re.sub(r"[^a-z0-9-]+", "-", config.out.name.lower()).strip("-")[:40] or "bgen"
    folder = (out or Path(f"{name}-{target}")).absolute()
    _check_paths(config, place, values, folder)
    _check_passwords(config)
    notes = _fill_in_amounts(config, target, values, nodes, ranks_per_node, device)
    if target == "sky":
        package = _package(values["package"])
        values |= {"package": str(package), "package_name": package.name if package.suffix else "source"}
        # an image of ours holds everything that bgen needs
        install = "pip install --no-deps" if values["image"] else "pip install"
        extra_name = "[gpu]" if device == "cuda" and not values["image"] else ""
        values["install"] = f'{install} "/tmp/bgen/{values["package_name"]}{extra_name}"'
    require_new_folder(folder)

    script = folder / place.template
    variables = _with_network(read_environment(packaged_templates() / "environment.yaml", device), values)
    if not place.shared:
        variables = [variable for variable in variables if not variable.host]
    values |= {
        "name": name,
        "nodes": str(nodes),
        "nnodes": f"{fewest}:{nodes}" if fewest < nodes else str(nodes),
        "ranks": str(ranks_per_node),
        "cwd": str(Path.cwd()),
        "out": str(folder),
        "run": str(config.out),
        "config": str(folder / "config.yaml"),
        "config_text": to_yaml(config),
        "launcher_restarts": str(LAUNCHER_RESTARTS),
        "script": str(script),
        "script_name": script.name,
    }
    values |= _blocks(target, values, variables, ranks_per_node, device)
    extra = {}
    if "hosts" in values:
        hosts = _hosts(values["hosts"], nodes)
        values |= {"head": hosts[0], "hosts": ",".join(hosts)}
        if target == "deepspeed":
            extra["hostfile"] = "".join(f"{host} slots={ranks_per_node}\n" for host in hosts)
    text = fill((packaged_templates() / place.template).read_text(encoding="utf-8"), values)

    files = {"config.yaml": values["config_text"], **extra, script.name: text}
    _write(folder, files)
    command = [str(script) if part == "FILE" else part for part in place.start]
    if target == "sky":
        command[-1:-1] = [part for name in _secrets_here(variables) for part in ("--secret", name)]
    code = subprocess.run(command, check=False).returncode if submit else None
    return Launch(script, [folder / file for file in files], command, code, notes + _notes(config, variables, place))


def _write(folder: Path, files: Mapping[str, str]) -> None:
    """Write the files into a new folder, all of them or none."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        (partial / "logs").mkdir(parents=True)
        for file, content in files.items():
            (partial / file).write_text(content, encoding="utf-8")
        if folder.exists():
            folder.rmdir()  # it is empty, or another launch was quicker
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}. Choose another --out.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace ``{{name}}`` by its value; the lines of a longer one are indented as the first.

    A line of nothing but the name of what is empty is left out.
    """
    empty = "|".join(re.escape(name) for name, value in values.items() if not value)
    if empty:
        template = re.sub(rf"(?m)^ *\{{\{{(?:{empty})\}}\}}\n", "", template)

    def replace(match: re.Match[str]) -> str:
        indent = match[1] or ""
        return indent + values[match[2]].rstrip("\n").replace("\n", f"\n{indent}")

    return re.sub(r"(?m)(^ +)?\{\{(\w+)\}\}", replace, template)


def _check_size(config: Config, target: str, nodes: int, fewest: int, ranks: int) -> None:
    if nodes < 1 or ranks < 1 or not 1 <= fewest <= nodes:
        raise UserError(
            f"nodes={nodes}, min_nodes={fewest}, ranks_per_node={ranks}: all at least 1, min_nodes at most nodes."
        )
    if target == "local" and nodes > 1:
        raise UserError(f"Target local is this machine, not {nodes} nodes. Choose torchrun, deepspeed or slurm.")
    if fewest < nodes and not TARGETS[target].elastic:
        raise UserError(f"Target {target} has a fixed number of nodes: only torchrun can go on with fewer.")
    for count in range(fewest, nodes + 1):
        batch_plan(config.train, count * ranks)


def _read_settings(target: str, settings: Sequence[str]) -> dict[str, str]:
    place = TARGETS[target]
    values = dict(place.settings)
    for text in settings:
        name, sign, value = text.partition("=")
        if not sign:
            raise UserError(f"'{text}' is not a setting: write name=value.")
        if name not in values:
            raise UserError(f"Target {target} has no setting '{name}'.{nearest(name, values)}")
        values[name] = value
    missing = [name for name in place.required if not values[name]]
    if missing:
        given = " ".join(f"--set {name}=..." for name in missing)
        raise UserError(f"Target {target} needs {given}. launch/README.md says what it means.")
    for name, value in values.items():
        if re.search(r"[\s'\"$`\\;&|<>(){}]", value):
            raise UserError(f"The setting {name}={value!r} has a character that a shell would read.")
    return values


def _fill_in_amounts(
    config: Config, target: str, values: dict[str, str], nodes: int, ranks: int, device: Device
) -> list[str]:
    """Set the CPUs and the memory of a host that were not set, by its ranks and their plan; return what to say."""
    if "cpus" not in values:
        return []
    cpus, memory = (max(least, amount * ranks) for least, amount in zip(_LEAST, _PER_RANK[device], strict=True))
    at_least = target == "sky"
    values["cpus"] = values["cpus"] or (f"{cpus}+" if at_least else str(cpus))
    if target == "slurm" or values["memory"]:  # Slurm gives the memory that its administrator thinks right
        return []
    why = None
    try:
        if is_remote(config.data.store):  # to open it may take minutes where there is no network
            why = "bgen plan would read the store at its address"
        else:
            memory = math.ceil(host_memory(config, nodes=nodes, ranks_per_node=ranks, gpu=device == "cuda") / 2**30)
    except UserError as error:
        why = str(error).splitlines()[0]
    values["memory"] = f"{memory}+" if at_least else f"{memory}Gi"
    if why is None:
        return []
    return [f"memory={memory}Gi a host is a guess, since the run was not planned ({why}): --set memory=..."]


def _with_network(variables: Sequence[Variable], values: Mapping[str, str]) -> list[Variable]:
    """Return the variables, with those of the network between hosts that is asked for."""
    chosen = {name: values[key] for key, names in _NETWORK.items() if values.get(key) for name in names}
    kept = [variable for variable in variables if variable.name not in chosen]
    why = "network between hosts, by --set interface and hca"
    return [*kept, *(Variable(name, value, why) for name, value in chosen.items())]


def _rdma(text: str) -> tuple[str, str]:
    """Return the resource and how many of it: ``rdma/ib`` or ``rdma/ib:8``."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[1-9]\d*)?", text):
        raise UserError(f"rdma={text}: write the resource as the nodes offer it, or RESOURCE:COUNT (rdma/ib:8).")
    name, _, count = text.partition(":")
    return name, count or "1"


def _package(given: str) -> Path:
    """Return the checkout or wheel of bgen that travels with a job: a name on an index may be anybody's."""
    path = Path(given).absolute() if given else Path(__file__).resolve().parents[2]
    if not path.exists() or not (path.suffix == ".whl" or (path / "pyproject.toml").is_file()):
        raise UserError(
            f"Target sky installs the bgen that travels with the job, but {path} is neither a wheel nor a checkout of "
            "it. Give one: --set package=bgen_flow-...-py3-none-any.whl (`pip wheel --no-deps` makes it)."
        )
    return path


def _check_passwords(config: Config) -> None:
    if without_passwords(config.data.store) != config.data.store:
        raise UserError(
            f"data.store={without_passwords(config.data.store)} was given with a password, and launch files hold none, "
            "so the job could not read it. Give it in the environment (AWS_ACCESS_KEY_ID; launch/environment.yaml)."
        )


def _notes(config: Config, variables: Sequence[Variable], place: Target) -> list[str]:
    """Say which secrets were left out of the files, and how the job gets them."""
    notes = []
    where = "in the Secret `bgen`" if place.program == "kubectl" else "in the environment"
    uris = {"track.uri": config.track.uri, "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI")}
    for name, uri in uris.items():
        if uri and without_passwords(uri) != uri and (name == "track.uri" or not place.shared):
            names = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            notes.append(f"The password in {name} is not written: set {names} {where}.")
    if not place.shared:
        left_out = [name for name in _forwarded_here(variables) if names_a_secret(name)]
        notes += [f"{name} is not written, since it may hold a secret." for name in left_out]
    return notes


def _forwarded_here(variables: Sequence[Variable]) -> dict[str, str]:
    """Return what is set here and handed on, apart from secrets; without passwords."""
    names = re.compile(forwarded([variable for variable in variables if not variable.secret]))
    return {name: without_passwords(value) for name, value in sorted(os.environ.items()) if names.fullmatch(name)}


def _check_paths(config: Config, place: Target, values: Mapping[str, str], folder: Path) -> None:
    """Raise UserError for paths that would not mean the same where the run is."""
    for path in (folder, Path.cwd(), config.out):
        if re.search(r"[^\w./@%+=:,~-]", str(path)):
            raise UserError(f"{path}: launch files need a path of letters, digits and ./@%+=:,~-_ only.")
    if place.shared:
        return
    paths = {"out": config.out}
    if not is_remote(config.data.store):
        paths["data.store"] = Path(config.data.store)
    if config.stage == "flow" and config.flow.space == "latent" and config.flow.vae is not None:
        paths["flow.vae"] = config.flow.vae
    outside = {name: path for name, path in paths.items() if not path.is_relative_to(values["mount"])}
    if outside:
        listed = ", ".join(f"{name}={path}" for name, path in outside.items())
        raise UserError(
            f"In the job only {values['mount']} is kept, but {listed} lies elsewhere. "
            f"Give paths below {values['mount']}, or another mount with --set mount=..."
        )


def _hosts(text: str, nodes: int) -> list[str]:
    """Hosts from ``a,b,c`` or from a file with one a line (a DeepSpeed hostfile will do)."""
    if Path(text).is_file():
        lines = [line.split("#")[0].split() for line in Path(text).read_text(encoding="utf-8").splitlines()]
        hosts = [words[0] for words in lines if words]
    else:
        hosts = text.split(",")
    if len(hosts) != nodes or len(set(hosts)) != nodes:
        raise UserError(f"hosts={text} names {len(set(hosts))} hosts, but nodes is {nodes}.")
    return hosts


def _secrets_here(variables: Sequence[Variable]) -> list[str]:
    return [variable.name for variable in variables if variable.secret and variable.name in os.environ]


def _blocks(
    target: str, values: Mapping[str, str], variables: Sequence[Variable], ranks: int, device: Device
) -> dict[str, str]:
    """Return the parts of a template that are more than a word."""
    set_here = [variable for variable in variables if variable.value is not None]
    if TARGETS[target].shared:
        exports = (f'# {v.why}\nexport {v.name}="${{{v.name}:-{v.value}}}"' for v in set_here)
        blocks = {"environment": "\n".join(exports), "names": f"'{forwarded(variables)}'"}
        if target == "slurm":
            options = {
                "gpus-per-node": str(ranks) if device == "cuda" else "",
                "cpus-per-task": values["cpus"],
                "mem": values["memory"],
                "time": values["time"],
                "partition": values["partition"],
                "account": values["account"],
                "qos": values["qos"],
            }
            blocks["sbatch"] = "\n".join(f"#SBATCH --{name}={value}" for name, value in options.items() if value)
        return blocks
    plain = {v.name: v.value for v in set_here if v.value is not None}
    plain |= {name: value for name, value in _forwarded_here(variables).items() if not names_a_secret(name)}
    secrets = [variable.name for variable in variables if variable.secret]
    if target == "sky":
        wanted = f"accelerators: {values['accelerator']}:{ranks}\n" if device == "cuda" else ""
        wanted += f"image_id: docker:{values['image']}\n" if values["image"] else ""
        wanted += f"network_tier: {values['network_tier']}\n" if values["network_tier"] else ""
        here = _secrets_here(variables)
        return {
            "environment": "\n".join(f"{name}: {_quoted(value)}" for name, value in plain.items()),
            "resources": f"infra: {values['infra']}\n{wanted}cpus: {values['cpus']}\nmemory: {values['memory']}",
            "secrets": "\n".join(["secrets:", *(f"  {name}: null" for name in here)] if here else []),
            "secret_flags": "".join(f" --secret {name}" for name in here),
        }
    lines = [f"- name: {name}\n  value: {_quoted(value)}" for name, value in plain.items()]
    for secret in secrets:
        reference = f"{{name: bgen, key: {secret}, optional: true}}"
        lines.append(f"- name: {secret}\n  valueFrom:\n    secretKeyRef: {reference}")
    amounts = {"cpu": values["cpus"], "memory": values["memory"]}
    if device == "cuda":
        amounts["nvidia.com/gpu"] = str(ranks)
    security = ""
    if values["rdma"]:
        card, count = _rdma(values["rdma"])
        amounts[card] = count
        # network cards read and write memory that is locked in its place
        security = "securityContext:\n  capabilities:\n    add: [IPC_LOCK]"
    limits = "\n".join(f"  {name}: {_quoted(amount)}" for name, amount in amounts.items())
    resources = f"requests:\n{limits}\nlimits:\n{limits}"
    return {"environment": "\n".join(lines), "resources": resources, "security": security}


def _quoted(value: str) -> str:
    """Return a YAML string in double quotes."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
