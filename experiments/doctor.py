"""Says what this machine offers, and whether the basics work.

python -m experiments.doctor
"""

from absl import flags

from experiments.wiring import command

_SMOKE = flags.DEFINE_bool('smoke', True, 'Train and decode for ten seconds.')


def main(_: list[str]) -> int:
  """Prints a report; exit code 1 if something needed is broken."""
  from experiments.wiring import diagnosis

  healthy = diagnosis.report()
  if _SMOKE.value:
    # In this order: the smoke test runs even where something is missing.
    healthy = diagnosis.smoke() and healthy
  return command.OK if healthy else command.FAILED


if __name__ == '__main__':
  command.run(main)
