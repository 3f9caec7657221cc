"""The train step: a pure function, and the one place that jits it."""

from collections.abc import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from u2moe_jax import config as config_lib
from u2moe_jax.array_types import PyTree
from u2moe_jax.models import u2
from u2moe_jax.sharding import placement
from u2moe_jax.sharding import rules as rules_lib
from u2moe_jax.training import metrics
from u2moe_jax.training import objective
from u2moe_jax.training import optimizer as optimizer_lib
from u2moe_jax.training import parameters as parameters_lib
from u2moe_jax.training.state import TrainState

# Random streams: key = fold_in(fold_in(seed, stream), step).
_CHUNK_STREAM, _DROPOUT_STREAM = 0, 1

Metrics = dict[str, metrics.Mean]
StepFunction = Callable[
  [TrainState, objective.Batch], tuple[TrainState, Metrics]
]


def train_step(
  state: TrainState,
  batch: objective.Batch,
  *,
  model: u2.U2MoeModel,
  optimizer: optax.GradientTransformation,
  config: config_lib.Config,
) -> tuple[TrainState, Metrics]:
  """One update: loss, gradients, optimizer; pure.

  An update whose loss or gradient is not finite is skipped: parameters,
  moments and buffers stay, the step advances, `skipped` counts it. Where
  several batches make one update, only the bad batch is left out of it.
  """
  chunk_key, dropout_key = _keys(config.train.seed, state.step)
  # One chunk size for this batch and another one for the next: that is how one
  # model learns to work with full context and with chunks of any size (U2).
  chunk = objective.draw_training_chunk(chunk_key, batch, config.model.encoder)

  def loss_function(params: PyTree) -> tuple[jax.Array, objective.Objective]:
    result = objective.compute_objective(
      model,
      _without_frozen(params, config.train),
      state.buffers,
      batch,
      config.train,
      chunk=chunk,
      dropout_key=dropout_key,
    )
    return result.loss, result

  gradients, result = jax.grad(loss_function, has_aux=True)(state.params)
  # What is not finite, anywhere in the gradients, shows in their norm.
  norm = optax.tree.norm(gradients)
  finite = jnp.isfinite(result.loss) & jnp.isfinite(norm)
  is_part = config.optimizer.accumulate > 1
  options: dict[str, jax.Array] = {}
  if is_part:
    # What the loss was divided by; see `transforms.accumulate`.
    options['weight'] = jnp.sum(batch.weights)
    if config.train.skip_nonfinite:
      # Zero times infinity would still be no number.
      gradients, options = _zero_unless(finite, (gradients, options))
  elif not config.train.freeze_steps:
    # With it, what is clipped may be a part of the gradients.
    options['norm'] = norm

  def update() -> tuple[PyTree, PyTree]:
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
      gradients, state.opt_state, state.params, **options
    )
    return optax.apply_updates(state.params, updates), opt_state

  def hold() -> tuple[PyTree, PyTree]:
    return state.params, state.opt_state

  buffers = result.outputs.encoder.buffers
  measured = result.metrics | {'gradient_norm': metrics.Mean.of(norm)}
  if not config.train.skip_nonfinite:
    params, opt_state = update()
  else:
    # A part of weight 0 is counted, so that updates stay where they were.
    params, opt_state = (
      update() if is_part else jax.lax.cond(finite, update, hold)
    )
    buffers = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), buffers, state.buffers
    )
    # A sum and a count of 0: a skipped batch does not spoil the others' mean.
    measured = _zero_unless(finite, measured)
  new_state = TrainState(
    step=state.step + 1, params=params, opt_state=opt_state, buffers=buffers
  )
  # For the log only: the optimizer does not tell which rate it took.
  schedule = optimizer_lib.make_schedule(
    config.optimizer, num_steps=config.train.num_steps
  )
  extra = {
    'learning_rate': metrics.Mean.of(
      schedule(state.step // config.optimizer.accumulate)
    ),
    'skipped': metrics.Mean.of(1.0 - finite),
    'chunk_size': metrics.Mean.of(chunk[0]),
  }
  return new_state, measured | extra


def _zero_unless(finite: jax.Array, tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: jnp.where(finite, x, 0.0), tree)


def _without_frozen(params: PyTree, config: config_lib.TrainConfig) -> PyTree:
  """Cuts the gradient of what never trains, so that none is computed."""
  if not config.trainable or config.freeze_steps:
    return params
  return jax.tree.map(
    lambda leaf, trains: leaf if trains else jax.lax.stop_gradient(leaf),
    params,
    parameters_lib.mask(config.trainable)(params),
  )


def _keys(seed: int, step: jax.Array) -> tuple[jax.Array, jax.Array]:
  # A function of seed and step alone: no key is saved, and a run that continues
  # draws what it would have drawn.
  root = jax.random.key(seed)
  chunk_key = jax.random.fold_in(jax.random.fold_in(root, _CHUNK_STREAM), step)
  dropout_key = jax.random.fold_in(
    jax.random.fold_in(root, _DROPOUT_STREAM), step
  )
  return chunk_key, dropout_key


def make_train_step(
  model: u2.U2MoeModel,
  optimizer: optax.GradientTransformation,
  config: config_lib.Config,
  *,
  shardings: TrainState,
  mesh: jax.sharding.Mesh,
  rules: rules_lib.Rules = rules_lib.STANDARD,
) -> StepFunction:
  """Jits the train step; the state is donated, metrics are replicated."""

  # Rules are looked up while tracing, so they are set inside.
  def step(state: TrainState, batch: objective.Batch):
    with nn.logical_axis_rules(rules):
      return train_step(
        state, batch, model=model, optimizer=optimizer, config=config
      )

  # Donated: there is no second copy of parameters and moments.
  return jax.jit(
    step,
    in_shardings=(shardings, placement.batch_sharding(mesh, rules)),
    out_shardings=(shardings, placement.replicated(mesh)),
    donate_argnums=0,
    compiler_options=_compiler_options(mesh),
  )


def _compiler_options(mesh: jax.sharding.Mesh) -> dict[str, str] | None:
  """What XLA is told about the steps of a mesh.

  On CPU two of its choices do not suit training, each measured on two cores. It
  makes the products of small layers with YNNPACK, whose threads cost more than
  they bring: without, a step of the quickstart's model takes 0.88 of the time. But
  long sums it makes better with it: as trees of its own they are a sixth of a step
  of `aishell_u2pp`.
  """
  if mesh.devices.flat[0].platform != 'cpu':
    return None
  return {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}


def eval_step(
  params: PyTree,
  buffers: PyTree,
  batch: objective.Batch,
  *,
  model: u2.U2MoeModel,
  config: config_lib.Config,
) -> tuple[Metrics, jax.Array, jax.Array]:
  """Dev loss under full context, and the CTC best path.

  Returns:
    Metrics, arg-max ids (B, T) and the frame mask (B, T).
  """
  # Without a dropout key there is no dropout, and buffers stay as they are.
  result = objective.compute_objective(
    model, params, buffers, batch, config.train
  )
  best = jnp.argmax(result.outputs.ctc_log_probs, axis=-1)
  return result.metrics, best, result.outputs.encoder.mask


def make_eval_step(
  model: u2.U2MoeModel,
  config: config_lib.Config,
  *,
  shardings: TrainState,
  mesh: jax.sharding.Mesh,
  rules: rules_lib.Rules = rules_lib.STANDARD,
):
  """Jits the evaluation step; nothing is donated."""

  def step(params: PyTree, buffers: PyTree, batch: objective.Batch):
    with nn.logical_axis_rules(rules):
      return eval_step(params, buffers, batch, model=model, config=config)

  return jax.jit(
    step,
    in_shardings=(
      shardings.params,
      shardings.buffers,
      placement.batch_sharding(mesh, rules),
    ),
    out_shardings=placement.replicated(mesh),
    compiler_options=_compiler_options(mesh),
  )
