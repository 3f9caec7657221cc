"""The study in Markdown, to be pasted into docs/results.md."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from experiments.studies import levels as levels_lib
from experiments.studies import resampling

Entry = Mapping[str, Any]
Group = Mapping[str, Entry]
_HEADINGS = {
  'builtin': 'Built-in corpus (synthetic speech)',
  'an4': 'AN4 (recordings)',
  'shift': 'From the built-in corpus to AN4',
}
_NONE = '-'
# Relative to the dense start, and training time to the same error rate, as the
# abstract of arXiv 2412.17507 says.
_PAPER_ERRORS = '-11.9 % against the dense start'
_PAPER_SAVING = 86.7


def markdown(entries: Sequence[Entry]) -> str:
  """All tables, each study and seed apart.

  Args:
    entries: of the arms that are done.
  """
  parts = []
  for (study, seed), group in groups(entries).items():
    parts.append(f'### {_HEADINGS[study]}, seed {seed}')
    # Two test sets and no curves to compare: a table of its own.
    if study == 'shift':
      parts.append(_shift(group))
      continue
    parts.append(_arms(group))
    if 'a' in group:
      parts.append(_levels(group))
    parts.append(_sizes(group))
  claims = _claims(entries)
  if claims:
    parts += ['### Expected and found', claims]
  return '\n\n'.join(part for part in parts if part) + '\n'


def groups(entries: Sequence[Entry]) -> dict[tuple[str, int], dict[str, Entry]]:
  """Entries by study and seed, then by letter."""
  found: dict[tuple[str, int], dict[str, Entry]] = {}
  for entry in entries:
    key = entry['study'], entry['seed']
    found.setdefault(key, {})[entry['letter']] = entry
  return found


def start_of(entry: Entry, group: Group) -> Entry | None:
  """The dense training that an arm continued; None if it is fresh."""
  return group.get('a') if entry['start'] else None


def rate(entry: Entry, kind: str, corpus: str = '') -> float:
  """An error rate: `dev`, `greedy` or `test`.

  Args:
    entry: of an arm.
    kind: see `running`.
    corpus: which; empty: the first.
  """
  rates = entry['wer']
  return rates[corpus or next(iter(rates))][kind]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def name(entry: Entry) -> str:
  """Letter and title of an arm."""
  return f'({entry["letter"]}) {entry["title"]}'


def _signed(value: float) -> str:
  return f'{round(value, 1) + 0.0:+.1f}'  # the sum, so that there is no -0.0


def _change(ours: Sequence[Entry], theirs: Sequence[Entry]) -> str:
  """Relative change of the test error rate, and how sure it is.

  Args:
    ours: an arm, of one seed or of several.
    theirs: another one, of the same seeds.
  """
  mine, other = _errors(ours), _errors(theirs)
  if not sum(other):
    return _NONE
  # `less` is positive where ours is better, a change negative. The words are
  # the same, so errors change as their rates do.
  change = -levels_lib.less(sum(mine), sum(other))
  low, high = resampling.change_interval(mine, other)
  return f'{_signed(change)} ({_signed(low)} to {_signed(high)})'


def _errors(entries: Sequence[Entry]) -> list[int]:
  """Of each utterance of the first test set, over all seeds."""
  corpus = next(iter(entries[0]['wer']))
  each = [entry['errors'][corpus] for entry in entries]
  return [sum(of_one) for of_one in zip(*each, strict=True)]


def _against(entry: Entry, group: Group, letter: str) -> str:
  other = group.get(letter)
  if other is None or other is entry:
    return _NONE
  return _change([entry], [other])


def _arms(group: Group) -> str:
  head = (
    'arm',
    'updates',
    'with those of (a)',
    'minutes',
    'with those of (a)',
    'greedy dev WER %',
    'greedy test WER %',
    'test WER %',
    'against (a), %',
    'against (b), %',
  )
  table = _table(head, [_arm_row(entry, group) for entry in group.values()])
  search = next(iter(group.values()))['search']
  return (
    f'{table}\n\nTest WER by {search}; in brackets a 95 % interval of the '
    'relative change (paired bootstrap over utterances). Minutes are of '
    'training alone, without compiling, evaluating and decoding.'
  )


def _arm_row(entry: Entry, group: Group) -> list[str]:
  dense = start_of(entry, group)
  before = (dense['updates'], dense['seconds']) if dense else (0, 0.0)
  rescored = rate(entry, 'test')
  return [
    name(entry),
    f'{entry["updates"]:,}',
    f'{entry["updates"] + before[0]:,}',
    f'{entry["seconds"] / 60:.1f}',
    f'{(entry["seconds"] + before[1]) / 60:.1f}',
    f'{rate(entry, "dev"):.2f}',
    f'{rate(entry, "greedy"):.2f}',
    f'{rescored:.2f}',
    *(_against(entry, group, letter) for letter in 'ab'),
  ]


def start_rate(group: Group) -> float:
  """The best dev error rate that the dense start ever had, per cent."""
  dense = group['a']
  return levels_lib.start_rate(dense, rate(dense, 'dev'))


def chosen_levels(group: Group) -> list[float]:
  """Levels of a study that its dense start has not reached."""
  dense, start = group['a'], start_rate(group)
  curves = [e['dev'] for e in group.values() if e is not dense]
  return levels_lib.choose(start, curves)


def _levels(group: Group) -> str:
  """Updates and minutes to each level: of the arm / with the dense training."""
  dense, start = group['a'], start_rate(group)
  levels = chosen_levels(group)
  if not levels:
    return (
      f'No arm came 5 % below the {start:.2f} % of the dense start (relative, '
      'greedy dev WER).'
    )
  rows = []
  for entry in group.values():
    if entry is dense:
      continue
    costs = [
      levels_lib.cost(entry, level, start_of(entry, group)) for level in levels
    ]
    rows.append([name(entry), *map(_cost, costs)])
  head = ['arm', *(f'{level:.1f} %' for level in levels)]
  return (
    'Updates (minutes) to a greedy dev WER / the same with those of (a); '
    f'the best that (a) ever had is {start:.2f} %:\n\n{_table(head, rows)}'
  )


def _cost(cost: levels_lib.Cost | None) -> str:
  if cost is None:
    return _NONE
  return (
    f'{cost.updates:,} ({cost.seconds / 60:.1f}) / '
    f'{cost.updates_in_all:,} ({cost.seconds_in_all / 60:.1f})'
  )


def _sizes(group: Group) -> str:
  head = (
    'arm',
    'parameters',
    'active',
    'trained',
    'bytes trained',
    'bytes of moments',
    'moments / (2 x trained)',
    'least, largest load of an expert %',
  )
  table = _table(head, [_size_row(entry) for entry in group.values()])
  return (
    f'{table}\n\nThe load is that of the least and of the most used expert of '
    'any layer, the mean of the last ten lines of the log.'
  )


def _size_row(entry: Entry) -> list[str]:
  load = _NONE
  if 'load_low' in entry:
    load = f'{100 * entry["load_low"]:.1f}, {100 * entry["load_high"]:.1f}'
  # 1 if just what trains has both moments, in float32 like the parameters.
  share = entry['moment_bytes'] / (2 * entry['trainable_bytes'])
  return [
    name(entry),
    *(f'{entry[f"{kind}parameters"]:,}' for kind in ('', 'active_')),
    f'{entry["trainable_parameters"]:,}',
    f'{entry["trainable_bytes"]:,}',
    f'{entry["moment_bytes"]:,}',
    f'{share:.4f}',
    load,
  ]


def _shift(group: Group) -> str:
  head = (
    'arm',
    'updates',
    'AN4 greedy test WER %',
    'AN4 test WER %',
    'AN4, against (b), %',
    'built-in greedy test WER %',
    'built-in test WER %',
  )
  rows = [
    [
      name(entry) if entry['updates'] else '(a) dense, as it is',
      f'{entry["updates"]:,}',
      *_greedy_and_test(entry, 'an4'),
      # What is trained on AN4 is compared with what is.
      _against(entry, group, 'b') if entry['updates'] else _NONE,
      *_greedy_and_test(entry, 'builtin'),
    ]
    for entry in group.values()
  ]
  return _table(head, rows)


def _greedy_and_test(entry: Entry, corpus: str) -> list[str]:
  return [f'{rate(entry, kind, corpus):.2f}' for kind in ('greedy', 'test')]


def _claims(entries: Sequence[Entry]) -> str:
  """What the paper found, beside what was found here; empty if nothing."""
  rows = []
  for (study, seed), group in groups(entries).items():
    make = _shift_claims if study == 'shift' else _training_claims
    rows += [
      [claim, paper, f'{study} {seed}', found]
      for claim, paper, found in make(group)
    ]
  rows += [list(row) for row in _claims_over_seeds(entries)]
  head = ('claim', 'paper', 'corpus, seed', 'found')
  return _table(head, rows) if rows else ''


def _training_claims(group: Group) -> Iterator[tuple[str, str, str]]:
  # A claim needs its arms, of which a study under way has only some.
  for letter in ('d', 'e'):
    if {'a', 'b', letter} <= group.keys():
      yield _error_claim(group, letter)
  if {'a', 'c', 'd'} <= group.keys():
    yield from _time_claims(group)
  if {'d', 'f'} <= group.keys() and 'load_low' in group['f']:
    low = [f'{100 * group[x]["load_low"]:.1f}' for x in 'df']
    yield (
      'balancing keeps experts busy',
      'yes',
      f'least load {low[0]} % with, {low[1]} % without',
    )


def _error_claim(group: Group, letter: str) -> tuple[str, str, str]:
  ours = group[letter]
  changes = [f'{_change([ours], [group[x]])} % against ({x})' for x in 'ab']
  return (
    f'({letter}) errs less than the dense model',
    _PAPER_ERRORS,
    ', '.join(changes),
  )


def _claims_over_seeds(
  entries: Sequence[Entry],
) -> Iterator[tuple[str, str, str, str]]:
  """What the seeds of a study say together; nothing of a single one."""
  by_study: dict[str, list[Group]] = {}
  for (study, _), group in groups(entries).items():
    by_study.setdefault(study, []).append(group)
  for study, seeds in by_study.items():
    for letter in ('d', 'e'):
      both = [group for group in seeds if {'b', letter} <= group.keys()]
      if len(both) < 2:
        continue
      arms = ([group[x] for group in both] for x in (letter, 'b'))
      yield (
        f'({letter}) errs less than the dense model',
        _PAPER_ERRORS,
        f'{study}, {len(both)} seeds',
        f'{_change(*arms)} % against (b)',
      )


def _time_claims(group: Group) -> Iterator[tuple[str, str, str]]:
  """What it took to the lowest level that (c) and (d) have both reached."""
  paper = f'up to -{_PAPER_SAVING} % training time'
  claim = '(d) needs less training than (c)'
  # From the lowest up: the first that both have reached.
  for level in reversed(chosen_levels(group)):
    ours = levels_lib.cost(group['d'], level, group['a'])
    theirs = levels_lib.cost(group['c'], level, None)
    if ours is None or theirs is None:
      continue
    # The dense training belongs in the bill, unless that model was there
    # anyway.
    for word, seconds, updates in (
      ('without', ours.seconds, ours.updates),
      ('with', ours.seconds_in_all, ours.updates_in_all),
    ):
      time = -levels_lib.less(seconds, theirs.seconds)
      steps = -levels_lib.less(updates, theirs.updates)
      yield (
        f'{claim}, {word} that of (a)',
        paper,
        f'{_signed(time)} % time, {_signed(steps)} % updates '
        f'to {level:.1f} % greedy dev WER',
      )
    return
  yield claim, paper, 'no level that both have reached'


def _shift_claims(group: Group) -> Iterator[tuple[str, str, str]]:
  if not {'a', 'd', 'e'} <= group.keys():
    return
  rates: Callable[[str], str] = lambda letter: (
    f'{rate(group[letter], "test", "builtin"):.1f}'
  )
  yield (
    'freezing limits forgetting',
    'yes',
    f'first corpus: {rates("a")} % before, {rates("d")} % all trained, '
    f'{rates("e")} % frozen',
  )
