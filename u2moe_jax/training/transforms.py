"""Gradient transformations that optax lacks, or that are dearer there.

What `clip_by_global_norm` and `scale_by_adam` compute is what optax's of the
same names do, with the same state; they move half as much memory. An update
reads and writes every parameter, so with many experts that is a good part of a
step (docs/benchmarks.md).
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import optax

from u2moe_jax.array_types import PyTree


def clip_by_global_norm(
  max_norm: float,
) -> optax.GradientTransformationExtraArgs:
  """Scales gradients down to a norm, by a factor that is computed once.

  optax divides each element, which XLA then does apart from what follows.

  Args:
    max_norm: largest global norm.

  Returns:
    A transformation whose `update` takes `norm`, that of the gradients, if it
    is known.
  """

  def update(
    gradients: PyTree,
    state: optax.OptState,
    params: PyTree | None = None,
    *,
    norm: jax.Array | None = None,
    **extra: Any,
  ) -> tuple[PyTree, optax.OptState]:
    del params, extra
    if norm is None:
      norm = optax.tree.norm(gradients)
    factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
    scaled = jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)
    return scaled, state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def scale_by_adam(
  b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
  """Adam (arXiv 1412.6980): m / (1 - b1^t) over sqrt(v / (1 - b2^t)) + eps.

  The update is computed from the new moments, behind a barrier. Without it XLA
  computes them once more from the old ones, of which it then makes copies on
  CPU.

  Args:
    b1: decay of the first moment m.
    b2: decay of the second moment v.
    eps: added to the root.
  """
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

  def update(
    gradients: PyTree,
    state: optax.ScaleByAdamState,
    params: PyTree | None = None,
  ) -> tuple[PyTree, optax.ScaleByAdamState]:
    del params
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(gradients, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(gradients, state.nu, b2, 2)
    mu, nu = jax.lax.optimization_barrier((mu, nu))
    updates = jax.tree.map(
      lambda m, v: m / (jnp.sqrt(v) + eps),
      optax.tree.bias_correction(mu, b1, count),
      optax.tree.bias_correction(nu, b2, count),
    )
    return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

  return optax.GradientTransformation(adam.init, update)


class AccumulateState(NamedTuple):
  """Batches of the update that is being gathered.

  Attributes:
    count: batches seen.
    weight: sum of their weights.
    gradients: weighted sum of their gradients.
    inner: state of the wrapped transformation.
  """

  count: jax.Array
  weight: jax.Array
  gradients: PyTree
  inner: PyTree


def accumulate(
  inner: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs:
  """Updates once every so many calls, by the weighted mean of the gradients.

  With weights that are what each loss was divided by, the mean is the
  gradient of one large batch, however differently the batches are filled;
  `optax.MultiSteps`, which weighs all alike, gives that only for equal ones.

  Args:
    inner: what gets the mean.
    every: calls to one update.

  Returns:
    A transformation whose `update` takes `weight` (default 1). A call of
    weight 0 counts; if all of them are, nothing is updated.
  """

  def init(params: PyTree) -> AccumulateState:
    return AccumulateState(
      count=jnp.zeros((), jnp.int32),
      weight=jnp.zeros((), jnp.float32),
      gradients=jax.tree.map(jnp.zeros_like, params),
      inner=inner.init(params),
    )

  def update(
    gradients: PyTree,
    state: AccumulateState,
    params: PyTree | None = None,
    *,
    weight: jax.Array | float = 1.0,
    **extra: Any,
  ) -> tuple[PyTree, AccumulateState]:
    # A norm among them would be that of one batch.
    del extra
    total = state.weight + weight
    gathered = jax.tree.map(
      lambda held, g: held + weight * g, state.gradients, gradients
    )

    def apply(_: None) -> tuple[PyTree, PyTree]:
      mean = jax.tree.map(lambda g: g / total, gathered)
      return inner.update(mean, state.inner, params)

    def hold(_: None) -> tuple[PyTree, PyTree]:
      return jax.tree.map(jnp.zeros_like, gradients), state.inner

    # A branch that is not taken costs nothing: Adam runs once an update.
    full = state.count + 1 == every
    updates, new_inner = jax.lax.cond(full & (total > 0), apply, hold, None)
    return updates, AccumulateState(
      count=(state.count + 1) % every,
      weight=jnp.where(full, 0.0, total),
      gradients=jax.tree.map(lambda g: jnp.where(full, 0.0, g), gathered),
      inner=new_inner,
    )

  return optax.GradientTransformationExtraArgs(init, update)


class EmaState(NamedTuple):
  """Attributes: count: updates done; ema: averaged parameters."""

  count: jax.Array
  ema: PyTree


def average_parameters(decay: float) -> optax.GradientTransformation:
  """Keeps ema <- d ema + (1 - d) params, and leaves the updates alone.

  d = min(decay, (1 + n) / (10 + n)) after n updates, so that the first
  parameters are soon forgotten. It must be the last of a chain, for it takes
  what it gets for the whole update.
  """

  def init(params: PyTree) -> EmaState:
    # A copy: both are donated, and no buffer may be donated twice.
    copy = jax.tree.map(jnp.copy, params)
    return EmaState(count=jnp.zeros((), jnp.int32), ema=copy)

  def update(
    updates: PyTree, state: EmaState, params: PyTree
  ) -> tuple[PyTree, EmaState]:
    count = state.count + 1
    held = jnp.minimum(decay, (1 + count) / (10 + count))
    new = optax.apply_updates(params, updates)
    ema = jax.tree.map(lambda a, b: held * a + (1 - held) * b, state.ema, new)
    return updates, EmaState(count=count, ema=ema)

  return optax.GradientTransformation(init, update)


def only(
  inner: optax.GradientTransformation, mask: Callable[[PyTree], PyTree]
) -> optax.GradientTransformationExtraArgs:
  """Transforms some of the parameters; the others never move.

  `inner` does not even see the others, so that its state has no arrays for
  them.

  Args:
    inner: what gets the chosen ones.
    mask: parameters to a tree of booleans; True for the chosen ones.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params: PyTree) -> optax.OptState:
    return inner.init(_prune(params, mask(params)))

  def update(
    updates: PyTree,
    state: optax.OptState,
    params: PyTree | None = None,
    **extra: Any,
  ) -> tuple[PyTree, optax.OptState]:
    chosen = mask(updates)
    inside = None if params is None else _prune(params, chosen)
    new, state = inner.update(_prune(updates, chosen), state, inside, **extra)
    # The others get updates of zero.
    return graft(jax.tree.map(jnp.zeros_like, updates), new), state

  return optax.GradientTransformationExtraArgs(init, update)


def _prune(tree: PyTree, mask: PyTree) -> PyTree:
  """The nested dict with the chosen leaves; a box of axis names is one."""
  flat, chosen = traverse_util.flatten_dict(tree), _flat_mask(mask)
  return traverse_util.unflatten_dict(
    {path: leaf for path, leaf in flat.items() if chosen[path]}
  )


def _flat_mask(mask: PyTree) -> dict[Any, bool]:
  # A leaf of parameters in their boxes is a box with one boolean in it.
  flat = traverse_util.flatten_dict(mask)
  return {path: any(jax.tree.leaves(leaf)) for path, leaf in flat.items()}


def graft(tree: PyTree, part: PyTree) -> PyTree:
  """A nested dict with some of its leaves replaced."""
  flat = traverse_util.flatten_dict(tree)
  return traverse_util.unflatten_dict(flat | traverse_util.flatten_dict(part))


class GateState(NamedTuple):
  """Attributes: count: calls."""

  count: jax.Array


def gate(
  mask: Callable[[PyTree], PyTree], num_calls: int
) -> optax.GradientTransformation:
  """Zeroes what is not chosen, until it has been called so many times.

  Args:
    mask: parameters to a tree of booleans; True for what always passes.
    num_calls: calls after which everything passes.
  """

  def init(params: PyTree) -> GateState:
    del params
    return GateState(jnp.zeros((), jnp.int32))

  def update(
    updates: PyTree, state: GateState, params: PyTree | None = None
  ) -> tuple[PyTree, GateState]:
    del params
    # Traced, so that opening compiles nothing.
    is_open = state.count >= num_calls
    passed = jax.tree.map(
      lambda x, always: x if always else jnp.where(is_open, x, 0.0),
      updates,
      mask(updates),
    )
    return passed, GateState(state.count + 1)

  return optax.GradientTransformation(init, update)
