"""Every entry of a reference checkpoint has one place, or an error names it."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.reference import golden
from tests.reference import tiny
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
  with pytest.raises(wenet.WenetError, match=rf'{name}.*asks for.*{ours}'):
    wenet.model_variables(dict(_CASE.weights) | {name: wrong}, _CONFIG)


@pytest.mark.parametrize(
  ('dtype', 'message'),
  [(np.int64, 'not a float'), (np.float64, 'float32 cannot hold')],
)
def test_a_type_that_loses_digits_is_named(dtype, message):
  name = 'ctc.ctc_lo.bias'
  wrong = (_CASE.weights[name].astype(np.float64) * 1.1).astype(dtype)
  with pytest.raises(wenet.WenetError, match=rf'{name}.*{message}'):
    wenet.model_variables(dict(_CASE.weights) | {name: wrong}, _CONFIG)


def test_half_floats_and_doubles_that_fit_are_taken():
  for dtype in (np.float16, np.float64):
    state = dict(_CASE.weights)
    name = 'ctc.ctc_lo.weight'  # exact in float16, as most of the case
    state[name] = state[name].astype(dtype)
    params, _ = wenet.model_variables(state, _CONFIG)
    assert params['ctc']['kernel'].dtype == np.float32
    np.testing.assert_array_equal(
      params['ctc']['kernel'].T, _CASE.weights[name]
    )


@pytest.mark.parametrize(
  ('group', 'changes', 'named'),
  [
    (None, {'encoder': 'branchformer'}, 'branchformer'),
    (None, {'decoder': 'paraformer'}, 'paraformer'),
    ('encoder_conf', {'mlp_type': 'gated'}, 'gated'),
    ('encoder_conf', {'input_layer': 'linear'}, 'linear'),
    ('encoder_conf', {'normalize_before': False}, 'normalize_before'),
    ('decoder_conf', {'normalize_before': False}, 'normalize_before'),
    (None, {'model': 'transducer'}, 'transducer'),
    (None, {'predictor': 'rnn'}, 'predictor'),
    ('encoder_conf', {'layer_norm_type': 'rms_norm'}, 'layer_norm_type'),
    ('encoder_conf', {'norm_eps': 1e-6}, 'norm_eps'),
    ('encoder_conf', {'n_kv_head': 2, 'head_dim': 12}, 'n_kv_head'),
    ('encoder_conf', {'head_dim': 6}, 'head_dim'),
    ('encoder_conf', {'selfattention_layer_type': 'selfattn'}, 'rel_selfattn'),
    ('encoder_conf', {'activation_type': 'selu'}, 'encoder_conf.*selu'),
    ('encoder_conf', {'pos_enc_layer_type': 'abs_pos'}, 'selfattn'),
    ('encoder_conf', {'efficient_conf': {}}, 'efficient_conf is not known'),
    ('decoder_conf', {'tie_word_embedding': True}, 'tie_word_embedding'),
    ('decoder_conf', {'input_layer': 'no_pos'}, 'input_layer'),
    ('decoder_conf', {'r_num_blocks': 0}, 'r_num_blocks'),
    ('model_conf', {'non_spike_loss_weight': 1}, 'non_spike_loss_weight'),
    ('encoder_conf', {'num_blocks': '3'}, "num_blocks is '3', not int"),
    ('encoder_conf', {'causal': 1}, 'causal is 1, not bool'),
    ('encoder_conf', {'dropout_rate': 'a'}, 'dropout_rate'),
    ('encoder_conf', {'attention_heads': 5}, 'num_heads=5'),
  ],
)
def test_an_architecture_we_do_not_have_is_refused(group, changes, named):
  yaml = dict(_CASE.config)
  if group is None:
    yaml |= changes
  else:
    yaml[group] = yaml[group] | changes
  with pytest.raises(wenet.WenetError, match=named):
    wenet.model_config(yaml)


@pytest.mark.parametrize(
  'key', ['encoder_conf', 'decoder_conf', 'output_dim', 'input_dim']
)
def test_a_missing_group_or_size_is_named(key):
  yaml = {k: v for k, v in _CASE.config.items() if k != key}
  with pytest.raises(wenet.WenetError, match=f'no {key}'):
    wenet.model_config(yaml)


def test_keys_that_change_nothing_may_be_there():
  yaml = dict(_CASE.config) | {'optim': 'adam', 'max_epoch': 3}
  yaml['encoder_conf'] = yaml['encoder_conf'] | {
    'use_sdpa': True,
    'positionwise_conv_kernel_size': 3,
    'n_expert': 8,
    'n_kv_head': 4,
    'head_dim': 12,
    'dropout_rate': '0e-1',  # as YAML 1.1 reads it: text
  }
  assert wenet.model_config(yaml, sos=2, eos=2) == _CONFIG


def test_special_ids_come_from_the_caller_the_yaml_or_the_last_token():
  yaml = dict(_CASE.config)
  yaml['tokenizer_conf'] = {'special_tokens': {'<sos>': 5, '<eos>': 6}}
  config = wenet.model_config(yaml)
  assert (config.sos, config.eos) == (5, 6)
  config = wenet.model_config(yaml, sos=7, eos=8)
  assert (config.sos, config.eos) == (7, 8)
  del yaml['tokenizer_conf']
  config = wenet.model_config(yaml)
  assert (config.sos, config.eos) == (39, 39)


def test_what_the_reference_gets_wrong_is_an_option():
  right = wenet.model_config(_CASE.config).encoder
  wrong = wenet.model_config(_CASE.config, reference_quirks=True).encoder
  assert not right.conv_padding_leak
  assert not right.batch_norm_padding
  assert wrong.conv_padding_leak
  assert wrong.batch_norm_padding
  causal = dict(_CASE.config)
  causal['encoder_conf'] = causal['encoder_conf'] | {
    'causal': True,
    'cnn_module_norm': 'layer_norm',
  }
  assert wenet.model_config(causal, reference_quirks=True) == (
    wenet.model_config(causal)
  )


def test_without_decoder_entries_the_model_is_ctc_only():
  state = {k: v for k, v in _CASE.weights.items() if 'decoder.' not in k}
  config = wenet.model_config(_CASE.config, names=state)
  assert config.decoder.num_blocks == config.decoder.num_reverse_blocks == 0
  params, _ = wenet.model_variables(state, config)
  assert sorted(params) == ['ctc', 'encoder']
  # But half of a decoder is not less of a model.
  half = {k: v for k, v in _CASE.weights.items() if 'right_decoder' not in k}
  config = wenet.model_config(_CASE.config, names=half)
  with pytest.raises(wenet.WenetError, match='no entry.*right_decoder'):
    wenet.model_variables(half, config)


_DENSE, _MOE = tiny.moe(num_experts=0), tiny.moe(num_experts=3)
# (encoder keys, experts of the encoder, of the decoders, layers of both)
_VARIATIONS = {
  'dense': ({}, _DENSE, _DENSE, (1, 1)),
  'moe': ({}, _MOE, _MOE, (2, 1)),
  'moe_encoder': ({'subsampling': 'conv2d8'}, _MOE, _DENSE, (1, 3)),
  'moe_decoders': ({'position': 'no_pos'}, _DENSE, tiny.moe(top_k=1), (1, 1)),
  'one_sided': ({'position': 'abs_pos', 'macaron': False}, _MOE, _MOE, (2, 0)),
  'ctc_only': ({'position': 'rope_pos'}, _DENSE, _DENSE, (0, 0)),
  'rms_norm': ({'conv_norm': 'rms_norm'}, _DENSE, _DENSE, (1, 0)),
  'batch_norm': (
    {
      'conv_norm': 'batch_norm',
      'causal_conv': False,
      'conv_kernel': 5,
      'subsampling': 'conv2d6',
    },
    _DENSE,
    _DENSE,
    (1, 1),
  ),
}


def _variation(name):
  encoder, encoder_moe, decoder_moe, (left, right) = _VARIATIONS[name]
  config = tiny.model_config(**encoder)
  return dataclasses.replace(
    config,
    blank_id=1,
    sos_id=3,
    eos_id=4,
    encoder=dataclasses.replace(config.encoder, moe=encoder_moe),
    decoder=dataclasses.replace(
      config.decoder,
      num_blocks=left,
      num_reverse_blocks=right,
      moe=decoder_moe,
    ),
  )


def _variables(config):
  _, params, buffers = tiny.init(config, seed=1)
  rng = np.random.default_rng(2)
  if 'conv_norm' in buffers:
    buffers['conv_norm'] = jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32),
      buffers['conv_norm'],
    )
  return params, buffers


@pytest.mark.parametrize('name', _VARIATIONS)
def test_out_and_in_again_is_the_same(name):
  config = _variation(name)
  yaml = wenet.to_yaml(config, config_lib.FeatureConfig(num_mel_bins=tiny.BINS))
  if config.decoder.num_blocks:
    assert wenet.model_config(yaml) == config
  else:
    assert yaml['decoder'] is None
    assert wenet.model_config(yaml).decoder.num_blocks == 0
    assert wenet.model_config(yaml).encoder == config.encoder
  variables = _variables(config)
  state = wenet.state_dict(*variables, config)
  again = wenet.model_variables(state, config)
  jax.tree.map(np.testing.assert_array_equal, again, variables)
  params, _ = variables
  count = sum(leaf.size for leaf in jax.tree.leaves(variables))
  assert count == sum(array.size for array in state.values())
  # Gradients have the shapes of parameters, and their names.
  assert set(wenet.state_dict(params, None, config)) == {
    entry
    for entry in state
    if 'cmvn' not in entry and not entry.endswith(('_mean', '_var'))
  }


def test_the_names_are_those_of_the_reference():
  state = wenet.state_dict(
    *wenet.model_variables(_CASE.weights, _CONFIG), _CONFIG
  )
  assert set(state) == {k for k in _CASE.weights if 'num_batches' not in k}
  for name, array in state.items():
    assert array.tobytes() == _CASE.weights[name].tobytes(), name


def test_one_changed_number_changes_one_entry():
  """The comparison above can fail: a wrong row is seen under its name."""
  params, buffers = wenet.model_variables(_CASE.weights, _CONFIG)
  kernel = params['encoder']['blocks']['attention']['query']['kernel']
  kernel[1, 2, 3, 4] += 1
  state = wenet.state_dict(params, buffers, _CONFIG)
  changed = [k for k in state if (state[k] != _CASE.weights[k]).any()]
  assert changed == ['encoder.encoders.1.self_attn.linear_q.weight']
  ours, theirs = (s[changed[0]] for s in (state, _CASE.weights))
  # Head 3, width 4 of it, input 2; heads are 12 wide.
  assert np.argwhere(ours != theirs).tolist() == [[3 * 12 + 4, 2]]


def test_a_cmvn_that_changes_nothing_is_none_at_all():
  state = {k: v for k, v in _CASE.weights.items() if 'cmvn' not in k}
  variables = wenet.model_variables(state, _CONFIG)
  again = wenet.state_dict(*variables, _CONFIG)
  assert not any('cmvn' in name for name in again)
  with pytest.raises(wenet.WenetError, match=r'no entry.*istd'):
    wenet.model_variables(
      state | {'encoder.global_cmvn.mean': np.zeros(80, np.float32)}, _CONFIG
    )


def test_a_model_that_the_reference_has_not_is_refused():
  moe = tiny.moe(router_type='softmax_topk')
  with pytest.raises(wenet.WenetError, match='softmax_topk'):
    wenet.to_yaml(tiny.model_config(moe), config_lib.FeatureConfig())
  narrow = tiny.model_config(subsampling_channels=8)
  with pytest.raises(wenet.WenetError, match='subsampling_channels=8'):
    wenet.to_yaml(narrow, config_lib.FeatureConfig())
  config = _variation('dense')
  params, buffers = _variables(config)
  with pytest.raises(wenet.WenetError, match='no params.forward_decoder'):
    wenet.state_dict(
      {k: v for k, v in params.items() if k != 'forward_decoder'},
      buffers,
      config,
    )
  with pytest.raises(wenet.WenetError, match='asks for'):
    wenet.state_dict(params, buffers, _variation('moe_encoder'))


def test_features_come_from_the_yaml():
  yaml = dict(_CASE.config)
  yaml['dataset_conf'] = {
    'fbank_conf': {'num_mel_bins': 80, 'frame_shift': 12, 'dither': 0.1},
    'resample_conf': {'resample_rate': 8000},
    'speed_perturb': True,
  }
  features = wenet.feature_config(yaml, _CONFIG)
  assert features == config_lib.FeatureConfig(
    sample_rate=8000,
    frame_shift_ms=12.0,
    dither=0.1,
    mel_floor=1.1920929e-07,
  )


@pytest.mark.parametrize(
  ('dataset', 'named'),
  [
    ({'fbank_conf': {'num_mel_bins': 40}}, 'num_mel_bins is 40'),
    ({'fbank_conf': {'window_type': 'hamming'}}, 'hamming'),
    ({'fbank_conf': {'use_energy': True}}, 'use_energy'),
    ({'mfcc_conf': {'num_mel_bins': 80}}, 'mfcc_conf'),
    ({'feats_type': 'log_mel_spectrogram'}, 'feats_type'),
  ],
)
def test_other_features_are_refused(dataset, named):
  yaml = dict(_CASE.config) | {'dataset_conf': dataset}
  with pytest.raises(wenet.WenetError, match=named):
    wenet.feature_config(yaml, _CONFIG)
