"""One array of an Orbax item at a time, on the host."""

import os
import pathlib

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
    self._tree = contents.saved_tree(self._item)
    self.shapes = contents.shapes(self._tree)

  def __call__(self, path: str) -> np.ndarray:
    """Reads one array.

    Args:
      path: its keys, joined by slashes.

    Raises:
      contents.CheckpointError: if there is none, or it cannot be read.
    """
    if path not in self.shapes:
      raise contents.CheckpointError(f'{self._item}: holds no array {path!r}')
    # The whole tree, since an optimizer state has tuples, of which no part can
    # be asked for; the other arrays are left out.
    flat = ocp.tree.to_flat_dict(self._tree, sep='/')
    wanted = {each: 0 if each == path else ocp.PLACEHOLDER for each in flat}
    argument = ocp.RestoreArgs(restore_type=np.ndarray)
    request = ocp.args.PyTreeRestore(
      item=ocp.tree.from_flat_dict(wanted, target=self._tree, sep='/'),
      restore_args=jax.tree.map(lambda _: argument, self._tree),
    )
    try:
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(self._item, args=request)
    except (ValueError, KeyError, OSError, jax.errors.JaxRuntimeError) as error:
      raise contents.CheckpointError(
        f'{self._item}: {path} cannot be read: {contents.first_line(error)}'
      ) from error
    return np.asarray(ocp.tree.to_flat_dict(tree, sep='/')[path])
