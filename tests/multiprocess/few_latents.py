"""``few_latents.py [arguments of bgen]``: the command line, as a launcher starts it, where levels take few latents."""

from __future__ import annotations

from bgen.cli.main import main
from bgen.train.stages import levels

levels.COMPARED_LATENTS = 256  # as tests/conftest.py does in its own process

if __name__ == "__main__":
    main()
