"""An n-best list as a tree of its prefixes.

The hypotheses of one utterance differ in few places. What a decoder says after
a prefix is the same for all of them that begin with it, so it is asked once: a
list of ten hypotheses costs two to eight instead of ten. The nodes of the tree
stand side by side as one text would, and a mask says which precede which.
"""

from flax import struct
import jax.numpy as jnp

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import typechecked


@struct.dataclass
class PrefixTree:
  """The different prefixes of each utterance's hypotheses, parents first.

  Attributes:
    tokens: last token of each prefix, sos for the empty one.
    mask: True for real nodes.
    positions: tokens before it; the length of the prefix.
    precedes_mask: [b, i, j]: whether prefix i begins with prefix j.
    parents: node of the prefix without its last token; 0 for the empty one.
  """

  tokens: Int[Array, 'B nodes']
  mask: Bool[Array, 'B nodes']
  positions: Int[Array, 'B nodes']
  precedes_mask: Bool[Array, 'B nodes nodes']
  parents: Int[Array, 'B nodes']


@typechecked
def prefix_nodes(
  tokens: Int[Array, 'B N U'], lengths: Int[Array, 'B N']
) -> tuple[Int[Array, 'B N U1'], Bool[Array, 'B N U1'], Int[Array, 'B']]:
  """Numbers the different prefixes of each utterance's hypotheses.

  Args:
    tokens: token ids, padded with -1.
    lengths: tokens of each hypothesis.

  Returns:
    The node of every prefix, of 0 to U tokens (0 where the hypothesis is
    shorter); which of them are the first with that node; how many nodes there
    are.
  """
  batch, count, size = tokens.shape
  equal = tokens[:, :, None] == tokens[:, None]  # [B, N, N, U]
  # From "this token is equal" to "all up to here are"; the empty prefix, put in
  # front, is common to all.
  equal = jnp.cumprod(equal.astype(jnp.int32), axis=-1)
  equal = jnp.pad(equal, [(0, 0)] * 3 + [(1, 0)], constant_values=1)
  # A prefix belongs to the first hypothesis that begins with it; argmax takes
  # the first of equal values.
  first = jnp.argmax(equal, axis=2)  # [B, N, U1], of the hypotheses
  exists = jnp.arange(size + 1)[None, None] <= lengths[..., None]  # [B, N, U1]
  is_new = exists & (first == jnp.arange(count)[None, :, None])  # [B, N, U1]
  # Counted along the hypotheses, so a parent has a lower number than its
  # children.
  numbers = jnp.cumsum(is_new.reshape(batch, -1), axis=1) - 1
  numbers = numbers.reshape(is_new.shape).astype(jnp.int32)  # [B, N, U1]
  nodes = jnp.take_along_axis(numbers, first, axis=1)  # [B, N, U1]
  return jnp.where(exists, nodes, 0), is_new, is_new.sum(axis=(1, 2))


@typechecked
def build(
  tokens: Int[Array, 'B N U'],
  lengths: Int[Array, 'B N'],
  *,
  sos_id: int,
  num_nodes: int,
) -> PrefixTree:
  """Builds the trees of a batch.

  Args:
    tokens: token ids, padded with -1.
    lengths: tokens of each hypothesis.
    sos_id: token of the root.
    num_nodes: room for nodes, static; of more nodes the last are lost, and
      `read` finds NaN in their place.
  """
  batch, count, size = tokens.shape
  nodes, is_new, counts = prefix_nodes(tokens, lengths)
  place = jnp.where(is_new, nodes, num_nodes).reshape(batch, -1)  # or dropped
  rows = jnp.arange(batch)[:, None]

  def scatter(values: Int[Array, '#B #N #U1']) -> Int[Array, 'B nodes']:
    """Brings [B, N, U1] into the order of the nodes."""
    values = jnp.broadcast_to(values, is_new.shape).reshape(place.shape)
    empty = jnp.zeros((batch, num_nodes), jnp.int32)
    return empty.at[rows, place].set(values, mode='drop')

  # The prefix of n tokens has its last token, and its parent, at n - 1.
  shift = lambda values, first: jnp.pad(
    values, ((0, 0), (0, 0), (1, 0)), constant_values=first
  )
  depths = jnp.arange(size + 1)
  mask = jnp.arange(num_nodes)[None] < counts[:, None]
  positions = scatter(depths[None, None])
  # The prefixes of a node stand along the hypothesis where it occurs first.
  owner = scatter(jnp.arange(count)[None, :, None])
  path = jnp.take_along_axis(nodes, owner[..., None], axis=1)  # [B, nodes, U1]
  on_path = depths[None, None] <= positions[..., None]  # [B, nodes, U1]
  # What lies behind the node on that hypothesis is none of its prefixes.
  path = jnp.where(on_path & mask[..., None], path, num_nodes)
  precedes = jnp.zeros((batch, num_nodes, num_nodes), bool)
  here = jnp.arange(num_nodes)[None, :, None]
  return PrefixTree(
    tokens=scatter(shift(tokens, sos_id)),
    mask=mask,
    positions=positions,
    precedes_mask=precedes.at[rows[..., None], here, path].set(
      True, mode='drop'
    ),
    parents=scatter(shift(nodes, 0)[..., :-1]),
  )


@typechecked
def read(
  node_scores: Float[Array, 'B nodes'],
  end_scores: Float[Array, 'B nodes'],
  tokens: Int[Array, 'B N U'],
  lengths: Int[Array, 'B N'],
) -> Float[Array, 'B N U1']:
  """Reads the scores of the hypotheses off their tree.

  Args:
    node_scores: log-prob of each node's token after its parent.
    end_scores: log-prob of the end after each node.
    tokens: token ids the tree was built from.
    lengths: their lengths.

  Returns:
    For each hypothesis the scores of its tokens, of the end, and then 0.
  """
  size = tokens.shape[-1]
  nodes, _, _ = prefix_nodes(tokens, lengths)
  take = lambda values, places: jnp.take_along_axis(
    values, places.reshape(len(values), -1), axis=1
  ).reshape(places.shape)
  # Token n of a text is the last one of prefix n + 1, so its score stands
  # there; what the roll brings round lies behind every text.
  along = take(node_scores, jnp.roll(nodes, -1, axis=-1))  # [B, N, U1]
  place = jnp.arange(size + 1)[None, None]
  scores = jnp.where(place < lengths[..., None], along, 0.0)
  return jnp.where(place == lengths[..., None], take(end_scores, nodes), scores)
