"""Attention rescoring of one n-best list, in loops."""

import numpy as np


def rescore(nbest, scores, l2r, r2l, *, eos_id, ctc_weight, reverse_weight):
  """Returns the ranked list of dicts.

  Args:
    nbest: token lists.
    scores: CTC score of each.
    l2r: (N, U1, V) log-probs, left to right.
    r2l: (N, U1, V) log-probs, fed with the reversed tokens.
    eos_id: id of the end.
    ctc_weight: weight of the CTC score.
    reverse_weight: weight of the right-to-left decoder.
  """
  results = []
  for index, tokens in enumerate(nbest):
    size = len(tokens)
    forward = [l2r[index, j, u] for j, u in enumerate(tokens)]
    # This decoder was fed from the end: token j is its (size - 1 - j)-th.
    backward = [r2l[index, size - 1 - j, u] for j, u in enumerate(tokens)]
    sums = [
      sum(forward) + l2r[index, size, eos_id],
      sum(backward) + r2l[index, size, eos_id],
    ]
    attention = (1 - reverse_weight) * sums[0] + reverse_weight * sums[1]
    confidences = np.exp(forward)
    if reverse_weight > 0:
      confidences = (confidences + np.exp(backward)) / 2
    results.append({
      'tokens': list(tokens),
      'score': attention + ctc_weight * scores[index],
      # The mean over tokens and eos.
      'confidence': np.exp(attention / (size + 1)),
      'token_confidence': confidences,
      'l2r': sums[0],
      'r2l': sums[1],
      'ctc': scores[index],
    })  # fmt: skip
  return sorted(results, key=lambda result: -result['score'])
