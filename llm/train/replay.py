"""Rebuild one step of a run, down to its documents: which text made the loss jump?

The step's weights come from the nearest checkpoint before it, or from the initial weights, and the steps between are
computed again; rows have one global order, so nothing else is needed. Before the step's own update every document of
its batch is scored on its own. In the run folder only `replay/` is written.

Shapes: B rows, T tokens of a row.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llm.atomic import write_file
from llm.checkpoint.reader import list_steps, resolve
from llm.data.batch import MicroBatch, StepBatch
from llm.data.loader import TrainLoader
from llm.data.mixture import Mixture
from llm.data.ranges import Range
from llm.datatypes import TransformerInput
from llm.errors import DamagedFile, UserError
from llm.model import LLM
from llm.parallel.collectives import agreed_error, all_or_none, gather_json, main_decides, sum_over_ranks
from llm.parallel.layout import Layout
from llm.tokenizer import Tokenizer
from llm.train.guard import Guard, rows_and_size

if TYPE_CHECKING:
    from llm.train.trainer import Trainer

COMPARED = (
    "loss", "lm_loss", "moe_balance_loss", "moe_z_loss", "grad_norm", "routing_checksum", "lr", "tokens", "targets",
)  # fmt: skip
"""What a replayed step must have in common with its row of metrics.jsonl; the rest is time and memory."""
WORST = 5
"""Documents whose excerpt is printed and whose own gradient is computed."""
PRINTED_ROWS = 24
OF_ROW = ("row", "source", "source_row")
"""Fields of a Piece that say where the row comes from; the others are of the document."""
EXCERPT_CHARACTERS = 100
EXCERPT_TOKENS = 200


@dataclass(frozen=True)
class Piece:
    """What one row of the step holds of one document. Losses in nats, with the weights before the step's update."""

    row: int
    """Global row."""
    source: str
    source_row: int
    document: int
    """Number of the document in its source."""
    file: str
    file_row: int | None
    """Line (JSONL) or row (Parquet) from 1; None: the file is the document."""
    first_token: int
    """Where the piece begins in the document, its begin mark being token 0: a row's boundary may cut it."""
    n_tokens: int
    document_tokens: int
    n_targets: int
    loss_sum: float
    excerpt: str
    grad_norm: float | None = None
    """Norm of the gradient of loss_sum / (targets of the step), which is what the piece adds to the step's gradient."""

    @property
    def loss(self) -> float | None:
        """Mean over the piece's targets; None without targets."""
        return self.loss_sum / self.n_targets if self.n_targets else None

    def where(self) -> str:
        """File and line, and which of its tokens where it is cut."""
        place = self.file if self.file_row is None else f"{self.file}:{self.file_row}"
        last = self.first_token + self.n_tokens
        cut = f", tokens {self.first_token}-{last - 1} of {self.document_tokens}"
        return f"{place} (document {self.document}{cut if self.n_tokens < self.document_tokens else ''})"


def check_replay(run_dir: Path, step: int, steps: int | None, layout: Layout | None = None) -> None:
    """UserError unless `run_dir` recorded the step or stopped in it, and the whole model is on each replica's ranks;
    `steps` is the length of the run if it is known.

    The step after the last recorded one counts: a step that ends a run by a loss that is not finite is not recorded.
    """
    if layout is not None and layout.pipeline > 1:
        schedule = "" if layout.pipeline_schedule == "1f1b" else " --parallel.pipeline_schedule=1f1b"
        raise UserError(
            f"parallel.pipeline={layout.pipeline}: --replay_step looks into the whole model; give "
            f"--parallel.pipeline=1{schedule} with it, as a step is the same on every layout"
        )
    recorded = read_metrics(run_dir)
    first, last = min(recorded), max(recorded)
    end = last + 1 if steps is None or last < steps else last
    if not first <= step <= end:
        more = f" (recorded: to {last})" if end > last else ""
        raise UserError(f"--replay_step={step}: {run_dir} can replay steps {first} to {end}{more}")


def read_metrics(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Rows of metrics.jsonl by step, up to a torn last one; UserError naming the file when there are none."""
    file = run_dir / "metrics.jsonl"
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; only a run with recorded steps can be replayed") from None
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):  # the last one is what a kill tore
                raise UserError(f"{file}: line {number}: damaged") from None
    if not rows:
        raise UserError(f"{file}: has no recorded step; only a run with recorded steps can be replayed")
    return rows


def replay(trainer: "Trainer", step: int) -> dict[str, Any]:
    """Rebuild step `step`, print what it was made of, write `replay/step_XXXXXXXX.json` (collective).

    Returns the content of that file, the same on every rank; in the file, numbers that are not finite are null.
    UserError on every rank when the step cannot be rebuilt.
    """
    world, config = trainer.run.world, trainer.run.config
    main_decides(lambda: check_replay(trainer.run.folder, step, trainer.run.steps), world)
    recorded = main_decides(lambda: _recorded_to(trainer.run.folder, step), world)
    trainer.progress.guard = _lenient(trainer.progress.guard)
    started_from, skipped = _load_before(trainer, step, first_recorded=recorded[0]["step"])
    trainer.progress.guard.passed_over += _passed_over(recorded, trainer.progress.step, trainer.progress.consumed_rows)
    start = trainer.progress.step
    by_step = {row["step"]: row for row in recorded}
    _say(trainer, f"replay of step {step} of {trainer.run.folder}, from {started_from or 'the initial weights'}")
    for line in skipped:
        _say(trainer, f"passed over a damaged checkpoint: {line}")
    first_difference: int | None = None
    with trainer.loader() as loader:
        while True:
            batch, n_targets, n_tokens = _next_batch(trainer, loader)
            last = trainer.progress.step == step - 1
            pieces = _pieces(trainer, batch, n_targets) if last else []
            row = _advance(trainer, batch, n_targets, n_tokens, last=last)
            known = by_step.get(trainer.progress.step)
            if first_difference is None and known is not None and not all(_compare(row, known)["equal"].values()):
                first_difference = trainer.progress.step
            if last:
                break
            if trainer.progress.step % config.log.interval == 0:
                _say(trainer, f"step {trainer.progress.step} computed again, loss {row['loss']:.4f}")
    report = {
        "step": step,
        "run_dir": str(trainer.run.folder),
        "started_from": started_from,
        "skipped_checkpoints": skipped,
        "first_step": start + 1,
        "recomputed_steps": step - 1 - start,
        "ranks": world.size,
        "replayed": {key: row[key] for key in COMPARED},
        "skipped": row["skipped"],
        "culprits": row["culprits"],
        "recorded": by_step.get(step),
        "comparison": _compare(row, by_step[step]) if step in by_step else None,
        "first_difference": first_difference,
        "documents_loss": math.fsum(piece.loss_sum for piece in pieces) / max(n_targets, 1),
        "gradient_note": _no_gradients(trainer),
        "rows": _rows(pieces),
    }
    file = trainer.run.folder / "replay" / f"step_{step:08d}.json"
    main_decides(lambda: write_file(file, (json.dumps(_strict(report), indent=1) + "\n").encode()), world)
    if world.is_main:
        print("\n".join([*_lines(report, pieces), f"written to {file}"]), flush=True)
    return report


def _recorded_to(run_dir: Path, step: int) -> list[dict[str, Any]]:
    return [row for number, row in sorted(read_metrics(run_dir).items()) if number <= step]


def _load_before(trainer: "Trainer", step: int, first_recorded: int) -> tuple[str | None, list[str]]:
    """Put the state after the latest possible step before `step` in place: (checkpoint, damaged ones passed over).

    None: the initial weights, which the trainer begins with.
    """
    store, resume = trainer.run.store, trainer.run.config.checkpoint.resume
    started_from: str | None = None
    skipped: list[str] = []
    paths = main_decides(lambda: [str(path) for at, path in list_steps(store.folder) if at < step], trainer.run.world)
    if first_recorded > 1 and resume not in ("auto", "never"):  # where the run began
        paths.append(main_decides(lambda: str(resolve(resume).path.resolve()), trainer.run.world))
    untouched = trainer.run.engine.state.scalars()
    for path in paths:
        try:
            store.load_exactly(Path(path), trainer.restorer.read)
        except DamagedFile as error:
            skipped.append(str(error))
            continue
        started_from = path
        break
    if skipped and started_from is None:  # a damaged checkpoint's reading has begun with the optimizer
        trainer.run.engine.prepare_load({name: {"master"} for name in trainer.run.engine.state.shapes}, untouched)
    if not first_recorded - 1 <= trainer.progress.step < step:
        raise agreed_error(
            f"--replay_step={step}: the run begins with step {first_recorded}, but the state to start from is that of "
            f"step {trainer.progress.step}; name the checkpoint that it began from by --checkpoint.resume=PATH"
        )
    return started_from, skipped


def _next_batch(trainer: "Trainer", loader: TrainLoader) -> tuple[StepBatch, int, int]:
    """This rank's batch and the global numbers of its targets and tokens (collective)."""
    batch = all_or_none(loader.next, trainer.run.world)
    counts = [batch.n_targets, batch.n_tokens] if trainer.run.grid.reports_loss else [0, 0]
    n_targets, n_tokens = sum_over_ranks(counts, trainer.run.world)
    return batch, int(n_targets), int(n_tokens)


def _advance(trainer: "Trainer", batch: StepBatch, n_targets: int, n_tokens: int, *, last: bool) -> dict[str, Any]:
    """One step as the run made it, the last one in any case; what the run would record of it."""
    result, lr = trainer.take_step(batch, n_targets, n_tokens, always=last)
    trainer.progress.guard.judge(trainer.progress.step, result, *rows_and_size(batch))
    return {**asdict(result), "targets": result.n_targets, "lr": lr, "tokens": trainer.progress.tokens}


def _lenient(guard: Guard) -> Guard:
    """A guard under which a replay meets the updates that the run made, and neither stops nor goes back."""
    spike = "skip" if guard.config.spike == "rewind" else guard.config.spike
    always = {"nonfinite": "skip", "spike": spike, "max_events": 2**62}
    return Guard(guard.config.model_copy(update=always))


def _passed_over(recorded: Sequence[dict[str, Any]], step: int, first_row: int) -> list[Range]:
    """The rows that the steps behind `step`, which begin with `first_row`, were recorded to have passed over."""
    ranges: list[Range] = []
    for row in recorded:
        if row["step"] > step:
            rows = (first_row, first_row + row["batch_size"])
            whole = [rows] if row.get("skipped") == "passed over" else []  # a record from before rows were kept
            ranges += [(first, end) for first, end in row.get("rows_passed_over", whole)]
            first_row = rows[1]
    return ranges


def _pieces(trainer: "Trainer", batch: StepBatch, n_targets: int) -> list[Piece]:
    """All pieces of the step on every rank, the highest mean loss first, with the gradients of the worst."""
    world = trainer.run.world
    # all forwards first: they may need the other ranks, and what a rank cannot read must not keep it out of one
    nll = [token_losses(trainer.run.engine.model, micro_batch, world.device) for micro_batch in batch.micro_batches]
    score = partial(score_pieces, trainer.run.mixture, trainer.run.tokenizer)
    micro_batches = list(zip(nll, batch.micro_batches, _global_rows(trainer, batch), strict=True))
    scored = all_or_none(lambda: [score(*micro_batch) for micro_batch in micro_batches], world)
    left_out = () if batch.is_passed_over else batch.passed_over
    mine = [
        (micro_batch, *found)
        for micro_batch, part in zip(batch.micro_batches, scored, strict=True)
        for found in part
        if not any(first <= found[2].row < end for first, end in left_out)  # there the batch has padding
    ]
    gathered = gather_json([asdict(piece) for *_, piece in mine] if trainer.run.grid.reports_loss else [], world)
    everything = [(rank, i, Piece(**fields)) for rank, part in enumerate(gathered) for i, fields in enumerate(part)]
    everything.sort(key=lambda item: _order(item[2]))
    if _no_gradients(trainer) is None:
        worst = [(rank, i) for rank, i, piece in everything[:WORST] if piece.n_targets]
        norms = {
            i: piece_gradient_norm(trainer.run.engine.model, *mine[i][:3], n_targets, world.device)
            for rank, i in worst
            if rank == world.rank
        }
        for rank, found in enumerate(gather_json([[i, norm] for i, norm in norms.items()], world)):
            for i, norm in found:
                place = next(k for k, item in enumerate(everything) if item[:2] == (rank, i))
                everything[place] = (rank, i, replace(everything[place][2], grad_norm=norm))
    return [piece for _, _, piece in everything]


def _order(piece: Piece) -> tuple[float, int, int]:
    """Highest mean loss first, what is not a number before all, pieces without targets last."""
    return -_rank(piece.loss), piece.row, piece.document


def _rank(loss: float | None) -> float:
    """What a mean loss is sorted by."""
    return -math.inf if loss is None else math.inf if math.isnan(loss) else loss


def _no_gradients(trainer: "Trainer") -> str | None:
    """Why the documents' own gradients are left out; None when they are computed."""
    parallel = trainer.run.config.parallel
    split = [name for name in ("tensor", "pipeline", "expert", "context") if getattr(parallel, name) > 1]
    if parallel.zero_stage == 3:
        return "no gradients of single documents: parallel.zero_stage=3 has no rank that holds all parameters"
    if split:
        return f"no gradients of single documents: parallel.{split[0]}>1 has no rank that holds all parameters"
    return None


def _global_rows(trainer: "Trainer", batch: StepBatch) -> np.ndarray:
    """(micro-batches, rows of one) global row numbers of this rank, by the loader's rule."""
    rows = np.arange(batch.first_row, batch.first_row + batch.n_rows)
    return rows.reshape(len(batch.micro_batches), trainer.run.grid.data.size, -1)[:, trainer.run.grid.data.rank]


def score_pieces(
    mixture: Mixture, tokenizer: Tokenizer, nll_BT: Tensor, batch: MicroBatch, rows_B: np.ndarray
) -> list[tuple[int, int, Piece]]:
    """(begin, end, piece) of every piece of a document in a micro-batch; begin and end count its flattened tokens.

    rows_B: the global rows that the micro-batch holds. A row is `train.seq_len` tokens of its source, however the batch
    cuts it.
    """
    seq_len = mixture.seq_len
    tokens_N, labels_N = batch.tokens_BT.reshape(-1), batch.labels_BT.reshape(-1)
    nll_N = nll_BT.reshape(-1).double().cpu()
    source_of_row, source_rows = mixture.locate(rows_B)
    found = []
    bounds = batch.cu_seqlens.tolist()
    for start, stop in zip(bounds, bounds[1:], strict=False):
        b, column = divmod(start, seq_len)
        number, source_row = int(source_of_row[b]), int(source_rows[b])
        source = mixture.sources[number]
        document, offset = source.document_at(source_row * seq_len + column)
        origin = source.origin(document)
        piece = Piece(
            row=int(rows_B[b]),
            source=mixture.names[number],
            source_row=source_row,
            document=document,
            file=origin.file,
            file_row=origin.row,
            first_token=offset,
            n_tokens=stop - start,
            document_tokens=source.document_length(document),
            n_targets=int((labels_N[start:stop] >= 0).sum()),
            loss_sum=float(nll_N[start:stop].sum()),
            excerpt=_excerpt(tokenizer.decode(tokens_N[start : min(stop, start + EXCERPT_TOKENS)].tolist())),
        )
        found.append((start, stop, piece))
    return found


@torch.no_grad()
def token_losses(model: LLM, batch: MicroBatch, device: torch.device) -> Tensor:
    """Negative log-likelihood of each label, (B, T) float32."""
    model.eval()
    inputs = TransformerInput(tokens=batch.tokens_BT.to(device), cu_seqlens=batch.cu_seqlens)
    hidden_BTD = model(inputs, return_hidden=True).hidden
    return model.token_nll(hidden_BTD, batch.labels_BT.to(device))


def piece_gradient_norm(
    model: LLM, batch: MicroBatch, start: int, stop: int, n_targets: int, device: torch.device
) -> float:
    """Norm, over all parameters, of the gradient of a piece's summed loss / n_targets (divided last: fp16 has few small
    numbers).

    The piece is a row of its own here: in the batch it sees no other document either, and its positions begin with 0.
    torch.autograd.grad leaves DeepSpeed's gradient buffers and hooks alone.
    """
    tokens_1T = batch.tokens_BT.reshape(1, -1)[:, start:stop].to(device)
    labels_1T = batch.labels_BT.reshape(1, -1)[:, start:stop].to(device)
    loss = model(TransformerInput(tokens_1T), labels=labels_1T).loss_sum
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None)) / n_targets


def _excerpt(text: str) -> str:
    """The beginning, on one line, with nothing that a terminal would take for a command."""
    short = " ".join(text.split())
    more = "..." if len(short) > EXCERPT_CHARACTERS else ""
    return "".join(c if c.isprintable() else "\ufffd" for c in short[:EXCERPT_CHARACTERS]) + more


def _compare(row: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """For each compared key: whether the numbers are the same bits, and how far they are apart."""
    equal: dict[str, bool] = {}
    relative: dict[str, float] = {}
    for key in COMPARED:
        a, b = _strict(row[key]), recorded.get(key)
        equal[key] = a == b
        if not equal[key] and a is not None and b is not None:
            relative[key] = abs(a - b) / max(abs(a), abs(b))
    return {"equal": equal, "relative_difference": relative}


def _strict(value: Any) -> Any:
    """The value with null for numbers that are not finite: JSON has none, and metrics.jsonl is written so too."""
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(pieces: list[Piece]) -> list[dict[str, Any]]:
    """The step's rows with their documents, both by mean loss, highest first."""
    by_row: dict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_row[piece.row].append(piece)
    rows = []
    for parts in by_row.values():
        n_targets, loss_sum = sum(part.n_targets for part in parts), math.fsum(part.loss_sum for part in parts)
        rows.append(
            {
                **{key: getattr(parts[0], key) for key in OF_ROW},
                "n_targets": n_targets,
                "loss_sum": loss_sum,
                "loss": loss_sum / n_targets if n_targets else None,
                "documents": [
                    {key: value for key, value in asdict(part).items() if key not in OF_ROW} | {"loss": part.loss}
                    for part in parts
                ],
            }
        )
    return sorted(rows, key=lambda row: -_rank(row["loss"]))


def _lines(report: dict[str, Any], pieces: list[Piece]) -> list[str]:
    """What is printed: the step against its record, the worst documents, then the rows."""
    row, note = report["replayed"], report["gradient_note"]
    meaning = note or "share: norm of the gradient of what the document adds to the step's loss"
    lines = [
        f"steps computed again before it: {report['recomputed_steps']}",
        f"step {report['step']}: loss {row['loss']:.6f}, gradient norm {row['grad_norm']:.6f}, lr {row['lr']:.3e}, "
        f"{row['targets']} targets; mean loss of its documents' targets {report['documents_loss']:.6f}",
        *_verdict(report),
        "",
        f"documents with the highest mean loss, nats per target ({meaning}):",
    ]
    for piece in [piece for piece in pieces if piece.n_targets][:WORST]:
        share = "" if piece.grad_norm is None else f"  share {piece.grad_norm:.4f}"
        lines += [f"{_loss_columns(piece)}{share}  {piece.where()}, row {piece.row}", f"    {piece.excerpt}"]
    lines += ["", "rows by mean loss:"]
    by_row: dict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_row[piece.row].append(piece)
    for found in report["rows"][:PRINTED_ROWS]:
        loss = "no targets" if found["loss"] is None else f"{found['loss']:.4f}"
        lines.append(f"row {found['row']} = row {found['source_row']} of {found['source']}: {loss}")
        lines += [f"  {_loss_columns(piece)}  {piece.where()}" for piece in by_row[found["row"]]]
    if len(report["rows"]) > PRINTED_ROWS:
        lines.append(f"... and {len(report['rows']) - PRINTED_ROWS} more rows, in the file")
    return lines


def _verdict(report: dict[str, Any]) -> list[str]:
    """How the step compares with its record, and whether it was applied at all."""
    comparison, lines = report["comparison"], []
    if report["skipped"]:
        lines = [f"no update was made: {report['skipped']}", *report["culprits"]]
    if comparison is None:
        return [*lines, "not in metrics.jsonl, so there is nothing to compare it with"]
    relative = comparison["relative_difference"]
    differing = [key for key, equal in comparison["equal"].items() if not equal]
    if not differing:
        return [*lines, "bit for bit as recorded in metrics.jsonl"]
    parts = [f"{key} by {relative[key]:.1e}" if key in relative else f"{key} (absent in one)" for key in differing]
    lines.append(f"differs from metrics.jsonl: {', '.join(parts)}; first in step {report['first_difference']}")
    given = [key for key in ("lr", "tokens") if key in differing]
    if given:
        lines.append(f"the config has changed since ({', '.join(given)}): pass what it was, such as --train.steps")
    return lines


def _loss_columns(piece: Piece) -> str:
    loss = "      -" if piece.loss is None else f"{piece.loss:7.4f}"
    return f"{loss}  sum {piece.loss_sum:9.3f}  {piece.n_targets:5d} targets"


def _say(trainer: "Trainer", line: str) -> None:
    if trainer.run.world.is_main:
        print(line, flush=True)
