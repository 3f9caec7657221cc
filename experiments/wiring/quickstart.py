"""The steps of `make quickstart`."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from data_pipelines import prepare
from data_pipelines import sources
from experiments.reporting import build
from experiments.reporting import report
from experiments.wiring import command
from experiments.wiring import evaluation
from experiments.wiring import reporting
from experiments.wiring import training
from u2moe_jax import config as config_lib
from u2moe_jax.decoding import recognizer as recognizer_lib


def run(
  tree: Mapping[str, Any],
  workdir: pathlib.Path,
  *,
  num_train: int,
  num_test: int,
  say: Callable[[str], None],
) -> int:
  """Corpus, training, decoding, report; whatever is done is not repeated.

  Args:
    tree: the experiment's config.
    workdir: everything is written here.
    num_train: utterances to speak for training.
    num_test: utterances to speak for dev, and for test.
    say: told what happens.

  Returns:
    An exit code.
  """
  config = config_lib.from_dict(config_lib.Config, tree)
  corpus = workdir / 'corpus'
  say(f'corpus: {num_train} + 2 x {num_test} utterances of synthetic speech')
  prepare.prepare_builtin(
    corpus, seed=0, num_train=num_train, num_dev=num_test, num_test=num_test
  )
  # A prepared folder stands for whichever split is asked for.
  data = dataclasses.replace(config.data, train=str(corpus), dev=str(corpus))
  say('training')
  done = training.train(dataclasses.replace(config, data=data), workdir)
  if not done:
    say('stopped; run again to continue')
    return command.INTERRUPTED
  # Of a work directory, that is the average of its best checkpoints.
  recognizer = recognizer_lib.Recognizer.from_checkpoint(
    workdir, config=config.decode
  )
  rate = config.data.features.sample_rate
  source = sources.open_source(str(corpus), split='test', sample_rate=rate)
  results = evaluation.evaluate(recognizer, source, workdir, say=say)
  say('report')
  example = reporting.middling(source)
  path = build.build(
    workdir,
    recognizer=recognizer,
    example=example,
    results=results,
    notes=[
      'The corpus is synthetic speech: the error rates show that the '
      'machinery works, not how it does on recordings.'
    ],
  )
  print(report.format_table(results))
  _tell_differences(results)
  say(f'done: {path}')
  return command.OK


def _tell_differences(results: list[dict[str, Any]]) -> None:
  for entry in results:
    if not entry['streaming']:
      continue
    differing = entry['differs_from_masked']
    print(
      f'streaming against the masked pass: {len(differing)} of '
      f'{entry["utterances"]} utterances differ'
    )
    for each in differing:
      kind = 'near tie' if each['near_tie'] else 'NOT A NEAR TIE'
      print(f'  {each["key"]}: margin {each["margin"]:.1e}, {kind}')
