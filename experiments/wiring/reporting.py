"""The report of a work directory, with the model that it has so far."""

import json
import pathlib

from data_pipelines import sources
from experiments.reporting import build
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.decoding import recognizer as recognizer_lib


def report(workdir: pathlib.Path, manifest: str | None) -> pathlib.Path:
  """Writes the plots and the page.

  Args:
    workdir: of a training, done or under way.
    manifest: source of the utterance to look into, if there is a model.

  Returns:
    The path of the page.

  Raises:
    ValueError: if there has been no training, or the source cannot be opened.
  """
  if not (workdir / 'metrics.jsonl').is_file():
    raise config_lib.ConfigError(
      f'{workdir}: no metrics.jsonl here; --workdir is the one of training'
    )
  recognizer = example = None
  if (workdir / 'model').is_dir() or directory.step_folders(workdir):
    recognizer = recognizer_lib.Recognizer.from_checkpoint(workdir)
  if recognizer is not None and manifest is not None:
    rate = recognizer.description.features.sample_rate
    example = middling(
      sources.open_source(manifest, split='test', sample_rate=rate)
    )
  # What the quickstart has found stays in its page.
  results = workdir / 'results.json'
  return build.build(
    workdir,
    recognizer=recognizer,
    example=example,
    results=json.loads(results.read_text()) if results.is_file() else [],
  )


def middling(source: sources.Source) -> build.Example:
  """The first utterance of middling length: name, sound, text."""
  lengths = [each.duration or 0.0 for each in source.utterances]
  middle = sorted(lengths)[len(lengths) // 2]
  index = lengths.index(middle)
  utterance = source.utterances[index]
  return utterance.key, source.load(index), utterance.txt
