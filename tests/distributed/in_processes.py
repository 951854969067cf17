"""What test_processes.py starts in two processes: each case once, its results in a folder.

in_processes.py FOLDER      FOLDER/params.json: the parameters, source of the backbone included
"""

import json
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from spkit.system.collector import paused

with paused():
    from spkit.comparison.methods.npo import derive_npo
    from spkit.config import Config
    from spkit.distributed.work import Work, derive_patches, score
    from spkit.method.patch import Factors
    from spkit.method.training import Loop
    from spkit.system import processes


class Cut(Exception):
    """Stands for a process that is killed."""


@contextmanager
def slow_to_save():
    """The first process takes a second for each patch: the other must not read before."""
    usual = Factors.save

    def late(self, path):
        time.sleep(1)
        usual(self, path)

    Factors.save = late
    yield
    Factors.save = usual


def main(folder: Path) -> None:
    config = Config.from_sources(json.loads((folder / "params.json").read_text()))
    begun = Work.begin(config, config.backbone.source, folder)

    def case(name, *, sharded=False, importance=None, **derivation):
        changes = {
            "derivation": config.derivation.model_copy(update=derivation),
            "importance": config.importance.model_copy(update=importance or {}),
        }
        changed = config.model_copy(update=changes)
        return replace(begun, config=changed, folder=folder / name, sharded=sharded)

    for name in ("dense", "nf4"):
        own = {"quantization": "nf4", "micro_batch_size": 1} if name == "nf4" else {}
        whole = case(name, **own)
        with slow_to_save():
            derive_patches(whole)
        score(whole)
        derive_patches(case(f"{name}-sharded", sharded=True, gradient_checkpointing=True, **own))
        score(case(f"{name}-one", **own))  # of the patches of one process, which lie there
    score(case("dense-one-windows", importance={"layers_per_pass": 1, "batch_size": 1}))

    model, tokenizer = begun.model()
    npo, curve = derive_npo(model, tokenizer, begun.pairs(), config, config.seed)
    if processes.here().first:
        npo.save(folder / "npo.safetensors")
        curve.to_csv(folder / "npo.csv", index=False)

    resumed = case("resumed", checkpoint_steps=2)
    whole_step = Loop.update

    def update(self):
        if self.step == 3:
            raise Cut
        return whole_step(self)

    Loop.update = update
    try:
        derive_patches(resumed, folder / "checkpoints")
    except Cut:
        Loop.update = whole_step
    processes.here().meet()  # the first one may still be writing its checkpoint
    steps = json.loads((folder / "checkpoints" / "descent" / "state.json").read_text())
    assert steps["state"]["counts"][0] == 2, "it was cut behind its checkpoint"
    derive_patches(resumed, folder / "checkpoints")

    model, _ = case("", sharded=True, quantization="nf4").model()
    parts = [(p.to_local().numel(), p.numel()) for p in model.parameters()]
    facts = {"own": sum(own for own, _ in parts), "all": sum(whole for _, whole in parts)}
    (folder / f"facts-{processes.here().rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
