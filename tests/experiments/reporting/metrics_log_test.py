import json

import numpy as np
import pytest

from experiments.reporting import metrics_log


def _write(path, records, tail=''):
  lines = ''.join(json.dumps(record) + '\n' for record in records)
  path.write_text(lines + tail)
  return path


def _train(step, **values):
  return {'step': step, 'kind': 'train', 'time': 0.0} | values


def _dev(step, **values):
  return _train(step, **values) | {'kind': 'dev'}


def test_a_line_cut_off_costs_only_itself(tmp_path):
  path = _write(
    tmp_path / 'metrics.jsonl',
    [_train(1, loss=3.0), _train(2, loss=2.0)],
    tail='{"step": 3, "kind": "tr',
  )
  log = metrics_log.read(path)
  assert log.series('train', 'loss').values.tolist() == [3.0, 2.0]
  assert log.num_unreadable == 1
  with path.open('a') as file:  # the continued run writes on the same line
    file.write('{"step": 4, "kind": "train"}\n')
    file.write(json.dumps(_train(5, loss=1.0)) + '\n')
  log = metrics_log.read(path)
  assert log.series('train', 'loss').steps.tolist() == [1, 2, 5]


@pytest.mark.parametrize(
  'line', ['', '[]', '3', '{"step": 1}', '{"kind": "train"}', 'null']
)
def test_what_is_no_record_is_left_out(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(line.encode() + b'\n\xff\xfe\n')
  log = metrics_log.read(path)
  assert not len(log.series('train', 'loss'))
  assert log.num_unreadable == 1 + bool(line)


def test_a_continued_run_replaces_what_it_repeats(tmp_path):
  first = [_train(s, loss=1.0) for s in (10, 20, 30)]
  first.insert(2, _dev(20, wer=9.0))
  # Back to the checkpoint of step 10, with other logging steps.
  second = [_train(15, loss=2.0), _train(20, loss=2.0), _dev(20, wer=8.0)]
  log = metrics_log.read(_write(tmp_path / 'm', first + second))
  loss, wer = log.series('train', 'loss'), log.series('dev', 'wer')
  assert loss.steps.tolist() == [10, 15, 20]
  assert loss.values.tolist() == [1.0, 2.0, 2.0]
  assert (wer.steps.tolist(), wer.values.tolist()) == ([20], [8.0])


def test_values_that_are_not_finite_can_be_left_out(tmp_path):
  records = [_train(1, loss='nan'), _train(2, loss=1.0), _train(3, loss='inf')]
  loss = metrics_log.read(_write(tmp_path / 'm', records)).series(
    'train', 'loss'
  )
  assert len(loss) == 3
  assert loss.finite().steps.tolist() == [2]


def test_arrays_keep_their_shape(tmp_path):
  load = [[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]]
  records = [_train(1, **{'load/a': load}), _train(2, **{'load/a': load})]
  log = metrics_log.read(_write(tmp_path / 'm', records))
  assert log.names('load/') == ['a']
  assert log.series('train', 'load/a').values.shape == (2, 3, 2)


@pytest.mark.parametrize('size', [1, 2, 5, 40, 400])
def test_smoothing_keeps_a_constant_and_follows_a_line(size):
  np.testing.assert_allclose(metrics_log.smooth(np.full(size, 3.0)), 3.0)
  line = np.arange(size, dtype=float)
  smoothed = metrics_log.smooth(line)
  half = int(size**0.5 / 2.5)
  np.testing.assert_allclose(smoothed[: size - half], line[: size - half])


def test_smoothing_is_the_mean_of_a_window():
  values = np.random.default_rng(0).normal(size=(100, 2))  # half a window: 4
  np.testing.assert_allclose(
    metrics_log.smooth(values)[50], values[46:55].mean(axis=0)
  )
