"""The model: a list of units. The token table makes vectors of tokens, block after block changes them, a norm and the
output make predictions of them.

Positions, documents and caches are arguments of a call; the module keeps nothing between calls.

Shapes: B batch, T tokens, D model width, V vocabulary, E experts, M number of MoE layers.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llm.args import ModelArgs
from llm.args.lora import adapter, vision_adapters
from llm.cache import Remembered
from llm.contexts import make_contexts
from llm.conveniences import Conveniences
from llm.datatypes import RouteCounts, RouterStats, TransformerInput, TransformerOutput
from llm.embeds import Embeds
from llm.heads import OUTPUT, Heads, Losses
from llm.init import initialise
from llm.layers.block import Block
from llm.layers.context import Context
from llm.layers.dropout import dropout_at, key_of, keys_or_drawn
from llm.layers.embedding import Embedding, TiedEmbedding
from llm.layers.encoder import ENCODER, Encoder, encoder_units
from llm.layers.features import FeatureEmbedding, ValueOutput
from llm.layers.foreign_names import accept_foreign_names
from llm.layers.inputs import add_inputs
from llm.layers.lora import Adapted
from llm.layers.moe import EXPERT_WEIGHTS, Experts, MoE
from llm.layers.norm import make_norm
from llm.layers.output import Output
from llm.layers.parameter import VISION
from llm.layers.prediction import PredictionHead
from llm.layers.routed import thresholds_of
from llm.parameters import ParameterTable
from llm.recompute import Recompute, recomputed
from llm.sides import Sides, apart, together
from llm.value_methods import ValueMethods
from vision.adapter import Projection
from vision.encoder import Tower
from vision.native import NativeTower

EMBEDDING, NORM = "tok_embeddings", "norm"


def unit_names(args: ModelArgs) -> tuple[str, ...]:
    """The units of a model, in the order in which vectors pass them: the first parts of the names of parameters, but
    `vision`, whose vectors the token table's take up.
    """
    layers = (spec.unit for spec in args.layer_specs())
    return (*[VISION] * (args.vision is not None), EMBEDDING, *encoder_units(args), *layers, NORM, OUTPUT)


class LLM(Conveniences, ValueMethods, Embeds, Heads, Sides):
    """A language model, initialised from (args, seed) alone; works without process groups.

    On device="meta" it has shapes but no values. Raises ValueError while args.vocab_size is unset, unless it reads and
    predicts values. The region is that of embedding and head.
    """

    def __init__(
        self,
        args: ModelArgs,
        seed: int = 0,
        device: torch.device | str | None = None,
        units: Collection[str] | None = None,
    ) -> None:
        """units: those of `unit_names(args)` that this module is to have; by default all. Where output and token table
        are one, either unit has the table.
        """
        super().__init__()
        if args.vocab_size < 1 and None in (args.input_dim, args.output_dim):
            raise ValueError("model.vocab_size is not set; give the number of tokens of the tokenizer")
        if args.vision is not None and not 0 <= args.vision.patch_token_id < args.vocab_size:
            raise ValueError(
                f"model.vision.patch_token_id={args.vision.patch_token_id} must be a token, the tokenizer's <|patch|>; "
                f"model.vocab_size={args.vocab_size}"
            )
        self.args = args
        self.specs, self.encoder_specs = args.layer_specs(), args.encoder_specs()
        self.units = tuple(name for name in unit_names(args) if units is None or name in units)
        accept_foreign_names(self, args, "")
        self.activation_checkpointing: Recompute = "none"
        """What the forwards to come forget and their backwards recompute, to save memory: see llm/recompute.py."""
        self.gathers_weights = False
        """Whether ranks with other rows gather weights together in a forward (ZeRO-3), so that all must do it alike."""
        self.thresholds = thresholds_of(args)
        """Of routed layers, by their numbers; training moves them after each step."""
        self.compiled: dict[str, Callable[..., Any]] = {}
        """Blocks as llm/compile.py compiled them, by the name of the unit, for forwards with gradients."""
        self.output: Output | ValueOutput | None = None
        self.prediction: PredictionHead | None = None
        self.first_head = 0
        """Number of the first head of queries that this rank has."""
        self.embed_dropout = dropout_at(args.embed_dropout, "embedding", EMBEDDING)
        with torch.device(device or torch.get_default_device()):
            if args.vision is not None and VISION in self.units:
                tower = NativeTower if args.vision.kind == "native" else Tower
                self.vision_embeddings = tower(args.vision, vision_adapters(args.lora))
                lora = adapter(args.lora, "vision_projection")
                self.vision_projection = Projection(args.vision.output_dim, args.dim, lora)
            if args.tie_embeddings and not {EMBEDDING, OUTPUT}.isdisjoint(self.units):
                tied = TiedEmbedding(args.vocab_size, args.dim, args.logit_softcap, args.lora, args.logit_scale)
                self.tok_embeddings: Embedding | FeatureEmbedding = tied
            elif EMBEDDING in self.units and args.input_dim is not None:
                self.tok_embeddings = FeatureEmbedding(args)
            elif EMBEDDING in self.units:
                self.tok_embeddings = Embedding(args.vocab_size, args.dim, args.lora)
            if EMBEDDING in self.units:
                add_inputs(self, args)
            if args.encoder_layers:
                self.encoder = Encoder(args, self.units, EMBEDDING in self.units)
            blocks = (Block(args, spec) if spec.unit in self.units else None for spec in self.specs)
            self.layers = nn.ModuleList(blocks)  # type: ignore[arg-type]  # None keeps the others' numbers
            if NORM in self.units:
                self.norm = make_norm(args, args.dim, last=True) if args.has_final_norm else None
            if OUTPUT in self.units and args.output_dim is not None:
                self.output = ValueOutput(args)
            elif OUTPUT in self.units and not args.tie_embeddings:
                self.output = Output(args.dim, args.vocab_size, args.logit_softcap, args.lora, args.logit_scale)
            if OUTPUT in self.units and args.n_prediction:
                self.prediction = PredictionHead(args.dim, args.n_prediction)
        for name, module in self.named_modules():
            if isinstance(module, Adapted):
                module.site = key_of(name)
            elif isinstance(module, Experts):
                module.sites = tuple(key_of(f"{name}.{weight}") for weight in EXPERT_WEIGHTS)
        initialise(self, {name: row.init for name, row in ParameterTable.of(args).items()}, seed)

    def forward(
        self,
        inputs: TransformerInput | Tensor,
        *,
        labels: Tensor | None = None,
        cache: Remembered | None = None,
        return_hidden: bool = False,
        losses: Losses | None = None,
        x: Tensor | None = None,
        units: Sequence[str] | None = None,
        expert_counts: Tensor | None = None,
        keys_N: Tensor | None = None,
        inference: bool = False,
        memory: Tensor | None = None,
    ) -> TransformerOutput:
        """Logits, or outputs where the model predicts values; or the loss, given labels; or what `losses` makes of the
        hidden states (B, T, D); or hidden states instead of logits, with return_hidden.

        inputs: a tensor is tokens (B, T), or values (B, T, F) of a model that reads them. labels: (B, T) int64,
        labels[b, t] being the token after tokens[b, t]; negative ones are ignored. A cache makes the tokens continue
        its rows, and turns gradients off. units: run these alone, of those that the module has, on the vectors `x` that
        the unit before them made of the same inputs; their hidden states are vectors for the next.
        expert_counts: (M, E) int64, how many tokens of the whole previous step each expert got, for the balance loss;
        all alike where not given. keys_N: (B * T,) int64, of each token, by which dropout chooses; in training, with
        gradients, those that are not given are drawn by torch's generator, and elsewhere nothing is dropped. inference:
        without gradients, as with a cache. memory: what `encode` made of `inputs.source`, so that the encoder does not
        run. Raises ValueError where inputs, labels, cache or counts do not fit together.
        """
        if isinstance(inputs, Tensor):
            inputs = TransformerInput.of(inputs)
        with torch.no_grad() if inference or cache is not None else nullcontext():
            ctx = self.context(inputs, cache, expert_counts, keys_N, memory)
            hidden, stats = self.run(units or self.units, x, inputs, ctx, self.taken(memory, ctx))
            if cache is not None:
                cache.forget()
            out = self.results(hidden, stats, inputs.tokens, labels, return_hidden, losses)
            out.routes = ctx.reports
            return out

    def run(
        self,
        units: Sequence[str],
        x: Tensor | None,
        inputs: TransformerInput,
        ctx: Context,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, list[RouterStats]]:
        """What consecutive units make of the vectors that the unit before them left: (B, T, D), or with sequence
        parallelism this rank's part of them, (n, D); after the norm final hidden states (B, T, D). The output leaves
        those as they are, for `logits` and the losses. The second result is of the MoE layers passed. Of an
        encoder-decoder, vectors before the norm are those of both sides: see llm/sides.py.
        """
        stats = []
        flows = self.source_flows(units, ctx, memory)
        if flows and x is not None:
            x, memory = apart(x, ctx)
        for unit in units:
            layer_stats = None
            if unit == EMBEDDING:
                x = self.embed(inputs, ctx)
                memory = self.embed_source(inputs, ctx) if flows else memory
            elif unit == NORM:
                x = self.finish(x, ctx)  # type: ignore[arg-type]  # a block or the caller made it
            elif unit.startswith(ENCODER):
                memory, layer_stats = self.encoded(unit, memory, ctx) if flows else (memory, None)
            elif unit not in (VISION, OUTPUT):
                x, layer_stats = self._through(unit, x, ctx, memory)
            if layer_stats is not None:
                stats.append(layer_stats)
        assert x is not None
        return (together(x, memory) if flows and NORM not in units else x), stats

    def _through(
        self, name: str, x: Tensor | None, ctx: Context, memory: Tensor | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """What the block of this name makes of x, compiled and recomputed as the model is to."""
        compiled = self.compiled.get(name) if torch.is_grad_enabled() else None
        block = self.get_submodule(name) if compiled is None else compiled
        return recomputed(self.activation_checkpointing, block, x, ctx, *([] if memory is None else [memory]))

    def finish(self, x: Tensor, ctx: Context) -> Tensor:
        """Final hidden states (B, T, D) of what the last layer made."""
        hidden = self.region.enter(x if self.norm is None else self.norm(x), ctx.cut_sequence)
        return hidden.view(*ctx.shape, -1)

    def context(
        self,
        inputs: TransformerInput,
        cache: Remembered | None = None,
        expert_counts: Tensor | None = None,
        keys_N: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Context:
        """What the layers share in one forward over these inputs, which are checked before the cache changes."""
        # a graph is compiled for one row of positions or for one a row, so compiled blocks always get the latter
        each_row = bool(self.compiled) and torch.is_grad_enabled()
        inputs = self.with_source(inputs, memory)
        cut_sequence = self.cuts_sides(inputs)
        keys_N = keys_or_drawn(keys_N, inputs.tokens, self.training and self.args.drops)
        how = inputs, cache, expert_counts, keys_N, each_row, cut_sequence, self.first_head
        ctx = make_contexts(self.args, self.specs, self.encoder_specs, *how)
        reports: dict[int, RouteCounts] | None = {} if self.training and torch.is_grad_enabled() else None
        ctx = replace(ctx, thresholds=self.thresholds, reports=reports) if self.args.route is not None else ctx
        return self.with_own_keys(ctx) if cut_sequence and keys_N is not None else ctx

    def moe_layers(self) -> list[MoE]:
        """The MoE feed-forwards, in order."""
        return [module for module in self.modules() if isinstance(module, MoE)]
