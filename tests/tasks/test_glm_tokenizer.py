"""GLM's tokenizer from GPT-2's files."""

from __future__ import annotations

import pytest
import transformers

from ptv2_engine.errors import ConfigError
from ptv2_engine.tasks.glm_tokenizer import SPECIAL, load_glm_tokenizer
from tests.tasks import glm_vocabulary


def test_special_tokens_have_the_published_ids(tmp_path):
    tokenizer = load_glm_tokenizer(glm_vocabulary.write_published_size(tmp_path))
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == list(range(50257, 50265))
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 50256
    assert (tokenizer.cls_token_id, tokenizer.mask_token_id, tokenizer.sep_token_id) == (50259, 50260, 50261)


def test_text_and_pairs_get_cls_and_eos(tmp_path):
    tokenizer = load_glm_tokenizer(glm_vocabulary.write(tmp_path))
    cls, sep, eos = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id
    a, b = (tokenizer.encode(t, add_special_tokens=False) for t in ("the cat", "the mat"))
    assert tokenizer("the cat")["input_ids"] == [cls, *a, eos]
    assert tokenizer("the cat", "the mat")["input_ids"] == [cls, *a, sep, *b, eos]
    assert "token_type_ids" not in tokenizer("the cat", "the mat")
    padded = tokenizer(["the cat", "the"], padding=True)
    assert padded["attention_mask"][1][-1] == 0 and padded["input_ids"][1][-1] == eos


@pytest.mark.parametrize("mask", ["[MASK]", "[gMASK]", "[sMASK]"])
def test_a_mask_swallows_the_space_on_its_left(tmp_path, mask):
    tokenizer = load_glm_tokenizer(glm_vocabulary.write(tmp_path))
    mask_id = tokenizer.convert_tokens_to_ids(mask)
    cat = tokenizer.encode("cat", add_special_tokens=False)
    assert tokenizer.encode(f"cat {mask}", add_special_tokens=False) == [*cat, mask_id]
    assert tokenizer.decode([*cat, mask_id], skip_special_tokens=True) == "cat"


def test_text_survives_the_round_trip_and_so_does_the_tokenizer(tmp_path):
    tokenizer = load_glm_tokenizer(glm_vocabulary.write(tmp_path / "a"))
    text = "\u00c7e n'est pas: the cat  sat,\n\ton 3 mats \U0001F63A"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    tokenizer.save_pretrained(tmp_path / "b")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert again("the cat [MASK].", "a mat")["input_ids"] == tokenizer("the cat [MASK].", "a mat")["input_ids"]
    assert again.mask_token_id == tokenizer.mask_token_id and again.pad_token_id == tokenizer.pad_token_id
    assert load_glm_tokenizer(tmp_path / "b")("the cat [MASK]")["input_ids"] == tokenizer("the cat [MASK]")["input_ids"]


@pytest.mark.parametrize(("files", "word"), [
    ({}, "no vocab.json and no merges.txt"),
    ({"vocab.json": "{}"}, "no merges.txt"),
    ({"vocab.json": "{nonsense", "merges.txt": ""}, "cannot be read"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "#version\na b c"}, "cannot be read"),
])
def test_a_folder_without_a_vocabulary_is_one_sentence(tmp_path, files, word):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=word):
        load_glm_tokenizer(tmp_path)
