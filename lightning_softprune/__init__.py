"""Structured pruning inside Lightning training runs."""
