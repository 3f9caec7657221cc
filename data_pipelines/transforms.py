"""Steps from a loaded utterance to a row of a batch; thin, composable."""

import dataclasses

from jaxtyping import Float
import numpy as np

from data_pipelines import augment
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import audio
from u2moe_jax.frontend import fbank


@dataclasses.dataclass(frozen=True)
class Row:
  """An utterance on its way into a batch.

  Attributes:
    key: its name.
    samples: mono waveform; empty once features are computed.
    labels: token ids.
    speed: factor drawn by the plan.
    rng: the utterance's own generator, (seed, epoch, key).
    frames: log-mel frames, once computed.
  """

  key: str
  samples: Float[np.ndarray, 'samples']
  labels: tuple[int, ...]
  speed: float
  rng: np.random.Generator
  frames: Float[np.ndarray, 'T F'] | None = None


@dataclasses.dataclass(frozen=True)
class ChangeSpeed:
  """samples -> samples, faster or slower by `row.speed` (pitch follows)."""

  features: config_lib.FeatureConfig

  def __call__(self, row: Row) -> Row:
    if row.speed == 1.0:
      return row
    samples = audio.change_speed(
      row.samples, row.speed, self.features.sample_rate
    )
    return dataclasses.replace(row, samples=samples)


@dataclasses.dataclass(frozen=True)
class Fbank:
  """samples -> frames; `dither` only in training."""

  features: config_lib.FeatureConfig
  dither: bool

  def __call__(self, row: Row) -> Row:
    rng = row.rng if self.dither else None
    frames = fbank.fbank(row.samples, self.features, rng=rng)
    return dataclasses.replace(row, frames=frames, samples=row.samples[:0])


@dataclasses.dataclass(frozen=True)
class Augment:
  """frames -> frames: SpecAugment, SpecSub, SpecTrim, in this order."""

  config: config_lib.AugmentConfig

  def __call__(self, row: Row) -> Row:
    frames = row.frames
    assert frames is not None, 'Augment stands behind Fbank'
    for step in (
      augment.spec_augment,
      augment.spec_substitute,
      augment.spec_trim,
    ):
      frames = step(frames, row.rng, self.config)
    return dataclasses.replace(row, frames=frames)
