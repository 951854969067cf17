"""Runs: their folders, notebooks, records and memory. Nothing here computes a result."""
