"""Tests of aligndistil.py, section by section (`pytest`), and a benchmark (`test_aligndistil.py --help`)."""
import argparse
import contextlib
import itertools
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

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
def tiny_lm(seed=0):
    return ad.LM(tiny_gpt2(seed))
def random_responses(sizes=SIZES):
    torch.manual_seed(1)
    return [ad.Response(*(torch.randint(1, VOCABULARY, (n,)).tolist() for n in size)) for size in sizes]
def singles(responses=None):  # examples of one response each
    return [[response] for response in responses or random_responses()]
def tiny_run(**settings):
    run = ad.Run(ad.Args(**{"max_length": 24, "max_prompt_length": 8, "device": "cpu", **settings}))
    run.tokenizer, run.stop_ids, run.pad_id = ad.demo_tokenizer(), [0], 0
    return run
def teacher_of(dpo, base, **settings):
    return ad.Teacher(ad.Args(**settings), {"dpo": dpo, "reverse_dpo": base, "reference": base}.get)
def gradients(model, loss=None):
    if loss is not None:
        loss.backward()
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
UNSET = dict.fromkeys(ad.Args.__annotations__)
PAPER = {
    "model": "demo", "dataset": "HuggingFaceH4/ultrafeedback_binarized", "seed": 0, "beta": 0.1,
    "reward": "contrastive", "off_policy": False, "init_from": "reference", "sft_learning_rate": 1e-5,
    "dpo_learning_rate": 1e-6, "distill_learning_rate": 1e-6, "sft_epochs": 1.0, "dpo_epochs": 1.0,
    "distill_epochs": 1.0, "batch_size": 128, "warmup_ratio": 0.1, "max_grad_norm": 1.0,
    "precision": "float32", "tokens_per_micro_batch": 8192, "sampling_batch_size": 128,
    "gradient_checkpointing": False, "eval_pairs": 1000, "eval_prompts": 128, "save_steps": 100}
DEMO = {
    "dataset": "demo", "batch_size": 64, "max_length": 48, "max_prompt_length": 12, "eval_prompts": 512,
    "sft_learning_rate": 3e-3, "dpo_learning_rate": 1e-5, "distill_learning_rate": 1e-3, "sft_epochs": 8.0,
    "dpo_epochs": 2.5, "sampling_batch_size": 256, "save_steps": 40}
def test_a_setting_that_nobody_names_is_the_paper_s_or_the_demo_s_and_each_has_its_help(capsys):
    assert vars(ad.Args()) == UNSET | PAPER and vars(ad.parse_args([])) == UNSET | PAPER | DEMO
    assert vars(ad.parse_args(["--model", "gpt2"])) == UNSET | PAPER | {"model": "gpt2"}
    some = vars(ad.parse_args(["--save_steps", "7", "--sft", "False"]))
    assert some == UNSET | PAPER | DEMO | {"save_steps": 7, "sft": False}
    with pytest.raises(SystemExit):
        ad.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in UNSET)
    assert not re.search(r"^  --\S+( \S+)*\n(?=  --|\Z)", shown, re.M), "each has its text"
def test_functions_of_distributions_by_loops_and_finite_where_probabilities_underflow():
    z, other, tokens = 2 * random_logits(4, 7), random_logits(4, 7).flip(-1), [0, 4, 2, 6]
    implausible, kl = ad.implausible_mass(other, z), ad.reverse_kl(z.requires_grad_(), other)
    assert implausible.max() > 0.01
    for i in range(4):
        rows = z[i].tolist(), other[i].tolist()
        p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in rows)
        for found, expected in [
            (ad.token_logps(z, torch.tensor(tokens))[i], math.log(p[tokens[i]])),
            (ad.total_variation(z, other)[i], 0.5 * sum(abs(a - b) for a, b in zip(p, q))),
            (implausible[i], sum(b for a, b in zip(p, q) if a < 1e-3)),
            (kl[i], sum(a * math.log(a / b) for a, b in zip(p, q)))]:
            assert found.item() == pytest.approx(expected, abs=1e-10)
    kl.sum().backward()  # of which the closed form is known
    gap = z.log_softmax(-1) - other.log_softmax(-1)
    assert torch.allclose(z.grad, z.softmax(-1) * (gap - kl[:, None]), atol=1e-12)
    certain = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    kl = ad.reverse_kl(certain, certain.flip(0))
    kl.sum().backward()
    assert (kl > 1e4).all() and kl.isfinite().all() and certain.grad.isfinite().all()
    assert ad.dpo_loss(torch.tensor(-1e6), torch.tensor(1e6), 0.0, 0.0, 1.0).isfinite()
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
            log_z = torch.logsumexp(ratio * dpo + (1 - ratio) * ref, -1)
            kl = ad.reverse_kl(z[0], ad.teacher_logits(z[2], z[1] - z[2], ratio))
            right += probability * -beta * (kl - log_z).item()
    assert left == pytest.approx(right, abs=1e-12)

# 3  The losses and the teacher: chunks against dense computations, for every kind of output head ------------
SIZES_BY_NAME = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "ffn_dim": 48, "state_size": 4,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "word_embed_proj_dim": 32, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 24,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = """GPT2 OPT Bloom Falcon Phi Llama Mixtral Qwen3 Gemma2 Gemma3Text Granite Cohere Mamba XGLM
    BioGpt""".split()
DROPOUT = r"drop(out)?(_prob)?$"
CLASSES = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel", "CTRL": "CTRLLMHeadModel"}
def of_family(family, **options):
    """A random two-layer model, with every dropout that the family knows."""
    config_class = getattr(transformers, f"{family}Config")
    known, aliases = vars(config_class()), config_class.attribute_map
    options |= {name: size for name, size in SIZES_BY_NAME.items() if name in known or name in aliases}
    options |= {name: 0.5 for name in known if re.search(DROPOUT, name)}
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config_class(**options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() == 2 else None
    return model
HEADS = {
    "tied": tiny_gpt2, "untied": partial(tiny_gpt2, tie_word_embeddings=False),
    "bias": partial(of_family, "Phi"), "multiplied": partial(of_family, "Cohere", logit_scale=0.3),
    "soft-capped": partial(of_family, "Gemma2", final_logit_softcapping=0.5),
    "divided": partial(of_family, "Granite", logits_scaling=3.0)}
def response_mask(batch):
    """(B, T), true at the states that predict a response token."""
    none = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    return none.flatten().index_fill(0, batch.states, True).view_as(none)
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
def three_models(head):
    return [ad.LM(spread(HEADS[head](), seed, 0.2)) for seed in range(3)]
def numbers(sums):
    return {name: value.sum().item() for name, value in sums.items()}
CASES = [(head, "contrastive", None, False) for head in HEADS]  # reward, constant α if any, off-policy
CASES += [("tied", "contrastive", 0.0, True), ("tied", "vanilla", None, False), ("bias", "vanilla", 2., True)]
@pytest.mark.parametrize(("head", "reward", "constant", "off"), CASES)
def test_distillation_in_chunks_is_the_dense_one(float64, small_chunks, head, reward, constant, off):
    policy, dpo, base = three_models(head)
    if head == "tied":  # a model that rules words out: they are not the base's
        torch.nn.init.constant_(dpo.model.transformer.ln_f.weight, 3.0)
    batch = ad.collate(singles(), pad_id=0)
    p, d, b = (dense_logits(lm, batch) for lm in (policy, dpo, base))
    alpha = 6 * 0.5 * (d.softmax(-1) - b.softmax(-1)).abs().sum(-1) + 1e-3
    alpha = (alpha if constant is None else torch.full_like(alpha, constant)).detach()
    weight = torch.ones_like(alpha) if constant == 0 else 0.1 / alpha
    target = ((b if reward == "vanilla" else d) + alpha[..., None] * (d - b)).detach()
    dense = mean(weight * ad.reverse_kl(p, target), batch)
    expected = gradients(policy.model, dense.mean())
    teacher = teacher_of(dpo, base, alpha_r=6.0, reward=reward, alpha=constant, off_policy=off)
    sums = ad.distillation_batch_loss(policy, batch, 1 / 6, teacher)
    assert_same_gradients(gradients(policy.model), expected)
    assert not gradients(dpo.model) and not gradients(base.model)
    own, of_dpo, of_base = (dense_token_logps(z, batch) for z in (p, d, b))
    watched = {"alpha": alpha, "beta_t": weight, "kl_teacher": ad.reverse_kl(p, target)}
    watched["implausible"] = (target.softmax(-1) * (d.softmax(-1) < 1e-3)).sum(-1)
    watched = {name: mean(x, batch) for name, x in watched.items()} | {"loss": dense}
    watched["reward"] = 0.1 * (of_dpo - of_base)
    if not off:
        watched |= {"entropy": mean(-own, batch), "kl_dpo": own - of_dpo}
    assert numbers(sums) == pytest.approx(numbers(watched), rel=1e-5)
@pytest.mark.parametrize("head", HEADS)
def test_sft_and_dpo_in_chunks_are_the_dense_ones(float64, small_chunks, head):
    (policy, reference, _), batch = three_models(head), ad.collate(singles(), pad_id=0)
    nll = mean(-dense_token_logps(dense_logits(policy, batch), batch), batch)
    expected = gradients(policy.model, nll.mean())
    assert ad.sft_batch_loss(policy, batch, 1 / 6)["loss"].item() == pytest.approx(nll.sum().item(), rel=1e-6)
    assert_same_gradients(gradients(policy.model), expected)
    logps, ref = (dense_token_logps(dense_logits(lm, batch), batch).sum(-1) for lm in (policy, reference))
    rewards = 0.1 * (logps - ref.detach())
    margins = rewards[:3] - rewards[3:]
    loss = -margins.sigmoid().log()
    expected = gradients(policy.model, loss.mean())
    sums = ad.dpo_batch_loss(policy, batch, 1 / 3, beta=0.1, reference=reference)
    assert_same_gradients(gradients(policy.model), expected)
    expected = {"loss": loss, "rewards/accuracies": margins > 0, "rewards/margins": margins}
    for i, name in enumerate(("chosen", "rejected")):
        expected |= {f"rewards/{name}": rewards.chunk(2)[i], f"logps/{name}": logps.chunk(2)[i]}
    assert numbers(sums) == pytest.approx(numbers(expected), rel=1e-5)
    sums = ad.dpo_batch_loss(policy, batch, 1.0, beta=0.1, reference=policy)  # as it is in the first step
    assert sums["loss"].item() == pytest.approx(3 * math.log(2)) and sums["rewards/margins"].item() == 0
    assert sums["rewards/accuracies"].item() == 0, "a tie is no preference"
@pytest.mark.parametrize("name", ["sft", "dpo", "distillation"])
def test_a_head_sees_one_chunk_of_states_and_a_frozen_pass_is_not_recorded(monkeypatch, small_chunks, name):
    seen, frozen, states = Counter(), tiny_lm(1), sum(size[1] for size in SIZES)
    distil = partial(ad.distillation_batch_loss, teacher=teacher_of(frozen, tiny_lm(2), alpha_r=6.0))
    train_dpo = partial(ad.dpo_batch_loss, beta=0.1, reference=frozen)
    for method in ("hidden", "logits"):
        def watched(lm, x, method=method, own=getattr(ad.LM, method)):
            output = own(lm, x)
            seen[method, output.requires_grad] += len(output)
            assert method == "hidden" or len(output) <= 5
            return output
        monkeypatch.setattr(ad.LM, method, watched)
    loss_of = {"sft": ad.sft_batch_loss, "dpo": train_dpo, "distillation": distil}[name]
    loss_of(tiny_lm(), ad.collate(singles(), pad_id=0), 1.0)
    assert seen["hidden", True] == seen["logits", True] == states, "only the policy's have a graph"
    assert seen["logits", False] == (0 if name == "sft" else 2 * states)

# 5  The training loop and sampling --------------------------------------------------------------------------
def sizes(n, epochs, world=1, **settings):
    return [len(batch) for batch in ad.batches_of(ad.Args(**{"batch_size": 4} | settings), n, epochs, world)]
def test_an_epoch_is_a_pass_in_an_order_of_its_own_and_the_last_batch_is_what_is_left():
    steps, again, other = (ad.batches_of(ad.Args(batch_size=4, seed=seed), 10, 2, 1) for seed in (1, 1, 2))
    walk, ordered = list(itertools.chain(*steps)), list(range(10))
    assert sorted(walk[:10]) == sorted(walk[10:]) == ordered and steps == again != other
    assert walk[:10] != walk[10:] and walk[:10] != ordered and sizes(10, 2, max_steps=2) == [4, 4]
    assert sizes(10, 2) == [4] * 5 and sizes(10, 1) == sizes(10, 1, world=2) == [4, 4, 2]
    assert sizes(10, 1, world=3) == [4, 4] and sizes(8, 1, world=3) == [4, 4], "each process has a pair"
    assert sizes(10, 0.26) == [3] and sizes(10, 0.23) == [2] and sizes(10, 0.01, world=2) == [2]
    assert sizes(10, 2.5, batch_size=64) == [10, 10, 5]
    rates = [ad.warmup_then_cosine(step, 20, 0.2) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0.55) and 0.1 < rates[-1] < 0.12
    assert ad.warmup_then_cosine(0, 11, 0.1) == 0.5
def said(role: str, content, **keys) -> dict:
    return {"role": role, "content": content, **keys}
def pair(prompt=None, chosen="Blue.", rejected="Red.", **columns) -> dict:
    return ({} if prompt is None else {"prompt": prompt}) | {"chosen": chosen, "rejected": rejected} | columns
def random_pairs(n=3):
    """n rows of the data, of many lengths."""
    answers = iter(random_responses([(2 + i % 5, 1 + i % 4) for i in range(2 * n)]))
    rows = [pair(x.prompt, x.tokens, y.tokens, instruction=str(x.prompt)) for x, y in zip(answers, answers)]
    return datasets.Dataset.from_list(rows)
def own_logp(model, prompt, tokens):
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)[range(len(tokens)), tokens].sum()
def metrics(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
def read(folder: Path, name: str):
    return json.loads((folder / f"{name}.json").read_text())
def trained(monkeypatch, run, pairs, examples_of=None, lm=None, stage="sft", **options):
    """train() of a tiny model: the weights that it saves."""
    monkeypatch.setattr(ad, "load_lm", lambda *x, **y: lm or tiny_lm())
    chosen = partial(ad.data_responses, keys=["chosen"])
    options = {"loss_of": ad.sft_batch_loss, "learning_rate": 1e-2, "epochs": 1.0} | options
    folder = ad.train(run, stage, start="", pairs=pairs, examples_of=examples_of or chosen, **options)
    return load_file(Path(folder) / "model.safetensors")
def test_training_is_adamw_with_clipping_on_the_rate_and_rows_of_each_step(float64, monkeypatch, tmp_path):
    pairs, model, lines = random_pairs(10), tiny_gpt2().eval(), []
    settings = {"batch_size": 4, "tokens_per_micro_batch": 20, "warmup_ratio": 0.5, "max_grad_norm": 0.05}
    run = tiny_run(output_dir=str(tmp_path), seed=3, **settings)
    batches = ad.batches_of(run.args, 10, 1.5, 1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    for batch, rate in zip(batches, (0.005, 0.01, 0.01, 0.0055), strict=True):
        rows = pairs.select(batch)
        logps = [own_logp(model, row["prompt"], row["chosen"]) / len(row["chosen"]) for row in rows]
        loss = -sum(logps) / len(rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        lines.append({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate})
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step(), optimizer.zero_grad()
    ours, theirs = trained(monkeypatch, run, pairs, epochs=1.5), model.state_dict()
    assert [len(batch) for batch in batches] == [4, 4, 4, 3]
    assert min(line["grad_norm"] for line in lines) > 0.1
    for name, start in tiny_gpt2().named_parameters():
        assert (ours[name] - theirs[name]).norm() < 1e-4 * (theirs[name] - start).norm(), name
    for line, expected in zip(metrics(tmp_path), lines, strict=True):
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-6)
def test_every_step_stage_and_process_draws_anew_and_a_process_has_its_share(monkeypatch, tmp_path):
    """A weight without a gradient is summed over the processes, too: another one may have it."""
    monkeypatch.setattr(ad.dist, "all_reduce", Mock()), monkeypatch.setattr(ad.dist, "barrier", Mock())
    lm, seeds, shares = tiny_lm(), [], {}
    lm.model.unused = torch.nn.Linear(2, 2)
    for rank, stage, world in ((0, "a", 2), (0, "b", 2), (1, "a", 2), (0, "c", 1)):
        run = tiny_run(output_dir=str(tmp_path), batch_size=4)
        run.rank, run.world = rank, world
        def examples_of(run, lm, rows, name=f"{rank}{stage}"):
            seeds.append(torch.initial_seed())
            shares.setdefault(name, []).append({row["instruction"] for row in rows})
            return ad.data_responses(run, lm, rows, ["chosen"])
        if rank == 1:
            (tmp_path / "a").rename(tmp_path / "rank 0"), (tmp_path / "metrics.jsonl").unlink()
        with contextlib.suppress(FileNotFoundError):  # process 1 finds no model of process 0
            trained(monkeypatch, run, random_pairs(10), examples_of, lm, stage)
        assert (rank == 0) == (tmp_path / "metrics.jsonl").exists() == (tmp_path / stage).exists()
    assert len(seeds) == len(set(seeds)) == 12
    for mine, other, whole in zip(shares["0a"], shares["1a"], shares["0c"], strict=True):
        assert mine | other == whole and not mine & other and mine and other
    (tmp_path / "other").mkdir()
    trained(monkeypatch, tiny_run(output_dir=str(tmp_path / "other"), batch_size=4, seed=1), random_pairs(10),
            examples_of, lm, "c")  # fmt: skip
    assert len(set(seeds)) == 15, "another --seed draws other responses"
def test_the_last_step_of_a_stage_is_not_lost_when_its_model_cannot_be_saved(monkeypatch, tmp_path):
    monkeypatch.setattr(ad, "save_model", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        trained(monkeypatch, tiny_run(output_dir=str(tmp_path), batch_size=4), random_pairs(10), stage="dpo")
    assert torch.load(tmp_path / "checkpoint-dpo.pt")["step"] == len(metrics(tmp_path)) == 3
def test_a_gradient_that_is_not_finite_is_told_before_the_weights_move(monkeypatch, tmp_path):
    def loss_of(lm, batch, scale):
        next(lm.model.parameters()).grad = torch.full_like(next(lm.model.parameters()), math.inf)
        return {"loss": torch.tensor(1.0)}
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *x: pytest.fail("the weights moved"))
    with pytest.raises(ad.BadInput, match="dpo, step 1.*learning rate"):
        trained(monkeypatch, tiny_run(output_dir=str(tmp_path)), random_pairs(), stage="dpo", loss_of=loss_of)
def test_responses_stand_in_the_order_of_their_prompts_and_stop_where_they_are_told_to():
    lm, run, asked = tiny_lm(), tiny_run(sampling_batch_size=2, max_length=12, max_prompt_length=8), []
    run.stop_ids, replies = [7, 9], {(1, 2, 3, 4): [20, 9, 7, 1], (3,): [0, 21, 0, 22], (4, 8): [7, 0, 0, 0]}
    def generate(input_ids, attention_mask, generation_config):
        asked.append((input_ids.tolist(), attention_mask.tolist(), generation_config.to_diff_dict()))
        return torch.cat([input_ids, torch.tensor([replies[tuple(x[x > 0].tolist())] for x in input_ids])], 1)
    lm.model.generate = generate
    examples, facts = ad.own_responses(run, lm, [{"prompt": list(prompt)} for prompt in replies])
    expected = zip(replies, ([20, 9], [0, 21, 0, 22], [7]))
    assert examples == [[ad.Response(list(prompt), tokens)] for prompt, tokens in expected]
    assert facts == {"completions/mean_length": [2, 4, 1], "completions/clipped_ratio": [0, 1, 0]}
    assert asked[0][:2] == ([[1, 2, 3, 4], [0, 0, 0, 3]], [[1] * 4, [0, 0, 0, 1]]) and asked[1][1] == [[1, 1]]
    options = {"do_sample": True, "eos_token_id": [7, 9], "pad_token_id": 0, "max_new_tokens": 4}
    plain = transformers.GenerationConfig(top_k=0, **options).to_diff_dict()
    assert [config for *_, config in asked] == [plain, plain]
def test_sampling_has_no_trace_of_padding_or_of_the_checkpoint_s_generation_config():
    model, run = tiny_gpt2().eval(), tiny_run(sampling_batch_size=5000, max_length=9, max_prompt_length=8)
    for parameter in model.transformer.ln_f.parameters():
        parameter.data *= 3  # sharp: what padding changes is far more than chance
    p = model(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=50.0, eos_token_id=[3, 4],
        no_repeat_ngram_size=1, min_new_tokens=1, suppress_tokens=[p.argmax().item()], bad_words_ids=[[4]])
    torch.manual_seed(0)
    tokens = [y[0] for y in ad.sample(run, ad.LM(model), [[5, 6, 7]] * 4000 + [[1, 2, 3, 4, 5, 6]])]
    share = torch.bincount(torch.tensor(tokens[:4000]), minlength=VOCABULARY) / 4000
    assert p.max() > 0.4 and (share - p).abs().max() < 4 * 0.5 / math.sqrt(4000)

# 6  A language model taken apart, and the families that people load -----------------------------------------
def test_a_micro_batch_is_as_full_as_it_may_be_and_takes_the_longest_first():
    responses = random_responses([(2, 1), (3, 7), (4, 2), (1, 1), (9, 16), (5, 5), (2, 8), (1, 2)])
    for examples in (singles(responses), list(zip(responses[::2], responses[1::2]))):
        found = list(ad.micro_batches(tiny_run(tokens_per_micro_batch=20), examples))
        assert sorted(i for group, _ in found for i in group) == list(range(len(examples)))
        for (group, batch), (_, after) in itertools.pairwise([*found, found[-1]]):
            tokens = batch.input_ids.numel()
            assert tokens <= 20 or len(group) == 1
            assert batch is after or (len(group) + 1) * tokens // len(group) > 20, "there is room for one"
            assert batch.input_ids.shape[1] >= after.input_ids.shape[1]
            assert torch.equal(batch.input_ids, ad.collate([examples[i] for i in group], 0).input_ids)
def save(model, folder):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(small_chunks, tmp_path, family):
    folder, batch, times = save(of_family(family), tmp_path), ad.collate(singles(), pad_id=0), []
    lm, checkpointed = (ad.load_lm(tiny_run(gradient_checkpointing=on), folder) for on in (False, True))
    ad.check_model(lm, family)
    nll = mean(-dense_token_logps(dense_logits(lm, batch), batch), batch).sum()
    expected = gradients(lm.model, nll)
    for either in (lm, checkpointed):
        times.append(Counter())
        for name, module in either.model.named_modules():
            if re.search(r"\.(layers|h|blocks)\.\d+\.", name) and [*module.parameters(recurse=False)]:
                module.register_forward_hook(lambda *x, name=name, calls=times[-1]: calls.update([name]))
        assert ad.sft_batch_loss(either, batch, 1.0)["loss"].item() == pytest.approx(nll.item(), rel=1e-4)
        assert_same_gradients(gradients(either.model), expected, 1e-4)
    assert statistics.median(times[1][name] / n for name, n in times[0].items()) == 2, "computed twice"
    drops = [x for name, x in vars(checkpointed.model.config).items() if re.search(DROPOUT, name)]
    assert {*drops} <= {0.5}, "what is saved keeps the checkpoint's dropout"
def test_a_model_that_does_not_sample_from_its_own_head_and_body_is_refused():
    capped, scaled = (ad.LM(spread(HEADS[head](), 0, 0.2)) for head in ("soft-capped", "multiplied"))
    blind, broken = tiny_lm(), tiny_lm()
    ad.check_model(capped, "it"), ad.check_model(scaled, "it"), ad.check_model(blind, "it")
    capped.softcap, scaled.scale, own = None, 1.0, blind.model.generate
    blind.model.generate = lambda x, attention_mask, **y: own(x, attention_mask=attention_mask * 0 + 1, **y)
    broken.model.transformer.ln_f.weight.data[0] = math.nan
    for lm in (capped, scaled, blind, broken):
        with pytest.raises(ad.BadInput, match="model it: .*differ"):
            ad.check_model(lm, "it")
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_logits_are_float32_and_products_have_the_precision_asked_for(precision):
    lm = ad.LM(tiny_gpt2(), precision)
    with lm.autocast():
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
        assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
    assert lm.logits(torch.ones(2, 32)).dtype == torch.float32
    torch.set_float32_matmul_precision("highest")

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
def with_bos():
    tokenizer = bpe_tokenizer(bos_token="<bos>")
    first = ("<bos>", tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", None, [first])
    return tokenizer
def each(body: str, prompt: str = "", otherwise: str = "") -> str:
    after = "{% if add_generation_prompt %}" + prompt + "{% else %}" + otherwise + "{% endif %}"
    return "{% for m in messages %}" + body + "{% endfor %}" + after * bool(prompt)
TEXT, TRIM, IS_ANSWER = "{{ m.content }}", "{{ m.content | trim }}", "{% if m.role == 'assistant' %}"
TURN, PROMPT = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n"
CHATML, TIME = each(TURN, PROMPT), "{{ strftime_now('%H:%M:%S.%f') }}\n"  # the same in every rendering
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
    "ChatML": (TIME + CHATML, "<eos>", "Blue.", "Blue.<|im_end|>"),
    "Llama 3": ("<bos>" + each(HEADER("{{ m.role }}") + TRIM + "<|eot_id|>", HEADER("assistant")), "<eos>",
                " Blue.\n", "Blue.<|eot_id|>"),
    "Gemma": ("<bos>" + each(NO_SYSTEM + ROLE + TRIM + "<end_of_turn>\n", "<start_of_turn>model\n"), "<eos>",
              "Blue. ", "Blue.<end_of_turn>"),
    "Mistral": ("<s>" + each(INST), "</s>", "Blue.", " Blue.</s>"),
    "Qwen3": (CHATML.replace(TEXT, THINK), "<|im_end|>", "Blue.", "<think>\n\n</think>\n\nBlue.<|im_end|>"),
    "R1": (each(TURN.replace(TEXT, STRIP), PROMPT + "<think>\n"), "<|im_end|>", "Blue.", "Blue.<|im_end|>"),
    "Command A": (each(OPENED + TEXT + "<|im_end|>\n", PROMPT + "<|START_THINKING|>"), "<|im_end|>", "Blue.",
                  "<|START_RESPONSE|>Blue.<|im_end|>"),
    "gpt-oss": (each(CHANNEL + RETURN, "<|start|>assistant"), "<|return|>", "Blue.",
                "<|channel|>final<|message|>Blue.<|return|>"),
    "Phi-3": (each("<|{{ m.role }}|>\n" + TEXT + "<|end|>\n", "<|assistant|>\n", "<eos>"), "<eos>", "Blue.",
              "Blue.<|end|>"),
    "no generation prompt": (each(TURN), "<|im_end|>", "Blue.", "Blue.<|im_end|>"),
    "Zephyr": (each("<|{{ m.role }}|>\n" + TEXT + "</s>\n", "<|assistant|>\n"), "</s>", "Blue.", "Blue.</s>")}
SKY, BLUE, RED = said("user", "Sky?"), said("assistant", "Blue"), said("assistant", "Red")
BRIEF, TALK = said("system", "Be."), [said("user", "Hi"), said("assistant", "Hello"), SKY]
def save_tiny_model(folder, tokenizer=None, rows=None, kind="GPT2LMHeadModel", named=None, change=None, **m):
    """A random GPT-2 and a tokenizer; `named` are its stops, `change` maps its weights to what is written."""
    tokenizer = tokenizer or bpe_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 256, "eos_token_id": 0} | m
    config = transformers.GPT2Config(vocab_size=rows or len(tokenizer), **shape)
    model = getattr(transformers, kind)(config).eval()
    if kind == "GPT2LMHeadModel":
        model.generation_config.eos_token_id = named
    model.save_pretrained(folder)
    if change:
        weights = {name: x.clone() for name, x in load_file(folder / "model.safetensors").items()}
        save_file(change(weights), folder / "model.safetensors", {"format": "pt"})
    return model
save_judge = partial(save_tiny_model, kind="GPT2ForSequenceClassification", pad_token_id=0)
def write(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(records) if path.suffix == ".JSON" else "\n".join(map(json.dumps, records))
    path.write_text(text) if path.suffix != ".parquet" else pd.DataFrame(records).to_parquet(path)
    return path
def numbered(n: int) -> list:
    return [pair(f"What is {i}?", f"It is {i}.", f"Not {i}.") for i in range(n)]
def opened(dataset, tokenizer=None, named=None, **settings):
    """set_up() of a tiny model and a data set or records: (run, all rows by instruction, held-out rows)."""
    folder = Path(tempfile.mkdtemp(dir=HOME.name))
    if isinstance(dataset, list):
        dataset = write(folder / "a.jsonl", dataset)
    save_tiny_model(folder / "model", tokenizer, named=named)
    paths = {"model": str(folder / "model"), "dataset": str(dataset), "output_dir": str(folder / "out")}
    run, train_pairs, test_pairs = ad.set_up(ad.Args(**paths | {"device": "cpu"} | settings))
    return run, {row["instruction"]: row for row in [*train_pairs, *test_pairs]}, list(test_pairs)
def texts(run, row) -> tuple:
    return tuple(run.tokenizer.decode(row[name]) for name in ("prompt", "chosen", "rejected"))
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_decides_prompt_and_response(name):
    template, eos, answer, expected = TEMPLATES[name]
    tokenizer = (sentencepiece_like if name == "Zephyr" else bpe_tokenizer)(template, eos)
    talks = [[SKY], TALK] + [[BRIEF, *TALK]] * (name not in ("Gemma", "Mistral"))
    run, rows, _ = opened([pair(talk, answer) for talk in talks], tokenizer)
    assert run.args.sft is False and len(rows) == len(talks)
    ends = dict.fromkeys([expected[expected.rindex("<") :], eos])
    assert run.stop_ids == tokenizer.convert_tokens_to_ids(list(ends))
    for talk in talks:
        row = rows["\n\n".join(message["content"] for message in talk)]
        whole = tokenizer.apply_chat_template([*talk, said("assistant", answer)], tokenize=False)
        ids = row["prompt"] + row["chosen"]
        assert whole.startswith(tokenizer.decode(ids))
        assert texts(run, row)[1:] == (expected, expected.replace("Blue", "Red"))
        assert tokenizer(whole, add_special_tokens=False).input_ids[: len(ids)] == ids
        assert [i for i in row["chosen"] if i in run.stop_ids] == row["chosen"][-1:] == run.stop_ids[:1]
def test_a_base_model_gets_a_plain_template_and_learns_by_sft_where_an_answer_ends():
    for tokenizer, first in ((bpe_tokenizer(), ""), (with_bos(), "<bos>")):
        run, rows, _ = opened([pair([SKY]), pair(TALK, "Blue. ", "Red")], tokenizer)
        assert texts(run, rows["Sky?"]) == (first + "Sky?\n", "Blue.<eos>", "Red.<eos>")
        talk = texts(run, rows["Hi\n\nHello\n\nSky?"])
        assert talk == (first + "Hi\nHello<eos>Sky?\n", "Blue. <eos>", "Red<eos>")
        assert run.args.sft is True and run.stop_ids == [0] and run.pad_id == 0
    ends = bpe_tokenizer().convert_tokens_to_ids(["<|im_end|>", "<eos>", "<|end|>"])
    tokenizer, named = bpe_tokenizer(CHATML, pad_token="<s>"), [ends[2], bpe_tokenizer()("sky").input_ids[0]]
    run, *_ = opened(numbered(9), tokenizer, named, sft=True)
    assert run.stop_ids == ends and run.args.sft is True and run.pad_id == 2, "only an added token may stop"
UNUSABLE = {
    each("{{ m.role }}: {{ m.content }}\n"): "end token", each("{{ m.content | upper }}<|end|>"): "as it is",
    each("<|end|>"): "as it is", "{% for m in messages %}{{ m.role }": "unexpected",
    "{{ raise_exception('system first') if messages[0].role != 'system' }}": "system first"}
@pytest.mark.parametrize("template", UNUSABLE)
def test_a_template_that_cannot_be_used_is_refused(template):
    with pytest.raises(ad.BadInput, match=f"chat template.*{UNUSABLE[template]}"):
        opened(numbered(9), bpe_tokenizer(template))
ASKED = each(IS_ANSWER + "A: {{ m.content }}<|end|>{% else %}Q: {{ m.content }}\n{% endif %}", "A:")
CUT = each(TURN.replace(TEXT, "{{ m.content[:16] }}"))
OTHER = each("{{ 'X' if loop.length > 1 and m.content == 'Sky?' }}" + TURN)
LEFT_OUT = [  # template, question and answers that cannot be trained on as they are, a word of the reason
    (TEMPLATES["Gemma"][0], [[BRIEF, SKY]], "no system role"), (CHATML, [[SKY], "a<eos>b"], "stop token"),
    (TEMPLATES["Mistral"][0], [[BRIEF, SKY]], "words of the system"), (CHATML, [[SKY], " \n"], "is empty"),
    (TEMPLATES["R1"][0], [[SKY], "<think>\nSky\n</think>\n\nBlue."], "words of the assistant"),
    (CUT, [[said("user", "What is the blue sky?")]], "of the user"), (OTHER, [[SKY]], "in another way"),
    (CHATML, [[said("user", " ")]], "is empty"), (CHATML, [[said("user", "What<|im_end|>?")]], "stop token"),
    (ASKED, [[said("user", "Sky?\nA: Blue")]], "the chat template"), (CHATML, [[SKY], "a", "a"], "the same"),
    (CHATML, [[said("user", json.dumps(TALK))]], "conversation"), (None, [[SKY], "Sky? a", "Sky? b"], "rep"),
    (None, [[said("user", "\n\nHuman: Hi\n\nAssistant:")]], "conversation"),
    (CHATML, [[SKY], f"{[BLUE]}"], "conversation")]
@pytest.mark.parametrize(("template", "columns", "reason"), LEFT_OUT)
def test_a_pair_that_cannot_be_trained_on_as_it_is_is_left_out_and_counted(capsys, template, columns, reason):
    bad, tokenizer = pair(*columns), bpe_tokenizer(template)
    good = [pair([said("user", f"Hi {i}")], "Hi, Blue Human:") for i in range(3)]
    assert sorted(opened([bad, *good, bad], tokenizer)[1]) == ["Hi 0", "Hi 1", "Hi 2"]
    shown = capsys.readouterr().out
    assert re.search(rf"of 5 pairs 0 are cut; left out \{{[^{{,]*{reason}[^{{,]*: 2\}}", shown)
    with pytest.raises(ad.BadInput, match=f"no pair can be used.*{reason}"):
        opened([bad], bpe_tokenizer(template))
def test_a_cut_prompt_without_bos_keeps_its_end_alone_and_its_room_is_the_response_s():
    long = pair("Q" + "Z" * 9 + "WXY", "Z" * 50, "XYZ")
    run, rows, _ = opened([long, pair("Y", "Z" * 50, "X")], max_length=16, max_prompt_length=8)
    assert texts(run, rows[long["prompt"]]) == ("ZZZZWXY\n", "Z" * 8, "XYZ<eos>")
    assert texts(run, rows["Y"]) == ("Y\n", "Z" * 14, "X<eos>")
def test_a_response_is_whole_where_a_token_would_cross_its_beginning():
    tokenizer = bpe_tokenizer(text=ENGLISH + "\n\n" * 50)
    assert len(tokenizer("a\n\n").input_ids) == 2, "both newlines are one token"
    run, rows, _ = opened([pair("Sky?", "\n\nBlue.", "Red."), pair("Sea?")], tokenizer)
    assert texts(run, rows["Sky?"]) == ("Sky?\n", "\n\nBlue.<eos>", "Red.<eos>")
def test_a_cut_prompt_keeps_bos_and_its_end_and_a_cut_response_has_no_end_token(capsys):
    question, llama = "Z" * 50 + "WXY", bpe_tokenizer(TEMPLATES["Llama 3"][0], bos_token="<bos>")
    records = [pair(question, "Z" * 50, "XYZ"), pair("Q", "A", "B")]  # each letter is a token
    run, rows, _ = opened(records, max_length=16, max_prompt_length=8)
    assert texts(run, rows[question]) == ("ZZZZWXY\n", "ZZZZZZZZ", "XYZ<eos>")
    assert "of 2 pairs 1 are cut" in capsys.readouterr().out
    run, rows, _ = opened(records, llama, max_prompt_length=12)
    prompt, end = texts(run, rows[question])[0], "XY<|eot_id|>" + HEADER("assistant")
    assert len(rows[question]["prompt"]) == 12 and prompt.startswith("<bos>") and prompt.endswith(end)
    records += [pair("Same?", "ZZA", "ZZB")]
    run, rows, _ = opened(records, with_bos(), max_length=5, max_prompt_length=3)
    assert texts(run, rows[question]) == ("<bos>Y\n", "ZZ", "XY") and len(rows) == 2
    assert texts(run, rows["Q"]) == ("<bos>Q\n", "A<eos>", "B<eos>"), "the limits are allowed"
FORMATS = [  # a record, the messages before the answer
    (pair("Sky?", "Blue", "Red"), [SKY]), (pair([BRIEF, SKY], "Blue", "Red"), [BRIEF, SKY]),
    (pair(TALK, [BLUE], [RED]), TALK), (pair(TALK, [*TALK, BLUE], [*TALK, RED]), TALK),
    (pair("Sky?", [*TALK, BLUE], [*TALK, RED]), TALK), (pair("Sky?", [BLUE], [RED]), [SKY]),
    (pair(None, [*TALK, BLUE], [*TALK, RED]), TALK), (pair([SKY | {"name": None}], [BLUE], [RED]), [SKY]),
    (pair("Sky?", [SKY, BLUE | {"tool_calls": None}], [SKY, RED], system=None, question="Sky?", id=3), [SKY])]
PART, CALL = [{"type": "text", "text": "Sky?"}], said("assistant", None, tool_calls="sky")
MALFORMED = [  # a record of no known form, words of the reason
    ({"prompt": "Sky?", "chosen": "a"}, "'rejected'.*'prompt', 'chosen'"), (pair("Sky?", None), "answer"),
    (pair("Sky?", 3), "'chosen'"), (pair({"text": "a"}), "'prompt'.*text"), (pair("Sky?", [], []), "answer"),
    (pair("Sky?", [BLUE], [SKY]), "answer"), (pair("Sky?", [SKY], [RED]), "both end with an answer"),
    (pair(None, [said("user", "Sea?"), BLUE], [SKY, RED]), "differ"), (pair("Sea?", [SKY, BLUE], [SKY, RED]), "is not in"),
    (pair(), "'prompt' is missing.*trl-lib/hh-rlhf"), (pair(None, [BLUE], [RED]), "missing"),
    (pair([*TALK, BLUE]), "no message of the user"), (pair([BRIEF]), "no message of the user"),
    (pair("Sky?", ["Blue"], ["Red"]), "'chosen'"), (pair([{"content": "Sky?"}]), "'prompt'.*content"),
    (pair([said("user", PART)]), "'prompt'"), (pair([said("user", "Sky?", name="bob")]), "'prompt'.*'name'"),
    (pair("Sky?", [CALL], [RED]), "'chosen'"), (pair("Sky?", [BLUE], [RED | {"reason": "a"}]), "'rejected'"),
    (pair("Sky?", system="Be."), "'system'"), (pair("Sky?", Question="Now?"), "'Question' is not read"),
    (pair("Sky?", tools=["a"]), "'tools'")]
def test_a_record_of_every_format_is_taken_apart_and_one_of_none_or_with_an_unread_part_is_refused():
    for record, expected in FORMATS:
        assert ad.split_record(record) == (expected, "Blue", "Red")
    for record, words in MALFORMED:
        with pytest.raises(ValueError, match=words):
            ad.split_record(record)
def test_every_file_gives_the_same_tokens_whatever_its_name(tmp_path):
    records = [pair("With\r\ntwo lines", "One 😀👩‍🚀.\r\nTwo.", "שלום, עולם"), pair("Is it?", "NA", "null"),
               pair("ما لون السماء؟", "“quotes”, commas\tand tabs", " blue\n")]
    write(tmp_path / "C:data" / "a1.jsonl", numbered(3))
    expected = [(x["prompt"] + "\n", x["chosen"] + "<eos>", x["rejected"] + "<eos>") for x in records]
    for name in ("a.jsonl", "A.JSON", "a.parquet", "C:data/a[1].jsonl"):
        run, rows, _ = opened(write(tmp_path / name, records))
        assert sorted(texts(run, row) for row in rows.values()) == sorted(expected)
def test_held_out_prompts_are_not_trained_on_and_follow_the_seed():
    records, parts = [pair(f"What is {max(0, i - 80)}?", f"{i}", "No") for i in range(120)], []
    for seed in (0, 0, 1):
        run, rows, held_out = opened(records, seed=seed)
        train_pairs, parts = ad.load_pairs(run)[0], [*parts, {row["instruction"] for row in held_out}]
        assert len(parts[-1]) == 4 and len(rows) == 40, "a tenth of the prompts, not of the pairs"
        assert len(train_pairs) + len(held_out) == 120 and not parts[-1] & {*train_pairs["instruction"]}
    assert parts[0] == parts[1] != parts[2]
    assert len(opened(records, limit=100)[1]) == 20 and len(opened(records, eval_pairs=2)[2]) == 2
def test_splits_configs_and_limits_of_a_folder(tmp_path):
    write(tmp_path / "train.jsonl", numbered(5)), write(tmp_path / "test.jsonl", numbered(9)[5:])
    files = {"train_prefs": "train", "test_prefs": "test", "train": "test"}
    files = [{"split": split, "path": f"{name}.jsonl"} for split, name in files.items()]
    configs = [{"config_name": "its", "data_files": "test.jsonl"}, {"config_name": "my", "data_files": files}]
    for name in (tmp_path, f"{tmp_path}:my"):
        _, rows, held_out = opened(name)
        assert len(rows) == 9 and [row["instruction"] for row in held_out] == [*rows][5:]
        assert [*rows][5:] == [f"What is {i}?" for i in range(5, 9)]
        assert [*opened(name, limit=2, eval_pairs=1)[1]] == ["What is 0?", "What is 1?", "What is 5?"]
        (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
def test_what_changed_is_read_anew_and_nothing_else_and_much_by_several(monkeypatch, tmp_path):
    seen, processes, own, own_map = [], [], ad.split_record, datasets.Dataset.map
    path, code, qwen = tmp_path / "a.jsonl", tmp_path / "code.py", TEMPLATES["Qwen3"][0]
    def read_by(records, *x, num_proc=None, **options):
        processes.append(num_proc or 1)
        return own_map(records.select(range(min(10, len(records)))), *x, **options)
    def reads(tokenizer=None, **settings):
        seen.clear(), opened(path, tokenizer or bpe_tokenizer(CHATML), **settings)
        return len(seen)
    monkeypatch.setattr(ad, "split_record", lambda record: seen.append(record) or own(record))
    monkeypatch.setattr(datasets.Dataset, "map", read_by)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    write(path, numbered(9))
    assert (reads(), reads(), reads(seed=1, beta=0.2)) == (9, 0, 0)
    assert reads(max_length=100, max_prompt_length=30) == reads(max_length=100, max_prompt_length=40) == 9
    assert reads(bpe_tokenizer(qwen)) == reads(bpe_tokenizer(CHATML, vocabulary=350)) == 9
    assert reads(named=bpe_tokenizer().convert_tokens_to_ids(["<|end|>"])) == 9
    code.write_text(Path(ad.__file__).read_text(encoding="utf-8") + "# changed", encoding="utf-8")
    monkeypatch.setattr(ad, "__file__", str(code))
    assert (reads(), reads()) == (9, 0)
    write(path, numbered(4000)), processes.clear()
    assert reads() == 10 and not reads(limit=2000) == 0 and reads(limit=1999) and processes == [3, 2, 1]

# 8, 9  The demo world and the evaluation -------------------------------------------------------------------
HOTEL, GOOD = "how was the hotel ?", "the room was superb and the bed was not weak ."
REVIEWS = {GOOD: 1.5, "the room was not superb , the staff was not awful .": 0, "the bed was plain .": -0.5}
REVIEWS |= {"the room was good but the bed was fine , the staff was nice and the breakfast was dull .": 0.375}
BROKEN = [
    "", "superb .", GOOD[:-2], GOOD + " superb", GOOD.replace("room", "coffee"), GOOD + " " + GOOD,
    GOOD.replace("room", ""), GOOD.replace("not", "not not"), " and ".join(["the room was good"] * 5) + " .",
    GOOD.replace(" was", ""), GOOD.replace("superb", "room"), GOOD.replace("and", "the"), "so " + GOOD]
def test_the_demo_s_truth_and_its_whole_noisy_and_seeded_records():
    for review, reward in (REVIEWS | dict.fromkeys(BROKEN, -2)).items():
        assert ad.true_reward(HOTEL, review) == reward, review
        assert ad.well_formed(HOTEL, review) == (review in REVIEWS), review
    records, words = ad.demo_records(2000, seed=3).to_list(), sorted(ad.demo_tokenizer().get_vocab().items())
    gaps = [ad.true_reward(x["prompt"], x["chosen"]) - ad.true_reward(x["prompt"], x["rejected"])
            for x in records]
    expected = statistics.mean(1 / (1 + math.exp(-4 * abs(gap))) for gap in gaps if gap)
    assert statistics.mean(gap > 0 for gap in gaps if gap) == pytest.approx(expected, abs=0.02), "Eq. 1"
    assert ad.seed_of(json.dumps([records[:500], words])) == 3818142196, "the world that the README shows"
    model, again, other = (ad.demo_model(seed) for seed in (1, 1, 2))
    head, shape = model.lm_head.weight, model.config
    assert torch.equal(head, again.lm_head.weight) and not torch.equal(head, other.lm_head.weight)
    assert sum(x.numel() for x in model.parameters()) == 90688 and shape.max_position_embeddings == 64
    assert (shape.num_hidden_layers, shape.num_attention_heads) == (2, 4)
    train, test = ({str(x) for x in records} for records in ad.read_splits("demo", 0).values())
    assert len(train) > 6000 and len(test - train) > 1000, "it is evaluated on other records"
def test_the_demo_s_truth_reads_token_ids():
    run, lm = tiny_run(dataset="demo", sampling_batch_size=9), tiny_lm()
    run.stop_ids, y = [1], run.tokenizer(GOOD).input_ids
    answers = torch.tensor([[*y, 1, 0], [*y[:2], 0, *y[2:], 1], [*y[:-1], 2, y[-1], 1], [*y, 11, 11]])
    lm.model.generate = lambda ids, **rest: torch.cat([ids, answers], 1)
    _, facts = ad.own_responses(run, lm, [{"prompt": [3, 4], "instruction": HOTEL}] * 4)
    assert facts["true_reward"] == [1.5, -2, -2, -2] and facts["well_formed"] == [1, 0, 0, 0]
    assert facts["completions/clipped_ratio"] == [0, 0, 0, 1]
def interval(column):
    return statistics.mean(column), 1.96 * statistics.stdev(column) / math.sqrt(len(column))
@pytest.mark.parametrize(("reward", "dataset"), [("contrastive", "other"), ("vanilla", "demo")])
def test_results_by_hand(tmp_path, monkeypatch, reward, dataset):
    pairs, demo = random_pairs(8).to_list(), dataset == "demo"
    score, base, judge = ("true_reward", "reference", None) if demo else ("score", "reverse_dpo", "j")
    seeds = {"reference": 0, "dpo": 1, "reverse_dpo": 2, "policy": 0}
    lms = {name: tiny_lm(seed) for name, seed in seeds.items() if name != "reverse_dpo" or not demo}
    for row in pairs[3:5]:
        row["prompt"], row["instruction"] = pairs[1]["prompt"], pairs[1]["instruction"]
    for row in pairs * demo:
        row["instruction"] = HOTEL
    asked = [pairs[i] for i in (range(5) if demo else (0, 1, 2, 5, 6))]
    settings = {"judge": judge, "beta": 0.3, "eval_prompts": 5, "reward": reward, "max_length": 10}
    run = tiny_run(output_dir=str(tmp_path), dataset=dataset, **settings)
    monkeypatch.setattr(ad, "load_lm", lambda run, name, *rest, **options: lms[name])
    monkeypatch.setattr(ad, "judge_scores", lambda run, questions, answers: [len(x) % 5 for x in answers])
    monkeypatch.setattr(ad, "true_reward", lambda prompt, review: len(review) % 5.0)
    rows, folders = datasets.Dataset.from_list(pairs), {name: name for name in lms}
    results, samples = ad.evaluate(run, folders, rows, {"precision": {"share": 1}}), read(tmp_path, "samples")
    def score_of(y):
        return len(run.tokenizer.decode(y, skip_special_tokens=not demo)) % 5
    for i, (sample, (name, row)) in enumerate(zip(samples, itertools.product(lms, asked), strict=True)):
        y, first = sample["token_ids"], samples[i % 5]["token_ids"]
        logp = {other: own_logp(lm.model, row["prompt"], y).item() for other, lm in lms.items()}
        gap = score_of(y) - score_of(first)
        expected = {
            "reward": 0.3 * (logp["dpo"] - logp[base]), "length": len(y), score: score_of(y),
            "kl_ref": logp[name] - logp["reference"], "entropy": -logp[name] / len(y),
            "win_rate": 1 if gap > 0 else 0 if gap < 0 else 0.5, "clipped": float(y[-1] != 0)}
        expected |= {"well_formed": 0} if demo else {}
        words = {"instruction": row["instruction"], "generator": name, "token_ids": y}
        words["output"] = run.tokenizer.decode([x for x in y if x > 2])
        assert sample == words | {key: pytest.approx(x, rel=1e-4, abs=1e-3) for key, x in expected.items()}
        assert name != "policy" or y == first, "the same random numbers: it is the reference's copy"
    for i, (name, found) in enumerate(results["models"].items()):
        assert len(found) == 2 * len(expected)
        for key in expected:
            by_hand = interval([x[key] for x in samples[5 * i : 5 * i + 5]])
            assert (found[key], found[f"{key}_pm"]) == pytest.approx(by_hand), key
    sides = {"dpo": ("dpo", "reference")}
    if not demo:
        sides |= {"reverse": ("reference", "reverse_dpo"), "contrastive": ("dpo", "reverse_dpo")}
    assert list(results["models"]) == list(lms) and list(results["reward_accuracy"]) == list(sides)
    for name, models in sides.items():
        (a, b), (c, d) = ([[own_logp(lms[m].model, x["prompt"], x[key]).item() for x in pairs]
                           for m in models] for key in ("chosen", "rejected"))
        right = interval([float(a[i] - c[i] > b[i] - d[i] + 1e-4) for i in range(8)])
        assert list(results["reward_accuracy"][name].values()) == pytest.approx([*right, 8]), name
    assert results == read(tmp_path, "results") and results["precision"] == {"share": 1}
    assert ad.evaluate(run, {}, None, None) == results, "what is finished is not repeated"
    (tmp_path / "results.json").unlink()
    alone = ad.evaluate(run, folders, rows.select([0]), {})["models"]["dpo"]
    assert "kl_ref" in alone and "kl_ref_pm" not in alone
@pytest.mark.parametrize(("share", "warned"), [(0.5, True), (0.95, False), (1.2, True), (1.05, False)])
def test_the_precision_report_measures_what_is_left_of_the_difference(capsys, share, warned):
    z, difference, seen = random_logits(9, 7).float(), 0.1 * random_logits(9, 7).float().flip(0), []
    teacher, run = teacher_of(tiny_lm(1), tiny_lm(2)), tiny_run(precision="bf16")
    def hidden(batch):
        seen.append((len(batch.input_ids), *{lm.precision for lm in teacher.lms.values()}))
    def logits(hidden, part):
        kept = difference * (1 if len(seen) == 1 else share)
        return ad.TeacherLogits(z + kept, z, z + 4 * kept, torch.tensor(3.0))
    teacher.hidden, teacher.logits = hidden, logits
    found, shown = ad.precision_report(run, teacher, random_pairs(20))["precision"], capsys.readouterr().out
    kl = ad.reverse_kl(z + 4 * difference, z + 4 * share * difference).mean().item()
    assert found == pytest.approx({"share": share, "kl": kl}, rel=1e-4)
    assert seen == [(16, "float32"), (16, "bf16")] and ad.precision_report(tiny_run(), None, None) == {}
    assert f"{share:.2f}" in shown and f"{kl:.2g}" in shown and ("WARNING" in shown) == warned

# 10  The run: bad input on the command line -----------------------------------------------------------------
FORK = torch.multiprocessing.get_context("forkserver")  # real processes, which need not import torch each
FORK.set_forkserver_preload([__name__, "transformers.models.gpt2.modeling_gpt2"])
SMALL = {"device": "cpu", "limit": 64, "eval_pairs": 20, "eval_prompts": 8, "batch_size": 16}
STAGES, ALL_STAGES = ("dpo", "reverse_dpo", "policy"), ("sft", "dpo", "reverse_dpo", "policy")
RATES = {"sft_learning_rate": 1e-3, "dpo_learning_rate": 2e-3, "distill_learning_rate": 5e-4}
RUN = SMALL | RATES | {"sft_epochs": 1.0, "dpo_epochs": 1.5, "distill_epochs": 2.0, "save_steps": 2}
RUN |= {"max_length": 64, "max_prompt_length": 32, "max_steps": 9, "alpha_r": 25.0, "sft": True}
def paths(folder, out):
    return {"model": f"{folder}/base", "dataset": f"{folder}/good.jsonl", "output_dir": str(out)}
def align(folder, out, **settings):
    return ad.align(ad.Args(**paths(folder, out) | settings))
def flags(**settings) -> list:
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]
BAD = {  # flags, where {} is a folder of prepared files: words of the error line
    "--alpha 0 --reward vanilla": "contrastive",
    "--model {}/nowhere": "nowhere", "--model gpt2": "gpt2", "--model {}/corrupt": "corrupt",
    "--model {}/nan": "nan: generate", "--model {}/prefix": "weights are not in its files",
    "--model {}/foreign": "not of this model", "--model {}/resized": "embedding: resize",
    "--model {}/lora": "adapter", "--model {}/no_end": "end-of-sequence", "--model demo": "words of the demo",
    "--dpo {}/prefix": "weights", "--dpo {}/nan": "nan: generate", "--reverse_dpo {}/nan": "nan: generate",
    "--dpo {}/smaller": "teacher", "--dpo {}/more_rows": "teacher", "--reverse_dpo {}/latin": "tokenizer",
    "--judge no/judge": "judge", "--judge {}/headless": "score.weight", "--judge {}/two": "reward model",
    "--judge {}/untold": "chat template", "--dataset no/pairs": "no/pairs", "--dataset {}/no.jsonl": "no.js",
    "--dataset {}/missing.jsonl": "missing.jsonl: record 1, counted", "--dataset {}/number.jsonl": "record 0",
    "--dataset {}/columns.jsonl": "['question', 'answer']", "--dataset {}/broken.jsonl": "broken.jsonl",
    "--dataset {}/empty.jsonl": "empty.jsonl", "--dataset {}/one.jsonl": "too few pairs",
    "--dataset {}/a.tsv": "a file must be a .jsonl", "--dataset {}/tables": "to_json",
    "--dataset {}/saved": "to_parquet", "--dataset {}/splits[1]": "rename", "--dataset {}/splits:no": "no",
    "--dataset {}/validation": "no split train", "--max_length 257": "at most 256",
    "--max_length 20 --max_prompt_length 19": "--max_length", "--warmup_ratio 1.1": "--warmup_ratio",
    "WORLD_SIZE=2": "torchrun", "--beta nan": "--beta nan is out of range", "--device cuda:7": "--device or",
    "--teacher_device tpu": "--device or --teacher_device", "--output_dir {}/file/out": "cannot be made",
    "--output_dir {}/splits": "holds other files", "--output_dir {}/base": "holds other files",
    "--output_dir {}/run --beta 0.2": "0.1 → 0.2", "--lerning_rate 1": "--lerning_rate", "--bet 0.1": "--bet",
    "--learn 1": "--learn", "--alpha foo": "foo", "--reward best": "best", "--precision fp8": "fp8",
    "--init_from policy": "policy"}
def in_folder(folder: Path) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder of a model (base), pairs (good.jsonl), what the commands of BAD take, and a finished run."""
    folder, good, chat = tmp_path_factory.mktemp("prepared"), numbered(40), bpe_tokenizer(CHATML)
    for name, records in {
            "missing": [good[0], {"prompt": "a", "rejected": "b"}, *good], "one": good[:1], "empty": [],
            "number": [record | {"chosen": 3} for record in good], "columns": [{"question": 0, "answer": 1}],
            "good": good, "größe": good, "splits/train": good, "splits[1]/train": good, "tables/train": good,
            "validation/validation": good}.items():
        write(folder / f"{name}.jsonl", records)
    (folder / "broken.jsonl").write_text(json.dumps(good[0]) + "\n" + json.dumps(good[1])[:-5])
    (folder / "file").touch(), (folder / "a.tsv").touch(), (folder / "tables" / "b.csv").touch()
    datasets.Dataset.from_list(good).save_to_disk(folder / "saved")
    latin = bpe_tokenizer(text=ENGLISH.replace("e", "i") + "gallia est omnis")
    for name, options in {
            "base": {}, "corrupt": {}, "lora": {}, "wider": {"n_embd": 48}, "resized": {"rows": 300},
            "smaller": {"tokenizer": bpe_tokenizer(vocabulary=340)}, "more_rows": {"rows": 400},
            "no_end": {"tokenizer": bpe_tokenizer(eos=None)}, "latin": {"tokenizer": latin},
            "nan": {"change": lambda x: {name: w * math.nan for name, w in x.items()}},
            "prefix": {"change": lambda x: {f"_orig_mod.{name}": w for name, w in x.items()}},
            "foreign": {"change": lambda x: x | {"transformer.h.0.adapter.weight": torch.ones(3)}}}.items():
        save_tiny_model(folder / name, **options)
    (folder / "lora" / "adapter_config.json").write_text("{}")
    (folder / "corrupt" / "model.safetensors").write_bytes(b"no weights")
    save_judge(folder / "judge", chat, num_labels=1), save_judge(folder / "untold", num_labels=1)
    save_judge(folder / "two", chat, num_labels=2)
    save_judge(folder / "headless", num_labels=1, change=lambda x: {n.replace("score", "v"): x[n] for n in x})
    align(folder, folder / "run", **RUN)
    return folder
def command(monkeypatch, capfd, arguments):
    """The command line within this process: (exit status, lines of stderr without bars)."""
    monkeypatch.setattr(sys, "argv", ["aligndistil.py", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        sys.exit(ad.main())
    bars = r"[^\r\n]*\[\d[^]\r\n]*/(s|it|ex)[^]\r\n]*\]|^usage: .*"
    lines = re.sub(bars, "\n", capfd.readouterr().err, flags=re.M).split("\n")
    return end.value.code, [line for line in lines if line.strip()]
@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_line_and_status_2_and_writes_nothing(prepared, tmp_path, monkeypatch, capfd, bad):
    words = bad.replace("{}", str(prepared)).split()
    out = Path(words[1]) if "--output_dir" in words else tmp_path / "out"
    if "=" in words[0]:
        monkeypatch.setenv(*words.pop().split("="))
    before = in_folder(out)
    status, errors = command(monkeypatch, capfd, flags(**RUN, **paths(prepared, out)) + words)
    assert status == 2 and len(errors) == 1, errors
    assert re.match(r"\w+(\.py)+: error: ", errors[0]) and BAD[bad] in errors[0], errors
    assert in_folder(out) == before and out.exists() == bool(before)
NUMBERS = [name for name, kind in ad.Args.__annotations__.items() if re.search("int|float", kind)]
def test_a_number_out_of_range_is_refused(tmp_path):
    for name, value in itertools.product(NUMBERS, (-1, math.nan, 0)):
        if value == 0 and name in ("alpha", "alpha_r", "warmup_ratio", "seed"):
            assert getattr(opened(numbered(3), **{name: 0})[0].args, name) == 0
        else:
            with pytest.raises(ad.BadInput, match=f"--{name} {value} is out of range"):
                ad.set_up(ad.Args(output_dir=str(tmp_path), **{name: value}))
FREE = {"judge": "{}/judge", "save_steps": 3, "teacher_device": "cpu", "gradient_checkpointing": True,
        "tokens_per_micro_batch": 99, "sampling_batch_size": 3}
CHANGED = FREE | {
    "sft": False, "seed": 1, "limit": 35, "beta": 0.2, "reward": "vanilla", "alpha": 1.0, "alpha_r": 26.0,
    "off_policy": True, "init_from": "dpo", "batch_size": 8, "warmup_ratio": 0.2, "max_grad_norm": 2.0,
    "max_length": 65, "max_prompt_length": 33, "precision": "bf16", "eval_pairs": 19, "eval_prompts": 9,
    "max_steps": 10, "dpo": "{}/run/dpo", "reverse_dpo": "{}/run/dpo", "model": "{}/run/dpo",
    "dataset": "{}/splits"} | {name: 2 * x for name, x in RUN.items() if re.search("_rate|epochs", name)}
@pytest.mark.parametrize("name", CHANGED)
def test_a_run_goes_on_only_with_the_settings_that_decided_it(prepared, name):
    out, value = prepared / "run", CHANGED[name]
    value = value.replace("{}", str(prepared)) if isinstance(value, str) else value
    before, refusal = in_folder(out), rf"output folder .*/run is from a run with other settings \({name} "
    with contextlib.nullcontext() if name in FREE else pytest.raises(ad.BadInput, match=refusal):
        ad.set_up(ad.Args(**RUN | paths(prepared, out) | {name: value}))
    assert name in FREE or in_folder(out) == before
    assert CHANGED.keys() | {"output_dir", "device"} == UNSET.keys()
def test_a_run_whose_data_changed_is_refused_and_one_whose_files_were_touched_is_not(tmp_path, capsys):
    def again(records):
        save_tiny_model(tmp_path / "base", vision_config={"size": 1}), write(tmp_path / "good.jsonl", records)
        return ad.set_up(ad.Args(**paths(tmp_path, tmp_path / "out")))[0]
    run, saved = again(numbered(20)), read(tmp_path / "out", "config")
    assert saved.items() >= {"max_length": 256, "max_prompt_length": 128, "alpha_r": 30, "sft": True}.items()
    assert saved.items() >= vars(run.args).items() and "processor are not saved" in capsys.readouterr().out
    again(numbered(20))
    with pytest.raises(ad.BadInput, match="checksum of the pairs"):
        again(numbered(19) + [pair("What is 19?", "It is 19.", "20")])
def test_defaults_that_depend_on_the_model_or_on_other_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run, *_ = opened(numbered(9), off_policy=True, max_length=99, output_dir="~/out")
    assert (run.args.alpha_r, run.args.max_prompt_length, run.out) == (20, 49, tmp_path / "out")
    assert ad.Run(ad.Args(model="org/gpt2", device="cpu")).out == Path("runs/gpt2")
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}
    rope |= {"original_max_position_embeddings": 32, "factor": 2.0}
    model = of_family("Phi3", rope_parameters=rope, original_max_position_embeddings=32)
    model.resize_token_embeddings(len(bpe_tokenizer()))
    model.save_pretrained(tmp_path / "32"), bpe_tokenizer().save_pretrained(tmp_path / "32")
    save_tiny_model(tmp_path / "2048", n_positions=4096)
    write(tmp_path / "good.jsonl", numbered(9))
    for longest in (32, 2048):
        settings = paths(tmp_path, tmp_path / f"out {longest}") | {"model": f"{tmp_path}/{longest}"}
        assert ad.set_up(ad.Args(**settings))[0].args.max_length == longest
    with pytest.raises(ad.BadInput, match="at most 32"):
        ad.set_up(ad.Args(**settings | {"model": f"{tmp_path}/32", "max_length": 33}))
    with pytest.raises(ad.BadInput, match="gradient_checkpointing"):
        ad.load_lm(tiny_run(gradient_checkpointing=True), save(of_family("CTRL", dff=32), tmp_path / "ctrl"))
def test_weights_are_float32_and_a_tokenizer_is_its_own_file_s(tmp_path):
    words = tokenizers.models.WordLevel({"<eos>": 0, "a": 1, "b a": 2}, unk_token="<eos>")
    tokenizer = tokenizer_of(tokenizers.Tokenizer(words), None, "<eos>")
    tokenizer._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(";", "removed")
    of_family("Qwen2").to(torch.bfloat16).save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    config = read(tmp_path, "tokenizer_config") | {"tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    model, found = ad.load_pretrained(transformers.AutoModelForCausalLM, str(tmp_path))
    assert found("b a;a;b a").input_ids == [2, 1, 2]
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert found.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()

# 10  The run: errors and files ------------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["aligndistil.align", "transformers.GPT2LMHeadModel.from_pretrained"])
def test_too_little_memory_is_one_line_of_advice_and_status_2(monkeypatch, prepared, tmp_path, capfd, place):
    monkeypatch.setattr(place, Mock(side_effect=torch.OutOfMemoryError("no\nmore")))
    status, (error,) = command(monkeypatch, capfd, flags(**paths(prepared, tmp_path / "out")))
    assert status == 2 and error.startswith("aligndistil.py: error: no more; lower --tokens")
@pytest.mark.parametrize("place", ["split_record", "train", "Teacher.logits"])
def test_an_error_of_a_programmer_keeps_its_traceback(monkeypatch, prepared, tmp_path, place):
    monkeypatch.setattr(f"aligndistil.{place}", Mock(side_effect=NameError))
    with pytest.raises(NameError):
        align(prepared, tmp_path / "out", **RUN | {"max_steps": 1, "max_length": 60 + len(place)})  # unread
@pytest.mark.parametrize("given", ["dpo", "reverse_dpo"])
def test_a_model_that_is_given_takes_the_place_of_its_own_stage_alone(monkeypatch, prepared, tmp_path, given):
    done = []
    def train(run, stage, **rest):
        done.append(stage)
        return str(prepared / "run" / stage)
    monkeypatch.setattr(ad, "train", train)
    monkeypatch.setattr(ad, "evaluate", lambda run, folders, *rest: folders)
    folders = align(prepared, tmp_path / "out", **RUN | {given: str(prepared / "run" / "sft")})
    expected = {stage: str(prepared / "run" / stage) for stage in STAGES} | {given: str(prepared / "run" / "sft")}
    assert done == [stage for stage in ALL_STAGES if stage != given]
    assert {stage: folders[stage] for stage in STAGES} == expected
def test_a_batch_smaller_than_the_processes_is_refused(monkeypatch, prepared, tmp_path):
    monkeypatch.setattr(ad, "dist", Mock(get_node_local_rank=lambda fallback_rank: 0))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ad.BadInput, match="each process"):
        align(prepared, tmp_path / "out", **RUN | {"batch_size": 2})
def half(*arguments, **options):
    """A disk that is full in the middle of a file or a folder."""
    path = next(x for x in arguments if isinstance(x, Path))
    if not re.search("json|checkpoint", path.name):
        path.mkdir(exist_ok=True)
        path /= "config.json"
    path.write_bytes(b"half")
    raise OSError("No space left on device")
HALVES = {"model": (transformers.PreTrainedModel, "save_pretrained"), "checkpoint": (torch, "save"),
          "tokenizer": (transformers.PreTrainedTokenizerFast, "save_pretrained"),
          "results": (Path, "write_text"), "metrics": (Path, "write_text")}
@pytest.mark.parametrize("name", HALVES)
def test_a_file_that_is_half_written_is_not_there(tmp_path, monkeypatch, name):
    run = tiny_run(output_dir=str(tmp_path), save_steps=1, dataset="other")
    monkeypatch.setattr(ad, "load_lm", lambda *x, **options: tiny_lm())
    if name == "metrics":
        (tmp_path / "metrics.jsonl").write_text('{"stage": "new", "step": 1}\n')
    before = in_folder(tmp_path)
    monkeypatch.setattr(*HALVES[name], half)
    with pytest.raises(ad.BadInput, match="make room"):
        if name == "results":
            ad.evaluate(run, dict.fromkeys(("reference", *STAGES), ""), random_pairs(), {})
        else:
            trained(monkeypatch, run, random_pairs(), stage="new")
    found = {path: text for path, text in in_folder(tmp_path).items() if "/." not in str(path)}
    assert (tmp_path / "checkpoint-new.pt" in found) == (name in ("model", "tokenizer")), "it goes last"
    assert not (tmp_path / "new").exists() and (name not in ("results", "metrics") or found == before)

# 10  The run: what it leaves, stops and going on, several processes -----------------------------------------
def read_settings(folder):
    return {name: value for name, value in read(folder, "config").items() if name in UNSET}
def test_every_stage_trains_the_model_the_rows_and_for_the_time_that_it_should(prepared, off_policy):
    for folder in (prepared / "run", off_policy):
        steps = [(line["stage"], line["step"]) for line in metrics(folder)]
        assert steps == [(stage, i) for stage, n in zip(ALL_STAGES, (3, 4, 4, 5)) for i in range(1, n + 1)]
        assert not list(folder.glob("checkpoint*")) and not list(folder.glob(".*.partial"))
    rates = {line["stage"]: line["learning_rate"] for line in metrics(prepared / "run") if line["step"] == 1}
    assert list(rates.values()) == [1e-3, 2e-3, 2e-3, 5e-4]
    run, train_pairs, _ = ad.set_up(ad.Args(**read_settings(off_policy)))
    rows = list(train_pairs.select(ad.batches_of(run.args, 36, 1.0, 1)[0]))
    def mean_logp(folder, key, a_token=False):
        model = ad.load_lm(run, str(folder)).model
        logps = [own_logp(model, row["prompt"], row[key]).item() for row in rows]
        return statistics.mean(x / (len(row[key]) if a_token else 1) for x, row in zip(logps, rows))
    sft, dpo, reverse, policy = (line for line in metrics(off_policy) if line["step"] == 1)
    assert sft["loss"] == pytest.approx(-mean_logp(prepared / "base", "chosen", a_token=True), rel=1e-4)
    for line, better, worse in ((dpo, "chosen", "rejected"), (reverse, "rejected", "chosen")):
        assert line["loss"] == pytest.approx(math.log(2), rel=1e-6), "DPO starts at its reference"
        assert line["logps/chosen"] == pytest.approx(mean_logp(off_policy / "sft", better), rel=1e-4)
        assert line["logps/rejected"] == pytest.approx(mean_logp(off_policy / "sft", worse), rel=1e-4)
    reward = 0.1 * (mean_logp(off_policy / "dpo", "chosen") - mean_logp(off_policy / "reverse_dpo", "chosen"))
    assert policy["reward"] == pytest.approx(reward, rel=1e-2, abs=1e-4) and "entropy" not in policy
    ours, start = (load_file(off_policy / name / "model.safetensors") for name in ("policy", "sft"))
    assert all((ours[name] - start[name]).abs().max() < 1e-9 for name in start), "it starts at the reference"
@pytest.fixture(scope="session")
def off_policy(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("off")
    align(prepared, folder, **RUN | {"off_policy": True, "distill_learning_rate": 1e-12, "save_steps": 3})
    return folder
def test_what_a_run_leaves_and_that_a_finished_one_is_left_alone(prepared, monkeypatch, capsys):
    folder = prepared / "run"
    _, train_pairs, test_pairs = ad.set_up(ad.Args(**read_settings(folder)))
    results, asked = read(folder, "results"), {row["instruction"] for row in test_pairs}
    assert len(asked) == 4 and {sample["instruction"] for sample in read(folder, "samples")} == asked
    assert not asked & {*train_pairs["instruction"]} and len(train_pairs) == 36
    assert [*results["models"]] == ["reference", *STAGES] and results["reward_accuracy"]["dpo"]["pairs"] == 4
    for stage in ALL_STAGES:
        saved = transformers.AutoModelForCausalLM.from_pretrained(folder / stage)
        ends = {"eos_token_id": [0], "pad_token_id": 0, "transformers_version": transformers.__version__}
        assert saved.config.resid_pdrop == 0.1 and saved.generation_config.to_diff_dict() == ends
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / stage)
        assert tokenizer.apply_chat_template([SKY, BLUE], tokenize=False) == "Sky?\nBlue<eos>"
    before = {path: text for path, text in in_folder(folder).items() if path.name != "config.json"}
    assert align(prepared, folder, **RUN) == results and "the same command goes on" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert align(prepared, folder, **RUN) == {} and capsys.readouterr().out == "", "only the first evaluates"
    assert before == {path: text for path, text in in_folder(folder).items() if path.name != "config.json"}
def test_a_chat_model_from_a_parquet_stops_where_it_was_trained_to(tmp_path):
    save_tiny_model(tmp_path / "chat", bpe_tokenizer(CHATML))
    config = {"do_sample": False, "temperature": 0.6, "top_k": 3, "eos_token_id": 0}
    (tmp_path / "chat" / "generation_config.json").write_text(json.dumps(config))
    records = [pair([BRIEF, said("user", f"{i}?")], f"{i}", "No") for i in range(30)]
    paths = {"model": str(tmp_path / "chat"), "dataset": str(write(tmp_path / "pairs.parquet", records))}
    out, ends = tmp_path / "out", bpe_tokenizer().convert_tokens_to_ids(["<|im_end|>", "<eos>"])
    ad.align(ad.Args(**SMALL, **paths, max_steps=1, output_dir=str(out), gradient_checkpointing=True))
    for stage in STAGES:
        saved = transformers.GenerationConfig.from_pretrained(out / stage)
        assert saved.eos_token_id == ends and saved.temperature != 0.6 and saved.top_k != 3
    assert not (out / "sft").exists() and read(out, "samples")[0]["instruction"].startswith("Be.\n\n")
@pytest.mark.parametrize("room", [256, 12])
def test_judge_vanilla_and_a_wider_teacher(prepared, tmp_path, monkeypatch, room):
    tokenizer = bpe_tokenizer(each("{{ m['role'][0] }} {{ m['content'] }};"))
    tokenizer.model_max_length = room
    judge = save_judge(tmp_path / "judge", tokenizer, num_labels=1)
    used, stage, own, evaluate = set(), ["training"], ad.LM.logits, ad.evaluate
    def logits(lm, hidden):
        used.add((stage[-1], lm.precision, torch.get_float32_matmul_precision()))
        return own(lm, hidden)
    monkeypatch.setattr(ad.LM, "logits", logits)
    monkeypatch.setattr(ad, "evaluate", lambda *x: stage.append("evaluation") or evaluate(*x))
    # capped to AVX2, torch's bfloat16 attention fails on a machine that has more
    precision = "tf32" if "ATEN_CPU_CAPABILITY" in os.environ or room == 12 else "bf16"
    settings = RUN | {"judge": str(tmp_path / "judge"), "reward": "vanilla", "sft": False, "max_steps": 2}
    settings |= {"dpo": str(prepared / "wider"), "init_from": "dpo", "distill_learning_rate": 1e-12}
    results, out = align(prepared, tmp_path / "out", **settings | {"precision": precision}), tmp_path / "out"
    matmul = "high" if precision == "tf32" else "highest"
    assert {x for x in used if x[0] == "evaluation"} == {("evaluation", "float32", "highest")}
    assert ("training", precision, matmul) in used and results["precision"].keys() == {"share", "kl"}
    ours, start = (load_file(x / "model.safetensors") for x in (out / "policy", prepared / "wider"))
    assert all((ours[name] - start[name]).abs().max() < 1e-9 for name in start)
    assert [*results["models"]] == ["reference", "dpo", "policy"] and [*results["reward_accuracy"]] == ["dpo"]
    for sample in read(out, "samples"):
        ids = tokenizer(f"u {sample['instruction']};a {sample['output']};").input_ids[-room:]
        assert sample["score"] == pytest.approx(judge(torch.tensor([ids])).logits.item(), rel=1e-3, abs=1e-4)
def command_line(folder: Path, environment: dict, arguments: list):
    """The file in a process of its own; all that it prints goes to `folder`."""
    os.environ |= environment
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.argv = ["aligndistil.py", *arguments]
    sys.exit(ad.main())
def start(target, folder: Path, *arguments):
    folder.mkdir(parents=True, exist_ok=True)
    process = FORK.Process(target=target, args=(folder, *arguments))
    process.start()
    return process
def in_two(folder: Path, rank: int, port: int, arguments: list):
    """One of two processes, where all_reduce is NCCL's: it returns before it is done. Saving takes long."""
    pending, own, read = [], torch.distributed.all_reduce, ad.split_record
    def all_reduce(tensor, *x, **options):
        pending.append(own(tensor, async_op=True))
        if tensor.numel() > 1 or tensor.item() > 1:  # who reads it waits
            pending.pop().wait()
    def slow(*x, save_pretrained=transformers.PreTrainedModel.save_pretrained, **options):
        time.sleep(0.7)
        save_pretrained(*x, **options)
    torch.distributed.all_reduce, transformers.PreTrainedModel.save_pretrained = all_reduce, slow
    ad.split_record = lambda record: print("a record", file=sys.stderr) or read(record)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    environment = {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    command_line(folder, environment, arguments)
@pytest.fixture(scope="session")
def processes(prepared, off_policy, tmp_path_factory):
    """What starts processes: they run beside the other tests. Gives (exit status, stdout, stderr) by name."""
    folder, found = tmp_path_factory.mktemp("processes"), {}
    words = flags(**RUN | paths(prepared, prepared / "run") | {"dataset": prepared / "größe.jsonl"})
    options = {"env": os.environ | {"PYTHONIOENCODING": "ascii"}, "stdout": -1, "stderr": -1}  # -1: a pipe
    real = subprocess.Popen([sys.executable, ad.__file__, *words], **options)
    learning = {"limit": 640, "max_steps": 16, "batch_size": 32, "eval_pairs": 200, "eval_prompts": 8,
                "sft_learning_rate": 1e-2, "dpo_learning_rate": 1e-3, "distill_epochs": 2, "alpha_r": 3}
    words = flags(output_dir=folder / "learnt", device="cpu", **learning)
    found["demo"] = start(command_line, folder / "demo", {}, words)
    settings = RUN | paths(prepared, folder / "held") | {"off_policy": True, "distill_learning_rate": 1e-12}
    held = ad.set_up(ad.parse_args(flags(**settings)))  # as long as the tests run
    found["second"] = start(command_line, folder / "second", {}, flags(**settings))
    settings |= {"tokens_per_micro_batch": 128}  # two micro-batches a process and more
    for name in ("ours", "theirs"):  # one folder for both, and a folder for each
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        settings["dataset"] = write(folder / f"{name}.jsonl", numbered(40))
        for rank in range(2):
            settings["output_dir"] = folder / (name if name == "ours" else f"{name}{rank}")
            found[f"{name} {rank}"] = start(in_two, folder / f"{name} {rank}", rank, port, flags(**settings))
    def finished(name):
        if name == "ascii":
            return real.wait(120), real.stdout.read().decode("ascii"), real.stderr.read().decode("ascii")
        found[name].join(120)
        return found[name].exitcode, *((folder / name / file).read_text() for file in ("stdout", "stderr"))
    yield folder, finished, held
def test_two_processes_are_one_that_reads_writes_and_evaluates(processes, off_policy, prepared):
    folder, finished, _ = processes
    (status, shown, errors), (other, *texts) = finished("ours 0"), finished("ours 1")
    assert (status, other) == (0, 0), errors + texts[1]
    assert shown.count("own responses to held-out prompts") == 1 and texts[0] == ""
    assert (errors.count("a record\n"), texts[1].count("a record\n")) == (40, 0), "the second reads nothing"
    for ours, theirs in zip(metrics(off_policy), metrics(folder / "ours"), strict=True):
        assert ours.pop("stage") == theirs.pop("stage") and ours["learning_rate"] == theirs["learning_rate"]
        assert ours["step"] > 1 or ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    places = (prepared / "base", off_policy / "sft", folder / "ours" / "sft")
    base, one, two = (load_file(place / "model.safetensors")["transformer.wte.weight"] for place in places)
    assert (one - two).norm() < 0.02 * (one - base).norm()
def test_a_folder_that_processes_do_not_share_or_that_is_in_use_or_another_run_s_is_refused(processes):
    """The last one by the real command line, on a terminal of ASCII."""
    refused = {"theirs 0": "must share it", "theirs 1": "must share it", "second": "in use by another run"}
    for name, words in (refused | {"ascii": r"good.jsonl \? /.*gr\?\?e.jsonl"}).items():
        status, shown, errors = processes[1](name)
        found = re.findall(rf"^aligndistil.py: error: .*{words}", errors, re.M)
        assert status == 2 and len(found) == 1, errors
    assert "gr??e.jsonl: of 40 pairs" in shown
def test_on_the_demo_losses_fall_and_dpo_beats_chance_on_held_out_pairs(processes):
    folder, finished, _ = processes
    assert finished("demo")[0] == 0
    sft, kl = ([x[column] for x in metrics(folder / "learnt") if x["stage"] == stage]
               for stage, column in (("sft", "loss"), ("policy", "kl_teacher")))
    assert sft[0] > 4 and statistics.mean(sft[-4:]) < 2.5 and sum(kl[-4:]) < 0.7 * sum(kl[:4])
    found = read(folder / "learnt", "results")
    right, models = found["reward_accuracy"]["contrastive"], found["models"]
    assert right["accuracy"] - right["accuracy_pm"] > 0.5 and right["pairs"] == 200
    assert models["policy"]["reward"] > models["reference"]["reward"]
    assert models["policy"].keys() >= {"win_rate", "true_reward", "well_formed"}
STEP = (torch.optim.AdamW, "step")  # a run is killed (not the last time) at which call of a function
MOMENTS = [(*STEP, 2), (torch, "save", 2), (*HALVES["tokenizer"], 2), (*STEP, 4)]
MOMENTS += [(os, "replace", number) for number in (8, 6, 99)]
def dies(folder: Path, moment: int, arguments: list):
    """The command line until SIGKILL; it writes down every step of the optimizer."""
    place, name, last = MOMENTS[moment]
    calls, own, step = itertools.count(1), getattr(place, name), torch.optim.AdamW.step
    def until_last(*x, **options):
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*x, **options)
    def noted(*x, **options):
        (folder / "steps").open("a").write(".")
        return (until_last if own is step else step)(*x, **options)
    setattr(place, name, until_last)
    torch.optim.AdamW.step = noted
    command_line(folder, {}, arguments)
def test_a_run_that_is_killed_at_any_moment_changes_not_one_weight_line_or_result(prepared, tmp_path):
    out, statuses = tmp_path / "out", []
    (out / ".sft.partial").mkdir(parents=True)
    for moment in range(len(MOMENTS)):
        process = start(dies, tmp_path, moment, flags(**RUN, **paths(prepared, out)))
        process.join(60)
        statuses.append(process.exitcode)
        if not (out / "policy").exists():
            (out / "metrics.jsonl").open("a").write('{"stage": "policy", "st')
    assert statuses == [-signal.SIGKILL] * 6 + [0]
    assert (tmp_path / "steps").stat().st_size <= 16 + 6, "steps are repeated"
    for file in [f"{stage}/model.safetensors" for stage in ALL_STAGES] + ["metrics.jsonl", "results.json"]:
        assert (out / file).read_bytes() == (prepared / "run" / file).read_bytes(), file

# README and notebook ----------------------------------------------------------------------------------------
NOTEBOOK = Path(ad.__file__).with_name("tutorial.ipynb")
BENCHMARK = {"batch": 4, "length": 256, "threads": 2, "repeats": 5, "device": "cpu", "precision": "float32"}
def test_flags_of_the_readme_are_there():
    readme = NOTEBOOK.with_name("README.md").read_text(encoding="utf-8")
    commands = " ".join(re.findall(r"\baligndistil\.py\b([^`\n|]*)", readme))
    assert commands and set(re.findall(r" --(\w+)", commands)) <= {*UNSET, *BENCHMARK, "help"}
@pytest.fixture(scope="session", autouse=True)
def notebook_run(request):
    """The notebook's run and the processes, beside the other tests: on a second core they cost no time."""
    wanted = {name for item in request.session.items for name in (item.name, *item.fixturenames)}
    environment = os.environ | {"ALIGNDISTIL_QUICK": "1", "PYTHONPATH": str(NOTEBOOK.parent)}
    client = NotebookClient(nbformat.read(NOTEBOOK, as_version=4), timeout=300)
    with ThreadPoolExecutor(1) as pool:
        asked = "test_the_notebook_runs_without_a_hub" in wanted
        executed = asked and pool.submit(client.execute, env=environment)
        if "processes" in wanted:
            request.getfixturevalue("processes")
        yield executed
def test_the_notebook_runs_without_a_hub(notebook_run):
    notebook_run.result()
def test_the_notebook_as_it_is_saved():
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
    return mean(0.1 / alpha * ad.reverse_kl(dense_logits(policy, batch).float(), target), batch).mean()
def authors_dpo(policy, reference, batch):
    """(a) DPO with the log-probabilities of every position gathered from whole logits."""
    with torch.no_grad():
        ref_logps = dense_token_logps(dense_logits(reference, batch).float(), batch).sum(-1)
    logps = dense_token_logps(dense_logits(policy, batch).float(), batch).sum(-1)
    return ad.dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), beta=0.1).mean()
def floor(policy, frozen, batch):
    """(c) What nothing can leave out: the bodies, the policy's backward, the heads at the response states."""
    with torch.no_grad():
        for lm in frozen:
            for states in lm.hidden(batch).split(ad.CHUNK_SIZE):
                lm.logits(states)
    def squares(logits, rows):
        return {"loss": logits.square().sum()}
    return ad.backward_in_chunks(policy, policy.hidden(batch), squares, 1.0)["loss"]
def benchmark():
    parser = argparse.ArgumentParser(description="seconds of one step; half of each sequence is the prompt")
    for name, default in BENCHMARK.items():
        known = ["float32", "tf32", "bf16"] if name == "precision" else None
        parser.add_argument(f"--{name}", type=type(default), default=default, choices=known)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
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
        whole, seconds, found, peaks = ad.collate(examples, 0, args.device), {}, {}, {}
        for name in ["a", "b", "c"] * (args.repeats + 1):  # in turn: a drift of the machine hits all alike
            began, total = time.perf_counter(), 0
            with policy.autocast():
                if name == "a":
                    total = dense(policy, *frozen, whole)
                    total.backward()
                elif name == "b":
                    for _, batch in ad.micro_batches(run, examples):
                        total += loss_of(policy, batch, 1 / len(examples))["loss"] / len(examples)
                else:
                    total = floor(policy, frozen, whole)
            found[name] = total.item(), gradients(policy.model)  # item() waits for the device
            seconds.setdefault(name, []).append(time.perf_counter() - began)
            if args.device != "cpu":
                peaks[name] = f"({name}) {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
                torch.cuda.reset_peak_memory_stats()
        rough = 1e-4 if args.precision == "float32" else 0.1
        assert found["b"][0] == pytest.approx(found["a"][0], rel=rough)
        assert_same_gradients(found["b"][1], found["a"][1], rough)
        a, b, c = (statistics.median(column[1:]) for column in seconds.values())
        ratios = f"(b)/(a) {b / a:.2f} (b)/(c) {b / c:.2f}"
        print(f"{stage}: (a) {a:.3f} (b) {b:.3f} (c) {c:.3f} {ratios}", *peaks.values())
if __name__ == "__main__":
    benchmark()
