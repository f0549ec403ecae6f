"""Metrics, baselines and the ranking of held-out items."""
