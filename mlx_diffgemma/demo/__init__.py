"""The Sudoku that the model in the box solves."""
