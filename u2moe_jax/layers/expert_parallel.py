"""Experts on a mesh: tokens travel to the devices that hold their experts.

Each device keeps its own tokens. Where an axis of the mesh splits the experts,
a device puts its tokens into C slots for each of all E experts; `all_to_all`
brings every slot to the device of its expert and, after the two layers, back.
The buffers are static: with C = the tokens of a device nothing can be dropped;
`capacity` in training takes a factor over the even share, and what finds no
slot is counted. Where an axis splits the hidden width, each device computes a
part of every sum.

Without a mesh, or on one device, this is `grouped_matmul`.
"""

import dataclasses
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import typechecked
from u2moe_jax.ops import grouped_matmul
from u2moe_jax.ops import permutation
from u2moe_jax.ops.dropout import ExpertDropout
from u2moe_jax.ops.dropout import RowDropout
from u2moe_jax.ops.executors import capacity as capacity_lib
from u2moe_jax.ops.routing import Routing
from u2moe_jax.sharding import axes
from u2moe_jax.sharding import rules as rules_lib

_Spec = jax.sharding.PartitionSpec


@dataclasses.dataclass(frozen=True)
class _Split:
  """Which axes of the mesh split what, and into how many parts.

  Attributes:
    tokens: axes of the batch.
    experts: axes of the experts; some of those of the batch.
    hidden: axes of the hidden width.
    sizes: of every axis.
  """

  tokens: tuple[str, ...]
  experts: tuple[str, ...]
  hidden: tuple[str, ...]
  sizes: dict[str, int]

  def parts(self, names: tuple[str, ...]) -> int:
    return math.prod(self.sizes[name] for name in names)


def _split() -> _Split | None:
  """How the mesh and the rules in force split things; None for one device."""
  mesh = jax.sharding.get_abstract_mesh()
  rules = nn.get_logical_axis_rules()
  if mesh.empty or mesh.size == 1 or not rules:
    return None
  sizes = dict(mesh.shape)

  def named(axis: str) -> tuple[str, ...]:
    names = rules_lib.mesh_axes(rules, axis)
    return tuple(name for name in names if sizes.get(name, 1) > 1)

  return _Split(named(axes.BATCH), named(axes.EXPERT), named(axes.MLP), sizes)


def expert_parts() -> int:
  """Over how many devices the experts are split."""
  split = _split()
  return 1 if split is None else split.parts(split.experts)


@typechecked
def expert_feed_forward(
  x: Float[Array, 'S D'],
  plan: Routing,
  weights: grouped_matmul.ExpertWeights | grouped_matmul.SeparateWeights,
  options: grouped_matmul.Options,
  dropout: ExpertDropout | None = None,
) -> grouped_matmul.Execution:
  """As `grouped_matmul.expert_feed_forward`, on the mesh in force.

  The tokens are those of all devices, those of a device next to each other.
  """
  split = _split()
  run = grouped_matmul.expert_feed_forward
  if split is None:
    return run(x, plan, weights, options, dropout)
  # A mesh splits an axis, so experts that are separate arrays are stacked.
  weights = grouped_matmul.stacked(weights)
  if split.experts:
    run = functools.partial(_exchange, split=split)
  num_tokens = x.shape[0]
  # `shard_map` takes parts of one size only.
  more = -num_tokens % split.parts(split.tokens)
  x, plan, dropout = _pad(x, plan, dropout, more)
  hidden_parts = split.parts(split.hidden)

  def on_device(
    x: Array,
    plan: Routing,
    weights: grouped_matmul.ExpertWeights,
    dropout: ExpertDropout | None,
  ) -> tuple[Array, Array]:
    if dropout is not None and split.hidden:
      # A device holds a part of the units of every pair.
      part = jax.lax.axis_index(split.hidden)
      first = jnp.uint32(part * weights.b_in.shape[1])
      dropout = dataclasses.replace(dropout, first_unit=first)
    # Each part of the hidden width adds the bias; together they add it once.
    b_out = weights.b_out / hidden_parts
    weights = dataclasses.replace(weights, b_out=b_out)
    executed = run(x, plan, weights, options, dropout)
    # An axis in front, along which the parts of a sum stand side by side.
    return executed.output[None], executed.num_dropped[None]

  tokens, experts = split.tokens or None, split.experts or None
  hidden = split.hidden or None
  # Sums over devices are taken outside, where the compiler sees them; within,
  # nothing but `all_to_all` communicates. An input that is the same on some
  # devices gets its gradient summed over them (that is how a gradient of
  # `shard_map` is defined), without `check_vma`, which kernels do not know.
  output, num_dropped = jax.shard_map(
    on_device,
    in_specs=(
      _Spec(tokens),
      _Spec(tokens),
      grouped_matmul.ExpertWeights(
        w_in=_Spec(experts, None, hidden),
        b_in=_Spec(experts, hidden),
        w_out=_Spec(experts, hidden, None),
        b_out=_Spec(experts, None),
      ),
      _dropout_spec(dropout, tokens),
    ),
    out_specs=(_Spec(hidden, tokens), _Spec(tokens)),
    check_vma=False,
  )(x, plan, weights, dropout)
  return grouped_matmul.Execution(
    output=jnp.sum(output, axis=0)[:num_tokens],
    num_dropped=jnp.sum(num_dropped),
  )


def _dropout_spec(
  dropout: ExpertDropout | None, tokens: tuple[str, ...] | None
) -> ExpertDropout | None:
  """Pairs go where their tokens go; the key goes everywhere."""
  if dropout is None:
    return None
  everywhere = _Spec()
  return ExpertDropout(
    words=everywhere,
    pairs=_Spec(tokens),
    first_unit=everywhere,
    rate=dropout.rate,
  )


def _pad(
  x: Array, plan: Routing, dropout: ExpertDropout | None, more: int
) -> tuple[Array, Routing, ExpertDropout | None]:
  """Adds padded tokens, so that every device gets as many."""
  if not more:
    return x, plan, dropout

  def pad(array: Array, value: float) -> Array:
    widths = ((0, more),) + ((0, 0),) * (array.ndim - 1)
    return jnp.pad(array, widths, constant_values=value)

  plan = dataclasses.replace(
    plan,
    expert_index=pad(plan.expert_index, plan.num_experts),
    weight=pad(plan.weight, 0.0),
    mask=pad(plan.mask, False),
  )
  if dropout is not None:
    dropout = dataclasses.replace(dropout, pairs=pad(dropout.pairs, 0))
  return pad(x, 0), plan, dropout


def _exchange(
  x: Float[Array, 'S D'],
  plan: Routing,
  weights: grouped_matmul.ExpertWeights,
  options: grouped_matmul.Options,
  dropout: ExpertDropout | None,
  *,
  split: _Split,
) -> grouped_matmul.Execution:
  """One device's part; `weights` are those of its experts only."""
  num_tokens, num_kept = plan.expert_index.shape
  num_devices = split.parts(split.experts)
  num_own = plan.num_experts // num_devices
  executor = grouped_matmul.choose(options.executor, num_tokens)
  drops = executor == 'capacity'
  factor = options.capacity_factor if drops else None
  capacity = capacity_lib.slots_per_expert(
    num_tokens, num_kept, plan.num_experts, factor
  )
  slots, num_dropped = capacity_lib.make_slots(plan, capacity)
  # Part i of the first axis goes to device i, and what arrives lies in the
  # order of the senders. Twice is the identity, so it is also the way back.
  travel = functools.partial(
    jax.lax.all_to_all,
    axis_name=split.experts,
    split_axis=0,
    concat_axis=0,
    tiled=True,
  )

  def receive(sent: Array) -> Array:
    # Slots stand expert after expert, so a device's are next to each other:
    # they travel as [devices, own experts, C, ...].
    sent = sent.reshape(num_devices, num_own, capacity, *sent.shape[1:])
    # What was sent to devices has come from devices: own experts first.
    return jnp.swapaxes(travel(sent), 0, 1)  # [own experts, devices, C, ...]

  rows = receive(permutation.dispatch(x, slots))
  row_dropout = permutation.row_dropout(dropout, slots)
  if row_dropout is not None:
    # The numbers of the pairs travel with them.
    row_dropout = dataclasses.replace(
      row_dropout, rows=receive(row_dropout.rows)
    )
  if drops:
    groups = rows.reshape(num_own, num_devices * capacity, -1)
    output = capacity_lib.equal_groups(
      groups, weights, options.activation, row_dropout
    )
  else:
    # With a slot for every token most are empty; executors that can skip them
    # are told which.
    is_filled = receive(slots.source < num_tokens)
    options = dataclasses.replace(options, executor=executor)
    output = _run_received(rows, is_filled, weights, options, row_dropout)
  output = jnp.swapaxes(output.reshape(rows.shape), 0, 1)  # as it was sent
  output = travel(output).reshape(plan.num_experts * capacity, -1)  # [E * C, D]
  return grouped_matmul.Execution(
    output=permutation.combine(output, plan.weight, slots),
    num_dropped=num_dropped,
  )


def _run_received(
  rows: Array,
  is_filled: Array,
  weights: grouped_matmul.ExpertWeights,
  options: grouped_matmul.Options,
  dropout: RowDropout | None,
) -> Array:
  """Runs any executor on rows whose expert is known; empty ones cost little.

  Args:
    rows: (own experts, devices, C, D).
    is_filled: False for slots that stayed empty.
    weights: own experts.
    options: of the executor.
    dropout: of the rows.
  """
  num_own = rows.shape[0]
  expert = jnp.arange(num_own, dtype=jnp.int32)[:, None, None]
  expert = jnp.where(is_filled, expert, num_own)
  # Weight 1: the real weights are applied by the sender, who has the plan.
  plan = Routing(
    expert_index=expert.reshape(-1, 1),
    weight=is_filled.reshape(-1, 1).astype(jnp.float32),
    mask=is_filled.reshape(-1),
    num_experts=num_own,
  )
  flat = rows.reshape(-1, rows.shape[-1])
  pairs = None if dropout is None else dropout.as_pairs()
  return grouped_matmul.expert_feed_forward(
    flat, plan, weights, options, pairs
  ).output
