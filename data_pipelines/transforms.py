"""Steps from a loaded utterance to a row of a batch; thin, composable."""

from collections.abc import Callable
import dataclasses

from jaxtyping import Float
import numpy as np

from data_pipelines import augment
from data_pipelines import noises
from data_pipelines import waveform
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
    rng: the utterance's own generator, (seed, round, key).
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
class Reverberate:
  """samples -> samples, some of them in a room."""

  rooms: noises.Rooms
  probability: float

  def __call__(self, row: Row) -> Row:
    if row.rng.random() >= self.probability:
      return row
    response = self.rooms.draw(row.rng)
    samples = waveform.reverberate(row.samples, response)
    return dataclasses.replace(row, samples=samples)


@dataclasses.dataclass(frozen=True)
class AddNoise:
  """samples -> samples, some of them with noise at a random ratio."""

  noises: noises.Noises
  config: config_lib.AugmentConfig

  def __call__(self, row: Row) -> Row:
    if row.rng.random() >= self.config.noise_probability:
      return row
    lowest, highest = self.config.noise_snr
    snr = row.rng.uniform(lowest, highest)
    noise = self.noises.draw(len(row.samples), row.rng)
    samples = waveform.add_noise(row.samples, noise, snr)
    return dataclasses.replace(row, samples=samples)


@dataclasses.dataclass(frozen=True)
class ChangeVolume:
  """samples -> samples, some of them louder or softer."""

  config: config_lib.AugmentConfig

  def __call__(self, row: Row) -> Row:
    if row.rng.random() >= self.config.volume_probability:
      return row
    lowest, highest = self.config.volume_db
    gain = row.rng.uniform(lowest, highest)
    samples = waveform.change_volume(row.samples, gain)
    return dataclasses.replace(row, samples=samples)


@dataclasses.dataclass(frozen=True)
class Fbank:
  """samples -> frames; `dither` only in training."""

  features: config_lib.FeatureConfig
  dither: bool

  def __call__(self, row: Row) -> Row:
    # Dither is noise, and an evaluation should say the same each time.
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


Step = Callable[[Row], Row]


def training_steps(
  config: config_lib.DataConfig, speech: noises.Speech
) -> tuple[Step, ...]:
  """The steps of training, in their order.

  What is switched off is left out and draws nothing, so that switching one
  kind on does not change what a run without it drew.

  Args:
    config: features and augmentation.
    speech: utterances of the corpus, for babble.

  Raises:
    NoiseError: for noise or impulse responses that are not there.
  """
  augmentation = config.augment
  rate = config.features.sample_rate
  steps: list[Step] = [ChangeSpeed(config.features)]
  if augmentation.reverb_probability:
    rooms = noises.make_rooms(augmentation, sample_rate=rate)
    steps.append(Reverberate(rooms, augmentation.reverb_probability))
  if augmentation.noise_probability:
    drawn = noises.make_noises(augmentation, speech, sample_rate=rate)
    steps.append(AddNoise(drawn, augmentation))
  if augmentation.volume_probability:
    steps.append(ChangeVolume(augmentation))
  steps.append(Fbank(config.features, dither=True))
  steps.append(Augment(augmentation))
  return tuple(steps)
