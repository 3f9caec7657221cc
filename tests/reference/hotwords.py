"""Bonus of a prefix under a list of hotwords, by comparing strings."""


def bonus(tokens, phrases):
  """Returns (what completed phrases earned, what the current one borrows).

  Args:
    tokens: the prefix.
    phrases: {tuple of ids: bonus per token}.
  """
  tokens = tuple(tokens)
  earned = sum(
    _worth(phrase, phrases)
    for phrase in phrases
    for end in range(1, len(tokens) + 1)
    if tokens[:end][-len(phrase) :] == phrase
  )
  # What is under way is the longest end that begins a phrase, whole ones too.
  begun = [
    phrase[:size]
    for phrase in phrases
    for size in range(1, len(phrase) + 1)
    if tokens[-size:] == phrase[:size]
  ]
  longest = max(begun, key=len, default=())
  return earned, _worth(longest, phrases)


def _worth(beginning, phrases):
  """Each token counts as much as the best phrase that begins like that."""
  return sum(
    max(
      score
      for phrase, score in phrases.items()
      if phrase[:size] == beginning[:size]
    )
    for size in range(1, len(beginning) + 1)
  )
