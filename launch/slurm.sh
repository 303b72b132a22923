#!/usr/bin/env bash
# {{name}} on {{nodes}} node(s) x {{ranks}} rank(s), by Slurm.   Start: sbatch {{script}}
#SBATCH --job-name={{name}}
#SBATCH --nodes={{nodes}}
#SBATCH --ntasks-per-node=1
{{sbatch}}
#SBATCH --output={{out}}/logs/%j.log
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --requeue
# USR2 to this script 120 s before the time limit. Preemption sends SIGTERM to the ranks instead; both are saved below.
#SBATCH --signal=B:USR2@120
set -uo pipefail
cd {{cwd}}

{{environment}}

newest() { ls -d {{run}}/checkpoints/step_*/COMMITTED 2>/dev/null | tail -n 1; }
before=$(newest)

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it over from sbatch
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

# One torchrun per node; the first node keeps the rendezvous, by which they meet. One log per rank below logs/.
srun --kill-on-bad-exit=1 bash -c "
  exec {{python}} -m torch.distributed.run --nnodes={{nodes}} --nproc-per-node={{ranks}} --max-restarts={{launcher_restarts}} \
    --rdzv-backend=c10d --rdzv-endpoint=$head:$port --rdzv-id=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} \
    --rdzv-conf=is_host=\$([ \$SLURM_NODEID = 0 ] && echo true || echo false) --local-addr=\$SLURMD_NODENAME \
    --log-dir={{out}}/logs/$SLURM_JOB_ID/node_\$SLURM_NODEID --tee=3 \
    -m bgen train {{config}} train.max_restarts={{restarts}} --resume" &
step=$!

# The signal goes to the torchruns as SIGTERM, and from them to the ranks, which save and stop.
trap 'echo "signal: saving"; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR2
code=0
wait $step || code=$?
# A signal to this script ends the first wait; the ranks are still saving then.
if [ $code -gt 128 ]; then code=0; wait $step || code=$?; fi

# A run that was interrupted queues again, as the same job: Slurm by itself would not, since the ranks have ended. So does
# one that failed after it had come further (a host that was lost): failures without a new checkpoint end it.
if tail -n 3 {{run}}/record.jsonl | grep -q '"event": "interrupted"' \
    || { [ $code -ne 0 ] && [ "$(newest)" != "$before" ]; }; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
