"""What conversion does beyond the method's numbers: compiled layers, importance policies, copies and pickles."""

import copy
import io

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

import sctd_ds
from helpers.bert import small_bert
from sctd_ds.method.convert import state_of

KEEP = [1, 2, 3, 4]


def model(layers=8, **method):
    config = sctd_ds.ScTDConfig(**{"keep_token_ids": KEEP, "labels_per_row": 3, **method})
    return sctd_ds.convert(small_bert(vocab_size=60, num_hidden_layers=layers), config)


def batch(rows=4, length=32):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, 3], labels[:, 7] = 7, 9
    return {"input_ids": ids, "labels": labels}


def test_compiled_layers_share_four_graphs_and_agree_with_plain_ones():
    plain = model()
    compiled = copy.deepcopy(plain)
    state_of(compiled).encoder.compile(backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        for mode in ("drop", "align", "dense"):
            losses = []
            for x in (plain, compiled):
                sctd_ds.set_mode(x, mode)
                x.zero_grad()
                loss = x(**batch()).loss
                loss.backward()
                losses.append(loss)
            torch.testing.assert_close(*losses)
            for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]


def test_training_curves_of_compiled_and_plain_runs_agree():
    """With the compiler that training uses, over a schedule of steps."""
    plain = model()
    compiled = copy.deepcopy(plain)
    torch._dynamo.reset()
    state_of(compiled).encoder.compile()
    curves = []
    for x in (plain, compiled):
        optimizer = torch.optim.AdamW(x.parameters(), lr=1e-3)
        losses = []
        for step in range(1, 16):
            sctd_ds.set_mode(x, "align" if step % 5 == 0 else "drop")
            loss = x(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            sctd_ds.importance(x).update()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < curves[0][0] - 0.5
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


def kept_for_backward(x, mode):
    """Bytes of distinct storages that a training forward keeps for its backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in x.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = (storage.nbytes(), tensor)  # holding the tensor keeps its address its own
        return tensor

    sctd_ds.set_mode(x, mode)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = x(**batch()).loss
    return loss, sum(size for size, _ in sizes.values())


def test_recomputing_align_steps_fit_where_dense_steps_do():
    x, y = model(layers=12), model(layers=12, recompute_align=True)
    y.load_state_dict(x.state_dict())
    _, dense = kept_for_backward(x, "dense")
    plain_loss, plain = kept_for_backward(x, "align")
    loss, recomputed = kept_for_backward(y, "align")
    assert plain > 1.2 * dense and recomputed < 1.1 * dense
    plain_loss.backward()
    loss.backward()
    assert torch.equal(plain_loss, loss)
    for (name, p), q in zip(x.named_parameters(), y.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_random_policy_keeps_pinned_ids_and_different_positions_each_time():
    x = model(importance="random")
    data = batch()
    data["input_ids"][:, 20] = 4
    wrapped = state_of(x).adapter.batch((), data)
    first, second = state_of(x).select(wrapped), state_of(x).select(wrapped)
    assert not torch.equal(first.positions, second.positions)
    for selection in (first, second):
        assert selection.positions.shape == (4, 16)
        for pinned in (0, 20):
            assert (selection.positions == pinned).any(1).all()


def test_random_policy_in_a_half_precision_program():
    x = model(importance="random")
    wrapped = state_of(x).adapter.batch((), batch())
    torch.set_default_dtype(torch.float16)
    try:
        assert state_of(x).select(wrapped).positions.shape == (4, 16)
    finally:
        torch.set_default_dtype(torch.float32)


def test_frequency_policy_prefers_rare_labels():
    x = model(importance="frequency")
    sctd_ds.set_mode(x, "drop")
    x(**batch())
    more = batch()
    more["labels"][:, 3] = -100
    x(**more)  # label 9 is now twice as frequent as 7
    table = sctd_ds.importance(x)
    table.update()
    assert table.scores[9] < table.scores[7] < table.scores[11] and (table.scores[KEEP] == 1e4).all()
    other = model(importance="frequency")
    sctd_ds.importance(other).load_state_dict(table.state_dict())
    assert torch.equal(sctd_ds.importance(other).scores, table.scores)


def test_more_labels_than_slots_make_the_loss_nan_and_not_wrong():
    x = model(labels_per_row=1)
    assert torch.isnan(x(**batch()).loss)


def test_an_unknown_vocabulary_is_logged(caplog):
    model(keep_token_ids="auto")
    assert "none is pinned" in caplog.text


def test_pinned_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"\[60\].*0 \.\. 59"):
        model(keep_token_ids=[4, 60])


def test_a_table_of_another_vocabulary_is_refused():
    x = model()
    with pytest.raises(ValueError, match="61 ids, the model 60"):
        sctd_ds.importance(x).load_state_dict({"scores": torch.zeros(61)})


def test_converting_again_keeps_the_table_and_reverting_forgets_it():
    x = model()
    sctd_ds.importance(x).scores[30] = 1.5
    sctd_ds.convert(x, sctd_ds.ScTDConfig(keep_token_ids=KEEP, interval=2))
    assert sctd_ds.importance(x).scores[30] == 1.5 and state_of(x).config.interval == 2
    sctd_ds.revert(x)
    assert "forward" not in vars(x)
    with pytest.raises(ValueError, match="not converted"):
        sctd_ds.importance(x)
    assert x.train()(**batch()).logits.shape == (4, 32, 60)


@pytest.mark.parametrize("again", ["convert", "load"])
@pytest.mark.parametrize("policy", ["loss", "frequency", "random"])
def test_a_kept_table_pins_the_ids_of_the_new_settings(policy, again):
    x = model(importance=policy)
    sctd_ds.set_mode(x, "drop")
    x(**batch())
    sctd_ds.importance(x).update()  # labels 7 and 9
    learned = sctd_ds.importance(x).scores.clone()
    now = [2, 9, 50]
    if again == "convert":
        y = sctd_ds.convert(x, sctd_ds.ScTDConfig(keep_token_ids=now, importance=policy, labels_per_row=3))
    else:
        y = model(importance=policy, keep_token_ids=now)
        sctd_ds.importance(y).load_state_dict(sctd_ds.importance(x).state_dict())
    expected = learned.clone()
    expected[KEEP], expected[now] = 10.0, 1e4
    assert torch.equal(sctd_ds.importance(y).scores, expected)


@pytest.mark.parametrize("policy", ["loss", "frequency", "random"])
def test_a_table_kept_with_the_same_pins_is_the_same_to_the_bit(policy):
    x, fresh = model(importance=policy), model(importance=policy)
    sctd_ds.importance(x).scores[5:] = torch.rand(55, generator=torch.Generator().manual_seed(2)) * 20
    stored = sctd_ds.importance(x).state_dict()
    sctd_ds.importance(fresh).load_state_dict(stored)
    for z in (x, fresh):
        sctd_ds.set_mode(z, "drop")
        z(**batch())
        assert torch.equal(sctd_ds.importance(z).scores, stored["scores"])
        sctd_ds.importance(z).update()
    assert torch.equal(sctd_ds.importance(fresh).scores, sctd_ds.importance(x).scores)


def test_a_pickled_model_does_not_come_back_as_something_else():
    stream = io.BytesIO()
    with pytest.raises(AttributeError):
        torch.save(model(), stream)
        stream.seek(0)
        torch.load(stream, weights_only=False)


def test_modes_are_checked():
    with pytest.raises(ValueError, match="expected one of dense, drop, align"):
        sctd_ds.set_mode(model(), "dropped")
    with pytest.raises(ValueError, match='converted with method="dense"'):
        sctd_ds.set_mode(model(method="dense"), "drop")


@pytest.mark.parametrize("family", ["BERT", "ModernBERT"])
def test_a_copied_model_runs_compiled_layers_of_its_own(family):
    """A layer that looks things up in its model (rotary positions) must find those of the copy."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    modern = family == "ModernBERT"
    plain = ModernBertForMaskedLM(ModernBertConfig(**sizes, **special)) if modern else BertForMaskedLM(BertConfig(**sizes))
    original = sctd_ds.convert(plain, sctd_ds.ScTDConfig(keep_token_ids=[1]))
    state_of(original).encoder.compile(backend="eager")
    duplicate = copy.deepcopy(original)
    encoder, copied = state_of(original).encoder, state_of(duplicate).encoder
    assert copied.compiled and copied.adapter._model is duplicate
    bound_to = getattr(copied._layer._torchdynamo_orig_callable, "__self__", None)
    assert bound_to is (copied.adapter if modern else None)
    assert (copied._layer is encoder._layer) != modern
    labels = torch.full((2, 16), -100)
    labels[:, 3] = 5
    data = {"input_ids": torch.randint(3, 64, (2, 16)), "labels": labels}
    losses = []
    for either in (original.train(), duplicate.train()):
        torch.manual_seed(0)
        losses.append(either(**data).loss)
    assert torch.equal(*losses)
