"""Start-up, time-outs, agreement among ranks, signals: torch.distributed and nothing else."""
