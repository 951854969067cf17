"""Safety tuning of a backbone that is hardly aligned, into one that refuses, and too often.

It is a stage of its own before notebook 00, for the backbones whose parameters ask for it (section
align). recipe.py says what is learnt, loop.py how and where it ends, stage.py keeps the results.
"""
