"""Filling in text before a suffix: every form, and what stands between the special tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from decoding.chat import ChatTemplate
from decoding.text import Tokenizer
from server.openai.fim import FORMS, FimForm, Infill
from tests.unit.test_text import folder_like_llama

WORDS = ["a", "b", "c"]


def tokenizer_with(*tokens: str, bos: bool = False) -> Tokenizer:
    """A token for each of a few letters, and these special ones."""
    special = ["<s>", "<unk>", *tokens]
    vocab = {word: number for number, word in enumerate([*special, *WORDS])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(backend, {"bos_token": "<s>"}, ChatTemplate({}, {}))


def spelled(tokenizer: Tokenizer, ids: tuple[int, ...]) -> list[str]:
    return [tokenizer.spelling(token) for token in ids]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("bos", [False, True])
def test_every_form_has_both_texts_in_their_places(name: str, bos: bool) -> None:
    form = FORMS[name]
    tokenizer = tokenizer_with(*form.tokens, *form.ends, bos=bos)
    infill = Infill.of(tokenizer)
    assert infill is not None
    assert infill.form == form
    ids = infill.prompt(tokenizer, "ab", "c", bos=True)
    expected = [letter for part in form.parts for letter in {"prefix": ["a", "b"], "suffix": ["c"]}.get(part, [part])]
    assert spelled(tokenizer, ids) == (["<s>"] if bos else []) + expected
    assert set(spelled(tokenizer, infill.ends)) == {*form.tokens, *form.ends}


def test_forms_of_well_known_models_are_what_their_cards_say() -> None:
    """<PRE>/<SUF>/<MID> of CodeLlama; Codestral's suffix comes first and nothing after the prefix."""
    said = {name: "".join(form.parts) for name, form in FORMS.items()}
    assert said["qwen"] == "<|fim_prefix|>prefix<|fim_suffix|>suffix<|fim_middle|>"
    assert said["codellama"] == "▁<PRE>prefix▁<SUF>suffix▁<MID>"
    assert said["deepseek"] == "<｜fim▁begin｜>prefix<｜fim▁hole｜>suffix<｜fim▁end｜>"
    assert said["codestral"] == "[SUFFIX]suffix[PREFIX]prefix"


def test_one_missing_token_is_another_tokenizer() -> None:
    for form in FORMS.values():
        assert Infill.of(tokenizer_with(*form.tokens[:-1])) is None


def test_a_prompt_of_tokens_goes_in_as_it_is() -> None:
    tokenizer = tokenizer_with(*FORMS["qwen"].tokens)
    infill = Infill.of(tokenizer)
    assert infill is not None
    before, *_, last, middle = infill.prompt(tokenizer, "b", "a", bos=True)
    ids = infill.prompt(tokenizer, [6, 6, 5], "a", bos=True)
    assert (ids[:4], ids[-2:]) == ((before, 6, 6, 5), (last, middle))


def test_the_suffix_gets_no_space_from_a_tokenizer_that_begins_texts_with_one(tmp_path: Path) -> None:
    folder = folder_like_llama(tmp_path)
    tokenizer = Tokenizer.load(folder)
    form = FimForm(("<s>", "prefix", "</s>", "suffix"))
    infill = Infill.of(tokenizer, [form])
    assert infill is not None
    ids = infill.prompt(tokenizer, "he", "he", bos=False)
    assert spelled(tokenizer, ids) == ["<s>", "▁he", "</s>", "h", "e"]
