"""The config tree: round trip, and errors that name the key."""

import dataclasses
import json
import re

import pytest

from u2moe_jax import config as config_lib

_TREE = config_lib.to_dict(config_lib.Config())


def _keys(tree, prefix=''):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _keys(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


def _changed(value):
  """Another value of the same type that every validator allows."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, list):
    return [*value[:-1], (value[-1] if value else 0) + 1]
  if isinstance(value, int):
    return value + 1 if value > 0 else 1
  if isinstance(value, float):
    return value / 2 + 0.125
  return value


@pytest.mark.parametrize(('path', 'value'), list(_keys(_TREE)))
def test_every_key_survives_a_round_trip(path, value):
  other = _changed(value)
  if path.endswith(('num_heads', 'model_dim')):
    other = 2 * value
  # Two keys have to agree with others.
  other = {
    'mesh.data': 4,
    'model.encoder.causal_conv': True,
    'model.encoder.moe.num_experts': 3,
    'model.decoder.moe.num_experts': 3,
  }.get(path, other)
  config = config_lib.replace(config_lib.Config(), path, other)
  text = json.dumps(config_lib.to_dict(config))
  again = config_lib.from_dict(config_lib.Config, json.loads(text))
  assert again == config
  if other != value:
    assert config != config_lib.Config()
  assert dict(_keys(config_lib.to_dict(again)))[path] == other


def test_missing_keys_take_defaults():
  assert config_lib.from_dict(config_lib.Config, {}) == config_lib.Config()


@pytest.mark.parametrize(
  ('tree', 'named'),
  [
    ({'modle': {}}, "'modle'.*model"),
    ({'model': {'encoder': {'blocks': 3}}}, "'model.encoder.blocks'.*num_bloc"),
    ({'train': {'steps': 3}}, "'train.steps'.*num_steps"),
  ],
)
def test_an_unknown_key_is_named_with_what_exists(tree, named):
  with pytest.raises(config_lib.ConfigError, match=named):
    config_lib.from_dict(config_lib.Config, tree)


@pytest.mark.parametrize(
  ('path', 'value'),
  [
    ('train.num_steps', 1.5),
    ('train.num_steps', True),
    ('train.num_steps', '100'),
    ('optimizer.learning_rate', 'fast'),
    ('optimizer.learning_rate', True),
    ('data.train', 3),
    ('model.encoder.macaron', 1),
    ('data.augment.speeds', 1.0),
    ('data.augment.speeds', ['slow']),
    ('model', 3),
    ('model.encoder', 'big'),
  ],
)
def test_a_wrong_type_is_named(path, value):
  with pytest.raises(config_lib.ConfigError, match=re.escape(f"'{path}'")):
    config_lib.replace(config_lib.Config(), path, value)


def test_whole_numbers_are_good_enough_for_a_rate():
  config = config_lib.replace(config_lib.Config(), 'optimizer.clip_norm', 5)
  assert isinstance(config.optimizer.clip_norm, float)


@pytest.mark.parametrize(
  ('path', 'value', 'named'),
  [
    ('model.encoder.num_heads', 3, 'encoder.num_heads=3'),
    ('data.worker_type', 'fork', 'data.worker_type'),
    ('data.num_workers', -1, 'data.num_workers'),
    ('data.num_token_buckets', 0, 'data.num_token_buckets'),
    ('data.augment.noise_probability', 1.5, 'augment.noise_probability'),
    ('data.augment.noise_snr', [20.0, 5.0], 'augment.noise_snr'),
    ('data.augment.volume_db', [1.0], 'augment.volume_db'),
    ('data.augment.reverb_seconds', [0.0, 1.0], 'augment.reverb_seconds'),
    ('data.augment.speeds', [1.0, 0.0], 'augment.speeds'),
    ('model.decoder.num_heads', 3, 'decoder.num_heads=3'),
    ('model.encoder.num_blocks', 0, 'encoder.num_blocks'),
    ('model.encoder.dropout', 1.0, 'encoder.dropout'),
    ('model.encoder.position', 'alibi', 'encoder.position.*rope_pos'),
    ('model.encoder.subsampling', 'conv2d3', 'encoder.subsampling'),
    ('model.decoder.num_blocks', 0, 'num_reverse_blocks'),
    ('model.decoder.activation', 'tanh', 'decoder.activation'),
    ('model.encoder.moe.num_experts', 1, 'moe.top_k'),
    ('model.encoder.moe.executor', 'fast', 'moe.executor'),
    ('model.encoder.moe.capacity_factor', 0.0, 'moe.capacity_factor'),
    ('model.dtype', 'int8', 'model.dtype'),
    ('data.min_seconds', 99.0, 'data.min_seconds'),
    ('data.batch_frames', 0, 'data.batch_frames'),
    ('data.token_type', 'words', 'data.token_type'),
    ('optimizer.name', 'sgd', 'optimizer.name'),
    ('optimizer.schedule', 'linear', 'optimizer.schedule'),
    ('optimizer.learning_rate', 0.0, 'optimizer.learning_rate'),
    ('optimizer.clip_norm', -1.0, 'optimizer.clip_norm'),
    ('optimizer.beta2', 1.0, 'optimizer.beta2'),
    ('train.ctc_weight', 1.5, 'train.ctc_weight'),
    ('train.label_smoothing', 1.0, 'train.label_smoothing'),
    ('mesh.fsdp', 0, 'fsdp=0'),
    ('mesh.fsdp', -1, 'at most one'),
    ('decode.mode', 'magic', 'decode.mode'),
    ('decode.chunk_size', 0, 'decode.chunk_size'),
    ('decode.left_chunks', -2, 'decode.left_chunks'),
    ('decode.nbest', 11, 'decode.nbest=11'),
    ('decode.reverse_weight', 2.0, 'decode.reverse_weight'),
  ],
)
def test_what_cannot_work_is_refused_by_name(path, value, named):
  with pytest.raises(config_lib.ConfigError, match=named):
    config_lib.replace(config_lib.Config(), path, value)


def test_an_even_kernel_needs_a_causal_convolution():
  assert config_lib.EncoderConfig(conv_kernel=8).causal_conv
  with pytest.raises(config_lib.ConfigError, match='conv_kernel=8'):
    config_lib.EncoderConfig(conv_kernel=8, causal_conv=False)


def test_rotation_needs_pairs_of_channels():
  config_lib.EncoderConfig(model_dim=24, num_heads=4, position='rope_pos')
  config_lib.EncoderConfig(model_dim=20, num_heads=4)
  with pytest.raises(config_lib.ConfigError, match='a head has 5'):
    config_lib.EncoderConfig(model_dim=20, num_heads=4, position='rope_pos')


def test_special_ids():
  with pytest.raises(config_lib.ConfigError, match='blank_id=7'):
    config_lib.ModelConfig(vocab_size=7, blank_id=7)
  last = config_lib.ModelConfig(vocab_size=7)
  assert (last.sos, last.eos) == (6, 6)
  given = dataclasses.replace(last, sos_id=2, eos_id=3)
  assert (given.sos, given.eos) == (2, 3)


def test_replacing_an_unknown_group_is_an_error():
  with pytest.raises(config_lib.ConfigError, match="'modle'"):
    config_lib.replace(config_lib.Config(), 'modle.encoder', 1)


def test_configs_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    config_lib.Config().model.vocab_size = 3
