"""How long a training waits for data: the loop of `experiments.train` itself.

FLAC files of noise and as many labels a second as Mandarin has, in a table of
the size of AISHELL-1's; all batches of one shape. Steps and workers share the
cores, as they do in a training on CPU.
"""

from collections.abc import Iterator
import contextlib
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import soundfile

from data_pipelines import manifest
from data_pipelines import waveform
from experiments.benchmarks import harness
from experiments.wiring import training
from u2moe_jax import config as config_lib
from u2moe_jax.text import tokenizer as tokenizer_lib
from u2moe_jax.training import json_lines

_SAMPLE_RATE = 16000
_NUM_FILES = 32
# With the three special tokens, 4,233.
_NUM_CHARACTERS = 4230
_TOKENS_PER_SECOND = 4


def run(options: harness.Options) -> Iterator[dict[str, Any]]:
  """Steps of a training from scratch, without a dev set."""
  for name, seconds, batch in options.cases():
    with (
      tempfile.TemporaryDirectory() as folder,
      # Records are all that goes to the standard output.
      contextlib.redirect_stdout(sys.stderr),
    ):
      path = pathlib.Path(folder)
      config = _config(name, path, seconds, batch, options.repeats)
      training.train(config, path / 'work')
      lines = list(json_lines.read(path / 'work' / 'metrics.jsonl'))
    measured = lines[-1]  # all but the first step, which warms up
    yield {
      'bench': 'wait',
      'config': name,
      'dtype': config.model.dtype,
      'batch': batch,
      'audio_s': seconds,
      'steps': options.repeats,
      'workers': config.data.num_workers,
      'worker_type': config.data.worker_type,
      'step_s': round(1 / measured['steps_per_second'], 4),
      'data_wait_share': measured['data_wait_share'],
      'audio_seconds_per_second': measured['audio_seconds_per_second'],
    }


def _config(
  name: str, folder: pathlib.Path, seconds: float, batch: int, num_steps: int
) -> config_lib.Config:
  """The experiment, on made sound, with batches of one shape."""
  changes = {
    'data.train': str(_write_corpus(folder, seconds)),
    'data.tokens': str(folder / 'tokens'),
    'data.num_buckets': 1,
    'data.num_token_buckets': 1,
    'data.batch_sizes': (batch,),
    'train.num_steps': 1 + num_steps,
    # There is a line for the first step alone, and one for all the others.
    'train.log_every': 1 + num_steps,
    'train.save_every': 1 + num_steps,
  }
  config = harness.experiment(name)
  for path, value in changes.items():
    config = config_lib.replace(config, path, value)
  return config


def _write_corpus(folder: pathlib.Path, seconds: float) -> pathlib.Path:
  """Writes files, token table and manifest; returns the manifest."""
  # From the beginning of Unicode's block of Chinese characters.
  characters = [chr(0x4E00 + number) for number in range(_NUM_CHARACTERS)]
  table = tokenizer_lib.build_char_tokenizer([''.join(characters)])
  table.save(folder / 'tokens')
  num_samples = int(seconds * _SAMPLE_RATE)
  utterances = []
  for index in range(_NUM_FILES):
    rng = np.random.default_rng(index)
    noise = waveform.coloured_noise(num_samples, 'pink', rng)
    name = f'{index}.flac'
    samples = 0.1 * noise / np.abs(noise).max()
    soundfile.write(folder / name, samples, _SAMPLE_RATE, 'PCM_16')
    text = ''.join(rng.choice(characters, int(seconds * _TOKENS_PER_SECOND)))
    extra = {'duration': seconds}
    utterances.append(manifest.Utterance(str(index), name, text, extra))
  path = folder / 'manifest.jsonl'
  manifest.write(path, utterances)
  return path
