"""Hotwords: phrases that the prefix beam search is drawn to.

The phrases form an Aho-Corasick automaton over token ids (Aho and Corasick,
1975): a state is the longest end of what was read that begins some phrase.
Reading a token moves a prefix from state s to state t and adds

  bonus = potential[t] - potential[s] + completed[t]                      (1)

`potential` is a loan: a bonus for each token of a phrase that is under way,
which keeps the phrase in the beam, and is taken back at the first token that
does not fit. `completed` stays: every phrase that ends at t, be it the end of
a longer one, earns its tokens' bonus. What is still on loan after the last
frame is given back, so a finished search has paid for whole phrases only.

The automaton is arrays, an argument of the jitted search: its size is padded,
so another list of about as many phrases compiles nothing.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import math
import os
import pathlib

from flax import struct
import jax.numpy as jnp
import numpy as np

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int
from u2moe_jax.text import tokenizer as tokenizer_lib

_ROOT = 0
_OTHER = 0  # the column of the tokens that stand in no phrase
_SMALLEST = 64  # states and columns are padded to a power of two from here on
_MOST_CELLS = 1 << 26  # of the transition table: 256 MB


class HotwordError(ValueError):
  """A list of hotwords that cannot be used; names file, line and phrase."""


@struct.dataclass
class HotwordGraph:
  """The automaton, all transitions resolved.

  Attributes:
    columns: column of each token of the vocabulary; 0 for tokens that stand
      in no phrase.
    next_state: state after reading a token of a column.
    potential: what is on loan in a state.
    gain: potential and completed of (1) together.
  """

  columns: Int[Array, 'V']
  next_state: Int[Array, 'states columns']
  potential: Float[Array, 'states']
  gain: Float[Array, 'states']


@struct.dataclass
class HotwordState:
  """Where each beam stands.

  Attributes:
    node: state of the automaton.
    bonus: sum of (1) so far, loans included.
  """

  node: Int[Array, '*B N']
  bonus: Float[Array, '*B N']


@dataclasses.dataclass(frozen=True)
class Phrase:
  """A hotword.

  Attributes:
    tokens: its token ids.
    score: bonus for each of them, a log-prob.
  """

  tokens: tuple[int, ...]
  score: float


def build(
  phrases: Sequence[Phrase],
  *,
  vocab_size: int,
  nested_phrases: bool = True,
) -> HotwordGraph:
  """Builds the automaton; phrases that begin alike share states.

  A shared token has the largest of the phrases' scores.

  Args:
    phrases: the hotwords, none of them empty.
    vocab_size: tokens V.
    nested_phrases: also complete a phrase that begins a longer one listed
      before it. (The reference does not.)

  Raises:
    HotwordError: if a token is not in the vocabulary, or the phrases are too
      many.
  """
  trie = _Trie()
  for phrase in phrases:
    outside = [t for t in phrase.tokens if not 0 <= t < vocab_size]
    if outside or not phrase.tokens:
      raise HotwordError(
        f'hotword tokens {phrase.tokens} must be ids below {vocab_size}'
      )
    trie.add(phrase, nested_phrases=nested_phrases)
  tokens = sorted({token for row in trie.children for token in row})
  shape = _padded(len(trie.children)), _padded(len(tokens) + 1)
  if shape[0] * shape[1] > _MOST_CELLS:
    raise HotwordError(
      f'{len(phrases)} hotwords with {len(tokens)} different tokens need a '
      f'table of {shape[0]} x {shape[1]}; use fewer'
    )
  # The table has a column for each token that occurs, not for all of V: a few
  # phrases would else cost megabytes.
  columns = np.full(vocab_size, _OTHER, np.int32)
  columns[tokens] = np.arange(1, len(tokens) + 1)
  next_state, completed = trie.resolve(columns, shape)
  potential = _padded_to(shape[0], trie.potential)
  return HotwordGraph(
    columns=jnp.asarray(columns),
    next_state=jnp.asarray(next_state),
    potential=jnp.asarray(potential),
    gain=jnp.asarray(potential + _padded_to(shape[0], completed)),
  )


class _Trie:
  """States as they are found; state 0 has read nothing.

  Attributes:
    children: next state by token, for each state.
    score: bonus of the token that leads to each state.
    is_end: whether a phrase ends there.
  """

  def __init__(self) -> None:
    self.children: list[dict[int, int]] = [{}]
    self.score = [0.0]
    self.is_end = [False]

  def add(self, phrase: Phrase, *, nested_phrases: bool) -> None:
    state, is_new = _ROOT, False
    for token in phrase.tokens:
      is_new = token not in self.children[state]
      if is_new:
        self.children[state][token] = len(self.children)
        self.children.append({})
        self.score.append(phrase.score)
        self.is_end.append(False)
      state = self.children[state][token]
      # The loan must not hang on which of the phrases will be completed.
      self.score[state] = max(self.score[state], phrase.score)
    self.is_end[state] |= is_new or nested_phrases

  @property
  def potential(self) -> list[float]:
    """Sum of the scores on the way to each state."""
    potential = [0.0] * len(self.children)
    for state in self._breadth_first():
      for child in self.children[state].values():
        potential[child] = potential[state] + self.score[child]
    return potential

  def resolve(
    self, columns: np.ndarray, shape: tuple[int, int]
  ) -> tuple[np.ndarray, list[float]]:
    """The transition table (states, columns), and completed of (1)."""
    table = np.zeros(shape, np.int32)
    potential = self.potential
    completed = [p if end else 0.0 for p, end in zip(potential, self.is_end)]
    fail = [_ROOT] * len(self.children)
    for state in self._breadth_first():
      if state != _ROOT:
        # Where a token does not fit, go on from the longest end that does:
        # that state is nearer to the root, so its row is there already.
        table[state] = table[fail[state]]
      for token, child in self.children[state].items():
        column = columns[token]
        # Still what `fail[state]` does with this token; overwritten next.
        fail[child] = int(table[state, column]) if state != _ROOT else _ROOT
        table[state, column] = child
        # Phrases that end here and began later; `fail` is nearer to the
        # root, so its sum is complete.
        completed[child] += completed[fail[child]]
    return table, completed

  # Breadth first, because `resolve` needs all shorter states done.
  def _breadth_first(self) -> Iterator[int]:
    queue = [_ROOT]
    for state in queue:
      yield state
      queue += self.children[state].values()


def _padded(size: int) -> int:
  return max(_SMALLEST, 1 << (size - 1).bit_length())


def _padded_to(size: int, values: Sequence[float]) -> np.ndarray:
  return np.pad(np.asarray(values, np.float32), (0, size - len(values)))


def init_state(batch: int, beam: int) -> HotwordState:
  """Nothing read, nothing on loan."""
  return HotwordState(
    node=jnp.full((batch, beam), _ROOT, jnp.int32),
    bonus=jnp.zeros((batch, beam), jnp.float32),
  )


def extend(
  graph: HotwordGraph, state: HotwordState, columns: Int[Array, 'K']
) -> HotwordState:
  """Reads each of K tokens after each of N prefixes.

  Args:
    graph: the automaton.
    state: of the prefixes, (N,).
    columns: `graph.columns` of the tokens.

  Returns:
    The states of the extended prefixes, (N, K).
  """
  read = lambda field, places: field.at[places].get(mode='promise_in_bounds')
  width = graph.next_state.shape[1]
  # All indices come from the graph itself, so none is out of bounds.
  cells = state.node[:, None] * width + columns[None]  # [N, K]
  node = read(graph.next_state.reshape(-1), cells)
  # (1): the old loan back, then the new one and what was completed, in `gain`.
  repaid = state.bonus - read(graph.potential, state.node)
  return HotwordState(node=node, bonus=repaid[:, None] + read(graph.gain, node))


def on_loan(graph: HotwordGraph, state: HotwordState) -> Float[Array, '*B N']:
  """What a search that ends now gives back."""
  return graph.potential[state.node]


def load(
  path: str | os.PathLike[str],
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  score: float,
  vocab_size: int,
) -> HotwordGraph:
  """Reads a list of hotwords: a phrase a line, a tab and its score if it has
  its own.

  Args:
    path: UTF-8 text; empty lines are skipped.
    tokenizer: text to ids.
    score: bonus per token of the phrases without their own.
    vocab_size: tokens of the model.

  Raises:
    HotwordError: if the file cannot be read, has no phrase, or a phrase has
      unknown characters or a bad score.
  """
  try:
    # -sig: some editors put a byte order mark in front of the first phrase.
    lines = pathlib.Path(path).read_text(encoding='utf-8-sig').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise HotwordError(f'hotwords {path}: cannot be read ({error})') from error
  phrases = [
    _parse(line, tokenizer, score, f'hotwords {path}, line {number}')
    for number, line in enumerate(lines, start=1)
    if line.strip()
  ]
  if not phrases:
    raise HotwordError(f'hotwords {path}: no phrase in it')
  return build(phrases, vocab_size=vocab_size)


def _parse(
  line: str, tokenizer: tokenizer_lib.Tokenizer, score: float, where: str
) -> Phrase:
  text, tab, own = line.partition('\t')
  text = text.strip()
  if tab:
    score = _score(own, where)
  unknown = tokenizer.unknown_characters(text)
  if unknown:
    raise HotwordError(
      f'{where}: {text!r} has characters that the token table lacks: '
      f'{" ".join(unknown)}'
    )
  tokens = tokenizer.encode(text)
  if not tokens or tokenizer.special.unk in tokens:
    raise HotwordError(f'{where}: {text!r} cannot be written in the tokens')
  return Phrase(tuple(tokens), score)


def _score(text: str, where: str) -> float:
  try:
    score = float(text)
  except ValueError:
    score = math.nan
  if not 0.0 < score < math.inf:
    raise HotwordError(
      f'{where}: score {text.strip()!r} must be a positive number'
    )
  return score
