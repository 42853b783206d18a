#!/usr/bin/env python
"""AlignDistil in one file: token-level alignment of a language model as adaptive policy distillation.

    python aligndistil.py                    # the whole method on a built-in demo, minutes on a laptop's CPU
    python aligndistil.py --model gpt2       # a Hugging Face causal LM on UltraFeedback, the paper's data
    python aligndistil.py --help             # every setting, with what it does

The method (Zhang et al., ACL 2025, arXiv 2503.02832) in four sentences. Train one model by DPO, and a second
one by DPO with chosen and rejected swapped. Where the two disagree on the next token, their difference is a
reward for each token of the vocabulary. Extrapolating from the first away from the second gives, at every
state, the teacher that maximises this reward under a KL penalty; how far depends on how much they disagree.
The policy is distilled from that teacher on the policy's own samples.

Where it departs from the authors' code, it follows the paper: the loss covers every response token, the first
one too; TVD has its factor 1/2 (their beta2 is r/2); models whose vocabularies differ are refused and not
cut. Left out: sharded weights (the policy and its optimizer must fit one device) and generation by a separate
server. Everything is float32.

Sections: 1 settings, 2 the mathematics, 3 the losses and the teacher, 4 the algorithm (align), 5 the training
loop, 6 a language model taken apart, 7 data, 8 the demo world, 9 evaluation and report, 10 the run. The
method is 1 to 4; 5 and 6 are how it runs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import html
import inspect
import json
import math
import os
import random
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import filelock
import huggingface_hub
import pandas as pd
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from huggingface_hub import errors as hub_errors
from torch import Tensor
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# 1  Settings. The defaults are the paper's; DEMO is what the built-in demo sets otherwise. The comment of a
#    setting is its text in --help.
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    # what to run
    model: str = "demo"  # hub id or local folder of a causal LM; 'demo' is built in, with a preset
    dataset: str = "HuggingFaceH4/ultrafeedback_binarized"  # hub id, id:config, folder, file or 'demo'
    train_split: str | None = None  # split to train on (train_prefs, or else train)
    test_split: str | None = None  # split to evaluate on (test_prefs, test, or a tenth held out)
    limit: int | None = None  # train on so many records at most (all)
    output_dir: str | None = None  # where all results go (runs/<model>); the same command goes on there
    seed: int = 0  # seed of the data order, the held-out part, the sampling and the demo
    # the stages
    sft: bool | None = None  # SFT on the chosen responses first (on for models without a chat template)
    dpo: str | None = None  # folder or hub id of a model trained by DPO; skips that stage
    reverse_dpo: str | None = None  # the same for the reverse model
    # the method
    beta: float = 0.1  # β0 of DPO (Eq. 4)
    reward: Literal["contrastive", "vanilla"] = "contrastive"  # π_dpo against π_dpo⁻ (Eq. 15) or π_ref (11)
    alpha: float | None = None  # a constant α (adaptive, Eq. 16); 0 is plain distillation from DPO
    alpha_r: float | None = None  # r of the adaptive α_t = r·TVD_t + ε (30 on-policy, 20 off-policy)
    off_policy: bool = False  # distil on the chosen responses (Eq. 19), not on the policy's own (Eq. 18)
    init_from: Literal["reference", "dpo"] = "reference"  # where the policy starts
    # optimisation
    sft_learning_rate: float = 1e-5  # peak learning rate of SFT
    dpo_learning_rate: float = 1e-6  # peak learning rate of DPO and reverse DPO
    distill_learning_rate: float = 1e-6  # peak learning rate of the distillation
    sft_epochs: float = 1.0  # passes over the pairs in SFT
    dpo_epochs: float = 1.0  # passes over the pairs in DPO, and in reverse DPO
    distill_epochs: float = 1.0  # passes over the prompts in the distillation
    max_steps: int | None = None  # cap on every stage's optimizer steps
    batch_size: int = 128  # pairs or responses an optimizer step, over all devices
    warmup_ratio: float = 0.1  # part of the steps in which the learning rate rises; it falls linearly after
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    # lengths, speed and memory
    max_length: int | None = None  # prompt and response in tokens (2048, or what the model holds)
    max_prompt_length: int | None = None  # tokens of the prompt (half of max_length)
    tokens_per_micro_batch: int = 8192  # tokens of one forward and backward pass; changes rounding only
    chunk_size: int = 512  # states that output head and loss take at once; changes rounding only
    sampling_batch_size: int = 128  # prompts sampled at once
    gradient_checkpointing: bool = False  # recompute activations in the backward pass, to save memory
    device: str | None = None  # cuda, cuda:1, mps, cpu (the first of cuda, mps, cpu that is there)
    teacher_device: str | None = None  # device of the two frozen models in the distillation (device)
    # evaluation and logs
    eval_pairs: int = 1000  # held-out records for the reward accuracy, at most
    eval_prompts: int = 128  # how many of these prompts every model answers, at most
    judge: str | None = None  # reward model (folder, hub id) that scores the answers; the demo has its truth
    sample_steps: int = 50  # show a response of the model in training every so many steps
    save_steps: int = 100  # write a checkpoint every so many steps


DEMO = dict(
    dataset="demo", alpha_r=5.0, batch_size=64, max_length=64, max_prompt_length=12, eval_prompts=512,
    sft_learning_rate=5e-3, dpo_learning_rate=1e-5, distill_learning_rate=1e-3, sft_epochs=4.5,
    dpo_epochs=2.5, distill_epochs=1.5, sampling_batch_size=256,
)  # fmt: skip
# A run may go on with others of these. Those of speed change rounding, or which responses are drawn.
FREE_SETTINGS = """output_dir judge save_steps sample_steps tokens_per_micro_batch chunk_size
    sampling_batch_size gradient_checkpointing device teacher_device""".split()


class Parser(transformers.HfArgumentParser):
    """The settings as flags. Its errors are one line, as all others."""

    def error(self, message):
        raise BadInput(f"{message}; see --help")


def parse_args(argv=None) -> Args:
    """The command line as Args. Raises BadInput for an unknown or malformed flag."""
    parser = Parser(Args, description=__doc__.split("\n\n")[0], allow_abbrev=False)
    comments = dict(re.findall(r"^    (\w+): .*  # (.+)$", inspect.getsource(Args), re.MULTILINE))
    for action in parser._actions:
        action.help = comments.get(action.dest, action.help)
    if parser.parse_known_args(argv)[0].model == "demo":
        parser.set_defaults(**DEMO)
    return Args(**vars(parser.parse_args(argv)))


# ------------------------------------------------------------------------------------------------------------
# 2  The mathematics. Pure functions on float32 or float64; "..." stands for any leading dimensions, V for the
#    vocabulary. Log-probabilities and KL are in nats.
# ------------------------------------------------------------------------------------------------------------


def token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """log π(token | state), (...), from logits (..., V) and token ids (...)."""
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def implicit_reward(logps: Tensor, base_logps: Tensor, beta: float) -> Tensor:
    """β·(log π − log π_base), (...), of tokens (Eq. 6) or of their sums over responses (Eq. 5, 7).

    With π_ref as the base it is the DPO reward; with the reverse model the contrastive one, r_ctr (Eq. 12).
    """
    return beta * (logps - base_logps)


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta: float) -> Tensor:
    """Eq. 4. −log σ(β0·[log-ratio of chosen − log-ratio of rejected]) of each pair.

    The four arguments (...) are log-probabilities of whole responses, summed over their tokens. Returns
    (...). Called with chosen and rejected swapped it trains the reverse model.
    """
    chosen = implicit_reward(chosen_logps, ref_chosen_logps, beta)
    rejected = implicit_reward(rejected_logps, ref_rejected_logps, beta)
    return -F.logsigmoid(chosen - rejected)


def total_variation(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """½ Σ_v |p(v) − q(v)| of the distributions that two logits (..., V) stand for: (...), in [0, 1]."""
    difference = p_logits.softmax(-1) - q_logits.softmax(-1)
    return 0.5 * torch.linalg.vector_norm(difference, ord=1, dim=-1)


def adaptive_alpha(dpo_logits: Tensor, base_logits: Tensor, r: float, eps: float = 1e-3) -> Tensor:
    """Eq. 16. α_t = r·TVD(π_dpo, π_base) + ε: (...), in [ε, r + ε]. Logits are (..., V).

    Far where the two models disagree (the token matters for the reward), hardly at all where they agree.
    """
    return r * total_variation(dpo_logits, base_logits) + eps


def token_beta(alpha: Tensor, beta: float) -> Tensor:
    """Eq. 17. β_t = β0/α_t, (...): the KL coefficient for which α_t is optimal, and the loss's weight.

    Where α_t is 0 there is no such coefficient, and the weight is 1: plain distillation.
    """
    return torch.where(alpha > 0, beta / alpha, 1.0)


def teacher_logits(anchor_logits: Tensor, difference: Tensor, alpha: Tensor) -> Tensor:
    """Eq. 11, 15, 17. z* = z_anchor + α·difference, with difference = z_dpo − z_base: (..., V), with α (...).

    The contrastive teacher has anchor = dpo and base = reverse; the vanilla one has the reference in both
    places.
    """
    return torch.addcmul(anchor_logits, alpha.unsqueeze(-1), difference)


def implausible_mass(target_logits: Tensor, dpo_logits: Tensor) -> Tensor:
    """What the teacher gives to tokens of which π_dpo gives less than 0.001: (..., V), (..., V) → (...).

    It tells before any distillation whether α is too large. Where neither model ever goes, their difference
    is an accident of training, and α times it can lift an impossible token to the top: the language breaks.
    """
    rare = dpo_logits.softmax(-1) < 1e-3
    return target_logits.softmax(-1).mul_(rare).sum(-1)


def reverse_kl(logits: Tensor, target_logits: Tensor) -> Tensor:
    """KL(π ‖ target) = Σ_v π(v)·(log π(v) − log target(v)), whole vocabulary: (..., V), (..., V) → (...).

    In log-probabilities throughout, so it is finite even where a probability underflows to 0. The gradient by
    the logits has a closed form, π ⊙ (log π − log target − KL); the target gets none.
    """
    return ReverseKL.apply(logits, target_logits)


class ReverseKL(torch.autograd.Function):
    """`reverse_kl`, in half of the passes over the vocabulary that autograd would need."""

    @staticmethod
    def forward(ctx, logits, target_logits):
        logps = logits.log_softmax(-1)
        p = logps.exp()
        log_ratio = logps.sub_(target_logits.log_softmax(-1))
        kl = torch.linalg.vecdot(p, log_ratio)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(log_ratio.sub_(kl.unsqueeze(-1)).mul_(p))
        return kl

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.unsqueeze(-1), None


# ------------------------------------------------------------------------------------------------------------
# 3  The losses and the teacher. Each loss maps (lm, batch, scale) to sums over its examples (responses
#    or pairs): the loss and what is worth watching. It leaves scale·∇loss in the weights' .grad. The training
#    loop passes scale = 1 / (examples of the whole optimisation batch), so neither micro-batches nor the
#    number of processes change the gradient of given examples.
# ------------------------------------------------------------------------------------------------------------


def sft_batch_loss(lm: LM, batch: Batch, scale: float) -> dict:
    """Negative log-likelihood: the mean over a response's tokens, summed over responses."""

    def chunk_loss(logits, rows):
        nll = -token_logps(logits, batch.targets[rows])
        return {"loss": (batch.weights[rows] * nll).sum()}

    return backward_in_chunks(lm, lm.hidden(batch), chunk_loss, scale)


def dpo_batch_loss(lm: LM, batch: Batch, scale: float, beta: float) -> dict:
    """Eq. 4, summed over pairs. The batch holds the chosen responses, then the rejected ones in like order.

    The loss is no sum over states, but its gradient is: Σ_t (∂L/∂log π(y|x))·∇log π(y_t|s_t). So the head
    runs once for the responses' log-probabilities, and once more for the gradient, weighted by these slopes.
    """
    hidden = lm.hidden(batch)
    logps = response_sums(state_logps(lm, batch, hidden), batch).requires_grad_()
    chosen_logps, rejected_logps = logps.chunk(2)
    ref_chosen_logps, ref_rejected_logps = batch.ref_logps.chunk(2)
    losses = dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    (slopes,) = torch.autograd.grad(losses.sum(), logps)

    def chunk_loss(logits, rows):
        slope = slopes[batch.response[rows]]
        return {"loss": (slope * token_logps(logits, batch.targets[rows])).sum()}

    backward_in_chunks(lm, hidden, chunk_loss, scale)
    rewards = implicit_reward(logps.detach(), batch.ref_logps, beta)
    reward_chosen, reward_rejected = rewards.chunk(2)
    margin = reward_chosen - reward_rejected
    return {
        "loss": losses.sum().detach(),
        "accuracy": (margin > 0).float().sum(),
        "margin": margin.sum(),
        "reward_chosen": reward_chosen.sum(),
        "reward_rejected": reward_rejected.sum(),
    }


class TeacherLogits(NamedTuple):
    """What the teacher makes of n states: logits (n, V) of π_dpo, of the base and of π*, and α (n,)."""

    dpo: Tensor
    base: Tensor
    target: Tensor
    alpha: Tensor


class Teacher:
    """π* = softmax(z_anchor + α·(z_dpo − z_base)) from two frozen models, of which one is also the anchor.

    `load` maps "dpo", "reverse_dpo" or "reference" to an LM; it is called when the teacher is first needed.
    """

    def __init__(self, args: Args, load: Callable):
        self.args, self.load = args, load
        self.contrastive = args.reward == "contrastive"
        self.base = "reverse_dpo" if self.contrastive else "reference"
        self.reward_name = "reward" if self.contrastive else "reward_dpo"

    @functools.cached_property
    def lms(self) -> dict:
        return {"dpo": self.load("dpo"), "base": self.load(self.base)}

    @torch.no_grad()
    def hidden(self, batch: Batch) -> dict:
        """Each model's hidden states, (N, hidden size), on the teacher's device."""
        return {name: lm.hidden(batch) for name, lm in self.lms.items()}

    @torch.no_grad()
    def logits(self, hidden: dict, rows: slice) -> TeacherLogits:
        """The teacher at the states `rows`. No gradient flows through it, nor through α."""
        z = {name: lm.logits(hidden[name][rows]) for name, lm in self.lms.items()}
        if self.args.alpha is None:
            alpha = adaptive_alpha(z["dpo"], z["base"], self.args.alpha_r)
        else:
            alpha = torch.full_like(z["dpo"][:, 0], self.args.alpha)
        anchor = z["dpo"] if self.contrastive else z["base"]
        target = teacher_logits(anchor, z["dpo"] - z["base"], alpha)
        return TeacherLogits(z["dpo"], z["base"], target, alpha)


def distillation_batch_loss(lm: LM, batch: Batch, scale: float, teacher: Teacher) -> dict:
    """Eq. 18 and 19: 1/|y| Σ_t β_t·KL(π_θ ‖ π*), summed over responses.

    Watched, as means over a response's states: α, β_t, the KL to the teacher, in nats a token, and the mass
    that the teacher gives to implausible tokens. As sums over them: the teacher's reward, β0·Σ_t (log π_dpo −
    log π_base)(y_t). On the policy's own responses two more come free: −log π_θ(y_t) estimates its entropy,
    in nats a token, and Σ_t (log π_θ − log π_dpo)(y_t) its KL from π_dpo, in nats a response.
    """
    beta, on_policy = teacher.args.beta, not teacher.args.off_policy
    teacher_hidden = teacher.hidden(batch)  # before the policy's own pass: on two devices they overlap

    def chunk_loss(logits, rows):
        tokens, weight = batch.targets[rows], batch.weights[rows]
        z = teacher.logits(teacher_hidden, rows)
        beta_t = token_beta(z.alpha, beta)
        kl = reverse_kl(logits, z.target)
        dpo_logps = token_logps(z.dpo, tokens)
        sums = {
            "loss": (weight * beta_t * kl).sum(),
            "alpha": (weight * z.alpha).sum(),
            "beta_t": (weight * beta_t).sum(),
            "kl_teacher": (weight * kl).sum(),
            "implausible": (weight * implausible_mass(z.target, z.dpo)).sum(),
            teacher.reward_name: implicit_reward(dpo_logps, token_logps(z.base, tokens), beta).sum(),
        }
        if on_policy:
            own_logps = token_logps(logits.detach(), tokens)
            sums["entropy"] = -(weight * own_logps).sum()
            sums["kl_dpo"] = (own_logps - dpo_logps).sum()
        return sums

    return backward_in_chunks(lm, lm.hidden(batch), chunk_loss, scale)


# ------------------------------------------------------------------------------------------------------------
# 4  The algorithm.
# ------------------------------------------------------------------------------------------------------------


def align(args: Args) -> dict:
    """Run every stage that is not finished; leave models, metrics, samples and results in the output folder.

    Returns what results.json holds (on the other processes {}). Raises BadInput before any training, and
    before anything is written, if the settings, the models or the data cannot be used.
    """
    run, train_pairs, test_pairs = set_up(args)
    args = run.args  # with every default filled in

    # π_ref: a base model first learns what responses look like
    reference = args.model
    if args.sft:
        reference = train(
            run, "sft", start=args.model, pairs=train_pairs, examples_of=chosen_responses,
            loss_of=sft_batch_loss, learning_rate=args.sft_learning_rate, epochs=args.sft_epochs,
        )  # fmt: skip

    # π_dpo and π_dpo⁻: DPO on the pairs, and on the swapped pairs; one pass of the reference serves both
    contrastive = args.reward == "contrastive"
    if not args.dpo or (contrastive and not args.reverse_dpo):
        train_pairs = add_reference_logps(run, reference, train_pairs)
    train_dpo = partial(
        train, run, start=reference, pairs=train_pairs, loss_of=partial(dpo_batch_loss, beta=args.beta),
        learning_rate=args.dpo_learning_rate, epochs=args.dpo_epochs,
    )  # fmt: skip
    folders = {"reference": reference}
    folders["dpo"] = args.dpo or train_dpo("dpo", examples_of=both_responses)
    if contrastive:
        folders["reverse_dpo"] = args.reverse_dpo or train_dpo("reverse_dpo", examples_of=swapped_responses)

    # π_θ: distilled from the extrapolated teacher on its own responses, or on the chosen ones
    teacher = Teacher(args, lambda name: load_lm(run, folders[name], run.teacher_device))
    folders["policy"] = train(
        run, "policy", start=folders[args.init_from], pairs=train_pairs,
        examples_of=chosen_responses if args.off_policy else own_responses,
        loss_of=partial(distillation_batch_loss, teacher=teacher), learning_rate=args.distill_learning_rate,
        epochs=args.distill_epochs,
    )  # fmt: skip

    del teacher  # its memory is the evaluation's
    return evaluate(run, folders, test_pairs) if run.rank == 0 else {}


# ------------------------------------------------------------------------------------------------------------
# 5  The training loop that all stages share, what a step trains on, and sampling. A step is a pure function
#    of the weights, the optimizer and its number: the data's order is seeded by (seed, epoch), sampling by
#    (seed, stage, step, rank), so a checkpoint needs no random state.
# ------------------------------------------------------------------------------------------------------------


def train(
    run: Run, stage: str, start: str, pairs, examples_of: Callable, loss_of: Callable, learning_rate: float,
    epochs: float,
) -> str:  # fmt: skip
    """Train a copy of the model `start` (folder or hub id) and return its folder, <output_dir>/<stage>.

    `examples_of` says what a step trains on (below), `loss_of` with which loss (section 3). AdamW, linear
    warm-up then linear decay, gradients clipped to `max_grad_norm`. A finished stage is not repeated; one
    under way goes on from its last checkpoint. Raises BadInput when a loss, a gradient or a weight is not
    finite; nothing of that step is kept.
    """
    args, folder = run.args, run.out / stage
    if folder.exists():
        run.say(f"{stage}: finished before, in {folder}")
        return str(folder)
    lm = load_lm(run, start)
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    batch_size = min(args.batch_size, len(pairs))
    steps = math.ceil(epochs * len(pairs) / batch_size)
    steps = min(steps, args.max_steps or steps)
    first = load_checkpoint(run, stage, lm.model, optimizer)
    cut_metrics(run, stage, first)

    with run.bar(range(first, steps), stage, initial=first, total=steps) as bar:
        for step in bar:
            began = time.time()
            torch.manual_seed(seed_of(args.seed, stage, step, run.rank))
            rows = rows_of_step(run, pairs, step, batch_size)
            examples, sums = examples_of(run, lm, rows)
            sums["tokens"] = sum(len(response) for example in examples for response in example)
            lm.model.train(args.gradient_checkpointing)  # layers recompute activations in training mode only
            for _, batch in micro_batches(run, examples):
                add_up(sums, loss_of(lm, batch, scale=1 / batch_size))
            lm.model.eval()  # in which sampling has its cache
            sum_gradients(run, lm.model)
            grad_norm = torch.nn.utils.clip_grad_norm_(lm.model.parameters(), args.max_grad_norm)
            rate = learning_rate * warmup_then_decay(step, steps, args.warmup_ratio)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()

            line = means_over_ranks(run, sums, batch_size)
            line["grad_norm"] = grad_norm.item()
            weight_norm = torch.nn.utils.get_total_norm(list(lm.model.parameters())).item()
            if not all(map(math.isfinite, [*line.values(), weight_norm])):
                records = sorted(row["record"] for row in rows)
                what = f"weights' norm {weight_norm}, {line}; look at them or lower the learning rate"
                raise BadInput(f"{stage}: not finite at step {step + 1} (records {records}): {what}")
            bar.set_postfix_str(", ".join(f"{name} {value:.3g}" for name, value in line.items()))
            line["learning_rate"] = rate
            line["tokens_per_s"] = round(line["tokens"] * batch_size / (time.time() - began))
            if run.rank == 0:
                with open(run.out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps({"stage": stage, "step": step + 1, **line}) + "\n")
                if (step + 1) % args.sample_steps == 0:
                    show_sample(run, lm, rows[len(rows) // 2]["prompt"], f"{stage}, step {step + 1}")
            if (step + 1) % args.save_steps == 0:
                save_checkpoint(run, stage, lm.model, optimizer, step + 1)
    save_model(run, lm.model, folder)
    return str(folder)


def show_sample(run: Run, lm: LM, prompt: list, title: str) -> None:
    """Print a response of the model in training, so that one sees what is being trained."""
    most = min(64, run.args.max_length - run.args.max_prompt_length)
    (tokens,) = sample(run, lm, [prompt], most)
    prompt_text, response = run.tokenizer.batch_decode([prompt, tokens])
    run.say(f"{title}: {prompt_text[-60:]!r} → {response!r}")


def warmup_then_decay(step: int, steps: int, warmup_ratio: float) -> float:
    """The learning rate as a part of its peak: a linear rise over the first steps, then a linear fall."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / (steps - warmup)


def rows_of_step(run: Run, pairs, step: int, batch_size: int) -> list:
    """This rank's records of one step. They are dealt out by length, so that ranks get like shares."""
    indices = batch_indices(step, len(pairs), batch_size, run.args.seed)
    rows = pairs.select(indices).to_list()
    rows.sort(key=lambda row: len(row["prompt"]) + len(row["chosen"]))
    return rows[run.rank :: run.world]


def batch_indices(step: int, n: int, batch_size: int, seed: int) -> list:
    """Indices of one step's records: consecutive ones of a new seeded permutation of 0..n−1 each epoch."""
    first, order = step * batch_size, []
    for epoch in range(first // n, (first + batch_size - 1) // n + 1):
        generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
        order += torch.randperm(n, generator=generator).tolist()
    return order[first % n : first % n + batch_size]


# What a step trains on. Each maps (run, lm, rows of the data) to examples, which are lists of Responses that
# stay together, and to a dict of sums over them that are logged.


def chosen_responses(run: Run, lm: LM, rows: list) -> tuple[list, dict]:
    """The data's chosen responses: SFT, and Eq. 19."""
    return [[Response(row["prompt"], row["chosen"])] for row in rows], {}


def both_responses(run: Run, lm: LM, rows: list) -> tuple[list, dict]:
    """The pairs, with log π_ref of each response where it is known: DPO."""
    examples = []
    for row in rows:
        chosen = Response(row["prompt"], row["chosen"], row.get("ref_chosen", 0.0))
        rejected = Response(row["prompt"], row["rejected"], row.get("ref_rejected", 0.0))
        examples.append([chosen, rejected])
    return examples, {}


def swapped_responses(run: Run, lm: LM, rows: list) -> tuple[list, dict]:
    """The pairs with chosen and rejected swapped: reverse DPO."""
    examples, _ = both_responses(run, lm, rows)
    return [[rejected, chosen] for chosen, rejected in examples], {}


def own_responses(run: Run, lm: LM, rows: list) -> tuple[list, dict]:
    """One response of the policy to each prompt, ŷ ~ π_θ(·|x): Eq. 18. Logged: length, the demo's truth."""
    sampled = sample(run, lm, [row["prompt"] for row in rows])
    examples = [[Response(row["prompt"], tokens)] for row, tokens in zip(rows, sampled)]
    sums = {"length": sum(map(len, sampled))}
    for name, values in truth(run, rows, sampled).items():
        sums[name] = sum(values)
    return examples, sums


@torch.no_grad()
def sample(run: Run, lm: LM, prompts: list, most: int | None = None) -> list:
    """One response to each prompt (lists of ids → lists of ids), drawn from the model's own distribution.

    A response keeps its end token; one that the limit of `most` tokens cut has none. Prompts are grouped by
    length and padded on the left. The random state is torch's global one: seed it to get the same responses.
    """
    most = most or run.args.max_length - run.args.max_prompt_length
    config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=most, eos_token_id=run.stop_ids,
        pad_token_id=run.tokenizer.pad_token_id,
    )  # fmt: skip
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    outputs = [None] * len(prompts)
    for start in range(0, len(order), run.args.sampling_batch_size):
        group = order[start : start + run.args.sampling_batch_size]
        padded = run.tokenizer.pad(
            {"input_ids": [prompts[i] for i in group]}, padding_side="left", return_tensors="pt"
        ).to(lm.model.device)
        output = lm.generate(padded.input_ids, padded.attention_mask, config)
        for i, tokens in zip(group, output[:, padded.input_ids.shape[1] :].tolist()):
            ends = [t + 1 for t, token in enumerate(tokens) if token in run.stop_ids]
            outputs[i] = tokens[: ends[0]] if ends else tokens
    return outputs


# ------------------------------------------------------------------------------------------------------------
# 6  A language model taken apart. Logits over the vocabulary are what costs memory (50,257 numbers a state
#    for GPT-2 against 768 of hidden state), so they are never made for a whole batch: the body runs first,
#    the hidden states of the response states alone are kept, and output head and loss go over them in chunks.
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Response:
    """A response and its prompt as token ids. It ends in the end token, unless a length limit cut it."""

    prompt: list  # at least one token
    tokens: list  # at least one token
    ref_logps: float = 0.0  # log π_ref(y|x), for DPO

    def __len__(self) -> int:
        return len(self.prompt) + len(self.tokens)


@dataclass
class Batch:
    """B responses behind their prompts, padded on the right to length T, and their N = Σ|y| response states.

    The logits at position i predict token i + 1, so a response's |y| states start at the last prompt
    position. They are listed from lengths, never by comparing ids with the pad id, which may be the end token
    too. There is no attention mask: in a causal model no response state sees the padding on its right.
    """

    input_ids: Tensor  # (B, T)
    states: Tensor  # (N,) places of the response states in the flattened (B·T)
    targets: Tensor  # (N,) the response token that each state predicts
    response: Tensor  # (N,) the response that each state belongs to, 0..B−1
    weights: Tensor  # (N,) 1/|y| of that response
    lengths: Tensor  # (B,) |y|
    ref_logps: Tensor  # (B,)


def collate(examples: list, pad_id: int, device="cpu") -> Batch:
    """[[Response, ...], ...] → Batch: the first response of every example, then the second ones."""
    responses = [response for part in zip(*examples, strict=True) for response in part]
    rows = [torch.tensor(response.prompt + response.tokens) for response in responses]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    states = []
    for b, response in enumerate(responses):
        first = b * input_ids.shape[1] + len(response.prompt) - 1
        states += range(first, first + len(response.tokens))
    states = torch.tensor(states)
    lengths = torch.tensor([len(response.tokens) for response in responses])
    owner = torch.arange(len(responses)).repeat_interleave(lengths)
    batch = Batch(
        input_ids=input_ids,
        states=states,
        targets=input_ids.flatten()[states + 1],
        response=owner,
        weights=(1 / lengths)[owner],
        lengths=lengths,
        ref_logps=torch.tensor([response.ref_logps for response in responses]),
    )
    if torch.device(device).type == "cuda":  # from pinned memory, or the copies wait for all earlier work
        batch = Batch(**{name: tensor.pin_memory() for name, tensor in vars(batch).items()})
    return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(batch).items()})


def micro_batches(run: Run, examples: list):
    """Yield (indices of examples, Batch) until every example had its turn.

    Examples are sorted by length and cut where a micro-batch would pad to more than `tokens_per_micro_batch`
    tokens. The responses of one example stay together; one that is longer than that is a micro-batch of its
    own.
    """
    width = [max(map(len, example)) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: -width[i])
    while order:
        tokens_each = len(examples[order[0]]) * width[order[0]]  # padded to the longest
        group = order[: max(1, run.args.tokens_per_micro_batch // tokens_each)]
        yield group, collate([examples[i] for i in group], run.tokenizer.pad_token_id, run.device)
        order = order[len(group) :]


class LM:
    """A Hugging Face causal LM as two maps: `hidden` (tokens → states) and `logits` (states → logits).

    With `head_device` the output head is copied to that device, and hidden states are sent there chunk by
    chunk: a teacher on a device of its own moves hidden-size numbers a state instead of vocabulary-size ones.
    """

    def __init__(self, model, chunk_size: int = 512, head_device=None):
        self.model, self.chunk_size = model.eval(), chunk_size
        self.head = model.get_output_embeddings()
        if head_device is not None and head_device != self.head.weight.device:
            self.head = copy.deepcopy(self.head).to(head_device)
        config = model.config.get_text_config()
        self.scale = getattr(config, "logit_scale", None) or 1.0
        self.scale /= getattr(config, "logits_scaling", None) or 1.0
        self.softcap = getattr(config, "final_logit_softcapping", None)

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states of the response states: (N, hidden size)."""
        device = self.model.device
        output = self.model.base_model(input_ids=batch.input_ids.to(device), use_cache=False)
        return output.last_hidden_state.flatten(0, 1).index_select(0, batch.states.to(device))

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden size) → (n, V), scaled and capped as the model itself does."""
        logits = self.head(hidden.to(self.head.weight.device, non_blocking=True)).float()
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def generate(self, input_ids: Tensor, attention_mask: Tensor, config):
        """model.generate() by `config` alone. Prompts (B, T) are padded on the left, where the mask is 0.

        What it leaves unset, generate() would take from the checkpoint's own config: a repetition penalty,
        say.
        """
        checkpoint_config, self.model.generation_config = self.model.generation_config, config
        output = self.model.generate(input_ids, attention_mask=attention_mask, generation_config=config)
        self.model.generation_config = checkpoint_config
        return output

    def chunks(self, hidden: Tensor) -> list:
        """Slices of at most `chunk_size` states that cover hidden (N, hidden size)."""
        return [slice(start, start + self.chunk_size) for start in range(0, len(hidden), self.chunk_size)]


def backward_in_chunks(lm: LM, hidden: Tensor, chunk_loss: Callable, scale: float) -> dict:
    """The sums of chunk_loss(logits, rows) over all chunks; leaves scale·∇(sum of "loss") in .grad.

    A chunk's gradient is taken at once, down to its hidden states (N, hidden size), so that no more than one
    chunk's logits are alive; one backward pass through the body follows. Exact, because the loss is a sum
    over states.
    """
    sums, hidden_grad = {}, torch.empty_like(hidden)
    for rows in lm.chunks(hidden):
        chunk = hidden[rows].detach().requires_grad_()
        values = chunk_loss(lm.logits(chunk), rows)
        (scale * values["loss"]).backward()
        hidden_grad[rows] = chunk.grad
        add_up(sums, {name: value.detach() for name, value in values.items()})
    hidden.backward(hidden_grad)
    return sums


@torch.no_grad()
def state_logps(lm: LM, batch: Batch, hidden: Tensor) -> Tensor:
    """log π(y_t|s_t) at every response state, (N,), from hidden = lm.hidden(batch). No gradient."""
    parts = [token_logps(lm.logits(hidden[rows]), batch.targets[rows]) for rows in lm.chunks(hidden)]
    return torch.cat(parts)


def response_sums(values: Tensor, batch: Batch) -> Tensor:
    """Values of states (N,) → their sums over each response (B,)."""
    return values.new_zeros(len(batch.lengths)).index_add_(0, batch.response, values)


def add_up(sums: dict, values: dict) -> None:
    """Add values to the sums of the same names, in place."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value


# ------------------------------------------------------------------------------------------------------------
# 7  Data: from any preference format to token ids.
# ------------------------------------------------------------------------------------------------------------

FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
ASSISTANT = "\n\nAssistant:"


def load_pairs(run: Run) -> tuple:
    """(training pairs, held-out pairs) as the settings say, tokenized. Raises BadInput if either is empty.

    A data set of pairs has the columns prompt, chosen and rejected (token ids), record (its number in the
    source, from 0) and instruction (the prompt as people read it).
    """
    args = run.args
    train_records, test_records = read_records(args)
    if not test_records:
        with using(f"--dataset {args.dataset} has no test split, and no tenth of it can be held out"):
            parts = train_records.train_test_split(test_size=0.1, seed=args.seed)
        train_records, test_records = parts["train"], parts["test"]
        run.say(f"{args.dataset} has no test split: a tenth is held out, {len(test_records):,} records")
    train_pairs = encode(run, train_records, args.limit, use="train")
    test_pairs = encode(run, test_records, args.eval_pairs, use="evaluate")
    return train_pairs, test_pairs


def read_records(args: Args) -> tuple:
    """(training records, held-out records or None) of a local file or folder, a hub data set or the demo.

    Of the splits of a hub data set only the two that are needed are fetched: there may be many more.
    """
    if args.dataset == "demo":
        parts = demo_records(8192, args.seed), demo_records(1024, args.seed + 10**6)
        return tuple(numbered(datasets.Dataset.from_list(records)) for records in parts)
    name, config = args.dataset, ""
    if not os.path.exists(name):  # an existing path may hold a colon of its own
        name, _, config = name.partition(":")
    kind = FILE_KINDS.get(Path(name.removesuffix(".gz")).suffix.lower())
    options = {"path": kind or name, "name": config or None}
    if kind:
        options["data_files"] = name
    if kind == "csv":  # as text, or pandas takes "NA" for a missing value
        options["converters"] = dict.fromkeys(("prompt", "chosen", "rejected"), str)
        options["keep_default_na"] = False
    with using(f"--dataset {args.dataset} cannot be read", f"datasets/{name}"):
        if not kind and not os.path.exists(name):  # says why, where it cannot be had: gated, private, no hub
            fetch(name, repo_type="dataset", allow_patterns="README.md")
        builder = datasets.load_dataset_builder(**options)
        files = builder.config.data_files  # none on an offline machine, which has what it has in its cache
        train_split, test_split = choose_splits(args, list(files or builder.info.splits))
        if files:
            options["data_files"] = {split: files[split] for split in (train_split, test_split) if split}
        splits = datasets.load_dataset(**options, verification_mode="no_checks")
    columns = splits[train_split].column_names
    if not {"chosen", "rejected"} <= set(columns):
        raise BadInput(f"--dataset {name} needs columns 'chosen' and 'rejected', it has {columns}")
    test_records = numbered(splits[test_split]) if test_split else None
    return numbered(splits[train_split]), test_records


def numbered(records):
    """The columns that matter, and `record`, which numbers the records of a source from 0."""
    columns = [name for name in ("prompt", "chosen", "rejected") if name in records.column_names]
    return records.select_columns(columns).add_column("record", list(range(len(records))))


def choose_splits(args: Args, names: list) -> tuple:
    """(training split, held-out split or None) of those there are. Raises BadInput for one that is not."""
    train_split, test_split = args.train_split, args.test_split
    if not train_split:
        train_split = "train_prefs" if "train_prefs" in names else "train"
    if not test_split:
        usual = [name for name in ("test_prefs", "test") if name in names and name != train_split]
        test_split = usual[0] if usual else None
    for flag, split in (("train_split", train_split), ("test_split", test_split)):
        if split and split not in names:
            raise BadInput(f"--{flag} {split}: {args.dataset} has only {', '.join(names)}; name one of these")
    return train_split, test_split


def encode(run: Run, records, most: int | None, use: str):
    """Tokenize the first `most` records; leave out pairs of no use, cut long ones, and say how many."""
    options = {"keep_in_memory": True, "load_from_cache_file": False}
    records = records.select(range(len(records))[:most])
    pairs = records.map(partial(render, run), desc="reading", **options)
    if records:
        pairs = pairs.map(partial(tokenize, run), batched=True, desc="tokenizing", **options)
        pairs = pairs.select([i for i, usable in enumerate(pairs["usable"]) if usable])
    if len(pairs) == 0:
        raise BadInput(f"--dataset {run.args.dataset}: no usable pair to {use} on; add pairs")
    run.say(
        f"{run.args.dataset}: {len(pairs):,} pairs to {use} on, {sum(pairs['cut'])} of them cut; left out "
        f"{len(records) - len(pairs)} with an empty response, identical responses or different prompts"
    )
    return pairs.remove_columns(["usable", "cut", "text"])


def render(run: Run, record: dict) -> dict:
    """A record → the texts to tokenize. Raises BadInput naming its place."""
    try:
        prompt, chosen, rejected = split_record(record)
        text = render_prompt(prompt, chosen, run.tokenizer)
    except Exception as error:  # ours, or whatever the model's chat template raises
        place = f"{run.args.dataset}, record {record['record']} (the first is 0)"
        raise BadInput(f"{place}: {one_line(error)}; mend or remove it") from error
    if isinstance(prompt, list):
        prompt = "\n\n".join(message["content"] for message in prompt)
    usable = bool(chosen.strip() and rejected.strip())
    return {"instruction": prompt, "text": text, "chosen": chosen, "rejected": rejected, "usable": usable}


def tokenize(run: Run, columns: dict) -> dict:
    """Texts → ids. Prompt and responses apart, so that no merge crosses the boundary.

    A prompt that is too long loses its beginning, a response its end.
    """
    args, stop = run.args, run.stop_ids[:1]
    found = {"prompt": [], "chosen": [], "rejected": [], "usable": [], "cut": []}
    texts = (columns["text"], columns["chosen"], columns["rejected"])
    ids = [run.tokenizer(column, add_special_tokens=False).input_ids for column in texts]
    most = args.max_prompt_length - len(run.first_ids)
    for prompt, chosen, rejected, usable in zip(*ids, columns["usable"]):
        start = run.first_ids + prompt[max(0, len(prompt) - most) :]
        if not start:  # an empty prompt still needs a state to predict from
            start = stop
        room = args.max_length - len(start)
        chosen, rejected = chosen + stop, rejected + stop
        found["cut"].append(len(prompt) > most or max(len(chosen), len(rejected)) > room)
        chosen, rejected = chosen[:room], rejected[:room]
        found["prompt"].append(start)
        found["chosen"].append(chosen)
        found["rejected"].append(rejected)
        found["usable"].append(usable and chosen != rejected)
    return found


def split_record(record: dict) -> tuple:
    """A record of any of TRL's preference formats, or of hh-rlhf → (prompt, chosen text, rejected text).

    The prompt is text, or a list of {"role", "content"} messages. The rejected text is "" if the two
    conversations have not the same prompt. Raises ValueError for a record in none of the formats.
    """
    prompt, chosen, rejected = (checked(record, key) for key in ("prompt", "chosen", "rejected"))
    if type(chosen) is not type(rejected):
        raise ValueError("one of 'chosen' and 'rejected' is text and the other a conversation")
    if prompt is None and isinstance(chosen, str) and chosen.startswith("\n\nHuman:") and ASSISTANT in chosen:
        chosen, rejected = messages_of(chosen), messages_of(rejected)
    if isinstance(chosen, list):
        if not chosen or not rejected:
            raise ValueError("'chosen' or 'rejected' is a conversation without messages")
        before, answer, other = chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]
        if before != rejected[:-1]:
            other = ""
        if isinstance(prompt, list):
            repeated = before[: len(prompt)] == prompt
        else:
            repeated = len(before) > 0 and before[0]["role"] != "assistant"
            prompt = [{"role": "user", "content": prompt}] if prompt else []
        return (before if repeated else prompt + before), answer, other
    if prompt is None:  # implicit: the longest common prefix, cut back to a word boundary
        prompt = os.path.commonprefix([chosen, rejected])
        if not all(text[len(prompt) :][:1].strip() == "" for text in (chosen, rejected)):
            prompt = re.match(r"(.*(?=\s))?", prompt, re.DOTALL)[0]
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]  # "" if one begins the other
    return prompt, chosen, rejected


def checked(record: dict, key: str):
    """A field: text, or a list of messages, of which role and content are kept; a prompt may be None."""
    value = record.get(key)
    if value is None and key != "prompt":
        raise ValueError(f"field '{key}' is missing")
    if value is None or isinstance(value, str):
        return value
    try:
        return [{"role": message["role"] + "", "content": message["content"] + ""} for message in value]
    except (TypeError, KeyError):
        raise ValueError(f"field '{key}' is neither text nor messages with role and content") from None


def messages_of(transcript: str) -> list:
    """A transcript like hh-rlhf's, "\\n\\nHuman: … \\n\\nAssistant: …", as messages; the last one answers."""
    before, _, answer = transcript.rpartition(ASSISTANT)
    parts = re.split(r"\n\n(Human|Assistant):", before)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": text.strip()} for who, text in zip(parts[1::2], parts[2::2])]
    return [*turns, {"role": "assistant", "content": answer.strip()}]


def render_prompt(prompt, response: str, tokenizer) -> str:
    """The text before the response: by the model's chat template, or a plain one for a base model."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if isinstance(prompt, list):
        turns = [f"{message['role'].capitalize()}:\n{message['content']}\n\n" for message in prompt]
        return "".join(turns) + "Assistant:\n"
    if prompt and not prompt[-1].isspace() and not response[:1].isspace():
        return prompt + "\n"
    return prompt


def stop_tokens(tokenizer, generation_config) -> list:
    """The ids that end a response. The first is trained on: what the chat template puts after an answer,
    or end-of-sequence. The others stop sampling too: end-of-sequence, and what the checkpoint names."""
    ids = []
    if tokenizer.chat_template:
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "zebra"}]
        after = tokenizer.apply_chat_template(talk, tokenize=False).rpartition("zebra")[2]
        after_ids = tokenizer(after, add_special_tokens=False).input_ids
        added = tokenizer.added_tokens_decoder
        ids = [i for i in after_ids if i in added and added[i].special][:1]
    named = generation_config.eos_token_id
    ids += [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return [i for i in dict.fromkeys(ids) if i is not None]


# ------------------------------------------------------------------------------------------------------------
# 8  The demo world: reviews in plain English whose true token rewards are known.
# ------------------------------------------------------------------------------------------------------------

THINGS = {
    "hotel": "room bed staff breakfast", "cafe": "coffee cake staff music", "film": "plot cast music ending",
    "phone": "screen battery camera sound", "book": "plot style ending cover",
    "game": "plot music graphics sound", "bike": "frame saddle price colour",
    "museum": "building guide shop price",
}  # fmt: skip
VALENCE = {
    "superb": 2, "lovely": 2, "good": 1, "nice": 1, "pleasant": 1, "solid": 1, "fine": 0.5,
    "plain": -0.5, "bad": -1, "dull": -1, "poor": -1, "weak": -1, "awful": -2, "dreadful": -2,
}  # fmt: skip
KINDS = {
    "opinion": list(VALENCE),
    "part": sorted(set(" ".join(THINGS.values()).split())),
    "booster": ["very", "really", "truly"],
    "join": ["and", "but", ","],
}
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}  # other words are their own kind
GRAMMAR = {  # state: {the kinds of words that may follow: the state that each leads to}
    "start": {"the": "the"},
    "the": {"part": "part"},
    "part": {"was": "was"},
    "was": {"not": "not", "booster": "booster", "opinion": "opinion"},
    "not": {"booster": "booster", "opinion": "opinion"},
    "booster": {"opinion": "opinion"},
    "opinion": {"join": "join", ".": "."},
    "join": {"the": "the"},
    ".": {"overall": "overall"},
    "overall": {"it": "it"},
    "it": {"was": "it was"},
    "it was": {"not": "it was not", "booster": "it was booster", "opinion": "verdict"},
    "it was not": {"booster": "it was booster", "opinion": "verdict"},
    "it was booster": {"opinion": "verdict"},
    "verdict": {".": "end"},
    "end": {"<end>": "end"},
}
SHARES = {"not": 0.5, "booster": 0.15, "opinion": 0.35, "join": 0.6, ".": 0.4}  # where a state has a choice
ASKING = ["write a review of the {} .", "how was the {} ?", "what did you think of the {} ?"]
DEMO_WORDS = sorted({*" ".join(ASKING).split(), *THINGS, *KIND_OF, "not", "was", "overall", "it"} - {"{}"})
BROKEN = -2.0


class Word(NamedTuple):
    """What the truth says about a word: its reward, and whether it may stand where it stands."""

    reward: float
    fits: bool


def judge_words(prompt: str, review: str) -> list:
    """A Word for every word of a review, and one for its end, by the grammar that the data is drawn from.

    An opinion earns its valence: "superb" 2; by half more with a booster, but 2 at most; "not" turns its
    sign. Any word that cannot stand where it stands has −2, as the worst opinion has: one that the grammar
    does not have there, a part of another thing than the prompt asks about, a part that was judged before, an
    end in the middle. All other words have 0.
    """
    (thing,) = [word for word in prompt.split() if word in THINGS]
    state, parts_left, judged = "start", THINGS[thing].split(), []
    strength, sign = 1.0, 1.0
    for word in [*review.split(), "<end>"]:
        kind = KIND_OF.get(word, word)
        fits = kind in GRAMMAR[state] and (kind != "part" or word in parts_left)
        reward = 0.0 if fits else BROKEN
        if kind == "was":
            strength, sign = 1.0, 1.0
        elif kind == "not":
            sign = -1.0
        elif kind == "booster":
            strength = 1.5
        elif kind == "part" and fits:
            parts_left.remove(word)
        elif kind == "opinion" and fits:
            reward = sign * max(-2.0, min(2.0, strength * VALENCE[word]))
        judged.append(Word(reward, fits))
        state = GRAMMAR[state].get(kind, state)  # after a word out of place the same may follow as before
    return judged


def well_formed(prompt: str, review: str) -> bool:
    """Whether the grammar could have written it."""
    return all(word.fits for word in judge_words(prompt, review))


def true_reward(prompt: str, review: str) -> float:
    """The mean over a review's opinions, in [-2, 2], so length earns nothing; -2 if it is not well-formed."""
    words = judge_words(prompt, review)
    if not all(word.fits for word in words):
        return BROKEN
    rewards = [word.reward for word in words if word.reward]
    return sum(rewards) / len(rewards)


def truth(run: Run, rows: list, sampled: list) -> dict:
    """The truth about sampled responses to the rows' prompts, a list each; nothing but the demo has it."""
    if run.args.dataset != "demo":
        return {}
    prompts = [row["instruction"] for row in rows]
    reviews = run.tokenizer.batch_decode(sampled, skip_special_tokens=True)
    return {
        "true_reward": list(map(true_reward, prompts, reviews)),
        "well_formed": list(map(well_formed, prompts, reviews)),
    }


def demo_records(n: int, seed: int) -> list:
    """n preference pairs of the demo world; which response is chosen is drawn by Bradley–Terry (Eq. 1)."""
    generator = random.Random(seed)

    def draw_review(thing):
        """A walk through the grammar. Opinions agree with the reviewer's mood, more or less."""
        mood, state, parts_left, words = generator.random(), "start", THINGS[thing].split(), []
        generator.shuffle(parts_left)
        while state != "end":
            kinds = [kind for kind in GRAMMAR[state] if kind != "join" or parts_left]
            (kind,) = generator.choices(kinds, [SHARES.get(kind, 1.0) for kind in kinds])
            if kind == "part":
                word = parts_left.pop()
            elif kind == "opinion":
                good = generator.random() < mood
                word = generator.choice([word for word in VALENCE if (VALENCE[word] > 0) == good])
            else:
                word = generator.choice(KINDS.get(kind, [kind]))
            words.append(word)
            state = GRAMMAR[state][kind]
        return " ".join(words)

    def draw_mixed_review(prompt, thing):
        """A review in which something is good and something bad."""
        while True:
            review = draw_review(thing)
            rewards = [word.reward for word in judge_words(prompt, review)]
            if min(rewards) < 0 < max(rewards):
                return review

    records = []
    for _ in range(n):
        thing = generator.choice(list(THINGS))
        prompt = generator.choice(ASKING).format(thing)
        chosen, rejected = draw_mixed_review(prompt, thing), draw_mixed_review(prompt, thing)
        gap = true_reward(prompt, chosen) - true_reward(prompt, rejected)
        if generator.random() > 1 / (1 + math.exp(-4 * gap)):
            chosen, rejected = rejected, chosen
        records.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return records


def demo_tokenizer():
    """One token a word of the demo world."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *DEMO_WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )


def demo_model(seed: int):
    """A two-layer GPT-2 with random weights, about 0.1M parameters."""
    torch.manual_seed(seed)
    shape = {"vocab_size": len(DEMO_WORDS) + 3, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**shape, bos_token_id=1, eos_token_id=1, tie_word_embeddings=False)
    return transformers.GPT2LMHeadModel(without_dropout(config))


# ------------------------------------------------------------------------------------------------------------
# 9  The reference's log-probabilities; evaluation and report, on one process.
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pair_logps(run: Run, lm: LM, pairs, title: str) -> Tensor:
    """log π of the chosen and of the rejected response of every pair: (n, 2), float32."""
    logps = torch.zeros(len(pairs), 2, device=run.device)
    for start in run.bar(range(0, len(pairs), 64), title, leave=False):
        rows = pairs.select(range(start, min(start + 64, len(pairs)))).to_list()
        examples, _ = both_responses(run, lm, rows)
        for group, batch in micro_batches(run, examples):
            sums = response_sums(state_logps(lm, batch, lm.hidden(batch)), batch)
            logps[[start + i for i in group]] = sums.view(2, -1).T
    return logps


def add_reference_logps(run: Run, reference: str, pairs):
    """The pairs with columns ref_chosen and ref_rejected: log π_ref(y|x), computed once and kept in a file.

    The file is named by the reference's weights and the data, so that another reference never meets old
    values.
    """
    lm = load_lm(run, reference)
    path = run.out / f"reference_logps-{fingerprint(pairs, lm.model):08x}.pt"
    if path.exists():
        logps = torch.load(path, weights_only=True)
    else:
        mine = slice(run.rank, None, run.world)
        logps = torch.zeros(len(pairs), 2, device=run.device)
        logps[mine] = pair_logps(run, lm, pairs.select(range(len(pairs))[mine]), "reference logps")
        logps = run.total(logps).cpu()
        if run.rank == 0:
            with written_aside(path) as aside:
                torch.save(logps, aside)
    pairs = pairs.add_column("ref_chosen", logps[:, 0].tolist())
    return pairs.add_column("ref_rejected", logps[:, 1].tolist())


def evaluate(run: Run, folders: dict, test_pairs) -> dict:
    """Compare π_ref, π_dpo, π_dpo⁻ (if there is one) and the policy; write and print what is found.

    `models` holds means over each model's own responses to held-out prompts (see `sample_and_score`), and how
    many of these are distinct. The judge is the demo's truth or --judge: its mean score and the win rate
    against π_ref's responses, with half of a 95 % interval (`_pm`). `reward_accuracy`: see there.
    """
    path = run.out / "results.json"
    if path.exists():
        run.say(f"evaluation: finished before; to repeat it, delete {path}")
        return json.loads(path.read_text(encoding="utf-8"))
    lms = {name: load_lm(run, folder) for name, folder in folders.items()}
    rows = test_pairs.select(range(len(test_pairs))[: run.args.eval_prompts]).to_list()
    samples = pd.concat([sample_and_score(run, lms, name, rows) for name in lms])
    judge = "true_reward"
    if run.judge:
        judge = "judge"
        samples[judge] = judge_scores(run, samples)
    if judge in samples:
        of_reference = samples[judge].tolist()[: len(rows)] * len(lms)
        samples["win_rate"] = (samples[judge] > of_reference) + 0.5 * (samples[judge] == of_reference)
    groups = samples.groupby("generator", sort=False)
    models = groups.mean(numeric_only=True)
    models["distinct"] = groups["output"].nunique() / len(rows)
    if judge in samples:
        for name in (judge, "win_rate"):
            models[f"{name}_pm"] = 1.96 * groups[name].sem()
    accuracy = reward_accuracy(run, lms, test_pairs)
    results = {"models": models.to_dict("index"), "reward_accuracy": accuracy.to_dict("index")}

    page = PAGE.format(
        title=html.escape(f"AlignDistil: {Path(run.args.model).name} on {Path(run.args.dataset).name}"),
        models=models.to_html(float_format="{:.3f}".format, border=0, index_names=False),
        accuracy=accuracy.to_html(float_format="{:.3f}".format, border=0),
        responses=shaded_responses(run, lms, rows, samples),
    )
    public = samples.drop(columns="tokens").to_dict("records")
    write_json(run, run.out / "samples.json", public)
    with written_aside(run.out / "report.html") as aside:
        aside.write_text(page, encoding="utf-8")
    write_json(run, path, results)  # last: it says that the rest is there
    for table in (models, accuracy):
        run.say("\n" + table.to_string(float_format="{:.3f}".format))
    for i in range(min(3, len(rows))):
        run.say(f"\n{rows[i]['instruction']!r}")
        for row in public[i :: len(rows)]:
            run.say(f"{row['generator']:>11}: {row['output']!r}")
    run.say(f"\nmodels, metrics, samples and results are in {run.out}")
    return results


@torch.no_grad()
def sample_and_score(run: Run, lms: dict, name: str, rows: list):
    """One response of lms[name] to each row's prompt, as a table in AlpacaEval's form with more columns.

    `reward` is Σ_t r_ctr (Eq. 12; with the vanilla teacher `reward_dpo`, Eq. 5), `kl_ref` Σ_t KL(π ‖ π_ref),
    exact over the vocabulary at each state, in nats; `entropy` is the mean over tokens, in nats; `length`
    counts tokens. The demo has its truth beside.
    """
    teacher = Teacher(run.args, lms.get)
    torch.manual_seed(seed_of(run.args.seed, "evaluation", 0))  # the same random numbers for every model
    sampled = sample(run, lms[name], [row["prompt"] for row in rows])
    examples = [[Response(row["prompt"], tokens)] for row, tokens in zip(rows, sampled)]
    sums = torch.zeros(len(rows), 3, device=run.device)
    for group, batch in run.bar(list(micro_batches(run, examples)), f"scoring {name}", leave=False):
        hidden = {key: lm.hidden(batch) for key, lm in lms.items()}
        for chunk in lms[name].chunks(batch.targets):
            tokens = batch.targets[chunk]
            z = {key: lm.logits(hidden[key][chunk]) for key, lm in lms.items()}
            dpo_logps, base_logps = token_logps(z["dpo"], tokens), token_logps(z[teacher.base], tokens)
            reward = implicit_reward(dpo_logps, base_logps, run.args.beta)
            entropy = torch.distributions.Categorical(logits=z[name]).entropy() * batch.weights[chunk]
            values = torch.stack([reward, reverse_kl(z[name], z["reference"]), entropy], -1)
            sums.index_add_(0, torch.tensor(group, device=run.device)[batch.response[chunk]], values)
    instructions = [row["instruction"] for row in rows]
    outputs = run.tokenizer.batch_decode(sampled, skip_special_tokens=True)
    table = pd.DataFrame({"instruction": instructions, "output": outputs, "generator": name})
    table[[teacher.reward_name, "kl_ref", "entropy"]] = sums.tolist()
    table["length"] = [len(tokens) for tokens in sampled]
    for column, values in truth(run, rows, sampled).items():
        table[column] = values
    table["tokens"] = sampled
    return table


@torch.no_grad()
def judge_scores(run: Run, samples) -> list:
    """The judge's score of every sample, by its own chat template, or as a pair of texts if it has none.

    A prompt of several turns is given to it as one message.
    """
    model, tokenizer = run.judge
    model.to(run.device)
    scores = []
    texts = zip(samples["instruction"], samples["output"], strict=True)
    for instruction, output in run.bar(list(texts), "judging", leave=False):
        if tokenizer.chat_template:
            talk = [{"role": "user", "content": instruction}, {"role": "assistant", "content": output}]
            inputs = tokenizer.apply_chat_template(
                talk, truncation=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(instruction, output, truncation=True, return_tensors="pt")
        scores.append(model(**inputs.to(run.device)).logits.item())
    return scores


def reward_accuracy(run: Run, lms: dict, pairs):
    """In what share of held-out pairs a reward prefers the chosen response, ± half of a 95 % interval.

    The rewards: log π_dpo/π_ref (dpo), log π_ref/π_dpo⁻ (reverse), and their sum log π_dpo/π_dpo⁻
    (contrastive).
    """
    logps = {name: pair_logps(run, lms[name], pairs, f"held-out {name}") for name in lms if name != "policy"}
    rewards = {"dpo": logps["dpo"] - logps["reference"]}
    if "reverse_dpo" in logps:
        rewards["reverse"] = logps["reference"] - logps["reverse_dpo"]
        rewards["contrastive"] = logps["dpo"] - logps["reverse_dpo"]
    right = pd.DataFrame({name: (reward[:, 0] > reward[:, 1]).tolist() for name, reward in rewards.items()})
    return pd.DataFrame({"accuracy": right.mean(), "plus_minus": 1.96 * right.sem(), "pairs": len(pairs)})


PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 1000px; margin: auto; padding: 1em }}
td, th {{ padding: 0 .7em; text-align: right }} span {{ white-space: pre-wrap; border-radius: 3px }}
</style></head><body><h1>{title}</h1>{models}<br>{accuracy}
<p>Green: the teacher's reward of the token is positive, red: negative; full colour at ±2 nats of log-ratio.
The tooltip of a token has its reward, α_t, and the teacher's three likeliest tokens.</p>
{responses}</body></html>
"""


def shaded_responses(run: Run, lms: dict, rows: list, samples) -> str:
    """The first prompts with every model's response as HTML, shaded token by token."""
    teacher, lines = Teacher(run.args, lms.get), []
    for i, row in enumerate(rows[:6]):
        lines.append(f"<h3>{html.escape(row['instruction'])}</h3>")
        for name, tokens in samples[["generator", "tokens"]].iloc[i :: len(rows)].itertuples(index=False):
            lines.append(f"<p><b>{name}</b> {shade(run, teacher, Response(row['prompt'], tokens))}</p>")
    return "\n".join(lines)


def shade(run: Run, teacher: Teacher, response: Response) -> str:
    """A response as HTML: tokens shaded by the teacher's reward, with the teacher's view as a tooltip."""
    batch = collate([[response]], run.tokenizer.pad_token_id, run.device)
    z = teacher.logits(teacher.hidden(batch), slice(None))
    log_ratios = token_logps(z.dpo, batch.targets) - token_logps(z.base, batch.targets)
    best = z.target.softmax(-1).topk(3)
    spans, shown = [], ""
    for t, log_ratio in enumerate(log_ratios.tolist()):
        first = [f"{run.tokenizer.decode([i])!r} {p:.2f}" for i, p in zip(best.indices[t], best.values[t])]
        reward = f"{teacher.reward_name} {run.args.beta * log_ratio:+.3f}"
        note = html.escape(f"{reward}, α {z.alpha[t]:.3g}, teacher: {', '.join(first)}")
        colour = "46,160,67" if log_ratio > 0 else "218,54,51"
        opacity = min(1.0, abs(log_ratio) / 2)
        text = run.tokenizer.decode(response.tokens[: t + 1])
        new = "" if text.endswith("\ufffd") else text[len(shown) :]  # a character may be of several tokens
        shown += new
        style = f"background:rgba({colour},{opacity:.2f})"
        spans.append(f'<span style="{style}" title="{note}">{html.escape(new)}</span>')
    return "".join(spans)


# ------------------------------------------------------------------------------------------------------------
# 10  The run: checks, devices and processes, models, files, errors.
# ------------------------------------------------------------------------------------------------------------


def set_up(args: Args) -> tuple:
    """Check all that can be checked before training, open the output folder: (run, two sets of pairs)."""
    check_settings(args)
    run = Run(args)
    transformers.logging.set_verbosity_error()  # errors are told in one line here; the bars of downloads stay
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if run.rank > 0:
        datasets.disable_progress_bars()
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    if run.world > 1:
        dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo")

    lm, tokenizer = load_checked(run, args.model), load_tokenizer(args.model)
    if tokenizer.eos_token_id is None:
        raise BadInput(f"model {args.model}: its tokenizer has no end-of-sequence token; set one")
    run.tokenizer, run.stop_ids = tokenizer, stop_tokens(tokenizer, lm.model.generation_config)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    starts_with_bos = not tokenizer.chat_template and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    run.first_ids = [tokenizer.bos_token_id] if starts_with_bos else []
    for folder in filter(None, (args.dpo, args.reverse_dpo)):
        same_size = len(load_checked(run, folder).head.weight) == len(lm.head.weight)
        if not same_size or load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
            raise BadInput(f"teacher {folder}: its vocabulary or tokenizer is not that of the model")
    fill_in(run, lm.model.config.get_text_config())

    train_pairs, test_pairs = load_pairs(run)
    run.judge = load_judge(args.judge) if args.judge else None  # after the data: datasets hashes all of run
    if min(args.batch_size, len(train_pairs)) < run.world:
        raise BadInput(f"{run.world} processes for a batch of fewer pairs; use fewer")
    open_output(run, train_pairs, test_pairs)
    return run, train_pairs, test_pairs


def check_settings(args: Args) -> None:
    """Raise BadInput for a number out of range. What needs the model or the data is checked in `set_up`."""
    for name, value in asdict(args).items():
        if type(value) in (int, float):
            may_be_0 = name in ("alpha", "alpha_r", "warmup_ratio", "seed")
            highest = 1 if name == "warmup_ratio" else sys.float_info.max
            if not 0 <= value <= highest or (value == 0 and not may_be_0):
                least = "at least 0" if may_be_0 else "more than 0"
                raise BadInput(f"--{name} is {value}: it must be {least} and at most {highest:g}")
    if args.alpha == 0 and args.reward == "vanilla":
        raise BadInput("--alpha 0 --reward vanilla distils the reference into itself: use contrastive")
    if args.model == "demo" and args.dataset != "demo":
        raise BadInput(f"--model demo knows the words of the demo only: name a model for {args.dataset}")


def fill_in(run: Run, config) -> None:
    """Fill in every default that depends on the model. Raises BadInput for lengths that cannot be."""
    args = run.args
    known = [getattr(config, name, None) or 0 for name in ("max_position_embeddings", "max_seq_len")]
    positions = next((number for number in known if number > 0), sys.maxsize)
    if args.max_length is None:
        args.max_length = min(2048, positions)
        if positions < 2048:
            run.say(f"max_length is lowered from 2048 to the model's {positions} positions")
    if args.max_length > positions:
        raise BadInput(f"--max_length {args.max_length} is more than the model's {positions} positions")
    args.max_prompt_length = args.max_prompt_length or args.max_length // 2
    if args.max_length - args.max_prompt_length < 2:
        raise BadInput(f"--max_length {args.max_length} leaves no room behind --max_prompt_length")
    if args.alpha_r is None:
        args.alpha_r = 20.0 if args.off_policy else 30.0
    if args.sft is None:
        args.sft = not run.tokenizer.chat_template


def open_output(run: Run, train_pairs, test_pairs) -> None:
    """Make the output folder, or go on with the run in it. Raises BadInput for other settings or data.

    The folder stays locked as long as the process lives.
    """
    settings, config = asdict(run.args), run.out / "config.json"
    settings["data"] = [fingerprint(train_pairs), fingerprint(test_pairs)]
    with using(f"output folder {run.out} cannot be used: choose another --output_dir"):
        if config.exists():
            saved = json.loads(config.read_text(encoding="utf-8"))
            for name in settings:
                if name not in FREE_SETTINGS and saved.get(name) != settings[name]:
                    change = f"{name} {saved.get(name)} → {settings[name]}"
                    raise BadInput(f"{run.out} is of a run with other settings ({change}); choose another")
        elif any(run.out.glob("[!.]*")):
            raise BadInput(f"output folder {run.out} holds files and no run of this script; choose another")
        if run.rank == 0:
            run.out.mkdir(parents=True, exist_ok=True)
            run.lock = filelock.FileLock(run.out / ".lock", is_singleton=True)
            try:
                run.lock.acquire(blocking=False)
            except filelock.Timeout:
                raise BadInput(f"another process writes into {run.out}: wait, or choose another") from None
    run.barrier()  # all have read before it is written
    write_json(run, config, settings)


class Run:
    """What every stage needs beside mathematics: settings, device, processes, progress bars.

    `set_up` adds the tokenizer, the ids that stop and begin a text, the judge and the folder's lock.
    """

    def __init__(self, args: Args):
        self.args, self.out = args, Path(args.output_dir or f"runs/{Path(args.model).name}")
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.device = self.pick_device(args.device or best.type)
        self.teacher_device = self.pick_device(args.teacher_device or str(self.device))

    @staticmethod
    def pick_device(name: str) -> torch.device:
        """The device of this process. Raises BadInput for one that is not there."""
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        with using(f"device {name} is not there: choose another with --device or --teacher_device"):
            return torch.empty(1, device=name).device

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def bar(self, items, title: str, **options):
        return tqdm(items, title, dynamic_ncols=True, disable=self.rank > 0, **options)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values


def sum_gradients(run: Run, model) -> None:
    """Sum the gradients of all processes. A parameter without one counts as zeros, so that they agree."""
    if run.world > 1:
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            run.total(parameter.grad)


def means_over_ranks(run: Run, sums: dict, n: int) -> dict:
    """Sums of this process → means over the n examples of all processes, as numbers."""
    values = [torch.as_tensor(value, dtype=torch.float32, device=run.device) for value in sums.values()]
    return dict(zip(sums, (run.total(torch.stack(values)) / n).tolist()))


def seed_of(*parts) -> int:
    """One number from a seed and what it is used for; the same on every machine."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def fingerprint(pairs, model=None) -> int:
    """A number that changes with the token ids of the pairs, and with the model's weights."""
    crc = 0
    for table in pairs.with_format("arrow").iter(batch_size=1000):
        for name in ("prompt", "chosen", "rejected"):
            column = table[name].combine_chunks()
            crc = zlib.crc32(column.value_lengths().to_numpy(), zlib.crc32(column.flatten().to_numpy(), crc))
    for tensor in model.state_dict().values() if model else []:
        crc = zlib.crc32(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc


# Models

LOADING = {"dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True}


@functools.cache
def fetch_model(name: str) -> str:
    """The local folder of a model: a folder as it is, a hub id once its files are in the local cache."""
    folder = name
    if not os.path.isdir(name):
        wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        with using(f"model {name} cannot be had", name):
            folder = fetch(name, allow_patterns=wanted, ignore_patterns="*/*")
    if not any(Path(folder).glob("*.safetensors")):
        raise BadInput(f"model {name}: no safetensors file in {folder}; convert it with save_pretrained")
    return folder


def fetch(name: str, **options) -> str:
    """The local folder of a hub repository. Asks again where the hub is busy or broken (429, 503, ...)."""
    download = partial(huggingface_hub.snapshot_download, name, tqdm_class=tqdm, **options)
    for pause in (1, 2, 4, 8):
        try:
            return download()
        except hub_errors.LocalEntryNotFoundError as error:
            if not isinstance(error.__cause__, hub_errors.HfHubHTTPError):
                raise  # no answer at all: a refused connection, an unknown host
            tqdm.write(f"the hub answers {error.__cause__.response.status_code}; trying again in {pause} s")
            time.sleep(pause)
    return download()


def load_tokenizer(name: str):
    if name == "demo":
        return demo_tokenizer()
    with using(f"model {name}: its tokenizer cannot be loaded"):
        return transformers.AutoTokenizer.from_pretrained(fetch_model(name), trust_remote_code=False)


def load_lm(run: Run, name: str, device=None) -> LM:
    """A causal LM in float32 and without dropout, whatever its checkpoint says.

    Two models after DPO differ by little, and α multiplies that; bfloat16 or TF32 products would round it
    away. (TF32 is off in torch unless somebody turns it on.)
    """
    with using(f"model {name} cannot be loaded"):
        if name == "demo":
            model = demo_model(run.args.seed)
        else:
            folder = fetch_model(name)
            config = without_dropout(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False))
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, **LOADING)
        if run.args.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return LM(model.to(device or run.device), run.args.chunk_size, run.device)


def without_dropout(config):
    """The config with no dropout and no other noise; so are configs inside it.

    With gradient checkpointing a model trains in training mode. The checkpoints of a run keep these zeros.
    """
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, 0.0)
        elif isinstance(value, transformers.PreTrainedConfig):
            without_dropout(value)
    return config


def load_checked(run: Run, name: str) -> LM:
    """A model that the user names: loaded and checked."""
    lm = load_lm(run, name)
    check_model(lm, name)
    return lm


@torch.no_grad()
def check_model(lm: LM, name: str) -> None:
    """Raise BadInput unless generate(), with its cache and left padding, draws from head(body(tokens))."""
    prompts = torch.tensor([[0, 0, 0, 3, 4], [5, 6, 7, 8, 9]], device=lm.model.device)
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=8, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    with using(f"model {name} is not supported"):
        output = lm.generate(prompts, (prompts > 0).long(), config)
        first, second = output.sequences.tolist()
        examples = [[Response(first[3:5], first[5:])], [Response(second[:5], second[5:])]]
        ours = lm.logits(lm.hidden(collate(examples, pad_id=0))).log_softmax(-1)
    own = torch.stack(output.logits, 1).flatten(0, 1).log_softmax(-1)
    if not own.isfinite().all():
        raise BadInput(f"model {name}: its logits are not finite; its weights are broken")
    if not (ours - own).abs().max() <= 1e-2:  # so that no number is refused, too
        raise BadInput(f"model {name} is not supported: generate() does not draw from head(body(tokens))")


def load_judge(name: str) -> tuple:
    """(model, tokenizer) of a reward model. Raises BadInput unless it has one output."""
    with using(f"judge {name} cannot be loaded"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(fetch_model(name), **LOADING)
    if model.config.num_labels != 1:
        raise BadInput(f"judge {name} has {model.config.num_labels} outputs: name a reward model; it has one")
    return model.eval(), load_tokenizer(name)


# Files. All but metrics.jsonl are written aside and renamed: a kill leaves them whole or not at all.


@contextlib.contextmanager
def written_aside(path: Path):
    """Give another path to write to; then rename what was written there to `path`."""
    aside = path.with_name(f".{path.name}.partial")
    with using(f"{path} cannot be written: make room and run the same command"):
        if aside.is_dir():
            shutil.rmtree(aside)
        yield aside
        os.replace(aside, path)


def write_json(run: Run, path: Path, content) -> None:
    if run.rank == 0:
        with written_aside(path) as aside:
            aside.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def save_model(run: Run, model, folder: Path) -> None:
    """A Hugging Face checkpoint with its tokenizer; what the stage needed to go on is not needed any more."""
    if run.rank == 0:
        with written_aside(folder) as aside:
            model.save_pretrained(aside)
            run.tokenizer.save_pretrained(aside)
        (run.out / f"checkpoint-{folder.name}.pt").unlink(missing_ok=True)
    run.barrier()


def save_checkpoint(run: Run, stage: str, model, optimizer, step: int) -> None:
    if run.rank == 0:
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        with written_aside(run.out / f"checkpoint-{stage}.pt") as aside:
            torch.save(state, aside)


def load_checkpoint(run: Run, stage: str, model, optimizer) -> int:
    """Put this stage's last checkpoint into model and optimizer; the step to go on at, 0 if there is none."""
    path = run.out / f"checkpoint-{stage}.pt"
    if not path.exists():
        return 0
    state = torch.load(path, map_location=run.device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    run.say(f"{stage}: going on after step {state['step']}")
    return state["step"]


def cut_metrics(run: Run, stage: str, step: int) -> None:
    """Drop what was logged after the last checkpoint and will be done again, and a line that a kill cut."""
    path = run.out / "metrics.jsonl"
    if run.rank == 0 and path.exists():
        kept = []
        for text in path.read_text().splitlines(keepends=True):
            line = json.loads(text) if text.endswith("\n") else None
            if line and (line["stage"] != stage or line["step"] <= step):
                kept.append(text)
        with written_aside(path) as aside:
            aside.write_text("".join(kept))


# Errors


class BadInput(Exception):
    """What the user gave cannot be used. The message is one line: what, where, what to do."""


HUB_ANSWERS = {  # the first kind that fits says it
    hub_errors.GatedRepoError: "gated: ask for access at {page}, then log in",
    hub_errors.RepositoryNotFoundError: "neither a local folder nor on the hub: private or misspelt",
    hub_errors.HFValidationError: "neither a local folder nor a name that the hub could have",
    hub_errors.LocalEntryNotFoundError: "not in the local cache, and the hub is out of reach",
    hub_errors.OfflineModeIsEnabled: "not in the local cache, and the hub is out of reach",
}


@contextlib.contextmanager
def using(what: str, hub_path: str = ""):
    """Turn whatever a library raises into BadInput: what, and why. `hub_path` is its place on the hub."""
    try:
        yield
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise BadInput(f"{what} ({reason(error, hub_path)})") from error


def reason(error: BaseException, hub_path: str) -> str:
    """Why an error was raised, in one line, looked for in what caused it."""
    cause = error
    while cause:
        for kind, text in HUB_ANSWERS.items():
            if isinstance(cause, kind):
                return text.format(page=f"{huggingface_hub.constants.ENDPOINT}/{hub_path}")
        if isinstance(cause, hub_errors.HfHubHTTPError) and cause.response.status_code == 401:
            return "token refused: log in anew, or unset HF_TOKEN"
        error, cause = cause, cause.__cause__
    return one_line(error)


def one_line(error: BaseException) -> str:
    """The beginning of an error's message as one line, or its kind if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def main() -> int:
    """The command line. The exit status is 2 for what cannot be used, 130 after Ctrl-C."""
    try:
        align(parse_args())
        return 0
    except BadInput as error:
        status, message = 2, str(error)
    except torch.OutOfMemoryError as error:
        status, message = 2, f"{one_line(error)}; lower --tokens_per_micro_batch or --sampling_batch_size, "
        message += "or use --gradient_checkpointing: the same command goes on from the last checkpoint"
    except KeyboardInterrupt:
        status, message = 130, "stopped; the same command goes on from the last checkpoint"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    tqdm.write(f"aligndistil.py: error{rank}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
