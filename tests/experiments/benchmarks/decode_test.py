"""Decoding benchmarks run the form that is asked for, and say so."""

import dataclasses

from flax import linen as nn
import jax
import numpy as np
import pytest

from experiments.benchmarks import decode
from experiments.benchmarks import harness
from experiments.benchmarks import operations
from experiments.benchmarks import train
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import contents
from u2moe_jax.models import u2

_OPTIONS = harness.Options(
  configs=('tiny',), seconds=(0.5,), batches=(1,), repeats=1
)


@pytest.fixture(autouse=True)
def _small_peak(monkeypatch):
  """Where tests run, products in 8 bits take seconds."""
  monkeypatch.setattr(operations, 'peak', lambda _: 1e8)


@pytest.mark.parametrize('dtype', ['', 'int8'])
def test_random_models_have_what_their_modules_ask_for(dtype):
  options = dataclasses.replace(_OPTIONS, dtype=dtype)
  model = harness.random_model('tiny', options)
  asked = jax.eval_shape(
    lambda key: u2.init_params(model.module, key), jax.random.key(0)
  )
  asked = contents.shapes(nn.meta.unbox(asked))
  found = contents.shapes(model.params)
  scales = {path for path in found if path.endswith('kernel_scale')}
  assert bool(scales) == (dtype == 'int8')
  assert asked.items() <= found.items()
  assert model.record['form'] == 'inference'
  assert model.record['dtype'] == (dtype or 'float32')
  total = sum(np.prod(shape, dtype=int) for shape in asked.values())
  # What is fused or folded is counted as it trains.
  assert model.record['params_m'] == pytest.approx(total / 1e6, abs=0.06)


def test_records_say_what_was_measured():
  options = dataclasses.replace(_OPTIONS, dtype='int8')
  (record,) = decode.run(options, mode='ctc_greedy_search')
  assert record['form'] == 'inference'
  assert record['dtype'] == 'int8'
  assert record['bench'] == 'greedy'
  assert record['rtf'] > 0
  assert (record['executor'], record['layout']) == ('blocked', 'separate')
  assert record['gflop'] > 0
  assert record['mfu'] > 0


def test_texts_are_as_long_as_those_of_speech():
  options = dataclasses.replace(_OPTIONS, seconds=(2.0,))
  (record,) = decode.run(options, mode='attention_rescoring')
  tokens, nodes = record['case'].split(', ')
  assert 6 <= int(tokens.removesuffix(' tokens')) <= 10
  forward, _, backward = nodes.removesuffix(' nodes').partition(' + ')
  # Ten hypotheses: more than one text, and at most ten that share nothing.
  for count in (int(forward), int(backward)):
    assert 10 < count <= 1 + 10 * 11


def test_the_form_that_trains_has_no_8_bits():
  options = dataclasses.replace(_OPTIONS, dtype='int8', form='training')
  for run in (lambda: harness.random_model('tiny', options), _train(options)):
    with pytest.raises(config_lib.ConfigError, match='--form=inference'):
      run()


def _train(options):
  return lambda: next(train.run(options))
