"""Harmful pairs and evaluation prompts: readers of data sets, and what a run takes of them."""
