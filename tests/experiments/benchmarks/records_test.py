"""Records: the fields that were promised, ratios of what is alike, tables."""

from experiments.benchmarks import records


def _record(config, wall_s, *, experts=False, **fields):
  return {
    'config': config,
    'bench': 'greedy',
    'batch': 1,
    'params_m': 100.0 if experts else 20.0,
    'active_params_m': 20.0,
    'wall_s': wall_s,
    **fields,
  }


def test_a_ratio_is_against_the_first_dense_config_measured_alike():
  found = list(
    records.complete(
      [
        _record('small', 0.5),
        _record('small', 4.0, batch=16),
        _record('large', 2.0),
        _record('moe', 0.75, experts=True),
        _record('moe', 5.0, experts=True, batch=16),
        _record('moe', 5.0, experts=True, dtype='int8'),
        {'bench': 'moe', 'wall_s': 1.0, 'ratio_to_dense': 2.5},
      ]
    )
  )
  ratios = [record.get('ratio_to_dense') for record in found]
  assert ratios == [1.0, 1.0, 4.0, 1.5, 1.25, None, 2.5]


def test_fields_come_in_their_order_with_the_machine():
  (found,) = records.complete([{'extra': 1, **_record('small', 0.5)}])
  known = [name for name in found if name in records.FIELDS]
  assert known == [name for name in records.FIELDS if name in found]
  assert list(found)[-1] == 'extra'
  machine = {'impl', 'threads', 'device', 'peak_rss_gib', 'load_average'}
  assert machine <= set(found)


def test_a_table_says_once_what_is_the_same():
  rows = [_record('small', 0.5), _record('moe', 0.75, experts=True, mfu=0.25)]
  text = records.to_table('greedy', rows)
  title, _, common, _, heading, rule, *body = text.splitlines()
  assert title == '## greedy'
  assert common == 'bench greedy, batch 1, active_params_m 20'
  names = [cell.strip() for cell in heading.split('|')[1:-1]]
  assert names == ['config', 'params_m', 'wall_s', 'mfu']
  assert {len(line) for line in (heading, rule, *body[:2])} == {len(heading)}
  assert [cell.strip() for cell in body[1].split('|')[1:-1]] == [
    'moe',
    '100',
    '0.75',
    '0.25',
  ]
  assert body[0].split('|')[-2].strip() == '-'  # not measured
  assert 'nothing measured' in records.to_table('data', [])
