"""The script that runs the command blocks of pages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run_blocks.py")


def run(page: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, str(SCRIPT), str(page), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"COLUMNS": "100"})
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.md"


def test_blocks_share_a_shell_a_namespace_and_a_folder(page: Path, tmp_path: Path) -> None:
    page.write_text(
        """# A page
<!-- setup: printf 'one\\ntwo\\n' > lines.txt
test -f "$DOCS/run_blocks.py" -->
```bash
first=$(head -n 1 lines.txt)   # a comment
```
Text with ```three ticks``` in it, and a block that is no command:
```text
false
```
1. In a list:
   ```bash
   test "$first" = one
   if test -z "$first"; then
     exit 1
   fi
   printf 'no end of line' | tee there.txt
   ```
```python
from pathlib import Path

words = Path("lines.txt").read_text().split()
```
```python
assert words == ["one", "two"] and Path("there.txt").exists()
```
<!-- not run: needs
a cluster -->
```bash
false
```
"""
    )
    code, said = run(page, "--keep", str(tmp_path / "made"))
    assert code == 0, said
    assert "not run: needs a cluster" in said
    assert "page.md: 5 run in" in said
    assert (tmp_path / "made" / "page" / "there.txt").read_text() == "no end of line"


def test_yaml_is_a_configuration(page: Path) -> None:
    page.write_text(
        "```yaml\n# wide.yaml\nextends: vae\nvae: {hidden: 512}\n```\n"
        "```bash\nbgen config show wide.yaml | grep 'hidden: 512'\n```\n"
        "```yaml\nextends: vae\nvae: {hiden: 512}\n```\n"
    )
    code, said = run(page)
    assert code == 1
    assert "page.md:10: this block failed" in said
    assert "hiden" in said
    assert "hidden" in said


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "\n```bash\ntrue\n\necho what happened\nfalse\n```\n```bash\necho later\n```\n",
            ["page.md:3", "what happened"],
        ),
        ("```bash\ntrue | false | true\n```\n", ["Exit code 1"]),
        ("```bash\necho $unset\n```\n", ["line 2", "unbound variable"]),
        ("```bash\nexit 0\n```\n", ["Exit code 0", "page.md:2"]),
        ("\n```python\nx = 1\nassert x == 2\n```\n", ['File "page.md", line 4', "AssertionError"]),
        ("<!-- setup: false -->\n", ["page.md:1", "Exit code 1"]),
        ("<!-- not run -->\n```bash\nfalse\n```\n", ["line 1", "without a reason"]),
        ("<!-- not run: why -->\ntext\n```bash\ntrue\n```\n", ["line 3", "directly before no block"]),
        ("<!-- not run: why -->\n", ["line 1", "directly before no block"]),
        ("<!-- not run: why -->\n```json\n{}\n```\n", ["line 2", "only bash, python, yaml are run"]),
        ("```sh\nfalse\n```\n", ["line 1", "write ```bash"]),
        ("text\n```bash\nfalse\n", ["line 2", "does not end"]),
    ],
)
def test_what_is_wrong_is_told_with_its_line(page: Path, text: str, told: list[str]) -> None:
    page.write_text(text)
    code, said = run(page)
    assert code == 1
    for part in (*told, f"Failed: {page}"):
        assert part in said
    assert "later" not in said


def test_a_block_that_takes_too_long_is_killed_with_all_it_started(page: Path) -> None:
    """What it started holds the same output open, so the script would wait for it as well."""
    page.write_text("```bash\nsleep 1000 &\nwait\n```\n")
    code, said = run(page, "--limit", "2")
    assert code == 1
    assert "Killed after 2 s" in said
