"""What the training loop keeps: optimiser, learning rate, average of weights, state of a run.

T words · M captions in a batch
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import TrainConfig
from encoder import fingerprint, multiplies_bfloat16
from losses import OBJECTIVES, Reward, Totals, leave_one_out, self_critical_objective
from model import CaptionModel
from util import distributed
from util.files import UserError
from util.layers import Dropout
from util.progress import TimeLeft
from util.seeding import derive_seed
from vocabulary import PAD

# Of metrics.csv, which has the other scores of the validation split after these.
COLUMNS = (
    "epoch", "train_loss", "val_loss", "CIDEr", "BLEU-4", "lr", "seconds", "reward", "baseline",
    "bad_endings", "repeats",
)  # fmt: skip
SCST_STEP = 3.0  # steps of cross-entropy that take as long as a self-critical one, roughly
CHECK_EVERY = 50  # steps; reading a loss from a GPU waits for all its work


class Trainer:
    """A model with its optimiser and average of weights, and how far training has come.

    Training has one or two stages: `--epochs` of cross-entropy, then `--scst-epochs` of
    self-critical training, each with an optimiser, a schedule and an average of its own.
    All randomness is derived from (seed, step, rank), so this state is all that a resumed run
    needs. The processes of a job hold the same weights.
    """

    # What last.pt holds beside weights, average and optimiser.
    COUNTERS = (
        "step_number", "epoch", "batch", "words", "seconds", "rows", "critical", "first_step",
        "first_epoch",
    )  # fmt: skip
    SUMS = ("rewarded", "baselines", "samples")  # of this epoch and this process

    def __init__(self, model: CaptionModel, config: TrainConfig, steps_per_epoch: int):
        self.model, self.config, self.steps_per_epoch = model, config, steps_per_epoch
        self.device = next(model.parameters()).device
        self.net = wrap_model(model, config.compile)
        self.trainable = dict(model.trainable_state())  # shares its memory with the model
        self.step_number = self.epoch = 0
        self.rows: list[dict[str, Any]] = []  # of metrics.csv
        self.reward: Reward | None = None  # what self-critical training maximises
        self.data: dict[str, Tensor] = {}  # by split, see dataset.digest_records
        self.training_info: dict[str, Any] = {}  # for the header of the model file
        # Recent losses and gradient norms, each with a text that names its step.
        self.unchecked: list[tuple[str, Tensor]] = []
        self.checked_loss: float | None = None  # the mean of those that were checked last
        self.start_epoch()
        self.start_stage(critical=False)

    def start_stage(self, critical: bool) -> None:
        """Begin a stage from the weights as they are."""
        self.critical = critical
        self.first_step, self.first_epoch = self.step_number, self.epoch
        self.clock = TimeLeft()
        self.optimizer = self.build_optimizer()
        self.average = {name: tensor.clone() for name, tensor in self.trainable.items()}

    def start_epoch(self) -> None:
        """Set the counters and sums of an epoch to zero."""
        self.batch = self.words = 0
        self.seconds = 0.0
        self.sums = dict.fromkeys(self.SUMS, 0.0)
        # Added up on the device: reading it would wait for a GPU in every step.
        self.nll = torch.zeros((), dtype=torch.float64, device=self.device)

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW with a group each for matrices, which decay, and vectors, which don't.

        The CNN's have a learning rate of their own where it is fine-tuned.
        """
        config, finetuned = self.config, self.model.encoder.trained == "last"
        scale = config.scst_lr / config.lr if self.critical else 1.0
        groups = []
        for part, lr in (
            (self.model.encoder, config.cnn_lr if finetuned else config.lr),
            (self.model.decoder, config.lr),
        ):
            parameters = [each for each in part.parameters() if each.requires_grad]
            # Not biases and norms: they are few, and decay would pull the scale of a norm to 0.
            matrices = [each for each in parameters if each.dim() > 1]
            vectors = [each for each in parameters if each.dim() <= 1]
            for chosen, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
                if chosen:
                    groups.append({"params": chosen, "peak": lr * scale, "weight_decay": decay})
        fused = self.device.type == "cuda" or None  # one kernel for all parameters
        # A second moment of 0.98, as for the first transformers (arXiv 1706.03762): it follows the
        # gradients of rare words faster than the usual 0.999.
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8, fused=fused)

    # --- one step of the loop, in the order of its calls

    def seed_step(self) -> None:
        """Seed dropout and sampling from (seed, step, rank), so that a resumed run repeats them."""
        rank = distributed.rank()
        torch.manual_seed(derive_seed(self.config.seed, self.step_number, *[rank] * (rank > 0)))

    def set_learning_rate(self) -> None:
        """Set the learning rate of this step: a linear warm-up, then a cosine down to 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.relative_rate()

    def relative_rate(self) -> float:
        """Return the learning rate of this step as a share of its peak.

        Counted from epochs and not from steps taken: a run that goes on with another batch size has
        another number of steps per epoch.
        """
        total = self.steps_per_epoch * self.stage_epochs
        step = self.steps_per_epoch * (self.epoch - self.first_epoch) + self.batch
        warmup = max(1, round(self.config.warmup * total))
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, total - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def count(self, batches: Sequence[Any]) -> Totals:
        """Return the words and captions of a step's micro-batches over all processes."""
        words = sum(int((batch.tokens[:, 1:] != PAD).sum()) for batch in batches)
        captions = sum(len(batch.tokens) for batch in batches)
        return Totals(*distributed.all_reduce_sum([words, captions]))

    @property
    def objective(self) -> Any:
        """The function of losses.py that this stage minimises."""
        return self_critical_objective if self.critical else OBJECTIVES[self.config.objective]

    def autocast(self) -> torch.autocast:
        """Return the context of mixed precision, off where the device is not made for it."""
        enabled = self.config.amp and multiplies_bfloat16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def clip_gradients(self) -> Tensor:
        """Scale the gradients to `--grad-clip` if their norm is larger; return that norm."""
        if not self.config.grad_clip:
            return torch.zeros((), device=self.device)
        parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
        return nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)

    def add_rewards(self, rewards: Tensor) -> None:
        """Add the rewards (B, n) of a step's samples to the epoch's sums."""
        self.sums["rewarded"] += float(rewards.sum())
        self.sums["baselines"] += float(leave_one_out(rewards).sum())
        self.sums["samples"] += rewards.numel()

    def watch(self, batches: Sequence[Any], values: Tensor) -> None:
        """Keep a step's loss and gradient norm, `values` (2,), for `check_finite`."""
        lr = self.optimizer.param_groups[-1]["lr"]
        images = ", ".join(str(image_id) for batch in batches for image_id in batch.image_ids)
        step = f"step {self.step_number + 1} (epoch {self.epoch + 1}, learning rate {lr:.3g})"
        self.unchecked.append((f"{step}, with the images {images}", values))
        # Sampling from a model with NaN weights would fail with a message that explains nothing.
        if self.critical or len(self.unchecked) >= CHECK_EVERY:
            self.check_finite()

    def recent_loss(self) -> float | None:
        """Return the mean loss of recent steps; on a GPU of checked ones, as reading waits for it.

        None before there is one.
        """
        if self.unchecked and self.device.type == "cpu":
            return float(torch.stack([values[0] for _, values in self.unchecked]).mean())
        return self.checked_loss

    def check_finite(self) -> None:
        """Raise UserError, which names the step, if a loss or a gradient was infinite or NaN."""
        steps, self.unchecked = self.unchecked, []
        values = torch.stack([values for _, values in steps]).tolist() if steps else []
        if values:
            self.checked_loss = sum(loss for loss, _ in values) / len(values)
        for (step, _), (loss, norm) in zip(steps, values, strict=True):
            if not math.isfinite(loss + norm):
                name, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
                rate = "--scst-lr" if self.critical else "--lr"
                raise UserError(
                    f"the {name} became {value} at {step}: training stops, and what was saved "
                    f"before is kept; go on from there with --resume and a lower {rate}"
                )

    @torch.no_grad()
    def finish_step(self, words: float) -> None:
        """Count the step and update the average of weights.

        The average follows the weights closely at first, then with the decay `--ema`. In the
        self-critical stage it is the plain mean of all weights since its start: the last ones alone
        are better only at the rewards of the training images.
        """
        self.step_number += 1
        self.batch += 1
        self.words += int(words)
        done = self.step_number - self.first_step
        decay = min(self.config.ema, (1 + done) / (10 + done))
        if self.critical:
            decay = done / (done + 1)
        # All tensors in one call: a loop over them takes several times as long.
        names = [name for name, tensor in self.trainable.items() if tensor.is_floating_point()]
        average, weights = ([d[name] for name in names] for d in (self.average, self.trainable))
        torch._foreach_lerp_(average, weights, 1 - decay if self.config.ema else 1.0)
        for name in self.trainable.keys() - set(names):  # BatchNorm's counter of batches
            self.average[name].copy_(self.trainable[name])

    # --- epochs and stages

    @property
    def stage_epochs(self) -> int:
        """The number of epochs of this stage."""
        return self.config.scst_epochs if self.critical else self.config.epochs

    def steps_left(self) -> float:
        """Return how many steps of this stage the run still takes, if no stage stops early.

        A self-critical step counts as several of the first stage.
        """
        epochs = self.first_epoch + self.stage_epochs - self.epoch
        if not self.critical:
            epochs += self.config.scst_epochs * SCST_STEP
        return epochs * self.steps_per_epoch - self.batch

    def images_per_second(self) -> float:
        """Return how many images this epoch's steps have had per second, 0 before the first."""
        images = self.batch * self.config.batch_size
        return images / self.seconds if self.seconds else 0.0

    def out_of_patience(self) -> bool:
        """Return whether the stage's last `--patience` epochs were all worse than one before."""
        # Without epoch 0: a model that first gets worse may still become better than it was.
        rows = [row for row in self.rows if row["epoch"] > self.first_epoch]
        scores = [row["CIDEr"] for row in rows if row["CIDEr"] is not None]
        waited = len(scores) - 1 - scores.index(max(scores)) if scores else 0
        return bool(self.config.patience) and waited >= self.config.patience

    def best_row(self) -> dict[str, Any] | None:
        """Return the row of the epoch with the best validation CIDEr, None if there is no score."""
        scored = [row for row in self.rows if row["CIDEr"] is not None]
        return max(scored, key=lambda row: row["CIDEr"], default=None)

    def best_score(self) -> float:
        """Return the best validation CIDEr so far, -1 if there is none."""
        best = self.best_row()
        return best["CIDEr"] if best else -1.0

    def epoch_row(self) -> dict[str, Any]:
        """Return the row of metrics.csv for the epoch that ends here, without validation scores.

        Before the first step it is that of epoch 0. All processes must call this.
        """
        sums, row = self.total_sums(), dict.fromkeys(COLUMNS)
        row |= {"epoch": 0, "seconds": round(self.seconds, 1)}
        if not self.step_number:
            return row
        row |= {"epoch": self.epoch + 1, "lr": self.optimizer.param_groups[-1]["lr"]}
        if self.critical:
            row |= {
                "reward": sums["rewarded"] / sums["samples"],
                "baseline": sums["baselines"] / sums["samples"],
            }
        else:
            row["train_loss"] = sums["nll"] / self.words
        return row

    def total_sums(self) -> dict[str, float]:
        """Return the sums of the epoch so far over all processes."""
        own = [float(self.nll), *self.sums.values()]
        return dict(zip(("nll", *self.SUMS), distributed.all_reduce_sum(own), strict=True))

    @contextlib.contextmanager
    def averaged_model(self) -> Iterator[CaptionModel]:
        """Yield the model in eval mode with the average as its weights; then restore its own."""
        weights = {name: tensor.clone() for name, tensor in self.trainable.items()}
        self.model.load_state_dict(self.average, strict=False)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.load_state_dict(weights, strict=False)

    @contextlib.contextmanager
    def training_mode(self) -> Iterator[None]:
        """Put the model into training mode, in the self-critical stage without dropout.

        Dropout is off there because a sampled caption must have the same probability when it is
        scored again. The decoder is not in eval mode, in which cuDNN's LSTM has no backward pass;
        a CNN that is trained from scratch is, so that BatchNorm uses the same statistics twice.
        """
        self.model.train()
        switched = []
        if self.critical:
            self.model.encoder.eval()
            for module in self.model.decoder.modules():
                if isinstance(module, Dropout):
                    module.eval()
                elif isinstance(module, nn.LSTM):
                    switched.append((module, module.dropout))
                    module.dropout = 0.0
        try:
            yield
        finally:
            self.model.train()
            for module, dropout in switched:
                module.dropout = dropout

    # --- the state of a run

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as tensors and plain values (last.pt).

        Any number of processes may resume it: the sums are those of the whole job.
        """
        self.check_finite()
        return {
            "weights": dict(self.trainable),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "encoder": self.frozen_fingerprint(),
            "batch_size": self.config.batch_size,
            "vocabulary": list(self.model.vocabulary.known),
            **self.model.vocabulary.to_entries(),
            "data": self.data,
            **{name: getattr(self, name) for name in self.COUNTERS},
            **self.total_sums(),
        }

    def frozen_fingerprint(self) -> str | None:
        """Return the digest of the CNN's weights if they are frozen, and so not in the state."""
        frozen = self.model.encoder.trained == "none"
        return fingerprint(self.model.encoder) if frozen else None

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a `state`; raises UserError where it is not of this model."""
        if (encoder := self.frozen_fingerprint()) and encoder != state["encoder"]:
            raise UserError(
                f"the CNN's weights are {encoder}, but the run began with {state['encoder']}; give "
                "the same --cnn-weights"
            )
        for part in ("weights", "average"):
            for name in state[part].keys() & self.trainable.keys():
                check_like(state[part][name], self.trainable[name], f"{name} of its {part}")
        found = state["weights"].keys(), state["average"].keys()
        if different := set().union(*(names ^ self.trainable.keys() for names in found)):
            raise UserError(
                f"the run was begun by another version of the project ({min(different)} is only in "
                "one of them); go on with that version, or start a new run"
            )
        self.model.load_state_dict(state["weights"], strict=False)
        self.critical = state.get("critical", False)
        self.optimizer = self.build_optimizer()
        # Learning rates and decay are the command line's, which may have changed.
        flags = [{key: value for key, value in group.items() if key != "params"}
                 for group in self.optimizer.param_groups]  # fmt: skip
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise not_of_this_run(f"its optimizer: {str(error)[:100]}") from error
        for group, own in zip(self.optimizer.param_groups, flags, strict=True):
            group |= own
            for parameter in group["params"]:
                moments = self.optimizer.state.get(parameter)
                for name in ("exp_avg", "exp_avg_sq") if moments else ():
                    check_like(moments.get(name), parameter, f"{name} of its optimizer")
        self.average = {name: value.to(self.device) for name, value in state["average"].items()}
        for name in self.COUNTERS:  # runs of older versions have fewer
            setattr(self, name, state.get(name, getattr(self, name)))
        # With another batch size, the epoch goes on after the images it has had, rounded down to
        # whole batches: some images may come twice, none is left out.
        images = self.batch * state.get("batch_size", self.config.batch_size)
        self.batch = images // self.config.batch_size
        if distributed.is_main():  # the sums are added up over the processes
            self.nll.fill_(state["nll"])
            self.sums = {name: float(state.get(name, 0)) for name in self.SUMS}


def check_like(found: Any, own: Tensor, what: str) -> None:
    """Raise UserError where a tensor of last.pt has another shape or type than the run's own."""
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (own.shape, own.dtype):
        shape = tuple(found.shape) if isinstance(found, Tensor) else "no tensor"
        raise not_of_this_run(f"{what} is {shape}, expected {tuple(own.shape)}")
    if not found.isfinite().all():
        raise not_of_this_run(f"{what} holds infinity or NaN")


def not_of_this_run(problem: str) -> UserError:
    return UserError(
        f"last.pt is damaged, or not of this run ({problem}); start another run from the best "
        "weights of this one: --init-from RUN"
    )


def wrap_model(model: CaptionModel, compiled: bool) -> nn.Module:
    """Return what a step calls as the model: it sums gradients over processes, may be compiled.

    Raises UserError where this machine can't compile for the model's device.
    """
    net: nn.Module = model
    if distributed.world_size() > 1:
        # With views into its buckets there is no second copy of all gradients.
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if not compiled:
        return net
    try:
        torch.compile(lambda x: x.sin() + x.cos())(next(model.parameters()).new_ones(2))
    except Exception as error:  # of many kinds, from as many tools
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"--compile does not work here ({reason}); leave it out") from error
    # The number and length of captions change from batch to batch: without `dynamic`, each new pair
    # would be compiled anew.
    return torch.compile(net, dynamic=True)
