"""Named groups of parameters, and which of them train."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import fnmatch
import math
from typing import Any

import jax

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree

# Patterns of paths such as encoder/blocks/ffn_final/router/kernel; a star also
# matches slashes. Experts are stacked arrays, dense layers have a kernel, so
# `experts` matches nothing in a dense model.
GROUPS: Mapping[str, tuple[str, ...]] = {
  'all': ('*',),
  'encoder': ('encoder/*',),
  'decoder': ('forward_decoder/*', 'backward_decoder/*'),
  'ctc': ('ctc/*',),
  'subsampling': ('encoder/subsampling/*',),
  'attention': (
    '*/attention/*',
    '*/self_attention/*',
    '*/cross_attention/*',
  ),
  'convolution': ('*/convolution/*',),
  'feed_forward': ('*/ffn*/*',),
  'experts': ('*/ffn*/w_in', '*/ffn*/b_in', '*/ffn*/w_out', '*/ffn*/b_out'),
  'router': ('*/router/*',),
  'norms': ('*/norm/*', '*/norm_*/*'),
  'vocabulary': ('ctc/*', '*_decoder/embedding/*', '*_decoder/output/*'),
}


def paths(tree: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
  """Leaves by path, the keys joined by slashes; boxes are looked through."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {_path(entries): leaf for entries, leaf in leaves}


def _path(entries: Sequence[Any]) -> str:
  # The entry of a box is an attribute, which has no key.
  keys = [getattr(entry, 'key', None) for entry in entries]
  return '/'.join(key for key in keys if isinstance(key, str))


def matches(path: str, name: str) -> bool:
  """Whether a path belongs to a group, or fits a pattern."""
  return any(fnmatch.fnmatchcase(path, p) for p in GROUPS.get(name, (name,)))


def selector(spec: str) -> Callable[[str], bool]:
  """Turns `train.trainable` into a test of paths.

  Args:
    spec: groups and patterns, joined by commas; `-NAME` takes some out again;
      if the first one does, it is out of all. Empty means all.
  """
  names = [name.strip() for name in spec.split(',') if name.strip()]
  if not names or names[0].startswith('-'):
    names.insert(0, 'all')

  def is_chosen(path: str) -> bool:
    # The last name that matches decides.
    chosen = False
    for name in names:
      if matches(path, name.removeprefix('-')):
        chosen = not name.startswith('-')
    return chosen

  return is_chosen


def mask(spec: str) -> Callable[[PyTree], PyTree]:
  """A function from parameters to a tree that is True where `spec` chooses."""
  is_chosen = selector(spec)

  def of(params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(
      lambda entries, _: is_chosen(_path(entries)), params
    )

  return of


def require_known(spec: str, params: PyTree) -> None:
  """Checks that every name of `train.trainable` stands for something.

  Args:
    spec: see `selector`.
    params: the model's, abstract or not.

  Raises:
    config_lib.ConfigError: for a name without parameters, or if none trains.
  """
  known = paths(params)
  for entry in spec.split(','):
    name = entry.strip().removeprefix('-')
    if name and not any(matches(path, name) for path in known):
      raise config_lib.ConfigError(
        f'train.trainable: {name!r} matches no parameter of this model; '
        f'groups: {", ".join(GROUPS)}; or a pattern such as '
        f'{next(iter(known))!r}'
      )
  if not any(map(selector(spec), known)):
    raise config_lib.ConfigError(
      f'train.trainable={spec!r} leaves nothing to train'
    )


def table(spec: str, params: PyTree, *, depth: int = 3) -> str:
  """What trains: a line for each part of the model, and one for all.

  Args:
    spec: see `selector`.
    params: the model's, abstract or not.
    depth: path components that make a part.
  """
  is_chosen = selector(spec)
  rows: dict[str, list[int]] = {}
  for path, leaf in paths(params).items():
    size = math.prod(leaf.shape)
    trained = size if is_chosen(path) else 0
    for name in ('/'.join(path.split('/')[:-1][:depth]), 'all'):
      row = rows.setdefault(name, [0, 0])
      row[0] += size
      row[1] += trained
  rows['all'] = rows.pop('all')  # last
  width = max(map(len, rows))
  lines = [f'{"part":{width}} {"parameters":>13} {"trained":>13}']
  for name, (size, trained) in rows.items():
    lines.append(f'{name:{width}} {size:13,} {trained:13,}')
  return '\n'.join(lines)
