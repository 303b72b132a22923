"""Checkpoints: commit, verify, find the newest, keep the last few."""
