"""The inference form: parameters as decoding reads them fastest.

  - every block has parameters of its own, not an entry of a stack; every
    expert arrays of its own, transposed (`grouped_matmul.SeparateExpert`), so
    that no slice is copied before a product
  - queries, keys and values of self-attention have one kernel
  - a batch norm is in the depthwise kernel and bias in front of it
  - in the type they are computed in, or in 8 bits

CMVN stays as it is: its scale differs by mel bin, while the first convolution
uses one kernel for all of them.

The same modules run it (`U2MoeModel(config, form='inference')`), with the same
results. Arrays are converted one by one, on the host.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import dataclasses
import functools
from typing import Literal

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.layers import convolution
from u2moe_jax.layers import linear
from u2moe_jax.models import stack
from u2moe_jax.models import u2
from u2moe_jax.ops import quantization

# What parameters are stored as.
Weights = Literal['float32', 'bfloat16', 'int8']

# From the path of an array, keys joined by slashes, to the array.
Read = Callable[[str], np.ndarray]
Leaf = tuple[str, np.ndarray]

_QUERY, _KEY, _VALUE = 'query', 'key', 'value'
_SELF_ATTENTION = ('attention', 'self_attention')
_EXPERT_LEAVES = ('w_in', 'b_in', 'w_out', 'b_out')


def model(config: config_lib.ModelConfig) -> u2.U2MoeModel:
  """The model that takes parameters of this form."""
  return u2.U2MoeModel(config, form='inference')


def model_config(
  config: config_lib.ModelConfig, weights: Weights
) -> config_lib.ModelConfig:
  """The config after conversion: floats are computed in as they are stored."""
  # 8 bits are a way to store kernels; the type of the others is the config's.
  if weights == 'int8':
    return config
  return dataclasses.replace(config, dtype=weights)


def convert_variables(
  config: config_lib.ModelConfig,
  params: PyTree,
  buffers: PyTree,
  *,
  weights: Weights = 'float32',
) -> tuple[PyTree, PyTree]:
  """Converts a model in memory.

  Args:
    config: the model.
    params: its parameters as they train.
    buffers: its buffers.
    weights: type to store them in.

  Returns:
    Parameters and buffers for `model(model_config(config, weights))`.
  """
  flat = traverse_util.flatten_dict(
    {'params': params, 'buffers': buffers}, sep='/'
  )
  leaves = convert(config, lambda p: np.asarray(flat[p]), weights=weights)
  tree = nest((path, jnp.asarray(array)) for path, array in leaves)
  return tree['params'], tree['buffers']


def nest(leaves: Iterable[Leaf]) -> PyTree:
  """A tree of (path, array) pairs."""
  return traverse_util.unflatten_dict(dict(leaves), sep='/')


def convert(
  config: config_lib.ModelConfig, read: Read, *, weights: Weights = 'float32'
) -> Iterator[Leaf]:
  """Yields every array of the inference form, below `params` and `buffers`.

  Each array of the form that trains is asked for once (those of batch norms
  more often), and forgotten before the next one.

  Args:
    config: the model.
    read: gives an array of the form that trains.
    weights: type to store them in.
  """
  for path, array in _converted(config, read):
    yield from _stored(path, array, weights)


def _converted(config: config_lib.ModelConfig, read: Read) -> Iterator[Leaf]:
  """The arrays in their new places, in the types they have."""
  stacks = {
    f'params/{name}': kinds for name, kinds in _stacks(config).items() if kinds
  }
  for path in _source_paths(config):
    prefix = next((p for p in stacks if path.startswith(f'{p}/')), None)
    if prefix is not None:
      yield from _unstacked(path, prefix, stacks[prefix], config, read)
    # Batch-norm statistics go into the depthwise convolutions.
    elif not path.startswith('buffers/conv_norm/'):
      yield path, read(path)


def _stacks(config: config_lib.ModelConfig) -> dict[str, stack.Kinds]:
  decoder = config.decoder
  return {
    'encoder/blocks': config.encoder.expert_ffns,
    'forward_decoder/layers': decoder.expert_ffns(decoder.num_blocks),
    'backward_decoder/layers': decoder.expert_ffns(decoder.num_reverse_blocks),
  }


def _source_paths(config: config_lib.ModelConfig) -> list[str]:
  """Paths of the form that trains."""
  # Abstract: of a model of any size nothing is made but names.
  trained = u2.U2MoeModel(config)
  params = jax.eval_shape(
    lambda key: nn.meta.unbox(u2.init_params(trained, key)), jax.random.key(0)
  )
  buffers = jax.eval_shape(lambda: u2.init_buffers(config))
  tree = {'params': params, 'buffers': buffers}
  return list(traverse_util.flatten_dict(tree, sep='/'))


def _unstacked(
  path: str,
  prefix: str,
  kinds: stack.Kinds,
  config: config_lib.ModelConfig,
  read: Read,
) -> Iterator[Leaf]:
  """What becomes of one array of a stack, block by block."""
  # Where blocks are unlike, the first key is their group; else there is none.
  places = [stack.place(kinds, block) for block in range(len(kinds))]
  name = path.removeprefix(f'{prefix}/')
  group = name.split('/')[0] if places[0][0] else ''
  name = name.removeprefix(f'{group}/') if group else name
  for target, arrays in _of_block(path, name, config, read):
    for block, (own_group, entry) in enumerate(places):
      if own_group == group:
        yield f'{prefix}_{block}/{target}', arrays(block, entry)


def _of_block(
  path: str, name: str, config: config_lib.ModelConfig, read: Read
) -> Iterator[tuple[str, Callable[[int, int], np.ndarray]]]:
  """New names in a block; from (block, entry in the stack) to the array."""
  *modules, leaf = name.split('/')
  if len(modules) == 2 and modules[0] in _SELF_ATTENTION:
    attention, projection = modules
    if projection in (_KEY, _VALUE):
      return  # with the queries
    if projection == _QUERY:
      # Made once, and asked for by every block.
      fused = _fused(path, read)
      yield f'{attention}/query_key_value/{leaf}', lambda _, e: fused[e]
      return
  if modules[-1].startswith('ffn') and leaf in _EXPERT_LEAVES:
    experts = read(path)  # [L, E, ...]
    for index in range(experts.shape[1]):
      yield (
        f'{modules[-1]}/expert_{index}/{leaf}',
        functools.partial(_expert, experts, index),
      )
    return
  is_batch_norm = config.encoder.conv_norm == 'batch_norm'
  if modules[0] == 'convolution' and is_batch_norm:
    if leaf in ('norm_scale', 'norm_bias'):
      return  # in the depthwise convolution
    if leaf.startswith('depthwise'):
      yield name, _folded(path, leaf, read)
      return
  array = read(path)
  yield name, lambda _, e: array[e]


def _expert(experts: np.ndarray, index: int, _: int, entry: int) -> np.ndarray:
  # As `grouped_matmul.SeparateExpert` has its matrices; a vector stays.
  return experts[entry, index].T


def _fused(path: str, read: Read) -> np.ndarray:
  """Queries, keys and values side by side, in front of heads and width."""
  head, _, leaf = path.rpartition(f'/{_QUERY}/')
  # Kernels: three of [L, D, H, K] to [L, D, 3, H, K]; biases: [L, 3, H, K].
  parts = [read(f'{head}/{name}/{leaf}') for name in (_QUERY, _KEY, _VALUE)]
  return np.stack(parts, axis=parts[0].ndim - 2)


def _folded(
  path: str, leaf: str, read: Read
) -> Callable[[int, int], np.ndarray]:
  """The depthwise kernel or bias with the batch norm behind it in it.

  ((w * x + b) - mean) * s + c  =  (s w) * x + (b - mean) s + c,
  s = scale / sqrt(variance + epsilon).
  """
  module = path.removesuffix(leaf)
  array, scale = read(path), read(f'{module}norm_scale')
  bias = read(f'{module}norm_bias')
  mean = read('buffers/conv_norm/mean')
  variance = read('buffers/conv_norm/variance')

  def fold(block: int, entry: int) -> np.ndarray:
    # The statistics are stacked over all blocks, whatever their groups.
    deviation = np.sqrt(variance[block] + convolution.EPSILON)
    factor = scale[entry] / deviation
    if leaf == 'depthwise_kernel':
      return array[entry] * factor
    return (array[entry] - mean[block]) * factor + bias[entry]

  return fold


def _stored(path: str, array: np.ndarray, weights: Weights) -> Iterator[Leaf]:
  """The array in the type it is stored in, with a scale if that needs one."""
  parts = path.split('/')
  # Norms and routers compute in float32 whatever the others do.
  is_wide = any(p.startswith('norm') or p == 'router' for p in parts)
  if is_wide or parts[0] == 'buffers':
    yield path, np.asarray(array, np.float32)
  elif weights == 'bfloat16':
    yield path, np.asarray(array, jnp.dtype('bfloat16'))
  elif weights == 'int8' and _is_matrix(parts):
    quantized = quantization.quantize(array, inputs=_inputs(parts, array.ndim))
    *modules, leaf = parts
    yield path, quantized.values
    yield '/'.join([*modules, linear.scale_name(leaf)]), quantized.scale
  else:
    yield path, np.asarray(array, np.float32)


def _is_matrix(parts: list[str]) -> bool:
  """Whether a product with this array may be one of 8 bits."""
  # Convolutions (`kernel_0`, `depthwise_kernel`) and embeddings have other
  # names: what computes with them takes floats only.
  is_expert = parts[-2].startswith('expert_') and parts[-1].startswith('w_')
  return parts[-1] == 'kernel' or is_expert


def _inputs(parts: list[str], num_axes: int) -> tuple[int, ...]:
  """The axes of a matrix that a product sums over."""
  if parts[-1] != 'kernel':
    return (1,)  # transposed
  # At its end, attention sums over heads and their width.
  return (0, 1) if parts[-2] == 'output' and num_axes == 3 else (0,)
