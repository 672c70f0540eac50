"""The same tasks for lm-eval and for us, over the files of ../shared/data; and models whose folders both read."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.shared import SHARED

DATA = SHARED / "data"


@dataclass(frozen=True)
class Suite:
    """A task in lm-eval's words and in ours; both join a prompt and what follows it by one blank."""

    data: str
    """under ../shared/data; or wiki.jsonl, which `write` makes"""
    theirs: Mapping[str, Any]
    ours: Mapping[str, Any]
    metrics: Mapping[str, str] = field(default_factory=dict)
    """our names of metrics by theirs"""


def _choice(prompt: str, *metrics: str) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": prompt,
        "doc_to_choice": "{{ choices }}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": metric} for metric in metrics],
    }


def _ours_choice(prompt: str, *metrics: str) -> dict[str, Any]:
    return {
        "kind": "multiple_choice",
        "prompt": prompt,
        "choices": "{{ choices }}",
        "gold": "{{ gold }}",
        "metrics": list(metrics),
    }


def _both(data: str, prompt: str, *metrics: str) -> Suite:
    names = {metric: metric for metric in metrics}
    return Suite(data, _choice(prompt, *metrics), _ours_choice(prompt, *metrics), names)


QUESTION = "Question: {{ question }}\nAnswer:"
SUITES = {
    "hellaswag": _both("eval/hellaswag.sample.jsonl", "{{ query }}", "acc", "acc_norm"),
    "arc_easy": _both("eval/arc_easy.jsonl", "{{ query }}\nAnswer:", "acc", "acc_norm"),
    "piqa": _both("eval/piqa.jsonl", "{{ query }}Answer:", "acc", "acc_norm"),
    "winogrande": Suite(
        "eval/winogrande.jsonl",
        _choice("gold", "acc") | {"doc_to_choice": "{{ context_options }}", "doc_to_target": "continuation"},
        {
            "kind": "multiple_choice",
            "prompts": "{{ context_options }}",
            "target": "{{ continuation }}",
            "gold": "{{ gold }}",
            "metrics": ["acc"],
        },
        {"acc": "acc"},
    ),
    "lambada": Suite(
        "eval/lambada_openai.jsonl",
        {
            "output_type": "loglikelihood",  # of which lm-eval joins nothing
            "doc_to_text": "{{ context }}",
            "doc_to_target": " {{ continuation }}",
            "target_delimiter": "",  # which stands between prompt and target of examples alone
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        {
            "kind": "loglikelihood",
            "prompt": "{{ context }}",
            "target": "{{ continuation }}",
        },
        {"acc": "acc"},
    ),
    "wikitext": Suite(
        "wiki.jsonl",
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{ page }}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        {"kind": "perplexity", "prompt": "{{ page }}"},
        {"bits_per_byte": "bits_per_byte"},
    ),
    "gsm8k": Suite(
        "eval/gsm8k_test.jsonl",
        {
            "output_type": "generate_until",
            "doc_to_text": QUESTION,
            "doc_to_target": "{{ answer }}",
            "generation_kwargs": {"until": ["Question:", "\n\n"], "do_sample": False, "max_gen_toks": 24},
            "metric_list": [{"metric": "exact_match"}],
        },
        {
            "kind": "generate",
            "prompt": QUESTION,
            "gold": "{{ answer }}",
            "stop": ["Question:", "\n\n"],
            "max_new_tokens": 24,
            "metrics": ["exact_match"],
        },
        {"exact_match": "exact_match"},
    ),
}


def write(folder: Path) -> None:
    """folder/theirs/*.yaml and folder/ours/*.yaml."""
    lines = (DATA / "text/wikitext-2/valid.txt").read_text().splitlines(keepends=True)
    pages: list[str] = []
    for line in lines:
        title = line.startswith(" = ") and not line.startswith(" = = ")
        pages = [*pages, line] if title or not pages else [*pages[:-1], pages[-1] + line]
    rows = [{"page": page[:3000]} for page in pages if page.strip()]  # several windows of each model's context
    (folder / "wiki.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("theirs", "ours"):
        (folder / name).mkdir()
    for name, suite in SUITES.items():
        data = folder / suite.data if suite.data == "wiki.jsonl" else DATA / suite.data
        theirs = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **suite.theirs,
        }
        (folder / "theirs" / f"{name}.yaml").write_text(yaml.safe_dump(theirs))
        ours = {"name": name, "data": {"path": str(data)}, **suite.ours}
        (folder / "ours" / f"{name}.yaml").write_text(yaml.safe_dump(ours))


def stories(folder: Path) -> Path:
    """stories260K with what makes transformers read its tokenizer as sentencepiece does."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copyfile(DATA / "weights/stories260K-hf" / name, folder / name)
    return _llama_tokenizer(folder, DATA / "weights/stories260K-hf/tokenizer.model")


def random_llama2(folder: Path) -> Path:
    """Random weights, with the tokenizer of Llama 2, which puts BOS."""
    return _llama_tokenizer(_random(folder, 32_000, 1, 2), DATA / "tokenizers/llama2/tokenizer.model")


def random_gpt2(folder: Path) -> Path:
    """Random weights, with the tokenizer of GPT-2, which puts no BOS."""
    _random(folder, 50_257, 50_256, 50_256)
    shutil.copyfile(DATA / "tokenizers/gpt2/tokenizer.json", folder / "tokenizer.json")
    marks = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **marks}))
    return folder


def _llama_tokenizer(folder: Path, model: Path) -> Path:
    shutil.copyfile(model, folder / "tokenizer.model")
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _random(folder: Path, vocab_size: int, bos: int, eos: int) -> Path:
    """A context short enough that some documents are cut, and weights large enough that answers differ clearly."""
    import torch
    import transformers

    torch.manual_seed(vocab_size)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=bos,
        eos_token_id=eos,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


MODELS = {"stories260K": stories, "random_gpt2": random_gpt2, "random_llama2": random_llama2}
