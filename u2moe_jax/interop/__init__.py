"""Checkpoints of other systems."""
