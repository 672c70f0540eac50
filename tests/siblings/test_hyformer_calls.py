"""Wrong calls of Hyformer end in one line that says what is wrong, before anything is computed."""

from collections.abc import Callable

import pytest
import torch

from llm.siblings.hyformer import Hyformer, HyformerConfig, PredictionHead
from llm.siblings.losses import compute_lm_loss, compute_mlm_loss, compute_prediction_loss
from tests.siblings.small import SIZES, VOCAB, hyformer, ids, padded

MODEL = hyformer(num_prediction_tasks=3)
TOKENS = ids()
CLASSES = torch.tensor([0, 2, 1])


def cached() -> list:
    return MODEL(TOKENS, "lm", use_cache=True).extras["kv_caches"]


def stale() -> list:
    caches = cached()
    MODEL(TOKENS[:, :1], "lm", kv_caches=caches, use_cache=True)
    return caches


CALLS: dict[str, tuple[str, Callable[[], object]]] = {
    "unknown task": ("task='clm' is not known; use lm, mlm, prediction", lambda: MODEL(TOKENS, "clm")),
    "a cache with mlm": ("task='mlm' reads rows both ways", lambda: MODEL(TOKENS, "mlm", use_cache=True)),
    "a cache with prediction": (
        "'prediction' reads rows both ways, so it has no cache",
        lambda: MODEL(TOKENS, "prediction", kv_caches=cached()),
    ),
    "caches without use_cache": ("use_cache is False", lambda: MODEL(TOKENS, "lm", kv_caches=cached())),
    "a cache for each of other blocks": (
        "kv_caches has 3 entries; the model has 2 blocks",
        lambda: MODEL(TOKENS, "lm", kv_caches=[None] * 3, use_cache=True),
    ),
    "caches in another order": (
        "in another order",
        lambda: MODEL(TOKENS[:, :1], "lm", kv_caches=cached()[::-1], use_cache=True),
    ),
    "caches of two calls": (
        "of several lists",
        lambda: MODEL(TOKENS[:, :1], "lm", kv_caches=[cached()[0], cached()[1]], use_cache=True),
    ),
    "caches that went on": (
        "were of 7 tokens and are of 8",
        lambda: MODEL(TOKENS[:, :1], "lm", kv_caches=stale(), use_cache=True),
    ),
    "caches of something else": (
        "kv_caches are the list",
        lambda: MODEL(TOKENS, "lm", kv_caches=[torch.zeros(2)] * 2, use_cache=True),
    ),
    "another number of rows": (
        "the cache holds 3 rows, the input has 1",
        lambda: MODEL(TOKENS[:1, :1], "lm", kv_caches=cached(), use_cache=True),
    ),
    "labels with a cache": (
        "a cache leaves no gradients",
        lambda: MODEL(TOKENS, "lm", use_cache=True, labels=TOKENS),
    ),
    "rows beyond max_seq_len": ("longer than max_seq_len=16", lambda: MODEL(ids(1, 17), "lm")),
    "a cached row beyond max_seq_len": (
        "rows of 17 tokens are longer than max_seq_len=16",
        lambda: MODEL(ids(3, 10), "lm", kv_caches=cached(), use_cache=True),
    ),
    "a token beyond the vocabulary": ("vocab_size=50", lambda: MODEL(TOKENS + VOCAB, "mlm")),
    "tokens that are no integers": ("tokens must be non-empty (B, T) int64", lambda: MODEL(TOKENS.float(), "lm")),
    "a row without a batch": ("tokens must be non-empty (B, T) int64", lambda: MODEL(TOKENS[0], "lm")),
    "a mask of another shape": (
        "attention_mask (3, 5) must have the shape of input_ids, (3, 7)",
        lambda: MODEL(TOKENS, "mlm", padded(5, 5, 5, longest=5)),
    ),
    "a mask of other numbers": ("1 for tokens and 0 for padding", lambda: MODEL(TOKENS, "mlm", torch.rand(3, 7))),
    "a row of padding to predict of": (
        "row 2 is padding alone",
        lambda: MODEL(TOKENS, "prediction", padded(7, 0, 3)),
    ),
    "lm labels of another shape": ("labels (3, 6)", lambda: MODEL(TOKENS, "lm", labels=TOKENS[:, 1:])),
    "lm labels of floats": ("labels must be integers, token ids", lambda: MODEL(TOKENS, "lm", labels=TOKENS.float())),
    "an mlm label beyond the vocabulary": (
        "labels are 0 to 49, or negative",
        lambda: MODEL(TOKENS, "mlm", labels=TOKENS + VOCAB),
    ),
    "a class beyond the head": (
        "a label is 3, and the head has 3: labels are 0 to 2",
        lambda: MODEL(TOKENS, "prediction", labels=torch.tensor([0, 3, 1])),
    ),
    "a class between two": (
        "class indices; one is 0.5",
        lambda: MODEL(TOKENS, "prediction", labels=torch.tensor([0, 0.5, 1])),
    ),
    "labels of other rows": (
        "labels are of 2 rows, logits of 3",
        lambda: MODEL(TOKENS, "prediction", labels=CLASSES[:2]),
    ),
    "integers of each output": (
        "need multilabel",
        lambda: MODEL(TOKENS, "prediction", labels=torch.ones(3, 3, dtype=torch.int64)),
    ),
    "labels without a head": (
        "give num_prediction_tasks, or wrap it by PredictionHead",
        lambda: hyformer()(TOKENS, "prediction", labels=CLASSES),
    ),
    "values where there are classes": (
        "prediction=classification has labels (B,); got (3, 3)",
        lambda: hyformer(num_prediction_tasks=3, prediction="classification")(
            TOKENS, "prediction", labels=torch.rand(3, 3)
        ),
    ),
    "classes where there are values": (
        "prediction=regression has labels (B, 3); got (3,)",
        lambda: hyformer(num_prediction_tasks=3, prediction="regression")(TOKENS, "prediction", labels=CLASSES),
    ),
    "a label that is neither there nor not": (
        "0 or 1, negative or NaN = missing; one is 2",
        lambda: compute_prediction_loss(torch.zeros(1, 2), torch.tensor([[1, 2]]), multilabel=True),
    ),
    "labels of multilabel of another shape": (
        "must have the shape of logits (3, 2)",
        lambda: compute_prediction_loss(torch.zeros(3, 2), CLASSES, multilabel=True),
    ),
    "another number of labels": (
        "num_labels=4, but there are logits of 2",
        lambda: compute_prediction_loss(torch.zeros(3, 2), CLASSES, num_labels=4),
    ),
    "logits of tokens for a prediction": (
        "logits of a prediction are (B, n)",
        lambda: compute_prediction_loss(torch.zeros(3, 7, 2), CLASSES),
    ),
    "another vocabulary": (
        "vocab_size=7, but logits are of 50 tokens",
        lambda: compute_mlm_loss(torch.zeros(3, 7, VOCAB), TOKENS, vocab_size=7),
    ),
    "logits of rows for tokens": ("one for each token", lambda: compute_lm_loss(torch.zeros(3, 2), CLASSES)),
    "another width of a head": (
        "d_model=8, but base_model has d_model=16",
        lambda: PredictionHead(MODEL, num_labels=2, d_model=8),
    ),
    "a head without outputs": ("num_labels=0 must be at least 1", lambda: PredictionHead(MODEL, 0, 16)),
    "a head for another task": ("give task='prediction'", lambda: PredictionHead(MODEL, 2, 16)(TOKENS, task="lm")),
    "heads that do not divide the width": (
        "n_heads=3 does not divide d_model=16; use 1, 2, 4, 8 or 16",
        lambda: Hyformer(**SIZES | {"n_heads": 3}),
    ),
    "no vocabulary": ("vocab_size=0 must be at least 1", lambda: HyformerConfig(0)),
    "all dropped": ("attn_dropout=1.0: input should be less than 1", lambda: HyformerConfig(9, attn_dropout=1.0)),
    "no head of so many": ("None = no head", lambda: HyformerConfig(9, num_prediction_tasks=0)),
    "one class": (
        "a classification has 2 classes or more",
        lambda: HyformerConfig(9, num_prediction_tasks=1, prediction="classification"),
    ),
    "a kind without a head": ("give num_prediction_tasks too", lambda: HyformerConfig(9, prediction="regression")),
    "an unknown kind": (
        "prediction='ranking'",
        lambda: HyformerConfig(9, num_prediction_tasks=2, prediction="ranking"),
    ),
    "an unknown key": ("model_args.wings=2", lambda: HyformerConfig(9, model_args={"wings": 2})),
    "a key under our name": ("model_args.dim is d_model here", lambda: HyformerConfig(9, model_args={"dim": 16})),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_is_a_value_error_in_one_line(name: str) -> None:
    expected, call = CALLS[name]
    with pytest.raises(ValueError) as error:
        call()
    assert expected in str(error.value) and "\n" not in str(error.value)
