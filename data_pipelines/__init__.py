"""From corpora to batches; no model code."""
