"""Shared code of the benches: clocks, reports, result files and their evaluation, models and texts."""
