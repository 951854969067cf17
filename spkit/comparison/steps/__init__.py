"""What the units of the experiment do, one file a kind; each fills the folder that it is given.

    backbone   train the sandbox backbone of one seed (and size)
    bundle     derive SE, OSM and NPO, and score SE and OSM
    tune       one method's studies on the dev pool, under both scores
    answer     verdicts of many variants on the test pool: one backbone, derivation and mask
    sweep      SafePatching with one or two parameters varied, on the dev pool
    size       the chosen settings on a backbone of another size
    continual  one method, one order of the stages
    cost       seconds and memory of one method, in a process of its own
    tables     all tables, from what the other units wrote

A file each, because a unit is repeated when a file that it imports has changed, and no other.
Nothing is averaged but in the last.
"""
