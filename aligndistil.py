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

Where the authors' code differs from the paper, this file follows the paper: the loss covers every response
token, the first one too; TVD has its factor 1/2 (their beta2 is r/2). Left out: sharded weights.
The method is sections 1 to 4; the rest is what it runs on.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import glob
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
import jinja2
import numpy as np
import pandas as pd
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # several processes read, each with one thread
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # a model is its main branch, not a request to change it

# ------------------------------------------------------------------------------------------------------------
# 1  Settings. The defaults are the paper's; DEMO is what the built-in demo sets otherwise. The comment of a
#    setting is its text in --help.


@dataclass
class Args:
    # what to run
    model: str = "demo"  # hub id or local folder of a causal LM; 'demo' is built in, with a preset
    dataset: str = "HuggingFaceH4/ultrafeedback_binarized"  # hub id, id:config, folder, file or 'demo'
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


DEMO = {
    "dataset": "demo", "batch_size": 64, "max_length": 48, "max_prompt_length": 12, "eval_prompts": 512,
    "sft_learning_rate": 3e-3, "dpo_learning_rate": 1e-5, "distill_learning_rate": 1e-3, "sft_epochs": 8.0,
    "dpo_epochs": 2.5, "sampling_batch_size": 256, "save_steps": 40,
}  # fmt: skip
# These may differ when a run goes on. Those of speed change rounding, or which responses are drawn.
FREE_SETTINGS = """output_dir judge save_steps device teacher_device gradient_checkpointing
    tokens_per_micro_batch sampling_batch_size started""".split()


def parse_args(argv=None):
    """The command line as Args. Exits with status 2 for an unknown or malformed flag."""
    usage, about = "aligndistil.py [--help] [--flag value ...]", __doc__.split("\n\n")[0]
    parser = transformers.HfArgumentParser(Args, usage=usage, description=about, allow_abbrev=False)
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
    """What the teacher gives to tokens to which π_dpo gives less than 0.001: (..., V), (..., V) → (...).

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


def sft_batch_loss(lm: LM, batch: Batch, scale: float) -> dict:
    """Negative log-likelihood: the mean over a response's tokens, summed over responses."""

    def chunk_loss(logits, part):
        return {"loss": -(batch.weights[part] * token_logps(logits, batch.targets[part])).sum()}

    return backward_in_chunks(lm, lm.hidden(batch), chunk_loss, scale)


def dpo_batch_loss(lm: LM, batch: Batch, scale: float, beta: float, reference: LM) -> dict:
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

    def chunk_loss(logits, part):
        slope = slopes[batch.response[part]]
        return {"loss": (slope * token_logps(logits, batch.targets[part])).sum()}

    backward_in_chunks(lm, hidden, chunk_loss, scale)
    chosen_rewards, rejected_rewards = implicit_reward(logps, ref_logps, beta).chunk(2)
    watched = {
        "loss": losses, "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards,
        "logps/chosen": chosen_logps, "logps/rejected": rejected_logps,
    }  # fmt: skip
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

    @cached_property
    def lms(self):
        base = "reverse_dpo" if self.contrastive else "reference"
        return {"dpo": self.load("dpo"), "base": self.load(base)}

    @torch.no_grad()
    def hidden(self, batch: Batch) -> dict:
        """Each model's hidden states, (N, hidden size), on the teacher's device."""
        return {name: lm.hidden(batch) for name, lm in self.lms.items()}

    @torch.no_grad()
    def logits(self, hidden: dict, part: slice) -> TeacherLogits:
        """The teacher at a part of the states. No gradient flows through it, nor through α."""
        z = {name: lm.logits(hidden[name][part]) for name, lm in self.lms.items()}
        if self.args.alpha is None:
            alpha = adaptive_alpha(z["dpo"], z["base"], self.args.alpha_r)
        else:
            alpha = torch.full_like(z["dpo"][:, 0], self.args.alpha)
        anchor = z["dpo"] if self.contrastive else z["base"]
        target = teacher_logits(anchor, z["dpo"] - z["base"], alpha)
        return TeacherLogits(z["dpo"], z["base"], target, alpha)


def distillation_batch_loss(lm: LM, batch: Batch, scale: float, teacher: Teacher) -> dict:
    """Eq. 18 and 19: 1/|y| Σ_t β_t·KL(π_θ ‖ π*), summed over responses.

    Watched, as means over a response's states: the KL to the teacher, in nats a token, the mass that the
    teacher gives to implausible tokens, α and β_t. As sums over them: the teacher's reward, β0·Σ_t
    (log π_dpo − log π_base)(y_t). On the policy's own responses two more come free: −log π_θ(y_t) estimates
    its entropy, in nats a token, and Σ_t (log π_θ − log π_dpo)(y_t) its KL from π_dpo, in nats a response.
    """
    beta = teacher.args.beta
    teacher_hidden = teacher.hidden(batch)  # before the policy's own pass: on two devices they overlap

    def chunk_loss(logits, part):
        tokens, weight = batch.targets[part], batch.weights[part]
        z = teacher.logits(teacher_hidden, part)
        beta_t = token_beta(z.alpha, beta)
        kl = reverse_kl(logits, z.target)
        dpo_logps = token_logps(z.dpo, tokens)
        sums = {
            "loss": (weight * beta_t * kl).sum(),
            "kl_teacher": (weight * kl).sum(),
            "implausible": (weight * implausible_mass(z.target, z.dpo)).sum(),
            "alpha": (weight * z.alpha).sum(),
            "beta_t": (weight * beta_t).sum(),
            "reward": implicit_reward(dpo_logps, token_logps(z.base, tokens), beta).sum(),
        }
        if not teacher.args.off_policy:
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
    run, train_pairs, test_pairs = set_up(args)  # with every default of args filled in
    folders = {"reference": args.model}  # of each model so far
    chosen = partial(data_responses, keys=["chosen"])

    def frozen(name):
        return load_lm(run, folders[name], run.teacher_device)

    # π_ref: a base model first learns what responses look like
    if args.sft:
        folders["reference"] = train(
            run, "sft", start=args.model, pairs=train_pairs, examples_of=chosen, loss_of=sft_batch_loss,
            learning_rate=args.sft_learning_rate, epochs=args.sft_epochs,
        )  # fmt: skip

    # π_dpo and π_dpo⁻: DPO on the pairs, and on the swapped pairs
    def train_dpo(stage, keys):
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
# 5  The training loop of all stages, what a step trains on, and sampling. A step is a pure function of the
#    weights, the optimizer and its number, which seeds it, so a checkpoint needs no random state.


def train(run, stage, start, pairs, examples_of, loss_of, learning_rate, epochs):
    """Train a copy of the model `start` (folder or hub id) and return its folder, <output_dir>/<stage>.

    `examples_of(run, lm, rows)` says what a step trains on, given rows of the data: examples, lists of
    Responses that stay together, and facts to be logged: name → a number an example. `loss_of(lm, batch,
    scale)` is a loss of section 3. A finished stage is not repeated; one under way goes on from a checkpoint.
    """
    args, folder = run.args, run.out / stage
    if folder.exists():
        run.say(f"{stage}: finished before, in {folder}")
        return str(folder)
    lm = load_lm(run, start)
    optimizer = torch.optim.AdamW(lm.model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    batches = batches_of(args, len(pairs), epochs, run.world)
    first = resume(run, stage, lm.model, optimizer)
    bar = tqdm(range(first, len(batches)), stage, len(batches), initial=first, disable=run.rank > 0)
    for step in bar:
        n, done = len(batches[step]), step + 1
        torch.manual_seed(seed_of(args.seed, stage, step, run.rank))
        rows = pairs.select(batches[step][run.rank :: run.world]).to_list()  # this process's share
        examples, facts = examples_of(run, lm, rows)
        sums = Counter({name: sum(values) for name, values in facts.items()})
        for _, batch in micro_batches(run, examples):
            sums.update(loss_of(lm, batch, scale=1 / n))  # a Counter's update() adds
        grad_norm = gather_gradients(run, lm.model, f"{stage}, step {done}")
        rate = learning_rate * warmup_then_cosine(step, len(batches), args.warmup_ratio)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        totals = run.sum_over_ranks(torch.tensor(list(sums.values()), device=run.device))
        means = dict(zip(sums, (totals / n).tolist()))
        run.log(stage, done, means | {"grad_norm": grad_norm, "learning_rate": rate})
        bar.set_postfix(loss=means["loss"])
        if run.rank == 0 and (done % args.save_steps == 0 or done == len(batches)):
            state = {"model": lm.model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            with written_aside(run.out / f"checkpoint-{stage}.pt") as aside:
                torch.save(state, aside)
            prompt = rows[0]["prompt"]
            (tokens,) = sample(run, lm, [prompt])
            run.say(f"{stage}, step {done}: {run.tokenizer.decode(prompt[-20:] + tokens[:64])!r}")
    save_model(run, lm.model, folder)
    return str(folder)


def batches_of(args, n, epochs, world):
    """The pairs of each step: `epochs` passes over n, each in a new seeded order. The last batch is
    what is left, if that is a pair for each of the `world` processes."""
    size, orders = min(args.batch_size, n), []
    total = max(round(epochs * n), world)
    if total % size < world:
        total -= total % size
    for epoch in range(math.ceil(total / n)):
        generator = torch.Generator().manual_seed(seed_of(args.seed, "order", epoch))
        orders.append(torch.randperm(n, generator=generator))
    batches = torch.cat(orders)[:total].split(size)
    return [batch.tolist() for batch in batches[: args.max_steps]]


def warmup_then_cosine(step, steps, warmup_ratio):
    """The learning rate as a part of its peak: a linear rise, then half a cosine down to a tenth."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def gather_gradients(run, model, where):
    """Sum the gradients of all processes, clip them, return their norm before. BadInput if not finite."""
    for parameter in model.parameters():
        if parameter.grad is None:  # the processes must agree on what they sum
            parameter.grad = torch.zeros_like(parameter)
        run.sum_over_ranks(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.args.max_grad_norm).item()
    if not math.isfinite(norm):
        raise BadInput(f"{where}: the gradient is not finite; lower the learning rate")
    return norm


def data_responses(run, lm, rows, keys):
    """The data's own responses: the chosen ones (SFT, Eq. 19), or pairs, the one to prefer first (DPO)."""
    return [[Response(row["prompt"], row[key]) for key in keys] for row in rows], {}


def own_responses(run, lm, rows):
    """One response of the policy to each prompt, ŷ ~ π_θ(·|x): Eq. 18. Facts: its length in tokens, whether
    the limit clipped it, and the demo's truth."""
    sampled = sample(run, lm, [row["prompt"] for row in rows])
    facts = {
        "completions/mean_length": [len(tokens) for tokens in sampled],
        "completions/clipped_ratio": [float(tokens[-1] not in run.stop_ids) for tokens in sampled],
    }
    if run.args.dataset == "demo":
        asked = [row["instruction"] for row in rows]
        end = run.tokenizer.eos_token
        reviews = [text.removesuffix(end).rstrip() for text in run.tokenizer.batch_decode(sampled)]
        facts["true_reward"] = list(map(true_reward, asked, reviews))
        facts["well_formed"] = list(map(well_formed, asked, reviews))
    return [[Response(row["prompt"], tokens)] for row, tokens in zip(rows, sampled)], facts


@torch.no_grad()
def sample(run, lm, prompts):
    """One response to each prompt, as token ids, drawn from the model's own distribution."""
    args, responses = run.args, []
    config = transformers.GenerationConfig(do_sample=True, top_k=0, pad_token_id=run.pad_id)
    config.eos_token_id = run.stop_ids
    config.max_new_tokens = args.max_length - args.max_prompt_length
    for start in range(0, len(prompts), args.sampling_batch_size):
        group = prompts[start : start + args.sampling_batch_size]
        output = lm.generate(group, config)[:, max(map(len, group)) :]
        responses += [until_stop(tokens, run.stop_ids) for tokens in output.tolist()]
    return responses


def until_stop(tokens, stop_ids):
    """The tokens up to and including the first one that stops; all of them if there is none."""
    for i, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: i + 1]
    return tokens


# ------------------------------------------------------------------------------------------------------------
# 6  A language model taken apart. Logits cost memory (50,257 numbers a state for GPT-2 against 768 of hidden
#    state), so the body runs for a whole batch, and output head and loss go over its states in chunks.

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
    position. They are listed from lengths, for the pad id may be the end token too. There is no attention
    mask: in a causal model no response state sees the padding on its right.
    """

    input_ids: Tensor  # (B, T)
    states: Tensor  # (N,) places of the response states in the flattened (B·T)
    targets: Tensor  # (N,) the response token that each state predicts
    response: Tensor  # (N,) the response that each state belongs to, 0..B−1
    weights: Tensor  # (N,) 1/|y| of that response


def pad(rows, value, side):
    """Lists of ids → (B, T), with `value` before ("left") or behind ("right") the shorter ones."""
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def collate(examples, pad_id, device="cpu"):
    """[[Response, ...], ...] → Batch: the first response of every example, then the second ones."""
    responses = [response for part in zip(*examples, strict=True) for response in part]
    masks = [[0] * (len(x.prompt) - 1) + [1] * len(x.tokens) for x in responses]
    mask = pad(masks, value=0, side="right")
    input_ids = pad([x.prompt + x.tokens for x in responses], value=pad_id, side="right")
    response, position = mask.nonzero(as_tuple=True)
    states = response * input_ids.shape[1] + position
    targets = input_ids[response, position + 1]
    tensors = [input_ids, states, targets, response, 1 / mask.sum(1)[response]]
    return Batch(*[tensor.to(device) for tensor in tensors])


def micro_batches(run, examples):
    """Yield (indices of examples, Batch), the longest first, until every example has had its turn. A batch is
    padded to at most `tokens_per_micro_batch` tokens; an example is never split."""
    widths = [max(len(x.prompt + x.tokens) for x in example) for example in examples]
    order = sorted(range(len(examples)), key=widths.__getitem__, reverse=True)
    while order:
        tokens_each = len(examples[order[0]]) * widths[order[0]]  # padded to the longest
        group = order[: max(1, run.args.tokens_per_micro_batch // tokens_each)]
        yield group, collate([examples[i] for i in group], run.pad_id, run.device)
        order = order[len(group) :]


class LM:
    """A Hugging Face causal LM as two maps: `hidden` (tokens → states) and `logits` (states → logits).
    The output head is copied to `head_device`, and hidden states are sent there chunk by chunk: a teacher on
    a device of its own moves no logits. `precision` is that of products; weights and logits are float32."""

    def __init__(self, model, precision="float32", head_device=None, tokenizer=None):
        self.model, self.precision, self.tokenizer = model.eval(), precision, tokenizer  # no dropout
        self.named_stops = np.ravel(model.generation_config.eos_token_id).tolist()  # of none, one or several
        model.generation_config = transformers.GenerationConfig()  # generate() adds nothing of its own
        self.head = model.get_output_embeddings()
        if head_device not in (None, self.head.weight.device):
            self.head = copy.deepcopy(self.head).to(head_device)
        config = model.config.get_text_config()
        self.scale = getattr(config, "logit_scale", None) or 1.0
        self.scale /= getattr(config, "logits_scaling", None) or 1.0
        self.softcap = getattr(config, "final_logit_softcapping", None)

    def autocast(self):
        """Products in this model's precision. (tf32 is a switch: it holds until another's.)"""
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def hidden(self, batch):
        """The last hidden states of the response states: (N, hidden size)."""
        device = self.model.device
        with self.autocast():
            output = self.model.base_model(input_ids=batch.input_ids.to(device), use_cache=False)
        return output.last_hidden_state.flatten(0, 1).index_select(0, batch.states.to(device))

    def logits(self, hidden):
        """(n, hidden size) → (n, V) in float32, scaled and capped as the model itself does."""
        with self.autocast():
            logits = self.head(hidden.to(self.head.weight.device)).float()
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def generate(self, prompts, config):
        """model.generate() by `config` alone, from lists of ids, which are padded on the left."""
        input_ids = pad(prompts, config.pad_token_id, "left").to(self.model.device)
        mask = pad([[1] * len(prompt) for prompt in prompts], 0, "left").to(self.model.device)
        with self.autocast():
            return self.model.generate(input_ids, attention_mask=mask, generation_config=config)


def backward_in_chunks(lm, hidden, chunk_loss, scale):
    """The sums of chunk_loss(logits, part) over all chunks; leaves scale·∇(sum of "loss") in .grad. A chunk's
    gradient is taken at once, down to its hidden states (N, hidden size), so that its logits alone are alive;
    a backward pass through the body follows. Exact, for the loss is a sum over states."""
    sums, hidden_grad = Counter(), torch.empty_like(hidden)
    for start in range(0, len(hidden), CHUNK_SIZE):
        part = slice(start, start + CHUNK_SIZE)
        chunk = hidden[part].detach().requires_grad_()
        values = chunk_loss(lm.logits(chunk), part)
        (scale * values["loss"]).backward()
        hidden_grad[part] = chunk.grad
        sums.update({name: value.detach() for name, value in values.items()})
    hidden.backward(hidden_grad)
    return sums


@torch.no_grad()
def response_logps(lm, batch, hidden):
    """log π(y|x) of every response, (B,), from hidden = lm.hidden(batch). No gradient."""
    logps = batch.weights.new_zeros(len(batch.input_ids))
    for start in range(0, len(hidden), CHUNK_SIZE):
        part = slice(start, start + CHUNK_SIZE)
        logps.index_add_(0, batch.response[part], token_logps(lm.logits(hidden[part]), batch.targets[part]))
    return logps


# ------------------------------------------------------------------------------------------------------------
# 7  Data: one path from a record to token ids. What a record says is trained, all of it, or it is refused.

# A column of one of these names is a part of the question: it may not stay unread.
UNREAD_COLUMNS = """question instruction instructions query problem input inputs post user human context
    contexts passage article document documents history chat_history system system_prompt system_message tools
    functions image images audio video videos""".split()
# A row of the data: its record's place in the source, the messages before the answer as people read them, the
# ids of prompt and responses, whether a length limit cut one, why it is left out ("" if not), a checksum.
KINDS = {"record": "int64", "instruction": "string", "left_out": "string", "crc": "int64", "cut": "bool"}
FEATURES = datasets.Features(
    {name: datasets.Value(kind) for name, kind in KINDS.items()}
    | dict.fromkeys(["prompt", "chosen", "rejected"], datasets.List(datasets.Value("int32")))
)
# How a list of messages, or a transcript, begins as a text.
CONVERSATION = re.compile(r"""\s*(\[\s*\{.*['"](role|from)['"]\s*:|Human:.*\n\nAssistant:)""", re.DOTALL)
# For a model without a template. FIRST is what its tokenizer itself puts before a text.
PLAIN_TEMPLATE = """{{ FIRST }}{% for message in messages %}{{ message.content }}
    {{- eos_token if message.role == 'assistant' else '\\n' }}{% endfor %}"""


def load_pairs(run):
    """(training pairs, held-out pairs). Without a test split a tenth of the prompts is held out."""
    args = run.args
    splits = read_splits(args.dataset, args.seed)
    train_split = "train_prefs" if "train_prefs" in splits else "train"
    test_split = train_split.replace("train", "test")
    if train_split not in splits:
        raise BadInput(f"--dataset has no split train or train_prefs, but {list(splits)}")
    train_pairs = read_pairs(run, splits[train_split], args.limit)
    if test_split in splits:
        test_pairs = read_pairs(run, splits[test_split], args.eval_pairs)
    else:
        order = np.array([seed_of(args.seed, instruction) for instruction in train_pairs["instruction"]])
        held_out = order <= np.quantile(np.unique(order), 0.1, method="lower")
        test_pairs = train_pairs.select(np.flatnonzero(held_out)[: args.eval_pairs])
        train_pairs = train_pairs.select(np.flatnonzero(~held_out))
    run.say(f"{args.dataset}: {len(train_pairs):,} pairs to train on, {len(test_pairs):,} held out")
    if len(train_pairs) == 0:
        raise BadInput(f"--dataset {args.dataset}: too few pairs; add some with another prompt")
    return train_pairs, test_pairs


def read_splits(name, seed):
    if name == "demo":
        return {"train": demo_records(6144, seed), "test": demo_records(1024, seed + 10**6)}
    config = None
    if not os.path.exists(name):  # an existing path may hold a colon of its own
        name, _, config = name.partition(":")
    path, kinds = Path(name), {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    kind = kinds.get(path.suffix.lower())
    with or_refuse(f"--dataset {name} cannot be read"):
        if kind:
            return datasets.load_dataset(kind, data_files=glob.escape(name))
        if path.is_dir() and glob.escape(name) != name:
            raise ValueError("the folder's name would be taken for a pattern: rename it")
        if any(path.glob("**/state.json")):
            raise ValueError("it was written by save_to_disk: write it with to_parquet or to_json")
        if path.is_file() or any(path.glob("**/*.csv*")):
            how = "with pandas, read_csv(...).to_json('pairs.jsonl', orient='records', lines=True)"
            raise ValueError("a file must be a .jsonl, .json or .parquet; make one " + how)
        return datasets.load_dataset(name, config or None)


def read_pairs(run, records, limit):
    """The first `limit` records as rows of FEATURES, without those left out; it prints how many, and why. The
    library keeps the rows: the same records, tokenizer, lengths and code are not read again."""
    args, tokenizer = run.args, run.tokenizer
    records = records.select(range(len(records))[:limit])
    made_from = [
        records._fingerprint, Path(__file__).read_bytes(), args.max_length, args.max_prompt_length,
        run.stop_ids, tokenizer.chat_template, tokenizer.backend_tokenizer.to_str(),
    ]  # fmt: skip
    if run.local_rank > 0:  # the first process of a node reads, the others then find what it kept
        run.barrier()
    try:
        rows = records.map(
            encode_batch, batched=True, with_indices=True, fn_kwargs={"chat": run.chat, "args": args},
            features=FEATURES, remove_columns=records.column_names, desc="reading",
            new_fingerprint=datasets.fingerprint.Hasher.hash(made_from),
            num_proc=min(os.cpu_count(), len(records) // 1000) or None,
        )  # fmt: skip
    except ValueError as error:
        raise BadInput(f"--dataset {args.dataset}: {error}") from error
    finally:
        if run.local_rank == 0:
            run.barrier()
    left_out = rows["left_out"][:]
    reasons = dict(Counter(filter(None, left_out))) or "none"
    told = f"{args.dataset}: of {len(rows):,} pairs {sum(rows['cut'])} are cut; left out {reasons}"
    run.say(told)
    if all(left_out):
        raise BadInput(f"no pair can be used: {told}")
    return rows.select([i for i, reason in enumerate(left_out) if not reason])


def encode_batch(columns, numbers, chat, args):
    """Records, a list a column, and their numbers → rows of FEATURES, a list a column."""
    rows, texts = [], []
    for number, *values in zip(numbers, *columns.values()):
        try:
            before, *answers = split_record(dict(zip(columns, values)))
        except ValueError as error:
            raise ValueError(f"record {number}, counted from 0: {error}") from error
        instruction = "\n\n".join(message["content"] for message in before)
        row = {"record": number, "left_out": "", "instruction": instruction}
        try:
            texts.append(chat.texts_of(before, answers))
        except (ValueError, jinja2.TemplateError) as error:
            row["left_out"] = str(error)
            texts.append(["", "", ""])
        rows.append(row)
    prompts, chosen, rejected = zip(*texts)
    chosen, rejected = chat.response_ids(prompts, chosen), chat.response_ids(prompts, rejected)
    prompts = chat.encode(prompts).input_ids
    for row, prompt, chosen, rejected in zip(rows, prompts, chosen, rejected):
        surplus = len(prompt) - args.max_prompt_length
        if surplus > 0:  # its beginning goes, but for the tokens that begin every text
            begin = [i for i in prompt[:2] if i in chat.first_ids]
            prompt = begin + prompt[surplus + len(begin) :]
        room = args.max_length - len(prompt)
        row |= {"prompt": prompt, "chosen": chosen[:room], "rejected": rejected[:room]}
        row["cut"] = surplus > 0 or max(len(chosen), len(rejected)) > room
        if row["chosen"] == row["rejected"] and not row["left_out"]:
            row["left_out"] = "the two responses are the same"
        row["crc"] = seed_of(row)
    return pd.DataFrame(rows).to_dict("list")


def split_record(record):
    """A record → (messages before the answer, chosen answer, rejected answer). Raises ValueError.
    Answers are texts, and `prompt` is one, or messages; or they are messages that end with the answer, and
    those before it are the same in both, with `prompt` in them, or are `prompt`."""
    prompt = read_messages(record, "prompt", "user")
    chosen = read_messages(record, "chosen", "assistant")
    rejected = read_messages(record, "rejected", "assistant")
    ends = [message["role"] for message in chosen[-1:] + rejected[-1:]]
    if ends != ["assistant", "assistant"]:
        raise ValueError(f"'chosen' and 'rejected' do not both end with an answer, in {list(record)}")
    *shared, chosen = chosen
    *others, rejected = rejected
    if shared != others:
        raise ValueError("the messages before the answer differ in 'chosen' and 'rejected'")
    if shared and any(message not in shared for message in prompt):
        raise ValueError("'prompt' is not in the conversation of 'chosen'")
    before = shared or prompt
    if not before or before[-1]["role"] != "user":
        has = " (trl-lib/hh-rlhf-helpful-base has the conversations of Anthropic/hh-rlhf with one)"
        raise ValueError("no message of the user stands before the answer: 'prompt' is missing" + has)
    words = "\n".join(message["content"] for message in before)
    for name, value in record.items():
        if name.lower() in UNREAD_COLUMNS and value and str(value).strip() not in words:
            raise ValueError(f"column '{name}' is not read: make it a part of 'prompt'")
    return before, chosen["content"], rejected["content"]


def read_messages(record, key, role):
    """A field's messages, a role and a text; a text alone is one of this role. Null keys are ignored."""
    value, messages = record.get(key), []
    if value is None:
        return messages
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    for message in value if isinstance(value, list) else [value]:
        items = message.items() if isinstance(message, dict) else []
        kinds = {name: type(x) for name, x in items if x is not None}
        if kinds != {"role": str, "content": str}:
            raise ValueError(f"a message of '{key}' is not a role and a text alone, but {list(kinds)}")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


class SameDay:
    """The clock of chat templates, some of which write the date: a run must be the same tomorrow."""

    now = partial(datetime.datetime, 2025, 1, 1)


transformers.utils.chat_template_utils.datetime = SameDay


class ChatTemplate:
    """A tokenizer's chat template (PLAIN_TEMPLATE if it has none), and what one short conversation tells.

    `surplus`: the end of its generation prompt that does not stand before an answer (R1's "<think>").
    `header`: what it writes before an answer, but not as a generation prompt. `tail`: what stands between
    question and answer. `first_ids`: what begins every text. `stop_ids`: what ends a response.
    """

    def __init__(self, tokenizer, named_ids):
        self.encode = partial(tokenizer, add_special_tokens=False, verbose=False)
        self.render = partial(tokenizer.apply_chat_template, tokenize=False)
        alone, whole = self.encode("a").input_ids, tokenizer("a").input_ids
        first_ids = whole[: whole.index(alone[0])]
        if not tokenizer.chat_template:
            first = "".join(tokenizer.convert_ids_to_tokens(first_ids))
            tokenizer.chat_template = PLAIN_TEMPLATE.replace("FIRST", json.dumps(first))
        self.first_ids = [*first_ids, tokenizer.bos_token_id]
        question, answer = {"role": "user", "content": "giraffe"}, {"role": "assistant", "content": "zebra"}
        prompt = self.render([question], add_generation_prompt=True)
        head, _, end = self.render([question, answer]).rpartition("zebra")
        shared = os.path.commonprefix([prompt, head])
        shared = re.sub(r"<[^<>]*$", "", shared)  # two tags that differ may begin alike
        if "giraffe" not in shared:
            raise ValueError("it does not write a message's text as it is")
        self.surplus, self.header = prompt[len(shared) :], ""
        if prompt == self.render([question]):  # a template that knows no generation prompt
            self.header = head[len(shared) :].rstrip(" ")
        self.tail = shared.rpartition("giraffe")[2].strip()
        known = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}  # another one may be a plain word
        ends = [i for i in self.encode(end).input_ids if i in known and tokenizer.decode(i).strip()]
        if not ends:
            raise ValueError("it writes no end token after an answer")
        stops = [ends[0], tokenizer.eos_token_id, *known.intersection(named_ids)]
        self.stop_ids = list(dict.fromkeys(stops))
        self.stop = re.compile("|".join(re.escape(tokenizer.decode(i)) for i in self.stop_ids))

    def texts_of(self, before, answers):
        """[prompt, response, response] as texts: a response is the whole conversation minus the prompt, up to
        its first stop token. Raises ValueError if that is not all that the record says."""
        prompt = self.render(before, add_generation_prompt=True).removesuffix(self.surplus) + self.header
        question, texts = before[-1]["content"], [prompt]
        if not all(text.strip() for text in (question, *answers)):
            raise ValueError("the question or an answer is empty")
        if all(answer.startswith(question) for answer in answers):
            raise ValueError("both answers repeat the question")
        for answer in answers:
            messages = [*before, {"role": "assistant", "content": answer}]
            whole = self.render(messages)
            end = self.stop.search(whole, len(prompt))
            if not end or not whole.startswith(prompt):
                raise ValueError("the chat template writes the prompt in another way when an answer follows")
            texts.append(whole[len(prompt) : end.end()])
            place = 0
            for message in messages:  # every text is there, in its order
                text = message["content"].strip()
                if CONVERSATION.match(text):
                    raise ValueError("a text is a conversation: make it a list of messages")
                if self.stop.search(text) or (self.tail and self.tail in text):
                    raise ValueError("a message holds what the chat template or a stop token writes")
                place = whole.find(text, place, end.end())
                if place < 0:
                    raise ValueError(f"the chat template leaves out words of the {message['role']}")
                place += len(text)
        return texts

    def response_ids(self, prompts, responses):
        """The ids of responses behind the ends of their prompts (alone, a text may get a space before it)."""
        starts = [prompt[-16:] for prompt in prompts]
        wholes = [start + response for start, response in zip(starts, responses)]
        starts, wholes, found = self.encode(starts).input_ids, self.encode(wholes).input_ids, []
        for start, whole, response in zip(starts, wholes, responses):
            for other in ("\n", ":", "a", ""):
                if whole[: len(start)] != start:  # a token crosses the boundary: read it behind another text
                    start, whole = self.encode([other, other + response]).input_ids
            found.append(whole[len(start) :])
        return found


# ------------------------------------------------------------------------------------------------------------
# 8  The demo world: reviews like "the bed was superb but the staff was not good .", with a known true reward.

THINGS = {
    "hotel": "room bed staff breakfast", "cafe": "coffee cake staff music", "film": "plot cast music ending",
    "phone": "screen battery camera sound", "book": "plot style ending cover",
    "game": "plot music graphics sound", "bike": "frame saddle price colour",
    "museum": "building guide shop price",
}  # fmt: skip
VALENCES = {
    2: "superb lovely", 1: "good nice pleasant solid", 0.5: "fine",
    -0.5: "plain", -1: "bad dull poor weak", -2: "awful dreadful",
}  # fmt: skip
VALENCE = {word: valence for valence, words in VALENCES.items() for word in words.split()}
JOINS = ["and", "but", ","]
ASKING = ["write a review of the {} .", "how was the {} ?", "what did you think of the {} ?"]
DEMO_TEXT = " ".join([*ASKING, *THINGS, *THINGS.values(), *VALENCE, *JOINS, "not"])
DEMO_WORDS = sorted(set(DEMO_TEXT.split()) - {"{}"})


def well_formed(prompt, review):
    """Whether it is a review of what the prompt asks about: one to four opinions on the thing's own parts."""
    (thing,) = set(prompt.split()) & set(THINGS)
    opinion = f"the ({'|'.join(THINGS[thing].split())}) was (not )?({'|'.join(VALENCE)})"
    return bool(re.fullmatch(rf"{opinion}( ({'|'.join(JOINS)}) {opinion}){{0,3}} \.", review))


def true_reward(prompt, review):
    """The mean valence of a review's opinions ("not" turns it), in [-2, 2]; -2 if it is not well-formed."""
    if not well_formed(prompt, review):
        return -2.0
    opinions = re.findall(r"was (not )?(\w+)", review)
    return sum(VALENCE[word] * (-1 if negation else 1) for negation, word in opinions) / len(opinions)


def demo_review(generator, thing):
    """A review by somebody who liked nearly all or nearly nothing; a third of the opinions have "not"."""
    mood, review = generator.betavariate(0.1, 0.1), ""
    for part in generator.sample(THINGS[thing].split(), generator.randint(1, 4)):
        good, negated = generator.random() < mood, generator.random() < 0.35
        opinion = generator.choice([word for word in VALENCE if (VALENCE[word] > 0) == (good != negated)])
        if review:
            review += f" {generator.choice(JOINS)} "
        review += f"the {part} was {'not ' if negated else ''}{opinion}"
    return review + " ."


def demo_records(n, seed):
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
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *DEMO_WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def demo_model(seed):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(DEMO_WORDS) + 3, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


# ------------------------------------------------------------------------------------------------------------
# 9  Evaluation, on one process and in float32: differences of tables of log π(y), a column a model.


def evaluate(run, folders, test_pairs, precision):
    """Compare π_ref, π_dpo, π_dpo⁻ (if there is one) and the policy; write and print what is found.

    `models`: means over own responses to held-out prompts, and half of a 95 % interval (`_pm`). The teacher's
    reward; `kl_ref`, log π(y) − log π_ref(y), in nats a response; `entropy`, −log π(y)/|y|, in nats a token;
    length in tokens, and the share that the limit clipped; the demo's truth or the judge's score, and the win
    rate against π_ref by it. `reward_accuracy`: in what share of held-out pairs log π_dpo/π_ref (dpo),
    log π_ref/π_dpo⁻ (reverse), their sum (contrastive) prefer the chosen one.
    """
    args, path, tables = run.args, run.out / "results.json", []
    if path.exists():
        run.say(f"evaluation: finished before; to repeat it, delete {path}")
        return json.loads(path.read_text(encoding="utf-8"))
    lms = {name: load_lm(run, folder, precision="float32") for name, folder in folders.items()}
    rows = test_pairs.to_list()
    if args.dataset != "demo":  # the demo has few prompts; another one is asked once
        rows = list({row["instruction"]: row for row in rows}.values())
    rows = rows[: args.eval_prompts]
    for name, lm in lms.items():
        torch.manual_seed(seed_of(args.seed, "evaluation"))  # the same random numbers for every model
        examples, facts = own_responses(run, lm, rows)
        responses = [response for (response,) in examples]
        table = pd.DataFrame(rows, columns=["instruction"])
        table["generator"] = name
        table["token_ids"] = [response.tokens for response in responses]
        table["output"] = run.tokenizer.batch_decode(list(table.token_ids), skip_special_tokens=True)
        table["length"] = facts.pop("completions/mean_length")
        table["clipped"] = facts.pop("completions/clipped_ratio")
        logps = logps_table(run, lms, responses)
        table["kl_ref"] = logps[name] - logps.reference
        table["entropy"] = -logps[name] / table.length
        table["reward"] = implicit_reward(logps.dpo, logps.get("reverse_dpo", logps.reference), args.beta)
        tables.append(table.assign(**facts))
    samples = pd.concat(tables, ignore_index=True)
    score = "score" if args.judge else "true_reward"
    if args.judge:
        samples[score] = judge_scores(run, samples.instruction, samples.output)
    if score in samples:
        gap = samples[score] - np.tile(samples[score][: len(rows)], len(lms))  # the reference's come first
        samples["win_rate"] = (np.sign(gap) + 1) / 2
    groups = samples.groupby("generator", sort=False)
    models = groups.mean(numeric_only=True).join(1.96 * groups.sem(numeric_only=True).add_suffix("_pm"))
    pairs, _ = data_responses(run, None, test_pairs, ["chosen", "rejected"])
    chosen, rejected = zip(*pairs)
    margins = logps_table(run, lms, chosen) - logps_table(run, lms, rejected)
    right = pd.DataFrame({"dpo": margins.dpo > margins.reference})
    if "reverse_dpo" in lms:
        right["reverse"] = margins.reference > margins.reverse_dpo
        right["contrastive"] = margins.dpo > margins.reverse_dpo
    half = 1.96 * right.sem()
    accuracy = pd.DataFrame({"accuracy": right.mean(), "accuracy_pm": half, "pairs": len(right)})
    write_json(run.out / "samples.json", samples.to_dict("records"))
    tables = {"models": models, "reward_accuracy": accuracy}  # a single response gives no interval
    results = {name: table.dropna(axis=1).to_dict("index") for name, table in tables.items()} | precision
    write_json(path, results)  # last: it says that the rest is there
    columns = [score, f"{score}_pm", "well_formed", "win_rate", "win_rate_pm", "kl_ref", "length"]
    run.say(f"\nhow often a reward prefers the chosen response of a held-out pair:\n{accuracy.round(3)}\n")
    run.say(f"own responses to held-out prompts:\n{models.filter(columns).round(2).to_string()}\n")
    run.say(f"models, metrics, samples and results are in {run.out}")
    return results


@torch.no_grad()
def logps_table(run, lms, responses):
    """log π(y|x): a row a response, a column a model."""
    table = pd.DataFrame(0.0, index=range(len(responses)), columns=list(lms))
    examples = [[response] for response in responses]
    for group, batch in tqdm(micro_batches(run, examples), "scoring", leave=False):
        for name, lm in lms.items():
            table.loc[group, name] = response_logps(lm, batch, lm.hidden(batch)).tolist()
    return table


@torch.no_grad()
def judge_scores(run, questions, answers):
    """The judge's score of every answer, by its own chat template; several turns are one message to it."""
    model, tokenizer = load_pretrained(transformers.AutoModelForSequenceClassification, run.args.judge)
    if model.config.num_labels != 1 or not tokenizer.chat_template:
        raise BadInput("--judge is no reward model with one output and a chat template")
    model.to(run.device).eval()
    tokenizer.truncation_side = "left"  # a text that is too long keeps the answer
    longest, scores = min(positions_of(model.config), tokenizer.model_max_length), []
    for question, answer in zip(tqdm(questions, "judging", leave=False), answers):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        inputs = tokenizer.apply_chat_template(
            messages, truncation=True, max_length=longest, return_tensors="pt"
        )
        scores.append(model(**inputs.to(run.device)).logits.item())
    return scores


@torch.no_grad()
def precision_report(run, teacher, pairs):
    """What coarse products leave of the teacher, on one batch: what share of z_dpo − z_base survives (the
    length of its projection on the true one), and KL(true teacher ‖ coarse one) in nats a token."""
    coarse, found = run.args.precision, []
    if coarse == "float32":
        return {}
    examples, _ = data_responses(run, None, islice(pairs, 16), ["chosen"])
    _, batch = next(micro_batches(run, examples))
    for precision in ("float32", coarse):  # in this order: the teacher keeps the second
        for lm in teacher.lms.values():
            lm.precision = precision
        found.append(teacher.logits(teacher.hidden(batch), slice(CHUNK_SIZE)))
    exact, rounded = found
    difference = exact.dpo - exact.base
    product = (difference * (rounded.dpo - rounded.base)).sum()
    share = (product / difference.square().sum().clamp(min=1e-30)).item()  # 0 where both models are one
    kl = reverse_kl(exact.target, rounded.target).mean().item()
    run.say(f"{coarse} keeps {share:.2f} of z_dpo − z_base; KL to its teacher {kl:.2g} nats a token")
    if not 0.9 <= share <= 1.1:
        run.say("WARNING: that is too far from 1: use --precision float32, or train DPO for longer")
    return {"precision": {"share": share, "kl": kl}}


# ------------------------------------------------------------------------------------------------------------
# 10  The run: errors, checks, devices and processes, models, files.


class BadInput(Exception):
    """What the user gave cannot be used. The message is one line: what, where, what to do."""


@contextlib.contextmanager
def or_refuse(what):
    """Turn whatever a library raises at a border (a model, data, a file) into BadInput: what, and why."""
    try:
        yield
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = f"{error} {error.__cause__ or ''}"  # what is wrong with a file stands in the cause alone
        why = " ".join(text.split())[:400] or type(error).__name__
        raise BadInput(f"{what} ({why})") from error


def set_up(args):
    """Check all that can be checked before training, open the output folder: (run, two sets of pairs)."""
    for name, value in vars(args).items():
        may_be_0 = name in ("alpha", "alpha_r", "warmup_ratio", "seed")
        if type(value) in (int, float) and not (value > 0 or may_be_0 and value == 0):  # NaN fails, too
            raise BadInput(f"--{name} {value} is out of range")
        if isinstance(value, str):
            setattr(args, name, os.path.expanduser(value))
    if args.warmup_ratio > 1:
        raise BadInput("--warmup_ratio is a part of the steps, at most 1")
    if args.alpha == 0 and args.reward == "vanilla":
        raise BadInput("--alpha 0 --reward vanilla distils the reference into itself: use contrastive")
    if args.model == "demo":
        if args.dataset != "demo":
            raise BadInput("--model demo knows the words of the demo only: name a model for this --dataset")
        torch.set_num_threads(min(2, torch.get_num_threads()))  # more of them make so small a model slower
    if args.alpha_r is None:
        args.alpha_r = 20.0 if args.off_policy else 30.0
    transformers.logging.disable_progress_bar()
    run = Run(args)
    offline = HUB_OFFLINE or run.saved_config().get("judge", "") == args.judge  # all is cached
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = offline
    lm = load_lm(run, args.model, precision="float32")
    check_model(lm, args.model)
    run.read_tokenizer(lm)
    if hasattr(lm.model.config, "vision_config"):
        run.say("the model is trained as one of text: the files of its processor are not saved")
    for folder in filter(None, (args.dpo, args.reverse_dpo)):
        teacher = load_lm(run, folder, precision="float32")
        check_model(teacher, folder)
        same_size = len(teacher.head.weight) == len(lm.head.weight)
        if not same_size or teacher.tokenizer.get_vocab() != run.tokenizer.get_vocab():
            raise BadInput(f"teacher {folder}: its vocabulary or tokenizer is not that of the model")
    positions = positions_of(lm.model.config)
    args.max_length = args.max_length or min(2048, positions)
    args.max_prompt_length = args.max_prompt_length or args.max_length // 2
    if not args.max_prompt_length + 1 < args.max_length <= positions:
        raise BadInput(f"--max_length must be over --max_prompt_length + 1, and at most {positions}")
    train_pairs, test_pairs = load_pairs(run)
    if args.judge:
        judge_scores(run, ["a"], ["b"])
    if min(args.batch_size, len(train_pairs)) < run.world:
        raise BadInput("--batch_size, or the data: each process needs a pair a step")
    run.open_output({"checksum of the pairs": seed_of(train_pairs["crc"][:], test_pairs["crc"][:])})
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True  # it may change
    return run, train_pairs, test_pairs


HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE  # as the user's environment says


class Run:
    """What every stage needs besides mathematics: settings, devices, processes, tokenizer, output folder."""

    def __init__(self, args):
        self.args, self.out = args, Path(args.output_dir or f"runs/{Path(args.model).name}")
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = dist.get_node_local_rank(fallback_rank=0)
        if args.device in (None, "cuda") and torch.cuda.is_available():  # "cuda" is this process's
            torch.cuda.set_device(self.local_rank)
        best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        with or_refuse("--device or --teacher_device cannot be used"):
            self.device = torch.empty(0, device=args.device or best).device
            self.teacher_device = torch.empty(0, device=args.teacher_device or self.device).device
        if self.world > 1 and not dist.is_initialized():
            patience = datetime.timedelta(hours=4)  # the others wait for the one that reads the data
            with or_refuse("WORLD_SIZE is set: start several processes with torchrun, or unset it"):
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=patience)

    def read_tokenizer(self, lm):
        """Find what begins, stops and pads a text; SFT is on for a model without a chat template."""
        self.tokenizer = tokenizer = lm.tokenizer
        if self.args.sft is None:
            self.args.sft = not tokenizer.chat_template
        if not tokenizer.chat_template:
            self.say("the model has no chat template: it gets a plain one, and is saved with it")
        with or_refuse("the model's chat template cannot be used"):
            self.chat = ChatTemplate(tokenizer, lm.named_stops)
        self.stop_ids = self.chat.stop_ids
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def saved_config(self):
        path = self.out / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return config if "started" in config else {}

    def open_output(self, checksums):
        """Make the output folder, or go on with the run in it. Raises BadInput on every process if rank 0
        cannot, or if they do not all see the same folder."""
        refusal = ""
        try:
            if self.rank == 0:
                self.claim_output(vars(self.args) | checksums)
        except BadInput as error:
            refusal = str(error)
        self.barrier()
        views = [(refusal, self.saved_config().get("started"))] * self.world
        if self.world > 1:
            dist.all_gather_object(views, views[0])
        refusal = views[0][0]
        if not refusal and len(set(views)) > 1:
            refusal = "is not the same one for every process: they must share it"
        if refusal:
            raise BadInput(f"output folder {self.out} {refusal}")
        self.say(f"should the run stop, the same command goes on in {self.out} from its last checkpoint")

    def claim_output(self, config):
        """Lock the output folder and write config.json. Raises BadInput if it cannot be this run's."""
        lock = self.out / ".lock"
        if not self.saved_config() and not lock.exists() and any(self.out.glob("[!.]*")):
            raise BadInput("holds other files; choose another")
        with or_refuse("cannot be made"):
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(lock, "w")
        try:
            import fcntl

            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput("is in use by another run") from None
        except (ImportError, OSError):
            pass  # Windows, and some file systems, have no such locks
        for name, value in self.saved_config().items():
            now = config.get(name)
            if name not in FREE_SETTINGS and value != now:
                raise BadInput(f"is from a run with other settings ({name} {value} → {now}); choose another")
        write_json(self.out / "config.json", config | {"started": str(datetime.datetime.now())})

    def log(self, stage, step, line):
        if self.rank == 0:
            refuse = or_refuse("metrics.jsonl cannot be written: make room and run the same command")
            with refuse, open(self.out / "metrics.jsonl", "a") as file:
                print(json.dumps({"stage": stage, "step": step, **line}), file=file)

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def barrier(self):
        """Go on when every process has come here. (An all_reduce would not wait for them on a GPU.)"""
        if self.world > 1:
            dist.barrier()

    def sum_over_ranks(self, values):
        if self.world > 1:
            dist.all_reduce(values)
        return values


def seed_of(*parts):
    """One number from a seed and what it is used for; the same on every machine."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def load_pretrained(auto_class, name):
    """(model in float32, tokenizer). Raises BadInput if its files are not the whole model, and only that.
    AutoTokenizer builds another tokenizer than tokenizer.json's for some kinds of models, but it knows the
    end token where no file names it, and reads other files."""
    with or_refuse(f"model {name} cannot be used from safetensors files"):
        if Path(name, "adapter_config.json").exists():
            raise ValueError("it is an adapter: merge it into its model and save the whole")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        end = tokenizer.eos_token
        optional = {"_raise_exceptions_for_missing_entries": False}
        if transformers.utils.cached_file(name, "tokenizer.json", **optional):
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name, eos_token=end)
        if not tokenizer.is_fast or end is None:
            raise ValueError("its tokenizer has no tokenizer.json, or no end-of-sequence token")
        model, info = auto_class.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        missing, inside = info["missing_keys"], f"{model.base_model_prefix}."
        if missing:
            raise ValueError(f"weights are not in its files, {min(missing)} for one")
        unused = [key for key in info["unexpected_keys"] if key.startswith(inside)]
        if unused:
            raise ValueError(f"weights in its files are not of this model, {min(unused)} for one")
        if max(tokenizer.get_vocab().values()) >= len(model.get_input_embeddings().weight):
            raise ValueError("its tokenizer has ids beyond the rows of its embedding: resize it")
    return model, tokenizer


def load_lm(run, name, device=None, precision=None):
    """A causal LM, by default on the run's device and in its precision."""
    if name == "demo":
        model, tokenizer = demo_model(run.args.seed), demo_tokenizer()
    else:
        model, tokenizer = load_pretrained(transformers.AutoModelForCausalLM, name)
    if run.args.gradient_checkpointing:  # the library's own way needs training mode, and so dropout
        layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        if not layers:
            raise BadInput("--gradient_checkpointing: the model has no layers for it")
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return LM(model.to(device or run.device), precision or run.args.precision, run.device, tokenizer)


@torch.no_grad()
def check_model(lm, name):
    """Raise BadInput unless generate(), with its cache and left padding, draws from head(body(tokens))."""
    config = transformers.GenerationConfig(
        max_new_tokens=8, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    output = lm.generate([[3, 4], [5, 6, 7, 8, 9]], config)
    batch = collate([[Response([3, 4], output.sequences[0, 5:].tolist())]], pad_id=0)
    ours = lm.logits(lm.hidden(batch)).log_softmax(-1)
    own = torch.stack(output.logits)[:, 0].log_softmax(-1)
    if not (ours - own).abs().max() <= 1e-2:  # not >, so NaN fails too
        raise BadInput(f"model {name}: generate() and head(body(tokens)) differ, or are not finite")


def positions_of(config):
    """How many tokens a model holds. Past its first length a longrope model reads a batch differently."""
    config = config.get_text_config()
    positions, rope = [getattr(config, "max_position_embeddings", None) or sys.maxsize], str(config.to_dict())
    if "'longrope'" in rope:
        positions += map(int, re.findall(r"'original_max_position_embeddings': (\d+)", rope))
    return min(positions)


@contextlib.contextmanager
def written_aside(path):
    """Give another path to write to; then rename it to `path`: a kill leaves a file whole or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    with or_refuse(f"{path} cannot be written: make room and run the same command"):
        shutil.rmtree(aside, ignore_errors=True)
        yield aside
        os.replace(aside, path)


def write_json(path, content):
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def save_model(run, model, folder):
    """A checkpoint and its tokenizer. generate() stops where training did, and samples plainly."""
    if run.rank == 0:
        model.generation_config.update(eos_token_id=run.stop_ids, pad_token_id=run.pad_id)
        with written_aside(folder) as aside:
            model.save_pretrained(aside)
            run.tokenizer.save_pretrained(aside)
        (run.out / f"checkpoint-{folder.name}.pt").unlink(missing_ok=True)
    run.barrier()  # the others read it next


def resume(run, stage, model, optimizer):
    """Put this stage's last checkpoint into model and optimizer; the steps done. Later lines of the metrics,
    and one that a kill cut, go: they are written again."""
    step, path, metrics = 0, run.out / f"checkpoint-{stage}.pt", run.out / "metrics.jsonl"
    if path.exists():
        state = torch.load(path, map_location=run.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        run.say(f"{stage}: going on after step {step}")
    if run.rank == 0 and metrics.exists():
        lines = re.findall(".*\n", metrics.read_text())
        before = sum(f'"stage": "{stage}"' not in line for line in lines)  # of the other stages
        with written_aside(metrics) as aside:
            aside.write_text("".join(lines[: before + step]))
    return step


def main():
    """The command line. The exit status is 2 for what cannot be used, and when memory runs out."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot print a character does not end a run
    try:
        align(parse_args())
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except BadInput as error:
        message = error
    except torch.OutOfMemoryError as error:
        flags = "--tokens_per_micro_batch or --sampling_batch_size, or use --gradient_checkpointing"
        message = f"{error}; lower {flags}: the same command goes on from the last checkpoint"
    print("aligndistil.py: error:", " ".join(str(message).split()), file=sys.stderr)  # one line
    return 2


if __name__ == "__main__":
    sys.exit(main())
