"""A safety patch as a file: make, apply, revert, verify, inspect, stack, card.

One module a command, and what they share:

    floats.py encoding.py manifest.py file.py     the format, from a number to the whole file
    output.py target.py stream.py                 a checkpoint, block by block, to a new folder
    make.py apply.py revert.py verify.py summary.py stack.py card.py

None of it loads torch. docs/patch_format.md states the format.
"""
