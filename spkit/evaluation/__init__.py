"""What a model answers, what each answer counts as, how often, and what is left of its skills."""
