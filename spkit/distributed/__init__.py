"""Derivation and importance in several processes, started by Hugging Face Accelerate.

    launch.py       start the processes from a notebook, show their progress, tell why they failed
    stages.py       notebooks 01 and 02 in such processes: patches, curves, windows of scores
    work.py         what each process does; the same functions of spkit/method as in one process
    place.py        where each process keeps the backbone: whole, over some GPUs, or a part (FSDP)

`accelerate launch --config_file FILE -m spkit.distributed derive PARAMS FOLDER` does without a
notebook. How the work is shared is in system/processes.py.
"""
