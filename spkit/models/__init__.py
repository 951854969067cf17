"""Language models: load one, find and read its weight matrices, put deltas in, chat formats."""
