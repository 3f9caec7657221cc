"""Experiment scripts: short absl mains over library calls."""
