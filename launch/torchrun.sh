#!/usr/bin/env bash
# {{name}} on {{nodes}} node(s) x {{ranks}} rank(s), by torchrun. Needs: this folder, bgen and the data at the same path on
# every node, and port {{port}} of {{head}} open to the others.
#
#   bash {{script}} 0      on {{head}}, and with 1, 2, ... on the others, in any order; or
#   bash {{script}} all    once, where pdsh and ssh reach {{hosts}}
set -euo pipefail
cd {{cwd}}
node=${1:?the number of this node, or all}

{{environment}}

if [ "$node" = all ]; then
  # This shell's variables are handed on in a file that only its owner reads, since it may hold keys.
  names={{names}}
  (umask 077 && export -p | grep -E "^declare -x ($names)=" > {{out}}/environment.sh) || true
  # A host that is cut off would otherwise be waited for without end.
  export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -oServerAliveInterval=10 -oServerAliveCountMax=3"
  stop() { pdsh -S -R ssh -w {{hosts}} 'kill -TERM "$(cat {{out}}/node_%n.pid)"' || true; }
  trap stop TERM INT
  pdsh -S -R ssh -w {{hosts}} 'bash {{out}}/{{script_name}} %n' &
  code=0
  wait $! || code=$?
  # A signal ends the first wait; then the nodes are saving, and are waited for.
  if [ "$code" -gt 128 ]; then code=0; wait $! || code=$?; fi
  rm -f {{out}}/environment.sh {{out}}/node_*.pid
  exit "$code"
fi
if [ -f {{out}}/environment.sh ]; then source {{out}}/environment.sh; fi

# Node 0 keeps the rendezvous, by which the nodes meet; every node says how the others reach it.
if [ "$node" = 0 ]; then is_host=true; else is_host=false; fi
address=$({{python}} -c '
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:  # sends nothing: asks which address the route begins at
    s.connect(("{{head}}", 9))
    print(s.getsockname()[0])')

echo $$ > {{out}}/node_"$node".pid
exec {{python}} -m torch.distributed.run --nnodes={{nnodes}} --nproc-per-node={{ranks}} --max-restarts={{launcher_restarts}} \
  --rdzv-backend=c10d --rdzv-endpoint={{head}}:{{port}} --rdzv-id={{name}} --local-addr="$address" \
  --rdzv-conf=is_host=$is_host,join_timeout={{join_timeout}},last_call_timeout=10 \
  --log-dir={{out}}/logs/node_"$node" --tee=3 \
  -m bgen train {{config}} train.max_restarts={{restarts}} --resume
