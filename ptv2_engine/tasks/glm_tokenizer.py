"""GLM's tokenizer: GPT-2's byte-level BPE with GLM's special tokens behind it, from a local vocabulary folder.

The published English checkpoints bring a tokenizer that is Python code; this builds the same one from GPT-2's two files (or a
tokenizer.json), so nothing of a repository is run. Text becomes `[CLS] text <|endoftext|>`, a pair
`[CLS] a [SEP] b <|endoftext|>`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ptv2_engine.errors import ConfigError

EOS = "<|endoftext|>"                                   # also pads, as published
SOP, EOP, CLS, MASK, SEP, UNK, GMASK, SMASK = SPECIAL = (
    "<|startofpiece|>", "<|endofpiece|>", "[CLS]", "[MASK]", "[SEP]", "[UNK]", "[gMASK]", "[sMASK]")
_FILES = ("vocab.json", "merges.txt")


def load_glm_tokenizer(folder: str | Path) -> Any:
    """A transformers fast tokenizer. With GPT-2's 50257 entries the special tokens get their published ids, 50257 to 50264.

    folder: holds vocab.json and merges.txt, or a tokenizer.json. Raises ConfigError.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = _bpe(Path(folder))
    if tokenizer.token_to_id(EOS) is None:
        tokenizer.add_special_tokens([EOS])
    tokenizer.add_special_tokens([AddedToken(t, lstrip="MASK" in t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {EOS}", pair=f"{CLS} $A {SEP} $B {EOS}",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in (CLS, SEP, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SOP, eos_token=EOS, pad_token=EOS, unk_token=UNK, cls_token=CLS, sep_token=SEP,
        mask_token=AddedToken(MASK, lstrip=True, normalized=False, special=True), padding_side="right",
        additional_special_tokens=[SOP, EOP, GMASK, SMASK], model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False)


def _bpe(folder: Path) -> Any:
    """The tokenizers.Tokenizer of a folder, without GLM's additions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if missing:
            raise ConfigError(f"{folder} holds no {' and no '.join(missing)} (nor a tokenizer.json); put GPT-2's vocab.json and "
                              "merges.txt there, or pass the folder that has them as --tokenizer_name.")
        vocabulary = json.loads((folder / _FILES[0]).read_text(encoding="utf-8"))
        lines = (folder / _FILES[1]).read_text(encoding="utf-8").splitlines()
        merges = [(a, b) for a, b in (line.split(" ") for line in lines if line and not line.startswith("#version"))]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    except ConfigError:
        raise
    except Exception as error:      # tokenizers raises bare Exceptions
        raise ConfigError(f"the vocabulary in {folder} cannot be read ({str(error).splitlines()[0][:120]}); pass GPT-2's "
                          "vocab.json and merges.txt.") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
