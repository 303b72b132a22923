"""What a run says of itself: the JSONL record, its MLflow mirror, throughput, progress."""
