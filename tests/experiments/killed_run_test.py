"""A training that is killed, stopped and starved computes the same thing."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.wiring import command
from tests import chaos

_KILLED = -9


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Trained undisturbed in `reference`, with every accident in `victim`."""
  path = tmp_path_factory.mktemp('killed')
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(path / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    # Most of the time goes into compiling, and what runs is small.
    'XLA_FLAGS': '--xla_backend_optimization_level=0',
    'U2MOE_TYPECHECK': '0',
  }
  result = subprocess.run(
    [sys.executable, '-m', 'tests.experiments.killed_runs', str(path)],
    cwd=chaos.ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  return path


@pytest.fixture(scope='module')
def codes(folder):
  """How each attempt ended."""
  return json.loads((folder / 'attempts.json').read_text())


def _log(folder, attempt):
  return (folder / f'{attempt}.txt').read_text()


def _kept(workdir):
  names = (path.name for path in (workdir / 'checkpoints').iterdir())
  return sorted(int(name) for name in names if name.isdigit())


def test_it_computes_the_same_bit_for_bit(folder, codes):
  assert codes['undisturbed'] == command.OK
  assert codes['after_truncation'] == command.OK
  assert chaos.differences(folder / 'reference', folder / 'victim') == []
  assert list(chaos.keys_by_step(folder / 'victim')) == list(range(1, 13))


def test_the_comparison_would_notice(folder, tmp_path):
  """One step earlier is another model; other utterances are another order."""
  workdir = folder / 'reference'
  for name in ('config.json', 'model', 'tokens', 'checkpoints'):
    (tmp_path / name).symlink_to(workdir / name)
  lines = (workdir / 'keys.jsonl').read_text().splitlines()
  (tmp_path / 'keys.jsonl').write_text('\n'.join(reversed(lines)))
  assert chaos.differences(workdir, tmp_path) == []
  record = json.loads(lines[4])
  record['keys'].reverse()
  (tmp_path / 'keys.jsonl').write_text(
    '\n'.join([*lines[:4], json.dumps(record), *lines[5:]])
  )
  (tmp_path / 'checkpoints').unlink()
  (tmp_path / 'checkpoints').mkdir()
  older = _kept(workdir)[0]
  (tmp_path / 'checkpoints' / '12').symlink_to(
    workdir / 'checkpoints' / str(older)
  )
  wrong = chaos.differences(workdir, tmp_path)
  assert 'the utterances of the steps' in wrong
  assert 'the parameters' in wrong
  (tmp_path / 'keys.jsonl').write_text('\n'.join([*lines, json.dumps(record)]))
  with pytest.raises(AssertionError, match='step 5 differs'):
    chaos.keys_by_step(tmp_path)


def test_no_step_is_lost_beyond_the_last_save(folder, codes):
  for name in ('kill_in_step_5', 'kill_in_save', 'kill_in_step_8'):
    assert codes[name] == _KILLED, name
  # Step 3 was saved; 6 was not yet renamed, and was in vain another time.
  for name in ('kill_in_save', 'full_disk', 'term_in_evaluation'):
    assert 'continuing at step 3' in _log(folder, name), name
  assert 'continuing at step 6' in _log(folder, 'kill_in_step_8')


def test_a_full_disk_is_one_clear_line(folder, codes):
  assert codes['full_disk'] == command.NO_SPACE
  log = _log(folder, 'full_disk')
  assert 'Traceback' not in log
  last = log.strip().splitlines()[-1]
  assert last.startswith('error: ')
  for part in (
    'could not be written',
    'File too large',
    'is step 3',
    'make room',
  ):
    assert part in last
  assert codes['term_in_evaluation'] == command.INTERRUPTED


def test_an_evaluation_is_interrupted_and_done_later(folder, codes):
  log = _log(folder, 'term_in_evaluation')
  assert codes['term_in_evaluation'] == command.INTERRUPTED
  assert 'step 6/12 | evaluation stopped' in log
  assert 'step 6/12 | dev loss' not in log
  assert 'wrote' in log  # the model of what there is
  last = log.strip().splitlines()[-1]
  assert last == 'stopped by SIGTERM at step 6; the same command continues'
  assert 'step 6/12 | dev loss' in _log(folder, 'kill_in_step_8')


def test_an_older_checkpoint_replaces_a_damaged_one(folder, codes):
  assert codes['truncated_step'] == 6
  log = _log(folder, 'after_truncation')
  assert '6 cannot be read' in log
  assert 'continuing at step 3' in log
  victim = folder / 'victim'
  # Nothing is destroyed: what could not be read is still there.
  aside = victim / 'unreadable_checkpoints' / '6'
  assert (aside / 'params').is_dir()
  assert _kept(victim) == _kept(folder / 'reference')


def test_two_hosts_go_on_where_one_stopped(folder, codes):
  assert [codes[name] for name in ('alone', 'pair_0', 'pair_1')] == [0, 0, 0]
  assert 'continuing at step 3' in _log(folder, 'pair_0')
  assert 'step 6/6' not in _log(folder, 'pair_1')  # it is told once
  alone, pair = folder / 'alone', folder / 'pair'
  assert _kept(pair) == _kept(alone) == [3, 6]
  whole = chaos.keys_by_step(alone)
  parts = [chaos.keys_by_step(pair, f'keys{n}.jsonl') for n in ('', '.1')]
  for step in (4, 5, 6):
    assert parts[0][step] + parts[1][step] == whole[step]
    assert parts[1][step]
  lines = [_metrics(workdir, step=6) for workdir in (alone, pair)]
  for kind, name in [('train', 'loss'), ('dev', 'loss'), ('dev', 'wer')]:
    values = [line[kind][name] for line in lines]
    assert values[0] == pytest.approx(values[1], rel=1e-3), name
  seconds = [_seconds(workdir) for workdir in (alone, pair)]
  assert seconds[0] == pytest.approx(seconds[1])
  assert seconds[0] > 1.5 * _seconds(alone, step=3)


def _metrics(workdir, *, step):
  """The last lines of a step, by kind."""
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {line['kind']: line for line in lines if line['step'] == step}


def _seconds(workdir, *, step=6):
  """Sound trained on, as a checkpoint has it."""
  file = workdir / 'checkpoints' / str(step) / 'progress' / 'metadata'
  return json.loads(file.read_text())['audio_seconds']


def test_a_second_signal_ends_it_at_once():
  script = (
    'import os, signal, time\n'
    'from u2moe_jax.training import stopping\n'
    'with stopping.StopRequest() as stop:\n'
    '  os.kill(os.getpid(), signal.SIGUSR1)\n'
    '  time.sleep(0.1)\n'
    '  print(stop.signal == signal.SIGUSR1, stop.asked(), flush=True)\n'
    '  os.kill(os.getpid(), signal.SIGTERM)\n'
    '  time.sleep(600)\n'
    '  print("still here")\n'
  )
  result = subprocess.run(
    [sys.executable, '-c', script],
    cwd=pathlib.Path(chaos.ROOT),
    capture_output=True,
    text=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  assert result.stdout.split() == ['True', 'True']
  assert result.returncode == 128 + 15
