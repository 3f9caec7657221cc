"""Runs arms, each in a work directory of its own, and measures them."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import json
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np

from data_pipelines import sources
from experiments.reporting import metrics_log
from experiments.studies import design
from experiments.wiring import decoding
from experiments.wiring import preparing
from experiments.wiring import training
from experiments.wiring import upcycling
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import contents
from u2moe_jax.checkpoint import directory
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.models import u2
from u2moe_jax.text import scoring
from u2moe_jax.training import parameters

_MOMENTS = {'mu', 'nu'}
_SITTING = 'sitting'  # in arm.json while somebody works on the arm
Entry = dict[str, Any]
_UNTRAINED: Entry = {'updates': 0, 'seconds': 0.0, 'dev': []}


class ReceiptError(RuntimeError):
  """A grown model that does not compute what the dense one does."""


def run(
  arms: Sequence[design.Arm],
  root: pathlib.Path,
  *,
  say: Callable[[str], None],
  after: Callable[[Sequence[Entry]], None],
) -> bool:
  """Trains and decodes every arm; what is done is not repeated.

  Args:
    arms: each behind the one that it starts from.
    root: work directory of the study.
    say: told what happens.
    after: called with what is known, behind every arm.

  Returns:
    False if a signal stopped it; everything is saved, and the same call goes
    on from there.

  Raises:
    ReceiptError: if growing changes what the model computes.
    ValueError: for whatever cannot be used; says why.
  """
  # Of all, so that nothing is done if one cannot be continued as asked.
  known = [_begin(arm, root / arm.folder) for arm in arms]
  entries: list[Entry] = []
  for arm, entry in zip(arms, known, strict=True):
    say(f'{arm.folder}: {arm.title} ({len(entries) + 1} of {len(arms)})')
    # The error rates come last, so an arm that has them is done.
    is_new = 'wer' not in entry
    if not is_new:
      say('  done already')
    elif not _run_one(arm, entry, root, say):
      return False
    entries.append(entry)
    # Behind each new arm, and in any case at the end.
    if is_new or len(entries) == len(arms):
      after(entries)
    jax.clear_caches()  # the next arm has programs of its own
  return True


def _run_one(
  arm: design.Arm, entry: Entry, root: pathlib.Path, say: Callable[[str], None]
) -> bool:
  """Adds what became of an arm to its entry; False if a signal stopped it."""
  workdir = root / arm.folder
  workdir.mkdir(parents=True, exist_ok=True)
  # Should the process be killed, the next sitting finds that one was under way.
  preparing.write_json(workdir / 'arm.json', entry | {_SITTING: True})
  begun = time.monotonic()
  try:
    found = _measure(arm, root, say)
    entry.update(found or {})
  finally:
    # However it ends: the next sitting adds its own.
    entry['wall_seconds'] += round(time.monotonic() - begun, 1)
    preparing.write_json(workdir / 'arm.json', entry)
  return found is not None


def _begin(arm: design.Arm, workdir: pathlib.Path) -> Entry:
  """What is known of an arm; refuses to go on with it as another one.

  That is stricter than training, which may be lengthened: here the length
  decides the schedule.
  """
  file = workdir / 'arm.json'
  asked = _asked(arm)
  known: Entry = {}
  if file.is_file():
    known = json.loads(file.read_text(encoding='utf-8'))
  # Asked for, but nothing was trained: it may be asked for differently.
  if not known or not ('wer' in known or (workdir / 'config.json').is_file()):
    return {'asked': asked, 'wall_seconds': 0.0}
  changed = preparing.differences(_filled_in(known['asked']), asked)
  if changed:
    raise config_lib.ConfigError(
      f'{workdir} holds an arm with another {changed[0]!r}; ask for the same, '
      'or choose another --workdir'
    )
  if known.pop(_SITTING, False):
    known['wall_seconds'] += _killed_after(workdir)
  return known


def _killed_after(workdir: pathlib.Path) -> float:
  """Seconds of a sitting that could not say how long it was."""
  first, last = workdir / 'arm.json', workdir / 'metrics.jsonl'
  if not last.is_file():
    return 0.0
  # arm.json is written when a sitting begins, metrics.jsonl as long as it
  # lasts. It is older if that sitting logged nothing.
  seconds = last.stat().st_mtime - first.stat().st_mtime
  return round(max(seconds, 0.0), 1)


def _asked(arm: design.Arm) -> Entry:
  """What decides the result, as JSON gives it back."""
  config = None if arm.config is None else config_lib.to_dict(arm.config)
  asked = {
    'config': config,
    'decode': config_lib.to_dict(arm.decode),
    'tests': [dataclasses.asdict(each) for each in arm.tests],
    'start': arm.start,
    'growth': arm.growth and dataclasses.asdict(arm.growth),
  }
  # Tuples become lists, as in what it is compared with.
  return json.loads(json.dumps(asked))


def _filled_in(asked: Entry) -> Entry:
  """With the keys that configs have got since; they had their defaults."""
  config, decode = asked['config'], asked['decode']
  if config is not None:
    config = config_lib.to_dict(config_lib.from_dict(config_lib.Config, config))
  decode = config_lib.to_dict(
    config_lib.from_dict(config_lib.DecodeConfig, decode)
  )
  return json.loads(json.dumps(asked | {'config': config, 'decode': decode}))


def _measure(
  arm: design.Arm, root: pathlib.Path, say: Callable[[str], None]
) -> Entry | None:
  """Trains an arm, and says what became of it; None if a signal stopped it."""
  workdir = root / arm.folder
  source = _source(arm, root, say)
  model, history = source, _UNTRAINED
  if arm.config is not None:
    if not training.train(_complete(arm.config, arm, root, source), workdir):
      return None
    model, history = workdir, _history(workdir)
  assert model is not None  # an arm without training has a start
  return {
    'study': arm.study,
    'seed': arm.seed,
    'letter': arm.letter,
    'title': design.TITLES[arm.letter],
    'start': arm.start,
    'search': arm.decode.mode,
    **sizes(model),
    **history,
    **_decode(arm, model, workdir, say),
  }


def _source(
  arm: design.Arm, root: pathlib.Path, say: Callable[[str], None]
) -> pathlib.Path | None:
  """The model that an arm starts from; grown first, once for all arms."""
  if not arm.start:
    return None
  dense = root / arm.start / 'model'
  if arm.growth is None:
    return dense
  grown = root / arm.start / 'grown'
  asked = dataclasses.asdict(arm.growth)
  if grown.is_dir():
    # Arms share what was grown; one that was grown otherwise must not be taken.
    record = directory.describe(grown).provenance['upcycling']
    for name, value in asked.items():
      if record[name] != value:
        raise config_lib.ConfigError(
          f'{grown} has {name}={record[name]}, not {value}; choose another '
          '--workdir, or remove it'
        )
    return grown
  say(f'  growing {arm.growth.num_experts} experts')
  # The receipt is made on sound of the corpus, not on random features.
  if not upcycling.upcycle(
    dense, grown, arm.growth, manifest=arm.tests[0].test
  ):
    raise ReceiptError(
      f'{dense}: with experts it does not compute the same, see above'
    )
  return grown


def _complete(
  config: config_lib.Config,
  arm: design.Arm,
  root: pathlib.Path,
  source: pathlib.Path | None,
) -> config_lib.Config:
  """Fills in what the start decides: model, weights, tokens, CMVN."""
  if arm.like:
    like = root / arm.like
    data = dataclasses.replace(
      config.data,
      tokens=str(like / 'tokens'),
      cmvn=str(like / 'global_cmvn.json'),
    )
    config = dataclasses.replace(config, data=data)
  if source is None:
    return config
  train = dataclasses.replace(config.train, init_from=str(source))
  model = directory.describe(source).model
  return dataclasses.replace(config, model=model, train=train)


def sizes(path: pathlib.Path) -> Entry:
  """Parameters of a checkpoint, what of them trains, and what Adam keeps.

  Args:
    path: a model directory, or the work directory of a training.

  Returns:
    Counts, and bytes; those of the moments as they lie in the newest step, so
    0 where there is none.
  """
  model = directory.find(path).description.model
  total, active = u2.count_params(model)
  found = {
    'parameters': total,
    'active_parameters': active,
    'trainable_parameters': 0,
    'trainable_bytes': 0,
    'moment_bytes': 0,
  }
  if not (path / 'config.json').is_file():
    return found
  tree = json.loads((path / 'config.json').read_text(encoding='utf-8'))
  spec = config_lib.from_dict(config_lib.Config, tree).train.trainable
  is_chosen = parameters.selector(spec)
  leaves = parameters.paths(directory.abstract_variables(model)['params'])
  chosen = [leaf for name, leaf in leaves.items() if is_chosen(name)]
  found['trainable_parameters'] = sum(math.prod(x.shape) for x in chosen)
  found['trainable_bytes'] = sum(
    math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in chosen
  )
  # Moments are in steps only; the averaged model has none.
  newest = directory.step_folders(path)[-1]
  found['moment_bytes'] = _moment_bytes(newest / 'optimizer')
  return found


def _moment_bytes(item: pathlib.Path) -> int:
  """Of both of Adam's moments in a saved optimizer state, float32."""
  return sum(
    4 * math.prod(shape)
    for path, shape in contents.saved_shapes(item).items()
    if _MOMENTS & set(path.split('/'))
  )


def _history(workdir: pathlib.Path) -> Entry:
  """Updates, seconds and the curve of a training, restarts included."""
  log = metrics_log.read(workdir / 'metrics.jsonl')
  speed = log.series('train', 'steps_per_second')
  # Of the windows between two lines; compiling, evaluating and saving apart.
  # Steps of a window by its speed are its seconds.
  spent = np.cumsum(np.diff(speed.steps, prepend=0) / speed.values)
  wer = log.series('dev', 'wer').finite()
  # At the very step where a line was logged; between lines, its share.
  seconds = np.interp(wer.steps, speed.steps, spent)
  entry: Entry = {
    'updates': int(speed.steps[-1]),
    'seconds': round(float(spent[-1]), 1),
    'dev': [
      {'step': int(step), 'wer': float(value), 'seconds': round(float(s), 1)}
      for step, value, s in zip(wer.steps, wer.values, seconds, strict=True)
    ],
  }
  low = log.series('train', 'expert_load_low').finite()
  if len(low):
    high = log.series('train', 'expert_load_high').finite()
    # The end of training: at first routers are not balanced yet.
    entry['load_low'] = round(float(np.mean(low.values[-10:])), 4)
    entry['load_high'] = round(float(np.mean(high.values[-10:])), 4)
  return entry


def _decode(
  arm: design.Arm,
  model: pathlib.Path,
  workdir: pathlib.Path,
  say: Callable[[str], None],
) -> Entry:
  """Error rates by corpus and pass, and the errors of each utterance.

  Passes are `dev` and `greedy`, by the search of the curves, the CTC best path,
  and `test`, as the arm says; the errors are those of the last.
  """
  recognizer = recognizer_lib.Recognizer.from_checkpoint(
    model, config=arm.decode
  )
  greedy = dataclasses.replace(arm.decode, mode='ctc_greedy_search')
  rates: dict[str, dict[str, float]] = {}
  errors: dict[str, list[int]] = {}
  for corpus in arm.tests:
    rates[corpus.name] = {}
    for name, split, config in (
      ('dev', 'dev', greedy),
      ('greedy', 'test', greedy),
      ('test', 'test', arm.decode),
    ):
      say(f'  decoding {corpus.name}, {split}: {config.mode}')
      source = sources.open_source(
        getattr(corpus, split),
        split=split,
        sample_rate=recognizer.description.features.sample_rate,
      )
      summary, decoded = decoding.run(
        recognizer.with_config(config),
        source,
        out=workdir / 'transcripts' / f'{corpus.name}-{name}.jsonl',
      )
      rates[corpus.name][name] = summary.to_json()['wer']
      # Overwritten by each pass, so those of `test`, the last, remain.
      errors[corpus.name] = [_word_errors(each) for each in decoded]
  return {'wer': rates, 'errors': errors}


def _word_errors(decoded: decoding.Decoded) -> int:
  texts = decoded.utterance.txt, decoded.transcript.text
  return scoring.word_errors(*map(scoring.normalise, texts)).errors
