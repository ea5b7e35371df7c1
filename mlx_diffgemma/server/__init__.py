"""A server for many clients at once: the extra ``mlx-diffgemma[server]``."""
