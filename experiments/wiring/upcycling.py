"""Grows a model directory into one with experts, or shrinks it."""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any
from typing import Literal

from flax import linen as nn
import jax
import numpy as np

from experiments.wiring import receipt as receipt_lib
from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.checkpoint import contents
from u2moe_jax.checkpoint import directory
from u2moe_jax.checkpoint import single
from u2moe_jax.models import u2
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.sharding import placement
from u2moe_jax.sharding import rules
from u2moe_jax.training import moments as moments_lib
from u2moe_jax.training import parameters
from u2moe_jax.training import upcycling

# Peak memory of a CPU over the bytes of the grown model: its receipt and writing
# copy arrays. Measured 2.4 to 2.7 (docs/upcycling.md).
_PEAK = 2.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What is asked for; see `upcycling.moe_config` and `upcycling.Change`."""

  num_experts: int = 8
  top_k: int = 2
  where: str = 'all'
  router_type: config_lib.RouterType = 'topk_softmax'
  noise: float = 0.0
  drop: float = 0.0
  seed: int = 0

  def config(self, model: config_lib.ModelConfig) -> config_lib.ModelConfig:
    """The model that is asked for."""
    return upcycling.moe_config(
      model,
      num_experts=self.num_experts,
      top_k=self.top_k,
      where=self.where,
      router_type=self.router_type,
    )

  @property
  def change(self) -> upcycling.Change:
    """How experts differ from the dense layer."""
    return upcycling.Change(noise=self.noise, drop=self.drop, seed=self.seed)


def upcycle(
  checkpoint: str | os.PathLike[str],
  out: str | os.PathLike[str],
  request: Request | None,
  *,
  manifest: str | None = None,
  num_utterances: int = 4,
  mesh: str | None = None,
  optimizer: Literal['fresh', 'spread'] = 'fresh',
) -> bool:
  """Writes the grown model if its receipt is good; prints the receipt.

  The dense model answers first and is let go; then the other one is made,
  array by array as they are read, straight onto its devices. So there are
  never both, and of what is made no device ever holds more than its share.

  Args:
    checkpoint: a model directory, a work directory or a step.
    out: the model directory to write; must not exist.
    request: what is asked for; None: the way back.
    manifest: sound for the receipt; None: random features.
    num_utterances: of the receipt.
    mesh: mesh axes as text; None: the first device.
    optimizer: spread adds Adam's moments, those of the dense layer for each
      expert, for the training that starts from what is written.

  Returns:
    False if the models should be equal and are not; then nothing is written.

  Raises:
    ValueError: for whatever cannot be done; says why.
  """
  out = pathlib.Path(out).absolute()
  # What can be refused is refused before anything is computed.
  _require_free(out)
  found = directory.find(checkpoint)
  print(f'checkpoint: {found.choice}')
  source = found.description.model
  if request is None:
    # Not exact: the mean of experts that have trained is another model.
    change, target, exact = (
      upcycling.Change(),
      upcycling.dense_config(source),
      False,
    )
  else:
    change, target = request.change, request.config(source)
    exact = upcycling.is_exact(target, change)
  devices = None if mesh is None else mesh_lib.make_mesh(parse_mesh(mesh))
  abstract = _abstract(target, devices)
  _require_memory(abstract)
  # Reads an array when it is asked for; nothing yet.
  reader = single.Reader(found.params)
  adam = None if optimizer == 'fresh' else _Adam(found, source)
  # Here, so that nothing is computed for a folder that lacks an array.
  contents.require_fit(found.params, directory.abstract_variables(source))
  probe, before = _ask_first(found, devices, manifest, num_utterances)
  variables = upcycling.build(reader, source, target, abstract, change)
  after = receipt_lib.ask(target, **variables, probe=probe, mesh=devices)
  receipt = receipt_lib.compare(before, after)
  # What is meant to differ has a receipt too, and no bound.
  passed = receipt.is_within_bounds or not exact
  record = _record(source, target, request, receipt, exact)
  record['optimizer'] = optimizer
  _print(record, receipt, probe, source, target, exact)
  if passed:
    directory.write(
      out,
      _description(found, target, request, record),
      variables['params'],
      variables['buffers'],
      tokens=found.tokens,
      moments=adam and adam.spread(source, target, abstract['params']),
    )
    print(f'wrote {out}')
  else:
    print('the models differ by more than rounding; nothing was written')
  print(json.dumps(record | {'passed': passed, 'out': str(out)}))
  return passed


class _Adam:
  """Adam's moments of a training step, read one array at a time."""

  def __init__(self, found: directory.Found, source: config_lib.ModelConfig):
    """Refuses what has none, or not of all parameters."""
    item = found.params.parent / 'optimizer'
    # Moments belong to a step; an average of steps has none.
    if not item.is_dir():
      raise upcycling.UpcyclingError(
        f'{found.params.parent} has no optimizer state to spread; give a step '
        'of a training, WORKDIR/checkpoints/STEP'
      )
    self._read = single.Reader(item)
    self._root = moments_lib.saved_at(self._read.shapes)
    params = directory.abstract_variables(source)['params']
    for path in parameters.paths(params):
      if f'{self._root}/mu/{path}' not in self._read.shapes:
        raise upcycling.UpcyclingError(
          f'{item} has no moments of {path}, which did not train; take '
          '--optimizer=fresh'
        )

  def spread(
    self,
    source: config_lib.ModelConfig,
    target: config_lib.ModelConfig,
    params: PyTree,
  ) -> PyTree:
    """Those of the grown model; `params` are its own, abstract."""

    def make(name: str) -> PyTree:
      def read(path: str) -> np.ndarray:
        # `build` asks as for variables; moments lie below a root of their own.
        own = path.removeprefix('params/')
        return self._read(f'{self._root}/{name}/{own}')

      tree = {'params': params}
      # Moments grow as parameters do: each expert gets those of its origin.
      made = upcycling.build(read, source, target, tree, routers='zero')
      return made['params']

    moments = {name: make(name) for name in moments_lib.NAMES}
    return {**moments, 'count': self._read(f'{self._root}/count')}


def parse_mesh(text: str) -> config_lib.MeshConfig:
  """Reads `data=1,expert=4`.

  Raises:
    config_lib.ConfigError: if it cannot be read; says what there is.
  """
  names = [field.name for field in dataclasses.fields(config_lib.MeshConfig)]
  sizes: dict[str, int] = {}
  for entry in text.split(','):
    name, _, size = entry.strip().partition('=')
    if name not in names or not size.removeprefix('-').isdigit():
      raise config_lib.ConfigError(
        f'--mesh={text!r}: {entry!r} cannot be read; it takes axes and sizes '
        f'such as data=1,expert=4; axes: {", ".join(names)}'
      )
    sizes[name] = int(size)
  return config_lib.MeshConfig(**sizes)


def _require_free(out: pathlib.Path) -> None:
  for parent in out.parents:
    if parent.exists() and not parent.is_dir():
      raise directory.CheckpointError(
        f'{out}: {parent} is a file, not a folder; choose another --out'
      )
  if out.is_file() or (out.is_dir() and any(out.iterdir())):
    raise directory.CheckpointError(
      f'{out}: exists already; choose another --out, or remove it'
    )


def _abstract(
  model: config_lib.ModelConfig, mesh: jax.sharding.Mesh | None
) -> dict[str, PyTree]:
  """Shapes of the variables, placed as training places them."""
  if mesh is None:
    return directory.abstract_variables(model)
  # Buffers are small: every device has them.
  tree = directory.abstract_variables(model, placement.replicated(mesh))
  boxed = jax.eval_shape(
    lambda key: u2.init_params(u2.U2MoeModel(model), key), jax.random.key(0)
  )
  tree['params'] = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    nn.meta.unbox(boxed),
    placement.shardings(boxed, mesh, rules.STANDARD),
  )
  return tree


def _bytes(tree: PyTree) -> int:
  return sum(
    leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
  )


def _require_memory(abstract: PyTree) -> None:
  """Refuses what this machine could not hold, before it tries."""
  if jax.default_backend() != 'cpu':
    return  # accelerators say so themselves, and say how much they have
  # Against all memory there is, not what is free: this only stops the hopeless.
  needed = _PEAK * _bytes(abstract)
  there = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  if needed > there:
    raise upcycling.UpcyclingError(
      f'making the model takes {needed / 2**30:.1f} GiB, and this machine has '
      f'{there / 2**30:.1f} GiB; choose fewer experts, or fewer layers by '
      '--where'
    )


def _ask_first(
  found: directory.Found,
  mesh: jax.sharding.Mesh | None,
  manifest: str | None,
  num_utterances: int,
) -> tuple[receipt_lib.Probe, receipt_lib.Answer]:
  """The probe, and what the source says to it; keeps nothing else."""
  model = found.description.model
  params, buffers = directory.restore(found, _abstract(model, mesh))
  if manifest is None:
    probe = receipt_lib.synthetic_probe(
      model, buffers, num_utterances=num_utterances
    )
  else:
    probe = receipt_lib.manifest_probe(
      manifest, found.description, num_utterances=num_utterances
    )
  return probe, receipt_lib.ask(model, params, buffers, probe, mesh)


def _record(
  source: config_lib.ModelConfig,
  target: config_lib.ModelConfig,
  request: Request | None,
  receipt: receipt_lib.Receipt,
  exact: bool,
) -> dict[str, Any]:
  """The receipt as plain values."""
  sizes: dict[str, Any] = {}
  for when, model in (('before', source), ('after', target)):
    # Active: with the experts that a single frame visits.
    total, active = u2.count_params(model)
    sizes[f'parameters_{when}'] = total
    sizes[f'active_parameters_{when}'] = active
    sizes[f'bytes_{when}'] = _bytes(directory.abstract_variables(model))
  asked = {'to_dense': 'average'}
  if request is not None:
    asked = dataclasses.asdict(request)
  return {
    **asked,
    'exact': exact,
    **dataclasses.asdict(receipt),
    **sizes,
  }


def _print(
  record: Mapping[str, Any],
  receipt: receipt_lib.Receipt,
  probe: receipt_lib.Probe,
  source: config_lib.ModelConfig,
  target: config_lib.ModelConfig,
  exact: bool,
):
  """The receipt for people."""
  print('feed-forward layers with experts:')
  for model, when in ((source, 'before'), (target, 'after')):
    layers = ', '.join(
      f'{name} of blocks {" ".join(map(str, blocks))}'
      for name, blocks in model.expert_blocks.items()
    )
    print(f'  {when:6} {layers or "none"}')
  print(f'{receipt.utterances} utterances ({probe.origin}), differences:')
  print('\n'.join(receipt.lines(bounded=exact)))
  if not exact:
    print(f'  not meant to be equal: {_why(record, target)}')
  for name in ('parameters', 'active_parameters', 'bytes'):
    before, after = record[f'{name}_before'], record[f'{name}_after']
    words = name.replace('_', ' ')
    print(f'  {words:18} {before:,} -> {after:,} (x {after / before:.2f})')


def _why(record: Mapping[str, Any], target: config_lib.ModelConfig) -> str:
  if 'to_dense' in record:
    return 'one layer stands for many'
  if record['noise'] or record['drop']:
    return 'noise, or units drawn anew'
  return (
    'softmax_topk scales the output of each of these layers by the probability '
    f'of the {record["top_k"]} of {record["num_experts"]} experts that are kept'
  )


def _description(
  found: directory.Found,
  target: config_lib.ModelConfig,
  request: Request | None,
  record: Mapping[str, Any],
) -> directory.Description:
  """What model.json says; the source's own story is kept in it."""
  made = directory.provenance(
    upcycling=dict(record),
    source=str(found.params.parent),
    source_provenance=dict(found.description.provenance),
  )
  return directory.Description(target, found.description.features, made)
