"""Padding rows to a bucket's static shape."""

from collections.abc import Sequence

import numpy as np

from data_pipelines import plan
from data_pipelines import transforms

# Labels are padded with this; a row's mask is all False when it is empty.
IGNORE_ID = -1


def pad_batch(
  rows: Sequence[transforms.Row | None], bucket: plan.Bucket, num_bins: int
) -> dict[str, np.ndarray]:
  """Stacks rows; None, and rows that are not there, stay empty.

  Args:
    rows: at most `bucket.batch_size`.
    bucket: the padded shape.
    num_bins: mel bins F.

  Returns:
    features (B, T_in, F) float32, feature_lengths (B,) int32, labels (B, U)
    int32 padded with -1, label_lengths (B,) int32, weights (B,) float32: 1
    for real utterances, 0 for empty rows.
  """
  size = bucket.batch_size
  features = np.zeros((size, bucket.max_frames, num_bins), np.float32)
  labels = np.full((size, bucket.max_tokens), IGNORE_ID, np.int32)
  feature_lengths = np.zeros((size,), np.int32)
  label_lengths = np.zeros((size,), np.int32)
  weights = np.zeros((size,), np.float32)
  for i, row in enumerate(rows):
    if row is None or row.frames is None:
      continue
    # Resampling may give a frame more than the plan foresaw.
    frames = row.frames[: bucket.max_frames]
    features[i, : len(frames)] = frames
    labels[i, : len(row.labels)] = row.labels
    feature_lengths[i] = len(frames)
    label_lengths[i] = len(row.labels)
    weights[i] = 1.0
  return {
    'features': features,
    'feature_lengths': feature_lengths,
    'labels': labels,
    'label_lengths': label_lengths,
    'weights': weights,
  }
