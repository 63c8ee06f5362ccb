"""Measuring what pruning costs and gains."""
