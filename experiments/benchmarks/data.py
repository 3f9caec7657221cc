"""The data side alone: hours of sound per hour of wall clock, on this thread.

FLAC files of noise in the rhythm of speech are made in a temporary folder; the
`pipeline` cases are whole training batches, from the files to padded arrays.
Pin it to one core (`--threads=1`) for a figure per core.
"""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import pathlib
import tempfile
import time
from typing import Any

import numpy as np
import soundfile

from data_pipelines import manifest
from data_pipelines import pipeline
from data_pipelines import sources
from data_pipelines import waveform
from experiments.benchmarks import harness
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import audio
from u2moe_jax.frontend import fbank
from u2moe_jax.text import tokenizer as tokenizer_lib

_SAMPLE_RATE = 16000
_FILES = 24
_SYLLABLES_PER_SECOND = 4.0
_SHARE = 0.5  # of the utterances, that each kind of augmentation gets


def run(options: harness.Options) -> Iterator[dict[str, Any]]:
  """Each stage, then the pipeline as the config has it, then with all kinds."""
  for name in options.configs:
    for seconds in options.seconds:
      with tempfile.TemporaryDirectory() as folder:
        source = _make_source(pathlib.Path(folder), seconds)
        config = harness.experiment(name).data
        for case, work in _cases(source, config).items():
          walls = harness.measure(work, options.repeats)
          # Their lengths are `seconds` on average.
          speed = _FILES * seconds / walls['wall_s']
          yield {
            'bench': 'data',
            'case': case,
            'config': name,
            'audio_s': seconds,
            'files': _FILES,
            **walls,
            # What the wall would be without other programs on the core.
            'cpu_s': round(_cpu_seconds(work, options.repeats), 5),
            'hours_per_hour': round(speed),
          }


def _cpu_seconds(work: Callable[[], None], repeats: int) -> float:
  begun = time.process_time()
  for _ in range(repeats):
    work()
  return (time.process_time() - begun) / repeats


def _make_source(folder: pathlib.Path, seconds: float) -> sources.Source:
  """Writes the files and their manifest."""
  utterances = []
  for index in range(_FILES):
    rng = np.random.default_rng(index)
    # Not all of one length, or there is but one bucket.
    num_samples = int(seconds * (0.5 + (index + 0.5) / _FILES) * _SAMPLE_RATE)
    times = np.arange(num_samples) / _SAMPLE_RATE
    rhythm = np.sin(np.pi * _SYLLABLES_PER_SECOND * times) ** 2
    noise = waveform.coloured_noise(num_samples, 'pink', rng)
    samples = 0.1 * rhythm * noise / np.abs(noise).max()
    wav = f'{index}.flac'
    soundfile.write(folder / wav, samples, _SAMPLE_RATE, 'PCM_16')
    extra = {'duration': num_samples / _SAMPLE_RATE}
    utterances.append(manifest.Utterance(str(index), wav, 'AB', extra))
  manifest.write(folder / 'manifest.jsonl', utterances)
  return sources.open_source(str(folder / 'manifest.jsonl'))


def _cases(
  source: sources.Source, config: config_lib.DataConfig
) -> dict[str, Callable[[], None]]:
  # Loaded once, so that stages behind decoding are timed alone.
  sounds = [source.load(i) for i in range(len(source))]
  rng = np.random.default_rng(0)
  features = config.features
  everything = dataclasses.replace(
    config,
    augment=dataclasses.replace(
      config.augment,
      reverb_probability=_SHARE,
      noise_probability=_SHARE,
      volume_probability=_SHARE,
    ),
  )
  return {
    'decode': lambda: _each(source.load, range(len(source))),
    'speed': lambda: _each(
      lambda x: audio.change_speed(x, 0.9, _SAMPLE_RATE), sounds
    ),
    'fbank': lambda: _each(lambda x: fbank.fbank(x, features, rng=rng), sounds),
    'pipeline': _epoch(source, config),
    'pipeline, all augmentation': _epoch(source, everything),
  }


def _each(function: Callable[[Any], Any], inputs) -> None:
  for one in inputs:
    function(one)


def _epoch(
  source: sources.Source, config: config_lib.DataConfig
) -> Callable[[], None]:
  """One epoch of training batches, each time the next one."""
  # An epoch that is whole by itself can be timed by itself.
  config = dataclasses.replace(config, plan_epochs=1)
  tokenizer = tokenizer_lib.build_char_tokenizer(['AB'])
  corpus = pipeline.Corpus(source, tokenizer, config, rate=4, min_input=7)
  batches = pipeline.TrainBatches(corpus, seed=0)
  number = 0

  # Another epoch each time: of a repeated one the plan would be cached.
  def work() -> None:
    nonlocal number
    epoch, _ = batches.locate(number)
    # Asked for by number, as training asks.
    for _ in batches.epoch(epoch):
      _ = batches[number]
      number += 1

  return work
