"""Averages checkpoints of a work directory."""

from collections.abc import Sequence
import os
import pathlib

from u2moe_jax.checkpoint import average as average_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.checkpoint import store as store_lib


def average(
  workdir: str | os.PathLike[str],
  out: str | os.PathLike[str],
  *,
  num: int,
  by: str,
  steps: Sequence[str] = (),
) -> list[int]:
  """Writes the mean of some checkpoints as a model directory.

  Args:
    workdir: a training work directory.
    out: the model directory.
    num: how many, the best first.
    by: `wer` (lowest on dev) or `newest`.
    steps: exactly these, instead.

  Returns:
    The steps that were averaged.

  Raises:
    directory.CheckpointError: if there is no such checkpoint, or `out` holds
      something else.
  """
  workdir = pathlib.Path(workdir).absolute()
  directory.require_replaceable(out)
  if not (workdir / 'checkpoints').is_dir():
    raise directory.CheckpointError(
      f'{workdir}: no checkpoints here; --workdir is the one of training'
    )
  wrong = [step for step in steps if not step.isdecimal()]
  if wrong:
    raise directory.CheckpointError(f'--steps: {wrong[0]!r} is no number')
  kept = {int(p.name): p for p in directory.step_folders(workdir)}
  # The training may still be going on and own this folder.
  store = store_lib.Store(workdir, read_only=True)
  if steps:
    chosen = [int(step) for step in steps]
  elif by == 'wer':
    chosen = store.best_steps(num)
  else:
    chosen = sorted(kept, reverse=True)[:num]
  store.close()
  if not kept:
    raise directory.CheckpointError(
      f'{workdir}: no step has been saved yet; averaging needs one'
    )
  missing = [step for step in chosen if step not in kept]
  if missing or not chosen:
    raise directory.CheckpointError(
      f'{workdir}: no step {missing}; there are {sorted(kept)}'
    )
  found = [directory.find(kept[step]) for step in chosen]
  # A generator: checkpoints are read one by one, and never all in memory.
  averaged = average_lib.average(
    dict(zip(('params', 'buffers'), directory.restore(each), strict=True))
    for each in found
  )
  # Of one run, so model, features and tokens are those of all.
  first = found[0].description
  directory.write(
    out,
    directory.Description(
      first.model,
      first.features,
      directory.provenance(averaged_steps=chosen, workdir=str(workdir)),
    ),
    averaged['params'],
    averaged['buffers'],
    tokens=found[0].tokens,
  )
  return chosen
