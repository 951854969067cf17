"""Sweeps: grids and lists over parameters, seeds and backbones, as one graph of notebooks."""
