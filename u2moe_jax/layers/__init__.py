"""Linen leaves."""
