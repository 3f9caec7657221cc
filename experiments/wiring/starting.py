"""The first state of a run: fresh, from another model, or where it stopped."""

from collections.abc import Mapping
import dataclasses
import filecmp
import pathlib
import tempfile
from typing import Any

from flax import traverse_util
import jax
import numpy as np

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.checkpoint import contents
from u2moe_jax.checkpoint import directory
from u2moe_jax.checkpoint import processes
from u2moe_jax.checkpoint import store as store_lib
from u2moe_jax.sharding import placement
from u2moe_jax.text import tokenizer as tokenizer_lib
from u2moe_jax.training import loop
from u2moe_jax.training import moments as moments_lib
from u2moe_jax.training import optimizer as optimizer_lib
from u2moe_jax.training import parameters
from u2moe_jax.training import state as state_lib

# What hangs on the tokens, so that another table makes it worthless.
_OF_TOKENS = 'vocabulary'
_SHOWN = 12


def restore(
  store: store_lib.Store, target: state_lib.TrainState
) -> tuple[state_lib.TrainState, loop.Counters] | None:
  """The newest state that can be read; None if the run is new.

  Args:
    store: the checkpoints of the run.
    target: abstract state with shardings, of any mesh.

  Raises:
    contents.CheckpointError: see `store.restore_newest`.
  """
  restored = store.restore_newest(
    params=target.params, buffers=target.buffers, opt_state=target.opt_state
  )
  if restored is None:
    return None
  processes.say(f'continuing at step {restored.step}')
  # A checkpoint's `params` are the moving average, if there is one; what
  # training goes on with lies in its optimizer state.
  params, opt_state = optimizer_lib.swap_average(
    restored.params, restored.opt_state
  )
  state = state_lib.TrainState(
    step=jax.device_put(np.int32(restored.step), target.step.sharding),
    params=params,
    opt_state=opt_state,
    buffers=restored.buffers,
  )
  return state, loop.Counters.of(restored.progress)


def find_source(
  config: config_lib.Config, tokenizer: tokenizer_lib.Tokenizer
) -> 'Source | None':
  """What `train.init_from` names, checked against the model.

  Args:
    config: of the run, resolved.
    tokenizer: of the run.

  Raises:
    directory.CheckpointError: if it is no checkpoint, or one of another
      model; the message names arrays and shapes.
  """
  if not config.train.init_from:
    return None
  found = directory.find(config.train.init_from)
  return Source(found, config.model, tokenizer)


class Source:
  """A model to start from: which parameters are kept and which are fresh.

  With the same token table all are kept. With another one the layers that
  hang on the tokens (CTC, the decoders' embeddings and outputs) are fresh.

  Attributes:
    kept: paths of parameters.
    fresh: paths of parameters.
  """

  def __init__(
    self,
    found: directory.Found,
    model: config_lib.ModelConfig,
    tokenizer: tokenizer_lib.Tokenizer,
  ):
    """Compares shapes and token tables; reads no array."""
    self._found = found
    wanted = _abstract(model)
    saved = contents.saved_shapes(found.params)
    new_tokens = not _same_table(found.tokens, tokenizer)
    self.kept: list[str] = []
    self.fresh: list[str] = []
    for path, leaf in wanted.items():
      of_tokens = parameters.matches(
        path.removeprefix('params/'), _OF_TOKENS
      ) and path.startswith('params/')
      # Shapes too, since nothing is known of a table that was not saved.
      if of_tokens and (new_tokens or saved.get(path) != leaf.shape):
        self.fresh.append(path)
        continue
      if saved.get(path) != leaf.shape:
        raise directory.CheckpointError(
          f'train.init_from={found.params}: {path} is '
          f'{saved.get(path, "missing")} there and {leaf.shape} in this model; '
          'only layers that hang on the tokens may differ'
        )
      self.kept.append(path)

  def describe(self) -> str:
    """Which it is, what is kept, what is fresh."""
    kept = sorted({path.split('/')[1] for path in self.kept})
    lines = [
      f'starting from {self._found.choice}',
      f'  kept: {len(self.kept)} arrays of {", ".join(kept)}',
      f'  fresh: {", ".join(_names(self.fresh)) or "none"}',
    ]
    if self.fresh:
      lines.append('  (the token table is another one)')
    if self._found.moments is not None:
      lines.append("  Adam's moments are those that it was given")
    return '\n'.join(lines)

  def apply(
    self, state: state_lib.TrainState, init_optimizer: Any
  ) -> state_lib.TrainState:
    """Replaces the kept arrays of a fresh state.

    Args:
      state: the fresh state, placed.
      init_optimizer: parameters to an optimizer state, placed.
    """
    ours = _flat({'params': state.params, 'buffers': state.buffers})
    target = _abstract(self._found.description.model)
    replicated = placement.replicated(state.step.sharding.mesh)
    for path, leaf in target.items():
      # Arrays that are not kept may have other shapes, which our shardings need
      # not divide; they are read with the rest and dropped.
      sharding = ours[path].sharding if path in self.kept else replicated
      target[path] = jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      )
    abstract = _nested(target)
    restored = directory.restore(self._found, abstract)
    loaded = _flat(dict(zip(('params', 'buffers'), restored, strict=True)))
    merged = _nested(ours | {path: loaded[path] for path in self.kept})
    # A moving average starts at the parameters, so there is a new one.
    opt_state = init_optimizer(merged['params'])
    if self._found.moments is not None:
      opt_state = moments_lib.put(
        opt_state,
        directory.restore_moments(
          self._found, abstract['params'], everywhere=replicated
        ),
        [path.removeprefix('params/') for path in self.kept],
      )
    return dataclasses.replace(
      state,
      params=merged['params'],
      buffers=merged.get('buffers', state.buffers),
      opt_state=opt_state,
    )


def _abstract(model: config_lib.ModelConfig) -> dict[str, Any]:
  return _flat(directory.abstract_variables(model))


def _flat(tree: PyTree) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep='/')


def _nested(flat: Mapping[str, Any]) -> dict[str, PyTree]:
  return traverse_util.unflatten_dict(flat, sep='/')


def _same_table(
  folder: pathlib.Path | None, tokenizer: tokenizer_lib.Tokenizer
) -> bool:
  """Whether a folder holds just this table; True if it is unknown."""
  if folder is None:
    return True
  with tempfile.TemporaryDirectory() as temporary:
    ours, theirs = (pathlib.Path(temporary) / name for name in ('a', 'b'))
    tokenizer.save(ours)
    # Written anew, for the same table may be written in several ways.
    tokenizer_lib.load(folder).save(theirs)
    names = {path.name for path in (*theirs.iterdir(), *ours.iterdir())}
    _, different, missing = filecmp.cmpfiles(theirs, ours, names, shallow=False)
  return not different and not missing


def _names(paths: list[str]) -> list[str]:
  """Paths without `params/`, the rest counted when there are many."""
  shown = [path.removeprefix('params/') for path in paths[:_SHOWN]]
  more = len(paths) - len(shown)
  return shown + ([f'and {more} more'] if more > 0 else [])
