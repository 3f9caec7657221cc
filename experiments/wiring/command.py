"""How every script starts and ends: one line for bad input, an exit code."""

from collections.abc import Callable
import logging as standard_logging
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging

from u2moe_jax import config as config_lib
from u2moe_jax.training import errors

OK = 0
FAILED = 1  # a check said no
BAD_INPUT = 2  # a flag, key, file or line cannot be used; one line says which
INTERRUPTED = 3  # stopped by a signal, after saving
NO_SPACE = 4  # a file cannot be read or written, as on a full disk
GAVE_UP = 5  # numbers that are none, or too little memory: trying again is vain


# In warnings of Orbax: a run without a dev set, a folder opened for reading.
_AS_ASKED = ('tracked_metric', 'read_only', 'read only')


def run(main: Callable[[list[str]], int | None]) -> None:
  """Runs an absl main and exits with its code.

  A `ValueError` (all of the project's errors about input are) prints one
  line and exits with BAD_INPUT, an `OSError` with NO_SPACE, a training that
  gives up with GAVE_UP; anything else is a defect and keeps its traceback.
  """
  logging.get_absl_logger().addFilter(_is_worth_telling)
  sys.unraisablehook = _tell_unraisable
  # absl's own parser tells a bad flag in several lines and exits with 1.
  app.run(lambda argv: guarded(main, argv), flags_parser=parse_flags)


def guarded(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
  """Calls main and turns errors about input into a line and a code."""
  if not any(arg.startswith(('--verbosity', '-v')) for arg in sys.argv):
    logging.set_verbosity(logging.WARNING)  # Orbax tells a lot at INFO
  try:
    return main(argv) or OK
  except ValueError as error:
    return _complain(error, BAD_INPUT)
  except OSError as error:
    return _complain(error, NO_SPACE)
  except errors.GaveUpError as error:
    return _complain(error, GAVE_UP)


def _is_worth_telling(record: Any) -> bool:
  """Drops what Orbax says of failed saves, and of what it was asked for.

  The store raises the same errors where they can be handled, and they are told
  then, in one line.
  """
  if '/orbax/' not in record.pathname:
    return True
  is_error = record.levelno >= standard_logging.ERROR
  text = str(record.msg)
  return not is_error and not any(words in text for words in _AS_ASKED)


def _tell_unraisable(error: Any) -> None:
  """Passes over what a failed read or write of Orbax leaves behind.

  Its other reads go on, and end when nobody listens any more.
  """
  if str(error.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(error)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses flags; a bad one ends the program with one line."""
  try:
    rest = flags.FLAGS(argv)
    if 'config' in flags.FLAGS:
      _ = flags.FLAGS.config  # a file that cannot be loaded shows only here
    return rest
  # What a ConfigDict raises for a key that it has not.
  except (KeyError, AttributeError) as error:
    sys.exit(_complain(_unknown_key(argv, error), BAD_INPUT))
  except (flags.Error, OSError, TypeError, ValueError, SyntaxError) as error:
    message = error.args[0] if error.args else error
    sys.exit(_complain(message, BAD_INPUT))


def _unknown_key(argv: list[str], error: Exception) -> str:
  """Names the `--config.` flag whose key does not exist, and what does."""
  known = config_lib.to_dict(config_lib.Config())
  for arg in argv:
    if not arg.startswith('--config.'):
      continue
    path = arg.removeprefix('--config.').split('=')[0]
    node: Any = known
    for name in path.split('.'):
      if not isinstance(node, dict) or name not in node:
        there = ', '.join(sorted(node)) if isinstance(node, dict) else 'no keys'
        return (
          f'unknown config key {path!r} ({arg}): there is no {name!r}; '
          f'there is {there}'
        )
      node = node[name]
  return f'{type(error).__name__}: {error}'


def _complain(error: object, code: int) -> int:
  # Messages of libraries have line breaks; scripts that read ours want one
  # line.
  line = ' '.join(str(error).split())
  print(f'error: {line}', file=sys.stderr, flush=True)
  return code
