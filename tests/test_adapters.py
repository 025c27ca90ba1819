"""Every family against a walk through its own layers in float64, and what a recipe's user counts on."""

import copy
import functools
import json
import math
from dataclasses import replace

import deepspeed
import pytest
import sctd_kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertLMHeadModel

import sctd_ds
from helpers import oracle
from helpers.families import FAMILIES, KEPT_IDS, LENGTH, PAD, SEP, VOCABULARY, Family, Rows, build, rows
from helpers.recipe_models import BertModel
from sctd_ds.adapters import ADAPTERS
from sctd_ds.adapters.huggingface import BertAdapter

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
HUGGING_FACE = [family for family in FAMILIES if family.hugging_face]


def by_name(families: list[Family]):
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name)


every_family = by_name(FAMILIES)


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def table() -> Tensor:
    scores = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(1)) * 8 + 1
    scores[KEPT_IDS] = oracle.ALWAYS_KEPT
    return scores


# The walk: one sequence at a time, real tokens only, each pass from the embeddings on, nothing from sctd_ds


def walk(family: Family, model: nn.Module, x: Tensor, kept: list[int] | None) -> tuple[Tensor, Tensor]:
    """Finished states [n, d] of layers l-1 (the kept tokens') and l. kept: None for the full pass."""
    count = len(family.layers(model))
    positions = torch.arange(x.shape[1])
    previous = x
    for index in range(count):
        if kept is not None and index == count // 2 - 1:  # cross: the layer on all tokens, of which the kept ones stay
            dropped, x, positions = x, family.layer(model, index, x, positions)[:, kept], torch.tensor(kept)
        elif kept is not None and index == count - 1:
            previous, merged = x, dropped.clone()
            merged[:, kept] = x
            x = family.layer(model, index, merged, torch.arange(merged.shape[1]))
        else:
            previous, x = x, family.layer(model, index, x, positions)
    return family.finish(model, previous)[0], family.finish(model, x)[0]


def expected(family: Family, model: nn.Module, batch: Rows, mode: str, kl_weight: float = 4.0):
    """Loss and every parameter's gradient of one micro-batch (Eq. 1-4), and the sum of the KLs."""
    model = copy.deepcopy(model)
    losses, kl, sentence = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), []
    for row, count in enumerate(batch.real):
        ids, labels = batch.ids[row, :count], batch.labels[row, :count]

        def embedded(row=row, ids=ids):
            return family.embed(model, ids[None], batch.types[row : row + 1, : len(ids)])

        def cross_entropy(states, labels=labels):
            return F.cross_entropy(family.logits(model, states[None])[0], labels, ignore_index=-100, reduction="sum")

        kept = None
        if mode != "dense":
            kept = oracle.select(table().tolist(), ids.tolist(), range(count), oracle.kept_count(LENGTH, 0.5))
        learned = walk(family, model, embedded(), kept)
        loss = cross_entropy(learned[1])
        if mode == "align":
            full = walk(family, model, embedded(), None)
            loss = loss / 2 + cross_entropy(full[1]) / 2
            kl = kl + oracle.sequence_divergence(full, learned, oracle.Method())
        losses = losses + loss
        scores = family.sentence_scores(model, learned[1][None, :1])
        if scores is not None:
            sentence.append(F.cross_entropy(scores, batch.sentence[row : row + 1]))
    labelled = (batch.labels != -100).sum()
    total = losses / labelled + kl_weight * kl / labelled
    if sentence:
        total = total + torch.stack(sentence).mean()
    total.backward()
    return total, {name: p.grad for name, p in model.named_parameters()}, kl


def moved(batch: Rows, device: torch.device | str) -> Rows:
    return replace(batch, **{name: getattr(batch, name).to(device) for name in ("ids", "labels", "types", "sentence")})


def converted(model: nn.Module, mode: str, **settings) -> nn.Module:
    sctd_ds.convert(model, sctd_ds.ScTDConfig(keep_token_ids=KEPT_IDS, kl_weight=4.0, **settings))
    sctd_ds.importance(model).scores.copy_(table())
    sctd_ds.set_mode(model, mode)
    return model


def assert_as_expected(family: Family, model: nn.Module, batch: Rows, mode: str) -> None:
    args, kwargs = family.arguments(batch)
    loss = family.loss(model(*args, **kwargs), batch)
    loss.backward()
    assert_same(model, loss, expected(family, model, batch, mode), family.tolerance)


def assert_same(model: nn.Module, loss: Tensor, wanted: tuple, tolerance: float) -> None:
    total, gradients, _ = wanted
    assert loss.item() == pytest.approx(total.item(), rel=tolerance)
    largest = max(g.abs().max().item() for g in gradients.values() if g is not None)
    for name, parameter in model.named_parameters():
        want = torch.zeros_like(parameter) if gradients[name] is None else gradients[name]
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            got.cpu().double(),
            want.cpu().double(),
            rtol=tolerance,
            atol=tolerance * largest,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@every_family
def test_the_walk_is_the_model_itself(family):
    """The dense walk is the untouched model's own loss; and its passes differ, so that taking one for another shows."""
    model, batch = build(family), rows()
    args, kwargs = family.arguments(batch)
    dense, _, _ = expected(family, model, batch, "dense")
    assert family.loss(model(*args, **kwargs), batch).item() == pytest.approx(dense.item(), rel=family.tolerance)
    drop, _, _ = expected(family, model, batch, "drop")
    align, _, kl = expected(family, model, batch, "align")
    assert min(abs(dense - drop), abs(drop - align), abs(dense - align), kl) > 100 * family.tolerance * abs(dense)


@pytest.mark.parametrize("real", [(17, 9, 13), (17, 17), (17, 4, 3)], ids=["padded", "full", "fewer-than-kept"])
@pytest.mark.parametrize("mode", ["dense", "drop", "align"])
@every_family
def test_loss_and_gradients(family, mode, real):
    assert_as_expected(family, converted(build(family), mode), rows(real), mode)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@every_family
def test_single_precision(family, device):
    """On a GPU this is the path through the Triton kernels, with Megatron's transposed states, too."""
    model, batch = converted(build(family), "align"), rows()
    wanted = expected(family, model, batch, "align")
    model.float().to(device)
    batch = moved(batch, device)
    args, kwargs = family.arguments(batch)
    loss = family.loss(model(*args, **kwargs), batch)
    loss.backward()
    assert_same(model, loss, wanted, 2e-3)


@every_family
def test_separate_prefixes_and_the_spread_schedule_change_nothing_they_should_not(family):
    model = converted(build(family), "align", shared_prefix=False, align_schedule="spread", interval=1)
    sctd_ds.set_mode(model, "align", step=3)
    assert_as_expected(family, model, rows(), "align")


@pytest.mark.parametrize("document_mask", [SEP, False])
@every_family
def test_attention_stays_within_documents(family, document_mask):
    """What stands in the second document changes the loss of the first one's labels only where they are not kept apart."""
    model = converted(build(family), "align", document_mask=document_mask)
    sctd_ds.importance(model).scores.masked_fill_(table() < oracle.ALWAYS_KEPT, 10.0)  # the same places are kept of both
    losses = []
    for word in (7, 8):
        batch = rows((17, 17))
        batch.ids[:, 8], batch.ids[:, 9:16], batch.labels[:, 8:] = SEP, word, -100
        args, kwargs = family.arguments(batch)
        losses.append(family.loss(model(*args, **kwargs), batch).item())
    assert (losses[1] == pytest.approx(losses[0], rel=family.tolerance)) == (document_mask == SEP)


@by_name([family for family in HUGGING_FACE if family.name != "ModernBertForMaskedLM"])
def test_untied_heads(family):
    model = build(family, tie_word_embeddings=False)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert_as_expected(family, converted(model, "align"), rows(), "align")


@by_name([*(family for family in HUGGING_FACE if family.name.startswith(("Bert", "Roberta"))), family_named("HelloDeepSpeed")])
def test_one_pass_backward(family, monkeypatch):
    monkeypatch.setattr(BertAdapter, "one_pass_backward", True)
    called = []
    for name in ("linear_gelu", "layer_norm"):
        function = getattr(sctd_kernels, name)
        monkeypatch.setattr(
            sctd_kernels, name, lambda *given, name=name, function=function: called.append(name) or function(*given)
        )
    model = converted(build(family), "align")
    assert_as_expected(family, model, rows(), "align")
    assert called.count("layer_norm") == 2 * called.count("linear_gelu") > 2 * len(family.layers(model))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@by_name([*HUGGING_FACE, family_named("HelloDeepSpeed")])
def test_gradient_checkpointing(family, reentrant):
    model = converted(build(family), "align")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_as_expected(family, model, rows(), "align")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations(attention):
    family = family_named("RobertaForMaskedLM")
    model = build(family, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert_as_expected(family, converted(model, "align"), rows(), "align")


def test_a_sentence_without_label_has_no_sentence_loss():
    """bing_bert ignores -1 there too, in the mean."""
    family = family_named("bing_bert")
    batch = rows()
    (items,), kwargs = family.arguments(batch)
    losses = []
    for labels in (torch.tensor([0, 1, 0]), torch.tensor([0, 1, -1])):
        batch = (*items[:4], labels, items[5])
        loss = converted(build(family), "dense")(batch, **kwargs).item()
        assert loss == pytest.approx(build(family)(batch).item(), rel=1e-9)
        losses.append(loss)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


# What conversion leaves alone


@every_family
def test_evaluation_and_state_dict_are_untouched(family):
    plain, model, batch = build(family), build(family), rows()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    converted(model, "align")
    args, kwargs = family.arguments(batch)
    family.loss(model(*args, **kwargs), batch).backward()  # a training step in between leaves no trace
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    with torch.no_grad():
        outputs, expected = (family.eval_outputs(each.eval()(*args, **kwargs)) for each in (model, plain))
    assert len(outputs) == len(expected) and all(map(torch.equal, outputs, expected))


@every_family
def test_training_returns_the_models_own_type(family):
    args, kwargs = family.arguments(rows())
    plain = build(family)(*args, **kwargs)
    for mode in ("dense", "drop", "align"):
        output = converted(build(family), mode)(*args, **kwargs)
        assert type(output) is type(plain) and isinstance(output, family.returns)
        if isinstance(plain, tuple):
            assert [type(x) for x in output] == [type(x) for x in plain]
            assert [x.shape for x in output if isinstance(x, Tensor)] == [x.shape for x in plain if isinstance(x, Tensor)]


@every_family
def test_weights_travel_both_ways_with_strict_loading(family):
    dense, model = build(family), converted(build(family), "drop")
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(0.5)
    scores = sctd_ds.importance(model).scores.clone()
    model.load_state_dict(dense.state_dict(), strict=True)
    assert torch.equal(sctd_ds.importance(model).scores, scores)
    fresh = build(family)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), dense.parameters(), strict=True))


@by_name(HUGGING_FACE)
def test_a_saved_model_loads_as_the_plain_class(family, tmp_path):
    model = converted(build(family), "drop")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == [family.name]
    loaded, report = type(model).from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@by_name(HUGGING_FACE)
def test_positional_arguments_mean_what_they_mean_to_the_model(family):
    """DistilBERT's fourth argument is labels, BERT's is position_ids."""
    batch = rows((17, 17))
    _args, kwargs = family.arguments(batch)
    by_keyword = converted(build(family), "drop")(**kwargs).loss
    ids, mask = kwargs.pop("input_ids"), kwargs.pop("attention_mask")
    if family.name == "DistilBertForMaskedLM":
        loss = converted(build(family), "drop")(ids, mask, None, kwargs["labels"]).loss
    else:
        loss = converted(build(family), "drop")(ids, mask, **kwargs).loss
    assert torch.equal(loss, by_keyword)


def test_the_trainers_count_of_labels_replaces_the_batchs_own():
    """num_items_in_batch: the labels of the whole accumulated step, over which the Trainer wants the mean."""
    family, batch = family_named("BertForMaskedLM"), rows()
    _args, kwargs = family.arguments(batch)
    model = converted(build(family), "align")
    labelled = int((batch.labels != -100).sum())
    loss = model(**kwargs).loss
    assert model(**kwargs, num_items_in_batch=3 * labelled).loss.item() == pytest.approx(loss.item() / 3, rel=1e-12)
    assert model(**kwargs, num_items_in_batch=torch.tensor(labelled)).loss.item() == pytest.approx(loss.item(), rel=1e-12)


# Finding the family


def test_every_adapter_has_a_family_here_and_does_not_depend_on_the_tables_order():
    found = {type(sctd_ds.convert(build(family)).__dict__["_sctd"].adapter): family.name for family in FAMILIES}
    assert set(found) == set(ADAPTERS)
    for family in FAMILIES:
        matching = [adapter for adapter in ADAPTERS if adapter.matches(family.build())]
        assert len(matching) <= (2 if family.name == "bing_bert" else 1), (family.name, matching)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: nn.Linear(2, 2), ["Linear", "register_adapter"]),
        (lambda: BertForSequenceClassification(tiny()), ["nearest is BERT", "cls.predictions.decoder"]),
        (lambda: BertLMHeadModel(tiny()), ["BertLMHeadModel", "decoder"]),
        (lambda: BertForMaskedLM(tiny(is_decoder=True)), ["decoder"]),
        (lambda: object(), ["torch.nn.Module"]),
    ],
)
def test_an_unknown_model_gets_an_error_that_says_what_was_looked_for(model, words):
    with pytest.raises(ValueError) as error:
        sctd_ds.convert(model(), sctd_ds.ScTDConfig(keep_token_ids=[]))
    assert all(word in str(error.value) for word in words), error.value


def tiny(**settings) -> BertConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    return BertConfig(**{**sizes, **settings})


def test_a_fused_kernel_layer_is_refused_by_name():
    model = family_named("bing_bert").build()
    fused = type("DeepSpeedTransformerLayer", (nn.Module,), {})
    model.bert.encoder.layer = nn.ModuleList(fused() for _ in range(4))
    with pytest.raises(ValueError, match="--deepspeed_transformer_kernel"):
        sctd_ds.convert(model)


@pytest.fixture
def adapters():
    before = list(ADAPTERS)
    yield
    ADAPTERS[:] = before


def test_a_users_own_family(adapters):
    """As in docs/recipes.md: a user's model, whose layers are used as they are."""

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build(family_named("BertForMaskedLM"))

        def forward(self, tokens, targets):
            return {"my_loss": self.inner(input_ids=tokens, labels=targets).loss}

    @sctd_ds.register_adapter
    class MineAdapter(sctd_ds.Adapter):
        family = "Mine"
        parts = ("inner.bert.encoder", "inner.cls.predictions")

        def __init__(self, model):
            self.bert, self.cls = model.inner.bert, model.inner.cls
            self.layers = self.bert.encoder.layer
            self.vocabulary = model.inner.config.vocab_size

        def batch(self, args, kwargs):
            return sctd_ds.Batch(kwargs["tokens"], kwargs["targets"])

        def embed(self, batch):
            return self.bert.embeddings(input_ids=batch.input_ids)

        def layer(self, layer, queries, context, mask, *places):
            return layer(context, mask)

        def head(self, states):
            return self.cls(states)

        def output(self, loss, batch, first):
            return {"my_loss": loss}

    batch = rows((17, 17))
    expected = converted(build(family_named("BertForMaskedLM")), "align")(input_ids=batch.ids, labels=batch.labels).loss
    loss = converted(Mine(), "align")(tokens=batch.ids, targets=batch.labels)["my_loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_only_adapters_can_be_registered(adapters):
    with pytest.raises(ValueError, match=r"sctd_ds\.Adapter"):
        sctd_ds.register_adapter(dict)
    assert sctd_ds.register_adapter(BertAdapter) is BertAdapter
    assert ADAPTERS.count(BertAdapter) == 1


# Bad use


def refusal(family: Family, mode: str = "drop", **changes) -> str:
    """The message of the ValueError for a call whose keywords were changed."""
    args, kwargs = family.arguments(rows())
    model = converted(build(family), mode)
    with pytest.raises(ValueError) as error:
        model(*args, **{**kwargs, **changes})
    return str(error.value)


def test_calls_that_cannot_be_trained_on():
    bert, pretraining, hello = map(family_named, ("BertForMaskedLM", "BertForPreTraining", "HelloDeepSpeed"))
    assert "labels are missing" in refusal(bert, labels=None)
    assert "input_ids is missing" in refusal(bert, input_ids=None)
    assert "inputs_embeds" in refusal(bert, inputs_embeds=torch.zeros(3, LENGTH, 32))
    assert "output_hidden_states" in refusal(bert, output_hidden_states=True)
    assert "[rows, tokens]" in refusal(bert, input_ids=torch.zeros(LENGTH, dtype=torch.long))
    assert "plain padding mask" in refusal(bert, attention_mask=torch.ones(3, 1, LENGTH, LENGTH))
    assert "labels has shape (3, 2)" in refusal(bert, labels=torch.zeros(3, 2, dtype=torch.long))
    assert "next_sentence_label" in refusal(pretraining, next_sentence_label=None)
    assert "tgt_tokens are missing" in refusal(hello, tgt_tokens=None)
    assert "position_ids" in refusal(family_named("ModernBertForMaskedLM"), position_ids=torch.arange(LENGTH)[None])


def test_tuples_that_cannot_be_trained_on():
    family = family_named("bing_bert")
    (items,), _ = family.arguments(rows())
    model = converted(build(family), "drop")
    for batch, words in [
        (items[:4], "4 items"),
        ({"input_ids": items[1]}, "dict"),
        ((*items[:5], None), "masked_lm_labels are missing"),
        ((*items[:4], None, items[5]), "next_sentence_label is missing"),
    ]:
        with pytest.raises(ValueError, match=words):
            model(batch)
    with pytest.raises(ValueError, match="progressive_layer_drop"):
        model(items, progressive_layer_drop=True)


@pytest.mark.parametrize("mode", ["dense", "drop", "align"])
def test_labels_with_another_ignore_value(mode):
    batch = rows()
    minus_one = torch.where(batch.labels == -100, -1, batch.labels)
    assert "this model ignores -100" in refusal(family_named("BertForMaskedLM"), mode, labels=minus_one)
    too_high = torch.where(batch.labels == -100, -100, VOCABULARY)
    assert f"from 0 to {VOCABULARY - 1}" in refusal(family_named("BertForMaskedLM"), mode, labels=too_high)
    assert "every token has a label" in refusal(family_named("BertForMaskedLM"), mode, labels=batch.ids)
    assert f"ignores {PAD}" in refusal(family_named("HelloDeepSpeed"), mode, tgt_tokens=batch.labels)


def test_a_frozen_encoder_is_refused_before_and_after_conversion():
    family = family_named("BertForMaskedLM")
    model = build(family)
    model.bert.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable"):
        sctd_ds.convert(model)
    model.bert.encoder.layer[5].requires_grad_(True)  # fine-tuning the top is training
    converted(model, "drop")
    model.bert.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable"):
        model(**family.arguments(rows())[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: setattr(model.config, "sequence_parallel", True), "sequence_parallel"),
        (lambda model: setattr(model, "pre_process", False), "pipeline"),
        (lambda model: setattr(model.language_model.embedding.word_embeddings, "num_embeddings", 122), "tensor model"),
        (lambda model: setattr(model.language_model, "use_rotary_position_embeddings", True), "rotary"),
        (lambda model: setattr(model.language_model.encoder.layers[1].mlp, "deepspeed_moe", True), "experts"),
    ],
)
def test_megatrons_parallel_modes_are_refused(change, words):
    model = family_named("Megatron with sentence head").build()
    assert isinstance(model, BertModel)
    change(model)
    with pytest.raises(ValueError, match=words):
        sctd_ds.convert(model)


@pytest.mark.parametrize(
    ("config", "words"),
    [({"zero_optimization": {"stage": 3}}, "stage=3"), ({"sequence_parallel_size": 2}, "sequence_parallel_size=2")],
)
def test_what_splits_parameters_or_rows_is_refused_by_name(config, words):
    model = build(family_named("BertForMaskedLM"))
    with pytest.raises(ValueError, match=words):
        sctd_ds.initialize(model=model, config={"train_batch_size": 2, "sctd": {}, **config})
    assert "forward" not in vars(model)  # refused before anything was changed


def test_zero_spelt_as_a_bare_true_is_read_as_deepspeed_reads_it():
    model = build(family_named("BertForMaskedLM")).float()
    optimizer = {"type": "Adam", "params": {"torch_adam": True}}
    config = {"train_batch_size": 2, "zero_optimization": True, "optimizer": optimizer, "sctd": {"keep_token_ids": KEPT_IDS}}
    engine, *_ = sctd_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    assert engine.zero_optimization_stage() == 1 and type(engine).__name__ == "ScTDEngine"


@pytest.mark.parametrize(
    ("vocabulary", "ids"), [(30522, [100, 101, 102, 103]), (30528, [100, 101, 102, 103]), (50265, [0, 2, 3, 50264]), (61, [])]
)
def test_special_tokens_of_released_vocabularies_are_known_by_their_size(vocabulary, ids, caplog):
    model = sctd_ds.convert(BertForMaskedLM(tiny(vocab_size=vocabulary)))
    assert (sctd_ds.importance(model).scores == oracle.ALWAYS_KEPT).nonzero().flatten().tolist() == ids
    assert ("none is pinned" in caplog.text) == (not ids)


# Mixed use


def test_converting_twice_replaces_the_settings_and_keeps_the_table():
    family = family_named("BertForMaskedLM")
    model = converted(build(family), "drop", interval=3)
    forward = model.forward
    sctd_ds.convert(model, sctd_ds.ScTDConfig(interval=7, keep_token_ids=KEPT_IDS, kl_weight=4.0))
    assert model.forward == forward
    assert torch.equal(sctd_ds.importance(model).scores, table())
    sctd_ds.set_mode(model, "align")
    assert_as_expected(family, model, rows(), "align")


def test_converting_again_keeps_a_wrapped_forward_and_reverting_refuses_to_lose_it():
    """Accelerate puts autocast around the forward of the object."""
    model = converted(build(family_named("BertForMaskedLM")), "drop")
    forward, calls = model.forward, []
    model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    sctd_ds.convert(model, sctd_ds.ScTDConfig(keep_token_ids=KEPT_IDS))
    model(**family_named("BertForMaskedLM").arguments(rows())[1])
    assert calls == [1]
    with pytest.raises(ValueError, match="wrapped"):
        sctd_ds.revert(model)


@every_family
def test_reverting_gives_the_plain_model_back(family):
    args, kwargs = family.arguments(rows())
    model = sctd_ds.revert(converted(build(family), "drop"))
    outputs, expected = (family.eval_outputs(each(*args, **kwargs)) for each in (model, build(family)))
    assert all(map(torch.equal, outputs, expected))
    assert not {"forward", "_sctd"} & set(vars(model))
    with pytest.raises(ValueError, match="not converted"):
        sctd_ds.revert(model)


def test_a_model_that_was_wrapped_before_is_refused():
    model = build(family_named("BertForMaskedLM"))
    model.forward = model.forward
    with pytest.raises(ValueError, match="before anything wraps it"):
        sctd_ds.convert(model)


# Real DeepSpeed, one rank in this process: three steps of every family, and dense and converted engines mixed

SCTD = {"interval": 2, "keep_token_ids": KEPT_IDS, "kl_weight": 4.0}


def settings(stage: int = 2, **blocks) -> dict:
    return {
        "train_batch_size": 3,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000000,
        **blocks,
    }


def three_steps(family: Family, engine) -> dict[str, list]:
    """The recipe's own loop; what each step did, returned, and lost."""
    seen = {"modes": [], "types": [], "losses": []}
    for step in range(3):
        batch = moved(rows(seed=step), engine.device)
        args, kwargs = family.arguments(batch)
        seen["modes"].append(engine.step_mode)
        output = engine(*args, **kwargs)
        loss = family.loss(output, batch)
        engine.backward(loss)
        engine.step()
        seen["types"].append(type(output).__name__)
        seen["losses"].append(loss.item())
    return seen


@functools.cache
def trained(family: Family, stage: int) -> dict:
    """Three steps of a new model under ZeRO, and what they changed."""
    model = build(family).float()
    keys = list(model.state_dict())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine, *_ = sctd_ds.initialize(model=model, model_parameters=model.parameters(), config=settings(stage, sctd=SCTD))
    seen = three_steps(family, engine)
    reached = reached_by_the_loss(family, model)
    return {
        **seen,
        "unchanged": [name for name, p in model.named_parameters() if name in reached and torch.equal(p, before[name])],
        "table_learned": bool((sctd_ds.importance(engine).scores[PAD + 5 :] != 10.0).any()),
        "same_keys": list(engine.module.state_dict()) == keys,
    }


def reached_by_the_loss(family: Family, model: nn.Module) -> set[str]:
    """Parameters but for poolers without a loss of their own and what a recipe has and never uses."""
    names = [name for name, _ in model.named_parameters()]
    unused = [name for name in names if "bert.pooler" in name and "cls.seq_relationship.weight" not in names]
    if family.name == "academic-budget pre-ln sparse":
        unused.append("cls.predictions.bias")
    if family.name == "academic-budget post-ln":
        unused += ["bert.encoder.FinalLayerNorm.weight", "bert.encoder.FinalLayerNorm.bias"]
    if family.name == "HelloDeepSpeed":  # in transformers 5 the decoder has a bias of its own
        unused += ["lm_head.bias", *(name for name in names if "pooler" in name)]
    return set(names) - set(unused)


@pytest.mark.parametrize("stage", [1, 2])
@every_family
def test_three_steps_under_deepspeed(family, stage):
    run = trained(family, stage)
    assert run["modes"] == ["drop", "align", "drop"]
    assert run["types"] == [family.returns.__name__] * 3
    assert all(math.isfinite(loss) for loss in run["losses"]) and len(set(run["losses"])) == 3
    assert not run["unchanged"] and run["table_learned"] and run["same_keys"]


@every_family
def test_zero_stages_agree(family):
    assert trained(family, 1)["losses"] == pytest.approx(trained(family, 2)["losses"], rel=1e-5)


BERT = family_named("BertForMaskedLM")


def dense_engine():
    model = build(BERT).float()
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings())[0]


def sctd_engine(parameters=nn.Module.parameters):
    """parameters: of a model, what its optimizer gets."""
    model = build(BERT).float()
    return sctd_ds.initialize(model=model, model_parameters=parameters(model), config=settings(), sctd_config=SCTD)[0]


def assert_same_weights(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True))


@pytest.fixture(scope="module")
def expected_losses():
    return three_steps(BERT, sctd_engine())["losses"]


def test_converting_an_engine_is_initializing_with_a_converted_model(expected_losses):
    engine = dense_engine()
    sctd_ds.convert(engine, sctd_ds.ScTDConfig(**SCTD))
    assert type(engine).__name__ == "ScTDEngine"
    assert three_steps(BERT, engine)["losses"] == expected_losses
    again = sctd_ds.convert(sctd_engine(), sctd_ds.ScTDConfig(**SCTD))
    assert three_steps(BERT, again)["losses"] == expected_losses


def test_checkpoints_travel_between_dense_and_converted_engines(tmp_path):
    dense, converted = dense_engine(), sctd_engine()
    three_steps(BERT, converted)
    dense.save_checkpoint(str(tmp_path / "dense"), tag="t", client_state={"epoch": 3})
    converted.save_checkpoint(str(tmp_path / "converted"), tag="t")
    into_converted, into_dense = sctd_engine(), dense_engine()
    path, client = into_converted.load_checkpoint(str(tmp_path / "dense"), tag="t")
    assert path and client["epoch"] == 3
    assert_same_weights(into_converted, dense)
    path, _ = into_dense.load_checkpoint(str(tmp_path / "converted"), tag="t")
    assert path
    assert_same_weights(into_dense, converted)


def test_an_engine_cannot_be_reverted():
    with pytest.raises(ValueError, match="new engine"):
        sctd_ds.revert(sctd_engine())


def test_parameter_groups_made_before_stay_valid(expected_losses):
    def groups(model):
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        others = [p for name, p in model.named_parameters() if not name.endswith("bias")]
        return [{"params": others, "weight_decay": 0.01}, {"params": biases, "weight_decay": 0.01}]

    # Another order in the optimizer's flat buffer rounds differently.
    assert three_steps(BERT, sctd_engine(groups))["losses"] == pytest.approx(expected_losses, rel=1e-6)
