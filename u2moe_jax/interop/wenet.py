"""WeNet checkpoints: yaml, state dict, units and CMVN, in and out.

The yaml is `wenet_config`'s, the state dict `wenet_weights`'s, and whole
model directories are `wenet_directory`'s; this module gathers what callers
outside of `interop` need of the first two.
"""

from u2moe_jax.interop import wenet_config
from u2moe_jax.interop import wenet_weights

WenetError = wenet_config.WenetError
feature_config = wenet_config.feature_config
model_config = wenet_config.model_config
to_yaml = wenet_config.to_yaml
model_variables = wenet_weights.model_variables
state_dict = wenet_weights.state_dict
