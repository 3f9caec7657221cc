"""WeNet's yaml keys and state-dict names in our terms.

Every entry of the state dict has exactly one place in our tree; what is
missing, left over or of the wrong shape is an error, never a partial load.
"""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
import numpy as np

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.models import u2

StateDict = Mapping[str, np.ndarray]

# Buffers of the reference that follow from a formula or are not used.
_IGNORED_SUFFIXES = ('.pe', 'num_batches_tracked')


class WenetError(ValueError):
  """A checkpoint or yaml that cannot be taken over; names the entry."""


def model_config(
  yaml: Mapping[str, Any], *, sos: int = -1, eos: int = -1
) -> config_lib.ModelConfig:
  """Translates the reference's yaml keys.

  Args:
    yaml: the training yaml as nested mappings.
    sos: start-of-sentence id; -1 means V-1.
    eos: end-of-sentence id; -1 means V-1.

  Raises:
    WenetError: for an architecture we do not have.
  """
  if yaml.get('encoder', 'conformer') != 'conformer':
    raise WenetError(f'encoder {yaml["encoder"]!r} is not supported')
  kind = yaml.get('decoder', 'bitransformer')
  if kind not in ('transformer', 'bitransformer'):
    raise WenetError(f'decoder {kind!r} is not supported')
  encoder, decoder = yaml['encoder_conf'], yaml.get('decoder_conf', {})
  _require_known_architecture('encoder_conf', encoder)
  _require_known_architecture('decoder_conf', decoder)
  bidirectional = kind == 'bitransformer'
  return config_lib.ModelConfig(
    vocab_size=yaml['output_dim'],
    feature_dim=yaml.get('input_dim', 80),
    blank_id=yaml.get('ctc_conf', {}).get('ctc_blank_id', 0),
    sos_id=sos,
    eos_id=eos,
    encoder=_encoder_config(encoder),
    decoder=config_lib.DecoderConfig(
      num_blocks=decoder.get('num_blocks', 6),
      num_reverse_blocks=decoder.get('r_num_blocks', 0) * bidirectional,
      num_heads=decoder.get('attention_heads', 4),
      ffn_dim=decoder.get('linear_units', 2048),
      activation=decoder.get('activation_type', 'relu'),
      dropout=decoder.get('dropout_rate', 0.1),
      positional_dropout=decoder.get('positional_dropout_rate', 0.1),
      self_attention_dropout=decoder.get('self_attention_dropout_rate', 0.0),
      cross_attention_dropout=decoder.get('src_attention_dropout_rate', 0.0),
      moe=_moe_config(decoder),
    ),
  )


# What our blocks always have; anything else would load and compute nonsense.
_REQUIRED_CHOICES = {
  'normalize_before': True,
  'use_cnn_module': True,
  'final_norm': True,
  'use_output_layer': True,
  'tie_word_embedding': False,
  'query_bias': True,
  'key_bias': True,
  'value_bias': True,
  'mlp_bias': True,
  'conv_bias': True,
  'layer_norm_type': 'layer_norm',
}


def _require_known_architecture(group: str, conf: Mapping[str, Any]) -> None:
  for key, value in _REQUIRED_CHOICES.items():
    if conf.get(key, value) != value:
      raise WenetError(
        f'{group}.{key}={conf[key]!r} is not supported; only {value!r} is'
      )


def _encoder_config(conf: Mapping[str, Any]) -> config_lib.EncoderConfig:
  return config_lib.EncoderConfig(
    num_blocks=conf.get('num_blocks', 6),
    model_dim=conf.get('output_size', 256),
    num_heads=conf.get('attention_heads', 4),
    ffn_dim=conf.get('linear_units', 2048),
    subsampling=conf.get('input_layer', 'conv2d'),
    position=conf.get('pos_enc_layer_type', 'rel_pos'),
    conv_kernel=conf.get('cnn_module_kernel', 15),
    causal_conv=conf.get('causal', False),
    conv_norm=conf.get('cnn_module_norm', 'batch_norm'),
    conv_padding_leak=not conf.get('causal', False),
    batch_norm_padding=True,
    activation=conf.get('activation_type', 'swish'),
    macaron=conf.get('macaron_style', True),
    use_dynamic_chunk=conf.get('use_dynamic_chunk', False),
    use_dynamic_left_chunk=conf.get('use_dynamic_left_chunk', False),
    static_chunk_size=conf.get('static_chunk_size', 0),
    dropout=conf.get('dropout_rate', 0.1),
    positional_dropout=conf.get('positional_dropout_rate', 0.1),
    attention_dropout=conf.get('attention_dropout_rate', 0.0),
    moe=_moe_config(conf),
  )


def _moe_config(conf: Mapping[str, Any]) -> config_lib.MoeConfig:
  kind = conf.get('mlp_type', 'position_wise_feed_forward')
  if kind == 'position_wise_feed_forward':
    return config_lib.MoeConfig()
  if kind != 'moe':
    raise WenetError(f'mlp_type {kind!r} is not supported')
  return config_lib.MoeConfig(
    num_experts=conf.get('n_expert', 8), top_k=conf.get('n_expert_activated', 2)
  )


def model_variables(
  state: StateDict, config: config_lib.ModelConfig
) -> tuple[PyTree, PyTree]:
  """Maps a state dict to (parameters, buffers), NumPy arrays.

  Raises:
    WenetError: for a missing or left-over entry, or a wrong shape.
  """
  reader = _Reader(state)
  params: dict[str, Any] = {'encoder': _encoder(reader, config.encoder)}
  params['ctc'] = reader.linear('ctc.ctc_lo')
  left = 'decoder.left_decoder'
  if not any(name.startswith(left) for name in state):
    left = 'decoder'
  decoders = {
    'forward_decoder': (left, config.decoder.num_blocks),
    'backward_decoder': (
      'decoder.right_decoder',
      config.decoder.num_reverse_blocks,
    ),
  }
  for name, (prefix, num_blocks) in decoders.items():
    if num_blocks and any(key.startswith(prefix) for key in state):
      params[name] = _decoder(reader, prefix, num_blocks, config)
  buffers = _buffers(reader, config)
  reader.require_all_used()
  _require_shapes(params, config)
  return params, buffers


class _Reader:
  """Reads entries by name, in our layout, and knows what was not read."""

  def __init__(self, state: StateDict):
    self._state = state
    self._used: set[str] = set()

  def raw(self, name: str) -> np.ndarray:
    if name not in self._state:
      raise WenetError(f'the checkpoint has no entry {name!r}')
    self._used.add(name)
    return np.asarray(self._state[name])

  def has(self, name: str) -> bool:
    return name in self._state

  def linear(self, name: str, *, bias: bool = True) -> dict[str, np.ndarray]:
    result = {'kernel': self.raw(f'{name}.weight').T}
    if bias:
      result['bias'] = self.raw(f'{name}.bias')
    return result

  def pointwise(self, name: str) -> dict[str, np.ndarray]:
    kernel = self.raw(f'{name}.weight')[..., 0].T
    return {'kernel': kernel, 'bias': self.raw(f'{name}.bias')}

  def norm(self, name: str) -> dict[str, np.ndarray]:
    return {
      'scale': self.raw(f'{name}.weight'),
      'bias': self.raw(f'{name}.bias'),
    }

  def require_all_used(self) -> None:
    left = sorted(
      name
      for name in set(self._state) - self._used
      if not name.endswith(_IGNORED_SUFFIXES)
    )
    if left:
      raise WenetError(
        f'the checkpoint has {len(left)} entries this model has no place '
        f'for, the first is {left[0]!r}'
      )


def _stack(blocks: list[PyTree]) -> PyTree:
  return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)


def _encoder(
  reader: _Reader, config: config_lib.EncoderConfig
) -> dict[str, Any]:
  blocks = [
    _block(reader, f'encoder.encoders.{i}', config)
    for i in range(config.num_blocks)
  ]
  return {
    'subsampling': _subsampling(reader, config),
    'blocks': _stack(blocks),
    'norm': reader.norm('encoder.after_norm'),
  }


def _subsampling(reader, config):
  stages = 3 if config.subsampling == 'conv2d8' else 2
  output = 'out.0' if config.subsampling == 'conv2d' else 'linear'
  result = {'output': reader.linear(f'encoder.embed.{output}')}
  for i in range(stages):
    name = f'encoder.embed.conv.{2 * i}'
    kernel = reader.raw(f'{name}.weight')  # (out, in, time, mel)
    result[f'kernel_{i}'] = kernel.transpose(2, 3, 1, 0)
    result[f'bias_{i}'] = reader.raw(f'{name}.bias')
  return result


def _block(reader, name, config):
  moe = config.moe.num_experts
  conv = f'{name}.conv_module'
  depthwise = reader.raw(f'{conv}.depthwise_conv.weight')  # (D, 1, W)
  convolution = {
    'pointwise_in': reader.pointwise(f'{conv}.pointwise_conv1'),
    'pointwise_out': reader.pointwise(f'{conv}.pointwise_conv2'),
    'depthwise_kernel': depthwise[:, 0].T,
    'depthwise_bias': reader.raw(f'{conv}.depthwise_conv.bias'),
  }
  if config.conv_norm == 'batch_norm':
    convolution['norm_scale'] = reader.raw(f'{conv}.norm.weight')
    convolution['norm_bias'] = reader.raw(f'{conv}.norm.bias')
  elif config.conv_norm == 'layer_norm':
    convolution['norm'] = reader.norm(f'{conv}.norm')
  else:
    convolution['norm'] = {'scale': reader.raw(f'{conv}.norm.weight')}
  attention = _attention(
    reader,
    f'{name}.self_attn',
    config.num_heads,
    key_position=config.position == 'rel_pos',
  )
  result = {
    'attention': attention,
    'convolution': convolution,
    'ffn_final': _feed_forward(reader, f'{name}.feed_forward', moe),
    'norm_attention': reader.norm(f'{name}.norm_mha'),
    'norm_convolution': reader.norm(f'{name}.norm_conv'),
    'norm_ffn_final': reader.norm(f'{name}.norm_ff'),
    'norm_output': reader.norm(f'{name}.norm_final'),
  }
  if config.macaron:
    result['ffn_macaron'] = _feed_forward(
      reader, f'{name}.feed_forward_macaron', moe
    )
    result['norm_ffn_macaron'] = reader.norm(f'{name}.norm_ff_macaron')
  return result


def _attention(reader, name, num_heads, *, key_position=False):
  def project(key, bias=True):  # (D, D) to (D, H, K)
    split = reader.linear(f'{name}.linear_{key}', bias=bias)
    width = split['kernel'].shape[0]
    return {
      part: array.reshape(*([width] if part == 'kernel' else []), num_heads, -1)
      for part, array in split.items()
    }

  output = reader.linear(f'{name}.linear_out')
  width = output['kernel'].shape[-1]
  output['kernel'] = output['kernel'].reshape(num_heads, -1, width)
  result = {
    'query': project('q'),
    'key': project('k'),
    'value': project('v'),
    'output': output,
  }
  if key_position:
    result['position'] = project('pos', bias=False)
    result['content_bias'] = reader.raw(f'{name}.pos_bias_u')
    result['position_bias'] = reader.raw(f'{name}.pos_bias_v')
  return result


def _feed_forward(reader, name, num_experts):
  if not num_experts:
    return {
      'w_in': reader.linear(f'{name}.w_1'),
      'w_out': reader.linear(f'{name}.w_2'),
    }
  experts = [f'{name}.experts.{e}' for e in range(num_experts)]

  def stacked(part: str, form: Callable[[np.ndarray], np.ndarray] = np.asarray):
    return np.stack([form(reader.raw(f'{e}.{part}')) for e in experts])

  return {
    'router': {'kernel': reader.raw(f'{name}.gate.weight').T},
    'w_in': stacked('w_1.weight', np.transpose),
    'b_in': stacked('w_1.bias'),
    'w_out': stacked('w_2.weight', np.transpose),
    'b_out': stacked('w_2.bias'),
  }


def _decoder(reader, prefix, num_blocks, config):
  decoder = config.decoder

  def layer(name):
    return {
      'self_attention': _attention(
        reader, f'{name}.self_attn', decoder.num_heads
      ),
      'cross_attention': _attention(
        reader, f'{name}.src_attn', decoder.num_heads
      ),
      'ffn': _feed_forward(
        reader, f'{name}.feed_forward', decoder.moe.num_experts
      ),
      'norm_self_attention': reader.norm(f'{name}.norm1'),
      'norm_cross_attention': reader.norm(f'{name}.norm2'),
      'norm_ffn': reader.norm(f'{name}.norm3'),
    }

  layers = [layer(f'{prefix}.decoders.{i}') for i in range(num_blocks)]
  return {
    'embedding': {'embedding': reader.raw(f'{prefix}.embed.0.weight')},
    'layers': _stack(layers),
    'norm': reader.norm(f'{prefix}.after_norm'),
    'output': reader.linear(f'{prefix}.output_layer'),
  }


def _buffers(reader, config):
  buffers = jax.tree.map(np.asarray, u2.init_buffers(config))
  if reader.has('encoder.global_cmvn.mean'):
    buffers['cmvn'] = {
      'mean': reader.raw('encoder.global_cmvn.mean'),
      'istd': reader.raw('encoder.global_cmvn.istd'),
    }
  if config.encoder.conv_norm == 'batch_norm':
    names = [
      f'encoder.encoders.{i}.conv_module.norm'
      for i in range(config.encoder.num_blocks)
    ]
    buffers['conv_norm'] = {
      'mean': np.stack([reader.raw(f'{n}.running_mean') for n in names]),
      'variance': np.stack([reader.raw(f'{n}.running_var') for n in names]),
    }
  return buffers


def _require_shapes(params: PyTree, config: config_lib.ModelConfig) -> None:
  model = u2.U2MoeModel(config)
  expected = nn.meta.unbox(
    jax.eval_shape(lambda key: u2.init_params(model, key), jax.random.key(0))
  )
  ours = dict(jax.tree_util.tree_leaves_with_path(expected))
  theirs = dict(jax.tree_util.tree_leaves_with_path(params))
  for path in sorted(set(ours) | set(theirs), key=str):
    name = jax.tree_util.keystr(path)
    if path not in theirs:
      raise WenetError(f'the checkpoint has nothing for parameter {name}')
    if path not in ours:
      raise WenetError(f'the config has no place for parameter {name}')
    if ours[path].shape != theirs[path].shape:
      raise WenetError(
        f'parameter {name} is {theirs[path].shape} in the checkpoint, the '
        f'config asks for {ours[path].shape}'
      )
