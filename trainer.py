"""What changes weights: the optimiser, one step, and the average of weights.

T words · M captions in a batch
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import TrainConfig
from dataset import Batch
from decoding import mask_impossible_words, sample
from encoder import fingerprint, multiplies_bfloat16
from losses import Rewards, attention_penalty, cross_entropy, leave_one_out, self_critical
from model import CaptionModel
from util import distributed
from util.files import UserError
from util.layers import Dropout, to_device
from util.seeding import derive_seed
from vocabulary import PAD, START

# StepDecoder between two looks at the losses: a GPU is waited for at each.
CHECK_EVERY = 50


class TrainBatch(NamedTuple):
    """What a part of a step reads by teacher forcing: captions by people, or by the model itself.

    `inputs` and `owner` as in `Batch`, `tokens` (M, T); `advantage` (M,) of the model's own ones
    says how much better each is than its baseline.
    """

    inputs: Tensor
    tokens: Tensor
    owner: Tensor
    advantage: Tensor | None = None
    counts: bool = True  # False: nothing is to be learned of it, it is there to keep step

    @property
    def words(self) -> int:
        """Return how many words there are to learn from."""
        return int((self.tokens[:, 1:] != PAD).sum()) if self.counts else 0

    @property
    def captions(self) -> int:
        """Return how many captions there are to learn from."""
        return len(self.tokens) if self.counts else 0


class Trainer:
    """A model with its optimiser and average of weights, and how far training has come.

    Nothing is random but by (seed, step, rank), so this state and the step are all a resumed run
    needs. The processes of a job have the same weights, and each its share of a step's images: a
    step is the same as one process would make it, but for dropout and what is drawn.
    """

    COUNTS = (
        "step_number", "epoch", "batch", "words", "seconds", "rows", "critical", "first_step",
        "first_epoch",
    )  # fmt: skip
    SUMS = ("rewarded", "baselines", "samples")  # each process has its own

    def __init__(self, model: CaptionModel, config: TrainConfig, steps_per_epoch: int):
        self.model, self.config, self.steps_per_epoch = model, config, steps_per_epoch
        self.device = next(model.parameters()).device
        self.net = spread(model, config.compile)
        self.step_number = self.epoch = self.batch = 0
        self.nll = torch.zeros((), dtype=torch.float64, device=self.device)
        self.forget()
        self.unseen: list[tuple[str, Tensor]] = []  # losses of late, and what to say of them
        self.rows: list[dict[str, Any]] = []
        self.rewards: Rewards | None = None  # the self-critical stage needs them
        self.begin(critical=False)

    def begin(self, critical: bool) -> None:
        """Begin a stage with the weights as they are: optimiser, schedule and average anew."""
        self.critical = critical
        self.first_step, self.first_epoch = self.step_number, self.epoch
        self.optimizer = self.new_optimizer()
        self.average = {name: tensor.clone() for name, tensor in self.model.trainable_state()}

    def forget(self) -> None:
        """Begin an epoch's counts and sums anew."""
        self.batch = self.words = 0
        self.seconds = 0.0
        self.nll.zero_()
        for name in self.SUMS:
            setattr(self, name, 0)

    @property
    def stage_epochs(self) -> int:
        """Return how many epochs this stage has."""
        return self.config.scst_epochs if self.critical else self.config.epochs

    def stage_is_over(self) -> bool:
        """Tell whether the stage has had its epochs, or patience with it has ended."""
        return self.epoch - self.first_epoch >= self.stage_epochs or self.patience_is_over()

    def new_optimizer(self) -> torch.optim.Optimizer:
        fused = self.device.type == "cuda" or None
        return torch.optim.AdamW(self.groups(), betas=(0.9, 0.98), eps=1e-8, fused=fused)

    def groups(self) -> list[dict[str, Any]]:
        """Return AdamW's parameter groups: matrices decay, vectors don't; the CNN has its lr."""
        config, slow = self.config, self.model.encoder.trained == "last"
        scale = config.scst_lr / config.lr if self.critical else 1.0
        groups = []
        for part, lr in (
            (self.model.encoder, config.cnn_lr if slow else config.lr),
            (self.model.decoder, config.lr),
        ):
            learning = [parameter for parameter in part.parameters() if parameter.requires_grad]
            for matrices in (True, False):
                chosen = [each for each in learning if (each.dim() > 1) == matrices]
                decay = config.weight_decay if matrices else 0.0
                if chosen:
                    groups.append({"params": chosen, "peak": lr * scale, "weight_decay": decay})
        return groups

    def rate(self) -> float:
        """Return the share of the peak learning rate at this step: warm-up, then a cosine to 0."""
        total, step = self.steps_per_epoch * self.stage_epochs, self.step_number - self.first_step
        warmup = max(1, round(self.config.warmup * total))
        if step < warmup:
            return (step + 1) / warmup
        along = (step - warmup) / max(1, total - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, along)))

    def step(self, *parts: Batch) -> None:
        """Learn from one batch, given whole or in parts whose gradients are summed."""
        rank = distributed.rank()
        torch.manual_seed(derive_seed(self.config.seed, self.step_number, *[rank] * (rank > 0)))
        lessons = [self.drawn(part) if self.critical else self.taught(part) for part in parts]
        words, captions = distributed.all_reduce_sum(
            [sum(each.words for each in lessons), sum(each.captions for each in lessons)]
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.rate()
        self.optimizer.zero_grad(set_to_none=True)
        # DistributedDataParallel takes the mean over processes, of what is to be their sum.
        objectives = [
            self.learn(lesson, words, captions, last=lesson is lessons[-1]) for lesson in lessons
        ]
        objective = torch.stack(objectives).sum()
        norm = torch.zeros_like(objective)
        if self.config.grad_clip:
            learning = [each for group in self.optimizer.param_groups for each in group["params"]]
            norm = nn.utils.clip_grad_norm_(learning, self.config.grad_clip)
        image_ids = [image_id for part in parts for image_id in part.image_ids]
        self.watch(image_ids, torch.stack([objective, norm]))
        self.optimizer.step()
        self.step_number += 1
        self.batch += 1
        self.update_average()
        self.words += int(words)

    def learn(self, lesson: TrainBatch, words: float, captions: float, last: bool) -> Tensor:
        """Add a lesson's gradients to the weights'; return its share of the objective.

        Of `words` and `captions` in the whole batch. Processes add theirs up at the `last` lesson.
        """
        alone = distributed.world_size() == 1
        with contextlib.nullcontext() if last or alone else self.net.no_sync():
            inputs = to_device(lesson.inputs, self.device)
            with self.mixed():
                logits, attention = self.net(inputs, lesson.tokens, lesson.owner)
            if lesson.advantage is None:
                loss = cross_entropy(logits, lesson.tokens, self.config.label_smoothing)
            else:
                logits = mask_impossible_words(logits, self.model.config.seq_len)
                loss = self_critical(logits, lesson.tokens, lesson.advantage)
            objective = loss.objective / words * lesson.counts
            if attention is not None and lesson.advantage is None:
                share = lesson.captions / captions
                objective = objective + self.config.attention_penalty * share * attention_penalty(
                    attention
                )
            (objective * distributed.world_size()).backward()
        self.nll += loss.nll * lesson.counts
        return objective.detach()

    def watch(self, image_ids: Sequence[Any], values: Tensor) -> None:
        """Note a step's loss and norm of the gradient, which `check` will look at."""
        lr, images = self.optimizer.param_groups[-1]["lr"], ", ".join(map(str, image_ids))
        where = f"step {self.step_number + 1} (epoch {self.epoch + 1}, learning rate {lr:.3g})"
        self.unseen.append((f"{where}, with the images {images}", values))
        # Drawing captions from a broken model fails in words that tell nobody anything.
        if self.critical or len(self.unseen) >= CHECK_EVERY:
            self.check()

    def check(self) -> None:
        """Raise ValueError, which names the step, if a loss or a gradient was not a number."""
        seen, self.unseen = self.unseen, []
        values = torch.stack([values for _, values in seen]).tolist() if seen else []
        for (where, _), (loss, norm) in zip(seen, values, strict=True):
            if not math.isfinite(loss + norm):
                name, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
                rate = "--scst-lr" if self.critical else "--lr"
                raise UserError(
                    f"the {name} became {value} at {where}: training stops, and what was saved "
                    f"before is kept; go on from there with --resume and a lower {rate}"
                )

    def mixed(self) -> torch.autocast:
        """Return the context of mixed precision, where it is wanted and worth it."""
        wanted = self.config.amp and multiplies_bfloat16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)

    def taught(self, batch: Batch) -> TrainBatch:
        """Return the captions that people gave the images."""
        self.model.train()
        return TrainBatch(batch.inputs, batch.tokens, batch.owner, counts=bool(batch.image_ids))

    def drawn(self, batch: Batch) -> TrainBatch:
        """Return captions drawn from the model itself, with their advantage.

        They are drawn without gradients and read again by teacher forcing, both without dropout,
        so that one path has the gradients.
        """
        count = self.config.scst_samples
        without_dropout(self.model)
        with torch.no_grad(), self.mixed():
            drawn = sample(
                self.model.decoder,
                self.model.encode(to_device(batch.inputs, self.device)),
                max_words=self.model.config.seq_len,
                n=count,
            ).tokens
        rewards = torch.zeros(0, count)
        if batch.image_ids:
            rewards = self.rewards(batch.image_ids, drawn)
        baseline = leave_one_out(rewards)
        start = torch.full_like(drawn[..., :1], START)
        tokens = torch.cat([start, drawn], -1).flatten(0, 1)
        owner = torch.arange(len(drawn), device=self.device).repeat_interleave(count)
        advantage = torch.zeros(len(tokens))
        advantage[: rewards.numel()] = (rewards - baseline).flatten()
        self.rewarded += float(rewards.sum())
        self.baselines += float(baseline.sum())
        self.samples += rewards.numel()
        advantage = advantage.to(self.device)
        return TrainBatch(batch.inputs, tokens, owner, advantage, bool(batch.image_ids))

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average a little towards the weights; at the start it follows them closely.

        The self-critical stage has the plain mean of all its weights, those it began with too: its
        last ones are better at the training images' rewards alone.
        """
        done = self.step_number - self.first_step
        slow = min(self.config.ema, (1 + done) / (10 + done))
        decay = done / (done + 1) if self.critical else slow
        for name, tensor in self.model.trainable_state():
            if self.config.ema and tensor.is_floating_point():
                self.average[name].lerp_(tensor, 1 - decay)
            else:
                self.average[name].copy_(tensor)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[CaptionModel]:
        """Lend the model with the average of weights in it, in eval mode."""
        own = {name: tensor.clone() for name, tensor in self.model.trainable_state()}
        self.model.load_state_dict(self.average, strict=False)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.load_state_dict(own, strict=False)

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as tensors and plain values.

        However many processes resume it: an epoch's sums are those of the whole job.
        """
        self.check()
        return {
            "weights": dict(self.model.trainable_state()),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "encoder": fingerprint(self.model.encoder) if self.frozen() else None,
            **{name: getattr(self, name) for name in self.COUNTS},
            **self.sums(),
        }

    def sums(self) -> dict[str, float]:
        """Return the sums of the epoch so far over all processes."""
        own = [float(self.nll), *(getattr(self, name) for name in self.SUMS)]
        return dict(zip(("nll", *self.SUMS), distributed.all_reduce_sum(own), strict=True))

    def frozen(self) -> bool:
        return self.model.encoder.trained == "none"

    def load(self, state: dict[str, Any]) -> None:
        """Take over a `state`; ValueError where the frozen CNN is another."""
        if self.frozen() and state["encoder"] != fingerprint(self.model.encoder):
            raise UserError(
                f"the CNN's weights are {fingerprint(self.model.encoder)}, but the run began with "
                f"{state['encoder']}; give the same --cnn-weights"
            )
        learned = dict(self.model.trainable_state())
        if different := state["weights"].keys() ^ learned.keys():
            raise UserError(
                f"the run was begun by another version of the project ({min(different)} is only in "
                "one of them); go on with that version, or start a new run"
            )
        self.model.load_state_dict(state["weights"], strict=False)
        self.critical = state.get("critical", False)
        self.optimizer = self.new_optimizer()
        # The command line may have changed learning rates and decay: they are not taken over.
        groups = [{**group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, groups, strict=True):
            group |= {"peak": own["peak"], "weight_decay": own["weight_decay"]}
        self.average = {name: value.to(self.device) for name, value in state["average"].items()}
        for name in self.COUNTS:  # runs from before there was a second stage have fewer
            setattr(self, name, state.get(name, getattr(self, name)))
        if distributed.is_main():
            self.nll.fill_(state["nll"])
            for name in self.SUMS:
                setattr(self, name, state.get(name, 0))

    def best(self) -> float:
        """Return the best validation CIDEr so far."""
        return max((row["CIDEr"] for row in self.rows if row["CIDEr"] is not None), default=-1.0)

    def patience_is_over(self) -> bool:
        """Tell whether the stage's last `patience` epochs were all worse than one before them."""
        rows = self.rows[self.first_epoch :]
        scores = [row["CIDEr"] for row in rows if row["CIDEr"] is not None]
        waited = len(scores) - 1 - scores.index(max(scores)) if scores else 0
        return bool(self.config.patience) and waited >= self.config.patience


def spread(model: CaptionModel, compiled: bool) -> nn.Module:
    """Return what a step calls in the model's place: it adds up the gradients of all processes."""
    net: nn.Module = model
    if distributed.world_size() > 1:
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return compiled_net(net, model) if compiled else net


def compiled_net(net: nn.Module, model: CaptionModel) -> nn.Module:
    """Return `net` compiled; ValueError where this machine can't compile for the model's device."""
    one = torch.ones(2, device=next(model.parameters()).device)
    try:
        torch.compile(lambda x: x.sin() + x.cos())(one)
    except Exception as error:  # of many kinds, from as many tools
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"--compile does not work here ({reason}); leave it out") from error
    return torch.compile(net, dynamic=True)


def without_dropout(model: CaptionModel) -> None:
    """Switch dropout off, and nothing else: cuDNN's LSTM has no backward pass in eval mode."""
    model.train()
    model.encoder.eval()  # a CNN trained from scratch: what is drawn must be what is read again
    for module in model.decoder.modules():
        if isinstance(module, Dropout):
            module.eval()
        elif isinstance(module, nn.LSTM):
            module.dropout = 0.0
