"""The host loop with a fake step: what it logs, saves and how it stops."""

import dataclasses
import itertools
import json
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import store as store_lib
from u2moe_jax.text import scoring
from u2moe_jax.training import evaluate as evaluate_lib
from u2moe_jax.training import loop
from u2moe_jax.training import metrics
from u2moe_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class _Skip:
  key: str
  reason: str


@dataclasses.dataclass(frozen=True)
class _HostBatch:
  arrays: dict
  keys: tuple = ('a',)
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

  def __init__(self, workdir, *, num_steps=6, stop_at=None, loss=1.0, **train):
    self.numbers = []
    self.stop_at, self.loss = stop_at, loss
    self.store = store_lib.Store(workdir, keep_last=9)
    self.trainer = loop.Trainer(
      config=config_lib.Config(
        train=config_lib.TrainConfig(num_steps=num_steps, **train)
      ),
      workdir=workdir,
      state=_state(),
      train_step=self._step,
      place=lambda arrays: arrays,
      batches=self._batches,
      evaluate=self._evaluate,
      store=self.store,
    )

  def _batches(self, start):
    for number in itertools.count(start):
      skipped = (_Skip('bad', 'broken'),) if number == 1 else ()
      yield _HostBatch({'number': np.asarray(number)}, skipped=skipped)

  def _step(self, state, arrays):
    number = int(arrays['number'])
    self.numbers.append(number)
    if number + 1 == self.stop_at:
      os.kill(os.getpid(), signal.SIGTERM)
    values = {
      'loss': self.loss,
      'loss_ctc': 2.0,
      'gradient_norm': 1.0,
      'learning_rate': 0.1,
    }
    state = dataclasses.replace(
      state, step=state.step + 1, params={'w': state.params['w'] + number}
    )
    return state, {k: metrics.Mean.of(v) for k, v in values.items()}

  def _evaluate(self, params, buffers):
    del buffers
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
  assert skipped == [{'key': 'bad', 'reason': 'broken'}]
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
  again = _Fake(tmp_path)
  again.trainer.state = dataclasses.replace(
    _state(3), params=restored['params']
  )
  assert again.trainer.run() is True
  assert again.numbers == [3, 4, 5]  # no batch twice, none left out
  assert float(again.trainer.state.params['w']) == sum(range(6))
  again.store.close()


def test_a_loss_that_is_not_finite_ends_the_run_only_if_asked(tmp_path):
  fake = _Fake(tmp_path / 'a', loss=float('nan'), skip_nonfinite=False)
  with pytest.raises(loop.TrainingError, match=r'step 1.*learning_rate'):
    fake.trainer.run()
  fake.store.close()
  patient = _Fake(tmp_path / 'b', loss=float('nan'), num_steps=2)
  assert patient.trainer.run() is True
  patient.store.close()
