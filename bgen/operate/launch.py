"""``bgen launch``: render the files that start a run somewhere, and start it if asked to.

The templates are the files of the top-level folder ``launch/``; ``{{name}}`` in them is filled in here. What they need
beyond the configuration is given as ``name=value``, for the settings of :data:`TARGETS`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bgen.config.load import load_config, to_yaml
from bgen.config.run import Config
from bgen.errors import UserError, nearest
from bgen.files import require_new_folder
from bgen.operate.launch_environment import Variable, forwarded, read_environment
from bgen.store.remote import is_remote
from bgen.train.engine.deepspeed_json import batch_plan

Device = Literal["cuda", "cpu"]


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
_HOSTS = {"hosts": "", "port": "29400", "join_timeout": "600"}
_CLUSTER = {"restarts": "3", "port": "29500", "mount": "/data"}
_PODS = {**_CLUSTER, "image": "", "claim": "bgen", "namespace": "default", "cpus": "8", "memory": "64Gi"}
_SKY = {**_CLUSTER, "volume": "bgen", "infra": "kubernetes", "accelerator": "H100", "cpus": "8+", "memory": "64+"}

TARGETS: dict[str, Target] = {
    "local": Target("local.sh", _EVERYWHERE, "bash", ("bash", "FILE")),
    "torchrun": Target(
        "torchrun.sh", {**_EVERYWHERE, **_HOSTS}, "pdsh", ("bash", "FILE", "all"), required=("hosts",), elastic=True
    ),
    "deepspeed": Target(
        "deepspeed.sh",
        {"python": sys.executable, "hosts": "", "port": "29400"},
        "pdsh",
        ("bash", "FILE"),
        required=("hosts",),
    ),
    "slurm": Target(
        "slurm.sh",
        {**_EVERYWHERE, "partition": "", "account": "", "qos": "", "time": "24:00:00", "cpus": "8", "memory": ""},
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
    """

    script: Path
    files: list[Path]
    command: list[str]
    code: int | None


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
        divided, settings that are missing or unknown, a program that is not installed.
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
    require_new_folder(folder)

    script = folder / place.template
    variables = read_environment(packaged_templates() / "environment.yaml", device)
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

    (folder / "logs").mkdir(parents=True)
    files = {"config.yaml": values["config_text"], **extra, script.name: text}
    for file, content in files.items():
        (folder / file).write_text(content, encoding="utf-8")
    command = [str(script) if part == "FILE" else part for part in place.start]
    if target == "sky":
        command[-1:-1] = [part for name in _secrets_here(variables) for part in ("--secret", name)]
    code = subprocess.run(command, check=False).returncode if submit else None
    return Launch(script, [folder / file for file in files], command, code)


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace ``{{name}}`` by its value; the lines of a longer one are indented as the first."""

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
    if config.stage == "flow" and config.flow.vae is not None:
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
    names = re.compile(forwarded([variable for variable in variables if not variable.secret]))
    plain |= {name: value for name, value in sorted(os.environ.items()) if names.fullmatch(name)}
    secrets = [variable.name for variable in variables if variable.secret]
    if target == "sky":
        wanted = f"accelerators: {values['accelerator']}:{ranks}" if device == "cuda" else f"cpus: {values['cpus']}"
        here = _secrets_here(variables)
        return {
            "environment": "\n".join(f"{name}: {_quoted(value)}" for name, value in plain.items()),
            "resources": f"infra: {values['infra']}\n{wanted}\nmemory: {values['memory']}",
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
    limits = "\n".join(f"  {name}: {_quoted(amount)}" for name, amount in amounts.items())
    return {"environment": "\n".join(lines), "resources": f"requests:\n{limits}\nlimits:\n{limits}"}


def _quoted(value: str) -> str:
    """Return a YAML string in double quotes."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
