"""Chat templates against transformers' own rendering, and templates that do harm."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fuzz.bad_templates import HARMFUL, HARMLESS
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mlx_diffgemma.errors import InputError
from mlx_diffgemma.templates.rendering import BUDGET, MAX_SOURCE, Template, compiled
from mlx_diffgemma.tokenizer import Tokenizer
from support.tiny_tokenizer import CHAT_TEMPLATE, OLDER_CHAT_TEMPLATE, write_tokenizer

CASES = json.loads((Path(__file__).parent / "data" / "template_cases.json").read_text(encoding="utf-8"))
QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]

#: Templates in the manner of published models: what they call, and how they are laid out.
MANNERS = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "alternating roles": "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
    "lines and blocks": "{% if tools %}\n  {% for tool in tools %}\n    {{- tool | tojson(indent=2) }}\n"
    "  {% endfor %}\n{% endif %}\n"
    "{%- for message in messages %}\n    {{ message.role | upper }}: {{ message.content | trim }}\n{%- endfor %}\n",
    "namespaces": "{%- set ns = namespace(last=-1, text='') -%}{%- for m in messages[::-1] -%}"
    "{%- set index = (messages|length - 1) - loop.index0 -%}{%- if ns.last < 0 and m.role == 'user' and m.content is string -%}"
    "{%- set ns.last = index -%}{%- endif -%}{%- set ns.text = ns.text ~ index ~ ',' -%}{%- endfor -%}"
    "{{ ns.last }} {{ ns.text }}",
    "macros": "{% macro line(it, depth=0) -%}{% if it is mapping %}{% for k, v in it.items() %}{{ '  ' * depth ~ k }}="
    "{{ line(v, depth + 1) }};{% endfor %}{% elif it is iterable and it is not string %}{% for x in it %}{{ line(x, depth) }}|"
    "{% endfor %}{% else %}{{ it }}{% endif %}{%- endmacro %}{% for m in messages %}{{ line(m) }}\n{% endfor %}",
    "methods": "{% for m in messages %}{% set c = m.content if m.content is string else '' %}{{ c.split('the')|join('-') }}"
    "{{ c.strip().startswith('W') }}{{ c.rstrip('?').upper()[:5] }}{{ c.replace('a', 'bb').lstrip() }}{{ c.find('is') }}"
    "{% if '</think>' in c %}{{ c.split('</think>')[-1].lstrip('\n') }}{% endif %}{{ m.get('name', 'none') }}"
    "{{ m.keys()|list|sort }}{% endfor %}",
    "filters": "{{ messages|map(attribute='role')|list }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}"
    "{{ messages|rejectattr('role', 'in', ['user'])|map(attribute='role')|unique|join(', ') }}{{ [3, 1, 2]|sort|first }}"
    "{{ {'b': 1, 'a': 'é\u20ac'}|dictsort }}{{ {'b': [1, none, true], 'a': 'é<&'}|tojson }}{{ 'a b'|title|capitalize }}"
    "{{ 3.7|int + '4'|int }}{{ 2.5|round }}{{ -3|abs }}{{ [1, 2]|sum }}{{ [1, 2]|max }}{{ missing|default('x') }}"
    "{{ 'a\nb'|indent(2, true) }}{{ '%s=%d'|format('a', 3) }}{{ '%.2f %5s' % (1.5, 'x') }}{{ '<a>'|e }}{{ [1, 2]|last }}"
    "{{ 'abc'|reverse }}{{ [1, 2]|reverse|list }}{{ 1|string ~ none }}{{ [[1, 'a']]|tojson(separators=(',', ': ')) }}",
    "comparisons": "{% for m in messages %}{{ m.role == messages[0].role }}{{ 0 <= loop.index0 < 3 }}{{ 'is' in m.content }}"
    "{{ m in messages }}{{ m.role not in ['a', m.role] }}{{ loop.index > 1 and loop.previtem != m }}{{ 'role' in m }}"
    "{{ 3 > loop.index >= 1 }}{% endfor %}{{ [1, 2] < [1, 3] }}{{ {'a': 1} == {'a': 1} }}",
    "control": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 3 %}{% break %}"
    "{% endif %}{% generation %}{% set x = 1 %}{{ m.role }}{% endgeneration %}{{ x }}{% else %}none{% endfor %}"
    "{% for n in [1, [2, [3]]] recursive %}{{ loop(n) if n is iterable else n }}{% endfor %}"
    "{% for n in range(9) if n is odd %}{{ n }}{{ loop.length }}{% endfor %}{% set t %}a{{ 1 }}{% endset %}{{ t }}"
    "{% macro m2() %}{{ caller(5) }}{% endmacro %}{% call(x) m2() %}{{ x }}{% endcall %}",
    "thoughts": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}|"
    "{{ m.tool_calls is defined }}|{{ documents is none }}|{{ tools }}|{{ enable_thinking }};{% endfor %}",
    "types": "{{ 1 / 2 }}{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 8 }}{{ 'a' * 3 }}{{ [1] * 2 + [3] }}{{ (1, 2) + (3,) }}{{ none }}"
    "{{ true }}{{ 1.0 }}{{ 10 ** 20 }}{{ -(messages|length) }}{{ dict(a=1, b='x') }}{{ namespace(a=1).a }}"
    "{{ range(3)|list }}{{ [] or 'e' }}",
    "spaces": "  {% if true %}  \n  x  {#- c -#}  {% endif %}\t\n\n{{- 'y' -}}\n{%+ if true %} z{% endif +%} \n",
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def both(reference: PreTrainedTokenizerBase, template: str, messages: list[Any], **options: Any) -> list[str]:
    """What transformers renders, and what we do: the text, or the error."""
    variables = {"add_generation_prompt": False, **options}
    tools = variables.pop("tools", None)
    ways: list[Callable[[], str]] = [
        lambda: reference.apply_chat_template(messages, tools=tools, tokenize=False, chat_template=template, **variables),
        lambda: compiled(template).render(messages, tools, {**reference.special_tokens_map, **variables}),
    ]
    results = []
    for way in ways:
        try:
            results.append(way())
        except Exception as error:  # noqa: BLE001 (any error of a template)
            results.append(f"{type(error).__name__}: {error}")
    return results


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, OLDER_CHAT_TEMPLATE], ids=["released", "older"])
def test_renders_what_transformers_renders(reference: PreTrainedTokenizerBase, template: str) -> None:
    for case in CASES:
        context = {name: value for name, value in case["context"].items() if name not in ("bos_token", "messages")}
        expected, rendered = both(reference, template, case["context"]["messages"], **context)
        assert rendered == expected, case["name"]


@pytest.mark.parametrize("template", [*MANNERS.values(), CHAT_TEMPLATE], ids=[*MANNERS, "released"])
def test_renders_what_transformers_renders_in_every_manner(reference: PreTrainedTokenizerBase, template: str) -> None:
    random, errors = Random(5), 0
    for _ in range(60):
        messages = [message(random) for _ in range(random.randint(1, 6))]
        options: dict[str, Any] = {"add_generation_prompt": random.random() < 0.5}
        options |= {"enable_thinking": True} if random.random() < 0.3 else {}
        options |= {"tools": [TOOL]} if random.random() < 0.3 else {}
        expected, rendered = both(reference, template, messages, **options)
        assert rendered == expected, messages
        errors += "Error: " in expected[:40]
    assert errors < 60


_EMPTY: dict[str, Any] = {"type": "object", "properties": {}}
TOOL = {"type": "function", "function": {"name": "f", "description": "dé <&>", "parameters": _EMPTY}}
PIECES = ["Why ", "is the", " sky", "\n", "?", "</think>", "é", "<|turn>", "  ", "1"]


def message(random: Random) -> dict[str, Any]:
    """A message of any role, with what may be in it."""
    text = "".join(random.choices(PIECES, k=random.randint(0, 8)))
    made: dict[str, Any] = {"role": random.choice(["user", "assistant", "system", "tool"]), "content": text}
    if random.random() < 0.2:
        made["content"] = [{"type": "text", "text": text}]
    if made["role"] == "assistant":
        thought = random.choice(["reasoning", "reasoning_content", "thinking", None])
        made |= {thought: "Hm."} if thought else {"reasoning": None}
        if random.random() < 0.3:
            arguments = {"a": [1, 2.5, None, {"b": "é"}], "c": (1, 2)}
            made |= {
                "content": None,
                "tool_calls": [{"id": "0", "type": "function", "function": {"name": "f", "arguments": arguments}}],
            }
    if made["role"] == "tool":
        made |= {"name": "f", "tool_call_id": "0"}
    return made


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_templates_end_soon(name: str) -> None:
    """With a twentieth of the budget, to save time; tests/fuzz opens checkpoints with them."""
    if name in ("escape", "nothing", "lone surrogate"):  # these end by themselves, and their text is refused
        assert len(Template(HARMFUL[name]).render(QUESTION, None, {})) < 2
        return
    started = time.thread_time()
    with pytest.raises(Exception):  # noqa: B017, PT011 (a template may raise anything)
        Template(HARMFUL[name], BUDGET // 20).render(QUESTION, None, {})
    assert time.thread_time() - started < 10


@pytest.mark.parametrize("name", HARMLESS)
def test_templates_that_only_look_harmful(name: str) -> None:
    assert Template(HARMLESS[name]).render(QUESTION, None, {})


@pytest.mark.parametrize(("turns", "length"), [(1, 2), (2, 20), (2000, 2), (2000, 150), (2, 150_000)])
def test_the_conversation_alone_pays_for_an_ordinary_template(turns: int, length: int) -> None:
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": "x" * length} for i in range(turns)]
    variables = {"bos_token": "<bos>", "add_generation_prompt": True}
    assert len(Template(CHAT_TEMPLATE, budget=0).render(messages, None, variables)) > turns * length


def test_the_source_is_bounded() -> None:
    with pytest.raises(Exception, match=f"more than {MAX_SOURCE}"):
        Template("a" * (MAX_SOURCE + 1))


def test_options_cannot_replace_the_conversation() -> None:
    with pytest.raises(Exception, match="messages cannot be options"):
        Template("x").render(QUESTION, None, {"messages": []})


def test_a_template_that_does_harm_later_is_one_error(tmp_path: Path) -> None:
    loops = "{% if enable_thinking %}" + HARMFUL["nested loops"] + "{% endif %}<|turn>"
    write_tokenizer(tmp_path, chat_template=loops)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.chat(QUESTION)
    with pytest.raises(InputError, match="the chat template refuses this conversation: it takes too many steps"):
        _ = tokenizer.reply_starts
    with pytest.raises(InputError, match="takes too many steps"):
        tokenizer.chat(QUESTION, enable_thinking=True)


def test_text_of_a_template_that_is_no_unicode(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=HARMFUL["lone surrogate"])
    for markup in (False, True):
        with pytest.raises(InputError, match="not valid Unicode"):
            Tokenizer.from_folder(tmp_path).chat(QUESTION, markup=markup)


def test_a_long_reason_is_cut_and_escaped(tmp_path: Path) -> None:
    for name in ("raised megabytes", "raised escape"):
        write_tokenizer(tmp_path, chat_template=HARMFUL[name])
        with pytest.raises(InputError) as refused:
            Tokenizer.from_folder(tmp_path).chat(QUESTION)
        assert len(str(refused.value)) < 400
        assert str(refused.value).isprintable()
