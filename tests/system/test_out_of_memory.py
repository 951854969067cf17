"""Too little memory becomes one sentence; every other error stays what it is."""

import errno
import gc
import weakref

import numpy as np
import pytest
import torch

from spkit.errors import SpkitError
from spkit.system.out_of_memory import explained

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 14.75 GiB of "
    "which 1.06 GiB is free. Process 1 has 13.68 GiB memory in use. Of the allocated memory 12.00 "
    "GiB is allocated by PyTorch, and 1.50 GiB is reserved by PyTorch but unallocated."
)
OLDER_CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 14.76 GiB total capacity; 13.55 GiB "
    "already allocated; 13.75 MiB free; 13.60 GiB reserved in total by PyTorch)"
)
KEPT = "then run again: what is finished is kept"


def sentence(error, lower=None):
    with pytest.raises(SpkitError) as raised, explained("deriving the SE patch", lower or {}):
        raise error
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_on_the_gpu_it_says_how_much_and_what_to_lower():
    lower = {
        "derivation.micro_batch_size": 8,
        "data.max_tokens": 512,
        "derivation.gradient_checkpointing": False,
    }
    assert sentence(torch.OutOfMemoryError(CUDA), lower) == (
        "the GPU ran out of memory while deriving the SE patch (2.50 GiB asked, 1.06 GiB of 14.75 "
        "GiB free): lower derivation.micro_batch_size (now 8) or data.max_tokens (now 512), or set "
        f"derivation.gradient_checkpointing: true, {KEPT}"
    )


@pytest.mark.parametrize(
    ("error", "beginning"),
    [
        (torch.OutOfMemoryError(OLDER_CUDA), "the GPU {} (20.00 MiB asked, 13.75 MiB free)"),
        (torch.OutOfMemoryError("HIP out of memory."), "the GPU {}"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"), "the GPU {}"),
        (RuntimeError("CUDA driver error: out of memory"), "the GPU {}"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "the GPU {}"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:1] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 3221225472 bytes. Error code 12"
            ),
            "the host (not the GPU) {} (3.00 GiB asked)",
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
            "the host (not the GPU) {} (0.00 GiB asked)",
        ),
        (
            RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GiB)"),
            "the GPU {}",
        ),
        (MemoryError(), "the host (not the GPU) {}"),
        (
            MemoryError("Unable to allocate 8.00 TiB for an array with shape (1,)"),
            "the host (not the GPU) {} (8.00 TiB asked)",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the host (not the GPU) {}"),
        (RuntimeError("unable to mmap 9 bytes from file <x>"), "the host (not the GPU) {}"),
    ],
)
def test_every_kind_of_too_little_memory(error, beginning):
    expected = beginning.format("ran out of memory while deriving the SE patch")
    assert sentence(error).startswith(f"{expected}: ")


def test_of_several_gpus_it_says_which(monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 1 has ...")
    assert sentence(error).startswith("the GPU ran out of memory")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert sentence(error).startswith("the GPU cuda:1 ran out of memory")


@pytest.mark.parametrize(
    ("lower", "advice"),
    [
        ({}, "take a smaller backbone or a machine with more memory"),
        ({"a.batch": 1, "a.flag": True}, "take a smaller backbone or a machine with more memory"),
        ({"a.batch": 2, "a.flag": True}, "lower a.batch (now 2)"),
        ({"a.batch": 1, "a.flag": False}, "set a.flag: true"),
        ({"a.tokens": None}, "set a.tokens (now null)"),
        ({"a.batch": 4, "a.how": "adamw"}, "lower a.batch (now 4), or set a.how (now adamw) to"),
    ],
)
def test_only_what_can_be_lowered_is_named(lower, advice):
    text = sentence(MemoryError(), lower).partition(": ")[2]
    assert text.startswith(advice) and text.endswith(KEPT)
    assert ("a.batch" in text) == (lower.get("a.batch", 1) > 1)


def test_a_real_failure_of_the_host():
    with (
        pytest.raises(SpkitError, match=r"host \(not the GPU\) ran .* \(1,048,576.00 GiB asked\)"),
        explained("scoring", {"importance.batch_size": 8}),
    ):
        torch.empty(2**50, dtype=torch.uint8)
    with pytest.raises(SpkitError, match=r"\(not the GPU\) ran out"), explained("scoring", {}):
        np.empty(2**50, dtype=np.uint8)


@pytest.mark.cuda
def test_a_real_failure_of_the_gpu():
    with pytest.raises(SpkitError, match=r"the GPU ran out .* asked"), explained("scoring", {}):
        torch.empty(2**45, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("can't allocate memory for jokes"),
        OSError(errno.ENOSPC, "No space left on device"),
        SpkitError("the GPU ran out of memory while scoring: lower x"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as raised, explained("deriving", {"a": 2}):
        raise error
    assert raised.value is error


def test_without_an_error_nothing_happens():
    with explained("deriving", {}):
        value = 1
    assert value == 1


def test_the_memory_of_the_failed_work_is_free_afterwards():
    """The traceback holds the frames, and a notebook keeps the traceback."""
    seen = []

    def work():
        tensor = torch.zeros(10)
        seen.append(weakref.ref(tensor))
        raise MemoryError

    with pytest.raises(SpkitError) as raised, explained("deriving", {}):
        work()
    gc.collect()
    assert raised.value.__cause__ is not None and seen[0]() is None
