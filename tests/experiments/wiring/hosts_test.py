"""Which processes are one: flags win, half an environment is left alone."""

import pytest

from experiments.wiring import hosts
from u2moe_jax import config as config_lib

_SLURM = {
  'SLURM_JOB_ID': '5000',
  'SLURM_STEP_NODELIST': 'gpu[003-005]',
  'SLURM_STEP_NUM_TASKS': '3',
  'SLURM_PROCID': '1',
  'SLURM_LOCALID': '0',
  'SLURM_STEP_TASKS_PER_NODE': '1(x3)',
}
_TPU = {'TPU_WORKER_HOSTNAMES': 'a,b,c,d', 'TPU_WORKER_ID': '2'}
_FLAGS = {
  'coordinator_address': 'here:1234',
  'num_processes': 2,
  'process_id': 1,
}


def _read(environment):
  told = []
  return hosts.from_environment(environment, told.append), told


def test_slurm_tells_everything():
  found, told = _read(_SLURM)
  assert found == hosts.Hosts('gpu003:62344', 3, 1)
  assert not told
  # The same coordinator for all processes, another one for another job.
  other, _ = _read({**_SLURM, 'SLURM_PROCID': '2'})
  assert other.coordinator == found.coordinator
  assert other.process_id == 2
  other, _ = _read({**_SLURM, 'SLURM_JOB_ID': '5001'})
  assert other.coordinator != found.coordinator


@pytest.mark.parametrize(
  ('tasks', 'visible', 'expected'),
  [
    ('8(x2)', '0,1,2,3,4,5,6,7', 5),
    ('8(x2)', '0', None),
    ('8(x2)', '', None),
    ('1(x2)', '0,1,2,3', None),
    ('1', '0,1', None),
  ],
)
def test_processes_that_share_a_node_take_one_device_each(
  tasks, visible, expected
):
  found, _ = _read(
    {
      **_SLURM,
      'SLURM_LOCALID': '5',
      'SLURM_STEP_TASKS_PER_NODE': tasks,
      'CUDA_VISIBLE_DEVICES': visible,
    }
  )
  assert found.local_device == expected


@pytest.mark.parametrize(
  ('nodes', 'expected'),
  [
    ('gpu[003-005,9],login1', 'gpu003'),
    ('node7', 'node7'),
    ('a-b.c,d', 'a-b.c'),
    ('rack2-n[12]', 'rack2-n12'),
    ('rack[0-1]-node3,x', 'rack0-node3'),
  ],
)
def test_the_first_node_of_a_list(nodes, expected):
  assert hosts.first_host(nodes) == expected


@pytest.mark.parametrize('missing', [k for k in _SLURM if 'TASKS_' not in k])
def test_half_a_slurm_environment_is_left_alone_and_told(missing):
  found, told = _read({k: v for k, v in _SLURM.items() if k != missing})
  assert found is None
  (line,) = told
  assert missing in line
  assert 'srun' in line


@pytest.mark.parametrize(
  'changes', [{'SLURM_PROCID': 'x'}, {'SLURM_STEP_NODELIST': '[]'}]
)
def test_an_unreadable_environment_is_left_alone_and_told(changes):
  found, (line,) = _read({**_SLURM, **changes})
  assert found is None
  assert next(iter(changes.values())) in line


def test_variables_of_jax_come_before_those_of_slurm():
  own = {
    'JAX_COORDINATOR_ADDRESS': 'here:99',
    'JAX_NUM_PROCESSES': '2',
    'JAX_PROCESS_ID': '0',
  }
  assert _read({**_SLURM, **own}) == (hosts.Hosts('here:99', 2, 0), [])
  half = {**_SLURM, 'JAX_PROCESS_ID': '0'}
  found, (line,) = _read(half)
  assert found == hosts.Hosts('gpu003:62344', 3, 1)
  assert line.startswith('JAX environment left alone')


def test_a_tpu_knows_the_rest_itself():
  assert _read(_TPU) == (hosts.Hosts('', 4, 2), [])
  found, (line,) = _read({'TPU_WORKER_ID': '2'})
  assert found is None
  assert 'TPU_WORKER_HOSTNAMES' in line


@pytest.mark.parametrize(
  'environment',
  [
    {},
    {'HOME': '/'},
    {**_SLURM, 'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'},
    {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'},
  ],
)
def test_one_process_is_no_cluster(environment):
  assert _read(environment) == (None, [])


def test_flags_win(monkeypatch):
  begun = []
  monkeypatch.setattr(hosts, 'initialize', begun.append)
  monkeypatch.setattr(hosts.os, 'environ', dict(_SLURM))
  hosts.start(_FLAGS)
  assert begun == [hosts.Hosts('here:1234', 2, 1)]
  hosts.start({})
  assert begun[1:] == [hosts.Hosts('gpu003:62344', 3, 1)]
  monkeypatch.setattr(hosts.os, 'environ', {})
  hosts.start(dict.fromkeys(_FLAGS))
  assert len(begun) == 2


@pytest.mark.parametrize('missing', _FLAGS)
def test_flags_go_together(missing):
  with pytest.raises(config_lib.ConfigError, match=f'--{missing} is missing'):
    hosts.from_flags({**_FLAGS, missing: None})


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'process_id': 2}, '--process_id is 2'),
    ({'coordinator_address': 'here'}, 'HOST:PORT'),
    ({'coordinator_address': ':80'}, 'HOST:PORT'),
  ],
)
def test_flags_that_make_no_sense_are_refused(changes, named):
  with pytest.raises(config_lib.ConfigError, match=named):
    hosts.from_flags({**_FLAGS, **changes})
