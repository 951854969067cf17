"""The method, and nothing else: SafePatching (arXiv 2405.13820), to be read in this order.

    patch.py          what a patch is: LoRA factors; what is added in the end: a merged patch
    derivation.py     gradient ascent and descent on the same harmful pairs: P_SE and P_OSM
    training.py       the loop that moves the factors
    snip.py           the importance of every weight, per sample, in one pass
    importance.py     which model and which pairs are scored; top-rate sets
    patching.py       the set algebra and the arithmetic, on one matrix
    safepatching.py   retention -> top-rate sets -> difference sets -> strengths -> sum: the method
    balancing.py      alpha found on the harmful pairs
    continual.py      the same, stage after stage
    sets.py           sets of weights too many to hold at once
    overlap.py        where the important and the kept weights are

Outside: the loss (models/chat.py), adding up (models/deltas.py, models/patched.py), and what runs
all of it in one call (api.py). [paper] marks what the paper prescribes; the rest is our choice.
docs/method.md states each equation and names the function that runs it.
"""

NAME = "SafePatching"  # as results and figures call it
