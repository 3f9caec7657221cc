"""The host loop with a fake step: what it logs, saves and how it stops."""

import dataclasses
import itertools
import json
import os
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import store as store_lib
from u2moe_jax.text import scoring
from u2moe_jax.training import errors
from u2moe_jax.training import evaluate as evaluate_lib
from u2moe_jax.training import loop
from u2moe_jax.training import metrics
from u2moe_jax.training import skips as skips_lib
from u2moe_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class _Skip:
  key: str
  reason: str
  detail: str = ''


@dataclasses.dataclass(frozen=True)
class _HostBatch:
  arrays: dict
  keys: tuple = ()
  seconds: float = 1.0
  skipped: tuple = ()


def _state(step=0):
  return TrainState(
    step=jnp.asarray(step),
    params={'w': jnp.zeros(())},
    opt_state={'count': jnp.zeros((), jnp.int32)},
    buffers={},
  )


class _Fake:
  """Adds each batch's number to the parameter; may signal at a step."""

  def __init__(
    self,
    workdir,
    *,
    num_steps=6,
    stop_at=None,
    stop_evaluation=False,
    loss=lambda step: 1.0,
    start=None,
    options=None,
    step_seconds=0.0,
    more=lambda step: {},
    **train,
  ):
    self.numbers, self.waited = [], 0
    self.stop_at, self.loss = stop_at, loss
    self.stop_evaluation = stop_evaluation
    self.step_seconds, self.more = step_seconds, more
    self.store = store_lib.Store(workdir, keep_last=9)
    self.trainer = loop.Trainer(
      config=config_lib.Config(
        train=config_lib.TrainConfig(num_steps=num_steps, **train)
      ),
      workdir=workdir,
      state=start or _state(),
      train_step=self._step,
      place=lambda arrays: arrays,
      batches=self._batches,
      evaluate=self._evaluate,
      store=self.store,
      skips=skips_lib.SkipLog(workdir, num_utterances=10),
      options=options or loop.Options(),
    )

  def _batches(self, start):
    for number in itertools.count(start):
      skipped = (_Skip('bad', 'broken'),) if number == 1 else ()
      keys = (f'utt{number}',)
      yield _HostBatch({'number': np.asarray(number)}, keys, skipped=skipped)

  def _step(self, state, arrays):
    number = int(arrays['number'])
    time.sleep(self.step_seconds)
    self.numbers.append(number)
    if number + 1 == self.stop_at:
      os.kill(os.getpid(), signal.SIGTERM)
    values = {
      'loss': self.loss(number + 1),
      'loss_ctc': 2.0,
      'gradient_norm': 1.0,
      'learning_rate': 0.1,
      **self.more(number + 1),
    }
    state = dataclasses.replace(
      state, step=state.step + 1, params={'w': state.params['w'] + number}
    )
    return state, {
      name: value if isinstance(value, metrics.Mean) else metrics.Mean.of(value)
      for name, value in values.items()
    }

  def _evaluate(self, params, buffers, should_stop):
    del buffers
    if self.stop_evaluation:
      assert not should_stop()
      os.kill(os.getpid(), signal.SIGUSR1)
      time.sleep(0.01)
      assert should_stop()
      return None
    wer = 50.0 - float(params['w'])
    counts = scoring.corpus_errors([('A', 'A')])
    return evaluate_lib.Evaluation({'loss': 3.0}, wer, counts)


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_logs_evaluates_and_saves(tmp_path):
  fake = _Fake(tmp_path, log_every=2, save_every=4)
  assert fake.trainer.run() is True
  assert fake.numbers == list(range(6))
  lines = _lines(tmp_path / 'metrics.jsonl')
  train = [line for line in lines if line['kind'] == 'train']
  assert [line['step'] for line in train] == [1, 2, 4, 6]
  assert all(line['loss'] == 1.0 for line in train)
  dev = {line['step']: line['wer'] for line in lines if line['kind'] == 'dev'}
  assert dev == {4: 44.0, 6: 35.0}
  assert fake.store.best_steps(9) == [6, 4]
  skipped = _lines(tmp_path / 'skipped.jsonl')
  assert skipped == [
    {'key': 'bad', 'reason': 'broken', 'detail': '', 'split': 'train'}
  ]
  assert [line['skipped_utterances'] for line in train] == [0, 1, 1, 1]
  assert not (tmp_path / 'keys.jsonl').exists()
  fake.store.close()


def test_a_signal_saves_and_a_second_run_continues(tmp_path):
  previous = signal.getsignal(signal.SIGTERM)
  fake = _Fake(tmp_path, stop_at=3)
  assert fake.trainer.run() is False
  assert signal.getsignal(signal.SIGTERM) is previous
  assert fake.store.latest_step() == 3
  target = store_lib.as_abstract(
    {'params': fake.trainer.state.params, 'buffers': {}}
  )
  restored = fake.store.restore_params(3, target)
  assert float(restored['params']['w']) == 0 + 1 + 2
  fake.store.close()
  start = dataclasses.replace(_state(3), params=restored['params'])
  again = _Fake(tmp_path, start=start)
  assert again.trainer.run() is True
  assert again.numbers == [3, 4, 5]  # no batch twice, none left out
  assert float(again.trainer.state.params['w']) == sum(range(6))
  again.store.close()


def test_a_stopped_evaluation_is_done_by_the_next_run(tmp_path):
  fake = _Fake(tmp_path, num_steps=4, save_every=2, stop_evaluation=True)
  assert fake.trainer.run() is False
  assert fake.numbers == [0, 1]
  assert fake.store.wer(2) is None
  fake.store.close()
  start = dataclasses.replace(
    _state(2), params={'w': jnp.asarray(float(sum(range(2))))}
  )
  again = _Fake(tmp_path, num_steps=4, save_every=2, start=start)
  assert again.trainer.run() is True
  assert again.numbers == [2, 3]
  assert [again.store.wer(step) for step in (2, 4)] == [49.0, 44.0]
  again.store.close()
  lines = _lines(tmp_path / 'metrics.jsonl')
  assert [line['step'] for line in lines if line['kind'] == 'dev'] == [2, 4]


def test_even_the_last_evaluation_can_be_stopped(tmp_path):
  fake = _Fake(tmp_path, num_steps=2, stop_evaluation=True)
  assert fake.trainer.run() is False
  fake.store.close()
  again = _Fake(tmp_path, num_steps=2, start=_state(2))
  assert again.trainer.run() is True
  assert again.numbers == []
  again.store.close()


def test_too_much_bad_data_ends_the_run(tmp_path):
  fake = _Fake(tmp_path)
  fake.trainer.skips = skips_lib.SkipLog(
    tmp_path, num_utterances=10, max_share=0.05
  )
  with pytest.raises(skips_lib.BadDataError, match='1 of 10'):
    fake.trainer.run()
  assert fake.numbers == [0]
  # What was trained on is kept, for whoever allows more of it.
  assert fake.store.latest_step() == 1
  fake.store.close()
  again = _Fake(tmp_path, start=_state(1))
  assert again.trainer.run() is True
  assert again.numbers == list(range(1, 6))
  again.store.close()


def test_keys_and_counters_are_kept(tmp_path):
  options = loop.Options(log_keys=True)
  fake = _Fake(tmp_path, num_steps=3, options=options)
  assert fake.trainer.run() is True
  assert _lines(tmp_path / 'keys.jsonl') == [
    {'step': step, 'keys': [f'utt{step - 1}']} for step in (1, 2, 3)
  ]
  target = store_lib.as_abstract(fake.trainer.state)
  restored = fake.store.restore_newest(
    params=target.params, buffers={}, opt_state=target.opt_state
  )
  assert restored.progress['batch'] == 3
  assert loop.Counters.of(restored.progress).audio_seconds == 3.0
  assert loop.Counters.of({'step': 3}) == loop.Counters()
  fake.store.close()


def test_time_is_counted_with_every_save(tmp_path):
  """Also of the steps behind the last line."""
  fake = _Fake(
    tmp_path, num_steps=4, save_every=2, log_every=100, step_seconds=0.02
  )
  assert fake.trainer.run() is True
  target = store_lib.as_abstract(fake.trainer.state)
  seconds = []
  for step in (2, 4):
    restored = fake.store.restore(
      step, params=target.params, buffers={}, opt_state=target.opt_state
    )
    seconds.append(loop.Counters.of(restored.progress).seconds)
  assert seconds[0] >= 2 * 0.02
  assert seconds[1] - seconds[0] >= 2 * 0.02
  fake.store.close()


@pytest.mark.parametrize('skipped', [0.0, 1.0])
def test_skipped_updates_are_no_evidence_of_idle_experts(
  tmp_path, capsys, skipped
):
  def more(step):
    del step
    return {'skipped': skipped, 'load/ffn': np.zeros((1, 2))}

  fake = _Fake(
    tmp_path,
    num_steps=3,
    log_every=1,
    idle_expert_steps=2,
    max_nonfinite=0,
    more=more,
  )
  fake.trainer.run()
  fake.store.close()
  assert ('idle for 2 steps' in capsys.readouterr().out) == (not skipped)


def test_a_trace_of_some_steps_is_written(tmp_path):
  options = loop.Options(profile_steps=(2, 3))
  fake = _Fake(tmp_path, num_steps=4, options=options)
  assert fake.trainer.run() is True
  fake.store.close()
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def _nan_from(step, to=10**9):
  return lambda n: float('nan') if step <= n <= to else 1.0


def test_numbers_that_stay_no_numbers_end_the_run(tmp_path):
  fake = _Fake(tmp_path, num_steps=20, loss=_nan_from(4), max_nonfinite=3)
  with pytest.raises(
    errors.NonfiniteError, match=r'steps 4 to 6.*nonfinite\.j'
  ):
    fake.trainer.run()
  fake.store.close()
  assert json.loads((tmp_path / 'nonfinite.json').read_text()) == [
    {'step': step, 'keys': [f'utt{step - 1}']} for step in (4, 5, 6)
  ]
  # It looks back by one step, to keep the device busy, and no further.
  assert len(fake.numbers) <= 7


def test_some_of_them_do_not(tmp_path):
  fake = _Fake(
    tmp_path, num_steps=6, loss=_nan_from(3, to=4), max_nonfinite=3, log_every=1
  )
  assert fake.trainer.run() is True
  fake.store.close()
  assert not (tmp_path / 'nonfinite.json').exists()
  train = [
    x for x in _lines(tmp_path / 'metrics.jsonl') if x['kind'] == 'train'
  ]
  assert [line['skipped_updates'] for line in train] == [0, 0, 1, 2, 2, 2]


def test_a_window_without_an_update_tells_no_loss(tmp_path, capsys):
  def more(step):
    if step != 2:
      return {}
    nothing = metrics.Mean.of(0.0, 0.0)
    counted = ('loss', 'loss_ctc', 'gradient_norm')
    return {'skipped': 1.0} | dict.fromkeys(counted, nothing)

  fake = _Fake(tmp_path, num_steps=3, log_every=1, max_nonfinite=0, more=more)
  fake.trainer.run()
  fake.store.close()
  lines = [
    x for x in _lines(tmp_path / 'metrics.jsonl') if x['kind'] == 'train'
  ]
  assert [line.get('loss') for line in lines] == [1.0, None, 1.0]
  told = capsys.readouterr().out.splitlines()
  assert ['no update' in line for line in told[:3]] == [False, True, False]


def test_a_loss_that_is_not_finite_ends_the_run_only_if_asked(tmp_path):
  fake = _Fake(tmp_path / 'a', loss=_nan_from(1), skip_nonfinite=False)
  with pytest.raises(errors.NonfiniteError, match=r'step 1 .*learning_rate'):
    fake.trainer.run()
  fake.store.close()
  patient = _Fake(tmp_path / 'b', loss=_nan_from(1), num_steps=2)
  assert patient.trainer.run() is True
  patient.store.close()
