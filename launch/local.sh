#!/usr/bin/env bash
# {{name}} on this machine: {{ranks}} rank(s).   Start: bash {{script}}
set -euo pipefail
cd {{cwd}}

{{environment}}

# A rank that dies takes the others with it; torchrun starts all of them again, at the newest checkpoint. The run gives up
# after {{restarts}} restarts in a row without a new one.
exec {{python}} -m torch.distributed.run --standalone --nproc-per-node={{ranks}} --max-restarts={{launcher_restarts}} \
  --log-dir={{out}}/logs --tee=3 \
  -m bgen train {{config}} train.max_restarts={{restarts}} --resume
