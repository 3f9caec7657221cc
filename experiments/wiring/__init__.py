"""Ties the data pipelines to training and decoding."""
