"""Small stand-ins for the models of well-known DeepSpeed recipes, to test adapters on.

They keep what an adapter touches: module names, argument order, mask and label conventions, return types, where
LayerNorms and losses sit. The recipes themselves need versions of packages that no longer install.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel
from transformers.models.roberta.modeling_roberta import RobertaLMHead, RobertaPreTrainedModel


class Embeddings(nn.Module):
    """Words, positions counted from 0, segments."""

    def __init__(self, vocabulary: int, width: int, length: int, norm: bool) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(length, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        if norm:
            self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word_embeddings(input_ids) + self.position_embeddings(positions) + self.token_type_embeddings(types)
        return self.LayerNorm(x) if hasattr(self, "LayerNorm") else x


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, additive: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + additive).softmax(-1)
        return self.dense((weights @ value).transpose(1, 2).flatten(2)), weights


class Pooler(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense_act = nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        return self.dense_act(states[:, 0]).tanh()


class Transform(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense_act = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense_act(x)))


class TupleLayer(nn.Module):
    """A layer of bing_bert (`pair=False`, a tensor out) and of academic-budget-bert (`pair=True`, with attention weights)."""

    def __init__(self, width: int, heads: int, post: bool, pair: bool) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.PreAttentionLayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.PostAttentionLayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.intermediate = nn.Linear(width, 2 * width)
        self.output = nn.Linear(2 * width, width)
        self.post, self.pair = post, pair

    def forward(self, hidden_states: Tensor, attention_mask: Tensor):
        if self.post:  # the same names, applied after each residual
            attended, weights = self.attention(hidden_states, attention_mask)
            x = self.PreAttentionLayerNorm(hidden_states + attended)
            x = self.PostAttentionLayerNorm(x + self.output(F.gelu(self.intermediate(x))))
        else:
            attended, weights = self.attention(self.PreAttentionLayerNorm(hidden_states), attention_mask)
            x = hidden_states + attended
            x = x + self.output(F.gelu(self.intermediate(self.PostAttentionLayerNorm(x))))
        return (x, weights) if self.pair else x


class TupleEncoder(nn.Module):
    """Returns a list of states, whose last the caller takes; academic-budget-bert wraps that list in a tuple."""

    def __init__(self, layers: list[TupleLayer], width: int, final: bool) -> None:
        super().__init__()
        self.FinalLayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.layer = nn.ModuleList(layers)
        self.final = final

    def forward(self, x: Tensor, mask: Tensor, output_all_encoded_layers: bool = True, checkpoint_activations: bool = False):
        for layer in self.layer:
            x = layer(x, mask)
            x = x[0] if isinstance(x, tuple) else x
        return [self.FinalLayerNorm(x) if self.final else x]


class TupleBert(nn.Module):
    def __init__(self, config: SimpleNamespace, post: bool, pair: bool) -> None:
        super().__init__()
        self.embeddings = Embeddings(config.vocab_size, config.hidden_size, config.length, norm=not pair)
        layers = [TupleLayer(config.hidden_size, config.heads, post, pair) for _ in range(config.layers)]
        self.encoder = TupleEncoder(layers, config.hidden_size, final=not post)
        self.pooler = Pooler(config.hidden_size)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.embeddings.word_embeddings.weight.dtype
        additive = (1.0 - attention_mask[:, None, None, :].to(dtype)) * -10000.0
        states = self.encoder(self.embeddings(input_ids, token_type_ids), additive, output_all_encoded_layers=False)[-1]
        return states, self.pooler(states)


class BingHeads(nn.Module):
    def __init__(self, words: nn.Parameter, sentence: bool) -> None:
        super().__init__()
        self.predictions = nn.Module()
        self.predictions.transform = Transform(words.shape[1])
        self.predictions.decoder = nn.Linear(words.shape[1], words.shape[0], bias=False)
        self.predictions.decoder.weight = words
        self.predictions.bias = nn.Parameter(torch.zeros(words.shape[0]))
        if sentence:
            self.seq_relationship = nn.Linear(words.shape[1], 2)


class BertForPreTrainingPreLN(nn.Module):
    """bing_bert: `network((type, ids, mask, segments, next_sentence, labels), log=True)`: a scalar, or scores if no labels."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.bert = TupleBert(config, post=False, pair=False)
        self.cls = BingHeads(self.bert.embeddings.word_embeddings.weight, sentence=True)

    def forward(self, batch, log: bool = True):
        _, ids, mask, segments, sentence, labels = batch
        states, pooled = self.bert(ids, segments, mask)
        head = self.cls.predictions
        scores = head.decoder(head.transform(states)) + head.bias
        relation = self.cls.seq_relationship(pooled)
        if labels is None or sentence is None:
            return scores, relation
        places = (labels + 1).view(-1).nonzero().view(-1)
        loss = F.cross_entropy(scores.flatten(0, 1)[places], labels.view(-1)[places], ignore_index=-1)
        return loss + F.cross_entropy(relation, sentence.view(-1), ignore_index=-1)


class BertLMHeadModel(nn.Module):
    """academic-budget-bert, a masked LM: `network((type, ids, mask, segments, labels))` -> (loss,); scores without labels."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.bert = TupleBert(config, post=config.encoder_ln_mode == "post-ln", pair=True)
        self.cls = BingHeads(self.bert.embeddings.word_embeddings.weight, sentence=False)
        if not config.sparse_mask_prediction:
            self.cls.predictions.decoder.bias = self.cls.predictions.bias

    def forward(self, batch, output_attentions: bool = False):
        _, ids, mask, segments, labels = batch
        states, _ = self.bert(ids, segments, mask)
        head = self.cls.predictions
        scores = head.decoder(head.transform(states))
        if labels is None:
            return scores
        places = (labels + 1).view(-1).nonzero().view(-1)
        return (F.cross_entropy(scores.flatten(0, 1)[places], labels.view(-1)[places], ignore_index=-1),)


class MaskedPredict(RobertaLMHead):
    def __init__(self, config: RobertaConfig, words: nn.Parameter) -> None:
        super().__init__(config)
        self.decoder.weight = words

    def forward(self, features: Tensor, masked_token_indices: Tensor | None = None, **kwargs) -> Tensor:
        if masked_token_indices is not None:
            features = features.flatten(0, 1)[masked_token_indices]
        return super().forward(features)


class RobertaMLMModel(RobertaPreTrainedModel):
    """HelloDeepSpeed: `model(src_tokens=, attention_mask=, tgt_tokens=)` -> scalar; targets hold the pad id elsewhere."""

    def __init__(self, config: RobertaConfig, encoder: RobertaModel) -> None:
        super().__init__(config)
        self.encoder = encoder
        self.lm_head = MaskedPredict(config, encoder.embeddings.word_embeddings.weight)

    def forward(self, src_tokens: Tensor, attention_mask: Tensor, tgt_tokens: Tensor) -> Tensor:
        states, *_ = self.encoder(input_ids=src_tokens, attention_mask=attention_mask, return_dict=False)
        places = (tgt_tokens != self.config.pad_token_id).view(-1).nonzero().view(-1)
        return F.cross_entropy(self.lm_head(states, places), tgt_tokens.view(-1)[places])


class MegatronEmbedding(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.length, config.hidden_size)
        self.tokentype_embeddings = nn.Embedding(2, config.hidden_size)

    def forward(self, input_ids: Tensor, position_ids: Tensor, tokentype_ids: Tensor | None = None) -> Tensor:
        x = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        if tokentype_ids is not None:
            x = x + self.tokentype_embeddings(tokentype_ids)
        return x.transpose(0, 1).contiguous()  # [s, b, h]


class ParallelTransformerLayer(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        width = config.hidden_size
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, config.heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> tuple[Tensor, Tensor]:
        x = self.input_layernorm(hidden_states).transpose(0, 1)
        additive = x.new_zeros(attention_mask.shape).masked_fill(attention_mask, -10000.0)
        x = hidden_states + self.self_attention(x, additive)[0].transpose(0, 1)
        return x + self.mlp(self.post_attention_layernorm(x)), x.new_zeros(())  # states and a mixture-of-experts loss


class ParallelTransformer(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ParallelTransformerLayer(config) for _ in range(config.layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **kwargs):
        losses = []
        for layer in self.layers:
            hidden_states, loss = layer(hidden_states, attention_mask, encoder_output=None)
            losses.append(loss)
        return (self.final_layernorm(hidden_states), *losses)


class MegatronPooler(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, sequence_index: int = 0) -> Tensor:
        return self.dense(hidden_states[sequence_index]).tanh()


class MegatronHead(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden_states: Tensor, word_embeddings_weight: Tensor) -> Tensor:
        return F.linear(self.layernorm(F.gelu(self.dense(hidden_states))), word_embeddings_weight, self.bias)


class BertModel(nn.Module):
    """Megatron-DeepSpeed: `model(tokens, padding_mask, tokentype_ids=, lm_labels=)` -> (losses per token [b, s], scores, rest).

    Inside, states are [s, b, h] and the boolean mask [b, 1, s, s] is True where attention is forbidden.
    """

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.pre_process = self.post_process = True
        self.language_model = nn.Module()
        self.language_model.embedding = MegatronEmbedding(config)
        self.language_model.encoder = ParallelTransformer(config)
        self.lm_head = MegatronHead(config)
        self.binary_head = None
        if config.binary:
            self.language_model.pooler = MegatronPooler(config.hidden_size)
            self.binary_head = nn.Linear(config.hidden_size, 2)

    def shared_embedding_or_output_weight(self) -> Tensor:
        return self.language_model.embedding.word_embeddings.weight

    def forward(self, bert_model_input: Tensor, attention_mask: Tensor, tokentype_ids=None, lm_labels=None):
        allowed = attention_mask[:, None, :] * attention_mask[:, :, None]
        positions = torch.arange(bert_model_input.shape[1], device=bert_model_input.device).expand_as(bert_model_input)
        states = self.language_model.embedding(bert_model_input, positions, tokentype_ids=tokentype_ids)
        states, *_ = self.language_model.encoder(states, (allowed < 0.5)[:, None])
        logits = self.lm_head(states, self.shared_embedding_or_output_weight()).transpose(0, 1)
        sentence = None if self.binary_head is None else self.binary_head(self.language_model.pooler(states))
        if lm_labels is None:
            return logits, sentence, (logits, sentence)
        # Unlabelled tokens have some loss too; the recipe multiplies it by 0.
        losses = F.cross_entropy(logits.flatten(0, 1), lm_labels.clamp(min=0).flatten(), reduction="none")
        losses = losses.view(lm_labels.shape)
        return losses, sentence, (losses, sentence)


def megatron_loss(output, loss_mask: Tensor, sentence_order: Tensor) -> Tensor:
    """What the recipe minimises, outside of the model."""
    losses, scores, _ = output
    loss = (losses.view(-1) * loss_mask.reshape(-1)).sum() / loss_mask.sum()
    if scores is not None:
        loss = loss + F.cross_entropy(scores.view(-1, 2), sentence_order.view(-1), ignore_index=-1)
    return loss
