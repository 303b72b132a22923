"""Build the site of the documentation: `python .site/build.py OUT`, with the extra `docs`.

Pages lie beside what they describe; this copies them with their pictures, as they are. Links between pages stay; those
to code become the names of its files, since the site does not hold it. Warnings are errors.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "Start": [
        "README.md",
        "bgen/tasks/tutorial.ipynb",
        "bgen/tasks/perturb/tutorial.ipynb",
        "bgen/tasks/time/tutorial.ipynb",
        "gallery.md",
    ],
    "Tasks": [
        "bgen/tasks/README.md",
        "bgen/tasks/questions.md",
        "bgen/tasks/cells/README.md",
        "bgen/tasks/time/README.md",
        "bgen/tasks/perturb/README.md",
        "bgen/tasks/finetune/README.md",
    ],
    "Pretraining": ["configs/README.md", "launch/README.md", "data_tools/inputs/README.md"],
    "Evidence": [
        "bgen/bench/README.md",
        "bgen/bench/representations.md",
        "bgen/evaluate/metrics/README.md",
        "bgen/evaluate/protocols/README.md",
    ],
    "Python": ["python.md"],
    "The code": [
        "bgen/README.md",
        "bgen/nn/mixers/README.md",
        "bgen/models/vae/encoders/README.md",
        "bgen/models/vae/decoders/README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ],
}
MADE = {"python.md", "gallery.md"}
"""Pages that are made here."""

TABLES = {"plot.changes"}
"""What bgen.plot has that draws nothing."""

FUNCTIONS = ["check", "build", "train_vae", "train_flow", "train_trajectories", "train_perturbation", "load"]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def collect(folder: Path) -> None:
    """Copy the pages and pictures into a folder, and make the index, the page of Python's names and the gallery."""
    pages = {page for group in PAGES.values() for page in group}
    for page in sorted(pages - MADE):
        source, place = ROOT / page, folder / page
        place.parent.mkdir(parents=True, exist_ok=True)
        if page.endswith(".ipynb"):
            shutil.copy(source, place)
            continue
        text = LINK.sub(lambda found, source=source: _link(found, source, folder, pages), source.read_text("utf-8"))
        place.write_text(text, encoding="utf-8")
    trees = [
        f"```{{toctree}}\n:caption: {title}\n:maxdepth: 1\n\n" + "\n".join(f"/{page}" for page in group) + "\n```"
        for title, group in PAGES.items()
    ]
    about = "Generative models of gene expression, trained on atlases that no memory holds, and used on a laptop."
    (folder / "index.md").write_text(f"# bgen\n\n{about}\n\n" + "\n\n".join(trees) + "\n", encoding="utf-8")
    names = "\n\n".join(f".. autofunction:: bgen.{name}" for name in FUNCTIONS)
    classes = ".. autoclass:: bgen.tasks.load.Model\n   :members:\n   :inherited-members:\n\n"
    classes += ".. autoclass:: bgen.api.trained.Trained\n   :members:\n\n.. autoclass:: bgen.api.data.Looking\n\n"
    plots = ".. automodule:: bgen.plot\n   :members:"
    python = f"# bgen in Python\n\n```{{eval-rst}}\n{names}\n\n{classes}{plots}\n```\n"
    (folder / "python.md").write_text(python, encoding="utf-8")
    make_gallery(folder)


def make_gallery(folder: Path) -> None:
    """Make the page of the pictures that functions of bgen.plot drew in the notebooks, each with its cell."""
    parts = [
        "# Gallery",
        "What `bgen.plot` draws, on matplotlib Axes: the pictures of the notebooks, each with its cell.",
    ]
    (folder / "gallery").mkdir()
    for page in (page for group in PAGES.values() for page in group if page.endswith(".ipynb")):
        cells = json.loads((ROOT / page).read_text("utf-8"))["cells"]
        title = "".join(cells[0]["source"]).splitlines()[0].removeprefix("# ")
        for number, cell in enumerate(cells):
            source = "".join(cell["source"])
            drawn = [name for name in dict.fromkeys(re.findall(r"\bbgen\.(plot\.\w+)", source)) if name not in TABLES]
            shown = [
                output["data"]["image/png"]
                for output in cell.get("outputs", [])
                if "image/png" in output.get("data", {})
            ]
            if not drawn or not shown:
                continue
            picture = f"gallery/{Path(page).parent.name}-{number}.png"
            (folder / picture).write_bytes(base64.b64decode(shown[0]))
            parts += [
                f"## {', '.join(drawn)}",
                f"![{', '.join(drawn)}]({picture})",
                f"From [{title}]({page}):",
                f"```python\n{source}\n```",
            ]
    (folder / "gallery.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _link(found: re.Match[str], source: Path, folder: Path, pages: set[str]) -> str:
    """Return a link as the site has it."""
    picture, text, target = found.groups()
    path, _, anchor = target.partition("#")
    if "://" in target or not path:
        return found[0]
    place = (source.parent / path).resolve()
    name = place.relative_to(ROOT).as_posix()
    if name in pages:
        return found[0]
    if picture:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(place, folder / name)
        return found[0]
    if place.is_dir() and f"{name}/README.md" in pages:
        return f"[{text}]({path.rstrip('/')}/README.md{'#' + anchor if anchor else ''})"
    return text if "`" in text else f"{text} (`{name}`)"


def main() -> int:
    """Build; the exit code is Sphinx's."""
    if len(sys.argv) != 2:
        print("usage: python .site/build.py OUT", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        collect(Path(folder))
        sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", str(ROOT / ".site")]
        return subprocess.run([*sphinx, folder, sys.argv[1]], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
