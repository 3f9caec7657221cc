"""Learning-rate schedule and optax chain from the optimizer config."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.training import parameters
from u2moe_jax.training import transforms

# Names of parameters that are matrices; only they decay.
_DECAYED = ('kernel', 'w_in', 'w_out', 'embedding')


def make_schedule(
  config: config_lib.OptimizerConfig, *, num_steps: int
) -> optax.Schedule:
  """Learning rate by update, counted from 0.

  `num_steps` counts batches, `accumulate` of which make one update.

  `warmup_inverse_sqrt` is lr(t) = peak * min(sqrt(w / t), t / w) with
  t = update + 1: the reference's warmuplr, whose peak is at t = w. Without
  warm-up, w = 0, it is peak / sqrt(t).
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  num_updates = num_steps // config.accumulate

  # Updates are counted from 0: one is added so that the first one moves.
  def ramp(step: jax.typing.ArrayLike) -> jax.Array:
    return jnp.minimum(1.0, (step + 1) / max(warmup, 1))

  def inverse_sqrt(step: jax.typing.ArrayLike) -> jax.Array:
    t = step + 1
    if not warmup:
      return peak / jnp.sqrt(t)
    return peak * jnp.minimum(jnp.sqrt(warmup / t), t / warmup)

  def cosine(step: jax.typing.ArrayLike) -> jax.Array:
    progress = (step - warmup) / max(num_updates - warmup, 1)
    wave = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
    share = config.final_rate_share
    return peak * ramp(step) * (share + (1 - share) * wave)

  def constant(step: jax.typing.ArrayLike) -> jax.Array:
    return peak * ramp(step)

  return {
    'warmup_inverse_sqrt': inverse_sqrt,
    'cosine': cosine,
    'constant': constant,
  }[config.schedule]


def decay_mask(params: PyTree) -> PyTree:
  """True for matrices.

  Biases, norms, position scores and depthwise kernels, a few numbers for each
  channel, do not decay.
  """

  # By the start of the name, for `kernel_0` and the like.
  def decays(path: Sequence[Any], _: Any) -> bool:
    names = [str(getattr(entry, 'key', '')) for entry in path]
    return bool(names) and names[-1].startswith(_DECAYED)

  return jax.tree_util.tree_map_with_path(decays, params)


def optimizer_of(config: config_lib.Config) -> optax.GradientTransformation:
  """The optimizer of an experiment."""
  return make_optimizer(
    config.optimizer,
    num_steps=config.train.num_steps,
    trainable=config.train.trainable,
    freeze_steps=config.train.freeze_steps,
  )


def make_optimizer(
  config: config_lib.OptimizerConfig,
  *,
  num_steps: int,
  trainable: str = '',
  freeze_steps: int = 0,
) -> optax.GradientTransformation:
  """Clipping, Adam or AdamW, moving average, accumulation.

  Args:
    config: all of these.
    num_steps: batches in total.
    trainable: see `parameters.selector`; the others have no moments.
    freeze_steps: batches after which the others train too; then they have
      moments from the start.
  """
  schedule = make_schedule(config, num_steps=num_steps)
  mask = parameters.mask(trainable)
  decay = config.weight_decay if config.name == 'adamw' else 0.0
  chain = optax.chain(
    transforms.clip_by_global_norm(config.clip_norm)
    if config.clip_norm
    else optax.identity(),
    optax.chain(
      transforms.scale_by_adam(config.beta1, config.beta2, config.eps),
      optax.add_decayed_weights(decay, decay_mask),
      optax.scale_by_learning_rate(schedule),
    ),
  )
  if freeze_steps:
    # Decay moves parameters that have no gradient. What stands behind an
    # accumulation is called once an update, so calls are counted as such.
    gate = transforms.gate(mask, freeze_steps // config.accumulate)
    chain = optax.chain(chain, gate)
  if config.ema_decay:
    average = transforms.average_parameters(config.ema_decay)
    chain = optax.chain(chain, average)
  if config.accumulate > 1:
    chain = transforms.accumulate(chain, config.accumulate)
  if freeze_steps:
    # Before clipping, so that the norm is that of what trains.
    return optax.chain(transforms.gate(mask, freeze_steps), chain)
  return transforms.only(chain, mask) if trainable else chain


def swap_average(params: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree]:
  """Exchanges the parameters and their moving average, where there is one.

  What is evaluated, saved as a model and averaged is the moving average;
  swapping again gives back what training needs. Parameters that do not train
  have no average and stay.

  Returns:
    Parameters and optimizer state of the same shapes.
  """
  averages: list[PyTree] = []

  def is_average(node: Any) -> bool:
    return isinstance(node, transforms.EmaState)

  def swap(node: Any) -> Any:
    if not is_average(node):
      return node
    averages.append(node.ema)
    return node._replace(ema=_part(params, node.ema))

  swapped = jax.tree.map(swap, opt_state, is_leaf=is_average)
  for average in averages:
    params = transforms.graft(params, average)
  return params, swapped


def _part(tree: PyTree, like: PyTree) -> PyTree:
  """The entries of a nested dict that another one has."""
  if not isinstance(like, dict):
    return tree
  return {key: _part(tree[key], value) for key, value in like.items()}
