"""The alignment as a stage: the backbone before it answers, learns to refuse, and is kept.

    <folder>/<name>-aligned/   the aligned backbone, in fp32, an ordinary checkpoint
    <folder>/unaligned.jsonl   {"prompt", "response"}: what the backbone said to D_h's questions
                               before; only answers that the judge calls harmful
    <folder>/checks.csv        harm, false refusal and utility at every check
    <folder>/record.json       what it was made from; written last

Where it is there already, made from the same, nothing is done. An interrupted one resumes.
"""

import copy
import json
import sys
import time
from pathlib import Path

import pandas as pd
from transformers.utils.logging import disable_progress_bar

from spkit.alignment import loop, recipe
from spkit.alignment.loop import Check
from spkit.alignment.made import (
    CHECKS,
    RECORD,
    UNALIGNED,
    data_of,
    finished,
    identity,
    model_folder,
    needed,
    of_weights,
)
from spkit.config import Config
from spkit.data.selection import (
    is_unaligned,
    load_align_prompts,
    load_eval_prompts,
    load_harmful_prompts,
    load_instructions,
)
from spkit.errors import SpkitError
from spkit.evaluation.answers import generate, respond
from spkit.evaluation.judges import judged
from spkit.evaluation.utility import lm_eval_tasks
from spkit.evaluation.verdicts import METRICS
from spkit.examples import EvalPrompt
from spkit.models.gguf import checkpoint_of
from spkit.models.loading import DTYPES, load, resolve_dtype
from spkit.system import resume
from spkit.system.determinism import make_deterministic
from spkit.system.files import atomic, make_folder, save_csv
from spkit.system.lock import locked
from spkit.system.record import write_record

OWN_ANSWER = 64  # tokens of its own answer to a harmless instruction


def run(config: Config, folder: Path) -> Path:
    """Make the stage, unless it is finished; the folder.

    SpkitError for data, a backbone or a judge that cannot be read, and where the alignment does not
    reach its windows.
    """
    folder = Path(folder)
    if not needed(config) or finished(config, folder):
        return folder
    with locked(folder):
        return _made(config, folder)


def _made(config: Config, folder: Path) -> Path:
    began = time.monotonic()
    (make_folder(folder) / RECORD).unlink(missing_ok=True)
    make_deterministic(config.seed, config.threads)
    model, tokenizer = load(checkpoint_of(config.backbone), **config.backbone.loading)
    own = Asked(model, tokenizer, config, folder)
    if is_unaligned(config.data):
        _write_unaligned(own)
    checks = _align(own) if config.align.harmful else []
    save_csv(folder / CHECKS, pd.DataFrame(checks))
    write_record(folder / RECORD, identity(config), time.monotonic() - began)
    return folder


class Asked:
    """The model that is aligned, and how it is asked: in the dtype of the answers, stored."""

    def __init__(self, model, tokenizer, config: Config, folder: Path):
        self.model, self.tokenizer = model, tokenizer
        self.config, self.folder = config, folder
        self.about = identity(config)
        dtype = config.evaluation.dtype or config.backbone.compute_dtype
        self.dtype = DTYPES[resolve_dtype(dtype, model.device.type)]
        dev = config.evaluation.model_copy(update={"split": "dev", "prompts_per_cell": None})
        self.data = data_of(config)
        self.prompts = load_eval_prompts(self.data, dev) if config.align.harmful else []

    def answering(self):
        """The model as it answers: itself, or a copy in another dtype."""
        if self.model.dtype == self.dtype:
            return self.model
        return copy.deepcopy(self.model).to(self.dtype)

    def said(self, prompts: list[EvalPrompt], name: str, max_new_tokens: int) -> pd.DataFrame:
        """Answers with verdicts; they are stored as they come."""
        answers = respond(
            self.answering(),
            self.tokenizer,
            prompts,
            name=name,
            max_new_tokens=max_new_tokens,
            batch_size=self.config.evaluation.batch_size,
            store=self.folder / "answers" / f"{name}.jsonl",
            context=json.dumps(of_weights(self.config), sort_keys=True),
        )
        return judged(answers, prompts, self.config)

    def check(self, step: int) -> Check:
        """Harm and false refusal on dev; the utility where these two are in their windows."""
        said = self.said(self.prompts, f"step {step}", self.config.align.max_new_tokens)
        harmful, refusal = (_percent(said, metric) for metric in ("harmful", "refusal"))
        found = Check(step, harmful, refusal)
        if self.config.utility.tasks and (step == 0 or loop.in_windows(found, self.config.align)):
            found = Check(step, harmful, refusal, self.utility(f"step {step}"))
        return found

    def utility(self, name: str) -> float:
        """The mean accuracy of the tasks, in percent."""
        options = {"name": name, "seed": self.config.seed}
        tasks = lm_eval_tasks(self.answering(), self.tokenizer, self.config.utility, **options)
        return 100 * float(tasks.loc[tasks["metric"].str.startswith("acc,"), "value"].mean())


def _percent(said: pd.DataFrame, metric: str) -> float:
    objective, counted = METRICS[metric]
    verdicts = said.loc[said["objective"] == objective, "verdict"]
    return 100 * float(verdicts.isin(counted).mean())


def _write_unaligned(asked: Asked) -> None:
    """What the backbone says to D_h's questions, without what the judge does not call harmful."""
    data = asked.data
    texts = load_harmful_prompts(data)
    prompts = [
        EvalPrompt(str(i), text, "harmful", data.harmful, "", "plain", "")
        for i, text in enumerate(texts, start=1)
    ]
    said = asked.said(prompts, "unaligned", data.response_tokens)
    kept = said[said["verdict"] == "harmful"]
    print(
        f"D_h: {len(kept)} of {len(said)} answers of the unaligned backbone are harmful, and kept"
    )
    lines = []
    for row in kept.itertuples():
        ends = recipe.ended(asked.tokenizer, row.response, data.response_tokens)
        lines.append(json.dumps({"prompt": row.prompt, "response": row.response, "ends": ends}))
    with atomic(asked.folder / UNALIGNED) as path:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _align(asked: Asked) -> list[Check]:
    config, align = asked.config, asked.config.align
    harmful = load_align_prompts(asked.data, align, config.seed)
    instructions = load_instructions(
        asked.data, align.instructions, align.kept_answers, config.seed
    )
    answers = generate(
        asked.answering(),
        asked.tokenizer,
        instructions,
        max_new_tokens=OWN_ANSWER,
        batch_size=config.evaluation.batch_size,
        label="its own answers",
    )
    encoded = recipe.examples(
        asked.tokenizer,
        harmful,
        instructions,
        answers,
        seed=config.seed,
        longest=OWN_ANSWER,
    )
    checkpoint = asked.folder / "checkpoint"
    checks = loop.train(
        asked.model,
        encoded,
        asked.tokenizer.pad_token_id,
        align,
        config.seed,
        ask=asked.check,
        folder=checkpoint,
        identity=asked.about,
    )
    with atomic(model_folder(config, asked.folder)) as path:
        asked.model.save_pretrained(path)
        asked.tokenizer.save_pretrained(path)
    resume.discard(checkpoint)
    return checks


if __name__ == "__main__":  # in a process of its own: its memory is free again for the notebooks
    disable_progress_bar()  # of transformers, for each loading of weights
    asked_for = json.load(sys.stdin)
    try:
        run(Config.from_sources(asked_for["config"]), Path(asked_for["folder"]))
    except SpkitError as error:
        sys.exit(f"spkit: {error}")
