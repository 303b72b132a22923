"""What helps to find why a run fails, is slow or does not learn."""
