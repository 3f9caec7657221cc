"""Training checkpoints under WORKDIR/checkpoints, through Orbax."""

from collections.abc import Mapping
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from u2moe_jax.array_types import PyTree

_PARAMS, _OPTIMIZER, _PROGRESS = 'params', 'optimizer', 'progress'


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
    read_only: bool = False,
  ):
    """Opens (and creates) WORKDIR/checkpoints.

    Args:
      workdir: the work directory.
      keep_last: newest steps kept.
      keep_best: steps of lowest dev WER kept.
      read_only: neither save nor tidy up.
    """
    policies = checkpoint_managers
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(
        [
          policies.LatestN(keep_last),
          policies.BestN(
            get_metric_fn=_word_error_rate,
            reverse=True,
            n=keep_best,
            keep_checkpoints_without_metrics=False,
          ),
        ]
      ),
      best_fn=_word_error_rate,
      best_mode='min',
      read_only=read_only,
    )
    self._manager = ocp.CheckpointManager(
      pathlib.Path(workdir).absolute() / 'checkpoints',
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
    """Starts to save a step; returns once the arrays are copied."""
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
      force=True,
    )

  def latest_step(self) -> int | None:
    """The newest complete step, or None."""
    return self._manager.latest_step()

  def restore(
    self, step: int, *, params: PyTree, buffers: PyTree, opt_state: PyTree
  ) -> tuple[dict[str, PyTree], PyTree, dict[str, Any]]:
    """Restores a step onto the shardings of abstract trees.

    Returns:
      ({'params', 'buffers'}, opt_state, progress).
    """
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        **{
          _PARAMS: ocp.args.StandardRestore(
            {'params': params, 'buffers': buffers}
          ),
          _OPTIMIZER: ocp.args.StandardRestore(opt_state),
          _PROGRESS: ocp.args.JsonRestore(),
        }
      ),
    )
    return restored[_PARAMS], restored[_OPTIMIZER], restored[_PROGRESS]

  def best_steps(self, count: int) -> list[int]:
    """Up to `count` kept steps of lowest dev WER, best first.

    Steps without a measured WER come last, newest first.
    """

    def order(step: int) -> tuple[float, int]:
      metrics = self._manager.metrics(step) or {}
      return metrics.get('wer', float('inf')), -step

    return sorted(self._manager.all_steps(), key=order)[:count]

  def restore_params(self, step: int, target: PyTree) -> PyTree:
    """Restores `{'params', 'buffers'}` of one step onto `target`."""
    args = ocp.args.Composite(**{_PARAMS: ocp.args.StandardRestore(target)})
    return self._manager.restore(step, args=args)[_PARAMS]

  def wait(self) -> None:
    """Waits until everything is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and lets go of the folder."""
    self._manager.wait_until_finished()
    self._manager.close()


def as_abstract(tree: PyTree) -> PyTree:
  """Shapes, dtypes and shardings of a tree of arrays."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )
