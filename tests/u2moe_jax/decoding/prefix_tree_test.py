"""The tree of an n-best list: every prefix once, and nothing lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import tiny
from u2moe_jax.decoding import hypotheses
from u2moe_jax.decoding import prefix_tree
from u2moe_jax.decoding import rescoring
from u2moe_jax.decoding import tree_rescoring

SOS = 9
# Much in common, nothing in common, one inside another, twice the same, none.
LISTS = [
  [[1, 2, 3, 4], [1, 2, 5, 4], [1, 2], [1, 2], []],
  [[1], [2, 1], [3, 1, 1], [], []],
]


def _arrays(lists=LISTS, size=5):
  pad = lambda tokens: [*tokens, *[-1] * (size - len(tokens))]
  tokens = jnp.array([[pad(tokens) for tokens in row] for row in lists])
  return tokens, jnp.array([[len(tokens) for tokens in row] for row in lists])


def _prefixes(row):
  """All different prefixes of a list, as tuples."""
  return {tuple(t[:u]) for t in row for u in range(len(t) + 1)}


def test_every_prefix_stands_once_in_the_tree():
  tokens, lengths = _arrays()
  nodes, _, counts = prefix_tree.prefix_nodes(tokens, lengths)
  tree = prefix_tree.build(tokens, lengths, sos_id=SOS, num_nodes=12)
  for b, row in enumerate(LISTS):
    names = {}  # node -> prefix, read along the hypotheses
    for n, hypothesis in enumerate(row):
      for u in range(len(hypothesis) + 1):
        prefix = tuple(hypothesis[:u])
        assert names.setdefault(int(nodes[b, n, u]), prefix) == prefix
    assert set(names.values()) == _prefixes(row)
    assert counts[b] == len(names) == tree.mask[b].sum()
    for i, prefix in names.items():
      assert tree.tokens[b, i] == (prefix[-1] if prefix else SOS)
      assert tree.positions[b, i] == len(prefix)
      assert names[int(tree.parents[b, i])] == prefix[:-1]
      for j in range(12):
        begins = j in names and prefix[: len(names[j])] == names[j]
        assert tree.precedes_mask[b, i, j] == begins
    assert not tree.precedes_mask[b, len(names) :].any()


def test_scores_are_read_where_they_were_written():
  tokens, lengths = _arrays()
  tree = prefix_tree.build(tokens, lengths, sos_id=SOS, num_nodes=12)
  rng = np.random.default_rng(0)
  node_scores, end_scores = jnp.asarray(rng.normal(size=(2, 2, 12)))
  nodes, _, _ = prefix_tree.prefix_nodes(tokens, lengths)
  found = prefix_tree.read(node_scores, end_scores, tokens, lengths)
  for b, row in enumerate(LISTS):
    for n, hypothesis in enumerate(row):
      path = [int(nodes[b, n, u]) for u in range(len(hypothesis) + 1)]
      expected = [node_scores[b, i] for i in path[1:]]
      expected += [end_scores[b, path[-1]]] + [0.0] * (5 - len(hypothesis))
      np.testing.assert_array_equal(found[b, n], np.array(expected))
  assert tree.tokens.shape == node_scores.shape


@pytest.mark.parametrize(
  ('count', 'size'), [(1, 64), (64, 64), (65, 128), (448, 512), (513, 768)]
)
def test_rooms_are_few_and_hold_what_they_must(count, size):
  assert tree_rescoring.node_size(count) == size


class _Rescoring:
  """A tiny MoE model with both decoders, and an n-best list."""

  def __init__(self, config=None, lists=LISTS):
    config = config or tiny.model_config(tiny.moe())
    self.model, self.params, _ = tiny.init(config)
    rng = np.random.default_rng(1)
    rows = len(lists)
    self.frames = jnp.asarray(rng.normal(size=(rows, 6, 16)), jnp.float32)
    self.mask = jnp.arange(6)[None] < 6 - 2 * jnp.arange(rows)[:, None] % 6
    tokens, lengths = _arrays(lists)
    scores = jnp.asarray(-np.sort(rng.random((rows, 5)) * 3), jnp.float32)
    self.nbest = hypotheses.Hypotheses(
      tokens=tokens,
      lengths=lengths,
      scores=scores.at[1, 4].set(-jnp.inf),
      times=tokens,
      margin=jnp.full((rows,), jnp.inf),
    )

  def by_rows(self, reverse_weight):
    """Each hypothesis by itself."""
    score = lambda reverse: tree_rescoring.score_nbest(
      *tree_rescoring.scorer(self.model, self.params, reverse=reverse),
      tree_rescoring.read_order(self.nbest, reverse=reverse),
      self.frames,
      self.mask,
    )
    (forward, left), (backward, right) = score(False), score(True)
    margin = jnp.minimum(left, right) if reverse_weight else left
    return rescoring.combine(
      dataclasses.replace(self.nbest, margin=margin),
      forward,
      backward,
      ctc_weight=0.3,
      reverse_weight=reverse_weight,
    )

  def by_tree(self, reverse_weight, **options):
    return tree_rescoring.search_rescoring(
      self.model,
      self.params,
      self.nbest,
      self.frames,
      self.mask,
      ctc_weight=0.3,
      reverse_weight=reverse_weight,
      **options,
    )


@pytest.fixture(scope='module')
def case():
  return _Rescoring()


@pytest.mark.parametrize('reverse_weight', [0.0, 0.5])
def test_the_tree_scores_as_the_rows_do(case, reverse_weight):
  rows = jax.jit(case.by_rows, static_argnums=0)(reverse_weight)
  tree = case.by_tree(reverse_weight)
  compare = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
  jax.tree.map(compare, tree, rows)
  assert np.isfinite(tree.margin).all()
  # Of given rooms one is taken, or, where none is large enough, the rows.
  for rooms in ((5, 16), (5,)):
    other = case.by_tree(reverse_weight, rooms=rooms)
    jax.tree.map(compare, other, tree)


def test_trees_of_like_size_are_grouped(monkeypatch):
  counts = [60, 500, 1, 130, 700, 100]
  [(rows, size)] = tree_rescoring.group_trees(counts)
  assert sorted(rows) == list(range(6))
  assert size == 768
  monkeypatch.setattr(tree_rescoring, '_NODES_AT_ONCE', 1024)
  groups = tree_rescoring.group_trees(counts)
  assert [(rows.tolist(), size) for rows, size in groups] == [
    ([4], 768),
    ([1, 3], 512),
    ([5, 0, 2, 2, 2, 2], 128),
  ]
  groups = tree_rescoring.group_trees(counts, parts=2)
  assert [len(rows) for rows, _ in groups] == [2, 6]
  # Rows without a frame are in no group; a batch of them has one all the same.
  groups = tree_rescoring.group_trees([0, 70, 0, 60], parts=1)
  assert [(rows.tolist(), size) for rows, size in groups] == [
    ([1, 3, 3, 3], 128)
  ]
  assert len(tree_rescoring.group_trees([0, 0])) == 1


def test_groups_score_as_the_batch_does(monkeypatch):
  case = _Rescoring(lists=[*LISTS, [[3, 2], [3], [1], [], []]])
  whole = case.by_tree(0.5)
  sizes = []
  group = tree_rescoring.group_trees
  monkeypatch.setattr(tree_rescoring, '_NODES_AT_ONCE', 64)  # one at a time
  monkeypatch.setattr(
    tree_rescoring,
    'group_trees',
    lambda *a, **k: sizes.append(group(*a, **k)) or sizes[-1],
  )
  parts = case.by_tree(0.5)
  assert [len(groups) for groups in sizes] == [3, 3]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), parts, whole
  )
  # Small trees behind a large one, with room for the whole batch among them.
  monkeypatch.setattr(
    tree_rescoring, 'node_size', lambda n: 4 if n <= 4 else 12
  )
  monkeypatch.setattr(tree_rescoring, '_NODES_AT_ONCE', 12)
  sizes.clear()
  mixed = case.by_tree(0.5)
  assert [len(rows) for rows, _ in sizes[0]] == [1, 1, 3]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), mixed, whole
  )
  # The negative control: groups that come back in another order.
  join = tree_rescoring._join
  monkeypatch.setattr(tree_rescoring, '_join', lambda trees: join(trees[::-1]))
  wrong = case.by_tree(0.5)
  assert not np.allclose(wrong.l2r, whole.l2r, atol=1e-3)


def test_both_decoders_share_what_is_compiled(case):
  before = tree_rescoring.score_tree._cache_size()
  case.by_tree(0.5, rooms=(24,))
  assert tree_rescoring.score_tree._cache_size() == before + 1
  # With as many blocks each; else each has its own.
  config = tiny.model_config(tiny.moe())
  decoder = dataclasses.replace(config.decoder, num_reverse_blocks=2)
  other = _Rescoring(dataclasses.replace(config, decoder=decoder))
  other.by_tree(0.5, rooms=(24,))
  assert tree_rescoring.score_tree._cache_size() == before + 3


def test_a_node_that_sees_more_than_its_prefix_is_noticed(case):
  tokens, lengths = _arrays()
  tree = prefix_tree.build(tokens, lengths, sos_id=10, num_nodes=16)
  score = lambda tree: (
    tree_rescoring.score_tree(
      *tree_rescoring.scorer(case.model, case.params, reverse=False),
      tree,
      case.frames,
      case.mask,
    ).ends
  )
  wide = jnp.tril(jnp.ones((16, 16), bool))[None] & tree.mask[:, None]
  wide = dataclasses.replace(tree, precedes_mask=wide)
  changed = np.abs(score(wide) - score(tree))
  assert changed[0, :5].max() < 1e-5  # the first hypothesis
  assert changed[0, 5:7].min() > 1e-3
