"""Logical axis names: what a dimension is, not where it lives."""

BATCH = 'batch'  # utterances
LENGTH = 'length'  # frames or label positions
EMBED = 'embed'  # model width of parameters
ACTIVATION_EMBED = 'activation_embed'  # model width of activations
HEADS = 'heads'  # attention heads
KV = 'kv'  # width per head
MLP = 'mlp'  # hidden width of a feed-forward layer
VOCAB = 'vocab'  # tokens
EXPERT = 'expert'  # experts
ROUTER = 'router'  # experts, as outputs of a router
LAYERS = 'layers'  # stacked blocks
CONV = 'conv'  # kernel width of a convolution
CONV_CHANNEL = 'conv_channel'  # channels of a convolution
SUBSAMPLING = 'subsampling'  # channels between the first two convolutions
FEATURE = 'feature'  # flattened subsampling output

# Axes of the device mesh.
MESH_AXES = ('data', 'fsdp', 'expert', 'tensor')
