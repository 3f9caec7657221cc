"""Manifests: JSON lines, ours or WeNet's `data.list`."""

from data_pipelines import manifest
from data_pipelines import sources


def open_corpus(
  path: str, *, split: str, sample_rate: int, tolerant: bool
) -> sources.Source:
  """Opens a manifest; it has one split, whatever that is called."""
  del split
  table = manifest.read_table(path, tolerant=tolerant)
  return sources.FileSource(table, sample_rate=sample_rate)
