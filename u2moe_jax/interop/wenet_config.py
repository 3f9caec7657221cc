"""WeNet's yaml and our config, both ways.

The tables of `wenet_keys` read and write. A key that stands in none of them
is an error, for nobody can say that it is harmless.
"""

from collections.abc import Collection
from collections.abc import Mapping
import copy
from typing import Any

from u2moe_jax import config as config_lib
from u2moe_jax.interop import wenet_keys

Yaml = Mapping[str, Any]


class WenetError(ValueError):
  """A checkpoint or yaml that cannot be taken over; names the entry."""


def model_config(
  yaml: Yaml,
  *,
  sos: int = -1,
  eos: int = -1,
  reference_quirks: bool = False,
  names: Collection[str] | None = None,
) -> config_lib.ModelConfig:
  """Translates the training yaml.

  Args:
    yaml: the yaml as nested mappings.
    sos: start-of-sentence id; -1 takes the yaml's `special_tokens`, and
      without them the last token, as the reference does.
    eos: end-of-sentence id, likewise.
    reference_quirks: reproduce what the reference gets wrong: padding that
      reaches valid frames through a non-causal convolution, and padding in
      batch-norm training statistics.
    names: of the checkpoint's entries, if known: without any of a decoder
      the model is CTC-only, whatever the yaml says.

  Returns:
    The model.

  Raises:
    WenetError: for a missing or unknown key, a value of the wrong type, or
      an architecture we do not have; names the key.
  """
  _check_kinds(yaml)
  for group in ('encoder_conf', 'decoder_conf', 'model_conf', 'ctc_conf'):
    _check_group(yaml, group)
  _check_attention(_group(yaml, 'encoder_conf'))
  has_decoder = _kind(yaml, 'decoder') is not None
  if names is not None:
    has_decoder &= any(name.startswith('decoder.') for name in names)
  try:
    return config_lib.ModelConfig(
      vocab_size=_size(yaml, 'output_dim', 'vocab_size'),
      feature_dim=_feature_dim(yaml),
      blank_id=_values(yaml, 'ctc_conf')['blank_id'],
      sos_id=_special_id(yaml, '<sos>', sos),
      eos_id=_special_id(yaml, '<eos>', eos),
      encoder=_encoder_config(yaml, reference_quirks=reference_quirks),
      decoder=_decoder_config(yaml, has_decoder=has_decoder),
    )
  except config_lib.ConfigError as error:
    raise WenetError(f'this yaml makes no model: {error}') from error


def feature_config(
  yaml: Yaml, model: config_lib.ModelConfig
) -> config_lib.FeatureConfig:
  """The filterbank that `dataset_conf` describes.

  Raises:
    WenetError: for other features than ours; names the key.
  """
  dataset = _group(yaml, 'dataset_conf')
  if dataset.get('feats_type', 'fbank') != 'fbank':
    raise WenetError(
      f'dataset_conf.feats_type is {dataset["feats_type"]!r}; we have fbank'
    )
  for key in ('mfcc_conf', 'log_mel_spectrogram_conf'):
    if key in dataset and 'fbank_conf' not in dataset:
      raise WenetError(f'dataset_conf.{key}: these features we have not')
  for group in ('dataset_conf.fbank_conf', 'dataset_conf.resample_conf'):
    _check_group(yaml, group)
  values: dict[str, Any] = {
    'low_freq': wenet_keys.LOW_FREQ,
    'mel_floor': wenet_keys.MEL_FLOOR,
  }
  if 'fbank_conf' in dataset:
    values |= _values(yaml, 'dataset_conf.fbank_conf')
  values |= _values(yaml, 'dataset_conf.resample_conf')
  bins = _group(yaml, 'dataset_conf.fbank_conf').get('num_mel_bins')
  if bins not in (None, model.feature_dim):
    raise WenetError(
      f'dataset_conf.fbank_conf.num_mel_bins is {bins}, input_dim is '
      f'{model.feature_dim}'
    )
  # Without the key the reference's default would be 23 bins; what the model
  # takes is known.
  return config_lib.FeatureConfig(
    **values | {'num_mel_bins': model.feature_dim}
  )


def to_yaml(
  model: config_lib.ModelConfig,
  features: config_lib.FeatureConfig,
  *,
  base: Yaml | None = None,
  decoder: str | None = None,
) -> dict[str, Any]:
  """The yaml of a model, for the reference.

  Args:
    model: the model.
    features: its filterbank.
    base: a yaml whose other keys are kept, such as the one it came with.
    decoder: kind of decoder; by default the one that the model has.

  Returns:
    Plain nested dicts; `model_config` of it is the same model.

  Raises:
    WenetError: for a model that the reference has not; names our key.
  """
  for name in ('encoder', 'decoder'):
    moe = getattr(model, name).moe
    if moe.num_experts and moe.router_type != 'topk_softmax':
      raise WenetError(
        f'model.{name}.moe.router_type={moe.router_type}: WeNet has '
        'topk_softmax only'
      )
    if moe.num_experts and moe.where != 'all':
      raise WenetError(
        f'model.{name}.moe.where={moe.where}: WeNet has experts in all '
        'feed-forward layers, or in none'
      )
  channels = model.encoder.subsampling_channels
  if channels not in (0, model.encoder.model_dim):
    raise WenetError(
      f'model.encoder.subsampling_channels={channels}: WeNet has as many as '
      f'the width, {model.encoder.model_dim}'
    )
  if decoder is None and model.decoder.num_blocks:
    two = model.decoder.num_reverse_blocks > 0
    decoder = 'bitransformer' if two else 'transformer'
  result: dict[str, Any] = copy.deepcopy(dict(base or {}))
  result |= {
    'encoder': 'conformer',
    'decoder': decoder,
    'ctc': 'ctc',
    'input_dim': model.feature_dim,
    'output_dim': model.vocab_size,
  }
  # (Either name of the model is fine, so one that is there stays.)
  result.setdefault('model', 'asr_model')
  _write(result, 'encoder_conf', model.encoder, model.encoder.moe)
  _write(result, 'ctc_conf', model)
  if decoder is not None:
    _write(result, 'decoder_conf', model.decoder, model.decoder.moe)
    if decoder == 'transformer':  # whose class does not take the key
      result['decoder_conf'].pop('r_num_blocks')
  result['encoder_conf']['selfattention_layer_type'] = (
    wenet_keys.SELF_ATTENTION[model.encoder.position]
  )
  # The loss weights it came with stay: a model directory has none.
  result.setdefault('model_conf', _loss_weights(model))
  special = _enter(_enter(result, 'tokenizer_conf'), 'special_tokens')
  special |= {'<blank>': model.blank_id, '<sos>': model.sos, '<eos>': model.eos}
  _enter(result, 'dataset_conf')
  _write(result, 'dataset_conf.fbank_conf', features)
  _write(result, 'dataset_conf.resample_conf', features)
  return result


def _loss_weights(model: config_lib.ModelConfig) -> dict[str, Any]:
  """A model_conf for models that never had one."""
  train = config_lib.TrainConfig()
  weights = {
    key: getattr(train, spec.ours) for key, spec in wenet_keys.MODEL.items()
  }
  if not model.decoder.num_blocks:
    weights['ctc_weight'] = 1.0
  if not model.decoder.num_reverse_blocks:
    weights['reverse_weight'] = 0.0
  return weights


def _enter(tree: dict[str, Any], key: str) -> dict[str, Any]:
  """The group of a tree, made if there is none."""
  tree[key] = dict(tree.get(key) or {})
  return tree[key]


def _write(
  result: dict[str, Any],
  group: str,
  config: Any,
  moe: config_lib.MoeConfig | None = None,
) -> None:
  """Writes a group's keys from our config, over what is there."""
  conf = result
  for name in group.split('.'):
    conf = _enter(conf, name)
  for key, spec in wenet_keys.GROUPS[group].items():
    value = getattr(config, spec.ours)
    # 25 and not 25.0, as recipes have it.
    whole = isinstance(value, float) and value == int(value)
    conf[key] = int(value) if whole else value
  if moe is not None and moe.num_experts:
    conf['mlp_type'] = 'moe'
    conf |= {
      key: getattr(moe, spec.ours) for key, spec in wenet_keys.MOE.items()
    }


def _group(yaml: Yaml, group: str) -> Yaml:
  """A group by its dotted name; empty where it is missing."""
  node: Any = yaml
  for name in group.split('.'):
    node = node.get(name)
    if node is None:
      return {}
    if not isinstance(node, Mapping):
      raise WenetError(f'{group} is {node!r}, not a group of keys')
  return node


def _kind(yaml: Yaml, key: str) -> Any:
  return yaml.get(key, wenet_keys.KINDS[key][0])


def _check_kinds(yaml: Yaml) -> None:
  for key, allowed in wenet_keys.KINDS.items():
    if _kind(yaml, key) not in allowed:
      raise WenetError(
        f'{key} is {yaml[key]!r}; we have {_listed(allowed)} only'
      )
  for key in wenet_keys.OTHER_MODELS:
    if yaml.get(key):
      raise WenetError(f'{key}: this is another model than asr_model')
  if 'encoder_conf' not in yaml:
    raise WenetError('the yaml has no encoder_conf')


def _check_group(yaml: Yaml, group: str) -> None:
  """Refuses keys that nobody knows, and values we have not."""
  known, fixed, ignored = (
    wenet_keys.GROUPS[group],
    wenet_keys.FIXED[group],
    wenet_keys.IGNORED[group],
  )
  for key, value in _group(yaml, group).items():
    if key in fixed:
      allowed = fixed[key]
      # An optional key that is spelt out as the default in other words.
      if value not in allowed and not _is_default_heads(yaml, group, key):
        raise WenetError(
          f'{group}.{key} is {value!r}; we have {_listed(allowed)} only'
        )
    elif key not in known and key not in ignored:
      there = sorted({*known, *fixed, *ignored})
      raise WenetError(
        f'{group}.{key} is not known, and may change what is computed; known '
        f'are {_listed(there)}'
      )


def _is_default_heads(yaml: Yaml, group: str, key: str) -> bool:
  """Says whether head_dim or n_kv_head ask for what is the default anyway."""
  heads = _group(yaml, group).get('attention_heads', 4)
  value = _group(yaml, group)[key]
  if key == 'n_kv_head':
    return value == heads
  width = _group(yaml, 'encoder_conf').get('output_size', 256)
  return key == 'head_dim' and value * heads == width


def _check_attention(conf: Yaml) -> None:
  position = conf.get('pos_enc_layer_type', 'rel_pos')
  attention = conf.get('selfattention_layer_type', 'rel_selfattn')
  if wenet_keys.SELF_ATTENTION.get(position, attention) != attention:
    raise WenetError(
      f'encoder_conf.selfattention_layer_type is {attention!r}; with '
      f'pos_enc_layer_type {position!r} we have '
      f'{wenet_keys.SELF_ATTENTION[position]!r} only'
    )


def _values(
  yaml: Yaml, group: str, keys: Mapping[str, wenet_keys.Key] | None = None
) -> dict[str, Any]:
  """Our names and values of a group's keys."""
  conf = _group(yaml, group)
  return {
    spec.ours: _value(f'{group}.{key}', conf.get(key, spec.default), spec)
    for key, spec in (keys or wenet_keys.GROUPS[group]).items()
  }


def _value(where: str, value: Any, spec: wenet_keys.Key) -> Any:
  """Checks the type; numbers with an exponent may come as text (YAML 1.1)."""
  kind = type(spec.default)
  if kind is float and not isinstance(value, bool):
    try:
      return float(value)
    except (TypeError, ValueError):
      pass
  # Not isinstance: True is an int, and `num_blocks: true` is a mistake.
  if type(value) is not kind:
    raise WenetError(f'{where} is {value!r}, not {kind.__name__}')
  if spec.choices and value not in spec.choices:
    raise WenetError(f'{where} is {value!r}; we have {_listed(spec.choices)}')
  return value


def _encoder_config(
  yaml: Yaml, *, reference_quirks: bool
) -> config_lib.EncoderConfig:
  # A quirk only where the layer that has it is there.
  values = _values(yaml, 'encoder_conf')
  return config_lib.EncoderConfig(
    **values,
    moe=_moe_config(yaml, 'encoder_conf'),
    conv_padding_leak=reference_quirks and not values['causal_conv'],
    batch_norm_padding=(
      reference_quirks and values['conv_norm'] == 'batch_norm'
    ),
  )


def _decoder_config(
  yaml: Yaml, *, has_decoder: bool
) -> config_lib.DecoderConfig:
  if has_decoder and 'decoder_conf' not in yaml:
    raise WenetError('the yaml has no decoder_conf')
  values = _values(yaml, 'decoder_conf')
  if 'decoder_conf' not in yaml:
    values['num_heads'] = 1  # of a decoder that is not there; divides any D
  if not has_decoder:
    values['num_blocks'] = 0
  if not has_decoder or _kind(yaml, 'decoder') == 'transformer':
    values['num_reverse_blocks'] = 0
  elif not values['num_reverse_blocks']:
    _check_unused_right_decoder(yaml)
  return config_lib.DecoderConfig(
    **values, moe=_moe_config(yaml, 'decoder_conf')
  )


def _check_unused_right_decoder(yaml: Yaml) -> None:
  """A right-to-left decoder without layers may only be there unused."""
  if _values(yaml, 'model_conf')['reverse_weight']:
    raise WenetError(
      'decoder_conf.r_num_blocks is 0 and model_conf.reverse_weight is not: '
      'a right-to-left decoder without layers we have not'
    )


def _moe_config(yaml: Yaml, group: str) -> config_lib.MoeConfig:
  if _group(yaml, group).get('mlp_type') != 'moe':
    return config_lib.MoeConfig()
  return config_lib.MoeConfig(**_values(yaml, group, wenet_keys.MOE))


def _size(yaml: Yaml, *keys: str) -> int:
  """The first of some keys that is there."""
  for key in keys:
    if yaml.get(key) is not None:
      return _value(key, yaml[key], wenet_keys.Key('', 0))
  raise WenetError(f'the yaml has no {keys[0]}')


def _feature_dim(yaml: Yaml) -> int:
  bins = _group(yaml, 'dataset_conf.fbank_conf').get('num_mel_bins')
  return _size({'num_mel_bins': bins, **yaml}, 'input_dim', 'num_mel_bins')


def _special_id(yaml: Yaml, name: str, given: int) -> int:
  special = _group(yaml, 'tokenizer_conf.special_tokens')
  if given >= 0 or name not in special:
    return given
  where = f'tokenizer_conf.special_tokens.{name}'
  return _value(where, special[name], wenet_keys.Key('', 0))


def _listed(values: Collection[Any]) -> str:
  return ', '.join(map(str, values))
