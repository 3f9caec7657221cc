"""From a mesh config to a device mesh."""

from collections.abc import Sequence
import dataclasses
import itertools
import math

import jax

from u2moe_jax import config as config_lib
from u2moe_jax.sharding import axes


class MeshError(ValueError):
  """A mesh that does not fit the devices."""


def resolve(
  config: config_lib.MeshConfig, num_devices: int
) -> config_lib.MeshConfig:
  """Fills the axis that is -1.

  Args:
    config: the mesh asked for.
    num_devices: devices there are.

  Returns:
    A config whose sizes multiply to `num_devices`.

  Raises:
    MeshError: if no size makes them multiply; names what was asked, the
      devices, and shapes that fit.
  """
  sizes = dataclasses.asdict(config)
  known = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  if free and num_devices % known == 0:
    sizes[free[0]] = num_devices // known
    known = num_devices
  if known != num_devices:
    raise MeshError(
      f'mesh {config.to_text()} does not fit {num_devices} device(s); shapes '
      f'that fit (data x fsdp x expert x tensor): {_fitting(num_devices)}; '
      'data=-1 takes whatever the other axes leave'
    )
  return config_lib.MeshConfig(**sizes)


def _fitting(num_devices: int) -> str:
  divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
  shapes = [
    shape
    for shape in itertools.product(divisors, repeat=4)
    if math.prod(shape) == num_devices
  ]
  # The last ones are those with the most on `data`.
  shown = ', '.join('x'.join(map(str, shape)) for shape in shapes[-12:])
  return shown + (f' and {len(shapes) - 12} more' if len(shapes) > 12 else '')


def make_mesh(
  config: config_lib.MeshConfig, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Builds the mesh; axes are Auto, so the compiler propagates shardings.

  Raises:
    MeshError: if the shape does not fit the devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  # The fields of a mesh config are in the order of the axes.
  shape = dataclasses.astuple(resolve(config, len(devices)))
  auto = (jax.sharding.AxisType.Auto,) * len(shape)
  return jax.make_mesh(shape, axes.MESH_AXES, axis_types=auto, devices=devices)
