"""Adam's moments, from where one training left them into another one.

They travel as `{'mu': ..., 'nu': ..., 'count': ...}`, trees like that of the
parameters and the number of updates, which the correction of the bias needs.
"""

from collections.abc import Collection
from collections.abc import Mapping
from typing import Any

from flax import traverse_util
import jax
import optax

from u2moe_jax.array_types import PyTree

NAMES = ('mu', 'nu')


def saved_at(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
  """Where in a saved optimizer state Adam's is; None if there is none.

  Args:
    shapes: of the saved arrays, by path (`contents.saved_shapes`).
  """
  for path in shapes:
    before, found, _ = f'/{path}'.partition(f'/{NAMES[0]}/')
    if found:
      return before.removeprefix('/')
  return None


def put(opt_state: PyTree, moments: PyTree, kept: Collection[str]) -> PyTree:
  """Replaces moments in an optimizer state; its schedule is left alone.

  Args:
    opt_state: of any chain of ours; parameters that do not train have none.
    moments: see above; they may have more.
    kept: paths of the parameters whose moments are replaced.
  """

  def is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)

  def merged(old: PyTree, new: PyTree) -> PyTree:
    flat = traverse_util.flatten_dict(old, sep='/')
    ours = traverse_util.flatten_dict(new, sep='/')
    chosen = {path: ours[path] for path in flat.keys() & set(kept)}
    return traverse_util.unflatten_dict(flat | chosen, sep='/')

  # The state is a chain of tuples whose form hangs on the config; Adam's part
  # is found by its class.
  def replace(node: Any) -> Any:
    if not is_adam(node):
      return node
    new = {name: merged(getattr(node, name), moments[name]) for name in NAMES}
    return node._replace(count=moments['count'], **new)

  return jax.tree.map(replace, opt_state, is_leaf=is_adam)
