"""Files, memory, randomness, freshness: what does not know that there are models."""
