"""The alarm rings once for an expert that stays idle, and again after it woke."""

import numpy as np

from u2moe_jax.training import idle_experts

_EVEN = np.full((2, 3), 1 / 3)


def _load(*idle):
  load = _EVEN.copy()
  for place in idle:
    load[place] = 0.0
  return {'loss': np.asarray(1.0), 'load/encoder.final': load}


def test_it_rings_after_so_many_steps_and_once():
  watch = idle_experts.IdleExperts(20, blocks={'encoder.final': (1, 3)})
  assert watch.update(10, _load((1, 2))) is None
  text = watch.update(20, _load((1, 2)))
  assert text is not None
  assert 'encoder.final block 3 expert 2' in text
  assert 'balance_loss_weight' in text
  assert watch.update(30, _load((1, 2))) is None
  assert watch.update(40, _load()) is None  # awake again
  assert watch.update(50, _load((1, 2))) is None
  assert 'block 3 expert 2' in (watch.update(60, _load((1, 2))) or '')


def test_it_stays_silent():
  even = idle_experts.IdleExperts(1)
  off = idle_experts.IdleExperts(0)
  nonfinite = idle_experts.IdleExperts(1)
  for step in (100, 200):
    assert even.update(step, _load()) is None
    assert off.update(step, _load((0, 0))) is None
    bad = {'load/encoder.final': _EVEN * np.nan}
    assert nonfinite.update(step, bad) is None
    assert even.update(step, {'loss': 1.0}) is None  # dense


def test_a_run_that_continues_starts_anew():
  watch = idle_experts.IdleExperts(20, start=1000)
  assert watch.update(1010, _load((0, 0))) is None
  assert 'encoder.final block 0' in (watch.update(1020, _load((0, 0))) or '')


def test_many_are_counted_not_listed():
  watch = idle_experts.IdleExperts(5)
  text = watch.update(5, {'load/decoder.ffn': np.zeros((4, 4))})
  assert 'and 11 more' in (text or '')
