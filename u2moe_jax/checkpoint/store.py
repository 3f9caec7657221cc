"""Training checkpoints under WORKDIR/checkpoints, through Orbax."""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import re
import shutil
from typing import Any

from absl import logging
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from u2moe_jax.array_types import PyTree
from u2moe_jax.checkpoint import contents
from u2moe_jax.checkpoint import directory
from u2moe_jax.checkpoint import processes

_PARAMS, _OPTIMIZER, _PROGRESS = 'params', 'optimizer', 'progress'
# Where checkpoints go that cannot be read, for whoever wants to save something.
UNREADABLE = 'unreadable_checkpoints'


class SaveError(OSError):
  """A checkpoint that could not be written; the message says what is left."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """A step that was read back.

  Attributes:
    step: its number.
    params: parameters.
    buffers: buffers.
    opt_state: whatever was saved as such.
    progress: whatever was saved as such.
  """

  step: int
  params: PyTree
  buffers: PyTree
  opt_state: PyTree
  progress: dict[str, Any]


def _word_error_rate(metrics: Mapping[str, float]) -> float:
  return metrics['wer']


class Store:
  """Saves and restores steps; atomic, asynchronous.

  Each step has the items `params` (parameters and buffers), `optimizer` and
  `progress`: separate ones, because a part of one saved tree cannot be
  restored.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    keep_last: int = 2,
    keep_best: int = 5,
    keep_every: int = 0,
    read_only: bool = False,
  ):
    """Opens (and creates) WORKDIR/checkpoints.

    Args:
      workdir: the work directory.
      keep_last: newest steps kept.
      keep_best: steps of lowest dev WER kept.
      keep_every: steps at whose multiples all are kept; 0 for none.
      read_only: neither save nor tidy up.
    """
    policies = checkpoint_managers
    kept = [
      policies.LatestN(keep_last),
      policies.BestN(
        get_metric_fn=_word_error_rate,
        # The lowest WER is the best.
        reverse=True,
        n=keep_best,
        keep_checkpoints_without_metrics=False,
      ),
    ]
    if keep_every:
      kept.append(policies.EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(kept),
      best_fn=_word_error_rate,
      best_mode='min',
      read_only=read_only,
      # What a save that was cut short has left.
      cleanup_tmp_directories=not read_only,
    )
    self._folder = pathlib.Path(workdir).absolute() / 'checkpoints'
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=options,
      item_names=(_PARAMS, _OPTIMIZER, _PROGRESS),
    )

  def save(
    self,
    step: int,
    *,
    params: PyTree,
    buffers: PyTree,
    opt_state: PyTree,
    progress: Mapping[str, Any],
    wer: float | None = None,
  ) -> None:
    """Starts to save a step; returns once the arrays are copied.

    Raises:
      SaveError: if this save, or the one before it, failed.
    """
    # One save at a time; what went wrong with the last one is told now.
    self.wait()
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          **{
            _PARAMS: ocp.args.StandardSave(
              {'params': params, 'buffers': buffers}
            ),
            _OPTIMIZER: ocp.args.StandardSave(opt_state),
            _PROGRESS: ocp.args.JsonSave(dict(progress)),
          }
        ),
        metrics=None if wer is None else {'wer': float(wer)},
        # The caller knows when to save; the manager need not agree.
        force=True,
      )
    except Exception as error:
      raise self._save_error(error) from error

  def _save_error(self, error: Exception) -> SaveError:
    # Anything: what a full disk raises depends on the layer that notices.
    steps = self._steps_on_disk()
    left = f'the newest there is step {steps[-1]}' if steps else 'there is none'
    return SaveError(
      f'{self._folder}: a checkpoint could not be written ({_cause(error)}); '
      f'{left}; make room (or the folder writable), then run the same command '
      'to continue'
    )

  def _steps_on_disk(self) -> list[int]:
    folders = directory.step_folders(self._folder.parent)
    return [int(folder.name) for folder in folders]

  def latest_step(self) -> int | None:
    """The newest complete step, or None."""
    return self._manager.latest_step()

  def restore(
    self, step: int, *, params: PyTree, buffers: PyTree, opt_state: PyTree
  ) -> Restored:
    """Restores a step onto the shardings of abstract trees.

    Raises:
      contents.MisfitError: if it is a step of another model.
      Exception: whatever Orbax raises for files that are damaged.
    """
    variables = {'params': params, 'buffers': buffers}
    folder = self._folder / str(step)
    contents.require_fit(folder / _PARAMS, variables)
    contents.require_fit(folder / _OPTIMIZER, opt_state)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        **{
          _PARAMS: ocp.args.StandardRestore(variables),
          _OPTIMIZER: ocp.args.StandardRestore(opt_state),
          _PROGRESS: ocp.args.JsonRestore(),
        }
      ),
    )
    return Restored(
      step=step,
      **restored[_PARAMS],
      opt_state=restored[_OPTIMIZER],
      progress=restored[_PROGRESS],
    )

  def restore_newest(
    self, *, params: PyTree, buffers: PyTree, opt_state: PyTree
  ) -> Restored | None:
    """Restores the newest step that can be read; None if there is no step.

    Newer ones that cannot be read are moved to WORKDIR/unreadable_checkpoints,
    with a warning, since training is about to come to their steps again.

    Raises:
      contents.CheckpointError: if there are steps and none can be read, or if
        they are of another model; nothing is moved, then.
    """
    unreadable: dict[int, str] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        restored = self.restore(
          step, params=params, buffers=buffers, opt_state=opt_state
        )
      # Older steps are of the same other model, and nothing is damaged.
      except contents.MisfitError:
        raise
      except Exception as error:  # Orbax raises many kinds for damaged files
        unreadable[step] = contents.first_line(error)
        continue
      # Moved only now: with nothing readable the user should find all in place.
      for each, reason in unreadable.items():
        self._set_aside(each, reason, instead=step)
      return restored
    if unreadable:
      newest = max(unreadable)
      raise contents.CheckpointError(
        f'{self._folder}: none of the steps {sorted(unreadable)} can be read; '
        f'of {newest}: {unreadable[newest]}; bring back a good copy, or choose '
        'another --workdir'
      )
    return None

  def _set_aside(self, step: int, reason: str, *, instead: int) -> None:
    target = _free(self._folder.parent / UNREADABLE / str(step))
    logging.warning(
      '%s cannot be read (%s); it is moved to %s, and step %d is used',
      self._folder / str(step),
      reason,
      target,
      instead,
    )
    if processes.is_first():
      target.parent.mkdir(exist_ok=True)
      (self._folder / str(step)).rename(target)
    processes.wait(f'set aside {step}')
    # The manager remembers what it saw when it was opened.
    self._manager.reload()

  def wer(self, step: int) -> float | None:
    """The dev WER of a step, or None if it was not measured."""
    return (self._manager.metrics(step) or {}).get('wer')

  def set_wer(self, step: int, wer: float) -> None:
    """Adds the dev WER to a step that was saved without one."""
    self.wait()
    if processes.is_first():
      # By a rename, so that a step has its metrics whole or not at all.
      unfinished = self._folder / str(step) / 'metrics.unfinished'
      shutil.rmtree(unfinished, ignore_errors=True)
      unfinished.mkdir()
      text = json.dumps({'wer': float(wer)})
      (unfinished / 'metrics').write_text(text, encoding='utf-8')
      unfinished.rename(unfinished.with_name('metrics'))
    processes.wait(f'set wer {step}')
    self._manager.reload()

  def best_steps(self, count: int) -> list[int]:
    """Up to `count` kept steps of lowest dev WER, best first.

    Steps without a measured WER come last, newest first.
    """

    def order(step: int) -> tuple[float, int]:
      wer = self.wer(step)
      return float('inf') if wer is None else wer, -step

    return sorted(self._manager.all_steps(), key=order)[:count]

  def restore_params(self, step: int, target: PyTree) -> PyTree:
    """Restores `{'params', 'buffers'}` of one step onto `target`."""
    contents.require_fit(self._folder / str(step) / _PARAMS, target)
    args = ocp.args.Composite(**{_PARAMS: ocp.args.StandardRestore(target)})
    return self._manager.restore(step, args=args)[_PARAMS]

  def check(self) -> None:
    """Raises SaveError if a save in the background has failed by now."""
    try:
      self._manager.check_for_errors()
    except Exception as error:
      raise self._save_error(error) from error

  def wait(self) -> None:
    """Waits until everything is on disk; SaveError if it is not."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._save_error(error) from error

  def close(self) -> None:
    """Waits and lets go of the folder; SaveError as `wait`."""
    self.wait()
    self._manager.close()


def _cause(error: Exception) -> str:
  """What the system says, without all the layers above it."""
  line = contents.first_line(error)
  number = re.search(r"os_error_code='(\d+)'", line)
  return os.strerror(int(number[1])) if number else line


def _free(path: pathlib.Path) -> pathlib.Path:
  """The path, or the first of PATH.1, PATH.2, ... that is not taken."""
  free, number = path, 0
  while free.exists():
    number += 1
    free = path.with_name(f'{path.name}.{number}')
  return free


def as_abstract(tree: PyTree) -> PyTree:
  """Shapes, dtypes and shardings of a tree of arrays."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )
