"""The text tower of an open_clip model, whatever its vision tower is."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .tower import Tower, check_fits, is_of


class OpenClipText(Tower):
    """The half of a `Tower` that encodes text with open_clip; see there."""

    def tokenize(self, tokenizer: Callable, texts: list[str]) -> dict[str, Tensor]:
        if is_of("transformers", tokenizer):
            name = type(tokenizer).__name__
            raise TypeError(f"tokenizer must be open_clip's, as the model is; got a {name}")
        length = self._context_length(tokenizer)
        ids, longer = (tokenizer(texts, context_length=length + extra) for extra in (0, 1))
        # A tokenizer cuts a long text without an error and puts the end token where, with one
        # token more, a word stands.
        check_fits(texts, (longer[:, :length] != ids).any(dim=1).tolist(), length)
        vocabulary = self.model.vocab_size
        if vocabulary and ids.max() >= vocabulary:  # open_clip has no size for some text models
            raise ValueError(
                f"tokenizer has a token {ids.max()} where the model's vocabulary has {vocabulary}: "
                "it belongs to another model"
            )
        return {"input_ids": ids}

    def encode_text(self, tokens: dict[str, Tensor]) -> Tensor:
        return self.model.encode_text(tokens["input_ids"].to(self.device), normalize=True)

    def _context_length(self, tokenizer: Callable) -> int:
        """The model's context length, or the tokenizer's if the text model takes any length.

        The latter are transformers' text models in open_clip.
        """
        text = getattr(self.model, "text", self.model)
        fixed = hasattr(text, "positional_embedding")
        return self.model.context_length if fixed else tokenizer.context_length
