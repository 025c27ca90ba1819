"""Run under the launcher: train a tiny model in several ways and write what happened, for test_engine.py to compare.

engine_scenarios.py FOLDER; writes FOLDER/world{W}_rank{R}.pt
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import BertConfig, BertForMaskedLM

import sctd_ds
from sctd_ds.engine.ranks import init_distributed
from sctd_ds.engine.step import NonFiniteLossError
from sctd_ds.integrations.export import full_precision_state

STEPS, BATCH, LENGTH, VOCABULARY = 7, 8, 16, 64


def make(world, *, accumulation=2, zero=2, bf16=False, fp16=None, **method):
    """fp16: exponent of the first loss scale."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0)  # fmt: skip
    model = BertForMaskedLM(config)
    settings = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": zero},
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000000,
        "sctd": {"interval": 3, "keep_token_ids": [1, 2, 3, 4], "labels_per_row": 3, **method},
    }
    if bf16:
        settings["bf16"] = {"enabled": True}
    if fp16 is not None:
        # torch computes in fp16 on a CPU too; DeepSpeed does not offer it there because it is slow.
        accelerator = get_accelerator()
        accelerator.is_fp16_supported = lambda: True
        accelerator.supported_dtypes = lambda: [torch.float, torch.bfloat16, torch.half]
        settings["fp16"] = {"enabled": True, "initial_scale_power": fp16}
    engine, *_ = sctd_ds.initialize(model=model, model_parameters=model.parameters(), config=settings)
    return engine


def micro_batches(engine, world, rank):
    """The same global batches for every split: micro-batch j of rank r is rows [(j * world + r) * m, ... + m)."""
    generator = torch.Generator().manual_seed(7)
    m = engine.train_micro_batch_size_per_gpu()
    while True:
        # A skewed language: something to learn in a few steps.
        ids = 5 + (torch.rand(BATCH, LENGTH, generator=generator) ** 4 * (VOCABULARY - 5)).long()
        labels = torch.full_like(ids, -100)
        places = torch.rand(BATCH, LENGTH, generator=generator).argsort(1)[:, :3]
        labels.scatter_(1, places, ids.gather(1, places))
        ids.scatter_(1, places, 4)
        for j in range(engine.gradient_accumulation_steps()):
            rows = slice((j * world + rank) * m, (j * world + rank + 1) * m)
            yield {"input_ids": ids[rows], "labels": labels[rows]}


def train(engine, steps=STEPS):
    world, rank = dist.get_world_size(), dist.get_rank()
    batches = micro_batches(engine, world, rank)
    history = []
    for _ in range(steps):
        kind = engine.step_mode
        history.append((kind, engine.train_batch(batches)))
    return {
        "kinds": [kind for kind, _ in history],
        "losses": torch.tensor([loss for _, loss in history]),
        "scores": sctd_ds.importance(engine.module).scores.clone(),
        "weights": {name: p.detach().float().clone() for name, p in engine.module.named_parameters()},
        "applied": engine.applied_steps,
    }


def by_hand(engine):
    """The loop of a recipe: forward, backward, step."""
    batches = micro_batches(engine, dist.get_world_size(), dist.get_rank())
    for _ in range(STEPS * engine.gradient_accumulation_steps()):
        output = engine(**next(batches))
        engine.backward(output.loss)
        engine.step()
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def overflow(engine):
    """One step whose gradients overflow, as the fp16 optimizer reports it: nothing may change, and the step is retried."""
    optimizer, batches = engine.optimizer, micro_batches(engine, dist.get_world_size(), dist.get_rank())
    for _ in range(2):
        engine.train_batch(batches)
    before = sctd_ds.importance(engine.module).scores.clone()
    weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.eval()  # train_batch is for training, whatever came before
    step, optimizer.step = optimizer.step, lambda: setattr(optimizer, "overflow", True)
    kind = engine.step_mode
    engine.train_batch(batches)
    same = all(torch.equal(weights[name], p) for name, p in engine.module.named_parameters())
    result = {
        "applied": engine.applied_steps, "kind": kind, "kind_after": engine.step_mode, "weights_same": same,
        "scores_same": torch.equal(before, sctd_ds.importance(engine.module).scores),
    }  # fmt: skip
    optimizer.step = step
    engine.train_batch(batches)
    return {**result, "applied_after": engine.applied_steps}


def real_overflow(world, folder):
    """fp16 with a loss scale far too high: steps are skipped until it fits, then training goes on, also from a checkpoint."""
    engine = make(world, fp16=28)
    batches = micro_batches(engine, world, dist.get_rank())
    weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.train_batch(batches)
    first = {
        "skipped": engine.skipped_steps, "applied": engine.applied_steps,
        "weights_same": all(torch.equal(weights[name], p) for name, p in engine.module.named_parameters()),
        "scores_same": bool((sctd_ds.importance(engine.module).scores[5:] == 10).all()),
    }  # fmt: skip
    tried, losses = [], []
    while engine.applied_steps < STEPS and len(tried) < 40:
        tried.append((engine.applied_steps, engine.step_mode))
        losses.append(engine.train_batch(batches))
    engine.save_checkpoint(str(folder), tag="fp16")
    other = make(world, fp16=28)
    other.load_checkpoint(str(folder), tag="fp16")
    scales = [e._get_optimizer_loss_scale() for e in (engine, other)]
    went_on, resumed = train(engine, 3), train(other, 3)
    return {"first": first, "tried": tried, "losses": losses, "scales": scales, "went_on": went_on, "resumed": resumed}


def master_weights(engine):
    """What an export gets out of a bf16 run: the optimizer's fp32 weights, of which the model's are the rounding."""
    train(engine, 2)
    state, model = full_precision_state(engine), engine.module.state_dict()
    return {
        "fp32": all(value.dtype == torch.float32 for value in state.values()),
        "rounds_to_the_model": all(torch.equal(state[name].bfloat16(), model[name]) for name in model),
        "finer_than_the_model": any(not torch.equal(state[name], model[name].float()) for name in model),
    }


def poisoned(engine):
    """A NaN in one weight's gradient path on the last rank only: every rank must stop before its weights change."""
    batches = micro_batches(engine, dist.get_world_size(), dist.get_rank())
    engine.train_batch(batches)
    weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    if dist.get_rank() == dist.get_world_size() - 1:
        engine.module.cls.predictions.transform.LayerNorm.register_forward_hook(
            lambda module, inputs, output: output * torch.nan
        )
    try:
        engine.train_batch(batches)
    except NonFiniteLossError as error:
        same = all(torch.equal(weights[name], p) for name, p in engine.module.named_parameters())
        finite = bool(torch.isfinite(sctd_ds.importance(engine.module).scores).all())
        return {"step": error.step, "here": error.here, "weights_same": same, "scores_finite": finite}
    return {}


def main():
    folder = Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank")))
    init_distributed()
    world, rank = dist.get_world_size(), dist.get_rank()
    results = {f"zero{stage}": train(make(world, zero=stage)) for stage in (0, 1, 2)}
    results["accumulation1"] = train(make(world, accumulation=1))
    results["accumulation4"] = train(make(world, accumulation=4))
    results["spread"] = train(make(world, align_schedule="spread"))
    results["random"] = train(make(world, importance="random"))
    results["frequency"] = train(make(world, importance="frequency"))
    results["dense"] = train(make(world, method="dense"))
    results["bf16"] = train(make(world, bf16=True))
    results["by_hand"] = by_hand(make(world))
    results["overflow"] = overflow(make(world))
    results["fp16"] = real_overflow(world, folder / f"fp16_{world}")
    results["master_weights"] = master_weights(make(world, bf16=True))
    results["poisoned"] = poisoned(make(world))
    engine = make(world)
    train(engine, 4)
    engine.save_checkpoint(str(folder / f"checkpoint{world}"), client_state={"mine": 5})
    other = make(world)
    path, client = other.load_checkpoint(str(folder / f"checkpoint{world}"))
    results["loaded"] = {
        "client": client.get("mine"), "ours_hidden": "sctd" not in client, "applied": other.applied_steps, "found": bool(path),
        "scores_same": torch.equal(sctd_ds.importance(other.module).scores, sctd_ds.importance(engine.module).scores),
        "kind": other.step_mode,
    }  # fmt: skip
    sctd_ds.export(other, folder / f"exported{world}")
    torch.save(results, folder / f"world{world}_rank{rank}.pt")


main()
