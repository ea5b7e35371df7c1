"""Reports on a checkpoint: its contents, its speed, the cost of a conversion, and whether the backends agree."""
