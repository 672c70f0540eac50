"""Who is compared in a training step: this project's engine, its model in a plain loop, and transformers' Llama.

All start from the same weights, see the same batch, use AdamW with the same settings and clip the gradient norm at
1, so that their losses can be compared too. In bf16 a user of transformers has two habits, float32 weights under
autocast and weights cast to bf16; neither is exactly this project's arithmetic (bf16 weights with float32 masters),
so both take part.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm import LLM, ModelArgs
from llm.batch import IGNORE, Batch, Targets
from llm.compile import compile_blocks
from llm.data.batch import StepBatch
from llm.datatypes import TransformerInput
from llm.objectives import objectives_of
from llm.parallel.engine.build import build_replica
from llm.parallel.engine.engine import Engine
from llm.parallel.grid import make_grid
from llm.parallel.launch.world import World
from llm.recompute import Recompute
from llm.tasks import task_named
from llm.train.config import OptimConfig
from llm.train.optimizer import make_optimizer, parameter_groups

OPTIM = OptimConfig()
SEED = 0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A Llama and its batch."""

    vocab: int
    batch: int
    seq_len: int
    dim: int = 256
    n_layers: int = 6
    n_heads: int = 8
    n_kv_heads: int = 4
    ffn: int = 704

    def args(self) -> ModelArgs:
        """As this project's model: Llama 2's architecture, with the head layout that is the default here."""
        return ModelArgs(
            dim=self.dim,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            ffn_hidden=self.ffn,
            vocab_size=self.vocab,
            max_seq_len=self.seq_len,
            rope_theta=10000.0,
        )

    def tokens(self) -> Tensor:
        """(batch, seq_len) random ids, always the same."""
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(0, self.vocab, (self.batch, self.seq_len), generator=generator)

    @property
    def n_tokens(self) -> int:
        return self.batch * self.seq_len

    @property
    def n_targets(self) -> int:
        return self.batch * (self.seq_len - 1)

    def text(self) -> str:
        return (
            f"width {self.dim}, {self.n_layers} layers, {self.n_heads} heads over {self.n_kv_heads} kv heads, "
            f"feed-forward {self.ffn}, vocabulary {self.vocab:,}, batch {self.batch} x {self.seq_len} tokens"
        )


@dataclass(frozen=True)
class Runner:
    """One training step, and the tensors that are weights, masters or moments (once a step has been made)."""

    step: Callable[[], float]
    states: Callable[[], Iterable[Tensor]]


def our_engine(
    shape: Shape, world: World, *, precision: str, compiled: bool, recompute: Recompute = "none"
) -> Runner:
    """This project as a user runs it: the DeepSpeed engine, ZeRO-1, one process; `compiled` as train.compile does,
    `recompute` as train.activation_checkpointing."""
    grid = make_grid(world)
    replica = build_replica(shape.args(), SEED, grid, zero_stage=1, precision=precision)
    replica.model.activation_checkpointing = recompute
    if compiled:
        compile_blocks(replica.model)
    engine = Engine(
        replica,
        make_optimizer(replica.model, OPTIM),
        objectives=objectives_of(task_named("lm").objectives()),
        precision=precision,
        micro_batch_size=shape.batch,
        max_accumulation=1,
        clip_norm=OPTIM.clip_norm,
        seed=SEED,
    )
    tokens, labels = shape.tokens(), _labels(shape)
    bounds = torch.arange(0, shape.n_tokens + 1, shape.seq_len, dtype=torch.int32)
    micro = Batch(TransformerInput(tokens, cu_seqlens=bounds), {"lm": Targets(labels)})
    counts = engine.objectives.count([micro])
    batch = StepBatch([micro], counts, first_row=0, n_rows=shape.batch, wait_s=0.0)

    def step() -> float:
        return engine.step(batch, counts, OPTIM.lr).losses["lm"]

    def states() -> list[Tensor]:
        return [*replica.model.parameters(), *(fragment.values for fragment in engine.state.owned_fragments())]

    return Runner(step, states)


def our_plain_loop(shape: Shape, world: World, *, precision: str) -> Runner:
    """This project's model and optimizer without DeepSpeed: what the engine costs is measured against this.

    In bf16 with float32 masters, as the engine keeps them.
    """
    model = LLM(shape.args(), seed=SEED).to(world.device)
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    model.to(DTYPES[precision])
    weights: list[Tensor] = list(model.parameters())
    if precision == "fp32":
        masters = weights
    place = {id(weight): i for i, weight in enumerate(weights)}
    groups = parameter_groups(model, OPTIM)
    for group in groups:
        group["params"] = [masters[place[id(weight)]] for weight in group["params"]]
    optimizer = _adamw(groups)
    tokens, labels = shape.tokens().to(world.device), _labels(shape).to(world.device)

    def step() -> float:
        loss = model(tokens, labels=labels).loss_sum / shape.n_targets
        loss.backward()
        if masters is not weights:
            for master, weight in zip(masters, weights, strict=True):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(masters, OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if masters is not weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        return float(loss.detach())

    return Runner(step, lambda: [*weights, *masters, *_moments(optimizer)])


def transformers_llama(shape: Shape, world: World, *, precision: str, autocast: bool, compiled: bool) -> Runner:
    """transformers' LlamaForCausalLM with fused AdamW and clip_grad_norm_; SDPA attention, no cache.

    autocast: float32 weights under torch.autocast, instead of weights of the precision itself.
    """
    import transformers

    config = transformers.LlamaConfig(  # type: ignore[call-arg]
        vocab_size=shape.vocab,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        max_position_embeddings=shape.seq_len,
        rms_norm_eps=shape.args().norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.args().rope_theta},
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with world.device:  # made there, and not moved
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(transformers_weights(LLM(shape.args(), seed=SEED)))
    model.train()
    nn.Module.to(model, device=world.device, dtype=torch.float32 if autocast else DTYPES[precision])
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    decayed = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in decayed]
    optimizer = _adamw(
        [{"params": matrices, "weight_decay": OPTIM.weight_decay}, {"params": others, "weight_decay": 0.0}]
    )
    forward: Callable[..., Any] = torch.compile(model) if compiled else model
    tokens = shape.tokens().to(world.device)
    cast = partial(torch.autocast, world.device.type, dtype=DTYPES[precision], enabled=autocast)

    def step() -> float:
        with cast():
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return Runner(step, lambda: [*model.parameters(), *_moments(optimizer)])


def transformers_weights(model: LLM) -> dict[str, Tensor]:
    """The weights under transformers' names; rows of wq and wk reordered from neighbouring pairs to halves of a
    head.
    """
    renamed = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            weight = weight.unflatten(0, (-1, model.args.head_width // 2, 2)).transpose(1, 2).flatten(0, 2)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        renamed[f"model.{name}" if name == "norm.weight" else name] = weight
    return renamed


NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "layers.": "model.layers.",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "output.": "lm_head.",
}


def runners(precision: str) -> dict[str, Callable[[Shape, World], Runner]]:
    """How to build each contestant of a precision, by name; ours first."""
    ours: dict[str, Callable[..., Runner]] = {
        "ours": partial(our_engine, compiled=False),
        "ours compiled": partial(our_engine, compiled=True),
        "ours without DeepSpeed": our_plain_loop,
    }
    theirs: dict[str, Callable[..., Runner]] = {}
    for autocast in (False, True) if precision == "bf16" else (False,):
        for compiled in (False, True):
            habit = " autocast" if autocast else " bf16 weights" if precision == "bf16" else ""
            name = f"transformers{habit}{' compiled' if compiled else ''}"
            theirs[name] = partial(transformers_llama, autocast=autocast, compiled=compiled)
    return {name: partial(build, precision=precision) for name, build in {**ours, **theirs}.items()}


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, fused=True)


def _moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]


def _labels(shape: Shape) -> Tensor:
    """The next token of each, and none after the last."""
    labels = shape.tokens().roll(-1, dims=1)
    labels[:, -1] = IGNORE
    return labels
