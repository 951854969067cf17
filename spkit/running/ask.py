"""Questions to a model, one at a time, answered greedily: a checkpoint's, or the sandbox's."""

from pathlib import Path
from typing import Any

from spkit.evaluation.answers import end_tokens
from spkit.evaluation.greedy import continued
from spkit.models.chat import encode_prompt
from spkit.models.loading import load
from spkit.running.notebook import without_loading_bars
from spkit.sandbox.backbone import SHIPPED


class Asked:
    """A loaded model. source: a checkpoint folder, a hub id, or "sandbox": the shipped backbone.

    prompts: system_prompt, chat_template and chat_template_arguments, as loading.load takes them.
    SpkitError where it cannot be loaded.
    """

    def __init__(
        self,
        source: str | Path,
        max_new_tokens: int = 128,
        *,
        quantization: str = "none",
        **prompts: Any,
    ):
        own = str(source) == "sandbox" and not Path(source).is_dir()
        how = {"dtype": "auto", "quantization": quantization, **prompts}
        without_loading_bars()
        self.model, self.tokenizer = load(SHIPPED if own else source, **how)
        self.max_new_tokens = max_new_tokens

    def answer(self, question: str) -> str:
        """The greedy answer; with a remark where the model does not know most of the words."""
        ids = encode_prompt(self.tokenizer, question)
        ends = end_tokens(self.model, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        limit = self.max_new_tokens
        (output,) = continued(self.model, [ids], pad=pad, ends=ends, max_new_tokens=limit)
        return self.tokenizer.decode(output, skip_special_tokens=True).strip() + self._remark(
            question
        )

    def _remark(self, question: str) -> str:
        """The sandbox's model knows 300 words, and takes all others for one unknown word."""
        ids = self.tokenizer(question, add_special_tokens=False)["input_ids"]
        unknown = ids.count(self.tokenizer.unk_token_id) if self.tokenizer.unk_token_id else 0
        return f"\n({unknown} of {len(ids)} words are unknown to this model)" if unknown else ""
