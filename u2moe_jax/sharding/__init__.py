"""Logical axes, meshes and placement."""
