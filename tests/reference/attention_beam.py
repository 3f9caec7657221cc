"""Beam search over a function of the history, one utterance, in NumPy."""

import itertools

import numpy as np


def search(log_probs, *, beam, eos_id, max_length, length_penalty=0.0):
  """Returns [(tokens, score)], best first.

  Args:
    log_probs: maps a tuple of tokens, without sos, to (V,) log-probs.
    beam: hypotheses kept.
    eos_id: id of the end.
    max_length: most tokens.
    length_penalty: exponent of the length that divides the score.
  """
  live = [((), 0.0)]
  for _ in range(max_length):
    if all(tokens and tokens[-1] == eos_id for tokens, _ in live):
      break
    candidates = []
    for tokens, score in live:
      if tokens and tokens[-1] == eos_id:
        # What has ended competes with its score as it is.
        candidates.append((tokens, score))
        continue
      frame = log_probs(tokens)
      for token in np.argsort(-frame, kind='stable')[:beam]:
        candidates.append(((*tokens, int(token)), score + frame[token]))
    candidates.sort(key=lambda item: -item[1])
    live = candidates[:beam]
  return _rank(live, eos_id, length_penalty)


def exhaustive(log_probs, *, vocabulary: int, eos_id: int, max_length: int):
  """Returns the best (tokens, score) of all sequences there are."""
  best = ((), -np.inf)
  for length in range(1, max_length + 1):
    for tokens in itertools.product(range(vocabulary), repeat=length):
      # Nothing comes behind eos, and only what ran out of room lacks it.
      if eos_id in tokens[:-1]:
        continue
      if tokens[-1] != eos_id and length < max_length:
        continue
      score = sum(log_probs(tokens[:i])[u] for i, u in enumerate(tokens))
      best = max(best, (tokens, score), key=lambda item: item[1])
  return _rank([best], eos_id, 0.0)[0]


def _rank(live, eos_id: int, length_penalty: float):
  """Drops the eos and sorts by penalised score."""
  results = []
  for tokens, score in live:
    kept = [token for token in tokens if token != eos_id]
    if length_penalty and not kept:
      # No token, nothing to divide by: it comes last.
      score = -np.inf
    elif length_penalty:
      score /= len(kept) ** length_penalty
    results.append((kept, score))
  return sorted(results, key=lambda item: -item[1])
