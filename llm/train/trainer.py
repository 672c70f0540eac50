"""The training loop: build everything a run needs, then steps with validation, samples and checkpoints by the clock
of steps.

Order of building: what can be refused is refused before work is lost (config, files, tokenizer), then data, model,
engine, checkpoint; the run folder is made last.
"""

import itertools
import math
import platform
import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from llm.args import ModelArgs
from llm.atomic import write_file
from llm.checkpoint.pretrained import save_tokenizer
from llm.checkpoint.reader import Checkpoint, list_steps, newest_valid, resolve
from llm.checkpoint.store import CheckpointStore
from llm.data.batch import StepBatch
from llm.data.loader import TrainLoader, validation_batches
from llm.data.mixture import Mixture
from llm.data.source import TokenSource
from llm.data.sources import check_data, open_data, prepare_data
from llm.errors import UserError
from llm.generate import generate
from llm.model import LLM
from llm.parallel.collectives import agreed_error, all_or_none, main_decides, sum_over_ranks
from llm.parallel.engine import Engine, StepResult, parameter_groups
from llm.parallel.launch import World
from llm.tokenizer import Tokenizer, load_tokenizer
from llm.train.config import OptimConfig, RunConfig, accumulation_steps, differences, learning_rate
from llm.train.log import RunLog
from llm.train.precision import faster_precision
from llm.train.stop import EXIT_STOPPED, Requests

VERIFY_TOKENS = 1 << 28
"""A source up to this size is verified whole before the run begins (under a second); a larger one shard by shard as
it is first read.
"""


def make_optimizer(model: LLM, optim: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW or plain SGD over the decayed and the undecayed parameters."""
    groups = parameter_groups(model, optim.weight_decay)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


class Trainer:
    """One run of one config on this world of processes; `fit()` trains to `train.steps`, resuming where the folder
    stands.
    """

    def __init__(self, config: RunConfig, run_dir: Path, world: World) -> None:
        self.world = world
        self.run_dir = run_dir
        accumulation = accumulation_steps(config, world.size)
        self.tokenizer: Tokenizer = all_or_none(lambda: load_tokenizer(config.tokenizer), world)
        self.prompts = all_or_none(lambda: [_prompt(self.tokenizer, text) for text in config.eval.prompts], world)
        config = config.model_copy(update={"model": _with_vocabulary(config.model, self.tokenizer)})
        self.store = CheckpointStore(
            run_dir / "checkpoints", world, keep=config.checkpoint.keep, keep_best=config.checkpoint.keep_best
        )
        sources, self.valid = self._open_data(config)
        self.mixture = all_or_none(lambda: Mixture(sources, config.train.seq_len, config.train.seed), world)
        self.config, self.precision_reason = self._settle_precision(config)
        model = LLM(self.config.model, seed=config.train.seed).to(world.device)
        self.n_parameters = sum(p.numel() for p in model.parameters())
        self.engine = Engine(
            model,
            make_optimizer(model, config.optim),
            world=world,
            precision=self.config.train.precision,
            micro_batch_size=config.train.micro_batch_size,
            accumulation=accumulation,
            clip_norm=config.optim.clip_norm,
            seed=config.train.seed,
            extra_config=dict(config.deepspeed),
        )
        self.step = 0
        self.consumed_rows = 0
        self.tokens = 0
        self.best: dict[str, Any] = {"valid_loss": None, "step": None}

    def _open_data(self, config: RunConfig) -> tuple[list[tuple[str, TokenSource, float]], list[TokenSource]]:
        """The training sources with their names and weights, and the held-out sources; raw text is sharded by rank 0.
        """
        cache = config.data.cache_dir
        for key, spec in (("data.train", config.data.train), ("data.valid", config.data.valid)):
            if spec is not None:  # both before the first is sharded, which may take long
                main_decides(partial(check_data, spec, key=key), self.world)
        opened: dict[str, list[tuple[str, TokenSource, float]]] = {"data.train": [], "data.valid": []}
        for key, spec in (("data.train", config.data.train), ("data.valid", config.data.valid)):
            if spec is not None:
                main_decides(partial(prepare_data, spec, self.tokenizer, cache, key=key), self.world)
                opened[key] = all_or_none(partial(open_data, spec, self.tokenizer, cache, key=key), self.world)
                for _, source, _ in opened[key]:
                    if source.n_tokens <= VERIFY_TOKENS:
                        main_decides(partial(_verify, source), self.world)
        return opened["data.train"], [source for _, source, _ in opened["data.valid"]]

    def _settle_precision(self, config: RunConfig) -> tuple[RunConfig, str]:
        if config.train.precision != "auto":
            return config, "set in the config"
        saved = main_decides(lambda: self._saved_precision(config.checkpoint.resume), self.world)
        if saved is not None:
            precision, reason = saved, "as this run began"
        else:
            dim = config.model.dim
            precision, reason = main_decides(lambda: list(faster_precision(dim, self.world.device)), self.world)
        train = config.train.model_copy(update={"precision": precision})
        return config.model_copy(update={"train": train}), reason

    def _saved_precision(self, resume: str) -> str | None:
        """What `auto` was settled to in the checkpoint that this run will continue; None for a new run."""
        checkpoint, _ = newest_valid(self.store.folder)
        if checkpoint is None and resume not in ("auto", "never"):
            checkpoint = resolve(resume)
        return None if checkpoint is None else str(checkpoint.meta["config"]["train"]["precision"])

    def resume(self) -> list[str]:
        """Continue the run folder's newest valid checkpoint, or begin from the one that the config names.

        Returns lines that say what was taken and what was skipped. A named checkpoint is where a new run folder begins;
        once the folder has checkpoints of its own, the same command, given by a person or by a restart, goes on there.
        """
        mode, folder = self.config.checkpoint.resume, self.store.folder
        self.store.clean()
        used = main_decides(lambda: bool(list_steps(folder)), self.world)
        if mode == "never" and used:
            raise agreed_error(
                f"{self.run_dir}: checkpoint.resume=never, but it holds checkpoints; use another --run_dir"
            )
        if mode not in ("auto", "never"):
            named = Path(main_decides(lambda: str(resolve(mode).path.resolve()), self.world))
            if named.is_relative_to(self.run_dir.resolve()):
                raise agreed_error(
                    f"checkpoint.resume={mode} lies in the run folder itself, which continues its newest checkpoint; "
                    f"to go back to an older one, give another --run_dir"
                )
            if not used:
                return [self._resumed(self.store.load_exactly(named, self._read_checkpoint))]
        checkpoint, skipped = self.store.load_newest(self._read_checkpoint)
        lines = [f"skipped a checkpoint, now set aside: {line}" for line in skipped]
        return lines + ([self._resumed(checkpoint)] if checkpoint is not None else [])

    def _resumed(self, checkpoint: Checkpoint) -> str:
        return f"resumed from {checkpoint.path} (step {checkpoint.step}, {self.consumed_rows:,} rows seen)"

    def _read_checkpoint(self, checkpoint: Checkpoint) -> Any:
        """Compare configs, read this rank's ranges; return the function that puts everything in place."""
        meta = checkpoint.meta
        config = self.config
        changed = differences(meta["config"], config.model_dump(mode="json"), config.checkpoint.allow_changes)
        if meta["tokenizer"] != self.tokenizer.fingerprint and "tokenizer" not in config.checkpoint.allow_changes:
            changed.append("tokenizer: its content differs")
        if "data" not in config.checkpoint.allow_changes:
            try:
                self.mixture.check_state(meta["data"])
            except UserError as error:
                changed.append(str(error))
        if changed:
            raise UserError(
                f"{checkpoint.path} belongs to another configuration: {'; '.join(changed)}. "
                f"Use another --run_dir, or --checkpoint.allow_changes=KEY,KEY to accept"
            )
        self.engine.prepare_load(checkpoint.kinds(), meta["optimizer_scalars"])
        loaded = []
        for name, kind, start, values in self.engine.owned_fragments():
            loaded.append((values, checkpoint.read(name, kind, start, start + values.numel())))

        def apply() -> None:
            for values, read in loaded:
                values.copy_(read)
            self.engine.finish_load()
            if meta["expert_counts"]:
                self.engine.model.set_expert_counts(torch.tensor(meta["expert_counts"], dtype=torch.int64))
            self.step = checkpoint.step
            self.consumed_rows = meta["data"]["consumed"]
            self.tokens = meta["tokens"]
            self.best = meta["best"]

        return apply

    def save(self) -> Path:
        """Write the checkpoint of the current step and prune older ones (collective)."""
        model = self.engine.model
        counts = model.expert_counts()
        meta = {
            "config": self.config.model_dump(mode="json"),
            "tokenizer": self.tokenizer.fingerprint,
            "data": self.mixture.state(self.consumed_rows),
            "expert_counts": counts.tolist(),
            "optimizer_scalars": self.engine.optimizer_scalars(),
            "tokens": self.tokens,
            "best": self.best,
            "layout": {"ranks": self.world.size, "zero_stage": self.config.parallel.zero_stage},
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        path = self.store.save(self.step, shapes, self.engine.owned_fragments(), meta)
        self.store.prune(self.best["step"])
        return path

    def fit(self) -> None:
        """Train from the current step to the last one."""
        notes = self.resume()
        log = all_or_none(lambda: self._open_log(notes) if self.world.is_main else None, self.world)
        requests = Requests(self.run_dir)
        try:
            self._run(log, requests)
        finally:
            requests.close()
            if log:
                log.close()

    def _run(self, log: RunLog | None, requests: Requests) -> None:
        config, world = self.config, self.world
        if self.step >= config.train.steps:
            if log:
                log.say(f"nothing to do: the run is at step {self.step} of train.steps={config.train.steps}")
            return
        loader = TrainLoader(
            self.mixture,
            seq_len=config.train.seq_len,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=world.rank,
            dp_size=world.size,
            start_row=self.consumed_rows,
        )
        with loader:
            while self.step < config.train.steps:
                started = time.perf_counter()
                batch, n_targets, n_tokens, stop, save = self._next_batch(loader, requests)
                if stop or save:
                    self._obey(stop, log, requests)
                lr = learning_rate(config.optim, config.train.steps, self.step + 1)
                result = self.engine.train_step(batch, n_targets, n_tokens, lr)
                self.step += 1
                self.consumed_rows += batch.n_rows
                self.tokens += result.n_tokens
                row = self._row(result, lr, time.perf_counter() - started, batch.wait_s)
                self._after_step(row, log)
        if log:
            log.say(
                f"done: {self.step} steps, {self.tokens:,} tokens; curves: tensorboard --logdir {self.run_dir / 'tb'}"
            )

    def _next_batch(self, loader: TrainLoader, requests: Requests) -> tuple[StepBatch, int, int, bool, bool]:
        """This rank's batch, the global numbers of its targets and tokens, and whether any rank was asked to stop or
        save.

        What one rank cannot read stops them all, with one message.
        """
        failure: Exception | None = None
        batch: StepBatch | None = None
        try:
            batch = loader.next()
        except (UserError, OSError) as error:
            failure = error
        flags = [batch is None, requests.stop is not None, self.world.is_main and requests.save_wanted()]
        counts = [0, 0] if batch is None else [batch.n_targets, batch.n_tokens]
        n_targets, n_tokens, failed, stop, save = (int(n) for n in sum_over_ranks([*counts, *flags], self.world))
        if failed:
            all_or_none(partial(_raise, failure), self.world)
        assert batch is not None
        return batch, n_targets, n_tokens, stop > 0, save > 0

    def _obey(self, stop: bool, log: RunLog | None, requests: Requests) -> None:
        """Save at this step boundary; then leave with EXIT_STOPPED if that was asked for (collective)."""
        if self.step > 0:
            path = self.save()
            if log:
                log.say(f"saved on request: {path}")
        main_decides(requests.save_done, self.world)
        if stop:
            if log:
                log.say(f"stopped on request after step {self.step}; the same command goes on")
            sys.exit(EXIT_STOPPED)

    def _after_step(self, row: dict[str, Any], log: RunLog | None) -> None:
        config, last = self.config, self.step == self.config.train.steps
        self._check_finite(row, "loss", "grad_norm")
        new_best = False
        if self.valid and (last or self.step % config.eval.interval == 0):
            row.update(self.validate())
            self._check_finite(row, "valid_loss")
            new_best = self.best["valid_loss"] is None or row["valid_loss"] < self.best["valid_loss"]
            if new_best:
                self.best = {"valid_loss": row["valid_loss"], "step": self.step}
        if log:
            log.step(row)
        if last or self.step % config.checkpoint.interval == 0 or (new_best and config.checkpoint.keep_best):
            self.save()
        if config.eval.sample_interval and (last or self.step % config.eval.sample_interval == 0):
            main_decides(lambda: self._sample(log) if log else None, self.world)

    def _check_finite(self, row: dict[str, Any], *keys: str) -> None:
        for key in keys:
            if not math.isfinite(row[key]):
                raise agreed_error(f"step {self.step}: {key} is {row[key]}; the last checkpoint is intact")

    def validate(self) -> dict[str, float]:
        """Loss per target (nats), perplexity and bits per byte of the original text over the held-out source
        (collective).
        """
        config = self.config
        max_rows = None
        if config.eval.batches is not None:
            max_rows = config.eval.batches * config.train.micro_batch_size * self.world.size
        batches = itertools.chain.from_iterable(
            validation_batches(
                source,
                seq_len=config.train.seq_len,
                micro_batch_size=config.train.micro_batch_size,
                dp_rank=self.world.rank,
                dp_size=self.world.size,
                max_rows=max_rows,
            )
            for source in self.valid
        )
        nll, n_targets, n_bytes = self.engine.sum_nll(batches, self.tokenizer.token_bytes())
        loss = nll / max(n_targets, 1)
        return {
            "valid_loss": loss,
            "valid_ppl": math.exp(min(loss, 700.0)),
            "valid_bits_per_byte": nll / (math.log(2) * max(n_bytes, 1)),
        }

    def _sample(self, log: RunLog) -> None:
        model, tokenizer, config = self.engine.model, self.tokenizer, self.config
        model.eval()
        continuations = generate(
            model,
            self.prompts,
            max_new_tokens=config.eval.sample_tokens,
            temperature=config.eval.temperature,
            stop_ids=(tokenizer.eos_id,),
            seed=self.step,
        )
        for text, ids in zip(config.eval.prompts, continuations, strict=True):
            log.sample(self.step, text, text + tokenizer.decode(ids))

    def _row(self, result: StepResult, lr: float, seconds: float, waited: float) -> dict[str, Any]:
        if self.world.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**30
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {
            "step": self.step,
            "loss": result.loss,
            "lm_loss": result.lm_loss,
            "moe_balance_loss": result.moe_balance_loss,
            "moe_z_loss": result.moe_z_loss,
            "grad_norm": result.grad_norm,
            "routing_checksum": result.routing_checksum,
            "lr": lr,
            "tokens": self.tokens,
            "targets": result.n_targets,
            "tokens_per_s": result.n_tokens / seconds,
            "tokens_per_s_per_device": result.n_tokens / seconds / self.world.size,
            "mfu": None,
            "step_time_s": seconds,
            "data_wait_s": waited,
            "memory_gb": memory,
        }

    def _open_log(self, notes: list[str]) -> RunLog:
        """The run folder and its log with the opening lines (rank 0)."""
        config = self.config
        self.run_dir.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        write_file(self.run_dir / "config.yaml", text.encode())
        save_tokenizer(self.tokenizer, self.run_dir)
        log = RunLog(
            self.run_dir,
            first_step=self.step + 1,
            steps=config.train.steps,
            interval=config.log.interval,
            tensorboard=config.log.tensorboard,
        )
        for line in notes:
            log.say(line)
        log.say(
            f"{self.n_parameters:,} parameters, {self.world.size} process(es) on {self.world.device.type}, ZeRO-"
            f"{config.parallel.zero_stage}, {config.train.precision} ({self.precision_reason}); one epoch is "
            f"{self.mixture.n_rows:,} rows of {config.train.seq_len} tokens; run folder {self.run_dir}"
        )
        return log


def _with_vocabulary(args: ModelArgs, tokenizer: Tokenizer) -> ModelArgs:
    """ModelArgs with the tokenizer's vocabulary when the config leaves it open (-1)."""
    if args.vocab_size == -1:
        return ModelArgs.model_validate({**args.model_dump(), "vocab_size": tokenizer.vocab_size})
    if args.vocab_size < tokenizer.vocab_size:
        raise agreed_error(
            f"model.vocab_size={args.vocab_size} is below the tokenizer's {tokenizer.vocab_size} tokens; use -1"
        )
    return args


def _verify(source: TokenSource) -> None:
    TokenSource.open(source.path, verify=True)


def _prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return [tokenizer.bos_id, *tokenizer.encode(text)]
    except UserError as error:
        raise UserError(f"eval.prompts: {error}") from None


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
