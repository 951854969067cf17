"""An ordinary Hugging Face tokenizer for the village: a token per word, and a chat template.

Saved with `save_pretrained` and loaded with `AutoTokenizer`, so that every line of code that runs
on the sandbox is the line that runs on LLaMA.
"""

import re

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spkit.sandbox import world

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ ' <user> ' + m['content'] }}"
    "{% else %}{{ ' <assistant> ' + m['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)


def vocabulary() -> list[str]:
    """The special tokens, then every word of the world in alphabetical order."""
    by_split = (*world.SKILLS.values(), world.WRAPPERS)
    templates = " ".join(t for splits in by_split for ts in splits.values() for t in ts)
    words = set(re.sub(r"\{\w+\}", " ", templates).split())
    words |= set(world.REFUSAL.split())
    words |= {w for verb in world.VERBS for w in world.forbidden_answer(verb, "goat").split()}
    for table in (world.SPOT_OF, world.AID_OF, world.PLACE_OF, world.OLD_WORD_OF):
        words |= set(table) | set(table.values())
    words |= set("use the in near under".split())
    return [*SPECIALS, *sorted(words)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer; left padding, because it is mostly used to generate."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        padding_side="left",
        model_max_length=64,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
