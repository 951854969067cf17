"""Every stage beside its peer and its limit: `spkit bench` (docs/speed.md).

timing.py       ways to one result, in turn; ratios round by round
bench.py        what a stage is given: sizes, rounds, where its rows go
sizes.py        models of random weights, from 1 M to 1 B
stages/         a file a stage: what is compared, and how it is checked before
peers.py        other people's packages, installed into a folder of their own
run.py          a process a stage; table, figures and bench.json in the end
compare.py      two of these files: what has become slower
"""
