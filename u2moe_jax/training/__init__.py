"""Objective, train step and loop."""
