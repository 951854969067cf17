"""One unit of a study: one backbone with one derivation, answers of every variant, and its skills.

    <folder>/bundle-<digest>/  patches and importances: OSM alone is a jailbreak, it stays here
    <folder>/answers/          what every variant answers, stored as it comes
    <folder>/responses.csv     the same with verdicts
    <folder>/utility.csv       tasks, perplexity and KL of the first token
    <folder>/record.json       what it was made from; written last

The base's unit has no derivation: it is asked once for each backbone.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch import Tensor

from spkit.comparison.methods.bundle import calibrate, load_bundle, make_bundle, save_bundle
from spkit.config import Config
from spkit.data.inputs import input_files, of_pairs
from spkit.data.selection import load_eval_prompts, load_harmful_pairs
from spkit.evaluation.judges import judged
from spkit.evaluation.stored import of_backbone, of_patches
from spkit.evaluation.utility import measure
from spkit.evaluation.utility.first_token import (
    FILE,
    first_tokens,
    load_first_tokens,
    save_first_tokens,
)
from spkit.evaluation.variants import respond_as
from spkit.method.balancing import balanced, first_token_losses
from spkit.method.safepatching import SafePatching
from spkit.method.training import Checkpoints
from spkit.models.counted import on_the_hub
from spkit.models.loading import load
from spkit.study.variants import BASE, patches
from spkit.system import made_from, resume
from spkit.system.determinism import make_deterministic
from spkit.system.files import make_folder, save_csv
from spkit.system.record import is_made_from, write_record

RECORD = "record.json"
SECTIONS = "backbone data align derivation importance patching evaluation judges utility".split()
_OF_PATCHES = ("derivation", "importance", "patching")
_OF_BUNDLE = ("backbone", "data", "align", "derivation", "importance")


@dataclass(frozen=True)
class Unit:
    """config: after the alignment; its seed is the backbone's. derivation: its number, from 0, or
    None for the base. seed: of D_h's draw, the factors, the batches and the calibration.
    """

    config: Config
    derivation: int | None
    seed: int
    folder: Path

    @property
    def identity(self) -> dict:
        """All that decides the results; the aligned backbone is known by its files."""
        dumped = self.config.model_dump(mode="json")
        sections = [s for s in SECTIONS if self.derivation is not None or s not in _OF_PATCHES]
        params = {section: dumped[section] for section in sections}
        return {
            "params": params,
            "seeds": [self.config.seed, self.seed],
            "threads": self.config.threads,
            "files": input_files(self.config, tuple(sections)),
            "code": made_from.code([__name__]),
            **on_the_hub(self.config.backbone.source, self.config.backbone.revision),
        }

    def finished(self) -> bool:
        """Whether it is there, made from the same."""
        return is_made_from(self.folder / RECORD, self.identity)

    def run(self, base: Path) -> None:
        """Make it, unless it is finished. base: the folder of the base's unit."""
        if self.finished():
            return
        began = time.monotonic()
        (make_folder(self.folder) / RECORD).unlink(missing_ok=True)
        make_deterministic(self.config.seed, self.config.threads)
        prompts = load_eval_prompts(self.config.data, self.config.evaluation)
        answers, skills = [], []
        for said, skill in self._asked(prompts, base):
            answers.append(said)
            skills.append(skill)
        responses = judged(pd.concat(answers, ignore_index=True), prompts, self.config)
        save_csv(self.folder / "responses.csv", responses)
        save_csv(self.folder / "utility.csv", pd.concat(skills, ignore_index=True))
        write_record(self.folder / RECORD, self.identity, time.monotonic() - began)

    def _asked(self, prompts, base: Path) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
        """(answers, skills) of each variant."""
        config, source = self.config, self.config.backbone.source
        method = None if self.derivation is None else self.method()
        model, tokenizer = load(source, **config.answering)
        variants: Iterator[tuple[str, Mapping]] = iter([(BASE, {})])
        if method is not None:
            if config.patching.balance is not None:
                pairs = load_harmful_pairs(config.data, seed=self.seed)
                calibration = calibrate(pairs, config, self.seed)
                method = balanced(method, first_token_losses(model, tokenizer, calibration))
            variants = patches(method)
        settings = config.evaluation.model_dump(include={"max_new_tokens", "batch_size"})
        settings |= {"folder": self.folder / "answers", "checkpoint": source}
        settings["context"] = self.context(source, method)
        for name, said in respond_as(model, tokenizer, variants, prompts, **settings):
            before = self._first_tokens_of_base(model, tokenizer, base)
            yield said, measure(model, tokenizer, config, name=name, base_logprobs=before)

    def context(self, source: str, method: SafePatching | None) -> str:
        """What its stored answers depend on. method: with the strengths that are used."""
        if method is None:
            return of_backbone(self.config, source)
        files = sorted(self.bundle_folder().glob("*.safetensors"))
        return of_patches(self.config, source, method, files, ["spkit.study.variants"])

    def _first_tokens_of_base(self, model, tokenizer, base: Path) -> Tensor | None:
        """Taken and kept by the base's unit, read by the others; None where no KL is asked for."""
        if self.config.utility.kl is None:
            return None
        if self.derivation is None:
            found = first_tokens(model, tokenizer, self.config)
            save_first_tokens(self.folder, found, self.config)
        return load_first_tokens(base / FILE, self.config)

    def bundle_folder(self) -> Path:
        """Its name tells what the bundle was made from: not from the setting of the patch."""
        params = {k: v for k, v in self.identity["params"].items() if k in _OF_BUNDLE}
        params["data"] = of_pairs(self.config.data)
        files = input_files(self.config, _OF_BUNDLE)
        parts = [params, self.identity["seeds"], self.config.threads, files]
        parts += [self.identity["hub"]] if "hub" in self.identity else []
        text = json.dumps(parts, sort_keys=True)
        return self.folder / f"bundle-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def method(self) -> SafePatching:
        """SafePatching with the setting of the parameters; the patches are derived if need be."""
        config, place = self.config, self.bundle_folder()
        if not place.is_dir():
            quantization = config.derivation.quantization
            source, loading = config.backbone.source, config.backbone.loading
            model, tokenizer = load(source, quantization=quantization, **loading)
            pairs = load_harmful_pairs(config.data, seed=self.seed)
            # under the bundle's name: another backbone never resumes from them
            kept = Checkpoints(self.folder / "checkpoints" / place.name)
            made = make_bundle(model, tokenizer, pairs, config, seed=self.seed, checkpoints=kept)
            save_bundle(made, place)
            resume.discard(self.folder / "checkpoints")
        found = load_bundle(place, config.patching)
        scores = (found.scores["se"], found.scores["osm"])
        return SafePatching(
            found.patch("se"), found.patch("osm"), scores, config.patching, self.seed
        )
