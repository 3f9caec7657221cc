"""Transcripts as files that other programs read: CTM, SRT, WebVTT.

All of it is text made from words with times; nothing here knows of models.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses

from u2moe_jax.text import words as words_lib

# What subtitling guidelines agree on: two lines of 42 characters, 7 seconds.
_MOST_CHARACTERS = 84
_MOST_SECONDS = 7.0
# A pause this long ends a caption.
_PAUSE_SECONDS = 0.8


@dataclasses.dataclass(frozen=True)
class Caption:
  """Text that is shown from `start` to `end`, seconds."""

  start: float
  end: float
  text: str


def captions(
  words: Sequence[words_lib.TimedWord],
  *,
  max_characters: int = _MOST_CHARACTERS,
  max_seconds: float = _MOST_SECONDS,
  pause: float = _PAUSE_SECONDS,
) -> list[Caption]:
  """Groups words into captions.

  Args:
    words: in order.
    max_characters: longest caption, unless a single word is longer.
    max_seconds: longest time one is shown, likewise.
    pause: seconds of silence that end one.
  """
  groups: list[list[words_lib.TimedWord]] = []
  for word in words:
    open_one = groups[-1] if groups else []
    if (
      not open_one
      or word.start - open_one[-1].end >= pause
      or word.end - open_one[0].start > max_seconds
      or len(_text([*open_one, word])) > max_characters
    ):
      groups.append([word])
    else:
      open_one.append(word)
  return [Caption(g[0].start, g[-1].end, _text(g)) for g in groups]


def _text(words: Iterable[words_lib.TimedWord]) -> str:
  return words_lib.join(word.text for word in words)


def srt(shown: Sequence[Caption]) -> str:
  """SubRip, numbered from 1."""
  blocks = [
    f'{number}\n{_clock(each.start, ",")} --> {_clock(each.end, ",")}\n'
    f'{each.text}\n'
    for number, each in enumerate(shown, start=1)
  ]
  return '\n'.join(blocks)


def vtt(shown: Sequence[Caption]) -> str:
  """WebVTT; `&` and `<` are escaped, as they would begin markup."""
  blocks = ['WEBVTT\n']
  for each in shown:
    # `&` first, or the escapes themselves would be escaped.
    text = each.text.replace('&', '&amp;').replace('<', '&lt;')
    text = text.replace('>', '&gt;')
    times = f'{_clock(each.start, ".")} --> {_clock(each.end, ".")}'
    blocks.append(f'{times}\n{text}\n')
  return '\n'.join(blocks)


def ctm(
  key: str, words: Iterable[words_lib.TimedWord], *, channel: str = '1'
) -> Iterator[str]:
  """NIST time-marked conversation lines.

  Yields:
    `KEY CHANNEL START DURATION WORD CONFIDENCE`; the last is left out where it
    is not known.
  """
  for word in words:
    duration = max(word.end - word.start, 0.0)
    line = f'{key} {channel} {word.start:.3f} {duration:.3f} {word.text}'
    if word.confidence is not None:
      line += f' {word.confidence:.3f}'
    yield line


def _clock(seconds: float, point: str) -> str:
  """Hours, minutes, seconds and milliseconds."""
  # Rounded once, before it is taken apart: no field can read 60 or 1000.
  thousandths = round(1000 * max(seconds, 0.0))
  whole, rest = divmod(thousandths, 1000)
  minutes, second = divmod(whole, 60)
  hours, minute = divmod(minutes, 60)
  return f'{hours:02d}:{minute:02d}:{second:02d}{point}{rest:03d}'
