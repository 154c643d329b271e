"""Measuring a detector against labels: curves, metrics, tables."""
