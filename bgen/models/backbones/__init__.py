"""Velocity networks on ``[B, T, N, D]``."""
