"""The n-best list every search returns."""

from flax import struct

from u2moe_jax.array_types import Array
from u2moe_jax.array_types import Float
from u2moe_jax.array_types import Int


@struct.dataclass
class Hypotheses:
  """N hypotheses for each utterance, best first.

  A slot that holds no hypothesis (a search can find fewer than N) has score
  -inf and length 0, and stands after the real ones.

  Attributes:
    tokens: label ids without sos, eos and blank, padded with -1.
    lengths: number of tokens; 0 is a valid, empty result.
    scores: log scores; what they mean is said by the search that made them.
    times: encoder frame of each token, padded with -1; all -1 where the search
      knows no times.
    margin: the smallest score gap that any decision of the search hung on: a
      candidate dropped or kept, first or second place. A result with a margin
      near the rounding noise may differ on another machine. inf if there was
      nothing to decide.
  """

  tokens: Int[Array, 'B N U']
  lengths: Int[Array, 'B N']
  scores: Float[Array, 'B N']
  times: Int[Array, 'B N U']
  margin: Float[Array, 'B']
