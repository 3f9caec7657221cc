"""Mesh shapes compiled one by one; a failing one is a row, none is done twice."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from experiments.configs import tiny
from experiments.reporting import mesh_table
from experiments.wiring import mesh_sweep
from u2moe_jax import config as config_lib
from u2moe_jax.sharding import mesh as mesh_lib

ROOT = pathlib.Path(__file__).parents[2]


def _config(num_blocks=3, experts=0):
  config = config_lib.from_dict(config_lib.Config, tiny.get_config().to_dict())
  for path, value in {
    'model.vocab_size': 12,
    'model.encoder.num_blocks': num_blocks,
    'model.encoder.moe.num_experts': experts,
    'model.decoder.moe.num_experts': 0,
    # CTC alone is enough, and compiles faster.
    'model.decoder.num_reverse_blocks': 0,
    'model.decoder.num_blocks': 0,
  }.items():
    config = config_lib.replace(config, path, value)
  return config


def _sweep(config=None, **changes):
  options = {
    'devices': 4,
    'simulate': True,
    'batch': 8,
    'seconds': 0.5,
    'repeats': 1,
  }
  return mesh_sweep.Sweep(config=config or _config(), **{**options, **changes})


def _row(out, sweep, name):
  (out / 'shapes').mkdir(exist_ok=True)
  mesh_sweep.look_at(sweep, name, out)
  return json.loads((out / 'shapes' / f'{name}.json').read_text())


def test_every_layer_counts(tmp_path):
  """The compiler's own figure would be the same for 3 and 6 layers."""
  three, six = (
    _row(tmp_path, _sweep(_config(num_blocks=n)), '4x1x1x1') for n in (3, 6)
  )
  for key in ('flops', 'model_flops'):
    layer = (six[key] - three[key]) / 3
    assert 0 < layer < three[key] / 3
  counted = (six['model_flops'] - three['model_flops']) / 4
  assert six['flops'] - three['flops'] == pytest.approx(counted, rel=0.05)
  assert three['redundancy'] == pytest.approx(1, abs=0.05)
  assert three['unknown_loops'] == 0


def test_what_an_axis_splits_shows_in_its_bytes(tmp_path):
  config = _config(experts=4)
  data, expert, fsdp = (
    _row(tmp_path, _sweep(config), name)
    for name in ('4x1x1x1', '1x1x4x1', '1x4x1x1')
  )
  for key in ('parameter_bytes', 'optimizer_bytes'):
    assert fsdp[key] < expert[key] < data[key]
  assert set(data['collectives']) == {'all-reduce'}
  assert 'all-to-all' in expert['collectives']
  assert 'all-gather' in fsdp['collectives']
  assert expert['executor'] == 'capacity'
  for row in (data, expert, fsdp):
    assert row['activation_bytes'] == data['activation_bytes'] > 0
    assert row['total_bytes'] > row['temporary_bytes'] > 0


def test_all_are_those_that_divide_and_the_others_have_a_reason():
  config = _config(experts=4)
  sweep = _sweep(config, devices=8)
  boxed = mesh_sweep.abstract_boxes(sweep.resolved())
  shapes = mesh_sweep.every_shape(8)
  assert len(shapes) == 20
  reasons = {
    mesh_sweep.name_of(s): mesh_sweep.misfit(sweep, s, boxed) for s in shapes
  }
  assert reasons['8x1x1x1'] is None
  assert reasons['1x2x4x1'] is None
  assert "expert=8 does not divide the 4 of axis 'expert'" in reasons['1x1x8x1']
  assert 'tensor=8 does not divide' in reasons['1x1x1x8']
  assert "'heads'" in reasons['2x1x1x4']  # there are 2, and V is 12
  odd = _sweep(config, devices=8, batch=12)
  why = mesh_sweep.misfit(odd, mesh_sweep.parse_shape('8x1x1x1'), boxed)
  assert why == 'data*fsdp*expert=8 does not divide the batch of 12'
  dense = _sweep(devices=8)
  why = mesh_sweep.misfit(dense, mesh_sweep.parse_shape('4x1x2x1'), boxed)
  assert 'no experts' in why
  why = mesh_sweep.misfit(dense, mesh_sweep.parse_shape('2x1x1x1'), boxed)
  assert why == 'is for 2 devices, not 8'


class _Children:
  """In place of child processes: some shapes fail, one is interrupted."""

  def __init__(self, out):
    self.out, self.begun, self.interrupt = out, [], ''

  def __call__(self, command, **_):
    name = command[-1].removeprefix('--child=')
    self.begun.append(name)
    if name == self.interrupt:
      raise KeyboardInterrupt
    if name == '1x4x1x1':
      told = 'Traceback\nValueError: no such luck\nand then some'
      return subprocess.CompletedProcess(command, 1, '', told)
    row = {
      'shape': name,
      'total_bytes': 2**30,
      'collective_bytes': len(self.begun) * 1e9,
      'collectives': {'all-reduce': {'count': 2, 'bytes': 1e9}},
      'flops': 3e9,
      'compile_s': 1.5,
    }
    (self.out / 'shapes' / f'{name}.json').write_text(json.dumps(row))
    return subprocess.CompletedProcess(command, 0, '', '')


def _run(sweep, out, shapes='all'):
  mesh_sweep.run(
    sweep, shapes, out, arguments=['--x'], platforms=None, timeout=9.0
  )


def test_an_interrupted_sweep_goes_on_and_a_failure_is_a_row(
  tmp_path, monkeypatch, capsys
):
  children = _Children(tmp_path)
  monkeypatch.setattr(mesh_sweep.subprocess, 'run', children)
  children.interrupt = '1x2x1x2'
  with pytest.raises(KeyboardInterrupt):
    _run(_sweep(), tmp_path)
  before = list(children.begun)
  children.interrupt = ''
  _run(_sweep(), tmp_path)
  again = children.begun[len(before) :]
  assert again[0] == '1x2x1x2'
  assert set(before[:-1]).isdisjoint(again)
  _run(_sweep(), tmp_path)
  assert len(children.begun) == len(before) + len(again)  # nothing is left

  whole = json.loads((tmp_path / 'sweep.json').read_text())
  shapes = [row['shape'] for row in whole['rows']]
  assert shapes[-1] == '1x4x1x1'  # failures come last
  assert whole['rows'][-1]['error'] == 'exit code 1: ValueError: no such luck'
  traffic = [row['collective_bytes'] for row in whole['rows'][:-1]]
  assert traffic == sorted(traffic)
  assert {'1x1x4x1', '1x1x1x4'} <= set(whole['left_out'])
  with (tmp_path / 'sweep.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [row['shape'] for row in rows] == shapes
  assert rows[0]['all-reduce bytes'] == '1000000000.0'
  table = (tmp_path / 'sweep.md').read_text()
  assert '| 1x4x1x1 | failed: exit code 1: ValueError: no such luck |' in table
  assert '- 1x1x4x1: mesh axis expert=4 splits nothing' in table
  assert (tmp_path / 'sweep.png').read_bytes()[:4] == b'\x89PNG'
  assert '1x4x1x1: exit code 1' in capsys.readouterr().out


def test_a_shape_that_takes_too_long_is_a_row(tmp_path, monkeypatch):
  def never(command, timeout, **_):
    raise subprocess.TimeoutExpired(command, timeout)

  monkeypatch.setattr(mesh_sweep.subprocess, 'run', never)
  _run(_sweep(), tmp_path, '2x2x1x1')
  (row,) = json.loads((tmp_path / 'sweep.json').read_text())['rows']
  assert row['error'] == 'not done after 9 s'


def test_two_sweeps_do_not_share_a_folder(tmp_path, monkeypatch):
  monkeypatch.setattr(mesh_sweep.subprocess, 'run', _Children(tmp_path))
  _run(_sweep(), tmp_path, '4x1x1x1')
  with pytest.raises(config_lib.ConfigError, match='another experiment'):
    _run(_sweep(_config(num_blocks=6)), tmp_path, '4x1x1x1')


@pytest.mark.parametrize('text', ['2x2', '2x2x1x', 'some', ''])
def test_what_is_no_shape_is_refused(tmp_path, text):
  with pytest.raises(config_lib.ConfigError, match='2x1x4x1'):
    _run(_sweep(), tmp_path, text)


@pytest.mark.parametrize('text', ['3x1x1x1', '4x1x1x1,1x1x1x4'])
def test_a_shape_that_was_asked_for_and_does_not_fit_is_refused(tmp_path, text):
  with pytest.raises(mesh_lib.MeshError, match=text.split(',')[-1]):
    _run(_sweep(), tmp_path, text)
  assert not (tmp_path / 'sweep.json').exists()


def test_measured_rows_are_sorted_by_step_time():
  rows = [
    {'shape': 'slow', 'step_s': 2.0, 'collective_bytes': 0.0},
    {'shape': 'broken', 'error': 'x'},
    {'shape': 'fast', 'step_s': 1.0, 'collective_bytes': 9.0},
  ]
  names = [row['shape'] for row in mesh_table.ordered(rows)]
  assert names == ['fast', 'slow', 'broken']


def test_the_script_simulates_more_devices_than_there_are(tmp_path):
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  overrides = [
    '--config.model.vocab_size=12',
    '--config.model.decoder.num_blocks=0',
    '--config.model.decoder.num_reverse_blocks=0',
  ]
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.sweep_mesh', '--simulate']
    + ['--config=experiments/configs/tiny.py', *overrides]
    + ['--devices=16', '--shapes=2x2x4x1', '--seconds=0.5']
    + [f'--out={tmp_path}'],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert jax.device_count() < 16
  (row,) = json.loads((tmp_path / 'sweep.json').read_text())['rows']
  assert row['collectives']['all-to-all']['bytes'] > 0
  assert row['expert'] == 4
