"""WeNet's state dict and our trees, both ways, from one table.

`entries` lists every entry of the reference with its one place in our tree.
Reading and writing follow the same list, so they cannot diverge; what is
missing, left over or of another shape is an error, never a partial load.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import numpy as np

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Key
from u2moe_jax.array_types import PyTree
from u2moe_jax.interop import wenet_config
from u2moe_jax.models import u2

WenetError = wenet_config.WenetError
StateDict = Mapping[str, np.ndarray]
Place = tuple[str, ...]

# What follows from a formula (position tables) or is never read (a counter).
_UNUSED_SUFFIXES = ('.pe', '.num_batches_tracked')
_CMVN = 'encoder.global_cmvn.'
_LEFT, _RIGHT = 'decoder.left_decoder', 'decoder.right_decoder'


@dataclasses.dataclass(frozen=True)
class Form:
  """How an array is laid out there and here.

  Attributes:
    to_ours: (their array, our shape) to ours.
    to_theirs: our array to theirs.
  """

  to_ours: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


_SAME = Form(lambda a, shape: a, lambda a: a)
_FLAT = Form(lambda a, shape: a.reshape(shape), lambda a: a.reshape(-1))
# PyTorch has (out, in) where Flax has (in, out).
_LINEAR = Form(lambda a, shape: a.T, lambda a: a.T)
_TO_HEADS = Form(  # (HK, D) and (D, H, K)
  lambda a, shape: a.T.reshape(shape), lambda a: a.reshape(len(a), -1).T
)
_FROM_HEADS = Form(  # (D, HK) and (H, K, D)
  lambda a, shape: a.T.reshape(shape), lambda a: a.reshape(-1, a.shape[-1]).T
)
_POINTWISE = Form(  # (out, in, 1) and (in, out)
  lambda a, shape: a[..., 0].T, lambda a: a.T[..., None]
)
_DEPTHWISE = Form(  # (D, 1, W) and (W, D)
  lambda a, shape: a[:, 0].T, lambda a: a.T[:, None]
)
_CONV2D = Form(  # (out, in, time, mel) and (time, mel, in, out)
  lambda a, shape: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)
)


@dataclasses.dataclass(frozen=True)
class Entry:
  """One entry of the reference and its place.

  Attributes:
    name: in the state dict.
    place: path of our leaf; starts with params or buffers.
    index: where in the leaf's stacked axes (block, expert).
    form: the two layouts.
  """

  name: str
  place: Place
  index: tuple[int, ...]
  form: Form


def entries(
  config: config_lib.ModelConfig, *, left_decoder: bool | None = None
) -> Iterator[Entry]:
  """Lists every entry of a model's state dict.

  Args:
    config: the model.
    left_decoder: whether the left-to-right decoder is called left_decoder;
      by default where there is a right-to-left one.
  """
  yield from _encoder(config.encoder)
  yield from _linear('ctc.ctc_lo', ('params', 'ctc'))
  two_sided = config.decoder.num_reverse_blocks > 0
  if left_decoder is None:
    left_decoder = two_sided
  if config.decoder.num_blocks:
    yield from _decoder(
      _LEFT if left_decoder else 'decoder',
      ('params', 'forward_decoder'),
      config.decoder.num_blocks,
      config.decoder,
    )
  if two_sided:
    yield from _decoder(
      _RIGHT,
      ('params', 'backward_decoder'),
      config.decoder.num_reverse_blocks,
      config.decoder,
    )
  for part in ('mean', 'istd'):
    yield Entry(f'{_CMVN}{part}', ('buffers', 'cmvn', part), (), _SAME)


def _linear(
  name: str, place: Place, index: tuple[int, ...] = ()
) -> Iterator[Entry]:
  yield Entry(f'{name}.weight', (*place, 'kernel'), index, _LINEAR)
  yield Entry(f'{name}.bias', (*place, 'bias'), index, _SAME)


def _norm(
  name: str, place: Place, index: tuple[int, ...] = ()
) -> Iterator[Entry]:
  yield Entry(f'{name}.weight', (*place, 'scale'), index, _SAME)
  yield Entry(f'{name}.bias', (*place, 'bias'), index, _SAME)


def _encoder(config: config_lib.EncoderConfig) -> Iterator[Entry]:
  place = ('params', 'encoder')
  yield from _subsampling(config.subsampling, (*place, 'subsampling'))
  for i in range(config.num_blocks):
    yield from _block(f'encoder.encoders.{i}', (*place, 'blocks'), (i,), config)
  yield from _norm('encoder.after_norm', (*place, 'norm'))


def _subsampling(kind: config_lib.Subsampling, place: Place) -> Iterator[Entry]:
  for i in range(3 if kind == 'conv2d8' else 2):
    name = f'encoder.embed.conv.{2 * i}'  # a ReLU after each
    yield Entry(f'{name}.weight', (*place, f'kernel_{i}'), (), _CONV2D)
    yield Entry(f'{name}.bias', (*place, f'bias_{i}'), (), _SAME)
  # The reference calls it by another name in x6 and x8.
  output = 'out.0' if kind == 'conv2d' else 'linear'
  yield from _linear(f'encoder.embed.{output}', (*place, 'output'))


def _block(
  name: str,
  place: Place,
  index: tuple[int, ...],
  config: config_lib.EncoderConfig,
) -> Iterator[Entry]:
  # Their `feed_forward` is the second of the two half steps of a block.
  layers = {
    'feed_forward': ('ffn_final', 'norm_ff', 'norm_ffn_final'),
    'feed_forward_macaron': (
      'ffn_macaron',
      'norm_ff_macaron',
      'norm_ffn_macaron',
    ),
  }
  if not config.macaron:
    del layers['feed_forward_macaron']
  for theirs, (ours, their_norm, our_norm) in layers.items():
    yield from _feed_forward(
      f'{name}.{theirs}', (*place, ours), index, config.moe.num_experts
    )
    yield from _norm(f'{name}.{their_norm}', (*place, our_norm), index)
  attention = f'{name}.self_attn'
  yield from _attention(attention, (*place, 'attention'), index)
  if config.position == 'rel_pos':
    yield from _positions(attention, (*place, 'attention'), index)
  yield from _convolution(
    f'{name}.conv_module', (*place, 'convolution'), index, config.conv_norm
  )
  for theirs, ours in (
    ('norm_mha', 'norm_attention'),
    ('norm_conv', 'norm_convolution'),
    ('norm_final', 'norm_output'),
  ):
    yield from _norm(f'{name}.{theirs}', (*place, ours), index)


def _attention(
  name: str, place: Place, index: tuple[int, ...]
) -> Iterator[Entry]:
  for theirs, ours in (('q', 'query'), ('k', 'key'), ('v', 'value')):
    linear, into = f'{name}.linear_{theirs}', (*place, ours)
    yield Entry(f'{linear}.weight', (*into, 'kernel'), index, _TO_HEADS)
    yield Entry(f'{linear}.bias', (*into, 'bias'), index, _FLAT)
  linear, into = f'{name}.linear_out', (*place, 'output')
  yield Entry(f'{linear}.weight', (*into, 'kernel'), index, _FROM_HEADS)
  yield Entry(f'{linear}.bias', (*into, 'bias'), index, _SAME)


def _positions(
  name: str, place: Place, index: tuple[int, ...]
) -> Iterator[Entry]:
  """What scores the absolute position of every key."""
  kernel = (*place, 'position', 'kernel')
  yield Entry(f'{name}.linear_pos.weight', kernel, index, _TO_HEADS)
  for theirs, ours in (('u', 'content_bias'), ('v', 'position_bias')):
    yield Entry(f'{name}.pos_bias_{theirs}', (*place, ours), index, _SAME)


def _convolution(
  name: str, place: Place, index: tuple[int, ...], norm: config_lib.ConvNorm
) -> Iterator[Entry]:
  for theirs, ours in (
    ('pointwise_conv1', 'pointwise_in'),
    ('pointwise_conv2', 'pointwise_out'),
  ):
    kernel, bias = (*place, ours, 'kernel'), (*place, ours, 'bias')
    yield Entry(f'{name}.{theirs}.weight', kernel, index, _POINTWISE)
    yield Entry(f'{name}.{theirs}.bias', bias, index, _SAME)
  depthwise = f'{name}.depthwise_conv'
  kernel, bias = (*place, 'depthwise_kernel'), (*place, 'depthwise_bias')
  yield Entry(f'{depthwise}.weight', kernel, index, _DEPTHWISE)
  yield Entry(f'{depthwise}.bias', bias, index, _SAME)
  if norm == 'layer_norm':
    yield from _norm(f'{name}.norm', (*place, 'norm'), index)
    return
  if norm == 'rms_norm':  # both store the scale less one
    offset = (*place, 'norm_offset')
    yield Entry(f'{name}.norm.weight', offset, index, _SAME)
    return
  scale, bias = (*place, 'norm_scale'), (*place, 'norm_bias')
  yield Entry(f'{name}.norm.weight', scale, index, _SAME)
  yield Entry(f'{name}.norm.bias', bias, index, _SAME)
  for theirs, ours in (('running_mean', 'mean'), ('running_var', 'variance')):
    running = ('buffers', 'conv_norm', ours)
    yield Entry(f'{name}.norm.{theirs}', running, index, _SAME)


def _feed_forward(
  name: str, place: Place, index: tuple[int, ...], num_experts: int
) -> Iterator[Entry]:
  if not num_experts:
    yield from _linear(f'{name}.w_1', (*place, 'w_in'), index)
    yield from _linear(f'{name}.w_2', (*place, 'w_out'), index)
    return
  router = (*place, 'router', 'kernel')
  yield Entry(f'{name}.gate.weight', router, index, _LINEAR)
  for e in range(num_experts):
    for theirs, ours in (('w_1', 'in'), ('w_2', 'out')):
      expert, at = f'{name}.experts.{e}.{theirs}', (*index, e)
      yield Entry(f'{expert}.weight', (*place, f'w_{ours}'), at, _LINEAR)
      yield Entry(f'{expert}.bias', (*place, f'b_{ours}'), at, _SAME)


def _decoder(
  name: str, place: Place, num_blocks: int, config: config_lib.DecoderConfig
) -> Iterator[Entry]:
  embedding = (*place, 'embedding', 'embedding')
  yield Entry(f'{name}.embed.0.weight', embedding, (), _SAME)
  layers = (*place, 'layers')
  for i in range(num_blocks):
    layer, index = f'{name}.decoders.{i}', (i,)
    for theirs, ours, norm in (
      ('self_attn', 'self_attention', 'norm1'),
      ('src_attn', 'cross_attention', 'norm2'),
    ):
      yield from _attention(f'{layer}.{theirs}', (*layers, ours), index)
      yield from _norm(f'{layer}.{norm}', (*layers, f'norm_{ours}'), index)
    yield from _feed_forward(
      f'{layer}.feed_forward', (*layers, 'ffn'), index, config.moe.num_experts
    )
    yield from _norm(f'{layer}.norm3', (*layers, 'norm_ffn'), index)
  yield from _norm(f'{name}.after_norm', (*place, 'norm'))
  yield from _linear(f'{name}.output_layer', (*place, 'output'))


def model_variables(
  state: StateDict, config: config_lib.ModelConfig
) -> tuple[PyTree, PyTree]:
  """Maps a state dict to (parameters, buffers), NumPy arrays in float32.

  Without CMVN entries the buffers' CMVN changes nothing. Entries that are
  never read (see `unused_entries`) have no place in the trees.

  Raises:
    WenetError: for a missing or left-over entry, a wrong shape, or a type
      that float32 cannot hold.
  """
  table = list(entries(config, left_decoder=_has_left_decoder(state)))
  # The reference keeps CMVN in the model or has none; the buffers always have.
  if not any(name.startswith(_CMVN) for name in state):
    table = [e for e in table if not e.name.startswith(_CMVN)]
  _require_same_names(state, {e.name for e in table}, config)
  leaves = {
    place: np.empty(leaf.shape, np.float32)
    for place, leaf in _shapes(config).items()
  }
  leaves['buffers', 'cmvn', 'mean'][:] = 0.0
  leaves['buffers', 'cmvn', 'istd'][:] = 1.0
  for entry in table:
    target = leaves[entry.place][entry.index]  # a view: no leaf is a scalar
    theirs = _checked(entry, np.asarray(state[entry.name]), target.shape)
    target[...] = entry.form.to_ours(theirs, target.shape)
  tree = traverse_util.unflatten_dict(leaves)
  return tree['params'], tree['buffers']


def state_dict(
  params: PyTree,
  buffers: PyTree | None,
  config: config_lib.ModelConfig,
  *,
  left_decoder: bool | None = None,
) -> dict[str, np.ndarray]:
  """Maps our trees to the reference's names and layouts.

  Args:
    params: parameters, or anything of their shapes, such as gradients.
    buffers: buffers; None leaves their entries out. So does a CMVN that
      changes nothing: the reference has none then.
    config: the model.
    left_decoder: see `entries`.

  Raises:
    WenetError: if the trees are not this model's; names the leaf.
  """
  tree = {'params': nn.meta.unbox(params)}
  if buffers is not None:
    tree['buffers'] = dict(buffers)
    cmvn = jax.tree.map(np.asarray, buffers['cmvn'])
    if not cmvn['mean'].any() and (cmvn['istd'] == 1.0).all():
      del tree['buffers']['cmvn']
  leaves = traverse_util.flatten_dict(jax.tree.map(np.asarray, tree))
  _require_same_leaves(leaves, config)
  return {
    entry.name: np.ascontiguousarray(
      entry.form.to_theirs(leaves[entry.place][entry.index])
    )
    for entry in entries(config, left_decoder=left_decoder)
    if entry.place in leaves
  }


def unused_entries(
  state: StateDict, config: config_lib.ModelConfig
) -> dict[str, np.ndarray]:
  """The entries that no computation reads, so that an export can return them.

  Position tables, batch-norm counters, and a right-to-left decoder without
  layers.
  """
  return {
    name: array for name, array in state.items() if _is_unused(name, config)
  }


def _is_unused(name: str, config: config_lib.ModelConfig) -> bool:
  if name.endswith(_UNUSED_SUFFIXES):
    return True
  # Embedding, norm and output are there even without layers.
  without_layers = _decoder(_RIGHT, (), 0, config.decoder)
  return config.decoder.num_reverse_blocks == 0 and name in {
    entry.name for entry in without_layers
  }


def _has_left_decoder(state: StateDict) -> bool:
  return any(name.startswith(f'{_LEFT}.') for name in state)


def _require_same_names(
  state: StateDict, expected: set[str], config: config_lib.ModelConfig
) -> None:
  missing = sorted(expected - set(state))
  if missing:
    raise WenetError(
      f'the checkpoint has no entry {missing[0]!r} ({len(missing)} are missing)'
    )
  left = sorted(
    name for name in set(state) - expected if not _is_unused(name, config)
  )
  if left:
    raise WenetError(
      f'the checkpoint has {len(left)} entries this model has no place for, '
      f'the first is {left[0]!r}'
    )


@functools.lru_cache(maxsize=4)  # tracing a model takes most of the time
def _shapes(config: config_lib.ModelConfig) -> dict[Place, Any]:
  """Shapes of our parameters and buffers, by path."""
  model = u2.U2MoeModel(config)

  def init(key: Key[Array, '']) -> dict[str, PyTree]:
    return {
      'params': u2.init_params(model, key),
      'buffers': u2.init_buffers(config),
    }

  tree = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0)))
  return traverse_util.flatten_dict(tree)


def _require_same_leaves(
  leaves: Mapping[Place, np.ndarray], config: config_lib.ModelConfig
) -> None:
  """Refuses trees that are not the config's; buffers may be left out."""
  expected = _shapes(config)
  for place in sorted({*expected, *leaves}):
    name = '.'.join(place)
    if place not in expected:
      raise WenetError(f'the config has no place for {name}')
    if place not in leaves:
      if place[0] == 'params':
        raise WenetError(f'the parameters have no {name}')
    elif leaves[place].shape != expected[place].shape:
      raise WenetError(
        f'{name} is {leaves[place].shape}, the config asks for '
        f'{expected[place].shape}'
      )


def _checked(
  entry: Entry, array: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
  """The array in float32, if it is one that the place can hold."""
  # Nothing is written, so the memory is never touched.
  expected = entry.form.to_theirs(np.empty(shape, np.float32)).shape
  if array.shape != expected:
    raise WenetError(
      f'{entry.name} is {array.shape} in the checkpoint, the config asks for '
      f'{expected} ({".".join(entry.place)})'
    )
  result = array.astype(np.float32, copy=False)
  if array.dtype.kind not in 'fV':  # V: bfloat16, which is not NumPy's own
    raise WenetError(f'{entry.name} has type {array.dtype}, not a float')
  # float64 is fine where no digit gets lost.
  if array.dtype.itemsize > 4 and not np.array_equal(
    result, array, equal_nan=True
  ):
    raise WenetError(
      f'{entry.name} has type {array.dtype} and values that float32 cannot hold'
    )
  return result
