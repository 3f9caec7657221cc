"""CTC prefix beam search alone: 500 frames, 5,000 tokens, beam 10."""

from collections.abc import Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import harness
from u2moe_jax.decoding import prefix_beam

_FRAMES, _VOCAB, _BEAM = 500, 5000, 10
# Peaky posteriors are what a trained model gives, flat ones the worst case.
_SCALES = {'flat': 1.0, 'peaky': 6.0}


def run(options: harness.Options) -> Iterator[dict[str, Any]]:
  """Utterances per second, with times, by batch size."""
  find = jax.jit(
    functools.partial(
      prefix_beam.ctc_prefix_beam_search, beam=_BEAM, blank_id=0
    )
  )
  for case, scale in _SCALES.items():
    for batch in options.batches:
      shape = (batch, _FRAMES, _VOCAB)
      logits = scale * jax.random.normal(jax.random.key(0), shape)
      log_probs = jax.nn.log_softmax(logits)
      mask = jnp.ones(shape[:2], bool)
      walls = harness.measure(
        functools.partial(find, log_probs, mask), options.repeats
      )
      yield {
        'bench': 'search',
        'case': case,
        'batch': batch,
        **walls,
        'utt_per_s': round(batch / walls['wall_s'], 1),
      }
