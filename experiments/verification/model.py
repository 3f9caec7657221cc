"""The model itself: its size and the names of what it is made of."""

from collections.abc import Iterator

from experiments.verification import compare
from experiments.verification import port as port_lib
from experiments.verification import registry
from u2moe_jax.models import u2


def _size(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  ours, _ = u2.count_params(port.yaml_config)
  yield compare.equal(quantity.path, ours, quantity.value)


def _names(
  port: port_lib.Port, quantity: registry.Quantity
) -> Iterator[compare.Row]:
  """Every entry has its place in our tree, and none is missing there."""
  assert port.variables  # the import is strict
  ours, theirs = set(port.case.weights), set(quantity.value)
  different = sorted(ours ^ theirs)
  note = f'the first is {different[0]}' if different else ''
  yield compare.Row(quantity.path, float(len(different)), compare.EXACT, note)


RULES = (
  registry.Rule('config/n_params', _size),
  registry.Rule('config/names', _names),
)
