"""Tests of aligndistil.py, section by section (`pytest`), and a benchmark (`test_aligndistil.py --help`)."""

import argparse
import dataclasses
import gzip
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

HOME = tempfile.TemporaryDirectory()  # the hub's cache: empty, and gone afterwards
if __name__ != "__main__":  # no hub is there
    os.environ |= {"HF_HOME": HOME.name, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # or two threads take six times as long where others compute
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # or a process that was forked cannot use a card

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
    shape = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return spread(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **options)), seed)
def spread(model, seed=0, std=0.3):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model
def tiny_lm(seed=0, device="cpu", **options):
    return ad.LM(tiny_gpt2(seed).to(device), **options)
def random_responses(sizes=SIZES):
    torch.manual_seed(1)
    return [ad.Response(*(torch.randint(1, VOCABULARY, (n,)).tolist() for n in size)) for size in sizes]
def singles(responses=None):  # examples of one response each
    return [[response] for response in responses or random_responses()]
def tiny_run(**settings):
    run = ad.Run(ad.Args(**{"max_length": 24, "max_prompt_length": 8, "device": "cpu", **settings}))
    run.tokenizer, run.stop_ids = ad.demo_tokenizer(), [0]
    return run
def teacher_of(dpo, base, **settings):
    return ad.Teacher(ad.Args(**settings), {"dpo": dpo, "reverse_dpo": base, "reference": base}.get)
def gradients(model):
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
    own = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else own(x))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(ad, "CHUNK_SIZE", 5)

# 1, 2  Settings and mathematics -----------------------------------------------------------------------------
def test_settings_have_a_text_in_help_and_switches_can_be_turned_off(capsys):
    assert ad.parse_args(["--model", "gpt2", "--sft", "False"]) == ad.Args(model="gpt2", sft=False)
    assert ad.parse_args(["--off_policy", "--seed", "1"]) == ad.Args(**ad.DEMO, off_policy=True, seed=1)
    with pytest.raises(SystemExit):
        ad.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(ad.Args))
    assert not re.search(r"^  --\S+( \S+)*\n(?=  --|\Z)", shown, re.M)
def probabilities(logits):
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
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor(x).double() for x in (-3.0, -4.0, -3.5, -3.0))
    loss = ad.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.1 * ((-3 + 3.5) - (-4 + 3)))), abs=1e-12)
    assert ad.dpo_loss(torch.tensor(-1e6), torch.tensor(1e6), 0.0, 0.0, 1.0).isfinite()

def test_gradient_of_reverse_kl_is_the_closed_form():
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
SIZES_BY_NAME = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "ffn_dim": 48, "state_size": 4,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "word_embed_proj_dim": 32, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 24,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = """GPT2 GPTNeoX OPT Bloom Falcon Phi Llama Mistral Mixtral Qwen2 Qwen3 Qwen2Moe Gemma2 Gemma3Text
    Granite Cohere Mamba StableLm Olmo2 SmolLM3""".split()
CLASSES = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}
def of_family(family, **options):
    """A random two-layer model, with every dropout that the family knows."""
    config_class = getattr(transformers, f"{family}Config")
    known, aliases = vars(config_class()), config_class.attribute_map
    options |= {name: size for name, size in SIZES_BY_NAME.items() if name in known or name in aliases}
    options |= {name: 0.5 for name in known if re.search(r"drop(out)?(_prob)?$", name)}
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config_class(**options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() == 2 else None
    return model

HEADS = {
    "tied": tiny_gpt2, "untied": partial(tiny_gpt2, tie_word_embeddings=False),
    "bias": partial(of_family, "Phi"), "multiplied": partial(of_family, "Cohere", logit_scale=0.3),
    "soft-capped": partial(of_family, "Gemma2", final_logit_softcapping=0.5),
    "divided": partial(of_family, "Granite", logits_scaling=3.0),
}  # fmt: skip
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
def mean(values, batch):  # over each response's states: (B, T) → (B,)
    mask = response_mask(batch)
    return (values * mask).sum(-1) / mask.sum(-1)
def dense_kl(logits, target):
    return (logits.softmax(-1) * (logits.log_softmax(-1) - target.log_softmax(-1))).sum(-1)
def three_models(head):
    return [ad.LM(spread(HEADS[head](), seed, 0.2)) for seed in range(3)]
def numbers(sums):
    return {name: value.item() for name, value in sums.items()}

CASES = [(head, "contrastive", None, False) for head in HEADS]  # reward, constant α if any, off-policy
CASES += [("tied", reward, alpha, off) for reward in ("contrastive", "vanilla") for alpha in (None, 2.0, 0.0)
          for off in (False, True) if (reward, alpha) != ("vanilla", 0.0)][1:]  # fmt: skip
@pytest.mark.parametrize(("head", "reward", "constant", "off_policy"), CASES)
def test_distillation_in_chunks_is_the_dense_one(float64, small_chunks, head, reward, constant, off_policy):
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
    watched = {name: mean(x, batch) for name, x in watched.items()} | {"loss": dense}
    watched["reward_dpo" if vanilla else "reward"] = 0.1 * (of_dpo - of_base)
    if not off_policy:
        watched |= {"entropy": mean(-own, batch), "kl_dpo": own - of_dpo}
    assert numbers(sums) == pytest.approx({name: x.sum().item() for name, x in watched.items()}, rel=1e-5)

@pytest.mark.parametrize("head", HEADS)
def test_sft_and_dpo_in_chunks_are_the_dense_ones(float64, small_chunks, head):
    (policy, reference, _), batch = three_models(head), ad.collate(singles(), pad_id=0)
    nll = mean(-dense_token_logps(dense_logits(policy, batch), batch), batch)
    nll.mean().backward()
    expected = gradients(policy.model)
    assert ad.sft_batch_loss(policy, batch, 1 / 6)["loss"].item() == pytest.approx(nll.sum().item(), rel=1e-6)
    assert_same_gradients(gradients(policy.model), expected)
    logps, ref = (dense_token_logps(dense_logits(lm, batch), batch).sum(-1) for lm in (policy, reference))
    rewards = 0.1 * (logps - ref.detach())
    margins = rewards[:3] - rewards[3:]
    loss = -margins.sigmoid().log()
    loss.mean().backward()
    expected = gradients(policy.model)
    sums = ad.dpo_batch_loss(policy, batch, 1 / 3, beta=0.1, reference=reference)
    assert_same_gradients(gradients(policy.model), expected)
    expected = {"loss": loss, "rewards/accuracies": margins > 0, "rewards/margins": margins}
    for i, name in enumerate(("chosen", "rejected")):
        expected |= {f"rewards/{name}": rewards.chunk(2)[i], f"logps/{name}": logps.chunk(2)[i]}
    assert numbers(sums) == pytest.approx({name: x.sum().item() for name, x in expected.items()}, rel=1e-5)
    sums = ad.dpo_batch_loss(policy, batch, 1.0, beta=0.1, reference=policy)  # as it is in the first step
    assert sums["loss"].item() == pytest.approx(3 * math.log(2)) and sums["rewards/margins"].item() == 0
    assert sums["rewards/accuracies"].item() == 0, "a tie is no preference"
def losses_and_examples(device="cpu", precision="float32"):
    responses, first = random_responses(), tiny_lm(1, device, precision=precision)
    second, pairs = tiny_lm(2, device, precision=precision), list(zip(responses[:3], responses[3:]))
    distil = partial(ad.distillation_batch_loss, teacher=teacher_of(first, second, alpha_r=6.0))
    return {
        "sft": (ad.sft_batch_loss, singles(responses)),
        "dpo": (partial(ad.dpo_batch_loss, beta=0.1, reference=first), pairs),
        "distillation": (distil, singles(responses)),
    }
@pytest.mark.parametrize("name", ["sft", "dpo", "distillation"])
def test_a_head_sees_one_chunk_of_states_and_a_frozen_pass_is_not_recorded(monkeypatch, small_chunks, name):
    seen, recorded, (loss_of, examples) = [], [], losses_and_examples()[name]
    logits, hidden = ad.LM.logits, ad.LM.hidden
    monkeypatch.setattr(ad.LM, "logits", lambda lm, x: seen.append(len(x)) or logits(lm, x))
    watched = lambda lm, x: recorded.append(torch.is_grad_enabled()) or hidden(lm, x)  # noqa: E731
    monkeypatch.setattr(ad.LM, "hidden", watched)
    loss_of(tiny_lm(), ad.collate(examples, pad_id=0), 1.0)
    assert max(seen) == 5 and sum(seen) == (1 if name == "sft" else 3) * sum(size[1] for size in SIZES)
    assert recorded.count(True) == 1, "only the policy's"

NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card")
@pytest.mark.parametrize("device, precision", [("cpu", "bf16"), pytest.param("cuda", "float32", marks=NO_CARD)])
@pytest.mark.parametrize("name", ["sft", "dpo", "distillation"])
def test_a_step_in_bfloat16_or_on_cuda_is_near_and_its_losses_are_float32(device, precision, name):
    (exact, examples), loss_of = losses_and_examples()[name], losses_and_examples(device, precision)[name][0]
    lm, ours, tolerance = tiny_lm(0, device, precision=precision), tiny_lm(), 0.3 if device == "cpu" else 1e-3
    sums = loss_of(lm, ad.collate(examples, 0, device), 1.0)
    expected = numbers(exact(ours, ad.collate(examples, 0), 1.0))
    found, theirs = gradients(lm.model), gradients(ours.model)
    assert {x.dtype for x in [*sums.values(), *found.values(), *lm.model.parameters()]} == {torch.float32}
    assert sums["loss"].item() == pytest.approx(expected["loss"], rel=tolerance)
    assert_same_gradients({key: x.cpu() for key, x in found.items()}, theirs, tolerance)
    assert precision != "bf16" or any((found[key] - theirs[key]).norm() > 1e-3 for key in found)

# 5  The training loop and sampling --------------------------------------------------------------------------
def test_the_order_takes_each_record_once_an_epoch_and_the_rate_warms_up_then_falls_to_a_tenth():
    steps = ad.batches_of(ad.Args(batch_size=4, seed=1), 10, epochs=2)
    walk = list(itertools.chain(*steps))
    assert len(steps) == 5 and sorted(walk[:10]) == sorted(walk[10:]) == list(range(10))
    assert walk[:10] != walk[10:] and steps != ad.batches_of(ad.Args(batch_size=4, seed=2), 10, epochs=2)
    assert ad.batches_of(ad.Args(batch_size=4, seed=1, max_steps=2), 10, epochs=2) == steps[:2]
    rates = [ad.warmup_then_cosine(step, 20, 0.2) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0.55) and 0.1 < rates[-1] < 0.12

def test_sampling_has_no_trace_of_padding_or_of_the_checkpoint_s_generation_config():
    lm, run = tiny_lm(), tiny_run(sampling_batch_size=5000, max_length=9, max_prompt_length=8)
    p = lm.model(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    lm.model.generation_config = own = transformers.GenerationConfig(
        do_sample=False, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=50.0,
        no_repeat_ngram_size=1, min_new_tokens=1, suppress_tokens=[p.argmax().item()], bad_words_ids=[[4]],
    )  # fmt: skip
    torch.manual_seed(0)
    tokens = [y[0] for y in ad.sample(run, lm, [[5, 6, 7]] * 4000 + [[1, 2, 3, 4, 5, 6]])]
    assert lm.model.generation_config is own, "a saved policy keeps the checkpoint's config"
    share = torch.bincount(torch.tensor(tokens[:4000]), minlength=VOCABULARY) / 4000
    assert (share - p).abs().max() < 4 * 0.5 / math.sqrt(4000), "frequencies are the model's probabilities"

# 6  A language model taken apart, and the families that people load -----------------------------------------
def test_states_are_the_ones_that_predict_the_response():
    """Shift by one: |y| states, from the last prompt position to the last but one; pad may be the end."""
    batch = ad.collate([[ad.Response([7, 8, 9], [4, 5])], [ad.Response([6], [1, 2, 5])]], pad_id=5)
    assert batch.input_ids.tolist() == [[7, 8, 9, 4, 5], [6, 1, 2, 5, 5]]
    assert batch.states.tolist() == [2, 3, 5, 6, 7] and batch.targets.tolist() == [4, 5, 1, 2, 5]
    assert batch.response.tolist() == [0, 0, 1, 1, 1]
    assert batch.weights.tolist() == pytest.approx([1 / 2] * 2 + [1 / 3] * 3)
def save(model, folder):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)

@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(small_chunks, tmp_path, family):
    """Notices chunks, sampling, dropout or layers computed again that change what the model says."""
    folder, batch = save(of_family(family), tmp_path), ad.collate(singles(), pad_id=0)
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
SPECIAL = """<eos> <bos> <s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|>
    [INST] <start_of_turn> <end_of_turn> [/INST] <|start|> <|channel|> <|message|> <|end|> <|return|> <|user|>
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
    parts, model = tokenizers.decoders, tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model.decoder = parts.Sequence([parts.Replace("▁", " "), parts.Fuse(), parts.Strip(" ", 1, 0)])
    options = {"special_tokens": ["<unk>", "</s>"], "show_progress": False}
    texts = [*ENGLISH.split("\n") * 9, "\n", ">", " Blue", "Blue"]
    model.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=250, **options))
    return tokenizer_of(model, template, eos, unk_token="<unk>")
def each(body: str, prompt: str = "", otherwise: str = "") -> str:
    after = "{% if add_generation_prompt %}" + prompt + "{% else %}" + otherwise + "{% endif %}"
    return "{% for m in messages %}" + body + "{% endfor %}" + after * bool(prompt)

TEXT, TRIM, IS_ANSWER = "{{ m.content }}", "{{ m.content | trim }}", "{% if m.role == 'assistant' %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML = each(TURN, "<|im_start|>assistant\n")
TIME = "{{ strftime_now('%H:%M:%S.%f') }}"  # must be the same in every rendering
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\n" + TIME + "<|im_end|>\n{% endif %}"
NO_SYSTEM = "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}<start_of_turn>"
ROLE = "{{ 'model' if m.role == 'assistant' else m.role }}\n"
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n".format
THINK = "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}" + TEXT
STRIP = IS_ANSWER + "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}"
OPENED = "<|im_start|>{{ m.role }}\n" + IS_ANSWER + "<|START_RESPONSE|>{% endif %}"
CHANNEL = "<|start|>{{ m.role }}" + IS_ANSWER + "<|channel|>final{% endif %}<|message|>{{ m.content }}"
RETURN = "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
INST = "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% endif %}"
INST += IS_ANSWER + " {{ m.content }}</s>{% endif %}"
TEMPLATES = {  # name: template, end-of-sequence, an answer's text, the response that must come of it
    "ChatML": (CHATML, "<eos>", "Blue.", "Blue.<|im_end|>"),
    "default system": (DEFAULT + CHATML, "<|im_end|>", "Blue.", "Blue.<|im_end|>"),
    "Llama 3": ("<bos>" + each(HEADER("{{ m.role }}") + TRIM + "<|eot_id|>", HEADER("assistant")), "<eos>",
                " Blue.\n", "Blue.<|eot_id|>"),
    "Gemma": ("<bos>" + each(NO_SYSTEM + ROLE + TRIM + "<end_of_turn>\n", "<start_of_turn>model\n"), "<eos>",
              "Blue. ", "Blue.<end_of_turn>"),
    "Mistral": ("<s>" + each(INST), "</s>", "Blue.", " Blue.</s>"),
    "Qwen3": (CHATML.replace(TEXT, THINK), "<|im_end|>", "Blue.", "<think>\n\n</think>\n\nBlue.<|im_end|>"),
    "R1": (each(TURN.replace(TEXT, STRIP), "<|im_start|>assistant\n<think>\n"), "<|im_end|>",
           "<think>\nSky\n</think>\n\nBlue.", "Blue.<|im_end|>"),
    "Command A": (each(OPENED + TEXT + "<|im_end|>\n", "<|im_start|>assistant\n<|START_THINKING|>"),
                  "<|im_end|>", "Blue.", "<|START_RESPONSE|>Blue.<|im_end|>"),
    "gpt-oss": (each(CHANNEL + RETURN, "<|start|>assistant"), "<|return|>", "Blue.",
                "<|channel|>final<|message|>Blue.<|return|>"),
    "Phi-3": (each("<|{{ m.role }}|>\n" + TEXT + "<|end|>\n", "<|assistant|>\n", "<eos>"), "<eos>", "Blue.",
              "Blue.<|end|>"),
    "no generation prompt": (each(TURN), "<|im_end|>", "Blue.", "Blue.<|im_end|>"),
    "Zephyr": (each("<|{{ m.role }}|>\n" + TEXT + "</s>\n", "<|assistant|>\n"), "</s>", "Blue.", "Blue.</s>"),
}  # fmt: skip
def said(role: str, content, **keys) -> dict:
    return {"role": role, "content": content, **keys}
def pair(prompt=None, chosen="Blue.", rejected="Red.", **columns) -> dict:
    if isinstance(prompt, list) and isinstance(chosen, str):
        chosen, rejected = [said("assistant", chosen)], [said("assistant", rejected)]
    return ({} if prompt is None else {"prompt": prompt}) | {"chosen": chosen, "rejected": rejected} | columns

SKY, BLUE, RED = said("user", "Sky?"), said("assistant", "Blue"), said("assistant", "Red")
BRIEF = said("system", "Be.")
TALK = [said("user", "Hi"), said("assistant", "Hello"), SKY]
def run_with(tokenizer, named=None, **settings):
    run, lm = tiny_run(**{"max_length": 200, "max_prompt_length": 150, **settings}), tiny_lm()
    lm.tokenizer, lm.model.generation_config.eos_token_id = tokenizer, named
    run.read_tokenizer(lm)
    return run, lm
def texts(run, row) -> tuple:
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
        for drawn, kept in [(row["chosen"] + [99, 99], row["chosen"]), ([99] * 9, [99] * 9)]:  # ends, is cut
            asked = []
            lm.generate = lambda *x, ids=drawn: asked.append(x) or torch.cat([x[0], torch.tensor([ids])], 1)
            examples, logged = ad.own_responses(run, lm, [row])
            assert asked[0][0].tolist() == [row["prompt"]] and asked[0][2].eos_token_id == run.stop_ids
            assert examples == [[ad.Response(row["prompt"], kept)]]
            assert logged["completions/clipped_ratio"] == (kept == drawn)

UNUSABLE = [  # template, record if it is the template's fault with that only, a word of the error
    (each("{{ m.role }}: {{ m.content }}\n"), None, "end token"), ({"rag": CHATML}, None, "default"),
    (each("{% for part in m.content %}{{ part.text }}{% endfor %}<|end|>"), None, "text"),
    ("{% for m in messages %}{{ m.role }", None, "chat template"),
    ("{{ raise_exception('system first') if messages[0].role != 'system' }}", None, "system first"),
    (TEMPLATES["Gemma"][0], pair([BRIEF, SKY]), "no system role"),
    (TEMPLATES["Mistral"][0], pair([BRIEF, SKY]), "role 'system'"),
    (CHATML, pair("<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n"), "already"),
    (TEMPLATES["Qwen3"][0], pair([SKY, said("assistant", "Sure,")], " blue.", " red."), "another way"),
]  # fmt: skip
@pytest.mark.parametrize(("template", "record", "word"), UNUSABLE)
def test_what_a_template_cannot_write_is_refused(template, record, word):
    with pytest.raises(ad.BadInput, match=word):
        ad.encode_record(run_with(bpe_tokenizer(template))[0], record, 7)

def test_a_cut_prompt_keeps_bos_and_its_end_and_a_cut_response_has_no_end_token():
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
FORMATS = [
    (pair("Sky?", "Blue", "Red"), ("Sky?", "Blue", "Red")), (pair("", "a b", "c"), ("", "a b", "c")),
    (pair(None, "It is blue", "It is black"), ("It is", " blue", " black")),
    (pair(None, "It is blue", "It is"), ("It is", " blue", "")),
    (pair(None, "Blue", "Black"), ("", "Blue", "Black")), (pair(TALK, [BLUE], [RED]), (TALK, "Blue", "Red")),
    (pair(TALK, [*TALK, BLUE], [*TALK, RED]), (TALK, "Blue", "Red")),
    *[(pair("Sky?", [*x, BLUE], [*x, RED]), ([SKY], "Blue", "Red")) for x in ([], [SKY])],
    (pair(None, [SKY, BLUE], [*TALK, RED]), ([SKY], "Blue", "")), (pair(TALK, "a", "b"), (TALK, "a", "b")),
    (pair(None, HUMAN + " Blue", HUMAN + " Red"), (TALK, "Blue", "Red")),
    (pair(None, HUMAN + " Yes", "\n\nHuman: a\n\nAssistant: No"), (TALK, "Yes", "")),
    (pair(HUMAN, " Blue", " Red"), ([*TALK, said("assistant", "")], "Blue", "Red")),
    (pair(HUMAN, [BLUE], [RED]), ([*TALK, said("assistant", "")], "Blue", "Red")),
    (pair(HUMAN + " It's", " a", " b"), ([*TALK, said("assistant", "It's")], " a", " b")),
    (pair([said("user", [{"type": "text", "text": "Sky?"}])], [BLUE], [RED]), ([SKY], "Blue", "Red")),
    (pair([SKY | {"name": None}], [BLUE], [RED]), ([SKY], "Blue", "Red")),
    (pair([SKY, CALL], [BLUE], [RED]), ([SKY, CALL | {"content": ""}], "Blue", "Red")),
]  # fmt: skip
@pytest.mark.parametrize(("record", "expected"), FORMATS)
def test_a_record_of_every_format_is_taken_apart(record, expected):
    prompt, chosen, rejected = ad.split_record(record)
    assert (prompt, chosen["content"], rejected["content"]) == expected

MALFORMED = [
    ({"prompt": "Sky?", "chosen": "Blue"}, "rejected"), (pair("Sky?", 3, "Red"), "'chosen'"),
    (pair({"text": "Sky?"}), "'prompt'"), (pair("Sky?", [BLUE], "Red"), "two conversations"),
    (pair(None, ["Blue"], ["Red"]), "'chosen'"), (pair([{"content": "Sky?"}], [BLUE], [RED]), "'prompt'"),
    (pair(None, [BLUE], [RED]), "before"), (pair(None, [], []), "message"),
    (pair(None, [SKY, BLUE, SKY], [SKY, BLUE, SKY]), "assistant"),
    (pair("Sea?", [SKY, BLUE], [SKY, RED]), "question"),
    (pair([said("user", [{"type": "image"}])], [BLUE], [RED]), "'prompt'"),
    (pair(None, topic="Sky?"), "topic"), (pair(None, question="Sky?"), "'question'"),
    (pair("Sky?", system="Be brief."), "'system'"), (pair([SKY, CALL, SKY], [BLUE], [RED]), "chat template"),
]  # fmt: skip
@pytest.mark.parametrize(("record", "word"), MALFORMED)
def test_a_record_of_no_format_or_with_an_unread_part_is_refused(record, word):
    with pytest.raises(ad.BadInput, match=rf"\b7\b.*{word}"):
        ad.encode_record(run_with(bpe_tokenizer())[0], record, 7)

def write(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table, text = pd.DataFrame(records), "\n".join(map(json.dumps, records))
    kinds = {".json": json.dumps(records, ensure_ascii=False), ".csv": table.to_csv(index=False)}
    path.write_bytes(kinds.get(path.suffix, text).encode())
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    return path
def numbered(n: int) -> list:
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
    pair("ما لون السماء؟", "أزرق", "naïve “quotes”, commas\tand tabs"), pair("Sky?", " blue", "Red\n"),
    pair("Is it?", "NA", "null"), pair("How many?", "None", "1.50"), pair("a", " ", "b"), pair("a", "b", "b"),
]  # fmt: skip
@pytest.mark.parametrize("name", "a.jsonl a.jsonl.gz a.json a.csv a.parquet C:data/a[1].jsonl".split())
def test_every_file_gives_the_same_tokens_whatever_its_name(tmp_path, capsys, name):
    write(tmp_path / "C:data" / "a1.jsonl", numbered(3))
    path = write(tmp_path / name, ODD)
    run, rows, _ = load(path)
    assert "2 left out" in capsys.readouterr().out
    for record, row in zip(ODD[:-2], rows, strict=True):
        expected = ((record["prompt"] or "<eos>"), record["chosen"] + "<eos>", record["rejected"] + "<eos>")
        assert (texts(run, row)[0].removesuffix("\n"), *texts(run, row)[1:]) == expected
    if not name.endswith((".gz", ".parquet")):  # as Windows writes it
        path = write(path.with_stem("windows"), numbered(3))
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        run, rows, _ = load(path)
        assert [texts(run, row)[1] for row in rows] == [f"It is {i}.<eos>" for i in range(3)]

def test_held_out_prompts_are_not_trained_on_and_follow_the_seed():
    """The records are messages, one with a key and one of a type of its own, which change no other."""
    asked = [[said("user", f"What is {i // 3}?")] for i in range(120)]
    records = [pair(prompt, f"It is {i // 3}.", f"No {i % 3}") for i, prompt in enumerate(asked)]
    records[0]["prompt"][0]["name"], records[4]["prompt"], parts = "bob", "What is 1?", []
    for seed in (0, 0, 1):
        run, rows, held_out = load(records, CHATML, seed=seed)
        for i, row in enumerate(rows):
            prompt = f"<|im_start|>user\nWhat is {i // 3}?<|im_end|>\n<|im_start|>assistant\n"
            assert texts(run, row) == (prompt, f"It is {i // 3}.<|im_end|>", f"No {i % 3}<|im_end|>")
        assert len(held_out) == 12 and len({i // 3 for i in held_out}) == 4, "all pairs of four prompts"
        parts.append(held_out)
    assert parts[0] == parts[1] != parts[2]

def test_splits_configs_and_limits_of_a_folder(tmp_path):
    write(tmp_path / "train.jsonl", numbered(5)), write(tmp_path / "test.jsonl", numbered(9)[5:])
    files = [{"split": f"{split}_prefs", "path": f"{split}.jsonl"} for split in ("train", "test")]
    configs = [{"config_name": "other", "data_files": "test.jsonl"}]
    configs += [{"config_name": "mine", "data_files": files}]
    for name in (tmp_path, f"{tmp_path}:mine"):
        _, rows, held_out = load(name)
        assert len(rows) == 9 and held_out == [0, 1, 2, 3] and len(load(name, limit=2, eval_pairs=1)[1]) == 3
        assert {row["instruction"] for row in rows if row["record"] == 4} == {"What is 4?"}
        (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")

# 8, 9  The demo world and the evaluation -------------------------------------------------------------------
HOTEL, GOOD = "how was the hotel ?", "the room was superb and the bed was not weak ."
REVIEWS = {GOOD: 1.5, "the room was not superb , the staff was not awful .": 0, "the bed was plain .": -0.5}
BROKEN = [
    "", "superb .", GOOD[:-2], GOOD + " superb", GOOD.replace("room", "coffee"), GOOD + " " + GOOD,
    GOOD.replace("room", ""), GOOD.replace("not", "not not"), " and ".join(["the room was good"] * 5) + " .",
]  # fmt: skip

def test_the_demo_s_truth_and_its_whole_noisy_and_seeded_records():
    for review, reward in (REVIEWS | dict.fromkeys(BROKEN, -2)).items():
        assert ad.true_reward(HOTEL, review) == reward, review
        assert ad.well_formed(HOTEL, review) == (review in REVIEWS), review
    records, tokenizer, gaps = ad.demo_records(600, seed=3).to_list(), ad.demo_tokenizer(), []
    assert records == ad.demo_records(600, seed=3).to_list() != ad.demo_records(600, seed=4).to_list()
    for prompt, *reviews in map(dict.values, records):
        assert all(ad.well_formed(prompt, review) for review in reviews)
        assert tokenizer.unk_token_id not in tokenizer(" ".join([prompt, *reviews])).input_ids
        gaps.append(ad.true_reward(prompt, reviews[0]) - ad.true_reward(prompt, reviews[1]))
    gaps = [gap for gap in gaps if gap]
    expected = statistics.mean(1 / (1 + math.exp(-4 * abs(gap))) for gap in gaps)
    assert statistics.mean(gap > 0 for gap in gaps) == pytest.approx(expected, abs=0.06), "Bradley-Terry"
def own_logp(lm, prompt, tokens):
    logits = lm.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].detach()
    return logits.double().log_softmax(-1)[range(len(tokens)), tokens].sum().item()
def random_pairs():
    pairs = losses_and_examples()["dpo"][1]
    rows = [pair(x.prompt, x.tokens, y.tokens, instruction="") for x, y in pairs]
    return datasets.Dataset.from_list(rows)

def test_results_by_hand(tmp_path, monkeypatch):
    lms = {name: tiny_lm(seed) for seed, name in enumerate(("reference", "dpo", "reverse_dpo", "policy"))}
    run, pairs = tiny_run(dataset="other", beta=0.3, output_dir=str(tmp_path)), random_pairs()
    monkeypatch.setattr(ad, "load_lm", lambda run, name, **rest: lms[name])
    results = ad.evaluate(run, {name: name for name in lms}, pairs, {})
    samples = read(tmp_path, "samples")
    for sample, (name, row) in zip(samples, itertools.product(lms, pairs), strict=True):
        y = sample["token_ids"]
        logp = {other: own_logp(lm, row["prompt"], y) for other, lm in lms.items()}
        expected = {"reward": 0.3 * (logp["dpo"] - logp["reverse_dpo"]), "length": len(y),
                    "kl_ref": logp[name] - logp["reference"], "entropy": -logp[name] / len(y)}  # fmt: skip
        assert {key: sample[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-3)
    column, found = [sample["kl_ref"] for sample in samples[-3:]], results["models"]["policy"]
    expected = statistics.mean(column), 1.96 * statistics.stdev(column) / math.sqrt(3)
    assert (found["kl_ref"], found["kl_ref_pm"]) == pytest.approx(expected)
    sides = {"dpo": ("dpo", "reference"), "reverse": ("reference", "reverse_dpo")}
    for name, models in (sides | {"contrastive": ("dpo", "reverse_dpo")}).items():
        right = []
        for x, y, prompt in zip(pairs["chosen"], pairs["rejected"], pairs["prompt"]):
            better, worse = (own_logp(lms[m], prompt, x) - own_logp(lms[m], prompt, y) for m in models)
            right.append(better > worse)
        assert results["reward_accuracy"][name]["accuracy"] == pytest.approx(statistics.mean(right)), name

@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_the_precision_report_finds_far_teachers_kept_and_warns_of_near_ones(capsys, precision):
    run, dpo, near = tiny_run(precision=precision), tiny_lm(1), spread(tiny_gpt2(1), 1, 0.3 * (1 + 1e-6))
    found = ad.precision_report(run, teacher_of(dpo, tiny_lm(2), alpha=1.0), random_pairs())["precision"]
    shown = capsys.readouterr().out
    assert f"{found['share']:.2f}" in shown and f"{found['kl']:.2g}" in shown and "WARNING" not in shown
    assert 0.9 < found["share"] < 1.1 and -1e-6 < found["kl"] < 0.5
    ad.precision_report(run, teacher_of(dpo, ad.LM(near), alpha=1.0), random_pairs())
    assert precision == "tf32" or "WARNING" in capsys.readouterr().out
    torch.set_float32_matmul_precision("highest")

# 10  The run: bad input on the command line -----------------------------------------------------------------
def save_tiny_model(folder, tokenizer=None, width=32, rows=None, kind="GPT2LMHeadModel", change=None, **more):
    """A random GPT-2 with a tokenizer; `change` maps its weights to what is written."""
    tokenizer = tokenizer or bpe_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    more |= {"n_layer": 2, "n_embd": width, "n_head": 2, "n_positions": 128, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=rows or len(tokenizer), **more)
    model = getattr(transformers, kind)(config).eval()
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
RESUMED = SMALL | RATES | dict.fromkeys(("sft_epochs", "dpo_epochs", "distill_epochs"), 3)
RESUMED |= {"max_steps": 6, "save_steps": 2}
def align(folder, out, **settings):
    paths = {"model": str(folder / "base"), "dataset": str(folder / "good.jsonl"), "output_dir": str(out)}
    return ad.align(ad.Args(**paths | settings))
def flags(**settings) -> list:
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]

BAD = {  # flags, where {} is a folder of prepared files: a word of the error line
    "--model {}/nowhere": "nowhere", "--model gpt2": "gpt2", "--model {}/corrupt": "corrupt",
    "--model {}/nan": "nan", "--model {}/prefix": "weights", "--model {}/resized": "embedding",
    "--model {}/lora": "adapter", "--model demo": "demo", "--dpo {}/prefix": "weights",
    "--dpo {}/smaller": "vocabulary", "--reverse_dpo {}/latin": "tokenizer", "--judge no/judge": "judge",
    "--judge {}/headless": "score.weight", "--judge {}/two": "2 outputs", "--dataset no/pairs": "no/pairs",
    "--dataset {}/nowhere.jsonl": "nowhere.jsonl", "--dataset {}/missing.jsonl": "record 1",
    "--dataset {}/number.jsonl": "'chosen'", "--dataset {}/columns.jsonl": "columns",
    "--dataset {}/broken.jsonl": "broken.jsonl", "--dataset {}/empty.jsonl": "empty.jsonl",
    "--dataset {}/identical.jsonl": "pairs", "--dataset {}/one.jsonl": "pairs",
    "--dataset {}/a.tsv": ".jsonl", "--dataset {}/saved": "to_parquet", "--dataset {}/splits[1]": "rename",
    "--dataset {}/splits:no": "no", "--train_split no": "--train_split", "--test_split no": "split",
    "--max_length 129": "128", "--max_length 20 --max_prompt_length 19": "--max_length",
    "--warmup_ratio 2": "--warmup_ratio", "WORLD_SIZE=2": "torchrun", "--beta nan": "--beta",
    "--batch_size 0": "--batch_size", "--sft_learning_rate -1": "--sft_learning_rate",
    "--alpha 0 --reward vanilla": "contrastive", "--device cuda:7": "error",
    "--output_dir {}/file/out": "error", "--alpha foo": "foo", "--output_dir {}/splits": "output folder",
    "--output_dir {}/run --beta 0.2": "0.1 → 0.2", "--report_to wandb": "wandb",
    "--lerning_rate 1": "--lerning_rate",
}  # fmt: skip
def in_folder(folder: Path) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of a model (base), pairs (good.jsonl), what the commands of BAD take, and a finished run."""
    folder, good = tmp_path_factory.mktemp("prepared"), numbered(40)
    for name, records in {
        "good": good, "missing": [good[0], {"prompt": "a", "rejected": "b"}, *good], "one": good[:1],
        "number": [record | {"chosen": 3} for record in good], "columns": [{"question": "a", "answer": "b"}],
        "identical": [record | {"rejected": record["chosen"]} for record in good], "splits/train": good,
        "splits[1]/train": good, "lora/adapter_config": [], "empty": [],
    }.items():  # fmt: skip
        write(folder / f"{name}.jsonl", records)
    (folder / "broken.jsonl").write_text(json.dumps(good[0]) + "\n" + json.dumps(good[1])[:-5])
    (folder / "lora" / "adapter_config.jsonl").rename(folder / "lora" / "adapter_config.json")
    (folder / "file").touch(), (folder / "a.tsv").touch()
    datasets.Dataset.from_list(good).save_to_disk(folder / "saved")
    save_tiny_model(folder / "base"), save_tiny_model(folder / "corrupt")
    (folder / "corrupt" / "model.safetensors").write_bytes(b"no weights")
    save_tiny_model(folder / "smaller", bpe_tokenizer(vocabulary=340))
    save_tiny_model(folder / "latin", bpe_tokenizer(text=ENGLISH.replace("e", "i") + "gallia est omnis"))
    save_tiny_model(folder / "wider", width=48), save_tiny_model(folder / "resized", rows=300)
    save_tiny_model(folder / "nan", change=lambda x: {name: w * math.nan for name, w in x.items()})
    save_tiny_model(folder / "prefix", change=lambda x: {f"_orig_mod.{name}": w for name, w in x.items()})
    judge = partial(save_tiny_model, kind="GPT2ForSequenceClassification")
    judge(folder / "two", num_labels=2)
    judge(folder / "headless", num_labels=1, change=lambda x: {n.replace("score", "v"): x[n] for n in x})
    align(folder, folder / "run", **RESUMED)
    return folder
def command_line(folder: Path, arguments: list, environment: dict) -> None:
    os.environ |= environment
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
    sys.argv = ["aligndistil.py", *arguments]
    sys.exit(ad.main())

@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_line_and_status_2_and_nothing_is_written(prepared, tmp_path, bad):
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

def test_a_full_disk_at_the_metrics_is_one_line(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ad, "open", lambda path, mode: Path("/dev/full").open(mode), raising=False)
    settings = SMALL | {"model": prepared / "base", "dataset": prepared / "good.jsonl"}
    monkeypatch.setattr(sys, "argv", ["aligndistil.py", *flags(output_dir=tmp_path / "out", **settings)])
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    assert ad.main() == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error: " in x]
    assert line.startswith("aligndistil.py: error: ") and "make room" in line

EXPLODING = {"sft": "sft, step 2", "dpo": "dpo, step 2", "distill": "can be drawn", "off": "policy, step 2"}
@pytest.mark.parametrize("stage", EXPLODING)
def test_a_run_that_explodes_is_told_in_one_line(prepared, tmp_path, stage):
    settings = {f"{stage.replace('off', 'distill')}_learning_rate": 1e30, "off_policy": stage == "off"}
    with pytest.raises(ad.BadInput, match=EXPLODING[stage]):
        align(prepared, tmp_path / "out", **SMALL | settings)

def test_weights_of_a_bfloat16_checkpoint_move_at_a_learning_rate_of_1e_6(tmp_path):
    save(tiny_gpt2().to(torch.bfloat16), tmp_path)
    lm, frozen = (ad.load_lm(tiny_run(), str(tmp_path)) for _ in range(2))
    batch = ad.collate(singles(), pad_id=0)
    assert torch.equal(*(x.logits(x.hidden(batch)) for x in (lm, frozen))), "a frozen copy is the model"
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=1e-6, weight_decay=0, fused=True)
    ad.sft_batch_loss(lm, batch, 1 / 6)
    optimizer.step()
    assert {weight.dtype for x in (lm, frozen) for weight in x.model.parameters()} == {torch.float32}
    ours, theirs = (x.model.transformer.h[0].mlp.c_fc.weight for x in (lm, frozen))
    assert (ours != theirs).float().mean() > 0.9

# 10  The run: what it leaves, kills and going on, several processes -----------------------------------------
def metrics(folder: Path) -> list:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line[-1] == "\n"]
def read(folder: Path, name: str):
    return json.loads((folder / f"{name}.json").read_text())

@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    settings = {"limit": 640, "max_steps": 20, "batch_size": 32, "eval_pairs": 200, "alpha_r": 3}
    settings |= {"dpo_learning_rate": 1e-3, "distill_epochs": 2}
    ad.align(ad.parse_args(flags(output_dir=folder, **SMALL | settings)))
    return folder

def test_sft_loss_and_kl_teacher_fall_and_dpo_beats_chance_on_held_out_pairs(demo):
    sft, dpo, policy = ([x for x in metrics(demo) if x["stage"] == name] for name in ("sft", "dpo", "policy"))
    assert sft[0]["loss"] > 4 and statistics.mean(x["loss"] for x in sft[-5:]) < 2.5
    assert dpo[0]["loss"] == pytest.approx(math.log(2), rel=1e-6) and dpo[0]["rewards/margins"] == 0
    first, last = (statistics.mean(x["kl_teacher"] for x in part) for part in (policy[:5], policy[-5:]))
    results = read(demo, "results")
    right = [row["accuracy"] - row["accuracy_pm"] > 0.5 for row in results["reward_accuracy"].values()]
    assert last < 0.8 * first and all(right)
    assert results["models"]["policy"]["reward"] > results["models"]["reference"]["reward"]

LOGGED = {"loss", "grad_norm", "learning_rate", "num_tokens"}
OF_DPO = set("rewards/accuracies rewards/margins rewards/chosen rewards/rejected logps/chosen".split())
OF_POLICY = set("alpha beta_t kl_teacher implausible reward entropy kl_dpo completions/mean_length".split())
def test_what_a_run_leaves_and_that_a_finished_one_is_left_alone(prepared, demo):
    columns = {"sft": set(), "dpo": OF_DPO, "reverse_dpo": OF_DPO, "policy": OF_POLICY}
    for folder in (demo, prepared / "run"):
        steps = [(line["stage"], line["step"]) for line in metrics(folder)]
        assert steps == [(stage, 1 + i) for stage in ALL_STAGES for i in range(steps[-1][1])]
        assert all(line.keys() >= LOGGED | columns[line["stage"]] for line in metrics(folder))
        for stage in ALL_STAGES:
            assert transformers.AutoModelForCausalLM.from_pretrained(folder / stage).dtype == torch.float32
        results, samples = read(folder, "results"), read(folder, "samples")
        assert list(results["models"]) == ["reference", *STAGES] and len(samples) % 4 == 0
        for name, row in results["models"].items():
            assert row.keys() >= {"reward", "kl_ref", "length", "entropy", "distinct"}
            assert (abs(row["kl_ref"]) < 1e-4) == (name == "reference")
        assert not list(folder.glob(".*.partial")) and not list(folder.glob("checkpoint*"))
    found = read(demo, "results")["models"]["policy"].keys()
    assert found >= {"win_rate", "win_rate_pm", "true_reward", "true_reward_pm", "well_formed"}
    before = in_folder(folder)
    assert align(prepared, folder, **RESUMED) == results and in_folder(folder) == before

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
def test_judge_vanilla_and_a_wider_teacher(prepared, tmp_path, monkeypatch, chat):
    """Notices a judge of other texts, a policy that starts elsewhere, and checkpointing in the wrong mode."""
    tokenizer = bpe_tokenizer(each("{{ m['role'][0] }} {{ m['content'] }};") if chat else None)
    tokenizer.model_max_length, tokenizer.truncation_side = 12 if chat else 128, "left"  # it sees no more
    judge = save_tiny_model(tmp_path / "judge", tokenizer, kind="GPT2ForSequenceClassification", num_labels=1)
    modes = set()
    for place, name in ((ad.LM, "generate"), (ad, "backward_in_chunks")):
        own = getattr(place, name)
        see = lambda lm, *x, n=name, own=own: modes.add((n, lm.model.training)) or own(lm, *x)  # noqa: E731
        monkeypatch.setattr(place, name, see)
    # capped to AVX2, torch's bfloat16 attention fails on a machine that has more
    precision = "tf32" if "ATEN_CPU_CAPABILITY" in os.environ else "bf16"
    settings = {"judge": str(tmp_path / "judge"), "reward": "vanilla", "sft": False, "precision": precision}
    settings |= {"dpo": str(prepared / "wider"), "init_from": "dpo", "distill_learning_rate": 1e-12}
    align(prepared, tmp_path / "out", **SMALL | settings | {"gradient_checkpointing": chat})
    assert modes == {("generate", False), ("backward_in_chunks", chat)}
    ours, start = (load_file(x / "model.safetensors") for x in (tmp_path / "out/policy", prepared / "wider"))
    assert all((ours[name] - start[name]).abs().max() < 1e-9 for name in start)
    results, samples = read(tmp_path / "out", "results"), read(tmp_path / "out", "samples")
    assert list(results["models"]) == ["reference", "dpo", "policy"]
    assert list(results["reward_accuracy"]) == ["dpo"] and results["precision"].keys() == {"share", "kl"}
    for sample in samples:
        text = sample["instruction"] + sample["output"]
        text = f"u {sample['instruction']};a {sample['output']};" if chat else text
        score = judge(**tokenizer(text, truncation=True, return_tensors="pt")).logits.item()
        assert sample["judge"] == pytest.approx(score, abs=1e-4)
    sides = [(x["judge"], y["judge"]) for x, y in zip(samples[8:], samples[:4])]
    expected = statistics.mean((x > y) + (x == y) / 2 for x, y in sides)
    assert results["models"]["policy"]["win_rate"] == pytest.approx(expected)

def test_kills_at_any_moment_change_not_one_weight_line_or_result(prepared, tmp_path):
    kills, leftover = [], tmp_path / ".sft.partial"
    leftover.mkdir()
    for lines, wait in ((2, 0.01), (5, 0.03), (9, 0), (13, 0.05), (16, 0.02), (21, 0.04), (99, 0)):  # of 24
        process = FORK.Process(target=align, args=(prepared, tmp_path), kwargs=RESUMED)
        process.start()
        while process.is_alive() and len(metrics(tmp_path)) < lines:
            time.sleep(0.002)
        time.sleep(wait)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL and not (tmp_path / "policy").exists():
            kills.append(metrics(tmp_path)[-1]["stage"])
            (tmp_path / f".checkpoint-{kills[-1]}.pt.partial").write_bytes(b"half")
            with open(tmp_path / "metrics.jsonl", "a") as file:
                file.write('{"stage": "policy", "st')
    assert len(kills) >= 4 and len(set(kills)) >= 2 and process.exitcode == 0 and not leftover.exists()
    for file in [f"{stage}/model.safetensors" for stage in ALL_STAGES] + ["metrics.jsonl", "results.json"]:
        assert (tmp_path / file).read_bytes() == (prepared / "run" / file).read_bytes(), file

def test_ranks_micro_batches_and_a_terminal_of_ascii(prepared, tmp_path):
    """Notices two processes with small micro-batches that are not one with large ones, or die of an arrow."""
    # with RATES, for teachers that differ: else the KL to them is float32's rounding of the logits
    settings = SMALL | RATES | {"off_policy": True, "save_steps": 1, "max_steps": 2}
    align(prepared, tmp_path / "1", **settings)
    settings |= {"model": prepared / "base", "dataset": prepared / "good.jsonl", "output_dir": tmp_path / "2"}
    settings["tokens_per_micro_batch"] = 64  # two micro-batches a process and more
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, ad.__file__, *flags(**settings)], capture_output=True, timeout=300, check=False,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count(b"own responses to held-out prompts") == 1, done.stderr
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert len(one) == len(two) == 8
    for ours, theirs in zip(one[::2], two[::2]):  # the first step of every stage
        assert ours.pop("stage") == theirs.pop("stage") and ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)

# README and notebook ----------------------------------------------------------------------------------------
NOTEBOOK = Path(ad.__file__).with_name("tutorial.ipynb")
BENCHMARK_FLAGS = {"batch", "length", "threads", "repeats", "device", "precision"}

def test_flags_of_the_readme_are_there():
    readme = NOTEBOOK.with_name("README.md").read_text(encoding="utf-8")
    commands = " ".join(re.findall(r"\baligndistil\.py\b([^`\n|]*)", readme))
    names = {field.name for field in dataclasses.fields(ad.Args)} | BENCHMARK_FLAGS | {"help"}
    assert commands and set(re.findall(r" --(\w+)", commands)) <= names

@pytest.fixture(scope="session", autouse=True)
def notebook_run(request):
    """The notebook's run, beside the other tests: on a second core it costs no time."""
    wanted = any(item.name == "test_the_notebook_runs_without_a_hub" for item in request.session.items)
    environment = os.environ | {"ALIGNDISTIL_QUICK": "1", "PYTHONPATH": str(NOTEBOOK.parent)}
    client = NotebookClient(nbformat.read(NOTEBOOK, as_version=4), timeout=300)
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(client.execute, env=environment) if wanted else None

def test_the_notebook_runs_without_a_hub(notebook_run):
    notebook_run.result()

def test_the_notebook_as_it_is_saved():
    """Notices a run not from top to bottom, an error, a warning, a machine's path, or an equation missing."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr|var|Users)/", str(outputs))
    equations = re.findall(r"\\tag\{(\d+)\}", "\n".join(cell.source for cell in cells))
    assert sorted(map(int, equations)) == list(range(1, 20))

# The benchmark: one step's loss and gradient (no optimizer) at GPT-2's shape with random weights ------------
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
        ref_logps = dense_token_logps(dense_logits(reference, batch).float(), batch).sum(-1)
    logps = dense_token_logps(dense_logits(policy, batch).float(), batch).sum(-1)
    loss = ad.dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), beta=0.1).mean()
    loss.backward()
    return loss
def floor(policy, frozen, batch):
    """(c) What nothing can leave out: the bodies, the policy's backward, the heads at the response states."""
    with torch.no_grad():
        for lm in frozen:
            for states in lm.hidden(batch).split(ad.CHUNK_SIZE):
                lm.logits(states)
    squares = lambda logits, rows: {"loss": logits.square().sum()}  # noqa: E731
    return ad.backward_in_chunks(policy, policy.hidden(batch), squares, 1.0)["loss"]

def benchmark():
    parser = argparse.ArgumentParser(description="seconds of one step; half of each sequence is the prompt")
    for name, default in {"batch": 4, "length": 256, "threads": 2, "repeats": 5, "device": "cpu"}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bf16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    run, config = tiny_run(device=args.device), transformers.GPT2Config(n_positions=max(1024, args.length))
    models = [transformers.GPT2LMHeadModel(config).to(args.device) for _ in range(3)]
    policy, dpo, base = (ad.LM(model, args.precision) for model in models)
    responses = random_responses([(args.length // 2, args.length - args.length // 2)] * args.batch)
    distil = partial(ad.distillation_batch_loss, teacher=teacher_of(dpo, base, alpha_r=20.0))
    train_dpo = partial(ad.dpo_batch_loss, beta=0.1, reference=dpo)
    print(vars(args), "seconds: (a) the authors' dense loss, (b) ours, (c) bodies and heads alone", sep="\n")
    first = ("distillation", singles(responses), distil, authors_distillation, [dpo, base])
    second = ("DPO", list(zip(responses[::2], responses[1::2])), train_dpo, authors_dpo, [dpo])
    for stage, examples, loss_of, dense, frozen in (first, second):
        whole, seconds, found, memory = ad.collate(examples, 0, args.device), {}, {}, {}
        for name in ["a", "b", "c"] * (args.repeats + 1):  # in turn: a drift of the machine hits all alike
            began, total = time.perf_counter(), 0
            with policy.autocast():
                if name == "b":
                    for _, batch in ad.micro_batches(run, examples):
                        total += loss_of(policy, batch, 1 / len(examples))["loss"] / len(examples)
                else:
                    total = dense(policy, *frozen, whole) if name == "a" else floor(policy, frozen, whole)
            found[name] = total.item(), gradients(policy.model)  # item() waits for the device
            seconds.setdefault(name, []).append(time.perf_counter() - began)
            if args.device != "cpu":
                memory[name] = torch.cuda.max_memory_allocated() / 1e9
                torch.cuda.reset_peak_memory_stats()
        rough = 1e-4 if args.precision == "float32" else 0.1
        assert found["b"][0] == pytest.approx(found["a"][0], rel=rough)
        assert_same_gradients(found["b"][1], found["a"][1], rough)
        a, b, c = (statistics.median(column[1:]) for column in seconds.values())
        peaks = " ".join(f"({name}) {peak:.1f} GB" for name, peak in memory.items())
        print(f"{stage}: (a) {a:.3f} (b) {b:.3f} (c) {c:.3f} (b)/(a) {b / a:.2f} (b)/(c) {b / c:.2f} {peaks}")

if __name__ == "__main__":
    benchmark()
