"""Chat templates: broken ones in one sentence when they are loaded, arguments, one's own, records.

The tokenizer knows every byte, as most real ones do, or is the tiny one of 25 words.
"""

import hashlib
import json
import warnings
from datetime import date, datetime

import pytest
import tiny

from spkit.errors import SpkitError
from spkit.models.chat import IGNORE, encode_pair, encode_prompt
from spkit.models.loading import load_tokenizer
from spkit.models.templates import (
    check_template,
    rendered,
    set_template,
    template_record,
    write_template,
)

TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{% endfor %}"
)
ASKS = "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
PLAIN = TURNS + ASKS
# as Qwen 3 does it: an empty thought where thinking is switched off
THINKING = TURNS + (
    "{% if add_generation_prompt %}{{ '<assistant>' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
# as DeepSeek-R1 does it: the generation prompt opens a thought
OPENS = TURNS + "{% if add_generation_prompt %}{{ '<assistant><think>\\n' }}{% endif %}"


def checked(template, arguments=None, system=None):
    tokenizer = tiny.byte_tokenizer(PLAIN)
    tokenizer.system_prompt = system
    set_template(tokenizer, template, arguments)
    check_template(tokenizer)
    return tokenizer


def shown(tokenizer, prompt="How?"):
    return tokenizer.decode(encode_prompt(tokenizer, prompt))


@pytest.mark.parametrize(
    "template, sentence",
    [
        ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", "no valid Jinja, line 2: unexp"),
        ("{% for m in messages %}{{ m.content }}", "is no valid Jinja, line 1: Unexpected end"),
        ("a\n\n{{ messages | shout }}", "is no valid Jinja, line 3: No filter named 'shout'"),
        ("{{ 'a' }}\n{{ nothing.there.at_all }}", "fails, line 2: 'nothing' is undefined"),
        ("{{ bos_token + 1 }}", "fails, line 1: can only concatenate str"),
        ("{{ 1 / 0 }}{{ messages }}", "fails, line 1: division by zero"),
        ("{{ raise_exception('only for tools') }}", "fails, line [0-9]+: only for tools"),
        ("{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}" + PLAIN, "one"),
        ("{{ bos_token }}Hello!", "does not show what the user says"),
        ("{% for m in messages %}{{ m.content[:9] }}{% endfor %}", "does not show what the user"),
        ("{{ messages[0]['content'] }}", "does not show what the assistant says"),
        ("{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
         "does not show what the user says"),
        ("none.jinja", "is 'none.jinja', which is neither a file nor Jinja text"),
    ],
)  # fmt: skip
def test_a_bad_template_is_one_sentence(template, sentence):
    with pytest.raises(SpkitError, match=sentence) as error:
        checked(template)
    assert "\n" not in str(error.value)


def test_a_system_role_that_is_refused_is_no_fault():
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = checked(refusing + PLAIN, system="Be kind.")
    assert shown(tokenizer) == "<s><user>Be kind.\n\nHow?<assistant>"
    assert shown(checked(PLAIN, system="Be kind.")) == "<s><system>Be kind.<user>How?<assistant>"


def test_a_template_that_must_have_a_system_turn():
    refuses = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = refuses + "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    with pytest.raises(SpkitError, match="no system; with a backbone.system_prompt it can be"):
        checked(template)
    assert shown(checked(template, system="Be kind.")).startswith("Be kind.</s>How?")


def test_it_is_told_when_the_tokenizer_is_loaded(checkpoints, tmp_path):
    own = {"chat_template": "{% if %}"}
    with pytest.raises(SpkitError, match="llama' is no valid Jinja, line 1"):
        load_tokenizer(checkpoints["llama"], **own)
    file, broken = tmp_path / "own.jinja", tmp_path / "broken.jinja"
    file.write_text(tiny.TEMPLATE.replace("<user>", "paint"), encoding="utf-8")
    broken.write_bytes(b"{{ \xff }}")
    tokenizer = load_tokenizer(checkpoints["llama"], chat_template=str(file))
    assert shown(tokenizer, "mend a boat") == "<s> paint mend a boat <assistant>"
    with pytest.raises(SpkitError, match=r"broken.jinja cannot be read: it is not UTF-8"):
        load_tokenizer(checkpoints["llama"], chat_template=str(broken))


def test_a_checkpoint_without_a_template_takes_one(tmp_path):
    tiny.model("llama").config.save_pretrained(tmp_path)
    tiny.tokenizer(chat_template=None).save_pretrained(tmp_path)
    with pytest.raises(SpkitError, match="has no chat template; .* backbone.chat_template"):
        load_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, chat_template=tiny.TEMPLATE)
    assert encode_prompt(tokenizer, "mend a boat") == encode_prompt(tiny.tokenizer(), "mend a boat")


# ---- arguments


def test_named_templates_without_a_default_are_named():
    tokenizer = tiny.byte_tokenizer({"tool_use": PLAIN, "rag": PLAIN})
    with pytest.raises(SpkitError, match="named tool_use, rag and no default; give the text of"):
        check_template(tokenizer)
    check_template(tiny.byte_tokenizer({"tool_use": "x", "default": PLAIN}))


def test_arguments_reach_every_rendering():
    on, off = checked(THINKING), checked(THINKING, {"enable_thinking": False})
    assert shown(on) == "<s><user>How?<assistant>"
    assert shown(off) == shown(on) + "<think>\n\n</think>\n\n"
    ids, labels = encode_pair(off, "How?", "So.")
    assert off.decode(ids) == shown(off) + "So.</s>"  # after the thought that is closed
    assert off.decode([i for i in labels if i != IGNORE]) == "So.</s>"
    # a special token in a prompt takes another way
    assert shown(off, "</s>?").endswith("</s>?<assistant><think>\n\n</think>\n\n")


def test_an_argument_without_effect_is_said():
    with pytest.warns(UserWarning, match="reads no 'enable_thinking': this argument has no effect"):
        checked(PLAIN, {"enable_thinking": False})
    inside = "{% generation %}{{ tone }}{% endgeneration %}{% break %}"
    body = "{% for m in messages %}" + inside + "{% endfor %}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked(THINKING, {"enable_thinking": True})
        checked(PLAIN + body, {"tone": "kind"})


@pytest.mark.parametrize(
    "name", ["messages", "add_generation_prompt", "tokenize", "tools", "bos_token", "strftime_now"]
)
def test_reserved_arguments_are_refused(name):
    with pytest.raises(SpkitError, match=f"chat_template_arguments has '{name}', which the kit"):
        checked(PLAIN, {name: "x"})


def test_a_date_that_changes_every_day_is_said():
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    dated += "{% endif %}{{ 'Today: ' + date_string }}" + PLAIN
    with pytest.warns(UserWarning, match="today's date .*{date_string: '26 Jul 2024'}"):
        assert f"{datetime.now():%b %Y}" in shown(checked(dated))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shown(checked(dated, {"date_string": "26 Jul 2024"})).startswith("Today: 26 Jul")


# ---- bos tokens


def test_two_bos_tokens_or_none_are_said():
    with pytest.warns(UserWarning, match="begins a prompt with two <s>; one is usual"):
        checked("{{ bos_token }}" + PLAIN)
    without = tiny.byte_tokenizer(PLAIN.replace("{{ bos_token }}", ""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_template(without)  # it adds none to a plain text either
    from tokenizers.processors import TemplateProcessing

    bos = ("<s>", without.bos_token_id)
    without.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[bos]
    )
    with pytest.warns(UserWarning, match="writes no <s>, with which its tokenizer begins every"):
        check_template(without)
    without.chat_template = PLAIN  # a double bos: of the template and of the tokenizer
    assert encode_prompt(without, "How?").count(without.bos_token_id) == 1
    ids, _ = encode_pair(without, "How?", "So.")
    assert ids.count(without.bos_token_id) == 1


# ---- a thought that the generation prompt opens


def test_a_response_is_no_thought():
    tokenizer = checked(OPENS)
    assert shown(tokenizer) == "<s><user>How?<assistant><think>\n"
    ids, labels = encode_pair(tokenizer, "How?", "So.")
    assert tokenizer.decode(ids) == "<s><user>How?<assistant>So.</s>"
    assert tokenizer.decode([i for i in labels if i != IGNORE]) == "So.</s>"


def test_a_thought_of_a_response_is_the_only_one():
    """Qwen 3 writes an empty thought before an answer that has none."""
    written = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
        "{% set parts = m.content.split('</think>') %}{{ '<think>\\n' }}"
        "{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' }}"
        "{{ '\\n</think>\\n\\n' + parts[-1].strip() + eos_token }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}" + ASKS
    )
    tokenizer = checked(written)
    for response, label in (
        ("So.", "So.</s>"),
        ("<think>a</think>So.", "<think>\na\n</think>\n\nSo.</s>"),
    ):
        ids, labels = encode_pair(tokenizer, "How?", response)
        assert tokenizer.decode([i for i in labels if i != IGNORE]) == label
        assert tokenizer.decode(ids).count("</think>") == 1


# ---- what is recorded and kept


def test_the_record_of_a_template():
    arguments = {"enable_thinking": False, "day": date(2024, 7, 26)}
    tokenizer = checked(THINKING + "{{ day if day is defined }}", arguments, system="Be kind.")
    record = json.loads(json.dumps(template_record(tokenizer)))
    assert record["sha256"] == hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    assert record["arguments"] == {"enable_thinking": False, "day": "2024-07-26"}
    wanted = "<s><system>Be kind.<user>{prompt}<assistant><think>\n\n</think>\n\n2024-07-26"
    assert (record["system_prompt"], record["example"]) == ("Be kind.", wanted)


def test_a_patched_folder_carries_the_template_and_its_arguments(checkpoints, tmp_path):
    turns = [{"role": "user", "content": "mend a boat"}]
    write_template(load_tokenizer(checkpoints["llama"]), tmp_path)
    assert not list(tmp_path.iterdir())
    brought = {"chat_template": "{{ tone + ' ' }}" + tiny.TEMPLATE}
    arguments = {"tone": "it's so", "flag": False, "none": None}
    with pytest.warns(UserWarning, match="reads no '(flag|none)'"):
        own = load_tokenizer(checkpoints["llama"], **brought, chat_template_arguments=arguments)
    tiny.model("llama").config.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    write_template(own, tmp_path)
    carried = load_tokenizer(tmp_path)
    said = rendered(carried, turns, tokenize=False)
    assert said == rendered(own, turns, tokenize=False)
    assert said.startswith("it's so <s><user> mend")


@pytest.mark.parametrize(
    "before", ["\n\n", "  {% if flag %}{% endif %}", "  ", "\n  {# of ours #}"]
)
def test_what_stands_before_a_template_s_first_tag_is_kept(before, tmp_path):
    """transformers drops a line end after a tag, and the blanks before one in a line of its own."""
    own = checked(f"{before}{PLAIN}{{{{ tone }}}}", {"tone": "it's so"})
    write_template(own, tmp_path)
    carried = tiny.byte_tokenizer((tmp_path / "chat_template.jinja").read_text())
    assert shown(carried) == shown(own)
