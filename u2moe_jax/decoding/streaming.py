"""One stream: sound in as it comes, growing text out, rescored at the end.

Features, encoder and search are incremental; the encoder keeps keys, values
and convolution inputs (`models.cache`), the search its beams. The words are
those of one masked pass with the same chunk size. Many streams in one batch:
`decoding.sessions`, of which this is the smallest case.
"""

import numpy as np

from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.decoding import sessions
from u2moe_jax.decoding import transcript as transcript_lib


class Stream:
  """One utterance heard chunk by chunk: `accept` any number of times, then
  `finish` once.
  """

  def __init__(
    self, recognizer: recognizer_lib.Recognizer, *, endpoints: bool = False
  ):
    """Starts a stream.

    Args:
      recognizer: the model and its decode config, as `Sessions` takes them.
      endpoints: cut the stream into segments (`config.endpoint`), as one that
        goes on for hours must be. `accept` returns those that have ended.

    Raises:
      DecodeError: if model or config cannot stream.
    """
    pool = sessions.Sessions(recognizer, slots=1, endpoints=endpoints)
    self._session = pool.open()

  def accept(
    self, samples: np.ndarray, *, sample_rate: int | None = None
  ) -> sessions.Partial:
    """Takes the next samples; see `Session.feed` for arguments and errors."""
    return self._session.accept(samples, sample_rate=sample_rate)

  def finish(self) -> transcript_lib.Transcript:
    """Ends the stream: the last, shorter chunk, then rescoring.

    Returns:
      The transcript; with endpoints, of what `accept` has not returned yet.

    Raises:
      DecodeError: if called twice.
    """
    segments = self._session.finish()
    if len(segments) == 1:
      return segments[0].transcript
    return transcript_lib.join(segments) if segments else transcript_lib.empty()
