"""Compares our model with stored numbers of WeNet, quantity by quantity.

  python -m experiments.verify_wenet --golden=DIR [--golden=DIR ...]

DIR is a case (config.json, weights.npz, io.npz, results.json; or fbank.npz
with recordings), or a folder of cases. One row per quantity; the last line is
one JSON object. Exit code 1 if anything differs, or could not be checked.
Nearly all of the time goes into compiling; so it is done without optimisations
unless --optimized asks for the very programs that training and decoding run.
"""

from absl import flags

from experiments.wiring import command

_GOLDEN = flags.DEFINE_multi_string(
  'golden', None, 'A case, or a folder of cases.', required=True
)
_OPTIMIZED = flags.DEFINE_bool(
  'optimized',
  False,
  'Compile with all optimisations (takes half as long again).',
)


def main(_: list[str]) -> int:
  """Verifies; exit codes in docs/exit_codes.md."""
  import jax

  from experiments.verification import cases
  from experiments.verification import table
  from experiments.verification import verify

  # Some accelerators multiply float32 with fewer digits by default.
  jax.config.update('jax_default_matmul_precision', 'highest')
  jax.config.update('jax_disable_most_optimizations', not _OPTIMIZED.value)
  found = [case for path in _GOLDEN.value for case in cases.discover(path)]
  print(table.header())
  rows = []
  for case in found:
    for row in verify.rows(case):
      print(table.line(case.name, row), flush=True)
      rows.append((case.name, row))
    jax.clear_caches()  # other cases have other models; these hold memory
  print(table.summary(rows, cases=len(found)))
  failed = any(not row.passed for _, row in rows)
  # A case without a single row has verified nothing.
  return command.FAILED if failed or not rows else command.OK


if __name__ == '__main__':
  command.run(main)
