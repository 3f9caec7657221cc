"""The whole model: sizes, unrolled = scanned, step by step = teacher-forced."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import tiny
from u2moe_jax import config as config_lib
from u2moe_jax.models import decoder as decoder_lib
from u2moe_jax.models import u2
from u2moe_jax.training import objective

_BATCH = jax.tree.map(jnp.asarray, tiny.batch((47, 31), (4, 2)))


@pytest.mark.parametrize(
  ('name', 'total', 'active'),
  [
    ('dense_225m', 224.4, 224.4),
    ('dense_1b', 1042.2, 1042.2),
    ('moe_1b', 1051.2, 342.7),
  ],
)
def test_sizes_of_the_paper(name, total, active):
  module = importlib.import_module(f'experiments.configs.{name}')
  config = config_lib.from_dict(
    config_lib.Config, module.get_config().to_dict()
  )
  counted = u2.count_params(config.model)
  np.testing.assert_allclose(
    np.array(counted) / 1e6, [total, active], rtol=1e-3
  )


def test_parameters_are_counted_as_they_are():
  config = tiny.model_config(tiny.moe())
  _, params, _ = tiny.init(config)
  total, active = u2.count_params(config)
  assert total == sum(leaf.size for leaf in jax.tree.leaves(params))
  experts = sum(
    leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if path[-1].key in ('w_in', 'b_in', 'w_out', 'b_out')
  )
  assert active == total - experts // 2  # 2 of 4 experts


@functools.cache
def _loss_and_gradients(scan, remat):
  """Of the encoder and CTC; the decoders are stacked by the same function."""
  config = tiny.model_config(tiny.moe(executor='dense'), decoders=0)
  _, params, buffers = tiny.init(config)
  config = tiny.replace_encoder(config, scan_blocks=scan, remat=remat)

  def loss(params):
    return objective.compute_objective(
      u2.U2MoeModel(config), params, buffers, _BATCH, config_lib.TrainConfig()
    ).loss

  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(('scan', 'remat'), [(False, False), (True, True)])
def test_how_blocks_run_does_not_change_what_they_compute(scan, remat):
  loss, gradients = _loss_and_gradients(scan, remat)
  expected, expected_gradients = _loss_and_gradients(True, False)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)

  def compare(path, a, b):
    scale = max(np.abs(b).max(), 1e-2)
    np.testing.assert_allclose(
      a, b, atol=2e-4 * scale, err_msg=jax.tree_util.keystr(path)
    )

  jax.tree_util.tree_map_with_path(compare, gradients, expected_gradients)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


class _Decoding:
  """A tiny model, encoder frames and three hypotheses an utterance."""

  rows, length = 3, 5

  def __init__(self):
    config = tiny.model_config(tiny.moe())
    self.model, self.params, _ = tiny.init(config)
    rng = np.random.default_rng(0)
    self.memory = jnp.asarray(rng.normal(size=(2, 7, 16)), jnp.float32)
    self.mask = jnp.arange(7)[None] < jnp.array([7, 4])[:, None]
    self.tokens = jnp.asarray(rng.integers(0, 11, (6, self.length)))

  def apply(self, method, *arguments, **options):
    return self.model.apply(
      {'params': self.params}, *arguments, method=method, **options
    )

  def teacher_forced(self, tokens, memory, mask):
    inputs = u2.DecoderInputs(tokens=tokens, mask=jnp.ones_like(tokens, bool))
    scores = self.apply('decode_forward', inputs, memory, mask)
    return jax.nn.log_softmax(scores.logits)


@pytest.fixture(scope='module')
def decoding():
  return _Decoding()


@pytest.fixture(scope='module')
def expected(decoding):
  return jax.jit(decoding.teacher_forced)(
    decoding.tokens, decoding.memory, decoding.mask
  )


def test_step_by_step_is_teacher_forced(decoding, expected):
  rows, capacity = decoding.rows, 8
  config = decoding.model.config
  decoder = u2.make_decoder(config, config.decoder.num_blocks, unrolled=True)
  unstacked = decoder_lib.unstack(decoding.params['forward_decoder'])
  apply = functools.partial(decoder.apply, {'params': unstacked})
  cache = apply(
    decoding.memory, hypotheses=rows, capacity=2, method='init_step_cache'
  )
  step = jax.jit(
    lambda inputs, cache: apply(inputs, cache, decoding.mask, method='step')
  )
  tokens = decoding.tokens.reshape(2, rows, -1)
  # Hypotheses change places at every step: n stands at (n + i) % rows at step
  # i, and so did its ancestors at their positions.
  names = jnp.arange(rows)
  ancestry = jnp.full((2, rows, capacity), -1)
  for i in range(decoding.length):
    order = (names - i) % rows  # who stands at each place
    own = (order[:, None] + jnp.arange(i + 1)[None]) % rows  # [N, i + 1]
    ancestry = ancestry.at[:, :, : i + 1].set(own[None])
    if i == 2:
      cache = decoder_lib.grow(cache, capacity, hypotheses=rows)
    inputs = decoder_lib.StepInputs(
      tokens=tokens[:, order, i],
      position=jnp.asarray(i),
      ancestry=ancestry if i >= 2 else ancestry[..., :2],
      live=jnp.ones((2, rows), bool),
    )
    logits, cache, _ = step(inputs, cache)
    wanted = expected[:, i].reshape(2, rows, -1)[:, order]
    np.testing.assert_allclose(jax.nn.log_softmax(logits), wanted, atol=1e-5)
  assert step._cache_size() == 2
  # The ancestors matter: others give another answer.
  swapped = dataclasses.replace(inputs, ancestry=inputs.ancestry[:, ::-1])
  logits, _, _ = step(swapped, cache)
  assert np.abs(jax.nn.log_softmax(logits) - wanted).max() > 1e-2


def test_hypotheses_of_an_utterance_share_its_frames(decoding, expected):
  """R = 3 rows for each of B = 2 are as if the frames were repeated."""
  repeated = jax.jit(decoding.teacher_forced)(
    decoding.tokens,
    jnp.repeat(decoding.memory, decoding.rows, axis=0),
    jnp.repeat(decoding.mask, decoding.rows, axis=0),
  )
  np.testing.assert_allclose(repeated, expected, atol=1e-5)


def test_later_tokens_and_padded_frames_have_no_part(decoding, expected):
  tokens = decoding.tokens.at[:, 3:].set(1)
  noise = jnp.where(decoding.mask[..., None], decoding.memory, 9.0)
  other = jax.jit(decoding.teacher_forced)(tokens, noise, decoding.mask)
  np.testing.assert_allclose(other[:, :3], expected[:, :3], atol=1e-5)
  assert np.abs(other[:, 3:] - expected[:, 3:]).max() > 1e-2


def test_blank_penalty_lowers_the_blank_before_the_softmax(decoding):
  plain, lowered = (
    np.asarray(
      decoding.apply('ctc_log_probs', decoding.memory, blank_penalty=penalty)
    )
    for penalty in (0.0, 1.5)
  )
  shifted = plain - 1.5 * (np.arange(11) == 0)
  expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  np.testing.assert_allclose(lowered, expected, atol=1e-5)
