"""The key that somebody meant who wrote another: misspelt, in another section, or as other trainers call it."""

import difflib
from collections.abc import Iterable

OTHERS_NAMES: dict[str, tuple[str, ...]] = {
    "optim.lr": ("learning_rate", "max_lr", "peak_lr", "base_lr"),
    "optim.min_lr": ("min_learning_rate", "lr_min", "final_lr", "min_lr_ratio"),
    "optim.betas": ("beta1", "beta2", "adam_beta1", "adam_beta2", "adam_betas"),
    "optim.eps": ("adam_epsilon", "adam_eps", "epsilon"),
    "optim.weight_decay": ("wd", "decay"),
    "optim.clip_norm": (
        ("grad_clip", "max_grad_norm", "max_norm", "gradient_clip_val", "gradient_clipping", "clip_grad")
        + ("clip_grad_norm", "clip")
    ),
    "optim.warmup_steps": ("warmup_iters", "num_warmup_steps", "lr_warmup_steps", "lr_warmup_iters", "warmup")
    + ("warmup_ratio", "warmup_step"),
    "optim.decay_steps": ("lr_decay_iters", "lr_decay_steps", "cooldown", "cooldown_steps"),
    "optim.schedule": ("lr_scheduler", "lr_scheduler_type", "lr_schedule", "lr_decay_style", "scheduler", "decay_lr"),
    "optim.name": ("optimizer", "optim", "optimizer_name", "optimizer_type"),
    "optim.ema_decay": ("ema",),
    "train.steps": ("max_steps", "max_iters", "num_steps", "total_steps", "train_steps", "training_steps")
    + ("train_iters", "iterations", "num_iterations", "max_step", "n_steps"),
    "train.epochs": ("num_train_epochs", "num_epochs", "max_epochs", "n_epochs", "epoch"),
    "train.global_batch_size": ("batch_size", "train_batch_size", "total_batch_size", "global_batch")
    + ("gradient_accumulation_steps", "accumulate_grad_batches", "grad_accum_steps", "gradient_accumulation"),
    "train.micro_batch_size": ("per_device_train_batch_size", "micro_batch", "local_batch_size", "device_batch_size")
    + ("per_device_batch_size", "train_micro_batch_size_per_gpu"),
    "train.seq_len": ("block_size", "context_length", "sequence_length", "sequence_len", "seq_length")
    + ("max_seq_length", "max_length", "ctx_len", "n_ctx", "block"),
    "train.precision": ("dtype", "mixed_precision", "bf16", "fp16", "tf32", "torch_dtype", "mixed_precision_param"),
    "train.seed": ("random_seed", "manual_seed"),
    "train.compile": ("torch_compile",),
    "train.threads": ("num_threads", "omp_num_threads"),
    "train.activation_checkpointing": ("gradient_checkpointing", "activation_checkpoint", "recompute"),
    "checkpoint.interval": ("save_steps", "save_interval", "save_every", "checkpoint_interval", "save_freq")
    + ("save_iters",),
    "checkpoint.keep": ("save_total_limit", "keep_latest_k", "keep_last"),
    "checkpoint.resume": ("resume_from_checkpoint", "resume_from", "load_checkpoint"),
    "eval.interval": ("eval_interval", "eval_steps", "eval_freq", "val_interval", "val_check_interval", "eval_every"),
    "log.interval": ("logging_steps", "log_interval", "log_freq", "log_every", "log_every_n_steps", "print_freq"),
    "log.wandb": ("wandb_log", "report_to", "use_wandb"),
    "run_dir": ("output_dir", "out_dir", "save_dir", "work_dir", "checkpoint_dir", "dump_folder", "output"),
    "data.train": ("dataset", "datasets", "dataset_path", "train_file", "train_data", "train_data_path")
    + ("data_path", "train_path", "dataset_name", "data.path"),
    "data.valid": ("validation", "valid_file", "validation_file", "val_data", "valid_data", "val", "dev", "test")
    + ("val_data_path", "eval_file"),
    "tokenizer.path": ("tokenizer_path", "tokenizer_name", "tokenizer_file", "tokenizer_name_or_path", "vocab_file"),
    "tokenizer.kind": ("tokenizer_type", "tokenizer_kind"),
    "model.init_from": ("init_checkpoint", "pretrained", "model_name_or_path", "base_model", "pretrained_path")
    + ("model.path",),
    "model.dim": ("hidden_size", "n_embd", "d_model", "embed_dim", "emb_dim"),
    "model.n_layers": ("n_layer", "num_layers", "num_hidden_layers", "depth", "layers"),
    "model.n_heads": ("n_head", "num_heads", "num_attention_heads", "heads"),
    "model.n_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_query_groups", "n_head_kv", "kv_heads"),
    "model.ffn_hidden": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "mlp_dim", "hidden_dim"),
    "model.max_seq_len": ("max_position_embeddings",),
    "model.vocab_size": ("padded_vocab_size", "n_vocab"),
    "model.norm_eps": ("rms_norm_eps", "layer_norm_eps"),
    "model.act": ("hidden_act", "activation"),
    "model.tie_embeddings": ("tie_word_embeddings", "weight_tying", "tie_weights"),
    "lora.rank": ("lora_r", "lora_rank", "lora.r"),
    "lora.alpha": ("lora_alpha", "lora.lora_alpha"),
    "lora.targets": ("target_modules", "lora_target_modules", "lora.target_modules"),
    "lora.dropout": ("lora_dropout", "lora.lora_dropout"),
    "lora.rslora": ("use_rslora", "lora.use_rslora"),
    "model.init_std": ("initializer_range",),
    "model.attn_dropout": ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_drop"),
    "model.resid_dropout": ("resid_pdrop", "residual_dropout", "hidden_dropout", "hidden_dropout_prob"),
    "model.embed_dropout": ("embd_pdrop", "embedding_dropout", "emb_dropout"),
    "model.ffn_dropout": ("activation_dropout", "mlp_dropout", "act_dropout"),
    "model.head_dropout": ("classifier_dropout", "cls_dropout"),
    "model.moe.n_experts": ("num_local_experts", "num_experts", "n_expert"),
    "model.moe.top_k": ("num_experts_per_tok", "n_expert_per_token", "moe_top_k"),
    "model.moe.aux_alpha": ("router_aux_loss_coef", "aux_loss_coef"),
    "parallel.tensor": ("tensor_parallel_size", "tensor_parallel_degree", "tensor_model_parallel_size", "tp")
    + ("tp_size", "model_parallel_size"),
    "parallel.pipeline": ("pipeline_parallel_size", "pipeline_parallel_degree", "pipeline_model_parallel_size")
    + ("pp", "pp_size"),
    "parallel.expert": ("expert_parallel_size", "expert_parallel_degree", "ep", "ep_size"),
    "parallel.zero_stage": ("zero", "stage", "fsdp", "sharding_strategy", "zero_optimization"),
    "parallel.offload_optimizer": ("cpu_offload", "offload"),
}
"""Key of this config -> what transformers, nanoGPT, litgpt, torchtitan, Megatron, DeepSpeed and axolotl call it, or
what decides it."""

_MEANS = {name: key for key, names in OTHERS_NAMES.items() for name in names}


def meant(wanted: str, known: Iterable[str]) -> list[str]:
    """Those of the dotted keys `known` that `wanted`, which is none of them, may have been meant for; best first.

    Another trainer's name for a key comes before the same name in another section, that before a misspelt key of the
    same section, and that before a misspelt name anywhere.
    """
    known = list(known)
    wanted = wanted.replace("-", "_").lower()
    section, _, leaf = wanted.rpartition(".")
    others = _MEANS.get(wanted) or _MEANS.get(leaf)
    if wanted not in known and others in known:
        return [others]
    same = [key for key in known if key == wanted] or [key for key in known if key.rpartition(".")[2] == leaf]
    own = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    every = {key.rpartition(".")[2]: key for key in known}
    return (
        same
        or [own[name] for name in difflib.get_close_matches(leaf, own, n=1)]
        or [every[name] for name in difflib.get_close_matches(leaf, every, n=1, cutoff=0.85)]
    )
