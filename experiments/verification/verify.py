"""Everything a case holds, checked: all rules together."""

from collections.abc import Iterator

from experiments.verification import batch_norm
from experiments.verification import cases
from experiments.verification import compare
from experiments.verification import contexts
from experiments.verification import decoders_and_losses
from experiments.verification import encoder
from experiments.verification import experts
from experiments.verification import facts
from experiments.verification import features
from experiments.verification import gradients
from experiments.verification import model
from experiments.verification import port
from experiments.verification import registry
from experiments.verification import search
from experiments.verification import units

# The first rule that fits has the say, so what is no quantity comes first.
_MODULES = (
  facts,
  model,
  encoder,
  experts,
  decoders_and_losses,
  gradients,
  batch_norm,
  search,
  contexts,
  units,
  features,
)


def rows(case: cases.Case) -> Iterator[compare.Row]:
  """Compares every quantity of a case with ours."""
  rules = [rule for module in _MODULES for rule in module.RULES]
  return registry.verify(port.Port(case), rules)
