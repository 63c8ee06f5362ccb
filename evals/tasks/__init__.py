"""Evaluations on data: a user's own file, or the benchmarks of lmms-eval; a grid of methods and budgets, resumable."""
