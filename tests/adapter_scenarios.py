"""Run under the launcher: three real steps of every family at ZeRO 1 and 2, and engines and checkpoints mixed.

adapter_scenarios.py FOLDER; writes FOLDER/results.json for test_adapters.py.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from families import FAMILIES, KEPT_IDS, PAD, build, rows

import sctd_ds
from sctd_ds.engine.ranks import init_distributed

METHOD = {"interval": 2, "keep_token_ids": KEPT_IDS, "kl_weight": 4.0}


def settings(stage, **blocks):
    return {
        "train_batch_size": 3,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000000,
        **blocks,
    }


def steps(family, engine, count=3):
    """The recipe's own loop; what each step did, returned, and lost."""
    seen = {"modes": [], "types": [], "losses": []}
    for step in range(count):
        batch = rows(seed=step)
        args, kwargs = family.arguments(batch)
        seen["modes"].append(engine.step_mode)
        output = engine(*args, **kwargs)
        loss = family.loss(output, batch)
        engine.backward(loss)
        engine.step()
        seen["types"].append(type(output).__name__)
        seen["losses"].append(loss.item())
    return seen


def train(family, stage):
    model = build(family).float()
    keys = list(model.state_dict())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine, *_ = sctd_ds.initialize(model=model, model_parameters=model.parameters(), config=settings(stage, sctd=METHOD))
    seen = steps(family, engine)
    scores = sctd_ds.importance(engine).scores
    reached = trained(family, model)
    seen["changed"] = not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in reached)
    seen["table_learned"] = bool((scores[PAD + 5 :] != 10.0).any())
    seen["same_keys"] = list(engine.module.state_dict()) == keys
    return seen


def trained(family, model):
    """Parameters that the loss reaches: not poolers without a loss of theirs, and what a recipe has but never uses."""
    names = [name for name, _ in model.named_parameters()]
    unused = [name for name in names if "bert.pooler" in name and "cls.seq_relationship.weight" not in names]
    if family.name == "academic-budget pre-ln sparse":
        unused.append("cls.predictions.bias")
    if family.name == "academic-budget post-ln":
        unused += ["bert.encoder.FinalLayerNorm.weight", "bert.encoder.FinalLayerNorm.bias"]
    if family.name == "HelloDeepSpeed":
        unused += [
            "lm_head.bias",
            *(name for name in names if "pooler" in name),
        ]  # transformers 5: the decoder has its own bias
    return set(names) - set(unused)


def mixed(folder):
    bert = FAMILIES[0]

    def dense_engine():
        model = build(bert).float()
        return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings(2))[0]

    def our_engine():
        model = build(bert).float()
        return sctd_ds.initialize(model=model, model_parameters=model.parameters(), config=settings(2), sctd_config=METHOD)[0]

    ours = our_engine()
    initialized = steps(bert, ours)["losses"]

    late = dense_engine()
    sctd_ds.convert(late, sctd_ds.ScTDConfig(**METHOD))
    result = {"initialized": initialized, "engine": type(late).__name__, "converted_after": steps(bert, late)["losses"]}

    twice = our_engine()
    result["again"] = steps(bert, sctd_ds.convert(twice, sctd_ds.ScTDConfig(**METHOD)))["losses"]

    model = build(bert).float()
    no_decay = [p for name, p in model.named_parameters() if name.endswith("bias")]
    decay = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": no_decay, "weight_decay": 0.01}]
    grouped = sctd_ds.initialize(model=model, model_parameters=groups, config=settings(2), sctd_config=METHOD)[0]
    result["groups"] = steps(bert, grouped)["losses"]

    dense = dense_engine()
    dense.save_checkpoint(str(folder / "dense"), tag="t", client_state={"epoch": 3})
    ours.save_checkpoint(str(folder / "ours"), tag="t")
    into_ours, into_dense = our_engine(), dense_engine()
    path, client = into_ours.load_checkpoint(str(folder / "dense"), tag="t")
    result["dense_into_ours"] = bool(path) and client.get("epoch") == 3 and same(into_ours, dense)
    path, _ = into_dense.load_checkpoint(str(folder / "ours"), tag="t")
    result["ours_into_dense"] = bool(path) and same(into_dense, ours)
    try:
        sctd_ds.revert(into_ours)
    except ValueError as error:
        result["revert"] = str(error)
    return result


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True))


def main():
    folder = Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank")))
    init_distributed()
    families = {f"{family.name} zero{stage}": train(family, stage) for family in FAMILIES for stage in (1, 2)}
    (folder / "results.json").write_text(json.dumps({"families": families, "mixed": mixed(folder)}))


main()
