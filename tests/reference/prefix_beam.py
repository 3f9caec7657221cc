"""CTC prefix beam search, one utterance, float64, a dictionary of prefixes."""

import dataclasses

import numpy as np

NEVER = -np.inf


@dataclasses.dataclass
class _Entry:
  """Sums and best alignments of one prefix, by how they end."""

  blank: float = NEVER
  token: float = NEVER
  best_blank: float = NEVER
  best_token: float = NEVER
  times_blank: tuple = ()
  times_token: tuple = ()
  has_times: bool = False  # set for this frame already

  @property
  def total(self):
    return np.logaddexp(self.blank, self.token)

  @property
  def best(self):
    """Score and times of the better alignment."""
    if self.best_blank > self.best_token:
      return self.best_blank, self.times_blank
    return self.best_token, self.times_token


@dataclasses.dataclass
class _Rules:
  blank_id: int
  alignment: str
  banned: object  # prefixes that may not be reached by extension


def search(
  log_probs, *, beam, blank_id, alignment='reference', merge=True, bonus=None
):
  """Returns [(tokens, score, times)], best first, and the smallest gap.

  Args:
    log_probs: (T, V).
    beam: prefixes kept, and tokens tried at each frame.
    blank_id: id of the blank.
    alignment: 'best', or 'reference' with its rule for a repeat after the
      parent's extension: the score is raised, the times stay.
    merge: False breaks the search, as a negative control: what extends to a
      prefix that is already there is thrown away.
    bonus: of a prefix, added where prefixes are compared; the scores returned
      are without it.
  """
  bonus = bonus or (lambda prefix: 0.0)
  log_probs = np.asarray(log_probs, np.float64)
  # Before the first frame: the empty prefix, with certainty.
  entries = {(): _Entry(blank=0.0, best_blank=0.0, best_token=0.0)}
  margin = np.inf
  for time, frame in enumerate(log_probs):
    rules = _Rules(blank_id, alignment, () if merge else entries)
    # Stable, so that ties fall as in `lax.top_k`: the smaller id first.
    order = np.argsort(-frame, kind='stable')[:beam]
    new = {}
    for token in (int(u) for u in order):
      for prefix, old in entries.items():
        _visit(new, prefix, old, token, frame[token], time, rules)
    found = [item for item in new.items() if item[1].total > NEVER]
    worth = lambda item: item[1].total + bonus(item[0])
    ranked = sorted(found, key=worth, reverse=True)
    if len(ranked) > beam:
      # What was dropped by less than rounding, another machine may keep.
      margin = min(margin, worth(ranked[beam - 1]) - worth(ranked[beam]))
    entries = dict(ranked[:beam])
  results = [(list(p), e.total, list(e.best[1])) for p, e in entries.items()]
  if len(results) > 1:
    margin = min(margin, results[0][1] - results[1][1])
  return results, margin


def _visit(new, prefix, old, token, value, time, rules):
  """Adds what one prefix and one token give."""
  if token == rules.blank_id:
    entry = new.setdefault(prefix, _Entry())
    # A blank keeps the prefix, however it ended before.
    entry.blank = np.logaddexp(entry.blank, old.total + value)
    entry.best_blank = old.best[0] + value
    entry.times_blank = old.best[1]
    return
  repeats = bool(prefix) and prefix[-1] == token
  if repeats:
    entry = new.setdefault(prefix, _Entry())
    # The same token again without a blank between is the same run.
    entry.token = np.logaddexp(entry.token, old.token + value)
    if old.best_token + value > entry.best_token:
      entry.best_token = old.best_token + value
      if rules.alignment == 'best' or not entry.has_times:
        entry.times_token = old.times_token[:-1] + (time,)
        entry.has_times = True
  longer = (*prefix, token)
  if longer in rules.banned:
    return
  # A second equal token needs a blank before it; any other does not.
  source = old.blank if repeats else old.total
  best, times = (old.best_blank, old.times_blank) if repeats else old.best
  entry = new.setdefault(longer, _Entry())
  entry.token = np.logaddexp(entry.token, source + value)
  if best + value > entry.best_token:
    entry.best_token = best + value
    entry.times_token = (*times, time)
    entry.has_times = True
