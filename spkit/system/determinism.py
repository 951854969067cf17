"""One seed, same machine, same bits."""

import os
import random


def make_deterministic(seed: int, threads: int | None) -> None:
    """Seed Python, numpy and torch; ask for deterministic kernels; fix the number of threads."""
    # read by cuBLAS when it starts; without it deterministic kernels are refused on a GPU
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if threads is not None:
        torch.set_num_threads(threads)
