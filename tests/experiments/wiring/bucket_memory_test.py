"""Batch sizes that fit: from a law of memory, and from real programs."""

import jax
import pytest

from data_pipelines import plan
from data_pipelines import synthetic
from experiments.configs import tiny
from experiments.wiring import bucket_memory
from u2moe_jax import config as config_lib
from u2moe_jax.training import errors

_BUCKET = plan.Bucket(max_frames=100, max_tokens=8, batch_size=8)


def _fit(law, limit, *, multiple=2, most=1000):
  """The size for a law of memory, and the sizes that were tried."""
  tried = []

  def measure(shape):
    assert (shape.frames, shape.tokens) == (100, 8)
    tried.append(shape.rows)
    return law(shape.rows)

  size = bucket_memory.fit(
    _BUCKET, measure, limit=limit, multiple=multiple, most=most
  )
  return size, tried


@pytest.mark.parametrize('multiple', [1, 2, 4])
@pytest.mark.parametrize('limit', [1500, 1600, 7777])
def test_a_linear_law_is_solved_at_once(multiple, limit):
  size, tried = _fit(lambda rows: 1000 + 50 * rows, limit, multiple=multiple)
  largest = (limit - 1000) // 50 // multiple * multiple
  assert size.rows == largest
  assert size.bytes == 1000 + 50 * largest <= limit
  assert size.bytes_before == 1400
  assert len(tried) <= 3


def test_one_that_grows_faster_is_approached_from_above():
  size, tried = _fit(lambda rows: rows**2, 10_000)
  assert size.rows in range(90, 101, 2)
  assert size.bytes <= 10_000
  assert max(tried) > 100
  assert len(set(tried)) == len(tried)  # nothing is compiled twice


def test_there_is_a_largest_size():
  size, _ = _fit(lambda rows: 1, 10, most=30)
  assert size.rows == 30
  smaller, _ = _fit(lambda rows: 1000 + 50 * rows, 1100, most=30)
  assert smaller.rows == 2


def test_what_never_fits_says_what_to_lower():
  with pytest.raises(errors.OutOfMemoryError) as error:
    _fit(lambda rows: 1 << 30, 1 << 29)
  for part in ('100 frames', '1.00 GiB', '0.50 GiB', 'data.max_seconds'):
    assert part in str(error.value)


def test_programs_of_a_config_are_measured(tmp_path, monkeypatch):
  devices = jax.devices
  monkeypatch.setattr(jax, 'devices', lambda *args: devices(*args)[:1])
  config = config_lib.from_dict(config_lib.Config, tiny.get_config().to_dict())
  manifest = synthetic.write_corpus(tmp_path, num_utterances=8, seed=1)
  for key, value in {
    'data.train': str(manifest),
    'data.batch_frames': 250,
    'data.batch_sizes': (7, 7, 7),  # not looked at
    'data.max_batch_size': 4,  # so that two programs are compiled
    'model.encoder.num_blocks': 1,
    'model.encoder.moe.num_experts': 0,
    'model.decoder.num_reverse_blocks': 0,
    'model.decoder.num_blocks': 0,
  }.items():
    config = config_lib.replace(config, key, value)
  (size,) = bucket_memory.profile(config, 1 << 40)
  assert size.bucket.batch_size == 2
  assert size.rows == 4
  # At least two rows of features more, of four bytes.
  features = 2 * 4 * size.bucket.max_frames * 20
  assert size.bytes > size.bytes_before + features
