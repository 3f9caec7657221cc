"""Carries a routing plan out: every token through its experts' two layers.

One signature, `expert_feed_forward`, over several executors:

  dense     every expert on every token, masked: the oracle
  capacity  a buffer of slots per expert, batched products; may drop in
            training, never at evaluation
  blocked   tokens sorted by expert, in blocks that belong to one expert;
            dropless, static shapes, its own gradient; the choice for CPU
  ragged    `lax.ragged_dot`; XLA expands it to all experts on CPU and most
            GPUs, so it is never chosen by default there
  tokamax   the same by the kernels of tokamax, an optional extra

Each is a file of its name in `ops/executors`; to add one, add a file.
"""

from collections.abc import Callable
import dataclasses
import importlib

from flax import struct
import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import typechecked
from u2moe_jax.config import Executor
from u2moe_jax.ops import quantization
from u2moe_jax.ops.dropout import ExpertDropout
from u2moe_jax.ops.routing import Routing

Activation = Callable[[Array], Array]


@struct.dataclass
class ExpertWeights:
  """Two-layer feed-forward experts, stacked: the form that trains."""

  w_in: Float[Array, 'E D M']
  b_in: Float[Array, 'E M']
  w_out: Float[Array, 'E M D']
  b_out: Float[Array, 'E D']


@struct.dataclass
class OneExpert:
  """One of them, its matrices (D, M) and (M, D) in floats or in 8 bits."""

  w_in: quantization.Matrix
  b_in: Float[Array, 'M']
  w_out: quantization.Matrix
  b_out: Float[Array, 'D']


@struct.dataclass
class SeparateExpert:
  """One of them, its matrices transposed: (M, D) and (D, M).

  XLA:CPU multiplies few rows faster with the matrix on the left: two layers of
  640 x 2560 by 4, 8, 16, 64 and 128 rows take 0.76, 0.71, 0.77, 0.79 and 0.97
  of the time.
  """

  w_in: quantization.Matrix
  b_in: Float[Array, 'M']
  w_out: quantization.Matrix
  b_out: Float[Array, 'D']

  @classmethod
  def of(cls, one: OneExpert) -> 'SeparateExpert':
    """Transposes an expert."""
    return cls(
      w_in=one.w_in.T, b_in=one.b_in, w_out=one.w_out.T, b_out=one.b_out
    )

  def transposed(self) -> OneExpert:
    """Transposes it back."""
    return OneExpert(
      w_in=self.w_in.T, b_in=self.b_in, w_out=self.w_out.T, b_out=self.b_out
    )


# One array per expert and parameter: on CPU `blocked` then copies no slice of a
# stack, which is what inference wants.
SeparateWeights = tuple[SeparateExpert, ...]


@dataclasses.dataclass(frozen=True)
class Options:
  """How experts run.

  Attributes:
    activation: between the two layers.
    executor: see the module docstring.
    capacity_factor: slots per expert over the even share, for `capacity`;
      None means as many as could ever be needed, so that nothing is dropped.
    block_size: rows per block of `blocked`; 0 chooses by size.
  """

  activation: Activation
  executor: Executor = 'auto'
  capacity_factor: float | None = None
  block_size: int = 0


@struct.dataclass
class Execution:
  """What an executor returns: outputs, and how many pairs it dropped."""

  output: Float[Array, 'S D']
  num_dropped: Float[Array, '']


# Which executor `auto` is, by platform and most tokens of a device; measured
# (docs/benchmarks.md). On GPU `ragged` computes all experts, and equal groups
# reach more of the peak than ragged kernels do. Platforms that do not stand
# here are taken for GPUs.
_AUTO: dict[str, tuple[tuple[float, str], ...]] = {
  'cpu': ((float('inf'), 'blocked'),),
  'gpu': ((float('inf'), 'capacity'),),
  'tpu': ((float('inf'), 'capacity'),),
}


def choose(
  executor: Executor, num_tokens: int, platform: str | None = None
) -> Executor:
  """Resolves `auto` for S tokens; leaves any other name alone.

  Args:
    executor: a name or `auto`.
    num_tokens: S, on one device.
    platform: cpu, gpu or tpu; None asks JAX.
  """
  if executor != 'auto':
    return executor
  table = _AUTO.get(platform or jax.default_backend(), _AUTO['gpu'])
  return next(name for most, name in table if num_tokens <= most)


@typechecked
def expert_feed_forward(
  x: Float[Array, 'S D'],
  plan: Routing,
  weights: ExpertWeights | SeparateWeights,
  options: Options,
  dropout: ExpertDropout | None = None,
) -> Execution:
  """Computes y_s = sum_j weight_sj FFN_index(s,j)(x_s), on one device.

  `layers/expert_parallel.py` does the same on a mesh.

  Args:
    x: tokens.
    plan: which experts each token visits; padded tokens visit none.
    weights: the experts.
    options: the activation, and which executor.
    dropout: of the hidden units, behind the activation; None for none.

  Returns:
    Outputs (zero for padded tokens) in x's dtype, and the number of (token,
    expert) pairs that were dropped.
  """
  # Parameters may be NumPy arrays, which a traced index cannot index.
  weights = jax.tree.map(jnp.asarray, weights)
  name = choose(options.executor, x.shape[0])
  # Late, because executors import this module for its structs.
  module = importlib.import_module(f'u2moe_jax.ops.executors.{name}')
  return module.run(x, plan, weights, options, dropout)


def nothing_dropped(output: Float[Array, 'S D']) -> Execution:
  """The result of a dropless executor."""
  return Execution(output=output, num_dropped=jnp.zeros((), jnp.float32))


def one_expert(weights: ExpertWeights, index: Int[Array, ''] | int):
  """Takes one expert out of a stack."""
  return OneExpert(
    w_in=weights.w_in[index],
    b_in=weights.b_in[index],
    w_out=weights.w_out[index],
    b_out=weights.b_out[index],
  )


def put_expert(
  weights: ExpertWeights, index: Int[Array, ''] | int, expert: OneExpert
) -> ExpertWeights:
  """Replaces one expert of a stack."""

  def put(name: str) -> Array:
    one = getattr(expert, name)
    return jax.lax.dynamic_update_index_in_dim(
      getattr(weights, name), one, index, axis=0
    )

  return ExpertWeights(
    w_in=put('w_in'),
    b_in=put('b_in'),
    w_out=put('w_out'),
    b_out=put('b_out'),
  )


def separate(weights: ExpertWeights) -> SeparateWeights:
  """Unstacks."""
  return tuple(
    SeparateExpert.of(one_expert(weights, e)) for e in range(len(weights.w_in))
  )


def stacked(weights: ExpertWeights | SeparateWeights) -> ExpertWeights:
  """Stacks what is not stacked, in floats."""
  if isinstance(weights, ExpertWeights):
    return weights
  experts = [expert.transposed() for expert in weights]

  def stack(name: str) -> Array:
    parts = (getattr(expert, name) for expert in experts)
    return jnp.stack([quantization.dequantize(part) for part in parts])

  return ExpertWeights(
    w_in=stack('w_in'),
    b_in=stack('b_in'),
    w_out=stack('w_out'),
    b_out=stack('b_out'),
  )
