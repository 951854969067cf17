"""The sandbox: a fictional village whose law is checkable, and a tiny backbone that speaks of it.

`world.py` holds the text, `tokenizer.py` an ordinary Hugging Face tokenizer for it, `train.py` the
recipe of the backbone, `judge.py` what an answer counts as. Nothing here knows of patches.
"""
