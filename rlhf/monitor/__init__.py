"""Seeing and judging a run by its log alone: reading, health checks, plots, terminal, page and report."""
