"""Writing inside a text that is there: infilling, revising, proofreading."""
