"""Rescoring an n-best list by the prefix trees of its hypotheses.

Not jitted as a whole: how many nodes the trees have is known when the search is
done, and their number, rounded up, is the shape of the programs here.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Bool
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.array_types import PyTree
from u2moe_jax.decoding import hypotheses
from u2moe_jax.decoding import prefix_tree
from u2moe_jax.decoding import programs
from u2moe_jax.decoding import rescoring
from u2moe_jax.models import decoder as decoder_lib
from u2moe_jax.models import u2
from u2moe_jax.ops import sequences

# Nodes of prefix trees that a decoder scores at once, on each device.
# (With a vocabulary of 5,000 their logits alone are 160 MB.)
_NODES_AT_ONCE = 8192
# Encoder frames that it attends to, at least.
_LEAST_FRAMES = 128


@struct.dataclass
class Texts:
  """The texts of n-best lists, in the order in which a decoder reads them.

  Attributes:
    tokens: token ids, padded with -1.
    lengths: tokens of each text.
  """

  tokens: Int[Array, 'B N U']
  lengths: Int[Array, 'B N']


@dataclasses.dataclass(frozen=True)
class Scorer:
  """What a decoder is but for its parameters.

  Where both decoders have as many blocks they have the same one, and share what
  is compiled for it.

  Attributes:
    module: the decoder.
    sos: token id that its inputs start with.
    eos: token id of the end.
  """

  module: decoder_lib.TransformerDecoder
  sos: int
  eos: int


def scorer(
  model: u2.U2MoeModel, params: PyTree, *, reverse: bool
) -> tuple[Scorer, PyTree]:
  """One of the decoders of a model, and its parameters."""
  config = model.config
  name, num_blocks = 'forward_decoder', config.decoder.num_blocks
  if reverse:
    name, num_blocks = 'backward_decoder', config.decoder.num_reverse_blocks
  module = u2.make_decoder(config, num_blocks, form=model.form)
  return Scorer(module, config.sos, config.eos), params[name]


def search_rescoring(
  model: u2.U2MoeModel,
  params: PyTree,
  nbest: hypotheses.Hypotheses,
  frames: Float[Array, 'B T D'],
  mask: Bool[Array, 'B T'],
  *,
  ctc_weight: float,
  reverse_weight: float,
  rooms: Sequence[int] | None = None,
) -> rescoring.Rescored:
  """Scores an n-best list by both decoders, and re-ranks it.

  A decoder is asked once for what hypotheses have in common, so its cost goes
  with the nodes of their prefix tree. The trees of a batch differ in size by
  ten times, so those of like size go together.

  Args:
    model: the recogniser.
    params: its parameters.
    nbest: the list.
    frames: encoder frames.
    mask: real frames.
    ctc_weight: see `rescoring.combine`.
    reverse_weight: the same; with 0 the right-to-left decoder is not run.
    rooms: the rooms for nodes there may be, ascending, for callers that want
      few shapes whatever comes: a list that fits into none of them is scored
      hypothesis by hypothesis. None: those of `node_sizes`.
  """
  # [left to right, right to left]
  scores: list[Float[Array, 'B N U1'] | None] = [None, None]
  margin = nbest.margin
  # Each direction has its own trees: reversed texts share other beginnings.
  for reverse in (False, True)[: 1 + (reverse_weight > 0)]:
    found = _score(
      *scorer(model, params, reverse=reverse),
      read_order(nbest, reverse=reverse),
      frames,
      mask,
      rooms=rooms,
    )
    scores[int(reverse)], margin = found[0], _least(margin, found[1])
  return _combine(
    dataclasses.replace(nbest, margin=margin),
    *scores,
    ctc_weight=ctc_weight,
    reverse_weight=reverse_weight,
  )


def _score(
  decoder: Scorer,
  params: PyTree,
  texts: Texts,
  frames: Float[Array, 'B T D'],
  mask: Bool[Array, 'B T'],
  *,
  rooms: Sequence[int] | None,
) -> tuple[Float[Array, 'B N U1'], Float[Array, 'B']]:
  """`score_nbest` by prefix trees, those of like size together."""
  # On the host: how many nodes there are decides which program runs.
  counts = np.asarray(_count_nodes(texts))
  if rooms is None:
    frames, mask = _lengthen(frames, mask)
  if rooms is not None:
    size = next((room for room in rooms if room >= counts.max()), None)
    if size is None:
      return score_rows(decoder, params, texts, frames, mask)
    return _score_trees(decoder, params, texts, frames, mask, num_nodes=size)
  # Each device takes its part of a group, so a group needs whole parts.
  per_device = frames.sharding.shard_shape(frames.shape)[0]
  # Rows that only fill the batch are not worth a program.
  counts = np.where(np.asarray(mask).any(axis=1), counts, 0)
  groups = group_trees(counts, parts=len(counts) // per_device)
  # The groups come in order of size; `places` says where each utterance went.
  found: list[PyTree] = []
  places, done = np.zeros(len(counts), np.int32), 0
  for rows, size in groups:
    some = texts, frames, mask
    if len(groups) == 1 and len(rows) == len(counts):
      rows = np.arange(len(rows))
    else:
      # Onto the devices again: what is picked from them may lie on any.
      some = jax.tree.map(
        lambda x, y: jax.device_put(x, y.sharding), _pick(some, rows), some
      )
    places[rows] = done + np.arange(len(rows))
    done += len(rows)
    found.append(_score_trees(decoder, params, *some, num_nodes=size))
  return _pick(_join(found), places)


def group_trees(
  counts: Sequence[int] | np.ndarray, *, parts: int = 1
) -> list[tuple[np.ndarray, int]]:
  """Groups trees of like size, since all of a group get the room of the largest.

  Args:
    counts: nodes of each tree; trees of 0 are left out.
    parts: devices that share a group; its rows are a multiple of this.

  Returns:
    (rows, room for nodes) of each group. A room has always as many rows, or as
    many as the batch, so that few shapes compile: the last group has its last
    row several times.
  """
  # Largest first: the first tree of a group is the one all must have room for.
  order = np.argsort(counts, kind='stable')[::-1]
  order = order[: max(np.count_nonzero(counts), 1)]
  groups: list[tuple[np.ndarray, int]] = []
  start = 0
  while start < len(order):
    size = node_size(int(counts[order[start]]))
    rows = max(_NODES_AT_ONCE // size, 1) * parts
    rows = min(rows, len(counts))
    places = np.minimum(np.arange(start, start + rows), len(order) - 1)
    groups.append((order[places], size))
    start += rows
  return groups


@jax.jit
def _lengthen(
  frames: Float[Array, 'B T D'], mask: Bool[Array, 'B T']
) -> tuple[Float[Array, 'B T2 D'], Bool[Array, 'B T2']]:
  """Pads the time to a power of two: fewer shapes to compile."""
  num_frames = mask.shape[1]
  size = max(1 << (num_frames - 1).bit_length(), _LEAST_FRAMES)
  more = ((0, 0), (0, size - num_frames))
  return jnp.pad(frames, (*more, (0, 0))), jnp.pad(mask, more)


@jax.jit
def _pick(tree: PyTree, rows: Int[Array, 'R']) -> PyTree:
  """Some rows of every leaf."""
  return jax.tree.map(lambda x: x[rows], tree)


@jax.jit
def _join(trees: Sequence[PyTree]) -> PyTree:
  """The rows of all of them."""
  return jax.tree.map(lambda *x: jnp.concatenate(x), *trees)


def _score_trees(
  decoder: Scorer,
  params: PyTree,
  texts: Texts,
  frames: Float[Array, 'B T D'],
  mask: Bool[Array, 'B T'],
  *,
  num_nodes: int,
) -> tuple[Float[Array, 'B N U1'], Float[Array, 'B']]:
  """`score_nbest` by prefix trees with room for so many nodes."""
  tree = _build_tree(texts, sos_id=decoder.sos, num_nodes=num_nodes)
  scored = score_tree(decoder, params, tree, frames, mask)
  return _read_tree(scored, texts)


def node_sizes() -> Iterator[int]:
  """The rooms for nodes there are: multiples of 64, then two an octave."""
  size = 64
  while True:
    yield size
    # So at most a third of a large room is empty, and few shapes compile.
    size += max(64, 1 << (size.bit_length() - 2))


def node_size(count: int) -> int:
  """The least of `node_sizes` with room for `count` nodes."""
  return next(size for size in node_sizes() if size >= count)


@struct.dataclass
class TreeScores:
  """What a decoder says of a prefix tree.

  Attributes:
    nodes: log-prob of each node's token after its parent.
    ends: log-prob of the end after each node.
    margin: smallest router margin of each utterance.
  """

  nodes: Float[Array, 'B nodes']
  ends: Float[Array, 'B nodes']
  margin: Float[Array, 'B']


@functools.partial(jax.jit, static_argnames='reverse')
def read_order(nbest: hypotheses.Hypotheses, *, reverse: bool) -> Texts:
  """The texts of a list as a decoder reads them."""
  tokens = nbest.tokens
  if reverse:
    tokens = jax.vmap(sequences.reverse_by_length)(tokens, nbest.lengths)
  return Texts(tokens=tokens, lengths=nbest.lengths)


@jax.jit
def _count_nodes(texts: Texts) -> Int[Array, 'B']:
  """Nodes of the prefix trees."""
  return prefix_tree.prefix_nodes(texts.tokens, texts.lengths)[2]


@functools.partial(jax.jit, static_argnames=('sos_id', 'num_nodes'))
def _build_tree(
  texts: Texts, *, sos_id: int, num_nodes: int
) -> prefix_tree.PrefixTree:
  return prefix_tree.build(
    texts.tokens, texts.lengths, sos_id=sos_id, num_nodes=num_nodes
  )


@functools.partial(jax.jit, static_argnums=0)
def score_tree(
  decoder: Scorer,
  params: PyTree,
  tree: prefix_tree.PrefixTree,
  frames: Float[Array, 'B T D'],
  mask: Bool[Array, 'B T'],
) -> TreeScores:
  """Scores every node of a prefix tree by one decoder."""
  # Nodes are the tokens of one text here; positions and mask make it a tree.
  logits, stats = decoder.module.apply(
    {'params': params},
    tree.tokens,
    tree.mask,
    frames,
    mask,
    positions=tree.positions,
    attention_mask=tree.precedes_mask,
  )  # [B, nodes, V]
  # Of the vocabulary only two entries a node are wanted, so the log-softmax is
  # done for these alone: [B, nodes, V] is by far the largest array.
  total = jax.nn.logsumexp(logits, axis=-1)
  rows = jnp.arange(frames.shape[0])[:, None]
  of_parent = logits[rows, tree.parents, tree.tokens]  # [B, nodes]
  return TreeScores(
    nodes=of_parent - jnp.take_along_axis(total, tree.parents, axis=1),
    ends=logits[..., decoder.eos] - total,
    margin=programs.router_margin(stats, rows=frames.shape[0]),
  )


_least = jax.jit(jnp.minimum)


@jax.jit
def _read_tree(
  scored: TreeScores, texts: Texts
) -> tuple[Float[Array, 'B N U1'], Float[Array, 'B']]:
  """What a tree says of the texts, as `score_nbest` returns it."""
  scores = prefix_tree.read(
    scored.nodes, scored.ends, texts.tokens, texts.lengths
  )
  return scores, scored.margin


@functools.partial(jax.jit, static_argnames=('ctc_weight', 'reverse_weight'))
def _combine(
  nbest: hypotheses.Hypotheses,
  forward: Float[Array, 'B N U1'],
  backward: Float[Array, 'B N U1'] | None,
  *,
  ctc_weight: float,
  reverse_weight: float,
) -> rescoring.Rescored:
  """Re-ranks by the scores of the tokens."""
  return rescoring.combine(
    nbest,
    forward,
    backward,
    ctc_weight=ctc_weight,
    reverse_weight=reverse_weight,
  )


@functools.partial(jax.jit, static_argnums=0)
def score_rows(
  decoder: Scorer,
  params: PyTree,
  texts: Texts,
  frames: Float[Array, 'B T D'],
  mask: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B N U1'], Float[Array, 'B']]:
  """`score_nbest`, one hypothesis after the other: little memory, any list."""

  def score(text: Texts) -> tuple[Float[Array, 'B U1'], Float[Array, 'B']]:
    one = jax.tree.map(lambda x: x[:, None], text)  # N = 1
    scores, margin = score_nbest(decoder, params, one, frames, mask)
    return scores[:, 0], margin

  # [N, B, ...]: one rank of the list after the other.
  by_rank = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), texts)
  scores, margins = jax.lax.map(score, by_rank)
  return jnp.swapaxes(scores, 0, 1), margins.min(axis=0)  # [B, N, U1], [B]


def score_nbest(
  decoder: Scorer,
  params: PyTree,
  texts: Texts,
  frames: Float[Array, 'B T D'],
  mask: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B N U1'], Float[Array, 'B']]:
  """Scores every token of an n-best list by one decoder, a row for each.

  `search_rescoring` gets the same from the prefix tree; this is the form to
  check it against.

  Args:
    decoder: the decoder.
    params: its parameters.
    texts: the list, as the decoder reads it.
    frames: encoder frames.
    mask: real frames.

  Returns:
    Log-probs of the tokens and the end, as `rescoring.token_scores` gives
    them, and the smallest router margin of each utterance.
  """
  inputs, targets = rescoring.decoder_inputs(
    texts.tokens, texts.lengths, sos_id=decoder.sos, eos_id=decoder.eos
  )
  size = inputs.shape[-1]
  # The rows of one utterance stand next to each other: the decoder finds the
  # encoder frames of a row by that.
  logits, stats = decoder.module.apply(
    {'params': params},
    inputs.reshape(-1, size),  # [B * N, U1]
    (targets >= 0).reshape(-1, size),
    frames,
    mask,
  )
  log_probs = jax.nn.log_softmax(logits)
  log_probs = log_probs.reshape(*inputs.shape, -1)  # [B, N, U1, V]
  margin = programs.router_margin(stats, rows=frames.shape[0])
  return rescoring.token_scores(log_probs, targets), margin
