#!/usr/bin/env bash
# {{name}} on {{nodes}} node(s) x {{ranks}} rank(s), by the deepspeed launcher.   Start once, on {{head}}: bash {{script}}
# Needs pdsh, ssh without a password to the hosts in the hostfile, and this folder, bgen and the data at the same path on
# all of them. Nothing is restarted by itself: start it again, and it goes on from the newest checkpoint.
set -euo pipefail
cd {{cwd}}

{{environment}}

# The launcher hands on what stands in this file, and little else. Only its owner reads it: it may hold keys.
export DS_ENV_FILE={{out}}/.deepspeed_env
trap 'rm -f "$DS_ENV_FILE"' EXIT
names={{names}}
(umask 077 && env | grep -E "^($names)=" > "$DS_ENV_FILE") || true

# A host that is cut off would otherwise be waited for without end.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -oServerAliveInterval=10 -oServerAliveCountMax=3"
{{python}} -m deepspeed.launcher.runner --hostfile={{out}}/hostfile --launcher=pdsh --force_multi \
  --master_addr={{head}} --master_port={{port}} --no_local_rank --enable_each_rank_log={{out}}/logs \
  --module bgen train {{config}} --resume
