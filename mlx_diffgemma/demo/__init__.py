"""The Sudoku demo: the puzzles that the boxed model solves."""
