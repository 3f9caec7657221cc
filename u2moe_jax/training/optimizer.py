"""Learning-rate schedule and optax chain from the optimizer config."""

import jax
import jax.numpy as jnp
import optax

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree

# Names of parameters that are matrices; only they decay.
_DECAYED = ('kernel', 'w_in', 'w_out', 'embedding')


def make_schedule(
  config: config_lib.OptimizerConfig, *, num_steps: int
) -> optax.Schedule:
  """Learning rate by update, counted from 0.

  `num_steps` counts batches, `accumulate` of which make one update.

  `warmup_inverse_sqrt` is lr(t) = peak * min(sqrt(w / t), t / w) with
  t = update + 1: the reference's warmuplr, whose peak is at t = w.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  num_updates = num_steps // config.accumulate

  def ramp(step):
    return jnp.minimum(1.0, (step + 1) / warmup)

  def inverse_sqrt(step):
    t = step + 1
    return peak * jnp.minimum(jnp.sqrt(warmup / t), t / warmup)

  def cosine(step):
    progress = (step - warmup) / max(num_updates - warmup, 1)
    wave = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
    share = config.final_rate_share
    return peak * ramp(step) * (share + (1 - share) * wave)

  def constant(step):
    return peak * ramp(step)

  return {
    'warmup_inverse_sqrt': inverse_sqrt,
    'cosine': cosine,
    'constant': constant,
  }[config.schedule]


def decay_mask(params: PyTree) -> PyTree:
  """True for matrices; biases, norms and position scores do not decay."""

  def decays(path, _):
    names = [str(getattr(entry, 'key', '')) for entry in path]
    return bool(names) and names[-1].startswith(_DECAYED)

  return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
  config: config_lib.OptimizerConfig, *, num_steps: int
) -> optax.GradientTransformation:
  """Clipping, Adam or AdamW, accumulation."""
  schedule = make_schedule(config, num_steps=num_steps)
  decay = config.weight_decay if config.name == 'adamw' else 0.0
  chain = optax.chain(
    optax.clip_by_global_norm(config.clip_norm)
    if config.clip_norm
    else optax.identity(),
    optax.adamw(
      schedule,
      b1=config.beta1,
      b2=config.beta2,
      eps=config.eps,
      weight_decay=decay,
      mask=decay_mask,
    ),
  )
  if config.accumulate > 1:
    multi = optax.MultiSteps(chain, every_k_schedule=config.accumulate)
    return multi.gradient_transformation()
  return chain
