"""Where results are printed."""

from __future__ import annotations

import os
import subprocess
import sys


def test_a_table_is_not_cut_off_where_there_is_no_terminal() -> None:
    code = "from bgen.cli.terminal import results; results.print('x ' * 90)"
    without = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    for environment, lines in ((without, 1), (without | {"COLUMNS": "90"}, 2)):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert len(done.stdout.splitlines()) == lines
