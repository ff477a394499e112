"""Pairing: how a checkpoint is to be asked about pairs of texts, and which logits answer. Decided once, at start.

In whose words a pair is put, the first that there is: the user's template, the folder's own (a sentence-transformers
CrossEncoder), the row of `rerankers` that fits. That there is none of them for a language model is said. Who names the
words of the answer in the reference's overrides gets what the reference does: its clients write the prompt themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from carpool.engine.architecture import Scorer
from carpool.engine.chat import ChatTemplate
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError
from carpool.engine.rerankers import Reranker, recognise
from carpool.engine.scoring import Framer
from carpool.engine.side_files import PairFiles
from carpool.engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """`scorer` makes a head of a language model's; `sigma` divides what comes out of it.

    `overridden`: the user named its words.
    """

    scorer: Scorer | None = None
    reranker: Reranker | None = None
    files: PairFiles | None = None
    sigma: float = 1.0
    overridden: bool = False

    @classmethod
    def of(cls, config: EngineConfig, checkpoint: Checkpoint) -> Pairing:
        """Raises ConfigError if what the user or the files name makes no scorer."""
        scorer = Scorer.of(checkpoint.config)
        if config.convert not in ("auto", "classify"):
            return cls(scorer=scorer)
        files = checkpoint.pairs
        embeds = (
            bool(checkpoint.pooling) and config.pooler_config.pooling is None
        )  # its files pool for vectors
        reranker = None if embeds else _recognise(config, checkpoint)
        if scorer is None and files is not None and files.token_ids:
            if max(files.token_ids) >= checkpoint.vocab_size:
                raise ConfigError(
                    f"LogitScore reads token {max(files.token_ids)}, and this model knows {checkpoint.vocab_size}."
                )
            scorer = Scorer.of_ids(files.token_ids)
        sigma = 1.0
        if (
            scorer is None
            and reranker is not None
            and any(
                name.endswith(("ForCausalLM", "ForConditionalGeneration"))
                for name in checkpoint.architectures
            )
        ):
            scorer, sigma = Scorer(reranker.words, reranker.method, reranker.token_ids), reranker.sigma
        overridden = "classifier_from_token" in config.hf_overrides
        return cls(scorer=scorer, reranker=reranker, files=files, sigma=sigma, overridden=overridden)

    def calibrated(self, config: EngineConfig) -> EngineConfig:
        """`config` with `sigma` in it, unless the user has one."""
        if self.sigma == 1.0 or config.pooler_config.logit_sigma is not None:
            return config
        return replace(config, pooler_config=replace(config.pooler_config, logit_sigma=self.sigma))

    def framer(self, config: EngineConfig, chat: ChatTemplate, tokenizer: Tokenizer) -> Framer | None:
        """What puts pairs into words; None if they are two texts to the tokenizer, or one behind the other.

        Raises ConfigError where words are needed that cannot be had.
        """
        if config.chat_template and not (own := chat.for_pairs()).drops_pairs:
            return own
        if self.overridden:
            return None
        if self.files is not None and self.files.chat:
            own = chat.of_the_folder.for_pairs(
                specials=False,
                options=self.files.options,
                prompt=self.files.prompt,
                prompts=self.files.prompts,
                parts=self.files.parts,
                instruction_is_system=True,
            )
            if own.carries_pairs:
                return own
        if self.reranker is not None:
            try:
                tokenizer.ids_of(self.reranker.markers)
            except ConfigError as error:
                raise ConfigError(
                    f"This model is asked as a {self.reranker.name}, whose prompt its tokenizer cannot write "
                    f"({error}): give the prompt it was trained on with --chat-template."
                ) from error
            return self.reranker
        if self.files is not None and self.files.chat:
            raise ConfigError(
                "This model's files put pairs into its tokenizer's chat template, which has no place for a query and "
                "a document: give one that has with --chat-template."
            )
        return None

    def notices(
        self, framer: Framer | None, chat: ChatTemplate, config: EngineConfig, *, scores: bool, blunt: bool
    ) -> Iterator[str]:
        """What a user has to know. `scores`: the model does pairs; `blunt`: it is a language model, and nobody said how
        they are put."""
        if scores and config.chat_template and chat.for_pairs().drops_pairs:
            yield (
                "--chat-template has no place for a query and a document, which are messages of these two roles: pairs "
                "are put as they are without it."
            )
        if isinstance(framer, Reranker) and framer.called is not None:
            yield (
                f"Taken for a {framer.name} by its name and class: pairs are put into that family's own prompt. "
                "--chat-template puts another in its place, --convert embed makes it an embedding model."
            )
        if framer is None and blunt and self.overridden and self.reranker is not None:
            yield (
                "With classifier_from_token in --hf-overrides pairs are put as vLLM puts them: both texts, one after "
                f"the other, for clients that write {self.reranker.name}'s whole prompt themselves. Without it they "
                "are put into that prompt here, and --chat-template brings another."
            )
        elif framer is None and blunt:
            yield (
                "No prompt is known for pairs of this language model: /score and /rerank give it both texts, one after "
                "the other, and what it makes of them may mean nothing. Give the prompt that it was trained on with "
                "--chat-template."
            )


def names_of(config: EngineConfig, checkpoint: Checkpoint) -> list[str]:
    """What the user calls it, its folder (in the hub's cache, the repository), and what it was saved as."""
    hub = [part for part in checkpoint.path.parts if part.startswith("models--")]
    saved = str(checkpoint.config.get("_name_or_path") or "")
    return [*(Path(name).name for name in (config.model, str(checkpoint.path), saved)), *hub]


def _recognise(config: EngineConfig, checkpoint: Checkpoint) -> Reranker | None:
    names = names_of(config, checkpoint)
    return recognise(names, checkpoint.config, checkpoint.architectures, checkpoint.dialect)
