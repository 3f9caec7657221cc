"""Why a training gives up; light, for scripts that only need the names."""


class GaveUpError(RuntimeError):
  """Training cannot go on, and would not the next time either."""


class NonfiniteError(GaveUpError):
  """Numbers stay no numbers; the message says where, and what to do."""


class OutOfMemoryError(GaveUpError):
  """A step does not fit; the message says which bucket, and what to lower."""
