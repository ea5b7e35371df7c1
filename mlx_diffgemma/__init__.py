"""DiffusionGemma on MLX and on PyTorch: one API, one checkpoint, the same tokens."""
