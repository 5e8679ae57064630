"""Benchmarks and static checks; run from a checkout, not installed."""
