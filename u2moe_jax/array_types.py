"""The dimension glossary, array annotations and the type-check switch.

Dimension letters mean the same thing in every signature, comment and einsum:

  B  utterances                     T  frames at the current rate
  T_in  frames before subsampling   F  mel bins
  D  model width                    H  heads
  K  width per head                 M  hidden width of a feed-forward layer
  U  label positions                U1 label positions with sos or eos
  V  vocabulary                     N  beams or n-best entries
  G  routing groups                 S  tokens in a group
  E  experts                        J  experts kept per token
  C  capacity                       L  layers
  P  past frames in a cache         W  convolution kernel width

Masks are boolean, named `*_mask`, and True means valid (for attention: may
look). Lengths are integers of shape (B,), named `*_lengths`.

Annotations use the long form, `Float[Array, 'B T D']`. With
U2MOE_TYPECHECK=1 in the environment (the tests set it) `typechecked` checks
them while JAX traces; otherwise it costs nothing.
"""

from collections.abc import Callable
import os
from typing import Any
from typing import TypeAlias
from typing import TypeVar

from jax import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Int8
from jaxtyping import jaxtyped
from jaxtyping import Key
from jaxtyping import Num
from jaxtyping import PyTree
from jaxtyping import Shaped
from jaxtyping import UInt

_F = TypeVar('_F', bound=Callable[..., Any])

# The size of an axis: an int, or an expression of symbols where a program is
# exported for any size (`jax.export`).
Size: TypeAlias = Any

TYPECHECK_VARIABLE = 'U2MOE_TYPECHECK'

__all__ = [
  'Array',
  'Bool',
  'Float',
  'Int',
  'Int8',
  'Key',
  'Num',
  'PyTree',
  'Shaped',
  'Size',
  'UInt',
  'typechecked',
]


def typechecked(function: _F) -> _F:
  """Checks shapes and dtypes of a function's arguments and result.

  Args:
    function: any function or method with jaxtyping annotations.

  Returns:
    The function itself, or its checked form when U2MOE_TYPECHECK is set. The
    checked form raises `jaxtyping.TypeCheckError`, which names the function
    and the argument.
  """
  if os.environ.get(TYPECHECK_VARIABLE, '0') in ('', '0'):
    return function
  from beartype import beartype  # a dependency of the tests only

  return jaxtyped(typechecker=beartype)(function)
