"""Units of work as a graph, run by Snakemake: on this machine, on SLURM or on Kubernetes.

units      what a unit is; the folder that it fills, whole or not at all
plan       all units of an experiment or a sweep, and the file in which a job finds its own
job        what a job runs: one unit, in a process of its own
engine     Snakemake on a plan: progress, failures, the end
child      a child process that ends together with this one
units.smk  the rules, one for each kind of unit
"""
