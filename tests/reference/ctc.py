"""CTC by enumeration: every path of a tiny utterance."""

import itertools

import numpy as np


def collapse(path, *, blank_id: int):
  """Tokens of a frame-wise path, and first and last frame of their runs."""
  tokens, first, last = [], [], []
  for token, run in itertools.groupby(enumerate(path), key=lambda e: e[1]):
    frames = [frame for frame, _ in run]
    if token != blank_id:
      tokens.append(int(token))
      first.append(frames[0])
      last.append(frames[-1])
  return tokens, first, last


def prefixes(log_probs: np.ndarray, *, blank_id: int):
  """Maps each prefix to (log-prob, last frames of its best path's runs)."""
  num_frames, vocabulary = log_probs.shape
  sums, best = {}, {}
  # V ** T of them: for a handful of frames and tokens.
  for path in itertools.product(range(vocabulary), repeat=num_frames):
    score = sum(log_probs[t, u] for t, u in enumerate(path))
    tokens, _, last = collapse(path, blank_id=blank_id)
    key = tuple(tokens)
    # CTC sums over all paths that read the same (Graves et al., 2006).
    sums[key] = np.logaddexp(sums.get(key, -np.inf), score)
    if score > best.get(key, (-np.inf, None))[0]:
      best[key] = (score, last)
  return {key: (sums[key], best[key][1]) for key in sums}
