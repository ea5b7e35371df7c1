"""The scheduler: runs many requests on one device, and decides whose turn it is and what goes into one pass."""
