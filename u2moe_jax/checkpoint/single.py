"""One array of an Orbax item at a time, on the host."""

import os
import pathlib

from flax import traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp

from u2moe_jax.checkpoint import contents


class Reader:
  """Reads the arrays of an item, each when it is asked for.

  For what needs them in turn, and would not have room for all of them.

  Attributes:
    shapes: what there is, by path.
  """

  def __init__(self, item: str | os.PathLike[str]):
    """Reads the item's metadata only.

    Args:
      item: folder of the Orbax item.

    Raises:
      contents.CheckpointError: if its metadata cannot be read.
    """
    self._item = pathlib.Path(item).absolute()
    self.shapes = contents.saved_shapes(self._item)

  def __call__(self, path: str) -> np.ndarray:
    """Reads one array.

    Args:
      path: its keys, joined by slashes.

    Raises:
      contents.CheckpointError: if there is none, or it cannot be read.
    """
    if path not in self.shapes:
      raise contents.CheckpointError(f'{self._item}: holds no array {path!r}')
    flat = {tuple(path.split('/')): ocp.RestoreArgs(restore_type=np.ndarray)}
    arguments = traverse_util.unflatten_dict(flat)
    request = ocp.args.PyTreeRestore(
      item=arguments, restore_args=arguments, partial_restore=True
    )
    try:
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(self._item, args=request)
    except (ValueError, KeyError, OSError, jax.errors.JaxRuntimeError) as error:
      raise contents.CheckpointError(
        f'{self._item}: {path} cannot be read: {contents.first_line(error)}'
      ) from error
    (array,) = traverse_util.flatten_dict(tree).values()
    return np.asarray(array)
