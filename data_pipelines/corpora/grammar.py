"""A small grammar of English sentences, for the built-in corpus.

Connected digits, numbers, dates, times, spelled letters and commands, written
as a recogniser should write them: upper-case words, single letters as words of
one letter.

The words are chosen so that sound decides: none sounds like another one in
any of the corpus's accents. So `TO`, `FOR`, `BY`, `SEE`, `ARE`, `TREE` or the
article `A` are missing (they sound like a digit or a letter), and nought is
always `ZERO` because `OH` is a letter.
"""

from collections.abc import Collection
import re
from typing import Any

import numpy as np

_MIN_WORDS = 2
_MAX_WORDS = 12
# A grammar with fewer sentences than asked for would otherwise loop for ever.
_MAX_TRIES = 10_000

_MONTHS = (
  'JANUARY FEBRUARY MARCH APRIL MAY JUNE JULY AUGUST SEPTEMBER OCTOBER '
  'NOVEMBER DECEMBER'
)
_TEENS = (
  'TEN ELEVEN TWELVE THIRTEEN FOURTEEN FIFTEEN SIXTEEN SEVENTEEN EIGHTEEN '
  'NINETEEN'
)
_LOW_ORDINALS = 'FIRST SECOND THIRD FOURTH FIFTH SIXTH SEVENTH EIGHTH NINTH'
_TEEN_ORDINALS = (
  'TENTH ELEVENTH TWELFTH THIRTEENTH FOURTEENTH FIFTEENTH SIXTEENTH '
  'SEVENTEENTH EIGHTEENTH NINETEENTH TWENTIETH THIRTIETH'
)
_HOURS = 'ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ELEVEN TWELVE'
# Names that are only spelled, so that they need to cover the alphabet.
_SPELLED_NAMES = (
  'ANNA BRIAN CLARA DAVID EMMA FRANK GWEN HUGO JAMES KEVIN LAURA OSCAR PETER '
  'QUINN SUSAN THOMAS WALTER XAVIER YVES ZOE'
)


def _split(text: str) -> tuple[str, ...]:
  return tuple(text.split())


# Symbol -> its expansions, all equally likely; `<name>` stands for another
# symbol. A repeated expansion is likelier. Each list is as long as the traffic
# through it can feed: a word should be heard often in a few thousand sentences.
_RULES: dict[str, tuple[str, ...]] = {
  'sentence': (
    *('<digits>',) * 3,
    *('<number>',) * 3,
    *('<date>',) * 4,
    *('<time>',) * 3,
    *('<spelling>',) * 3,
    *('<command>',) * 10,
  ),
  # Connected digits.
  'digit': _split('ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE'),
  'three': ('<digit> <digit> <digit>',),
  'four': ('<digit> <digit> <digit> <digit>',),
  'digits': (
    '<three>',
    '<four>',
    '<three> <digit> <digit>',
    '<three> <three>',
    '<three> <four>',
    '<four> <four>',
    'DIAL <three> <four>',
    'MY NUMBER IS <three> <three>',
    'THE CODE IS <four>',
  ),
  # Numbers.
  'small': _split('ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE'),
  'teen': _split(_TEENS),
  'tens': _split('TWENTY THIRTY FORTY FIFTY SIXTY SEVENTY EIGHTY NINETY'),
  'below_hundred': ('<small>', '<teen>', '<tens>', '<tens> <small>'),
  'two_places': ('<teen>', '<tens>', '<tens> <small>', '<tens> <small>'),
  'hundreds': (
    '<small> HUNDRED',
    '<small> HUNDRED AND <below_hundred>',
    '<small> HUNDRED AND <tens> <small>',
  ),
  'thousands': (
    '<below_hundred> THOUSAND',
    '<small> THOUSAND <hundreds>',
    '<two_places> THOUSAND <hundreds>',
    '<below_hundred> MILLION',
  ),
  'quantity': ('<two_places>', '<hundreds>', '<hundreds>', '<thousands>'),
  'number': (
    '<hundreds>',
    '<thousands>',
    'MINUS <two_places> POINT <digit>',
    '<below_hundred> POINT <digit> <digit>',
    '<two_places> PERCENT',
    '<two_places> PERCENT OF <quantity>',
    '<quantity> DOLLARS',
    '<quantity> DOLLARS AND <tens> CENTS',
    '<two_places> PLUS <two_places>',
    '<two_places> TIMES <below_hundred>',
  ),
  # Dates.
  'weekday': _split('MONDAY TUESDAY WEDNESDAY THURSDAY FRIDAY SATURDAY SUNDAY'),
  'month': _split(_MONTHS),
  'ordinal': (
    '<low_ordinal>',
    *('<teen_ordinal>',) * 3,
    'TWENTY <low_ordinal>',
  ),
  'low_ordinal': _split(_LOW_ORDINALS),
  'teen_ordinal': _split(_TEEN_ORDINALS),
  'year': (
    'NINETEEN <tens> <small>',
    'TWENTY <teen>',
    'TWENTY TWENTY <small>',
    'TWO THOUSAND AND <small>',
  ),
  'day': ('THE <ordinal> OF <month>', '<month> THE <ordinal>'),
  'date': (
    '<day>',
    '<day> <year>',
    '<month> <year>',
    '<weekday> THE <ordinal>',
    '<weekday> <day>',
    'ON <weekday> <day>',
    'NEXT <weekday> IS <day>',
  ),
  # Times of day.
  'hour': _split(_HOURS),
  'minute': (
    'FIVE',
    'TEN',
    'FIFTEEN',
    'TWENTY',
    'TWENTY FIVE',
    'THIRTY',
    'THIRTY FIVE',
    'FORTY',
    'FORTY FIVE',
    'FIFTY',
    'FIFTY <small>',
  ),
  'clock': (
    '<hour> <minute>',
    "<hour> O'CLOCK",
    'HALF PAST <hour>',
    'QUARTER PAST <hour>',
    '<hour> <minute> A M',
    '<hour> <minute> P M',
  ),
  'part': ('MORNING', 'AFTERNOON', 'EVENING'),
  'when': (
    'TODAY',
    'TOMORROW',
    'TONIGHT',
    'ON <weekday>',
    'AT NOON',
    'AT MIDNIGHT',
    'IN THE <part>',
    '<weekday> <part>',
  ),
  'time': (
    '<clock> <when>',
    '<minute> MINUTES PAST <hour>',
    '<minute> MINUTES BEFORE <hour>',
    'AT <clock>',
    'WAKE ME AT <clock>',
    'THE TIME IS <clock>',
    'MEETING AT <clock> <when>',
  ),
  # Spelled letters: names that context helps with, and codes that it does not.
  'letter': tuple('ABCDEFGHIJKLMNOPQRSTUVWXYZ'),
  'spelled': tuple(' '.join(name) for name in _split(_SPELLED_NAMES)),
  'name': _split('ANNA DAVID FRANK JAMES LAURA OSCAR CLARA THOMAS'),
  'code': (
    '<letter> <letter> <digit>',
    '<letter> <digit> <letter>',
    '<letter> <letter> <letter>',
    '<letter> <letter> <digit> <digit>',
    '<letter> <letter> <letter> <letter>',
  ),
  'spelling': (
    'SPELL <spelled>',
    'SPELL <code>',
    'MY NAME IS <spelled>',
    'MY NAME IS <letter> <letter> <name>',
    '<name> THAT IS <letter> <letter> <letter>',
    'CODE <code>',
    'GATE <letter> <below_hundred>',
    'FLIGHT <letter> <letter> <digit> <digit>',
    '<code> <code>',
    'ROOM <below_hundred> <letter>',
    'ENTER <code>',
  ),
  # Commands.
  'switch': ('TURN ON', 'TURN OFF', 'SWITCH ON', 'SWITCH OFF'),
  'room': _split('KITCHEN BEDROOM BATHROOM GARAGE GARDEN OFFICE'),
  'device': _split('LIGHT LAMP FAN HEATER RADIO CAMERA'),
  'opening': _split('DOOR WINDOW CURTAINS BLINDS GATE'),
  'move': _split('OPEN CLOSE LOCK UNLOCK'),
  'colour': _split('RED GREEN BLUE YELLOW ORANGE'),
  'unit': _split('SECONDS MINUTES HOURS'),
  'food': _split('MILK BREAD BUTTER CHEESE COFFEE SUGAR APPLES'),
  'music': _split('JAZZ ROCK CLASSICAL'),
  'place': _split('LONDON PARIS BERLIN CHICAGO'),
  'way': _split('LEFT RIGHT NORTH SOUTH'),
  'polite': ('PLEASE <order>', '<order> PLEASE', *('<order>',) * 4),
  'command': ('<polite>',),
  'order': (
    '<switch> THE <room> <device>',
    '<switch> THE <colour> <device> IN THE <room>',
    'SET THE <device> IN THE <room> <colour>',
    '<move> THE <room> <opening>',
    '<move> THE <opening> AT <clock>',
    'SET THE TEMPERATURE AT <two_places> DEGREES',
    'SET THE VOLUME AT <two_places> PERCENT',
    'SET THE ALARM AT <clock> <when>',
    'START THE TIMER WITH <below_hundred> <unit>',
    'CALL <name> <when>',
    'SEND <name> THE <ordinal> MESSAGE',
    'PLAY THE <ordinal> SONG',
    'PLAY <music> IN THE <room>',
    'STOP THE <music> IN <below_hundred> <unit>',
    'PAUSE THE MUSIC <when>',
    "WHAT'S THE WEATHER IN <place> <when>",
    'FIND FLIGHTS FROM <place> ON <weekday>',
    'CALL <name> IN <place> <when>',
    'BUY <below_hundred> <food> AND SOME <food>',
    'ADD <food> AND <food>',
    'TURN <way> AFTER <quantity> METERS',
    'WALK <way> THEN <way>',
    "DON'T FORGET <name> <when>",
    'SHOW LINE <two_places> OF PAGE <quantity>',
    'GO BACK <below_hundred> PAGES',
  ),
}
_SYMBOL = re.compile(r'<(\w+)>')


def words() -> frozenset[str]:
  """Returns every word that the grammar can say."""
  expansions = ' '.join(text for rule in _RULES.values() for text in rule)
  return frozenset(_SYMBOL.sub(' ', expansions).split())


def sentences(
  rng: np.random.Generator, count: int, *, exclude: Collection[str] = ()
) -> list[str]:
  """Draws sentences of 2 to 12 words.

  Args:
    rng: where chance comes from.
    count: how many.
    exclude: sentences that must not be drawn.

  Returns:
    `count` sentences, all different.

  Raises:
    ValueError: if the grammar has too few sentences for `count`.
  """
  seen = set(exclude)
  drawn: list[str] = []
  tries = 0
  while len(drawn) < count:
    sentence = _expand('<sentence>', rng)
    num_words = sentence.count(' ') + 1
    if sentence not in seen and _MIN_WORDS <= num_words <= _MAX_WORDS:
      seen.add(sentence)
      drawn.append(sentence)
      tries = 0
      continue
    tries += 1
    if tries > _MAX_TRIES:
      raise ValueError(
        f'the grammar ran out of new sentences after {len(drawn)} of {count}'
      )
  return drawn


def _expand(text: str, rng: np.random.Generator) -> str:
  def replace(match: Any) -> str:
    options = _RULES[match.group(1)]
    return _expand(options[rng.integers(len(options))], rng)

  return _SYMBOL.sub(replace, text)
