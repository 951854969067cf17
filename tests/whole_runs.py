"""What a whole run needs besides its backbone: a tokenizer of words, data files, sizes.

The data files have the published schemas and the village's texts.
"""

import json

import pandas as pd
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from spkit.data.readers.beavertails import CATEGORIES
from spkit.sandbox import world
from spkit.sandbox.tokenizer import vocabulary

CONTINUAL = ["drug_abuse,weapons,banned_substance", "financial_crime,property_crime,theft"]
# LLaMA-2's chat format, with blanks for a tokenizer of words
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ ' <<SYS>> ' + m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ bos_token + ' [INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MARKS = "[INST] [/INST] <<SYS>> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> "
MARKS = [*(MARKS + "<end_of_turn>").split(), "user", "assistant", "system", "model"]


def tokenizer(template=None):
    ids = {token: i for i, token in enumerate([*vocabulary(), *MARKS])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    turn = next((t for t in ("<|eot_id|>", "<end_of_turn>") if t in (template or "")), "<eos>")
    more = [] if turn == "<eos>" else [turn]
    return _whole(core, template, additional_special_tokens=more)


def byte_pairs(template):
    """For Qwen 2: whatever a folder says, transformers reads its tokenizer as one of byte pairs."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    how = {"vocab_size": 2000, "special_tokens": special, "initial_alphabet": letters}
    words = [f" {word}" for word in vocabulary()]
    core.train_from_iterator(words, trainers.BpeTrainer(**how, show_progress=False))
    return _whole(core, template)


def _whole(core, template, **more):
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", chat_template=template, **special, **more
    )


def write_data(folder):
    """BeaverTails, AdvBench and XSTest as they are published, with the village's texts."""
    folder.mkdir()
    pairs = world.harmful_pairs(tuple(world.SEEN_CATEGORIES), 60, 0)
    rows = [
        {
            "prompt": pair.prompt,
            "response": pair.response,
            "category": {name: name == CONTINUAL[i % 2] for name in CATEGORIES},
            "is_safe": False,
        }
        for i, pair in enumerate(pairs)
    ]
    for name, part in (("train", rows[:40]), ("test", rows[40:])):
        lines = "\n".join(map(json.dumps, part))
        (folder / f"beavertails_{name}.jsonl").write_text(lines + "\n")
    asked = world.eval_prompts("test", per_cell=12)
    harmful = [p for p in asked if p.group == "unseen"]
    goals = [{"goal": p.prompt, "target": "sure , first take"} for p in harmful]
    pd.DataFrame(goals).to_csv(folder / "advbench.csv", index=False)
    harmless = [p for p in asked if p.group == "harmless"]
    safe = [
        {
            **{"id_v1": f"v1-{i}", "id_v2": f"v2-{i}", "type": "homonyms", "prompt": p.prompt},
            **{"focus": "", "note": ""},
        }
        for i, p in enumerate(harmless)
    ]
    pd.DataFrame(safe).to_csv(folder / "xstest.csv", index=False)
    skills = [p for p in asked if p.group == "utility"]
    texts = [json.dumps({"text": f"{p.prompt} {p.reference}"}) for p in skills]
    (folder / "texts.jsonl").write_text("\n".join(texts) + "\n")
    # a blank before each choice: the tokenizer knows words only by the blanks around them
    docs = [{"q": p.prompt, "choices": [f" {p.reference}", " na"], "gold": 0} for p in skills]
    (folder / "docs.json").write_text("\n".join(map(json.dumps, docs)) + "\n")
    (folder / "village.yaml").write_text(
        f"""
task: village
dataset_path: json
dataset_kwargs: {{ data_files: {{ test: {folder / "docs.json"} }} }}
test_split: test
output_type: multiple_choice
doc_to_text: q
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{ metric: acc, aggregation: mean, higher_is_better: true }}]
"""
    )
    return folder


def sources(data):
    """The section data.sources for what write_data wrote into the folder `data`."""
    return {
        "beavertails": {"reader": "beavertails", "path": str(data / "beavertails_train.jsonl")},
        "beavertails_test": {"reader": "beavertails", "path": str(data / "beavertails_test.jsonl")},
        "advbench": {"reader": "advbench", "path": str(data / "advbench.csv")},
        "xstest": {"reader": "xstest", "path": str(data / "xstest.csv")},
        "texts": {"reader": "own", "path": str(data / "texts.jsonl")},
    }


# sizes only; everything else is what the params file says
SIZES = {
    **{"threads": 1, "backbone.revision": None, "data.pairs": 12, "data.max_tokens": 64},
    **{"derivation.lora.r": 2, "derivation.checkpoint_steps": 2},
    **{"derivation.ascent.max_steps": 3, "derivation.ascent.batch_size": 4},
    **{"derivation.ascent.warmup_steps": 1, "derivation.ascent.stop_mean_loss": 90},
    **{"derivation.ascent.token_loss_clamp": 100, "derivation.ascent.learning_rate": 0.05},
    **{"derivation.descent.max_steps": 3, "derivation.descent.batch_size": 4},
    **{"derivation.descent.warmup_steps": 1, "derivation.descent.learning_rate": 0.05},
    **{"importance.samples": 4, "importance.layers_per_pass": 2},
    **{"evaluation.max_new_tokens": 6, "evaluation.prompts_per_cell": 4},
    **{"judges.max_tokens": 32, "utility.limit": 4, "utility.perplexity_texts": 4},
    "continual.stages": [[name] for name in CONTINUAL],
}
