"""The model: token table, blocks, norm, output. Each block is told by its LayerSpec what it is.

Positions, documents and caches are arguments of a call; the module keeps nothing between calls.

Shapes: B batch, T tokens, D model width, V vocabulary, E experts, M number of MoE layers.
"""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from llm.args import LayerSpec, ModelArgs
from llm.cache import Cache
from llm.datatypes import RouterStats, TransformerInput, TransformerOutput
from llm.errors import NoTokenizer
from llm.foreign.load import register_hook
from llm.init import initialise
from llm.layers.attention import Attention
from llm.layers.context import Context
from llm.layers.embedding import Embedding, TiedEmbedding
from llm.layers.ffn import build_feed_forward
from llm.layers.masks import AttentionMasks, document_lengths
from llm.layers.moe import MoE, build_moe
from llm.layers.norm import make_norm
from llm.layers.output import Output
from llm.layers.region import WHOLE, Region
from llm.parameters import ParameterTable
from llm.recompute import Recompute, recomputed

if TYPE_CHECKING:
    from llm.parallel.stages import Stage
    from llm.tokenizer import Tokenizer


class Block(nn.Module):
    """One layer: h = x + attention(norm(x)); y = h + feed_forward(norm(h)), with the norms where args.norm_place says;
    with parallel_residual y = x + attention(norm(x)) + feed_forward(other_norm(x)).
    """

    def __init__(self, args: ModelArgs, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.parallel = args.parallel_residual
        register_hook(self, args, "layers.{i}.")
        before, after = args.norm_place != "post", args.norm_place != "pre"
        self.attention_norm = make_norm(args, args.dim) if before else None
        self.attention = Attention(args, spec)
        register_hook(self.attention, args, "layers.{i}.attention.")
        self.attention_post_norm = make_norm(args, args.dim) if after else None
        if spec.ffn != "none":
            self.ffn_norm = make_norm(args, args.dim) if before else None
            self.feed_forward = build_moe(args) if spec.ffn == "moe" else build_feed_forward(args)
            register_hook(self.feed_forward, args, "layers.{i}.feed_forward.")
            self.ffn_post_norm = make_norm(args, args.dim) if after else None

    def forward(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, RouterStats | None]:
        update_BTD = self.attention(_through(self.attention_norm, x_BTD), ctx)
        h_BTD = x_BTD + _through(self.attention_post_norm, update_BTD)
        if self.spec.ffn == "none":
            return h_BTD, None
        normed_BTD, stats = _through(self.ffn_norm, x_BTD if self.parallel else h_BTD), None
        if self.spec.ffn == "moe":
            y_BTD, stats = self.feed_forward(normed_BTD, ctx.valid_BT)
        else:
            y_BTD = self.feed_forward(normed_BTD)
        return h_BTD + _through(self.ffn_post_norm, y_BTD), stats


def _through(norm: nn.Module | None, x: Tensor) -> Tensor:
    normed: Tensor = x if norm is None else norm(x)
    return normed


class LLM(nn.Module):
    """A causal language model, initialised from (args, seed) alone; works without process groups.

    On device="meta" it has shapes but no values. Raises ValueError while args.vocab_size is unset.
    """

    region: Region = WHOLE
    """Of embedding and head; cut over ranks by llm/parallel/build.py, as the layers' are."""

    def __init__(self, args: ModelArgs, seed: int = 0, device: torch.device | str | None = None) -> None:
        super().__init__()
        if args.vocab_size < 1:
            raise ValueError("model.vocab_size is not set; give the number of tokens of the tokenizer")
        self.args = args
        self.specs = args.layer_specs()
        register_hook(self, args, "")
        self.activation_checkpointing: Recompute = "none"
        """What the forwards to come forget and their backwards recompute, to save memory: see llm/recompute.py."""
        self.compiled = False
        """Set by llm/compile.py: blocks are compiled, for forwards with gradients."""
        with torch.device(device or torch.get_default_device()):
            if args.tie_embeddings:
                self.tok_embeddings: Embedding = TiedEmbedding(args.vocab_size, args.dim, args.logit_softcap)
            else:
                self.tok_embeddings = Embedding(args.vocab_size, args.dim)
            self.layers: nn.ModuleList | nn.ModuleDict = nn.ModuleList(Block(args, spec) for spec in self.specs)
            self.norm = make_norm(args, args.dim)
            self.output = None if args.tie_embeddings else Output(args.dim, args.vocab_size, args.logit_softcap)
        self.origin: Path | None = None
        """What `from_pretrained` read."""
        self._tokenizer: Tokenizer | None = None
        self.stages: tuple[Stage, ...] = ()
        """What a rank of a pipeline has of the model; empty where it is whole."""
        initialise(self, {name: row.init for name, row in ParameterTable.of(args).items()}, seed)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32, *, average: bool = False) -> "LLM":
        """The model of a run folder (its newest checkpoint), a `checkpoints` folder, a checkpoint, a model folder, or a
        foreign folder of a known family (Hugging Face or Meta), in `dtype`.

        average: the moving average of its weights, which a run with optim.ema_decay keeps. One process, no launcher.
        Raises UserError naming the file when something is missing or damaged.
        """
        from llm.pretrained import load_model  # files know models, not the reverse

        model = load_model(path, dtype, average)
        model.origin = Path(path)
        return model

    @property
    def tokenizer(self) -> "Tokenizer | None":
        """The tokenizer that lies beside what `from_pretrained` read, opened when first asked for; None where there is
        none. Another can be set. UserError naming the file when it is damaged.
        """
        if self._tokenizer is None and self.origin is not None:
            from llm.pretrained import tokenizer_of

            with suppress(NoTokenizer):
                self._tokenizer = tokenizer_of(self.origin)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: "Tokenizer | None") -> None:
        self._tokenizer = tokenizer

    @overload
    def generate(self, text: str, **settings: Any) -> str: ...

    @overload
    def generate(self, text: Sequence[str], **settings: Any) -> list[str]: ...

    def generate(  # type: ignore[misc]  # the overloads say what comes back, not each setting again
        self,
        text: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: bool = True,
    ) -> str | list[str]:
        """The continuation of a text, or of each of several in one batch: what comes after it, with its first space.

        An empty text begins a document; `stop` ends at an end mark; llm/generation/sampling.py says what the other
        settings mean. A continuation ends where the context (args.max_seq_len) does. Raises ValueError for a setting
        out of range, UserError where there is no tokenizer, a text fills the context, or logits are not finite.
        """
        from llm.generation.sampling import Sampling
        from llm.generation.text import Continuer

        name = "this model" if self.origin is None else str(self.origin)
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise NoTokenizer(
                f"{name} has no tokenizer, so text cannot be read or written; set model.tokenizer = "
                f"llm.tokenizer.load_tokenizer(...), or give token ids to llm.generate.generate"
            )
        continuer, texts = Continuer(self, tokenizer, name), [text] if isinstance(text, str) else list(text)
        prompts = [continuer.prompt(one, f"prompt {i + 1}", str(i)) for i, one in enumerate(texts)]
        found = [done.text for done in continuer.complete(prompts, sampling, max_new_tokens, stop)] if prompts else []
        return found[0] if isinstance(text, str) else found

    def save_pretrained(self, path: str | Path, tokenizer: "Tokenizer | None" = None) -> None:
        """Write a model folder, whole or not at all, that `from_pretrained` and model.init_from read, in the
        parameters' dtype. Raises UserError when `path` exists.
        """
        from llm.foreign.native import OfModule, write_native

        dtype = next(self.parameters()).dtype
        write_native(Path(path), self.args, OfModule(self), dtype=dtype, tokenizer=tokenizer)

    def forward(
        self,
        inputs: TransformerInput | Tensor,
        *,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        return_hidden: bool = False,
    ) -> TransformerOutput:
        """Logits; or the loss, given labels; or hidden states instead of logits, with return_hidden.

        labels: (B, T) int64, labels[b, t] being the token after tokens[b, t]; negative ones are ignored. A cache makes
        the tokens continue its rows, and turns gradients off. Raises ValueError where inputs, labels or cache do not
        fit together.
        """
        if isinstance(inputs, Tensor):
            inputs = TransformerInput(inputs)
        with torch.no_grad() if cache is not None else nullcontext():
            return self._forward(inputs, labels, cache, return_hidden)

    def _forward(
        self, inputs: TransformerInput, labels: Tensor | None, cache: Cache | None, return_hidden: bool
    ) -> TransformerOutput:
        hidden_BTD, stats = self._trunk(inputs, cache)
        if cache is not None:
            cache.forget()
        out = TransformerOutput(hidden=hidden_BTD if return_hidden else None)
        if stats:
            out.balance_sum = torch.stack([layer.balance_sum for layer in stats]).sum()
            out.z_sum = torch.stack([layer.z_sum for layer in stats]).sum()
            out.expert_counts = torch.stack([layer.expert_counts for layer in stats])
        if labels is not None:
            if labels.shape != inputs.tokens.shape:
                raise ValueError(
                    f"labels {tuple(labels.shape)} must have the shape of tokens {tuple(inputs.tokens.shape)}"
                )
            out.loss_sum = self.loss_sum(hidden_BTD, labels)
            out.n_targets = (labels >= 0).sum()
        elif not return_hidden:
            out.logits = self.logits(hidden_BTD)
        return out

    def _trunk(self, inputs: TransformerInput, cache: Cache | None) -> tuple[Tensor, list[RouterStats]]:
        x_BTD, stats = self.through_layers(self.embed(inputs), self.context(inputs, cache))
        return self.finish(x_BTD, inputs), stats

    def through_layers(
        self, x_BTD: Tensor, ctx: Context, numbers: range | None = None
    ) -> tuple[Tensor, list[RouterStats]]:
        """What the layers of this module make of token vectors, in `embed`'s form: all, or those of `numbers`."""
        stats = []
        eager = self.compiled and not torch.is_grad_enabled()
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            for number, layer in self.layers.named_children():
                if numbers is not None and int(number) not in numbers:
                    continue
                x_BTD, layer_stats = recomputed(self.activation_checkpointing, layer, x_BTD, ctx)
                if layer_stats is not None:
                    stats.append(layer_stats)
        return x_BTD, stats

    def finish(self, x_BTD: Tensor, inputs: TransformerInput) -> Tensor:
        """Final hidden states (B, T, D) of what the last layer made."""
        hidden = self.region.enter(self.norm(x_BTD))
        return hidden.view(*inputs.tokens.shape, -1)

    def embed(self, inputs: TransformerInput) -> Tensor:
        """Token vectors, (B, T, D), or with sequence parallelism this rank's part of them, (n, D).

        Ids outside the table: ValueError on a CPU; on a GPU looking would stall it.
        """
        inputs.check_tokens()
        self.region.begin(inputs.tokens.numel())
        if inputs.tokens.device.type == "cpu":
            low, high = (int(bound) for bound in inputs.tokens.aminmax())
            if low < 0 or high >= self.args.vocab_size:
                raise ValueError(
                    f"token ids go from {low} to {high}; model.vocab_size={self.args.vocab_size} allows 0 and up"
                )
        x_BTD = self.region.leave(self.tok_embeddings(inputs.tokens))
        if self.args.embed_scale is None:
            return x_BTD
        # rounded on the host: a number made on a GPU would make the host wait for it
        return x_BTD * torch.tensor(self.args.embed_scale, dtype=x_BTD.dtype, device="cpu").item()

    def context(self, inputs: TransformerInput, cache: Cache | None = None) -> Context:
        """What the layers share in one forward over these inputs; checks their positions and documents."""
        device = inputs.tokens.device
        positions_BT, document_starts = inputs.resolve(
            None if cache is None else cache.first_positions(len(inputs.tokens))
        )
        attend = (
            AttentionMasks(self.specs, positions_BT, document_starts, device)
            if cache is None
            else cache.extend(positions_BT, document_starts, device)
        )
        n_rows, row_length = inputs.tokens.shape
        shape = n_rows, row_length
        padded = self.args.moe is not None and (positions_BT < 0).any()
        valid_BT = torch.from_numpy(positions_BT >= 0).to(device) if padded else None
        if self.args.rope_scaling is not None and self.args.rope_scaling.kind == "dynamic":
            lengths_BT = document_lengths(positions_BT, document_starts)
            positions, lengths = (torch.tensor(x, device=device) for x in (positions_BT, lengths_BT))
            return Context.build(self.args, self.specs, positions, attend, shape, lengths, valid_BT)
        # a graph is compiled for one row of positions or for one a row, so compiled blocks always get the latter
        agree = not self.compiled and (positions_BT == positions_BT[:1]).all()
        shared_BT = torch.tensor(positions_BT[:1] if agree else positions_BT, device=device)
        return Context.build(self.args, self.specs, shared_BT, attend, shape, valid_BT=valid_BT)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Float32 logits (B, T, V) of final hidden states."""
        return self._head(hidden_BTD)

    def loss_sum(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Sum of the labels' negative log-likelihood in nats given final hidden states, float32 scalar."""
        return self._head(hidden_BTD, labels_BT)

    def token_nll(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Negative log-likelihood in nats of each label given final hidden states, (B, T) float32 without gradient, 0
        where the label is negative."""
        return self._head(hidden_BTD, labels_BT, per_token=True)

    @property
    def _head(self) -> nn.Module:
        return self.tok_embeddings if self.output is None else self.output

    def moe_layers(self) -> list[MoE]:
        """The MoE feed-forwards, in order."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def expert_counts(self) -> Tensor:
        """(M, E) int64: assignments of the previous whole step, for the balance loss; all 0 at first."""
        counts = [moe.expert_counts for moe in self.moe_layers()]
        return torch.stack(counts) if counts else torch.zeros(0, 0, dtype=torch.int64)

    def set_expert_counts(self, counts: Tensor) -> None:
        """Set them, summed over all ranks and micro-batches of the step. Raises ValueError on a wrong shape."""
        layers = self.moe_layers()
        expected = self.expert_counts().shape
        if counts.shape != expected:
            raise ValueError(
                f"expert counts must have shape {tuple(expected)} (MoE layers, experts); got {tuple(counts.shape)}"
            )
        for moe, row in zip(layers, counts, strict=True):
            moe.expert_counts.copy_(row)
