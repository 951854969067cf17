"""The same question on backbones that had no say in the settings: held-out backbones x derivations.

A params file with an alignment stage gives a backbone for every seed. Some seeds served to choose
the settings (spkit tune); the others are asked here. variants.py says who is asked, unit.py makes
one backbone and derivation, run.py all of them, tables.py and report.py say what came of it.
"""
