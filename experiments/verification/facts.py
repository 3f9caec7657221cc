"""What a case holds beside quantities, and why it is none."""

from experiments.verification import registry

_INPUT = 'input'
_REFERENCE = 'about the reference itself'

RULES = (
  registry.Rule('io/(feats|feats_lengths|target|target_lengths)', None, _INPUT),
  registry.Rule(r'io/(logp_\w+|lens|ls_logits|ls_target)', None, _INPUT),
  registry.Rule(r'io/(moe_x|moe_w\..+)', None, _INPUT),
  registry.Rule('results/context_(phrases|score)', None, _INPUT),
  registry.Rule('results/reference_strings', None, _INPUT),
  registry.Rule(r'config/(?!n_params$|names$)\w+', None, _INPUT),
  registry.Rule('results/numeric_noise', None, _REFERENCE),
  registry.Rule('results/search_stable_[^/]+', None, _REFERENCE),
  registry.Rule('results/stable', None, _REFERENCE),
  registry.Rule(r'results/(\w+_)?margins?(_\w+)?', None, _REFERENCE),
  registry.Rule(r'results/(\w+_)?notes?', None, _REFERENCE),
)
