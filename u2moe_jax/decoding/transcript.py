"""What was heard, and where in the sound."""

from collections.abc import Sequence
import dataclasses
import math

from u2moe_jax.decoding import endpoint
from u2moe_jax.text import words as words_lib

# Times are given to the millisecond.
_DIGITS = 3


@dataclasses.dataclass(frozen=True)
class Alternative:
  """One entry of an n-best list."""

  text: str
  tokens: tuple[int, ...]
  score: float


@dataclasses.dataclass(frozen=True)
class Span:
  """A part of a long recording: seconds, and what was said there."""

  start: float
  end: float
  text: str


@dataclasses.dataclass(frozen=True)
class Transcript:
  """What was heard.

  Attributes:
    text: the words; token ids where the checkpoint has no token table.
    tokens: token ids.
    score: log score of the search (its meaning depends on the mode).
    times: seconds at which each token ends; empty in `attention` mode, which
      knows none.
    confidence: probability per token, geometric mean; rescoring only.
    margin: smallest gap any decision hung on, of routers and search; near 0
      another machine may decide otherwise.
    nbest: the alternatives, best first.
    token_confidence: probability of each token; rescoring only.
    words: with start and end; empty where there are no times.
    segments: where a long recording was cut, and what each part says; empty
      where it was decoded whole.
  """

  text: str
  tokens: tuple[int, ...]
  score: float
  times: tuple[float, ...]
  confidence: float | None
  margin: float
  nbest: tuple[Alternative, ...]
  token_confidence: tuple[float, ...] = ()
  words: tuple[words_lib.TimedWord, ...] = ()
  segments: tuple[Span, ...] = ()


@dataclasses.dataclass(frozen=True)
class Segment:
  """A part of a stream or of a long recording.

  Attributes:
    start: seconds at which its sound begins.
    end: and ends.
    transcript: what was said in it; its times count from the beginning of the
      whole, not of the segment.
    reason: the rule that ended it; `end`: the sound did.
  """

  start: float
  end: float
  transcript: Transcript
  reason: endpoint.Reason = 'end'


def empty() -> Transcript:
  """Nothing was heard."""
  return Transcript(
    text='',
    tokens=(),
    score=0.0,
    times=(),
    confidence=None,
    margin=math.inf,
    nbest=(Alternative('', (), 0.0),),
  )


def shift(transcript: Transcript, seconds: float) -> Transcript:
  """The same, so many seconds later."""
  return dataclasses.replace(
    transcript,
    times=tuple(round(t + seconds, _DIGITS) for t in transcript.times),
    words=tuple(
      dataclasses.replace(
        word, start=word.start + seconds, end=word.end + seconds
      )
      for word in transcript.words
    ),
  )


def join(segments: Sequence[Segment]) -> Transcript:
  """One transcript of consecutive segments.

  The score is the sum of theirs, the confidence the geometric mean over all
  tokens; of alternatives only the best remain.
  """
  parts = [segment.transcript for segment in segments]
  gather = lambda name: tuple(x for part in parts for x in getattr(part, name))
  text = words_lib.join(part.text for part in parts)
  score = math.fsum(part.score for part in parts)
  tokens = gather('tokens')
  return Transcript(
    text=text,
    tokens=tokens,
    score=score,
    times=gather('times'),
    confidence=_confidence(parts),
    margin=min((part.margin for part in parts), default=math.inf),
    nbest=(Alternative(text, tokens, score),),
    token_confidence=gather('token_confidence'),
    words=gather('words'),
    segments=tuple(
      Span(each.start, each.end, each.transcript.text) for each in segments
    ),
  )


def _confidence(parts: Sequence[Transcript]) -> float | None:
  total, count = 0.0, 0
  for part in parts:
    if part.confidence is None:
      continue
    size = len(part.tokens) + 1  # the end counts as a token
    # (log 0 would raise; such a part makes the whole 0.)
    total += size * (
      math.log(part.confidence) if part.confidence else -math.inf
    )
    count += size
  return math.exp(total / count) if count else None
