"""Tests of aligndistil.py (`pytest`), and its benchmark (`python test_aligndistil.py --help`).

The tests follow the sections of aligndistil.py: the mathematics against independent float64 computations, the chunked
losses against the dense ones, the traps that a token-level implementation can fall into, then data, runs and failures on
the real command line.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

HOME = tempfile.TemporaryDirectory()  # the hub's cache: empty, and gone afterwards
if __name__ != "__main__":  # one thread a process, as several run at once; and no hub is there
    os.environ |= {"HF_HOME": HOME.name, "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}

import nbformat
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import transformers
from nbclient import NotebookClient
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import aligndistil as ad

torch.manual_seed(0)
VOCABULARY = 53


def random_logits(*shape, scale=3.0, dtype=torch.float64):
    return scale * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def tiny_gpt2(seed=0, **options):
    """A random two-layer GPT-2; dropout is left at GPT-2's own 0.1."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, **options)
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tiny_lm(seed=0, chunk_size=5, **options):
    return ad.LM(tiny_gpt2(seed, **options), chunk_size)


def random_responses(sizes, seed=0):
    """[(prompt length, response length), ...] → Responses of random tokens."""
    draw = lambda n: torch.randint(1, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed + n)).tolist()
    return [ad.Response(draw(p), draw(100 + y)[:y]) for p, y in sizes]


SIZES = [(3, 4), (5, 2), (1, 7), (6, 1)]


def tiny_run(**settings):
    """The least that sampling and gradient accumulation need of a Run."""
    run = ad.Run(ad.Args(**{"max_length": 24, "max_prompt_length": 8, "device": "cpu", **settings}))
    run.pad_id, run.stop_ids = 0, [0]
    return run


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        error = (ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


# ----------------------------------------------------------------------------------------------------------------------
# 1  The mathematics
# ----------------------------------------------------------------------------------------------------------------------


def test_dpo_loss_is_the_paper_s_by_hand():
    chosen, rejected, ref_chosen, ref_rejected = -3.0, -4.0, -3.5, -3.0
    margin = 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, ref_chosen, ref_rejected)]
    loss = ad.dpo_loss(*tensors, beta=0.1)
    assert loss.shape == (1,) and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-margin))), abs=1e-12)
    swapped = ad.dpo_loss(tensors[1], tensors[0], tensors[3], tensors[2], beta=0.1)
    assert swapped.item() == pytest.approx(-math.log(1 / (1 + math.exp(margin))), abs=1e-12)


def test_dpo_loss_stays_finite_at_extreme_margins():
    big = torch.tensor([1e6], dtype=torch.float32)
    assert ad.dpo_loss(-big, big, 0 * big, 0 * big, 1.0).isfinite()


def test_implicit_reward():
    assert ad.implicit_reward(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.5]), 0.5).tolist() == [1.0, -0.25]


def test_total_variation_by_loops_and_at_its_ends():
    p, q = random_logits(4, 7), random_logits(4, 7).flip(0)
    for i in range(4):
        zp, zq = sum(math.exp(x) for x in p[i].tolist()), sum(math.exp(x) for x in q[i].tolist())
        by_hand = 0.5 * sum(abs(math.exp(a) / zp - math.exp(b) / zq) for a, b in zip(p[i].tolist(), q[i].tolist()))
        assert ad.total_variation(p, q)[i].item() == pytest.approx(by_hand, abs=1e-12)
    certain = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    assert ad.total_variation(certain[0], certain[1]).item() == pytest.approx(1)
    assert ad.total_variation(p, p + 5).abs().max() < 1e-12  # logits are known up to a constant


def test_adaptive_alpha_is_r_tvd_plus_eps():
    p, q = random_logits(2, 3, 7), random_logits(2, 3, 7).flip(-1)
    assert torch.allclose(ad.adaptive_alpha(p, q, r=8.0), 8 * ad.total_variation(p, q) + 0.001)
    assert torch.allclose(ad.adaptive_alpha(p, p, r=8.0, eps=0.02), torch.full((2, 3), 0.02, dtype=torch.float64))


def test_reverse_kl_by_loops_and_at_extreme_logits():
    p, q = random_logits(3, 7), random_logits(3, 7).flip(-1)
    for i in range(3):
        zp, zq = sum(math.exp(x) for x in p[i].tolist()), sum(math.exp(x) for x in q[i].tolist())
        pairs = [(math.exp(a) / zp, math.exp(b) / zq) for a, b in zip(p[i].tolist(), q[i].tolist())]
        assert ad.reverse_kl(p, q)[i].item() == pytest.approx(sum(a * math.log(a / b) for a, b in pairs), abs=1e-10)
    for dtype in (torch.float32, torch.float64):
        extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
        kl = ad.reverse_kl(extreme, extreme.flip(0))
        kl.sum().backward()
        assert kl.isfinite().all() and (kl > 1e4).all() and extreme.grad.isfinite().all()


def test_gradient_of_reverse_kl_is_the_closed_form():
    """π_θ ⊙ (log π_θ − log π* − KL)."""
    policy, teacher = random_logits(5, 11).requires_grad_(), random_logits(5, 11).flip(0)
    ad.reverse_kl(policy, teacher).sum().backward()
    logp, logq = policy.detach().log_softmax(-1), teacher.log_softmax(-1)
    kl = (logp.exp() * (logp - logq)).sum(-1, keepdim=True)
    assert torch.allclose(policy.grad, logp.exp() * (logp - logq - kl), atol=1e-12)


def test_score_function_is_unbiased():
    """Its gradient, averaged over every possible token with its probability, is that of the whole distribution's KL."""
    policy, teacher = (random_logits(5, 7) for _ in range(2))
    policy.requires_grad_()
    (exact,) = torch.autograd.grad(ad.reverse_kl(policy, teacher).sum(), policy)
    mean = torch.zeros_like(policy)
    for v in range(7):
        token = torch.full((5,), v)
        logps, target = ad.token_logps(policy, token), ad.token_logps(teacher, token)
        (gradient,) = torch.autograd.grad(ad.score_function(logps, logps - target).sum(), policy)
        mean += logps.detach().exp()[:, None] * gradient
    assert torch.allclose(mean, exact, atol=1e-12)


def test_token_logps_and_entropy():
    z, tokens = random_logits(2, 3, 5), torch.tensor([[0, 4, 2], [1, 1, 3]])
    probabilities = z.exp() / z.exp().sum(-1, keepdim=True)
    for b, t in itertools.product(range(2), range(3)):
        p = probabilities[b, t]
        assert ad.token_logps(z, tokens)[b, t].item() == pytest.approx(p[tokens[b, t]].log().item())
        assert ad.entropy(z)[b, t].item() == pytest.approx(-(p * p.log()).sum().item())


def test_the_five_teachers_where_they_must_agree():
    ref, dpo, rev = random_logits(2, 3, 7), random_logits(2, 3, 7).flip(0), random_logits(2, 3, 7).flip(-1)
    same = lambda a, b: torch.allclose(a.softmax(-1), b.softmax(-1), atol=1e-12)
    ratio = 1.7  # β0/β
    assert same(ad.teacher_logits(ref, dpo, ref, ratio), ratio * dpo + (1 - ratio) * ref)  # Eq. 11
    assert same(ad.teacher_logits(dpo, dpo, rev, ratio), (1 + ratio) * dpo - ratio * rev)  # Eq. 15
    assert same(ad.teacher_logits(ref, dpo, ref, 1.0), dpo)  # β = β0: RLHF's optimum is DPO's
    assert same(ad.teacher_logits(dpo, dpo, rev, 0.0), dpo)  # plain distillation
    assert same(ad.teacher_logits(dpo, dpo, ref, ratio), ad.teacher_logits(ref, dpo, ref, 1 + ratio))
    alpha = torch.full((2, 3), ratio, dtype=torch.float64)
    assert same(ad.teacher_logits(dpo, dpo, rev, alpha), ad.teacher_logits(dpo, dpo, rev, ratio))
    adaptive = ad.adaptive_alpha(dpo, rev, r=4.0)
    by_state = torch.stack([dpo[i, j] + adaptive[i, j] * (dpo - rev)[i, j] for i in range(2) for j in range(3)])
    assert same(ad.teacher_logits(dpo, dpo, rev, adaptive).flatten(0, 1), by_state)  # Eq. 17


def test_distillation_loss_by_loops():
    policy, teacher = random_logits(3, 4, 7).requires_grad_(), random_logits(3, 4, 7).flip(0).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]])
    weight = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    kl = ad.reverse_kl(policy, teacher)
    rows = [sum(weight[b, t] * kl[b, t] for t in range(4) if mask[b, t]) / mask[b].sum() for b in range(3)]
    loss = ad.distillation_loss(policy, teacher, weight, mask)
    assert loss.item() == pytest.approx((sum(rows) / 3).item(), abs=1e-12)
    loss.backward()
    assert teacher.grad is None and weight.grad is None, "only the policy is trained"
    assert (policy.grad[mask == 0] == 0).all() and (policy.grad[mask == 1] != 0).any()
    assert ad.distillation_loss(policy, teacher, 2.0, mask.bool()).item() == pytest.approx(
        2 * ad.distillation_loss(policy, teacher, torch.ones(3, 4), mask).item()
    )


def test_theorem_1_by_enumeration():
    """E[r − β·KL] = −β·E[Σ_t KL(π_θ‖π*) − log Z(s_t)] over every response of two tokens from a vocabulary of three."""
    beta0, beta, n = 0.1, 0.04, 3
    root, after = [random_logits(3, n), random_logits(3, n, n)]  # policy, dpo, ref at the empty state; after each token
    left = right = 0.0
    for first, second in itertools.product(range(n), range(n)):
        states = [(root, first), (after[:, first], second)]
        logps = [[z[m].log_softmax(-1) for m in range(3)] for z, _ in states]
        probability = math.prod(logps[t][0][token].exp().item() for t, (_, token) in enumerate(states))
        for (z, token), (theta, dpo, ref) in zip(states, logps):
            left += probability * (beta0 * (dpo - ref) - beta * (theta - ref))[token].item()
            teacher = ad.teacher_logits(z[2], z[1], z[2], beta0 / beta)
            log_z = torch.logsumexp(beta0 / beta * dpo + (1 - beta0 / beta) * ref, -1)
            right += probability * -beta * (ad.reverse_kl(z[0], teacher) - log_z).item()
    assert left == pytest.approx(right, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# 2, 3  The model taken apart: chunked losses against the dense ones, for every kind of output head
# ----------------------------------------------------------------------------------------------------------------------


def untied():
    return tiny_gpt2(tie_word_embeddings=False)


def with_bias():
    torch.manual_seed(0)
    return transformers.PhiForCausalLM(
        transformers.PhiConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
        )
    )


def llama_like(family, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(config)


HEADS = {
    "tied": tiny_gpt2,
    "untied": untied,
    "bias": with_bias,
    "soft-capped": partial(llama_like, "Gemma2", final_logit_softcapping=0.5),
    "multiplied": partial(llama_like, "Cohere", logit_scale=0.3),
    "divided": partial(llama_like, "Granite", logits_scaling=3.0),
}


def dense_logits(lm, batch):
    return lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def response_logps(lm, batch):
    return ad.response_sums(ad.state_logps(lm, batch, lm.hidden(batch)), batch)


def response_mask(batch):
    mask = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
    mask[batch.states] = True
    return mask.view_as(batch.input_ids)


@pytest.mark.parametrize("head", HEADS)
def test_chunks_equal_the_dense_loss_and_gradients(head):
    policy, dpo, rev = (ad.LM(HEADS[head](), chunk_size=5) for _ in range(3))
    for i, lm in enumerate((dpo, rev)):
        for parameter in lm.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    batch = ad.collate([[response] for response in random_responses(SIZES)], pad_id=0)
    mask, everything = response_mask(batch), [dense_logits(lm, batch) for lm in (policy, dpo, rev)]
    shown = dense_logits(policy, batch)[mask]
    assert torch.allclose(policy.logits(policy.hidden(batch)), shown, rtol=1e-5, atol=1e-5), (
        "our head is the model's own"
    )

    alpha_of = partial(ad.adaptive_alpha, r=6.0)
    alpha = alpha_of(everything[1], everything[2])
    teacher = ad.teacher_logits(everything[1], everything[1], everything[2], alpha)
    dense = ad.distillation_loss(everything[0], teacher, 0.1 / alpha, mask)
    dense_gradients = gradients(policy, dense)
    loss, watched = ad.distillation_batch_loss(policy, batch, ad.Teacher(dpo, rev, dpo, alpha_of), 0.1)
    assert (loss / 4).item() == pytest.approx(dense.item(), rel=1e-6)
    assert_same_gradients(gradients(policy, loss / 4), dense_gradients, 1e-6)
    assert all(p.grad is None for lm in (dpo, rev) for p in lm.parameters()), "teachers are not trained"
    mean = lambda values: sum(values[b][mask[b]].mean().item() for b in range(4))
    assert watched["alpha"].item() == pytest.approx(mean(alpha), rel=1e-5)
    assert watched["beta_t"].item() == pytest.approx(mean(0.1 / alpha), rel=1e-5)
    assert watched["kl"].item() == pytest.approx(mean(ad.reverse_kl(everything[0], teacher)), rel=1e-5)

    targets = batch.input_ids.roll(-1, 1)
    ratio = sum(sign * ad.token_logps(z.double(), targets) for sign, z in ((0.1, everything[1]), (-0.1, everything[2])))
    assert watched["reward"].item() == pytest.approx((ratio * mask).sum().item(), rel=1e-5)

    dense_token = ad.token_logps(dense_logits(policy, batch).double(), targets)
    logps = (dense_token * mask).sum(-1)
    nll = (-(dense_token * mask).sum(-1) / mask.sum(-1)).sum()
    assert torch.allclose(response_logps(policy, batch).double(), logps.detach(), rtol=1e-6)
    dense_gradients = gradients(policy, nll)
    loss, _ = ad.sft_batch_loss(policy, batch)
    assert loss.item() == pytest.approx(nll.item(), rel=1e-6)
    assert_same_gradients(gradients(policy, loss), dense_gradients, 1e-6)

    batch.ref_logps = torch.tensor([-20.0, -9.0, -30.0, -5.0])
    logps = (ad.token_logps(dense_logits(policy, batch), targets) * mask).sum(-1)
    losses = ad.dpo_loss(*logps.chunk(2), *batch.ref_logps.chunk(2), beta=0.1)
    dense_gradients = gradients(policy, losses.sum())
    loss, watched = ad.dpo_batch_loss(policy, batch, beta=0.1)
    assert loss.item() == pytest.approx(losses.sum().item(), rel=1e-6)
    assert_same_gradients(gradients(policy, loss), dense_gradients, 1e-6)
    margins = 0.1 * ((logps - batch.ref_logps).chunk(2)[0] - (logps - batch.ref_logps).chunk(2)[1])
    assert watched["margin"].item() == pytest.approx(margins.sum().item(), rel=1e-4)
    assert watched["accuracy"].item() == (margins > 0).sum().item()
    batch.ref_logps = response_logps(policy, batch)
    assert ad.dpo_batch_loss(policy, batch, beta=0.1)[1]["accuracy"].item() == 0, "a tie is no preference"


@pytest.mark.parametrize("signal", ["token", "sequence"])
def test_scalar_signals_equal_the_dense_score_function(signal):
    """The gradient of Σ_t k_t·log π_θ(y_t)/|y|, or of Σ_t (Σ k)·log π_θ(y_t)/|y|; what is watched stays the same."""
    policy, dpo, rev = (tiny_lm(seed) for seed in range(3))
    batch = ad.collate([[response] for response in random_responses(SIZES)], pad_id=0)
    teacher = ad.Teacher(dpo, rev, dpo, partial(ad.adaptive_alpha, r=6.0))
    mask, (p, d, v) = response_mask(batch), [dense_logits(lm, batch) for lm in (policy, dpo, rev)]
    alpha = ad.adaptive_alpha(d, v, 6.0)
    targets = batch.input_ids.roll(-1, 1)
    logps = ad.token_logps(p, targets)
    k = (0.1 / alpha * (logps - ad.token_logps(ad.teacher_logits(d, d, v, alpha), targets)) * mask).detach()
    k = k if signal == "token" else k.sum(-1, keepdim=True)
    expected = gradients(policy, ((k * logps * mask).sum(-1) / mask.sum(-1)).sum())
    loss, watched = ad.distillation_batch_loss(policy, batch, teacher, 0.1, signal)
    assert_same_gradients(gradients(policy, loss), expected, 1e-5)
    _, same = ad.distillation_batch_loss(policy, batch, teacher, 0.1)
    for name, value in same.items():
        assert watched[name].item() == pytest.approx(value.item(), rel=1e-6), name


def test_the_two_rewards_and_constant_alpha_pick_the_right_teacher():
    """Wrong model as anchor or base, weight dropped, α = 0 with an infinite weight: each changes one of these numbers."""
    policy, dpo, base = (tiny_lm(seed) for seed in range(3))
    batch = ad.collate([[response] for response in random_responses(SIZES)], pad_id=0)
    mask, (p, d, b) = response_mask(batch), [dense_logits(lm, batch) for lm in (policy, dpo, base)]
    for reward, anchor, alpha in [("contrastive", d, 2.0), ("vanilla", b, 2.0), ("contrastive", d, 0.0)]:
        args = ad.Args(reward=reward, alpha=str(alpha))
        lms = {"dpo": dpo, "reverse_dpo": base, "reference": base}
        loss, watched = ad.distillation_batch_loss(policy, batch, ad.make_teacher(args, lms.get), beta=0.1)
        weight = 0.1 / alpha if alpha else 1.0
        dense = ad.distillation_loss(p, anchor + alpha * (d - b), weight, mask)
        assert (loss / 4).item() == pytest.approx(dense.item(), rel=1e-5)
        assert watched["beta_t"].item() / 4 == pytest.approx(weight)


def test_no_logits_of_a_whole_batch(monkeypatch):
    """The output head never sees more than one chunk of states, nor a prompt or pad position."""
    policy, dpo, base = (tiny_lm(seed) for seed in range(3))
    batch, seen = ad.collate([[response] for response in random_responses(SIZES)], pad_id=0), []
    monkeypatch.setattr(
        ad.LM, "logits", lambda lm, hidden, own=ad.LM.logits: (seen.append(len(hidden)), own(lm, hidden))[1]
    )
    ad.distillation_batch_loss(policy, batch, ad.Teacher(dpo, base, dpo, partial(ad.adaptive_alpha, r=6.0)), 0.1)
    assert max(seen) == 5 and sum(seen) == 3 * sum(y for _, y in SIZES)


def test_micro_batches_leave_loss_and_gradient_unchanged():
    policy, dpo, base = (tiny_lm(seed) for seed in range(3))
    responses = random_responses([(3, 4), (5, 2), (1, 7), (6, 1), (2, 2), (4, 9)])
    for response in responses:
        response.ref_logps = -3.0 * len(response.tokens)
    alpha_of = partial(ad.adaptive_alpha, r=6.0)
    losses = {
        "sft": (ad.sft_batch_loss, [[response] for response in responses]),
        "dpo": (partial(ad.dpo_batch_loss, beta=0.1), list(zip(responses[:3], responses[3:]))),
        "distillation": (
            partial(ad.distillation_batch_loss, teacher=ad.Teacher(dpo, base, dpo, alpha_of), beta=0.1),
            [[response] for response in responses],
        ),
    }
    for name, (loss_of, examples) in losses.items():
        results = []
        for tokens in (10**6, 16, 1):
            policy.zero_grad()
            sums = ad.accumulate_gradient(
                policy, examples, loss_of, len(examples), tiny_run(tokens_per_micro_batch=tokens)
            )
            results.append((sums["loss"].item(), {n: p.grad.clone() for n, p in policy.named_parameters()}))
        for loss, grads in results[1:]:
            assert loss == pytest.approx(results[0][0], rel=1e-5), name
            assert_same_gradients(grads, results[0][1], 1e-5)


def test_micro_batches_are_sorted_and_hold_every_example_once():
    examples = [[ad.Response([1] * p, [1] * y)] for p, y in [(1, 1), (9, 9), (3, 4), (2, 2), (30, 30), (5, 5)]]
    groups = ad.micro_batches(examples, tokens=20)
    assert sorted(itertools.chain(*groups)) == list(range(6))
    assert groups == [[4], [1], [5, 2], [3, 0]]
    assert all(len(group) == 1 or len(group) * max(len(examples[i][0]) for i in group) <= 20 for group in groups)


def test_gradient_checkpointing_and_autocast_keep_the_loss_and_turn_no_dropout_on():
    responses = [[response] for response in random_responses(SIZES)]
    plain = tiny_lm()
    checkpointed = ad.LM(tiny_gpt2(), 5, gradient_checkpointing=True)
    batch = ad.collate(responses, pad_id=0)
    results = [ad.sft_batch_loss(lm, batch)[0] for lm in (plain, checkpointed)]
    assert torch.equal(*results)
    assert_same_gradients(gradients(checkpointed, results[1]), gradients(plain, results[0]), 1e-6)
    assert not checkpointed.checkpointed[0].training, "sampling needs the KV cache"
    opt = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2, dropout=0.5
    )
    lm = ad.LM(transformers.OPTForCausalLM(opt), 5, gradient_checkpointing=True)
    assert torch.equal(ad.sft_batch_loss(lm, batch)[0], ad.sft_batch_loss(lm, batch)[0])
    run = tiny_run(bf16=True)
    plain.zero_grad()
    sums = ad.accumulate_gradient(plain, responses, ad.sft_batch_loss, 4, run)
    assert sums["loss"].item() == pytest.approx(results[0].item(), rel=0.05) and sums["loss"].dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in plain.parameters())


def test_a_teacher_on_another_device_gives_the_same_numbers():
    """The head is copied to `head_device`; the 'meta' device stands for a second one, which this machine may not have."""
    model = tiny_gpt2()
    elsewhere = ad.LM(model, head_device=torch.device("meta"))
    assert elsewhere.head.weight.device.type == "meta" and model.lm_head.weight.device.type == "cpu"
    batch = ad.collate([[response] for response in random_responses(SIZES)], pad_id=0)
    assert elsewhere.hidden(batch).device.type == "meta"
    copied = ad.LM(model)
    copied.head = copy.deepcopy(copied.head)  # what another device would hold
    assert torch.equal(copied.logits(copied.hidden(batch)), tiny_lm().logits(tiny_lm().hidden(batch)))


# ----------------------------------------------------------------------------------------------------------------------
# The traps
# ----------------------------------------------------------------------------------------------------------------------


def test_states_are_the_ones_that_predict_the_response():
    """Shift by one: |y| states, from the last prompt position to the last but one of the response."""
    batch = ad.collate([[ad.Response([7, 8, 9], [4, 5])], [ad.Response([6], [1, 2, 3])]], pad_id=0)
    assert batch.input_ids.tolist() == [[7, 8, 9, 4, 5], [6, 1, 2, 3, 0]]
    assert batch.states.tolist() == [2, 3, 5, 6, 7] and batch.targets.tolist() == [4, 5, 1, 2, 3]
    assert batch.row.tolist() == [0, 0, 1, 1, 1] and batch.lengths.tolist() == [2, 3]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_a_pad_id_that_is_the_end_token_hides_nothing():
    """The end token at a response's end is trained on although padding has the same id."""
    end = 9
    responses = [[ad.Response([1, end, 2], [3, end])], [ad.Response([4], [5, 6, 7, 8, end])]]
    lm = tiny_lm()
    padded = response_logps(lm, ad.collate(responses, pad_id=end))
    alone = torch.cat([response_logps(lm, ad.collate([response], pad_id=0)) for response in responses])
    assert torch.allclose(padded, alone, rtol=1e-5)
    assert ad.collate(responses, pad_id=end).targets.tolist().count(end) == 2


def test_sampling_pads_on_the_left_without_a_trace(monkeypatch):
    """Each sampled token's distribution is the one of the unpadded prompt."""
    lm, run, seen = tiny_lm(), tiny_run(), []
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    pick = lambda probabilities, num_samples: (seen.append(probabilities), probabilities.argmax(-1, keepdim=True))[1]
    monkeypatch.setattr(torch, "multinomial", pick)
    outputs = ad.sample(lm, prompts, run)
    order = sorted(range(3), key=lambda i: len(prompts[i]))
    for row, i in enumerate(order):
        ids = list(prompts[i])
        for t, token in enumerate(outputs[i]):
            with torch.no_grad():
                alone = lm.model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
            assert torch.allclose(seen[t][row], alone, atol=1e-5)
            ids.append(token)


def test_sampling_ignores_the_checkpoint_s_generation_config():
    """top_k = 1, a repetition penalty and the like must not bend π_θ."""
    lm, run = tiny_lm(), tiny_run(sampling_batch_size=4000, max_length=9, max_prompt_length=8)
    own = transformers.GenerationConfig(
        do_sample=False, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=50.0, no_repeat_ngram_size=1,
        min_new_tokens=1, suppress_tokens=[3], bad_words_ids=[[4]],
    )  # fmt: skip
    lm.model.generation_config = own
    torch.manual_seed(0)
    prompt = [5, 6, 7]
    tokens = torch.tensor([y[0] for y in ad.sample(lm, [prompt] * 4000, run)])
    assert lm.model.generation_config is own, "a saved policy keeps the checkpoint's config"
    with torch.no_grad():
        p = lm.model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    share = torch.bincount(tokens, minlength=VOCABULARY) / 4000
    assert (share - p).abs().max() < 4 * 0.5 / math.sqrt(4000), "frequencies are the model's probabilities"


def test_a_sampled_response_keeps_its_end_and_a_cut_one_has_none():
    run = tiny_run(max_length=14, max_prompt_length=8)
    run.stop_ids, run.pad_id = [3, 4], 3
    torch.manual_seed(0)
    outputs = ad.sample(tiny_lm(), [[5, 6]] * 200, run)
    ended = [y for y in outputs if y[-1] in (3, 4)]
    cut = [y for y in outputs if y[-1] not in (3, 4)]
    assert ended and cut and all(len(y) == 6 for y in cut)
    assert {y[-1] for y in ended} == {3, 4} and not any(token in (3, 4) for y in outputs for token in y[:-1])


def test_dropout_is_off():
    lm = tiny_lm(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    batch = ad.collate([[response] for response in random_responses(SIZES)], pad_id=0)
    assert torch.equal(ad.sft_batch_loss(lm, batch)[0], ad.sft_batch_loss(lm, batch)[0])


def test_weights_move_at_a_learning_rate_of_1e_6(tmp_path):
    """A checkpoint stored in bfloat16 is trained in float32: in bfloat16 a step of 1e-6 is lost in rounding."""
    tiny_gpt2().to(torch.bfloat16).save_pretrained(tmp_path)
    lm = ad.load_lm(str(tmp_path), tiny_run())
    before = copy.deepcopy(lm.model.state_dict())
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-6, weight_decay=0, fused=True)
    ad.accumulate_gradient(lm, [[response] for response in random_responses(SIZES)], ad.sft_batch_loss, 4, tiny_run())
    optimizer.step()
    moved = [(before[name] != p).float().mean().item() for name, p in lm.model.named_parameters() if "wte" not in name]
    assert all(p.dtype == torch.float32 for p in lm.parameters()) and max(moved) > 0.9


def test_an_unsupported_architecture_is_refused(monkeypatch, tmp_path):
    """Logits that are not head(body(tokens)) stop at start-up instead of training on wrong numbers."""
    tiny_gpt2().save_pretrained(tmp_path)
    own = transformers.GPT2LMHeadModel.forward

    def doubled(self, *args, **options):
        output = own(self, *args, **options)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", doubled)
    with pytest.raises(ad.BadInput, match="not supported"):
        ad.load_lm(str(tmp_path), tiny_run())


def test_batches_walk_through_every_record_once_an_epoch():
    steps = [ad.batch_indices(step, 10, 4, seed=1) for step in range(5)]
    walk = list(itertools.chain(*steps))
    assert sorted(walk[:10]) == sorted(walk[10:]) == list(range(10)) and walk[:10] != walk[10:]
    assert walk[:4] != ad.batch_indices(0, 10, 4, seed=2)


# ----------------------------------------------------------------------------------------------------------------------
# 9, 10  The demo world and the evaluation
# ----------------------------------------------------------------------------------------------------------------------


def test_true_rewards_depend_on_context():
    reward = lambda text: ad.true_token_rewards(text.split())
    assert reward("the bed was superb") == [0, 0, 0, 2]
    assert reward("the bed was very superb") == [0, 0, 0, 0, 3]
    assert reward("it was not superb") == [0, 0, 0, -1]
    assert reward("it was not very awful") == [0, 0, 0, 0, 1.5]
    assert reward("superb superb was very very good") == [-1, -1, 0, 0, 0, -1]
    assert ad.true_reward("the bed was superb and the bed was bad") == 0.5
    assert ad.true_reward("the bed was superb " * 5) == ad.true_reward("the bed was superb"), "length earns nothing"
    assert ad.true_reward("the bed") == 0


def test_demo_records_are_mixed_noisy_and_seeded():
    records = ad.demo_records(400, seed=3)
    assert records == ad.demo_records(400, seed=3) != ad.demo_records(400, seed=4)
    unknown = {word for record in records for text in record.values() for word in text.split()} - set(ad.DEMO_WORDS)
    assert not unknown
    for record in records:
        rewards = ad.true_token_rewards(record["chosen"].split())
        assert min(rewards) < 0 < max(rewards)
    agree = sum(ad.true_reward(r["chosen"]) > ad.true_reward(r["rejected"]) for r in records) / 400
    assert 0.7 < agree < 0.95, "labels follow the true reward, with noise"
    assert ad.demo_model(0).num_parameters() < 150_000


def test_wilson_interval():
    row = ad.accuracy_interval(torch.tensor([1.0] * 8 + [-1.0] * 2))
    assert (row["accuracy"], row["low"], row["high"]) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert ad.accuracy_interval(torch.tensor([0.0, 0.0]))["accuracy"] == 0, "a tie is no preference"


def test_token_agreement_against_pandas_and_by_counting():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(-2, 3, (200,), generator=generator) / 2
    rewards = (truth + 2 * torch.randn(200, generator=generator)).round(decimals=1)  # with ties
    found = ad.token_agreement(rewards, truth)
    table = pd.DataFrame({"rewards": rewards, "truth": truth})
    assert found["rank_correlation"] == pytest.approx(table.corr("spearman").iloc[0, 1], abs=1e-6)
    good, bad = rewards[truth > 0], rewards[truth < 0]
    wins = (good[:, None] > bad).float() + 0.5 * (good[:, None] == bad)
    assert found["auc"] == pytest.approx(wins.mean().item(), abs=1e-6)


def test_explain_against_dense_logits():
    lms = {name: tiny_lm(seed) for seed, name in enumerate(("reference", "dpo", "reverse_dpo", "policy"))}
    run = tiny_run(beta=0.3, r=2.0)
    run.tokenizer = ad.demo_tokenizer()
    response = random_responses([(3, 4)])[0]
    states = ad.explain(run, lms, response)
    batch = ad.collate([[response]], 0)
    z = {name: dense_logits(lm, batch)[0, 2:6].detach() for name, lm in lms.items()}
    alpha = ad.adaptive_alpha(z["dpo"], z["reverse_dpo"], 2.0)
    z["teacher"] = ad.teacher_logits(z["dpo"], z["dpo"], z["reverse_dpo"], alpha)
    for t, state in enumerate(states):
        assert state["alpha"] == pytest.approx(alpha[t].item(), rel=1e-4)
        assert state["beta_t"] == pytest.approx(0.3 / alpha[t].item(), rel=1e-4)
        p = {name: logits[t].softmax(-1) for name, logits in z.items()}
        y = response.tokens[t]
        assert state["p"] == pytest.approx({name: x[y].item() for name, x in p.items()}, rel=1e-3)
        assert state["reward"] == pytest.approx(0.3 * (p["dpo"][y] / p["reverse_dpo"][y]).log().item(), abs=1e-4)
        assert [chance for _, chance in state["top"]] == pytest.approx(p["teacher"].sort().values[-5:].flip(0).tolist())
        assert state["top"][0][0] == run.tokenizer.decode([p["teacher"].argmax().item()])


def test_html_is_escaped_and_shaded():
    shown = ad.shade_html(["<b>", "a\x1b"], [0.5, -1.0], ["<i>note", "second"], [2.0, 0.0])
    assert "&lt;b&gt;" in shown and "&lt;i&gt;note" in shown and "<b>" not in shown and "\x1b" not in shown
    assert "rgba(46,160,67,0.50)" in shown and "rgba(218,54,51,1.00)" in shown and "<sub>+2</sub>" in shown


def test_scores_of_samples_by_hand():
    """r_ctr, KL from π_ref and entropy of a model's own responses, against dense float64 logits."""
    lms = {name: tiny_lm(seed) for seed, name in enumerate(("reference", "dpo", "reverse_dpo", "policy"))}
    run = tiny_run(dataset="other", beta=0.3)
    run.tokenizer = ad.demo_tokenizer()
    pairs = [ad.Pair(response, response, i, f"prompt {i}") for i, response in enumerate(random_responses(SIZES))]
    with torch.no_grad():
        rows = ad.sample_and_score(run, "policy", lms, pairs)
        torch.manual_seed(ad.seed_of(0, "evaluation", 0))
        outputs = ad.sample(lms["policy"], [pair.chosen.prompt for pair in pairs], run)
    for row, y, pair in zip(rows, outputs, pairs):
        ids = torch.tensor([[*pair.chosen.prompt, *y]])
        with torch.no_grad():
            z = {
                n: lm.model(input_ids=ids).logits[0, len(pair.chosen.prompt) - 1 : -1].double() for n, lm in lms.items()
            }
        logp = {name: logits.log_softmax(-1) for name, logits in z.items()}
        reward = 0.3 * (logp["dpo"] - logp["reverse_dpo"])[range(len(y)), y]
        kl = (logp["policy"].exp() * (logp["policy"] - logp["reference"])).sum()
        entropy = -(logp["policy"].exp() * logp["policy"]).sum(-1).mean()
        assert row["token_rewards"] == pytest.approx(reward.tolist(), abs=1e-4)
        assert (row["reward"], row["kl"], row["entropy"]) == pytest.approx(
            (reward.sum().item(), kl.item(), entropy.item()), rel=1e-4, abs=1e-4
        )
        assert (row["length"], row["generator"], row["instruction"]) == (len(y), "policy", pair.instruction)


def test_terminal_colours_escape_control_characters():
    assert ad.shade(["a\x1b[2J", "\n"], [1.0, -1.0], colour=False) == "a\\x1b[2J\\n"
    coloured = ad.shade(["good", "bad"], [1.0, -0.1], colour=True)
    assert "\x1b[30;48;5;46mgood\x1b[0m" in coloured and "\x1b[30;48;5;224mbad\x1b[0m" in coloured


# ----------------------------------------------------------------------------------------------------------------------
# 8, 11  The command line from outside: data formats, bad input, kills and going on, several processes
# ----------------------------------------------------------------------------------------------------------------------

FORK = torch.multiprocessing.get_context("forkserver")  # real processes, which need not import torch each
FORK.set_forkserver_preload(["aligndistil"])
SMALL = {"device": "cpu", "max_steps": 3, "limit": 64, "eval_pairs": 20, "eval_prompts": 8, "batch_size": 16}
STAGES = ("sft", "dpo", "reverse_dpo", "policy")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENGLISH = "The sky is blue because the air scatters light. What is the colour of the sea? Green, and deep, at times."
LATIN = "Gallia est omnis divisa in partes tres, quarum unam incolunt Belgae, aliam Aquitani, tertiam Celtae vocantur."


def flags(**settings) -> list:
    """Settings as a command line."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value)) if text != "True"]


def command(*arguments, **settings) -> list:
    return [sys.executable, ad.__file__, *arguments, *flags(**settings)]


def save_tiny_model(folder: Path, text=ENGLISH, vocabulary=320, template=None) -> Path:
    """A random two-layer GPT-2 with a byte-level BPE tokenizer trained on `text`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<eos>", "<turn>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    assert tokenizer.get_vocab_size() == vocabulary
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 128}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


def write(path: Path, records: list) -> Path:
    """Records as a file of the kind that its name says."""
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    {
        ".jsonl": lambda: path.write_text(lines),
        ".json": lambda: path.write_text(json.dumps(records)),
        ".csv": lambda: pd.DataFrame(records).to_csv(path, index=False),
        ".parquet": lambda: pd.DataFrame(records).to_parquet(path),
    }[path.suffix]()
    return path


def numbered(n: int) -> list:
    """n records that differ from each other."""
    return [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"Not {i}."} for i in range(n)]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model without a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A model with a chat template, in which <turn> ends a turn and <eos> a text."""
    return save_tiny_model(tmp_path_factory.mktemp("chat"), template=TEMPLATE)


@pytest.fixture
def load(base, tmp_path):
    """load(dataset, ...) → (run, training pairs, held-out pairs); a list of records is written to a file first."""

    def load(dataset, model=base, **settings):
        if isinstance(dataset, list):
            dataset = write(tmp_path / "data.jsonl", dataset)
        out = tempfile.mkdtemp(dir=tmp_path)
        return ad.set_up(ad.Args(model=str(model), dataset=str(dataset), output_dir=out, device="cpu", **settings))

    return load


def in_order(train_pairs: list, test_pairs: list) -> list:
    return sorted(train_pairs + test_pairs, key=lambda pair: pair.record)


def ids(pairs: list) -> list:
    return [(*pair.chosen.prompt, -1, *pair.chosen.tokens, -1, *pair.rejected.tokens) for pair in pairs]


def texts(run, pair) -> tuple:
    """The prompt, the chosen and the rejected response of a pair, decoded."""
    return tuple(map(run.tokenizer.decode, (pair.chosen.prompt, pair.chosen.tokens, pair.rejected.tokens)))


# ----------------------------------------------------------------------------------------------------------------------
# Data formats
# ----------------------------------------------------------------------------------------------------------------------

TALK = [user("Hi"), assistant("Hello"), user("Sky?")]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Sky?", "chosen": "Blue", "rejected": "Red"}, ("Sky?", "Blue", "Red")),
        ({"prompt": "", "chosen": "the sky", "rejected": "the sea"}, ("", "the sky", "the sea")),
        ({"chosen": "The sky is blue", "rejected": "The sky is black"}, ("The sky is", " blue", " black")),
        ({"chosen": "The sky is blue", "rejected": "The sky is"}, ("The sky is", " blue", "")),
        ({"chosen": "The sky is blue", "rejected": "The sky is bl"}, ("The sky is", " blue", " bl")),
        ({"chosen": "Blue", "rejected": "Black"}, ("", "Blue", "Black")),
        ({"prompt": TALK, "chosen": [assistant("Blue")], "rejected": [assistant("Red")]}, (TALK, "Blue", "Red")),
        (
            {"prompt": TALK, "chosen": [*TALK, assistant("Blue")], "rejected": [*TALK, assistant("Red")]},
            (TALK, "Blue", "Red"),
        ),
        ({"chosen": [*TALK, assistant("Blue")], "rejected": [*TALK, assistant("Red")]}, (TALK, "Blue", "Red")),
        (
            {"prompt": "S", "chosen": [user("S"), assistant("Blue")], "rejected": [user("S"), assistant("Red")]},
            ([user("S")], "Blue", "Red"),
        ),
        (
            {"prompt": "Sky?", "chosen": [assistant("Blue")], "rejected": [assistant("Red")]},
            ([user("Sky?")], "Blue", "Red"),
        ),
    ],
)
def test_record_of_every_format(record, expected):
    """Notices a format that is taken apart wrongly: implicit prompts, repeated ones, conversations, UltraFeedback's."""
    assert ad.split_record(record) == expected


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"prompt": "Sky?", "chosen": "Blue"}, "'rejected' is missing"),
        ({"prompt": "Sky?", "rejected": "Blue"}, "'chosen' is missing"),
        ({"prompt": "Sky?", "chosen": 3, "rejected": "Red"}, "'chosen' is int"),
        ({"prompt": {"text": "Sky?"}, "chosen": "Blue", "rejected": "Red"}, "'prompt' is dict"),
        ({"prompt": "Sky?", "chosen": [assistant("Blue")], "rejected": "Red"}, "the other a conversation"),
        ({"prompt": "Sky?", "chosen": ["Blue"], "rejected": ["Red"]}, "'chosen' holds a message"),
        ({"chosen": [{"role": "user"}], "rejected": [user("Sky?")]}, "'chosen' holds a message"),
        ({"prompt": [{"content": "Sky?"}], "chosen": [user("a")], "rejected": [user("b")]}, "'prompt' holds a message"),
        ({"chosen": [], "rejected": []}, "without messages"),
        ({"chosen": [user("a"), assistant("c")], "rejected": [user("b"), assistant("c")]}, "before their last message"),
    ],
)
def test_malformed_record(record, complaint):
    """Notices a record of no format that is taken for one, or a complaint about another field."""
    with pytest.raises(ValueError, match=complaint):
        ad.split_record(record)


ODD = [
    {"prompt": "Say it, with\r\ntwo lines.", "chosen": "One 😀👩‍🚀.\r\nTwo.", "rejected": "שלום, עולם"},
    {"prompt": "ما لون السماء؟", "chosen": "أزرق", "rejected": "naïve “quotes”, commas\tand tabs"},
    {"prompt": "What is the sky?", "chosen": " blue", "rejected": "Red\n"},
]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_same_tokens_from_every_file(load, tmp_path, ending):
    """Notices a file format that loses or changes a letter: emoji, right-to-left text, line ends, outer spaces."""
    run, *pairs = load(write(tmp_path / f"odd{ending}", ODD))
    for record, pair in zip(ODD, in_order(*pairs), strict=True):
        prompt, chosen, rejected = texts(run, pair)
        assert prompt.removesuffix("\n") == record["prompt"] and pair.instruction == record["prompt"]
        assert (chosen, rejected) == (record["chosen"] + "<eos>", record["rejected"] + "<eos>")


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_empty_prompt(load, tmp_path, ending):
    """Notices an empty prompt that is taken for none, or that leaves no state to predict the first token from."""
    records = [{"prompt": "", "chosen": "the sky", "rejected": "the sea"}, *numbered(2)]
    run, *pairs = load(write(tmp_path / f"empty{ending}", records))
    assert texts(run, in_order(*pairs)[0]) == ("<eos>", "the sky<eos>", "the sea<eos>")


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_words_that_look_like_nothing(load, tmp_path, ending):
    """Notices a reader that takes the words "NA" or "null" for a missing value, or a number's digits for a number."""
    records = [
        {"prompt": "Is it?", "chosen": "NA", "rejected": "null"},
        {"prompt": "How many?", "chosen": "None", "rejected": "1.50"},
    ]
    run, *pairs = load(write(tmp_path / f"nothing{ending}", records))
    found = [(pair.instruction, *texts(run, pair)[1:]) for pair in in_order(*pairs)]
    assert found == [(r["prompt"], r["chosen"] + "<eos>", r["rejected"] + "<eos>") for r in records]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_windows_file(load, tmp_path, ending):
    """Notices a byte-order mark or a Windows line end of the file that gets into the text, or stops the loading."""
    path = write(tmp_path / f"windows{ending}", numbered(3))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    run, *pairs = load(path)
    assert [texts(run, pair)[1] for pair in in_order(*pairs)] == ["It is 0.<eos>", "It is 1.<eos>", "It is 2.<eos>"]


def test_length_limits(load, capsys):
    """Notices an end token after a cut response, or none after a whole one, and a prompt cut from the wrong side."""
    long = {"prompt": "Z" * 50 + "WXY", "chosen": "Z" * 50, "rejected": "XYZ"}  # each letter is a token
    run, *pairs = load([long, *numbered(2)], max_length=16, max_prompt_length=8)
    assert texts(run, in_order(*pairs)[0]) == ("ZZZZWXY\n", "ZZZZZZZZ", "XYZ<eos>")
    assert all(len(r) <= 16 and len(r.prompt) <= 8 for pair in in_order(*pairs) for r in (pair.chosen, pair.rejected))
    assert re.search(r"cut [1-9]\d* prompts and [1-9]\d* responses", capsys.readouterr().out)


def test_line_of_a_fault_in_json(tmp_path):
    """Notices a wrong line number, in a file of one value as in one of a value a line."""
    for name, content, line in (
        ("a.json", b'[{"chosen": "a",\n "rejected": "b"},\n "\xff"]', 3),
        ("a.jsonl", b'{"chosen": "a"}\n\n{"chosen": "\xff"}', 3),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ad.BadInput, match=rf"{name}, line {line}: not UTF-8"):
            ad.check_json(str(tmp_path / name))


def test_useless_pairs_are_left_out_aloud(load, capsys):
    """Notices empty or identical responses that are trained on, or left out in silence."""
    empty, same = {"prompt": "a", "chosen": " ", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "b"}
    same_when_cut = {"prompt": "a", "chosen": "b" * 99 + "c", "rejected": "b" * 99 + "d"}
    _, *pairs = load([empty, *numbered(20), same, same_when_cut], max_length=64)
    assert {pair.record for pair in in_order(*pairs)} == set(range(1, 21))
    counts = re.findall(r"left out (\d+) with an empty and (\d+) with identical", capsys.readouterr().out)
    assert [sum(map(int, column)) for column in zip(*counts)] == [1, 2]


def test_chat_template(load, chat):
    """Notices a chat template that is not used, or responses that do not end as its turns do."""
    talk = {"chosen": [*TALK, assistant("Blue")], "rejected": [*TALK, assistant("Red")]}
    run, *pairs = load([talk, {"prompt": TALK, "chosen": [assistant("a")], "rejected": [assistant("b")]}], model=chat)
    first, second = in_order(*pairs)
    expected = "<user>Hi<turn>\n<assistant>Hello<turn>\n<user>Sky?<turn>\n<assistant>"
    assert texts(run, first) == (expected, "Blue<turn>", "Red<turn>")
    assert texts(run, second) == (expected, "a<turn>", "b<turn>")
    assert run.stop_ids == run.tokenizer.convert_tokens_to_ids(["<turn>", "<eos>"])
    run, *pairs = load(numbered(2), model=chat)
    assert texts(run, in_order(*pairs)[0])[0] == "<user>What is 0?<turn>\n<assistant>"


def test_template_that_refuses(load, tmp_path):
    """Notices a traceback where the model's own template raises, as Gemma's does for a system message."""
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    talk = [{"role": "system", "content": "Be brief."}, user("Sky?")]
    records = [{"prompt": talk, "chosen": [assistant("Blue")], "rejected": [assistant("Red")]}] * 2
    with pytest.raises(ad.BadInput, match="no system role"):
        load(records, model=save_tiny_model(tmp_path / "strict", template=strict))


def test_plain_template_is_announced(load, capsys):
    """Notices a base model that is given conversations without a word."""
    run, *pairs = load([{"chosen": [*TALK, assistant("Blue")], "rejected": [*TALK, assistant("Red")]}] * 2)
    assert texts(run, pairs[0][0])[0] == "User:\nHi\n\nAssistant:\nHello\n\nUser:\nSky?\n\nAssistant:\n"
    assert "the plain template is used" in capsys.readouterr().out


def test_held_out_part(load):
    """Notices a held-out part that leaks into training, or that does not follow the seed."""
    parts = []
    for seed in (0, 0, 1):
        _, train, test = load(numbered(40), seed=seed)
        parts.append([{pair.record for pair in part} for part in (train, test)])
    for train, test in parts:
        assert len(test) == 4 and train == set(range(40)) - test
    assert parts[0] == parts[1] != parts[2]


def test_test_split_of_a_folder(load, tmp_path):
    """Notices a test split that is there and not used."""
    folder = tmp_path / "splits"
    folder.mkdir()
    write(folder / "train.jsonl", numbered(5)), write(folder / "test.jsonl", numbered(9)[5:])
    _, train, test = load(folder)
    assert [pair.instruction for pair in train] == [f"What is {i}?" for i in range(5)]
    assert [pair.instruction for pair in test] == [f"What is {i}?" for i in range(5, 9)]


# ----------------------------------------------------------------------------------------------------------------------
# Bad input on the command line
# ----------------------------------------------------------------------------------------------------------------------

BAD = {  # what is wrong: (flags, where {} is a folder of prepared files; what the error line must say)
    "no such model": ("--model {}/nowhere", r"nowhere.*neither a local folder nor on the hub"),
    "no such dataset": ("--dataset {}/nowhere.jsonl", r"nowhere\.jsonl: no such file"),
    "model of an unreachable hub": ("--model gpt2", r"model gpt2 .*hub is out of reach"),
    "dataset of an unreachable hub": ("--dataset some/pairs", r"some/pairs .*hub is out of reach"),
    "model of a silent hub": ("--model gpt2", r"model gpt2 .*hub is out of reach"),
    "missing field": ("--dataset {}/missing.jsonl", r"missing\.jsonl, line 2: field 'chosen' is missing"),
    "number for text": ("--dataset {}/number.jsonl", r"number\.jsonl, line \d+: field 'chosen' is int"),
    "mixed types": ("--dataset {}/mixed.jsonl", r"mixed\.jsonl, line 2"),
    "not JSON": ("--dataset {}/broken.jsonl", r"broken\.jsonl, line 2: not JSON"),
    "not JSON at all": ("--dataset {}/broken.json", r"broken\.json, line 2: not JSON"),
    "not UTF-8": ("--dataset {}/latin.jsonl", r"latin\.jsonl, line 3: not UTF-8"),
    "half an emoji": ("--dataset {}/half.jsonl", r"half\.jsonl"),
    "empty file": ("--dataset {}/empty.jsonl", r"empty\.jsonl"),
    "identical pairs": ("--dataset {}/identical.jsonl", r"identical\.jsonl: no usable pair to train on"),
    "one pair": ("--dataset {}/one.jsonl", r"one\.jsonl: no usable pair to train on"),
    "unknown split": ("--train_split nowhere", r"--train_split nowhere: .* has only train"),
    "no room": ("--max_length 20 --max_prompt_length 19", r"--max_length 20 leaves no room"),
    "too long": ("--max_length 129", r"--max_length 129 is more than the 128 positions"),
    "teacher's vocabulary": ("--dpo {}/smaller", r"teacher .*smaller: its vocabulary or tokenizer"),
    "teacher's tokenizer": ("--reverse_dpo {}/latin", r"teacher .*latin: its vocabulary or tokenizer"),
    "corrupt weights": ("--model {}/corrupt", r"model .*corrupt cannot be loaded"),
    "weights not finite": ("--model {}/nan", r"model .*nan.*finite"),
    "beta": ("--beta 0", r"--beta is 0\.0"),
    "learning rate": ("--sft_learning_rate -1e-5", r"--?sft_learning_rate"),
    "r": ("--r -1", r"--r is -1\.0"),
    "batch size": ("--batch_size 0", r"--batch_size is 0"),
    "alpha": ("--alpha foo", r"--alpha is 'foo'"),
    "signal": ("--signal token --off_policy", r"--signal token needs the policy's own samples"),
    "unknown flag": ("--lerning_rate 1", r"--lerning_rate"),
    "device": ("--device cuda:7", r"device cuda:7 is not there"),
    "output below a file": ("--output_dir {}/file/out", r"output folder .*file/out cannot be used"),
    "output of another run": ("--output_dir {}/run --beta 0.2", r"of a run with other settings \(beta 0\.1 → 0\.2\)"),
    "output of other data": ("--output_dir {}/run --dataset {}/other.jsonl", r"other settings \(dataset .*data "),
}


def in_folder(folder: Path) -> dict:
    """Every file below a folder, with its content."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, base):
    """A folder of what the commands of BAD take."""
    folder = tmp_path_factory.mktemp("prepared")
    good, other = numbered(40), numbered(41)
    write(folder / "good.jsonl", good), write(folder / "other.jsonl", other)
    write(folder / "missing.jsonl", [good[0], {"prompt": "a", "rejected": "b"}, *good])
    write(folder / "number.jsonl", [record | {"chosen": 3} for record in good])
    write(folder / "mixed.jsonl", [good[0], good[1] | {"chosen": 3}, *good])
    lines = [json.dumps(record) for record in good]
    (folder / "broken.jsonl").write_text("\n".join([lines[0], lines[1][:-5], *lines]))
    (folder / "broken.json").write_text("[" + ",\n".join([lines[0], lines[1][:-5], *lines]) + "]")
    (folder / "latin.jsonl").write_bytes("\n".join([*lines[:2], '{"prompt": "naïve"}', *lines]).encode("latin-1"))
    (folder / "half.jsonl").write_text("\n".join([r'{"prompt": "a", "chosen": "\ud83d", "rejected": "b"}', *lines]))
    (folder / "empty.jsonl").touch(), (folder / "file").touch()
    write(folder / "identical.jsonl", [record | {"rejected": record["chosen"]} for record in good])
    write(folder / "one.jsonl", good[:1])
    save_tiny_model(folder / "smaller", vocabulary=310), save_tiny_model(folder / "latin", text=LATIN)
    for name in ("corrupt", "nan"):
        shutil.copytree(base, folder / name)
    weights = folder / "corrupt" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    poisoned = {name: x.clone() for name, x in load_file(folder / "nan" / "model.safetensors").items()}
    poisoned["transformer.ln_f.weight"][0] = torch.nan
    save_file(poisoned, folder / "nan" / "model.safetensors", {"format": "pt"})
    common = {"model": str(base), "dataset": str(folder / "good.jsonl"), "output_dir": str(folder / "run")}
    ad.align(ad.Args(**common, **SMALL))
    return folder


@pytest.fixture(scope="module")
def outcomes(prepared, base, tmp_path_factory):
    """What every command of BAD came to: name → (exit status, standard error, seconds, output folder, its files)."""
    outs = tmp_path_factory.mktemp("outs")
    silent = socket.create_server(("127.0.0.1", 0))  # takes connections, and never answers

    def outcome(case):
        name, (arguments, _) = case
        settings = {"model": base, "dataset": prepared / "good.jsonl", "output_dir": outs / name, **SMALL}
        arguments = arguments.replace("{}", str(prepared)).split()
        out = Path(dict(pairwise(arguments)).get("--output_dir", outs / name))
        environment = os.environ | {"HF_HOME": tempfile.mkdtemp(dir=HOME.name)}
        if "silent" in name:
            environment["HF_ENDPOINT"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        before, began = in_folder(out), time.time()
        arguments = [*command(**settings), *arguments]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, check=False)
        return name, (done.returncode, done.stderr, time.time() - began, out, before)

    with ThreadPoolExecutor(3) as pool, silent:
        return dict(pool.map(outcome, BAD.items()))


def lines_of(errors: str) -> list:
    """The lines of standard error, without the progress bars."""
    bar = r"[^\r\n]*\[\d[^]\r\n]*/(s|it)[^]\r\n]*\]"
    return [line for line in re.sub(bar, "\n", errors).splitlines() if line.strip()]


@pytest.mark.parametrize("name", BAD)
def test_bad_input(outcomes, name):
    """Notices bad input that gives a traceback, a vague or a long message, exit status 0 or 1, or written files."""
    status, errors, seconds, out, before = outcomes[name]
    lines = lines_of(errors)
    assert status == 2, errors
    assert len(lines) == 1 and lines[0].startswith("aligndistil.py: error: "), errors
    assert re.search(BAD[name][1], lines[0])
    assert in_folder(out) == before and out.exists() == bool(before)
    assert seconds < (30 if "hub" in name else 60)  # three at a time, on perhaps two cores


def test_overwrite(prepared, base):
    """Notices a run that cannot be started anew with other settings, or leaves something of the old one."""
    settings = {"model": base, "dataset": prepared / "good.jsonl", "output_dir": prepared / "run", **SMALL}
    shutil.copytree(prepared / "run", prepared / "again")
    settings |= {"output_dir": prepared / "again", "beta": 0.2, "overwrite": True, "max_steps": 2}
    assert ad.align(ad.Args(**{k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}))
    assert json.loads((prepared / "again" / "config.json").read_text())["beta"] == 0.2
    assert [line["step"] for line in metrics(prepared / "again")] == [1, 2] * 4


def test_folder_that_is_no_run_keeps_what_it_holds(prepared, base, tmp_path):
    """Notices a user's own folder, named as one of ours, that is deleted without --overwrite."""
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "of_mine.txt").write_text("precious")
    settings = {"model": str(base), "dataset": str(prepared / "good.jsonl"), "output_dir": str(tmp_path), **SMALL}
    with contextlib.suppress(ad.BadInput):
        ad.align(ad.Args(**settings))
    assert (tmp_path / "policy" / "of_mine.txt").exists()


@pytest.mark.parametrize("stage", ["sft", "dpo", "distill"])
def test_loss_that_is_not_finite(prepared, base, tmp_path, monkeypatch, capsys, stage):
    """Notices a run that goes on, dies of something else, or is silent about where it was, when its weights explode."""
    settings = {"model": base, "dataset": prepared / "good.jsonl", "output_dir": tmp_path / "out", **SMALL}
    monkeypatch.setattr(sys, "argv", command(**settings, **{f"{stage}_learning_rate": 1e30})[1:])
    assert ad.main() == 2
    (line,) = lines_of(capsys.readouterr().err)
    assert re.match(r"aligndistil\.py: error: \w+: .*step [23] \(records \[\d+, ", line)


# ----------------------------------------------------------------------------------------------------------------------
# Kills and going on
# ----------------------------------------------------------------------------------------------------------------------

RESUMED = SMALL | {"max_steps": 6, "logging_steps": 1, "save_steps": 2}


def metrics(folder: Path) -> list:
    """The whole lines of metrics.jsonl so far."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(True) if line[-1] == "\n"] if path.exists() else []


def assert_same_run(folder: Path, reference: Path) -> None:
    weights = lambda stage: [(x / stage / "model.safetensors").read_bytes() for x in (folder, reference)]
    assert [stage for stage in STAGES if len(set(weights(stage))) > 1] == []
    losses = [[(line["stage"], line["step"], line["loss"]) for line in metrics(x)] for x in (folder, reference)]
    assert losses[0] == losses[1]
    assert json.loads((folder / "results.json").read_text()) == json.loads((reference / "results.json").read_text())


def start(folder: Path):
    """The run of the demo as a process of its own."""
    process = FORK.Process(target=ad.align, args=(ad.parse_args(flags(output_dir=folder, **RESUMED)),))
    process.start()
    return process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The output folder of a run that nothing disturbs, with a line for every step of every stage."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    ad.align(ad.parse_args(flags(output_dir=folder, **RESUMED)))
    assert [(line["stage"], line["step"]) for line in metrics(folder)] == [(x, i) for x in STAGES for i in range(1, 7)]
    return folder


def test_finished_run(uninterrupted):
    """Notices a finished run that is done again, changed, or answered with something else than its results."""
    before = in_folder(uninterrupted)
    results = ad.align(ad.parse_args(flags(output_dir=uninterrupted, **RESUMED)))
    assert in_folder(uninterrupted) == before and results == json.loads((uninterrupted / "results.json").read_text())


def test_what_a_run_leaves(uninterrupted, prepared):
    """Notices a missing model, tokenizer, column or number in the output folder, of the demo and of a model of one's own."""
    for folder, columns in ((uninterrupted, {"true_reward", "win_rate"}), (prepared / "run", set())):
        for stage in STAGES:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder / stage)
            assert len(transformers.AutoTokenizer.from_pretrained(folder / stage)) <= model.config.vocab_size
        results = json.loads((folder / "results.json").read_text())
        assert list(results["models"]) == ["reference", "dpo", "reverse_dpo", "policy"]
        for row in results["models"].values():
            assert row.keys() == {"reward", "kl", "length", "entropy"} | columns and all(
                map(math.isfinite, row.values())
            )
        assert results["models"]["reference"]["kl"] == pytest.approx(0, abs=1e-5)
        assert results["models"]["policy"]["kl"] > (1e-3 if columns else -1e-5)
        accuracy = results["reward_accuracy"]
        assert accuracy.keys() == {"dpo", "reverse", "contrastive", "n"} | ({"oracle"} if columns else set())
        for name in ("dpo", "reverse", "contrastive"):
            row = accuracy[name]
            assert 0 <= row["low"] <= row["accuracy"] + 1e-9 and row["accuracy"] <= row["high"] + 1e-9 <= 1 + 1e-9
        assert {path.name for path in folder.iterdir()} <= set(ad.OUTPUTS.split()), (
            "--overwrite knows what a run leaves"
        )
        samples = json.loads((folder / "samples.json").read_text())
        assert {"instruction", "output", "generator"} <= samples[0].keys() and len(samples) % 4 == 0
        assert all(len(row["tokens"]) == len(row["token_rewards"]) == row["length"] for row in samples)
        page, first = (
            (folder / "report.html").read_text(encoding="utf-8"),
            {line["stage"]: line for line in metrics(folder)},
        )
        assert all(f"Training: {stage}" in page for stage in first)
        assert page.count("<svg") == sum(name in line for line in first.values() for name in ad.CURVES) > 10
        assert page.count('class="tokens"') == min(24, len(samples)) and not re.search(r"src=|@import|<script", page)
        mean = statistics.mean(row["kl"] for row in samples if row["generator"] == "dpo")
        assert mean == pytest.approx(results["models"]["dpo"]["kl"])
        step = metrics(folder)[-1]
        assert {
            "loss",
            "alpha",
            "beta_t",
            "kl",
            "grad_norm",
            "learning_rate",
            "tokens_per_s",
            "peak_memory_gb",
        } <= step.keys()


def test_the_seed_decides(prepared, base, tmp_path):
    """Notices a seed that is ignored: the same one gives the same weights, another one others."""
    common = {"model": str(base), "dataset": str(prepared / "good.jsonl"), **SMALL}
    weights = []
    for name, seed in (("same", 0), ("other", 1)):
        ad.align(ad.Args(**common, output_dir=str(tmp_path / name), seed=seed))
        weights.append((tmp_path / name / "policy" / "model.safetensors").read_bytes())
    assert weights[0] == (prepared / "run" / "policy" / "model.safetensors").read_bytes() != weights[1]


def test_the_schedule_and_the_start_of_the_policy(prepared, base, tmp_path):
    """Notices a wrong warm-up or decay, teachers that are trained again, and a policy that starts elsewhere than told."""
    teachers = {f"{name}": str(prepared / "run" / name) for name in ("dpo", "reverse_dpo")}
    settings = SMALL | {"max_steps": 20, "distill_epochs": 20, "warmup_ratio": 0.2, "sft": False, "off_policy": True}
    settings |= {
        "model": str(base),
        "dataset": str(prepared / "good.jsonl"),
        "distill_learning_rate": 1e-12,
        **teachers,
    }
    ad.align(ad.Args(**settings, output_dir=str(tmp_path / "out"), init_from="dpo"))
    assert not (tmp_path / "out" / "dpo").exists() and {line["stage"] for line in metrics(tmp_path / "out")} == {
        "policy"
    }
    rates = [line["learning_rate"] / 1e-12 for line in metrics(tmp_path / "out")]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, *(i / 16 for i in range(16, 0, -1))])
    moved = lambda a, b: max((a[name] - b[name]).abs().max().item() for name in a)
    policy, dpo = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out" / "policy", prepared / "run" / "dpo")
    )
    assert moved(policy, dpo) < 1e-9 < moved(policy, load_file(base / "model.safetensors"))


def test_the_readme_names_what_is_there():
    """Notices a function or a flag of the README that the script does not have."""
    readme, source = (Path(ad.__file__).with_name(name).read_text() for name in ("README.md", "aligndistil.py"))
    table = readme.split("## Equation → function")[1].split("## What a run leaves")[0]
    for name in re.findall(r"`([a-zA-Z_]+(?:\.[a-z]+)?)`", table):
        assert f"def {name.rpartition('.')[2]}(" in source, name
    known = {field.name for field in dataclasses.fields(ad.Args)} | {"help", "nproc_per_node"}
    for flag in re.findall(r"--([a-z][a-z0-9_]+)\b", readme):
        assert flag in known, flag


def test_kills_change_nothing(uninterrupted, tmp_path):
    """Notices anything that a kill at any moment breaks, repeats or loses: one weight, one line, one result."""
    draw, path, kills = random.Random(0), tmp_path / "metrics.jsonl", []
    written = lambda: path.stat().st_mtime_ns if path.exists() else 0
    for lines in sorted(draw.sample(range(1, 25), 12)):  # of the 24 that the whole training writes
        before, process = written(), start(tmp_path)
        while process.is_alive() and (written() == before or len(metrics(tmp_path)) < lines):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.join()
        kills += [metrics(tmp_path)[-1]["stage"]] if process.exitcode == -signal.SIGKILL else []
    process = start(tmp_path)
    process.join()
    assert len(kills) >= 10 and len(set(kills)) >= 3 and process.exitcode == 0
    assert_same_run(tmp_path, uninterrupted)


def test_ctrl_c(uninterrupted, tmp_path, capsys):
    """Notices a Ctrl-C that loses a step, leftovers of a kill that are taken for whole, and stages done twice."""
    once = RESUMED | {"save_steps": 100}  # so that a checkpoint can only be Ctrl-C's
    run = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = run(command(output_dir=tmp_path, **once))
    while process.poll() is None and len(metrics(tmp_path)) < 20:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate()
    assert process.returncode == 130 and "stopping after this step" in out and "Traceback" not in errors
    assert len(lines_of(errors)) == 1 and lines_of(errors)[0].startswith("aligndistil.py: stopped; the same command")
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    assert checkpoint["stage"] == "policy" and checkpoint["step"] == len(metrics(tmp_path)) - 18

    shutil.copytree(tmp_path / "sft", tmp_path / "policy.partial")
    (tmp_path / "checkpoint.pt.partial").write_bytes(b"half")
    (tmp_path / "metrics.jsonl").open("a").write('{"stage": "policy", "st')
    before = {stage: (tmp_path / stage).stat().st_mtime_ns for stage in STAGES[:3]}
    ad.align(ad.parse_args(flags(output_dir=tmp_path, **RESUMED)))
    out = capsys.readouterr().out
    assert "policy: going on after step" in out and all(f"{stage}: finished before" in out for stage in STAGES[:3])
    assert before == {stage: (tmp_path / stage).stat().st_mtime_ns for stage in STAGES[:3]}
    assert_same_run(tmp_path, uninterrupted)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes
# ----------------------------------------------------------------------------------------------------------------------


def test_torchrun(tmp_path):
    """Notices two processes that train on something else than one does, or that both write."""
    losses = {}
    for world, start_with in {
        1: [sys.executable],
        2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }.items():
        # teachers that differ: else the KL to them is 1e-4 and carries float32's rounding of the logits
        settings = SMALL | {"logging_steps": 1, "off_policy": True, "dpo_learning_rate": 1e-3}
        settings["output_dir"] = tmp_path / str(world)
        done = subprocess.run(
            [*start_with, ad.__file__, *flags(**settings)], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("models, metrics, samples and results are in") == 1
        assert len(metrics(tmp_path / str(world))) == 12
        losses[world] = [line["loss"] for line in metrics(tmp_path / str(world)) if line["step"] == 1]
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)


def gradients_of_rank(rank: int, world: int, folder: Path) -> None:
    """Gradients of every loss on this rank's share of seven pairs, in several micro-batches; rank 0 saves them."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    run = ad.Run(ad.Args(device="cpu", output_dir=str(folder), tokens_per_micro_batch=60, chunk_size=7))
    run.pad_id = 0
    draw = random.Random(0)
    some = lambda: [draw.randrange(3, 60) for _ in range(draw.randrange(2, 12))]
    prompts = [some() for _ in range(7)]
    pairs = [[ad.Response(prompt, some(), draw.uniform(-9, 0)) for _ in "12"] for prompt in prompts]
    chosen = [[pair[0]] for pair in pairs]
    dpo, base = (ad.LM(ad.demo_model(seed)).requires_grad_(False) for seed in (1, 2))
    teacher = ad.Teacher(dpo, base, dpo, partial(ad.adaptive_alpha, r=4.0))
    cases = {
        "sft": (chosen, ad.sft_batch_loss),
        "dpo": (pairs, partial(ad.dpo_batch_loss, beta=0.1)),
        "distill": (chosen, partial(ad.distillation_batch_loss, teacher=teacher, beta=0.1)),
    }
    found = {}
    for name, (examples, loss_of) in cases.items():
        policy = ad.LM(ad.demo_model(0))
        parallel = policy if world == 1 else DistributedDataParallel(policy, broadcast_buffers=False)
        sums = ad.accumulate_gradient(parallel, examples[rank::world], loss_of, len(examples), run)
        found[name] = {key: parameter.grad for key, parameter in policy.named_parameters()}
        found[name]["loss"] = run.total(sums["loss"])
    if rank == 0:
        torch.save(found, folder / f"{world}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_gradient_of_two_processes(tmp_path):
    """Notices shares of two processes that do not add up to the whole batch's gradient, whatever their sizes."""
    for world in (1, 2):
        torch.multiprocessing.start_processes(
            gradients_of_rank, (world, tmp_path), nprocs=world, start_method="forkserver"
        )
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    for loss in one:
        for name, expected in one[loss].items():
            assert (two[loss][name] - expected).norm() <= 1e-5 * expected.norm(), (loss, name)


# ----------------------------------------------------------------------------------------------------------------------
# 12  The notebook
# ----------------------------------------------------------------------------------------------------------------------

NOTEBOOK = Path(ad.__file__).with_name("tutorial.ipynb")


def notebook_cells(kind: str) -> list:
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == kind]


def markdown_outputs(cell) -> list:
    return [output.data["text/markdown"] for output in cell.outputs if "text/markdown" in output.get("data", {})]


def named(name: str):
    """The function or class of aligndistil.py with this name, which may be dotted."""
    return functools.reduce(getattr, name.split("."), ad)


def test_the_notebook_runs(monkeypatch):
    """Notices a cell that fails, on a few steps of training and with no hub."""
    monkeypatch.setenv("ALIGNDISTIL_QUICK", "1")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()


def test_the_notebook_is_saved_with_its_outputs():
    """Notices a saved notebook not run from top to bottom, with an error or a warning, or with a path of a machine."""
    code = notebook_cells("code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 10
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr|var|Users)/", str(outputs))
    assert [cell.source for cell in code if len(cell.source.splitlines()) > 27] == []


def test_the_notebook_shows_the_current_source():
    """Notices source or a line number in the saved outputs that is no more aligndistil.py's: run the notebook again."""
    shown, lines = 0, []
    for cell in notebook_cells("code"):
        names = [name for call in re.findall(r"^show\((.*)\)$", cell.source, re.M) for name in call.split(", ")]
        sources = [text for text in markdown_outputs(cell) if text.startswith("```python")]
        for name, source in zip(names, sources, strict=True):
            assert source == f"```python\n{inspect.getsource(named(name.removeprefix('ad.')))}```", name
        shown += len(names)
        for text in markdown_outputs(cell):
            lines += re.findall(r"^\| [\d, ]+ \|.*\| `([\w.]+)` \| (\d+) \|", text, re.M)
    assert shown >= 20 and len(lines) >= 15
    for name, line in lines:
        assert int(line) == inspect.getsourcelines(named(name))[1], name


def test_the_notebook_has_every_equation():
    """Notices an equation of 1 to 19 that is missing, or there twice."""
    text = "\n".join(cell.source for cell in notebook_cells("markdown"))
    assert sorted(map(int, re.findall(r"\\tag\{(\d+)\}", text))) == list(range(1, 20))


# ----------------------------------------------------------------------------------------------------------------------
# The benchmark: one step's loss and gradient (no optimizer) at GPT-2's shape with random weights.
# ----------------------------------------------------------------------------------------------------------------------


def authors_distillation(policy, dpo, rev, batch, mask):
    """(a) The computation as the authors' trainer does it: whole logits of three models, prompts included."""
    with torch.no_grad():
        dpo_logits, rev_logits = dense_logits(dpo, batch).float(), dense_logits(rev, batch).float()
        dpo_probabilities, rev_probabilities = dpo_logits.softmax(-1), rev_logits.softmax(-1)
        alpha = 10 * (dpo_probabilities - rev_probabilities).abs().sum(-1) + 1e-3
        teacher = dpo_logits + alpha.unsqueeze(-1) * (dpo_logits - rev_logits)
        teacher_logps = teacher.log_softmax(-1)
    logits = dense_logits(policy, batch).float()
    logps, probabilities = logits.log_softmax(-1), logits.softmax(-1)
    kl = (probabilities * (logps - teacher_logps)).sum(-1)
    (0.1 / alpha * kl * mask).sum(-1).div(mask.sum(-1)).mean().backward()


def authors_dpo(policy, batch, mask):
    """(a) DPO with the log-probabilities of every position gathered from whole logits."""
    logps = ad.token_logps(dense_logits(policy, batch).float(), batch.input_ids.roll(-1, 1))
    ad.dpo_loss(*(logps * mask).sum(-1).chunk(2), *batch.ref_logps.chunk(2), beta=0.1).mean().backward()


def floor(policy, teachers, batch):
    """(c) What no implementation can leave out: the bodies, the policy's backward, the response states' head products."""
    with torch.no_grad():
        frozen = [lm.hidden(batch) for lm in teachers]
    hidden = policy.hidden(batch)
    gradient = torch.empty_like(hidden)
    for rows in (slice(i, i + policy.chunk_size) for i in range(0, len(hidden), policy.chunk_size)):
        for lm, states in zip(teachers, frozen):
            with torch.no_grad():
                lm.head(states[rows])
        chunk = hidden[rows].detach().requires_grad_()
        logits = policy.head(chunk)
        logits.backward(logits.detach())  # both products of the backward pass
        gradient[rows] = chunk.grad
    hidden.backward(gradient)


def extra_memory(device, work):
    """(seconds, peak GB over what was there before) of work()."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what the variant before has freed
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start the peak afresh
        before = resident("VmRSS")
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
    return seconds, (peak - before) / 1e9


def resident(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def benchmark(argv=None):
    parser = argparse.ArgumentParser(description="time and peak memory of one step, side by side")
    parser.add_argument("--batch", type=int, default=4, help="sequences; the first half of each is the prompt")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--chunk_size", type=int, default=512, help="aligndistil.py's --chunk_size")
    parser.add_argument("--tokens_per_micro_batch", type=int, default=512, help="aligndistil.py's setting")
    parser.add_argument("--repeats", type=int, default=3, help="rounds after a warm-up; medians are printed")
    parser.add_argument("--device", default=None, help="cuda or cpu")
    args = parser.parse_args(argv)
    run = ad.Run(ad.Args(device=args.device, tokens_per_micro_batch=args.tokens_per_micro_batch))
    run.pad_id, device = 0, run.device
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=max(1024, args.length))
    frozen_type = torch.bfloat16 if run.bf16 else torch.float32
    make = lambda dtype: ad.LM(transformers.GPT2LMHeadModel(config).to(device, dtype), args.chunk_size)
    policy, dpo, rev = (
        make(torch.float32),
        make(frozen_type).requires_grad_(False),
        make(frozen_type).requires_grad_(False),
    )
    half = args.length // 2
    draw = lambda n: torch.randint(config.vocab_size, (n,)).tolist()
    responses = [ad.Response(draw(half), draw(args.length - half), -8.0 * half) for _ in range(args.batch)]
    single, pairs = [[response] for response in responses], list(zip(responses[::2], responses[1::2]))
    alone, paired = ad.collate(single, 0, device), ad.collate(pairs, 0, device)
    mask = response_mask(alone).to(device)
    teacher = ad.Teacher(dpo, rev, dpo, partial(ad.adaptive_alpha, r=20.0))
    distillation = partial(ad.distillation_batch_loss, teacher=teacher, beta=0.1)
    ours = lambda examples, loss_of: ad.accumulate_gradient(policy, examples, loss_of, len(examples), run)
    work = {
        "distillation": {
            "(a) authors' dense": lambda: authors_distillation(policy, dpo, rev, alone, mask),
            "(b) aligndistil.py": lambda: ours(single, distillation),
            "(c) floor": lambda: floor(policy, [dpo, rev], alone),
        },
        "DPO": {
            "(a) authors' dense": lambda: authors_dpo(policy, paired, mask),
            "(b) aligndistil.py": lambda: ours(pairs, partial(ad.dpo_batch_loss, beta=0.1)),
            "(c) floor": lambda: floor(policy, [], paired),
        },
    }
    precision = "bfloat16 autocast" if run.bf16 else "float32"
    print(
        f"GPT-2 shape, {args.batch} x {args.length} tokens, half prompt, {precision}, {device.type}, torch {torch.__version__}"
    )
    for stage, variants in work.items():
        rounds = []
        for _ in range(args.repeats + 1):  # in turn, so that a drift of the machine's speed hits all alike
            measured = {}
            for name, step in variants.items():
                policy.zero_grad(set_to_none=True)
                with contextlib.nullcontext() if "(b)" in name else run.autocast():
                    measured[name] = extra_memory(device, step)
            rounds.append(measured)
        median = {name: [statistics.median(r[name][i] for r in rounds[1:]) for i in (0, 1)] for name in variants}
        for name, (seconds, memory) in median.items():
            print(f"{stage:13} {name:20} {seconds:8.3f} s {memory:8.2f} GB")
        (a, a_gb), (b, b_gb), (c, c_gb) = median.values()
        print(f"{stage:13} {'(b)/(a)':20} {b / a:8.2f}   {b_gb / a_gb:8.2f}")
        print(f"{stage:13} {'(b)/(c)':20} {b / c:8.2f}   {b_gb / c_gb:8.2f}")


if __name__ == "__main__":
    benchmark()
