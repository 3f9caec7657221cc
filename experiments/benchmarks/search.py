"""CTC prefix beam search alone: 500 frames, 5,000 tokens, beam 10.

Without hotwords, and with 50 of 4 to 8 tokens.
"""

from collections.abc import Iterator
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import harness
from u2moe_jax.decoding import hotwords
from u2moe_jax.decoding import prefix_beam

_FRAMES, _VOCAB, _BEAM = 500, 5000, 10
_HOTWORDS = 50
# Peaky posteriors are what a trained model gives, flat ones the worst case.
_SCALES = {'flat': 1.0, 'peaky': 6.0}


def run(options: harness.Options) -> Iterator[dict[str, Any]]:
  """Utterances per second, with times, by batch size."""
  # One function; each batch size, and hotwords or none, is a program.
  find = jax.jit(
    functools.partial(
      prefix_beam.ctc_prefix_beam_search, beam=_BEAM, blank_id=0
    )
  )
  graphs = {0: None, _HOTWORDS: _random_hotwords(_HOTWORDS)}
  for case, scale in _SCALES.items():
    for batch, number in itertools.product(options.batches, graphs):
      shape = (batch, _FRAMES, _VOCAB)
      logits = scale * jax.random.normal(jax.random.key(0), shape)
      log_probs = jax.nn.log_softmax(logits)
      mask = jnp.ones(shape[:2], bool)
      walls = harness.measure(
        functools.partial(find, log_probs, mask, graph=graphs[number]),
        options.repeats,
      )
      yield {
        'bench': 'search',
        'case': case,
        'batch': batch,
        'hotwords': number,
        **walls,
        'utt_per_s': round(batch / walls['wall_s'], 1),
      }


def _random_hotwords(number: int) -> hotwords.HotwordGraph:
  rng = np.random.default_rng(0)
  phrases = [
    hotwords.Phrase(tuple(rng.integers(1, _VOCAB, size).tolist()), 2.0)
    for size in rng.integers(4, 9, number)
  ]
  return hotwords.build(phrases, vocab_size=_VOCAB)
