"""The model directory and Orbax checkpoints."""
