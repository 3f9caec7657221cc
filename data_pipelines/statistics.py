"""CMVN statistics of a source, computed by several threads."""

from concurrent import futures
import functools
import os

from data_pipelines import sources
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import audio
from u2moe_jax.frontend import cmvn
from u2moe_jax.frontend import fbank

# Mean and variance of more change nothing that a model notices.
_MOST_UTTERANCES = 5000


def compute_cmvn(
  source: sources.Source,
  features: config_lib.FeatureConfig,
  *,
  num_workers: int = 0,
  most: int = _MOST_UTTERANCES,
) -> cmvn.CmvnStats:
  """Statistics of raw features, without dither and augmentation.

  Sums of single utterances are added in the order of the source, so the
  result is the same, to the last bit, for any number of workers.

  Args:
    source: utterances; what cannot be read is passed over, for training tells
      of it.
    features: the filterbank.
    num_workers: threads; 0: one a core.
    most: utterances taken, evenly spread over the source.

  Raises:
    ValueError: if there is not one frame.
  """
  step = max(1, -(-len(source) // most))

  def one(index: int) -> cmvn.CmvnStats:
    stats = cmvn.empty(features.num_mel_bins)
    try:
      samples = source.load(index)
    except audio.AudioError:
      return stats
    return cmvn.accumulate(stats, fbank.fbank(samples, features))

  with futures.ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
    each = pool.map(one, range(0, len(source), step))
    # `map` gives results in the order asked for: sums of floats depend on it.
    stats = functools.reduce(cmvn.merge, each)
  if not stats.count:
    raise ValueError(
      f'no frame in {len(source)} utterances to compute CMVN statistics from'
    )
  return stats
