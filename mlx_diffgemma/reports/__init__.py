"""What a checkpoint is, how fast it runs, what a conversion costs, and whether the backends agree."""
