"""Dev loss and greedy word error rate."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses

import jax
import numpy as np

from u2moe_jax.array_types import PyTree
from u2moe_jax.ops import ctc
from u2moe_jax.text import scoring
from u2moe_jax.training import metrics as metrics_lib
from u2moe_jax.training import objective

# What the data side gives: a placed batch, and the texts of its real rows.
LabelledBatch = tuple[objective.Batch, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Results on a dev set.

  Attributes:
    losses: mean of every loss part.
    wer: greedy CTC word error rate, per cent.
    errors: its counts.
  """

  losses: dict[str, float]
  wer: float
  errors: scoring.ErrorCounts


def evaluate(
  eval_step: Callable[..., tuple],
  params: PyTree,
  buffers: PyTree,
  batches: Iterable[LabelledBatch],
  *,
  to_text: Callable[[Sequence[int]], str],
  blank_id: int,
  should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
  """Runs every batch once and merges.

  Args:
    eval_step: see `step.make_eval_step`.
    params: parameters.
    buffers: buffers.
    batches: placed batches and their transcripts; rows behind the
      transcripts are empty.
    to_text: token ids to text.
    blank_id: CTC blank.
    should_stop: asked before each batch.

  Returns:
    The results; None if it was stopped.
  """
  total, pairs = None, []
  for batch, texts in batches:
    if should_stop():
      return None
    results, ids, mask = eval_step(params, buffers, batch)
    total = metrics_lib.merge(total, results)
    collapsed = _collapse(ids, mask, blank_id)
    pairs += [
      (text, to_text(tokens))
      for text, tokens in zip(texts, collapsed, strict=False)
    ]
  errors = scoring.corpus_errors(pairs)
  values = metrics_lib.compute(total or {})
  # Loads of experts are arrays; they are watched in training.
  losses = {k: float(v) for k, v in values.items() if np.ndim(v) == 0}
  return Evaluation(losses=losses, wer=errors.rate, errors=errors)


def _collapse(
  ids: jax.Array, mask: jax.Array, blank_id: int
) -> list[list[int]]:
  tokens, lengths, _ = jax.jit(ctc.collapse, static_argnames='blank_id')(
    ids, mask, blank_id=blank_id
  )
  tokens, lengths = np.asarray(tokens), np.asarray(lengths)
  return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
