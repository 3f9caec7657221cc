"""The study's tables and claims, from made-up entries."""

import copy

import pytest

from experiments.studies import design
from experiments.studies import plots
from experiments.studies import tables


def _entry(letter, updates, rates, wer, study='builtin', **more):
  """Two updates a second, a point every hundred."""
  points = [
    {'step': 100 * i, 'wer': rate, 'seconds': 50.0 * i}
    for i, rate in enumerate(rates, 1)
  ]
  greedy = rates[-1] if rates else 50.0
  return {
    'study': study,
    'seed': 0,
    'letter': letter,
    'title': design.TITLES[letter],
    'start': '' if letter in 'ac' else f'{study}-0/a',
    'updates': updates,
    'seconds': updates / 2,
    'dev': points,
    'search': 'attention_rescoring',
    'errors': {study: [round(wer)] * 5},
    'wer': {study: {'dev': greedy, 'greedy': greedy, 'test': wer}},
    'parameters': 1000,
    'active_parameters': 500,
    'trainable_parameters': 250,
    'trainable_bytes': 1000,
    'moment_bytes': 2000,
    **more,
  }


@pytest.fixture
def entries():
  return [
    _entry('a', 300, [60.0, 40.0, 30.0], 20.0),
    _entry('b', 200, [29.0, 25.0], 16.0),
    _entry('c', 500, [70.0, 50.0, 35.0, 28.0, 22.0], 15.0),
    _entry('d', 200, [24.0, 20.0], 12.0, load_low=0.1, load_high=0.4),
    _entry('e', 200, [26.0, 23.0], 14.0, load_low=0.2, load_high=0.3),
    _entry('f', 200, [25.0, 21.0], 13.0, load_low=0.01, load_high=0.9),
  ]


def _rows(text, start):
  rows = [x for x in text.splitlines() if x.startswith(f'| {start}')]
  return [[cell.strip() for cell in row.strip('|').split('|')] for row in rows]


def test_rows_have_both_bills_and_both_comparisons(entries):
  arm, cost, size, *_ = _rows(tables.markdown(entries), '(d)')
  assert arm[1:5] == ['200', '500', '1.7', '4.2']
  assert arm[5:8] == ['20.00', '20.00', '12.00']
  assert arm[8:] == ['-40.0 (-40.0 to -40.0)', '-25.0 (-25.0 to -25.0)']
  # 28.5, 27, 24 and 21 per cent: 30 is where the dense start was.
  early, late = '100 (0.8) / 400 (3.3)', '200 (1.7) / 500 (4.2)'
  assert cost[1:] == [early, early, early, late]
  assert size[6:] == ['1.0000', '10.0, 40.0']
  scratch = _rows(tables.markdown(entries), '(c)')
  assert scratch[0][1:3] == ['500', '500']
  assert scratch[1][1:] == [
    '400 (3.3) / 400 (3.3)',
    *['500 (4.2) / 500 (4.2)'] * 2,
    '-',
  ]


def test_what_was_expected_stands_beside_what_was_found(entries):
  found = {row[0]: row[1:] for row in _rows(tables.markdown(entries), '')}
  assert found['(d) errs less than the dense model'] == [
    '-11.9 % against the dense start',
    'builtin 0',
    '-40.0 (-40.0 to -40.0) % against (a), '
    '-25.0 (-25.0 to -25.0) % against (b)',
  ]
  # At 24 %, which (c) reaches after 250 s, (d) after 50, or 200 in all.
  name = '(d) needs less training than (c), {} that of (a)'
  level = 'to 24.0 % greedy dev WER'
  assert found[name.format('without')][2] == (
    f'-80.0 % time, -80.0 % updates {level}'
  )
  assert found[name.format('with')][2] == (
    f'-20.0 % time, -20.0 % updates {level}'
  )
  assert found['balancing keeps experts busy'][2] == (
    'least load 10.0 % with, 1.0 % without'
  )


def test_a_study_that_finds_the_opposite_says_so(entries):
  worse = copy.deepcopy(entries)
  worse[3] = _entry('d', 200, [45.0, 40.0], 24.0, load_low=0.1, load_high=0.4)
  text = tables.markdown(worse)
  assert '+20.0 (+20.0 to +20.0) % against (a)' in text
  assert '+50.0 (+50.0 to +50.0) % against (b)' in text
  assert 'no level that both have reached' in text
  assert _rows(text, '(d)')[1][1:] == ['-'] * 4


def test_what_is_missing_is_left_out(entries):
  for count in range(1, len(entries)):
    text = tables.markdown(entries[:count])
    assert text.count('| (a) dense |') == 2
    assert 'nan' not in text
    assert ('### Expected and found' in text) == (count >= 4)
  assert 'No arm came 5 % below the 30.00 %' in tables.markdown(entries[:1])


def test_forgetting_is_told_by_the_first_corpus():
  entries = [
    _entry(x, n, [40.0] if n else [], 30.0, 'shift')
    for x, n in (('a', 0), ('b', 100), ('d', 100), ('e', 100))
  ]
  for entry, rate in zip(entries, (10.0, 30.0, 25.0, 15.0), strict=True):
    entry['wer'] = {
      corpus: dict.fromkeys(('dev', 'greedy', 'test'), value)
      for corpus, value in (('an4', 50.0), ('builtin', rate))
    }
    entry['errors'] = {'an4': [4 if entry['letter'] == 'b' else 3] * 5}
  text = tables.markdown(entries)
  assert '10.0 % before, 25.0 % all trained, 15.0 % frozen' in text
  assert _rows(text, '(a)') == [
    ['(a) dense, as it is', '0', '50.00', '50.00', '-', '10.00', '10.00']
  ]
  against = [row[4] for row in _rows(text, '(')[1:4]]
  assert against == ['-', *['-25.0 (-25.0 to -25.0)'] * 2]


def test_seeds_are_told_together(entries):
  second = copy.deepcopy(entries)
  for entry in second:
    entry['seed'] = 1
    entry['errors'] = {'builtin': [20] * 5}
  row = (
    '| (d) errs less than the dense model | -11.9 % against the dense start |'
  )
  row += ' builtin, 2 seeds |'
  # 12 and 20 errors against 16 and 20.
  assert f'{row} -11.1 (-11.1 to -11.1) % against (b) |' in tables.markdown(
    [*entries, *second]
  )
  assert ' seeds |' not in tables.markdown(entries)


def test_curves_are_drawn_where_there_are_any(entries):
  (group,) = tables.groups(entries).values()
  picture = plots.curves(group)
  assert picture is not None
  assert picture.startswith(b'\x89PNG')
  assert plots.curves({'a': group['a']}) is not None
  # Of a shift, whose dense model is as it was.
  as_it_is = {**group['a'], 'dev': []}
  assert plots.curves({'a': as_it_is, 'd': group['d']}) is not None
  assert plots.curves({'a': as_it_is}) is None
