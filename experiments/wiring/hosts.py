"""Several processes as one: from flags, or from what a scheduler sets.

Every process calls `initialize` before it touches a device. Flags win over the
environment; of environments JAX's own variables come first, then SLURM's, then
those of a Cloud TPU. One that is incomplete is left alone, with a message:
inside of `salloc` or an interactive `sbatch` shell, SLURM's variables describe
the job and not this process.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import os
import re

from absl import flags
from absl import logging

from u2moe_jax import config as config_lib

# Ports that are free for anybody's use begin below; one for each job, so that
# two jobs on a node do not meet.
_FIRST_PORT, _NUM_PORTS = 61440, 4096


@dataclasses.dataclass(frozen=True)
class Hosts:
  """What `jax.distributed` wants to know.

  Attributes:
    coordinator: HOST:PORT of process 0; empty where JAX finds out (TPU).
    num_processes: how many there are.
    process_id: which of them this is.
    local_device: the one device of this process, where several processes of a
      machine see all of its devices; None: all that it sees.
  """

  coordinator: str
  num_processes: int
  process_id: int
  local_device: int | None = None


def define_flags() -> None:
  """Defines the flags of `from_flags`."""
  flags.DEFINE_string(
    'coordinator_address',
    None,
    'HOST:PORT of process 0, the same for all processes; unset: SLURM or TPU '
    'environment, or a single process.',
  )
  flags.DEFINE_integer(
    'num_processes', None, 'Processes in all.', lower_bound=1
  )
  flags.DEFINE_integer(
    'process_id', None, 'Which of them this is, from 0.', lower_bound=0
  )


def from_flags(values: Mapping[str, object]) -> Hosts | None:
  """Reads the flags; None if none is given.

  Raises:
    config_lib.ConfigError: if some are given and some are not, or they
      contradict each other.
  """
  names = ('coordinator_address', 'num_processes', 'process_id')
  missing = [name for name in names if values.get(name) is None]
  if len(missing) == len(names):
    return None
  if missing:
    raise config_lib.ConfigError(
      f'--{missing[0]} is missing: --coordinator_address, --num_processes and '
      '--process_id go together'
    )
  return _checked(
    str(values['coordinator_address']),
    int(str(values['num_processes'])),
    int(str(values['process_id'])),
    ('--coordinator_address', '--num_processes', '--process_id'),
  )


def _checked(
  address: str, count: int, index: int, names: tuple[str, ...]
) -> Hosts:
  host, _, port = address.rpartition(':')
  if not host or not port.isdigit():
    raise config_lib.ConfigError(
      f'{names[0]} is {address!r}; it must be HOST:PORT'
    )
  if not 0 <= index < count:
    raise config_lib.ConfigError(
      f'{names[2]} is {index}; it must be below {names[1]}, which is {count}'
    )
  return Hosts(address, count, index)


def from_environment(
  environment: Mapping[str, str], tell: Callable[[str], None]
) -> Hosts | None:
  """Finds out from the environment; None for a single process.

  Args:
    environment: as `os.environ`.
    tell: gets a line about each environment that is left alone.
  """
  for read in (_jax, _slurm, _tpu):
    hosts = read(environment, tell)
    if hosts is not None:
      # One process has nobody to wait for.
      return hosts if hosts.num_processes > 1 else None
  return None


def _complete(
  environment: Mapping[str, str],
  names: tuple[str, ...],
  owner: str,
  tell: Callable[[str], None],
) -> bool:
  """Whether all variables are there; tells if only some are."""
  there = [name for name in names if environment.get(name)]
  if there and len(there) < len(names):
    missing = ', '.join(name for name in names if name not in there)
    tell(
      f'{owner} environment left alone: {there[0]} is set and {missing} is '
      'not; for several processes start them with '
      f'{"srun" if owner == "SLURM" else "all of these"}, or give '
      '--coordinator_address, --num_processes and --process_id'
    )
  return len(there) == len(names)


def _numbers(
  environment: Mapping[str, str],
  names: tuple[str, ...],
  owner: str,
  tell: Callable[[str], None],
) -> list[int] | None:
  """The variables as numbers; None, with a message, if one is none."""
  for name in names:
    if not environment[name].isdigit():
      tell(
        f'{owner} environment left alone: {name} is {environment[name]!r}, '
        'which is no number'
      )
      return None
  return [int(environment[name]) for name in names]


def _jax(
  environment: Mapping[str, str], tell: Callable[[str], None]
) -> Hosts | None:
  names = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
  if not _complete(environment, names, 'JAX', tell):
    return None
  numbers = _numbers(environment, names[1:], 'JAX', tell)
  if numbers is None:
    return None
  count, index = numbers
  return _checked(environment[names[0]], count, index, names)


def _slurm(
  environment: Mapping[str, str], tell: Callable[[str], None]
) -> Hosts | None:
  names = (
    'SLURM_JOB_ID',
    # SLURM_JOB_NODELIST and its like are of the whole allocation, and not of
    # what `srun` has started.
    'SLURM_STEP_NODELIST',
    'SLURM_STEP_NUM_TASKS',
    'SLURM_PROCID',
    'SLURM_LOCALID',
  )
  if not _complete(environment, names, 'SLURM', tell):
    return None
  numbers = _numbers(environment, (names[0], *names[2:]), 'SLURM', tell)
  if numbers is None:
    return None
  job, count, index, local = numbers
  try:
    host = first_host(environment['SLURM_STEP_NODELIST'])
  except ValueError as error:
    tell(f'SLURM environment left alone: {error}')
    return None
  # From the job's number, so that all processes find the same without talking.
  port = _FIRST_PORT + job % _NUM_PORTS
  tasks = environment.get('SLURM_STEP_TASKS_PER_NODE', '1')
  # `1(x4)`: one task on each of four nodes.
  shares_node = not re.fullmatch(r'1(\(x\d+\))?', tasks)
  visible = environment.get('CUDA_VISIBLE_DEVICES', '')
  # With --gpus-per-task a process sees its own device alone.
  local_device = local if shares_node and visible.count(',') else None
  return Hosts(f'{host}:{port}', count, index, local_device)


def first_host(nodes: str) -> str:
  """The first of a list as SLURM writes it: `gpu[003-005,9],login1`.

  Raises:
    ValueError: if it cannot be read.
  """
  match = re.match(
    r'(?P<name>[\w.-]+)(\[(?P<number>\d+)[\d,-]*\](?P<rest>[\w.-]*))?', nodes
  )
  if match is None:
    raise ValueError(f'the list of nodes {nodes!r} cannot be read')
  return ''.join(match[part] or '' for part in ('name', 'number', 'rest'))


def _tpu(
  environment: Mapping[str, str], tell: Callable[[str], None]
) -> Hosts | None:
  names = ('TPU_WORKER_HOSTNAMES', 'TPU_WORKER_ID')
  if not _complete(environment, names, 'TPU', tell):
    return None
  numbers = _numbers(environment, names[1:], 'TPU', tell)
  if numbers is None:
    return None
  # The runtime of a TPU knows addresses and ranks itself; this only tells
  # whether there are several hosts.
  count = len(environment[names[0]].split(','))
  return Hosts('', count, numbers[0])


def start(values: Mapping[str, object] | None = None) -> None:
  """Joins the other processes, if there are any.

  Args:
    values: flags; None: those of absl.

  Raises:
    config_lib.ConfigError: if the flags or JAX's variables make no sense.
  """
  if values is None:
    names = ('coordinator_address', 'num_processes', 'process_id')
    values = {name: flags.FLAGS[name].value for name in names}
  hosts = from_flags(values)
  if hosts is None:
    hosts = from_environment(os.environ, logging.warning)
  if hosts is not None:
    initialize(hosts)


def initialize(hosts: Hosts) -> None:
  """Starts `jax.distributed`; must come before anything touches a device."""
  import jax

  if not hosts.coordinator:
    jax.distributed.initialize()  # a TPU knows the rest itself
    return
  # Without these, processes on CPUs cannot talk; other platforms ignore it.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(
    coordinator_address=hosts.coordinator,
    num_processes=hosts.num_processes,
    process_id=hosts.process_id,
    local_device_ids=hosts.local_device,
  )
