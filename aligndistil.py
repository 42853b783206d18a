#!/usr/bin/env python
"""AlignDistil in one file: token-level alignment of a language model as adaptive policy distillation.

    python aligndistil.py                    # the whole method on a built-in demo, minutes on a laptop's CPU
    python aligndistil.py --model gpt2       # a Hugging Face causal LM on UltraFeedback, the paper's data
    python aligndistil.py --help             # every setting, with what it does

The method (Zhang et al., ACL 2025, arXiv 2503.02832) in four sentences. Train one model by DPO, and a second one by
DPO with chosen and rejected swapped. Where the two disagree on the next token, their difference is a reward for
each token of the vocabulary. Extrapolating from the first away from the second gives, at every state, the teacher
that maximises this reward under a KL penalty; how far depends on how much they disagree. The policy is distilled
from that teacher on its own samples.

    1  The mathematics              pure functions, Eq. 4 to 19
    2  The loss of each stage       SFT, DPO, AlignDistil
    3  The algorithm                the stages in order
    4  The training loop            one for all stages
    5  What a step trains on        responses of the data, or the policy's own
    6  A language model taken apart hidden states first, then the vocabulary, a chunk of states at a time
    7  Settings                     the command line, the paper's values and the demo's
    8  Data                         every preference format, down to token ids
    9  The demo world               reviews whose true token rewards are known
    10 Evaluation and report        what the policy gained, and what it paid in KL
    11 Files, checks and the command line
"""

from __future__ import annotations

import array
import contextlib
import copy
import functools
import html
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, pairwise, zip_longest
from pathlib import Path
from typing import Literal

import datasets
import huggingface_hub
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from jinja2 import TemplateError
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, PreTrainedTokenizerFast
from transformers.modeling_layers import GradientCheckpointingLayer

# ----------------------------------------------------------------------------------------------------------------------
# 1  The mathematics. Pure functions on float32 or float64; "..." stands for any leading dimensions, V for the
#    vocabulary. Log-probabilities and KL are in nats.
# ----------------------------------------------------------------------------------------------------------------------


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta: float) -> Tensor:
    """Eq. 4. −log σ(β0·[log-ratio of chosen − log-ratio of rejected]) of each pair.

    The four arguments (...) are log-probabilities of whole responses, summed over their tokens. Returns (...).
    Called with chosen and rejected swapped it trains the reverse model.
    """
    chosen = implicit_reward(policy_chosen_logps, ref_chosen_logps, beta)
    rejected = implicit_reward(policy_rejected_logps, ref_rejected_logps, beta)
    return -F.logsigmoid(chosen - rejected)


def implicit_reward(logps: Tensor, base_logps: Tensor, beta: float) -> Tensor:
    """β·(log π − log π_base), (...), of tokens (Eq. 6) or of their sums over responses (Eq. 5, 7).

    With π_ref as the base it is the DPO reward; with the reverse model the contrastive one, r_ctr (Eq. 12).
    """
    return beta * (logps - base_logps)


def total_variation(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """½ Σ_v |p(v) − q(v)| of the distributions that two logits (..., V) stand for: (...), in [0, 1]."""
    return 0.5 * torch.linalg.vector_norm(p_logits.softmax(-1) - q_logits.softmax(-1), ord=1, dim=-1)


def adaptive_alpha(dpo_logits: Tensor, base_logits: Tensor, r: float, eps: float = 1e-3) -> Tensor:
    """Eq. 16. α_t = r·TVD(π_dpo, π_base) + ε: (...), in [ε, r + ε]. Logits are (..., V).

    Far where the two models disagree (the token matters for the reward), hardly at all where they agree.
    """
    return r * total_variation(dpo_logits, base_logits) + eps


def token_beta(alpha: Tensor, beta: float) -> Tensor:
    """Eq. 17. β_t = β0/α_t, (...): the KL coefficient for which extrapolating by α_t is optimal, and the loss's weight.

    Where α_t is 0 there is no such coefficient, and the weight is 1: plain distillation.
    """
    return torch.where(alpha > 0, beta / alpha, 1.0)


def teacher_logits(anchor_logits: Tensor, dpo_logits: Tensor, base_logits: Tensor, alpha) -> Tensor:
    """Eq. 11, 15, 17. z* = z_anchor + α·(z_dpo − z_base): (..., V), with α a number or (...).

    The contrastive teacher has anchor = dpo and base = reverse; the vanilla one has the reference in both places.
    """
    alpha = alpha.unsqueeze(-1) if isinstance(alpha, Tensor) else alpha
    return anchor_logits + alpha * (dpo_logits - base_logits)


def reverse_kl(policy_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(π_θ ‖ π*) = Σ_v π_θ(v)·(log π_θ(v) − log π*(v)) over the whole vocabulary: (..., V), (..., V) → (...).

    In log-probabilities throughout, so it is finite even where a probability underflows to 0.
    """
    policy_logps, teacher_logps = policy_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (policy_logps.exp() * (policy_logps - teacher_logps)).sum(-1)


def distillation_loss(policy_logits: Tensor, teacher_logits: Tensor, weight, mask: Tensor) -> Tensor:
    """Eq. 18 and 19. Mean over responses of 1/|y| Σ_t β_t·KL(π_θ ‖ π*): a scalar.

    Logits are (B, T, V); weight is β_t, (B, T) or a number; mask (B, T) is true at the |y| states that predict a
    response token. Only the policy gets a gradient. The dense form of what `distillation_batch_loss` does in chunks.
    """
    mask = mask.bool()
    weight = weight.detach() if isinstance(weight, Tensor) else weight
    kl = reverse_kl(policy_logits, teacher_logits.detach())
    per_response = (weight * kl).masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp(min=1)
    return per_response.mean()


def token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """log π(token | state), (...), from logits (..., V) and token ids (...)."""
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def score_function(policy_logps: Tensor, signal: Tensor) -> Tensor:
    """signal·log π_θ(y_t), (...), whose gradient signal·∇log π_θ(y_t) estimates that of an expectation over π_θ.

    With signal = log π_θ(y_t) − log π*(y_t), its mean over y_t ~ π_θ is ∇KL(π_θ ‖ π*). No gradient through the signal.
    """
    return signal.detach() * policy_logps


def entropy(logits: Tensor) -> Tensor:
    """−Σ_v π(v)·log π(v) of logits (..., V): (...), in nats."""
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


# ----------------------------------------------------------------------------------------------------------------------
# 2  The loss of each stage. Each maps (policy, batch) to the *sum* of the loss over the batch's examples (responses, or
#    pairs) and a dict of such sums to watch; the loop divides by the whole optimisation batch's number of examples, so
#    neither micro-batches nor ranks change the loss. A loss says what a chunk of response states is worth, from
#    `policy.logits(hidden states)`; `sum_in_chunks` (section 6) adds the chunks up and makes the gradient.
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def state_logps(lm: LM, batch: Batch, hidden: Tensor) -> Tensor:
    """log π(y_t|s_t) at every response state, (N,), from hidden = lm.hidden(batch). No gradient."""
    return in_chunks(lambda chunk, rows: token_logps(lm.logits(chunk), batch.targets[rows]), hidden, lm.chunk_size)


def sft_batch_loss(policy: LM, batch: Batch) -> tuple:
    """Negative log-likelihood per response token, mean over each response, summed over responses."""

    def values(chunk, rows):
        nll = -token_logps(policy.logits(chunk), batch.targets[rows])
        return (nll / batch.lengths[batch.row[rows]])[:, None]

    loss, _ = sum_in_chunks(values, policy.hidden(batch), policy)
    return loss, {"loss": loss.detach()}


def dpo_batch_loss(policy: LM, batch: Batch, beta: float) -> tuple:
    """Eq. 4, summed over pairs. The batch holds the chosen responses, then the rejected ones in the same order.

    The loss is no sum over states, but its gradient is: Σ_t (∂L/∂log π(y|x))·∇log π(y_t|s_t). So the head runs once for
    the responses' log-probabilities, and once more, chunk by chunk, for the gradient with these slopes.
    """
    hidden = policy.hidden(batch)
    logps = response_sums(state_logps(policy, batch, hidden), batch).requires_grad_()
    chosen, rejected = logps.chunk(2)
    ref_chosen, ref_rejected = batch.ref_logps.chunk(2)
    losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    (slopes,) = torch.autograd.grad(losses.sum(), logps)

    def values(chunk, rows):
        return (slopes[batch.row[rows]] * token_logps(policy.logits(chunk), batch.targets[rows]))[:, None]

    surrogate, _ = sum_in_chunks(values, hidden, policy)
    loss = losses.sum().detach() + surrogate - surrogate.detach()  # the value of one, the gradient of the other
    margins = (implicit_reward(chosen, ref_chosen, beta) - implicit_reward(rejected, ref_rejected, beta)).detach()
    return loss, {"loss": loss.detach(), "accuracy": (margins > 0).float().sum(), "margin": margins.sum()}


@dataclass
class Teacher:
    """π* = softmax(z_anchor + α·(z_dpo − z_base)) from two frozen models, one of which is the anchor."""

    dpo: LM
    base: LM  # the reverse model, or the reference for the vanilla teacher
    anchor: LM
    alpha_of: Callable  # (dpo_logits, base_logits), (n, V) each → α (n,): how far to extrapolate; Eq. 16, or a constant

    def hidden(self, batch: Batch) -> tuple:
        """The hidden states of π_dpo and of the base, (N, hidden size) each; one pass if they are the same model."""
        dpo_hidden = self.dpo.hidden(batch)
        return dpo_hidden, dpo_hidden if self.base is self.dpo else self.base.hidden(batch)

    def logits(self, hidden: tuple, rows: slice) -> tuple:
        """z_dpo, z_base, z* (n, V) and α (n,) at the states hidden[rows]."""
        dpo_logits, base_logits = self.dpo.logits(hidden[0][rows]), self.base.logits(hidden[1][rows])
        alpha = self.alpha_of(dpo_logits, base_logits)
        anchor_logits = dpo_logits if self.anchor is self.dpo else base_logits
        return dpo_logits, base_logits, teacher_logits(anchor_logits, dpo_logits, base_logits, alpha), alpha


def distillation_batch_loss(policy: LM, batch: Batch, teacher: Teacher, beta: float, signal="distribution") -> tuple:
    """Eq. 18 and 19, summed over responses: 1/|y| Σ_t β_t·KL(π_θ ‖ π*) with β_t = β0/α_t.

    `signal` says where the gradient comes from: the whole "distribution" at each state, exactly; the sampled "token",
    by the score function with k_t = β_t·(log π_θ − log π*)(y_t); or the "sequence", whose total Σ_t k_t goes to each of
    its tokens. The last two are for the policy's own responses only. All three watch the same: the loss; α, β_t and the
    KL to the teacher, means over states; and the response's reward, β0·Σ_t (log π_dpo − log π_base)(y_t).
    """
    with torch.no_grad():  # launched before the policy's own pass, so that on two devices they overlap
        teacher_hidden = teacher.hidden(batch)
    hidden = policy.hidden(batch)

    def values(chunk, rows, totals=None):
        tokens, lengths = batch.targets[rows], batch.lengths[batch.row[rows]]
        with torch.no_grad():  # neither the teacher nor α_t is trained
            dpo_logits, base_logits, z, alpha = teacher.logits(teacher_hidden, rows)
            beta_t = token_beta(alpha, beta)
            reward = implicit_reward(token_logps(dpo_logits, tokens), token_logps(base_logits, tokens), beta)
        logits = policy.logits(chunk)
        kl, own = reverse_kl(logits, z), torch.zeros_like(alpha)
        loss = surrogate = beta_t * kl
        if signal != "distribution":
            logps = token_logps(logits, tokens)
            own = beta_t * (logps - token_logps(z, tokens))
            surrogate = score_function(logps, own if totals is None else totals[batch.row[rows]])
        # the first is differentiated; it, the loss, α, β_t and KL are means over a response's states, the rest are sums
        columns = torch.stack([surrogate, loss, alpha, beta_t, kl, reward * lengths, own * lengths], -1)
        return columns / lengths[:, None]

    if signal == "sequence":
        with torch.no_grad():
            k = in_chunks(values, hidden, policy.chunk_size)[:, -1]
        values = functools.partial(values, totals=response_sums(k, batch))
    surrogate, values = sum_in_chunks(values, hidden, policy)
    return surrogate, dict(zip(("loss", "alpha", "beta_t", "kl", "reward"), values[:, 1:].sum(0)))


# ----------------------------------------------------------------------------------------------------------------------
# 3  The algorithm.
# ----------------------------------------------------------------------------------------------------------------------


def align(args: Args) -> dict:
    """Run every stage that is not finished yet; leave models, metrics, samples and results in the output folder.

    Returns what results.json holds. Raises BadInput before any training, and before anything is written, if the
    settings, the models or the data cannot be used.
    """
    run, train_pairs, test_pairs = set_up(args)
    args = run.args  # with every default filled in

    # π_ref: a base model first learns what responses look like
    reference = args.model
    if args.sft:
        settings = (chosen_responses, sft_batch_loss, args.sft_learning_rate, args.sft_epochs)
        reference = train(run, "sft", reference, train_pairs, *settings)

    # π_dpo and π_dpo⁻: the same on the pairs and on the swapped pairs; one pass of the reference serves both
    if not (args.dpo and args.reverse_dpo):
        add_reference_logps(run, reference, train_pairs)
    swapped, loss = [pair.swapped() for pair in train_pairs], functools.partial(dpo_batch_loss, beta=args.beta)
    settings = (both_responses, loss, args.dpo_learning_rate, args.dpo_epochs)
    dpo = args.dpo or train(run, "dpo", reference, train_pairs, *settings)
    reverse = args.reverse_dpo or train(run, "reverse_dpo", reference, swapped, *settings)

    # π_θ: distilled from the extrapolated teacher on its own responses, or on the chosen ones
    folders = {"reference": reference, "dpo": dpo, "reverse_dpo": reverse}
    load = lambda name: load_frozen(folders[name], run)
    teacher = functools.cache(lambda: make_teacher(args, load))  # at the first step; never, if the stage is finished
    loss = lambda policy, batch: distillation_batch_loss(policy, batch, teacher(), args.beta, args.signal)
    start = dpo if args.init_from == "dpo" else reference
    responses = chosen_responses if args.off_policy else own_responses
    settings = (responses, loss, args.distill_learning_rate, args.distill_epochs)
    folders["policy"] = train(run, "policy", start, train_pairs, *settings)

    results = evaluate(run, folders, test_pairs)
    if run.rank == 0:
        report(run, results)
    return results


def make_teacher(args: Args, lm_of: Callable) -> Teacher:
    """The teacher that --reward, --alpha, --r and --eps ask for, of lm_of("dpo") and one more such model."""

    def alpha_of(dpo_logits, base_logits):
        if args.alpha == "adaptive":
            return adaptive_alpha(dpo_logits, base_logits, args.r, args.eps)
        return dpo_logits.new_full(dpo_logits.shape[:-1], float(args.alpha))

    dpo = lm_of("dpo")
    if args.alpha != "adaptive" and float(args.alpha) == 0:
        return Teacher(dpo, dpo, dpo, alpha_of)  # distillation from π_dpo itself has no base
    base = lm_of("reverse_dpo" if args.reward == "contrastive" else "reference")
    return Teacher(dpo, base, dpo if args.reward == "contrastive" else base, alpha_of)


# ----------------------------------------------------------------------------------------------------------------------
# 4  The training loop that all stages share. A step is a pure function of the weights, the optimizer and its number:
#    data order and sampling are seeded by (seed, stage, step, rank), so a checkpoint needs no random states.
# ----------------------------------------------------------------------------------------------------------------------


def micro_batches(examples: list, tokens: int) -> list:
    """Indices of `examples`, sorted by length and cut where a micro-batch would pad to more than `tokens` tokens.

    An example is a list of Responses that stay together, as the two of a pair must. One longer than `tokens` is a
    micro-batch of its own.
    """
    width = [max(map(len, example)) for example in examples]
    groups = []
    for i in sorted(range(len(examples)), key=lambda i: -width[i]):
        if groups and (len(groups[-1]) + 1) * len(examples[i]) * width[groups[-1][0]] <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def batches(examples: list, run: Run, title=None):
    """(indices, Batch on the run's device) of each micro-batch; with a progress bar if it has a title."""
    groups = micro_batches(examples, run.args.tokens_per_micro_batch)
    for group in run.bar(groups, title, leave=False) if title else groups:
        yield group, collate([examples[i] for i in group], run.pad_id, run.device)


def accumulate_gradient(policy: nn.Module, examples: list, loss_of: Callable, batch_size: int, run: Run) -> dict:
    """Gradient of the mean loss over the optimisation batch, of which `examples` are this rank's share.

    Returns this rank's sums of what the loss watches and of tokens, on the device, undivided. `policy` is an LM, or one
    in DistributedDataParallel, which averages over ranks in the last micro-batch: hence the factor `run.world`.
    """
    sums, done = {}, 0
    for group, batch in batches(examples, run):
        done += len(group)
        with contextlib.nullcontext() if run.world == 1 or done == len(examples) else policy.no_sync():
            with run.autocast():
                loss, watched = policy(loss_of, batch)
            (loss * (run.world / batch_size)).backward()
        for name, value in {**watched, "tokens": batch.attention_mask.sum()}.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def batch_indices(step: int, n: int, batch_size: int, seed: int) -> list:
    """The records of one step: a walk, without end, through a seeded permutation of 0..n−1 an epoch."""
    order = functools.cache(
        lambda epoch: torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, "order", epoch))).tolist()
    )
    return [order(i // n)[i % n] for i in range(step * batch_size, (step + 1) * batch_size)]


def train(
    run: Run, stage: str, start: str, pairs: list, examples_of: Callable, loss_of: Callable, learning_rate: float,
    epochs: float,
) -> str:  # fmt: skip
    """Train a copy of the model `start` (folder or hub id) and return its folder, <output_dir>/<stage>.

    `examples_of` says what a step trains on (section 5), `loss_of` with which loss (section 2). AdamW, linear
    warm-up then linear decay, gradients clipped to `max_grad_norm`. A finished stage is not repeated; one under way
    goes on from its last checkpoint. Raises BadInput when a loss is not finite.
    """
    args, folder = run.args, run.out / stage
    if folder.exists():
        run.say(f"{stage}: finished before, in {folder}")
        return str(folder)
    policy = load_lm(start, run, args.gradient_checkpointing)
    parallel = policy if run.world == 1 else DistributedDataParallel(policy, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=args.weight_decay, fused=True)
    batch_size = min(args.batch_size, len(pairs))
    steps = min(math.ceil(epochs * len(pairs) / batch_size), args.max_steps or sys.maxsize)
    warmup = math.ceil(args.warmup_ratio * steps)
    first = load_checkpoint(run, stage, policy.model, optimizer)
    log = Log(run, stage, batch_size, steps, first)
    ctrl_c = finish_step_on_ctrl_c()
    for step in range(first, steps):
        torch.manual_seed(seed_of(args.seed, stage, step, run.rank))
        indices = batch_indices(step, len(pairs), batch_size, args.seed)
        indices = sorted(indices, key=lambda i: len(pairs[i].chosen))[run.rank :: run.world]
        try:
            examples, watched = examples_of(run, policy, [pairs[i] for i in indices])
        except RuntimeError as error:  # what torch.multinomial says of probabilities that are not finite
            if "probability tensor" in str(error):
                log.stop(step, pairs, first_line(error))
            raise
        sums = accumulate_gradient(parallel, examples, loss_of, batch_size, run)
        sums |= {name: torch.tensor(float(value), device=run.device) for name, value in watched.items()}

        schedule = min((step + 1) / warmup if warmup else 1, (steps - step) / max(1, steps - warmup))
        optimizer.param_groups[0]["lr"] = learning_rate * schedule
        grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        log.add(step, learning_rate * schedule, grad_norm, sums)
        save = (step + 1) % args.save_steps == 0 or bool(ctrl_c)
        if save or step + 1 == steps or (step + 1) % args.logging_steps == 0:
            log.flush(pairs, policy)  # stops at what is not finite, so it comes before the checkpoint
        if save:
            save_checkpoint(run, stage, policy.model, optimizer, step + 1)
        if ctrl_c:
            log.bar.close()
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log.close()
    save_model(run, policy.model, folder)
    return str(folder)


# ----------------------------------------------------------------------------------------------------------------------
# 5  What a step trains on. Each maps (run, policy, pairs) to the examples, lists of Responses that stay together, and a
#    dict of sums to watch of them: responses of the data, or the policy's own, ŷ ~ π_θ(·|x).
# ----------------------------------------------------------------------------------------------------------------------


def chosen_responses(run: Run, policy: LM, pairs: list) -> tuple:
    """The data's chosen responses: SFT, and Eq. 19."""
    return [[pair.chosen] for pair in pairs], {}


def both_responses(run: Run, policy: LM, pairs: list) -> tuple:
    """The pairs: DPO."""
    return [[pair.chosen, pair.rejected] for pair in pairs], {}


def own_responses(run: Run, policy: LM, pairs: list) -> tuple:
    """One response of the policy to each pair's prompt: Eq. 18. Watched: their length and, in the demo, true reward."""
    sampled = sample(policy, [pair.chosen.prompt for pair in pairs], run)
    watched = {"length": sum(map(len, sampled))}
    if run.args.dataset == "demo":
        texts = run.tokenizer.batch_decode(sampled, skip_special_tokens=True)
        watched["true_reward"] = sum(map(true_reward, texts))
    return [[Response(pair.chosen.prompt, tokens)] for pair, tokens in zip(pairs, sampled)], watched


@torch.no_grad()
def sample(lm: LM, prompts: list, run: Run) -> list:
    """One response to each prompt (lists of ids → lists of ids), drawn from the model's own distribution.

    A response keeps its end token; one that the length limit cut has none. Prompts are grouped by length and padded on
    the left. The random state is torch's global one: seed it to get the same responses.
    """
    pure = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=run.args.max_length - run.args.max_prompt_length,
        eos_token_id=run.stop_ids, pad_token_id=run.pad_id,
    )  # fmt: skip
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [order[i : i + run.args.sampling_batch_size] for i in range(0, len(order), run.args.sampling_batch_size)]
    outputs = [None] * len(prompts)
    # generate() fills what `pure` leaves unset from the checkpoint's own config (a repetition penalty, say): take it away
    checkpoint_config, lm.model.generation_config = lm.model.generation_config, pure
    for group in run.bar(groups, "sampling", leave=False, disable=len(groups) < 2):
        width = max(len(prompts[i]) for i in group)
        ids, mask = torch.full((len(group), width), run.pad_id), torch.zeros(len(group), width, dtype=torch.long)
        for b, i in enumerate(group):
            ids[b, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
            mask[b, width - len(prompts[i]) :] = 1
        device = lm.model.device
        with run.autocast():
            output = lm.model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=pure)
        for i, tokens in zip(group, output[:, width:].tolist()):
            end = next((t for t, token in enumerate(tokens) if token in run.stop_ids), len(tokens))
            outputs[i] = tokens[: end + 1]
    lm.model.generation_config = checkpoint_config
    return outputs


# ----------------------------------------------------------------------------------------------------------------------
# 6  A language model taken apart. Logits over the vocabulary are what costs memory (50,257 numbers a state for GPT-2
#    against 768 of hidden state), so they are never made for a whole batch: the body runs first, the hidden states of
#    the response states alone are kept, and the output head and the loss go over them a chunk at a time.
# ----------------------------------------------------------------------------------------------------------------------


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

    The logits at position i predict token i + 1, so a response's |y| states start at the last prompt position. They are
    listed from lengths, never by comparing ids with the pad id, which may be the end token too.
    """

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), 1 on tokens
    states: Tensor  # (N,) places of the response states in the flattened (B·T)
    targets: Tensor  # (N,) the response token that each state predicts
    row: Tensor  # (N,) the response that each state belongs to
    lengths: Tensor  # (B,) |y|
    ref_logps: Tensor  # (B,)


def collate(examples: list, pad_id: int, device="cpu") -> Batch:
    """[[Response, ...], ...] → Batch: the first response of every example, then the second ones."""
    responses = [response for part in zip(*examples, strict=True) for response in part]
    width = max(map(len, responses))
    input_ids = torch.full((len(responses), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    states = []
    for b, response in enumerate(responses):
        input_ids[b, : len(response)] = torch.tensor([*response.prompt, *response.tokens])
        attention_mask[b, : len(response)] = 1
        states += range(b * width + len(response.prompt) - 1, b * width + len(response) - 1)
    lengths = torch.tensor([len(response.tokens) for response in responses])
    states, row = torch.tensor(states), torch.arange(len(responses)).repeat_interleave(lengths)
    targets, ref_logps = input_ids.flatten()[states + 1], torch.tensor([response.ref_logps for response in responses])
    parts = (input_ids, attention_mask, states, targets, row, lengths, ref_logps)
    return Batch(*(part.to(device, non_blocking=True) for part in parts))


class LM(nn.Module):
    """A Hugging Face causal LM as two maps: `hidden` (tokens → hidden states) and `logits` (hidden states → logits).

    With `head_device` the output head is copied to that device and hidden states are sent there: a teacher on a device
    of its own moves hidden-size numbers a state instead of vocabulary-size ones.
    """

    def __init__(self, model, chunk_size: int = 512, head_device=None, gradient_checkpointing: bool = False):
        super().__init__()
        self.model, self.chunk_size, self.head_device = model.eval(), chunk_size, head_device  # eval: no dropout, ever
        self.head = model.get_output_embeddings()
        if head_device is not None and head_device != self.head.weight.device:
            self.head = copy.deepcopy(self.head).to(head_device)
        config = model.config.get_text_config()
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.checkpointed = []
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            self.checkpointed = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
            for layer in self.checkpointed:  # these layers will be in training mode, so their own dropout has to go
                vars(layer).update(
                    {name: 0.0 for name, x in vars(layer).items() if "drop" in name and type(x) is float}
                )

    def training_mode(self, on: bool) -> None:
        """Checkpointed layers store no activations in training mode only, and no KV cache for sampling either."""
        for layer in self.checkpointed:
            layer.training = on

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states of the response states: (N, hidden size)."""
        device = self.model.device
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        self.training_mode(torch.is_grad_enabled())
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        self.training_mode(False)
        hidden = hidden.flatten(0, 1).index_select(0, batch.states.to(device))
        return hidden if self.head_device is None else hidden.to(self.head_device, non_blocking=True)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden size) → (n, V) in float32, scaled and capped as the model itself does."""
        logits = self.head(hidden).float()
        logits = logits * self.scale if self.scale != 1 else logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def forward(self, loss_of: Callable, batch: Batch):
        """loss_of(self, batch): everything goes through here, because DistributedDataParallel watches `forward`."""
        return loss_of(self, batch)


def in_chunks(values_of: Callable, hidden: Tensor, chunk_size: int) -> Tensor:
    """values_of(hidden[rows], rows) → (n, ...) for slices of `chunk_size` states, put together to (N, ...)."""
    slices = [slice(i, i + chunk_size) for i in range(0, len(hidden), chunk_size)]
    return torch.cat([values_of(hidden[rows], rows) for rows in slices])


class SumInChunks(torch.autograd.Function):
    """Σ over the states of column 0 of values_of(hidden, rows): (N, k), with each chunk's backward done at once.

    So no more than one chunk's logits are alive. The gradients are ready when `forward` ends; `backward` hands them on,
    and autograd and DistributedDataParallel see an ordinary function of the hidden states and the head's parameters.
    """

    @staticmethod
    def forward(ctx, values_of, chunk_size, hidden, *head_parameters):
        grads, hidden_grad = None, torch.empty_like(hidden)

        @torch.enable_grad()
        def backward_at_once(chunk, rows):
            nonlocal grads
            chunk = chunk.detach().requires_grad_()
            values = values_of(chunk, rows)
            hidden_grad[rows], *new = torch.autograd.grad(values[:, 0].sum(), [chunk, *head_parameters])
            grads = new if grads is None else [old.add_(more) for old, more in zip(grads, new)]
            return values.detach()

        values = in_chunks(backward_at_once, hidden, chunk_size)
        ctx.grads = [hidden_grad, *grads]
        ctx.mark_non_differentiable(values)
        return values[:, 0].sum(), values

    @staticmethod
    def backward(ctx, grad_of_sum, _):
        grads, ctx.grads = ctx.grads, None  # freed as soon as autograd has used them
        return None, None, *[grad.mul_(grad_of_sum) for grad in grads]


def sum_in_chunks(values_of: Callable, hidden: Tensor, lm: LM) -> tuple:
    """The differentiable sum of column 0, and all the values (N, k), detached. See SumInChunks."""
    return SumInChunks.apply(values_of, lm.chunk_size, hidden, *lm.head.parameters())


def response_sums(values: Tensor, batch: Batch) -> Tensor:
    """Values of states (N,) → their sums over each response (B,)."""
    return values.new_zeros(len(batch.lengths)).index_add_(0, batch.row, values)


# ----------------------------------------------------------------------------------------------------------------------
# 7  Settings. The defaults are the paper's; DEMO is what the built-in demo sets otherwise.
# ----------------------------------------------------------------------------------------------------------------------


def setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    # what to run
    model: str = setting("demo", "hub id or local folder of a causal LM; 'demo' is built in, with a preset")
    dataset: str = setting(
        "HuggingFaceH4/ultrafeedback_binarized",
        "preference pairs in any of TRL's formats: hub id, local folder, .jsonl, .json, .csv or .parquet file, or 'demo'",
    )
    train_split: str | None = setting(None, "split to train on (train_prefs, or else train)")
    test_split: str | None = setting(None, "split to evaluate on (test_prefs, test, or a tenth held out)")
    limit: int | None = setting(None, "train on this many pairs (all)")
    output_dir: str | None = setting(None, "where models and results go (runs/<model>)")
    overwrite: bool = setting(False, "start anew where output_dir holds a run, instead of going on with it")
    seed: int = setting(0, "seed of the data order, the held-out part, the sampling and the demo")
    # the stages
    sft: bool | None = setting(None, "SFT on the chosen responses first (on for models without a chat template)")
    dpo: str | None = setting(None, "folder or hub id of a model trained by DPO; skips that stage")
    reverse_dpo: str | None = setting(None, "the same for the reverse model")
    # the method
    beta: float = setting(0.1, "β0 of DPO (Eq. 4)")
    reward: Literal["contrastive", "vanilla"] = setting(
        "contrastive",
        "the teacher's reward: π_dpo against the reverse model (Eq. 15) or against the reference (Eq. 11)",
    )
    alpha: str = setting("adaptive", "'adaptive' (Eq. 16) or a constant; 0 is plain distillation from DPO")
    r: float | None = setting(None, "scale of the adaptive α_t = r·TVD_t + ε (30 on-policy, 20 off-policy)")
    eps: float = setting(1e-3, "ε, the least α_t")
    off_policy: bool = setting(False, "distil on the chosen responses (Eq. 19), not on the policy's own (Eq. 18)")
    signal: Literal["distribution", "token", "sequence"] = setting(
        "distribution",
        "what trains the policy: the teacher's whole distribution, or its reward of the token or response",
    )
    init_from: Literal["reference", "dpo"] = setting("reference", "where the policy starts")
    # optimisation
    sft_learning_rate: float = setting(1e-5, "peak learning rate of SFT")
    dpo_learning_rate: float = setting(1e-6, "peak learning rate of DPO and reverse DPO")
    distill_learning_rate: float = setting(1e-6, "peak learning rate of the distillation")
    sft_epochs: float = setting(1.0, "passes over the pairs in SFT")
    dpo_epochs: float = setting(1.0, "passes over the pairs in DPO, and in reverse DPO")
    distill_epochs: float = setting(1.0, "passes over the prompts in the distillation")
    max_steps: int | None = setting(None, "cap on every stage's optimizer steps")
    batch_size: int = setting(128, "pairs or responses an optimizer step, over all devices")
    warmup_ratio: float = setting(0.1, "part of the steps in which the learning rate rises; it falls linearly after")
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    # lengths, speed and memory
    max_length: int | None = setting(None, "prompt and response in tokens (2048, or what the model holds)")
    max_prompt_length: int | None = setting(None, "tokens of the prompt (half of max_length)")
    tokens_per_micro_batch: int = setting(8192, "tokens that one forward and backward pass holds; changes no result")
    chunk_size: int = setting(512, "states that the output head and the loss take at once; changes no result")
    sampling_batch_size: int = setting(64, "prompts sampled at once")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass, to save memory")
    bf16: bool | None = setting(None, "bfloat16 autocast, frozen models in bfloat16 (on CUDA)")
    device: str | None = setting(None, "cuda, cuda:1, mps, cpu (the first of cuda, mps, cpu that is there)")
    teacher_device: str | None = setting(None, "device of the two frozen models in the distillation (device)")
    # evaluation and logs
    eval_pairs: int = setting(1000, "held-out pairs for the reward accuracy, at most")
    eval_prompts: int = setting(128, "held-out prompts that every model answers, at most")
    logging_steps: int = setting(5, "read the metrics, and look at the loss, every so many steps")
    save_steps: int = setting(100, "write a checkpoint every so many steps")


DEMO = dict(
    dataset="demo", r=4.0, sft_learning_rate=1e-3, dpo_learning_rate=3e-5, distill_learning_rate=3e-4, sft_epochs=4.5,
    dpo_epochs=2.5, distill_epochs=1.5, batch_size=64, max_length=64, max_prompt_length=12, sampling_batch_size=256,
    eval_prompts=512,
)  # fmt: skip
FREE_SETTINGS = ("output_dir", "overwrite", "save_steps", "logging_steps")  # a run may go on with others of these
# what a run leaves; config.json last, so that an --overwrite killed half-way is still known for a run
OUTPUTS = """sft dpo reverse_dpo policy checkpoint.pt reference_logps.pt metrics.jsonl samples.json report.html
    results.json config.json"""


class BadInput(Exception):
    """What the user gave cannot be used. The message is one line: what, where, what to do."""


class Parser(transformers.HfArgumentParser):
    """The settings as flags. Its errors are one line too."""

    def error(self, message):
        raise BadInput(f"{message}; see --help")


def parse_args(argv=None) -> Args:
    """The command line as Args; raises BadInput for an unknown or malformed flag."""
    parser = Parser(Args, description=__doc__.split("\n\n")[0], allow_abbrev=False)
    if parser.parse_known_args(argv)[0].model == "demo":
        parser.set_defaults(**DEMO)
    return Args(**vars(parser.parse_args(argv)))


def check_settings(args: Args) -> None:
    """Raise BadInput for a number out of range. What needs the model or the data is checked in `set_up`."""
    positive = "beta eps sft_learning_rate dpo_learning_rate distill_learning_rate max_grad_norm sft_epochs dpo_epochs"
    positive += " distill_epochs batch_size tokens_per_micro_batch chunk_size sampling_batch_size eval_pairs"
    positive += " eval_prompts logging_steps save_steps max_steps limit max_length max_prompt_length"
    for name in positive.split():
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"--{name} is {value}: it must be a positive number")
    for name, low, high in [("r", 0, 1e6), ("warmup_ratio", 0, 1), ("weight_decay", 0, 1), ("seed", 0, 2**63)]:
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise BadInput(f"--{name} is {value}: it must be between {low} and {high:g}")
    if args.alpha != "adaptive" and not re.fullmatch(r"\d{1,6}(\.\d*)?", args.alpha):
        raise BadInput(f"--alpha is {args.alpha!r}: it must be 'adaptive' or a number of at least 0")
    if args.alpha != "adaptive" and float(args.alpha) == 0 and args.reward == "vanilla":
        raise BadInput("--alpha 0 --reward vanilla would distil the reference into itself: use --reward contrastive")
    if args.signal != "distribution" and args.off_policy:
        raise BadInput(f"--signal {args.signal} needs the policy's own samples: leave out --off_policy")
    if args.model == "demo" and args.dataset != "demo":
        raise BadInput(f"--model demo only knows the words of the demo: give a --model for --dataset {args.dataset}")


# ----------------------------------------------------------------------------------------------------------------------
# 8  Data: from any preference format to token ids.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """One preference pair. Both responses have the same prompt."""

    chosen: Response
    rejected: Response
    record: int  # its number in the data set, from 0
    instruction: str  # the prompt as people read it

    def swapped(self) -> Pair:
        """The pair that reverse DPO trains on."""
        return replace(self, chosen=self.rejected, rejected=self.chosen)


def split_record(record: dict) -> tuple:
    """A record of any of TRL's preference formats → (prompt, chosen text, rejected text).

    The prompt is text, or a list of {"role", "content"} messages. Raises ValueError for a record in none of the formats.
    """
    prompt, chosen, rejected = (record.get(key) for key in ("prompt", "chosen", "rejected"))
    for key, value in (("chosen", chosen), ("rejected", rejected), ("prompt", prompt)):
        if value is None and key != "prompt":
            raise ValueError(f"field '{key}' is missing")
        if not isinstance(value, (str, list, type(None))):
            raise ValueError(f"field '{key}' is {type(value).__name__}: it must be text or a list of messages")
        for message in value if isinstance(value, list) else []:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise ValueError(f"field '{key}' holds a message without the texts 'role' and 'content'")
    if type(chosen) is not type(rejected):
        raise ValueError("one of 'chosen' and 'rejected' is text and the other a conversation")

    if isinstance(chosen, list):
        if not chosen or not rejected:
            raise ValueError("'chosen' or 'rejected' is a conversation without messages")
        plain = lambda messages: [{"role": m["role"], "content": m["content"]} for m in messages]
        before, other = plain(chosen[:-1]), plain(rejected[:-1])
        if before != other:
            raise ValueError("'chosen' and 'rejected' differ before their last message")
        given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else plain(prompt or [])
        if not before or (isinstance(prompt, list) and before[: len(given)] != given):
            before = given + before
        return before, chosen[-1]["content"], rejected[-1]["content"]
    if prompt is None:  # implicit: the longest common prefix, cut back to a word boundary
        prompt = os.path.commonprefix([chosen, rejected])
        ends = [text[len(prompt) :] for text in (chosen, rejected)]
        if not all(end == "" or end[0].isspace() for end in ends):
            prompt = prompt[: max((i for i, letter in enumerate(prompt) if letter.isspace()), default=0)]
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, chosen, rejected


def render_prompt(prompt, response: str, tokenizer) -> str:
    """The text that goes before the response: by the model's chat template, or a plain one for a base model."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if isinstance(prompt, list):
        turns = [f"{message['role'].capitalize()}:\n{message['content']}\n\n" for message in prompt]
        return "".join(turns) + "Assistant:\n"
    touching = prompt and not prompt[-1].isspace() and not response[:1].isspace()
    return prompt + "\n" if touching else prompt


def stop_token(tokenizer) -> int:
    """The id that ends a response: what the chat template puts after the assistant's words, or end-of-sequence."""
    if tokenizer.chat_template:
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "zebra"}]
        after = tokenizer.apply_chat_template(talk, tokenize=False).rpartition("zebra")[2]
        special = [i for i in tokenizer(after, add_special_tokens=False).input_ids if i in tokenizer.all_special_ids]
        if special:
            return special[0]
    return tokenizer.eos_token_id


def encode_pairs(run: Run, source: str, records, numbers: list, most: int) -> list:
    """Tokenize records[numbers] until there are `most` usable pairs; say what was left out or cut."""
    tokenizer, args, pairs, counts = run.tokenizer, run.args, [], Counter()
    first_token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else run.stop_ids[0]
    starts_with_bos = not tokenizer.chat_template and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    numbered = zip(run.bar(numbers, f"tokenizing {source}", leave=False), records.select(numbers))
    for number, record in numbered:
        try:
            prompt, chosen, rejected = split_record(record)
            text = render_prompt(prompt, chosen, tokenizer)
        except (ValueError, TemplateError) as error:
            raise BadInput(f"{where(source, number)}: {error}; mend or remove the record") from None
        talk = isinstance(prompt, list)
        counts["plain"] += talk and not tokenizer.chat_template
        instruction = "\n\n".join(message["content"] for message in prompt) if talk else prompt
        if not (chosen.strip() and rejected.strip()):
            counts["empty"] += 1
            continue
        # prompt and responses are tokenized apart, so that no merge crosses the boundary
        prompt, *responses = tokenizer([text, chosen, rejected], add_special_tokens=False).input_ids
        if starts_with_bos or not prompt:  # an empty prompt still needs a state to predict from
            prompt = [first_token, *prompt]
        long_prompt, prompt = len(prompt) > args.max_prompt_length, array.array("i", prompt[-args.max_prompt_length :])
        room = args.max_length - len(prompt)
        tokens = [array.array("i", [*response, run.stop_ids[0]][:room]) for response in responses]
        if chosen == rejected or tokens[0] == tokens[1]:
            counts["identical"] += 1
            continue
        counts["prompts"] += long_prompt
        counts["responses"] += sum(len(response) >= room for response in responses)
        pairs.append(Pair(*(Response(prompt, response) for response in tokens), number, instruction))
        if len(pairs) == most:
            break
    if counts["plain"]:
        run.say(f"{source}: conversations for a model without a chat template, so the plain template is used")
    run.say(
        f"{source}: {len(pairs):,} pairs; left out {counts['empty']} with an empty and {counts['identical']} with "
        f"identical responses; cut {counts['prompts']} prompts and {counts['responses']} responses to the length limits"
    )
    return pairs


def where(source: str, number: int) -> str:
    """Where a record stands: "FILE, line 7" in JSON Lines, "SOURCE, record 6 (from 0)" in anything else."""
    if source.lower().endswith(".jsonl") and os.path.isfile(source):
        with open(source, "rb") as file:
            lines = [i for i, line in enumerate(file, 1) if line.strip()]
        return f"{source}, line {lines[number]}"
    return f"{source}, record {number} (from 0)"


def read_dataset(name: str, seed: int) -> datasets.DatasetDict:
    """All splits of a local file or folder, a hub data set or the demo. Raises BadInput naming the file and the line."""
    if name == "demo":
        parts = {"train": demo_records(8192, seed), "test": demo_records(1024, seed + 10**6)}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(records) for split, records in parts.items()})
    kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(Path(name).suffix.lower())
    if kind and not Path(name).is_file():
        raise BadInput(f"--dataset {name}: no such file; check the path")
    if not kind and not Path(name).is_dir():
        check_hub(name, "dataset")
    as_text = {"converters": dict.fromkeys(("prompt", "chosen", "rejected"), str)}  # or pandas takes "NA" for missing
    options = {**as_text, "keep_default_na": False} if kind == "csv" else {}
    try:
        if kind == "json":
            check_json(name)
        return datasets.load_dataset(kind, data_files=name, **options) if kind else datasets.load_dataset(name)
    except BadInput:
        raise
    except Exception as error:  # whatever the library raises becomes one line
        raise BadInput(f"--dataset {name} cannot be read: {first_line(error)}; {hub_hint()}") from error


def check_json(path: str) -> None:
    """Raise BadInput with the first line of a .json or .jsonl file that is not UTF-8 or not JSON."""
    content, by_line = Path(path).read_bytes(), path.lower().endswith(".jsonl")
    if not content.strip():
        raise BadInput(f"{path}: the file is empty; add pairs")
    for number, line in enumerate(content.split(b"\n") if by_line else [content], 1):
        try:
            value = json.loads(line.decode("utf-8-sig")) if line.strip() else {}
        except UnicodeDecodeError as error:
            number += line[: error.start].count(b"\n")
            raise BadInput(f"{path}, line {number}: not UTF-8; convert the file") from None
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}, line {number + error.lineno - 1}: not JSON ({error.msg}); mend the line") from None
        if by_line and not isinstance(value, dict):
            raise BadInput(f"{path}, line {number}: not a JSON object; mend the line")


def load_pairs(run: Run) -> tuple:
    """(training pairs, held-out pairs) as the settings say. Raises BadInput if either is empty."""
    args = run.args
    splits = read_dataset(args.dataset, args.seed)
    train_split = args.train_split or ("train_prefs" if "train_prefs" in splits else "train")
    test_split = args.test_split or next((split for split in ("test_prefs", "test") if split in splits), None)
    for flag, split in (("train_split", train_split), ("test_split", test_split or train_split)):
        if split not in splits:
            raise BadInput(f"--{flag} {split}: {args.dataset} has only {', '.join(splits)}; name one of these")
    numbers, held_out = (list(range(len(splits[split]))) for split in (train_split, test_split or train_split))
    if test_split is None:
        random.Random(args.seed).shuffle(held_out)
        cut = max(1, round(0.1 * len(held_out)))
        numbers, held_out = sorted(held_out[cut:]), sorted(held_out[:cut])
        run.say(f"{args.dataset} has no test split: {cut:,} of {cut + len(numbers):,} records are held out")
    train_pairs = encode_pairs(run, args.dataset, splits[train_split], numbers, args.limit or len(numbers))
    test_pairs = encode_pairs(run, args.dataset, splits[test_split or train_split], held_out, args.eval_pairs)
    if not train_pairs or not test_pairs:
        use = "evaluate" if train_pairs else "train"
        raise BadInput(f"--dataset {args.dataset}: no usable pair to {use} on; add pairs")
    return train_pairs, test_pairs


# ----------------------------------------------------------------------------------------------------------------------
# 9  The demo world: reviews in plain English whose true token rewards are known.
# ----------------------------------------------------------------------------------------------------------------------

THINGS = {
    "hotel": "room bed staff breakfast", "cafe": "coffee cake staff music", "film": "plot cast music ending",
    "phone": "screen battery camera sound", "book": "plot style ending cover", "game": "plot music graphics sound",
    "bike": "frame saddle price colour", "museum": "building guide shop price",
}  # fmt: skip
VALENCE = {
    "superb": 2, "lovely": 2, "good": 1, "nice": 1, "pleasant": 1, "solid": 1, "fine": 0.5, "plain": -0.5, "bad": -1,
    "dull": -1, "poor": -1, "weak": -1, "awful": -2, "dreadful": -2,
}  # fmt: skip
BOOST = ("very", "really", "truly")
ASKING = ("write a review of the {} .", "how was the {} ?", "what did you think of the {} ?")
JOINS = ("and", "but", ",")
DEMO_WORDS = sorted(
    {w for t in THINGS for w in (t, *THINGS[t].split())} | {*VALENCE, *BOOST, *JOINS, "the", "was", "not", "overall", "it"}
    | {w for ask in ASKING for w in ask.split() if w != "{}"}
)  # fmt: skip


def true_token_rewards(words: list) -> list:
    """The true reward of every word of a response. Only a word of praise or blame has one, and its context decides it.

    "was superb" earns 2, "was very superb" 3 (an intensifier counts once), "was not superb" −1 (negation turns and
    halves it); outside its place after "was", where it makes no sense, any such word costs 1.
    """
    rewards = []
    for i, word in enumerate(words):
        before = [".", *words[:i]]
        boosted = before[-1] in BOOST and bool(before.pop())
        negated = before[-1] == "not" and bool(before.pop())
        value = VALENCE.get(word, 0.0) * (1.5 if boosted else 1) * (-0.5 if negated else 1)
        rewards.append(value if before[-1] == "was" or word not in VALENCE else -1.0)
    return rewards


def true_reward(text: str) -> float:
    """The true reward of a response: the mean over its words of praise and blame, so that length earns nothing."""
    words = text.split()
    return sum(true_token_rewards(words)) / max(1, sum(word in VALENCE for word in words))


def demo_records(n: int, seed: int) -> list:
    """n preference pairs of the demo world; which of two responses is chosen is drawn by Bradley–Terry (Eq. 1)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda options: options[torch.randint(len(options), (), generator=generator).item()]
    chance = lambda: torch.rand((), generator=generator).item()

    def praise(subject, mood):
        good = chance() < mood
        opinion = [draw([word for word in VALENCE if (VALENCE[word] > 0) == good])]
        opinion = [draw(BOOST), *opinion] if chance() < 0.3 else opinion
        return [*subject, "was", *(["not"] if chance() < 0.2 else []), *opinion]

    def response(thing):
        while True:
            mood = chance()
            clauses = [praise(["the", draw(THINGS[thing].split())], mood) for _ in range(draw((1, 2, 3, 4)))]
            words = clauses[0] + [word for clause in clauses[1:] for word in (draw(JOINS), *clause)]
            words += [".", *praise(["overall", "it"], mood), "."]
            rewards = true_token_rewards(words)
            if min(rewards) < 0 < max(rewards):  # every response mixes good and bad tokens
                return " ".join(words)

    records = []
    for _ in range(n):
        thing = draw(list(THINGS))
        first, second = response(thing), response(thing)
        if chance() > 1 / (1 + math.exp(4 * (true_reward(second) - true_reward(first)))):
            first, second = second, first
        records.append({"prompt": draw(ASKING).format(thing), "chosen": first, "rejected": second})
    return records


def true_rewards_of(run: Run, tokens: list) -> list:
    """The true rewards of token ids in the demo, where a word is a token; elsewhere nothing is known: []."""
    if run.args.dataset != "demo" or run.tokenizer.get_vocab() != demo_tokenizer().get_vocab():
        return []
    return true_token_rewards(run.tokenizer.convert_ids_to_tokens(list(tokens)))


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the demo world."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *DEMO_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def demo_model(seed: int):
    """A two-layer GPT-2 with random weights, about 0.1M parameters."""
    torch.manual_seed(seed)
    special = {"bos_token_id": 1, "eos_token_id": 1, "tie_word_embeddings": False}
    shape = {"vocab_size": len(demo_tokenizer()), "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return transformers.GPT2LMHeadModel(GPT2Config(**shape, **special))


# ----------------------------------------------------------------------------------------------------------------------
# 10  Evaluation and report.
# ----------------------------------------------------------------------------------------------------------------------


def pair_logps(run: Run, lm: LM, pairs: list, title: str, keep: Callable = Tensor.clone) -> list:
    """[(keep(log π of the chosen one's tokens (|y_w|,)), the same of the rejected one's), ...], float32 on the CPU."""
    examples = [[pair.chosen, pair.rejected] for pair in pairs[run.rank :: run.world]]
    logps = [None] * len(examples)
    for group, batch in batches(examples, run, title):
        with run.autocast():
            parts = state_logps(lm, batch, lm.hidden(batch)).cpu().split(batch.lengths.tolist())
        for i, chosen, rejected in zip(group, parts, parts[len(group) :]):
            logps[i] = (keep(chosen), keep(rejected))
    return run.gather(logps)


def add_reference_logps(run: Run, reference: str, pairs: list) -> None:
    """Give every response of the pairs its log π_ref, computed once and kept in the output folder."""
    path = run.out / "reference_logps.pt"
    if not path.exists():
        total = lambda tokens: tokens.sum().item()
        logps = torch.tensor(pair_logps(run, load_lm(reference, run), pairs, "reference logps", total))
        write_aside(run, path, lambda aside: torch.save(logps, aside))
    for pair, (chosen, rejected) in zip(pairs, torch.load(path, weights_only=True).tolist(), strict=True):
        pair.chosen.ref_logps, pair.rejected.ref_logps = chosen, rejected


def accuracy_interval(margins: Tensor) -> dict:
    """The share of positive margins (n,), with Wilson's 95 % interval."""
    n, p, z = len(margins), (margins > 0).float().mean().item(), 1.959964
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return {"accuracy": p, "low": max(0.0, low), "high": min(1.0, high)}


def token_agreement(rewards: Tensor, truth: Tensor) -> dict:
    """How well token rewards (n,) order tokens as their true rewards (n,) do.

    `rank_correlation` is Spearman's, over all tokens; `auc` the chance that a token of positive true reward gets more
    than one of negative true reward.
    """

    def ranks(values):  # equal values share the mean of their ranks
        _, group, sizes = values.unique(return_inverse=True, return_counts=True)
        return (sizes.cumsum(0) - (sizes - 1) / 2)[group]

    correlation = torch.corrcoef(torch.stack([ranks(rewards), ranks(truth)]))[0, 1]
    good, bad = rewards[truth > 0], rewards[truth < 0]
    above = ranks(torch.cat([good, bad]))[: len(good)].sum() - len(good) * (len(good) + 1) / 2
    return {"rank_correlation": correlation.item(), "auc": (above / (len(good) * len(bad))).item()}


@torch.no_grad()
def evaluate(run: Run, folders: dict, test_pairs: list) -> dict:
    """Compare π_ref, π_dpo, π_dpo⁻ and the policy, given as folders; write samples.json, report.html and results.json.

    `models` holds means over each model's own responses to held-out prompts (see `sample_and_score`) and, in the demo,
    the win rate against π_ref's. `reward_accuracy` is the share of held-out pairs in which a reward prefers the chosen
    response: log π_dpo/π_ref (dpo), log π_ref/π_dpo⁻ (reverse), and their sum log π_dpo/π_dpo⁻ (contrastive). In the
    demo it also says what the true reward itself would score (oracle), and how each reward's tokens agree with it.
    """
    path = run.out / "results.json"
    if path.exists():
        run.say("evaluation: finished before")
        return json.loads(path.read_text())
    lms = {name: load_lm(folder, run) for name, folder in folders.items()}
    names = ("reference", "dpo", "reverse_dpo")
    reference, dpo, reverse = (pair_logps(run, lms[name], test_pairs, f"held-out pairs, {name}") for name in names)
    rewards = {"dpo": (dpo, reference), "reverse": (reference, reverse), "contrastive": (dpo, reverse)}
    accuracy = {"n": len(test_pairs)}
    sides = [response for pair in test_pairs for response in (pair.chosen, pair.rejected)]
    truth = [reward for response in sides for reward in true_rewards_of(run, response.tokens)]  # of every token
    for name, (logps, base) in rewards.items():
        token_rewards = [implicit_reward(a, b, run.args.beta) for two in zip(logps, base) for a, b in zip(*two)]
        totals = torch.stack([tokens.sum() for tokens in token_rewards])
        accuracy[name] = accuracy_interval(totals[::2] - totals[1::2])
        if truth:
            accuracy[name] |= token_agreement(torch.cat(token_rewards), torch.tensor(truth))
    if run.args.dataset == "demo":
        texts = run.tokenizer.batch_decode([list(response.tokens) for response in sides], skip_special_tokens=True)
        totals = torch.tensor([true_reward(text) for text in texts])
        accuracy["oracle"] = accuracy_interval(totals[::2] - totals[1::2])

    samples = {name: sample_and_score(run, name, lms, test_pairs[: run.args.eval_prompts]) for name in lms}
    mean = lambda values: sum(values) / len(values)
    beats = lambda a, b: (a["true_reward"] > b["true_reward"]) + 0.5 * (a["true_reward"] == b["true_reward"])
    scores = {}
    for name, rows in samples.items():
        columns = [column for column in ("reward", "kl", "length", "entropy", "true_reward") if column in rows[0]]
        scores[name] = {column: mean([row[column] for row in rows]) for column in columns}
        if "true_reward" in columns:
            scores[name]["win_rate"] = mean([beats(row, other) for row, other in zip(rows, samples["reference"])])
    results = {"models": scores, "reward_accuracy": accuracy}
    write_json(run, run.out / "samples.json", [row for rows in samples.values() for row in rows])
    if run.rank == 0:
        page = report_html(run, results, samples, lms, test_pairs)
    write_aside(run, run.out / "report.html", lambda aside: aside.write_text(page, encoding="utf-8"))
    write_json(run, path, results)
    return results


def sample_and_score(run: Run, name: str, lms: dict, pairs: list) -> list:
    """One response of lms[name] to each pair's prompt, as a list of dicts in AlpacaEval's form with more fields.

    `reward` is Σ_t r_ctr (Eq. 12) and `token_rewards` its terms; `kl` is Σ_t KL(π ‖ π_ref), exact over the vocabulary at
    each state, in nats; `length` counts tokens; `entropy` is the mean per token, in nats; `true_reward` the demo's.
    """
    lm, rows = lms[name], []
    torch.manual_seed(seed_of(run.args.seed, "evaluation", run.rank))  # the same random numbers for every model
    mine = pairs[run.rank :: run.world]
    sampled = sample(lm, [pair.chosen.prompt for pair in mine], run)
    responses = [Response(pair.chosen.prompt, tokens) for pair, tokens in zip(mine, sampled)]
    scored = [None] * len(mine)
    for group, batch in batches([[response] for response in responses], run, f"scoring {name}"):

        def values(chunk, rows, batch=batch):
            logits = {key: other.logits(hidden[key][rows]) for key, other in lms.items()}  # noqa: B023
            logps = {key: token_logps(logits[key], batch.targets[rows]) for key in ("dpo", "reverse_dpo")}
            reward = implicit_reward(logps["dpo"], logps["reverse_dpo"], run.args.beta)
            return torch.stack([reward, reverse_kl(logits[name], logits["reference"]), entropy(logits[name])], -1)

        with run.autocast():
            hidden = {key: other.hidden(batch) for key, other in lms.items()}
            measured = in_chunks(values, hidden[name], lm.chunk_size)
        for i, part in zip(group, measured.cpu().split(batch.lengths.tolist())):
            scored[i] = part
    for pair, response, (rewards, kl, entropies) in zip(mine, responses, (part.unbind(-1) for part in scored)):
        row = {
            "instruction": pair.instruction,
            "output": run.tokenizer.decode(response.tokens, skip_special_tokens=True),
            "generator": name,
            "tokens": token_texts(run.tokenizer, response.tokens),
            "token_ids": list(response.tokens),
            "token_rewards": rewards.tolist(),
            "reward": rewards.sum().item(),
            "kl": kl.sum().item(),
            "length": len(response.tokens),
            "entropy": entropies.mean().item(),
        }
        rows.append(row | ({"true_reward": true_reward(row["output"])} if run.args.dataset == "demo" else {}))
    return run.gather(rows)


def token_texts(tokenizer, tokens: list) -> list:
    """What each token adds to the text; a character made of several tokens is shown at its last one."""
    texts = [tokenizer.decode(tokens[:end]) for end in range(len(tokens) + 1)]
    return [after[len(before) :] for before, after in pairwise(texts)]


def printable(text: str) -> str:
    """Text with control characters spelled out, so that a model cannot drive the terminal that shows it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shade(tokens: list, rewards: list, colour: bool) -> str:
    """Tokens as one line for a terminal, on green where r_ctr is positive and on red where it is negative."""
    texts = [*map(printable, tokens)]
    if not colour:
        return "".join(texts)
    shades, top = {True: (194, 157, 120, 83, 46), False: (224, 217, 210, 203, 196)}, max(1e-9, *map(abs, rewards))
    pick = lambda reward: shades[reward > 0][min(4, int(5 * abs(reward) / top))]  # of ANSI's 256, from pale to full
    return "".join(f"\x1b[30;48;5;{pick(reward)}m{text}\x1b[0m" for text, reward in zip(texts, rewards))


def shade_html(tokens: list, rewards: list, notes=(), beneath=(), top=None) -> str:
    """Tokens as HTML, shaded green for a positive and red for a negative reward, fully at ±`top` (their largest).

    `notes` (texts of several lines) open on hover or tap, `beneath` (numbers) stand under the tokens. For a page that
    holds REPORT_STYLE. All text is escaped.
    """
    top, spans = top or max(1e-9, *map(abs, rewards)), []
    for token, reward, note, number in zip_longest(tokens, rewards, notes, beneath):
        green_or_red = "46,160,67" if reward > 0 else "218,54,51"
        style = f"background:rgba({green_or_red},{min(1.0, abs(reward) / top):.2f})"
        under = "" if number is None else f"<sub>{number:+g}</sub>" if number else "<sub></sub>"
        tip = f'<span class="tip">{html.escape(note)}</span>' if note else ""
        text = html.escape(printable(token)) + under + tip
        spans.append(f'<span class="t{" two" if under else ""}" tabindex="0" style="{style}">{text}</span>')
    return f'<div class="tokens">{"".join(spans)}</div>'


@torch.no_grad()
def explain(run: Run, lms: dict, response: Response) -> list:
    """What the models make of each token of a response, one dict a token.

    `p` is its probability under every model and the teacher, `top` the teacher's five likeliest tokens with theirs.
    """
    batch, teacher = collate([[response]], run.pad_id, run.device), make_teacher(run.args, lms.get)
    with run.autocast():
        logits = {name: lm.logits(lm.hidden(batch)) for name, lm in lms.items()}
        *_, logits["teacher"], alpha = teacher.logits(teacher.hidden(batch), slice(None))
    logps = {name: token_logps(z, batch.targets) for name, z in logits.items()}
    reward = implicit_reward(logps["dpo"], logps["reverse_dpo"], run.args.beta)
    columns = torch.stack([alpha, token_beta(alpha, run.args.beta), reward], -1).tolist()
    probabilities = torch.stack([*logps.values()], -1).exp().tolist()
    top = [x.tolist() for x in logits["teacher"].softmax(-1).topk(min(5, logits["teacher"].shape[-1]))]
    return [
        {
            **dict(zip(("alpha", "beta_t", "reward"), column)),
            "p": dict(zip(logps, p)),
            "top": [(run.tokenizer.decode([i]), best) for best, i in zip(values, ids)],
        }
        for column, p, values, ids in zip(columns, probabilities, *top)
    ]


REPORT_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1rem 1.2rem 9rem; color: #1f2328 }
h1 { font-size: 1.5rem; margin: .5rem 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #d0d7de }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem }
p { color: #59636e; margin: .4rem 0 }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums }
td, th { padding: .15rem .7rem; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left; padding-left: 0 } tr + tr td { border-top: 1px solid #eaeef2 }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: .5rem }
.curves svg { width: 100%; height: auto }
.answer { display: grid; grid-template-columns: 6.5rem 1fr; gap: 0 .8rem; margin: .35rem 0 } .name { font-weight: 600 }
.tokens { line-height: 1.7; overflow-wrap: anywhere } .t { white-space: pre-wrap; border-radius: 3px; cursor: default }
.t:hover, .t:focus { outline: 1px solid #1f2328 } .t.two { display: inline-block; vertical-align: top; text-align: center }
.t sub { display: block; font-size: .7em; line-height: 1.2; min-height: 1.2em; color: #59636e; background: #fff }
.tip { display: none; position: fixed; inset: auto 0 0 0; background: #1f2328; color: #fff; padding: .6rem 1.2rem;
  white-space: pre-wrap; text-align: left; font-size: .9rem; z-index: 9 }
.t:hover .tip, .t:focus .tip { display: block }
@media (max-width: 600px) { .answer { grid-template-columns: 1fr } }
"""
CURVES = {
    "loss": "loss", "accuracy": "accuracy in the batch", "margin": "reward margin", "reward": "reward of a response",
    "kl": "KL to the teacher, nats/token", "alpha": "α, mean over tokens", "length": "length, tokens",
    "true_reward": "true reward",
}  # fmt: skip


def curve(steps: list, values: list, title: str) -> str:
    """One small chart as SVG: the values, and over them the mean of their neighbours."""
    near = max(1, len(values) // 40)
    around = [values[max(0, i - near) : i + near + 1] for i in range(len(values))]
    means = [sum(part) / len(part) for part in around]
    figure = Figure(figsize=(2.5, 1.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color="#9ec5fe", linewidth=0.8)
    axes.plot(steps, means, color="#0a58ca", linewidth=1.6)
    axes.set_title(title, loc="left", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", transparent=True)
    return drawing.getvalue()[drawing.getvalue().index("<svg") :]


def note_on(state: dict) -> str:
    """One dict of `explain` as lines to read."""
    chances = ", ".join(f"{name} {p:.3f}" for name, p in state["p"].items())
    top = ", ".join(f"{printable(text)!r} {p:.3f}" for text, p in state["top"])
    return (
        f"r_ctr {state['reward']:+.3f}, α_t {state['alpha']:.3g}, β_t {state['beta_t']:.3g}\n"
        f"probability under {chances}\nthe teacher's first: {top}"
    )


def report_html(run: Run, results: dict, samples: dict, lms: dict, pairs: list) -> str:
    """The run on one self-contained page: results, shaded responses, curves of every stage, settings."""
    text = lambda x: f"{x:.3f}" if isinstance(x, float) else html.escape(printable(str(x)))

    def table(head, rows):
        lines = ["".join(f"<th>{text(x)}</th>" for x in head)]
        lines += ["".join(f"<td>{text(x)}</td>" for x in row) for row in rows]
        return '<div class="scroll"><table><tr>' + "</tr><tr>".join(lines) + "</tr></table></div>"

    def responses(i):
        for name, rows in samples.items():
            notes = [
                note_on(state) for state in explain(run, lms, Response(pairs[i].chosen.prompt, rows[i]["token_ids"]))
            ]
            truth = true_rewards_of(run, rows[i]["token_ids"])
            tokens = shade_html(rows[i]["tokens"], rows[i]["token_rewards"], notes, truth, top)
            yield f'<div class="answer"><span class="name">{name}</span>{tokens}</div>'

    def curves(lines):
        steps = [line["step"] for line in lines]
        for name in (name for name in CURVES if name in lines[0]):
            yield curve(steps, [line[name] for line in lines], CURVES[name])

    title = f"AlignDistil: {Path(run.args.model).name} on {Path(run.args.dataset).name}"
    scores, n = results["models"], results["reward_accuracy"]["n"]
    accuracy = {name: row for name, row in results["reward_accuracy"].items() if name != "n"}
    columns = list(accuracy["dpo"])
    page = [
        f"<h1>{text(title)}</h1><p>Means over one response of each model to each held-out prompt: reward Σ_t r_ctr, KL from "
        "the reference in nats a response, length in tokens, entropy in nats a token.</p>",
        table(["", *scores["policy"]], [[name, *row.values()] for name, row in scores.items()]),
        f"<p>How often each reward prefers the chosen response of {n} held-out pairs, with a 95 % interval.</p>",
        table(["", *columns], [[name, *(row.get(column, "") for column in columns)] for name, row in accuracy.items()]),
        "<h2>Responses</h2><p>Green tokens have a positive reward r_ctr, red ones a negative one; in the demo the true reward "
        "stands beneath. Point at a token, or tap it, for what the models make of it.</p>",
    ]
    shown = range(min(6, len(samples["policy"])))
    top = max(1e-9, *(abs(reward) for rows in samples.values() for i in shown for reward in rows[i]["token_rewards"]))
    for i in shown:
        page += [f"<h3>{text(pairs[i].instruction)}</h3>", *responses(i)]
    path = run.out / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for stage, mine in groupby(lines, key=lambda line: line["stage"]):
        page.append(f'<h2>Training: {stage}</h2><div class="curves">{"".join(curves(list(mine)))}</div>')
    page.append(f"<h2>Settings</h2><details><summary>all</summary>{table([], asdict(run.args).items())}</details>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{text(title)}</title>'
    return "\n".join(
        [
            f"<!DOCTYPE html><html lang=en><head>{head}<style>{REPORT_STYLE}</style></head><body>",
            *page,
            "</body></html>",
        ]
    )


def report(run: Run, results: dict) -> None:
    """Print the final table, the held-out accuracies and a few responses side by side."""
    columns = list(results["models"]["policy"])
    print("\n" + " " * 12 + "".join(f"{column:>13}" for column in columns))
    for name, row in results["models"].items():
        print(f"{name:12}" + "".join(f"{row[column]:13.3f}" for column in columns))
    print(f"\nheld-out reward accuracy on {results['reward_accuracy']['n']} pairs, with a 95 % interval")
    for name in ("dpo", "reverse", "contrastive"):
        row = results["reward_accuracy"][name]
        print(f"{name:12}{row['accuracy']:8.1%}   [{row['low']:.1%}, {row['high']:.1%}]")
    samples = json.loads((run.out / "samples.json").read_text())
    prompts = len(samples) // len(results["models"])
    for i in range(min(3, prompts)):
        print("\n> " + shade([samples[i]["instruction"]], [0.0], colour=False))
        for row in samples[i::prompts]:
            if row["generator"] != "reverse_dpo":
                print(f"{row['generator']:>10}: " + shade(row["tokens"], row["token_rewards"], sys.stdout.isatty()))
    print(f"\nmodels, metrics, samples and results are in {run.out}")


# ----------------------------------------------------------------------------------------------------------------------
# 11  Files, checks and the command line.
# ----------------------------------------------------------------------------------------------------------------------


def seed_of(*parts) -> int:
    """One number from a seed and what it is used for; the same on every machine."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def first_line(error: BaseException) -> str:
    """An exception's root cause as one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Run:
    """What every stage needs beside the mathematics: settings, tokenizer, device, ranks, progress bars."""

    def __init__(self, args: Args):
        self.args, self.out = args, Path(args.output_dir or f"runs/{Path(args.model).name}")
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = pick_device(args.device)
        self.teacher_device = pick_device(args.teacher_device) if args.teacher_device else self.device
        self.bf16 = self.device.type == "cuda" if args.bf16 is None else args.bf16

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def bar(self, items, title: str, **options):
        return tqdm(items, title, dynamic_ncols=True, **{"disable": self.rank > 0, **options})

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, mine: list) -> list:
        """Lists of rank 0, 1, ..., dealt out as items[rank::world] → all items in their order, on every rank."""
        parts = [mine]
        if self.world > 1:
            dist.all_gather_object(parts := [None] * self.world, mine)
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]


def pick_device(name: str | None) -> torch.device:
    """The named device, or the best that is there. Raises BadInput for one that is not."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name} is not there ({first_line(error)}); choose another with --device") from None


def check_hub(name: str, kind: str) -> None:
    """One quick question to the hub, so that a typo or a missing network is said at once and not after many retries."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        getattr(huggingface_hub.HfApi(), f"{kind}_info")(name, timeout=5)
    except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.HFValidationError):
        raise BadInput(f"{kind} {name}: neither a local folder nor on the hub; check the spelling") from None
    except Exception as error:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        tqdm.write(f"the hub does not answer ({first_line(error)}): from here on, only what is in the local cache")


def hub_hint() -> str:
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    return "the hub is out of reach: local folders and files, and --model demo, work offline" if offline else "check it"


def load_pretrained(loader, name: str, **options):
    """loader.from_pretrained, with any failure as one line. Never runs code that comes with a checkpoint."""
    if not os.path.isdir(name):
        check_hub(name, "model")
    try:
        return loader.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # of many types, which all mean that this model cannot be had
        raise BadInput(f"model {name} cannot be loaded ({first_line(error)}); {hub_hint()}") from error


def load_lm(name: str, run: Run, gradient_checkpointing=False, device=None, dtype=torch.float32) -> LM:
    """A causal LM in `dtype` on `device`, its logits checked against the model's own on a short input."""
    options = {"dtype": torch.float32, "use_safetensors": True}
    model = demo_model(run.args.seed) if name == "demo" else load_pretrained(AutoModelForCausalLM, name, **options)
    lm, example = LM(model), Response([1], list(range(2, 9)))
    with torch.no_grad():
        ours = lm.logits(lm.hidden(batch := collate([[example]], 0)))
        own = lm.model(input_ids=batch.input_ids, use_cache=False).logits[0, :-1].float()
    if not own.isfinite().all():
        raise BadInput(f"model {name}: its logits are not finite; its weights are broken")
    if not torch.allclose(ours, own, rtol=1e-4, atol=1e-4 * own.abs().max().item()):
        raise BadInput(f"model {name}: its logits are not head(body(tokens)), so it is not supported; choose another")
    return LM(model.to(device or run.device, dtype), run.args.chunk_size, run.device, gradient_checkpointing)


def load_frozen(name: str, run: Run) -> LM:
    """A teacher: without gradients, in bfloat16 where the run uses it, on the teachers' device."""
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    return load_lm(name, run, device=run.teacher_device, dtype=dtype).requires_grad_(False)


def set_up(args: Args) -> tuple:
    """Check all that can be checked before training, then open the output folder: (run, training, held-out pairs)."""
    check_settings(args)
    run = Run(args)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are told by read_dataset
    if run.world > 1:
        if run.device.type == "cuda":
            torch.cuda.set_device(run.device)
        dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo")
    tokenizer = demo_tokenizer() if args.model == "demo" else load_pretrained(AutoTokenizer, args.model)
    if tokenizer.eos_token_id is None:
        raise BadInput(f"model {args.model}: its tokenizer has no end-of-sequence token to end responses with; set one")
    run.tokenizer, run.stop_ids = tokenizer, list(dict.fromkeys([stop_token(tokenizer), tokenizer.eos_token_id]))
    run.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    config = load_lm(args.model, run).model.config.get_text_config()
    for folder in filter(None, (args.dpo, args.reverse_dpo)):
        size = load_lm(folder, run).model.config.get_text_config().vocab_size
        if (size, load_pretrained(AutoTokenizer, folder).get_vocab()) != (config.vocab_size, tokenizer.get_vocab()):
            raise BadInput(
                f"teacher {folder}: its vocabulary or tokenizer is not that of {args.model}; use one that is"
            )
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    length = args.max_length or min(2048, positions)
    if args.max_length is None and length < 2048:
        run.say(f"max_length is lowered from 2048 to the model's {positions} positions")
    run.args = args = replace(
        args,
        r=(20.0 if args.off_policy else 30.0) if args.r is None else args.r,
        sft=not tokenizer.chat_template if args.sft is None else args.sft,
        max_length=length,
        max_prompt_length=args.max_prompt_length or length // 2,
    )
    if length > positions:
        raise BadInput(f"--max_length {length} is more than the {positions} positions of {args.model}; lower it")
    if length - args.max_prompt_length < 2:
        raise BadInput(f"--max_length {length} leaves no room for a response after --max_prompt_length; lower that")
    train_pairs, test_pairs = load_pairs(run)
    if min(args.batch_size, len(train_pairs)) < run.world:
        raise BadInput(
            f"{run.world} processes for --batch_size {args.batch_size} of {len(train_pairs)} pairs; use fewer"
        )
    open_output(run, train_pairs + test_pairs)
    return run, train_pairs, test_pairs


def open_output(run: Run, pairs: list) -> None:
    """Make the output folder, or go on with the run in it if its settings and data are the same; else raise BadInput."""
    crc = 0
    for ids in (ids for pair in pairs for ids in (pair.chosen.prompt, pair.chosen.tokens, pair.rejected.tokens)):
        crc = zlib.crc32(ids, zlib.crc32(b"|", crc))
    settings, config = asdict(run.args) | {"data": crc}, run.out / "config.json"
    try:
        saved = json.loads(config.read_text()) if config.exists() else {}
        ours = [run.out / name for name in OUTPUTS.split() if (run.out / name).exists()]
        needed = [Path(name).resolve() for name in (run.args.model, run.args.dpo, run.args.reverse_dpo) if name]
        doomed = [path for path in needed if path in [path.resolve() for path in ours]]
        if ours and not {"model", "data"} <= saved.keys():
            raise BadInput(f"{run.out} holds {ours[0].name}, but no run of this script; choose another --output_dir")
        if saved and not run.args.overwrite:
            differ = [k for k in settings if saved.get(k) != settings[k] and k not in FREE_SETTINGS]
            if differ:
                changes = ", ".join(f"{k} {saved.get(k)} → {settings[k]}" for k in differ)
                raise BadInput(
                    f"{run.out} is of a run with other settings ({changes}); use --overwrite or another folder"
                )
            return
        if doomed:
            raise BadInput(f"--overwrite would delete {doomed[0]}, which this run needs; choose another --output_dir")
        run.barrier()
        if run.rank == 0:
            run.out.mkdir(parents=True, exist_ok=True)
            for path in ours:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except (OSError, json.JSONDecodeError) as error:
        raise BadInput(f"output folder {run.out} cannot be used ({error}); choose another --output_dir") from None
    write_json(run, config, settings)


def write_aside(run: Run, path: Path, write: Callable) -> None:
    """write(another path) on rank 0, then flush and rename it, so that `path` is there whole or not at all."""
    if run.rank == 0:
        aside = path.with_name(path.name + ".partial")
        try:
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
            write(aside)
            for file in aside.rglob("*") if aside.is_dir() else [aside]:
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            os.replace(aside, path)
        except Exception as error:  # a full disk is an OSError to us, a RuntimeError to torch, its own to safetensors
            message = f"{path} cannot be written ({first_line(error)}); make room and run the same command"
            raise BadInput(message) from error
    run.barrier()


def write_json(run: Run, path: Path, content) -> None:
    write_aside(run, path, lambda aside: aside.write_text(json.dumps(content, indent=1, ensure_ascii=False)))


def save_model(run: Run, model, folder: Path) -> None:
    """A Hugging Face checkpoint with its tokenizer; what the stage needed to go on is not needed any more."""
    write_aside(run, folder, lambda aside: (model.save_pretrained(aside), run.tokenizer.save_pretrained(aside)))
    if run.rank == 0:
        (run.out / "checkpoint.pt").unlink(missing_ok=True)


def save_checkpoint(run: Run, stage: str, model, optimizer, step: int) -> None:
    state = {"stage": stage, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    write_aside(run, run.out / "checkpoint.pt", lambda aside: torch.save(state, aside))


def load_checkpoint(run: Run, stage: str, model, optimizer) -> int:
    """Put the last checkpoint of this stage into model and optimizer; the step to go on at, 0 if there is none."""
    path = run.out / "checkpoint.pt"
    state = torch.load(path, map_location=run.device, weights_only=True) if path.exists() else {"stage": None}
    if state["stage"] != stage:
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    run.say(f"{stage}: going on after step {state['step']}")
    return state["step"]


def peak_memory(device: torch.device) -> float:
    """Peak memory in GB since the process began: the GPU's, or on other devices that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class Log:
    """A stage's bar and its lines in metrics.jsonl. Values stay on the device until `flush` reads them."""

    def __init__(self, run: Run, stage: str, batch_size: int, steps: int, first: int):
        self.run, self.stage, self.batch_size, self.path = run, stage, batch_size, run.out / "metrics.jsonl"
        self.waiting, self.tokens, self.began = [], 0, time.time()
        self.flushed = self.began
        self.bar = run.bar(None, stage, total=steps, initial=first)
        if self.path.exists():
            # what came after the checkpoint is done again, and a killed run may have cut its last line
            lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            keep = lambda line: line["stage"] != stage or line["step"] <= first
            content = "".join(line for line in lines if keep(json.loads(line)))
            write_aside(run, self.path, lambda aside: aside.write_text(content))

    def add(self, step: int, learning_rate: float, grad_norm: Tensor, sums: dict) -> None:
        """One step: its learning rate, the norm of its gradient (the same on every rank), this rank's sums."""
        sums = {**sums, "grad_norm": grad_norm * (self.batch_size / self.run.world)}
        self.waiting.append((step, learning_rate, sums))

    def stop(self, step: int, pairs: list, what: str) -> None:
        """End the run at a step that is not finite, naming the records of its batch."""
        self.bar.close()
        indices = batch_indices(step, len(pairs), self.batch_size, self.run.args.seed)
        records, path = sorted(pairs[i].record for i in indices), self.run.out / "checkpoint.pt"
        raise BadInput(
            f"{self.stage}: {what} at step {step + 1} (records {records}); look at these or lower the learning rate; "
            f"last good checkpoint: {path if path.exists() else 'none yet'}"
        )

    def flush(self, pairs: list, policy: LM) -> None:
        """Read the waiting steps and write their lines. Raises BadInput if a loss or a weight is not finite."""
        values = torch.stack([torch.stack([*sums.values()]).float() for *_, sums in self.waiting])
        means, now = (self.run.total(values) / self.batch_size).tolist(), time.time()
        lines = []
        for (step, learning_rate, sums), row in zip(self.waiting, means):
            line = dict(zip(sums, row))
            if not all(map(math.isfinite, row)):
                self.stop(step, pairs, f"loss {line['loss']}, gradient norm {line['grad_norm']}")
            line["tokens"] = round(line["tokens"] * self.batch_size)
            lines.append({"stage": self.stage, "step": step + 1, **line, "learning_rate": learning_rate})
        if not torch.stack([parameter.isfinite().all() for parameter in policy.parameters()]).all():
            self.stop(self.waiting[-1][0], pairs, "weights are not finite after the update")
        tokens = sum(line["tokens"] for line in lines)
        speed = {
            "tokens_per_s": round(tokens / (now - self.flushed)),
            "peak_memory_gb": round(peak_memory(self.run.device), 3),
        }
        if self.run.rank == 0:
            with open(self.path, "a") as file:
                file.writelines(json.dumps(line | speed) + "\n" for line in lines)
        self.bar.update(len(lines))
        watched = [name for name in self.waiting[-1][-1] if name not in ("tokens", "grad_norm")]
        self.bar.set_postfix_str(", ".join(f"{name} {lines[-1][name]:.3g}" for name in watched))
        self.waiting, self.flushed, self.tokens = [], now, self.tokens + tokens

    def close(self) -> None:
        self.bar.close()
        seconds, memory = time.time() - self.began, peak_memory(self.run.device)
        speed = f"{self.tokens / seconds:,.0f} tokens/s"
        self.run.say(f"{self.stage}: {self.tokens:,} tokens in {seconds:.0f} s, {speed}, peak memory {memory:.2f} GB")


def finish_step_on_ctrl_c() -> list:
    """A list that the first Ctrl-C fills, so that no step is left half done; a second one stops at once."""
    asked = []

    def handle(*_):
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("stopping after this step; Ctrl-C again to stop at once")

    signal.signal(signal.SIGINT, handle)
    return asked


def main() -> int:
    """The command line. The exit status is 2 for what cannot be used, 130 after Ctrl-C."""
    try:
        align(parse_args())
        return 0
    except BadInput as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"aligndistil.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "aligndistil.py: stopped; the same command (without --overwrite) goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
