"""One device, many requests: whose turn it is, and what goes into one pass."""
