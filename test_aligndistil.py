"""Tests of aligndistil.py (`pytest`), and its benchmark (`python test_aligndistil.py --help`).

The tests follow the sections of aligndistil.py: the mathematics against independent float64 computations, the chunked
losses against the dense ones, the traps that a token-level implementation can fall into, then data, runs and failures on
the real command line.
"""

import argparse
import contextlib
import copy
import ctypes
import itertools
import json
import math
import re
import statistics
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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
    assert torch.allclose(policy.logits(policy.hidden(batch)), shown, rtol=1e-5, atol=1e-5), "our head is the model's own"

    alpha_of = partial(ad.adaptive_alpha, r=6.0)
    alpha = alpha_of(everything[1], everything[2])
    teacher = ad.teacher_logits(everything[1], everything[1], everything[2], alpha)
    dense = ad.distillation_loss(everything[0], teacher, 0.1 / alpha, mask)
    dense_gradients = gradients(policy, dense)
    loss, watched = ad.distillation_batch_loss(policy, batch, dpo, rev, "contrastive", alpha_of, 0.1)
    assert (loss / 4).item() == pytest.approx(dense.item(), rel=1e-6)
    assert_same_gradients(gradients(policy, loss / 4), dense_gradients, 2e-6)
    assert all(p.grad is None for lm in (dpo, rev) for p in lm.parameters()), "teachers are not trained"
    mean = lambda values: sum(values[b][mask[b]].mean().item() for b in range(4))
    assert watched["alpha"].item() == pytest.approx(mean(alpha), rel=1e-5)
    assert watched["beta_t"].item() == pytest.approx(mean(0.1 / alpha), rel=1e-5)
    assert watched["kl"].item() == pytest.approx(mean(ad.reverse_kl(everything[0], teacher)), rel=1e-5)

    logps = torch.zeros(4).double()
    targets = batch.input_ids.roll(-1, 1)
    dense_token = ad.token_logps(dense_logits(policy, batch).double(), targets)
    logps = (dense_token * mask).sum(-1)
    nll = (-(dense_token * mask).sum(-1) / mask.sum(-1)).sum()
    assert torch.allclose(ad.response_logps(policy, batch).double(), logps.detach(), rtol=1e-6)
    dense_gradients = gradients(policy, nll)
    loss, _ = ad.sft_batch_loss(policy, batch)
    assert loss.item() == pytest.approx(nll.item(), rel=1e-6)
    assert_same_gradients(gradients(policy, loss), dense_gradients, 2e-6)

    batch.ref_logps = torch.tensor([-20.0, -9.0, -30.0, -5.0])
    logps = (ad.token_logps(dense_logits(policy, batch), targets) * mask).sum(-1)
    losses = ad.dpo_loss(*logps.chunk(2), *batch.ref_logps.chunk(2), beta=0.1)
    dense_gradients = gradients(policy, losses.sum())
    loss, watched = ad.dpo_batch_loss(policy, batch, beta=0.1)
    assert loss.item() == pytest.approx(losses.sum().item(), rel=1e-6)
    assert_same_gradients(gradients(policy, loss), dense_gradients, 2e-6)
    margins = 0.1 * ((logps - batch.ref_logps).chunk(2)[0] - (logps - batch.ref_logps).chunk(2)[1])
    assert watched["margin"].item() == pytest.approx(margins.sum().item(), rel=1e-4)
    assert watched["accuracy"].item() == (margins > 0).sum().item()


def test_the_two_rewards_and_constant_alpha_pick_the_right_teacher():
    """Wrong model as anchor or base, weight dropped, α = 0 with an infinite weight: each changes one of these numbers."""
    policy, dpo, base = (tiny_lm(seed) for seed in range(3))
    batch = ad.collate([[response] for response in random_responses(SIZES)], pad_id=0)
    mask, (p, d, b) = response_mask(batch), [dense_logits(lm, batch) for lm in (policy, dpo, base)]
    for reward, anchor, alpha in [("contrastive", d, 2.0), ("vanilla", b, 2.0), ("contrastive", d, 0.0)]:
        constant = lambda dpo_logits, base_logits, alpha=alpha: dpo_logits.new_full(dpo_logits.shape[:-1], alpha)
        loss, watched = ad.distillation_batch_loss(policy, batch, dpo, base, reward, constant, beta=0.1)
        weight = 0.1 / alpha if alpha else 1.0
        dense = ad.distillation_loss(p, anchor + alpha * (d - b), weight, mask)
        assert (loss / 4).item() == pytest.approx(dense.item(), rel=1e-5)
        assert watched["beta_t"].item() / 4 == pytest.approx(weight)


def test_no_logits_of_a_whole_batch(monkeypatch):
    """The output head never sees more than one chunk of states, nor a prompt or pad position."""
    policy, dpo, base = (tiny_lm(seed) for seed in range(3))
    batch, seen = ad.collate([[response] for response in random_responses(SIZES)], pad_id=0), []
    monkeypatch.setattr(ad.LM, "logits", lambda lm, hidden, own=ad.LM.logits: (seen.append(len(hidden)), own(lm, hidden))[1])
    ad.distillation_batch_loss(policy, batch, dpo, base, "contrastive", partial(ad.adaptive_alpha, r=6.0), 0.1)
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
            partial(ad.distillation_batch_loss, dpo=dpo, base=base, reward="contrastive", alpha_of=alpha_of, beta=0.1),
            [[response] for response in responses],
        ),
    }
    for name, (loss_of, examples) in losses.items():
        results = []
        for tokens in (10**6, 16, 1):
            policy.zero_grad()
            sums = ad.accumulate_gradient(policy, examples, loss_of, len(examples), tiny_run(tokens_per_micro_batch=tokens))
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
    padded = ad.response_logps(lm, ad.collate(responses, pad_id=end))
    alone = torch.cat([ad.response_logps(lm, ad.collate([response], pad_id=0)) for response in responses])
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
            z = {n: lm.model(input_ids=ids).logits[0, len(pair.chosen.prompt) - 1 : -1].double() for n, lm in lms.items()}
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
    policy, dpo, rev = make(torch.float32), make(frozen_type).requires_grad_(False), make(frozen_type).requires_grad_(False)
    half = args.length // 2
    draw = lambda n: torch.randint(config.vocab_size, (n,)).tolist()
    responses = [ad.Response(draw(half), draw(args.length - half), -8.0 * half) for _ in range(args.batch)]
    single, pairs = [[response] for response in responses], list(zip(responses[::2], responses[1::2]))
    alone, paired = ad.collate(single, 0, device), ad.collate(pairs, 0, device)
    mask = response_mask(alone).to(device)
    alpha_of = partial(ad.adaptive_alpha, r=20.0)
    distillation = partial(
        ad.distillation_batch_loss, dpo=dpo, base=rev, reward="contrastive", alpha_of=alpha_of, beta=0.1
    )
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
    print(f"GPT-2 shape, {args.batch} x {args.length} tokens, half prompt, {precision}, {device.type}, torch {torch.__version__}")
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
