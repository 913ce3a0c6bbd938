"""How many tokens a pass has where the recipe leaves it open."""

from __future__ import annotations

from small import make_model

from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.output_head import OutputHead, find_head
from lora_cli.objectives._base import batch_tokens, tokens_of_pass


def test_a_vocabulary_bounds_a_pass_only_where_all_logits_are_made() -> None:
    """A vocabulary of a million words leaves 166 tokens of logits on a CPU, and all of a pass where there are none."""
    model = make_model("llama")
    head = find_head(model, packs=False)
    assert isinstance(head, OutputHead)
    model.config.vocab_size = 10**6
    for adapted, tokens in ((AdaptedModel(model, {}), 166), (AdaptedModel(model, {}, head=head), 4096)):
        assert batch_tokens("auto", adapted, at_most={"cpu": 4096}) == tokens
        assert batch_tokens(5000, adapted, at_most={"cpu": 4096}) == 5000
    assert tokens_of_pass("auto", "cuda", at_most={"cpu": 4096, "cuda": 16384}) == 16384
