"""How good generated cells are: metrics, protocols with baselines and ceilings, reports."""
