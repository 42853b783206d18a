"""Tests of aligndistil.py (`pytest`), and its benchmark (`python test_aligndistil.py --help`).

The tests follow the sections of aligndistil.py: the mathematics against independent float64 computations, the
losses against dense ones, then data, runs and failures on the real command line.
"""

import argparse
import copy
import ctypes
import dataclasses
import functools
import gzip
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HOME = tempfile.TemporaryDirectory()  # the hub's cache: empty, and gone afterwards
if __name__ != "__main__":  # one thread a process, as several run at once; and no hub is there
    os.environ |= {"HF_HOME": HOME.name, "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}

import datasets
import filelock
import nbformat
import pandas as pd
import pytest
import tokenizers
import torch
import torch.distributed as dist
import transformers
from nbclient import NotebookClient
from safetensors.torch import load_file, save_file

import aligndistil as ad

VOCABULARY = 53
SIZES = [(3, 4), (5, 2), (1, 7), (6, 1)]  # prompt and response lengths of a batch
KEYS = ("chosen", "rejected")


def random_logits(*shape, scale=3.0):
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def tiny_gpt2(seed=0, **options):
    """A random two-layer GPT-2; dropout is left at GPT-2's own 0.1."""
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tiny_lm(seed=0, **options):
    return ad.LM(tiny_gpt2(seed, **options), chunk_size=5)


def random_responses(sizes=SIZES):
    """[(prompt length, response length), ...] → Responses of random tokens."""

    def draw(n, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()

    return [ad.Response(draw(p, p), draw(y, 100 + y)) for p, y in sizes]


def singles(responses=None):
    """One example a response."""
    return [[response] for response in responses or random_responses()]


def tiny_run(**settings):
    """The least that sampling, micro-batches and evaluation need of a Run."""
    run = ad.Run(ad.Args(**{"max_length": 24, "max_prompt_length": 8, "device": "cpu", **settings}))
    run.tokenizer, run.stop_ids = ad.demo_tokenizer(), [0]
    return run


def teacher_of(dpo, base, **settings):
    return ad.Teacher(ad.Args(**settings), {"dpo": dpo, "reverse_dpo": base, "reference": base}.get)


def gradients(model):
    """The gradients that are there, which are cleared."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(ours, theirs, tolerance=1e-6):
    assert ours.keys() == theirs.keys()
    for name in ours:
        error = (ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


# ------------------------------------------------------------------------------------------------------------
# 1  Settings
# ------------------------------------------------------------------------------------------------------------


def test_every_setting_is_explained(capsys):
    """Notices a setting without a text in --help, and demo settings that reach another model."""
    assert ad.parse_args(["--model", "gpt2"]) == ad.Args(model="gpt2")
    with pytest.raises(SystemExit):
        ad.parse_args(["--help"])
    assert re.findall(r"^  --\S+( \S+)*\n(?=  --|\Z)", capsys.readouterr().out, re.M) == []


def test_the_readme_names_what_is_there():
    """Notices a function, a column or a flag of the README that the script does not have."""
    names = ("README.md", "aligndistil.py", "test_aligndistil.py")
    files = [Path(ad.__file__).with_name(name) for name in names]
    readme, source, tests = (file.read_text(encoding="utf-8") for file in files)
    for name in set(re.findall(r"`([A-Za-z]+(?:[_.][A-Za-z]+)+)`", readme)):
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", source), name
    flags = {field.name for field in dataclasses.fields(ad.Args)} | {"help", "nproc_per_node"}
    flags |= set(re.findall(r'add_argument\("--(\w+)"', tests))
    assert set(re.findall(r"--([a-z][a-z0-9_]+)\b", readme)) <= flags


# ------------------------------------------------------------------------------------------------------------
# 2  The mathematics
# ------------------------------------------------------------------------------------------------------------


def probabilities(logits):
    """softmax of one state's logits by hand, as a list."""
    total = sum(math.exp(x) for x in logits.tolist())
    return [math.exp(x) / total for x in logits.tolist()]


def test_token_logps_by_hand():
    z, tokens = random_logits(2, 3, 5), torch.tensor([[0, 4, 2], [1, 1, 3]])
    found = ad.token_logps(z, tokens)
    for b, t in itertools.product(range(2), range(3)):
        assert found[b, t].item() == pytest.approx(math.log(probabilities(z[b, t])[tokens[b, t]]), abs=1e-12)


def test_dpo_loss_is_the_paper_s_by_hand():
    chosen, rejected, ref_chosen, ref_rejected = -3.0, -4.0, -3.5, -3.0
    margin = 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    values = [torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, ref_chosen, ref_rejected)]
    loss = ad.dpo_loss(*values, beta=0.1)
    assert loss.shape == (1,) and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-margin))), abs=1e-12)
    swapped = ad.dpo_loss(values[1], values[0], values[3], values[2], beta=0.1)
    assert swapped.item() == pytest.approx(-math.log(1 / (1 + math.exp(margin))), abs=1e-12)
    assert ad.implicit_reward(values[0], values[2], 0.5).item() == 0.25
    big = torch.tensor([1e6])
    assert ad.dpo_loss(-big, big, 0 * big, 0 * big, 1.0).isfinite()


def test_total_variation_by_loops_and_at_its_ends():
    p, q = random_logits(4, 7), random_logits(4, 7).flip(0)
    for i in range(4):
        by_hand = 0.5 * sum(abs(a - b) for a, b in zip(probabilities(p[i]), probabilities(q[i])))
        assert ad.total_variation(p, q)[i].item() == pytest.approx(by_hand, abs=1e-12)
    certain = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    assert ad.total_variation(certain[0], certain[1]).item() == pytest.approx(1)
    assert ad.total_variation(p, p + 5).abs().max() < 1e-12  # logits are known up to a constant


def test_alpha_and_beta_of_a_token():
    p, q = random_logits(2, 3, 7), random_logits(2, 3, 7).flip(-1)
    alpha = ad.adaptive_alpha(p, q, r=8.0)
    assert torch.allclose(alpha, 8 * ad.total_variation(p, q) + 0.001)
    assert torch.allclose(ad.adaptive_alpha(p, p, r=8.0), torch.full_like(alpha, 0.001))
    assert torch.allclose(ad.token_beta(alpha, 0.1), 0.1 / alpha)
    assert ad.token_beta(torch.tensor([0.0, 2.0]), 0.1).tolist() == pytest.approx([1.0, 0.05])


def test_the_teachers_where_they_must_agree():
    ref, dpo, rev = random_logits(2, 3, 7), random_logits(2, 3, 7).flip(0), random_logits(2, 3, 7).flip(-1)

    def constant(alpha):
        return torch.full((2, 3), alpha, dtype=torch.float64)

    def same(a, b):
        return torch.allclose(a.softmax(-1), b.softmax(-1), atol=1e-12)

    ratio = 1.7  # β0/β
    assert same(ad.teacher_logits(ref, dpo - ref, constant(ratio)), ratio * dpo + (1 - ratio) * ref)  # Eq. 11
    assert same(ad.teacher_logits(dpo, dpo - rev, constant(ratio)), (1 + ratio) * dpo - ratio * rev)  # Eq. 15
    assert same(ad.teacher_logits(ref, dpo - ref, constant(1.0)), dpo)  # β = β0: RLHF's optimum is DPO's
    assert same(ad.teacher_logits(dpo, dpo - rev, constant(0.0)), dpo)  # plain distillation
    adaptive = ad.adaptive_alpha(dpo, rev, r=4.0)
    teacher = ad.teacher_logits(dpo, dpo - rev, adaptive)  # Eq. 17
    for b, t in itertools.product(range(2), range(3)):
        assert same(teacher[b, t], dpo[b, t] + adaptive[b, t].item() * (dpo - rev)[b, t])


def test_implausible_mass_by_loops():
    dpo, target = 2 * random_logits(3, 7), random_logits(3, 7).flip(-1)
    found = ad.implausible_mass(target, dpo)
    for i in range(3):
        p, q = probabilities(dpo[i]), probabilities(target[i])
        assert found[i].item() == pytest.approx(sum(b for a, b in zip(p, q) if a < 1e-3), abs=1e-12)
    assert found.max() > 0.01


def test_reverse_kl_by_loops_and_at_extreme_logits():
    p, q = random_logits(3, 7), random_logits(3, 7).flip(-1)
    for i in range(3):
        by_hand = sum(a * math.log(a / b) for a, b in zip(probabilities(p[i]), probabilities(q[i])))
        assert ad.reverse_kl(p, q)[i].item() == pytest.approx(by_hand, abs=1e-10)
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


def test_theorem_1_by_enumeration():
    """E[r − β·KL] = −β·E[Σ_t KL(π_θ‖π*) − log Z(s_t)] over every response of two tokens of three."""
    beta0, beta, n = 0.1, 0.04, 3
    ratio = torch.tensor(beta0 / beta, dtype=torch.float64)
    root, after = random_logits(3, n), random_logits(3, n, n)  # policy, dpo, ref: first state; next ones
    left = right = 0.0
    for first, second in itertools.product(range(n), range(n)):
        states = [(root, first), (after[:, first], second)]
        probability = math.prod(z[0].softmax(-1)[token].item() for z, token in states)
        for z, token in states:
            theta, dpo, ref = z.log_softmax(-1)
            left += probability * (beta0 * (dpo - ref) - beta * (theta - ref))[token].item()
            teacher = ad.teacher_logits(z[2], z[1] - z[2], ratio)
            log_z = torch.logsumexp(ratio * dpo + (1 - ratio) * ref, -1)
            right += probability * -beta * (ad.reverse_kl(z[0], teacher) - log_z).item()
    assert left == pytest.approx(right, abs=1e-12)


# ------------------------------------------------------------------------------------------------------------
# 3  The losses and the teacher: chunks against dense computations, for every kind of output head
# ------------------------------------------------------------------------------------------------------------


def llama_like(family, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **options,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(config)


HEADS = {
    "tied": tiny_gpt2,
    "untied": partial(tiny_gpt2, tie_word_embeddings=False),
    "bias": partial(llama_like, "Phi"),
    "soft-capped": partial(llama_like, "Gemma2", final_logit_softcapping=0.5),
    "multiplied": partial(llama_like, "Cohere", logit_scale=0.3),
    "divided": partial(llama_like, "Granite", logits_scaling=3.0),
}


def dense_logits(lm, batch):
    """The model's own logits (B, T, V), with the attention mask that a Batch does without."""
    width = batch.input_ids.shape[1]
    last = batch.states[batch.lengths.cumsum(0) - 1] % width + 1  # each row's last token
    mask = torch.arange(width, device=last.device) <= last[:, None]
    return lm.model(input_ids=batch.input_ids, attention_mask=mask.long()).logits


def response_mask(batch):
    """(B, T), true at the states that predict a response token."""
    mask = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=batch.states.device)
    mask[batch.states] = True
    return mask.view_as(batch.input_ids)


def dense_token_logps(logits, batch):
    """log π of the next token at every position (B, T), 0 where that is no response token."""
    logps = logits.log_softmax(-1).gather(-1, batch.input_ids.roll(-1, 1).unsqueeze(-1)).squeeze(-1)
    return logps * response_mask(batch)


def dense_distillation_loss(policy_logits, teacher_logits, weight, mask):
    """Eq. 18 and 19 from whole logits (B, T, V): the mean over responses of 1/|y| Σ_t β_t·KL(π_θ ‖ π*)."""
    kl = policy_logits.softmax(-1) * (policy_logits.log_softmax(-1) - teacher_logits.log_softmax(-1))
    return ((weight * kl.sum(-1) * mask).sum(-1) / mask.sum(-1)).mean()


def response_logps(lm, batch):
    return ad.response_sums(ad.state_logps(lm, batch, lm.hidden(batch)), batch)


def three_models(head):
    """A policy and two teachers that differ from it."""
    lms = [ad.LM(HEADS[head](), chunk_size=5) for _ in range(3)]
    for seed, lm in enumerate(lms[1:]):
        generator = torch.Generator().manual_seed(seed)
        for parameter in lm.model.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.requires_grad_(False)
    return lms


@pytest.mark.parametrize("head", HEADS)
def test_distillation_in_chunks_is_the_dense_one(head):
    policy, dpo, rev = three_models(head)
    batch = ad.collate(singles(), pad_id=0)
    mask, (p, d, r) = response_mask(batch), [dense_logits(lm, batch) for lm in (policy, dpo, rev)]
    assert torch.allclose(policy.logits(policy.hidden(batch)), p[mask], rtol=1e-5, atol=1e-5)
    alpha = 6 * 0.5 * (d.softmax(-1) - r.softmax(-1)).abs().sum(-1) + 1e-3
    target = d + alpha[..., None] * (d - r)
    dense = dense_distillation_loss(p, target, 0.1 / alpha, mask)
    dense.backward()
    expected = gradients(policy.model)

    teacher = teacher_of(dpo, rev, alpha_r=6.0)
    sums = ad.distillation_batch_loss(policy, batch, 1 / 4, teacher)
    assert sums["loss"].item() / 4 == pytest.approx(dense.item(), rel=1e-6)
    assert_same_gradients(gradients(policy.model), expected)
    assert all(p.grad is None for lm in (dpo, rev) for p in lm.model.parameters()), "teachers are not trained"

    own, of_dpo, of_rev = (dense_token_logps(z.detach().double(), batch) for z in (p, d, r))
    means = {"alpha": alpha, "beta_t": 0.1 / alpha, "kl_teacher": ad.reverse_kl(p, target), "entropy": -own}
    means["implausible"] = ad.implausible_mass(target, d)
    watched = {name: ((x * mask).sum(-1) / mask.sum(-1)).sum().item() for name, x in means.items()}
    watched |= {"reward": 0.1 * (of_dpo - of_rev).sum().item(), "kl_dpo": (own - of_dpo).sum().item()}
    assert {name: sums[name].item() for name in watched} == pytest.approx(watched, rel=1e-5)
    assert sums.keys() - watched.keys() == {"loss"}


@pytest.mark.parametrize("head", HEADS)
def test_sft_and_dpo_in_chunks_are_the_dense_ones(head):
    policy = ad.LM(HEADS[head](), chunk_size=5)
    batch = ad.collate(singles(), pad_id=0)
    batch.ref_logps = torch.tensor([-20.0, -9.0, -30.0, -5.0])
    logps = dense_token_logps(dense_logits(policy, batch), batch)
    assert torch.allclose(response_logps(policy, batch), logps.sum(-1), rtol=1e-6)
    nll = -(logps.sum(-1) / batch.lengths).mean()
    nll.backward()
    expected = gradients(policy.model)
    assert ad.sft_batch_loss(policy, batch, 1 / 4)["loss"].item() / 4 == pytest.approx(nll.item(), rel=1e-6)
    assert_same_gradients(gradients(policy.model), expected)

    rewards = 0.1 * (dense_token_logps(dense_logits(policy, batch), batch).sum(-1) - batch.ref_logps)
    margins = rewards[:2] - rewards[2:]
    loss = -margins.sigmoid().log().mean()
    loss.backward()
    expected = gradients(policy.model)
    sums = ad.dpo_batch_loss(policy, batch, 1 / 2, beta=0.1)
    assert_same_gradients(gradients(policy.model), expected, 2e-6)
    assert {name: value.item() for name, value in sums.items()} == pytest.approx({
        "loss": 2 * loss.item(), "accuracy": (margins > 0).sum().item(), "margin": margins.sum().item(),
        "reward_chosen": rewards[:2].sum().item(), "reward_rejected": rewards[2:].sum().item(),
    }, rel=1e-4)  # fmt: skip
    batch.ref_logps = response_logps(policy, batch)
    assert ad.dpo_batch_loss(policy, batch, 1.0, beta=0.1)["accuracy"] == 0, "a tie is no preference"


def test_every_teacher_by_its_settings():
    """Notices a wrong model as anchor or base, a dropped weight, and an infinite weight where α is 0."""
    policy, dpo, base = (tiny_lm(seed) for seed in range(3))
    batch = ad.collate(singles(), pad_id=0)
    p, d, b = (dense_logits(lm, batch).detach() for lm in (policy, dpo, base))
    for reward, alpha, weight in [("contrastive", 2, 0.05), ("vanilla", 2, 0.05), ("contrastive", 0, 1)]:
        settings = {"reward": reward, "alpha": float(alpha), "off_policy": True}
        sums = ad.distillation_batch_loss(policy, batch, 1.0, teacher_of(dpo, base, **settings))
        target = (d if reward == "contrastive" else b) + alpha * (d - b)
        dense = dense_distillation_loss(p, target, weight, response_mask(batch))
        assert sums["loss"].item() / 4 == pytest.approx(dense.item(), rel=1e-5)
        assert sums["beta_t"].item() / 4 == pytest.approx(weight)
        name = "reward" if reward == "contrastive" else "reward_dpo"
        assert sums.keys() == {"loss", "alpha", "beta_t", "kl_teacher", "implausible", name}


def losses_and_examples():
    """name → (loss_of, examples) for every loss."""
    responses = random_responses([(3, 4), (5, 2), (1, 7), (6, 1), (2, 2), (4, 9)])
    for response in responses:
        response.ref_logps = -3.0 * len(response.tokens)
    teacher = teacher_of(tiny_lm(1), tiny_lm(2), alpha_r=6.0)
    distil = partial(ad.distillation_batch_loss, teacher=teacher)
    return {
        "sft": (ad.sft_batch_loss, singles(responses)),
        "dpo": (partial(ad.dpo_batch_loss, beta=0.1), list(zip(responses[:3], responses[3:]))),
        "distillation": (distil, singles(responses)),
    }


def step_gradient(run, lm, examples, loss_of, n=None):
    """What a training step does before the optimizer: (sums, gradients) of examples, in micro-batches."""
    sums = {}
    for _, batch in ad.micro_batches(run, examples):
        ad.add_up(sums, loss_of(lm, batch, scale=1 / (n or len(examples))))
    ad.sum_gradients(run, lm.model)
    return sums, gradients(lm.model)


@pytest.mark.parametrize("name", ["sft", "dpo", "distillation"])
def test_micro_batches_leave_loss_and_gradient_unchanged(name):
    policy, (loss_of, examples) = tiny_lm(), losses_and_examples()[name]
    whole, expected = step_gradient(tiny_run(), policy, examples, loss_of)
    for tokens in (16, 1):
        sums, found = step_gradient(tiny_run(tokens_per_micro_batch=tokens), policy, examples, loss_of)
        assert sums.keys() == whole.keys()
        for key in sums:
            assert sums[key].item() == pytest.approx(whole[key].item(), rel=1e-5), key
        assert_same_gradients(found, expected, 1e-5)


@pytest.mark.parametrize("name", ["sft", "dpo", "distillation"])
def test_a_step_neither_waits_nor_mixes_devices(monkeypatch, name):
    """Notices a tensor left on the CPU or a number fetched in mid-step: on "meta", our CUDA, both fail."""
    # transformers itself waits once a body pass: it looks for packed sequences
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda positions: None)
    lm, (loss_of, examples) = tiny_lm(), losses_and_examples()[name]
    lm.model.to("meta")
    if name == "distillation":
        for frozen in loss_of.keywords["teacher"].lms.values():
            frozen.model.to("meta")
    sums = loss_of(lm, ad.collate(examples, pad_id=0, device="meta"), 1.0)
    assert {value.device.type for value in sums.values()} == {"meta"}
    torch.nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)
    torch.optim.AdamW(lm.model.parameters()).step()


def test_no_logits_of_a_whole_batch(monkeypatch):
    """Notices an output head that sees more than one chunk of states, or a prompt or pad position."""
    seen, own = [], ad.LM.logits

    def watched(lm, hidden):
        seen.append(len(hidden))
        return own(lm, hidden)

    monkeypatch.setattr(ad.LM, "logits", watched)
    for name, passes in (("sft", 1), ("dpo", 2), ("distillation", 3)):
        seen.clear()
        loss_of, examples = losses_and_examples()[name]
        loss_of(tiny_lm(), ad.collate(examples, pad_id=0), 1.0)
        states = sum(len(response.tokens) for example in examples for response in example)
        assert max(seen) == 5 and sum(seen) == passes * states, name


# ------------------------------------------------------------------------------------------------------------
# 5  What a step trains on, and sampling
# ------------------------------------------------------------------------------------------------------------


def test_batches_walk_through_every_record_once_an_epoch():
    steps = [ad.batch_indices(step, 10, 4, seed=1) for step in range(5)]
    walk = list(itertools.chain(*steps))
    assert sorted(walk[:10]) == sorted(walk[10:]) == list(range(10)) and walk[:10] != walk[10:]
    assert walk[:4] != ad.batch_indices(0, 10, 4, seed=2)


def test_sampling_pads_on_the_left_without_a_trace(monkeypatch):
    """Notices a sampled token whose distribution is not that of the unpadded prompt."""
    lm, seen, prompts = tiny_lm(), [], [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]

    def pick(probabilities, num_samples):
        seen.append(probabilities)
        return probabilities.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", pick)
    outputs = ad.sample(tiny_run(), lm, prompts)
    for row, i in enumerate(sorted(range(3), key=lambda i: len(prompts[i]))):
        ids = list(prompts[i])
        for t, token in enumerate(outputs[i]):
            with torch.no_grad():
                alone = lm.model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
            assert torch.allclose(seen[t][row], alone, atol=1e-5)
            ids.append(token)


def test_sampling_ignores_the_checkpoint_s_generation_config():
    """Notices a top_k of 1, a repetition penalty and the like that bend π_θ."""
    lm, run = tiny_lm(), tiny_run(sampling_batch_size=4000, max_length=9, max_prompt_length=8)
    own = transformers.GenerationConfig(
        do_sample=False, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=50.0,
        no_repeat_ngram_size=1, min_new_tokens=1, suppress_tokens=[3], bad_words_ids=[[4]],
    )  # fmt: skip
    lm.model.generation_config = own
    torch.manual_seed(0)
    tokens = torch.tensor([y[0] for y in ad.sample(run, lm, [[5, 6, 7]] * 4000)])
    assert lm.model.generation_config is own, "a saved policy keeps the checkpoint's config"
    with torch.no_grad():
        p = lm.model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    share = torch.bincount(tokens, minlength=VOCABULARY) / 4000
    assert (share - p).abs().max() < 4 * 0.5 / math.sqrt(4000), "frequencies are the model's probabilities"


def test_a_sampled_response_keeps_its_end_and_a_cut_one_has_none():
    run = tiny_run(max_length=14, max_prompt_length=8)
    run.stop_ids, run.tokenizer.pad_token = [3, 4], run.tokenizer.convert_ids_to_tokens(3)
    torch.manual_seed(0)
    outputs = ad.sample(run, tiny_lm(), [[5, 6]] * 200)
    ended = [y for y in outputs if y[-1] in (3, 4)]
    cut = [y for y in outputs if y[-1] not in (3, 4)]
    assert ended and cut and all(len(y) == 6 for y in cut)
    assert {y[-1] for y in ended} == {3, 4}
    assert not any(token in (3, 4) for y in outputs for token in y[:-1])


# ------------------------------------------------------------------------------------------------------------
# 6  A language model taken apart
# ------------------------------------------------------------------------------------------------------------


def test_states_are_the_ones_that_predict_the_response():
    """Shift by one: |y| states, from the last prompt position to the last but one of the response."""
    batch = ad.collate([[ad.Response([7, 8, 9], [4, 5])], [ad.Response([6], [1, 2, 3])]], pad_id=0)
    assert batch.input_ids.tolist() == [[7, 8, 9, 4, 5], [6, 1, 2, 3, 0]]
    assert batch.states.tolist() == [2, 3, 5, 6, 7] and batch.targets.tolist() == [4, 5, 1, 2, 3]
    assert batch.response.tolist() == [0, 0, 1, 1, 1] and batch.lengths.tolist() == [2, 3]
    assert batch.weights.tolist() == pytest.approx([1 / 2] * 2 + [1 / 3] * 3)


def test_a_pad_id_that_is_the_end_token_hides_nothing():
    """Notices an end token at a response's end that is not trained on because padding has the same id."""
    end, lm = 9, tiny_lm()
    examples = [[ad.Response([1, end, 2], [3, end])], [ad.Response([4], [5, 6, 7, 8, end])]]
    batch = ad.collate(examples, pad_id=end)
    alone = [response_logps(lm, ad.collate([example], pad_id=0)) for example in examples]
    assert torch.allclose(response_logps(lm, batch), torch.cat(alone), rtol=1e-5)
    assert batch.targets.tolist().count(end) == 2


def test_micro_batches_are_sorted_and_hold_every_example_once():
    sizes = [(1, 1), (9, 9), (3, 4), (2, 2), (30, 30), (5, 5)]
    found = list(ad.micro_batches(tiny_run(tokens_per_micro_batch=20), singles(random_responses(sizes))))
    assert [group for group, _ in found] == [[4], [1], [5, 2], [3, 0]]
    assert [batch.lengths.tolist() for _, batch in found] == [[30], [9], [5, 4], [2, 1]]


def opt():
    """A model whose layers take dropout from numbers of their own, not from a module."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=1,
        num_attention_heads=2, dropout=0.5, attention_dropout=0.5,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


@pytest.mark.parametrize("make", [tiny_gpt2, opt])
def test_dropout_is_off_and_gradient_checkpointing_changes_nothing(make, tmp_path):
    """Notices dropout, and layers that keep their activations."""
    make().save_pretrained(tmp_path)
    plain, lm = (ad.load_lm(tiny_run(gradient_checkpointing=on), str(tmp_path)) for on in (False, True))
    passes, norms = [], [module for module in lm.model.modules() if isinstance(module, torch.nn.LayerNorm)]
    for norm in norms:
        norm.register_forward_hook(lambda *_: passes.append("one"))
    batch = ad.collate(singles(), pad_id=0)
    lm.model.train()
    loss = ad.sft_batch_loss(lm, batch, 1.0)["loss"]
    assert len(passes) > len(norms), "a layer's own are computed again"
    assert torch.equal(loss, ad.sft_batch_loss(plain, batch, 1.0)["loss"])
    assert_same_gradients(gradients(lm.model), gradients(plain.model))


def test_a_teacher_on_another_device_gives_the_same_numbers():
    """Notices a head that stays behind. The 'meta' device stands for a second one, which may not be here."""
    model, batch = tiny_gpt2(), ad.collate(singles(), pad_id=0)
    elsewhere = ad.LM(model, head_device=torch.device("meta"))
    assert elsewhere.head.weight.device.type == "meta" and model.lm_head.weight.device.type == "cpu"
    assert elsewhere.logits(elsewhere.hidden(batch)).device.type == "meta"
    copied = ad.LM(model)
    copied.head = copy.deepcopy(copied.head)  # what another device would hold
    assert torch.equal(copied.logits(copied.hidden(batch)), tiny_lm().logits(tiny_lm().hidden(batch)))


# ------------------------------------------------------------------------------------------------------------
# Families: what people load, as tiny random models
# ------------------------------------------------------------------------------------------------------------

SIZES_BY_NAME = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "ffn_dim": 48, "n_embd": 32,
    "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 2, "n_head": 2, "num_key_value_heads": 1,
    "head_dim": 16, "word_embed_proj_dim": 32, "state_size": 4, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "GPT2": {}, "GPTNeoX": {}, "OPT": {}, "Bloom": {}, "Falcon": {"hidden_dropout": 0.5}, "Phi": {}, "Llama": {},
    "Mistral": {}, "Mixtral": {}, "Qwen2": {}, "Qwen3": {}, "Qwen2Moe": {}, "Gemma2": {}, "Gemma3Text": {},
    "Granite": {}, "Cohere": {}, "Mamba": {}, "StableLm": {}, "Olmo2": {}, "SmolLM3": {},
}  # fmt: skip


def tiny_of(family: str):
    """A random two-layer model of the family, with weights large enough to tell states apart."""
    config_class = getattr(transformers, f"{family}Config")
    known = vars(config_class())
    aliases = config_class.attribute_map
    sizes = {name: size for name, size in SIZES_BY_NAME.items() if name in known or name in aliases}
    torch.manual_seed(0)
    name = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    config = ad.without_dropout(config_class(**{**sizes, **FAMILIES[family]}))
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    """Notices a model whose chunks, left-padded samples or checkpointed layers depart from the model itself."""
    lm, batch = ad.LM(tiny_of(family), chunk_size=5), ad.collate(singles(), pad_id=0)
    ad.check_model(lm, family)

    mask, targets = response_mask(batch), batch.input_ids.roll(-1, 1)
    nll = -ad.token_logps(dense_logits(lm, batch), targets)
    ((nll * mask).sum(-1) / mask.sum(-1)).sum().backward()
    expected = gradients(lm.model)
    lm.model.zero_grad()
    loss = ad.sft_batch_loss(lm, batch, 1.0)["loss"]
    assert loss.item() == pytest.approx(((nll * mask).sum(-1) / mask.sum(-1)).sum().item(), rel=1e-5)
    assert_same_gradients(gradients(lm.model), expected, 1e-4)

    checkpointed = ad.LM(tiny_of(family), chunk_size=5)
    checkpointed.model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed.model.train()
    ad.sft_batch_loss(checkpointed, batch, 1.0)
    assert_same_gradients(gradients(checkpointed.model), expected, 1e-4)

    run, prompts = tiny_run(), [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    config = transformers.GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=4, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    padded = run.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    output = lm.generate(padded.input_ids, padded.attention_mask, config)
    tokens = output.sequences[:, 6:]
    sampled = ad.token_logps(torch.stack(output.logits, 1).float(), tokens)
    responses = [[ad.Response(prompt, row)] for prompt, row in zip(prompts, tokens.tolist())]
    scored = ad.collate(responses, pad_id=0)
    logps = ad.state_logps(lm, scored, lm.hidden(scored))
    assert torch.allclose(sampled.flatten(), logps, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------
# 7  Data
# ------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENGLISH = "The sky is blue because the air scatters light. What colour is the sea? Green, deep, grey, often."
LATIN = "Gallia est omnis divisa in partes tres, quarum unam incolunt Belgae, aliam Aquitani, tertiam Celtae."


def save_tiny_model(folder: Path, text=ENGLISH, vocabulary=320, template=None, width=32, **options) -> Path:
    """A random two-layer GPT-2 with a byte-level BPE tokenizer trained on `text`."""
    special = ["<eos>", "<turn>", "<user>", "<assistant>"]
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocabulary, min_frequency=0, special_tokens=special, show_progress=False)
    assert bpe.get_vocab_size() == vocabulary
    options |= {"tokenizer_object": bpe._tokenizer, "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(**options)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "n_layer": 2, "n_embd": width, "n_head": 2, "n_positions": 128}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def write(path: Path, records: list) -> Path:
    """Records as a file of the kind that its name says."""
    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    if path.suffix == ".csv":
        pd.DataFrame(records).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(records).to_parquet(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(json.dumps(records) if path.suffix == ".json" else text, encoding="utf-8")
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
    """load(dataset, ...) → (run, all pairs in order, held-out records); writes records to a file."""

    def load(dataset, model=base, **settings):
        if isinstance(dataset, list):
            dataset = write(tmp_path / "data.jsonl", dataset)
        args = ad.Args(model=str(model), dataset=str(dataset), device="cpu", **settings)
        args.output_dir = tempfile.mkdtemp(dir=tmp_path)
        run, train_pairs, test_pairs = ad.set_up(args)
        pairs = sorted([*train_pairs, *test_pairs], key=lambda pair: pair["record"])
        return run, pairs, test_pairs["record"][:]

    return load


def texts(run, pair) -> tuple:
    """The prompt, the chosen and the rejected response of a pair, decoded."""
    return tuple(run.tokenizer.decode(pair[name]) for name in ("prompt", "chosen", "rejected"))


SKY = user("Sky?")
TALK = [user("Hi"), assistant("Hello"), SKY]
BLUE, RED = assistant("Blue"), assistant("Red")
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sky?\n\nAssistant:"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Sky?", "chosen": "Blue", "rejected": "Red"}, ("Sky?", "Blue", "Red")),
        ({"prompt": "", "chosen": "the sky", "rejected": "the sea"}, ("", "the sky", "the sea")),
        ({"chosen": "The sky is blue", "rejected": "The sky is black"}, ("The sky is", " blue", " black")),
        ({"chosen": "The sky is blue", "rejected": "The sky is"}, ("The sky is", " blue", "")),
        ({"chosen": "The sky is blue", "rejected": "The sky is bl"}, ("The sky is", " blue", " bl")),
        ({"chosen": "Blue", "rejected": "Black"}, ("", "Blue", "Black")),
        ({"prompt": TALK, "chosen": [BLUE], "rejected": [RED]}, (TALK, "Blue", "Red")),
        ({"prompt": TALK, "chosen": [*TALK, BLUE], "rejected": [*TALK, RED]}, (TALK, "Blue", "Red")),
        ({"chosen": [*TALK, BLUE], "rejected": [*TALK, RED]}, (TALK, "Blue", "Red")),
        ({"prompt": "Sky?", "chosen": [SKY, BLUE], "rejected": [SKY, RED]}, ([SKY], "Blue", "Red")),
        ({"prompt": "Sky?", "chosen": [BLUE], "rejected": [RED]}, ([SKY], "Blue", "Red")),
        ({"chosen": [user("a"), BLUE], "rejected": [user("b"), RED]}, ([user("a")], "Blue", "")),
        ({"chosen": TRANSCRIPT + " Blue", "rejected": TRANSCRIPT + " Red"}, (TALK, "Blue", "Red")),
        ({"chosen": TRANSCRIPT + " Yes", "rejected": "\n\nHuman: a\n\nAssistant: No"}, (TALK, "Yes", "")),
    ],
)
def test_record_of_every_format(record, expected):
    """Notices a format that is taken apart wrongly."""
    assert ad.split_record(record) == expected


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"prompt": "Sky?", "chosen": "Blue"}, "'rejected' is missing"),
        ({"prompt": "Sky?", "rejected": "Blue"}, "'chosen' is missing"),
        ({"prompt": "Sky?", "chosen": 3, "rejected": "Red"}, "'chosen'"),
        ({"prompt": {"text": "Sky?"}, "chosen": "Blue", "rejected": "Red"}, "'prompt'"),
        ({"prompt": "Sky?", "chosen": [BLUE], "rejected": "Red"}, "the other a conversation"),
        ({"prompt": "Sky?", "chosen": ["Blue"], "rejected": ["Red"]}, "'chosen'"),
        ({"chosen": [{"role": "user"}], "rejected": [SKY]}, "'chosen'"),
        ({"prompt": [{"content": "Sky?"}], "chosen": [BLUE], "rejected": [RED]}, "'prompt'"),
        ({"chosen": [], "rejected": []}, "without messages"),
    ],
)
def test_malformed_record(record, complaint):
    """Notices a record of no format that is taken for one, or a complaint about another field."""
    with pytest.raises(ValueError, match=complaint):
        ad.split_record(record)


ODD = [
    {"prompt": "", "chosen": "the sky", "rejected": "the sea"},
    {"prompt": "Say it, with\r\ntwo lines.", "chosen": "One 😀👩‍🚀.\r\nTwo.", "rejected": "שלום, עולם"},
    {"prompt": "ما لون السماء؟", "chosen": "أزرق", "rejected": "naïve “quotes”, commas\tand tabs"},
    {"prompt": "What is the sky?", "chosen": " blue", "rejected": "Red\n"},
    {"prompt": "Is it?", "chosen": "NA", "rejected": "null"},
    {"prompt": "How many?", "chosen": "None", "rejected": "1.50"},
]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])
def test_same_tokens_from_every_file(load, tmp_path, ending):
    """Notices a file format that loses or changes a letter, or takes "", "NA" or "1.50" for no text."""
    run, pairs, _ = load(write(tmp_path / f"odd{ending}", ODD))
    for record, pair in zip(ODD, pairs, strict=True):
        assert pair["instruction"] == record["prompt"]
        prompt, *answers = texts(run, pair)
        assert prompt.removesuffix("\n") == (record["prompt"] or "<eos>")
        assert answers == [record["chosen"] + "<eos>", record["rejected"] + "<eos>"]


def test_a_path_with_a_colon(load, tmp_path):
    """Notices a file whose name holds a colon that is taken for NAME:CONFIG."""
    (tmp_path / "C:data").mkdir()
    run, pairs, _ = load(write(tmp_path / "C:data" / "pairs.jsonl", numbered(3)))
    assert [pair["instruction"] for pair in pairs] == ["What is 0?", "What is 1?", "What is 2?"]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_windows_file(load, tmp_path, ending):
    """Notices a byte-order mark or a Windows line end that gets into the text, or stops the loading."""
    path = write(tmp_path / f"windows{ending}", numbered(3))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    run, pairs, _ = load(path)
    assert [texts(run, pair)[1] for pair in pairs] == ["It is 0.<eos>", "It is 1.<eos>", "It is 2.<eos>"]


def test_length_limits(load, capsys):
    """Notices a cut response with an end token, a whole one without, and a prompt cut from the wrong side."""
    long = {"prompt": "Z" * 50 + "WXY", "chosen": "Z" * 50, "rejected": "XYZ"}  # each letter is a token
    run, pairs, _ = load([long, *numbered(2)], max_length=16, max_prompt_length=8)
    assert texts(run, pairs[0]) == ("ZZZZWXY\n", "ZZZZZZZZ", "XYZ<eos>")
    assert all(len(pair["prompt"]) <= 8 for pair in pairs)
    assert re.search(r"[1-9]\d* of them cut", capsys.readouterr().out)


def test_useless_pairs_are_left_out_aloud(load, capsys):
    """Notices empty or identical responses that are trained on, or left out in silence."""
    chosen = (" ", "b" * 99, "b" * 99 + "c")  # empty, the same, the same when cut
    useless = [{"prompt": "a", "chosen": text, "rejected": "b" * 99} for text in chosen]
    _, pairs, _ = load([useless[0], *numbered(20), *useless[1:]], max_length=64)
    assert [pair["record"] for pair in pairs] == list(range(1, 21))
    assert sum(map(int, re.findall(r"left out (\d+)", capsys.readouterr().out))) == 3


def test_templates(load, chat):
    """Notices a chat template that is not used, or responses that do not end as its turns do."""
    talks = [{"chosen": [*TALK, BLUE], "rejected": [*TALK, RED]}]
    talks += [{"prompt": TALK, "chosen": [BLUE], "rejected": [RED]}]
    run, pairs, _ = load(talks, model=chat)
    expected = "<user>Hi<turn>\n<assistant>Hello<turn>\n<user>Sky?<turn>\n<assistant>"
    assert [texts(run, pair) for pair in pairs] == [(expected, "Blue<turn>", "Red<turn>")] * 2
    run, pairs, _ = load([{"chosen": TRANSCRIPT + " Blue", "rejected": TRANSCRIPT + " Red"}] * 2, model=chat)
    assert texts(run, pairs[0]) == (expected, "Blue<turn>", "Red<turn>")
    run, pairs, _ = load(numbered(2), model=chat)
    assert texts(run, pairs[0])[0] == "<user>What is 0?<turn>\n<assistant>"
    run, pairs, _ = load(talks)
    plain = "User:\nHi\n\nAssistant:\nHello\n\nUser:\nSky?\n\nAssistant:\n"
    assert texts(run, pairs[0]) == (plain, "Blue<eos>", "Red<eos>")
    assert pairs[0]["instruction"] == "Hi\n\nHello\n\nSky?"


def test_stop_and_first_tokens(load, chat, tmp_path):
    """Notices an end token of the checkpoint's generation config, or a first token, that is ignored."""
    run, *_ = load(numbered(2))
    assert run.stop_ids == run.tokenizer.convert_tokens_to_ids(["<eos>"])
    folder = shutil.copytree(chat, tmp_path / "chat")
    transformers.GenerationConfig(eos_token_id=[0, 7]).save_pretrained(folder)
    run, *_ = load(numbered(2), model=folder)
    assert run.stop_ids == [*run.tokenizer.convert_tokens_to_ids(["<turn>", "<eos>"]), 7]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("extra_special_tokens")  # special, but without a name of its own
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    run, *_ = load(numbered(2), model=folder)
    assert "<turn>" not in run.tokenizer.all_special_tokens
    assert run.stop_ids == [*run.tokenizer.convert_tokens_to_ids(["<turn>", "<eos>"]), 7]

    folder = save_tiny_model(tmp_path / "bos", bos_token="<user>")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    start = ("<user>", tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<user> $A", None, [start])
    tokenizer.save_pretrained(folder)
    run, pairs, _ = load(numbered(2), model=folder)
    assert texts(run, pairs[0]) == ("<user>What is 0?\n", "It is 0.<eos>", "Not 0.<eos>")
    run, pairs, _ = load(numbered(2), model=folder, max_length=4, max_prompt_length=1)
    assert pairs[0]["prompt"] == run.first_ids and len(pairs[0]["chosen"]) == 3


def test_template_that_refuses(load, tmp_path):
    """Notices a traceback where the model's own template raises, as Gemma's does for a system message."""
    refusal = "{{ raise_exception('no system role') }}"
    strict = "{% if messages[0].role == 'system' %}" + refusal + "{% endif %}" + TEMPLATE
    talk = [{"role": "system", "content": "Be brief."}, user("Sky?")]
    records = [{"prompt": talk, "chosen": [BLUE], "rejected": [RED]}] * 2
    with pytest.raises(ad.BadInput, match="no system role"):
        load(records, model=save_tiny_model(tmp_path / "strict", template=strict))


def test_held_out_part(load):
    """Notices a held-out part that leaks into training, or that does not follow the seed."""
    parts = []
    for seed in (0, 0, 1):
        _, pairs, held_out = load(numbered(40), seed=seed)
        assert [pair["record"] for pair in pairs] == list(range(40)) and len(held_out) == 4
        parts.append(held_out)
    assert parts[0] == parts[1] != parts[2]


def test_splits_of_a_folder(load, tmp_path):
    """Notices a test split that is not used, a NAME:CONFIG not found, and a split read without need."""
    folder = tmp_path / "splits"
    folder.mkdir()
    for name, records in (("train", numbered(5)), ("test", numbered(9)[5:])):
        write(folder / f"{name}.jsonl", records)
    run, pairs, held_out = load(folder)
    assert [pair["instruction"] for pair in pairs if pair["record"] == 4] == ["What is 4?"]
    assert len(pairs) == 9 and held_out == [0, 1, 2, 3]

    (folder / "broken.jsonl").write_text("{")
    splits = {"train_prefs": "train.jsonl", "test_prefs": "test.jsonl", "train": "broken.jsonl"}
    files = [{"split": split, "path": path} for split, path in splits.items()]
    configs = [{"config_name": "other", "data_files": "test.jsonl"}]
    configs += [{"config_name": "mine", "data_files": files}]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    run, pairs, held_out = load(f"{folder}:mine")
    assert len(pairs) == 9 and held_out == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------------
# 8, 9  The demo world, evaluation and report
# ------------------------------------------------------------------------------------------------------------


HOTEL = "how was the hotel ?"
GOOD = "the room was superb . overall it was superb ."


def test_the_truth_depends_on_context():
    for review, rewards in {
        "the bed was superb . overall it was bad .": [0, 0, 0, 2, 0, 0, 0, 0, -1, 0, 0],
        "the bed was very good . overall it was not superb .": [0, 0, 0, 0, 1.5, 0, 0, 0, 0, 0, -2, 0, 0],
        "the bed was not very awful": [0, 0, 0, 0, 0, 2, -2],
        "superb the bed superb was good": [-2, 0, 0, -2, 0, 1, -2],
        "the cake was good , the cake was .": [0, -2, 0, 1, 0, 0, -2, 0, -2, -2],
    }.items():
        assert [word.reward for word in ad.judge_words(HOTEL, review)] == rewards, review
    assert ad.true_reward(HOTEL, "the bed was superb . overall it was bad .") == 0.5
    longer = "the bed was superb and the room was very superb . overall it was superb ."
    assert ad.true_reward(HOTEL, longer) == ad.true_reward(HOTEL, GOOD) == 2, "length earns nothing"


BROKEN = [
    "", "superb", "superb .", "overall", ".", "the", "the room was superb", "the room was superb .", GOOD[:-2],
    GOOD.replace("superb", "superb superb"), GOOD.replace("superb", "very very superb"), GOOD + " superb",
    GOOD.replace("room", "coffee"), GOOD.replace("room", ""), GOOD.replace("the", ""), GOOD + " " + GOOD,
    "the room was superb , " + GOOD, "the room was superb and " * 20, "superb " * 40, "overall it was superb .",
    "the room was . overall it was superb .", "the room was not . overall it was superb .",
    "the room was superb . the bed was superb .", "really the lovely . bed was it overall ,",
    "the room bed was superb . overall it was superb .", "the breakfast was lovely , the breakfast was not .",
]  # fmt: skip


@pytest.mark.parametrize("review", BROKEN)
def test_broken_language_earns_nothing(review):
    """Notices a review that no person would write and that earns more than the worst that one would."""
    assert not ad.well_formed(HOTEL, review)
    assert ad.true_reward(HOTEL, review) == -2


def test_no_edit_of_a_review_earns_by_breaking_it():
    """Each word of real reviews left out, doubled, or another one put before it or in its place."""
    draw = random.Random(0)
    for record in ad.demo_records(100, seed=5):
        prompt, words = record["prompt"], record["chosen"].split()
        assert ad.well_formed(prompt, record["chosen"]) and ad.well_formed(prompt, record["rejected"])
        for i in range(len(words)):
            other = draw.choice(ad.DEMO_WORDS)
            for middle in ([], [words[i], words[i]], [other, words[i]], [other]):
                edited = " ".join([*words[:i], *middle, *words[i + 1 :]])
                if not ad.well_formed(prompt, edited):
                    assert ad.true_reward(prompt, edited) <= ad.true_reward(prompt, record["chosen"])


def test_demo_records_are_mixed_noisy_and_seeded():
    records = ad.demo_records(400, seed=3)
    assert records == ad.demo_records(400, seed=3) != ad.demo_records(400, seed=4)
    words = {word for record in records for text in record.values() for word in text.split()}
    assert words <= set(ad.DEMO_WORDS)
    gaps = []
    for record in records:
        prompt = record["prompt"]
        rewards = [word.reward for word in ad.judge_words(prompt, record["chosen"])]
        assert min(rewards) < 0 < max(rewards)
        gaps.append(ad.true_reward(prompt, record["chosen"]) - ad.true_reward(prompt, record["rejected"]))
    expected = statistics.mean(1 / (1 + math.exp(-4 * abs(gap))) for gap in gaps)
    assert statistics.mean(gap > 0 for gap in gaps) == pytest.approx(expected, abs=0.06), "Bradley-Terry"
    assert ad.demo_model(0).num_parameters() < 150_000


def four_lms():
    return {name: tiny_lm(seed) for seed, name in enumerate(("reference", "dpo", "reverse_dpo", "policy"))}


def random_pairs():
    """Two pairs of random tokens, as a data set."""
    rows, responses = [], random_responses()
    for chosen, rejected in zip(responses[:2], responses[2:]):
        rows.append({"prompt": chosen.prompt, "chosen": chosen.tokens, "rejected": rejected.tokens})
    return datasets.Dataset.from_list(rows).add_column("instruction", ["first", "second"])


@torch.no_grad()
def log_probabilities(lm, prompt, tokens):
    """log π of the vocabulary at each state of a response, (|y|, V), in float64."""
    logits = lm.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def response_logp(lm, prompt, tokens):
    return log_probabilities(lm, prompt, tokens)[range(len(tokens)), tokens].sum().item()


def test_scores_of_samples_by_hand():
    """Notices a wrong r_ctr, KL from π_ref or entropy of a model's own responses."""
    lms, run, rows = four_lms(), tiny_run(dataset="other", beta=0.3), random_pairs().to_list()
    table = ad.sample_and_score(run, lms, "policy", rows)
    torch.manual_seed(ad.seed_of(0, "evaluation", 0))
    outputs = ad.sample(run, lms["policy"], [row["prompt"] for row in rows])
    for found, y, row in zip(table.to_dict("records"), outputs, rows, strict=True):
        logp = {name: log_probabilities(lm, row["prompt"], y) for name, lm in lms.items()}
        own, r_ctr = logp["policy"].exp(), 0.3 * (logp["dpo"] - logp["reverse_dpo"])
        expected = {
            "reward": r_ctr[range(len(y)), y].sum().item(),
            "kl_ref": (own * (logp["policy"] - logp["reference"])).sum().item(),
            "entropy": -(own * logp["policy"]).sum(-1).mean().item(),
        }
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert (found["generator"], found["instruction"]) == ("policy", row["instruction"])
        assert found["tokens"] == y and found["length"] == len(y)


def test_reward_accuracy_by_hand():
    """Notices two models that are mixed up, and a tie that is taken for a preference."""
    lms, pairs = four_lms(), random_pairs()
    margins = {}
    for name, lm in lms.items():
        columns = [[response_logp(lm, row["prompt"], row[key]) for row in pairs] for key in KEYS]
        expected = torch.tensor(columns).T
        assert torch.allclose(ad.pair_logps(tiny_run(), lm, pairs, ""), expected, rtol=1e-5)
        margins[name] = expected[:, 0] - expected[:, 1]
    table = ad.reward_accuracy(tiny_run(), lms, pairs)
    sides = {"dpo": ("dpo", "reference"), "reverse": ("reference", "reverse_dpo")}
    for name, (better, worse) in (sides | {"contrastive": ("dpo", "reverse_dpo")}).items():
        assert table.accuracy[name] == (margins[better] > margins[worse]).double().mean(), name
    lms["reverse_dpo"] = lms["dpo"]
    assert ad.reward_accuracy(tiny_run(), lms, pairs).accuracy["contrastive"] == 0


def test_reference_logps_of_another_reference(load, tmp_path):
    """Notices log-probabilities of one reference read for another, or computed twice for the same."""
    run, *_ = load(numbered(5), limit=4)
    pairs = random_pairs()
    lm = ad.load_lm(run, run.args.model)
    first = ad.add_reference_logps(run, run.args.model, pairs)
    (file,) = run.out.glob("reference_logps-*.pt")
    torch.save(torch.ones(2, 2), file)
    assert ad.add_reference_logps(run, run.args.model, pairs)["ref_chosen"][:] == [1, 1], "it is read again"
    lm.model.transformer.h[0].mlp.c_fc.bias.data += 0.1
    lm.model.save_pretrained(tmp_path / "other")
    other = ad.add_reference_logps(run, str(tmp_path / "other"), pairs)
    assert 1 not in other["ref_chosen"] and other["ref_chosen"][:] != first["ref_chosen"][:]
    assert len(list(run.out.glob("reference_logps-*.pt"))) == 2


def test_shaded_response():
    """Notices a wrong colour or number of a token, and text that gets into the page as HTML."""
    lms, run = four_lms(), tiny_run(beta=0.3, alpha_r=2.0)
    prompt, tokens = [5, 6], [0, 9, 12, 3]  # 0 is "<pad>"
    spans = ad.shade(run, ad.Teacher(run.args, lms.get), ad.Response(prompt, tokens)).split("</span>")
    dpo, rev = (log_probabilities(lms[name], prompt, tokens) for name in ("dpo", "reverse_dpo"))
    for span, reward in zip(spans, 0.3 * (dpo - rev)[range(4), tokens]):
        assert f"reward {reward:+.3f}," in span and ("46,160,67" in span) == (reward > 0)
    assert "&lt;pad&gt;" in spans[0] and "<pad>" not in spans[0]


# ------------------------------------------------------------------------------------------------------------
# 10  The run: models, and bad input on the command line
# ------------------------------------------------------------------------------------------------------------


def test_weights_move_at_a_learning_rate_of_1e_6(tmp_path):
    """Notices a bfloat16 checkpoint that is trained in bfloat16, where a step of 1e-6 is lost in rounding."""
    tiny_gpt2().to(torch.bfloat16).save_pretrained(tmp_path / "stored")
    run, batch = tiny_run(), ad.collate(singles(), pad_id=0)
    lm = ad.load_lm(run, str(tmp_path / "stored"))
    before = copy.deepcopy(lm.model.state_dict())
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=1e-6, weight_decay=0, fused=True)
    ad.sft_batch_loss(lm, batch, 1 / 4)
    optimizer.step()
    assert all(weight.dtype == torch.float32 for weight in lm.model.parameters())
    weight = "transformer.h.0.mlp.c_fc.weight"
    assert (lm.model.state_dict()[weight] != before[weight]).float().mean() > 0.9


def test_a_frozen_copy_is_the_model_itself(tmp_path):
    """Notices a frozen model of another precision: a policy and its own saved copy must not differ."""
    lm, batch = ad.LM(tiny_gpt2(), chunk_size=512), ad.collate(singles(), pad_id=0)
    lm.model.save_pretrained(tmp_path)
    frozen = ad.load_lm(tiny_run(), str(tmp_path))
    assert {parameter.dtype for parameter in frozen.model.parameters()} == {torch.float32}
    with torch.no_grad():
        ours, theirs = (x.logits(x.hidden(batch)) for x in (lm, frozen))
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    assert ad.reverse_kl(ours, theirs).abs().max() < 1e-5


def test_an_unsupported_architecture_is_refused(monkeypatch, tmp_path):
    """Notices logits that are not head(body(tokens)) and are trained on all the same."""
    tiny_gpt2().save_pretrained(tmp_path)
    own = transformers.GPT2LMHeadModel.forward

    def doubled(self, *args, **options):
        output = own(self, *args, **options)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", doubled)
    with pytest.raises(ad.BadInput, match="not supported"):
        ad.check_model(ad.load_lm(tiny_run(), str(tmp_path)), "doubled")


FORK = torch.multiprocessing.get_context("forkserver")  # real processes, which need not import torch each
FORK.set_forkserver_preload(["test_aligndistil", "transformers.models.gpt2.modeling_gpt2"])
SMALL = {"device": "cpu", "max_steps": 3, "limit": 64, "eval_pairs": 20, "eval_prompts": 8, "batch_size": 16}
STAGES = ("sft", "dpo", "reverse_dpo", "policy")
RATES = {"sft_learning_rate": 1e-3, "dpo_learning_rate": 1e-3, "distill_learning_rate": 1e-3}
EPOCHS = {"sft_epochs": 3, "dpo_epochs": 3, "distill_epochs": 3}
RESUMED = SMALL | RATES | EPOCHS | {"max_steps": 6, "save_steps": 2}


def align(base, prepared, out, **settings):
    """A run of the small model on good.jsonl."""
    paths = {"model": str(base), "dataset": str(prepared / "good.jsonl"), "output_dir": str(out)}
    return ad.align(ad.Args(**paths, **settings))


def flags(**settings) -> list:
    """Settings as a command line."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


BAD = {  # what is wrong: (flags, where {} is a folder of prepared files; what the error line must say)
    "no such model": ("--model {}/nowhere", r"model .*nowhere .*neither a local folder nor"),
    "no such dataset": ("--dataset {}/nowhere.jsonl", r"nowhere\.jsonl cannot be read .*nowhere\.jsonl"),
    "model of an unreachable hub": ("--model gpt2", r"model gpt2 .*hub is out of reach"),
    "dataset of an unreachable hub": ("--dataset some/pairs", r"some/pairs .*hub is out of reach"),
    "missing field": ("--dataset {}/missing.jsonl", r"missing\.jsonl, record 1 .*'chosen' is missing"),
    "number for text": ("--dataset {}/number.jsonl", r"number\.jsonl, record \d+ .*: field 'chosen'"),
    "mixed types": ("--dataset {}/mixed.jsonl", r"mixed\.jsonl, record 1 .*: field 'chosen'"),
    "other columns": ("--dataset {}/columns.jsonl", r"columns\.jsonl .*'chosen' and 'rejected'"),
    "not JSON": ("--dataset {}/broken.jsonl", r"broken\.jsonl cannot be read .*JSON parse error"),
    "no JSON object": ("--dataset {}/list.jsonl", r"list\.jsonl cannot be read"),
    "not JSON at all": ("--dataset {}/broken.json", r"broken\.json cannot be read"),
    "not UTF-8": ("--dataset {}/latin.jsonl", r"latin\.jsonl, record 2 .*utf-8"),
    "half an emoji": ("--dataset {}/half.jsonl", r"half\.jsonl"),
    "empty file": ("--dataset {}/empty.jsonl", r"empty\.jsonl"),
    "identical pairs": ("--dataset {}/identical.jsonl", r"identical\.jsonl: no usable pair to train on"),
    "one pair": ("--dataset {}/one.jsonl", r"one\.jsonl has no test split, and no tenth"),
    "unknown split": ("--train_split nowhere", r"--train_split nowhere: .* has only train"),
    "unknown config": ("--dataset {}/splits:nowhere", r"splits:nowhere cannot be read"),
    "no room": ("--max_length 20 --max_prompt_length 19", r"--max_length 20 leaves no room"),
    "too long": ("--max_length 129", r"--max_length 129 .*128 positions"),
    "teacher's vocabulary": ("--dpo {}/smaller", r"teacher .*smaller: its vocabulary or tokenizer"),
    "teacher's tokenizer": ("--reverse_dpo {}/latin", r"teacher .*latin: its vocabulary or tokenizer"),
    "corrupt weights": ("--model {}/corrupt", r"model .*corrupt cannot be loaded"),
    "weights not finite": ("--model {}/nan", r"model .*nan.*finite"),
    "no safetensors": ("--model {}/splits", r"model .*splits.* no safetensors file"),
    "demo model, other data": ("--model demo", r"--model demo .*good\.jsonl"),
    "beta": ("--beta 0", r"--beta is 0\.0"),
    "learning rate": ("--sft_learning_rate -1e-5", r"--?sft_learning_rate"),
    "alpha_r": ("--alpha_r -1", r"--alpha_r is -1\.0"),
    "batch size": ("--batch_size 0", r"--batch_size is 0"),
    "warm-up": ("--warmup_ratio 2", r"--warmup_ratio is 2\.0"),
    "alpha": ("--alpha foo", r"--alpha: invalid .*'foo'"),
    "judge without one output": ("--judge {}/two_outputs", r"judge .*two_outputs has 2 outputs: name a reward"),
    "no judge": ("--judge nowhere/judge", r"model nowhere/judge cannot be had .*nowhere|hub is out of reach"),
    "alpha 0 of the reference": ("--alpha 0 --reward vanilla", r"--alpha 0 --reward vanilla"),
    "unknown flag": ("--lerning_rate 1", r"--lerning_rate"),
    "device": ("--device cuda:7", r"device cuda:7 is not there"),
    "output below a file": ("--output_dir {}/file/out", r"output folder .*file/out cannot be used"),
    "output of mine": ("--output_dir {}/mine", r"output folder .*mine holds files and no run"),
    "output of another run": ("--output_dir {}/run --beta 0.2", r"with other settings \(beta 0\.1 → 0\.2\)"),
    "output of other data": ("--output_dir {}/run --dataset {}/other.jsonl", r"settings \(dataset .*other"),
    "output in use": ("--output_dir {}/busy", r"another process .*busy"),
}


def in_folder(folder: Path) -> dict:
    """Every file below a folder, with its content."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, base):
    """A folder of what the commands of BAD take, and of a finished run."""
    folder, good = tmp_path_factory.mktemp("prepared"), numbered(40)
    lines = [json.dumps(record) for record in good]
    for name, records in {
        "good": good,
        "other": numbered(41),
        "missing": [good[0], {"prompt": "a", "rejected": "b"}, *good],
        "number": [record | {"chosen": 3} for record in good],
        "mixed": [good[0], good[1] | {"chosen": 3}, *good],
        "columns": [{"question": "a", "answer": "b"}],
        "list": [["prompt", "chosen"], *good],
        "empty": [],
        "identical": [record | {"rejected": record["chosen"]} for record in good],
        "one": good[:1],
    }.items():
        write(folder / f"{name}.jsonl", records)
    for name in ("splits", "mine/policy"):
        (folder / name).mkdir(parents=True)
        write(folder / name / "train.jsonl", good)
    (folder / "file").touch()
    (folder / "broken.jsonl").write_text("\n".join([lines[0], lines[1][:-5], *lines]))
    (folder / "broken.json").write_text("[" + ",\n".join([lines[0], lines[1][:-5], *lines]) + "]")
    latin, half = '{"prompt": "naïve"}', r'{"prompt": "a", "chosen": "\ud83d", "rejected": "b"}'
    (folder / "latin.jsonl").write_bytes("\n".join([*lines[:2], latin, *lines]).encode("latin-1"))
    (folder / "half.jsonl").write_text("\n".join([half, *lines]))
    save_tiny_model(folder / "smaller", vocabulary=310)
    save_tiny_model(folder / "wider", width=48)
    save_tiny_model(folder / "latin", text=LATIN)
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    judge.save_pretrained(folder / "two_outputs")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder / "two_outputs")
    for name in ("corrupt", "nan"):
        shutil.copytree(base, folder / name)
    weights = folder / "corrupt" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    poisoned = {name: x.clone() for name, x in load_file(folder / "nan" / "model.safetensors").items()}
    poisoned["transformer.ln_f.weight"][0] = torch.nan
    save_file(poisoned, folder / "nan" / "model.safetensors", {"format": "pt"})
    align(base, folder, folder / "run", **RESUMED)
    shutil.copytree(folder / "run", folder / "busy")
    return folder


def lines_of(errors: str) -> list:
    """The lines of standard error, without the progress bars."""
    bar = r"[^\r\n]*\[\d[^]\r\n]*/(s|it|ex)[^]\r\n]*\]"
    return [line for line in re.sub(bar, "\n", errors).splitlines() if line.strip()]


def command(folder: Path, *arguments) -> tuple:
    """The command line as a process of its own: (exit status, lines of standard error)."""
    process = FORK.Process(target=command_line, args=(folder, list(map(str, arguments))))
    process.start()
    process.join(60)
    process.kill()
    return process.exitcode, lines_of((folder / "stderr").read_text())


def command_line(folder: Path, arguments: list) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
    sys.argv = ["aligndistil.py", *arguments]
    sys.exit(ad.main())


@pytest.mark.parametrize("name", BAD)
def test_bad_input(prepared, base, tmp_path, name):
    """Notices bad input that gives a traceback, a vague message, another exit status, or written files."""
    arguments = BAD[name][0].replace("{}", str(prepared)).split()
    out = Path(arguments[1]) if "--output_dir" in arguments else tmp_path / "out"
    settings = {"model": base, "dataset": prepared / "good.jsonl", "output_dir": out, **RESUMED}
    before = in_folder(out)
    with filelock.FileLock(prepared / "busy" / ".lock"):  # as another run would hold it
        status, errors = command(tmp_path, *flags(**settings), *arguments)
    assert status == 2 and len(errors) == 1, errors
    assert errors[0].startswith("aligndistil.py: error: ") and re.search(BAD[name][1], errors[0]), errors
    assert in_folder(out) == before and out.exists() == bool(before)


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (torch.OutOfMemoryError("out of memory"), 2, ["--tokens_per_micro_batch", "--gradient_checkpointing"]),
        (KeyboardInterrupt(), 130, ["stopped", "the same command goes on"]),
    ],
)
def test_how_a_run_ends(monkeypatch, capsys, raised, status, words):
    """Notices a full memory or a Ctrl-C that ends in a traceback, or without a word on how to go on."""

    def align(args):
        raise raised

    monkeypatch.setattr(ad, "align", align)
    monkeypatch.setattr(sys, "argv", ["aligndistil.py"])
    assert ad.main() == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aligndistil.py: error: ") and all(word in line for word in words)


@pytest.mark.parametrize("stage", ["sft", "dpo", "distill"])
def test_loss_that_is_not_finite(prepared, base, tmp_path, stage):
    """Notices a run that goes on, or is silent about where it was, when its weights explode."""
    settings = {"model": base, "dataset": prepared / "good.jsonl", "output_dir": tmp_path / "out"}
    settings |= SMALL | {f"{stage}_learning_rate": 1e30}
    status, (line,) = command(tmp_path, *flags(**settings))
    assert status == 2
    assert re.match(r"aligndistil\.py: error: \w+: .*step [123] \(records \[\d+, ", line)


# ------------------------------------------------------------------------------------------------------------
# 10  The run: what it leaves, kills and going on, several processes
# ------------------------------------------------------------------------------------------------------------



def metrics(folder: Path) -> list:
    """The whole lines of metrics.jsonl so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line[-1] == "\n"]


def assert_same_run(folder: Path, reference: Path) -> None:
    for stage in STAGES:
        ours, theirs = ((x / stage / "model.safetensors").read_bytes() for x in (folder, reference))
        assert ours == theirs, stage
    for ours, theirs in zip(metrics(folder), metrics(reference), strict=True):
        assert ours | {"tokens_per_s": theirs["tokens_per_s"]} == theirs
    assert (folder / "results.json").read_bytes() == (reference / "results.json").read_bytes()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The output folder of a short run of the demo."""
    folder = tmp_path_factory.mktemp("demo")
    ad.align(ad.parse_args(flags(output_dir=folder, **SMALL)))
    return folder


def test_finished_run(prepared, base):
    """Notices a finished run that is done again, changed, or answered with anything but its results."""
    before = in_folder(prepared / "run")
    results = align(base, prepared, prepared / "run", **RESUMED)
    assert in_folder(prepared / "run") == before
    assert results == json.loads((prepared / "run" / "results.json").read_text())


EVERY_STEP = {"stage", "step", "loss", "tokens", "grad_norm", "learning_rate", "tokens_per_s"}
OF_DPO = {"accuracy", "margin", "reward_chosen", "reward_rejected"}
OF_POLICY = {"alpha", "beta_t", "kl_teacher", "implausible", "reward", "entropy", "kl_dpo", "length"}


@pytest.mark.parametrize("of_demo", [False, True])
def test_what_a_run_leaves(prepared, demo, of_demo):
    """Notices a missing model, tokenizer, column or number in the output folder."""
    folder, steps, truth = prepared / "run", 6, set()
    if of_demo:
        folder, steps, truth = demo, 3, {"true_reward", "well_formed"}
    columns = {"sft": set(), "dpo": OF_DPO, "reverse_dpo": OF_DPO, "policy": OF_POLICY | truth}
    lines = metrics(folder)
    expected = list(itertools.product(STAGES, range(1, steps + 1)))
    assert [(line["stage"], line["step"]) for line in lines] == expected
    for line in lines:
        assert line.keys() == EVERY_STEP | columns[line["stage"]]
    for stage in STAGES:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / stage)
        assert len(transformers.AutoTokenizer.from_pretrained(folder / stage)) <= model.config.vocab_size

    results, samples = (json.loads((folder / f"{name}.json").read_text()) for name in ("results", "samples"))
    scores = {"reward", "kl_ref", "length", "entropy", "distinct"} | truth
    if of_demo:
        scores |= {"win_rate", "win_rate_pm", "true_reward_pm"}
    assert list(results["models"]) == ["reference", "dpo", "reverse_dpo", "policy"]
    for name, row in results["models"].items():
        assert row.keys() == scores
        mean = statistics.mean(sample["kl_ref"] for sample in samples if sample["generator"] == name)
        assert row["kl_ref"] == pytest.approx(mean) and (abs(mean) < 1e-5) == (name == "reference")
    assert results["reward_accuracy"].keys() == {"dpo", "reverse", "contrastive"}
    for row in results["reward_accuracy"].values():
        assert 0 <= row["accuracy"] <= 1 and row["pairs"] == (20 if of_demo else 4)

    assert len(samples) == 4 * (8 if of_demo else 4)
    columns = {"instruction", "output", "generator"} | scores - {"distinct", "win_rate_pm", "true_reward_pm"}
    assert all(sample.keys() == columns for sample in samples)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"src=|@import|<script", page)
    shown = samples if len(samples) == 16 else [sample for i, sample in enumerate(samples) if i % 8 < 6]
    assert page.count("<span") == sum(sample["length"] for sample in shown)
    assert json.loads((folder / "config.json").read_text())["alpha_r"] == (5.0 if of_demo else 30.0)
    assert not list(folder.glob("*.partial")) and not list(folder.glob("checkpoint*"))


@pytest.mark.parametrize("chat", [False, True])
def test_judge_and_vanilla(prepared, base, tmp_path, chat):
    """Notices scores of another text or order than the judge's own, and a reverse model trained for nothing."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }};{% endfor %}"
        tokenizer.model_max_length = 12  # the judge sees no more
    tokenizer.save_pretrained(tmp_path / "judge")
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=1, n_head=2, num_labels=1
    )
    judge = transformers.GPT2ForSequenceClassification(config).eval()
    judge.save_pretrained(tmp_path / "judge")
    settings = {"judge": str(tmp_path / "judge"), "reward": "vanilla", "max_steps": 1}
    align(base, prepared, tmp_path / "out", **RESUMED | settings)
    results, samples = (
        json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("results", "samples")
    )
    assert list(results["models"]) == ["reference", "dpo", "policy"]
    assert list(results["reward_accuracy"]) == ["dpo"]
    assert {"reward_dpo", "judge", "judge_pm", "win_rate", "win_rate_pm"} <= results["models"]["policy"].keys()
    assert not (tmp_path / "out" / "reverse_dpo").exists()
    for sample in samples:
        text = sample["instruction"] + sample["output"]
        if chat:
            text = f"u {sample['instruction']};a {sample['output']};"
        score = judge(**tokenizer(text, truncation=True, return_tensors="pt")).logits.item()
        assert sample["judge"] == pytest.approx(score, abs=1e-5)
    wins = [x["judge"] > y["judge"] for x, y in zip(samples[8:], samples[:4])]
    ties = [x["judge"] == y["judge"] for x, y in zip(samples[8:], samples[:4])]
    expected = statistics.mean(wins) + statistics.mean(ties) / 2
    assert results["models"]["policy"]["win_rate"] == pytest.approx(expected)


def test_teachers_of_another_width(prepared, base, tmp_path):
    """Notices a teacher that is refused for its hidden size: only logits have to agree."""
    teachers = {name: str(prepared / "wider") for name in ("dpo", "reverse_dpo")}
    align(base, prepared, tmp_path, **RESUMED | teachers | {"max_steps": 1})
    assert (tmp_path / "policy").exists()


def test_gradient_checkpointing_of_a_whole_run(prepared, base, tmp_path, monkeypatch):
    """Notices a step that does not recompute, samples without a cache, or changes one weight."""
    loss_of, generate, modes = ad.backward_in_chunks, ad.LM.generate, []

    def loss_watched(lm, *rest):
        modes.append(("loss", lm.model.training))
        return loss_of(lm, *rest)

    def generate_watched(lm, *rest):
        modes.append(("sample", lm.model.training))
        return generate(lm, *rest)

    monkeypatch.setattr(ad, "backward_in_chunks", loss_watched)
    monkeypatch.setattr(ad.LM, "generate", generate_watched)
    align(base, prepared, tmp_path, **RESUMED | {"gradient_checkpointing": True})
    assert set(modes) == {("loss", True), ("sample", False)}
    assert_same_run(tmp_path, prepared / "run")


def test_a_model_without_checkpointing_is_refused_first(prepared, base, tmp_path, monkeypatch):
    """Notices a refusal that comes only when the first stage begins, with the folder begun."""
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "supports_gradient_checkpointing", False)
    with pytest.raises(ad.BadInput, match="does not support .* checkpointing"):
        align(base, prepared, tmp_path / "out", **RESUMED | {"gradient_checkpointing": True})
    assert not (tmp_path / "out").exists()


def test_the_seed_decides(prepared, base, tmp_path):
    """Notices a seed that is ignored. That the same one gives the same weights, the kills below show."""
    align(base, prepared, tmp_path, seed=1, **RESUMED)
    for stage in STAGES:
        ours, others = ((x / stage / "model.safetensors").read_bytes() for x in (tmp_path, prepared / "run"))
        assert ours != others, stage


def test_the_schedule_and_the_start_of_the_policy(prepared, base, tmp_path):
    """Notices a wrong warm-up or decay, teachers trained again, and a policy that starts elsewhere."""
    teachers = {name: str(prepared / "run" / name) for name in ("dpo", "reverse_dpo")}
    settings = SMALL | teachers | {"max_steps": 20, "distill_epochs": 20, "warmup_ratio": 0.2, "sft": False}
    settings |= {"init_from": "dpo", "off_policy": True, "distill_learning_rate": 1e-12}
    align(base, prepared, tmp_path, **settings)
    assert not (tmp_path / "dpo").exists() and {line["stage"] for line in metrics(tmp_path)} == {"policy"}
    rates = [line["learning_rate"] / 1e-12 for line in metrics(tmp_path)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, *(i / 16 for i in range(16, 0, -1))])
    folders = (tmp_path / "policy", prepared / "run" / "dpo", base)
    policy, dpo, start = (load_file(folder / "model.safetensors") for folder in folders)
    moved = [max((policy[name] - x[name]).abs().max().item() for name in policy) for x in (dpo, start)]
    assert moved[0] < 1e-9 < moved[1]


def test_kills_change_nothing(prepared, base, tmp_path):
    """Notices what a kill at any moment breaks, repeats or loses: one weight, one line, one result."""
    draw, path, kills = random.Random(0), tmp_path / "metrics.jsonl", []

    def start():
        process = FORK.Process(target=align, args=(base, prepared, tmp_path), kwargs=RESUMED)
        process.start()
        return process

    def written():
        return path.stat().st_mtime_ns if path.exists() else 0

    for lines in sorted(draw.sample(range(1, 25), 12)):  # of the 24 that the whole training writes
        before, process = written(), start()
        while process.is_alive() and (written() == before or len(metrics(tmp_path)) < lines):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills.append(metrics(tmp_path)[-1]["stage"])
    process = start()
    process.join()
    assert len(kills) >= 8 and len(set(kills)) >= 3 and process.exitcode == 0
    assert_same_run(tmp_path, prepared / "run")


def test_leftovers_of_a_kill(prepared, base, tmp_path, capsys):
    """Notices leftovers of a kill that are taken for whole, and finished stages that are done twice."""
    out = shutil.copytree(prepared / "run", tmp_path / "out")
    for name in ("results.json", "samples.json", "report.html"):
        (out / name).unlink()
    shutil.rmtree(out / "policy")
    shutil.copytree(out / "sft", out / ".policy.partial")
    (out / ".checkpoint-policy.pt.partial").write_bytes(b"half")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"stage": "policy", "st')
    align(base, prepared, out, **RESUMED)
    shown = capsys.readouterr().out
    assert all(f"{stage}: finished before" in shown for stage in STAGES[:3])
    assert not list(out.glob(".*.partial"))
    assert_same_run(out, prepared / "run")


def test_torchrun(tmp_path):
    """Notices two processes that train on something else than one does, or that both write."""
    # teachers that differ: else the KL to them is 1e-4 and carries float32's rounding of the logits
    settings = SMALL | {"off_policy": True, "dpo_learning_rate": 1e-3}
    ad.align(ad.parse_args(flags(output_dir=tmp_path / "1", **settings)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, ad.__file__, *flags(output_dir=tmp_path / "2", **settings)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("models, metrics, samples and results are in") == 1
    one, two = (metrics(tmp_path / world) for world in "12")
    assert len(one) == len(two) == 12
    for ours, theirs in zip(one[::3], two[::3]):  # the first step of every stage
        for name in ("tokens", "loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (ours["stage"], name)


def gradients_of_rank(rank: int, world: int, folder: Path) -> None:
    """Loss and gradient of every loss, of this rank's share of the examples; rank 0 saves them."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    run, found = tiny_run(tokens_per_micro_batch=16), {}
    for name, (loss_of, examples) in losses_and_examples().items():
        sums, found[name] = step_gradient(run, tiny_lm(), examples[rank::world], loss_of, n=len(examples))
        found[name]["loss"] = torch.tensor(ad.means_over_ranks(run, sums, len(examples))["loss"])
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


def test_gradient_of_two_processes(tmp_path):
    """Notices shares of two processes that do not add up to the whole batch's loss and gradient."""
    start = torch.multiprocessing.start_processes
    start(gradients_of_rank, (2, tmp_path), nprocs=2, start_method="forkserver")
    found = torch.load(tmp_path / "found.pt")
    for name, (loss_of, examples) in losses_and_examples().items():
        sums, expected = step_gradient(tiny_run(), tiny_lm(), examples, loss_of)
        expected["loss"] = sums["loss"] / len(examples)
        assert_same_gradients(found[name], expected, 1e-5)


# ------------------------------------------------------------------------------------------------------------
# The notebook
# ------------------------------------------------------------------------------------------------------------

NOTEBOOK = Path(ad.__file__).with_name("tutorial.ipynb")


def notebook_cells(kind: str) -> list:
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == kind]


def markdown_outputs(cell) -> list:
    outputs = [output.get("data", {}) for output in cell.outputs]
    return [data["text/markdown"] for data in outputs if "text/markdown" in data]


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
    """Notices a notebook not run from top to bottom, with an error, a warning or a path of a machine."""
    code = notebook_cells("code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr|var|Users)/", str(outputs))
    assert [cell.source for cell in code if len(cell.source.splitlines()) > 27] == []


def test_the_notebook_shows_the_current_source():
    """Notices source or a line number that is no more aligndistil.py's: run the notebook again."""
    shown, lines = 0, []
    for cell in notebook_cells("code"):
        names = []
        for call, given in re.findall(r"^(show|excerpt)\((.*)\)$", cell.source, re.M):
            given = given.split(", ")
            names += given if call == "show" else given[:1]
        sources = [text for text in markdown_outputs(cell) if text.startswith("```python")]
        for name, source in zip(names, sources, strict=True):
            code = inspect.getsource(named(name.removeprefix("ad.")))
            without_docstring = re.sub(r'^ *"{3}.*?"{3}\n+', "", code, count=1, flags=re.M | re.S)
            source = source.removeprefix("```python\n").removesuffix("```")
            assert source == without_docstring or (source in code and source.count("\n") > 3), name
        shown += len(names)
        for text in markdown_outputs(cell):
            lines += re.findall(r"^\| [\d, ]+ \|.*\| `([\w.]+)` \| (\d+) \|", text, re.M)
    assert shown >= 8 and len(lines) >= 8
    for name, line in lines:
        assert int(line) == inspect.getsourcelines(named(name))[1], name


def test_readme_notebook_and_code_agree():
    """Notices a number of the README that is not the notebook's, or a default that is not the code's."""
    readme = NOTEBOOK.with_name("README.md").read_text(encoding="utf-8")
    tables = [output.data["text/html"] for cell in notebook_cells("code") for output in cell.outputs
              if "well_formed</th>" in output.get("data", {}).get("text/html", "")]  # fmt: skip
    columns = re.findall(r"<th>(\w+)</th>", tables[0].partition("</thead>")[0])
    (header,) = re.findall(r"^ +(reward +kl_ref.*)$", readme, re.M)
    compared = 0
    for model in ("reference", "dpo", "policy"):
        (cells,) = re.findall(rf"<th>{model}(?:, r = 5)?</th>((?:\s*<td>[-\d.]+</td>)+)", tables[0])
        ours = dict(zip(columns, map(float, re.findall(r"[-\d.]+(?=</td>)", cells)), strict=True))
        (row,) = re.findall(rf"^{model} +([-\d. ]+)$", readme, re.M)
        for name, value in zip(header.split(), row.split(), strict=True):
            if name in ours:
                assert ours[name] == pytest.approx(float(value), abs=6e-4), (model, name)
                compared += 1
    assert compared >= 15
    args = ad.Args()
    assert f"batch {args.batch_size}, learning rate {args.dpo_learning_rate:g}".replace("e-0", "e-") in readme
    assert f"β0 = {args.beta}" in readme and "r = 30 on-policy and 20 off-policy" in readme
    assert f"r = {ad.DEMO['alpha_r']:g}" in readme


def test_the_notebook_has_every_equation():
    """Notices an equation of 1 to 19 that is missing, or there twice."""
    text = "\n".join(cell.source for cell in notebook_cells("markdown"))
    assert sorted(map(int, re.findall(r"\\tag\{(\d+)\}", text))) == list(range(1, 20))


# ------------------------------------------------------------------------------------------------------------
# The benchmark: one step's loss and gradient (no optimizer) at GPT-2's shape with random weights.
# ------------------------------------------------------------------------------------------------------------


def authors_distillation(policy, dpo, rev, batch, mask):
    """(a) The computation as the authors' trainer does it: whole logits of three models, prompts included."""
    with torch.no_grad():
        dpo_logits, rev_logits = dense_logits(dpo, batch), dense_logits(rev, batch)
        alpha = 10 * (dpo_logits.softmax(-1) - rev_logits.softmax(-1)).abs().sum(-1) + 1e-3
        teacher_logps = (dpo_logits + alpha.unsqueeze(-1) * (dpo_logits - rev_logits)).log_softmax(-1)
    logits = dense_logits(policy, batch)
    logps, probabilities = logits.log_softmax(-1), logits.softmax(-1)
    kl = (probabilities * (logps - teacher_logps)).sum(-1)
    (0.1 / alpha * kl * mask).sum(-1).div(mask.sum(-1)).mean().backward()


def authors_dpo(policy, batch, mask):
    """(a) DPO with the log-probabilities of every position gathered from whole logits."""
    logps = ad.token_logps(dense_logits(policy, batch), batch.input_ids.roll(-1, 1))
    ad.dpo_loss(*(logps * mask).sum(-1).chunk(2), *batch.ref_logps.chunk(2), beta=0.1).mean().backward()


def ours(run, policy, examples, loss_of):
    """(b) aligndistil.py, in micro-batches."""
    for _, batch in ad.micro_batches(run, examples):
        loss_of(policy, batch, scale=1 / len(examples))


def floor(policy, teachers, batch):
    """(c) What nothing can leave out: the bodies, the policy's backward, the head at the response states."""
    with torch.no_grad():
        frozen = [lm.hidden(batch) for lm in teachers]
    hidden = policy.hidden(batch)
    gradient = torch.empty_like(hidden)
    for rows in policy.chunks(hidden):
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


def machine(device):
    """The name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def benchmark(argv=None):
    parser = argparse.ArgumentParser(description="time and peak memory of one step, side by side")
    parser.add_argument("--batch", type=int, default=4, help="sequences; half of each is the prompt")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--chunk_size", type=int, default=512, help="aligndistil.py's --chunk_size")
    parser.add_argument("--tokens_per_micro_batch", type=int, default=512, help="aligndistil.py's setting")
    parser.add_argument("--repeats", type=int, default=5, help="rounds after a warm-up; medians are printed")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads, one table each")
    parser.add_argument("--device", default=None, help="cuda or cpu")
    args = parser.parse_args(argv)
    run = tiny_run(device=args.device, tokens_per_micro_batch=args.tokens_per_micro_batch)
    device = run.device
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=max(1024, args.length))
    models = [transformers.GPT2LMHeadModel(config).to(device) for _ in range(3)]
    policy, dpo, rev = (ad.LM(model, args.chunk_size) for model in models)
    for lm in (dpo, rev):
        lm.model.requires_grad_(False)
    half = args.length // 2
    responses = random_responses([(half, args.length - half)] * args.batch)
    pairs = list(zip(responses[::2], responses[1::2]))
    alone, paired = ad.collate(singles(responses), 0, device), ad.collate(pairs, 0, device)
    mask = response_mask(alone)
    distil = partial(ad.distillation_batch_loss, teacher=teacher_of(dpo, rev, alpha_r=20.0))
    work = {
        "distillation": {
            "(a) authors' dense": partial(authors_distillation, policy, dpo, rev, alone, mask),
            "(b) aligndistil.py": partial(ours, run, policy, singles(responses), distil),
            "(c) floor": partial(floor, policy, [dpo, rev], alone),
        },
        "DPO": {
            "(a) authors' dense": partial(authors_dpo, policy, paired, response_mask(paired)),
            "(b) aligndistil.py": partial(ours, run, policy, pairs, partial(ad.dpo_batch_loss, beta=0.1)),
            "(c) floor": partial(floor, policy, [], paired),
        },
    }
    print(f"{machine(device)}, torch {torch.__version__}, float32, medians of {args.repeats} rounds")
    for threads, (stage, variants) in itertools.product(args.threads, work.items()):
        torch.set_num_threads(threads)
        rounds = {name: [] for name in variants}
        for _ in range(args.repeats + 1):  # in turn, so that a drift of the machine's speed hits all alike
            for name, step in variants.items():
                policy.model.zero_grad(set_to_none=True)
                rounds[name].append(extra_memory(device, step))
        median = {name: [statistics.median(column) for column in zip(*rounds[name][1:])] for name in variants}
        print(f"\n{stage}, GPT-2 shape, {args.batch} x {args.length} tokens, half prompt, {threads} threads")
        for name, (seconds, memory) in median.items():
            print(f"{name:20} {seconds:8.3f} s {memory:8.2f} GB")
        (a, a_gb), (b, b_gb), (c, c_gb) = median.values()
        print(f"{'(b)/(a)':20} {b / a:8.2f}   {b_gb / a_gb:8.2f}")
        print(f"{'(b)/(c)':20} {b / c:8.2f}   {b_gb / c_gb:8.2f}")


if __name__ == "__main__":
    benchmark()
