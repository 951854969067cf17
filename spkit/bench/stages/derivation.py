"""A derivation against TRL's SFTTrainer on the same pairs, and both patches against one.

TRL reads the same ids in the same batches and order, with the same LoRA factors, optimiser, rate,
warm-up and clip, in the same precision; loss on the answer alone, no packing, evaluation, saving or
logging. Its loss is a mean over a batch's tokens, ours over pairs of the mean over tokens. Here
all answers are equally long and both are one number, which is checked before anything is timed.
"""

import os
from dataclasses import dataclass, field

import torch

from spkit.bench import random_checkpoint
from spkit.bench.bench import LIMIT, PEER, Bench
from spkit.bench.peers import TRL
from spkit.bench.sizes import Size, pairs
from spkit.bench.stages.importance import TARGETS
from spkit.config import DerivationConfig
from spkit.errors import SpkitError
from spkit.method import training
from spkit.method.derivation import derive, descent_loss
from spkit.method.training import Loop, Task, TrainingSet, add_lora
from spkit.models.chat import IGNORE

STEPS, BATCH = 2, 8
QUESTION, ANSWER = 40, 12  # words: about those of a chat format and of an answer's first sentence
LORA = {"r": 8, "alpha": 16, "targets": TARGETS}
SETTINGS = {"max_steps": STEPS, "batch_size": BATCH, "warmup_steps": 1, "learning_rate": 1e-4}
UNBOUNDED = {"token_loss_clamp": 60.0, "stop_mean_loss": 50.0}  # random weights never stop at it


def measure(bench: Bench) -> None:
    """Rows for all sizes; the largest also in bfloat16."""
    for size in bench.of("10 M", "50 M", "135 M"):
        _against_trl(bench, size, torch.float32)
        _both(bench, size)
    if bench.sizes is None:
        _against_trl(bench, size, torch.bfloat16)


def _against_trl(bench: Bench, size: Size, dtype: torch.dtype) -> None:
    name = f"TRL SFTTrainer, {str(dtype).removeprefix('torch.')}"
    try:
        trl = bench.peers.module(TRL, "trl")
    except SpkitError as error:
        bench.absent(name, str(error))
        return
    ours = Ours(size.model(bench.device, dtype))
    other = trainer(trl, bench, ours, size.model(bench.device, dtype))
    one, two = ours.first_loss(), _first_loss(other)
    apart = 1e-4 if dtype == torch.float32 else 3e-2
    bench.right(f"the losses of ours and TRL, {one} and {two},", abs(one - two) < apart * abs(two))
    goal = "<= 0.667" if size.name == "135 M" and dtype == torch.float32 else ""
    bench.compare(size, ours.steps, {name: (PEER, other.train, goal)})


def _both(bench: Bench, size: Size) -> None:
    """One model, both directions, as notebook 01 does it."""
    model, data, config = size.model(bench.device), training_set(), settings()

    def one() -> None:
        derive(model, data, "descent", config, 0)

    def both() -> None:
        for direction in ("ascent", "descent"):
            derive(model, data, direction, config, 0)

    goal = "<= 1.9" if size.name == "135 M" else ""
    bench.compare(size, both, {"one patch (ours: both)": (LIMIT, one, goal)})


def settings() -> DerivationConfig:
    """The same steps for both directions."""
    ascent = {**SETTINGS, **UNBOUNDED}
    return DerivationConfig(quantization="none", lora=LORA, ascent=ascent, descent=SETTINGS)


def training_set() -> TrainingSet:
    """Pairs of random words."""
    chosen = pairs(4 * BATCH * STEPS, QUESTION, ANSWER)
    return TrainingSet.of(random_checkpoint.tokenizer(), chosen)


@dataclass
class Ours:
    """Descent, step by step, of a model that is wrapped once."""

    model: torch.nn.Module
    data: TrainingSet = field(default_factory=training_set)

    def __post_init__(self):
        config = settings()
        wrapped = add_lora(self.model, config.lora, 0).train()
        task = Task(
            "osm", "descent", lambda losses, mask, _: descent_loss(losses, mask), config.descent
        )
        self.loop = Loop(wrapped, self.data, task, config)
        order = training._endless(self.data.encoded, BATCH, 0)
        self.batches = [next(order) for _ in range(STEPS)]

    def first_loss(self) -> float:
        """Of the first batch, before any step."""
        return self.loop.backward(self.batches[0])

    def steps(self) -> None:
        """All batches once."""
        for indices in self.batches:
            self.loop.backward(indices)
            self.loop.update()


def trainer(trl, bench: Bench, ours: Ours, model):
    """TRL's trainer for the batches of `ours`."""
    from datasets import Dataset, disable_progress_bars
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

    class InOrder(trl.SFTTrainer):
        """Ours has put the pairs in order already."""

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset or self.train_dataset)

    chosen = [ours.data.encoded[i] for indices in ours.batches for i in indices]
    rows = [
        {"input_ids": ids, "completion_mask": [int(label != IGNORE) for label in labels]}
        for ids, labels in chosen
    ]
    disable_progress_bars()
    made = InOrder(
        add_lora(model, settings().lora, 0),
        _arguments(trl, bench),
        train_dataset=Dataset.from_list(rows),
        processing_class=random_checkpoint.tokenizer(),
    )
    made.remove_callback(PrinterCallback)
    return made


def _arguments(trl, bench: Bench):
    nothing = {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no"}
    nothing |= {"report_to": [], "disable_tqdm": True, "dataloader_num_workers": 0}
    return trl.SFTConfig(
        output_dir=str(bench.folder / "trl"),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=SETTINGS["learning_rate"],
        weight_decay=0.0,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=SETTINGS["warmup_steps"],
        max_grad_norm=1.0,
        optim="adamw_torch",
        seed=0,
        gradient_checkpointing=False,
        bf16=False,
        fp16=False,
        use_cpu=bench.device == "cpu",
        packing=False,
        completion_only_loss=True,
        max_length=None,
        dataloader_pin_memory=False,
        **nothing,
    )


def _first_loss(other) -> float:
    first = other.data_collator([other.train_dataset[i] for i in range(BATCH)])
    other.model.train()
    with torch.no_grad():
        first = {key: value.to(other.model.device) for key, value in first.items()}
        return other.compute_loss(other.model, first).item()
