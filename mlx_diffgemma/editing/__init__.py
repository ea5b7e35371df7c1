"""Editing an existing text: infilling, revising, proofreading."""
