"""Run under the launcher: pipelines of a tiny model in several ways, for test_pipeline.py to compare.

pipeline_scenarios.py FOLDER; writes FOLDER/world{W}_rank{R}.pt
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

import sctd_ds
from sctd_ds.engine import checkpoint
from sctd_ds.engine.pipeline import Pipeline
from sctd_ds.engine.ranks import init_distributed
from sctd_ds.engine.step import NonFiniteLossError
from sctd_ds.run.validation import validate

LAYERS, ROWS, LENGTH, VOCABULARY, LABELS, STAGES = 8, 12, 16, 64, 3, 2
METHOD = {"interval": 3, "kl_weight": 5.0, "keep_token_ids": [1, 2, 3, 4], "labels_per_row": LABELS}
# Of 8 layers, counted from 0: 0-2 full, 3 cross, 4-6 kept, 7 last.
BOUNDARIES = {"in_full": 2, "before_cross": 3, "after_cross": 4, "in_kept": 5, "before_last": 7}


def make_model(method):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0, initializer_range=0.15)  # fmt: skip
    return sctd_ds.convert(BertForMaskedLM(config), sctd_ds.ScTDConfig(**{**METHOD, **method}))


def settings(optimizer, accumulation, **more):
    return {
        "train_batch_size": ROWS, "gradient_accumulation_steps": accumulation, "optimizer": optimizer,
        "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True, "steps_per_print": 1000000000, **more,
    }  # fmt: skip


RATE = 0.02
SGD = {"type": "SGD", "params": {"lr": RATE}}
ADAM = {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}}


def make_pipeline(boundary=None, optimizer=ADAM, accumulation=3, more=None, **method):
    pipeline = Pipeline(make_model(method), stages=STAGES, boundaries=None if boundary is None else [boundary])
    more = {"gradient_clipping": 1.0} if more is None else more
    engine, *_ = sctd_ds.initialize(model=pipeline, model_parameters=pipeline.parameters(),
                                    config=settings(optimizer, accumulation, **more))  # fmt: skip
    return engine


def make_data_parallel(accumulation, **method):
    model = make_model(method)
    config = settings(ADAM, accumulation, gradient_clipping=1.0, zero_optimization={"stage": 2})
    engine, *_ = sctd_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def micro_batches(count, world=1, rank=0):
    """The same batches of ROWS rows for every split into `count` micro-batches; the second micro-batch has padded rows."""
    generator, m = torch.Generator().manual_seed(7), ROWS // (count * world)
    while True:
        ids = 5 + (torch.rand(ROWS, LENGTH, generator=generator) ** 4 * (VOCABULARY - 5)).long()
        labels = torch.full_like(ids, -100)
        places = torch.rand(ROWS, LENGTH - 6, generator=generator).argsort(1)[:, :LABELS]
        labels.scatter_(1, places, ids.gather(1, places))
        ids.scatter_(1, places, 4)
        mask = torch.ones_like(ids)
        mask[ROWS // 3 : ROWS // 2, -6:] = 0
        for j in range(count):
            rows = slice((j * world + rank) * m, (j * world + rank + 1) * m)
            batch = {"input_ids": ids[rows], "labels": labels[rows]}
            yield batch if mask[rows].all() else {**batch, "attention_mask": mask[rows]}


def own_batches(engine):
    """The micro-batches of this rank's pipeline, or of this data-parallel rank."""
    return micro_batches(engine.gradient_accumulation_steps(), engine.dp_world_size, engine.mpu.get_data_parallel_rank()
                         if engine.mpu else dist.get_rank())  # fmt: skip


def weights(engine):
    """This stage's weights under the model's names."""
    return {n: p.detach().clone() for n, p in engine.module.plain_model.state_dict().items() if not p.is_meta}


def against_plain_model(boundary, kinds, accumulation=3, **method):
    """Steps of plain SGD, here and on the model without pipeline or DeepSpeed: the largest differences seen."""
    engine = make_pipeline(boundary, SGD, accumulation, {"gradient_clipping": 0.0}, **method)
    replicas = engine.dp_world_size
    plain = make_model(method).train()
    ours, theirs = own_batches(engine), micro_batches(accumulation * replicas)
    loss_gap = weight_gap = moved = 0.0
    for step, kind in enumerate(kinds, 1):
        engine.forced_mode = kind
        loss = engine.train_batch(ours)
        plain.zero_grad()
        sctd_ds.set_mode(plain, kind, step)
        total = sum(plain(**next(theirs)).loss for _ in range(accumulation * replicas)) / (accumulation * replicas)
        total.backward()
        sctd_ds.importance(plain).update(dist.new_group([dist.get_rank()], use_local_synchronization=True))
        loss_gap = max(loss_gap, abs(loss - total.item()))
        expected = dict(plain.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            moved = max(moved, *(RATE * p.grad.abs().max().item() for p in plain.parameters()))
            for p in plain.parameters():
                p -= RATE * p.grad
            weight_gap = max(weight_gap, *((w - expected[n]).abs().max().item() for n, w in weights(engine).items()))
    same = torch.allclose(sctd_ds.importance(engine.module).scores, sctd_ds.importance(plain).scores, rtol=1e-5)
    return {"loss_gap": loss_gap, "weight_gap": weight_gap, "moved": moved, "scores_same": same}


def train(engine, steps, start=0):
    batches = own_batches(engine)
    for _ in range(start * engine.gradient_accumulation_steps()):
        next(batches)
    return torch.tensor([engine.train_batch(batches) for _ in range(steps)])


def poisoned(engine):
    """A NaN in the head: every rank of every stage must stop before its weights change."""
    batches = own_batches(engine)
    engine.train_batch(batches)
    before = weights(engine)
    if engine.module.head is not None:
        engine.module.plain_model.cls.predictions.transform.register_forward_hook(lambda *call: call[-1] * torch.nan)
    try:
        engine.train_batch(batches)
    except NonFiniteLossError as error:
        same = all(torch.equal(before[name], value) for name, value in weights(engine).items())
        return {"step": error.step, "here": bool(error.here), "weights_same": same}
    return {}


def errors():
    """What is refused, in the words of the message."""
    pipeline, seen = Pipeline(make_model({}), stages=STAGES), {}
    attempts = {
        "stages": lambda: Pipeline(make_model({}), stages=LAYERS + 1),
        "boundaries": lambda: Pipeline(make_model({}), stages=STAGES, boundaries=[LAYERS]),
        "zero": lambda: make_pipeline(more={"zero_optimization": {"stage": 0}}),
        "block": lambda: sctd_ds.initialize(model=pipeline, config=settings(ADAM, 1, sctd={"interval": 7})),
        "family": lambda: Pipeline(RobertaForMaskedLM(RobertaConfig(num_hidden_layers=4, hidden_size=16, intermediate_size=16,
                                                                    num_attention_heads=2)), stages=STAGES),
    }  # fmt: skip
    for name, attempt in attempts.items():
        try:
            attempt()
        except sctd_ds.ConfigError as error:
            seen[name] = str(error)
    engine, shapes = make_pipeline(accumulation=2), iter([LENGTH, LENGTH // 2])
    batch = next(own_batches(engine))
    try:
        engine.train_batch({key: value[:, :length] for key, value in batch.items()} for length in shapes)
    except ValueError as error:
        seen["shapes"] = str(error)
    return seen


def main():
    folder = Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank")))
    init_distributed()
    world, rank = dist.get_world_size(), dist.get_rank()
    results, steps = {}, 40 if world == STAGES else 12
    held_out = next(micro_batches(1))
    # Before any pipeline: DeepSpeed keeps the grid of the last one, and refuses an engine without.
    other = make_data_parallel(3)
    losses = train(other, 4)
    other.save_checkpoint(str(folder / f"data_parallel{world}"), client_state={"position": 4 * ROWS})
    losses = torch.cat([losses, train(other, steps - 4, start=4)])
    rows = slice(None) if rank % (world // STAGES) == 0 else slice(0, 2)
    results["data_parallel"] = {
        "losses": losses, "scores": sctd_ds.importance(other.module).scores.clone(),
        "validation": validate(other, [{k: v[rows] for k, v in held_out.items()}] * 2),
        "norm": float(other.get_global_grad_norm()),
    }  # fmt: skip
    from_pipeline = folder / "checkpoint2" / "global_step4"
    if from_pipeline.exists():  # of the launch with two ranks
        other = make_data_parallel(3)
        position = checkpoint.restore(other, from_pipeline)
        results["from_pipeline"] = {"position": position, "losses": train(other, 4, start=4)}
    kinds = ["drop", "align", "drop", "dense"]
    cases = {"in_full": {"boundary": 2}, "spread_5": {"boundary": 5, "align_schedule": "spread", "interval": 2}}
    if world == STAGES:  # replicas bring nothing new to these
        cases.update({name: {"boundary": boundary} for name, boundary in BOUNDARIES.items()})
        cases["spread_2"] = {**cases["spread_5"], "boundary": 2}
        cases["two_prefixes"] = {"boundary": 2, "shared_prefix": False}
        cases["recomputed"] = {"boundary": 5, "recompute_align": True}
        cases["dense"] = {"boundary": 4, "method": "dense", "kinds": ["dense"] * 3}
    for name, case in cases.items():
        results[name] = against_plain_model(**{"kinds": kinds, **case})

    engine = make_pipeline()
    losses = train(engine, steps)
    rows = slice(None) if engine.mpu.get_data_parallel_rank() == 0 else slice(0, 2)
    results["run"] = {
        "losses": losses, "scores": sctd_ds.importance(engine.module).scores.clone(), "weights": weights(engine),
        "parts": engine.module.parts, "validation": validate(engine, [{k: v[rows] for k, v in held_out.items()}] * 2),
        "norm": float(engine.get_global_grad_norm()),
    }  # fmt: skip
    sctd_ds.export(engine, folder / f"exported{world}")
    if world == STAGES:
        results["random"] = train(make_pipeline(importance="random"), 12)
        results["bf16"] = train(make_pipeline(more={"bf16": {"enabled": True}, "gradient_clipping": 1.0}), 12)
        results["errors"] = errors()
    results["poisoned"] = poisoned(make_pipeline())

    engine = make_pipeline()
    train(engine, 4)
    engine.save_checkpoint(str(folder / f"checkpoint{world}"), client_state={"position": 4 * ROWS})
    on = train(engine, 4, start=4)
    again = make_pipeline()
    _, client = again.load_checkpoint(str(folder / f"checkpoint{world}"))
    results["loaded"] = {
        "position": client["position"], "applied": again.applied_steps,
        "losses": torch.equal(train(again, 4, start=4), on),
        "weights": all(torch.equal(a, b) for a, b in zip(weights(engine).values(), weights(again).values(), strict=True)),
        "scores": torch.equal(sctd_ds.importance(engine.module).scores, sctd_ds.importance(again.module).scores),
    }  # fmt: skip
    other = make_pipeline()
    position = checkpoint.restore(other, folder / f"data_parallel{world}" / "global_step4")
    results["from_data_parallel"] = {"position": position, "losses": train(other, 4, start=4)}
    torch.save(copy.deepcopy(results), folder / f"world{world}_rank{rank}.pt")


main()
