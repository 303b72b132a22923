"""Metrics, baselines, ceilings and reports: how good generated cells are, beside what is easy and what is possible."""
