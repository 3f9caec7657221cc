"""Feature augmentation on raw log-mel frames, NumPy.

The masked value is 0 in the raw log-mel domain, before CMVN, as in the
reference: its recipes were tuned so.
"""

from jaxtyping import Float
import numpy as np

from u2moe_jax import config as config_lib


def spec_augment(
  frames: Float[np.ndarray, 'T F'],
  rng: np.random.Generator,
  config: config_lib.AugmentConfig,
) -> Float[np.ndarray, 'T F']:
  """Masks spans of time and of mel bins (SpecAugment, arXiv 1904.08779)."""
  frames = frames.copy()
  num_frames, num_bins = frames.shape
  for _ in range(config.num_time_masks):
    start, end = _span(rng, num_frames, config.max_time_mask)
    frames[start:end] = 0.0
  for _ in range(config.num_freq_masks):
    start, end = _span(rng, num_bins, config.max_freq_mask)
    frames[:, start:end] = 0.0
  return frames


def spec_substitute(
  frames: Float[np.ndarray, 'T F'],
  rng: np.random.Generator,
  config: config_lib.AugmentConfig,
) -> Float[np.ndarray, 'T F']:
  """Replaces spans by earlier ones (SpecSub, arXiv 2106.05642, 3.2.3)."""
  result = frames.copy()
  for _ in range(config.num_substitutions):
    start, end = _span(rng, len(frames), config.max_substitution)
    # At most to the beginning; 0 leaves the span as it is.
    back = int(rng.integers(0, start + 1))
    # From the frames before any substitution, as in the reference.
    result[start:end] = frames[start - back : end - back]
  return result


def spec_trim(
  frames: Float[np.ndarray, 'T F'],
  rng: np.random.Generator,
  config: config_lib.AugmentConfig,
) -> Float[np.ndarray, 't F']:
  """Drops up to `max_trim` tail frames, if that is less than half."""
  if not config.max_trim:
    return frames
  drop = int(rng.integers(1, config.max_trim + 1))
  return frames[: len(frames) - drop] if 2 * drop < len(frames) else frames


def _span(
  rng: np.random.Generator, size: int, max_width: int
) -> tuple[int, int]:
  """A start within `size` and an end at most `max_width` behind it."""
  start = int(rng.integers(0, max(size, 1)))
  width = int(rng.integers(1, max(max_width, 1) + 1))
  return start, min(size, start + width)
