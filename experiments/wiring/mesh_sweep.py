"""Mesh shapes of an experiment, looked at one by one in child processes."""

from collections.abc import Sequence
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from experiments.benchmarks import harness
from experiments.benchmarks import train as train_benchmark
from experiments.reporting import mesh_table
from u2moe_jax import config as config_lib
from u2moe_jax.models import u2
from u2moe_jax.sharding import axes
from u2moe_jax.sharding import compiled_report
from u2moe_jax.sharding import mesh as mesh_lib
from u2moe_jax.sharding import placement
from u2moe_jax.sharding import rules
from u2moe_jax.training import flops
from u2moe_jax.training import objective
from u2moe_jax.training import optimizer as optimizer_lib
from u2moe_jax.training import state as state_lib
from u2moe_jax.training import step as step_lib

# Machine code that nobody runs need not be optimised; what is looked at is made
# before that.
_SIMULATED = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}
# A vocabulary for configs that leave it to the data.
_VOCAB_SIZE = 5000
_SHAPE = re.compile(r'(\d+)x(\d+)x(\d+)x(\d+)')


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What all shapes have in common.

  Attributes:
    config: the experiment.
    devices: how many.
    simulate: on the host; nothing is run.
    batch: utterances of all devices.
    seconds: of sound in each.
    repeats: timed steps.
  """

  config: config_lib.Config
  devices: int
  simulate: bool
  batch: int
  seconds: float
  repeats: int

  def resolved(self) -> config_lib.Config:
    """The experiment with a vocabulary, and executors that can be compared.

    On a CPU `auto` is `blocked`, whose loop has as many rounds as the tokens
    want; `capacity` is what an accelerator would run.
    """
    config = self.config
    if not config.model.vocab_size:
      config = config_lib.replace(config, 'model.vocab_size', _VOCAB_SIZE)
    bins = config.data.features.num_mel_bins
    config = config_lib.replace(config, 'model.feature_dim', bins)
    for part in ('encoder', 'decoder'):
      if self.simulate and getattr(config.model, part).moe.executor == 'auto':
        path = f'model.{part}.moe.executor'
        config = config_lib.replace(config, path, 'capacity')
    return config

  def identity(self) -> dict[str, Any]:
    """What a row must share to be a row of this sweep."""
    config = config_lib.to_dict(self.resolved())
    # The one thing in which the rows differ.
    del config['mesh']
    common = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name != 'config'
    }
    return {**common, 'config': config}


def parse_shape(text: str) -> config_lib.MeshConfig:
  """Reads `2x1x4x1`.

  Raises:
    config_lib.ConfigError: if it cannot be read.
  """
  match = _SHAPE.fullmatch(text.strip())
  if match is None:
    raise config_lib.ConfigError(
      f'--shapes: {text!r} is no mesh shape; write data x fsdp x expert x '
      'tensor as 2x1x4x1, several with commas, or all'
    )
  return config_lib.MeshConfig(
    **dict(zip(axes.MESH_AXES, map(int, match.groups()), strict=True))
  )


def name_of(shape: config_lib.MeshConfig) -> str:
  """The shape as `2x1x4x1`."""
  return 'x'.join(map(str, dataclasses.astuple(shape)))


def every_shape(devices: int) -> list[config_lib.MeshConfig]:
  """All shapes of so many devices, the simple ones first."""
  divisors = [d for d in range(1, devices + 1) if devices % d == 0]
  found = [
    config_lib.MeshConfig(**dict(zip(axes.MESH_AXES, sizes, strict=True)))
    for sizes in itertools.product(divisors, repeat=4)
    if math.prod(sizes) == devices
  ]
  # Data parallelism alone comes first, tensor last.
  return sorted(found, key=lambda m: (m.tensor, m.expert, m.fsdp))


def misfit(
  sweep: Sweep, shape: config_lib.MeshConfig, boxed: Any
) -> str | None:
  """Why a shape cannot be used; None if it can.

  Args:
    sweep: devices and batch.
    shape: of the mesh.
    boxed: abstract training state with logical axes (`abstract_boxes`).
  """
  sizes = dataclasses.asdict(shape)
  if math.prod(sizes.values()) != sweep.devices:
    return f'is for {math.prod(sizes.values())} devices, not {sweep.devices}'
  model = sweep.config.model
  experts = max(model.encoder.moe.num_experts, model.decoder.moe.num_experts)
  if shape.expert > 1 and not experts:
    return f'mesh axis expert={shape.expert} splits nothing: no experts'
  # A batch has a whole number of rows on each of the devices that share it.
  names = rules.mesh_axes(rules.STANDARD, axes.BATCH)
  parts = math.prod(sizes[name] for name in names)
  if sweep.batch % parts:
    return (
      f'{"*".join(names)}={parts} does not divide the batch of {sweep.batch}'
    )
  return placement.misfit(boxed, sizes, rules.STANDARD)


def abstract_boxes(config: config_lib.Config) -> Any:
  """Shapes and logical axes of all parameters; moments are like them."""
  model = u2.U2MoeModel(config.model)
  return jax.eval_shape(
    lambda key: u2.init_params(model, key), jax.random.key(0)
  )


def run(
  sweep: Sweep,
  shapes: str,
  out: pathlib.Path,
  *,
  arguments: Sequence[str],
  platforms: str | None,
  timeout: float,
) -> None:
  """Looks at every shape that has not been looked at, and writes the tables.

  Args:
    sweep: what they have in common.
    shapes: `all`, or a list.
    out: the folder.
    arguments: of this script, for its children.
    platforms: JAX_PLATFORMS for the children; None: unset.
    timeout: seconds for a shape.
  """
  everything = shapes == 'all'
  chosen = (
    every_shape(sweep.devices)
    if everything
    else [parse_shape(text) for text in shapes.split(',')]
  )
  boxed = abstract_boxes(sweep.resolved())
  reasons = {name_of(s): misfit(sweep, s, boxed) for s in chosen}
  left_out = {name: why for name, why in reasons.items() if why}
  # A shape that was asked for by name is an error, one of `all` a line in the
  # table.
  if left_out and not everything:
    name, why = next(iter(left_out.items()))
    raise mesh_lib.MeshError(f'mesh shape {name}: {why}')
  names = [name for name, why in reasons.items() if not why]
  if not names:
    raise mesh_lib.MeshError(
      f'no mesh shape of {sweep.devices} devices fits; {name_of(chosen[0])}: '
      f'{reasons[name_of(chosen[0])]}'
    )
  # A row a file: what is interrupted goes on with the shapes that have none.
  (out / 'shapes').mkdir(parents=True, exist_ok=True)
  _require_same_sweep(sweep, out)
  print(f'{len(names)} mesh shapes, {len(left_out)} do not fit', flush=True)
  rows: list[dict[str, Any]] = []
  for name in names:
    row = _known_row(out, name)
    if row is None:
      row = _row_of_child(name, out, arguments, platforms, timeout)
    rows.append(row)
    print(mesh_table.line(row), flush=True)
    mesh_table.write(out, sweep.identity(), rows, left_out)
  print(f'wrote {out / "sweep.md"}')


def _require_same_sweep(sweep: Sweep, out: pathlib.Path) -> None:
  """Refuses to mix the rows of two sweeps in a folder."""
  file = out / 'shapes' / 'sweep.json'
  wanted = json.dumps(sweep.identity(), indent=1)
  if not file.is_file():
    _write(file, wanted)
  elif file.read_text(encoding='utf-8').strip() != wanted.strip():
    raise config_lib.ConfigError(
      f'{out} holds a sweep of another experiment, batch or number of devices; '
      'choose another --out'
    )


def _write(path: pathlib.Path, text: str) -> None:
  unfinished = path.with_name(path.name + '.tmp')
  unfinished.write_text(text + '\n', encoding='utf-8')
  unfinished.replace(path)


def _known_row(out: pathlib.Path, name: str) -> dict[str, Any] | None:
  file = out / 'shapes' / f'{name}.json'
  if not file.is_file():
    return None
  return json.loads(file.read_text(encoding='utf-8'))


def _row_of_child(
  name: str,
  out: pathlib.Path,
  arguments: Sequence[str],
  platforms: str | None,
  timeout: float,
) -> dict[str, Any]:
  """Starts a child for a shape; its row, or one that holds its error."""
  environment = dict(os.environ)
  # This process has set it to cpu for itself.
  environment.pop('JAX_PLATFORMS', None)
  if platforms is not None:
    environment['JAX_PLATFORMS'] = platforms
  # A child adds its own count of devices behind this.
  flags = re.sub(
    r'\s*--xla_force_host_platform_device_count=\d+',
    '',
    environment.get('XLA_FLAGS', ''),
  )
  environment['XLA_FLAGS'] = flags
  # A process each: how many devices are simulated is fixed when JAX starts, and
  # one that runs out of memory takes no other with it.
  child = [sys.executable, '-m', 'experiments.sweep_mesh', *arguments]
  try:
    done = subprocess.run(
      [*child, f'--child={name}'],
      env=environment,
      capture_output=True,
      text=True,
      timeout=timeout,
    )
    told = (done.stderr.strip() or 'it ended without a word').splitlines()
    error = f'exit code {done.returncode}: {_last_error(told)}'
  except subprocess.TimeoutExpired:
    error = f'not done after {timeout:g} s'
  # The child writes its row at the very end, so without one it has failed,
  # whatever its exit code.
  row = _known_row(out, name)
  if row is None:
    row = {'shape': name, 'error': error}
    _write(out / 'shapes' / f'{name}.json', json.dumps(row))
  return row


def _last_error(lines: Sequence[str]) -> str:
  """Of what a program said in the end, the line that says what it was."""
  told = [line for line in lines if re.match(r'[\w.]*(error|Error)\b', line)]
  return (told or lines)[-1].strip()[:500]


def look_at(sweep: Sweep, name: str, out: pathlib.Path) -> None:
  """Compiles a shape, times it where devices are real, and writes its row."""
  shape = parse_shape(name)
  if jax.device_count() < sweep.devices:
    raise mesh_lib.MeshError(
      f'--devices={sweep.devices}, and there are {jax.device_count()}; '
      '--simulate makes them up'
    )
  config = sweep.resolved()
  devices = jax.devices()[: sweep.devices]
  mesh = mesh_lib.make_mesh(shape, devices)
  model = u2.U2MoeModel(config.model)
  optimizer = optimizer_lib.optimizer_of(config)
  buffers = u2.init_buffers(config.model)
  shapes = _batch_shapes(sweep, config.model)
  # Outside of `set_mesh`, so of the whole batch as one device would do it.
  kept = _activation_bytes(config, model, shapes)
  with jax.set_mesh(mesh):
    target = state_lib.abstract_state_on(mesh, model, optimizer, buffers)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    step: Any = step_lib.make_train_step(
      model, optimizer, config, shardings=shardings, mesh=mesh
    )
    sharding = placement.batch_sharding(mesh, rules.STANDARD)
    batch = objective.Batch(
      **{
        key: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=sharding)
        for key, each in shapes.items()
      }
    )
    begun = time.monotonic()
    traced = step.trace(target, batch)
    # Tracing and lowering are Python's time, compiling is XLA's; told apart.
    lowered = traced.lower()
    traced_at = time.monotonic()
    options = _SIMULATED if sweep.simulate else None
    program = lowered.compile(compiler_options=options)
    row = {
      'shape': name,
      **dataclasses.asdict(shape),
      'trace_s': round(traced_at - begun, 2),
      'compile_s': round(time.monotonic() - traced_at, 2),
      'device': devices[0].device_kind,
      'executor': config.model.encoder.moe.executor
      if config.model.encoder.moe.num_experts
      else '',
      # Only the axes that split the batch divide it; `tensor` does not.
      'activation_bytes': kept // placement.batch_parts(mesh, rules.STANDARD),
      **_bytes(target, program),
      **_operations(program, traced, sweep.devices),
    }
    if not sweep.simulate:
      key = jax.random.key(0)
      state = state_lib.init_state(
        model, optimizer, buffers, key, shardings=shardings
      )
      arrays = train_benchmark.random_batch(
        config.model, batch=sweep.batch, seconds=sweep.seconds
      )
      placed = objective.Batch(**placement.shard_batch(arrays, sharding))
      row |= _timed(sweep, program, state, placed, row['model_flops'], devices)
  _write(out / 'shapes' / f'{name}.json', json.dumps(row))


def _per_device(tree: Any) -> int:
  """Bytes of one device's part of abstract arrays with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _bytes(target: state_lib.TrainState, program: Any) -> dict[str, int]:
  stats = program.memory_analysis()
  return {
    'parameter_bytes': _per_device(target.params),
    'optimizer_bytes': _per_device(target.opt_state),
    'temporary_bytes': int(stats.temp_size_in_bytes),
    'argument_bytes': int(stats.argument_size_in_bytes),
    # The donated state is argument and output in one: `alias` takes it out
    # once.
    'total_bytes': int(
      stats.argument_size_in_bytes
      + stats.output_size_in_bytes
      - stats.alias_size_in_bytes
      + stats.temp_size_in_bytes
    ),
  }


def _batch_shapes(
  sweep: Sweep, config: config_lib.ModelConfig
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a batch by field; for many devices it need not be made."""
  one = train_benchmark.random_batch(config, batch=1, seconds=sweep.seconds)
  return {
    key: jax.ShapeDtypeStruct((sweep.batch, *array.shape[1:]), array.dtype)
    for key, array in one.items()
  }


def _activation_bytes(
  config: config_lib.Config,
  model: u2.U2MoeModel,
  arrays: dict[str, jax.ShapeDtypeStruct],
) -> int:
  """What the forward pass keeps for the backward pass, of the whole batch.

  To be called without a mesh. Parameters that are kept are no activations;
  they are told by their shape.
  """

  def backward_needs(params, buffers, batch):
    def loss(params):
      return objective.compute_objective(
        model,
        params,
        buffers,
        objective.Batch(**batch),
        config.train,
        dropout_key=jax.random.key(0),
      ).loss

    # The backward function is a pytree; its leaves are what it keeps.
    return jax.vjp(loss, params)[1]

  params = nn.meta.unbox(abstract_boxes(config))
  kept = jax.eval_shape(
    backward_needs, params, u2.init_buffers(config.model), arrays
  )
  # Parameters and inputs are there anyway, kept or not.
  known = {leaf.shape for leaf in jax.tree.leaves(params)}
  known |= {leaf.shape for leaf in jax.tree.leaves(arrays)}
  return sum(
    math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
    for leaf in jax.tree.leaves(kept)
    if leaf.shape not in known
  )


def _operations(program: Any, traced: Any, devices: int) -> dict[str, Any]:
  cost = compiled_report.read(program.as_text())
  return {
    'flops': cost.flops,
    'model_flops': flops.count(traced.jaxpr),
    # What all devices do, over the products in the program as it was traced,
    # before anybody split it.
    'redundancy': round(cost.flops * devices / flops.count(traced.jaxpr), 3),
    'collective_bytes': cost.traffic.bytes,
    'collectives': {
      kind: {'count': traffic.count, 'bytes': traffic.bytes}
      for kind, traffic in sorted(cost.collectives.items())
    },
    'unknown_loops': cost.unknown_loops,
  }


def _timed(
  sweep: Sweep,
  program: Any,
  state: state_lib.TrainState,
  batch: objective.Batch,
  num_flops: float,
  devices: Sequence[jax.Device],
) -> dict[str, Any]:
  """Step time, and what follows from it."""

  def once():
    # The state is donated: each step must get what the last one returned.
    nonlocal state
    state, metrics = program(state, batch)
    return state, metrics

  wall = harness.measure(once, sweep.repeats)['wall_s']
  peak = flops.peak(devices[0].device_kind)
  return {
    'step_s': wall,
    'audio_seconds_per_second': round(sweep.batch * sweep.seconds / wall, 1),
    'mfu': round(num_flops / wall / peak / len(devices), 4) if peak else None,
  }
