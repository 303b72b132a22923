"""``python -m bgen`` is ``bgen``: what torchrun and deepspeed start."""

from bgen.cli.main import main

if __name__ == "__main__":
    main()
