"""The experiment of notebook 05: seeds, equally tuned methods, ablations, sweeps, statistics."""
