"""The training state: data only, born sharded."""

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import optax

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import Key
from u2moe_jax.array_types import PyTree
from u2moe_jax.models import u2
from u2moe_jax.sharding import placement
from u2moe_jax.sharding import rules as rules_lib


@struct.dataclass
class TrainState:
  """Everything a step reads and writes.

  Attributes:
    step: updates done; also the number of the next batch.
    params: parameters, float32.
    opt_state: optimizer moments.
    buffers: CMVN, running statistics; never trained.
  """

  step: Int[Array, '']
  params: PyTree
  opt_state: PyTree
  buffers: PyTree


def _init(
  model: u2.U2MoeModel,
  optimizer: optax.GradientTransformation,
  buffers: PyTree,
  key: Key[Array, ''],
) -> TrainState:
  params = u2.init_params(model, key)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    # From parameters in their boxes: moments then have the same logical axes.
    opt_state=optimizer.init(params),
    buffers=buffers,
  )


def state_shardings(
  model: u2.U2MoeModel,
  optimizer: optax.GradientTransformation,
  buffers: PyTree,
  *,
  mesh: jax.sharding.Mesh,
  rules: rules_lib.Rules = rules_lib.STANDARD,
) -> TrainState:
  """Shardings of the whole state, moments included."""
  return placement.shardings(_boxed(model, optimizer, buffers), mesh, rules)


def _boxed(
  model: u2.U2MoeModel,
  optimizer: optax.GradientTransformation,
  buffers: PyTree,
) -> TrainState:
  """Shapes of the state, in boxes that carry the logical axes."""
  return jax.eval_shape(
    lambda key: _init(model, optimizer, buffers, key), jax.random.key(0)
  )


def init_state(
  model: u2.U2MoeModel,
  optimizer: optax.GradientTransformation,
  buffers: PyTree,
  key: Key[Array, ''],
  *,
  shardings: TrainState,
) -> TrainState:
  """Makes the first state where it belongs; nothing is born on one device."""
  # Buffers are an argument: what a function closes over is compiled into it.
  init = jax.jit(
    lambda key, buffers: nn.meta.unbox(_init(model, optimizer, buffers, key)),
    out_shardings=shardings,
  )
  return init(key, buffers)


def abstract_state(
  model: u2.U2MoeModel,
  optimizer: optax.GradientTransformation,
  buffers: PyTree,
  *,
  shardings: TrainState,
) -> TrainState:
  """Shapes, dtypes and shardings of the state, for restoring."""
  return _placed(_boxed(model, optimizer, buffers), shardings)


def _placed(boxed: TrainState, shardings: TrainState) -> TrainState:
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    nn.meta.unbox(boxed),
    shardings,
  )


def abstract_state_on(
  mesh: jax.sharding.Mesh,
  model: u2.U2MoeModel,
  optimizer: optax.GradientTransformation,
  buffers: PyTree,
  *,
  rules: rules_lib.Rules = rules_lib.STANDARD,
) -> TrainState:
  """`state_shardings` and `abstract_state` in one, tracing once."""
  boxed = _boxed(model, optimizer, buffers)
  return _placed(boxed, placement.shardings(boxed, mesh, rules))
