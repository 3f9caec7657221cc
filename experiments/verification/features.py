"""Filterbanks of recordings, and CMVN statistics."""

from collections.abc import Iterator

import numpy as np
import soundfile

from experiments.verification import compare
from experiments.verification import port as port_lib
from experiments.verification import registry
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import audio
from u2moe_jax.frontend import cmvn
from u2moe_jax.frontend import fbank

_LARGEST, _MEAN = 1e-2, 5e-5  # of log energies


def _samples(port: port_lib.Port, name: str) -> tuple[np.ndarray, int]:
  """A recording of the case, and its rate."""
  path = port.case.folder / f'{name}.wav'
  # At its own rate: a resampler would be compared as well.
  rate = soundfile.info(path).samplerate
  return audio.load_audio(path, sample_rate=rate), rate


def _features(port: port_lib.Port, name: str) -> np.ndarray:
  """Our filterbank, with as many bins as the case has, without dither."""

  def compute():
    samples, rate = _samples(port, name)
    bins = port.case.tree['fbank'][name].shape[1]
    config = config_lib.FeatureConfig(sample_rate=rate, num_mel_bins=bins)
    return fbank.fbank(samples, config)

  return port.once(('fbank', name), compute)


def _fbank(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  ours = _features(port, quantity.text('name'))
  yield compare.close(
    f'{quantity.path} largest', ours, quantity.value, _LARGEST
  )
  # Else the row above has failed already, and there is nothing to subtract.
  if ours.shape == quantity.value.shape:
    mean = np.abs(ours - quantity.value).mean()
    yield compare.Row(f'{quantity.path} mean', float(mean), _MEAN)


def _info(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """Counts are exact; ranges follow from the frames."""
  name, part = quantity.text('name'), quantity.text('part')
  if part == 'samples':
    ours = len(_samples(port, name)[0])
    yield compare.equal(quantity.path, ours, quantity.value)
    return
  frames = _features(port, name)
  if part == 'frames':
    yield compare.equal(quantity.path, len(frames), quantity.value)
    return
  ours = {'mean': frames.mean(), 'min': frames.min(), 'max': frames.max()}[part]
  limit = _MEAN if part == 'mean' else _LARGEST
  yield compare.close(quantity.path, ours, quantity.value, limit)


def _own_statistics(port: port_lib.Port) -> cmvn.CmvnStats:
  def compute():
    names = sorted(port.case.tree['fbank'])
    bins = port.case.tree['fbank'][names[0]].shape[1]
    stats = cmvn.empty(bins)
    for name in names:
      stats = cmvn.accumulate(stats, _features(port, name))
    return stats

  return port.once('cmvn', compute)


def _sums(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """Sums over all recordings, compared by frame."""
  ours = _own_statistics(port)
  part = quantity.text('part')
  if part == 'frame_num':
    yield compare.equal(quantity.path, ours.count, quantity.value)
    return
  sums = ours.sum if part == 'mean_stat' else ours.sum_squares
  expected = np.asarray(quantity.value) / ours.count
  # A square moves by twice the value for every unit that the value moves.
  scale = 1.0 if part == 'mean_stat' else 2 * np.sqrt(expected.max())
  yield compare.close(
    f'{quantity.path} by frame', sums / ours.count, expected, _MEAN * scale
  )


def _normalisation(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """Mean and inverse standard deviation, as read from the file."""
  stats = cmvn.load(port.case.folder / 'global_cmvn.json')
  part = quantity.text('part')
  ours = getattr(stats, part)
  scale = float(np.abs(quantity.value).max())
  # One unit in the last place of float32.
  yield compare.close(quantity.path, ours, quantity.value, scale * 2.0**-23)


RULES = (
  registry.Rule('fbank/(?P<name>.+)', _fbank),
  registry.Rule(
    'info/(?P<name>[^/]+)/(?P<part>samples|frames|mean|min|max)', _info
  ),
  registry.Rule(
    r'info/[^/]+/(max|mean)_abs_diff_to_\w+', None, 'about the reference itself'
  ),
  registry.Rule('global_cmvn/(?P<part>mean_stat|var_stat|frame_num)', _sums),
  registry.Rule('cmvn_expected/(?P<part>mean|istd)', _normalisation),
)
