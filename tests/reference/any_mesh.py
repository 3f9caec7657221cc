"""Three training steps of a small model on any mesh, and how to compare them.

As a program it is one of several processes:

  python -m tests.reference.any_mesh HOST:PORT NUM_PROCESSES INDEX DEVICES OUT

which trains the MoE model on `SHAPE_OF_PROCESSES`; process 0 writes OUT.
"""

import dataclasses
import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.reference import tiny
from u2moe_jax import config as config_lib
from u2moe_jax.models import u2
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.sharding import placement
from u2moe_jax.sharding import rules
from u2moe_jax.training import objective
from u2moe_jax.training import optimizer as optimizer_lib
from u2moe_jax.training import parameters
from u2moe_jax.training import state as state_lib
from u2moe_jax.training import step as step_lib

# What 8 divides: heads, hidden width, vocabulary, model width, experts, batch.
SHAPE_OF_PROCESSES = (1, 1, 2, 2)
_STEPS = 3
_MULTIPLY_KEYS = ("['query']", "['content_bias']", "['position_bias']")
# A program that runs three times need not be fast.
_COMPILER_OPTIONS = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}


def config(kind: str) -> config_lib.Config:
  """The experiment: `dense`, `moe`, or `capacity`: MoE with enough slots."""
  experts = config_lib.MoeConfig()
  if kind == 'moe':
    experts = tiny.moe(num_experts=8)
  elif kind == 'capacity':
    # E / J times the even share is all tokens of a device.
    experts = tiny.moe(num_experts=8, executor='capacity', capacity_factor=4.0)
  model = tiny.model_config(
    experts,
    num_heads=8,
    ffn_dim=16,
    dropout=0.1,
    attention_dropout=0.1,
    positional_dropout=0.1,
  )
  # One decoder is enough, and compiles faster.
  decoder = dataclasses.replace(
    model.decoder, num_heads=8, ffn_dim=16, num_reverse_blocks=0
  )
  return config_lib.Config(
    model=dataclasses.replace(model, vocab_size=16, decoder=decoder),
    # An epsilon that is not small: Adam turns the rounding noise of gradients
    # that are zero (the bias of a key is one) into whole steps.
    optimizer=config_lib.OptimizerConfig(
      schedule='constant', warmup_steps=0, learning_rate=1e-3, eps=1e-5
    ),
    train=config_lib.TrainConfig(
      num_steps=50, balance_loss_weight=0.01, z_loss_weight=0.001
    ),
  )


def batch() -> objective.Batch:
  """Eight rows of different lengths; the last one is empty."""
  # Eight rows, which every split of eight devices divides.
  return tiny.batch(
    (47, 39, 31, 23, 45, 33, 29, 0), (4, 3, 2, 1, 4, 3, 2, 0), seed=1
  )


def _record() -> optax.GradientTransformation:
  """Keeps the gradients it gets where the caller finds them: in its state."""

  def update(gradients, state, params=None):
    del state, params
    # (updates, new state): passed on, and kept.
    return gradients, gradients

  init = lambda params: jax.tree.map(jnp.zeros_like, params)
  return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class Trace:
  """What the steps gave, by parameter path.

  Attributes:
    losses: of each step.
    metrics: of the first step.
    gradients: of the first step.
    parameters: after the last step.
  """

  losses: np.ndarray
  metrics: dict[str, np.ndarray]
  gradients: dict[str, np.ndarray]
  parameters: dict[str, np.ndarray]


@functools.cache
def _first_params(kind: str):
  _, params, buffers = tiny.init(config(kind).model)

  def draw(path, leaf):
    # The gradient of a key's bias is zero; what is left is rounding noise, in
    # proportion to what keys are multiplied by. If that is small, the noise is
    # below what every gradient may be off by.
    name = jax.tree_util.keystr(path)
    is_small = any(part in name for part in _MULTIPLY_KEYS)
    return 0.02 * leaf if is_small else leaf

  params = jax.tree_util.tree_map_with_path(draw, params)
  return jax.device_get((params, buffers))


def run(
  kind: str, shape, *, rows: objective.Batch | None = None, fetch=jax.device_get
) -> Trace:
  """Trains on the first devices, as many as the shape wants.

  Args:
    kind: see `config`.
    shape: data x fsdp x expert x tensor.
    rows: the batch of this process; None: all rows.
    fetch: placed arrays to whole host arrays.
  """
  machine = machine_for(kind, tuple(shape))
  return machine.run(batch() if rows is None else rows, fetch)


# Few are kept: each program takes thousands of the mappings a process may have.
@functools.lru_cache(maxsize=4)
def machine_for(kind: str, shape: tuple[int, ...]) -> 'Machine':
  """The same for the same arguments, so that each program compiles once."""
  return Machine(kind, shape)


class Machine:
  """A train step, compiled for a mesh when it is first needed.

  Attributes:
    compiled: the program.
  """

  def __init__(self, kind: str, shape: tuple[int, ...]):
    experiment = config(kind)
    sizes = dict(zip(('data', 'fsdp', 'expert', 'tensor'), shape, strict=True))
    devices = jax.devices()[: int(np.prod(shape))]
    self._mesh = mesh_lib.make_mesh(config_lib.MeshConfig(**sizes), devices)
    model = u2.U2MoeModel(experiment.model)
    optimizer = optax.chain(
      _record(),
      optimizer_lib.make_optimizer(
        experiment.optimizer, num_steps=experiment.train.num_steps
      ),
    )
    params, buffers = _first_params(kind)
    self._first = state_lib.TrainState(
      step=np.zeros((), np.int32),
      params=params,
      # Shapes alone: all of it begins with zeros, which `state` makes in place.
      opt_state=jax.eval_shape(optimizer.init, params),
      buffers=buffers,
    )
    with jax.set_mesh(self._mesh):
      self._shardings = state_lib.state_shardings(
        model, optimizer, buffers, mesh=self._mesh
      )
      step = step_lib.make_train_step(
        model, optimizer, experiment, shardings=self._shardings, mesh=self._mesh
      )
      # Abstract: a process may not give arrays that others have parts of.
      shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (self._first, batch())
      )
      self.compiled = step.lower(*shapes).compile(_COMPILER_OPTIONS)

  def state(self) -> state_lib.TrainState:
    """The first state, placed; the optimizer's part is all zeros."""

    def place(leaf, sharding):
      abstract = isinstance(leaf, jax.ShapeDtypeStruct)
      value = np.zeros(leaf.shape, leaf.dtype) if abstract else np.array(leaf)
      return jax.make_array_from_callback(
        value.shape, sharding, lambda index: value[index]
      )

    return jax.tree.map(place, self._first, self._shardings)

  def run(self, rows: objective.Batch, fetch) -> Trace:
    """Makes the steps; see the function `run`."""
    state = self.state()
    sharding = placement.batch_sharding(self._mesh, rules.STANDARD)
    placed = placement.shard_batch(rows, sharding)
    every, gradients = [], None
    for _ in range(_STEPS):
      state, metrics = self.compiled(state, placed)
      every.append(
        {
          k: np.asarray(v.total) / np.asarray(v.count)
          for k, v in metrics.items()
        }
      )
      if gradients is None:
        gradients = parameters.paths(fetch(state.opt_state[0]))
    return Trace(
      losses=np.array([float(each['loss']) for each in every]),
      metrics=jax.tree.map(np.asarray, every[0]),
      gradients=gradients,
      parameters=parameters.paths(fetch(state.params)),
    )


def differences(found: Trace, expected: Trace) -> list[str]:
  """What is further off than summation in another order can bring about."""
  problems = []
  if not np.allclose(found.losses, expected.losses, rtol=1e-5, atol=0):
    problems.append(f'losses {found.losses} instead of {expected.losses}')
  norms = {k: np.linalg.norm(v) for k, v in expected.gradients.items()}
  total = np.sqrt(sum(norm**2 for norm in norms.values()))
  for path, norm in norms.items():
    error = np.linalg.norm(found.gradients[path] - expected.gradients[path])
    # `not <=` instead of `>`, so that a NaN is a problem.
    if not error <= 1e-4 * max(norm, 1e-5 * total):
      problems.append(f'gradient of {path}: off by {error:.2g} of {norm:.2g}')
  for path, value in expected.parameters.items():
    error = np.abs(found.parameters[path] - value).max()
    # Three steps of Adam at 1e-3 move a parameter by about 3e-3.
    if not error <= 2e-4:
      problems.append(f'parameter {path}: off by {error:.2g}')
  # What hangs on the mesh is left out: the load of a device.
  for name, value in expected.metrics.items():
    if name == 'most_loaded_device':
      continue
    if not np.allclose(found.metrics[name], value, rtol=1e-4, atol=1e-6):
      problems.append(f'{name}: {found.metrics[name]} instead of {value}')
  return problems


def save(trace: Trace, path: str) -> None:
  """Writes a trace as one file."""
  flat = {
    f'{field}/{name}': array
    for field in ('metrics', 'gradients', 'parameters')
    for name, array in getattr(trace, field).items()
  }
  np.savez(path, losses=trace.losses, **flat)


def load(path: str) -> Trace:
  """Reads it."""
  with np.load(path) as arrays:

    def part(field: str):
      prefix = f'{field}/'
      return {
        name.removeprefix(prefix): arrays[name]
        for name in arrays.files
        if name.startswith(prefix)
      }

    return Trace(
      losses=arrays['losses'],
      metrics=part('metrics'),
      gradients=part('gradients'),
      parameters=part('parameters'),
    )


def _main(address: str, count: str, index: str, devices: str, out: str) -> None:
  from jax.experimental import multihost_utils

  from experiments.wiring import hosts

  jax.config.update('jax_num_cpu_devices', int(devices))
  hosts.initialize(
    hosts.Hosts(
      coordinator=address, num_processes=int(count), process_id=int(index)
    )
  )
  # Each process has its rows alone, as in a training on several hosts.
  own = len(batch().weights) // int(count)
  rows = slice(own * int(index), own * (int(index) + 1))
  trace = run(
    'moe',
    SHAPE_OF_PROCESSES,
    rows=jax.tree.map(lambda x: x[rows], batch()),
    fetch=lambda tree: multihost_utils.process_allgather(tree, tiled=True),
  )
  if jax.process_index() == 0:
    save(trace, out)


if __name__ == '__main__':
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  _main(*sys.argv[1:])
