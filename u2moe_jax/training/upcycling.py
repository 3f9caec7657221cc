"""Dense models to Mixture-of-Experts (UME, arXiv 2412.17507), and back.

Every expert starts as a copy of the dense feed-forward layer, biases included,
under a random router; all else stays. Weights that sum to 1 (`topk_softmax`,
or all experts kept) then give what the dense layer gave, whatever the router
does: y = sum_j w_j FFN(x) = FFN(x). In training each expert of a frame draws a
dropout mask of its own.

Arrays are made one at a time, and of each only the parts that a device holds:
`build` needs one dense array on the host, never a whole model.
"""

from collections.abc import Callable
import dataclasses
import fnmatch
import functools
import math
from typing import Literal
import zlib

from flax import traverse_util
import jax
import numpy as np

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.checkpoint import directory
from u2moe_jax.models import stack

MOST_EXPERTS = 1024  # more is a slip of the finger
_PARTS = ('encoder', 'decoder')
# Arrays of stacked experts, and the dense arrays they come from.
_DENSE = {
  'w_in': 'w_in/kernel',
  'b_in': 'w_in/bias',
  'w_out': 'w_out/kernel',
  'b_out': 'w_out/bias',
}
_EXPERTS = {dense: expert for expert, dense in _DENSE.items()}
_ROUTER = 'router/kernel'
_WILDCARDS = frozenset('*?[')

Index = tuple[slice, ...]


class UpcyclingError(ValueError):
  """A model that cannot be grown, or shrunk, as asked; says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
  """How experts differ from what they are copies of.

  Attributes:
    noise: standard deviation of Gaussian noise on every expert array, as a
      share of that array's own in its block.
    drop: share of each expert's hidden units that are drawn anew, from a
      normal distribution with mean and deviation of the dense arrays
      (drop-upcycling, arXiv 2502.19261). Each expert loses others.
    seed: of these and of the routers.
  """

  noise: float = 0.0
  drop: float = 0.0
  seed: int = 0

  def __post_init__(self):
    if self.noise and self.drop:
      raise UpcyclingError('noise and drop exclude each other; give one')
    if not (self.noise >= 0.0 and math.isfinite(self.noise)):
      raise UpcyclingError(f'noise={self.noise} must be 0 or more')
    if not 0.0 <= self.drop <= 1.0:
      raise UpcyclingError(f'drop={self.drop} must be in [0, 1]')

  @property
  def is_none(self) -> bool:
    """Whether experts are plain copies."""
    return not self.noise and not self.drop


def moe_config(
  model: config_lib.ModelConfig,
  *,
  num_experts: int,
  top_k: int,
  where: str = 'all',
  router_type: config_lib.RouterType = 'topk_softmax',
) -> config_lib.ModelConfig:
  """The config of a model with experts in place of dense layers.

  Args:
    model: of the dense model; a part of it that is not chosen may have experts.
    num_experts: experts E per layer.
    top_k: experts J per frame.
    where: layers that get experts, a comma list of terms as in
      `MoeConfig.where`. A term is for every part that has such a layer, or for
      `encoder.TERM` or `decoder.TERM` only; a part alone means all of it. One
      with a wildcard is a pattern of layer names such as `encoder.3.final`.
    router_type: see `MoeConfig`.

  Raises:
    UpcyclingError: if a chosen part has experts already, or is missing, or
      there are too many experts, or the routers could not learn.
    config_lib.ConfigError: for a term that cannot be read, or a `top_k` out of
      range.
  """
  if not 2 <= num_experts <= MOST_EXPERTS:
    raise UpcyclingError(
      f'num_experts={num_experts} must be between 2 and {MOST_EXPERTS}'
    )
  if top_k == 1 and router_type == 'topk_softmax':
    raise UpcyclingError(
      'top_k=1 with router_type=topk_softmax gives the router no gradient '
      '(its weight is always 1); set router_type=softmax_topk or top_k=2'
    )
  chosen = _where_by_part(model, where)
  for part, terms in chosen.items():
    config = getattr(model, part)
    if config.moe.num_experts:
      raise UpcyclingError(
        f'the {part} has experts already (model.{part}.moe.num_experts='
        f'{config.moe.num_experts}, where={config.moe.where}); take a dense '
        'model, or choose another part'
      )
    experts = dataclasses.replace(
      config.moe,
      num_experts=num_experts,
      top_k=top_k,
      where=terms,
      router_type=router_type,
    )
    config = dataclasses.replace(config, moe=experts)
    model = dataclasses.replace(model, **{part: config})
  return model


def _where_by_part(model: config_lib.ModelConfig, where: str) -> dict[str, str]:
  """`MoeConfig.where` of each part that gets experts."""
  chosen: dict[str, list[str]] = {}
  words = [word.strip().removesuffix('_ffn') for word in where.split(',')]
  for term in (term for word in words for term in _layers(model, word)):
    part, _, rest = term.partition('.')
    wanted = {part: rest or 'all'} if part in _PARTS else {}
    fitting = {
      each: name
      for each, name in (wanted or dict.fromkeys(_PARTS, term)).items()
      if _matches(model, each, name)
    }
    if not fitting:
      raise UpcyclingError(
        f'where={term!r} chooses no feed-forward layer of this model: '
        f'{_describe_blocks(model)}'
      )
    for each, name in fitting.items():
      chosen.setdefault(each, []).append(name)
  return {
    part: 'all' if _is_everything(model, part, terms) else ','.join(terms)
    for part, terms in chosen.items()
  }


def _layers(model: config_lib.ModelConfig, pattern: str) -> list[str]:
  """The layers that a pattern fits; what has no wildcard is itself."""
  if not _WILDCARDS.intersection(pattern):
    return [pattern]
  names = [
    f'{part}.{block}.{ffn}'
    for part in _PARTS
    for block, ffns in enumerate(_kinds(model, part, 'all'))
    for ffn in ffns
  ]
  fitting = fnmatch.filter(names, pattern)
  if not fitting:
    raise UpcyclingError(
      f'where={pattern!r} fits no feed-forward layer; their names are '
      f'{names[0]} to {names[-1]}'
    )
  return fitting


def _kinds(model: config_lib.ModelConfig, part: str, where: str) -> stack.Kinds:
  """What the blocks of a part would be with experts there."""
  config = getattr(model, part)
  # Any number of experts will do: only their places are looked at.
  experts = config_lib.MoeConfig(num_experts=2, where=where)
  if part == 'decoder':
    return experts.placed(config.num_blocks, ('ffn',))
  ffns = ('macaron', 'final') if config.macaron else ('final',)
  return experts.placed(config.num_blocks, ffns)


def _matches(model: config_lib.ModelConfig, part: str, where: str) -> bool:
  return any(_kinds(model, part, where))


def _is_everything(
  model: config_lib.ModelConfig, part: str, terms: list[str]
) -> bool:
  # Of the left-to-right decoder; the other might have more blocks.
  if part == 'decoder' and 'all' not in terms:
    return False
  return _kinds(model, part, ','.join(terms)) == _kinds(model, part, 'all')


def _describe_blocks(model: config_lib.ModelConfig) -> str:
  decoder = model.decoder
  layers = 'macaron, final' if model.encoder.macaron else 'final'
  if not decoder.num_blocks:
    return f'{model.encoder.num_blocks} encoder blocks ({layers}), no decoder'
  return (
    f'{model.encoder.num_blocks} encoder blocks ({layers}), '
    f'{decoder.num_blocks} + {decoder.num_reverse_blocks} decoder blocks (ffn)'
  )


def dense_config(model: config_lib.ModelConfig) -> config_lib.ModelConfig:
  """The config of the same model without experts.

  Raises:
    UpcyclingError: if it has none.
  """
  if not model.expert_blocks:
    raise UpcyclingError('this model is dense already')
  dense = config_lib.MoeConfig()
  return dataclasses.replace(
    model,
    encoder=dataclasses.replace(model.encoder, moe=dense),
    decoder=dataclasses.replace(model.decoder, moe=dense),
  )


def is_exact(target: config_lib.ModelConfig, change: Change) -> bool:
  """Whether a grown model computes what the dense one does.

  Not if experts differ, and not if their weights do not sum to 1: with
  `softmax_topk` the output of each such layer is scaled by the probability of
  the experts that were kept.
  """
  configs = (target.encoder.moe, target.decoder.moe)
  return change.is_none and all(
    not moe.num_experts
    or moe.router_type == 'topk_softmax'
    or moe.top_k == moe.num_experts
    for moe in configs
  )


def build(
  read: Callable[[str], np.ndarray],
  source: config_lib.ModelConfig,
  target: config_lib.ModelConfig,
  abstract: PyTree,
  change: Change | None = None,
  *,
  routers: Literal['random', 'zero'] = 'random',
) -> PyTree:
  """Makes the variables of a model from those of another, or their moments.

  Experts appear where only the target has them, and are averaged where only
  the source has; everything else is copied.

  Args:
    read: from a path of the source, as `params/ctc/kernel`, to a host array.
    source: its config.
    target: config of what is made; differs in its experts only.
    abstract: `{'params', 'buffers'}` of the target, with shardings.
    change: how experts differ from their origin; None: not at all.
    routers: what is new; zero for moments, which have seen nothing yet.

  Returns:
    The tree of `abstract`, placed, in the dtypes of the source. Random numbers
    depend on the seed, the layer, the block and the expert, not on shardings.
  """
  leaves = traverse_util.flatten_dict(abstract, sep='/')
  made = {}
  for path, leaf in leaves.items():
    # A cache for each, so that what was read for it goes with it.
    maker = _Maker(
      functools.cache(read),
      _stacks(source),
      _stacks(target),
      change or Change(),
      routers == 'zero',
    )
    made[path] = jax.make_array_from_callback(
      leaf.shape, leaf.sharding, maker.callback(path, leaf.shape)
    )
    # Before the next one is read: else host arrays would pile up.
    jax.block_until_ready(made[path])
  return traverse_util.unflatten_dict(made, sep='/')


def upcycle(
  variables: PyTree,
  source: config_lib.ModelConfig,
  target: config_lib.ModelConfig,
  change: Change | None = None,
) -> PyTree:
  """`build` from `{'params', 'buffers'}` in memory, on the first device."""
  flat = traverse_util.flatten_dict(variables, sep='/')
  arrays = {path: np.asarray(leaf) for path, leaf in flat.items()}
  abstract = directory.abstract_variables(target)
  return build(arrays.__getitem__, source, target, abstract, change)


def _stacks(model: config_lib.ModelConfig) -> dict[str, stack.Kinds]:
  """The stacks of blocks by their path, and what the blocks are."""
  decoder = model.decoder
  return {
    'params/encoder/blocks': model.encoder.expert_ffns,
    'params/forward_decoder/layers': decoder.expert_ffns(decoder.num_blocks),
    'params/backward_decoder/layers': decoder.expert_ffns(
      decoder.num_reverse_blocks
    ),
  }


@dataclasses.dataclass(frozen=True)
class _Array:
  """One array of one block.

  Attributes:
    root: path of the stack.
    block: number of the block.
    layer: its layer, `ffn_final`.
    name: the array in it, `w_in/kernel`.
  """

  root: str
  block: int
  layer: str
  name: str

  def rng(self, seed: int, expert: int = 0) -> np.random.Generator:
    """Random numbers of its own."""
    # A checksum, because `hash` of a text differs from process to process.
    name = f'{self.root}/{self.layer}/{self.name}'
    return np.random.default_rng(
      [seed, zlib.crc32(name.encode()), self.block, expert]
    )


@dataclasses.dataclass(frozen=True)
class _Maker:
  """Makes parts of arrays.

  Attributes:
    read: see `build`.
    source: stacks of the source.
    target: stacks of the target.
    change: how experts differ.
    zero_routers: whether new routers are zero, not random.
  """

  read: Callable[[str], np.ndarray]
  source: dict[str, stack.Kinds]
  target: dict[str, stack.Kinds]
  change: Change
  zero_routers: bool

  def callback(
    self, path: str, shape: tuple[int, ...]
  ) -> Callable[[Index], np.ndarray]:
    """From a part of one of the target's arrays to its values."""
    roots = [root for root in self.target if path.startswith(f'{root}/')]
    # Outside of the stacks nothing changes.
    if not roots:
      return lambda index: self.read(path)[index]
    (root,) = roots
    rest, size, first = (
      path[len(root) + 1 :],
      stack.period(self.target[root]),
      0,
    )
    # Entry i of group g is block g + size * i (models/stack.py).
    if size > 1:
      group, _, rest = rest.partition('/')
      first = int(group.removeprefix('block_'))
    layer, _, name = rest.partition('/')

    # `index` has the slices that one device holds, of the stack first.
    def make(index: Index) -> np.ndarray:
      rows = range(shape[0])[index[0]]
      arrays = (_Array(root, first + size * row, layer, name) for row in rows)
      return np.stack([self._one(a, shape[1:], index[1:]) for a in arrays])

    return make

  def _one(
    self, array: _Array, shape: tuple[int, ...], index: Index
  ) -> np.ndarray:
    ffn = array.layer.removeprefix('ffn_')
    had = ffn in self.source[array.root][array.block]
    has = ffn in self.target[array.root][array.block]
    if had == has:
      return self._read(array)[index]
    if had:
      return _average(self._read(array, _EXPERTS[array.name]))[index]
    # A new router has no origin; its type is that of the layer it stands in.
    if array.name == _ROUTER:
      dtype = self._read(array, 'w_in/bias').dtype
      if self.zero_routers:
        return np.zeros(shape, dtype)[index]
      return _router(array, shape, self.change.seed).astype(dtype)[index]
    dense = self._read(array, _DENSE[array.name])
    # Those that this device holds; `index` has experts first.
    experts = range(shape[0])[index[0]]
    if self.change.is_none:
      part = dense[index[1:]]
      return np.broadcast_to(part, (len(experts), *part.shape))
    changed = (_changed(dense, array, e, self.change) for e in experts)
    return np.stack([expert[index[1:]] for expert in changed])

  def _read(self, array: _Array, name: str = '') -> np.ndarray:
    """What the source has in the same layer of the same block."""
    group, row = stack.place(self.source[array.root], array.block)
    parts = (array.root, group, array.layer, name or array.name)
    return self.read('/'.join(part for part in parts if part))[row]


def _average(experts: np.ndarray) -> np.ndarray:
  # In float64, so that the mean of equal ones is just that.
  return experts.mean(axis=0, dtype=np.float64).astype(experts.dtype)


def _router(array: _Array, shape: tuple[int, ...], seed: int) -> np.ndarray:
  """U(-1/sqrt(D), 1/sqrt(D)), as every linear map starts; zeros would tie."""
  bound = shape[0] ** -0.5
  return array.rng(seed).uniform(-bound, bound, shape)


def _changed(
  dense: np.ndarray, array: _Array, expert: int, change: Change
) -> np.ndarray:
  """An expert's array, made from the dense one."""
  rng = array.rng(change.seed, expert)
  if change.noise:
    noise = change.noise * dense.std() * rng.normal(size=dense.shape)
    return (dense + noise).astype(dense.dtype)
  # The axis of the hidden units: w_in is (D, M), b_in (M,), w_out (M, D).
  axis = {'w_in': 1, 'b_in': 0, 'w_out': 0}.get(array.name)
  if axis is None:  # the output bias belongs to no hidden unit
    return dense
  # The same units in all arrays of an expert.
  units = dataclasses.replace(array, name='units').rng(change.seed, expert)
  size = dense.shape[axis]
  # Just so many of them, not so many on average.
  dropped = units.permutation(size) < round(change.drop * size)
  fresh = rng.normal(dense.mean(), dense.std(), dense.shape)
  mask = (
    dropped[None] if axis else dropped.reshape(-1, *(1,) * (dense.ndim - 1))
  )
  return np.where(mask, fresh, dense).astype(dense.dtype)
