"""Tokens and scoring."""
