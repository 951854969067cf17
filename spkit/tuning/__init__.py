"""`spkit tune`: a search on the dev prompts for the settings of one backbone.

ingredients.py   patches and importances, derived once
candidates.py    the setting of a method -> deltas, fast
objective.py     harm, false refusal and damage by one forward pass, without generating
settings.py      which settings there are, and where they stand in a params file
search.py        the trials, by Optuna
choose.py        which trials are judged in full, and which one is chosen
figure.py        the trials as a picture
run.py           all of it, for a params file
"""
