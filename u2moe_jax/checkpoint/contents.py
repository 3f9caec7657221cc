"""What an Orbax item holds, told before any of its arrays is read."""

import os
import pathlib

import orbax.checkpoint as ocp

from u2moe_jax.array_types import PyTree

# So many arrays that do not fit are named; one is often enough to understand.
_NAMED = 3


class CheckpointError(ValueError):
  """A folder that cannot be read as a checkpoint; says what was found."""


class MisfitError(CheckpointError):
  """A checkpoint of another model; the message names arrays and shapes."""


def saved_shapes(item: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
  """Shapes of the arrays of an item, by their path.

  Raises:
    CheckpointError: if the item's metadata cannot be read.
  """
  return shapes(saved_tree(item))


def saved_tree(item: str | os.PathLike[str]) -> PyTree:
  """The tree of an item, with metadata in place of arrays.

  Raises:
    CheckpointError: if the item's metadata cannot be read.
  """
  item = pathlib.Path(item)
  try:
    return ocp.StandardCheckpointHandler().metadata(item).tree
  except (ValueError, KeyError, OSError, AttributeError) as error:
    raise CheckpointError(
      f'{item}: its metadata cannot be read: {first_line(error)}'
    ) from error


def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  """Shapes of a tree of arrays, abstract or not, by their path."""
  flat = ocp.tree.to_flat_dict(tree, sep='/')
  return {str(path): tuple(leaf.shape) for path, leaf in flat.items()}


def require_fit(item: str | os.PathLike[str], target: PyTree) -> None:
  """Checks that an item holds the arrays that a tree asks for.

  Orbax would find out itself, but only after it has begun to read, and those
  reads it leaves behind.

  Args:
    item: folder of the Orbax item.
    target: abstract arrays.

  Raises:
    MisfitError: if arrays are missing, left over or of another shape.
    CheckpointError: if the item's metadata cannot be read.
  """
  saved, wanted = saved_shapes(item), shapes(target)
  wrong = [
    f'{path} is {_or_missing(saved.get(path))} in the checkpoint and '
    f'{_or_missing(wanted.get(path))} in the model'
    for path in sorted(saved.keys() | wanted.keys())
    if saved.get(path) != wanted.get(path)
  ]
  if wrong:
    more = len(wrong) - _NAMED
    raise MisfitError(
      f'{item}: cannot be restored into this model: '
      + '; '.join(wrong[:_NAMED])
      + (f'; and {more} more' if more > 0 else '')
    )


def _or_missing(shape: tuple[int, ...] | None) -> str:
  return 'missing' if shape is None else str(shape)


def first_line(error: BaseException) -> str:
  """The first line of a message; the class where there is none."""
  # TensorStore appends a page of its own state to each message.
  text, _, _ = str(error).partition('See full TensorStore details')
  lines = text.strip().splitlines()
  return lines[0] if lines else type(error).__name__
