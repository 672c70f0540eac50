"""Hyformer's calls give what plain torch and transformers give with the same weights.

Tolerance 1e-5 where two implementations compute the same in float32, in another order; equal bits where one does.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llm.siblings.hyformer import Hyformer, ModelInput, PredictionHead
from llm.siblings.losses import compute_lm_loss, compute_mlm_loss, compute_prediction_loss
from tests.siblings.small import SIZES, VOCAB, config, hyformer, ids, padded

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def tied_llama(model: Hyformer) -> LlamaForCausalLM:
    """The Llama with a tied head that has the same weights, under its own names."""
    args = model.llm.args
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.ffn_width(),
        num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.n_heads,
        rms_norm_eps=args.norm_eps, max_position_embeddings=args.max_seq_len, rope_theta=1e4, tie_word_embeddings=True,
    ))  # fmt: skip
    names = {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "tok_embeddings": "embed_tokens",
    }  # fmt: skip
    state = {}
    for name, tensor in model.llm.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[f"model.{name}"] = tensor
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    llama.load_state_dict(state)
    return llama.eval()


def test_lm_is_a_llama_with_a_tied_head_in_logits_and_loss() -> None:
    model, tokens = hyformer(), ids()
    theirs = tied_llama(model)(tokens, labels=tokens)
    ours = model(tokens, task="lm", labels=tokens)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    torch.testing.assert_close(ours.loss, theirs.loss, **CLOSE)


def test_lm_of_padded_rows_is_that_llama_too() -> None:
    model, tokens, mask = hyformer(), ids(), padded(7, 4, 5)
    labels = tokens.masked_fill(mask == 0, -100)
    theirs = tied_llama(model)(tokens, attention_mask=mask, labels=labels)
    ours = model(tokens, "lm", mask, labels=tokens)
    torch.testing.assert_close(ours.logits[mask == 1], theirs.logits[mask == 1], **CLOSE)
    torch.testing.assert_close(ours.loss, theirs.loss, **CLOSE)


def test_padding_before_a_row_gives_the_rows_own_logits_and_loss() -> None:
    model, tokens = hyformer(), ids(1, 5)
    before = torch.cat([torch.zeros(1, 2, dtype=torch.int64), tokens], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    ours, plain = model(before, "lm", mask, labels=before), model(tokens, "lm", labels=tokens)
    torch.testing.assert_close(ours.logits[:, 2:], plain.logits, **CLOSE)
    torch.testing.assert_close(ours.loss, plain.loss, **CLOSE)


def test_mlm_loss_is_torchs_cross_entropy_at_the_masked_positions_unshifted() -> None:
    model, tokens = hyformer(), ids()
    labels = torch.full_like(tokens, -1)
    labels[:, 2::3] = tokens[:, 2::3]
    out = model(tokens, task="mlm", labels=labels)
    expected = F.cross_entropy(out.logits[labels >= 0], labels[labels >= 0])
    torch.testing.assert_close(out.loss, expected, **CLOSE)


def test_tasks_change_what_a_token_sees_on_the_same_weights() -> None:
    model, tokens = hyformer(), ids()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    for task, sees in (("lm", False), ("mlm", True)):
        first, second = (model(given, task).logits[:, :-1] for given in (tokens, changed))
        assert torch.equal(first, second) is not sees, task


@pytest.mark.parametrize("task", ["lm", "mlm", "prediction"])
def test_padding_is_seen_by_no_token_and_no_prediction(task: str) -> None:
    model, tokens, mask = hyformer(num_prediction_tasks=3), ids(), padded(7, 4, 5)
    other = torch.where(mask == 1, tokens, (tokens + 7) % VOCAB)
    first, second = (model(given, task, mask).logits for given in (tokens, other))
    shown = mask == 1 if task != "prediction" else torch.ones(3, dtype=torch.bool)
    assert torch.equal(first[shown], second[shown])


@pytest.mark.parametrize("task", ["lm", "mlm"])
def test_labels_at_padding_do_not_count(task: str) -> None:
    model, tokens, mask = hyformer(), ids(), padded(7, 4, 5)
    other = torch.where(mask == 1, tokens, (tokens + 7) % VOCAB)
    first, second = (model(tokens, task, mask, labels=labels).loss for labels in (tokens, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_a_row_is_predicted_as_it_is_without_its_padding(pool: str) -> None:
    model, tokens = hyformer(num_prediction_tasks=3, pool=pool), ids()
    together = model(tokens, "prediction", padded(7, 4, 5)).logits
    for row, length in enumerate((7, 4, 5)):
        alone = model(tokens[row : row + 1, :length], "prediction").logits
        torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)


def test_a_cached_continuation_gives_the_logits_of_the_whole_row() -> None:
    model, tokens = hyformer(), ids()
    caches, parts = [None] * len(model.blocks), []
    for part in tokens.split([3, 1, 2, 1], dim=1):
        out = model(part, task="lm", kv_caches=caches, use_cache=True)
        caches = out.extras["kv_caches"]
        parts.append(out.logits)
    assert len(caches) == len(model.blocks) and caches[0].length == 7
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens, task="lm").logits, **CLOSE)


@pytest.mark.parametrize("whole_mask", [False, True])
def test_a_cache_of_padded_rows_continues_each_at_its_own_position(whole_mask: bool) -> None:
    """The mask of a continuation is of the new tokens, or of all, those of the cache among them."""
    model, tokens, mask = hyformer(), ids(), padded(3, 2, 1, longest=3)
    out = model(tokens[:, :3], "lm", mask, use_cache=True)
    new = torch.ones(3, 1)
    given = torch.cat([mask, new], dim=1) if whole_mask else new
    out = model(tokens[:, 3:4], "lm", given, kv_caches=out.extras["kv_caches"], use_cache=True)
    for row, length in enumerate((3, 2, 1)):
        alone = torch.cat([tokens[row, :length], tokens[row, 3:4]])[None]
        torch.testing.assert_close(out.logits[row, 0], model(alone, "lm").logits[0, -1], **CLOSE)


def test_hidden_states_are_those_that_the_tied_head_reads() -> None:
    model, tokens = hyformer(), ids()
    for task in ("lm", "mlm"):
        out = model(tokens, task)
        expected = out.extras["hidden_states"] @ model.llm.tok_embeddings.weight.T
        torch.testing.assert_close(out.logits, expected, **CLOSE)


def test_a_base_model_without_head_gives_hidden_states_and_an_external_head_reads_them() -> None:
    base, tokens, mask = hyformer(), ids(), padded(7, 4, 5)
    out = base(tokens, "prediction", mask)
    assert out.logits is None and out.loss is None
    torch.manual_seed(2)
    head = PredictionHead(base, num_labels=2, d_model=16, dropout=0.5).eval()
    logits, loss = head(tokens, task="prediction", attention_mask=mask, labels=torch.tensor([0, 1, 1]))
    hidden = out.extras["hidden_states"]
    means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(logits, F.linear(means, head.head.weight, head.head.bias), **CLOSE)
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([0, 1, 1])), **CLOSE)


def test_an_external_head_drops_in_training_alone() -> None:
    head, tokens = PredictionHead(hyformer(), num_labels=4, d_model=16, dropout=0.5), ids()
    assert not torch.equal(head.train()(tokens)[0], head(tokens)[0])
    assert torch.equal(head.eval()(tokens)[0], head(tokens)[0])


@pytest.mark.parametrize("share", ["attn_dropout", "resid_dropout"])
def test_dropout_of_a_call_is_drawn_from_torchs_generator_and_off_in_evaluation(share: str) -> None:
    model, tokens = hyformer(**{share: 0.5}), ids()
    plain = hyformer()(tokens, "mlm").logits
    assert torch.equal(model(tokens, "mlm").logits, plain)
    model.train()
    torch.manual_seed(3)
    first, second = model(tokens, "mlm").logits, model(tokens, "mlm").logits
    torch.manual_seed(3)
    again = model(tokens, "mlm").logits
    assert torch.equal(first, again) and not torch.equal(first, second) and not torch.equal(first, plain)


def test_initial_values_follow_torchs_generator() -> None:
    first, same, other = hyformer(), hyformer(), hyformer(seed=1)
    pairs = [(a, b, c) for a, b, c in zip(first.parameters(), same.parameters(), other.parameters(), strict=True)]
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_initial_values_are_normal_with_std_002_and_biases_zero() -> None:
    model = Hyformer(2000, 64, 4, 2, 16, num_prediction_tasks=100)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.ndim == 2:
            # the std of n draws is off by 0.02 / sqrt(2 n), of 4096 and more by 1.1 %: 5 % are over 4 sigma
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


def test_a_plain_training_loop_learns_all_three_tasks_of_one_batch() -> None:
    model, tokens = hyformer(num_prediction_tasks=2).train(), ids(4, 7)
    masked, labels, classes = tokens.clone(), torch.full_like(tokens, -100), torch.tensor([0, 1, 1, 0])
    labels[:, ::3] = tokens[:, ::3]
    masked[:, ::3] = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        lm = model(tokens, task="lm", labels=tokens).loss
        mlm = model(masked, task="mlm", labels=labels).loss
        prediction = model(tokens, task="prediction", labels=classes).loss
        optimizer.zero_grad()
        (lm + mlm + prediction).backward()
        optimizer.step()
        losses.append([lm.item(), mlm.item(), prediction.item()])
    assert all(last < first / 2 for first, last in zip(losses[0], losses[-1], strict=True)), losses


def test_mixed_precision_gives_gradients_near_those_of_float32() -> None:
    """bfloat16 has 8 bits: the whole gradient is off by some per cent."""
    model, tokens = hyformer(num_prediction_tasks=2).train(), ids()

    def gradient(on: bool) -> torch.Tensor:
        model.zero_grad()
        with torch.amp.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            mlm = model(tokens, "mlm", padded(7, 4, 5), labels=tokens).loss
            prediction = model(tokens, "prediction", labels=torch.tensor([0, 1, 1])).loss
        (mlm + prediction).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    exact, mixed = gradient(False), gradient(True)
    assert (mixed - exact).norm() < 0.05 * exact.norm() and not torch.equal(mixed, exact)


def test_model_input_unpacks_into_a_call() -> None:
    model, tokens = hyformer(num_prediction_tasks=2), ids()
    given = ModelInput(tokens, "lm", attention_mask=padded(7, 4, 5), labels=tokens)
    assert torch.equal(model(**given).loss, model(tokens, "lm", padded(7, 4, 5), labels=tokens).loss)


def test_targets_are_what_prediction_is_for_where_labels_are_of_tokens() -> None:
    model, tokens, classes = hyformer(num_prediction_tasks=2), ids(), torch.tensor([0, 1, 1])
    joint = ModelInput(tokens, "prediction", labels=tokens, targets=classes)
    assert torch.equal(model(**joint).loss, model(tokens, "prediction", labels=classes).loss)


def test_parameters_are_counted_once_and_those_that_do_not_train_apart() -> None:
    model = hyformer(num_prediction_tasks=3)
    layer = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
    assert model.get_num_params() == VOCAB * 16 + 2 * layer + 16 + 3 * 16 + 3
    model.llm.tok_embeddings.requires_grad_(False)
    assert model.get_num_params(trainable_only=True) == model.get_num_params() - VOCAB * 16


def test_the_width_of_the_feed_forward_is_llamas_where_none_is_given() -> None:
    assert Hyformer(**SIZES | {"d_model": 512, "n_layers": 1}).llm.args.ffn_width() == 1536


class TestLosses:
    """compute_* against torch's own functions."""

    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def test_lm_shifts_unless_asked_not_to(self) -> None:
        logits, labels = torch.randn(2, 5, VOCAB), ids(2, 5)
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(compute_lm_loss(logits, labels), expected)
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(compute_lm_loss(logits, labels, shift_labels=False), expected)

    def test_mlm_smooths_as_torch_does(self) -> None:
        logits, labels = torch.randn(2, 5, VOCAB), ids(2, 5)
        labels[:, 1] = -1
        expected = F.cross_entropy(logits[labels >= 0], labels[labels >= 0], label_smoothing=0.1)
        torch.testing.assert_close(compute_mlm_loss(logits, labels, vocab_size=VOCAB, label_smoothing=0.1), expected)

    @pytest.mark.parametrize("missing", [-1, -100])
    def test_classes_leave_out_missing_ones(self, missing: int) -> None:
        labels = torch.tensor([2, missing, 0, 1])
        expected = F.cross_entropy(self.logits[[0, 2, 3]], labels[[0, 2, 3]])
        torch.testing.assert_close(compute_prediction_loss(self.logits, labels, num_labels=3), expected)
        gaps = labels.float().masked_fill(labels < 0, torch.nan)
        torch.testing.assert_close(compute_prediction_loss(self.logits, gaps), expected)

    def test_values_are_squared_errors_without_missing_ones(self) -> None:
        values = torch.randn(4, 3)
        values[1, 2] = torch.nan
        kept = ~values.isnan()
        expected = F.mse_loss(self.logits[kept], values[kept])
        torch.testing.assert_close(compute_prediction_loss(self.logits, values), expected)
        one = compute_prediction_loss(self.logits[:, :1], torch.tensor([1, -2, 3, 0]), num_labels=1)
        torch.testing.assert_close(one, F.mse_loss(self.logits[:, 0], torch.tensor([1.0, -2.0, 3.0, 0.0])))

    @pytest.mark.parametrize("missing", [-1.0, torch.nan])
    def test_labels_each_for_itself_without_missing_ones(self, missing: float) -> None:
        labels = torch.tensor([[0, 1, 1], [1, missing, 0], [1, 1, 1], [0, 0, 1]])
        kept = labels >= 0
        expected = F.binary_cross_entropy_with_logits(self.logits[kept], labels[kept])
        torch.testing.assert_close(compute_prediction_loss(self.logits, labels, multilabel=True), expected)

    @pytest.mark.parametrize(
        ("labels", "multilabel"),
        [(torch.full((4,), -1), False), (torch.full((4, 3), torch.nan), False), (torch.full((4, 3), -1), True)],
    )
    def test_without_any_label_the_loss_is_zero_and_so_is_its_gradient(
        self, labels: torch.Tensor, multilabel: bool
    ) -> None:
        loss = compute_prediction_loss(self.logits, labels, multilabel=multilabel)
        (gradient,) = torch.autograd.grad(loss, self.logits)
        assert loss == 0 and not gradient.any()


def test_a_row_without_any_label_trains_nothing_but_stays_in_the_graph() -> None:
    model, tokens = hyformer().train(), ids()
    loss = model(tokens, "mlm", labels=torch.full_like(tokens, -1)).loss
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_it_is_a_module_that_nests_in_others() -> None:
    outer = nn.Sequential(hyformer())
    assert all(name.startswith("0.llm.") for name in outer.state_dict())
    outer.load_state_dict({name: tensor.clone() for name, tensor in outer.state_dict().items()})
    assert config() == outer[0].config
