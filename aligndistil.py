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
    2  A language model taken apart hidden states first, the vocabulary a chunk of states at a time
    3  The loss of each stage       SFT, DPO, AlignDistil
    4  Sampling                     responses of the policy itself
    5  The training loop            one for all stages
    6  The algorithm                the stages in order
    7  Settings                     the command line, the paper's values and the demo's
    8  Data                         every preference format, down to token ids
    9  The demo world               reviews whose true token rewards are known
    10 Evaluation and report        what the policy gained, and what it paid in KL
    11 Files, checks and the command line
"""

import array
import contextlib
import copy
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Callable, Literal, Optional, Union

import datasets
import huggingface_hub
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, PreTrainedTokenizerFast

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
    return 0.5 * (p_logits.softmax(-1) - q_logits.softmax(-1)).abs().sum(-1)


def adaptive_alpha(dpo_logits: Tensor, base_logits: Tensor, r: float, eps: float = 1e-3) -> Tensor:
    """Eq. 16. α_t = r·TVD(π_dpo, π_base) + ε: (...), in [ε, r + ε]. Logits are (..., V).

    Far where the two models disagree (the token matters for the reward), hardly at all where they agree.
    """
    return r * total_variation(dpo_logits, base_logits) + eps


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
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """−Σ_v π(v)·log π(v) of logits (..., V): (...), in nats."""
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


# ----------------------------------------------------------------------------------------------------------------------
# 2  A language model taken apart. Logits over the vocabulary are what costs memory (50,257 numbers a state for GPT-2
#    against 768 of hidden state), so they are never made for a whole batch: the body runs first, the hidden states of
#    the response states alone are kept, and the output head and the loss go over them a chunk at a time.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """B sequences (prompt then response, padded on the right to length T) and their N = Σ|y| response states.

    The logits at position i predict token i + 1, so a response's |y| states start at the last prompt position. They are
    listed from lengths, never by comparing ids with the pad id, which may be the end-of-sequence token too.
    """

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), 1 on tokens
    states: Tensor  # (N,) places of the response states in the flattened (B·T)
    targets: Tensor  # (N,) the response token that each state predicts
    row: Tensor  # (N,) the sequence that each state belongs to
    lengths: Tensor  # (B,) |y|
    ref_logps: Tensor  # (B,) log π_ref(y|x), for DPO; zeros elsewhere

    def to(self, device):
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()}
        return Batch(**moved)


def collate(sequences: list, pad_id: int) -> Batch:
    """[(prompt ids, response ids, log π_ref), ...] → Batch. Every prompt and response has at least one token."""
    total = [len(prompt) + len(response) for prompt, response, _ in sequences]
    width = max(total)
    input_ids = torch.full((len(sequences), width), pad_id)
    states, targets = [], []
    for b, (prompt, response, _) in enumerate(sequences):
        input_ids[b, : total[b]] = torch.tensor([*prompt, *response])
        states += range(b * width + len(prompt) - 1, b * width + total[b] - 1)
        targets += response
    lengths = torch.tensor([len(response) for _, response, _ in sequences])
    return Batch(
        input_ids=input_ids,
        attention_mask=(torch.arange(width) < torch.tensor(total)[:, None]).long(),
        states=torch.tensor(states),
        targets=torch.tensor(targets),
        row=torch.arange(len(sequences)).repeat_interleave(lengths),
        lengths=lengths,
        ref_logps=torch.tensor([ref_logps for *_, ref_logps in sequences], dtype=torch.float32),
    )


class LM(nn.Module):
    """A Hugging Face causal LM as two maps: `hidden` (tokens → hidden states) and `logits` (hidden states → logits).

    With `head_device` the output head is copied to that device and hidden states are sent there: a teacher on a device
    of its own moves hidden-size numbers a state instead of vocabulary-size ones.
    """

    def __init__(self, model, chunk_size: int = 512, head_device=None):
        super().__init__()
        self.model, self.chunk_size, self.head_device = model.eval(), chunk_size, head_device  # eval: no dropout, ever
        self.head = model.get_output_embeddings()
        if head_device is not None and head_device != self.head.weight.device:
            self.head = copy.deepcopy(self.head).to(head_device)
        config = model.config.get_text_config()
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.softcap = getattr(config, "final_logit_softcapping", None)

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states of the response states: (N, hidden size)."""
        device = self.model.device
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
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
    """(N, ...) values of states → (B, ...) sums over each response."""
    return values.new_zeros(len(batch.lengths), *values.shape[1:]).index_add_(0, batch.row, values)


# ----------------------------------------------------------------------------------------------------------------------
# 3  The loss of each stage. Each maps (policy, batch) to the *sum* of the loss over the batch's examples (responses, or
#    pairs) and a dict of such sums to watch; the loop divides by the whole optimisation batch's number of examples, so
#    neither micro-batches nor ranks change the loss.
# ----------------------------------------------------------------------------------------------------------------------


def response_logps(lm: LM, batch: Batch) -> Tensor:
    """log π(y|x) of each response, (B,): the sum of its tokens' log-probabilities. No gradient."""
    with torch.no_grad():
        values = lambda chunk, rows: token_logps(lm.logits(chunk), batch.targets[rows])
        return response_sums(in_chunks(values, lm.hidden(batch), lm.chunk_size), batch)


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
    values = lambda chunk, rows: token_logps(policy.logits(chunk), batch.targets[rows])
    with torch.no_grad():
        logps = response_sums(in_chunks(values, hidden, policy.chunk_size), batch)
    chosen, rejected = logps.requires_grad_().chunk(2)
    ref_chosen, ref_rejected = batch.ref_logps.chunk(2)
    losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    (slopes,) = torch.autograd.grad(losses.sum(), logps)

    weighted = lambda chunk, rows: (slopes[batch.row[rows]] * values(chunk, rows))[:, None]
    surrogate, _ = sum_in_chunks(weighted, hidden, policy)
    loss = losses.sum().detach() + surrogate - surrogate.detach()  # the value of one, the gradient of the other
    margins = (implicit_reward(chosen, ref_chosen, beta) - implicit_reward(rejected, ref_rejected, beta)).detach()
    return loss, {"loss": loss.detach(), "accuracy": (margins > 0).float().sum(), "margin": margins.sum()}


def distillation_batch_loss(
    policy: LM, batch: Batch, dpo: LM, base: LM, reward: str, alpha_of: Callable, beta: float
) -> tuple:
    """Eq. 18 and 19, summed over responses: 1/|y| Σ_t β_t·KL(π_θ ‖ π*) with β_t = β0/α_t.

    `reward` picks the teacher's anchor: π_dpo for "contrastive" (base: the reverse model), the base itself for
    "vanilla" (base: the reference). `alpha_of(dpo_logits, base_logits)` is the one place that decides how far to
    extrapolate: Eq. 16, or a constant. Where it is 0 the formula has no β_t, and the weight is 1: plain distillation.
    """
    with torch.no_grad():  # launched before the policy's own pass, so that on two devices they overlap
        dpo_hidden = dpo.hidden(batch)
        base_hidden = dpo_hidden if base is dpo else base.hidden(batch)

    def values(chunk, rows):
        with torch.no_grad():  # neither the teacher nor α_t is trained
            dpo_logits, base_logits = dpo.logits(dpo_hidden[rows]), base.logits(base_hidden[rows])
            alpha = alpha_of(dpo_logits, base_logits)
            beta_t = torch.where(alpha > 0, beta / alpha, 1.0)
            anchor_logits = dpo_logits if reward == "contrastive" else base_logits
            teacher = teacher_logits(anchor_logits, dpo_logits, base_logits, alpha)
        kl = reverse_kl(policy.logits(chunk), teacher)
        return torch.stack([beta_t * kl, alpha, beta_t, kl], -1) / batch.lengths[batch.row[rows], None]

    loss, values = sum_in_chunks(values, policy.hidden(batch), policy)
    _, alpha, beta_t, kl = values.sum(0)
    return loss, {"loss": loss.detach(), "alpha": alpha, "beta_t": beta_t, "kl": kl}


# ----------------------------------------------------------------------------------------------------------------------
# 4  Sampling, ŷ ~ π_θ(·|x).
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(lm: LM, prompts: list, run: "Run") -> list:
    """One response to each prompt (lists of ids → lists of ids), drawn from the model's own distribution.

    A response keeps its end token; one that the length limit cut has none. Prompts are grouped by length and padded on
    the left. The random state is torch's global one: seed it to get the same responses.
    """
    pure = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=run.max_new_tokens,
        eos_token_id=run.stop_ids, pad_token_id=run.pad_id,
    )  # fmt: skip
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [order[i : i + run.args.sampling_batch_size] for i in range(0, len(order), run.args.sampling_batch_size)]
    responses = [None] * len(prompts)
    # generate() fills what `pure` leaves unset from the checkpoint's own config (a repetition penalty, say): take it away
    checkpoint_config, lm.model.generation_config = lm.model.generation_config, pure
    for group in run.bar(groups, "sampling", leave=False, disable=len(groups) < 2):
        width = max(len(prompts[i]) for i in group)
        ids, mask = torch.full((len(group), width), run.pad_id), torch.zeros(len(group), width, dtype=torch.long)
        for b, i in enumerate(group):
            ids[b, width - len(prompts[i]) :] = torch.tensor([*prompts[i]])
            mask[b, width - len(prompts[i]) :] = 1
        device = lm.model.device
        output = lm.model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=pure)
        for i, tokens in zip(group, output[:, width:].tolist()):
            end = next((t for t, token in enumerate(tokens) if token in run.stop_ids), len(tokens))
            responses[i] = tokens[: end + 1]
    lm.model.generation_config = checkpoint_config
    return responses


# ----------------------------------------------------------------------------------------------------------------------
# 5  The training loop that all stages share. A step is a pure function of the weights, the optimizer and its number:
#    data order and sampling are seeded by (seed, stage, step, rank), so a checkpoint needs no random states.
# ----------------------------------------------------------------------------------------------------------------------


def micro_batches(examples: list, tokens: int) -> list:
    """Indices of `examples`, sorted by length and cut where a micro-batch would pad to more than `tokens` tokens.

    An example is a list of (prompt, response, log π_ref) that stay together, as the two of a pair must. One longer than
    `tokens` is a micro-batch of its own.
    """
    width = [max(len(prompt) + len(response) for prompt, response, _ in example) for example in examples]
    groups = []
    for i in sorted(range(len(examples)), key=lambda i: -width[i]):
        if groups and (len(groups[-1]) + 1) * len(examples[i]) * width[groups[-1][0]] <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def collate_examples(examples: list, run: "Run") -> Batch:
    """Examples → Batch on the run's device: the first sequence of every example, then the second ones."""
    return collate([sequence for part in zip(*examples) for sequence in part], run.pad_id).to(run.device)


def accumulate_gradient(policy: nn.Module, examples: list, loss_of: Callable, batch_size: int, run: "Run") -> dict:
    """Gradient of the mean loss over the optimisation batch, of which `examples` are this rank's share.

    Returns this rank's sums of what the loss watches, on the device, undivided. `policy` is an LM, or one in
    DistributedDataParallel, which averages over ranks in the last micro-batch: hence the factor `run.world`.
    """
    sums = {}
    groups = micro_batches(examples, run.args.tokens_per_micro_batch)
    for group in groups:
        last = group is groups[-1]
        with contextlib.nullcontext() if last or run.world == 1 else policy.no_sync():
            with run.autocast():
                loss, watched = policy(loss_of, collate_examples([examples[i] for i in group], run))
            (loss * (run.world / batch_size)).backward()
        for name, value in watched.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def batch_indices(step: int, n: int, batch_size: int, seed: int) -> list:
    """The records of one step: a walk through one seeded permutation of 0..n−1 an epoch, without end."""
    indices = []
    for i in range(step * batch_size, (step + 1) * batch_size):
        if i % n == 0 or not indices:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, "order", i // n)))
        indices.append(order[i % n].item())
    return indices


def train(
    run: "Run", stage: str, start: str, pairs: list, examples_of: Callable, loss_of: Callable, learning_rate: float,
    epochs: float,
) -> str:  # fmt: skip
    """Train a copy of the model `start` (folder or hub id) and return its folder, <output_dir>/<stage>.

    `examples_of(policy, pairs)` makes a step's examples: responses of the data, or the policy's own. AdamW, linear
    warm-up then linear decay, gradients clipped to `max_grad_norm`. A finished stage is not repeated; one under way
    goes on from its last checkpoint. Raises BadInput when a loss is not finite.
    """
    args, folder = run.args, run.out / stage
    if folder.exists():
        run.say(f"{stage}: finished before, in {folder}")
        return str(folder)
    policy = load_lm(start, run, gradient_checkpointing=args.gradient_checkpointing)
    parallel = policy if run.world == 1 else DistributedDataParallel(policy, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=args.weight_decay, fused=True)
    batch_size = min(args.batch_size, len(pairs))
    steps = min(math.ceil(epochs * len(pairs) / batch_size), args.max_steps or sys.maxsize)
    warmup = math.ceil(args.warmup_ratio * steps)
    first = load_checkpoint(run, stage, policy.model, optimizer)
    log = Log(run, stage, batch_size, steps, first)
    with stop_on_ctrl_c() as stop:
        for step in range(first, steps):
            torch.manual_seed(seed_of(args.seed, stage, step, run.rank))
            indices = batch_indices(step, len(pairs), batch_size, args.seed)
            indices = sorted(indices, key=lambda i: pairs[i].length)[run.rank :: run.world]
            examples = examples_of(policy, [pairs[i] for i in indices])
            sums = accumulate_gradient(parallel, examples, loss_of, batch_size, run)

            schedule = min((step + 1) / warmup if warmup else 1, (steps - step) / max(1, steps - warmup))
            optimizer.param_groups[0]["lr"] = learning_rate * schedule
            grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

            tokens = sum(len(prompt) + len(response) for example in examples for prompt, response, _ in example)
            log.add(step, sums, grad_norm, learning_rate * schedule, tokens)
            save = (step + 1) % args.save_steps == 0 or stop.requested
            if save or step + 1 == steps or (step + 1) % args.logging_steps == 0:
                log.flush(pairs)
            if save:
                save_checkpoint(run, stage, policy.model, optimizer, step + 1)
            if stop.requested:
                raise KeyboardInterrupt
    log.close()
    save_model(run, policy.model, folder)
    return str(folder)


# ----------------------------------------------------------------------------------------------------------------------
# 6  The algorithm.
# ----------------------------------------------------------------------------------------------------------------------


def align(args: "Args") -> dict:
    """Run every stage that is not finished yet; leave models, metrics, samples and results in args.output_dir.

    Returns what results.json holds. Raises BadInput before any training, and before anything is written, if the
    settings, the models or the data cannot be used.
    """
    run, train_pairs, test_pairs = set_up(args)

    # π_ref: a base model first learns what responses look like
    reference = args.model
    if run.sft:
        chosen_only = lambda policy, pairs: [[(pair.prompt, pair.chosen, 0.0)] for pair in pairs]
        reference = train(
            run, "sft", reference, train_pairs, chosen_only, sft_batch_loss, args.sft_learning_rate, args.sft_epochs
        )

    # π_dpo and π_dpo⁻: the same function on the pairs and on the swapped pairs, with one pass of the reference for both
    def dpo_stage(stage, pairs):
        both = lambda policy, pairs: [pair.sequences() for pair in pairs]
        loss = lambda policy, batch: dpo_batch_loss(policy, batch, args.beta)
        return train(run, stage, reference, pairs, both, loss, args.dpo_learning_rate, args.dpo_epochs)

    if not (args.dpo and args.reverse_dpo):
        add_reference_logps(run, reference, train_pairs)
    dpo = args.dpo or dpo_stage("dpo", train_pairs)
    reverse = args.reverse_dpo or dpo_stage("reverse_dpo", [pair.swapped() for pair in train_pairs])

    # π_θ: distilled from the extrapolated teacher, on its own responses or on the chosen ones
    def responses(policy, pairs):
        if args.off_policy:
            return [[(pair.prompt, pair.chosen, 0.0)] for pair in pairs]
        with run.autocast():
            sampled = sample(policy, [pair.prompt for pair in pairs], run)
        return [[(pair.prompt, response, 0.0)] for pair, response in zip(pairs, sampled)]

    def alpha_of(dpo_logits, base_logits):
        if args.alpha == "adaptive":
            return adaptive_alpha(dpo_logits, base_logits, args.r, args.eps)
        return dpo_logits.new_full(dpo_logits.shape[:-1], float(args.alpha))

    def distill_stage():
        dpo_lm = load_frozen(dpo, run)
        base_folder = reverse if args.reward == "contrastive" else reference
        base_lm = dpo_lm if args.alpha == "0" else load_frozen(base_folder, run)
        loss = lambda policy, batch: distillation_batch_loss(
            policy, batch, dpo_lm, base_lm, args.reward, alpha_of, args.beta
        )
        start = dpo if args.init_from == "dpo" else reference
        return train(
            run, "policy", start, train_pairs, responses, loss, args.distill_learning_rate, args.distill_epochs
        )

    policy = distill_stage()
    folders = {"reference": reference, "dpo": dpo, "reverse_dpo": reverse, "policy": policy}
    results = evaluate(run, folders, test_pairs)
    if run.rank == 0:
        report(run, results)
    return results


# ----------------------------------------------------------------------------------------------------------------------
# 7  Settings. The defaults are the paper's; DEMO is what the built-in demo sets otherwise.
# ----------------------------------------------------------------------------------------------------------------------


def setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    # what to run
    model: str = setting("demo", "hub id or local folder of a causal LM; 'demo' is the built-in world, model and preset")
    dataset: str = setting(
        "HuggingFaceH4/ultrafeedback_binarized",
        "preference pairs: hub id, local folder, or a .jsonl, .json, .csv or .parquet file, in any of TRL's preference "
        "formats; 'demo' is the built-in world",
    )
    train_split: Optional[str] = setting(None, "split to train on (train_prefs, or else train)")
    test_split: Optional[str] = setting(None, "split to evaluate on (test_prefs, or else test, or else a tenth held out)")
    limit: Optional[int] = setting(None, "train on this many pairs (all)")
    output_dir: Optional[str] = setting(None, "where models and results go (runs/<model>)")
    overwrite: bool = setting(False, "start anew where output_dir holds a run, instead of going on with it")
    seed: int = setting(0, "seed of the data order, the held-out part, the sampling and the demo")
    # the stages
    sft: Optional[bool] = setting(None, "SFT on the chosen responses first (on for models without a chat template)")
    dpo: Optional[str] = setting(None, "folder or hub id of a model trained by DPO; skips that stage")
    reverse_dpo: Optional[str] = setting(None, "the same for the reverse model")
    # the method
    beta: float = setting(0.1, "β0 of DPO (Eq. 4)")
    reward: Literal["contrastive", "vanilla"] = setting(
        "contrastive", "the teacher's reward: π_dpo against the reverse model (Eq. 15, 17) or against the reference (Eq. 11)"
    )
    alpha: str = setting("adaptive", "'adaptive' (Eq. 16) or a number: constant extrapolation, 0 for distillation from DPO")
    r: Optional[float] = setting(None, "scale of the adaptive α_t = r·TVD_t + ε (30 on-policy, 20 off-policy)")
    eps: float = setting(1e-3, "ε, the least α_t")
    off_policy: bool = setting(False, "distil on the chosen responses (Eq. 19), not on the policy's own (Eq. 18)")
    init_from: Literal["reference", "dpo"] = setting("reference", "where the policy starts")
    # optimisation
    sft_learning_rate: float = setting(1e-5, "peak learning rate of SFT")
    dpo_learning_rate: float = setting(1e-6, "peak learning rate of DPO and reverse DPO")
    distill_learning_rate: float = setting(1e-6, "peak learning rate of the distillation")
    sft_epochs: float = setting(1.0, "passes over the pairs in SFT")
    dpo_epochs: float = setting(1.0, "passes over the pairs in DPO, and in reverse DPO")
    distill_epochs: float = setting(1.0, "passes over the prompts in the distillation")
    max_steps: Optional[int] = setting(None, "cap on every stage's optimizer steps")
    batch_size: int = setting(128, "pairs or responses an optimizer step, over all devices")
    warmup_ratio: float = setting(0.1, "part of the steps in which the learning rate rises; it falls linearly after")
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    # lengths, speed and memory
    max_length: Optional[int] = setting(None, "prompt and response in tokens (2048, or what the model holds)")
    max_prompt_length: Optional[int] = setting(None, "tokens of the prompt (half of max_length)")
    tokens_per_micro_batch: int = setting(8192, "tokens that one forward and backward pass holds; changes no result")
    chunk_size: int = setting(512, "states that the output head and the loss take at once; changes no result")
    sampling_batch_size: int = setting(64, "prompts sampled at once")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass, to save memory")
    bf16: Optional[bool] = setting(None, "bfloat16 autocast, frozen models in bfloat16 (on CUDA)")
    device: Optional[str] = setting(None, "cuda, cuda:1, mps, cpu (the first of cuda, mps, cpu that is there)")
    teacher_device: Optional[str] = setting(None, "device of the two frozen models in the distillation (device)")
    # evaluation and logs
    eval_pairs: int = setting(1000, "held-out pairs for the reward accuracy, at most")
    eval_prompts: int = setting(128, "held-out prompts that every model answers, at most")
    logging_steps: int = setting(5, "read the metrics, and look at the loss, every so many steps")
    save_steps: int = setting(100, "write a checkpoint every so many steps")


DEMO = dict(
    dataset="demo", r=4.0, sft_learning_rate=1e-3, dpo_learning_rate=5e-5, distill_learning_rate=3e-4, sft_epochs=4.5,
    dpo_epochs=2.5, distill_epochs=1.5, batch_size=64, max_length=64, max_prompt_length=12, sampling_batch_size=256,
    eval_prompts=512,
)  # fmt: skip
FREE_SETTINGS = {"output_dir", "overwrite", "save_steps", "logging_steps"}  # a run may go on with others of these


class BadInput(Exception):
    """What the user gave cannot be used. The message is one line: what, where, what to do."""


class Parser(transformers.HfArgumentParser):
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
    if args.alpha != "adaptive" and not re.fullmatch(r"\d+(\.\d*)?(e[+-]?\d+)?", args.alpha):
        raise BadInput(f"--alpha is {args.alpha!r}: it must be 'adaptive' or a number of at least 0")
    if args.alpha != "adaptive" and float(args.alpha) == 0 and args.reward == "vanilla":
        raise BadInput("--alpha 0 --reward vanilla would distil the reference into itself: use --reward contrastive")
    if args.model == "demo" and args.dataset != "demo":
        raise BadInput(f"--model demo only knows the words of the demo: give a --model for --dataset {args.dataset}")


# ----------------------------------------------------------------------------------------------------------------------
# 8  Data: from any preference format to token ids.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """One preference pair as token ids; responses end in the end token unless they were cut."""

    prompt: array.array
    chosen: array.array
    rejected: array.array
    record: int  # its number in the data set, from 0
    instruction: str  # the prompt as people read it
    ref_chosen_logps: float = 0.0
    ref_rejected_logps: float = 0.0

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    def sequences(self) -> list:
        """[(prompt, chosen, log π_ref), (prompt, rejected, log π_ref)]: what `collate` takes."""
        return [
            (self.prompt, self.chosen, self.ref_chosen_logps),
            (self.prompt, self.rejected, self.ref_rejected_logps),
        ]

    def swapped(self) -> "Pair":
        """The pair that reverse DPO trains on."""
        return Pair(
            self.prompt, self.rejected, self.chosen, self.record, self.instruction, self.ref_rejected_logps,
            self.ref_chosen_logps,
        )  # fmt: skip


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


def encode_pairs(records, numbers: list, most: int, run: "Run", source: str) -> list:
    """Tokenize records[numbers] until there are `most` usable pairs. Says what was left out or cut."""
    tokenizer, args, counts = run.tokenizer, run.args, dict.fromkeys(("empty", "identical", "prompt", "response"), 0)
    bos = tokenizer.bos_token_id
    start = [bos] if bos is not None and not tokenizer.chat_template and tokenizer("").input_ids[:1] == [bos] else []
    ids_of = lambda texts: tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    pairs = []
    for first in run.bar(range(0, len(numbers), 500), f"tokenizing {source}", leave=False):
        rows, texts = numbers[first : first + 500], []
        for number, record in zip(rows, records.select(rows)):
            try:
                prompt, chosen, rejected = split_record(record)
            except ValueError as error:
                raise BadInput(f"{where(source, number)}: {error}; mend or remove the record") from None
            if isinstance(prompt, list) and not tokenizer.chat_template:
                run.say_once("conversations for a model without a chat template: the plain template is used")
            instruction = prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
            if not chosen.strip() or not rejected.strip():
                counts["empty"] += 1
            elif chosen == rejected:
                counts["identical"] += 1
            else:
                texts.append((number, instruction, render_prompt(prompt, chosen, tokenizer), chosen, rejected))
        # prompt and response are tokenized apart, so that no merge crosses the boundary
        columns = [ids_of([row[i] for row in texts]) for i in (2, 3, 4)]
        for (number, instruction, *_), prompt, chosen, rejected in zip(texts, *columns):
            prompt = start + prompt or [run.stop_ids[0]]  # an empty prompt still needs a state to predict from
            counts["prompt"] += len(prompt) > run.max_prompt_length
            prompt = prompt[-run.max_prompt_length :]
            room = run.max_length - len(prompt)
            chosen, rejected = chosen + run.stop_ids[:1], rejected + run.stop_ids[:1]
            if chosen[:room] == rejected[:room]:
                counts["identical"] += 1
                continue
            counts["response"] += (len(chosen) > room) + (len(rejected) > room)
            chosen, rejected = chosen[:room], rejected[:room]
            ids = [array.array("i", part) for part in (prompt, chosen, rejected)]
            pairs.append(Pair(*ids, record=number, instruction=instruction))
        if len(pairs) >= most:
            break
    left_out = f"left out {counts['empty']} with an empty and {counts['identical']} with identical responses"
    cut = f"cut {counts['prompt']} prompts and {counts['response']} responses to the length limits"
    pairs = pairs[:most]
    run.say(f"{source}: {len(pairs):,} pairs; {left_out}; {cut}")
    return pairs


def where(source: str, number: int) -> str:
    """"FILE, line 7" for a JSON Lines file, "SOURCE, record 6 (from 0)" for anything else."""
    if source.endswith(".jsonl") and os.path.isfile(source):
        with open(source, "rb") as file:
            lines = [i for i, line in enumerate(file, 1) if line.strip()]
        return f"{source}, line {lines[number]}"
    return f"{source}, record {number} (from 0)"


def read_dataset(name: str, args: Args) -> datasets.DatasetDict:
    """All splits of a local file or folder, a hub data set or the demo. Raises BadInput naming the file and the line."""
    if name == "demo":
        train, test = demo_records(8192, args.seed), demo_records(1024, args.seed + 10**6)
        return datasets.DatasetDict(train=datasets.Dataset.from_list(train), test=datasets.Dataset.from_list(test))
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    kind = kinds.get(Path(name).suffix.lower())
    if kind and not Path(name).is_file():
        raise BadInput(f"--dataset {name}: no such file")
    try:
        if kind:
            return datasets.load_dataset(kind, data_files=name)
        check_hub(name, "dataset")
        return datasets.load_dataset(name)
    except BadInput:
        raise
    except Exception as error:  # whatever the library raises is turned into one line, with the place where we find it
        if kind == "json":
            find_bad_json(name)
        raise BadInput(f"--dataset {name} cannot be read: {first_line(error)}") from error


def find_bad_json(path: str) -> None:
    """Raise BadInput with the first line of a .json or .jsonl file that is not UTF-8 or not JSON, if there is one."""
    content = Path(path).read_bytes()
    if not content.strip():
        raise BadInput(f"--dataset {path} is empty")
    whole = not path.endswith(".jsonl")
    for number, line in enumerate([content] if whole else content.splitlines(), 1):
        try:
            if line.strip():
                json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}, line {number + line[: error.start].count(10)}: not UTF-8; convert the file") from None
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}, line {number + error.lineno - 1}: not JSON ({error.msg}); mend the line") from None


def load_pairs(run: "Run") -> tuple:
    """(training pairs, held-out pairs) as the settings say. Raises BadInput if fewer than one of each is left."""
    args = run.args
    splits = read_dataset(args.dataset, args)
    pick = lambda given, usual: given or next((split for split in usual if split in splits), None)
    train_split, test_split = pick(args.train_split, ("train_prefs", "train")), pick(args.test_split, ("test_prefs", "test"))
    for flag, split in (("train_split", train_split), ("test_split", test_split)):
        if (split or flag == "train_split") and split not in splits:
            raise BadInput(f"--{flag} {split}: {args.dataset} has the splits {', '.join(splits)}")
    records, held_out = splits[train_split], None
    numbers = list(range(len(records)))
    if test_split is None:
        generator = torch.Generator().manual_seed(seed_of(args.seed, "held out"))
        order = torch.randperm(len(records), generator=generator).tolist()
        cut = max(1, round(0.1 * len(records)))
        numbers, held_out = sorted(order[cut:]), sorted(order[:cut])
        run.say(f"{args.dataset} has no test split: {cut:,} of {len(records):,} records are held out")
    train_pairs = encode_pairs(records, numbers, args.limit or len(numbers), run, args.dataset)
    test_records = records if test_split is None else splits[test_split]
    held_out = list(range(len(test_records))) if held_out is None else held_out
    test_pairs = encode_pairs(test_records, held_out, args.eval_pairs, run, args.dataset)
    if not train_pairs or not test_pairs:
        few = "training" if not train_pairs else "held-out"
        raise BadInput(f"--dataset {args.dataset} leaves no usable {few} pair: at least two different pairs are needed")
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


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the demo world."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *DEMO_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def demo_model(seed: int):
    """A two-layer GPT-2 with random weights, about 0.1M parameters."""
    torch.manual_seed(seed)
    vocabulary = len(demo_tokenizer())
    return transformers.GPT2LMHeadModel(
        GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1, tie_word_embeddings=False)
    )


# ----------------------------------------------------------------------------------------------------------------------
# 10  Evaluation and report.
# ----------------------------------------------------------------------------------------------------------------------


def pair_logps(run: "Run", lm: LM, pairs: list, title: str) -> Tensor:
    """log π of the chosen and the rejected response of every pair: (n, 2), float32 on the CPU, spread over the ranks."""
    examples = [pair.sequences() for pair in pairs[run.rank :: run.world]]
    logps = torch.zeros(len(pairs), 2, device=run.device)
    for group in run.bar(micro_batches(examples, run.args.tokens_per_micro_batch), title):
        with run.autocast():
            both = response_logps(lm, collate_examples([examples[i] for i in group], run))
        logps[[run.rank + i * run.world for i in group]] = both.view(2, -1).T
    return run.total(logps).cpu()


def add_reference_logps(run: "Run", reference: str, pairs: list) -> None:
    """Give every pair its log π_ref, once for both DPO runs; kept in the output folder."""
    path, data = run.out / "reference_logps.pt", data_fingerprint(pairs)
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["data"] != data:
            raise BadInput(f"{run.out} belongs to a run on other data: use --overwrite or another --output_dir")
    else:
        saved = {"data": data, "logps": pair_logps(run, load_lm(reference, run), pairs, "reference logps")}
        write_aside(run, path, lambda partial: torch.save(saved, partial))
    for pair, (chosen, rejected) in zip(pairs, saved["logps"].tolist()):
        pair.ref_chosen_logps, pair.ref_rejected_logps = chosen, rejected


def accuracy_interval(correct: Tensor) -> dict:
    """Share of True in (n,), with Wilson's 95 % interval."""
    n, p, z = len(correct), correct.float().mean().item(), 1.959964
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"accuracy": p, "low": (middle - half) / (1 + z * z / n), "high": (middle + half) / (1 + z * z / n)}


@torch.no_grad()
def evaluate(run: "Run", folders: dict, test_pairs: list) -> dict:
    """Compare π_ref, π_dpo, π_dpo⁻ and the policy, given as folders; write samples.json and results.json.

    Per model, means over its own samples: `reward`, the contrastive reward Σ_t r_ctr (Eq. 12); `kl`, Σ_t KL from π_ref,
    exact over the vocabulary at each state, in nats; `length` in tokens; `entropy` per token, in nats; in the demo
    `true_reward` and `win_rate` against π_ref's response to the same prompt. `reward_accuracy`: the share of held-out
    pairs in which each reward prefers the chosen response.
    """
    if (run.out / "results.json").exists():
        run.say("evaluation: finished before")
        return json.loads((run.out / "results.json").read_text())
    lms = {name: load_lm(folder, run) for name, folder in folders.items()}
    logps = {name: pair_logps(run, lms[name], test_pairs, f"held-out pairs, {name}") for name in list(lms)[:3]}
    accuracy = {}
    for name, a, b in (("dpo", "dpo", "reference"), ("reverse", "reference", "reverse_dpo"), ("contrastive", "dpo", "reverse_dpo")):
        chosen, rejected = implicit_reward(logps[a], logps[b], run.args.beta).unbind(-1)
        accuracy[name] = accuracy_interval(chosen > rejected)

    prompts = test_pairs[: run.args.eval_prompts]
    results, samples = {}, []
    for name, lm in lms.items():
        torch.manual_seed(seed_of(run.args.seed, "evaluation", 0, run.rank))  # the same for every model
        mine = prompts[run.rank :: run.world]
        with run.autocast():
            responses = sample(lm, [pair.prompt for pair in mine], run)
        scores = score_responses(run, lm, lms, [(pair.prompt, y, 0.0) for pair, y in zip(mine, responses)], name)
        rows = run.gather([(pair.instruction, list(y), *score) for pair, y, score in zip(mine, responses, scores)])
        column = lambda i: torch.tensor([row[i] for row in rows])
        results[name] = {
            "reward": torch.tensor([sum(row[2]) for row in rows]).mean().item(),
            "kl": column(3).mean().item(),
            "length": sum(len(row[1]) for row in rows) / len(rows),
            "entropy": (column(4).sum() / sum(len(row[1]) for row in rows)).item(),
        }
        for instruction, y, rewards, *_ in rows:
            output = run.tokenizer.decode(y, skip_special_tokens=True)
            samples.append(
                {"instruction": instruction, "output": output, "generator": name, "tokens": token_texts(run, y), "token_rewards": rewards}
            )  # fmt: skip
        if run.args.dataset == "demo":
            true = torch.tensor([true_reward(sample["output"]) for sample in samples]).view(-1, len(rows))
            wins = (true[-1] > true[0]).float() + 0.5 * (true[-1] == true[0]).float()
            results[name] |= {"true_reward": true[-1].mean().item(), "win_rate": wins.mean().item()}
    results = {"models": results, "reward_accuracy": {**accuracy, "n": len(test_pairs)}}
    write_json(run, run.out / "samples.json", samples)
    write_json(run, run.out / "results.json", results)
    return results


def score_responses(run: "Run", lm: LM, lms: dict, sequences: list, title: str) -> list:
    """[(r_ctr of each token, Σ_t KL from π_ref, Σ_t entropy), ...] of responses that `lm` sampled."""
    scores = [None] * len(sequences)
    for group in run.bar(micro_batches([[s] for s in sequences], run.args.tokens_per_micro_batch), f"scoring {title}", leave=False):
        batch = collate_examples([[sequences[i]] for i in group], run)
        with run.autocast():
            hidden = {key: lms[key].hidden(batch) for key in ("reference", "dpo", "reverse_dpo")}

            def values(chunk, rows):
                own, targets = lm.logits(chunk), batch.targets[rows]
                logits = {key: lms[key].logits(hidden[key][rows]) for key in hidden}
                logps = [token_logps(logits[key], targets) for key in ("dpo", "reverse_dpo")]
                reward = implicit_reward(*logps, run.args.beta)
                return torch.stack([reward, reverse_kl(own, logits["reference"]), entropy(own)], -1)

            values = in_chunks(values, lm.hidden(batch), lm.chunk_size)
        sums, rewards = response_sums(values, batch).tolist(), values[:, 0].split(batch.lengths.tolist())
        for i, (_, kl, entropy_sum), reward in zip(group, sums, rewards):
            scores[i] = (reward.tolist(), kl, entropy_sum)
    return scores


def token_texts(run: "Run", ids: list) -> list:
    """The text that each token adds to the response."""
    texts = [run.tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in zip(texts, texts[1:])]


def shade(tokens: list, rewards: list, colour: bool) -> str:
    """Tokens as one line of text for a terminal, green where r_ctr is positive and red where it is negative."""
    texts = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in token) for token in tokens]
    if not colour:
        return "".join(texts)
    top = max(1e-9, *map(abs, rewards))
    greens, reds = (194, 157, 120, 83, 46), (224, 217, 210, 203, 196)  # ANSI's 256 colours, pale to full
    pick = lambda reward: (greens if reward > 0 else reds)[min(4, int(5 * abs(reward) / top))]
    return "".join(f"\x1b[30;48;5;{pick(reward)}m{text}\x1b[0m" for text, reward in zip(texts, rewards))


def report(run: "Run", results: dict) -> None:
    """Print the final table, the held-out accuracies and a few responses side by side."""
    columns = list(results["models"]["policy"])
    print("\n" + " " * 12 + "".join(f"{column:>13}" for column in columns))
    for name, row in results["models"].items():
        print(f"{name:12}" + "".join(f"{row[column]:13.3f}" for column in columns))
    print(f"\nheld-out reward accuracy on {results['reward_accuracy']['n']} pairs, with a 95 % interval")
    for name, row in results["reward_accuracy"].items():
        if name != "n":
            print(f"{name:12}{row['accuracy']:8.1%}   [{row['low']:.1%}, {row['high']:.1%}]")
    samples = json.loads((run.out / "samples.json").read_text())
    for i in range(min(3, len(samples) // 4)):
        of_prompt = samples[i :: len(samples) // 4]
        print("\n> " + shade([of_prompt[0]["instruction"]], [0.0], colour=False))
        for entry in of_prompt:
            if entry["generator"] != "reverse_dpo":
                print(f"{entry['generator']:>10}: " + shade(entry["tokens"], entry["token_rewards"], sys.stdout.isatty()))
    print(f"\nmodels, metrics, samples and results are in {run.out}")


# ----------------------------------------------------------------------------------------------------------------------
# 11  Files, checks and the command line.
# ----------------------------------------------------------------------------------------------------------------------


def seed_of(*parts) -> int:
    """One number from a seed and what it is used for; the same on every machine."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def data_fingerprint(pairs: list) -> int:
    """One number that changes with any token of any pair."""
    crc = 0
    for pair in pairs:
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            crc = zlib.crc32(ids.tobytes(), zlib.crc32(b"|", crc))
    return crc


def first_line(error: BaseException) -> str:
    """An exception as one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Run:
    """What every stage needs beside the mathematics: settings, tokenizer, device, ranks, limits, bars."""

    def __init__(self, args: Args):
        self.args, self.said = args, set()
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(args.device)
        self.teacher_device = pick_device(args.teacher_device) if args.teacher_device else self.device
        self.bf16 = self.device.type == "cuda" if args.bf16 is None else args.bf16
        self.out = Path(args.output_dir or f"runs/{Path(args.model).name}")

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def say_once(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            self.say(text)

    def bar(self, items, title: str, leave=True, disable=False):
        return tqdm(items, title, leave=leave, disable=disable or self.rank > 0, dynamic_ncols=True)

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def gather(self, mine: list) -> list:
        """Lists of rank 0, 1, ..., dealt out as items[rank::world] → all items in their order, on every rank."""
        if self.world == 1:
            return mine
        parts = [None] * self.world
        dist.all_gather_object(parts, mine)
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]


def pick_device(name: Optional[str]) -> torch.device:
    """The named device, or the best that is there. Raises BadInput for one that is not."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local}" if name == "cuda" else name)
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name} is not there: {first_line(error)}; choose another with --device") from None


def check_hub(name: str, kind: str) -> None:
    """One quick question to the hub, so that a typo or a missing network is said at once and not after many retries."""
    try:
        getattr(huggingface_hub.HfApi(), f"{kind}_info")(name, timeout=8)
    except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.HFValidationError):
        raise BadInput(f"--{kind} {name}: neither a local folder nor on the hub; check the spelling") from None
    except Exception as error:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True  # from here on, only the cache
        tqdm.write(f"the hub does not answer ({first_line(error)}): looking for {name} in the local cache")


def load_pretrained(loader, name: str, **options):
    """loader.from_pretrained with any failure as one line. Never runs code that comes with a checkpoint."""
    try:
        if not os.path.isdir(name) and not huggingface_hub.constants.HF_HUB_OFFLINE:
            check_hub(name, "model")
        return loader.from_pretrained(name, trust_remote_code=False, **options)
    except BadInput:
        raise
    except Exception as error:  # the library raises many types; all mean that this model cannot be had
        hint = "give a local folder, or one that is in the cache" if huggingface_hub.constants.HF_HUB_OFFLINE else "check it"
        raise BadInput(f"model {name} cannot be loaded: {first_line(error)}; {hint}") from error


def load_lm(name: str, run: Run, gradient_checkpointing: bool = False, device=None, dtype=torch.float32) -> LM:
    """A causal LM in `dtype` on `device`, its logits checked against the model's own on a short input."""
    if name == "demo":
        model = demo_model(run.args.seed)
    else:
        model = load_pretrained(AutoModelForCausalLM, name, dtype=torch.float32, use_safetensors=True)
    lm = LM(model, run.args.chunk_size)
    ids = torch.arange(3, 11)[None] % model.config.get_text_config().vocab_size
    batch = Batch(ids, torch.ones_like(ids), torch.arange(8), ids[0], torch.zeros(8).long(), torch.tensor([8]), torch.zeros(1))
    with torch.no_grad():
        ours, own = lm.logits(lm.hidden(batch)), model(input_ids=ids, use_cache=False).logits[0].float()
    if not torch.allclose(ours, own, rtol=1e-4, atol=1e-4 * own.abs().max().item()):
        raise BadInput(f"model {name}: its logits are not head(body(tokens)), so its architecture is not supported")
    lm = LM(model.to(device or run.device, dtype), run.args.chunk_size, run.device)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return lm


def load_frozen(name: str, run: Run) -> LM:
    """A teacher: no gradients, in bfloat16 where the run uses it, on the teachers' device."""
    lm = load_lm(name, run, device=run.teacher_device, dtype=torch.bfloat16 if run.bf16 else torch.float32)
    return lm.requires_grad_(False)


def set_up(args: Args) -> tuple:
    """Check everything that can be checked before training, then open the output folder: (run, training, held-out)."""
    check_settings(args)
    run = Run(args)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if run.world > 1:
        if args.batch_size < run.world:
            raise BadInput(f"--batch_size {args.batch_size} is less than the {run.world} processes: raise it")
        if run.device.type == "cuda":
            torch.cuda.set_device(run.device)
        dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo")
    demo = args.model == "demo"
    run.tokenizer = demo_tokenizer() if demo else load_pretrained(AutoTokenizer, args.model)
    if run.tokenizer.eos_token_id is None:
        raise BadInput(f"model {args.model}: its tokenizer has no end-of-sequence token, so no response could end")
    run.sft = not run.tokenizer.chat_template if args.sft is None else args.sft
    run.stop_ids = list(dict.fromkeys([stop_token(run.tokenizer), run.tokenizer.eos_token_id]))
    run.pad_id = run.tokenizer.eos_token_id if run.tokenizer.pad_token_id is None else run.tokenizer.pad_token_id
    if args.r is None:
        args.r = 20.0 if args.off_policy else 30.0

    config = load_lm(args.model, run).model.config.get_text_config()
    for folder in filter(None, (args.dpo, args.reverse_dpo)):
        other = load_lm(folder, run).model.config.get_text_config().vocab_size
        if other != config.vocab_size:
            raise BadInput(f"teacher {folder} has a vocabulary of {other}, the model one of {config.vocab_size}: they must match")
        if load_pretrained(AutoTokenizer, folder).get_vocab() != run.tokenizer.get_vocab():
            raise BadInput(f"teacher {folder} has another tokenizer than {args.model}: they must match")
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    run.max_length = args.max_length or min(2048, positions)
    if run.max_length < 2048 and args.max_length is None:
        run.say(f"max_length is lowered from 2048 to the model's {positions} positions")
    run.max_prompt_length = args.max_prompt_length or run.max_length // 2
    run.max_new_tokens = run.max_length - run.max_prompt_length
    if run.max_length > positions:
        raise BadInput(f"--max_length {run.max_length} is more than the {positions} positions of {args.model}: lower it")
    if run.max_prompt_length < 1 or run.max_new_tokens < 2:
        raise BadInput(f"--max_length {run.max_length} leaves no room for a response after {run.max_prompt_length} of prompt")
    train_pairs, test_pairs = load_pairs(run)
    open_output(run)
    return run, train_pairs, test_pairs


def open_output(run: Run) -> None:
    """Make the output folder, or go on with the run in it if its settings are the same. Raises BadInput otherwise."""
    config, settings = run.out / "config.json", asdict(run.args)
    try:
        if config.exists() and not run.args.overwrite:
            saved = json.loads(config.read_text())
            differ = [f"{k}: {saved.get(k)} there, {v} now" for k, v in settings.items() if saved.get(k) != v and k not in FREE_SETTINGS]
            if differ:
                raise BadInput(f"{run.out} holds a run with other settings ({'; '.join(differ)}): use --overwrite or another --output_dir")
            return
        run.barrier()
        if run.rank == 0:
            run.out.mkdir(parents=True, exist_ok=True)
            names = "sft dpo reverse_dpo policy checkpoint.pt reference_logps.pt metrics.jsonl results.json samples.json config.json"
            for path in [run.out / name for name in names.split()]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        write_json(run, config, settings)
    except OSError as error:
        raise BadInput(f"output folder {run.out} cannot be written: {error.strerror}; choose another --output_dir") from None


def write_aside(run: Run, path: Path, write: Callable) -> None:
    """write(partial path) on rank 0, then flush and rename, so that a file or folder is there whole or not at all."""
    if run.rank == 0:
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        write(partial)
        for file in partial.rglob("*") if partial.is_dir() else [partial]:
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        os.replace(partial, path)
    run.barrier()


def write_json(run: Run, path: Path, content) -> None:
    write_aside(run, path, lambda partial: partial.write_text(json.dumps(content, indent=1, ensure_ascii=False)))


def save_model(run: Run, model, folder: Path) -> None:
    """A Hugging Face checkpoint with its tokenizer; the stage's own checkpoint is not needed any more."""

    def write(partial):
        model.save_pretrained(partial)
        run.tokenizer.save_pretrained(partial)

    write_aside(run, folder, write)
    if run.rank == 0:
        (run.out / "checkpoint.pt").unlink(missing_ok=True)


def save_checkpoint(run: Run, stage: str, model, optimizer, step: int) -> None:
    """Everything that a stage under way needs to go on at `step`."""
    state = {"stage": stage, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    write_aside(run, run.out / "checkpoint.pt", lambda partial: torch.save(state, partial))


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
    """Peak memory in GB since the start of the process: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class Log:
    """A stage's progress bar and its lines in metrics.jsonl. Values stay on the device until they are read in `flush`."""

    def __init__(self, run: Run, stage: str, batch_size: int, steps: int, first: int):
        self.run, self.stage, self.batch_size, self.path = run, stage, batch_size, run.out / "metrics.jsonl"
        self.waiting, self.began, self.read, self.tokens = [], time.time(), time.time(), 0
        self.bar = run.bar(None, stage)
        self.bar.reset(steps)
        self.bar.update(first)
        if run.rank == 0 and self.path.exists():  # drop what came after the checkpoint: it is done again
            lines = [line for line in self.path.read_text().splitlines(True) if line.endswith("\n")]
            keep = [x for x in lines if (y := json.loads(x))["stage"] != stage or y["step"] <= first]
            write_aside(run, self.path, lambda partial: partial.write_text("".join(keep)))

    def add(self, step: int, sums: dict, grad_norm: Tensor, learning_rate: float, tokens: int) -> None:
        self.waiting.append((step, sums, grad_norm, learning_rate, tokens))

    def flush(self, pairs: list) -> None:
        """Read the waiting steps, write their lines, and stop the run if a loss is not finite."""
        names = list(self.waiting[0][1])
        rows = [torch.stack([*sums.values(), grad_norm / self.run.world * self.batch_size]) for _, sums, grad_norm, *_ in self.waiting]
        tokens = torch.tensor([[float(line[-1])] for line in self.waiting], device=self.run.device)
        values = self.run.total(torch.cat([torch.stack(rows) / self.batch_size, tokens], -1)).tolist()
        speed = sum(row[-1] for row in values) / (time.time() - self.read)
        lines = []
        for (step, _, _, learning_rate, _), (*means, count) in zip(self.waiting, values):
            line = dict(zip([*names, "grad_norm"], means))
            if not all(map(math.isfinite, means)):
                indices = batch_indices(step, len(pairs), self.batch_size, self.run.args.seed)
                records = sorted(pairs[i].record for i in indices)
                raise BadInput(
                    f"{self.stage}: the loss is not finite at step {step + 1} (records {records}); lower the learning rate or "
                    f"look at these records; the last good checkpoint is {self.run.out / 'checkpoint.pt'}"
                )
            line = {"stage": self.stage, "step": step + 1, **line, "learning_rate": learning_rate, "tokens": int(count)}
            lines.append(line | {"tokens_per_s": round(speed), "peak_memory_gb": round(peak_memory(self.run.device), 3)})
        if self.run.rank == 0:
            with open(self.path, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        self.bar.update(len(lines))
        self.bar.set_postfix_str(", ".join(f"{name} {lines[-1][name]:.3g}" for name in names))
        self.tokens += sum(line["tokens"] for line in lines)
        self.waiting, self.read = [], time.time()

    def close(self) -> None:
        self.bar.close()
        speed, memory = self.tokens / (time.time() - self.began), peak_memory(self.run.device)
        self.run.say(f"{self.stage}: {self.tokens:,} tokens, {speed:,.0f} tokens/s, peak memory {memory:.2f} GB")


@contextlib.contextmanager
def stop_on_ctrl_c():
    """Within, the first Ctrl-C only sets `.requested`, so that a step is never left half done; the second one stops."""

    class Stop:
        requested = False

    def handle(*_):
        if Stop.requested:
            raise KeyboardInterrupt
        Stop.requested = True
        tqdm.write("stopping after this step; Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield Stop
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> int:
    """The command line; the exit status is 2 for what cannot be used, 130 after Ctrl-C."""
    try:
        align(parse_args())
        return 0
    except BadInput as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"aligndistil.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("aligndistil.py: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
