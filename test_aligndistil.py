"""Tests of aligndistil.py (`pytest`), and its benchmark (`python test_aligndistil.py --help`).

The tests follow the sections of aligndistil.py: the mathematics against independent float64 computations, the
losses against dense ones, data, then runs and failures on the real command line.
"""

import argparse
import builtins
import contextlib
import dataclasses
import gzip
import inspect
import itertools
import json
import math
import os
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
if __name__ != "__main__":  # no hub is there
    os.environ |= {"HF_HOME": HOME.name, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import nbformat
import pandas as pd
import pytest
import tokenizers
import torch
import transformers
from nbclient import NotebookClient
from safetensors.torch import load_file, save_file

import aligndistil as ad

VOCABULARY = 53
SIZES = [(3, 4), (5, 2), (1, 7), (6, 1), (2, 2), (4, 9)]  # prompt and response lengths of a batch


def random_logits(*shape):
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=generator)


def tiny_gpt2(seed=0, **options):
    """A random two-layer GPT-2 whose weights are large enough to tell states apart."""
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tiny_lm(seed=0, device="cpu", **options):
    return ad.LM(tiny_gpt2(seed).to(device), **options)


def random_responses(sizes=SIZES):
    """[(prompt length, response length), ...] → Responses of random tokens."""
    torch.manual_seed(1)
    return [ad.Response(*(torch.randint(1, VOCABULARY, (n,)).tolist() for n in size)) for size in sizes]


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
    """Errors are measured by the whole gradient: that of one weight may be 0, and its error all of it."""
    assert ours.keys() == theirs.keys()
    size = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    errors = {name: ((ours[name] - theirs[name]).norm() / size).item() for name in ours}
    assert max(errors.values()) < tolerance, errors


@pytest.fixture
def float64(monkeypatch):
    """All in float64, so that what differs is no rounding. LM.logits would ask for float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(ad, "CHUNK_SIZE", 5)


# 1, 2  Settings and mathematics -----------------------------------------------------------------------------


def test_settings(capsys):
    """Notices a setting without a text in --help, a switch that cannot be turned off, and a stray preset."""
    assert ad.parse_args(["--model", "gpt2"]) == ad.Args(model="gpt2")
    assert ad.parse_args(["--seed", "0"]) == ad.Args(**ad.DEMO)
    assert ad.parse_args(["--batch_size", "7"]).batch_size == 7, "a flag goes before the preset"
    assert ad.parse_args(["--off_policy"]).off_policy and ad.parse_args(["--sft", "False"]).sft is False
    with pytest.raises(SystemExit):
        ad.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(ad.Args))
    assert not re.search(r"^  --\S+( \S+)*\n(?=  --|\Z)", shown, re.M)


def probabilities(logits):
    """softmax of one state's logits by hand, as a list."""
    total = sum(math.exp(x) for x in logits.tolist())
    return [math.exp(x) / total for x in logits.tolist()]


def test_functions_of_distributions_by_loops():
    z, other, tokens = 2 * random_logits(4, 7), random_logits(4, 7).flip(-1), [0, 4, 2, 6]
    implausible = ad.implausible_mass(other, z)
    assert implausible.max() > 0.01
    for i in range(4):
        p, q = probabilities(z[i]), probabilities(other[i])
        for found, expected in [
            (ad.token_logps(z, torch.tensor(tokens))[i], math.log(p[tokens[i]])),
            (ad.total_variation(z, other)[i], 0.5 * sum(abs(a - b) for a, b in zip(p, q))),
            (implausible[i], sum(b for a, b in zip(p, q) if a < 1e-3)),
            (ad.reverse_kl(z, other)[i], sum(a * math.log(a / b) for a, b in zip(p, q))),
        ]:
            assert found.item() == pytest.approx(expected, abs=1e-10)
    certain = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    kl = ad.reverse_kl(certain, certain.flip(0))
    kl.sum().backward()
    assert (kl > 1e4).all() and kl.isfinite().all() and certain.grad.isfinite().all()


def test_dpo_loss_is_the_paper_s_by_hand():
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor([x]).double() for x in (-3, -4, -3.5, -3))
    margin = 0.1 * ((-3 + 3.5) - (-4 + 3))
    loss = ad.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)
    swapped = ad.dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=0.1)
    assert loss.shape == (1,) and loss.item() == pytest.approx(math.log(1 + math.exp(-margin)), abs=1e-12)
    assert swapped.item() == pytest.approx(math.log(1 + math.exp(margin)), abs=1e-12)
    assert ad.implicit_reward(chosen, ref_chosen, 0.5).item() == 0.25
    assert ad.dpo_loss(torch.tensor(-1e6), torch.tensor(1e6), 0.0, 0.0, 1.0).isfinite()


def test_alpha_and_the_teachers_where_they_must_agree():
    ref, dpo, rev = random_logits(2, 3, 7), random_logits(2, 3, 7).flip(0), random_logits(2, 3, 7).flip(-1)
    alpha, ratio = ad.adaptive_alpha(dpo, rev, r=4.0), torch.full((2, 3), 1.7, dtype=torch.float64)  # β0/β
    assert torch.allclose(alpha, 4 * ad.total_variation(dpo, rev) + 0.001)
    assert ad.token_beta(torch.tensor([0.0, 2.0]), 0.1).tolist() == pytest.approx([1.0, 0.05])
    for found, expected in [
        (ad.teacher_logits(ref, dpo - ref, ratio), 1.7 * dpo - 0.7 * ref),  # Eq. 11
        (ad.teacher_logits(dpo, dpo - rev, ratio), 2.7 * dpo - 1.7 * rev),  # Eq. 15
        (ad.teacher_logits(ref, dpo - ref, ratio / 1.7), dpo),  # β = β0: RLHF's optimum is DPO's
        (ad.teacher_logits(dpo, dpo - rev, 0 * ratio), dpo),  # plain distillation
        (ad.teacher_logits(dpo, dpo - rev, alpha)[1, 2], dpo[1, 2] + alpha[1, 2] * (dpo - rev)[1, 2]),  # Eq. 17
    ]:
        assert torch.allclose(found.softmax(-1), expected.softmax(-1), atol=1e-12)


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


# 3  The losses and the teacher: chunks against dense computations, for every kind of output head ------------


def llama_like(family, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, pad_token_id=0, **options,
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


def response_mask(batch):
    """(B, T), true at the states that predict a response token."""
    mask = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=batch.states.device)
    return mask.index_fill(0, batch.states, True).view_as(batch.input_ids)


def dense_logits(lm, batch):
    """The model's own logits (B, T, V), with the attention mask that a Batch does without."""
    after = response_mask(batch).flip(1).cumsum(1).flip(1).roll(1, 1)  # response tokens from here on
    after[:, 0] = 1
    return lm.model(input_ids=batch.input_ids, attention_mask=(after > 0).long()).logits


def dense_token_logps(logits, batch):
    """log π of the next token at every position (B, T), 0 where that is no response token."""
    logps = logits.log_softmax(-1).gather(-1, batch.input_ids.roll(-1, 1).unsqueeze(-1)).squeeze(-1)
    return logps * response_mask(batch)


def mean(values, batch):
    """(B, T) → (B,): the mean over each response's states."""
    mask = response_mask(batch)
    return (values * mask).sum(-1) / mask.sum(-1)


def dense_kl(logits, target):
    return (logits.softmax(-1) * (logits.log_softmax(-1) - target.log_softmax(-1))).sum(-1)


def three_models(head):
    """A policy and two frozen models that differ from it."""
    lms = [ad.LM(HEADS[head]()) for _ in range(3)]
    for seed, lm in enumerate(lms[1:]):
        torch.manual_seed(seed)
        for parameter in lm.model.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return lms


def numbers(sums):
    return {name: value.item() for name, value in sums.items()}


CASES = [(head, "contrastive", None, False) for head in HEADS]  # reward, constant α if any, off-policy
CASES += [("tied", reward, alpha, off) for reward in ("contrastive", "vanilla") for alpha in (None, 2.0, 0.0)
          for off in (False, True) if (reward, alpha) != ("vanilla", 0.0)][1:]  # fmt: skip


@pytest.mark.parametrize(("head", "reward", "constant", "off_policy"), CASES)
def test_distillation_in_chunks_is_the_dense_one(float64, small_chunks, head, reward, constant, off_policy):
    """Notices a wrong head, anchor, base, α or weight, and a number that is watched wrongly."""
    policy, dpo, base = three_models(head)
    batch, vanilla = ad.collate(singles(), pad_id=0), reward == "vanilla"
    p, d, b = (dense_logits(lm, batch) for lm in (policy, dpo, base))
    alpha = 6 * 0.5 * (d.softmax(-1) - b.softmax(-1)).abs().sum(-1) + 1e-3
    alpha = (alpha if constant is None else torch.full_like(alpha, constant)).detach()
    weight = torch.ones_like(alpha) if constant == 0 else 0.1 / alpha
    target = ((b if vanilla else d) + alpha[..., None] * (d - b)).detach()
    dense = mean(weight * dense_kl(p, target), batch)
    dense.mean().backward()
    expected = gradients(policy.model)

    teacher = teacher_of(dpo, base, alpha_r=6.0, reward=reward, alpha=constant, off_policy=off_policy)
    sums = ad.distillation_batch_loss(policy, batch, 1 / 6, teacher)
    assert_same_gradients(gradients(policy.model), expected)
    assert not any(p.grad is not None for lm in (dpo, base) for p in lm.model.parameters())

    own, of_dpo, of_base = (dense_token_logps(z, batch) for z in (p, d, b))
    watched = {"alpha": alpha, "beta_t": weight, "kl_teacher": dense_kl(p, target)}
    watched["implausible"] = (target.softmax(-1) * (d.softmax(-1) < 1e-3)).sum(-1)
    if not off_policy:
        watched["entropy"] = -own
    watched = {name: mean(x, batch) for name, x in watched.items()} | {"loss": dense}
    watched["reward_dpo" if vanilla else "reward"] = 0.1 * (of_dpo - of_base)
    if not off_policy:
        watched["kl_dpo"] = own - of_dpo
    assert numbers(sums) == pytest.approx({name: x.sum().item() for name, x in watched.items()}, rel=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_sft_and_dpo_in_chunks_are_the_dense_ones(float64, small_chunks, head):
    policy, reference, _ = three_models(head)
    batch = ad.collate(singles(), pad_id=0)
    nll = mean(-dense_token_logps(dense_logits(policy, batch), batch), batch)
    nll.mean().backward()
    expected = gradients(policy.model)
    assert numbers(ad.sft_batch_loss(policy, batch, 1 / 6)) == pytest.approx({"loss": nll.sum().item()}, rel=1e-6)
    assert_same_gradients(gradients(policy.model), expected)

    logps, ref = (dense_token_logps(dense_logits(lm, batch), batch).sum(-1) for lm in (policy, reference))
    rewards = 0.1 * (logps - ref.detach())
    margins = rewards[:3] - rewards[3:]
    loss = -margins.sigmoid().log()
    loss.mean().backward()
    expected = gradients(policy.model)
    sums = ad.dpo_batch_loss(policy, batch, 1 / 3, beta=0.1, reference=reference)
    assert_same_gradients(gradients(policy.model), expected)
    assert numbers(sums) == pytest.approx({
        "loss": loss.sum().item(), "rewards/accuracies": (margins > 0).sum().item(),
        "rewards/margins": margins.sum().item(), "rewards/chosen": rewards[:3].sum().item(),
        "rewards/rejected": rewards[3:].sum().item(), "logps/chosen": logps[:3].sum().item(),
        "logps/rejected": logps[3:].sum().item(),
    }, rel=1e-5)  # fmt: skip


def losses_and_examples(device="cpu", precision="float32"):
    """name → (loss_of, examples) for every loss."""
    responses = random_responses()
    first, second = (tiny_lm(seed, device, precision=precision) for seed in (1, 2))
    distil = partial(ad.distillation_batch_loss, teacher=teacher_of(first, second, alpha_r=6.0))
    return {
        "sft": (ad.sft_batch_loss, singles(responses)),
        "dpo": (partial(ad.dpo_batch_loss, beta=0.1, reference=first), list(zip(responses[:3], responses[3:]))),
        "distillation": (distil, singles(responses)),
    }


each_loss = pytest.mark.parametrize("name", ["sft", "dpo", "distillation"])


def step_gradient(run, lm, examples, loss_of, n=None):
    """What a training step does before the optimizer: (sums, gradients) of examples, in micro-batches."""
    sums, run.args.max_grad_norm = {}, math.inf
    for _, batch in ad.micro_batches(run, examples):
        ad.add_up(sums, loss_of(lm, batch, scale=1 / (n or len(examples))))
    ad.gather_gradients(run, lm.model, "here")
    return sums, gradients(lm.model)


@each_loss
def test_micro_batches_leave_loss_and_gradient_unchanged(float64, name):
    policy, (loss_of, examples) = tiny_lm(), losses_and_examples()[name]
    whole, expected = step_gradient(tiny_run(), policy, examples, loss_of)
    for tokens in (16, 1):
        sums, found = step_gradient(tiny_run(tokens_per_micro_batch=tokens), policy, examples, loss_of)
        assert numbers(sums) == pytest.approx(numbers(whole), rel=1e-9)
        assert_same_gradients(found, expected, 1e-9)


@each_loss
def test_a_step_neither_waits_nor_mixes_devices(monkeypatch, name):
    """Notices a tensor left on the CPU or a number fetched in mid-step: on "meta", our CUDA, both fail."""
    # transformers itself waits once a body pass: it looks for packed sequences
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda positions: None)
    monkeypatch.setattr(ad.LM, "autocast", lambda lm: contextlib.nullcontext())  # "meta" has none
    loss_of, examples = losses_and_examples("meta")[name]
    sums = loss_of(tiny_lm(device="meta"), ad.collate(examples, pad_id=0, device="meta"), 1.0)
    assert {value.device.type for value in sums.values()} == {"meta"}


@each_loss
def test_what_a_step_keeps_in_memory(monkeypatch, small_chunks, name):
    """Notices a head that sees more than a chunk, a prompt or a pad, and a frozen pass that is recorded."""
    seen, recorded, own, (loss_of, examples) = [], [], ad.LM.hidden, losses_and_examples()[name]
    logits, policy = ad.LM.logits, tiny_lm()
    watched = lambda lm, hidden: seen.append(len(hidden)) or logits(lm, hidden)  # noqa: E731
    monkeypatch.setattr(ad.LM, "logits", watched)
    monkeypatch.setattr(ad.LM, "hidden", lambda lm, batch: recorded.append(torch.is_grad_enabled()) or own(lm, batch))
    loss_of(policy, ad.collate(examples, pad_id=0), 1.0)
    assert max(seen) == 5 and sum(seen) == (1 if name == "sft" else 3) * sum(size[1] for size in SIZES)
    assert recorded.count(True) == 1, "only the policy's"


@pytest.mark.parametrize("checkpointing", [False, True])
@each_loss
def test_a_bfloat16_step_has_float32_losses_and_gradients(name, checkpointing):
    """Notices autocast that is not used, reaches the loss, or is forgotten when layers are computed again."""
    loss_of, examples = losses_and_examples(precision="bf16")[name]
    batch, exact = ad.collate(examples, pad_id=0), tiny_lm()
    lm = ad.LM(tiny_gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0), "bf16")
    if checkpointing:
        lm.model.gradient_checkpointing_enable({"use_reentrant": False})
        lm.model.train()
    sums, found = loss_of(lm, batch, 1.0), gradients(lm.model)
    assert {x.dtype for x in [*sums.values(), *found.values(), *lm.model.parameters()]} == {torch.float32}
    expected_sums = losses_and_examples()[name][0](exact, batch, 1.0)
    expected = gradients(exact.model)
    assert sums["loss"].item() == pytest.approx(expected_sums["loss"].item(), rel=0.1)
    assert_same_gradients(found, expected, 0.3)
    with pytest.raises(AssertionError):
        assert_same_gradients(found, expected, 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_loss
def test_a_step_on_cuda_is_that_on_the_cpu(name):
    (loss_of, examples), (cuda_loss_of, _) = losses_and_examples()[name], losses_and_examples("cuda")[name]
    expected = step_gradient(tiny_run(), tiny_lm(), examples, loss_of)
    sums, found = step_gradient(tiny_run(device="cuda"), tiny_lm(device="cuda"), examples, cuda_loss_of)
    assert numbers(sums) == pytest.approx(numbers(expected[0]), rel=1e-3, abs=1e-2)
    assert_same_gradients({key: x.cpu() for key, x in found.items()}, expected[1], 1e-3)


# 5  The training loop and sampling --------------------------------------------------------------------------


def test_order_and_schedule():
    """Every record once an epoch; warm-up over a fifth of 20 steps, then half a cosine to a tenth."""
    steps = ad.batches_of(ad.Args(batch_size=4, seed=1), 10, epochs=2)
    walk = list(itertools.chain(*steps))
    assert len(steps) == 5 and sorted(walk[:10]) == sorted(walk[10:]) == list(range(10))
    assert walk[:10] != walk[10:] and steps != ad.batches_of(ad.Args(batch_size=4, seed=2), 10, epochs=2)
    assert ad.batches_of(ad.Args(batch_size=4, seed=1, max_steps=2), 10, epochs=2) == steps[:2]
    assert [len(step) for step in ad.batches_of(ad.Args(batch_size=40), 10, epochs=0.5)] == [10]
    rates = [ad.warmup_then_cosine(step, 20, 0.2) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0.55) and 0.1 < rates[-1] < 0.12
    assert ad.warmup_then_cosine(0, 1, 0.0) == ad.warmup_then_cosine(0, 1, 0.1) == 1


def test_sampling_pads_on_the_left_without_a_trace(monkeypatch):
    """Notices a sampled token whose distribution is not that of the unpadded prompt."""
    lm, seen, prompts = tiny_lm(), [], [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    pick = lambda p, num_samples: seen.append(p) or p.argmax(-1, keepdim=True)  # noqa: E731
    monkeypatch.setattr(torch, "multinomial", pick)
    outputs = ad.sample(tiny_run(), lm, prompts)
    for row, i in enumerate([1, 2, 0]):  # by length
        for t in range(len(outputs[i])):
            with torch.no_grad():
                alone = lm.model(input_ids=torch.tensor([prompts[i] + outputs[i][:t]])).logits[0, -1].softmax(-1)
            assert torch.allclose(seen[t][row], alone, atol=1e-4)


def test_sampling_ignores_the_checkpoint_s_generation_config():
    """Notices a top_k of 1, a repetition penalty and the like that bend π_θ."""
    lm, run = tiny_lm(), tiny_run(sampling_batch_size=4000, max_length=9, max_prompt_length=8)
    lm.model.generation_config = own = transformers.GenerationConfig(
        do_sample=False, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=50.0,
        no_repeat_ngram_size=1, min_new_tokens=1, suppress_tokens=[3], bad_words_ids=[[4]],
    )  # fmt: skip
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
    examples, sums = ad.own_responses(run, tiny_lm(), [{"prompt": [5, 6]}] * 200)
    outputs = [response.tokens for (response,) in examples]
    cut = [y for y in outputs if y[-1] not in (3, 4)]
    assert cut and all(len(y) == 6 for y in cut) and {y[-1] for y in outputs if y not in cut} == {3, 4}
    assert not any(token in (3, 4) for y in outputs for token in y[:-1])
    assert sums == {"completions/mean_length": sum(map(len, outputs)), "completions/clipped_ratio": len(cut)}


# 6  A language model taken apart, and the families that people load -----------------------------------------


def test_states_are_the_ones_that_predict_the_response():
    """Shift by one: |y| states, from the last prompt position to the last but one; pad may be the end."""
    batch = ad.collate([[ad.Response([7, 8, 9], [4, 5])], [ad.Response([6], [1, 2, 5])]], pad_id=5)
    assert batch.input_ids.tolist() == [[7, 8, 9, 4, 5], [6, 1, 2, 5, 5]]
    assert batch.states.tolist() == [2, 3, 5, 6, 7] and batch.targets.tolist() == [4, 5, 1, 2, 5]
    assert batch.response.tolist() == [0, 0, 1, 1, 1]
    assert batch.weights.tolist() == pytest.approx([1 / 2] * 2 + [1 / 3] * 3)


SIZES_BY_NAME = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "ffn_dim": 48, "n_embd": 32,
    "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 2, "n_head": 2, "num_key_value_heads": 1,
    "head_dim": 16, "word_embed_proj_dim": 32, "state_size": 4, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = """GPT2 GPTNeoX OPT Bloom Falcon Phi Llama Mistral Mixtral Qwen2 Qwen3 Qwen2Moe Gemma2 Gemma3Text
    Granite Cohere Mamba StableLm Olmo2 SmolLM3""".split()


def save_of_family(family: str, folder: Path) -> str:
    """A random two-layer model of the family, with every dropout that it knows, and a tokenizer."""
    config_class = getattr(transformers, f"{family}Config")
    known, aliases = vars(config_class()), config_class.attribute_map
    sizes = {name: size for name, size in SIZES_BY_NAME.items() if name in known or name in aliases}
    sizes |= {name: 0.5 for name in known if re.search(r"drop(out)?(_prob)?$", name)}
    torch.manual_seed(0)
    name = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, name)(config_class(**sizes))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return save(model, folder)


def save(model, folder: Path) -> str:
    """A model with a tokenizer of no more ids than it has rows."""
    model.save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(small_chunks, tmp_path, family):
    """Notices chunks, left-padded samples, dropout or layers computed again that change a number."""
    folder, batch = save_of_family(family, tmp_path), ad.collate(singles(), pad_id=0)
    lm, checkpointed = (ad.load_lm(tiny_run(gradient_checkpointing=on), folder) for on in (False, True))
    ad.check_model(lm, family)
    nll = mean(-dense_token_logps(dense_logits(lm, batch), batch), batch).sum()
    nll.backward()
    expected = gradients(lm.model)
    checkpointed.model.train()
    for either in (lm, checkpointed):
        assert ad.sft_batch_loss(either, batch, 1.0)["loss"].item() == pytest.approx(nll.item(), rel=1e-4)
        assert_same_gradients(gradients(either.model), expected, 1e-4)


# 7  Data: chat templates, formats, files -------------------------------------------------------------------

SPECIAL = """<eos> <bos> <s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> [INST]
    <start_of_turn> <end_of_turn> [/INST] <|start|> <|channel|> <|message|> <|end|> <|return|> <|user|>
    <|assistant|> <|system|> <think> </think>""".split()
ENGLISH = """The sky is blue because the air scatters light. What colour is the sea? Green, deep, grey, often.
    user assistant system model final Hi Hello Sky? Be brief. Sure, Blue. Red. | / = \n <"""


def tokenizer_of(model, template, eos, **options):
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token=eos, **options)
    fast.chat_template = template
    return fast


def bpe_tokenizer(template=None, eos="<eos>", text=ENGLISH, vocabulary=360, **options):
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocabulary, min_frequency=0, special_tokens=SPECIAL, show_progress=False)
    return tokenizer_of(bpe._tokenizer, template, eos, **options)


def sentencepiece_like(template, eos):
    """A tokenizer that puts a space before every text, as Llama 2's and Mistral's do."""
    parts, model = tokenizers.decoders, tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model.decoder = parts.Sequence([parts.Replace("▁", " "), parts.Fuse(), parts.Strip(" ", 1, 0)])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=250, special_tokens=["<unk>", "</s>"], show_progress=False)
    model.train_from_iterator([*ENGLISH.split("\n") * 9, "\n", ">", " Blue", "Blue"], trainer)
    return tokenizer_of(model, template, eos, unk_token="<unk>")


def each(body: str, prompt: str = "", otherwise: str = "") -> str:
    """A template: the body for each message m, then the generation prompt or something else."""
    after = "{% if add_generation_prompt %}" + prompt + "{% else %}" + otherwise + "{% endif %}"
    return "{% for m in messages %}" + body + "{% endfor %}" + after * bool(prompt)


TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML = each(TURN, "<|im_start|>assistant\n")
NO_SYSTEM = "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}<start_of_turn>"
ROLE, IS_ANSWER = "{{ 'model' if m.role == 'assistant' else m.role }}\n", "{% if m.role == 'assistant' %}"
THINK = "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
STRIP = IS_ANSWER + "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}"
CHANNEL = "<|start|>{{ m.role }}" + IS_ANSWER + "<|channel|>final{% endif %}<|message|>{{ m.content }}"
RETURN = "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n".format
INST = "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% endif %}" + IS_ANSWER + " {{ m.content }}</s>{% endif %}"
TEMPLATES = {  # name: template, end-of-sequence, an answer's text, the response that must come of it
    "ChatML": (CHATML, "<eos>", "Blue.", "Blue.<|im_end|>"),
    "default system": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe.<|im_end|>\n{% endif %}" + CHATML,
        "<|im_end|>", "Blue.", "Blue.<|im_end|>"),
    "Llama 3": ("<bos>" + each(HEADER("{{ m.role }}") + "{{ m.content | trim }}<|eot_id|>", HEADER("assistant")),
                "<eos>", " Blue.\n", "Blue.<|eot_id|>"),
    "Gemma": ("<bos>" + each(NO_SYSTEM + ROLE + "{{ m.content | trim }}<end_of_turn>\n", "<start_of_turn>model\n"),
              "<eos>", "Blue. ", "Blue.<end_of_turn>"),
    "Mistral": ("<s>" + each(INST), "</s>", "Blue.", " Blue.</s>"),
    "Qwen3": (CHATML.replace("{{ m.content }}", THINK), "<|im_end|>", "Blue.", "<think>\n\n</think>\n\nBlue.<|im_end|>"),
    "R1": (each(TURN.replace("{{ m.content }}", STRIP), "<|im_start|>assistant\n<think>\n"), "<|im_end|>",
           "<think>\nSky\n</think>\n\nBlue.", "Blue.<|im_end|>"),
    "gpt-oss": (each(CHANNEL + RETURN, "<|start|>assistant"), "<|return|>", "Blue.",
                "<|channel|>final<|message|>Blue.<|return|>"),
    "Phi-3": (each("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n", "<eos>"), "<eos>", "Blue.",
              "Blue.<|end|>"),
    "no generation prompt": (each(TURN), "<|im_end|>", "Blue.", "Blue.<|im_end|>"),
    "Zephyr": (each("<|{{ m.role }}|>\n{{ m.content }}</s>\n", "<|assistant|>\n"), "</s>", "Blue.", "Blue.</s>"),
}  # fmt: skip


def said(role: str, content, **keys) -> dict:
    return {"role": role, "content": content, **keys}


def pair(prompt=None, chosen="Blue.", rejected="Red.", **columns) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


SKY, BLUE, RED, BRIEF = said("user", "Sky?"), said("assistant", "Blue"), said("assistant", "Red"), said("system", "Be.")
TALK = [said("user", "Hi"), said("assistant", "Hello"), SKY]


def run_with(tokenizer, named=None, **settings):
    """A run of a model with this tokenizer, whose generation config names these ends."""
    run, lm = tiny_run(**{"max_length": 200, "max_prompt_length": 150, **settings}), tiny_lm()
    lm.tokenizer, lm.model.generation_config.eos_token_id = tokenizer, named
    run.read_tokenizer(lm)
    return run, lm


def texts(run, row) -> tuple:
    """The prompt, the chosen and the rejected response of a row, decoded."""
    return tuple(run.tokenizer.decode(row[name]) for name in ("prompt", "chosen", "rejected"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_decides_prompt_and_response(name):
    """Notices training on other ids than the template's own, and sampling that starts or stops elsewhere."""
    template, eos, answer, expected = TEMPLATES[name]
    run, lm = run_with((sentencepiece_like if name == "Zephyr" else bpe_tokenizer)(template, eos))
    tokenizer, ends = run.tokenizer, dict.fromkeys([expected[expected.rindex("<") :], eos])
    assert run.stop_ids == tokenizer.convert_tokens_to_ids(list(ends))
    for prompt in ["Sky?", TALK] + [[BRIEF, *TALK]] * (name not in ("Gemma", "Mistral")):
        row = ad.encode_record(run, pair(prompt, answer), 0)
        talk = [said("user", prompt)] if isinstance(prompt, str) else prompt
        whole = tokenizer.apply_chat_template([*talk, said("assistant", answer)], tokenize=False)
        ids = row["prompt"] + row["chosen"]
        assert whole.startswith(tokenizer.decode(ids)) and not row["cut"]
        assert texts(run, row)[1:] == (expected, expected.replace("Blue", "Red"))
        assert tokenizer(whole, add_special_tokens=False).input_ids[: len(ids)] == ids
        assert [i for i in row["chosen"] if i in run.stop_ids] == row["chosen"][-1:] == run.stop_ids[:1]

        def generate(input_ids, mask, config, row=row):  # a policy that draws the chosen response, and goes on
            assert (input_ids[0].tolist(), config.eos_token_id) == (row["prompt"], run.stop_ids)
            return torch.cat([input_ids, torch.tensor([row["chosen"] + [5, 5]])], 1)

        lm.generate = generate
        assert ad.own_responses(run, lm, [row])[0] == [[ad.Response(row["prompt"], row["chosen"])]]


@pytest.mark.parametrize(
    ("template", "record", "word"),
    [
        (each("{{ m.role }}: {{ m.content }}\n"), None, "end token"),
        (each("{% for part in m.content %}{{ part.text }}{% endfor %}<|end|>"), None, "text"),
        ("{% for m in messages %}{{ m.role }", None, "cannot be used"),
        ({"chat": CHATML, "rag": CHATML}, None, "default"),
        ("{{ raise_exception('system first') if messages[0].role != 'system' }}" + CHATML, None, "system first"),
        (TEMPLATES["Gemma"][0], pair([BRIEF, SKY]), "no system role"),
        (TEMPLATES["Mistral"][0], pair([BRIEF, SKY]), "role 'system'"),
        (CHATML, pair("<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n"), "already"),
        (TEMPLATES["Qwen3"][0], pair([SKY, said("assistant", "Sure,")], " blue.", " red."), "another way"),
    ],
)
def test_what_a_template_cannot_write_is_refused(template, record, word):
    with pytest.raises(ad.BadInput, match=f"record 7 .*{word}" if record else f"chat template.*{word}"):
        ad.encode_record(run_with(bpe_tokenizer(template))[0], record, 7)


def test_a_template_with_the_time_gives_the_same_ids_again():
    run, _ = run_with(bpe_tokenizer("{{ strftime_now('%H:%M:%S.%f') }}" + CHATML))
    assert ad.encode_record(run, pair("Sky?"), 0) == ad.encode_record(run, pair("Sky?"), 0)


def test_first_tokens_and_length_limits():
    """Notices a lost <bos>, a cut response with an end token, and a prompt cut from the wrong side."""
    long = pair("Z" * 50 + "WXY", "Z" * 50, "XYZ")  # each letter is a token
    run, _ = run_with(bpe_tokenizer(), max_length=16, max_prompt_length=8)
    assert texts(run, ad.encode_record(run, long, 0)) == ("ZZZZWXY\n", "ZZZZZZZZ", "XYZ<eos>")
    run, _ = run_with(bpe_tokenizer(TEMPLATES["Llama 3"][0], bos_token="<bos>"), max_prompt_length=12)
    row = ad.encode_record(run, long, 0)
    assert row["cut"] and len(row["prompt"]) == 12 and texts(run, row)[0].startswith("<bos>")
    assert texts(run, row)[0].endswith("XY<|eot_id|>" + HEADER("assistant"))

    tokenizer = bpe_tokenizer(bos_token="<bos>")
    first = ("<bos>", tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", None, [first])
    run, _ = run_with(tokenizer, named=[0, 7], max_length=4, max_prompt_length=2)
    assert run.stop_ids == [0, 7] and run.first_ids == [first[1]]
    assert texts(run, ad.encode_record(run, long, 0)) == ("<bos>\n", "ZZ", "XY")


HUMAN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sky?\n\nAssistant:"
CALL = said("assistant", None, tool_calls="sky")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (pair("Sky?", "Blue", "Red"), ("Sky?", "Blue", "Red")),
        (pair("", "the sky", "the sea"), ("", "the sky", "the sea")),
        (pair(None, "The sky is blue", "The sky is black"), ("The sky is", " blue", " black")),
        (pair(None, "The sky is blue", "The sky is"), ("The sky is", " blue", "")),
        (pair(None, "The sky is blue", "The sky is bl"), ("The sky is", " blue", " bl")),
        (pair(None, "Blue", "Black"), ("", "Blue", "Black")),
        (pair(TALK, [BLUE], [RED]), (TALK, "Blue", "Red")),
        (pair(TALK, [*TALK, BLUE], [*TALK, RED]), (TALK, "Blue", "Red")),
        (pair(None, [*TALK, BLUE], [*TALK, RED]), (TALK, "Blue", "Red")),
        (pair("Sky?", [SKY, BLUE], [SKY, RED]), ([SKY], "Blue", "Red")),
        (pair("Sky?", [BLUE], [RED]), ([SKY], "Blue", "Red")),
        (pair(None, [SKY, BLUE], [*TALK, RED]), ([SKY], "Blue", "")),
        (pair(None, HUMAN + " Blue", HUMAN + " Red"), (TALK, "Blue", "Red")),
        (pair(None, HUMAN + " Yes", "\n\nHuman: a\n\nAssistant: No"), (TALK, "Yes", "")),
        (pair(HUMAN, " Blue", " Red"), ([*TALK, said("assistant", "")], "Blue", "Red")),
        (pair([said("user", [{"type": "text", "text": "Sky?"}])], [BLUE], [RED]), ([SKY], "Blue", "Red")),
        (pair([said("user", "Sky?", name=None)], [BLUE], [RED]), ([SKY], "Blue", "Red")),
        (pair([SKY, CALL], [BLUE], [RED]), ([SKY, CALL | {"content": ""}], "Blue", "Red")),
    ],
)
def test_record_of_every_format(record, expected):
    """Notices a format that is taken apart wrongly."""
    prompt, chosen, rejected = ad.split_record(record)
    assert (prompt, chosen["content"], rejected["content"]) == expected


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"prompt": "Sky?", "chosen": "Blue"}, "rejected"), (pair("Sky?", 3, "Red"), "'chosen'"),
        (pair({"text": "Sky?"}), "'prompt'"), (pair("Sky?", [BLUE], "Red"), "two texts or two conversations"),
        (pair(None, ["Blue"], ["Red"]), "'chosen'"), (pair([{"content": "Sky?"}], [BLUE], [RED]), "'prompt'"),
        (pair(None, [BLUE], [RED]), "no message before"), (pair(None, [], []), "message"),
        (pair(None, [SKY, BLUE, SKY], [SKY, BLUE, said("user", "a")]), "assistant"),
        (pair([SKY], [said("user", "Sea?"), BLUE], [said("user", "Sea?"), RED]), "another question"),
        (pair([said("user", [{"type": "image", "url": "x"}])], [BLUE], [RED]), "'prompt'"),
        (pair(None, question="Sky?"), "'question'"), (pair(None, instruction="Sky?", input="of"), "instruction"),
        (pair("Sky?", system="Be brief."), "'system'"), (pair(None, "Blue", "Red", topic="Sky?"), "topic"),
        (pair([SKY, CALL, SKY], [BLUE], [RED]), "chat template"),
    ],
)  # fmt: skip
def test_malformed_record(record, word):
    """Notices a record of no format that is taken for one, or a part of the question that is not read."""
    with pytest.raises(ad.BadInput, match=f"record 7 .*{word}"):
        ad.encode_record(run_with(bpe_tokenizer())[0], record, 7)


def write(path: Path, records: list) -> Path:
    """Records as a file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(record) for record in records)
    if path.suffix == ".csv":
        pd.DataFrame(records).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(records).to_parquet(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(json.dumps(records, ensure_ascii=False) if path.suffix == ".json" else text)
    return path


def numbered(n: int) -> list:
    """n records that differ from each other."""
    return [pair(f"What is {i}?", f"It is {i}.", f"Not {i}.") for i in range(n)]


def load(dataset, template=None, **settings):
    """(run, all rows in order, held-out records) of a data set, or of records."""
    if isinstance(dataset, list):
        dataset = write(Path(tempfile.mkdtemp(dir=HOME.name)) / "a.jsonl", dataset)
    run, _ = run_with(bpe_tokenizer(template), dataset=str(dataset), **settings)
    train_pairs, test_pairs = ad.load_pairs(run)
    return run, sorted([*train_pairs, *test_pairs], key=lambda row: row["record"]), test_pairs["record"][:]


ODD = [
    pair("", "the sky", "the sea"), pair("Say it, with\r\ntwo lines.", "One 😀👩‍🚀.\r\nTwo.", "שלום, עולם"),
    pair("ما لون السماء؟", "أزرق", "naïve “quotes”, commas\tand tabs"), pair("What is the sky?", " blue", "Red\n"),
    pair("Is it?", "NA", "null"), pair("How many?", "None", "1.50"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "C:data/a[1].jsonl"])
def test_same_tokens_from_every_file(tmp_path, name):
    """Notices a file that loses or changes a letter, or whose name is taken for a pattern or NAME:CONFIG."""
    write(tmp_path / "C:data" / "a1.jsonl", numbered(3))
    path = write(tmp_path / name, ODD)
    run, rows, _ = load(path)
    for record, row in zip(ODD, rows, strict=True):
        expected = ((record["prompt"] or "<eos>"), record["chosen"] + "<eos>", record["rejected"] + "<eos>")
        assert (texts(run, row)[0].removesuffix("\n"), *texts(run, row)[1:]) == expected
    if not name.endswith((".gz", ".parquet")):  # as Windows writes it
        path = write(path.with_stem("windows"), numbered(3))
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        run, rows, _ = load(path)
        assert [texts(run, row)[1] for row in rows] == [f"It is {i}.<eos>" for i in range(3)]


def test_messages_with_keys_of_their_own_in_a_file():
    """Notices a key or a type that only one record has, and that changes or stops the others."""
    records = [pair([said("user", f"What is {i}?")], [BLUE], [RED]) for i in range(12)]
    records[7]["prompt"][0]["name"], records[9]["prompt"] = "bob", "What is 9?"
    records[3] = pair([said("user", "What is 3?"), said("assistant", "Sure,")], [said("assistant", " Blue")], [RED])
    run, rows, _ = load(records, CHATML)
    for i, row in enumerate(rows):
        begun = f"<|im_start|>user\nWhat is {i}?<|im_end|>\n<|im_start|>assistant\n" + "Sure," * (i == 3)
        assert texts(run, row) == (begun, " " * (i == 3) + "Blue<|im_end|>", "Red<|im_end|>")


def test_useless_pairs_are_left_out_aloud(capsys):
    """Notices empty or identical responses that are trained on, or left out in silence."""
    useless = [pair("a", text, "b" * 99) for text in (" ", "b" * 99, "b" * 99 + "c")]
    _, rows, _ = load([useless[0], *numbered(20), *useless[1:]], max_length=64, max_prompt_length=32)
    assert [row["record"] for row in rows] == list(range(1, 21))
    assert "3 left out" in capsys.readouterr().out


def test_held_out_part():
    """Notices a held-out prompt that is trained on, or that does not follow the seed."""
    records, parts = [r | {"rejected": f"No {j}"} for r in numbered(40) for j in range(3)], []
    for seed in (0, 0, 1):
        _, rows, held_out = load(records, seed=seed)
        assert [row["record"] for row in rows] == list(range(120)) and len(held_out) == 12
        assert len({record // 3 for record in held_out}) == 4, "all pairs of four prompts"
        parts.append(held_out)
    assert parts[0] == parts[1] != parts[2]


def test_splits_of_a_folder(tmp_path):
    """Notices a test split that is not used, a limit that reaches it, and a NAME:CONFIG not found."""
    write(tmp_path / "train.jsonl", numbered(5)), write(tmp_path / "test.jsonl", numbered(9)[5:])
    files = [{"split": f"{split}_prefs", "path": f"{split}.jsonl"} for split in ("train", "test")]
    configs = [{"config_name": "other", "data_files": "test.jsonl"}, {"config_name": "mine", "data_files": files}]
    for name in (tmp_path, f"{tmp_path}:mine"):
        _, rows, held_out = load(name)
        assert len(rows) == 9 and held_out == [0, 1, 2, 3] and len(load(name, limit=2, eval_pairs=1)[1]) == 3
        assert {row["instruction"] for row in rows if row["record"] == 4} == {"What is 4?"}
        (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")


# 8, 9  The demo world and the evaluation -------------------------------------------------------------------

HOTEL, GOOD = "how was the hotel ?", "the room was superb and the bed was not weak ."


def test_the_truth_by_hand():
    for review, reward in {
        GOOD: 1.5, "the room was superb .": 2, "the room was not superb , the staff was not awful .": 0,
        "the bed was plain but the bed was not fine .": -0.5, "the bed was superb and the room was superb .": 2,
    }.items():  # fmt: skip
        assert ad.well_formed(HOTEL, review) and ad.true_reward(HOTEL, review) == reward, review
    for review in [
        "", "superb .", ".", GOOD[:-2], GOOD + " superb", GOOD.replace("room", "coffee"), GOOD.replace("room", ""),
        GOOD.replace("not", "not not"), GOOD + " " + GOOD, " and ".join(["the room was good"] * 5) + " .",
        "the room was superb the bed was superb .", "the room was .", "the room was not .",
    ]:  # fmt: skip
        assert not ad.well_formed(HOTEL, review) and ad.true_reward(HOTEL, review) == -2, review


def test_demo_records_are_mixed_noisy_and_seeded():
    records, unknown = ad.demo_records(600, seed=3).to_list(), ad.demo_tokenizer().unk_token_id
    assert records == ad.demo_records(600, seed=3).to_list() != ad.demo_records(600, seed=4).to_list()
    gaps = []
    for prompt, *reviews in map(dict.values, records):
        assert all(ad.well_formed(prompt, review) for review in reviews)
        assert unknown not in ad.demo_tokenizer()(" ".join([prompt, *reviews])).input_ids
        gaps.append(ad.true_reward(prompt, reviews[0]) - ad.true_reward(prompt, reviews[1]))
    expected = statistics.mean(1 / (1 + math.exp(-4 * abs(gap))) for gap in gaps if gap)
    assert statistics.mean(gap > 0 for gap in gaps if gap) == pytest.approx(expected, abs=0.06), "Bradley-Terry"


def own_logp(lm, prompt, tokens):
    """log π(y|x), from the model's own logits in float64."""
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)[range(len(tokens)), tokens].sum().item()


def random_pairs():
    """Three pairs of random tokens, as a data set."""
    columns = ([r.prompt for r in random_responses()[:3]], *([r.tokens for r in part] for part in
               (random_responses()[:3], random_responses()[3:])), ["first", "second", "third"])  # fmt: skip
    return datasets.Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected", "instruction"), columns)))


def test_results_by_hand(tmp_path, monkeypatch):
    """Notices a wrong reward, KL, entropy, interval or accuracy, and two models that are mixed up."""
    lms = {name: tiny_lm(seed) for seed, name in enumerate(("reference", "dpo", "reverse_dpo", "policy"))}
    run, pairs = tiny_run(dataset="other", beta=0.3, output_dir=str(tmp_path)), random_pairs()
    monkeypatch.setattr(ad, "load_lm", lambda run, name, **rest: lms[name])
    results = ad.evaluate(run, {name: name for name in lms}, pairs, {})
    samples = json.loads((tmp_path / "samples.json").read_text())
    for sample, (name, row) in zip(samples, itertools.product(lms, pairs), strict=True):
        y = sample["token_ids"]
        logp = {other: own_logp(lm, row["prompt"], y) for other, lm in lms.items()}
        expected = {"reward": 0.3 * (logp["dpo"] - logp["reverse_dpo"]), "length": len(y),
                    "kl_ref": logp[name] - logp["reference"], "entropy": -logp[name] / len(y)}  # fmt: skip
        assert {key: sample[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-3)
    column, found = [sample["kl_ref"] for sample in samples[-3:]], results["models"]["policy"]
    expected = statistics.mean(column), 1.96 * statistics.stdev(column) / math.sqrt(3)
    assert (found["kl_ref"], found["kl_ref_pm"]) == pytest.approx(expected)
    margins = {name: torch.tensor([own_logp(lm, row["prompt"], row["chosen"]) -
               own_logp(lm, row["prompt"], row["rejected"]) for row in pairs]) for name, lm in lms.items()}  # fmt: skip
    for name, better, worse in [("dpo", "dpo", "reference"), ("reverse", "reference", "reverse_dpo"),
                                ("contrastive", "dpo", "reverse_dpo")]:  # fmt: skip
        expected = (margins[better] > margins[worse]).double().mean().item()
        assert results["reward_accuracy"][name]["accuracy"] == pytest.approx(expected), name


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_the_precision_report(capsys, precision):
    """Notices teachers far apart of which much is said to be lost, and near ones that are not warned of."""
    run, dpo, near = tiny_run(precision=precision), tiny_lm(1), tiny_lm(1)
    found = ad.precision_report(run, teacher_of(dpo, tiny_lm(2), alpha=1.0), random_pairs())["precision"]
    assert 0.9 < found["share"] < 1.1 and -1e-6 < found["kl"] < 0.5
    shown = capsys.readouterr().out
    assert f"{found['share']:.2f}" in shown and f"{found['kl']:.2g}" in shown and "WARNING" not in shown
    if precision == "bf16":
        for parameter in near.model.parameters():
            parameter.data *= 1 + 1e-6 * torch.randn(parameter.shape)
        ad.precision_report(run, teacher_of(dpo, near, alpha=1.0), random_pairs())
        assert "WARNING" in capsys.readouterr().out
    torch.set_float32_matmul_precision("highest")


# 10  The run: bad input on the command line -----------------------------------------------------------------


def save_tiny_model(folder: Path, tokenizer=None, width=32, rows=None, kind="GPT2LMHeadModel", change=None, **more):
    """A random GPT-2 with a tokenizer; `change` maps its weights to what is written."""
    tokenizer = tokenizer or bpe_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": width, "n_head": 2, "n_positions": 128, "eos_token_id": 0, "bos_token_id": 0}
    model = getattr(transformers, kind)(transformers.GPT2Config(rows or len(tokenizer), **shape, **more)).eval()
    model.save_pretrained(folder)
    if change:
        weights = {name: x.clone() for name, x in load_file(folder / "model.safetensors").items()}
        save_file(change(weights), folder / "model.safetensors", {"format": "pt"})
    return model


FORK = torch.multiprocessing.get_context("forkserver")  # real processes, which need not import torch each
FORK.set_forkserver_preload([__name__, "transformers.models.gpt2.modeling_gpt2"])
SMALL = {"device": "cpu", "max_steps": 3, "limit": 64, "eval_pairs": 20, "eval_prompts": 8, "batch_size": 16}
STAGES, ALL_STAGES = ("dpo", "reverse_dpo", "policy"), ("sft", "dpo", "reverse_dpo", "policy")
RATES = {"sft_learning_rate": 1e-3, "dpo_learning_rate": 1e-3, "distill_learning_rate": 1e-3}
EPOCHS = {"sft_epochs": 3, "dpo_epochs": 3, "distill_epochs": 3}
RESUMED = SMALL | RATES | EPOCHS | {"max_steps": 6, "save_steps": 2}


def align(folder, out, **settings):
    """A run of the small model on good.jsonl."""
    paths = {"model": str(folder / "base"), "dataset": str(folder / "good.jsonl"), "output_dir": str(out)}
    return ad.align(ad.Args(**paths | settings))


def flags(**settings) -> list:
    """Settings as a command line."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


BAD = {  # flags, where {} is a folder of prepared files: a word of the error line
    "--model {}/nowhere": "nowhere", "--model gpt2": "gpt2", "--model {}/corrupt": "corrupt", "--model {}/nan": "nan",
    "--model {}/prefix": "weights", "--model {}/resized": "embedding", "--model {}/lora": "adapter",
    "--model demo": "demo", "--dpo {}/prefix": "weights", "--dpo {}/smaller": "vocabulary",
    "--reverse_dpo {}/latin": "tokenizer", "--judge {}/headless": "score.weight", "--judge {}/two": "2 outputs",
    "--judge no/judge": "judge", "--dataset {}/nowhere.jsonl": "nowhere.jsonl", "--dataset some/pairs": "some/pairs",
    "--dataset {}/missing.jsonl": "record 1 ", "--dataset {}/number.jsonl": "'chosen'",
    "--dataset {}/columns.jsonl": "columns", "--dataset {}/broken.jsonl": "broken.jsonl",
    "--dataset {}/empty.jsonl": "empty.jsonl", "--dataset {}/identical.jsonl": "pairs",
    "--dataset {}/one.jsonl": "pairs", "--dataset {}/a.tsv": ".jsonl", "--dataset {}/saved": "to_parquet",
    "--dataset {}/splits[1]": "rename", "--dataset {}/splits:nowhere": "nowhere", "--train_split no": "--train_split",
    "--test_split no": "split", "--max_length 20 --max_prompt_length 19": "--max_length", "--max_length 129": "128",
    "--beta nan": "--beta", "--sft_learning_rate -1": "--sft_learning_rate", "--alpha_r -1": "--alpha_r",
    "--batch_size 0": "--batch_size", "--alpha 0 --reward vanilla": "contrastive", "--device cuda:7": "cannot start",
    "--output_dir {}/file/out": "cannot start", "--output_dir {}/splits": "output folder",
    "--output_dir {}/run --beta 0.2": "0.1 → 0.2", "--report_to wandb": "wandb", "--alpha foo": "foo",
    "--lerning_rate 1": "--lerning_rate", "WORLD_SIZE=2": "torchrun",
}  # fmt: skip


def in_folder(folder: Path) -> dict:
    """Every file below a folder, with its content."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of a model (base), pairs (good.jsonl), what the commands of BAD take, and a finished run."""
    folder, good = tmp_path_factory.mktemp("prepared"), numbered(40)
    for name, records in {
        "good": good, "missing": [good[0], {"prompt": "a", "rejected": "b"}, *good], "one": good[:1], "empty": [],
        "number": [record | {"chosen": 3} for record in good], "columns": [{"question": "a", "answer": "b"}],
        "identical": [record | {"rejected": record["chosen"]} for record in good], "splits/train": good,
        "splits[1]/train": good, "lora/adapter_config": [],
    }.items():  # fmt: skip
        write(folder / f"{name}.jsonl", records)
    (folder / "broken.jsonl").write_text(json.dumps(good[0]) + "\n" + json.dumps(good[1])[:-5])
    (folder / "lora" / "adapter_config.jsonl").rename(folder / "lora" / "adapter_config.json")
    (folder / "file").touch(), (folder / "a.tsv").touch()
    datasets.Dataset.from_list(good).save_to_disk(folder / "saved")
    save_tiny_model(folder / "base"), save_tiny_model(folder / "corrupt")
    (folder / "corrupt" / "model.safetensors").write_bytes(b"no weights")
    save_tiny_model(folder / "smaller", bpe_tokenizer(vocabulary=340))
    save_tiny_model(folder / "latin", bpe_tokenizer(text=ENGLISH.replace("e", "i") + "gallia est omnis divisa"))
    save_tiny_model(folder / "wider", width=48), save_tiny_model(folder / "resized", rows=300)
    save_tiny_model(folder / "nan", change=lambda x: {name: w * math.nan for name, w in x.items()})
    save_tiny_model(folder / "prefix", change=lambda x: {f"_orig_mod.{name}": w for name, w in x.items()})
    judge = partial(save_tiny_model, kind="GPT2ForSequenceClassification")
    judge(folder / "headless", num_labels=1, change=lambda x: {n.replace("score", "v"): w for n, w in x.items()})
    judge(folder / "two", num_labels=2)
    align(folder, folder / "run", **RESUMED)
    return folder


def command_line(folder: Path, arguments: list, environment: dict) -> None:
    os.environ |= environment
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
    sys.argv = ["aligndistil.py", *arguments]
    sys.exit(ad.main())


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(prepared, tmp_path, bad):
    """Notices bad input that gives a traceback, a vague message, another exit status, or written files."""
    words = bad.replace("{}", str(prepared)).split()
    environment = dict(word.split("=") for word in words if "=" in word)
    arguments = [word for word in words if "=" not in word]
    out = Path(arguments[1]) if "--output_dir" in arguments else tmp_path / "out"
    settings = {"model": prepared / "base", "dataset": prepared / "good.jsonl", "output_dir": out, **RESUMED}
    before = in_folder(out)
    process = FORK.Process(target=command_line, args=(tmp_path, flags(**settings) + arguments, environment))
    process.start()
    process.join(60)
    bars = r"[^\r\n]*\[\d[^]\r\n]*/(s|it|ex)[^]\r\n]*\]|^usage: .*"
    errors = re.sub(bars, "\n", (tmp_path / "stderr").read_text(), flags=re.M).split("\n")
    errors = [line for line in errors if line.strip()]
    assert process.exitcode == 2 and len(errors) == 1, errors
    assert re.match(r"\w+(\.py)+: error: ", errors[0]) and BAD[bad] in errors[0], errors
    assert in_folder(out) == before and out.exists() == bool(before)


OUT_OF_MEMORY = torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    ("raised", "status", "word"),
    [(OUT_OF_MEMORY, 2, "--tokens_per_micro_batch"), (KeyboardInterrupt(), 130, "same command"), (None, 2, "make room")],
)
def test_how_a_run_ends(prepared, tmp_path, monkeypatch, capsys, raised, status, word):
    """Notices a full memory, a full disk at the metrics or a Ctrl-C that ends in more than one helpful line."""

    def stop(*_):
        raise raised

    monkeypatch.setattr(ad, "open", lambda path, mode: builtins.open("/dev/full", mode), raising=False)
    if raised:
        monkeypatch.setattr(ad, "sft_batch_loss", stop)
    settings = {"model": prepared / "base", "dataset": prepared / "good.jsonl", "output_dir": tmp_path / "out"}
    monkeypatch.setattr(sys, "argv", ["aligndistil.py", *flags(**settings | SMALL)])
    assert ad.main() == status
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error: " in x]
    assert line.startswith("aligndistil.py: error: ") and word in line


@pytest.mark.parametrize("stage", ["sft", "dpo", "policy"])
def test_a_gradient_that_is_not_finite(prepared, tmp_path, stage):
    """Notices a run that goes on, or is silent about where it was, when its weights explode."""
    rate = {f"{stage.replace('policy', 'distill')}_learning_rate": 1e30}
    with pytest.raises(ad.BadInput, match=f"{stage}, step [23]: "):
        align(prepared, tmp_path / "out", **SMALL | rate | {"off_policy": stage == "policy"})


def test_an_unsupported_architecture_is_refused(monkeypatch):
    """Notices logits that are not head(body(tokens)) and are trained on all the same."""
    monkeypatch.setattr(ad.LM, "logits", lambda lm, hidden: 2 * lm.head(hidden))
    with pytest.raises(ad.BadInput, match="doubled"):
        ad.check_model(tiny_lm(), "doubled")


def test_weights_move_at_a_learning_rate_of_1e_6(tmp_path):
    """Notices a bfloat16 checkpoint trained in bfloat16, where a step of 1e-6 is lost, or frozen in it."""
    save(tiny_gpt2().to(torch.bfloat16), tmp_path)
    lm, frozen = (ad.load_lm(tiny_run(), str(tmp_path)) for _ in range(2))
    batch = ad.collate(singles(), pad_id=0)
    assert torch.equal(*(x.logits(x.hidden(batch)) for x in (lm, frozen))), "a frozen copy is the model itself"
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=1e-6, weight_decay=0, fused=True)
    ad.sft_batch_loss(lm, batch, 1 / 6)
    optimizer.step()
    assert {weight.dtype for x in (lm, frozen) for weight in x.model.parameters()} == {torch.float32}
    ours, theirs = (x.model.transformer.h[0].mlp.c_fc.weight for x in (lm, frozen))
    assert (ours != theirs).float().mean() > 0.9


# 10  The run: what it leaves, kills and going on, several processes -----------------------------------------


def metrics(folder: Path) -> list:
    """The whole lines of metrics.jsonl so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line[-1] == "\n"]


def read(folder: Path, name: str):
    return json.loads((folder / f"{name}.json").read_text())


def assert_same_run(folder: Path, reference: Path) -> None:
    """Bit for bit."""
    for file in [f"{stage}/model.safetensors" for stage in ALL_STAGES] + ["metrics.jsonl", "results.json"]:
        assert (folder / file).read_bytes() == (reference / file).read_bytes(), file


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The output folder of a short run of the demo."""
    folder = tmp_path_factory.mktemp("demo")
    settings = {"limit": 1024, "max_steps": 40, "batch_size": 32, "dpo_learning_rate": 1e-3, "eval_pairs": 300}
    ad.align(ad.parse_args(flags(output_dir=folder, **SMALL | settings | {"distill_epochs": 2, "alpha_r": 3})))
    return folder


def test_something_is_learned(demo):
    """Notices a stage that trains on the wrong thing: chance, or a loss that does not fall."""
    sft, dpo, policy = ([x for x in metrics(demo) if x["stage"] == name] for name in ("sft", "dpo", "policy"))
    assert sft[0]["loss"] > 4 and statistics.mean(x["loss"] for x in sft[-5:]) < 2.5
    assert dpo[0]["loss"] == pytest.approx(math.log(2), rel=1e-6) and dpo[0]["rewards/margins"] == 0
    first, last = (statistics.mean(x["kl_teacher"] for x in part) for part in (policy[:5], policy[-5:]))
    assert last < 0.8 * first
    results = read(demo, "results")
    assert all(row["accuracy"] - row["accuracy_pm"] > 0.5 for row in results["reward_accuracy"].values())
    assert results["models"]["policy"]["reward"] > results["models"]["reference"]["reward"]


def test_a_finished_run_is_left_alone(prepared):
    before = in_folder(prepared / "run")
    results = align(prepared, prepared / "run", **RESUMED)
    assert in_folder(prepared / "run") == before and results == read(prepared / "run", "results")


OF_DPO = {f"rewards/{name}" for name in ("accuracies", "margins", "chosen", "rejected")}
OF_DPO |= {"logps/chosen", "logps/rejected"}
OF_POLICY = {"alpha", "beta_t", "kl_teacher", "implausible", "reward", "entropy", "kl_dpo"}
OF_POLICY |= {"completions/mean_length", "completions/clipped_ratio"}
SCORES = {"reward", "kl_ref", "length", "entropy", "distinct"}
OF_DEMO = {"win_rate", "win_rate_pm", "true_reward", "true_reward_pm", "well_formed"}


@pytest.mark.parametrize("of_demo", [False, True])
def test_what_a_run_leaves(prepared, demo, of_demo):
    """Notices a missing model, tokenizer, column or number in the output folder."""
    folder = demo if of_demo else prepared / "run"
    truth = {"true_reward", "well_formed"} if of_demo else set()
    columns = {"sft": set(), "dpo": OF_DPO, "reverse_dpo": OF_DPO, "policy": OF_POLICY | truth}
    steps = [(line["stage"], line["step"]) for line in metrics(folder)]
    assert steps == [(stage, 1 + i) for stage in ALL_STAGES for i in range(steps[-1][1])]
    for line in metrics(folder):
        assert line.keys() >= {"loss", "grad_norm", "learning_rate"} | columns[line["stage"]]
    for stage in ALL_STAGES:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / stage)
        assert len(transformers.AutoTokenizer.from_pretrained(folder / stage)) <= model.config.vocab_size
        assert model.dtype == torch.float32
    results, samples = read(folder, "results"), read(folder, "samples")
    assert list(results["models"]) == ["reference", *STAGES] and len(samples) == 4 * (8 if of_demo else 4)
    for name, row in results["models"].items():
        assert row.keys() >= SCORES | (OF_DEMO if of_demo else set())
        assert (abs(row["kl_ref"]) < 1e-4) == (name == "reference")
    assert {row["pairs"] for row in results["reward_accuracy"].values()} == {300 if of_demo else 4}
    assert all(sample.keys() >= {"instruction", "output", "generator", "length"} for sample in samples)
    assert read(folder, "config")["alpha_r"] == (3.0 if of_demo else 30.0)
    assert not list(folder.glob(".*.partial")) and not list(folder.glob("checkpoint*"))


def test_a_chat_model_stops_where_it_was_trained_to(prepared, tmp_path):
    """A whole run of a chat model, whose checkpoint names another end, and settings that do not fit."""
    tokenizer = bpe_tokenizer(CHATML)
    save_tiny_model(tmp_path / "chat", tokenizer)
    config = {"do_sample": False, "temperature": 0.6, "eos_token_id": 0}
    (tmp_path / "chat" / "generation_config.json").write_text(json.dumps(config))
    align(prepared, tmp_path / "out", **SMALL | {"model": str(tmp_path / "chat"), "max_steps": 1})
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<eos>"])
    for stage in STAGES:
        assert transformers.GenerationConfig.from_pretrained(tmp_path / "out" / stage).eos_token_id == ends
    assert not (tmp_path / "out" / "sft").exists(), "a chat model needs no SFT"


@pytest.mark.parametrize("chat", [False, True])
def test_judge_vanilla_and_a_wider_teacher(prepared, tmp_path, chat):
    """Notices scores of another text or order than the judge's own, or a reverse model trained for nothing."""
    tokenizer = bpe_tokenizer(each("{{ m['role'][0] }} {{ m['content'] }};") if chat else None)
    tokenizer.model_max_length = 12 if chat else 128  # the judge sees no more
    judge = save_tiny_model(tmp_path / "judge", tokenizer, kind="GPT2ForSequenceClassification", num_labels=1)
    settings = {"judge": str(tmp_path / "judge"), "reward": "vanilla", "sft": False, "dpo": str(prepared / "wider")}
    align(prepared, tmp_path / "out", **SMALL | settings | {"precision": "bf16", "gradient_checkpointing": chat})
    results, samples = read(tmp_path / "out", "results"), read(tmp_path / "out", "samples")
    assert list(results["models"]) == ["reference", "dpo", "policy"] and list(results["reward_accuracy"]) == ["dpo"]
    assert {"reward_dpo", "judge", "judge_pm", "win_rate", "win_rate_pm"} <= results["models"]["policy"].keys()
    assert results["precision"].keys() == {"share", "kl"}
    assert {line["stage"] for line in metrics(tmp_path / "out")} == {"policy"}
    for sample in samples:
        text = sample["instruction"] + sample["output"]
        text = f"u {sample['instruction']};a {sample['output']};" if chat else text
        score = judge(**tokenizer(text, truncation=True, return_tensors="pt")).logits.item()
        assert sample["judge"] == pytest.approx(score, abs=1e-4)
    sides = [(x["judge"], y["judge"]) for x, y in zip(samples[8:], samples[:4])]
    expected = statistics.mean((x > y) + (x == y) / 2 for x, y in sides)
    assert results["models"]["policy"]["win_rate"] == pytest.approx(expected)


def test_gradient_checkpointing_of_a_whole_run(prepared, tmp_path, monkeypatch):
    """Notices a step that does not recompute, samples without a cache, or changes a loss."""
    own, modes = {name: getattr(ad.LM, name) for name in ("hidden", "generate")}, set()
    for name in own:
        watched = lambda lm, *rest, name=name: modes.add((name, lm.model.training)) or own[name](lm, *rest)  # noqa: E731
        monkeypatch.setattr(ad.LM, name, watched)
    align(prepared, tmp_path, **RESUMED | {"gradient_checkpointing": True})
    assert ("hidden", True) in modes and ("generate", True) not in modes
    ours, theirs = ([line["loss"] for line in metrics(folder)[:12]] for folder in (tmp_path, prepared / "run"))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_policy_s_start_schedule_and_seed(prepared, tmp_path):
    """Notices teachers trained again, a policy that starts elsewhere, other rates, and a seed without effect."""
    settings = {name: str(prepared / "run" / name) for name in ("dpo", "reverse_dpo")} | {"max_steps": 10}
    settings |= {"distill_epochs": 20, "warmup_ratio": 0.2, "sft": False, "init_from": "dpo", "off_policy": True}
    for seed in (0, 1):
        align(prepared, tmp_path / str(seed), **SMALL | settings | {"seed": seed, "distill_learning_rate": 1e-12})
    ours, others = metrics(tmp_path / "0"), metrics(tmp_path / "1")
    assert not (tmp_path / "0" / "dpo").exists() and {line["stage"] for line in ours} == {"policy"}
    expected = [1e-12 * ad.warmup_then_cosine(step, 10, 0.2) for step in range(10)]
    assert [line["learning_rate"] for line in ours] == pytest.approx(expected)
    assert [line["loss"] for line in ours] != [line["loss"] for line in others]
    folders = (tmp_path / "0" / "policy", prepared / "run" / "dpo", prepared / "base")
    policy, dpo, start = (load_file(folder / "model.safetensors") for folder in folders)
    moved = [max((policy[name] - x[name]).abs().max().item() for name in policy) for x in (dpo, start)]
    assert moved[0] < 1e-9 < moved[1]


def test_kills_change_nothing(prepared, tmp_path):
    """Notices what a kill at any moment breaks, repeats or loses: one weight, one line, one result."""
    kills = []

    def start():
        process = FORK.Process(target=align, args=(prepared, tmp_path), kwargs=RESUMED)
        process.start()
        return process

    for lines, wait in ((2, 0.01), (5, 0.03), (9, 0), (13, 0.05), (16, 0.02), (21, 0.04)):  # of 24
        process = start()
        while process.is_alive() and len(metrics(tmp_path)) < lines:
            time.sleep(0.002)
        time.sleep(wait)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills.append(metrics(tmp_path)[-1]["stage"])
    process = start()
    process.join()
    assert len(kills) >= 4 and len(set(kills)) >= 2 and process.exitcode == 0
    assert_same_run(tmp_path, prepared / "run")


def test_leftovers_of_a_kill(prepared, tmp_path):
    """Notices leftovers of a kill that are taken for whole, and finished stages that are done twice."""
    out = shutil.copytree(prepared / "run", tmp_path / "out")
    (out / "results.json").unlink()
    shutil.rmtree(out / "policy")
    shutil.copytree(out / "sft", out / ".policy.partial")
    (out / ".checkpoint-policy.pt.partial").write_bytes(b"half")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"stage": "policy", "st')
    before = {stage: (out / stage).stat().st_mtime_ns for stage in ALL_STAGES[:3]}
    align(prepared, out, **RESUMED)
    assert before == {stage: (out / stage).stat().st_mtime_ns for stage in ALL_STAGES[:3]}
    assert not list(out.glob(".*.partial"))
    assert_same_run(out, prepared / "run")


def test_torchrun_and_a_terminal_of_ascii(prepared, tmp_path):
    """Notices two processes that are not one, or that an arrow in a sample stops."""
    # teachers that differ: else the KL to them is 1e-4 and carries float32's rounding of the logits
    settings = SMALL | RATES | {"off_policy": True, "save_steps": 1, "tokens_per_micro_batch": 64}
    align(prepared, tmp_path / "1", **settings)
    settings |= {"model": prepared / "base", "dataset": prepared / "good.jsonl", "output_dir": tmp_path / "2"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, ad.__file__, *flags(**settings)], capture_output=True, timeout=300, check=False,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count(b"own responses to held-out prompts") == 1, done.stderr
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert len(one) == len(two) == 12
    for ours, theirs in zip(one[::3], two[::3]):  # the first step of every stage
        assert ours.pop("stage") == theirs.pop("stage") and ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


# README and notebook ----------------------------------------------------------------------------------------

NOTEBOOK = Path(ad.__file__).with_name("tutorial.ipynb")
BENCHMARK_FLAGS = {"batch", "length", "threads", "repeats", "device", "precision"}


def cells(kind: str) -> list:
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == kind]


def test_the_readme_s_flags_are_there():
    """Notices a flag of the README's commands that the script does not have."""
    readme = NOTEBOOK.with_name("README.md").read_text(encoding="utf-8")
    commands = " ".join(re.findall(r"\baligndistil\.py\b([^`\n|]*)", readme))
    names = {field.name for field in dataclasses.fields(ad.Args)} | BENCHMARK_FLAGS | {"help"}
    assert commands and set(re.findall(r" --(\w+)", commands)) <= names


def test_the_notebook_runs(monkeypatch):
    """Notices a cell that fails, on a few steps of training and with no hub."""
    monkeypatch.setenv("ALIGNDISTIL_QUICK", "1")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()


def test_the_notebook_as_it_is_saved():
    """Notices a run not from top to bottom, an error, a warning, a machine's path, or an equation missing."""
    assert [cell.execution_count for cell in cells("code")] == list(range(1, len(cells("code")) + 1))
    outputs = [output for cell in cells("code") for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr|var|Users)/", str(outputs))
    equations = re.findall(r"\\tag\{(\d+)\}", "\n".join(cell.source for cell in cells("markdown")))
    assert sorted(map(int, equations)) == list(range(1, 20))


def test_the_notebook_shows_the_current_source():
    """Notices a line of shown source that is no more aligndistil.py's: run the notebook again."""
    lines = set(inspect.getsource(ad).splitlines()) | {""}
    outputs = [output.get("data", {}) for cell in cells("code") for output in cell.outputs]
    text = "\n".join(data.get("text/markdown", "") for data in outputs)
    shown = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(shown) >= 5 and set("\n".join(shown).splitlines()) <= lines


# The benchmark: one step's loss and gradient (no optimizer) at GPT-2's shape with random weights ------------


def dense_logps(lm, batch):
    return dense_token_logps(dense_logits(lm, batch).float(), batch)


def authors_distillation(policy, dpo, base, batch):
    """(a) As the authors' trainer does it: whole logits of three models, prompts included."""
    with torch.no_grad():
        d, b = dense_logits(dpo, batch).float(), dense_logits(base, batch).float()
        alpha = 10 * (d.softmax(-1) - b.softmax(-1)).abs().sum(-1) + 1e-3
        target = d + alpha.unsqueeze(-1) * (d - b)
    loss = mean(0.1 / alpha * dense_kl(dense_logits(policy, batch).float(), target), batch).mean()
    loss.backward()
    return loss


def authors_dpo(policy, reference, batch):
    """(a) DPO with the log-probabilities of every position gathered from whole logits."""
    with torch.no_grad():
        ref_logps = dense_logps(reference, batch).sum(-1)
    loss = ad.dpo_loss(*dense_logps(policy, batch).sum(-1).chunk(2), *ref_logps.chunk(2), beta=0.1).mean()
    loss.backward()
    return loss


def floor(policy, frozen, batch):
    """(c) What nothing can leave out: the bodies, the policy's backward, the heads at the response states."""
    with torch.no_grad():
        for lm in frozen:
            states = lm.hidden(batch)
            for rows in ad.chunks(states):
                lm.logits(states[rows])
    return ad.backward_in_chunks(policy, policy.hidden(batch), lambda z, _: {"loss": z.square().sum()}, 1.0)["loss"]


def benchmark():
    parser = argparse.ArgumentParser(description="seconds of one step; half of each sequence is the prompt")
    for name, default in {"batch": 4, "length": 256, "threads": 2, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bf16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    run, lms = tiny_run(device=args.device), []
    for seed in range(3):
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=max(1024, args.length)))
        lms.append(ad.LM(model.to(args.device), args.precision))
    policy, dpo, base = lms
    responses = random_responses([(args.length // 2, args.length - args.length // 2)] * args.batch)
    distil = partial(ad.distillation_batch_loss, teacher=teacher_of(dpo, base, alpha_r=20.0))
    train_dpo = partial(ad.dpo_batch_loss, beta=0.1, reference=dpo)
    print(f"{args.batch} x {args.length} tokens, GPT-2's shape, {args.device}, {args.precision}, {args.threads} threads")
    print("seconds: (a) the authors' dense loss, (b) ours, (c) the passes of bodies and heads alone")
    for stage, examples, loss_of, dense, frozen in [
        ("distillation", singles(responses), distil, partial(authors_distillation, policy, dpo, base), [dpo, base]),
        ("DPO", list(zip(responses[::2], responses[1::2])), train_dpo, partial(authors_dpo, policy, dpo), [dpo]),
    ]:
        whole, seconds, found = ad.collate(examples, 0, args.device), {}, {}
        for name in ["a", "b", "c"] * (args.repeats + 1):  # in turn: a drift of the machine hits all alike
            began, total = time.perf_counter(), 0
            with policy.autocast():
                if name == "b":
                    for _, batch in ad.micro_batches(run, examples):
                        total += loss_of(policy, batch, 1 / len(examples))["loss"] / len(examples)
                else:
                    total = dense(whole) if name == "a" else floor(policy, frozen, whole)
            found[name] = total.item(), gradients(policy.model)  # item() waits for the device
            seconds.setdefault(name, []).append(time.perf_counter() - began)
        rough = 1e-4 if args.precision == "float32" else 0.1
        assert found["b"][0] == pytest.approx(found["a"][0], rel=rough)
        assert_same_gradients(found["b"][1], found["a"][1], rough)
        a, b, c = (statistics.median(column[1:]) for column in seconds.values())
        print(f"{stage:13} (a) {a:6.2f}  (b) {b:6.2f}  (c) {c:6.2f}  (b)/(a) {b / a:.2f}  (b)/(c) {b / c:.2f}")


if __name__ == "__main__":
    benchmark()
