"""Tests of aligndistil.py (`pytest`), and its benchmark (`python test_aligndistil.py --help`).

The tests follow the sections of aligndistil.py: the mathematics against independent float64 computations, the
losses against dense ones, data, then runs and failures on the real command line.
"""

import argparse
import builtins
import copy
import dataclasses
import functools
import gzip
import inspect
import itertools
import json
import math
import os
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
if __name__ != "__main__":  # no hub is there
    os.environ |= {"HF_HOME": HOME.name, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}

import datasets
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
NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def random_logits(*shape):
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=generator)


def spread(model, std=0.3):
    """The model with weights large enough to tell states apart."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def tiny_gpt2(seed=0, **options):
    """A random two-layer GPT-2; dropout is left at GPT-2's own 0.1."""
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return spread(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **options)))


def tiny_lm(seed=0, **options):
    return ad.LM(tiny_gpt2(seed), **options)


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
    """Errors are measured by the whole gradient: that of one weight may be 0, and its error all of it."""
    assert ours.keys() == theirs.keys()
    size = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for name in ours:
        error = (ours[name] - theirs[name]).norm() / size
        assert error < tolerance, f"{name}: error {error:.2e} of the whole gradient"


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


# ------------------------------------------------------------------------------------------------------------
# 1  Settings
# ------------------------------------------------------------------------------------------------------------


def test_every_setting_is_explained(capsys):
    """Notices a setting without a text in --help, and demo settings that reach another model."""
    assert ad.parse_args(["--model", "gpt2"]) == ad.Args(model="gpt2")
    assert dataclasses.asdict(ad.parse_args([])) == dataclasses.asdict(ad.Args()) | ad.DEMO
    assert ad.parse_args(["--batch_size", "7"]).batch_size == 7, "a flag goes before the preset"
    with pytest.raises(SystemExit):
        ad.parse_args(["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(ad.Args):
        assert re.search(rf"^  --{field.name}\b[^\n]*\n? +\S*[a-zα-ω0].*", shown, re.M), field.name
    assert re.findall(r"^  --\S+( \S+)*\n(?=  --|\Z)", shown, re.M) == []


def test_flags_that_are_switches():
    """Notices a switch that cannot be turned off, or that takes "False" for true."""
    assert ad.parse_args(["--off_policy", "--sft", "False"]).off_policy
    assert ad.parse_args(["--sft", "False"]).sft is False and ad.parse_args(["--sft", "True"]).sft is True
    assert ad.parse_args(["--gradient_checkpointing", "False"]).gradient_checkpointing is False


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
    assert ad.total_variation(p, p + 5).abs().max() < 1e-12, "logits are known up to a constant"


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


def lengths_of(batch):
    return torch.bincount(batch.response)


def dense_logits(lm, batch):
    """The model's own logits (B, T, V), with the attention mask that a Batch does without."""
    width = batch.input_ids.shape[1]
    last = batch.states[lengths_of(batch).cumsum(0) - 1] % width + 1  # each row's last token
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


def three_models(head):
    """A policy and two frozen models that differ from it."""
    lms = [ad.LM(HEADS[head]()) for _ in range(3)]
    for seed, lm in enumerate(lms[1:]):
        generator = torch.Generator().manual_seed(seed)
        for parameter in lm.model.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return lms


TEACHERS = {  # reward and constant α; None is the adaptive one
    "method": ("contrastive", None), "vanilla adaptive": ("vanilla", None),
    "contrastive constant": ("contrastive", 2.0), "vanilla constant": ("vanilla", 2.0),
    "plain distillation": ("contrastive", 0.0),
}  # fmt: skip
CASES = [(head, "method", False) for head in HEADS]
CASES += [("tied", name, off_policy) for name in TEACHERS for off_policy in (False, True)][1:]


@pytest.mark.parametrize(("head", "variant", "off_policy"), CASES)
def test_distillation_in_chunks_is_the_dense_one(float64, small_chunks, head, variant, off_policy):
    """Notices a wrong head, anchor, base, α or weight, and a number that is watched wrongly."""
    policy, dpo, base = three_models(head)
    batch, (reward, constant) = ad.collate(singles(), pad_id=0), TEACHERS[variant]
    mask, (p, d, b) = response_mask(batch), [dense_logits(lm, batch) for lm in (policy, dpo, base)]
    assert torch.allclose(policy.logits(policy.hidden(batch)), p[mask], rtol=1e-5, atol=1e-5)
    alpha = 6 * 0.5 * (d.softmax(-1) - b.softmax(-1)).abs().sum(-1) + 1e-3
    alpha = (alpha if constant is None else torch.full_like(alpha, constant)).detach()
    weight = torch.ones_like(alpha) if constant == 0 else 0.1 / alpha
    target = ((d if reward == "contrastive" else b) + alpha[..., None] * (d - b)).detach()
    dense = dense_distillation_loss(p, target, weight, mask)
    dense.backward()
    expected = gradients(policy.model)

    teacher = teacher_of(dpo, base, alpha_r=6.0, reward=reward, alpha=constant, off_policy=off_policy)
    sums = ad.distillation_batch_loss(policy, batch, 1 / 4, teacher)
    assert sums["loss"].item() / 4 == pytest.approx(dense.item(), rel=1e-6)
    assert_same_gradients(gradients(policy.model), expected)
    assert all(p.grad is None for lm in (dpo, base) for p in lm.model.parameters()), "teachers are not trained"

    own, of_dpo, of_base = (dense_token_logps(z.detach(), batch) for z in (p, d, b))
    means = {"alpha": alpha, "beta_t": weight, "kl_teacher": ad.reverse_kl(p, target)}
    means["implausible"] = ad.implausible_mass(target, d)
    if not off_policy:
        means["entropy"] = -own
    watched = {name: ((x * mask).sum(-1) / mask.sum(-1)).sum().item() for name, x in means.items()}
    watched["reward" if reward == "contrastive" else "reward_dpo"] = 0.1 * (of_dpo - of_base).sum().item()
    if not off_policy:
        watched["kl_dpo"] = (own - of_dpo).sum().item()
    assert {name: sums[name].item() for name in sums if name != "loss"} == pytest.approx(watched, rel=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_sft_and_dpo_in_chunks_are_the_dense_ones(float64, small_chunks, head):
    policy, reference, _ = three_models(head)
    batch = ad.collate(singles(), pad_id=0)
    logps = dense_token_logps(dense_logits(policy, batch), batch)
    found = ad.response_logps(policy, batch, policy.hidden(batch))
    assert torch.allclose(found, logps.sum(-1), rtol=1e-6)
    nll = -(logps.sum(-1) / lengths_of(batch)).mean()
    nll.backward()
    expected = gradients(policy.model)
    assert ad.sft_batch_loss(policy, batch, 1 / 4)["loss"].item() / 4 == pytest.approx(nll.item(), rel=1e-6)
    assert_same_gradients(gradients(policy.model), expected)

    logps = dense_token_logps(dense_logits(policy, batch), batch).sum(-1)
    with torch.no_grad():
        ref_logps = dense_token_logps(dense_logits(reference, batch), batch).sum(-1)
    rewards = 0.1 * (logps - ref_logps)
    margins = rewards[:2] - rewards[2:]
    loss = -margins.sigmoid().log().mean()
    loss.backward()
    expected = gradients(policy.model)
    sums = ad.dpo_batch_loss(policy, batch, 1 / 2, beta=0.1, reference=reference)
    assert_same_gradients(gradients(policy.model), expected)
    assert {name: value.item() for name, value in sums.items()} == pytest.approx({
        "loss": 2 * loss.item(), "rewards/accuracies": (margins > 0).sum().item(),
        "rewards/margins": margins.sum().item(), "rewards/chosen": rewards[:2].sum().item(),
        "rewards/rejected": rewards[2:].sum().item(), "logps/chosen": logps[:2].sum().item(),
        "logps/rejected": logps[2:].sum().item(),
    }, rel=1e-5)  # fmt: skip


def test_the_first_dpo_step_is_ln_2(small_chunks):
    """Notices a policy that differs from its own frozen copy, and a tie that is taken for a preference."""
    batch = ad.collate(singles(), pad_id=0)
    sums = ad.dpo_batch_loss(tiny_lm(), batch, 1.0, beta=0.1, reference=tiny_lm())
    assert sums["loss"].item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert sums["rewards/margins"] == 0 and sums["rewards/accuracies"] == 0


def losses_and_examples(device="cpu", precision="float32"):
    """name → (loss_of, examples) for every loss."""
    responses = random_responses([(3, 4), (5, 2), (1, 7), (6, 1), (2, 2), (4, 9)])
    first, second = tiny_lm(1, precision=precision), tiny_lm(2, precision=precision)
    for lm in (first, second):
        lm.model.to(device)
    distil = partial(ad.distillation_batch_loss, teacher=teacher_of(first, second, alpha_r=6.0))
    dpo = partial(ad.dpo_batch_loss, beta=0.1, reference=first)
    return {
        "sft": (ad.sft_batch_loss, singles(responses)),
        "dpo": (dpo, list(zip(responses[:3], responses[3:]))),
        "distillation": (distil, singles(responses)),
    }


LOSSES = ("sft", "dpo", "distillation")


def step_gradient(run, lm, examples, loss_of, n=None):
    """What a training step does before the optimizer: (sums, gradients) of examples, in micro-batches."""
    sums = {}
    for _, batch in ad.micro_batches(run, examples):
        ad.add_up(sums, loss_of(lm, batch, scale=1 / (n or len(examples))))
    run.args.max_grad_norm = math.inf
    ad.gather_gradients(run, lm.model, "here")
    return sums, gradients(lm.model)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_leave_loss_and_gradient_unchanged(float64, name):
    policy, (loss_of, examples) = tiny_lm(), losses_and_examples()[name]
    whole, expected = step_gradient(tiny_run(), policy, examples, loss_of)
    for tokens in (16, 1):
        sums, found = step_gradient(tiny_run(tokens_per_micro_batch=tokens), policy, examples, loss_of)
        assert sums.keys() == whole.keys()
        for key in sums:
            assert sums[key].item() == pytest.approx(whole[key].item(), rel=1e-9), key
        assert_same_gradients(found, expected, 1e-9)


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
        loss = sums["loss"].item() / len(examples)
        assert found[name].pop("loss").item() == pytest.approx(loss, rel=1e-4), name
        assert_same_gradients(found[name], expected, 1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_neither_waits_nor_mixes_devices(monkeypatch, name):
    """Notices a tensor left on the CPU or a number fetched in mid-step: on "meta", our CUDA, both fail."""
    # transformers itself waits once a body pass: it looks for packed sequences
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda positions: None)
    lm, (loss_of, examples) = tiny_lm(), losses_and_examples("meta")[name]
    lm.model.to("meta")
    sums = loss_of(lm, ad.collate(examples, pad_id=0, device="meta"), 1.0)
    assert {value.device.type for value in sums.values()} == {"meta"}


@pytest.mark.parametrize("name", ["dpo", "distillation"])
def test_frozen_models_keep_no_activations(name):
    """Notices a pass of a frozen model that is recorded for a gradient: it fills memory for nothing."""
    loss_of, examples = losses_and_examples()[name]
    given, recorded = loss_of.keywords, []
    for lm in given["teacher"].lms.values() if "teacher" in given else [given["reference"]]:
        lm.model.transformer.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    loss_of(tiny_lm(), ad.collate(examples, pad_id=0), 1.0)
    assert recorded and not any(recorded)


def test_no_logits_of_a_whole_batch(monkeypatch, small_chunks):
    """Notices an output head that sees more than one chunk of states, or a prompt or pad position."""
    seen, own = [], ad.LM.logits

    def watched(lm, hidden):
        seen.append(len(hidden))
        return own(lm, hidden)

    monkeypatch.setattr(ad.LM, "logits", watched)
    for name, (loss_of, examples) in losses_and_examples().items():
        seen.clear()
        loss_of(tiny_lm(), ad.collate(examples, pad_id=0), 1.0)
        states = sum(len(response.tokens) for example in examples for response in example)
        passes = {"sft": 1, "dpo": 3, "distillation": 3}[name]
        assert max(seen) == 5 and sum(seen) == passes * states, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_bfloat16_step_has_float32_losses_and_gradients(name, checkpointing):
    """Notices autocast that is not used, reaches the loss, or is forgotten when layers are computed again."""
    loss_of, examples = losses_and_examples(precision="bf16")[name]
    batch, lm = ad.collate(examples, pad_id=0), tiny_lm(precision="bf16")
    if checkpointing:
        lm.model = ad.LM(tiny_gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)).model
        lm.head = lm.model.lm_head
        lm.model.gradient_checkpointing_enable({"use_reentrant": False})
        lm.model.train()
    sums, found = loss_of(lm, batch, 1.0), gradients(lm.model)
    assert lm.logits(lm.hidden(batch)).dtype == torch.float32
    assert {x.dtype for x in [*sums.values(), *found.values(), *lm.model.parameters()]} == {torch.float32}
    exact = tiny_lm()
    loss_of = losses_and_examples()[name][0]
    assert sums["loss"].item() == pytest.approx(loss_of(exact, batch, 1.0)["loss"].item(), rel=0.1)
    expected = gradients(exact.model)
    assert_same_gradients(found, expected, 0.3)
    assert any((found[key] - expected[key]).norm() > 1e-3 * expected[key].norm() for key in found)


@NO_CARD
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_on_cuda_is_that_on_the_cpu(name):
    lm, loss_of = tiny_lm(), losses_and_examples("cuda")[name][0]
    expected_loss_of, examples = losses_and_examples()[name]
    expected = step_gradient(tiny_run(), tiny_lm(), examples, expected_loss_of)
    lm.model.to("cuda")
    sums, found = step_gradient(tiny_run(device="cuda"), lm, examples, loss_of)
    for key, value in sums.items():
        assert value.item() == pytest.approx(expected[0][key].item(), rel=1e-3, abs=1e-3), key
    assert_same_gradients({key: x.cpu() for key, x in found.items()}, expected[1], 1e-3)


# ------------------------------------------------------------------------------------------------------------
# 5  The training loop and sampling
# ------------------------------------------------------------------------------------------------------------


def test_batches_walk_through_every_record_once_an_epoch():
    steps = ad.batches_of(ad.Args(batch_size=4, seed=1), 10, epochs=2)
    walk = list(itertools.chain(*steps))
    assert len(steps) == 5 and sorted(walk[:10]) == sorted(walk[10:]) == list(range(10))
    assert walk[:10] != walk[10:] and steps != ad.batches_of(ad.Args(batch_size=4, seed=2), 10, epochs=2)
    assert ad.batches_of(ad.Args(batch_size=4, seed=1, max_steps=2), 10, epochs=2) == steps[:2]
    assert [len(step) for step in ad.batches_of(ad.Args(batch_size=40), 10, epochs=0.5)] == [10]


def test_the_schedule_by_hand():
    """Warm-up over a fifth of 20 steps, then half a cosine that starts at the peak and nears a tenth."""
    rates = [ad.warmup_then_cosine(step, 20, 0.2) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[12] == pytest.approx(0.55) and 0.1 < rates[-1] < 0.12
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert ad.warmup_then_cosine(0, 1, 0.0) == ad.warmup_then_cosine(0, 1, 0.1) == 1


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
            assert torch.allclose(seen[t][row], alone, atol=1e-4)
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
    rows = [{"prompt": [5, 6]}] * 200
    examples, sums = ad.own_responses(run, tiny_lm(), rows)
    outputs = [response.tokens for ((response),) in examples]
    ended = [y for y in outputs if y[-1] in (3, 4)]
    cut = [y for y in outputs if y[-1] not in (3, 4)]
    assert ended and cut and all(len(y) == 6 for y in cut)
    assert {y[-1] for y in ended} == {3, 4}
    assert not any(token in (3, 4) for y in outputs for token in y[:-1])
    assert sums == {"completions/mean_length": sum(map(len, outputs)), "completions/clipped_ratio": len(cut)}


# ------------------------------------------------------------------------------------------------------------
# 6  A language model taken apart, and the families that people load
# ------------------------------------------------------------------------------------------------------------


def test_states_are_the_ones_that_predict_the_response():
    """Shift by one: |y| states, from the last prompt position to the last but one of the response."""
    batch = ad.collate([[ad.Response([7, 8, 9], [4, 5])], [ad.Response([6], [1, 2, 3])]], pad_id=0)
    assert batch.input_ids.tolist() == [[7, 8, 9, 4, 5], [6, 1, 2, 3, 0]]
    assert batch.states.tolist() == [2, 3, 5, 6, 7] and batch.targets.tolist() == [4, 5, 1, 2, 3]
    assert batch.response.tolist() == [0, 0, 1, 1, 1]
    assert batch.weights.tolist() == pytest.approx([1 / 2] * 2 + [1 / 3] * 3)


def test_a_pad_id_that_is_the_end_token_hides_nothing():
    """Notices an end token at a response's end that is not trained on because padding has the same id."""
    end, lm = 9, tiny_lm()
    examples = [[ad.Response([1, end, 2], [3, end])], [ad.Response([4], [5, 6, 7, 8, end])]]
    batch = ad.collate(examples, pad_id=end)
    alone = [ad.collate([example], pad_id=0) for example in examples]
    expected = torch.cat([ad.response_logps(lm, x, lm.hidden(x)) for x in alone])
    assert torch.allclose(ad.response_logps(lm, batch, lm.hidden(batch)), expected, rtol=1e-4)
    assert batch.targets.tolist().count(end) == 2


def test_micro_batches_are_sorted_and_hold_every_example_once():
    sizes = [(1, 1), (9, 9), (3, 4), (2, 2), (30, 30), (5, 5)]
    found = list(ad.micro_batches(tiny_run(tokens_per_micro_batch=20), singles(random_responses(sizes))))
    assert [group for group, _ in found] == [[4], [1], [5, 2], [3, 0]]
    assert [lengths_of(batch).tolist() for _, batch in found] == [[30], [9], [5, 4], [2, 1]]


def test_a_teacher_on_another_device_gives_the_same_numbers():
    """Notices a head that stays behind. The 'meta' device stands for a second one, which may not be here."""
    model, batch = tiny_gpt2(), ad.collate(singles(), pad_id=0)
    elsewhere = ad.LM(model, head_device=torch.device("meta"))
    assert elsewhere.head.weight.device.type == "meta" and model.lm_head.weight.device.type == "cpu"
    assert elsewhere.logits(elsewhere.hidden(batch)).device.type == "meta"


def opt():
    """A model whose layers take dropout from numbers of their own, not from a module."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=1,
        num_attention_heads=2, dropout=0.5, attention_dropout=0.5,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def save(model, folder: Path) -> str:
    """A model with a tokenizer of no more ids than it has rows."""
    model.save_pretrained(folder)
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("make", [tiny_gpt2, opt])
def test_dropout_is_off_and_gradient_checkpointing_changes_nothing(make, tmp_path):
    """Notices dropout, and layers that keep their activations."""
    folder = save(make(), tmp_path)
    plain, lm = (ad.load_lm(tiny_run(gradient_checkpointing=on), folder) for on in (False, True))
    passes, norms = [], [module for module in lm.model.modules() if isinstance(module, torch.nn.LayerNorm)]
    for norm in norms:
        norm.register_forward_hook(lambda *_: passes.append("one"))
    batch = ad.collate(singles(), pad_id=0)
    lm.model.train()
    loss = ad.sft_batch_loss(lm, batch, 1.0)["loss"]
    assert len(passes) > len(norms), "a layer's own are computed again"
    assert loss.item() == pytest.approx(ad.sft_batch_loss(plain, batch, 1.0)["loss"].item(), rel=1e-6)
    assert_same_gradients(gradients(lm.model), gradients(plain.model), 1e-5)


SIZES_BY_NAME = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "ffn_dim": 48, "n_embd": 32,
    "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 2, "n_head": 2, "num_key_value_heads": 1,
    "head_dim": 16, "word_embed_proj_dim": 32, "state_size": 4, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = """GPT2 GPTNeoX OPT Bloom Falcon Phi Llama Mistral Mixtral Qwen2 Qwen3 Qwen2Moe Gemma2 Gemma3Text
    Granite Cohere Mamba StableLm Olmo2 SmolLM3""".split()


def tiny_of(family: str):
    """A random two-layer model of the family, without dropout."""
    config_class = getattr(transformers, f"{family}Config")
    known, aliases = vars(config_class()), config_class.attribute_map
    sizes = {name: size for name, size in SIZES_BY_NAME.items() if name in known or name in aliases}
    sizes |= {name: 0.0 for name, x in known.items() if isinstance(x, float) and "drop" in name}
    torch.manual_seed(0)
    name = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, name)(config_class(**sizes))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(small_chunks, family):
    """Notices a model whose chunks, left-padded samples or checkpointed layers depart from the model itself."""
    lm, batch = ad.LM(tiny_of(family)), ad.collate(singles(), pad_id=0)
    ad.check_model(lm, family)

    nll = -dense_token_logps(dense_logits(lm, batch), batch).sum(-1) / lengths_of(batch)
    nll.sum().backward()
    expected = gradients(lm.model)
    loss = ad.sft_batch_loss(lm, batch, 1.0)["loss"]
    assert loss.item() == pytest.approx(nll.sum().item(), rel=1e-4)
    assert_same_gradients(gradients(lm.model), expected, 1e-4)

    checkpointed = ad.LM(tiny_of(family))
    checkpointed.model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed.model.train()
    ad.sft_batch_loss(checkpointed, batch, 1.0)
    assert_same_gradients(gradients(checkpointed.model), expected, 1e-4)

    prompts = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 0, 0, 0, 11], [0, 0, 0, 12, 13, 14]])
    config = transformers.GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=4, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    output = lm.generate(prompts, (prompts > 0).long(), config)
    tokens = output.sequences[:, 6:]
    sampled = ad.token_logps(torch.stack(output.logits, 1).float(), tokens).sum(-1)
    ids = [[x for x in row if x] for row in prompts.tolist()]
    scored = ad.collate([[ad.Response(*pair)] for pair in zip(ids, tokens.tolist())], pad_id=0)
    assert torch.allclose(sampled, ad.response_logps(lm, scored, lm.hidden(scored)), atol=1e-2)
