"""Greedy, prefix beam, attention beam, and rescoring, utterance by utterance."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.verification import compare
from experiments.verification import decoders_and_losses
from experiments.verification import encoder
from experiments.verification import port as port_lib
from experiments.verification import registry
from u2moe_jax.decoding import hypotheses
from u2moe_jax.decoding import programs
from u2moe_jax.decoding import rescoring
from u2moe_jax.decoding import tree_rescoring

# One utterance's results by the reference's names.
Record = Mapping[str, Any]

_TOLERANCES = {
  'score': compare.SCORE,
  'nbest_scores': compare.SCORE,
  'confidence': compare.LOG_PROBS,
  'tokens_confidence': compare.LOG_PROBS,
  'l2r_scores': compare.SCORE,
  'r2l_scores': compare.SCORE,
  'ctc_scores': compare.SCORE,
  'nbest_ctc_only_scores': compare.SCORE,
  'nbest_context_bonus_before_finalize': compare.SCORE,
  'nbest_finalize_score': compare.SCORE,
  'step_scores': compare.SCORE,
  'total': compare.SCORE,
  'finalize': compare.SCORE,
}


@dataclasses.dataclass(frozen=True)
class _Setting:
  """What a search is asked, as the name of its result says.

  Attributes:
    chunk: encoder frames per chunk.
    left: chunks of left context.
    beam: hypotheses.
    blank_penalty: off the blank's logit.
    ctc_weight: in rescoring.
    reverse_weight: in rescoring.
    length_penalty: of the attention search.
  """

  chunk: int
  left: int
  beam: int
  blank_penalty: float
  ctc_weight: float
  reverse_weight: float
  length_penalty: float

  @classmethod
  def of(cls, quantity: registry.Quantity) -> '_Setting':
    return cls(
      # What a name does not say has the reference's default.
      chunk=quantity.integer('chunk', -1),
      left=quantity.integer('left', -1),
      beam=quantity.integer('beam', 10),
      blank_penalty=quantity.number('penalty', 0.0),
      ctc_weight=quantity.number('ctc', 0.0),
      reverse_weight=quantity.number('rev', 0.0),
      length_penalty=quantity.number('lenpen', 0.0),
    )


def _encoded(port: port_lib.Port, setting: _Setting) -> programs.Encoded:
  output = encoder.encode(port, setting.chunk, setting.left)
  return programs.Encoded(
    frames=output.frames,
    log_probs=decoders_and_losses.log_probs(
      port, setting.chunk, setting.left, setting.blank_penalty
    ),
    mask=output.mask,
    # Margins are not compared.
    margin=jnp.full((len(output.mask),), jnp.inf),
  )


def _prefixes(port: port_lib.Port, setting: _Setting) -> hypotheses.Hypotheses:
  # Weights that this search does not know are no part of the key: all settings
  # that differ in these share it.
  key = dataclasses.replace(
    setting, ctc_weight=0.0, reverse_weight=0.0, length_penalty=0.0
  )
  return port.once(
    ('prefixes', key),
    lambda: programs.search_prefixes(
      _encoded(port, setting),
      beam=setting.beam,
      blank_id=port.config.blank_id,
      # Its token times now and then belong to a slightly worse alignment.
      alignment='reference',
    ),
  )


def _greedy(port: port_lib.Port, setting: _Setting) -> Sequence[Record]:
  found = programs.search_greedy(
    _encoded(port, setting), blank_id=port.config.blank_id
  )
  return [{'tokens': row['tokens']} for row in records(found)]


def _prefix_beam(port: port_lib.Port, setting: _Setting) -> Sequence[Record]:
  return records(_prefixes(port, setting))


def _attention(port: port_lib.Port, setting: _Setting) -> Sequence[Record]:
  found = programs.search_attention(
    port.model,
    port.params,
    _encoded(port, setting),
    beam=setting.beam,
    length_penalty=setting.length_penalty,
    # The reference may search as many steps as the padded batch has frames.
    reference_limits=True,
  )
  return [{'tokens': row['tokens']} for row in records(found)]


def _rescored(port: port_lib.Port, setting: _Setting) -> rescoring.Rescored:
  """The re-ranked list. A weight without its decoder is ignored."""
  two_sided = port.config.decoder.num_reverse_blocks > 0

  def compute():
    encoded = _encoded(port, setting)
    return jax.device_get(
      tree_rescoring.search_rescoring(
        port.model,
        port.params,
        _prefixes(port, setting),
        encoded.frames,
        encoded.mask,
        ctc_weight=setting.ctc_weight,
        reverse_weight=setting.reverse_weight if two_sided else 0.0,
      )
    )

  return port.once(('rescored', setting), compute)


def _rescoring(port: port_lib.Port, setting: _Setting) -> Sequence[Record]:
  """One hypothesis for each utterance."""
  found = _rescored(port, setting)
  return [
    {
      'tokens': row['tokens'],
      'score': row['score'],
      'times': row['times'],
      'confidence': float(found.confidence[b, 0]),
      'tokens_confidence': found.token_confidence[b, 0, : len(row['tokens'])],
    }
    for b, row in enumerate(records(found.hypotheses))
  ]


def _detail(port: port_lib.Port, setting: _Setting) -> Sequence[Record]:
  """What the scores are made of, in the order of the n-best list."""
  nbest = records(_prefixes(port, setting))
  # With this weight both decoders are run; the parts are without it.
  setting = dataclasses.replace(setting, reverse_weight=0.5)
  found = _rescored(port, setting)
  parts = {'l2r': found.l2r, 'r2l': found.r2l, 'ctc': found.ctc}
  result = []
  for b, row in enumerate(records(found.hypotheses)):
    # Back from the order of the new scores to that of the first pass.
    order = [row['nbest'].index(tokens) for tokens in nbest[b]['nbest']]
    result.append({f'{k}_scores': part[b, order] for k, part in parts.items()})
  return result


def records(found: hypotheses.Hypotheses) -> list[dict[str, Any]]:
  """An n-best list in the reference's form; empty slots are left out."""
  found = jax.device_get(found)
  return [_record(found, row) for row in range(len(found.lengths))]


def _record(found: hypotheses.Hypotheses, row: int) -> dict[str, Any]:
  alive = np.flatnonzero(found.scores[row] > -np.inf)
  cut = lambda field: [
    field[row, n, : found.lengths[row, n]].tolist() for n in alive
  ]
  nbest, times = cut(found.tokens), cut(found.times)
  scores = found.scores[row, alive].tolist()  # [n-best]
  return {
    'tokens': nbest[0] if nbest else [],
    'score': scores[0] if nbest else -np.inf,
    'times': times[0] if nbest else [],
    'nbest': nbest,
    'nbest_scores': scores,
    'nbest_times': times,
  }


_SEARCHES: dict[str, Callable[[port_lib.Port, _Setting], Sequence[Record]]] = {
  'ctc_greedy_search': _greedy,
  'ctc_prefix_beam_search': _prefix_beam,
  'attention': _attention,
  'attention_rescoring': _rescoring,
  'rescoring_detail': _detail,
}


def _search(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  ours = _SEARCHES[quantity.text('mode')](port, _Setting.of(quantity))
  yield from compare_records(quantity.path, ours, quantity.value)


def compare_records(
  path: str, ours: Sequence[Record], theirs: Sequence[Any]
) -> Iterator[compare.Row]:
  """One row per field, over all utterances.

  A plain list stands for its tokens. A field that ours lacks is a failure.
  """
  theirs = [_normal(each) for each in theirs]
  for field in sorted({field for each in theirs for field in each}):
    name = f'{path} {field}'
    if any(field not in each for each in ours):
      yield compare.failed(name, 'no check knows this field')
      continue
    actual = [each[field] for each in ours]
    # None where one of their records lacks what another has; that differs.
    expected = [each.get(field) for each in theirs]
    if field in _TOLERANCES:
      limit = _TOLERANCES[field]
      yield compare.close_lists(name, actual, expected, limit)
    else:
      yield compare.equal_lists(name, actual, expected)


def _normal(record: Any) -> dict[str, Any]:
  """Drops impossible hypotheses, which we do not list."""
  if isinstance(record, list):
    return {'tokens': record}
  scores = record.get('nbest_scores', record.get('ctc_scores'))
  if scores is None or np.isfinite(scores).all():
    return dict(record)
  alive = np.flatnonzero(np.isfinite(scores))
  return {
    key: [value[n] for n in alive]
    if isinstance(value, list) and len(value) == len(scores)
    else value
    for key, value in record.items()
  }


_NUMBER = r'-?\d+(\.\d+)?'
_OPTIONS = (
  rf'(_lenpen(?P<lenpen>{_NUMBER}))?(_ctc(?P<ctc>{_NUMBER}))?'
  rf'(_rev(?P<rev>{_NUMBER}))?(_blank_penalty(?P<penalty>{_NUMBER}))?'
)
_MODES = (
  'ctc_greedy_search|ctc_prefix_beam_search|attention_rescoring|attention|'
  'rescoring_detail'
)

RULES = (
  registry.Rule(
    rf'results/search/(?P<mode>{_MODES})(_?beam(?P<beam>\d+))?{_OPTIONS}',
    _search,
  ),
  registry.Rule(
    r'results/search/decode_chunk(?P<chunk>-?\d+)_left(?P<left>-?\d+)'
    rf'(_beam(?P<beam>\d+))?{_OPTIONS}/(?P<mode>{_MODES})',
    _search,
  ),
)
