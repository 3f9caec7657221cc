"""Searches in given posteriors, with and without hotwords."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.verification import compare
from experiments.verification import port as port_lib
from experiments.verification import registry
from experiments.verification import search
from u2moe_jax.array_types import Array
from u2moe_jax.decoding import greedy
from u2moe_jax.decoding import hotwords
from u2moe_jax.decoding import prefix_beam
from u2moe_jax.ops import masks

_advance = jax.jit(
  prefix_beam.advance, static_argnames=('blank_id', 'alignment')
)
_finish = jax.jit(prefix_beam.finish, static_argnames='finalize')
_extend = jax.jit(hotwords.extend)


def _posteriors(port: port_lib.Port, kind: str) -> tuple[Array, Array]:
  """Log-probs of a kind, and which frames count."""
  log_probs = jnp.asarray(port.case.arrays[f'logp_{kind}'])
  lengths = jnp.asarray(port.case.arrays['lens'], jnp.int32)
  mask = masks.length_mask(lengths, max_length=log_probs.shape[1])
  return log_probs, mask


def _blank(port: port_lib.Port) -> int:
  return port.case.results.get('blank', 0)


def _graph(port: port_lib.Port) -> hotwords.HotwordGraph:
  """The phrases of the case; nested ones as the reference has them."""

  def compute():
    results = port.case.results
    score = float(results['context_score'])
    phrases = [
      hotwords.Phrase(tuple(tokens), score)
      for tokens in results['context_phrases']
    ]
    walks = [walk['tokens'] for walk in results.get('context_walks', ())]
    seen = [max(tokens, default=0) for tokens in walks]
    sizes = [
      array.shape[-1]
      for name, array in port.case.arrays.items()
      if name.startswith('logp_')
    ]
    largest = max(max(phrase.tokens) for phrase in phrases)
    return hotwords.build(
      phrases,
      # The case does not tell it; every id that occurs needs a column.
      vocab_size=max([largest + 1, *(n + 1 for n in seen), *sizes]),
      # The reference never completes a phrase that begins a longer one before
      # it.
      nested_phrases=False,
    )

  return port.once('graph', compute)


def _searched(
  port: port_lib.Port, kind: str, beam: int, graph: hotwords.HotwordGraph | None
) -> prefix_beam.BeamState:
  """The state after the last frame."""

  def compute():
    log_probs, mask = _posteriors(port, kind)
    state = prefix_beam.init_state(
      len(log_probs),
      beam=beam,
      max_tokens=log_probs.shape[1],
      with_hotwords=graph is not None,
    )
    return _advance(
      state,
      log_probs,
      mask,
      blank_id=_blank(port),
      alignment='reference',
      graph=graph,
    )

  # Of hotwords a case has one list, so with or without is all there is to know.
  return port.once(('context', kind, beam, graph is None), compute)


def _greedy(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  found = greedy.ctc_greedy_search(
    *_posteriors(port, quantity.text('kind')), blank_id=_blank(port)
  )
  # Of a greedy search the case has tokens alone.
  ours = [{'tokens': row['tokens']} for row in search.records(found)]
  yield from search.compare_records(quantity.path, ours, quantity.value)


def _plain(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  kind, beam = quantity.text('kind'), quantity.integer('beam', 1)
  found = _finish(_searched(port, kind, beam, None))
  ours = search.records(found)
  yield from search.compare_records(quantity.path, ours, quantity.value)


def _with_hotwords(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """The reference's form, the parts of its scores, and the intended form."""
  kind, beam = quantity.text('kind'), quantity.integer('beam', 1)
  graph = _graph(port)
  state = _searched(port, kind, beam, graph)
  # `replace` is the reference's finish: what is given back takes the place of
  # the bonus, and the list keeps its order.
  ours = search.records(_finish(state, graph=graph, finalize='replace'))
  for record, parts in zip(ours, _parts(state, graph)):
    record |= parts
  yield from search.compare_records(quantity.path, ours, quantity.value)
  intended = search.records(_finish(state, graph=graph))
  expected = [_intended(record) for record in quantity.value]
  yield from search.compare_records(
    f'{quantity.path} intended', intended, expected
  )


def _parts(
  state: Any, graph: hotwords.HotwordGraph
) -> Iterator[dict[str, Any]]:
  """What the scores of each utterance are made of."""
  beams = jax.device_get(state.beams)
  log_probs = np.logaddexp(beams.blank, beams.nonblank)  # [B, N]
  # In float32 the sums stay small, relative to the best beam; this leads back.
  offset = beams.offset - beams.offset_error  # [B]
  loans = np.asarray(hotwords.on_loan(graph, state.beams.words))  # [B, N]
  for row, scores in enumerate(log_probs):
    alive = np.isfinite(scores)
    yield {
      'nbest_ctc_only_scores': (scores + offset[row])[alive],
      'nbest_context_bonus_before_finalize': beams.words.bonus[row][alive],
      'nbest_finalize_score': -loans[row][alive],
    }


def _intended(record: dict[str, Any]) -> dict[str, Any]:
  """The list sorted by log-prob, bonus and what is given back, together."""
  scores = np.sum(
    [
      record['nbest_ctc_only_scores'],
      record['nbest_context_bonus_before_finalize'],
      record['nbest_finalize_score'],
    ],
    axis=0,
  )
  order = np.argsort(-scores, kind='stable')
  return {
    'nbest': [record['nbest'][n] for n in order],
    'nbest_scores': scores[order].tolist(),
    'nbest_times': [record['nbest_times'][n] for n in order],
  }


def _walks(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """Bonus of every step through the automaton, and what is given back."""
  graph = _graph(port)
  ours = [_walk(graph, walk['tokens']) for walk in quantity.value]
  yield from search.compare_records(quantity.path, ours, quantity.value)


def _walk(graph: hotwords.HotwordGraph, tokens: list[int]) -> dict[str, Any]:
  # One prefix, without the axis of the batch: [1].
  state, totals = jax.tree.map(lambda x: x[0], hotwords.init_state(1, 1)), [0.0]
  for token in tokens:
    grown = _extend(graph, state, graph.columns[np.array([token])])
    # One prefix by one token: [1, 1] to [1].
    state = jax.tree.map(lambda field: field[:, 0], grown)
    totals.append(float(state.bonus[0]))
  return {
    'tokens': tokens,
    'step_scores': np.diff(totals),
    'total': totals[-1],
    'finalize': -float(hotwords.on_loan(graph, state)[0]),
  }


RULES = (
  registry.Rule(r'results/(?P<kind>\w+)\.greedy', _greedy),
  registry.Rule(r'results/(?P<kind>\w+)\.beam(?P<beam>\d+)', _plain),
  registry.Rule(
    r'results/(?P<kind>\w+)\.beam(?P<beam>\d+)\.context', _with_hotwords
  ),
  registry.Rule('results/context_walks', _walks),
)
