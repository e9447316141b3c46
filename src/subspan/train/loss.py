"""The loss of a causal language model without the logits of all tokens at once."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subspan.nn import linear_cross_entropy

__all__ = ["check_chunked_loss", "chunked_loss"]


def chunked_loss(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, count: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy of the next token.

    Args:
        model: base model and output head.
        input_ids, labels: (batch, tokens).
        count: of tokens to divide by, in place of those of this batch.
    """
    hidden = model.base_model(input_ids=input_ids).last_hidden_state
    weight = model.get_output_embeddings().weight
    return linear_cross_entropy(hidden[:, :-1], weight, labels[:, 1:], count=count)


@torch.no_grad()
def check_chunked_loss(model: PreTrainedModel) -> None:
    """Compare with the loss that the model computes itself, on a few tokens, also with a head of large weights.

    Soft-capped logits differ from plain ones only where they are large.

    Raises:
        ValueError: a model whose loss is another one (soft-capped or scaled logits, a bias, auxiliary losses).
    """
    training = model.training
    model.eval()
    ids = torch.arange(16, device=model.device).remainder(model.config.get_text_config().vocab_size).view(2, 8)
    try:
        head = model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise ValueError("its head has a bias")
        for factor in (1.0, 128.0):  # a power of two: the weights are restored to the bit
            head.weight.mul_(factor)
            try:
                own = model(input_ids=ids, labels=ids).loss
                chunked = chunked_loss(model, ids, ids)
            finally:
                head.weight.div_(factor)
            close = torch.isclose(own.float(), chunked.float(), rtol=1e-2 if own.dtype == torch.bfloat16 else 1e-4)
            if not (same := bool(close)):
                break
    except (AttributeError, ValueError) as error:
        raise ValueError(f"chunked_loss does not know the parts of {type(model).__name__}: {error}") from error
    finally:
        model.train(training)
    if not same:
        raise ValueError(
            f"chunked_loss gives {chunked:.6g} where {type(model).__name__} computes {own:.6g}: its loss is more than "
            "the cross-entropy of its linear head. Leave chunked_loss out."
        )
