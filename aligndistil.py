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

Where the paper is silent, settings are those of the authors' code (Adam's betas, the cosine). Where the two
differ, this file follows the paper: the loss covers every response token, the first one too; TVD has its
factor 1/2 (their beta2 is r/2). Unlike theirs, weights and losses are float32 (see --precision), and models
of different vocabularies are refused. Left out: sharded weights (policy and optimizer must fit one device).

Sections: 1 settings, 2 the mathematics, 3 losses and teacher, 4 the algorithm (align), 5 the training loop,
6 a language model taken apart, 7 data, 8 the demo world, 9 evaluation, 10 the run. The method is 1 to 4.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import glob
import importlib
import inspect
import json
import math
import os
import random
import re
import shutil
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# 1  Settings. The defaults are the paper's; DEMO is what the built-in demo sets otherwise. The comment of a
#    setting is its text in --help.


@dataclass
class Args:
    # what to run
    model: str = "demo"  # hub id or local folder of a causal LM; 'demo' is built in, with a preset
    dataset: str = "HuggingFaceH4/ultrafeedback_binarized"  # hub id, id:config, folder, file or 'demo'
    train_split: str | None = None  # split to train on (train_prefs, or else train)
    test_split: str | None = None  # split to evaluate on (test_prefs, test, or a held-out tenth)
    limit: int | None = None  # use at most this many records of the training split (all)
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
    warmup_ratio: float = 0.1  # part of the steps in which the learning rate rises; then a cosine to a tenth
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    # lengths, speed and memory
    max_length: int | None = None  # prompt and response in tokens (2048, or what the model holds)
    max_prompt_length: int | None = None  # tokens of the prompt (half of max_length)
    # on a GPU tf32 and bf16 are about twice as fast, and lose what a short DPO learns: a run tells how much
    precision: Literal["float32", "tf32", "bf16"] = "float32"  # of the matrix products in training
    tokens_per_micro_batch: int = 8192  # tokens of one forward and backward pass; changes rounding only
    sampling_batch_size: int = 128  # prompts sampled at once
    gradient_checkpointing: bool = False  # recompute activations in the backward pass, to save memory
    device: str | None = None  # cuda, cuda:1, mps, cpu (the first of cuda, mps, cpu that is available)
    teacher_device: str | None = None  # device of the frozen models (device)
    # evaluation and logs
    eval_pairs: int = 1000  # held-out records for the reward accuracy, at most
    eval_prompts: int = 128  # how many of these prompts every model answers, at most
    judge: str | None = None  # reward model (folder, hub id) that scores the answers; the demo has its truth
    save_steps: int = 100  # write a checkpoint, and show a sample, every so many steps
    report_to: Literal["none", "wandb", "trackio"] = "none"  # log there, too; the package must be installed


DEMO = {
    "dataset": "demo", "batch_size": 64, "max_length": 48, "max_prompt_length": 12, "eval_prompts": 512,
    "sft_learning_rate": 3e-3, "dpo_learning_rate": 1e-5, "distill_learning_rate": 1e-3, "sft_epochs": 8.0,
    "dpo_epochs": 2.5, "sampling_batch_size": 256,
}  # fmt: skip
# These may differ when a run goes on. Those of speed change rounding, or which responses are drawn.
FREE_SETTINGS = """output_dir judge save_steps report_to device teacher_device gradient_checkpointing
    tokens_per_micro_batch sampling_batch_size""".split()


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line as Args. Exits with status 2 for an unknown or malformed flag."""
    title = __doc__.split("\n\n")[0]
    usage = "aligndistil.py [--help] [--flag value ...]"
    parser = transformers.HfArgumentParser(Args, usage=usage, description=title, allow_abbrev=False)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Args), re.MULTILINE))
    for action in parser._actions:
        action.help = comments.get(action.dest, action.help)
    if parser.parse_known_args(argv)[0].model == "demo":
        parser.set_defaults(**DEMO)
    return Args(**vars(parser.parse_args(argv)))


# ------------------------------------------------------------------------------------------------------------
# 2  The mathematics. Pure functions on float32 or float64; "..." stands for any leading dimensions, V for the
#    vocabulary. Log-probabilities and KL are in nats.


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

    Anchor and base are dpo and reverse for the contrastive teacher, both the reference for the vanilla one.
    """
    return torch.addcmul(anchor_logits, alpha.unsqueeze(-1), difference)


def implausible_mass(target_logits: Tensor, dpo_logits: Tensor) -> Tensor:
    """What the teacher gives to tokens of which π_dpo gives less than 0.001: (..., V), (..., V) → (...).

    It tells before any distillation whether α is too large: where neither model ever goes, their difference
    is an accident of training, and α times it can lift an impossible token to the top.
    """
    rare = dpo_logits.softmax(-1) < 1e-3
    return target_logits.softmax(-1).mul_(rare).sum(-1)


def reverse_kl(logits: Tensor, target_logits: Tensor) -> Tensor:
    """KL(π ‖ target) = Σ_v π(v)·(log π(v) − log target(v)), whole vocabulary: (..., V), (..., V) → (...).

    In log-probabilities throughout, so it is finite even where a probability underflows to 0.
    """
    logps = logits.log_softmax(-1)
    return (logps.exp() * (logps - target_logits.log_softmax(-1))).sum(-1)


# ------------------------------------------------------------------------------------------------------------
# 3  The losses and the teacher. Each loss maps (lm, batch, scale) to sums over its examples (responses
#    or pairs): the loss and what is worth watching. It leaves scale·∇loss in the weights' .grad. With scale =
#    1 / (examples of the step) neither micro-batches nor processes change the gradient of given examples.


def sft_batch_loss(lm: LM, batch: Batch, scale: float) -> dict[str, Tensor]:
    """Negative log-likelihood: the mean over a response's tokens, summed over responses."""

    def chunk_loss(logits, rows):
        nll = -token_logps(logits, batch.targets[rows])
        return {"loss": (batch.weights[rows] * nll).sum()}

    return backward_in_chunks(lm, lm.hidden(batch), chunk_loss, scale)


def dpo_batch_loss(lm: LM, batch: Batch, scale: float, beta: float, reference: LM) -> dict[str, Tensor]:
    """Eq. 4, summed over pairs. The batch holds the chosen responses, then the rejected ones in like order.

    The loss is no sum over states, but its gradient is: Σ_t (∂L/∂log π(y|x))·∇log π(y_t|s_t). So the head
    runs once for the responses' log-probabilities, and once more for the gradient, weighted by these slopes.
    """
    with torch.no_grad():
        ref_logps = response_logps(reference, batch, reference.hidden(batch))
    hidden = lm.hidden(batch)
    logps = response_logps(lm, batch, hidden).requires_grad_()  # a leaf: the loss's graph begins here
    chosen_logps, rejected_logps = logps.chunk(2)
    ref_chosen_logps, ref_rejected_logps = ref_logps.chunk(2)
    losses = dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    (slopes,) = torch.autograd.grad(losses.sum(), logps)

    def chunk_loss(logits, rows):
        slope = slopes[batch.response[rows]]
        return {"loss": (slope * token_logps(logits, batch.targets[rows])).sum()}

    backward_in_chunks(lm, hidden, chunk_loss, scale)
    chosen_rewards, rejected_rewards = implicit_reward(logps, ref_logps, beta).chunk(2)
    watched = {
        "loss": losses,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    return {name: values.detach().sum() for name, values in watched.items()}


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

    def __init__(self, args: Args, load):
        self.args, self.load = args, load
        self.contrastive = args.reward == "contrastive"
        self.base = "reverse_dpo" if self.contrastive else "reference"
        self.reward_name = "reward" if self.contrastive else "reward_dpo"

    @cached_property
    def lms(self) -> dict[str, LM]:
        return {"dpo": self.load("dpo"), "base": self.load(self.base)}

    @torch.no_grad()
    def hidden(self, batch: Batch) -> dict[str, Tensor]:
        """Each model's hidden states, (N, hidden size), on the teacher's device."""
        return {name: lm.hidden(batch) for name, lm in self.lms.items()}

    @torch.no_grad()
    def logits(self, hidden: dict[str, Tensor], rows: slice) -> TeacherLogits:
        """The teacher at the states `rows`. No gradient flows through it, nor through α."""
        z = {name: lm.logits(hidden[name][rows]) for name, lm in self.lms.items()}
        if self.args.alpha is None:
            alpha = adaptive_alpha(z["dpo"], z["base"], self.args.alpha_r)
        else:
            alpha = torch.full_like(z["dpo"][:, 0], self.args.alpha)
        anchor = z["dpo"] if self.contrastive else z["base"]
        target = teacher_logits(anchor, z["dpo"] - z["base"], alpha)
        return TeacherLogits(z["dpo"], z["base"], target, alpha)


def distillation_batch_loss(lm: LM, batch: Batch, scale: float, teacher: Teacher) -> dict[str, Tensor]:
    """Eq. 18 and 19: 1/|y| Σ_t β_t·KL(π_θ ‖ π*), summed over responses.

    Watched, as means over a response's states: the KL to the teacher, in nats a token, the mass that the
    teacher gives to implausible tokens, α and β_t. As sums over them: the teacher's reward, β0·Σ_t
    (log π_dpo − log π_base)(y_t). On the policy's own responses two more come free: −log π_θ(y_t) estimates
    its entropy, in nats a token, and Σ_t (log π_θ − log π_dpo)(y_t) its KL from π_dpo, in nats a response.
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
            "kl_teacher": (weight * kl).sum(),
            "implausible": (weight * implausible_mass(z.target, z.dpo)).sum(),
            "alpha": (weight * z.alpha).sum(),
            "beta_t": (weight * beta_t).sum(),
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


def align(args: Args) -> dict:
    """Run every stage that is not finished; leave models, metrics, samples and results in the output folder.

    Returns what results.json holds ({} on the other processes). Raises BadInput, before anything is written,
    if the settings, the models or the data cannot be used.
    """
    run, train_pairs, test_pairs = set_up(args)
    args = run.args  # with every default filled in
    folders = {"reference": args.model}  # of each model so far
    chosen = partial(data_responses, keys=["chosen"])

    def frozen(name: str) -> LM:
        return load_lm(run, folders[name], run.teacher_device)

    # π_ref: a base model first learns what responses look like
    if args.sft:
        folders["reference"] = train(
            run, "sft", start=args.model, pairs=train_pairs, examples_of=chosen, loss_of=sft_batch_loss,
            learning_rate=args.sft_learning_rate, epochs=args.sft_epochs,
        )  # fmt: skip

    # π_dpo and π_dpo⁻: DPO on the pairs, and on the swapped pairs
    def train_dpo(stage: str, keys: list[str]) -> str:
        return train(
            run, stage, start=folders["reference"], pairs=train_pairs,
            examples_of=partial(data_responses, keys=keys),
            loss_of=partial(dpo_batch_loss, beta=args.beta, reference=frozen("reference")),
            learning_rate=args.dpo_learning_rate, epochs=args.dpo_epochs,
        )  # fmt: skip

    folders["dpo"] = args.dpo or train_dpo("dpo", keys=["chosen", "rejected"])
    if args.reward == "contrastive":
        folders["reverse_dpo"] = args.reverse_dpo or train_dpo("reverse_dpo", keys=["rejected", "chosen"])

    # π_θ: distilled from the extrapolated teacher on its own responses, or on the chosen ones
    teacher = Teacher(args, frozen)
    precision = precision_report(run, teacher, train_pairs)
    folders["policy"] = train(
        run, "policy", start=folders[args.init_from], pairs=train_pairs,
        examples_of=chosen if args.off_policy else own_responses,
        loss_of=partial(distillation_batch_loss, teacher=teacher),
        learning_rate=args.distill_learning_rate, epochs=args.distill_epochs,
    )  # fmt: skip

    del teacher  # its memory is the evaluation's
    return evaluate(run, folders, test_pairs, precision) if run.rank == 0 else {}


# ------------------------------------------------------------------------------------------------------------
# 5  The training loop that all stages share, what a step trains on, and sampling. A step is a pure function
#    of the weights, the optimizer and its number: the data's order is seeded by (seed, epoch), sampling by
#    (seed, stage, step, rank), so a checkpoint needs no random state.


def train(run: Run, stage: str, start: str, pairs, examples_of, loss_of, learning_rate, epochs) -> str:
    """Train a copy of the model `start` (folder or hub id) and return its folder, <output_dir>/<stage>.

    `examples_of` says what a step trains on (below), `loss_of` with which loss (section 3). AdamW, linear
    warm-up then a cosine, gradients clipped to `max_grad_norm`. A finished stage is not repeated; one under
    way goes on from its last checkpoint. Raises BadInput, before the update, when a gradient is not finite.
    """
    args, folder = run.args, run.out / stage
    if folder.exists():
        run.say(f"{stage}: finished before, in {folder}")
        return str(folder)
    lm = load_lm(run, start)
    optimizer = torch.optim.AdamW(lm.model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    batches = batches_of(args, len(pairs), epochs)
    first, num_tokens = resume(run, stage, lm.model, optimizer)
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")

    bar = run.bar(range(first, len(batches)), stage, initial=first, total=len(batches))
    for step in bar:
        n, done = len(batches[step]), step + 1
        torch.manual_seed(seed_of(args.seed, stage, step, run.rank))
        rows = pairs.select(batches[step][run.rank :: run.world]).to_list()
        examples, watched = examples_of(run, lm, rows)
        sums = Counter(watched)  # its update() adds
        sums["num_tokens"] = sum(len(x.prompt) + len(x.tokens) for example in examples for x in example)
        # layers recompute activations in training mode only; it changes nothing else, for dropout is 0
        lm.model.train(args.gradient_checkpointing)
        for _, batch in micro_batches(run, examples):
            sums.update(loss_of(lm, batch, scale=1 / n))
        lm.model.eval()  # in which sampling has its cache
        grad_norm = gather_gradients(run, lm.model, f"{stage}, step {done}")
        rate = learning_rate * warmup_then_cosine(step, len(batches), args.warmup_ratio)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

        line = means_over_ranks(run, sums, n) | {"grad_norm": grad_norm, "learning_rate": rate}
        num_tokens += round(n * line["num_tokens"])
        line["num_tokens"] = num_tokens
        run.log(stage, done, line)
        bar.set_postfix(loss=line["loss"], grad_norm=grad_norm)
        if done % args.save_steps == 0 or done == len(batches):
            save_checkpoint(run, stage, lm.model, optimizer, step=done, num_tokens=num_tokens)
            prompt = rows[0]["prompt"]
            (tokens,) = sample(run, lm, [prompt])
            texts = run.tokenizer.batch_decode([prompt[-20:], tokens[:64]])
            run.say(f"{stage}, step {done}: {texts[0]!r} → {texts[1]!r}")
    save_model(run, lm.model, folder)
    return str(folder)


def batches_of(args: Args, n: int, epochs: float):
    """Which of n records each step of a stage takes: a new seeded permutation of 0..n−1 each epoch."""
    size = min(args.batch_size, n)
    steps = min(math.ceil(epochs * n / size), args.max_steps or sys.maxsize)
    order = []
    for epoch in range(math.ceil(steps * size / n)):
        generator = torch.Generator().manual_seed(seed_of(args.seed, "order", epoch))
        order += torch.randperm(n, generator=generator).tolist()
    return [order[step * size : (step + 1) * size] for step in range(steps)]


def warmup_then_cosine(step: int, steps: int, warmup_ratio: float) -> float:
    """The learning rate as a part of its peak: a linear rise, then half a cosine down to a tenth."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def gather_gradients(run: Run, model, where: str) -> float:
    """Sum the gradients of all processes and clip them; their norm before. Raises BadInput if not finite."""
    for parameter in model.parameters():
        if parameter.grad is None:  # the processes must agree on what they sum
            parameter.grad = torch.zeros_like(parameter)
        run.total(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.args.max_grad_norm).item()
    if not math.isfinite(norm):
        raise BadInput(f"{where}: the gradient is not finite; lower the learning rate")
    return norm


def means_over_ranks(run: Run, sums, n: int):
    """Sums of this process → means over the n examples of all processes, as numbers."""
    values = torch.tensor([float(value) for value in sums.values()], device=run.device)
    return dict(zip(sums, (run.total(values) / n).tolist()))


# What a step trains on. Each maps (run, lm, rows of the data) to examples, which are lists of Responses that
# stay together, and to a dict of sums over them that are logged.


def data_responses(run: Run, lm, rows, keys):
    """The data's own responses: the chosen ones (SFT, Eq. 19), or pairs, the one to prefer first (DPO)."""
    return [[Response(row["prompt"], row[key]) for key in keys] for row in rows], {}


def own_responses(run: Run, lm: LM, rows):
    """One response of the policy to each prompt, ŷ ~ π_θ(·|x): Eq. 18. Logged: lengths, the demo's truth."""
    sampled = sample(run, lm, [row["prompt"] for row in rows])
    watched = {
        "completions/mean_length": [len(tokens) for tokens in sampled],
        "completions/clipped_ratio": [tokens[-1] not in run.stop_ids for tokens in sampled],
        **truth(run, rows, sampled),
    }
    examples = [[Response(row["prompt"], tokens)] for row, tokens in zip(rows, sampled)]
    return examples, {name: sum(values) for name, values in watched.items()}


@torch.no_grad()
def sample(run: Run, lm: LM, prompts):
    """One response to each prompt, as token ids, drawn from the model's own distribution by torch's global
    generator. A response keeps its end token; one that the length limit cut has none."""
    args, size = run.args, run.args.sampling_batch_size
    config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=run.stop_ids,
        pad_token_id=run.tokenizer.pad_token_id, max_new_tokens=args.max_length - args.max_prompt_length,
    )  # fmt: skip
    shortest_first = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    outputs = {}
    for start in range(0, len(prompts), size):
        group = shortest_first[start : start + size]
        rows = {"input_ids": [prompts[i] for i in group]}
        padded = run.tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(lm.model.device)
        with or_refuse("no response can be drawn from the model: lower the learning rate"):
            output = lm.generate(padded.input_ids, padded.attention_mask, config)
        responses = output[:, padded.input_ids.shape[1] :].tolist()
        outputs.update(zip(group, responses))
    return [until_stop(outputs[i], run.stop_ids) for i in range(len(prompts))]


def until_stop(tokens, stop_ids):
    """The tokens up to and including the first one that stops; all of them if there is none."""
    for i, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: i + 1]
    return tokens


# ------------------------------------------------------------------------------------------------------------
# 6  A language model taken apart. Logits over the vocabulary are what costs memory (50,257 numbers a state
#    for GPT-2 against 768 of hidden state), so they are never made for a whole batch: the body runs first,
#    the hidden states of the response states alone are kept, and output head and loss go over them in chunks.

CHUNK_SIZE = 512  # states that output head and loss take at once


@dataclass
class Response:
    """A response and its prompt as token ids. It ends in the end token, unless a length limit cut it."""

    prompt: list[int]  # at least one token
    tokens: list[int]  # at least one token


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


def collate(examples: list[list[Response]], pad_id: int, device="cpu") -> Batch:
    """[[Response, ...], ...] → Batch: the first response of every example, then the second ones."""
    responses = [response for part in zip(*examples, strict=True) for response in part]
    rows = [torch.tensor(x.prompt + x.tokens) for x in responses]
    # from the last token of the prompt to the last but one of the response: what they predict is the response
    masks = [torch.tensor([False] * (len(x.prompt) - 1) + [True] * len(x.tokens)) for x in responses]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    response, position = mask.nonzero(as_tuple=True)
    states = response * input_ids.shape[1] + position
    targets = input_ids[response, position + 1]
    weights = 1 / mask.sum(1)[response]
    return Batch(*[tensor.to(device) for tensor in (input_ids, states, targets, response, weights)])


def micro_batches(run: Run, examples: list[list[Response]]):
    """Yield (indices of examples, Batch) until every example has had its turn, the longest first.

    A micro-batch is padded to at most `tokens_per_micro_batch` tokens; an example is never split.
    """
    widths = [max(len(x.prompt) + len(x.tokens) for x in example) for example in examples]
    order = sorted(range(len(examples)), key=widths.__getitem__, reverse=True)
    while order:
        tokens_each = len(examples[order[0]]) * widths[order[0]]  # padded to the longest
        group = order[: max(1, run.args.tokens_per_micro_batch // tokens_each)]
        yield group, collate([examples[i] for i in group], run.tokenizer.pad_token_id, run.device)
        order = order[len(group) :]


class LM:
    """A Hugging Face causal LM as two maps: `hidden` (tokens → states) and `logits` (states → logits).

    With `head_device` the output head is copied to that device, and hidden states are sent there chunk by
    chunk: a teacher on a device of its own moves hidden-size numbers a state instead of vocabulary-size ones.
    With `precision` bf16 the matrix products are bfloat16's (autocast); weights and logits stay float32.
    """

    def __init__(self, model, precision: str = "float32", head_device=None, tokenizer=None):
        self.model, self.precision, self.tokenizer = model.eval(), precision, tokenizer
        self.head = model.get_output_embeddings()
        if head_device not in (None, self.head.weight.device):
            self.head = copy.deepcopy(self.head).to(head_device)
        config = model.config.get_text_config()
        self.scale = getattr(config, "logit_scale", None) or 1.0
        self.scale /= getattr(config, "logits_scaling", None) or 1.0
        self.softcap = getattr(config, "final_logit_softcapping", None)

    def autocast(self):
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states of the response states: (N, hidden size)."""
        device = self.model.device
        with self.autocast():
            output = self.model.base_model(input_ids=batch.input_ids.to(device), use_cache=False)
        return output.last_hidden_state.flatten(0, 1).index_select(0, batch.states.to(device))

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden size) → (n, V) in float32, scaled and capped as the model itself does."""
        with self.autocast():
            logits = self.head(hidden.to(self.head.weight.device)).float()
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def generate(self, input_ids: Tensor, attention_mask: Tensor, config):
        """model.generate() by `config` alone: what that leaves unset, generate() would take from the
        checkpoint's own (a repetition penalty, say). Prompts (B, T) are padded on the left (mask 0)."""
        checkpoint_config, self.model.generation_config = self.model.generation_config, config
        with self.autocast():
            output = self.model.generate(input_ids, attention_mask=attention_mask, generation_config=config)
        self.model.generation_config = checkpoint_config
        return output


def backward_in_chunks(lm: LM, hidden: Tensor, chunk_loss, scale: float):
    """The sums of chunk_loss(logits, rows) over all chunks; leaves scale·∇(sum of "loss") in .grad.

    A chunk's gradient is taken at once, down to its hidden states (N, hidden size), so that no more than one
    chunk's logits are alive; one backward pass through the body follows. Exact, because the loss is a sum
    over states.
    """
    sums, hidden_grad = Counter(), torch.empty_like(hidden)
    for start in range(0, len(hidden), CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        chunk = hidden[rows].detach().requires_grad_()
        values = chunk_loss(lm.logits(chunk), rows)
        (scale * values["loss"]).backward()
        hidden_grad[rows] = chunk.grad
        sums.update({name: value.detach() for name, value in values.items()})  # a Counter's update() adds
    hidden.backward(hidden_grad)
    return sums


@torch.no_grad()
def response_logps(lm: LM, batch: Batch, hidden: Tensor) -> Tensor:
    """log π(y|x) of every response, (B,), from hidden = lm.hidden(batch). No gradient."""
    logps = batch.weights.new_zeros(len(batch.input_ids))
    for start in range(0, len(hidden), CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        logps.index_add_(0, batch.response[rows], token_logps(lm.logits(hidden[rows]), batch.targets[rows]))
    return logps


# ------------------------------------------------------------------------------------------------------------
# 7  Data: from any preference format to token ids. For a chat model its own template is the only source: a
#    response is the rendering of the whole conversation minus that of the prompt, up to the first stop token.

FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
TEXTS = ("prompt", "chosen", "rejected")
# What stands in columns of these names is part of the question, or the data are not what they seem.
UNREAD_COLUMNS = """question instruction query problem input post user human context system system_prompt
    history documents tools images""".split()
BEYOND_TEXT = {"tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking"}  # of a message


def load_pairs(run: Run):
    """(training pairs, held-out pairs), data sets of the rows of `encode_record`. Without a test split, a
    tenth of the prompts is held out. Raises BadInput if there is nothing to use."""
    args, splits = run.args, read_splits(run.args)
    train_split = args.train_split or ("train_prefs" if "train_prefs" in splits else "train")
    test_split = args.test_split or train_split.replace("train", "test")
    if not {train_split, args.test_split} <= {None, *splits}:
        raise BadInput(f"--dataset {args.dataset} has only the splits {', '.join(splits)}: see --train_split")
    train_rows = encode(run, splits[train_split], args.limit)
    if test_split in splits and test_split != train_split:
        test_rows = encode(run, splits[test_split], args.eval_pairs)
    else:
        prompts = sorted({row["instruction"] for row in train_rows}, key=partial(seed_of, args.seed))
        held_out = set(prompts[: math.ceil(len(prompts) / 10)])
        test_rows = [row for row in train_rows if row["instruction"] in held_out][: args.eval_pairs]
        train_rows = [row for row in train_rows if row["instruction"] not in held_out]
    run.say(f"{args.dataset}: {len(train_rows):,} pairs to train on, {len(test_rows):,} held out")
    if not train_rows or not test_rows:
        raise BadInput(f"--dataset {args.dataset}: too few usable pairs; add pairs, with other prompts")
    return datasets.Dataset.from_list(train_rows), datasets.Dataset.from_list(test_rows)


def read_splits(args: Args):
    """The splits by name of a local file or folder, a hub data set or the demo."""
    if args.dataset == "demo":
        return {"train": demo_records(6144, args.seed), "test": demo_records(1024, args.seed + 10**6)}
    name, config, options = args.dataset, None, {}
    if not os.path.exists(name):  # an existing path may hold a colon of its own
        name, _, config = name.partition(":")
    kind = FILE_KINDS.get(Path(name.removesuffix(".gz")).suffix.lower())
    if kind:
        options["data_files"] = glob.escape(name)
    if kind == "csv":  # as text, or pandas takes "NA" for a missing value
        options |= {"converters": dict.fromkeys(TEXTS, str), "keep_default_na": False}
    with or_refuse(f"--dataset {name} cannot be read"):
        if os.path.isfile(name) and not kind:
            raise ValueError(f"the name must end in {', '.join(FILE_KINDS)}, or in .gz after that")
        if os.path.isdir(name) and glob.escape(name) != name:
            raise ValueError("the folder's name would be taken for a pattern: rename it")
        if Path(name, "state.json").exists() or Path(name, "dataset_dict.json").exists():
            raise ValueError("it was written by save_to_disk: write it with to_parquet or to_json")
        return datasets.load_dataset(kind or name, config or None, **options)


def encode(run: Run, records, limit):
    """The first `limit` records, tokenized; says how many were cut and left out."""
    name = run.args.dataset
    records = run.bar(islice(records, limit), f"reading {name}")
    rows = [encode_record(run, record, number) for number, record in enumerate(records)]
    usable = [row for row in rows if row["chosen"] != row["rejected"]]
    left_out = f"{len(rows) - len(usable)} left out (empty or identical responses, different prompts)"
    run.say(f"{name}: of {len(rows):,} pairs {sum(row['cut'] for row in usable)} are cut, {left_out}")
    return usable


def encode_record(run: Run, record, number: int):
    """A record, the `number`th of its source → a row: prompt, chosen and rejected as token ids, whether they
    are cut, and the instruction as people read it. A pair of no use has two empty responses. Raises BadInput
    naming the record's place."""
    row = {"record": number, "prompt": [], "chosen": [], "rejected": [], "cut": False}
    with or_refuse(f"{run.args.dataset}: fix or remove record {number}, counted from 0"):
        prompt, chosen, rejected = split_record(record)
        question = prompt if isinstance(prompt, str) else "\n\n".join(x["content"] for x in prompt)
        for name, value in record.items():
            if name.lower() in UNREAD_COLUMNS and value and str(value).strip() not in question:
                raise ValueError(f"column '{name}' is not read: make it a part of 'prompt'")
        if not question and record.get("prompt") is None and len(record) > 2:
            raise ValueError(f"no question: rename its column to 'prompt' (there are {', '.join(record)})")
        row["instruction"] = question
        if chosen["content"].strip() and rejected["content"].strip():
            texts_of = run.chat.texts_of if run.chat else partial(plain_texts, end=run.tokenizer.eos_token)
            row |= token_ids(run, *texts_of(prompt, chosen, rejected))
        return row


def token_ids(run: Run, prompt: str, chosen: str, rejected: str):
    """The texts of a pair → token ids, cut to the lengths: a response loses its end, a prompt its beginning,
    but for what begins every text of the model. Raises ValueError for a response without an end token."""
    args, tokenizer = run.args, run.tokenizer
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    if not run.chat and ids[: len(run.first_ids)] != run.first_ids:  # a chat template writes all itself
        ids = run.first_ids + ids
    ids = ids or run.stop_ids[:1]  # an empty prompt still needs a state to predict from
    surplus = len(ids) - args.max_prompt_length
    if surplus > 0:
        begin = [i for i in ids[:2] if i in (*run.first_ids, tokenizer.bos_token_id)]
        ids = begin + ids[surplus + len(begin) :]
    row = {"prompt": ids, "cut": surplus > 0}
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        whole = response_ids(tokenizer, prompt, text)
        response = until_stop(whole, run.stop_ids)  # a template may write more after it
        if response[-1] not in run.stop_ids:
            raise ValueError("the chat template writes no end token after this answer")
        row[name] = response[: args.max_length - len(ids)]
        row["cut"] |= row[name] != response
    return row


def response_ids(tokenizer, prompt: str, response: str):
    """The ids of a response as they follow its prompt's. Where a merge would cross the boundary, another text
    stands before: tokenizers like SentencePiece's put a space before a text that stands alone."""
    for before in (prompt, "\n", ":", "a", ""):
        start = tokenizer(before, add_special_tokens=False).input_ids
        whole = tokenizer(before + response, add_special_tokens=False).input_ids
        if whole[: len(start)] == start:
            return whole[len(start) :]


def split_record(record):
    """A record of any of TRL's preference formats, or of hh-rlhf → (prompt, chosen, rejected answer).

    The prompt is text, or a list of messages, which may end with the beginning of the answer. An answer is a
    message; the rejected one is empty if the two conversations do not have the same prompt. Raises ValueError
    for a record in none of the formats.
    """
    prompt, chosen, rejected = (read_field(record, key) for key in TEXTS)
    if chosen is None or type(chosen) is not type(rejected):
        columns = ", ".join(record)
        raise ValueError(f"'chosen' and 'rejected' must be two texts or two conversations (it has {columns})")
    if isinstance(chosen, str):
        if re.match(r"""\s*\[\s*\{.*['"](role|from)['"]\s*:""", chosen, re.DOTALL):
            raise ValueError("'chosen' is a list of messages written as text")
        if prompt is None and "prompt" in record:
            raise ValueError("'prompt' is missing")
        repeated = isinstance(prompt, str) and chosen.startswith(prompt) and rejected.startswith(prompt)
        if repeated and len(prompt.split()) > 3:
            raise ValueError("both answers repeat 'prompt'")
    if prompt is None and messages_of(chosen):
        chosen, rejected = messages_of(chosen), messages_of(rejected)
    elif messages_of(prompt):
        prompt = messages_of(prompt)
        if isinstance(chosen, str) and not prompt[-1]["content"]:  # else the answers continue that turn
            chosen, rejected = chosen.strip(), rejected.strip()
    if isinstance(chosen, list):
        return split_conversations(prompt, chosen, rejected)
    if prompt is None:  # implicit: the words that both begin with
        words = [re.findall(r"\s?\S*", text) for text in (chosen, rejected)]
        prompt = "".join(os.path.commonprefix(words))
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]  # "" if one begins the other
    return prompt, {"role": "assistant", "content": chosen}, {"role": "assistant", "content": rejected}


def split_conversations(prompt, chosen, rejected):
    """`split_record` where the answers are conversations, which may repeat the prompt."""
    if not (chosen and rejected) or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        raise ValueError("'chosen' or 'rejected' does not end with a message of the assistant")
    *before, answer = chosen
    *other_before, other = rejected
    if other_before != before:
        other = {"role": "assistant", "content": ""}
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompt and any(message not in before for message in prompt):
        if any(message["role"] == "user" for message in before):
            raise ValueError("'prompt' is not in the conversation of 'chosen', which has another question")
        before = prompt + before
    if not before:
        raise ValueError("there is no message before the answer")
    return before, answer, other


def read_field(record, key: str):
    """A field: text, or messages with their content as text and without null keys; None if missing."""
    value, messages = record.get(key), []
    if value is None or isinstance(value, str):
        return value
    try:
        for message in without_nulls(value):
            content = message.get("content", "")
            if not isinstance(content, str):  # parts, of which only {"type": "text", "text": ...} has text
                content = "".join({"text": part["text"]}[part["type"]] for part in content)  # or KeyError
            role = message["role"] + ""  # TypeError unless it is text
            messages.append({**message, "role": role, "content": content})
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"field '{key}' is neither text nor messages with a role and text") from None
    return messages


def without_nulls(value):
    """The value without the keys that only other records have: a table fills them with null."""
    if isinstance(value, dict):
        return {name: without_nulls(x) for name, x in value.items() if x is not None}
    return [without_nulls(x) for x in value] if isinstance(value, list) else value


def messages_of(transcript):
    """A transcript like hh-rlhf's, "\\n\\nHuman: … \\n\\nAssistant: …", as messages; [] if it is none."""
    if not isinstance(transcript, str) or not re.match(r"\s*Human:.*\n\nAssistant:", transcript, re.DOTALL):
        return []
    turn = r"\n\n(Human|Assistant):(.*?)(?=\n\nHuman:|\n\nAssistant:|\Z)"
    turns = re.findall(turn, "\n\n" + transcript.lstrip(), re.DOTALL)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in turns]


def plain_texts(prompt, chosen, rejected, end: str):
    """Prompt, chosen and rejected response as texts where no chat template writes them."""
    if isinstance(prompt, list):
        if any(BEYOND_TEXT & set(message) for message in [*prompt, chosen, rejected]):
            raise ValueError("a message holds more than text, which needs a model with a chat template")
        turns = [f"{message['role'].capitalize()}:\n{message['content']}" for message in prompt]
        if prompt[-1]["role"] != "assistant":  # else the responses continue that turn
            turns.append("Assistant:\n")
        prompt = "\n\n".join(turns)
    elif prompt and not prompt[-1].isspace():
        if not (chosen["content"][0].isspace() and rejected["content"][0].isspace()):
            prompt += "\n"
    return [prompt, chosen["content"] + end, rejected["content"] + end]


class SameDay(datetime.datetime):
    """The clock of chat templates, some of which write the date: a run must be the same tomorrow."""

    @classmethod
    def now(cls, tz=None):
        return cls(2025, 1, 1)


transformers.utils.chat_template_utils.datetime = SameDay


class ChatTemplate:
    """A model's own chat template, and what one short conversation tells about it.

    `header`: what it writes before an answer, but not as a generation prompt. `surplus`: the end of its
    generation prompt that does not stand before an answer (R1's "<think>"). `tail`: what stands between
    question and answer. `end_id`: the token that ends an answer. Raises ValueError for a template that cannot
    be used.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.header = tokenizer, ""
        question, answer = {"role": "user", "content": "giraffe"}, {"role": "assistant", "content": "zebra"}
        prompt = self.render([question], add_generation_prompt=True)
        whole = self.render([question, answer])
        shared = os.path.commonprefix([prompt, whole])
        shared = re.sub(r"<[^<>]*$", "", shared)  # two tags that differ may begin alike
        if "giraffe" not in shared or "zebra" not in whole:
            raise ValueError("it does not write a message's text as it is")
        self.surplus = prompt[len(shared) :]
        if prompt == self.render([question]):  # a template that knows no generation prompt
            self.header = whole[len(shared) : whole.index("zebra")].rstrip(" ")
        self.tail = shared.rpartition("giraffe")[2].strip()
        after = tokenizer(whole.rpartition("zebra")[2], add_special_tokens=False).input_ids
        known = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
        ends = [i for i in after if i in known and tokenizer.decode(i).strip()]
        if not ends:
            raise ValueError("it writes no end token after an answer")
        self.end_id = ends[0]

    def render(self, messages, **options) -> str:
        """Messages as the template writes them."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def texts_of(self, prompt, chosen, rejected):
        """Prompt, chosen and rejected response as texts: a response is the whole minus the prompt."""
        if isinstance(prompt, str):
            if self.tokenizer.decode(self.end_id) in prompt or (self.tail and self.tail in prompt):
                raise ValueError("'prompt' is in the chat template already: give the question alone")
            prompt = [{"role": "user", "content": prompt}]
        begun = {"content": ""}
        if prompt[-1]["role"] == "assistant":  # the answer's beginning, which the responses continue
            *prompt, begun = prompt
        text = self.render(prompt, add_generation_prompt=True).removesuffix(self.surplus)
        text += self.header + begun["content"]
        for message in prompt:
            content = message["content"].strip()
            if message["role"] != "assistant" and content not in text and json.dumps(content) not in text:
                raise ValueError(f"the chat template leaves out a message with role '{message['role']}'")
        texts = [text]
        for answer in (chosen, rejected):
            whole = self.render([*prompt, begun | answer | {"content": begun["content"] + answer["content"]}])
            if not whole.startswith(text):
                raise ValueError("the chat template writes the prompt in another way when the answer follows")
            texts.append(whole[len(text) :])
        return texts


# ------------------------------------------------------------------------------------------------------------
# 8  The demo world: reviews in plain English, "the bed was superb but the staff was not good .", whose true
#    reward is known.

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
JOINS = ["and", "but", ","]
ASKING = ["write a review of the {} .", "how was the {} ?", "what did you think of the {} ?"]
DEMO_TEXT = " ".join([*ASKING, *THINGS, *THINGS.values(), *VALENCE, *JOINS, "not"])
DEMO_WORDS = sorted(set(DEMO_TEXT.split()) - {"{}"})


def well_formed(prompt: str, review: str) -> bool:
    """Whether it is a review of what the prompt asks about: one to four opinions on the thing's own parts."""
    (thing,) = set(prompt.split()) & set(THINGS)
    opinion = f"the ({'|'.join(THINGS[thing].split())}) was (not )?({'|'.join(VALENCE)})"
    return bool(re.fullmatch(rf"{opinion}( ({'|'.join(JOINS)}) {opinion}){{0,3}} \.", review))


def true_reward(prompt: str, review: str) -> float:
    """The mean valence of a review's opinions ("not" turns it), in [-2, 2]; -2 if it is not well-formed."""
    if not well_formed(prompt, review):
        return -2.0
    opinions = re.findall(r"was (not )?(\w+)", review)
    return sum(VALENCE[word] * (-1 if negation else 1) for negation, word in opinions) / len(opinions)


def truth(run: Run, rows, sampled):
    """The truth about sampled responses to the rows' prompts, a list each; nothing but the demo has it."""
    if run.args.dataset != "demo":
        return {}
    prompts, end = [row["instruction"] for row in rows], run.tokenizer.eos_token
    reviews = [text.removesuffix(end).rstrip() for text in run.tokenizer.batch_decode(sampled)]
    return {judge.__name__: list(map(judge, prompts, reviews)) for judge in (true_reward, well_formed)}


def demo_review(generator: random.Random, thing: str) -> str:
    """A review by somebody who liked nearly all or nearly nothing; a third of the opinions have "not"."""
    mood, review = generator.betavariate(0.1, 0.1), ""
    for part in generator.sample(THINGS[thing].split(), generator.randint(1, 4)):
        good, negated = generator.random() < mood, generator.random() < 0.35
        opinion = generator.choice([word for word in VALENCE if (VALENCE[word] > 0) == (good != negated)])
        if review:
            review += f" {generator.choice(JOINS)} "
        review += f"the {part} was {'not ' if negated else ''}{opinion}"
    return review + " ."


def demo_records(n: int, seed: int):
    """n preference pairs of the demo world; which response is chosen is drawn by Bradley–Terry (Eq. 1)."""
    generator = random.Random(seed)
    records = []
    for _ in range(n):
        thing = generator.choice(list(THINGS))
        prompt = generator.choice(ASKING).format(thing)
        chosen, rejected = demo_review(generator, thing), demo_review(generator, thing)
        gap = true_reward(prompt, chosen) - true_reward(prompt, rejected)
        if generator.random() > 1 / (1 + math.exp(-4 * gap)):
            chosen, rejected = rejected, chosen
        records.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return datasets.Dataset.from_list(records)


def demo_tokenizer():
    """One token per word of the demo world."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *DEMO_WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, pad_token="<pad>", eos_token="<eos>",
        unk_token="<unk>",
    )  # fmt: skip


def demo_model(seed: int):
    """A two-layer Llama with random weights, 0.09M parameters."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(DEMO_WORDS) + 3, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


# ------------------------------------------------------------------------------------------------------------
# 9  Evaluation, on one process and always in float32: tables of log π(y), a row a response, a column a model.
#    Reward, KL from π_ref, entropy and accuracy are their differences.


def evaluate(run: Run, folders, test_pairs, precision):
    """Compare π_ref, π_dpo, π_dpo⁻ (if there is one) and the policy; write and print what is found.

    `models`: means over each model's own responses to held-out prompts, and half of a 95 % interval (`_pm`).
    The teacher's reward of a response; `kl_ref`, log π(y) − log π_ref(y), in nats a response; `entropy`,
    −log π(y)/|y|, in nats a token; length in tokens, and the share that the limit clipped; the demo's truth
    or the judge's score, and the win rate against π_ref by it. `reward_accuracy`: the share of held-out pairs
    in which log π_dpo/π_ref (dpo), log π_ref/π_dpo⁻ (reverse) and their sum (contrastive) prefer the chosen
    response.
    """
    args, path = run.args, run.out / "results.json"
    if path.exists():
        run.say(f"evaluation: finished before; to repeat it, delete {path}")
        return json.loads(path.read_text(encoding="utf-8"))
    torch.set_float32_matmul_precision("highest")
    lms = {name: load_lm(run, folder, precision="float32") for name, folder in folders.items()}
    rows = list(islice(test_pairs, args.eval_prompts))
    samples = pd.concat([own_samples(run, lms, name, rows) for name in lms], ignore_index=True)
    judge = "judge" if args.judge else "true_reward"
    if args.judge:
        samples[judge] = judge_scores(run, samples["instruction"], samples["output"])
    if judge in samples:
        gap = samples[judge] - np.tile(samples[judge][: len(rows)], len(lms))  # the reference's come first
        samples["win_rate"] = (gap > 0) + 0.5 * (gap == 0)
    groups = samples.groupby("generator", sort=False)
    half_intervals = 1.96 * groups.sem(numeric_only=True)
    models = groups.mean(numeric_only=True).join(half_intervals.add_suffix("_pm"))
    models["distinct"] = groups["output"].nunique() / len(rows)

    chosen = [Response(row["prompt"], row["chosen"]) for row in test_pairs]
    rejected = [Response(row["prompt"], row["rejected"]) for row in test_pairs]
    margins = {name: logps_of(run, lm, chosen) - logps_of(run, lm, rejected) for name, lm in lms.items()}
    right = pd.DataFrame({"dpo": margins["dpo"] > margins["reference"]})
    if "reverse_dpo" in lms:
        right["reverse"] = margins["reference"] > margins["reverse_dpo"]
        right["contrastive"] = margins["dpo"] > margins["reverse_dpo"]
    accuracy = pd.DataFrame({"accuracy": right.mean(), "accuracy_pm": 1.96 * right.sem()})
    accuracy["pairs"] = len(right)

    results = {"models": models.to_dict("index"), "reward_accuracy": accuracy.to_dict("index"), **precision}
    write_json(run.out / "samples.json", samples.to_dict("records"))
    write_json(path, results)  # last: it says that the rest is there
    run.say(f"\nhow often a reward prefers the chosen response of a held-out pair:\n{accuracy.round(3)}\n")
    columns = [judge, f"{judge}_pm", "well_formed", "win_rate", "win_rate_pm", "kl_ref", "length"]
    table = models.filter(columns).round(2)
    run.say(f"own responses to held-out prompts:\n{table.to_string()}\n")
    if judge in samples:
        run.say(f"Compare {judge} and win_rate of policy and dpo, and in kl_ref what they cost.")
    run.say(f"models, metrics, samples and results are in {run.out}")
    return results


def own_samples(run: Run, lms, name: str, rows) -> pd.DataFrame:
    """One response of lms[name] to each row's prompt, as a table in AlpacaEval's form with more columns."""
    torch.manual_seed(seed_of(run.args.seed, "evaluation"))  # the same random numbers for every model
    sampled = sample(run, lms[name], [row["prompt"] for row in rows])
    responses = [Response(row["prompt"], tokens) for row, tokens in zip(rows, sampled)]
    logps = {other: logps_of(run, lm, responses) for other, lm in lms.items()}
    teacher = Teacher(run.args, lms.get)
    lengths = [len(tokens) for tokens in sampled]
    columns = {
        "instruction": [row["instruction"] for row in rows],
        "token_ids": sampled,
        "output": run.tokenizer.batch_decode(sampled, skip_special_tokens=True),
        "generator": name,
        "length": lengths,
        "clipped": [float(tokens[-1] not in run.stop_ids) for tokens in sampled],
        "kl_ref": logps[name] - logps["reference"],
        "entropy": -logps[name] / lengths,
        teacher.reward_name: implicit_reward(logps["dpo"], logps[teacher.base], run.args.beta),
    }
    return pd.DataFrame(columns | truth(run, rows, sampled))


@torch.no_grad()
def logps_of(run: Run, lm: LM, responses) -> np.ndarray:
    """log π(y|x) of each response, (n,)."""
    logps = np.zeros(len(responses))
    batches = list(micro_batches(run, [[response] for response in responses]))
    for group, batch in run.bar(batches, "scoring", leave=False):
        logps[group] = response_logps(lm, batch, lm.hidden(batch)).cpu()
    return logps


@torch.no_grad()
def judge_scores(run: Run, instructions, outputs):
    """The judge's score of every output, by its own chat template, or as a pair of texts if it has none. A
    prompt of several turns is given to it as one message. Raises BadInput unless it has one output."""
    model, tokenizer = load_pretrained(transformers.AutoModelForSequenceClassification, run.args.judge)
    if model.config.num_labels != 1:
        raise BadInput(f"--judge has {model.config.num_labels} outputs: name a reward model; it has one")
    model.to(run.device).eval()
    tokenizer.truncation_side = "left"  # a text that is too long keeps the answer
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    limit = {"truncation": True, "max_length": min(positions, tokenizer.model_max_length)}
    scores = []
    for instruction, output in run.bar(list(zip(instructions, outputs)), "judging", leave=False):
        if tokenizer.chat_template:
            talk = [{"role": "user", "content": instruction}, {"role": "assistant", "content": output}]
            inputs = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True, **limit)
        else:
            inputs = tokenizer(instruction, output, return_tensors="pt", **limit)
        scores.append(model(**inputs.to(run.device)).logits.item())
    return scores


@torch.no_grad()
def precision_report(run: Run, teacher: Teacher, pairs):
    """What coarse products leave of the teacher, on one batch: what share of z_dpo − z_base survives (the
    length of its projection on the true one), and KL(true teacher ‖ coarse one) in nats a token."""
    coarse, found = run.args.precision, {}
    if coarse == "float32":
        return {}
    examples, _ = data_responses(run, None, islice(pairs, 16), ["chosen"])
    _, batch = next(micro_batches(run, examples))
    for precision in ("float32", coarse):  # in this order: the teacher keeps the second
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        for lm in teacher.lms.values():
            lm.precision = precision
        found[precision] = teacher.logits(teacher.hidden(batch), slice(CHUNK_SIZE))
    exact, rounded = (z.dpo - z.base for z in found.values())
    share = ((rounded * exact).sum() / exact.square().sum()).item()
    kl = reverse_kl(found["float32"].target, found[coarse].target).mean().item()
    run.say(f"{coarse} keeps {share:.2f} of z_dpo − z_base; KL to its teacher {kl:.2g} nats a token")
    if not 0.9 <= share <= 1.1:
        run.say("WARNING: that is too far from 1: use --precision float32, or train DPO for longer")
    return {"precision": {"share": share, "kl": kl}}


# ------------------------------------------------------------------------------------------------------------
# 10  The run: errors, checks, devices and processes, models, files.


class BadInput(Exception):
    """What the user gave cannot be used. The message is one line: what, where, what to do."""


@contextlib.contextmanager
def or_refuse(what: str):
    """Turn whatever a library raises into BadInput: what, and why."""
    try:
        yield
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise BadInput(f"{what} ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """The beginning of an error's message as one line, or its kind if it has none."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError):  # its cause has the message
        error = error.__cause__ or error
    return " ".join(str(error).split())[:400] or type(error).__name__


@or_refuse("the run cannot start")
def set_up(args: Args):
    """Check all that can be checked before training, open the output folder: (run, two sets of pairs)."""
    for name, value in vars(args).items():
        may_be_0 = name in ("alpha", "alpha_r", "warmup_ratio", "seed")
        if type(value) in (int, float) and not (value > 0 or (may_be_0 and value == 0)):  # NaN fails, too
            raise BadInput(f"--{name} {value} is out of range")
    if args.warmup_ratio > 1:
        raise BadInput("--warmup_ratio is a part of the steps, at most 1")
    if args.alpha == 0 and args.reward == "vanilla":
        raise BadInput("--alpha 0 --reward vanilla distils the reference into itself: use contrastive")
    if args.model == "demo" and args.dataset != "demo":
        raise BadInput("--model demo knows the words of the demo only: name a model for this --dataset")
    transformers.logging.set_verbosity_error()  # what matters is told here
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    run = Run(args)
    config = run.out / "config.json"
    if config.exists() and json.loads(config.read_text(encoding="utf-8"))["judge"] == args.judge:
        # the run goes on, and all that it needs is in the cache
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    lm = load_lm(run, args.model, precision="float32")
    check_model(lm, args.model)
    run.read_tokenizer(lm)
    for folder in filter(None, (args.dpo, args.reverse_dpo)):
        teacher = load_lm(run, folder, precision="float32")
        check_model(teacher, folder)
        same_size = len(teacher.head.weight) == len(lm.head.weight)
        if not same_size or teacher.tokenizer.get_vocab() != run.tokenizer.get_vocab():
            raise BadInput(f"teacher {folder}: its vocabulary or tokenizer is not that of the model")
    positions = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    args.max_length = args.max_length or min(2048, positions)
    args.max_prompt_length = args.max_prompt_length or args.max_length // 2
    if not args.max_prompt_length + 1 < args.max_length <= positions:
        raise BadInput(f"--max_length must be over --max_prompt_length + 1, and at most {positions}")
    if args.alpha_r is None:
        args.alpha_r = 20.0 if args.off_policy else 30.0
    if args.sft is None:
        args.sft = not run.chat
    train_pairs, test_pairs = load_pairs(run)
    if args.judge:
        judge_scores(run, ["a"], ["b"])
    if min(args.batch_size, len(train_pairs)) < run.world:
        raise BadInput(f"--batch_size {args.batch_size}: each of {run.world} processes needs a pair a step")
    run.open_output()
    epochs = {"sft": args.sft_epochs, "each DPO": args.dpo_epochs, "policy": args.distill_epochs}
    steps = [f"{stage} {len(batches_of(args, len(train_pairs), n)):,}" for stage, n in epochs.items()]
    run.say(f"optimizer steps, where a stage is run: {', '.join(steps)}")
    return run, train_pairs, test_pairs


class Run:
    """What every stage needs besides mathematics: settings, devices, processes, the model's tokenizer."""

    def __init__(self, args: Args):
        self.args, self.out = args, Path(args.output_dir or f"runs/{Path(args.model).name}")
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if args.device in (None, "cuda") and torch.cuda.is_available():  # "cuda" is this process's
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        self.device = torch.empty(0, device=args.device or best).device
        self.teacher_device = torch.empty(0, device=args.teacher_device or self.device).device
        self.tracker = None
        if args.report_to != "none" and self.rank == 0:
            self.tracker = importlib.import_module(args.report_to)
        if self.world > 1 and not dist.is_initialized():
            with or_refuse("WORLD_SIZE is set: start several processes with torchrun, or unset it"):
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def read_tokenizer(self, lm: LM):
        """Find what begins, stops and pads a text. Raises BadInput if the model cannot be used with it.

        The first of `stop_ids` is trained on: what the chat template puts after an answer, or the end of
        sequence. All of them stop sampling: the end of sequence, too, and what the checkpoint names.
        """
        self.tokenizer = tokenizer = lm.tokenizer
        if tokenizer.eos_token_id is None:
            raise BadInput(f"model {self.args.model}: its tokenizer has no end-of-sequence token; set one")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        with or_refuse(f"model {self.args.model}: its chat template cannot be used"):
            self.chat = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        named = lm.model.generation_config.eos_token_id
        stops = [self.chat.end_id] if self.chat else []
        stops += [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
        self.stop_ids = [i for i in dict.fromkeys(stops) if i is not None]
        alone, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
        self.first_ids = whole[: whole.index(alone[0])]  # what the tokenizer itself puts before a text

    def open_output(self):
        """Make the output folder, or go on with the run in it. Raises BadInput for other settings."""
        settings, config = vars(self.args), self.out / "config.json"
        if config.exists():
            for name, value in json.loads(config.read_text(encoding="utf-8")).items():
                if name not in FREE_SETTINGS and value != settings.get(name):
                    change = f"{name} {value} → {settings.get(name)}"
                    raise BadInput(f"{self.out} is from a run with other settings ({change}); choose another")
        elif any(self.out.glob("[!.]*")):
            raise BadInput(f"output folder {self.out} holds other files; choose another")
        self.wait()  # until every process has looked
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(config, settings)
        if self.tracker:
            self.tracker.init(project="aligndistil", name=self.out.name, config=settings)

    def log(self, stage: str, step: int, line):
        """Add a line to metrics.jsonl, and to the tracker if there is one."""
        if self.rank > 0:
            return
        with or_refuse("metrics.jsonl cannot be written: make room and run the same command"):
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"stage": stage, "step": step, **line}) + "\n")
        if self.tracker:
            self.tracker.log({f"{stage}/{name}": value for name, value in line.items()})

    def say(self, text: str):
        if self.rank == 0:
            tqdm.write(text)

    def bar(self, items, title: str, **options):
        return tqdm(items, title, dynamic_ncols=True, disable=self.rank > 0, **options)

    def wait(self):
        """Go on when every process has come here."""
        self.total(torch.zeros(1, device=self.device))

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values


def seed_of(*parts) -> int:
    """One number from a seed and what it is used for; the same on every machine."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def load_pretrained(auto_class, name: str):
    """(model in float32 and without dropout, tokenizer). Raises BadInput if a weight or a row is missing."""
    with or_refuse(f"model {name} cannot be used from safetensors files"):
        if Path(name, "adapter_config.json").exists():
            raise ValueError("it is an adapter: merge it into its model and save the whole")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        config = transformers.AutoConfig.from_pretrained(name)
        for part in (config, config.get_text_config()):  # no dropout, nor other noise, in training mode
            for key, value in vars(part).items():
                if isinstance(value, float) and ("drop" in key or "jitter" in key):
                    setattr(part, key, 0.0)
        model, info = auto_class.from_pretrained(
            name, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        if info["missing_keys"]:
            raise ValueError(f"weights are not in its files, {min(info['missing_keys'])} for one")
        unused = [key for key in info["unexpected_keys"] if key.startswith(f"{model.base_model_prefix}.")]
        if unused:
            raise ValueError(f"weights in its files are not of this model, {min(unused)} for one")
        if max(tokenizer.get_vocab().values()) >= len(model.get_input_embeddings().weight):
            raise ValueError("its tokenizer has ids beyond the rows of its embedding: resize it")
    return model, tokenizer


def load_lm(run: Run, name: str, device=None, precision: str | None = None) -> LM:
    """A causal LM, by default on the run's device and in its precision."""
    if name == "demo":
        model, tokenizer = demo_model(run.args.seed), demo_tokenizer()
    else:
        model, tokenizer = load_pretrained(transformers.AutoModelForCausalLM, name)
    if run.args.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return LM(model.to(device or run.device), precision or run.args.precision, run.device, tokenizer)


@torch.no_grad()
def check_model(lm: LM, name: str):
    """Raise BadInput unless generate(), with its cache and left padding, draws from head(body(tokens))."""
    prompts = torch.tensor([[0, 0, 0, 3, 4], [5, 6, 7, 8, 9]], device=lm.model.device)
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=8, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    output = lm.generate(prompts, (prompts > 0).long(), config)
    padded = output.sequences[0].tolist()
    ours = lm.logits(lm.hidden(collate([[Response(padded[3:5], padded[5:])]], pad_id=0))).log_softmax(-1)
    own = torch.stack(output.logits)[:, 0].log_softmax(-1)
    if not (ours - own.to(ours.device)).abs().max() <= 1e-2:  # not <=, so NaN fails too
        raise BadInput(f"model {name}: generate() and head(body(tokens)) differ, or are not finite")


# Files. All but metrics.jsonl are written aside and renamed: a kill leaves them whole or not at all.


@contextlib.contextmanager
def written_aside(path: Path):
    """Give another path to write to; then rename what was written there to `path`."""
    aside = path.with_name(f".{path.name}.partial")
    with or_refuse(f"{path} cannot be written: make room and run the same command"):
        shutil.rmtree(aside, ignore_errors=True)
        yield aside
        os.replace(aside, path)


def write_json(path: Path, content):
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def save_model(run: Run, model, folder: Path):
    """A Hugging Face checkpoint and its tokenizer; generate() stops where the model was trained to. The
    start's own temperature, penalties and the like are left out: it was not trained with them."""
    if run.rank == 0:
        ids = {"eos_token_id": run.stop_ids, "pad_token_id": run.tokenizer.pad_token_id}
        model.generation_config = transformers.GenerationConfig(**ids)
        with written_aside(folder) as aside:
            model.save_pretrained(aside)
            run.tokenizer.save_pretrained(aside)
        (run.out / f"checkpoint-{folder.name}.pt").unlink(missing_ok=True)
    run.wait()  # the others read it next


def save_checkpoint(run: Run, stage: str, model, optimizer, **progress):
    if run.rank == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **progress}
        with written_aside(run.out / f"checkpoint-{stage}.pt") as aside:
            torch.save(state, aside)


def resume(run: Run, stage: str, model, optimizer) -> tuple[int, int]:
    """Put this stage's last checkpoint into model and optimizer; (steps, tokens) done. Later lines of
    metrics.jsonl are dropped, for they are written again, and so is one that a kill cut."""
    step, num_tokens = 0, 0
    path, metrics = run.out / f"checkpoint-{stage}.pt", run.out / "metrics.jsonl"
    if path.exists():
        state = torch.load(path, map_location=run.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, num_tokens = state["step"], state["num_tokens"]
        run.say(f"{stage}: going on after step {step}")
    if run.rank == 0 and metrics.exists():
        lines = metrics.read_text().splitlines(keepends=True)
        ours = [line for line in lines if line.startswith(f'{{"stage": "{stage}"')]
        others = [line for line in lines if line not in ours and line.endswith("\n")]
        with written_aside(metrics) as aside:
            aside.write_text("".join(others + ours[:step]))
    return step, num_tokens


def main() -> int:
    """The command line. The exit status is 2 for what cannot be used, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot print a character does not end a run
    again = "the same command goes on from the last checkpoint"
    try:
        align(parse_args())
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except BadInput as error:
        status, message = 2, error
    except torch.OutOfMemoryError as error:
        flags = "--tokens_per_micro_batch or --sampling_batch_size, or use --gradient_checkpointing"
        status, message = 2, f"{one_line(error)}; lower {flags}: {again}"
    except KeyboardInterrupt:
        status, message = 130, f"stopped; {again}"
    tqdm.write(f"aligndistil.py: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
