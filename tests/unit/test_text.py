"""Tokenizer, chat templates and text streams, against transformers where it defines what is right."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors
from transformers import AutoTokenizer

from decoding.errors import ModelError, RequestError
from decoding.stop_strings import StopStrings
from decoding.text import TextDelta, TextStream, Tokenizer

DEMO = Path(__file__).parents[2] / "demo" / "target"
CODE = "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)  # naïve 🦉 “你好”\n"
CHATML = (
    "{% for message in messages %}\n"
    "    {% if message['role'] == 'skip' %}{% continue %}{% endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.load(DEMO)


def folder_like_demo(path: Path, **config: Any) -> Path:
    """The demo's tokenizer with another tokenizer_config.json."""
    shutil.copy(DEMO / "tokenizer.json", path / "tokenizer.json")
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**base, **config}))
    return path


def folder_like_llama(path: Path) -> Path:
    """A byte-fallback tokenizer that puts <s> before a text."""
    words = ["▁", "▁he", "llo", "h", "e", "l", "o", "▁h", "▁w", "r", "d"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [("▁", "h"), ("▁h", "e")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    backend.save(str(path / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "</s>", "special": True}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


# tokenizing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "x", CODE, "a<|im_end|>b", " \t\n", "\ufffd\u200d"])
def test_encodes_and_decodes_as_transformers(demo: Tokenizer, text: str) -> None:
    theirs = AutoTokenizer.from_pretrained(DEMO)
    ids = demo.encode(text)
    assert ids == theirs.encode(text)
    for skip in (True, False):
        assert demo.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_knows_its_special_tokens(demo: Tokenizer) -> None:
    assert (demo.eos_token_id, demo.bos_token_id, demo.vocab_size) == (0, 0, 8192)
    assert demo.special_ids == frozenset(range(8))
    assert demo.vocab()["<|im_end|>"] == 2


@pytest.mark.parametrize("special", [True, False])
def test_bos_is_added_as_the_post_processor_says(tmp_path: Path, special: bool) -> None:
    ours, theirs = Tokenizer.load(folder_like_llama(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode("hello w", add_special_tokens=special)
    assert ids == theirs.encode("hello w", add_special_tokens=special)
    assert (ids[0] == 1) is special
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "hello w"
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)


def test_tokens_that_only_the_configuration_names_become_special(tmp_path: Path) -> None:
    plain = {"special": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {"8192": {"content": "<tool call>", **plain}, "8193": {"content": "<think>", **plain}}
    folder_like_demo(tmp_path, added_tokens_decoder=added, eos_token="<|stop|>", additional_special_tokens=["<|x|>"])
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "a<tool call>b<|stop|>c<think>d<|x|>"
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "a<tool call>bc<think>d"
    assert ours.vocab_size == len(theirs) == 8196
    assert ours.eos_token_id == theirs.eos_token_id


def test_truncation_and_padding_of_tokenizer_json_are_off(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode(CODE) == Tokenizer.load(DEMO).encode(CODE)


@pytest.mark.parametrize("text", ["\ud800", "ok \udc80 ok"])
def test_lone_surrogates_are_refused(demo: Tokenizer, text: str) -> None:
    with pytest.raises(RequestError, match="lone surrogate") as refused:
        demo.encode(text)
    assert refused.value.param == "prompt"
    with pytest.raises(RequestError, match="lone surrogate") as refused:
        demo.apply_chat_template([{"role": "user", "content": text}])
    assert refused.value.param == "messages"


def test_bytes_of_tokens_are_exact(demo: Tokenizer, tmp_path: Path) -> None:
    ids = demo.encode(CODE)
    assert b"".join(map(demo.token_bytes, ids)) == CODE.encode()
    assert demo.token_text(2) == "<|im_end|>"
    assert demo.token_bytes(99_999) == b""
    llama = Tokenizer.load(folder_like_llama(tmp_path))
    ids = llama.encode("hello 你", add_special_tokens=False)
    assert b"".join(map(llama.token_bytes, ids)) == " hello 你".encode()
    assert [llama.token_text(i) for i in ids[-3:]] == ["\ufffd"] * 3


def test_a_first_space_is_stripped_also_where_it_is_a_byte(tmp_path: Path) -> None:
    llama, theirs = Tokenizer.load(folder_like_llama(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    for ids in ([3 + 0x20, 3 + 0x61], [3 + 0x20, 3 + 0x20], [3 + 0x61, 3 + 0x20], [259, 259]):
        assert llama.decode(ids) == theirs.decode(ids)
    assert llama.decode([3 + 0x20, 3 + 0x61]) == "a"


def test_valid_characters_survive_beside_invalid_bytes(tmp_path: Path) -> None:
    llama = Tokenizer.load(folder_like_llama(tmp_path))
    ids = [3 + byte for byte in "你".encode() + b"\xe4\xbd" + "é".encode()]
    assert llama.decode(ids) == "你\ufffdé"


# folders ---------------------------------------------------------------------------------------------------------


def test_older_formats_are_converted(tmp_path: Path) -> None:
    model = json.loads((DEMO / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode(CODE) == theirs.encode(CODE)
    assert ours.decode(ours.encode(CODE)) == CODE
    assert ours.eos_token_id == theirs.eos_token_id == 0


@pytest.mark.parametrize("files", [{}, {"tokenizer.model": "not a model"}, {"config.json": '{"model_type": "llama"}'}])
def test_a_folder_without_a_tokenizer_is_a_clear_error(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(
        ModelError, match=r"has no tokenizer.json, and its tokenizer cannot be converted(.|\n)*--tokenizer"
    ):
        Tokenizer.load(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        Tokenizer.load(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(tmp_path)


def test_a_decoder_that_looks_across_tokens_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    backend.decoder = decoders.CTC()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="cannot be decoded token by token"):
        Tokenizer.load(tmp_path)


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys; from decoding.text import Tokenizer; t = Tokenizer.load(sys.argv[1]); "
        "t.apply_chat_template([{'role': 'user', 'content': 'x'}]); "
        "sys.exit(' '.join(m for m in ('torch', 'transformers', 'numpy') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(DEMO)], capture_output=True, text=True, cwd=DEMO.parents[1])
    assert done.returncode == 0, done.stderr


# chat templates --------------------------------------------------------------------------------------------------

MESSAGES = [
    {"role": "system", "content": "Be brief.", "name": None},
    {"role": "skip", "content": "not shown"},
    {"role": "user", "content": "  <b>1 & 2</b>? “你好” "},
]
TEMPLATES = {
    "chatml": CHATML,
    "tojson": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "special tokens": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token is defined }}",
    "tools": "{% if tools is not none %}{{ tools | tojson }}{% else %}no tools{% endif %}{{ documents is none }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "break": "{% for m in messages %}{{ m.role }}{% if m.role == 'skip' %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "name": "{% for m in messages %}{{ 'name' in m }}{% endfor %}",
    "date": "{{ strftime_now('%Y') }}",
    "dict": "{{ dict(a=1) | tojson }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("variables", [{}, {"tools": [{"type": "function", "function": {"name": "f<>"}}]}])
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers(tmp_path: Path, template: str, variables: dict[str, Any], prompt: bool) -> None:
    folder_like_demo(tmp_path, chat_template=template)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt, **variables)
    assert ours.render_chat(MESSAGES, add_generation_prompt=prompt, **variables) == expected
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, return_dict=False, **variables)
    assert ours.apply_chat_template(MESSAGES, add_generation_prompt=prompt, **variables) == ids


def test_the_demo_has_a_chat_template(demo: Tokenizer) -> None:
    assert demo.has_chat_template
    messages = [{"role": "system", "content": "one"}, {"role": "user", "content": [{"type": "text", "text": "x = "}]}]
    assert demo.decode(demo.apply_chat_template(messages)) == "# one\nx = "


def test_bos_is_not_added_to_a_rendered_chat(tmp_path: Path) -> None:
    folder_like_llama(tmp_path)
    ours = Tokenizer.load(tmp_path, chat_template="{{ bos_token }}{{ messages[0].content }}")
    assert ours.apply_chat_template([{"content": "hello"}]).count(1) == 1


def test_where_templates_come_from(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "with tools"}]

    def rendered(chosen: str | None = None, **variables: Any) -> str:
        return Tokenizer.load(tmp_path, chat_template=chosen).render_chat([{"role": "user"}], **variables)

    folder_like_demo(tmp_path, chat_template=named)
    assert (rendered(), rendered(tools=[{}]), rendered("tool_use")) == ("config", "with tools", "with tools")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert rendered() == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert rendered() == "jinja"
    (tmp_path / "own.jinja").write_text("own")
    assert rendered(str(tmp_path / "own.jinja")) == "own"
    assert rendered("{{ messages[0].role }}", tools=[{}]) == "user"
    with pytest.raises(ModelError, match="neither a file"):
        rendered("missing.jinja")
    with pytest.raises(ModelError, match="does not compile"):
        rendered("{% if %}")


def test_templates_that_refuse_or_fail_are_the_requests_error(tmp_path: Path) -> None:
    folder_like_demo(tmp_path)
    assert not Tokenizer.load(tmp_path).has_chat_template
    for template, message in (
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "cannot render"),
        ("{{ messages.append(1) }}", "cannot render"),
    ):
        with pytest.raises(RequestError, match=message) as refused:
            Tokenizer.load(tmp_path, chat_template=template).render_chat([{"role": "user", "content": "x"}])
        assert refused.value.param == "messages"


# streams ---------------------------------------------------------------------------------------------------------


def test_a_stop_string_ends_the_text_and_the_count(demo: Tokenizer) -> None:
    ids = demo.encode("x = 1\ny = 2\nz = 3\n")
    stream = TextStream(demo, stop=("\ny", "z"))
    first, second = stream.push(ids[:3]), stream.push(ids[3:])
    assert first.text + second.text == "x = 1"
    assert (second.stopped, second.stop) == (True, "\ny")
    assert demo.decode(ids[: second.token_count]).startswith("x = 1\ny")
    assert "y" not in demo.decode(ids[: second.token_count - 1])
    assert stream.push(ids) == stream.finish() == TextDelta("", second.token_count, True, "\ny")


def test_the_longest_of_stop_strings_that_end_together_wins(demo: Tokenizer) -> None:
    stream = TextStream(demo, stop=("c", "bc", "xbc"))
    assert stream.push(demo.encode("abc")) == TextDelta("a", stream.push([]).token_count, True, "bc")


def test_a_stop_string_is_found_behind_any_beginning_of_itself() -> None:
    for letters in itertools.chain.from_iterable(itertools.product("ab", repeat=n) for n in range(1, 9)):
        stop = "".join(letters)
        for end in range(len(stop)):
            text = stop[:end] + stop
            assert StopStrings((stop,), include_stop=True).push(text) == (text[: text.index(stop) + len(stop)], stop)


def test_a_stop_string_that_is_completed_too_early_is_text(demo: Tokenizer) -> None:
    single = [demo.vocab()[char] for char in "abab"]
    texts = [TextStream(demo, stop=("ab",), min_tokens=least).push(single) for least in range(5)]
    assert [(each.text, each.token_count, each.stopped) for each in texts] == [
        ("", 2, True),
        ("", 2, True),
        ("ab", 4, True),
        ("ab", 4, True),
        ("abab", 4, False),
    ]
    overlapping = TextStream(demo, stop=("aba",), min_tokens=3).push([*single, single[0]])
    assert (overlapping.text, overlapping.stop) == ("ab", "aba")  # its beginning lies in the end of an early one


def test_held_text_comes_out_at_the_end_or_when_it_cannot_match(demo: Tokenizer) -> None:
    stream = TextStream(demo, stop=("STOP",))
    single = {char: demo.vocab()[char] for char in "STOPx"}
    texts = [stream.push([single[char]]).text for char in "STSTOxST"]
    assert texts == ["", "", "ST", "", "", "STOx", "", ""]
    assert stream.finish().text == "ST"
    assert stream.finish().text == ""


def test_an_incomplete_character_waits_for_its_bytes(demo: Tokenizer) -> None:
    owl = demo.encode("🦉")
    assert len(owl) > 1
    stream = TextStream(demo)
    assert [stream.push([token]).text for token in owl] == [""] * (len(owl) - 1) + ["🦉"]
    stream = TextStream(demo)
    assert (stream.push(owl[:-1]).text, stream.finish().text) == ("", "\ufffd")


def test_an_output_that_continues_a_prompt_keeps_its_first_space(tmp_path: Path) -> None:
    llama = Tokenizer.load(folder_like_llama(tmp_path))
    prompt, output = llama.encode("hello"), [llama.vocab()["▁w"]]
    assert TextStream(llama, prompt).push(output).text == " w"
    assert TextStream(llama).push(output).text == "w"


def test_an_empty_stop_string_is_refused(demo: Tokenizer) -> None:
    with pytest.raises(RequestError, match="at least one character") as refused:
        TextStream(demo, stop=("",))
    assert refused.value.param == "stop"


def test_a_token_is_looked_at_once(demo: Tokenizer) -> None:
    """The cost of a token does not depend on how many came before it."""

    class Counting(Tokenizer):
        pieces = 0

        def piece(self, *args: Any) -> bytes | None:
            self.pieces += 1
            return super().piece(*args)

    counting = Counting.load(DEMO)
    assert isinstance(counting, Counting)
    stream = TextStream(counting, prompt_ids=demo.encode(CODE) * 50, stop=("never",))
    before = counting.pieces
    assert before <= 4
    for token in demo.encode(CODE) * 20:
        stream.push([token])
    assert counting.pieces - before == len(demo.encode(CODE)) * 20
