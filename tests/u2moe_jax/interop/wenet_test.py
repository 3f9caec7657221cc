"""Every entry of a reference checkpoint has one place, or an error names it."""

import jax
import numpy as np
import pytest

from tests.reference import golden
from u2moe_jax import config as config_lib
from u2moe_jax.interop import wenet

_CASE = golden.load('u2pp_dense_noncausal_bn')
_CONFIG = wenet.model_config(_CASE.config, sos=_CASE.sos, eos=_CASE.eos)
# One entry of every kind of module.
_ENTRIES = [
  'ctc.ctc_lo.weight',
  'encoder.embed.conv.2.bias',
  'encoder.after_norm.weight',
  'encoder.encoders.1.self_attn.linear_pos.weight',
  'encoder.encoders.1.self_attn.pos_bias_u',
  'encoder.encoders.2.conv_module.norm.running_var',
  'encoder.encoders.0.conv_module.depthwise_conv.weight',
  'encoder.encoders.0.feed_forward_macaron.w_1.bias',
  'decoder.left_decoder.decoders.0.src_attn.linear_q.weight',
  'decoder.right_decoder.embed.0.weight',
]


def _moe_state():
  """A state dict with random experts instead of the dense layers."""
  rng = np.random.default_rng(0)
  state = {}
  for name, weight in _CASE.weights.items():
    if '.feed_forward' not in name:
      state[name] = weight
      continue
    layer, _, part = name.partition('.w_')
    for e in range(3):
      state[f'{layer}.experts.{e}.w_{part}'] = rng.normal(
        size=weight.shape
      ).astype(np.float32)
    state[f'{layer}.gate.weight'] = rng.normal(size=(3, 48)).astype(np.float32)
  return state


def _moe_yaml():
  experts = {'mlp_type': 'moe', 'n_expert': 3, 'n_expert_activated': 1}
  return _CASE.config | {
    group: _CASE.config[group] | experts
    for group in ('encoder_conf', 'decoder_conf')
  }


@pytest.mark.parametrize('with_experts', [False, True])
def test_every_weight_arrives_exactly_once(with_experts):
  state = _moe_state() if with_experts else _CASE.weights
  yaml = _moe_yaml() if with_experts else _CASE.config
  variables = wenet.model_variables(state, wenet.model_config(yaml))
  ours = [np.asarray(leaf) for leaf in jax.tree.leaves(variables)]
  assert sum(leaf.size for leaf in ours) == sum(w.size for w in state.values())
  a, b = (
    np.sort(np.concatenate([leaf.ravel() for leaf in leaves]))
    for leaves in (ours, state.values())
  )
  np.testing.assert_array_equal(a, b)


def test_experts_keep_their_layer_direction_and_number():
  state, config = _moe_state(), wenet.model_config(_moe_yaml())
  params, _ = wenet.model_variables(state, config)
  block = params['encoder']['blocks']
  for ours, theirs in (
    ('ffn_macaron', 'feed_forward_macaron'),
    ('ffn_final', 'feed_forward'),
  ):
    name = f'encoder.encoders.2.{theirs}'
    np.testing.assert_array_equal(
      block[ours]['w_in'][2, 1], state[f'{name}.experts.1.w_1.weight'].T
    )
    np.testing.assert_array_equal(
      block[ours]['router']['kernel'][2], state[f'{name}.gate.weight'].T
    )
  assert config.encoder.moe.top_k == 1
  assert config.decoder.moe.num_experts == 3


@pytest.mark.parametrize('name', _ENTRIES)
def test_a_missing_entry_is_named(name):
  state = {k: v for k, v in _CASE.weights.items() if k != name}
  with pytest.raises(wenet.WenetError, match=name):
    wenet.model_variables(state, _CONFIG)


@pytest.mark.parametrize(
  'name',
  [
    'encoder.encoders.3.norm_ff.weight',
    'decoder.left_decoder.decoders.1.norm1.weight',
    'something.else',
  ],
)
def test_a_left_over_entry_is_named(name):
  state = dict(_CASE.weights) | {name: np.zeros(48, np.float32)}
  with pytest.raises(wenet.WenetError, match=name):
    wenet.model_variables(state, _CONFIG)


def test_what_follows_from_a_formula_may_be_there():
  extra = {
    'encoder.embed.pos_enc.pe': np.zeros((1, 5000, 48)),
    'encoder.encoders.0.conv_module.norm.num_batches_tracked': np.array(3),
  }
  wenet.model_variables(dict(_CASE.weights) | extra, _CONFIG)


@pytest.mark.parametrize(
  ('name', 'ours'),
  [('ctc.ctc_lo.weight', 'ctc'), ('encoder.embed.out.0.bias', 'subsampling')],
)
def test_a_wrong_shape_is_named(name, ours):
  wrong = np.concatenate([_CASE.weights[name]] * 2)
  with pytest.raises(wenet.WenetError, match=rf'{ours}.*\d+.*asks for'):
    wenet.model_variables(dict(_CASE.weights) | {name: wrong}, _CONFIG)


@pytest.mark.parametrize(
  ('group', 'changes', 'named'),
  [
    (None, {'encoder': 'branchformer'}, 'branchformer'),
    (None, {'decoder': 'paraformer'}, 'paraformer'),
    ('encoder_conf', {'mlp_type': 'gated'}, 'gated'),
    ('encoder_conf', {'input_layer': 'linear'}, 'linear'),
    ('encoder_conf', {'normalize_before': False}, 'normalize_before'),
    ('decoder_conf', {'normalize_before': False}, 'normalize_before'),
  ],
)
def test_an_architecture_we_do_not_have_is_refused(group, changes, named):
  yaml = dict(_CASE.config)
  if group is None:
    yaml |= changes
  else:
    yaml[group] = yaml[group] | changes
  with pytest.raises((wenet.WenetError, config_lib.ConfigError), match=named):
    wenet.model_config(yaml)
