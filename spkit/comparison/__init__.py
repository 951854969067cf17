"""SafePatching beside other methods and its own ablations: the experiment behind notebook 05."""
