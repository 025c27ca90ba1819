"""Labelled tokens, and the positions where the last layer is run for them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertForMaskedLM

import sctd_ds
from helpers.bert import small_bert
from sctd_ds.method.convert import state_of
from sctd_ds.method.labels import locate_labels

NONE = -100


def labels_of(rows, length):
    labels = torch.full((len(rows), length), NONE)
    for row, positions in enumerate(rows):
        for position in positions:
            labels[row, position] = 5 + position
    return labels


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_every_label_is_found_once_in_both_coordinates(data):
    length = data.draw(st.integers(2, 12))
    rows = data.draw(st.lists(st.sets(st.integers(0, length - 1), max_size=length - 1), min_size=1, max_size=4))
    most = max(map(len, rows))
    slots = data.draw(st.sampled_from([None, *range(max(1, most), length + 2)]))
    labels = labels_of(rows, length)
    found = locate_labels(labels, NONE, slots, 100)
    narrow = found.narrowed()
    assert found.fits and found.count == max(1, sum(map(len, rows)))
    for row, wanted in enumerate(rows):
        used = found.targets[row] != NONE
        assert found.tokens.positions[row][used].tolist() == sorted(wanted)
        assert (found.targets[row][used] - 5).tolist() == sorted(wanted)
        if narrow.outputs is None:
            assert found.tokens.positions.shape[1] + 1 >= length
            continue
        at, slot = narrow.outputs.positions[row], narrow.outputs.slot[row]
        assert at[0] == 0 and len(set(at.tolist())) == len(at) == found.tokens.positions.shape[1] + 1
        assert all(slot[position] == place for place, position in enumerate(at.tolist())) and (slot >= 0).sum() == len(at)
        # Through the narrow coordinates the same positions, each with its own slot back.
        assert at[narrow.tokens.positions[row].long()].tolist() == found.tokens.positions[row].tolist()
        assert [narrow.tokens.slot[row, p] for p in narrow.tokens.positions[row]] == list(range(len(used)))
    assert torch.equal(narrow.targets, found.targets)


def test_a_row_with_more_labels_than_slots_does_not_fit():
    assert not locate_labels(labels_of([{1}, {1, 2, 3}], 8), NONE, 2, 100).fits


def model(**settings):
    plain = small_bert(vocab_size=50, hidden_size=16, intermediate_size=32, max_position_embeddings=16)
    return sctd_ds.convert(plain, sctd_ds.ScTDConfig(keep_token_ids=[1, 2], **settings))


def queries_of_last_layer(x, mode, labels):
    """Positions per row that the last layer's feed-forward ran on, in each of the mode's passes, and the loss."""
    seen = []
    last = state_of(x).adapter.layers[-1]
    hook = last.intermediate.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    sctd_ds.set_mode(x, mode)
    ids = torch.randint(5, 50, labels.shape, generator=torch.Generator().manual_seed(1))
    loss = x(input_ids=ids, labels=labels).loss
    loss.backward()
    hook.remove()
    return seen, loss


@pytest.mark.parametrize("labels", [[{3, 7}, {1}], [{0, 4}, {2, 5}], [set(), {6}]], ids=["plain", "at-cls", "row-without"])
@pytest.mark.parametrize("mode", ["dense", "drop", "align"])
def test_last_layer_runs_where_the_loss_reads_it_and_learns_the_same(mode, labels):
    narrow, whole = model(kl_weight=3.0), model(kl_weight=3.0, last_layer="all")
    labels = labels_of(labels, 12)
    most = int((labels != NONE).sum(1).max())
    passes = 2 if mode == "align" else 1
    seen, loss = queries_of_last_layer(narrow, mode, labels)
    everywhere, expected = queries_of_last_layer(whole, mode, labels)
    assert seen == [most + 1] * passes and everywhere == [12] * passes
    torch.testing.assert_close(loss, expected)
    for (name, p), q in zip(narrow.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_evaluation_sees_a_plain_model():
    x, labels = model(), labels_of([{3, 7}, {1}], 12)
    plain = BertForMaskedLM(copy.deepcopy(x.config))
    plain.load_state_dict(x.state_dict())
    ids = torch.randint(5, 50, labels.shape, generator=torch.Generator().manual_seed(1))
    output, expected = (m.eval()(input_ids=ids, labels=labels) for m in (x, plain))
    assert torch.equal(output.logits, expected.logits) and output.loss == expected.loss
